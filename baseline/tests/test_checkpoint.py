"""Stopped, killed, out of space: a run goes on, and ends as if nothing had happened."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from nursery import in_step, send
from old_checkpoint import FOLDER, STOP, WORDS, losses, make_inputs

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
# Three epochs of six steps, dropout on: a run of a second. --output comes last.
SMALL = ("--sample", "--limit", 24, "--batch-size", 4, "--epochs", 3, "--dropout", 0.1)
SMALL += ("--log-every", 1, "--seed", 3, "--device", "cpu")
STEPS = 18


# What asks a run to stop, by the name that its log has for it.
STOPS = {
    "SIGUSR1": send("SIGUSR1"),
    "SIGTERM": send("SIGTERM"),
    "the file stop": "Path(sys.argv[-1], 'stop').touch()",
    "SIGINT": send("SIGINT"),
}


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def checkpoint_step(folder):
    return checkpoint(folder)["state"]["step"]


def last_step(text):
    """The last step that a log has."""
    steps = re.findall(r"^step ([\d,]+)/", text, re.MULTILINE)
    return int(steps[-1].replace(",", "")) if steps else 0


def last_line(text):
    return text.splitlines()[-1]


def weights(folder):
    return safetensors.torch.load_file(folder / "model/model.safetensors")


def measured(folder):
    """What the log intervals and the evaluations of a run have measured, but for times."""
    fields = ("step", "loss", "learning_rate", "gradient_norm", "tokens")
    intervals = read(folder, "timings.json")["intervals"]
    evaluations = read(folder)["evaluations"]
    return (
        [[interval[field] for field in fields] for interval in intervals],
        [[one[field] for field in ("step", "exact_match", "f1")] for one in evaluations],
    )


def assert_same(run, other):
    """Losses, rates, norms, scores, answers and weights are equal to the last bit."""
    assert measured(run) == measured(other)
    assert read(run, "predictions.json") == read(other, "predictions.json")
    other_weights = weights(other)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, other_weights[name]), name
    # What is there only while it is under way is gone.
    left = {"results.json", "timings.json", "predictions.json", "model", "tensorboard"}
    assert {path.name for path in run.iterdir()} == left


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """The run that nobody stops."""
    output = tmp_path_factory.mktemp("whole") / "run"
    nursery.start(TRAIN, [*SMALL, "--output", output], f"{output}.log").end()
    steps = [interval["step"] for interval in read(output, "timings.json")["intervals"]]
    assert steps == list(range(1, STEPS + 1))
    return output


# 1. Asked to stop


def stop_at_steps(start, output, steps, words=()):
    """A life for each of these steps, which is stopped in it."""
    for number, step in enumerate(steps):
        reason = list(STOPS)[number % len(STOPS)]
        profile = "--profile" if number % 2 else "--no-profile"
        patch = in_step(step, STOPS[reason])
        text = start(*SMALL, *words, profile, "--output", output, patch=patch).end(75)
        line = f"stopped by {reason} at step {step}: the same command with --output {output}"
        assert last_line(text).startswith(line)
        assert checkpoint_step(output) == step
        # The request is answered, and nothing looks finished.
        names = {path.name for path in output.iterdir()}
        assert names == {"checkpoint.pt", "tensorboard", ".lock"}


def test_stopped_many_times_and_resumed(start, whole, tmp_path):
    output = tmp_path / "run"
    # Steps 6 and 12 end an epoch.
    steps = [1, 2, 5, 6, 7, 12, 13, 17, 18]
    begin = time.monotonic()
    stop_at_steps(start, output, steps)
    text = start(*SMALL, "--output", output).end()
    took = time.monotonic() - begin
    assert "going on from step 18\n" in text
    assert_same(output, whole)
    results = read(output)
    assert results["resumed_from_steps"] == steps
    assert results["steps"] == STEPS
    assert len(results["lives"]) == len(steps) + 1
    assert "has changed" not in text
    # The times are those of all lives: more than the steps', less than the clock on the wall.
    intervals = read(output, "timings.json")["intervals"]
    assert sum(interval["seconds"] for interval in intervals) <= results["train_seconds"] < took
    assert sum(results["epoch_seconds"]) == pytest.approx(results["train_seconds"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("words", [(), ("--batching", "bucketed", "--accumulate", 2)])
def test_stopped_at_random_steps(seed, words, start, tmp_path):
    start(*SMALL, *words, "--output", tmp_path / "whole").end()
    steps = sorted(random.Random(seed).sample(range(1, STEPS + 1), 6))
    stop_at_steps(start, tmp_path / "run", steps, words)
    start(*SMALL, *words, "--output", tmp_path / "run").end()
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_stops_though_a_library_has_put_its_own_handlers_of_signals_in_place(start, tmp_path):
    """As Triton's compiler does, in C: Python does not see it. Here they are ignored."""
    ignore = "__import__('ctypes').CDLL(None).signal(signal.SIGTERM, 1)"
    patch = in_step(2, ignore) + in_step(5, send("SIGTERM"))
    text = start(*SMALL, "--output", tmp_path / "run", patch=patch).end(75)
    assert last_line(text).startswith("stopped by SIGTERM at step 5:")


def in_evaluation(action):
    """A patch that does something within the first evaluation, which has several batches."""
    return f"""
EVALUATION_BATCH_TOKENS = 500
def best_span(*given, best_span=best_span):
    {action}
    return best_span(*given)
"""


@pytest.mark.parametrize("reason", ["SIGUSR1", "the file stop"])
def test_stopped_in_the_last_evaluation(reason, start, whole, tmp_path):
    output = tmp_path / "run"
    text = start(*SMALL, "--output", output, patch=in_evaluation(STOPS[reason])).end(75)
    assert last_line(text).startswith(f"stopped by {reason} at step 18:")
    assert "evaluated" not in text
    assert not (output / "results.json").exists()
    start(*SMALL, "--output", output).end()
    assert_same(output, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_evaluation_of_an_epoch_is_repeated(name, start, tmp_path):
    """Stopped or killed within it: the next life evaluates first, and then goes on."""
    words = (*SMALL, "--evaluate-every", "epoch")
    start(*words, "--output", tmp_path / "whole").end()
    output = tmp_path / "run"
    life = start(*words, "--output", output, patch=in_evaluation(send(name)))
    life.end(75 if name == "SIGTERM" else -signal.SIGKILL)
    assert checkpoint_step(output) == 6
    text = start(*words, "--output", output).end()
    said = re.findall(r"^(going on from step 6|evaluated|step \d+)", text, re.MULTILINE)
    assert said[:3] == ["going on from step 6", "evaluated", "step 7"]
    assert_same(output, tmp_path / "whole")


def test_asked_from_outside(start, tmp_path):
    """At any moment, also before the first step."""
    output = tmp_path / "run"
    step = 0
    for number, reason in enumerate(STOPS):
        life = start(*SMALL, "--epochs", 40, "--output", output)
        life.wait_for("features to train")
        time.sleep(0.4 * number)
        if reason.startswith("SIG"):
            life.kill(signal.Signals[reason])
        else:
            (output / "stop").touch()
        text = life.end(75)
        saved = (output / "checkpoint.pt").exists()
        reached = checkpoint_step(output) if saved else 0  # asked before the first step
        assert f"stopped by {reason} at step {reached}:" in text
        assert reached >= step
        assert not (output / "stop").exists()
        step = reached
    assert step > 0


# 2. Killed


def kill_again_and_again(start, output, words, kills, steps, seed):
    """Some of the kills fall into a save, as there is one after each step."""
    chance = random.Random(seed)
    words = (*words, "--save-every", 1, "--output", output)
    step = 0
    for _ in range(kills):
        aim = min(step + chance.randint(1, steps // kills), steps - 2)
        life = start(*words)
        life.wait_until(lambda: last_step(life.text()) >= aim)
        time.sleep(chance.random() * 0.1)
        life.kill(signal.SIGKILL)
        text = life.end(None)
        if life.code == 0:
            # It was faster.
            return
        assert life.code == -signal.SIGKILL
        if (output / "checkpoint.pt").exists():
            step = checkpoint_step(output)
            assert last_step(text) - 1 <= step <= last_step(text) + 1
    assert f"going on from step {step}\n" in start(*words).end()


def test_killed_and_resumed(start, whole, tmp_path):
    kill_again_and_again(start, tmp_path / "run", SMALL, kills=3, steps=STEPS, seed=1)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_twenty_times(start, tmp_path):
    words = (*SMALL, "--epochs", 25)
    start(*words, "--output", tmp_path / "whole").end()
    kill_again_and_again(start, tmp_path / "run", words, kills=20, steps=150, seed=2)
    assert_same(tmp_path / "run", tmp_path / "whole")


# A save's worst moments, as patches of train.py; {0} is the number of the save.
MOMENTS = {
    "half written": """
import io
def save_half(content, file, save=torch.save, numbers=iter(range(1, 99))):
    if next(numbers) < {0}:
        return save(content, file)
    buffer = io.BytesIO()
    save(content, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
""",
    "just renamed": """
def replace_and_die(path, other, replace=Path.replace, numbers=iter(range(1, 99))):
    replace(path, other)
    if path.name.startswith("checkpoint") and next(numbers) == {0}:
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace = replace_and_die
""",
}


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_a_save(moment, save, start, whole, tmp_path):
    output = tmp_path / "run"
    words = (*SMALL, "--save-every", 7, "--output", output)
    start(*words, patch=MOMENTS[moment].format(save)).end(-signal.SIGKILL)
    step = 7 * (save if moment == "just renamed" else save - 1)
    assert (output / "checkpoint.pt").exists() == (step > 0)
    # What the killed one left half written does not pile up.
    text = start(*words, patch=in_step(step + 1, send("SIGTERM"))).end(75)
    assert (f"going on from step {step}\n" in text) == (step > 0)
    assert {path.name for path in output.iterdir()} == {"checkpoint.pt", ".lock", "tensorboard"}
    if (moment, save) == ("half written", 2):
        start(*words).end()
        assert_same(output, whole)


@pytest.mark.parametrize("name", ["timings.json", "results.json"])
def test_killed_at_the_very_end(name, start, whole, tmp_path):
    """Just after this file has been written; model/ is there already."""
    patch = "def write_json(path, content, write_json=write_json):\n"
    patch += "    write_json(path, content)\n"
    patch += f"    if path.name == '{name}':\n        {send('SIGKILL')}\n"
    output = tmp_path / "run"
    start(*SMALL, "--output", output, patch=patch).end(-signal.SIGKILL)
    assert (output / "model").is_dir()
    assert (output / "results.json").exists() == (name == "results.json")
    text = start(*SMALL, "--output", output).end()
    if name == "results.json":
        assert "finished" in text
    else:
        assert_same(output, whole)


def test_an_evaluation_killed_at_the_very_end_starts_again(start, tmp_path):
    """It has no checkpoint, and model/ is there already."""
    patch = "def write_json(path, content):\n    " + send("SIGKILL")
    words = ("--sample", "--limit", 8, "--epochs", 0, "--output", tmp_path / "run")
    start(*words, patch=patch).end(-signal.SIGKILL)
    assert (tmp_path / "run/model").is_dir()
    start(*words).end()
    assert (tmp_path / "run/results.json").exists()


def test_saves_by_the_clock(start, whole, tmp_path):
    output = tmp_path / "run"
    patch = "SAVE_SECONDS = 0\n" + in_step(9, send("SIGKILL"))
    start(*SMALL, "--output", output, patch=patch).end(-signal.SIGKILL)
    assert checkpoint_step(output) == 8
    start(*SMALL, "--output", output).end()
    assert_same(output, whole)


# 3. Checkpoints that cannot be gone on from


def test_checkpoint_that_cannot_be_read(start, tmp_path):
    output = tmp_path / "run"
    words = (*SMALL, "--output", output)
    start(*words, patch=in_step(2, send("SIGTERM"))).end(75)
    path = output / "checkpoint.pt"
    good = path.read_bytes()
    half = good[: len(good) // 2]
    for content in (half, good[:-9], b"hello", b""):
        path.write_bytes(content)
        line = last_line(start(*words).end(2))
        assert line.startswith(f"error: {path} cannot be read") and "remove it" in line
        assert path.read_bytes() == content
    path.write_bytes(good)
    text = start(*words, patch=in_step(3, send("SIGTERM"))).end(75)
    assert "going on from step 2\n" in text


def rename_weights(content):
    content["model"] = {f"module.{name}": one for name, one in content["model"].items()}


# Changes of a checkpoint into one that is not train.py's, or not this model's.
OTHERS = {
    "nothing": lambda content: content.clear(),
    "no settings": lambda content: content.update(settings=None),
    "settings alone": lambda content: [content.pop(name) for name in list(content)[1:]],
    "no step": lambda content: content.update(state={}),
    "no weights": lambda content: content.update(model={}),
    "weights of numbers": lambda content: content.update(model={"x": 1}),
    "other names": rename_weights,
    "no optimizer": lambda content: content.pop("optimizer"),
    "other moments": lambda content: content["optimizer"]["state"].update(x={}),
}


@pytest.fixture(scope="module")
def stopped_run(nursery, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped") / "run"
    words = [*SMALL, "--output", output]
    nursery.start(TRAIN, words, f"{output}.log", in_step(2, send("SIGTERM"))).end(75)
    return output


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoint_of_another_program(name, stopped_run, start, tmp_path):
    content = checkpoint(stopped_run)
    assert list(content)[0] == "settings"
    OTHERS[name](content)
    output = tmp_path / "run"
    output.mkdir()
    torch.save(content, output / "checkpoint.pt")
    before = (output / "checkpoint.pt").read_bytes()
    line = last_line(start(*SMALL, "--output", output).end(2))
    assert line.startswith(f"error: {output}/checkpoint.pt ") and "remove it to start anew" in line
    assert (output / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("change", ["wider", "cased"])
def test_other_model_of_the_same_name_is_named(change, start, tiny_model, tmp_path):
    """Every run's model lies in a folder called model."""
    first = shutil.copytree(tiny_model, tmp_path / "first/model")
    second = shutil.copytree(tiny_model, tmp_path / "second/model")
    if change == "wider":
        config = transformers.AutoConfig.from_pretrained(second)
        config.intermediate_size += 8
        model = transformers.AutoModelForQuestionAnswering.from_config(config)
        model.save_pretrained(second)
        says = "the model's parameters (was "
    else:
        tokenizer = json.loads((second / "tokenizer.json").read_text())
        tokenizer["normalizer"]["lowercase"] = False
        (second / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = json.loads((second / "tokenizer_config.json").read_text())
        settings["do_lower_case"] = False
        (second / "tokenizer_config.json").write_text(json.dumps(settings))
        says = "the model's vocabulary (was "
    questions = TRAIN.parent / "sample/questions.json"
    words = ("--train-file", questions, "--validation-file", questions)
    words += ("--limit", 24, "--device", "cpu", "--output", tmp_path / "run")
    start("--model", first, *words, patch=in_step(2, send("SIGTERM"))).end(75)
    line = last_line(start("--model", second, *words).end(2))
    assert f"has other settings: {says}" in line and line.count("(was") == 1
    # The same one elsewhere.
    second = shutil.copytree(first, tmp_path / "third/model")
    patch = in_step(3, send("SIGTERM"))
    assert "going on from step 2\n" in start("--model", second, *words, patch=patch).end(75)


def test_other_settings_are_named(start, tmp_path):
    output = tmp_path / "run"
    words = (*SMALL, "--output", output)
    start(*words, patch=in_step(2, send("SIGTERM"))).end(75)
    before = (output / "checkpoint.pt").read_bytes()
    other = ("--seed", 7, "--learning-rate", 0.002, "--batching", "bucketed", "--limit", 20)
    other += ("--no-fused",)
    line = last_line(start(*words, *other).end(2))
    assert line.startswith(f"error: {output}/checkpoint.pt has other settings: ")
    for change in (
        "--seed (was 3, now 7)",
        "--learning-rate (was 0.001, now 0.002)",
        "--batching (was packed, now bucketed)",
        "--limit (was 24, now 20)",
        "--fused (was True, now False)",
    ):
        assert change in line
    assert "--epochs" not in line and "--log-every" not in line
    assert (output / "checkpoint.pt").read_bytes() == before
    # What changes nothing in the mathematics may change.
    other = ("--log-every", 5, "--save-every", 3, "--no-profile", "--evaluate-every", "epoch")
    text = start(*words, *other, patch=in_step(4, send("SIGTERM"))).end(75)
    assert "going on from step 2\n" in text


def test_other_questions_are_named(start, tiny_model, tmp_path):
    """A file of the same name with another content."""
    questions = json.loads((TRAIN.parent / "sample/questions.json").read_text())
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(questions))
    words = ("--model", tiny_model, "--train-file", path, "--validation-file", path)
    words += ("--limit", 24, "--device", "cpu", "--output", tmp_path / "run")
    start(*words, patch=in_step(2, send("SIGTERM"))).end(75)
    questions["data"][0]["paragraphs"][0]["qas"][0]["question"] = "Which one?"
    path.write_text(json.dumps(questions))
    line = last_line(start(*words).end(2))
    assert "other settings: --train-file (was " in line
    assert "--limit" not in line and "--model" not in line


# 4. No room, no permission


def test_no_room_for_a_checkpoint(start, whole, tmp_path):
    output = tmp_path / "run"
    words = (*SMALL, "--save-every", 5, "--output", output)
    start(*words, patch=in_step(4, send("SIGTERM"))).end(75)
    before = (output / "checkpoint.pt").read_bytes()
    # No file can be greater than a megabyte.
    patch = "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
    line = last_line(start(*words, patch=patch).end(2))
    assert line.startswith(f"error: cannot write {output}/checkpoint.pt") and "space" in line
    assert (output / "checkpoint.pt").read_bytes() == before
    assert not list(output.glob("*.tmp"))
    assert "going on from step 4\n" in start(*words).end()
    assert_same(output, whole)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own: disk(megabytes) makes it, or changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(megabytes):
        options = f"size={megabytes}m"
        if os.path.ismount(folder):
            options += ",remount"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user or this container cannot mount a file system")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder, left):
    """Takes all of a file system but `left` bytes."""
    status = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(status.f_bavail * status.f_frsize - left, 0)))
    return filler


def test_disk_fills_up(disk, start, whole):
    """Where the second checkpoint has no room, where nothing has, where the model has none."""
    output = disk(13) / "run"
    words = (*SMALL, "--save-every", 7, "--no-profile", "--output", output)

    def no_room(step):
        line = last_line(start(*words).end(2))
        assert line.startswith("error: ") and "space" in line
        # Where the library's error names no file, the option is named.
        assert str(output) in line or "--output" in line
        assert checkpoint_step(output) == step
        assert not list(output.glob("*.tmp"))
        assert not (output / "results.json").exists()

    no_room(7)
    filler = fill(output, 0)
    no_room(7)
    filler.unlink()
    disk(30)
    start(*words, patch=in_step(18, send("SIGTERM"))).end(75)
    filler = fill(output, 500_000)
    no_room(18)
    filler.unlink()
    start(*words).end()
    assert_same(output, whole)


def test_cache_that_cannot_be_written(start, whole, tmp_path):
    text = start(*SMALL, "--output", tmp_path / "run", SQUAD_CACHE="/proc/none").end()
    assert "the features are not kept" in text
    assert_same(tmp_path / "run", whole)


def test_two_runs_on_one_output(start, whole, tmp_path):
    output = tmp_path / "run"
    go = tmp_path / "go"
    # A lock of a run that is dead keeps nobody out.
    output.mkdir()
    (output / ".lock").touch()
    patch = in_step(5, f"while not Path({str(go)!r}).exists(): time.sleep(0.01)")
    first = start(*SMALL, "--output", output, patch=patch)
    first.wait_for("step 4/")
    text = start(*SMALL, "--output", output).end(2)
    assert text.startswith(f"error: --output {output}: another run writes there")
    assert text.count("\n") == 1
    go.touch()
    first.end()
    assert_same(output, whole)


# 5. What a training cannot go on from, at whichever step it comes


def nan_in_step(step):
    patch = "def forward(self, *given, forward=SpanModel.forward, count=iter(range(1, 99))):\n"
    patch += f"    return forward(self, *given) * (float('nan') if next(count) == {step} else 1)\n"
    return patch + "SpanModel.forward = forward\n"


# What ends a run, as patches that do so in a step; the exit code and the last line. {0}: the step.
OUT_OF_MEMORY = "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"
ENDS = {
    "not a number": (nan_in_step, 1, "error: step {0}: loss nan, gradient norm nan: lower --lear"),
    "out of memory": (
        lambda step: in_step(step, OUT_OF_MEMORY),
        1,
        "error: out of memory: raise --accumulate (CUDA out of memory. Tried to allocate 2.00 GiB)",
    ),
    "stop": (lambda step: in_step(step, send("SIGTERM")), 75, "stopped by SIGTERM at step {0}: "),
}
# After main(), in the same process: nothing that the run opened is open.
ALL_CLOSED = """
def main(main=main):
    try:
        main()
    except SystemExit as end:
        code = end.code
    assert not torch.autograd._profiler_enabled(), "the profiler goes on"
    threads = [type(thread).__name__ for thread in threading.enumerate()]
    assert "_AsyncWriterThread" not in threads, "TensorBoard's writer is open"
    with open(Path(sys.argv[-1], ".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    sys.exit(code)
"""


def end_at_step(start, output, kind, step):
    """A run that profiles steps 5 to 7 ends in this step as in any other one."""
    patch, code, line = ENDS[kind]
    text = start(*SMALL, "--output", output, patch=patch(step) + ALL_CLOSED).end(code)
    assert last_line(text).startswith(line.format(step))
    assert last_step(text) == (step if kind == "stop" else step - 1)
    # A trace of both steps, or none.
    complete = step > 7 if kind == "out of memory" else step >= 7
    assert len(list(output.glob("tensorboard/*.pt.trace.json.gz"))) == complete


@pytest.mark.parametrize("step", [1, 5, 6, 7])
@pytest.mark.parametrize("kind", ENDS)
def test_every_way_out(kind, step, start, tmp_path):
    end_at_step(start, tmp_path / "run", kind, step)
    if (kind, step) == ("stop", 6):
        # The life that goes on records its own.
        start(*SMALL, "--output", tmp_path / "run").end()
        [trace] = tmp_path.glob("run/tensorboard/*.pt.trace.json.gz")
        assert read(tmp_path / "run", "timings.json")["operators"]


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 16))
@pytest.mark.parametrize("kind", ENDS)
def test_every_way_out_of_every_step(kind, step, start, tmp_path):
    end_at_step(start, tmp_path / "run", kind, step)


def full_at_step(start, folder, step):
    """The disk is full from this step on: at once, or in some steps, the run ends as it should."""
    output = folder / "run"
    patch = "def fill(folder):\n    status = os.statvfs(folder)\n"
    patch += "    free = status.f_bavail * status.f_frsize\n"
    patch += "    Path(folder, 'filler').write_bytes(bytes(free))\n"
    patch += in_step(step, f"fill({str(folder)!r})")
    words = (*SMALL, "--output", output)
    text = start(*words, patch=patch + ALL_CLOSED).end(2)
    line = last_line(text)
    assert line.startswith("error: ") and "No space left" in line and "free some space" in line
    (folder / "filler").unlink()
    text = start(*words).end()
    # A trace that was half written is gone.
    [trace] = output.glob("tensorboard/*.pt.trace.json.gz")
    assert b"ProfilerStep" in gzip.decompress(trace.read_bytes())


def test_disk_fills_up_in_a_traced_step(disk, start):
    full_at_step(start, disk(40), 6)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 16))
def test_disk_fills_up_in_every_step(step, disk, start):
    full_at_step(start, disk(40), step)


@pytest.mark.parametrize("log_every", [1, 5])
def test_loss_that_is_no_number(log_every, start, tmp_path):
    output = tmp_path / "run"
    words = (*SMALL, "--save-every", 6, "--log-every", log_every, "--output", output)
    line = last_line(start(*words, patch=nan_in_step(8)).end(1))
    assert line.startswith("error: step 8: loss nan") and "--learning-rate" in line
    assert checkpoint_step(output) == 6
    for tensor in checkpoint(output)["model"].values():
        assert torch.isfinite(tensor).all()
    assert not (output / "model").exists()
    assert not (output / "results.json").exists()


# 6. The code of each life


def test_code_that_has_changed(start, tmp_path):
    """Committed or not: the life that goes on says so, and results.json has both."""
    project = tmp_path / "project"
    (project / "baseline").mkdir(parents=True)
    script = shutil.copy(TRAIN, project / "baseline")
    (project / "baseline/sample").symlink_to(TRAIN.parent / "sample")
    output = tmp_path / "run"
    words = (*SMALL, "--no-profile", "--output", output)

    def git(*command):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(
            ["git", *identity, *command], cwd=project, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commit():
        git("add", "baseline/train.py")
        git("commit", "-m", "x")
        return git("rev-parse", "HEAD")

    def life(step, code=75):
        patch = in_step(step, send("SIGTERM")) if code else ""
        return start(*words, script=script, patch=patch).end(code)

    git("init")
    first = commit()
    life(2)
    assert "has changed" not in life(4)
    with open(script, "a") as file:
        file.write("# changed\n")
    line = f"train.py has changed since step 4 (commit {first[:10]}, now {first[:10]} with changes)"
    assert f"going on from step 4\n{line}\n" in life(6)
    second = commit()
    # The same text: only its commit is another.
    assert "has changed" not in life(8)
    # What changes while it runs is not what runs.
    patch = in_step(10, f"Path({str(script)!r}).write_text('')")
    start(*words, script=script, patch=patch).end()
    lives = read(output)["lives"]
    assert [one["commit"] for one in lives] == [first] * 3 + [second] * 2
    assert [one["dirty"] for one in lives] == [False, False, True, False, False]
    hashes = [one["hash"] for one in lives]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3] == hashes[4]
    starts = [one["start"] for one in lives]
    assert starts == sorted(starts) and starts[0].startswith("20")
    assert read(output)["environment"]["commit"] == second
    assert read(output)["environment"]["dirty"] is False


@pytest.mark.parametrize("twin", ["baseline", "DISTRIBUTED"])
def test_goes_on_from_an_earlier_commits_checkpoint(twin, start, tmp_path):
    """old_checkpoint.py has made it: the losses are those of the run that wrote it."""
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(FOLDER / "checkpoint.pt", output)
    words = [*make_inputs(tmp_path), *WORDS, "--output", output]
    text = start(*words, script=TRAIN.parents[1] / twin / "train.py").end()
    assert re.search(rf"going on from step {STOP}\ntrain.py has changed since step {STOP} \(", text)
    found = losses(output)
    expected = json.loads((FOLDER / "losses.json").read_text())
    assert found[:STOP] == expected[:STOP]
    # Another processor or torch may round otherwise.
    assert found == pytest.approx(expected, abs=1e-4)
    assert [one["commit"] is None for one in read(output)["lives"]] == [True, False]

"""Stopped, killed, out of space: a run goes on, and ends as if nothing had happened, bit for bit."""

import fcntl
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

TRAIN = pathlib.Path(__file__).parents[1] / "train.py"
# Three epochs of six steps, dropout on: a run of a second.
SMALL = ("--sample", "--limit", 24, "--batch-size", 4, "--epochs", 3, "--dropout", 0.1)
SMALL += ("--log-every", 1, "--seed", 3)
STEPS = 18
# Patches run inside train.py's module before main. This one sends a signal within a step.
SEND = """
def learning_rate_at(step, steps, args, rate=learning_rate_at):
    if step + 1 == {}:
        os.kill(os.getpid(), signal.{})
    return rate(step, steps, args)
"""
SIGNALS = ("SIGUSR1", "SIGTERM", "SIGINT")


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def reached(text):
    return int((re.findall(r"^step ([\d,]+)/", text, re.MULTILINE) or ["0"])[-1].replace(",", ""))


def same(one, other):
    """Losses, rates, norms, answers and weights: equal to the last bit."""
    fields = ("step", "loss", "learning_rate", "gradient_norm", "tokens")
    kept = [
        [[each[field] for field in fields] for each in read(run, "timings.json")["intervals"]]
        for run in (one, other)
    ]
    assert kept[0] == kept[1]
    assert read(one, "predictions.json") == read(other, "predictions.json")
    assert read(one)["exact_match"] == read(other)["exact_match"]
    weights = [safetensors.torch.load_file(run / "model/model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for run in (one, other):  # what is only there under way is gone
        assert not [
            path.name for path in run.iterdir() if re.search("checkpoint|lock|tmp", path.name)
        ]


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """The run that nobody stops."""
    output = tmp_path_factory.mktemp("whole") / "run"
    request = {"words": [*map(str, SMALL), "--output", str(output)], "patch": "", "environment": {}}
    nursery.stdin.write(json.dumps(request | {"log": f"{output}.log"}) + "\n")
    nursery.stdin.flush()
    assert [nursery.stdout.readline() for _ in range(2)][1] == "0\n", pathlib.Path(f"{output}.log")
    assert [one["step"] for one in read(output, "timings.json")["intervals"]] == [
        *range(1, STEPS + 1)
    ]
    return output


# Told to stop
def stop_at(start, output, stops, words=()):
    for i, step in enumerate(stops):
        profile = "--profile" if i % 2 else "--no-profile"
        patch = SEND.format(step, SIGNALS[i % 3])
        text = start(*SMALL, *words, profile, "--output", output, patch=patch).end()
        assert text.splitlines()[-1].startswith(f"stopped by {SIGNALS[i % 3]} at step {step}:")
        assert checkpoint(output)["state"]["step"] == step
        assert not (output / "results.json").exists() and not (output / "model").exists()


def test_stopped_many_times_and_resumed(start, whole, tmp_path):
    output, stops = tmp_path / "run", [1, 2, 5, 6, 7, 12, 13, 17, 18]  # 6 and 12 end an epoch
    begin = time.monotonic()
    stop_at(start, output, stops)
    text = start(*SMALL, "--output", output).end()
    took = time.monotonic() - begin
    assert "going on from step 18; 0 steps after it are done again" in text
    same(output, whole)
    results, timings = read(output), read(output, "timings.json")
    assert results["resumed_from_steps"] == stops and results["repeated_steps"] == 0
    assert results["steps"] == STEPS
    # The times are those of all lives: more than the steps', less than the clock on the wall.
    assert sum(one["seconds"] for one in timings["intervals"]) <= results["train_seconds"] < took
    assert sum(results["epoch_seconds"]) == pytest.approx(results["train_seconds"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("words", [(), ("--batching", "bucketed", "--accumulate", "2")])
def test_stopped_at_random_steps(seed, words, start, tmp_path):
    start(*SMALL, *words, "--output", tmp_path / "whole").end()
    stops = sorted(random.Random(seed).sample(range(1, STEPS + 1), 6))
    stop_at(start, tmp_path / "run", stops, words)
    start(*SMALL, *words, "--output", tmp_path / "run").end()
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_the_sample_stopped_late_answers_as_well(start, tmp_path):
    """The whole sample, with its usual options, stopped at step 173 of 240."""
    words = ("--sample", "--epochs", 10)
    start(*words, "--output", tmp_path / "whole").end()
    start(*words, "--output", tmp_path / "run", patch=SEND.format(173, "SIGTERM")).end()
    start(*words, "--output", tmp_path / "run").end()
    assert read(tmp_path / "run")["exact_match"] == read(tmp_path / "whole")["exact_match"]
    answers = [read(tmp_path / run, "predictions.json") for run in ("run", "whole")]
    assert answers[0] == answers[1]


def test_stopped_while_evaluating(start, whole, tmp_path):
    output = tmp_path / "run"
    patch = "def best_spans(*given, best=best_spans):\n"
    patch += "    os.kill(os.getpid(), signal.SIGUSR1)\n    return best(*given)\n"
    marker = tmp_path / "marker"
    patch += "EVALUATION_TOKENS = 500\n"
    text = start(*SMALL, "--output", output, patch=patch, REQUEUE_MARKER=str(marker)).end()
    assert "stopped by SIGUSR1 at step 18" in text and marker.exists()
    start(*SMALL, "--output", output).end()
    same(output, whole)


def test_signals_from_outside(start, tmp_path):
    """Sent at any moment, also before the first step: a clean end, or it was never under way."""
    output, marker = tmp_path / "run", tmp_path / "marker"
    step = 0
    for i, wait in enumerate((0.0, 0.6, 1.2)):
        life = start(*SMALL, "--output", output, "--epochs", 40, REQUEUE_MARKER=str(marker))
        while "features, " not in life.log.read_text():
            time.sleep(0.02)
        time.sleep(wait)
        life.kill(getattr(signal, SIGNALS[i]))
        text = life.end()
        now = checkpoint(output)["state"]["step"]
        assert f"stopped by {SIGNALS[i]} at step {now}:" in text and now > step
        assert marker.read_text() == SIGNALS[i]
        step = now
        marker.unlink()


# Killed
def test_killed_and_resumed(start, whole, tmp_path):
    """A few SIGKILLs after so many log lines and a little more: some fall into a save."""
    kill_and_go_on(start, tmp_path / "run", whole, SMALL, 3, STEPS, seed=1)


@pytest.mark.slow
def test_killed_twenty_times(start, tmp_path):
    words = (*SMALL, "--epochs", 25)
    start(*words, "--output", tmp_path / "whole").end()
    kill_and_go_on(start, tmp_path / "run", tmp_path / "whole", words, 20, 150, seed=2)


def kill_and_go_on(start, output, whole, words, kills, steps, seed):
    chance, step = random.Random(seed), 0
    for _ in range(kills):
        life = start(*words, "--save-every", 1, "--output", output)
        aim = step + chance.randint(1, max(steps // kills, 1))
        while reached(life.log.read_text()) < min(aim, steps - 2):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.1)
        life.kill(signal.SIGKILL)
        text = life.end(None)
        assert life.code in (-signal.SIGKILL, 0)
        if life.code == 0:
            break  # it was faster
        if (output / "checkpoint.pt").exists():
            step = checkpoint(output)["state"]["step"]  # whole: it opens
            assert reached(text) - 1 <= step <= reached(text) + 1
    if not (output / "results.json").exists():
        text = start(*words, "--save-every", 1, "--output", output).end()
        assert f"going on from step {step};" in text
    same(output, whole)
    results = read(output)
    assert 0 <= results["repeated_steps"] <= kills and len(results["resumed_from_steps"]) <= kills


# At a save's worst moments; {0} is the number of the save.
MOMENTS = {
    "half written": """
import io
def half(content, file, save=torch.save, count=iter(range(1, 99))):
    if next(count) < {0}:
        return save(content, file)
    kept = io.BytesIO()
    save(content, kept)
    file.write(kept.getvalue()[: kept.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
""",
    "not yet renamed": """
def dying(path, other, replace=Path.replace, count=iter(range(1, 99))):
    if path.name.startswith("checkpoint") and next(count) == {0}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, other)
Path.replace = dying
""",
    "just renamed": """
def dying(path, other, replace=Path.replace, count=iter(range(1, 99))):
    replace(path, other)
    if path.name.startswith("checkpoint") and next(count) == {0}:
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace = dying
""",
}


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_inside_a_save(moment, save, start, whole, tmp_path):
    output, words = tmp_path / "run", (*SMALL, "--save-every", 7)
    life = start(*words, "--output", output, patch=MOMENTS[moment].format(save))
    life.end(None)
    assert life.code == -signal.SIGKILL
    step = 7 * (save if moment == "just renamed" else save - 1)
    assert (output / "checkpoint.pt").exists() == bool(step)
    if step:
        assert checkpoint(output)["state"]["step"] == step
    # One more life, that is stopped: what the killed one left half written does not pile up.
    text = start(*words, "--output", output, patch=SEND.format(step + 1, "SIGTERM")).end()
    assert (f"going on from step {step};" in text) == bool(step)
    left = {path.name for path in output.iterdir()}
    # waits for a mend in train.py
    assert left <= {"checkpoint.pt", ".lock", "tensorboard"}, left
    if (moment, save) == ("half written", 2):
        start(*words, "--output", output).end()
        same(output, whole)
        assert read(output)["repeated_steps"] == 14 - step


@pytest.mark.parametrize("moment", ["before the report", "after the report"])
def test_killed_at_the_very_end(moment, start, whole, tmp_path):
    """After the last step, with model/ there already: the same command ends what is left."""
    output = tmp_path / "run"
    # The report is made by another process.
    patch = "def dying(words, *given, was=subprocess.run, **how):\n"
    patch += "    if '--finish' in words:\n"
    patch += "        was(words, *given, **how)\n" if moment.startswith("after") else ""
    patch += "        os.kill(os.getpid(), signal.SIGKILL)\n"
    patch += "    return was(words, *given, **how)\nsubprocess.run = dying\n"
    life = start(*SMALL, "--output", output, patch=patch)
    life.end(None)
    assert life.code == -signal.SIGKILL
    text = start(*SMALL, "--output", output).end()  # waits for a mend in train.py
    if moment.startswith("after"):
        assert "finished" in text
    else:
        same(output, whole)


# SLURM's marker
def test_the_marker_is_left_only_by_a_stop(start, tmp_path):
    marker = tmp_path / "a marker"
    words = (*SMALL, "--output", tmp_path / "run", "--max-steps", 3)
    start(*words, patch=SEND.format(2, "SIGUSR1"), REQUEUE_MARKER=str(marker)).end()
    assert marker.read_text() == "SIGUSR1"
    marker.unlink()
    start(*words, REQUEUE_MARKER=str(marker)).end()
    assert (tmp_path / "run/results.json").exists() and not marker.exists()
    start(*words, "--seed", "-1", REQUEUE_MARKER=str(marker)).end(2)
    assert not marker.exists()


# Bad worlds
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"  # the greatest size of a file


def test_no_room_for_a_checkpoint(start, whole, tmp_path):
    output, words = tmp_path / "run", (*SMALL, "--save-every", 5)
    start(*words, "--output", output, patch=SEND.format(4, "SIGTERM")).end()
    before = (output / "checkpoint.pt").read_bytes()
    text = start(*words, "--output", output, patch=LIMIT.format(1_000_000)).end(2)
    line = text.splitlines()[-1]
    assert line.startswith("error: ") and str(output / "checkpoint.pt") in line and "space" in line
    assert (output / "checkpoint.pt").read_bytes() == before
    assert not list(output.glob("*.tmp"))
    text = start(*words, "--output", output).end()
    assert "going on from step 4; 1 steps after it are done again" in text
    same(output, whole)
    assert read(output)["repeated_steps"] == 1


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; disk(megabytes) makes it or changes its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(megabytes):
        how = f"size={megabytes}m" + (",remount" if os.path.ismount(place) else "")
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this user or this container cannot mount a file system")
        return place

    yield resize
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def fill(folder, leave):
    """Takes all of its file system but `leave` bytes."""
    free = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
    return filler


def test_a_disk_fills_up(disk, start, whole):
    """Where the second checkpoint has no room, where nothing has, where the model has none."""
    output, words = disk(13) / "run", (*SMALL, "--save-every", 7)
    line = start(*words, "--output", output).end(2).splitlines()[-1]
    assert line.startswith("error: ") and "checkpoint.pt" in line and "space" in line
    assert checkpoint(output)["state"]["step"] == 7 and not list(output.glob("*.tmp"))
    filler = fill(output, 0)
    life = start(*words, "--output", output)
    line = life.end(None).splitlines()[-1]
    assert life.code in (1, 2) and line.startswith("error: ") and "space" in line
    assert "None" not in line and str(output) in line  # waits for a mend in train.py
    assert checkpoint(output)["state"]["step"] == 7
    filler.unlink()
    disk(30)
    start(*words, "--output", output, patch=SEND.format(18, "SIGTERM")).end()
    filler = fill(output, 500_000)
    life = start(*words, "--output", output)
    line = life.end(None).splitlines()[-1]
    assert life.code in (1, 2) and line.startswith("error: ")  # waits for a mend in train.py
    assert checkpoint(output)["state"]["step"] == 18 and not (output / "results.json").exists()
    filler.unlink()
    start(*words, "--output", output).end()
    (output / "filler").unlink(missing_ok=True)
    same(output, whole)


def test_a_cache_that_cannot_be_written(start, whole, tmp_path):
    text = start(*SMALL, "--output", tmp_path / "run", SQUAD_CACHE="/proc/none").end()
    assert "the features are not kept" in text
    same(tmp_path / "run", whole)


def test_a_damaged_cache_is_built_again(start, tmp_path):
    cache, lives = tmp_path / "cache", iter(range(9))

    def life():
        where = {"patch": SEND.format(1, "SIGTERM"), "SQUAD_CACHE": str(cache)}
        return start(*SMALL, "--output", tmp_path / f"run-{next(lives)}", **where).end()

    assert "features, built" in life()
    (file,) = cache.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    for damaged in (bytes(content), bytes(content[:-50]), b""):
        file.write_bytes(damaged)
        text = life()
        assert "is damaged: building it" in text and "features, built" in text
    assert "features, cached" in life()


@pytest.mark.parametrize("every", [1, 5])
def test_a_loss_that_is_no_number(every, start, tmp_path):
    patch = "def broken(self, *given, was=SpanModel.forward, count=iter(range(1, 99))):\n"
    patch += "    return was(self, *given) * (float('nan') if next(count) == 8 else 1)\n"
    patch += "SpanModel.forward = broken\n"
    output, marker = tmp_path / "run", tmp_path / "marker"
    words = (*SMALL, "--output", output, "--save-every", 6, "--log-every", every)
    text = start(*words, patch=patch, REQUEUE_MARKER=str(marker)).end(1)
    line = text.splitlines()[-1]
    assert line.startswith("error: step 8: loss nan") and "--learning-rate" in line
    assert checkpoint(output)["state"]["step"] == 6 and not marker.exists()
    weights = checkpoint(output)["model"].values()
    assert all(torch.isfinite(each).all() for each in weights)
    assert not (output / "model").exists() and not (output / "results.json").exists()


def test_a_rate_that_makes_it_explode(start, tmp_path):
    words = (*SMALL, "--output", tmp_path / "run", "--learning-rate", 0.9, "--warmup", 0)
    patch = "def load_model(*given, was=load_model):\n    model = was(*given)\n"
    patch += "    model.qa_outputs.weight.data.mul_(1e38)\n    return model\n"
    line = start(*words, patch=patch).end(1).splitlines()[-1]
    assert re.match(r"error: step \d+: loss (nan|inf|\d).*--learning-rate", line), line


def test_out_of_memory(start, tmp_path):
    patch = (
        "def broken(*given):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried ...')\n"
    )
    patch += "SpanModel.forward = broken\n"
    line = start(*SMALL, "--output", tmp_path / "run", patch=patch).end(1).splitlines()[-1]
    assert line.startswith("error: ") and "memory" in line and "--accumulate" in line


def test_a_checkpoint_that_is_none(start, tmp_path):
    output = tmp_path / "run"
    words = (*SMALL, "--output", output)
    start(*words, patch=SEND.format(2, "SIGTERM")).end()
    path = output / "checkpoint.pt"
    good, content = path.read_bytes(), checkpoint(output)
    foreign = {"model.safetensors": b"\0" * 1000, "text": b"hello", "empty": b""}
    cases = {f"cut at {share}": good[: int(len(good) * share)] for share in (0.1, 0.5, 0.999)}
    for name, bytes_ in (cases | foreign).items():
        path.write_bytes(bytes_)
        line = start(*words).end(2).splitlines()[-1]
        assert line.startswith("error: ") and str(path) in line and "remove" in line, name
        assert path.read_bytes() == bytes_
    weights = {name: value[:3] for name, value in content["model"].items()}
    for other in (
        {},
        [1],
        torch.ones(3),
        {"model": content["model"]},
        content | {"model": weights},
    ):
        torch.save(other, path)
        line = start(*words).end(2).splitlines()[-1]
        assert line.startswith("error: ") and str(path) in line
    path.write_bytes(good)
    assert "going on from step 2" in start(*words, patch=SEND.format(3, "SIGTERM")).end()


def test_other_settings_are_named(start, tmp_path):
    output = tmp_path / "run"
    start(*SMALL, "--output", output, patch=SEND.format(2, "SIGTERM")).end()
    before = (output / "checkpoint.pt").read_bytes()
    other = ("--seed", 7, "--learning-rate", 0.002, "--batching", "bucketed")
    line = start(*SMALL, *other, "--output", output).end(2).splitlines()[-1]
    for part in ("--seed (was 3, now 7)", "--learning-rate (was 0.001, now 0.002)", "--batching"):
        assert part in line
    assert "--epochs" not in line and "--log-every" not in line and "--limit" not in line
    line = start(*SMALL, "--limit", 20, "--output", output).end(2).splitlines()[-1]
    assert "--limit (was 24, now 20)" in line
    assert (output / "checkpoint.pt").read_bytes() == before
    # What changes nothing in the mathematics may change.
    free = ("--log-every", 5, "--save-every", 3, "--no-profile")
    text = start(*SMALL, *free, "--output", output, patch=SEND.format(4, "SIGTERM")).end()
    assert "going on from step 2" in text


def test_two_runs_on_one_output(start, whole, tmp_path):
    output = tmp_path / "run"
    patch = "def learning_rate_at(*given, rate=learning_rate_at):\n"
    patch += f"    while not Path({str(tmp_path / 'go')!r}).exists():\n        time.sleep(0.1)\n"
    patch += "    return rate(*given)\n"
    first = start(*SMALL, "--output", output, patch=patch)
    while not (output / ".lock").exists():
        time.sleep(0.05)
    command = [sys.executable, TRAIN, *map(str, SMALL), "--output", output]
    second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    (tmp_path / "go").touch()
    assert second.returncode == 2 and "another run writes there" in second.stderr
    assert second.stderr.count("\n") == 1
    first.end()
    same(output, whole)


def test_a_lock_whose_run_is_dead_holds_nobody(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("5")
    with open(tmp_path / "run/.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        words = (*SMALL, "--output", tmp_path / "run")
        assert "another run" in start(*words).end(2)
    start(*words, patch=SEND.format(1, "SIGTERM")).end()

"""One, two and four ranks are the same training; they end together, and leave one run.

Ranks are processes on this machine's CPU that talk through gloo; see ranks.py. What torchrun adds
is tested with the real one. Strategies other than ddp: test_strategies.py.
"""

import fcntl
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from ranks import (
    DISTRIBUTED,
    LONG,
    ROOT,
    SHARED,
    SHORT,
    SIGNAL,
    SMALL,
    assert_same_model,
    assert_same_training,
    free_port,
)

BATCHINGS = {name: ["--batching", name] for name in ("padded", "dynamic", "bucketed", "packed")}


# 1. The same mathematics


@pytest.mark.parametrize("batching", BATCHINGS)
def test_one_rank_is_baseline_exactly(ranks, batching):
    words = [*SHORT, *BATCHINGS[batching], "--dropout", 0.1]
    baseline = ranks.finished(0, *words)
    one = ranks.finished(1, *words)
    assert len(baseline.column("loss")) >= 12
    for name in ("loss", "gradient_norm", "learning_rate", "tokens"):
        assert np.array_equal(baseline.column(name), one.column(name)), name
    assert baseline.read("predictions.json") == one.read("predictions.json")
    assert_same_model(baseline, one, tolerance=0)


@pytest.mark.parametrize(
    ("world", "batching"),
    [
        (2, "packed"),
        pytest.param(4, "packed", marks=pytest.mark.slow),
        pytest.param(2, "padded", marks=pytest.mark.slow),
        (4, "bucketed"),
    ],
)
def test_many_ranks_have_baselines_losses(ranks, world, batching):
    words = [*LONG, *BATCHINGS[batching]]
    baseline = ranks.once(0, *words)
    many = ranks.once(world, *words)
    assert_same_training(baseline, many, least_steps=40)
    assert baseline.read("predictions.json") == many.read("predictions.json")
    for name in ("parameters", "train_features", "steps", "exact_match", "f1"):
        assert baseline.read("results.json")[name] == many.read("results.json")[name], name


@pytest.mark.parametrize(("world", "accumulate"), [(2, 3), (4, 2)])
def test_accumulation_is_the_same_training(ranks, world, accumulate):
    """An epoch's last batch has 6 features: 4 ranks x 2 micro-batches leave two of them empty."""
    words = [*LONG, *BATCHINGS["packed"], "--accumulate", accumulate]
    many = ranks.finished(world, *words)
    assert_same_training(ranks.once(0, *LONG, *BATCHINGS["packed"]), many, least_steps=40)


def test_a_last_batch_of_one_feature(ranks):
    """9 features in batches of 8: in each second step only one rank of four has one."""
    words = [*SMALL, "--max-length", 384, "--limit", 9, "--epochs", 4]
    baseline = ranks.finished(0, *words)
    many = ranks.finished(4, *words)
    assert baseline.read("results.json")["train_features"] == 9
    assert_same_training(baseline, many, least_steps=8)
    assert baseline.read("predictions.json") == many.read("predictions.json")


def count_reductions(trace):
    """How often gradients are sent, and all else that is summed, in a trace: {operator: count}."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    operators = [event["name"] for event in events if event.get("cat") == "cpu_op"]
    names = ("c10d::allreduce_", "c10d::_reduce_scatter_base_")
    return {name: operators.count(name) for name in names}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_micro_batches_take_no_more_reductions(ranks, strategy):
    """Only a step's last micro-batch sends gradients, those of all of them."""
    counts = []
    for accumulate in (1, 3):
        words = [*SHORT, "--profile", "--strategy", strategy, "--accumulate", accumulate]
        run = ranks.finished(2, *words)
        counts += [count_reductions(trace) for trace in run.output.glob("tensorboard/*.json.gz")]
    assert len(counts) == 4
    assert all(count == counts[0] for count in counts), counts
    sends = "c10d::allreduce_" if strategy == "ddp" else "c10d::_reduce_scatter_base_"
    assert counts[0][sends] >= 2, "in each of the two steps of the trace"


# Notes the seed of the random numbers at each micro-batch's beginning.
NOTE_SEEDS = """
seeds = []
unpatched_forward = SpanModel.forward

def noting(self, batch):
    seeds.append(torch.initial_seed())
    Path(self.args.output, f"seeds-{RANK}.json").write_text(json.dumps(seeds))
    return unpatched_forward(self, batch)

SpanModel.forward = noting
"""


def test_dropout_masks_differ_between_ranks_steps_and_micro_batches(ranks):
    words = [*SHORT, "--dropout", 0.1, "--accumulate", 2]
    run = ranks.finished(2, *words, patch=NOTE_SEEDS)
    seeds = run.read("seeds-0.json") + run.read("seeds-1.json")
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 12
    again = ranks.finished(2, *words)
    assert np.array_equal(run.column("loss"), again.column("loss"))
    without = ranks.once(2, *SHORT)
    assert np.abs(run.column("loss") - without.column("loss")).max() > 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_gradients_differ_by_little(ranks, strategy):
    """They are sent rounded to 8 bits, through gloo as through NCCL."""
    words = [*SHORT, "--strategy", strategy]
    exact = ranks.once(2, *words)
    rounded = ranks.finished(2, *words, "--gradients", "bf16")
    difference = np.abs(exact.column("loss") - rounded.column("loss"))
    assert difference[0] == 0, "the first loss comes before the first gradient"
    assert 0 < difference.max() < 0.02
    norms = rounded.column("gradient_norm") / exact.column("gradient_norm")
    assert 0 < abs(norms[0] - 1) < 0.01


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_evaluating_between_epochs_changes_nothing(ranks, strategy):
    words = [*SHORT, "--dropout", 0.1, "--strategy", strategy]
    at_end = ranks.once(2, *words)
    each_epoch = ranks.finished(2, *words, "--evaluate-every", "epoch")
    assert np.array_equal(at_end.column("loss"), each_epoch.column("loss"))
    assert at_end.read("predictions.json") == each_epoch.read("predictions.json")
    evaluations = each_epoch.read("results.json")["evaluations"]
    assert [evaluation["step"] for evaluation in evaluations] == [4, 8, 12]
    assert [evaluation["epoch"] for evaluation in evaluations] == [1, 2, 3]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_evaluation_has_one_ranks_scores(ranks, strategy):
    words = [*SHORT, "--evaluate-every", "epoch"]
    one = ranks.once(0, *words).read("results.json")["evaluations"]
    two = ranks.finished(2, *words, "--strategy", strategy).read("results.json")["evaluations"]
    assert len(one) == 3
    for name in ("step", "exact_match", "f1"):
        assert [evaluation[name] for evaluation in one] == [evaluation[name] for evaluation in two]


# Notes which windows a rank evaluates.
NOTE_WINDOWS = """
evaluated = []
unpatched_logits = evaluation_logits

def evaluation_logits(args, model, features, windows):
    evaluated.extend(windows.tolist())
    write_json(Path(args.output, f"windows-{globals().get('RANK', 0)}.json"), evaluated)
    return unpatched_logits(args, model, features, windows)
"""


def test_evaluating_alone_gives_any_number_of_ranks_the_same_answers(ranks):
    """The ranks share the work, and answer each question once."""
    model = ranks.once(0, *LONG, *BATCHINGS["packed"]).output / "model"
    questions = ROOT / "baseline/sample/questions.json"
    words = ["--model", model, "--train-file", questions, "--validation-file", questions]
    words += ["--epochs", 0, "--limit", 200, "--device", "cpu"]
    baseline = ranks.finished(0, *words, patch=NOTE_WINDOWS)
    assert len(baseline.read("predictions.json")) == 200
    windows = baseline.read("windows-0.json")
    for world in (2, 4):
        run = ranks.finished(world, *words, patch=NOTE_WINDOWS)
        assert run.read("predictions.json") == baseline.read("predictions.json")
        shares = [run.read(path.name) for path in run.output.glob("windows-*.json")]
        assert len(shares) > 1
        assert sorted(sum(shares, [])) == sorted(windows)


# Counts the values that are read on the host within train().
COUNT_READS = """
reads = collections.Counter()

def count(name):
    unpatched = getattr(torch.Tensor, name)
    def counting(self, *arguments, **options):
        reads[name] += 1
        return unpatched(self, *arguments, **options)
    setattr(torch.Tensor, name, counting)

for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
    count(name)
unpatched_train = train

def train(args, *others):
    reads.clear()
    *others, save, evaluate = others
    counted = {}
    unpatched_train(args, *others, lambda: counted.update(reads), evaluate)
    save()
    Path(args.output, f"reads-{RANK}.json").write_text(json.dumps(counted))
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_waits_for_no_value(ranks, strategy):
    """Values are read on the host when an interval ends, and where the ranks ask one another: on a
    CPU in each step, where asking costs nothing; on a GPU once per interval."""
    words = [*SHORT, *BATCHINGS["bucketed"], "--log-every", 3, "--accumulate", 2]
    run = ranks.finished(2, *words, "--strategy", strategy, patch=COUNT_READS)
    assert len(run.column("loss")) == 4
    for rank in range(2):
        # Losses and norms of 4 intervals; all_reduce_max before the first step and in each of 12.
        assert run.read(f"reads-{rank}.json") == {"tolist": 8, "cpu": 13, "numpy": 13}


# 2. Ending together


def assert_said_once(run, rank, *words, code=2):
    """That rank has ended with the code, and says why in one line, which has these words."""
    assert run.codes[rank] == code, (run.codes, run.log[-3000:])
    assert all(run.codes), run.codes
    begins = f"error on rank {rank}: " if rank else "error: "
    lines = [line for line in run.log.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and lines[0].startswith(begins), run.log[-3000:]
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in run.logs[rank]


@pytest.mark.parametrize(
    "ask",
    ["if RANK == 1: " + SIGNAL, 'if RANK == 1: Path(args.output, "stop").touch()'],
    ids=["a signal", "the file stop"],
)
def test_what_asks_one_rank_stops_all(ranks, ask):
    stopped = ranks.stopped(2, *SHORT, at=5, ask=ask)
    assert stopped.log.count("stopped by") == 1
    assert "at step 5" in stopped.log
    assert not (stopped.output / "stop").exists()
    resumed = ranks.finished(2, *SHORT, output=stopped.output)
    assert resumed.read("results.json")["resumed_from_steps"] == [5]
    assert_same_training(ranks.once(2, *SHORT), resumed, tolerance=0)


@pytest.mark.parametrize("world", [0, 2])
def test_what_asks_while_they_prepare_stops_all_before_a_step(ranks, world):
    """It asks the last rank alone; the same command then goes on."""
    asks = "prepare_as_before = prepare\n"
    asks += f"def prepare(args):\n    if {world} < 2 or RANK == 1: {SIGNAL}\n"
    asks += "    return prepare_as_before(args)\n"
    stopped = ranks(world, *SHORT, patch=asks)
    assert stopped.codes == ([0, 0] if world else [75]), stopped.log[-3000:]
    assert stopped.log.count("stopped by") == 1 and "at step 0: " in stopped.log
    assert "step 1/" not in stopped.log
    assert not (stopped.output / "checkpoint.pt").exists()
    resumed = ranks.finished(world, *SHORT, output=stopped.output)
    assert resumed.read("results.json")["resumed_from_steps"] == []


def test_one_process_by_itself_ends_with_75_when_stopped(ranks):
    ranks.stopped(1, *SHORT, at=5)


def test_a_loss_that_is_not_a_number_stops_all(ranks):
    patch = """
calls = []
unpatched_forward = SpanModel.forward

def breaking(self, batch):
    calls.append(1)
    loss = unpatched_forward(self, batch)
    return loss * float("nan") if len(calls) == 4 and RANK == 1 else loss

SpanModel.forward = breaking
"""
    run = ranks(2, *SHORT, patch=patch)
    assert run.codes == [1, 1]
    assert "step 4: loss nan" in run.logs[0]
    assert "step 4: loss nan" in run.logs[1]
    assert "Traceback" not in run.log
    assert not (run.output / "results.json").exists()


@pytest.mark.parametrize(
    "words", [["--seed", 8], ["--log-every", 2]], ids=["--seed", "--log-every"]
)
def test_a_rank_with_other_options_is_found(ranks, words):
    """Also with one that changes no loss, but when the ranks meet."""
    run = ranks(2, *SHORT, own={1: words})
    assert_said_once(run, 1, "options", "than rank 0")


def test_a_rank_with_another_script_is_found(ranks, tmp_path):
    """As when one node still has an old copy of the project."""
    shutil.copytree(ROOT / "baseline/sample", tmp_path / "baseline/sample")
    stale = tmp_path / "DISTRIBUTED/train.py"
    stale.parent.mkdir()
    stale.write_text(DISTRIBUTED.read_text() + "\n# older\n")
    run = ranks(2, *SHORT, scripts=[DISTRIBUTED, stale])
    assert_said_once(run, 1, "train.py", "than rank 0")


def test_a_rank_with_other_data_is_found(ranks, tmp_path):
    """One node's file differs from the other's of the same name."""
    document = json.loads((ROOT / "baseline/sample/questions.json").read_text())
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        document["data"] = document["data"][: len(document["data"]) - rank]
        (folder / "questions.json").write_text(json.dumps(document))
    words = ["--model", ranks.once(0, *SHORT).output / "model", "--device", "cpu"]
    words += ["--train-file", "questions.json", "--validation-file", "questions.json"]
    patch = f"os.chdir({str(tmp_path)!r} + '/' + str(RANK))"
    run = ranks(2, *words, patch=patch, output=tmp_path / "output")
    assert_said_once(run, 1, "data", "than rank 0")


def test_a_checkpoint_of_other_settings_is_refused(ranks):
    output = ranks.stopped(2, *SHORT, at=4).output
    run = ranks(2, *SHORT, "--learning-rate", 1e-4, output=output)
    assert run.codes == [2, 2]
    assert "error: " in run.logs[0] and "--learning-rate" in run.logs[0]
    assert "Traceback" not in run.log
    (output / "checkpoint.pt").write_bytes(b"no checkpoint")
    run = ranks(2, *SHORT, output=output)
    assert run.codes == [2, 2]
    assert "cannot be read" in run.logs[0]


def test_an_output_in_use_is_refused(ranks, tmp_path):
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = ranks(2, *SHORT, output=tmp_path)
    assert_said_once(run, 0, str(tmp_path), "another run")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch-size", 1], "--batch-size is smaller than --accumulate x 2 ranks"),
        (["--batch-size", 7, "--accumulate", 4], "--batch-size is smaller than --accumulate x 2"),
        (["--strategy", "dp", "--batching", "bucketed"], "--strategy dp"),
    ],
    ids=["a batch", "a micro-batch", "dp"],
)
def test_what_ranks_cannot_share_is_refused(ranks, words, says):
    run = ranks(2, *SMALL, *words)
    assert run.codes == [2, 2]
    assert f"error: {says}" in run.logs[0]
    assert f"error on rank 1: {says}" in run.logs[1]
    assert "Traceback" not in run.log


def test_one_process_checks_for_the_ranks_to_come(ranks):
    """The launcher runs train.py --prepare with EXPECTED_WORLD_SIZE before the ranks."""
    given = {"EXPECTED_WORLD_SIZE": "4"}
    run = ranks(1, *SMALL, "--prepare", "--batch-size", 3, environment=given)
    assert_said_once(run, 0, "--batch-size is smaller than --accumulate x 4 ranks")
    run = ranks(1, *SMALL, "--prepare", "--batch-size", 4, environment=given)
    assert run.codes == [0], run.log


# 3. What a run leaves


# As if layers were compiled; in the seventh step rank 1 meets a width that no step has had before.
NEW_WIDTH = """
def compile_layers(model):
    return True

unpatched_plan = plan_training

def plan_training(*arguments):
    plan = unpatched_plan(*arguments)
    if RANK == 1:
        plan["width"][6] = 128
    return plan
"""


def test_a_step_in_which_another_rank_compiles_is_not_steady(ranks):
    """A new width is a new compilation, and the other ranks wait for it."""
    words = [*SHORT, *BATCHINGS["bucketed"], "--compile"]
    steady = ranks.finished(2, *words, patch=NEW_WIDTH).column("steady")
    assert steady[3:6].all() and steady[7:].all()
    assert not steady[6]


@pytest.fixture(scope="module")
def profiled(ranks):
    return ranks.finished(2, *SHORT, "--profile")


def test_one_rank_speaks(profiled):
    assert profiled.logs[0].count("step 12/12") == 1
    others = [line for line in profiled.logs[1].splitlines() if "Warning" not in line]
    assert not [line for line in others if "DistributedDataParallel(" not in line]


def test_tensorboard_has_one_ranks_events_and_all_ranks_traces(profiled):
    folder = profiled.output / "tensorboard"
    traces = sorted(folder.glob("*.pt.trace.json.gz"))
    assert [trace.name.split(".")[0] for trace in traces] == ["rank0", "rank1"]
    pids = {file.name.split(".")[-2] for file in folder.glob("events.out.tfevents.*")}
    assert len(pids) == 1, "files of more than one process"


def test_nothing_but_the_results_is_left(profiled):
    names = {"model", "predictions.json", "results.json", "tensorboard", "timings.json"}
    assert {path.name for path in profiled.output.iterdir()} == names


def test_results_have_all_ranks(profiled):
    results = profiled.read("results.json")
    assert results["world_size"] == 2
    assert results["nodes"] == 1
    assert results["arguments"]["strategy"] == "ddp"
    assert results["arguments"]["gradients"] == "fp32"
    assert len(results["environment"]["hosts"]) == 1, "both are on this one"
    all_reduce = results["all_reduce"]
    assert all_reduce["megabytes"] == pytest.approx(4 * results["parameters"] / 1e6)
    assert all_reduce["seconds"] > 0
    speed = all_reduce["megabytes"] / 1e3 / all_reduce["seconds"]
    assert all_reduce["gigabytes_per_second"] == pytest.approx(speed), "2 ranks send it once"


def test_timings_have_the_slowest_and_the_fastest_rank(ranks):
    run = ranks.once(4, *LONG, *BATCHINGS["packed"])
    found = run.read("timings.json")["ranks"]
    slowest = found["slowest"]
    fastest = found["fastest"]
    assert slowest["seconds"] >= fastest["seconds"] > 0
    assert slowest["rank"] != fastest["rank"]
    # Each has a fourth of the tokens, or nearly.
    tokens = run.column("tokens").sum()
    for rank in (slowest, fastest):
        assert abs(rank["tokens"] / tokens - 1 / 4) < 0.05


def test_a_slow_rank_is_told_by_its_own_seconds(ranks):
    """The other one waits for it, and that is not counted as its work."""
    patch = """
unpatched_batch = planned_batch

def planned_batch(*arguments):
    if RANK == 1:
        time.sleep(0.3)
    return unpatched_batch(*arguments)
"""
    found = ranks.finished(2, *SHORT, patch=patch).read("timings.json")["ranks"]
    assert found["slowest"]["rank"] == 1
    assert found["slowest"]["seconds"] > found["fastest"]["seconds"] + 0.5 * 12 * 0.3


def test_exposed_communication_is_measured_under_ddp_alone(ranks):
    phase = ranks.once(2, *SHORT).read("timings.json")["phases"]["exposed_communication"]
    assert phase["seconds"] > 0
    assert 0 < phase["share"] < 1
    sharded = ranks.once(2, *SHORT, "--strategy", "fsdp").read("timings.json")
    assert sharded["phases"]["exposed_communication"] == {"seconds": None, "share": None}


# 4. With the real torchrun


def torchrun(script, *words, world=2, seconds=180):
    """Runs a script as torchrun's ranks; returns its exit code and log."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    command += [f"--master-port={free_port()}", script, *words]
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    return done.returncode, done.stdout


# What rank 1 does, what the log says, and what torchrun's summary has of it.
FAULTS = {
    "a traceback": (
        "raise KeyError('lightning')",
        "[rank1]: KeyError: 'lightning'",
        "KeyError: 'lightning'",
    ),
    "one line": (
        "raise OSError(28, 'No space left', '/full')",
        "error on rank 1: /full: No space left",
        "[Errno 28] No space left: '/full'",
    ),
}


@pytest.mark.parametrize("fault", [pytest.param("a traceback", marks=pytest.mark.slow), "one line"])
def test_a_rank_that_fails_late_ends_the_job(tmp_path, fault):
    """By torchrun's own way: it ends the other ranks, fails itself, and the log says why."""
    fails, says, error = FAULTS[fault]
    text = DISTRIBUTED.read_text()
    place = '    with clock("optimizer"):\n'
    assert text.count(place) == 1
    script = tmp_path / "DISTRIBUTED/train.py"
    script.parent.mkdir()
    script.write_text(text.replace(place, f"    if step == 3 and RANK == 1: {fails}\n{place}"))
    shutil.copytree(ROOT / "baseline/sample", tmp_path / "baseline/sample")
    begin = time.monotonic()
    code, log = torchrun(script, *SHORT, "--output", tmp_path / "output")
    assert time.monotonic() - begin < 120
    assert code == 1
    assert says in log, log[-5000:]
    cause = log[log.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", cause)
    assert error in cause
    assert "step 3/12" in log
    assert "step 4/12" not in log
    assert not (tmp_path / "output/results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_always_come_to_an_end(tmp_path, strategy):
    """gloo's threads and Python can wait for one another while a process ends."""
    words = [*SMALL, "--epochs", 1, "--strategy", strategy]
    for number in range(10):
        code, log = torchrun(DISTRIBUTED, *words, "--output", tmp_path / str(number))
        assert code == 0, log[-3000:]
        assert (tmp_path / str(number) / "results.json").exists()


# 5. Real questions


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_real_questions_have_the_same_losses(ranks, batching):
    """A small pretrained BERT on SQuAD: 40 steps without dropout."""
    if not (SHARED / "minilm").is_dir() or not (SHARED / "squad").is_dir():
        pytest.skip("needs ../shared/minilm and ../shared/squad, which are not there")
    words = ["--model", SHARED / "minilm", "--train-file", SHARED / "squad/train.json"]
    words += ["--validation-file", SHARED / "squad/dev.json", "--limit", 150, "--dropout", 0]
    words += ["--epochs", 3, "--max-steps", 40, "--batch-size", 12, "--device", "cpu"]
    words += ["--no-profile", "--log-every", 1, "--batching", batching]
    words += ["--max-length", 192, "--stride", 64]
    baseline = ranks.finished(0, *words, seconds=900)
    one = ranks.finished(1, *words, seconds=900)
    assert np.array_equal(baseline.column("loss"), one.column("loss"))
    for world in (2, 4):
        many = ranks.finished(world, *words, seconds=900)
        assert_same_training(baseline, many, least_steps=40)
        assert baseline.read("predictions.json") == many.read("predictions.json")

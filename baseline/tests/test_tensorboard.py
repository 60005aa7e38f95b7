"""What TensorBoard shows of a run: while it trains, after a kill, of a resumed one, at the end.

The second half looks with a headless browser (Debian's chromium). To look yourself:
PICTURES=/some/folder pytest baseline/tests/test_tensorboard.py leaves a picture of each tab.
"""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, curves, fetch
from nursery import in_step, send
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BASELINE = Path(__file__).resolve().parents[1]
TRAIN = BASELINE / "train.py"
# 60 questions: 15 steps per epoch.
WORDS = ("--sample", "--limit", 60, "--batch-size", 4, "--device", "cpu", "--log-every", 2)
FINISHED = (*WORDS, "--epochs", 3, "--evaluate-every", "epoch")
PHASES = ["phases/data", "phases/forward", "phases/backward", "phases/optimizer"]
CURVES = ["training/loss", "training/learning_rate", "training/gradient_norm"]
CURVES += ["speed/tokens_per_second", "speed/peak_memory_gib", *PHASES]


def wait_in_step(step, file):
    """A patch that waits within a step until there is this file."""
    return in_step(step, f"while not Path({str(file)!r}).exists(): time.sleep(0.01)")


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def scalars(output):
    """{tag: [(step, value)...]}, as TensorBoard reads them."""
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def evaluation_points(output, name):
    """What the curve of a score has to be."""
    return [
        (one["step"], pytest.approx(one[name]))
        for one in read(output, "results.json")["evaluations"]
    ]


# 1. The event files


def test_curves_are_there_from_the_first_interval_on(start, tmp_path):
    output = tmp_path / "run"
    patch = wait_in_step(3, tmp_path / "go")
    life = start(*WORDS, "--max-steps", 30, "--output", output, patch=patch)
    life.wait_for("step 2/30")
    time.sleep(0.5)
    curves = scalars(output)
    for tag in CURVES:
        assert [step for step, _ in curves[tag]] == [2]
    # They are not lost with the process.
    life.kill(signal.SIGKILL)
    life.end(-signal.SIGKILL)
    assert scalars(output) == curves


@pytest.fixture(scope="module")
def runs(nursery, tmp_path_factory):
    """Two runs of one training: one that nothing happens to; and one that is killed three times,
    some steps after a save and just after an evaluation, and stopped once."""
    folder = tmp_path_factory.mktemp("board") / "runs"
    folder.mkdir()

    def life(output, patch="", code=0):
        words = [*FINISHED, "--save-every", 4, "--output", output]
        nursery.start(TRAIN, words, folder.parent / "log", patch).end(code)

    life(folder / "plain")
    resumed = folder / "resumed"
    life(resumed, in_step(11, send("SIGKILL")), code=-signal.SIGKILL)
    # Step 15 ends an epoch.
    life(resumed, in_step(16, send("SIGKILL")), code=-signal.SIGKILL)
    life(resumed, in_step(24, send("SIGKILL")), code=-signal.SIGKILL)
    life(resumed, in_step(35, send("SIGTERM")), code=75)
    life(resumed)
    return folder


def test_curves_are_those_of_the_intervals(runs):
    for name in ("plain", "resumed"):
        output = runs / name
        curves = scalars(output)
        intervals = read(output, "timings.json")["intervals"]
        assert intervals[-1]["step"] == 45
        for tag in CURVES:
            assert [step for step, _ in curves[tag]] == [one["step"] for one in intervals], tag
        for field in ("loss", "learning_rate", "gradient_norm"):
            values = [value for _, value in curves[f"training/{field}"]]
            assert values == pytest.approx([one[field] for one in intervals])


def test_curves_of_the_scores(runs):
    for name in ("plain", "resumed"):
        output = runs / name
        curves = scalars(output)
        for score in ("exact_match", "f1"):
            expected = evaluation_points(output, score)
            assert [step for step, _ in expected] == [15, 30, 45]
            assert curves[f"evaluation/{score}"] == expected


def test_resumed_run_is_profiled_once(runs):
    for name in ("plain", "resumed"):
        [trace] = runs.glob(f"{name}/tensorboard/rank0.*.pt.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert {"data", "forward", "backward", "optimizer"} <= {one.get("name") for one in events}
        assert "aten::addmm" in read(runs / name, "timings.json")["operators"]


# 2. In the browser


@pytest.fixture(scope="module")
def board(runs):
    """TensorBoard on the runs: its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = ["--host", "127.0.0.1", "--port", str(port), "--logdir", str(runs)]
    command = [sys.executable, "-m", "tensorboard.main", *words, "--reload_interval", "1"]
    with open(runs.parent / "tensorboard.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_runs(address, {"plain", "resumed"})
        yield address
    finally:
        server.terminate()
        server.wait(20)


def wait_for_runs(address, names):
    """Waits until TensorBoard has read these runs."""
    deadline = time.monotonic() + 120
    while set(fetch(f"{address}/data/runs")) < {f"{name}/tensorboard" for name in names}:
        assert time.monotonic() < deadline, fetch(f"{address}/data/runs")
        time.sleep(0.2)


@pytest.fixture(scope="module")
def look(board, tmp_path_factory):
    """look(tab, *words): opens a tab of TensorBoard; returns what is seen when all words are."""
    if not CHROMIUM:
        pytest.skip("chromium is missing: apt install chromium, or .ci/run")
    pytest.importorskip("aiohttp", reason="aiohttp, which comes with datasets, is missing")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    pictures = os.environ.get("PICTURES")

    def look_at(tab, *words, curve_count=0, image_count=0):
        picture = Path(pictures, f"{tab}.png") if pictures else None
        return browser.look(f"{board}/#{tab}", words, curve_count, image_count, picture)

    yield look_at
    browser.close()


def assert_never_back(curve):
    across = [x for x, _ in curve]
    assert across == sorted(set(across))


def test_overview(look):
    charts = ["loss", "F1 and exact match", "real tokens per second", "share of the step"]
    charts += ["learning rate", "gradient norm", "memory, GiB"]
    # Of two runs, eleven values; each is drawn as it is, and smoothed.
    seen = look("custom_scalars", "overview", *charts, "plain", "resumed", curve_count=2 * 11 * 2)
    for curve in curves(seen):
        assert_never_back(curve)
    # The loss's are the first, and fall: pixels are counted from the top.
    for curve in curves(seen)[:2]:
        assert curve[-1][1] > curve[0][1] + 30


def test_every_curve_has_each_step_once(board, look):
    look("timeseries", "plain", "resumed", "backward", "f1")
    tags_of_runs = fetch(f"{board}/data/plugin/scalars/tags")
    for name in ("plain/tensorboard", "resumed/tensorboard"):
        tags = [tag for tag in tags_of_runs[name] if not tag.startswith("result")]
        assert set(tags) >= {*CURVES, "evaluation/f1", "evaluation/exact_match"}
        for tag in tags:
            points = fetch(f"{board}/data/plugin/scalars/scalars", run=name, tag=tag)
            steps = [step for _, step, _ in points]
            assert steps == sorted(set(steps)), f"{tag} of {name}"
            assert steps[-1] == 45


def test_settings_and_scores_side_by_side(look):
    settings = ["batch_size", "batching", "learning_rate", "precision", "packed"]
    scores = ["result/exact_match", "result/f1", "result/steady_epoch_seconds"]
    look("hparams", *settings, *scores, "plain", "resumed")


def test_texts(look):
    # The results, as the log has them, and the profiler's table.
    words = ["exact match, F1", "real tokens/s", "Self CPU", "aten::addmm"]
    look("text", "results", "operators of the profiled steps", "plain", "resumed", *words)


def test_run_that_is_under_way(runs, board, look, start, tmp_path):
    """In its 21st step: its curves up to the 20th are there, beside those of the others."""
    steps = [2, 4, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    go = tmp_path / "go"
    output = runs / "under way"
    life = start(*FINISHED, "--output", output, patch=wait_in_step(21, go))
    try:
        life.wait_for("step 20/45")
        wait_for_runs(board, {"under way"})
        loss = {"run": "under way/tensorboard", "tag": "training/loss"}
        deadline = time.monotonic() + 60
        seen_steps = []
        while seen_steps[-1:] != [20]:
            assert time.monotonic() < deadline, seen_steps
            points = fetch(f"{board}/data/plugin/scalars/scalars", **loss)
            seen_steps = [step for _, step, _ in points]
        assert seen_steps == steps
        seen = look("custom_scalars", "overview", "under way", curve_count=2 * 11 * 2 + 9 * 2)
        its_curves = [curve for curve in curves(seen) if len(curve) == len(steps)]
        # Nine curves, each smoothed and as it is, but for one that the browser is still drawing.
        assert len(its_curves) >= 9
        for curve in its_curves:
            assert_never_back(curve)
        look("timeseries", "under way", "evaluation", "f1", "15")
        assert life.running()
        assert not (output / "results.json").exists()
    finally:
        go.touch()
        life.end()


def offers_tensorboard():
    """Whether trace.py draws for TensorBoard."""
    script = BASELINE / "trace.py"
    return script.exists() and "--tensorboard" in script.read_text(encoding="utf-8")


@pytest.mark.skipif(not offers_tensorboard(), reason="trace.py has no --tensorboard")
def test_time_line_of_a_profiled_step(runs, look):
    command = [sys.executable, BASELINE / "trace.py", "--tensorboard", runs / "plain"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = look("images", "one profiled step", "plain", image_count=1)
    [(width, height)] = [size for size in seen["images"] if size[0] > 300]
    assert height > 100
    look("text", "traces", "phases", "environment")


def test_profilers_tab_has_the_steps(board):
    plugin = f"{board}/data/plugin/pytorch_profiler"
    if "pytorch_profiler" not in fetch(f"{board}/data/plugins_listing"):
        pytest.skip("torch-tb-profiler is not installed")
    # It reads the traces after the server has started.
    deadline = time.monotonic() + 60
    while "plain/tensorboard" not in fetch(f"{plugin}/runs")["runs"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    run = {"run": "plain/tensorboard"}
    views = fetch(f"{plugin}/views", **run)
    assert {"Overview", "Operator", "Trace"} <= set(views)
    assert fetch(f"{plugin}/workers", **run, view="Overview") == ["rank0"]
    [span] = fetch(f"{plugin}/spans", **run, view="Overview", worker="rank0")
    worker = {**run, "worker": "rank0", "span": span}
    overview = fetch(f"{plugin}/overview", **worker, view="Overview")
    assert len(overview["steps"]["rows"]) == 2
    operators = fetch(f"{plugin}/operation/table", **worker, view="Operator", group_by="Operation")
    assert any("aten::addmm" in row["name"] for row in operators["data"])

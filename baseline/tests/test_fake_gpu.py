"""train.py's CUDA path on a GPU that computes nothing: what a step launches, in which order, how
much memory it takes, and that whole runs end as they should. Values and times mean nothing there.

    .ci/fake-gpu/run -- pytest -m fakegpu      in an environment with a torch that is built for CUDA
"""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from nursery import in_step, send
from runs import BASELINE, load_script, refusal
from small import draw_lengths, make_features, parse, run_training
from torch._dynamo.utils import counters

launches = load_script("benchmarks/launches.py")
pytestmark = [
    pytest.mark.fakegpu,
    pytest.mark.skipif(not launches.is_fake_gpu(), reason="needs .ci/fake-gpu/run"),
]
# Every tensor begins as zeros: no stale bytes are read as a loss of 1e29.
ZEROS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
WAITS = ("SYNC", "COPY", "REFUSED")


@pytest.fixture
def make_step(train):
    """make_step(*words, layers): launches.make_step of few layers, its first three steps done."""

    def make(*words, layers=2):
        torch._dynamo.reset()
        counters.clear()
        config = transformers.BertConfig(num_hidden_layers=layers)
        step = launches.make_step(train, words, config)
        for number in range(3):
            step(number)
        return step

    yield make
    torch._dynamo.reset()
    torch.cuda.set_stream(torch.cuda.default_stream())
    gc.collect()  # what is left would count as the next test's memory
    torch.cuda.empty_cache()


def record(action, *arguments):
    with launches.record() as rows:
        action(*arguments)
    return rows


def of_kind(rows, *kinds):
    return [row for row in rows if row.kind in kinds]


def multiplications(rows):
    """The large multiplications, as words: m n k batch type ...; not the head's, of two columns."""
    found = [row.text.split() for row in of_kind(rows, "gemm")]
    return [words for words in found if min(map(int, words[:3])) > 2]


# 1. A step


@pytest.mark.parametrize(
    "words",
    [
        ["--no-compile"],
        ["--compile"],
        ["--no-compile", "--accumulate", 2],
        ["--no-compile", "--batching", "padded", "--precision", "tf32"],
        ["--no-compile", "--batching", "bucketed", "--no-fused"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_step_never_waits_for_the_device(make_step, words):
    rows = record(make_step(*words), 3)
    assert len(of_kind(rows, "kernel")) > 50
    assert not of_kind(rows, *WAITS)
    if "bucketed" not in words:
        # Its shapes never change, so the steps before have allocated all that it takes.
        assert not of_kind(rows, "malloc")


def test_training_waits_only_to_write_a_line_of_the_log(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train.math, "isfinite", lambda value: True)  # of values that mean nothing

    def count_waits(steps, log_every):
        words = ["--device", "cuda", "--no-compile", "--max-steps", steps, "--log-every", log_every]
        args = parse(train, *words)
        features = make_features(draw_lengths(100))
        output = tmp_path / f"{steps}-steps"
        rows = record(lambda: run_training(train, args, output, features, device="cuda"))
        return len(of_kind(rows, *WAITS))

    # Four lines each.
    assert count_waits(40, 10) == count_waits(80, 20) > 0


@pytest.mark.parametrize("compiling", ["--no-compile", "--compile"])
@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_one_attention_kernel_per_layer(make_step, batching, compiling):
    rows = record(make_step("--batching", batching, compiling), 3)
    kernels = [row.text for row in of_kind(rows, "kernel")]
    forward = [name for name in kernels if "flash_fwd" in name or "fmha_cutlassF_bf16" in name]
    assert len(forward) == 2
    if batching == "packed":
        assert all("flash_fwd" in name for name in forward)
    # Query, key, value, the output's and two of the feed-forward, each forward and twice backward:
    # torch's own formula of attention would multiply too.
    assert len(multiplications(rows)) == 2 * 6 * 3


def test_large_multiplications_are_in_the_precision_asked_for(make_step):
    bf16 = record(make_step("--no-compile"), 3)
    assert {words[4] for words in multiplications(bf16)} == {"bf16"}
    assert {words[4] for words in multiplications(record(make_step("--compile"), 3))} == {"bf16"}

    def modes(precision):
        rows = record(
            make_step("--no-compile", "--batching", "padded", "--precision", precision), 3
        )
        assert {words[4] for words in multiplications(rows)} == {"f32"}
        return {
            words[words.index("math") + 1] for words in multiplications(rows) if "math" in words
        }

    # cuBLAS's CUBLAS_TF32_TENSOR_OP_MATH and CUBLAS_DEFAULT_MATH.
    assert modes("tf32") == {"3"}
    assert modes("fp32") == {"0"}


def test_layers_are_compiled_once(make_step, train):
    step = make_step("--compile", layers=3)
    for number in range(3, 10):
        step(number)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # Nor does an evaluation, which is not compiled, between two steps.

    with torch.inference_mode():
        step.model.eval()
        train.evaluation_logits(step.args, step.model, step.features, range(8))
        step.model.train()
    step(10)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("compiling", ["--no-compile", "--compile"])
def test_a_graph_holds_all_of_a_step_and_is_one_launch(make_step, compiling):
    plain = record(make_step(compiling), 3)
    step = make_step(compiling, "--cuda-graph")
    # Nothing is refused while it is recorded, and it has all that a step has.
    rows = record(step, 3)
    assert not of_kind(rows, "REFUSED")
    begin, end = [number for number, row in enumerate(rows) if row.kind == "capture"]
    for kind in ("kernel", "gemm"):
        assert len(of_kind(rows[begin:end], kind)) == pytest.approx(
            len(of_kind(plain, kind)), abs=12
        )
    replay = record(step, 4)
    assert len([row for row in replay if row.text == "graph launch"]) == 1
    # Beside it: the copies of its input, and the sums of its losses.
    assert len(of_kind(replay, *launches.LAUNCHES)) <= 16
    assert not of_kind(replay, *WAITS, "malloc", "gemm")


# The most launches and GiB of a step of BERT-Base, packed: what was counted, and 5 percent.
LIMITS = {
    ("--no-compile",): (1400, 3.8),
    ("--compile",): (1085, 3.55),
    ("--compile", "--batch-size", 128): (1110, 9.45),
    ("--compile", "--cuda-graph"): (12, 3.55),
}


@pytest.mark.parametrize("words", LIMITS, ids=lambda words: " ".join(map(str, words)))
def test_launches_and_memory_of_bert_base(make_step, words):
    most_launches, most_memory = LIMITS[words]
    torch.cuda.reset_peak_memory_stats()
    step = make_step(*words, layers=12)
    step(3)
    rows = record(step, 4)
    assert len(of_kind(rows, *launches.LAUNCHES)) <= most_launches
    assert 3 < torch.cuda.max_memory_allocated() / 2**30 <= most_memory


def test_counts_are_those_committed(train):
    """If the step has changed: .ci/fake-gpu/run -- python baseline/benchmarks/launches.py"""
    committed = json.loads(launches.RESULTS.read_text())
    table = launches.count_launches(train)
    same = [other for other in committed if other["title"] == table["title"]]
    if not same:
        pytest.skip(f"none are committed of {table['title']}")
    assert table["rows"] == same[0]["rows"]


# 2. Whole runs


@pytest.mark.parametrize(
    "ways", [["--no-compile"], ["--compile"], ["--no-compile", "--cuda-graph"]], ids=" ".join
)
def test_a_run_leaves_results_that_no_table_takes(start, tmp_path, ways):
    output = tmp_path / "run"
    words = ["--sample", "--max-steps", 16, *ways, "--output", output]
    assert "FAKE NVIDIA" in start(*words, **ZEROS).end()
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == 16 and results["arguments"]["precision"] == "bf16"
    assert results["arguments"]["compile"] == ("--compile" in ways)
    assert "FAKE NVIDIA" in refusal(output)


@pytest.mark.parametrize("compiling", ["--no-compile", "--compile"])
def test_a_run_that_was_stopped_goes_on(start, tmp_path, compiling):
    # Empty caches: Triton's compiler takes the signals over, where it has something to do.
    caches = {name: str(tmp_path) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    output = tmp_path / "run"
    words = ["--sample", "--max-steps", 12, compiling, "--log-every", 1, "--output", output]
    start(*words, patch=in_step(5, send("SIGUSR1")), **ZEROS, **caches).end(75)
    assert "going on from step 5" in start(*words, **ZEROS).end()
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == 12 and results["resumed_from_steps"] == [5]
    intervals = json.loads((output / "timings.json").read_text())["intervals"]
    assert [interval["step"] for interval in intervals] == list(range(1, 13))


def test_a_request_to_stop_is_heard_however_rarely_the_log_is_written(start, tmp_path):
    """A line every hundred steps, at five steps a second, is one every twenty seconds."""
    output = tmp_path / "run"
    words = ["--sample", "--epochs", 100, "--max-steps", 400, "--log-every", 100, "--no-compile"]
    text = start(*words, "--output", output, patch=in_step(12, send("SIGUSR1")), **ZEROS).end(75)
    assert "stopped by SIGUSR1 at step 20" in text


def test_out_of_memory_is_one_line_with_its_fix(start, tmp_path):
    words = ["--sample", "--batch-size", 140, "--batching", "padded", "--no-compile"]
    text = start(*words, "--output", tmp_path / "run", FAKECUDA_GIB="0.3").end(1)
    assert text.splitlines()[-1].startswith("error: out of memory: raise --accumulate")


def test_ladder(tmp_path):
    """All of a GPU's rungs train; report.py then refuses their table, so the exit code is 2."""
    command = ["bash", BASELINE / "ladder.sbatch", "--sample", "--output", tmp_path]
    environment = {**os.environ, **ZEROS, "VENV": sys.prefix, "LADDER_STEPS": "16"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "computes nothing" in done.stderr.splitlines()[-1]
    runs = sorted(path.parent.name for path in tmp_path.glob("*/results.json"))
    names = ["1-fp32", "2-tf32", "3-bf16", "4-fused", "5-dynamic", "6-bucketed", "7-packed"]
    assert runs == [*names, "8-compiled", "9-graphed"]
    assert "FAKE NVIDIA" in (tmp_path / "1-fp32/nvidia-smi-before.csv").read_text()

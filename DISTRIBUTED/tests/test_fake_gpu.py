"""train.py's ranks on GPUs that compute nothing, with NCCL's collectives: each strategy, what waits
for what in a step, stopping and going on, and the sbatch scripts. Values and times mean nothing.

    .ci/fake-gpu/run -- pytest -m fakegpu      in an environment with a torch that is built for CUDA
"""

import collections
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from nursery import Nursery
from ranks import ROOT, SHORT, Ranks

BENCHMARKS = ROOT / "baseline/benchmarks"


def load_launches():
    specification = importlib.util.spec_from_file_location("launches", BENCHMARKS / "launches.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


launches = load_launches()
pytestmark = [
    pytest.mark.fakegpu,
    pytest.mark.skipif(not launches.is_fake_gpu(), reason="needs .ci/fake-gpu/run"),
]
# Two GPUs, of each "node" too. Every tensor begins as zeros: no stale bytes are read as a loss.
GPUS = {"FAKECUDA_COUNT": "2", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
WORDS = [*SHORT, "--device", "cuda", "--no-compile"]
# Options, ranks, nodes.
WAYS = {
    "ddp": (["--gradients", "bf16"], 2, 1),
    "ddp, fp32": (["--gradients", "fp32"], 2, 1),
    "ddp, compiled": (["--compile"], 2, 1),
    "zero2": (["--strategy", "zero2"], 2, 1),
    "fsdp": (["--strategy", "fsdp"], 2, 1),
    "hsdp": (["--strategy", "hsdp"], 2, 2),
    "hsdp of 2x2": (["--strategy", "hsdp"], 4, 2),
    "dp": (["--strategy", "dp", "--batching", "bucketed"], 1, 1),
}


@pytest.fixture(scope="module")
def gpu_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-ranks")
    with Nursery(SQUAD_CACHE=str(folder / "cache"), **GPUS) as nursery:
        yield Ranks(nursery, folder)


# 1. What a step launches

# In place of train.py's main(): it records a step of a BERT of two layers. The thirteenth: in its
# first ten steps DDP measures its own times, for which it waits.
RECORD = f"""
def main():
    del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    sys.path.append({str(BENCHMARKS)!r})
    import launches
    words = sys.argv[1:]
    args = parse_arguments(words)
    init_distributed(args)
    config = transformers.BertConfig(num_hidden_layers=2)
    step = launches.make_step(sys.modules["train"], words, config)
    for number in range(12):
        step(number)
    with launches.record() as rows:
        step(12)
    Path(args.output).mkdir(exist_ok=True)
    write_json(Path(args.output, f"rows-{{RANK}}.json"), rows)
    dist.destroy_process_group()
"""
RECORDED = {}


@pytest.fixture
def recorded(gpu_ranks):
    """recorded(way): what rank 0 launches in a step."""

    def record_once(way):
        if way not in RECORDED:
            options, world, nodes = WAYS[way]
            words = ["--batch-size", 32, "--no-compile", *options]
            run = gpu_ranks(world, *words, nodes=nodes, patch=RECORD)
            assert run.codes == [0] * world, run.log[-3000:]
            RECORDED[way] = [launches.Row(*row) for row in run.read("rows-0.json")]
        return RECORDED[way]

    return record_once


def numbers_of(rows, kind, words=""):
    return [n for n, row in enumerate(rows) if row.kind == kind and words in row.text]


def done_before(rows):
    """Returns for each row what is done for sure when the GPU begins it: {stream: the last row's
    number}. A stream does its rows in their order; a wait adds what the event's stream had done
    when it was recorded."""
    done = collections.defaultdict(dict)
    at_event = {}
    before = []
    for number, row in enumerate(rows):
        own = done[row.stream]
        before.append(dict(own))
        if row.kind == "record":
            at_event[row.text] = dict(own)
        elif row.kind == "wait":
            for stream, last in at_event.get(row.text, {}).items():
                own[stream] = max(own.get(stream, -1), last)
        own[row.stream] = number
    return before


@pytest.mark.parametrize("way", [way for way in WAYS if way != "dp"])
def test_a_step_waits_for_nothing_and_multiplies_in_bf16(recorded, way):
    rows = recorded(way)
    assert len(numbers_of(rows, "kernel", "flash_fwd")) == 2
    for kind in ("SYNC", "COPY", "REFUSED"):
        assert not numbers_of(rows, kind)
    found = [rows[number].text.split() for number in numbers_of(rows, "gemm")]
    large = [words for words in found if min(map(int, words[:3])) > 2]
    assert len(large) == 2 * 6 * 3 and {words[4] for words in large} == {"bf16"}


@pytest.mark.parametrize("way", ["ddp", "ddp, fp32", "ddp, compiled"])
def test_gradients_travel_in_order_while_the_backward_pass_goes_on(recorded, way):
    rows = recorded(way)
    before = done_before(rows)
    compute = 0  # the default stream's number
    sent = numbers_of(rows, "nccl", "all_reduce")
    assert len(sent) > 1
    kernels = numbers_of(rows, "kernel")
    (clipping,) = [n for n in kernels if "LpNorm" in rows[n].text and n > sent[-1]][:1]
    for number in sent:
        stream = rows[number].stream
        assert stream != compute
        assert f"x {4 if 'fp32' in way else 2} " in rows[number].text
        # All of its gradients, and their rounding to bf16, are done before it.
        assert before[number][compute] >= max(
            n for n in kernels if n < number and not rows[n].stream
        )
        # It is done before the gradients are clipped.
        assert before[clipping][stream] >= number
    # The sums are copied back, in fp32, after their all-reduce and before the clipping.
    others = {compute, rows[sent[0]].stream}
    copies = [n for n in kernels if rows[n].stream not in others and n < clipping]
    assert len(copies) == (0 if "fp32" in way else len(sent))
    for number, copy in zip(sent, copies):
        assert before[copy][rows[number].stream] >= number
        assert before[clipping][rows[copy].stream] >= copy
    # Meanwhile the backward pass goes on, and does not wait for them.
    backward = [n for n in numbers_of(rows, "gemm") if n > sent[0]]
    assert len(backward) > 10
    assert before[backward[-1]].get(rows[sent[0]].stream, -1) < sent[0]


@pytest.mark.parametrize(
    "way, gathered, scattered, reduced",
    [("zero2", 3, 3, 0), ("fsdp", 6, 3, 0), ("hsdp", 0, 0, 3), ("hsdp of 2x2", 6, 3, 3)],
)
def test_what_sharded_strategies_send(recorded, way, gathered, scattered, reduced):
    """Two layers and the rest: zero2 gathers their weights once, fsdp twice, hsdp within a node;
    it sums the shards' gradients over the nodes."""
    rows = recorded(way)
    assert len(numbers_of(rows, "nccl", "all_gather")) == gathered
    assert len(numbers_of(rows, "nccl", "reduce_scatter")) == scattered
    # One more, of a few bytes, is of the gradient's norm.
    large = [n for n in numbers_of(rows, "nccl", "all_reduce") if " x 2 " in rows[n].text]
    assert len(large) == reduced


# 2. Whole runs


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_stopped_goes_on(gpu_ranks, way):
    options, world, nodes = WAYS[way]
    words = [*WORDS, *options]
    stopped = gpu_ranks.stopped(world, *words, nodes=nodes, at=5)
    run = gpu_ranks.finished(world, *words, nodes=nodes, output=stopped.output)
    results = run.read("results.json")
    assert results["steps"] == 12 and results["resumed_from_steps"] == [5]
    assert "FAKE NVIDIA" in results["environment"]["devices"][0]
    assert len(run.column("step")) == 12


def run_script(name, folder, *words, **environment):
    command = ["bash", ROOT / "DISTRIBUTED" / name, "--sample", "--max-steps", 12, "--no-compile"]
    command += [*words, "--output", folder]
    environment = {**os.environ, **GPUS, "VENV": sys.prefix, **environment}
    return subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_run_2x2_takes_the_gpus_that_are_there(tmp_path):
    done = run_script("run_2x2.sbatch", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["world_size"] == 2 and results["nodes"] == 1 and results["steps"] == 12
    assert results["arguments"]["gradients"] == "bf16"
    assert (tmp_path / "run/nvidia-smi-before.csv").read_text().count("FAKE NVIDIA") == 2


def test_scaling(tmp_path):
    """Each shape trains; report.py then refuses their table, so the exit code is 2."""
    once = {"SCALING_REPEATS": "1", "SCALING_RULES": "strong"}
    done = run_script("scaling.sbatch", tmp_path / "runs", **once)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "computes nothing" in done.stderr.splitlines()[-1]
    for shape, ranks in (("1x1", 1), ("1x2", 2)):
        results = json.loads((tmp_path / f"runs/strong-{shape}-1/results.json").read_text())
        assert results["world_size"] == ranks and results["steps"] == 12

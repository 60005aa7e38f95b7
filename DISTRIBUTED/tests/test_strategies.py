"""Each strategy is the same training, splits what it promises, and goes on from any other's save.

Ranks are processes on this machine's CPU that talk through gloo; see ranks.py.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from ranks import (
    DISTRIBUTED,
    LONG,
    SHORT,
    SMALL,
    TOLERANCE,
    Run,
    assert_same_model,
    assert_same_training,
    free_port,
)

SHARDED = ["zero2", "fsdp", "hsdp"]
STRATEGIES = ["ddp", *SHARDED]


def slow_but_for(quick, cases):
    """Returns the cases for parametrize; those that are not quick are run with -m slow."""
    slow = pytest.mark.slow
    return [case if case in quick else pytest.param(case, marks=slow) for case in cases]


# 1. The same mathematics


SHARES = ["zero2 2", "fsdp 2", "hsdp 2", "zero2 4", "fsdp 4", "hsdp 4"]


@pytest.mark.parametrize("share", slow_but_for(["zero2 2", "fsdp 2", "hsdp 4"], SHARES))
def test_a_sharded_strategy_trains_to_baselines_losses(ranks, share):
    strategy, world = share.split()
    world = int(world)
    words = [*(SHORT if world == 2 else LONG), "--batching", "packed"]
    baseline = ranks.once(0, *words)
    # hsdp on 4 ranks: as on two nodes of two.
    nodes = world // 2
    sharded = ranks.finished(world, *words, "--strategy", strategy, nodes=nodes)
    assert_same_training(baseline, sharded, least_steps=40 if world == 4 else 12)
    assert baseline.read("predictions.json") == sharded.read("predictions.json")
    assert_same_model(baseline, sharded, tolerance=1e-3)
    assert sharded.read("results.json")["nodes"] == nodes


@pytest.mark.parametrize("strategy", slow_but_for(["hsdp"], SHARDED))
def test_a_sharded_strategy_accumulates(ranks, strategy):
    words = [*SHORT, "--batching", "bucketed"]
    many = ranks.finished(4, *words, "--strategy", strategy, "--accumulate", 2, nodes=2)
    assert_same_training(ranks.once(0, *words), many, least_steps=12)


@pytest.mark.slow  # run_2x2.sbatch's own tests start two agents with ddp
@pytest.mark.parametrize(("strategy", "per_node"), [("hsdp", 2), ("ddp", 8), ("hsdp", 8)])
def test_two_agents_have_one_ranks_losses(ranks, tmp_path, strategy, per_node):
    """torchrun once per node, as run_2x2.sbatch starts it; here both nodes are this machine.

    30 features in batches of 16: with 16 ranks two have none in each second step."""
    words = [*SHORT, "--batching", "bucketed", "--batch-size", 16, "--epochs", 6]
    words = [str(word) for word in words]
    output = tmp_path / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    command += [f"--nproc-per-node={per_node}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["SQUAD_CACHE"] = str(tmp_path / "cache")
    agents = []
    for node in range(2):
        own = [f"--node-rank={node}", str(DISTRIBUTED), *words]
        own += ["--strategy", strategy, "--output", str(output)]
        with open(tmp_path / f"log-{node}", "w") as log:
            agent = subprocess.Popen(
                command + own, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        agents.append(agent)
    try:
        codes = [agent.wait(timeout=120 * per_node) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    logs = [(tmp_path / f"log-{node}").read_text() for node in range(2)]
    assert codes == [0, 0], "\n".join(logs)[-5000:]
    run = Run(output, codes, logs)
    results = run.read("results.json")
    assert (results["world_size"], results["nodes"]) == (2 * per_node, 2)
    assert_same_training(ranks.once(0, *words), run, least_steps=12)


# Not the compiler, which takes minutes, but all that comes before it: a layer that is not one graph
# fails there. As in BERT-Base, a layer is larger than one of DDP's buckets.
COMPILE_WITHOUT_COMPILER = """
graphs = []

def backend(graph, inputs):
    graphs.append(str(graph.graph))
    write_json(Path(sys.argv[-1], f"graphs-{RANK}.json"), graphs)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
DistributedDataParallel = functools.partial(DistributedDataParallel, bucket_cap_mb=0.1)
"""


@pytest.mark.parametrize("strategy", slow_but_for(["ddp", "fsdp"], STRATEGIES))
def test_layers_compile_under_each_strategy(ranks, strategy):
    """As they do on a GPU by default: the hooks around a layer do not break its graph."""
    words = [*SMALL, "--max-steps", 4, "--batching", "bucketed"]
    compiled = ranks.finished(
        2, *words, "--strategy", strategy, "--compile", patch=COMPILE_WITHOUT_COMPILER
    )
    assert compiled.read("results.json")["arguments"]["compile"] is True
    # Rows are padded to fewer widths: the same tokens.
    assert_same_training(ranks.once(0, *words), compiled, least_steps=4)
    widths = 2
    for rank in range(2):
        assert len(compiled.read(f"graphs-{rank}.json")) == widths, "layers are alike"


def test_dp_trains_to_baselines_losses_in_one_process(ranks):
    words = [*SHORT, "--batching", "bucketed"]
    baseline = ranks.once(0, *words)
    dp = ranks.finished(1, *words, "--strategy", "dp")
    assert_same_training(baseline, dp, least_steps=12)
    assert baseline.read("predictions.json") == dp.read("predictions.json")
    assert_same_model(baseline, dp, tolerance=1e-4)
    results = dp.read("results.json")
    assert (results["world_size"], results["nodes"]) == (1, 1)


def test_dp_refuses_packed_batches(ranks):
    """A packed row cannot be cut into equal parts."""
    run = ranks(1, *SMALL, "--strategy", "dp")
    assert run.codes == [2]
    assert "error: --strategy dp" in run.log
    assert "--batching bucketed" in run.log


# 2. What each rank keeps

# Notes the elements of weights and of Adam's moments on each rank.
NOTE_SIZES = """
unpatched_save = save_checkpoint

def save_checkpoint(output, model, optimizer, *others):
    def own(tensor):
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor
    moments = []
    for state in optimizer.state.values():
        moments += [own(state["exp_avg"]).numel(), own(state["exp_avg_sq"]).numel()]
    weights = [own(parameter).numel() for parameter in model.parameters()]
    sizes = {"weights": sum(weights), "moments": sum(moments)}
    write_json(output / f"sizes-{RANK}.json", sizes)
    unpatched_save(output, model, optimizer, *others)
"""


@pytest.mark.parametrize(
    ("strategy", "world", "nodes", "shards"),
    [
        ("ddp", 2, 1, 1),
        ("zero2", 2, 1, 2),
        ("fsdp", 2, 1, 2),
        ("hsdp", 2, 1, 2),
        ("zero2", 4, 2, 4),
        ("fsdp", 4, 2, 4),
        ("hsdp", 4, 2, 2),
    ],
)
def test_a_strategy_splits_what_it_promises(ranks, strategy, world, nodes, shards):
    """hsdp splits within a node, the others among all ranks; ddp splits nothing."""
    words = [*SMALL, "--max-steps", 2, "--strategy", strategy]
    run = ranks.finished(world, *words, patch=NOTE_SIZES, nodes=nodes)
    parameters = run.read("results.json")["parameters"]
    sizes = [run.read(f"sizes-{rank}.json") for rank in range(world)]
    copies = world // shards
    assert sum(size["weights"] for size in sizes) == copies * parameters
    assert sum(size["moments"] for size in sizes) == copies * 2 * parameters
    # Some dimensions do not divide by the number of ranks.
    for size in sizes:
        assert size["weights"] <= 1.02 * parameters / shards
        assert size["moments"] <= 1.02 * 2 * parameters / shards


# Notes whether the layers' weights are whole between forward and backward pass.
NOTE_WHOLE_WEIGHTS = """
unpatched_forward = SpanModel.forward

def noting(self, batch):
    loss = unpatched_forward(self, batch)
    layer = encoder_layers(self)[0]
    whole = not any(isinstance(parameter, DTensor) for parameter in layer.parameters())
    write_json(Path(self.args.output, f"whole-{RANK}.json"), whole)
    return loss

SpanModel.forward = noting
"""


@pytest.mark.parametrize(("strategy", "whole"), [("zero2", True), ("fsdp", False), ("hsdp", False)])
def test_zero2_alone_keeps_the_weights_for_the_backward_pass(ranks, strategy, whole):
    words = [*SMALL, "--max-steps", 2, "--strategy", strategy]
    run = ranks.finished(2, *words, patch=NOTE_WHOLE_WEIGHTS)
    assert run.read("whole-0.json") is run.read("whole-1.json") is whole


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_left_loads_as_transformers_says(ranks, strategy):
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    words = [*SHORT, "--dropout", 0.1, "--strategy", strategy]
    run = ranks.once(2, *words)
    model, problems = AutoModelForQuestionAnswering.from_pretrained(
        run.output / "model", output_loading_info=True
    )
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    assert model.num_parameters() == run.read("results.json")["parameters"]
    assert AutoTokenizer.from_pretrained(run.output / "model")
    assert not list(run.output.glob("checkpoint*"))


# 3. Checkpoints


@pytest.mark.parametrize("strategy", slow_but_for(["ddp", "fsdp"], STRATEGIES))
def test_two_ranks_go_on_with_dropout(ranks, strategy):
    """Stopped twice, in the middle of an epoch. Under ddp it is the same training bit for bit."""
    words = [*SHORT, "--dropout", 0.1, "--strategy", strategy]
    straight = ranks.once(2, *words)
    output = ranks.stopped(2, *words, at=6).output
    ranks.stopped(2, *words, at=9, output=output)
    resumed = ranks.finished(2, *words, output=output)
    assert resumed.read("results.json")["resumed_from_steps"] == [6, 9]
    tolerance = 0 if strategy == "ddp" else TOLERANCE
    assert_same_training(straight, resumed, tolerance)
    assert straight.read("predictions.json") == resumed.read("predictions.json")
    assert_same_model(straight, resumed, tolerance=0 if strategy == "ddp" else 1e-3)


# A life: ranks, and its strategy (None: baseline). Each chain is one training; together they save
# with each strategy and go on with each other.
CHAINS = {
    "ddp zero2 fsdp hsdp ddp": [(2, "ddp"), (2, "zero2"), (2, "fsdp"), (4, "hsdp"), (2, "ddp")],
    "baseline fsdp zero2 ddp hsdp baseline": [
        (0, None),
        (4, "fsdp"),
        (2, "zero2"),
        (4, "ddp"),
        (2, "hsdp"),
        (0, None),
    ],
    "zero2 hsdp fsdp ddp baseline zero2": [
        (4, "zero2"),
        (4, "hsdp"),
        (2, "fsdp"),
        (2, "ddp"),
        (0, None),
        (2, "zero2"),
    ],
    "baseline ddp fsdp baseline": [(0, None), (2, "ddp"), (2, "fsdp"), (0, None)],
    "baseline hsdp zero2 baseline": [(0, None), (4, "hsdp"), (2, "zero2"), (0, None)],
}


@pytest.mark.parametrize("chain", slow_but_for(["baseline fsdp zero2 ddp hsdp baseline"], CHAINS))
def test_a_checkpoint_goes_on_elsewhere(ranks, chain):
    lives = CHAINS[chain]
    output = None
    for number, (world, strategy) in enumerate(lives, 1):
        words = [*SHORT, "--strategy", strategy] if strategy else SHORT
        nodes = 2 if world == 4 else 1
        if number < len(lives):
            stopped = ranks.stopped(world, *words, at=2 * number, output=output, nodes=nodes)
            output = stopped.output
        else:
            run = ranks.finished(world, *words, output=output, nodes=nodes)
    steps = [2 * number for number in range(1, len(lives))]
    assert run.read("results.json")["resumed_from_steps"] == steps
    assert_same_training(ranks.once(0, *SHORT), run, least_steps=12)


def test_dp_and_baseline_go_on_from_each_other(ranks):
    words = [*SHORT, "--batching", "bucketed"]
    output = ranks.stopped(0, *words, at=4).output
    ranks.stopped(1, *words, "--strategy", "dp", at=8, output=output)
    run = ranks.finished(0, *words, output=output)
    assert_same_training(ranks.once(0, *words), run, least_steps=12)


def test_the_first_life_decides_nothing_about_the_strategy(ranks):
    """Neither strategy nor --gradients is a setting that a checkpoint has to have the same of."""
    output = ranks.stopped(2, *SHORT, "--strategy", "zero2", at=4).output
    run = ranks.finished(2, *SHORT, "--gradients", "bf16", output=output)
    usual = ranks.once(0, *SHORT)
    assert np.abs(usual.column("loss") - run.column("loss")).max() < 0.02

"""A step waits for no device, keeps memory steady, depends on nothing but the seed, and may be
compiled: what makes training fast must not change it."""

import collections
import gc
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from small import (
    BATCHINGS,
    PACKED_ON_GPU,
    add_table,
    draw_lengths,
    make_features,
    make_model,
    parse,
    run_training,
)
from torch.utils._python_dispatch import TorchDispatchMode

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
# No torch.compile here: see the test of its own.
WITHOUT_LOOP = [*BATCHINGS[:3], PACKED_ON_GPU]


def whole_row_attention(module, query, key, value, mask, cu_seqlens, max_seqlen, dropout=0.0, **_):
    """Takes the packed attention's place where shapes alone count: each token sees the whole row.

    The loop reads its lengths on the host, and torch has no nested tensors on its meta device."""
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return output.transpose(1, 2), None


@pytest.fixture
def plain_packed_attention(train):
    """Makes whole_row_attention a GPU's packed attention until the test ends."""
    transformers.AttentionInterface.register("packed_jagged", whole_row_attention)
    yield
    transformers.AttentionInterface.register("packed_jagged", train.packed_jagged)


# Waiting for the device


class Waits(TorchDispatchMode):
    """Counts the operators that would make the host wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.seen[name] += 1
        if name in ("index", "index_put_"):
            # An index by booleans has as many results as there are ones.
            self.seen[name] += any(i is not None and i.dtype == torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


def count_reads(monkeypatch):
    """Returns a counter of the calls by which values come to the host."""
    reads = collections.Counter()

    def count(name, usual):
        def counted(self, *args, **kwargs):
            reads[name] += 1
            return usual(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__"):
        count(name, getattr(torch.Tensor, name))
    return reads


@pytest.mark.parametrize("batching", WITHOUT_LOOP)
@pytest.mark.parametrize("profile", ["--profile", "--no-profile"])
def test_a_step_waits_for_nothing(
    train, monkeypatch, tmp_path, plain_packed_attention, batching, profile
):
    """Values are read but where the log reads a whole interval's losses and norms at once."""
    words = ["--max-steps", 12, "--log-every", 3, "--accumulate", 2, profile]
    args = parse(train, *words, batching=batching)
    reads = count_reads(monkeypatch)
    with Waits() as waits:
        state = run_training(train, args, tmp_path)
    assert [interval["step"] for interval in state["intervals"]] == [3, 6, 9, 12]
    assert reads == {"tolist": 2 * 4}
    assert +waits.seen == {}
    assert ("aten::" in state["operators"]) == (profile == "--profile")


def test_a_wait_would_be_noticed(monkeypatch):
    reads = count_reads(monkeypatch)
    with Waits() as waits:
        (torch.ones(3).sum() > 2).item()
        torch.ones(3)[torch.ones(3) > 0]
    assert waits.seen["_local_scalar_dense"] == 1
    assert waits.seen["index"] == 1
    assert reads == {"item": 1}


def tensors_in(value):
    """Returns all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


@pytest.mark.parametrize("batching", WITHOUT_LOOP)
def test_a_step_stays_on_the_device(train, plain_packed_attention, batching):
    """On torch's meta device, which has shapes and no values, a tensor that is made elsewhere or a
    value that is read raises: as near to a GPU as a machine without one comes."""
    words = ["--epochs", 1, "--accumulate", 2, "--no-fused"]
    args = parse(train, *words, batching=batching)
    features = make_features(draw_lengths(40))
    model = make_model(args).to("meta")
    add_table(train, features, model, "meta")
    plan = train.plan_training(features["lengths"], args)
    train.plan_to_device(plan, "meta")
    optimizer = train.make_optimizer(model, args)
    training = train.SpanModel(model, args).train()
    for step in range(len(plan["features"])):
        for micro in range(args.accumulate):
            batch = train.planned_batch(features["table"], plan, step, micro)
            assert {tensor.device.type for tensor in tensors_in(batch)} == {"meta"}
            (training(batch) / plan["device_count"][step]).backward()
        torch.nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("words", [[], ["--precision", "bf16", "--compile"]])
@pytest.mark.parametrize("batching", ["bucketed", PACKED_ON_GPU])
def test_more_steps_wait_no_more_on_a_gpu(train, tmp_path, batching, words):
    """Twice the steps, the same number of intervals: the same number of synchronisations."""
    counts = []
    for steps in (8, 16, 32):  # four intervals each; the first run warms up
        args = parse(train, "--max-steps", steps, "--log-every", 8, batching=batching)
        args.device_type = "cuda"
        args.precision = "bf16" if words else "fp32"
        args.compile = bool(words)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run_training(train, args, tmp_path, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert counts[1] == counts[2]


# Memory, and the seed


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_memory_is_steady_and_gradients_are_freed(train, monkeypatch, tmp_path, batching):
    """At each line of the log as many tensors are alive, and as large."""
    alive = []

    def count_tensors(device):
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)
        tensors = [item for item in gc.get_objects() if type(item) in kinds]
        alive.append((len(tensors), sum(tensor.numel() for tensor in tensors)))
        leaves = [tensor for tensor in tensors if tensor.is_leaf]
        assert all(leaf.grad is None for leaf in leaves), "set to None, not to zero"
        return 1.0

    # It is asked once per interval.
    monkeypatch.setattr(train, "peak_memory_gib", count_tensors)
    args = parse(train, "--max-steps", 40, "--log-every", 10, batching=batching)
    run_training(train, args, tmp_path)
    assert len(alive) == 4
    counts, sizes = zip(*alive[1:])
    assert len(set(counts)) == 1
    assert max(sizes) < 1.05 * min(sizes)


def losses(state):
    return [interval["loss"] for interval in state["intervals"]]


def test_one_seed_is_one_training(train, tmp_path):
    """With dropout; whether it is profiled, or how often it is logged, changes nothing."""

    def losses_of_steps(name, *words):
        args = parse(train, "--max-steps", 12, "--log-every", 1, *words)
        model = make_model(args, attention_dropout=0.1, hidden_dropout=0.1)
        return losses(run_training(train, args, tmp_path / name, model=model))

    usual = losses_of_steps("usual")
    assert losses_of_steps("again") == usual
    assert losses_of_steps("profiled", "--profile") == usual
    assert losses_of_steps("other", "--seed", 7) != usual
    every_third = losses_of_steps("third", "--log-every", 3)
    means = np.reshape(usual, (4, 3)).mean(axis=1)
    np.testing.assert_allclose(every_third, means, rtol=1e-6)


def test_each_step_of_each_seed_draws_its_own_dropout(train, monkeypatch, tmp_path):
    """With the same batch at every step, and nothing learnt, dropout alone changes the loss."""
    batches = np.tile(np.arange(16), (6, 1))
    monkeypatch.setattr(train, "plan_epoch", lambda lengths, args, epoch: batches)
    losses_of_all = []
    for seed in (1, 2):
        words = ["--epochs", 1, "--learning-rate", 0, "--log-every", 1, "--seed", seed]
        args = parse(train, *words)
        model = make_model(args, attention_dropout=0.1, hidden_dropout=0.1)
        losses_of_all += losses(run_training(train, args, tmp_path / str(seed), model=model))
    assert len(losses_of_all) == 12
    assert len(set(losses_of_all)) == 12


def test_each_micro_batch_draws_its_own_dropout(train):
    seeds = set()
    for seed in range(3):
        for step in range(50):
            for micro in range(4):
                seeds.add(train.dropout_seed(seed, step, micro))
    assert len(seeds) == 3 * 50 * 4
    assert train.dropout_seed(1, 2, 3) == train.dropout_seed(1, 2, 3)


# Compiling

# Lengths up to 120, and one batch in seven of longer ones: three widths of 64 in bucketed batches.
MIXED_LENGTHS = np.append(np.linspace(10, 120, 96), [180] * 16).astype(int)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Makes torch.compile call a backend that generates no code, and needs no C compiler.

    Returns the list of the graphs that it was given."""
    graphs = []
    usual = torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_by_backend(self, **options):
        return usual(self, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by_backend)
    monkeypatch.setenv("CXX", sys.executable)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("batching, widths", [(PACKED_ON_GPU, 1), ("padded", 1), ("bucketed", 3)])
def test_each_width_is_compiled_once(
    train, monkeypatch, tmp_path, compiler, plain_packed_attention, batching, widths
):
    """And the steps that compile are not of the steady state; losses are the same."""
    compiled_at = []
    usual_step = train.training_step

    def training_step(args, step, *rest):
        graphs_before = len(compiler)
        usual_step(args, step, *rest)
        if len(compiler) > graphs_before:
            compiled_at.append(step)

    monkeypatch.setattr(train, "training_step", training_step)
    words = ["--max-steps", 14, "--log-every", 1, "--max-length", 192]
    features = make_features(MIXED_LENGTHS)
    args = parse(train, *words, batching=batching)
    args.compile = True
    state = run_training(train, args, tmp_path, features)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(compiler) in (widths, 2 * widths), "the two layers share theirs, or do not"
    warmup = {0, 1, 2}
    unsteady = [step for step, each in enumerate(state["intervals"]) if not each["steady"]]
    assert unsteady == sorted(warmup | set(compiled_at))
    assert batching != "bucketed" or max(compiled_at) > 2, "let one compile late: another --seed"
    plain_args = parse(train, *words, batching=batching)
    plain = run_training(train, plain_args, tmp_path / "plain", features)
    assert losses(state) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.parametrize("variable, device", [("CXX", "cpu"), ("CC", "cuda")])
def test_without_a_compiler_it_says_so_and_goes_on(train, monkeypatch, variable, device):
    """A CPU's code is C++; on a GPU, C code starts the kernels."""
    lines = []
    monkeypatch.setattr(train, "log", lines.append)
    monkeypatch.setenv(variable, "no-compiler-of-this-name")
    model = make_model(parse(train))
    monkeypatch.setattr(type(model), "device", torch.device(device))
    assert not train.compile_layers(model)
    assert len(lines) == 1
    assert "no-compiler-of-this-name" in lines[0]
    assert all(layer._compiled_call_impl is None for layer in model.bert.encoder.layer)


def test_a_cpu_compiles_no_packed_batches(train):
    with pytest.raises(train.Problem, match="give --batching bucketed"):
        parse(train, "--compile", batching="packed")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("batching", ["bucketed", "padded"])
def test_compiled_training_has_the_same_losses(train, monkeypatch, tmp_path, batching):
    """With the real compiler, its cache empty: no graph is made after the first steps."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    words = ["--max-steps", 12, "--log-every", 1]
    plain = run_training(train, parse(train, *words, batching=batching), tmp_path / "plain")
    args = parse(train, *words, "--compile", batching=batching)
    state = run_training(train, args, tmp_path / "compiled")
    counters = torch._dynamo.utils.counters
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    seconds = [interval["seconds"] for interval in state["intervals"]]
    assert max(seconds[1:]) < max(seconds[0], 0.5)
    assert losses(state) == pytest.approx(losses(plain), abs=1e-4)
    torch._dynamo.reset()

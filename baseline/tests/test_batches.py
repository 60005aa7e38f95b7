"""Batches, the packed attention, the step, the schedule, the features' cache: what makes training
fast must not change it, and must stay fast. Lengths and tokens are drawn here; shapes are small."""

import collections
import copy
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

TRAIN = pathlib.Path(__file__).resolve().parents[1] / "train.py"
BATCHINGS = ["padded", "dynamic", "bucketed", "packed"]
ON_GPU = "packed as on a GPU"  # its plan: strata of several rows
WORDS, LONGEST = 60, 64  # the vocabulary of the tokens drawn here, and --max-length


def make_features(lengths, seed=0):
    """Features of these lengths: random tokens, questions and labels."""
    draw, lengths = np.random.default_rng(seed), np.asarray(lengths)
    first = draw.integers(2, lengths - 1)
    start = np.where(draw.random(len(lengths)) < 0.2, 0, draw.integers(first, lengths - 1))
    end = np.where(start == 0, 0, draw.integers(np.maximum(start, 1), lengths - 1))
    table = {
        "tokens": draw.integers(1, WORDS, lengths.sum()).astype(np.int32),
        "begin": np.append(0, np.cumsum(lengths)),
        "lengths": lengths,
        "first": first.astype(np.int32),
        "start": start.astype(np.int32),
        "end": end.astype(np.int32),
    }
    table = {name: torch.tensor(column) for name, column in table.items()}
    return {"table": table, "lengths": lengths, "pad": 0}


def drawn_lengths(count, seed=0, least=4):
    """Lengths that spread as SQuAD's do: many short, few long, some cut at the longest."""
    draw = np.random.default_rng(seed).lognormal(np.log(LONGEST * 0.42), 0.4, count)
    return np.clip(draw.astype(int), least, LONGEST)


def parse(train, *words, batching="packed"):
    words = ["--batching", batching, "--max-length", LONGEST, "--stride", 8, *words]
    return train.parse_arguments(list(map(str, ["--sample", "--device", "cpu", *words])))


def make_model(args, kind="bert", dropout=0.0, hidden=None):
    """A small model in this batching's attention; a kind's weights are always the same. hidden:
    the dropout outside attention, where it is another."""
    hidden = dropout if hidden is None else hidden
    sizes = {"vocab_size": WORDS, "max_position_embeddings": args.max_length}
    if kind == "distilbert":
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "qa_dropout": 0.0}
        sizes |= {"dropout": hidden, "attention_dropout": dropout}
        config = transformers.DistilBertConfig(**sizes)
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 48, "hidden_dropout_prob": hidden}
        sizes |= {"attention_probs_dropout_prob": dropout, "initializer_range": 0.3}
        if kind == "electra":
            sizes |= {"embedding_size": 16}
        config = transformers.CONFIG_MAPPING[kind](**sizes)
    torch.manual_seed(0)
    how = "packed" if args.batching == "packed" else "sdpa"
    family = transformers.AutoModelForQuestionAnswering
    return family.from_config(config, attn_implementation=how)


# The same batch, the same loss and gradients
def losses_and_gradients(train, monkeypatch, features, numbers, batching, accumulate, kind):
    """Each batch's loss and gradients, as the training loop makes them."""
    args = parse(train, "--accumulate", accumulate, "--batch-size", numbers.shape[1], "--epochs", 1)
    args.batching = "packed" if batching == ON_GPU else batching
    args.device_type = "cuda" if batching == ON_GPU else "cpu"
    with monkeypatch.context() as patch:
        patch.setattr(train, "plan_epoch", lambda lengths, args, epoch: numbers)
        plan = train.plan_training(features["lengths"], args)
    training, results = train.SpanModel(make_model(args, kind), args).train(), []
    for step, shares in enumerate(torch.tensor(plan["shares"])):
        training.zero_grad()
        total = 0.0
        for micro in range(accumulate):
            longest = int(plan["longest"][step, micro])
            batch = train.make_batch(features, shares[micro], plan["shapes"], longest)
            loss = training(batch, int(plan["features"][step]))
            loss.backward()
            total += loss.item()
        gradients = {n: p.grad.clone() for n, p in training.model.named_parameters()}
        results.append((total, gradients))
    return results


def plain_loss(train, features, numbers, kind):
    """One sequence after the other through transformers' own attention, no padding, no batch."""
    args = parse(train, batching="padded")
    model, table, losses = make_model(args, kind).train(), features["table"], []
    numbers = [i for i in numbers.tolist() if i >= 0]
    for i in numbers:
        begin, count, first = (int(table[n][i]) for n in ("begin", "lengths", "first"))
        inputs = {"input_ids": table["tokens"][None, begin : begin + count].long()}
        if kind != "distilbert":
            inputs["token_type_ids"] = (torch.arange(count) >= first).long()[None]
        output = model(**inputs)
        for name, logits in (("start", output.start_logits), ("end", output.end_logits)):
            label = table[name][i].long()[None]
            losses.append(torch.nn.functional.cross_entropy(logits, label))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


CASES = {  # name: lengths of the features, batches of their numbers
    "ragged": (drawn_lengths(48), np.random.default_rng(1).permutation(48).reshape(2, 24)),
    "one long among short": ([LONGEST, *[4] * 15], np.arange(16).reshape(2, 8)),
    "alike": ([20] * 16, np.arange(16).reshape(1, 16)),
    "all as long as can be": ([LONGEST] * 6, np.arange(6).reshape(1, 6)),
    "a single one": ([9], np.zeros((1, 1), int)),
    "places nobody has": (drawn_lengths(20), np.append(np.arange(20), [-1] * 4).reshape(2, 12)),
    "nearly nobody": ([5, 33, 4], np.array([[0, 1], [2, -1]])),
    "the same one twice": (drawn_lengths(4), np.array([[0, 0, 1, 2, 2, 2, 3, 3]])),
}


KINDS = [(case, "bert") for case in CASES]
KINDS += [(case, kind) for case in list(CASES)[::5] for kind in ("electra", "distilbert")]


@pytest.mark.parametrize("case, kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_batching_gives_the_same_loss_and_gradients(
    train, monkeypatch, case, accumulate, kind
):
    lengths, numbers = CASES[case]
    accumulate = min(accumulate, numbers.shape[1])
    features = make_features(lengths)
    plain = [plain_loss(train, features, batch, kind) for batch in numbers]
    for batching in [*BATCHINGS, ON_GPU]:
        told = losses_and_gradients(
            train, monkeypatch, features, numbers, batching, accumulate, kind
        )
        for (loss, gradients), (want, wanted) in zip(told, plain, strict=True):
            assert loss == pytest.approx(want, abs=1e-5), batching
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batching", ["packed", ON_GPU])
def test_real_questions_have_the_padded_gradients(train, squad, minilm, batching):
    """A real encoder on real questions: one batch of them, packed against padded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    features = train.build_features(
        train.read_squad(squad / "dev.json", 12), tokenizer, 384, 128, "a file"
    )
    features |= {"lengths": np.diff(features["begin"]), "pad": tokenizer.pad_token_id}
    names = ("tokens", "begin", "first", "start", "end", "lengths")
    features["table"] = {name: torch.tensor(features[name]) for name in names}
    told = []
    for way in (batching, "padded"):
        words = ["--model", minilm, "--device", "cpu", "--epochs", 1, "--dropout", 0]
        words += ["--batch-size", len(features["lengths"])]
        args = train.parse_arguments([*map(str, words)])
        args.device_type = "cuda" if way == ON_GPU else "cpu"
        args.batching = "padded" if way == "padded" else "packed"
        plan = train.plan_training(features["lengths"], args)
        _, config = train.load_tokenizer(args)
        training = train.SpanModel(train.load_model(args, config), args).train()
        shares, longest = torch.tensor(plan["shares"])[0, 0], int(plan["longest"][0, 0])
        batch = train.make_batch(features, shares, plan["shapes"], longest)
        loss = training(batch, int(plan["features"][0]))
        loss.backward()
        told.append((loss.item(), {n: p.grad for n, p in training.model.named_parameters()}))
    (loss, gradients), (want, wanted) = told
    assert loss == pytest.approx(want, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=0, msg=name)


def pack(train, lengths, seed=0, extra=7):
    args = parse(train)
    features = make_features(lengths, seed)
    longest = max(lengths) + 1
    half = len(lengths) // 2
    strata = [(0, half, max(lengths[:half]) + 1), (half, len(lengths), max(lengths[half:]) + 1)]
    shapes = {"tokens": int(sum(lengths)) + extra, "strata": strata}
    return args, features, shapes, longest


def test_a_packed_sequence_never_sees_its_neighbour(train):
    """Changing one sequence's tokens leaves the logits of all others as they were, bit for bit."""
    lengths = [5, 9, 17, 30, 31, 64]
    args, features, shapes, longest = pack(train, lengths)
    model, chosen = make_model(args).eval(), torch.arange(6)
    before = train.span_logits(
        model, train.make_batch(features, chosen, shapes, longest), args
    ).detach()
    for changed in range(6):
        other = copy.deepcopy(features)
        begin, end = (int(b) for b in features["table"]["begin"][changed : changed + 2])
        tokens = other["table"]["tokens"]
        tokens[begin:end] = WORDS - tokens[begin:end]
        after = train.span_logits(model, train.make_batch(other, chosen, shapes, longest), args)
        for row in range(6):
            same = torch.equal(before[row, : lengths[row]], after[row, : lengths[row]])
            assert same == (row != changed), (changed, row)


def test_a_packed_sequence_is_moved_by_its_own_tokens_alone(train):
    """The gradient of its logits is zero at every other place, free ones too, and nowhere else."""
    lengths = [5, 9, 17, 30]
    args, features, shapes, longest = pack(train, lengths)
    model, kept = make_model(args).eval(), []
    model.base_model.embeddings.register_forward_hook(lambda _, __, out: kept.append(out))
    batch = train.make_batch(features, torch.arange(4), shapes, longest)
    logits = train.span_logits(model, batch, args)
    for row, length in enumerate(lengths):
        (gradient,) = torch.autograd.grad(logits[row, :length].sum(), kept, retain_graph=True)
        moved = gradient[0].abs().sum(dim=1).nonzero().flatten()
        assert moved.tolist() == batch["places"][row, :length].tolist()


def test_free_places_change_nothing(train):
    lengths = [5, 9, 17, 30]
    told = []
    for extra in (1, 64):
        args, features, shapes, longest = pack(train, lengths, extra=extra)
        batch = train.make_batch(features, torch.arange(4), shapes, longest)
        told.append(train.span_logits(make_model(args).eval(), batch, args))
    torch.testing.assert_close(*told, atol=1e-6, rtol=0)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    assert torch.isinf(told[0][~real]).all() and torch.isfinite(told[0][real]).all()


def test_attention_drops_as_the_models_config_says(train):
    """packed_attention's dropout is used in training, scales what is left, and not in evaluation."""
    lengths = [64, 64, 64, 64]
    args, features, shapes, longest = pack(train, lengths)
    batch = train.make_batch(features, torch.arange(4), shapes, longest)
    how = {name: batch["inputs"][name] for name in ("strata", "index", "slots")}
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, shapes["tokens"], 16)
    ones = torch.ones(1, 2, shapes["tokens"], 16)
    whole, _ = train.packed_attention(None, query, key, ones, None, **how)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    dropped, _ = train.packed_attention(None, query, key, ones, None, **how, dropout=0.5)
    assert dropped.std() > 0.05 and dropped.mean() == pytest.approx(1, abs=0.1)
    model = make_model(args, dropout=0.5)
    for mode, same in ((model.train, False), (model.eval, True)):
        mode()
        one, two = (train.span_logits(model, batch, args) for _ in range(2))
        assert torch.equal(one, two) == same


@pytest.mark.parametrize("kind", ["bert", "electra", "distilbert"])
def test_attentions_own_dropout_reaches_it(train, kind):
    """With no other dropout, two passes differ in training alone: the model hands its rate on."""
    args, features, shapes, longest = pack(train, [64, 64])
    batch = train.make_batch(features, torch.arange(2), shapes, longest)
    model = make_model(args, kind, dropout=0.5, hidden=0.0)
    for mode, same in ((model.train, False), (model.eval, True)):
        mode()
        one, two = (train.span_logits(model, batch, args) for _ in range(2))
        assert torch.equal(one, two) == same


def test_the_dropout_before_distilberts_head_is_its_own(train):
    args, features, *_ = pack(train, [64, 64])
    args.batching, chosen = "padded", torch.arange(2)
    inputs = (batch := train.make_batch(features, chosen, {}, 64))["inputs"]
    model = make_model(args, "distilbert").train()
    model.dropout.p = 0.5
    torch.manual_seed(3)
    ours = train.span_logits(model, batch, args)
    torch.manual_seed(3)
    theirs = model(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(ours, torch.stack((theirs.start_logits, theirs.end_logits), -1))
    assert not torch.equal(ours, train.span_logits(model, batch, args))


# The plan of an epoch
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 203])
def test_an_epoch_is_the_data_once(train, batching, count):
    args = parse(train, "--batch-size", 8, batching=batching)
    lengths, plans = drawn_lengths(count), []
    for epoch in range(3):
        plan = train.plan_epoch(lengths, args, epoch)
        assert plan.shape == (-(-count // 8), 8)
        assert sorted(plan[plan >= 0].tolist()) == list(range(count))
        assert (plan[:-1] >= 0).all(), "only the last batch has free places"
        np.testing.assert_array_equal(plan, train.plan_epoch(lengths, args, epoch))
        plans.append(plan)
    if count > 8:
        assert not np.array_equal(plans[0], plans[1]) and not np.array_equal(plans[1], plans[2])
        batches = [{frozenset(row) for row in plan.tolist()} for plan in plans]
        assert batches[0] != batches[1], "other batches, not only another order"
        args.seed += 1
        assert not np.array_equal(plans[0], train.plan_epoch(lengths, args, 0))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_sharing_out_loses_nobody_and_is_even(train, parts):
    args = parse(train, "--batch-size", 32)
    lengths = drawn_lengths(333)
    plan = train.plan_epoch(lengths, args, 0)
    shares = train.share_out(plan, lengths, parts)
    assert shares.shape == (len(plan), parts, -(-32 // parts))
    for batch, share in zip(plan, shares):
        assert sorted(share[share >= 0].tolist()) == sorted(batch[batch >= 0].tolist())
    sizes = np.where(shares < 0, 0, lengths[shares])
    assert (np.diff(sizes, axis=2) >= 0).all(), "rows by length, as strata need them"
    tokens = sizes[:-1].sum(axis=2)
    # A part has 32 / parts rows: the fewer, the less can be evened out.
    assert (tokens.max(axis=1) / tokens.mean(axis=1) < (1.06 if parts < 8 else 1.2)).all()


def padding_share(plan):
    return 1 - plan["tokens"].sum() / plan["computed"].sum()


def test_packed_batches_hold_hardly_any_padding(train):
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(160), 0.4, 20_000), 30, 384)
    shares = {}
    for batching in BATCHINGS:
        args = parse(train, "--batch-size", 32, "--epochs", 2, batching=batching)
        args.max_length = 384
        plan = train.plan_training(lengths.astype(int), args)
        shares[batching] = padding_share(plan)
        assert (plan["tokens"] <= plan["computed"]).all()
    assert shares["packed"] < 0.04
    assert shares["packed"] < shares["dynamic"] < shares["padded"]
    assert shares["bucketed"] < shares["dynamic"]


@pytest.mark.parametrize("rows, accumulate", [(32, 1), (64, 2), (64, 1)])
def test_padding_on_real_text(train, squad, minilm, rows, accumulate):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    data = train.read_squad(squad / "train.json", None)
    features = train.build_features(data, tokenizer, 384, 128, "a file")
    args = parse(train, "--batch-size", rows, "--accumulate", accumulate, "--epochs", 3)
    args.max_length = 384
    plan = train.plan_training(np.diff(features["begin"]), args)
    assert padding_share(plan) < 0.04, "the last batches, which are not full, too"


# The step
class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        bools = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        waits = (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "masked_select",
            "equal",
            "_unique2",
        )
        if name in waits or bools:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def go(
    train, monkeypatch, output, *words, batching="packed", lengths=None, device="cpu", model=None
):
    """Runs train.train on drawn features; returns its state, model and log."""
    args = parse(train, "--batch-size", 16, "--epochs", 50, "--no-profile", *words)
    args.batching, args.device_type = batching, device
    features = make_features(drawn_lengths(100) if lengths is None else lengths)
    features["table"] = {name: column.to(device) for name, column in features["table"].items()}
    model = (model or make_model(args)).to(device)
    optimizer, _ = train.make_optimizer(model, args)
    plan, lines = train.plan_training(features["lengths"], args), []
    state = {"step": 0, "intervals": [], "operators": "", "resumed_from_steps": []}
    state |= {"beside": {"checkpoint": 0.0, "profile": 0.0, "log": 0.0}}
    monkeypatch.setattr(train, "log", lines.append)
    if args.compile:
        train.compile_layers(model)
    output.mkdir(exist_ok=True)
    training, clock = train.SpanModel(model, args), train.Clock(torch.device(device))
    where = (args, torch.device(device), output, training, clock)
    train.train(*where, optimizer, features, plan, state, lambda: None)
    return state, model, lines


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_step_waits_for_nothing(train, monkeypatch, tmp_path, batching):
    """No value is read on the host but where the log reads a whole interval at once."""
    reads = collections.Counter()
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__"):
        usual = getattr(torch.Tensor, name)

        def counted(self, *args, usual=usual, name=name, **kwargs):
            reads[name] += 1
            return usual(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    with Waits() as waits:
        words = ("--max-steps", 12, "--log-every", 3, "--accumulate", 2)
        state, _, _ = go(train, monkeypatch, tmp_path, *words, batching=batching)
    assert not waits.seen
    assert [interval["step"] for interval in state["intervals"]] == [3, 6, 9, 12]
    assert reads == {"tolist": 4}
    with Waits() as waits:  # and it would be noticed
        (torch.ones(3).sum() > 2).item()
        torch.ones(3)[torch.ones(3) > 0]
    assert waits.seen["_local_scalar_dense"] == 1 and waits.seen["index"] == 1


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


@pytest.mark.parametrize("batching", [*BATCHINGS, ON_GPU])
def test_a_step_stays_on_the_device(train, batching):
    """On torch's meta device, which has shapes and no values, a tensor that is made elsewhere or a
    value that is read raises: as near to a GPU as a machine without one comes."""
    args = parse(train, "--batch-size", 16, "--epochs", 1, "--accumulate", 2, "--no-fused")
    args.batching = "packed" if batching == ON_GPU else batching
    args.device_type = "cuda" if batching == ON_GPU else "cpu"
    features = make_features(drawn_lengths(40))
    plan = train.plan_training(features["lengths"], args)
    features["table"] = {name: column.to("meta") for name, column in features["table"].items()}
    args.device_type, model = "cpu", make_model(args).to("meta")
    training, (optimizer, _) = (
        train.SpanModel(model, args).train(),
        train.make_optimizer(model, args),
    )
    for step, shares in enumerate(torch.tensor(plan["shares"]).to("meta")):
        for micro in range(args.accumulate):
            longest = int(plan["longest"][step, micro])
            batch = train.make_batch(features, shares[micro], plan["shapes"], longest)
            assert {tensor.device.type for tensor in tensors(batch)} == {"meta"}
            training(batch, int(plan["features"][step])).backward()
        torch.nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [(), ("--precision", "bf16", "--compile")])
def test_more_steps_wait_no_more_on_a_gpu(train, monkeypatch, tmp_path, more):
    """Twice the steps, the same number of intervals: the same number of synchronisations."""
    counts = []
    for steps in (8, 16, 32):  # four intervals each; the first warms up
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                words = ("--max-steps", steps, "--log-every", 8, *more)
                go(train, monkeypatch, tmp_path, *words, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(one.message) for one in told))
    assert counts[1] == counts[2]


def test_gradients_are_freed_and_memory_is_steady(train, monkeypatch, tmp_path):
    """Live tensors at each line of the log: as many, and as large, from the warm-up to the end."""
    held = []

    def count(device):
        gc.collect()
        tensors = [
            one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)
        ]
        held.append((len(tensors), sum(one.numel() for one in tensors)))
        assert all(one.grad is None for one in tensors if one.is_leaf), "set to None, not to zero"
        return 1.0

    monkeypatch.setattr(train, "peak_memory", count)
    for batching in ("padded", "packed"):
        held.clear()
        go(train, monkeypatch, tmp_path, "--max-steps", 40, "--log-every", 10, batching=batching)
        assert len(held) == 4
        counts, sizes = zip(*held[1:])
        assert len(set(counts)) == 1
        assert max(sizes) < 1.05 * min(sizes)


def test_one_seed_is_one_training(train, monkeypatch, tmp_path):
    def losses(seed):
        args = parse(train)
        model = make_model(args, dropout=0.1)
        words = ("--max-steps", 6, "--log-every", 1, "--seed", seed)
        state, _, _ = go(train, monkeypatch, tmp_path, *words, model=model)
        return [interval["loss"] for interval in state["intervals"]]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


# Compiling
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.parametrize("batching, shapes", [("packed", 1), ("padded", 1), ("bucketed", 3)])
def test_compiling_makes_one_graph_a_shape(train, monkeypatch, tmp_path, batching, shapes):
    """Each layer's graph is made once for each shape, and never again; bucketed batches are as
    long as a multiple of 64: 64, 128 and 192 here."""
    graphs, usual, compiled = [], torch.nn.Module.compile, set()
    monkeypatch.setenv("CXX", sys.executable)  # the backend here is no compiler and needs none
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(train.sysconfig, "get_path", lambda name: str(tmp_path))

    def backend(graph, inputs):
        graphs.append(graph)
        compiled.add(len(train.log.__self__))  # a line a step
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: usual(self, backend=backend, **how)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        words = ("--max-steps", 14, "--log-every", 1, "--max-length", 192)
        lengths = np.append(np.linspace(10, 120, 96), [180] * 16).astype(int)  # one long batch in 7
        how = {"batching": batching, "lengths": lengths}
        state, _, _ = go(train, monkeypatch, tmp_path, *words, "--compile", **how)
        breaks = torch._dynamo.utils.counters["graph_break"]
    finally:
        torch._dynamo.reset()
    assert not breaks
    assert len(graphs) in (shapes, 2 * shapes), "the two layers share theirs, or do not"
    unsteady = [i for i, each in enumerate(state["intervals"]) if not each["steady"]]
    assert unsteady == sorted({0, 1, 2} | compiled), "the warm-up, and what compiles later"
    assert batching != "bucketed" or max(compiled) > 2, "let one compile late: another --seed"
    plain, _, _ = go(train, monkeypatch, tmp_path, *words, **how)
    for one, two in zip(state["intervals"], plain["intervals"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.mark.parametrize("name, device", [("CXX", "cpu"), ("CC", "cuda")])
def test_without_a_compiler_it_says_so_and_goes_on(train, monkeypatch, name, device):
    """A CPU's code is C++; on a GPU, C code starts the kernels."""
    lines = []
    monkeypatch.setattr(train, "log", lines.append)
    monkeypatch.setenv(name, "no-compiler-of-this-name")
    model = make_model(parse(train))
    monkeypatch.setattr(type(model), "device", torch.device(device))
    assert not train.compile_layers(model)
    assert len(lines) == 1 and "no-compiler-of-this-name" in lines[0]
    assert all(layer._compiled_call_impl is None for layer in model.bert.encoder.layer)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_compiled_training_has_the_same_losses(train, monkeypatch, tmp_path, batching):
    """With the real compiler, its cache empty: one graph a layer, none after the first step."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    words = ("--max-steps", 12, "--log-every", 1)
    plain, _, _ = go(train, monkeypatch, tmp_path, *words, batching=batching)
    state, _, _ = go(train, monkeypatch, tmp_path, *words, "--compile", batching=batching)
    counters = torch._dynamo.utils.counters
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    seconds = [interval["seconds"] for interval in state["intervals"]]
    assert max(seconds[1:]) < max(seconds[0], 0.5)
    for one, two in zip(state["intervals"], plain["intervals"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
    torch._dynamo.reset()


def test_an_output_on_a_file_system_without_locks(train, monkeypatch, tmp_path):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(train.fcntl, "flock", no_locks)
    train.open_output(tmp_path / "output").close()
    assert (tmp_path / "output/.lock").exists()


# Optimiser and schedule
@pytest.mark.parametrize("steps, warmup", [(1, 0.1), (2, 0.5), (10, 0), (100, 0.1), (99, 0.999)])
def test_the_schedule_is_a_line_up_and_a_line_down(train, steps, warmup):
    args = parse(train, "--learning-rate", 0.2, "--warmup", warmup)
    rates = [train.learning_rate_at(step, steps, args) for step in range(steps)]
    up = max(int(np.ceil(warmup * steps)), 1)
    assert rates[up - 1] == pytest.approx(0.2) and max(rates) == pytest.approx(0.2)
    np.testing.assert_allclose(rates[:up], 0.2 * np.arange(1, up + 1) / up)
    down = steps - up
    np.testing.assert_allclose(rates[up:], 0.2 * np.arange(down, 0, -1) / max(down, 1))
    assert min(rates) > 0, "every step learns"
    backwards = [train.learning_rate_at(step, steps, args) for step in reversed(range(steps))]
    assert backwards[::-1] == rates, "it depends on the step alone"


def test_training_follows_the_schedule(train, monkeypatch, tmp_path):
    rates, usual = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append({group["lr"] for group in self.param_groups})
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    words = ("--max-steps", 10, "--learning-rate", 0.01, "--warmup", 0.3, "--log-every", 1)
    state, _, _ = go(train, monkeypatch, tmp_path, *words)
    args = parse(train, "--learning-rate", 0.01, "--warmup", 0.3)
    wanted = [train.learning_rate_at(step, 10, args) for step in range(10)]
    assert rates == [{rate} for rate in wanted]
    assert [interval["learning_rate"] for interval in state["intervals"]] == wanted


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_only_matrices_decay(train, fused):
    args = parse(train, "--weight-decay", 0.5, fused)
    model = make_model(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, names = train.make_optimizer(model, args)
    assert sorted(names) == sorted(before)
    inside = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is dict(model.named_parameters())[n] for n, p in zip(names, inside, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        still = "bias" in name or "LayerNorm" in name
        wanted = before[name] * (1 if still else 1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), wanted, msg=name)


def test_gradients_are_clipped_at_one(train, monkeypatch, tmp_path):
    """The norm in the log is the one before; what the optimiser sees is at most 1."""
    norms, usual = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        every = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack(every).norm().item())
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    state, _, _ = go(train, monkeypatch, tmp_path, "--max-steps", 8, "--log-every", 1)
    told = [interval["gradient_norm"] for interval in state["intervals"]]
    assert max(told) > 1
    assert norms == [pytest.approx(min(norm, 1), rel=1e-4) for norm in told]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_strata_have_each_row_once(train, device):
    """Whatever the batch: their edges are rounded, and none may be empty or lost."""
    for size in range(1, 140):
        args = parse(train, "--batch-size", size, "--epochs", 1)
        args.device_type = device
        strata = train.plan_training(drawn_lengths(size), args)["shapes"]["strata"]
        rows = [row for low, high, _ in strata for row in range(low, high)]
        assert rows == list(range(size)) and all(high > low for low, high, _ in strata)
        assert len(strata) == (size if device == "cpu" else min(max(size // 8, 1), 8))


# Preparing
def test_a_tokenizer_without_a_pad_token_will_do(train, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "CACHE", tmp_path)
    tokenizer = train.sample_tokenizer()
    tokenizer.pad_token = None
    features = train.prepare_features(str(train.SAMPLE), "train", tokenizer, parse(train))
    features["table"] = {n: torch.tensor(features[n]) for n in ("begin", "lengths", "tokens")}
    features["table"] |= {n: torch.tensor(features[n]) for n in ("first", "start", "end")}
    batch = train.make_batch(features, torch.arange(2), {}, LONGEST)
    assert (batch["inputs"]["input_ids"][~batch["real"]] == 0).all()


def repeated(train, times):
    """The sample again and again, each repeat with its own prefix in context and question."""
    data = train.read_squad(train.SAMPLE, None)
    contexts, count = data["contexts"], len(data["ids"])
    more = {name: [] for name in data}
    for again in range(times):
        prefix = f"{again} again: "
        more["contexts"] += [prefix + context for context in contexts]
        more["questions"] += [prefix + question for question in data["questions"]]
        more["ids"] += [f"{again}-{name}" for name in data["ids"]]
        more["paragraph"] += [again * len(contexts) + p for p in data["paragraph"]]
        for answers in data["answers"]:
            more["answers"].append([[start + len(prefix), text] for start, text in answers])
    assert len(more["ids"]) == times * count
    return more


def seconds_of(work, times=3):
    """The processor's seconds, the best of several: other work on the machine touches them least."""
    best = float("inf")
    for _ in range(times):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best


def test_preparing_grows_in_a_line_and_is_lean(train):
    tokenizer = train.sample_tokenizer()
    small, large = repeated(train, 2), repeated(train, 8)
    times = [
        seconds_of(lambda data=data: train.build_features(data, tokenizer, 384, 128, "a file"))
        for data in (small, large)
    ]
    assert times[1] < 4 * times[0] * 1.6
    tracemalloc.start()
    try:
        train.build_features(large, tokenizer, 384, 128, "a file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / len(large["ids"]) < 1.5e9 / 87_600, "bytes a question"


def test_preparing_is_faster_than_the_usual_way(train):
    """Than the tokenizer's call alone, without the labels, on five questions a paragraph."""
    tokenizer, data = train.sample_tokenizer(), repeated(train, 3)
    contexts = [data["contexts"][paragraph] for paragraph in data["paragraph"]]
    how = {"truncation": "only_second", "max_length": 384, "stride": 128}
    how |= {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    usual = seconds_of(lambda: tokenizer(data["questions"], contexts, **how))
    ours = seconds_of(lambda: train.build_features(data, tokenizer, 384, 128, "a file"))
    assert usual / ours > 2


BIG = """
import json, sys, time
import importlib.util, resource
resource.setrlimit(resource.RLIMIT_DATA, (1500 << 20, -1))  # all of it, torch too
spec = importlib.util.spec_from_file_location("train", sys.argv[1])
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
args = train.parse_arguments(["--train-file", sys.argv[3]])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
told = []
for _ in range(2):
    before, begin = peak(), time.perf_counter()
    features = train.prepare_features(args.train_file, "train", tokenizer, args)
    told.append([time.perf_counter() - begin, peak() - before, features["cached"]])
print(json.dumps([len(features["texts"]["ids"]), told]))
"""


@pytest.mark.slow
def test_preparing_all_of_squad(train, squad, minilm, tmp_path):
    """As many questions as SQuAD has: in 20 s and 1.5 GB on two cores; from the cache in 1 s."""
    document, more = json.loads((squad / "train.json").read_text()), []
    count = sum(len(p["qas"]) for a in document["data"] for p in a["paragraphs"])
    for again in range(-(-87_600 // count)):
        prefix = f"{again} again: "
        for article in copy.deepcopy(document["data"]):
            for paragraph in article["paragraphs"]:
                paragraph["context"] = prefix + paragraph["context"]
                for entry in paragraph["qas"]:
                    entry["id"] += f"-{again}"
                    entry["question"] = prefix + entry["question"]
                    for answer in entry["answers"]:
                        answer["answer_start"] += len(prefix)
            more.append(article)
    (tmp_path / "big.json").write_text(json.dumps({"data": more}))
    command = [sys.executable, "-c", BIG, TRAIN, minilm, tmp_path / "big.json"]
    environment = os.environ | {"SQUAD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        list(map(str, command)),
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    questions, (built, read) = json.loads(done.stdout.splitlines()[-1])
    assert questions >= 87_600 and not built[2] and read[2]
    crowd = max(os.getloadavg()[0] / os.cpu_count(), 1)  # others at work here
    assert built[0] < 20 * crowd
    assert built[1] < 1.5e9
    assert read[0] < 1 * crowd


# The features' cache
@pytest.fixture
def prepare(train, own_cache, monkeypatch, tmp_path):
    """Prepares a copy of the sample; returns the features, whether they were cached, and the log."""
    file, tokenizer, lines = tmp_path / "data.json", train.sample_tokenizer(), []
    shutil.copy(train.SAMPLE, file)
    monkeypatch.setattr(train, "log", lines.append)

    def prepare(*words, tokenizer=tokenizer):
        lines.clear()
        words = ("--limit", 30, *words)
        features = train.prepare_features(file, "train", tokenizer, parse(train, *words))
        cached = features.pop("cached")
        features.pop("key")
        return features, cached, list(lines)

    prepare.file, prepare.cache = file, own_cache
    return prepare


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], np.ndarray):
            np.testing.assert_array_equal(one[name], other[name], name)
        else:
            assert json.dumps(one[name]) == json.dumps(other[name])


def test_the_cache_gives_back_what_was_built(prepare):
    built, cached, lines = prepare()
    assert not cached and len(lines) == 1 and "not there yet" in lines[0]
    again, cached, lines = prepare()
    assert cached and not lines
    assert_same(built, again)
    left = sorted(path.suffix for path in prepare.cache.iterdir())
    assert left == [".lock", ".safetensors"], "nothing half written stays"


def test_a_damaged_cache_is_noticed_and_built_again(prepare):
    """Cut short anywhere, empty, or with one byte flipped anywhere: header, sums or values."""
    built, _, _ = prepare()
    (file,) = prepare.cache.glob("*.safetensors")
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = np.random.default_rng(0)
    flips = [0, 3, 8, header - 1, header, len(whole) - 1, whole.index(b"sums")]
    flips += [*draw.integers(8, header, 8), *draw.integers(header, len(whole), 12)]
    broken = [whole[:cut] for cut in (0, 4, header - 1, header, header + 9, len(whole) - 1)]
    for place in map(int, flips):
        broken.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    broken.append(whole + b"\0")
    for content in broken:
        assert content != whole
        file.write_bytes(content)
        again, cached, lines = prepare()
        assert not cached and len(lines) == 1 and "damaged" in lines[0]
        assert_same(built, again)
        assert prepare()[1], "and kept again"


def test_a_stale_cache_is_not_used(train, prepare):
    prepare()
    for words in (["--max-length", 72], ["--stride", 9], ["--limit", 31]):
        assert not prepare(*words)[1], words
        assert prepare(*words)[1], words
    words = list(train.sample_tokenizer().get_vocab().items())
    words = [word for word, _ in sorted(words, key=lambda pair: pair[1])]
    words[20:22] = words[21], words[20]
    vocabulary = {word: i for i, word in enumerate(words)}
    other = transformers.BertTokenizerFast(vocab=vocabulary)
    assert not prepare(tokenizer=other)[1]
    assert prepare()[1]
    text = prepare.file.read_text()
    prepare.file.write_text(text + " ")
    assert not prepare()[1], "another file by the same name"
    assert prepare("--batch-size", 3, "--seed", 7)[1], "what features do not depend on"


def test_a_tokenizers_first_call_does_not_change_the_key(train, prepare):
    """Some tokenizer.json carry padding and truncation, which the first call takes out."""
    tokenizer = train.sample_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(128)
    tokenizer.backend_tokenizer.enable_padding(length=128)
    built, cached, _ = prepare(tokenizer=tokenizer)
    assert not cached
    again, cached, _ = prepare(tokenizer=tokenizer)
    assert cached
    assert_same(built, again)


def test_a_cache_that_cannot_be_written_costs_a_line(train, prepare, monkeypatch, tmp_path):
    built, _, _ = prepare()
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "CACHE", tmp_path / "file/cache")  # below a file: nobody can
    again, cached, lines = prepare()
    assert not cached and len(lines) == 2 and "not kept" in lines[1] and "\n" not in lines[1]
    assert_same(built, again)


def test_a_read_only_cache_is_read(train, prepare, monkeypatch):
    """No lock can be had there; what is whole is taken all the same."""
    built, _, _ = prepare()
    usual = open

    def read_only(path, mode="r", *args, **kwargs):
        if set(mode) & set("wa+x") and str(prepare.cache) in str(path):
            raise PermissionError(13, "Read-only file system", str(path))
        return usual(path, mode, *args, **kwargs)

    monkeypatch.setattr(train, "open", read_only, raising=False)
    again, cached, lines = prepare()
    assert cached and not lines
    assert_same(built, again)
    other, cached, lines = prepare("--limit", 12)
    assert not cached and "not kept" in lines[-1] and len(other["texts"]["ids"]) == 12


def test_of_two_that_race_one_builds(train, prepare, monkeypatch):
    """The other waits for it: threads here, each with its own open lock, as processes have."""
    usual, calls, told = train.build_features, [], []

    def slow(*args):
        calls.append(threading.get_ident())
        time.sleep(0.5)
        return usual(*args)

    monkeypatch.setattr(train, "build_features", slow)
    threads = [threading.Thread(target=lambda: told.append(prepare())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert sorted(cached for _, cached, _ in told) == [False, True, True]
    assert_same(told[0][0], told[1][0])


def test_of_two_processes_that_race_one_builds(tmp_path):
    """Two whole starts at once, with the same empty cache."""
    words = ["--sample", "--limit", "40", "--device", "cpu", "--prepare"]
    environment = os.environ | {"SQUAD_CACHE": str(tmp_path / "cache")}
    how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lives = [subprocess.Popen([sys.executable, str(TRAIN), *words], **how) for _ in range(2)]
    logs = [life.communicate(timeout=120)[0] for life in lives]
    assert [life.returncode for life in lives] == [0, 0], logs
    assert sum(log.count("building it, once") for log in logs) == 1, logs
    assert all("ready" in log for log in logs)

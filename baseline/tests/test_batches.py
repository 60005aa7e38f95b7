"""The plan of a training: which features share a batch, how it is dealt into micro-batches, how
much of it is padding; and what is cut out of the features for a batch."""

import numpy as np
import pytest
import torch
import transformers
from small import (
    BATCHINGS,
    LONGEST,
    add_table,
    awkward_examples,
    draw_lengths,
    make_model,
    make_tokenizer,
    parse,
)
from usual import usual_features

# An epoch's batches


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 203])
def test_an_epoch_has_each_feature_once(train, batching, count):
    args = parse(train, "--batch-size", 8, batching=batching)
    lengths = draw_lengths(count)
    for epoch in range(3):
        batches = train.plan_epoch(lengths, args, epoch)
        assert batches.shape == (-(-count // 8), 8)
        assert sorted(batches[batches >= 0].tolist()) == list(range(count))
        assert (batches[:-1] >= 0).all(), "only the last batch may be smaller"


@pytest.mark.parametrize("batching", BATCHINGS)
def test_epochs_and_seeds_have_other_batches(train, batching):
    """And not the same ones in another order; the same epoch of the same seed is the same."""
    args = parse(train, "--batch-size", 8, batching=batching)
    other_seed = parse(train, "--batch-size", 8, "--seed", 43, batching=batching)
    lengths = draw_lengths(203)
    plans = [train.plan_epoch(lengths, args, epoch) for epoch in range(3)]
    plans.append(train.plan_epoch(lengths, other_seed, 0))
    batches = [{frozenset(batch) for batch in plan.tolist()} for plan in plans]
    for one in range(4):
        for other in range(one):
            assert len(batches[one] & batches[other]) < len(batches[one]) / 4
    for epoch in range(3):
        np.testing.assert_array_equal(train.plan_epoch(lengths, args, epoch), plans[epoch])


def lengths_of_batches(train, batching):
    """Returns the lengths in an epoch's full batches [batches, 32]."""
    lengths = draw_lengths(1000)
    args = parse(train, "--batch-size", 32, batching=batching)
    batches = train.plan_epoch(lengths, args, 0)
    return lengths[batches[:-1]]


def test_a_bucketed_batch_has_features_of_like_length(train):
    spread_at_random = np.ptp(lengths_of_batches(train, "padded"), axis=1)
    spread = np.ptp(lengths_of_batches(train, "bucketed"), axis=1)
    assert spread.mean() < spread_at_random.mean() / 8


def test_packed_batches_have_nearly_the_same_tokens(train):
    tokens_at_random = lengths_of_batches(train, "padded").sum(axis=1)
    tokens = lengths_of_batches(train, "packed").sum(axis=1)
    assert tokens.std() < tokens_at_random.std() / 8
    assert tokens.max() < 1.03 * tokens.mean()


# Micro-batches


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_dealing_loses_no_feature_and_is_even(train, parts):
    lengths = draw_lengths(333)
    batches = train.plan_epoch(lengths, parse(train, "--batch-size", 32), 0)
    dealt = train.deal_batches(batches, lengths, parts)
    assert dealt.shape == (len(batches), parts, -(-32 // parts))
    for batch, micro_batches in zip(batches, dealt):
        in_them = micro_batches[micro_batches >= 0]
        assert sorted(in_them.tolist()) == sorted(batch[batch >= 0].tolist())
    tokens = np.where(dealt < 0, 0, lengths[dealt])[:-1].sum(axis=2)
    # The fewer rows a micro-batch has, the less can be evened out.
    most = 1.06 if parts < 8 else 1.2
    assert (tokens.max(axis=1) < most * tokens.mean(axis=1)).all()


# The plan of a training


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_plan_counts_what_it_holds(train, batching, accumulate):
    words = ["--batch-size", 16, "--accumulate", accumulate, "--epochs", 2]
    args = parse(train, *words, batching=batching)
    lengths = draw_lengths(77)
    plan = train.plan_training(lengths, args)
    assert plan["steps_per_epoch"] == 5
    assert len(plan["features"]) == 10
    assert plan["count"].tolist() == [16, 16, 16, 16, 13] * 2
    assert plan["tokens"].sum() == 2 * lengths.sum()
    assert plan["squares"].sum() == 2 * (lengths**2).sum()
    assert (plan["tokens"] <= plan["computed"]).all()
    for step, micro_batches in enumerate(plan["features"]):
        for micro, rows in enumerate(micro_batches):
            assert plan["width"][step, micro] >= lengths[rows[rows >= 0]].max(initial=0)
    assert plan["width"].max() <= args.max_length


@pytest.mark.parametrize("batching", BATCHINGS)
def test_max_steps_are_the_first_of_the_whole_plan(train, batching):
    """A short trial has the very batches of the long training's beginning."""
    lengths = draw_lengths(77)
    whole = train.plan_training(lengths, parse(train, "--epochs", 3, batching=batching))
    words = ["--epochs", 3, "--max-steps", 7]
    first = train.plan_training(lengths, parse(train, *words, batching=batching))
    assert len(first["features"]) == 7
    np.testing.assert_array_equal(first["features"], whole["features"][:7])
    np.testing.assert_array_equal(first["tokens"], whole["tokens"][:7])


def test_only_the_epochs_that_are_trained_are_planned(train):
    """A user bounds a run by its steps and gives epochs without end."""
    lengths = np.arange(20, 60)
    endless = parse(train, "--epochs", 10**9, "--max-steps", 7, "--batch-size", 16)
    plan = train.plan_training(lengths, endless)
    assert plan["features"].shape[0] == 7


def test_widths(train):
    """padded: --max-length; else the longest, rounded up: to 8, or compiled, to few widths."""
    lengths = np.random.default_rng(0).integers(10, 201, 300)
    plans = {}
    for batching in BATCHINGS[:3]:
        for word in ("--compile", "--no-compile"):
            args = parse(train, "--max-length", 200, word, batching=batching)
            plans[batching, word] = train.plan_training(lengths, args)["width"]
    assert np.unique(plans["padded", "--compile"]).tolist() == [200]
    assert np.unique(plans["padded", "--no-compile"]).tolist() == [200]
    assert set(np.unique(plans["bucketed", "--compile"])) == {64, 128, 192, 200}
    for batching in ("dynamic", "bucketed"):
        widths = plans[batching, "--no-compile"]
        assert ((widths % 8 == 0) | (widths == 200)).all()


def padding_share(plan):
    return 1 - plan["tokens"].sum() / plan["computed"].sum()


def test_packed_batches_hold_hardly_any_padding(train):
    lengths = np.random.default_rng(0).lognormal(np.log(160), 0.4, 20_000)
    lengths = np.clip(lengths.astype(int), 30, 384)
    shares = {}
    for batching in BATCHINGS:
        words = ["--batch-size", 32, "--epochs", 2, "--max-length", 384]
        args = parse(train, *words, batching=batching)
        shares[batching] = padding_share(train.plan_training(lengths, args))
    assert shares["packed"] < 0.04
    assert shares["bucketed"] < shares["dynamic"] < shares["padded"]


@pytest.mark.parametrize("batch_size, accumulate", [(32, 1), (64, 2), (64, 1)])
def test_packed_real_text_holds_hardly_any_padding(train, squad, minilm, batch_size, accumulate):
    """The last batches, which are smaller, are counted too."""
    words = ["--batch-size", batch_size, "--accumulate", accumulate, "--epochs", 3]
    args = parse(train, *words, "--max-length", 384, "--stride", 128)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    examples = train.read_squad(squad / "train.json")
    features = train.build_features(examples, tokenizer, args, "a file")
    plan = train.plan_training(np.diff(features["begin"]), args)
    assert padding_share(plan) < 0.04


# A batch


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_batch_holds_the_usual_inputs(train, batching, family):
    """Tokens, types, mask, positions and labels are what the tokenizer's padding would make."""
    tokenizer = make_tokenizer(family)
    examples = awkward_examples()
    args = parse(train, "--max-length", 48, "--stride", 12, batching=batching)
    windows = usual_features(tokenizer, examples, 48, 12)
    features = train.build_features(examples, tokenizer, args, "a file")
    features["lengths"] = np.diff(features["begin"])
    model = make_model(args, family, words=len(tokenizer))
    add_table(train, features, model)

    width = 56
    chosen = [3, 0, len(windows) - 1, -1, 7, 40]
    lengths = [len(windows[i]["input_ids"]) if i >= 0 else 1 for i in chosen]
    table = features["table"]
    if batching == "packed":
        # Nine tokens of the row are unused.
        row_tokens = sum(lengths) + 9
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths), row_tokens], dtype=torch.int32)
        batch = train.make_batch(table, torch.tensor(chosen), width, row_tokens, cu_seqlens)
        places = batch["places"]
    else:
        batch = train.make_batch(table, torch.tensor(chosen), width)
        places = torch.arange(6 * width).view(6, width)

    inputs = batch["inputs"]
    padding_token = tokenizer.pad_token_id
    # RoBERTa's positions begin after the padding token's number.
    first_position = 0 if family == "bert" else padding_token + 1
    assert ("token_type_ids" in inputs) == (family == "bert")
    for row, i in enumerate(chosen):
        own_places = places[row][batch["real"][row]]
        assert len(own_places) == lengths[row]
        positions = inputs["position_ids"].expand_as(inputs["input_ids"]).flatten()[own_places]
        assert positions.tolist() == list(range(first_position, first_position + lengths[row]))
        if i < 0:
            assert batch["labels"][row].tolist() == [0, 0]
            continue
        assert inputs["input_ids"].flatten()[own_places].tolist() == windows[i]["input_ids"]
        assert tuple(batch["labels"][row].tolist()) == windows[i]["labels"]
        if family == "bert":
            types = inputs["token_type_ids"].flatten()[own_places]
            assert types.tolist() == windows[i]["token_types"]

    if batching == "padded":
        mask = inputs["attention_mask"].view(6, width)
        assert mask.sum(dim=1).tolist() == lengths
        assert (inputs["input_ids"][~mask] == padding_token).all()
    else:
        unused = torch.ones(row_tokens, dtype=torch.bool)
        unused[places[batch["real"]]] = False
        assert unused.sum() == 9
        assert (inputs["input_ids"][0, unused] == padding_token).all()


def test_a_tokenizer_without_a_padding_token_will_do(train):
    tokenizer = make_tokenizer("bert")
    tokenizer.pad_token = None
    args = parse(train, batching="padded")
    examples = awkward_examples(count=9)
    features = train.build_features(examples, tokenizer, args, "a file")
    features["lengths"] = np.diff(features["begin"])
    model = make_model(args, words=len(tokenizer))
    table = train.feature_table(features, tokenizer, model, torch.device("cpu"))
    batch = train.make_batch(table, torch.arange(9), LONGEST)
    assert (batch["inputs"]["input_ids"][~batch["real"]] == 0).all()
    assert batch["real"].sum(dim=1).tolist() == features["lengths"][:9].tolist()

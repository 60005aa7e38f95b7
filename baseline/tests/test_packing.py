"""However a batch is padded or packed, in whichever family of models, it has the same loss and the
same gradients as its sequences have one by one, in transformers' own attention."""

import copy

import numpy as np
import pytest
import torch
import transformers
from small import (
    BATCHINGS,
    FAMILIES,
    LONGEST,
    PACKED_ON_GPU,
    ROBERTA_FAMILIES,
    WORDS,
    add_table,
    draw_lengths,
    make_batch,
    make_features,
    make_model,
    parse,
)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
PACKED = ["packed", PACKED_ON_GPU]


# The same batch, the same loss and gradients


def planned_gradients(train, monkeypatch, features, batches, batching, accumulate, family):
    """Returns (loss, {parameter: gradient}) of each batch, planned and cut as training does it."""
    words = ["--accumulate", accumulate, "--batch-size", batches.shape[1], "--epochs", 1]
    args = parse(train, *words, batching=batching)
    with monkeypatch.context() as patch:
        patch.setattr(train, "plan_epoch", lambda lengths, args, epoch: batches)
        plan = train.plan_training(features["lengths"], args)
    train.plan_to_device(plan, torch.device("cpu"))
    model = make_model(args, family)
    add_table(train, features, model)
    training = train.SpanModel(model, args).train()
    results = []
    for step in range(len(batches)):
        model.zero_grad()
        total = 0.0
        for micro in range(accumulate):
            batch = train.planned_batch(features["table"], plan, step, micro)
            loss = training(batch) / plan["device_count"][step]
            loss.backward()
            total += loss.item()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((total, gradients))
    return results


def plain_gradients(train, features, batch, family):
    """The same, of one sequence after the other in the model's own call: no padding, no batch."""
    model = make_model(parse(train, batching="padded"), family).train()
    losses = []
    for i in batch[batch >= 0]:
        tokens = slice(features["begin"][i], features["begin"][i + 1])
        inputs = {"input_ids": torch.tensor(features["input_ids"][None, tokens])}
        if family not in [*ROBERTA_FAMILIES, "distilbert"]:
            inputs["token_type_ids"] = torch.tensor(features["token_types"][None, tokens]).long()
        output = model(**inputs)
        for name, logits in (("start", output.start_logits), ("end", output.end_logits)):
            label = torch.tensor([features[name][i]]).long()
            losses.append(torch.nn.functional.cross_entropy(logits, label))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(results, wanted):
    for (loss, gradients), (wanted_loss, wanted_gradients) in zip(results, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted_gradients[name], atol=1e-5, rtol=0)


# Name: lengths of the features, batches of their numbers; -1 is none.
CASES = {
    "ragged": (draw_lengths(48), np.arange(48)[::-1].reshape(2, 24)),
    "one long among short": ([LONGEST, *[4] * 15], np.arange(16).reshape(2, 8)),
    "alike": ([20] * 16, np.arange(16).reshape(1, 16)),
    "all as long as can be": ([LONGEST] * 6, np.arange(6).reshape(1, 6)),
    "a single one": ([9], np.zeros((1, 1), int)),
    "rows without a feature": (draw_lengths(20), np.append(np.arange(20), [-1] * 4).reshape(2, 12)),
    "nearly no feature": ([5, 33, 4], np.array([[0, 1], [2, -1]])),
    "the same one twice": (draw_lengths(4), np.array([[0, 0, 1, 2, 2, 2, 3, 3]])),
}
COMBINATIONS = [(case, "bert") for case in CASES]
COMBINATIONS += [("rows without a feature", family) for family in FAMILIES[1:]]


@pytest.mark.parametrize("case, family", COMBINATIONS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_batching_gives_the_same_loss_and_gradients(
    train, monkeypatch, case, family, accumulate
):
    lengths, batches = CASES[case]
    accumulate = min(accumulate, batches.shape[1])
    features = make_features(lengths)
    wanted = [plain_gradients(train, features, batch, family) for batch in batches]
    for batching in [*BATCHINGS, PACKED_ON_GPU]:
        results = planned_gradients(
            train, monkeypatch, features, batches, batching, accumulate, family
        )
        assert_same_gradients(results, wanted)


@pytest.mark.parametrize("batching", PACKED)
def test_real_questions_have_the_padded_gradients(train, squad, minilm, batching):
    """A real encoder on one batch of real questions."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    examples = train.read_squad(squad / "dev.json", 12)
    results = []
    for way in (batching, "padded"):
        args = parse(train, "--max-length", 384, "--stride", 128, "--dropout", 0, batching=way)
        args.sample = False
        args.model = str(minilm)
        _, config = train.load_tokenizer(args)
        model = train.load_model(args, config).train()
        features = train.build_features(examples, tokenizer, args, "a file")
        features["lengths"] = np.diff(features["begin"])
        everyone = np.arange(len(features["lengths"]))
        batch = make_batch(train, args, model, features, everyone)
        loss = train.SpanModel(model, args)(batch) / len(everyone)
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    assert_same_gradients(results[:1], results[1:])


# Within a packed row


@pytest.mark.parametrize("batching", PACKED)
def test_a_packed_sequence_never_sees_its_neighbour(train, batching):
    """Changing one sequence's tokens leaves the logits of all others as they were, bit for bit."""
    lengths = [5, 9, 17, 30, 31, 64]
    args = parse(train, batching=batching)
    model = make_model(args).eval()
    features = make_features(lengths)
    everyone = np.arange(6)
    before = train.span_logits(model, make_batch(train, args, model, features, everyone), args)
    for changed in range(6):
        other = copy.deepcopy(features)
        tokens = slice(features["begin"][changed], features["begin"][changed + 1])
        other["input_ids"][tokens] = WORDS - features["input_ids"][tokens]
        after = train.span_logits(model, make_batch(train, args, model, other, everyone), args)
        for row, length in enumerate(lengths):
            same = torch.equal(before[row, :length], after[row, :length])
            assert same == (row != changed), (changed, row)


@pytest.mark.parametrize("batching", PACKED)
def test_a_packed_sequence_depends_on_its_own_tokens_alone(train, batching):
    """The gradient of its logits is zero at every other place, and nowhere in its own."""
    lengths = [5, 9, 17, 30]
    args = parse(train, batching=batching)
    model = make_model(args).eval()
    embedded = []
    model.base_model.embeddings.register_forward_hook(lambda *call: embedded.append(call[-1]))
    batch = make_batch(train, args, model, make_features(lengths), np.arange(4), unused=10)
    logits = train.span_logits(model, batch, args)
    for row, length in enumerate(lengths):
        own_logits = logits[row, :length].sum()
        (gradient,) = torch.autograd.grad(own_logits, embedded, retain_graph=True)
        places = gradient[0].abs().sum(dim=1).nonzero().flatten()
        assert places.tolist() == batch["places"][row, :length].tolist()


@pytest.mark.parametrize("batching", PACKED)
def test_the_unused_end_of_the_row_changes_nothing(train, batching):
    lengths = [5, 9, 17, 30]
    args = parse(train, batching=batching)
    model = make_model(args).eval()
    features = make_features(lengths)
    logits = []
    for unused in (0, 1, 64, 100):
        batch = make_batch(train, args, model, features, np.arange(4), unused)
        logits.append(train.span_logits(model, batch, args))
        torch.testing.assert_close(logits[-1], logits[0], atol=1e-6, rtol=0)
    real = torch.arange(30) < torch.tensor(lengths)[:, None]
    assert torch.isinf(logits[0][~real]).all()
    assert torch.isfinite(logits[0][real]).all()


# The attention


def random_attention_inputs(lengths, seed=0):
    """Returns query, key and value [1, heads, tokens, size], and cu_seqlens and max_seqlen.

    In memory a token's heads lie side by side, as models have them."""
    torch.manual_seed(seed)
    shape = (1, sum(lengths), 2, 16)
    tensors = [torch.randn(shape).transpose(1, 2).requires_grad_() for _ in range(3)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return tensors, {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}


@pytest.mark.parametrize("lengths", [[1], [7], [64, 1, 1, 30], [3, 5, 8] * 6])
def test_both_attentions_equal_the_masked_one(train, lengths):
    """Outputs and gradients; the masked one computes every pair of tokens in the row."""
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    same_sequence = sequence[:, None] == sequence[None, :]

    def masked(module, query, key, value, mask, **_):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=same_sequence
        )
        return output.transpose(1, 2), None

    results = []
    for attention in (masked, train.packed_loop, train.packed_jagged):
        tensors, where = random_attention_inputs(lengths)
        output, weights = attention(None, *tensors, None, **where)
        assert weights is None
        assert output.shape == (1, sum(lengths), 2, 16)
        weighted = output * torch.linspace(0, 1, output.numel()).view(output.shape)
        weighted.sum().backward()
        results.append([output, *(tensor.grad for tensor in tensors)])
    for result in results[1:]:
        for ours, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


@pytest.fixture
def replace_attention(train):
    """Registers another attention by packed_loop's name, until the test ends."""
    yield lambda attention: transformers.AttentionInterface.register("packed_loop", attention)
    transformers.AttentionInterface.register("packed_loop", train.packed_loop)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_told_the_configs_rate(train, replace_attention, family):
    """In training; in evaluation it is told 0."""
    rates = []

    def attention(*tensors, dropout, **more):
        rates.append(dropout)
        return train.packed_loop(*tensors, **more)

    replace_attention(attention)
    args = parse(train)
    model = make_model(args, family, attention_dropout=0.3, hidden_dropout=0.2)
    batch = make_batch(train, args, model, make_features([64, 64]), np.arange(2))
    train.span_logits(model.train(), batch, args)
    train.span_logits(model.eval(), batch, args)
    assert rates == [0.3, 0.3, 0, 0], "of two layers each"


@pytest.mark.parametrize("name", ["packed_loop", "packed_jagged"])
def test_attention_dropout_keeps_the_mean(train, name):
    """Some weights are dropped and the others scaled up; without dropout all are there."""
    (query, key, _), where = random_attention_inputs([64] * 4)
    ones = torch.ones_like(query)
    attention = getattr(train, name)
    kept, _ = attention(None, query, key, ones, None, **where)
    torch.testing.assert_close(kept, torch.ones_like(kept))
    dropped, _ = attention(None, query, key, ones, None, **where, dropout=0.5)
    assert dropped.std() > 0.05
    assert dropped.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("batching", PACKED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)], ids=["attention's", "the others'"])
def test_dropout_is_as_the_config_says(train, batching, family, rates):
    """Attention's and the others' are used in training each, and neither in evaluation."""
    args = parse(train, batching=batching)
    model = make_model(args, family, attention_dropout=rates[0], hidden_dropout=rates[1])
    batch = make_batch(train, args, model, make_features([64, 64]), np.arange(2))
    for mode, same in ((model.train, False), (model.eval, True)):
        mode()
        first = train.span_logits(model, batch, args)
        second = train.span_logits(model, batch, args)
        assert torch.equal(first, second) == same


def test_the_dropout_before_distilberts_head_is_its_own(train):
    args = parse(train, batching="padded")
    model = make_model(args, "distilbert").train()
    model.dropout.p = 0.5
    batch = make_batch(train, args, model, make_features([64, 64]), np.arange(2))
    torch.manual_seed(3)
    ours = train.span_logits(model, batch, args)
    torch.manual_seed(3)
    output = model(batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"])
    assert torch.equal(ours, torch.stack((output.start_logits, output.end_logits), dim=-1))
    assert not torch.equal(ours, train.span_logits(model, batch, args))


# The rows


def random_sizes(draw):
    """Returns tokens of features [steps, micro-batches, features], some of them 0: no feature."""
    shape = draw.integers(1, [6, 4, 40])
    longest = draw.choice([2, 5, 64, 384])
    sizes = draw.integers(1, longest + 1, shape)
    if draw.random() < 0.3:
        sizes[:] = longest
    if draw.random() < 0.5:
        sizes[draw.random(shape) < 0.2] = 0
    return sizes


def test_rows_are_cut_into_all_of_their_sequences(train):
    """Each feature has its tokens, rows have one length, and no sequence is empty or too long."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        sizes = random_sizes(draw)
        cu_seqlens = train.pack_rows(sizes)
        lengths = np.diff(cu_seqlens, axis=2)
        features = sizes.shape[2]
        assert cu_seqlens.dtype == np.int32, "as flash attention takes them"
        assert (cu_seqlens[:, :, 0] == 0).all()
        assert (lengths[:, :, :features] == np.maximum(sizes, 1)).all()
        assert lengths.min() >= 1
        assert lengths.max() <= max(sizes.max(), 2)
        row_tokens = cu_seqlens[0, 0, -1]
        assert (cu_seqlens[:, :, -1] == row_tokens).all()
        assert row_tokens % 8 == 0
        fullest = np.maximum(sizes, 1).sum(axis=2).max()
        pieces = lengths.shape[2] - features
        assert row_tokens - fullest < 8 + pieces, "no more than it takes"


# Checking a model on this machine


def check(train, args, family, lengths=(5, 9, 17, 30, 31, 64, 12, 8, 40)):
    """Runs check_packed_attention for a model of this family."""
    features = make_features(lengths)
    model = make_model(args, family)
    add_table(train, features, model)
    train.check_packed_attention(args, model, features)
    return model


@pytest.mark.parametrize("batching", PACKED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_is_silent_where_packing_is_right(train, capsys, batching, precision, family):
    """bf16's rounding is no fault."""
    args = parse(train, "--precision", precision, batching=batching)
    model = check(train, args, family)
    assert model.config._attn_implementation == args.attention
    assert capsys.readouterr().out == ""


def ignore_borders(train):
    """An attention in which every sequence sees the whole row."""

    def attention(module, query, key, value, mask, cu_seqlens, **more):
        whole = torch.tensor([0, query.shape[2]])
        return train.packed_loop(module, query, key, value, mask, whole, **more)

    return attention


def shift_borders(train):
    """An attention with every border one token late."""

    def attention(module, query, key, value, mask, cu_seqlens, **more):
        late = cu_seqlens.clone()
        late[1:-1] += 1
        return train.packed_loop(module, query, key, value, mask, late, **more)

    return attention


def lose_a_number(train):
    """An attention with a NaN in it."""

    def attention(*tensors, **more):
        output, _ = train.packed_loop(*tensors, **more)
        output[0, 0, 0, 0] = torch.nan
        return output, None

    return attention


def forget_heads(train):
    """An attention that hands back one head for all."""

    def attention(*tensors, **more):
        output, _ = train.packed_loop(*tensors, **more)
        return output[:, :, :1].expand_as(output), None

    return attention


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", [ignore_borders, shift_borders, lose_a_number, forget_heads])
def test_the_check_raises_where_packing_is_wrong(train, replace_attention, family, fault):
    replace_attention(fault(train))
    with pytest.raises(train.Problem, match="give bucketed") as caught:
        check(train, parse(train), family)
    assert "\n" not in str(caught.value)


# Models of other kinds: their attention is their own
OTHERS = {
    "mpnet": {},
    "rembert": {},
    "deberta": {},
    "deberta-v2": {"position_biased_input": False, "relative_attention": True},
    "gpt2": {},
}


def make_other_model(kind, attention):
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": 2}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": 1}
    config = transformers.CONFIG_MAPPING[kind](**sizes, **OTHERS[kind])
    torch.manual_seed(0)
    family = transformers.AutoModelForQuestionAnswering
    return family.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_cannot_be_packed_is_refused_in_one_line(train, kind):
    args = parse(train)
    model = make_other_model(kind, attention=None)
    with pytest.raises(train.Problem) as caught:
        train.check_model(model, args)
    assert kind in str(caught.value)
    assert "give" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_is_refused_or_padding_changes_nothing(train, kind):
    """Some attentions take no mask such as ours, and would take padding for words in silence."""
    args = parse(train, batching="padded")
    model = make_other_model(kind, attention=None)
    try:
        train.check_model(model, args)
    except train.Problem as problem:
        assert "\n" not in str(problem)
        return
    features = make_features([5, 20, 60])
    logits = train.span_logits(model, make_batch(train, args, model, features, np.arange(3)), args)
    for row, length in enumerate(features["lengths"]):
        alone = make_batch(train, args, model, features, np.array([row]))
        wanted = train.span_logits(model, alone, args)[0, :length]
        torch.testing.assert_close(logits[row, :length], wanted, atol=1e-4, rtol=0)

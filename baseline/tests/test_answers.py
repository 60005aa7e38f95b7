"""Answers equal those of the usual n-best decoding where no two logits tie, and scores equal those
of the official scorer, and of evaluate's metric where that is cached."""

import inspect
import json
import random

import numpy as np
import pytest
import torch
from small import add_table, awkward_examples, make_config, make_tokenizer, parse
from usual import (
    f1_score,
    normalize_answer,
    official_scores,
    usual_answers,
    usual_candidates,
    usual_features,
)

FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert"]
SIZES = [(384, 128), (40, 10), (24, 4)]


def build(train, examples, tokenizer, max_length, stride):
    """Returns the features as load_features does."""
    args = parse(train, "--max-length", max_length, "--stride", stride)
    features = train.build_features(examples, tokenizer, args, "a file")
    features["lengths"] = np.diff(features["begin"])
    return features


# Answers


def draw_logits(kind, windows, seed):
    """Returns one array [tokens, 2] per window."""
    draw = np.random.default_rng(seed)
    logits = []
    for window in windows:
        tokens = len(window["input_ids"])
        first, end = window["context"]
        scores = draw.normal(size=(tokens, 2)).astype(np.float32)
        if kind == "question":
            # The 20 best lie outside the context as far as they can.
            scores[:first] += 50
            scores[end:] += 50
        elif kind == "backwards":
            # Starts are late and ends early: few pairs are possible, or none.
            scores[:, 0] += np.linspace(0, 30, tokens)
            scores[:, 1] -= np.linspace(0, 30, tokens)
        elif kind == "one pair":
            scores[first:end, 0] -= 40
            scores[:, 1] -= np.linspace(0, 30, tokens)
        elif kind == "ties":
            scores = np.round(scores)
        elif kind == "all equal":
            scores[:] = 1.5
        logits.append(scores)
    return logits


def find_answers(train, monkeypatch, tmp_path, features, logits):
    """Runs find_answers, with several windows to a batch, on a model that gives these logits."""

    def evaluation_logits(args, model, features, windows):
        longest = max(len(logits[window]) for window in windows)
        padded = np.full((len(windows), longest, 2), -np.inf, np.float32)
        for row, window in enumerate(windows):
            padded[row, : len(logits[window])] = logits[window]
        return padded

    monkeypatch.setattr(train, "evaluation_logits", evaluation_logits)
    monkeypatch.setattr(train, "EVALUATION_BATCH_TOKENS", 500)
    model = torch.nn.Identity()
    return train.find_answers(parse(train), tmp_path, model, features)


@pytest.mark.parametrize("kind", ["plain", "question", "backwards", "one pair"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length, stride", SIZES)
def test_answers_are_the_usual_ones(train, monkeypatch, tmp_path, kind, family, max_length, stride):
    tokenizer = make_tokenizer(family)
    examples = awkward_examples()
    windows = usual_features(tokenizer, examples, max_length, stride)
    features = build(train, examples, tokenizer, max_length, stride)
    logits = draw_logits(kind, windows, max_length)
    usual = usual_answers(examples, windows, logits)
    best = find_answers(train, monkeypatch, tmp_path, features, logits)
    assert train.answer_texts(best, features, examples) == usual
    if kind == "backwards" and max_length == 384:
        assert "empty" in usual.values(), "where no pair is possible"


@pytest.mark.parametrize("kind", ["ties", "all equal"])
@pytest.mark.parametrize("max_length, stride", SIZES)
def test_where_logits_tie_the_answer_is_one_of_the_best(
    train, monkeypatch, tmp_path, kind, max_length, stride
):
    tokenizer = make_tokenizer("bert")
    examples = awkward_examples()
    windows = usual_features(tokenizer, examples, max_length, stride)
    features = build(train, examples, tokenizer, max_length, stride)
    logits = draw_logits(kind, windows, max_length)
    best = find_answers(train, monkeypatch, tmp_path, features, logits)
    answers = train.answer_texts(best, features, examples)
    for sample, example in enumerate(examples):
        scores = best[features["example"] == sample, 0]
        candidates = usual_candidates(windows, logits, sample)
        if not candidates:
            continue
        assert scores.max() == candidates[0][0]
        texts = {example["context"][start:end] for _, (start, end) in candidates}
        assert answers[example["id"]] in texts | {"empty"}


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_models_answers_are_the_usual_ones(train, tmp_path, squad, minilm, batching):
    """A real encoder, its head's weights made large enough that answers differ, against one window
    after the other through transformers' own model."""
    examples = train.read_squad(squad / "dev.json", 24)
    words = ["--max-length", 192, "--stride", 64, "--device", "cpu", "--batching", batching]
    words += ["--model", minilm]
    args = train.parse_arguments([str(word) for word in words])
    tokenizer, config = train.load_tokenizer(args)
    model = train.load_model(args, config)
    with torch.no_grad():
        model.qa_outputs.weight *= 30
    features = build(train, examples, tokenizer, 192, 64)
    add_table(train, features, model)
    best = train.find_answers(args, tmp_path, model, features)
    answers = train.answer_texts(best, features, examples)

    model.set_attn_implementation("sdpa")
    windows = usual_features(tokenizer, examples, 192, 64)
    logits = []
    with torch.inference_mode():
        for window in windows:
            output = model(
                input_ids=torch.tensor([window["input_ids"]]),
                token_type_ids=torch.tensor([window["token_types"]]),
            )
            pair = torch.stack((output.start_logits[0], output.end_logits[0]), dim=1)
            logits.append(pair.numpy())
    usual = usual_answers(examples, windows, logits)
    assert len(set(usual.values())) > 10
    assert answers == usual


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_windows_as_long_as_the_model_takes(train, tmp_path, family):
    """--max-length may be the model's own limit: evaluation needs no position beyond it."""
    tokenizer = make_tokenizer(family)
    examples = awkward_examples()
    answers = []
    for batching in ("packed", "padded"):
        args = parse(train, "--max-length", 40, "--stride", 10, batching=batching)
        config = make_config(family, longest=40, words=len(tokenizer))
        model = train.load_model(args, config)
        features = build(train, examples, tokenizer, 40, 10)
        assert features["lengths"].max() == 40
        add_table(train, features, model)
        best = train.find_answers(args, tmp_path, model, features)
        answers.append(train.answer_texts(best, features, examples))
    assert answers[0] == answers[1]
    assert len(set(answers[0].values())) > 3
    args = parse(train, "--max-length", 41, "--stride", 10)
    with pytest.raises(train.Problem, match="40 positions: give --max-length 40 --stride 10"):
        train.load_model(args, config)


def test_the_best_windows_answer_is_a_questions(train):
    """And the usual decoding's word "empty" is the answer where one alone was possible, of no
    letter, or none at all."""
    context = "The tower of Hercules"
    examples = []
    for name in ("second window", "tie", "none", "one of no letter", "several"):
        examples.append({"id": name, "context": context})
    none = [-np.inf, -np.inf, -np.inf, -np.inf]
    windows = [
        # example, (score, first character, end, how many were possible)
        (0, [1.0, 0, 3, 5]),
        (0, [2.0, 4, 9, 5]),
        (0, [1.5, 10, 12, 5]),
        (1, [3.0, 4, 9, 5]),
        (1, [3.0, 0, 3, 5]),
        (2, none),
        (3, [1.0, 3, 3, 1]),
        (3, none),
        (4, [1.0, 3, 3, 2]),
    ]
    features = {"example": np.array([example for example, _ in windows])}
    best = np.array([answer for _, answer in windows])
    assert train.answer_texts(best, features, examples) == {
        "second window": "tower",
        "tie": "tower",
        "none": "empty",
        "one of no letter": "empty",
        "several": "",
    }


def test_being_asked_to_stop_ends_an_evaluation(train, monkeypatch, tmp_path):
    tokenizer = make_tokenizer("bert")
    examples = awkward_examples()
    features = build(train, examples, tokenizer, 384, 128)
    logits = draw_logits("plain", usual_features(tokenizer, examples, 384, 128), 0)
    monkeypatch.setattr(train, "STOP_SIGNALS", [])
    (tmp_path / "stop").touch()
    assert find_answers(train, monkeypatch, tmp_path, features, logits) is None


# Scores

WORDS = ["a", "an", "the", "The", "AN", ".", ",", "!?", "-", "'", "U.S.", "U.S.A", "don't", "«o»"]
WORDS += ["Galicia", "galicia,", "İ", "ß", "Straße", "1,000", "1000", "\u00a0"]


def draw_answers(count=400):
    """Returns predictions {id: text} and gold {id: [texts]}, full of articles and punctuation."""
    draw = random.Random(3)

    def draw_text():
        return draw.choice(["", " "]).join(draw.choices(WORDS, k=draw.randint(1, 5)))

    gold = {}
    predictions = {}
    for number in range(count):
        name = f"q{number}"
        gold[name] = [draw_text() for _ in range(draw.randint(1, 4))]
        predictions[name] = draw.choice([*gold[name], draw_text(), "", "the"])
    # Nothing is left of these.
    predictions |= {"q0": "the", "q1": "a.", "q2": ""}
    gold |= {"q0": ["An", "a"], "q1": ["THE!"], "q2": ["the", "Galicia"]}
    return predictions, gold


def as_examples(gold):
    examples = []
    for name, texts in gold.items():
        answers = {"text": texts, "answer_start": [0] * len(texts)}
        examples.append({"id": name, "answers": answers})
    return examples


def test_scores_are_the_official_ones(train):
    predictions, gold = draw_answers()
    scores = train.own_scores(predictions, as_examples(gold))
    assert scores == pytest.approx(official_scores(predictions, gold), abs=1e-9)
    assert 20 < scores["exact_match"] < 90
    assert 20 < scores["f1"] < 90
    for name, texts in gold.items():
        # Each alone, so that nothing evens out.
        one = {name: predictions[name]}
        scores = train.own_scores(one, as_examples({name: texts}))
        official = official_scores(one, {name: texts})
        assert scores == pytest.approx(official, abs=1e-9), (one, texts)


METRIC = """
import collections, re, string
import datasets
import evaluate

class Squad(evaluate.Metric):
    def _info(self):
        answers = datasets.Sequence(
            {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
        )
        prediction = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        reference = {"id": datasets.Value("string"), "answers": answers}
        features = datasets.Features({"predictions": prediction, "references": reference})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        predictions = {one["id"]: one["prediction_text"] for one in predictions}
        gold = {one["id"]: list(one["answers"]["text"]) for one in references}
        return official_scores(predictions, gold)

"""
OFFICIAL = "\n".join(map(inspect.getsource, (normalize_answer, f1_score, official_scores)))


def lay_metric(home, content):
    """Puts a metric where evaluate keeps one that it has fetched: modules/.../HASH/squad.py.

    Returns the environment in which it is found."""
    folder = home / "modules/evaluate_modules/metrics/evaluate-metric--squad" / ("5" * 64)
    folder.mkdir(parents=True)
    for package in (folder, *folder.parents[:3]):
        (package / "__init__.py").touch()
    (folder / "squad.py").write_text(content)
    return {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}


@pytest.mark.parametrize("whole", [True, False])
def test_scores_come_from_evaluate_where_it_is_cached(train, start, tmp_path, whole):
    """A broken one costs a line and no more."""
    content = METRIC + OFFICIAL if whole else "import nothing_of_this_name\n"
    environment = lay_metric(tmp_path / "home", content)
    output = tmp_path / "run"
    words = ["--sample", "--limit", 20, "--epochs", 0, "--device", "cpu", "--output", output]
    log = start(*words, **environment).end()
    results = json.loads((output / "results.json").read_text())
    predictions = json.loads((output / "predictions.json").read_text())
    assert ("metric does not load" in log) == (not whole)
    assert "cached version" not in log, "no noise of the libraries"
    assert results["scorer"] == ("evaluate" if whole else "own")
    examples = train.read_squad(train.SAMPLE / "questions.json", 20)
    gold = {example["id"]: example["answers"]["text"] for example in examples}
    assert list(predictions) == list(gold)
    scores = {name: results[name] for name in ("exact_match", "f1")}
    assert scores == pytest.approx(official_scores(predictions, gold), abs=1e-6)


def test_evaluate_is_asked_for_hard_answers_too(train, start, tmp_path):
    """Its figures, not ours: of this metric they are all the same 12.5 and 25."""
    fixed = METRIC + "def official_scores(predictions, gold):\n"
    fixed += "    assert len(predictions) == len(gold) == 400\n"
    fixed += "    return {'exact_match': 12.5, 'f1': 25}\n"
    environment = lay_metric(tmp_path / "home", fixed)
    predictions, gold = draw_answers()
    (tmp_path / "answers.json").write_text(json.dumps([predictions, as_examples(gold)]))
    patch = f"""
predictions, examples = json.loads(Path({str(tmp_path / "answers.json")!r}).read_text())
print(json.dumps(score(predictions, examples)))
sys.exit(0)
"""
    log = start(patch=patch, **environment).end()
    scores = json.loads(log.splitlines()[-1])
    assert scores == {"exact_match": 12.5, "f1": 25.0, "scorer": "evaluate"}

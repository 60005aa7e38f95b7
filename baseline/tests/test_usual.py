"""Features, answers and scores equal the usual ones. The usual ways stand here plainly: the call of
the tokenizer and the labels of transformers' course, the n-best decoding of its examples'
utils_qa.py, and the official scorer of SQuAD v1.1. And the hub: its caches are laid out here."""

import collections
import json
import os
import pathlib
import random
import re
import string
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers

TRAIN = pathlib.Path(__file__).resolve().parents[1] / "train.py"


# The usual ways
def usual_features(tokenizer, data, max_length, stride):
    """One dict a window, as the course has it, but not padded."""
    encoding = tokenizer(
        [question.lstrip() for question in data["questions"]],
        [data["contexts"][paragraph] for paragraph in data["paragraph"]],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for i, question in enumerate(encoding["overflow_to_sample_mapping"]):
        sequence_ids, offsets = encoding.sequence_ids(i), encoding["offset_mapping"][i]
        context_start = sequence_ids.index(1)
        context_end = len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
        start_char, text = data["answers"][question][0]
        end_char = start_char + len(text)
        if offsets[context_start][0] > start_char or offsets[context_end][1] < end_char:
            start = end = 0
        else:
            start = context_start
            while start <= context_end and offsets[start][0] <= start_char:
                start += 1
            end = context_end
            while end >= context_start and offsets[end][1] >= end_char:
                end -= 1
            start, end = start - 1, end + 1
        windows.append(
            {
                "question": question,
                "input_ids": encoding["input_ids"][i],
                "token_type_ids": encoding["token_type_ids"][i],
                "context": (context_start, context_end + 1),
                "offsets": [o if s == 1 else None for o, s in zip(offsets, sequence_ids)],
                "labels": (start, end),
            }
        )
    return windows


def usual_answers(data, windows, logits):
    """postprocess_qa_predictions of utils_qa.py; logits: one [tokens, 2] a window."""
    answers = {}
    for i, name in enumerate(data["ids"]):
        context = data["contexts"][data["paragraph"][i]]
        candidates = []
        for window, scores in zip(windows, logits):
            if window["question"] != i:
                continue
            start_logits, end_logits = np.ascontiguousarray(scores.T)
            offset_mapping = window["offsets"]
            start_indexes = np.argsort(start_logits)[-1:-21:-1].tolist()
            end_indexes = np.argsort(end_logits)[-1:-21:-1].tolist()
            for start in start_indexes:
                for end in end_indexes:
                    if offset_mapping[start] is None or offset_mapping[end] is None:
                        continue
                    if end < start or end - start + 1 > 30:
                        continue
                    span = (offset_mapping[start][0], offset_mapping[end][1])
                    candidates.append((start_logits[start] + end_logits[end], span))
        candidates = sorted(candidates, key=lambda candidate: candidate[0], reverse=True)[:20]
        texts = [context[start:end] for _, (start, end) in candidates]
        if len(texts) == 0 or (len(texts) == 1 and texts[0] == ""):
            texts.insert(0, "empty")
        answers[name] = texts[0]
    return answers


def normalize_answer(s):
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())


def f1_score(prediction, ground_truth):
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision, recall = num_same / len(prediction_tokens), num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_scores(predictions, gold):
    exact = f1 = 0
    for name, truths in gold.items():
        said = predictions[name]
        exact += max(normalize_answer(said) == normalize_answer(truth) for truth in truths)
        f1 += max(f1_score(said, truth) for truth in truths)
    return {"exact_match": 100 * exact / len(gold), "f1": 100 * f1 / len(gold)}


# Text
AWKWARD = [
    # ordinary, and long enough for several windows
    "The tower of Hercules is a Roman lighthouse near A Coruña; it has stood since the year 100. "
    * 6,
    # letters that lower-casing and stripping accents make longer or shorter
    "Élan, naïve, Ångström, İstanbul, STRASSE, Straße, ǅ, e\u0301te\u0301, o\u0308, Ⅻ and ½ again.",
    "The ﬁrst ﬂuﬀy oﬃce: ﬃ, ﬄ, ﬅ; \u2126 ohm, \u212b, \u00b5m, x\u00b2, \uff21\uff22\uff23.",
    "東京は日本の首都です。北京は中国的首都。한국어 각각 텍스트도 있다, 한글.",
    "القاهرة هِيَ عَاصِمَة مِصر، וְעִבְרִית עִם נִקּוּד, हिन्दी में क्षेत्र, ภาษาไทย.",
    # no-break and zero-width spaces, control characters, a combining mark alone, emoji
    "\u00a0 tabs\tand\u200bzero\u200dwidth \ufeffmarks\u0000\ufffd \u0301 lonely, 👩\u200d🔬 work 🇪🇸.  ",
    "!!! ... --- (a) [the] {an} «quoted» “so” don't U.S.A. 1,234.5 % $7 €8 a/b c_d #tag @x",
    "one",
    # a word too long for WordPiece: [UNK] over all of it
    "before " + "x" * 120 + " after " + "donaudampfschiffahrt" * 3 + " end",
]
QUESTIONS = ["What is it?", "   Which?", "Ⅻ ﬁve é?", "\tWhy\u00a0so", ""]


def awkward_data(seed=0, texts=AWKWARD, count=120):
    """Questions whose answers lie anywhere: at the edges, across words, in the middle of a token."""
    draw = random.Random(seed)
    data = {"contexts": texts, "ids": [], "questions": [], "paragraph": [], "answers": []}
    for i in range(count):
        paragraph = i % len(texts)
        context = texts[paragraph]
        if i // len(texts) == 0:  # the whole context
            start, end = 0, len(context)
        elif i // len(texts) == 1:  # its first, then its last character
            start, end = 0, 1
        elif i // len(texts) == 2:
            start, end = len(context) - 1, len(context)
        else:
            start = draw.randrange(len(context))
            end = draw.randint(start + 1, min(start + draw.choice([1, 3, 40]), len(context)))
        data["ids"].append(f"q{i}")
        data["questions"].append(draw.choice(QUESTIONS))
        data["paragraph"].append(paragraph)
        data["answers"].append([[start, context[start:end]]])
    return data


@pytest.fixture(scope="module")
def made():
    """A WordPiece tokenizer that knows every character of the awkward texts, and few words."""
    bare = transformers.BertTokenizerFast(vocab={"[UNK]": 0}).backend_tokenizer
    texts = [bare.normalizer.normalize_str(text) for text in AWKWARD + QUESTIONS]
    characters = sorted(set("".join(texts)) - {" "})
    words = ["the", "tower", "year", "##ing", "##gst", "##er", "year", "of", "is"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    vocabulary += [f"##{c}" for c in characters] + words
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    return transformers.BertTokenizerFast(vocab=vocabulary)


@pytest.fixture(scope="module", params=["made", "minilm"])
def tokenizer(request):
    if request.param == "made":
        return request.getfixturevalue("made")
    return transformers.AutoTokenizer.from_pretrained(request.getfixturevalue("minilm"))


def build(train, data, tokenizer, max_length, stride):
    """The features as prepare_features hands them on."""
    tokenizer.backend_tokenizer.no_truncation()  # the usual way's calls leave them on
    tokenizer.backend_tokenizer.no_padding()
    features = train.build_features(data, tokenizer, max_length, stride, "a file")
    features["texts"] = json.loads(features["texts"].tobytes())
    features["lengths"] = np.diff(features["begin"])
    names = ("tokens", "begin", "lengths", "first", "start", "end")
    features["table"] = {name: torch.tensor(features[name]) for name in names}
    return features | {"pad": tokenizer.pad_token_id}


def assert_same_features(train, data, tokenizer, max_length, stride):
    windows = usual_features(tokenizer, data, max_length, stride)
    ours = build(train, data, tokenizer, max_length, stride)
    assert len(ours["lengths"]) == len(windows)
    for w, usual in enumerate(windows):
        begin, end = ours["begin"][w : w + 2]
        assert ours["tokens"][begin:end].tolist() == usual["input_ids"]
        assert ours["question"][w] == usual["question"]
        first, count = int(ours["first"][w]), int(ours["context_tokens"][w])
        assert (first, first + count) == usual["context"]
        begin = ours["offsets_begin"][data["paragraph"][usual["question"]]]
        begin += ours["context_begin"][w]
        offsets = list(map(tuple, ours["offsets"][begin : begin + count].tolist()))
        assert offsets == usual["offsets"][first : first + count]
        assert (ours["start"][w], ours["end"][w]) == usual["labels"], data["ids"][usual["question"]]
    return windows, ours


# Features
@pytest.mark.parametrize("max_length, stride", [(384, 128), (64, 16), (32, 5), (24, 0), (40, 20)])
def test_awkward_text_gives_the_usual_features(train, tokenizer, max_length, stride):
    windows, _ = assert_same_features(train, awkward_data(), tokenizer, max_length, stride)
    if max_length < 100:
        labels = collections.defaultdict(list)
        for window in windows:
            labels[window["question"]].append(window["labels"])
        found = [sum(label != (0, 0) for label in several) for several in labels.values()]
        assert 0 in found and 1 in found, "answers in no window and in one are among them"
        assert stride < 16 or max(found) > 1, "and answers in two windows"


def test_answers_at_the_edges_of_every_window(train, made):
    """Each window's first and last tokens as answers, one more to each side, and both ends."""
    context = AWKWARD[0]
    data = {"contexts": [context], "ids": ["0"], "questions": ["What?"], "paragraph": [0]}
    windows = usual_features(made, data | {"answers": [[[0, context[:1]]]]}, 48, 12)
    spans = set()
    for window in windows:
        first, end = window["context"]
        edges = window["offsets"][first:end]
        for a, b in ((0, 0), (0, 2), (-1, -1), (-3, -1), (0, -1)):
            start, stop = edges[a][0], edges[b][1]
            for left, right in ((0, 0), (-1, 0), (0, 1), (-2, 2)):
                span = max(start + left, 0), min(stop + right, len(context))
                spans.add(span)
    answers = [[[start, context[start:stop]]] for start, stop in sorted(spans)]
    data = {
        "contexts": [context],
        "ids": [str(i) for i in range(len(answers))],
        "questions": ["What?"] * len(answers),
        "paragraph": [0] * len(answers),
        "answers": answers,
    }
    assert_same_features(train, data, made, 48, 12)


def test_tiny_windows(train, made):
    """--max-length 8, its least: a context token or four a window, and a stride of as many less 1."""
    data = awkward_data(count=2 * len(AWKWARD))
    data["questions"] = ["?"] * len(data["questions"])
    for max_length, stride in ((8, 0), (8, 3), (9, 4), (8, 1)):
        assert_same_features(train, data, made, max_length, stride)
    with pytest.raises(train.Problem, match=r"q0.*raise --max-length or lower --stride"):
        build(train, data, made, 8, 4)


def test_a_context_that_just_fits_is_one_window(train, made):
    data = awkward_data(count=9)
    for paragraph in range(len(AWKWARD)):
        one = {name: values[paragraph : paragraph + 1] for name, values in data.items()}
        one |= {"contexts": AWKWARD[paragraph : paragraph + 1], "paragraph": [0]}
        whole = len(usual_features(made, one, 2000, 0)[0]["input_ids"])
        for max_length in (whole - 1, whole, whole + 1):
            if max_length >= 12:
                assert_same_features(train, one, made, max_length, 0)


def test_random_text_gives_the_usual_features(train, made):
    """Characters of every awkward text, mixed."""
    draw, letters = random.Random(1), "".join(AWKWARD) + " " * 300
    for seed in range(6):
        texts = ["x" + "".join(draw.choices(letters, k=draw.randint(1, 300))) for _ in range(20)]
        data = awkward_data(seed, texts, 80)
        assert_same_features(train, data, made, draw.choice([24, 40, 64]), draw.choice([0, 3, 9]))


@pytest.mark.parametrize("max_length, stride", [(384, 128), (96, 32)])
def test_real_text_gives_the_usual_features(train, squad, minilm, max_length, stride):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    for name in ("train.json", "dev.json"):
        data = train.read_squad(squad / name, None)
        assert_same_features(train, data, tokenizer, max_length, stride)


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_batch_holds_the_usual_inputs(train, made, batching):
    """make_batch gives ids, types, masks, positions and labels as the tokenizer's padding does."""
    data = awkward_data()
    windows, features = assert_same_features(train, data, made, 48, 12)
    chosen = torch.tensor([3, 0, len(windows) - 1, -1, 7, 40])
    lengths = [len(windows[i]["input_ids"]) if i >= 0 else 1 for i in chosen.tolist()]
    shapes = {}
    if batching == "packed":
        shapes |= {"tokens": sum(lengths) + 9, "strata": [(0, 2, 50), (2, 6, 56)]}
    batch = train.make_batch(features, chosen, shapes, 56)
    inputs, where = batch["inputs"], batch["places"]
    where = torch.arange(6 * 56).view(6, 56) if where is None else where
    for row, i in enumerate(chosen.tolist()):
        places = where[row][batch["real"][row]]
        assert len(places) == lengths[row] and batch["weights"][row] == (i >= 0)
        if i < 0:
            assert batch["labels"][row].tolist() == [0, 0]
            continue
        for name in ("input_ids", "token_type_ids"):
            assert inputs[name].flatten()[places].tolist() == windows[i][name], name
        assert tuple(batch["labels"][row].tolist()) == windows[i]["labels"]
        if batching == "packed":
            assert inputs["position_ids"][0, places].tolist() == list(range(lengths[row]))
    real = sum(n for n, i in zip(lengths, chosen.tolist()) if i >= 0)
    if batching == "padded":
        mask = inputs["attention_mask"].view(6, 56)
        assert mask.sum(dim=1).tolist() == lengths
        assert (inputs["input_ids"][~mask] == made.pad_token_id).all()
    else:
        free = torch.ones(shapes["tokens"], dtype=torch.bool)
        free[where[batch["real"]]] = False
        assert free.sum() == shapes["tokens"] - sum(lengths) and real
        assert (inputs["input_ids"][0, free] == made.pad_token_id).all()


# Answers
def random_logits(kind, windows, generator):
    """One [tokens, 2] a window."""
    logits = []
    for window in windows:
        count, (first, end) = len(window["input_ids"]), window["context"]
        scores = generator.normal(size=(count, 2)).astype(np.float32)
        if kind == "ties":  # a handful of values; -0.0 and 0.0 are equal
            scores = np.round(scores).astype(np.float32)
        elif kind == "all equal":
            scores[:] = 1.5
        elif kind == "question":  # the 20 best lie outside the context as far as they can
            scores[:first] += 50
            scores[end:] += 50
        elif kind == "backwards":  # starts late, ends early: few pairs, or none
            scores[:, 0] += np.linspace(0, 30, count, dtype=np.float32)
            scores[:, 1] -= np.linspace(0, 30, count, dtype=np.float32)
        elif kind == "one pair":
            scores[first:end, 0] -= 40
            scores[:, 1] -= np.linspace(0, 30, count, dtype=np.float32)
        elif kind == "bf16":
            scores = torch.from_numpy(scores).bfloat16().float().numpy()
        logits.append(scores)
    return logits


def decode(train, features, logits):
    """best_spans in batches of several windows, as evaluation calls it, padded with -inf."""
    best = np.zeros((len(logits), 4))
    order = np.argsort(-features["lengths"], kind="stable")
    for windows in np.array_split(order, 7):
        if len(windows) == 0:
            continue
        longest = features["lengths"][windows].max() + 1
        padded = np.full((len(windows), longest, 2), -np.inf, np.float32)
        for row, w in enumerate(windows):
            padded[row, : len(logits[w])] = logits[w]
        best[windows] = train.best_spans(padded, windows, features)
    return train.answer_texts(best, features)


KINDS = ["plain", "ties", "all equal", "question", "backwards", "one pair", "bf16"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length, stride", [(384, 128), (40, 10), (20, 4), (8, 2)])
def test_random_logits_give_the_usual_answers(train, made, kind, max_length, stride):
    data = awkward_data()
    if max_length == 8:
        data["questions"] = ["?"] * len(data["questions"])
    windows = usual_features(made, data, max_length, stride)
    features = build(train, data, made, max_length, stride)
    logits = random_logits(kind, windows, np.random.default_rng(max_length))
    usual = usual_answers(data, windows, logits)
    assert decode(train, features, logits) == usual
    if kind == "question" and max_length == 8:
        assert "empty" not in usual.values()  # so few tokens that all are among the 20 best
    if kind == "backwards" and max_length == 384:
        assert "empty" in usual.values()


def test_real_logits_give_the_usual_answers(train, squad, minilm):
    """A real encoder under a head of random weights, large enough that answers differ: packed and
    padded evaluation against one window after the other through transformers' own model."""
    data = train.read_squad(squad / "dev.json", 24)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    windows = usual_features(tokenizer, data, 192, 64)
    features = build(train, data, tokenizer, 192, 64)
    told, logits = {}, []
    for batching in ("packed", "padded"):
        words = ["--model", str(minilm), "--device", "cpu", "--batching", batching]
        args = train.parse_arguments([*words, "--max-length", "192"])
        _, config = train.load_tokenizer(args)
        model = train.load_model(args, config)
        with torch.no_grad():
            model.qa_outputs.weight *= 30
        told[batching] = train.evaluate_model(args, torch.device("cpu"), model, features)
    with torch.inference_mode():
        for window in windows:
            inputs = {n: torch.tensor([window[n]]) for n in ("input_ids", "token_type_ids")}
            output = model(**inputs)
            logits.append(torch.stack((output.start_logits[0], output.end_logits[0]), 1).numpy())
    usual = usual_answers(data, windows, logits)
    assert len(set(usual.values())) > 10
    assert told["padded"] == usual
    assert told["packed"] == usual


def test_windows_as_long_as_the_model_takes(train, made):
    """--max-length may be the model's own limit: evaluation needs no place beyond it."""
    features = build(train, awkward_data(), made, 40, 10)
    assert features["lengths"].max() == 40
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.5}
    config, told = transformers.BertConfig(vocab_size=len(made), **sizes), []
    for batching in ("packed", "padded"):
        words = ["--sample", "--device", "cpu", "--batching", batching, "--max-length", "40"]
        args = train.parse_arguments([*words, "--stride", "10"])
        model = train.load_model(args, config)
        told.append(train.evaluate_model(args, torch.device("cpu"), model, features))
    assert told[0] == told[1] and len(set(told[0].values())) > 3
    _, config = train.load_tokenizer(train.parse_arguments(["--sample", "--max-length", "600"]))
    assert config.max_position_embeddings == 600, "the sample's own model has what it is asked for"


# Scores
WORDS = ["a", "an", "the", "The", "AN", ".", ",", "!?", "-", "'", "U.S.", "U.S.A", "don't", "«o»"]
WORDS += ["Galicia", "galicia,", "İ", "ß", "Straße", "1,000", "1000", "\u00a0"]


def drawn_answers(count=400):
    draw = random.Random(3)

    def answer():
        return draw.choice(["", " "]).join(draw.choices(WORDS, k=draw.randint(1, 5)))

    gold = {f"q{i}": [answer() for _ in range(draw.randint(1, 4))] for i in range(count)}
    told = {i: draw.choice([*texts, answer(), "", "the"]) for i, texts in gold.items()}
    told |= {"q0": "the", "q1": "a.", "q2": ""}
    gold |= {
        "q0": ["An", "a"],
        "q1": ["THE!"],
        "q2": ["the", "Galicia"],
    }  # nothing is left of these
    return told, gold


def as_texts(gold):
    return {"ids": list(gold), "answers": [[[0, text] for text in each] for each in gold.values()]}


def test_scores_are_the_official_ones(report, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no metric there
    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    told, gold = drawn_answers()
    scores = report.score(told, as_texts(gold))
    official = official_scores(told, gold)
    assert scores == {name: pytest.approx(v, abs=1e-9) for name, v in official.items()} | {
        "scorer": "own"
    }
    assert 20 < scores["exact_match"] < 90 and 20 < scores["f1"] < 90
    for name in gold:  # and each alone, so that nothing evens out
        alone = report.score({name: told[name]}, as_texts({name: gold[name]}))
        official = official_scores(told, {name: gold[name]})
        assert alone["exact_match"] == official["exact_match"], (told[name], gold[name])
        assert alone["f1"] == pytest.approx(official["f1"], abs=1e-9), (told[name], gold[name])


METRIC = """
import collections, re, string
import datasets
import evaluate

class Squad(evaluate.Metric):
    def _info(self):
        answers = datasets.Sequence(
            {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
        )
        said = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        truth = {"id": datasets.Value("string"), "answers": answers}
        features = datasets.Features({"predictions": said, "references": truth})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        predictions = {one["id"]: one["prediction_text"] for one in predictions}
        gold = {one["id"]: list(one["answers"]["text"]) for one in references}
        return official_scores(predictions, gold)
"""


def lay_metric(home, content):
    """Where evaluate keeps a metric that it fetched once: modules/.../<hash of 64>/squad.py."""
    folder = home / "modules/evaluate_modules/metrics/evaluate-metric--squad" / ("5" * 64)
    folder.mkdir(parents=True)
    for place in (folder, *folder.parents[:3]):
        (place / "__init__.py").touch()
    (folder / "squad.py").write_text(content)


def offline(home, **more):
    hidden = ("HF_", "SQUAD_CACHE", "SLURM", "REQUEUE", "EXIT_CODE")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(hidden)}
    kept |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "SQUAD_CACHE": str(home / "features")}
    return kept | more


def start(*words, environment):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, encoding="utf-8", **how
    )


def test_scores_come_from_evaluate_where_it_is_cached(tmp_path):
    """Its squad metric, its figures; a broken one costs a line and no more. Through the script."""
    import inspect

    own = "".join(map(inspect.getsource, (normalize_answer, f1_score, official_scores)))
    contents = {"whole": METRIC + own, "broken": "import nothing_of_this_name\n"}
    running = {}
    for name, content in contents.items():
        lay_metric(tmp_path / name, content)
        words = ["--sample", "--limit", "20", "--epochs", "0", "--output", tmp_path / name / "run"]
        running[name] = start(TRAIN, *words, environment=offline(tmp_path / name))
    results = {}
    for name, process in running.items():
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        results[name] = json.loads((tmp_path / name / "run/results.json").read_text())
        told = json.loads((tmp_path / name / "run/predictions.json").read_text())
        assert errors == "", "no noise from libraries"
        assert ("metric does not load" in out) == (name == "broken")
    assert results["whole"]["scorer"] == "evaluate" and results["broken"]["scorer"] == "own"
    sample = json.loads((TRAIN.parent / "sample.json").read_text())["data"]
    entries = [q for a in sample for p in a["paragraphs"] for q in p["qas"]]
    gold = {q["id"]: [answer["text"] for answer in q["answers"]] for q in entries[:20]}
    assert list(told) == list(gold)
    for result in results.values():
        for name, value in official_scores(told, gold).items():
            assert result[name] == pytest.approx(value, abs=1e-6)


def test_evaluate_and_our_scorer_agree(tmp_path):
    """On answers of articles and punctuation, with several gold answers."""
    import inspect

    own = "".join(map(inspect.getsource, (normalize_answer, f1_score, official_scores)))
    lay_metric(tmp_path, METRIC + own)
    told, gold = drawn_answers()
    (tmp_path / "told.json").write_text(json.dumps([told, as_texts(gold)]))
    script = "import sys, json; sys.path.insert(0, sys.argv[1]); import report\n"
    script += "print(json.dumps(report.score(*json.load(open(sys.argv[2])))))"
    words = ["-c", script, TRAIN.parent, tmp_path / "told.json"]
    process = start(*words, environment=offline(tmp_path))
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    scores = json.loads(out.splitlines()[-1])
    assert scores.pop("scorer") == "evaluate", out
    assert scores == {n: pytest.approx(v, abs=1e-6) for n, v in official_scores(told, gold).items()}


# The hub
def lay_data(home):
    """The hub's rajpurkar/squad as datasets keeps it, with the sample's questions."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    text, number = datasets.Value("string"), datasets.Value("int32")
    row = {"id": text, "title": text, "context": text, "question": text}
    row |= {"answers": datasets.Sequence({"text": text, "answer_start": number})}
    features = datasets.Features(row)
    sample = json.loads((TRAIN.parent / "sample.json").read_text())["data"]
    folder = home / "datasets/rajpurkar___squad/plain_text/0.0.0" / ("7" * 40)
    folder.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name="squad")
    for split in ("train", "validation"):
        path = folder / f"squad-{split}.arrow"
        with ArrowWriter(features=features, path=str(path)) as writer:
            for article in sample:
                for paragraph in article["paragraphs"]:
                    for entry in paragraph["qas"]:
                        given = {"title": "", "context": paragraph["context"], "id": entry["id"]}
                        several = entry["answers"]
                        answers = {n: [a[n] for a in several] for n in ("text", "answer_start")}
                        given |= {"question": entry["question"], "answers": answers}
                        writer.write(given)
            count, size = writer.finalize()
        splits.add(datasets.SplitInfo(split, size, count))
    info = datasets.DatasetInfo(features=features, splits=splits, config_name="plain_text")
    info.builder_name, info.dataset_name, info.version = "parquet", "squad", "0.0.0"
    info.write_to_directory(str(folder))


def lay_model(home, tokenizer):
    """google-bert/bert-base-uncased as the hub's cache keeps it, but small."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes)
    folder = home / "hub/models--google-bert--bert-base-uncased"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("8" * 40)
    snapshot = folder / "snapshots" / ("8" * 40)
    transformers.BertForMaskedLM(config).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    return snapshot


def test_the_hubs_model_and_data_from_the_cache(train, tmp_path):
    """Without --model and files: what prepare.sh fetched serves, and equals the files' features."""
    lay_data(tmp_path)
    tokenizer = train.sample_tokenizer()
    lay_model(tmp_path, tokenizer)
    words = [TRAIN, "--device", "cpu", "--no-profile", "--limit", 60]
    words += ["--max-steps", 2, "--output", tmp_path / "run"]
    process = start(*words, environment=offline(tmp_path))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["steps"] == 2 and results["arguments"]["train_file"] is None
    data = train.read_squad(TRAIN.parent / "sample.json", 60)
    features = train.build_features(data, tokenizer, 384, 128, "a file")
    assert results["train_features"] == len(features["begin"]) - 1
    kept = list((tmp_path / "features").glob("features-*.safetensors"))
    assert len(kept) == 2
    with train.safetensors.safe_open(kept[0], "np") as file:
        for name in features.keys() - {"texts"}:
            np.testing.assert_array_equal(file.get_tensor(name), features[name], name)


@pytest.mark.parametrize("missing", ["model", "data"])
def test_an_empty_cache_offline_is_one_clear_line(train, tmp_path, missing):
    words = [TRAIN, "--device", "cpu", "--limit", 20, "--output", tmp_path / "run"]
    if missing == "data":
        words += ["--model", lay_model(tmp_path / "other", train.sample_tokenizer())]
    seconds = []
    for _ in range(2):  # the better of two: the machine may have other work
        begin = time.perf_counter()
        process = start(*words, environment=offline(tmp_path / "home"))
        _, errors = process.communicate(timeout=60)
        seconds.append(time.perf_counter() - begin)
        assert process.returncode == 2
        assert len(errors.splitlines()) == 1 and errors.startswith("error: ")
        assert "prepare.sh" in errors
        assert (
            "google-bert/bert-base-uncased" if missing == "model" else "rajpurkar/squad"
        ) in errors
        most = 10 * max(os.getloadavg()[0] / os.cpu_count(), 1)
        if seconds[-1] < most:
            break
    assert min(seconds) < most
    assert not (tmp_path / "run/results.json").exists()

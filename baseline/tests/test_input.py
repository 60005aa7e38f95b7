"""Bad and hostile input: one line that names the file, the field and the mend, exit code 2."""

import argparse
import importlib.util
import json
import os
import pathlib
import pickle
import shutil
import time
import zipfile

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
spec = importlib.util.spec_from_file_location("baseline_train_input", HERE.parent / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

SMALL = ("--device", "cpu", "--batch-size", "2", "--max-steps", "2", "--no-profile")
CONTEXT = "The cluster is in Santiago, and its name is FinisTerrae."


def squad(context=CONTEXT, **entry):
    """A question file of one question, as Python holds it; what is given replaces what stands."""
    entry = {
        "id": "one",
        "question": "Where is the cluster?",
        "answers": [{"text": "Santiago", "answer_start": 18}],
    } | entry
    return {"data": [{"paragraphs": [{"context": context, "qas": [entry]}]}]}


def write(path, content):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a BERT of two small layers and the sample's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train.sample_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def refused(start, tmp_path):
    """Runs train.py, which must refuse: one line, exit code 2, quickly, and nothing is left."""

    def check(*words, says=(), seconds=10, left=(), **how):
        output = tmp_path / "refused"
        begin = time.monotonic()
        words = words if "--output" in words else (*words, "--output", output)
        text = start(*words, **how).end(2)
        took = time.monotonic() - begin
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and text.rstrip().splitlines()[-1] == errors[0], text
        for part in says:
            assert str(part) in errors[0], errors[0]
        assert len(errors[0]) < 620
        assert took < seconds
        if output.is_dir():  # a lock to keep others out is all that it may hold
            assert {path.name for path in output.rglob("*")} <= {".lock", *left}
        return text

    return check


# Question files
FILES = {
    "empty": (b"", "not JSON"),
    "html": (b"<html>404</html>", "not JSON"),
    "half": (json.dumps(squad()).encode()[:-9], "not JSON"),
    "latin-1": (json.dumps(squad("Coru\xf1a"), ensure_ascii=False).encode("latin-1"), "not JSON"),
    "binary": (b"\x80\x04\x95\x00\x00", "not JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
    "long number": (b'{"data": ' + b"9" * 5000 + b"}", "not JSON"),
    "number": (17, "data is not a list"),
    "list": ([], "data is not a list"),
    "null": (None, "data is not a list"),
    "no data": ({"version": "1.1"}, "data is not a list"),
    "data a text": ({"data": "x"}, "data is not a list"),
    "data empty": ({"data": []}, "no question"),
    "article a number": ({"data": [1]}, "data[0].paragraphs is not a list"),
    "no paragraphs": ({"data": [{}]}, "data[0].paragraphs is not a list"),
    "paragraphs empty": ({"data": [{"paragraphs": []}]}, "no question"),
    "no context": ({"data": [{"paragraphs": [{"qas": []}]}]}, "paragraphs[0].context"),
    "no qas": ({"data": [{"paragraphs": [{"context": "x"}]}]}, "paragraphs[0].qas"),
    "qas empty": ({"data": [{"paragraphs": [{"context": "x", "qas": []}]}]}, "no question"),
    "context empty": (squad(""), "context is empty"),
    "context blank": (squad(" \n\t"), "context is empty"),
    "context a number": (squad(5), "context is not a text"),
    "no id": (squad(id=None), "qas[0].id is not a text"),
    "id a number": (squad(id=7), "qas[0].id is not a text"),
    "question a list": (squad(question=["x"]), "qas[0].question is not a text"),
    "no answers": (squad(answers=[]), "SQuAD v2"),
    "impossible": (squad(is_impossible=True), "SQuAD v2"),
    "answers null": (squad(answers=None), "qas[0].answers is not a list"),
    "answers a mapping": (squad(answers={"text": ["x"]}), "qas[0].answers is not a list"),
    "answer a text": (squad(answers=["Santiago"]), "answers[0].text is not a text"),
    "answer empty": (squad(answers=[{"text": "", "answer_start": 0}]), "answer_start"),
    "start missing": (squad(answers=[{"text": "Santiago"}]), "answer_start is not a whole"),
    "start a text": (squad(answers=[{"text": "The", "answer_start": "0"}]), "answer_start is not"),
    "start a fraction": (
        squad(answers=[{"text": "The", "answer_start": 0.0}]),
        "answer_start is not",
    ),
    "start true": (squad(answers=[{"text": "he", "answer_start": True}]), "answer_start is not"),
    "start wrong": (squad(answers=[{"text": "Santiago", "answer_start": 17}]), "does not lead"),
    "start negative": (squad(answers=[{"text": ".", "answer_start": -1}]), "does not lead"),
    "start far": (squad(answers=[{"text": ".", "answer_start": 10**30}]), "does not lead"),
    "start nan": (
        json.dumps(squad()).replace(": 18", ": NaN").encode(),
        "answer_start is not a whole number",
    ),
    "second answer wrong": (
        squad(answers=[{"text": "Santiago", "answer_start": 18}, {"text": "x", "answer_start": 0}]),
        "answers[1].answer_start",
    ),
    "surrogate in context": (squad(CONTEXT + "\ud800"), "context holds a lone surrogate"),
    "surrogate in question": (squad(question="\udfff?"), "question holds a lone surrogate"),
    "surrogate in id": (squad(id="\ud83d"), "id holds a lone surrogate"),
    "control characters alone": (squad("\0\0"), ""),
}


@pytest.mark.parametrize("name", FILES)
def test_a_question_file_is_refused_in_one_line(name, tmp_path):
    content, says = FILES[name]
    path = write(tmp_path / "questions.json", content)
    tokenizer = train.sample_tokenizer()
    with pytest.raises(train.Problem) as caught:
        train.build_features(train.read_squad(path, None), tokenizer, 64, 16, path)
    line = str(caught.value)
    assert str(path) in line and says in line and "\n" not in line.strip() and ": " in line


def test_duplicated_ids_are_named(tmp_path):
    content = squad()
    content["data"] *= 2
    path = write(tmp_path / "q.json", content)
    with pytest.raises(train.Problem, match=r"data\[1\].*id 'one' is there twice"):
        train.read_squad(path, None)


@pytest.mark.parametrize("name", ["html", "impossible", "start wrong", "context empty", "deep"])
def test_the_command_refuses_a_question_file(name, refused, model, tmp_path):
    content, says = FILES[name]
    good, bad = write(tmp_path / "good.json", squad()), write(tmp_path / "bad.json", content)
    words = ("--model", model, "--max-length", 64, "--stride", 16, *SMALL)
    refused(*words, "--train-file", bad, "--validation-file", good, says=[bad, says])
    refused(*words, "--train-file", good, "--validation-file", bad, says=[bad, says])


@pytest.mark.parametrize("path", ["missing.json", ".", "missing/folder/q.json"])
def test_a_question_file_that_cannot_be_read(path, refused, model, tmp_path):
    words = ("--model", model, *SMALL, "--train-file", tmp_path / path)
    refused(*words, "--validation-file", tmp_path / path, says=[tmp_path / path])


# Options
OPTIONS = [
    ("--max-length", "abc"),
    ("--max-length", "7"),
    ("--max-length", "0"),
    ("--max-length", "99999999999999999999"),
    ("--stride", "-1"),
    ("--stride", "381"),
    ("--limit", "0"),
    ("--epochs", "-1"),
    ("--epochs", "nan"),
    ("--epochs", "1.5"),
    ("--max-steps", "0"),
    ("--batch-size", "0"),
    ("--accumulate", "-2"),
    ("--accumulate", "64"),
    ("--learning-rate", "nan"),
    ("--learning-rate", "-1e-5"),
    ("--learning-rate", "inf"),
    ("--warmup", "nan"),
    ("--warmup", "1.1"),
    ("--weight-decay", "-0.1"),
    ("--dropout", "1"),
    ("--dropout", "nan"),
    ("--seed", "-1"),
    ("--seed", "1e3"),
    ("--log-every", "0"),
    ("--save-every", "0"),
    ("--batching", "sorted"),
    ("--precision", "fp16"),
    ("--device", "tpu"),
    ("--model",),
]


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_an_option_is_refused_by_name(words):
    with pytest.raises((train.Problem, argparse.ArgumentError)) as caught:
        train.parse_arguments(["--sample", *words])
    assert words[0] in str(caught.value)


@pytest.mark.parametrize(
    "words,says",
    [
        (["--max-lenght", "384"], "did you mean --max-length?"),
        (["--modle=x"], "did you mean --model?"),
        (["--frobnicate"], "--help"),
        (["stray"], "stray"),
        (["--sample", "--model", "x"], "--sample"),
        (["--sample", "--train-file", "x"], "--sample"),
        (["--sample", "--learning-rate", "nan"], "--learning-rate"),
        (["--sample", "--max-length", "8", "--stride", "5"], "--stride"),
        (["--sample", "--max-length", "20", "--stride", "4"], "--max-length"),
    ],
)
def test_the_command_refuses_options(words, says, refused):
    refused(*words, says=[says])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(refused):
    refused("--sample", "--device", "cuda", says=["--device cuda", "GPU"])
    refused("--sample", "--precision", "tf32", says=["--precision tf32"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_hours_on_a_cpu_by_mistake_end_at_once(start, model, tmp_path):
    output = tmp_path / "out"
    words = ["--sample", "--output", output]
    many = "def plan_training(lengths, args, plan=plan_training):\n"
    many += "    made = plan(lengths, args)\n"
    many += "    return made | {'computed': made['computed'] * 10**6}\n"
    text = start(*words, patch=many).end(2)
    line = text.splitlines()[-1]
    for part in ("hours", "sbatch", "--sample", "--limit", "--device cpu"):
        assert part in line
    text = start(*words, "--device", "cpu", "--max-steps", 1, "--no-profile", patch=many).end()
    assert "step 1/1" in text


# Models
def test_a_model_that_is_not_there(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("--model", tmp_path / "empty", says=["--model", "tokenizer.json"])
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd/tokenizer.json", b"{")
    write(tmp_path / "odd/config.json", b'{"model_type": "bert"')
    refused("--model", tmp_path / "odd", says=["--model"])


def test_a_model_that_is_not_bert_like(refused, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "gpt2")
    transformers.GPT2Config().save_pretrained(folder)
    refused("--model", folder, says=["--model", "gpt2", "bert"])


def test_a_folder_without_a_tokenizer(refused, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "m")
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    refused("--model", folder, says=["--model", "tokenizer.json"])


def test_a_folder_whose_weights_are_damaged(refused, model, tmp_path):
    folder, path = shutil.copytree(model, tmp_path / "m"), write(tmp_path / "q.json", squad())
    words = ("--model", folder, "--train-file", path, "--validation-file", path, *SMALL)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    refused(*words, says=["--model", "model.safetensors"])
    weights.unlink()
    refused(*words, says=["--model", "model.safetensors"])


def test_a_length_beyond_the_model(refused, model):
    refused("--model", model, "--max-length", 513, says=["--max-length", "512"])


def test_an_offline_node_with_an_empty_cache(refused, model, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    # transformers and datasets read these when they are imported.
    patch = "import huggingface_hub.constants as c\n"
    patch += f"c.HF_HUB_OFFLINE, c.HF_HUB_CACHE = True, {str(tmp_path)!r}\n"
    says = ["--model google-bert/bert-base-uncased", "find them in the cached files.", "prepare.sh"]
    refused(says=says, patch=patch, **offline)
    # A missing file is told first, as the model may take minutes to fetch.
    words = ("--train-file", tmp_path / "nowhere.json")
    refused(*words, says=["nowhere.json", "No such file"], patch=patch, **offline)
    patch = "import datasets\nload_tokenizer_was = load_tokenizer\n"
    patch += f"import datasets.config as d\nd.HF_HUB_OFFLINE = True\nd.HF_DATASETS_CACHE = {str(tmp_path)!r}\n"
    patch += f"import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE, c.HF_HUB_CACHE = True, {str(tmp_path)!r}\n"
    says = ["rajpurkar/squad", "prepare.sh", "--train-file"]
    refused("--model", model, says=says, seconds=20, patch=patch, **offline)


# Outputs
def test_an_output_that_cannot_be(refused, tmp_path):
    file = write(tmp_path / "file", b"x")
    refused("--sample", "--output", file, says=[file])
    refused("--sample", "--output", file / "below", says=[file / "below"])
    refused("--sample", "--output", "/proc/none/here", says=["/proc/none"])
    refused("--sample", "--output", tmp_path / ("x" * 300), says=["xxx"])
    refused("--sample", "--output", os.fsdecode(b"not-utf-8-\xff"), says=["--output"])
    assert file.read_bytes() == b"x"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_an_output_of_somebody_else(refused, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    somebody = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    # pytest's folders, perhaps Python's too, are root's alone: stand inside beforehand.
    patch = f"sys.executable = '/bin/true'; os.chdir({str(folder)!r}); {somebody}"
    refused("--sample", "--output", "run", says=["run", "ermission"], patch=patch)
    assert not list(folder.iterdir())


# Hostile content
class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickled_model_is_not_opened(refused, model, tmp_path):
    folder, path = shutil.copytree(model, tmp_path / "m"), write(tmp_path / "q.json", squad())
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    words = ("--model", folder, "--train-file", path, "--validation-file", path, *SMALL)
    refused(*words, says=["--model", "model.safetensors"])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["plain", "zip"])
def test_a_pickled_checkpoint_is_not_opened(kind, refused, tmp_path):
    output, bomb = tmp_path / "refused", pickle.dumps(Bomb(tmp_path / "exploded"))
    output.mkdir()
    (output / "checkpoint.pt").write_bytes(bomb)
    if kind == "zip":
        with zipfile.ZipFile(output / "checkpoint.pt", "w") as file:
            file.writestr("checkpoint/data.pkl", bomb)
            file.writestr("checkpoint/version", "3\n")
    before = (output / "checkpoint.pt").read_bytes()
    says = [output / "checkpoint.pt", "remove it"]
    refused("--sample", "--max-steps", 2, "--no-profile", says=says, left=["checkpoint.pt"])
    assert not (tmp_path / "exploded").exists()
    assert (output / "checkpoint.pt").read_bytes() == before


def test_remote_code_is_not_run(start, model, tmp_path):
    folder, path = shutil.copytree(model, tmp_path / "m"), write(tmp_path / "q.json", squad())
    code = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\nEvil = object\n"
    (folder / "evil.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        kinds = ("AutoConfig", "AutoModelForQuestionAnswering", "AutoTokenizer")
        content["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
        write(folder / name, content)
    words = ("--model", folder, "--train-file", path, "--validation-file", path, *SMALL)
    start(*words, "--output", tmp_path / "o").end(None)  # it trains or refuses
    assert not (tmp_path / "exploded").exists()


def test_ids_do_not_lead_out_of_the_output(start, model, tmp_path):
    names = ["../../escaped", "/escaped", "a\0b", "$(touch escaped)", "`id`", "x" * 5000, " ", "\n"]
    content = squad()
    content["data"][0]["title"] = "../../title"
    entry = content["data"][0]["paragraphs"][0]["qas"][0]
    content["data"][0]["paragraphs"][0]["qas"] = [entry | {"id": name} for name in names]
    folder = tmp_path / "box"
    folder.mkdir()
    path = write(folder / "q $(touch a) ;'\".json", content)
    before = {p for p in tmp_path.rglob("*")}
    words = ("--model", model, "--train-file", path, "--validation-file", path, *SMALL)
    output = folder / "out $(touch b) ;'\" ñ"
    start(*words, "--output", output).end()
    assert set(json.loads((output / "predictions.json").read_text())) == set(names)
    new = {p for p in tmp_path.rglob("*")} - before
    assert all(p == output or output in p.parents or p.suffix == ".log" for p in new), new


@pytest.mark.parametrize("words", [[], ["--batching", "bucketed"]], ids=["packed", "bucketed"])
def test_awkward_texts_are_trained_on(words, start, model, tmp_path):
    article = {"paragraphs": []}
    texts = [
        "\0",
        "\ufeffx",
        "é" * 3,
        "e\u0301 e\u0301",
        "ﷺ ﬁ",
        "👩‍👩‍👧 x",
        "日本語",
        "a" * 3000,
        "[SEP] [CLS]",
    ]
    for i, text in enumerate(texts):
        context = f"{text} cluster {text}"
        start_at = context.index("cluster")
        answers = [{"text": "cluster", "answer_start": start_at}]
        if text.strip("\0"):
            answers.append({"text": text, "answer_start": 0})
        entry = {"id": str(i), "question": text, "answers": answers}
        article["paragraphs"].append({"context": context, "qas": [entry]})
    path = write(tmp_path / "q.json", {"data": [article]})
    words = ("--model", model, "--train-file", path, "--validation-file", path, *SMALL, *words)
    start(*words, "--output", tmp_path / "o").end()
    assert len(json.loads((tmp_path / "o/predictions.json").read_text())) == len(texts)


def test_a_context_of_a_million_characters(tmp_path):
    context = "cluster of nodes. " * 60_000
    answers = [{"text": "nodes.", "answer_start": context.rindex("nodes.")}]
    path = write(tmp_path / "q.json", squad(context, answers=answers))
    begin = time.monotonic()
    data = train.read_squad(path, None)
    features = train.build_features(data, train.sample_tokenizer(), 384, 128, path)
    assert len(features["begin"]) > 100 and time.monotonic() - begin < 60
    assert features["start"].max() > 0


# A fuzzer of question files
words = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(
    ["", " ", "\0", "\ud800", "the cluster", "../x", "İ", "ﬁ", "\u202e", "[SEP]", "a\u0301", "##"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
)


@st.composite
def question_files(draw):
    """Mostly in SQuAD's shape, with a leaf or a branch here and there that is not."""

    def odd(usual):
        return draw(trees) if draw(st.integers(0, 30)) == 0 else usual

    paragraphs = []
    for _ in range(draw(st.integers(0, 3))):
        context, entries = draw(words) + " cluster " + draw(words), []
        for _ in range(draw(st.integers(0, 3))):
            begin = draw(st.integers(0, len(context) - 1))
            end = draw(st.integers(begin + 1, len(context)))
            answer = {"text": odd(context[begin:end]), "answer_start": odd(begin)}
            entry = {"id": odd(draw(words)), "question": odd(draw(words))}
            entries.append(odd(entry | {"answers": odd([answer] * draw(st.integers(1, 2)))}))
        paragraphs.append(odd({"context": odd(context), "qas": odd(entries)}))
    return odd({"data": odd([odd({"paragraphs": odd(paragraphs)})])})


def try_it(content, folder):
    """Features or a Problem of one line; another exception fails the test."""
    path = write(folder / "q.json", content)
    tokenizer = try_it.tokenizer = getattr(try_it, "tokenizer", None) or train.sample_tokenizer()
    try:
        data = train.read_squad(path, None)
        features = train.build_features(data, tokenizer, 32, 4, path)
    except train.Problem as problem:
        line = str(problem)
        assert str(path) in line and len(line) < 900
        line.encode()  # it can be printed
    else:
        lengths = features["begin"][1:] - features["begin"][:-1]
        assert lengths.min() >= 4 and lengths.max() <= 32
        assert (features["start"] <= features["end"]).all()
        assert len(set(features["question"])) == len(data["ids"])
        assert features["end"].max() < 32 and len(features["tokens"]) == features["begin"][-1]


LOOSE = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=60, **LOOSE)
@given(content=question_files())
def test_a_fuzzed_file_trains_or_is_refused(content, tmp_path_factory):
    try_it(content, tmp_path_factory.getbasetemp())


@settings(max_examples=40, **LOOSE)
@given(content=trees | st.binary(max_size=60))
def test_any_json_or_bytes_train_or_are_refused(content, tmp_path_factory):
    try_it(content, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@settings(max_examples=600, **LOOSE)
@given(content=question_files())
def test_many_fuzzed_files(content, tmp_path_factory):
    try_it(content, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@settings(max_examples=300, **LOOSE)
@given(content=trees | st.binary(max_size=400))
def test_much_json_and_many_bytes(content, tmp_path_factory):
    try_it(content, tmp_path_factory.getbasetemp())

"""Bad and hostile input: one line that names the file, the field and the fix, and exit code 2."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import tarfile
import time
import zipfile

import pytest
import safetensors.torch
import torch
import transformers
from conftest import shared_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import FAMILIES, make_config, make_tokenizer

# A run of two steps.
SHORT = ("--device", "cpu", "--batch-size", 2, "--max-steps", 2, "--no-profile")
CONTEXT = "The cluster is in Santiago, and its name is FinisTerrae."


def document(context=CONTEXT, **fields):
    """A question file of one question, as Python has it; fields replace the question's own."""
    question = {
        "id": "one",
        "question": "Where is the cluster?",
        "answers": [{"text": "Santiago", "answer_start": 18}],
        **fields,
    }
    return {"data": [{"paragraphs": [{"context": context, "qas": [question]}]}]}


# The same, as the datasets library has it.
RECORD = {
    "id": "one",
    "title": "A cluster",
    "context": CONTEXT,
    "question": "Where is the cluster?",
    "answers": {"text": ["Santiago"], "answer_start": [18]},
}


def lines(*records):
    """The bytes of JSON lines, as the datasets library's to_json writes them."""
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def tar():
    """The bytes of a tar archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("questions.json"))
    return content.getvalue()


def write(path, content):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.write_bytes(content)
    return path


def both_files(path):
    return ("--train-file", path, "--validation-file", path)


@pytest.fixture
def good_file(tmp_path):
    return write(tmp_path / "good.json", document())


@pytest.fixture
def copied_model(tiny_model, tmp_path):
    """A copy of the tiny model's folder, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def refused(start, tmp_path):
    """refused(*words): runs train.py, which must refuse in one line, with exit code 2, quickly, and
    leave nothing behind. Returns the line, which has the parts in `says`."""

    def check(*words, says=(), seconds=20, left=(), **options):
        output = tmp_path / "refused"
        if "--output" not in words:
            words = (*words, "--output", output)
        begin = time.monotonic()
        text = start(*words, **options).end(2)
        took = time.monotonic() - begin
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert errors == [text.splitlines()[-1]], text
        for part in says:
            assert str(part) in errors[0], errors[0]
        assert len(errors[0]) < 620
        assert took < seconds
        if output.is_dir():
            assert {path.name for path in output.rglob("*")} <= {".lock", *left}
        return errors[0]

    return check


# 1. Question files

NEITHER = "has no question, and no list called data, paragraphs or qas"
UNLIKE = "is not in the context"
FILES = {
    "empty": (b"", "it is cut short: fetch the file again"),
    "html": (b"\xef\xbb\xbf\n<html>404</html>", "a web page: fetch the raw file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "zip": (b"PK\x03\x04\x14\x00", "unzip it"),
    "conflict": (b'<<<<<<< HEAD\n{"data": []}\n', "git's marks of a conflict: resolve it"),
    "gzip in gzip": (gzip.compress(gzip.compress(b"{}")), "a gzip within a gzip: run gunzip"),
    "bzip2": (bz2.compress(b"{}"), "by bzip2: run bunzip2"),
    "xz": (lzma.compress(b"{}"), "by xz: run unxz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "by zstd: run unzstd"),
    "tar.gz": (gzip.compress(tar()), "a tar archive: unpack it"),
    "Parquet": (b"PAR1\x15\x04", "from_parquet(FILE).to_json(NEW)"),
    "Arrow's file": (b"ARROW1\0\0\xff\xff\xff\xff", "read_feather(FILE).to_json(NEW, orient='rec"),
    "Arrow's stream": (b"\xff\xff\xff\xff\x88\x02", "Dataset.from_file(FILE).to_json(NEW)"),
    "pickle": (pickle.dumps([RECORD]), "a pickle: save its records"),
    "csv": (
        b"id,question,context\n1,2,3\n",
        "not JSON (Expecting value: line 1 column 1 (char 0)): g",
    ),
    "half": (json.dumps(document()).encode()[:-9], "it is cut short: fetch the file again"),
    "half a text": (b'{"data": [{"paragraphs": [{"cont', "it is cut short: fetch the file again"),
    "half a character": ('{"data": "東'.encode()[:-1], "it is cut short: fetch the file again"),
    "trailing comma": (b'{"data": [],}\n', "line 1 column 13 (char 12)): fix it there"),
    "latin-1": (json.dumps(document("Coruñ"), ensure_ascii=False).encode("latin-1"), "as UTF-8"),
    "binary": (b"\x80\x04\x95\x00\x00", "not JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
    "long number": (b'{"data": ' + b"9" * 5000 + b"}", "not JSON"),
    "gzip of nothing": (gzip.compress(b""), "it is cut short: fetch the file again"),
    "gzip of html": (gzip.compress(b"<html>"), "a web page: fetch the raw file"),
    "half a gzip": (gzip.compress(b'{"data": []}')[:-9], "a damaged gzip (Comp"),
    "gzip's head": (b"\x1f\x8b", "a damaged gzip ("),
    "no gzip": (b"\x1f\x8b" + b"x" * 30, "a damaged gzip (Unknown compression method): fetch"),
    "other gzip": (gzip.compress(bytes(99))[:10] + b"\xff" * 30, "a damaged gzip (Error"),
    "number": (17, "1 of 1 questions are wrong, the first at the top: it is a whole number"),
    "list": ([], "no question in it"),
    "null": (None, "the top: it is missing: give an object"),
    "no data": ({"version": "1.1"}, f"the top: it {NEITHER}: give one"),
    "a server's answer": ({"message": "API rate limit exceeded"}, "or take another file"),
    "splits": (
        {"train": [RECORD], "test": [RECORD]},
        "save each list of questions below 'train', 'test' as a file of its own",
    ),
    "splits below data": ({"data": {"train": [RECORD]}}, "questions below 'data' as a file"),
    "viewer's": ({"rows": [{"row": RECORD}]}, "questions below 'rows' as a file of its own"),
    "data a text": ({"data": "x"}, f"the top: it {NEITHER}"),
    "data empty": ({"data": []}, "no question in it"),
    "article a number": ({"data": [1]}, "data[0]: it is a whole number: give an object"),
    "no paragraphs": ({"data": [{}]}, f"data[0]: it {NEITHER}"),
    "paragraphs empty": ({"data": [{"paragraphs": []}]}, "no question in it"),
    "no context": ({"data": [{"paragraphs": [{"qas": []}]}]}, "paragraphs[0]: context is empty"),
    "no qas": ({"data": [{"paragraphs": [{"context": "x"}]}]}, f"paragraphs[0]: it {NEITHER}"),
    "qas null": ({"data": [{"paragraphs": [{"qas": None}]}]}, f"paragraphs[0]: it {NEITHER}"),
    "qas empty": ({"data": [{"paragraphs": [{"context": "x", "qas": []}]}]}, "no question in it"),
    "context empty": (document(""), "qas[0]: context is empty: remove it"),
    "context blank": (document(" \n\t"), "qas[0]: context is empty: remove it"),
    "context of no word": (
        document("\0\0", answers=[{"text": "\0", "answer_start": 0}]),
        "1 of 1 questions have no word in their context, the first is 'one': remove",
    ),
    "context a number": (document(5), "context is a whole number: give a text"),
    "no id": (document(id=None), "qas[0]: id is missing: give a text"),
    "id true": (document(id=True), "qas[0]: id is true or false: give a text"),
    "id a fraction": (document(id=7.0), "qas[0]: id is a decimal number: give a text"),
    "question a list": (document(question=["x"]), "qas[0]: question is a list: give a text"),
    "question null": (document(question=None), "qas[0]: question is missing: give a text"),
    "no answers": (document(answers=[]), "it has no answer: this is SQuAD v2"),
    "no answers, as datasets": (document(answers={"text": [], "answer_start": []}), "SQuAD v2"),
    "impossible": (document(is_impossible=True), "SQuAD v2"),
    "impossible, a text": (document(is_impossible="True"), "it is marked is_impossible: this is"),
    "impossible, a number": (document(is_impossible=1), "SQuAD v2"),
    "answers null": (document(answers=None), "SQuAD v2"),
    "answers a text": (document(answers="Santiago"), "answers is a text: give a list"),
    "answers without starts": (
        document(answers={"text": ["x"]}),
        "answers.answer_start is missing",
    ),
    "answers of one text": (
        document(answers={"text": "x"}),
        "answer_start is missing: give a whole",
    ),
    "answers of unequal lists": (
        document(answers={"text": ["The", "cluster"], "answer_start": [0]}),
        "answers has 2 in text and 1 in answer_start: give each text its start",
    ),
    "answer a text": (
        document(answers=["Santiago"]),
        "answers[0] is a text: give an object of text and answer_start",
    ),
    "answer empty": (
        document(answers=[{"text": "", "answer_start": 0}]),
        "answers[0].text is empty: remove this answer",
    ),
    "start missing": (document(answers=[{"text": "The"}]), "answer_start is missing: give a whole"),
    "start a text": (
        document(answers=[{"text": "The", "answer_start": "0"}]),
        "answer_start is a text: give a whole number",
    ),
    "start a fraction": (
        document(answers=[{"text": "The", "answer_start": 0.5}]),
        "answer_start is a decimal number: give a whole number",
    ),
    "start true": (
        document(answers=[{"text": "he", "answer_start": True}]),
        "answer_start is true or false: give a whole number",
    ),
    "start NaN": (json.dumps(document()).replace(": 18", ": NaN").encode(), "a decimal number: "),
    "start wrong": (
        document(answers=[{"text": "Santiago", "answer_start": 17}]),
        "answers[0].answer_start is 17, but the text is at 18: count",
    ),
    "start negative": (
        document(answers=[{"text": ".", "answer_start": -1}]),
        "answer_start is -1, but the text is at 55: count",
    ),
    "start far": (
        document(answers=[{"text": " is ", "answer_start": 10**30}]),
        "but the text is at 40: count",
    ),
    "start in bytes": (
        document("La Coruña: ñandú", answers=[{"text": "ñandú", "answer_start": 12}]),
        "answer_start is 12, but the text is at 11: count the context's characters, from 0",
    ),
    "answer in other case": (document(answers=[{"text": "the", "answer_start": 0}]), UNLIKE),
    "answer in other form": (
        document("Coruña", answers=[{"text": "Corun\u0303a", "answer_start": 0}]),
        f"{UNLIKE}: copy it from there: case, spaces and Unicode form (NFC, NFD) count",
    ),
    "second answer wrong": (
        document(
            answers=[{"text": "Santiago", "answer_start": 18}, {"text": "x", "answer_start": 0}]
        ),
        f"answers[1].text 'x' {UNLIKE}",
    ),
    "surrogate in context": (document(CONTEXT + "\ud800"), "context holds half a character"),
    "surrogate in question": (document(question="\udfff?"), "question holds half a character"),
    "surrogate in id": (document(id="\ud83d"), "id holds half a character"),
    "surrogate in answer": (
        document(answers=[{"text": "\ud83d", "answer_start": 0}]),
        "answers[0].text holds half a character",
    ),
    "id twice": (
        {"data": document()["data"] * 3},
        "2 of 3 questions are wrong, the first at data[1].paragraphs[0].qas[0]: id 'one' is there",
    ),
    "id twice, as number and text": ([RECORD | {"id": "7"}, RECORD | {"id": 7}], "[1]: id '7' is"),
    "no answers in a record": ([{"id": "1", "context": "x", "question": "?"}], "as in a test set"),
    "lines, some of them wrong": (
        lines(RECORD, {**RECORD, "id": None}, {**RECORD, "id": 2}, {"header": "x"}),
        "2 of 4 questions are wrong, the first at line 2: id is missing",
    ),
    "lines, one of them broken": (
        lines(RECORD) + b'{"id": }\n' + lines({**RECORD, "id": 2}),
        "1 of 3 questions are wrong, the first at line 2: not JSON (Expecting value: column 8 (char"
        " 7)): fix it there",
    ),
    "lines, cut short": (
        lines(RECORD, {**RECORD, "id": 2})[:-20],
        "1 of 2 questions are wrong, the first at line 2: not JSON (",
    ),
    "two documents over lines": (
        b"{\n}\n{\n}",
        "not JSON (Extra data: line 3 column 1 (char 4)): write each record on one line, with",
    ),
    "lines with commas": (b"{},\n{},\n", "column 3 (char 2)): write each record on one line"),
    "lines that end as on an old Mac": (
        b"{}\r{}\r",
        "(char 3)): write each record on one line",
    ),
    "columns": (
        {name: [value] for name, value in RECORD.items()},
        "the top: its fields are columns: save records, as pandas' to_json(FILE, orient='records')",
    ),
    "numbered columns": ({name: {"0": value} for name, value in RECORD.items()}, "are columns"),
}


@pytest.fixture(scope="module")
def build(train):
    """build(path, max_length, stride): the examples and the features of a question file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(train.SAMPLE)

    def build_from(path, max_length=64, stride=16):
        words = ["--sample", "--max-length", str(max_length), "--stride", str(stride)]
        args = train.parse_arguments([*words, "--device", "cpu"])
        examples = train.read_squad(path)
        return examples, train.build_features(examples, tokenizer, args, path)

    return build_from


@pytest.mark.parametrize("name", FILES)
def test_question_file_is_refused_in_one_line(name, train, build, tmp_path):
    content, says = FILES[name]
    path = write(tmp_path / "questions.json", content)
    with pytest.raises(train.Problem) as caught:
        build(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and says in line
    # The place, what is wrong, and what to do.
    assert line.count(": ") >= 2
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["html", "impossible", "start wrong", "context empty", "deep"])
def test_command_refuses_a_question_file(name, refused, tiny_model, good_file, tmp_path):
    content, says = FILES[name]
    bad_file = write(tmp_path / "bad.json", content)
    words = ("--model", tiny_model, "--max-length", 64, "--stride", 16, *SHORT)
    for train_file, validation_file in ((bad_file, good_file), (good_file, bad_file)):
        files = ("--train-file", train_file, "--validation-file", validation_file)
        refused(*words, *files, says=[bad_file, says])


OTHER = RECORD | {"id": 2, "question": "Its name?", "answers": {"text": [], "answer_start": []}}
OTHER["answers"] = {"text": ["FinisTerrae", "name"], "answer_start": [44, 36]}
EXAMPLES = [
    {name: value for name, value in RECORD.items() if name != "title"},
    {name: value for name, value in OTHER.items() if name != "title"} | {"id": "2"},
]
# One after the other: RECORD, then OTHER.
READ = {
    "a list": json.dumps([RECORD, OTHER]).encode(),
    "a list over lines": json.dumps([RECORD, OTHER], indent=1).encode(),
    "a list below data": json.dumps({"version": "1", "data": [RECORD, OTHER]}).encode(),
    "lines": lines(RECORD, OTHER),
    "lines without the last end": lines(RECORD, OTHER).rstrip(),
    "lines of Windows, some empty": lines(RECORD, OTHER).replace(b"\n", b"\r\n\r\n"),
    "lines with a byte order mark": b"\xef\xbb\xbf" + lines(RECORD, OTHER),
    "lines in UTF-16": lines(RECORD, OTHER).decode().encode("utf-16"),
    "lines in gzip": gzip.compress(lines(RECORD, OTHER)),
    "lines in two gzips": gzip.compress(lines(RECORD)) + gzip.compress(lines(OTHER)),
    "a list in gzip": gzip.compress(json.dumps([RECORD, OTHER]).encode()),
    "a document and a record on a line each": lines(document(), OTHER),
    "a document in gzip and UTF-16": gzip.compress(
        json.dumps({"data": [*document()["data"], OTHER]}).encode("utf-16")
    ),
    "paragraphs": json.dumps([*document()["data"][0]["paragraphs"], OTHER]).encode(),
}


@pytest.mark.parametrize("name", READ)
def test_question_file_is_read(name, train, tmp_path):
    """In whichever of its shapes, and whatever it is called."""
    path = write(tmp_path / "questions.csv", READ[name])
    assert train.read_squad(path) == EXAMPLES
    assert train.read_squad(path, 1) == EXAMPLES[:1]


def test_an_object_of_one_answer_is_read(train, tmp_path):
    answers = {"text": "Santiago", "answer_start": 18}
    path = write(tmp_path / "q.json", [RECORD | {"answers": answers}])
    assert train.read_squad(path) == EXAMPLES[:1]


def test_one_record_is_read(train, tmp_path):
    path = write(tmp_path / "q.jsonl", lines(RECORD))
    assert train.read_squad(path) == EXAMPLES[:1]


@pytest.mark.parametrize("impossible", [None, False, 0, "false", "False", "0", ""])
def test_question_that_says_it_is_not_impossible(impossible, train, tmp_path):
    path = write(tmp_path / "q.json", document(is_impossible=impossible))
    assert train.read_squad(path) == EXAMPLES[:1]


def test_what_looks_like_the_end_of_a_line_is_not_one(train, tmp_path):
    """Unescaped in JSON, as ensure_ascii=False and JavaScript write it."""
    context = f"\u2028{CONTEXT[1:]}\x85\u2029"
    text = json.dumps({**RECORD, "context": context}, ensure_ascii=False)
    path = write(tmp_path / "q.jsonl", f"{text}\n{json.dumps(OTHER)}\n".encode())
    assert [example["context"] for example in train.read_squad(path)] == [context, CONTEXT]


def test_wrong_questions_are_counted(train, tmp_path):
    content = document()
    [paragraph] = content["data"][0]["paragraphs"]
    [question] = paragraph["qas"]
    questions = [{**question, "id": number} for number in range(40)]
    questions[5] = {**question, "id": 5, "answers": [{"text": "Santiago", "answer_start": 19}]}
    questions[6] = 17
    questions[39] = {**question, "id": "0"}
    content["data"].insert(0, {"paragraphs": [{**paragraph, "qas": questions}]})
    with pytest.raises(train.Problem) as caught:
        train.read_squad(write(tmp_path / "q.json", content))
    says = "q.json: 3 of 41 questions are wrong, the first at data[0].paragraphs[0].qas[5]: answers"
    assert says in str(caught.value)


# What each of these files of ../shared/cases/data is to say.
FIRST = "questions are wrong, the first at data[0].paragraphs[0]"
CASES_REFUSED = {
    "plain.jsonl": "4 of 8 questions are wrong, the first at line 2.data[0].paragraphs[0].qas",
    "truncated.json": "cut short: fetch the file again",
    "html-error.json": "fetch the raw file",
    "lfs-pointer.json": "git lfs pull",
    "empty.json": "fetch the file again",
    "trailing-comma.json": "char 732)): fix it there",
    "no-ids.json": f"4 of 4 {FIRST}.qas[0]: id is",
    "same-ids.json": "the first at data[1].paragraphs[0].qas[0]: id 'a1' is there twice",
    "off-by-one.json": f"1 of 4 {FIRST}.qas[0]:"
    " answers[0].answer_start is 29, but the text is at 28",
    "start-minus1.json": "answer_start is -1, but the text is at 28",
    "byte-starts.json": f"2 of 4 {FIRST}.qas[0]:"
    " answers[0].answer_start is 29, but the text is at 28: count the context's characters",
    "crlf-starts-of-lf.json": "answer_start is 34, but the text is at 35",
    "nfd-context-nfc-answer.json": "Unicode form",
    "string-starts.json": f"4 of 4 {FIRST}.qas[0]:"
    " answers[0].answer_start is a text: give a whole number",
    "float-starts.json": f"4 of 4 {FIRST}.qas[0]:"
    " answers[0].answer_start is a decimal number: give a whole number",
    "one-empty-answer.json": "answers[1].text is empty: remove this answer",
    "answers-strings.json": f"4 of 4 {FIRST}.qas[0]:"
    " answers[0] is a text: give an object of text and answer_start",
    "null-answers.json": f"1 of 4 {FIRST}.qas[0]: it has no answer: this is SQuAD v2",
    "null-question.json": "question is missing: give a text",
    "no-qas-key.json": f"1 of 3 {FIRST}: it has no",
    "long-question.json": "1 of 1 questions do not fit, the first is 'q1' (401 tokens, context 24):"
    " give --max-length 533 --stride 64",
    "v2.json": f"1 of 4 {FIRST}.qas[1]: it has no answer: this is SQuAD v2",
    "test-set-without-answers.json": f"1 of 4 {FIRST}.qas[0]: it has no answers, as in a test set",
    "empty-context-no-qas.json": f"1 of 3 {FIRST}: context is empty: remove the paragraph",
}
# What the summary of the others counts: questions, features, features without an answer, answers
# over 30 tokens, answers that no window holds, answers that do not fall on tokens' edges.
CASES_READ = {
    "answer-only-space.json": [1, 1, 0, 0, 0, 1],
    "answer-over-window.json": [3, 9, 7, 1, 1, 1],
    "answer-spaces.json": [3, 3, 1, 0, 1, 3],
    "chinese.json": [2, 2, 0, 0, 0, 0],
    "control.json": [2, 2, 0, 0, 0, 0],
    "crlf-context.json": [2, 2, 0, 0, 0, 0],
    "duplicate-contexts.json": [3, 3, 0, 0, 0, 0],
    "emoji.json": [2, 2, 0, 0, 0, 0],
    "empty-question.json": [2, 2, 0, 0, 0, 0],
    "galician.json": [2, 2, 0, 0, 0, 0],
    "hindi.json": [2, 2, 0, 0, 0, 0],
    "invisible.json": [4, 4, 0, 0, 0, 2],
    "korean.json": [1, 1, 0, 0, 0, 0],
    "long-answer.json": [1, 1, 0, 1, 0, 1],
    "long-question-250.json": [1, 32, 24, 0, 0, 0],
    "long-word.json": [2, 2, 0, 0, 0, 1],
    "nfd.json": [2, 2, 0, 0, 0, 0],
    "no-qas.json": [2, 2, 0, 0, 0, 0],
    "one-token.json": [2, 2, 0, 0, 0, 0],
    "special-tokens.json": [2, 2, 0, 0, 0, 0],
    "thai.json": [1, 1, 0, 0, 0, 1],
    "turkish.json": [2, 2, 0, 0, 0, 0],
}
# All the others are plain.json's questions in another shape.


def test_cases_of_question_files(train, minilm):
    folder = shared_folder("cases/data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    args = train.parse_arguments(["--sample", "--device", "cpu"])
    plain = train.read_squad(folder / "plain.json")
    assert len(plain) == 4
    for path in sorted(folder.iterdir()):
        if path.name in CASES_REFUSED:
            with pytest.raises(train.Problem) as caught:
                train.build_features(train.read_squad(path), tokenizer, args, path)
            assert str(caught.value).startswith(f"{path}: ")
            assert CASES_REFUSED[path.name] in str(caught.value)
            continue
        examples = train.read_squad(path)
        if path.name not in CASES_READ:
            assert examples == plain, path.name
            continue
        features = train.build_features(examples, tokenizer, args, path)
        assert features["summary"].tolist() == CASES_READ[path.name], path.name


@pytest.mark.parametrize(
    "path", ["missing.json", ".", "missing/folder/q.json", "pipe", "/dev/null"]
)
def test_question_file_that_is_not_there(path, refused, tiny_model, good_file, tmp_path):
    """A pipe can be read only once, and a run reads twice: it is refused before it is opened."""
    os.mkfifo(tmp_path / "pipe")
    fix = {"pipe": "write it to a file", ".": "this is a folder"}.get(path, "there is no such file")
    if path == "/dev/null":
        fix = "this is a pipe or a device"
    words = ("--model", tiny_model, *SHORT)
    refused(*words, *both_files(tmp_path / path), says=["--train-file", tmp_path / path, fix])
    words += ("--train-file", good_file, "--validation-file", tmp_path / path)
    refused(*words, says=["--validation-file", tmp_path / path, fix])


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_question_file_of_somebody_else(refused, tiny_model, good_file):
    good_file.chmod(0)
    refused("--model", tiny_model, *SHORT, *both_files(good_file), says=[good_file, "ermission"])


# 2. Options

OPTIONS = [
    ("--max-length", "abc"),
    ("--max-length", "7"),
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
    ("--batch-size", "2000000000"),
    ("--epochs", "2000000000"),
    ("--dropout", "0.999"),
    ("--model", ""),
    ("--train-file", ""),
    ("--validation-file", ""),
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
    ("--evaluate-every", "5"),
    ("--precision", "fp16"),
    ("--device", "tpu"),
    ("--model",),
]


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_option_is_refused_by_name(words, train):
    with pytest.raises(train.Problem) as caught:
        train.parse_arguments(["--sample", *words])
    assert words[0] in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-lenght", "384"], "--max-lenght"),
        (["--modle=x"], "--modle=x"),
        (["--frobnicate"], "--help lists the options"),
        (["stray"], "stray"),
        (["--sample", "--model", "x"], "--sample brings its own"),
        (["--sample", "--train-file", "x"], "--sample brings its own"),
        (["--sample", "--output", ""], "--output is empty: give a name"),
        (["--train-file", ""], "--train-file is empty: give a name"),
        (["--model", "a\nb"], "--model 'a\\nb': give a name of characters that can be"),
        (["--sample", "--output", "a\x1bb"], "--output 'a\\x1bb': give a name of"),
        (["--sample", "--learning-rate", "nan"], "--learning-rate: nan"),
        (["--sample", "--max-length", "8", "--stride", "5"], "--stride"),
        (["--sample", "--max-length", "20", "--stride", "4"], "give --max-length"),
    ],
)
def test_command_refuses_options(words, says, refused):
    refused(*words, says=[says])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_that_is_not_there(refused):
    refused("--sample", "--device", "cuda", says=["--device cuda", "GPU"])
    refused("--sample", "--precision", "tf32", says=["--precision tf32", "GPU"])
    refused("--sample", "--cuda-graph", says=["--cuda-graph", "GPU"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_hours_on_a_cpu_by_mistake(refused, start, tmp_path):
    patch = "def plan_training(*given, plan_training=plan_training):\n"
    patch += "    plan = plan_training(*given)\n"
    patch += "    return {**plan, 'computed': plan['computed'] * 10**6}\n"
    says = ["hours", "use sbatch, --limit N; --device cpu"]
    refused("--sample", says=says, patch=patch)
    says = ["hours", "ask for a GPU (--gres), --limit N; --device cpu"]
    refused("--sample", says=says, patch=patch, SLURM_JOB_ID="7")
    words = ("--sample", "--device", "cpu", "--max-steps", 1, "--no-profile")
    start(*words, "--output", tmp_path / "meant", patch=patch).end()


# 3. Models


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(family, batching, start, tmp_path):
    """And what it leaves opens as one of the family."""
    folder = tmp_path / "model"
    kinds = {"electra": "bert", "distilbert": "bert", "albert": "bert"}
    tokenizer = make_tokenizer(kinds.get(family, family))
    tokenizer.save_pretrained(folder)
    config = make_config(family, words=len(tokenizer))
    transformers.AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)
    context = "the tower of hercules is a lighthouse"
    path = write(
        tmp_path / "q.json", document(context, answers=[{"text": "is", "answer_start": 22}])
    )
    words = ("--model", folder, *both_files(path), *SHORT, "--max-length", 64, "--stride", 8)
    words += ("--epochs", 2, "--batching", batching, "--output", tmp_path / "run")
    text = start(*words).end()
    assert "warning" not in text.lower()  # learning is none
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["steps"] == 2
    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    assert predictions["one"] in context
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run/model")
    assert model.config.model_type == family


def test_weights_in_a_bin_file(start, copied_model, good_file, tmp_path):
    """Older models have pytorch_model.bin: the same training as from model.safetensors."""
    words = (*both_files(good_file), *SHORT, "--log-every", 1)
    start("--model", copied_model, *words, "--output", tmp_path / "safetensors").end()
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(copied_model)
    torch.save(model.state_dict(), copied_model / "pytorch_model.bin")
    (copied_model / "model.safetensors").unlink()
    start("--model", copied_model, *words, "--output", tmp_path / "bin").end()
    losses = []
    for name in ("safetensors", "bin"):
        timings = json.loads((tmp_path / name / "timings.json").read_text())
        losses.append([interval["loss"] for interval in timings["intervals"]])
    assert losses[0] == losses[1]


def rename(old, new):
    """A change of a model's weights: old, at the beginning of a name, is new."""
    return lambda weights: {re.sub(f"^{old}", new, name): one for name, one in weights.items()}


def put_nan(weights):
    weights["bert.encoder.layer.1.output.dense.weight"][3, 3] = float("nan")
    return weights


def take_away(words):
    return lambda weights: {name: one for name, one in weights.items() if words not in name}


def widen_head(weights):
    return {**weights, "qa_outputs.weight": torch.zeros(3, 16), "qa_outputs.bias": torch.zeros(3)}


# What is wrong with a model's folder: changes of its config.json, of its weights, what is said.
MODELS = {
    "more layers": (
        {"num_hidden_layers": 4},
        None,
        ["32 of its weights", "bert.encoder.layer.2", "asks for 4", "has 2", "num_hidden_layers"],
    ),
    "module": ({}, rename("", "module."), ["37 of its weights", "'module'", "a wrapper's"]),
    "compiled": ({}, rename("", "_orig_mod."), ["'_orig_mod'", "a wrapper's", "out of the names"]),
    "module without head": ({}, rename("bert", "module"), ["'module'", "a wrapper's"]),
    "a layer in module": (
        {},
        rename("bert.encoder.layer.1", "module.bert.encoder.layer.1"),
        ["16 of its weights", "'module'", "a wrapper's"],
    ),
    "each layer compiled": (
        {},
        rename(r"bert.encoder.layer.(\d)", r"bert.encoder.layer.\1._orig_mod"),
        ["32 of its weights", "'_orig_mod'", "a wrapper's"],
    ),
    "an adapter": (
        {},
        rename("bert(.*query)", r"base_model.model.bert\1.base_layer"),
        ["an adapter beside its weights", "merge_and_unload()"],
    ),
    "parametrized": (
        {},
        rename("(.*dense).weight", r"\1.parametrizations.weight.original0"),
        ["parametrized", "remove_parametrizations()"],
    ),
    "a training's": (
        {},
        lambda weights: {"epoch": torch.zeros(1), "state_dict": torch.zeros(1)},
        ["a training's checkpoint", "below state_dict"],
    ),
    "a layer of another number": (
        {},
        rename("bert.encoder.layer.1", "bert.encoder.layer.5"),
        ["16 of its weights", "other numbers there, as bert.encoder.layer.5", "from 0"],
    ),
    "one weight of a layer": (
        {},
        take_away("layer.1.output.dense.weight"),
        ["1 of its weights", "not complete"],
    ),
    "DistilBERT's": ({}, rename("bert", "distilbert"), ["a distilbert's", "config.json"]),
    "RoBERTa's": ({}, rename("bert", "roberta"), ["a roberta's", "config.json"]),
    "another's": ({}, rename("bert", "x.y.z"), ["37", "'x.y.z'"]),
    "half": ({}, take_away("layer.0"), ["16 of its weights", "layer.0", "not complete"]),
    "other names": ({}, lambda weights: {"x": torch.zeros(3)}, ["another architecture", "with x"]),
    "wider": ({"hidden_size": 64}, None, ["36 of its weights", "[16]", "[64]", "config.json"]),
    "more words": (
        {"vocab_size": 119547},
        None,
        ["1 of its weights", "word_embeddings.weight has the shape [", "[119547, 16]"],
    ),
    "three labels": ({}, widen_head, ["qa_outputs.bias", "[3]", "[2]", "two labels"]),
    "not finite": ({}, put_nan, ["1 of its weights are not finite", "layer.1.output.dense.weight"]),
    "relative positions": (
        {"position_embedding_type": "relative_key"},
        None,
        ["position_embedding_type relative_key", "absolute"],
    ),
    "odd activation": ({"hidden_act": "frobnicate"}, None, ["hidden_act", "'frobnicate'", "gelu"]),
    "no layer": ({"num_hidden_layers": 0}, None, ["num_hidden_layers", "is 0: give at least 1"]),
    "fewer layers than none": ({"num_hidden_layers": -1}, None, ["num_hidden_layers", "is -1"]),
    "no head": ({"num_attention_heads": 0}, None, ["num_attention_heads", "a divisor of 16"]),
    "uneven heads": ({"num_attention_heads": 3}, None, ["num_attention_heads", "a divisor of 16"]),
    "nothing but dropout": ({"hidden_dropout_prob": 1.0}, None, ["hidden_dropout_prob", "less th"]),
    "padding": ({"pad_token_id": 10**6}, None, ["pad_token_id", "is 1000000", "vocab_size"]),
    "unknown kind": ({"model_type": "BERT"}, None, ["model_type", "'BERT'", "as bert"]),
    "not for questions": ({"model_type": "layoutlm"}, None, [" is a layoutlm: give one of BERT's"]),
    "said to be quantised": (
        {"quantization_config": {"quant_method": "foo"}},
        None,
        ["quantised", "quantization_config", "before quantisation"],
    ),
    "whole numbers": (
        {},
        lambda weights: {name: (10 * one).to(torch.int8) for name, one in weights.items()},
        ["bert.embeddings.LayerNorm.weight", "model.safetensors", "torch.int8", "quantisation"],
    ),
}


def shorten_positions(weights):
    name = "bert.embeddings.position_embeddings.weight"
    return {**weights, name: weights[name][:100].clone()}


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def change_json(folder, name, **changes):
    path = folder / name
    write(path, {**json.loads(path.read_text()), **changes})


def change_config(folder, **changes):
    change_json(folder, "config.json", **changes)


def load(train, folder, *words):
    """The model as a run has it."""
    args = train.parse_arguments(["--model", str(folder), *words, "--device", "cpu"])
    return train.load_model(args, train.load_tokenizer(args)[1])


@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused_in_one_line(name, train, copied_model):
    """It would be trained from random weights, or not as its author meant."""
    changes, change, says = MODELS[name]
    change_config(copied_model, **changes)
    if change:
        change_weights(copied_model, change)
    with pytest.raises(train.Problem) as caught:
        load(train, copied_model)
    line, code = train.explain(caught.value)
    assert code == 2 and line.startswith(f"--model {copied_model}") and len(line) < 620
    for part in says:
        assert part in line, line
    # One fix.
    assert " or " not in line.replace("or none", "")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 466247\n"
# Files of a model's folder: what is in them instead, and what is said.
DAMAGED = {
    "config.json": (b'{"model_type": "bert",}', "is damaged (Expecting property name"),
    "tokenizer.json": (LFS, "is a pointer of Git LFS: run git lfs pull"),
    "tokenizer_config.json": (b"{", "it is cut short: fetch the file again"),
    "model.safetensors": (LFS, "is a pointer of Git LFS: run git lfs pull"),
    "pytorch_model.bin": (LFS, "is a pointer of Git LFS: run git lfs pull"),
    "model.safetensors.index.json": (b"{", "it is cut short: fetch the file again"),
}


@pytest.mark.parametrize("content", [None, b""], ids=["odd", "empty"])
@pytest.mark.parametrize("name", DAMAGED)
def test_file_of_a_model_that_is_damaged(name, content, train, copied_model):
    """The line names it: a parser's sentence alone says nothing to look at."""
    says = "is empty: fetch it again"
    if content is None:
        content, says = DAMAGED[name]
    if name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (copied_model / "model.safetensors").unlink()
    (copied_model / name).write_bytes(content)
    with pytest.raises(train.Problem) as caught:
        load(train, copied_model)
    line = str(caught.value)
    assert line.startswith(f"--model {copied_model}: {copied_model / name} is ")
    assert says in line


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_file_of_a_model_of_somebody_else(name, train, copied_model):
    (copied_model / name).chmod(0)
    with pytest.raises(train.Problem, match=rf"{name}: Permission denied: make it readable"):
        load(train, copied_model)


def write_vocabulary(folder, words):
    """Puts vocab.txt alone in the place of a tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_bytes(words)


BARE = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: write_vocabulary(folder, b""), "vocab.txt is empty: fetch it again"),
        (lambda folder: write_vocabulary(folder, LFS), "vocab.txt is a pointer of Git LFS"),
        (
            lambda folder: (
                change_json(folder, "tokenizer.json", post_processor=None),
                write(folder / "tokenizer_config.json", BARE),
            ),
            "puts no [CLS] before a question, or no [SEP] after it: set its post_processor",
        ),
    ],
    ids=["empty", "lfs", "no marks"],
)
def test_tokenizer_that_cannot_be_used(change, says, train, copied_model):
    """It would fail at its first call, or let each question run into its context."""
    change(copied_model)
    with pytest.raises(train.Problem) as caught:
        load(train, copied_model)
    assert str(caught.value).startswith(f"--model {copied_model}: ") and says in str(caught.value)


@pytest.mark.parametrize("change", [BARE, {"tokenizer_class": "DistilBertTokenizer"}])
def test_token_types_are_asked_for(change, train, copied_model, good_file):
    """Some tokenizers leave them out, and a BERT would be trained without."""
    change_json(copied_model, "tokenizer_config.json", **change, model_input_names=["input_ids"])
    args = train.parse_arguments(["--model", str(copied_model), "--device", "cpu"])
    tokenizer, config = train.load_tokenizer(args)
    assert "token_type_ids" not in tokenizer.model_input_names
    features = train.build_features(train.read_squad(good_file), tokenizer, args, good_file)
    model = train.load_model(args, config)
    features["lengths"] = features["begin"][1:]
    types = train.feature_table(features, tokenizer, model, torch.device("cpu"))["token_types"]
    # The question's [CLS] and [SEP] are of its type, the last [SEP] is of the context's.
    assert types.tolist() == [n >= features["context_first"][0] for n in range(len(types))]


def test_tokenizer_that_may_be_anothers(train, copied_model, monkeypatch):
    write_vocabulary(copied_model, b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    said = []
    monkeypatch.setattr(train, "log", said.append)
    load(train, copied_model)
    [line] = said
    assert line.startswith("the tokenizer has 6 words, the model ") and "own?" in line


def test_weights_that_are_too_large(refused, copied_model, good_file):
    """bucketed, which is no check, would find the loss to be no number either."""
    name = "bert.encoder.layer.1.output.dense.bias"
    change_weights(copied_model, lambda weights: {**weights, name: torch.full((16,), 1e38)})
    words = ("--model", copied_model, *both_files(good_file), *SHORT)
    refused(*words, says=["--model", "logits are not finite", "weights are too large"])


def test_folders_that_are_no_model(refused, tiny_model, copied_model, good_file, tmp_path):
    words = (*both_files(good_file), *SHORT)
    shutil.copytree(tiny_model, tmp_path / "run/model")
    line = refused("--model", tmp_path / "run", *words, says=[f"give {tmp_path}/run/model"])
    assert "tokenizer" not in line
    (tmp_path / "going").mkdir()
    (tmp_path / "going/checkpoint.pt").touch()
    for name in ("going", "going/checkpoint.pt"):
        refused("--model", tmp_path / name, *words, says=["has not finished"])
    refused("--model", tmp_path / "run/modle", *words, says=["there is no such folder", "give"])
    shutil.copytree(tiny_model, tmp_path / "hub/models--x--y/snapshots/abc")
    for name in ("hub", "hub/models--x--y"):
        says = [f"give {tmp_path}/hub/models--x--y/snapshots/abc"]
        refused("--model", tmp_path / name, *words, says=says)
    address = "https://huggingface.co/google-bert/bert-base-uncased"
    refused("--model", address, *words, says=["is an address", "give the hub's name"])
    (tmp_path / "google").mkdir()
    (tmp_path / "google/bert_config.json").touch()
    refused("--model", tmp_path / "google", *words, says=["no config.json", "TensorFlow"])
    refused("--model", tiny_model / "model.safetensors", *words, says=["is a file", "folder"])
    adapter = {"base_model_name_or_path": "x", "peft_type": "LORA"}
    write(copied_model / "adapter_config.json", adapter)
    refused("--model", copied_model, *words, says=["PEFT", "merge"])
    # And where there is nothing but the adapter.
    (copied_model / "config.json").unlink()
    (copied_model / "model.safetensors").unlink()
    refused("--model", copied_model, *words, says=["PEFT", "merge"])


def test_model_of_another_task(start, train, tiny_model, good_file, tmp_path):
    """What its config.json sets for that task changes nothing; it gets a new head; both are said."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    config.num_labels = 3
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    losses = {}
    for name in ("classifier", "encoder"):
        folder = tmp_path / name
        (model if name == "classifier" else model.bert).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if name == "classifier":
            odd = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
            odd |= {"is_decoder": True, "add_cross_attention": True, "chunk_size_feed_forward": 3}
            change_config(folder, **odd)
        else:
            change_config(folder, id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1})
        words = (*both_files(good_file), *SHORT, "--log-every", 1, "--dropout", 0)
        output = tmp_path / f"{name}-run"
        text = start("--model", folder, *words, "--output", output).end()
        assert "head for answers is new, with random weights" in text
        assert "weights of the model's file are not used: " in text and "pooler.dense" in text
        if name == "classifier":
            assert "classifier.weight" in text
            assert "config is changed: num_labels 2 (was 3), output_attentions False" in text
            assert "is_decoder False (was True)" in text
        else:
            assert "config is changed" not in text
        timings = json.loads((output / "timings.json").read_text())
        losses[name] = [interval["loss"] for interval in timings["intervals"]]
        saved = transformers.AutoModelForQuestionAnswering.from_pretrained(output / "model")
        assert saved.config.num_labels == 2 and not saved.config.output_attentions
    assert losses["classifier"] == losses["encoder"]


@pytest.mark.parametrize("kind", ["whole", "half", "sharded", "old names", "with more"])
def test_every_weight_is_the_files(kind, train, copied_model, monkeypatch):
    """However it is saved: in half precision, in shards, with the names of 2018."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(copied_model)
    if kind == "half":
        model.half().save_pretrained(copied_model)
    if kind == "sharded":
        (copied_model / "model.safetensors").unlink()
        model.save_pretrained(copied_model, max_shard_size="20KB")
    if kind == "old names":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

        def rename_old(weights):
            for new, name in old.items():
                weights = {one.replace(new, name): tensor for one, tensor in weights.items()}
            return weights

        change_weights(copied_model, rename_old)
    if kind == "with more":
        change_config(copied_model, num_hidden_layers=1)
    said = []
    monkeypatch.setattr(train, "log", said.append)
    loaded = load(train, copied_model).state_dict()
    for name, tensor in model.state_dict().items():
        if name in loaded or kind != "with more":
            assert torch.equal(loaded[name], tensor.float()), name
    unused = [
        "the model's file has 2 layers, its config.json asks for 1: those after them are left out",
        "16 weights of the model's file are not used: bert.encoder.layer.1",
    ]
    assert said == (unused if kind == "with more" else [])


def test_dropout_that_the_model_does_not_have(train, copied_model, monkeypatch):
    monkeypatch.setattr(train, "DROPOUT_NAMES", ("other_dropout",))
    with pytest.raises(train.Problem, match="--dropout: a bert has no other_dropout"):
        load(train, copied_model, "--dropout", "0.1")
    load(train, copied_model)


def test_library_says_all_that_it_has_to_say(train):
    path = "/store/" + "x" * 250
    text = f"It looks like the config file at\n '{path}/config.json' is not a valid JSON file."
    assert path in train.one_line(OSError(text))
    assert not train.one_line(OSError(text)).endswith(".")
    assert len(train.one_line(OSError("word " * 1000))) <= 500
    assert "'frobnicate'" in train.one_line(KeyError("frobnicate"))


def test_model_that_is_not_there(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("--model", tmp_path / "empty", says=["--model", "no config.json"])
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd/tokenizer.json", b"{")
    write(tmp_path / "odd/config.json", b'{"model_type": "bert"')
    refused("--model", tmp_path / "odd", says=["--model"])


def test_model_of_another_family(refused, copied_model):
    config = transformers.GPT2Config(vocab_size=2000, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2ForQuestionAnswering(config).save_pretrained(copied_model)
    refused("--model", copied_model, says=["--model", "gpt2", "BERT"])


def test_folder_without_a_tokenizer(refused, copied_model):
    for name in ("tokenizer.json", "vocab.txt"):
        (copied_model / name).unlink(missing_ok=True)
    refused("--model", copied_model, says=["--model", "tokenizer.json"])


def test_tokenizer_of_another_model(refused, copied_model):
    config = transformers.AutoConfig.from_pretrained(copied_model)
    config.vocab_size = 100
    config.save_pretrained(copied_model)
    refused("--model", copied_model, says=["--model", "100", "give the tokenizer of this model"])


def test_weights_that_are_damaged_or_missing(refused, copied_model, good_file):
    words = ("--model", copied_model, *both_files(good_file), *SHORT)
    weights = copied_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    refused(*words, says=["--model", copied_model, "weights"])
    weights.unlink()
    refused(*words, says=["--model", copied_model, "model.safetensors"])


def test_weights_of_other_names(refused, copied_model, good_file):
    """They would all be drawn at random instead, and the training come to nothing."""
    path = copied_model / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights = {f"wrapped.{name}": tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    words = ("--model", copied_model, *both_files(good_file), *SHORT)
    refused(*words, says=["--model", "weights", "bert.e"])


def test_length_beyond_the_model(refused, tiny_model):
    refused("--model", tiny_model, "--max-length", 513, says=["--max-length", "512"])


def test_length_beyond_a_short_model(train, copied_model):
    """The line names both options, and with them it goes on."""
    change_config(copied_model, max_position_embeddings=100)
    change_weights(copied_model, shorten_positions)
    with pytest.raises(train.Problem) as caught:
        load(train, copied_model)
    fix = re.search(r"give (--max-length 100 --stride \d+)$", str(caught.value))
    load(train, copied_model, *fix[1].split())


def test_offline_node_with_an_empty_cache(refused, tiny_model, good_file, tmp_path):
    # The libraries read the variables when they are imported.
    patch = "import huggingface_hub.constants as hub\n"
    patch += f"hub.HF_HUB_OFFLINE, hub.HF_HUB_CACHE = True, {str(tmp_path)!r}\n"
    says = ["--model google-bert/bert-base-uncased", "prepare.sh"]
    refused(says=says, patch=patch)
    # What can be seen at once is said first, as fetching a model may take minutes.
    words = ("--train-file", tmp_path / "nowhere.json")
    refused(*words, says=["nowhere.json"], patch=patch)
    patch += "import datasets.config\ndatasets.config.HF_HUB_OFFLINE = True\n"
    patch += f"datasets.config.HF_DATASETS_CACHE = {str(tmp_path)!r}\n"
    says = ["rajpurkar/squad train", "prepare.sh", "--train-file"]
    refused("--model", tiny_model, says=says, patch=patch)
    says = ["rajpurkar/squad validation", "prepare.sh", "give --validation-file"]
    refused("--model", tiny_model, "--train-file", good_file, says=says, patch=patch)


# 4. Outputs


def test_output_that_cannot_be(refused, tmp_path):
    file = write(tmp_path / "file", b"x")
    refused("--sample", "--output", file, says=[file])
    refused("--sample", "--output", file / "below", says=[file / "below"])
    refused("--sample", "--output", "/proc/none/here", says=["/proc/none"])
    refused("--sample", "--output", tmp_path / ("x" * 300), says=["xxx"])
    refused("--sample", "--output", os.fsdecode(b"not-utf-8-\xff"), says=["--output"])
    assert file.read_bytes() == b"x"


def tree(folder):
    """{path: its content} of all files of a folder but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("place", ["model", "model/below", "model.tmp", "."])
def test_model_that_lies_where_the_run_writes(place, refused, tiny_model, good_file, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(tiny_model, output / place)
    before = tree(output)
    words = ("--model", output / place, *both_files(good_file), *SHORT, "--output", output)
    refused(*words, says=["--model", output / place, "choose another --output"])
    # By another name, and though an earlier life has left a checkpoint.
    (tmp_path / "link").symlink_to(output)
    (output / "checkpoint.pt").touch()
    refused(*words[:-1], tmp_path / "link", says=["--model", output / place])
    (output / "checkpoint.pt").unlink()
    assert tree(output) == before


@pytest.mark.parametrize("name", ["model/precious.txt", "predictions.json", "timings.json"])
def test_output_that_holds_files_of_others(name, refused, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    output = tmp_path / "run"
    (output / ".lock").touch()  # as a start that was refused leaves it
    first = output / name.split("/")[0]
    refused("--sample", *SHORT, "--output", output, says=[f"{first} is there already", "move it"])
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["model", "model.tmp", "predictions.json", "timings.json", "link"])
def test_output_of_other_kinds(name, start, refused, tmp_path):
    """Files for folders and folders for files, which a run would meet at its end alone."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "checkpoint.pt").touch()
    path = output / name
    if name == "link":
        path = output / "model"
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    elif name.endswith(".json"):
        path.mkdir()
    else:
        path.touch()
    refused("--sample", *SHORT, "--output", output, says=[f"{path} is there already", "move it"])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_output_of_somebody_else(refused, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    # pytest's folders are root's alone: it has to stand inside beforehand.
    patch = f"os.chdir({str(folder)!r})\n"
    patch += "os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n"
    refused("--sample", "--output", "run", says=["run", "ermission"], patch=patch)
    assert not list(folder.iterdir())


# 5. Hostile content


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_models_pickle_is_not_run(refused, copied_model, good_file, tmp_path):
    (copied_model / "model.safetensors").unlink()
    words = ("--model", copied_model, *both_files(good_file), *SHORT)
    bomb = Bomb(tmp_path / "exploded")
    path = copied_model / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(bomb))
    refused(*words, says=["--model", copied_model])
    # As torch writes them today.
    torch.save({"qa_outputs.bias": bomb}, path)
    refused(*words, says=["--model", copied_model])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["plain", "zip"])
def test_code_in_a_checkpoints_pickle_is_not_run(kind, refused, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    path = tmp_path / "refused/checkpoint.pt"
    path.parent.mkdir()
    path.write_bytes(bomb)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("checkpoint/data.pkl", bomb)
            file.writestr("checkpoint/version", "3\n")
    before = path.read_bytes()
    words = ("--sample", "--max-steps", 2, "--no-profile")
    refused(*words, says=[path, "remove it"], left=["checkpoint.pt"])
    assert not (tmp_path / "exploded").exists()
    assert path.read_bytes() == before


def test_code_of_a_model_is_not_run(start, copied_model, good_file, tmp_path):
    code = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\nEvil = object\n"
    (copied_model / "evil.py").write_text(code)
    kinds = ("AutoConfig", "AutoModelForQuestionAnswering", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((copied_model / name).read_text())
        content["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
        write(copied_model / name, content)
    words = ("--model", copied_model, *both_files(good_file), *SHORT)
    # It trains or refuses.
    start(*words, "--output", tmp_path / "run").end(None)
    assert not (tmp_path / "exploded").exists()


def test_names_do_not_lead_out_of_the_output(start, tiny_model, tmp_path):
    ids = ["../../escaped", "/escaped", "a\0b", "$(touch escaped)", "`id`", "x" * 5000, " ", "\n"]
    content = document()
    content["data"][0]["title"] = "../../title"
    [paragraph] = content["data"][0]["paragraphs"]
    [question] = paragraph["qas"]
    paragraph["qas"] = [{**question, "id": name} for name in ids]
    folder = tmp_path / "box"
    folder.mkdir()
    path = write(folder / "q $(touch a) ;'\".json", content)
    output = folder / "out $(touch b) ;'\" ñ"
    before = set(tmp_path.rglob("*"))
    start("--model", tiny_model, *both_files(path), *SHORT, "--output", output).end()
    assert set(json.loads((output / "predictions.json").read_text())) == set(ids)
    for new in set(tmp_path.rglob("*")) - before:
        assert new == output or output in new.parents or new.name == "life-0.log"


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_awkward_texts_are_trained_on(batching, start, tiny_model, tmp_path):
    texts = ["\0", "\ufeffx", "é" * 3, "e\u0301 e\u0301", "ﷺ ﬁ", "👩‍👩‍👧 x", "日本語"]
    texts += ["a" * 3000, "[SEP] [CLS]"]
    paragraphs = []
    for number, text in enumerate(texts):
        context = f"{text} cluster {text}"
        answers = [{"text": "cluster", "answer_start": context.index("cluster")}]
        question = {"id": str(number), "question": text, "answers": answers}
        paragraphs.append({"context": context, "qas": [question]})
    path = write(tmp_path / "q.json", {"data": [{"paragraphs": paragraphs}]})
    words = ("--model", tiny_model, *both_files(path), *SHORT, "--batching", batching)
    start(*words, "--output", tmp_path / "run").end()
    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    assert len(predictions) == len(texts)


def test_context_of_a_million_characters(build, tmp_path):
    context = "cluster of nodes. " * 60_000
    answers = [{"text": "nodes.", "answer_start": context.rindex("nodes.")}]
    path = write(tmp_path / "q.json", document(context, answers=answers))
    begin = time.monotonic()
    _, features = build(path, 384, 128)
    assert time.monotonic() - begin < 60
    assert len(features["begin"]) > 100
    # The last window alone has the answer.
    assert features["start"][-1] > 0


# 6. Question files drawn at random

words = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(
    ["", " ", "\0", "\ud800", "the cluster", "../x", "İ", "ﬁ", "\u202e", "[SEP]", "a\u0301", "##"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
)


@st.composite
def question_files(draw):
    """Mostly of SQuAD's shape, with a leaf or a branch here and there that is not."""

    def odd(usual):
        return draw(trees) if draw(st.integers(0, 30)) == 0 else usual

    paragraphs = []
    for _ in range(draw(st.integers(0, 3))):
        context = draw(words) + " cluster " + draw(words)
        questions = []
        for _ in range(draw(st.integers(0, 3))):
            begin = draw(st.integers(0, len(context) - 1))
            end = draw(st.integers(begin + 1, len(context)))
            answer = {"text": odd(context[begin:end]), "answer_start": odd(begin)}
            answers = odd([answer] * draw(st.integers(1, 2)))
            question = {"id": odd(draw(words)), "question": odd(draw(words)), "answers": answers}
            questions.append(odd(question))
        paragraphs.append(odd({"context": odd(context), "qas": odd(questions)}))
    return odd({"data": odd([odd({"paragraphs": odd(paragraphs)})])})


@pytest.fixture(scope="module")
def read_or_refuse(train, build, tmp_path_factory):
    """read_or_refuse(content): a file is read, or refused in one line. Nothing else may happen."""
    path = tmp_path_factory.mktemp("drawn") / "q.json"

    def check(content):
        write(path, content)
        try:
            examples, features = build(path, 32, 4)
        except train.Problem as problem:
            line = str(problem)
            assert line.startswith(f"{path}: ") and len(line) < 900
            # It can be printed.
            line.encode()
            return
        lengths = features["begin"][1:] - features["begin"][:-1]
        assert 4 <= lengths.min() and lengths.max() <= 32
        assert (features["start"] <= features["end"]).all()
        assert (features["end"] < lengths).all()
        assert set(features["example"]) == set(range(len(examples)))
        assert len(features["input_ids"]) == features["begin"][-1]

    return check


PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=60, **PATIENT)
@given(content=question_files())
def test_drawn_file_is_read_or_refused(content, read_or_refuse):
    read_or_refuse(content)


@settings(max_examples=40, **PATIENT)
@given(content=trees | st.binary(max_size=60))
def test_any_json_or_bytes_are_read_or_refused(content, read_or_refuse):
    read_or_refuse(content)


@pytest.mark.slow
@settings(max_examples=600, **PATIENT)
@given(content=question_files())
def test_many_drawn_files(content, read_or_refuse):
    read_or_refuse(content)


@pytest.mark.slow
@settings(max_examples=300, **PATIENT)
@given(content=trees | st.binary(max_size=400))
def test_much_json_and_many_bytes(content, read_or_refuse):
    read_or_refuse(content)

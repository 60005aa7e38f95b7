"""Train BERT on SQuAD v1.1, as fast as it goes, and measure where the time went.

    sbatch baseline/run.sbatch [options]          on a cluster: one A100
    sbatch DISTRIBUTED/run_2x2.sbatch [options]   two nodes with two A100 each
    bash baseline/run.sbatch --sample             on a laptop: everything, in about a minute
    python train.py --model FOLDER --train-file JSON --validation-file JSON    this file alone

It leaves in --output: results.json, timings.json, predictions.json, model/ and tensorboard/. Until
it has finished there is checkpoint.pt too, from which the same command goes on. The sections below
follow the data: from the questions to features, batches, the model, the training and the results.
"""

import argparse
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import gzip
import hashlib
import json
import logging
import math
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import zlib
from importlib import metadata
from pathlib import Path

STARTED = time.perf_counter()  # before torch is imported, which takes seconds
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # without it, a warning at each fork
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's own messages out of the log

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as checkpointing
from torch.utils.tensorboard import SummaryWriter

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "baseline/sample"
CACHE = Path(os.environ.get("SQUAD_CACHE") or HERE / ".cache")
HUB_MODEL = "google-bert/bert-base-uncased"
HUB_DATA = "rajpurkar/squad"

# The BERT paper's scores (Devlin et al. 2019): BERT-Base on SQuAD v1.1's validation questions.
PAPER = {"exact_match": 80.8, "f1": 88.5}
# The usual decoding's limits (transformers' question-answering examples).
N_BEST = 20
MAX_ANSWER_TOKENS = 30
EVALUATION_BATCH_TOKENS = 16384
SAVE_SECONDS = 300
# To be raised when build_features changes: features that were kept are then made anew.
FEATURES_VERSION = 4
# A training that would take a CPU more hours than this is taken for a mistake.
CPU_HOURS = 2
# A step of warm-up for the profiler itself, then two that it records.
PROFILER_STEPS = 3
STOPPED = 75  # the exit code of a training that was asked to stop, and can go on
STOP_SIGNALS = []  # the names of the signals that have asked this process to stop


class Problem(Exception):
    """Something that the user can fix, said in one line. exit_code: 2 for arguments or input."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


# 1. Arguments


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers a bad argument in one line instead of printing its usage too."""

    def error(self, message):
        raise Problem(f"{message} (--help lists the options)")


def number(kind, least, most=2**31):
    """Returns an argparse type: a number of this kind, int or float, from least to most."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text}: give a number from {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def make_parser():
    """Returns the parser. An option whose default depends on others has None until it is known."""
    count = number(int, 1)
    whole = number(int, 0)
    fraction = number(float, 0, 0.999)
    # Far beyond what makes sense, and still planned in the memory of any machine.
    batch = number(int, 1, 100_000)
    on_or_off = argparse.BooleanOptionalAction
    batchings = ["padded", "dynamic", "bucketed", "packed"]
    summary = __doc__.split("\n")[0]
    parser = ArgumentParser(prog=f"{HERE.name}/train.py", description=summary, allow_abbrev=False)

    add = parser.add_argument_group("model and data").add_argument
    add("--model", default=HUB_MODEL, help="hub name or folder (default: %(default)s)")
    add("--train-file", help=f"questions, as JSON (default: the hub's {HUB_DATA})")
    add("--validation-file", help="likewise")
    add("--sample", action="store_true", help="baseline/sample: small data and a small model")
    add("--limit", type=count, help="the first N questions of each file (default: all)")
    add("--max-length", type=number(int, 8), default=384, help="tokens per window (default: 384)")
    add("--stride", type=whole, default=128, help="tokens that windows share (default: 128)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole, help="0 only evaluates (default: 3; sample: 20)")
    add("--max-steps", type=count, help="optimiser steps at most (default: all)")
    add("--evaluate-every", choices=["epoch", "end"], help="(default: epoch; sample, --limit: end)")
    add("--batch-size", type=batch, help="features per step (default: 32; sample: 16)")
    add("--accumulate", type=count, default=1, help="micro-batches per step (default: 1)")
    add("--learning-rate", type=fraction, help="its peak (default: by the batch; sample: 1e-3)")
    add("--warmup", type=fraction, default=0.1, help="share of the steps (default: 0.1)")
    add("--weight-decay", type=fraction, default=0.01, help="of matrices (default: 0.01)")
    dropout = number(float, 0, 0.9)  # far above it gradients overflow
    add("--dropout", type=dropout, help="probability (default: the model's; sample: 0)")
    add("--seed", type=whole, default=42, help="one seed, one training (default: 42)")

    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="(default: auto)")
    add("--batching", choices=batchings, default="packed", help="(default: packed)")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="(default: bf16; on a CPU fp32)")
    add("--compile", action=on_or_off, help="each layer (default: on a GPU)")
    add("--fused", action=on_or_off, default=True, help="AdamW in one kernel (default: on)")
    add("--cuda-graph", action="store_true", help="one launch per step (default: off)")

    add = parser.add_argument_group("what a run leaves").add_argument
    add("--output", help=f"folder (default: runs/{HERE.name}-JOBID or -DATE-TIME)")
    add("--log-every", type=count, default=10, help="steps (default: 10)")
    add("--save-every", type=count, help="steps (default: every 5 minutes)")
    add("--profile", action=on_or_off, default=True, help="trace two steps (default: on)")
    add("--prepare", action="store_true", help="only fetch model and data, build the features")
    return parser


SAMPLE_DEFAULTS = {"epochs": 20, "batch_size": 16, "learning_rate": 1e-3, "dropout": 0.0}
USUAL_DEFAULTS = {"epochs": 3, "batch_size": 32}


def parse_arguments(argv=None):
    """Returns the arguments with every default filled in; raises Problem where they do not fit."""
    args = make_parser().parse_args(argv)
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if value == "":
            raise Problem(f"{option} is empty: give a name: a shell's variable may not be set")
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value):
            raise Problem(f"{option} {value!a}: give a name of characters that can be printed")
    if args.sample:
        use_sample(args)
    for name, value in (SAMPLE_DEFAULTS if args.sample else USUAL_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.learning_rate is None:
        args.learning_rate = usual_learning_rate(args.batch_size)

    cuda = torch.cuda.is_available() and args.device != "cpu"
    if args.device == "cuda" and not cuda:
        raise Problem("--device cuda: torch sees no GPU on this node")
    if args.precision == "tf32" and not cuda:
        raise Problem("--precision tf32 is for NVIDIA GPUs: give fp32")
    if args.epochs > 10_000 and args.max_steps is None:  # every step is planned
        raise Problem("--epochs: give at most 10,000, or --max-steps as well")
    if args.stride >= args.max_length - 3:
        raise Problem("--stride: give less than --max-length - 3")
    if args.batch_size < args.accumulate:
        raise Problem("--batch-size is smaller than --accumulate: raise it")
    same_shapes = args.batching in ("padded", "packed") and args.accumulate == 1
    if args.cuda_graph and not (cuda and same_shapes and args.fused):
        fix = "give it on a GPU, with --batching packed or padded, --accumulate 1 and --fused"
        raise Problem(f"--cuda-graph: {fix}")

    args.device_type = "cuda" if cuda else "cpu"
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.attention = "sdpa"  # transformers' own
    if args.batching == "packed":
        args.attention = "packed_jagged" if cuda else "packed_loop"
    if args.compile and args.attention == "packed_loop":
        raise Problem("--compile: packed batches compile on a GPU only: give --batching bucketed")
    if args.compile is None:
        args.compile = cuda
    if args.evaluate_every is None:
        args.evaluate_every = "end" if args.sample or args.limit else "epoch"

    if args.output is None and not args.prepare:
        run_name = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
        args.output = f"runs/{HERE.name}-{run_name}"
    return args


def usual_learning_rate(batch_size):
    """Returns the peak for a batch of that many features: the 5e-5 of BERT's paper at 32, and in
    proportion to the batch's square root, the rule for Adam of Malladi et al. 2022.

    What others have reached at which batch stands in DISTRIBUTED/README.md, The learning rate."""
    return 5e-5 * math.sqrt(batch_size / 32)


def use_sample(args):
    """Points the arguments to the sample's folder, which has questions, config and vocabulary."""
    if args.train_file or args.validation_file or args.model != HUB_MODEL:
        raise Problem("--sample brings its own: leave out --model and the data's files")
    if not SAMPLE.is_dir():
        raise Problem(f"--sample needs {SAMPLE}: give --model, --train-file and --validation-file")
    args.model = str(SAMPLE)
    args.train_file = args.validation_file = str(SAMPLE / "questions.json")


# 2. What a run says and writes


def log(text):
    """Prints at once: SLURM's log is read while the job runs."""
    try:
        print(text, flush=True)
    except OSError:  # Ctrl-C ends `| tee` as well: what has been trained is saved all the same
        sys.stdout = open(os.devnull, "w")


def progress(items, description):
    """Yields the items of a list, and says every ten seconds how far it is."""
    said_at = time.perf_counter()
    for done, item in enumerate(items):
        if time.perf_counter() - said_at > 10:
            log(f"  {description}: {done / len(items):.0%}")
            said_at = time.perf_counter()
        yield item


def one_line(error):
    """Returns what a library's error says in one line, cut short where it fills a page."""
    text = repr(error) if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(text, 500, placeholder=" ...").rstrip(".")


def write_atomically(path, write, suffix=".tmp"):
    """Calls write(file) for a temporary file and renames it: path is all there, or as before.

    Raises Problem where there is no room or no permission."""
    temporary = path.with_name(path.name + suffix)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Problem(f"cannot write {path} ({error}): free some space, or choose another place")


def write_json(path, content):
    """Writes content as indented JSON, atomically; NaN is no JSON and raises ValueError."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))


# 3. Questions: a file, or the hub's data set, to a list of examples

KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a decimal number",
    bool: "true or false",
    type(None): "missing",
}
# How files begin that come in the place of JSON, what they are, and the fix.
NOT_JSON = {
    b"<<<<<<< ": "a file with git's marks of a conflict: resolve it",
    b"<": "a web page: fetch the raw file",
    b"version https://git-lfs": "a pointer of Git LFS: run git lfs pull",
    b"PK": "a zip archive: unzip it",
    b"\x1f\x8b": "a gzip within a gzip: run gunzip on it once",
    b"BZh": "compressed by bzip2: run bunzip2 on it",
    b"\xfd7zXZ": "compressed by xz: run unxz on it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: run unzstd on it",
    b"PAR1": "Parquet: convert it with datasets' Dataset.from_parquet(FILE).to_json(NEW)",
    b"ARROW1": "Arrow: convert it with pandas' read_feather(FILE).to_json(NEW, orient='records')",
    b"\xff\xff\xff\xff": "Arrow: convert it with datasets' Dataset.from_file(FILE).to_json(NEW)",
    b"\x80": "a pickle: save its records as JSON lines",
}


def read_squad(path, limit=None):
    """Reads the first `limit` questions of a file, in the form of the datasets library: a list of
    {"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}. The file has
    such records or SQuAD v1.1's nesting, as JSON or JSON lines, which gzip may have compressed.

    Raises Problem naming the file, the field and the fix; OSError where it cannot be read."""
    examples = {}
    wrong = []
    count = 0
    for document_place, document in read_documents(path):
        for place, question in find_questions(document_place, document):
            count += 1
            try:
                example = make_example(question)
                if example["id"] in examples:
                    raise Problem(f"id {example['id'][:60]!r} is there twice: give each its own")
                examples[example["id"]] = example
            except Problem as problem:
                wrong.append(f"{place or 'the top'}: {problem}")
    if wrong:
        what = f"{len(wrong):,} of {count:,} questions are wrong"
        raise Problem(f"{path}: {what}, the first at {wrong[0]}")
    if not examples:
        raise Problem(f"{path}: no question in it: give SQuAD v1.1's JSON, or records")
    return list(examples.values())[:limit]


def read_documents(path):
    """Returns [(place, document)] of a file: the items of a list of JSON, the lines of JSON lines,
    or the one object that it is. A line that is not JSON has a Problem in its place."""
    content = Path(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise Problem(f"{path}: a damaged gzip ({error}): fetch the file again")
    if content[257:262] == b"ustar":
        raise Problem(f"{path}: not JSON, but a tar archive: unpack it, and give the file in it")
    for beginning, what in NOT_JSON.items():
        if content[:100].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            raise Problem(f"{path}: not JSON, but {what}")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        # What json says of a second document: so these may be JSON lines.
        lines = parse_lines(error.doc) if getattr(error, "msg", None) == "Extra data" else []
        if not lines or isinstance(lines[0][1], Problem):
            raise Problem(f"{path}: not JSON ({error}): {fix_json(error)}")
        return lines
    if isinstance(document, list):
        return [(f"[{index}]", item) for index, item in enumerate(document)]
    return [("", document)]


def parse_lines(text):
    """Returns [(place, document)] of JSON lines."""
    lines = []
    # Not splitlines(), which would cut at U+2028 too.
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            document = Problem(f"not JSON ({str(error).replace('line 1 ', '')}): {fix_json(error)}")
        lines.append((f"line {line_number}", document))
    return lines


def fix_json(error):
    """Returns what to do about text that json.loads refuses with this error."""
    fix = "fix it there"
    cut_short = False
    if isinstance(error, UnicodeDecodeError):
        fix = "save it as UTF-8"
        cut_short = error.end == len(error.object)
    elif isinstance(error, json.JSONDecodeError):
        fix = "fix it there" if error.pos else "give JSON"
        if error.msg == "Extra data":  # several records, but not as JSON lines
            fix = "write each record on one line, with nothing between them"
        cut_short = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    return "it is cut short: fetch the file again" if cut_short else fix


def find_questions(document_place, document):
    """Yields (place, question) of each question of SQuAD's nesting, with its context in it:
    {"data": [{"paragraphs": [{"context", "qas": [question]}]}]}. What is less nested, such as a
    record, is its own article, paragraph or question."""
    for article_place, article in children(document_place, document, "data"):
        for paragraph_place, paragraph in children(article_place, article, "paragraphs"):
            questions = list(children(paragraph_place, paragraph, "qas"))
            for place, question in questions:
                if isinstance(question, dict):
                    question = {**question, "context": paragraph.get("context")}
                yield place, question
            # A paragraph without questions is passed over, but not if it has no text either.
            if not questions and paragraph.get("context", "") == "":
                yield paragraph_place, Problem("context is empty: remove the paragraph")


def children(place, item, field):
    """Yields (place, child) of each child in an object's list, or the item if it has no such."""
    if not isinstance(item, dict) or not isinstance(item.get(field), list):
        yield place, item
        return
    for index, child in enumerate(item[field]):
        yield f"{place}.{field}[{index}]".lstrip("."), child


def make_example(question):
    """Returns a question as the datasets library has it; raises Problem where it is wrong."""
    if isinstance(question, Problem):
        raise question
    check_kind(question, dict, "it")
    if "question" not in question:
        what = "it has no question, and no list called data, paragraphs or qas"
        raise Problem(f"{what}: {fix_shape(question)}")
    if all(isinstance(question.get(name), (list, dict)) for name in ("question", "context")):
        fix = "save records, as pandas' to_json(FILE, orient='records') does"
        raise Problem(f"its fields are columns: {fix}")
    name = question.get("id")
    if type(name) is int:
        name = str(name)
    check_kind(name, str, "id")
    context = question["context"]
    check_kind(context, str, "context")
    check_kind(question["question"], str, "question")
    if not context.strip():
        raise Problem("context is empty: remove it")
    if "answers" not in question:
        raise Problem("it has no answers, as in a test set: give a file with answers")
    texts, starts = list_answers(question["answers"])
    impossible = question.get("is_impossible")
    if isinstance(impossible, str):
        impossible = impossible.lower() not in ("false", "0", "no", "")
    if impossible or not texts:
        what = "it is marked is_impossible" if texts else "it has no answer"
        raise Problem(f"{what}: this is SQuAD v2, take v1.1, or remove such questions")
    for index, (text, start) in enumerate(zip(texts, starts)):
        check_kind(text, str, f"answers[{index}].text")
        check_kind(start, int, f"answers[{index}].answer_start")
        check_answer(text, start, context, f"answers[{index}]")
    return {
        "id": name,
        "question": question["question"],
        "context": context,
        "answers": {"text": texts, "answer_start": starts},
    }


def fix_shape(item):
    """Returns what to do about an object that is no question and has none where they are sought."""
    nested = [name[:30] for name, value in item.items() if isinstance(value, (list, dict))]
    if item.get("context") is not None or not nested:
        return "give one, remove it, or take another file"
    # Several splits in one file, or what the hub's viewer answers.
    names = ", ".join(repr(name) for name in nested[:3])
    return f"save each list of questions below {names} as a file of its own"


def check_kind(value, kind, name):
    """Raises Problem where a field's value is of another kind; its type, as True is an int too."""
    if type(value) is not kind:
        raise Problem(f"{name} is {KINDS[type(value)]}: give {KINDS[kind]}")
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON's escapes can spell half a character
            raise Problem(f"{name} holds half a character (a lone surrogate): fix the text")


def list_answers(answers):
    """Returns the texts and the starts of SQuAD's list of answers, or of an object of two lists or
    of one answer."""
    if not answers:
        return [], []
    if isinstance(answers, dict) and isinstance(answers.get("text"), str):
        answers = [answers]  # the only one
    if isinstance(answers, dict):
        texts = answers.get("text")
        starts = answers.get("answer_start")
        check_kind(texts, list, "answers.text")
        check_kind(starts, list, "answers.answer_start")
        if len(texts) != len(starts):
            what = f"answers has {len(texts)} in text and {len(starts)} in answer_start"
            raise Problem(f"{what}: give each text its start")
        return texts, starts
    check_kind(answers, list, "answers")
    for index, answer in enumerate(answers):
        if not isinstance(answer, dict):
            what = f"answers[{index}] is {KINDS[type(answer)]}"
            raise Problem(f"{what}: give an object of text and answer_start")
    texts = [answer.get("text") for answer in answers]
    starts = [answer.get("answer_start") for answer in answers]
    return texts, starts


def check_answer(text, start, context, name):
    """Raises Problem where an answer is not at its start in the context, naming where it is."""
    if not text:
        raise Problem(f"{name}.text is empty: remove this answer")
    if start >= 0 and context.startswith(text, start):
        return
    places = [match.start() for match in re.finditer(re.escape(text), context)]
    if not places:
        fix = "copy it from there: case, spaces and Unicode form (NFC, NFD) count"
        raise Problem(f"{name}.text {text[:60]!r} is not in the context: {fix}")
    nearest = min(places, key=lambda place: abs(place - start))
    what = f"{name}.answer_start is {str(start)[:20]}, but the text is at {nearest}"
    raise Problem(f"{what}: count the context's characters, from 0")


def read_hub(split, limit=None):
    """Reads the hub's SQuAD from the datasets library's cache, or fetches it; as read_squad."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        dataset = datasets.load_dataset(HUB_DATA, split=split)
    except Exception as error:  # the library's errors have no common class
        what = f"{HUB_DATA} {split} is not in the cache ({type(error).__name__})"
        fix = "run bash baseline/prepare.sh where there is internet"
        raise Problem(f"{what}: {fix}, or give --{split}-file")
    return dataset.select(range(min(limit or len(dataset), len(dataset)))).to_list()


# 4. Features: windows of tokens, as the tokenizer's usual call cuts them

SUMMARY = [
    "questions",
    "features",
    "features without an answer",
    f"answers over {MAX_ANSWER_TOKENS} tokens",
    "answers that no window holds",
    "answers that do not fall on tokens' edges",
]


def build_features(examples, tokenizer, args, source, longest=2**31):
    """Tokenises each question with its context, cut into windows of at most --max-length tokens,
    of which the model could take `longest`.

    Returns arrays; the windows' tokens lie end to end:
      input_ids, token_types [tokens]; offsets [tokens, 2]: their characters in the context;
      begin [windows + 1]: where each window's tokens begin;
      example [windows]: whose window it is;
      context_first, context_end [windows]: the context's first token within it, and the one after
      its last;
      start, end [windows]: the answer's first and last token within it, or 0, 0 (the classification
      token) where it does not hold the whole answer;
      summary [6]: the counts that SUMMARY names.
    Raises Problem, with source, the file's name, where a question leaves no room for a context."""
    check_questions_fit(examples, tokenizer, args, source, longest)
    columns = collections.defaultdict(list)
    without_word = []
    for first in progress(range(0, len(examples), 1000), f"tokenising {source}"):
        batch = examples[first : first + 1000]
        encoding = tokenizer(
            [example["question"].lstrip() for example in batch],
            [example["context"] for example in batch],
            truncation="only_second",
            max_length=args.max_length,
            stride=args.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,  # some tokenizers leave them out if they are not asked
        )
        for window, index in enumerate(encoding["overflow_to_sample_mapping"]):
            input_ids = encoding["input_ids"][window]
            offsets = np.array(encoding["offset_mapping"][window], np.int32)
            sequence_ids = encoding.sequence_ids(window)  # 0: question, 1: context, None: special
            if 1 not in sequence_ids:
                without_word.append(batch[index]["id"])
                continue
            context_first = sequence_ids.index(1)
            context_end = len(sequence_ids) - sequence_ids[::-1].index(1)
            start, end = find_answer(batch[index], offsets[context_first:context_end])
            columns["input_ids"].append(np.array(input_ids, np.int32))
            columns["token_types"].append(np.array(encoding["token_type_ids"][window], np.int8))
            columns["offsets"].append(offsets)
            columns["example"].append(first + index)
            columns["context_first"].append(context_first)
            columns["context_end"].append(context_end)
            columns["start"].append(0 if start is None else context_first + start)
            columns["end"].append(0 if end is None else context_first + end)
    if without_word:
        what = f"{len(without_word):,} of {len(examples):,} questions have no word in their context"
        raise Problem(f"{source}: {what}, the first is {without_word[0][:60]!r}: remove them")
    lengths = [len(ids) for ids in columns["input_ids"]]
    features = {"begin": np.concatenate([[0], np.cumsum(lengths)])}
    for name, column in columns.items():
        per_token = name in ("input_ids", "token_types", "offsets")
        features[name] = np.concatenate(column) if per_token else np.array(column, np.int32)
    features["summary"] = summarise(examples, features, tokenizer)
    return features


def check_questions_fit(examples, tokenizer, args, source, longest):
    """Raises Problem where a window has no room for context beside the question and the overlap."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    wrong = []
    longest_question = 0  # of the wrong ones: what is right for it is right for all
    for first in range(0, len(examples), 1000):
        batch = examples[first : first + 1000]
        questions = [example["question"].lstrip() for example in batch]
        encoding = tokenizer(questions, add_special_tokens=False)
        for example, question in zip(batch, encoding["input_ids"]):
            room = args.max_length - special - len(question)
            if room > args.stride and not example["context"].isspace():
                continue
            context = tokenizer(example["context"], add_special_tokens=False)["input_ids"]
            if not 0 < len(context) <= room:
                longest_question = max(longest_question, len(question))
                what = f"{example['id'][:60]!r} ({len(question)} tokens, context {len(context)})"
                wrong.append(what)
    if wrong:
        what = f"{len(wrong):,} of {len(examples):,} questions do not fit, the first is {wrong[0]}"
        used = longest_question + special
        max_length = max(args.max_length, min(longest, used + 1 + args.stride))
        stride = min(args.stride, (max_length - used) // 2)
        fix = f"give --max-length {max_length} --stride {stride}"
        if used >= longest:
            most = longest - special - 1
            fix = f"shorten them to {most} tokens, as the model has {longest} positions"
        raise Problem(f"{source}: {what}: {fix}")


def find_answer(example, offsets):
    """Returns which of these tokens of the context are the first answer's first and last.

    offsets [tokens, 2]: each token's characters. Returns None, None where it is not all there."""
    answer_start = example["answers"]["answer_start"][0]
    answer_end = answer_start + len(example["answers"]["text"][0])
    if offsets[0, 0] > answer_start or offsets[-1, 1] < answer_end:
        return None, None
    first = offsets[:, 0].searchsorted(answer_start, side="right") - 1
    last = offsets[:, 1].searchsorted(answer_end, side="left")
    return first, last


def summarise(examples, features, tokenizer):
    """Returns the counts that SUMMARY names. Of several answers to a question, its first counts."""
    labels = {}  # by question: the answer's first and last token in a window, and its offsets
    for window in np.flatnonzero(features["start"]):
        begin, end = features["begin"][window : window + 2]
        label = (features["start"][window], features["end"][window], features["offsets"][begin:end])
        labels[features["example"][window]] = label
    over_limit = 0
    off_edges = 0
    for index, example in enumerate(examples):
        context = example["context"]
        if index in labels:
            first, last, offsets = labels[index]
        else:  # as if a window could hold all of the context
            encoding = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
            offsets = np.array(encoding["offset_mapping"])
            first, last = find_answer(example, offsets)
        if first is None:
            off_edges += 1
            continue
        if last - first + 1 > MAX_ANSWER_TOKENS:
            over_limit += 1
        # Some tokenizers' tokens begin with the space before a word.
        spelled = context[offsets[first, 0] : offsets[last, 1]].strip()
        if spelled != example["answers"]["text"][0].strip():
            off_edges += 1
    windows = len(features["start"])
    without_answer = windows - np.count_nonzero(features["start"])
    in_no_window = len(examples) - len(labels)
    counts = [len(examples), windows, without_answer, over_limit, in_no_window, off_edges]
    return np.array(counts)


def load_features(path, split, tokenizer, args, longest=2**31):
    """Returns the features of a file, or of the hub's split: from the cache, or built and kept.

    Besides build_features' arrays: lengths [windows]; examples, of the validation questions alone,
    for the answers; content, a hash of the file; cached, whether the cache had them; seconds, the
    time that this took."""
    begin = time.perf_counter()
    source = path or f"{HUB_DATA} {split}"
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else source
    forget_last_call(tokenizer)
    tokenizer_content = tokenizer.backend_tokenizer.to_str()
    recipe = [
        FEATURES_VERSION,
        MAX_ANSWER_TOKENS,
        split,
        content,
        tokenizer_content,
        tokenizer.truncation_side,
        args.limit,
        args.max_length,
        args.stride,
    ]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    file = CACHE / f"features-{key}.npz"
    features = read_features(file)
    cached = features is not None
    if not cached:
        log(f"building the features of {source}, once; they are kept in {file}")
        examples = read_squad(path, args.limit) if path else read_hub(split, args.limit)
        features = build_features(examples, tokenizer, args, source, longest)
        forget_last_call(tokenizer)
        if split == "validation":
            features["examples"] = np.frombuffer(json.dumps(examples).encode(), np.uint8)
        else:
            del features["offsets"]  # two thirds of the file, and only answers need them
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            suffix = f".{os.getpid()}.tmp"  # several jobs may build the same features
            write_atomically(file, lambda out: np.savez(out, **features), suffix)
        except (OSError, Problem) as error:
            log(f"the features are not kept: {error}")
    counts = [f"{count:,} {what}" for count, what in zip(features["summary"], SUMMARY)]
    unknown = np.mean(features["input_ids"] == tokenizer.unk_token_id)
    log(f"{source}: {', '.join(counts)}, {unknown:.1%} of the tokens unknown")
    features["lengths"] = np.diff(features["begin"])
    features["content"] = content[:16]
    features["cached"] = cached
    features["seconds"] = time.perf_counter() - begin
    return features


def forget_last_call(tokenizer):
    """Undoes what a call leaves set in a tokenizer: it is no part of the features' key, nor of what
    model/ is to hold."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def read_features(file):
    """Returns the arrays that were kept, or None where there are none, or none that can be read."""
    try:
        with np.load(file) as arrays:  # without pickles; a zip checks its sums
            return dict(arrays)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, numpy and the file system each have their own
        log(f"{file} cannot be read ({error}) and is made again")
        return None


# 5. Batches: which features each has, planned for all of the training before it begins


def plan_epoch(lengths, args, epoch):
    """Returns an epoch's batches: features' numbers [steps, batch size]; -1 fills up the last one.

    lengths [features]: their tokens. padded and dynamic draw at random; bucketed puts features of
    like length into a batch; packed sorts the features into as many length groups as a batch has
    places and draws one of each group, so that all batches have nearly the same number of tokens.
    """
    random = np.random.default_rng((args.seed, epoch))
    order = random.permutation(len(lengths))
    steps, left_over = divmod(len(lengths), args.batch_size)
    if args.batching in ("bucketed", "packed"):
        order = order[np.argsort(lengths[order], kind="stable")]
        # The last, smaller batch takes features evenly spread over all lengths.
        spread = (np.arange(left_over) + random.random()) * len(lengths) / max(left_over, 1)
        last = order[spread.astype(int)]
        order = np.delete(order, spread.astype(int))
        if args.batching == "packed":
            groups = order.reshape(args.batch_size, steps)  # [length groups, their features]
            batches = random.permuted(groups, axis=1).T
        else:
            batches = random.permutation(order.reshape(steps, args.batch_size))
        order = np.concatenate([batches.ravel(), last])
    missing = -len(order) % args.batch_size
    return np.pad(order, (0, missing), constant_values=-1).reshape(-1, args.batch_size)


def deal_batches(batches, lengths, parts):
    """Deals each batch [steps, batch size] into micro-batches of nearly equal tokens.

    The longest features go first, to and fro (1 2 3 3 2 1 1 2 ...), as captains choose teams.
    Returns [steps, parts, rows], the shortest feature of a micro-batch first."""
    missing = -batches.shape[1] % parts
    batches = np.pad(batches, ((0, 0), (0, missing)), constant_values=-1)
    sizes = np.where(batches < 0, 0, lengths[batches])
    longest_first = np.argsort(-sizes, axis=1, kind="stable")
    batches = np.take_along_axis(batches, longest_first, axis=1)
    rounds = batches.reshape(len(batches), -1, parts)  # [steps, rows, parts]
    rounds[:, 1::2] = rounds[:, 1::2, ::-1]
    return rounds.transpose(0, 2, 1)[:, :, ::-1].copy()  # [steps, parts, rows], shortest first


def plan_training(lengths, args):
    """Plans every micro-batch of the training. Returns arrays:

      features [steps, micro-batches, rows]: which features are in it, -1: none in this row;
      width [steps, micro-batches]: the tokens to which its rows are padded; if packed, the longest
      feature's of the training, which no sequence exceeds;
      row_tokens, a number: packed alone, the length of a packed row;
      cu_seqlens [steps, micro-batches, sequences + 1]: packed alone, see pack_rows;
      count, tokens, squares, computed [steps]: the features, their tokens, the sum of their squared
      lengths, and the tokens that are computed, padding among them;
    and steps_per_epoch."""
    parts = args.accumulate
    epochs = []
    for epoch in range(args.epochs):
        batches = plan_epoch(lengths, args, epoch)
        epochs.append(deal_batches(batches, lengths, parts))
        if args.max_steps and len(epochs) * len(epochs[0]) >= args.max_steps:
            break
    features = np.concatenate(epochs)[: args.max_steps]
    sizes = np.where(features < 0, 0, lengths[features])  # [steps, parts, rows]
    rows = sizes.shape[2]
    plan = {
        "features": features,
        "steps_per_epoch": len(epochs[0]),
        "count": (sizes > 0).sum(axis=(1, 2)),
        "tokens": sizes.sum(axis=(1, 2)),
        "squares": (sizes**2).sum(axis=(1, 2)),
    }
    if args.batching == "packed":
        plan["cu_seqlens"] = pack_rows(sizes)
        plan["row_tokens"] = int(plan["cu_seqlens"].max())
        plan["width"] = np.full(features.shape[:2], sizes.max())
        plan["computed"] = plan["cu_seqlens"][:, :, -1].sum(axis=1)
    else:
        plan["width"] = padded_widths(sizes, args)
        plan["computed"] = rows * plan["width"].sum(axis=1)
    return plan


def padded_widths(sizes, args):
    """Returns the tokens that each micro-batch's rows are padded to [steps, micro-batches]."""
    if args.batching == "padded":
        return np.full(sizes.shape[:2], args.max_length)
    # Where layers are compiled, few different widths: each is a compilation.
    multiple = 64 if args.compile else 8
    longest = np.maximum(sizes.max(axis=2), 1)
    widths = -(-longest // multiple) * multiple
    return np.minimum(widths, args.max_length)


def pack_rows(sizes):
    """Lays each micro-batch's features end to end, in rows of one length for the whole training,
    since a shape that never changes is compiled once.

    sizes [steps, micro-batches, features]: their tokens, or 0 for no feature: then one token
    stands for it. Returns cu_seqlens [steps, micro-batches, sequences + 1], a name from flash
    attention: where each sequence begins, then the row's end. What is left of the row is cut into
    sequences too. None is longer than the longest feature, and none is empty: nested tensors are
    told these bounds, so that they need not ask the device for them."""
    ends = np.maximum(sizes, 1).cumsum(axis=2)
    last_ends = ends[:, :, -1:]
    longest = max(int(sizes.max()), 2)
    # Enough pieces that none is longer than the longest feature, and room for a token in each;
    # 7 is the most that rounding up to eights adds.
    spread = int(last_ends.max() - last_ends.min())
    pieces = math.ceil((spread + 7) / (longest - 1))
    row_tokens = math.ceil((int(last_ends.max()) + pieces) / 8) * 8  # tensor cores take eights
    unused = row_tokens - last_ends
    piece_ends = last_ends + unused * np.arange(1, pieces + 1) // pieces
    begin = np.zeros_like(last_ends)
    return np.concatenate([begin, ends, piece_ends], axis=2).astype(np.int32)


def plan_to_device(plan, device):
    """Copies to the device, once, what the steps take from the plan."""
    plan["device_count"] = torch.tensor(plan["count"], device=device)
    plan["device_features"] = torch.tensor(plan["features"], device=device)
    if "cu_seqlens" in plan:
        plan["device_cu_seqlens"] = torch.tensor(plan["cu_seqlens"], device=device)


def feature_table(features, tokenizer, model, device):
    """Returns what batches are cut from, copied to the device once: 60 MB for all of SQuAD.

    Takes the DataLoader's place: a batch is an index into these tensors, with no copy from the
    host, no worker and no wait."""
    names = ["input_ids", "begin", "lengths", "start", "end"]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_types")
    table = {name: torch.tensor(features[name], device=device) for name in names}
    table["first_position"] = first_position(model)
    table["pad"] = tokenizer.pad_token_id or 0
    return table


def make_batch(table, chosen, width, row_tokens=None, cu_seqlens=None):
    """Cuts a micro-batch out of the table, all of it on the device.

    chosen [rows]: features' numbers, -1: none. They are padded to width tokens [rows, width]; or
    packed, with cu_seqlens [sequences + 1] and row_tokens, end to end in one row [1, row_tokens].
    Returns a dict: inputs, the model's keyword arguments, of which transformers hands those that it
    does not know on to the attention function; real [rows, width]: where there is a token;
    places [rows, width]: where that token is in the packed row, or None; labels [rows, 2]: the
    answer's first and last token. A row without a feature holds one token, and its label is that
    one: its loss is 0, and so is its gradient."""
    device = chosen.device
    rows = len(chosen)
    present = chosen >= 0
    chosen = chosen.clamp(min=0)
    lengths = torch.where(present, table["lengths"][chosen], 1)
    columns = torch.arange(width, device=device)
    real = columns < lengths[:, None]
    if cu_seqlens is None:
        row = torch.arange(rows, device=device)[:, None]  # [rows, 1]
        position = columns.expand(rows, width)
        has_token = real
        places = None
        attention = {"attention_mask": real[:, None, None]}  # a 2-D one would be read on the host
    else:
        token = torch.arange(row_tokens, device=device, dtype=torch.int32)[None]
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1  # [1, row_tokens]
        position = token - cu_seqlens[sequence]
        row = sequence.clamp(max=rows - 1)
        has_token = sequence < rows  # else it is of the row's unused end
        places = (cu_seqlens[:rows, None] + columns).clamp(max=row_tokens - 1)
        attention = {"cu_seqlens": cu_seqlens, "max_seqlen": width}
    source = table["begin"][chosen][row] + position
    source = source.clamp(max=len(table["input_ids"]) - 1)
    inputs = {
        "input_ids": torch.where(has_token, table["input_ids"][source], table["pad"]),
        # The model itself would count on through a packed row; RoBERTa counts from its padding.
        "position_ids": position + table["first_position"],
        **attention,
    }
    if "token_types" in table:
        inputs["token_type_ids"] = torch.where(has_token, table["token_types"][source], 0).long()
    labels = torch.stack([table["start"][chosen], table["end"][chosen]], dim=1).long()
    return {
        "inputs": inputs,
        "real": real,
        "places": places,
        "labels": labels * present[:, None],
    }


# 6. Model


def packed_jagged(module, query, key, value, mask, cu_seqlens, max_seqlen, dropout=0.0, **_):
    """Attention within each of the sequences that lie end to end in one row, on a GPU.

    query, key, value: [1, heads, tokens, size]; cu_seqlens [sequences + 1]: where each begins, then
    the row's end, as pack_rows has it; max_seqlen: none is longer; dropout: a probability.
    Returns [1, tokens, heads, size], and None for the weights. As torch's nested tensors of layout
    jagged they get flash attention's kernels for variable lengths (Dao 2023), without padding."""
    # The bounds are given, as finding them would wait for the device.
    lengths = {"offsets": cu_seqlens, "min_seqlen": 1, "max_seqlen": max_seqlen}
    nested = []
    for tensor in (query, key, value):
        tokens = tensor[0].transpose(0, 1)  # [tokens, heads, size]
        nested.append(torch.nested.nested_tensor_from_jagged(tokens, **lengths).transpose(1, 2))
    output = F.scaled_dot_product_attention(*nested, dropout_p=dropout)
    return output.transpose(1, 2).values()[None], None


def packed_loop(module, query, key, value, mask, cu_seqlens, dropout=0.0, **_):
    """The same, one sequence after the other: for a CPU, where nested tensors are much slower."""
    lengths = cu_seqlens.diff().tolist()
    # split, not slices: each slice's backward pass would fill a tensor of the row's size.
    sequences = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    outputs = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) for q, k, v in sequences]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("packed_jagged", packed_jagged)
transformers.AttentionInterface.register("packed_loop", packed_loop)


FAMILY = "give one of BERT's family, as BERT, RoBERTa, ELECTRA, DistilBERT"
# What --dropout sets, as BERT and as DistilBERT name it.
DROPOUT_NAMES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
DROPOUT_NAMES += ("dropout", "attention_dropout", "qa_dropout")


def load_tokenizer(args):
    """Returns the model's tokenizer and config; raises Problem on what cannot be trained here."""
    where = f"--model {args.model}"
    check_model_folder(args.model, where)
    fix = "give a folder that is there, or run bash baseline/prepare.sh for a model of the hub"
    if Path(args.model).is_dir():
        fix = "give a folder that save_pretrained has written"
    with explain_loading(args.model, fix):
        is_adapter = transformers.utils.find_adapter_config_file(args.model) is not None
    if is_adapter:
        what = "has a PEFT adapter, which would be left out"
        raise Problem(f"{where} {what}: merge it first, with merge_and_unload(), and save that")
    with explain_loading(args.model, fix):
        fields, _ = transformers.PreTrainedConfig.get_config_dict(args.model)
        check_kind_of_model(fields, where)
        config = transformers.AutoConfig.from_pretrained(args.model)
    check_config(config, where)
    with explain_loading(args.model, fix):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    check_tokenizer(tokenizer, config, args.model)
    return tokenizer, config


def check_model_folder(name, where):
    """Raises Problem where --model names a folder that is not there, or that holds no model."""
    folder = Path(name)
    if "://" in name:
        raise Problem(f"{where} is an address: give the hub's name alone, as {HUB_MODEL}")
    is_path = name.count("/") > 1 or name.startswith(("/", ".", "~"))  # the hub has owner/model
    if is_path and not folder.exists():
        raise Problem(f"{where}: there is no such folder: give one that holds a model")
    names = {folder.name}
    if folder.is_dir():
        names = {file.name for file in folder.iterdir() if file.exists()}  # not a link to nothing
    if "checkpoint.pt" in names:
        raise Problem(f"{where} is a run that has not finished: finish it, then give its model/")
    if folder.is_file():
        raise Problem(f"{where} is a file: give the folder that it is in")
    if not folder.is_dir():
        return
    # A run's folder has model/, and the hub's cache models--OWNER--NAME/snapshots/HASH.
    below = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    below += folder.glob("models--*/snapshots/*/config.json")
    if "config.json" not in names and below:
        raise Problem(f"{where} has no config.json: give {min(below).parent}, which has one")
    if not {"config.json", "adapter_config.json"} & names:
        fix = "give a folder that save_pretrained has written"
        if "bert_config.json" in names:
            fix = "it is for TensorFlow: convert it, and save it with save_pretrained"
        raise Problem(f"{where} has no config.json: {fix}")
    tokenizer_files = {"tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model"}
    if not tokenizer_files & names:
        raise Problem(f"{where} has no tokenizer.json: save the tokenizer in the same folder")


@contextlib.contextmanager
def explain_loading(name, fix):
    """Makes a Problem of whatever a library raises as it reads the model's files: of the file that
    is damaged, or else of what the library says, with this fix."""
    try:
        yield
    except Problem:
        raise
    except Exception as error:  # transformers, safetensors, pickle: they have no common class
        what = f"{one_line(error) or type(error).__name__}: {fix}"
        raise Problem(f"--model {name}: {damaged_file(name) or what}")


def damaged_file(name):
    """Returns which file of a model's folder cannot be read, and the fix, or None."""
    for file in sorted(Path(name).glob("*")):
        if file.suffix not in (".json", ".txt", ".safetensors", ".bin") or not file.is_file():
            continue
        try:
            with open(file, "rb") as opened:
                beginning = opened.read(100)
            lfs = b"version https://git-lfs"
            if beginning.startswith(lfs):
                return f"{file} is {NOT_JSON[lfs]}"
            if not beginning:
                return f"{file} is empty: fetch it again"
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix != ".txt":
                read_shapes(file)
        except OSError as error:
            return f"{file}: {error.strerror}: make it readable, with chmod"
        except pickle.UnpicklingError:  # what it says goes on for a page
            return f"{file} is damaged, or holds more than tensors: save its state_dict() alone"
        except Exception as error:
            fix = fix_json(error) if file.suffix == ".json" else "fetch it again"
            return f"{file} is damaged ({one_line(error)}): {fix}"


def read_shapes(file):
    """Returns the tensors of a file of weights, by name, with their shape and dtype alone."""
    return transformers.modeling_utils.load_state_dict(file, map_location="meta")


def check_kind_of_model(fields, where):
    """Raises Problem where config.json's fields are those of a model that cannot be loaded here."""
    kind = fields.get("model_type")
    if kind is not None and kind not in transformers.CONFIG_MAPPING:
        what = f"model_type in its config.json is {kind!r}, which transformers does not know"
        raise Problem(f"{where}: {what}: write the model's own, as bert")
    if fields.get("quantization_config"):
        what = "its weights are quantised (quantization_config in its config.json)"
        raise Problem(f"{where}: {what}: give the model before quantisation")


def check_config(config, where):
    """Raises Problem where config.json has no model for questions, or a field out of its range."""
    if type(config) not in transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING:
        raise Problem(f"{where} is a {config.model_type}: {FAMILY}")
    layers = getattr(config, "num_hidden_layers", 1)
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "hidden_size", heads)
    padding = getattr(config, "pad_token_id", None) or 0
    words = getattr(config, "vocab_size", 1)
    checks = [
        ("num_hidden_layers", layers >= 1, "at least 1"),
        ("num_attention_heads", heads >= 1 and size % heads == 0, f"a divisor of {size}"),
        ("pad_token_id", padding < words, f"less than vocab_size, {words}"),
    ]
    for name in ("hidden_act", "activation"):
        known = getattr(config, name, "gelu") in transformers.activations.ACT2FN
        checks.append((name, known, "gelu, if it was that"))
    for name in DROPOUT_NAMES:
        probability = getattr(config, name, None) or 0
        checks.append((name, 0 <= probability < 1, "less than 1"))
    for name, is_right, fix in checks:
        if not is_right:
            field = config.attribute_map.get(name, name)  # as DistilBERT calls it
            what = f"{field} in its config.json is {getattr(config, name)!r}"
            raise Problem(f"{where}: {what}: give {fix}")


def check_tokenizer(tokenizer, config, name):
    """Raises Problem where the tokenizer does not fit the model, or marks no pair of texts; says
    what may be a mistake."""
    where = f"--model {name}"
    if not tokenizer.is_fast:
        raise Problem(f"{where}: it has no fast tokenizer (tokenizer.json): save one there")
    words = max(tokenizer.get_vocab().values()) + 1
    if words > config.vocab_size:
        what = f"its tokenizer has {words} words, its config {config.vocab_size}"
        raise Problem(f"{where}: {what}: give the tokenizer of this model")
    if words < 0.9 * config.vocab_size:  # some models have a few more, for a round number
        what = f"the tokenizer has {words:,} words, the model {config.vocab_size:,}"
        log(f"{what}: is it this model's own?")
    with explain_loading(name, "give the tokenizer of this model"):
        encoding = tokenizer("a", "b", return_token_type_ids=True)
        sequence_ids = encoding.sequence_ids(0)  # BERT's: None, 0, None, 1, None
        between = sequence_ids[sequence_ids.index(0) : sequence_ids.index(1)]
    if sequence_ids[0] is not None or None not in between:
        what = "its tokenizer puts no [CLS] before a question, or no [SEP] after it"
        raise Problem(f"{where}: {what}: set its post_processor, and save it again")
    if getattr(config, "type_vocab_size", 0) > 1 and not any(encoding["token_type_ids"]):
        log("the tokenizer gives all tokens type 0, though the model knows several token types")


# What is taken for granted here, and what another task may have left otherwise in config.json.
CONFIG = {
    "num_labels": 2,  # logits: the answer's first and last token
    "output_attentions": False,  # a model with another attention function cannot be saved with it
    "output_hidden_states": False,
    "return_dict": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,  # a packed row is in no such chunks
}


def adapt_config(config, args):
    """Sets what the training relies on, and says what was otherwise."""
    changes = []
    for name, value in CONFIG.items():
        before = getattr(config, name, value)
        if before != value:
            setattr(config, name, value)
            changes.append(f"{name} {value} (was {before})")
    if changes:
        log(f"the model's config is changed: {', '.join(changes)}")
    names = [name for name in DROPOUT_NAMES if hasattr(config, name)]
    if args.dropout is not None and not names:
        raise Problem(f"--dropout: a {config.model_type} has no {DROPOUT_NAMES[0]}: leave it out")
    for name in names:
        if args.dropout is not None:
            setattr(config, name, args.dropout)
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        what = f"position_embedding_type {positions}, which transformers has no more"
        raise Problem(f"--model {args.model}: {what}: give one with absolute positions")


def load_model(args, config):
    """Returns the model in fp32 on the CPU; its question-answering head, if new, is from --seed.

    The sample has no weights: all of its model is random, from --seed."""
    adapt_config(config, args)
    family = transformers.AutoModelForQuestionAnswering
    options = {"attn_implementation": args.attention, "dtype": torch.float32}
    torch.manual_seed(args.seed)
    if args.sample:
        model = family.from_config(config, **options)
        check_model(model, args)
        return model
    options |= {"config": config, "weights_only": True, "output_loading_info": True}
    # Weights of another shape are then in the loading's report, instead of an error.
    options["ignore_mismatched_sizes"] = True
    with explain_loading(args.model, "give a folder with all of its weights"):
        model, loading = family.from_pretrained(args.model, **options)
    check_model(model, args)
    check_weights(model, loading, f"--model {args.model}")
    check_floating_point(args.model)
    return model


def check_weights(model, loading, where):
    """Raises Problem where some weights are not the file's, since they would be random ones, or are
    no numbers. Says what of the file is not used."""
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, file_shape, model_shape = mismatched[0]
        what = f"{len(mismatched)} of its weights do not fit its config.json"
        shapes = f"{name} has the shape {list(file_shape)} in its file, not {list(model_shape)}"
        fix = "give the config.json that belongs to the file"
        if "qa_outputs" in name:
            fix = "give a model whose head has two labels, or none"
        raise Problem(f"{where}: {what}: {shapes}: {fix}")
    unused = sorted(loading["unexpected_keys"])
    head = {name for name in loading["missing_keys"] if "qa_outputs" in name}
    missing = sorted(loading["missing_keys"] - head)
    if missing:
        what = f"{len(missing)} of its weights are not in its file, as {missing[0]}"
        raise Problem(f"{where}: {what}: {why_missing(missing, unused, model)}")
    not_finite = [name for name, one in model.named_parameters() if not one.isfinite().all()]
    if not_finite:
        what = f"{len(not_finite)} of its weights are not finite numbers, as {not_finite[0]}"
        raise Problem(f"{where}: {what}: give a file that was saved before")
    if head:
        log("the model's head for answers is new, with random weights from --seed")
    beyond = layer_numbers(unused)
    layers = getattr(model.config, "num_hidden_layers", 0)
    if beyond and min(beyond) == layers:
        what = f"the model's file has {max(beyond) + 1} layers, its config.json asks for {layers}"
        log(f"{what}: those after them are left out")
    if unused:
        modules = sorted({".".join(name.split(".")[:4]) for name in unused})
        names = textwrap.shorten(", ".join(modules), 200, placeholder=" ...")
        log(f"{len(unused)} weights of the model's file are not used: {names}")


# Words in the names of a file's weights that tell how it was saved, and the fix.
SAVED_OTHERWISE = {
    "state_dict": "it is a training's checkpoint: save what is below state_dict alone",
    "model_state_dict": "it is a training's checkpoint: save what is below model_state_dict alone",
    "base_layer": "it has an adapter beside its weights: save what merge_and_unload() returns",
    "parametrizations": "its weights are parametrized: save after remove_parametrizations()",
}


def why_missing(missing, unused, model):
    """Returns the likely reason why a model's weights are missing in its file, and the fix."""
    layers = layer_numbers(missing)
    first = min(layers, default=0)
    asked = getattr(model.config, "num_hidden_layers", 0)
    # Of the layers that the file lacks it has nothing, and no layer by another name.
    of_layers = {name for name in model.state_dict() if layer_numbers([name]) & layers}
    is_shorter = of_layers == set(missing) and not layer_numbers(unused)
    if first and layers == set(range(first, asked)) and is_shorter:
        what = f"config.json asks for {asked} layers, the file has {first}"
        return f"{what}: set num_hidden_layers to {first}"
    for word, what in SAVED_OTHERWISE.items():
        if any(word in name.split(".") for name in unused):
            return what
    # With the family's prefix, as bert., and without it.
    for name in (missing[0], missing[0].split(".", 1)[-1]):
        words = collections.Counter(name.split("."))
        for other in unused:
            others = collections.Counter(other.split("."))
            has_more = not words - others and words != others
            if not has_more:  # the same name with words added, by a family or a wrapper
                continue
            added = ".".join(others - words)
            if added in transformers.CONFIG_MAPPING:
                return f"they are a {added}'s: give the config.json that belongs to them"
            what = f"they have {added!r} in their names there, a wrapper's"
            return f"{what}: take it out of the names"
    pattern = re.sub(r"\d+", r"\\d+", re.escape(missing[0]))  # in whichever layer
    if any(re.fullmatch(pattern, name) for name in unused):
        return f"its layers have other numbers there, as {unused[0]}: number them from 0"
    if unused:
        return f"it is another architecture's, with {unused[0]}: give its own config.json"
    return "it is not complete: fetch it again"


def layer_numbers(names):
    """Returns the set of the encoder's layers that these weights are of."""
    return {int(number) for number in re.findall(r"\.layer\.(\d+)\.", " ".join(names))}


def check_floating_point(folder):
    """Raises Problem where a folder's weights are no floating-point numbers: quantised ones would
    be taken for the numbers that they stand for."""
    pattern = r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)"
    files = [file for file in sorted(Path(folder).glob("*")) if re.fullmatch(pattern, file.name)]
    preferred = [file for file in files if file.suffix == ".safetensors"]
    for file in preferred or files:
        with explain_loading(folder, "save its weights in fp32"):
            weights = read_shapes(file)
        for name, tensor in weights.items():
            if name.endswith(".weight") and not tensor.is_floating_point():
                what = f"{name} in {file} is {tensor.dtype}, as if quantised"
                raise Problem(f"--model {folder}: {what}: give the model before quantisation")


def check_model(model, args):
    """Raises Problem where the model is none of BERT's family, or shorter than --max-length."""
    embeddings = getattr(model.base_model, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    # Both flags: the model takes a boolean mask, and its attention function can be replaced.
    replaceable = model._supports_sdpa and model._supports_attention_backend
    if positions is None or not hasattr(model, "qa_outputs") or not replaceable:
        raise Problem(f"--model {args.model} is a {model.config.model_type}: {FAMILY}")
    longest = longest_input(model)
    if args.max_length > longest:
        what = f"--max-length {args.max_length}: the model has {longest} positions"
        stride = min(args.stride, longest // 3)
        raise Problem(f"{what}: give --max-length {longest} --stride {stride}")


def longest_input(model):
    """Returns how many tokens the model takes at once."""
    positions = model.base_model.embeddings.position_embeddings
    return positions.num_embeddings - first_position(model)


def first_position(model):
    """Returns the number of a sequence's first position: 0, but in RoBERTa's family, where the
    padding's position comes before it."""
    padding = model.base_model.embeddings.position_embeddings.padding_idx
    return 0 if padding is None else padding + 1


def compile_layers(model):
    """Compiles each layer by itself: they are alike, so that one compilation serves all of them.

    Returns whether it can: what it generates needs a C compiler and Python's headers."""
    on_gpu = model.device.type == "cuda"
    compiler = os.environ.get("CC", "gcc") if on_gpu else os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not shutil.which(compiler) or not header.exists():
        log(f"not compiling: this node has no {compiler} or no {header}; going on without")
        return False
    torch._dynamo.config.recompile_limit = 32  # bucketed batches have several widths
    for layer in encoder_layers(model):
        layer.compile(fullgraph=True, dynamic=False)
    return True


def encoder_layers(model):
    """Returns the list of the encoder's layers, whatever the family calls it."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def span_logits(model, batch, args):
    """Returns the logits of each place being the answer's first and last [rows, width, 2], in fp32.

    Places without a token have -inf. Under bf16 the encoder is in bf16, the head is not."""
    with torch.autocast(args.device_type, torch.bfloat16, enabled=args.precision == "bf16"):
        hidden = model.base_model(**batch["inputs"])[0].float()
    if hasattr(model, "dropout"):  # DistilBERT has one before its head
        hidden = model.dropout(hidden)
    logits = model.qa_outputs(hidden)
    if batch["places"] is not None:
        logits = logits[0, batch["places"]]  # from [1, row_tokens, 2]
    return logits.masked_fill(~batch["real"][:, :, None], -torch.inf)


class SpanModel(torch.nn.Module):
    """The model and its loss in one forward pass."""

    def __init__(self, model, args):
        super().__init__()
        self.model = model
        self.args = args

    def forward(self, batch):
        """Returns the sum of the micro-batch's losses."""
        logits = span_logits(self.model, batch, self.args)
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")  # [rows, 2]
        return losses.mean(dim=1).sum()


# 7. Optimiser and schedule


def make_optimizer(model, args):
    """Returns AdamW; as in BERT's paper, only matrices decay, not biases and LayerNorm's weights.

    A group keeps a peak of its own, "peak_lr", which the schedule multiplies."""
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    peak = args.learning_rate
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay, "peak_lr": peak},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": peak},
    ]
    fused = args.fused or None  # False would also switch off foreach, torch's default on a GPU
    return torch.optim.AdamW(groups, lr=peak, fused=fused)


def learning_rate_factor(step, steps, warmup):
    """Returns what a step (from 0) multiplies the peak learning rate by: a line up from nothing
    over the warm-up, a share of the steps, then a line down to nothing (Devlin et al. 2019).

    A function of the step alone, in place of torch's schedulers: a run that resumes has no
    scheduler's state to save, or to advance."""
    warmup_steps = max(math.ceil(warmup * steps), 1)
    rising = (step + 1) / warmup_steps
    falling = (steps - step) / max(steps - warmup_steps, 1)
    return min(rising, falling)


def set_learning_rate(optimizer, factor):
    """Sets each group's rate, a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


# 8. Timing and profiling


class Clock:
    """Seconds of each phase of the steps: by events on a GPU, read once a log interval, as reading
    waits for the device; by the wall clock elsewhere."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.timings = []  # (phase, begin, end)

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, phase):
        with torch.profiler.record_function(phase):
            begin = self.now()
            yield
            self.timings.append((phase, begin, self.now()))

    def read(self):
        """Returns {phase: seconds} since the last call; the device must have done all of it."""
        seconds = collections.defaultdict(float)
        for phase, begin, end in self.timings:
            seconds[phase] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        self.timings.clear()
        return dict(seconds)


def peak_memory_gib(device):
    """Returns the most that torch had allocated on a GPU, or that the process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def make_profiler(folder, skipped_steps, device, state):
    """Returns a profiler that idles for skipped_steps, warms up for one, and then records two.

    It writes their trace to folder, for TensorBoard and Perfetto, and leaves the table of the
    operators in state. Without skipped_steps (None) it never records."""

    def finish(profiler):
        if profiler.step_num < (skipped_steps or 0) + PROFILER_STEPS:
            return  # the run was stopped within these steps: its next life records them
        begin = time.perf_counter()
        worker = "rank0"
        for earlier in Path(folder).glob(f"{worker}.*.gz"):  # of a life that was ended just here
            earlier.unlink()
        torch.profiler.tensorboard_trace_handler(folder, worker, use_gzip=True)(profiler)
        averages = profiler.key_averages()
        state["operators"] = averages.table(f"self_{device.type}_time_total", row_limit=20)
        state["seconds"]["profile"] += time.perf_counter() - begin

    never = torch.profiler.ProfilerAction.NONE
    tracing = torch.profiler.schedule(
        skip_first=skipped_steps or 0, wait=0, warmup=1, active=PROFILER_STEPS - 1, repeat=1
    )
    return torch.profiler.profile(
        schedule=tracing if skipped_steps is not None else lambda step: never,
        on_trace_ready=finish,
        acc_events=True,
    )


# 9. Checkpoints, and being asked to stop
#
# A life is one process's part of a run, from its start or its checkpoint to its end or its stop.

# The options that have to be the same each time a run is started. The others may differ: they
# change where and how fast a step is computed, at most its rounding, but not which step it is.
SETTINGS = ["limit", "max_length", "stride", "epochs", "max_steps", "batch_size", "accumulate"]
SETTINGS += ["learning_rate", "warmup", "weight_decay", "dropout", "seed", "batching", "precision"]
SETTINGS += ["fused"]  # torch's optimisers take it from a checkpoint, whatever was asked for


def settings_of(args, model, tokenizer, features):
    """Returns what has to be the same in all lives of a run, by the options' names."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    tokenizer_content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(tokenizer.get_vocab().items())
    # Not all of the content: another version of the library may spell the same otherwise.
    vocabulary = json.dumps([words, tokenizer_content["normalizer"]])
    return settings | {
        "model": Path(args.model).name,
        # Folders of the same name may hold different models.
        "model's parameters": model.num_parameters(),
        "model's vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "train_file": features["content"],
    }


def check_output(output, args):
    """Raises Problem where a run would write over what is not its own: over --model, or over what
    stands in output without a run's checkpoint, or the mark of a run that has begun to write."""
    model = Path(os.path.realpath(args.model))
    folder = Path(os.path.realpath(output))
    if folder == model or {folder / "model", folder / "model.tmp"} & {model, *model.parents}:
        raise Problem(f"--model {args.model} lies where --output writes: choose another --output")
    lock = output / ".lock"
    begun = lock.is_file() and lock.stat().st_size > 0  # see finish
    goes_on = begun or (output / "checkpoint.pt").is_file()
    for name in ("model", "model.tmp", "predictions.json", "timings.json"):
        path = output / name
        should_be_folder = not name.endswith(".json")
        other_kind = path.is_symlink() or path.is_dir() != should_be_folder
        if os.path.lexists(path) and (other_kind or not goes_on):
            fix = "move it away, or choose another --output"
            raise Problem(f"{path} is there already, and not from a run that can go on: {fix}")


@contextlib.contextmanager
def open_output(output):
    """Makes the run's folder, and keeps a lock on it while the block lasts. None: there is none."""
    if output is None:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"--output {output}: another run writes there: wait, or choose another")
        except OSError:
            pass  # a file system without locks
        # A full disk is reported before any work starts.
        probe = output / ".probe"
        write_atomically(probe, lambda file: file.write(bytes(2**16)))
        probe.unlink()
        yield


def stop_requested(output):
    """Whether a signal, or a file named stop in the run's folder, asks to save and to stop."""
    if not STOP_SIGNALS and (output / "stop").exists():
        STOP_SIGNALS.append("the file stop")
    return bool(STOP_SIGNALS)


def save_checkpoint(output, model, optimizer, state, settings):
    """Saves weights, optimizer state and progress. torch's state-dict functions name them by
    parameter, whatever devices they are spread over, so that DISTRIBUTED can go on with any number
    of them. No random state has to be saved, as each micro-batch has a seed of its own
    (dropout_seed)."""
    options = checkpointing.StateDictOptions(full_state_dict=True, cpu_offload=True)
    begin = time.perf_counter()
    weights, moments = checkpointing.get_state_dict(model, optimizer, options=options)
    content = {"settings": settings, "state": state, "model": weights, "optimizer": moments}
    write_atomically(output / "checkpoint.pt", lambda file: torch.save(content, file))
    state["seconds"]["checkpoint"] += time.perf_counter() - begin


def load_checkpoint(output, settings, model):
    """Returns the content of output's checkpoint, or None; raises Problem on another run's, or
    another program's."""
    path = output / "checkpoint.pt"
    fix = "choose another --output, or remove it to start anew"
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(content["settings"])
        int(content["state"]["step"])  # which another program's file lacks
        shapes = {name: weight.shape for name, weight in content["model"].items()}
        moments = set(content["optimizer"]["state"])
    except OSError:  # the file itself may be whole
        raise
    except Exception as error:  # pickle, zipfile and torch each have their own
        what = f"cannot be read as train.py's checkpoint ({type(error).__name__})"
        raise Problem(f"{path} {what}: {fix}")
    different = []
    for name in settings:
        if name in saved and saved[name] != settings[name]:  # an earlier train.py has fewer
            is_option = name in SETTINGS or name in ("model", "train_file")
            shown = f"--{name.replace('_', '-')}" if is_option else f"the {name}"
            different.append(f"{shown} (was {saved[name]}, now {settings[name]})")
    if different:
        what = ", ".join(different)
        raise Problem(f"{path} has other settings: {what}: choose another --output")
    own_shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    # Not each optimiser keeps moments of each weight.
    if shapes != own_shapes or not moments <= set(shapes):
        raise Problem(f"{path} has other weights or moments than the model: {fix}")
    return content


def restore(checkpoint, model, optimizer, state):
    """Puts a checkpoint's weights, moments and state in place."""
    options = checkpointing.StateDictOptions(full_state_dict=True, cpu_offload=True)
    checkpointing.set_state_dict(
        model,
        optimizer,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optimizer"],
        options=options,
    )
    state.update(checkpoint["state"])
    state["resumed_from_steps"].append(state["step"])
    log(f"going on from step {state['step']:,}")


def add_life(state, life):
    """Notes which code runs now, and says so where it is not the code that ran until here."""

    def commit_of(one_life):
        changes = " with changes" if one_life["dirty"] else ""
        return f"{one_life['commit'][:10]}{changes}" if one_life["commit"] else "unknown"

    if state["step"] and not state["lives"]:  # a checkpoint from before they were noted
        state["lives"].append(dict.fromkeys(life))
    if state["lives"] and state["lives"][-1]["hash"] != life["hash"]:
        commits = f"commit {commit_of(state['lives'][-1])}, now {commit_of(life)}"
        log(f"train.py has changed since step {state['step']:,} ({commits})")
    state["lives"].append(life)


# 10. Evaluation: logits to answers, answers to scores


def best_span(logits, context_first, context_end):
    """Returns a window's best answer: its score, first and last token, and how many were possible.

    logits [tokens, 2]. As in the usual decoding: of the 20 best first and 20 best last tokens, the
    pair of the highest sum that lies in the context, in order, and has at most 30 tokens."""
    starts = logits[:, 0].argsort()[: -N_BEST - 1 : -1]
    ends = logits[:, 1].argsort()[: -N_BEST - 1 : -1]
    lengths = ends[None, :] - starts[:, None] + 1
    possible = (lengths >= 1) & (lengths <= MAX_ANSWER_TOKENS)
    possible &= (starts[:, None] >= context_first) & (ends[None, :] < context_end)
    scores = logits[starts, 0][:, None] + logits[ends, 1][None, :]
    scores = np.where(possible, scores, -np.inf)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    return scores[row, column], starts[row], ends[column], possible.sum()


@torch.inference_mode()
def find_answers(args, output, model, features):
    """Returns the best answer of each window [windows, 4]: its score, its first character in the
    context and the one after its last, and how many answers were possible; minus infinity in all
    four where none was. None where the run was asked to stop."""
    model.eval()
    lengths = features["lengths"]
    best = np.full((len(lengths), 4), -np.inf)
    # Windows of like length share a batch of about as many tokens as fit the device well.
    order = np.argsort(-lengths, kind="stable")
    batch_of = np.cumsum(lengths[order]) // EVALUATION_BATCH_TOKENS
    batches = np.split(order, np.flatnonzero(np.diff(batch_of)) + 1)
    for windows in progress(batches, "evaluating"):
        if stop_requested(output):
            break
        logits = evaluation_logits(args, model, features, windows)
        for window, window_logits in zip(windows, logits):
            first = features["context_first"][window]
            end = features["context_end"][window]
            own_logits = window_logits[: lengths[window]]
            span_score, start, last, possible = best_span(own_logits, first, end)
            if possible:
                offsets = features["offsets"][features["begin"][window] :]
                best[window] = span_score, offsets[start, 0], offsets[last, 1], possible
    return None if stop_requested(output) else best


def evaluation_logits(args, model, features, windows):
    """Returns the logits of some windows [windows, the longest's tokens, 2], on the host."""
    table = features["table"]
    lengths = features["lengths"][windows]
    chosen = torch.tensor(windows, device=model.device)
    width = int(lengths.max())
    if args.batching == "packed":
        cu_seqlens = pack_rows(lengths[None, None, :])[0, 0]
        row_tokens = int(cu_seqlens[-1])
        cu_seqlens = torch.tensor(cu_seqlens, device=model.device)
        batch = make_batch(table, chosen, width, row_tokens, cu_seqlens)
    else:
        batch = make_batch(table, chosen, width)
    with torch.compiler.set_stance("force_eager"):  # each batch has its own shape
        return span_logits(model, batch, args).cpu().numpy()


def answer_texts(best, features, examples):
    """Returns {question id: answer}, each question's from the window whose answer is its best."""
    best_score = dict.fromkeys((example["id"] for example in examples), -np.inf)
    answers = dict.fromkeys(best_score, "")
    possible = collections.Counter()
    for index, (span_score, start, end, count) in zip(features["example"], best):
        example = examples[index]
        if span_score > best_score[example["id"]]:
            best_score[example["id"]] = span_score
            answers[example["id"]] = example["context"][int(start) : int(end)]
        possible[example["id"]] += max(count, 0)
    for name, answer in answers.items():
        # The usual decoding's word where no answer was possible, or a single empty one.
        if not answer and possible[name] <= 1:
            answers[name] = "empty"
    return answers


def normalise(text):
    """Returns the words that the official scorer compares: in lower case, no articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1_of_words(answer, truth):
    """Returns the F1 of two lists of words: the harmonic mean of precision and recall."""
    common = sum((collections.Counter(answer) & collections.Counter(truth)).values())
    return 2 * common / (len(answer) + len(truth)) if common else 0.0


def own_scores(predictions, examples):
    """Returns exact_match and f1 in percent, as SQuAD v1.1's official scorer has them (Rajpurkar et
    al. 2016): each answer against the reference that is most like it."""
    exact_match = f1 = 0.0
    for example in examples:
        answer = normalise(predictions[example["id"]])
        references = [normalise(text) for text in example["answers"]["text"]]
        exact_match += max(answer == reference for reference in references)
        f1 += max(f1_of_words(answer, reference) for reference in references)
    return {"exact_match": 100 * exact_match / len(examples), "f1": 100 * f1 / len(examples)}


def score(predictions, examples):
    """Returns exact_match and f1 in percent, and scorer: evaluate, where the evaluate library has
    its squad metric in the cache, else own."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    modules = Path(os.environ.get("HF_MODULES_CACHE") or home / "modules")
    if (modules / "evaluate_modules/metrics/evaluate-metric--squad").is_dir():
        os.environ["HF_EVALUATE_OFFLINE"] = "1"
        try:
            import evaluate

            evaluate.logging.set_verbosity_error()
            metric = evaluate.load("squad")
            scores = metric.compute(
                predictions=[{"id": id, "prediction_text": predictions[id]} for id in predictions],
                references=[{"id": e["id"], "answers": e["answers"]} for e in examples],
            )
            scores = {name: float(scores[name]) for name in ("exact_match", "f1")}
            return scores | {"scorer": "evaluate"}
        except Exception as error:  # a broken cache must not cost a run its scores
            log(f"evaluate's squad metric does not load ({type(error).__name__}): using our own")
    return own_scores(predictions, examples) | {"scorer": "own"}


# 11. Training


class Interval:
    """The steps since the last line of the log. Losses and norms of the gradient stay on the device
    until the line is written, since reading them waits for the device."""

    def __init__(self, device, longest, first_step):
        self.losses = torch.zeros(longest, device=device)
        self.norms = torch.zeros(longest, device=device)
        self.first_step = first_step
        self.started = time.perf_counter()
        self.wall_started = self.started

    def add_loss(self, step, loss):
        self.losses[step - self.first_step] += loss.detach()

    def add_norm(self, step, norm):
        self.norms[step - self.first_step] = norm

    def restart(self, evaluation_seconds=0.0):
        """Begins to time the steps anew, after a save or an evaluation. The wall clock goes on, but
        for the seconds of an evaluation, which is no training."""
        self.started = time.perf_counter()
        self.wall_started += evaluation_seconds

    def end(self, done):
        """Waits for the device and returns what the steps before `done` have measured; then begins
        the next interval. Raises Problem where a loss or a gradient is not a finite number."""
        count = done - self.first_step
        losses = self.losses[:count].tolist()
        norms = self.norms[:count].tolist()
        now = time.perf_counter()
        for step, (loss, norm) in enumerate(zip(losses, norms), self.first_step + 1):
            if not math.isfinite(loss + norm):
                what = f"step {step}: loss {loss}, gradient norm {norm}"
                fix = "lower --learning-rate, with another --output"
                raise Problem(f"{what}: {fix}", exit_code=1)
        measured = {
            "step": done,
            "steps": count,
            "loss": sum(losses) / count,
            "gradient_norm": sum(norms) / count,
            "seconds": now - self.started,
            "wall_seconds": now - self.wall_started,
        }
        self.losses.zero_()
        self.first_step = done
        self.started = self.wall_started = now
        return measured


def plan_life(args, plan, first, state):
    """Returns what is planned for a life that begins with the step `first`: the first step after
    its warm-up, whether the steps from there on are profiled, and which steps count as steady."""
    steps = len(plan["features"])
    # Every life of a run warms up: it allocates, and compiles. Then one of them is profiled.
    warmup_end = first + min(5, (steps - first) // 4)
    is_profiled = args.profile and not state["operators"] and steps - first >= 8
    measured_from = warmup_end + PROFILER_STEPS if is_profiled else warmup_end
    return warmup_end, is_profiled, find_steady_steps(plan, first, measured_from, args)


def find_steady_steps(plan, first, measured_from, args):
    """Returns for each step whether it counts as the steady state: after the warm-up and the
    profiled steps, and not one in which a width is met, and so compiled, for the first time."""
    widths = plan["width"]  # [steps, micro-batches]
    steady = np.arange(len(widths)) >= measured_from
    if args.compile:
        first_met = np.unique(widths[first:], return_index=True)[1]
        steady[first + first_met // widths.shape[1]] = False
    return steady


def dropout_seed(seed, step, micro):
    """Returns a seed of a micro-batch's own, so that no random state has to be saved."""
    return int(np.random.SeedSequence((seed, step, micro)).generate_state(1)[0])


def planned_batch(table, plan, step, micro):
    """Returns the plan's batch of a step and micro-batch."""
    chosen = plan["device_features"][step, micro]
    width = int(plan["width"][step, micro])
    if "cu_seqlens" not in plan:
        return make_batch(table, chosen, width)
    cu_seqlens = plan["device_cu_seqlens"][step, micro]
    return make_batch(table, chosen, width, plan["row_tokens"], cu_seqlens)


def training_step(args, step, span_model, optimizer, features, plan, clock, interval):
    """One optimiser step: the micro-batches' gradients add up, are clipped and move the weights.

    Their losses are divided by the features of the whole step, so that they add up to its mean."""
    for micro in range(args.accumulate):
        torch.manual_seed(dropout_seed(args.seed, step, micro))
        with clock("data"):
            batch = planned_batch(features["table"], plan, step, micro)
        with clock("forward"):
            loss = span_model(batch) / plan["device_count"][step]
        with clock("backward"):
            loss.backward()
        interval.add_loss(step, loss)
    with clock("optimizer"):
        norm = torch.nn.utils.clip_grad_norm_(span_model.parameters(), max_norm=1.0)
        optimizer.step()
        span_model.zero_grad()
    interval.add_norm(step, norm)


class StepGraph:
    """A whole training step, recorded once as a CUDA graph: the host then launches it as one, in
    place of its thousand kernels ("Whole-network capture" in torch's notes on CUDA semantics).

    A graph repeats what was recorded, on the same memory: so it has a plan of one step for its
    input, learning rates, and a place for its loss, all on the device and of its own. The default
    stream cannot be recorded, so all of the run is on another one."""

    # The steps before it is recorded, in which all is allocated and compiled. A run of fewer than
    # 16 steps warms up for no more than these, and is too short for a graph.
    AFTER = 3

    def __init__(self, args, span_model, optimizer, features, plan, device):
        self.args = args
        self.optimizer = optimizer
        self.plan = plan
        self.copied = [name for name in plan if name.startswith("device_")]
        self.one_step = plan | {name: plan[name][:1].clone() for name in self.copied}
        self.own_interval = Interval(device, longest=1, first_step=0)
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        learning_rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self.rates):
            group["lr"] = rate
            group["capturable"] = True
        # While recording, a seed can only be set to what it is.
        torch.manual_seed(dropout_seed(args.seed, 0, 0))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            untimed = contextlib.nullcontext
            training_step(
                args, 0, span_model, optimizer, features, self.one_step, untimed, self.own_interval
            )
        # Numbers again: replay() copies them, and a checkpoint has them.
        for group, learning_rate in zip(optimizer.param_groups, learning_rates):
            group["lr"] = learning_rate
            group["capturable"] = False

    def replay(self, step, interval):
        """Takes the place of training_step."""
        torch.manual_seed(dropout_seed(self.args.seed, step, 0))  # replaying hands it to the GPU
        for name in self.copied:
            self.one_step[name].copy_(self.plan[name][step])
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            rate.fill_(group["lr"])
        self.own_interval.losses.zero_()
        self.graph.replay()
        interval.add_loss(step, self.own_interval.losses[0])
        interval.add_norm(step, self.own_interval.norms[0])


def train(
    args, output, span_model, optimizer, features, plan, clock, state, writer, save, evaluate
):
    """Trains from state["step"] to the plan's end, or until it is asked to stop, and saves."""
    if plan is None:  # --epochs 0
        return
    device = features["table"]["begin"].device
    first = state["step"]
    steps = len(plan["features"])
    log_every = min(args.log_every, max(steps // 4, 1))
    warmup_end, is_profiled, steady = plan_life(args, plan, first, state)
    graph = None
    recorded_at = first + StepGraph.AFTER if args.cuda_graph else None
    skipped = warmup_end - first if is_profiled else None
    # The life before was ended between this step's save and its evaluation.
    if is_evaluation_due(args, plan, first) and not is_evaluated(state):
        if evaluate() is None:
            return
    interval = Interval(device, log_every, first)
    saved_at = time.perf_counter()
    span_model.train()
    with make_profiler(f"{output}/tensorboard", skipped, device, state) as profiler:
        for step in range(first, steps):
            set_learning_rate(optimizer, learning_rate_factor(step, steps, args.warmup))
            if step == recorded_at and step < warmup_end:
                graph = StepGraph(args, span_model, optimizer, features, plan, device)
            if graph:
                graph.replay(step, interval)
            else:
                training_step(args, step, span_model, optimizer, features, plan, clock, interval)
            keep_signals()
            profiler.step()
            done = step + 1
            # Not at each of a GPU's steps, as it is a look at the disk; but often, however long
            # --log-every is: a warning before the time is up leaves three minutes.
            asks = done % min(log_every, 10) == 0 or device.type == "cpu"
            stop = asks and stop_requested(output)
            save_due = asks and time.perf_counter() - saved_at > SAVE_SECONDS
            if args.save_every:
                save_due = done % args.save_every == 0
            evaluation_due = is_evaluation_due(args, plan, done)
            if done % log_every == 0 or done == steps or stop or save_due or evaluation_due:
                measured = interval.end(done)
                measured["warmup"] = done - measured["steps"] < warmup_end
                measured["steady"] = bool(steady[done - measured["steps"] : done].all())
                end_interval(args, measured, plan, clock, state, device, writer)
                interval.restart()
            if stop or done == steps:
                break
            if save_due or evaluation_due:
                save()
                saved_at = time.perf_counter()
                interval.restart()
            if evaluation_due:
                begin = time.perf_counter()
                if evaluate() is None:
                    return  # asked to stop: the save before it is the last
                span_model.train()
                interval.restart(time.perf_counter() - begin)
    save()  # whatever follows, the steps are kept


def is_evaluation_due(args, plan, done):
    """Whether an epoch has ended; the last one is followed by the final evaluation anyway."""
    if args.evaluate_every == "end" or done == len(plan["features"]):
        return False
    return done > 0 and done % plan["steps_per_epoch"] == 0


def is_evaluated(state):
    """Whether the step has been evaluated: not if the run was ended between save and evaluation."""
    return any(evaluation["step"] == state["step"] for evaluation in state["evaluations"])


def end_interval(args, measured, plan, clock, state, device, writer):
    """Adds to what an interval has measured, keeps it in state, and writes log and TensorBoard."""
    begin = time.perf_counter()
    done = measured["step"]
    steps = len(plan["features"])
    steps_of_interval = slice(done - measured["steps"], done)
    factor = learning_rate_factor(done - 1, steps, args.warmup)
    measured |= {
        "learning_rate": args.learning_rate * factor,
        "tokens": int(plan["tokens"][steps_of_interval].sum()),
        "features": int(plan["count"][steps_of_interval].sum()),
        "squares": int(plan["squares"][steps_of_interval].sum()),
        "memory_gib": peak_memory_gib(device),
        "phases": {} if args.cuda_graph else clock.read(),  # a graph is timed as a whole
    }
    state["intervals"].append(measured)
    state["step"] = done
    speed = measured["tokens"] / measured["seconds"]
    left = datetime.timedelta(seconds=int(plan["tokens"][done:].sum() / speed))
    log(
        f"step {done:,}/{steps:,} {done / steps:4.0%}, {left} left"
        f"  loss {measured['loss']:.4f}  lr {measured['learning_rate']:.2e}"
        f"  {speed:,.0f} tokens/s  {measured['memory_gib']:.1f} GiB"
    )
    write_scalars(writer, measured)
    state["seconds"]["log"] += time.perf_counter() - begin


def evaluate_model(args, output, model, validation, plan, state, writer):
    """Answers the validation questions, and keeps and shows the scores.

    Returns {question id: answer}; or None where the run was asked to stop."""
    begin = time.perf_counter()
    best = find_answers(args, output, model, validation)
    if best is None:
        return None
    examples = json.loads(validation["examples"].tobytes())
    predictions = answer_texts(best, validation, examples)
    scores = score(predictions, examples)
    state["scorer"] = scores["scorer"]
    evaluation = {
        "step": state["step"],
        "epoch": state["step"] / plan["steps_per_epoch"] if plan else 0,
        "train_seconds": sum(interval["wall_seconds"] for interval in state["intervals"]),
        "exact_match": scores["exact_match"],
        "f1": scores["f1"],
        "evaluate_seconds": time.perf_counter() - begin,
    }
    state["evaluations"].append(evaluation)
    write_evaluation(writer, evaluation)
    log(
        f"evaluated after {evaluation['epoch']:.3g} epochs, {evaluation['train_seconds']:.0f} s of"
        f" training: exact match {evaluation['exact_match']:.2f}, F1 {evaluation['f1']:.2f}"
    )
    return predictions


# 12. What a run leaves: TensorBoard, results.json, timings.json, model/

# Dense peaks in TFLOP/s at bf16, tf32 and fp32, from NVIDIA's data sheets. Of these names the first
# that is found in the device's name applies.
PEAKS = {
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A30": {"bf16": 165, "tf32": 82, "fp32": 10.3},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "tf32": 418, "fp32": 60},
    "H100": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H200": {"bf16": 989, "tf32": 494, "fp32": 67},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "V100": {"fp32": 15.7},
}

# What of an interval goes to TensorBoard's curves and to timings.json.
CURVES = ("loss", "learning_rate", "gradient_norm")
# TensorBoard's tab CUSTOM SCALARS: one chart for each question.
BOARD = {
    "overview": {
        "loss": ["Multiline", ["training/loss"]],
        "F1 and exact match": ["Multiline", ["evaluation/.*"]],
        "real tokens per second": ["Multiline", ["speed/tokens_per_second"]],
        "share of the step": ["Multiline", ["phases/.*"]],
        "learning rate": ["Multiline", ["training/learning_rate"]],
        "gradient norm": ["Multiline", ["training/gradient_norm"]],
        "memory, GiB": ["Multiline", ["speed/peak_memory_gib"]],
    }
}
# The settings by which TensorBoard's tab HPARAMS compares runs.
HPARAMS = ["batch_size", "batching", "compile", "learning_rate", "precision", "seed"]


@contextlib.contextmanager
def open_writer(output, state):
    """Opens TensorBoard's writer; what an earlier life wrote after its last save is purged."""
    step = state["step"]
    writer = SummaryWriter(output / "tensorboard", purge_step=step)
    try:
        writer.add_custom_scalars(BOARD)
        # What was written at the very step of the save is purged too, so it is written again.
        for measured in state["intervals"][-1:]:
            write_scalars(writer, measured)
        for evaluation in state["evaluations"]:
            if evaluation["step"] == step:
                write_evaluation(writer, evaluation)
        yield writer
    finally:
        with contextlib.suppress(OSError):  # a full disk: whatever ends the run says so
            writer.close()


def write_scalars(writer, measured):
    """Writes an interval's curves at once, so that TensorBoard shows them while it trains."""
    step = measured["step"]
    for name in CURVES:
        writer.add_scalar(f"training/{name}", measured[name], step)
    writer.add_scalar("speed/tokens_per_second", measured["tokens"] / measured["seconds"], step)
    writer.add_scalar("speed/peak_memory_gib", measured["memory_gib"], step)
    for phase, seconds in measured["phases"].items():
        writer.add_scalar(f"phases/{phase}", seconds / measured["seconds"], step)
    writer.flush()


def write_evaluation(writer, evaluation):
    """Writes an evaluation's points of the curves of F1 and exact match."""
    for name in ("exact_match", "f1"):
        writer.add_scalar(f"evaluation/{name}", evaluation[name], evaluation["step"])
    writer.flush()


def finish_board(writer, args, results, timings):
    """Writes what is known at the end: settings beside scores, the results, the operators."""
    settings = {name: getattr(args, name) for name in HPARAMS}
    names = ("exact_match", "f1", "steady_epoch_seconds", "train_seconds")
    scores = {f"result/{name}": results[name] for name in names if results[name] is not None}
    writer.add_hparams(settings, scores, run_name=".")  # else it would make a run of its own
    writer.add_text("results", f"```\n{describe(results, timings)}\n```")
    if timings["operators"]:
        writer.add_text("operators of the profiled steps", f"```\n{timings['operators']}\n```")


def output_of(*command):
    """Returns what a command prints, or an empty text where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=HERE)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor_name():
    """Returns the processor's name, as "CPU AMD EPYC"."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return f"CPU {found[1] if found else platform.processor()}".strip()


def count_cores():
    """Returns how many cores this process may use: SLURM can bind it to a part of them."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def describe_code():
    """Returns which code this life runs. Called at its start, as files may change afterwards."""
    return {
        "commit": output_of("git", "rev-parse", "HEAD") or None,
        # New files change no run: SLURM's logs, a report.
        "dirty": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "hash": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16],
        "start": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def describe_environment(device, life):
    """Returns what a reader must know to trust a run's figures: code, machine and versions."""
    on_gpu = device.type == "cuda"
    versions = {}
    for package in ("torch", "transformers", "datasets", "tokenizers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "commit": life["commit"],
        "dirty": life["dirty"],
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "hosts": [socket.gethostname()],
        "devices": [torch.cuda.get_device_name(device) if on_gpu else processor_name()],
        "cpu": processor_name(),
        "cores": count_cores(),
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def count_flops(model, intervals):
    """Returns the floating-point operations of training on these intervals' real tokens.

    Per token and weight of a matrix two, and twice as many backward (Kaplan et al. 2020, section
    2.1); embeddings are looked up, not multiplied. Attention: 4 x hidden size x length squared per
    layer forward."""
    matrix_weights = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embeddings." not in name:
            matrix_weights += parameter.numel()
    config = model.config  # DistilBERT's names are mapped to BERT's
    tokens = sum(interval["tokens"] for interval in intervals)
    squares = sum(interval["squares"] for interval in intervals)
    return (
        6 * matrix_weights * tokens + 12 * config.num_hidden_layers * config.hidden_size * squares
    )


def model_flops_utilization(flops_per_second, args, environment, gpus=1):
    """Returns the share of the GPUs' dense peak at this precision; None where it is not known."""
    device = environment["devices"][0]
    for name, peaks in PEAKS.items():
        if flops_per_second and re.search(rf"\b{name}\b", device) and args.precision in peaks:
            return flops_per_second / gpus / peaks[args.precision] / 1e12
    return None


def share_epochs(intervals, steps_per_epoch):
    """Returns the training's seconds in each epoch; an interval over two is shared by its steps."""
    seconds = collections.Counter()
    for interval in intervals:
        for step in range(interval["step"] - interval["steps"], interval["step"]):
            seconds[step // steps_per_epoch] += interval["wall_seconds"] / interval["steps"]
    return [seconds[epoch] for epoch in sorted(seconds)]


def make_timings(plan, state, train_seconds):
    """Returns timings.json: where the steady steps' time went, and each interval's figures."""
    intervals = state["intervals"]
    chosen = [interval for interval in intervals if interval["steady"]] or intervals
    seconds = sum(interval["seconds"] for interval in chosen)
    phases = {}
    for phase in dict.fromkeys(name for interval in chosen for name in interval["phases"]):
        spent = sum(interval["phases"].get(phase, 0.0) for interval in chosen)
        phases[phase] = {"seconds": spent, "share": spent / seconds}
    for name in ("data", "forward", "backward", "optimizer"):  # not known of a CUDA graph
        phases.setdefault(name, {"seconds": None, "share": None})
    for name, spent in state["seconds"].items():  # beside the steps: of all of the training
        share = spent / train_seconds if train_seconds else None
        phases[name] = {"seconds": spent, "share": share}
    kept = ("step", *CURVES, "seconds", "tokens", "steady")
    tokens_per_step = []
    if plan:
        pairs = zip(plan["tokens"].tolist(), plan["computed"].tolist())
        tokens_per_step = [list(pair) for pair in pairs][:200]
    return {
        "phases": phases,
        "intervals": [{name: interval[name] for name in kept} for interval in intervals],
        "operators": state["operators"],
        "tokens_per_step": tokens_per_step,  # real and computed, of the first 200 steps
    }


def make_results(args, model, features, validation, plan, state, environment):
    """Returns results.json. A run that only evaluates has no speed: null."""
    intervals = state["intervals"]
    steady = [interval for interval in intervals if interval["steady"]]
    steady_seconds = sum(interval["seconds"] for interval in steady)
    steady_tokens = sum(interval["tokens"] for interval in steady)
    steady_features = sum(interval["features"] for interval in steady)
    epoch_tokens = int(features["lengths"].sum())
    flops_per_second = None
    if steady:
        flops_per_second = count_flops(model, steady) / steady_seconds
    utilization = model_flops_utilization(flops_per_second, args, environment)
    warmup = [interval["seconds"] for interval in intervals if interval["warmup"]]
    return {
        "exact_match": state["evaluations"][-1]["exact_match"],
        "f1": state["evaluations"][-1]["f1"],
        "steady_epoch_seconds": epoch_tokens * steady_seconds / steady_tokens if steady else None,
        "train_seconds": sum(interval["wall_seconds"] for interval in intervals),
        "epoch_seconds": share_epochs(intervals, plan["steps_per_epoch"]) if plan else [],
        "warmup_seconds": sum(warmup),
        "prepare_seconds": features["seconds"] + validation["seconds"],
        "features_cached": features["cached"],
        "evaluate_seconds": state["evaluations"][-1]["evaluate_seconds"],
        "total_seconds": time.perf_counter() - STARTED,
        "features_per_second": steady_features / steady_seconds if steady else None,
        "tokens_per_second": steady_tokens / steady_seconds if steady else None,
        "padding_share": 1 - float(plan["tokens"].sum() / plan["computed"].sum()) if plan else None,
        "flops_per_second": flops_per_second,
        "model_flops_utilization": utilization,
        "peak_memory_gib": peak_memory_gib(model.device),
        "steps": state["step"],
        "train_features": len(features["lengths"]),
        "world_size": 1,
        "nodes": 1,
        "parameters": model.num_parameters(),
        "evaluations": state["evaluations"],
        "resumed_from_steps": state["resumed_from_steps"],
        "lives": state["lives"],
        "restarts": environment["restarts"],
        "scorer": state["scorer"],
        "paper": PAPER,
        "command": shlex.join(sys.argv),
        "finished_at": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "arguments": vars(args),
        "environment": environment,
    }


def describe(results, timings):
    """Returns the lines that end a log."""

    def show(name, form="{:,.1f}"):
        value = results[name]
        return "not measured" if value is None else form.format(value)

    environment = results["environment"]
    devices = f"{results['world_size']} x {environment['devices'][0]}"
    beside = ("checkpoint", "profile", "log")  # shares of the training, not of the steps
    phases = [
        f"{name} {one['share']:.1%}"
        for name, one in timings["phases"].items()
        if one["share"] and name not in beside
    ]
    commit = environment["commit"] or "unknown"
    lines = {
        "device": f"{devices}, torch {environment['torch']}, commit {commit}",
        "an epoch": f"{show('steady_epoch_seconds')} s at {show('tokens_per_second')} real tokens/s"
        f" of the steady state, {show('features_per_second')} features/s",
        "training": f"{show('train_seconds')} s for {results['steps']:,} steps, the first"
        f" {show('warmup_seconds')} s of them warm-up",
        "beside it": f"preparing {show('prepare_seconds')} s, evaluating"
        f" {show('evaluate_seconds')} s; in all {show('total_seconds')} s since the last start",
        "padding": f"{show('padding_share', '{:.1%}')} of the tokens computed",
        "MFU": f"{show('model_flops_utilization', '{:.1%} of the peak of such a device')}",
        "memory": f"{show('peak_memory_gib')} GiB at most",
        "phases": ", ".join(phases).replace("_", " ") or "not measured",
        "exact match, F1": f"{show('exact_match', '{:.2f}')}, {show('f1', '{:.2f}')}"
        f" ({results['scorer']} scorer); BERT-Base in its paper, on all of SQuAD v1.1:"
        f" {PAPER['exact_match']}, {PAPER['f1']}",
    }
    return "\n".join(f"{name:17}{text}" for name, text in lines.items())


def save_model(output, model, tokenizer):
    """Leaves model/, for from_pretrained: written under another name, so it is all there or not."""
    temporary = output / "model.tmp"
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    except SafetensorError as error:  # a full disk is no OSError to it
        raise Problem(f"cannot write {temporary} ({error}): free some space")
    for file in temporary.iterdir():  # safetensors lets nobody but the owner read the weights
        file.chmod((temporary / "config.json").stat().st_mode)
    shutil.rmtree(output / "model", ignore_errors=True)  # from a life that was killed after this
    temporary.replace(output / "model")


# 13. Main


def new_state():
    """Returns what a checkpoint keeps beside weights and moments."""
    return {
        "step": 0,
        "intervals": [],
        "evaluations": [],
        "scorer": None,
        "operators": "",
        "resumed_from_steps": [],
        "lives": [],
        "seconds": {"checkpoint": 0.0, "profile": 0.0, "log": 0.0},
    }


def check_files(args):
    """Raises Problem where a file of questions is not there, before anything slow is begun."""
    for option in ("train_file", "validation_file"):
        path = getattr(args, option)
        if not path or Path(path).is_file():
            continue
        what = "there is no such file"
        if Path(path).is_dir():
            what = "this is a folder: give a file"
        elif Path(path).exists():
            what = "this is a pipe or a device: write it to a file, and give that"
        raise Problem(f"--{option.replace('_', '-')} {path}: {what}")


def check_cpu_hours(args, model, plan, checkpoint):
    """Raises Problem where a CPU would take hours, unless --device cpu says that this is meant."""
    weights = model.num_parameters(exclude_embeddings=True)
    flops_per_second = 2e10 * torch.get_num_threads()  # what a core reaches in training, measured
    done = checkpoint["state"]["step"] if checkpoint else 0
    tokens = int(plan["computed"][done:].sum()) if plan else 0
    hours = 6 * weights * tokens / flops_per_second / 3600
    if args.device == "auto" and args.device_type == "cpu" and hours > CPU_HOURS:
        what = f"{len(plan['features']) - done:,} steps of {args.batch_size} features take a CPU"
        gpu = "ask for a GPU (--gres)" if "SLURM_JOB_ID" in os.environ else "use sbatch"
        less = "--limit N" if args.sample else "--sample or --limit N"
        fix = f"{gpu}, {less}; --device cpu goes on regardless"
        raise Problem(f"{what} about {hours:.0f} hours: {fix}")


@torch.no_grad()
def check_packed_attention(args, model, features):
    """Raises Problem where packed and padded give some features logits that differ by more than
    rounding: each model and each GPU shows for itself that its packed attention is right."""
    table = features["table"]
    lengths = features["lengths"][:8]
    chosen = torch.arange(len(lengths), device=model.device)
    cu_seqlens = pack_rows(lengths[None, None, :])[0, 0]
    on_device = torch.tensor(cu_seqlens, device=model.device)
    padded = make_batch(table, chosen, lengths.max())
    packed = make_batch(table, chosen, lengths.max(), int(cu_seqlens[-1]), on_device)
    padding = ~padded["real"][:, :, None]  # there both are minus infinity
    model.eval()
    packed_logits = span_logits(model, packed, args).masked_fill(padding, 0)
    model.set_attn_implementation("sdpa")
    padded_logits = span_logits(model, padded, args).masked_fill(padding, 0)
    model.set_attn_implementation(args.attention)
    difference = (packed_logits - padded_logits).abs().max().item()
    largest = padded_logits.abs().max().item()
    if not math.isfinite(largest):
        what = "its logits are not finite numbers, as some of its weights are too large"
        raise Problem(f"--model {args.model}: {what}: give a file that was saved before")
    rounding = 1e-3 if args.precision == "fp32" else 0.1
    if not difference <= rounding * largest:  # NaN is wrong too
        what = f"logits of up to {largest:.2g} differ from padded ones by {difference:.2g}"
        raise Problem(f"--batching packed is wrong with this model here ({what}): give bucketed")


def configure_libraries(args):
    """Sets what transformers and torch do for all of the process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # transformers asks torch.compile what torch 2.11 warns of.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    # cuDNN's attention plans anew for each shape, and knows dropout in sixteenths only.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # TensorBoard's thread raises a full disk again in its next call: its traceback says no more.
    hook = threading.excepthook

    def all_but_full_disks(end):
        if not issubclass(end.exc_type, OSError):
            hook(end)

    threading.excepthook = all_but_full_disks


def prepare(args):
    """Returns the tokenizer, the model, and the features to train and to evaluate on."""
    tokenizer, config = load_tokenizer(args)
    model = load_model(args, config)
    longest = longest_input(model)
    features = load_features(args.train_file, "train", tokenizer, args, longest)
    validation = load_features(args.validation_file, "validation", tokenizer, args, longest)
    seconds = features["seconds"] + validation["seconds"]
    how = "from the cache" if features["cached"] else "built"
    counts = f"{len(features['lengths']):,} and {len(validation['lengths']):,} features"
    log(f"{counts} to train and to evaluate on, {how} in {seconds:.1f} s")
    return tokenizer, model, features, validation


def move_to_device(args, model, tokenizer, features, validation, plan, device):
    """Moves to the device all that training and evaluation take; checks and compiles the model."""
    model.to(device)
    features["table"] = feature_table(features, tokenizer, model, device)
    validation["table"] = feature_table(validation, tokenizer, model, device)
    if plan:
        plan_to_device(plan, device)
        log_plan(args, plan)
    if args.batching == "packed":
        check_packed_attention(args, model, validation)
    args.compile = args.compile and compile_layers(model)


def finish(args, output, model, tokenizer, features, validation, plan, state, predictions, writer):
    """Writes what a run leaves. results.json comes last: where it is, all is there."""
    environment = describe_environment(model.device, state["lives"][-1])
    results = make_results(args, model, features, validation, plan, state, environment)
    timings = make_timings(plan, state, results["train_seconds"])
    (output / ".lock").write_text("results")  # what stands here from now on is this run's
    save_model(output, model, tokenizer)
    write_json(output / "predictions.json", predictions)
    write_json(output / "timings.json", timings)
    finish_board(writer, args, results, timings)
    writer.close()
    write_json(output / "results.json", results)
    for name in ("checkpoint.pt", ".lock", "stop"):
        (output / name).unlink(missing_ok=True)
    log(f"\n--- results in {output}\n{describe(results, timings)}\n{'-' * 72}")
    log(f"look: tensorboard --logdir {shlex.quote(str(output.parent))}")


def run(args):
    """The whole run, from the arguments to the results. Returns the exit code."""
    output = Path(args.output) if args.output else None  # None: only prepares
    if output and (output / "results.json").exists():
        log(f"{output} holds a finished run and is left alone: choose another --output")
        return 0
    configure_libraries(args)
    check_files(args)
    if output:
        check_output(output, args)
    with open_output(output):
        return run_in(output, args)


def run_in(output, args):
    """The run, where nothing else writes to output."""
    life = describe_code()
    model_name = "the sample, from random weights" if args.sample else args.model
    where = f"{args.precision} on {args.device_type}, {args.batching}"
    log(f"{HERE.name}: {model_name}, {where}" + (f", to {output}" if output else ""))
    tokenizer, model, features, validation = prepare(args)
    plan = plan_training(features["lengths"], args) if args.epochs else None
    steps = len(plan["features"]) if plan else 0
    settings = settings_of(args, model, tokenizer, features)
    checkpoint = load_checkpoint(output, settings, model) if output else None
    if output:  # not for prepare.sh, which runs on a login node for jobs with a GPU
        check_cpu_hours(args, model, plan, checkpoint)
    if args.prepare:
        log(f"ready: model, data and features ({CACHE}); a run needs no internet now")
        return 0

    device = torch.device(args.device_type)
    if args.cuda_graph:
        torch.cuda.set_stream(torch.cuda.Stream())
    move_to_device(args, model, tokenizer, features, validation, plan, device)
    span_model = SpanModel(model, args)
    clock = Clock(device)
    optimizer = make_optimizer(model, args)
    state = new_state()
    if checkpoint:
        restore(checkpoint, model, optimizer, state)
    del checkpoint  # as large as weights and optimizer state together
    add_life(state, life)
    if stop_requested(output):
        return stopped(output, state)
    save = functools.partial(save_checkpoint, output, model, optimizer, state, settings)
    with open_writer(output, state) as writer:
        evaluate = functools.partial(
            evaluate_model, args, output, model, validation, plan, state, writer
        )
        train(
            args,
            output,
            span_model,
            optimizer,
            features,
            plan,
            clock,
            state,
            writer,
            save,
            evaluate,
        )
        predictions = evaluate() if state["step"] == steps else None
        if predictions is None:
            return stopped(output, state)
        finish(
            args, output, model, tokenizer, features, validation, plan, state, predictions, writer
        )
    return 0


def log_plan(args, plan):
    """Says how much there is to do."""
    steps, micro_batches, rows = plan["features"].shape
    log(
        f"{steps:,} steps ({plan['steps_per_epoch']:,} per epoch) of {args.batch_size} features;"
        f" micro-batches per step: {micro_batches}, of at most {rows} features"
    )
    by_rule = args.learning_rate == usual_learning_rate(args.batch_size)
    rule = f" = 5e-5 x sqrt(batch {args.batch_size} / 32)" if by_rule else ""
    log(f"peak learning rate {args.learning_rate:.1e}{rule}")


def stopped(output, state):
    """Says how to go on, and returns the exit code of a run that was asked to stop."""
    (output / "stop").unlink(missing_ok=True)  # or the next start would stop too
    reason = STOP_SIGNALS[0]
    step = state["step"]
    log(f"stopped by {reason} at step {step:,}: the same command with --output {output} goes on")
    return STOPPED


def keep_signals():
    """Puts Python's handlers of signals back in their place: Triton's compiler brings LLVM's own,
    which end the process, or hear nothing. Called at each step, as any may have compiled."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.getsignal(number))


def note_signal(number, frame):
    """Keeps a signal for stop_requested: the training is saved between two steps, never in one."""
    STOP_SIGNALS.append(signal.Signals(number).name)


def explain(error):
    """Returns the line that says what is wrong and how to fix it, and the exit code."""
    if isinstance(error, Problem):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, OSError):
        path = error.filename or "a file in --output"
        fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
        return f"{path}: {error.strerror or one_line(error)}: {fix}, or give another path", 2
    return f"out of memory: raise --accumulate ({one_line(error)})", 1


def main():
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note_signal)
    try:
        exit_code = run(parse_arguments())
    except (Problem, OSError, torch.OutOfMemoryError) as error:
        message, exit_code = explain(error)
        line = f"error: {message}"
        with contextlib.suppress(OSError):  # the log may lie on a disk that is full
            print(line, file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()

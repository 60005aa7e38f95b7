"""Train BERT on SQuAD v1.1 on one GPU, as fast as it goes, and measure where the time went.

    sbatch baseline/run.sbatch [options]        on a cluster: one A100
    bash baseline/run.sbatch --sample           on a laptop: the whole path in about a minute
    python baseline/train.py --help             all options

It leaves in --output: results.json, timings.json, predictions.json, model/ and tensorboard/; under
way also checkpoint.pt, from which the same command goes on. Read it from top to bottom, as data
flows: 1 arguments, 2 set-up and log, 3 data to features, 4 batches, 5 model, 6 optimiser and
schedule, 7 timing and profiling, 8 checkpoints and signals, 9 evaluation, 10 training, 11 main.
"""

import argparse
import collections
import contextlib
import datetime
import difflib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import time
import zlib
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # nothing forks after the tokenizer
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
import transformers
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

STARTED = time.perf_counter()
HERE = Path(__file__).resolve().parent
SAMPLE, REPORT = HERE.parent / "baseline/sample.json", HERE.parent / "baseline/report.py"
CACHE = Path(os.environ.get("SQUAD_CACHE") or HERE.parent / ".cache")
HUB_DATA = "rajpurkar/squad"
MODEL_TYPES = ("bert", "electra", "distilbert")  # WordPiece, [CLS] question [SEP] context [SEP]
SAVE_SECONDS, CPU_HOURS = 300, 2  # more hours than this on a CPU are taken for a mistake
EVALUATION_TOKENS = 8192  # a batch
N_BEST, MAX_ANSWER_TOKENS = 20, 30  # what the usual decoding of SQuAD uses
PHASES = ("data", "forward", "backward", "optimizer")
# Dense peaks in TFLOP/s of bf16, tf32 and fp32, from NVIDIA's data sheets (without sparsity).
PEAKS = {"A100": (312, 156, 19.5), "A30": (165, 82, 10.3), "H100 PCIe": (756, 378, 51)}
PEAKS |= {"H100": (989, 494, 67), "H200": (989, 494, 67), "L40S": (362, 183, 91.6)}


class Problem(Exception):
    """What the user can mend, in one line; a second argument is the exit code, if it is not 2."""


# 1. Arguments

ON_OFF = argparse.BooleanOptionalAction
OPTIONS = {  # group: (option, type or choices, default, least, what --help says)
    "model and data": (
        ("--model", str, "google-bert/bert-base-uncased", None, "hub name or folder"),
        ("--train-file", str, None, None, f"SQuAD v1.1 JSON (default: the hub's {HUB_DATA})"),
        ("--validation-file", str, None, None, "likewise"),
        ("--sample", "store_true", False, None, "small data and model: a minute on a laptop"),
        ("--limit", int, None, 1, "the first N questions of each file (default: all)"),
        ("--max-length", int, 384, 8, "tokens a window"),
        ("--stride", int, 128, 0, "tokens that two windows share"),
    ),
    "training": (
        ("--epochs", int, None, 0, "0 only evaluates (default: 3; sample: 40)"),
        ("--max-steps", int, None, 1, "optimiser steps at most (default: all)"),
        ("--batch-size", int, 32, 1, "features an optimiser step, over all ranks together"),
        ("--accumulate", int, 1, 1, "micro-steps an optimiser step"),
        ("--learning-rate", float, None, 0, "its peak (default: 5e-5; sample: 1e-3)"),
        ("--warmup", float, 0.1, 0, "share of the steps; then linear to zero"),
        ("--weight-decay", float, 0.01, 0, "on matrices only"),
        ("--dropout", float, None, 0, "probability (default: the model's; sample: 0)"),
        ("--seed", int, 42, 0, "one seed, one training"),
    ),
    "speed": (
        ("--device", ("auto", "cuda", "cpu"), "auto", None, ""),
        ("--batching", ("padded", "dynamic", "bucketed", "packed"), "packed", None, ""),
        ("--precision", ("fp32", "tf32", "bf16"), None, None, "default: bf16 on CUDA, else fp32"),
        ("--compile", ON_OFF, None, None, "each layer (default: on CUDA)"),
        ("--fused", ON_OFF, True, None, "AdamW in one kernel (default: on)"),
    ),
    "what a run leaves": (
        ("--output", str, None, None, f"folder (default: runs/{HERE.name}-JOBID or -DATE-TIME)"),
        ("--log-every", int, 10, 1, "steps"),
        ("--save-every", int, None, 1, "steps (default: every 5 minutes)"),
        ("--profile", ON_OFF, True, None, "trace three steps (default: on)"),
        ("--prepare", "store_true", False, None, "only fetch model and data, build the features"),
    ),
}


def parse_arguments(argv=None):
    """Returns the arguments with every default filled in; raises Problem on what cannot be."""
    name = f"{HERE.name}/train.py"
    how = {"prog": name, "allow_abbrev": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **how)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option, kind, default, _, text in options:
            how = {"choices": kind} if isinstance(kind, tuple) else {"action": kind}
            how = {"type": kind} if kind in (str, int, float) else how
            text += f" (default: {default})" if default and kind is not ON_OFF else ""
            group.add_argument(option, default=default, help=text, **how)
    args, unknown = parser.parse_known_args(argv)
    known = [option for options in OPTIONS.values() for option in options]
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [o[0] for o in known], 1)
        mend = f"did you mean {near[0]}?" if near else "--help lists the options"
        raise Problem(f"unknown option {unknown[0]}: {mend}")
    for name, usual, sample in (("epochs", 3, 40), ("learning_rate", 5e-5, 1e-3)):
        if getattr(args, name) is None:
            setattr(args, name, sample if args.sample else usual)
    for option, kind, _, least, _ in known:
        value, most = getattr(args, option[2:].replace("-", "_")), 2**31 if kind is int else 0.999
        if least is not None and value is not None and not least <= value <= most:  # or NaN
            raise Problem(f"{option} {value}: give a number from {least} to {most}")
    if args.sample:
        if args.train_file or args.validation_file or args.model != parser.get_default("model"):
            raise Problem("--sample brings its own: leave out --model and the data's files")
        args.train_file = args.validation_file = str(SAMPLE)
        args.dropout = args.dropout or 0.0
    if args.stride >= args.max_length - 3:
        raise Problem(f"--stride {args.stride}: make it smaller than --max-length allows")
    if args.batch_size < args.accumulate:
        raise Problem(f"--batch-size {args.batch_size}: give at least one feature a micro-step")
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if args.device == "cuda" and not cuda:
        raise Problem("--device cuda: torch sees no GPU: source baseline/env.sh on a GPU node")
    if args.precision == "tf32" and not cuda:
        raise Problem("--precision tf32 is for NVIDIA GPUs: give fp32 or bf16")
    args.device_type = "cuda" if cuda else "cpu"
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.compile = cuda if args.compile is None else args.compile
    run = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    args.output = args.output or f"runs/{HERE.name}-{run}"
    return args


# 2. Set-up and log


log = functools.partial(print, flush=True)


def progress(items, what):
    """Yields the items, telling how far it is: a bar in a terminal, else a line every 10 s."""
    how = {"mininterval": 10, "bar_format": "  {desc}: {percentage:.0f} %, {remaining} left\n"}
    how = {} if sys.stdout.isatty() else how
    return tqdm(items, what, file=sys.stdout, leave=False, delay=2, miniters=1, **how)


def set_up(args):
    """Returns the device; quietens the libraries; switches TF32 on where it is asked for."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")
    return torch.device(args.device_type)


def describe_environment(device):
    """Returns what a reader must know to trust the figures: commit, machine, clocks, versions."""
    ask = [sys.executable, REPORT, "--environment"]
    told = subprocess.run(ask, capture_output=True, text=True).stdout
    environment = {"commit": None, "devices": ["CPU"], "gpu": {}} | json.loads(told or "{}")
    if device.type == "cuda":
        environment["devices"] = [torch.cuda.get_device_name(device)]
        environment["gpus_visible"] = torch.cuda.device_count()
    environment |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    return environment | {"transformers": transformers.__version__, "numpy": np.__version__}


def write_whole(path, content):
    """Writes bytes, JSON, or what content(file) does, under another name; then renames it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if not callable(content) and not isinstance(content, bytes):
        content = json.dumps(content, indent=1).encode()
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save makes RuntimeErrors of the file's errors
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Problem(f"cannot write {path} ({error}): free space there, or choose another place")


# 3. Data to features


def read_squad(path, limit):
    """Reads a SQuAD v1.1 file into lists: contexts; and a question's id, text, paragraph, answers.

    answers are [start, text] pairs. Raises Problem naming the file, the field and the mend.
    """
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}: give the path of a SQuAD v1.1 JSON file")
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path}: not JSON ({error}): fetch the file again")

    def field(holder, name, kind, where):
        value = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = {str: "a text", list: "a list", int: "a whole number"}[kind]
            raise Problem(f"{path}: {where}{name} is not {wanted}: give SQuAD v1.1's shape")
        if kind is str and value.encode("utf-8", "ignore").decode() != value:
            raise Problem(f"{path}: {where}{name} holds a lone surrogate: mend the text")
        return value

    data = {name: [] for name in ("contexts", "ids", "questions", "paragraph", "answers")}
    seen = set()
    for i, article in enumerate(field(document, "data", list, "")):
        for j, paragraph in enumerate(field(article, "paragraphs", list, f"data[{i}].")):
            where = f"data[{i}].paragraphs[{j}]."
            context = field(paragraph, "context", str, where)
            if not context.strip():
                raise Problem(f"{path}: {where}context is empty: take the paragraph out")
            data["contexts"].append(context)
            for k, entry in enumerate(field(paragraph, "qas", list, where)):
                spot = f"{where}qas[{k}]."
                name = field(entry, "id", str, spot)
                if name in seen:
                    raise Problem(f"{path}: {spot}id {name[:60]!r} is there twice: rename one")
                answers = field(entry, "answers", list, spot)
                if entry.get("is_impossible") or not answers:
                    raise Problem(f"{path}: {spot}answers has none: this is SQuAD v2, take v1.1")
                for m, answer in enumerate(answers):
                    text = field(answer, "text", str, f"{spot}answers[{m}].")
                    start = field(answer, "answer_start", int, f"{spot}answers[{m}].")
                    if not text or start < 0 or context[start : start + len(text)] != text:
                        what = f"answers[{m}].answer_start does not lead to its text {text[:40]!r}"
                        raise Problem(f"{path}: {spot}{what} in the context: mend one of them")
                seen.add(name)
                data["ids"].append(name)
                data["questions"].append(field(entry, "question", str, spot))
                data["paragraph"].append(len(data["contexts"]) - 1)
                data["answers"].append([[a["answer_start"], a["text"]] for a in answers])
                if len(seen) == limit:
                    return data
    if not seen:
        raise Problem(f"{path}: data holds no question: give a file with paragraphs and qas")
    return data


def read_hub(split, limit):
    """Reads the hub's SQuAD from its cache, or fetches it; in read_squad's shape."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(HUB_DATA, split=split)
    except Exception as error:  # its errors have no common class
        mend = "run bash baseline/prepare.sh where there is internet, or give --train-file"
        raise Problem(f"{HUB_DATA} is not in the cache ({type(error).__name__}): {mend}")
    rows = rows[: limit or len(rows)]
    contexts = list(dict.fromkeys(rows["context"]))
    numbers = {context: number for number, context in enumerate(contexts)}
    answers = [list(zip(a["answer_start"], a["text"])) for a in rows["answers"]]
    data = {"contexts": contexts, "paragraph": [numbers[c] for c in rows["context"]]}
    return data | {"ids": rows["id"], "questions": rows["question"], "answers": answers}


def encode(tokenizer, texts, what, offsets):
    """Yields each text's token ids [tokens] and, if asked, their characters [tokens, 2]."""
    how = {"return_offsets_mapping": offsets, "add_special_tokens": False, "verbose": False}
    how |= {"return_attention_mask": False, "return_token_type_ids": False}
    for begin in progress(range(0, len(texts), 1024), f"tokenising {what}"):
        encoding = tokenizer(texts[begin : begin + 1024], **how)
        for i, ids in enumerate(encoding["input_ids"]):
            spans = np.array(encoding["offset_mapping"][i] if offsets else (), np.int32)
            yield np.array(ids, np.int32), spans.reshape(-1, 2)


def build_features(data, tokenizer, max_length, stride, path):
    """Cuts each question's paragraph into windows [CLS] question [SEP] context [SEP].

    Equal to the usual tokenizer(question, context, truncation="only_second", max_length, stride,
    return_overflowing_tokens=True), but each paragraph is tokenised once, not once a question.
    Returns arrays; window w holds tokens[begin[w] : begin[w + 1]], its context from place first[w].
    """
    contexts = list(encode(tokenizer, data["contexts"], "paragraphs", True))
    cls, sep = (np.array([i], np.int32) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    pieces, windows = [], []
    for i, (question, _) in enumerate(encode(tokenizer, data["questions"], "questions", False)):
        ids, offsets = contexts[data["paragraph"][i]]
        room = max_length - len(question) - 3
        if not len(ids) or (room <= stride and room < len(ids)):
            what = f"question {data['ids'][i][:60]!r}: its {len(question)} tokens, its context's"
            mend = "raise --max-length, lower --stride, or mend the text"
            raise Problem(
                f"{path}: {what} {len(ids)}, do not fit --max-length {max_length}: {mend}"
            )
        answer_start, answer = data["answers"][i][0]
        answer_end = answer_start + len(answer)
        starts, ends, first = offsets[:, 0], offsets[:, 1], len(question) + 2
        for begin in range(0, len(ids), max(room - stride, 1)):
            end = min(begin + room, len(ids))
            start_place = end_place = 0  # [CLS], where the answer is not in this window
            if starts[begin] <= answer_start and ends[end - 1] >= answer_end:
                start_place = first - 1 + np.searchsorted(starts[begin:end], answer_start, "right")
                end_place = first + np.searchsorted(ends[begin:end], answer_end)
            pieces += [cls, question, sep, ids[begin:end], sep]
            windows.append((i, first, begin, end - begin, start_place, end_place))
            if end == len(ids):
                break
    columns = ("question", "first", "context_begin", "context_tokens", "start", "end")
    features = dict(zip(columns, np.array(windows, np.int32).T.copy()))
    lengths = features["first"] + features["context_tokens"] + 1
    features["tokens"] = np.concatenate(pieces)
    features["begin"] = np.append(0, np.cumsum(lengths, dtype=np.int64))
    features["offsets"] = np.concatenate([offsets for _, offsets in contexts])
    features["offsets_begin"] = np.cumsum([0] + [len(ids) for ids, _ in contexts])
    features["paragraph"] = np.array(data["paragraph"], np.int32)
    texts = json.dumps({name: data[name] for name in ("contexts", "ids", "answers")})
    return features | {"texts": np.frombuffer(texts.encode(), np.uint8)}


def checksum(features):
    return str(sum(zlib.crc32(features[name].data) for name in features))


def prepare_features(path, split, tokenizer, args):
    """Returns the features of a file, or of the hub's split: from the cache, or built and kept."""
    try:
        source = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else HUB_DATA + split
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}: give the path of a SQuAD v1.1 JSON file")
    words = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    key = json.dumps([1, source, words, args.limit, args.max_length, args.stride])
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    file, features = CACHE / f"features-{key}.safetensors", None
    with contextlib.ExitStack() as stack:  # of several jobs that start at once, one builds
        with contextlib.suppress(OSError):  # a read-only cache, a file system without locks
            CACHE.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{file}.lock", "a")), fcntl.LOCK_EX)
        try:
            with safetensors.safe_open(file, "pt") as kept:  # memory-mapped
                features = {name: kept.get_tensor(name).numpy() for name in kept.keys()}
                if kept.metadata()["checksum"] != checksum(features):
                    raise ValueError("its checksum is another")
        except Exception as error:  # safetensors has errors of its own
            features = None
            if file.exists():
                log(f"the cache {file} is damaged ({error}): building it again")
        cached = features is not None
        if not cached:
            data = read_squad(path, args.limit) if path else read_hub(split, args.limit)
            path = path or HUB_DATA
            log(f"{path}: {len(data['ids']):,} questions, building their features (once)")
            features = build_features(data, tokenizer, args.max_length, args.stride, path)
            content = safetensors.numpy.save(features, {"checksum": checksum(features)})
            try:
                write_whole(file, content)
            except Problem as problem:
                log(f"the features are not kept: {problem}")
    features["texts"] = json.loads(features["texts"].tobytes())
    features["lengths"] = np.diff(features["begin"])
    return features | {"key": key, "cached": cached, "pad": tokenizer.pad_token_id}


# 4. Batches


def plan_epoch(lengths, args, epoch):
    """Returns the epoch's batches as feature numbers [steps, batch size]; -1 fills the last one.

    padded, dynamic: at random. bucketed: neighbours in length, within pools of 50 batches. packed:
    one of each length stratum, so that every batch has nearly the same number of tokens.
    """
    random = np.random.default_rng((args.seed, epoch))
    order, size = random.permutation(len(lengths)), args.batch_size
    full, rest = divmod(len(lengths), size)
    if args.batching in ("bucketed", "packed"):
        order = order[np.argsort(lengths[order], kind="stable")]
        # The features left over, for the last batch, are picked evenly over all lengths.
        picked = (np.arange(rest) + random.random()) * len(lengths) / max(rest, 1)
        order, last = np.delete(order, picked.astype(int)), order[picked.astype(int)]
        if args.batching == "packed":
            batches = random.permuted(order.reshape(size, full), axis=1).T
        else:
            pool = random.permutation(len(order)) // (50 * size)
            order = order[np.argsort(pool, kind="stable")]  # each pool still by length
            batches = random.permutation(order.reshape(full, size))
        order = np.concatenate([batches.ravel(), last])
    plan = np.full((full + bool(rest), size), -1)
    plan.ravel()[: len(order)] = order
    return plan


def share_out(plan, lengths, parts):
    """Deals each batch into parts of nearly equal tokens [steps, parts, rows], rows by length.

    The longest first, to and fro (1 2 3 3 2 1 ...), as captains choose teams.
    """
    steps, size = plan.shape
    rows = -(-size // parts)
    order = np.argsort(-np.where(plan < 0, 0, lengths[plan]), axis=1, kind="stable")
    dealt = np.full((steps, parts * rows), -1)
    dealt[:, :size] = np.take_along_axis(plan, order, axis=1)
    dealt = dealt.reshape(steps, rows, parts)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1]
    return dealt.transpose(0, 2, 1)[:, :, ::-1].copy()


def plan_training(lengths, args):
    """Returns the whole run's plan: who is in which micro-batch, its shapes, what a step counts.

    A place that nobody has (-1) holds one token of no weight. The strata of packed batches are
    (first row, last row, longest): every batch has one feature of each length, so that the rows of
    a stratum are alike and all micro-batches have one static shape.
    """
    parts = args.accumulate
    epochs = [plan_epoch(lengths, args, epoch) for epoch in range(args.epochs)]
    shares = np.concatenate([share_out(epoch, lengths, parts) for epoch in epochs])
    shares = shares[: args.max_steps]  # [steps, parts, rows]
    sizes = np.where(shares < 0, 0, lengths[shares])
    steps, _, rows = shares.shape
    shapes = {"rows": rows, "longest": args.max_length}
    longest = np.full((steps, parts), args.max_length)
    if args.batching in ("dynamic", "bucketed"):
        multiple = 64 if args.compile else 8  # few shapes, few compilations
        longest = np.clip(-(-sizes.max(axis=2) // multiple) * multiple, 1, args.max_length)
    computed = rows * longest.sum(axis=1)
    if args.batching == "packed":
        held = np.maximum(sizes, 1)
        edges = np.linspace(0, rows, np.clip(rows // 8, 1, 8) + 1).astype(int).tolist()
        # A stratum is wider than its longest: its free places are the padding's (Rearrange).
        widths = [int(held[:, :, a:b].max()) // 8 * 8 + 8 for a, b in zip(edges, edges[1:])]
        shapes |= {"strata": list(zip(edges, edges[1:], widths)), "longest": widths[-1]}
        shapes["tokens"] = int(held.sum(axis=2).max()) // 64 * 64 + 64
        computed = np.full(steps, shapes["tokens"] * parts)
    plan = {"shares": shares, "shapes": shapes, "longest": longest, "computed": computed}
    plan |= {"steps": steps, "steps_an_epoch": len(epochs[0]), "tokens": sizes.sum(axis=(1, 2))}
    return plan | {"features": (sizes > 0).sum(axis=(1, 2)), "squares": (sizes**2).sum(axis=(1, 2))}


def to_device(features, device):
    """Copies what batches are cut from to the device, once: 60 MB for all of SQuAD."""
    names = ("tokens", "begin", "lengths", "first", "start", "end")
    return {name: torch.tensor(features[name], device=device) for name in names}


def make_batch(table, chosen, shapes, pad):
    """Cuts a micro-batch out of the tokens on the device, with no word to the host.

    chosen [rows]: feature numbers, -1 for a place nobody has. Returns the model's inputs, [rows,
    longest] or packed [1, tokens]; and for the loss each sequence's places among the tokens [rows,
    longest], which are real [rows, longest], labels [rows, 2] and weights [rows].
    """
    device, rows, longest = chosen.device, shapes["rows"], shapes["longest"]
    weights, chosen = (chosen >= 0).float(), chosen.clamp(min=0)
    lengths = torch.where(weights > 0, table["lengths"][chosen], 1)
    columns = torch.arange(longest, device=device)
    real = columns < lengths[:, None]
    if "tokens" not in shapes:
        row = torch.arange(rows, device=device)[:, None]
        position, inside = columns.expand(rows, longest), real
        places, inputs = row * longest + columns, {"attention_mask": real}
    else:
        ends = lengths.cumsum(0)
        token = torch.arange(shapes["tokens"], device=device)[None]  # [1, tokens]
        row = torch.searchsorted(ends, token, right=True)
        inside, row = row < rows, row.clamp(max=rows - 1)
        position = torch.where(inside, token - (ends - lengths)[row], 0)
        # The last token is always padding, and so stands for all free places.
        places = torch.where(real, (ends - lengths)[:, None] + columns, shapes["tokens"] - 1)
        slots, strata, begin = torch.zeros_like(token), [], 0
        for low, high, width in shapes["strata"]:
            strata.append((places[low:high, :width], real[low:high, None, None, :width]))
            slots = torch.where(row >= low, begin + (row - low) * width + position, slots)
            begin += (high - low) * width
        slots = torch.where(inside, slots, begin - 1)[0]
        inputs = {"position_ids": position, "strata": tuple(strata), "slots": slots}
    source = (table["begin"][chosen][row] + position).clamp(max=len(table["tokens"]) - 1)
    inputs["input_ids"] = torch.where(inside, table["tokens"][source], pad)
    inputs["token_type_ids"] = (inside & (position >= table["first"][chosen][row])).long()
    labels = torch.stack([table["start"][chosen], table["end"][chosen]], 1).long()
    labels = torch.where(weights[:, None] > 0, labels, 0)
    return {"inputs": inputs, "places": places, "real": real, "labels": labels, "weights": weights}


# 5. Model


class Rearrange(torch.autograd.Function):
    """x[index], with grad[inverse] as its gradient: a gather both ways, no atomics, deterministic.

    Free places read padding and padding reads a free place; both have a gradient of exactly zero.
    """

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def packed_attention(module, query, key, value, mask, strata, slots, dropout=0.0, **_):
    """Attention among sequences packed in one row, none of which sees another; on any device.

    query, key, value: [1, heads, tokens, size]. strata: for each length stratum the places of its
    sequences' tokens [sequences, longest], and which are real [sequences, 1, 1, longest]. slots
    [tokens]: the place of each token among the strata's. Returns [1, tokens, heads, size], None.
    """
    heads, size = query.shape[1], query.shape[3]
    flat = torch.cat((query, key, value), dim=1)[0].transpose(0, 1)  # [tokens, 3 heads, size]
    index = torch.cat([places.flatten() for places, _ in strata])
    gathered, outputs = Rearrange.apply(flat, index, slots), []  # [slots, 3 heads, size]
    parts = gathered.split([places.numel() for places, _ in strata])
    for part, (places, real) in zip(parts, strata):
        q, k, v = part.view(*places.shape, 3, heads, size).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(q, k, v, real, dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [sequences x longest, heads, size]
    return Rearrange.apply(torch.cat(outputs), slots, index)[None], None


transformers.AttentionInterface.register("packed", packed_attention)


class SpanModel(torch.nn.Module):
    """The model and its loss in one forward, so that what wraps it sees all of a training step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, count):
        """Returns the sum over the sequences of start's and end's mean loss, over count."""
        losses = F.cross_entropy(span_logits(self.model, batch), batch["labels"], reduction="none")
        return (losses.mean(dim=1) * batch["weights"]).sum() / count


def span_logits(model, batch):
    """Returns start's and end's logits [rows, longest, 2] in fp32, -inf where no token is."""
    hidden = model.base_model(**batch["inputs"])[0].flatten(0, 1)  # [tokens, hidden size]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = model.qa_outputs(hidden.float())  # [tokens, 2]
    return logits[batch["places"]].masked_fill(~batch["real"][..., None], -torch.inf)


def autocast(args):
    return torch.autocast(args.device_type, torch.bfloat16, enabled=args.precision == "bf16")


def sample_tokenizer():
    """Returns a WordPiece tokenizer of the sample's characters and its 1,500 most frequent words."""
    data, tokenizer = read_squad(SAMPLE, None), transformers.BertTokenizerFast(vocab={"[UNK]": 0})
    backend, words = tokenizer.backend_tokenizer, collections.Counter()
    for text in data["contexts"] + data["questions"]:
        text = backend.normalizer.normalize_str(text)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    characters = sorted(set("".join(words)))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    vocabulary += [f"##{c}" for c in characters] + [word for word, _ in words.most_common(1500)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    return transformers.BertTokenizerFast(vocab=vocabulary)


def load_tokenizer(args):
    """Returns the tokenizer and the model's config; raises Problem on what cannot be trained."""
    if args.sample:
        tokenizer = sample_tokenizer()
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 512, "vocab_size": len(tokenizer)}
        return tokenizer, transformers.BertConfig(**sizes)  # about a million parameters
    name, where = args.model, f"--model {args.model}"
    if Path(name).is_dir() and not {"tokenizer.json", "vocab.txt"} & set(os.listdir(name)):
        raise Problem(f"{where}: it has no tokenizer.json: save the tokenizer there")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # its errors have no common class
        mend = "give a folder of transformers, or a hub name after bash baseline/prepare.sh"
        raise Problem(f"{where}: {type(error).__name__}: {str(error)[:150]}: {mend}")
    if config.model_type not in MODEL_TYPES:
        raise Problem(f"{where} is a {config.model_type}: give one of {', '.join(MODEL_TYPES)}")
    if not tokenizer.is_fast or None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise Problem(f"{where}: it has no fast tokenizer with [CLS] and [SEP]: save one there")
    if len(tokenizer) > config.vocab_size:
        what = f"its tokenizer has {len(tokenizer)} words, its model {config.vocab_size}"
        raise Problem(f"{where}: {what}: save the two that belong together")
    if args.max_length > config.max_position_embeddings:
        raise Problem(f"--max-length: lower it to the model's {config.max_position_embeddings}")
    return tokenizer, config


def load_model(args, config):
    """Returns the model in fp32 on the CPU; its question-answering head, if new, is from --seed."""
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"):
        if args.dropout is not None and hasattr(config, name):
            setattr(config, name, args.dropout)
    how = {"attn_implementation": "packed" if args.batching == "packed" else "sdpa"}
    torch.manual_seed(args.seed)
    family = transformers.AutoModelForQuestionAnswering
    if args.sample:
        return family.from_config(config, dtype=torch.float32, **how)
    how |= {"dtype": torch.float32, "use_safetensors": True}  # never a pickle
    try:
        return family.from_pretrained(args.model, config=config, **how)
    except Exception as error:  # SafetensorError, OSError, RuntimeError
        mend = "give a folder with a whole model.safetensors"
        raise Problem(f"--model {args.model}: {type(error).__name__}: {str(error)[:150]}: {mend}")


def encoder_layers(model):
    return next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))


def compile_layers(model):
    """Compiles layer by layer: they are alike, so that one layer's time is enough for all."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not shutil.which(os.environ.get("CC", "cc")) or not header.exists():
        log(f"not compiling: this node has no C compiler or no {header}; going on without")
        return
    torch._dynamo.config.recompile_limit = 32  # bucketed batches come in several shapes
    for layer in encoder_layers(model):
        layer.compile(fullgraph=True, dynamic=False)


def count_flops(model, tokens, squares):
    """Returns the FLOPs of training: 6 x weights x tokens + 12 x layers x hidden x sum of squares.

    6: a multiply-add is two, once forward and twice backward (Kaplan et al. 2020, section 2.1);
    the weights are the encoder's and head's matrices. Attention: 4 x hidden x length^2 forward.
    """
    weights = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    weights = sum(number for name, number in weights.items() if "embeddings" not in name)
    layers, hidden = len(encoder_layers(model)), model.config.hidden_size
    return 6 * weights * float(tokens) + 12 * layers * hidden * float(squares)


def peak_flops(device, precision):
    """Returns the GPU's dense peak in FLOP/s at this precision; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known in sorted(PEAKS, key=len, reverse=True):
        if all(word in name for word in known.split()):
            return PEAKS[known][("bf16", "tf32", "fp32").index(precision)] * 1e12
    return None


# 6. Optimiser and schedule


def make_optimizer(model, args):
    """Returns AdamW, with decay on matrices only, and its parameters' names in its order."""
    named = sorted(model.named_parameters(), key=lambda pair: pair[1].ndim < 2)  # stable
    matrices = {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": args.weight_decay}
    others = {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, others], lr=0.0, fused=args.fused)
    return optimizer, [name for name, _ in named]


def learning_rate_at(step, steps, args):
    """Returns the rate of a step (from 0): up in a line over the warm-up, then down to zero."""
    warmup = max(math.ceil(args.warmup * steps), 1)
    return args.learning_rate * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


# 7. Timing and profiling


class Clock:
    """Seconds of each phase: by events on a GPU, read once a log interval; on a CPU by the clock."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, name):
        with torch.profiler.record_function(name):
            begin = self.now()
            yield
            self.marks.append((name, begin, self.now()))

    def read(self):
        """Returns {phase: seconds} since the last call; the device must be done with them."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, begin, end in self.marks:
            seconds[name] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
        self.marks.clear()
        return seconds


def peak_memory(device):
    """GiB: what torch had allocated at most on a GPU; the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# 8. Checkpoints and signals

STOP = []  # the signals that asked this run to stop


def catch_signals():
    """SLURM's USR1 before the time limit, scancel's TERM, Ctrl-C: go on to the step's end, save."""

    def note(number, frame):
        if number == signal.SIGINT and STOP:
            raise KeyboardInterrupt  # Ctrl-C once more: at once
        STOP.append(signal.Signals(number).name)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def open_output(output):
    """Makes the folder, sees that it can be written, and returns its lock, held to the end."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"--output {output}: another run writes there: wait, or choose another")
    except OSError as error:
        raise Problem(f"--output {output}: {error.strerror}: choose a folder that can be written")
    return lock


def save_checkpoint(output, model, optimizer, names, state, settings):
    """Saves weights and moments by the parameters' names; the checkpoint before stays till then."""
    moments = optimizer.state_dict()["state"]
    content = {"settings": settings, "state": state, "model": dict(model.named_parameters())}
    content["optimizer"] = {names[i]: moments[i] for i in moments}
    write_whole(output / "checkpoint.pt", lambda file: torch.save(content, file))


def load_checkpoint(output, settings):
    """Returns output's checkpoint, None if there is none; raises Problem on another run's."""
    path = output / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        was = content["settings"]
        other = [name for name in settings if was.get(name) != settings[name]]
    except Exception as error:  # torch's errors have no common class
        raise Problem(f"{path} is no whole checkpoint ({type(error).__name__}): remove it")
    if other:
        told = [f"--{n.replace('_', '-')} (was {was.get(n)}, now {settings[n]})" for n in other]
        raise Problem(f"{path} has other settings: {', '.join(told)}: choose another --output")
    return content


def restore(content, model, optimizer, names):
    """Puts a checkpoint's weights and moments in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(content["model"][name])
    groups, moments = optimizer.state_dict()["param_groups"], content["optimizer"]
    moments = {i: moments[name] for i, name in enumerate(names) if name in moments}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


# 9. Evaluation


def best_spans(logits, windows, features):
    """Returns each window's best answer [windows, 4]: score, first, last character, how many.

    logits [windows, longest, 2]. As the usual decoding: all pairs of the 20 best starts and ends in
    the context and of at most 30 tokens; ties go to the first in np.argsort's order.
    """
    best = np.zeros((len(windows), 4))
    for length in np.unique(features["lengths"][windows]):
        here = np.flatnonzero(features["lengths"][windows] == length)
        chosen, each = windows[here], np.arange(len(here))
        scores = logits[here, :length]  # [windows, length, 2]
        top = np.argsort(scores, axis=1)[:, : -N_BEST - 1 : -1]  # [windows, 20, 2]
        values = np.take_along_axis(scores, top, axis=1)
        start, end = top[:, :, None, 0], top[:, None, :, 1]
        first = features["first"][chosen]
        after = (first + features["context_tokens"][chosen])[:, None, None]
        fits = (start >= first[:, None, None]) & (end < after)
        fits &= (end >= start) & (end - start < MAX_ANSWER_TOKENS)
        sums = np.where(fits, values[:, :, None, 0] + values[:, None, :, 1], -np.inf)
        pick = sums.reshape(len(here), -1).argmax(axis=1)
        some = fits.any((1, 2))  # a window with no answer points at its first token, and counts 0
        paragraph = features["paragraph"][features["question"][chosen]]
        token = features["offsets_begin"][paragraph] + features["context_begin"][chosen] - first
        start = token + np.where(some, top[each, pick // top.shape[1], 0], first)
        end = token + np.where(some, top[each, pick % top.shape[1], 1], first)
        characters = features["offsets"][start, 0], features["offsets"][end, 1]
        best[here] = np.stack([sums.max((1, 2)), *characters, fits.sum((1, 2))], axis=1)
    return best


def answer_texts(best, features):
    """Returns {question id: its best window's answer}; "empty" where the usual decoding says so."""
    texts, answers = features["texts"], {}
    edges = np.searchsorted(features["question"], np.arange(len(texts["ids"]) + 1))
    for i, name in enumerate(texts["ids"]):
        windows = best[edges[i] : edges[i + 1]]
        start, end = windows[windows[:, 0].argmax(), 1:3].astype(int)
        text = texts["contexts"][features["paragraph"][i]][start:end]
        count = windows[:, 3].sum()
        answers[name] = text if count > 1 or (count == 1 and text) else "empty"
    return answers


def normalise(text):
    """The official scorer's words: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def score(predictions, texts):
    """Returns EM and F1 in percent and whose scorer: evaluate's if it is in the cache, else ours.

    Both are SQuAD v1.1's official evaluation (Rajpurkar et al. 2016).
    """
    gold = {i: [text for _, text in answers] for i, answers in zip(texts["ids"], texts["answers"])}
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    home = Path(os.environ.get("HF_MODULES_CACHE") or Path(home, "modules"))
    if (home / "evaluate_modules/metrics/evaluate-metric--squad").is_dir():
        os.environ["HF_EVALUATE_OFFLINE"] = "1"
        with contextlib.suppress(Exception):  # a broken cache must not cost the run its score
            import evaluate

            told = [{"id": i, "prediction_text": predictions[i]} for i in gold]
            right = [{"text": gold[i], "answer_start": [0] * len(gold[i])} for i in gold]
            right = [{"id": i, "answers": answers} for i, answers in zip(gold, right)]
            scores = evaluate.load("squad").compute(predictions=told, references=right)
            return float(scores["exact_match"]), float(scores["f1"]), "evaluate"
    exact = f1 = 0.0
    for name, answers in gold.items():
        said, best = normalise(predictions[name]), 0.0
        for words in map(normalise, answers):
            same = sum((collections.Counter(said) & collections.Counter(words)).values())
            best = max(best, 2 * same / (len(said) + len(words)) if same else 0.0)
        exact += any(said == normalise(answer) for answer in answers)
        f1 += best
    return 100 * exact / len(gold), 100 * f1 / len(gold), "own"


@torch.inference_mode()
def evaluate_model(args, device, model, features):
    """Returns the predictions {question id: answer}, or None where the run was told to stop."""
    model.eval()
    table, lengths = to_device(features, device), features["lengths"]
    order, batches = np.argsort(-lengths, kind="stable"), []
    while len(order):  # the longest first, so that a batch's lengths are alike
        rows = max(EVALUATION_TOKENS // int(lengths[order[0]]), 1)
        batches, order = [*batches, order[:rows]], order[rows:]
    best = np.zeros((len(lengths), 4))
    for windows in progress(batches, "evaluating"):
        if STOP:
            return None
        longest = int(lengths[windows[0]]) + 1
        shapes = {"rows": len(windows), "longest": longest}
        if args.batching == "packed":
            shapes |= {"tokens": int(lengths[windows].sum()) // 64 * 64 + 64}
            shapes |= {"strata": [(0, len(windows), longest)]}
        batch = make_batch(table, torch.tensor(windows, device=device), shapes, features["pad"])
        # Shapes differ from batch to batch: compiling for each would not pay.
        with torch.compiler.set_stance("force_eager"), autocast(args):
            logits = span_logits(model, batch)
        best[windows] = best_spans(logits.cpu().numpy(), windows, features)
    return answer_texts(best, features)


# 10. Training


def check_hours(args, model, plan):
    """Stops what would take a CPU hours by mistake: on a login node, say."""
    rate = 2e10 * torch.get_num_threads()  # FLOP/s: what training reached on two cores, and more
    hours = count_flops(model, plan["computed"].sum(), plan["squares"].sum()) / rate / 3600
    if args.device_type == "cpu" and args.device == "auto" and hours > CPU_HOURS:
        what = f"no GPU, and {plan['steps']:,} steps take this CPU about {hours:,.0f} hours"
        raise Problem(f"{what}: use sbatch, --sample or --limit N; --device cpu goes on regardless")


def new_state(plan):
    """Returns all that a checkpoint carries beside weights and moments: plain numbers and texts."""
    state = dict.fromkeys(("train_seconds", "warmup_seconds", "seconds", "squares"), 0.0)
    state |= dict.fromkeys(("step", "repeated_steps", "tokens", "features"), 0)
    state |= {"epoch_seconds": [0.0] * -(-plan["steps"] // plan["steps_an_epoch"])}
    state |= {"phases": dict.fromkeys(PHASES, 0.0), "intervals": [], "resumed_from_steps": []}
    return state | {"beside": dict.fromkeys(("checkpoint", "profile", "log"), 0.0), "operators": ""}


def train(args, device, output, model, optimizer, features, plan, state, save):
    """Trains from state["step"] to the plan's end; returns early where it is told to stop."""
    training = SpanModel(model).train()
    table, clock = to_device(features, device), Clock(device)
    shares = torch.tensor(plan["shares"], device=device)  # [steps, parts, rows]
    first, steps, steps_an_epoch = state["step"], plan["steps"], plan["steps_an_epoch"]
    writer = SummaryWriter(output / "tensorboard", purge_step=first + 1 if first else None)
    names = ("training/loss", "training/learning_rate", "training/gradient_norm")
    names += ("speed/tokens_per_second", "speed/peak_memory_gib", "phases/.*")
    writer.add_custom_scalars({"overview": {name: ["Multiline", [name]] for name in names}})

    # Each life warms up (compiling, allocating), the first profiles; then intervals are steady.
    every = min(args.log_every, max(steps // 4, 1))
    warm = first + min(5, (steps - first) // 4)
    profiled = warm + 3 * (args.profile and not state["operators"] and steps - first >= 8)
    losses, norms = torch.zeros(2, every, device=device)
    profiler, read = None, first  # read: the steps whose losses have been read
    mark = train_mark = saved = time.perf_counter()

    def flush(done):
        """Reads the losses and times of the steps from read to done: the one wait for the device."""
        nonlocal mark, train_mark, read
        values = torch.stack((losses, norms), 1)[: done - read].tolist()
        losses.zero_()
        now, phases, span = time.perf_counter(), clock.read(), slice(read, done)
        for step, pair in enumerate(values, read + 1):
            if not all(map(math.isfinite, pair)):
                what = f"step {step}: the loss is {pair[0]}, the gradient's norm {pair[1]}"
                mend = "lower --learning-rate, or try --precision fp32; the last checkpoint is kept"
                raise Problem(f"{what}: {mend}", 1)
        counts = {name: plan[name][span].sum().item() for name in ("tokens", "features", "squares")}
        seconds, steady, rate = (
            now - mark,
            read >= profiled,
            learning_rate_at(done - 1, steps, args),
        )
        loss, norm = (sum(column) / len(values) for column in zip(*values))
        speed, memory = counts["tokens"] / seconds, peak_memory(device)
        for name, value in (counts | {"seconds": seconds}).items():
            state[name] += value * steady
        for name in phases:
            state["phases"][name] += phases[name] * steady
        state["warmup_seconds"] += seconds * (read < warm)
        interval = {"step": done, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        interval |= {"seconds": seconds, "tokens": counts["tokens"], "steady": steady}
        state["intervals"].append(interval)
        left = plan["tokens"][done:].sum()
        left *= state["seconds"] / state["tokens"] if state["tokens"] else 1 / speed
        where = (
            f"step {done:,}/{steps:,} {done / steps:4.0%}, {left // 60:.0f}:{left % 60:02.0f} left"
        )
        log(f"{where}  loss {loss:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s  {memory:.1f} GiB")
        shown = [loss, rate, norm, speed, memory, *(phases[name] / seconds for name in PHASES)]
        for name, value in zip((*names[:-1], *(f"phases/{name}" for name in PHASES)), shown):
            writer.add_scalar(name, value, done)
        writer.flush()
        (output / ".lock").write_text(str(done))  # how far it got, should it be killed
        for step in range(read, done):
            state["epoch_seconds"][step // steps_an_epoch] += (now - train_mark) / (done - read)
        read = state["step"] = done
        state["train_seconds"] += now - train_mark
        mark, train_mark = time.perf_counter(), now
        state["beside"]["log"] += mark - now

    for step in range(first, steps):
        if STOP:
            break
        if step == warm < profiled:
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=1)
            folder = f"{output}/tensorboard"
            handler = torch.profiler.tensorboard_trace_handler(folder, "rank0", use_gzip=True)
            profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=handler)
            profiler.start()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, args)
        for micro in range(args.accumulate):
            # The dropout masks follow from these numbers: no random state is ever saved.
            seed = np.random.SeedSequence((args.seed, step, micro))
            torch.manual_seed(int(seed.generate_state(1)[0]))
            with clock("data"):
                shapes = plan["shapes"]
                if args.batching != "packed":
                    shapes = shapes | {"longest": int(plan["longest"][step, micro])}
                batch = make_batch(table, shares[step, micro], shapes, features["pad"])
            with clock("forward"), autocast(args):
                loss = training(batch, int(plan["features"][step]))
            with clock("backward"):
                loss.backward()
            losses[step - read] += loss.detach()
        with clock("optimizer"):
            norms[step - read] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        begin, done = time.perf_counter(), step + 1
        if profiler:
            profiler.step()  # after the third it writes the trace
            if done == profiled:
                column = f"self_{device.type}_time_total"
                state["operators"] = profiler.key_averages().table(column, row_limit=20)
                profiler = profiler.stop()
                state["beside"]["profile"] += time.perf_counter() - begin
        due = begin - saved > SAVE_SECONDS
        if args.save_every:
            due = done % args.save_every == 0
        if done % every == 0 or done == steps or due or STOP:
            flush(done)
        if due and done < steps:
            begin = time.perf_counter()
            save()
            mark = saved = time.perf_counter()
            state["beside"]["checkpoint"] += mark - begin
    writer.close()
    save()  # told to stop, or done: nothing that follows can lose it


# 11. Main


def collect_results(args, device, model, features, plan, state):
    """Returns what goes into results.json and into timings.json of the training's figures."""
    seconds, tokens = state["seconds"], int(features["lengths"].sum())
    flops, peak = (
        count_flops(model, state["tokens"], state["squares"]),
        peak_flops(device, args.precision),
    )
    computed = plan["computed"].sum() if plan else 0
    names = "train_seconds epoch_seconds warmup_seconds resumed_from_steps repeated_steps"
    results = {name: state[name] for name in names.split()} | {"world_size": 1, "nodes": 1}
    results |= {"steps": plan["steps"] if plan else 0, "train_features": len(features["lengths"])}
    results |= {"parameters": sum(p.numel() for p in model.parameters())}
    results |= {"padding_share": float(1 - plan["tokens"].sum() / computed) if plan else None}
    speeds = {"steady_epoch_seconds": None, "tokens_per_second": None, "features_per_second": None}
    speeds |= {"flops_per_second": None, "model_flops_utilization": None}
    if seconds:
        speeds["tokens_per_second"] = state["tokens"] / seconds
        speeds["features_per_second"] = state["features"] / seconds
        speeds["steady_epoch_seconds"] = tokens * seconds / state["tokens"]
        speeds["flops_per_second"] = flops / seconds
        if peak:
            speeds["model_flops_utilization"] = flops / seconds / results["world_size"] / peak
    results |= speeds | {"peak_memory_gib": peak_memory(device)}
    phases = {name: (value, seconds) for name, value in state["phases"].items() if seconds}
    phases |= {name: (value, state["train_seconds"]) for name, value in state["beside"].items()}
    phases = {name: {"seconds": s, "share": s / max(of, 1e-9)} for name, (s, of) in phases.items()}
    timings = {"phases": phases, "intervals": state["intervals"], "operators": state["operators"]}
    shown = [plan[name][:200].tolist() for name in ("tokens", "computed")] if plan else [[], []]
    return results, timings | {"tokens_per_step": list(zip(*shown))}


def run(args):
    """The whole run, as a summary of this file."""
    device, output = set_up(args), Path(args.output)
    if (output / "results.json").exists():
        log(f"{output} holds a finished run and is left alone: choose another --output")
        return 0
    catch_signals()
    environment = describe_environment(device)
    what = "the sample" if args.sample else args.model
    log(f"{HERE.name}: {what}, {args.precision}, {args.batching} batches, to {output}")
    log(f"{environment['devices'][0]}, torch {torch.__version__}, commit {environment['commit']}")
    lock = open_output(output) if not args.prepare else None
    tokenizer, config = load_tokenizer(args)
    begin = time.perf_counter()
    features = prepare_features(args.train_file, "train", tokenizer, args)
    validation = prepare_features(args.validation_file, "validation", tokenizer, args)
    prepare_seconds = time.perf_counter() - begin
    cached = features["cached"] and validation["cached"]
    counts = f"{len(features['lengths']):,} and {len(validation['lengths']):,} features"
    log(f"{counts}, {'from the cache' if cached else 'built'} in {prepare_seconds:.1f} s")
    names = "sample limit max_length stride epochs max_steps batch_size accumulate batching"
    names += " precision learning_rate warmup weight_decay dropout seed"
    settings = {name: getattr(args, name) for name in names.split()}
    settings |= {"model": Path(args.model).name, "train_file": features["key"]}
    checkpoint = load_checkpoint(output, settings)
    model = load_model(args, config).to(device)
    if args.prepare:
        log(f"ready: model, data, features ({CACHE}): the runs need no internet now")
        return 0

    plan = plan_training(features["lengths"], args) if args.epochs else None
    state = new_state(plan or {"steps": 0, "steps_an_epoch": 1})
    optimizer, names = make_optimizer(model, args)
    if checkpoint:
        restore(checkpoint, model, optimizer, names)
        state = checkpoint["state"]
        reached = (output / ".lock").read_text().strip()
        repeated = max(int(reached) - state["step"], 0) if reached.isdigit() else 0
        state["repeated_steps"] += repeated
        state["resumed_from_steps"].append(state["step"])
        log(f"going on from step {state['step']:,}; {repeated} steps after it are done again")
    if plan and state["step"] < plan["steps"]:
        check_hours(args, model, plan)
        if args.compile:
            compile_layers(model)
        each = f"{args.batch_size} features, {args.accumulate} x {plan['shapes']['rows']}"
        log(f"{plan['steps']:,} steps ({plan['steps_an_epoch']:,} an epoch) of {each}")
        save = functools.partial(save_checkpoint, output, model, optimizer, names, state, settings)
        train(args, device, output, model, optimizer, features, plan, state, save)
    results, timings = collect_results(args, device, model, features, plan, state)
    begin, predictions = time.perf_counter(), None
    if not plan or state["step"] == plan["steps"]:
        predictions = evaluate_model(args, device, model, validation)
    if predictions is None:
        log(f"stopped by {STOP[0]} at step {state['step']:,}, saved: the same command goes on")
        if os.environ.get("REQUEUE_MARKER"):  # asks SLURM's script to requeue
            Path(os.environ["REQUEUE_MARKER"]).write_text(STOP[0])
        return 0

    exact_match, f1, scorer = score(predictions, validation["texts"])
    results |= {"exact_match": exact_match, "f1": f1, "scorer": scorer, "command": sys.argv}
    results |= {"evaluate_seconds": time.perf_counter() - begin, "arguments": vars(args)}
    results |= {"prepare_seconds": prepare_seconds, "features_cached": cached}
    results |= {"total_seconds": time.perf_counter() - STARTED, "environment": environment}
    results["finished_at"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    environment["gpu_after"] = describe_environment(device)["gpu"]
    write_whole(output / "predictions.json", predictions)
    write_whole(output / "timings.json", timings)
    model.set_attn_implementation("sdpa")  # who loads it knows nothing of packed
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    # The block that goes into a report; in TensorBoard what only the end knows.
    finish = [sys.executable, REPORT, "--finish", output]
    subprocess.run(finish, input=json.dumps(results), text=True)
    write_whole(output / "results.json", results)
    for name in ("checkpoint.pt", ".lock"):
        (output / name).unlink(missing_ok=True)
    return lock.close() or 0


def main():
    try:
        return run(parse_arguments())
    except argparse.ArgumentError as error:
        message, code = str(error), 2
    except Problem as problem:
        message, code = (*problem.args, 2)[:2]
    except torch.OutOfMemoryError as error:
        message, code = f"out of memory: raise --accumulate ({str(error)[:150]})", 1
    print("error:", " ".join(message.split())[:600], file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

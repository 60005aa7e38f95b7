"""Train BERT on SQuAD v1.1, as fast as it goes, and measure where the time went.

# DDP: each place marked so is what distribution takes, and says why; all else is baseline/train.py.
    sbatch baseline/run.sbatch [options]          on a cluster: one A100
    sbatch DISTRIBUTED/run_2x2.sbatch [options]   two nodes with two A100 each
    bash baseline/run.sbatch --sample             on a laptop: the whole path in a minute

It leaves in --output: results.json, timings.json, predictions.json, model/ and tensorboard/; under
way also checkpoint.pt, from which the same command goes on. Read it as data flows, from 1 to 11.
"""

import argparse, collections, contextlib, difflib, fcntl, functools, hashlib, itertools, json, math
import os, resource, shutil, signal, subprocess, sys, sysconfig, time, zlib
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a word of warning at each fork
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
import numpy as np
import safetensors.numpy
import torch
from datetime import timedelta
import torch.distributed as dist  # DDP: what the ranks talk through
from torch.distributed import fsdp, optim, tensor as dtensor
import torch.nn.functional as F
import transformers
from tqdm import tqdm

STARTED, HERE = time.perf_counter(), Path(__file__).resolve().parent
SAMPLE, REPORT = HERE.parent / "baseline/sample.json", HERE.parent / "baseline/report.py"
CACHE = Path(os.environ.get("SQUAD_CACHE") or HERE.parent / ".cache")
HUB = "rajpurkar/squad"
MODEL_TYPES = ("bert", "electra", "distilbert")  # WordPiece, [CLS] question [SEP] context [SEP]
SAVE_SECONDS, CPU_HOURS = 300, 2  # more hours than this on a CPU are taken for a mistake
EVALUATION_TOKENS, N_BEST, MAX_ANSWER_TOKENS = 8192, 20, 30  # a batch; the usual decoding's
STOP = []  # the signals that asked this run to stop
PHASES = ("data", "forward", "backward", "optimizer", "exposed_communication")
# DDP: torchrun starts one process (rank) a GPU and tells each which it is; rank 0 does the telling.
alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}  # what they are without torchrun
RANK, LOCAL, WORLD = (int(os.environ.get(name, value)) for name, value in alone.items())
log = functools.partial(print, flush=True) if RANK == 0 else lambda *_, **__: None
progress = functools.partial(tqdm, file=sys.stdout, leave=False, delay=2, miniters=1, disable=RANK)
if not sys.stdout.isatty():  # a SLURM log: a line every 10 s, no bar
    progress.keywords.update(mininterval=10, bar_format="  {desc}: {percentage:.0f} %\n")


class Problem(Exception):
    """What the user can mend, in one line; a second argument is the exit code, if it is not 2."""


def require(truth, message, *code):
    if not truth:
        raise Problem(message, *code)


# 1. Arguments: the option, its type or choices, default, least value, and what --help says
ON_OFF = argparse.BooleanOptionalAction
OPTIONS = [
    "model and data",
    ("--model", str, "google-bert/bert-base-uncased", None, "hub name or folder"),
    ("--train-file", str, None, None, f"SQuAD v1.1 JSON (default: the hub's {HUB})"),
    ("--validation-file", str, None, None, "likewise"),
    ("--sample", "store_true", False, None, "small data and model: a minute on a laptop"),
    ("--limit", int, None, 1, "the first N questions of each file (default: all)"),
    ("--max-length", int, 384, 8, "tokens a window"),
    ("--stride", int, 128, 0, "tokens that two windows share"),
    "training",
    ("--epochs", int, None, 0, "0 only evaluates (default: 3; sample: 20)"),
    ("--max-steps", int, None, 1, "optimiser steps at most (default: all)"),
    ("--batch-size", int, None, 1, "features a step, over all ranks (default: 32; sample: 16)"),
    ("--accumulate", int, 1, 1, "micro-steps an optimiser step"),
    ("--learning-rate", float, None, 0, "its peak (default: 5e-5; sample: 1e-3)"),
    ("--warmup", float, 0.1, 0, "share of the steps; then linear to zero"),
    ("--weight-decay", float, 0.01, 0, "on matrices only"),
    ("--dropout", float, None, 0, "probability (default: the model's; sample: 0)"),
    ("--seed", int, 42, 0, "one seed, one training"),
    "speed",
    ("--device", ("auto", "cuda", "cpu"), "auto", None, ""),
    ("--batching", ("padded", "dynamic", "bucketed", "packed"), "packed", None, ""),
    ("--precision", ("fp32", "tf32", "bf16"), None, None, "(default: bf16 on CUDA, else fp32)"),
    ("--compile", ON_OFF, None, None, "each layer (default: on CUDA)"),
    ("--fused", ON_OFF, True, None, "AdamW in one kernel (default: on)"),
    "distribution",  # DDP: how the work is split, and what is sent of the gradients
    ("--strategy", ("ddp", "zero1", "fsdp", "dp"), "ddp", None, ""),
    ("--gradients", ("fp32", "bf16"), None, None, "(default: bf16 on NCCL, else fp32)"),
    "what a run leaves",
    ("--output", str, None, None, f"folder (default: runs/{HERE.name}-JOBID or -DATE-TIME)"),
    ("--log-every", int, 10, 1, "steps"),
    ("--save-every", int, None, 1, "steps (default: every 5 minutes)"),
    ("--profile", ON_OFF, True, None, "trace two steps (default: on)"),
    ("--prepare", "store_true", False, None, "only fetch model and data, build the features"),
]


def parse_arguments(argv=None):
    """Returns the arguments with every default filled in; raises Problem on what cannot be."""
    how = {"prog": f"{HERE.name}/train.py", "allow_abbrev": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **how)
    for row in OPTIONS:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
            continue
        option, kind, default, _, text = row
        how = {"choices": kind} if isinstance(kind, tuple) else {"action": kind}
        how = {"type": kind} if kind in (str, int, float) else how
        text += f" (default: {default})" if default and kind is not ON_OFF else ""
        group.add_argument(option, default=default, help=text, **how)
    args, unknown = parser.parse_known_args(argv)
    known = {row[0]: row for row in OPTIONS if not isinstance(row, str)}
    near = difflib.get_close_matches("".join(unknown[:1]).split("=")[0], known, 1)
    mend = f"did you mean {near[0]}?" if near else "--help lists the options"
    require(not unknown, f"unknown option {''.join(unknown[:1])}: {mend}")
    usual = {"epochs": (3, 20), "batch_size": (32, 16), "learning_rate": (5e-5, 1e-3)}
    vars(args).update({n: d[args.sample] for n, d in usual.items() if getattr(args, n) is None})
    for option, kind, _, least, _ in known.values():
        value, most = getattr(args, option[2:].replace("-", "_")), 2**31 if kind is int else 0.999
        fits = least is None or value is None or least <= value <= most  # NaN does not
        require(fits, f"{option} {value}: give a number from {least} to {most}")
    if args.sample:
        own = args.train_file or args.validation_file or args.model != known["--model"][2]
        require(not own, "--sample brings its own: leave out --model and the data's files")
        args.train_file = args.validation_file = str(SAMPLE)
        args.dropout = args.dropout or 0.0
    require(args.stride < args.max_length - 3, "--stride: give less than --max-length - 3")
    cuda = torch.cuda.is_available() and args.device != "cpu"
    require(cuda or args.device != "cuda", "--device cuda: torch sees no GPU on this node")
    require(cuda or args.precision != "tf32", "--precision tf32: this is no NVIDIA GPU: give fp32")
    # DDP: each rank has its part of each micro-step's features.
    require(args.batch_size >= args.accumulate * WORLD, "--batch-size: give one for all ranks")
    fits = args.strategy != "dp" or (WORLD == 1 and args.batching != "packed")
    require(fits, "--strategy dp: start one process on one node, and give --batching bucketed")
    args.gradients = args.gradients or ("bf16" if cuda and WORLD > 1 else "fp32")
    args.device_type = "cuda" if cuda else "cpu"
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.compile = cuda if args.compile is None else args.compile
    run = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    args.output = args.output or f"runs/{HERE.name}-{run}"
    require(args.output.isprintable(), "--output: give a name of characters that can be printed")
    return args


# 2. Set-up
def join(device):
    """DDP: Starts the process group; a rank has one GPU, its own."""
    wanted = int(os.environ.get("EXPECTED_WORLD_SIZE", WORLD))
    require(WORLD == wanted, f"{WORLD} ranks came, not {wanted}: see the lines of the nodes above")
    how = {"timeout": timedelta(seconds=150), "rank": RANK, "world_size": WORLD}
    how |= {"store": dist.HashStore()} if WORLD == 1 else {}  # without torchrun
    if device.type == "cuda":
        torch.cuda.set_device(LOCAL)
        how["device_id"] = torch.device("cuda", LOCAL)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **how)


def tell(problem, facts=None):
    """DDP: All ranks learn of one's problem, or that one has other facts, and end together."""
    told, late, tell.done = [(problem, facts)] * WORLD, hasattr(tell, "done"), True
    if dist.is_initialized() and not late:
        dist.all_gather_object(told, (problem, facts))
    other = "has other data, options, torch or train.py than rank 0: mend its node"
    told = [p or f"rank {r} {other}" for r, (p, f) in enumerate(told) if p or f != told[0][1]]
    if told:
        file = os.environ.get("EXIT_CODE_FILE")  # torchrun would lose an exit code
        with contextlib.suppress(FileExistsError):  # the rank that makes it tells
            open(file or os.devnull, "x" if file else "w").write("2")
            (print if file else log)("error:", told[0][:600], file=sys.stderr, flush=True)
        os._exit(0 if file and not (late and dist.is_initialized()) else 2)  # 2 ends the others


def agree(device, values):
    """DDP: Returns the most that any rank says of each value, as an array."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.cpu().numpy()


def whole(tensor, like=None):
    """DDP: Returns all of a tensor that fsdp shards, or of a whole one the shard like another."""
    if hasattr(like, "placements") and tensor.shape == like.shape:
        return dtensor.distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_whole(path, write):
    """Calls write(file) under another name, flushes, renames: the file is there whole or not."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
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
    answers are [start, text] pairs. Raises Problem naming the file, the field and the mend."""
    try:
        document = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path}: not JSON ({error}): fetch the file again")

    def field(holder, name, kind):
        value = holder.get(name) if isinstance(holder, dict) else None
        fits = isinstance(value, kind) and not isinstance(value, bool)
        wanted = {str: "a text", list: "a list", int: "a whole number"}[kind]
        require(fits, f"{path}: {where}{name} is not {wanted}: give SQuAD v1.1's shape")
        whole = kind is not str or value.encode("utf-8", "ignore").decode() == value
        require(whole, f"{path}: {where}{name} holds a lone surrogate: mend the text")
        return value

    data = {name: [] for name in ("contexts", "ids", "questions", "paragraph", "answers")}
    where, seen = "", set()
    for i, article in enumerate(field(document, "data", list)):
        where = f"data[{i}]."
        for j, paragraph in enumerate(field(article, "paragraphs", list)):
            where = place = f"data[{i}].paragraphs[{j}]."
            context, entries = field(paragraph, "context", str), field(paragraph, "qas", list)
            require(context.strip(), f"{path}: {where}context is empty: take it out")
            data["contexts"].append(context)
            for k, entry in enumerate(entries):
                where = question = f"{place}qas[{k}]."
                name, answers = field(entry, "id", str), field(entry, "answers", list)
                data["questions"].append(field(entry, "question", str))
                require(name not in seen, f"{path}: {where}id {name[:60]!r} is there twice")
                fits = answers and not entry.get("is_impossible")
                require(fits, f"{path}: {where}answers has none: this is SQuAD v2, take v1.1")
                for m, answer in enumerate(answers):
                    where = f"{question}answers[{m}]."
                    text, start = field(answer, "text", str), field(answer, "answer_start", int)
                    fits = text and 0 <= start == context.find(text, start, start + len(text))
                    require(fits, f"{path}: {where}answer_start does not lead to its text: mend it")
                seen.add(name)
                data["ids"].append(name)
                data["paragraph"].append(len(data["contexts"]) - 1)
                data["answers"].append([[a["answer_start"], a["text"]] for a in answers])
                if len(seen) == limit:
                    return data
    require(seen, f"{path}: data holds no question: give a file with paragraphs and qas")
    return data


def read_hub(split, limit):
    """Reads the hub's SQuAD from its cache, or fetches it; in read_squad's shape."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(HUB, split=split)[:limit]
    except Exception as error:  # its errors have no common class
        mend = "run bash baseline/prepare.sh where there is internet, or give --train-file"
        raise Problem(f"{HUB} is not in the cache ({type(error).__name__}): {mend}")
    contexts = list(dict.fromkeys(rows["context"]))
    numbers = {context: number for number, context in enumerate(contexts)}
    answers = [list(zip(a["answer_start"], a["text"])) for a in rows["answers"]]
    data = {"contexts": contexts, "paragraph": [numbers[c] for c in rows["context"]]}
    return data | {"ids": rows["id"], "questions": rows["question"], "answers": answers}


def encode(encode_batch, texts, what):
    """Yields each text's tokenizers.Encoding, by encode_batch or the _fast one, without offsets."""
    for begin in progress(range(0, len(texts), 1024), f"tokenising {what}"):
        yield from encode_batch(texts[begin : begin + 1024], add_special_tokens=False)


def build_features(data, tokenizer, max_length, stride, path):
    """Cuts each question's paragraph into windows [CLS] question [SEP] context [SEP].
    Equal to the usual tokenizer(question, context, truncation="only_second", max_length, stride,
    return_overflowing_tokens=True), but each paragraph is tokenised once, not once a question.
    Returns arrays; window w is tokens[begin[w] : begin[w + 1]], its context from place first[w]."""
    backend, contexts = tokenizer.backend_tokenizer, []
    for each in encode(backend.encode_batch, data["contexts"], "paragraphs"):
        offsets = np.fromiter(itertools.chain(*each.offsets), np.int32).reshape(-1, 2)  # characters
        contexts.append((np.array(each.ids, np.int32), offsets))
    cls, sep = (np.array([i], np.int32) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    pieces, windows = [], []
    for i, each in enumerate(encode(backend.encode_batch_fast, data["questions"], "questions")):
        question, (ids, offsets) = np.array(each.ids, np.int32), contexts[data["paragraph"][i]]
        room = max_length - len(question) - 3
        fits = len(ids) and (room > stride or room >= len(ids))
        what = f"question {data['ids'][i][:60]!r} ({len(question)} tokens, context {len(ids)})"
        require(fits, f"{path}: {what} does not fit: raise --max-length or lower --stride")
        answer_start, answer = data["answers"][i][0]
        answer_end = answer_start + len(answer)
        starts, ends, first = offsets[:, 0], offsets[:, 1], len(question) + 2
        for begin in range(0, len(ids), max(room - stride, 1)):
            end = min(begin + room, len(ids))
            start_place = end_place = 0  # [CLS], where the answer is not in this window
            if starts[begin] <= answer_start and ends[end - 1] >= answer_end:
                start_place = first - 1 + starts[begin:end].searchsorted(answer_start, "right")
                end_place = first + ends[begin:end].searchsorted(answer_end)
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


def prepare_features(path, split, tokenizer, args):
    """Returns the features of a file, or of the hub's split: from the cache, or built and kept."""
    tokenizer.backend_tokenizer.no_truncation()  # tokenizer.json's; build_features takes all
    tokenizer.backend_tokenizer.no_padding()
    source = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else HUB + split
    what = [1, source, tokenizer.backend_tokenizer.to_str(), args.limit, args.max_length]
    key = hashlib.sha256(json.dumps([*what, args.stride]).encode()).hexdigest()[:16]
    file = CACHE / f"features-{key}.safetensors"
    with contextlib.ExitStack() as stack:  # of several jobs that start at once, one builds
        with contextlib.suppress(OSError):  # a read-only cache, a file system without locks
            CACHE.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{file}.lock", "a")), fcntl.LOCK_EX)
        try:
            with safetensors.safe_open(file, "pt") as kept:  # memory-mapped
                features = {name: kept.get_tensor(name).numpy() for name in kept.keys()}
                sums = {name: zlib.crc32(features[name].data) for name in features}
                cached = sums == json.loads(kept.metadata()["sums"])
        except Exception:  # safetensors has errors of its own
            cached = False
        if not cached:
            log(f"{file} is {'damaged' if file.exists() else 'not there yet'}: building it, once")
            data = read_squad(path, args.limit) if path else read_hub(split, args.limit)
            features = build_features(data, tokenizer, args.max_length, args.stride, path or HUB)
            sums = {name: zlib.crc32(features[name].data) for name in features}
            content = safetensors.numpy.save(features, {"sums": json.dumps(sums)})
            try:
                write_whole(file.with_suffix(f".{os.getpid()}"), lambda out: out.write(content))
                file.with_suffix(f".{os.getpid()}").replace(file)
            except Problem as problem:
                log(f"the features are not kept: {problem}")
    features["texts"] = json.loads(features["texts"].tobytes())
    features["lengths"] = np.diff(features["begin"])
    return features | {"key": key, "cached": cached, "pad": tokenizer.pad_token_id or 0}


# 4. Batches
def plan_epoch(lengths, args, epoch):
    """Returns the epoch's batches as feature numbers [steps, batch size]; -1 fills the last one.
    padded, dynamic: at random; bucketed: alike in length; packed: one of each length class."""
    random = np.random.default_rng((args.seed, epoch))
    order, size = random.permutation(len(lengths)), args.batch_size
    full, rest = divmod(len(lengths), size)
    if args.batching in ("bucketed", "packed"):
        order = order[np.argsort(lengths[order], kind="stable")]
        # The features left over, for the last batch, are picked evenly over all lengths.
        picked = ((np.arange(rest) + random.random()) * len(lengths) / max(rest, 1)).astype(int)
        order, last = np.delete(order, picked), order[picked]
        if args.batching == "packed":
            batches = random.permuted(order.reshape(size, full), axis=1).T  # [batches, classes]
        else:
            batches = random.permutation(order.reshape(full, size))
        order = np.concatenate([batches.ravel(), last])
    return np.pad(order, (0, -len(order) % size), constant_values=-1).reshape(-1, size)


def share_out(plan, lengths, parts):
    """Deals each batch into parts of nearly equal tokens [steps, parts, rows], short rows first.
    The longest are dealt first, to and fro (1 2 3 3 2 1 ...), as captains choose teams."""
    plan = np.pad(plan, ((0, 0), (0, -plan.shape[1] % parts)), constant_values=-1)
    order = np.argsort(-np.where(plan < 0, 0, lengths[plan]), axis=1, kind="stable")
    dealt = np.take_along_axis(plan, order, axis=1).reshape(len(plan), -1, parts)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1]
    return dealt.transpose(0, 2, 1)[:, :, ::-1].copy()


def plan_training(lengths, args):
    """Returns the whole run's plan: who is in which micro-batch, its shapes, what a step counts.
    A row that nobody has (-1) holds one token of no weight. A stratum is (first row, row after the
    last, width): rows alike in length, padded to that width in attention alone. One shape serves
    the run, its largest; it fits well, as a packed batch has one feature of each length class."""
    parts = args.accumulate * WORLD  # DDP: one plan for all ranks
    epochs = [share_out(plan_epoch(lengths, args, e), lengths, parts) for e in range(args.epochs)]
    shares = np.concatenate(epochs)[: args.max_steps]  # [steps, parts, rows]
    sizes, rows = np.where(shares < 0, 0, lengths[shares]), shares.shape[2]
    shapes, longest = {}, np.full(shares.shape[:2], args.max_length)
    if args.batching in ("dynamic", "bucketed"):
        multiple = 64 if args.compile else 8  # few shapes, few compilations
        longest = np.clip(-(-sizes.max(axis=2) // multiple) * multiple, 1, args.max_length)
    computed = rows * longest.sum(axis=1)
    if args.batching == "packed":
        held = np.maximum(sizes, 1)
        # A GPU wants few and large kernels, more of them where rows are long; a CPU one a row.
        count, power = (min(rows // 8, 8), 0.5) if args.device_type == "cuda" else (rows, 1)
        edges = (np.linspace(0, 1, max(count, 1) + 1) ** power * rows).round().astype(int).tolist()
        widths = [int(held[:, :, a:b].max()) // 8 * 8 + 8 for a, b in zip(edges, edges[1:])]
        shapes["strata"], longest[:] = list(zip(edges, edges[1:], widths)), widths[-1]
        shapes["tokens"] = int(held.sum(axis=2).max()) // 8 * 8 + 8  # one to spare, as in widths
        computed[:] = shapes["tokens"] * parts
    shares, longest = shares[:, RANK::WORLD], longest[:, RANK::WORLD]  # DDP: its own parts
    plan = {"shares": shares, "shapes": shapes, "longest": longest, "computed": computed}
    plan |= {"tokens": sizes.sum(axis=(1, 2)), "squares": (sizes**2).sum(axis=(1, 2))}  # for MFU
    return plan | {"features": (sizes > 0).sum(axis=(1, 2)), "steps_an_epoch": len(epochs[0])}


def make_batch(features, chosen, shapes, longest):
    """Cuts a micro-batch out of the tokens on the device, with no word to the host.
    chosen [rows]: feature numbers or -1; shapes: {} or, if packed, the plan's tokens and strata.
    Returns inputs, the model's [rows, longest] or [1, tokens] and packed_attention's; places: of a
    row's tokens if packed [rows, longest]; real, likewise; labels [rows, 2]; weights [rows]."""
    table, device, rows = features["table"], chosen.device, len(chosen)
    weights, chosen = (chosen >= 0).float(), chosen.clamp(min=0)
    lengths = torch.where(weights > 0, table["lengths"][chosen], 1)  # with none its loss is NaN
    columns = torch.arange(longest, device=device)
    real = columns < lengths[:, None]
    if not shapes:
        row = torch.arange(rows, device=device)[:, None]
        position, inside = columns.expand(rows, longest), real
        places, inputs = None, {"attention_mask": real[:, None, None]}  # 2-D: the host would read
    else:
        ends, spare = lengths.cumsum(0), shapes["tokens"] - 1  # the last place has no token
        starts, token = ends - lengths, torch.arange(shapes["tokens"], device=device)[None]
        row = torch.searchsorted(ends, token, right=True)  # [1, tokens]: whose token it is
        inside, row = row < rows, row.clamp(max=rows - 1)
        position = torch.where(inside, token - starts[row], 0)
        # A row's places run on into its neighbour: masked in the logits; in attention the spare.
        places = (starts[:, None] + columns).clamp(max=spare)
        read = torch.where(real, places, spare)
        strata = tuple(real[a:b, None, None, :width] for a, b, width in shapes["strata"])
        index = torch.cat([read[a:b, :width].flatten() for a, b, width in shapes["strata"]])
        slot = torch.arange(len(index), device=device)
        slots = torch.full_like(token[0], len(index) - 1).scatter(0, index, slot)
        inputs = {"position_ids": position, "strata": strata, "index": index, "slots": slots}
    source = (table["begin"][chosen][row] + position).clamp(max=len(table["tokens"]) - 1)
    inputs["input_ids"] = torch.where(inside, table["tokens"][source], features["pad"])
    inputs["token_type_ids"] = (inside & (position >= table["first"][chosen][row])).long()
    labels = torch.stack([table[n][chosen] for n in ("start", "end")], 1) * weights.long()[:, None]
    return {"inputs": inputs, "places": places, "real": real, "labels": labels, "weights": weights}


# 5. Model
class Gather(torch.autograd.Function):
    """index_select of rows whose backward reads rows too; torch's adds them up, slow in bf16.
    Right only where rows that index repeats or inverse omits have no gradient: padding here."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def packed_attention(module, query, key, value, mask, strata, index, slots, dropout=0.0, **_):
    """Attention among sequences packed in one row, none of which sees another; on any device.
    query, key, value: [1, heads, tokens, size]; mask: None. A stratum is sequences of like length,
    padded to its width; strata: of each, which slots are real [sequences, 1, 1, width]. index: each
    slot's token; slots: each token's slot, or one of padding. Returns [1, tokens, heads, size]."""
    heads, size = query.shape[1], query.shape[3]
    flat = torch.cat((query, key, value), dim=1)[0].transpose(0, 1)  # [tokens, 3 heads, size]
    parts, outputs = Gather.apply(flat, index, slots).split([m.numel() for m in strata]), []
    for part, real in zip(parts, strata):
        q, k, v = part.view(len(real), -1, 3, heads, size).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(q, k, v, real, dropout)  # scales as BERT does
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [sequences x width, heads, size]
    return Gather.apply(torch.cat(outputs), slots, index)[None], None


transformers.AttentionInterface.register("packed", packed_attention)


def span_logits(model, batch, args):
    """Returns start's and end's logits [rows, longest, 2] in fp32, -inf where no token is."""
    with torch.autocast(args.device_type, torch.bfloat16, enabled=args.precision == "bf16"):
        hidden = model.base_model(**batch["inputs"])[0].float()  # packed: [1, tokens, size]
    logits = model.qa_outputs(getattr(model, "dropout", torch.nn.Identity())(hidden))  # DistilBERT
    logits = logits if batch["places"] is None else logits[0, batch["places"]]
    return logits.masked_fill(~batch["real"][..., None], -torch.inf)


class SpanModel(torch.nn.Module):
    """The model and its loss in one forward: a micro-batch's sum / the step's count of features."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, batch, count):
        logits = span_logits(self.model, batch, self.args)
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")  # [rows, 2]
        return (losses.mean(dim=1) * batch["weights"]).sum() / count


def sample_tokenizer():
    """Returns a WordPiece tokenizer of the sample's characters and its most frequent words."""
    data, tokenizer = read_squad(SAMPLE, None), transformers.BertTokenizerFast(vocab={"[UNK]": 0})
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(" ".join(data["contexts"] + data["questions"]))
    words = collections.Counter(w for w, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    characters = sorted(set("".join(words)))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    vocabulary += [f"##{c}" for c in characters] + [word for word, _ in words.most_common(2000)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    return transformers.BertTokenizerFast(vocab=vocabulary)


def load_tokenizer(args):
    """Returns the tokenizer and the model's config; raises Problem on what cannot be trained."""
    if args.sample:
        tokenizer = sample_tokenizer()
        sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 512, "initializer_range": 0.05}  # about a million weights
        sizes |= {"max_position_embeddings": max(args.max_length, 512)}
        return tokenizer, transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    name, where = args.model, f"--model {args.model}"
    files = os.listdir(name) if Path(name).is_dir() else ["vocab.txt"]
    fits = {"tokenizer.json", "vocab.txt"} & set(files)
    require(fits, f"{where}: it has no tokenizer.json: save the tokenizer there")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # its errors have no common class
        mend = "give a folder of transformers, or a hub name after bash baseline/prepare.sh"
        raise Problem(f"{where}: {' '.join(str(error).split()[:17])}: {mend}")
    kind, types = config.model_type, ", ".join(MODEL_TYPES)
    require(kind in MODEL_TYPES, f"{where} is a {kind}: give one of {types}")
    fits = tokenizer.is_fast and None not in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    require(fits, f"{where}: it has no fast tokenizer with [CLS] and [SEP]: save one there")
    words, most = config.vocab_size, config.max_position_embeddings
    require(len(tokenizer) <= words, f"{where}: its tokenizer has over {words} words: mend it")
    require(args.max_length <= most, f"--max-length: lower it to the model's {most}")
    return tokenizer, config


def load_model(args, config):
    """Returns the model in fp32 on the CPU; its question-answering head, if new, is from --seed."""
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"):
        if args.dropout is not None and hasattr(config, name):
            setattr(config, name, args.dropout)
    how = {"attn_implementation": "packed" if args.batching == "packed" else "sdpa"}
    how |= {"dtype": torch.float32}
    torch.manual_seed(args.seed)
    family = transformers.AutoModelForQuestionAnswering  # from safetensors, never a pickle
    try:
        if args.sample:
            return family.from_config(config, **how)
        return family.from_pretrained(args.model, config=config, use_safetensors=True, **how)
    except Exception as error:  # SafetensorError, OSError, RuntimeError
        mend = "give a folder with a whole model.safetensors"
        raise Problem(f"--model {args.model}: {str(error).split('. ')[0][:150]}: {mend}")


def compile_layers(model):
    """Compiles layer by layer, as one's time is enough for all; returns whether it could."""
    cuda, header = model.device.type == "cuda", Path(sysconfig.get_path("include"), "Python.h")
    compiler = os.environ.get("CC", "gcc") if cuda else os.environ.get("CXX", "g++")
    if not shutil.which(compiler) or not header.exists():
        return log(f"not compiling: this node has no {compiler} or no {header}; going on without")
    torch._dynamo.config.recompile_limit = 32  # bucketed batches come in several shapes
    torch._dynamo.config.optimize_ddp = False  # it would cut a layer where DDP's buckets end
    for layer in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        layer.compile(fullgraph=True, dynamic=False)
    return True


# 6. Optimiser and schedule
def distribute(training, args, clock):
    """DDP: Returns the training model wrapped by the strategy (README.md: what each splits)."""
    dtype = torch.bfloat16 if args.gradients == "bf16" else torch.float32
    if args.strategy == "dp":
        training, args.compile = torch.nn.DataParallel(training), False  # it would run on GPU 0
        training.register_forward_hook(lambda _, inputs, losses: losses.sum())  # one a GPU
        return training
    if args.strategy == "fsdp":
        layers = next(m for m in training.modules() if isinstance(m, torch.nn.ModuleList))
        how = {"mesh": dist.init_device_mesh(args.device_type, (WORLD,))}
        for module in (*layers, training):
            fsdp.fully_shard(module, **how, mp_policy=fsdp.MixedPrecisionPolicy(reduce_dtype=dtype))
            module.set_gradient_divide_factor(1.0)  # the loss is over the global count already
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        return training

    def send(_, bucket):
        """DDP's communication hook: sums a bucket of gradients while the backward pass goes on."""
        if bucket.is_last():
            clock.sent = clock.now()
        gradients = bucket.buffer()
        future = dist.all_reduce(gradients.to(dtype), async_op=True).get_future()
        return future.then(lambda done: gradients.copy_(done.value()[0]))

    how = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    training = torch.nn.parallel.DistributedDataParallel(training, **how)
    training.register_comm_hook(None, send)
    return training


def make_optimizer(model, args):
    """Returns AdamW, with decay on matrices only, and its parameters' names in its order."""
    named = sorted(model.named_parameters(), key=lambda pair: pair[1].ndim < 2)  # stable
    matrices = {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": args.weight_decay}
    others = {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}
    how = {"lr": 0.0, "fused": args.fused or None}
    optimizer = torch.optim.AdamW([matrices, others], **how)
    if args.strategy == "zero1":  # DDP: each rank keeps the moments of its shard of the parameters
        optimizer = optim.ZeroRedundancyOptimizer([matrices, others], torch.optim.AdamW, **how)
        again = lambda zero: zero.optim.load_state_dict(zero.optim.state_dict())  # noqa: E731
        optimizer.register_load_state_dict_post_hook(again)  # or fused's steps stay on the CPU
    return optimizer, [name for name, _ in named]


def learning_rate_at(step, steps, args):
    """Returns the rate of a step (from 0): up in a line over the warm-up, then down to zero."""
    warmup = max(math.ceil(args.warmup * steps), 1)
    return args.learning_rate * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


# 7. Timing
class Clock:
    """Seconds of each phase: by events on a GPU, read once a log interval; else by the clock."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    @contextlib.contextmanager
    def __call__(self, name):
        with torch.profiler.record_function(name):
            begin = self.now()
            yield
            end = self.now()
            sent = self.__dict__.pop("sent", end)  # DDP: all was handed over; the rest is waiting
            self.marks += [(name, begin, sent), ("exposed_communication", sent, end)]

    def read(self):
        """Returns {phase: seconds} since the last call; the device must be done with them."""
        seconds, marks, self.marks = dict.fromkeys(PHASES, 0.0), self.marks, []
        for name, begin, end in marks:
            seconds[name] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
        return seconds


def peak_memory(device):
    """GiB: what torch had allocated at most on a GPU; the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# 8. Checkpoints and signals
def open_output(output):
    """Makes the folder, sees that it can be written, and returns its lock, held to the end."""
    output.mkdir(parents=True, exist_ok=True)
    lock = open(output / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks goes without
        what = f"--output {output}: another run writes there: wait, or choose another"
        require(not isinstance(error, BlockingIOError), what)
    return lock


def save_checkpoint(output, model, optimizer, names, state, settings):
    """Saves weights and moments by the parameters' names; the checkpoint before stays till then."""
    if hasattr(optimizer, "optim"):  # DDP: zero1's moments come to rank 0, which writes them
        optimizer.consolidate_state_dict(to=0)
        if RANK:
            return
    moments = optimizer.state_dict()["state"]
    content = {"settings": settings, "state": state}
    content["model"] = {name: whole(p.detach()) for name, p in model.named_parameters()}
    content["optimizer"] = {names[i]: {k: whole(v) for k, v in moments[i].items()} for i in moments}
    if RANK:  # DDP: one writes; all have helped to gather fsdp's shards
        return
    write_whole(output / "checkpoint.pt", lambda file: torch.save(content, file))


def resume(output, model, optimizer, names, state, settings):
    """Goes on from output's checkpoint, if there is one; raises Problem on another run's."""
    path = output / "checkpoint.pt"
    if not path.exists():
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        was, moments = content["settings"], content["optimizer"]
        other = [name for name in settings if was.get(name) != settings[name]]
        told = [f"--{n.replace('_', '-')} (was {was.get(n)}, now {settings[n]})" for n in other]
        require(not other, f"{path} has other settings: {', '.join(told)}: choose another --output")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(whole(content["model"][name], parameter))  # DDP: fsdp's shard
                moments[name] = {k: whole(v, parameter) for k, v in moments[name].items()}
        moments = {i: moments[name] for i, name in enumerate(names)}
        at = iter(moments)
        groups = [{**g, "params": [next(at) for _ in g["params"]]} for g in optimizer.param_groups]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        state.update(content["state"])
    except Problem:
        raise
    except Exception as error:  # torch's errors have no common class
        raise Problem(f"{path} is no whole checkpoint ({type(error).__name__}): remove it")
    reached = (output / ".lock").read_text()
    repeated = max(int(reached) - state["step"], 0) if reached.isdigit() else 0
    state["repeated_steps"] += repeated
    state["resumed_from_steps"].append(state["step"])
    log(f"going on from step {state['step']:,}; {repeated} steps after it are done again")


# 9. Evaluation
def best_spans(logits, windows, features):
    """Returns each window's best answer [windows, 4]: score, first, last character, how many.
    logits [windows, longest, 2]. As the usual decoding: all pairs of the 20 best starts and ends in
    the context and of at most 30 tokens; ties go as in np.argsort, read backwards."""
    keys = np.maximum(logits, -1e30).transpose(0, 2, 1).astype(np.float64, "C")
    keys.view(np.int64)[:] |= np.arange(keys.shape[2])  # a place fits in what float32 leaves free
    top = (np.sort(keys)[:, :, : -N_BEST - 2 : -1].view(np.int64) & 0xFFFFFFF).transpose(0, 2, 1)
    values = np.take_along_axis(logits, top, axis=1)  # [windows, 21, 2]
    tied = (values[:, 1:] == values[:, :-1]).any(axis=(1, 2))  # then np.argsort's order counts
    for i, own in zip(np.flatnonzero(tied), features["lengths"][windows[tied]]):
        top[i, :own] = np.argsort(logits[i, :own], axis=0)[: -N_BEST - 2 : -1]
    top, values, each = top[:, :N_BEST], values[:, :N_BEST], np.arange(len(windows))
    first = features["first"][windows]
    after = first + features["context_tokens"][windows]
    # A place outside the context goes so far away that no pair with it fits.
    start = np.where(top[:, :, 0] < first[:, None], 2**20, top[:, :, 0])
    end = np.where(top[:, :, 1] < after[:, None], top[:, :, 1], -1)
    beyond = end[:, None] - start[:, :, None]  # [windows, 20 starts, 20 ends]
    fits = (beyond >= 0) & (beyond < MAX_ANSWER_TOKENS)
    sums = np.where(fits, values[:, :, None, 0] + values[:, None, :, 1], np.float32(-1e30))
    row, column = np.divmod(sums.reshape(len(windows), -1).argmax(axis=1), top.shape[1])
    paragraph = features["paragraph"][features["question"][windows]]
    token = features["offsets_begin"][paragraph] + features["context_begin"][windows] - first
    start = token + top[each, row, 0].clip(first, after - 1)  # in the context, if nothing fits too
    end = token + top[each, column, 1].clip(first, after - 1)
    offsets, many = features["offsets"], np.count_nonzero(fits, axis=(1, 2))
    return np.stack([sums[each, row, column], offsets[start, 0], offsets[end, 1], many], axis=1)


def answer_texts(best, features):
    """Returns {question id: its best window's answer}; "empty" where the usual decoding says so."""
    texts, answers = features["texts"], {}
    order = np.lexsort((-best[:, 0], features["question"]))  # each question's best window first
    edges = np.searchsorted(features["question"], np.arange(len(texts["ids"])))
    places, counts = best[order[edges], 1:3].astype(int), np.add.reduceat(best[:, 3], edges)
    rows = zip(texts["ids"], features["paragraph"].tolist(), places.tolist(), counts)
    for name, paragraph, (start, end), count in rows:
        text = texts["contexts"][paragraph][start:end]
        answers[name] = text if count > 1 or (count and text) else "empty"
    return answers


@torch.inference_mode()
def evaluate_model(args, device, model, features):
    """Returns the predictions {question id: answer}, or None where the run was told to stop."""
    model.eval()
    lengths, best = features["lengths"], np.full((len(features["lengths"]), 4), -np.inf)
    order = np.argsort(-lengths, kind="stable")  # neighbours in a batch are alike
    cuts = np.flatnonzero(np.diff(np.cumsum(lengths[order]) // EVALUATION_TOKENS)) + 1
    for windows in progress(np.split(order, cuts)[RANK::WORLD], "evaluating"):  # DDP: whole ones
        if STOP:
            break
        longest, tokens = int(lengths[windows[0]]), int(lengths[windows].sum()) // 8 * 8 + 8
        shapes = {"tokens": tokens, "strata": [(0, len(windows), longest)]}
        shapes = shapes if args.batching == "packed" else {}
        batch = make_batch(features, torch.tensor(windows, device=device), shapes, longest)
        with torch.compiler.set_stance("force_eager"):  # shapes differ: compiling would not pay
            logits = span_logits(model, batch, args)
        best[windows] = best_spans(logits.cpu().numpy(), windows, features)
    best = agree(device, best)  # DDP: a window's row is -inf on all ranks but one
    STOP.extend(["another rank"] * int(agree(device, [len(STOP)])[0]))
    return None if STOP else answer_texts(best, features)


# 10. Training
def train(args, device, output, training, clock, optimizer, features, plan, state, save):
    """Trains from state["step"] to the plan's end; returns early where it is told to stop."""
    training.train()
    shares = torch.tensor(plan["shares"], device=device)  # [steps, parts, rows]
    first, steps = state["step"], len(shares)
    # Each life warms up (compiling, allocating), one profiles; then intervals are steady.
    every = min(args.log_every, max(steps // 4, 1))
    warm = first + min(5, (steps - first) // 4)
    profiled = warm + 3 * (args.profile and not state["operators"] and steps - first >= 8)
    losses, norms = torch.zeros(2, every, device=device)
    profiler, read = None, first  # read: the steps whose losses have been read
    lengths = plan["longest"][first:]  # one compiles where it is first met: no steady step
    fresh = np.unique(lengths, return_index=True)[1] // lengths.shape[1] + first
    mark = wall = saved = time.perf_counter()

    def flush(done):
        """Reads losses and times of the steps from read to done, which waits for the device."""
        nonlocal mark, wall, read
        dist.all_reduce(losses)  # DDP: the sum of the parts is the global mean
        values = torch.stack((losses, norms), 1)[: done - read].tolist()
        losses.zero_()
        now, span = time.perf_counter(), slice(read, done)
        for step, (loss, norm) in enumerate(values, read + 1):
            what = f"step {step}: loss {loss}, gradient's norm {norm}: lower --learning-rate"
            require(math.isfinite(loss + norm), f"{what}; the checkpoint before is kept", 1)
        loss, norm = (sum(column) / len(values) for column in zip(*values))
        rate, memory = learning_rate_at(done - 1, steps, args), peak_memory(device)
        each = {"step": done, "steps": done - read, "loss": loss, "gradient_norm": norm}
        each |= {name: plan[name][span].sum().item() for name in ("tokens", "features", "squares")}
        each |= {"learning_rate": rate, "seconds": now - mark, "wall_seconds": now - wall}
        steady = read >= profiled and not (args.compile and any(read <= s < done for s in fresh))
        each |= {"memory_gib": memory, "warmup": read < warm, "steady": steady}
        state["intervals"].append(each | {"phases": clock.read()})
        speed = each["tokens"] / each["seconds"]
        left = divmod(int(plan["tokens"][done:].sum() / speed), 60)
        where = f"step {done:,}/{steps:,} {done / steps:4.0%}, {left[0]}:{left[1]:02} left"
        log(f"{where}  loss {loss:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s  {memory:.1f} GiB")
        (output / ".lock").write_text(str(done))  # how far it got, should it be killed
        read = state["step"] = done
        mark, wall = time.perf_counter(), now
        state["beside"]["log"] += mark - now

    for step in range(first, steps):
        if step == warm < profiled:
            cycle = torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=1)
            trace = (f"{output}/tensorboard", f"rank{RANK}", True)  # DDP: each its own
            write = torch.profiler.tensorboard_trace_handler(*trace)
            profiler = torch.profiler.profile(schedule=cycle, on_trace_ready=write, acc_events=True)
            profiler.start()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, args)
        for micro in range(args.accumulate):
            seed = np.random.SeedSequence((args.seed, step, micro, RANK))  # DDP: each its own
            torch.manual_seed(int(seed.generate_state(1)[0]))  # so no random state is ever saved
            with clock("data"):
                longest = int(plan["longest"][step, micro])
                batch = make_batch(features, shares[step, micro], plan["shapes"], longest)
            training.require_backward_grad_sync = last = micro == args.accumulate - 1
            if args.strategy == "fsdp":  # DDP: one sum a step, as the line above is ddp's no_sync()
                training.set_requires_gradient_sync(last)
            with clock("forward"):
                loss = training(batch, int(plan["features"][step]))
            with clock("backward"):
                loss.backward()
            losses[step - read] += loss.detach()
        with clock("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(training.parameters(), 1.0)
            norms[step - read] = whole(norm)  # DDP: of all shards
            optimizer.step()
            optimizer.zero_grad()
        begin, done = time.perf_counter(), step + 1
        if profiler:
            if done == profiled - 2 and clock.cuda:
                torch.cuda.synchronize()  # what is under way is no profiled step's
            profiler.step()  # after the third it writes the trace
            if done == profiled:
                table = profiler.key_averages().table(f"self_{device.type}_time_total", 20)
                state["operators"], profiler = table, profiler.stop()  # stop() returns None
                state["beside"]["profile"] += time.perf_counter() - begin
        due = done % args.save_every == 0 if args.save_every else begin - saved > SAVE_SECONDS
        # DDP: all ranks save and stop at the same step. Asking is a wait, so not at every step.
        ask = done % every == 0 or device.type == "cpu" or bool(args.save_every and due)
        stop, due = agree(device, [len(STOP), due]) if ask else (0, 0)
        if done % every == 0 or done == steps or due or stop:
            flush(done)
        if stop:
            break
        if due and done < steps:
            begin = time.perf_counter()
            save()
            mark = saved = time.perf_counter()
            state["beside"]["checkpoint"] += mark - begin
    save()  # told to stop, or done: nothing that follows can lose it


# 11. Main
def run(args):
    """The whole run, as a summary of this file."""
    device, output = torch.device(args.device_type), Path(args.output)
    if (output / "results.json").exists():
        return log(f"{output} holds a finished run and is left alone: choose another --output")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: STOP.append(signal.Signals(number).name))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for each shape, rounds dropout
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    environment = subprocess.run([sys.executable, REPORT, "--environment"], capture_output=True)
    environment = json.loads(environment.stdout or "{}")
    what = f"{'the sample' if args.sample else args.model}, {args.precision} on {args.device_type}"
    log(f"{HERE.name}: {what}, {args.batching}, to {output}")
    join(device)  # DDP: from here on, a problem of one is told to all
    _lock = None if args.prepare or RANK else open_output(output)  # held to the end
    _ = [os.stat(path) for path in (args.train_file, args.validation_file) if path]  # or told late
    tokenizer, config = load_tokenizer(args)
    begin = time.perf_counter()
    features = prepare_features(args.train_file, "train", tokenizer, args)
    validation = prepare_features(args.validation_file, "validation", tokenizer, args)
    prepared = time.perf_counter() - begin
    counts, how = len(features["lengths"]), "cached" if features["cached"] else "built"
    log(f"{counts:,} and {len(validation['lengths']):,} features, {how}, in {prepared:.1f} s")
    model = load_model(args, config).to(device)
    if args.prepare:
        return log(f"ready: model, data, features ({CACHE}): the runs need no internet now")
    facts = {**vars(args), "output": "", "torch": torch.__version__, "data": features["key"]}
    tell("", facts | {"more": validation["key"], "script": Path(__file__).read_text()})  # DDP
    for each in (features, validation):  # on the device once and for all: 60 MB for all of SQuAD
        names = ("tokens", "begin", "lengths", "first", "start", "end")
        each["table"] = {name: torch.tensor(each[name], device=device) for name in names}
    state = {"step": 0, "intervals": [], "operators": "", "resumed_from_steps": []}
    state |= {"repeated_steps": 0, "beside": {"checkpoint": 0.0, "profile": 0.0, "log": 0.0}}
    training, clock = SpanModel(model, args), Clock(device)
    run.kept = training = distribute(training, args, clock)  # DDP: freed never, as that can hang
    optimizer, names = make_optimizer(model, args)
    if args.strategy == "zero1":  # DDP: what follows the rank's own step is the broadcast
        optimizer.optim.register_step_post_hook(lambda *_: setattr(clock, "sent", clock.now()))
    plan, steps = None, 0
    if args.epochs:
        may_differ = "validation_file device device_type compile fused output log_every save_every"
        may_differ += " profile prepare strategy gradients"
        settings = {n: value for n, value in vars(args).items() if n not in may_differ.split()}
        settings |= {"model": Path(args.model).name, "train_file": features["key"]}
        resume(output, model, optimizer, names, state, settings)
        plan = plan_training(features["lengths"], args)
        steps, an_epoch = len(plan["shares"]), plan["steps_an_epoch"]
        hours = 6 * model.num_parameters(exclude_embeddings=True) * plan["computed"].sum() / 3600
        hours /= 2e10 * torch.get_num_threads()  # FLOP/s: a core's, when training
        what = f"{steps:,} steps ({an_epoch:,} an epoch) of {args.batch_size} features"
        on_purpose = args.device != "auto" or args.device_type == "cuda" or hours < CPU_HOURS
        mend = "use sbatch, --sample or --limit N; --device cpu goes on regardless"
        require(on_purpose, f"{what} take a CPU about {hours:.0f} hours: {mend}")
        log(f"{what}, {args.accumulate} x {plan['shares'].shape[2]} at most on a rank")
        args.compile = bool(args.compile and compile_layers(model))
        save = functools.partial(save_checkpoint, output, model, optimizer, names, state, settings)
        if state["step"] < steps:
            train(args, device, output, training, clock, optimizer, features, plan, state, save)
    if args.strategy == "fsdp":  # DDP: a rank has all of the model again, to evaluate and to save
        weights = {name: whole(weight) for name, weight in model.state_dict().items()}
        model = load_model(args, config).to(device)
        model.load_state_dict(weights)
    begin, done = time.perf_counter(), state["step"] == steps
    predictions = evaluate_model(args, device, model, validation) if done else None
    if predictions is None:
        if os.environ.get("REQUEUE_MARKER"):  # asks SLURM's script to requeue
            Path(os.environ["REQUEUE_MARKER"]).write_text("".join(STOP[:1]))
        what = f"stopped by {' '.join(STOP[:1]) or 'a signal'} at step {state['step']:,}"
        return log(f"{what}: the same command with --output {output} goes on")
    results = {"evaluate_seconds": time.perf_counter() - begin, "prepare_seconds": prepared} | state
    results |= {"predictions": predictions, "texts": validation["texts"], "command": sys.argv}
    results |= {"arguments": vars(args), "environment": environment, "train_features": counts}
    results |= {"train_tokens": int(features["lengths"].sum()), "features_cached": how == "cached"}
    results |= {"peak_memory_gib": peak_memory(device), "world_size": 1, "nodes": 1}
    if plan:
        results["steps_an_epoch"] = plan["steps_an_epoch"]
        results |= {f"{n}_per_step": plan[n].tolist() for n in ("tokens", "computed")}
    mine = plan["shares"][plan["shares"] >= 0] if plan else []
    busy = sum(each["phases"][name] for each in state["intervals"] for name in PHASES[:4])
    mine = {"rank": RANK, "seconds": busy, "tokens": int(features["lengths"][mine].sum())}
    dist.all_gather_object(ranks := [None] * WORLD, mine)  # DDP: who was slowest, with what share
    ranks.sort(key=lambda each: each["seconds"])
    results |= {"ranks": {"fastest": ranks[0], "slowest": ranks[-1]}, "world_size": WORLD}
    results["nodes"] = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    results["peak_memory_gib"] = agree(device, [peak_memory(device)]).item()
    dist.destroy_process_group()
    if RANK:  # what is left to do is rank 0's
        return
    for saved in (model, tokenizer):
        saved.save_pretrained(output / "model.tmp")
    shutil.rmtree(output / "model", ignore_errors=True)  # a killed life's
    (output / "model.tmp").replace(output / "model")
    results["total_seconds"] = time.perf_counter() - STARTED
    finish = [sys.executable, REPORT, "--finish", output]  # scores, derives, shows; results.json
    failed = subprocess.run(finish, input=json.dumps(results), text=True).returncode
    require(not failed, f"{REPORT} failed: mend it, and the same command goes on", 1)
    for name in ("checkpoint.pt", ".lock"):
        (output / name).unlink(missing_ok=True)


def main():
    message, code = "", 0
    try:
        run(parse_arguments())
    except (argparse.ArgumentError, safetensors.SafetensorError) as error:  # the disk is full
        message, code = str(error), 2
    except Problem as problem:
        message, code = (*problem.args, 2)[:2]
    except OSError as error:
        message, code = f"{error.filename}: {error.strerror}: mend it, or give another path", 2
    except torch.OutOfMemoryError as error:
        what, code = f"error: out of memory: raise --accumulate ({str(error)[:150]})", 1
        print(what, file=sys.stderr, flush=True)  # whichever rank it is
    if code == 2:  # DDP: the others wait to be told
        tell(message)
    if message:
        log("error:", " ".join(message.split())[:600], file=sys.stderr)
    os._exit(code)  # DDP: gloo's threads may wait for Python while Python waits for them


if __name__ == "__main__":
    main()

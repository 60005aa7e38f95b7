"""Measures what each part of train.py costs, and how the cost grows: linear is the claim.

    python baseline/benchmarks/cost.py [prepare] [decode] [start] [step] [compile] [ceiling]
    python baseline/benchmarks/cost.py ceiling --device cuda --output ceiling.json

Writes tables to baseline/results/growth.json, for report.py --table growth; those that are not
measured again stay there as they are. All parts take half an hour on two quiet cores. Each
measurement is a process of its own, so that its memory is its own too. With --device cuda the
multiplications of BERT-Base in bf16, which is what a GPU can reach at most.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import measuring
import numpy as np
import torch
import usual_ways
from torch.optim.optimizer import register_optimizer_step_post_hook

# The last is as many as SQuAD v1.1 has to train on.
QUESTIONS = [1000, 10000, 30000, 87600]
# The usual decoding is slow: it does no more questions than this.
MOST_DECODED_USUALLY = 10000
THREADS = 2
REPEATS = 3


# 1. Measuring


@dataclasses.dataclass
class Spent:
    """Seconds by the clock, and of the processor: of all of the process's threads."""

    wall: float
    processor: float


def timed(function, *arguments, **named):
    """Returns what the function returns, and what it has spent."""
    begin = time.perf_counter()
    processor_begin = time.process_time()
    result = function(*arguments, **named)
    spent = Spent(time.perf_counter() - begin, time.process_time() - processor_begin)
    return result, spent


def in_new_process(function, *arguments, **named):
    """Calls the function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments, **named).result()


def memory_mib(name):
    """Returns MiB of this process: VmRSS is what it has now, VmHWM the most that it has had."""
    status = Path("/proc/self/status").read_text()
    kib = re.search(rf"{name}:\s+(\d+) kB", status)[1]
    return int(kib) / 1024


def load(*words, cache=None):
    """Returns train.py, its arguments and the tokenizer; cache: the folder of the features."""
    torch.set_num_threads(THREADS)
    train = measuring.load_train()
    measuring.silence(train)
    if cache:
        train.CACHE = Path(cache)
    usual = ["--model", str(measuring.MODEL), "--device", "cpu", "--no-profile"]
    args = train.parse_arguments([*usual, *map(str, words)])
    train.configure_libraries(args)
    tokenizer, _ = train.load_tokenizer(args)
    return train, args, tokenizer


def make_table(title, conditions, columns, rows):
    return {"title": title, "conditions": conditions, "columns": columns, "rows": rows}


# 2. Preparing: questions to features


def repeat_paragraph(paragraph, prefix, turn, count):
    """Returns a paragraph with the prefix before it and before its first `count` questions."""
    questions = []
    for question in paragraph["qas"][:count]:
        answers = []
        for answer in question["answers"]:
            start = answer["answer_start"] + len(prefix)
            answers.append({"text": answer["text"], "answer_start": start})
        questions.append(
            {
                "id": f"{turn}-{question['id']}",
                "question": prefix + question["question"],
                "answers": answers,
            }
        )
    return {"context": prefix + paragraph["context"], "qas": questions}


def write_squad(path, count):
    """Writes a SQuAD file of `count` questions: the small one again and again, each time with its
    own prefix, so that the tokenizer remembers nothing from the time before."""
    document = json.loads(measuring.TRAIN_FILE.read_bytes())
    originals = [one for article in document["data"] for one in article["paragraphs"]]
    paragraphs = []
    left = count
    turn = 0
    while left:
        prefix = f"Part {turn} of it. "
        for original in originals:
            paragraph = repeat_paragraph(original, prefix, turn, left)
            paragraphs.append(paragraph)
            left -= len(paragraph["qas"])
            if not left:
                break
        turn += 1
    content = {"version": "1.1", "data": [{"title": "repeated", "paragraphs": paragraphs}]}
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def prepare(path, cache):
    """A process: prepares a file's features, or reads them back from the cache."""
    train, args, tokenizer = load(cache=cache)
    before = memory_mib("VmRSS")
    features, spent = timed(train.load_features, path, "train", tokenizer, args)
    return {
        "spent": spent,
        "memory": memory_mib("VmHWM") - before,
        "features": len(features["lengths"]),
        "cached": features["cached"],
    }


def measure_preparing(folder, counts):
    rows = []
    for count in counts:
        path = f"{folder}/{count}.json"
        cache = f"{folder}/cache-{count}"
        write_squad(path, count)
        built = in_new_process(prepare, path, cache)
        read = in_new_process(prepare, path, cache)
        assert read["cached"] and not built["cached"]
        row = [
            count,
            built["features"],
            round(built["spent"].wall, 1),
            round(built["spent"].processor, 1),
            round(1e6 * built["spent"].wall / count),
            round(built["memory"]),
            round(read["spent"].wall, 2),
        ]
        rows.append(row)
        print(row, flush=True)
    columns = ["questions", "features", "seconds", "processor's seconds", "µs a question"]
    columns += ["memory, MiB", "read back, s"]
    conditions = ["reading, tokenising, windows, writing the cache", "one process", "384/128"]
    conditions.append("memory: its growth")
    growth = make_table("Preparing against questions", conditions, columns, rows)
    return [growth, compare_preparing(folder, counts[-1])]


def digest_of_windows(windows):
    """Returns a checksum of (token ids, first and last token of the answer) of all windows."""
    checksum = hashlib.sha256()
    for input_ids, start, end in windows:
        checksum.update(np.array([*input_ids, start, end], np.int32).tobytes())
    return checksum.hexdigest()


def prepare_ours(path):
    """A process: from examples in memory to features, as train.py does it."""
    train, args, tokenizer = load()
    examples = train.read_squad(path)
    before = memory_mib("VmRSS")
    features, spent = timed(train.build_features, examples, tokenizer, args, path)
    memory = memory_mib("VmHWM") - before
    windows = []
    for window, (begin, end) in enumerate(zip(features["begin"], features["begin"][1:])):
        input_ids = features["input_ids"][begin:end]
        windows.append((input_ids, features["start"][window], features["end"][window]))
    return {"spent": spent, "memory": memory, "digest": digest_of_windows(windows)}


def prepare_usually(path, padding):
    """A process: the same by the usual Dataset.map."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    train, args, tokenizer = load()
    dataset = datasets.Dataset.from_list(train.read_squad(path))
    function = functools.partial(
        usual_ways.prepare_train_features,
        tokenizer=tokenizer,
        max_length=args.max_length,
        stride=args.stride,
        padding=padding,
    )
    before = memory_mib("VmRSS")
    mapped, spent = timed(dataset.map, function, batched=True, remove_columns=dataset.column_names)
    memory = memory_mib("VmHWM") - before
    windows = (
        (
            row["input_ids"][: sum(row["attention_mask"])],
            row["start_positions"],
            row["end_positions"],
        )
        for row in mapped
    )
    return {"spent": spent, "memory": memory, "digest": digest_of_windows(windows)}


def compare_preparing(folder, count):
    """Returns the table of ours beside the usual way: the tokenizer's call is the same in both."""
    path = f"{folder}/{count}.json"
    results = {
        "train.py": in_new_process(prepare_ours, path),
        "Dataset.map, padded to 384, as it comes": in_new_process(
            prepare_usually, path, "max_length"
        ),
        "Dataset.map, not padded": in_new_process(prepare_usually, path, False),
    }
    ours = results["train.py"]
    rows = []
    for name, result in results.items():
        row = [
            name,
            count,
            round(result["spent"].wall, 1),
            round(result["spent"].processor, 1),
            round(result["memory"]),
            "identical" if result["digest"] == ours["digest"] else "DIFFERENT",
        ]
        rows.append(row)
        print(row, flush=True)
    columns = ["way", "questions", "seconds", "processor's seconds", "memory, MiB", "features"]
    conditions = ["from examples in memory to features", "a process each", "memory: its growth"]
    return make_table("Preparing against the usual Dataset.map", conditions, columns, rows)


# 3. Decoding: logits to answers


def draw_logits(lengths, seed):
    """Draws logits like a trained model's: noise, and high around one token.

    Returns [windows, the longest's tokens, 2], as train.py's evaluation_logits."""
    draw = np.random.default_rng(seed)
    longest = int(lengths.max())
    tokens = np.arange(longest)
    logits = draw.standard_normal((len(lengths), longest, 2), np.float32)
    peaks = 10 + (draw.random(len(lengths)) * lengths * 0.8).astype(int)
    distance = np.abs(tokens - peaks[:, None])  # [windows, tokens]
    logits = logits + 8 * np.exp(-distance / 8)[:, :, None]
    logits[tokens >= lengths[:, None]] = -np.inf
    return logits.astype(np.float32)


class DrawnLogits:
    """Stands in for train.py's evaluation_logits, and so for the model. It notes what drawing took,
    which is none of the decoding's; and it keeps the logits, if they are to be used again."""

    def __init__(self, keep):
        self.keep = keep
        self.kept = {}  # of each batch, by its first window
        self.spent = Spent(0.0, 0.0)

    def __call__(self, args, model, features, windows):
        logits, spent = timed(self.find, features["lengths"][windows], int(windows[0]))
        self.spent.wall += spent.wall
        self.spent.processor += spent.processor
        if self.keep:
            self.kept[int(windows[0])] = windows, logits
        return logits

    def find(self, lengths, first_window):
        if first_window in self.kept:
            return self.kept[first_window][1]
        return draw_logits(lengths, seed=first_window)


def decode_ours(train, args, features, examples, drawn):
    """Returns the answers to drawn logits, and what train.py has spent on them."""
    model = types.SimpleNamespace(eval=lambda: None)
    drawn.spent = Spent(0.0, 0.0)

    def decode():
        best = train.find_answers(args, train.CACHE, model, features)
        return train.answer_texts(best, features, examples)

    answers, spent = timed(decode)
    spent.wall -= drawn.spent.wall
    spent.processor -= drawn.spent.processor
    return answers, spent


def load_validation(path, cache):
    """Returns train.py, its arguments, features to validate on, and their examples."""
    train, args, tokenizer = load(cache=cache)
    features = train.load_features(path, "validation", tokenizer, args)
    examples = json.loads(features["examples"].tobytes())
    return train, args, features, examples


def decode(path, cache):
    """A process: what our decoding takes."""
    train, args, features, examples = load_validation(path, cache)
    train.evaluation_logits = DrawnLogits(keep=False)
    before = memory_mib("VmRSS")
    _, spent = decode_ours(train, args, features, examples, train.evaluation_logits)
    memory = max(memory_mib("VmHWM") - before, 0)
    return {"spent": spent, "memory": memory, "windows": len(features["lengths"])}


def usual_features(features, examples):
    """Returns train.py's features as the examples have them: a dictionary per window."""
    rows = []
    for window, length in enumerate(features["lengths"].tolist()):
        begin = features["begin"][window]
        first = int(features["context_first"][window])
        end = int(features["context_end"][window])
        offsets = features["offsets"][begin : begin + length].tolist()
        # Outside the context None, as the examples set it.
        offset_mapping = [None] * first + offsets[first:end] + [None] * (length - end)
        rows.append(
            {
                "input_ids": features["input_ids"][begin : begin + length].tolist(),
                "token_type_ids": features["token_types"][begin : begin + length].tolist(),
                "attention_mask": [1] * length,
                "offset_mapping": offset_mapping,
                "example_id": examples[features["example"][window]]["id"],
            }
        )
    return rows


def compare_decoding(path, cache):
    """A process: ours and the usual loop on the same logits, in turns."""
    import datasets

    train, args, features, examples = load_validation(path, cache)
    train.evaluation_logits = DrawnLogits(keep=True)
    ours_once = functools.partial(
        decode_ours, train, args, features, examples, train.evaluation_logits
    )
    ours_once()
    logits = [None] * len(features["lengths"])
    for windows, batch in train.evaluation_logits.kept.values():
        for window, one in zip(windows, batch):
            logits[window] = one[: features["lengths"][window]]
    start_logits = [np.ascontiguousarray(one[:, 0]) for one in logits]
    end_logits = [np.ascontiguousarray(one[:, 1]) for one in logits]
    rows = usual_features(features, examples)
    inputs = {
        "loop over lists": (examples, rows),
        "loop over Datasets, as the scripts": (
            datasets.Dataset.from_list(examples),
            datasets.Dataset.from_list(rows),
        ),
    }
    ours = []
    usual = {name: [] for name in inputs}
    equal = True
    for _ in range(REPEATS):
        our_answers, spent = ours_once()
        ours.append(spent)
        for name, (usual_examples, features_list) in inputs.items():
            answers, spent = timed(
                usual_ways.postprocess_qa_predictions,
                usual_examples,
                features_list,
                start_logits,
                end_logits,
            )
            usual[name].append(spent)
            equal = equal and answers == our_answers
    return {"ours": ours, "usual": usual, "equal": equal}


def comparison_row(name, count, ours, usual, equal):
    ratios = [theirs.wall / own.wall for own, theirs in zip(ours, usual)]
    by_processor = [theirs.processor / own.processor for own, theirs in zip(ours, usual)]
    return [
        name,
        count,
        round(statistics.median(spent.wall for spent in ours), 3),
        round(statistics.median(spent.wall for spent in usual), 3),
        round(statistics.median(ratios), 1),
        round(statistics.median(by_processor), 1),
        "identical" if equal else "DIFFERENT",
    ]


def measure_decoding(folder, counts):
    growth = []
    comparisons = []
    for count in counts:
        path = f"{folder}/{count}.json"
        cache = f"{folder}/cache-{count}"
        write_squad(path, count)
        in_new_process(load_validation_only, path, cache)
        found = in_new_process(decode, path, cache)
        row = [
            count,
            found["windows"],
            round(found["spent"].wall, 2),
            round(found["spent"].processor, 2),
            round(1e6 * found["spent"].wall / count),
            round(found["memory"]),
        ]
        growth.append(row)
        print(row, flush=True)
        if count > MOST_DECODED_USUALLY:
            continue
        compared = in_new_process(compare_decoding, path, cache)
        for name, usual in compared["usual"].items():
            row = comparison_row(name, count, compared["ours"], usual, compared["equal"])
            comparisons.append(row)
            print(row, flush=True)
    columns = ["questions", "windows", "seconds", "processor's seconds", "µs a question"]
    columns.append("memory, MiB")
    conditions = ["logits drawn, in batches as evaluation has them"]
    conditions.append("the 20 best, 30 tokens at most")
    tables = [make_table("Decoding against questions", conditions, columns, growth)]
    columns = ["usual way", "questions", "ours, s", "usual, s", "faster by", "by processor time"]
    columns.append("answers")
    conditions = ["the same logits in one process, in turns, median of three"]
    title = "Decoding against the usual n-best loop"
    return [*tables, make_table(title, conditions, columns, comparisons)]


def load_validation_only(path, cache):
    """A process: builds the features, so that no other's memory has had to hold it."""
    load_validation(path, cache)


# 4. Start-up: from the command to the first step

# What the log says first after each part.
START_MARKS = {
    "imports and environment": "baseline: ",
    "model and features": "features to train",
    "plan, optimiser, TensorBoard": " steps (",
    "first step": "step 1/",
}
START_WORDS = ["--sample", "--max-steps", "2", "--log-every", "1", "--no-profile"]
START_WORDS += ["--device", "cpu"]


def start_once(folder, number, *python_options):
    """Trains two steps. Returns {part: seconds from the command until its end}, and stderr."""
    environment = os.environ | {"SQUAD_CACHE": f"{folder}/start", "OMP_NUM_THREADS": str(THREADS)}
    output = f"{folder}/start-{number}"
    command = [sys.executable, *python_options, measuring.TRAIN, *START_WORDS, "--output", output]
    errors_path = Path(folder, f"start-{number}.err")
    seconds = {}
    begin = time.perf_counter()
    with open(errors_path, "w") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        for line in process.stdout:
            for part, words in START_MARKS.items():
                if words in line:
                    seconds.setdefault(part, time.perf_counter() - begin)
    lines = errors_path.read_text().splitlines()
    assert process.wait() == 0, lines[-3:]
    assert seconds.keys() == START_MARKS.keys(), seconds
    return seconds, lines


def measure_start(folder):
    start_once(folder, 0)  # builds the features
    runs = [start_once(folder, number)[0] for number in range(1, REPEATS + 1)]
    rows = []
    for part, before in zip(START_MARKS, [None, *START_MARKS]):
        durations = [run[part] - (run[before] if before else 0.0) for run in runs]
        rows.append([part, round(statistics.median(durations), 1)])
    whole = statistics.median(run["first step"] for run in runs)
    rows.append(["command to first step", round(whole, 1)])
    conditions = ["--sample, cached features", "median of three", "the parts in their order"]
    title = "Start-up: where the seconds go"
    return [make_table(title, conditions, ["part", "seconds"], rows), measure_imports(folder)]


def measure_imports(folder):
    """Returns the table of the packages that take longest to import."""
    seconds = collections.Counter()
    _, lines = start_once(folder, "imports", "-X", "importtime")
    for line in lines:
        found = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", line)
        if found:
            package = found[2].split(".")[0]
            seconds[package] += int(found[1]) / 1e6
    slowest = seconds.most_common(8)
    rows = [[package, round(one, 2)] for package, one in slowest]
    others = seconds.total() - sum(one for _, one in slowest)
    rows.append(["all the others", round(others, 2)])
    conditions = ["python -X importtime, each module's own time summed by package"]
    conditions.append("measuring slows it")
    return make_table("Start-up: the imports", conditions, ["package", "seconds"], rows)


# 5. A step


def make_features(count, length):
    """Returns features of one length, of random tokens."""
    draw = np.random.default_rng(0)
    places = np.sort(draw.integers(12, length, (2, count)), axis=0).astype(np.int32)
    return {
        "input_ids": draw.integers(1000, 30000, count * length).astype(np.int32),
        "token_types": np.tile(np.arange(length) >= 12, count).astype(np.int8),
        "begin": np.arange(count + 1) * length,
        "lengths": np.full(count, length),
        "start": places[0],
        "end": places[1],
    }


def train_steps(tokens, length, steps=2, batching="packed", dropout=None, compile_cache=None):
    """A process: a few steps of so many tokens, in sequences of one length, by train.py's own loop.

    compile_cache: where compiled kernels are kept; None: not compiled. Returns what the first step
    and the median step after it spent, and how many MiB the process grew by."""
    if compile_cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compile_cache
    sequences = tokens // length
    words = ["--max-length", length, "--stride", 32, "--batch-size", sequences, "--epochs", 1]
    words += ["--batching", batching, "--evaluate-every", "end"]
    words.append("--compile" if compile_cache else "--no-compile")
    if dropout is not None:
        words += ["--dropout", dropout]
    train, args, tokenizer = load(*words)
    device = torch.device("cpu")
    model = train.load_model(args, train.load_tokenizer(args)[1])
    optimizer = train.make_optimizer(model, args)
    if compile_cache:
        assert train.compile_layers(model), "this machine lacks a compiler"
    features = make_features(sequences * (steps + 1), length)
    features["table"] = train.feature_table(features, tokenizer, model, device)
    plan = train.plan_training(features["lengths"], args)
    train.plan_to_device(plan, device)
    state = train.new_state()
    ends = []

    def note_end(*_):
        ends.append((time.perf_counter(), time.process_time()))

    register_optimizer_step_post_hook(note_end)
    before = memory_mib("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        span_model = train.SpanModel(model, args)
        clock = train.Clock(device)
        with train.open_writer(output, state) as writer:
            note_end()
            train.train(
                *(args, output, span_model, optimizer, features, plan, clock, state, writer),
                save=lambda: None,
                evaluate=None,  # it is never due
            )
    walls, processors = np.diff(ends, axis=0).T
    return {
        "first": Spent(float(walls[0]), float(processors[0])),
        "step": Spent(float(np.median(walls[1:])), float(np.median(processors[1:]))),
        "memory": memory_mib("VmHWM") - before,
    }


# Tokens a step, and the length of its sequences.
SHAPES = [(768, 128), (1536, 128), (3072, 128), (6144, 128)]
SHAPES += [(3072, 256), (3072, 384), (3072, 512)]


def measure_steps(folder):
    rows = []
    for tokens, length in SHAPES:
        found = in_new_process(train_steps, tokens, length)
        row = [
            tokens,
            length,
            tokens // length,
            round(found["step"].wall, 2),
            round(found["step"].processor, 2),
            round(1e6 * found["step"].processor / tokens),
            round(found["memory"]),
            round(1024 * found["memory"] / tokens),
        ]
        rows.append(row)
        print(row, flush=True)
    columns = ["tokens a step", "max. length", "sequences", "seconds a step", "processor's seconds"]
    columns += ["processor's µs a token", "memory, MiB", "KiB a token"]
    conditions = ["packed, fp32, minilm, two threads", "all sequences of the length"]
    conditions.append("median of 2 steps")
    conditions.append("memory: growth of the process from before the first step to its peak")
    return [make_table("A step against tokens and length", conditions, columns, rows)]


def measure_compiling(folder):
    """Compiled against eager. Bucketed, as packed batches are compiled on a GPU only; all features
    have one length, so there is no padding either way."""
    tokens = 2048
    length = 256
    eager = in_new_process(train_steps, tokens, length, batching="bucketed")
    rows = []
    for name in ("cold", "kept from a run before"):
        compiled = in_new_process(
            train_steps, tokens, length, batching="bucketed", compile_cache=f"{folder}/inductor"
        )
        wait = compiled["first"].wall - eager["first"].wall
        gain = eager["step"].wall - compiled["step"].wall
        processor_gain = eager["step"].processor - compiled["step"].processor
        pays = gain > 0 and processor_gain > 0
        row = [
            name,
            round(compiled["first"].wall, 1),
            round(eager["first"].wall, 1),
            round(compiled["step"].wall, 2),
            round(eager["step"].wall, 2),
            round(compiled["step"].processor, 2),
            round(eager["step"].processor, 2),
            round(wait / gain) if pays else "never",
        ]
        rows.append(row)
        print(row, flush=True)
    columns = ["compiler's cache", "first step, s", "first step eager, s", "a step, s"]
    columns += ["a step eager, s", "processor's s", "eager processor's s", "pays after steps"]
    conditions = [f"bucketed, {tokens:,} tokens of length {length}, fp32, minilm, two threads"]
    conditions.append("rule: compile a run of more steps than the last column")
    return [make_table("Does compiling pay on a CPU?", conditions, columns, rows)]


# 6. The ceiling: what the multiplications alone reach


def tera(rate):
    """Returns a rate in tera, of three digits."""
    return float(f"{rate / 1e12:.3g}")


def time_multiplications(device_type):
    """A process: times a layer's multiplications, forward and backward.

    Returns the table's rows; the FLOP/s of all of them together; their FLOP per token; and the
    number of layers and the hidden size."""
    import transformers
    from torch.utils.benchmark import Timer

    if device_type == "cuda":
        config = transformers.BertConfig()  # BERT-Base
        tokens = 128 * 170  # a batch of 128 features of SQuAD's mean length
        dtype = torch.bfloat16
    else:
        config = transformers.BertConfig.from_pretrained(measuring.MODEL)
        tokens = 3072
        dtype = torch.float32
    hidden = config.hidden_size
    inner = config.intermediate_size
    rows = []
    flop = 0
    seconds = 0.0
    # How many of them a layer has, and the weight's shape.
    for count, inputs, outputs in ((4, hidden, hidden), (1, hidden, inner), (1, inner, hidden)):
        tensors = {
            "x": torch.randn(tokens, inputs, device=device_type, dtype=dtype),
            "w": torch.randn(outputs, inputs, device=device_type, dtype=dtype),
            "y": torch.randn(tokens, outputs, device=device_type, dtype=dtype),
        }
        passes = {"forward": ["x @ w.T"], "backward": ["y @ w", "y.T @ x"]}
        for name, products in passes.items():
            timer = Timer("; ".join(products), globals=tensors, num_threads=THREADS)
            spent = timer.blocked_autorange().median
            work = 2 * len(products) * tokens * inputs * outputs
            flop += count * work
            seconds += count * spent
            shape = f"[{tokens}, {inputs}] x [{inputs}, {outputs}]"
            rows.append([shape, count, name, tera(work / spent)])
    rows.append(["all of a layer", "", "both", tera(flop / seconds)])
    return rows, flop / seconds, flop / tokens, config.num_hidden_layers, hidden


def measure_ceiling(folder, device_type):
    found = in_new_process(time_multiplications, device_type)
    rows, rate, flop_per_token, layers, hidden = found
    conditions = ["BERT-Base, bf16" if device_type == "cuda" else "minilm, fp32, two threads"]
    conditions.append("medians; the multiplications alone, as torch.utils.benchmark times them")
    if device_type == "cpu":
        tokens = 3072
        length = 128
        conditions.append(f"the step: {tokens:,} tokens in sequences of {length}")
        attention_per_token = 12 * hidden * length  # as train.py's count_flops
        flop = tokens * layers * (flop_per_token + attention_per_token)
        for name, dropout in (("a whole step of train.py", None), ("without dropout", 0)):
            step = in_new_process(train_steps, tokens, length, steps=3, dropout=dropout)["step"]
            speed = flop / step.wall
            rows.append([name, "", f"{speed / rate:.0%} of that", tera(speed)])
    columns = ["multiplication", "a layer", "pass", "TFLOP/s"]
    return [make_table("A step against its multiplications alone", conditions, columns, rows)]


# 7. Main

PARTS = ["prepare", "decode", "start", "step", "compile", "ceiling"]


def measure(part, folder, options):
    """Returns a part's tables."""
    if part == "prepare":
        return measure_preparing(folder, options.questions)
    if part == "decode":
        return measure_decoding(folder, options.questions)
    if part == "start":
        return measure_start(folder)
    if part == "step":
        return measure_steps(folder)
    if part == "compile":
        return measure_compiling(folder)
    return measure_ceiling(folder, options.device)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    add("--questions", type=int, nargs="+", default=QUESTIONS, help="of prepare and decode")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of ceiling alone")
    add("--output", type=Path, default=measuring.RESULTS / "growth.json")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"{part} is no part: give some of {', '.join(PARTS)}")
    if options.device == "cuda" and options.parts != ["ceiling"]:
        parser.error("--device cuda is for ceiling alone: cost.py ceiling --device cuda")
    return options


def main():
    options = parse_options()
    if options.device == "cpu":
        measuring.need(measuring.TRAIN_FILE, measuring.MODEL)
    train = measuring.load_train()
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts or PARTS:
            tables = measure(part, folder, options)
            for table in tables:
                table["environment"] = measuring.describe_machine(train, options.device)
            # After each part: whoever stops it keeps what there is.
            measuring.write_tables(options.output, tables)
    measuring.show_tables(options.output)


if __name__ == "__main__":
    main()

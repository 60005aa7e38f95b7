"""Measures what train.py costs, and how the cost grows: linear is the claim.

    python baseline/tests/cost.py [prepare] [decode] [start] [step] [compile] [ceiling]   15 minutes
    python baseline/tests/cost.py ceiling --device cuda --output ceiling.json    BERT-Base, bf16

Each measurement is a process of its own, so that memory is its own too. The tables go to
baseline/results/growth.json; those that are not measured again stay there as they are.
"""

import argparse, collections, concurrent.futures, functools, json, multiprocessing, os, re
import statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

import measuring

SQUAD, MODEL = measuring.SHARED / "squad/train.json", measuring.SHARED / "minilm"
QUESTIONS = (1000, 10000, 30000, 87600)  # the last: as many as SQuAD v1.1's training has
SUBSET, DECODED = 1000, (1000, 10000)  # questions that the usual ways do too


def fresh(function, *arguments):
    """Calls the function in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def memory(name):
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


def timed(function, *arguments):
    """Returns the function's result, its seconds by the clock, and of the processor."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, time.perf_counter() - begin, time.process_time() - cpu


def ready(cache=None, *more):
    """Returns train.py, arguments and tokenizer, on two threads."""
    if cache:
        os.environ["SQUAD_CACHE"] = cache
    import torch

    torch.set_num_threads(2)
    train = measuring.load_train()
    train.progress = lambda items, what: items
    args = train.parse_arguments(["--model", str(MODEL), "--device", "cpu", *more])
    return train, args, train.load_tokenizer(args)[0]


def write_squad(path, count):
    """Writes a SQuAD file of count questions: the small one again and again, each time with its own
    prefix in contexts and questions, so that nothing can be remembered from the time before."""
    articles, left = json.loads(SQUAD.read_bytes())["data"], count
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"version": "1.1", "data": [')
        for turn in range(count):
            prefix, paragraphs = f"Part {turn} of it. ", []
            for paragraph in (p for article in articles for p in article["paragraphs"]):
                entries = []
                for entry in paragraph["qas"][:left]:
                    answers = [
                        {"text": a["text"], "answer_start": a["answer_start"] + len(prefix)}
                        for a in entry["answers"]
                    ]
                    new = {"id": f"{turn}-{entry['id']}", "answers": answers}
                    entries.append(new | {"question": prefix + entry["question"]})
                left -= len(entries)
                paragraphs.append({"context": prefix + paragraph["context"], "qas": entries})
                if not left:
                    break
            file.write((", " if turn else "") + json.dumps({"paragraphs": paragraphs}))
            if not left:
                break
        file.write("]}")


# 1. Preparation
def prepare(path, cache):
    """One process: what preparing a file takes, or reading it back from the cache."""
    train, args, tokenizer = ready(cache)
    before = memory("VmRSS")
    how = (train.prepare_features, path, "train", tokenizer, args)
    features, seconds, cpu = timed(*how)
    found = {"seconds": seconds, "cpu": cpu, "memory": memory("VmHWM") - before}
    return found | {"features": len(features["lengths"]), "cached": features["cached"]}


def usual_prepare(examples, tokenizer, padding):
    """The usual function for Dataset.map: windows, and where the answer lies in each."""
    examples["question"] = [q.lstrip() for q in examples["question"]]
    tokenized = tokenizer(
        examples["question"],
        examples["context"],
        truncation="only_second",
        max_length=384,
        stride=128,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=padding,
    )
    sample_mapping = tokenized.pop("overflow_to_sample_mapping")
    offset_mapping = tokenized.pop("offset_mapping")
    tokenized["start_positions"], tokenized["end_positions"] = [], []
    for i, offsets in enumerate(offset_mapping):
        input_ids, sequence_ids = tokenized["input_ids"][i], tokenized.sequence_ids(i)
        cls_index = input_ids.index(tokenizer.cls_token_id)
        answers = examples["answers"][sample_mapping[i]]
        start_char = answers["answer_start"][0]
        end_char = start_char + len(answers["text"][0])
        token_start_index = 0
        while sequence_ids[token_start_index] != 1:
            token_start_index += 1
        token_end_index = len(input_ids) - 1
        while sequence_ids[token_end_index] != 1:
            token_end_index -= 1
        inside = offsets[token_start_index][0] <= start_char
        if not (inside and offsets[token_end_index][1] >= end_char):
            tokenized["start_positions"].append(cls_index)
            tokenized["end_positions"].append(cls_index)
        else:
            while token_start_index < len(offsets) and offsets[token_start_index][0] <= start_char:
                token_start_index += 1
            tokenized["start_positions"].append(token_start_index - 1)
            while offsets[token_end_index][1] >= end_char:
                token_end_index -= 1
            tokenized["end_positions"].append(token_end_index + 1)
    return tokenized


def compare_preparation(path):
    """One process: seconds of both ways on the same questions, and whether they are equal. The
    usual way pads to 384 as it comes (run_qa.py, the documentation), and can do without."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    train, args, tokenizer = ready()
    data = train.read_squad(path, SUBSET)
    rows = {"question": data["questions"], "id": data["ids"]}
    rows["context"] = [data["contexts"][i] for i in data["paragraph"]]
    answers = [{"answer_start": [a[0][0]], "text": [a[0][1]]} for a in data["answers"]]
    table = datasets.Dataset.from_dict(rows | {"answers": answers})
    ours, usual = [], {"max_length": [], False: []}
    for _ in range(3):
        tokenizer.backend_tokenizer.no_truncation()  # the usual way leaves them on
        tokenizer.backend_tokenizer.no_padding()
        how = (data, tokenizer, args.max_length, args.stride, path)
        features, *seconds = timed(train.build_features, *how)
        ours.append(seconds)
        for padding, spent in usual.items():
            function = functools.partial(usual_prepare, tokenizer=tokenizer, padding=padding)
            how = {"batched": True, "remove_columns": table.column_names}
            mapped, *seconds = timed(functools.partial(table.map, function, **how))
            spent.append(seconds)
    edges = features["begin"]
    equal = len(mapped) == len(edges) - 1
    for i, row in enumerate(mapped):
        tokens, first = features["tokens"][edges[i] : edges[i + 1]].tolist(), features["first"][i]
        equal &= row["input_ids"] == tokens
        equal &= row["token_type_ids"] == [int(place >= first) for place in range(len(tokens))]
        equal &= row["start_positions"] == features["start"][i]
        equal &= row["end_positions"] == features["end"][i]
    return {"equal": bool(equal), "ours": ours, "usual": list(usual.values())}


def preparation(folder):
    rows = []
    for count in QUESTIONS:
        path, cache = f"{folder}/{count}.json", f"{folder}/cache-{count}"
        write_squad(path, count)
        built, read = fresh(prepare, path, cache), fresh(prepare, path, cache)
        assert read["cached"] and not built["cached"]
        row = [count, built["features"], round(built["seconds"], 1), round(built["cpu"], 1)]
        row += [round(1e6 * built["seconds"] / count), round(built["memory"])]
        rows.append([*row, round(read["seconds"], 2)])
        print(rows[-1], flush=True)
    columns = ["questions", "features", "seconds", "processor's seconds", "µs a question"]
    columns += ["memory, MiB", "read back, s"]
    how = (
        "reading, tokenising, windows, writing the cache; one process; 384/128; memory: its growth"
    )
    tables = [("Preparing against questions", [how], columns, rows)]
    found = fresh(compare_preparation, f"{folder}/{SUBSET}.json")
    ours, rows = np.array(found["ours"]), []
    for name, usual in zip(("padded to 384, as it comes", "not padded"), found["usual"]):
        row = [name, SUBSET, float(np.median(ours[:, 0])), float(np.median(np.array(usual)[:, 0]))]
        row[2:] = [round(seconds, 3) for seconds in row[2:]]
        row += [round(float(ratio), 1) for ratio in np.median(np.array(usual) / ours, axis=0)]
        rows.append([*row, "identical" if found["equal"] else "DIFFERENT"])
    columns = ["usual way", "questions", "ours, s", "Dataset.map, s", "faster by"]
    columns += ["by processor time", "features"]
    how = "in one process, in turns, median of three; both from memory to features"
    return [*tables, ("Preparing against the usual Dataset.map", [how], columns, rows)]


# 2. Decoding
def usual_decode(logits, examples, features, owners):
    """The usual n-best loop over examples, features (lists or Datasets) and pairs of places."""
    windows, predictions = collections.defaultdict(list), {}
    for window, name in enumerate(owners):
        windows[name].append(window)
    for example in examples:
        prelim, name, context = [], example["id"], example["context"]
        for window in windows[name]:
            offsets = features[window]["offset_mapping"]
            length = len(offsets)
            start_logits, end_logits = logits[window, :length, 0], logits[window, :length, 1]
            start_indexes = np.argsort(start_logits)[-1 : -20 - 1 : -1].tolist()
            end_indexes = np.argsort(end_logits)[-1 : -20 - 1 : -1].tolist()
            for start_index in start_indexes:
                for end_index in end_indexes:
                    if (
                        start_index >= len(offsets)
                        or end_index >= len(offsets)
                        or offsets[start_index] is None
                        or offsets[end_index] is None
                    ):
                        continue
                    if end_index < start_index or end_index - start_index + 1 > 30:
                        continue
                    prelim.append(
                        {
                            "offsets": (offsets[start_index][0], offsets[end_index][1]),
                            "score": start_logits[start_index] + end_logits[end_index],
                        }
                    )
        best = sorted(prelim, key=lambda x: x["score"], reverse=True)[:20]
        for one in best:
            one["text"] = context[one["offsets"][0] : one["offsets"][1]]
        if not best or (len(best) == 1 and best[0]["text"] == ""):
            best.insert(0, {"text": "empty", "score": 0.0})
        scores = np.array([one.pop("score") for one in best])
        exps = np.exp(scores - np.max(scores))
        for one, share in zip(best, exps / exps.sum()):
            one["probability"] = share
        predictions[name] = best[0]["text"]
    return predictions


def random_logits(lengths, seed=0):
    """Logits like a trained model's: noise, and high around one place; [windows, longest, 2]."""
    random, longest = np.random.default_rng(seed), int(lengths.max())
    logits = random.standard_normal((len(lengths), longest, 2), np.float32)
    peak = 10 + (random.random(len(lengths)) * lengths * 0.8).astype(int)
    away = np.abs(np.arange(longest) - peak[:, None])[..., None]
    logits = (logits + 8 * np.exp(-away / 8)).astype(np.float32)
    logits[np.arange(longest) >= lengths[:, None]] = -np.inf  # as span_logits
    return logits


def decode(path, cache, compare):
    """One process: the seconds of our decoding, and of the usual loop where compare says so."""
    train, args, tokenizer = ready(cache)
    features = train.prepare_features(path, "train", tokenizer, args)
    order = np.argsort(-features["lengths"], kind="stable")
    cuts = np.flatnonzero(np.diff(np.cumsum(features["lengths"][order]) // 8192)) + 1
    before, seconds, cpu, kept = memory("VmRSS"), 0.0, 0.0, {}
    best, most = np.zeros((len(order), 4)), 0.0
    for number, windows in enumerate(np.split(order, cuts)):  # as evaluate_model batches them
        logits = random_logits(features["lengths"][windows], number)
        how = (logits, windows, features)
        best[windows], *spent = timed(train.best_spans, *how)
        seconds, cpu = seconds + spent[0], cpu + spent[1]
        if compare:
            kept |= dict(zip(windows.tolist(), logits))
    answers, *spent = timed(train.answer_texts, best, features)
    seconds, cpu, most = seconds + spent[0], cpu + spent[1], memory("VmHWM") - before
    found = {"seconds": seconds, "cpu": cpu, "windows": len(order), "memory": max(most, 0)}
    if compare:
        import datasets

        rows, names = [], features["texts"]["ids"]
        owners = [names[question] for question in features["question"]]
        for i, length in enumerate(features["lengths"].tolist()):
            first, many = features["first"][i], features["context_tokens"][i]
            begin = features["offsets_begin"][features["paragraph"][features["question"][i]]]
            begin += features["context_begin"][i]
            inside = features["offsets"][begin : begin + many].tolist()
            offsets = [None] * first + inside + [None] * (length - first - many)
            edge = features["begin"][i]
            ids = features["tokens"][edge : edge + length].tolist()
            row = {"input_ids": ids, "token_type_ids": [0] * length, "attention_mask": [1] * length}
            rows.append(row | {"offset_mapping": offsets, "example_id": owners[i]})
        contexts = [features["texts"]["contexts"][i] for i in features["paragraph"]]
        examples = [{"id": name, "context": text} for name, text in zip(names, contexts)]
        as_scripts = [datasets.Dataset.from_list(each) for each in (examples, rows)]
        logits = np.zeros((len(order), int(features["lengths"].max()), 2), np.float32)
        for window, values in kept.items():
            logits[window, : len(values)] = values
        spent = []
        for _ in range(3):  # in turns: ours again, and the usual loop
            ours = 0.0, 0.0
            for windows in np.split(order, cuts):
                batch = logits[windows, : features["lengths"][windows[0]]].copy()
                best[windows], *each = timed(train.best_spans, batch, windows, features)
                ours = ours[0] + each[0], ours[1] + each[1]
            answers, *each = timed(train.answer_texts, best, features)
            ours = ours[0] + each[0], ours[1] + each[1]
            loop, *others = timed(usual_decode, logits, examples, rows, owners)
            usual, *scripts = timed(usual_decode, logits, *as_scripts, owners)
            spent.append((*ours, *others, *scripts))
        found |= {"spent": spent, "equal": usual == answers == loop}
    return found


def decoding(folder):
    rows = []
    for count in QUESTIONS:
        path, cache = f"{folder}/{count}.json", f"{folder}/cache-{count}"
        if not Path(path).exists():
            write_squad(path, count)
            fresh(prepare, path, cache)
        found = fresh(decode, path, cache, False)
        row = [count, found["windows"], round(found["seconds"], 2), round(found["cpu"], 2)]
        rows.append([*row, round(1e6 * found["seconds"] / count), round(found["memory"])])
        print(rows[-1], flush=True)
    columns = ["questions", "windows", "seconds", "processor's seconds", "µs a question"]
    columns.append("memory, MiB")
    how = "logits as evaluation gives them: batches of 8,192 tokens; the 20 best, 30 tokens at most"
    tables = [("Decoding against questions", [how], columns, rows)]
    rows = []
    for count in DECODED:
        found = fresh(decode, f"{folder}/{count}.json", f"{folder}/cache-{count}", True)
        spent, equal = np.array(found["spent"]).T, "identical" if found["equal"] else "DIFFERENT"
        ours, ours_cpu = spent[:2]
        for name, usual, usual_cpu in (
            ("loop over lists", *spent[2:4]),
            ("loop over Datasets, as the scripts", *spent[4:6]),
        ):
            row = [name, count, *(round(float(np.median(each)), 3) for each in (ours, usual))]
            row += [round(float(np.median(usual / ours)), 1)]
            rows.append([*row, round(float(np.median(usual_cpu / ours_cpu)), 1), equal])
    columns = ["usual way", "questions", "ours, s", "usual, s", "faster by", "by processor time"]
    columns.append("answers")
    how = "the same logits in one process, in turns, median of three"
    return [*tables, ("Decoding against the usual n-best loop", [how], columns, rows)]


# 3. Start-up
def start(folder):
    """Command to first step with --sample: the wait, and what the imports take of it."""
    environment = os.environ | {"SQUAD_CACHE": f"{folder}/start", "OMP_NUM_THREADS": "2"}
    command = ["--sample", "--max-steps", "2", "--log-every", "1", "--no-profile", "--output"]

    def once(number, *options):
        marks, lines, begin = {}, [], time.perf_counter()
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        call = [sys.executable, *options, measuring.TRAIN, *command, f"{folder}/start-{number}"]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(call, env=environment, **how | {"stderr": errors}) as process,
        ):
            for line in process.stdout:
                now = time.perf_counter() - begin
                for name, words in (
                    ("imports and environment", "baseline: "),
                    ("features", "features, cached"),
                    ("model and plan", "steps ("),
                    ("first step", "step 1/"),
                ):
                    if words in line:
                        marks.setdefault(name, now)
            errors.seek(0)
            lines = errors.read().splitlines()
        assert process.returncode == 0, lines[-3:]
        return marks, lines

    once(0)
    runs = [once(number)[0] for number in (1, 2, 3)]
    rows, before = [], dict.fromkeys(range(3), 0.0)
    for name in runs[0]:
        parts = [run[name] - before[i] for i, run in enumerate(runs)]
        before = {i: run[name] for i, run in enumerate(runs)}
        rows.append([name, round(statistics.median(parts), 1)])
    whole = statistics.median(run["first step"] for run in runs)
    rows.append(["command to first step", round(whole, 1)])
    how = ["--sample, cached features", "median of three", "the parts in their order"]
    tables = [("Start-up: where the seconds go", how, ["part", "seconds"], rows)]
    packages, total = collections.Counter(), 0
    for line in once(4, "-X", "importtime")[1]:
        found = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", line)
        if found:
            packages[found[2].split(".")[0]] += int(found[1]) / 1e6
            total += int(found[1]) / 1e6
    rows = [[name, round(seconds, 2)] for name, seconds in packages.most_common(8)]
    rows.append(["all the others", round(total - sum(row[1] for row in rows), 2)])
    how = ["python -X importtime, each module's own time summed by package", "measuring slows it"]
    return [*tables, ("Start-up: the imports", how, ["package", "seconds"], rows)]


# 4. A step
def step(tokens, length, compiled=False, cache=None, batching="packed", steps=2, dropout=None):
    """One process: a step of so many tokens in sequences of one length. Returns seconds and MiB."""
    if cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    rows = tokens // length
    more = ["--max-length", str(length), "--stride", "32", "--batch-size", str(rows)]
    more += ["--batching", batching, "--compile" if compiled else "--no-compile", "--epochs", "1"]
    more += ["--dropout", str(dropout)] if dropout is not None else []
    train, args, tokenizer = ready(None, *more)
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    many = rows * (steps + 1)
    random = np.random.default_rng(0)
    features = {"tokens": random.integers(1000, 30000, many * length).astype(np.int32)}
    features["begin"] = np.arange(many + 1) * length
    features |= {"lengths": np.full(many, length), "first": np.full(many, 12, np.int32)}
    places = random.integers(12, length, (2, many)).astype(np.int32)
    features |= {"start": places.min(0), "end": places.max(0), "pad": tokenizer.pad_token_id}
    names = ("tokens", "begin", "lengths", "first", "start", "end")
    features["table"] = {name: torch.tensor(features[name]) for name in names}
    model = train.load_model(args, train.load_tokenizer(args)[1])
    optimizer, _ = train.make_optimizer(model, args)
    if compiled:
        train.compile_layers(model)
    plan = train.plan_training(features["lengths"], args)
    marks = []

    def mark(*_):
        marks.append((time.perf_counter(), time.process_time()))

    register_optimizer_step_post_hook(mark)
    before = memory("VmRSS")
    state = {"step": 0, "intervals": [], "operators": "", "beside": {"log": 0.0}}
    args.profile = False
    with tempfile.TemporaryDirectory() as output:
        parts = (train.SpanModel(model, args), train.Clock(torch.device("cpu")), optimizer)
        how = (args, torch.device("cpu"), Path(output), *parts, features, plan, state, int)
        mark()
        train.train(*how)  # int() in the place of save(): nothing
    walls, cpus = (np.diff([m[kind] for m in marks]) for kind in (0, 1))
    found = {"first": walls[0], "seconds": np.median(walls[1:]), "cpu": np.median(cpus[1:])}
    found = {name: float(value) for name, value in found.items()}
    return found | {"memory": memory("VmHWM") - before}


def steps(folder):
    del folder
    shapes = [(768, 128), (1536, 128), (3072, 128), (6144, 128)]
    shapes += [(3072, 256), (3072, 384), (3072, 512)]
    rows = []
    for tokens, length in shapes:
        found = fresh(step, tokens, length)
        row = [tokens, length, tokens // length, round(found["seconds"], 2)]
        row += [round(found["cpu"], 2), round(1e6 * found["cpu"] / tokens)]
        rows.append([*row, round(found["memory"]), round(1024 * found["memory"] / tokens)])
        print(rows[-1], flush=True)
    columns = ["tokens a step", "max. length", "sequences", "seconds a step", "processor's seconds"]
    columns += ["processor's µs a token", "memory, MiB", "KiB a token"]
    how = ["packed, fp32, minilm, two threads", "all sequences of the length", "median of 2 steps"]
    how.append("memory: growth of the process from before the first step to its peak")
    return [("A step against tokens and length", how, columns, rows)]


def compilation(folder):
    tokens, length, rows = 2048, 256, []
    eager = fresh(step, tokens, length)
    for name in ("cold", "kept from a run before"):
        found = fresh(step, tokens, length, True, f"{folder}/inductor")
        wait, gain = found["first"] - eager["first"], eager["seconds"] - found["seconds"]
        cpu_gain = eager["cpu"] - found["cpu"]
        row = [name, round(found["first"], 1), round(eager["first"], 1)]
        row += [round(found["seconds"], 2), round(eager["seconds"], 2)]
        row += [round(found["cpu"], 2), round(eager["cpu"], 2)]
        rows.append([*row, round(wait / gain) if gain > 0 and cpu_gain > 0 else "never"])
        print(rows[-1], flush=True)
    columns = ["compiler's cache", "first step, s", "first step eager, s", "a step, s"]
    columns += ["a step eager, s", "processor's s", "eager processor's s", "pays after steps"]
    how = [f"packed, {tokens:,} tokens of length {length}, fp32, minilm, two threads"]
    how.append("rule: compile a run of more steps than the last column")
    return [("Does compiling pay on a CPU?", how, columns, rows)]


# 5. The ceiling
def multiplications(device):
    """One process: rows of the table, and of a layer's multiplications together the FLOP/s and the
    FLOP of a token, forward and backward; and the model's config."""
    import torch
    from torch.utils.benchmark import Timer

    if device == "cuda":
        config = measuring.load_train().transformers.BertConfig()
        tokens, kind = 128 * 170, torch.bfloat16  # a batch of 128
    else:
        config, tokens, kind = ready()[0].transformers.BertConfig.from_pretrained(MODEL), 3072, None
    hidden, inner, rows, work, seconds = config.hidden_size, config.intermediate_size, [], 0, 0.0
    for many, k, n in ((4, hidden, hidden), (1, hidden, inner), (1, inner, hidden)):
        shapes = {"x": (tokens, k), "w": (n, k), "y": (tokens, n)}
        given = {i: torch.randn(*shape, device=device, dtype=kind) for i, shape in shapes.items()}
        for name, code, count in (("forward", "x @ w.T", 1), ("backward", "y @ w; y.T @ x", 2)):
            spent = Timer(code, globals=given, num_threads=2).blocked_autorange().median
            flop = 2 * count * tokens * k * n
            work, seconds = work + many * flop, seconds + many * spent
            rows.append([f"[{tokens}, {k}] x [{k}, {n}]", many, name, tera(flop / spent)])
    rows.append(["all of a layer", "", "both", tera(work / seconds)])
    return rows, work / seconds, work / tokens, config


def tera(rate):
    return float(f"{rate / 1e12:.3g}")


def ceiling(folder, device="cpu"):
    del folder
    rows, rate, flop, config = fresh(multiplications, device)
    how = ["BERT-Base, bf16" if device == "cuda" else "minilm, fp32, two threads"]
    how.append("medians; the multiplications alone, as torch.utils.benchmark times them")
    if device == "cpu":
        how.append("the step: 3,072 tokens in sequences of 128")
        flop = 3072 * config.num_hidden_layers * (flop + 12 * config.hidden_size * 128)
        for name, dropout in (("a whole step of train.py", None), ("without dropout", 0)):
            found = fresh(functools.partial(step, 3072, 128, steps=3, dropout=dropout))
            speed = flop / found["seconds"]
            rows.append([name, "", f"{speed / rate:.0%} of that", tera(speed)])
    columns = ["multiplication", "a layer", "pass", "TFLOP/s"]
    return [("A step against its multiplications alone", how, columns, rows)]


PARTS = {"prepare": preparation, "decode": decoding, "start": start}
PARTS |= {"step": steps, "compile": compilation, "ceiling": ceiling}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of ceiling alone")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "growth.json")
    options = parser.parse_args()
    wrong = set(options.parts) - set(PARTS)
    if wrong:
        sys.exit(f"error: {wrong.pop()} is no part: give some of {', '.join(PARTS)}")
    cuda = options.device == "cuda"
    if cuda and options.parts != ["ceiling"]:
        sys.exit("error: --device cuda is for ceiling alone: cost.py ceiling --device cuda")
    if not cuda:
        measuring.need(SQUAD, MODEL)
    PARTS["ceiling"] = functools.partial(ceiling, device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts or PARTS:
            tables = []
            for title, conditions, columns, rows in PARTS[part](folder):
                table = {"title": title, "conditions": conditions, "columns": columns}
                tables.append(table | {"rows": rows, "environment": measuring.environment()})
            titles = [table["title"] for table in tables]
            kept = json.loads(options.output.read_text()) if options.output.exists() else []
            kept = [table for table in kept if table["title"] not in titles]
            measuring.write_tables(options.output, kept + tables)  # after each part


if __name__ == "__main__":
    main()

"""Runs -> Markdown, ready to hand in.

    python baseline/report.py RUN...                        the whole report
    python baseline/report.py --table ladder RUN...         one table of them
    python baseline/report.py --chart scaling RUN...        one chart, in mermaid, which GitHub draws
    python baseline/report.py --table bench FILE.json...    a measurement's own table

train.py itself asks for --environment, and for --finish at a run's end.

A RUN is a folder that train.py left (results.json, beside it timings.json and tensorboard/), a
folder of such folders, or a pattern in quotes. What is absent prints as "not measured", and a
speed-up stands only between runs of the same batch, model, data and device.
"""

import argparse
import collections
import datetime
import glob
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import statistics
import string
import subprocess
import sys
import zlib
from array import array

import numpy as np

PAPER = {"exact_match": 80.8, "f1": 88.5}  # Devlin et al. 2019: BERT-Base, SQuAD v1.1's dev set
PAPERS = "80.8 / 88.5"
PHASES = ["data", "forward", "backward", "optimizer", "exposed_communication"]
FIRST_LOSSES = 40  # log intervals over which the ladder compares losses
MISSING = "not measured"
ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what odd values raise


def fault(message):
    print(f"report.py: {message}", file=sys.stderr)
    sys.exit(2)


# 1. Runs: folders -> {"name", "folder", "results", "timings"}


def read_json(path, kinds=dict):
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        fault(f"{path}: cannot be read as JSON ({error}): measure again")
    if not isinstance(value, kinds):
        fault(f"{path}: holds a {type(value).__name__}, not an object: measure again")
    return value


def natural(path):  # 2-tf32 before 10-compiled
    parts = re.findall(r"\d+|\D+", str(path))
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in parts]


def find_runs(names):
    folders = []
    for name in names:
        found = [name] if pathlib.Path(name).exists() else sorted(glob.glob(name), key=natural)
        if not found:
            fault(f"{name}: no such folder; a run is the folder given to train.py as --output")
        for folder in map(pathlib.Path, found):
            inside = sorted((file.parent for file in folder.glob("*/results.json")), key=natural)
            if (folder / "results.json").exists():
                folders.append(folder)
            elif inside:
                folders += inside
                for left in {file.parent for file in folder.glob("*/.lock")} - {*inside}:
                    print(f"report.py: {left}: no finished run, left out", file=sys.stderr)
            elif len(names) > 1:  # as runs/* gives them
                print(f"report.py: {folder}: no finished run, left out", file=sys.stderr)
            elif (folder / "checkpoint.pt").exists():
                fault(f"{folder}: not finished (it holds checkpoint.pt): start it again to end it")
            else:
                fault(f"{folder}: no results.json in it; give the folder of a finished run")
    if not folders:
        fault(f"none of these is a finished run: {', '.join(map(str, names))[:200]}")
    return list(dict.fromkeys(folders))


def load_run(folder, results, timings=None):
    """Checks what a run left, as far as an odd value would give odd tables."""
    path = folder / "timings.json"
    if timings is None:
        timings = read_json(path) if path.exists() else {}
    for field in ("arguments", "environment", "phases", "intervals", "tokens_per_step"):
        kind = list if field in ("intervals", "tokens_per_step") else dict
        place = results if field in ("arguments", "environment") else timings
        if not isinstance(place.setdefault(field, kind()), kind):
            fault(f"{folder}: {field} is not {'an object' if kind is dict else 'a list'}")
    fields = [field for field in RESULTS.values() if isinstance(field, str)]
    numbers = [(results, field) for field in (*fields, "world_size", "nodes", "train_features")]
    numbers += [(results["arguments"], field) for field in ("batch_size", "accumulate")]
    for place, field in numbers:
        if place.get(field) is not None and not is_number(place[field]):
            fault(f"{folder / 'results.json'}: {field} is not a number")
    return {"folder": folder, "name": folder.resolve().name, "results": results, "timings": timings}


def load_runs(names):
    runs = [load_run(one, read_json(one / "results.json")) for one in find_runs(names)]
    count = collections.Counter(run["name"] for run in runs)
    for run in runs:  # two folders of one name: their parents tell them apart
        if count[run["name"]] > 1:
            run["name"] = "/".join(run["folder"].resolve().parts[-2:])
    return runs


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def get(run, field):
    return run["results"].get(field)


def argument(run, name):
    value = run["results"]["arguments"].get(name)
    return listed(value) if isinstance(value, (list, dict)) else value


def environment(run, name):
    return run["results"]["environment"].get(name)


def ranks(run):
    return int(get(run, "world_size") or 1)


def shape(run):
    return f"{int(get(run, 'nodes') or 1)}x{ranks(run) // int(get(run, 'nodes') or 1)}"


def device(run):
    names = sorted({str(name) for name in environment(run, "devices") or []})
    return " and ".join(names) or f"device {MISSING}"


def model(run):
    name = "the sample's BERT" if argument(run, "sample") else argument(run, "model")
    return str(name or f"model {MISSING}").rstrip("/").split("/")[-1]


def data(run):
    path = "sample.json" if argument(run, "sample") else argument(run, "train_file")
    limit, length = argument(run, "limit"), argument(run, "max_length")
    name = str(path or "SQuAD v1.1").split("/")[-1] + (f", first {limit}" if limit else "")
    return name + (f", {length} tokens a window" if length else "")


def commit(run):
    value, dirty = environment(run, "commit"), " with changes" * bool(environment(run, "dirty"))
    return str(value)[:10] + dirty if value else MISSING


def settings(run):
    kinds = [argument(run, name) for name in ("precision", "batching", "strategy")]
    kinds += ["compiled"] if argument(run, "compile") else []
    return ", ".join(str(kind) for kind in kinds if kind) or MISSING


def epochs(run):
    each = list(filter(is_number, get(run, "epoch_seconds") or []))
    few = ", ".join(map(number, each)) or None
    return few if len(each) < 5 else f"{number(min(each))} to {number(max(each))}"


def paper(run):
    """The paper's figures where this run may stand beside them, else why not."""
    part = argument(run, "sample") or argument(run, "limit")
    if part or (get(run, "train_features") or 0) < 85_000:  # the whole of it has 88.5 k at 384/128
        return f"not comparable: other data ({data(run)})"
    if "bert-base" not in str(argument(run, "model")).lower():
        return f"not comparable: another model ({model(run)})"
    if argument(run, "max_steps") or not argument(run, "epochs"):
        return "not comparable: not trained to the end"
    return PAPERS


# 2. Markdown


def number(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return MISSING if value is None or isinstance(value, float) else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2}f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(share):
    return f"{100 * share:.1f} %" if is_number(share) else MISSING


def spread(values, show=number):
    values = [value for value in values if is_number(value)]
    if len(values) < 2:
        return show(values[0]) if values else MISSING
    return f"{show(statistics.mean(values))} ± {show(statistics.stdev(values))}"


def listed(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {listed(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(dict.fromkeys(map(listed, value)))
    if value is None:
        return ""
    return number(value) if isinstance(value, (bool, float)) else str(value)


def cell(value):
    text = number(value).replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split()) or " "


def table(caption, rows):
    """rows: dicts of one and the same columns."""
    head = list(rows[0]) if rows else ["nothing to show"]
    body = [head, ["---"] * len(head), *(row.values() for row in rows)]
    lines = (f"| {' | '.join(map(cell, row))} |" for row in body)
    return "\n".join([f"*{cell(caption).replace('*', '×')}*", "", *lines])


def together(values):
    values = list(dict.fromkeys(str(MISSING if value is None else value) for value in values))
    return " / ".join(values) if len(values) < 6 else f"({len(values)} different)"


def conditions(runs, before):
    """The caption of a table: what the figures were measured on, and how often."""

    def all_of(of):
        return together(map(of, runs))

    dates = (get(run, "finished_at") or environment(run, "date") or MISSING for run in runs)
    how = f"precision {all_of(lambda run: argument(run, 'precision'))}"
    how += f"; batch {all_of(lambda run: argument(run, 'batch_size'))}; {all_of(model)}"
    when = together(str(date).partition("T")[0] for date in dates)
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}."
    return f"{before} {all_of(device)}; {how}; {all_of(data)}; commit {all_of(commit)}; {when}; {count}"


COLOURS = {"data": "#999999", "forward": "#4477aa", "backward": "#ee6677", "optimizer": "#228833"}
COLOURS |= {"exposed_communication": "#aa3377", "communication": "#aa3377", "the rest": "#dddddd"}
COLOURS |= {"device": "#ccbb44", "CPU": "#66ccee"}


def mermaid(settings, *lines):
    return "\n".join(["```mermaid", f"%%{{init: {json.dumps(settings)}}}%%", *lines, "```"])


def label(text):  # mermaid has no escape for these
    return re.sub(r'["\[\];`#<>\n]', " ", str(text))


def xychart(title, labels, unit, *series):
    """labels: names, or the last step of an axis from 1. series: ("bar" or "line", values)."""
    names = labels if isinstance(labels, int) else ", ".join(f'"{label(name)}"' for name in labels)
    across = f'"step" 1 --> {names}' if isinstance(labels, int) else f"[{names}]"
    top = max(value for _, values in series for value in values) or 1
    digits = 0 if top >= 100 else 3
    lines = [f'    title "{label(title)}"', f"    x-axis {across}"]
    lines += [f'    y-axis "{unit}" 0 --> {top * 1.1:.{digits}f}']
    for kind, values in series:
        lines.append(f"    {kind} [{', '.join(f'{value:.{digits}f}' for value in values)}]")
    settings = {"themeVariables": {"xyChart": {"plotColorPalette": "#4477aa, #ee6677"}}}
    settings["xyChart"] = {"width": 900, "height": 400}
    lying = " horizontal" if len(str(names)) > 130 else ""  # long names would overlap
    return mermaid(settings, "xychart-beta" + lying, *lines)


# 3. Comparing like with like


def differences(run, other):
    """What forbids a speed-up between two runs, and what was changed on purpose."""

    def unlike(*fields):
        words = {None: "none", True: "on", False: "off"}
        pairs = ((name, of(other), of(run)) for name, of in fields)
        return [f"{n} {words.get(a, a)} → {words.get(b, b)}" for n, a, b in pairs if a != b]

    forbids = [("batch", RESULTS["batch"]), ("model", model), ("data", data), ("device", device)]
    forbids += [("features", lambda one: get(one, "train_features"))]
    names = ["precision", "fused", "batching", "compile", "accumulate", "strategy", "gradients"]
    changed = [(name, lambda one, name=name: argument(one, name)) for name in [*names, "dropout"]]
    return unlike(*forbids), unlike(("nodes x ranks", shape), *changed)


def steady(run, field):
    """One field of the intervals that count for the headline."""
    found = [i for i in run["timings"]["intervals"] if i.get("steady")]
    return [i[field] for i in found if is_number(i.get(field)) and is_number(i.get("seconds"))]


def windows(run):
    """Tokens/s in three windows of the steady intervals; the run's own figure where there are few."""
    pairs = np.array(list(zip(steady(run, "tokens"), steady(run, "seconds"))))
    if len(pairs) < 3:
        return [get(run, "tokens_per_second")] if is_number(get(run, "tokens_per_second")) else []
    sums = [part.sum(axis=0) for part in np.array_split(pairs, 3)]
    return [float(tokens / seconds) for tokens, seconds in sums if seconds > 0]


def speed(run):
    return statistics.median(windows(run)) if windows(run) else None


def speed_up(run, other):
    if forbids := differences(run, other)[0]:
        return "not compared: " + ", ".join(forbids)
    ours, theirs = mean_speed([run]), mean_speed([other])
    return f"{ours / theirs:.2f}" if ours and theirs else MISSING


# 4. Tables of runs. A column is a field of results.json, or a function of the run.

RESULTS = {"run": lambda run: run["name"], "nodes x ranks": shape, "settings": settings}
RESULTS |= {"epoch s": "steady_epoch_seconds", "training s": "train_seconds"}
RESULTS |= {"warm-up s": "warmup_seconds", "preparing s": "prepare_seconds"}
RESULTS |= {"evaluating s": "evaluate_seconds", "in all s": "total_seconds", "each epoch s": epochs}
RESULTS |= {"tokens/s": "tokens_per_second", "features/s": "features_per_second", "steps": "steps"}
RESULTS |= {"MFU": "model_flops_utilization", "padding": "padding_share", "EM": "exact_match"}
RESULTS |= {"F1": "f1", "parameters": "parameters", "peak GiB a rank": "peak_memory_gib"}
RESULTS |= {
    "batch": lambda run: argument(run, "batch_size"),
    "features a rank and pass": lambda run: (
        (argument(run, "batch_size") or 0) / ranks(run) / (argument(run, "accumulate") or 1) or None
    ),
    "features cached": lambda run: get(run, "features_cached"),
    "resumed from": lambda run: listed(get(run, "resumed_from_steps")) or "-",
    "the BERT paper's EM / F1": paper,
    "scorer": lambda run: get(run, "scorer"),
}
SHOW = {"MFU": percent, "padding": percent, "EM": "{:.2f}".format, "F1": "{:.2f}".format}


def value(run, column):
    field = RESULTS[column]
    return get(run, field) if isinstance(field, str) else field(run)


def shown(runs, column):
    """One run's value, or the mean and the spread of several runs'."""
    if isinstance(runs, list):
        return spread([value(run, column) for run in runs], SHOW.get(column, number))
    one = value(runs, column)
    return number(None) if one is None else SHOW.get(column, number)(one)


def plain(caption, *columns):
    return lambda runs: table(
        conditions(runs, caption), [{name: shown(run, name) for name in columns} for run in runs]
    )


def seeds_table(runs):
    quiet = ("seed", "output", "profile", "save_every", "log_every")
    groups = collections.defaultdict(list)
    for run in runs:
        kept = {k: v for k, v in run["results"]["arguments"].items() if k not in quiet}
        key = {**kept, "device": device(run), "nodes x ranks": shape(run)}
        groups[json.dumps(key, sort_keys=True)].append(run)
    keys = [json.loads(key) for key in groups]
    names = dict.fromkeys(itertools.chain(*keys))
    differ = [name for name in names if any(key.get(name) != keys[0].get(name) for key in keys)]
    rows = []
    for key, group in zip(keys, groups.values()):
        row = {"group": ", ".join(f"{n} {key.get(n)}" for n in differ) or "all of one kind"}
        row |= {"runs": len(group), "seeds": ", ".join(str(argument(run, "seed")) for run in group)}
        columns = ["EM", "F1", "epoch s", "tokens/s", "peak GiB a rank"]
        rows.append(row | {name: shown(group, name) for name in columns})
    others = " and the commit" if len(set(map(commit, runs))) > 1 else " alone"
    before = f"Mean ± standard deviation over runs that differ in the seed{others}."
    return table(conditions(runs, before), rows)


def loss_agreement(run, earlier):
    """The largest difference from the first rung that trained the same batches: the same seed and
    the same real tokens at each step are the same batches, whatever the padding."""

    def first(one):
        found = [i for i in one["timings"]["intervals"][:FIRST_LOSSES] if is_number(i.get("loss"))]
        pairs = one["timings"]["tokens_per_step"]  # real, computed
        batches = [argument(one, "seed"), [pair[:1] for pair in pairs if isinstance(pair, list)]]
        return batches, {(i.get("step"), i.get("tokens")): i["loss"] for i in found}

    batches, losses = first(run)
    for other in earlier:
        same, others = first(other)
        both = losses.keys() & others.keys()  # a save between makes an interval of its own
        if both and same == batches:
            most = max(abs(losses[key] - others[key]) for key in both)
            return f"{most:.1e} from {other['name']}"
    return "no earlier rung has these batches" if losses else MISSING


def rungs(runs):
    numbered = all(run["folder"].name[0].isdigit() for run in runs)
    return sorted(runs, key=lambda run: natural(run["folder"].name)) if numbered else runs


def ladder_table(runs):
    runs, rows = rungs(runs), []
    for place, run in enumerate(runs):
        before, speeds = runs[max(place - 1, 0)], windows(run)
        around = f" ({number(min(speeds))} to {number(max(speeds))})" if len(speeds) > 1 else ""
        row = {"rung": run["name"], "what changed": ", ".join(differences(run, before)[1]) or "-"}
        row |= {"tokens/s": number(speed(run)) + around}
        row |= {"all steady steps": shown(run, "tokens/s")}
        row |= {"over the first": speed_up(run, runs[0])}
        row |= {"over the one before": speed_up(run, before)}
        columns = ("MFU", "peak GiB a rank", "padding", "warm-up s")
        row |= {name: shown(run, name) for name in columns}
        row |= {"loss differs by": loss_agreement(run, runs[:place])}
        rows.append(row | {"F1": shown(run, "F1")})
    before = f"""Real tokens/s: the median of three windows of the steady steps (least to most), and over
    all of them, which the ratios take: a window of few steps may miss a long batch. Loss: the
    largest difference over the first {FIRST_LOSSES} log intervals."""
    return table(conditions(runs, before), rows)


def scaling_groups(runs):
    """{(rule, shape): runs}. The folder's name says strong or growing; without, the batch does."""
    least = min((argument(run, "batch_size") or 0) for run in runs)
    groups = collections.defaultdict(list)
    for run in sorted(runs, key=lambda run: (ranks(run), shape(run))):
        named = re.match(r"strong|growing", run["folder"].name)
        by_batch = "growing" if (argument(run, "batch_size") or 0) > least else "strong"
        groups[named.group() if named else by_batch, shape(run)].append(run)
    return dict(sorted(groups.items(), key=lambda group: group[0][0] == "growing"))


def mean_speed(runs):
    values = [get(run, "tokens_per_second") for run in runs if get(run, "tokens_per_second")]
    return statistics.mean(values) if values else None


def single(groups, rule, run):
    """Tokens/s of the 1x1 runs with the same batch (strong), or the same batch a rank (growing)."""
    batch = (argument(run, "batch_size") or 0) / (ranks(run) if rule == "growing" else 1)
    for (_, grid), (other, *more) in groups.items():
        forbids = [d for d in differences(run, other)[0] if not d.startswith("batch")]
        if grid == "1x1" and argument(other, "batch_size") == batch and not forbids:
            return mean_speed([other, *more])
    return None


def exposed(run):
    return (run["timings"]["phases"].get("exposed_communication") or {}).get("share")


def scaling_table(runs):
    groups, rows = scaling_groups(runs), []
    for (rule, grid), group in groups.items():
        n, ours, base = ranks(group[0]), mean_speed(group), single(groups, rule, group[0])
        gain = ours / base if ours and base else None
        links = [get(run, "all_reduce") or {} for run in group]
        between = {"exposed communication": spread(map(exposed, group), percent)}
        between["all-reduce GB/s"] = spread(link.get("gigabytes_per_second") for link in links)
        between["link"] = together(link.get("link") for link in links)
        row = {"batch rule": rule, "nodes x ranks": grid}
        row |= {"batch": together(argument(run, "batch_size") for run in group), "runs": len(group)}
        row |= {name: shown(group, name) for name in ("epoch s", "tokens/s")}
        row |= {"tokens/s a rank": ours / n if ours else None}
        row |= {"speed-up": f"{gain:.2f}" if gain else "no 1x1 to compare with"}
        row |= {"efficiency": percent(gain / n if gain else None)}
        row |= between if n > 1 else dict.fromkeys(between, "-")
        rows.append(row | {"F1": shown(group, "F1")})
    before = """Mean ± standard deviation of the repeats. Strong: 1x1's global batch, the same
    training. Growing: 1x1's batch on each rank: the batch differs from row to row, and F1 with it."""
    return table(conditions(runs, before), rows)


def strategies_table(runs):
    # bytes a parameter: fp32 weights and gradients, 4 each, and Adam's two moments
    formula, rows = {"zero1": lambda n: 8 + 8 / n, "fsdp": lambda n: 16 / n}, []
    for run in runs:
        strategy, count = argument(run, "strategy") or "one rank", get(run, "parameters")
        states = formula.get(strategy, lambda n: 16)(ranks(run)) * (count or 0) / 2**30
        row = {"strategy": strategy}
        row |= {name: shown(run, name) for name in ("run", "nodes x ranks", "epoch s", "tokens/s")}
        row |= {"over the first": speed_up(run, runs[0])}
        row |= {"exposed communication": percent(exposed(run))}
        row |= {"states by formula, GiB a rank": states or None}
        rows.append(row | {name: shown(run, name) for name in ("peak GiB a rank", "F1")})
    before = """States: weights, gradients and Adam's moments in fp32, computed, not measured; the peak
    is measured, with activations and buffers in it."""
    return table(conditions(runs, before), rows)


def speed_up_table(runs):
    rows, first = [], min(runs, key=ranks)
    for run in runs:
        if run is not first:
            row = {"run": run["name"], f"speed-up over {first['name']}": speed_up(run, first)}
            changed = ", ".join(differences(run, first)[1])
            row |= {"what changed": changed or "nothing that changes speed"}
            row |= {"F1": shown(run, "F1"), f"F1 of {first['name']}": shown(first, "F1")}
            rows.append(row)
    return table(conditions(runs, "By real tokens/s in the steady state."), rows)


def phase_rows(runs):
    """(run or rank, {phase: (seconds a step, share)}): the run's own, then each rank's by its trace."""
    for run in runs:
        own, traces, before, steps = run["timings"]["phases"], read_traces(run), 0, 0
        for one in run["timings"]["intervals"]:
            steps += (one["step"] - before) * bool(one.get("steady"))
            before = one["step"]
        seconds = sum(steady(run, "seconds")) / steps if steps else None
        shares = {name: own[name].get("share") for name in PHASES if name in own}
        if own:
            yield run["name"], {n: (seconds and s and seconds * s, s) for n, s in shares.items()}
        for rank, trace in traces.items() if len(traces) > 1 or not own else ():
            yield f"{run['name']}, rank {rank} (trace)", trace["phases"]


def phases_table(runs):
    found, rows, beside = list(phase_rows(runs)), [], []
    for name, phases in found:
        rows.append({"run": name})
        for phase in (phase for phase in PHASES if any(phase in one for _, one in found)):
            seconds, share = phases.get(phase, (None, None))
            text = f"{number(1000 * seconds)} ms, " if seconds else ""
            rows[-1][phase.replace("_", " ")] = text + percent(share)
    for run in runs:
        others = {n: p for n, p in run["timings"]["phases"].items() if n not in PHASES}
        times = (f"{n} {number(p['seconds'])} s ({percent(p['share'])})" for n, p in others.items())
        beside += [f"Beside the steps of {run['name']}: {', '.join(times)}."] if others else []
    before = "A step in the steady state (by trace: with the profiler on): time, and share of it."
    return "\n\n".join([table(conditions(runs, before), rows), *beside])


def environment_table(runs):
    fields = {"finished": [get(run, "finished_at") for run in runs]}
    fields["command"] = [f"`{get(run, 'command') or MISSING}`" for run in runs]
    for key in dict.fromkeys(itertools.chain(*(run["results"]["environment"] for run in runs))):
        fields[key.replace("_", " ")] = [listed(environment(run, key)) or "-" for run in runs]
    names = [run["name"] for run in runs]
    if len(runs) > 4:  # too wide a table: what they have in common, or how many differ
        names, fields = ["all runs"], {k: [together(map(cell, v))] for k, v in fields.items()}
    rows = [{"": field} | dict(zip(names, values)) for field, values in fields.items()]
    return table("The machine, the versions and the command of each run.", rows)


# 5. Traces


def spans(flat):
    """array of start, length, name, start, ... -> starts, ends, names, sorted, the outer one first."""
    rows = np.frombuffer(flat).reshape(-1, 3) if flat else np.empty((0, 3))
    rows = rows[np.lexsort((-rows[:, 1], rows[:, 0]))]
    return rows[:, 0], rows[:, 0] + rows[:, 1], rows[:, 2].astype(int)


def union(starts, ends):
    """Intervals that overlap -> separate ones, rows of [start, end]."""
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.ones(len(starts), bool)
    first[1:] = starts[1:] > reach[:-1]
    return np.stack([starts[first], reach[np.roll(first, -1)]], axis=1)


def within(starts, ends, begin, end):
    return np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None)


def self_spans(starts, ends, names):
    """Nested spans of one thread -> spans of what each spent itself, its children's time out."""
    out, stack, now = array("d"), [], 0.0

    def leave(until):  # the events that have ended by then
        nonlocal now
        while stack and stack[-1][0] <= until:
            end, name = stack.pop()
            out.extend((now, max(end - now, 0), name))
            now = max(end, now)

    for start, end, name in zip(starts.tolist(), ends.tolist(), names.tolist()):
        leave(start)
        if stack:
            out.extend((now, max(start - now, 0), stack[-1][1]))
        stack.append((end, name))
        now = start
    leave(math.inf)
    return spans(out)


COMMUNICATION = re.compile(r"nccl|gloo:|mpi:", re.IGNORECASE)  # kernels; gloo's own threads
HANDING_OVER = re.compile(r"_?c10d")  # the host's side of it, which computes nothing


def read_trace(path):
    """What one rank did in its profiled steps: shares, self times a step, phases, largest gaps."""
    names, computes, annotations, steps = {}, set(), set(), []
    kernels, launched, operators, talk, ranges = (array("d") for _ in range(5))
    threads = collections.defaultdict(lambda: array("d"))
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        events = json.load(file)["traceEvents"]
    for event in (event for event in events if event.get("ph") == "X"):
        kind, name, start, length = (event.get(key) for key in ("cat", "name", "ts", "dur"))
        key = names.setdefault(name, len(names))
        span = (float(start), float(length), key)
        link = event.get("args", {}).get("External id", -1)
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            talks = COMMUNICATION.match(name)
            (talk if talks else kernels).extend(span)
            launched.extend(() if talks else (link, key))
        elif kind == "user_annotation" and name.startswith("ProfilerStep#"):
            steps.append((span[0], span[0] + span[1], name))
        elif kind == "user_annotation" and COMMUNICATION.match(name):
            talk.extend(span if name.startswith("gloo:") else ())
        elif kind in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[event.get("tid")].extend(span)
            if kind == "cpu_op":
                operators.extend((link, key, span[0]))
                computes |= set() if HANDING_OVER.match(name) else {key}
            elif kind == "user_annotation":
                annotations.add(key)
                ranges.extend(span if name in PHASES else ())
    if not steps:
        raise ValueError("no ProfilerStep in it")
    names, steps = list(names), sorted(steps)
    host = [self_spans(*spans(flat)) for flat in threads.values()]
    begin, end = steps[0][0], steps[-1][1]
    phases = np.zeros(len(PHASES))  # microseconds
    starts, ends, keys = ranges = spans(ranges)
    if kernels:  # the host runs ahead of the device, whose steps are its first to its last kernel
        *rows, launches = by_operator(names, kernels, launched, operators)
        kept = rows[0] >= begin
        work = [tuple(column[kept] for column in rows)]
        begin, end = work[0][0].min(), work[0][1].max()
        # a kernel is of the phase that launched it
        for start, stop, key in zip(starts, ends, keys):
            inside = kept & (launches >= start) & (launches < stop)
            phases[PHASES.index(names[key])] += (rows[1] - rows[0])[inside].sum()
    else:
        counts = np.isin(np.arange(len(names)), list(computes))
        work = [tuple(column[counts[rows[2]]] for column in rows) for rows in host]
        for start, stop, key in zip(starts, ends, keys):
            phases[PHASES.index(names[key])] += stop - start
    busy = union(*(np.concatenate(column) for column in list(zip(*work))[:2]))
    talking = union(*spans(talk)[:2])
    either = union(*np.concatenate([busy, talking]).T)
    computing, occupied, communication = (
        float(within(*rows.T, begin, end).sum() / (end - begin)) for rows in (busy, either, talking)
    )
    spent = np.zeros(len(names))
    for starts, ends, keys in work:
        spent += np.bincount(keys, within(starts, ends, begin, end), len(names))
    seconds, a_step = (end - begin) / 1e6 / len(steps), 1e-6 / len(steps)
    edges = np.r_[begin, np.clip(either, begin, end).ravel(), end].reshape(-1, 2)
    gaps = sorted(edges[edges[:, 0] < edges[:, 1]].tolist(), key=lambda gap: gap[0] - gap[1])
    place, last = "device" if kernels else "CPU", steps[-1][0]
    rows = {("communication", "communication"): talking, (place, place): busy}
    for name in dict.fromkeys(names[key] for key in ranges[2]):
        chosen = np.array([names[key] == name for key in ranges[2]])
        rows["phases", name] = np.stack(ranges[:2], axis=1)[chosen]
    rows = {kind: np.clip(bars - last, 0, None)[bars[:, 1] > last] for kind, bars in rows.items()}
    line = {kind: np.c_[b[:, 0], b[:, 1] - b[:, 0]] / 1000 for kind, b in rows.items()}
    shares = {"computing": computing, "exposed communication": occupied - computing}
    shares |= {"idle": 1 - occupied, "communication in all": communication}
    told = {"place": place, "line": line, "steps": len(steps), "seconds": seconds} | shares
    return told | {
        "phases": {n: (v * a_step, v * a_step / seconds) for n, v in zip(PHASES, phases) if v},
        "operators": {names[k]: spent[k] * a_step for k in np.flatnonzero(spent)},
        "gaps": [meanwhile(*gap, steps, ranges, host, names, annotations) for gap in gaps[:5]],
    }


def by_operator(names, kernels, launched, operators):
    """Kernels by the operator that launched them (compiled ones by their own name), and when."""
    operators = np.frombuffer(operators).reshape(-1, 3) if operators else np.full((1, 3), np.nan)
    operators = operators[np.argsort(operators[:, 0], kind="stable")]
    links, own = np.frombuffer(launched).reshape(-1, 2).T
    place = np.minimum(np.searchsorted(operators[:, 0], links), len(operators) - 1)
    found = (operators[place, 0] == links) & (links >= 0)
    compiled = np.array([name.startswith("triton") for name in names])[own.astype(int)]
    rows = np.frombuffer(kernels).reshape(-1, 3)
    keys = np.where(found & ~compiled, operators[place, 1], own).astype(int)
    return rows[:, 0], rows[:, 0] + rows[:, 1], keys, np.where(found, operators[place, 2], np.nan)


def meanwhile(begin, end, steps, ranges, host, names, annotations):
    """A gap -> its milliseconds, step, phase, and what the host spent most of it on."""
    step = next((name for start, stop, name in steps if start <= begin < stop), "after the steps")
    phase, did, idle = collections.Counter(), collections.Counter(), "Python, no operator"
    for start, stop, key in zip(*ranges):
        phase[names[key]] += max(0, min(stop, end) - max(start, begin))
    for starts, ends, keys in host:
        inside = slice(np.searchsorted(ends, begin, "right"), np.searchsorted(starts, end))
        for key, one in zip(keys[inside], within(starts[inside], ends[inside], begin, end)):
            did[idle if key in annotations else names[key]] += one
    did[idle] += max(0, end - begin - did.total())
    most = [(name, one) for name, one in did.most_common(2) if one > (end - begin) / 10]
    most = [f"{name} {number(one / 1000)} ms" for name, one in most]
    [(phase, inside)] = phase.most_common(1) or [("", 0)]
    phase = phase if inside else "between phases"
    gap = {"ms": (end - begin) / 1000, "step": step, "phase": phase}
    return gap | {"what the host did in it": ", ".join(most)}


def read_traces(run):
    """{rank: what its trace tells}; of several lives of a run the last one's."""
    if "traces" not in run:
        newest, files = {}, (run["folder"] / "tensorboard").glob("*.pt.trace.json.gz")
        for path in sorted(files, key=natural):
            named = re.search(r"rank(\d+)", path.name)
            newest[int(named[1]) if named else 0] = path
        for rank, path in newest.items():
            if path.stat().st_size > 5e6:
                print(f"reading {path.name}, {path.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
            try:
                newest[rank] = read_trace(path)
            except (OSError, EOFError, zlib.error, *ODD) as error:
                fault(f"{path}: cannot be read as a trace ({error}): delete it, or run again")
        run["traces"] = dict(sorted(newest.items()))
    return run["traces"]


def trace_table(runs):
    parts = []
    for run in runs:
        traces = read_traces(run)
        if not traces:
            parts.append(f"{run['name']}: no trace in its tensorboard folder, so {MISSING}.")
            continue
        first, seconds = next(iter(traces.values())), sum(t["seconds"] for t in traces.values())
        where = f"in {first['steps']} profiled steps of {run['name']} (the profiler slows them)."
        rows, gaps, total = [], [], collections.Counter()
        for rank, trace in traces.items():
            row = {"rank": str(rank), "ms a step": 1000 * trace["seconds"]}
            names = ("computing", "exposed communication", "idle", "communication in all")
            rows.append(row | {name: percent(trace[name]) for name in names})
            kept = 5 if len(traces) == 1 else 2
            gaps += [{"rank": str(rank)} | gap for gap in trace["gaps"][:kept]]
            total.update(trace["operators"])
        parts.append(table(conditions([run], f"What the {first['place']} did {where}"), rows))
        rows = []
        for name, all_ranks in total.most_common(10):
            short = name.removeprefix("autograd::engine::evaluate_function: ")[:60]
            row = {"operator": f"`{short}`", "share of the step": percent(all_ranks / seconds)}
            times = {f"rank {r}, ms": 1000 * t["operators"].get(name, 0) for r, t in traces.items()}
            if len(times) > 4:
                ms = list(times.values())
                times = {"least, ms": min(ms), "mean, ms": statistics.mean(ms), "most, ms": max(ms)}
            rows.append(row | times)
        before = f"The ten operators of most self time on the {first['place']}, a step, {where}"
        parts.append(table(conditions([run], before), rows))
        before = f"The largest gaps, with neither computing nor communication, {where}"
        parts.append(table(conditions([run], before), gaps))
    return "\n\n".join(parts)


# 6. Charts, in the mermaid that GitHub draws


def speed_chart(runs):
    title = "Real tokens a second, all steady steps"
    speeds = {run["name"]: mean_speed([run]) for run in runs if mean_speed([run])}
    bars = ("bar", list(speeds.values()))
    return xychart(title, list(speeds), "tokens/s", bars) if speeds else f"{title}: {MISSING}."


def scaling_chart(runs):
    groups, charts = scaling_groups(runs), []
    for rule in ("strong", "growing"):
        points = []
        for (_, grid), group in ((key, group) for key, group in groups.items() if key[0] == rule):
            ours, base = mean_speed(group), single(groups, rule, group[0])
            points += [(grid, ours, base * ranks(group[0]))] if ours and base else []
        if points:
            grids, ours, ideal = zip(*points)
            title = f"{rule}: tokens a second (bars), and 1x1's times the ranks (line)"
            charts.append(xychart(title, grids, "tokens/s", ("bar", ours), ("line", ideal)))
    return "\n\n".join(charts) or f"Scaling: no 1x1 to compare with, so {MISSING}."


def phases_chart(runs):
    charts = []
    for name, phases in phase_rows(runs):
        slices = {phase: s for phase, (_, s) in phases.items() if is_number(s) and s > 0}
        if slices:
            slices["the rest"] = max(1 - sum(slices.values()), 1e-4)  # mermaid takes no zero
            lines = [f'    "{n.replace("_", " ")}" : {100 * s:.2f}' for n, s in slices.items()]
            colours = {f"pie{n}": COLOURS[name] for n, name in enumerate(slices, 1)}
            title = f"    title {label(name)}: percent of a step"
            charts.append(mermaid({"themeVariables": colours}, "pie showData", title, *lines))
    return "\n\n".join(charts) or f"Phases: {MISSING}."


def tokens_chart(runs):
    charts = []
    for run in runs:
        pairs = run["timings"]["tokens_per_step"][:60]
        if len(pairs) > 1:
            real, computed = zip(*pairs)
            title = f"{run['name']}: tokens a step, computed (blue) and real (red)"
            charts.append(xychart(title, len(pairs), "tokens", ("line", computed), ("line", real)))
    return "\n\n".join(charts) or f"Tokens a step: {MISSING}."


# 7. A measurement's own table: {"title", "conditions", "columns", "rows", "environment"}, or several


def measured_table(name):
    path, parts = pathlib.Path(name), []
    if not path.is_file():
        fault(f"{path}: no such file; give the JSON that the measuring script wrote")
    found = read_json(path, (dict, list))
    for one in found if isinstance(found, list) else [found]:
        try:
            columns, where = list(map(cell, one["columns"])), one.get("environment") or {}
            rows = [dict(zip(columns, row, strict=True)) for row in one["rows"]]
        except ODD:
            form = '{"title", "conditions", "columns": [...], "rows": [[...]]}'
            fault(f"{path}: wants {form}, each row of as many cells as columns")
        where = where if isinstance(where, dict) else {"environment": where}
        where = [f"{k.replace('_', ' ')} {listed(v)}" for k, v in where.items() if v is not None]
        caption = "; ".join(filter(None, [listed(one.get("conditions")), *where]))
        parts += [f"**{cell(one.get('title') or path.stem)}**"]
        parts += [table(caption + "." if caption else f"Conditions {MISSING}.", rows)]
    return "\n\n".join(parts)


# 8. The whole report


def report(runs):
    parts = ["# Report", "## Environment", environment_table(runs)]
    for title in ("times", "throughput", "answers"):
        parts += [f"## {title.capitalize()}", TABLES[title](runs)]
    ladder, scaling = r"\d+-", r"(strong|growing)-\d+x\d+"

    def named(pattern):
        return [run for run in runs if re.match(pattern, run["folder"].name)]

    groups, others = (
        {"ladder": named(ladder), "scaling": named(scaling)},
        named(f"(?!{ladder}|{scaling})"),
    )
    trained = [run for run in others if argument(run, "strategy")]
    groups["strategies"] = (
        trained if len({argument(run, "strategy") for run in trained}) > 1 else []
    )
    groups["seeds"] = others if len({argument(run, "seed") for run in others}) > 1 else []
    groups["speed-up"] = others if not groups["strategies"] + groups["seeds"] else []
    for title, chosen in groups.items():
        if len(chosen) > 1:
            parts += [f"## {title.capitalize()}", TABLES[title](chosen)]
            parts += [CHARTS.get(title, speed_chart)(chosen)]
    parts += ["## Phases", phases_table(runs), *([phases_chart(runs)] if len(runs) < 3 else [])]
    traced = [run for run in runs if read_traces(run)] if len(runs) < 5 else []
    return "\n\n".join(parts + (["## Traces", trace_table(traced)] if traced else []))


# 9. For train.py: the machine at a run's start; the figures, block and TensorBoard at its end


def told_by(*command):
    how = {"capture_output": True, "text": True, "cwd": pathlib.Path(__file__).parent}
    try:
        done = subprocess.run(command, check=False, timeout=20, **how)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


THROTTLES = ["idle", "application clocks", "power cap", "hardware slowdown", "sync boost"]
THROTTLES += ["software thermal", "hardware thermal", "power brake", "display clocks"]


def gpus():
    """The state of each GPU that this node's ranks use."""
    fields = ["name", "driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem"]
    fields += ["temperature.gpu", "clocks_throttle_reasons.active"]

    def query(*fields):
        told = told_by("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
        return [row.split(", ") for row in told.splitlines()]

    ids = ("index", "uuid")  # it answers nothing where it lacks one field: then without the last
    rows = query(*ids, *fields) or query(*ids, *fields[:-1])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # by index, or by the UUID's beginning
        asked = [one for one in visible.split(",") if one]
        rows = [r for one in asked for r in rows if one == r[0] or r[1].startswith(one)]
    count = int(os.environ.get("GPUS_USED") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    found = [dict(zip(fields, row[2:])) for row in rows[:count]]
    for gpu in found:
        bits = re.fullmatch("0x([0-9a-fA-F]+)", gpu.pop(fields[-1], ""))
        names = [n for i, n in enumerate(THROTTLES) if bits and int(bits[1], 16) >> i & 1]
        gpu["throttled by"] = (" and ".join(names) or "nothing") if bits else "not known"
    return found


def machine():
    """What a reader must know of the machine to trust a run's figures."""
    node, state, cpu = os.environ.get("SLURMD_NODENAME"), gpus(), pathlib.Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    cpu = f"CPU {cpu[1] if cpu else ''}".strip()
    several = int(os.environ.get("GROUP_WORLD_SIZE") or 1) > 1  # torchrun's nodes
    hosts = told_by("scontrol", "show", "hostnames").split() if several and node else []
    # Jobs of others may be hidden from squeue; how many CPUs of a node all jobs have is not.
    own_cpus = re.match(r"\d+", os.environ.get("SLURM_JOB_CPUS_PER_NODE") or "")
    told = told_by("scontrol", "show", "node", node) if node else ""
    cpus = re.search(r"CPUAlloc=(\d+)", told)
    found = {"commit": told_by("git", "rev-parse", "HEAD") or None}
    # New files change no run: SLURM's logs, a report.md.
    found["dirty"] = bool(told_by("git", "status", "--porcelain", "-uno", "--", ".."))
    found["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    found["hosts"] = hosts or [socket.gethostname()]
    found |= {"devices": [gpu["name"] for gpu in state] or [cpu], "cpu": cpu, "gpu": state}
    own = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    found |= {"cores": len(own), "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "datasets", "tokenizers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)  # imports nothing: torch takes seconds
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    torch = importlib.util.find_spec("torch")
    torch = pathlib.Path(torch.origin).with_name("version.py").read_text() if torch else ""
    cuda = re.search(r"^cuda\b.*'(.+)'", torch, re.MULTILINE)
    found |= {"cuda": cuda[1] if cuda else None, "slurm_job_id": os.environ.get("SLURM_JOB_ID")}
    found["restarts"] = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    shared = int(cpus[1]) > int(own_cpus[0]) if cpus and own_cpus else None
    return found | {"node_shared": shared}


# Dense TFLOP/s in bf16, tf32 and fp32, from NVIDIA's data sheets; the first name that fits counts.
PEAKS = {"H100 PCIe": (756, 378, 51), "NVL": (835, 418, 60), "H100": (989, 494, 67)}
PEAKS |= {"H200": (989, 494, 67), "A100": (312, 156, 19.5), "A30": (165, 82, 10.3)}
PEAKS |= {"L40S": (362, 183, 91.6), "L4": (121, 60, 30.3), "V100": (None, None, 15.7)}

COPIED = """exact_match f1 prepare_seconds features_cached evaluate_seconds total_seconds peak_memory_gib
    train_features world_size nodes parameters arguments resumed_from_steps repeated_steps
    scorer"""
KEPT = ("step", "loss", "learning_rate", "gradient_norm", "seconds", "tokens", "steady")


def derive(record):
    """train.py's raw record of a run -> what goes into results.json and into timings.json."""
    intervals, settings, ended = record["intervals"], record["arguments"], machine()
    steady = [one for one in intervals if one["steady"]]

    def total(field, chosen=steady):
        return sum(one[field] for one in chosen)

    def a_second(amount):
        return amount / seconds if seconds else None

    found = ended | record["environment"]
    found |= {"gpu_before": found.pop("gpu"), "gpu_after": ended["gpu"]}
    if settings["device_type"] == "cpu":  # whatever GPU the machine has
        found |= {"devices": [found["cpu"]], "gpu_before": [], "gpu_after": []}
    elif found["devices"] == [found["cpu"]]:  # a slice of a GPU, say
        found["devices"] = ["GPU that nvidia-smi does not name"]
    real, computed = record.get("tokens_per_step", []), record.get("computed_per_step", [])
    seconds, tokens, an_epoch = total("seconds"), total("tokens"), record.get("steps_an_epoch", 1)
    each = [0.0] * -(-record["step"] // an_epoch)
    for one in intervals:  # one that spans two epochs is shared out by its steps
        for step in range(one["step"] - one["steps"], one["step"]):
            each[step // an_epoch] += one["wall_seconds"] / one["steps"]
    # Two FLOPs a multiply-add, once forward and twice backward (Kaplan et al. 2020, section 2.1);
    # attention 4 x hidden size x length^2 a layer forward. Embeddings do not count.
    flops = 12 * record["layers"] * record["hidden_size"] * total("squares")
    flops = a_second(6 * record["matrix_weights"] * tokens + flops)
    names = [name for name in PEAKS if re.search(rf"\b{name}\b", found["devices"][0])]
    column = ("bf16", "tf32", "fp32").index(settings["precision"])
    peak = PEAKS[names[0]][column] if names and flops else None
    results = {name: record[name] for name in COPIED.split()} | {"environment": found}
    results |= {"all_reduce": record["all_reduce"]} if record.get("all_reduce") else {}
    results |= {"tokens_per_second": a_second(tokens), "flops_per_second": flops}
    results |= {"features_per_second": a_second(total("features")), "epoch_seconds": each}
    cards = max(record["world_size"], len(found["devices"]))  # dp: one rank, several GPUs
    usage = flops / cards / peak / 1e12 if peak else None
    results["model_flops_utilization"] = usage
    results["steady_epoch_seconds"] = record["train_tokens"] * seconds / tokens if tokens else None
    results["train_seconds"] = total("wall_seconds", intervals)
    results["warmup_seconds"] = total("seconds", [one for one in intervals if one["warmup"]])
    results["padding_share"] = 1 - sum(real) / sum(computed) if computed else None
    results |= {"steps": record["step"], "restarts": found["restarts"], "paper": PAPER}
    results |= {"command": shlex.join(map(str, record["command"])), "finished_at": ended["date"]}
    chosen, spent = steady or intervals, {}  # phase: (seconds, of how many)
    for name in chosen[0]["phases"] if chosen else ():
        spent[name] = total(name, [one["phases"] for one in chosen]), total("seconds", chosen)
    spent |= {name: (None, None) for name in record.get("phases_override", {})}
    spent |= {name: (value, results["train_seconds"]) for name, value in record["beside"].items()}
    phases = {n: {"seconds": s, "share": s / of if of else None} for n, (s, of) in spent.items()}
    timings = {"phases": phases, "intervals": [{k: one[k] for k in KEPT} for one in intervals]}
    timings |= {"operators": record["operators"]}
    timings |= {"tokens_per_step": [list(pair) for pair in zip(real, computed)][:200]}
    return results, timings | ({"ranks": record["ranks"]} if record.get("ranks") else {})


def block(run):
    """The lines at the end of a log that go into a report."""
    phases = {n.replace("_", " "): one["share"] for n, one in run["timings"]["phases"].items()}
    here, reason = {name: shown(run, name) for name in RESULTS}, paper(run)
    last = " (all of the last start)" if get(run, "resumed_from_steps") else ""
    peak = f"{here['MFU']} of the device's peak" if value(run, "MFU") else "device's peak not known"
    lines = {
        "run": f"{run['folder']}, commit {commit(run)}",
        "device": f"{ranks(run)} x {device(run)}, torch {environment(run, 'torch')}, {here['settings']}",
        "an epoch": f"{here['epoch s']} s at the steady state's {here['tokens/s']} real tokens/s, {here['features/s']} features/s",
        "training": f"{here['training s']} s, {here['steps']} steps; of them warm-up {here['warm-up s']} s",
        "beside it": f"preparing {here['preparing s']} s, evaluating {here['evaluating s']} s; in all {here['in all s']} s{last}",
        "padding": f"{here['padding']} of the tokens computed",
        "utilisation": f"{peak}; memory {here['peak GiB a rank']} GiB at most",
        "phases": ", ".join(f"{name} {percent(share)}" for name, share in phases.items()),
        "exact match, F1": f"{here['EM']}, {here['F1']} ({here['scorer']} scorer)",
        "in BERT's paper": PAPERS + (f"; {reason}" if reason != PAPERS else ""),
        "look": f"tensorboard --logdir {shlex.quote(str(run['folder'].parent))}",
    }
    if re.search(r"(?<!un)cased", model(run).lower()):
        lines["cased"] = (
            "the model is cased: its figures are not those of the uncased one, the usual one"
        )
    elif reason == PAPERS and (get(run, "f1") or 0) < 87:
        lines["low"] = "F1 is under 87: are the learning rate, the batch or the epochs unusual?"
    return "\n".join([f"{name:17}{text}" for name, text in lines.items()])


def time_line(run):
    """A figure of the last profiled step: for each rank its phases, its work, its communication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars, rows = (
        {},
        ("phases", "communication"),
    )  # (rank, row, colour's name): [(begin, length)], ms
    for rank, trace in read_traces(run).items():
        found = ((row, kind, pairs) for (row, kind), pairs in trace["line"].items() if len(pairs))
        bars |= {(rank, row if row in rows else "work", kind): pairs for row, kind, pairs in found}
    ranks = list(dict.fromkeys(rank for rank, _, _ in bars))
    height = max(len({row for one, row, _ in bars if one == rank}) for rank in ranks)
    figure, axes = pyplot.subplots(figsize=(7.5, 1.6 + 0.75 * len(ranks)), layout="constrained")
    for (
        rank,
        row,
        kind,
    ), pairs in bars.items():  # small, so that TensorBoard's small card is legible
        place = ranks.index(rank) * (height + 1) + ["phases", "work", "communication"].index(row)
        axes.broken_barh(pairs, (place - 0.45, 0.9), facecolors=COLOURS[kind])
    for kind in dict.fromkeys(kind for _, _, kind in bars):
        axes.plot([], [], color=COLOURS[kind], linewidth=9, label=kind)
    middles = [place * (height + 1) + (height - 1) / 2 for place in range(len(ranks))]
    axes.set_yticks(middles, [f"rank {rank}" for rank in ranks], fontsize=13)
    axes.tick_params(axis="x", labelsize=13)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds from the step's start", fontsize=13)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=13)
    return figure


OVERVIEW = {"loss": "training/loss", "real tokens a second": "speed/tokens_per_second"}
OVERVIEW |= {"share of the step": "phases/.*", "learning rate": "training/learning_rate"}
OVERVIEW |= {"gradient norm": "training/gradient_norm", "memory, GiB": "speed/peak_memory_gib"}
APART = {
    name.replace("_", " "): f"phases/{name}" for name in PHASES
}  # for several runs side by side
BOARD = {"overview": OVERVIEW, "shares of the step, each phase": APART}
SHOWN = "batch_size batching compile learning_rate precision seed strategy"  # a table that fits


def write_board(run, record):
    """All of TensorBoard's events at once, so that no curve of a resumed run is there twice."""
    from torch.utils.tensorboard import SummaryWriter

    for earlier in (run["folder"] / "tensorboard").glob("events.out.tfevents.*"):
        earlier.unlink()  # of an end that failed
    with SummaryWriter(run["folder"] / "tensorboard") as writer:
        writer.add_custom_scalars(
            {
                tab: {question: ["Multiline", [tag]] for question, tag in charts.items()}
                for tab, charts in BOARD.items()
            }
        )
        for one in record["intervals"]:
            values = {f"training/{n}": one[n] for n in ("loss", "learning_rate", "gradient_norm")}
            values["speed/tokens_per_second"] = one["tokens"] / one["seconds"]
            values["speed/peak_memory_gib"] = one["memory_gib"]
            values |= {f"phases/{name}": s / one["seconds"] for name, s in one["phases"].items()}
            for name in values.keys() - {f"phases/{n}" for n in record.get("phases_override", {})}:
                writer.add_scalar(name, values[name], one["step"])
        scores = ("exact_match", "f1", "steady_epoch_seconds", "train_seconds")
        scores = {f"result/{name}": get(run, name) for name in scores if is_number(get(run, name))}
        settings = {"nodes x ranks": shape(run)}
        settings |= {name: argument(run, name) for name in SHOWN.split()}
        settings = {n: one for n, one in settings.items() if isinstance(one, (str, int, float))}
        writer.add_hparams(settings, scores, run_name=".")  # a name of its own would be a run more
        names = ("environment", "times", "throughput", "answers", "phases")
        texts = {name: TABLES[name]([run]) for name in names} | {"traces": trace_table([run])}
        texts["operators"] = f"```\n{run['timings']['operators'] or MISSING}\n```"
        for name, text in texts.items():
            writer.add_text(name, text)
        if read_traces(run):
            writer.add_figure("one profiled step", time_line(run))


def write_whole(path, content):
    """Under another name, then renamed: what is there is whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def normalise(text):
    """The official scorer's words: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def score(predictions, texts):
    """Returns exact_match and f1 in percent, and whose scorer said so: evaluate's squad metric if
    it is in the cache, else our own. Both are SQuAD v1.1's official one (Rajpurkar et al. 2016)."""
    gold = {i: [text for _, text in answers] for i, answers in zip(texts["ids"], texts["answers"])}
    home = pathlib.Path(os.environ.get("HF_HOME") or pathlib.Path.home() / ".cache/huggingface")
    home = pathlib.Path(os.environ.get("HF_MODULES_CACHE") or home / "modules")
    if (home / "evaluate_modules/metrics/evaluate-metric--squad").is_dir():
        os.environ["HF_EVALUATE_OFFLINE"] = "1"
        try:
            import evaluate

            evaluate.logging.set_verbosity_error()
            told = [{"id": i, "prediction_text": predictions[i]} for i in gold]
            right = [{"text": gold[i], "answer_start": [0] * len(gold[i])} for i in gold]
            right = [{"id": i, "answers": answers} for i, answers in zip(gold, right)]
            scores = evaluate.load("squad").compute(predictions=told, references=right)
            return {name: float(scores[name]) for name in PAPER} | {"scorer": "evaluate"}
        except Exception as error:  # noqa: BLE001 a broken cache must not cost a run its score
            print(f"evaluate's squad metric does not load ({type(error).__name__}): using our own")
    exact = f1 = 0.0
    for name, answers in gold.items():
        said, best = normalise(predictions[name]), 0.0
        for words in map(normalise, answers):
            same = sum((collections.Counter(said) & collections.Counter(words)).values())
            best = max(best, 2 * same / (len(said) + len(words)) if same else 0.0)
        exact += any(said == normalise(answer) for answer in answers)
        f1 += best
    return {"exact_match": 100 * exact / len(gold), "f1": 100 * f1 / len(gold), "scorer": "own"}


def measure_model(folder):
    """Returns layers, hidden size, parameters, and the weights of the encoder's and head's matrices."""
    config = json.loads((folder / "config.json").read_text())
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    with open(folder / "model.safetensors", "rb") as file:  # 8 bytes of length, then JSON
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = {name: one["shape"] for name, one in header.items() if name != "__metadata__"}
    matrices = [s for name, s in shapes.items() if len(s) == 2 and "embeddings." not in name]
    found = {"layers": layers, "hidden_size": config.get("hidden_size", config.get("dim"))}
    found["parameters"] = sum(math.prod(shape) for shape in shapes.values())
    return found | {"matrix_weights": sum(math.prod(shape) for shape in matrices)}


def finish(folder):
    """From train.py's raw record: TensorBoard, timings.json, the block and, last, results.json."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # told to stop: it ends in seconds anyway
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        record, folder = json.load(sys.stdin), pathlib.Path(folder)
        if os.environ.get("ALL_REDUCE"):  # DISTRIBUTED/all_reduce.py's, from before the training
            record["all_reduce"] = json.loads(os.environ["ALL_REDUCE"])
        if record["arguments"].get("strategy") == "fsdp":  # it hands over no buckets: traces tell
            record["phases_override"] = {"exposed_communication": None}
        if "predictions" in record:
            write_whole(folder / "predictions.json", record["predictions"])
            record |= score(record.pop("predictions"), record.pop("texts"))
            record |= measure_model(folder / "model")
        results, timings = derive(record)
        run = load_run(folder, results, timings)
        try:
            traces = read_traces(run)
        except SystemExit:  # it has said which cannot be read: no reason to lose the results
            run["traces"] = traces = {}
        talked = [trace for trace in traces.values() if trace["communication in all"]]
        if "exposed_communication" in record.get("phases_override", {}) and talked:
            share = statistics.mean(trace["exposed communication"] for trace in talked)
            spent = share * sum(steady(run, "seconds"))  # fsdp hands over no buckets: traces tell
            timings["phases"]["exposed_communication"] = {"seconds": spent, "share": share}
        write_board(run, record)
        write_whole(folder / "timings.json", timings)
        print("\n--- results " + "-" * 60, block(run), "-" * 72, sep="\n", flush=True)
        write_whole(folder / "results.json", results)
    except Exception as error:  # noqa: BLE001 whatever it was: one line, and no results.json
        fault(f"--finish {folder}: {type(error).__name__}: {' '.join(str(error).split())}")


CHARTS = {"runs": speed_chart, "scaling": scaling_chart, "phases": phases_chart}
CHARTS |= {"tokens": tokens_chart, "ladder": lambda runs: speed_chart(rungs(runs))}
PLAIN = {  # caption, then the columns
    "runs": "A row a run.|run|nodes x ranks|settings|batch|epoch s|training s|tokens/s|MFU|padding|peak GiB a rank|EM|F1",
    "times": "Seconds; the first is the headline, an epoch's real tokens at the steady tokens/s. Preparing, evaluating and in all: of the last start.|run|epoch s|training s|warm-up s|preparing s|evaluating s|in all s|each epoch s|features cached|resumed from",
    "throughput": "Steady state: warm-up, the profiler's steps, saves and waits for them are out; real tokens only.|run|tokens/s|features/s|padding|MFU|peak GiB a rank|nodes x ranks|steps",
    "answers": "Percent, on the whole validation file, once, at the end.|run|EM|F1|the BERT paper's EM / F1|scorer",
    "memory": "The most that a rank held; on a CPU all of its process.|run|nodes x ranks|settings|features a rank and pass|parameters|peak GiB a rank",
}
TABLES = {name: plain(*text.split("|")) for name, text in PLAIN.items()}
TABLES |= {"environment": environment_table, "speed-up": speed_up_table, "seeds": seeds_table}
TABLES |= {"ladder": ladder_table, "scaling": scaling_table, "strategies": strategies_table}
TABLES |= {"phases": phases_table, "trace": trace_table}
MEASURED = ["bench", "growth", "faults", "seeds-paired", "measured"]


def main():
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders that train.py left")
    names = f"{', '.join(TABLES)}; for FILE.json {', '.join(MEASURED)}"
    parser.add_argument("--table", choices=[*TABLES, *MEASURED], metavar="NAME", help=names)
    parser.add_argument("--chart", choices=CHARTS, metavar="NAME", help=", ".join(CHARTS))
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)  # train.py's
    parser.add_argument("--finish", metavar="RUN", help=argparse.SUPPRESS)  # likewise
    parser.error = fault
    options = parser.parse_args()
    if options.environment:
        return print(json.dumps(machine()))
    if options.finish:
        return finish(options.finish)
    if not options.runs:
        fault("no RUN: give the folder of a finished run")
    try:
        if options.table in MEASURED:
            return print("\n\n".join(map(measured_table, options.runs)))
        runs = load_runs(options.runs)
        chosen = [TABLES[options.table](runs)] if options.table else []
        chosen += [CHARTS[options.chart](runs)] if options.chart else []
        print("\n\n".join(chosen) or report(runs))
    except ODD as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        fault(f"{' '.join(options.runs)}: a value is not as train.py writes it ({what})")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()

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
import socket
import statistics
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


def fault(message):
    print(f"report.py: {message}", file=sys.stderr)
    sys.exit(2)


# 1. Runs: folders -> {"name", "folder", "results", "timings"}


def read_json(path, kinds):
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        fault(f"{path}: cannot be read as JSON ({error}): measure again")
    if not isinstance(value, kinds):
        fault(f"{path}: holds a {type(value).__name__}, not an object: measure again")
    return value


def natural(path):  # 2-tf32 before 10-compiled
    return [
        (not p.isdigit(), int(p) if p.isdigit() else p) for p in re.findall(r"\d+|\D+", str(path))
    ]


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
            elif (folder / "checkpoint.pt").exists():
                fault(f"{folder}: not finished (it holds checkpoint.pt): start it again to end it")
            elif inside:
                folders += inside
                for left in {file.parent for file in folder.glob("*/checkpoint.pt")} - {*inside}:
                    print(f"report.py: {left}: not finished, left out", file=sys.stderr)
            else:
                fault(f"{folder}: no results.json in it; give the folder of a finished run")
    return list(dict.fromkeys(folders))


def load_run(folder, results, timings=None):
    """Checks what a run left, as far as the tables count on its form."""
    if timings is None:
        path = folder / "timings.json"
        timings = read_json(path, dict) if path.exists() else {}
    fields = [(results, "arguments", {}), (results, "environment", {}), (timings, "phases", {})]
    fields += [(timings, "intervals", []), (timings, "tokens_per_step", [])]
    for place, field, empty in fields:
        if not isinstance(place.setdefault(field, empty), type(empty)):
            fault(f"{folder}: {field} is not {'an object' if empty == {} else 'a list'}")
    for entry in [*timings["intervals"], *timings["phases"].values()]:
        if not isinstance(entry, dict):
            fault(f"{folder / 'timings.json'}: an interval or a phase is not an object")
    pairs = timings["tokens_per_step"]
    if not all(isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in pairs):
        fault(f"{folder / 'timings.json'}: tokens_per_step is not a list of [real, computed]")
    numbers = [(results, field) for field in RESULTS.values() if isinstance(field, str)]
    numbers += [(results, field) for field in ("world_size", "nodes", "train_features")]
    numbers += [(results["arguments"], field) for field in ("batch_size", "accumulate")]
    for place, field in numbers:
        if place.get(field) is not None and not is_number(place[field]):
            fault(f"{folder / 'results.json'}: {field} is not a number")
    return {"folder": folder, "name": folder.resolve().name, "results": results, "timings": timings}


def load_runs(names):
    runs = [load_run(one, read_json(one / "results.json", dict)) for one in find_runs(names)]
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


def folder_name(run):
    return run["name"].split("/")[-1]


def device(run):
    found = environment(run, "devices")
    names = sorted({str(name) for name in (found if isinstance(found, list) else [found]) if name})
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
    value = environment(run, "commit")
    return (
        f"{str(value)[:10]}{' with changes' * bool(environment(run, 'dirty'))}"
        if value
        else MISSING
    )


def settings(run):
    kinds = [argument(run, name) for name in ("precision", "batching", "strategy")]
    kinds += ["compiled"] if argument(run, "compile") else []
    return ", ".join(str(kind) for kind in kinds if kind) or MISSING


def epochs(run):
    each = get(run, "epoch_seconds")
    each = list(filter(is_number, each)) if isinstance(each, list) else []
    if len(each) > 4:
        return f"{number(min(each))} to {number(max(each))}"
    return ", ".join(map(number, each)) or None


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


def score(value):
    return f"{value:.2f}" if is_number(value) else MISSING


def spread(values, show=number):
    values = [value for value in values if is_number(value)]
    if len(values) < 2:
        return show(values[0] if values else None)
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
    columns = list(rows[0]) if rows else ["nothing to show"]
    body = [columns, ["---"] * len(columns), *(row.values() for row in rows)]
    lines = (f"| {' | '.join(map(cell, row))} |" for row in body)
    return "\n".join([f"*{cell(caption).replace('*', '×')}*", "", *lines])


def together(values):
    values = list(dict.fromkeys(str(MISSING if value is None else value) for value in values))
    return " / ".join(values) if len(values) < 6 else f"({len(values)} different)"


def conditions(runs, before):
    """The caption of a table: what the figures were measured on, and how often."""
    dates = (get(run, "finished_at") or environment(run, "date") or MISSING for run in runs)
    parts = [
        together(map(device, runs)),
        together(argument(run, "precision") or f"precision {MISSING}" for run in runs),
        f"batch {together(argument(run, 'batch_size') for run in runs)}",
        together(map(model, runs)),
        together(map(data, runs)),
        f"commit {together(map(commit, runs))}",
        together(str(date)[:10] for date in dates),
        f"{len(runs)} run{'s' * (len(runs) > 1)}.",
    ]
    return f"{before} {'; '.join(parts)}"


COLOURS = {  # those of the time line in TensorBoard
    "data": "#999999",
    "forward": "#4477aa",
    "backward": "#ee6677",
    "optimizer": "#228833",
    "exposed_communication": "#aa3377",
    "the rest": "#dddddd",
}


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
    palette = {"plotColorPalette": "#4477aa, #ee6677"}
    size = {"width": 900, "height": 400}
    settings = {"xyChart": size, "themeVariables": {"xyChart": palette}}
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


def speed_up(run, other, of=lambda run: get(run, "tokens_per_second")):
    if forbids := differences(run, other)[0]:
        return "not compared: " + ", ".join(forbids)
    ours, theirs = of(run), of(other)
    return f"{ours / theirs:.2f}" if ours and theirs else MISSING


# 4. Tables of runs. A column is a field of results.json, or a function of the run.

RESULTS = {
    "run": lambda run: run["name"],
    "nodes x ranks": shape,
    "settings": settings,
    "batch": lambda run: argument(run, "batch_size"),
    "epoch s": "steady_epoch_seconds",
    "training s": "train_seconds",
    "warm-up s": "warmup_seconds",
    "preparing s": "prepare_seconds",
    "evaluating s": "evaluate_seconds",
    "in all s": "total_seconds",
    "each epoch s": epochs,
    "features cached": lambda run: get(run, "features_cached"),
    "resumed from": lambda run: listed(get(run, "resumed_from_steps")) or "-",
    "tokens/s": "tokens_per_second",
    "features/s": "features_per_second",
    "steps": "steps",
    "MFU": "model_flops_utilization",
    "padding": "padding_share",
    "parameters": "parameters",
    "peak GiB a rank": "peak_memory_gib",
    "features a rank and pass": lambda run: (
        (argument(run, "batch_size") or 0) / ranks(run) / (argument(run, "accumulate") or 1) or None
    ),
    "EM": "exact_match",
    "F1": "f1",
    "the BERT paper's EM / F1": paper,
    "scorer": lambda run: get(run, "scorer"),
}
SHOW = {"MFU": percent, "padding": percent, "EM": score, "F1": score}


def value(run, column):
    field = RESULTS[column]
    return get(run, field) if isinstance(field, str) else field(run)


def plain(before, columns):
    columns = columns.split("|")
    return lambda runs: table(
        conditions(runs, before), [{name: shown(run, name) for name in columns} for run in runs]
    )


def shown(run, column):
    return SHOW.get(column, number)(value(run, column))


def several(runs, column):  # mean and spread of one column
    return spread([value(run, column) for run in runs], SHOW.get(column, number))


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
        rows.append(row | {name: several(group, name) for name in columns})
    before = "Mean ± standard deviation over runs that differ in the seed alone."
    return table(conditions(runs, before), rows)


def loss_agreement(run, earlier):
    """The largest difference from the first rung that trained the same batches: the same seed and
    the same real tokens at each step are the same batches, whatever the padding."""

    def first(one):
        found = [i for i in one["timings"]["intervals"][:FIRST_LOSSES] if is_number(i.get("loss"))]
        batches = [(argument(one, "seed"), i.get("step"), i.get("tokens")) for i in found]
        return batches, [i["loss"] for i in found]

    batches, losses = first(run)
    for other in earlier:
        if losses and first(other)[0] == batches:
            most = max(abs(a - b) for a, b in zip(losses, first(other)[1]))
            return f"{most:.1e} from {other['name']}"
    return "the first of its batches" if losses else MISSING


def rungs(runs):
    numbered = all(folder_name(run)[0].isdigit() for run in runs)
    return sorted(runs, key=lambda run: natural(folder_name(run))) if numbered else runs


def ladder_table(runs):
    runs, rows = rungs(runs), []
    for place, run in enumerate(runs):
        before, speeds = runs[max(place - 1, 0)], windows(run)
        around = f" ({number(min(speeds))} to {number(max(speeds))})" if len(speeds) > 1 else ""
        row = {
            "rung": run["name"],
            "what changed": ", ".join(differences(run, before)[1]) or "-",
            "tokens/s": number(speed(run)) + around,
            "over the first": speed_up(run, runs[0], speed),
            "over the one before": speed_up(run, before, speed),
        }
        columns = ["MFU", "peak GiB a rank", "padding", "warm-up s"]
        row |= {name: shown(run, name) for name in columns}
        rows.append(
            row | {"loss differs by": loss_agreement(run, runs[:place]), "F1": shown(run, "F1")}
        )
    before = f"""Real tokens/s: the median of three windows of the steady steps (least to most).
    Loss: the largest difference over the first {FIRST_LOSSES} log intervals."""
    return table(conditions(runs, before), rows)


def scaling_groups(runs):
    """{(rule, shape): runs}. The folder's name says strong or growing; without, the batch does."""
    least = min((argument(run, "batch_size") or 0) for run in runs)
    groups = collections.defaultdict(list)
    for run in sorted(runs, key=lambda run: (ranks(run), shape(run))):
        named = re.match(r"strong|growing", folder_name(run))
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
        links = [a for run in group if isinstance(a := get(run, "all_reduce"), dict)]
        bandwidth = spread(a.get("gigabytes_per_second") for a in links)
        row = {
            "batch rule": rule,
            "nodes x ranks": grid,
            "batch": together(argument(run, "batch_size") for run in group),
            "runs": len(group),
            "epoch s": several(group, "epoch s"),
            "tokens/s": several(group, "tokens/s"),
            "tokens/s a rank": ours / n if ours else None,
            "speed-up": f"{gain:.2f}" if gain else "no 1x1 to compare with",
            "efficiency": percent(gain / n if gain else None),
            "exposed communication": spread(map(exposed, group), percent) if n > 1 else "-",
            "all-reduce GB/s": bandwidth if n > 1 else "-",
            "link": (together(a.get("link") for a in links) or MISSING) if n > 1 else "-",
            "F1": several(group, "F1"),
        }
        rows.append(row)
    before = """Mean ± standard deviation of the repeats. Strong: 1x1's global batch, the same
    training. Growing: 1x1's batch on each rank, so the speed-up is of tokens/s and F1 belongs to it."""
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
    rows = []
    for run in runs[1:]:
        row = {"run": run["name"], f"speed-up over {runs[0]['name']}": speed_up(run, runs[0])}
        row |= {"what changed": ", ".join(differences(run, runs[0])[1]) or "nothing"}
        rows.append(row | {"F1": shown(run, "F1"), "the first's F1": shown(runs[0], "F1")})
    return table(conditions(runs, "By real tokens/s in the steady state."), rows)


def step_seconds(run):
    steps = [0, *(i.get("step") for i in run["timings"]["intervals"])]
    counts = [b - a for a, b in itertools.pairwise(steps) if is_number(a) and is_number(b)]
    kept = [n for n, i in zip(counts, run["timings"]["intervals"]) if i.get("steady")]
    return sum(steady(run, "seconds")) / sum(kept) if sum(kept) else None


def phase_rows(runs):
    """(run or rank, {phase: (seconds a step, share)}): the run's own, then each rank's by its trace."""
    for run in runs:
        own, traces, seconds = run["timings"]["phases"], read_traces(run), step_seconds(run)
        shares = {name: own[name].get("share") for name in PHASES if name in own}
        if own:
            pairs = {
                n: (seconds * s if seconds and is_number(s) else None, s) for n, s in shares.items()
            }
            yield run["name"], pairs
        for rank, trace in traces.items() if len(traces) > 1 or not own else ():
            yield f"{run['name']}, rank {rank} (trace)", trace["phases"]


def phases_table(runs):
    found, rows, beside = list(phase_rows(runs)), [], []
    for run, phases in found:
        row = {"run": run}
        for name in (name for name in PHASES if any(name in one for _, one in found)):
            seconds, share = phases.get(name, (None, None))
            text = f"{number(1000 * seconds)} ms, " if is_number(seconds) else ""
            row[name.replace("_", " ")] = text + percent(share) if is_number(share) else MISSING
        rows.append(row)
    for run in runs:
        others = {n: p for n, p in run["timings"]["phases"].items() if n not in PHASES}
        times = [
            f"{n} {number(p.get('seconds'))} s ({percent(p.get('share'))})"
            for n, p in others.items()
        ]
        beside += [f"Beside the steps of {run['name']}: {', '.join(times)}."] if times else []
    before = (
        "Milliseconds a step in the steady state (by trace: with the profiler on), and the share."
    )
    return "\n\n".join([table(conditions(runs, before), rows), *beside])


def command(run):
    words = get(run, "command")
    words = shlex.join(map(str, words)) if isinstance(words, list) else words
    return f"`{words}`" if words else None


def environment_table(runs):
    fields = {"finished": [get(run, "finished_at") for run in runs]}
    fields["command"] = [command(run) for run in runs]
    for key in dict.fromkeys(itertools.chain(*(run["results"]["environment"] for run in runs))):
        fields[key.replace("_", " ")] = [listed(environment(run, key)) or "-" for run in runs]
    names = [run["name"] for run in runs]
    if len(runs) > 4:  # too wide a table: what they have in common, or how many differ
        names, fields = ["all runs"], {k: [together(map(cell, v))] for k, v in fields.items()}
    rows = [{"": field} | dict(zip(names, values)) for field, values in fields.items()]
    return table("The machine, the versions and the command of each run.", rows)


# 5. Traces, read event by event: 50 MB of trace are a gigabyte once unpacked


def events(path):
    """The complete events ("ph": "X") of a Chrome trace, in bounded memory."""
    decode = json.JSONDecoder().raw_decode
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 22)
        place = text.index("[", text.index('"traceEvents"')) + 1
        while True:
            while text[place : place + 1] in tuple(" \r\n\t,"):
                place += 1
            if text[place : place + 1] == "]":
                return
            try:
                event, place = decode(text, place)
            except ValueError:  # the event goes on in the next piece
                more = file.read(1 << 22)
                if not more or len(text) - place > 1 << 26:
                    raise
                text, place = text[place:] + more, 0
            else:
                if event.get("ph") == "X":
                    yield event


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
    for event in events(path):
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
        for start, stop, key in zip(
            starts, ends, keys
        ):  # a kernel is of the phase that launched it
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
    gaps = sorted(
        (gap for gap in edges.tolist() if gap[0] < gap[1]), key=lambda gap: gap[0] - gap[1]
    )
    return {
        "place": "device" if kernels else "CPU",
        "steps": len(steps),
        "seconds": seconds,
        "computing": computing,
        "exposed communication": occupied - computing,
        "idle": 1 - occupied,
        "communication": communication,
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


def newest_traces(run):
    """{rank: file}; of several lives of a run the last one's."""
    newest = {}
    for path in sorted((run["folder"] / "tensorboard").glob("*.pt.trace.json.gz"), key=natural):
        named = re.search(r"rank(\d+)", path.name)
        newest[int(named[1]) if named else 0] = path
    return dict(sorted(newest.items()))


def read_traces(run):
    if "traces" not in run:
        run["traces"] = {}
        for rank, path in newest_traces(run).items():
            if path.stat().st_size > 5e6:
                print(f"reading {path.name}, {path.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
            try:
                run["traces"][rank] = read_trace(path)
            except (OSError, EOFError, ValueError, TypeError, AttributeError, zlib.error) as error:
                fault(f"{path}: cannot be read as a trace ({error}): delete it, or run again")
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
            for name in ("computing", "exposed communication", "idle"):
                row[name] = percent(trace[name])
            rows.append(row | {"communication in all": percent(trace["communication"])})
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


def speed_chart(runs, title="Real tokens a second"):
    speeds = {run["name"]: speed(run) for run in runs if speed(run)}
    if not speeds:
        return f"{title}: {MISSING}."
    return xychart(title, list(speeds), "tokens/s", ("bar", list(speeds.values())))


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
        one = one if isinstance(one, dict) else {}
        columns, rows, where = one.get("columns"), one.get("rows"), one.get("environment")
        if not isinstance(columns, list) or not isinstance(rows, list):
            fault(f'{path}: wants {{"title", "conditions", "columns": [...], "rows": [[...]]}}')
        if any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
            fault(f"{path}: rows: each wants as many cells as columns has, {len(columns)}")
        where = where if isinstance(where, dict) else {"environment": where}
        where = [f"{k.replace('_', ' ')} {listed(v)}" for k, v in where.items() if v is not None]
        caption = "; ".join(filter(None, [listed(one.get("conditions")), *where]))
        rows = [dict(zip(map(cell, columns), row)) for row in rows]
        parts += [f"**{cell(one.get('title') or path.stem)}**"]
        parts += [table(caption + "." if caption else f"Conditions {MISSING}.", rows)]
    return "\n\n".join(parts)


# 8. The whole report


def report(runs):
    parts = ["# Report", "## Environment", environment_table(runs)]
    for title in ("times", "throughput", "answers"):
        parts += [f"## {title.capitalize()}", TABLES[title](runs)]
    names = [folder_name(run) for run in runs]
    strategies = {argument(run, "strategy") for run in runs}
    if len(runs) > 1:
        kinds = {
            "ladder": all(re.match(r"\d+-", name) for name in names),
            "scaling": all(re.match(r"(strong|growing)-\d+x\d+", name) for name in names),
            "strategies": None not in strategies and len(strategies) > 1,
            "seeds": len({argument(run, "seed") for run in runs}) > 1,
        }
        kinds["speed-up"] = not any(kinds.values())
        for title in (title for title, fits in kinds.items() if fits):
            parts += [f"## {title.capitalize()}", TABLES[title](runs)]
            parts += [CHARTS.get(title, speed_chart)(runs)]
    parts += ["## Phases", phases_table(runs), *([phases_chart(runs)] if len(runs) < 3 else [])]
    traced = [run for run in runs if read_traces(run)] if len(runs) < 5 else []
    return "\n\n".join(parts + (["## Traces", trace_table(traced)] if traced else []))


# 9. For train.py: the machine at a run's start; the figures, block and TensorBoard at its end


def told_by(*command):
    try:
        here = pathlib.Path(__file__).parent
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=20, cwd=here
        )
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""


THROTTLES = ["idle", "application clocks", "power cap", "hardware slowdown", "sync boost"]
THROTTLES += ["software thermal", "hardware thermal", "power brake", "display clocks"]


def gpus():
    """The state of each GPU that this node's ranks use."""
    fields = ["name", "driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem"]
    fields += ["temperature.gpu", "clocks_throttle_reasons.active"]
    query = f"--query-gpu=index,uuid,{','.join(fields)}"
    told = told_by("nvidia-smi", query, "--format=csv,noheader").splitlines()
    rows = [row.split(", ") for row in told]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # names them by index or by the UUID's beginning
        asked = [one.removeprefix("MIG-") for one in visible.split(",") if one]
        rows = [r for one in asked for r in rows if one == r[0] or r[1].startswith(one)]
    found = [
        dict(zip(fields, row[2:])) for row in rows[: int(os.environ.get("LOCAL_WORLD_SIZE") or 1)]
    ]
    for gpu in found:
        mask = gpu.pop(fields[-1], "")
        mask = int(mask, 16) if mask.startswith("0x") else 0
        reasons = [name for bit, name in enumerate(THROTTLES) if mask >> bit & 1]
        gpu["throttled by"] = " and ".join(reasons) or "nothing"
    return found


def versions():
    """The libraries' versions, without importing them: torch alone takes seconds."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "datasets", "tokenizers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    torch = importlib.util.find_spec("torch")
    torch = pathlib.Path(torch.origin).with_name("version.py") if torch and torch.origin else None
    cuda = re.search(r"^cuda\b.*'(.+)'", torch.read_text(), re.MULTILINE) if torch else None
    return found | {"cuda": cuda[1] if cuda else None}


def machine():
    """What a reader must know of the machine to trust a run's figures."""
    node, state, cpu = os.environ.get("SLURMD_NODENAME"), gpus(), pathlib.Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    cpu = f"CPU {cpu[1] if cpu else ''}".strip()
    jobs = told_by("squeue", "-h", "-w", node, "-o", "%A") if node else ""
    several = int(os.environ.get("GROUP_WORLD_SIZE") or 1) > 1 and node  # torchrun's nodes
    return {
        "commit": told_by("git", "rev-parse", "HEAD") or None,
        "dirty": bool(told_by("git", "status", "--porcelain", "--", "..")),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "hosts": several
        and told_by("scontrol", "show", "hostnames").split()
        or [socket.gethostname()],
        "devices": [gpu["name"] for gpu in state] or [cpu],
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": state,
        **versions(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "node_shared": len(jobs.split()) > 1 if jobs else None,
    }


# Dense TFLOP/s in bf16, tf32 and fp32, from NVIDIA's data sheets; the first name that fits counts.
PEAKS = {"H100 PCIe": (756, 378, 51), "NVL": (835, 418, 60), "H100": (989, 494, 67)}
PEAKS |= {"H200": (989, 494, 67), "A100": (312, 156, 19.5), "A30": (165, 82, 10.3)}
PEAKS |= {"L40S": (362, 183, 91.6), "L4": (121, 60, 30.3), "V100": (None, None, 15.7)}


def peak_flops(name, precision):
    """FLOP/s; None for a CPU, and for a GPU whose peak is not known."""
    for known, peaks in PEAKS.items():
        if re.search(rf"\b{known}\b", name) and "MIG" not in name:
            peak = peaks[("bf16", "tf32", "fp32").index(precision)]
            return peak and peak * 1e12
    return None


COPIED = """exact_match f1 prepare_seconds features_cached evaluate_seconds total_seconds peak_memory_gib
    train_features world_size nodes parameters arguments environment resumed_from_steps
    repeated_steps scorer"""
KEPT = ("step", "loss", "learning_rate", "gradient_norm", "seconds", "tokens", "steady")


def derive(record):
    """train.py's raw record of a run -> what goes into results.json and into timings.json."""
    intervals, settings = record["intervals"], record["arguments"]
    steady = [i for i in intervals if i["steady"]]

    def total(field, chosen=steady):
        return sum(one[field] for one in chosen)

    found = record["environment"]
    found["gpu_before"] = found.pop("gpu", [])
    found["gpu_after"] = gpus()
    if settings["device_type"] == "cpu":  # whatever GPU the machine has
        found |= {"devices": [found.get("cpu", "CPU")], "gpu_before": [], "gpu_after": []}
    results = {name: record[name] for name in COPIED.split()}
    results |= {"steps": record["step"], "paper": PAPER, "restarts": found.get("restarts", 0)}
    results |= {"command": shlex.join(map(str, record["command"]))}
    results |= {"finished_at": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    if record.get("all_reduce"):
        results["all_reduce"] = record["all_reduce"]
    results["train_seconds"] = total("wall_seconds", intervals)
    results["warmup_seconds"] = total("seconds", [i for i in intervals if i["warmup"]])
    an_epoch = record.get("steps_an_epoch") or 1
    results["epoch_seconds"] = each = [0.0] * -(-record["step"] // an_epoch)
    for one in intervals:  # one that spans two epochs is shared out by its steps
        for step in range(one["step"] - one["steps"], one["step"]):
            each[step // an_epoch] += one["wall_seconds"] / one["steps"]
    real, computed = record.get("tokens_per_step", []), record.get("computed_per_step", [])
    results["padding_share"] = 1 - sum(real) / sum(computed) if computed else None
    names = "tokens_per_second features_per_second steady_epoch_seconds flops_per_second"
    results |= dict.fromkeys([*names.split(), "model_flops_utilization"])
    if seconds := total("seconds"):
        # Two FLOPs a multiply-add, once forward and twice backward (Kaplan et al. 2020, section
        # 2.1); attention 4 x hidden size x length^2 a layer forward. Embeddings do not count.
        flops = 6 * record["matrix_weights"] * total("tokens")
        flops += 12 * record["layers"] * record["hidden_size"] * total("squares")
        peak = peak_flops((found.get("devices") or ["CPU"])[0], settings["precision"])
        results["tokens_per_second"] = total("tokens") / seconds
        results["features_per_second"] = total("features") / seconds
        results["steady_epoch_seconds"] = record["train_tokens"] * seconds / total("tokens")
        results["flops_per_second"] = flops / seconds
        if peak:
            share = flops / seconds / record["world_size"] / peak
            results["model_flops_utilization"] = share
    chosen, phases = steady or intervals, {}
    for name in intervals[0]["phases"] if intervals else ():
        spent = sum(one["phases"][name] for one in chosen)
        phases[name] = {"seconds": spent, "share": spent / total("seconds", chosen)}
    for name in record.get("phases_override", {}):
        phases[name] = {"seconds": None, "share": None}
    for name, spent in record["beside"].items():
        share = spent / results["train_seconds"] if intervals else None
        phases[name] = {"seconds": spent, "share": share}
    timings = {"phases": phases, "intervals": [{k: i[k] for k in KEPT} for i in intervals]}
    timings |= {"operators": record["operators"]}
    timings |= {"tokens_per_step": list(map(list, zip(real, computed)))[:200]}
    return results, timings | ({"ranks": record["ranks"]} if record.get("ranks") else {})


def block(run):
    """The lines at the end of a log that go into a report."""
    phases = run["timings"]["phases"].items()
    shares = ", ".join(
        f"{name.replace('_', ' ')} {percent(one.get('share'))}" for name, one in phases
    )
    here = {name: shown(run, name) for name in RESULTS}
    reason = paper(run)
    lines = {
        "run": f"{run['folder']}, commit {commit(run)}",
        "device": f"{ranks(run)} x {device(run)}, torch {environment(run, 'torch')}, {here['settings']}",
        "an epoch": f"{here['epoch s']} s at the steady state's {here['tokens/s']} real tokens/s, {here['features/s']} features/s",
        "training": f"{here['training s']} s, {here['steps']} steps; of them warm-up {here['warm-up s']} s",
        "beside it": f"preparing {here['preparing s']} s, evaluating {here['evaluating s']} s; in all {here['in all s']} s",
        "padding": f"{here['padding']} of the tokens computed",
        "utilisation": f"{here['MFU']} of the device's peak; memory {here['peak GiB a rank']} GiB at most",
        "phases": shares or MISSING,
        "exact match, F1": f"{here['EM']}, {here['F1']} ({here['scorer']} scorer)",
        "in BERT's paper": PAPERS + (f"; {reason}" if reason != PAPERS else ""),
        "look": f"tensorboard --logdir {shlex.quote(str(run['folder'].parent))}",
    }
    cased = re.search(r"(?<!un)cased", model(run).lower())
    if cased:
        lines["cased"] = "the model is cased: the uncased one is the paper's, and better on SQuAD"
    elif reason == PAPERS and (get(run, "f1") or 0) < 87:
        lines["low"] = "F1 is under 87: are the learning rate, the batch or the epochs unusual?"
    return "\n".join([f"{name:17}{text}" for name, text in lines.items()])


def time_line(run):
    """A figure of the last profiled step: rows of phases, work and communication for each rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = collections.defaultdict(list)  # (row, colour's name) -> [(begin, length)] in ms
    for rank, path in newest_traces(run).items():
        steps = [e for e in events(path) if e["name"].startswith("ProfilerStep#")]
        step = max((e for e in steps if e["cat"] == "user_annotation"), key=lambda e: e["ts"])
        for e in events(path):
            begin, length, name = (e["ts"] - step["ts"]) / 1000, e["dur"] / 1000, e["name"]
            on_device = e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")  # it ends after the host
            after = begin > step["dur"] / 1000 and not on_device
            if begin < 0 or after or name == step["name"]:
                continue
            if COMMUNICATION.match(name) and (e["cat"] == "kernel" or name.startswith("gloo:")):
                bars[f"rank {rank} communication", "communication"].append((begin, length))
            elif e["cat"] == "user_annotation" and name in PHASES:
                bars[f"rank {rank} phases", name].append((begin, length))
            elif on_device:
                bars[f"rank {rank} device", "kernels"].append((begin, length))
            elif e["cat"] == "cpu_op" and length > step["dur"] / 2e6:
                bars[f"rank {rank} operators", "operators"].append((begin, length))
    colours = COLOURS | {"communication": "#aa3377", "kernels": "#ccbb44", "operators": "#66ccee"}
    rows = sorted({row for row, _ in bars}, key=natural)
    figure, axes = pyplot.subplots(figsize=(13, 1.2 + 0.5 * len(rows)), layout="constrained")
    for (row, kind), spans_ in bars.items():
        axes.broken_barh(spans_, (rows.index(row) - 0.4, 0.8), facecolors=colours[kind])
    for kind in dict.fromkeys(kind for _, kind in bars):
        axes.plot([], [], color=colours[kind], linewidth=8, label=kind)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds from the step's start")
    figure.legend(loc="outside upper center", ncols=8, frameon=False)
    return figure


OVERVIEW = {
    "loss": "training/loss",
    "real tokens a second": "speed/tokens_per_second",
    "share of the step": "phases/.*",
    "learning rate": "training/learning_rate",
    "gradient norm": "training/gradient_norm",
    "memory, GiB": "speed/peak_memory_gib",
}


def write_board(run, record):
    """All of TensorBoard's events at once, so that no curve of a resumed run is there twice."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run["folder"] / "tensorboard"
    for earlier in folder.glob("events.out.tfevents.*"):  # of an end that failed
        earlier.unlink()
    with SummaryWriter(folder) as writer:
        charts = {question: ["Multiline", [tag]] for question, tag in OVERVIEW.items()}
        writer.add_custom_scalars({"overview": charts})
        for one in record["intervals"]:
            seconds = one["seconds"]
            values = {f"training/{n}": one[n] for n in ("loss", "learning_rate", "gradient_norm")}
            values["speed/tokens_per_second"] = one["tokens"] / seconds
            values["speed/peak_memory_gib"] = one["memory_gib"]
            shares = {f"phases/{name}": spent / seconds for name, spent in one["phases"].items()}
            for name, value in (values | shares).items():
                writer.add_scalar(name, value, one["step"])
        scores = ("exact_match", "f1", "steady_epoch_seconds", "train_seconds")
        scores = {f"result/{name}": get(run, name) for name in scores if is_number(get(run, name))}
        settings = run["results"]["arguments"].items()
        settings = {name: value for name, value in settings if isinstance(value, (str, int, float))}
        writer.add_hparams(settings, scores, run_name=".")  # a name of its own would be a run more
        for name in ("environment", "times", "throughput", "answers", "phases"):
            writer.add_text(name, TABLES[name]([run]))
        if run["timings"]["operators"]:
            writer.add_text("operators", f"```\n{run['timings']['operators']}\n```")
        if newest_traces(run):
            writer.add_text("traces", trace_table([run]))
            writer.add_figure("one profiled step", time_line(run))


def write_whole(path, content):
    """Under another name, then renamed: what is there is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finish(folder):
    """From train.py's raw record: TensorBoard, timings.json, the block and, last, results.json."""
    try:
        record, folder = json.load(sys.stdin), pathlib.Path(folder)
        results, timings = derive(record)
        run = load_run(folder, results, timings)
        write_board(run, record)
        write_whole(folder / "timings.json", timings)
        print("\n--- results " + "-" * 60, block(run), "-" * 72, sep="\n", flush=True)
        write_whole(folder / "results.json", results)
    except Exception as error:  # noqa: BLE001 whatever it was: one line, and no results.json
        fault(f"--finish {folder}: {type(error).__name__}: {' '.join(str(error).split())}")


CHARTS = {
    "runs": speed_chart,
    "ladder": lambda runs: speed_chart(rungs(runs), "The ladder: real tokens a second"),
    "scaling": scaling_chart,
    "phases": phases_chart,
    "tokens": tokens_chart,
}
STEADY = "Steady state: warm-up, the profiler's steps, saves and waits for them are out; real tokens only."
TABLES = {
    "runs": plain(
        "A row a run.",
        "run|nodes x ranks|settings|batch|epoch s|training s|tokens/s|MFU|padding|peak GiB a rank|EM|F1",
    ),
    "times": plain(
        "Seconds; the first is the headline, an epoch's real tokens at the steady tokens/s.",
        "run|epoch s|training s|warm-up s|preparing s|evaluating s|in all s|each epoch s|features cached|resumed from",
    ),
    "throughput": plain(
        STEADY, "run|tokens/s|features/s|padding|MFU|peak GiB a rank|nodes x ranks|steps"
    ),
    "answers": plain(
        "Percent, on the whole validation file, once, at the end.",
        "run|EM|F1|the BERT paper's EM / F1|scorer",
    ),
    "memory": plain(
        "The most that a rank held; on a CPU all of its process.",
        "run|nodes x ranks|settings|features a rank and pass|parameters|peak GiB a rank",
    ),
    "environment": environment_table,
    "speed-up": speed_up_table,
    "seeds": seeds_table,
    "ladder": ladder_table,
    "scaling": scaling_table,
    "strategies": strategies_table,
    "phases": phases_table,
    "trace": trace_table,
}
MEASURED = ["bench", "growth", "faults", "seeds-paired", "measured"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    if options.table in MEASURED:
        return print("\n\n".join(map(measured_table, options.runs)))
    runs = load_runs(options.runs)
    chosen = [TABLES[options.table](runs)] if options.table else []
    chosen += [CHARTS[options.chart](runs)] if options.chart else []
    print("\n\n".join(chosen) or report(runs))


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()

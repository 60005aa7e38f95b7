"""Runs -> Markdown, ready to hand in. It only reads: a run needs nothing of it.

    python baseline/report.py RUN...                       the full report
    python baseline/report.py --table ladder RUN...        one table
    python baseline/report.py --chart scaling RUN...       one chart, in mermaid, which GitHub draws
    python baseline/report.py --record RUN...              rows for README.md's record table
    python baseline/report.py --table bench FILE.json...   the table of a measurement

A RUN is a folder that train.py left (results.json, beside it timings.json and tensorboard/), a
folder of such folders, or a pattern in quotes. What is absent is printed as "not measured", and a
speed-up is given only between runs of the same batch, model, data and device.
"""

import argparse
import bisect
import collections
import dataclasses
import datetime
import functools
import glob
import importlib.util
import json
import math
import pathlib
import re
import signal
import statistics
import sys

MISSING = "not measured"
# Devlin et al. 2019: exact match and F1 of BERT-Base on the validation set of SQuAD v1.1.
PAPER = "80.8 / 88.5"
# The log intervals over which the ladder compares losses.
FIRST_LOSSES = 40
# README.md's record table, which --record prints rows for; its links begin at the project's root.
RECORD_COLUMNS = ["settings", "device", "seconds", "EM", "F1", "commit", "files"]
ROOT = pathlib.Path(__file__).resolve().parents[1]


def load_trace_module():
    """trace.py of this folder, by its path: the standard library has a module `trace` too."""
    path = pathlib.Path(__file__).with_name("trace.py")
    specification = importlib.util.spec_from_file_location("trace_of_runs", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


trace = load_trace_module()
PHASES = trace.PHASES
ODD_VALUES = trace.ODD_VALUES


class Problem(Exception):
    """What the user can put right: it is said in one line, and the exit code is 2."""


def refuse(message):
    raise Problem(message)


def complain(message):
    """Prints one line to stderr; returns the exit code of bad input."""
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return 2


# 1. Runs


@dataclasses.dataclass
class Run:
    """What a run left; fields that are absent are empty."""

    folder: pathlib.Path
    name: str
    results: dict
    arguments: dict
    environment: dict
    phases: dict
    intervals: list
    tokens_per_step: list  # pairs of real tokens and computed ones
    evaluations: list


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path, kinds=dict):
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(f"{path}: cannot be read as JSON ({error}): measure again") from error
    if not isinstance(value, kinds):
        kind = type(value).__name__
        raise Problem(f"{path}: holds a {kind}, not an object: measure again")
    return value


def read_field(path, holder, field, kind):
    """A list or an object of a JSON file; empty where it is absent or null."""
    value = holder.get(field)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise Problem(f"{path}: {field} is not {wanted}: run again")
    return value


def check_numbers(path, holder, fields):
    for field in fields:
        value = holder.get(field)
        if value is not None and not is_number(value):
            raise Problem(f"{path}: {field} is not a number: run again")


def load_run(folder):
    results_path = folder / "results.json"
    timings_path = folder / "timings.json"
    results = read_json(results_path)
    timings = read_json(timings_path) if timings_path.exists() else {}
    run = Run(
        folder=folder,
        name=folder.resolve().name,
        results=results,
        arguments=read_field(results_path, results, "arguments", dict),
        environment=read_field(results_path, results, "environment", dict),
        phases=read_field(timings_path, timings, "phases", dict),
        intervals=read_field(timings_path, timings, "intervals", list),
        tokens_per_step=read_field(timings_path, timings, "tokens_per_step", list),
        evaluations=read_field(results_path, results, "evaluations", list),
    )
    fields = [field for field in COLUMNS.values() if isinstance(field, str)]
    check_numbers(results_path, results, [*fields, "world_size", "nodes", "train_features"])
    check_numbers(results_path, run.arguments, ["batch_size", "accumulate"])
    if "FAKE" in device(run):
        what = f"was made on {device(run)}, which computes nothing (.ci/fake-gpu)"
        raise Problem(f"{folder}: {what}, so its times are no GPU's: run on a real one")
    return run


def say_left_out(folder):
    complain(f"{folder}: no finished run, left out")


def is_unfinished(folder):
    """Whether train.py began a run here, and left no results."""
    if (folder / "results.json").exists():
        return False
    return any((folder / name).exists() for name in (".lock", "checkpoint.pt", "tensorboard"))


def runs_inside(folder):
    """The finished runs directly in a folder; unfinished ones are named on stderr."""
    children = sorted(folder.glob("*/"), key=trace.natural_order)
    finished = [child for child in children if (child / "results.json").exists()]
    if finished:
        for child in filter(is_unfinished, children):
            say_left_out(child)
    return finished


def find_runs(names):
    """Returns the folders of runs that the command line names."""
    folders = []
    for name in names:
        found = [name]
        if not pathlib.Path(name).exists():
            found = sorted(glob.glob(name), key=trace.natural_order)
        if not found:
            raise Problem(f"{name}: no such folder; a run is the folder given as --output")
        for folder in map(pathlib.Path, found):
            if (folder / "results.json").exists():
                folders.append(folder)
                continue
            inside = runs_inside(folder)
            if inside:
                folders += inside
            elif len(names) > 1:
                # As the shell expands runs/*: the others are worth their tables.
                say_left_out(folder)
            elif (folder / "checkpoint.pt").exists():
                raise Problem(f"{folder}: not finished (it holds checkpoint.pt): resume it first")
            else:
                raise Problem(f"{folder}: no results.json in it; give the folder of a finished run")
    if not folders:
        raise Problem(f"none of these is a finished run: {', '.join(map(str, names))[:200]}")
    return list(dict.fromkeys(folders))


def load_runs(names):
    runs = [load_run(folder) for folder in find_runs(names)]
    count = collections.Counter(run.name for run in runs)
    for run in runs:
        if count[run.name] > 1:
            # Two folders of one name: their parents tell them apart.
            run.name = "/".join(run.folder.resolve().parts[-2:])
    return runs


# 2. What a run says of itself


def argument(run, name):
    value = run.arguments.get(name)
    return listed(value) if isinstance(value, (list, dict)) else value


def argument_getter(name):
    return lambda run: argument(run, name)


def batch_size(run):
    return argument(run, "batch_size")


def ranks(run):
    return int(run.results.get("world_size") or 1)


def nodes(run):
    return int(run.results.get("nodes") or 1)


def shape(run):
    return f"{nodes(run)}x{ranks(run) // nodes(run)}"


def device(run):
    names = sorted({str(name) for name in run.environment.get("devices") or []})
    return " and ".join(names) or f"device {MISSING}"


def used_gpu(run):
    if argument(run, "device_type"):
        return argument(run, "device_type") == "cuda"
    names = run.environment.get("devices") or []
    return argument(run, "device") != "cpu" and any("CPU" not in str(name) for name in names)


def model(run):
    if argument(run, "sample"):
        return "the sample's BERT"
    name = str(argument(run, "model") or f"model {MISSING}")
    return name.rstrip("/").split("/")[-1]


def data(run):
    name = str(argument(run, "train_file") or "SQuAD v1.1").split("/")[-1]
    # Earlier runs had the sample in a file of this name.
    if argument(run, "sample") and name != "sample.json":
        name = "the sample"
    if argument(run, "limit"):
        name += f", first {argument(run, 'limit')}"
    if argument(run, "max_length"):
        name += f", {argument(run, 'max_length')} tokens a window"
    return name


def commit(run):
    value = run.environment.get("commit")
    if not value:
        return MISSING
    return str(value)[:10] + (" with changes" if run.environment.get("dirty") else "")


def day(run):
    date = run.results.get("finished_at") or run.environment.get("date") or MISSING
    return str(date).partition("T")[0]


def settings(run):
    names = [argument(run, name) for name in ("precision", "batching", "strategy")]
    if argument(run, "compile"):
        names.append("compiled")
    return ", ".join(str(name) for name in names if name) or MISSING


def epoch_seconds(run):
    seconds = list(filter(is_number, run.results.get("epoch_seconds") or []))
    if len(seconds) >= 5:
        return f"{number(min(seconds))} to {number(max(seconds))}"
    return ", ".join(map(number, seconds)) or None


def features_per_micro_batch(run):
    per_rank = (batch_size(run) or 0) / ranks(run)
    return per_rank / (argument(run, "accumulate") or 1) or None


def beside_paper(run):
    """The paper's figures where this run may stand beside them, else why it may not."""
    part = argument(run, "sample") or argument(run, "limit")
    # SQuAD v1.1 makes some 88,500 features at the usual length and stride.
    if part or (run.results.get("train_features") or 0) < 85_000:
        return f"not comparable: other data ({data(run)})"
    if "bert-base" not in str(argument(run, "model")).lower():
        return f"not comparable: another model ({model(run)})"
    if argument(run, "max_steps") or not argument(run, "epochs"):
        return "not comparable: not trained to the end"
    return PAPER


def warnings(run):
    found = []
    if re.search(r"(?<!un)cased", model(run).lower()):
        found.append(
            f"{run.name}: the model is cased, "
            "so its figures are not those of the usual, uncased one."
        )
    elif beside_paper(run) == PAPER and (run.results.get("f1") or 0) < 87:
        found.append(
            f"{run.name}: F1 is under 87, which is low for BERT-Base: "
            "are the learning rate, the batch or the epochs unusual?"
        )
    return found


# 3. Markdown


def number(value):
    """A value as tables show it: three digits, or all of them before the point."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if not isinstance(value, (int, float)):
        return str(value)
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def percent(share):
    return f"{100 * share:.1f} %" if is_number(share) else MISSING


def two_decimals(value):
    return f"{value:.2f}"


def spread(values, show=number):
    """Mean ± standard deviation; one value alone as it is."""
    values = [value for value in values if is_number(value)]
    if not values:
        return MISSING
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.mean(values))} ± {show(statistics.stdev(values))}"


def listed(value):
    """Any JSON value as a text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {listed(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(dict.fromkeys(map(listed, value)))
    if value is None:
        return ""
    return number(value) if isinstance(value, (bool, float)) else str(value)


def cell(value):
    text = number(value).replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split()) or " "


def table(caption, rows):
    """rows: dicts, all with the same keys, the columns' headings."""
    headings = list(rows[0]) if rows else ["nothing to show"]
    lines = [f"*{cell(caption).replace('*', '×')}*", ""]
    for row in [headings, ["---"] * len(headings), *(row.values() for row in rows)]:
        lines.append(table_row(row))
    return "\n".join(lines)


def table_row(cells):
    return f"| {' | '.join(map(cell, cells))} |"


def together(values):
    """What runs have in common, or how many values differ."""
    values = list(dict.fromkeys(str(MISSING if value is None else value) for value in values))
    return " / ".join(values) if len(values) < 6 else f"({len(values)} different)"


def conditions(runs, before):
    """The caption of a table: what the figures were measured on, and how often."""
    parts = [
        together(map(device, runs)),
        f"precision {together(argument(run, 'precision') for run in runs)}",
        f"batch {together(map(batch_size, runs))}",
        together(map(model, runs)),
        together(map(data, runs)),
        f"commit {together(map(commit, runs))}",
        together(map(day, runs)),
        f"{len(runs)} runs." if len(runs) > 1 else "1 run.",
    ]
    return f"{before} {'; '.join(parts)}"


def mermaid(theme, *lines):
    return "\n".join(["```mermaid", f"%%{{init: {json.dumps(theme)}}}%%", *lines, "```"])


def label(text):
    """Without the characters that mermaid cannot escape."""
    return re.sub(r'["\[\];`#<>\n]', " ", str(text))


def xychart_theme(*colours):
    """The series' colours, the first one's first."""
    return {
        "themeVariables": {"xyChart": {"plotColorPalette": ", ".join(colours)}},
        "xyChart": {"width": 900, "height": 400},
    }


def xychart(title, labels, unit, *series):
    """labels: names, or the last step of an axis from 1. series: ("bar" or "line", values)."""
    if isinstance(labels, int):
        axis = f'"step" 1 --> {labels}'
        horizontal = ""
    else:
        names = ", ".join(f'"{label(name)}"' for name in labels)
        axis = f"[{names}]"
        # Long names would overlap below upright bars.
        horizontal = " horizontal" if len(names) > 130 else ""
    highest = max(value for _, values in series for value in values) or 1
    digits = 0 if highest >= 100 else 3
    lines = [
        f'    title "{label(title)}"',
        f"    x-axis {axis}",
        f'    y-axis "{unit}" 0 --> {highest * 1.1:.{digits}f}',
    ]
    for kind, values in series:
        lines.append(f"    {kind} [{', '.join(f'{value:.{digits}f}' for value in values)}]")
    theme = xychart_theme("#4477aa", "#ee6677")
    return mermaid(theme, "xychart-beta" + horizontal, *lines)


# 4. Columns: the heading, and a field of results.json or a function of the run

COLUMNS = {
    "run": lambda run: run.name,
    "nodes x ranks": shape,
    "settings": settings,
    "batch": batch_size,
    "epoch s": "steady_epoch_seconds",
    "training s": "train_seconds",
    "warm-up s": "warmup_seconds",
    "preparing s": "prepare_seconds",
    "evaluating s": "evaluate_seconds",
    "in all s": "total_seconds",
    "each epoch s": epoch_seconds,
    "features cached": lambda run: run.results.get("features_cached"),
    "resumed from": lambda run: listed(run.results.get("resumed_from_steps")) or "-",
    "tokens/s": "tokens_per_second",
    "features/s": "features_per_second",
    "steps": "steps",
    "MFU": "model_flops_utilization",
    "padding": "padding_share",
    "EM": "exact_match",
    "F1": "f1",
    "the BERT paper's EM / F1": beside_paper,
    "scorer": lambda run: run.results.get("scorer"),
    "parameters": "parameters",
    "peak GiB per rank": "peak_memory_gib",
    "features per rank and micro-batch": features_per_micro_batch,
}
SHOWN_AS = {"MFU": percent, "padding": percent, "EM": two_decimals, "F1": two_decimals}


def value_of(run, column):
    field = COLUMNS[column]
    return run.results.get(field) if isinstance(field, str) else field(run)


def shown(run, column):
    value = value_of(run, column)
    if value is None:
        return MISSING
    return SHOWN_AS.get(column, number)(value)


def shown_spread(runs, column):
    return spread([value_of(run, column) for run in runs], SHOWN_AS.get(column, number))


def table_of(caption, *columns):
    """Returns a function that makes a table with these columns and a row for each run."""

    def make(runs):
        rows = [{column: shown(run, column) for column in columns} for run in runs]
        return table(conditions(runs, caption), rows)

    return make


# 5. Comparing like with like

# What must be the same for a speed-up, and what is often changed on purpose to get one.
MUST_AGREE = {
    "batch": batch_size,
    "model": model,
    "data": data,
    "device": device,
    "features": lambda run: run.results.get("train_features"),
}
MAY_DIFFER = {
    "nodes x ranks": shape,
    "precision": argument_getter("precision"),
    "fused": argument_getter("fused"),
    "batching": argument_getter("batching"),
    "compile": argument_getter("compile"),
    "cuda_graph": argument_getter("cuda_graph"),
    "accumulate": argument_getter("accumulate"),
    "strategy": argument_getter("strategy"),
    "gradients": argument_getter("gradients"),
    "dropout": argument_getter("dropout"),
}


def differences(run, other, fields):
    """In words: "precision fp32 → bf16" where other had fp32 and run has bf16."""
    words = {None: "none", True: "on", False: "off"}
    found = []
    for name, field in fields.items():
        before = field(other)
        now = field(run)
        if before != now:
            found.append(f"{name} {words.get(before, before)} → {words.get(now, now)}")
    return found


def steady_values(run, field):
    """One field of the intervals in the steady state, which the headline is made of."""
    return [
        interval[field]
        for interval in run.intervals
        if interval.get("steady")
        and is_number(interval.get(field))
        and is_number(interval.get("seconds"))
    ]


def window_speeds(run):
    """Tokens/s in three windows of the steady state; the run's own where intervals are few."""
    tokens = steady_values(run, "tokens")
    seconds = steady_values(run, "seconds")
    count = len(tokens)
    if count < 3:
        return [speed for speed in [run.results.get("tokens_per_second")] if is_number(speed)]
    speeds = []
    # The first windows are the longer ones where the intervals do not divide by three.
    edges = [0, -(-count // 3), count - count // 3, count]
    for begin, end in zip(edges, edges[1:]):
        window_seconds = sum(seconds[begin:end])
        if window_seconds > 0:
            speeds.append(sum(tokens[begin:end]) / window_seconds)
    return speeds


def median_speed(runs):
    """Tokens/s over all steady steps, the median of the runs."""
    speeds = [run.results.get("tokens_per_second") for run in runs]
    speeds = [speed for speed in speeds if speed]
    return statistics.median(speeds) if speeds else None


def speed_up(run, other):
    obstacles = differences(run, other, MUST_AGREE)
    if obstacles:
        return "not compared: " + ", ".join(obstacles)
    ours = median_speed([run])
    theirs = median_speed([other])
    return f"{ours / theirs:.2f}" if ours and theirs else MISSING


def speed_up_table(runs):
    """A row for each run but the one of fewest ranks, which they are compared with."""
    first = min(runs, key=ranks)
    rows = []
    for run in runs:
        if run is first:
            continue
        changes = ", ".join(differences(run, first, MAY_DIFFER))
        row = {
            "run": run.name,
            f"speed-up over {first.name}": speed_up(run, first),
            "what changed": changes or "nothing that changes speed",
            "F1": shown(run, "F1"),
            f"F1 of {first.name}": shown(first, "F1"),
        }
        rows.append(row)
    return table(conditions(runs, "By real tokens/s in the steady state."), rows)


# 6. Seeds


def seed_groups(runs):
    """Pairs of settings and the runs that have them, whatever their seed."""
    beside_the_point = ("seed", "output", "profile", "save_every", "log_every")
    groups = {}
    for run in runs:
        key = {k: v for k, v in run.arguments.items() if k not in beside_the_point}
        key["device"] = device(run)
        key["nodes x ranks"] = shape(run)
        group = groups.setdefault(json.dumps(key, sort_keys=True), (key, []))
        group[1].append(run)
    return list(groups.values())


def seeds_table(runs):
    """A row for each group of runs that differ in the seed alone."""
    groups = seed_groups(runs)
    first_key = groups[0][0]
    names = sorted({name for key, _ in groups for name in key})
    differing = [n for n in names if any(key.get(n) != first_key.get(n) for key, _ in groups)]
    rows = []
    for key, group in groups:
        what = ", ".join(f"{name} {key.get(name)}" for name in differing)
        row = {
            "group": what or "all of one kind",
            "runs": len(group),
            "seeds": ", ".join(str(argument(run, "seed")) for run in group),
        }
        for column in ("EM", "F1", "epoch s", "tokens/s", "peak GiB per rank"):
            row[column] = shown_spread(group, column)
        rows.append(row)
    others = " and the commit" if len(set(map(commit, runs))) > 1 else " alone"
    caption = f"Mean ± standard deviation over runs that differ in the seed{others}."
    return table(conditions(runs, caption), rows)


# 7. The ladder: a rung is a run with one thing more switched on


def rungs(runs):
    """In the order of their numbers, where all have one."""
    if all(run.folder.name[0].isdigit() for run in runs):
        return sorted(runs, key=lambda run: trace.natural_order(run.folder.name))
    return runs


def batches(run):
    """Tells whether two runs trained the same batches, padded or not: the seed and the real tokens
    of each step, or of each interval where the steps are not known."""
    tokens = [pair[0] for pair in run.tokens_per_step if isinstance(pair, list)]
    if not tokens:
        tokens = [interval.get("tokens") for interval in run.intervals[:FIRST_LOSSES]]
    return argument(run, "seed"), tokens


def first_losses(run):
    """{(step, tokens): loss}. A save between makes two intervals of one, which do not compare."""
    return {
        (interval.get("step"), interval.get("tokens")): interval["loss"]
        for interval in run.intervals[:FIRST_LOSSES]
        if is_number(interval.get("loss"))
    }


def loss_agreement(run, earlier):
    """The largest difference of loss from the first rung that trained the same batches."""
    losses = first_losses(run)
    if not losses:
        return MISSING
    for other in earlier:
        other_losses = first_losses(other)
        common = losses.keys() & other_losses.keys()
        if common and batches(run) == batches(other):
            largest = max(abs(losses[key] - other_losses[key]) for key in common)
            return f"{largest:.1e} from {other.name}"
    return "no earlier rung has these batches"


def ladder_table(runs):
    """A row for each rung: its speed, over the first and over the one before, and its losses."""
    runs = rungs(runs)
    rows = []
    for place, run in enumerate(runs):
        before = runs[max(place - 1, 0)]
        speeds = window_speeds(run)
        median = number(statistics.median(speeds) if speeds else None)
        if len(speeds) > 1:
            median += f" ({number(min(speeds))} to {number(max(speeds))})"
        row = {
            "rung": run.name,
            "what changed": ", ".join(differences(run, before, MAY_DIFFER)) or "-",
            "tokens/s": median,
            "all steady steps": shown(run, "tokens/s"),
            "over the first": speed_up(run, runs[0]),
            "over the one before": speed_up(run, before),
            "MFU": shown(run, "MFU"),
            "peak GiB per rank": shown(run, "peak GiB per rank"),
            "padding": shown(run, "padding"),
            "warm-up s": shown(run, "warm-up s"),
            "loss differs by": loss_agreement(run, runs[:place]),
            "F1": shown(run, "F1"),
        }
        rows.append(row)
    caption = f"""Real tokens/s: the median of three windows of the steady steps (least to most),
    and over all of them, which the ratios take: a window of few steps may miss a long batch. Loss:
    the largest difference over the first {FIRST_LOSSES} log intervals."""
    return table(conditions(runs, caption), rows)


# 8. Scaling


def batch_rule(run, smallest):
    """Strong: the batch of 1x1. Growing: it grows with the ranks. The folder's name says which."""
    named = re.match(r"strong|growing", run.folder.name)
    if named:
        return named.group()
    return "growing" if (batch_size(run) or 0) > smallest else "strong"


def scaling_groups(runs):
    """{(batch rule, shape): runs}, strong first, few ranks first."""
    smallest = min(batch_size(run) or 0 for run in runs)
    groups = collections.defaultdict(list)
    for run in sorted(runs, key=lambda run: (ranks(run), shape(run))):
        groups[batch_rule(run, smallest), shape(run)].append(run)
    strong_first = sorted(groups.items(), key=lambda group: group[0][0] == "growing")
    return dict(strong_first)


def speed_of_1x1(groups, rule, run):
    """Tokens/s of the 1x1 runs with the same batch (strong), or the same per rank (growing)."""
    batch = batch_size(run) or 0
    if rule == "growing":
        batch /= ranks(run)
    must_agree = {name: field for name, field in MUST_AGREE.items() if name != "batch"}
    for (_, grid), group in groups.items():
        if grid != "1x1" or batch_size(group[0]) != batch:
            continue
        if not differences(run, group[0], must_agree):
            return median_speed(group)
    return None


def scaling_table(runs):
    """A row for each batch rule and shape: speed-up over 1x1, and that by rank, the efficiency."""
    groups = scaling_groups(runs)
    rows = []
    for (rule, grid), group in groups.items():
        count = ranks(group[0])
        ours = median_speed(group)
        base = speed_of_1x1(groups, rule, group[0])
        gain = ours / base if ours and base else None
        row = {
            "batch rule": rule,
            "nodes x ranks": grid,
            "batch": together(map(batch_size, group)),
            "runs": len(group),
            "epoch s": shown_spread(group, "epoch s"),
            "tokens/s": shown_spread(group, "tokens/s"),
            "tokens/s per rank": ours / count if ours else None,
            "speed-up": f"{gain:.2f}" if gain else "no 1x1 to compare with",
            "efficiency": percent(gain / count if gain else None),
            "exposed communication": "-",
            "all-reduce GB/s": "-",
            "F1": shown_spread(group, "F1"),
        }
        if count > 1:
            links = [run.results.get("all_reduce") or {} for run in group]
            speeds = [link.get("gigabytes_per_second") for link in links]
            row["exposed communication"] = spread(map(exposed_share, group), percent)
            row["all-reduce GB/s"] = spread(speeds)
        rows.append(row)
    caption = """Mean ± standard deviation of the repeats; per rank, speed-up and efficiency by
    their medians. Strong: 1x1's global batch, the same training. Growing: 1x1's batch on each rank:
    the batch differs from row to row, and F1 with it."""
    return table(conditions(runs, caption), rows)


# 9. Strategies


def bytes_per_parameter(run):
    """Of a rank's states in fp32: weights 4, gradients 4, Adam's two moments 8; a shard is 1/n."""
    n = ranks(run)
    formulas = {
        "zero2": 4 + 16 / n,  # all sharded, and the weights kept gathered besides
        "fsdp": 16 / n,
        "hsdp": 16 / (n / nodes(run)),  # sharded within a node
    }
    return formulas.get(argument(run, "strategy"), 16)


def strategies_table(runs):
    """A row for each run: its speed, its communication, and its memory beside the formula's."""
    rows = []
    for run in runs:
        states = bytes_per_parameter(run) * (run.results.get("parameters") or 0) / 2**30
        row = {
            "strategy": argument(run, "strategy") or "one rank",
            "run": run.name,
            "nodes x ranks": shape(run),
            "epoch s": shown(run, "epoch s"),
            "tokens/s": shown(run, "tokens/s"),
            "over the first": speed_up(run, runs[0]),
            "exposed communication": percent(exposed_share(run)),
            "states by formula, GiB per rank": states or None,
            "peak GiB per rank": shown(run, "peak GiB per rank"),
            "F1": shown(run, "F1"),
        }
        rows.append(row)
    caption = """States: weights, gradients and Adam's moments in fp32, computed, not measured; the
    peak is measured, with activations and buffers in it."""
    return table(conditions(runs, caption), rows)


# 10. Evaluations and answers


def evaluations_table(runs):
    """A row for each time that a run was evaluated."""
    rows = []
    for run in runs:
        for evaluation in run.evaluations:
            row = {
                "run": run.name,
                "step": evaluation.get("step"),
                "epoch": evaluation.get("epoch"),
                "training s": evaluation.get("train_seconds"),
            }
            for column, field in {"EM": "exact_match", "F1": "f1"}.items():
                score = evaluation.get(field)
                row[column] = MISSING if score is None else two_decimals(score)
            rows.append(row)
    caption = "Percent, on the validation file; training s: until then."
    return table(conditions(runs, caption), rows)


def answers_table(runs):
    """The last scores, beside the paper's, and below them what is odd about a run."""
    caption = "Percent, on the validation file, after the last step."
    make = table_of(caption, "run", "EM", "F1", "the BERT paper's EM / F1", "scorer")
    return "\n\n".join([make(runs), *(text for run in runs for text in warnings(run))])


# 11. Time to F1

F1_GOALS = (80, 85, 88)
NOT_TRAINED = "not trained"


def schedule_seconds(run):
    """The training's seconds, over all lives of the run; a run of --epochs 0 has none."""
    seconds = run.results.get("train_seconds")
    return NOT_TRAINED if seconds == 0 else seconds


def scores_by_time(run):
    """Pairs of the training's seconds until an evaluation, and its F1, in their order."""
    pairs = [(each.get("train_seconds"), each.get("f1")) for each in run.evaluations]
    return [
        (seconds, f1)
        for seconds, f1 in pairs
        if is_number(seconds) and is_number(f1) and seconds > 0
    ]


def seconds_to(run, goal):
    """The training's seconds at the first evaluation with such an F1: it may fall again later."""
    if schedule_seconds(run) == NOT_TRAINED:
        return NOT_TRAINED
    scores = scores_by_time(run)
    for seconds, f1 in scores:
        if f1 >= goal:
            return seconds
    return "not reached" if scores else None


def time_to_f1_table(runs):
    """A row for each run: the whole schedule's seconds and F1, then the seconds to each goal."""
    rows = []
    for run in runs:
        row = {
            "run": run.name,
            "nodes x ranks": shape(run),
            "settings": settings(run),
            "batch": batch_size(run),
            "whole schedule s": schedule_seconds(run),
            "final F1": shown(run, "F1"),
        }
        for goal in F1_GOALS:
            row[f"s to F1 {goal}"] = seconds_to(run, goal)
        rows.append(row)
    caption = """Seconds of training, over all lives of a run, evaluations out. The whole schedule with
    its final F1 is the headline: the others are those of the first evaluation that reached an F1,
    and evaluations come once an epoch, at learning rates that have not decayed yet, so a shorter
    schedule may get there sooner."""
    return table(conditions(runs, caption), rows)


def record_settings(run):
    """What has to be known to train the same again."""
    length = f"{argument(run, 'epochs')} epochs"
    if argument(run, "max_steps"):
        length = f"{argument(run, 'max_steps')} steps"
    parts = [
        model(run),
        data(run),
        length,
        f"batch {number(batch_size(run))}",
        f"learning rate {number(argument(run, 'learning_rate'))}",
        settings(run),
    ]
    return ", ".join(parts)


def record_row(run):
    """{column: value} of README.md's record table."""
    folder = run.folder.resolve()
    files = run.name
    if folder.is_relative_to(ROOT):
        link = str(folder.relative_to(ROOT)).replace(" ", "%20")
        files = f"[{run.name}]({link})"
    values = [
        record_settings(run),
        f"{shape(run)} {device(run)}",
        schedule_seconds(run),
        shown(run, "EM"),
        shown(run, "F1"),
        commit(run),
        files,
    ]
    return dict(zip(RECORD_COLUMNS, values, strict=True))


# 12. Traces and phases


@functools.cache
def recorded_traces(folder):
    """Returns {rank: what its trace says} of a run's folder."""
    try:
        return trace.read_traces(folder)
    except (OSError, ValueError) as error:
        raise Problem(str(error)) from error


def read_traces(run):
    """As recorded, but without a GPU's that hold no kernels: they tell of the host alone."""
    traces = recorded_traces(run.folder)
    if not used_gpu(run):
        return traces
    return {rank: traces[rank] for rank in traces if traces[rank]["place"] == "GPU"}


def missing_kernels(run):
    """In words: whose traces say nothing of the GPU, and why that may be; empty if all do."""
    traces = read_traces(run)
    silent = [str(rank) for rank in recorded_traces(run.folder) if rank not in traces]
    if not silent:
        return ""
    return (
        f"{run.name}: no GPU kernels were recorded in the trace of rank {', '.join(silent)}, so "
        f"what the GPU did is {MISSING}. The usual reasons: no CUPTI permission (the log says "
        "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES; the machine's administrators can set "
        "NVreg_RestrictProfilingToAdminUsers=0), another profiler holds the GPU (DCGM, nsys), or "
        "PyTorch's profiler was built without CUPTI."
    )


def exposed_share(run):
    """Exposed communication's share of the step; from the traces where train.py cannot tell."""
    if "exposed_communication" not in run.phases:
        return None
    share = (run.phases["exposed_communication"] or {}).get("share")
    if share is not None:
        return share
    shares = []
    for rank_trace in read_traces(run).values():
        if rank_trace["communication in all"]:
            shares.append(rank_trace["exposed communication"])
    return statistics.mean(shares) if shares else None


def seconds_per_step(run):
    """In the steady state."""
    steps = 0
    before = 0
    for interval in run.intervals:
        if interval.get("steady"):
            steps += interval["step"] - before
        before = interval["step"]
    return sum(steady_values(run, "seconds")) / steps if steps else None


def phase_rows(runs):
    """Pairs of a name and {phase: (seconds per step or None, share of the step)}: of the run, then
    of each rank by its trace."""
    found = []
    for run in runs:
        seconds = seconds_per_step(run)
        phases = {}
        for phase in PHASES:
            if phase not in run.phases:
                continue
            share = (run.phases[phase] or {}).get("share")
            if phase == "exposed_communication":
                share = exposed_share(run)
            phases[phase] = (seconds * share if seconds and share else None, share)
        if run.phases:
            found.append((run.name, phases))
        traces = read_traces(run)
        if len(traces) == 1 and run.phases:
            continue
        for rank, rank_trace in traces.items():
            phases = {}
            for phase, spent in rank_trace["phases"].items():
                phases[phase] = (spent, spent / rank_trace["seconds"])
            found.append((f"{run.name}, rank {rank} (trace)", phases))
    return found


def phases_table(runs):
    """A row for each run and rank: milliseconds of a step, and its share."""
    found = phase_rows(runs)
    columns = [phase for phase in PHASES if any(phase in phases for _, phases in found)]
    rows = []
    for name, phases in found:
        row = {"run": name}
        for phase in columns:
            seconds, share = phases.get(phase, (None, None))
            text = f"{number(1000 * seconds)} ms, " if seconds else ""
            row[phase.replace("_", " ")] = text + percent(share)
        rows.append(row)
    caption = "A step in the steady state (by trace: with the profiler on): time, and share of it."
    parts = [table(conditions(runs, caption), rows)]
    for run in runs:
        beside = [
            f"{name} {number(phase['seconds'])} s ({percent(phase['share'])})"
            for name, phase in run.phases.items()
            if name not in PHASES
        ]
        if beside:
            parts.append(f"Beside the steps of {run.name}: {', '.join(beside)}.")
    return "\n\n".join(parts)


def parts_of_step(traces):
    """Rows of the shares of computing, exposed communication and idle, of each rank."""
    rows = []
    for rank, rank_trace in traces.items():
        row = {"rank": str(rank), "ms a step": 1000 * rank_trace["seconds"]}
        for part in ("computing", "exposed communication", "idle", "communication in all"):
            row[part] = percent(rank_trace[part])
        rows.append(row)
    return rows


def top_operators(traces):
    """Rows of the operators with the most self time over all ranks, in milliseconds per step."""
    total = collections.Counter()
    for rank_trace in traces.values():
        total.update(rank_trace["operators"])
    seconds = sum(rank_trace["seconds"] for rank_trace in traces.values())
    rows = []
    for name, spent in total.most_common(10):
        short = name.removeprefix("autograd::engine::evaluate_function: ")[:60]
        row = {"operator": f"`{short}`", "share of the step": percent(spent / seconds)}
        times = [1000 * rank_trace["operators"].get(name, 0) for rank_trace in traces.values()]
        if len(traces) > 4:
            row["least, ms"] = min(times)
            row["mean, ms"] = statistics.mean(times)
            row["most, ms"] = max(times)
        else:
            for rank, milliseconds in zip(traces, times):
                row[f"rank {rank}, ms"] = milliseconds
        rows.append(row)
    return rows


def largest_gaps(traces):
    """Rows of each rank's longest times with neither computing nor communication."""
    rows = []
    for rank, rank_trace in traces.items():
        for gap in rank_trace["gaps"][: 5 if len(traces) == 1 else 2]:
            host = ", ".join(f"{name} {number(ms)} ms" for name, ms in gap["host"])
            row = {
                "rank": str(rank),
                "ms": gap["ms"],
                "step": gap["step"],
                "phase": gap["phase"],
                "what the host did in it": host,
            }
            rows.append(row)
    return rows


def trace_table(runs):
    """Three tables for each run: parts of the step, operators, gaps."""
    parts = []
    for run in runs:
        traces = read_traces(run)
        if not recorded_traces(run.folder):
            parts.append(f"{run.name}: no trace in its tensorboard folder, so {MISSING}.")
        if missing_kernels(run):
            parts.append(missing_kernels(run))
        if not traces:
            continue
        first = next(iter(traces.values()))
        place = first["place"]
        where = f"in {first['steps']} profiled steps of {run.name} (the profiler slows them)."
        what = f"What the {place} did {where}"
        parts.append(table(conditions([run], what), parts_of_step(traces)))
        what = f"The ten operators with the most self time on the {place}, per step, {where}"
        parts.append(table(conditions([run], what), top_operators(traces)))
        what = f"The largest gaps, with neither computing nor communication, {where}"
        parts.append(table(conditions([run], what), largest_gaps(traces)))
    return "\n\n".join(parts)


# 13. The environment

# What the launcher asks of nvidia-smi, in this order: into a file before the run, another after.
NVIDIA_SMI_FIELDS = [
    "name",
    "driver",
    "power limit",
    "power",
    "SM clock",
    "highest SM clock",
    "memory clock",
    "temperature",
    "throttle reasons",
]
# NVML's bits of clocks_throttle_reasons.active, the lowest first.
THROTTLE_REASONS = [
    "idle",
    "application clocks",
    "power cap",
    "hardware slowdown",
    "sync boost",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "power brake",
    "display clocks",
]


def read_text(path):
    """What the launcher left in a file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def throttle_reasons(mask):
    """0x4 -> power cap; None where it is no mask."""
    if not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", mask):
        return None
    bits = int(mask, 16)
    reasons = [name for bit, name in enumerate(THROTTLE_REASONS) if bits >> bit & 1]
    return " and ".join(reasons) or "none"


def read_nvidia_smi(path):
    """Returns a dict for each GPU, of what nvidia-smi could tell; an odd line as {"odd": line}."""
    gpus = []
    for line in read_text(path).splitlines():
        cells = [part.strip() for part in line.split(",")]
        if not line.strip() or cells[0] == "name":
            continue
        if len(cells) != len(NVIDIA_SMI_FIELDS):
            gpus.append({"odd": f"nvidia-smi said: {line.strip()[:200]}"})
            continue
        gpu = dict(zip(NVIDIA_SMI_FIELDS, cells))
        gpu["throttle reasons"] = throttle_reasons(gpu["throttle reasons"])
        if re.fullmatch(r"-?\d+", gpu["temperature"]):
            gpu["temperature"] += " °C"
        # It answers [N/A], [Not Supported] or [Unknown Error] for what it cannot tell.
        gpus.append({k: v for k, v in gpu.items() if v and not v.startswith(("[", "N/A"))})
    return gpus


def gpu_state(gpu):
    if "odd" in gpu:
        return gpu["odd"]
    names = ("power", "SM clock", "highest SM clock", "memory clock")
    names += ("temperature", "throttle reasons")
    return ", ".join(f"{name} {gpu[name]}" for name in names if name in gpu)


def gpu_states(gpus):
    """One text for all GPUs, or each by its number where they differ."""
    states = list(map(gpu_state, gpus))
    if len(set(states)) <= 1:
        return "".join(states[:1])
    return "; ".join(f"GPU {index}: {state}" for index, state in enumerate(states))


def node_shared(run):
    """Whether other jobs had CPUs of the first node: squeue may hide the jobs, never the CPUs."""
    text = read_text(run.folder / "slurm-node.txt")
    allocated = re.search(r"\bCPUAlloc=(\d{1,9})\b", text)
    own = re.search(r"\bSLURM_JOB_CPUS_PER_NODE=(\d{1,9})", text)
    if not allocated or not own:
        return ""
    others = int(allocated[1]) - int(own[1])
    return f"yes, they have {others} of its CPUs" if others > 0 else "no"


def launcher_fields(run):
    """What the launcher left beside results.json: the state of the GPUs and of the node."""
    before = read_nvidia_smi(run.folder / "nvidia-smi-before.csv")
    after = read_nvidia_smi(run.folder / "nvidia-smi-after.csv")
    known = before or after
    return {
        "GPU driver": listed([gpu["driver"] for gpu in known if "driver" in gpu]),
        "GPU power limit": listed([gpu["power limit"] for gpu in known if "power limit" in gpu]),
        "GPUs before the run": gpu_states(before),
        "GPUs after the run": gpu_states(after),
        "node shared with other jobs": node_shared(run),
    }


def environment_table(runs):
    """A row for each field, a column for each run."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    fields = {
        "finished": [run.results.get("finished_at") for run in runs],
        "command": [f"`{run.results.get('command') or MISSING}`" for run in runs],
    }
    for name in names:
        values = [listed(run.environment.get(name)) or "-" for run in runs]
        fields[name.replace("_", " ")] = values
    from_launcher = [launcher_fields(run) for run in runs]
    for name in from_launcher[0]:
        values = [found[name] for found in from_launcher]
        if any(values):
            fields[name] = [value or "-" for value in values]
    columns = [run.name for run in runs]
    if len(runs) > 4:
        # Too wide a table: what they have in common, or how many values differ.
        columns = ["all runs"]
        fields = {name: [together(map(cell, values))] for name, values in fields.items()}
    rows = [{"": name, **dict(zip(columns, values))} for name, values in fields.items()]
    return table("The machine, the versions and the command of each run.", rows)


# 14. Energy, from what the launchers sample of nvidia-smi's power (power.sh)

# Between two samples, in seconds: where it is longer, nothing was sampled.
LONGEST_GAP = 5
# The share of the training that has to be sampled.
LEAST_SAMPLED = 0.95


def read_power(folder):
    """{a file and its GPU: pairs of seconds since 1970 and watts, in their order}."""
    gpus = collections.defaultdict(list)
    for path in folder.glob("power-*.csv"):
        for line in read_text(path).splitlines():
            try:
                time, gpu, watts = line.split(", ")
                moment = datetime.datetime.strptime(f"{time} +0000", "%Y/%m/%d %H:%M:%S.%f %z")
                sample = (moment.timestamp(), float(watts))
            except ValueError:
                continue  # [N/A], an error's text, or the torn line of a node that died
            if is_number(sample[1]):
                gpus[path.name, gpu].append(sample)
    return {gpu: sorted(samples) for gpu, samples in gpus.items()}


def ends_of_intervals(folder):
    """{step: seconds since 1970} of the log intervals' ends, from TensorBoard's events.

    A life has a file of its own, which begins with the step that it went on from. What an earlier
    life did after that step is lost, and done again; the event of that step itself is written a
    second time, and its first one counts."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ImportError:
        complain(f"{folder}: energy needs the package tensorboard: source baseline/env.sh")
        return {}
    ends = {}
    files = sorted((folder / "tensorboard").glob("events.out.tfevents.*"), key=trace.natural_order)
    for path in files:
        begins_at = 0
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):
                begins_at = event.step
            tags = [value.tag for value in event.summary.value]
            if "training/loss" in tags and event.step > begins_at:
                ends[event.step] = event.wall_time
    return ends


def integrate(samples, begin, end):
    """Returns joules and sampled seconds of one GPU between two moments, by the trapezoid rule."""
    joules = 0.0
    seconds = 0.0
    place = max(bisect.bisect(samples, (begin,)) - 1, 0)
    for (time, watts), (next_time, next_watts) in zip(samples[place:], samples[place + 1 :]):
        if time >= end:
            break
        overlap = min(end, next_time) - max(begin, time)
        if overlap <= 0 or next_time - time > LONGEST_GAP:
            continue
        middle = (min(end, next_time) + max(begin, time)) / 2
        slope = (next_watts - watts) / (next_time - time)
        joules += overlap * (watts + slope * (middle - time))
        seconds += overlap
    return joules, seconds


def energy(run):
    """Returns the joules of all GPUs in the log intervals, and the share of the GPUs' time in them
    that was sampled. The mean power stands for the rest; where it is much, joules are None."""
    gpus = read_power(run.folder) if used_gpu(run) else {}
    ends = ends_of_intervals(run.folder) if gpus else {}
    if not ends:
        return None, None
    joules = 0.0
    sampled = 0.0
    training = 0.0
    for interval in run.intervals:
        training += interval["seconds"]
        end = ends.get(interval["step"])
        if end is None:
            continue
        for samples in gpus.values():
            spent, seconds = integrate(samples, end - interval["seconds"], end)
            joules += spent
            sampled += seconds
    # dp is one rank with several GPUs.
    count = len(gpus) if argument(run, "strategy") == "dp" else ranks(run)
    share = sampled / (training * count)
    # More than all: of GPUs that were not the run's.
    if not LEAST_SAMPLED <= share <= 2 - LEAST_SAMPLED:
        return None, share
    return joules / share, share


def energy_table(runs):
    """A row for each run: its joules beside its seconds, and the real tokens that one trains."""
    rows = []
    for run in runs:
        joules, share = energy(run)
        tokens_per_joule = None
        if joules:
            tokens_per_joule = sum(interval["tokens"] for interval in run.intervals) / joules
        row = {
            "run": run.name,
            "nodes x ranks": shape(run),
            "training s": schedule_seconds(run),
            "joules": joules,
            "real tokens per joule": tokens_per_joule,
            "sampled": percent(share),
            "F1": shown(run, "F1"),
        }
        rows.append(row)
    caption = f"""Joules: of the GPUs' boards alone, by nvidia-smi's power once a second (A100 and
    older: at that moment, newer ones: the mean of a second), integrated over the steps; saves and
    evaluations out. Sampled: the share of the steps' time; the mean power stands for the rest, and
    under {100 * LEAST_SAMPLED:.0f} % there are no joules."""
    return table(conditions(runs, caption), rows)


# 15. Charts, in the mermaid that GitHub draws


def speed_chart(runs):
    title = "Real tokens a second, all steady steps"
    speeds = {run.name: median_speed([run]) for run in runs if median_speed([run])}
    if not speeds:
        return f"{title}: {MISSING}."
    return xychart(title, list(speeds), "tokens/s", ("bar", list(speeds.values())))


def ladder_chart(runs):
    return speed_chart(rungs(runs))


def scaling_chart(runs):
    groups = scaling_groups(runs)
    charts = []
    for chart_rule in ("strong", "growing"):
        speeds = {}
        ideals = {}
        for (rule, grid), group in groups.items():
            ours = median_speed(group)
            base = speed_of_1x1(groups, rule, group[0])
            if rule == chart_rule and ours and base:
                speeds[grid] = ours
                ideals[grid] = base * ranks(group[0])
        if speeds:
            title = f"{chart_rule}: tokens a second (bars), and 1x1's times the ranks (line)"
            bars = ("bar", speeds.values())
            line = ("line", ideals.values())
            charts.append(xychart(title, list(speeds), "tokens/s", bars, line))
    return "\n\n".join(charts) or f"Scaling: no 1x1 to compare with, so {MISSING}."


def phases_chart(runs):
    charts = []
    for name, phases in phase_rows(runs):
        shares = {phase: share for phase, (_, share) in phases.items()}
        slices = {phase: share for phase, share in shares.items() if is_number(share) and share > 0}
        if not slices:
            continue
        # mermaid takes no slice of zero.
        slices["the rest"] = max(1 - sum(slices.values()), 1e-4)
        lines = [f"    title {label(name)}: percent of a step"]
        colours = {}
        for place, (phase, share) in enumerate(slices.items(), 1):
            lines.append(f'    "{phase.replace("_", " ")}" : {100 * share:.2f}')
            colours[f"pie{place}"] = trace.COLOURS[phase]
        charts.append(mermaid({"themeVariables": colours}, "pie showData", *lines))
    return "\n\n".join(charts) or f"Phases: {MISSING}."


def tokens_chart(runs):
    charts = []
    for run in runs:
        pairs = run.tokens_per_step[:60]
        if len(pairs) > 1:
            real, computed = zip(*pairs)
            title = f"{run.name}: tokens a step, computed (blue) and real (red)"
            charts.append(xychart(title, len(pairs), "tokens", ("line", computed), ("line", real)))
    return "\n\n".join(charts) or f"Tokens a step: {MISSING}."


# Paul Tol's bright colours, with their names, as mermaid draws no legend.
COLOUR_NAMES = {
    "blue": "#4477aa",
    "red": "#ee6677",
    "green": "#228833",
    "yellow": "#ccbb44",
    "cyan": "#66ccee",
    "purple": "#aa3377",
}
# The points of a line: mermaid spreads them evenly over the axis.
POINTS = 60


def f1_at(scores, seconds, before):
    """The F1 of the last evaluation until then; `before`, where there is none yet."""
    known = [f1 for time, f1 in scores if time <= seconds]
    return known[-1] if known else before


def f1_lines(scores_of_runs):
    """One chart of F1 against the training's seconds. scores_of_runs: {name: scores_by_time}."""
    all_scores = [score for scores in scores_of_runs.values() for score in scores]
    # A little longer than the longest run, so that its last score is seen.
    longest = 1.05 * max(seconds for seconds, _ in all_scores)
    bottom = 10 * max(math.ceil(min(f1 for _, f1 in all_scores) / 10) - 1, 0)
    top = 10 * max(math.ceil(max(f1 for _, f1 in all_scores) / 10), 1)
    lines = [
        '    title "F1 of the last evaluation, against the training\'s seconds"',
        f'    x-axis "seconds" 0 --> {longest:.{0 if longest >= 100 else 3}f}',
        f'    y-axis "F1" {bottom} --> {top}',
    ]
    for scores in scores_of_runs.values():
        points = [f1_at(scores, longest * k / POINTS, bottom) for k in range(POINTS + 1)]
        lines.append(f"    line [{', '.join(f'{point:.2f}' for point in points)}]")
    colours = list(COLOUR_NAMES.values())[: len(scores_of_runs)]
    chart = mermaid(xychart_theme(*colours), "xychart-beta", *lines)
    legend = [f"{colour}: {cell(name)}" for colour, name in zip(COLOUR_NAMES, scores_of_runs)]
    return f"{chart}\n\n{'; '.join(legend)}. At the bottom until a run's first evaluation."


def time_to_f1_chart(runs):
    scores = {run.name: scores_by_time(run) for run in runs if scores_by_time(run)}
    if not scores:
        return f"F1 against seconds: {MISSING}."
    names = list(scores)
    most = len(COLOUR_NAMES)
    parts = [names[first : first + most] for first in range(0, len(names), most)]
    return "\n\n".join(f1_lines({name: scores[name] for name in part}) for part in parts)


# 16. A measurement's own tables


def measured_table(path, content):
    """content: {"title", "conditions", "columns", "rows", "environment"}."""
    try:
        columns = list(map(cell, content["columns"]))
        rows = [dict(zip(columns, row, strict=True)) for row in content["rows"]]
    except ODD_VALUES as error:
        form = '{"title", "conditions", "columns": [...], "rows": [[...]]}'
        raise Problem(
            f"{path}: wants {form}, each row of as many cells as columns: measure again"
        ) from error
    machine = content.get("environment") or {}
    if not isinstance(machine, dict):
        machine = {"environment": machine}
    parts = [listed(content.get("conditions"))]
    for name, value in machine.items():
        if value is not None:
            parts.append(f"{name.replace('_', ' ')} {listed(value)}")
    caption = "; ".join(filter(None, parts))
    title = f"**{cell(content.get('title') or path.stem)}**"
    return title + "\n\n" + table(caption + "." if caption else f"Conditions {MISSING}.", rows)


def measured_tables(names):
    parts = []
    for path in map(pathlib.Path, names):
        if not path.is_file():
            raise Problem(f"{path}: no such file; give the JSON that the measuring script wrote")
        found = read_json(path, (dict, list))
        for content in found if isinstance(found, list) else [found]:
            parts.append(measured_table(path, content))
    return "\n\n".join(parts)


# 17. The full report

TABLES = {
    "runs": table_of(
        "One row per run.",
        *("run", "nodes x ranks", "settings", "batch", "epoch s", "training s", "tokens/s", "MFU"),
        *("padding", "peak GiB per rank", "EM", "F1"),
    ),
    "times": table_of(
        "Seconds; the first is the headline, an epoch's real tokens at the steady tokens/s. "
        "Preparing, evaluating and in all: of the last start.",
        *("run", "epoch s", "training s", "warm-up s", "preparing s", "evaluating s", "in all s"),
        *("each epoch s", "features cached", "resumed from"),
    ),
    "throughput": table_of(
        "Steady state: without warm-up, the profiler's steps, and saves and waits for them; "
        "real tokens only.",
        *("run", "tokens/s", "features/s", "padding", "MFU", "peak GiB per rank"),
        *("nodes x ranks", "steps"),
    ),
    "memory": table_of(
        "The most memory that a rank held at any time; on a CPU that of its process.",
        *("run", "nodes x ranks", "settings", "features per rank and micro-batch"),
        *("parameters", "peak GiB per rank"),
    ),
    "answers": answers_table,
    "evaluations": evaluations_table,
    "time-to-f1": time_to_f1_table,
    "energy": energy_table,
    "environment": environment_table,
    "speed-up": speed_up_table,
    "seeds": seeds_table,
    "ladder": ladder_table,
    "scaling": scaling_table,
    "strategies": strategies_table,
    "phases": phases_table,
    "trace": trace_table,
}
CHARTS = {
    "runs": speed_chart,
    "scaling": scaling_chart,
    "phases": phases_chart,
    "tokens": tokens_chart,
    "ladder": ladder_chart,
    "time-to-f1": time_to_f1_chart,
}
MEASURED = ["bench", "growth", "faults", "seeds-paired", "measured", "predicted"]


def section(title, *parts):
    return "\n\n".join([f"## {title}", *parts])


def comparisons(runs):
    """{table: its runs}: ladder and scaling by the runs' names, the others by what differs."""
    groups = {"ladder": [], "scaling": []}
    others = []
    for run in runs:
        if re.match(r"\d+-", run.folder.name):
            groups["ladder"].append(run)
        elif re.match(r"(strong|growing)-\d+x\d+", run.folder.name):
            groups["scaling"].append(run)
        else:
            others.append(run)
    distributed = [run for run in others if argument(run, "strategy")]
    if len({argument(run, "strategy") for run in distributed}) > 1:
        groups["strategies"] = distributed
    if len({argument(run, "seed") for run in others}) > 1:
        groups["seeds"] = others
    if not groups.keys() & {"strategies", "seeds"}:
        groups["speed-up"] = others
    return {name: group for name, group in groups.items() if len(group) > 1}


def full_report(runs):
    parts = ["# Report"]
    for name in ("environment", "times", "throughput", "answers"):
        parts.append(section(name.capitalize(), TABLES[name](runs)))
    several = [run for run in runs if len(run.evaluations) > 1]
    if several:
        parts.append(section("Evaluations", evaluations_table(several)))
    evaluated = [run for run in runs if scores_by_time(run)]
    if evaluated:
        chart = [time_to_f1_chart(several)] if several else []
        parts.append(section("Time to F1", time_to_f1_table(evaluated), *chart))
    sampled = [run for run in runs if read_power(run.folder)]
    if sampled:
        parts.append(section("Energy", energy_table(sampled)))
    for name, group in comparisons(runs).items():
        chart = CHARTS.get(name, speed_chart)
        parts.append(section(name.capitalize(), TABLES[name](group), chart(group)))
    parts.append(section("Phases", phases_table(runs)))
    if len(runs) < 3:
        parts.append(phases_chart(runs))
    if len(runs) < 5:
        traced = [run for run in runs if recorded_traces(run.folder)]
        if traced:
            parts.append(section("Traces", trace_table(traced)))
    return "\n\n".join(parts)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"{', '.join(TABLES)}; for FILE.json {', '.join(MEASURED)}"
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders that train.py left")
    parser.add_argument("--table", choices=[*TABLES, *MEASURED], metavar="NAME", help=names)
    parser.add_argument("--chart", choices=CHARTS, metavar="NAME", help=", ".join(CHARTS))
    parser.add_argument("--record", action="store_true", help="a row of the record table per RUN")
    parser.error = refuse
    options = parser.parse_args()
    if not options.runs:
        raise Problem("no RUN: give the folder of a finished run")
    return options


def build(options):
    """Returns the Markdown that the command line asks for."""
    if options.table in MEASURED:
        return measured_tables(options.runs)
    runs = load_runs(options.runs)
    if options.record:
        return "\n".join(table_row(record_row(run).values()) for run in runs)
    parts = []
    if options.table:
        parts.append(TABLES[options.table](runs))
    if options.chart:
        parts.append(CHARTS[options.chart](runs))
    return "\n\n".join(parts) or full_report(runs)


def main():
    try:
        options = parse_arguments()
        print(build(options))
    except Problem as problem:
        sys.exit(complain(problem))
    except ODD_VALUES as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        names = " ".join(options.runs)
        sys.exit(complain(f"{names}: a value is not as train.py writes it ({reason}): run again"))


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    # Ends quietly when `head` has read enough.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()

"""Counts what each strategy sends and keeps, on gloo ranks of this machine's CPU. As root:

    unshare -n bash -c 'ip link set lo up && python DISTRIBUTED/benchmarks/sent.py'

In a network namespace of its own, so that nothing else uses its loopback interface, which is read
too. Writes DISTRIBUTED/results/sent.json and collectives.json, for report.py --table measured.

By a ring each of n ranks sends (n - 1) / n of the bytes of an all-gather or a reduce-scatter, and
twice as much of an all-reduce, which is one of each (Patarasuk and Yuan 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations"; nccl-tests, doc/PERFORMANCE.md). Which of them
a strategy takes: Rajbhandari et al. 2020, "ZeRO", section 7; Zhao et al. 2023, "PyTorch FSDP".
"""

import argparse
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "baseline/benchmarks"))
sys.path.append(str(ROOT / "baseline/tests"))
sys.path.append(str(ROOT / "DISTRIBUTED/tests"))

import measuring
import torch
import transformers
from nursery import Nursery
from ranks import DISTRIBUTED, SIGNAL, Ranks, ask_after

RESULTS = ROOT / "DISTRIBUTED/results"
SAMPLE = ROOT / "baseline/sample"
NODES = 2
STEPS = 6
WORDS = ["--sample", "--limit", "40", "--device", "cpu", "--no-profile", "--log-every", "1"]
WORDS += ["--batch-size", "16"]
COUNT = f"""
sys.path.append({str(Path(__file__).parent)!r})
import counting
counting.begin(globals())
"""
CASES = [("ddp", "fp32"), ("ddp", "bf16"), ("zero2", "fp32"), ("zero2", "bf16")]
CASES += [("fsdp", "fp32"), ("fsdp", "bf16"), ("hsdp", "fp32"), ("hsdp", "bf16")]
# Of PowerSGD, as DISTRIBUTED/README.md's diff sets it: its rank, and exact steps before it begins.
POWERSGD_RANK = 4
POWERSGD_START = 10
POWERSGD = f"PowerSGD, rank {POWERSGD_RANK}"
# Those that differ outside the step: zero2 is as fsdp there.
GROWING = ["ddp", "fsdp", "hsdp"]
WORLDS = [2, 4, 8, 16]
BYTES = {"fp32": 4, "bf16": 2}
MB = 1e6
GIB = 2**30


# 1. By the formula


def ring(ranks):
    """Returns the share of an all-gather's or a reduce-scatter's bytes that each rank sends."""
    return (ranks - 1) / ranks


def bytes_sent(strategy, gradients, parameters, nodes, per_node):
    """Returns the bytes that each rank sends in a step, and those that leave each node: a ring in
    the order of ranks leaves each node once."""
    world = nodes * per_node
    weights = 4 * parameters
    gradient = BYTES[gradients] * parameters
    if strategy == "hsdp":
        between = 2 * ring(nodes) * gradient
        within = ring(per_node) * (2 * weights + gradient)
        return within + between / per_node, between
    of_each_strategy = {
        "ddp": 2 * gradient,
        "zero2": weights + gradient,
        "fsdp": 2 * weights + gradient,
    }
    sent = ring(world) * of_each_strategy[strategy]
    return sent, sent


def powersgd_numbers(model):
    """Returns how many numbers PowerSGD hands over in a step (Vogels et al. 2019): of a matrix
    [rows, columns] rank x (rows + columns), where that is less than half; all others whole.

    As torch has it: powerSGD_hook.py's _should_compress, with its min_compression_rate of 2."""
    total = 0
    for weight in model.parameters():
        numbers = weight.numel()
        if weight.ndim > 1:
            compressed = POWERSGD_RANK * (len(weight) + numbers // len(weight))
            if 2 * compressed < numbers:
                numbers = compressed
        total += numbers
    return total


def bytes_kept(strategy, parameters, nodes, per_node):
    """Returns the bytes of weights, gradients and Adam's two moments that each rank keeps: fp32."""
    shards = {"ddp": 1, "hsdp": per_node}.get(strategy, nodes * per_node)
    return 16 * parameters / shards


# 2. Counted


def count(ranks, world, strategy, gradients="fp32", resumed=False, script=None, steps=STEPS):
    """Trains on so many ranks of two nodes, resumed: in two lives; returns rank 0's counts of the
    last life, as counting.py has them, and the number of parameters."""
    words = [*WORDS, "--max-steps", steps, "--strategy", strategy, "--gradients", gradients]
    output = None
    if resumed:
        stop = ask_after(2, SIGNAL)
        output = ranks(world, *words, patch=stop, nodes=NODES, seconds=900).output
    scripts = [script] * world if script else None
    run = ranks.finished(
        world, *words, output=output, scripts=scripts, patch=COUNT, nodes=NODES, seconds=900
    )
    parameters = run.read("results.json")["parameters"]
    print(f"counted {strategy} {gradients} on {world} ranks", flush=True)
    return run.read("counts-0.json"), parameters


def powersgd_script(folder):
    """Returns a copy of train.py below a folder, with the page's diff for PowerSGD applied."""
    page = (ROOT / "DISTRIBUTED/README.md").read_text(encoding="utf-8")
    diff = re.search(r"^\*\*PowerSGD[^\n]*\n\n```diff\n(.*?)```", page, re.DOTALL | re.MULTILINE)[1]
    (folder / "DISTRIBUTED").mkdir(parents=True)
    (folder / "baseline").mkdir()
    (folder / "baseline/sample").symlink_to(SAMPLE)
    script = folder / "DISTRIBUTED/train.py"
    shutil.copy(DISTRIBUTED, script)
    # Without the ceiling git would take the folder for a part of a repository around it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--directory=DISTRIBUTED", "-"]
    subprocess.run(command, input=diff, text=True, cwd=folder, env=environment, check=True)
    return script


def last_call(counts, place):
    """Returns the collectives of the last call of a place: the first may set something up."""
    calls = [call for call in counts["calls"] if call["place"] == place]
    return calls[-1]["collectives"] if calls else []


def sent_by_ring(collectives):
    """Returns what a rank sends for collectives that were counted, in bytes."""
    total = 0
    for name, size, ranks in collectives:
        passes = 2 if name.startswith(("allreduce", "all_reduce")) else 1
        total += passes * ring(ranks) * size
    return total


def sent_through_loopback(counts, world):
    """Returns what a rank has sent in a step, headers included: the median of the last steps."""
    readings = counts["loopback"][-STEPS:]
    differences = [after - before for before, after in itertools.pairwise(readings)]
    return statistics.median(differences) / world


# 3. Tables


def sent_row(strategy, gradients, counts, formula, world):
    collectives = last_call(counts, "step")
    counted = sent_by_ring(collectives)
    return [
        strategy,
        gradients,
        len(collectives),
        round(sum(size for _, size, _ in collectives) / MB, 3),
        round(counted / MB, 3),
        round(formula / MB, 3),
        f"{100 * (formula / counted - 1):+.2f} %",
        round(sent_through_loopback(counts, world) / MB, 2),
    ]


def kept_row(strategy, counts, parameters, world):
    kept = counts["kept"]
    counted = kept["weights"] + kept["gradients"] + kept["moments"]
    formula = bytes_kept(strategy, parameters, NODES, world // NODES)
    return [
        strategy,
        *(round(kept[name] / MB, 3) for name in ("weights", "gradients", "moments")),
        round(formula / MB, 3),
        f"{100 * (formula / counted - 1):+.2f} %",
        round(kept["whole_after_forward"] / MB, 3),
    ]


def empty_model(config):
    """Returns a model that has shapes and no weights."""
    with torch.device("meta"):
        return transformers.BertForQuestionAnswering(config)


def bert_rows():
    """BERT-Base by the formula, on two nodes with two GPUs each and with eight each."""
    model = empty_model(transformers.BertConfig())  # its defaults are BERT-Base
    parameters = model.num_parameters()
    rows = []
    for strategy, gradients in CASES:
        row = [strategy, gradients]
        for per_node in (2, 8):
            sent, leaving = bytes_sent(strategy, gradients, parameters, NODES, per_node)
            kept = bytes_kept(strategy, parameters, NODES, per_node)
            row += [round(sent / MB), round(leaving / MB), round(kept / GIB, 2)]
        rows.append(row)
    row = ["ddp", POWERSGD]
    for per_node in (2, 8):
        numbers = powersgd_numbers(model)
        sent = 2 * ring(NODES * per_node) * 4 * numbers
        # Beside ddp's: the error that each rank remembers.
        kept = bytes_kept("ddp", parameters, NODES, per_node) + 4 * parameters
        row += [round(sent / MB), round(sent / MB), round(kept / GIB, 2)]
    rows.append(row)
    return rows, parameters


def sent_tables(ranks, script, machine):
    """Counts each strategy on 2x2 ranks, and PowerSGD's script; returns the tables."""
    world = 4
    sent = []
    kept = []
    for case in CASES:
        counts, parameters = count(ranks, world, *case)
        formula, _ = bytes_sent(*case, parameters, NODES, world // NODES)
        sent.append(sent_row(*case, counts, formula, world))
        if case[1] == "fp32":
            kept.append(kept_row(case[0], counts, parameters, world))
    counts, _ = count(ranks, world, "ddp", script=script, steps=POWERSGD_START + STEPS)
    config = transformers.AutoConfig.from_pretrained(SAMPLE)
    formula = 2 * ring(world) * 4 * powersgd_numbers(empty_model(config))
    sent.append(sent_row("ddp", POWERSGD, counts, formula, world))
    where = f"2x2 gloo ranks on one machine's CPU, the sample's BERT of {parameters:,} parameters"
    return [
        sent_table(sent, where, machine),
        kept_table(kept, where, machine),
        bert_table(machine),
    ]


def sent_table(rows, where, machine):
    return {
        "title": "What each rank sends in a step",
        "conditions": f"{where}. Handed over: the bytes of the collectives that PyTorch was seen to"
        " call, each counted whole. Sent: what a ring makes of them. Formula: from the number of"
        " parameters alone (PowerSGD: the matrices' shapes). Loopback: what its interface counted,"
        " headers and a step's agreement to go on (16 bytes) included; gloo's reduce-scatter is an"
        " all-reduce, so the sharded strategies send more there than over NCCL",
        "columns": [
            "strategy",
            "gradients",
            "collectives",
            "handed over, MB",
            "sent, MB",
            "formula, MB",
            "formula's error",
            "loopback, MB",
        ],
        "rows": rows,
        "environment": machine,
    }


def kept_table(rows, where, machine):
    return {
        "title": "What each rank keeps",
        "conditions": f"{where}; MB, counted after the optimiser's step, the same for fp32 and bf16"
        " gradients. Whole after the forward pass: the weights that a sharded strategy has been"
        " sent and not yet freed, beside its shard; in ddp the weights themselves",
        "columns": [
            "strategy",
            "weights",
            "gradients",
            "moments",
            "all, by the formula",
            "formula's error",
            "whole after the forward pass",
        ],
        "rows": rows,
        "environment": machine,
    }


def bert_table(machine):
    rows, parameters = bert_rows()
    return {
        "title": "BERT-Base, by the formula",
        "conditions": f"Predicted, not counted: {parameters:,} parameters. Sent: by each rank in a"
        " step. Leaves a node: on a ring in the order of ranks. Kept: weights, gradients and"
        " moments per rank, with PowerSGD also the error that it remembers",
        "columns": [
            "strategy",
            "gradients",
            "2x2: sent, MB",
            "leaves a node, MB",
            "kept, GiB",
            "2x8: sent, MB",
            "leaves each node, MB",
            "kept by each, GiB",
        ],
        "rows": rows,
        "environment": machine,
    }


def collectives_table(ranks, machine):
    """Counts the collectives of each part of a run on more and more ranks; returns the table."""
    rows = []
    for strategy in GROWING:
        counts = [count(ranks, world, strategy, resumed=True)[0] for world in WORLDS]
        places = list(dict.fromkeys(call["place"] for call in counts[0]["calls"]))
        for place in places:
            calls = [last_call(each, place) for each in counts]
            sizes = [sum(size for _, size, _ in collectives) for collectives in calls]
            rows.append([strategy, place, *map(len, calls), *sizes])
    return {
        "title": "Collectives of each part of a run, on more and more ranks",
        "conditions": "gloo ranks on one machine's CPU, as on two nodes; the sample's BERT, a"
        f" training of {STEPS} steps that was stopped after 2 and resumed: each part's last call"
        " in the resumed life, on rank 0. Bytes: handed over, each collective's counted whole",
        "columns": [
            "strategy",
            "part",
            *(f"calls on {world}" for world in WORLDS),
            *(f"bytes on {world}" for world in WORLDS),
        ],
        "rows": rows,
        "environment": machine,
    }


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", choices=["sent", "collectives"], help="of the two files (default: both)")
    return parser.parse_args()


def main():
    only = parse_options().only
    machine = measuring.describe_machine(measuring.load_train())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with Nursery(SQUAD_CACHE=str(folder / "cache")) as nursery:
            ranks = Ranks(nursery, folder)
            if only != "collectives":
                script = powersgd_script(folder / "powersgd")
                tables = sent_tables(ranks, script, machine)
                measuring.write_tables(RESULTS / "sent.json", tables)
            if only != "sent":
                table = collectives_table(ranks, machine)
                measuring.write_tables(RESULTS / "collectives.json", [table])


if __name__ == "__main__":
    main()

"""Measures what a slow link between two nodes costs, on .ci/slurm-cluster. As root:

    eval "$(.ci/slurm-cluster up)" && python DISTRIBUTED/benchmarks/link.py [MBIT ...]

Writes DISTRIBUTED/results/slow-link.json, for report.py --table measured. tc limits what each node
sends; then run_2x2.sbatch trains the sample with fp32 and with bf16 gradients, with a larger batch,
and with the sharded strategies. The arithmetic beside ddp: by a ring, 2 (n - 1) / n of the
gradient's bits cross each link between the n ranks, and all of that time is waited for but what
hides behind the backward pass.
Nothing else may use the cluster meanwhile: its tests call `up`, which lifts the limit.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / ".ci/slurm-cluster"
WORDS = ["--sample", "--limit", "200", "--log-every", "2", "--no-profile"]
CASES = [
    {"strategy": "ddp", "gradients": "fp32", "batch": 16},
    {"strategy": "ddp", "gradients": "bf16", "batch": 16},
    {"strategy": "ddp", "gradients": "fp32", "batch": 64},
    {"strategy": "zero2", "gradients": "fp32", "batch": 16},
    {"strategy": "fsdp", "gradients": "fp32", "batch": 16},
    {"strategy": "hsdp", "gradients": "fp32", "batch": 16},
]
COLUMNS = ["link", "strategy", "gradients", "batch", "MB of gradients", "ring's wire time, ms"]
COLUMNS += ["exposed communication, ms a step", "a step, ms", "its share", "tokens/s"]
COLUMNS += ["all-reduce GB/s"]
BYTES = {"fp32": 4, "bf16": 2}
RANKS = 4
# What of a run's environment stands in the table's caption.
MACHINE_FACTS = ["date", "commit", "dirty", "cpu", "torch", "transformers", "python"]


def limit_link(rate):
    """Lets each node send at most this many Mbit/s; 0: as much as it can."""
    words = ["slow", str(rate)] if rate else ["fast"]
    subprocess.run([CLUSTER, *words], check=True)


def train(case, rate, steps):
    """Trains on both nodes; returns results.json and timings.json."""
    name = "-".join(map(str, case.values()))
    output = f"runs/link-{rate}-{name}-{int(time.time())}"
    command = ["sbatch", "--parsable", "--wait", "-N2", "-o", f"{output}.log"]
    command += ["DISTRIBUTED/run_2x2.sbatch", *WORDS, "--max-steps", str(steps)]
    command += ["--gradients", case["gradients"], "--batch-size", str(case["batch"])]
    command += ["--strategy", case["strategy"], "--output", output]
    (ROOT / "runs").mkdir(exist_ok=True)
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    results = json.loads((ROOT / output / "results.json").read_text())
    timings = json.loads((ROOT / output / "timings.json").read_text())
    return results, timings


def steady_intervals(intervals):
    """Returns of each steady interval its steps and its seconds."""
    steady = []
    before = 0
    for interval in intervals:
        if interval["steady"]:
            steady.append((interval["step"] - before, interval["seconds"]))
        before = interval["step"]
    return steady


def count_steady(intervals):
    """Returns the steps of the steady intervals, and the seconds of all of them."""
    steps, seconds = zip(*steady_intervals(intervals))
    return sum(steps), sum(seconds)


def median_step(intervals):
    """Returns the median of the steady intervals' seconds a step."""
    return statistics.median(seconds / steps for steps, seconds in steady_intervals(intervals))


def make_row(case, rate, results, timings):
    steps, _ = count_steady(timings["intervals"])
    size = results["parameters"] * BYTES[case["gradients"]]
    wire_ms = waited_ms = share = "-"
    if case["strategy"] == "ddp":
        exposed = timings["phases"]["exposed_communication"]
        waited_ms = round(1000 * exposed["seconds"] / steps)
        share = f"{100 * exposed['share']:.0f} %"
        if rate:
            # Ranks of a node share its interface.
            bits = 8 * size * 2 * (RANKS - 1) / RANKS
            wire_ms = round(1000 * bits / (rate * 1e6))
    return [
        f"{rate} Mbit/s" if rate else "not limited",
        *case.values(),
        round(size / 1e6, 2),
        wire_ms,
        waited_ms,
        round(1000 * median_step(timings["intervals"])),
        share,
        round(results["tokens_per_second"]),
        round(results["all_reduce"]["gigabytes_per_second"], 4),
    ]


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("rates", type=int, nargs="*", help="Mbit/s, 0: not limited (default: 0 200 50)")
    add("--steps", type=int, default=24, help="of each training (default: 24)")
    add("--output", type=Path, default=ROOT / "DISTRIBUTED/results/slow-link.json")
    options = parser.parse_args()
    options.rates = options.rates or [0, 200, 50]
    return options


def main():
    options = parse_options()
    rows = []
    try:
        for rate in options.rates:
            limit_link(rate)
            for case in CASES:
                results, timings = train(case, rate, options.steps)
                rows.append(make_row(case, rate, results, timings))
                print(rows[-1], flush=True)
    finally:
        limit_link(0)
    machine = results["environment"]
    table = {
        "title": "A slow link between the two nodes",
        "conditions": "test cluster on one machine: 2 CPU cores shared by 4 ranks on 2 nodes; the"
        " sample's BERT, gloo; tc limits what each node sends. A step:"
        f" the median of the steady intervals of 2 steps, of {options.steps}. It shows how exposed"
        " communication follows the link, the gradients' size and the batch, and proves no scaling;"
        " what the sharded strategies wait for, only a trace tells",
        "columns": COLUMNS,
        "rows": rows,
        "environment": {name: machine.get(name) for name in MACHINE_FACTS},
    }
    options.output.write_text(json.dumps(table, indent=1) + os.linesep)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

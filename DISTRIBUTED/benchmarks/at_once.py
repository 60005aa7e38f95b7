"""Measures what sharing cores costs trainings that do not communicate.

    python DISTRIBUTED/benchmarks/at_once.py

One, two and four trainings of one rank and one thread run at once, three times each in turn. Writes
DISTRIBUTED/results/at-once.json, for report.py --table measured: what of predict.py's errors on the
test cluster, whose four ranks share two cores, is no communication.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import link

TRAIN = link.ROOT / "DISTRIBUTED/train.py"
OUTPUT = link.ROOT / "DISTRIBUTED/results/at-once.json"
WORDS = ["--sample", "--no-profile", "--epochs", "2", "--log-every", "4", "--batch-size", "8"]
COUNTS = [1, 2, 4]
REPEATS = 3


def train_at_once(count, folder):
    """Returns the results of trainings that ran at once, and their median seconds a step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outputs = [Path(folder, str(number)) for number in range(count)]
    trainings = []
    for output in outputs:
        command = [sys.executable, TRAIN, *WORDS, "--output", output]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        trainings.append(subprocess.Popen(command, env=environment, **quiet))
    codes = [training.wait() for training in trainings]
    if any(codes):
        sys.exit(f"a training failed: try {TRAIN} {' '.join(WORDS)}")
    results = json.loads((outputs[0] / "results.json").read_text())
    steps = []
    for output in outputs:
        timings = json.loads((output / "timings.json").read_text())
        steps.append(link.median_step(timings["intervals"]))
    return results, statistics.median(steps)


def main():
    seconds = {count: [] for count in COUNTS}
    for _ in range(REPEATS):
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as folder:
                results, step = train_at_once(count, folder)
            seconds[count].append(1000 * step)
            print(f"{count} at once: {1000 * step:.1f} ms a step", flush=True)
    rows = [
        [
            count,
            *(round(value, 1) for value in (statistics.median(values), min(values), max(values))),
        ]
        for count, values in seconds.items()
    ]
    table = {
        "title": "Trainings of one rank at once, without communication",
        "conditions": f"the sample's BERT, 8 features a step, one thread each; {REPEATS} tries in"
        " turn, of each the median of the trainings' median steps",
        "columns": ["trainings at once", "ms a step, median", "least", "most"],
        "rows": rows,
        "environment": {name: results["environment"].get(name) for name in link.MACHINE_FACTS}
        | {"cores": results["environment"]["cores"]},
    }
    OUTPUT.write_text(json.dumps(table, indent=1) + os.linesep)


if __name__ == "__main__":
    main()

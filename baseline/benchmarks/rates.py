"""Which learning rate suits which batch? Trains each batch at each rate for as many updates.

    python baseline/benchmarks/rates.py                       24 trainings of the small BERT: hours
    python baseline/benchmarks/rates.py --sample --seeds 1    the sample instead: minutes

Writes baseline/results/learning-rates.json, for report.py --table measured, anew after each
training. Options that are not its own go to train.py. The runs are kept in --work: one that is
there is not done again.

The rates are those of train.py's rule, learning rate = K x sqrt(batch), at 4 to 32 times the
paper's K: a small BERT and few updates want more than BERT-Base and two epochs. A batch's best rate
follows the rule where all batches have the same best K.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import measuring

FIRST_SEED = 42
PAPERS_K = 5e-5 / math.sqrt(32)  # the paper's rate and batch


def words_for_all(options, words):
    """Returns train.py's options that all runs have; the user's own words win."""
    usual = ["--evaluate-every", "end", "--no-profile", "--max-steps", options.updates]
    usual += ["--epochs", 1000]  # more than the updates take
    if "--sample" not in words:
        measuring.need(measuring.MODEL, measuring.TRAIN_FILE, measuring.VALIDATION_FILE)
        usual += ["--model", measuring.MODEL, "--train-file", measuring.TRAIN_FILE]
        usual += ["--validation-file", measuring.VALIDATION_FILE, "--device", "cpu"]
    return [*usual, *words]


def folder_of(options, setting):
    seed, batch, times = setting
    return options.work / f"{batch}-{times}-{seed}"


def train_one(options, words, setting):
    """Trains, where that run is not there yet. Returns its results."""
    seed, batch, times = setting
    output = folder_of(options, setting)
    rate = times * PAPERS_K * math.sqrt(batch)
    command = [sys.executable, measuring.TRAIN, *words, "--batch-size", batch]
    command += ["--learning-rate", rate, "--seed", seed, "--output", output]
    threads = max(1, os.cpu_count() // options.at_once)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [str(word) for word in command]
    done = subprocess.run(command, check=False, stdout=sys.stderr, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"error: {output} failed: fix what it says, and start again")
    return json.loads((output / "results.json").read_text())


def make_row(batch, times, results):
    """Returns a row of the table: of one batch and rate, all seeds."""
    scores = [result["f1"] for result in results]
    deviation = round(statistics.stdev(scores), 2) if len(scores) > 1 else None
    rate = results[0]["arguments"]["learning_rate"]
    k = 1e6 * rate / math.sqrt(batch)
    mean = round(statistics.fmean(scores), 2)
    each = ", ".join(f"{score:.1f}" for score in scores)
    return [batch, f"{rate:.1e}", round(k, 1), times, len(scores), mean, deviation, each]


def make_table(options, runs, train):
    """runs: {(batch, times the paper's K): results of its seeds}"""
    rows = [make_row(batch, times, results) for (batch, times), results in sorted(runs.items())]
    one = next(iter(runs.values()))[0]
    conditions = [
        f"{options.updates} updates each, whatever the batch",
        "the sample's own model" if one["arguments"]["sample"] else "minilm",
        f"{one['train_features']} features trained on",
    ]
    return {
        "title": "F1 by batch and learning rate",
        "conditions": conditions,
        "columns": [
            "batch",
            "learning rate",
            "learning rate / sqrt(batch), in 1e-6",
            "of the rule's",
            "seeds",
            "F1",
            "its standard deviation",
            "of each seed",
        ],
        "rows": rows,
        "environment": measuring.describe_machine(train),
    }


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--batches", type=int, nargs="+", default=[16, 64])
    add("--times", type=int, nargs="+", default=[4, 8, 16, 32], help="rates, of the rule's")
    add("--updates", type=int, default=264, help="three epochs of the smaller batch")
    add("--seeds", type=int, default=3)
    add("--at-once", type=int, default=1, help="trainings side by side: F1 is asked, not speed")
    add("--work", type=Path, default=Path("runs/rates"), help="the runs' folder")
    add("--output", type=Path, default=measuring.RESULTS / "learning-rates.json")
    return parser.parse_known_args()


def main():
    options, words = parse_options()
    words = words_for_all(options, words)
    train = measuring.load_train()
    runs = {}
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    # All of a seed first: the table is whole from the first seed on.
    settings = list(itertools.product(seeds, options.batches, options.times))
    # Before them those that are there already.
    settings.sort(key=lambda setting: not (folder_of(options, setting) / "results.json").exists())
    train_setting = functools.partial(train_one, options, words)
    with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
        for (seed, batch, times), results in zip(settings, pool.map(train_setting, settings)):
            runs.setdefault((batch, times), []).append(results)
            measuring.write_tables(options.output, [make_table(options, runs, train)])
            print(f"seed {seed}, batch {batch}, {times} x the rule's: F1 {results['f1']:.1f}")
    measuring.show_tables(options.output)


if __name__ == "__main__":
    main()

"""Does packing change what is learnt? Trains pairs, alike but for --batching, and compares F1.

    python baseline/benchmarks/paired.py --same-batches           five seeds, the small BERT: hours
    python baseline/benchmarks/paired.py --same-batches --sample  the sample instead: minutes
    python baseline/benchmarks/paired.py --against dynamic --at-once 2 --epochs 1

Writes baseline/results/seeds-paired.json, for report.py --table seeds-paired, anew after each pair.
Options that are not its own go to train.py. The runs are kept in --work: one that is there is not
done again.

--same-batches asks what packing alone changes: the other run draws packed's batches too, dropout
is off, and a pair differs in how a batch is laid out and in nothing else. Without it each run draws
its own batches and masks: a pair then differs as two seeds do, and a narrow interval takes many.
--halves trains on every second article of train.json and scores the others and dev.json: 668
questions instead of 195, but of a model that has learnt less, whose seeds differ more.
"dynamic" is "padded" to each batch's own longest: the same mathematics, sooner done.
"""

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import measuring

FIRST_SEED = 42
# Student's t, two-sided 95 %, by degrees of freedom from 1: pairs less one.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


# 1. The runs


def split_in_halves(folder):
    """Writes every second article of train.json to train on, the others and dev.json to score.

    Returns the two files."""
    articles = json.loads(measuring.TRAIN_FILE.read_bytes())["data"]
    others = json.loads(measuring.VALIDATION_FILE.read_bytes())["data"]
    titles = list(dict.fromkeys(article["title"] for article in articles))
    chosen_titles = titles[::2]
    chosen = []
    for article in articles:
        half = chosen if article["title"] in chosen_titles else others
        half.append(article)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, data in (("train.json", chosen), ("dev.json", others)):
        file = folder / name
        file.write_text(json.dumps({"version": "1.1", "data": data}))
        files.append(file)
    return files


def words_for_both(options, words):
    """Returns train.py's options that both runs of a pair have; the user's own words win."""
    usual = ["--evaluate-every", "end", "--no-profile"]
    if "--sample" not in words:
        measuring.need(measuring.MODEL, measuring.TRAIN_FILE, measuring.VALIDATION_FILE)
        files = [measuring.TRAIN_FILE, measuring.VALIDATION_FILE]
        if options.halves:
            files = split_in_halves(options.work)
        usual += ["--model", measuring.MODEL, "--train-file", files[0]]
        usual += ["--validation-file", files[1], "--batch-size", "16", "--learning-rate", "1e-4"]
        usual += ["--device", "auto" if os.environ.get("SLURM_JOB_ID") else "cpu"]
    if options.same_batches:
        usual += ["--dropout", "0"]
    return [*usual, *words]


def folder_of(options, batching, seed):
    return options.work / f"{batching}-{seed}"


def train_one(options, words, batching, seed):
    """Trains, where that run is not there yet."""
    script = measuring.TRAIN
    if options.same_batches and batching != "packed":
        script = Path(__file__).with_name("same_batches.py")
    output = folder_of(options, batching, seed)
    command = [sys.executable, script, *words]
    command += ["--batching", batching, "--seed", str(seed), "--output", output]
    environment = dict(os.environ)
    if options.at_once > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // options.at_once))
    done = subprocess.run(command, check=False, stdout=sys.stderr, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"seed {seed}, {batching} failed: fix what it says, and start again")


# 2. A pair


def read_json(folder, name):
    return json.loads((folder / name).read_text())


def losses_of(folder):
    """Returns {(step before, last step): loss} of a run's log intervals; saves cut some in two."""
    losses = {}
    before = 0
    for interval in read_json(folder, "timings.json")["intervals"]:
        losses[before, interval["step"]] = interval["loss"]
        before = interval["step"]
    return losses


def compare_pair(options, seed):
    """Returns what a pair's runs have reached, and where they differ."""
    folders = [folder_of(options, batching, seed) for batching in ("packed", options.against)]
    packed, other = [read_json(folder, "results.json") for folder in folders]
    packed_answers, other_answers = [read_json(folder, "predictions.json") for folder in folders]
    packed_losses, other_losses = [losses_of(folder) for folder in folders]
    differing = [name for name in packed_answers if packed_answers[name] != other_answers[name]]
    common = packed_losses.keys() & other_losses.keys()
    return {
        "seed": seed,
        "packed": packed,
        "other": other,
        "f1_difference": packed["f1"] - other["f1"],
        "exact_match_difference": packed["exact_match"] - other["exact_match"],
        "answers": len(packed_answers),
        "answers_that_differ": len(differing),
        "losses_differ_by": max(abs(packed_losses[span] - other_losses[span]) for span in common),
    }


# 3. The table


def make_rows(pairs):
    """Returns a row for each pair, then the means and how far they can be trusted."""
    columns = [
        [pair["packed"]["f1"] for pair in pairs],
        [pair["other"]["f1"] for pair in pairs],
        [pair["f1_difference"] for pair in pairs],
        [pair["packed"]["exact_match"] for pair in pairs],
        [pair["other"]["exact_match"] for pair in pairs],
        [pair["exact_match_difference"] for pair in pairs],
        [pair["answers_that_differ"] for pair in pairs],
    ]
    rows = []
    for pair, values in zip(pairs, zip(*columns)):
        rounded = [round(value, 2) for value in values]
        rows.append([pair["seed"], *rounded, f"{pair['losses_differ_by']:.0e}"])
    means = [round(statistics.fmean(column), 2) for column in columns]
    rows.append(["mean", *means, ""])
    if len(pairs) > 1:
        for_f1 = half_interval([pair["f1_difference"] for pair in pairs])
        for_match = half_interval([pair["exact_match_difference"] for pair in pairs])
        rows.append(["95 % interval, +-", "", "", for_f1, "", "", for_match, "", ""])
    return rows


def half_interval(differences):
    """Returns half the width of the mean's 95 % interval."""
    t = STUDENT_T[len(differences) - 2]
    return round(t * statistics.stdev(differences) / math.sqrt(len(differences)), 2)


def make_conditions(options, pairs):
    """Returns what the pairs have in common."""
    results = pairs[0]["packed"]
    arguments = results["arguments"]
    model = "the sample's own model" if arguments["sample"] else Path(arguments["model"]).name
    conditions = [model]
    for name in ("limit", "epochs", "batch_size", "learning_rate", "dropout", "precision"):
        if arguments[name]:
            conditions.append(f"{name.replace('_', ' ')} {arguments[name]}")
    conditions.append(f"device {arguments['device_type']}")
    conditions.append(f"{results['train_features']} features trained on")
    conditions.append(f"{pairs[0]['answers']} questions scored")
    if arguments["dropout"] == 0:
        conditions.append("no dropout")
    conditions.append(f"{len(pairs)} pairs of one seed each")
    runs = [pair[which] for pair in pairs for which in ("packed", "other")]
    commits = {str(run["environment"]["commit"])[:10] for run in runs}
    conditions.append(f"runs of commit {' / '.join(sorted(commits))}")
    if options.against == "dynamic":
        conditions.append("dynamic: as padded, but to a batch's longest only")
    conditions.append("losses: the most over the log intervals that both runs have")
    return conditions


def make_table(options, pairs, train):
    other = options.against
    title = f"Packed against {other}, the same seeds"
    title += ", the same batches" if options.same_batches else ", each with its own batches"
    if options.halves:
        title += ", half of the articles scored"
    if pairs[0]["packed"]["arguments"]["sample"]:
        title += ", the sample"
    columns = ["seed", "F1 packed", f"F1 {other}", "F1 difference"]
    columns += ["EM packed", f"EM {other}", "EM difference"]
    columns += ["answers that differ", "losses differ by"]
    return {
        "title": title,
        "conditions": make_conditions(options, pairs),
        "columns": columns,
        "rows": make_rows(pairs),
        "environment": measuring.describe_machine(train),
    }


# 4. Main


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=int, default=5, choices=range(2, len(STUDENT_T) + 2))
    add("--against", choices=["padded", "dynamic", "bucketed"], default="padded")
    add("--halves", action="store_true", help="score half of train.json's articles too")
    add("--same-batches", action="store_true", help="packed's, in both; no dropout")
    add("--at-once", type=int, default=1, help="runs at a time, which share the cores")
    add("--work", type=Path, default=Path("runs/paired"), help="the runs' folder")
    add("--output", type=Path, default=measuring.RESULTS / "seeds-paired.json")
    return parser.parse_known_args()


def main():
    options, words = parse_options()
    words = words_for_both(options, words)
    train = measuring.load_train()
    pairs = []
    with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
        runs_of_seed = {}
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
            runs_of_seed[seed] = [
                pool.submit(train_one, options, words, batching, seed)
                for batching in ("packed", options.against)
            ]
        for seed, runs in runs_of_seed.items():
            for run in runs:
                try:
                    run.result()
                except RuntimeError as error:
                    pool.shutdown(cancel_futures=True)
                    sys.exit(f"error: {error}")
            pairs.append(compare_pair(options, seed))
            measuring.write_tables(options.output, [make_table(options, pairs, train)])
            f1 = [pairs[-1][which]["f1"] for which in ("packed", "other")]
            print(f"seed {seed}: F1 {f1[0]:.1f} packed, {f1[1]:.1f} {options.against}", flush=True)
    measuring.show_tables(options.output)


if __name__ == "__main__":
    main()

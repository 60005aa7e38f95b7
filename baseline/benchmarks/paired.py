"""Does packing change what is learnt? Trains pairs, alike but for --batching, and compares F1.

    python baseline/tests/paired.py --same-batches           five seeds, the small BERT: hours
    python baseline/tests/paired.py --same-batches --sample  the sample instead: minutes
    python baseline/tests/paired.py --against dynamic --at-once 2 --epochs 1    (train.py's)

--same-batches asks what packing alone changes: the other run draws packed's batches too, dropout
is off, and a pair differs in how a batch is laid out and in nothing else. Without it each draws its
own batches and masks: a pair then differs as two seeds do, and a narrow interval takes many.
--halves trains on every second article of train.json and scores the others and dev.json: 668
questions instead of 195, but of a model that has learnt less, whose seeds differ more.
"dynamic" has the batches of "padded", each padded to its own longest: the same mathematics, sooner
done. A run that is there in --work is not done again. The table is written after each pair.
"""

import argparse, json, math, os, statistics, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measuring

# train.py with packed's batches, whatever --batching says of how they are laid out.
SAME_BATCHES = """
import importlib.util, sys, types
spec = importlib.util.spec_from_file_location("train", sys.argv[1])
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
own = train.plan_epoch
def plan_epoch(lengths, args, epoch):
    return own(lengths, types.SimpleNamespace(**vars(args) | {"batching": "packed"}), epoch)
train.plan_epoch = plan_epoch
del sys.argv[0]
train.main()
"""
# Student's t, two-sided 95 %, by degrees of freedom from 1: pairs less one.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, len(T) + 2))
    parser.add_argument("--against", choices=("padded", "dynamic", "bucketed"), default="padded")
    parser.add_argument(
        "--halves", action="store_true", help="score half of train.json's articles too"
    )
    parser.add_argument("--same-batches", action="store_true", help="packed's, in both; no dropout")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, the cores shared")
    parser.add_argument("--work", type=Path, default=Path("runs/paired"), help="the runs' folder")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "seeds-paired.json")
    options, more = parser.parse_known_args()
    files, usual = [measuring.SHARED / "squad" / name for name in ("train.json", "dev.json")], []
    if "--sample" not in more:
        measuring.need(measuring.SHARED / "minilm", *files)
        files = halves(options.work, *files) if options.halves else files
        usual = ["--model", measuring.SHARED / "minilm", "--train-file", files[0]]
        usual += ["--validation-file", files[1], "--batch-size", "16", "--learning-rate", "1e-4"]
        usual += ["--device", "auto" if os.getenv("SLURM_JOB_ID") else "cpu"]
    usual += ["--dropout", "0"] if options.same_batches else []
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // options.at_once))}
    env = os.environ | (threads if options.at_once > 1 else {})

    def run(seed, batching):
        output = options.work / f"{batching}-{seed}"
        patched = ["-c", SAME_BATCHES] if options.same_batches and batching != "packed" else []
        call = [sys.executable, *patched, measuring.TRAIN, *usual, *more, "--no-profile"]
        call += ["--batching", batching, "--seed", str(seed), "--output", output]
        if subprocess.run(call, check=False, stdout=sys.stderr, env=env).returncode:
            sys.exit(f"error: seed {seed}, {batching} failed: mend what it says, and start again")
        return json.loads((output / "results.json").read_text())

    with ThreadPoolExecutor(options.at_once) as pool:
        pairs, runs, commits = [], [], set()
        for seed in range(42, 42 + options.seeds):
            runs.append([pool.submit(run, seed, way) for way in ("packed", options.against)])
        for seed, pair in enumerate(runs, 42):
            results = [one.result() for one in pair]
            files = [options.work / f"{way}-{seed}" for way in ("packed", options.against)]
            ours, theirs = (json.loads((f / "predictions.json").read_text()) for f in files)
            pairs.append([(one["f1"], one["exact_match"]) for one in results])
            pairs[-1].append(sum(answer != theirs[name] for name, answer in ours.items()))
            one, other = map(losses, files)
            pairs[-1].append(
                max(abs(one[span] - other[span]) for span in one.keys() & other.keys())
            )
            (f1, _), (other, _), *_ = pairs[-1]
            print(f"seed {seed}: F1 {f1:.1f} packed, {other:.1f} {options.against}", flush=True)
            commits |= {one["environment"]["commit"][:10] for one in results}
            write(options, pairs, results[0], commits)


def losses(folder):
    """Returns {(first step, last step): loss} of a run's log intervals; saves cut some in two."""
    intervals = json.loads((folder / "timings.json").read_text())["intervals"]
    ends = [each["step"] for each in intervals]
    return {span: each["loss"] for span, each in zip(zip([0, *ends], ends), intervals)}


def halves(work, train, dev):
    """Writes every second article of train to work, the others with dev's; returns the paths."""
    articles = json.loads(train.read_text())["data"]
    titles = list(dict.fromkeys(article["title"] for article in articles))
    kept = [article for article in articles if titles.index(article["title"]) % 2 == 0]
    rest = [article for article in articles if titles.index(article["title"]) % 2]
    rest += json.loads(dev.read_text())["data"]
    work.mkdir(parents=True, exist_ok=True)
    for name, data in (("train.json", kept), ("dev.json", rest)):
        (work / name).write_text(json.dumps({"version": "1.1", "data": data}))
    return work / "train.json", work / "dev.json"


def write(options, pairs, results, commits):
    """Writes each pair, and the mean difference with its interval."""
    rows = []
    for seed, ((f1, match), (other_f1, other_match), differ, loss) in enumerate(pairs, 42):
        row = [seed, f1, other_f1, f1 - other_f1, match, other_match, match - other_match, differ]
        rows.append([*(round(value, 2) for value in row), f"{loss:.0e}"])
    means = [round(statistics.fmean(column), 2) for column in list(zip(*rows))[1:-1]]
    rows.append(["mean", *means, ""])
    if len(pairs) > 1:
        for_f1, for_match = (
            T[len(pairs) - 2]
            * statistics.stdev(row[i] for row in rows[:-1])
            / math.sqrt(len(pairs))
            for i in (3, 6)
        )
        row = ["95 % interval, +-", "", "", round(for_f1, 2), "", "", round(for_match, 2), "", ""]
        rows.append(row)
    given = results["arguments"]
    names = "sample limit epochs batch_size learning_rate dropout precision device_type".split()
    how = [f"{name.replace('_', ' ')} {given[name]}" for name in names if given.get(name)]
    model = "the sample's own model" if given["sample"] else Path(given["model"]).name
    answers = json.loads((options.work / "packed-42/predictions.json").read_text())
    how += [f"{results['train_features']} features trained on", f"{len(answers)} questions scored"]
    how += ["no dropout"] if given["dropout"] == 0 else []
    conditions = [model, *how, f"{len(pairs)} pairs of one seed each"]
    conditions.append(f"runs of commit {' / '.join(sorted(commits))}")
    if options.against == "dynamic":
        conditions.append("dynamic: as padded, but to a batch's longest only")
    conditions.append("losses: the most over the log intervals that both runs have")
    other = options.against
    columns = ["seed", "F1 packed", f"F1 {other}", "F1 difference", "EM packed", f"EM {other}"]
    title = f"Packed against {other}, the same seeds"
    title += ", the same batches" if options.same_batches else ", each with its own batches"
    title += ", half of the articles scored" if options.halves else ""
    table = {"title": title, "conditions": conditions}
    columns += ["EM difference", "answers that differ", "losses differ by"]
    table |= {"columns": columns, "rows": rows}
    table["environment"] = measuring.environment()
    kept = json.loads(options.output.read_text()) if options.output.exists() else []
    key = (table["title"], model)  # the same comparison of another time is replaced
    kept = [one for one in kept if (one["title"], one["conditions"][0]) != key]
    measuring.write_tables(options.output, [*kept, table])


if __name__ == "__main__":
    main()

"""Does packing change what is learnt? Trains pairs, alike but for --batching, and compares F1.

    python baseline/tests/paired.py             five seeds, the small BERT: hours on two cores
    python baseline/tests/paired.py --sample    the sample instead: minutes
    python baseline/tests/paired.py --against dynamic --epochs 1 --limit 700    (train.py has these)

"dynamic" has the batches of "padded", each padded to its own longest: the same mathematics, sooner
done. A run that is there in --work is not done again. The table is written after each pair.
"""

import argparse, json, math, os, statistics, subprocess, sys
from pathlib import Path

import measuring

# Student's t, two-sided 95 %, by degrees of freedom from 1: pairs less one.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, len(T) + 2))
    parser.add_argument("--against", choices=("padded", "dynamic", "bucketed"), default="padded")
    parser.add_argument("--work", type=Path, default=Path("runs/paired"), help="the runs' folder")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "seeds-paired.json")
    options, more = parser.parse_known_args()
    data = measuring.SHARED / "squad"
    usual = ["--model", measuring.SHARED / "minilm", "--train-file", data / "train.json"]
    usual += ["--validation-file", data / "dev.json", "--batch-size", "16"]
    usual += ["--learning-rate", "1e-4", "--device", "auto" if os.getenv("SLURM_JOB_ID") else "cpu"]
    if "--sample" in more:
        usual = []
    else:
        measuring.need(usual[1], data)
    pairs, results = [], {}
    for seed in range(42, 42 + options.seeds):
        scores = []
        for batching in ("packed", options.against):
            output = options.work / f"{batching}-{seed}"
            call = [sys.executable, measuring.TRAIN, *usual, *more, "--no-profile"]
            call += ["--batching", batching, "--seed", str(seed), "--output", output]
            code = subprocess.run(call, check=False, stdout=sys.stderr).returncode
            if code:
                sys.exit(
                    f"error: seed {seed}, {batching} failed: mend what it says, and start again"
                )
            results = json.loads((output / "results.json").read_text())
            scores.append((results["f1"], results["exact_match"]))
        pairs.append(scores)
        print(
            f"seed {seed}: F1 {scores[0][0]:.1f} packed, {scores[1][0]:.1f} {options.against}",
            flush=True,
        )
        write(options, pairs, results)


def write(options, pairs, results):
    """Writes each pair, and the mean difference with its interval."""
    rows = []
    for seed, ((f1, match), (other_f1, other_match)) in enumerate(pairs, 42):
        row = [seed, f1, other_f1, f1 - other_f1, match, other_match, match - other_match]
        rows.append([round(value, 2) for value in row])
    means = [round(statistics.fmean(column), 2) for column in list(zip(*rows))[1:]]
    rows.append(["mean", *means])
    if len(pairs) > 1:
        for_f1, for_match = (
            T[len(pairs) - 2]
            * statistics.stdev(row[i] for row in rows[:-1])
            / math.sqrt(len(pairs))
            for i in (3, 6)
        )
        row = ["95 % interval, +-", "", "", round(for_f1, 2), "", "", round(for_match, 2)]
        rows.append(row)
    given = results["arguments"]
    names = "sample limit epochs batch_size learning_rate dropout precision device_type".split()
    how = [f"{name.replace('_', ' ')} {given[name]}" for name in names if given.get(name)]
    model = "the sample's own model" if given["sample"] else Path(given["model"]).name
    conditions = [model, *how, f"{len(pairs)} pairs of one seed each"]
    if options.against == "dynamic":
        conditions.append("dynamic: padded's batches and mathematics, padded to their longest only")
    other = options.against
    columns = ["seed", "F1 packed", f"F1 {other}", "F1 difference", "EM packed", f"EM {other}"]
    table = {"title": f"Packed against {other}, the same seeds", "conditions": conditions}
    table |= {"columns": [*columns, "EM difference"], "rows": rows}
    table["environment"] = measuring.environment()
    kept = json.loads(options.output.read_text()) if options.output.exists() else []
    key = (table["title"], model)  # the same comparison of another time is replaced
    kept = [one for one in kept if (one["title"], one["conditions"][0]) != key]
    measuring.write_tables(options.output, [*kept, table])


if __name__ == "__main__":
    main()

"""Measures what a slow link between two nodes costs, on .ci/slurm-cluster; by hand, as root:

    eval "$(.ci/slurm-cluster up)" && python DISTRIBUTED/tests/link.py [MBIT ...]

Writes DISTRIBUTED/results/slow-link.json, which report.py --table measured shows. Each node's
interface is limited with tc; then run_2x2.sbatch trains the sample with fp32 and bf16 gradients and
with a larger batch. The arithmetic beside it: an all-reduce among two nodes sends each gradient
once out of a node, so bytes x 8 / rate; all but what hides behind the backward pass is waited for.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLUSTER = ROOT / ".ci/slurm-cluster"
SHORT = ["--sample", "--max-steps", "16", "--log-every", "2", "--no-profile", "--limit", "200"]
CASES = {
    "fp32": ["--batch-size", "16", "--gradients", "fp32"],
    "bf16": ["--batch-size", "16", "--gradients", "bf16"],
    "fp32, batch 64": ["--batch-size", "64", "--gradients", "fp32"],
}


def train(name, options):
    output = f"runs/link-{name}"
    command = ["sbatch", "--parsable", "-W", "-o", f"{output}.log", "-N2"]
    command += ["DISTRIBUTED/run_2x2.sbatch", *SHORT, *options, "--output", output]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    read = [json.loads((ROOT / output / f"{n}.json").read_text()) for n in ("results", "timings")]
    return read


def main():
    # Nothing else may run on the cluster meanwhile: its tests call `up`, which lifts the limit.
    rates = sys.argv[1:] or ["0", "200", "50"]
    rows, environment = [], {}
    for rate in rates:
        how = ("slow", rate) if int(rate) else ("fast",)
        subprocess.run([CLUSTER, *how], check=True)
        for name, options in CASES.items():
            stamp = f"{rate}-{name.replace(', ', '-').replace(' ', '')}-{int(time.time())}"
            results, timings = train(stamp, options)
            steady = [one for one in timings["intervals"] if one["steady"]]
            steps = 2 * len(steady)
            seconds = sum(one["seconds"] for one in steady)
            exposed = timings["phases"]["exposed_communication"]
            size = results["parameters"] * (2 if "bf16" in name else 4)
            # Ranks of a node share its interface; by a ring, 2 (n-1) / n of it crosses each link.
            wire = 2 * 3 / 4 * size * 8 / (int(rate) * 1e6) if int(rate) else None
            rows.append(
                [
                    f"{rate} Mbit/s" if int(rate) else "not limited",
                    name.split(",")[0],
                    results["arguments"]["batch_size"],
                    round(size / 1e6, 2),
                    round(1000 * wire) if wire else "-",
                    round(1000 * exposed["seconds"] / steps),
                    round(1000 * seconds / steps),
                    f"{100 * exposed['share']:.0f} %",
                    round(results["tokens_per_second"]),
                    results["all_reduce"]["gigabytes_per_second"],
                ]
            )
            found = results["environment"]
            environment = {n: found.get(n) for n in ("cpu", "torch", "python", "commit")}
            print(rows[-1], flush=True)
    subprocess.run([CLUSTER, "fast"], check=True)
    columns = (
        "link|gradients|batch|MB of gradients|ring's wire time, ms|exposed communication, ms a step"
    )
    columns += "|a step, ms|its share|tokens/s|all-reduce GB/s"
    content = {
        "title": "A slow link between the two nodes",
        "conditions": "test cluster on one machine: 2 CPU cores shared by 4 ranks on 2 nodes; the"
        " sample's BERT, gloo; tc limits what each node sends. It shows how exposed communication"
        " follows the link, the gradients' size and the batch, and proves no scaling",
        "columns": columns.split("|"),
        "rows": rows,
        "environment": environment | {"date": str(datetime.date.today())},
    }
    path = ROOT / "DISTRIBUTED/results/slow-link.json"
    path.write_text(json.dumps(content, indent=1) + os.linesep)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""Measures what each fault costs a run, by hand: the table "fault, how often tried, what was lost".

    python baseline/tests/faults.py [TRIES] > baseline/results/faults.json
    python baseline/report.py --table faults baseline/results/faults.json

Each try starts the sample's run, harms it in its midst, starts it again and compares its losses with
those of a run that nothing happened to.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import measuring

TRAIN = pathlib.Path(__file__).parents[1] / "train.py"
WORDS = ["--sample", "--limit", "24", "--batch-size", "4", "--epochs", "6", "--dropout", "0.1"]
WORDS += ["--log-every", "1", "--no-profile", "--device", "cpu"]  # 36 steps


def start(output, *words, limit=None):
    """The run under way; limit: the greatest file it can write, a stand-in for a full disk."""
    command = [sys.executable, str(TRAIN), *WORDS, *words, "--output", str(output)]
    command = ["prlimit", f"--fsize={limit}", *command] if limit else command
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **how)


def read_until(process, step):
    """Waits for a step's line, and returns the last step that the log has by then."""
    last = 0
    for line in process.stdout:
        if line.startswith("step "):
            last = int(line.split()[1].split("/")[0])
            if last >= step:
                break
    return last


def go_on(output, *words):
    """Starts it again; returns seconds to the first new step, the steps done again, its losses."""
    begin, again, seconds = time.monotonic(), 0, None
    process = start(output, *words)
    for line in process.stdout:
        if line.startswith("going on from"):
            again = int(line.split("; ")[1].split()[0])
        if line.startswith("step ") and seconds is None:
            seconds = time.monotonic() - begin
    assert process.wait() == 0
    timings = json.loads((output / "timings.json").read_text())
    return seconds, again, [(one["loss"], one["learning_rate"]) for one in timings["intervals"]]


def kill(number):
    def harm(output, step):
        process = start(output, "--save-every", "10")
        read_until(process, step)
        time.sleep(random.random() / 10)
        process.send_signal(number)
        process.communicate()
        return process.returncode == (0 if number != signal.SIGKILL else -signal.SIGKILL)

    return harm


def fill(output, step):
    process = start(output, "--save-every", "10")
    read_until(process, step)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    process = start(output, "--save-every", "3", limit=2_000_000)
    text = process.communicate()[0]
    return process.returncode == 2 and "space" in text.splitlines()[-1]


FAULTS = {
    "told to stop (SIGUSR1, SLURM's warning)": kill(signal.SIGUSR1),
    "told to stop (SIGTERM, scancel)": kill(signal.SIGTERM),
    "told to stop (SIGINT, Ctrl-C)": kill(signal.SIGINT),
    "killed (SIGKILL), saving every 10 steps": kill(signal.SIGKILL),
    "no space at a save": fill,
}


def main():
    tries, rows = int(sys.argv[1]) if len(sys.argv) > 1 else 3, []
    random.seed(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        _, _, wanted = go_on(folder / "whole")
        for fault, harm in FAULTS.items():
            found = []
            for i in range(tries):
                output = folder / f"{len(rows)}-{i}"
                assert harm(output, random.randint(12, len(wanted) - 8)), fault
                seconds, again, losses = go_on(output)
                found.append((seconds, again, losses == wanted))
            seconds, again, equal = zip(*found)
            lost = f"{max(again)} steps at most" if max(again) else "nothing"
            middle = round(sorted(seconds)[tries // 2], 1)
            rows.append([fault, tries, lost, f"{sum(equal)} of {tries}", middle])
            print(*rows[-1], sep="; ", file=sys.stderr)
    columns = ["fault", "tried", "lost", "losses bit for bit", "seconds to go on"]
    conditions = "BERT of a million parameters on 24 questions of sample.json, 36 steps, one CPU "
    conditions += "thread; seconds from the command to the next step's end, most of them imports"
    table = {"title": "Faults", "conditions": conditions, "columns": columns, "rows": rows}
    table["environment"] = measuring.environment()
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()

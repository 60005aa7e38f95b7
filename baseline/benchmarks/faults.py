"""Measures what each fault costs a run: what was lost, and how long going on takes.

    python baseline/benchmarks/faults.py [TRIES]

Writes baseline/results/faults.json, for report.py --table faults. Each try starts the sample's run,
harms it in its midst, gives the same command again, and compares the losses with those of a run
that nothing happened to. A run that was asked to stop has to end with train.py's exit code 75. Some
15 seconds a try on a quiet machine.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measuring

# 36 steps.
WORDS = ["--sample", "--limit", "24", "--batch-size", "4", "--epochs", "6", "--dropout", "0.1"]
WORDS += ["--log-every", "1", "--no-profile", "--device", "cpu"]
STEPS = 36
STOPPED = 75
BAD_OUTPUT = 2


def start(output, *words, file_limit=None):
    """Starts the run. file_limit: the largest file it can write, as if the disk were full there."""
    command = [sys.executable, str(measuring.TRAIN), *WORDS, *words, "--output", str(output)]
    if file_limit:
        command = ["prlimit", f"--fsize={file_limit}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def step_of(line):
    """Returns the step that a line of the log tells of, or None."""
    found = re.match(r"step ([\d,]+)/", line)
    return int(found[1].replace(",", "")) if found else None


def read_until(process, step):
    """Reads the log until it tells of this step."""
    for line in process.stdout:
        if step_of(line) == step:
            return
    raise RuntimeError(f"the run ended before step {step}, with {process.wait()}")


def read_to_end(process):
    """Reads the rest of the log. Returns its lines, and its last step or 0."""
    lines = process.stdout.readlines()
    process.wait()
    steps = [step_of(line) or 0 for line in lines]
    return lines, max(steps, default=0)


def go_on(output):
    """Gives the same command again, until the run is finished.

    Returns the step that it goes on from, and the seconds from the command to its first new step.
    """
    begin = time.monotonic()
    process = start(output)
    resumed_from = 0
    seconds = None
    for line in process.stdout:
        found = re.match(r"going on from step ([\d,]+)", line)
        if found:
            resumed_from = int(found[1].replace(",", ""))
        if seconds is None and step_of(line):
            seconds = time.monotonic() - begin
    assert process.wait() == 0, "the run does not go on"
    return resumed_from, seconds


def read_losses(output):
    """Returns each step's loss and learning rate of a finished run."""
    timings = json.loads((output / "timings.json").read_text())
    return [(interval["loss"], interval["learning_rate"]) for interval in timings["intervals"]]


# The faults: each harms a run some time after this step, and returns the last step it has done.


def send_signal(number, expected_code):
    def harm(output, step):
        process = start(output, "--save-every", "10")
        read_until(process, step)
        # Somewhere within a step.
        time.sleep(random.random() / 10)
        process.send_signal(number)
        _, last_step = read_to_end(process)
        assert process.returncode == expected_code, process.returncode
        return max(step, last_step)

    return harm


def leave_stop_file(output, step):
    process = start(output, "--save-every", "10")
    read_until(process, step)
    (output / "stop").touch()
    _, last_step = read_to_end(process)
    assert process.returncode == STOPPED, process.returncode
    return max(step, last_step)


def fill_disk(output, step):
    """Stops a run, and gives it no room for the next save."""
    leave_stop_file(output, step)
    process = start(output, "--save-every", "3", file_limit=2_000_000)
    lines, last_step = read_to_end(process)
    assert process.returncode == BAD_OUTPUT, lines[-3:]
    assert "free some space" in lines[-1], lines[-1]
    return last_step


FAULTS = {
    "asked to stop (SIGUSR1, SLURM's warning)": send_signal(signal.SIGUSR1, STOPPED),
    "asked to stop (SIGTERM, scancel)": send_signal(signal.SIGTERM, STOPPED),
    "asked to stop (SIGINT, Ctrl-C)": send_signal(signal.SIGINT, STOPPED),
    "asked to stop (the file stop)": leave_stop_file,
    "killed (SIGKILL), saving every 10 steps": send_signal(signal.SIGKILL, -signal.SIGKILL),
    "no space at a save": fill_disk,
}


def measure_fault(name, tries, folder, undisturbed):
    """Returns a fault's row of the table."""
    lost = []
    seconds = []
    equal = 0
    for _ in range(tries):
        output = Path(tempfile.mkdtemp(dir=folder))
        last_step = FAULTS[name](output, random.randint(12, STEPS - 8))
        resumed_from, one_seconds = go_on(output)
        lost.append(last_step - resumed_from)
        seconds.append(one_seconds)
        equal += read_losses(output) == undisturbed
        shutil.rmtree(output)
    return [
        name,
        tries,
        f"{max(lost)} steps at most" if max(lost) else "nothing",
        f"{equal} of {tries}",
        round(statistics.median(seconds), 1),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tries", type=int, nargs="?", default=3, help="of each (default: 3)")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "faults.json")
    options = parser.parse_args()
    random.seed(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed_run = Path(folder, "undisturbed")
        go_on(undisturbed_run)
        undisturbed = read_losses(undisturbed_run)
        assert len(undisturbed) == STEPS
        for name in FAULTS:
            row = measure_fault(name, options.tries, folder, undisturbed)
            rows.append(row)
            print(row, flush=True)
    table = {
        "title": "Faults",
        "conditions": "the sample's BERT of a million parameters on 24 of its questions, 36 steps,"
        " one CPU thread; seconds from the command to the next step's end, most of them imports",
        "columns": ["fault", "tried", "lost", "losses bit for bit", "seconds to go on"],
        "rows": rows,
        "environment": measuring.describe_machine(measuring.load_train()),
    }
    measuring.write_tables(options.output, [table])
    measuring.show_tables(options.output)


if __name__ == "__main__":
    main()

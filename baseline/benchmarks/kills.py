"""Kills train.py at random moments, gives the same command again, and compares the end.

    python baseline/benchmarks/kills.py [COUNT]

Writes a table to baseline/results/faults.json, for report.py --table faults. A training is killed
again and again (SIGKILL) until one of its lives outlasts its moment; then losses, gradient norms,
scores, answers and weights have to be a calm training's, bit for bit. Some three seconds a kill.

Most lives are forks of a process that has imported the libraries (tests/nursery.py). A tenth are
processes of their own, killed in their first seconds, in which they import.
"""

import argparse
import collections
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faults
import measuring

sys.path.insert(0, str(measuring.ROOT / "baseline/tests"))
from nursery import Nursery

WORDS = [*faults.WORDS, "--save-every", "3", "--evaluate-every", "epoch"]
IMPORT_SECONDS = 3
KILLED = -9
# What a life is doing: it says so in its log when it begins and when it has ended.
DOING = {
    "prepare": "preparing",
    "train": "training",
    "save_checkpoint": "saving",
    "evaluate_model": "evaluating",
    "finish": "writing the results",
}
PATCH = """
def tell(function, doing):
    def told(*values):
        log(f"begin: {doing}")
        value = function(*values)
        log(f"end: {doing}")
        return value
    return told
"""
PATCH += "".join(f"{name} = tell({name}, {doing!r})\n" for name, doing in DOING.items())


def start(nursery, output):
    """Starts a life of the training, with a cache of its own to be killed in too."""
    folder = output.parent
    words = [*WORDS, "--output", output]
    cache = str(folder / "cache")
    return nursery.start(measuring.TRAIN, words, folder / "log", PATCH, SQUAD_CACHE=cache)


def end(life):
    """Waits for a life's end; raises AssertionError with its log unless it ends well."""
    life.end(code=None)
    assert life.code in (0, KILLED), f"exit code {life.code}:\n{life.text()}"


def kill_importing(output):
    """Kills a process of its own within its imports. Returns False where it was past them."""
    command = [sys.executable, measuring.TRAIN, *WORDS, "--output", output]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(random.uniform(0, IMPORT_SECONDS))
    process.kill()
    lines = process.stdout.readlines()
    process.wait()
    return not lines


def doing_when_killed(lines):
    """Returns what was under way at the end of a killed life's log."""
    stack = []
    for line in lines:
        found = re.match("(begin|end): (.*)", line)
        if found and found[1] == "begin":
            stack.append(found[2])
        elif found:
            stack.pop()
    if stack:
        return stack[-1]
    finished = f"end: {DOING['finish']}" in lines
    return "ending" if finished else "setting up"


def kill_life(nursery, output, calm_seconds):
    """Starts a life and kills it at a random moment. Returns what it was doing, or None where it
    was finished before."""
    moment = time.monotonic() + random.uniform(0, calm_seconds)
    log = output.parent / "log"
    already = len(log.read_text()) if log.exists() else 0
    life = start(nursery, output)
    life.wait_until(lambda: time.monotonic() > moment)
    life.kill(9)
    end(life)
    if life.code == 0:
        return None
    return doing_when_killed(life.text()[already:].splitlines())


def read_end(output):
    """Returns what two trainings of the same steps have to have in common."""
    timings = json.loads((output / "timings.json").read_text())
    results = json.loads((output / "results.json").read_text())
    names = ("step", "loss", "learning_rate", "gradient_norm", "exact_match", "f1")
    measured = timings["intervals"] + results["evaluations"]
    return {
        "measured": [[one.get(name) for name in names] for one in measured],
        "answers": (output / "predictions.json").read_bytes(),
        "weights": (output / "model/model.safetensors").read_bytes(),
    }


def kill_training(nursery, folder, calm_seconds, count):
    """Trains, killed up to `count` times. Returns what was killed, and the end."""
    output = Path(folder, "run")
    killed = []
    while len(killed) < count:
        if random.random() < 0.1:
            importing = kill_importing(output)
            killed.append("importing" if importing else "preparing")
            continue
        doing = kill_life(nursery, output, calm_seconds)
        if doing is None:
            break
        killed.append(doing)
    life = start(nursery, output)
    end(life)
    assert life.code == 0
    return killed, read_end(output)


def kill_many(count):
    """Returns {what was killed: [how often, how often the end was as a calm one's]}."""
    tally = collections.defaultdict(lambda: [0, 0])
    trainings = 0
    with Nursery() as nursery, tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        _, calm = kill_training(nursery, folder, 0, 0)
        calm_seconds = time.monotonic() - begin
        assert len(calm["measured"]) > faults.STEPS
        done = 0
        while done < count:
            with tempfile.TemporaryDirectory() as folder:
                killed, reached = kill_training(nursery, folder, calm_seconds, count - done)
            equal = reached == calm
            done += len(killed)
            trainings += 1
            for doing in killed:
                tally[doing][0] += 1
                tally[doing][1] += equal
            print(f"{done} of {count}: {killed}, {'equal' if equal else 'DIFFERENT'}", flush=True)
    return tally, trainings


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "faults.json")
    options = parser.parse_args()
    random.seed(options.seed)
    tally, trainings = kill_many(options.count)
    rows = []
    for doing, (tried, equal) in sorted(tally.items(), key=lambda item: -item[1][0]):
        rows.append([doing, tried, f"{equal} of {tried}"])
    equal = sum(equal for _, equal in tally.values())
    rows.append(["in all", options.count, f"{equal} of {options.count}"])
    table = {
        "title": "Killed (SIGKILL) at random moments",
        "conditions": f"{trainings} trainings as above, saving every 3 steps, evaluating each"
        " epoch; each killed at moments drawn evenly from its start to its end, also while going"
        " on, until it was through; losses, norms, scores, answers and weights compared with a calm"
        " one's; most lives are forks of a process that has imported the libraries",
        "columns": ["killed while", "tried", "all bit for bit"],
        "rows": rows,
        "environment": measuring.describe_machine(measuring.load_train()),
    }
    measuring.write_tables(options.output, [table])
    measuring.show_tables(options.output)


if __name__ == "__main__":
    main()

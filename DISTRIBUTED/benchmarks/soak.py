"""Disturbs trainings on two nodes at random, goes on as a user would, and compares their losses.

    eval "$(.ci/slurm-cluster up)" && python DISTRIBUTED/benchmarks/soak.py [--minutes M]

As root. A rank on each node of .ci/slurm-cluster, two in all, trains the sample's BERT, again and
again. Every 15 to 40 s, and not before a new checkpoint, something is done to the job. What SLURM
starts again is waited for, what has ended is submitted again with the same --output. The losses of
each training have to be a calm one's, bit for bit.

Each disturbance is a line of log.jsonl in --folder: stopped, the same command goes on from there.
At its end it writes DISTRIBUTED/results/soak.json, for report.py --table measured. Nothing else may
use the cluster meanwhile.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / ".ci/slurm-cluster"
WORDS = ["--sample", "--batch-size", "4", "--max-steps", "1440", "--dropout", "0.1"]
WORDS += ["--log-every", "1", "--save-every", "20", "--no-profile", "--device", "cpu"]
STEPS = 1440
# So near its end a training is left alone: what is done to it could come too late.
LAST_STEPS = 60
SECONDS_BETWEEN = (15, 40)
# A job that does nothing new for so long hangs. SLURM gives a silent node up after 180 s.
PATIENCE = 420
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
# What of a run's environment stands in the table's caption.
MACHINE_FACTS = ["date", "commit", "dirty", "cpu", "cores", "python", "torch", "transformers"]


class Wrong(Exception):
    """Something that the scripts must not do."""


def call(*command):
    """Runs a command and returns its output."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stdout} {done.stderr}")
    return done.stdout.strip()


def last_step(log):
    """Returns the last step that a log tells of, or None."""
    steps = re.findall(r"^step ([\d,]+)/", log, re.MULTILINE)
    return int(steps[-1].replace(",", "")) if steps else None


def processes(node):
    """Returns process number and command of all that runs on a node."""
    found = []
    for pid in call("ip", "netns", "pids", f"node{node}").split():
        with contextlib.suppress(OSError):
            found.append((int(pid), Path(f"/proc/{pid}/cmdline").read_text().split("\0")))
    return found


def restart_node(node):
    """Ends all on a node but SLURM's daemon. Were the batch script still there when the node is
    back, SLURM would start the job beside it, call that a duplicate, and hold the job."""
    for pid, command in processes(node):
        if command[0] != "slurmd":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# 1. A training: one --output, and as many jobs and starts of them as it takes


class Training:
    def __init__(self, output):
        self.output = output
        self.job = None

    def submit(self):
        command = ["sbatch", "--parsable", "--job-name=soak", "--partition=spare"]
        command += ["--nodes=2", "--gres=gpu:a100:1", "--cpus-per-task=32"]
        command += [f"--output={self.output}-%j.log", "DISTRIBUTED/run_2x2.sbatch"]
        self.job = call(*command, *WORDS, "--output", self.output)

    def state(self):
        """Returns the job's state as SLURM has it, and how often it has been started again."""
        text = call("scontrol", "show", "job", self.job)
        restarts = int(re.search(r"\bRestarts=(\d+)", text)[1])
        return re.search(r"\bJobState=(\w+)", text)[1], restarts

    def logs(self):
        """Returns the log of each of the job's starts, up to the present one's."""
        path = Path(f"{self.output}-{self.job}.log")
        text = path.read_text(errors="replace") if path.exists() else ""
        parts = re.split(
            rf"^DISTRIBUTED: on .* job {self.job}, start (\d+)", text, flags=re.MULTILINE
        )
        log_of = dict(zip(parts[1::2], parts[2::2], strict=True))
        _, restarts = self.state()
        return [log_of.get(str(start), "") for start in range(1, restarts + 2)]

    def step(self):
        """Returns the last step of the present start, or None."""
        return last_step(self.logs()[-1])

    def saved_at(self):
        """Returns when the checkpoint was written; 0 without one."""
        with contextlib.suppress(FileNotFoundError):
            return (self.output / "checkpoint.pt").stat().st_mtime_ns
        return 0

    def finished(self):
        return (self.output / "results.json").exists()

    def has_ended(self):
        """Whether the job has ended for good. Raises Wrong where SLURM takes it for finished."""
        if self.state()[0] not in ENDED:
            return False
        # A lost node's job may be seen as failed before it is seen in the queue again.
        time.sleep(2)
        state, _ = self.state()
        if state == "COMPLETED" and not self.finished():
            raise Wrong(f"job {self.job} is COMPLETED, its training is not finished")
        return state in ENDED

    def wait(self, condition, what, seconds=PATIENCE):
        """Waits until condition() or the job's end. Raises Wrong where neither comes."""
        deadline = time.monotonic() + seconds
        while not condition() and not self.has_ended():
            if time.monotonic() > deadline:
                raise Wrong(f"job {self.job} is {self.state()} after {seconds} s: no {what}")
            time.sleep(0.5)

    def wait_for_effect(self, restarts):
        """Waits until the job goes back to the queue once more, or ends."""
        self.wait(lambda: self.state()[1] > restarts, "effect")

    def wait_for_checkpoint(self):
        """Waits until the present start trains, and then saves. Returns whether it has."""
        self.wait(lambda: self.step() is not None, "step")
        before = self.saved_at()
        self.wait(lambda: self.saved_at() not in (0, before), "checkpoint")
        return self.saved_at() not in (0, before)

    def ranks(self):
        """Returns the process numbers of the ranks on both nodes."""
        ranks = []
        for pid, command in processes("1") + processes("2"):
            python = "python" in command[0] and "torch.distributed.run" not in command
            if python and str(self.output) in command:
                ranks.append(pid)
        return ranks

    def read_losses(self):
        """Returns each step's loss, learning rate and gradient norm, of a stopped training too."""
        if self.finished():
            intervals = json.loads((self.output / "timings.json").read_text())["intervals"]
        else:
            checkpoint = torch.load(self.output / "checkpoint.pt", weights_only=True)
            intervals = checkpoint["state"]["intervals"]
        names = ("step", "loss", "learning_rate", "gradient_norm")
        return [[interval[name] for name in names] for interval in intervals]


# 2. What is done to it. Each returns when the job has gone back to the queue, has ended, or trains


def warn(training, restarts, draw):
    call("scancel", "--signal=USR1", "--batch", training.job)
    training.wait_for_effect(restarts)


def cancel(training, restarts, draw):
    call("scancel", training.job)
    training.wait_for_effect(restarts)


def requeue(training, restarts, draw):
    call("scontrol", "requeue", training.job)
    training.wait_for_effect(restarts)


def preempt(training, restarts, draw):
    command = ["sbatch", "--partition=urgent", "--nodes=2", "--gres=gpu:a100:2"]
    call(*command, "--output=/dev/null", "--wrap=sleep 2")
    training.wait_for_effect(restarts)


def kill_rank(training, restarts, draw):
    os.kill(draw.choice(training.ranks()), signal.SIGKILL)
    training.wait_for_effect(restarts)


def cut_briefly(training, restarts, draw):
    node = draw.choice(["1", "2"])
    call(CLUSTER, "cut", node)
    time.sleep(draw.uniform(2, 12))
    call(CLUSTER, "mend", node)
    before = training.step()
    training.wait(lambda: training.step() != before, "step")


def cut_for_long(training, restarts, draw):
    node = draw.choice(["1", "2"])
    call(CLUSTER, "cut", node)
    try:
        training.wait_for_effect(restarts)
    finally:
        restart_node(node)
        call(CLUSTER, "mend", node)


# Of about a hundred, how many of each.
DISTURBANCES = {
    "warned that its time is nearly up (SIGUSR1)": (warn, 18),
    "cancelled (scancel)": (cancel, 18),
    "requeued (scontrol requeue)": (requeue, 18),
    "preempted, with a minute's grace": (preempt, 18),
    "a rank killed (SIGKILL)": (kill_rank, 18),
    "a node's link cut for 2 to 12 s": (cut_briefly, 7),
    "a node's link cut until SLURM gives the node up, the node restarted": (cut_for_long, 3),
}


def disturb(training, draw):
    """Does something to the job and goes on as a user would, until there is a new checkpoint.

    Returns a line for the log, or None where the training was finished before."""
    weights = [weight for _, weight in DISTURBANCES.values()]
    name = draw.choices(list(DISTURBANCES), weights)[0]
    job = training.job
    _, restarts = training.state()
    begin = time.monotonic()
    print(f"{training.output.name}, step {training.step()}: {name}", end=" ", flush=True)
    DISTURBANCES[name][0](training, restarts, draw)
    submitted = 0
    before = []
    while not training.wait_for_checkpoint():
        if training.finished():
            print("too late")
            return None
        if submitted == 2:
            raise Wrong(f"job {training.job} has ended before a new checkpoint: see its log")
        before = before or training.logs()
        training.submit()
        submitted += 1
    logs = training.logs()
    before = before or logs[:-1]
    found = re.search(r"^going on from step ([\d,]+)", logs[-1], re.MULTILINE)
    resumed_from = int(found[1].replace(",", "")) if found else 0
    started_anew = submitted or len(logs) > restarts + 1
    reached = last_step("".join(before)) or resumed_from
    return {
        "disturbance": name,
        "training": training.output.name,
        "job": job,
        "submitted_again": submitted,
        "resumed_from": resumed_from if started_anew else None,
        "lost_steps": reached - resumed_from if started_anew else 0,
        "seconds_to_checkpoint": round(time.monotonic() - begin, 1),
    }


# 3. The trainings, one after the other


def train(training, disturbances, note, enough, seed):
    """Disturbs a training until it is near its end, or enough() says so."""
    training.submit()
    training.wait_for_checkpoint()
    disturbed_at = time.monotonic()
    while not enough():
        draw = random.Random(f"{seed} {len(disturbances)}")
        due = disturbed_at + draw.uniform(*SECONDS_BETWEEN)
        training.wait(lambda due=due: time.monotonic() > due, "time")
        if training.finished() or (training.step() or STEPS) > STEPS - LAST_STEPS:
            return
        if training.has_ended():
            raise Wrong(f"job {training.job} is {training.state()}, by itself: see its log")
        seconds = time.monotonic() - disturbed_at
        disturbed_at = time.monotonic()
        record = disturb(training, draw)
        if record:
            note(record | {"seconds_since_the_last": round(seconds, 1)})


def finish(training):
    training.wait(lambda: False, "end", seconds=3600)
    if not training.finished():
        raise Wrong(f"job {training.job} is {training.state()}, by itself: see its log")


def compare(training, losses):
    """Returns how a training's losses are those of a calm one: a line for the log."""
    own = training.read_losses()
    different = [own_step[0] for own_step, calm_step in zip(own, losses) if own_step != calm_step]
    return {"training": training.output.name, "steps": len(own), "different": different}


def train_all(options):
    """Disturbs training after training. Returns the calm one and the lines of the log."""
    path = options.folder / "log.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    disturbances = [record for record in records if "disturbance" in record]
    trainings = [record for record in records if "steps" in record]
    deadline = time.monotonic() + 60 * options.minutes

    def note(record):
        (disturbances if "disturbance" in record else trainings).append(record)
        with path.open("a") as file:
            file.write(json.dumps({"time": time.strftime("%F %T")} | record) + "\n")
        print(f"{len(disturbances)}: {record}", flush=True)

    def late():
        return time.monotonic() > deadline

    def enough():
        return len(disturbances) >= options.count or late()

    calm = Training(options.folder / "calm")
    if not calm.finished():
        calm.submit()
        finish(calm)
    losses = calm.read_losses()
    assert len(losses) == STEPS
    while not enough():
        training = Training(options.folder / f"training-{len(trainings) + 1}")
        train(training, disturbances, note, enough, options.seed)
        if late():
            break
        finish(training)
        note(compare(training, losses))
    # Without time to finish it, the last one is stopped where it is; the next call goes on with it.
    cancel_all()
    training = Training(options.folder / f"training-{len(trainings) + 1}")
    if disturbances and disturbances[-1]["training"] == training.output.name:
        trainings.append(compare(training, losses))
    return calm, disturbances, trainings


def cancel_all():
    call("scancel", "--name=soak")
    while call("squeue", "--noheader", "--name=soak"):
        time.sleep(1)


# 4. The table


def make_rows(disturbances, trainings):
    equal = [training["training"] for training in trainings if not training["different"]]
    groups = collections.defaultdict(list)
    for one in disturbances:
        groups[one["disturbance"]].append(one)
    groups = {name: groups[name] for name in DISTURBANCES} | {"in all": disturbances}
    rows = []
    for name, group in groups.items():
        again = sum(one["submitted_again"] > 0 for one in group)
        lost = max((one["lost_steps"] for one in group), default=0)
        seconds = [one["seconds_to_checkpoint"] for one in group]
        bit_for_bit = sum(one["training"] in equal for one in group)
        rows.append(
            [
                name,
                len(group),
                len(group) - again,
                again,
                f"{lost} steps at most" if lost else "nothing",
                f"{bit_for_bit} of {len(group)}",
                round(statistics.median(seconds)) if seconds else None,
            ]
        )
    return rows


def make_table(calm, disturbances, trainings):
    machine = json.loads((calm.output / "results.json").read_text())["environment"]
    between = statistics.median(one["seconds_since_the_last"] for one in disturbances)
    steps = sum(training["steps"] for training in trainings)
    different = sum(len(training["different"]) for training in trainings)
    conditions = (
        f"test cluster on one machine, {call('sinfo', '--version')}: two ranks on two nodes train"
        f" the sample's BERT for {STEPS:,} steps, saving every 20, with dropout; something is done"
        f" every {SECONDS_BETWEEN[0]} to {SECONDS_BETWEEN[1]} s ({between:.0f} in the median, as"
        f" there has to be a new checkpoint); compared with a calm one: {steps:,} steps of"
        f" {len(trainings)} training(s), {different} differ"
    )
    columns = ["what was done to the job", "tried", "went on by itself", "submitted again"]
    columns += ["lost", "losses bit for bit", "seconds to the next checkpoint"]
    return {
        "title": "Disturbed at random on two nodes",
        "conditions": conditions,
        "columns": columns,
        "rows": make_rows(disturbances, trainings),
        "environment": {name: machine.get(name) for name in MACHINE_FACTS},
    }


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--count", type=int, default=100, help="disturbances (default: 100)")
    add("--minutes", type=float, default=1e9, help="then no more of them (default: no limit)")
    add("--seed", type=int, default=1, help="(default: 1)")
    add("--folder", type=Path, default=ROOT / "runs/soak", help="(default: runs/soak)")
    add("--output", type=Path, default=ROOT / "DISTRIBUTED/results/soak.json")
    return parser.parse_args()


def main():
    options = parse_options()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    # A sum does not depend on how many cores are free.
    os.environ["OMP_NUM_THREADS"] = "1"
    cancel_all()
    try:
        calm, disturbances, trainings = train_all(options)
    except Wrong as wrong:
        sys.exit(f"wrong: {wrong}")
    table = make_table(calm, disturbances, trainings)
    options.output.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

"""The sbatch scripts on a real SLURM cluster of two nodes: .ci/slurm-cluster, as root.

Each node has its own address and loopback and no internet; its two A100 are device files, so SLURM
hands them out, and the ranks train on the CPU through gloo.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLUSTER = ROOT / ".ci/slurm-cluster"
SHARED = ROOT.parent / "shared"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
SHORT = ["--sample", "--limit", "57", "--max-steps", "12", "--log-every", "2", "--no-profile"]
LONG = ["--sample", "--epochs", "10", "--log-every", "2", "--no-profile"]
ENDLESS = ["--sample", "--epochs", "200", "--log-every", "2", "--no-profile"]
BOTH = pytest.mark.parametrize("script", ["baseline/run.sbatch", "DISTRIBUTED/run_2x2.sbatch"])


def cluster(*words):
    return subprocess.run(
        [CLUSTER, *words], capture_output=True, text=True, check=False, timeout=120
    )


class Slurm:
    def __init__(self, root, environment):
        self.root, self.environment, self.jobs = root, environment, []

    def __call__(self, *command):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def submit(self, *argv, options=(), **more):
        before = self.environment
        self.environment = before | more
        try:
            job = self("sbatch", "--parsable", *options, *argv).split(";")[0]
        finally:
            self.environment = before
        self.jobs.append(job)
        return job

    def log(self, job):
        found = [*self.root.glob(f"*-{job}.log")]
        return found[0].read_text(errors="replace") if found else ""

    def show(self, job, field):
        found = re.search(rf"\b{field}=(\S*)", self("scontrol", "show", "job", job))
        return found[1] if found else ""

    def wait(self, job, truth, seconds):
        until = time.monotonic() + seconds
        while not truth():
            if time.monotonic() > until:
                log, state = self.log(job)[-3000:], self.show(job, "JobState")
                self("scancel", job)
                pytest.fail(f"job {job} is {state} after {seconds} s:\n{log}")
            time.sleep(0.3)

    def finish(self, job, seconds=300):
        """Waits for the end; returns state and exit code as SLURM tells them."""
        self.wait(job, lambda: self.show(job, "JobState") in ENDED, seconds)
        return self.show(job, "JobState"), self.show(job, "ExitCode")

    def done(self, job, seconds=300):
        state, code = self.finish(job, seconds)
        assert (state, code) == ("COMPLETED", "0:0"), f"{state} {code}:\n{self.log(job)[-4000:]}"
        return self.log(job)

    def result(self, folder, name="results.json"):
        return json.loads((self.root / folder / name).read_text())


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A copy of the project in a folder with a space in its name, and a cluster to send it to."""
    if os.geteuid() != 0:
        pytest.skip("needs root: .ci/slurm-cluster makes network namespaces")
    for tool in ("slurmctld", "slurmd", "munged", "ip"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}: apt-get install slurm-wlm munge iproute2 (.ci/run does)")
    was_up = cluster("status").returncode == 0
    up = cluster("up")
    if up.returncode != 0:
        pytest.skip(f"the cluster does not start on this machine: {up.stderr.strip()[-300:]}")
    root = tmp_path_factory.mktemp("clu ster") / "pro ject"
    for name in ("baseline", "DISTRIBUTED"):
        shutil.copytree(
            ROOT / name,
            root / name,
            ignore=shutil.ignore_patterns("tests", "results", "__pycache__"),
        )
    shutil.copy(ROOT / "requirements.txt", root)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment |= dict(re.findall(r"^export (\w+)=(\S+)$", up.stdout, re.MULTILINE))
    environment |= {"VENV": os.environ.get("VENV") or sys.prefix, "OMP_NUM_THREADS": "1"}
    environment |= {"SQUAD_CACHE": str(root.parent / "cache")}
    for name in ("HF_HUB_OFFLINE", "RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    one = Slurm(root, environment)
    yield one
    for job in one.jobs:
        with contextlib.suppress(AssertionError):
            one("scancel", "--signal=KILL", "--full", job)
            one("scancel", job)
    if not was_up:
        cluster("down")


# 1. Each deliverable as the course asks for it


def test_baseline_in_a_folder_with_a_space(slurm):
    job = slurm.submit("baseline/run.sbatch", *SHORT)
    slurm.done(job)
    results = slurm.result(f"runs/baseline-{job}")
    assert (results["steps"], results["world_size"]) == (12, 1)
    assert str(results["environment"]["slurm_job_id"]) == job
    lines = (slurm.root / f"runs/baseline-{job}/slurm-node.txt").read_text().splitlines()
    assert lines[0].startswith("NodeName=a100-0") and "CPUAlloc=32 " in "\n".join(lines)
    assert lines[-1] == "SLURM_JOB_CPUS_PER_NODE=32"


def test_four_ranks_on_two_nodes(slurm):
    """Quick: everything but the memorising. Both nodes tell their addresses; a trace of each rank."""
    argv = [word for word in SHORT if word != "--no-profile"]
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *argv)
    log = slurm.done(job)
    results = slurm.result(f"runs/DISTRIBUTED-{job}")
    assert (results["world_size"], results["nodes"], results["steps"]) == (4, 2, 12)
    first = r"^node 0: c1-1 at \S*10.77.77.11.* meets the others at a100-01"
    assert re.search(first, log, re.MULTILINE)
    assert re.search(r"^node 1: c1-2 at \S*10.77.77.12", log, re.MULTILINE)
    assert results["environment"]["hosts"] == ["c1-1", "c1-2"]
    assert results["all_reduce"]["gigabytes_per_second"] > 0
    traces = (slurm.root / f"runs/DISTRIBUTED-{job}/tensorboard").glob("*.pt.trace.json*")
    assert sorted(file.name[:5] for file in traces) == ["rank0", "rank1", "rank2", "rank3"]
    ranks = slurm.result(f"runs/DISTRIBUTED-{job}", "timings.json")["ranks"]
    assert ranks["slowest"]["seconds"] >= ranks["fastest"]["seconds"]


def test_bad_input_ends_with_2_before_any_rank_starts(slurm):
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", "--sample", "--batch-size", "3")
    assert slurm.finish(job) == ("FAILED", "2:0")
    log = slurm.log(job)
    assert log.count("error:") == 1 and "error: --batch-size" in log and "Traceback" not in log
    assert "node 0" not in log


@pytest.mark.slow
def test_four_ranks_memorise_the_sample_as_baseline_does(slurm):
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", "--sample")
    one = slurm.submit("baseline/run.sbatch", "--sample", options=["-d", f"afterany:{job}"])
    slurm.done(job, 600)
    slurm.done(one, 900)
    many, single = slurm.result(f"runs/DISTRIBUTED-{job}"), slurm.result(f"runs/baseline-{one}")
    assert many["world_size"] == 4 and many["exact_match"] >= 90 and single["exact_match"] >= 90


STRATEGIES = {
    "zero2": ["--strategy", "zero2"],
    "fsdp": ["--strategy", "fsdp"],
    "hsdp": ["--strategy", "hsdp"],
    "dp": ["--strategy", "dp", "--batching", "bucketed"],
    "bf16 gradients": ["--gradients", "bf16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy(slurm, name):
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *SHORT, *STRATEGIES[name])
    slurm.done(job)
    results = slurm.result(f"runs/DISTRIBUTED-{job}")
    assert results["world_size"] == (1 if name == "dp" else 4)
    if name == "dp":
        return
    other = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *SHORT)
    slurm.done(other)
    losses = []
    for number in (job, other):
        timings = slurm.result(f"runs/DISTRIBUTED-{number}", "timings.json")
        losses.append([interval["loss"] for interval in timings["intervals"]])
    close = 0.05 if name == "bf16 gradients" else 1e-4
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < close


@pytest.mark.slow
def test_eight_ranks_a_node_have_one_ranks_losses(slurm):
    words = ["--sample", "--max-steps", "24", "--log-every", "1", "--no-profile", "--output"]
    many = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *words, "runs/many", GPUS_PER_NODE="8")
    slurm.done(many)
    slurm.done(slurm.submit("baseline/run.sbatch", *words, "runs/one"))
    results = slurm.result("runs/many")
    assert (results["world_size"], results["nodes"]) == (16, 2)
    losses = []
    for folder in ("runs/many", "runs/one"):
        intervals = slurm.result(folder, "timings.json")["intervals"]
        losses.append([interval["loss"] for interval in intervals])
    assert len(losses[0]) == 24
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5


@pytest.mark.slow
def test_real_questions_on_two_nodes(slurm):
    minilm, data = SHARED / "minilm", SHARED / "squad"
    if not minilm.exists() or not data.exists():
        pytest.skip("../shared/minilm and ../shared/squad are not here")
    argv = ["--model", minilm, "--train-file", data / "train.json", "--limit", "100"]
    argv += ["--validation-file", data / "dev.json", "--max-steps", "12", "--no-profile"]
    log = slurm.done(slurm.submit("DISTRIBUTED/run_2x2.sbatch", *argv), 900)
    assert "exact match" in log


@pytest.mark.slow
def test_scaling_shortened(slurm):
    shorter = {"SCALING_REPEATS": "1", "SCALING_RULES": "strong"}
    job = slurm.submit("DISTRIBUTED/scaling.sbatch", *SHORT, **shorter)
    log = slurm.done(job, 900)
    for shape in ("1x1", "1x2", "2x1", "2x2"):
        assert re.search(rf"\| strong \| {shape} \|", log), log[-3000:]


# 2. Stopped, cancelled, cut


def begun(slurm, job, seconds=240):
    """Waits until training is under way."""
    slurm.wait(job, lambda: re.search(r"^step \d+/", slurm.log(job), re.MULTILINE), seconds)


def processes(text):
    """The command lines of the processes on the nodes that hold a text."""
    found = []
    for node in (1, 2):
        pids = subprocess.run(
            ["ip", "netns", "pids", f"node{node}"], capture_output=True, text=True, check=True
        ).stdout.split()
        for pid in pids:
            with contextlib.suppress(OSError):
                command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
                if text.encode() in command:
                    found.append(command.split(b"\0"))
    return found


@pytest.mark.slow
def test_a_short_time_limit_finishes_through_requeues(slurm):
    """SLURM's limits are in minutes and its warning can come a minute early, so a start of two
    minutes trains for one, and 80 epochs take several starts."""
    argv = [*LONG, "--epochs", "80", "--output", "runs/limit"]
    options = ["--time=2", "--signal=B:USR1@50"]
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *argv, options=options)
    log = slurm.done(job, 1800)
    results = slurm.result("runs/limit")
    assert results["steps"] == 80 * 24 and len(results["resumed_from_steps"]) >= 1
    assert results["resumed_from_steps"] == sorted(set(results["resumed_from_steps"]))
    assert results["environment"]["restarts"] >= 1
    assert "goes back to the queue" in log and f"job {job}, start 2" in log


def test_the_warning_saves_and_requeues(slurm):
    warning_saves_and_requeues(slurm, "DISTRIBUTED/run_2x2.sbatch", r"^step \d+/")


# What the log says, or how many seconds after its first line, when the warning comes.
MOMENTS = ["on c1-1", 0.5, 1, 2, 4, 7, "packed, to", "features to train", r"steps \(", r"^step 2/"]
MOMENTS += [r"^step \d\d/", "^step 72/72"]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_warning_at_other_moments(slurm, script, moment):
    warning_saves_and_requeues(slurm, script, moment)


def warning_saves_and_requeues(slurm, script, moment):
    output = f"runs/usr1-{len(slurm.jobs)}"
    job = slurm.submit(script, *LONG, "--epochs", "3", "--output", output)
    text = moment if isinstance(moment, str) else "on c1-1"
    slurm.wait(job, lambda: re.search(text, slurm.log(job), re.MULTILINE), 240)
    if text != moment:
        time.sleep(moment)
    slurm("scancel", "--signal=USR1", "--batch", job)
    log = slurm.done(job, 600)
    results = slurm.result(output)
    assert results["steps"] == 72 and log.count("asked to stop") == 1
    # All but done, it may rather finish.
    finished = moment == "^step 72/72" and "goes back" not in log
    assert slurm.show(job, "Restarts") == ("0" if finished else "1")
    assert log.count("goes back to the queue") == (not finished)
    trained = len(results["resumed_from_steps"])
    assert trained == (re.search(r"stopped by .* at step [1-9]", log) is not None)
    assert trained or finished or not text.startswith("^step")
    assert not (slurm.root / output / "stop").exists()


@pytest.mark.slow
def test_scaling_goes_back_to_the_queue_and_keeps_its_finished_runs(slurm):
    shorter = {"SCALING_REPEATS": "1", "SCALING_RULES": "strong", "SCALING_SHAPES": "1x1 2x2"}
    argv = ["--sample", "--max-steps", "30", "--log-every", "1", "--output", "runs/scaled"]
    job = slurm.submit("DISTRIBUTED/scaling.sbatch", *argv, **shorter)
    slurm.wait(job, lambda: "step 2/30" in slurm.log(job).partition("-- strong-2x2")[2], 300)
    slurm("scancel", "--signal=USR1", "--batch", job)
    log = slurm.done(job, 600)
    assert log.count("-- strong-1x1-1") == 1 and log.count("-- strong-2x2-1") == 2
    assert slurm.show(job, "Restarts") == "1"
    assert len(slurm.result("runs/scaled/strong-2x2-1")["resumed_from_steps"]) == 1
    assert re.search(r"\| strong \| 2x2 \|", log)


@pytest.mark.slow
@BOTH
def test_scancel_leaves_a_checkpoint_and_nothing_running(slurm, script):
    output = f"runs/cancelled-{script[:4]}"
    job = slurm.submit(script, *ENDLESS, "--output", output)
    begun(slurm, job)
    begin = time.monotonic()
    slurm("scancel", job)
    slurm.wait(job, lambda: slurm("squeue", "-h", "-j", job, "-o", "%T") == "", 100)
    assert time.monotonic() - begin < 60
    assert processes(output) == []
    assert (slurm.root / output / "checkpoint.pt").exists()
    assert not (slurm.root / output / "results.json").exists()
    assert slurm.show(job, "JobState") == "CANCELLED" and slurm.show(job, "Restarts") == "0"


@pytest.mark.slow
def test_a_person_may_touch_stop(slurm):
    """The job then ends with 75, so SLURM has it as failed: the training is not finished."""
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *ENDLESS, "--output", "runs/touched")
    begun(slurm, job)
    (slurm.root / "runs/touched/stop").touch()
    assert slurm.finish(job, 60) == ("FAILED", "75:0")
    assert (slurm.root / "runs/touched/checkpoint.pt").exists()


@pytest.mark.slow
def test_a_node_whose_link_is_cut(slurm):
    """The ranks end within three minutes; the job as soon as SLURM gives the node up, and the run
    goes on from its checkpoint when the node is back."""
    argv = [*ENDLESS, "--save-every", "4", "--output", "runs/cut"]
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *argv, options=["--no-requeue"])
    slurm.wait(job, lambda: (slurm.root / "runs/cut/checkpoint.pt").exists(), 240)
    assert cluster("cut", "2").returncode == 0

    def ranks():
        commands = processes("runs/cut")
        return [c for c in commands if b"python" in c[0] and b"torch.distributed.run" not in c]

    try:
        begin = time.monotonic()
        while ranks():
            assert time.monotonic() - begin < 190, "ranks still run\n" + slurm.log(job)[-3000:]
            time.sleep(1)
        slurm.wait(job, lambda: slurm.show(job, "JobState") in ENDED, 240)
        log = slurm.log(job)
        assert "Traceback" in log and re.search(r"\[rank[01]\]|rank\W+[01]\b", log), log[-3000:]
    finally:
        cluster("mend", "2")
    slurm.wait(job, lambda: cluster("status").returncode == 0, 120)
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *argv)
    begun(slurm, job)
    assert re.search(r"going on from step \d+", slurm.log(job))
    slurm("scancel", job)
    slurm.finish(job, 120)


@pytest.mark.slow
def test_a_drained_node_lets_the_job_save_and_wait(slurm):
    """Maintenance: what runs goes on; asked to stop, it waits in the queue for the node."""
    argv = [*LONG, "--epochs", "20", "--output", "runs/drained"]
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *argv)
    begun(slurm, job)
    slurm("scontrol", "update", "nodename=a100-02", "state=drain", "reason=maintenance")
    try:
        before = slurm.log(job).count("step ")
        slurm.wait(job, lambda: slurm.log(job).count("\nstep ") > before + 2, 60)
        slurm("scancel", "--signal=USR1", "--batch", job)
        slurm.wait(job, lambda: slurm.show(job, "JobState") == "PENDING", 120)
        time.sleep(10)
        assert slurm.show(job, "JobState") == "PENDING", "it does not start without its node"
    finally:
        slurm("scontrol", "update", "nodename=a100-02", "state=resume")
    slurm.done(job, 600)
    results = slurm.result("runs/drained")
    assert results["steps"] == 480 and len(results["resumed_from_steps"]) == 1


@pytest.mark.slow
def test_a_lost_node_requeues_the_job(slurm):
    """SLURM itself queues the job again; it goes on from its last save."""
    argv = [*ENDLESS, "--save-every", "4", "--output", "runs/lost"]
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *argv)
    slurm.wait(job, lambda: (slurm.root / "runs/lost/checkpoint.pt").exists(), 240)
    assert cluster("cut", "2").returncode == 0
    last = int(re.findall(r"^step (\d+)/", slurm.log(job), re.MULTILINE)[-1])
    try:
        slurm.wait(job, lambda: slurm.show(job, "Restarts") == "1", 400)
    finally:
        cluster("mend", "2")
    slurm.wait(job, lambda: "going on from step" in slurm.log(job), 240)
    found = re.search(r"going on from step (\d+)", slurm.log(job))
    assert int(found[1]) >= last - 4
    slurm("scancel", job)
    slurm.finish(job, 120)


@pytest.mark.slow
@BOTH
def test_a_preempted_job_goes_on(slurm, script):
    """With a grace SLURM first tells srun's processes alone; without any, it tells all."""
    output = f"runs/preempted-{script[:4]}"
    options = ["--partition=spare"]
    job = slurm.submit(script, *ENDLESS, "--output", output, options=options)
    begun(slurm, job)
    options = ["--partition=urgent", "-N2", "--gres=gpu:a100:2", "--output=/dev/null"]
    other = slurm.submit("--wrap", "sleep 5", options=options)
    slurm.wait(job, lambda: "going on from step" in slurm.log(job), 200)
    assert slurm.show(job, "Restarts") == "1" and slurm.show(other, "JobState") == "COMPLETED"
    slurm("scancel", job)
    assert slurm.finish(job, 100)[0] == "CANCELLED"
    assert slurm.show(job, "Restarts") == "1", "a cancelled job does not go back"


@pytest.mark.slow
def test_starts_that_save_nothing_end_after_three(slurm):
    """Each is warned before it trains. It ends as failed, so no other job takes it for finished."""
    job = slurm.submit("baseline/run.sbatch", *LONG, "--output", "runs/nothing")
    for start in range(1, 4):
        slurm.wait(job, lambda: f"start {start}, commit" in slurm.log(job), 60)
        slurm("scancel", "--signal=USR1", "--batch", job)
    assert slurm.finish(job, 60) == ("FAILED", "75:0")
    log = slurm.log(job)
    assert slurm.show(job, "Restarts") == "2" and log.count("goes back to the queue") == 2
    assert "three starts in a row have saved nothing" in log and "step 2/" not in log


@pytest.mark.slow
def test_a_limit_shorter_than_its_warning_is_told(slurm):
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *ENDLESS, options=["--time=2"])
    slurm.wait(job, lambda: "a limit of 2:00 is too short for a warning" in slurm.log(job), 60)
    slurm("scancel", job)
    slurm.finish(job, 100)


# 3. Arrays, and other ways to submit


@pytest.mark.slow
def test_of_an_array_one_task_goes_back(slurm):
    """Each task is a training of its own."""
    array = slurm.submit("baseline/run.sbatch", *LONG, options=["--array=1-3"])
    # A task has a number of its own only when it runs.
    slurm.wait(array, lambda: slurm("squeue", "-h", "-j", array, "-t", "R").count("\n") == 2, 60)
    tasks = [slurm.show(f"{array}_{number}", "JobId") for number in range(1, 4)]
    begun(slurm, tasks[2])
    slurm("scancel", "--signal=USR1", "--batch", f"{array}_3")
    for number, task in enumerate(tasks, 1):
        slurm.done(f"{array}_{number}", 600)
        results = slurm.result(f"runs/baseline-{task}")
        assert len(results["resumed_from_steps"]) == (number == 3)
        assert slurm.show(f"{array}_{number}", "Restarts") == str(int(number == 3))
    assert "it cannot" not in slurm.log(tasks[2])


@pytest.mark.slow
def test_a_chain_of_tasks_on_one_output(slurm):
    argv = [*LONG, "--output", "runs/chain"]
    array = slurm.submit("baseline/run.sbatch", *argv, options=["--array=1-3%1"])
    slurm.wait(array, lambda: slurm.show(f"{array}_1", "JobState") == "RUNNING", 60)
    first = slurm.show(f"{array}_1", "JobId")
    begun(slurm, first)
    # scancel signals it, and then waits for a task that is back in the queue.
    slurm("bash", "-c", f"timeout 5 scancel --signal=USR1 --batch {first} || true")
    logs = []
    for number in range(1, 4):
        slurm.done(f"{array}_{number}", 600)
        logs.append(slurm.log(slurm.show(f"{array}_{number}", "JobId")))
    assert len(slurm.result("runs/chain")["resumed_from_steps"]) == 1
    assert "".join(logs).count("holds a finished run") == 2
    assert "".join(logs).count("goes back to the queue") == 1 and "it cannot" not in "".join(logs)


@pytest.mark.slow
@pytest.mark.parametrize("caller", [[], ["srun", "-n1"]], ids=["salloc", "srun"])
def test_a_job_submitted_within_another_allocation(slurm, caller):
    around = ["salloc", "--quiet", "-N1", "-n1", "--mem-per-cpu=100M", "--gres=gpu:a100:1", *caller]
    job = slurm(*around, "sbatch", "--parsable", "DISTRIBUTED/run_2x2.sbatch", *SHORT)
    slurm.jobs.append(job)
    slurm.done(job)
    assert slurm.result(f"runs/DISTRIBUTED-{job}")["world_size"] == 4


@pytest.mark.slow
def test_several_tasks_a_node_are_one_torchrun(slurm):
    options = ["--ntasks-per-node=2", "--cpus-per-task=32"]
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *SHORT, options=options)
    slurm.done(job)
    results = slurm.result(f"runs/DISTRIBUTED-{job}")
    assert (results["world_size"], results["nodes"]) == (4, 2)


@pytest.mark.slow
@BOTH
def test_nothing_of_the_callers_environment(slurm, script):
    """--export=NONE; the environment is found as it is without any setting, in .venv."""
    venv = slurm.root / ".venv"
    venv.symlink_to(slurm.environment["VENV"])
    try:
        slurm.done(slurm.submit(script, *SHORT, options=["--export=NONE"]))
    finally:
        venv.unlink()


# 4. Nodes that cannot meet


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "words"), [("", "has no address"), ("127.0.0.1", "is this node itself")]
)
def test_a_wrong_master_addr(slurm, address, words):
    begin = time.monotonic()
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *SHORT, MASTER_ADDR=address)
    state, _ = slurm.finish(job, 200)
    assert state == "FAILED" and time.monotonic() - begin < 180
    assert words in slurm.log(job)


@pytest.mark.slow
def test_a_wait_is_told_and_ends(slurm):
    """An address where nobody listens: a word after 20 s, the end within three minutes."""
    job = slurm.submit("DISTRIBUTED/run_2x2.sbatch", *SHORT, MASTER_ADDR="10.77.77.200")
    begin = time.monotonic()
    slurm.wait(job, lambda: "waits for the other nodes" in slurm.log(job), 90)
    state, _ = slurm.finish(job, 240)
    assert state == "FAILED" and time.monotonic() - begin < 200
    log = slurm.log(job)
    assert "no rank has started in" in log and "timed out" in log and "10.77.77.200" in log

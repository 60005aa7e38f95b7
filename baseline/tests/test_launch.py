"""The scripts that start train.py: its arguments, being asked to stop at any moment, exit codes, jobs
that go back to the queue, and what is left beside the results.

stand_ins.py says in what surroundings they run here.
"""

import datetime
import itertools
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from stand_ins import ROOT, executable, project, told, venv  # noqa: F401  # two are fixtures

SBATCH = sorted(ROOT.glob("*/*.sbatch"))
AWKWARD = ["--model", "a  b", "$HOME", "`ls`;*", "it's", '"q"', "", "new\nline", "ñ"]
BOTH = pytest.mark.parametrize("script", ["baseline/run.sbatch", "DISTRIBUTED/run_2x2.sbatch"])


def words(output, word="TRAIN"):
    """The arguments that each start of a stand-in got; those of preparing alone left out."""
    starts = [start if word == "TORCHRUN" else start[0] for start in told(output, word)]
    return [arguments for arguments in starts if "--prepare" not in arguments]


def value(arguments, name):
    """What the arguments give to an option: the last one wins."""
    found = None
    for one, two in itertools.pairwise([*arguments, ""]):
        if one == name:
            found = two
        elif one.startswith(f"{name}="):
            found = one.split("=", 1)[1]
    return found


def ask_to_stop(project, script, moment, number, *arguments, everyone=False, **environment):
    """Starts a script, sends it a signal when it prints `moment`, and waits for its end."""
    surroundings = {"VENV": str(project.venv), "STUB_TRAIN": "30", **environment}
    process = project.start("bash", script, *arguments, **surroundings)
    process.output = ""
    for line in process.stdout:
        process.output += line
        if moment in line:
            break
    else:
        raise AssertionError(f"it never printed {moment!r}: {process.communicate()}")
    if everyone:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    rest, process.error = process.communicate(timeout=25)
    process.output += rest
    return process


def requeues(project):
    log = project.root / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("script", SBATCH, ids=lambda p: p.name)
def test_an_sbatch_script_is_short_and_says_why(script):
    lines = script.read_text().splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    directives = [line for line in lines if re.match(r"#\s*SBATCH\b", line)]
    assert len(directives) >= 5
    for line in directives:
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)? +# .{8,}", line), (
            f"no reason, or a space: {line}"
        )
    assert lines[0] == "#!/bin/bash"
    assert f"sbatch {script.relative_to(ROOT)}" in "\n".join(lines[:8])


# 1. What train.py is given


def test_arguments_reach_train_py_unchanged(project):
    answer = project.script("baseline/run.sbatch", *AWKWARD)
    assert answer.returncode == 0, answer.error
    (arguments,) = words(answer.output)
    assert arguments[2:] == AWKWARD
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", "--sample", *AWKWARD)
    assert answer.returncode == 0, answer.error
    for arguments in words(answer.output):
        assert arguments[2:] == ["--sample", *AWKWARD]


@BOTH
def test_the_output_is_chosen_once_or_as_given(project, script):
    answer = project.script(script, "--sample")
    outputs = {value(arguments, "--output") for arguments, _ in told(answer.output)}
    (output,) = outputs
    assert re.fullmatch(rf"runs/{script.split('/')[0]}-\d{{8}}-\d{{6}}", output)
    assert (project.root / output / "results.json").exists()
    for given in (["--output", "a b"], ["--output=a b"], ["--output", "x", "--output", "a b"]):
        answer = project.script(script, "--sample", *given)
        assert {value(got, "--output") for got, _ in told(answer.output)} == {"a b"}
        # The launcher looks there too: it is where the results are, so the exit code is 0.
        assert answer.returncode == 0
        shutil.rmtree(project.root / "a b")
    answer = project.script(script, "--sample", **project.slurm())
    outputs = {value(arguments, "--output") for arguments, _ in told(answer.output)}
    assert outputs == {f"runs/{script.split('/')[0]}-123456"}


@pytest.mark.slow
def test_it_finds_the_project_when_slurm_runs_a_copy(project):
    spool = project.root.parent / "spool"
    spool.mkdir()
    quick = {"VENV": str(project.venv), "SCALING_REPEATS": "1", "SCALING_SHAPES": "1x1"}
    for script in SBATCH:
        copy = shutil.copy(script, spool / "slurm_script")
        for job, place in enumerate((".", "baseline")):
            surroundings = project.slurm(job=job) | quick
            surroundings["SLURM_SUBMIT_DIR"] = str(project.root / place)
            answer = project.run("bash", copy, "--sample", **surroundings)
            assert answer.returncode == 0 and told(answer.output), answer.error
        surroundings["SLURM_SUBMIT_DIR"] = str(spool)
        lost = project.run("bash", copy, cwd=spool, **surroundings)
        assert lost.returncode == 2 and lost.output == ""
        assert lost.error == f"{spool} is not the project's root\n"


def test_run_sbatch_uses_one_gpu_of_several_and_never_fewer_than_slurm_gave(project):
    gpus = project.gpus(2)
    answer = project.script("baseline/run.sbatch", **gpus)
    assert told(answer.output)[0][1]["CUDA_VISIBLE_DEVICES"] == "0"
    assert "2 GPUs are here" in answer.output
    answer = project.script("baseline/run.sbatch", CUDA_VISIBLE_DEVICES="3,1", **gpus)
    assert told(answer.output)[0][1]["CUDA_VISIBLE_DEVICES"] == "3"
    few = project.script("baseline/run.sbatch", **project.slurm(gpus=2) | project.gpus(1))
    assert few.returncode == 1 and told(few.output) == []
    assert "SLURM gave 2 GPUs" in few.error and "torch sees 1" in few.error


# 2. Exit codes


@BOTH
@pytest.mark.parametrize("slurm", [False, True])
def test_exit_codes(project, script, slurm):
    job = project.slurm(nodes=2) if slurm else {}
    job["NODES"] = "1"
    given = ("--sample", "--output", "out")
    assert project.script(script, *given, STUB_CODE="1", **job).returncode == 1
    assert project.script(script, *given, STUB_CODE="137", **job).returncode in (1, 137)
    assert project.script(script, *given, **job).returncode == 0
    again = project.script(script, *given, **job)
    assert again.returncode == 0 and "requeue" not in again.output
    assert requeues(project) == []


@BOTH
def test_wrong_input_ends_with_2_before_any_rank_starts(project, script):
    wrong = {"STUB_CODE_PREPARING": "2"} if "2x2" in script else {"STUB_CODE": "2"}
    answer = project.script(script, **wrong)
    assert answer.returncode == 2 and answer.error == ""
    assert len(told(answer.output)) == 1 and "TORCHRUN" not in answer.output
    assert told(answer.output)[0][1]["EXPECTED_WORLD_SIZE"] == ("4" if "2x2" in script else None)


@BOTH
def test_preparing_alone_and_help_train_nothing(project, script):
    for option in ("--prepare", "--help"):
        answer = project.script(script, option)
        assert answer.returncode == 0 and "TORCHRUN" not in answer.output


def test_a_failure_says_what_is_known(project):
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", "--sample", STUB_CODE="3")
    assert answer.returncode == 1
    assert answer.error.splitlines()[-1].startswith("DISTRIBUTED: ended with exit code 1")
    assert "MASTER_ADDR" not in answer.error, "nothing points at the network"


# 3. Asked to stop

# What is under way when the signal comes, and whether training has begun, so that there is something
# to save.
MOMENTS = {
    "baseline/run.sbatch: the environment is made": ("baseline: on", False),
    "baseline/run.sbatch: train.py imports": ("IMPORTING", True),
    "baseline/run.sbatch: it trains": ("TRAIN", True),
    "DISTRIBUTED/run_2x2.sbatch: the environment is made": ("DISTRIBUTED: on", False),
    "DISTRIBUTED/run_2x2.sbatch: train.py imports": ("IMPORTING", False),
    "DISTRIBUTED/run_2x2.sbatch: it prepares": ("--prepare", False),
    "DISTRIBUTED/run_2x2.sbatch: the ranks import": ("TORCHRUN", True),
    "DISTRIBUTED/run_2x2.sbatch: they train": ('"RANK": "0"', True),
}
SLOW = {"STUB_IMPORT": "1", "STUB_PREPARE": "1", "NODES": "1", "MODULES": "slow"}


@pytest.fixture
def slow(project):
    """A start that takes a second at each of its stages; making the environment is one."""
    profile = project.root / "profile"
    profile.write_text("module() { sleep 1; }\n")
    return SLOW | {"BASH_ENV": str(profile)}


QUICK = ["baseline/run.sbatch: train.py imports", "DISTRIBUTED/run_2x2.sbatch: the ranks import"]
ONE_OR_ALL = [(signal.SIGUSR1, False), (signal.SIGINT, True)]
EACH = itertools.product(MOMENTS, ONE_OR_ALL)


@pytest.mark.parametrize(
    ("moment", "number", "everyone"),
    [
        pytest.param(moment, *how, marks=[] if moment in QUICK else pytest.mark.slow)
        for moment, how in EACH
    ],
)
def test_a_stop_counts_at_any_moment(project, slow, moment, number, everyone):
    """A terminal sends Ctrl-C to all processes, SLURM its warning to the script alone."""
    script = moment.split(":")[0]
    text, trains = MOMENTS[moment]
    given = ("--sample", "--output", "out")
    answer = ask_to_stop(project, script, text, number, *given, everyone=everyone, **slow)
    assert answer.returncode == 75, answer.error
    assert answer.output.count("SAVED") == trains
    if not trains:
        assert "TORCHRUN" not in answer.output, "nothing is started after it"
    assert answer.error.count("asked to stop") == 1
    assert not (project.root / "out/stop").exists(), "or the next start would stop at once"
    assert project.script(script, *given, NODES="1").returncode == 0


@BOTH
def test_a_stale_stop_is_removed(project, script):
    (project.root / "out").mkdir()
    (project.root / "out/stop").touch()
    given = ("--sample", "--output", "out")
    answer = project.script(script, *given, NODES="1", STUB_TRAIN="0.3")
    assert answer.returncode == 0 and "SAVED" not in answer.output


@BOTH
def test_a_person_may_touch_stop(project, script):
    surroundings = project.slurm() | {"VENV": str(project.venv), "STUB_TRAIN": "30"}
    process = project.start("bash", script, "--sample", "--output", "out", **surroundings)
    for line in process.stdout:
        if line.startswith("TRAIN") and "--prepare" not in line:
            (project.root / "out").mkdir(exist_ok=True)  # train.py makes it
            (project.root / "out/stop").touch()
            break
    output, error = process.communicate(timeout=25)
    assert process.returncode == 75 and "SAVED" in output, error
    assert requeues(project) == [], "nobody said that the time was up"


@BOTH
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_only_a_job_whose_time_is_up_goes_back_to_the_queue(project, script, number):
    moment = '"RANK": "0"' if "2x2" in script else "TRAIN"
    given = ("--sample", "--output", "out")
    answer = ask_to_stop(project, script, moment, number, *given, **project.slurm())
    assert answer.returncode == 75 and "SAVED" in answer.output, answer.error
    wanted = ["requeue 123456"] if number == signal.SIGUSR1 else []
    assert requeues(project) == wanted


def test_of_an_array_only_this_task_goes_back(project):
    job = project.slurm() | {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "4"}
    ask_to_stop(project, "baseline/run.sbatch", "TRAIN", signal.SIGUSR1, **job)
    assert requeues(project) == ["requeue 123456_4"]


@pytest.mark.parametrize("script", SBATCH, ids=lambda p: p.name)
def test_a_stop_counts_before_the_project_is_found(project, script):
    """The scripts' own first lines: a slow file system can take its time to find job.sh."""
    copy = project.root.parent / "slurm_script"
    text = script.read_text()
    assert text.count("\nfor root in ") == 1
    copy.write_text(text.replace("\nfor root in ", "\necho BEGUN; sleep 1\nfor root in "))
    job = project.slurm(nodes=2) | {"VENV": str(project.venv)}
    process = project.start("bash", copy, "--sample", "--output", "out", **job)
    assert process.stdout.readline() == "BEGUN\n"
    process.send_signal(signal.SIGUSR1)
    output, error = process.communicate(timeout=25)
    assert process.returncode == 75 and told(output) == [], error
    assert requeues(project) == ["requeue 123456"]


def test_a_job_that_was_cancelled_stays_so(project):
    """Though its time is nearly up too; and of several signals none is lost or kills."""
    job = project.slurm() | {"VENV": str(project.venv), "STUB_TRAIN": "30"}
    # Deaf for a second: the request is kept until it is asked for.
    stub = project.root / "baseline/train.py"
    text = stub.read_text().replace("\nuntil = time", "\ntime.sleep(1)\nuntil = time")
    stub.write_text(text)
    process = project.start("bash", "baseline/run.sbatch", "--output", "out", **job)
    for line in process.stdout:
        if line.startswith("TRAIN"):
            break
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.2)
    output, error = process.communicate(timeout=25)
    assert process.returncode == 75 and "SAVED" in output, error
    assert requeues(project) == []


@BOTH
def test_what_slurm_preempts_with_a_grace_goes_back(project, script):
    """SLURM then tells the ranks, and not the script: they end by themselves. TRAIN ends with 75, or
    in a rank with 0, if the file stop is there; nobody has asked the script."""
    job = project.slurm() | {"VENV": str(project.venv), "STUB_TRAIN": "30"}
    for preempted, wanted in (("None", []), ("2026-11-28T11:20:02", ["requeue 123456"])):
        surroundings = job | {"STUB_PREEMPTED": preempted}
        given = ("--sample", "--output", f"out-{preempted[:4]}")
        process = project.start("bash", script, *given, **surroundings)
        for line in process.stdout:
            if line.startswith("TRAIN") and "--prepare" not in line:
                (project.root / given[-1]).mkdir(exist_ok=True)
                (project.root / given[-1] / "stop").touch()
                break
        output, error = process.communicate(timeout=25)
        assert process.returncode == 75 and "SAVED" in output, error
        assert requeues(project) == wanted


def test_starts_that_save_nothing_end_after_three(project):
    def start(number, saves=False, **more):
        checkpoint = project.root / "out/checkpoint.pt"
        if saves:
            stub.write_text(f"open({str(checkpoint)!r}, 'w').write('{number}')\n{text}")
            os.utime(checkpoint, (number, number)) if checkpoint.exists() else None
        else:
            stub.write_text(text)
        job = project.slurm() | {"SLURM_RESTART_COUNT": str(number)} | more
        given = ("baseline/run.sbatch", "TRAIN", signal.SIGUSR1, "--output", "out")
        return ask_to_stop(project, *given, **job)

    stub = project.root / "baseline/train.py"
    text = stub.read_text()
    for number in range(2):
        assert "goes back to the queue" in start(number).output
    assert "goes back to the queue" in start(2, saves=True).output, "it makes progress"
    for number in range(3, 5):
        assert "goes back to the queue" in start(number).output
    last = start(5)
    assert last.returncode == 75 and "goes back" not in last.output
    assert "three starts in a row have saved nothing" in last.error
    assert len(requeues(project)) == 5
    # Submitted again, it is counted anew.
    assert "goes back to the queue" in start(0).output
    assert (
        project.script("baseline/run.sbatch", "--output", "out", **project.slurm()).returncode == 0
    )
    assert not (project.root / "out/.starts").exists()


def test_a_limit_shorter_than_its_warning_is_told(project):
    for limit, told_so in (("2:00", True), ("1:00:00", False)):
        job = project.slurm() | {"STUB_LIMIT": limit}
        given = ("baseline/run.sbatch", "TRAIN", signal.SIGUSR1, "--output", limit)
        answer = ask_to_stop(project, *given, **job)
        assert ("a limit of 2:00 is too short for a warning" in answer.error) == told_so


def test_a_job_warned_before_it_trains_goes_back_too(project, slow):
    job = project.slurm() | slow
    answer = ask_to_stop(project, "baseline/run.sbatch", "baseline: on", signal.SIGUSR1, **job)
    assert answer.returncode == 75 and told(answer.output) == []
    assert requeues(project) == ["requeue 123456"]


@BOTH
@pytest.mark.parametrize(
    ("ends", "code"), [({"STUB_CODE": "1"}, 1), ({"STUB_TRAIN": "0"}, 0)], ids=["fails", "finishes"]
)
def test_what_ends_by_itself_after_a_warning_does_not_go_back(project, slow, script, ends, code):
    moment = "TORCHRUN" if "2x2" in script else "IMPORTING"
    surroundings = project.slurm() | slow | ends
    answer = ask_to_stop(project, script, moment, signal.SIGUSR1, "--sample", **surroundings)
    assert answer.returncode == code, answer.error
    assert requeues(project) == []


# 4. What only the machine can tell, and the drawing of the profiled step


@BOTH
def test_the_machine_is_described_beside_the_results(project, script):
    job = project.slurm(gpus=2)
    answer = project.script(script, "--sample", "--output", "out", NODES="1", **job)
    assert answer.returncode == 0, answer.error
    fields = "name,driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem"
    fields += ",temperature.gpu,clocks_throttle_reasons.active"
    for moment in ("before", "after"):
        text = (project.root / f"out/nvidia-smi-{moment}.csv").read_text()
        assert f"--query-gpu={fields}" in text and "--format=csv" in text
    lines = (project.root / "out/slurm-node.txt").read_text().splitlines()
    assert lines == ["NodeName=n0 CPUAlloc=64", "SLURM_JOB_CPUS_PER_NODE=32(x1)"]
    assert "TRACE --tensorboard out" in answer.output


def test_the_machine_costs_no_run(project):
    job = project.slurm()
    executable(
        project.bin / "nvidia-smi",
        """#!/bin/sh
if [ "$1" = -L ]; then echo GPU 0: A100; exit; fi
case "$*" in *throttle*) exit 2 ;; esac
echo "$@"
""",
    )
    executable(project.bin / "scontrol", "#!/bin/sh\nexit 1\n")
    (project.root / "baseline/trace.py").write_text("raise SystemExit('no trace here')")
    answer = project.script("baseline/run.sbatch", "--output", "out", **job)
    assert answer.returncode == 0
    assert answer.error == "baseline: the profiled step is not drawn: no trace here\n"
    assert "temperature.gpu" in (project.root / "out/nvidia-smi-after.csv").read_text()
    executable(project.bin / "nvidia-smi", "#!/bin/sh\necho GPU\n[ $1 = -L ]\n")
    answer = project.script("baseline/run.sbatch", "--output", "other", **job)
    assert answer.returncode == 0 and (project.root / "other/results.json").exists()
    assert not list((project.root / "other").glob("nvidia*"))


def test_an_unfinished_run_and_a_finished_one_are_left_alone(project):
    given = ("baseline/run.sbatch", "--output", "out")
    project.script(*given, STUB_CODE="1", **project.gpus(1))
    assert not (project.root / "out").exists()
    project.script(*given, **project.gpus(1))
    (project.root / "out/nvidia-smi-before.csv").write_text("of the run")
    again = project.script(*given, **project.gpus(1))
    assert again.returncode == 0 and "TRACE" not in again.output
    assert (project.root / "out/nvidia-smi-before.csv").read_text() == "of the run"
    given = ("baseline/ladder.sbatch", "--output", "ladder")
    project.script(*given, **project.gpus(1))
    (project.root / "ladder/1-fp32/nvidia-smi-before.csv").write_text("of the run")
    project.script(*given, **project.gpus(1))
    text = (project.root / "ladder/1-fp32/nvidia-smi-before.csv").read_text()
    assert text == "of the run"


# 5. The power of the run's GPUs


@pytest.fixture
def sampled(project):
    """A start with two GPUs, whose nvidia-smi answers -l without an end, as the real one does.
    Training ends, or says SAMPLED and goes on, when its node has three samples."""
    return {**project.gpus(2), "TZ": "UTC-9", "STUB_SAMPLES": "yes"}


def samples(project, node=0):
    """The samples of a node, as pairs of time and the rest of the line."""
    path = project.root / f"out/power-{node}.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(line.split(", ", 1)) for line in lines]


def count_samplers(project):
    """How many were started; waits for their end, since they look for their run once a second."""
    pids = (project.root / "samplers").read_text().split()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until, "a sampler has outlived its run"
        time.sleep(0.1)
    return len(pids)


def test_the_power_of_the_run_s_gpu_is_sampled_in_utc(project, sampled):
    given = ("baseline/run.sbatch", "--output", "out")
    answer = project.script(*given, CUDA_VISIBLE_DEVICES="3,1", **sampled)
    assert answer.returncode == 0 and answer.error == ""
    assert "SAMPLED" in answer.output and count_samplers(project) == 1
    found = samples(project)
    assert {rest for _, rest in found} == {"--id=3, 250.00"}
    last = datetime.datetime.strptime(f"{found[-1][0]} +0000", "%Y/%m/%d %H:%M:%S.%f %z")
    assert abs(last.timestamp() - time.time()) < 60
    project.script(*given, **sampled)
    assert samples(project) == found, "a finished run is left alone"


@pytest.mark.parametrize(("used", "gpus"), [("2", "0,1"), ("1", "0")])
def test_each_node_samples_the_gpus_that_it_uses(project, sampled, used, gpus):
    job = project.slurm(nodes=2, gpus=2) | sampled | {"GPUS_PER_NODE": used}
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", "--sample", "--output", "out", **job)
    assert answer.returncode == 0, answer.error
    assert answer.output.count("SAMPLED") == 2 and count_samplers(project) == 2
    for node in (0, 1):
        assert {rest for _, rest in samples(project, node)} == {f"--id={gpus}, 250.00"}


def test_a_life_adds_to_the_samples_of_the_one_before(project, sampled):
    given = ("baseline/run.sbatch", "--output", "out")
    ask_to_stop(project, given[0], "SAMPLED", signal.SIGUSR1, *given[1:], **sampled)
    assert count_samplers(project) == 1
    first = samples(project)
    assert project.script(*given, **sampled).returncode == 0
    assert count_samplers(project) == 2
    assert len(samples(project)) > len(first) > 2 and samples(project)[: len(first)] == first


@BOTH
@pytest.mark.parametrize(
    ("number", "everyone"),
    [
        (signal.SIGUSR1, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, True),
        (signal.SIGKILL, False),
        (signal.SIGKILL, True),
    ],
)
def test_the_sampler_ends_with_its_run(project, sampled, script, number, everyone):
    """And not before: what is asked to stop still saves. A killed script's training goes on."""
    job = project.slurm() | sampled | {"STUB_TRAIN": "3"}
    given = ("--sample", "--output", "out")
    answer = ask_to_stop(project, script, "SAMPLED", number, *given, everyone=everyone, **job)
    assert answer.returncode == (-9 if number == signal.SIGKILL else 75), answer.error
    assert count_samplers(project) == 1


def test_no_power_is_sampled_without_a_gpu_or_a_run(project, sampled):
    given = ("baseline/run.sbatch", "--output", "out")
    project.script(*given, "--help", **sampled)
    assert not (project.root / "out").exists()
    project.script(*given, **sampled | {"STUB_SAMPLES": None, "CUDA_VISIBLE_DEVICES": "-1"})
    assert (project.root / "out/results.json").exists() and not samples(project)


# 6. Compiled code, on the node's own disk


def archives(project):
    return sorted((project.root / ".cache").glob("compiled-*"))


@BOTH
def test_compiled_code_is_unpacked_on_the_node_and_kept_once(project, script):
    nodes = 2 if "2x2" in script else 1
    job = project.slurm(nodes=nodes)
    first = project.script(script, "--sample", "--output", "one", **job)
    assert first.returncode == 0 and first.error == ""
    assert first.output.count("COMPILED") == nodes and "KNOWN" not in first.output
    (archive,) = archives(project)
    written = archive.stat().st_mtime_ns
    again = project.script(script, "--sample", "--output", "two", **job)
    assert again.output.count("KNOWN") == nodes and "COMPILED" not in again.output
    folders = re.findall(r"^KNOWN (.*)", again.output, re.MULTILINE)
    assert len(set(folders)) == nodes
    for folder in folders:
        assert not folder.startswith(str(project.root)), "shared file systems give it trouble"
        assert not Path(folder).exists(), "it is left on the node"
    assert archives(project) == [archive] and archive.stat().st_mtime_ns == written
    # Another torch has an archive of its own.
    (project.bin / "nvidia-smi").write_text("#!/bin/sh\necho GPU: another\n")
    other = project.script(script, "--sample", "--output", "three", **job)
    assert other.output.count("COMPILED") == nodes and len(archives(project)) == 2


def test_a_damaged_archive_is_ignored_and_replaced(project):
    project.script("baseline/run.sbatch", "--output", "one")
    (archive,) = archives(project)
    whole = archive.read_bytes()
    foreign = project.root / "foreign"
    foreign.mkdir()
    (foreign / "made-with").write_text("another torch\n")
    project.run("tar", "-czf", "foreign.tar.gz", "-C", foreign, ".")
    for number, content in enumerate(
        [b"", whole[:-20], (project.root / "foreign.tar.gz").read_bytes()]
    ):
        archive.write_bytes(content)
        answer = project.script("baseline/run.sbatch", "--output", f"again-{number}")
        assert answer.returncode == 0 and "COMPILED" in answer.output
        (line,) = answer.error.splitlines()
        assert line.endswith(f"{archive.name} is damaged or was not made here: it is ignored")
        answer = project.script("baseline/run.sbatch", "--output", f"then-{number}")
        assert answer.error == "" and "KNOWN" in answer.output


def test_code_that_cannot_be_kept_costs_no_run(project):
    (project.root / "file").touch()
    answer = project.script("baseline/run.sbatch", SQUAD_CACHE=str(project.root / "file"))
    assert answer.returncode == 0
    (line,) = answer.error.splitlines()
    assert "the compiled code is not kept" in line
    own = project.root / "own"
    given = {"TORCHINDUCTOR_CACHE_DIR": str(own), "TRITON_CACHE_DIR": f"{own}/triton"}
    answer = project.script("baseline/run.sbatch", "--output", "out", **given)
    assert f"COMPILED {own}\n" in answer.output and archives(project) == []


# 7. DISTRIBUTED/run_2x2.sbatch: the nodes


def test_two_nodes_get_what_they_need(project):
    script = "DISTRIBUTED/run_2x2.sbatch"
    job = project.slurm(nodes=2, gpus=2)
    # As a shell within another allocation leaves it; srun refuses it beside the job's own.
    job["SLURM_MEM_PER_CPU"] = "100"
    answer = project.script(script, "--sample", **job)
    assert answer.returncode == 0, answer.error
    agents = words(answer.output, "TORCHRUN")
    assert sorted(value(agent, "--node-rank") for agent in agents) == ["0", "1"]
    wanted = {
        "--nnodes": "2",
        "--nproc-per-node": "2",
        "--master-addr": "n0",
        "--master-port": "23456",
        "--rdzv-conf": "timeout=120",
    }
    for agent in agents:
        assert {name: value(agent, name) for name in wanted} == wanted
    for _, environment in told(answer.output):
        assert environment["EXPECTED_WORLD_SIZE"] == "4" and environment["OMP_NUM_THREADS"] == "1"
    assert "--export=ALL" in answer.output  # whatever sbatch --export has left out
    assert "--kill-on-bad-exit=1" in answer.output and "--cpus-per-task=1" in answer.output
    assert answer.output.count("10.0.0.1") == 2  # both nodes say where they meet
    other = project.script(script, **project.slurm(nodes=2, gpus=2, job=123457))
    assert value(words(other.output, "TORCHRUN")[0], "--master-port") == "23457"
    chosen = {"MASTER_ADDR": "n1-ib", "MASTER_PORT": "29400"}
    answer = project.script(script, **chosen, **project.slurm(nodes=4, gpus=4, job=9))
    agents = words(answer.output, "TORCHRUN")
    assert len(agents) == 4
    assert value(agents[0], "--master-addr") == "n1-ib"
    assert value(agents[0], "--master-port") == "29400"


@pytest.mark.parametrize("address", ["", "localhost", "127.0.0.1", "::1"])
def test_two_nodes_cannot_meet_at_loopback(project, address):
    job = project.slurm(nodes=2, gpus=2)
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", MASTER_ADDR=address, **job)
    assert answer.returncode == 2 and "MASTER_ADDR" in answer.error
    assert "TORCHRUN" not in answer.output


def test_a_taken_port_is_told(project):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = project.script("DISTRIBUTED/run_2x2.sbatch", MASTER_PORT=str(port))
    assert answer.returncode == 2 and told(answer.output) == []
    assert str(port) in answer.error and "MASTER_PORT" in answer.error


@pytest.mark.parametrize(
    ("given", "large"),
    [
        ([], True),
        (["--learning-rate", "2e-4"], True),
        (["--sample"], False),
        (["--train-file=x"], False),
        (["--limit", "9"], False),
        (["--batch-size", "64"], False),
    ],
)
def test_the_large_batch_is_for_the_full_data_only(project, given, large):
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", *given, NODES="1")
    ahead = ["--batch-size", "512"] if large else []
    for arguments in words(answer.output):
        assert arguments[2:] == ahead + given, "the user's come later, so they win"
    assert ("Full data" in answer.output) == large


def test_dp_is_one_process_and_gpus_give_one_agent(project):
    job = project.slurm(nodes=2, gpus=2)
    for given in (["--strategy", "dp"], ["--strategy=dp"]):
        answer = project.script("DISTRIBUTED/run_2x2.sbatch", "--output", given[0], *given, **job)
        agents = words(answer.output, "TORCHRUN")
        assert [value(agent, "--nproc-per-node") for agent in agents] == ["1"]
        assert told(answer.output)[0][1]["EXPECTED_WORLD_SIZE"] == "1"
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", **project.gpus(2))
    (agent,) = words(answer.output, "TORCHRUN")
    assert (value(agent, "--nnodes"), value(agent, "--nproc-per-node")) == ("1", "2")


def test_the_transport_that_nccl_chose_is_told(project):
    log = "n0:1:9 [0] NCCL INFO Channel 00/0 : 3[1] -> 0[0] [receive] via NET/Socket/0\n"
    log += "n0:1:9 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM\n"
    job = project.slurm(nodes=2, gpus=2) | {"STUB_NCCL": log}
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", "--sample", **job)
    assert "\nNCCL connected the GPUs by NET/Socket, P2P (" in answer.output
    asked = [environment["NCCL_DEBUG"] for _, environment in told(answer.output)]
    assert asked.count("INFO") == 1, "one node is enough; the others have no such folder"
    other = project.script("DISTRIBUTED/run_2x2.sbatch", NCCL_DEBUG="WARN", **job)
    assert "connected" not in other.output, "it is the user's own log then"


# 8. The ladder, the scaling, the preparation


def test_the_ladder_changes_one_thing_a_rung(project):
    answer = project.script("baseline/ladder.sbatch", "--model", "a b", **project.gpus(1))
    assert answer.returncode == 0, answer.error
    rungs = words(answer.output)
    wanted = "1-fp32 2-tf32 3-bf16 4-fused 5-dynamic 6-bucketed 7-packed 8-compiled 9-graphed"
    assert [Path(rung[-1]).name for rung in rungs] == wanted.split()
    assert all("a b" in rung and "--no-profile" in rung for rung in rungs)
    for one, two in itertools.pairwise(rungs):
        assert len([(a, b) for a, b in zip(one[:-1], two[:-1]) if a != b]) == 1
    assert "REPORT" in answer.output
    (project.bin / "nvidia-smi").unlink()
    cpu = project.script("baseline/ladder.sbatch")
    names = [Path(arguments[-1]).name for arguments in words(cpu.output)]
    assert names == ["1-fp32", "2-fused", "3-dynamic", "4-bucketed", "5-packed"]
    assert all(arguments[0] == "--sample" for arguments in words(cpu.output))


def test_a_failed_rung_does_not_cost_the_others_their_table(project):
    answer = project.script("baseline/ladder.sbatch", STUB_CODE="3")
    assert answer.returncode == 3 and len(words(answer.output)) == 5
    assert "REPORT" in answer.output


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(
    ("script", "moment"),
    [
        ("baseline/ladder.sbatch", "-- rung 1"),
        ("baseline/ladder.sbatch", "TRAIN"),
        ("DISTRIBUTED/scaling.sbatch", "-- strong-1x1-1"),
        ("DISTRIBUTED/scaling.sbatch", '"RANK": "0"'),
    ],
)
def test_ladder_and_scaling_stop_the_run_under_way_and_start_no_other(
    project, script, moment, number
):
    job = project.slurm(nodes=2, gpus=2)
    job |= {"SCALING_REPEATS": "1", "SCALING_SHAPES": "1x1 1x2", "SCALING_RULES": "strong"}
    answer = ask_to_stop(project, script, moment, number, "--output", "out", **job)
    assert answer.returncode == 75, answer.error
    assert len(words(answer.output)) <= 1 and "REPORT" not in answer.output
    assert answer.output.count("SAVED") == len(words(answer.output))
    assert len(requeues(project)) == (number == signal.SIGUSR1)
    again = project.script(script, "--output", "out", **job)
    assert again.returncode == 0 and "REPORT" in again.output, again.error


def test_scaling_runs_each_shape_under_both_rules_and_goes_on(project):
    job = project.slurm(nodes=2, gpus=2)
    answer = project.script("DISTRIBUTED/scaling.sbatch", SCALING_REPEATS="1", **job)
    assert answer.returncode == 0, answer.error
    runs = {}
    for arguments, environment in told(answer.output):
        names = ("--batch-size", "--accumulate")
        given = [value(arguments, name) for name in names]
        name = Path(value(arguments, "--output")).name
        runs.setdefault(name, (*given, environment["EXPECTED_WORLD_SIZE"]))
    assert runs == {
        "strong-1x1-1": ("512", "2", "1"),
        "strong-1x2-1": ("512", "1", "2"),
        "strong-2x1-1": ("512", "1", "2"),
        "strong-2x2-1": ("512", "1", "4"),
        "growing-1x1-1": ("128", "1", "1"),
        "growing-1x2-1": ("256", "1", "2"),
        "growing-2x1-1": ("256", "1", "2"),
        "growing-2x2-1": ("512", "1", "4"),
    }
    for arguments, _ in told(answer.output):
        assert "--learning-rate" not in arguments, "train.py's rule knows each row's batch"
    assert "REPORT" in answer.output
    again = project.script("DISTRIBUTED/scaling.sbatch", SCALING_REPEATS="1", **job)
    assert told(again.output) == [] and "REPORT" in again.output
    for bad in ("x", "a[$(touch evil)]"):
        given = ("DISTRIBUTED/scaling.sbatch", "--batch-size", bad)
        assert project.script(*given, **job).returncode == 2
    assert not (project.root / "evil").exists()


def test_a_given_learning_rate_holds_for_all_rows_of_the_scaling(project):
    job = project.slurm(nodes=2, gpus=2) | {"SCALING_REPEATS": "1", "SCALING_SHAPES": "1x1 2x2"}
    answer = project.script("DISTRIBUTED/scaling.sbatch", "--learning-rate=3e-5", **job)
    assert "--learning-rate 3e-5 holds for all rows" in answer.output
    rows = [arguments for arguments, _ in told(answer.output)]
    assert rows and all("--learning-rate=3e-5" in arguments for arguments in rows)


def test_preparing_leaves_its_mark_only_for_the_default_data(project):
    mark = project.root / ".cache/prepared"
    for arguments, marked in (
        (["--sample"], False),
        (["--train-file", "x y"], False),
        (["--max-length", "256"], True),
        ([], True),
    ):
        answer = project.script("baseline/prepare.sh", *arguments)
        assert answer.returncode == 0, answer.error
        assert told(answer.output)[0][0] == ["--prepare", *arguments]
        assert mark.exists() == marked
        assert "next: " in answer.output
    # Though an earlier one had left its mark.
    assert told(answer.output)[0][1]["HF_HUB_OFFLINE"] is None


def test_a_preparation_that_fails_leaves_no_mark(project):
    answer = project.script("baseline/prepare.sh", STUB_CODE_PREPARING="3")
    assert answer.returncode == 3 and "next: " not in answer.output
    assert not (project.root / ".cache/prepared").exists()

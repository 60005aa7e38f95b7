"""run_2x2.sbatch without SLURM, with the real train.py and torchrun: two agents of two CPU ranks."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--sample", "--limit", "57", "--max-steps", "12", "--log-every", "2", "--device", "cpu"]
ENDLESS = ["--sample", "--epochs", "300", "--log-every", "1", "--device", "cpu", "--no-profile"]


def environment(folder):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PET_"))}
    return clean | {
        "SQUAD_CACHE": str(folder.parent / "cache-2x2"),
        "OMP_NUM_THREADS": "1",
        "VENV": os.environ.get("VENV") or sys.prefix,
        "GLOO_SOCKET_IFNAME": "lo",
    }


def start(folder, *arguments, root=ROOT, script="DISTRIBUTED/run_2x2.sbatch", **more):
    return subprocess.Popen(
        ["bash", root / script, *arguments],
        cwd=folder,
        env=environment(folder) | more,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # pytest's own start may have set it to be ignored, and then bash cannot catch it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_2x2(folder, *arguments, **more):
    process = start(folder, *arguments, **more)
    try:
        process.log, _ = process.communicate(timeout=280)
    finally:
        end(process)
    return process


def end(process):
    """Ends what is left of its session, and of the sessions that torchrun gives to the ranks."""
    sessions = {process.pid}
    for _ in range(2):
        for each in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                fields = (each / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) in sessions or int(fields[1]) in sessions:
                    sessions.add(int(each.name))
    for pid in sessions:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def rank_processes(output):
    """{rank: process id} of the training processes that write to output."""
    found = {}
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (each / "cmdline").read_bytes().split(b"\0")
            if output.encode() not in command or b"torch.distributed.run" in command:
                continue
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", (each / "environ").read_bytes())
            if rank and b"python" in command[0]:
                found[int(rank[1])] = int(each.name)
    return found


@contextlib.contextmanager
def under_way(folder, *arguments):
    """A run that has begun to train; nothing of it is left afterwards."""
    process = start(folder, *arguments, "--output", "out")
    process.log = ""
    try:
        for line in process.stdout:
            process.log += line
            if line.startswith("step "):
                break
        else:
            pytest.fail(process.log)
        yield process
    finally:
        end(process)


def test_the_whole_path_on_two_agents_of_two(tmp_path):
    """Four ranks: results, timings with the balance of the ranks, a trace of each, all-reduce."""
    done = run_2x2(tmp_path, *SHORT, "--output", "out")
    assert done.returncode == 0, done.log[-3000:]
    output = tmp_path / "out"
    results = json.loads((output / "results.json").read_text())
    timings = json.loads((output / "timings.json").read_text())
    assert (results["world_size"], results["nodes"], results["steps"]) == (4, 2, 12)
    assert results["all_reduce"]["gigabytes_per_second"] > 0
    phase = timings["phases"]["exposed_communication"]
    assert phase["seconds"] > 0 and 0 < phase["share"] < 1
    slowest, fastest = timings["ranks"]["slowest"], timings["ranks"]["fastest"]
    assert slowest["seconds"] >= fastest["seconds"] > 0
    assert slowest["tokens"] > 0 and fastest["tokens"] > 0
    traces = sorted(file.name.split(".")[0] for file in output.glob("tensorboard/*.pt.trace.json*"))
    assert traces == ["rank0", "rank1", "rank2", "rank3"]
    assert list(output.glob("tensorboard/*.report")), "the profiled step is drawn"
    assert not list(output.glob("checkpoint*")) and (output / "model/model.safetensors").exists()
    for number in (0, 1):  # both addresses, before the process group starts
        place = rf"^node {number}: .* meets the others at 127.0.0.1"
        line = re.search(place, done.log, re.MULTILINE)
        assert line and line.start() < done.log.index("step 2/12")
    assert "Warning" not in done.log, "nothing that a student would have to explain"
    again = run_2x2(tmp_path, *SHORT, "--output", "out")
    assert again.returncode == 0 and "finished run" in again.log and "node 0" not in again.log


def test_bad_input_ends_with_2_and_one_line(tmp_path):
    done = run_2x2(tmp_path, "--sample", "--batch-size", "3")  # of 4 ranks
    assert done.returncode == 2, done.log
    assert done.log.count("error:") == 1 and "error: --batch-size" in done.log
    assert "Traceback" not in done.log and "node 0" not in done.log
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_dp_is_one_process(tmp_path):
    given = [*SHORT, "--no-profile", "--batching", "bucketed", "--output", "out"]
    done = run_2x2(tmp_path, *given, "--strategy", "dp")
    assert done.returncode == 0, done.log[-3000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["world_size"], results["nodes"]) == (1, 1)


def test_a_killed_rank_ends_all(tmp_path):
    with under_way(tmp_path, *ENDLESS) as process:
        begin = time.monotonic()
        found = rank_processes("out")
        assert sorted(found) == [0, 1, 2, 3]
        os.kill(found[3], signal.SIGKILL)
        log, _ = process.communicate(timeout=180)
        assert time.monotonic() - begin < 180
        assert process.returncode == 1, log[-3000:]
        assert re.search(r"rank\W+3", log), log[-3000:]
        assert "SIGKILL" in log or "Signal 9" in log
        assert "MASTER_ADDR" not in log.split("ended with exit code 1")[1], "no cause is guessed"
        assert not rank_processes("out")


@pytest.mark.parametrize(
    ("number", "everyone"),
    [
        (signal.SIGUSR1, False),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves(tmp_path, number, everyone):
    """To the script alone, as SLURM's warning; or to all processes, as Ctrl-C and scancel."""
    with under_way(tmp_path, *ENDLESS) as process:
        if everyone:
            os.killpg(process.pid, number)
            for rank in rank_processes("out").values():
                os.kill(rank, number)
        else:
            process.send_signal(number)
        log, _ = process.communicate(timeout=60)
        assert process.returncode == 75 and log.count("stopped by") == 1, log[-3000:]
        assert (tmp_path / "out/checkpoint.pt").exists() and not rank_processes("out")
        assert "Traceback" not in log and "ended with" not in log


def listens(process):
    """Whether the script has said what it does at a signal: from then on none is lost or kills."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return caught >> (signal.SIGUSR1 - 1) & 1


# What the log says, or how many seconds after it listens, when the signal comes.
MOMENTS = [0, 0.1, 0.3, 1, 2, 4, 7, "options:", "features to train", " steps (", "step 2/12"]
MOMENTS += ["step 12/12"]
QUICK = [("baseline/run.sbatch", 0), ("DISTRIBUTED/run_2x2.sbatch", "meets the others")]
ALL = [("DISTRIBUTED/run_2x2.sbatch", moment) for moment in MOMENTS]
ALL += [("baseline/run.sbatch", moment) for moment in MOMENTS[1:]]


@pytest.mark.parametrize(
    ("script", "moment"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL)]
)
def test_a_stop_is_never_lost_and_never_kills(tmp_path, script, moment):
    process = start(tmp_path, *SHORT, "--output", "out", script=script)
    process.log = ""
    try:
        while not listens(process):
            time.sleep(0.01)
        if isinstance(moment, str):
            for line in process.stdout:
                process.log += line
                if moment in line:
                    break
        else:
            time.sleep(moment)
        process.send_signal(signal.SIGUSR1)
        rest, _ = process.communicate(timeout=100)
    finally:
        end(process)
    log = process.log + rest
    finished = (tmp_path / "out/results.json").exists()
    assert process.returncode == (0 if finished else 75), log[-3000:]
    assert not finished or moment in ("step 12/12", 4, 7), "only if it was all but done"
    # At the end torchrun's agents wait for each other. On a busy machine one may come too late; it
    # says so, with its traceback, and that is all.
    ours = re.sub(r"^E.*torch/distributed/elastic/agent.*\n", "", log, flags=re.MULTILINE)
    assert "Traceback" not in ours and log.count("asked to stop") == 1
    assert not (tmp_path / "out/stop").exists() and not rank_processes("out")


@pytest.mark.slow
def test_one_rank_is_stopped_like_many(tmp_path):
    """torchrun would take any exit code but 0 of its only rank for a failure."""
    given = [*ENDLESS, "--strategy", "dp", "--batching", "bucketed"]
    with under_way(tmp_path, *given) as process:
        (tmp_path / "out/stop").touch()
        log, _ = process.communicate(timeout=60)
        assert process.returncode == 75 and "stopped by" in log, log[-3000:]
        assert "ended with" not in log


FAULTS = {
    "1: raise KeyError('lightning')": "KeyError: 'lightning'",
    "0: raise OSError(28, 'No space left', '/full')": "error: /full: No space left: ",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_ends_all(tmp_path, fault):
    """A train.py that fails on one rank only. An exception: the log names the rank and shows where.
    What the user can fix is told in one line, and the others do not wait for that rank."""
    root = tmp_path / "p"
    for name in ("baseline", "DISTRIBUTED"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("tests"))
    shutil.copy(ROOT / "requirements.txt", root)
    script = root / "DISTRIBUTED/train.py"
    text = script.read_text()
    place = '    with clock("optimizer"):\n'
    assert text.count(place) == 1
    raised = f"    if step == 3 and RANK == {fault}\n{place}"
    script.write_text(text.replace(place, raised))
    begin = time.monotonic()
    done = run_2x2(tmp_path, *SHORT, "--output", "out", root=root)
    assert time.monotonic() - begin < 120 and FAULTS[fault] in done.log, done.log[-3000:]
    assert done.returncode == 1, done.log[-3000:]
    assert re.search(rf"\[rank{fault[0]}\]|rank\W+{fault[0]}", done.log), done.log[-3000:]
    assert not (tmp_path / "out/results.json").exists()
    assert not rank_processes("out")

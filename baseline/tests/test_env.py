"""The shell scripts: the environment made once and safely, arguments and signals passed on, jobs queued again.

They run in a copy of the project in a folder with a space in its name. train.py there is a few lines that tell what they got,
pip's packages are wheels made here, and nvidia-smi, srun and scontrol are stand-ins, so nothing is fetched and all is quick.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SBATCH = sorted(ROOT.glob("*/*.sbatch"))
SHELL = [*SBATCH, *sorted(ROOT.glob("[bD]*/*.sh"))]  # not those in .venv
AWKWARD = ["--model", "a  b", "$HOME", "`ls`;*", "it's", '"q"', "", "new\nline", "ñ"]

TRAIN = """
import json, os, signal, sys, time
def told(number, frame):
    print("told", number, flush=True)
    if "--no-marker" not in sys.argv:
        open(os.environ["REQUEUE_MARKER"], "w").close()
    sys.exit(0)
for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(s, told)
names = "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS EXPECTED_WORLD_SIZE HF_HUB_OFFLINE RANK".split()
os.write(1, ("TRAIN " + json.dumps([sys.argv[1:], {n: os.environ.get(n) for n in names}]) + "\\n").encode())
if "--code" in sys.argv:
    code = sys.argv[sys.argv.index("--code") + 1]
    if "RANK" not in os.environ:
        sys.exit(int(code))
    open(os.environ["EXIT_CODE_FILE"], "w").write(code)
if "--output" in sys.argv:
    os.makedirs(sys.argv[sys.argv.index("--output") + 1], exist_ok=True)
    open(sys.argv[sys.argv.index("--output") + 1] + "/results.json", "w").close()
if "--wait" in sys.argv:
    time.sleep(20)
"""
# In place of torch: what env.sh asks of it, and a torchrun that tells what it got and starts rank 0.
TORCH = """
import os
__version__ = "2.13.0+stub"
class cuda:
    def device_count(): return len(os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("STUB_GPUS", "")).split(","))
    def is_available(): return bool(os.environ.get("STUB_GPUS"))
"""
TORCHRUN = """
import json, os, signal, subprocess, sys
os.write(1, ("TORCHRUN " + json.dumps(sys.argv[1:]) + "\\n").encode())
script = next(i for i, a in enumerate(sys.argv) if a.endswith("train.py"))
ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGUSR1, signal.SIGTERM)]
assert all(ignored), "torchrun would die of the signals"
rank = subprocess.Popen([sys.executable, *sys.argv[script:]], env=os.environ | {"RANK": "0"}, start_new_session=True)
sys.exit(rank.wait())
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def wheel(folder, name, version, code=""):
    """A package of one module, which pip installs without the network."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", code or f"version = {version!r}")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


class Project:
    def __init__(self, folder, venv):
        self.root, self.wheels, self.bin = folder / "pro ject", folder / "wheels", folder / "bin"
        for each in ("baseline/tests", "DISTRIBUTED/tests"):
            (self.root / each).mkdir(parents=True)
        self.wheels.mkdir()
        self.bin.mkdir()
        for script in SHELL:
            shutil.copy(script, self.root / script.relative_to(ROOT))
        shutil.copy(ROOT / "baseline/tests/pytest.ini", self.root / "baseline/tests")
        for each in ("baseline", "DISTRIBUTED"):
            (self.root / each / "train.py").write_text(TRAIN)
        (self.root / "baseline/report.py").write_text("import sys; print('REPORT', *sys.argv[1:])")
        (self.root / "requirements.txt").write_text("leaf==1.0\n")
        wheel(self.wheels, "leaf", "1.0")
        wheel(self.wheels, "leaf", "2.0")
        # Nothing of the machine's own: no SLURM, no GPU, no settings of pip or of an env.sh sourced before.
        keep = {"PATH", "HOME", "LANG", "TMPDIR", "PYENV_ROOT", "PYENV_VERSION"}
        self.environment = {k: v for k, v in os.environ.items() if k in keep}
        own = f"{os.environ.get('VIRTUAL_ENV')}/bin"
        path = ":".join(p for p in os.environ["PATH"].split(":") if p != own)
        self.environment |= {
            "PATH": f"{self.bin}:{path}",
            "PYTHON": sys.executable,
            "PIP_CONFIG_FILE": os.devnull,
        }
        self.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "MODULES": ""}
        self.venv = venv

    def start(self, *command, cwd=None, **environment):
        environment = {k: v for k, v in (self.environment | environment).items() if v is not None}
        return subprocess.Popen(
            [str(c) for c in command],
            cwd=cwd or self.root,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # What the tests' own start may have set to be ignored, bash could not catch.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *command, timeout=60, **environment):
        process = self.start(*command, **environment)
        process.output, process.error = process.communicate(timeout=timeout)
        return process

    def source(self, then="true", **environment):
        return self.run("bash", "-c", f"source baseline/env.sh && {then}", **environment)

    def script(self, name, *arguments, **environment):
        """A script with the stand-in environment, as a user's own VENV."""
        return self.run("bash", name, *arguments, VENV=str(self.venv), **environment)

    def gpus(self, count, cuda="12.8"):
        lines = "".join(f"echo 'GPU {i}: A100'\n" for i in range(count))
        header = f"echo '| Driver Version: 570.86    CUDA Version: {cuda} |'\n"
        executable(
            self.bin / "nvidia-smi", f'#!/bin/sh\nif [ "$1" = -L ]; then\n{lines}exit\nfi\n{header}'
        )
        return {"STUB_GPUS": ",".join(map(str, range(count)))}

    def slurm(self, nodes=1, gpus=1, job=123456):
        """Stand-ins for srun and scontrol, and the variables of a job."""
        names = " ".join(f"n{i}" for i in range(nodes))
        log = self.root / "scontrol.log"
        executable(
            self.bin / "scontrol",
            f'#!/bin/sh\nif [ "$1" = show ]; then printf "%s\\n" {names}; else echo "$@" >>"{log}"; fi\n',
        )
        executable(
            self.bin / "srun",
            '#!/bin/bash\necho "SRUN $*"\nwhile [[ $1 == -* ]]; do case $1 in -?) [ $1 != -N ] || nodes=$2; shift 2 ;; *) shift ;; esac; done\n'
            "trap 'kill -USR1 ${pids[@]}' USR1\n"  # the tasks alone, as SLURM does with cgroups
            'for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i "$@" & pids+=($!); done\n'
            "for p in ${pids[@]}; do while kill -0 $p 2>/dev/null; do wait $p; done; wait $p || code=$?; done; exit ${code:-0}\n",
        )
        executable(
            self.bin / "getent",
            '#!/bin/sh\ncase $2 in n*) echo 10.0.0.1 ;; local*) echo ::1 ;; "") exit 2 ;; *) echo "$2" ;; esac\n',
        )
        return self.gpus(gpus) | {
            "SLURM_JOB_ID": str(job),
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_NODELIST": "n[0-9]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(gpus),
            "SLURM_CPUS_PER_TASK": "1",
        }


def told(output, word="TRAIN"):
    return [
        json.loads(line[len(word) :]) for line in output.splitlines() if line.startswith(word + " ")
    ]


@pytest.fixture(scope="session")
def venv(tmp_path_factory):
    """A user's own environment: the packages' names, and the stand-in for torch."""
    folder = tmp_path_factory.mktemp("own") / "the course's"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    versions = {
        "torch": "2.11.0+cu126",
        "transformers": "5.17.0",
        "datasets": "5.0.1",
        "tensorboard": "2.21.0",
        "matplotlib": "3.10.9",
    }
    for name, version in versions.items():
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    (site / "torch/distributed").mkdir(parents=True)
    (site / "torch/__init__.py").write_text(TORCH)
    (site / "torch/distributed/run.py").write_text(TORCHRUN)
    return folder


@pytest.fixture
def project(tmp_path, venv):
    return Project(tmp_path, venv)


# The scripts as texts


@pytest.mark.parametrize("script", SBATCH, ids=lambda p: p.name)
def test_an_sbatch_script_is_short_and_says_why(script):
    lines = script.read_text().splitlines()
    assert len(lines) <= 60
    directives = [line for line in lines if re.match(r"#\s*SBATCH\b", line)]
    assert len(directives) >= 5
    for line in directives:
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)? +# .{8,}", line), (
            f"no reason, or a space: {line}"
        )
    assert lines[0] == "#!/bin/bash"
    assert f"sbatch {script.relative_to(ROOT)}" in "\n".join(lines[:8])


def test_shellcheck_is_quiet():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    answer = subprocess.run(
        ["shellcheck", "-x", "-P", ROOT, *SHELL], check=False, capture_output=True, text=True
    )
    assert answer.stdout == ""


# The environment


def test_two_starts_at_once_make_one_environment(project):
    starts = [
        project.start(
            "bash", "-c", "source baseline/env.sh && python -c 'import leaf; print(leaf.version)'"
        )
        for _ in range(2)
    ]
    answers = [start.communicate(timeout=60) for start in starts]
    assert [start.returncode for start in starts] == [0, 0], answers
    assert [output for output, _ in answers] == ["1.0\n", "1.0\n"]
    errors = "".join(error for _, error in answers)
    assert (
        errors.count("making ") == 1 + errors.count("waiting for it")
        and errors.count("installing") == 1
    )
    assert not (project.root / ".venv.lock").exists()
    # The third has nothing to do, says nothing and is quick: measured against the start of a shell on this machine.
    begin = time.perf_counter()
    third = project.source("command -v python")
    assert (third.output.strip(), third.error) == (f"{project.root}/.venv/bin/python", "")
    assert time.perf_counter() - begin < 2
    # Other requirements: installed into the same environment.
    (project.root / "requirements.txt").write_text("leaf==2.0\n")
    assert project.source("python -c 'import leaf; print(leaf.version)'").output == "2.0\n"


def test_a_start_killed_while_making_leaves_one_that_the_next_mends(project):
    for pause in (0.1, 1.0):
        start = project.start("bash", "-c", "source baseline/env.sh")
        time.sleep(pause)
        os.killpg(start.pid, signal.SIGKILL)
        start.communicate()
    last = project.source("python -c 'import leaf; print(leaf.version)'")
    assert last.output == "1.0\n", last.error
    assert [p.name for p in project.root.glob(".venv*")] == [".venv"]


def test_torch_comes_from_the_index_asked_for_and_again_from_another(project):
    (project.root / "requirements.txt").write_text("torch==2.13.0\nleaf==1.0\n")
    wheel(project.wheels, "torch", "2.13.0")
    for label in ("cu126", "cu130"):
        place = project.root.parent / label / "torch"
        place.mkdir(parents=True)
        wheel(place, "torch", f"2.13.0+{label}")
        (place / "index.html").write_text(
            f'<a href="torch-2.13.0+{label}-py3-none-any.whl">torch-2.13.0+{label}-py3-none-any.whl</a>'
        )
    show = "python -c 'import torch; print(torch.version)'"
    first = project.source(show)
    assert (
        first.output == "2.13.0\n"
    )  # no GPU and no network: pip's default, here the folder of wheels
    for label in ("cu130", "cu126"):
        settings = {"PIP_NO_INDEX": None, "TORCH_INDEX": f"file://{project.root.parent}/{label}"}
        assert project.source(show, **settings).output == f"2.13.0+{label}\n"
    assert (
        project.source(show).output == "2.13.0+cu126\n"
    )  # stays, though TORCH_INDEX is not set any more


@pytest.mark.parametrize("cuda, index", [("12.8", "cu126"), ("13.0", None)])
def test_the_driver_decides_on_the_wheel(project, cuda, index):
    (project.root / "requirements.txt").write_text("torch==99.0\n")  # in no index
    wheel(project.wheels, "torch", "99.0", TORCH)
    gpus = project.gpus(1, cuda)
    answer = project.source("echo $GPU_COUNT", **gpus)
    assert answer.output == "1\n", answer.error
    tried = answer.error + (project.root / ".venv/pip.log").read_text()
    assert ("whl/cu126" in tried) == (index == "cu126")


def test_a_node_whose_gpus_torch_cannot_use_stops(project):
    project.gpus(2)
    answer = project.source(VENV=str(project.venv))
    assert answer.returncode != 0
    assert len(answer.error.splitlines()) == 1
    for part in (
        "2.13.0+stub",
        "driver 570.86",
        "CUDA up to 12.8",
        "TORCH_INDEX=https://download.pytorch.org/whl/cu126 bash baseline/prepare.sh",
    ):
        assert part in answer.error
    assert project.source(VENV=str(project.venv), CUDA_VISIBLE_DEVICES="").returncode == 0


def contents(folder):
    return {p: p.lstat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts}


def test_an_environment_of_ones_own_is_checked_and_never_changed(project):
    before = contents(project.venv)
    answer = project.source("command -v python", VENV=str(project.venv))
    assert (answer.output, answer.error) == (f"{project.venv}/bin/python\n", "")
    assert contents(project.venv) == before and not (project.root / ".venv").exists()
    copy = project.root.parent / "old"
    shutil.copytree(project.venv, copy, symlinks=True)
    (site,) = copy.glob("lib/python*/site-packages")
    shutil.rmtree(site / "datasets-5.0.1.dist-info")
    (site / "torch-2.11.0+cu126.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0\n"
    )
    before = contents(copy)
    answer = project.source(VENV=str(copy))
    assert answer.returncode != 0 and len(answer.error.splitlines()) == 1
    assert "torch>=2.11 (has 2.6.0)" in answer.error and "datasets>=5.0" in answer.error
    assert contents(copy) == before


def test_a_folder_that_is_no_environment_is_left_alone(project):
    (project.bin / "mine").touch()
    answer = project.source(VENV=str(project.bin))
    assert (
        answer.returncode != 0 and len(answer.error.splitlines()) == 1 and "VENV=" in answer.error
    )
    assert [p.name for p in project.bin.iterdir()] == ["mine"]


def test_an_old_python_is_refused(project):
    executable(
        project.bin / "python3.old",
        "#!/bin/sh\ncase $2 in *ensurepip*) ;; *) echo is 3.9.18 ;; esac\n",
    )
    for python, word in (("python3.old", "is 3.9.18"), ("no-such-python", "is not there")):
        answer = project.source(PYTHON=python)
        assert answer.returncode != 0 and len(answer.error.splitlines()) == 1
        assert "needs Python 3.10 or newer" in answer.error and word in answer.error
    assert not (project.root / ".venv").exists() and not (project.root / ".venv.lock").exists()


def test_the_callers_shell_stays_as_it_was(project):
    for options in ("set -euo pipefail", "set +e"):
        answer = project.run(
            "bash",
            "-c",
            f"{options}; a=$-; source baseline/env.sh; echo $a $-; compgen -A function _env || true",
            VENV=str(project.venv),
        )
        before, after = answer.output.split()
        assert before == after and answer.error == ""
    after = project.run(
        "bash", "-c", "source baseline/env.sh; echo code $?", PYTHON="no-such-python"
    )
    assert after.output == "code 1\n"
    stopped = project.run(
        "bash", "-c", "set -e; source baseline/env.sh; echo went on", PYTHON="no-such-python"
    )
    assert stopped.returncode == 1 and stopped.output == ""
    assert project.run("sh", "-c", ". baseline/env.sh; echo went on").error.count("\n") >= 1
    assert project.run("bash", "baseline/env.sh").returncode == 2


def test_it_works_from_any_folder_and_twice(project):
    command = 'cd / && source "$0/baseline/env.sh" && source "$0/baseline/env.sh" && echo "$SQUAD_CACHE" && echo "$PATH"'
    cache, path = project.run(
        "bash", "-c", command, project.root, VENV=str(project.venv)
    ).output.splitlines()
    assert cache == f"{project.root}/.cache" and path.count(str(project.venv)) == 1


def test_store_takes_what_is_large_and_prepared_means_offline(project):
    store = project.root.parent / "st ore"
    show = 'printf "%s\\n" "$VENV" "$HF_HOME" "$SQUAD_CACHE" "$TORCHINDUCTOR_CACHE_DIR" "${HF_HUB_OFFLINE-}${HF_EVALUATE_OFFLINE-}"'
    place = store / "bert-squad"
    answer = project.source(show, STORE=str(store))
    assert answer.output.splitlines() == [
        f"{place}/venv",
        f"{place}/huggingface",
        f"{place}/cache",
        f"{place}/cache/inductor",
        "",
    ], answer.error
    (place / "cache").mkdir()
    (place / "cache/prepared").touch()
    assert project.source(show, STORE=str(store)).output.splitlines()[-1] == "11"
    assert (
        project.source(show, STORE=str(store), HF_HUB_OFFLINE="0").output.splitlines()[-1] == "01"
    )


def test_packages_of_a_module_do_not_shadow_the_environment(project):
    show = 'echo "${PYTHONPATH-none}"'
    answer = project.source(show, VENV=str(project.venv), PYTHONPATH="/modules/torch")
    assert answer.output == "none\n"


def test_modules_are_loaded_where_there_are_any(project):
    module = 'module() { echo "module $*"; [ "$2" != unknown ]; }; set -u; '

    def load(**environment):
        command = module + "source baseline/env.sh"
        return project.run("bash", "-c", command, VENV=str(project.venv), **environment)

    assert load(MODULES="a b/1").output == "module load a b/1\n"
    assert load(MODULES=None).returncode == 0
    assert load(MODULES="unknown").returncode == 1


def test_pytest_finds_both_folders_and_leaves_slow_ones(project):
    for folder in ("baseline", "DISTRIBUTED"):
        (project.root / folder / "tests/test_a.py").write_text(
            "import pytest\ndef test_quick(): pass\n@pytest.mark.slow\ndef test_slow(): pass\n"
        )

    def collect(*arguments):
        pytest = (sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments)
        command = ("bash", "-c", 'source baseline/env.sh && exec "$@"', "-", *pytest)
        answer = project.run(*command, VENV=str(project.venv))
        return [line for line in answer.output.splitlines() if "::" in line]

    assert collect() == [
        "baseline/tests/test_a.py::test_quick",
        "DISTRIBUTED/tests/test_a.py::test_quick",
    ]
    assert collect("-m", "slow") == [
        "baseline/tests/test_a.py::test_slow",
        "DISTRIBUTED/tests/test_a.py::test_slow",
    ]
    assert collect("DISTRIBUTED/tests/test_a.py::test_quick") == [
        "DISTRIBUTED/tests/test_a.py::test_quick"
    ]


# baseline/run.sbatch


def test_arguments_and_exit_codes_pass_through_run_sbatch(project):
    answer = project.script("baseline/run.sbatch", *AWKWARD)
    assert answer.returncode == 0, answer.error
    (got,) = told(answer.output)
    assert got[0] == AWKWARD
    assert project.script("baseline/run.sbatch", "--code", "2").returncode == 2
    assert list((project.root / "runs").iterdir()) == []  # it cleans up after itself


def test_it_finds_the_project_when_slurm_runs_a_copy(project):
    spool = project.root.parent / "spool"
    spool.mkdir()
    for script in SBATCH:
        copy = shutil.copy(script, spool / "slurm_script")
        job = project.slurm() | {
            "VENV": str(project.venv),
            "SCALING_REPEATS": "1",
            "SCALING_SHAPES": "1x1",
        }
        for place in (".", "baseline"):
            answer = project.run(
                "bash",
                copy,
                "--sample",
                **job
                | {
                    "SLURM_SUBMIT_DIR": str(project.root / place),
                    "SLURM_JOB_ID": "7" if place == "." else "8",
                },
            )
            assert answer.returncode == 0 and told(answer.output), answer.error
        lost = project.run("bash", copy, cwd=spool, **job | {"SLURM_SUBMIT_DIR": str(spool)})
        assert lost.returncode == 2 and lost.output == ""
        assert (
            lost.error.splitlines() == [lost.error.strip()]
            and "train.py" in lost.error
            and str(spool) in lost.error
        )


def test_run_sbatch_uses_one_gpu_of_several_and_never_fewer_than_slurm_gave(project):
    gpus = project.gpus(2)
    answer = project.script("baseline/run.sbatch", **gpus)
    assert (
        told(answer.output)[0][1]["CUDA_VISIBLE_DEVICES"] == "0"
        and "2 GPUs are here" in answer.output
    )
    answer = project.script("baseline/run.sbatch", CUDA_VISIBLE_DEVICES="3,1", **gpus)
    assert told(answer.output)[0][1]["CUDA_VISIBLE_DEVICES"] == "3"
    few = project.script("baseline/run.sbatch", **project.slurm(gpus=2) | project.gpus(1))
    assert (
        few.returncode == 1
        and told(few.output) == []
        and "SLURM gave 2 GPUs, torch sees 1" in few.error
    )


@pytest.mark.parametrize("script", ["baseline/run.sbatch", "DISTRIBUTED/run_2x2.sbatch"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("slurm", [False, True])
def test_a_signal_reaches_the_training_and_the_warning_requeues(project, script, number, slurm):
    job = project.slurm(nodes=2) if slurm else {}
    process = project.start(
        "bash",
        script,
        "--sample",
        "--wait",
        VENV=str(project.venv),
        NODES="1",
        GPUS_PER_NODE="1",
        **job,
    )
    for line in process.stdout:
        if line.startswith("TRAIN"):
            break
    process.send_signal(number)
    output, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert "told" in output
    log = project.root / "scontrol.log"
    assert log.exists() == (
        slurm and number == signal.SIGUSR1
    )  # who cancels a job does not want it again
    if log.exists():
        assert log.read_text() == "requeue 123456\n"


def test_no_marker_no_requeue(project):
    process = project.start(
        "bash",
        "baseline/run.sbatch",
        "--wait",
        "--no-marker",
        VENV=str(project.venv),
        **project.slurm(),
    )
    for line in process.stdout:
        if line.startswith("TRAIN"):
            break
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert not (project.root / "scontrol.log").exists()


# DISTRIBUTED/run_2x2.sbatch


def option(arguments, name):
    return next((a.split("=", 1)[1] for a in arguments if a.startswith(name + "=")), None)


def test_two_nodes_get_what_they_need(project):
    answer = project.script(
        "DISTRIBUTED/run_2x2.sbatch", *AWKWARD, **project.slurm(nodes=2, gpus=2)
    )
    assert answer.returncode == 0, answer.error
    agents = told(answer.output, "TORCHRUN")
    assert sorted(option(a, "--node-rank") for a in agents) == ["0", "1"]
    for agent in agents:
        wanted = {
            "--nnodes": "2",
            "--nproc-per-node": "2",
            "--master-addr": "n0",
            "--master-port": "23456",
            "--rdzv-conf": "timeout=120",
        }
        assert {name: option(agent, name) for name in wanted} == wanted
        assert agent[-len(AWKWARD) :] == AWKWARD
    for _, environment in told(answer.output):
        assert environment["EXPECTED_WORLD_SIZE"] == "4" and environment["OMP_NUM_THREADS"] == "1"
    assert "--export=ALL" in answer.output  # whatever sbatch --export has left out
    assert "--kill-on-bad-exit=1" in answer.output and "--cpus-per-task=1" in answer.output
    assert answer.output.count("10.0.0.1") >= 2  # both nodes say where they meet, before they start
    other = project.script(
        "DISTRIBUTED/run_2x2.sbatch", **project.slurm(nodes=2, gpus=2, job=123457)
    )
    assert option(told(other.output, "TORCHRUN")[0], "--master-port") == "23457"
    chosen = project.script(
        "DISTRIBUTED/run_2x2.sbatch",
        MASTER_ADDR="n1-ib",
        MASTER_PORT="29400",
        **project.slurm(nodes=4, gpus=4),
    )
    agents = told(chosen.output, "TORCHRUN")
    assert (
        len(agents) == 4
        and option(agents[0], "--master-addr") == "n1-ib"
        and option(agents[0], "--master-port") == "29400"
    )


@pytest.mark.parametrize("address", ["", "localhost", "127.0.0.1", "::1"])
def test_two_nodes_cannot_meet_at_loopback(project, address):
    answer = project.script(
        "DISTRIBUTED/run_2x2.sbatch", MASTER_ADDR=address, **project.slurm(nodes=2, gpus=2)
    )
    assert answer.returncode == 2 and "MASTER_ADDR" in answer.error and told(answer.output) == []


def test_a_taken_port_is_told(project):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = project.script("DISTRIBUTED/run_2x2.sbatch", MASTER_PORT=str(port))
    assert answer.returncode == 2 and f"{port}" in answer.error and "MASTER_PORT" in answer.error


def test_the_large_batch_is_for_the_full_data_only(project):
    large = ["--batch-size", "512", "--learning-rate", "1e-4"]
    for arguments, ahead in (
        ([], large),
        (["--sample"], []),
        (["--train-file=x"], []),
        (["--batch-size", "64"], []),
        (["--learning-rate", "2e-4"], large),  # the user's comes later, so it wins
    ):
        answer = project.script(
            "DISTRIBUTED/run_2x2.sbatch", *arguments, NODES="1", GPUS_PER_NODE="1"
        )
        given = told(answer.output)[0][0]
        assert given.pop(len(ahead)) == "--output"  # one folder for all ranks, before the user's
        assert given.pop(len(ahead)).startswith("runs/DISTRIBUTED-")
        assert given == ahead + arguments
        assert ("512" in answer.output.split("TORCHRUN")[0]) == bool(ahead)


def test_dp_is_one_process_and_gpus_give_one_agent(project):
    dp = project.script(
        "DISTRIBUTED/run_2x2.sbatch", "--strategy", "dp", **project.slurm(nodes=2, gpus=2)
    )
    assert [option(a, "--nproc-per-node") for a in told(dp.output, "TORCHRUN")] == ["1"]
    assert told(dp.output)[0][1]["EXPECTED_WORLD_SIZE"] == "1"
    gpus = project.script("DISTRIBUTED/run_2x2.sbatch", **project.gpus(2))
    (agent,) = told(gpus.output, "TORCHRUN")
    assert (option(agent, "--nnodes"), option(agent, "--nproc-per-node")) == ("1", "2")


def test_the_exit_code_of_a_rank_is_the_jobs(project):
    answer = project.script("DISTRIBUTED/run_2x2.sbatch", "--code", "2")
    assert answer.returncode == 2 and len(told(answer.output, "TORCHRUN")) == 2


# The ladder, the scaling, the preparation


def test_the_ladder_changes_one_thing_a_rung(project):
    answer = project.script("baseline/ladder.sbatch", "--model", "a b", **project.gpus(1))
    assert answer.returncode == 0, answer.error
    rungs = [arguments for arguments, _ in told(answer.output)]
    names = [Path(rung[-1]).name for rung in rungs]
    assert names == [
        "1-fp32",
        "2-tf32",
        "3-bf16",
        "4-fused",
        "5-dynamic",
        "6-bucketed",
        "7-packed",
        "8-compiled",
    ]
    assert all("a b" in rung and "--no-profile" in rung for rung in rungs)
    for one, two in itertools.pairwise(rungs):
        assert len([(a, b) for a, b in zip(one[:-1], two[:-1]) if a != b]) == 1
    assert "REPORT" in answer.output
    (project.bin / "nvidia-smi").unlink()
    cpu = project.script("baseline/ladder.sbatch")
    names = [Path(arguments[-1]).name for arguments, _ in told(cpu.output)]
    assert names == ["1-fp32", "2-fused", "3-dynamic", "4-bucketed", "5-packed"]
    assert all(arguments[0] == "--sample" for arguments, _ in told(cpu.output))


def test_scaling_runs_each_shape_under_both_rules_and_goes_on(project):
    job = project.slurm(nodes=2, gpus=2)
    answer = project.script("DISTRIBUTED/scaling.sbatch", SCALING_REPEATS="1", timeout=120, **job)
    assert answer.returncode == 0, answer.error
    runs = {}
    for arguments, environment in told(answer.output):
        given = dict(zip(arguments[-6::2], arguments[-5::2]))
        accumulate = arguments[arguments.index("--accumulate") + 1]
        runs.setdefault(
            Path(given["--output"]).name,
            (
                given["--batch-size"],
                given["--learning-rate"],
                accumulate,
                environment["EXPECTED_WORLD_SIZE"],
            ),
        )
    assert runs == {
        "strong-1x1-1": ("512", "1e-4", "2", "1"),
        "strong-1x2-1": ("512", "1e-4", "1", "2"),
        "strong-2x1-1": ("512", "1e-4", "1", "2"),
        "strong-2x2-1": ("512", "1e-4", "1", "4"),
        "growing-1x1-1": ("128", "5e-05", "1", "1"),
        "growing-1x2-1": ("256", "7.07e-05", "1", "2"),
        "growing-2x1-1": ("256", "7.07e-05", "1", "2"),
        "growing-2x2-1": ("512", "0.0001", "1", "4"),
    }
    assert "REPORT" in answer.output
    again = project.script("DISTRIBUTED/scaling.sbatch", SCALING_REPEATS="1", **job)
    assert told(again.output) == [] and "REPORT" in again.output
    for bad in ("x", "a[$(touch evil)]"):
        assert (
            project.script("DISTRIBUTED/scaling.sbatch", "--batch-size", bad, **job).returncode == 2
        )
    assert not (project.root / "evil").exists()


def test_preparing_leaves_its_mark_only_for_the_default_data(project):
    mark = project.root / ".cache/prepared"
    for arguments, marked in (
        (["--sample"], False),
        (["--train-file", "x y"], False),
        (["--code", "3"], False),
        (["--max-length", "256"], True),
        ([], True),
    ):
        answer = project.script("baseline/prepare.sh", *arguments)
        assert answer.returncode == (3 if "--code" in arguments else 0), answer.error
        assert told(answer.output)[0][0] == ["--prepare", *arguments]
        assert mark.exists() == marked
    assert (
        told(answer.output)[0][1]["HF_HUB_OFFLINE"] is None
    )  # though an earlier one had left its mark
    assert "next: " in answer.output

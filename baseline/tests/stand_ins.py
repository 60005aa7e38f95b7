"""Stand-ins for what the shell scripts start, shared by test_env.py and test_launch.py.

The scripts run in a copy of the project, in a folder with a space in its name. There train.py is a
few lines that print what they got, pip's packages are wheels made here, and nvidia-smi, srun and
scontrol are stand-ins: nothing is fetched, and all is quick.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = [*sorted(ROOT.glob("*/*.sbatch")), *sorted(ROOT.glob("[bD]*/*.sh"))]  # none in .venv

# A train.py that prints what it got, and takes its time where a test asks for it.
TRAIN = """
import json, os, pathlib, signal, sys, time

def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())  # in one piece, beside the other ranks'

say("IMPORTING")
time.sleep(float(os.environ.get("STUB_IMPORT", 0)))
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
names = "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS EXPECTED_WORLD_SIZE HF_HUB_OFFLINE RANK NCCL_DEBUG"
names = names.split()
say("TRAIN", json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]))
preparing = "--prepare" in sys.argv
if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
    assert os.environ["TRITON_CACHE_DIR"] == folder + "/triton"
    kernel = pathlib.Path(folder, "triton/kernel")
    say("KNOWN" if kernel.exists() else "COMPILED", folder)
    kernel.parent.mkdir(parents=True, exist_ok=True)
    if not kernel.exists():
        kernel.touch()
if preparing:
    time.sleep(float(os.environ.get("STUB_PREPARE", 0)))
if code := os.environ.get("STUB_CODE_PREPARING" if preparing else "STUB_CODE"):
    sys.exit(int(code))
if preparing or "--help" in sys.argv:
    sys.exit(0)
pairs = zip(sys.argv, [*sys.argv[1:], ""])
outputs = [b if a == "--output" else a[9:] for a, b in pairs if a.split("=")[0] == "--output"]
output = pathlib.Path(outputs[-1])
output.mkdir(parents=True, exist_ok=True)
if "STUB_SAMPLES" in os.environ:
    samples = output / f"power-{os.environ.get('SLURM_NODEID', 0)}.csv"
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if samples.exists() and samples.read_text().count("\\n") > 2:
            say("SAMPLED")
            break
        time.sleep(0.05)
until = time.monotonic() + float(os.environ.get("STUB_TRAIN", 0))
while time.monotonic() < until:
    if asked or (output / "stop").exists():
        say("SAVED")
        (output / "stop").unlink(missing_ok=True)
        sys.exit(0 if "RANK" in os.environ else 75)
    time.sleep(0.05)
(output / "results.json").touch()
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
ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGUSR1, signal.SIGTERM)]
assert all(ignored) and os.environ["PET_SIGNALS_TO_HANDLE"] == "SIGHUP", "it would die of signals"
if "NCCL_DEBUG_FILE" in os.environ and os.environ["NCCL_DEBUG"] == "INFO":
    with open(os.environ["NCCL_DEBUG_FILE"].replace("%p", "1"), "w") as file:
        file.write(os.environ.get("STUB_NCCL", ""))
script = next(i for i, a in enumerate(sys.argv) if a.endswith("train.py"))
command = [sys.executable, *sys.argv[script:]]
rank = subprocess.Popen(command, env=os.environ | {"RANK": "0"}, start_new_session=True)
sys.exit(1 if rank.wait() else 0)  # it loses the code
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
        for each in ("report", "trace"):
            script = f"import sys; print({each.upper()!r}, *sys.argv[1:])"
            (self.root / f"baseline/{each}.py").write_text(script)
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

    def run(self, *command, timeout=300, **environment):
        process = self.start(*command, **environment)
        process.output, process.error = process.communicate(timeout=timeout)
        return process

    def source(self, then="true", **environment):
        return self.run("bash", "-c", f"source baseline/env.sh && {then}", **environment)

    def script(self, name, *arguments, **environment):
        """A script with the stand-in environment, as a user's own VENV."""
        return self.run("bash", name, *arguments, VENV=str(self.venv), **environment)

    def gpus(self, count, cuda="12.8"):
        """A stand-in for nvidia-smi, and for torch's count of GPUs."""
        lines = "".join(f"echo 'GPU {i}: A100'\n" for i in range(count))
        executable(
            self.bin / "nvidia-smi",
            f"""#!/bin/sh
case "$*" in
    -L) {lines or ":"} ;;
    *"timestamp,index,power.draw --format=csv,noheader,nounits -l 1")
        echo $$ >>"{self.root}/samplers"
        while [ -n "$STUB_SAMPLES" ]; do
            echo "$(date '+%Y/%m/%d %H:%M:%S.%3N'), $1, 250.00"
            sleep 0.2
        done ;;
    *--query-gpu*) echo "$@" ;;
    *) echo '| Driver Version: 570.86    CUDA Version: {cuda} |' ;;
esac
""",
        )
        return {"STUB_GPUS": ",".join(map(str, range(count)))}

    def slurm(self, nodes=1, gpus=1, job=123456):
        """Stand-ins for srun, scontrol and squeue, and the variables of a job."""
        names = " ".join(f"n{i}" for i in range(nodes))
        executable(
            self.bin / "scontrol",
            f"""#!/bin/sh
case "$1 $2" in
    "show hostnames") printf "%s\\n" {names} ;;
    "show node") echo "NodeName=$3 CPUAlloc=64" ;;
    "show job") echo "JobState=RUNNING PreemptTime=${{STUB_PREEMPTED:-None}}" ;;
    *) echo "$@" >>"{self.root}/scontrol.log" ;;
esac
""",
        )
        executable(
            self.bin / "srun",
            """#!/bin/bash
echo "SRUN $*"
if [ -n "${SLURM_MEM_PER_CPU:-}" ]; then echo "mutually exclusive" >&2; exit 1; fi
while [[ $1 == -* ]]; do
    if [[ $1 == --nodes=* ]]; then nodes=${1#*=}; fi
    shift
done
for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i env --default-signal "$@" & pids+=($!); done
for pid in ${pids[@]}; do wait $pid || code=$?; done
exit ${code:-0}
""",
        )
        executable(self.bin / "squeue", '#!/bin/sh\necho "${STUB_LIMIT:-1:00:00}"\n')
        executable(
            self.bin / "getent",
            """#!/bin/sh
case $2 in
    n*) echo 10.0.0.1 ;;
    local*) echo ::1 ;;
    "") exit 2 ;;
    *) echo "$2" ;;
esac
""",
        )
        return self.gpus(gpus) | {
            "SLURM_JOB_ID": str(job),
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_NODELIST": "n[0-9]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(gpus),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURMD_NODENAME": "n0",
            "SLURM_JOB_CPUS_PER_NODE": f"32(x{nodes})",
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

"""baseline/env.sh: the environment made once and safely, and what it sets in the caller's shell.

stand_ins.py says in what surroundings it runs here. pip installs wheels made here, except where a
test uses `fast_python`, with which making the environment takes no time.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from stand_ins import ROOT, SHELL, TORCH, executable, project, venv, wheel  # noqa: F401

SHOW_LEAF = "python -c 'import leaf; print(leaf.version)'"
# A Python whose venv is a copy of itself; it writes what pip is asked for into the venv.
FAST_PYTHON = """#!/bin/bash
case "$*" in
    "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *--version) ;;
    "-m pip"*)
        echo "this is from pip"
        echo "$*" >>"${0%/bin/python}/pip-arguments"
        if [[ $* == *" -r "* ]]; then cat "${@: -1}" >"${0%/bin/python}/others"; fi
        exit "${PIP_CODE:-0}"
        ;;
    "-V") echo Python 3.12.0 ;;
esac
"""


@pytest.fixture
def cold(project):
    """A project whose environment is still to be made: it needs torch and a package called leaf."""
    (project.root / "requirements.txt").write_text("torch==2.13.0\n# a comment\n\nleaf==1.0\n")
    wheel(project.wheels, "torch", "2.13.0", TORCH)
    return project


@pytest.fixture
def fast_python(cold):
    executable(cold.bin / "fast-python", FAST_PYTHON)
    executable(cold.bin / "curl", "#!/bin/sh\nexit 6\n")  # no internet
    return {"PYTHON": str(cold.bin / "fast-python")}


def pip_arguments(folder):
    return (folder / "pip-arguments").read_text()


def start_and_kill_at(project, words, **environment):
    """Sources env.sh, and kills it and all that it has started when it prints these words."""
    start = project.start("bash", "-c", "source baseline/env.sh", **environment)
    for line in start.stderr:
        if words in line:
            break
    else:
        raise AssertionError(f"it never printed {words!r}")
    os.killpg(start.pid, signal.SIGKILL)
    start.communicate()


def contents(folder):
    return {p: p.lstat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts}


def test_shellcheck_is_quiet():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    names = ("run", "slurm-cluster", "fake-gpu/run", "fake-gpu/nvidia-smi")
    command = ["shellcheck", "-x", "-P", ROOT, *SHELL, *(ROOT / ".ci" / name for name in names)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.stdout == ""


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "give -- and a command"),
        (["--gpu", "t4", "--", "true"], "--gpu: give a100 or h100"),
        (["--rank", "1", "--", "true"], "--rank is none of its options"),
        (["--", "true"], "not built for CUDA"),
    ],
)
def test_fake_gpu_says_in_one_line_what_is_wrong(venv, words, line):
    environment = {**os.environ, "PATH": f"{venv}/bin:{os.environ['PATH']}"}
    command = [ROOT / ".ci/fake-gpu/run", *words]
    answer = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert answer.returncode == 2 and line in answer.stderr
    assert answer.stderr.count("\n") == 1


# The environment that env.sh makes


def test_two_starts_at_once_make_one_environment(cold):
    command = ("bash", "-c", f"source baseline/env.sh && {SHOW_LEAF}")
    starts = [cold.start(*command) for _ in range(2)]
    answers = [start.communicate(timeout=300) for start in starts]
    assert [start.returncode for start in starts] == [0, 0], answers
    assert [output for output, _ in answers] == ["1.0\n", "1.0\n"]  # and nothing else
    errors = "".join(error for _, error in answers)
    assert errors.count("making ") == 1 + errors.count("another start is making")
    assert errors.count("Successfully installed leaf") == 1 and "updating" not in errors


def test_a_ready_environment_is_entered_quickly_and_silently(cold, fast_python):
    assert cold.source(**fast_python).returncode == 0
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        answer = cold.source("command -v python", **fast_python)
        seconds.append(time.perf_counter() - begin)
        assert (answer.output, answer.error) == (f"{cold.root}/.venv/bin/python\n", "")
    assert min(seconds) < 0.5  # importing torch alone would take longer


def test_it_says_what_it_does_and_for_how_long(cold, fast_python):
    answer = cold.source(**fast_python)
    assert answer.output == ""
    making, _, torch, *pip = answer.error.splitlines()
    assert f"making {cold.root}/.venv with Python 3.12.0" in making and "minutes" in making
    assert "torch comes from" in torch
    assert pip == ["this is from pip"] * 2


def test_a_killed_start_is_repaired_by_the_next(cold):
    start_and_kill_at(cold, "making ")
    # As if pip had been killed in the middle of leaf: it would take that for complete.
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    half = cold.root / ".venv/lib" / python / "site-packages/leaf-1.0.dist-info"
    half.mkdir(parents=True, exist_ok=True)
    (half / "METADATA").write_text("Metadata-Version: 2.1\nName: leaf\nVersion: 1.0\n")
    answer = cold.source(SHOW_LEAF)
    assert answer.output == "1.0\n", answer.error
    assert [path.name for path in cold.root.glob(".venv*")] == [".venv"]


@pytest.mark.slow
def test_a_start_that_waits_goes_on_when_the_other_is_killed(cold):
    first = cold.start("bash", "-c", "source baseline/env.sh")
    while "torch comes from" not in first.stderr.readline():
        assert first.poll() is None
    second = cold.start("bash", "-c", f"source baseline/env.sh && {SHOW_LEAF}")
    assert "another start is making" in second.stderr.readline()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    output, error = second.communicate(timeout=300)
    assert output == "1.0\n", error


@pytest.mark.slow
def test_other_requirements_are_installed_into_the_same_environment(cold):
    def source(requirements):
        (cold.root / "requirements.txt").write_text(requirements)
        show = "from importlib.metadata import version as v; print(v('torch'), v('leaf'))"
        return cold.source(f'python -c "{show}"')

    assert source("torch==2.13.0\nleaf==1.0\n").output == "2.13.0 1.0\n"
    own = cold.root / ".venv/own"
    own.touch()
    assert source("torch==2.13.0\nleaf==2.0\n").output == "2.13.0 2.0\n"
    # torch is exchanged before pip fails: what was current is so no more.
    wheel(cold.wheels, "torch", "2.14.0")
    assert source("torch==2.14.0\nleaf==99.0\n").returncode != 0
    assert source("torch==2.13.0\nleaf==2.0\n").output == "2.13.0 2.0\n"
    assert own.exists()


def test_a_failing_pip_fails_and_is_tried_again(cold, fast_python):
    for _ in range(2):
        answer = cold.source(**fast_python, PIP_CODE="1")
        assert answer.returncode != 0
        last = answer.error.splitlines()[-1]
        assert "pip failed" in last and "bash baseline/prepare.sh" in last
    answer = cold.source(**fast_python)
    assert answer.returncode == 0 and "making" in answer.error


def test_it_goes_on_where_the_file_system_has_no_locks(cold, fast_python):
    executable(cold.bin / "flock", "#!/bin/sh\nexit 71\n")
    answer = cold.source("command -v python", **fast_python)
    assert answer.output == f"{cold.root}/.venv/bin/python\n"
    assert "no locks" in answer.error


def test_a_venv_whose_python_is_gone_is_made_again(cold, fast_python):
    assert cold.source(**fast_python).returncode == 0
    (cold.root / ".venv/bin/python").unlink()  # as when a module has gone
    answer = cold.source("command -v python", **fast_python)
    assert answer.output == f"{cold.root}/.venv/bin/python\n"
    assert "making " in answer.error


@pytest.mark.parametrize("python", ["python3.old", "no-such-python"])
def test_an_old_python_is_refused(cold, python):
    executable(cold.bin / "python3.old", '#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.18\n')
    answer = cold.source(PYTHON=python)
    assert answer.returncode != 0 and len(answer.error.splitlines()) == 1
    assert "needs Python 3.10 or newer" in answer.error
    assert {"python3.old": "3.9.18", "no-such-python": "not found"}[python] in answer.error


# Where torch comes from


@pytest.mark.parametrize(
    "cuda, slurm, index",
    [
        ("12.8", False, "cu126"),
        ("13.0", False, None),
        ("13.0", True, None),
        (None, True, "cu126"),  # a login node
        (None, False, "cpu"),
    ],
)
@pytest.mark.parametrize("reachable", [True, False])
def test_the_driver_decides_on_the_wheel(cold, fast_python, cuda, slurm, index, reachable):
    # Of the machine's own commands only these: it may have a GPU or SLURM.
    commands = "bash basename cat cksum cp dirname flock grep ls mkdir realpath rm tr uname".split()
    for command in commands:
        (cold.bin / command).symlink_to(shutil.which(command))
    executable(cold.bin / "curl", f"#!/bin/sh\nexit {0 if reachable else 6}\n")
    if slurm:
        executable(cold.bin / "sbatch", "")
    if cuda:
        cold.gpus(1, cuda)
    answer = cold.source(PATH=str(cold.bin), CUDA_VISIBLE_DEVICES="", **fast_python)
    assert answer.returncode == 0, answer.error
    torch, rest = pip_arguments(cold.root / ".venv").splitlines()
    url = f"https://download.pytorch.org/whl/{index}"
    if index and reachable:
        assert torch.endswith(f"install --index-url {url} torch==2.13.0")
        assert f"torch comes from {url}\n" in answer.error
    else:
        assert torch.endswith("install torch==2.13.0")
    assert (f"{url} cannot be reached" in answer.error) == (index is not None and not reachable)
    assert "install -r" in rest and "index" not in rest
    assert (cold.root / ".venv/others").read_text().split() == ["#", "a", "comment", "leaf==1.0"]


def test_index_and_version_can_be_chosen_and_stay(cold, fast_python):
    chosen = {"TORCH_INDEX": "https://example.org/cu128", "TORCH_VERSION": "2.11.0"}
    answer = cold.source(**chosen, **fast_python)
    assert answer.returncode == 0, answer.error
    wanted = "install --index-url https://example.org/cu128 torch==2.11.0"
    assert pip_arguments(cold.root / ".venv").splitlines()[0].endswith(wanted)
    for environment in (chosen, {}):  # a job need not set them again
        answer = cold.source(**environment, **fast_python)
        assert (answer.returncode, answer.error) == (0, "")


@pytest.mark.slow
def test_another_index_reinstalls_torch(cold):
    for label in ("cu126", "cu130"):
        folder = cold.root.parent / label / "torch"
        folder.mkdir(parents=True)
        wheel(folder, "torch", f"2.13.0+{label}")
        name = f"torch-2.13.0+{label}-py3-none-any.whl"
        (folder / "index.html").write_text(f'<a href="{name}">{name}</a>')
    show_torch = "python -c 'import torch; print(torch.version)'"
    assert cold.source().returncode == 0
    for label in ("cu130", "cu126"):
        settings = {"PIP_NO_INDEX": None, "TORCH_INDEX": f"file://{cold.root.parent}/{label}"}
        answer = cold.source(show_torch, **settings)
        assert answer.output == f"2.13.0+{label}\n", answer.error
    assert cold.source(show_torch).output == "2.13.0+cu126\n"


# A GPU node


def test_gpus_are_counted(project):
    show = "bash -c 'echo $GPU_COUNT'"  # in another process: it is exported
    own = {"VENV": str(project.venv)}
    assert project.source(show, **own).output == "0\n"
    gpus = project.gpus(2)
    assert project.source(show, **own, **gpus).output == "2\n"
    assert project.source(show, **own, **gpus, CUDA_VISIBLE_DEVICES="").output == "0\n"
    assert project.source(show, **own, **gpus, CUDA_VISIBLE_DEVICES="-1").output == "0\n"


def test_gpus_that_torch_cannot_use_stop_it(project):
    project.gpus(2)
    answer = project.source(VENV=str(project.venv))
    assert answer.returncode != 0
    assert len(answer.error.splitlines()) == 1
    assert "torch 2.13.0+stub sees none" in answer.error
    assert "570.86" in answer.error and "CUDA Version: 12.8" in answer.error
    fix = "VENV= TORCH_INDEX=https://download.pytorch.org/whl/cu126 bash baseline/prepare.sh"
    assert fix in answer.error
    assert project.source(VENV=str(project.venv), CUDA_VISIBLE_DEVICES="").returncode == 0


def test_a_torch_that_cannot_be_imported_says_why(project):
    gpus = project.gpus(1)
    copy = project.root.parent / "broken"
    shutil.copytree(project.venv, copy, symlinks=True)
    (module,) = copy.glob("lib/python*/site-packages/torch/__init__.py")
    module.write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    answer = project.source(VENV=str(copy), **gpus)
    assert answer.returncode != 0
    assert len(answer.error.splitlines()) == 1
    assert "torch cannot be imported" in answer.error and "libcudart.so.12" in answer.error
    assert "driver" not in answer.error


# An environment of the user's own


def test_an_environment_of_ones_own_is_checked_and_never_changed(project):
    before = contents(project.venv)
    answer = project.source("command -v python", VENV=str(project.venv))
    assert (answer.output, answer.error) == (f"{project.venv}/bin/python\n", "")
    assert contents(project.venv) == before
    assert not (project.root / ".venv").exists()


def test_an_environment_of_ones_own_that_lacks_something(project):
    copy = project.root.parent / "old"
    shutil.copytree(project.venv, copy, symlinks=True)
    (site,) = copy.glob("lib/python*/site-packages")
    shutil.rmtree(site / "datasets-5.0.1.dist-info")
    old_torch = "Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0\n"
    (site / "torch-2.11.0+cu126.dist-info/METADATA").write_text(old_torch)
    before = contents(copy)
    answer = project.source(VENV=str(copy))
    assert answer.returncode != 0
    assert len(answer.error.splitlines()) == 1
    assert "lacks torch>=2.11 (has 2.6.0), datasets>=5.0 (has none):" in answer.error
    assert contents(copy) == before


def test_a_folder_that_is_no_environment_is_left_alone(project):
    (project.bin / "mine").touch()
    answer = project.source(VENV=str(project.bin))
    assert answer.returncode != 0
    assert len(answer.error.splitlines()) == 1 and "VENV=" in answer.error
    assert [path.name for path in project.bin.iterdir()] == ["mine"]


# The caller's shell


@pytest.mark.parametrize("options", ["set -euo pipefail", "set +e", "set -C", "set -f"])
def test_the_callers_options_stay(cold, fast_python, options):
    show = "{ echo $- $SHELLOPTS; shopt; compgen -A function _env || true; }"
    source = "source baseline/env.sh && echo entered || echo failed"
    for environment, result in (
        (fast_python, "entered"),
        ({"VENV": str(cold.venv)}, "entered"),
        ({"VENV": "other", "PYTHON": "no-such-python"}, "failed"),
    ):
        command = f"{options}; {show}; echo CUT; {source}; echo CUT; {show}"
        answer = cold.run("bash", "-c", command, **environment)
        assert answer.returncode == 0, answer.error
        before, said, after = answer.output.split("CUT\n")
        assert said == f"{result}\n", answer.error
        assert after == before


def test_a_failure_is_seen_by_the_caller(project):
    bad = {"PYTHON": "no-such-python"}
    goes_on = project.run("bash", "-c", "source baseline/env.sh; echo code $?", **bad)
    assert goes_on.output == "code 1\n"
    stops = project.run("bash", "-c", "set -e; source baseline/env.sh; echo went on", **bad)
    assert stops.returncode == 1 and stops.output == ""


def test_it_is_to_be_sourced_and_with_bash(project):
    started = project.run("bash", "baseline/env.sh")
    assert started.returncode == 2 and "source it with bash" in started.error
    if shutil.which("dash"):
        other = project.run("dash", "-c", ". baseline/env.sh || echo code $?")
        assert other.output == "code 2\n" and "source it with bash" in other.error


def test_it_works_from_any_folder_and_twice(project):
    source = 'source "$0/baseline/env.sh"'
    command = f'cd / && {source} && {source} && echo "$SQUAD_CACHE" && echo "$PATH"'
    command += ' && echo "$PYTEST_ADDOPTS"'
    answer = project.run("bash", "-c", command, project.root, VENV=str(project.venv))
    cache, path, options = answer.output.splitlines()
    assert cache == f"{project.root}/.cache"
    assert path.count(str(project.venv)) == 1
    assert options.count("--rootdir") == 1


def test_store_takes_what_is_large(cold, fast_python):
    place = cold.root.parent / "st ore/bert-squad"
    names = "VENV HF_HOME SQUAD_CACHE VIRTUAL_ENV".split()
    show = "for name in " + " ".join(names) + '; do echo "${!name}"; done'
    answer = cold.source(show, STORE=str(place.parent), **fast_python)
    wanted = ["venv", "huggingface", "cache", "venv"]
    assert answer.output.splitlines() == [f"{place}/{name}" for name in wanted], answer.error
    own = {name: f"/elsewhere/{name}" for name in names[1:3]} | {"VENV": str(cold.venv)}
    answer = cold.source(show, STORE=str(place.parent), **own)
    assert answer.output.splitlines() == [*(own[name] for name in names[:3]), str(cold.venv)]


def test_prepared_means_offline(project):
    show = 'echo "${HF_HUB_OFFLINE-unset} ${HF_EVALUATE_OFFLINE-unset}"'
    own = {"VENV": str(project.venv)}
    assert project.source(show, **own).output == "unset unset\n"
    (project.root / ".cache").mkdir()
    (project.root / ".cache/prepared").touch()
    assert project.source(show, **own).output == "1 1\n"
    assert project.source(show, **own, HF_HUB_OFFLINE="0").output == "0 1\n"


def test_other_packages_do_not_shadow_the_environments(project):
    show = """bash -c 'echo "${PYTHONPATH-unset} ${PYTHONHOME-unset} $PYTHONNOUSERSITE"'"""
    answer = project.source(show, VENV=str(project.venv), PYTHONPATH="/modules/torch")
    assert answer.output == "unset unset 1\n"


@pytest.mark.parametrize(
    "environment, loads",
    [
        ({"MODULES": "a b/1"}, "load a b/1"),
        ({"MODULES": ""}, ""),
        ({}, "load cesga/2020 python/3.10.8"),
        ({"LOADEDMODULES": "gcc/11:python/3.12.1"}, ""),
        ({"LOADEDMODULES": "miniconda3/22"}, ""),
    ],
)
def test_modules_are_loaded_where_there_are_any(project, environment, loads):
    module = 'module() { echo "$*" >>loaded; echo noise; unset_variable=$unset; }; set -u; '
    command = module + "source baseline/env.sh"
    environment = {"MODULES": None, "VENV": str(project.venv)} | environment
    answer = project.run("bash", "-c", command, **environment)
    assert (answer.returncode, answer.output) == (0, ""), answer.error
    loaded = project.root / "loaded"
    assert (loaded.read_text().strip() if loaded.exists() else "") == loads


def test_a_module_that_is_not_there(project):
    command = "module() { return 1; }; source baseline/env.sh"
    named = project.run("bash", "-c", command, MODULES="unknown", VENV=str(project.venv))
    assert named.returncode == 1 and 'MODULES="unknown"' in named.error
    default = project.run("bash", "-c", command, MODULES=None, VENV=str(project.venv))
    assert (default.returncode, default.error) == (0, "")


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

    quick, slow = [
        [f"{folder}/tests/test_a.py::test_{speed}" for folder in ("baseline", "DISTRIBUTED")]
        for speed in ("quick", "slow")
    ]
    assert collect() == quick
    assert collect("-m", "slow") == slow
    assert collect(quick[1]) == quick[1:]

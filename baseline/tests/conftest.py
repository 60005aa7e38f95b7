"""What the tests of train.py share: a way to start it in a tenth of a second instead of five."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

TRAIN = pathlib.Path(__file__).parents[1] / "train.py"
# Imports train.py once, and forks a child for each line of its input. It runs no computation of its
# own, so that no thread is there when it forks. It answers with the child's number, then its code.
NURSERY = """
import importlib.util, json, os, sys, time, traceback
spec = importlib.util.spec_from_file_location("train", sys.argv[1])
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    code = 0
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ.update(request["environment"])
        sys.argv = [train.__file__, *request["words"]]
        train.STARTED, train.CACHE = time.perf_counter(), train.Path(os.environ["SQUAD_CACHE"])
        exec(request["patch"], vars(train))
        train.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 70
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)
"""


class Life:
    """A train.py under way: its process number, its log, and how it ended."""

    def __init__(self, nursery, request):
        self.nursery, self.log, self.code = nursery, pathlib.Path(request["log"]), None
        self.log.touch()
        nursery.stdin.write(json.dumps(request) + "\n")
        nursery.stdin.flush()
        self.pid = int(nursery.stdout.readline())

    def kill(self, number):
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it was faster

    def end(self, code=0):
        """Waits for its end, asserts its exit code and returns its log; None takes any code."""
        self.code = int(self.nursery.stdout.readline())
        text = self.log.read_text(encoding="utf-8", errors="replace")
        assert code is None or self.code == code, text
        assert "Traceback" not in text, text
        return text


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def nursery(cache):
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # One thread: sums do not depend on how many cores are free.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SQUAD_CACHE": str(cache)}
    environment.pop("REQUEUE_MARKER", None)
    command = [sys.executable, "-c", NURSERY, str(TRAIN)]
    with subprocess.Popen(command, env=environment, **how) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def start(nursery, tmp_path):
    """Starts train.py with these words; patch is code that runs inside the module beforehand."""
    lives = []

    def begin(*words, patch="", **environment):
        request = {"words": list(map(str, words)), "patch": patch, "environment": environment}
        lives.append(Life(nursery, request | {"log": str(tmp_path / f"life-{len(lives)}.log")}))
        return lives[-1]

    yield begin
    if lives and lives[-1].code is None:  # its test failed before its end
        lives[-1].kill(signal.SIGKILL)
        lives[-1].end(None)


# The scripts as modules, and real text and a real model where they lie beside the project.
def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # torch.compile looks functions' modules up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def train():
    return load_script(TRAIN)


@pytest.fixture(scope="session")
def report():
    return load_script(TRAIN.with_name("report.py"))


def beside(name):
    path = TRAIN.resolve().parents[2] / "shared" / name
    if not path.is_dir():
        pytest.skip(f"needs ../shared/{name} beside the project, which is not there")
    return path


@pytest.fixture(scope="session")
def squad():
    """The folder of SQuAD v1.1 questions: train.json and dev.json."""
    return beside("squad")


@pytest.fixture(scope="session")
def minilm():
    """The folder of a small pretrained BERT."""
    return beside("minilm")


@pytest.fixture
def own_cache(train, tmp_path, monkeypatch):
    """An empty features cache for this test alone, in the module train."""
    monkeypatch.setattr(train, "CACHE", tmp_path / "features")
    return tmp_path / "features"

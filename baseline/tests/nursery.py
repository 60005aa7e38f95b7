"""Starts train.py in a tenth of a second: a process imports the libraries and forks for each.

    with Nursery() as nursery:
        life = nursery.start(script, ["--sample"], log)
        text = life.end()

A fork loads the script anew and calls its main(), as a process of its own would. So any train.py
can be started, and several at a time: a life for each rank. conftest.py makes fixtures of it.
"""

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

# 1. On the tests' side


class Nursery:
    """The process that has imported the libraries; environment: variables of all its runs."""

    def __init__(self, **environment):
        # One thread: a sum does not depend on how many cores are free.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for pytest, which then closes it.
            start_new_session=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()

    def start(self, script, words, log, patch="", **environment):
        """Starts a script with these words on its command line; returns its Life.

        log: the file for stdout and stderr. patch: code that is run within the script's module
        before its main(). environment: variables of this run alone."""
        log = Path(log)
        log.touch()
        request = {
            "script": str(script),
            "words": [str(word) for word in words],
            "log": str(log),
            "patch": patch,
            "environment": environment,
        }
        pid = self.ask("start", request)
        return Life(self, pid, log)

    def ask(self, what, argument):
        self.process.stdin.write(json.dumps([what, argument]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Life:
    """A run of train.py from its start to its end: process number, log, exit code."""

    def __init__(self, nursery, pid, log):
        self.nursery = nursery
        self.pid = pid
        self.log = log
        # Negative for a signal's number, as subprocess has it; None while it runs.
        self.code = None

    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def running(self):
        if self.code is None:
            self.code = self.nursery.ask("poll", self.pid)
        return self.code is None

    def wait_until(self, condition, seconds=120):
        """Waits until condition(), asked again and again, is true, or the run has ended."""
        deadline = time.monotonic() + seconds
        while not condition() and self.running():
            assert time.monotonic() < deadline, f"still running after {seconds} s:\n{self.text()}"
            time.sleep(0.005)

    def wait_for(self, words):
        """Waits until these words are in the log."""
        self.wait_until(lambda: words in self.text())
        assert words in self.text(), self.text()

    def kill(self, number):
        # Its process number is its own until its end has been asked for.
        if self.running():
            os.kill(self.pid, number)

    def end(self, code=0, seconds=240):
        """Waits for its end and returns its log. Asserts its exit code; None allows any."""
        self.wait_until(lambda: False, seconds)
        text = self.text()
        assert code is None or self.code == code, f"exit code {self.code}:\n{text}"
        assert "Traceback" not in text, text
        return text


def in_step(step, action):
    """A patch of train.py that does something, a line of Python, within a step."""
    return f"""
def dropout_seed(seed, step, micro, dropout_seed=dropout_seed):
    if step + 1 == {step}:
        {action}
    return dropout_seed(seed, step, micro)
"""


def send(name):
    """An action: the run gets this signal."""
    return f"os.kill(os.getpid(), signal.{name})"


# 2. In the nursery's own process, which starts no thread: a fork would be without it


def serve():
    """Answers each line of its input, [what, argument] in JSON, by a line."""
    import_libraries()
    print("ready", flush=True)
    for line in sys.stdin:
        what, argument = json.loads(line)
        answer = fork(argument) if what == "start" else poll(argument)
        print(json.dumps(answer), flush=True)
    # At once: to unload the libraries takes seconds.
    os._exit(0)


def import_libraries():
    """Imports what a run imports on its way, so that its fork finds it done."""
    # ruff: noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.profiler
    import torch.utils.tensorboard
    import transformers.models.bert.modeling_bert
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertTokenizerFast


def fork(request):
    """Starts a run; returns its process number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(request)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return pid


def poll(pid):
    """Returns the exit code of a run that has ended, else None."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def run(request):
    """What a process of its own would do, in a fork."""
    os.setsid()
    # No run outlives the tests: where they are killed, the nursery ends, and it with the nursery.
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    sys.argv = [request["script"], *request["words"]]
    module = load_script(request["script"])
    exec(request["patch"], vars(module))
    module.main()


def load_script(path):
    """Returns a script as a module named train: its main() is not called."""
    specification = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(specification)
    # torch.compile looks a function's module up by its name.
    sys.modules["train"] = module
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve()

"""Starts ranks without paying for the imports each time: imports once, then forks for each rank.

test_ranks.py starts it and sends a line of JSON for each run: {"script", "world", "argv", "env",
"log", "patch"}; it answers with the ranks' exit codes. `patch` is Python that a rank runs before
train.py's main(), to look inside: `train` is the module. Nothing here is used outside the tests.
"""

import ctypes
import importlib.util
import json
import os
import signal
import sys

import torch

# What train.py imports, so that the forks have it.
import torch.distributed.fsdp
import torch.distributed.optim
import torch.distributed.tensor
import torch.profiler
import transformers
import transformers.models.bert.modeling_bert
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertTokenizerFast

assert transformers and AutoModelForQuestionAnswering and AutoTokenizer and BertTokenizerFast

# In place of report.py, which takes seconds: keeps train.py's raw record.
LIGHT = """
import subprocess
def light(command, input=None, **how):
    if input is not None:
        (train.Path(command[-1]) / "record.json").write_text(input)
        (train.Path(command[-1]) / "results.json").write_text("{}")
    return subprocess.CompletedProcess(command, 0, stdout="{}")
train.subprocess.run = light
"""


def die_with_parent():  # nothing stays when the tests are killed
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def rank(number, job):
    die_with_parent()
    log = os.open(f"{job['log']}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(job["world"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} | job["env"]
    torch.set_num_threads(1)
    script = job["scripts"][number] if "scripts" in job else job["script"]
    sys.argv = [script, *job["argv"], *job.get("own", {}).get(str(number), [])]
    spec = importlib.util.spec_from_file_location("train", script)
    train = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    exec(LIGHT + job["patch"], {"train": train, "torch": torch, "RANK": number, "job": job})  # noqa: S102
    train.main()


def main():
    os.setpgid(0, 0)
    die_with_parent()
    for line in sys.stdin:
        job, children = json.loads(line), []
        for number in range(job["world"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    rank(number, job)
                    code = 0
                except SystemExit as error:
                    code = error.code or 0
                except BaseException:  # noqa: BLE001 as python itself would
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


main()

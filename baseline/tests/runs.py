"""Runs made here as train.py and the launchers leave them, for test_report.py and test_trace.py."""

import gzip
import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

BASELINE = Path(__file__).parents[1]
A100 = "NVIDIA A100-PCIE-40GB"
CPU = {"devices": ["CPU AMD EPYC"]}


def call(script, *words, code=0):
    """Runs a script of baseline/; returns what it prints, and what it says on stderr."""
    command = [sys.executable, str(BASELINE / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def report(*words):
    return call("report.py", *words)[0]


def refusal(*words, script="report.py"):
    """The one line that a script says of bad input."""
    _, line = call(script, *words, code=2)
    assert line.startswith(f"{script}: ") and line.count("\n") == 1, line
    return line


def load_script(name):
    """A script of baseline/ as a module."""
    specification = importlib.util.spec_from_file_location(Path(name).stem, BASELINE / name)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def table_rows(text):
    """The rows of all tables in a text, without the headings, as lists of cells."""
    lines = text.splitlines()
    rows = []
    for number, line in enumerate(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if line.startswith("| ") and "---" not in line and not below.startswith("| ---"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def change(path, edit):
    """Rewrites a JSON file by a function that changes its content in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def make_intervals(speed):
    """Sixty log intervals of ten steps; the first three are not steady."""
    draw = random.Random(0)
    intervals = []
    for number in range(60):
        tokens = draw.randint(50_000, 60_000)
        interval = {
            "step": 10 * (number + 1),
            "loss": 6 * math.exp(-number / 20),
            "learning_rate": 5e-5,
            "gradient_norm": 1.0,
            "seconds": tokens / speed,
            "tokens": tokens,
            "steady": number > 2,
        }
        intervals.append(interval)
    return intervals


def make_run(folder, arguments=(), results=(), timings=(), environment=(), speed=10_000.0):
    """A run's results.json and timings.json; what is given replaces what stands here."""
    all_arguments = {
        "model": "google-bert/bert-base-uncased",
        "train_file": None,
        "validation_file": None,
        "sample": False,
        "limit": None,
        "max_length": 384,
        "stride": 128,
        "epochs": 3,
        "max_steps": None,
        "batch_size": 32,
        "accumulate": 1,
        "batching": "packed",
        "device": "auto",
        "precision": "bf16",
        "compile": True,
        "learning_rate": 5e-5,
        "dropout": None,
        "seed": 42,
        "output": str(folder),
        "profile": True,
        **dict(arguments),
    }
    machine = {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "date": "2026-11-24T21:00:00+01:00",
        "hosts": ["node-1"],
        "devices": [A100],
        "torch": "2.13.0",
        "cuda": "12.8",
        "transformers": "5.23.0",
        "python": "3.11.2",
        "slurm_job_id": None,
        **dict(environment),
    }
    outcome = {
        "exact_match": 80.912,
        "f1": 88.345,
        "steady_epoch_seconds": 15_000_000 / speed,
        "train_seconds": 46_000_000 / speed,
        "epoch_seconds": [1501.0, 1502.0, 1503.0],
        "warmup_seconds": 12.5,
        "prepare_seconds": 20.0,
        "features_cached": False,
        "evaluate_seconds": 9.5,
        "total_seconds": 47_000_000 / speed,
        "features_per_second": speed / 170,
        "tokens_per_second": speed,
        "padding_share": 0.025,
        "model_flops_utilization": 0.41,
        "peak_memory_gib": 9.87,
        "steps": 8300,
        "train_features": 88_524,
        "world_size": 1,
        "nodes": 1,
        "parameters": 108_893_186,
        "evaluations": [],
        "resumed_from_steps": [],
        "scorer": "evaluate",
        "command": "sbatch baseline/run.sbatch",
        "finished_at": "2026-11-24T21:30:00+01:00",
        "arguments": all_arguments,
        "environment": machine,
        **dict(results),
    }
    intervals = make_intervals(speed)
    times = {
        "phases": {
            "data": {"seconds": 8.3, "share": 0.01},
            "forward": {"seconds": 249.0, "share": 0.3},
            "backward": {"seconds": 498.0, "share": 0.6},
            "optimizer": {"seconds": 74.7, "share": 0.09},
        },
        "intervals": intervals,
        "tokens_per_step": [[interval["tokens"] // 10, 6144] for interval in intervals],
        **dict(timings),
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(outcome))
    (folder / "timings.json").write_text(json.dumps(times))
    return folder


# Traces


def event(category, name, start, length, thread=1, **args):
    """An event of a trace; times in milliseconds."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": thread,
        "ts": 4_700_000_000_000.5 + 1000 * start,
        "dur": 1000 * length,
        "args": args,
    }


def write_trace(folder, rank, events, stamp=1795557151448263042):
    """The file as torch.profiler's tensorboard_trace_handler names and writes it."""
    (folder / "tensorboard").mkdir(exist_ok=True)
    others = [
        {"ph": "M", "name": "process_name", "pid": 1, "ts": 1, "args": {"name": "python"}},
        {"ph": "s", "id": 7, "pid": 1, "tid": 1, "ts": 1.5, "cat": "fwdbwd", "name": "fwdbwd"},
    ]
    content = {"schemaVersion": 1, "traceEvents": [*others, *events], "traceName": "trace.json"}
    path = folder / "tensorboard" / f"rank{rank}.{stamp}.pt.trace.json.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        json.dump(content, file)
    return path


def cpu_step(number, at):
    """10 ms: 1 of data, 7 of operators of which 0.25 only hand over, gloo alone for 1.5 + 0.25, and
    1.5 of nothing."""
    return [
        event("user_annotation", f"ProfilerStep#{number}", at, 10),
        event("user_annotation", "data", at, 1),
        event("user_annotation", "forward", at + 1, 3),
        event("cpu_op", "aten::linear", at + 1, 3),
        event("cpu_op", "aten::addmm", at + 1.5, 2),
        event("user_annotation", "backward", at + 4, 5.5),
        event("cpu_op", "autograd::engine::evaluate_function: AddmmBackward0", at + 4, 4),
        event("cpu_op", "aten::mm", at + 4, 3.5),
        event("cpu_op", "c10d::allreduce_", at + 7.5, 0.25),
        event("user_annotation", "gloo:all_reduce", at + 7, 2.5, thread=9),
        event("user_annotation", "optimizer", at + 9.5, 0.5),
    ]


def gpu_steps(count=2):
    """Kernels from 2 ms on: a step is 8 ms, 6 of kernels, 1 of all-reduce alone, 1 of nothing. The
    host launches a step in 3 ms and runs ahead."""
    events = []
    for number in range(count):
        host = 3 * number
        gpu = 2 + 8 * number
        link = {"External id": 10 * number + 1}
        events += [
            event("user_annotation", f"ProfilerStep#{number}", host, 3),
            event("user_annotation", "forward", host, 2),
            event("cpu_op", "aten::addmm", host + 0.5, 1, **link),
            event("cuda_runtime", "cudaLaunchKernel", host + 0.6, 0.1, **link),
            event("kernel", "ampere_bf16_gemm", gpu, 3, 7, **link),
            event("kernel", "triton_red_fused_gelu_3", gpu + 3, 2, 7, **link),
            event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", gpu + 4, 2, 8),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", gpu + 7, 1, 7),
            event("gpu_user_annotation", "forward", gpu, 1, 7),
        ]
    events.append(event("cuda_runtime", "cudaStreamSynchronize", 3 * count, 8 * count))
    return events

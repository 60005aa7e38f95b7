"""report.py on runs made here, field by field as train.py leaves them, and on traces: one made by
hand for each kind of device, whose shares are known, and one that torch.profiler writes."""

import gzip
import importlib.util
import json
import math
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import pytest

REPORT = pathlib.Path(__file__).parents[1] / "report.py"
A100 = "NVIDIA A100-PCIE-40GB"


def report(*words, code=0, told=None):
    """Returns what report.py prints: tables, or what is wrong; told gets its words on the way."""
    command = [sys.executable, str(REPORT), *map(str, words)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == code, done.stderr
    if told is not None:
        told += done.stderr.splitlines()
    return done.stdout if code == 0 else done.stderr


def make_run(folder, arguments=(), results=(), timings=(), environment=(), speed=10_000.0):
    """A run's results.json and timings.json; what is given replaces what stands here."""
    settings = {
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
        "fused": True,
        "learning_rate": 5e-5,
        "dropout": None,
        "seed": 42,
        "output": str(folder),
        "profile": True,
    } | dict(arguments)
    machine = {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "date": "2026-11-24T21:00:00+01:00",
        "hosts": ["node-1"],
        "devices": [A100],
        "gpu_before": {"power.limit": "250.00 W", "clocks.sm": "1410 MHz"},
        "torch": "2.13.0",
        "cuda": "12.8",
        "transformers": "5.23.0",
        "python": "3.11.2",
        "slurm_job_id": None,
        "node_shared": None,
    } | dict(environment)
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
        "arguments": settings,
        "environment": machine,
        "resumed_from_steps": [],
        "repeated_steps": 0,
        "restarts": 0,
        "scorer": "evaluate",
        "finished_at": "2026-11-24T21:30:00+01:00",
        "command": "sbatch baseline/run.sbatch",
        "paper": {"exact_match": 80.8, "f1": 88.5},
    } | dict(results)
    draw = random.Random(0)
    tokens = [draw.randint(50_000, 60_000) for _ in range(60)]
    times = {
        "phases": {
            "data": {"seconds": 8.3, "share": 0.01},
            "forward": {"seconds": 249.0, "share": 0.3},
            "backward": {"seconds": 498.0, "share": 0.6},
            "optimizer": {"seconds": 74.7, "share": 0.09},
        },
        "intervals": [
            {
                "step": 10 * (n + 1),
                "loss": 6 * math.exp(-n / 20),
                "learning_rate": 5e-5,
                "gradient_norm": 1.0,
                "seconds": count / speed,
                "tokens": count,
                "steady": n > 2,
            }
            for n, count in enumerate(tokens)
        ],
        "tokens_per_step": [[count // 10, 6144] for count in tokens],
    } | dict(timings)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(outcome))
    (folder / "timings.json").write_text(json.dumps(times))
    return folder


def event(category, name, start, length, thread=1, **args):
    times = {"ts": 4_700_000_000_000.5 + 1000 * start, "dur": 1000 * length}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": thread,
        "args": args,
        **times,
    }


def write_trace(folder, rank, events, stamp=1795557151448263042):
    """The file as torch.profiler's tensorboard_trace_handler names and writes it."""
    folder = folder / "tensorboard"
    folder.mkdir(exist_ok=True)
    noise = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 1, "args": {"name": "python"}}
    ]
    noise += [
        {"ph": "s", "id": 7, "pid": 1, "tid": 1, "ts": 1.5, "cat": "fwdbwd", "name": "fwdbwd"}
    ]
    whole = {"schemaVersion": 1, "traceEvents": [*noise, *events], "traceName": "trace.json"}
    with gzip.open(folder / f"rank{rank}.{stamp}.pt.trace.json.gz", "wt") as file:
        json.dump(whole, file, indent=2)


def cpu_step(n, at):
    """10 ms: 1 of data; 3 + 4 of operators, all but 0.25 computing; gloo alone for 1.5 + 0.25; 1.5 of nothing."""
    return [
        event("user_annotation", f"ProfilerStep#{n}", at, 10),
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


def cuda_steps(steps=2):
    """Kernels from 2 ms on: a step is 8 ms, 6 of kernels, 1 of all-reduce alone, 1 of nothing."""
    events = []
    for n in range(steps):
        host, at = 3 * n, 2 + 8 * n
        events += [
            event("user_annotation", f"ProfilerStep#{n}", host, 3),
            event("user_annotation", "forward", host, 2),
            event("cpu_op", "aten::addmm", host + 0.5, 1, **{"External id": 10 * n + 1}),
            event(
                "cuda_runtime", "cudaLaunchKernel", host + 0.6, 0.1, **{"External id": 10 * n + 1}
            ),
            event("kernel", "ampere_bf16_gemm", at, 3, 7, **{"External id": 10 * n + 1}),
            event("kernel", "triton_red_fused_gelu_3", at + 3, 2, 7, **{"External id": 10 * n + 1}),
            event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", at + 4, 2, 8),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", at + 7, 1, 7),
            event("gpu_user_annotation", "forward", at, 1, 7),
        ]
    return events + [event("cuda_runtime", "cudaStreamSynchronize", 3 * steps, 8 * steps)]


def shares(text):
    """The row of rank 0 in 'What the device did', as percents."""
    found = re.search(
        r"^\| 0 \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$",
        text,
        re.MULTILINE,
    )
    return [float(value) for value in found.groups()]


# The whole report


def test_whole_report_of_one_run(tmp_path):
    text = report(make_run(tmp_path / "baseline-7"))
    for part in ("# Report", "## Environment", "## Times", "## Answers", "## Phases", "```mermaid"):
        assert part in text
    assert "| baseline-7 | 80.91 | 88.34 | 80.8 / 88.5 | evaluate |" in text
    assert "power.limit 250.00 W" in text and "`sbatch baseline/run.sbatch`" in text
    assert re.search(
        r"\| 16\d\.\d ms, 30\.0 % \|", text
    )  # 5,500 tokens a step at 10,000/s, 30 % of it
    assert "Traces" not in text and str(tmp_path) not in text


def test_every_table_states_its_conditions(tmp_path):
    run = make_run(tmp_path / "one")
    captions = re.findall(r"^\*(.*)\*$", report(run, make_run(tmp_path / "two")), re.MULTILINE)
    assert len(captions) >= 6
    for caption in captions[1:]:  # the first is the environment itself
        for part in (
            A100,
            "bf16",
            "batch 32",
            "bert-base-uncased",
            "SQuAD v1.1",
            "0123456789",
            "2026-11-24",
        ):
            assert part in caption
        assert "2 runs." in caption


def test_paper_stands_only_beside_full_runs_of_bert_base(tmp_path):
    cases = {
        "limit": ({"limit": 100}, {}, "other data (SQuAD v1.1, first 100"),
        "sample": ({"sample": True}, {}, "other data (sample.json"),
        "small": (
            {"train_file": "squad/train.json"},
            {"train_features": 1404},
            "other data (train.json",
        ),
        "model": (
            {"model": "distilbert-base-uncased/"},
            {},
            "another model (distilbert-base-uncased)",
        ),
        "short": ({"max_steps": 5}, {}, "not trained to the end"),
    }
    cases["model"][0]["model"] = "google/electra-base"
    cases["model"] = (*cases["model"][:2], "another model (electra-base)")
    for name, (arguments, results, reason) in cases.items():
        text = report("--table", "answers", make_run(tmp_path / name, arguments, results))
        assert "not comparable: " + reason in text and "80.8" not in text


def test_absent_and_null_figures_are_not_invented(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "results.json").write_text('{"f1": null, "exact_match": NaN}')
    text = report(folder, folder)
    assert (
        "not measured" in text and "| bare | not measured | not measured | not comparable" in text
    )
    assert not re.search(r"\b(None|nan|null)\b", text)
    for name in ("runs", "seeds", "ladder", "scaling", "strategies", "phases", "trace", "memory"):
        assert "not measured" in report("--table", name, folder)


# Speed-ups


def test_speed_up_only_between_alike(tmp_path):
    first = make_run(tmp_path / "first", speed=1000.0)
    same = make_run(tmp_path / "faster", {"batching": "padded"}, speed=2500.0)
    text = report("--table", "speed-up", first, same)
    assert "| faster | 2.50 | batching packed → padded |" in text
    others = {
        "batch 32 → 64": ({"batch_size": 64}, {}, {}),
        "model bert-base-uncased → minilm": ({"model": "../minilm"}, {}, {}),
        "data SQuAD v1.1, 384 tokens a window → train.json": (
            {"train_file": "x/train.json"},
            {},
            {},
        ),
        "features 88524 → 88000": ({}, {"train_features": 88000}, {}),
        f"device {A100} → NVIDIA H100": ({}, {}, {"devices": ["NVIDIA H100"]}),
    }
    for n, (reason, (arguments, results, environment)) in enumerate(others.items()):
        other = make_run(tmp_path / str(n), arguments, results, (), environment)
        assert "not compared: " + reason in report("--table", "speed-up", first, other)


def test_seeds(tmp_path):
    runs = [make_run(tmp_path / f"p{n}", {"seed": n}, {"f1": 80.0 + n}) for n in (1, 2, 3)]
    runs += [
        make_run(tmp_path / f"q{n}", {"seed": n, "batching": "padded"}, {"f1": 70.0})
        for n in (1, 2)
    ]
    text = report("--table", "seeds", *runs)
    assert "| batching packed | 3 | 1, 2, 3 | 80.91 ± 0.00 | 82.00 ± 1.00 |" in text
    assert "| batching padded | 2 | 1, 2 |" in text
    assert "## Seeds" in report(*runs)


def make_ladder(folder):
    rungs = {
        "1-fp32": ({"precision": "fp32", "batching": "padded", "compile": False}, 1000.0),
        "2-tf32": ({"precision": "tf32", "batching": "padded", "compile": False}, 2000.0),
        "3-dynamic": ({"precision": "tf32", "batching": "dynamic", "compile": False}, 3000.0),
        "10-packed": ({"precision": "tf32", "compile": False}, 6000.0),
    }
    for name, (arguments, speed) in rungs.items():
        make_run(folder / name, arguments, speed=speed)
    path = folder / "2-tf32" / "timings.json"
    times = json.loads(path.read_text())
    times["intervals"][7]["loss"] += 0.014
    times["intervals"][50]["loss"] += 9  # after the losses that are compared
    path.write_text(json.dumps(times))
    path = folder / "10-packed" / "timings.json"
    times = json.loads(path.read_text())
    times["tokens_per_step"][3][0] += 1  # so it trained other batches
    path.write_text(json.dumps(times))
    path = folder / "3-dynamic" / "timings.json"
    times = json.loads(path.read_text())
    whole = times["intervals"][5]  # a save in the middle of an interval makes two of it
    half = whole | {"step": whole["step"] - 1, "tokens": whole["tokens"] // 2, "loss": 9.0}
    times["intervals"][5:6] = [half, whole | {"tokens": whole["tokens"] // 2, "loss": 8.0}]
    path.write_text(json.dumps(times))


def test_ladder(tmp_path):
    make_ladder(tmp_path / "ladder")
    text = report("--table", "ladder", "--chart", "ladder", tmp_path / "ladder")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| 1-fp32", "| 2-tf32", "| 3-dynamic", "| 10-packed"]
    assert [row[1] for row in rows][1:3] == ["precision fp32 → tf32", "batching padded → dynamic"]
    assert [row[3:6] for row in rows] == [
        ["1,000", "1.00", "1.00"],
        ["2,000", "2.00", "2.00"],
        ["3,000", "3.00", "1.50"],
        ["6,000", "6.00", "2.00"],
    ]
    assert rows[1][10] == "1.4e-02 from 1-fp32" and rows[2][10] == "0.0e+00 from 1-fp32"
    assert rows[3][10] == "no earlier rung has these batches"
    assert re.match(r"2,000 \(2,000 to 2,000\)", rows[1][2])
    assert 'x-axis ["1-fp32", "2-tf32", "3-dynamic", "10-packed"]' in text
    assert "## Ladder" in report(tmp_path / "ladder")


def test_median_of_three_windows(tmp_path):
    rows = [{"step": n, "loss": 1.0, "seconds": 1.0, "steady": n > 0} for n in range(10)]
    for n, row in enumerate(rows):
        row["tokens"] = [9999, 10, 10, 10, 40, 40, 40, 20, 20, 20][n]
    run = make_run(tmp_path / "run", timings={"intervals": rows})
    assert "| 20.0 (10.0 to 40.0) |" in report("--table", "ladder", run)


def make_scaling(folder):
    def phases(share):
        return {"phases": {"exposed_communication": {"seconds": 1.0, "share": share}}}

    link = {"all_reduce": {"gigabytes_per_second": 10.8, "megabytes": 436, "link": "NET/IB"}}
    for rule in ("strong", "growing"):
        for grid, speed in {"1x1": 1000.0, "1x2": 1900.0, "2x2": 3600.0}.items():
            nodes, per_node = map(int, grid.split("x"))
            n = nodes * per_node
            batch = 512 if rule == "strong" else 128 * n
            for repeat in (1, 2, 3):
                make_run(
                    folder / f"{rule}-{grid}-{repeat}",
                    {"batch_size": batch, "strategy": "ddp"},
                    {"world_size": n, "nodes": nodes, "f1": 88.0, **link},
                    phases(0.05 if n > 1 else 0.0),
                    speed=speed + 10 * (repeat - 2),
                )


def test_scaling(tmp_path):
    make_scaling(tmp_path / "scaling")
    text = report("--table", "scaling", "--chart", "scaling", tmp_path / "scaling")
    row = next(line for line in text.splitlines() if line.startswith("| strong | 2x2"))
    for part in (
        "| 512 | 3 |",
        "| 3,600 ± 10.0 | 900.0 | 3.60 | 90.0 % |",
        "| 10.8 ± 0 | NET/IB | 88.00",
    ):
        assert part in row
    assert "| strong | 1x1 | 512 | 3 |" in text and "| growing | 2x2 | 512 | 3 |" in text
    assert "line [1000, 2000, 4000]" in text and text.count("xychart-beta") == 2
    assert "## Scaling" in report(tmp_path / "scaling")


def test_scaling_without_a_single_rank_compares_nothing(tmp_path):
    run = make_run(tmp_path / "strong-2x2-1", {"strategy": "ddp"}, {"world_size": 4, "nodes": 2})
    other = make_run(tmp_path / "strong-1x1-1", {"strategy": "ddp", "batch_size": 64})
    text = report("--table", "scaling", "--chart", "scaling", run, other)
    assert text.splitlines()[4].count("no 1x1 to compare with") + text.count("no 1x1") >= 1


def test_strategies_and_memory(tmp_path):
    runs = []
    for name in ("ddp", "zero1", "fsdp"):
        results = {"world_size": 4, "nodes": 2, "parameters": 2**30}
        runs.append(make_run(tmp_path / name, {"strategy": name, "batch_size": 64}, results))
    rows = [
        line
        for line in report("--table", "strategies", *runs).splitlines()
        if line.startswith("| ")
    ][2:]
    assert [row.split(" | ")[7] for row in rows] == ["16.0", "10.0", "4.00"]
    assert "| ddp | 2x2 | bf16, packed, ddp, compiled | 16.0 |" in report(
        "--table", "memory", *runs
    )


def test_one_command_over_all_that_a_course_left(tmp_path):
    """Ladder, scaling, strategies: each its own table, whatever else lies beside it."""
    for name in ("ladder-7/1-fp32", "ladder-7/2-tf32"):
        make_run(tmp_path / name, {"precision": name.split("-")[-1]})
    for ranks in (1, 2):
        results = {"world_size": ranks, "nodes": 1, "strategy": "ddp"}
        make_run(tmp_path / f"scaling-8/strong-1x{ranks}-1", {"strategy": "ddp"}, results)
    make_run(tmp_path / "baseline-5")
    make_run(tmp_path / "DISTRIBUTED-6", {"strategy": "ddp"}, {"world_size": 4, "nodes": 2})
    names = ("DISTRIBUTED-6", "baseline-5", "ladder-7", "scaling-8")
    text = report(*(tmp_path / name for name in names))
    assert re.search(
        r"## Speed-up.*\| run \| speed-up over baseline-5 \|.*DISTRIBUTED-6", text, re.S
    )
    speed_up, ladder = (
        text.split(f"## {name}\n")[1].split("\n## ")[0] for name in ("Speed-up", "Ladder")
    )
    assert "2-tf32" in ladder and "baseline-5" not in ladder and "2-tf32" not in speed_up
    assert "| strong | 1x2 |" in text.split("## Scaling\n")[1]
    assert "## Strategies" not in text and "## Seeds" not in text


# Charts


def test_charts_hold_only_what_mermaid_reads(tmp_path):
    run = make_run(tmp_path / 'odd "name"; [1]')
    for chart in ("runs", "ladder", "phases", "tokens"):
        lines = report("--chart", chart, run).splitlines()
        assert lines[0] == "```mermaid" and lines[-1] == "```" and lines[1].startswith("%%{init")
        for line in lines[2:-1]:
            assert not re.search(r"\de[+-]|nan|None|;", line) and line.count('"') in (0, 2)
    text = report("--chart", "tokens", run)
    assert 'x-axis "step" 1 --> 60' in text and text.count("    line [6144, 6144") == 1


# Traces


def test_trace_of_a_cpu(tmp_path):
    run = make_run(tmp_path / "run")
    write_trace(run, 0, cpu_step(5, 0) + cpu_step(6, 10))
    write_trace(run, 1, cpu_step(5, 0) + cpu_step(6, 10))
    text = report("--table", "trace", run)
    assert shares(text) == [10.0, 67.5, 17.5, 15.0, 25.0]
    assert "What the CPU did in 2 profiled steps" in text
    assert (
        "| `aten::mm` | 35.0 % | 3.50 | 3.50 |" in text
        and "| `aten::linear` | 10.0 % | 1.00 | 1.00 |" in text
    )
    assert "c10d::allreduce_" not in text
    assert "| 0 | 1.50 | ProfilerStep#5 | data | Python, no operator 1.50 ms |" in text.replace(
        "\r", ""
    )
    assert "| run, rank 1 (trace) | 1.00 ms, 10.0 % | 3.00 ms, 30.0 %" in report(
        "--table", "phases", run
    )


def test_trace_of_a_gpu(tmp_path):
    run = make_run(tmp_path / "run")
    write_trace(run, 0, cuda_steps())
    text = report("--table", "trace", run)
    assert shares(text) == [8.0, 75.0, 12.5, 12.5, 25.0]
    assert "| `aten::addmm` | 37.5 % | 3.00 |" in text and "`triton_red_fused_gelu_3`" in text
    assert "Memcpy HtoD" in text and "ampere" not in text
    assert "cudaStreamSynchronize 1.00 ms" in text and "after the steps" in text
    assert "| 5.00 ms, 62.5 % |" in report("--table", "phases", make_bare(run))


def make_bare(run):
    """The run without phases of its own, so that the trace's are shown."""
    path = run / "timings.json"
    path.write_text("{}")
    return run


def test_newest_trace_of_a_resumed_run(tmp_path):
    run = make_run(tmp_path / "run")
    write_trace(run, 0, cpu_step(1, 0), stamp=999)
    write_trace(run, 0, cpu_step(5, 0) + cpu_step(6, 10), stamp=1000)
    assert "2 profiled steps" in report("--table", "trace", run)


def test_trace_that_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.profiler import (
        ProfilerActivity,
        profile,
        record_function,
        schedule,
        tensorboard_trace_handler,
    )

    run = make_run(tmp_path / "run")
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    write = tensorboard_trace_handler(str(run / "tensorboard"), "rank0", use_gzip=True)
    plan = schedule(wait=0, warmup=1, active=3, repeat=1)
    with profile(
        activities=[ProfilerActivity.CPU], schedule=plan, on_trace_ready=write
    ) as profiler:
        for _ in range(4):
            with record_function("data"):
                x = torch.randn(256, 64)
            with record_function("forward"):
                loss = model(x).square().mean()
            with record_function("backward"):
                loss.backward()
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            profiler.step()
    text = report("--table", "trace", run)
    milliseconds, computing, exposed, idle, communication = shares(text)
    assert "3 profiled steps" in text and "`aten::addmm`" in text
    assert 0 < computing <= 100 and exposed == communication == 0
    assert abs(computing + idle - 100) < 0.2
    own = [
        float(v) for v in re.findall(r"^\| `.*` \| [\d.]+ % \| ([\d.]+) \|$", text, re.MULTILINE)
    ]
    assert len(own) == 10 and sum(own) <= milliseconds * computing / 100 + 0.01
    make_bare(run)
    phases = report("--table", "phases", run)
    assert re.search(r"\| run \| data \| forward \| backward \| optimizer \|", phases)
    assert "| run, rank 0 (trace) |" in phases


# What train.py asks for


@pytest.fixture(scope="module")
def module():
    specification = importlib.util.spec_from_file_location("report", REPORT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_environment():
    began = time.perf_counter()
    told = json.loads(report("--environment"))
    assert told["hosts"] and told["devices"] and told["cores"] >= 1 and told["gpu"] is not None
    assert told["commit"] is None or re.fullmatch("[0-9a-f]{40}", told["commit"])
    assert told["python"] and {"torch", "transformers", "cuda", "datasets", "numpy"} <= set(told)
    assert time.perf_counter() - began < 5  # 0.2 s where the machine is free


def test_environment_of_gpus(module, tmp_path, monkeypatch):
    """Of the node's three GPUs the two that the job may use, in its order."""
    rows = [
        f"{n}, GPU-{n}a, {A100}, 535.1, 250.00 W, 1410 MHz, 1410 MHz, 1215 MHz, 60" for n in "012"
    ]
    all_of_it = "\n".join(f"{row}, 0x000000000000000{4 * n}" for n, row in enumerate(rows))
    rows = "\n".join(rows)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{all_of_it}'")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for visible in ("2,0", "GPU-2,GPU-0a"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = module.machine()
        assert found["devices"] == [A100, A100] and len(found["gpu"]) == 2
        assert found["gpu"][0]["throttled by"] == "hardware slowdown"
        assert found["gpu"][1]["throttled by"] == "nothing"
        assert found["gpu"][0]["power.limit"] == "250.00 W"
    told = f"case $1 in *throttle*) exit 2 ;; *) echo '{rows}' ;; esac"  # a driver without it
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{told}")
    found = module.machine()
    assert found["devices"] == [A100, A100]
    assert {gpu["throttled by"] for gpu in found["gpu"]} == {"not known"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert module.machine()["gpu"] == []


@pytest.mark.parametrize("allocated, shared", [("64", False), ("96", True), ("?", None)])
def test_whether_others_are_on_the_node(module, tmp_path, monkeypatch, allocated, shared):
    told = f"case $* in *node*c7*) echo 'NodeName=c7 CPUAlloc={allocated} CPUTot=128' ;; esac"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{told}")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURMD_NODENAME", "c7")
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "64(x2)")
    assert module.machine()["node_shared"] is shared


def make_record(arguments=(), environment=(), **fields):
    """What train.py hands over: four steps an epoch, six steps, in intervals of 1, 2 and 3."""

    def interval(step, steps, wall, seconds, **marks):
        shares = {"data": 0.125, "forward": 0.25, "backward": 0.5, "optimizer": 0.0625}
        values = {"step": step, "steps": steps, "loss": 6.0 / step, "gradient_norm": 1.5}
        values |= {"tokens": 1000 * steps, "features": 10 * steps, "squares": 200_000 * steps}
        values |= {"learning_rate": 1e-5 * step, "wall_seconds": wall, "seconds": seconds}
        values |= {"phases": {name: share * seconds for name, share in shares.items()}}
        return values | {"memory_gib": 1.25, "warmup": False, "steady": False} | marks

    settings = {"model": "google-bert/bert-base-uncased", "device_type": "cpu", "precision": "fp32"}
    settings |= {"batching": "packed", "batch_size": 10, "epochs": 2, "sample": False, "limit": 8}
    machine = {"commit": "0" * 40, "dirty": False, "hosts": ["n1"], "devices": ["CPU x"]}
    machine |= {"cpu": "CPU x", "gpu": [], "restarts": 1, "torch": "2.13.0"}
    record = {"exact_match": 80.912, "f1": 88.345, "scorer": "own", "command": ["a.py", "b c"]}
    record |= {"prepare_seconds": 1.5, "features_cached": True, "evaluate_seconds": 2.5}
    record |= {"total_seconds": 20.0, "peak_memory_gib": 1.5, "world_size": 1, "nodes": 1}
    record |= {"step": 6, "resumed_from_steps": [1], "repeated_steps": 2, "train_features": 40}
    record |= {"train_tokens": 4000, "steps_an_epoch": 4, "parameters": 109, "layers": 2}
    record |= {"matrix_weights": 50_000, "hidden_size": 8, "operators": "aten::mm  3 ms"}
    record |= {"beside": {"checkpoint": 1.5, "profile": 0.75, "log": 0.0}}
    record |= {"tokens_per_step": [1000] * 6, "computed_per_step": [1250] * 6}
    record["intervals"] = [
        interval(1, 1, 5.0, 4.0, warmup=True),
        interval(3, 2, 3.0, 2.0, steady=True),
        interval(6, 3, 7.0, 3.0, steady=True),
    ]
    return (
        record
        | {"arguments": settings | dict(arguments), "environment": machine | dict(environment)}
        | fields
    )


def finish(folder, record, code=0):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(REPORT), "--finish", str(folder)]
    text = record if isinstance(record, str) else json.dumps(record)
    done = subprocess.run(command, check=False, input=text, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_figures_derived(module):
    results, timings = module.derive(make_record())
    assert results["tokens_per_second"] == 1000 and results["features_per_second"] == 10
    assert results["steady_epoch_seconds"] == 4 and results["train_seconds"] == 15
    assert results["warmup_seconds"] == 4 and results["steps"] == 6
    assert results["epoch_seconds"] == pytest.approx([5 + 3 + 7 / 3, 2 * 7 / 3])
    assert results["padding_share"] == pytest.approx(0.2)
    flops = 6 * 50_000 * 1000 + 12 * 2 * 8 * 200_000  # a second: five steps in five seconds
    assert results["flops_per_second"] == flops and results["model_flops_utilization"] is None
    assert results["restarts"] == 1 and results["paper"] == {"exact_match": 80.8, "f1": 88.5}
    assert results["command"] == "a.py 'b c'" and results["finished_at"][:2] == "20"
    assert not {"intervals", "tokens_per_step", "operators", "all_reduce"} & set(results)
    assert timings["phases"]["backward"] == {"seconds": 2.5, "share": 0.5}
    assert timings["phases"]["checkpoint"] == {"seconds": 1.5, "share": 0.1}
    assert timings["tokens_per_step"] == [[1000, 1250]] * 6 and "ranks" not in timings
    names = {"step", "loss", "learning_rate", "gradient_norm", "seconds", "tokens", "steady"}
    assert [set(one) for one in timings["intervals"]] == [names] * 3


@pytest.mark.parametrize("lives", [[], [26]])
def test_a_resumed_run_says_which_seconds_are_of_its_last_start(module, tmp_path, lives):
    folder = make_run(tmp_path / "run", results={"resumed_from_steps": lives})
    run = module.load_run(folder, json.loads((folder / "results.json").read_text()))
    assert ("(all of the last start)" in module.block(run)) == bool(lives)


def test_utilization_of_gpus(module):
    """Two ranks: each computed half of it, and each device has its own peak."""

    def of(name, precision):
        arguments = {"device_type": "cuda", "precision": precision}
        record = make_record(arguments, {"devices": [name]}, world_size=2)
        results, _ = module.derive(record)
        assert "gpu_before" in results["environment"] and "gpu_after" in results["environment"]
        return results["model_flops_utilization"]

    flops = 6 * 50_000 * 1000 + 12 * 2 * 8 * 200_000
    for name, precision, peak in (
        (A100, "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA L40S", "fp32", 91.6e12),
        ("NVIDIA L4", "bf16", 121e12),
    ):
        assert of(name, precision) == pytest.approx(flops / 2 / peak, rel=1e-12)
    for name in ("Tesla V100-SXM2-16GB", "NVIDIA L40", "CPU x"):  # a slice of a GPU has no name
        assert of(name, "bf16") is None


def test_figures_of_odd_runs(module):
    """Nothing steady; nothing trained; phases that could not be measured; figures of the ranks."""
    record = make_record(world_size=4, phases_override={"exposed_communication": None})
    record |= {"all_reduce": {"link": "NET/IB"}, "ranks": {"slowest": {"tokens": 1}}}
    record["tokens_per_step"] = record["computed_per_step"] = [1] * 300
    for one in record["intervals"]:
        one["steady"] = False
    results, timings = module.derive(record)
    assert results["tokens_per_second"] is None and results["steady_epoch_seconds"] is None
    assert timings["phases"]["backward"] == {"seconds": 4.5, "share": 0.5}
    assert timings["phases"]["exposed_communication"] == {"seconds": None, "share": None}
    assert results["all_reduce"] == {"link": "NET/IB"} and timings["ranks"] == record["ranks"]
    assert len(timings["tokens_per_step"]) == 200
    record = make_record(step=0, intervals=[], operators="")
    for name in ("steps_an_epoch", "tokens_per_step", "computed_per_step"):
        del record[name]
    results, timings = module.derive(record)
    assert results["train_seconds"] == 0 and results["epoch_seconds"] == []
    assert results["padding_share"] is None and timings["intervals"] == []
    assert results["exact_match"] == 80.912


def test_finish(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    run.mkdir()
    for rank in range(4):
        write_trace(run, rank, cpu_step(1, 0) + cpu_step(2, 10))
    (run / "tensorboard" / "events.out.tfevents.1.of.an.end.that.failed").write_bytes(b"")
    text = finish(run, make_record())
    for part in ("80.91, 88.34 (own scorer)", "1,000 real tokens/s", "fp32, packed"):
        assert part in text
    assert "unusual" not in text and "cased:" not in text
    assert {path.name for path in run.iterdir()} == {"results.json", "timings.json", "tensorboard"}
    assert "| run | 80.91 | 88.34 |" in report("--table", "answers", run)
    seen = EventAccumulator(str(run / "tensorboard")).Reload()
    assert "one profiled step" in seen.Tags()["images"]
    tags = {"result/f1", "result/train_seconds", "training/loss", "training/learning_rate"}
    tags |= {"training/gradient_norm", "speed/tokens_per_second", "speed/peak_memory_gib"}
    assert tags | {"phases/data", "phases/backward"} <= set(seen.Tags()["scalars"])
    points = [(one.step, one.value) for one in seen.Scalars("phases/backward")]
    assert points == [(1, 0.5), (3, 0.5), (6, 0.5)]
    texts = {tag.split("/")[0] for tag in seen.Tags()["tensors"]}
    assert {
        "environment",
        "times",
        "phases",
        "operators",
        "traces",
        "custom_scalars__config__",
    } <= texts


def test_exposed_communication_from_the_traces(tmp_path):
    """Where train.py cannot measure it (fsdp) the traces tell; without them it is null."""
    pytest.importorskip("torch")
    record = make_record(world_size=2, phases_override={"exposed_communication": None})
    finish(tmp_path / "without", record)
    for rank in range(2):
        (tmp_path / "run").mkdir(exist_ok=True)
        write_trace(tmp_path / "run", rank, cpu_step(1, 0) + cpu_step(2, 10))
    assert "exposed communication 17.5 %" in finish(tmp_path / "run", record)
    for name, seconds, share in (("without", None, None), ("run", 5 * 0.175, 0.175)):
        phases = json.loads((tmp_path / name / "timings.json").read_text())["phases"]
        phase = phases["exposed_communication"]
        assert phase == {"seconds": pytest.approx(seconds), "share": pytest.approx(share)}


def test_time_line_of_a_gpu(tmp_path, module):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    write_trace(run, 0, cuda_steps())
    [run] = module.load_runs([str(run)])
    axes = module.time_line(run).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["rank 0"]
    line = module.read_traces(run)[0][
        "line"
    ]  # the last step began at 3 ms: the first's kernels go on
    device = [[0, 4], [6, 6], [14, 1]]
    assert line["device", "device"].tolist() == list(map(pytest.approx, device))
    assert line["communication", "communication"].tolist() == [
        pytest.approx([3, 2]),
        pytest.approx([11, 2]),
    ]
    assert line["phases", "forward"].tolist() == [pytest.approx([0, 2])]


def test_block_warns_of_cased_models_and_low_answers(module):
    def block(f1=88.0, **arguments):
        record = make_record(
            {"limit": None, "max_steps": None} | arguments, f1=f1, train_features=88_524
        )
        return module.block(module.load_run(pathlib.Path("runs/one"), *module.derive(record)))

    assert "unusual" not in block() and "cased:" not in block()
    assert "F1 is under 87" in block(86.9)
    assert "F1 is under 87" not in block(50.0, limit=100) + block(50.0, model="x/minilm")
    assert "the model is cased" in block(model="google-bert/bert-base-cased/")


def test_finish_that_fails_leaves_no_results(tmp_path):
    bad = make_record()
    del bad["train_tokens"]
    wrong = make_record(f1="high")
    for record, says in (("", "JSONDecodeError"), (bad, "train_tokens"), (wrong, "not a number")):
        text = finish(tmp_path / "run", record, code=2)
        assert says in text and text.count("\n") == 1 and text.startswith("report.py: ")
        assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / "timings.json").mkdir()  # cannot be written
    text = finish(tmp_path / "run", make_record(), code=2)
    assert text.splitlines()[-1].startswith("report.py: --finish")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_bad_trace_costs_no_results(tmp_path):
    (run := tmp_path / "run").mkdir()
    write_trace(run, 0, [])
    assert "F1" in finish(run, make_record())
    assert (run / "results.json").exists()


def test_finish_killed_in_the_middle(tmp_path):
    """Killed at any time results.json is absent or whole; a later end of the run goes through."""
    whole = make_record(command=["x" * 1000] * 20_000)  # long enough to be hit while it is written
    for wait in (0.2, 1.0, 2.0, 3.0, 4.0):
        folder = tmp_path / str(wait)
        folder.mkdir()
        command = [sys.executable, str(REPORT), "--finish", str(folder)]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        child.stdin.write(json.dumps(whole))
        child.stdin.close()
        time.sleep(wait)
        child.terminate()  # which it does not heed, so near the end
        child.kill()
        child.wait()
        if (folder / "results.json").exists():
            assert json.loads((folder / "results.json").read_text())["steps"] == 6
    finish(folder, make_record())
    assert json.loads((folder / "results.json").read_text())["command"] == "a.py 'b c'"


# A measurement's own table


def test_measured_table(tmp_path):
    path = tmp_path / "bench.json"
    one = {
        "title": "Against the usual way",
        "conditions": {"batch": 32, "precision": "fp32"},
        "columns": ["what", "tokens/s", "ratio"],
        "rows": [["plain | loop", 1234.5, 1.0], ["ours", 2500, None]],
        "environment": {"device": ["CPU", "CPU"], "commit": "abc", "slurm_job_id": None},
    }
    path.write_text(json.dumps([one, one]))
    text = report("--table", "bench", path)
    assert text.count("**Against the usual way**") == 2
    assert "*batch 32, precision fp32; device CPU; commit abc.*" in text
    assert "| plain \\| loop | 1,234 | 1.00 |" in text and "| ours | 2,500 | not measured |" in text
    path.write_text(json.dumps(one | {"rows": [[1, 2]]}))
    assert "each row of as many cells as columns" in report("--table", "faults", path, code=2)
    path.write_text("[3]")
    assert 'wants {"title"' in report("--table", "growth", path, code=2)
    assert "no such file" in report("--table", "seeds-paired", tmp_path / "none.json", code=2)


# Bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no results.json"),
        ("checkpoint", "not finished (it holds checkpoint.pt)"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, not an object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"f1": "high"}', "f1 is not a number"),
        ('{"arguments": []}', "arguments is not an object"),
    ],
)
def test_bad_runs(tmp_path, content, says):
    if content == "checkpoint":
        (tmp_path / "checkpoint.pt").write_bytes(b"")
    elif content:
        (tmp_path / "results.json").write_text(content)
    text = report(tmp_path, code=2)
    assert says in text and text.count("\n") == 1


def test_what_did_not_finish_is_named_and_left_out(tmp_path):
    """As `report.py runs/*` meets it: one run died, one is under way, one file is no folder."""
    make_run(tmp_path / "good")
    for name, file in (("died", ".lock"), ("under-way", "checkpoint.pt"), ("notes.md", None)):
        place = tmp_path / name if file is None else tmp_path / name / file
        place.parent.mkdir(exist_ok=True)
        place.touch()
    told, names = [], ("died", "good", "notes.md", "under-way")
    assert "good" in report(*(tmp_path / name for name in names), told=told)
    assert [line.split(": ")[1:] for line in told] == [
        [str(tmp_path / name), "no finished run, left out"] for name in names if name != "good"
    ]
    make_run(tmp_path / "ladder/1-fp32")
    (tmp_path / "ladder/2-bf16").mkdir()
    (tmp_path / "ladder/2-bf16/.lock").touch()
    told.clear()
    assert "1-fp32" in report(tmp_path / "ladder", told=told)
    assert told == [f"report.py: {tmp_path}/ladder/2-bf16: no finished run, left out"]
    text = report(tmp_path / "died", tmp_path / "under-way", code=2)
    assert "none of these is a finished run" in text


def test_bad_words(tmp_path):
    assert "no such folder" in report(tmp_path / "none", code=2)
    run = make_run(tmp_path / "run")
    for words, says in (
        ((), "no RUN: give the folder"),
        (("--table", "laddr", run), "invalid choice: 'laddr' (choose from"),
        (("--tabel", "ladder", run), "--tabel"),
        (("--chart", "pie", run), "invalid choice: 'pie'"),
    ):
        text = report(*words, code=2)
        assert says in text and text.count("\n") == 1


def test_bad_timings_and_traces(tmp_path):
    run = make_run(tmp_path / "run")
    write_trace(run, 0, [])
    assert "no ProfilerStep in it" in report(run, code=2)
    [path] = (run / "tensorboard").iterdir()
    write_trace(run, 0, cpu_step(1, 0) * 50)
    path.write_bytes(path.read_bytes()[:500])
    assert "cannot be read as a trace" in report(run, code=2)
    path.write_bytes(b"not gzip")
    text = report(run, code=2)
    assert "cannot be read as a trace" in text and text.count("\n") == 1
    path.unlink()
    (run / "timings.json").write_text('{"intervals": [3]}')
    text = report(run, code=2)
    assert "a value is not as train.py writes it" in text and text.count("\n") == 1


def test_no_value_ends_in_a_traceback(tmp_path, module):
    """Each field in turn of another kind: a table, or one line and exit code 2."""
    link = {"world_size": 2, "all_reduce": {"gigabytes_per_second": 1.5, "link": "NET/Socket"}}
    other = make_run(tmp_path / "strong-1x1-1")
    run = make_run(tmp_path / "strong-1x2-1", {"strategy": "ddp"}, link)
    names = {
        name: json.loads((run / name).read_text()) for name in ("results.json", "timings.json")
    }
    names["timings.json"]["intervals"] = names["timings.json"]["intervals"][:5]

    def places(holder):
        pairs = list(holder.items() if isinstance(holder, dict) else enumerate(holder[:4]))
        for key, value in pairs:
            yield holder, key
            if isinstance(value, (dict, list)):
                yield from places(value)

    for name, content in names.items():
        for holder, key in places(content):
            kept = holder[key]
            for odd in (None, "x", -1, 0, [], {}, True, 1e300, [1, "x"], {"x": None}):
                holder[key] = odd
                (run / name).write_text(json.dumps(content))
                try:
                    runs = module.load_runs([str(other), str(run)])
                    for make in (module.report, *module.TABLES.values(), *module.CHARTS.values()):
                        assert isinstance(make(runs), str)
                except SystemExit as end:
                    assert end.code == 2
                except module.ODD:  # main says it in one line; what is absent is not odd
                    assert odd is not None or name != "results.json"
            holder[key] = kept
        (run / name).write_text(json.dumps(content))


def test_patterns_and_folders_of_runs(tmp_path):
    for n in (1, 2, 10):
        make_run(tmp_path / "runs" / f"r{n}")
    for words in ([tmp_path / "runs"], [tmp_path / "runs" / "r*"]):
        rows = re.findall(r"^\| (r\d+) \|", report("--table", "memory", *words), re.MULTILINE)
        assert rows == ["r1", "r2", "r10"]
    (tmp_path / "runs" / "r3").mkdir()
    (tmp_path / "runs" / "r3" / "checkpoint.pt").touch()
    assert "r3" not in report("--table", "memory", tmp_path / "runs")
    shutil.copytree(tmp_path / "runs" / "r1", tmp_path / "other" / "r1")
    assert "| other/r1 |" in report("--table", "runs", tmp_path / "runs" / "r1", tmp_path / "other")

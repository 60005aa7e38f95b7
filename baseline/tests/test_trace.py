"""trace.py on traces made here, whose shares are known, and on one that torch.profiler writes."""

import random
import re
import time

import pytest
from runs import (
    CPU,
    call,
    change,
    cpu_step,
    event,
    gpu_steps,
    load_script,
    make_run,
    refusal,
    report,
    table_rows,
    write_trace,
)


def cpu_run(folder, **timings):
    return make_run(folder, environment=CPU, timings=timings)


def tables(*runs):
    return call("trace.py", *runs)[0]


def parts_of_rank_0(text):
    """ms a step, computing, exposed communication, idle, communication in all."""
    [row] = [row for row in table_rows(text) if row[0] == "0" and "%" in row[2]]
    return [float(cell.removesuffix(" %")) for cell in row[1:]]


def test_trace_of_a_cpu(tmp_path):
    run = cpu_run(tmp_path / "run")
    write_trace(run, 0, cpu_step(5, 0) + cpu_step(6, 10))
    write_trace(run, 1, cpu_step(5, 0) + cpu_step(6, 10))
    text = tables(run)
    rows = table_rows(text)
    assert parts_of_rank_0(text) == [10.0, 67.5, 17.5, 15.0, 25.0]
    assert "What the CPU did in 2 profiled steps" in text
    assert ["`aten::mm`", "35.0 %", "3.50", "3.50"] in rows
    assert ["`aten::linear`", "10.0 %", "1.00", "1.00"] in rows
    assert "c10d::allreduce_" not in text
    assert ["0", "1.50", "ProfilerStep#5", "data", "Python, no operator 1.50 ms"] in rows
    assert text == report("--table", "trace", run)


def test_trace_of_a_gpu(tmp_path):
    run = make_run(tmp_path / "run", timings={"phases": {}})
    write_trace(run, 0, gpu_steps())
    text = tables(run)
    assert parts_of_rank_0(text) == [8.0, 75.0, 12.5, 12.5, 25.0]
    assert "What the GPU did in 2 profiled steps" in text
    # A kernel goes by its operator's name, a compiled one by its own.
    assert ["`aten::addmm`", "37.5 %", "3.00"] in table_rows(text)
    assert "`triton_red_fused_gelu_3`" in text and "Memcpy HtoD" in text and "ampere" not in text
    assert "cudaStreamSynchronize 1.00 ms" in text and "after the steps" in text
    # A phase on the GPU is the kernels that were launched in it.
    phases = table_rows(report("--table", "phases", run))
    assert phases == [["run, rank 0 (trace)", "5.00 ms, 62.5 %"]]


def test_more_than_four_ranks_share_columns(tmp_path):
    run = cpu_run(tmp_path / "run")
    for rank in range(5):
        write_trace(run, rank, cpu_step(5, 0))
    text = tables(run)
    assert "| operator | share of the step | least, ms | mean, ms | most, ms |" in text
    assert ["`aten::mm`", "35.0 %", "3.50", "3.50", "3.50"] in table_rows(text)


def test_gpu_trace_without_kernels_is_not_told_as_the_gpus(tmp_path):
    """No permission for CUPTI: the profiler records the host alone."""
    run = make_run(tmp_path / "run", {"device_type": "cuda"}, timings={"phases": {}})
    write_trace(run, 0, cpu_step(5, 0))
    text = tables(run)
    assert "no GPU kernels were recorded in the trace of rank 0" in text and "CUPTI" in text
    assert "aten::mm" not in text and "What the" not in text
    assert "rank 0 (trace)" not in report("--table", "phases", run)
    assert "no GPU kernels" in report(run)


def test_phases_of_each_rank(tmp_path):
    run = cpu_run(tmp_path / "run")
    for rank in (0, 1):
        write_trace(run, rank, cpu_step(5, 0) + cpu_step(6, 10))
    rows = table_rows(report("--table", "phases", run))
    assert [row[0] for row in rows] == ["run", "run, rank 0 (trace)", "run, rank 1 (trace)"]
    assert rows[2][1:3] == ["1.00 ms, 10.0 %", "3.00 ms, 30.0 %"]


def test_exposed_communication_from_the_traces(tmp_path):
    """Of fsdp, train.py cannot tell: null in timings.json."""
    run = make_run(
        tmp_path / "run",
        {"strategy": "fsdp"},
        {"world_size": 2, "nodes": 1},
        {"phases": {"data": {"seconds": 1.0, "share": 0.1}, "exposed_communication": None}},
        CPU,
    )
    assert table_rows(report("--table", "phases", run))[0][-1] == "not measured"
    assert table_rows(report("--table", "strategies", run))[0][6] == "not measured"
    write_trace(run, 0, cpu_step(5, 0))
    write_trace(run, 1, cpu_step(5, 0))
    assert "17.5 %" in table_rows(report("--table", "phases", run))[0][-1]
    assert table_rows(report("--table", "strategies", run))[0][6] == "17.5 %"


def test_the_last_trace_of_a_resumed_run_counts(tmp_path):
    run = cpu_run(tmp_path / "run")
    write_trace(run, 0, cpu_step(1, 0), stamp=999)
    write_trace(run, 0, cpu_step(5, 0) + cpu_step(6, 10), stamp=1000)
    assert "2 profiled steps" in tables(run)


def random_trace(draw):
    """Nested operators on two threads and gloo on a third, at whole milliseconds of 60."""
    events = [event("user_annotation", f"ProfilerStep#{n}", 20 * n, 20) for n in range(3)]
    operators = []

    def fill(thread, begin, end, depth):
        while begin < end:
            begin += draw.randint(0, 4)
            length = draw.randint(1, 12)
            if begin + length > end:
                break
            name = draw.choice(["aten::mm", "aten::add", "c10d::allreduce_"])
            operators.append((thread, begin, begin + length, name, depth))
            events.append(event("cpu_op", name, begin, length, thread))
            if depth < 3:
                fill(thread, begin, begin + length, depth + 1)
            begin += length

    fill(1, 0, 60, 0)
    fill(2, 0, 60, 0)
    talks = []
    for _ in range(draw.randint(0, 4)):
        begin = draw.randint(0, 50)
        talks.append((begin, begin + draw.randint(1, 10)))
        events.append(event("user_annotation", "gloo:all_reduce", begin, talks[-1][1] - begin, 9))
    return events, operators, talks


def count_by_milliseconds(operators, talks):
    """The slow way: for each millisecond, what is innermost on each thread, and does gloo run?"""
    computing = exposed = 0
    for ms in range(60):
        computes = False
        for thread in (1, 2):
            here = [one for one in operators if one[0] == thread and one[1] <= ms < one[2]]
            innermost = max(here, key=lambda one: one[4], default=None)
            if innermost and not innermost[3].startswith("c10d"):
                computes = True
        talking = any(begin <= ms < end for begin, end in talks)
        computing += computes
        exposed += talking and not computes
    return computing / 60, exposed / 60


def test_shares_equal_a_count_by_milliseconds(tmp_path):
    folders = []
    expected = []
    for seed in range(40):
        run = cpu_run(tmp_path / f"run-{seed}")
        events, operators, talks = random_trace(random.Random(seed))
        write_trace(run, 0, events)
        folders.append(run)
        expected.append(count_by_milliseconds(operators, talks))
    found = re.findall(r"^\| 0 \| 20\.0 \| (\S+) % \| (\S+) % \|", tables(*folders), re.MULTILINE)
    for (computing, exposed), shares in zip(found, expected, strict=True):
        assert abs(float(computing) / 100 - shares[0]) < 0.0006
        assert abs(float(exposed) / 100 - shares[1]) < 0.0006


@pytest.mark.slow
def test_a_large_trace_takes_seconds(tmp_path):
    run = cpu_run(tmp_path / "run")
    events = [event for number in range(20_000) for event in cpu_step(number, 10 * number)]
    write_trace(run, 0, events)
    began = time.perf_counter()
    assert "What the CPU did in 20000 profiled steps" in tables(run)
    assert time.perf_counter() - began < 30  # 3 s where the machine is free


def test_trace_that_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.profiler import ProfilerActivity, profile, record_function, schedule
    from torch.profiler import tensorboard_trace_handler

    run = cpu_run(tmp_path / "run", phases={})
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=0, warmup=1, active=3, repeat=1),
        on_trace_ready=tensorboard_trace_handler(run / "tensorboard", "rank0", use_gzip=True),
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
    text = tables(run)
    milliseconds, computing, exposed, idle, communication = parts_of_rank_0(text)
    assert "3 profiled steps" in text and "`aten::addmm`" in text
    assert 0 < computing <= 100 and exposed == communication == 0
    assert abs(computing + idle - 100) < 0.2
    own_times = [float(row[2]) for row in table_rows(text) if row[0].startswith("`")]
    assert len(own_times) == 10
    # Ten numbers of two digits, and a share of one.
    assert sum(own_times) <= milliseconds * computing / 100 * 1.01 + 0.1
    phases = report("--table", "phases", run)
    assert "| run | data | forward | backward | optimizer |" in phases
    assert "| run, rank 0 (trace) |" in phases


# Bad input: one line, exit code 2


def test_traces_that_cannot_be_read(tmp_path):
    run = cpu_run(tmp_path / "run")
    path = write_trace(run, 0, [])
    assert "no ProfilerStep in it" in refusal(run)
    write_trace(run, 0, cpu_step(1, 0) * 50)
    path.write_bytes(path.read_bytes()[:500])
    assert f"{path}: cannot be read as a trace" in refusal(run, script="trace.py")
    path.write_bytes(b"not gzip")
    assert "delete it, or run again" in refusal(run)


def test_bad_words(tmp_path):
    assert "no RUN: give the folder" in refusal(script="trace.py")
    assert "no such folder" in refusal(tmp_path / "none", script="trace.py")
    assert "--tensorbord" in refusal("--tensorbord", tmp_path, script="trace.py")
    assert "no trace in its tensorboard folder" in tables(cpu_run(tmp_path / "run"))


# TensorBoard

TEXTS = ("environment", "times", "throughput", "answers", "phases", "traces")


def board_of(run):
    """What TensorBoard reads: {tag: [text]}, {tag: [image]} and its scalars."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    texts = {}
    for tag in board.Tags()["tensors"]:
        values = [one.tensor_proto.string_val[0].decode() for one in board.Tensors(tag)]
        texts[tag.removesuffix("/text_summary")] = values
    images = {tag: board.Images(tag) for tag in board.Tags()["images"]}
    return texts, images, board.Tags()["scalars"]


def test_tensorboard_gets_tables_and_a_time_line_once(tmp_path):
    pytest.importorskip("matplotlib")
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    run = cpu_run(tmp_path / "run")
    write_trace(run, 0, cpu_step(5, 0) + cpu_step(6, 10))
    write_trace(run, 1, cpu_step(5, 0) + cpu_step(6, 10))
    with tensorboard.SummaryWriter(run / "tensorboard") as writer:
        writer.add_scalar("training/loss", 1.0, 1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for _ in range(2):
        call("trace.py", "--tensorboard", run)
    texts, images, scalars = board_of(run)
    assert set(texts) == set(TEXTS) and scalars == ["training/loss"]
    assert all(len(values) == 1 for values in texts.values())
    assert "`aten::mm`" in texts["traces"][0] and "80.91" in texts["answers"][0]
    [image] = images["one profiled step"]
    assert (image.width, image.height) >= (700, 200)
    # Two files of events: the training's, which is as it was, and this script's last.
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(run.rglob("*"))) == len(before) + 2


@pytest.mark.slow
def test_tensorboard_without_a_trace(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    run = cpu_run(tmp_path / "run")
    call("trace.py", "--tensorboard", run)
    texts, images, _ = board_of(run)
    assert "no trace in its tensorboard folder" in texts["traces"][0] and not images


@pytest.mark.slow
def test_what_goes_wrong_with_tensorboard_harms_no_run(tmp_path):
    run = cpu_run(tmp_path / "run")
    path = write_trace(run, 0, cpu_step(5, 0))
    path.write_bytes(b"not gzip")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert "cannot be read as a trace" in refusal("--tensorboard", run, script="trace.py")
    path.unlink()
    change(run / "timings.json", lambda times: times.update(intervals=[3]))
    assert "AttributeError" in refusal("--tensorboard", run, script="trace.py")
    (run / "results.json").unlink()
    assert "no results.json in it" in refusal("--tensorboard", run, script="trace.py")
    assert {file for file in run.rglob("*") if file.is_file()} < set(before)


def test_time_line_of_a_gpu(tmp_path):
    """The last step begins on the host at 3 ms, while the GPU is at the first step's kernels."""
    run = make_run(tmp_path / "run")
    write_trace(run, 0, gpu_steps())
    [one] = load_script("trace.py").read_traces(run).values()
    bars = {(row, colour): pairs for row, colour, pairs in one["time line"]}
    assert bars["work", "GPU"] == [pytest.approx(bar) for bar in ((0, 4), (6, 6), (14, 1))]
    assert bars["communication", "communication"] == [pytest.approx((3, 2)), pytest.approx((11, 2))]
    assert bars["phases", "forward"] == [pytest.approx((0, 2))]

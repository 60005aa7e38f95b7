"""report.py on runs made here, field by field as train.py and the launchers leave them."""

import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from nursery import in_step
from runs import (
    A100,
    BASELINE,
    CPU,
    call,
    change,
    cpu_step,
    load_script,
    make_run,
    refusal,
    report,
    table_rows,
    write_trace,
)
from torch.utils.tensorboard import SummaryWriter

# The full report


def test_full_report_of_one_run(tmp_path):
    text = report(make_run(tmp_path / "baseline-7"))
    for part in ("# Report", "## Environment", "## Times", "## Answers", "## Phases", "```mermaid"):
        assert part in text
    assert "| baseline-7 | 80.91 | 88.34 | 80.8 / 88.5 | evaluate |" in text
    assert "| command | `sbatch baseline/run.sbatch` |" in text and "| hosts | node-1 |" in text
    # 5,500 tokens a step at 10,000 a second, 30 % of it.
    assert re.search(r"\| 16\d\.\d ms, 30\.0 % \|", text)
    for part in ("## Traces", "## Evaluations", "Warning", str(tmp_path)):
        assert part not in text


def test_every_table_states_its_conditions(tmp_path):
    text = report(make_run(tmp_path / "one"), make_run(tmp_path / "two"))
    _, *captions = re.findall(r"^\*(.*)\*$", text, re.MULTILINE)
    assert len(captions) >= 5
    for caption in captions:
        for part in (A100, "bf16", "batch 32", "bert-base-uncased", "SQuAD v1.1", "0123456789"):
            assert part in caption
        assert "2026-11-24; 2 runs." in caption


def test_one_command_over_all_that_a_course_left(tmp_path):
    """Ladder, scaling, strategies: each its own table, whatever else lies beside it."""
    for precision in ("1-fp32", "2-tf32"):
        make_run(tmp_path / "ladder-7" / precision, {"precision": precision[2:]})
    for ranks in (1, 2):
        folder = tmp_path / f"scaling-8/strong-1x{ranks}-1"
        make_run(folder, {"strategy": "ddp"}, {"world_size": ranks, "nodes": 1})
    make_run(tmp_path / "baseline-5")
    make_run(tmp_path / "DISTRIBUTED-6", {"strategy": "ddp"}, {"world_size": 4, "nodes": 2})
    names = ("DISTRIBUTED-6", "baseline-5", "ladder-7", "scaling-8")
    text = report(*(tmp_path / name for name in names))
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert "| run | speed-up over baseline-5 |" in sections["Speed-up"]
    assert "| DISTRIBUTED-6 |" in sections["Speed-up"] and "2-tf32" not in sections["Speed-up"]
    assert "2-tf32" in sections["Ladder"] and "baseline-5" not in sections["Ladder"]
    assert "| strong | 1x2 |" in sections["Scaling"]
    assert not {"Strategies", "Seeds"} & sections.keys()


def test_absent_and_null_figures_are_not_invented(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "results.json").write_text('{"f1": null, "exact_match": NaN}')
    text = report(folder, folder)
    assert "| bare | not measured | not measured | not comparable" in text
    assert not re.search(r"\b(None|nan|null)\b", text)
    for name in ("runs", "seeds", "ladder", "scaling", "strategies", "phases", "trace", "memory"):
        assert "not measured" in report("--table", name, folder)


def test_report_into_head_ends_quietly(tmp_path):
    run = make_run(tmp_path / "run")
    command = f'"{sys.executable}" "{BASELINE / "report.py"}" "$@" | head -n 1'
    # Far more than a pipe holds, so that it is still writing when head has left.
    words = ["bash", "-c", command, "bash", "--table", "runs", *[str(run / "..")] * 2]
    for number in range(600):
        shutil.copytree(run, tmp_path / f"a run with a long name for a long table {number}")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("*One row per run.") and done.stderr == ""


# Answers


@pytest.mark.parametrize(
    ("arguments", "results", "reason"),
    [
        ({"limit": 100}, {}, "other data (SQuAD v1.1, first 100"),
        ({"sample": True}, {}, "other data (the sample"),
        ({"train_file": "squad/train.json"}, {"train_features": 1404}, "other data (train.json"),
        ({"model": "google/electra-base"}, {}, "another model (electra-base)"),
        ({"max_steps": 5}, {}, "not trained to the end"),
    ],
)
def test_paper_stands_only_beside_full_runs_of_bert_base(tmp_path, arguments, results, reason):
    text = report("--table", "answers", make_run(tmp_path / "run", arguments, results))
    assert "not comparable: " + reason in text and "80.8 / 88.5" not in text


def test_cased_models_and_low_answers_are_warned_of(tmp_path):
    def answers(name, f1=88.0, **arguments):
        return report("--table", "answers", make_run(tmp_path / name, arguments, {"f1": f1}))

    assert "unusual" not in answers("usual") and "cased," not in answers("usual-2")
    assert "low: F1 is under 87" in answers("low", 86.9)
    assert "F1 is under 87" not in answers("part", 50.0, limit=100)
    assert "F1 is under 87" not in answers("other", 50.0, model="x/minilm")
    assert "cased: the model is cased" in answers("cased", model="google-bert/bert-base-cased/")


def test_evaluations(tmp_path):
    each = [
        {"step": 2767, "epoch": 1, "train_seconds": 1501.5, "exact_match": 78.0, "f1": 86.125},
        {"step": 8300, "epoch": 3, "train_seconds": 4506.0, "exact_match": 80.9, "f1": None},
    ]
    run = make_run(tmp_path / "run", results={"evaluations": each})
    once = make_run(tmp_path / "once", results={"evaluations": each[:1]})
    rows = table_rows(report("--table", "evaluations", run))
    assert rows == [
        ["run", "2,767", "1", "1,502", "78.00", "86.12"],
        ["run", "8,300", "3", "4,506", "80.90", "not measured"],
    ]
    assert "## Evaluations" in report(run) and "## Evaluations" not in report(once)


# Time to F1


def evaluations(*pairs):
    """Evaluations as train.py leaves them, of pairs of training seconds and F1."""
    return [
        {"step": 10 * n, "epoch": n, "train_seconds": seconds, "exact_match": 70.0, "f1": f1}
        for n, (seconds, f1) in enumerate(pairs, 1)
    ]


def time_to_f1(tmp_path, name, scores, **results):
    run = make_run(tmp_path / name, results={"evaluations": evaluations(*scores), **results})
    (row,) = table_rows(report("--table", "time-to-f1", run))
    return row[4:]


def test_time_to_f1_is_that_of_the_first_evaluation_that_reached_it(tmp_path):
    """88 is reached and lost again; a resumed run's seconds are those of all its lives."""
    scores = [(100.0, 79.9), (200.0, 88.0), (300.0, 86.5), (400.0, None), (500.0, 87.5)]
    resumed = {"resumed_from_steps": [5, 25], "train_seconds": 500.0, "f1": 87.5}
    row = time_to_f1(tmp_path, "run", scores, **resumed)
    assert row == ["500.0", "87.50", "200.0", "200.0", "200.0"]
    text = report("--table", "time-to-f1", tmp_path / "run")
    assert "whole schedule with its final F1 is the headline" in text
    assert "once an epoch" in text and "not decayed" in text


def test_time_to_f1_where_it_is_not_known(tmp_path):
    low = time_to_f1(tmp_path, "low", [(100.0, 70.0), (200.0, 80.0)], train_seconds=200.0, f1=80.0)
    assert low == ["200.0", "80.00", "200.0", "not reached", "not reached"]
    unknown = ["4,600", "88.34", *["not measured"] * 3]
    assert time_to_f1(tmp_path, "none", []) == unknown
    assert time_to_f1(tmp_path, "nulls", [(None, 90.0), (100.0, None)]) == unknown
    # --epochs 0 scores a model that was trained before.
    only = time_to_f1(tmp_path, "only", [(0, 90.0)], train_seconds=0, f1=90.0, steps=0)
    assert only == ["not trained", "90.00", *["not trained"] * 3]
    text = report(tmp_path / "low", tmp_path / "only")
    (section,) = [part for part in text.split("\n## ") if part.startswith("Time to F1")]
    assert "| low |" in section and "| only |" not in section and "xychart" in section


def test_chart_of_f1_against_seconds(tmp_path):
    """A line keeps a score until the next evaluation, and begins at the bottom of the axis."""
    slow = make_run(
        tmp_path / "slow [1]", results={"evaluations": evaluations((300.0, 81.0), (600.0, 88.5))}
    )
    quick = make_run(tmp_path / "quick", results={"evaluations": evaluations((150.0, 75.0))})
    bare = make_run(tmp_path / "bare")
    text = report("--chart", "time-to-f1", slow, quick, bare)
    assert 'x-axis "seconds" 0 --> 630' in text and 'y-axis "F1" 70 --> 90' in text
    lines = [json.loads(line) for line in re.findall(r"^    line (.*)$", text, re.MULTILINE)]
    assert [len(line) for line in lines] == [61, 61]
    # The points are 10.5 s apart.
    assert lines[0] == [70.0] * 29 + [81.0] * 29 + [88.5] * 3
    assert lines[1] == [70.0] * 15 + [75.0] * 46
    assert text.rstrip().splitlines()[-1].startswith("blue: slow [1]; red: quick. ")
    assert report("--chart", "time-to-f1", bare) == "F1 against seconds: not measured.\n"
    many = [
        make_run(tmp_path / f"r{n}", results={"evaluations": evaluations((9.0, 80.0 + n))})
        for n in range(7)
    ]
    text = report("--chart", "time-to-f1", *many)
    assert text.count("xychart-beta") == 2 and text.count("    line [") == 7
    assert "purple: r5" in text and "blue: r6" in text


def record_table():
    """The cells of README.md's record table: its headings, then its rows."""
    text = (BASELINE.parent / "README.md").read_text(encoding="utf-8")
    lines = text.partition("\n## Time to F1\n")[2].partition("\n#")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_a_record_is_a_row_of_the_readmes_table(tmp_path):
    headings, *rows = record_table()
    assert headings == load_script("report.py").RECORD_COLUMNS
    assert len(rows) > 3 and {len(row) for row in rows} == {len(headings)}
    (line,) = report("--record", make_run(tmp_path / "a|b")).splitlines()
    assert line.startswith("| ") and line.endswith(" |")
    cells = re.split(r"(?<!\\) \| ", line.strip("| "))
    assert dict(zip(headings, cells, strict=True)) == {
        "settings": "bert-base-uncased, SQuAD v1.1, 384 tokens a window, 3 epochs, batch 32, "
        "learning rate 5e-05, bf16, packed, compiled",
        "device": f"1x1 {A100}",
        "seconds": "4,600",
        "EM": "80.91",
        "F1": "88.34",
        "commit": "0123456789",
        "files": "a\\|b",
    }


def test_records_of_other_runs(tmp_path):
    ours = BASELINE / "results/minilm"
    lines = report("--record", ours).splitlines()
    assert len(lines) == 3
    for line, folder in zip(lines, sorted(ours.iterdir())):
        assert line.endswith(f"| [{folder.name}](baseline/results/minilm/{folder.name}) |")
    odd = {"exact_match": None, "train_seconds": 0, "steps": 0}
    line = report("--record", make_run(tmp_path / "r", {"max_steps": 7, "epochs": 0}, odd))
    assert ", 7 steps, " in line and "| not trained | not measured | 88.34 |" in line
    fake = make_run(tmp_path / "fake", environment={"devices": [f"FAKE {A100}"]})
    assert "computes nothing" in refusal("--record", fake)
    (tmp_path / "empty").mkdir()
    assert "no results.json" in refusal("--record", tmp_path / "empty")


# Energy

START = datetime.datetime(2026, 11, 24, 20, 0, tzinfo=datetime.timezone.utc).timestamp()


def write_power(run, node, watts, seconds, gpus=("0",)):
    """Samples as power.sh leaves them. watts: a function of the second, counted from START."""
    lines = []
    for second in seconds:
        moment = datetime.datetime.fromtimestamp(START + second, datetime.timezone.utc)
        for gpu in gpus:
            lines.append(f"{moment:%Y/%m/%d %H:%M:%S}.000, {gpu}, {watts(second):.2f}\n")
    with open(run / f"power-{node}.csv", "a") as file:
        file.writelines(lines)


def write_events(run, ends, begins_at=0):
    """A life's events of the log intervals' ends: {step: seconds from START}."""
    with SummaryWriter(run / "tensorboard", purge_step=begins_at) as writer:
        for step, second in ends.items():
            writer.add_scalar("training/learning_rate", 1e-4, step, START + second + 0.5)
            writer.add_scalar("training/loss", 1.0, step, START + second)


def make_powered_run(folder, seconds, arguments=(), **results):
    """A run with an interval of 1,000 tokens for each of these seconds, at steps 10, 20 and so on."""
    intervals = [
        {"step": 10 * n, "loss": 1.0, "seconds": time, "tokens": 1000, "steady": True}
        for n, time in enumerate(seconds, 1)
    ]
    return make_run(folder, arguments, results, {"intervals": intervals})


def energy_of(run):
    """Joules, real tokens per joule, and the sampled share."""
    (row,) = table_rows(report("--table", "energy", run))
    return row[3:6]


def test_energy_is_the_power_over_the_training(tmp_path):
    """By hand: 100 W before and after, 300 W from second 10 to 30, and between them an evaluation."""
    run = make_powered_run(tmp_path / "run", [10.0, 5.0], train_seconds=15.0)
    write_power(run, 0, lambda second: 300 if 10 <= second <= 30 else 100, range(60))
    assert energy_of(run)[0] == "not measured", "nothing tells when it trained"
    write_events(run, {10: 20, 20: 30})
    assert energy_of(run) == ["4,500", "0.444", "100.0 %"]
    assert "## Energy" in report(run)
    # Of the interval's last 2.5 s: half a second at 300 W, then down to 100 in one, then 100.
    shutil.rmtree(run / "tensorboard")
    write_events(run, {10: 20, 20: 32.5})
    assert energy_of(run)[0] == number_of(10 * 300 + 2.5 * 300 + 200 + 1.5 * 100)


def number_of(value):
    return load_script("report.py").number(float(value))


def test_energy_of_all_nodes_and_gpus(tmp_path):
    shape = {"world_size": 4, "nodes": 2}
    run = make_powered_run(tmp_path / "run", [10.0], {"strategy": "ddp"}, **shape)
    write_events(run, {10: 20})
    write_power(run, 0, lambda second: 200, range(30), gpus=("0", "1"))
    assert energy_of(run) == ["not measured", "not measured", "50.0 %"]
    write_power(run, 1, lambda second: 100, range(30), gpus=("0", "1"))
    assert energy_of(run) == ["6,000", "0.167", "100.0 %"]
    write_power(run, 1, lambda second: 100, range(30), gpus=("2",))
    assert energy_of(run) == ["not measured", "not measured", "125.0 %"]
    one = make_powered_run(tmp_path / "dp", [10.0], {"strategy": "dp"})
    write_events(one, {10: 20})
    write_power(one, 0, lambda second: 200, range(30), gpus=("0", "1"))
    assert energy_of(one) == ["4,000", "0.25", "100.0 %"]


def test_energy_over_several_lives(tmp_path):
    """A life is killed at second 35: steps 30 and 40 are lost. The next one goes on from step 20, an
    hour later, and writes that step's event again."""
    run = make_powered_run(tmp_path / "run", [10.0, 10.0, 10.0], train_seconds=30.0)
    write_events(run, {10: 10, 20: 20, 30: 30, 40: 34})
    write_events(run, {20: 3600, 30: 3620}, begins_at=20)
    write_power(run, 0, lambda second: 100, range(-5, 35))
    with open(run / "power-0.csv", "a") as file:
        file.write("2026/11/2")  # torn by the kill
    write_power(run, 0, lambda second: 200, range(3590, 3630))
    assert energy_of(run) == ["4,000", "0.75", "100.0 %"]


def test_energy_of_odd_samples(tmp_path):
    run = make_powered_run(tmp_path / "run", [100.0])
    write_events(run, {10: 100})
    odd = "No devices were found\n2026/11/24 20:00:01.000, 0, [N/A]\n[N/A], 0, 30\n\n,,,\n"
    odd += "2026/99/99 20:00:01.000, 0, 1.0\n2026/11/24 20:00:01.000, 0, nan\n"
    (run / "power-0.csv").write_text(odd)
    (run / "power-1.csv").write_bytes(b"\xff\xfe\x00")
    assert energy_of(run) == ["not measured"] * 3
    # 3 s without an answer; then a part that was not sampled, for which the mean stands.
    write_power(run, 0, lambda second: 100, [*range(40), *range(43, 80), *range(84, 101)])
    assert energy_of(run)[::2] == ["10,000", "100.0 %"]
    (run / "power-0.csv").write_text(odd)
    write_power(run, 0, lambda second: 100, [*range(70), *range(74, 96)])
    assert energy_of(run)[::2] == ["10,000", "95.0 %"]
    (run / "power-0.csv").write_text(odd)
    write_power(run, 0, lambda second: 100, [*range(70), *range(76, 101)])
    assert energy_of(run)[::2] == ["not measured", "93.0 %"]


def test_a_cpu_s_run_beside_a_gpu_has_no_energy(tmp_path):
    run = make_powered_run(tmp_path / "run", [10.0], {"device": "cpu"})
    write_events(run, {10: 10})
    write_power(run, 0, lambda second: 100, range(11))
    assert energy_of(run) == ["not measured"] * 3


def test_when_train_py_trained(start, tmp_path):
    """The spans of the log intervals in a real run's events, which was killed and went on: none
    overlaps another, none is in a life that was over."""
    output = tmp_path / "run"
    words = ["--sample", "--limit", 40, "--batch-size", 4, "--epochs", 3, "--device", "cpu"]
    words += ["--log-every", 2, "--save-every", 5, "--evaluate-every", "epoch", "--no-profile"]
    patch = in_step(17, "time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)")
    start(*words, "--output", output, patch=patch).end(-signal.SIGKILL)
    killed = time.time()
    time.sleep(1)
    begun = time.time()
    start(*words, "--output", output).end()
    module = load_script("report.py")
    (run,) = module.load_runs([str(output)])
    assert run.results["resumed_from_steps"] == [15]
    ends = module.ends_of_intervals(run.folder)
    assert list(ends) == [interval["step"] for interval in run.intervals]
    before = 0
    for interval in run.intervals:
        end = ends[interval["step"]]
        assert end - interval["seconds"] > before - 0.02, interval
        assert end < killed if interval["step"] <= 15 else end > begun
        before = end


# The environment

SMI_HEADER = (
    "name, driver_version, power.limit [W], power.draw [W], clocks.current.sm [MHz], "
    "clocks.max.sm [MHz], clocks.current.memory [MHz], temperature.gpu, "
    "clocks_throttle_reasons.active\n"
)


def smi_row(power, clock, mask):
    return f"{A100}, 570.86.15, 250.00 W, {power} W, {clock} MHz, 1410 MHz, 1215 MHz, 35, {mask}\n"


def environment_of(run):
    return {row[0]: row[1] for row in table_rows(report("--table", "environment", run))}


def test_what_nvidia_smi_told_the_launcher(tmp_path):
    run = make_run(tmp_path / "run")
    before = SMI_HEADER + smi_row("33.45", 210, "0x0000000000000001")
    after = before + smi_row("251.00", 1300, "0x0000000000000024")
    (run / "nvidia-smi-before.csv").write_text(before)
    (run / "nvidia-smi-after.csv").write_text(after)
    found = environment_of(run)
    assert found["GPU driver"] == "570.86.15" and found["GPU power limit"] == "250.00 W"
    assert found["GPUs before the run"] == (
        "power 33.45 W, SM clock 210 MHz, highest SM clock 1410 MHz, memory clock 1215 MHz, "
        "temperature 35 °C, throttle reasons idle"
    )
    assert found["GPUs after the run"].startswith("GPU 0: power 33.45 W")
    assert "; GPU 1: power 251.00 W, SM clock 1300 MHz" in found["GPUs after the run"]
    assert found["GPUs after the run"].endswith(
        "throttle reasons power cap and software thermal slowdown"
    )
    assert "GPUs" not in report("--table", "environment", make_run(tmp_path / "without"))


def test_odd_answers_of_nvidia_smi(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "nvidia-smi-after.csv"
    path.write_text(SMI_HEADER + f"{A100}, 570.86.15{', [N/A]' * 6}, [Unknown Error]\n")
    found = environment_of(run)
    assert found["GPU driver"] == "570.86.15" and "[N/A]" not in "".join(found.values())
    path.write_text("No devices were found\n")
    assert environment_of(run)["GPUs after the run"] == "nvidia-smi said: No devices were found"
    path.write_bytes(b"\xff\xfe,,,,\n\n,,,,,,,,\n0,1,2,3,4,5,6,7,0xzz")
    assert "nvidia-smi said: " in environment_of(run)["GPUs after the run"]
    path.write_text("")
    assert "GPUs after the run" not in environment_of(run)


@pytest.mark.parametrize(
    ("allocated", "own", "answer"),
    [
        ("64", "64(x2)", "no"),
        ("96", "64", "yes, they have 32 of its CPUs"),
        ("?", "64", None),
        ("64", "", None),
    ],
)
def test_whether_others_were_on_the_node(tmp_path, allocated, own, answer):
    run = make_run(tmp_path / "run")
    (run / "slurm-node.txt").write_text(
        f"NodeName=c7 Arch=x86_64\n   CPUAlloc={allocated} CPUEfctv=128 CPUTot=128 CPULoad=1.0\n"
        f"SLURM_JOB_CPUS_PER_NODE={own}\n"
    )
    assert environment_of(run).get("node shared with other jobs") == answer


def test_many_runs_share_one_column(tmp_path):
    folders = [make_run(tmp_path / f"r{n}", environment={"cores": n}) for n in range(6)]
    rows = table_rows(report("--table", "environment", *folders))
    assert ["torch", "2.13.0"] in rows and ["cores", "(6 different)"] in rows


def test_runs_of_the_first_form(tmp_path):
    """As results/ has them: the GPUs' state in results.json, other arguments."""
    gpu = {"power.limit": "250.00 W", "throttled by": "nothing"}
    run = make_run(
        tmp_path / "run",
        {"strategy": "fsdp", "fused": True, "sample": True, "train_file": "baseline/sample.json"},
        {"world_size": 4, "nodes": 2, "parameters": 2**30},
        environment={"gpu_before": [gpu, gpu], "gpu_after": [], "node_shared": False},
    )
    found = environment_of(run)
    assert found["gpu before"] == "power.limit 250.00 W, throttled by nothing"
    assert found["node shared"] == "no" and found["gpu after"] == "-"
    assert "sample.json, 384 tokens" in report("--table", "times", run)
    assert table_rows(report("--table", "strategies", run))[0][7] == "4.00"


# Speed-ups


def test_speed_up_between_alike(tmp_path):
    first = make_run(tmp_path / "first", speed=1000.0)
    faster = make_run(tmp_path / "faster", {"batching": "padded"}, speed=2500.0)
    text = report("--table", "speed-up", first, faster)
    assert "| faster | 2.50 | batching packed → padded |" in text


@pytest.mark.parametrize(
    ("reason", "arguments", "results", "environment"),
    [
        ("batch 32 → 64", {"batch_size": 64}, {}, {}),
        ("model bert-base-uncased → minilm", {"model": "../minilm"}, {}, {}),
        ("data SQuAD v1.1, 384 tokens a window → t.json", {"train_file": "x/t.json"}, {}, {}),
        ("features 88524 → 88000", {}, {"train_features": 88000}, {}),
        (f"device {A100} → NVIDIA H100", {}, {}, {"devices": ["NVIDIA H100"]}),
    ],
)
def test_no_speed_up_between_unlike(tmp_path, reason, arguments, results, environment):
    first = make_run(tmp_path / "first")
    other = make_run(tmp_path / "other", arguments, results, (), environment)
    assert f"not compared: {reason}" in report("--table", "speed-up", first, other)


def test_seeds(tmp_path):
    folders = []
    for seed in (1, 2, 3):
        folders.append(make_run(tmp_path / f"p{seed}", {"seed": seed}, {"f1": 80.0 + seed}))
    for seed in (1, 2):
        padded = {"seed": seed, "batching": "padded"}
        folders.append(make_run(tmp_path / f"q{seed}", padded, {"f1": 70.0}))
    text = report("--table", "seeds", *folders)
    assert "| batching packed | 3 | 1, 2, 3 | 80.91 ± 0.00 | 82.00 ± 1.00 |" in text
    assert "| batching padded | 2 | 1, 2 |" in text
    assert "## Seeds" in report(*folders)


# The ladder


def make_ladder(folder):
    usual = {"precision": "tf32", "batching": "padded", "compile": False}
    make_run(folder / "1-fp32", {**usual, "precision": "fp32"}, speed=1000.0)
    make_run(folder / "2-tf32", usual, speed=2000.0)
    make_run(folder / "3-dynamic", {**usual, "batching": "dynamic"}, speed=3000.0)
    make_run(folder / "10-packed", {**usual, "batching": "packed"}, speed=6000.0)

    def edit_losses(times):
        times["intervals"][7]["loss"] += 0.014
        times["intervals"][50]["loss"] += 9  # after the losses that are compared

    def train_other_batches(times):
        times["tokens_per_step"][3][0] += 1

    def save_in_the_middle(times):
        interval = times["intervals"][5]
        tokens = interval["tokens"] // 2
        half = {**interval, "step": interval["step"] - 1, "tokens": tokens, "loss": 9.0}
        times["intervals"][5:6] = [half, {**interval, "tokens": tokens, "loss": 8.0}]

    change(folder / "2-tf32/timings.json", edit_losses)
    change(folder / "3-dynamic/timings.json", save_in_the_middle)
    change(folder / "10-packed/timings.json", train_other_batches)
    return folder


def test_ladder(tmp_path):
    ladder = make_ladder(tmp_path / "ladder")
    text = report("--table", "ladder", "--chart", "ladder", ladder)
    rows = table_rows(text)
    names = ["1-fp32", "2-tf32", "3-dynamic", "10-packed"]
    assert [row[0] for row in rows] == names
    assert rows[1][1] == "precision fp32 → tf32" and rows[2][1] == "batching padded → dynamic"
    assert rows[1][2] == "2,000 (2,000 to 2,000)"
    # All steady steps; over the first; over the one before.
    assert rows[0][3:6] == ["1,000", "1.00", "1.00"]
    assert rows[2][3:6] == ["3,000", "3.00", "1.50"]
    assert rows[3][3:6] == ["6,000", "6.00", "2.00"]
    assert rows[1][10] == "1.4e-02 from 1-fp32" and rows[2][10] == "0.0e+00 from 1-fp32"
    assert rows[3][10] == "no earlier rung has these batches"
    assert f"x-axis {json.dumps(names)}" in text
    assert "## Ladder" in report(ladder)


def test_median_of_three_windows(tmp_path):
    intervals = []
    for step, tokens in enumerate([9999, 10, 10, 10, 40, 40, 40, 20, 20, 20]):
        interval = {"step": step, "tokens": tokens, "seconds": 1.0, "loss": 1.0, "steady": step > 0}
        intervals.append(interval)
    run = make_run(tmp_path / "run", timings={"intervals": intervals})
    assert "| 20.0 (10.0 to 40.0) |" in report("--table", "ladder", run)


# Scaling and strategies


def make_scaling(folder):
    link = {"gigabytes_per_second": 10.8, "megabytes": 436}
    for grid, speed in {"1x1": 1000.0, "1x2": 1900.0, "2x2": 3600.0}.items():
        nodes, ranks_per_node = map(int, grid.split("x"))
        ranks = nodes * ranks_per_node
        results = {"world_size": ranks, "nodes": nodes, "f1": 88.0, "all_reduce": link}
        exposed = {"seconds": 1.0, "share": 0.05 if ranks > 1 else 0.0}
        for rule, batch in {"strong": 512, "growing": 128 * ranks}.items():
            for repeat in (1, 2, 3):
                make_run(
                    folder / f"{rule}-{grid}-{repeat}",
                    {"batch_size": batch, "strategy": "ddp"},
                    results,
                    {"phases": {"exposed_communication": exposed}},
                    speed=speed + {1: -10, 2: 0, 3: 40}[repeat],
                )
    return folder


def test_scaling(tmp_path):
    scaling = make_scaling(tmp_path / "scaling")
    text = report("--table", "scaling", "--chart", "scaling", scaling)
    rows = {tuple(row[:2]): row[2:] for row in table_rows(text)}
    assert list(rows)[:3] == [("strong", "1x1"), ("strong", "1x2"), ("strong", "2x2")]
    batch, runs, _, speed, per_rank, gain, efficiency, exposed, all_reduce, f1 = rows[
        "strong", "2x2"
    ]
    assert (batch, runs, speed, per_rank) == ("512", "3", "3,610 ± 26.5", "900.0")
    assert (gain, efficiency, exposed) == ("3.60", "90.0 %", "5.0 % ± 0.0 %")
    assert (all_reduce, f1) == ("10.8 ± 0", "88.00 ± 0.00")
    assert rows["growing", "1x2"][0] == "256" and rows["growing", "1x2"][5] == "1.90"
    assert rows["strong", "1x1"][7:9] == ["-", "-"]
    assert "line [1000, 2000, 4000]" in text and text.count("xychart-beta") == 2
    assert "## Scaling" in report(scaling)


def test_scaling_without_a_single_rank_compares_nothing(tmp_path):
    run = make_run(tmp_path / "strong-2x2-1", {"strategy": "ddp"}, {"world_size": 4, "nodes": 2})
    other = make_run(tmp_path / "strong-1x1-1", {"strategy": "ddp", "batch_size": 64})
    rows = table_rows(report("--table", "scaling", run, other))
    assert [row[7] for row in rows] == ["1.00", "no 1x1 to compare with"]


def test_strategies_and_memory(tmp_path):
    """Weights, gradients and Adam's moments by formula: a parameter for each byte of a GiB."""
    expected = {"ddp": "16.0", "zero2": "8.00", "fsdp": "4.00", "hsdp": "8.00", "dp": "16.0"}
    folders = []
    for name in expected:
        results = {"world_size": 4, "nodes": 2, "parameters": 2**30}
        folders.append(make_run(tmp_path / name, {"strategy": name, "batch_size": 64}, results))
    rows = table_rows(report("--table", "strategies", *folders))
    assert {row[0]: row[7] for row in rows} == expected
    text = report("--table", "memory", *folders)
    assert "| ddp | 2x2 | bf16, packed, ddp, compiled | 16.0 |" in text
    assert "## Strategies" in report(*folders)


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


# A measurement's own tables


def test_measured_tables(tmp_path):
    path = tmp_path / "bench.json"
    measured = {
        "title": "Against the usual way",
        "conditions": {"batch": 32, "precision": "fp32"},
        "columns": ["what", "tokens/s", "ratio"],
        "rows": [["plain | loop", 1234.5, 1.0], ["ours", 2500, None]],
        "environment": {"device": ["CPU", "CPU"], "commit": "abc", "slurm_job_id": None},
    }
    path.write_text(json.dumps([measured, measured]))
    text = report("--table", "bench", path)
    assert text.count("**Against the usual way**") == 2
    assert "*batch 32, precision fp32; device CPU; commit abc.*" in text
    assert "| plain \\| loop | 1,234 | 1.00 |" in text and "| ours | 2,500 | not measured |" in text
    path.write_text(json.dumps({**measured, "rows": [[1, 2]]}))
    assert "each row of as many cells as columns" in refusal("--table", "faults", path)
    path.write_text("[3]")
    assert 'wants {"title"' in refusal("--table", "growth", path)
    assert "no such file" in refusal("--table", "seeds-paired", tmp_path / "none.json")


# Which folders are runs


def test_patterns_and_folders_of_runs(tmp_path):
    for number in (1, 2, 10):
        make_run(tmp_path / "runs" / f"r{number}")
    for name in ("runs", "runs/r*"):
        rows = table_rows(report("--table", "memory", tmp_path / name))
        assert [row[0] for row in rows] == ["r1", "r2", "r10"]
    shutil.copytree(tmp_path / "runs/r1", tmp_path / "other/r1")
    assert "| other/r1 |" in report("--table", "runs", tmp_path / "runs/r1", tmp_path / "other")


def test_what_did_not_finish_is_named_and_left_out(tmp_path):
    """As `report.py runs/*` meets it: one run died, one is under way, one file is no folder."""
    make_run(tmp_path / "good")
    (tmp_path / "died/tensorboard").mkdir(parents=True)
    (tmp_path / "under-way").mkdir()
    (tmp_path / "under-way/checkpoint.pt").touch()
    (tmp_path / "notes.md").touch()
    said = "report.py: {}: no finished run, left out"
    everything = sorted(tmp_path.iterdir())
    text, errors = call("report.py", *everything)
    names = ("died", "notes.md", "under-way")
    assert "good" in text
    assert errors.splitlines() == [said.format(tmp_path / name) for name in names]
    text, errors = call("report.py", tmp_path)
    assert "good" in text
    assert errors.splitlines() == [said.format(tmp_path / name) for name in ("died", "under-way")]
    _, errors = call("report.py", tmp_path / "died", tmp_path / "under-way", code=2)
    assert "none of these is a finished run" in errors


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
        ('{"evaluations": {}}', "evaluations is not a list"),
    ],
)
def test_bad_runs(tmp_path, content, says):
    if content == "checkpoint":
        (tmp_path / "checkpoint.pt").touch()
    elif content:
        (tmp_path / "results.json").write_text(content)
    assert says in refusal(tmp_path)


def test_bad_words(tmp_path):
    run = make_run(tmp_path / "run")
    assert "no such folder" in refusal(tmp_path / "none")
    assert "no RUN: give the folder" in refusal()
    assert "invalid choice: 'laddr' (choose from" in refusal("--table", "laddr", run)
    assert "invalid choice: 'pie'" in refusal("--chart", "pie", run)
    assert "--tabel" in refusal("--tabel", "ladder", run)
    (run / "timings.json").write_text('{"intervals": [3]}')
    assert "a value is not as train.py writes it" in refusal(run)


def places(holder):
    """Each place of a value in nested lists and dicts; of lists only the first few."""
    pairs = list(holder.items() if isinstance(holder, dict) else enumerate(holder[:4]))
    for key, value in pairs:
        yield holder, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def test_runs_on_a_gpu_that_computes_nothing_are_refused(tmp_path):
    """.ci/fake-gpu names its devices so that no times of theirs get into a table."""
    real = make_run(tmp_path / "real")
    fake = make_run(tmp_path / "fake", environment={"devices": [f"FAKE {A100}"]})
    for words in ([fake], [real, fake], ["--table", "times", fake], ["--chart", "runs", fake]):
        line = refusal(*words)
        assert str(fake) in line and "computes nothing" in line and "times" in line


def test_no_value_ends_in_a_traceback(tmp_path):
    """Each field in turn of another kind: a table, or one line and exit code 2."""
    module = load_script("report.py")
    evaluation = {"step": 1, "epoch": 1, "train_seconds": 1.0, "exact_match": 1.0, "f1": 2.0}
    results = {
        "world_size": 2,
        "all_reduce": {"gigabytes_per_second": 1.5},
        "evaluations": [evaluation, evaluation],
    }
    other = make_run(tmp_path / "strong-1x1-1")
    run = make_run(tmp_path / "strong-1x2-1", {"strategy": "fsdp"}, results, (), CPU)
    write_trace(run, 0, cpu_step(1, 0))
    change(run / "timings.json", lambda times: times["phases"].update(exposed_communication=None))
    makers = [module.full_report, *module.TABLES.values(), *module.CHARTS.values()]
    for name in ("results.json", "timings.json"):
        content = json.loads((run / name).read_text())
        if "intervals" in content:
            del content["intervals"][5:]
        for holder, key in places(content):
            kept = holder[key]
            for odd in (None, "x", -1, 0, [], {}, True, 1e300, [1, "x"], {"x": None}):
                holder[key] = odd
                (run / name).write_text(json.dumps(content))
                try:
                    runs = module.load_runs([str(other), str(run)])
                    assert all(isinstance(make(runs), str) for make in makers)
                except module.Problem:
                    pass
                except module.ODD_VALUES:
                    # main says it in one line. But a field that is absent is not odd.
                    absent = odd is None and isinstance(key, str)
                    assert not absent or name != "results.json", key
            holder[key] = kept
        (run / name).write_text(json.dumps(content))

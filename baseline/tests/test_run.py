"""What a run leaves behind, what it says, and that one seed gives one training."""

import gzip
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared"
spec = importlib.util.spec_from_file_location("baseline_train_run", HERE.parent / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
NUMBER = (int, float)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def command(*words, code=0, **environment):
    done = subprocess.run(
        list(map(str, words)),
        check=False,
        capture_output=True,
        text=True,
        timeout=560,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """bash baseline/run.sbatch --sample, as a user types it, with the log's two streams."""
    folder = tmp_path_factory.mktemp("sample run")
    # The run takes its packages from where this test has them.
    environment = {"SQUAD_CACHE": str(folder / "cache"), "VENV": os.environ.get("VENV", sys.prefix)}
    words = ("baseline/run.sbatch", "--sample", "--output", folder / "run")
    done = command("bash", *words, **environment)
    return folder / "run", done.stdout, done.stderr


def test_the_sample_is_memorised(sample):
    results = read(sample[0] / "results.json")
    assert results["exact_match"] >= 90 and results["f1"] >= results["exact_match"]
    assert results["parameters"] < 2_000_000
    data = read(HERE.parent / "sample.json")["data"]
    counts = [len(p["qas"]) for article in data for p in article["paragraphs"]]
    assert len(counts) >= 30 and sum(counts) >= 300


def test_the_log_is_quiet_and_tells_what_it_must(sample):
    output, out, err = sample
    assert err == ""
    for noise in ("warning", "Warning", "deprecat", "Traceback", "huggingface", "Some weights"):
        assert noise not in out, out
    pattern = (
        r"step [\d,]+/480 +\d+ %, \d+:\d\d left  loss \d\.\d+  lr \d\.\d\de-\d+  [\d,]+ tokens/s"
    )
    assert len(re.findall(pattern, out.replace("%,", " %,"))) >= 40
    for part in ("exact match, F1", "80.8", "88.5", "tensorboard --logdir", "phases", str(output)):
        assert part in out
    assert re.search("own|evaluate", out)  # who scored
    assert max(map(len, out.splitlines())) < 300


RESULTS = {
    "exact_match": NUMBER,
    "f1": NUMBER,
    "steady_epoch_seconds": float,
    "train_seconds": float,
    "epoch_seconds": list,
    "warmup_seconds": float,
    "prepare_seconds": float,
    "features_cached": bool,
    "evaluate_seconds": float,
    "total_seconds": float,
    "features_per_second": float,
    "tokens_per_second": float,
    "padding_share": float,
    "model_flops_utilization": (float, type(None)),
    "peak_memory_gib": float,
    "steps": int,
    "train_features": int,
    "world_size": int,
    "nodes": int,
    "parameters": int,
    "arguments": dict,
    "environment": dict,
    "resumed_from_steps": list,
    "repeated_steps": int,
    "restarts": int,
    "scorer": str,
    "finished_at": str,
    "command": str,
    "paper": dict,
}


def test_results_have_every_field(sample):
    results = read(sample[0] / "results.json")
    for name, kind in RESULTS.items():
        assert isinstance(results[name], kind), name
    assert results["steps"] == 480 and len(results["epoch_seconds"]) == 20
    assert results["world_size"] == results["nodes"] == 1 and results["resumed_from_steps"] == []
    assert results["paper"] == {"exact_match": 80.8, "f1": 88.5}
    assert 0 <= results["padding_share"] < 1
    assert sum(results["epoch_seconds"]) == pytest.approx(results["train_seconds"])
    assert results["train_seconds"] < results["total_seconds"]
    for _, option, *_ in [(0, *row) for row in train.OPTIONS if not isinstance(row, str)]:
        assert option[2:].replace("-", "_") in results["arguments"]
    for name in ("commit", "dirty", "hosts", "devices", "torch", "transformers", "python"):
        assert name in results["environment"], name


def test_timings_have_every_field_and_add_up(sample):
    results, timings = (read(sample[0] / name) for name in ("results.json", "timings.json"))
    phases, intervals = timings["phases"], timings["intervals"]
    assert set(phases) >= {
        "data",
        "forward",
        "backward",
        "optimizer",
        "checkpoint",
        "profile",
        "log",
    }
    for phase in phases.values():
        assert phase["seconds"] >= 0 and 0 <= phase["share"] <= 1
    shares = sum(phases[name]["share"] for name in ("data", "forward", "backward", "optimizer"))
    assert 0.9 < shares <= 1.001
    for one in intervals:
        for name in ("step", "loss", "learning_rate", "gradient_norm", "seconds", "tokens"):
            assert isinstance(one[name], NUMBER) and math.isfinite(one[name])
        assert isinstance(one["steady"], bool)
    assert [one["step"] for one in intervals] == list(range(10, 481, 10))
    steady = [one for one in intervals if one["steady"]]
    speed = sum(one["tokens"] for one in steady) / sum(one["seconds"] for one in steady)
    assert results["tokens_per_second"] == pytest.approx(speed)
    an_epoch = sum(one["tokens"] for one in intervals) / 20
    assert results["steady_epoch_seconds"] == pytest.approx(an_epoch / speed)
    seconds = sum(one["seconds"] for one in intervals)
    assert seconds <= results["train_seconds"] + 1e-6


def test_predictions_are_as_the_official_scorer_reads_them(sample):
    predictions = read(sample[0] / "predictions.json")
    ids, right = set(), 0
    for article in read(HERE.parent / "sample.json")["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                ids.add(entry["id"])
                right += predictions[entry["id"]] in [a["text"] for a in entry["answers"]]
                assert predictions[entry["id"]] in paragraph["context"]
    assert set(predictions) == ids
    # Letter for letter is at most what the scorer, who is lenient, counts.
    assert 100 * right / len(ids) <= read(sample[0] / "results.json")["exact_match"] + 1e-9


def test_the_model_opens_and_answers_the_same(sample):
    folder, predictions = sample[0] / "model", read(sample[0] / "predictions.json")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    data, same, tried = read(HERE.parent / "sample.json")["data"], 0, 0
    entries = [(p, entry) for a in data for p in a["paragraphs"] for entry in p["qas"]]
    for paragraph, entry in entries[::5]:
        pair = (entry["question"], paragraph["context"])
        encoding = tokenizer(*pair, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoding.pop("offset_mapping")[0].tolist()
        context = [i for i, which in enumerate(encoding.sequence_ids(0)) if which == 1]
        with torch.inference_mode():
            output = model(**encoding)
        start, end = output.start_logits[0], output.end_logits[0]
        pairs = ((i, j) for i in context for j in context if i <= j < i + 30)
        first, last = max(pairs, key=lambda pair: (start[pair[0]] + end[pair[1]]).item())
        text = paragraph["context"][offsets[first][0] : offsets[last][1]]
        same += text == predictions[entry["id"]]
        tried += 1
    assert tried >= 60 and same == tried


def test_tensorboard_has_events_and_a_small_trace(sample):
    folder = sample[0] / "tensorboard"
    assert list(folder.glob("**/*tfevents*"))
    traces = list(folder.glob("**/*.pt.trace.json.gz"))
    assert len(traces) == 1 and traces[0].name.startswith("rank0.")
    assert traces[0].stat().st_size < 50e6
    names = {
        e.get("name") for e in json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    }
    assert {"data", "forward", "backward", "optimizer"} <= names
    assert any(str(name).startswith("ProfilerStep#") for name in names)


def test_nothing_else_is_left(sample):
    names = {path.name for path in sample[0].iterdir()}
    wanted = {"results.json", "timings.json", "predictions.json", "model", "tensorboard"}
    assert names == wanted


def test_a_finished_run_is_left_alone(sample, start):
    before = {path: path.stat().st_mtime_ns for path in sample[0].rglob("*")}
    text = start("--sample", "--output", sample[0]).end()
    assert "finished" in text and text.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in sample[0].rglob("*")} == before


def test_report_reads_the_run(sample):
    text = command(sys.executable, HERE.parent / "report.py", sample[0]).stdout
    for part in ("# Report", "## Environment", "## Phases", "```mermaid", "|"):
        assert part in text
    results = read(sample[0] / "results.json")
    assert f"{results['exact_match']:.2f}" in text


def test_no_epochs_only_evaluate(start, sample, tmp_path):
    """From the trained model, on the file it was trained on: the same answers."""
    path = HERE.parent / "sample.json"
    words = ("--model", sample[0] / "model", "--train-file", path, "--validation-file", path)
    output = tmp_path / "run"
    start(*words, "--epochs", 0, "--device", "cpu", "--output", output).end()
    assert read(output / "predictions.json") == read(sample[0] / "predictions.json")
    results = read(output / "results.json")
    assert results["steps"] == 0 and results["exact_match"] >= 90
    assert results["tokens_per_second"] is None and results["epoch_seconds"] == []
    assert (output / "model").is_dir() and not list(output.glob("**/*.pt.trace.json.gz"))
    command(sys.executable, HERE.parent / "report.py", output)


def test_one_seed_gives_one_training(start, tmp_path):
    words = ("--sample", "--limit", 40, "--max-steps", 6, "--log-every", 1, "--dropout", 0.1)
    found = {}
    for name, more in {"one": [], "two": ["--no-profile"], "other": ["--seed", 43]}.items():
        start(*words, *more, "--output", tmp_path / name).end()
        intervals = read(tmp_path / name / "timings.json")["intervals"]
        weights = safetensors.torch.load_file(tmp_path / name / "model/model.safetensors")
        found[name] = [[one["loss"], one["gradient_norm"]] for one in intervals], weights
    assert found["one"][0] == found["two"][0] != found["other"][0]
    assert all(torch.equal(found["two"][1][n], tensor) for n, tensor in found["one"][1].items())
    assert len(found["one"][0]) == 6


def test_results_do_not_claim_a_compilation_that_was_not(start, tmp_path):
    words = ("--sample", "--limit", 20, "--max-steps", 2, "--no-profile", "--compile")
    log = start(*words, "--output", tmp_path / "run", CXX="no-compiler").end()
    assert "not compiling: this node has no no-compiler" in log
    assert read(tmp_path / "run/results.json")["arguments"]["compile"] is False


def test_help_fits_two_screens_and_documents_every_option(start):
    text = start("--help").end()
    assert len(text.splitlines()) <= 80 and max(map(len, text.splitlines())) <= 100
    interface = """--model --train-file --validation-file --sample --limit --max-length --stride --epochs
        --max-steps --batch-size --accumulate --batching --device --precision --compile --no-compile
        --learning-rate --warmup --weight-decay --dropout --seed --output --log-every --save-every
        --profile --no-profile""".split()
    for option in interface:
        assert option in text, option
    source = (HERE.parent / "train.py").read_text(encoding="utf-8")
    for option in {row[0] for row in train.OPTIONS if not isinstance(row, str)}:
        assert f"args.{option[2:].replace('-', '_')}" in source, f"{option} does nothing"


def test_defaults_are_those_of_the_interface():
    args = train.parse_arguments(["--device", "cpu"])
    wanted = {"model": "google-bert/bert-base-uncased", "max_length": 384, "stride": 128}
    wanted |= {"epochs": 3, "max_steps": None, "batch_size": 32, "accumulate": 1, "seed": 42}
    wanted |= {"batching": "packed", "precision": "fp32", "compile": False, "learning_rate": 5e-5}
    wanted |= {"warmup": 0.1, "weight_decay": 0.01, "dropout": None, "log_every": 10}
    wanted |= {"save_every": None, "profile": True, "limit": None, "train_file": None}
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert re.fullmatch(r"runs/baseline-\d{8}-\d{6}|runs/baseline-\w+", args.output)
    assert train.parse_arguments(["--sample", "--dropout", "0.2"]).dropout == 0.2


def test_the_rate_is_a_function_of_the_step():
    args = train.parse_arguments(["--sample", "--learning-rate", "1e-3", "--warmup", "0.1"])
    rates = [train.learning_rate_at(step, 100, args) for step in range(100)]
    assert rates[9] == max(rates) == pytest.approx(1e-3) and rates[0] == pytest.approx(1e-4)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    falls = [a - b for a, b in itertools.pairwise(rates[10:])]
    assert min(falls) == pytest.approx(max(falls)) and rates[99] == pytest.approx(1e-3 / 90)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with MiniLM and SQuAD is not here")
def test_real_data_and_a_real_model(start, tmp_path):
    words = ["--model", SHARED / "minilm", "--train-file", SHARED / "squad/train.json"]
    words += ["--validation-file", SHARED / "squad/dev.json", "--device", "cpu", "--limit", 16]
    text = start(*words, "--max-steps", 2, "--batch-size", 4, "--output", tmp_path / "run").end()
    assert "arning" not in text and "Some weights" not in text
    assert len(read(tmp_path / "run/predictions.json")) == 16


def test_max_steps_ends_in_mid_epoch_and_accumulation_changes_no_loss(start, tmp_path):
    losses = []
    for accumulate in (1, 4):
        output = tmp_path / str(accumulate)
        words = ("--sample", "--max-steps", 3, "--log-every", 1, "--no-profile")
        start(*words, "--accumulate", accumulate, "--output", output).end()
        losses.append([one["loss"] for one in read(output / "timings.json")["intervals"]])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-5)

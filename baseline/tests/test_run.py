"""What a run leaves behind, what its log says, and that one seed gives one training."""

import gzip
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BASELINE = Path(__file__).resolve().parents[1]
ROOT = BASELINE.parent
QUESTIONS = BASELINE / "sample/questions.json"
# Three epochs of six steps: a run of a second.
SMALL = ("--sample", "--limit", 24, "--batch-size", 4, "--epochs", 3, "--seed", 3)
SMALL += ("--log-every", 1, "--device", "cpu", "--no-profile")
# What libraries say unasked, as of weights that a model's file has not.
NOISE = re.compile("warning|deprecat|Traceback|huggingface|LOAD REPORT|MISSING", re.IGNORECASE)


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def losses(folder):
    intervals = read(folder, "timings.json")["intervals"]
    return [(interval["loss"], interval["gradient_norm"]) for interval in intervals]


def command(*words, code=0, folder=ROOT, **environment):
    """Runs a command in a fresh process, as a user does."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def sample_questions():
    """Each question of the sample, as the file has it, with its context."""
    for article in read(QUESTIONS.parent, QUESTIONS.name)["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield question, paragraph["context"]


# 1. The sample, as a user starts it


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """bash baseline/run.sbatch --sample; returns the run's folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("sample run")
    # The run takes its packages from where this test has them.
    environment = {"VENV": os.environ.get("VENV", sys.prefix), "SQUAD_CACHE": str(folder / "cache")}
    # No save by the clock, which would end a log interval early, where the machine is slow.
    words = ("baseline/run.sbatch", "--sample", "--save-every", 1000, "--output", folder / "run")
    done = command("bash", *words, **environment)
    return folder / "run", done.stdout, done.stderr


def test_sample_is_memorised(sample):
    results = read(sample[0])
    assert results["exact_match"] >= 90
    assert results["f1"] >= results["exact_match"]
    assert results["parameters"] < 2_000_000
    assert len(list(sample_questions())) >= 300


def test_log_is_quiet_and_says_what_it_must(sample):
    output, log, errors = sample
    assert errors == ""
    assert not NOISE.search(log), log
    step = r"^step [\d,]+/480 +\d+%, \d+:\d\d:\d\d left"
    step += r"  loss \d\.\d+  lr \d\.\d\de-\d+  [\d,]+ tokens/s"
    assert len(re.findall(step, log, re.MULTILINE)) == 48
    for words in ("exact match, F1", "80.8, 88.5", "own scorer", "tensorboard --logdir", "phases"):
        assert words in log
    assert str(output) in log
    assert max(len(line) for line in log.splitlines()) < 300


NUMBER = (int, float)
NUMBER_OR_NULL = (float, type(None))
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
    "model_flops_utilization": NUMBER_OR_NULL,
    "peak_memory_gib": float,
    "steps": int,
    "train_features": int,
    "world_size": int,
    "nodes": int,
    "parameters": int,
    "arguments": dict,
    "environment": dict,
    "evaluations": list,
    "resumed_from_steps": list,
    "lives": list,
    "restarts": int,
    "scorer": str,
    "paper": dict,
    "command": str,
    "finished_at": str,
}
ENVIRONMENT = ["commit", "dirty", "hosts", "devices", "torch", "cuda", "transformers", "python"]
ENVIRONMENT += ["slurm_job_id", "restarts"]


def test_results_have_every_field(sample, train):
    results = read(sample[0])
    for name, kind in RESULTS.items():
        assert isinstance(results[name], kind), name
    assert results["steps"] == 480
    assert results["world_size"] == results["nodes"] == 1
    assert results["resumed_from_steps"] == []
    assert results["features_cached"] is False
    assert results["paper"] == {"exact_match": 80.8, "f1": 88.5}
    assert "--sample" in results["command"]
    assert set(vars(train.make_parser().parse_args([]))) <= set(results["arguments"])
    assert set(ENVIRONMENT) <= set(results["environment"])


def test_seconds_and_speeds_agree_with_each_other(sample):
    results = read(sample[0])
    intervals = read(sample[0], "timings.json")["intervals"]
    steady = [interval for interval in intervals if interval["steady"]]
    assert 40 <= len(steady) < 48
    speed = sum(interval["tokens"] for interval in steady) / sum(
        interval["seconds"] for interval in steady
    )
    tokens_per_epoch = sum(interval["tokens"] for interval in intervals) / 20
    features_per_token = 370 / tokens_per_epoch
    assert results["train_features"] == 370
    assert results["tokens_per_second"] == pytest.approx(speed)
    assert results["features_per_second"] == pytest.approx(speed * features_per_token, rel=0.02)
    assert results["steady_epoch_seconds"] == pytest.approx(tokens_per_epoch / speed)
    assert len(results["epoch_seconds"]) == 20
    assert sum(results["epoch_seconds"]) == pytest.approx(results["train_seconds"])
    assert results["warmup_seconds"] < results["train_seconds"] < results["total_seconds"]
    assert results["train_seconds"] >= sum(interval["seconds"] for interval in intervals)
    assert 0 < results["padding_share"] < 0.2
    [evaluation] = results["evaluations"]
    assert evaluation["step"] == 480 and evaluation["epoch"] == 20
    assert evaluation["train_seconds"] == pytest.approx(results["train_seconds"])


def test_timings_have_every_field_and_add_up(sample):
    timings = read(sample[0], "timings.json")
    phases = timings["phases"]
    of_the_steps = ["data", "forward", "backward", "optimizer"]
    assert list(phases) == [*of_the_steps, "checkpoint", "profile", "log"]
    for phase in phases.values():
        assert phase["seconds"] >= 0
        assert 0 <= phase["share"] <= 1
    assert 0.9 < sum(phases[name]["share"] for name in of_the_steps) <= 1.001
    intervals = timings["intervals"]
    assert [interval["step"] for interval in intervals] == list(range(10, 481, 10))
    for interval in intervals:
        for name in ("loss", "learning_rate", "gradient_norm", "seconds", "tokens"):
            assert isinstance(interval[name], NUMBER) and math.isfinite(interval[name])
        assert isinstance(interval["steady"], bool)
    assert intervals[-1]["loss"] < intervals[0]["loss"] / 10


def test_predictions_are_as_the_official_scorer_reads_them(sample):
    predictions = read(sample[0], "predictions.json")
    ids = set()
    right = 0
    for question, context in sample_questions():
        ids.add(question["id"])
        answer = predictions[question["id"]]
        assert answer in context
        right += answer in [reference["text"] for reference in question["answers"]]
    assert set(predictions) == ids
    # The scorer, who ignores case and articles, counts at least what is right letter for letter.
    assert 100 * right / len(ids) <= read(sample[0])["exact_match"] + 1e-9


def test_saved_model_opens_and_answers_the_same(sample):
    predictions = read(sample[0], "predictions.json")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(sample[0] / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample[0] / "model")
    assert tokenizer.is_fast
    for question, context in list(sample_questions())[::5]:
        encoding = tokenizer(
            question["question"], context, return_tensors="pt", return_offsets_mapping=True
        )
        offsets = encoding.pop("offset_mapping")[0].tolist()
        places = [i for i, sequence in enumerate(encoding.sequence_ids(0)) if sequence == 1]
        with torch.inference_mode():
            output = model(**encoding)
        best = (-math.inf, None)
        for first, last in itertools.combinations_with_replacement(places, 2):
            score = (output.start_logits[0, first] + output.end_logits[0, last]).item()
            if last - first < 30:
                best = max(best, (score, context[offsets[first][0] : offsets[last][1]]))
        assert best[1] == predictions[question["id"]]


def test_trace_is_small_and_has_the_phases(sample):
    [trace] = sample[0].glob("tensorboard/*.pt.trace.json.gz")
    assert trace.name.startswith("rank0.")
    assert trace.stat().st_size < 50e6
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {"data", "forward", "backward", "optimizer"} <= set(names)
    assert len({name for name in names if str(name).startswith("ProfilerStep#")}) == 2


LEFT = {"results.json", "timings.json", "predictions.json", "model", "tensorboard"}


def test_nothing_else_is_left(sample):
    assert {path.name for path in sample[0].iterdir()} == LEFT


def test_finished_run_is_left_alone(sample, start):
    before = {path: path.stat().st_mtime_ns for path in sample[0].rglob("*")}
    text = start("--sample", "--output", sample[0]).end()
    assert "finished" in text and text.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in sample[0].rglob("*")} == before


def test_report_reads_the_run(sample):
    text = command(sys.executable, BASELINE / "report.py", sample[0]).stdout
    for words in ("# Report", "## Environment", "## Phases", "```mermaid"):
        assert words in text
    assert f"{read(sample[0])['exact_match']:.2f}" in text


def test_no_epochs_only_evaluate(sample, start, tmp_path):
    """From the trained model, on the file that it was trained on: the same answers."""
    words = ("--model", sample[0] / "model", "--epochs", 0, "--device", "cpu")
    words += ("--train-file", QUESTIONS, "--validation-file", QUESTIONS)
    output = tmp_path / "run"
    start(*words, "--output", output).end()
    assert {path.name for path in output.iterdir()} == LEFT
    assert read(output, "predictions.json") == read(sample[0], "predictions.json")
    results = read(output)
    assert results["steps"] == results["train_seconds"] == 0
    assert results["exact_match"] >= 90
    assert results["epoch_seconds"] == []
    for name in ("tokens_per_second", "steady_epoch_seconds", "padding_share"):
        assert results[name] is None
    assert read(output, "timings.json")["intervals"] == []
    assert "not measured" in command(sys.executable, BASELINE / "report.py", output).stdout


def test_files_are_for_those_whom_the_umask_lets(start, tmp_path):
    """Also the weights, which safetensors would keep from all others."""
    patch = "os.umask(0o027)\n"
    words = (*SMALL, "--profile", "--max-steps", 8, "--output", tmp_path / "run")
    start(*words, patch=patch).end()
    paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(paths) > 10
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


# 2. train.py alone


def test_alone_in_an_empty_folder(tiny_model, tmp_path):
    """With a model and questions, and nothing else of this project."""
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(BASELINE / "train.py", folder)
    shutil.copytree(tiny_model, folder / "my model")
    shutil.copy(QUESTIONS, folder)
    words = ("train.py", "--model", "my model", "--limit", 30, "--batch-size", 4, "--epochs", 2)
    words += ("--train-file", QUESTIONS.name, "--validation-file", QUESTIONS.name)
    words += ("--output", "run", "--device", "cpu")
    environment = {"SQUAD_CACHE": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = command(sys.executable, *words, folder=folder, **environment)
    assert done.stderr == ""
    output = folder / "run"
    assert {path.name for path in output.iterdir()} == LEFT
    assert len(read(output, "predictions.json")) == 30
    assert set(RESULTS) <= set(read(output))
    assert list(output.glob("tensorboard/*tfevents*"))
    assert list(output.glob("tensorboard/rank0.*.pt.trace.json.gz"))
    transformers.AutoModelForQuestionAnswering.from_pretrained(output / "model")
    # The features are kept beside it.
    assert list(folder.glob(".cache/features-*"))


def test_sample_alone_says_what_it_needs(start, tmp_path):
    script = shutil.copy(BASELINE / "train.py", tmp_path)
    text = start("--sample", "--output", tmp_path / "run", script=script).end(2)
    assert text.startswith("error: --sample needs ") and text.count("\n") == 1
    for words in ("baseline/sample", "--model", "--train-file", "--validation-file"):
        assert words in text
    assert not (tmp_path / "run").exists()


# 3. Evaluation after each epoch


def test_evaluations_after_each_epoch(start, tmp_path):
    # Two seconds in each evaluation, which are no training.
    patch = (
        "def find_answers(*given, was=find_answers):\n    time.sleep(2)\n    return was(*given)\n"
    )
    words = (*SMALL, "--dropout", 0.1)
    output = tmp_path / "epoch"
    text = start(*words, "--evaluate-every", "epoch", "--output", output, patch=patch).end()
    start(*words, "--evaluate-every", "end", "--output", tmp_path / "end").end()
    evaluations = read(output)["evaluations"]
    assert [one["step"] for one in evaluations] == [6, 12, 18]
    assert [one["epoch"] for one in evaluations] == [1, 2, 3]
    for name in ("exact_match", "f1"):
        values = [one[name] for one in evaluations]
        assert values[-1] == read(output)[name] == read(tmp_path / "end")[name]
        assert len(set(values)) > 1
        curve = EventAccumulator(str(output / "tensorboard")).Reload().Scalars(f"evaluation/{name}")
        assert [(point.step, point.value) for point in curve] == [
            (one["step"], pytest.approx(one[name])) for one in evaluations
        ]
    for one in evaluations:
        assert f"exact match {one['exact_match']:.2f}, F1 {one['f1']:.2f}\n" in text
    # It changes nothing in the training.
    assert losses(output) == losses(tmp_path / "end")
    assert read(output, "predictions.json") == read(tmp_path / "end", "predictions.json")
    [one] = read(tmp_path / "end")["evaluations"]
    assert one["step"] == 18


def test_seconds_of_training_have_no_evaluation_in_them(start, tmp_path):
    patch = (
        "def find_answers(*given, was=find_answers):\n    time.sleep(2)\n    return was(*given)\n"
    )
    start(*SMALL, "--evaluate-every", "epoch", "--output", tmp_path / "run", patch=patch).end()
    results = read(tmp_path / "run")
    steps = sum(one["seconds"] for one in read(tmp_path / "run", "timings.json")["intervals"])
    assert steps <= results["train_seconds"] < steps + 2
    assert sum(results["epoch_seconds"]) == pytest.approx(results["train_seconds"])
    assert results["evaluate_seconds"] >= 2
    assert results["total_seconds"] > results["train_seconds"] + 6
    seconds = [evaluation["train_seconds"] for evaluation in results["evaluations"]]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == pytest.approx(results["train_seconds"])


# 4. Figures


def one_length(tmp_path, count):
    """A file of questions that all have as many tokens."""
    question, context = next(sample_questions())
    questions = [{**question, "id": str(number)} for number in range(count)]
    document = {"data": [{"paragraphs": [{"context": context, "qas": questions}]}]}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_flops_and_utilization(batching, tiny_model, start, tmp_path):
    """By the formula, on a device of half a TFLOP/s."""
    path = one_length(tmp_path, 16)
    patch = "def processor_name():\n    return 'NVIDIA ABACUS-40GB'\n"
    patch += "PEAKS['ABACUS'] = {'fp32': 0.5, 'bf16': 100}\n"
    words = ("--model", tiny_model, "--train-file", path, "--validation-file", path)
    words += ("--batch-size", 4, "--epochs", 5, "--max-length", 256, "--batching", batching)
    words += ("--device", "cpu", "--output", tmp_path / "run", "--no-profile")
    text = start(*words, patch=patch).end()
    results = read(tmp_path / "run")
    tokens_per_epoch = results["steady_epoch_seconds"] * results["tokens_per_second"]
    length = tokens_per_epoch / results["train_features"]
    assert length == pytest.approx(round(length))
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    size = config.hidden_size
    layers = config.num_hidden_layers
    matrices = layers * (4 * size**2 + 2 * size * config.intermediate_size) + 2 * size
    flops_per_token = 6 * matrices + 12 * layers * size * length
    flops_per_second = results["tokens_per_second"] * flops_per_token
    assert results["flops_per_second"] == pytest.approx(flops_per_second)
    assert results["model_flops_utilization"] == pytest.approx(flops_per_second / 0.5e12)
    assert results["environment"]["devices"] == ["NVIDIA ABACUS-40GB"]
    assert "1 x NVIDIA ABACUS-40GB" in text
    if batching == "padded":
        assert results["padding_share"] == pytest.approx(1 - length / 256)


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA A100-PCIE-40GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA L40S", "fp32", 91.6),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("CPU Intel(R) Xeon(R) Processor", "fp32", None),
    ],
)
def test_peaks_of_devices(train, device, precision, peak):
    args = train.parse_arguments(["--sample", "--device", "cpu"])
    args.precision = precision
    share = train.model_flops_utilization(1e14, args, {"devices": [device]})
    assert share == (peak and pytest.approx(100 / peak))


def test_epochs_share_an_interval_by_its_steps(train):
    """Four steps per epoch, intervals of one, two and three steps."""
    intervals = [
        {"step": 1, "steps": 1, "wall_seconds": 5.0},
        {"step": 3, "steps": 2, "wall_seconds": 3.0},
        {"step": 6, "steps": 3, "wall_seconds": 7.0},
    ]
    assert train.share_epochs(intervals, 4) == pytest.approx([5 + 3 + 7 / 3, 2 * 7 / 3])


def test_padding_is_counted(start, tmp_path):
    words = ("--max-length", 200, "--stride", 20, "--max-steps", 6)
    shares = {}
    for batching in ("padded", "dynamic", "bucketed", "packed"):
        output = tmp_path / batching
        start(*SMALL, *words, "--batching", batching, "--output", output).end()
        shares[batching] = read(output)["padding_share"]
        pairs = read(output, "timings.json")["tokens_per_step"]
        real = sum(tokens for tokens, _ in pairs)
        computed = sum(tokens for _, tokens in pairs)
        assert shares[batching] == pytest.approx(1 - real / computed)
        assert real == sum(one["tokens"] for one in read(output, "timings.json")["intervals"])
    # Six steps of four rows are an epoch, so all batchings have the same tokens.
    assert shares["padded"] == pytest.approx(1 - real / (6 * 4 * 200))
    assert shares["padded"] > shares["dynamic"] > shares["bucketed"] > shares["packed"] > 0


def test_run_without_a_steady_state(start, tmp_path):
    patch = "def find_steady_steps(plan, *given):\n    return np.zeros(len(plan['width']), bool)\n"
    text = start(*SMALL, "--max-steps", 3, "--output", tmp_path / "run", patch=patch).end()
    results = read(tmp_path / "run")
    for name in ("tokens_per_second", "features_per_second", "steady_epoch_seconds"):
        assert results[name] is None
    assert results["flops_per_second"] is results["model_flops_utilization"] is None
    assert results["train_seconds"] > 0
    # The phases are then those of all steps.
    assert 0.5 < read(tmp_path / "run", "timings.json")["phases"]["backward"]["share"] + 0.3 < 1.3
    assert re.search("an epoch +not measured", text)


def test_environment(start, tmp_path):
    slurm = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}
    start(*SMALL, "--max-steps", 1, "--output", tmp_path / "run", **slurm).end()
    results = read(tmp_path / "run")
    environment = results["environment"]
    assert environment["slurm_job_id"] == "77"
    assert environment["restarts"] == results["restarts"] == 2
    assert torch.__version__.startswith(environment["torch"])
    assert environment["transformers"] == transformers.__version__
    assert environment["python"] == sys.version.split()[0]
    assert environment["hosts"] == [os.uname().nodename]
    assert environment["devices"][0].startswith("CPU ")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert environment["commit"] == (git.stdout.strip() or None)
    assert isinstance(environment["dirty"], bool)


# 5. One seed, one training


def test_one_seed_gives_one_training(start, tmp_path):
    words = ("--sample", "--limit", 40, "--max-steps", 6, "--log-every", 1, "--dropout", 0.1)
    options = {"one": [], "two": ["--no-profile", "--log-every", 3], "other": ["--seed", 43]}
    weights = {}
    for name, more in options.items():
        start(*words, *more, "--output", tmp_path / name).end()
        path = tmp_path / name / "model/model.safetensors"
        weights[name] = safetensors.torch.load_file(path)
    for name, tensor in weights["one"].items():
        assert torch.equal(weights["two"][name], tensor)
    assert not torch.equal(
        weights["other"]["qa_outputs.weight"], weights["one"]["qa_outputs.weight"]
    )
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "one") != losses(tmp_path / "other")


@pytest.mark.slow
def test_accumulation_changes_no_loss(start, tmp_path):
    for accumulate in (1, 4):
        words = ("--sample", "--max-steps", 3, "--log-every", 1, "--no-profile")
        output = tmp_path / str(accumulate)
        start(*words, "--accumulate", accumulate, "--output", output).end()
    one = losses(tmp_path / "1")
    four = losses(tmp_path / "4")
    # --max-steps ends in the middle of an epoch.
    assert len(one) == len(four) == 3
    for expected, found in zip(one, four):
        assert found == pytest.approx(expected, abs=1e-5)


def test_real_data_and_a_real_model(squad, minilm, start, tmp_path):
    words = ("--model", minilm, "--device", "cpu", "--limit", 16, "--max-steps", 2)
    words += ("--train-file", squad / "train.json", "--validation-file", squad / "dev.json")
    text = start(*words, "--batch-size", 4, "--output", tmp_path / "run").end()
    assert not NOISE.search(text), text
    assert len(read(tmp_path / "run", "predictions.json")) == 16


# 6. Options


def test_prepare_leaves_features_alone(start, tmp_path):
    cache = tmp_path / "cache"
    words = (*SMALL, "--output", tmp_path / "run")
    text = start(*SMALL, "--prepare", SQUAD_CACHE=str(cache)).end()
    assert text.splitlines()[-1].startswith("ready: ")
    assert len(list(cache.iterdir())) == 2
    assert "from the cache" in start(*words, SQUAD_CACHE=str(cache)).end()
    assert read(tmp_path / "run")["features_cached"] is True


@pytest.mark.parametrize(
    "attention",
    ["F.scaled_dot_product_attention(query, key, value)", "query * float('nan')"],
    ids=["beyond its sequence", "no number"],
)
def test_wrong_packed_attention_is_refused(attention, start, tmp_path):
    patch = "def wrong(module, query, key, value, *given, **more):\n"
    patch += f"    return ({attention}).transpose(1, 2), None\n"
    patch += "transformers.AttentionInterface.register('packed_loop', wrong)\n"
    words = (*SMALL, "--max-steps", 1, "--output", tmp_path / "run")
    line = start(*words, patch=patch).end(2).splitlines()[-1]
    assert line.startswith("error: --batching packed is wrong with this model")
    assert "give bucketed" in line
    start(*words, "--batching", "bucketed", patch=patch).end()


def test_results_do_not_claim_a_compilation_that_was_not(start, tmp_path):
    words = (*SMALL, "--max-steps", 2, "--batching", "bucketed", "--compile")
    text = start(*words, "--output", tmp_path / "run", CXX="no-compiler").end()
    assert "not compiling: this node has no no-compiler" in text
    assert read(tmp_path / "run")["arguments"]["compile"] is False


def test_a_log_that_cannot_be_written_costs_no_run(start, tmp_path):
    """As when Ctrl-C ends `| tee`, or where the log's disk is full and --output's is not."""
    words = (*SMALL, "--max-steps", 2, "--output", tmp_path / "run")
    start(*words, patch="sys.stdout = open('/dev/full', 'w')").end()
    assert read(tmp_path / "run")["steps"] == 2


INTERFACE = """--model --train-file --validation-file --sample --limit --max-length --stride
    --epochs --max-steps --evaluate-every --batch-size --accumulate --batching --device --precision
    --compile --no-compile --cuda-graph --learning-rate --warmup --weight-decay --dropout --seed --output
    --log-every --save-every --profile --no-profile"""


def test_help_fits_two_screens_and_has_every_option(start, train):
    text = start("--help", COLUMNS="100").end()
    assert len(text.splitlines()) <= 80
    assert max(len(line) for line in text.splitlines()) <= 100
    for option in INTERFACE.split():
        assert option in text, option
    source = (BASELINE / "train.py").read_text(encoding="utf-8")
    for name in vars(train.make_parser().parse_args([])):
        assert f"args.{name}" in source, f"--{name} does nothing"


def test_defaults_are_those_of_the_interface(train, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    args = train.parse_arguments(["--device", "cpu"])
    expected = {
        "model": "google-bert/bert-base-uncased",
        "train_file": None,
        "limit": None,
        "max_length": 384,
        "stride": 128,
        "epochs": 3,
        "max_steps": None,
        "evaluate_every": "epoch",
        "batch_size": 32,
        "accumulate": 1,
        "batching": "packed",
        "precision": "fp32",
        "compile": False,
        "cuda_graph": False,
        "learning_rate": 5e-5,
        "warmup": 0.1,
        "weight_decay": 0.01,
        "dropout": None,
        "seed": 42,
        "log_every": 10,
        "save_every": None,
        "profile": True,
    }
    for name, value in expected.items():
        assert getattr(args, name) == value, name
    assert re.fullmatch(r"runs/baseline-\d{8}-\d{6}", args.output)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    args = train.parse_arguments(["--sample", "--dropout", "0.2"])
    assert args.output == "runs/baseline-77"
    assert (args.epochs, args.batch_size, args.learning_rate) == (20, 16, 1e-3)
    assert args.dropout == 0.2
    assert args.evaluate_every == "end"
    assert train.parse_arguments(["--limit", "9"]).evaluate_every == "end"


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["--batch-size", 12], 3.1e-5),
        ([], 5e-5),
        (["--batch-size", 512], 2e-4),
        (["--batch-size", 512, "--learning-rate", 1e-4], 1e-4),
        (["--sample", "--batch-size", 512], 1e-3),
    ],
)
def test_learning_rate_by_the_batch(train, words, rate):
    """As published runs support it: 5e-5 x sqrt(batch / 32)."""
    args = train.parse_arguments([str(word) for word in words])
    assert args.learning_rate == pytest.approx(rate, rel=0.02)


def test_the_log_says_the_learning_rate_and_its_batch(train, capsys):
    plan = {"features": torch.zeros(3, 1, 512), "steps_per_epoch": 3}
    train.log_plan(train.parse_arguments(["--batch-size", "512"]), plan)
    assert "peak learning rate 2.0e-04 = 5e-5 x sqrt(batch 512 / 32)\n" in capsys.readouterr().out
    train.log_plan(train.parse_arguments(["--learning-rate", "1e-4"]), plan)
    assert "peak learning rate 1.0e-04\n" in capsys.readouterr().out


def test_learning_rate_is_a_function_of_the_step(train):
    """Up to its peak in a tenth of the steps, then down in a line to nothing."""
    factors = [train.learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factors[10:] == pytest.approx([1 - step / 90 for step in range(90)])

"""Predicts how long a training step takes on a GPU, from what the step launches: a roofline.

    python baseline/benchmarks/predict.py
    python baseline/benchmarks/predict.py --measured RUN...    beside runs on a GPU of these kinds

It reads what record_steps.py has recorded on GPUs that compute nothing (results/fake-gpu/): all
that a step launches, with its FLOP and its bytes. It writes tables, results/predicted.json, and
prints them; or it prints one of what these runs took.

A kernel takes the longest of three: its FLOP at the rate that such kernels reach, its bytes at the
memory's bandwidth, and the time of the smallest kernel. Their sum times a factor, fitted to what
others have published, is the step. It cannot be shorter than the host's time to launch it.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import measuring

RECORDED = measuring.RESULTS / "fake-gpu"
BATCH_SIZES = (32, 128, 512)
# The features of SQuAD v1.1's training questions, 384 tokens with a stride of 128.
EPOCH_FEATURES = 88492
# The rungs of ladder.sbatch: each keeps what those before it have changed.
RUNGS = {
    "fp32": "--precision fp32 --batching padded --no-fused --no-compile",
    "tf32": "--precision tf32 --batching padded --no-fused --no-compile",
    "bf16": "--batching padded --no-fused --no-compile",
    "fused": "--batching padded --no-compile",
    "dynamic": "--batching dynamic --no-compile",
    "bucketed": "--batching bucketed --no-compile",
    "packed": "--no-compile",
    "compiled": "--compile",
    "graphed": "--compile --cuda-graph",
}
# The steps of train.py that are nearest to what others have measured (PUBLISHED, below).
PUBLISHED_STEPS = {
    "BERT-Base, fp32, 48": "--batch-size 48 --batching padded --no-compile --precision fp32",
    "BERT-Base, TF32, 48": "--batch-size 48 --batching padded --no-compile --precision tf32",
    "BERT-Base, bf16, 48": "--batch-size 48 --batching padded --no-compile",
    "BERT-Base, bf16, 160": "--batch-size 160 --batching padded --no-compile",
    "BERT-Base, bf16, compiled, 160": "--batch-size 160 --batching padded --compile",
    "BERT-Large, bf16, 32": "--batch-size 32 --batching padded --no-compile",
    "BERT-Large, MLPerf's lengths, packed, 56": "--batch-size 56 --max-length 512 --compile",
}


# 1. The roofline


@dataclasses.dataclass
class Gpu:
    """rates: the FLOP/s that kernels of a unit reach; bandwidth: the bytes/s that they reach.

    Of the data sheet's peak (NVIDIA: A100 312, 156 and 19.5 TFLOP/s in bf16, TF32 and fp32, H100
    SXM 989, 495 and 67) cuBLAS reaches some 80 % in the tensor cores, 95 % outside them, and a
    kernel that only moves data 80 % of the bandwidth. Flash attention is taken for a third of what
    its authors reach with long sequences and no dropout (50 to 73 % of an A100's peak, Dao 2023),
    memory-efficient attention with a mask for two thirds of that, fp32 for half of bf16, an H100
    for twice an A100. What these assumptions miss, one factor of the calibration puts right."""

    rates: dict
    bandwidth: float


def make_gpu(bf16, tf32, fp32, flash, bandwidth):
    """Takes the data sheet's TFLOP/s and TB/s, and the TFLOP/s that flash attention reaches."""
    rates = {"bf16": 0.8 * bf16, "tf32": 0.8 * tf32, "fp32": 0.95 * fp32}
    rates |= {"flash": flash, "efficient": flash * 2 / 3, "efficient fp32": flash / 3}
    return Gpu({unit: rate * 1e12 for unit, rate in rates.items()}, 0.8 * bandwidth * 1e12)


GPUS = {
    "A100-PCIe-40GB": make_gpu(312, 156, 19.5, 64, 1.555),
    "A100-PCIe-80GB": make_gpu(312, 156, 19.5, 64, 1.935),
    "A100-SXM-40GB": make_gpu(312, 156, 19.5, 64, 1.555),
    "A100-SXM-80GB": make_gpu(312, 156, 19.5, 64, 2.039),
    "H100-SXM": make_gpu(989, 495, 67, 128, 3.35),
    # Multiplications in fp8, which train.py has not: for one of the published measurements.
    "H100-SXM, fp8": make_gpu(1979, 495, 67, 128, 3.35),
}
# Which of them a recording's GPU stands for.
CARDS = {"a100": "A100-PCIe-40GB", "h100": "H100-SXM"}
A100_PROCESSORS = 108
# An empty kernel, and the gap to the next one.
SMALLEST_KERNEL_SECONDS = 2e-6

# Kernels that are alike: their unit is a key of Gpu.rates, or "" where they only move data.
Work = collections.namedtuple("Work", ["name", "unit", "flops", "bytes", "count"])


def kernel_seconds(work, gpu):
    """Returns the seconds of all of the kernels of a Work."""
    computing = work.flops / gpu.rates[work.unit] if work.unit else 0
    moving = work.bytes / gpu.bandwidth
    return work.count * max(computing, moving, SMALLEST_KERNEL_SECONDS)


def device_seconds(step, gpu):
    """Returns a recorded step's seconds on a GPU, before the factor of the calibration."""
    return sum(kernel_seconds(Work(*work), gpu) for work in step["work"])


# 2. Calibration: what others have measured

# A Trainer's epoch of 88,492 features took 234.58 s where the same authors' loop took 216.73: the
# rest is the GPU waiting for the Trainer, which reads each step's loss.
TRAINER_WAITS = (234.58 - 216.73) / EPOCH_FEATURES

# step: of PUBLISHED_STEPS; seconds: for each feature, Trainer's waits taken off; peak_gib: theirs.
Published = collections.namedtuple("Published", ["step", "card", "source", "seconds", "peak_gib"])

LOOP = "HPCtools4AI, loop"
TRAINER = "HPCtools4AI, Trainer"
NVIDIA = "NVIDIA DeepLearningExamples, fp16"
MLPERF = "MLPerf Training 2.1 and 3.0"

# HPCtools4AI: github.com/juanmaxtouyaa/HPCtools4AI, BASELINE/EXPERIMENTS.md and DISTRIBUTED, on
# FinisTerrae III's A100. Trainer's times are of 4,183 features; compiled, of 33,071: what a run of
# three epochs took longer than one of one. Left out is its batch of 12, where the GPU waits for the
# host. MLPerf: sequences/s per GPU, of four PCIe or eight SXM; its code fuses more than ours.
PUBLISHED = [
    Published("BERT-Base, fp32, 48", "A100-PCIe-40GB", TRAINER, 59.63 / 4183, 12.46),
    Published("BERT-Base, TF32, 48", "A100-PCIe-40GB", TRAINER, 19.55 / 4183, None),
    Published("BERT-Base, bf16, 48", "A100-PCIe-40GB", TRAINER, 12.26 / 4183, 8.61),
    Published("BERT-Base, bf16, 160", "A100-PCIe-40GB", LOOP, 216.73 / 88492, 25.2),
    Published(
        "BERT-Base, bf16, compiled, 160",
        "A100-PCIe-40GB",
        TRAINER,
        (297.00 - 151.31) / 2 / 33071,
        None,
    ),
    Published("BERT-Large, MLPerf's lengths, packed, 56", "A100-PCIe-80GB", MLPERF, 1 / 234, None),
    Published("BERT-Large, MLPerf's lengths, packed, 56", "A100-SXM-80GB", MLPERF, 1 / 302, None),
    Published("BERT-Large, MLPerf's lengths, packed, 56", "H100-SXM, fp8", MLPERF, 1 / 970, None),
    Published("BERT-Large, bf16, 32", "A100-SXM-40GB", NVIDIA, 1 / 110.5, None),
]


@dataclasses.dataclass
class Calibration:
    """factor: what the roofline's seconds are multiplied by, the geometric mean over A100-PCIe;
    errors: how much too short or too long that leaves those rows; errors_elsewhere: the others."""

    factor: float
    errors: list
    errors_elsewhere: list


def published_seconds(published, step):
    """Returns the seconds that others have measured for a step, without Trainer's waits."""
    waits = TRAINER_WAITS if published.source == TRAINER else 0
    return (published.seconds - waits) * step["features"]


def calibrate(steps):
    """Fits the factor to the A100-PCIe's rows, and compares it with all of them."""
    ratios = {True: [], False: []}
    for published in PUBLISHED:
        step = steps[published.step]
        roofline = device_seconds(step, GPUS[published.card])
        on_target = published.card.startswith("A100-PCIe")
        ratios[on_target].append(published_seconds(published, step) / roofline)
    factor = statistics.geometric_mean(ratios[True])
    errors = {place: [factor / ratio - 1 for ratio in ratios[place]] for place in ratios}
    return Calibration(factor, errors[True], errors[False])


def calibration_table(recorded, calibration):
    rows = []
    for published in PUBLISHED:
        step = recorded["a100"]["steps"][published.step]
        seconds = published_seconds(published, step)
        predicted = calibration.factor * device_seconds(step, GPUS[published.card])
        row = [published.step, published.card, published.source, milliseconds(seconds)]
        row += [milliseconds(predicted), f"{predicted / seconds - 1:+.0%}"]
        row += [published.peak_gib or "-", step["peak_gib"] if published.peak_gib else "-"]
        rows.append(row)
    return make_table(
        "Predicted against published",
        f"a step, published and predicted: the roofline times {calibration.factor:.2f}, fitted to"
        f" the A100-PCIe; Trainer's without {1000 * TRAINER_WAITS:.2f} ms a feature, its own waits;"
        " published in fp16 or fp8 is recorded in bf16",
        ["step", "card", "source", "published ms", "predicted ms", "off by"]
        + ["published peak GiB", "recorded peak GiB"],
        rows,
        recorded["a100"],
    )


# 3. The ladder


def predicted_step(steps, rung, batch_size, gpu, factor):
    """Returns seconds of the device and of the host for a step, or None where it does not fit."""
    step = steps[f"{rung} {batch_size}"]
    if step is None:
        return None
    # Replaying a graph launches it as one: what it holds is what was compiled.
    launched = steps[f"compiled {batch_size}"] if rung == "graphed" else step
    return factor * device_seconds(launched, gpu), step["host_ms"] / 1000


def epoch_cell(predicted, batch_size):
    """Shows an epoch's seconds; where the host takes longer than the device, its own too."""
    if predicted is None:
        return "does not fit"
    device, host = (seconds * EPOCH_FEATURES / batch_size for seconds in predicted)
    return f"{device:,.0f} (host {host:,.0f})" if host > device else f"{device:,.0f}"


def epochs_table(recorded, calibration):
    """An epoch's seconds: a row for each rung, a column for each card and batch size."""
    places = [(name, batch_size) for name in CARDS for batch_size in BATCH_SIZES]
    rows = []
    for rung in RUNGS:
        row = [rung]
        for name, batch_size in places:
            gpu = GPUS[CARDS[name]]
            steps = recorded[name]["steps"]
            predicted = predicted_step(steps, rung, batch_size, gpu, calibration.factor)
            row.append(epoch_cell(predicted, batch_size))
        rows.append(row)
    columns = ["rung"] + [f"{CARDS[name]}, batch {batch_size}" for name, batch_size in places]
    return make_table(
        "An epoch of BERT-Base on SQuAD v1.1, predicted, in seconds",
        f"predicted, not measured: a roofline over what a step launches, times"
        f" {calibration.factor:.2f}; against published measurements it errs by"
        f" {min(calibration.errors):+.0%} to {max(calibration.errors):+.0%} on an A100-PCIe, by"
        f" {min(calibration.errors_elsewhere):+.0%} to {max(calibration.errors_elsewhere):+.0%} on"
        " SXM cards, H100 among them; host: where launching took longer than that, on two slow and"
        " busy cores",
        columns,
        rows,
        *recorded.values(),
    )


def steps_table(recorded, name, calibration):
    """A row for each rung and batch size: a step on a card."""
    rows = []
    for batch_size in BATCH_SIZES:
        for rung in RUNGS:
            step = recorded[name]["steps"][f"{rung} {batch_size}"]
            gpu = GPUS[CARDS[name]]
            predicted = predicted_step(
                recorded[name]["steps"], rung, batch_size, gpu, calibration.factor
            )
            if predicted is None:
                rows.append([batch_size, rung, "does not fit", *["-"] * 5])
                continue
            device, host = map(milliseconds, predicted)
            counted = [step["micro_batches"], step["computed"], step["launches"], step["peak_gib"]]
            rows.append([batch_size, rung, device, host, *counted])
    return make_table(
        f"A step on {CARDS[name]}",
        "device: predicted, not measured; host: measured on slow and busy cores, without a driver;"
        " micro-batches: as few as fit, without what a driver takes of the memory; tokens: computed,"
        " padding among them; launches, tokens and peak memory: counted",
        ["batch", "rung", "device ms", "host ms", "micro-batches", "tokens", "launches"]
        + ["peak GiB"],
        rows,
        recorded[name],
    )


# 4. What was not done: functions of a step of BERT-Base that return the seconds saved, and say how

HIDDEN = 768
LAYERS = 12


def saved_by_one_multiplication(step, gpu):
    """two sums of gradients less for each layer; forward, fuller waves of tiles of 128 x 128"""

    def waves(columns):  # how much longer it takes as the last wave of tiles leaves some idle
        tiles = math.ceil(step["computed"] / 128) * math.ceil(columns / 128)
        return math.ceil(tiles / A100_PROCESSORS) * A100_PROCESSORS / tiles

    multiplying = 3 * 2 * step["computed"] * HIDDEN**2 / gpu.rates["bf16"]
    summing = 2 * 2 * step["computed"] * HIDDEN / gpu.bandwidth
    return LAYERS * (multiplying * (waves(HIDDEN) - waves(3 * HIDDEN)) + summing)


def saved_by_bf16_residuals(step, gpu):
    """24 LayerNorms move 6 bytes less for each number, and as many backward: 4 of an fp32 output
    that is there in bf16 too, 2 of the residual"""
    return 2 * LAYERS * 12 * step["computed"] * HIDDEN / gpu.bandwidth


def saved_by_clipping_in_adamw(step, gpu):
    """the recorded kernel that multiplies all gradients (fused AdamW can: grad_scale)"""
    works = [Work(*work) for work in step["work"]]
    return sum(kernel_seconds(work, gpu) for work in works if work.name == "_foreach_mul_")


def saved_by_one_cast(step, gpu):
    """the recorded casts of weights and of their gradients, without the bytes that they move"""
    saved = 0
    for work in map(Work._make, step["work"]):
        is_cast = re.fullmatch(r"triton_poi_fused__to_copy_\d+", work.name)
        if is_cast and work.bytes <= 6 * 4 * HIDDEN**2:  # the largest weight: fp32 in, bf16 out
            saved += kernel_seconds(work, gpu) - work.count * work.bytes / gpu.bandwidth
    return saved


def saved_by_combo_kernels(step, gpu):
    """324 of 1,033 launches less, counted once; but compiling took minutes in place of 14 s"""
    return 324 * SMALLEST_KERNEL_SECONDS


LEVERS = {
    "one multiplication for query, key and value": saved_by_one_multiplication,
    "residual and LayerNorm in bf16": saved_by_bf16_residuals,
    "clipping inside AdamW": saved_by_clipping_in_adamw,
    "casts once a step": saved_by_one_cast,
    "Inductor's combo_kernels": saved_by_combo_kernels,
}


def levers_table(recorded, calibration):
    gpu = GPUS["A100-PCIe-40GB"]
    steps = [recorded["a100"]["steps"][f"compiled {batch_size}"] for batch_size in (32, 128)]
    whole = [milliseconds(calibration.factor * device_seconds(step, gpu)) for step in steps]
    rows = [["the whole step", *whole, "the roofline"]]
    for lever, saved in LEVERS.items():
        seconds = [calibration.factor * saved(step, gpu) for step in steps]
        rows.append([lever, *map(milliseconds, seconds), " ".join(saved.__doc__.split())])
    return make_table(
        "What is not done, and would save",
        "ms of a step on an A100-PCIe-40GB, packed and compiled; predicted, not measured",
        ["lever", "batch 32", "batch 128", "how it was computed"],
        rows,
        recorded["a100"],
    )


# 5. What was measured


def settings_of(words):
    """Returns what RUNGS' words set, as results.json names it."""
    words = words.split()
    return {
        "precision": words[words.index("--precision") + 1] if "--precision" in words else "bf16",
        "batching": words[words.index("--batching") + 1] if "--batching" in words else "packed",
        "fused": "--no-fused" not in words,
        "compile": "--compile" in words,
        "cuda_graph": "--cuda-graph" in words,
    }


def step_name(arguments):
    """Returns the recorded step that a run's arguments are of, or None."""
    for rung, words in RUNGS.items():
        if all(arguments[name] == value for name, value in settings_of(words).items()):
            return f"{rung} {arguments['batch_size']}"
    return None


def measured_row(run, recorded, factor):
    """Returns a run's row: its step as it was measured and as it is predicted, in ms."""
    results = json.loads((Path(run) / "results.json").read_text())
    device = results["environment"]["devices"][0]
    name = "a100" if "A100" in device else "h100"
    steps = recorded[name]["steps"]
    found = step_name(results["arguments"])
    row = [Path(run).name, device]
    if not results["features_per_second"]:
        return [*row, "-", "-", "-", "not measured"]
    seconds = results["arguments"]["batch_size"] / results["features_per_second"]
    row.append(milliseconds(seconds))
    if not steps.get(found):
        return [*row, "-", "-", "not recorded"]
    rung, batch_size = found.split()
    predicted, _ = predicted_step(steps, rung, batch_size, GPUS[CARDS[name]], factor)
    return [*row, CARDS[name], milliseconds(predicted), f"{predicted / seconds - 1:+.0%}"]


def measured_table(runs, recorded, calibration):
    """A row for each run, whose GPU is taken for the kind of its generation that was recorded."""
    return make_table(
        "Predicted against measured",
        "ms of a step in the steady state; real tokens per step differ a little",
        ["run", "device", "measured ms", "predicted for", "predicted ms", "off by"],
        [measured_row(run, recorded, calibration.factor) for run in runs],
        *recorded.values(),
    )


# 6. Tables


def milliseconds(seconds):
    return round(1000 * seconds, 1)


def make_table(title, conditions, columns, rows, *recordings):
    """Returns a table as report.py prints it, with what its steps were recorded on."""
    environment = {}
    for name in ("date", "commit", "dirty", "devices", "python", "torch", "transformers"):
        facts = [recording["environment"][name] for recording in recordings]
        environment[name] = facts[0] if len(facts) == 1 else facts
    return {
        "title": title,
        "conditions": conditions,
        "columns": columns,
        "rows": rows,
        "environment": environment,
    }


def read_recorded():
    """Returns {card: what was recorded of it}."""
    return {name: json.loads((RECORDED / f"{name}.json").read_text()) for name in CARDS}


def make_tables():
    """Returns {file's name: its tables}, of what has been recorded."""
    recorded = read_recorded()
    calibration = calibrate(recorded["a100"]["steps"])
    details = [calibration_table(recorded, calibration)]
    details += [steps_table(recorded, name, calibration) for name in CARDS]
    details.append(levers_table(recorded, calibration))
    return {
        "predicted.json": [epochs_table(recorded, calibration)],
        "predicted-steps.json": details,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", metavar="RUN", nargs="+", help="folders with results.json")
    runs = parser.parse_args().measured
    if runs:
        recorded = read_recorded()
        table = measured_table(runs, recorded, calibrate(recorded["a100"]["steps"]))
        for row in [table["columns"], *table["rows"]]:
            print("| " + " | ".join(map(str, row)) + " |")
        return
    for name, tables in make_tables().items():
        path = measuring.RESULTS / name
        path.unlink(missing_ok=True)
        measuring.write_tables(path, tables)
        measuring.show_tables(path)


if __name__ == "__main__":
    main()

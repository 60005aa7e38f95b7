"""Predicts how long a training step takes on a GPU, from what the step launches: a roofline.

    python baseline/benchmarks/predict.py

It reads what record_steps.py has recorded on GPUs that compute nothing (results/fake-gpu/): all
that a step launches, with its FLOP and its bytes. It writes tables, results/predicted.json, and
prints them.

A kernel takes the longest of three: its FLOP at the rate that such kernels reach, its bytes at the
memory's bandwidth, and the time of the smallest kernel. Their sum times a factor, fitted to what
others have published, is the step. It cannot be shorter than the host's time to launch it.
"""

import collections
import dataclasses
import json
import math

import measuring

RECORDED = measuring.RESULTS / "fake-gpu"
PREDICTED = measuring.RESULTS / "predicted.json"
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
    kernel that only moves data 80 % of the bandwidth. Attention is taken for half as fast as
    FlashAttention 2 was measured at 512 tokens without dropout (Dao 2023), memory-efficient
    attention with a mask for two thirds of that, fp32 for half of bf16; twice that on an H100.
    What these shares miss, the calibration puts right."""

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

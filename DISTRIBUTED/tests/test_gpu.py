"""On one GPU: a rank of each strategy, with NCCL. Run by baseline/benchmarks/gpu_day.sh."""

import pytest
import torch
from ranks import SHORT, assert_same_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp", "hsdp"])
def test_one_rank_of_a_strategy_has_baselines_losses(ranks, strategy):
    words = [*SHORT, "--device", "cuda", "--precision", "fp32", "--no-compile"]
    baseline = ranks.once(0, *words)
    run = ranks.finished(1, *words, "--strategy", strategy)
    if "FAKE" in torch.cuda.get_device_name():
        pytest.skip("it ran, but a fake GPU has no values to compare")
    # Sums on a GPU have no fixed order.
    assert_same_training(baseline, run, tolerance=1e-3, least_steps=12)

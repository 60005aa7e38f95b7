"""What each strategy sends and keeps is what the page's formula says; what the ranks do together
beside the steps does not grow; and the page's diff for PowerSGD trains.

The counting is that of DISTRIBUTED/benchmarks/sent.py, whose tables stand in the page.
"""

import sys

import numpy as np
import pytest
from ranks import ROOT, TOLERANCE

sys.path.append(str(ROOT / "DISTRIBUTED/benchmarks"))

import sent


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("strategy", "gradients", "world"),
    [
        ("ddp", "bf16", 2),
        ("fsdp", "fp32", 2),
        slow("ddp", "fp32", 4),
        slow("zero2", "bf16", 4),
        slow("fsdp", "bf16", 4),
        slow("hsdp", "fp32", 4),
        slow("hsdp", "bf16", 4),
    ],
)
def test_a_rank_sends_and_keeps_what_the_formula_says(ranks, strategy, gradients, world):
    """But for dimensions that do not divide by the ranks, which are filled up."""
    counts, parameters = sent.count(ranks, world, strategy, gradients)
    shape = (parameters, sent.NODES, world // sent.NODES)
    formula, _ = sent.bytes_sent(strategy, gradients, *shape)
    counted = sent.sent_by_ring(sent.last_call(counts, "step"))
    assert counted == pytest.approx(formula, rel=0.002)
    kept = counts["kept"]["weights"] + counts["kept"]["gradients"] + counts["kept"]["moments"]
    assert kept == pytest.approx(sent.bytes_kept(strategy, *shape), rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "few", "many"), [("ddp", 2, 4), ("fsdp", 2, 16), ("hsdp", 4, 16)]
)
def test_what_ranks_do_beside_the_steps_does_not_grow_with_them(ranks, strategy, few, many):
    """Their collectives are as many, and no rank is sent files or scripts of all others."""
    counts = [sent.count(ranks, world, strategy, resumed=True)[0] for world in (few, many)]
    for place in {call["place"] for call in counts[0]["calls"]}:
        of_few, of_many = (sent.last_call(each, place) for each in counts)
        assert len(of_few) == len(of_many), place
        bytes_of_few, bytes_of_many = (
            sum(size for _, size, _ in collectives) for collectives in (of_few, of_many)
        )
        assert bytes_of_many <= many / few * bytes_of_few, place
        gathered = [size for name, size, _ in of_many if name == "allgather_"]
        assert sum(gathered) < 1000 * many, place


def test_powersgd_of_the_page(ranks, tmp_path):
    script = sent.powersgd_script(tmp_path / "powersgd")
    steps = sent.POWERSGD_START + 10
    words = [*sent.WORDS, "--max-steps", steps, "--strategy", "ddp"]
    exact = ranks.finished(2, *words)
    compressed = ranks.finished(2, *words, scripts=[script] * 2, patch=sent.COUNT)
    # The loss after the last exact gradient is still the same.
    same = sent.POWERSGD_START + 1
    differences = np.abs(compressed.column("loss") - exact.column("loss"))
    assert differences[:same].max() <= TOLERANCE
    assert 0 < differences[same:].max() < 0.1
    # A mean over two ranks, not made a sum again, would be half as long.
    norms = compressed.column("gradient_norm") / exact.column("gradient_norm")
    assert norms[: sent.POWERSGD_START] == pytest.approx(1, rel=1e-3)
    assert 0.7 < norms[sent.POWERSGD_START :].min() <= norms.max() < 1.4
    collectives = sent.last_call(compressed.read("counts-0.json"), "step")
    numbers = sum(size for _, size, _ in collectives) / 4
    sample = sent.empty_model(sent.transformers.AutoConfig.from_pretrained(sent.SAMPLE))
    assert numbers == sent.powersgd_numbers(sample) < sample.num_parameters() / 4

"""The optimiser and its schedule: what decays, at which rate each step learns, and clipping."""

import numpy as np
import pytest
import torch
from small import make_model, parse, run_training


# The schedule


@pytest.mark.parametrize("steps, warmup", [(1, 0.1), (2, 0.5), (10, 0), (100, 0.1), (99, 0.999)])
def test_the_schedule_is_a_line_up_and_a_line_down(train, steps, warmup):
    factors = [train.learning_rate_factor(step, steps, warmup) for step in range(steps)]
    rising = max(int(np.ceil(warmup * steps)), 1)
    falling = steps - rising
    np.testing.assert_allclose(factors[:rising], np.arange(1, rising + 1) / rising)
    np.testing.assert_allclose(factors[rising:], np.arange(falling, 0, -1) / max(falling, 1))
    assert max(factors) == factors[rising - 1] == 1
    assert min(factors) > 0, "every step learns"


def steps_of_adamw(monkeypatch, note):
    """Calls note(optimizer) before each of AdamW's steps, and returns the list of its answers."""
    notes = []
    usual = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        notes.append(note(self))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return notes


def test_training_follows_the_schedule(train, monkeypatch, tmp_path):
    rates = steps_of_adamw(monkeypatch, lambda adamw: [group["lr"] for group in adamw.param_groups])
    words = ["--max-steps", 10, "--learning-rate", 0.01, "--warmup", 0.3, "--log-every", 1]
    state = run_training(train, parse(train, *words), tmp_path)
    wanted = [0.01 * train.learning_rate_factor(step, 10, 0.3) for step in range(10)]
    assert rates == [[rate, rate] for rate in wanted]
    assert [interval["learning_rate"] for interval in state["intervals"]] == wanted


def test_each_group_keeps_its_own_peak(train, monkeypatch, tmp_path):
    """As where the head learns faster than the encoder."""
    rates = steps_of_adamw(monkeypatch, lambda adamw: [group["lr"] for group in adamw.param_groups])
    args = parse(train, "--max-steps", 8, "--learning-rate", 0.01)
    model = make_model(args)
    optimizer = train.make_optimizer(model, args)
    optimizer.param_groups[1]["peak_lr"] = 0.5
    run_training(train, args, tmp_path, model=model, optimizer=optimizer)
    factors = [train.learning_rate_factor(step, 8, args.warmup) for step in range(8)]
    assert rates == [[0.01 * factor, 0.5 * factor] for factor in factors]


# The optimiser


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_only_matrices_decay(train, fused):
    """With gradients of zero nothing else moves a weight."""
    args = parse(train, "--weight-decay", 0.5, fused)
    model = make_model(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = train.make_optimizer(model, args)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        stays = "bias" in name or "LayerNorm" in name
        wanted = before[name] if stays else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), wanted, msg=name)


def test_every_weight_is_in_one_group(train):
    args = parse(train)
    model = make_model(args)
    groups = train.make_optimizer(model, args).param_groups
    in_groups = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(in_groups) == sorted(id(parameter) for parameter in model.parameters())


def test_gradients_are_clipped_at_one(train, monkeypatch, tmp_path):
    """The norm in the log is that before clipping; the optimiser sees at most 1."""

    def gradient_norm(adamw):
        parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
        return torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item()

    norms = steps_of_adamw(monkeypatch, gradient_norm)
    args = parse(train, "--max-steps", 8, "--log-every", 1)
    state = run_training(train, args, tmp_path)
    logged = [interval["gradient_norm"] for interval in state["intervals"]]
    assert max(logged) > 1
    assert norms == pytest.approx(np.minimum(logged, 1), rel=1e-4)

"""On one GPU, the fast ways against the plain ones. Run by benchmarks/gpu_day.sh: pytest -m gpu.

On a stand-in for a GPU, which computes nothing, all is run, and then skipped where it would be
compared.
"""

import json

import numpy as np
import pytest
import torch
from nursery import in_step, send
from small import add_table, draw_lengths, make_features, make_model, parse, run_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# Relative errors. On a CPU, bf16 gave 0.005 for attention alone, and 0.04 for all of a model's
# gradients; attention that sees its neighbours gives about 1.
FP32 = 1e-4
BF16 = 0.03
BF16_GRADIENTS = 0.1


def compare(ours, wanted, tolerance):
    """Asserts that the difference of two tensors has at most this share of their norm."""
    if "FAKE" in torch.cuda.get_device_name():
        pytest.skip("it ran, but a fake GPU has no values to compare")
    ours = torch.as_tensor(ours).float().cpu()
    wanted = torch.as_tensor(wanted).float().cpu()
    assert (ours - wanted).norm() <= tolerance * wanted.norm()  # NaN is no such share


def one_step(train, batching, precision):
    """Returns the loss and the gradients, end to end, of one batch of the same features."""
    args = parse(train, "--device", "cuda", "--precision", precision, batching=batching)
    train.configure_libraries(args)
    device = torch.device("cuda")
    model = make_model(args).to(device)
    features = make_features(draw_lengths(args.batch_size))
    add_table(train, features, model, device)
    plan = train.plan_training(features["lengths"], args)
    train.plan_to_device(plan, device)
    batch = train.planned_batch(features["table"], plan, 0, 0)
    loss = train.SpanModel(model, args)(batch) / args.batch_size
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), ("bf16", BF16_GRADIENTS)])
@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_loss_and_gradients_equal_padded_ones(train, batching, precision, tolerance):
    padded_loss, padded_gradients = one_step(train, "padded", "fp32")
    loss, gradients = one_step(train, batching, precision)
    compare(gradients, padded_gradients, tolerance)
    compare(loss, padded_loss, tolerance)


def attention_inputs(lengths, heads=4, size=64):
    """Returns query, key and value [1, heads, tokens, size] in bf16, and where sequences begin."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, sum(lengths), heads, size)
    # In the memory's order of the model, where heads are parts of a token's vector.
    tensors = torch.randn(shape, generator=generator).bfloat16().transpose(2, 3)
    cu_seqlens = torch.tensor(np.append(0, np.cumsum(lengths)), dtype=torch.int32)
    return tensors, cu_seqlens


@pytest.mark.parametrize("lengths", [[384], [1, 2, 64, 129, 384], [170] * 32])
def test_flash_attention_equals_the_loop_on_a_cpu(train, lengths):
    """Outputs, and gradients of query, key and value."""
    tensors, cu_seqlens = attention_inputs(lengths)
    where = {"max_seqlen": max(lengths)}
    results = []
    for device, attention in (("cuda", train.packed_jagged), ("cpu", train.packed_loop)):
        # The CPU computes in fp32 from the same rounded numbers.
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        inputs = tensors.to(device, dtype, copy=True).requires_grad_()
        where["cu_seqlens"] = cu_seqlens.to(device)
        output, _ = attention(None, *inputs, None, **where)
        weights = torch.linspace(-1, 1, output.shape[1], device=device)
        (output * weights[:, None, None]).sum().backward()
        results.append((output.detach(), inputs.grad))
    (output, gradients), (wanted, wanted_gradients) = results
    compare(gradients, wanted_gradients, BF16)
    compare(output, wanted, BF16)


def test_attention_drops_the_share_that_it_is_told(train):
    """With the identity for values, the output is the attention's weights themselves."""
    length = 64
    tensors, cu_seqlens = attention_inputs([length] * 100)
    query, key, _ = tensors.cuda()
    identity = torch.eye(length).bfloat16().repeat(100, 1)[:, None].repeat(1, 4, 1)
    value = identity.transpose(0, 1)[None].cuda()
    where = {"cu_seqlens": cu_seqlens.cuda(), "max_seqlen": length}
    kept, _ = train.packed_jagged(None, query, key, value, None, **where)
    dropped, _ = train.packed_jagged(None, query, key, value, None, **where, dropout=0.1)
    compare(kept.float().sum(dim=-1), torch.ones(kept.shape[:3]), BF16)
    zeros = (dropped == 0) & (kept != 0)
    share = zeros.sum().item() / (kept != 0).sum().item()
    assert share == pytest.approx(0.1, abs=0.005)
    # What is kept is scaled up, so that the mean stays.
    compare(dropped[dropped != 0] * 0.9, kept[dropped != 0], BF16)


@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_cuda_graph_has_the_same_losses(train, tmp_path, batching, dropout):
    """With dropout too: each replay has the seed of its step."""
    losses = []
    for way in ([], ["--cuda-graph"]):
        words = ["--device", "cuda", "--precision", "bf16", "--dropout", dropout, *way]
        words += ["--max-steps", 30, "--log-every", 1, "--no-compile"]
        args = parse(train, *words, batching=batching)
        train.configure_libraries(args)
        model = make_model(args, attention_dropout=dropout, hidden_dropout=dropout)
        with torch.cuda.stream(torch.cuda.Stream()):
            state = run_training(train, args, tmp_path, model=model, device="cuda")
        losses.append([interval["loss"] for interval in state["intervals"]])
    assert len(losses[0]) == len(losses[1]) == 30
    compare(losses[1], losses[0], BF16)


def test_a_graph_is_handed_each_steps_learning_rate(train, tmp_path, monkeypatch):
    """Numbers, also in the step that recorded it, in which they were tensors on the device."""
    kinds = []
    unpatched = train.StepGraph.replay

    def replay(graph, step, interval):
        kinds.extend(type(group["lr"]) for group in graph.optimizer.param_groups)
        unpatched(graph, step, interval)

    monkeypatch.setattr(train.StepGraph, "replay", replay)
    words = ["--device", "cuda", "--cuda-graph", "--max-steps", 16, "--no-compile"]
    with torch.cuda.stream(torch.cuda.Stream()):
        run_training(train, parse(train, *words), tmp_path, device="cuda")
    assert kinds == [float] * 2 * 13


@pytest.mark.parametrize("more", [[], ["--cuda-graph"]], ids=["eager", "graph"])
def test_a_run_that_was_stopped_goes_on_with_the_same_losses(start, tmp_path, more):
    words = ["--sample", "--limit", 60, "--epochs", 8, "--device", "cuda", "--precision", "bf16"]
    words += ["--log-every", 1, "--no-compile", "--no-profile", *more]
    start(*words, "--output", tmp_path / "calm").end()
    words += ["--output", tmp_path / "stopped"]
    start(*words, patch=in_step(9, send("SIGUSR1"))).end(75)
    start(*words).end()
    losses = []
    for name in ("calm", "stopped"):
        timings = json.loads((tmp_path / name / "timings.json").read_text())
        losses.append([interval["loss"] for interval in timings["intervals"]])
    results = json.loads((tmp_path / "stopped/results.json").read_text())
    assert results["resumed_from_steps"] == [9]
    compare(losses[1], losses[0], BF16)

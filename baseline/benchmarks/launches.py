"""What a training step asks of the GPU: each kernel, multiplication, copy and wait, in order.

    with record() as rows:
        step(2)

It is recorded on a GPU that computes nothing (.ci/fake-gpu/run), so it is the same on any machine:
what is launched and how much memory it takes, never how long it takes.
"""

import contextlib
import ctypes
import tempfile
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch
import transformers

# seconds: the host's clock. kind: kernel, gemm (text: m n k batch type), copy, COPY (to the host,
# or blocking), memset, malloc, SYNC, record and wait (of events), nccl, capture, REFUSED, call
# (what else of CUDA was called), note. stream: its number, -1 where there is none.
Row = namedtuple("Row", ["seconds", "kind", "stream", "text"])
# What the GPU has to do for a step, each a launch for the host.
LAUNCHES = ["kernel", "gemm", "copy", "COPY", "memset", "nccl"]


def is_fake_gpu():
    """Whether this process runs under .ci/fake-gpu/run, with a torch that is built for CUDA."""
    return hasattr(ctypes.CDLL(None), "fakecuda_record") and torch.cuda.is_available()


@contextlib.contextmanager
def record():
    """Yields a list; when the block has ended, it has a Row for each call of CUDA within it."""
    fake = ctypes.CDLL(None)
    rows = []
    fake.fakecuda_clear()
    fake.fakecuda_record(1)
    try:
        yield rows
    finally:
        fake.fakecuda_record(0)
    with tempfile.NamedTemporaryFile("r") as file:
        fake.fakecuda_dump(file.name.encode())
        for line in file:
            seconds, kind, stream, text = line.rstrip("\n").split("\t")
            rows.append(Row(float(seconds), kind, int(stream), text))


def note(text):
    """Writes a row of the kind note, between those of CUDA's calls."""
    ctypes.CDLL(None).fakecuda_note(text.encode())


def draw_lengths(count):
    """Draws lengths spread as those of SQuAD's features: 172 tokens on average, 384 at most."""
    drawn = np.random.default_rng(0).gamma(6.5, 21.5, count).astype(int)
    return np.clip(drawn + 32, 40, 384)


def draw_features(lengths):
    """Returns features of these lengths, as train.py's build_features does; all tokens are 0."""
    tokens = int(lengths.sum())
    return {
        "input_ids": np.zeros(tokens, np.int32),
        "token_types": np.zeros(tokens, np.int8),
        "begin": np.append(0, np.cumsum(lengths)),
        "lengths": lengths,
        "start": np.full(len(lengths), 20, np.int32),
        "end": np.full(len(lengths), 21, np.int32),
    }


def make_step(train, words, config=None, count=3200, lengths=None):
    """Returns step(number), which trains that step, from 0, as train.py does with these words on
    its command line; step.model, step.plan, step.args and step.lengths are what it trains.

    train: baseline/train.py or its twin as a module, the twin with its ranks connected. config: a
    BertConfig, by default BERT-Base's. count: how many features are drawn; or lengths: theirs."""
    args = train.parse_arguments(["--device", "cuda", "--epochs", "1", *map(str, words)])
    train.configure_libraries(args)
    device = torch.device("cuda")
    if args.cuda_graph:
        torch.cuda.set_stream(torch.cuda.Stream())
    model = transformers.AutoModelForQuestionAnswering.from_config(
        config or transformers.BertConfig(),
        attn_implementation=args.attention,
        dtype=torch.float32,
    )
    model.to(device)
    if lengths is None:
        lengths = draw_lengths(count)
    features = draw_features(lengths)
    tokenizer = SimpleNamespace(pad_token_id=0)
    features["table"] = train.feature_table(features, tokenizer, model, device)
    plan = train.plan_training(lengths, args)
    train.plan_to_device(plan, device)
    if args.compile:
        train.compile_layers(model)
    span_model = train.SpanModel(model, args)
    clock = train.Clock(device)
    if hasattr(train, "wrap"):
        span_model = train.wrap(span_model, args, clock)
    span_model.train()
    optimizer = train.make_optimizer(model, args)
    steps = len(plan["features"])
    interval = train.Interval(device, steps, 0)
    graph = None

    def step(number):
        nonlocal graph
        factor = train.learning_rate_factor(number, steps, args.warmup)
        train.set_learning_rate(optimizer, factor)
        if args.cuda_graph and number == train.StepGraph.AFTER:
            graph = train.StepGraph(args, span_model, optimizer, features, plan, device)
        if graph:
            graph.replay(number, interval)
        else:
            train.training_step(
                args, number, span_model, optimizer, features, plan, clock, interval
            )

    step.args = args
    step.model = model
    step.plan = plan
    step.lengths = lengths
    return step

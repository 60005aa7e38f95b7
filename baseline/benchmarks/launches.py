"""What a training step asks of the GPU: each kernel, multiplication, copy and wait, in order.

    .ci/fake-gpu/run -- python baseline/benchmarks/launches.py      counts into results/launches.json

It is recorded on a GPU that computes nothing, so it is the same on any machine: what is launched
and how much memory it takes, never how long it takes. In Python:

    step = make_step(train, ["--batch-size", 32])
    with record() as rows:
        step(0)
"""

import contextlib
import ctypes
import gc
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers

RESULTS = Path(__file__).resolve().parents[1] / "results/launches.json"

# seconds: the host's clock. kind: kernel, gemm (text: m n k batch type), copy, COPY (to the host,
# or blocking), memset, malloc, SYNC, record and wait (of events), nccl, capture, REFUSED, call
# (what else of CUDA was called), note. stream: its number, -1 where there is none.
Row = namedtuple("Row", ["seconds", "kind", "stream", "text"])
# What the GPU has to do for a step, each a launch for the host.
LAUNCHES = ["kernel", "gemm", "copy", "COPY", "memset", "nccl"]
# What is counted, and the headings of the counts.
COUNTED = {
    "kernel": "kernels",
    "gemm": "multiplications",
    "copy": "copies",
    "memset": "fillings",
    "COPY": "copies to the host",
    "SYNC": "waits",
    "malloc": "allocations",
}


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
    """Returns step(number), which trains that step, as train.py does with these words on its
    command line. The steps begin at 0; with --cuda-graph step 3 is recorded. step.args, step.model,
    step.features and step.plan are what it trains with.

    train: baseline/train.py or its twin as a module, the twin with its ranks connected. config: a
    BertConfig, by default BERT-Base's. count: how many features are drawn; or lengths: theirs."""
    args = train.parse_arguments(["--device", "cuda", "--epochs", "1", *map(str, words)])
    train.configure_libraries(args)
    device = torch.device("cuda")
    stream = torch.cuda.Stream() if args.cuda_graph else torch.cuda.default_stream()
    torch.cuda.set_stream(stream)
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
    step.features = features
    step.plan = plan
    return step


# The settings that are counted, packed: train.py's words.
SETTINGS = [
    [*ways, "--batch-size", batch_size]
    for batch_size in (32, 128)
    for ways in (["--no-compile"], ["--compile"], ["--compile", "--cuda-graph"])
]


def count_launches(train):
    """Returns a table, as report.py prints it: of a step of BERT-Base in each of the settings."""
    rows = []
    for words in SETTINGS:
        torch._dynamo.reset()
        step = None
        # The memory of what was before: cuBLAS keeps a workspace for each stream that it has seen.
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = make_step(train, words)
        for number in range(4):  # they compile, allocate, and make the CUDA graph
            step(number)
        with record() as calls:
            step(4)
        counts = [sum(call.kind == kind for call in calls) for kind in COUNTED]
        launched = sum(call.kind in LAUNCHES for call in calls)
        memory = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        rows.append([" ".join(map(str, words)), *counts, launched, memory])
    gpu = torch.cuda.get_device_name()
    return {
        "title": f"What a step launches: {gpu}, torch {torch.__version__}",
        "conditions": "BERT-Base, packed, bf16; on a GPU that computes nothing, so nothing is timed",
        "columns": ["options", *COUNTED.values(), "launches", "peak GiB"],
        "rows": rows,
    }


def main():
    if not is_fake_gpu():
        sys.exit("error: this counts under .ci/fake-gpu/run, with a torch that is built for CUDA")
    import measuring

    train = measuring.load_train()
    table = count_launches(train)
    machine = measuring.describe_machine(train, "cuda")
    names = ("date", "commit", "dirty", "devices", "python", "torch", "transformers")
    table["environment"] = {name: machine[name] for name in names}
    measuring.write_tables(RESULTS, [table])
    measuring.show_tables(RESULTS)


if __name__ == "__main__":
    main()

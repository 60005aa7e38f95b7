"""Compares train.py with the usual ways of training the same model on the same features.

    python baseline/benchmarks/bench.py
    python baseline/benchmarks/bench.py --device cuda --batch-size 128

Writes baseline/results/bench.json, for report.py --table bench: two cores, fp32, a small BERT, 20
quiet minutes. With --device cuda bench-cuda.json: BERT-Base, bf16. Trainer and Lightning need
`pip install accelerate lightning`; what is missing or fails is left out, and named.

ours is train.py's own loop, packed and fused. The others read the same features: a plain loop as
the well-known examples write it; transformers' Trainer as it comes, and at its best; Lightning's.
They take turns (A B C A B C ...), so that a machine that others use slows all of them. A turn is a
fresh model, --warmup steps, and then --steps that count: from the end of an optimiser's step to the
end of a later one. Tokens are real ones: padding never counts. Trainer's best begins each group of
batches with its longest features, so let --steps be whole groups: of 10 batches with the small data
and batches of 32, of 50 on a GPU, where the features are repeated until an epoch has four such
groups. cuDNN's attention is off in all ways, as in train.py: where lengths change it would plan
anew most of the time.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import typing
import warnings
from pathlib import Path

import measuring
import numpy as np
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

LEARNING_RATE = 5e-5
# The arrays of a plan that have a row for each step.
PER_STEP = ("features", "width", "cu_seqlens", "count", "tokens", "squares", "computed")
# Trainer's group_by_length takes groups of 50 batches where an epoch has four of them.
GROUPED_BATCHES = 200


# 1. What all ways share


class Meter:
    """Times the steps of any loop alike: by a hook on torch's optimisers, and one on the model."""

    def __init__(self, options):
        self.first_step = options.warmup
        self.last_step = options.warmup + options.steps
        self.on_gpu = options.device == "cuda"
        register_optimizer_step_post_hook(self.after_step)

    def start(self):
        """Begins a turn."""
        self.steps = 0
        self.token_counts = []
        self.seconds = 0.0
        self.processor_seconds = 0.0

    def watch(self, model):
        """Counts the real tokens that the model is given."""
        # A Trainer that compiles its model would compile the hook too.
        hook = torch.compiler.disable(self.before_forward)
        model.register_forward_pre_hook(hook, with_kwargs=True)

    def before_forward(self, model, inputs, named_inputs):
        self.token_counts.append(named_inputs["attention_mask"].sum())  # stays on the device

    def after_step(self, optimizer, arguments, named_arguments):
        self.steps += 1
        if self.steps not in (self.first_step, self.last_step):
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.steps == self.first_step:
            self.begin = time.perf_counter()
            self.processor_begin = time.process_time()
        else:
            self.seconds = time.perf_counter() - self.begin
            self.processor_seconds = time.process_time() - self.processor_begin

    def tokens(self):
        """Returns the real tokens of the steps that count."""
        tokens = sum(int(count) for count in self.token_counts[self.first_step : self.last_step])
        if tokens == 0:
            raise RuntimeError("no token was counted, as on a GPU that computes nothing")
        return tokens


class Setup:
    """The model, the features and the settings that all ways share."""

    def __init__(self, options, train):
        self.options = options
        self.train = train
        self.total_steps = options.warmup + options.steps
        args = self.arguments(seed=0)
        train.configure_libraries(args)
        self.precision = args.precision
        self.on_gpu = args.device_type == "cuda"
        self.meter = Meter(options)
        self.tokenizer, self.config = train.load_tokenizer(args)
        if options.base:
            self.config = transformers.BertConfig(vocab_size=self.config.vocab_size)
        self.features = train.load_features(args.train_file, "train", self.tokenizer, args)
        self.rows = usual_rows(self.features)
        # Repeated, so that no turn meets an epoch's end with its short batch.
        batches = self.total_steps
        if self.on_gpu:
            batches = max(batches, GROUPED_BATCHES)
        self.repeats = math.ceil(batches * options.batch_size / len(self.rows))

    def arguments(self, seed):
        """Returns train.py's arguments."""
        options = self.options
        words = ["--model", str(options.model), "--device", options.device]
        if options.data:
            words += ["--train-file", str(options.data)]
        if options.precision:
            words += ["--precision", options.precision]
        words += ["--batch-size", str(options.batch_size), "--learning-rate", str(LEARNING_RATE)]
        words += ["--epochs", "1", "--evaluate-every", "end", "--no-profile", "--seed", str(seed)]
        return self.train.parse_arguments(words)

    def fresh_model(self, seed, precision=None):
        """Returns the model as transformers loads it, with transformers' own attention."""
        tf32 = (precision or self.precision) == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.manual_seed(seed)
        family = transformers.AutoModelForQuestionAnswering
        config = copy.deepcopy(self.config)
        if self.options.base:
            return family.from_config(config, dtype=torch.float32)
        return family.from_pretrained(self.options.model, config=config, dtype=torch.float32)

    def collator(self):
        """Returns dynamic padding: to the longest of each batch."""
        return transformers.DataCollatorWithPadding(self.tokenizer)

    def loader(self, batch_size):
        return DataLoader(
            self.rows * self.repeats,
            batch_size=batch_size,
            shuffle=True,
            drop_last=self.on_gpu,
            collate_fn=self.collator(),
        )


def usual_rows(features):
    """Returns train.py's features as one dictionary each, as a tokenizer gives them."""
    rows = []
    for window, length in enumerate(features["lengths"].tolist()):
        begin = features["begin"][window]
        row = {
            "input_ids": features["input_ids"][begin : begin + length].tolist(),
            "attention_mask": [1] * length,
            "start_positions": int(features["start"][window]),
            "end_positions": int(features["end"][window]),
        }
        if "token_types" in features:
            row["token_type_ids"] = features["token_types"][begin : begin + length].tolist()
        rows.append(row)
    return rows


# 2. The ways: each trains a fresh model and returns the real tokens of the steps that count


def plan_first_steps(setup, args):
    """Returns an epoch's plan cut to its first steps, so that shapes are those of a whole epoch."""
    count = len(setup.rows)
    lengths = np.tile(setup.features["lengths"], setup.repeats)
    plan = setup.train.plan_training(lengths, args)
    chosen = plan["features"]
    plan["features"] = np.where(chosen < 0, -1, chosen % count)
    for name in PER_STEP:
        plan[name] = plan[name][: setup.total_steps]
    return plan


def ours(setup, seed):
    train = setup.train
    args = setup.arguments(seed)
    device = torch.device(args.device_type)
    model = setup.fresh_model(seed).to(device)
    model.set_attn_implementation(args.attention)
    optimizer = train.make_optimizer(model, args)
    if args.compile and not train.compile_layers(model):
        sys.exit("error: ours is not compiled, as this node lacks a compiler: give it one")
    table = train.feature_table(setup.features, setup.tokenizer, model, device)
    features = {**setup.features, "table": table}
    plan = plan_first_steps(setup, args)
    train.plan_to_device(plan, device)
    state = train.new_state()
    setup.meter.start()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        with train.open_writer(output, state) as writer:
            train.train(
                args,
                output,
                train.SpanModel(model, args),
                optimizer,
                features,
                plan,
                train.Clock(device),
                state,
                writer,
                save=lambda: None,
                evaluate=None,  # it is never due
            )
    return int(plan["tokens"][setup.options.warmup :].sum())


def plain_loop(setup, seed, batch_size=None, precision=None):
    """As the examples write it: DataLoader, dynamic padding, AdamW, a scheduler, item()."""
    bf16 = (precision or setup.precision) == "bf16"
    device = setup.options.device
    loader = setup.loader(batch_size or setup.options.batch_size)
    model = setup.fresh_model(seed, precision)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = transformers.get_scheduler("linear", optimizer, 0, setup.total_steps)
    setup.meter.start()
    setup.meter.watch(model)
    total_loss = 0.0
    for batch in loader:
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total_loss += loss.item()
        if setup.meter.steps == setup.total_steps:
            break
    return setup.meter.tokens()


def trainer(setup, seed, **more):
    """transformers' Trainer with its defaults, and what more it is told."""
    model = setup.fresh_model(seed)
    setup.meter.start()
    setup.meter.watch(model)
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            max_steps=setup.total_steps,
            per_device_train_batch_size=setup.options.batch_size,
            learning_rate=LEARNING_RATE,
            seed=seed,
            use_cpu=not setup.on_gpu,
            bf16=setup.precision == "bf16",
            dataloader_drop_last=setup.on_gpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **more,
        )
        rows = setup.rows * setup.repeats
        transformers.Trainer(
            model, arguments, data_collator=setup.collator(), train_dataset=rows
        ).train()
    return setup.meter.tokens()


def trainer_at_its_best(setup, seed):
    best = {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    if setup.on_gpu:
        best["torch_compile"] = True
        best["dataloader_num_workers"] = 4
    return trainer(setup, seed, **best)


def lightning_trainer(setup, seed):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model.train()

        def training_step(self, batch, batch_index):
            loss = self.model(**batch).loss
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
            schedule = transformers.get_scheduler("linear", optimizer, 0, setup.total_steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    model = setup.fresh_model(seed)
    setup.meter.start()
    setup.meter.watch(model)
    lightning.Trainer(
        max_steps=setup.total_steps,
        accelerator="gpu" if setup.on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if setup.precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(model), setup.loader(setup.options.batch_size))
    return setup.meter.tokens()


# 3. Turns and the table


@dataclasses.dataclass
class Way:
    """A way of training: train(setup, seed) trains, and each turn adds to the speeds."""

    name: str
    train: typing.Callable
    batch_size: int
    speeds: list = dataclasses.field(default_factory=list)  # real tokens per second
    processor_speeds: list = dataclasses.field(default_factory=list)  # of the processor's time
    needs: str = None  # a package


def list_ways(setup):
    """Returns the ways that this machine can take, ours first; names those that it cannot."""
    size = setup.options.batch_size
    ways = [
        Way("ours (packed, fused)", ours, size),
        Way("(a) plain loop", plain_loop, size),
        Way("(b) Trainer, usual", trainer, size, needs="accelerate"),
        Way("(b) Trainer, best", trainer_at_its_best, size, needs="accelerate"),
        Way("(c) Lightning", lightning_trainer, size, needs="lightning"),
    ]
    if size > 12:
        # The batch of transformers' question-answering example.
        smaller = functools.partial(plain_loop, batch_size=12)
        ways.append(Way("(a) plain loop, batch of 12", smaller, 12))
    if setup.precision != "fp32":
        slower = functools.partial(plain_loop, precision="fp32")
        ways.append(Way("(a) plain loop, fp32", slower, size))
    possible = []
    for way in ways:
        if way.needs and not importlib.util.find_spec(way.needs):
            print(f"{way.name} is left out: it needs pip install {way.needs}", flush=True)
        else:
            possible.append(way)
    return possible


def take_turn(setup, way, seed):
    """Trains once and notes the speeds. Returns whether it went well; ours has to."""
    # A turn begins without the memory of the one before.
    gc.collect()
    torch.cuda.empty_cache()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its end
            tokens = way.train(setup, seed)
    except Exception as error:  # the others' errors have no common class
        if way.train is ours:
            raise
        print(f"{way.name} failed: {type(error).__name__}: {error}", flush=True)
        return False
    way.speeds.append(tokens / setup.meter.seconds)
    way.processor_speeds.append(tokens / setup.meter.processor_seconds)
    print(
        f"round {seed + 1}: {way.name}: {way.speeds[-1]:,.0f} tokens/s,"
        f" {way.processor_speeds[-1]:,.0f} per second of the processor",
        flush=True,
    )
    return True


def ratios(numerators, denominators):
    """Returns what the rounds' ratios are, one for each round that both have."""
    return [above / below for above, below in zip(numerators, denominators)]


def make_row(way, first_way, on_gpu):
    """Returns a way's row of the table."""
    faster = ratios(first_way.speeds, way.speeds)
    row = [
        way.name,
        way.batch_size,
        round(statistics.median(way.speeds)),
        f"{min(way.speeds):.0f} to {max(way.speeds):.0f}",
        round(statistics.median(faster), 2),
        f"{min(faster):.2f} to {max(faster):.2f}",
    ]
    if not on_gpu:
        by_processor = ratios(first_way.processor_speeds, way.processor_speeds)
        row.append(round(statistics.median(by_processor), 2))
    return row


def make_table(setup, ways):
    """Returns the table of the turns so far."""
    options = setup.options
    conditions = [
        "BERT-Base, random weights" if options.base else Path(options.model).name,
        f"{setup.precision} on {options.device}",
        f"{len(setup.rows):,} features of {options.data.name if options.data else 'SQuAD'}",
        f"{options.steps} steps a turn after {options.warmup} of warm-up",
        f"{len(ways[0].speeds)} rounds in turns in one process, medians",
        "tokens without padding",
        "faster by: ours to this one in the same round",
    ]
    columns = ["way", "batch", "real tokens/s", "lowest to highest"]
    columns += ["ours is faster by", "in each round"]
    if setup.on_gpu:
        conditions.append(f"features repeated {setup.repeats} times, for epochs of many batches")
        conditions.append("cuDNN's attention off in all")
    else:
        columns.append("by processor time")
        cores = len(os.sched_getaffinity(0))
        conditions.append(
            f"{options.threads} threads on {cores} cores;"
            " load tells of others: then processor time is the surer ratio"
        )
    environment = measuring.describe_machine(setup.train, options.device)
    for package in ("accelerate", "lightning"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment[package] = importlib.metadata.version(package)
    return {
        "title": "train.py against the usual ways",
        "conditions": conditions,
        "columns": columns,
        "rows": [make_row(way, ways[0], setup.on_gpu) for way in ways if way.speeds],
        "environment": environment,
    }


# 4. Main


def parse_options():
    on_or_off = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="(default: as train.py's)")
    add("--threads", type=int, default=2)
    add("--batch-size", type=int, default=32)
    add("--steps", type=int, help="that count, in a turn (default: 10; cuda: 100)")
    add("--warmup", type=int, help="steps before them (default: 1; cuda: 10)")
    add("--rounds", type=int, default=3)
    add("--model", help="folder or hub name (default: ../shared/minilm, else the hub's BERT-Base)")
    add("--base", action=on_or_off, help="BERT-Base, random weights (default: with cuda)")
    add("--data", type=Path, help="SQuAD v1.1 JSON (default: ../shared's, else the hub's)")
    add("--output", type=Path, help="(default: baseline/results/bench.json; cuda: bench-cuda.json)")
    options = parser.parse_args()

    on_gpu = options.device == "cuda"
    if measuring.SHARED.exists():
        options.model = options.model or measuring.MODEL
        options.data = options.data or measuring.TRAIN_FILE
    options.model = options.model or "google-bert/bert-base-uncased"
    if options.base is None:
        options.base = on_gpu
    options.steps = options.steps or (100 if on_gpu else 10)
    options.warmup = options.warmup or (10 if on_gpu else 1)
    name = "bench-cuda.json" if on_gpu else "bench.json"
    options.output = options.output or measuring.RESULTS / name
    if options.data:
        measuring.need(options.data)
    return options


def main():
    options = parse_options()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    train = measuring.load_train()
    measuring.silence(train)
    try:
        setup = Setup(options, train)
    except train.Problem as problem:
        sys.exit(f"error: {problem}")
    ways = list_ways(setup)
    for seed in range(options.rounds):
        for way in list(ways):
            if not take_turn(setup, way, seed):
                ways.remove(way)
            # After each turn: whoever stops it keeps what there is.
            measuring.write_tables(options.output, [make_table(setup, ways)])
    measuring.show_tables(options.output)


if __name__ == "__main__":
    main()

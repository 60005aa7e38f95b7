"""Compares train.py with the usual ways of training the same model on the same features.

    python baseline/tests/bench.py    two cores, fp32, a small BERT: 20 quiet minutes
    python baseline/tests/bench.py --device cuda --batch-size 128   bf16, BERT-Base: bench-cuda.json

ours: train.py's own loop, packed and fused. The others read the same features: a plain loop as the
well-known examples write it; transformers' Trainer as it comes, and at its best; Lightning's.
They take turns (A B C A B C ...), so that a machine that others use slows all of them. A turn is a
fresh model, --warmup steps, and --steps that count: from the end of a step of the optimiser to the
end of a later one. Tokens are real ones: padding never counts. Trainer's group_by_length begins
each group of batches with its longest, so let --steps be whole groups: on a CPU the small data make
them 10 batches; on a GPU the features are repeated until an epoch has groups of 50, as on SQuAD, and
no turn meets an epoch's end with its short batch. cuDNN's attention is off in all ways, as in
train.py: where lengths change it would plan most of the time. Trainer and Lightning need
`pip install accelerate lightning`; what is missing or fails is left out, and named.
"""

import argparse, contextlib, copy, functools, gc, importlib.util, logging, os
import statistics, sys, tempfile, time, warnings
from pathlib import Path

import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import measuring


class Meter:
    """Times the steps of any loop alike: by a hook on torch's optimisers, and one on the model."""

    def __init__(self, warmup, steps, device):
        self.warmup, self.last, self.device = warmup, warmup + steps, device
        register_optimizer_step_post_hook(lambda *_: self.step())

    def start(self, model=None):
        self.steps, self.counts, self.marks = 0, [], []
        if model is not None:
            count = torch.compiler.disable(self.count)  # a compiled Trainer's would compile it too
            model.register_forward_pre_hook(count, with_kwargs=True)

    def count(self, model, inputs, named):
        self.counts.append(named["attention_mask"].sum())  # stays on the device

    def step(self):
        self.steps += 1
        if self.steps in (self.warmup, self.last):
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))

    def seconds(self):
        """Returns the seconds of the steps that count, by the clock and of the processor's time."""
        (begin, cpu_begin), (end, cpu_end) = self.marks
        return end - begin, cpu_end - cpu_begin

    def tokens(self):
        return sum(int(count) for count in self.counts[self.warmup : self.last])


def usual_rows(features):
    """The features of train.py, one dictionary each, as a tokenizer gives them."""
    rows, edges = [], features["begin"]
    for i, (begin, end) in enumerate(zip(edges, edges[1:])):
        first, length = int(features["first"][i]), int(end - begin)
        row = {"input_ids": features["tokens"][begin:end].tolist()}
        row |= {"token_type_ids": [0] * first + [1] * (length - first)}
        row |= {"attention_mask": [1] * length}
        row |= {
            "start_positions": int(features["start"][i]),
            "end_positions": int(features["end"][i]),
        }
        rows.append(row)
    return rows


class Bench:
    def __init__(self, options, train):
        self.options, self.train = options, train
        self.argv = ["--model", str(options.model), "--device", options.device]
        self.argv += ["--train-file", str(options.data)] if options.data else []
        self.argv += ["--batch-size", str(options.batch_size)]
        self.argv += ["--epochs", "1", "--no-profile"]
        self.argv += ["--precision", options.precision] if options.precision else []
        args = self.train.parse_arguments(self.argv)
        self.precision, self.device = args.precision, args.device_type
        self.total = options.warmup + options.steps
        self.meter = Meter(options.warmup, options.steps, self.device)
        self.tokenizer, self.config = self.train.load_tokenizer(args)
        if options.base:
            self.config = transformers.BertConfig(vocab_size=self.config.vocab_size)
        self.features = self.train.prepare_features(args.train_file, "train", self.tokenizer, args)
        names = ("tokens", "begin", "lengths", "first", "start", "end")
        table = {name: torch.tensor(self.features[name], device=self.device) for name in names}
        self.features["table"] = table
        self.rows = usual_rows(self.features)
        epoch = 200 * options.batch_size  # its groups are of 50 batches from there on
        cuda = self.device == "cuda"
        self.more = self.rows * -(-epoch // len(self.rows)) if cuda else self.rows

    def args(self, seed):
        return self.train.parse_arguments([*self.argv, "--seed", str(seed)])

    def fresh_model(self, seed, precision=None):
        tf32 = (precision or self.precision) == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.manual_seed(seed)
        family, config = transformers.AutoModelForQuestionAnswering, copy.deepcopy(self.config)
        if self.options.base:
            return family.from_config(config, dtype=torch.float32)
        return family.from_pretrained(self.options.model, config=config, dtype=torch.float32)

    def collator(self):
        return transformers.DataCollatorWithPadding(self.tokenizer)

    def loader(self, size):
        how = {"shuffle": True, "batch_size": size, "collate_fn": self.collator()}
        return DataLoader(self.more, drop_last=self.device == "cuda", **how)

    def ours(self, seed):
        train, args = self.train, self.args(seed)
        device = torch.device(self.device)
        model = self.fresh_model(seed).to(device)
        model.set_attn_implementation("packed")
        optimizer, _ = train.make_optimizer(model, args)
        if args.compile:
            train.compile_layers(model)
            if not any(module._compiled_call_impl for module in model.modules()):
                sys.exit("error: ours is not compiled, as this node lacks a compiler: give it one")
        # The whole epoch's plan, then its first steps: the shapes are those of a whole run.
        args.epochs = 1 + self.total * args.batch_size // len(self.rows)
        plan = train.plan_training(self.features["lengths"], args)
        per_step = ("shares", "longest", "computed", "tokens", "squares", "features")
        plan |= {name: plan[name][: self.total] for name in per_step}
        state = {"step": 0, "intervals": [], "operators": "", "beside": {"log": 0.0}}
        self.meter.start()
        with tempfile.TemporaryDirectory() as output:
            training = train.SpanModel(model, args)
            parts = (training, train.Clock(device), optimizer, self.features, plan, state)
            train.train(args, device, Path(output), *parts, lambda: None)
        return int(plan["tokens"][self.options.warmup :].sum())

    def plain(self, seed, size=None, precision=None):
        """As the examples write it: DataLoader, dynamic padding, AdamW, a scheduler, item()."""
        bf16 = (precision or self.precision) == "bf16"
        loader = self.loader(size or self.options.batch_size)
        model = self.fresh_model(seed, precision)
        model.to(self.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        schedule = transformers.get_scheduler("linear", optimizer, 0, self.total)
        self.meter.start(model)
        total_loss = 0.0
        while self.meter.steps < self.total:
            for batch in loader:
                batch = {name: value.to(self.device) for name, value in batch.items()}
                with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total_loss += loss.item()
                if self.meter.steps == self.total:
                    break
        return self.meter.tokens()

    def trainer(self, seed, **best):
        cpu = {"use_cpu": self.device == "cpu", "bf16": self.precision == "bf16"}
        with tempfile.TemporaryDirectory() as output:
            how = {
                "output_dir": output,
                "max_steps": self.total,
                "learning_rate": 5e-5,
                "seed": seed,
            }
            how |= {"per_device_train_batch_size": self.options.batch_size, "disable_tqdm": True}
            how |= {"save_strategy": "no", "report_to": "none"}
            how |= {"dataloader_drop_last": self.device == "cuda"}
            model, data = self.fresh_model(seed), {"train_dataset": self.more}
            self.meter.start(model)
            arguments = transformers.TrainingArguments(**how, **cpu, **best)
            transformers.Trainer(model, arguments, data_collator=self.collator(), **data).train()
        return self.meter.tokens()

    def trainer_best(self, seed):
        best = {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
        if self.device == "cuda":
            best |= {"torch_compile": True, "dataloader_num_workers": 4}
        return self.trainer(seed, **best)

    def lightning(self, seed):
        import lightning

        total = self.total

        class Module(lightning.LightningModule):
            def __init__(self, model):
                super().__init__()
                self.model = model.train()

            def training_step(self, batch, _):
                loss = self.model(**batch).loss
                self.log("train_loss", loss)
                return loss

            def configure_optimizers(self):
                optimizer = torch.optim.AdamW(self.parameters(), lr=5e-5)
                schedule = transformers.get_scheduler("linear", optimizer, 0, total)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        model = self.fresh_model(seed)
        self.meter.start(model)
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        how = dict.fromkeys(quiet, False) | {"max_steps": total, "devices": 1}
        how |= {"accelerator": "gpu" if self.device == "cuda" else "cpu"}
        how |= {"precision": "bf16-mixed" if self.precision == "bf16" else "32-true"}
        lightning.Trainer(**how).fit(Module(model), self.loader(self.options.batch_size))
        return self.meter.tokens()

    def contestants(self):
        """Returns {name: (function of a seed, batch size)}; tells what is left out."""
        size, all_of_them = self.options.batch_size, {}
        all_of_them["ours (packed, fused)"] = (self.ours, size)
        all_of_them["(a) plain loop"] = (self.plain, size)
        for name, function, module in (
            ("(b) Trainer, usual", self.trainer, "accelerate"),
            ("(b) Trainer, best", self.trainer_best, "accelerate"),
            ("(c) Lightning", self.lightning, "lightning"),
        ):
            if importlib.util.find_spec(module):
                all_of_them[name] = (function, size)
            else:
                print(f"{name} is left out: it needs pip install {module}", flush=True)
        if size > 12:
            all_of_them["(a) plain loop, batch of 12"] = (
                functools.partial(self.plain, size=12),
                12,
            )
        if self.precision != "fp32":
            slow = functools.partial(self.plain, precision="fp32")
            all_of_them["(a) plain loop, fp32"] = (slow, size)
        return all_of_them


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="as train.py's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, help="that count, a turn (default: 10; cuda: 100)")
    parser.add_argument("--warmup", type=int, help="steps (default: 1; cuda: 10)")
    parser.add_argument("--rounds", type=int, default=3)
    small = measuring.SHARED.exists()  # else the hub's, which prepare.sh has fetched
    model = measuring.SHARED / "minilm" if small else "google-bert/bert-base-uncased"
    data = measuring.SHARED / "squad/train.json" if small else None
    parser.add_argument("--model", default=model, help="a folder, or a name of the hub")
    parser.add_argument("--base", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--data", type=Path, default=data, help="default: the hub's SQuAD")
    parser.add_argument(
        "--output", type=Path, help="default: results/bench.json or bench-cuda.json"
    )
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.base = cuda if options.base is None else options.base  # BERT-Base, random weights
    options.steps = options.steps or (100 if cuda else 10)
    options.warmup = options.warmup or (10 if cuda else 1)
    name = "bench-cuda.json" if cuda else "bench.json"
    options.output = options.output or measuring.RESULTS / name
    if options.data:
        measuring.need(options.data)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    train = measuring.load_train()
    try:
        bench = Bench(options, train)
    except train.Problem as problem:
        sys.exit(f"error: {problem}")
    contestants, speeds = bench.contestants(), {}
    for seed in range(options.rounds):
        for name, (function, _) in list(contestants.items()):
            gc.collect()  # a turn begins with no other's memory
            torch.cuda.empty_cache()
            try:
                with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its end
                    tokens = function(seed)
            except Exception as error:  # a way of others', whatever its errors: ours go up
                if not speeds:
                    raise
                del contestants[name]
                print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
                continue
            wall, cpu = (tokens / seconds for seconds in bench.meter.seconds())
            speeds.setdefault(name, []).append((wall, cpu))
            what = f"{wall:,.0f} tokens/s, {cpu:,.0f} a second of the processor"
            print(f"round {seed + 1}: {name}: {what}", flush=True)
            write(bench, contestants, speeds)  # each time: whoever stops it keeps what is there


def write(bench, contestants, speeds):
    """Writes what has been measured; speeds {way: [(tokens/s, tokens a processor's second)]}."""
    options, rows = bench.options, []
    ours = next(iter(speeds.values()))
    for name, (_, size) in contestants.items():
        if name not in speeds:
            continue
        walls, cpus = zip(*speeds[name])
        ratios = [mine[0] / other for mine, other in zip(ours, walls)]
        row = [name, size, round(statistics.median(walls)), f"{min(walls):.0f} to {max(walls):.0f}"]
        row += [round(statistics.median(ratios), 2), f"{min(ratios):.2f} to {max(ratios):.2f}"]
        if bench.device == "cpu":
            row.append(round(statistics.median(m[1] / o for m, o in zip(ours, cpus)), 2))
        rows.append(row)
    conditions = [
        "BERT-Base, random weights" if options.base else Path(options.model).name,
        f"{bench.precision} on {bench.device}",
        f"{len(bench.rows):,} features of {options.data.name if options.data else 'SQuAD'}",
        f"{options.steps} steps a turn after {options.warmup} of warm-up",
        f"{len(ours)} rounds in turns in one process, medians",
        "tokens without padding",
        "faster by: ours to this one in the same round",
    ]
    if bench.device == "cuda":
        conditions += ["repeated to epochs of 200 batches", "cuDNN's attention off in all"]
    columns = ["way", "batch", "real tokens/s", "lowest to highest", "ours is faster by"]
    columns.append("in each round")
    if bench.device == "cpu":
        columns.append("by processor time")
        how = f"{options.threads} threads on {os.cpu_count()} cores"
        conditions.append(f"{how}; load tells of others: then processor time is the surer ratio")
    versions = {}
    for name in ("accelerate", "lightning"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.import_module(name).__version__
    table = {"title": "train.py against the usual ways", "conditions": conditions}
    table |= {"columns": columns, "rows": rows, "environment": measuring.environment(**versions)}
    measuring.write_tables(options.output, table)


if __name__ == "__main__":
    main()

"""Records what steps of train.py launch, on GPUs that compute nothing, for predict.py.

    .ci/fake-gpu/run --gpu a100 -- python baseline/benchmarks/record_steps.py [NAME...]
    .ci/fake-gpu/run --gpu h100 -- python baseline/benchmarks/record_steps.py [NAME...]

Each writes a file in results/fake-gpu/: the steps of the ladder's rungs, and on an A100 those of
the published measurements too. With the FLOP and the bytes of all that is launched, the memory that
the step takes, and the host's time for it. All take half an hour on two cores; NAME: only those.
"""

import collections
import gc
import json
import os
import re
import sys
import time
from unittest import mock

import launches
import measuring
import numpy as np
import predict
import torch
import transformers
from predict import Work
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.nested._internal.nested_tensor import NestedTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Steps before the recorded one: they allocate and compile. The host's time is the shortest one's.
WARM_UP = 20
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24}
LARGE |= {"num_attention_heads": 16, "intermediate_size": 4096}


class Recorder(TorchDispatchMode):
    """Counts the Work of all operators within it, and of Triton's kernels where it is compiled.

    An operator moves what it takes and what it returns. sum_of_squares: of the lengths of a packed
    row's sequences, which its attention's FLOP follow; precision: train.py's."""

    # Metadata alone, or memory that nobody has written yet.
    NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach")
    # These read as much of their table as they return.
    GATHERING = ("embedding", "index", "gather")

    def __init__(self, precision, sum_of_squares):
        super().__init__()
        self.fp32_unit = "tf32" if precision == "tf32" else "fp32"
        self.sum_of_squares = sum_of_squares
        self.counts = collections.Counter()

    @classmethod
    def ignore_compile_internals(cls):
        return True  # compiled layers stay compiled, and the mode sees what they call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if NestedTensor in types:
            return NotImplemented  # it comes again, as operators on its values
        output = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        taken = tensors_of((args, kwargs))
        made = tensors_of(output)
        if function.is_view or name in self.NO_KERNEL or not taken + made:
            return output
        size = size_of(taken + made)
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[1:3] if "add" in name else args[:2]
            unit = "bf16" if left.dtype == torch.bfloat16 else self.fp32_unit
            shape = "x".join(map(str, (*left.shape, right.shape[-1])))
            self.add(f"{name} {shape}", unit, 2 * left.numel() * right.shape[-1], size)
        elif "attention" in name:
            self.add_attention(name, args, size)
        elif name in self.GATHERING:
            self.add(name, "", 0, 2 * size_of(made))
        elif name == "_fused_adamw_":
            self.add(name, "", 0, size * 7 // 4)  # reads all four lists, writes three
        elif name.startswith("_foreach") and not made:
            self.add(name, "", 0, size + size_of(tensors_of(args[0])))  # writes its first list
        else:
            self.add(name, "", 0, size)
        return output

    def add_attention(self, name, args, size):
        """Its forward pass are two multiplications, its backward pass five."""
        backward = "backward" in name
        query = args[1] if backward else args[0]
        pairs = self.sum_of_squares
        if query.dim() == 4:  # padded [rows, heads, width, size], else packed [tokens, heads, size]
            pairs = query.shape[0] * query.shape[2] ** 2
        heads, head_size = query.shape[1], query.shape[-1]
        unit = "flash" if "flash" in name else "efficient"
        if query.dtype == torch.float32:
            unit += " fp32"
        self.add(name, unit, (10 if backward else 4) * pairs * heads * head_size, size)

    def add(self, name, unit, flops, size):
        if not unit and size < 1e6 and not name.startswith("triton"):
            name, size = "small", 0  # none of them takes longer than the smallest
        self.counts[name, unit, int(flops), int(size)] += 1

    def watch_triton(self):
        """Returns a context in which Triton's kernels are counted: their tensors, in_out twice."""
        own_run = CachingAutotuner.run

        def run(kernel, *args, **kwargs):
            given = [arg for arg in args if isinstance(arg, torch.Tensor)]
            names = zip(kernel.fn.arg_names, args)
            given += [arg for name, arg in names if name.startswith("in_out")]
            self.add(kernel.fn.__name__, "", 0, size_of(given))
            return own_run(kernel, *args, **kwargs)

        return mock.patch.object(CachingAutotuner, "run", run)


def tensors_of(tree):
    """Returns the tensors in it that are on a GPU."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]


def size_of(tensors):
    """Returns their bytes; an expanded tensor has no more than its storage."""
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)


def record_step(train, words, config=None, lengths=None):
    """Returns what a step launches, trained by train.py with these words: one whose tokens, padding
    among them, are nearest to the mean of all steps."""
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    step = launches.make_step(train, words, config, predict.EPOCH_FEATURES, lengths)
    host_seconds = []
    for number in range(WARM_UP):
        begin = time.process_time()
        step(number)
        host_seconds.append(time.process_time() - begin)
    computed = step.plan["computed"][:-1]
    number = WARM_UP + int(np.abs(computed[WARM_UP:] - computed.mean()).argmin())
    squares = 0
    if "cu_seqlens" in step.plan:
        squares = (np.diff(step.plan["cu_seqlens"][number].astype(int)) ** 2).sum(axis=1).mean()
    recorder = Recorder(step.args.precision, squares)
    with recorder, recorder.watch_triton():
        step(number)
    with launches.record() as rows:
        step(number)
    return {
        "words": " ".join(words),
        "features": step.args.batch_size,
        "micro_batches": step.args.accumulate,
        "tokens": int(step.plan["tokens"][number]),
        "computed": int(computed[number]),
        "launches": sum(row.kind in launches.LAUNCHES for row in rows),
        "host_ms": round(1000 * min(host_seconds), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "work": [Work(*work, count) for work, count in recorder.counts.items()],
    }


def record_what_fits(train, words, config=None, lengths=None):
    """Records a step in as few micro-batches as fit the memory, or returns None."""
    for parts in (1, 2, 4, 8):
        try:
            return record_step(train, [*words, "--accumulate", str(parts)], config, lengths)
        except torch.OutOfMemoryError:
            pass
        except train.Problem:  # a CUDA graph takes one micro-batch only
            return None
        gc.collect()  # the step that did not fit
    return None


def steps_to_record():
    """Returns {name: words, config, lengths} of train.py's steps for this GPU."""
    wanted = {}
    for batch_size in predict.BATCH_SIZES:
        for rung, words in predict.RUNGS.items():
            words = [*words.split(), "--batch-size", str(batch_size)]
            wanted[f"{rung} {batch_size}"] = (words, None, None)
    if torch.cuda.get_device_capability() == (8, 0):
        for name, words in predict.PUBLISHED_STEPS.items():
            config = transformers.BertConfig(**LARGE) if "Large" in name else None
            lengths = None
            if "MLPerf" in name:  # Wikipedia in 512 tokens is half padding (Krell et al. 2021)
                lengths = np.random.default_rng(0).integers(1, 513, predict.EPOCH_FEATURES)
            wanted[name] = (words.split(), config, lengths)
    return wanted


def main():
    if not launches.is_fake_gpu():
        sys.exit("error: this records under .ci/fake-gpu/run, with a torch that is built for CUDA")
    names = sys.argv[1:]
    train = measuring.load_train()
    path = predict.RECORDED / f"{os.environ['FAKECUDA_GPU']}.json"
    content = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    content["environment"] = measuring.describe_machine(train, "cuda")
    for name, (words, config, lengths) in steps_to_record().items():
        if names and name not in names:
            continue
        step = record_what_fits(train, words, config, lengths)
        content["steps"][name] = step
        gc.collect()
        kept = {key: value for key, value in (step or {}).items() if key != "work"}
        print(f"{name}: {kept or 'does not fit'}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json(content))


def as_json(content):
    """One line for each Work."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


if __name__ == "__main__":
    main()

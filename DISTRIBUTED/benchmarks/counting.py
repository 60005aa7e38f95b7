"""Counts what a rank of train.py hands to collectives, and what it keeps. sent.py begins it:

import counting; counting.begin(globals())    run within train.py's module, before its main()
"""

import functools
import json
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# train.py's functions by what they are for. What none of them calls belongs to the start.
PLACES = {
    "measure_all_reduce": "timing of the link",
    "restore": "resuming",
    "train": "agreement and log",
    "training_step": "step",
    "save_checkpoint": "saving",
    "evaluate_model": "evaluation",
    "finish": "end",
}


class Counter(TorchDispatchMode):
    """Sees each operator that the main thread calls, and notes the collectives.

    calls: [{"place", "collectives": [[operator, bytes, ranks of its group]]}], in order of time.
    The bytes are those of the whole: an all-gather's output, a reduce-scatter's input."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.stack = []
        self.enter_place("start")

    def enter_place(self, place):
        call = {"place": place, "collectives": []}
        self.calls.append(call)
        self.stack.append(call)

    def leave_place(self):
        self.stack.pop()

    def note(self, name, size, ranks):
        self.stack[-1]["collectives"].append([name, size, ranks])

    def __torch_dispatch__(self, operator, types, values=(), options=None):
        if DTensor in types:
            # Its own operators first: they call collectives on plain tensors, which come here.
            return NotImplemented
        if is_collective(operator, values):
            self.note(*describe(operator, values))
        return operator(*values, **(options or {}))


def is_collective(operator, values):
    """The functional ones end with their group's name; others of theirs wait, or wrap a tensor."""
    if operator.namespace == "_c10d_functional":
        return isinstance(values[-1], str)
    return operator.namespace == "c10d"


def describe(operator, values):
    """Returns [operator, bytes, ranks of its group] of a collective and its arguments."""
    sizes = [sum(map(tensor_bytes, tree_leaves(value))) for value in values]
    size = max(sizes)
    ranks = group_of(operator, values).size()
    name = operator.name().split("::")[1]
    if name == "barrier":  # its tensor only says which device
        size = 0
    if name == "all_gather_into_tensor":  # a functional one, whose output is still to come
        size *= ranks
    return [name, size, ranks]


def tensor_bytes(value):
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def group_of(operator, values):
    """Returns a collective's process group, which c10d takes as an object, others by its name."""
    if operator.namespace == "c10d":
        boxed = next(value for value in values if isinstance(value, torch.ScriptObject))
        return dist.ProcessGroup.unbox(boxed)
    return dist.distributed_c10d._resolve_process_group(values[-1])


def loopback_bytes():
    """Returns what has been sent through this network namespace's loopback interface."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line.split() for line in lines if line.strip().startswith("lo:"))
    bytes_received = 1  # on a loopback those are the bytes sent
    return int(fields[bytes_received])


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors):
    """Returns the bytes of tensors, of a sharded one those of this rank's shard."""
    return sum(local(tensor).nbytes for tensor in tensors if tensor is not None)


def note_states(kept, optimizer, *_):
    """Notes what a rank keeps after a step of the optimiser, while the gradients are still there."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = []
    for state in optimizer.state.values():
        moments += [state["exp_avg"], state["exp_avg_sq"]]
    kept["weights"] = local_bytes(parameters)
    kept["gradients"] = local_bytes(parameter.grad for parameter in parameters)
    kept["moments"] = local_bytes(moments)


def begin(train):
    """Begins to count in train.py, {name: what the module has}; its main() then leaves the counts
    in --output, one file per rank."""
    counter = Counter()
    kept = {}
    loopback = []

    def count_in(function, place):
        @functools.wraps(function)
        def counted(*values):
            if place == "step":
                loopback.append(loopback_bytes())
            counter.enter_place(place)
            try:
                return function(*values)
            finally:
                counter.leave_place()

        return counted

    def all_reduce(tensor, *values, function=dist.all_reduce, **options):
        # PowerSGD begins one where another ends: on a thread of gloo's, where no mode sees it.
        if threading.current_thread() is not threading.main_thread():
            counter.note("allreduce_", tensor.nbytes, dist.get_world_size())
        return function(tensor, *values, **options)

    for name, place in PLACES.items():
        train[name] = count_in(train[name], place)

    def make_optimizer(*values, function=train["make_optimizer"]):
        optimizer = function(*values)
        optimizer.register_step_post_hook(functools.partial(note_states, kept))
        return optimizer

    def forward(self, batch, function=train["SpanModel"].forward):
        loss = function(self, batch)
        # Of a sharded strategy those are whole that it has been sent and has not yet freed.
        whole = [p for p in self.parameters() if not isinstance(p, DTensor)]
        kept["whole_after_forward"] = local_bytes(whole)
        return loss

    def main(function=train["main"]):
        try:
            with counter:
                function()
        finally:
            folder = Path(train["sys"].argv[-1])
            counts = {"calls": counter.calls, "kept": kept, "loopback": loopback}
            (folder / f"counts-{train['RANK']}.json").write_text(json.dumps(counts))

    dist.all_reduce = all_reduce
    train["make_optimizer"] = make_optimizer
    train["SpanModel"].forward = forward
    train["main"] = main

"""Runs of several ranks on this machine's CPU, each of them forked by baseline/tests/nursery.py.

conftest.py makes the fixture `ranks` of it.
"""

import itertools
import json
import signal
import socket
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "baseline/train.py"
DISTRIBUTED = ROOT / "DISTRIBUTED/train.py"
SHARED = ROOT.parent / "shared"
# What interface.md allows losses to differ by, where they are the same but for rounding.
TOLERANCE = 1e-5

# 30 features of 26 to 72 tokens, in batches of 8, so an epoch's last batch has 6: with 4 ranks and
# 2 micro-batches some have none.
SMALL = ["--sample", "--limit", 15, "--max-length", 72, "--stride", 8, "--batch-size", 8]
SMALL += ["--device", "cpu", "--no-profile", "--log-every", 1, "--learning-rate", 2e-4]
SHORT = [*SMALL, "--epochs", 3]  # 12 steps
LONG = [*SMALL, "--epochs", 11]  # 44 steps

SIGNAL = "signal.raise_signal(signal.SIGUSR1)"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun_variables(world, nodes, port):
    """What torchrun tells its ranks, in a list by rank."""
    per_node = world // nodes
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_node),
            "WORLD_SIZE": str(world),
            "GROUP_WORLD_SIZE": str(nodes),
            "TORCHELASTIC_RUN_ID": "none",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for rank in range(world)
    ]


class Run:
    """What a run left: its ranks' exit codes and logs, and the files in its output."""

    def __init__(self, output, codes, logs):
        self.output = output
        self.codes = codes
        self.logs = logs
        self.log = "\n".join(logs)

    def read(self, name):
        """What a JSON file in the output holds."""
        return json.loads((self.output / name).read_text())

    def column(self, name):
        """A figure of each interval: of each step, with --log-every 1."""
        return np.array([interval[name] for interval in self.read("timings.json")["intervals"]])

    def weights(self):
        from safetensors.numpy import load_file

        return load_file(self.output / "model/model.safetensors")


class Ranks:
    """Starts runs; nursery: see nursery.py; folder: for their outputs and logs."""

    def __init__(self, nursery, folder):
        self.nursery = nursery
        self.folder = folder
        self.numbers = itertools.count()
        self.kept = {}

    def __call__(
        self,
        world,
        *words,
        output=None,
        scripts=None,
        own=None,
        patch="",
        nodes=1,
        seconds=240,
        environment=None,
    ):
        """Starts the ranks, waits for all of them, and returns the Run, however it ended.

        world 0: baseline/train.py. 1: DISTRIBUTED/train.py by itself. More: as torchrun starts its
        ranks. scripts: the ranks' own train.py, if they differ; own: {rank: its options beside
        words}; patch: code that is run within each rank's module before its main(); environment:
        variables beside torchrun's."""
        number = next(self.numbers)
        output = output or self.folder / f"run-{number}"
        count = max(world, 1)
        scripts = scripts or [DISTRIBUTED if world else BASELINE] * count
        extra = environment or {}
        variables = [extra]
        if world > 1:
            variables = [one | extra for one in torchrun_variables(world, nodes, free_port())]
        lives = []
        try:
            for rank in range(count):
                rank_words = [*words, *(own or {}).get(rank, []), "--output", output]
                log = self.folder / f"log-{number}-{rank}"
                life = self.nursery.start(scripts[rank], rank_words, log, patch, **variables[rank])
                lives.append(life)
            for life in lives:
                life.wait_until(lambda: False, seconds)
        finally:
            for life in lives:
                life.kill(signal.SIGKILL)
        return Run(output, [life.code for life in lives], [life.text() for life in lives])

    def finished(self, world, *words, **options):
        """The same, of a run that has to finish."""
        run = self(world, *words, **options)
        assert run.codes == [0] * len(run.codes), run.log[-3000:]
        assert "Traceback" not in run.log, run.log[-3000:]
        assert (run.output / "results.json").exists(), run.log[-3000:]
        return run

    def once(self, world, *words):
        """The same; a run that was there already is looked at again."""
        key = (world, *map(str, words))
        if key not in self.kept:
            self.kept[key] = self.finished(world, *words)
        return self.kept[key]

    def stopped(self, world, *words, at, ask=SIGNAL, **options):
        """A run that is asked to stop after so many steps; it has to leave a checkpoint.

        ask: code by which a rank asks, run on all of them. Returns the Run."""
        run = self(world, *words, patch=ask_after(at, ask), **options)
        # Under torchrun any other code than 0 is a failure.
        asked_to_stop = 0 if world > 1 else 75
        assert run.codes == [asked_to_stop] * len(run.codes), run.log[-3000:]
        assert (run.output / "checkpoint.pt").exists(), run.log[-3000:]
        assert not (run.output / "results.json").exists(), run.log[-3000:]
        return run


def ask_after(step, ask):
    """A patch that asks to stop when so many steps are done."""
    return f"""
unpatched_step = training_step

def training_step(args, step, *others):
    unpatched_step(args, step, *others)
    if step + 1 == {step}:
        {ask}
"""


def assert_same_training(one, other, tolerance=TOLERANCE, least_steps=1):
    """Each step's loss, gradient norm, learning rate and tokens are the same."""
    assert len(one.column("loss")) == len(other.column("loss")) >= least_steps
    assert np.array_equal(one.column("learning_rate"), other.column("learning_rate"))
    assert np.array_equal(one.column("tokens"), other.column("tokens"))
    assert np.abs(one.column("loss") - other.column("loss")).max() <= tolerance
    # A norm is about 1 to 10, the root of a sum of squares: the same to as many digits.
    norms = one.column("gradient_norm")
    difference = np.abs(norms - other.column("gradient_norm")).max()
    assert difference <= tolerance * max(norms.max(), 1)


def assert_same_model(one, other, tolerance):
    ours = one.weights()
    theirs = other.weights()
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        assert weight.shape == theirs[name].shape
        assert weight.dtype == theirs[name].dtype
        assert np.abs(weight - theirs[name]).max() <= tolerance, name
    for name in ("config.json", "tokenizer.json"):
        file = Path("model", name)
        assert (one.output / file).read_text() == (other.output / file).read_text()

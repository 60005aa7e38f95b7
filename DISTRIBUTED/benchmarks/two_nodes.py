"""Trains the sample between two nodes with each strategy and with PowerSGD. As root, on Linux:

    python DISTRIBUTED/benchmarks/two_nodes.py [MBIT ...]

The nodes are network namespaces of this machine with a cable between them and two ranks in each, so
neither SLURM nor .ci/slurm-cluster is needed (link.py measures there). tc limits what each node
sends. PowerSGD is the diff of DISTRIBUTED/README.md, applied to a copy of train.py.
Writes DISTRIBUTED/results/two-nodes.json, for report.py --table measured.
"""

import argparse
import json
import signal
import statistics
import subprocess
import tempfile
from pathlib import Path

import sent
from ranks import torchrun_variables
from sent import measuring

NODES = ["squad-node0", "squad-node1"]
NETWORK = "10.87.0"
RANKS = 4
PORT = "29500"
# Run by each rank before it begins: what it opens from then on belongs to its node.
ENTER_NODE = """
import ctypes
CLONE_NEWNET = 0x40000000
if ctypes.CDLL(None).setns(os.open("/var/run/netns/{node}", os.O_RDONLY), CLONE_NEWNET):
    raise OSError("cannot enter the network namespace {node}")
"""
STEPS = 40
WORDS = ["--sample", "--device", "cpu", "--no-profile", "--log-every", "1", "--max-steps", STEPS]
WORDS += ["--limit", "200"]
CASES = [*sent.CASES[:3], ("fsdp", "fp32"), ("hsdp", "fp32"), ("ddp", sent.POWERSGD)]
# Steps before these count neither for seconds: train.py's own warm-up, and PowerSGD's exact steps.
MEASURED_FROM = sent.POWERSGD_START + 2


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def make_nodes():
    remove_nodes()  # what a killed run left
    for node in NODES:
        ip("netns", "add", node)
        ip("-n", node, "link", "set", "lo", "up")
    cable = ["type", "veth", "peer", "name", "eth0", "netns", NODES[1]]
    ip("link", "add", "eth0", "netns", NODES[0], *cable)
    for number, node in enumerate(NODES, 1):
        ip("-n", node, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        ip("-n", node, "link", "set", "eth0", "up")


def remove_nodes():
    for node in NODES:
        subprocess.run(["ip", "netns", "delete", node], capture_output=True, check=False)


def limit_link(rate):
    """Lets each node send at most this many Mbit/s; 0: as much as it can. As .ci/slurm-cluster."""
    for node in NODES:
        queue = ["tc", "-n", node, "qdisc"]
        subprocess.run([*queue, "delete", "dev", "eth0", "root"], capture_output=True, check=False)
        if rate:
            shape = ["tbf", "rate", f"{rate}mbit", "burst", "128kb", "latency", "200ms"]
            subprocess.run([*queue, "add", "dev", "eth0", "root", *shape], check=True)


def bytes_from_nodes():
    """Returns what both nodes have sent to each other so far, headers included."""
    total = 0
    for node in NODES:
        command = ["ip", "-n", node, "-s", "-j", "link", "show", "eth0"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True)
        total += json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"]
    return total


def train(nursery, script, words, output):
    """Trains with two ranks on each node; returns each step of timings.json."""
    all_variables = torchrun_variables(RANKS, len(NODES), PORT)
    lives = []
    try:
        for rank, variables in enumerate(all_variables):
            variables |= {"MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": "eth0"}
            log = f"{output}-{rank}.log"
            enter_node = ENTER_NODE.format(node=NODES[rank * len(NODES) // RANKS])
            life = nursery.start(script, [*words, "--output", output], log, enter_node, **variables)
            lives.append(life)
        for life in lives:
            life.end(seconds=900)
    finally:
        for life in lives:
            life.kill(signal.SIGKILL)
    return json.loads((output / "timings.json").read_text())["intervals"]


def measure(nursery, case, rate, script, folder):
    """Trains a case on this link; returns its row."""
    strategy, gradients = case
    words = [*WORDS, "--strategy", strategy]
    words += ["--gradients", "fp32" if gradients == sent.POWERSGD else gradients]
    before = bytes_from_nodes()
    steps = train(nursery, script, words, folder / f"{rate}-{strategy}-{gradients}")
    crossed = bytes_from_nodes() - before
    losses = [step["loss"] for step in steps]
    seconds = [step["seconds"] for step in steps]
    steady = seconds[MEASURED_FROM:]
    return [
        f"{rate} Mbit/s" if rate else "not limited",
        strategy,
        gradients,
        round(1000 * statistics.median(steady)),
        round(sum(seconds), 1),
        round(crossed / len(NODES) / 1e6),
        round(losses[sent.POWERSGD_START], 4),
        round(sum(losses[-5:]) / 5, 4),
    ]


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("rates", type=int, nargs="*", help="Mbit/s, 0: not limited (default: 0 25)")
    options = parser.parse_args()
    options.rates = options.rates or [0, 25]
    return options


def main():
    options = parse_options()
    machine = measuring.describe_machine(measuring.load_train())
    rows = []
    make_nodes()
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            powersgd = sent.powersgd_script(folder / "powersgd")
            with sent.Nursery(SQUAD_CACHE=str(folder / "cache")) as nursery:
                for rate in options.rates:
                    limit_link(rate)
                    for case in CASES:
                        script = powersgd if case[1] == sent.POWERSGD else sent.DISTRIBUTED
                        row = measure(nursery, case, rate, script, folder)
                        rows.append(row)
                        print(row, flush=True)
    finally:
        remove_nodes()
    table = {
        "title": "Strategies and PowerSGD between two nodes",
        "conditions": "two network namespaces of one machine, two gloo ranks in each, which share"
        f" its cores with other programs; the sample's BERT, batch 16, {STEPS} steps; tc limits what each node sends."
        f" A step: the median from step {MEASURED_FROM + 1} on. Sent by each node: in the whole run,"
        " with its start (four all-reduces of a gradient) and its end, headers included. PowerSGD"
        f" sends exact gradients for {sent.POWERSGD_START} steps",
        "columns": [
            "link",
            "strategy",
            "gradients",
            "a step, ms",
            "all steps, s",
            "sent by each node, MB",
            f"loss at step {sent.POWERSGD_START + 1}",
            f"loss, mean of the last 5 of {STEPS} steps",
        ],
        "rows": rows,
        "environment": machine,
    }
    measuring.write_tables(sent.RESULTS / "two-nodes.json", [table])


if __name__ == "__main__":
    main()

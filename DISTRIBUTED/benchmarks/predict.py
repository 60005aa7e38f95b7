"""Predicts how a training scales, after checking the model against what was measured.

    python DISTRIBUTED/benchmarks/predict.py
    python DISTRIBUTED/benchmarks/predict.py --measured RUN    from a run on one GPU

The first writes DISTRIBUTED/results/predicted.json and predicted-scaling.json, for report.py
--table predicted, and the charts of DISTRIBUTED/README.md. The second prints the same prediction
with all step times made longer or shorter, as a run of baseline/train.py was.

A step on p ranks takes as long as one rank computes its share, and then as long as the gradients
are still on their way. Three things decide that: the time to compute a share, the time of an
all-reduce, and how much of it the backward pass hides.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import link
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "DISTRIBUTED/results"
README = ROOT / "DISTRIBUTED/README.md"
STEPS = ROOT / "baseline/results/predicted-steps.json"

BERT_BASE = {"parameters": 108_893_186, "embeddings": (30522 + 512 + 2 + 2) * 768}
BERT_LARGE = {"parameters": 336_226_108, "embeddings": (30522 + 512 + 2 + 2) * 1024}
# baseline/sample/config.json: a vocabulary of 1,263, and 128 numbers for each token.
SAMPLE = {"parameters": 822_786, "embeddings": (1263 + 512 + 2 + 2) * 128}
EPOCH_FEATURES = 88492


# 1. An all-reduce


@dataclasses.dataclass
class Link:
    """What lies between two ranks.

    latency: seconds that a message takes whatever its size; bandwidths: bytes/s, one way, by the
    bytes of the all-reduce, smallest first: NCCL sends small ones by slower protocols."""

    latency: float
    bandwidths: dict

    def bandwidth(self, size):
        """Returns bytes/s for an all-reduce of size bytes, between the known sizes on a line."""
        return float(np.interp(size, list(self.bandwidths), list(self.bandwidths.values())))

    def times(self, factor):
        """Returns a link of so many times the bandwidth."""
        return Link(self.latency, {size: factor * one for size, one in self.bandwidths.items()})


def steady_link(latency, bandwidth):
    """Returns a Link of the same bandwidth for all sizes."""
    return Link(latency, {1: bandwidth})


NO_COMMUNICATION = steady_link(0.0, math.inf)


def measured_link(times):
    """Returns the Link between two ranks from their all-reduces, {bytes: seconds}.

    Between two ranks an all-reduce takes 2 latencies and size / bandwidth, see ring(). The two
    smallest tell the latency, the others the bandwidth at their size."""
    (small, small_seconds), (second, second_seconds) = list(times.items())[:2]
    per_byte = (second_seconds - small_seconds) / (second - small)
    latency = (small_seconds - small * per_byte) / 2
    return Link(latency, {size: size / (times[size] - 2 * latency) for size in times})


def ring(size, ranks, a_link):
    """Returns the seconds of an all-reduce of size bytes in a ring, all of whose links are alike.

    Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in
    MPICH": 2 (p - 1) messages, one after the other, in which each rank sends 2 (p - 1) / p of the
    bytes. The time to add numbers up is left out, as in nccl-tests' PERFORMANCE.md."""
    messages = 2 * (ranks - 1)
    return messages * a_link.latency + messages / ranks * size / a_link.bandwidth(size)


def tree(size, nodes, per_node, inside, between):
    """Returns the seconds of an all-reduce by trees between nodes and a ring inside each.

    NCCL's double binary trees (Sanders, Speck and Traff 2009): on average a node sends
    2 (n - 1) / n of the bytes, up and down a tree that is log2(n) high. Both parts run at once."""
    messages = 2 * (per_node - 1)
    latency = messages * inside.latency + 2 * math.ceil(math.log2(nodes)) * between.latency
    inside_seconds = messages / per_node * size / inside.bandwidth(size)
    between_seconds = 2 * (nodes - 1) / nodes * size / between.bandwidth(size)
    return latency + max(inside_seconds, between_seconds)


def all_reduce(size, nodes, per_node, inside, between):
    """Returns the seconds of an all-reduce by NCCL, which takes the faster of ring and tree."""
    ranks = nodes * per_node
    if ranks == 1:
        return 0.0
    if nodes == 1:
        return ring(size, ranks, inside)
    used = [between, inside] if per_node > 1 else [between]
    slowest_ring = max(ring(size, ranks, one) for one in used)
    return min(slowest_ring, tree(size, nodes, per_node, inside, between))


# 2. What the backward pass hides

MIB = 2**20
# The backward pass multiplies twice where the forward pass multiplies once.
BACKWARD_SHARE = 2 / 3


def bucket_sizes(model):
    """Returns the bytes of DDP's buckets in fp32, in the order in which they are sent.

    The first has 1 MiB, the others 25 (DistributedDataParallel's documentation). The embeddings'
    gradient is ready last, and the word embeddings' tensor is not cut: the last bucket has it."""
    embeddings = 4 * model["embeddings"]
    left = 4 * model["parameters"] - embeddings
    sizes = [min(MIB, left)]
    left -= sizes[0]
    while left > 25 * MIB:
        sizes.append(25 * MIB)
        left -= 25 * MIB
    return [*sizes, left + embeddings]


def exposed(model, backward_seconds, seconds_of, bytes_per_number=4):
    """Returns the seconds for which a rank only waits, after its backward pass.

    A bucket is ready when the layers above have been gone through, in proportion to their bytes;
    the embeddings take no time. It is sent when it is ready and the one before has arrived.
    seconds_of: gives the seconds of an all-reduce of so many bytes."""
    sizes = bucket_sizes(model)
    layers = sum(sizes) - 4 * model["embeddings"]
    computed = 0
    arrived = 0.0
    for size in sizes:
        computed = min(computed + size, layers)
        ready = backward_seconds * computed / layers
        arrived = max(ready, arrived) + seconds_of(size * bytes_per_number / 4)
    return arrived - backward_seconds


# 3. Checks: the test cluster

SLOW_LINK = RESULTS / "slow-link.json"
# More than this is marked in the table.
LARGEST_ERROR = 0.15
# measured, predicted: in the unit.
Check = collections.namedtuple(
    "Check", ["source", "what", "shape", "unit", "measured", "predicted"]
)
TEST_CLUSTER = "the test cluster"
CORES = 2  # that all ranks of the test cluster share


def read_run(folder):
    """Returns the seconds of a step and the bandwidth of an all-reduce, in bytes/s."""
    results = json.loads((folder / "results.json").read_text())
    timings = json.loads((folder / "timings.json").read_text())
    steps, seconds = link.count_steady(timings["intervals"])
    bandwidth = 1e9 * (results.get("all_reduce") or {}).get("gigabytes_per_second", 0)
    return seconds / steps, bandwidth


@functools.cache
def median_of_runs(rule, shape):
    """Returns read_run's values of a row of the scaling table: the medians of its three runs."""
    folders = sorted(RESULTS.glob(f"scaling/{rule}-{shape}-*"))
    return [statistics.median(values) for values in zip(*map(read_run, folders), strict=True)]


def line_through(first, second):
    """Returns the function whose graph is the straight line through two points."""
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return lambda x: first[1] + slope * (x - first[0])


def cluster_computing():
    """Returns a function: the seconds in which a rank with a core of its own computes so many
    features. A line through the 1x1 rows, with 8 and with 32."""
    small, _ = median_of_runs("growing", "1x1")
    large, _ = median_of_runs("strong", "1x1")
    return line_through((8, small), (32, large))


def cluster_step(features, ranks, bandwidth, bytes_per_number=4):
    """Returns the seconds of a step of so many features per rank on the test cluster.

    Ranks beyond the two cores take turns, so each computes for longer. gloo sends in a ring, and
    each run has timed one of the gradient's own size, with the latency in it: its bandwidth, in
    bytes/s, or None to leave communication out."""
    computing = cluster_computing()(features) * max(1, ranks / CORES)
    if bandwidth is None:
        return computing
    a_link = steady_link(0.0, bandwidth)
    waiting = exposed(
        SAMPLE,
        BACKWARD_SHARE * computing,
        lambda size: ring(size, ranks, a_link),
        bytes_per_number,
    )
    return computing + waiting


def cluster_check(what, shape, measured, predicted):
    """measured, predicted: seconds of a step."""
    return Check(TEST_CLUSTER, what, shape, "ms a step", 1000 * measured, 1000 * predicted)


def scaling_checks(communicating):
    """The table of scaling.sbatch."""
    checks = []
    for rule, batches in {"strong": (32, 32, 32), "growing": (16, 16, 32)}.items():
        for shape, batch in zip(("1x2", "2x1", "2x2"), batches):
            nodes, per_node = map(int, shape.split("x"))
            ranks = nodes * per_node
            seconds, bandwidth = median_of_runs(rule, shape)
            predicted = cluster_step(batch / ranks, ranks, bandwidth if communicating else None)
            checks.append(cluster_check(f"{rule}, batch {batch}", shape, seconds, predicted))
    return checks


def slow_link_checks(communicating):
    """ddp's rows of link.py's table."""
    content = json.loads(SLOW_LINK.read_text())
    checks = []
    for row in content["rows"]:
        values = dict(zip(content["columns"], row, strict=True))
        if values["strategy"] != "ddp":
            continue
        gradients = values["gradients"]
        batch = values["batch"]
        bandwidth = 1e9 * values["all-reduce GB/s"] if communicating else None
        features = batch / link.RANKS
        predicted = cluster_step(features, link.RANKS, bandwidth, link.BYTES[gradients])
        what = f"link {values['link']}, {gradients}, batch {batch}"
        checks.append(cluster_check(what, "2x2", values["a step, ms"] / 1000, predicted))
    return checks


# 4. Checks: what others have published

# github.com/juanmaxtouyaa/HPCtools4AI at ba38c3e, on FinisTerrae III. DISTRIBUTED/README.md: an
# epoch's seconds and its steps with 160 features per GPU. results/allreduce: seconds by bytes.
HPCTOOLS_EPOCHS = {"1x1": (216.73, 554), "1x2": (112.37, 277)}
HPCTOOLS_EPOCHS |= {"2x1": (111.79, 277), "2x2": (57.24, 139)}
HPCTOOLS_BYTES = (1e6, 4e6, 25e6, 100e6, 435.572744e6)
HPCTOOLS_ALL_REDUCES = {
    "1x2": (0.18600e-3, 0.57144e-3, 2.91112e-3, 9.29543e-3, 33.9968e-3),
    "2x1": (0.19620e-3, 0.56170e-3, 3.09321e-3, 9.85181e-3, 40.3400e-3),
    "2x2": (0.25669e-3, 0.56456e-3, 3.06918e-3, 10.7150e-3, 42.8835e-3),
}
# Two GPUs of a node, through the host's memory.
INSIDE = measured_link(dict(zip(HPCTOOLS_BYTES, HPCTOOLS_ALL_REDUCES["1x2"])))
# Two nodes with a GPU each, through InfiniBand HDR100, of 12.5 GB/s, without GPUDirect.
BETWEEN = measured_link(dict(zip(HPCTOOLS_BYTES, HPCTOOLS_ALL_REDUCES["2x1"])))
LINE = 12.5e9
# NVLink 3: two thirds of its 300 GB/s one way, and 3.4 microseconds a message (NCCL's
# src/graph/tuning.cc, ring, Simple), are assumed.
NVLINK = steady_link(3.4e-6, 200e9)


def ddp_exposed(model, computing, nodes, per_node, inside, between, bytes_per_number=4):
    """Returns the seconds a step that a DDP training by NCCL waits for; computing: its step's."""

    def seconds_of(size):
        return all_reduce(size, nodes, per_node, inside, between)

    return exposed(model, BACKWARD_SHARE * computing, seconds_of, bytes_per_number)


LONGER = "what a step takes longer than on 1x1"


def hpctools_checks(communicating):
    """Each rank has 160 features whatever the ranks, so a step computes for as long as on 1x1."""
    source = "HPCtools4AI"
    links = [INSIDE, BETWEEN] if communicating else [NO_COMMUNICATION] * 2
    checks = []
    for size, measured in zip(HPCTOOLS_BYTES, HPCTOOLS_ALL_REDUCES["2x2"]):
        what = f"all-reduce of {size / 1e6:.0f} MB"
        predicted = all_reduce(size, 2, 2, *links)
        checks.append(Check(source, what, "2x2", "ms", 1000 * measured, 1000 * predicted))
    one_gpu, steps_of_one = HPCTOOLS_EPOCHS["1x1"]
    waits = []
    for shape in ("1x2", "2x1", "2x2"):
        measured, steps = HPCTOOLS_EPOCHS[shape]
        nodes, per_node = map(int, shape.split("x"))
        computing = one_gpu / (nodes * per_node)
        waiting = ddp_exposed(BERT_BASE, one_gpu / steps_of_one, nodes, per_node, *links)
        what = "an epoch, 160 per GPU"
        predicted = computing + steps * waiting
        checks.append(Check(source, what, shape, "s an epoch", measured, predicted))
        longer = 1000 * (measured - computing) / steps
        waits.append(Check(source, LONGER, shape, "ms a step", longer, 1000 * waiting))
    return checks + waits


# MLPerf Training, BERT-Large: GPUs a node, one node's sequences a step and GPU, its sequences/s a
# GPU, the link inside a node, GB/s a node by the data sheet; then of more nodes the sequences a
# step and GPU and the sequences/s a GPU, and what the nodes' links are where they differ.
# mlcommons/training_results_v2.1 at 9b4d2df and _v3.0 at 9f08e30, Dell/results/SYSTEM/bert, the
# median of 5 to 10 files each (XE8545: of 1 or 2): train_samples / raw_train_time / GPUs. DGX: from
# run_start to run_stop; v2.0's NVIDIA/results/dgxa100_n8 and n128, of 2 files each, one node of
# v2.1.
R750XA = (4, 112, 230.01, INSIDE)
XE8545 = (4, 64, 289.3, NVLINK)
XE8545_80GB = (4, 112, 313.2, NVLINK)
DGX_A100 = (8, 56, 302, NVLINK)
MLPERF = [
    ("R750xa, EDR", R750XA, 12.5, {2: (56, 164.82), 4: (48, 156.64), 8: (48, 154.85)}),
    ("R750xa, Omni-Path", R750XA, 12.5, {2: (56, 161.47), 4: (48, 122.05), 8: (48, 148.40)}),
    ("R750xa, 2 x Omni-Path", R750XA, 25, {2: (56, 182.00), 4: (48, 161.37), 8: (48, 160.24)}),
    (
        "XE8545, 2 x HDR",
        XE8545,
        50,
        {2: (56, 214.8), 4: (28, 154.4), 8: (48, 210.1), 16: (48, 207.5), 32: (24, 147.2)},
    ),
    ("XE8545 of 80 GB, 2 x HDR", XE8545_80GB, 50, {2: (56, 218.8)}),
    ("DGX A100, 8 x HDR", DGX_A100, 200, {8: (48, 284.5), 128: (4, 108.7)}),
]


def mlperf_step(nodes, sequences, one_node, gigabytes):
    """Returns the seconds in which a step of MLPerf's code computes, from that of one node, and in
    which it sends; gigabytes: per second and node, by the data sheet.

    Its fp16 gradients are sent after the backward pass (dwu_overlap_reductions=False): summed and
    scattered inside a node, summed between nodes, gathered inside. What one node takes without the
    sending inside is computing, and in proportion to the sequences. None of these links' times is
    published: R750xa's inside is taken for FinisTerrae III's, and those between nodes for as far
    below their data sheet as FinisTerrae III's is."""
    per_node, one_node_sequences, speed, inside = one_node
    size = 2 * BERT_LARGE["parameters"]
    inside_seconds = ring(size, per_node, inside)
    computing = (one_node_sequences / speed - inside_seconds) * sequences / one_node_sequences
    between = BETWEEN.times(1e9 * gigabytes / LINE)
    return computing, inside_seconds + all_reduce(size, nodes, 1, NO_COMMUNICATION, between)


def mlperf_checks(communicating):
    checks = []
    for system, one_node, gigabytes, rows in MLPERF:
        for nodes, (sequences, speed) in rows.items():
            computing, sending = mlperf_step(nodes, sequences, one_node, gigabytes)
            predicted = computing + sending if communicating else computing
            values = (1000 * sequences / speed, 1000 * predicted)
            what = f"{system}: BERT-Large, {sequences} per GPU"
            checks.append(Check("MLPerf", what, f"{nodes}x{one_node[0]}", "ms a step", *values))
    return checks


# One device against eight in a node, each with the features given and its link's data sheet.
# NVIDIA DeepLearningExamples, PyTorch BERT on a DGX A100 with NVLink 3: features a step, features/s
# of one and of eight, bytes per gradient. The first two of README.md at a9e2c1d, the others of that
# of container 20.06. Its boxes of V100, with another NVLink, are left out.
NVIDIA_SPEEDS = {
    "fp16, 32 per GPU of 80 GB": (32, 110.5, 846.7, 2),
    "TF32, 32 per GPU of 80 GB": (32, 61.5, 469.8, 4),
    "fp16, 32 per GPU of 40 GB": (32, 116, 861, 2),
    "TF32, 16 per GPU of 40 GB": (16, 44, 324, 4),
}
# huggingface/optimum-habana, tests/baselines/bert_base_uncased.json at 897242c and at 04a7ee7:
# features/s, and seconds of train_runtime. Gaudi has seven ports of 100 Gbit/s to the seven others.
GAUDI_FEATURES = 24
GAUDI_SPEEDS = {"897242c": (158.687, 1240.638), "04a7ee7": (155.037, 882.256)}
GAUDI_RUNTIMES = (568.832, 97.7157)
GAUDI_BANDWIDTH = 87.5e9


def eight_devices_checks(communicating):
    nvlink = gaudi = NO_COMMUNICATION
    if communicating:
        nvlink = NVLINK
        gaudi = steady_link(NVLINK.latency, GAUDI_BANDWIDTH)
    checks = []
    for what, (features, one, eight, bytes_per_number) in NVIDIA_SPEEDS.items():
        computing = features / one
        waiting = ddp_exposed(BERT_LARGE, computing, 1, 8, nvlink, None, bytes_per_number)
        values = (1000 * 8 * features / eight, 1000 * (computing + waiting))
        what = f"BERT-Large, {what}"
        checks.append(Check("NVIDIA DeepLearningExamples", what, "1x8", "ms a step", *values))

    waits = {}
    for commit, (one, eight) in GAUDI_SPEEDS.items():
        computing = GAUDI_FEATURES / one
        waits[commit] = ddp_exposed(BERT_BASE, computing, 1, 8, gaudi, None)
        values = (1000 * 8 * GAUDI_FEATURES / eight, 1000 * (computing + waits[commit]))
        what = f"train_samples_per_second, 24 per Gaudi, at {commit}"
        checks.append(Check("optimum-habana", what, "1x8", "ms a step", *values))

    one, eight = GAUDI_RUNTIMES
    predicted = one / 8 + EPOCH_FEATURES / (8 * GAUDI_FEATURES) * waits["897242c"]
    what = "train_runtime, an epoch and the start, at 897242c"
    checks.append(Check("optimum-habana", what, "1x8", "s an epoch", eight, predicted))
    return checks


def checks_of_measured_links(communicating=True):
    """Returns the checks in which the links' own all-reduces were timed too."""
    return [
        *scaling_checks(communicating),
        *slow_link_checks(communicating),
        *hpctools_checks(communicating),
    ]


def checks_of_data_sheets(communicating=True):
    """Returns the checks in which nobody has published what the links do."""
    return [*mlperf_checks(communicating), *eight_devices_checks(communicating)]


def off_by(check):
    return check.predicted / check.measured - 1


# 5. More GPUs

GPU_COUNTS = [2**power for power in range(11)]
# Global batches, and BERT-Base's F1 that others have published for them with AdamW: Devlin et al.
# 2019, three epochs; huggingface/optimum-graphcore, three; huggingface/optimum-habana, one epoch at
# 2e-4 and two at 3e-5. Nothing was found above 192; 512 is run_2x2.sbatch's.
BATCHES = {32: "88.5", 128: "88.7", 192: "87.6 and 85.7", 512: "none"}
NODE_SIZES = [2, 4, 8]
NODE_GIGABYTES = [12.5, 25, 50]
# GPUs and GB/s a node for the short table and the charts; the first is FinisTerrae III's.
NETWORKS = list(zip(NODE_SIZES, NODE_GIGABYTES))
INSIDE_NODES = {2: INSIDE, 4: NVLINK, 8: NVLINK}
# Of the bandwidth that a link has if it is as near to its data sheet as FinisTerrae III's. The best
# of MLPerf's XE8545, with two links of 25 GB/s: 19.5 of 43 GB/s a node would give the steps of 8
# and 16 nodes.
POOR_LINKS = 0.45
MEAN_TOKENS = 171
LONGEST_TOKENS = 392  # 384 in a row whose length divides by eight


def row_tokens(features):
    """Returns the tokens of a packed row with a rank's share of a batch, on average features.

    All ranks have a row of one length, so it has room for the largest share. Counted by train.py's
    plan_training for 88,492 lengths spread as SQuAD's (benchmarks/launches.py of baseline), batches
    of 32 to 512 dealt to 1 to 512 ranks: 111 tokens more than the mean share, to within 8 %, and
    room for the longest feature: with one feature per rank, more than half of the row is unused."""
    return max(MEAN_TOKENS * features + 111, LONGEST_TOKENS)


def predicted_computing():
    """Returns a function: the seconds in which an A100-PCIe computes a row of so many tokens.

    A line through the compiled steps of 32 and 128 features in predicted-steps.json."""
    tables = json.loads(STEPS.read_text())
    steps = next(table for table in tables if table["title"].startswith("A step on A100"))
    points = {}
    for row in steps["rows"]:
        values = dict(zip(steps["columns"], row, strict=True))
        if values["rung"] == "compiled":
            points[values["batch"]] = (values["tokens"], values["device ms"] / 1000)
    return line_through(points[32], points[128])


def measured_computing(run):
    """Returns the same function, times what a run on one GPU took longer than predicted.

    Ends the program with one line where the run cannot tell."""
    path = Path(run) / "results.json"
    try:
        results = json.loads(path.read_text())
        batch = results["arguments"]["batch_size"]
        seconds = batch / results["features_per_second"]
        world_size = results["world_size"]
        parameters = results["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{path}: tells no speed ({error!r}): give a finished run of baseline/run.sbatch")
    if world_size != 1:
        refuse(f"{path}: world_size is {world_size}: give a run on one GPU")
    if not math.isclose(parameters, BERT_BASE["parameters"], rel_tol=0.01):
        refuse(f"{path}: parameters are {parameters:,}: give a run of BERT-Base")
    predicted = predicted_computing()
    factor = seconds / predicted(row_tokens(batch))
    return lambda tokens: factor * predicted(tokens)


def epoch_seconds(computing, batch, gpus, per_node, node_gigabytes, factor=1):
    """Returns an epoch's seconds by ddp with bf16 gradients, or None with more GPUs than features.

    computing: a function of a row's tokens, see predicted_computing; factor: of the bandwidth that
    the links between nodes have if they are as near to their data sheet as FinisTerrae III's."""
    if gpus > batch:
        return None
    inside = INSIDE_NODES[per_node]
    between = BETWEEN.times(factor * node_gigabytes * 1e9 / LINE)
    used = min(per_node, gpus)
    seconds = computing(row_tokens(batch / gpus))
    waiting = ddp_exposed(BERT_BASE, seconds, gpus // used, used, inside, between, 2)
    return EPOCH_FEATURES / batch * (seconds + waiting)


# 6. Tables and charts


def checks_table(make_checks, title, conditions, environment):
    rows = []
    for check, silent in zip(make_checks(), make_checks(communicating=False), strict=True):
        measured = round(check.measured, 2 if check.unit == "ms" else 1)
        predicted = round(check.predicted, 2 if check.unit == "ms" else 1)
        error = f"{off_by(check):+.1%}"
        if abs(off_by(check)) > LARGEST_ERROR:
            error = f"**{error}**"
        rows.append([*check[:4], measured, predicted, error, f"{off_by(silent):+.1%}"])
    return {
        "title": title,
        "conditions": f"off by: predicted / measured - 1; {conditions}",
        "columns": ["source", "what", "nodes x ranks", "unit", "measured", "predicted", "off by"]
        + ["off by without communication"],
        "rows": rows,
        "environment": environment,
    }


def measured_links_table():
    cluster = json.loads(SLOW_LINK.read_text())["environment"]
    return checks_table(
        checks_of_measured_links,
        "The model of scaling, where the links were measured",
        "predicted from the time on one rank and the links' own all-reduces",
        {
            "test cluster": f"measured at commit {cluster['commit']}, {cluster['date']}",
            "HPCtools4AI": "quoted with its sources in predict.py",
        },
    )


def data_sheets_table():
    return checks_table(
        checks_of_data_sheets,
        "The model of scaling, where only the links' data sheets are known",
        "predicted from the time on one device, MLPerf's from one node's",
        {"all": "quoted with their sources in predict.py"},
    )


def published_errors(checks):
    """Returns the smallest and the largest error of published trainings, as a caption has them."""
    errors = [off_by(check) for check in checks if check.source != TEST_CLUSTER]
    return f"{min(errors):+.0%} to {max(errors):+.0%}"


# What the captions say of the step times, unless they are those of a run.
PREDICTED_STEPS = "A100-PCIe, packed, compiled, a step's own time errs by -7% to +10%"


def conditions(steps):
    """Returns the captions' words on what is assumed, and on the errors."""
    of_measured = [check for check in checks_of_measured_links() if check.what != LONGER]
    of_data_sheets = published_errors(checks_of_data_sheets())
    return (
        f"predicted, not measured: {steps}; ddp, bf16 gradients. The model of scaling errs by"
        f" {published_errors(of_measured)} on four GPUs of FinisTerrae III, and on 8 to 1,024 whose"
        f" links are known by their data sheets alone by {of_data_sheets}"
        ", mostly too fast; of the networks here all but the first are known by those alone. The"
        " device's time alone: the host has to launch some 1,050 kernels a step besides"
    )


def scaling_table(computing, steps=PREDICTED_STEPS):
    """A row for each network and batch, a column for each number of GPUs."""
    rows = []
    for per_node in NODE_SIZES:
        for gigabytes in NODE_GIGABYTES:
            for batch in BATCHES:
                row = [per_node, gigabytes, batch]
                for gpus in GPU_COUNTS:
                    seconds = epoch_seconds(computing, batch, gpus, per_node, gigabytes)
                    row.append("-" if seconds is None else round(seconds, 1))
                rows.append(row)
    return {
        "title": "An epoch of BERT-Base on SQuAD v1.1 with 1 to 1,024 GPUs, predicted, in seconds",
        "conditions": f"{conditions(steps)}; a dash: fewer features than GPUs",
        "columns": ["GPUs a node", "GB/s a node", "global batch", *map(str, GPU_COUNTS)],
        "rows": rows,
        "environment": describe_steps(),
    }


def fastest_table(computing):
    """A row for each network and batch: the GPUs beyond which an epoch gets no shorter."""
    rows = []
    for per_node, gigabytes in NETWORKS:
        for batch, f1 in BATCHES.items():
            epochs = {}
            for gpus in GPU_COUNTS:
                seconds = epoch_seconds(computing, batch, gpus, per_node, gigabytes)
                if seconds is not None:
                    epochs[gpus] = seconds
            fastest = min(epochs, key=epochs.get)
            row = [per_node, gigabytes, batch, f1, fastest, batch / fastest]
            poor = epoch_seconds(computing, batch, fastest, per_node, gigabytes, POOR_LINKS)
            row += [round(epochs[fastest], 1), round(epochs[1] / epochs[fastest], 1)]
            is_measured = (per_node, gigabytes) == NETWORKS[0]
            rows.append([*row, "-" if is_measured else round(poor, 1)])
    return {
        "title": "The fastest epoch of each batch, predicted",
        "conditions": f"{conditions(PREDICTED_STEPS)}. Poor links: {POOR_LINKS:.0%} of the"
        " bandwidth between nodes, as the best of MLPerf's XE8545 seem to have",
        "columns": ["GPUs a node", "GB/s a node", "global batch", "published F1"]
        + ["GPUs of the fastest epoch", "features per GPU", "seconds", "speed-up"]
        + ["seconds with poor links"],
        "rows": rows,
        "environment": describe_steps(),
    }


def describe_steps():
    """Returns where the predicted step times come from."""
    recorded = json.loads(STEPS.read_text())[0]["environment"]
    return {"steps": f"recorded on {recorded['devices'][0]} at commit {recorded['commit']}"}


DRAWN_NETWORKS = [NETWORKS[0], NETWORKS[-1]]
# Of a batch's line.
COLOURS = {32: "#4477aa", 128: "#228833", 192: "#ccbb44", 512: "#ee6677"}


def draw_chart(computing, per_node, gigabytes):
    """Returns mermaid's chart of an epoch's seconds against the GPUs, a line for each batch."""
    lines = []
    slowest = 0
    for batch in COLOURS:
        epochs = [epoch_seconds(computing, batch, gpus, per_node, gigabytes) for gpus in GPU_COUNTS]
        epochs = [seconds for seconds in epochs if seconds is not None]
        slowest = max(slowest, *epochs)
        lines.append(f"    line [{', '.join(f'{seconds:.1f}' for seconds in epochs)}]")
    theme = {
        "themeVariables": {"xyChart": {"plotColorPalette": ", ".join(COLOURS.values())}},
        "xyChart": {"width": 900, "height": 400},
    }
    counts = ", ".join(f'"{gpus}"' for gpus in GPU_COUNTS)
    return f"""```mermaid
%%{{init: {json.dumps(theme)}}}%%
xychart-beta
    title "predicted: seconds an epoch, {per_node} GPUs and {gigabytes:g} GB/s a node"
    x-axis "GPUs" [{counts}]
    y-axis "s" 0 --> {slowest * 1.1:.0f}
{chr(10).join(lines)}
```"""


def draw_charts():
    computing = predicted_computing()
    return "\n\n".join(draw_chart(computing, *network) for network in DRAWN_NETWORKS)


CHARTS = re.compile(r"(<!-- charts of predict.py -->\n).*?(\n<!-- charts end -->)", re.DOTALL)


def make_tables():
    """Returns {file's name: its tables}."""
    computing = predicted_computing()
    return {
        "predicted.json": [measured_links_table(), data_sheets_table(), fastest_table(computing)],
        "predicted-scaling.json": [scaling_table(computing)],
    }


def show(table):
    print(f"\n{table['title']}: {table['conditions']}")
    for row in [table["columns"], *table["rows"]]:
        print("| " + " | ".join(map(str, row)) + " |")


def refuse(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", metavar="RUN", help="a folder with results.json")
    run = parser.parse_args().measured
    if run:
        steps = f"a step's time as {run} has it, other batches in proportion"
        show(scaling_table(measured_computing(run), steps))
        return
    for name, tables in make_tables().items():
        text = json.dumps(tables, indent=1, ensure_ascii=False)
        (RESULTS / name).write_text(text + "\n", encoding="utf-8")
        for table in tables:
            show(table)
    page = README.read_text(encoding="utf-8")
    README.write_text(CHARTS.sub(rf"\g<1>{draw_charts()}\g<2>", page), encoding="utf-8")


if __name__ == "__main__":
    main()

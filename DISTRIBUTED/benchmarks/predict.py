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
    """latency: seconds that a message takes whatever its size; bandwidth: bytes/s, one way."""

    latency: float
    bandwidth: float


def fit_link(small, large):
    """Returns the Link between two ranks from two all-reduces, each (bytes, seconds).

    Between two ranks an all-reduce takes 2 latencies and size / bandwidth, see ring()."""
    bandwidth = (large[0] - small[0]) / (large[1] - small[1])
    return Link((small[1] - small[0] / bandwidth) / 2, bandwidth)


def ring(size, ranks, a_link):
    """Returns the seconds of an all-reduce of size bytes in a ring, whose slowest link is given.

    Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in
    MPICH": 2 (p - 1) messages, one after the other, in which each rank sends 2 (p - 1) / p of the
    bytes. The time to add numbers up is left out, as in nccl-tests' PERFORMANCE.md."""
    messages = 2 * (ranks - 1)
    return messages * a_link.latency + messages / ranks * size / a_link.bandwidth


def tree(size, nodes, per_node, inside, between):
    """Returns the seconds of an all-reduce by trees between nodes and a ring inside each.

    NCCL's double binary trees (Sanders, Speck and Traff 2009): on average a node sends
    2 (n - 1) / n of the bytes, up and down a tree that is log2(n) high. Both parts run at once."""
    messages = 2 * (per_node - 1)
    latency = messages * inside.latency + 2 * math.ceil(math.log2(nodes)) * between.latency
    inside_seconds = messages / per_node * size / inside.bandwidth
    between_seconds = 2 * (nodes - 1) / nodes * size / between.bandwidth
    return latency + max(inside_seconds, between_seconds)


def all_reduce(size, nodes, per_node, inside, between):
    """Returns the seconds of an all-reduce by NCCL, which takes the faster of ring and tree."""
    ranks = nodes * per_node
    if ranks == 1:
        return 0.0
    if nodes == 1:
        return ring(size, ranks, inside)
    used = [between, inside] if per_node > 1 else [between]
    slowest = Link(max(a.latency for a in used), min(a.bandwidth for a in used))
    return min(ring(size, ranks, slowest), tree(size, nodes, per_node, inside, between))


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

# link.py's table of the machine and the day that the table of scaling.sbatch is of.
SLOW_LINK = RESULTS / "slow-link-2026-11-25.json"
# More than this is marked in the table.
LARGEST_ERROR = 0.15
# measured, predicted: in the unit.
Check = collections.namedtuple(
    "Check", ["source", "what", "shape", "unit", "measured", "predicted"]
)
TEST_CLUSTER = "the test cluster"
CORES = 2  # that all ranks of the test cluster share


def read_run(folder):
    """Returns (seconds of a step, of its exposed communication, of an all-reduce's bandwidth)."""
    results = json.loads((folder / "results.json").read_text())
    timings = json.loads((folder / "timings.json").read_text())
    steps, seconds = link.count_steady(timings["intervals"])
    waited = timings["phases"]["exposed_communication"]["seconds"]
    bandwidth = 1e9 * (results.get("all_reduce") or {}).get("gigabytes_per_second", 0)
    return seconds / steps, waited / steps, bandwidth


@functools.cache
def mean_of_runs(rule, shape):
    """Returns read_run's values of a row of the scaling table: the means of its three runs."""
    folders = sorted(RESULTS.glob(f"scaling/{rule}-{shape}-*"))
    return [statistics.mean(values) for values in zip(*map(read_run, folders), strict=True)]


def line_through(first, second):
    """Returns the function whose graph is the straight line through two points."""
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return lambda x: first[1] + slope * (x - first[0])


def cluster_computing():
    """Returns a function: the seconds in which a rank with a core of its own computes so many
    features. A line through the 1x1 rows, with 8 and with 32."""
    small, *_ = mean_of_runs("growing", "1x1")
    large, *_ = mean_of_runs("strong", "1x1")
    return line_through((8, small), (32, large))


def cluster_latency():
    """Returns the latency of gloo's messages, by what two ranks with a core each wait for (1x2).

    No all-reduce of small size was measured there, so these two rows have to tell it."""
    latencies = []
    for rule in ("strong", "growing"):
        _, waited, bandwidth = mean_of_runs(rule, "1x2")
        latencies.append((waited - bucket_sizes(SAMPLE)[-1] / bandwidth) / 2)
    return statistics.mean(latencies)


def cluster_step(features, ranks, a_link, bytes_per_number=4):
    """Returns the seconds of a step of so many features per rank on the test cluster.

    Ranks beyond the two cores take turns, so each computes for longer; gloo sends in a ring."""
    computing = cluster_computing()(features) * max(1, ranks / CORES)
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


def scaling_checks(latency):
    """The table of scaling.sbatch; latency: of a message."""
    checks = []
    for rule, batches in {"strong": (32, 32, 32), "growing": (16, 16, 32)}.items():
        for shape, batch in zip(("1x2", "2x1", "2x2"), batches):
            nodes, per_node = map(int, shape.split("x"))
            ranks = nodes * per_node
            seconds, _, bandwidth = mean_of_runs(rule, shape)
            predicted = cluster_step(batch / ranks, ranks, Link(latency, bandwidth))
            checks.append(cluster_check(f"{rule}, batch {batch}", shape, seconds, predicted))
    return checks


def slow_link_checks(latency):
    """The table of link.py. A limited link has the limit's bandwidth, others the measured one."""
    content = json.loads(SLOW_LINK.read_text())
    checks = []
    for row in content["rows"]:
        values = dict(zip(content["columns"], row, strict=True))
        gradients = values["gradients"]
        batch = values["batch"]
        limit = re.match(r"(\d+) Mbit/s", values["link"])
        bandwidth = 1e9 * values["all-reduce GB/s"]
        if limit:
            bandwidth = int(limit[1]) * 1e6 / 8
        predicted = cluster_step(
            batch / link.RANKS, link.RANKS, Link(latency, bandwidth), link.BYTES[gradients]
        )
        what = f"link {values['link']}, {gradients}, batch {batch}"
        checks.append(cluster_check(what, "2x2", values["a step, ms"] / 1000, predicted))
    return checks


# 4. Checks: what others have published

# github.com/juanmaxtouyaa/HPCtools4AI, DISTRIBUTED/README.md and results/allreduce, on FinisTerrae
# III: an epoch's seconds and its steps with 160 features per GPU; all-reduces, bytes and seconds.
HPCTOOLS_EPOCHS = {"1x1": (216.73, 554), "1x2": (112.37, 277)}
HPCTOOLS_EPOCHS |= {"2x1": (111.79, 277), "2x2": (57.24, 139)}
# Two GPUs of a node, through the host's memory.
INSIDE = fit_link((1e6, 0.18600e-3), (435.572744e6, 33.9968e-3))
# Two nodes with a GPU each, through InfiniBand HDR100, of 12.5 GB/s.
BETWEEN = fit_link((1e6, 0.19620e-3), (435.572744e6, 40.3400e-3))
HPCTOOLS_ALL_REDUCE_2X2 = 42.8835e-3


def ddp_exposed(model, computing, nodes, per_node, inside, between, bytes_per_number=4):
    """Returns the seconds a step that a DDP training by NCCL waits for; computing: its step's."""

    def seconds_of(size):
        return all_reduce(size, nodes, per_node, inside, between)

    return exposed(model, BACKWARD_SHARE * computing, seconds_of, bytes_per_number)


def hpctools_checks(inside, between):
    """Each rank has 160 features whatever the ranks, so a step computes for as long as on 1x1."""
    source = "HPCtools4AI"
    measured = 1000 * HPCTOOLS_ALL_REDUCE_2X2
    predicted = 1000 * all_reduce(435.572744e6, 2, 2, inside, between)
    checks = [Check(source, "all-reduce of 435.6 MB", "2x2", "ms", measured, predicted)]
    one_gpu, steps_of_one = HPCTOOLS_EPOCHS["1x1"]
    for shape in ("1x2", "2x1", "2x2"):
        measured, steps = HPCTOOLS_EPOCHS[shape]
        nodes, per_node = map(int, shape.split("x"))
        computing = one_gpu / steps_of_one
        waiting = ddp_exposed(BERT_BASE, computing, nodes, per_node, inside, between)
        predicted = one_gpu / (nodes * per_node) + steps * waiting
        what = "an epoch, 160 per GPU"
        checks.append(Check(source, what, shape, "s an epoch", measured, predicted))
    return checks


# MLPerf Training 2.1 and 3.0, BERT-Large on Dell's R750xa, each with four A100-PCIe: nodes, links
# of 100 Gbit/s a node, sequences a step and GPU, sequences/s a GPU. One and two nodes: medians of
# ten. Four and eight: the first of ten, result_0.txt in mlcommons/training_results_v3.0 at 9f08e30,
# Dell/results/{4,8}xR750xax4A100-PCIE-80GB-{1,2}opa/bert: samples / raw_train_time / GPUs.
MLPERF_ONE_NODE = (112, 234)
MLPERF = [
    (2, 1, 56, 165),
    (2, 2, 56, 182),
    (4, 1, 48, 2550528 / 1313.895 / 16),
    (4, 2, 48, 2700288 / 1034.710 / 16),
    (8, 1, 48, 2800128 / 593.840 / 32),
    (8, 2, 48, 2975232 / 579.403 / 32),
]


def mlperf_step(nodes, links, sequences, inside, between):
    """Returns the seconds of a step of MLPerf's code, from that of one node.

    Its fp16 gradients are sent after the backward pass (dwu_overlap_reductions=False): summed and
    scattered inside a node, summed between nodes, gathered inside. What one node takes without the
    sending inside is computing, and in proportion to the sequences. The links inside and between
    are not published: they are taken to be as FinisTerrae III's, which are of the same kinds."""
    size = 2 * BERT_LARGE["parameters"]
    inside_seconds = ring(size, 4, inside)
    one_node_sequences, speed = MLPERF_ONE_NODE
    computing = (one_node_sequences / speed - inside_seconds) * sequences / one_node_sequences
    all_links = Link(between.latency, links * between.bandwidth)
    return computing + inside_seconds + ring(size, nodes, all_links)


def mlperf_checks(inside, between):
    checks = []
    for nodes, links, sequences, speed in MLPERF:
        measured = 1000 * sequences / speed
        predicted = 1000 * mlperf_step(nodes, links, sequences, inside, between)
        what = f"BERT-Large, {sequences} per GPU, links per node: {links}"
        source = "MLPerf, from 1x4"
        checks.append(Check(source, what, f"{nodes}x4", "ms a step", measured, predicted))
    return checks


# One device against eight in a node, each with the features given and its link's data sheet.
# NVIDIA DeepLearningExamples, PyTorch BERT on a DGX A100, features/s; NVLink 3.
NVIDIA_FEATURES = 32
NVIDIA_SPEEDS = (110.5, 846.7)
NVLINK_BANDWIDTH = 300e9
# huggingface/optimum-habana at 897242c, tests/baselines/bert_base_uncased.json: features/s, and
# seconds of train_runtime. Gaudi has seven ports of 100 Gbit/s to the seven others.
GAUDI_FEATURES = 24
GAUDI_SPEEDS = (158.687, 1240.638)
GAUDI_RUNTIMES = (568.832, 97.7157)
GAUDI_BANDWIDTH = 87.5e9


def eight_devices_checks(latency):
    """latency: of a message, which neither has published."""
    one, eight = NVIDIA_SPEEDS
    computing = NVIDIA_FEATURES / one
    inside = Link(latency, NVLINK_BANDWIDTH)
    waiting = ddp_exposed(BERT_LARGE, computing, 1, 8, inside, None, bytes_per_number=2)
    values = (1000 * 8 * NVIDIA_FEATURES / eight, 1000 * (computing + waiting))
    what = "BERT-Large, fp16, 32 per GPU"
    checks = [Check("NVIDIA DeepLearningExamples", what, "1x8", "ms a step", *values)]

    one, eight = GAUDI_SPEEDS
    computing = GAUDI_FEATURES / one
    inside = Link(latency, GAUDI_BANDWIDTH)
    waiting = ddp_exposed(BERT_BASE, computing, 1, 8, inside, None)
    values = (1000 * 8 * GAUDI_FEATURES / eight, 1000 * (computing + waiting))
    what = "train_samples_per_second, 24 per Gaudi"
    checks.append(Check("optimum-habana", what, "1x8", "ms a step", *values))

    one, eight = GAUDI_RUNTIMES
    predicted = one / 8 + EPOCH_FEATURES / (8 * GAUDI_FEATURES) * waiting
    checks.append(Check("optimum-habana", STARTING_TOO, "1x8", "s an epoch", eight, predicted))
    return checks


# The one row that is over 15 %: the model has no start, Trainer's train_runtime has.
STARTING_TOO = "train_runtime, an epoch and the start"


def all_checks(with_latency=True):
    """Returns the checks, in the order of the table."""
    factor = 1 if with_latency else 0
    inside = Link(factor * INSIDE.latency, INSIDE.bandwidth)
    between = Link(factor * BETWEEN.latency, BETWEEN.bandwidth)
    of_gloo = factor * cluster_latency()
    return [
        *scaling_checks(of_gloo),
        *slow_link_checks(of_gloo),
        *hpctools_checks(inside, between),
        *mlperf_checks(inside, between),
        *eight_devices_checks(inside.latency),
    ]


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
# What InfiniBand gives of its line rate: HPCtools4AI's 10.8 of 12.5 GB/s.
SHARE_OF_LINE = BETWEEN.bandwidth / 12.5e9
# In a node of two GPUs they talk through the host's memory; of four or eight, by NVLink 3, of which
# two thirds and 3.4 microseconds a message are assumed (NCCL's src/graph/tuning.cc, ring, Simple).
INSIDE_NODES = {2: INSIDE}
INSIDE_NODES[4] = INSIDE_NODES[8] = Link(3.4e-6, NVLINK_BANDWIDTH * 2 / 3)
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


def epoch_seconds(computing, batch, gpus, per_node, node_gigabytes):
    """Returns an epoch's seconds by ddp with bf16 gradients, or None with more GPUs than features.

    computing: a function of a row's tokens, see predicted_computing."""
    if gpus > batch:
        return None
    inside = INSIDE_NODES[per_node]
    between = Link(BETWEEN.latency, SHARE_OF_LINE * node_gigabytes * 1e9)
    used = min(per_node, gpus)
    seconds = computing(row_tokens(batch / gpus))
    waiting = ddp_exposed(BERT_BASE, seconds, gpus // used, used, inside, between, 2)
    return EPOCH_FEATURES / batch * (seconds + waiting)


# 6. Tables and charts


def checks_table():
    rows = []
    for check, without in zip(all_checks(), all_checks(with_latency=False), strict=True):
        measured = round(check.measured, 1)
        predicted = round(check.predicted, 1)
        errors = [f"{off_by(one):+.1%}" for one in (check, without)]
        if abs(off_by(check)) > LARGEST_ERROR:
            errors[0] = f"**{errors[0]}**"
        rows.append([*check[:4], measured, predicted, *errors])
    cluster = json.loads(SLOW_LINK.read_text())["environment"]
    return {
        "title": "The model of scaling against what was measured",
        "conditions": "predicted from one GPU's time (of MLPerf from one node's) and the links' own"
        " figures; off by: predicted / measured - 1; the test cluster's latency is what its 1x2"
        " rows wait for, so these are no prediction",
        "columns": ["source", "what", "nodes x ranks", "unit", "measured", "predicted", "off by"]
        + ["off by without latency"],
        "rows": rows,
        "environment": {
            "test cluster": f"measured at commit {cluster['commit']}, {cluster['date']}",
            "others": "quoted with their sources in predict.py",
        },
    }


def published_errors():
    """Returns the errors on GPUs and the like, but that of the row with a start in it."""
    return [
        off_by(check)
        for check in all_checks()
        if check.source != TEST_CLUSTER and check.what != STARTING_TOO
    ]


# What the captions say of the step times, unless they are those of a run.
PREDICTED_STEPS = "A100-PCIe, packed, compiled, a step's own time errs by -7% to +10%"


def conditions(steps):
    """Returns the captions' words on what is assumed, and on the errors."""
    errors = published_errors()
    return (
        f"predicted, not measured: {steps}; ddp, bf16 gradients; the model of scaling errs by"
        f" {min(errors):+.0%} to {max(errors):+.0%} on up to 32 GPUs with 24 or more sequences on"
        " each; nothing else was there to check it; the device's time alone: the host has to"
        " launch some 1,050 kernels a step besides"
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
            speed_up = epochs[1] / epochs[fastest]
            rows.append([*row, round(epochs[fastest], 1), round(speed_up, 1)])
    return {
        "title": "The fastest epoch of each batch, predicted",
        "conditions": conditions(PREDICTED_STEPS),
        "columns": ["GPUs a node", "GB/s a node", "global batch", "published F1"]
        + ["GPUs of the fastest epoch", "features per GPU", "seconds", "speed-up"],
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
        "predicted.json": [checks_table(), fastest_table(computing)],
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

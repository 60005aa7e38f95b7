"""What the profiler's traces of a run say.

    python baseline/trace.py RUN...               tables in Markdown: computing, communication, idle
    python baseline/trace.py --tensorboard RUN    adds them to RUN/tensorboard, with report.py's
                                                  tables and a drawing of one profiled step

A RUN is a folder that train.py left; its traces are RUN/tensorboard/*.pt.trace.json.gz, one per
rank. The step, of which shares are given, is split into three parts:

    computing               an operator (CPU) or a kernel (GPU) runs, communication beside it or not
    exposed communication   only communication runs, so it lengthens the step
    idle                    neither runs
"""

import argparse
import collections
import gc
import gzip
import json
import math
import pathlib
import re
import signal
import sys
import zlib

PHASES = ["data", "forward", "backward", "optimizer", "exposed_communication"]
COLOURS = {
    "data": "#999999",
    "forward": "#4477aa",
    "backward": "#ee6677",
    "optimizer": "#228833",
    "exposed_communication": "#aa3377",
    "communication": "#aa3377",
    "the rest": "#dddddd",
    "GPU": "#ccbb44",
    "CPU": "#66ccee",
}
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_EVENTS = ("cpu_op", "cuda_runtime", "cuda_driver")
# NCCL's kernels, and what gloo's and MPI's own threads are busy with.
COMMUNICATION = re.compile(r"nccl|gloo:|mpi:", re.IGNORECASE)
# Operators that hand tensors over to the communication library: they compute nothing.
HANDING_OVER = re.compile(r"_?c10d")
NO_OPERATOR = "Python, no operator"
# The end of the names of the event files that this script writes, and so may replace.
EVENTS_SUFFIX = ".report"
# What values of another kind than expected raise.
ODD_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

# Times are the profiler's: microseconds on a clock of its own.
Span = collections.namedtuple("Span", "start end name")
Kernel = collections.namedtuple("Kernel", "start end name launched_at")


# 1. Spans


def start_of(span):
    return span.start


def merge(spans):
    """Spans that overlap -> separate ones, sorted, without names."""
    merged = []
    begin = end = None
    for span in sorted(spans, key=start_of):
        if end is not None and span.start <= end:
            end = max(end, span.end)
            continue
        if end is not None:
            merged.append(Span(begin, end, None))
        begin = span.start
        end = span.end
    if end is not None:
        merged.append(Span(begin, end, None))
    return merged


def overlap(span, begin, end):
    """Returns how much of the span lies between begin and end, in microseconds."""
    return max(0.0, min(span.end, end) - max(span.start, begin))


def total_overlap(spans, begin, end):
    """Returns how much of separate spans lies between begin and end, in microseconds."""
    return sum(overlap(span, begin, end) for span in spans)


def gaps_between(spans, begin, end):
    """What separate, sorted spans leave free between begin and end; the longest gap first."""
    gaps = []
    free_from = begin
    for span in [*spans, Span(end, end, None)]:
        busy_from = min(span.start, end)
        if free_from < busy_from:
            gaps.append(Span(free_from, busy_from, None))
        free_from = max(free_from, span.end)
    return sorted(gaps, key=lambda gap: gap.start - gap.end)


def own_time(spans):
    """Nested spans of one thread -> the pieces in which each ran itself, not a span within it."""
    pieces = []
    running = []  # the spans that have begun and not ended, the innermost last
    now = 0.0
    outer_first = sorted(spans, key=lambda span: (span.start, -span.end))
    for span in [*outer_first, Span(math.inf, math.inf, None)]:
        while running and running[-1].end <= span.start:
            ended = running.pop()
            pieces.append(Span(now, ended.end, ended.name))
            now = max(now, ended.end)
        if running:
            pieces.append(Span(now, span.start, running[-1].name))
        running.append(span)
        now = span.start
    return [piece for piece in pieces if piece.start < piece.end]


# 2. One trace


def read_events(path):
    """Returns the events of a trace that have a start and a duration."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


class Events:
    """The events of one rank's trace as spans, sorted by what they are."""

    def __init__(self, events):
        self.steps = []
        self.phases = []
        self.communication = []
        self.kernels = []
        self.host_threads = collections.defaultdict(list)
        self.operator_names = set()
        self.annotation_names = set()
        # A kernel and the operator that launched it have the same "External id".
        self.operator_of_id = {}
        gpu_events = []
        for event in events:
            start = float(event["ts"])
            span = Span(start, start + float(event["dur"]), event["name"])
            kind = event.get("cat")
            if kind in GPU_EVENTS:
                gpu_events.append((span, external_id(event)))
            elif kind == "user_annotation":
                self.add_annotation(span, event.get("tid"))
            elif kind in HOST_EVENTS:
                self.host_threads[event.get("tid")].append(span)
            if kind == "cpu_op":
                self.operator_names.add(span.name)
                self.operator_of_id.setdefault(external_id(event), span)
        for span, identity in gpu_events:
            self.add_gpu_event(span, identity)
        self.steps.sort()
        self.phases.sort(key=start_of)

    def add_annotation(self, span, thread):
        if span.name.startswith("ProfilerStep#"):
            self.steps.append(span)
        elif span.name.startswith("gloo:"):
            self.communication.append(span)
        elif COMMUNICATION.match(span.name):
            # NCCL's annotations on the host: its kernels, on the GPU, are what counts.
            pass
        else:
            self.host_threads[thread].append(span)
            self.annotation_names.add(span.name)
            if span.name in PHASES:
                self.phases.append(span)

    def add_gpu_event(self, span, identity):
        """A kernel goes by its operator's name; a compiled one, of many operators, by its own."""
        if COMMUNICATION.match(span.name):
            self.communication.append(span)
            return
        name = span.name
        launched_at = math.nan
        operator = self.operator_of_id.get(identity)
        if identity is not None and operator is not None:
            launched_at = operator.start
            if not name.startswith("triton"):
                name = operator.name
        self.kernels.append(Kernel(span.start, span.end, name, launched_at))


def external_id(event):
    return event.get("args", {}).get("External id")


def gpu_phases(kernels, phases):
    """Microseconds of kernels for each phase: a kernel is of the phase that launched it."""
    spent = collections.Counter()
    for kernel in kernels:
        for phase in phases:
            if phase.start <= kernel.launched_at < phase.end:
                spent[phase.name] += kernel.end - kernel.start
    return spent


def host_phases(phases):
    """Microseconds of the host for each phase."""
    spent = collections.Counter()
    for phase in phases:
        spent[phase.name] += phase.end - phase.start
    return spent


def explain_gap(gap, trace, host_pieces):
    """Returns in which step and phase the gap is, and what the host spent most of it on."""
    step = "after the steps"
    for span in trace.steps:
        if span.start <= gap.start < span.end:
            step = span.name
            break
    in_phase = collections.Counter()
    for phase in trace.phases:
        in_phase[phase.name] += overlap(phase, gap.start, gap.end)
    on_host = collections.Counter()
    for piece in host_pieces:
        if piece.end > gap.start and piece.start < gap.end:
            name = NO_OPERATOR if piece.name in trace.annotation_names else piece.name
            on_host[name] += overlap(piece, gap.start, gap.end)
    length = gap.end - gap.start
    on_host[NO_OPERATOR] += max(0.0, length - on_host.total())
    phase = "between phases"
    if in_phase.total() > 0:
        phase = in_phase.most_common(1)[0][0]
    return {
        "ms": length / 1000,
        "step": step,
        "phase": phase,
        "host": [(name, us / 1000) for name, us in on_host.most_common(2) if us > length / 10],
    }


def time_line(trace, place, busy, communicating):
    """The last profiled step as bars: (row, colour, [(start, length)...]) in milliseconds."""
    bars = [("phases", name, []) for name in dict.fromkeys(phase.name for phase in trace.phases)]
    bars += [("work", place, []), ("communication", "communication", [])]
    zero = trace.steps[-1].start
    for row, colour, pairs in bars:
        spans = {"work": busy, "communication": communicating}.get(row)
        if spans is None:
            spans = [phase for phase in trace.phases if phase.name == colour]
        for span in spans:
            if span.end > zero:
                start = max(span.start, zero)
                pairs.append(((start - zero) / 1000, (span.end - start) / 1000))
    return [bar for bar in bars if bar[2]]


def read_trace(path):
    """Returns what one rank did in its profiled steps, as a dict.

    `seconds`, `phases` and `operators` are seconds per step; `computing`, `exposed communication`,
    `idle` and `communication in all` are shares of the step; gaps and time line are milliseconds.
    """
    trace = Events(read_events(path))
    if not trace.steps:
        raise ValueError("no ProfilerStep in it")
    threads = [own_time(spans) for spans in trace.host_threads.values()]
    host_pieces = [piece for pieces in threads for piece in pieces]
    begin = trace.steps[0].start
    end = trace.steps[-1].end
    kernels = [kernel for kernel in trace.kernels if kernel.start >= begin]
    if kernels:
        # The host runs ahead of the GPU, whose steps last from the first kernel to the last.
        place = "GPU"
        work = kernels
        begin = min(kernel.start for kernel in kernels)
        end = max(kernel.end for kernel in kernels)
        phases = gpu_phases(kernels, trace.phases)
    else:
        place = "CPU"
        computing_names = {name for name in trace.operator_names if not HANDING_OVER.match(name)}
        work = [piece for piece in host_pieces if piece.name in computing_names]
        phases = host_phases(trace.phases)
    busy = merge(work)
    communicating = merge(trace.communication)
    busy_or_communicating = merge(busy + communicating)
    duration = end - begin
    computing = total_overlap(busy, begin, end) / duration
    occupied = total_overlap(busy_or_communicating, begin, end) / duration
    operators = collections.Counter()
    for piece in work:
        operators[piece.name] += overlap(piece, begin, end)
    # Microseconds in all steps -> seconds per step.
    per_step = 1e-6 / len(trace.steps)
    gaps = gaps_between(busy_or_communicating, begin, end)[:5]
    return {
        "place": place,
        "steps": len(trace.steps),
        "seconds": duration * per_step,
        "computing": computing,
        "exposed communication": occupied - computing,
        "idle": 1 - occupied,
        "communication in all": total_overlap(communicating, begin, end) / duration,
        "phases": {name: phases[name] * per_step for name in PHASES if phases[name]},
        "operators": {name: spent * per_step for name, spent in operators.items() if spent},
        "gaps": [explain_gap(gap, trace, host_pieces) for gap in gaps],
        "time line": time_line(trace, place, busy, communicating),
    }


def natural_order(path):
    """A key for sorting names with numbers in them: 2-tf32 comes before 10-compiled."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def read_traces(folder):
    """Returns {rank: what its trace says}; of a run that was resumed, its last trace counts."""
    newest = {}
    for path in sorted(folder.glob("tensorboard/*.pt.trace.json.gz"), key=natural_order):
        rank = re.search(r"rank(\d+)", path.name)
        newest[int(rank[1]) if rank else 0] = path
    traces = {}
    for rank, path in sorted(newest.items()):
        megabytes = path.stat().st_size / 1e6
        if megabytes > 5:
            print(f"reading {path.name}, {megabytes:.0f} MB", file=sys.stderr)
        # Python's collector would look through a million events again and again for cycles.
        gc.disable()
        try:
            traces[rank] = read_trace(path)
        except (OSError, EOFError, RecursionError, zlib.error, *ODD_VALUES) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path}: cannot be read as a trace ({reason}): delete it, or run again"
            ) from error
        finally:
            gc.enable()
    return traces


# 3. TensorBoard


def draw_time_line(traces):
    """A figure of the last profiled step: for each rank its phases, its work, its communication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = ["phases", "work", "communication"]
    used_rows = {row for trace in traces.values() for row, _, _ in trace["time line"]}
    rows_per_rank = max(rows.index(row) for row in used_rows) + 1
    # Small, with large letters: TensorBoard shows it on a small card.
    size = (7.5, 1.6 + 0.75 * len(traces))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    colours = {}
    middles = []
    for number, trace in enumerate(traces.values()):
        top = number * (rows_per_rank + 1)
        middles.append(top + (rows_per_rank - 1) / 2)
        for row, colour, pairs in trace["time line"]:
            place = top + rows.index(row)
            axes.broken_barh(pairs, (place - 0.45, 0.9), facecolors=COLOURS[colour])
            colours[colour] = COLOURS[colour]
    for name, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=9, label=name)
    axes.set_yticks(middles, [f"rank {rank}" for rank in traces], fontsize=13)
    axes.tick_params(axis="x", labelsize=13)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds from the step's start", fontsize=13)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=13)
    return figure


def add_to_tensorboard(report, folder):
    """Writes the tables as texts, and the time line, into an event file of its own."""
    from torch.utils.tensorboard import SummaryWriter

    runs = report.load_runs([folder])
    if len(runs) > 1:
        raise report.Problem(f"{folder}: holds {len(runs)} runs: give the folder of one of them")
    [run] = runs
    names = ("environment", "times", "throughput", "answers", "phases")
    texts = {name: report.TABLES[name]([run]) for name in names}
    texts["traces"] = report.trace_table([run])
    traces = report.read_traces(run)
    drawable = any(trace["time line"] for trace in traces.values())
    figure = draw_time_line(traces) if drawable else None
    events = run.folder / "tensorboard"
    earlier = list(events.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}"))
    with SummaryWriter(events, filename_suffix=EVENTS_SUFFIX) as writer:
        for name, text in texts.items():
            writer.add_text(name, text)
        if figure is not None:
            writer.add_figure("one profiled step", figure)
    for path in earlier:
        path.unlink()


def main():
    # The script's own folder, wherever it is started: report.py makes the tables.
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    import report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders that train.py left")
    parser.add_argument("--tensorboard", metavar="RUN", help="add them to RUN/tensorboard")
    parser.error = report.refuse
    try:
        options = parser.parse_args()
        if not options.runs and not options.tensorboard:
            raise report.Problem("no RUN: give the folder of a finished run")
        if options.runs:
            print(report.trace_table(report.load_runs(options.runs)))
        if options.tensorboard:
            add_to_tensorboard(report, options.tensorboard)
    except report.Problem as problem:
        sys.exit(report.complain(problem))
    except Exception as error:  # noqa: BLE001 it comes after the training, which it must not fail
        what = " ".join(f"{type(error).__name__}: {error}".split())
        where = options.tensorboard or " ".join(options.runs)
        sys.exit(report.complain(f"{where}: {what}"))


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    # Ends quietly when `head` has read enough.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()

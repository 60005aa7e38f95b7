"""baseline/train.py and DISTRIBUTED/train.py side by side: what differs, and that it says why."""

import ast
import io
import re
import subprocess
import tokenize

import pytest
from nursery import load_script
from ranks import BASELINE, DISTRIBUTED, ROOT

MARK = "DIST:"
# The functions that distribution reaches into; all others are the same in both files.
REACHED_INTO = {
    "make_parser",
    "parse_arguments",
    "log",
    "plan_training",
    "compile_layers",
    "Clock",
    "make_profiler",
    "open_output",
    "save_checkpoint",
    "find_answers",
    "Interval",
    "dropout_seed",
    "training_step",
    "train",
    "evaluate_model",
    "open_writer",
    "write_scalars",
    "write_evaluation",
    "make_timings",
    "make_results",
    "finish",
    "run",
    "run_in",
    "check_cpu_hours",
    "log_plan",
    "stopped",
    "main",
}
# What baseline alone has: a CUDA graph of a step is of one GPU.
BASELINE_ALONE = ["StepGraph"]
# Distribution's own section, from this heading to the next one.
SECTION = re.compile(r"# DIST: 2b\. ")
HEADING = re.compile(r"# \d+\. ")


def read_lines(path):
    return path.read_text().splitlines()


def section_lines():
    """The line numbers of distribution's section, from 0, as a range."""
    lines = read_lines(DISTRIBUTED)
    first = next(number for number, line in enumerate(lines) if SECTION.match(line))
    after = next(number for number in range(first, len(lines)) if HEADING.match(lines[number]))
    return range(first, after)


def blocks(path):
    """{name: source} of the functions and classes at a script's top, in their order."""
    lines = read_lines(path)
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def marked_functions():
    """The line ranges, from 0, of functions and methods whose docstring begins with the mark."""
    found = []
    for node in ast.walk(ast.parse(DISTRIBUTED.read_text())):
        if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").startswith(MARK):
            found.append(range(node.lineno - 1, node.end_lineno))
    return found


def hunks():
    """[(lines taken away, lines that came)], as line numbers from 0."""
    command = ["diff", "-U0", BASELINE, DISTRIBUTED]
    difference = subprocess.run(command, capture_output=True, text=True).stdout
    found = []
    for match in re.finditer(r"^@@ -(\d+)(,\d+)? \+(\d+)(,\d+)? @@", difference, re.MULTILINE):
        pair = []
        for first, count in (match.group(1, 2), match.group(3, 4)):
            count = int(count[1:]) if count else 1
            pair.append(range(int(first) - 1, int(first) - 1 + count))
        found.append(pair)
    return found


def comments(source):
    """The comments of a script, one string for each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def marks():
    """The reasons that the marks give, in the file's order; the same one may be there again."""
    lines = read_lines(DISTRIBUTED)
    found = []
    for number, line in enumerate(lines):
        mark = re.search(r"(# |\"\"\")DIST\b:?", line)
        if not mark:
            continue
        reason = line[mark.end() :]
        if mark[1] == "# ":
            goes_on = re.compile(r"\s*# (?!DIST\b)")
        else:
            goes_on = re.compile(r"\s*(?=\S)")
        # A mark behind a statement ends with its line; a comment or a docstring may go on.
        after_code = line[: mark.start()].strip()
        for following in lines[number + 1 :]:
            if after_code or reason.endswith('"""') or not goes_on.match(following):
                break
            reason += " " + goes_on.sub("", following, count=1)
        found.append(reason.removesuffix('"""').strip())
    return found


def test_functions_that_distribution_does_not_reach_into_are_the_same():
    baseline = blocks(BASELINE)
    distributed = blocks(DISTRIBUTED)
    for name in BASELINE_ALONE:
        del baseline[name]
    assert [name for name in distributed if name in baseline] == list(baseline)
    different = {name for name in baseline if baseline[name] != distributed[name]}
    assert not different - REACHED_INTO, "differ, though they are not in REACHED_INTO"
    assert not REACHED_INTO - different, "are the same: take them out of REACHED_INTO"


def test_functions_that_baseline_lacks_are_distributions_own():
    lines = read_lines(DISTRIBUTED)
    own_section = section_lines()
    marked = {lines[place.start].split("(")[0].removeprefix("def ") for place in marked_functions()}
    in_baseline = blocks(BASELINE)
    for node in ast.parse(DISTRIBUTED.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name not in in_baseline:
            assert node.lineno - 1 in own_section or node.name in marked, node.name


def test_options_are_the_same_but_for_distributions():
    options = []
    for path in (BASELINE, DISTRIBUTED):
        actions = load_script(path).make_parser()._actions
        fields = ("option_strings", "dest", "default", "choices", "help")
        options.append(
            {action.dest: [getattr(action, name) for name in fields] for action in actions}
        )
    baseline, distributed = options
    assert set(distributed) - set(baseline) == {"strategy", "gradients"}
    assert not set(baseline) - set(distributed)
    for name in baseline:
        # The help of --output names the script's own folder.
        expected = [
            str(field).replace("runs/baseline", "runs/DISTRIBUTED") for field in baseline[name]
        ]
        assert [str(field) for field in distributed[name]] == expected, name


def test_a_graph_of_several_gpus_is_refused():
    distributed = load_script(DISTRIBUTED)
    with pytest.raises(distributed.Problem, match="--cuda-graph .* baseline/train.py"):
        distributed.parse_arguments(["--cuda-graph"])


def test_settings_that_lives_must_share_are_the_same():
    """A checkpoint goes on from one script to the other."""
    baseline, distributed = (load_script(path) for path in (BASELINE, DISTRIBUTED))
    assert baseline.SETTINGS == distributed.SETTINGS
    assert baseline.new_state().keys() == distributed.new_state().keys()


def test_each_place_that_differs_is_marked():
    lines = read_lines(DISTRIBUTED)
    own = [section_lines(), *marked_functions()]
    source = BASELINE.read_text()
    alone = "\n".join(blocks(BASELINE)[name] for name in BASELINE_ALONE).splitlines()
    unmarked = []
    for taken, came in hunks():
        if not came and set(source.splitlines()[taken.start : taken.stop]) <= {"", *alone}:
            continue
        if not came:
            unmarked.append(f"only taken away: line {taken.start + 1} of baseline")
            continue
        is_own = any(came.start in place and came.stop <= place.stop + 2 for place in own)
        if not is_own and not any(MARK in lines[number] for number in came):
            unmarked.append(f"line {came.start + 1}: {lines[came.start].strip()}")
    assert not unmarked, "no # DIST: in\n" + "\n".join(unmarked)


def test_each_mark_gives_a_reason():
    found = marks()
    assert len(found) >= 20
    short = [reason for reason in found if len(reason.split()) < 2]
    assert not short
    assert not re.search(r"\bDIST\b", BASELINE.read_text().replace("DISTRIBUTED", ""))


def test_comments_and_sections_of_baseline_are_all_there():
    source = BASELINE.read_text()
    for name in BASELINE_ALONE:
        source = source.replace(blocks(BASELINE)[name], "")
    baseline = comments(source)
    distributed = [re.sub(r"DIST: ", "", comment) for comment in comments(DISTRIBUTED.read_text())]
    missing = list(baseline)
    for comment in distributed:
        if comment in missing:
            missing.remove(comment)
    assert not missing
    headings = [
        [line for line in read_lines(path) if HEADING.match(line)]
        for path in (BASELINE, DISTRIBUTED)
    ]
    assert headings[0] == headings[1]
    assert len(headings[0]) >= 10


def table_rows():
    """The first column of README.md's table of marks."""
    text = (ROOT / "DISTRIBUTED/README.md").read_text()
    heading = r"^#+ What distribution takes\s*$(.*?)(?=^#+ |\Z)"
    section = re.search(heading, text, re.MULTILINE | re.DOTALL)
    assert section, "no section named What distribution takes"
    rows = [line for line in section[1].splitlines() if line.startswith("|")]
    # Below the head and its line.
    return [row.strip("|").split("|")[0].strip() for row in rows[2:]]


def test_each_mark_has_a_row_in_the_readme():
    rows = table_rows()
    assert len(rows) == len(set(rows)), "a row is there twice"
    reasons = [reason.replace("`", "").rstrip(".") for reason in marks()]
    quoted = [row.replace("`", "").rstrip(".") for row in rows]
    assert not set(reasons) - set(quoted), "marks without a row"
    assert not set(quoted) - set(reasons), "rows without a mark"

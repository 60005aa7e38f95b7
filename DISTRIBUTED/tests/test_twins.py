"""baseline/train.py and DISTRIBUTED/train.py read side by side: what differs, is little and says why."""

import ast
import importlib.util
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = [ROOT / "baseline/train.py", ROOT / "DISTRIBUTED/train.py"]
TEXTS = [file.read_text() for file in FILES]
LINES = [text.splitlines() for text in TEXTS]
LONGEST, CHANGED, HUNKS = 1000, 150, 30
MARK = re.compile(r"# DDP:? ?|DDP: ")
# Where the two may differ: what distribution is, and the places it must reach into.
NEW = {"join", "tell", "agree", "whole", "distribute"}
SEAMS = {"parse_arguments", "plan_training", "make_optimizer", "Clock", "save_checkpoint", "resume"}
SEAMS |= {"evaluate_model", "train", "run", "main"}


def hunks():
    """[(lines of baseline, lines of DISTRIBUTED)] as ranges from 0, as diff -U0 tells them."""
    told = subprocess.run(["diff", "-U0", *FILES], capture_output=True, text=True, check=False)
    found = []
    for match in re.finditer(
        r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", told.stdout, re.MULTILINE
    ):
        a, many, b, more = (int(n) if n else 1 for n in match.groups())
        found.append((range(a - 1, a - 1 + many), range(b - 1, b - 1 + more)))
    return found


def blocks(text):
    """{name: (first line, last line, source)} of the functions and classes at the top."""
    found = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    lines = text.splitlines()
    for node in found:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        yield node.name, (first, node.end_lineno, lines[first : node.end_lineno])


def load(file):
    spec = importlib.util.spec_from_file_location(f"twin_{file.parent.name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("which", [0, 1], ids=["baseline", "DISTRIBUTED"])
def test_each_is_short_enough_to_read(which):
    assert len(LINES[which]) <= LONGEST


def test_the_difference_is_small():
    # The formatter's blank lines teach nothing and do not count.
    places = [(side, i) for pair in hunks() for side, lines in enumerate(pair) for i in lines]
    changed = sum(bool(LINES[side][i].strip()) for side, i in places)
    assert changed <= CHANGED, f"{changed} lines of both files differ; the budget is {CHANGED}"


def test_the_difference_is_in_few_places():
    assert len(hunks()) <= HUNKS, f"{len(hunks())} places differ; the budget is {HUNKS}"


def test_every_place_that_differs_says_why():
    ours, silent = dict(blocks(TEXTS[1])), []
    for was, now in hunks():
        if not now:  # what is only taken away stands in the twin
            continue
        near = LINES[1][max(now.start - 1, 0) : now.stop + 1]
        inside = [s for a, b, s in ours.values() if a <= now.start < b]
        first = inside[0][:3] if inside else []  # a new function says it in its docstring
        told = any(re.search(r"DDP: \w", line) or "# DDP" in line for line in near)
        if not told and not any('"""DDP: ' in line for line in first):
            silent.append(f"line {now.start + 1}: {LINES[1][now.start].strip()}")
    # A long function may be marked once for hunks that belong together: see the lines around.
    assert not silent, "no # DDP: near " + "\n".join(silent)


def test_a_mark_has_a_reason_and_baseline_has_none():
    assert not MARK.search(TEXTS[0])
    marks = [line for line in LINES[1] if MARK.search(line)]
    assert len(marks) >= 15
    new = [source for name, (_, _, source) in blocks(TEXTS[1]) if name in NEW]
    assert all(any("DDP: " in line for line in source[:3]) for source in new)


def test_functions_outside_the_seams_are_the_same():
    one, two = dict(blocks(TEXTS[0])), dict(blocks(TEXTS[1]))
    assert set(two) - set(one) == NEW and not set(one) - set(two)
    assert [name for name in two if name in one] == list(one), "another order"
    other = [name for name in one if name not in SEAMS and one[name][2] != two[name][2]]
    assert not other, f"differ though no seam: {other}"


def test_seams_keep_names_arguments_and_docstrings():
    trees = [{n.name: n for n in ast.parse(text).body if hasattr(n, "name")} for text in TEXTS]
    for name in SEAMS - {"train"}:
        one, two = trees[0][name], trees[1][name]
        assert ast.get_docstring(one) == ast.get_docstring(two), name
        if isinstance(one, ast.FunctionDef):
            said = [ast.unparse(each.args) for each in (one, two)]
            assert said[0] == said[1], name


def test_sections_and_comments_of_baseline_are_there():
    sections = [[line for line in lines if re.match(r"# \d+\. ", line)] for lines in LINES]
    assert sections[0] == sections[1] and len(sections[0]) == 11


def test_options_are_the_same_but_for_distribution():
    one, two = (load(file).OPTIONS for file in FILES)
    rows = [[row for row in each if not isinstance(row, str)] for each in (one, two)]
    names = [[row[0] for row in each] for each in rows]
    assert set(names[1]) - set(names[0]) == {"--strategy", "--gradients"}
    output = {"--output"}  # its help names the folder
    same = [[row for row in each if row[0] in names[0] and row[0] not in output] for each in rows]
    assert same[0] == same[1]
    dests = [set(vars(load(file).parse_arguments([]))) for file in FILES]
    assert dests[1] - dests[0] == {"strategy", "gradients"}


def distribution_table():
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    part = re.search(
        r"^#+ What distribution takes\s*$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL
    )
    if not part:
        pytest.skip('README.md has no "What distribution takes" yet')
    rows = [line for line in part[1].splitlines() if line.startswith("|")][2:]
    return [[c.strip() for c in row.strip("|").split("|")] for row in rows]


def test_the_readme_has_a_row_for_each_mark_and_no_other():
    rows = [
        re.sub(r"\s+", " ", row[0].replace("`", "")).rstrip(".") for row in distribution_table()
    ]
    marks = [re.search(r"DDP: (.*?)(?:\"\"\"|$)", line) for line in LINES[1]]
    marks = {mark[1].strip().replace("`", "").rstrip(".") for mark in marks if mark}
    assert len(rows) == len(set(rows)), "a row twice"
    assert not marks - set(rows), "marks without a row"
    assert not set(rows) - marks, "rows without a mark"

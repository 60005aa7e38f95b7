"""Counts which faults the tests have tried, and how often it went as it should.

    pytest -m "slow or not slow" --junitxml tried.xml TESTS...
    python baseline/benchmarks/tried.py tried.xml...

Writes a table of baseline/results/faults.json, for report.py --table faults. Of a test that is in
several files the last one counts; a test that was skipped does not.
"""

import argparse
import re
from pathlib import Path
from xml.etree import ElementTree

import measuring

# What was done, and the tests that do it, by their names.
FAULTS = {
    "asked to stop in each of the first 15 steps": r"test_every_way_out_of_every_step\[.*stop",
    "a loss that is no number, in each of them": r"test_every_way_out_of_every_step\[.*number",
    "out of memory, in each of them": r"test_every_way_out_of_every_step\[.*memory",
    "no space on the disk, from each of them on": r"test_disk_fills_up_in_every_step",
    "asked to stop at some moment from its start, without SLURM": r"test_a_stop_is_never_lost",
    "warned at some moment from its start, on SLURM": r"test_the_warning_(at_other|saves_and)",
    "cancelled (scancel)": r"test_scancel_leaves",
    "preempted, with a grace": r"test_a_preempted_job",
    "a task of an array warned: it alone goes back": r"test_of_an_array_one",
    "a chain of tasks (%1) on one output": r"test_a_chain_of_tasks",
    "three starts in a row that save nothing": r"test_cluster.*test_starts_that_save_nothing",
    "a limit shorter than its warning": r"test_cluster.*test_a_limit_shorter",
    "submitted from within another allocation": r"test_a_job_submitted_within",
    "--ntasks-per-node": r"test_several_tasks_a_node",
    "--export=NONE": r"test_nothing_of_the_callers",
    "gone on with from an earlier commit's checkpoint": r"test_goes_on_from_an_earlier",
}


def read_outcomes(paths):
    """Returns {test: whether it passed} of pytest's files, those that were skipped left out."""
    outcomes = {}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            if case.find("skipped") is None:
                failed = case.find("failure") is not None or case.find("error") is not None
                outcomes[f"{case.get('classname')}.{case.get('name')}"] = not failed
    return outcomes


def make_table(outcomes, train):
    rows = []
    for fault, pattern in FAULTS.items():
        passed = [outcome for test, outcome in outcomes.items() if re.search(pattern, test)]
        if passed:
            rows.append([fault, len(passed), f"{sum(passed)} of {len(passed)}"])
    return {
        "title": "Faults that the tests try",
        "conditions": ["by pytest; what is on SLURM on the test cluster's two nodes"],
        "columns": ["fault", "tried", "went as it should"],
        "rows": rows,
        "environment": measuring.describe_machine(train),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", type=Path, nargs="+", help="of pytest --junitxml")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS / "faults.json")
    options = parser.parse_args()
    table = make_table(read_outcomes(options.files), measuring.load_train())
    measuring.write_tables(options.output, [table])
    measuring.show_tables(options.output)


if __name__ == "__main__":
    main()

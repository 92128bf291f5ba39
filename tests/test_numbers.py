"""Tables of README.md, results/README.md and forks/README.md are what the runs say.

A row whose first cell is the name of a group of runs has means and standard deviations over its
seeds: `before → after ± deviation`, or less. Of other numbers of README with three decimals it is
only checked that some group or run has them. The rest of the text is checked by nobody.
"""

import os
import re
from collections import defaultdict
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests are about the CPU

import pytest

from tools import plot

HERE = Path(__file__).parents[1]
RUNS = [HERE / "results/runs.jsonl", HERE / "results/archive/former.jsonl"]
GROUPS = plot.read_groups(RUNS, re.compile(""))
COLUMNS = {  # head of a column: what it is called in a run
    "noise-free": "greedy",
    "last number right": "greedy_flexible",
    "sampled": "sampled",
    "pass@8": "pass@8",
    "exit rate": "exit_rate",
    "length": "length",
    "steps of a solution": "length",
    "held": "held",
    "right if held": "right_held",
    "entropy": "entropy",
    "if not": "right_lost",
    "seconds": "seconds",
    "teach nothing": "zero_advantage",
}
NUMBER = r"\d*\.?\d+"
CELL = re.compile(rf"(?:({NUMBER}) → )?({NUMBER})(?: ± ({NUMBER}))?")


def rows_of(text):
    """-> (name of a group, head of a column, cell) of each table"""
    heads = []
    for line in text.splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = cells
        elif cells[0].strip("`") in GROUPS:
            yield from ((cells[0].strip("`"), *pair) for pair in zip(heads, cells))


def rounded(value, like):
    """.9561 like ".9" -> ".9"; 236.2 like "236" -> "236" """
    decimals = len(like.partition(".")[2])
    text = f"{value:.{decimals}f}"
    return text.removeprefix("0") if like.startswith(".") else text


def check(name, key, cell):
    before, after, deviation = CELL.fullmatch(cell).groups()
    values = [run[key] for run in GROUPS[name]]
    assert rounded(mean(values), after) == after, (name, key)
    if before:
        start = mean(run[f"{key}_before"] for run in GROUPS[name])
        assert rounded(start, before) == before, (name, key)
    if deviation:
        assert rounded(stdev(values), deviation) == deviation, (name, key)


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "forks/README.md"])
def test_tables(page):
    found = [row for row in rows_of((HERE / page).read_text()) if row[1] in COLUMNS and row[2]]
    assert len(found) > 7
    for name, head, cell in found:
        check(name, COLUMNS[head], cell)


def statistics():
    """Each mean, deviation and single value, to three decimals"""
    for runs in GROUPS.values():
        values = defaultdict(list)
        for run in runs:
            for key, value in run.items():
                if isinstance(value, float):
                    values[key].append(value)
        for each in values.values():
            yield from map("{:.3f}".format, chain(each, [mean(each)]))
            if len(each) > 1:
                yield f"{stdev(each):.3f}"


def test_text():
    known = {text.removeprefix("0") for text in statistics()}
    text = (HERE / "README.md").read_text()
    numbers = set(re.findall(r"(?<![\d.])\.\d{3}(?!\d)", text))
    assert numbers and numbers <= known, numbers - known

"""What methods select at the edges of lengths, offsets and settings, and which settings they take."""

from __future__ import annotations

import csv

import pytest

import golden
import sparseflash as sf
from cases import CASES, directions


def table(path, key):
    """The rows of a table, by the value in a column."""
    found = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row[key], []).append(row)
    return found


SELECTED, TAKEN = table(golden.SELECTED, "case"), table(golden.TAKEN, "method")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_selected_at_the_edges_is_what_it_was(case):
    """Pairs that are seen, visited and tested: less tight lists show here, too."""
    want = {row["call"]: row for row in SELECTED[str(case)]}
    got = {name: {key: str(x) for key, x in row.items()} for name, row in golden.selected(case).items()}
    assert got == want, "meant so? make golden, and say it in the changelog under Numerics"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_shown_of_a_plan_is_a_plan_and_of_several_as_many(case):
    method, q, k = case.method(), directions(1, 4, 96), directions(1, 4, 96, shift=7)
    selection = method.select(q, k)
    selected, shown = (
        x if isinstance(x, tuple) else [x] for x in (selection.plan, method.shown(q, k, selection))
    )
    assert type(shown) is type(selected) and len(shown) == len(selected)


@pytest.mark.parametrize("name", sf.methods.names())
def test_a_setting_takes_what_it_took(name):
    assert golden.taken(name) == TAKEN.get(name, []), "meant so? make golden"

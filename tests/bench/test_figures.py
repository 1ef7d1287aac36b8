"""README and docs say what benchmarks/results holds."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
typer = pytest.importorskip("typer")

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def made():
    spec = importlib.util.spec_from_file_location("make_figures", DOCS / "make_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_figure_is_stale(made):
    assert made.stale() == [], "run: make figures"


def test_a_changed_result_makes_its_pages_and_pictures_stale(made, monkeypatch):
    rows = made.rows
    changed = [row | {"ratio": "99.9"} for row in rows("attention-table")]
    monkeypatch.setattr(made, "rows", lambda name: changed if name == "attention-table" else rows(name))
    assert made.stale() == ["README.md", "docs/images/bench/attention-table.svg"]


def test_the_name_of_a_line_has_room():
    from sparseflash.bench import chart

    label = "a name of more than thirty letters"
    svg = chart.lines([chart.Line(label, [(1.0, 1.0), (2.0, 3.0)], "dense")], x_label="x", y_label="y")
    at = float(re.search(rf'<text x="([\d.]+)"[^>]*>{label}</text>', svg)[1])
    assert at + chart.LETTER * len(label) <= chart.WIDTH


OWED = set(
    "attention claim-mqar claim-smollm indexer learned-indexer "
    "long-run masks pixels prompt-losses rates transformers".split()
)
"""Files with rows of a changed tree, of a commit that is in no history, or of fewer than three rounds. A file
that is measured anew leaves this list; none joins it."""


def test_what_is_measured_again_is_a_file_and_a_command_that_takes_these_options(made):
    from benchmarks.experiments.commands import experiments
    from benchmarks.experiments.commands.tables import AGAIN

    commands = typer.main.get_command(experiments).commands
    for name, given in AGAIN.items():
        options = {x for option in commands[name].params for x in option.opts}
        assert (made.RESULTS / f"{name}.csv").exists() and set(given[::2]) <= options


def test_rows_are_of_commits_that_exist_and_were_repeated(made):
    git = ["git", "-C", str(DOCS.parent)]
    known = subprocess.run([*git, "rev-list", "HEAD"], capture_output=True, text=True)
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if known.returncode or shallow.stdout.strip() != "false":
        pytest.skip("its history is not here")
    history, owed = {commit[:12] for commit in known.stdout.split()}, set()
    for path in sorted(made.RESULTS.glob("*.csv")):
        rows = made.rows(path.stem)
        few = any(float(row["rounds"]) < made.LEAST for row in rows if row.get("rounds"))
        if few or {row["git"] for row in rows if row.get("git")} - history:
            owed.add(path.stem)
    assert owed <= OWED, f"measure again: {sorted(owed - OWED)}"
    assert owed == OWED, f"take out of OWED: {sorted(OWED - owed)}"


def test_prose_quotes_no_row_that_was_not_repeated(made, monkeypatch):
    rows = made.rows
    once = [row | {"rounds": "1"} for row in rows("masks")]
    monkeypatch.setattr(made, "rows", lambda name: once if name == "masks" else rows(name))
    with pytest.raises(SystemExit, match="fewer than 3 rounds"):
        made.ways()

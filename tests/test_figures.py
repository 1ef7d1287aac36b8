"""README and docs say what benchmarks/results holds."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

DOCS = Path(__file__).resolve().parent.parent / "docs"


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

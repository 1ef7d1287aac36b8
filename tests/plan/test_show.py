"""`sparseflash show`: the plan of a method as text and as a picture, with its figures."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
from typer.testing import CliRunner

from sparseflash import Plan, methods
from sparseflash.__main__ import app


@pytest.mark.parametrize("ending, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("txt", b"Plan(")])
def test_a_plan_is_written_as_the_ending_of_the_file_says(ending, begins, tmp_path):
    out = tmp_path / f"plan.{ending}"
    done = CliRunner().invoke(app, ["show", "hash-sparse", "--length", "128", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(begins)
    assert "density" in (out.read_text() if ending == "txt" else done.output)


def test_a_method_is_drawn_with_the_hyper_parameters_that_are_set():
    show = ["show", "grid-window", "--length", "64", "--set", "grid=(8,8)", "--set", "window=(4,4)"]
    done = CliRunner().invoke(app, show)
    assert done.exit_code == 0, done.output
    assert "density 0.2500" in done.output  # four windows
    wrong = CliRunner().invoke(app, ["show", "window", "--set", "width=3"])
    assert "no hyper-parameter 'width'" in str(wrong.exception) + wrong.output


@pytest.mark.parametrize("order", [(), ("q_order",), ("k_order",), ("q_order", "k_order")])
def test_an_explanation_says_whether_rows_are_ordered(order):
    own = torch.arange(9).int().view(1, 1, -1)
    blocks = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    plan = Plan.from_blocks(blocks, Tq=9, Tk=9, tile=3, unit=3, **dict.fromkeys(order, own))
    assert (", ordered" in plan.explain()) == bool(order)
    assert "9 queries x 9 keys, 1 list of 3 tiles (3 rows each)" in plan.explain()


def test_the_gallery_has_a_picture_of_every_mask():
    docs = Path(__file__).resolve().parents[2] / "docs"
    page = (docs / "gallery.md").read_text(encoding="utf-8")
    for name in methods.names():
        if ".masks." in methods.find(name).__module__:
            assert f"![{name}](images/gallery/" in page, "run: python docs/make_gallery.py"
    for picture in re.findall(r"\((images/gallery/[^)]+)\)", page):
        assert (docs / picture).read_bytes().startswith(b"\x89PNG")

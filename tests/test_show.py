"""`sparseflash show`: the plan of a method as text and as a picture, with its figures."""

import pytest

pytest.importorskip("matplotlib")
from typer.testing import CliRunner

from sparseflash.cli import app


@pytest.mark.parametrize("ending, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("txt", b"Plan(")])
def test_a_plan_is_written_as_the_ending_of_the_file_says(ending, begins, tmp_path):
    out = tmp_path / f"plan.{ending}"
    done = CliRunner().invoke(app, ["show", "hash-sparse", "--length", "128", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(begins)
    assert "density" in (out.read_text() if ending == "txt" else done.output)

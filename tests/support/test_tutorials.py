"""Tutorials are notebooks: each runs from its first cell to its last, and prints what it shows."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import sparseflash as sf

ROOT = Path(__file__).resolve().parents[2]
NAMES = [path.stem for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))]
PRETRAINED = "3-a-long-prompt"


@pytest.fixture(scope="module")
def tutorials():
    spec = importlib.util.spec_from_file_location("make_tutorials", ROOT / "docs" / "make_tutorials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_five():
    assert len(NAMES) == 5


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x == PRETRAINED else ()) for x in NAMES]
)
def test_a_tutorial_prints_what_it_shows(name, tutorials):
    notebook = tutorials.read(tutorials.FOLDER / f"{name}.ipynb")
    if name == PRETRAINED:
        try:
            sf.transformers.load("smollm2")
        except (sf.SparseFlashError, ImportError) as error:
            pytest.skip(f"no weights: {error}")
    assert tutorials.run(notebook) == tutorials.kept(notebook)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_one_that_jupyter_opens(name, tutorials):
    notebook = tutorials.read(tutorials.FOLDER / f"{name}.ipynb")
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    path = tutorials.FOLDER / f"{name}.ipynb"
    assert tutorials.made(json.loads(path.read_text()), tutorials.kept(notebook)) == path.read_text()
    said = tutorials.text(notebook)
    assert said.startswith("# ") and said.count("```") % 2 == 0

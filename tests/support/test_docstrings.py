"""The example of every docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import sparseflash

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = ["sparseflash", *(m.name for m in pkgutil.walk_packages(sparseflash.__path__, "sparseflash."))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_of_the_module(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("sparseflash"):
            raise
        pytest.skip(f"{name} needs {missing.name}")
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.failed == 0


def test_the_public_surface_shows_examples():
    """Every public function and class of the surface has at least one example."""
    finder = doctest.DocTestFinder(recurse=False)
    without = []
    for name in sparseflash.__all__:
        thing = getattr(sparseflash, name)
        if callable(thing) and not (isinstance(thing, type) and issubclass(thing, Exception)):
            (found,) = finder.find(thing, name) or [None]
            if found is None or not found.examples:
                without.append(name)
    assert without == []

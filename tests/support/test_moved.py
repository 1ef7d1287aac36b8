"""Names of the last release: they work, and say where they went."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import sparseflash as sf
from sparseflash.common import moved


@pytest.mark.parametrize("old", moved.MODULES)
def test_a_module_is_found_under_the_name_that_it_had(old):
    new = importlib.import_module(f"sparseflash.{moved.MODULES[old]}")
    spec = new.__spec__
    sys.modules.pop(f"sparseflash.{old}", None)
    with pytest.warns(DeprecationWarning, match=moved.MODULES[old]):
        assert importlib.import_module(f"sparseflash.{old}") is new
    assert new.__spec__ is spec
    if old not in sf.__all__:
        with pytest.warns(DeprecationWarning, match=moved.MODULES[old]):
            sys.modules.pop(f"sparseflash.{old}")
            vars(sf).pop(old, None)
            assert getattr(sf, old) is new


def test_functions_are_found_under_the_names_that_they_had():
    with pytest.warns(DeprecationWarning, match="backend_status"):
        assert sf.backends() == sf.backend_status()
    with pytest.warns(DeprecationWarning, match="predict"):
        assert sf.explain is sf.predict


def test_no_function_stands_in_front_of_a_module_of_its_name():
    """Then `import sparseflash.ops.attention as a` is the module, in every room; vLLM's needs its host."""
    here = Path(sf.__file__).parent
    for path in sorted(here.rglob("*.py")):
        room, name = path.parent, path.stem
        if name in ("__init__", "__main__", "backend"):
            name, room = (path.parent.name, path.parent.parent) if name == "__init__" else ("", room)
        if not name or room == here.parent:
            continue
        package = ".".join(["sparseflash", *room.relative_to(here).parts])
        module = importlib.import_module(f"{package}.{name}")
        assert getattr(importlib.import_module(package), name) is module, f"{package}.{name}"
    assert sf.ops.attention.attention is sf.attention
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sf.nothing  # noqa: B018  (reading it is what is tested)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sparseflash.nothing")

"""Models that look their attention class up in a table of their own: "sparse" is one of its names, too.

Falcon, GPT-J, GPT-Neo, SAM and others keep `{"eager": ..., "sdpa": ...}` in their module, and do not ask the
registry. Under "sparse" they go on with the best class they have, which is said once. An entry is added to a
table; none is replaced.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

_PACKAGES = ("transformers.models.", "transformers_modules.")
_named: set[str] = set()


def enter(module: ModuleType) -> None:
    """Enter "sparse" into the tables of a module."""
    for table in list(vars(module).values()):
        if isinstance(table, dict) and "eager" in table and "sparse" not in table:
            if all(isinstance(x, type) and issubclass(x, nn.Module) for x in table.values()):
                table["sparse"] = functools.partial(_own, table.get("sdpa", table["eager"]))


def _own(kind: type[nn.Module], *given: Any, **named: Any) -> nn.Module:
    """A module of the model's own attention class, which is named once."""
    if kind.__name__ not in _named:
        _named.add(kind.__name__)
        logging.getLogger("sparseflash").warning(
            "%s does not ask Transformers' attention registry: under attn_implementation='sparse' it goes on "
            "with its own attention, and takes no methods",
            kind.__name__,
        )
    return kind(*given, **named)


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a module as everybody does, and enters its tables then."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        enter(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what everybody finds; modules of models get a loader that enters their tables."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not (fullname.startswith(_PACKAGES) and ".modeling_" in fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def watch() -> None:
    """Enter "sparse" into the tables of all models that were imported, and that will be."""
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGES) and ".modeling_" in name:
            enter(module)
    if not any(isinstance(x, _Finder) for x in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

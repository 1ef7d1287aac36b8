"""Add "sparse" to the attention class tables of models that do not use the registry.

Falcon, GPT-J, GPT-Neo, SAM and others look up `{"eager": ..., "sdpa": ...}` in their module instead of the
registry. Under "sparse" they use their own best class, with one warning. Entries are added to tables, never
replaced.
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
    """Add "sparse" to all attention class tables of a module."""
    for table in list(vars(module).values()):
        if isinstance(table, dict) and "eager" in table and "sparse" not in table:
            if all(isinstance(x, type) and issubclass(x, nn.Module) for x in table.values()):
                table["sparse"] = functools.partial(_own, table.get("sdpa", table["eager"]))


def _own(kind: type[nn.Module], *given: Any, **named: Any) -> nn.Module:
    """Build a module of the model's own attention class, and warn once per class."""
    if kind.__name__ not in _named:
        _named.add(kind.__name__)
        logging.getLogger("sparseflash").warning(
            "%s does not ask Transformers' attention registry: under attn_implementation='sparse' it goes on "
            "with its own attention, and takes no methods",
            kind.__name__,
        )
    return kind(*given, **named)


def own(model: nn.Module) -> list[tuple[str, str]]:
    """Names and classes of the modules of a model that came from such a table."""
    found = []
    for name, module in model.named_modules():
        room = vars(sys.modules.get(type(module).__module__, sys)).values()
        of_tables = (x for x in room if isinstance(x, dict) and "eager" in x)
        if any(type(module) in table.values() for table in of_tables):
            found.append((name, type(module).__name__))
    return found


class _Loader(importlib.machinery.SourceFileLoader):
    """Loader that adds "sparse" to a module's tables after running it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        enter(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Import hook that gives Transformers' modeling modules a `_Loader`; other modules are unaffected."""

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
    """Add "sparse" to the tables of all models that are, or will be, imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGES) and ".modeling_" in name:
            enter(module)
    if not any(isinstance(x, _Finder) for x in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

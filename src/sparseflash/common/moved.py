"""Module and function names of 0.1 that have moved: they work for one release and warn with the new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __package__.rpartition(".")[0]
MODULES = {
    "calibrate": "selection.calibrate",
    "costs": "ops.costs",
    "dispatch": "backends.dispatch",
    "errors": "common.errors",
    "files": "common.files",
    "method": "methods.base",
    "merging": "backends.numerics",
    "indexer": "ops.indexer",
    "indexer_loss": "ops.indexer_loss",
    "jagged": "ops.jagged",
    "linear": "ops.linear",
    "numerics": "backends.numerics",
    "order": "selection.orders",
    "packing": "ops.packing",
    "pointwise": "ops.pointwise",
    "records": "backends.records",
    "rotary": "ops.rotary",
    "statistics": "ops.stats",
    "varlen": "ops.varlen",
}


def warn(old: str, new: str) -> None:
    """Emit a `DeprecationWarning` that `old` is named `new` now."""
    said = f"{old} is {new} now; the old name goes with the next release"
    warnings.warn(said, DeprecationWarning, stacklevel=3)


class _Moved(MetaPathFinder, Loader):
    """Import hook: resolves the old module names in `MODULES` to the modules' new places."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        package, _, old = name.rpartition(".")
        if package != PACKAGE or old not in MODULES:
            return None
        new = f"{package}.{MODULES[old]}"
        warn(name, new)
        return ModuleSpec(name, self, origin=new)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # importlib has set __spec__ to that of the old name


def install() -> None:
    """Register the import hook for old module names, once."""
    if not any(isinstance(x, _Moved) for x in sys.meta_path):
        sys.meta_path.append(_Moved())


def callable_once(module: ModuleType, old: str, new: str, call: Callable[[], Any]) -> None:
    """Make `module` callable: its name was a function before, so a call forwards to `call` with a warning."""

    class Called(ModuleType):
        def __call__(self) -> Any:
            warn(old, new)
            return call()

    module.__class__ = Called

"""Choose the backend for a call: order of preference, and the reasons for which a backend refuses."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from ..common.errors import BackendError, warn
from ..plan.make import native as builders
from .protocol import Backend

PREFERENCE = ("triton", "cpu", "reference")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here, with its description or the reason why it cannot."""

    name: str
    usable: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'usable' if self.usable else 'not usable'} ({self.detail})"


@functools.cache
def _load(name: str) -> ModuleType | str:
    """Import a backend; its module, or the reason why it is missing. Cached, because every call asks."""
    try:
        return importlib.import_module(f"sparseflash.backends.{name}")
    except ImportError as error:
        return f"not available: {error}"


def backend_status() -> dict[str, BackendStatus]:
    """List every backend: whether it is usable on this machine, and if not, why.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sf.backend_status()["reference"].usable
    True
    """
    found = {}
    for name in PREFERENCE:
        module = _load(name)
        usable, detail = (False, module) if isinstance(module, str) else module.status()
        if usable and (said := getattr(module, "standing", lambda: "")()):
            detail = f"{detail}; {said}"
        found[name] = BackendStatus(name, usable, detail)
    return found


def _order(x: Tensor) -> tuple[str, ...]:
    """Backends in the order to ask; for CPU tensors Triton is last, as it imports packages only to refuse."""
    return ("cpu", "reference", "triton") if x.device.type == "cpu" else PREFERENCE


@functools.cache
def _say_once(text: str) -> None:
    """Warn once that a slower backend replaces a faster one that declined."""
    warn(text)


def choose(op: str, wanted: str, *tensors: Tensor) -> Backend:
    """Choose the wanted backend, or else the first in `PREFERENCE` that can run the op on these tensors."""
    wanted = wanted or os.environ.get("SPARSEFLASH_BACKEND", "")
    if wanted and wanted not in PREFERENCE:
        raise BackendError(f"backend={wanted!r}: expected one of {', '.join(PREFERENCE)}, or None to choose")
    said, held = [], ""
    for name in (wanted,) if wanted else _order(tensors[0]):
        module = _load(name)
        if isinstance(module, str):
            said.append(f"{name}: {module}")
            continue
        reasons = module.refuse(*tensors) if hasattr(module, op) else [f"has no {op}"]
        caution = None if wanted or reasons else getattr(module, "caution", None)
        if caution is not None and (why := caution(tensors[0])):
            reasons = [why]
            held = f"{name} {why}"
        if not reasons:
            if held:
                _say_once(f"sparseflash: on {tensors[0].device} the {name} runs, which is slow: {held}")
            return module
        said += [f"{name}: {reason}" for reason in reasons]
    raise BackendError("no backend can run this call:\n  " + "\n  ".join(said))


def choose_able(op: str, wanted: str, *tensors: Tensor) -> Backend:
    """Choose as `choose`, but fall back to `reference` if the backend of the environment lacks the op.

    For ops around attention. A backend that the call itself names (`wanted`) is never replaced.
    """
    try:
        return choose(op, wanted, *tensors)
    except BackendError:
        if wanted:
            raise
        return choose(op, "reference", *tensors)


def _builders() -> builders.Builders | None:
    """Native builders of lists in main memory: the CPU backend's, if it is usable and not overridden."""
    if os.environ.get("SPARSEFLASH_BACKEND", "") not in ("", "cpu"):
        return None
    module = _load("cpu")
    return module.lists if not isinstance(module, str) and module.status()[0] else None


builders.offer(_builders)

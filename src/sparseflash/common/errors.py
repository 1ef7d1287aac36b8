"""Errors that this library raises, and its warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable


class SparseFlashError(ValueError):
    """Bad input: the message says what was given, what was expected and how to fix it."""


class PlanError(SparseFlashError):
    """A plan whose fields contradict each other or the tensors it is used with."""


class BackendError(SparseFlashError, NotImplementedError):
    """No backend can run the call; the message lists every backend with every reason."""


class DerivativeError(SparseFlashError, RuntimeError):
    """A derivative that does not exist; a `RuntimeError` too, as torch's own refusals are."""


class RankError(SparseFlashError, RuntimeError):
    """A rank of a process group has died, stalls, or does something else than the other ranks."""


Message = str | Callable[[], str]


def require(*rules: tuple[bool, Message], error: type[SparseFlashError] = SparseFlashError) -> None:
    """Raise `error` with the message of the first rule whose condition is false.

    A callable message is formatted only when it is raised: formatting a symbolic size would specialise it
    to a constant of the compiled graph.
    """
    for holds, message in rules:
        if not holds:
            raise error(message if isinstance(message, str) else message())


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the caller's line: the first stack frame outside this library and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_INSIDE = (__name__.partition(".")[0], "torch")

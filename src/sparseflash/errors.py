"""The errors a user of this library can meet, and its warnings."""

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
    """A derivative that there is not; torch's own refusals are `RuntimeError`s, and so is this."""


class RankError(SparseFlashError, RuntimeError):
    """A rank of a process group that died, stalls, or does something else than the others."""


Message = str | Callable[[], str]


def require(*rules: tuple[bool, Message], error: type[SparseFlashError] = SparseFlashError) -> None:
    """Raise `error` with the message of the first rule whose condition is false.

    What stands in a message is formatted when it is raised: a size that a compiler has put a symbol for would
    become a constant of its graph by being written down.
    """
    for holds, message in rules:
        if not holds:
            raise error(message if isinstance(message, str) else message())


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the line of whoever called the library: the first that is neither ours nor torch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_INSIDE = (__name__.partition(".")[0], "torch")

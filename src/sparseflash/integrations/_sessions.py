"""What methods remember of a generation: a session for each cache and method, while the cache lives."""

from __future__ import annotations

import weakref
from typing import Any

from ..methods.base import Method
from ..methods.session import Session


class Sessions:
    """The sessions of a host. A cache that is gone takes its own along; without a cache nothing is kept."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, dict[Method, Session]] = weakref.WeakKeyDictionary()

    def of(self, cache: Any, method: Method) -> Session:
        """The session of a method over a cache; a new one where there is no cache."""
        if cache is None:
            return Session(method)
        try:
            kept = self._of.setdefault(cache, {})
        except TypeError:  # nothing that a dictionary can hold weakly: a tuple of tensors, say
            return Session(method)
        return kept.setdefault(method, Session(method))

    def __len__(self) -> int:
        """How many caches are remembered."""
        return len(self._of)

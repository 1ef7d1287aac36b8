"""Sessions of methods: one for each cache and method, kept as long as the cache lives."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Method
from ..methods.session import Session

Pair = tuple[Tensor, Tensor]


class Sessions:
    """The sessions of a host, by weak reference to the cache; without a cache nothing is kept."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, dict[Method, Session]] = weakref.WeakKeyDictionary()

    def of(self, cache: Any, method: Method) -> Session:
        """The session of a method over a cache; a new one if there is no cache."""
        if cache is None:
            return Session(method)
        try:
            kept = self._of.setdefault(cache, {})
        except TypeError:  # no weak references, e.g. to a tuple of tensors
            return Session(method)
        return kept.setdefault(method, Session(method))

    def __len__(self) -> int:
        """Number of caches with sessions."""
        return len(self._of)


class Rotations:
    """Rotary tables of cached keys, (cos, sin) `[B|1, keys, D]`, extended by each call.

    Layers of one kind share a table: a call passes them the same tensors.
    """

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, Pair]]] = weakref.WeakKeyDictionary()

    def of(self, cache: Any, kind: str, new: Pair, keys: int) -> Pair | None:
        """Tables of all keys, where `new` is for the last ones; None if earlier calls did not pass theirs."""
        n = new[0].shape[-2]
        if n == keys:
            whole = new
        else:
            known = None if cache is None else self._of.get(cache, {}).get(kind)
            if known is None:
                return None
            last, whole = known
            if last is not new[0]:
                if whole[0].shape[-2] < keys - n:
                    return None
                cos, sin = (x[..., : keys - n, :] for x in whole)  # the cache may have been cropped
                whole = _behind(cos, new[0]), _behind(sin, new[1])
        if cache is not None:
            with contextlib.suppress(TypeError):
                self._of.setdefault(cache, {})[kind] = (new[0], whole)
        return whole if whole[0].shape[-2] == keys else None


def _behind(old: Tensor, new: Tensor) -> Tensor:
    """Concatenate tables `[B|1, n, D]`; one of the two may be the same for all rows."""
    B = max(old.shape[0], new.shape[0])
    return torch.cat([x if x.shape[0] == B else x.expand(B, -1, -1) for x in (old, new)], -2)

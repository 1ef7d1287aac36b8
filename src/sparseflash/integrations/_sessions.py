"""What methods remember of a generation: a session for each cache and method, while the cache lives."""

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


class Rotations:
    """How the keys of caches were rotated: (cos, sin) `[B|1, keys, D]`, grown by what each call brings.

    Layers of one kind share theirs: a call hands them the same tensors.
    """

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, Pair]]] = weakref.WeakKeyDictionary()

    def of(self, cache: Any, kind: str, new: Pair, keys: int) -> Pair | None:
        """Of all keys, those of this call being the last; None where earlier ones were not heard."""
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
                cos, sin = (x[..., : keys - n, :] for x in whole)  # a cache may have been cut since
                whole = torch.cat([cos, new[0]], -2), torch.cat([sin, new[1]], -2)
        if cache is not None:
            with contextlib.suppress(TypeError):
                self._of.setdefault(cache, {})[kind] = (new[0], whole)
        return whole if whole[0].shape[-2] == keys else None

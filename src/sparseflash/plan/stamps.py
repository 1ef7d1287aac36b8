"""Detect whether tensors were changed in place, without reading their values.

A tensor object stays the same while its memory changes: in-place writes, `set_`, `.data =`, `share_memory_`.
Data derived from tensors is valid while their stamp (address and version counter) is unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

M = TypeVar("M")


def stamp(tensors: Iterable[Tensor]) -> list[tuple[int, int]] | None:
    """Address and version counter of each tensor.

    None if a tensor has none: tensor subclasses (fake tensors), meta tensors, and inference tensors, which
    count no writes.
    """
    found = []
    for x in tensors:
        if type(x) is not Tensor or x.is_meta or x.is_inference():
            return None
        found.append((x.data_ptr(), x._version))
    return found


class Last(Generic[M]):
    """A cache of one result, valid while its arguments are the same objects with unchanged tensors."""

    def __init__(self) -> None:
        self._of: list[weakref.ref[object]] = []
        self._known: tuple[Hashable, list[tuple[int, int]]] | None = None
        self._made: list[M] = []

    def get(self, *of: object, key: Hashable = None) -> list[M]:
        """The result cached for these arguments and `key` in a list of one, or an empty list."""
        if self._known is None or self._known[0] != key or len(of) != len(self._of):
            return []
        same = all(known() is x for known, x in zip(self._of, of, strict=True))
        return self._made if same and stamp(_tensors(of)) == self._known[1] else []

    def keep(self, made: M, *of: object, key: Hashable = None) -> M:
        """Cache a result and return it; caches nothing if changes of the tensors are not detectable."""
        found = stamp(_tensors(of))
        self._of, self._made = [weakref.ref(x) for x in of], [made]
        self._known = None if found is None else (key, found)
        return made


def _tensors(of: Iterable[object]) -> list[Tensor]:
    return [x for x in of if isinstance(x, Tensor)]

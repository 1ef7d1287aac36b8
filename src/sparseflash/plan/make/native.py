"""Hook for native list builders of a backend: they return the same lists as the PyTorch code, faster.

This package imports no backend: `dispatch` registers how builders are found (`offer`). Finding them may load
a library, so they are used only for large work, and for tensors whose values can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..options import Fields, host

LARGE = 1 << 18
"""Bytes or list entries below which PyTorch is as fast, and needs no library to be loaded."""


class Builders(Protocol):
    """Interface of the builders that a backend may offer."""

    def read_mask(self, mask: Tensor, tile: int, unit: int) -> tuple[Tensor, list[Tensor]]:
        """Classify each cell (tile x unit) of a mask [B,H,Tq,Tk], and pack the bits of partial cells.

        The kinds are uint8 [B * H * R, C]: 0 empty, 1 partial, 2 full. The bits are a list of int32 tensors
        [n, tile, ceil(unit / 32)], in the order of the partial cells.
        """
        ...

    def list_units(
        self,
        given: Tensor,
        *,
        Tq: int,
        Tk: int,
        tile: int,
        unit: int,
        causal: bool,
        q_offset: int,
        unique: bool,
    ) -> Fields:
        """Build `start`, `full`, `count`, `index` from unit numbers (-1: none) or bools [B,H,R,n]."""
        ...

    def transpose(
        self, start: Tensor, full: Tensor, count: Tensor, index: Tensor, columns: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Transpose unit lists [lists, R]: `start`, `count`, `full` [lists, columns], `index`, `source`."""
        ...


Find = Callable[[], Builders | None]
_find: Find | None = None


def offer(find: Find) -> None:
    """Register the function that finds builders."""
    global _find
    _find = find


def builders(size: int, *tensors: Tensor) -> Builders | None:
    """The builders for `size` bytes or entries of these tensors; None if PyTorch should do the work."""
    if _find is None or size < LARGE or not all(host(x) for x in tensors):
        return None
    return _find()

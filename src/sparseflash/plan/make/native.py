"""Builders that a backend offers: they make the lists that PyTorch makes here, the same ones, in less time.

The plan knows no backend. Whoever does (`dispatch`) says here where builders are found; asking for them may
load a library, so that is done for work that outweighs it, and for tensors whose values may be looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..options import Fields, host

LARGE = 1 << 18
"""Bytes or list entries below which PyTorch is as fast, and nothing has to be loaded for it."""


class Builders(Protocol):
    """What a backend may offer."""

    def read_mask(self, mask: Tensor, tile: int, unit: int) -> tuple[Tensor, list[Tensor]]:
        """What each tile sees of each unit of a mask [B,H,Tq,Tk], and the bits of those that are partial.

        The first is uint8 [B * H * R, C]: 0 nothing, 1 some (partial), 2 all. The second holds int32
        [n, tile, ceil(unit / 32)] in pieces, in the order of the partial units.
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
        """`start`, `full`, `count`, `index` of units [B,H,R,n]: numbers (-1: none), or a bool for each."""
        ...

    def transpose(
        self, start: Tensor, full: Tensor, count: Tensor, index: Tensor, columns: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`start`, `count` and `full` [lists, columns] of lists [lists, R], `index` (tiles) and `source`."""
        ...


Find = Callable[[], Builders | None]
_find: Find | None = None


def offer(find: Find) -> None:
    """Say where builders are found."""
    global _find
    _find = find


def builders(size: int, *tensors: Tensor) -> Builders | None:
    """The builders to use for so much work on these tensors, if there are any."""
    if _find is None or size < LARGE or not all(host(x) for x in tensors):
        return None
    return _find()

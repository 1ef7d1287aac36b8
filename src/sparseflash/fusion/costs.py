"""Closed-form cost of a program for given blocks: bytes between the memories, flops, and local memory.

`Meter` counts the same during a run; a test checks that both agree exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import NamedTuple

from ..common.errors import SparseFlashError
from .items import Axes
from .program import ACC, FIRST, REST, Access, Loop, Program


@dataclass(frozen=True)
class Tiers:
    """A machine with a large slow memory and a small fast one.

    Attributes
    ----------
    local : int
        Bytes of the fast memory, which bounds what one iteration holds.
    bandwidth : float
        Bytes per second between the two memories.
    flops : float
        Arithmetic operations per second.
    call : float
        Fixed seconds per operator call on a tile.
    """

    local: int = 4 << 20
    bandwidth: float = 10e9
    flops: float = 200e9
    call: float = 20e-6


CACHE = Tiers()
"""About two CPU cores, each with its share of a cache, running `run`."""

BYTES = Tiers(local=16 << 20, flops=inf, call=0.0)
"""Only bytes count, with ample local memory."""


class Cost(NamedTuple):
    """Cost of one run; `Meter` counts the same."""

    read: int
    written: int
    flops: int
    calls: int
    local: int

    @property
    def bytes(self) -> int:
        """Bytes read plus bytes written."""
        return self.read + self.written

    def seconds(self, tiers: Tiers) -> float:
        """Time if transfers, arithmetic and calls do not overlap: a conservative estimate."""
        return self.bytes / tiers.bandwidth + self.flops / tiers.flops + self.calls * tiers.call


class _Count:
    """Iteration counts and extents of loops, for given sizes and blocks."""

    def __init__(self, sizes: Mapping[str, int], blocks: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.blocks = {dim: min(blocks.get(dim, n), n) for dim, n in sizes.items()}

    def turns(self, loop: Loop, part: str) -> int:
        blocks = -(-self.sizes[loop.dim] // self.blocks[loop.dim])
        return 1 if part == FIRST else blocks - (part == REST)

    def extent(self, loop: Loop, part: str) -> int:
        n, block = self.sizes[loop.dim], self.blocks[loop.dim]
        return block if part == FIRST else n - block * (part == REST)

    def tile(self, loop: Loop, part: str) -> int:
        return min(self.blocks[loop.dim], self.extent(loop, part))

    def elements(self, axes: Axes, access: Access, dims: Axes = ()) -> int:
        """Elements over `axes` that pass in all iterations of an access's loops.

        A tile that is read stays in local memory while its indices stand still: inner loops that do not index
        it are free.
        """
        parts = [REST if x.dim in access.held and not x.part else x.part for x in access.loops]
        loops, last = list(zip(access.loops, parts)), len(access.loops)
        if access.kind == "read":
            moving = (
                i + 1 for i, (x, part) in enumerate(loops) if x.dim in dims and self.turns(x, part) != 1
            )
            last = max(moving, default=0)
        return prod(
            self.extent(x, part) if x.dim in axes else self.turns(x, part) if i < last else 1
            for i, (x, part) in enumerate(loops)
        )

    def held(self, axes: Axes, access: Access) -> int:
        """Elements of the largest tile of an access."""
        parts = {x.dim: REST if x.dim in access.held and not x.part else x.part for x in access.loops}
        return prod(self.tile(x, parts[x.dim]) for x in access.loops if x.dim in axes)


def cost(program: Program, sizes: Mapping[str, int], blocks: Mapping[str, int], itemsize: int = 4) -> Cost:
    """Compute the cost of a run of the program.

    Parameters
    ----------
    program : Program
        Any program.
    sizes, blocks : mapping
        Elements of each dimension, and of its blocks; a dimension without an entry in `blocks` is one block.
    itemsize : int
        Bytes per element of the inputs. Sums and row statistics take at least 4.

    Returns
    -------
    Cost
        Exact, except that `local` is an upper bound if blocks do not divide their sizes.
    """
    count, given, total = (
        _Count(sizes, blocks),
        {name for name, _ in program.inputs},
        dict.fromkeys(("read", "write"), 0),
    )
    flops = calls = peak = 0
    stack: list[tuple[Loop | None, int]] = [(None, 0)]
    for access in program.accesses:
        value = program.values[access.name]
        if access.kind in total:
            for axes in value.parts:
                wide = len(axes) < 2 and access.name not in given
                total[access.kind] += (max(4, itemsize) if wide else itemsize) * count.elements(
                    axes, access, value.dims
                )
        if access.kind == "compute":
            flops += sum(each * count.elements(axes, access) for each, axes in value.work)
            calls += count.elements((), access)
        if access.kind == "write" or access.kind == "compute" and program.ops[access.name].fn == ACC:
            continue
        size = sum(count.held(axes, access) for axes in value.parts)
        around = [loop for loop in access.around if loop.part != FIRST]
        shared = sum(1 for _ in itertools.takewhile(lambda two: two[0] is two[1][0], zip(around, stack[1:])))
        stack = [*stack[: shared + 1], *((loop, 0) for loop in around[shared:])]
        depth = sum(loop.part != FIRST for loop in access.around[: access.depth])
        loop, before = stack[depth]
        stack[depth] = loop, before + size * (itemsize if access.name in given else max(4, itemsize))
        peak = max(peak, sum(n for _, n in stack))
    return Cost(total["read"], total["write"], flops, calls, peak)


def choose(
    program: Program, sizes: Mapping[str, int], tiers: Tiers, itemsize: int = 4, least: int = 16
) -> tuple[dict[str, int], Cost]:
    """Choose the fastest blocks that fit into local memory; returns them with the cost.

    Blocks are `least` times powers of two, or a whole dimension (or half of it): all combinations of powers
    of four are tried, then half and twice of the best. Ties go to the fewest bytes, then to the fewest calls.

    Raises
    ------
    SparseFlashError
        If even the smallest blocks do not fit.
    """
    best: tuple[tuple[float, ...], dict[str, int], Cost] | None = None
    for steps in (_powers(sizes, least), None):
        if steps is None:  # refine around the best
            if best is None:
                said = f"no blocks of {least} or more fit into {tiers.local} bytes"
                raise SparseFlashError(f"{said}; give Tiers(local=) more")
            steps = [sorted({max(least, n // 2), n, min(2 * n, sizes[dim])}) for dim, n in best[1].items()]
        for each in itertools.product(*steps):
            blocks = {dim: min(n, sizes[dim]) for dim, n in zip(sizes, each)}
            found = cost(program, sizes, blocks, itemsize)
            key = (found.seconds(tiers), found.bytes, found.calls)
            if found.local <= tiers.local and (best is None or key < best[0]):
                best = key, blocks, found
    assert best is not None
    return best[1], best[2]


def _powers(sizes: Mapping[str, int], least: int) -> list[list[int]]:
    return [[*(least * 4**i for i in range(4) if least * 4**i < size), size] for size in sizes.values()]

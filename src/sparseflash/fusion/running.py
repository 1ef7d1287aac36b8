"""Run a program on tensors, block by block: as a reference with a meter, or fast on threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.errors import require
from . import items
from .items import PRIMITIVES, Item, Tile
from .program import ACC, FIRST, REST, Body, Loop, Op, Program, depth_of

CALLS: dict[str, Callable[..., Any]] = {
    name: eval(f"lambda *given: {text}".replace("{", "given[").replace("}", "]"), {"L": torch})
    for name, text in PRIMITIVES.items()
}


@dataclass
class Meter:
    """Counters of a run: bytes from and to global memory, flops, operator calls, peak local bytes."""

    read: int = 0
    written: int = 0
    flops: int = 0
    calls: int = 0
    local: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read plus bytes written."""
        return self.read + self.written


class Torch:
    """Machine whose tiles are tensors."""

    def __init__(self, program: Program, sizes: Mapping[str, int], meter: Meter | None = None) -> None:
        self.pairs, self.sizes, self.meter = program.pairs, sizes, meter

    def ew(self, name: str, *args: Tile | float) -> Tile:
        """Apply one of `PRIMITIVES` elementwise, broadcast by axis name."""
        axes = items.united(*(x.axes for x in args if isinstance(x, Tile)))
        return self._did(CALLS[name](*(_along(x, axes) if isinstance(x, Tile) else x for x in args)), axes)

    def dot(self, a: Tile, b: Tile, axis: str) -> Tile:
        """Multiply matrices, or a matrix and a vector."""
        axes = tuple(x for x in items.united(a.axes, b.axes) if x != axis)
        low = min(a.x.dtype, b.x.dtype, key=lambda dtype: dtype.itemsize)
        left, right = (x if x.dtype == low else x.to(low) for x in (a.x, b.x))
        left = left if a.axes[-1] == axis else left.mT
        right = right if b.axes[0] == axis else right.mT
        if self.meter:
            self.meter.flops += 2 * a.x.numel() * (b.x.numel() // b.x.shape[b.axes.index(axis)])
        return Tile(left @ right, axes)

    def sum(self, a: Tile, axis: str) -> Tile:
        """Sum over an axis; half precision accumulates in fp32."""
        return self._over(torch.sum, a, axis)

    def mean(self, a: Tile, axis: str) -> Tile:
        """Mean over an axis; half precision accumulates in fp32."""
        return self._over(torch.mean, a, axis)

    def max(self, a: Tile, axis: str) -> Tile:
        """Maximum over an axis."""
        if self.meter:
            self.meter.flops += a.x.numel()
        return Tile(a.x.amax(a.axes.index(axis)), tuple(x for x in a.axes if x != axis))

    def size(self, dim: str) -> Tile:
        """Full size of a dimension."""
        return Tile(torch.tensor(float(self.sizes[dim]), dtype=torch.float64), ())

    def _did(self, x: Tensor, axes: items.Axes) -> Tile:
        if self.meter:
            self.meter.flops += x.numel()
        return Tile(x, axes)

    def _over(self, how: Callable[..., Tensor], a: Tile, axis: str) -> Tile:
        if self.meter:
            self.meter.flops += a.x.numel()
        wide = torch.promote_types(a.x.dtype, torch.float32)
        return Tile(how(a.x, a.axes.index(axis), dtype=wide), tuple(x for x in a.axes if x != axis))


def _along(tile: Tile, axes: items.Axes) -> Tensor:
    """The tile's tensor with axes in this order, and length 1 for missing ones."""
    x: Tensor = tile.x if len(tile.axes) < 2 or tile.axes == axes else tile.x.mT
    for i, axis in enumerate(axes):
        x = x if axis in tile.axes or x.ndim == 0 else x.unsqueeze(i)
    return x


@dataclass(frozen=True)
class Turn:
    """One iteration: the loops around it, the block index of each dimension, and local memory.

    `scopes` has one entry per loop plus an outermost one; each maps a name with its indices to a tile.
    `loops` pairs each loop with its index in the enclosing body; a ``first`` loop has no scope.
    """

    loops: tuple[tuple[int, Loop], ...]
    index: dict[str, int]
    scopes: tuple[dict[tuple[Any, ...], Item], ...]

    def inside(self, at: int, loop: Loop, block: int) -> Turn:
        """The iteration of a nested loop."""
        scopes = self.scopes if loop.part == FIRST else (*self.scopes, {})
        return Turn((*self.loops, (at, loop)), self.index | {loop.dim: block}, scopes)


class Run:
    """State of one run: global memory, and how tiles are read from and written to it."""

    def __init__(
        self,
        program: Program,
        given: Mapping[str, Tensor],
        blocks: Mapping[str, int],
        meter: Meter | None = None,
        threads: int = 1,
    ) -> None:
        self.program, self.sizes = program, sizes_of(program, given)
        for dim in self.sizes:
            require(
                (blocks.get(dim, 1) >= 1, f"a block of {dim} is {blocks.get(dim)} long; expected 1 at least")
            )
        self.blocks = {dim: min(blocks.get(dim, n), n) for dim, n in self.sizes.items()}
        self.on, self.meter, self.threads = Torch(program, self.sizes, meter), meter, threads
        self.wide = torch.promote_types(next(iter(given.values())).dtype, torch.float32)
        self.still: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.kept: dict[str, list[Tensor]] = {name: [x] for name, x in given.items()}
        like = next(iter(given.values()))
        for name in program.travelling:
            value, self.kept[name] = program.values[name], []
            for axes in value.parts:
                lists = [self.turns(Loop(dim, ())).stop for dim in value.dims if dim not in axes]
                dtype = like.dtype if len(axes) > 1 else self.wide
                shape = lists + [self.sizes[dim] for dim in axes]
                made = torch.empty(shape, dtype=dtype, device=like.device)
                self.kept[name].append(made.fill_(torch.nan) if meter else made)

    def turns(self, loop: Loop) -> range:
        """Block indices of a loop."""
        blocks = -(-self.sizes[loop.dim] // self.blocks[loop.dim])
        return range(loop.part == REST, 1 if loop.part == FIRST else blocks)

    def body(self, body: Body, turn: Turn) -> None:
        """Run the statements of one iteration."""
        for at, stmt in enumerate(body):
            if isinstance(stmt, Op):
                made = items.apply(self.on, stmt, [self.find(arg, turn) for arg in stmt.args])
                if self.meter:
                    self.meter.calls += 1
                if stmt.fn == ACC:
                    self.accumulate(stmt.out, made, turn)
                else:
                    self.hold(stmt.out, made, turn)
                    self.write(stmt.out, turn)
                continue
            sums = [x.out for x in stmt.body if isinstance(x, Op) and x.fn == ACC]
            for name in sums if self.meter else ():
                self.hold(name, self.empty(name, turn), turn)
            inner = [turn.inside(at, stmt, block) for block in self.turns(stmt)]
            if self.threads > 1 and not turn.loops and not sums:
                with _one_thread_each(), ThreadPoolExecutor(self.threads) as pool:
                    list(pool.map(partial(self.alone, stmt.body), inner))
            else:
                for one in inner:
                    self.body(stmt.body, one)
            for name in sums:
                self.write(name, turn)

    @torch.no_grad()
    def alone(self, body: Body, turn: Turn) -> None:
        """Run an iteration on a worker thread, where no_grad must be set again."""
        self.body(body, turn)

    def find(self, name: str, turn: Turn) -> Item:
        """Look up a tile in local memory, or read it into that of the innermost loop that indexes it."""
        key = self.key(name, turn)
        for scope in turn.scopes:
            if key in scope:
                return scope[key]
        value = self.program.values[name]
        tiles = [Tile(x, axes) for x, axes in zip(self.parts(name, turn), value.parts, strict=True)]
        item = items.item(tiles, value.degree)
        depth = depth_of(value, [loop for _, loop in turn.loops])
        site = (name, *((at, loop.dim) for at, loop in turn.loops[:depth]))
        if self.meter and self.still.get(site) != key:
            self.still[site] = key
            self.meter.read += _bytes(item)
        return self.hold(name, item, turn, depth)

    def hold(self, name: str, item: Item, turn: Turn, depth: int | None = None) -> Item:
        """Store a tile in local memory, for the iteration of the loop at `depth`."""
        scope = turn.scopes[sum(loop.part != FIRST for _, loop in turn.loops[:depth])]
        scope[self.key(name, turn)] = item
        if self.meter:
            held = sum(_bytes(x) for scope in turn.scopes for x in scope.values())
            self.meter.local = max(self.meter.local, held)
        return item

    def accumulate(self, name: str, made: Item, turn: Turn) -> None:
        """Add to an accumulator, which belongs to the body around the loop."""
        scope = turn.scopes[-1 if turn.loops[-1][1].part == FIRST else -2]
        key = self.key(name, turn)
        scope[key] = items.add(self.on, scope[key], made) if key in scope else made

    def empty(self, name: str, turn: Turn) -> Item:
        """Initial accumulator: 0, or 0 * exp(-inf)."""
        value = self.program.values[name]
        sizes = [
            [min(self.blocks[x], self.sizes[x] - turn.index[x] * self.blocks[x]) for x in axes]
            for axes in value.parts
        ]
        tiles = [
            Tile(torch.full(size, fill, dtype=self.wide), axes)
            for size, axes, fill in zip(sizes, value.parts, (0.0, -torch.inf))
        ]
        return items.item(tiles, value.degree)

    def write(self, name: str, turn: Turn) -> None:
        """Write a value to global memory, if it is an output or read elsewhere."""
        if name not in self.program.travelling:
            return
        item = self.find(name, turn)
        for there, tile in zip(self.parts(name, turn), items.tiles(item)):
            there.copy_(tile.x)
            if self.meter:
                self.meter.written += there.nbytes

    def key(self, name: str, turn: Turn) -> tuple[Any, ...]:
        """Key of a value: its name and the block of each dimension."""
        return name, *(turn.index[dim] for dim in self.program.values[name].dims)

    def parts(self, name: str, turn: Turn) -> Iterator[Tensor]:
        """Views of global memory for a tile, or the two of a pair."""
        value = self.program.values[name]
        for x, axes in zip(self.kept[name], value.parts, strict=True):
            at: list[int | slice] = [turn.index[dim] for dim in value.dims if dim not in axes]
            for dim in axes:
                start = turn.index[dim] * self.blocks[dim]
                at.append(slice(start, start + self.blocks[dim]))
            yield x[tuple(at)]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Limit torch to one thread per call, as the worker threads are the parallelism."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes(item: Item) -> int:
    return sum(tile.x.nbytes for tile in items.tiles(item))


def sizes_of(program: Program, given: Mapping[str, Tensor]) -> dict[str, int]:
    """Size of every dimension, from tensors; raises if they disagree."""
    sizes: dict[str, int] = {}
    names = [name for name, _ in program.inputs]
    require((sorted(given) == sorted(names), f"given {', '.join(given)}; expected {', '.join(names)}"))
    kinds = {(x.dtype, x.device) for x in given.values()}
    require((len(kinds) == 1, f"inputs of {len(kinds)} dtypes or devices; convert them to one"))
    for name, axes in program.inputs:
        shape = given[name].shape
        require(
            (len(shape) == len(axes), f"{name} has shape {tuple(shape)}; expected axes {', '.join(axes)}")
        )
        for dim, n in zip(axes, shape, strict=True):
            agree = sizes.setdefault(dim, n) == n and n > 0
            require(
                (agree, f"{name} has {n} along {dim}; expected {sizes[dim] or 'at least 1'}, as elsewhere")
            )
    return sizes


def run(
    program: Program,
    given: Mapping[str, Tensor],
    blocks: Mapping[str, int] | None = None,
    *,
    meter: Meter | None = None,
    threads: int = 1,
) -> tuple[Tensor, ...]:
    """Run a program on tensors; returns its outputs.

    Parameters
    ----------
    program : Program
        Any program, fused or not.
    given : mapping
        Inputs by name, of one dtype.
    blocks : mapping, optional
        Elements of each dimension's blocks; a dimension without an entry is one block.
    meter : Meter, optional
        Counts the run's work, on one thread; unwritten global memory is then NaN.
    threads : int
        Number of threads for iterations of an outermost loop without sums.

    Raises
    ------
    SparseFlashError
        If shapes do not match the axes.
    """
    with torch.inference_mode(False), torch.no_grad():
        this = Run(program, given, blocks or {}, meter, 1 if meter else threads)
        this.body(program.body, Turn((), {}, ({},)))
    return tuple(this.kept[name][0] for name in program.outputs)

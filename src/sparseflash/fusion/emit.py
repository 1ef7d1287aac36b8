"""Emit a fused program as a Triton kernel: its source, and a launcher.

The operators run on variable names instead of numbers (see `items`), and each appends a line. Outermost loops
without sums become the grid. A dimension of one block has no loop, so tiles that no loop indexes are loaded
once. Elements beyond a dimension's end are loaded as 0, and masked again before a sum if they may no longer
be 0.
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..common.errors import require
from . import items
from .items import PRIMITIVES, Axes, Item, Tile
from .program import ACC, FIRST, REST, Body, Loop, Op, Program
from .running import sizes_of

KEEP_ZERO = ("neg", "sqrt", "relu", "silu")


@dataclass(frozen=True)
class Var:
    """A kernel variable: its name, the axes along which it is 0 beyond the end, and whether it was loaded."""

    name: str
    zero: frozenset[str] = frozenset()
    loaded: bool = False


@dataclass
class Scope:
    """A loop body under construction: lines, end-of-iteration assignments, items by key, tiles by text."""

    loop: Loop | None
    lines: list[str] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    has: dict[tuple[str, ...], Item] = field(default_factory=dict)
    made: dict[str, Tile] = field(default_factory=dict)


class Source:
    """The machine of `items` whose tiles are variables: operators append lines to the innermost body.

    With `share`, accumulators that start with exponents over the same axes use one exponent variable,
    provided that all updates of it agree (`agreed`), as for numerator and denominator of a softmax.
    """

    def __init__(self, program: Program, whole: frozenset[str], share: bool) -> None:
        self.program, self.pairs, self.whole = program, program.pairs, whole
        self.share, self.agreed = share, True
        self.scopes, self.index = [Scope(None)], dict[str, str]()
        self.masked: dict[str, Var] = {}
        self.single, self.grid, self.count = set[str](), list[str](), 0

    # the machine

    def ew(self, name: str, *args: Tile | float) -> Tile:
        """Apply one of `PRIMITIVES`."""
        tiles = [x for x in args if isinstance(x, Tile)]
        axes, zeros = items.united(*(x.axes for x in tiles)), [x.x.zero for x in tiles]
        zero = frozenset[str]()
        if name == "mul":
            zero = zero.union(*zeros)
        elif name in KEEP_ZERO or (name in ("add", "sub") and all(x.axes == axes for x in tiles)):
            zero = zeros[0].intersection(*zeros) if len(tiles) == len(args) else zero
        if name == "below" and (masked := self.masked.get(tiles[0].x.name)):
            args, zero = (Tile(masked, tiles[0].axes), *args[1:]), masked.zero
        texts = [_along(x, axes) if isinstance(x, Tile) else repr(x) for x in args]
        return self.let(PRIMITIVES[name].replace("L.", "tl.").format(*texts), axes, zero)

    def dot(self, a: Tile, b: Tile, axis: str) -> Tile:
        """Multiply two matrices, in the dtype of the loaded one."""
        require((len(a.axes) == len(b.axes) == 2, "a product of vectors has no kernel; expected matrices"))
        a, b = self.zeroed(a, axis), self.zeroed(b, axis)
        axes = tuple(x for x in items.united(a.axes, b.axes) if x != axis)
        left = a.x.name if a.axes[1] == axis else f"tl.trans({a.x.name})"
        right = b.x.name if b.axes[0] == axis else f"tl.trans({b.x.name})"
        left += "" if a.x.loaded or not b.x.loaded else f".to({b.x.name}.dtype)"
        right += "" if b.x.loaded or not a.x.loaded else f".to({a.x.name}.dtype)"
        kept = frozenset((a.x.zero | b.x.zero) & set(axes))
        return self.let(f'tl.dot({left}, {right}, input_precision="ieee")', axes, kept)

    def sum(self, a: Tile, axis: str) -> Tile:
        """Sum along an axis."""
        a = self.zeroed(a, axis)
        return self.let(f"tl.sum({_wide(a)}, {a.axes.index(axis)})", *_less(a, axis))

    def mean(self, a: Tile, axis: str) -> Tile:
        """Mean along an axis, over the elements inside the end."""
        a, inside = self.zeroed(a, axis), f"tl.sum(in_{self.index[axis]}.to(tl.float32), 0)"
        return self.let(f"tl.sum({_wide(a)}, {a.axes.index(axis)}) / {inside}", *_less(a, axis))

    def max(self, a: Tile, axis: str) -> Tile:
        """Maximum along an axis, over the elements inside the end."""
        if a.x.name not in self.masked:
            minus = self.let(f"tl.where({self.inside(a, axis)}, {_wide(a)}, -float('inf'))", a.axes)
            self.masked[a.x.name] = Var(minus.x.name, frozenset((axis,)))
        return self.let(f"tl.max({self.masked[a.x.name].name}, {a.axes.index(axis)})", *_less(a, axis))

    def size(self, dim: str) -> Tile:
        """Size of a dimension as a float."""
        return Tile(Var(f"tl.cast(size_{dim}, tl.float32)"), ())

    def let(self, text: str, axes: Axes, zero: frozenset[str] = frozenset(), alone: bool = False) -> Tile:
        """Assign an expression to a variable; reuses one with the same text unless `alone`."""
        for scope in self.scopes:
            if text in scope.made and not alone:
                return scope.made[text]
        self.count += 1
        self.scopes[-1].lines.append(f"v{self.count} = {text}")
        made = self.scopes[-1].made[text] = Tile(Var(f"v{self.count}", zero), axes)
        return made

    def zeroed(self, a: Tile, axis: str) -> Tile:
        """The tile with 0 beyond the end of an axis."""
        if axis in a.x.zero:
            return a
        return self.let(f"tl.where({self.inside(a, axis)}, {a.x.name}, 0.0)", a.axes, a.x.zero | {axis})

    def inside(self, a: Tile, axis: str) -> str:
        """Mask of an axis, broadcast to a tile's shape."""
        return _along(Tile(Var(f"in_{self.index[axis]}"), (axis,)), a.axes)

    # the program

    def body(self, body: Body) -> None:
        """Emit a body."""
        for stmt in body:
            if isinstance(stmt, Loop):
                self.loop(stmt, alone=len(body) == 1)
                continue
            made = items.apply(self, stmt, [self.find(arg) for arg in stmt.args])
            loop = self.scopes[-1].loop
            if stmt.fn == ACC and loop and loop.dim == stmt.over:
                total = self.scopes[-2].has[self.key(stmt.out)]
                for old, new in zip(items.tiles(total), items.tiles(items.add(self, total, made))):
                    becomes = self.scopes[-1].ends.setdefault(old.x.name, new.x.name)
                    self.agreed &= becomes == new.x.name
            else:  # accumulating over one block
                self.scopes[-1].has[self.key(stmt.out)] = made
            if stmt.fn != ACC:
                self.write(stmt.out)

    def loop(self, loop: Loop, alone: bool) -> None:
        """Emit a loop: inlined if it has one iteration, a grid dimension if outermost and without sums."""
        sums = [x.out for x in loop.body if isinstance(x, Op) and x.fn == ACC]
        single = loop.part == FIRST or loop.dim in self.whole
        if single and loop.part == REST:
            return
        outside = dict(self.index)
        mark = self.index[loop.dim] = f"{loop.dim}_0" if single else loop.dim
        if single:
            if mark not in self.single:
                self.scopes[0].lines += _offsets(loop.dim, mark)
                self.single.add(mark)
            self.body(loop.body)
        else:
            for name in sums:
                self.begin(name)
            turns = f"tl.cdiv(size_{loop.dim}, block_{loop.dim})"
            head = f"for i_{mark} in range({int(loop.part == REST)}, {turns}):"
            if of_grid := alone and not sums and not loop.part and len(self.grid) == len(self.scopes) - 1:
                head = f"i_{mark} = tl.program_id({len(self.grid)})"
                self.grid.append(loop.dim)
            self.scopes.append(Scope(loop, _offsets(loop.dim, mark, f"i_{mark}")))
            self.body(loop.body)
            scope = self.scopes.pop()
            lines = [*scope.lines, *(f"{old} = {new}" for old, new in scope.ends.items())]
            self.scopes[-1].lines += [head, *(lines if of_grid else (f"    {line}" for line in lines))]
        self.index = outside
        for name in sums:
            self.write(name)

    def begin(self, name: str) -> None:
        """Initialise an accumulator: 0, or 0 * exp(-inf)."""
        value = self.program.values[name]
        shapes = [", ".join(f"block_{axis}" for axis in axes) for axes in value.parts]
        tiles: list[Tile] = []
        for shape, axes, fill in zip(shapes, value.parts, ("0.0", "-float('inf')")):
            alone = not (self.share and tiles)  # accumulators must differ; exponents may be shared
            tiles.append(self.let(f"tl.full([{shape}], {fill}, tl.float32)", axes, alone=alone))
        self.scopes[-1].has[self.key(name)] = items.item(tiles, value.degree)

    def find(self, name: str) -> Item:
        """Look up a tile, or emit its load in the innermost loop that indexes it."""
        key = self.key(name)
        for scope in self.scopes:
            if key in scope.has:
                return scope.has[key]
        axes, marks = self.program.values[name].axes, key[1:]
        scope = next(x for x in reversed(self.scopes) if x.loop is None or x.loop.dim in marks)
        self.count += 1
        var = Var(f"{name}_{self.count}", frozenset(axes), True)
        place, inside = self.place(name, axes)
        scope.lines.append(f"{var.name} = tl.load({place}, mask={inside}, other=0.0)")
        scope.has[key] = Tile(var, axes)
        return scope.has[key]

    def write(self, name: str) -> None:
        """Emit the store of an output."""
        if name in self.program.outputs:
            value = self.find(name)
            assert isinstance(value, Tile)
            place, inside = self.place(name, value.axes)
            made = f"{value.x.name}.to({name}.dtype.element_ty)"
            self.scopes[-1].lines.append(f"tl.store({place}, {made}, mask={inside})")

    def place(self, name: str, axes: Axes) -> tuple[str, str]:
        """Address expression of a tile, and its bounds mask."""
        marks = [(_along(Tile(Var(self.index[x]), (x,)), axes), i) for i, x in enumerate(axes)]
        return (
            " + ".join([name, *(f"at_{mark} * stride_{name}_{i}" for mark, i in marks)]),
            " & ".join(f"in_{mark}" for mark, _ in marks),
        )

    def key(self, name: str) -> tuple[str, ...]:
        """Key of a value: its name and what indexes it."""
        return name, *(self.index[dim] for dim in self.program.values[name].dims)


def _offsets(dim: str, mark: str, at: str = "") -> list[str]:
    start = f"{at} * block_{dim} + " if at else ""
    return [
        f"at_{mark} = ({start}tl.arange(0, block_{dim})).to(tl.int64)",
        f"in_{mark} = at_{mark} < size_{dim}",
    ]


def _wide(a: Tile) -> str:
    return f"{a.x.name}.to(tl.float32)" if a.x.loaded else str(a.x.name)


def _along(a: Tile, axes: Axes) -> str:
    if len(a.axes) == len(axes):
        return _wide(a) if a.axes == axes else f"tl.trans({_wide(a)})"
    return (
        f"{_wide(a)}[{', '.join(':' if axis in a.axes else 'None' for axis in axes)}]" if a.axes else _wide(a)
    )


def _less(a: Tile, axis: str) -> tuple[Axes, frozenset[str]]:
    return tuple(x for x in a.axes if x != axis), a.x.zero - {axis}


class Kernel:
    """A Triton kernel of a program for given blocks: `source` is its text, calling it launches it.

    Parameters
    ----------
    program : Program
        A program with one outermost loop, and only inputs and outputs in global memory.
    sizes, blocks : mapping
        Elements of each dimension, and of its blocks: a power of two from 16 on, or the whole dimension,
        padded to one. A dimension of one block may shrink between calls, others change freely.
    name : str
        Name of the kernel function.
    warps : int
        Number of warps per program.
    """

    def __init__(
        self,
        program: Program,
        sizes: Mapping[str, int],
        blocks: Mapping[str, int],
        name: str = "fused",
        warps: int = 4,
    ) -> None:
        between = program.travelling - {*program.outputs}
        require(
            (len(program.body) == 1, f"{len(program.body)} outermost loops; a kernel has one, fuse further"),
            (not between, f"{', '.join(sorted(between))} goes through global memory; fuse further"),
        )
        self.program, self.name, self.warps = program, name, warps
        self.whole = frozenset(dim for dim, n in sizes.items() if blocks.get(dim, n) >= n)
        self.blocks = {dim: max(16, 1 << (blocks.get(dim, n) - 1).bit_length()) for dim, n in sizes.items()}
        for dim in set(sizes) - self.whole:
            n = blocks[dim]
            require((n == self.blocks[dim], f"a block of {dim} is {n}; expected a power of two from 16 on"))
        out = Source(program, self.whole, share=True)
        out.body(program.body)
        if not out.agreed:
            out = Source(program, self.whole, share=False)
            out.body(program.body)
        self.grid = out.grid
        tensors = [*program.inputs, *((name, program.values[name].axes) for name in program.outputs)]
        given = [name for name, _ in tensors]
        given += [f"size_{dim}" for dim in program.dims]
        given += [f"stride_{name}_{i}" for name, axes in tensors for i in range(len(axes))]
        given += [f"block_{dim}: tl.constexpr" for dim in program.dims]
        lines = "".join(f"    {line}\n" for line in out.scopes[0].lines)
        head = (
            f"import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef {name}({', '.join(given)}):\n"
        )
        self.source = head + lines

    @cached_property
    def function(self) -> Any:
        """The kernel function, loaded from the source; Triton compiles it on launch."""
        file = f"<{self.name}, {hash(self.source):x}>"
        linecache.cache[file] = len(self.source), None, self.source.splitlines(keepends=True), file
        room: dict[str, Any] = {"__name__": __name__}
        exec(compile(self.source, file, "exec"), room)
        return room[self.name]

    def __call__(self, **given: Tensor) -> tuple[Tensor, ...]:
        """Launch the kernel on tensors; returns the outputs in the dtype of the inputs."""
        sizes = sizes_of(self.program, given)
        for dim in self.whole:
            require(
                (
                    sizes[dim] <= self.blocks[dim],
                    f"{dim} has {sizes[dim]}; the kernel is for {self.blocks[dim]}",
                )
            )
        like = given[self.program.inputs[0][0]]
        axes = [self.program.values[name].axes for name in self.program.outputs]
        made = [like.new_empty([sizes[dim] for dim in one]) for one in axes]
        tensors = [*(given[name] for name, _ in self.program.inputs), *made]
        grid = tuple(-(-sizes[dim] // self.blocks[dim]) for dim in self.grid) or (1,)
        strides = [stride for x in tensors for stride in x.stride()]
        blocks = {f"block_{dim}": self.blocks[dim] for dim in self.program.dims}
        numbers = [*(sizes[dim] for dim in self.program.dims), *strides]
        self.function[grid](*tensors, *numbers, **blocks, num_warps=self.warps)
        return tuple(made)

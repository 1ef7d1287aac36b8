"""Block programs: loops over blocks, and operators on tiles; no tensors.

Every value has one name and named axes: `q` over (m, d) is a matrix, cut into tiles along m and d. A loop
over a dimension runs its body once per block, and a name inside denotes the tile of that iteration. A tile
made by a body stays in local memory during the iteration; readers elsewhere read it from global memory.
Nothing else decides what goes through global memory, so fusing two loops saves a round trip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ..common.errors import SparseFlashError
from . import items
from .items import Axes, Expr, Item, Pair, Tile, Types

EW, MUL, ADD, DOT, SUM, MEAN, ACC = "ew", "mul", "add", "dot", "sum", "mean", "acc"
FIRST, REST = "first", "rest"


@dataclass(frozen=True)
class Op:
    """One operator on tiles.

    Attributes
    ----------
    out : str
        Name of the result.
    fn : str
        ``ew`` (`expr`, between tiles of the same axes), ``mul`` and ``add`` (by axis name: matrix and row
        vector give a scale or a shift, two vectors an outer product), ``dot``, ``sum``, ``mean`` (over the
        axis `over` of one tile), ``acc`` (accumulates over the blocks of `over`, the enclosing loop).
    args : tuple of str
        Names of the operands.
    over : str
        Dimension to sum over.
    expr : Expr
        For ``ew``: nested tuples such as ``("mul", 0, 0.5)``; an int is an argument's index, a str the size
        of a dimension.
    """

    out: str
    fn: str
    args: tuple[str, ...]
    over: str = ""
    expr: Expr = ()

    def __str__(self) -> str:
        match self.fn:
            case "acc":
                return f"{self.out} += {self.args[0]}"
            case "dot" | "sum" | "mean":
                return f"{self.out} = {self.fn}_{self.over}({', '.join(self.args)})"
            case "mul" | "add":
                return f"{self.out} = {self.args[0]} {'*' if self.fn == MUL else '+'} {self.args[1]}"
        return f"{self.out} = {items.formula(self.expr, self.args)}"


@dataclass(frozen=True)
class Loop:
    """A body that runs for every block of a dimension, only for the ``first``, or for the ``rest``.

    A ``first`` loop has no scope: its results belong to the enclosing body.
    """

    dim: str
    body: tuple[Stmt, ...]
    part: str = ""

    def __str__(self) -> str:
        return (
            f"{self.dim} = first"
            if self.part == FIRST
            else " ".join(("for", self.part, self.dim)).replace("  ", " ")
        )


Stmt = Op | Loop
Body = tuple[Stmt, ...]


@dataclass(frozen=True)
class Value:
    """Type of a value: a tile without numbers, and more.

    `lists` are dimensions over whose blocks there is one tile each, besides its axes; `work` is the cost of
    computing a tile, as (flops per element, axes).
    """

    item: Item
    lists: tuple[str, ...] = ()
    work: tuple[tuple[int, Axes], ...] = ()

    @cached_property
    def parts(self) -> tuple[Axes, ...]:
        """Axes of each stored tile: one, or the two of a pair."""
        return tuple(tile.axes for tile in items.tiles(self.item))

    @cached_property
    def degree(self) -> int:
        """Degree of a pair, else 0."""
        return self.item.degree if isinstance(self.item, Pair) else 0

    @cached_property
    def axes(self) -> Axes:
        """Axes of the first tile."""
        return self.parts[0]

    @cached_property
    def dims(self) -> Axes:
        """All dimensions that index the value."""
        return self.axes + self.lists


@dataclass(frozen=True)
class Program:
    """Inputs with their axes, names of outputs, and a body.

    `centred` names inputs whose sums of squares would cancel: `safety` subtracts an offset that the result
    does not depend on. With `pairs`, exp(s) is kept as p * exp(t) with p at most 1.
    """

    inputs: tuple[tuple[str, tuple[str, ...]], ...]
    outputs: tuple[str, ...]
    body: Body
    centred: tuple[str, ...] = ()
    pairs: bool = True

    def __str__(self) -> str:
        def lines(body: Body, indent: str) -> Iterator[str]:
            for stmt in body:
                yield f"{indent}{stmt}{self.marks(stmt)}"
                if isinstance(stmt, Loop):
                    yield from lines(stmt.body, indent + "  ")

        given = ", ".join(f"{name}[{', '.join(axes)}]" for name, axes in self.inputs)
        return "\n".join([f"{given} -> {', '.join(self.outputs)}", *lines(self.body, "")])

    def marks(self, stmt: Stmt) -> str:
        """Mark a value that goes through global memory, with the dimensions that index it there."""
        if isinstance(stmt, Loop) or stmt.out not in self.travelling:
            return ""
        return f"    -> {stmt.out}[{', '.join(self.values[stmt.out].dims)}]"

    @cached_property
    def ops(self) -> dict[str, Op]:
        """Each operator by its output name."""
        return {op.out: op for op in every(self.body)}

    @cached_property
    def values(self) -> dict[str, Value]:
        """Type of each value, found by running the operators on tiles without numbers."""
        found = {name: Value(Tile(None, axes)) for name, axes in self.inputs}
        for op in every(self.body):
            found[op.out] = _typed(op, [found[arg] for arg in op.args], self.pairs)
        return found

    @cached_property
    def uses(self) -> dict[str, list[Op]]:
        """Operators that read each value."""
        found: dict[str, list[Op]] = {}
        for op in every(self.body):
            for arg in dict.fromkeys(op.args):
                found.setdefault(arg, []).append(op)
        return found

    @cached_property
    def accesses(self) -> tuple[Access, ...]:
        """All accesses: tiles read from or written to global memory, or computed."""
        return tuple(_accesses(self))

    @cached_property
    def travelling(self) -> frozenset[str]:
        """Computed values that go through global memory: the outputs, and those that fusion should remove."""
        return frozenset(x.name for x in self.accesses if x.kind == "read") - {
            name for name, _ in self.inputs
        } | {*self.outputs}

    @property
    def passes(self) -> int:
        """Number of reads from and writes to global memory; at best one per input and output."""
        return sum(x.kind in ("read", "write") for x in self.accesses)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of all dimensions."""
        return tuple(dict.fromkeys(dim for _, axes in self.inputs for dim in axes))

    @property
    def bodies(self) -> Iterator[tuple[tuple[int, ...], Body]]:
        """Every body with its place: statement indices of the enclosing loops, outermost first."""

        def walk(place: tuple[int, ...], body: Body) -> Iterator[tuple[tuple[int, ...], Body]]:
            yield place, body
            for i, stmt in enumerate(body):
                if isinstance(stmt, Loop):
                    yield from walk((*place, i), stmt.body)

        return walk((), self.body)

    def put(self, place: tuple[int, ...], body: Body) -> Program:
        """Replace the body at a place, and drop dead code."""

        def inside(old: Body, place: tuple[int, ...]) -> Body:
            if not place:
                return body
            loop = old[place[0]]
            assert isinstance(loop, Loop)
            new = replace(loop, body=inside(loop.body, place[1:]))
            return (*old[: place[0]], new, *old[place[0] + 1 :])

        whole = inside(self.body, place)
        return replace(self, body=live(whole, self.outputs))

    def put_op(self, out: str, ops: tuple[Op, ...]) -> Program:
        """Replace the operator with output `out` by several operators."""
        for place, body in self.bodies:
            for i, stmt in enumerate(body):
                if isinstance(stmt, Op) and stmt.out == out:
                    return self.put(place, (*body[:i], *ops, *body[i + 1 :]))
        raise AssertionError(out)

    def fresh(self, like: str, taken: tuple[str, ...] = ()) -> str:
        """An unused name with the same stem."""
        stem = like.rstrip("0123456789")
        used, n = {*self.values, *taken}, 1
        while f"{stem}{n}" in used:
            n += 1
        return f"{stem}{n}"

    @cached_property
    def canonical(self) -> Program:
        """The program with names renumbered in text order: equal structures give equal programs."""
        names = {name: name for name, _ in self.inputs} | {name: name for name in self.outputs}
        counts: dict[str, int] = {}
        for op in every(self.body):
            while op.out not in names:
                stem = op.out.rstrip("0123456789")
                counts[stem] = counts.get(stem, 0) + 1
                if (name := f"{stem}{counts[stem]}") not in names:
                    names[op.out] = name

        return self.renamed(names)

    def renamed(self, names: Mapping[str, str]) -> Program:
        """Rename values."""

        def new(body: Body) -> Body:
            return tuple(
                replace(x, body=new(x.body))
                if isinstance(x, Loop)
                else replace(
                    x, out=names.get(x.out, x.out), args=tuple(names.get(arg, arg) for arg in x.args)
                )
                for x in body
            )

        return replace(self, body=new(self.body), outputs=tuple(names.get(x, x) for x in self.outputs))


def every(body: Body) -> Iterator[Op]:
    """All operators of a body and its nested loops, in order."""
    for stmt in body:
        if isinstance(stmt, Loop):
            yield from every(stmt.body)
        else:
            yield stmt


def defines(*body: Stmt) -> set[str]:
    """Names that statements define."""
    return {op.out for op in every(body)}


def reads(*body: Stmt) -> set[str]:
    """Names that statements read, including those they define."""
    return {arg for op in every(body) for arg in op.args}


def live(body: Body, wanted: tuple[str, ...] | set[str], given: frozenset[str] = frozenset()) -> Body:
    """Dead-code elimination: the part of a body that `wanted` depends on; `given` needs no computation."""
    made, needed = {op.out: op for op in every(body) if op.out not in given}, set()
    todo = [name for name in wanted if name in made]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += [arg for arg in made[name].args if arg in made]

    def kept(body: Body) -> Iterator[Stmt]:
        for stmt in body:
            if isinstance(stmt, Op):
                if stmt.out in needed:
                    yield stmt
            elif inner := tuple(kept(stmt.body)):
                yield replace(stmt, body=inner)

    return tuple(kept(body))


def _typed(op: Op, args: list[Value], pairs: bool) -> Value:
    on, given = Types(pairs), [value.item for value in args]
    item = items.apply(on, op, given)
    if op.fn == ACC:
        items.add(on, item, item)
    lists = dict.fromkeys(dim for value in args for dim in value.lists if op.fn != ACC or dim != op.over)
    if op.over and op.fn != ACC:
        lists[op.over] = None
    axes = items.tiles(item)[0].axes
    return Value(item, tuple(dim for dim in lists if dim not in axes), tuple(on.work))


def depth_of(value: Value, loops: Sequence[Loop]) -> int:
    """Depth of the loop that holds a tile that is read: the innermost one that indexes it."""
    return max((i + 1 for i, x in enumerate(loops) if x.dim in value.dims and x.part != FIRST), default=0)


class Access(NamedTuple):
    """One access to a value.

    `kind` is ``read`` or ``write`` of global memory, ``compute``, or ``hold`` for the accumulator of the next
    loop. `loops` are the relevant ones among those `around`; the tile stays in the local memory of the loop
    at `depth`. `held` are dimensions whose first block is already there, from a ``first`` loop.
    """

    kind: str
    name: str
    loops: tuple[Loop, ...]
    depth: int
    around: tuple[Loop, ...]
    held: frozenset[str] = frozenset()


def _accesses(program: Program) -> Iterator[Access]:
    """Walk the program once, tracking which tiles are in local memory in each enclosing loop.

    A tile is identified by its name and the index of each dimension: a loop, or the first block.
    """
    values, given = program.values, {name for name, _ in program.inputs}
    found: list[Access] = []

    def walk(
        body: Body, loops: tuple[Loop, ...], index: dict[str, int | str], scopes: list[set[object]]
    ) -> None:
        def key(name: str, first: str = "") -> tuple[object, ...]:
            return name, *(FIRST if dim == first else index[dim] for dim in values[name].dims)

        def read(name: str) -> None:
            dims = values[name].dims
            if missing := [dim for dim in dims if dim not in index]:
                raise SparseFlashError(
                    f"{name} is read outside a loop over {missing[0]}; move the reader inside"
                )
            if any(key(name) in scope for scope in scopes):
                return
            held = {dim for dim in dims if any(key(name, dim) in scope for scope in scopes)}
            at = max((i + 1 for i, loop in enumerate(loops) if loop.dim in dims), default=0)
            depth = depth_of(values[name], loops)
            scopes[sum(loop.part != FIRST for loop in loops[:depth])].add(key(name))
            found.append(Access("read", name, loops[:at], depth, loops, frozenset(held)))

        for stmt in body:
            if isinstance(stmt, Op):
                for arg in stmt.args:
                    read(arg)
                found.append(Access("compute", stmt.out, loops, len(loops), loops))
                if stmt.fn != ACC:
                    scopes[-1].add(key(stmt.out))
                continue
            sums = [x.out for x in stmt.body if isinstance(x, Op) and x.fn == ACC]
            found.extend(Access("hold", name, loops, len(loops), loops) for name in sums)
            first = stmt.part == FIRST
            inner = index | {stmt.dim: FIRST if first else len(found)}
            walk(stmt.body, (*loops, stmt), inner, scopes if first else [*scopes, set()])
            scopes[-1].update(key(name) for name in sums)

    walk(program.body, (), {}, [set()])
    travel = {x.name for x in found if x.kind == "read"} - given | set(program.outputs)
    for x in found:
        yield x
        summed = x.kind == "compute" and program.ops[x.name].fn == ACC
        if x.name in travel and (x.kind == "hold" or x.kind == "compute" and not summed):
            yield Access("write", x.name, x.loops, x.depth, x.loops)

"""Operators on tiles and on pairs p * exp(t), for any representation of the numbers.

`exp` of a tile of logits can overflow, and so would both sides of a softmax's division. So a tile exp(s) is
kept as p = exp(s - t) with t = the largest s of each row; products add t, quotients subtract it, sums rescale
both sides to the larger t. Where the exponents cancel, nothing can overflow. The running maximum of flash
attention is not built in: it is what the sum of two pairs does.

The same code runs on tensors (`run`), on axes alone, which yields types and work (`Types`), and on variable
names, which yields source text (`emit`): a *machine* implements `ew`, `dot`, `sum`, `mean`, `max` and `size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Expr = Any
Axes = tuple[str, ...]

PRIMITIVES = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "exp": "L.exp({0})",
    "log": "L.log({0})",
    "sqrt": "L.sqrt({0})",
    "rsqrt": "L.rsqrt({0})",
    "sigmoid": "L.sigmoid({0})",
    "silu": "{0} * L.sigmoid({0})",
    "relu": "L.where({0} > 0.0, {0}, 0.0)",
    "inverse": "L.where({0} == 0.0, 0.0, 1.0 / {0})",
    "larger": "L.maximum({0}, {1})",
    "below": "L.exp({0} - L.where({1} == -float('inf'), 0.0, {1}))",
    "minus": "L.where({0} == -float('inf'), 0.0, -{0})",
}
"""Shared expression text: L is torch or triton.language. `inverse` of an empty sum is 0; `below` is
exp(x - t) and `minus` is -t, where t = -inf means no element so far."""

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


class Tile(NamedTuple):
    """Numbers over named axes, in the machine's representation."""

    x: Any
    axes: Axes


class Pair(NamedTuple):
    """p * exp(t), t over some axes of p. `degree` is the power of exp(t); at 0 it is a plain tile."""

    p: Tile
    t: Tile
    degree: int


Item = Tile | Pair


class Machine(Protocol):
    """Interface for computing with tiles. Missing axes of arguments are broadcast."""

    pairs: bool

    def ew(self, name: str, *args: Tile | float) -> Tile:
        """Apply one of `PRIMITIVES` elementwise."""

    def dot(self, a: Tile, b: Tile, axis: str) -> Tile:
        """Contract over a shared axis."""

    def sum(self, a: Tile, axis: str) -> Tile:
        """Sum over an axis."""

    def mean(self, a: Tile, axis: str) -> Tile:
        """Mean over an axis."""

    def max(self, a: Tile, axis: str) -> Tile:
        """Maximum over an axis."""

    def size(self, dim: str) -> Tile:
        """Full size of a dimension, as a tile without axes."""


def item(tiles: Sequence[Tile], degree: int) -> Item:
    """Rebuild an item from its stored tiles: one tile, or the two of a pair."""
    return Pair(tiles[0], tiles[1], degree) if len(tiles) == 2 else tiles[0]


def tiles(item: Item) -> tuple[Tile, ...]:
    """The tiles that store an item."""
    return (item.p, item.t) if isinstance(item, Pair) else (item,)


def apply(on: Machine, op: Any, args: list[Item]) -> Item:
    """Apply an operator to tiles and pairs."""
    match op.fn:
        case "ew":
            made: Item = evaluate(on, op.expr, args)
            return made
        case "mul" | "add":
            both: Item = evaluate(on, (op.fn, 0, 1), args)
            return both
        case "acc":
            return args[0]
        case "dot":
            (p, t, n), (b, u, m) = (_parts(_without(on, x, op.over)) for x in args)
            return _pair(on, on.dot(p, b, op.over), _joined(on, t, u), n + m)
    if op.fn == "mean":
        return on.mean(plain(on, args[0]), op.over)
    p, t, n = _parts(_without(on, args[0], op.over))
    return _pair(on, on.sum(p, op.over), t, n)


def evaluate(on: Machine, expr: Expr, args: list[Item]) -> Any:
    """Evaluate an expression of tiles, pairs, numbers and sizes."""
    match expr:
        case int():
            return args[expr]
        case float():
            return expr
        case str():
            return on.size(expr)
    name, *given = expr
    x, *rest = (evaluate(on, sub, args) for sub in given)
    if name == "plain":
        return plain(on, x)
    if name == "exp" and on.pairs:
        return _exp(on, plain(on, x))
    if not any(isinstance(value, Pair) for value in (x, *rest)):
        return on.ew(name, x, *rest)
    match name:
        case "neg":
            return x._replace(p=on.ew("neg", x.p))
        case "inverse":
            return Pair(on.ew("inverse", x.p), on.ew("minus", x.t), -x.degree)
        case "log":
            if x.degree == 1:
                return on.ew("add", on.ew("log", x.p), x.t)
        case "mul":
            (p, t, n), (q, u, m) = _parts(x), _parts(rest[0])
            return _pair(on, on.ew("mul", p, q), _joined(on, t, u), n + m)
        case "div":
            return evaluate(on, ("mul", 0, ("inverse", 1)), [x, *rest])
        case "sub":
            return evaluate(on, ("add", 0, ("neg", 1)), [x, *rest])
        case "add":
            return add(on, x, rest[0])
    return on.ew(name, *(plain(on, value) for value in (x, *rest)))


def add(on: Machine, x: Item, y: Item) -> Item:
    """Add two items; pairs are rescaled to the larger exponent."""
    (p, t, n), (q, u, m) = _parts(x), _parts(y)
    if t is None and u is None:
        return on.ew("add", p, q)
    if t is None or u is None:
        zero = on.ew("mul", t or u, 0.0)
        t, u = t or zero, u or zero
    top = on.ew("larger", t, u)
    left = on.ew("mul", p, on.ew("below", t, top))
    right = on.ew("mul", q, on.ew("below", u, top))
    return Pair(on.ew("add", left, right), top, n or m)


def plain(on: Machine, x: Any) -> Any:
    """Multiply out a pair: p * exp(t)."""
    return on.ew("mul", x.p, on.ew("exp", x.t)) if isinstance(x, Pair) else x


def _exp(on: Machine, s: Tile) -> Pair:
    t = on.max(s, s.axes[-1]) if len(s.axes) > 1 else s
    return Pair(on.ew("below", s, t), t, 1)


def _parts(x: Any) -> tuple[Any, Any, int]:
    return (x.p, x.t, x.degree) if isinstance(x, Pair) else (x, None, 0)


def _joined(on: Machine, t: Tile | None, u: Tile | None) -> Tile | None:
    return on.ew("add", t, u) if t and u else t or u


def _pair(on: Machine, p: Tile, t: Tile | None, degree: int) -> Item:
    if t is None:
        return p
    return Pair(p, t, degree) if degree else plain(on, Pair(p, t, 0))


def _without(on: Machine, x: Item, axis: str) -> Item:
    """Rescale a pair so that its exponent does not vary along an axis, before a sum over it."""
    if not isinstance(x, Pair) or axis not in x.t.axes:
        return x
    top = on.max(x.t, axis)
    return Pair(on.ew("mul", x.p, on.ew("below", x.t, top)), top, x.degree)


def united(*axes: Axes) -> Axes:
    """Axes of a broadcast result."""
    return tuple(dict.fromkeys(axis for one in axes for axis in one))


def substituted(expr: Expr, places: list[Expr]) -> Expr:
    """Replace the arguments of an expression by other expressions."""
    if isinstance(expr, int):
        return places[expr]
    return (expr[0], *(substituted(x, places) for x in expr[1:])) if isinstance(expr, tuple) else expr


class Types:
    """Machine without numbers: computes result axes, and records work as (flops per element, axes)."""

    def __init__(self, pairs: bool) -> None:
        self.pairs = pairs
        self.work: list[tuple[int, Axes]] = []

    def _did(self, out: Axes, work: Axes, flops: int = 1) -> Tile:
        self.work.append((flops, work))
        return Tile(None, out)

    def ew(self, name: str, *args: Tile | float) -> Tile:
        """One flop per element."""
        axes = united(*(x.axes for x in args if isinstance(x, Tile)))
        return self._did(axes, axes)

    def dot(self, a: Tile, b: Tile, axis: str) -> Tile:
        """A multiplication and an addition per pair."""
        axes = united(a.axes, b.axes)
        return self._did(tuple(x for x in axes if x != axis), axes, 2)

    def sum(self, a: Tile, axis: str) -> Tile:
        """One flop per element."""
        return self._did(tuple(x for x in a.axes if x != axis), a.axes)

    mean = max = sum

    def size(self, dim: str) -> Tile:
        """A tile without axes."""
        return Tile(None, ())


def formula(expr: Expr, args: tuple[str, ...]) -> str:
    """Format an expression as text."""
    match expr:
        case int():
            return args[expr]
        case float():
            return f"{expr:.6g}"
        case str():
            return f"|{expr}|"
    name, *given = expr
    said = [formula(sub, args) for sub in given]
    return f"({said[0]} {INFIX[name]} {said[1]})" if name in INFIX else f"{name}({', '.join(said)})"

"""Build unfused programs from tensor expressions.

Every operator gets its own loops, and its result goes through global memory: programs start as slow as
possible. A contraction is one loop that multiplies tiles and another that accumulates them. No operator
depends on the kind of another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import require
from .items import Axes, Pair
from .program import ACC, ADD, DOT, EW, MUL, SUM, Loop, Op, Program, Stmt

Number = float | str | tuple[Any, ...]
"""A constant, a dimension's name (its size), or an expression of these."""

NAMES = {EW: "e", MUL: "x", ADD: "x", DOT: "t", SUM: "t", ACC: "s"}


class Builder:
    """A program under construction, one operator at a time."""

    def __init__(self, **inputs: str) -> None:
        """Declare the inputs and their axes, as in ``q="m d"``."""
        self.program = Program(tuple((name, tuple(axes.split())) for name, axes in inputs.items()), (), ())

    def __getitem__(self, name: str) -> Array:
        return Array(self, name)

    def op(self, fn: str, *args: Array, over: str = "", expr: Any = ()) -> Array:
        """Append an operator inside loops over all its dimensions."""
        old, names = self.program, tuple(x.name for x in args)
        out = old.fresh(NAMES[fn] + "1")
        stmt: Stmt = Op(out, fn, names, over, expr)
        typed = replace(old, body=(*old.body, stmt))
        dims = typed.values[out].dims + ((over,) if fn == ACC else ())
        for dim in reversed(dims):
            stmt = Loop(dim, (stmt,))
        self.program = replace(old, body=(*old.body, stmt))
        return Array(self, out)

    def done(self, *outputs: Array) -> Program:
        """Finish the program with these outputs."""
        outputs = tuple(
            x.apply("plain") if isinstance(self.program.values[x.name].item, Pair) else x for x in outputs
        )
        inputs = {name for name, _ in self.program.inputs}
        for x in outputs:
            require(
                (x.name not in inputs, f"{x.name} is an input and an output; return something made of it")
            )
        whole = replace(self.program, outputs=tuple(x.name for x in outputs))
        names = {x.name: f"out{n if n > 1 else ''}" for n, x in enumerate(outputs, 1)}
        return whole.put((), whole.body).renamed(names).canonical


@dataclass(frozen=True)
class Array:
    """A value of a program under construction; it supports tensor operators, and axes broadcast by name."""

    of: Builder
    name: str

    @property
    def axes(self) -> Axes:
        """Names of the axes."""
        return self.of.program.values[self.name].axes

    def apply(self, name: str, *others: Array | Number, swap: bool = False) -> Array:
        """Apply an elementwise primitive. A str is a dimension's size, a tuple an expression of sizes."""
        arrays = [self, *(x for x in others if isinstance(x, Array))]
        at = iter(range(1, len(arrays)))
        leaves = [
            0,
            *(next(at) if isinstance(x, Array) else float(x) if isinstance(x, int) else x for x in others),
        ]
        return self.of.op(EW, *arrays, expr=(name, *(reversed(leaves) if swap else leaves)))

    def __add__(self, other: Array | Number) -> Array:
        return self._two("add", other)

    def __mul__(self, other: Array | Number) -> Array:
        return self._two("mul", other)

    def __sub__(self, other: Array | Number) -> Array:
        if isinstance(other, Array) and other.axes != self.axes:
            return self + -other
        return self.apply("sub", other)

    def __truediv__(self, other: Array | Number) -> Array:
        if isinstance(other, Array) and other.axes != self.axes:
            return self * other.apply("div", 1.0, swap=True)
        return self.apply("div", other)

    def __rsub__(self, other: Number) -> Array:
        return self.apply("sub", other, swap=True)

    def __rtruediv__(self, other: Number) -> Array:
        return self.apply("div", other, swap=True)

    def __neg__(self) -> Array:
        return self.apply("neg")

    __radd__, __rmul__ = __add__, __mul__

    def _two(self, fn: str, other: Array | Number) -> Array:
        if not isinstance(other, Array) or set(other.axes) == set(self.axes):
            return self.apply(fn, other)
        return self.of.op(fn, self, other)

    def sum(self, over: str) -> Array:
        """Sum over an axis: inside each tile, then over tiles."""
        return self.of.op(ACC, self.of.op(SUM, self, over=over), over=over)

    def dot(self, other: Array) -> Array:
        """Contract over the one shared axis."""
        shared = [axis for axis in self.axes if axis in other.axes]
        require((len(shared) == 1, f"dot of {self.axes} and {other.axes}; expected one axis in common"))
        return self.of.op(ACC, self.of.op(DOT, self, other, over=shared[0]), over=shared[0])


def softmax(s: Array, over: str) -> Array:
    """exp(s) divided by its sum, the textbook formula without subtracting a maximum."""
    e = s.apply("exp")
    return e * e.sum(over).apply("inverse")


def layer_norm(x: Array, eps: float = 1e-5) -> Array:
    """Normalise the last axis to mean 0, variance 1; for an input, by sums of x and x * x, to be centred."""
    over, program = x.axes[-1], x.of.program
    mean = x.sum(over) / over
    if x.name in dict(program.inputs):
        x.of.program = replace(x.of.program, centred=(*program.centred, x.name))
        variance = (x * x).sum(over) / over - mean * mean
    else:
        variance = ((x - mean) * (x - mean)).sum(over) / over
    return (x - mean) * (variance + eps).apply("rsqrt")


def rms_norm(x: Array, eps: float = 1e-6) -> Array:
    """Normalise the last axis to mean square 1."""
    over = x.axes[-1]
    return x * ((x * x).sum(over) / over + eps).apply("rsqrt")


def attention() -> Program:
    """softmax(q k^T / sqrt(d)) v, for q [m, d], k [n, d], v [n, l]."""
    b = Builder(q="m d", k="n d", v="n l")
    s = b["q"].dot(b["k"]) / ("sqrt", "d")
    return b.done(softmax(s, over="n").dot(b["v"]))


def layernorm_matmul() -> Program:
    """layer_norm(x) y^T, for x [m, k], y [n, k]."""
    b = Builder(x="m k", y="n k")
    return b.done(layer_norm(b["x"]).dot(b["y"]))


def rmsnorm_swiglu() -> Program:
    """(silu(h g^T) * (h u^T)) w^T with h = rms_norm(x), for x [m, d], g and u [h, d], w [n, h]."""
    b = Builder(x="m d", g="h d", u="h d", w="n h")
    normed = rms_norm(b["x"])
    hidden = normed.dot(b["g"]).apply("silu") * normed.dot(b["u"])
    return b.done(hidden.dot(b["w"]))


GOLDEN: dict[str, Callable[[], Program]] = {
    "attention": attention,
    "layernorm-matmul": layernorm_matmul,
    "rmsnorm-swiglu": rmsnorm_swiglu,
}
"""Unfused example programs, by the names that `sparseflash fuse` takes."""

SIZES = {
    "attention": {"m": 65536, "d": 64, "n": 65536, "l": 64},
    "layernorm-matmul": {"m": 4096, "k": 576, "n": 576},
    "rmsnorm-swiglu": {"m": 4096, "d": 576, "h": 1536, "n": 576},
}
"""Sizes of the example programs: one head over 65,536 tokens, and layers of a model of width 576."""

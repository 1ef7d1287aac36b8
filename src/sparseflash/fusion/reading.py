"""Read plain PyTorch functions as block programs, by `torch.fx`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from ..common.errors import require
from .build import Array, Builder, layer_norm, rms_norm, softmax
from .items import Axes
from .program import EW, Program


@dataclass(frozen=True)
class View:
    """An array with PyTorch's order of axes; "" is an axis of length 1."""

    array: Array
    order: Axes

    @property
    def mT(self) -> View:
        """The transposed view."""
        return View(self.array, self.order[::-1])


def _same(name: str) -> Callable[..., View]:
    return lambda x, **_: View(x.array.apply(name), x.order)


def _two(fn: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def call(x: Any, y: Any) -> Any:
        orders = [a.order for a in (x, y) if isinstance(a, View)]
        if not orders:
            return {operator.mul: "mul", operator.truediv: "div"}[fn], x, y
        wide = max(len(order) for order in orders)
        columns = zip(*(("",) * (wide - len(order)) + order for order in orders))
        order = tuple(max(column) for column in columns)
        for one in orders:
            fits = all(a in ("", b) for a, b in zip(one, order[wide - len(one) :]))
            require((fits, f"axes {one} against {order}: they do not broadcast; expected the same names"))
        return View(fn(*(a.array if isinstance(a, View) else a for a in (x, y))), order)

    return call


def _matmul(x: View, y: View) -> View:
    matrices = len(x.order) == len(y.order) == 2
    require(
        (matrices, f"{x.order} @ {y.order}; expected two matrices"),
        (
            matrices and x.order[1] == y.order[0],
            f"{x.order} @ {y.order}; expected one name inside",
        ),
    )
    return View(x.array.dot(y.array), (x.order[0], y.order[1]))


def _sum(x: View, dim: int | tuple[int], keepdim: bool = False) -> View:
    at = (dim if isinstance(dim, int) else dim[0]) % len(x.order)
    order = tuple("" if i == at else axis for i, axis in enumerate(x.order) if keepdim or i != at)
    return View(x.array.sum(x.order[at]), order)


def _mean(x: View, dim: int | tuple[int], keepdim: bool = False) -> View:
    at = (dim if isinstance(dim, int) else dim[0]) % len(x.order)
    total = _sum(x, dim, keepdim)
    return View(total.array / x.order[at], total.order)


def _softmax(x: View, dim: int, **_: Any) -> View:
    return View(softmax(x.array, x.order[dim]), x.order)


def _normed(how: Callable[..., Array], usual: float | None) -> Callable[..., View]:
    def call(
        x: View, shape: Any, weight: View | None = None, bias: View | None = None, eps: float | None = usual
    ) -> View:
        require(
            (x.array.axes[-1] == x.order[-1], "a norm of a transposed matrix; expected one of its rows"),
            (eps is not None, "rms_norm without eps, which depends on the dtype; give one, such as eps=1e-6"),
        )
        made = how(x.array, eps)
        made = made * weight.array if weight else made
        return View(made + bias.array if bias else made, x.order)

    return call


def _power(x: Any, n: float) -> Any:
    names = {2: ("mul", 0, 0), 0.5: ("sqrt", 0), -0.5: ("rsqrt", 0), -1: ("div", 1.0, 0)}
    require((n in names, f"a power of {n}; known: {', '.join(map(str, names))}"))
    if not isinstance(x, View):
        return tuple(x if leaf == 0 and i else leaf for i, leaf in enumerate(names[n]))
    return View(x.array.of.op(EW, x.array, expr=names[n]), x.order)


def _linear(x: View, weight: View, bias: View | None = None) -> View:
    made = _matmul(x, weight.mT)
    return View(made.array + bias.array, made.order) if bias else made


KNOWN: dict[str, Callable[..., Any]] = {
    **{name: _same(name) for name in ("exp", "log", "sqrt", "rsqrt", "sigmoid", "silu", "relu", "neg")},
    **{name: _two(getattr(operator, name)) for name in ("add", "sub", "mul", "truediv")},
    "div": _two(operator.truediv),
    "matmul": _matmul,
    "mm": _matmul,
    "linear": _linear,
    "softmax": _softmax,
    "layer_norm": _normed(layer_norm, 1e-5),
    "rms_norm": _normed(rms_norm, None),
    "sum": _sum,
    "mean": _mean,
    "pow": _power,
    "square": lambda x: _power(x, 2),
    "t": lambda x: x.mT,
    "transpose": lambda x, *_: x.mT,
    "getattr": lambda x, name: x.order if name == "shape" else getattr(x, name),
    "getitem": operator.getitem,
}
"""Supported PyTorch functions, by the last part of their name."""


def read(fn: Callable[..., Any], **inputs: str) -> Program:
    """Read a PyTorch function of matrices (and vectors along an axis) as a program.

    Parameters
    ----------
    fn : callable
        Function of tensors that `torch.fx.symbolic_trace` can trace. A softmax over a row of -inf is 0.
    **inputs : str
        Axes of each argument by name: ``q="m d", k="n d"``. Equal names mean equal sizes.

    Returns
    -------
    Program
        The unfused program, with separate loops for every operator.

    Raises
    ------
    SparseFlashError
        If an operator is unknown (named in the message), or axes do not match.

    Examples
    --------
    >>> import torch
    >>> program = read(lambda x, w: torch.relu(x @ w.mT), x="m k", w="n k")
    >>> print(program)
    x[m, k], w[n, k] -> out
    for m
      for n
        for k
          t1 = dot_k(x, w)    -> t1[m, n, k]
    for m
      for n
        for k
          s1 += t1    -> s1[m, n]
    for m
      for n
        out = relu(s1)    -> out[m, n]
    """
    names = list(inspect.signature(fn).parameters)
    require(
        (
            names == list(inputs),
            f"axes of {', '.join(inputs)}; expected those of {', '.join(names)}, in order",
        )
    )
    builder, found = Builder(**inputs), {}
    for node in fx.symbolic_trace(fn).graph.nodes:
        if node.op == "placeholder":
            found[node] = View(builder[node.name], builder[node.name].axes)
        elif node.op == "output":
            given = node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],)
            return builder.done(*(found[x].array for x in given))
        else:
            name = node.target if isinstance(node.target, str) else node.target.__name__
            known = node.op != "get_attr" and name in KNOWN
            require((known, f"operator {name} is not known here; known: {', '.join(sorted(KNOWN))}"))
            args, options = fx.node.map_arg((node.args, node.kwargs), cast(Any, found.__getitem__))
            found[node] = KNOWN[name](*args, **{k: v for k, v in options.items() if v is not None})
    raise AssertionError("a graph has an output")

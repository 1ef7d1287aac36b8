"""Bases of diffusion methods: layout of video and text tokens, and patterns reused over denoising steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..plan import Plan
from ..plan.options import is_count
from ..selection.orders import grid_order
from .base import Context, Method, Selection, check_square


class Layout(NamedTuple):
    """Token layout of a sequence: `before` text tokens, a grid in raster order, `behind` text tokens."""

    grid: tuple[int, ...]
    tokens: int
    """Number of grid tokens; the last plane of the grid may be incomplete."""
    before: int
    behind: int

    def order(
        self,
        device: torch.device,
        *,
        axes: tuple[int, ...] | None = None,
        tile: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Make the `selection.grid_order` of these tokens, int32 [1,1,rows]."""
        text, whole = (self.before, self.behind), math.prod(self.grid)
        order = grid_order(self.grid, axes=axes, tile=tile, text=text, device=device)
        behind = order >= self.before + whole
        there = order < self.before + self.tokens
        order = torch.where(behind, order - (whole - self.tokens), torch.where(there, order, -1))
        if tile is not None:
            return order
        real = (order < 0).to(torch.uint8).argsort(dim=-1, stable=True)
        return order.gather(-1, real[..., : self.before + self.tokens + self.behind])

    def text(self, size: int, device: torch.device, order: Tensor | None = None) -> Tensor:
        """Mark blocks of `size` rows that hold text, bool [1,1,blocks]."""
        total = self.before + self.tokens + self.behind
        token = torch.arange(total, device=device)[None, None] if order is None else order
        words = (token >= 0) & ((token < self.before) | (token >= self.before + self.tokens))
        words = torch.nn.functional.pad(words, (0, -words.shape[-1] % size))
        return words.unflatten(-1, (-1, size)).any(-1)


def crossed(rows: Tensor, columns: Tensor) -> Tensor:
    """Mark blocks in one of these rows or columns: bool [1,1,R,C]."""
    return rows[..., :, None] | columns[..., None, :]


@dataclass(frozen=True, kw_only=True)
class GridMethod(Method):
    """Base of methods that use the place of a token in a video or an image.

    Parameters
    ----------
    grid : tuple of int
        Sizes of the grid in tokens, outermost axis first, in raster order. The first may be -1: it follows
        from the number of tokens.
    text : (int, int)
        Numbers of text tokens before and after the grid. They see, and are seen by, everything.
    """

    grid: tuple[int, ...] = (-1, 30, 52)
    text: tuple[int, int] = (0, 0)

    reads = ("grid", "text")
    phases = ("diffusion",)
    causal_selection = False

    def __post_init__(self) -> None:
        _check(self.grid, self.text)

    def layout(self, q: Tensor, k: Tensor, ctx: Context | None, axes: int | None = None) -> Layout:
        """Token layout from `ctx` or the method's own fields; `axes` is the required number of grid axes."""
        T = check_square(self, q, k)
        ctx = ctx or {}
        grid, text = ctx.get("grid"), ctx.get("text")
        grid, text = _check(self.grid if grid is None else grid, self.text if text is None else text)
        require((axes in (None, len(grid)), lambda: f"grid={grid!r}: expected {axes} sizes, outermost first"))
        return located(T, grid, text)


def _check(grid: Any, text: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    fits = isinstance(grid, (tuple, list)) and grid and all(is_count(x, 1) for x in grid[1:])
    fits = fits and (grid[0] == -1 or is_count(grid[0]))
    require((bool(fits), lambda: f"grid={grid!r}: expected sizes, outermost first; only the first may be -1"))
    return tuple(grid), ends_of(text)


def ends_of(text: Any) -> tuple[int, int]:
    """Validate `ctx["text"]`, tokens after the grid or (before, after); returns (before, after)."""
    ends = (0, text) if isinstance(text, int) else text
    fits = isinstance(ends, (tuple, list)) and len(ends) == 2 and all(is_count(x) for x in ends)
    require((bool(fits), lambda: f"text={text!r}: expected tokens behind the grid, or (before, behind)"))
    return tuple(ends)


def located(T: int, grid: tuple[int, ...], text: tuple[int, int]) -> Layout:
    """Make the layout of T tokens.

    Raises
    ------
    SparseFlashError
        If grid and text do not add up to T tokens.
    """
    tokens, rest = T - sum(text), math.prod(grid[1:])
    fits = tokens >= 0 and (grid[0] == -1 or tokens == grid[0] * rest)
    require(
        (
            fits,
            lambda: (
                f"grid={grid!r} and text={text!r} (before, behind) are not {T} tokens: give "
                'ctx["grid"] and ctx["text"] of this sequence; the first size may be -1'
            ),
        )
    )
    return Layout((-(-tokens // rest), *grid[1:]), tokens, *text)


class Pattern(NamedTuple):
    """A pattern found at one step and used at later steps."""

    plan: Plan
    lse: Tensor | None = None


class StepMethod(Method):
    """Base of methods whose first denoising steps are dense; the last dense step finds the pattern.

    Later steps use the pattern, and some (`again`) find it anew: `ctx` has `step` (from 0), `steps` (their
    number) and `state`, which a `Session` keeps for each layer and branch. A call without a step stands
    alone: it finds the pattern from its own q and k, and uses it at once.
    """

    reads = ("step", "steps", "state", "scale", "softcap")
    phases = ("diffusion",)
    causal_selection = False

    def first(self, steps: int | None) -> int:
        """Step at which the pattern is found; this step and earlier ones are dense."""
        raise NotImplementedError(f"{type(self).__name__}.first")

    def again(self, step: int) -> bool:
        """Whether a later step finds the pattern anew."""
        return False

    def pattern(self, q: Tensor, k: Tensor, lse: Tensor | None, ctx: Context) -> Pattern:
        """Find the pattern; `lse` is that of dense attention at this or an earlier step, or None."""
        raise NotImplementedError(f"{type(self).__name__}.pattern")

    def lengths(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """Numbers of queries and keys; equal, unless a method takes the last tokens alone as queries."""
        return (check_square(self, q, k),) * 2

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """A dense plan at the first steps, then the pattern."""
        ctx, (Tq, Tk) = ctx or {}, self.lengths(q, k)
        step, known = ctx.get("step"), ctx.get("state")
        first = self._first(ctx)
        if step is None:
            return Selection(self.pattern(q, k, None, ctx).plan)
        if step <= first:
            return Selection(Plan.dense(Tq, Tk, device=q.device))
        if not isinstance(known, Pattern):
            raise SparseFlashError(
                f"{type(self).__name__}: step {step}, and no pattern of step {first} is kept: run all steps "
                "of a generation from 0 through one Session (layer=, branch=)"
            )
        if (known.plan.Tq, known.plan.Tk) != (Tq, Tk):
            raise SparseFlashError(
                f"{type(self).__name__}: step {step} has {Tk} tokens, the pattern of step {first} "
                f"{known.plan.Tk}: a generation of another size is another Session, from step 0"
            )
        if self.again(step):
            known = self.pattern(q, k, known.lse, ctx)
        return Selection(known.plan, state=known)

    def observe(
        self, q: Tensor, k: Tensor, out: Tensor, lse: Tensor, selection: Selection, ctx: Context
    ) -> Any:
        """Find the pattern from the log-sum-exp of the last dense step."""
        step = ctx.get("step")
        if step is not None and step == self._first(ctx):
            return self.pattern(q, k, lse, ctx)
        return selection.state

    def _first(self, ctx: Context) -> int:
        for name in ("step", "steps"):
            x = ctx.get(name)
            require((x is None or is_count(x), lambda: f"ctx[{name!r}]={x!r}: expected an int >= 0"))
        steps = ctx.get("steps")
        return 0 if ctx.get("step") is None else self.first(steps)

"""Sparse-vDiT: heads of a video model, each with one of five fixed patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import require
from ..ops.attention import attention
from ..plan import Plan
from ..selection.budgets import top_k
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import Context, Method, Selection, check_counts, get
from .denoising import GridMethod, crossed

MODES = ("full", "skip", "diagonal", "multi-diagonal", "stripe")
Call = tuple[Tensor, Tensor, Tensor, Context]
"""Arguments of a layer's call: q, k, v and ctx."""


@dataclass(frozen=True)
class SparseVDiT(GridMethod):
    """Each head of a video model sees a band, the same place in all frames, some columns, all, or nothing.

    "diagonal" is a band over tokens in raster order; "multi-diagonal" is the same band over tokens sorted by
    place, frames innermost; "stripe" keeps the block columns with the largest weights of evenly sampled
    queries; "skip" gives output 0 at no cost. All patterns consist of blocks (rounded outward), and heads of
    all modes attend in one call. A `Profile` stores the modes, `calibrate.search` with `judge` finds them.

    Papers: Chen et al., "Sparse-vDiT", arXiv 2506.03065, sections 4.1 to 4.3 (which fixes the columns of a
    stripe in advance; here they are found in each call).

    Parameters
    ----------
    mode : str
        "full", "skip", "diagonal", "multi-diagonal" or "stripe"; a tuple where heads differ, as for every
        other field.
    reach : int
        Blocks of a band on either side.
    stripes : int
        Number of block columns.
    sample : int
        Number of queries that score the columns.
    block : int
        Queries of a tile, and keys of a block.
    grid, text
        As in every method on a grid: sizes in tokens, and tokens of text (before, behind), which see and are
        seen by everything, except in skipped heads.

    Notes
    -----
    `ctx` keys: `grid` and `text`, which replace those of the method; `scale` and `softcap`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 3, 8 * 16 * 16, 32)
    >>> method = sf.methods.SparseVDiT(mode=("diagonal", "skip", "multi-diagonal"), grid=(8, 16, 16))
    >>> out = method(q, k, v)
    >>> bool(out[:, 1].any())
    False
    """

    mode: str = "full"
    reach: int = 2
    stripes: int = 4
    sample: int = 64
    block: int = 64

    reads = ("grid", "text", "scale", "softcap")
    paper = "arXiv 2506.03065"

    def __post_init__(self) -> None:
        require((self.mode in MODES, lambda: f"mode={self.mode!r}: expected one of {', '.join(MODES)}"))
        check_counts(self, 0, "reach")
        check_counts(self, 1, "stripes", "sample", "block")
        super().__post_init__()

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select blocks by the mode."""
        layout, size, T = self.layout(q, k, ctx), self.block, q.shape[2]
        order = None
        if self.mode == "multi-diagonal":
            order = layout.order(q.device, axes=(*range(1, len(layout.grid)), 0))
        rows = T if order is None else order.shape[-1]
        tile = torch.arange(-(-rows // size), device=q.device)
        if self.mode in ("full", "skip"):
            keep = torch.full((1, 1, len(tile), len(tile)), self.mode == "full", device=q.device)
        else:
            words = layout.text(size, q.device, order)
            keep = ((tile[:, None] - tile).abs() <= self.reach)[None, None]
            if self.mode == "stripe":
                keep = self._columns(q, k, ~words, ctx or {})
            keep = keep | crossed(words, words)
        return Selection(
            Plan.from_blocks(keep, Tq=T, Tk=T, tile=size, unit=size, q_order=order, k_order=order)
        )

    def _columns(self, q: Tensor, k: Tensor, video: Tensor, ctx: Context) -> Tensor:
        """Block columns with the largest weights of evenly sampled queries: bool [B,H,1,C]."""
        some = q[:, :, :: max(1, q.shape[2] // self.sample)]
        grid = Grid(some.shape[2], k.shape[2], max(some.shape[2], 1), self.block, causal=False)
        told = {name: ctx.get(name) for name in ("scale", "softcap")}
        mass = tile_mass(some, k, grid, "exact", **told)
        return top_k(mass, self.stripes, among=video[:, :, None])


def judge(
    samples: Mapping[int, Sequence[Call]],
    *,
    weight: float = 0.5,
    bound: float = 1.0,
    cost: Callable[[Plan], float] = lambda plan: plan.work,
    relative: bool = True,
) -> Callable[[int, Mapping[str, Any]], list[float]]:
    """Make the score function for `calibrate.search` (section 4.2): the quality of a setting per head.

    A head gets the candidate of the smallest `error + weight * cost`, or stays dense if none is below
    `bound`. Give the dense candidate, `sparse-vdit` with mode "full", first.

    Parameters
    ----------
    samples : mapping
        Sample calls of each layer: (q, k, v, ctx).
    weight, bound : float
        Lambda and epsilon of the paper.
    cost : callable
        Cost of a plan relative to dense attention, in [0, 1]; the visited share by default. A measured cost:
        `lambda plan: costs.predict(plan, q, k).seconds / dense_seconds`.
    relative : bool
        Whether the squared error is relative to that of an output of 0. The paper's is absolute, so its
        bounds differ between layers.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from sparseflash.methods.sparse_vdit import judge
    >>> q, k, v = torch.randn(3, 1, 2, 256, 32)
    >>> score = judge({0: [(q, k, 0 * v, {"grid": (4, 8, 8)})]})
    >>> modes = [{"method": "sparse-vdit", "mode": mode} for mode in ("full", "skip")]
    >>> found = sf.calibrate.search("zeros", [0], modes, score, progress=False)
    >>> [head["mode"] for head in found.heads(0)]
    ['skip', 'skip']
    """

    def score(layer: int, setting: Mapping[str, Any]) -> list[float]:
        own = dict(setting)
        method = get(own.pop("method"), **own)
        if getattr(method, "mode", None) == "full":
            return [-bound] * samples[layer][0][0].shape[1]
        total = torch.zeros(())
        for q, k, v, ctx in samples[layer]:
            dense = attention(q, k, v, Plan.dense(q.shape[2], k.shape[2], device=q.device)).double()
            made = method.select(q, k, ctx)
            plans = made.plan if isinstance(made.plan, tuple) else (made.plan,)
            off = (method(q, k, v, ctx=ctx, selection=made).double() - dense).square().mean((0, 2, 3))
            if relative:
                off = off / dense.square().mean((0, 2, 3)).clamp(min=1e-30)
            total = total + off + weight * sum(map(cost, plans))
        return [float(-x / len(samples[layer])) for x in total]

    return score


def smallest(
    samples: Mapping[int, Sequence[Call]], bound: float, by: Callable[[Method], float]
) -> Callable[[int, Mapping[str, Any]], list[float]]:
    """Make a score function that prefers, among settings with a layer error below `bound`, the smallest `by`.

    With `by=lambda method: method.references`, the search of Efficient-vDiT (arXiv 2502.06155, section 3.2).
    Give the dense candidate first: the first one is taken where none is below the bound.
    """
    each = judge(samples, weight=0.0, relative=True)

    def score(layer: int, setting: Mapping[str, Any]) -> list[float]:
        own = dict(setting)
        method = get(own.pop("method"), **own)
        heads = each(layer, setting)
        return [-by(method) if -sum(heads) / len(heads) < bound else -float("inf")] * len(heads)

    return score

"""PAROAttention: a token order for each head that concentrates its attention in few blocks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.numerics import state_dtype
from ..common.errors import require
from ..ops.rows import take_rows
from ..plan import Plan
from ..plan.options import is_count, pieces
from ..selection.budgets import top_k
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import Context, check_counts, check_shares
from .denoising import GridMethod, Layout, Pattern, StepMethod, crossed

CHUNK = 1 << 22
"""Attention entries that are computed in one chunk when orders are scored."""


@dataclass(frozen=True)
class PAROAttention(StepMethod, GridMethod):
    """Each head sorts the tokens of a video by the best axis order, and keeps the densest blocks.

    A head that attends along time has many thin diagonals in raster order, but full blocks with frames
    innermost. Each axis order is scored by how many blocks are almost empty, and by how uniform the others
    are; the head uses the best. Then the blocks of the largest mass are kept, over all tiles of the head
    together, at least one for each tile.

    Papers: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention
    in Visual Generation Models", arXiv 2506.16054, sections 3.1 and 3.2. There, orders and blocks are found
    offline; here at step `search` of the generation itself, and used from then on.

    Parameters
    ----------
    keep : float
        Share of all blocks that a head keeps, in (0, 1], blocks with text included.
    search : int
        Step at which order and blocks are found; this step and earlier ones are dense.
    block : int
        Queries of a tile, and keys of a block.
    alpha : float
        Weight of empty blocks in the cost of an order; uniformity has weight 1 - alpha.
    small : float
        An entry is small below this share of 1 / tokens.
    empty : float
        A block is empty if this share of its entries is small.
    axes_order : tuple of int, optional
        One order for all heads, without a search.
    grid, text
        As in every method on a grid: sizes in tokens, and tokens of text (before, behind).

    Notes
    -----
    `ctx` keys: `step` (`steps` is not needed), `state` (kept by a `Session`), `grid` and `text`, `scale` and
    `softcap`. Without a step, each call finds its own pattern: six sweeps over all pairs for a video, so no
    time is saved. Rotary embeddings are applied before: the order permutes rows without changing them.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 8 * 8 * 8, 32)
    >>> method = sf.methods.PAROAttention(keep=0.5)
    >>> method(q, k, v, ctx={"grid": (8, 8, 8)}).shape
    torch.Size([1, 2, 512, 32])
    """

    keep: float = 0.5
    search: int = 0
    block: int = 64
    alpha: float = 0.5
    small: float = 0.1
    empty: float = 0.95
    axes_order: tuple[int, ...] | None = None

    reads = (*StepMethod.reads, "grid", "text")
    paper = "arXiv 2506.16054"

    def __post_init__(self) -> None:
        check_shares(self, "keep", "alpha", "small", "empty")
        check_counts(self, 1, "block")
        own = self.axes_order
        good = own is None or (isinstance(own, tuple) and sorted(own) == list(range(len(own))))
        require(
            (is_count(self.search), lambda: f"search={self.search!r}: expected a step >= 0"),
            (good, lambda: f"axes_order={own!r}: expected the axes, each once, or None"),
        )
        GridMethod.__post_init__(self)

    def first(self, steps: int | None) -> int:
        """The search step."""
        return self.search

    def pattern(self, q: Tensor, k: Tensor, lse: Tensor | None, ctx: Context) -> Pattern:
        """Find the best order of each head, and its best blocks in that order."""
        axes = None if self.axes_order is None else len(self.axes_order)
        layout, (H, T), size = self.layout(q, k, ctx, axes), q.shape[1:3], self.block
        told = {name: ctx.get(name) for name in ("scale", "softcap")}
        if self.axes_order is None:
            orders = torch.cat([layout.order(q.device, axes=axes) for axes in _orders(layout)], 1)
            order = orders[0, order_costs(self, q, k, layout, **told).argmin(-1)]
        else:
            order = layout.order(q.device, axes=self.axes_order)
        each = order.expand(-1, H, -1)
        mass = tile_mass(
            take_rows(q, each),
            take_rows(k.repeat_interleave(H // k.shape[1], 1), each),
            Grid(T, T, size, size, causal=False, device=q.device),
            "exact",
            **told,
        )
        lanes = (T - torch.arange(mass.shape[2], device=q.device) * size).clamp(max=size)
        words = layout.text(size, q.device, each)
        best = mass == mass.amax(-1, keepdim=True) if T else mass > 0
        forced = crossed(words, words) | best
        worth = torch.where(forced, torch.inf, mass * lanes[..., None]).flatten(-2)
        chosen = top_k(worth, round(self.keep * worth.shape[-1])).view(mass.shape)
        return Pattern(
            Plan.from_blocks(
                chosen | crossed(words, words), Tq=T, Tk=T, tile=size, unit=size, q_order=order, k_order=order
            )
        )


def order_costs(
    method: PAROAttention, q: Tensor, k: Tensor, layout: Layout, scale: float | None, softcap: float | None
) -> Tensor:
    """Compute the cost of each axis order for each head, [B,H,orders]: smaller is better.

    The cost is alpha times the number of blocks that are not empty, plus 1 - alpha times the sum of
    max / mean over blocks, each normalised by its sum over all orders.
    """
    wide, size, n = state_dtype(q), method.block, layout.tokens
    (B, H, _, D), end = q.shape, layout.before + n
    q, k = (
        x.detach()[:, :, layout.before : end].to(wide) for x in (q, k.repeat_interleave(H // k.shape[1], 1))
    )
    q = q * (D**-0.5 if scale is None else scale)
    counted, peaked = [], []
    video, blocks = Layout(layout.grid, n, 0, 0), -(-n // size)
    lanes = (n - torch.arange(blocks, device=q.device) * size).clamp(max=size)
    part = max(1, CHUNK // max(B * H * n * size, 1))
    for axes in _orders(layout):
        at = video.order(q.device, axes=axes)[0, 0].long()
        rows, columns = q[:, :, at], k[:, :, at].mT
        full, peak = q.new_zeros(B, H), q.new_zeros(B, H)
        for first, last in pieces(blocks, part):
            score = rows[:, :, first * size : last * size] @ columns
            score = score if softcap is None else torch.tanh(score / softcap) * softcap
            p = pad(score.softmax(-1), (0, blocks * size - n, 0, -score.shape[2] % size))
            p = p.unflatten(3, (blocks, size)).unflatten(2, (-1, size)).movedim(4, 3).flatten(4)
            real = lanes[first:last, None] * lanes  # padding entries are 0, and counted as small below
            small = (p < method.small / n).sum(-1) - (size**2 - real)
            full += (small < method.empty * real).sum((2, 3))
            peak += (p.amax(-1) * real / p.sum(-1).clamp(min=1e-30)).sum((2, 3))
        counted.append(full)
        peaked.append(peak)
    both = [torch.stack(x, -1) for x in (counted, peaked)]
    full, peak = (x / x.sum(-1, keepdim=True).clamp(min=1e-30) for x in both)
    return method.alpha * full + (1 - method.alpha) * peak


def _orders(layout: Layout) -> list[tuple[int, ...]]:
    return list(permutations(range(len(layout.grid))))

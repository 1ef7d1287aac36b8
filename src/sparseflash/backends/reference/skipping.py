"""Skip blocks of keys whose weights are negligible: every query has met a much larger logit before.

A block is up to 64 query rows of a tile by contiguous key rows within one cell of 64. Keys are met in the
order of the lists, but full entries before partial ones: adjacent units form one run unless they have bits,
spans never do. In a tile of at most 8 rows each row is a block of its own, and a cell has 128 rows. The CPU
cuts its keys like this, except that scattered units of fewer than 16 keys are gathered; Triton takes the
chunks of its kernel as blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.entries import TileView
from ...plan.options import laid_out
from ..numerics import NEVER

FEW, ROWS, CELL = 8, 64, 64


def _blocks(view: TileView, plan: Plan, r: int, cell: int) -> tuple[Tensor, Tensor]:
    """Return the order in which keys are met, and the block number of each key in that order, [B,H,n]."""
    B, H, _ = view.entry.shape

    def of(name: str) -> Tensor | int:
        x = getattr(plan, name)
        return 0 if x is None else laid_out(x[..., r], B, H)[..., None]

    spans = of("span_count") if plan.spans is not None else 0
    spanned = view.entry < spans
    full = torch.where(spanned, view.entry < of("span_full"), view.entry - spans < of("full"))
    phase = torch.where(view.entry < 0, 2, (~full).int())
    order = phase.argsort(dim=-1, stable=True)
    row, entry, phase, spanned = (x.gather(-1, order) for x in (view.k_row, view.entry, phase, spanned))
    apart = spanned | ((phase == 1) & (plan.bits is not None))
    fresh = torch.ones_like(spanned)
    fresh[..., 1:] = (row[..., 1:] != row[..., :-1] + 1) | (row[..., 1:] // cell != row[..., :-1] // cell)
    fresh[..., 1:] |= phase[..., 1:] != phase[..., :-1]
    fresh[..., 1:] |= (entry[..., 1:] != entry[..., :-1]) & (apart[..., 1:] | apart[..., :-1])
    return order, fresh.long().cumsum(-1) - 1


def without_minor(x: Tensor, view: TileView, plan: Plan, r: int, below: float, skipped: Tensor) -> Tensor:
    """A tile's x with -inf in blocks that lie `below` the largest so far; counts blocks in `skipped`."""
    few = min(plan.tile, plan.q_rows) <= FEW
    order, block = _blocks(view, plan, r, 2 * CELL if few else CELL)
    order, block = (y[..., None, :].expand_as(x) for y in (order, block))
    shape = (*x.shape[:-1], int(block.max()) + 1)
    tops = x.new_full(shape, NEVER).scatter_reduce(-1, block, x.gather(-1, order), "amax")
    seen = tops > NEVER
    matters = seen & (tops >= tops.cummax(-1).values - below)
    rows = 1 if few else ROWS
    groups = [slice(i, i + rows) for i in range(0, shape[2], rows)]
    met = torch.stack([seen[:, :, rows].any(2) for rows in groups], 2)
    kept = torch.stack([matters[:, :, rows].any(2) for rows in groups], 2)
    skipped += torch.stack([met, met & ~kept], -1).sum((2, 3))
    hidden = torch.cat(
        [
            ~kept[:, :, i : i + 1].expand(-1, -1, len(range(*rows.indices(shape[2]))), -1)
            for i, rows in enumerate(groups)
        ],
        2,
    )
    return x.masked_fill(
        torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, hidden.gather(-1, block)), NEVER
    )

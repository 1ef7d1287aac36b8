"""Statistics of a plan: how many pairs are visible, visited, and allowed by its rules alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .entries import CELLS, Ranges, cells, positions, query_tokens, ranges, real_rows
from .options import FAR, laid_out, shift_of
from .record import Record


def visible_pairs(plan: Record) -> int:
    """Number of visible (query, key) pairs: full entries are counted, partial ones evaluated."""
    entries = ranges(plan)
    rows = real_rows(plan).flatten(0, 2).sum(-1)
    sure = ((entries.hi - entries.lo) * rows[entries.cell])[entries.full].sum()
    rest = entries.of(~entries.full)
    if by_position(plan):
        return int(sure) + _count_by_position(plan, rest)
    return int(sure) + sum(int(part.keep.sum()) for part in cells(plan, rest))


def by_position(plan: Record) -> bool:
    """Whether key rows are positions and only positions decide: visible pairs then have a closed form."""
    told = (plan.k_order, plan.k_pos, plan.k_end, plan.q_seg, plan.k_seg, plan.bits)
    return all(x is None for x in told)


def _count_by_position(plan: Record, entries: Ranges) -> int:
    """Count visible pairs of entries in closed form: for each row, the length of range ∩ (window ∪ sink).

    Example: range [0, 10), q = 8, causal, left = 2, sink = 3: near is [6, 9), before [0, 3): 6 pairs.
    """
    batch, heads = plan.extent()
    tokens = query_tokens(plan).reshape(-1, plan.tile)
    head = torch.arange(len(tokens), device=plan.device) // plan.tiles % heads
    left, right, sink = plan.rules.band(head, heads)
    total = 0
    step = max(1, CELLS // plan.tile)
    for at in range(0, len(entries.lo), step):
        part = entries.of(slice(at, at + step))
        token = tokens[part.cell].long()
        lo, hi = part.lo[:, None], part.hi[:, None]
        own = part.cell // plan.tiles
        q = positions(plan, token, own // heads, own % heads)
        if plan.causal:
            hi = torch.minimum(hi, q + int(plan.include_self))
        a, b, s = q - left[part.cell, None], q + right[part.cell, None] + 1, sink[part.cell, None]
        near = (torch.minimum(hi, b) - torch.maximum(lo, a)).clamp(min=0)
        before = (torch.minimum(torch.minimum(hi, s), a) - lo).clamp(min=0)
        behind = (torch.minimum(hi, s) - torch.maximum(lo, b)).clamp(min=0)
        seen = near + before + behind
        if not plan.causal and not plan.include_self:
            seen = seen - ((q >= lo) & (q < hi)).long()
        total += int((seen * (token >= 0)).sum())
    return total


def partial_area(plan: Record) -> int:
    """Pairs in partial entries, which `visible_pairs` has to evaluate."""
    entries = ranges(plan)
    return int(((entries.hi - entries.lo) * ~entries.full).sum()) * plan.tile


def visited_area(plan: Record) -> int:
    """Tile rows x listed keys, over all tiles."""
    entries = ranges(plan)
    rows = (plan.q_rows - entries.cell % plan.tiles * plan.tile).clamp(max=plan.tile)
    return int(((entries.hi - entries.lo) * rows).sum())


def dense_pairs(plan: Record) -> int:
    """Pairs that causality and the window alone allow, over all batches and heads."""
    batch, heads = plan.extent()
    device = plan.device
    if plan.q_pos is not None:
        q = laid_out(plan.q_pos, batch, heads).long()
    else:
        shift = shift_of(plan.q_offset, 2)
        q = (torch.arange(plan.Tq, device=device) + torch.as_tensor(shift, device=device)).expand(
            batch, heads, -1
        )
    if plan.k_pos is not None:
        k = laid_out(plan.k_pos, batch, heads).long().sort(-1).values
    else:
        k = torch.arange(plan.Tk, device=device).expand(batch, heads, -1)
    q, k = q.contiguous(), k.contiguous()

    def below(x: Tensor) -> Tensor:
        """Count the keys at positions below x."""
        return torch.searchsorted(k, x.contiguous())

    past = below(q + int(plan.include_self)) if plan.causal else torch.full_like(q, plan.Tk)
    left: Any
    right: Any
    left, right = plan.window or (None, None)
    sinks: Any = plan.sink
    if plan.head_window is not None:
        table = laid_out(plan.head_window, batch, heads).long()
        left, right = (torch.where(x < 0, FAR, x) for x in (table[..., :1], table[..., 1:]))
        sinks = 0 if plan.head_sink is None else laid_out(plan.head_sink, batch, heads).long()
    lo = torch.zeros_like(q) if left is None else below(q - left)
    hi = torch.full_like(q, plan.Tk) if right is None else below(q + right + 1)
    lo, hi = torch.minimum(lo, past), torch.minimum(hi, past)
    pairs = hi - lo
    below_0 = plan.k_pos is not None  # a key may stand before the first position, where a sink of 0 ends
    if plan.rules.windowed and (below_0 or plan.sink or plan.head_sink is not None):
        sink = torch.minimum(below(torch.zeros_like(q) + sinks), past)
        pairs = pairs + torch.minimum(sink, lo) + (sink - hi).clamp(min=0)
    if not plan.causal and not plan.include_self:
        pairs = pairs - (below(q + 1) - below(q))
    return int(pairs.sum())


def density(plans: Record | tuple[Record, ...]) -> float:
    """`Plan.density`; for several plans, relative to the plan whose rules allow most."""
    return _visible_of(plans, dense_pairs)


def kept(plans: Record | tuple[Record, ...]) -> float:
    """`Plan.kept`; for several plans, relative to all causal pairs if all are causal, else to all pairs."""
    open_ = {"window": None, "sink": 0, "head_window": None, "head_sink": None}
    return _visible_of(plans, lambda plan: dense_pairs(plan._changed(**open_)))


def _visible_of(plans: Record | tuple[Record, ...], allowed: Callable[[Record], int]) -> float:
    """Visible pairs over the pairs `allowed` by the plan that allows most; 1 if that is none."""
    parts = parts_of(plans)
    batch, heads = extent_of(parts)

    def share(plan: Record) -> float:  # how often this plan's lists repeat in the common extent
        own_batch, own_heads = plan.extent()
        return batch * heads / (own_batch * own_heads) if own_batch else 1

    most = max(allowed(one) * share(one) for one in parts)
    return sum(visible_pairs(one) * share(one) for one in parts) / most if most else 1.0


def work(plans: Record | tuple[Record, ...]) -> float:
    """`Plan.work`."""
    total = 0.0
    for plan in parts_of(plans):
        batch, heads = plan.extent()
        area = plan.Tq * plan.Tk * batch * heads
        total += visited_area(plan) / area if area else 0.0
    return total


def parts_of(plans: Record | tuple[Record, ...]) -> tuple[Record, ...]:
    """The plans of one softmax as a tuple."""
    return plans if isinstance(plans, tuple) else (plans,)


def extent_of(plans: Record | tuple[Record, ...]) -> tuple[int, int]:
    """Return the (batch, heads) that all plans of one softmax broadcast to."""
    extents = [one.extent() for one in parts_of(plans)]
    return next((b for b, _ in extents if b != 1), 1), math.lcm(*(h for _, h in extents))

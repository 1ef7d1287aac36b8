"""Look up single pairs in a plan: a sort of the entries, a binary search a pair, no cost in the area."""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import bit
from .entries import fetch, ranges
from .options import shift_at
from .record import Record


class Lookup:
    """Callable that tells, pair by pair, whether a query token of one of `heads` heads sees a key token."""

    def __init__(self, plan: Record, heads: int) -> None:
        self.plan, self.heads = plan, heads
        self.batch, self.own = plan.extent()
        entries = ranges(plan)
        entries = entries.of(entries.hi > entries.lo)
        self.wide = plan.k_rows + 1
        key = entries.cell * self.wide + entries.lo
        order = torch.argsort(key)
        self.entries, self.key = entries.of(order), key[order]
        self.q_row = None if plan.q_order is None else _inverse(plan.q_order, plan.Tq)
        self.k_row = None if plan.k_order is None else _inverse(plan.k_order, plan.Tk)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Visibility of each pair: batch, head, query and key token (-1: none) broadcast; bool."""
        plan, heads = self.plan, self.heads
        # PyTorch's broadcast_tensors has no type annotations
        b, h, q, k = torch.broadcast_tensors(b, h, q, k)  # type: ignore[no-untyped-call]
        q_row = q if self.q_row is None else torch.where(q >= 0, fetch(self.q_row, b, h, q, heads), -1)
        k_row = k if self.k_row is None else torch.where(k >= 0, fetch(self.k_row, b, h, k, heads), -1)
        keep = (q_row >= 0) & (k_row >= 0)
        if not len(self.key) or not plan.tiles:
            return torch.zeros_like(keep)
        own_b = b if self.batch > 1 else torch.zeros_like(b)
        cell = (own_b * self.own + h * self.own // heads) * plan.tiles + q_row.clamp(min=0) // plan.tile
        # index of the last range of the query's tile that begins at or before the key row
        at = torch.searchsorted(self.key, cell * self.wide + k_row.clamp(min=0), right=True) - 1
        known = at.clamp(min=0)
        keep = keep & (at >= 0) & (self.entries.cell[known] == cell) & (k_row < self.entries.hi[known])
        shift = shift_at(plan.q_offset, b)
        keep = keep & plan.rules.see(
            q, k, shift, plan.Tk, lambda x: fetch(x, b, h, q, heads), lambda x: fetch(x, b, h, k, heads)
        )
        if plan.bits is not None and len(plan.bits):
            row = self.entries.bits[known]
            lane = torch.where(row >= 0, k_row - self.entries.lo[known], 0).clamp(0, plan.unit - 1)
            word = plan.bits[row.clamp(min=0), q_row.clamp(min=0) % plan.tile, lane // 32]
            keep = keep & (bit(word, lane) | (row < 0))
        return keep


def _inverse(order: Tensor, T: int) -> Tensor:
    """Row of each token of an order [B,H,rows], -1 for a dropped one: [B,H,T]."""
    row = torch.full((*order.shape[:2], T + 1), -1, dtype=torch.int64, device=order.device)
    place = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    row.scatter_(-1, torch.where(order >= 0, order, T).long(), place)
    return row[..., :T]

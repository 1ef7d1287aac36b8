"""Packed and padded rows for methods: each document or sequence by itself, batched where possible."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...ops.rows import take_rows
from ...plan import Plan


class Documents:
    """The documents of packed rows as right-padded batches, and the way back.

    Lengths in a batch differ by at most a factor of two; shorter documents are padded with zeros. `tokens`
    has for each batch the mask bool `[documents, length]`, True = token.

    Parameters
    ----------
    starts : Tensor
        Integers `[B,S]`: begin, in its row, of each token's document.
    """

    def __init__(self, starts: Tensor) -> None:
        self.shape = starts.shape
        total = starts.numel()
        at = torch.arange(self.shape[1], device=starts.device)
        first = (starts == at).flatten().nonzero()[:, 0]
        length = torch.diff(first, append=first.new_tensor([total]))
        size = length.double().log2().ceil()
        self.parts: list[Tensor] = []
        self.tokens: list[Tensor] = []
        for one in size.unique():
            a, n = (x[size == one] for x in (first, length))
            lane = torch.arange(int(n.max()), device=starts.device)
            self.tokens.append(lane < n[:, None])
            self.parts.append(torch.where(self.tokens[-1], a[:, None] + lane, total))
        order = torch.cat([part.flatten() for part in self.parts])
        self.place = order.new_empty(total + 1)
        self.place[order] = torch.arange(len(order), device=starts.device)

    def split(self, x: Tensor) -> list[Tensor]:
        """Split `[B,H,S,D]` into `[documents,H,length,D]`, one batch per range of lengths."""
        rows = x.transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        return [
            rows.index_select(0, part.flatten()).unflatten(0, part.shape).transpose(1, 2)
            for part in self.parts
        ]

    def join(self, batches: list[Tensor]) -> Tensor:
        """Invert `split`, to `[B,H,S,D]`."""
        rows = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in batches])
        return rows.index_select(0, self.place[:-1]).unflatten(0, self.shape).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences of a padded batch with equal numbers of queries, keys and keys before the first query.

    Parameters
    ----------
    rows : Tensor
        `[n]`: indices of the sequences in the batch.
    queries, keys : Tensor
        `[n,S']`, `[n,T']`: indices of their real queries and keys.
    offset : int
        Number of keys before the first query.
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor
    offset: int


class Padded:
    """The sequences of a padded batch without their padding, wherever that is.

    Parameters
    ----------
    tokens : Tensor
        bool `[B,T]`, True = token.
    S : int
        Number of queries.
    offset : int or Tensor
        Index of the first query among the keys.
    """

    def __init__(self, tokens: Tensor, S: int, offset: int | Tensor) -> None:
        T = tokens.shape[1]
        at = (torch.arange(S, device=tokens.device) + offset).clamp(0, max(T - 1, 0))
        real = tokens.index_select(1, at)
        before = torch.nn.functional.pad(tokens.long().cumsum(1), (1, 0))
        self.tokens, self.real = tokens, real
        self._moved: tuple[Tensor | None, Tensor | None] | None = None
        self.begin = before.index_select(1, at[:1])[:, 0] if S else before[:, 0]
        self.rank = before
        """`[B,T+1]`: number of tokens before each key."""

    def front(self) -> tuple[Tensor, Tensor]:
        """Sort orders that put tokens first and padding last: `[B,S]` for queries, `[B,T]` for keys."""
        queries, keys = (torch.argsort((~x).byte(), dim=-1, stable=True) for x in (self.real, self.tokens))
        return queries, keys

    def moved(self) -> tuple[Tensor | None, Tensor | None]:
        """As `front`, with None for an order that changes nothing."""
        if self._moved is None:
            self._moved = self.front()
            if not torch.compiler.is_compiling():
                still = [bool((x[:, 1:] > x[:, :-1]).all()) for x in self._moved]
                self._moved = (None if still[0] else self._moved[0], None if still[1] else self._moved[1])
        return self._moved

    def groups(self) -> list[Group]:
        """Groups of all sequences that have queries. Reads values."""
        sizes = torch.stack([self.real.sum(1), self.tokens.sum(1), self.begin], 1).tolist()
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, size in enumerate(sizes):
            rows.setdefault(tuple(size), []).append(i)
        queries, keys = self.front()
        return [
            Group(at := torch.tensor(which, device=keys.device), queries[at, :n], keys[at, :m], begin)
            for (n, m, begin), which in rows.items()
            if n
        ]


def behind(plan: Plan, begin: Tensor, first: Tensor) -> Plan | None:
    """Shift a plan of one query, made for keys from 0, to sequences whose keys begin at row `first`.

    `begin [B]`: the query's position, counted from the first key; `first [B]`: row of the first key. Ranges
    are shifted and positions set; returns None if the plan has more than ranges, for which keys would have to
    move.
    """
    moves = plan.index is None and plan.spans is not None and plan.k_order is None and plan.q_order is None
    told = (plan.q_pos, plan.k_pos, plan.k_end, plan.q_seg, plan.k_seg)
    if not moves or any(x is not None for x in told):
        return None
    assert plan.span_start is not None and plan.span_count is not None and plan.span_full is not None
    assert plan.spans is not None
    B, device = len(first), first.device
    start, count, full = (
        x.expand(B, -1, -1).contiguous() for x in (plan.span_start, plan.span_count, plan.span_full)
    )
    n = int(count.max()) if count.numel() else 0
    at = (start[..., None] + torch.arange(n, device=device)).clamp(max=max(len(plan.spans) - 1, 0))
    shift = first.int().view(B, 1, 1, 1, 1)
    spans = (plan.spans[at] + shift).clamp(max=plan.Tk) if n else plan.spans[:0]
    key = torch.arange(plan.Tk, dtype=torch.int32, device=device) - first.int()[:, None]
    return plan._changed(
        span_start=(torch.arange(start.numel(), device=device) * n).view(start.shape),
        span_count=count,
        span_full=full,
        spans=spans.reshape(-1, 2).contiguous(),
        q_offset=0,
        q_pos=begin.int().view(B, 1, 1),
        k_pos=key[:, None].contiguous(),
    )


def gather(x: Tensor, rows: Tensor | None, at: Tensor) -> Tensor:
    """Gather tokens `at [n,T']` of sequences `rows [n]` (None: all) of `x [B,H,T,D]`: `[n,H,T',D]`."""
    x = x if rows is None else x[rows]
    return take_rows(x, at[:, None])


def scatter(parts: list[tuple[Group, Tensor]], like: Any) -> Tensor:
    """Scatter the groups' results `[n,H,S',D]` to `[B,H,S,D]`; padding is 0."""
    (B, S), out = like, None
    for group, x in parts:
        place = (group.rows[:, None] * S + group.queries).flatten()
        rows = x.transpose(1, 2).flatten(0, 1)
        out = rows.new_zeros(B * S, *rows.shape[1:]) if out is None else out
        out = out.index_copy(0, place, rows)
    assert out is not None
    return out.unflatten(0, (B, S)).transpose(1, 2)

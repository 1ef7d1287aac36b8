"""Local plans of one rank: its queries over the keys of each rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..plan import Plan
from ..plan.entries import query_tokens, ranges
from ..plan.options import spread_heads
from ..plan.record import FLAT
from ..plan.stamps import Last
from .layouts import Layout, readers

M = TypeVar("M")
WORTH = 0.9
"""Calls are narrowed to some of a rank's queries if these are at most this share."""


class Pairs:
    """Plans restricted to one rank's queries and each rank's keys, built on first use."""

    def __init__(self, plans: Sequence[Plan], rank: int, layout: Layout, key_layout: Layout) -> None:
        self.plans, self.rank, self.layout, self.key_layout = tuple(plans), rank, layout, key_layout
        own = layout.ranks[rank]
        self.mine = [plan.restrict(own) for plan in self.plans]
        self._made: dict[tuple[int, bool], tuple[tuple[Plan, ...], slice]] = {}
        self._reads: Tensor | None = None

    def of(self, origin: int, *, read: bool = False) -> tuple[Plan, ...]:
        """Non-empty plans of `rows` over the keys of a rank (`read`: only over those keys that are read)."""
        return self._of(origin, read)[0]

    def rows(self, origin: int, *, read: bool = False) -> slice:
        """Range of this rank's queries that `of` is about; those before and behind it see no key."""
        return self._of(origin, read)[1]

    def _of(self, origin: int, read: bool) -> tuple[tuple[Plan, ...], slice]:
        if (origin, read) not in self._made:
            keys = self.key_layout.ranks[origin]
            keys = keys[self.needs(self.rank, origin)] if read else keys
            made = [plan.restrict(None, keys) for plan in self.mine] if len(keys) else []
            some = [plan for plan in made if any(x is not None and len(x) for x in (plan.spans, plan.index))]
            self._made[origin, read] = _narrowed(some, len(self.layout.ranks[self.rank]))
        return self._made[origin, read]

    @property
    def reads(self) -> Tensor:
        """Keys that each rank reads, bool [world, Tk]."""
        if self._reads is None:
            self._reads = readers(self.plans, self.layout, self.key_layout)
        return self._reads

    def needs(self, reader: int, origin: int) -> Tensor:
        """Indices, in the shard of `origin`, of the keys that `reader` reads."""
        return self.reads[reader, self.key_layout.ranks[origin]].nonzero()[:, 0]

    def foreign(self) -> Tensor:
        """How many keys of others each rank reads, int64 [world]."""
        own = torch.arange(self.layout.world)[:, None] == self.key_layout.owner
        return (self.reads & ~own).sum(1)

    def few(self) -> bool:
        """Whether no rank reads more keys of others than the largest shard has."""
        return int(self.foreign().max()) <= max(self.key_layout.sizes)

    def sparse(self) -> bool:
        """Whether to send only the keys that are read: few a rank, or half of what a ring moves at most."""
        return self.few() or 2 * int(self.foreign().sum()) <= (self.layout.world - 1) * self.key_layout.T


def _narrowed(plans: Sequence[Plan], n: int) -> tuple[tuple[Plan, ...], slice]:
    """Restrict plans to the queries from the first to the last that lists anything, of n; and these."""
    begin, end = n, 0
    for plan in plans:
        token = query_tokens(plan).flatten(0, 2)[ranges(plan).cell.unique()]
        token = token[token >= 0]
        if len(token):
            begin, end = min(begin, int(token.min())), max(end, int(token.max()) + 1)
    if not begin < end:
        return (), slice(0, 0)
    if end - begin > WORTH * n:
        return tuple(plans), slice(0, n)
    some = torch.arange(begin, end, device=plans[0].device)
    return tuple(plan.restrict(some, None) for plan in plans), slice(begin, end)


def of_heads(plan: Plan, first: int, last: int, heads: int) -> Plan:
    """Restrict a plan to query heads first, ..., last - 1 of `heads`."""
    own = {
        name: spread_heads(x, heads)[:, first:last]
        for name, x in plan.tensors().items()
        if name not in FLAT and x.shape[1] > 1
    }
    return plan._changed(**own)


class Memory(Generic[M]):
    """Cache of objects made from plans, for layers and steps that share a plan."""

    def __init__(self, most: int = 32) -> None:
        self._known: deque[Last[M]] = deque(maxlen=most)

    def of(self, plans: Sequence[Plan], make: Callable[[], M]) -> M:
        """The cached object for these plans, or else a new one."""
        kept = [*plans, *(x for plan in plans for x in plan.tensors().values())]
        for last in self._known:
            found = last.get(*kept)
            if found:
                return found[0]
        last = Last[M]()
        self._known.append(last)
        return last.keep(make(), *kept)

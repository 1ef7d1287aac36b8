"""Which tokens each rank holds, and which placement balances the work."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops._arguments import AnyPlan, as_plans
from ..plan import Plan
from ..plan.entries import ranges
from ..plan.options import is_count, laid_out

NAMES = ("contiguous", "zigzag", "striped")
BLOCK = 128
"""Size of blocks of tokens that are placed together."""
FAIR = 1.05
"""Largest load of a rank over the mean that counts as balanced; among balanced layouts, traffic decides."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of each rank, in the order in which the rank holds them.

    Parameters
    ----------
    name : str
        Name for messages.
    ranks : tuple of Tensor
        Distinct tokens of each rank, int64 `[n]`; every token of 0..T-1 is on exactly one rank. A rank may be
        empty.

    Examples
    --------
    >>> import sparseflash as sf
    >>> [x.tolist() for x in sf.distributed.Layout.of("zigzag", 8, 2, block=2).ranks]
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    """

    name: str
    ranks: tuple[Tensor, ...]
    T: int = field(init=False)

    def __post_init__(self) -> None:
        order = torch.cat(self.ranks).long() if self.ranks else torch.zeros(0, dtype=torch.int64)
        require(
            (len(self.ranks) > 0, "a layout of no ranks: expected the tokens of one rank at least"),
            (
                torch.equal(order.sort().values, torch.arange(len(order))),
                f"layout {self.name}: its ranks hold {len(order)} tokens that are not 0..{len(order) - 1}, "
                "each once",
            ),
        )
        object.__setattr__(self, "T", len(order))

    @classmethod
    def of(cls, name: str, T: int, world: int, *, block: int = BLOCK) -> Layout:
        """Make a layout by name, from blocks of tokens that are placed together (smaller if T is short).

        Parameters
        ----------
        name : str
            "contiguous": one run of tokens per rank. "zigzag": two runs, one from the front and its mirror
            image from the end (balanced for causal attention). "striped": blocks dealt round-robin. "chunks":
            runs as `torch.chunk` cuts them, as in a DTensor with Shard(2).
        """
        require(
            (
                is_count(T) and is_count(world, 1),
                f"T={T!r}, world={world!r}: expected an int >= 0 and one >= 1",
            ),
            (is_count(block, 1), f"block={block!r}: expected a number of tokens >= 1"),
        )
        token = torch.arange(T)
        if name == "chunks":
            owner = token // max(-(-T // world), 1)
        elif name in NAMES:
            parts = 2 * world if name == "zigzag" else world
            block = max(1, min(block, T // parts))
            blocks = -(-T // block)
            if name == "striped":
                owner = token // block % world
            else:
                edges = torch.arange(1, parts) * blocks // parts * block
                owner = torch.searchsorted(edges, token, right=True)
                owner = torch.minimum(owner, parts - 1 - owner) if name == "zigzag" else owner
        else:
            raise SparseFlashError(
                f"layout={name!r}: expected one of {', '.join((*NAMES, 'chunks', 'auto'))}, or a Layout"
            )
        return cls.from_owner(name, owner, world)

    @classmethod
    def from_owner(cls, name: str, owner: Tensor, world: int) -> Layout:
        """Make the layout in which token i is on rank `owner[i]`."""
        return cls(name, tuple((owner == rank).nonzero()[:, 0] for rank in range(world)))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def sizes(self) -> list[int]:
        """Number of tokens on each rank."""
        return [len(x) for x in self.ranks]

    @cached_property
    def owner(self) -> Tensor:
        """The rank of each token, int64 [T]."""
        found = torch.empty(self.T, dtype=torch.int64)
        for rank, tokens in enumerate(self.ranks):
            found[tokens] = rank
        return found

    @cached_property
    def place(self) -> Tensor:
        """Index of each token in the concatenation of all ranks' shards; int64 [T]."""
        return torch.cat(self.ranks).argsort()

    def __repr__(self) -> str:
        return f"Layout({self.name!r}, T={self.T}, world={self.world})"


def areas(plan: AnyPlan, layout: Layout, key_layout: Layout | None = None) -> Tensor:
    """Count visited pairs by query rank and key rank, fp64 [world, world], summed over all lists."""
    keys = key_layout or layout
    found = torch.zeros(layout.world, keys.world, dtype=torch.float64)
    for one in as_plans(plan):
        batch, heads = one.extent()
        entries, rows = ranges(one), tile_rows(one, layout)
        tiles = batch * heads * one.tiles
        order = None if one.k_order is None else laid_out(one.k_order, batch, heads).flatten(0, 1).long()
        list_ = entries.cell // max(one.tiles, 1)
        for rank in range(keys.world):
            mine = torch.nn.functional.pad(keys.owner == rank, (0, 1)).long()  # for token -1 in k_order
            held = mine[: one.Tk] if order is None else mine[order]
            before = torch.nn.functional.pad(held.cumsum(-1), (1, 0))
            if order is None:
                n = before[entries.hi] - before[entries.lo]
            else:
                n = before[list_, entries.hi] - before[list_, entries.lo]
            length = torch.zeros(tiles, dtype=torch.float64).index_add_(0, entries.cell, n.double())
            found[:, rank] += rows.double().T @ length
    return found


def tile_rows(plan: Plan, layout: Layout) -> Tensor:
    """Count the queries of each tile that are on each rank, int64 [lists * tiles, world]."""
    batch, heads = plan.extent()
    owner = torch.cat([layout.owner, torch.tensor([layout.world])])
    own = owner[: plan.Tq].expand(1, 1, -1) if plan.q_order is None else owner[plan.q_order.long()]
    own = torch.nn.functional.pad(own, (0, plan.tiles * plan.tile - plan.q_rows), value=layout.world)
    own = laid_out(own, batch, heads).reshape(-1, plan.tile) if plan.tiles else own.reshape(0, plan.tile)
    found = torch.zeros(len(own), layout.world + 1, dtype=torch.int64)
    found.scatter_add_(1, own, torch.ones_like(own))
    return found[:, : layout.world]


def readers(plan: AnyPlan, layout: Layout, key_layout: Layout | None = None) -> Tensor:
    """Keys that each rank reads, bool [world, Tk]: all that a tile lists with any of the rank's queries.

    Without those behind the rank's last query, where rules hide them: a tile may list them for other ranks.
    """
    keys = key_layout or layout
    found = torch.zeros(layout.world, keys.T, dtype=torch.bool)
    for one in as_plans(plan):
        batch, heads = one.extent()
        entries, rows = ranges(one), tile_rows(one, layout) > 0
        list_ = entries.cell // max(one.tiles, 1)
        order = None if one.k_order is None else laid_out(one.k_order, batch, heads).flatten(0, 1).long()
        lists = 1 if order is None else batch * heads
        at = torch.zeros_like(list_) if order is None else list_
        wide = one.k_rows + 1
        for rank in range(layout.world):
            before = found[rank].clone()
            some = rows[entries.cell, rank]
            edge = torch.zeros(lists * wide, dtype=torch.int64)
            one_ = torch.ones_like(at[some])
            edge.index_add_(0, at[some] * wide + entries.lo[some], one_)
            edge.index_add_(0, at[some] * wide + entries.hi[some], -one_)
            read = edge.view(lists, wide).cumsum(-1)[:, :-1] > 0
            if order is None:
                found[rank] |= read[0]
            else:
                token = order[read]
                found[rank, token[token >= 0]] = True
            if one.causal and one.q_pos is None and one.k_pos is None and len(layout.ranks[rank]):
                offset = one.q_offset if isinstance(one.q_offset, int) else int(one.q_offset.max())
                last = int(layout.ranks[rank].max()) + offset
                found[rank, max(0, last + 1) :] = before[max(0, last + 1) :]
    return found


def balance(plan: AnyPlan, world: int, *, block: int = BLOCK) -> Layout:
    """Choose the layout that balances the work over ranks, by the plan's own lists.

    Candidates are "contiguous", "zigzag", "striped" and blocks dealt by cost (most expensive first, to the
    least loaded rank). Of those balanced to 5 %, the one with the fewest keys to send wins; if there is none,
    the best balanced. No fixed layout is best for all plans.

    Parameters
    ----------
    plan : Plan or tuple of Plan
        Plan over all tokens.
    world : int
        Number of ranks.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sf.distributed.balance(sf.Plan.dense(4096, 4096, causal=True), 4)
    Layout('zigzag', T=4096, world=4)
    >>> sf.distributed.balance(sf.Plan.dense(65536, 65536, causal=True, window=(1023, 0)), 4)
    Layout('contiguous', T=65536, world=4)
    """
    first = as_plans(plan)[0]
    choices = [Layout.of(name, first.Tq, world, block=block) for name in NAMES]
    choices.append(_dealt(plan, first.Tq, world, max(1, min(block, first.Tq // world))))
    best: tuple[float, ...] | None = None
    chosen = choices[0]
    for n, layout in enumerate(choices):
        keys = layout if first.Tk == first.Tq else Layout.of("contiguous", first.Tk, world, block=block)
        area = areas(plan, layout, keys)
        share = float(area.sum(1).max() / area.sum(1).mean()) if float(area.sum()) else 1.0
        sent = float(readers(plan, layout, keys).sum()) if share <= FAIR else 0.0
        score = (max(share, FAIR), sent, float(n))
        if best is None or score < best:
            best, chosen = score, layout
    return chosen


def costs(plan: AnyPlan, T: int) -> Tensor:
    """Count the keys that the lists visit for each query, summed over heads and batch; fp64 [T]."""
    found = torch.zeros(T + 1, dtype=torch.float64)
    for one in as_plans(plan):
        batch, heads = one.extent()
        entries = ranges(one)
        length = torch.zeros(batch * heads * one.tiles, dtype=torch.float64)
        length.index_add_(0, entries.cell, (entries.hi - entries.lo).double())
        row = length.view(batch, heads, -1).repeat_interleave(one.tile, -1)[..., : one.q_rows]
        if one.q_order is None:
            found[: one.Tq] += row.sum((0, 1))
        else:
            token = laid_out(one.q_order, batch, heads).long()
            found.index_add_(0, torch.where(token >= 0, token, T).flatten(), row.flatten())
    return found[:T]


def _dealt(plan: AnyPlan, T: int, world: int, block: int) -> Layout:
    """Deal blocks by cost, most expensive first, to the least loaded rank that is not full."""
    n = -(-T // block)
    cost = torch.zeros(n, dtype=torch.float64).index_add_(0, torch.arange(T) // block, costs(plan, T))
    room, owner = -(-n // world), torch.zeros(n, dtype=torch.int64)
    heap, held = [(0.0, rank) for rank in range(world)], [0] * world
    for at in cost.argsort(descending=True, stable=True).tolist():
        total, rank = heapq.heappop(heap)
        owner[at] = rank
        held[rank] += 1
        if held[rank] < room:
            heapq.heappush(heap, (total + float(cost[at]), rank))
    return Layout.from_owner("dealt", owner[torch.arange(T) // block], world)

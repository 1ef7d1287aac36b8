"""Transports: bring keys and values to the queries of other ranks, and gradients back.

A transport calls `compute(origin, keys)` for the keys of every rank; messages are in flight while it
computes. In a backward `compute` returns the gradient of these keys (None: none). The transport sums
gradients on their way to the owner. `run` returns those of the rank's own keys and, after a forward, keys of
others that are worth holding: given to the backward, they are not sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..plan import Plan
from .layouts import Layout
from .pairs import Pairs
from .peers import Peers, Transfer
from .segments import Room

Keys = tuple[Tensor, ...]
"""Keys, values and, if given, the bias; axis 2 is that of the tokens."""
Compute = Callable[[int, Keys], Keys | None]
Held = dict[int, Keys] | None
"""Received keys by the rank that sent them."""
Some = slice | Tensor
"""Numbers of some tokens of a shard; a slice if they are consecutive."""


def _room(keys: Keys, n: int, dtype: torch.dtype | None = None) -> list[Room]:
    """Room for tensors like these, of n tokens."""
    return [Room((*x.shape[:2], n, *x.shape[3:]), dtype or x.dtype, x.device) for x in keys]


def _zeros(keys: Keys, n: int, dtype: torch.dtype) -> Keys:
    return tuple(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in _room(keys, n))


def _arrived(coming: Transfer | None) -> Keys | None:
    """What was being received, once it is complete; None if nothing was."""
    return None if coming is None else tuple(coming.wait())


def _added(one: Keys | None, other: Keys | None) -> Keys | None:
    """Sum of gradients, in the memory of the first: that of the second may be another rank's."""
    if one is None or other is None:
        return other if one is None else one
    return tuple(x.add_(y) for x, y in zip(one, other))


class Ring:
    """Ring: each rank passes the shard it holds to the next, attends to it, and receives the previous one's.

    With two groups, rings nest (MTraining, arXiv 2510.18830): all shards of a node rotate inside it, while
    those of the previous node arrive from outside; so slow links are crossed once per node, not once per
    rank. With two nodes of two ranks, rank 1 gets the shards of ranks 1, 0, 3, 2 in this order.

    Parameters
    ----------
    inner : Peers
        The ring, or with `outer` the ring inside a node.
    outer : Peers, optional
        Ranks with the same inner rank in all nodes; rank = outer rank * inner world + inner rank.
    """

    def __init__(self, inner: Peers, outer: Peers | None, layout: Layout, pairs: Pairs) -> None:
        self.inner, self.outer, self.layout, self.pairs = inner, outer, layout, pairs

    def plans(self, origin: int) -> Sequence[Plan]:
        """Plans over the keys of a rank."""
        return self.pairs.of(origin)

    def rows(self, origin: int) -> slice:
        """Range of this rank's queries that these plans are about."""
        return self.pairs.rows(origin)

    def tokens(self, origin: int) -> Tensor:
        """Global token numbers of these keys."""
        return self.layout.ranks[origin]

    def _places(self) -> tuple[int, int, int, int]:
        node, nodes = (0, 1) if self.outer is None else (self.outer.rank, self.outer.world)
        return self.inner.rank, self.inner.world, node, nodes

    def _pass(self, peers: Peers, sent: Keys, taken: Sequence[Room]) -> Transfer:
        """Send to the next rank, and begin to receive from the previous one."""
        before, behind = (peers.rank - 1) % peers.world, (peers.rank + 1) % peers.world
        return peers.start([(behind, x) for x in sent], [(before, room) for room in taken])

    def run(
        self, keys: Keys, compute: Compute, wide: torch.dtype | None = None, held: Held = None
    ) -> tuple[Keys | None, Held]:
        """Visit the keys of all ranks in turn; with `wide`, gradients of that dtype rotate behind them.

        The gradient that a rank gives its own keys (in a node: those of its place) stays, and the others' is
        added when it arrives.
        """
        i, size, node, nodes = self._places()
        sizes = self.layout.sizes
        mine = keys
        home: Transfer | None = None  # gradients from the previous node
        total: Keys | None = None
        for s in range(nodes):
            of, before = (node - s) % nodes * size, (node - s - 1) % nodes * size
            coming, back, own, message = None, None, None, mine
            if s + 1 < nodes and self.outer is not None:
                coming = self._pass(self.outer, mine, _room(keys, sizes[before + i]))
            for t in range(size):
                origin, behind, here = of + (i - t) % size, of + (i - t - 1) % size, None
                if t + 1 < size:
                    here = self._pass(self.inner, message, _room(keys, sizes[behind]))
                given = compute(origin, message)
                if wide is not None and t == 0:
                    own = given or _zeros(keys, sizes[origin], wide)
                elif wide is not None:
                    total = _added(given, _arrived(back)) or _zeros(keys, sizes[origin], wide)
                    back = self._pass(self.inner, total, _room(keys, sizes[behind], wide))
                message = _arrived(here) or message
            if wide is not None:
                total = _added(_added(own, _arrived(back)), _arrived(home))
                if nodes > 1 and self.outer is not None and total is not None:
                    home = self._pass(self.outer, total, _room(keys, sizes[before + i], wide))
            mine = _arrived(coming) or mine
        return _arrived(home) or total, None


class GroupCast:
    """Group-cast: every rank gets only the keys that its plan reads, at once, while it attends to its own.

    If these are at most a shard a rank, they are held until the backward, which then attends to them first:
    their gradients are on the way while the rank attends to its own keys.
    """

    def __init__(self, peers: Peers, layout: Layout, pairs: Pairs) -> None:
        self.peers, self.layout, self.pairs = peers, layout, pairs
        rank, world = peers.rank, peers.world
        self.others = [(rank - n) % world for n in range(1, world)]
        asked = {other: pairs.needs(other, rank).to(pairs.plans[0].device) for other in self.others}
        self.asked = {other: _as_slice(which) for other, which in asked.items() if len(which)}
        self.read = {other: len(pairs.needs(rank, other)) for other in self.others}
        self.given = {other: len(which) for other, which in asked.items() if len(which)}
        self.holds = pairs.few()

    def plans(self, origin: int) -> Sequence[Plan]:
        """Plans over the received keys of a rank."""
        return self.pairs.of(origin, read=origin != self.peers.rank)

    def rows(self, origin: int) -> slice:
        """Range of this rank's queries that these plans are about."""
        return self.pairs.rows(origin, read=origin != self.peers.rank)

    def tokens(self, origin: int) -> Tensor:
        """Global token numbers of these keys."""
        own = self.layout.ranks[origin]
        return own if origin == self.peers.rank else own[self.pairs.needs(self.peers.rank, origin)]

    def run(
        self, keys: Keys, compute: Compute, wide: torch.dtype | None = None, held: Held = None
    ) -> tuple[Keys | None, Held]:
        """Visit the rank's own keys and those read of each other rank; gradients go directly back."""
        if held is not None and wide is not None:
            coming = self._return({other: compute(other, own) for other, own in held.items()}, keys, wide)
            total = compute(self.peers.rank, keys)
        else:
            rooms = [(other, room) for other, n in self.read.items() if n for room in _room(keys, n)]
            sent = [(other, _taken(x, which)) for other, which in self.asked.items() for x in keys]
            arriving = self.peers.start(sent, rooms)
            total = compute(self.peers.rank, keys)
            taken = _grouped(rooms, arriving)
            found = {other: compute(other, own) for other, own in taken.items()}
            if wide is None:
                return None, taken if self.holds else None
            coming = self._return(found, keys, wide)
        total = total or _zeros(keys, keys[0].shape[2], wide)
        for other, parts in _grouped(*coming).items():  # in fixed order, so that sums are reproducible
            for x, part in zip(total, parts):
                _add(x, self.asked[other], part)
        return total, None

    def _return(
        self, found: dict[int, Keys | None], keys: Keys, wide: torch.dtype
    ) -> tuple[list[tuple[int, Room]], Transfer]:
        """Begin to send the gradients of received keys, and to receive those of own ones."""
        back = [
            (other, x)
            for other, given in found.items()
            for x in given or _zeros(keys, self.read[other], wide)
        ]
        rooms = [(other, room) for other, n in self.given.items() for room in _room(keys, n, wide)]
        return rooms, self.peers.start(back, rooms)


def _grouped(rooms: Sequence[tuple[int, Room]], coming: Transfer) -> dict[int, Keys]:
    """What arrives, by the rank that sends it."""
    found: dict[int, Keys] = {}
    for (other, _), x in zip(rooms, coming.wait()):
        found[other] = (*found.get(other, ()), x)
    return found


def _as_slice(which: Tensor) -> Some:
    """A slice for consecutive numbers."""
    first, n = int(which[0]), len(which)
    return slice(first, first + n) if int(which[-1]) == first + n - 1 else which


def _taken(x: Tensor, which: Some) -> Tensor:
    return x[:, :, which] if isinstance(which, slice) else x.index_select(2, which)


def _add(x: Tensor, which: Some, part: Tensor) -> None:
    if isinstance(which, slice):
        x[:, :, which].add_(part)
    else:
        x.index_add_(2, which, part)


def swapped(peers: Peers, layout: Layout, x: Tensor, *, to_heads: bool) -> Tensor:
    """Exchange all heads of a rank's tokens for all tokens of a share of the heads, or back.

    `[B, H, T of this rank, D]` to `[B, H / world, T, D]` in the order of tokens.
    """
    world, rank = peers.world, peers.rank
    B, H, D = x.shape[0], x.shape[1], x.shape[3]
    sizes, place = layout.sizes, layout.place.to(x.device)
    if to_heads:
        parts: Sequence[Tensor] = x.chunk(world, 1)
        shapes = [(B, H // world, n, D) for n in sizes]
    else:
        shards = torch.empty_like(x).index_copy_(2, place, x)
        parts = shards.split(sizes, 2)
        shapes = [(B, H, sizes[rank], D)] * world
    rooms = [(other, Room(shape, x.dtype, x.device)) for other, shape in enumerate(shapes) if other != rank]
    taken = peers.start([(other, parts[other]) for other, _ in rooms], rooms).wait()
    taken.insert(rank, parts[rank])
    return torch.cat(taken, 2).index_select(2, place) if to_heads else torch.cat(taken, 1)

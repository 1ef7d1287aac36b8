"""Transports: bring keys and values to the queries of other ranks, and gradients back.

A transport calls `compute(origin, keys)` for the keys of every rank; messages are in flight while it
computes. In a backward `compute` returns the gradient of these keys (None: none). The transport sums
gradients on their way to the owner, and returns those of the rank's own keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Plan
from .layouts import Layout
from .pairs import Pairs
from .peers import Peers, Transfer

Keys = tuple[Tensor, ...]
"""Keys, values and, if given, the bias; axis 2 is that of the tokens."""
Compute = Callable[[int, Keys], Keys | None]


@dataclass(frozen=True)
class Packing:
    """Format of several tensors as one message: shapes with -1 for tokens, and dtypes, widest first."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(cls, keys: Keys, dtype: torch.dtype | None = None) -> Packing:
        """Format of tensors like these, or of their gradients in one dtype."""
        return cls(
            tuple((*x.shape[:2], -1, *x.shape[3:]) for x in keys),
            tuple(dtype or x.dtype for x in keys),
            keys[0].device,
        )

    def bytes(self, n: int) -> int:
        """Size of a message for n tokens."""
        return sum(self._sizes(n))

    def _sizes(self, n: int) -> list[int]:
        return [
            math.prod(x if x >= 0 else n for x in shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes, self.dtypes)
        ]

    def _order(self) -> list[int]:
        return sorted(range(len(self.dtypes)), key=lambda i: -self.dtypes[i].itemsize)

    def empty(self, n: int) -> Tensor:
        """Allocate a message for n tokens."""
        return torch.empty(self.bytes(n), dtype=torch.uint8, device=self.device)

    def pack(self, keys: Keys) -> Tensor:
        """Concatenate the tensors' bytes to a message."""
        parts = [keys[i].to(self.dtypes[i]).contiguous().view(-1).view(torch.uint8) for i in self._order()]
        return torch.cat(parts)

    def unpack(self, message: Tensor, n: int) -> Keys:
        """View a message as its tensors."""
        found: dict[int, Tensor] = {}
        sizes, at = self._sizes(n), 0
        for i in self._order():
            part = message[at : at + sizes[i]].view(self.dtypes[i])
            found[i] = part.view([x if x >= 0 else n for x in self.shapes[i]])
            at += sizes[i]
        return tuple(found[i] for i in range(len(self.shapes)))


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

    def tokens(self, origin: int) -> Tensor:
        """Global token numbers of these keys."""
        return self.layout.ranks[origin]

    def _places(self) -> tuple[int, int, int, int]:
        node, nodes = (0, 1) if self.outer is None else (self.outer.rank, self.outer.world)
        return self.inner.rank, self.inner.world, node, nodes

    def _pass(self, peers: Peers, packing: Packing, message: Tensor, origin: int) -> tuple[Tensor, Transfer]:
        """Send a message to the next rank, and start receiving that about `origin` from the previous one."""
        taken = packing.empty(self.layout.sizes[origin])
        before, behind = (peers.rank - 1) % peers.world, (peers.rank + 1) % peers.world
        return taken, peers.start([(behind, message)], [(before, taken)])

    def run(self, keys: Keys, compute: Compute, wide: torch.dtype | None = None) -> Keys | None:
        """Visit the keys of all ranks in turn; with `wide`, gradients of that dtype rotate behind them."""
        i, size, node, nodes = self._places()
        sizes, packing = self.layout.sizes, Packing.of(keys)
        sums = None if wide is None else Packing.of(keys, wide)
        held = packing.pack(keys)
        home: Coming = None  # gradients from the previous node
        total = held[:0]
        for s in range(nodes):
            of, coming, back, message = (node - s) % nodes * size, None, None, held
            if s + 1 < nodes and self.outer is not None:
                coming = self._pass(self.outer, packing, held, (node - s - 1) % nodes * size + i)
            for t in range(size):
                origin, behind, here = of + (i - t) % size, of + (i - t - 1) % size, None
                if t + 1 < size:
                    here = self._pass(self.inner, packing, message, behind)
                given = compute(origin, packing.unpack(message, sizes[origin]))
                if sums is not None:
                    total = _summed(sums, sizes[origin], given, back)
                    back = self._pass(self.inner, sums, total, behind) if size > 1 else None
                message = _arrived(here, message)
            total = _arrived(back, total)
            if wide is not None and home is not None:
                total = _added(_arrived(home, total), total, wide)
            if sums is not None and nodes > 1 and self.outer is not None:
                home = self._pass(self.outer, sums, total, (node - s - 1) % nodes * size + i)
            held = _arrived(coming, held)
        total = _arrived(home, total)
        return None if sums is None else sums.unpack(total, sizes[node * size + i])


Coming = tuple[Tensor, Transfer] | None
"""A message being received, and the transfer to wait for."""


def _arrived(coming: Coming, before: Tensor) -> Tensor:
    """The message received, once it is complete; `before` if none is on its way."""
    if coming is None:
        return before
    coming[1].wait()
    return coming[0]


def _added(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """The sum of two messages, in place of the second."""
    b.view(wide).add_(a.view(wide))
    return b


def _summed(sums: Packing, n: int, given: Keys | None, before: Coming) -> Tensor:
    """Sum of the gradients received (`before`) and given by this rank, as a message."""
    own = None if given is None else sums.pack(given)
    if before is None:
        return torch.zeros_like(sums.empty(n)) if own is None else own
    came = _arrived(before, before[0])
    return came if own is None else _added(came, own, sums.dtypes[0])


class GroupCast:
    """Group-cast: every rank gets only the keys that its plan reads, at once, while it attends to its own."""

    def __init__(self, peers: Peers, layout: Layout, pairs: Pairs) -> None:
        self.peers, self.layout, self.pairs = peers, layout, pairs
        rank, world = peers.rank, peers.world
        self.others = [(rank - n) % world for n in range(1, world)]
        self.asked = {other: pairs.needs(other, rank).to(pairs.plans[0].device) for other in self.others}
        self.read = {other: len(pairs.needs(rank, other)) for other in self.others}

    def plans(self, origin: int) -> Sequence[Plan]:
        """Plans over the received keys of a rank."""
        return self.pairs.of(origin, read=origin != self.peers.rank)

    def tokens(self, origin: int) -> Tensor:
        """Global token numbers of these keys."""
        own = self.layout.ranks[origin]
        return own if origin == self.peers.rank else own[self.pairs.needs(self.peers.rank, origin)]

    def _cast(self, packing: Packing, keys: Keys) -> tuple[dict[int, Tensor], Transfer]:
        """Start sending the keys that others read, and receiving those read here."""
        taken = {other: packing.empty(n) for other, n in self.read.items() if n}
        sent = [
            (other, packing.pack(tuple(x.index_select(2, which) for x in keys)))
            for other, which in self.asked.items()
            if len(which)
        ]
        return taken, self.peers.start(sent, list(taken.items()))

    def run(self, keys: Keys, compute: Compute, wide: torch.dtype | None = None) -> Keys | None:
        """Visit the rank's own keys, then those read of each other rank; gradients go directly back."""
        packing = Packing.of(keys)
        taken, coming = self._cast(packing, keys)
        own = compute(self.peers.rank, keys)
        coming.wait()
        found = {
            other: compute(other, packing.unpack(message, self.read[other]))
            for other, message in taken.items()
        }
        if wide is None:
            return None
        sums = Packing.of(keys, wide)
        total = tuple(
            torch.zeros_like(x, dtype=wide) if own is None else own[n].to(wide) for n, x in enumerate(keys)
        )
        back = [
            (other, torch.zeros_like(sums.empty(self.read[other])) if given is None else sums.pack(given))
            for other, given in found.items()
        ]
        room = {other: sums.empty(len(which)) for other, which in self.asked.items() if len(which)}
        self.peers.start(back, list(room.items())).wait()
        for other, message in room.items():  # in fixed order, so that sums are reproducible
            which = self.asked[other]
            for x, part in zip(total, sums.unpack(message, len(which))):
                x.index_add_(2, which, part)
        return total


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
    taken = [x.new_empty(shape) for shape in shapes]
    sent = [part.contiguous() for part in parts]
    others = [other for other in range(world) if other != rank]
    taken[rank] = sent[rank]
    peers.start([(r, sent[r]) for r in others], [(r, taken[r]) for r in others]).wait()
    return torch.cat(taken, 2).index_select(2, place) if to_heads else torch.cat(taken, 1)

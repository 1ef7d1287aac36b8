"""Transports: bring keys and values to the queries of other ranks, and gradients back.

A transport has two generators. `forward` yields (origin, keys of that rank) for every rank. `backward` yields
the same, is sent the gradient for each, and returns the gradient of the rank's own keys. Messages are in
flight while the consumer computes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layouts import Layout
from .pairs import Pairs
from .peers import Peers, Transfer

Keys = tuple[Tensor, ...]
"""Keys, values and, if given, the bias; axis 2 is that of the tokens."""
Walk = Generator[tuple[int, Keys], Keys | None, Keys]


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

    def plans(self, origin: int) -> Any:
        """Plans over the keys of a rank."""
        return self.pairs.of(origin)

    def _places(self) -> tuple[int, int, int, int]:
        node, nodes = (0, 1) if self.outer is None else (self.outer.rank, self.outer.world)
        return self.inner.rank, self.inner.world, node, nodes

    def _pass(self, peers: Peers, packing: Packing, message: Tensor, origin: int) -> tuple[Tensor, Transfer]:
        """Send a message to the next rank, and start receiving that about `origin` from the previous one."""
        taken = packing.empty(self.layout.sizes[origin])
        before, behind = (peers.rank - 1) % peers.world, (peers.rank + 1) % peers.world
        return taken, peers.start([(behind, message)], [(before, taken)])

    def forward(self, keys: Keys) -> Iterator[tuple[int, Keys]]:
        """Yield the keys of all ranks in turn."""
        i, size, node, nodes = self._places()
        packing = Packing.of(keys)
        held = packing.pack(keys)
        for s in range(nodes):
            of = (node - s) % nodes * size
            coming = None
            if s + 1 < nodes and self.outer is not None:
                coming = self._pass(self.outer, packing, held, (node - s - 1) % nodes * size + i)
            message = held
            for t in range(size):
                origin, here = of + (i - t) % size, None
                if t + 1 < size:
                    here = self._pass(self.inner, packing, message, of + (i - t - 1) % size)
                yield origin, packing.unpack(message, self.layout.sizes[origin])
                if here is not None:
                    message, transfer = here
                    transfer.wait()
            if coming is not None:
                held, transfer = coming
                transfer.wait()

    def backward(self, keys: Keys, wide: torch.dtype) -> Walk:
        """Yield all ranks' keys again; their gradients rotate behind them until they reach their owner."""
        i, size, node, nodes = self._places()
        packing, sums = Packing.of(keys), Packing.of(keys, wide)
        held = packing.pack(keys)
        home: tuple[Tensor, Transfer] | None = None  # gradients from the previous node
        for s in range(nodes):
            of = (node - s) % nodes * size
            coming = None
            if s + 1 < nodes and self.outer is not None:
                coming = self._pass(self.outer, packing, held, (node - s - 1) % nodes * size + i)
            message = held
            back: tuple[Tensor, Transfer] | None = None
            for t in range(size):
                origin, here = of + (i - t) % size, None
                if t + 1 < size:
                    here = self._pass(self.inner, packing, message, of + (i - t - 1) % size)
                given = yield origin, packing.unpack(message, self.layout.sizes[origin])
                total = _summed(sums, self.layout.sizes[origin], given, back)
                if size > 1:
                    back = self._pass(self.inner, sums, total, of + (i - t - 1) % size)
                if here is not None:
                    message, transfer = here
                    transfer.wait()
            if back is not None:
                total, transfer = back
                transfer.wait()
            if home is not None:
                before, transfer = home
                transfer.wait()
                total = (before.view(wide) + total.view(wide)).view(torch.uint8)
            if nodes > 1 and self.outer is not None:
                home = self._pass(self.outer, sums, total, (node - s - 1) % nodes * size + i)
            if coming is not None:
                held, transfer = coming
                transfer.wait()
        if home is not None:
            total, transfer = home
            transfer.wait()
        return sums.unpack(total, self.layout.sizes[node * size + i])


def _summed(sums: Packing, n: int, given: Keys | None, before: tuple[Tensor, Transfer] | None) -> Tensor:
    """Sum of the gradients received (`before`) and given by this rank, as a message."""
    wide = sums.dtypes[0]
    own = None if given is None else sums.pack(given)
    if before is None:
        return torch.zeros_like(sums.empty(n)) if own is None else own
    message, transfer = before
    transfer.wait()
    return message if own is None else (message.view(wide) + own.view(wide)).view(torch.uint8)


class GroupCast:
    """Group-cast: every rank gets only the keys that its plan reads, at once, while it attends to its own."""

    def __init__(self, peers: Peers, layout: Layout, pairs: Pairs) -> None:
        self.peers, self.layout, self.pairs = peers, layout, pairs
        rank, world = peers.rank, peers.world
        self.others = [(rank - n) % world for n in range(1, world)]
        self.asked = {other: pairs.needs(other, rank).to(pairs.plans[0].device) for other in self.others}
        self.read = {other: len(pairs.needs(rank, other)) for other in self.others}

    def plans(self, origin: int) -> Any:
        """Plans over the received keys of a rank."""
        return self.pairs.of(origin, read=origin != self.peers.rank)

    def _cast(self, packing: Packing, keys: Keys) -> tuple[dict[int, Tensor], Transfer]:
        """Start sending the keys that others read, and receiving those read here."""
        taken = {other: packing.empty(n) for other, n in self.read.items() if n}
        sent = [
            (other, packing.pack(tuple(x.index_select(2, which) for x in keys)))
            for other, which in self.asked.items()
            if len(which)
        ]
        return taken, self.peers.start(sent, list(taken.items()))

    def forward(self, keys: Keys) -> Iterator[tuple[int, Keys]]:
        """Yield the rank's own keys, then those it reads of each other rank."""
        packing = Packing.of(keys)
        taken, coming = self._cast(packing, keys)
        yield self.peers.rank, keys
        coming.wait()
        for other, message in taken.items():
            yield other, packing.unpack(message, self.read[other])

    def backward(self, keys: Keys, wide: torch.dtype) -> Walk:
        """Yield the same again; gradients go directly to the ranks that own the keys."""
        packing, sums = Packing.of(keys), Packing.of(keys, wide)
        taken, coming = self._cast(packing, keys)
        own = yield self.peers.rank, keys
        total = tuple(
            torch.zeros_like(x, dtype=wide) if given is None else given.to(wide, copy=True)
            for x, given in zip(keys, own or [None] * len(keys))
        )
        back: list[tuple[int, Tensor]] = []
        coming.wait()
        for other, message in taken.items():
            given = yield other, packing.unpack(message, self.read[other])
            n = self.read[other]
            back.append((other, torch.zeros_like(sums.empty(n)) if given is None else sums.pack(given)))
        room = {other: sums.empty(len(which)) for other, which in self.asked.items() if len(which)}
        self.peers.start(back, list(room.items())).wait()
        for other in self.others:  # in fixed order, so that sums are reproducible
            if other in room:
                which = self.asked[other]
                for x, part in zip(total, sums.unpack(room[other], len(which))):
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

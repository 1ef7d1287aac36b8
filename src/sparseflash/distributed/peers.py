"""Ranks that send one another tensors. A wait ends within a timeout; the error names the missing rank.

A rank whose wait fails writes to the process group's store for whom it waited. Following these entries from
rank to rank ends at the one without an entry: it is dead or stalls.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.errors import RankError
from .segments import SMALL, TOLD, Hello, Line, Room, rooms, volume

GRACE = 0.25
"""Share of the timeout reserved for finding the missing rank."""

_LINES: MutableMapping[Any, dict[int, Line]] = weakref.WeakKeyDictionary()
"""Lines to ranks on this machine, by process group: a context of each step finds those of the first."""


class Peers:
    """The ranks of one process group, addressed by group rank.

    Parameters
    ----------
    group : ProcessGroup or None
        Process group; None is the default group.
    timeout : float
        Seconds until a wait fails.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.timeout = timeout
        self.doing = "setting up"
        self.faults = _Faults()

    @property
    def lines(self) -> dict[int, Line]:
        """Lines to ranks on this machine, once they have met."""
        return _LINES.get(self.group, {})

    def meet(self) -> None:
        """Find out which ranks share this machine's memory; all ranks call it, and the first call counts."""
        if self.group in _LINES or self.world == 1:
            return
        hello = Hello()
        try:
            said = self.gather(hello.said[None])
            row = [rank != self.rank and hello.reaches(x[0]) for rank, x in enumerate(said)]
            rows = torch.stack(self.gather(torch.tensor(row)))
        finally:
            hello.close()
        near = (rows & rows.T)[self.rank].tolist()
        _LINES[self.group] = {rank: Line(int(said[rank][0, 0])) for rank, yes in enumerate(near) if yes}

    def everywhere(self, rank: int) -> int:
        """Global rank of a group rank."""
        return dist.get_global_rank(self.group, rank)

    def start(self, send: Sequence[tuple[int, Tensor]], receive: Sequence[tuple[int, Room]]) -> Transfer:
        """Start to send tensors to group ranks, and to receive others; empty ones are skipped.

        Large messages between ranks of one machine go through shared memory.
        """
        sent = _by_peer([(peer, x) for peer, x in send if x.numel()])
        taken = _by_peer([(peer, room) for peer, room in receive if room.size])
        here = all(x.device.type == "cpu" for _, x in (*send, *receive))
        near = {}
        for peer in sorted({*sent, *taken} & {*(self.lines if here else ())}):
            out, home = sent.get(peer, []), taken.get(peer, [])
            if max(volume(rooms(out)), volume(home)) >= SMALL:
                near[peer] = sent.pop(peer, []), taken.pop(peer, [])
        found = {peer: [_empty(room) for room in home] for peer, home in taken.items()}
        told = {}
        for peer, (out, _) in near.items():
            told[peer] = torch.zeros(TOLD, dtype=torch.int64)
            sent[peer], found[peer] = [self.lines[peer].put(out)], [told[peer]]
        given = [(dist.isend, peer, x.contiguous()) for peer, some in sent.items() for x in some]
        given += [(dist.irecv, peer, x) for peer, some in found.items() for x in some]
        ops = [dist.P2POp(op, x, self.everywhere(peer), self.group) for op, peer, x in given]
        peers = [peer for _, peer, _ in given]
        works: Sequence[Any] = ()
        if ops:
            try:
                works = dist.batch_isend_irecv(ops)
            except RuntimeError as error:
                self.fail(peers[0], error)
        if len(works) != len(peers):  # backends that coalesce requests
            peers = [-1] * len(works)

        def end() -> list[Tensor]:
            for peer, (_, home) in near.items():
                try:
                    found[peer] = self.lines[peer].take(told[peer], home)
                except OSError as error:  # the other rank died since
                    self.fail(peer, error)
            left = {peer: iter(some) for peer, some in found.items()}
            return [next(left[peer]) if room.size else _empty(room) for peer, room in receive]

        return Transfer(self, list(zip(works, peers)), [x for _, _, x in given], end)

    def gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """All-gather tensors whose first axis may have a different length, `sizes`, on each rank."""
        if self.world == 1:
            return [x]
        sizes = [len(x)] * self.world if sizes is None else sizes
        most = max(sizes)
        own = x.new_zeros(most, *x.shape[1:])
        own[: len(x)] = x
        found = [torch.empty_like(own) for _ in range(self.world)]
        if own.numel():
            try:
                self._end(dist.all_gather(found, own, group=self.group, async_op=True), x.device)
            except RuntimeError as error:
                self.fail(-1, error)
        return [y[:n] for y, n in zip(found, sizes)]

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce the sum, in place."""
        if self.world > 1 and x.numel():
            try:
                self._end(dist.all_reduce(x, group=self.group, async_op=True), x.device)
            except RuntimeError as error:
                self.fail(-1, error)
        return x

    def _end(self, work: Any, device: torch.device) -> None:
        if device.type == "cpu":
            work.wait(timedelta(seconds=self.timeout * (1 - GRACE)))
        else:
            work.wait()

    def fail(self, peer: int, error: BaseException) -> None:
        """Raise a `RankError` that names the missing rank and the current step."""
        mine = self.everywhere(self.rank)
        waits = None if peer < 0 else self.everywhere(peer)
        every = [self.everywhere(rank) for rank in range(self.world)]
        lost = self.faults.trace(mine, waits, every, self.timeout * GRACE, self.doing)
        who = f"rank {lost}" if lost is not None else "some rank"
        via = f" (rank {mine} was waiting for rank {waits})" if waits not in (None, lost) else ""
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RankError(
            f"{who} died or stalls: nothing came within {self.timeout:g} s while rank {mine} was in the "
            f"{self.doing}{via}. Start all ranks again from the last checkpoint, on any number of them; if "
            f"one only takes longer, raise timeout= of context_parallel ({said})"
        ) from error


def _by_peer(given: Sequence[tuple[int, Any]]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for peer, x in given:
        found.setdefault(peer, []).append(x)
    return found


def _empty(room: Room) -> Tensor:
    return torch.empty(room.shape, dtype=room.dtype, device=room.device)


class Transfer:
    """Pending sends and receives; tensors are kept alive until they have arrived."""

    def __init__(
        self, peers: Peers, works: list[tuple[Any, int]], kept: list[Tensor], end: Callable[[], list[Tensor]]
    ) -> None:
        self.peers, self.works, self.kept, self.end = peers, works, kept, end

    def wait(self) -> list[Tensor]:
        """Wait until everything has arrived; gives the received tensors, once.

        Raises
        ------
        RankError
            If a rank is missing, naming it.
        """
        for work, peer in self.works:
            try:
                self.peers._end(work, self.kept[0].device)
            except RuntimeError as error:
                self.peers.fail(peer, error)
        return self.end()


class _Faults:
    """Records in the store, after a failure, which rank waits for which."""

    def __init__(self) -> None:
        try:
            self.store = dist.PrefixStore("sparseflash/waits", dist.distributed_c10d._get_default_store())
        except (AttributeError, ValueError):
            self.store = None

    def trace(
        self, mine: int, waits: int | None, every: Sequence[int], grace: float, doing: str
    ) -> int | None:
        """Find the rank that has not reported; None if that is unknown."""
        if self.store is None:
            return waits
        deadline = time.monotonic() + grace
        try:
            self.store.set(str(mine), json.dumps({"waits": waits, "doing": doing}))
            seen, at = {mine}, waits
            while at is not None and at not in seen:
                said = self._said(at, deadline)
                if said is None:
                    return at
                seen.add(at)
                at = said["waits"]
            for rank in every:  # a cycle, or a collective: find any silent rank
                if rank not in seen and self._said(rank, deadline) is None:
                    return rank
        except RuntimeError:  # the store's host rank died
            return waits if waits is not None else 0
        return None

    def _said(self, rank: int, deadline: float) -> Any:
        left = max(deadline - time.monotonic(), 0.05)
        try:
            self.store.wait([str(rank)], timedelta(seconds=left))
            return json.loads(self.store.get(str(rank)))
        except (RuntimeError, ValueError) as error:
            if isinstance(error, dist.DistNetworkError):
                raise
            return None

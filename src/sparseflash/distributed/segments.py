"""Memory that ranks on one machine share: a sender copies tensors into it, and the receiver uses them there.

A connection over loopback copies a message several times, in pieces, while the processors compute. Here only
a few numbers go over it: where the message lies. Segments are anonymous files (`memfd_create`) that the other
process opens through `/proc`: nothing has a name, nothing is left behind, no limit of `/dev/shm` applies.
Where that is not possible (another machine, another system, a container that forbids it), messages go through
the process group.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import RankError


class Room(NamedTuple):
    """What a tensor that is to come will be."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


SMALL = 1 << 16
"""Messages of fewer bytes are not worth a copy and a number."""
ALIGN = 64
"""Tensors of a message begin at multiples of so many bytes."""
RELEASED = 8
"""So many slots a rank gives back with one exchange; each exchange fills at most one."""
TOLD = 4 + RELEASED
"""Numbers that ranks tell one another: slot, file, bytes of file and message, and slots given back."""

_UNIT = 1 << 20
_NONE = -1
_WORD = 16


def rooms(tensors: Sequence[Tensor]) -> list[Room]:
    """Rooms of tensors that are to be sent."""
    return [Room(tuple(x.shape), x.dtype, x.device) for x in tensors]


def volume(message: Sequence[Room]) -> int:
    """Bytes of a message."""
    return sum(-(-room.size // ALIGN) * ALIGN for room in message)


class _Slot:
    """A file of this rank, and whether the other rank still uses the message in it."""

    def __init__(self) -> None:
        self.file = os.memfd_create("sparseflash")
        weakref.finalize(self, os.close, self.file)
        self.memory: mmap.mmap | None = None
        self.length, self.used = 0, False

    def hold(self, size: int) -> mmap.mmap:
        """Memory of at least so many bytes."""
        if self.memory is None or self.length < size:
            self.length = -(-size // _UNIT) * _UNIT
            os.posix_fallocate(self.file, 0, self.length)  # an error here, no signal where memory is written
            self.memory = mmap.mmap(self.file, self.length)
        return self.memory


class Line:
    """Messages between this rank and another one of this machine.

    A message fills a slot until the receiver has let go of its last tensor, which it tells with a later
    exchange. So nobody waits for a slot, and two are enough where ranks take turns and hold nothing.

    Parameters
    ----------
    process : int
        The other rank's process.
    """

    def __init__(self, process: int) -> None:
        self.process = process
        self.slots: list[_Slot] = []
        self.seen: dict[int, mmap.mmap] = {}
        self.released: deque[int] = deque()

    def put(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy a message into shared memory; gives what the other rank is to be told."""
        told = torch.full((TOLD,), _NONE)
        message = rooms(tensors)
        size = volume(message)
        if size:
            at = next((at for at, slot in enumerate(self.slots) if not slot.used), len(self.slots))
            if at == len(self.slots):
                self.slots.append(_Slot())
            slot = self.slots[at]
            for place, x in zip(_tensors(memoryview(slot.hold(size)), message), tensors):
                place.copy_(x.detach())
            slot.used = True
            told[:4] = torch.tensor([at, slot.file, slot.length, size])
        for n in range(min(RELEASED, len(self.released))):
            told[4 + n] = self.released.popleft()
        return told

    def take(self, told: Tensor, message: Sequence[Room]) -> list[Tensor]:
        """The tensors of a message, after the other rank has told where it lies.

        They lie in the other rank's slot, which belongs to this rank until the last of them is gone.
        """
        at, file, length, size, *released = told.tolist()
        for slot in released:
            if slot != _NONE:
                self.slots[slot].used = False
        if max(size, 0) != volume(message):
            raise RankError(f"a message of {size} bytes; expected {volume(message)}: ranks differ")
        if not message:
            return []
        memory = self.seen.get(at)
        if memory is None or len(memory) != length:
            memory = self.seen[at] = _opened(self.process, file, length)
        view = memoryview(memory)
        weakref.finalize(view, self.released.append, at).atexit = False
        return _tensors(view, message)


def _tensors(view: memoryview, message: Sequence[Room]) -> list[Tensor]:
    """Tensors in a segment; they keep the view alive."""
    begins = itertools.accumulate((volume([room]) for room in message), initial=0)
    return [
        torch.frombuffer(view, dtype=room.dtype, count=math.prod(room.shape), offset=begin).view(room.shape)
        for begin, room in zip(begins, message)
    ]


def _opened(process: int, file: int, length: int) -> mmap.mmap:
    """A segment of another process."""
    own = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(own, length)
    finally:
        os.close(own)


class Hello:
    """A file with a random word, by which other ranks find out whether they can map this one's files."""

    def __init__(self) -> None:
        word = os.urandom(_WORD)
        self.file = _NONE
        try:
            self.file = os.memfd_create("sparseflash")
            os.write(self.file, word)
        except (AttributeError, OSError):  # another system, or a container that forbids it
            self.close()
        halves = [int.from_bytes(half, "little", signed=True) for half in (word[:8], word[8:])]
        self.said = torch.tensor([os.getpid(), self.file, *halves])

    def reaches(self, said: Tensor) -> bool:
        """Whether another rank, which said this, shares the machine."""
        process, file, *halves = said.tolist()
        if _NONE in (self.file, file):
            return False
        try:
            word = _opened(process, file, _WORD)[:]
        except (OSError, ValueError):  # no such process or file, one that may not be opened, or a shorter one
            return False
        return word == b"".join(half.to_bytes(8, "little", signed=True) for half in halves)

    def close(self) -> None:
        """Close the file."""
        if self.file != _NONE:
            os.close(self.file)
            self.file = _NONE

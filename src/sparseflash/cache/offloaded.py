"""`Offloaded`: all keys and values in a mapped file; summaries stay in memory, and say what is read of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import SparseFlashError, require
from ..plan import Plan
from ..plan.options import is_count
from .base import check_new
from .growing import Growing

PAGE = mmap.PAGESIZE
Runs = list[tuple[int, int]]
"""Ranges of bytes of a file, whole pages of memory: first, and behind the last."""


@dataclass(frozen=True)
class Offload:
    """Where keys and values lie that are not to take memory: what `Offloaded` is made with.

    Parameters
    ----------
    folder : str or Path
        Of the files, on a disk. They have no names: nothing stays when the program ends, however it does.
    capacity : int
        The most tokens of a sequence. A file takes space for those that are there.
    """

    folder: str | Path
    capacity: int = 1 << 20

    def __post_init__(self) -> None:
        require(
            (is_count(self.capacity, 1), f"capacity={self.capacity!r}: expected an int >= 1, tokens"),
        )


class Reads(NamedTuple):
    """What a layer was told to read."""

    bytes: int = 0
    """Of the file, in whole pages of memory."""
    there: int = 0
    """Of these, what was in memory when they were asked for: prefetched, or read before."""


class Offloaded(Growing):
    """All keys and values of a layer in a file, of which a method reads the pages that it chooses.

    A token's key and value lie side by side, the tokens of a head behind each other, so that a page of a
    method is one stretch of the file. What a method keeps to choose by (`summary`) stays in memory. What a
    plan lists is asked for all at once (`expect`, which hosts call), and the layer that follows begins to
    read what it read for the token before. Where the disk is full, the layer goes on in memory and says so.

    Parameters
    ----------
    how : Offload
        The folder, and how many tokens at most.
    following : Offloaded, optional
        The layer that attends next.

    Attributes
    ----------
    reads : Reads
        Since the last `reset`.

    Examples
    --------
    >>> import tempfile, torch, sparseflash as sf
    >>> folder = tempfile.TemporaryDirectory()
    >>> cache = sf.cache.Offloaded(sf.cache.Offload(folder.name))
    >>> cache.append(*torch.randn(2, 1, 2, 4096, 64))
    >>> q, method = torch.randn(1, 4, 1, 64), sf.methods.Quest(budget=256, page=64)
    >>> plan = method.select(q, cache.keys, {"cache": cache, "q_offset": 4095}).plan
    >>> cache.expect(plan)
    >>> out = sf.decode(q, cache.keys, cache.values, plan)
    >>> cache.tokens, cache.on_disk, cache.bytes < cache.on_disk / 20
    (4096, 4194304, True)
    """

    def __init__(self, how: Offload, following: Offloaded | None = None) -> None:
        require((isinstance(how, Offload), lambda: f"how={how!r}: expected cache.Offload(folder)"))
        self.how, self.following = how, following
        self._file: _File | None = None
        super().__init__()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._file = None
        self._last: Runs | None = None
        self.reads = Reads()

    @property
    def on_disk(self) -> int:
        """Bytes of the tokens in the file."""
        there = () if self._file is None else (self.keys, self.values)
        return sum(x.nbytes for x in there if x is not None)

    @property
    def bytes(self) -> int:
        """Memory that the layer holds: of the file nothing."""
        mapped = () if self._file is None else ("keys", "values")
        return sum(x.untyped_storage().nbytes() for name, x in self.tensors().items() if name not in mapped)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]` behind the others, into the file.

        Raises
        ------
        SparseFlashError
            Past the capacity, and for a folder that cannot be written; nothing is lost.
        """
        check_new(k, v, self._keys, self._values)
        if k.device.type != "cpu":
            raise SparseFlashError(
                f"keys on {k.device}: a mapped file is read by the CPU; use cache.Growing()"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise SparseFlashError("keys in a file have no gradients: append them under torch.no_grad()")
        if self._file is None and self._keys is None:
            self._begin(k, v)
        if self._file is None:  # the disk was full
            return super().append(k, v)
        n, end = self._tokens, self._tokens + k.shape[2]
        if end > self.how.capacity:
            raise SparseFlashError(
                f"{end} tokens in a file with capacity={self.how.capacity}: nothing was appended. Give "
                "Offload a larger one: a file takes space for the tokens that are there alone"
            )
        try:
            self._file.write(torch.cat([k, v], -1), n)
        except OSError as error:
            self._leave(error, end)
            return super().append(k, v)
        self._tokens = self._valued = end
        return None

    def _leave(self, error: OSError, tokens: int) -> None:
        """Go on in memory, with all that is there."""
        warnings.warn(
            f"{self.how.folder}: {error.strerror} at {tokens} tokens: this layer goes on in memory",
            stacklevel=3,
        )
        self._keys, self._values = (None if x is None else x.clone() for x in (self.keys, self.values))
        self._file = None

    def _begin(self, k: Tensor, v: Tensor) -> None:
        try:
            file = _File(self.how, k.shape[0], k.shape[1], k.shape[3] + v.shape[3], k.dtype)
        except OSError as error:
            raise SparseFlashError(
                f"{self.how.folder}: {error.strerror}; expected a folder that can be written, "
                "cache.Offload(folder)"
            ) from None
        self._take(file, k.shape[3])

    def _take(self, file: _File, width: int) -> None:
        """Keys and values are those of a file from now on."""
        self._file, self._keys, self._values = file, file.rows[..., :width], file.rows[..., width:]

    def expect(self, *plans: Plan) -> None:
        """Begin to read what plans list, all at once, and what the next layer read for the token before."""
        if self._file is None:
            return
        runs = self._file.runs(plans, self._tokens)
        self._file.only(self._last is None)
        there, size = self._file.there(runs), sum(b - a for a, b in runs)
        self.reads = Reads(self.reads.bytes + size, self.reads.there + there)
        self._file.ask(runs)
        self._last = runs
        if self.following is not None:
            self.following.prefetch()

    def prefetch(self) -> None:
        """Begin to read what was read for the last token."""
        if self._file is not None and self._last is not None:
            self._file.ask(self._last)

    def drop(self) -> None:
        """Let the system forget the file's pages: what is read next comes from the disk."""
        if self._file is not None:
            self._file.drop()

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these sequences of the batch, in this order; they are copied within the disk."""
        keys, values = self.keys, self.values
        if self._file is None or keys is None or values is None:
            return super().select_rows(rows)
        if rows.tolist() == list(range(len(keys))):
            return None
        n, rest = self._tokens, (len(rows), keys.shape[1], keys.shape[3] + values.shape[3], keys.dtype)
        try:
            file = _File(self.how, *rest)
            for to, at in enumerate(rows.tolist()):
                file.write(self._file.rows[at : at + 1, :, :n], 0, to)
        except OSError as error:
            self._leave(error, n)
            return super().select_rows(rows)
        self._keys, self._values = keys[:, :, :0], values[:, :, :0]
        super().select_rows(rows)  # what stands beside the keys
        self._take(file, keys.shape[3])
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self)(self.how)
        if self.keys is not None and self.values is not None:
            made.append(self.keys, self.values)
            made.first = self.first
        return made


class _File:
    """Rows `[B,H,capacity,width]` of a file without a name: written as a file, read as memory."""

    def __init__(self, how: Offload, B: int, H: int, width: int, dtype: torch.dtype) -> None:
        self._open = tempfile.TemporaryFile(dir=how.folder)
        self._row = width * dtype.itemsize
        self._head = -(-how.capacity * self._row // PAGE) * PAGE  # each head begins with a page of memory
        self._heads = H
        size = B * H * self._head
        os.ftruncate(self._open.fileno(), size)
        self._map = mmap.mmap(self._open.fileno(), size)
        flat = torch.frombuffer(self._map, dtype=dtype)
        stride = self._head // dtype.itemsize
        self.rows = flat.as_strided((B, H, how.capacity, width), (H * stride, stride, width, 1))

    def write(self, x: Tensor, at: int, to: int = 0) -> None:
        """Put rows `[B,H,n,width]` at a place of each head; of the sequences from `to` on."""
        data = x.detach().contiguous()
        size = x.shape[2] * self._row
        for b in range(x.shape[0]):
            for h in range(x.shape[1]):
                begin = ((b + to) * self._heads + h) * self._head + at * self._row
                address = data.data_ptr() + (b * x.shape[1] + h) * size
                left = memoryview((ctypes.c_char * size).from_address(address))
                while left:
                    done = os.pwrite(self._open.fileno(), left, begin)
                    left, begin = left[done:], begin + done

    def runs(self, plans: Iterable[Plan], tokens: int) -> Runs:
        """Where the keys that plans list lie: whole pages of memory, those side by side together."""
        B, H = self.rows.shape[:2]
        ends = []
        for lists in (lists for plan in plans for lists in plan.lists()):
            listed = lists.listed()
            lo, hi = lists.rows(listed.entry)
            batch, heads, tiles = lists.start.shape
            b, h = listed.cell // (heads * tiles), listed.cell // tiles % heads
            own = h * H // heads if heads >= H else torch.arange(H)[:, None]
            slot = b if batch == B else torch.arange(B)[:, None, None]
            head = (slot * H + own) * self._head
            a = (head + lo * self._row) // PAGE
            e = -(-(head + hi.clamp(max=tokens) * self._row) // PAGE)
            ends.append(torch.stack([a.expand_as(e), e], -1)[(lo < hi.clamp(max=tokens)).expand_as(e)])
        found: Runs = []
        for begin, end in sorted(set(map(tuple, torch.cat(ends).tolist()))) if ends else []:
            if found and begin <= found[-1][1]:
                found[-1] = (found[-1][0], max(end, found[-1][1]))
            else:
                found.append((begin, end))
        return [(begin * PAGE, end * PAGE) for begin, end in found]

    def ask(self, runs: Iterable[tuple[int, int]]) -> None:
        """Begin to read, all at once."""
        for begin, end in runs:
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def only(self, first: bool) -> None:
        """Read what is asked for and nothing around it; what was read counts as the process's no more."""
        if first:
            self._map.madvise(mmap.MADV_RANDOM)
        self._map.madvise(mmap.MADV_DONTNEED)

    def there(self, runs: Runs) -> int:
        """Bytes of these ranges that the system has in memory."""
        libc, base, found = ctypes.CDLL(None), self.rows.data_ptr(), 0
        for begin, end in runs:
            pages = (ctypes.c_ubyte * ((end - begin) // PAGE))()
            libc.mincore(ctypes.c_void_p(base + begin), ctypes.c_size_t(end - begin), pages)
            found += sum(x & 1 for x in pages)
        return found * PAGE

    def drop(self) -> None:
        """Write everything to the disk, and forget the copy in memory."""
        os.fsync(self._open.fileno())
        self._map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._open.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

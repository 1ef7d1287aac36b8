"""`Offloaded`: all keys and values in a mapped file; summaries stay in memory and choose what to read."""

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

from ..common.errors import SparseFlashError, require
from ..plan import Plan
from ..plan.options import is_count
from .base import check_new
from .growing import Growing

PAGE = mmap.PAGESIZE
Runs = list[tuple[int, int]]
"""Byte ranges [begin, end) of a file, aligned to memory pages."""


@dataclass(frozen=True)
class Offload:
    """Where `Offloaded` stores keys and values, and how many.

    Parameters
    ----------
    folder : str or Path
        Folder on a disk for the files. They are unnamed (unlinked), so nothing stays however the program
        ends.
    capacity : int
        Maximum number of tokens of a sequence. The file takes disk space only for tokens that are written.
    """

    folder: str | Path
    capacity: int = 1 << 20

    def __post_init__(self) -> None:
        require(
            (is_count(self.capacity, 1), f"capacity={self.capacity!r}: expected an int >= 1, tokens"),
        )


class Reads(NamedTuple):
    """Bytes that a layer was asked to read."""

    bytes: int = 0
    """Bytes of the file, in whole memory pages."""
    there: int = 0
    """Bytes of these already in memory when asked for: prefetched, or read before."""


class Offloaded(Growing):
    """All keys and values of a layer in a file, of which a method reads the chosen pages.

    A token's key and value are adjacent, and the tokens of a head contiguous, so a page of a method is one
    byte range of the file. The summaries that a method chooses by (`summary`) stay in memory. `expect`, which
    hosts call, requests everything that a plan lists at once, and makes the `following` layer request what it
    read for the previous token. If the disk is full, the layer continues in memory with a warning.

    Parameters
    ----------
    how : Offload
        Folder, and maximum number of tokens.
    following : Offloaded, optional
        The layer that attends next.

    Attributes
    ----------
    reads : Reads
        Bytes requested since the last `reset`.

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
        """Bytes of memory that the layer holds; the mapped file does not count."""
        mapped = () if self._file is None else ("keys", "values")
        return sum(x.untyped_storage().nbytes() for name, x in self.tensors().items() if name not in mapped)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]` to the file.

        Raises
        ------
        SparseFlashError
            Beyond the capacity, or if the folder is not writable; nothing is lost.
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
        if self._file is None:  # after the disk was full
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
        """Copy everything into memory and continue there, with a warning."""
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
        """Use the rows of a file as keys and values."""
        self._file, self._keys, self._values = file, file.rows[..., :width], file.rows[..., width:]

    def expect(self, *plans: Plan) -> None:
        """Request what plans list from the disk, all at once, and the next layer's last reads."""
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
        """Request the ranges that were read for the last token."""
        if self._file is not None and self._last is not None:
            self._file.ask(self._last)

    def drop(self) -> None:
        """Evict the file from the page cache: the next read comes from the disk."""
        if self._file is not None:
            self._file.drop()

    def select_rows(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order, by copying them into a new file."""
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
        super().select_rows(rows)  # summaries and the like
        self._take(file, keys.shape[3])
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self)(self.how)
        if self.keys is not None and self.values is not None:
            made.append(self.keys, self.values)
            made.first = self.first
        return made


class _File:
    """Rows `[B,H,capacity,width]` of an unnamed file: written by pwrite, read through a memory map."""

    def __init__(self, how: Offload, B: int, H: int, width: int, dtype: torch.dtype) -> None:
        self._open = tempfile.TemporaryFile(dir=how.folder)
        self._row = width * dtype.itemsize
        self._head = -(-how.capacity * self._row // PAGE) * PAGE  # each head is aligned to a memory page
        self._heads = H
        size = B * H * self._head
        os.ftruncate(self._open.fileno(), size)
        self._map = mmap.mmap(self._open.fileno(), size)
        flat = torch.frombuffer(self._map, dtype=dtype)
        stride = self._head // dtype.itemsize
        self.rows = flat.as_strided((B, H, how.capacity, width), (H * stride, stride, width, 1))

    def write(self, x: Tensor, at: int, to: int = 0) -> None:
        """Write rows `[B,H,n,width]` at token `at` of each head, into sequences `to`, `to + 1`, ..."""
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
        """Byte ranges of the keys that plans list, rounded to memory pages and merged."""
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
        """Request the ranges without waiting for them (MADV_WILLNEED)."""
        for begin, end in runs:
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def only(self, first: bool) -> None:
        """Disable read-ahead (on the first call), and unmap pages read so far from the process."""
        if first:
            self._map.madvise(mmap.MADV_RANDOM)
        self._map.madvise(mmap.MADV_DONTNEED)

    def there(self, runs: Runs) -> int:
        """Bytes of these ranges that are resident in memory (mincore)."""
        libc, base, found = ctypes.CDLL(None), self.rows.data_ptr(), 0
        for begin, end in runs:
            pages = (ctypes.c_ubyte * ((end - begin) // PAGE))()
            libc.mincore(ctypes.c_void_p(base + begin), ctypes.c_size_t(end - begin), pages)
            found += sum(x & 1 for x in pages)
        return found * PAGE

    def drop(self) -> None:
        """Sync the file to disk, and evict it from the page cache."""
        os.fsync(self._open.fileno())
        self._map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._open.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

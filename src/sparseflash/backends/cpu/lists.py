"""Building the lists of plans (`native/lists.h`): implements `plan.make.native.Builders`."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from .call import FAR, empty, zeros
from .library import run

ROOM = 1 << 28
"""Bytes of bits per call, if all its units were partial; pages that stay untouched cost nothing."""


class Mask(ctypes.Structure):
    """SfMask."""

    _fields_ = (
        [("size", ctypes.c_int64), ("data", ctypes.c_void_p)]
        + [(n, ctypes.c_int64) for n in ("batch", "head", "row", "lane")]
        + [(n, ctypes.c_int64) for n in ("B", "H", "Tq", "Tk", "tile", "unit", "first", "cells")]
        + [(n, ctypes.c_void_p) for n in ("kind", "partial", "bits")]
        + [("bits_size", ctypes.c_int64), ("threads", ctypes.c_int32)]
    )


class Units(ctypes.Structure):
    """SfUnits."""

    _fields_ = (
        [("size", ctypes.c_int64), ("given", ctypes.c_void_p)]
        + [(n, ctypes.c_int64) for n in ("cells", "width", "tiles", "Tq", "Tk", "tile", "unit", "q_offset")]
        + [(n, ctypes.c_int32) for n in ("id_bytes", "causal", "unique", "threads")]
        + [(n, ctypes.c_void_p) for n in ("full", "count", "start", "index")]
        + [("index_size", ctypes.c_int64)]
    )


class Transpose(ctypes.Structure):
    """SfTranspose."""

    _fields_ = (
        [("size", ctypes.c_int64)]
        + [(n, ctypes.c_void_p) for n in ("start", "base", "full", "count", "index")]
        + [(n, ctypes.c_int64) for n in ("lists", "tiles", "columns", "index_size", "entries")]
        + [(n, ctypes.c_void_p) for n in ("to", "listed", "sure", "met", "source")]
        + [("wide", ctypes.c_int32), ("threads", ctypes.c_int32)]
    )


def _run(name: str, call: ctypes.Structure) -> None:
    call.size = ctypes.sizeof(call)
    call.threads = max(1, torch.get_num_threads())
    run(name, call, torch.float32)


def read_mask(mask: Tensor, tile: int, unit: int) -> tuple[Tensor, list[Tensor]]:
    """Classify each unit of each tile (none, some, all seen), and collect the bits of partial units."""
    B, H, Tq, Tk = mask.shape
    cells, C, words = B * H * -(-Tq // tile), -(-Tk // unit), -(-unit // 32)
    kind = empty((cells, C), dtype=torch.uint8)
    partial = zeros(cells, dtype=torch.int32)
    call = Mask(data=mask.data_ptr(), B=B, H=H, Tq=Tq, Tk=Tk, tile=tile, unit=unit)
    call.batch, call.head, call.row, call.lane = mask.stride()
    step, found = max(1, ROOM // max(C * tile * words * 4, 1)), []
    for first in range(0, cells if C else 0, step):
        n = min(step, cells - first)
        bits = empty((n * C, tile, words), dtype=torch.int32)
        call.first, call.cells, call.bits, call.bits_size = first, n, bits.data_ptr(), len(bits)
        call.kind, call.partial = kind[first].data_ptr(), partial[first:].data_ptr()
        _run("sf_read_mask", call)
        used = (torch.arange(C, device=partial.device) < partial[first : first + n, None]).flatten()
        found.append(bits if bool(used.all()) else bits[used])
    return kind, found


def list_units(
    given: Tensor,
    *,
    Tq: int,
    Tk: int,
    tile: int,
    unit: int,
    causal: bool,
    q_offset: int = 0,
    unique: bool = False,
) -> dict[str, Any]:
    """Build compact lists of the given units, full ones first: a plan's `start`, `full`, `count`, `index`."""
    *lead, width = given.shape
    if given.dtype not in (torch.bool, torch.int32, torch.int64):
        given = given.int()
    given, cells = given.contiguous(), math.prod(lead)
    full, count = zeros(2, cells, dtype=torch.int32)
    call = Units(given=given.data_ptr(), cells=cells, width=width, tiles=lead[2])
    call.Tq, call.Tk, call.tile, call.unit = Tq, Tk, tile, unit
    call.q_offset = max(-FAR, min(q_offset, FAR))
    call.id_bytes, call.causal, call.unique = given.element_size(), causal, unique
    call.full, call.count = full.data_ptr(), count.data_ptr()
    _run("sf_list_units", call)
    start = count.cumsum(0) - count
    index = empty(int(count.sum()), dtype=torch.int32)
    if len(index):
        call.start, call.index, call.index_size = start.data_ptr(), index.data_ptr(), len(index)
        _run("sf_list_units", call)
    return {"start": start.view(lead), "full": full.view(lead), "count": count.view(lead), "index": index}


def transpose(
    start: Tensor, full: Tensor, count: Tensor, index: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Transpose unit lists: for each unit, the tiles that list it, full entries first."""
    lists, tiles = count.shape
    start, full, count, index = (x.contiguous() for x in (start, full, count, index))
    base = torch.nn.functional.pad(count.sum(-1).cumsum(0), (1, 0))
    to = empty((lists, columns), dtype=torch.int64)
    listed, sure = empty((2, lists, columns), dtype=torch.int32)
    entries = int(base[-1])
    if not 0 <= entries <= lists * tiles * columns:
        raise ValueError(
            f"{entries} entries: {lists * tiles} tiles list {columns} units (plan.check() says more)"
        )
    met = empty(entries, dtype=torch.int32)
    wide = len(index) >= 2**31
    source = empty(entries, dtype=torch.int64 if wide else torch.int32)
    call = Transpose(lists=lists, tiles=tiles, columns=columns, wide=wide)
    call.index_size, call.entries = len(index), entries
    call.start, call.full, call.count, call.index, call.base = (
        x.data_ptr() for x in (start, full, count, index, base)
    )
    call.to, call.listed, call.sure, call.met, call.source = (
        x.data_ptr() for x in (to, listed, sure, met, source)
    )
    _run("sf_transpose", call)
    return to, listed, sure, met, source

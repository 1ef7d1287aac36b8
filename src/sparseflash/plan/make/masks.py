"""Plans from boolean masks: the mask is read once, tile by tile, and only mixed tiles are stored, as bits.

A cell (tile of queries x unit of keys) is empty (not listed), full (part of a span: a run of full units is
one range) or partial (a unit with bits). Bytes are processed eight at a time: eight keys are one int64 word,
the words of a tile's rows add up without carries between bytes, and one multiplication packs a word into
eight bits. So reading a mask costs little more than loading its bytes.

Source: Sharma and Geiping, "Efficiently Dispatching Flash Attention for Partially Filled Attention Masks",
arXiv 2409.15097 (binary block masking; full tiles need not be neighbours here).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..bits import pack_bits, pack_words
from ..options import TILE, UNIT, Fields, check_options, is_length, shape_of
from ..ragged import begins
from .native import builders

SLAB = 1 << 22
"""Bytes of a mask that are processed in one chunk: small enough to stay in a CPU cache."""
CARRY = 255
"""Rows of 0/1 bytes whose sum fits a byte."""
PARTIAL, FULL = 1, 2
"""Kinds of a cell: some pairs visible, all visible; 0 is none."""


def as_mask(mask: Tensor, Tq: int | None, Tk: int | None) -> Tensor:
    """Validate a bool mask and view it as [B|1, H|1, Tq, Tk], without a copy."""
    wanted = "expected bool [Tq, Tk], [H, Tq, Tk] or [B, H, Tq, Tk], where B and H may be 1"
    require(
        (isinstance(mask, Tensor) and 2 <= mask.dim() <= 4, lambda: f"mask: {shape_of(mask)}; {wanted}"),
        error=PlanError,
    )
    require(
        (
            mask.dtype == torch.bool,
            lambda: (
                f"mask has dtype {mask.dtype}: expected bool, True = attends; an additive one (0 "
                "where seen) is "
                "mask == 0, integers are mask != 0; a bias that is learned is no mask (key_bias=)"
            ),
        ),
        *(
            (
                T is None or is_length(T),
                lambda name=name, T=T: f"{name}={T!r}: expected an int >= 0 of 32 bits",
            )
            for name, T in (("Tq", Tq), ("Tk", Tk))
        ),
        error=PlanError,
    )
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    for axis, name, T in ((2, "Tq", Tq), (3, "Tk", Tk)):
        own = mask.shape[axis]
        require(
            (
                T is None or own in (1, T),
                lambda: f"mask: {shape_of(mask)} with {name}={T}: expected {T}, or 1, there",
            ),
            error=PlanError,
        )
    require((mask.shape[1] > 0, lambda: f"mask: {shape_of(mask)} has no heads; {wanted}"), error=PlanError)
    for axis in (0, 1):  # an expanded axis (stride 0) needs one list
        if mask.shape[axis] > 1 and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask.expand(-1, -1, -1 if Tq is None else Tq, -1 if Tk is None else Tk)


def from_mask(
    mask: Tensor, *, Tq: int | None = None, Tk: int | None = None, tile: int = TILE, unit: int = UNIT
) -> Fields:
    """Fields of `Plan.from_mask`."""
    check_options(tile=tile, unit=unit)
    mask = as_mask(mask, Tq, Tk)
    if native := builders(mask.numel(), mask):
        return _fields(*native.read_mask(mask, tile, unit), tuple(mask.shape), tile, unit)
    lists = mask.flatten(0, 1)
    if torch.compiler.is_compiling() or mask.is_meta:
        return _every_unit(lists, tuple(mask.shape), tile, unit)
    return from_rows(lambda of, rows: lists[of, rows], tuple(mask.shape), mask.device, tile=tile, unit=unit)


def from_rows(
    slab_of: Callable[[slice, slice], Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    *,
    tile: int,
    unit: int,
) -> Fields:
    """Fields of a mask of shape [B,H,Tq,Tk], read in slabs `slab_of(lists, rows)`, bool [n,rows,Tk]."""
    B, H, Tq, Tk = shape
    R, C = -(-Tq // tile), -(-Tk // unit)
    size = max(1, tile * C * unit)
    tiles = max(1, min(R, SLAB // size))
    heads = max(1, SLAB // (size * R)) if tiles == R else 1
    kinds, bits = [torch.zeros(0, C, dtype=torch.uint8, device=device)], []
    for h in range(0, B * H, heads):
        for r in range(0, R, tiles):
            slab = slab_of(slice(h, h + heads), slice(r * tile, (r + tiles) * tile))
            native = builders(slab.numel(), slab)
            kind, own = native.read_mask(slab[None], tile, unit) if native else _read(slab, tile, unit)
            kinds.append(kind)
            bits += own
    return _fields(torch.cat(kinds), bits, shape, tile, unit)


def _every_unit(lists: Tensor, shape: tuple[int, ...], tile: int, unit: int) -> Fields:
    """Fields of masks [n,Tq,Tk] that list every unit with bits, so that no shape depends on a value."""
    B, H, Tq, Tk = shape
    R, C = -(-Tq // tile), -(-Tk // unit)
    wide = torch.nn.functional.pad(lists, (0, C * unit - Tk, 0, R * tile - Tq))
    cells = wide.view(-1, R, tile, C, unit).transpose(2, 3).reshape(-1, tile, unit)
    column = torch.arange(C, device=lists.device)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        **bit_lists(
            torch.arange(B * H * R, device=lists.device).repeat_interleave(C),
            column.repeat(B * H * R),
            [pack_bits(cells)],
            (B, H, R),
        ),
    }


def _fields(kind: Tensor, bits: list[Tensor], shape: tuple[int, ...], tile: int, unit: int) -> Fields:
    """Build the fields from the kinds [B*H*R, C] and bits that `Builders.read_mask` returns."""
    B, H, Tq, Tk = shape
    lead = (B, H, -(-Tq // tile))
    cell, column = (kind == FULL).nonzero(as_tuple=True)
    span_cell, spans = cell, cell.new_zeros(0, 2)
    if len(cell):
        span_cell, spans = runs(cell, column * unit, (column + 1) * unit)
    cell, column = (kind == PARTIAL).nonzero(as_tuple=True)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        **span_lists(span_cell, spans.clamp(max=Tk), lead),
        **bit_lists(cell, column, bits, lead),
    }


def _read(slab: Tensor, tile: int, unit: int) -> tuple[Tensor, list[Tensor]]:
    """`Builders.read_mask` of a slab [n,rows,Tk], in PyTorch."""
    n, Tq, Tk = slab.shape
    rows = (Tq - torch.arange(0, Tq, tile, device=slab.device)).clamp(max=tile)
    keys = (Tk - torch.arange(0, Tk, unit, device=slab.device)).clamp(max=unit)
    words = _words(slab, tile, unit)
    count = _count(words)
    kind = (count > 0).to(torch.uint8) + (count == (rows[:, None] * keys).repeat(n, 1))
    cell, column = (kind == PARTIAL).nonzero(as_tuple=True)
    return kind, [pack_words(words[cell, :, column])]


def _words(slab: Tensor, tile: int, unit: int) -> Tensor:
    """View a slab [n, rows, Tk] as words of eight keys, int64 [tiles, tile, C, words]; padding is 0."""
    n, rows, Tk = slab.shape
    s, C, lanes = -(-rows // tile), -(-Tk // unit), -(-unit // 32) * 32
    whole = rows % tile == 0 and Tk % unit == 0 and lanes == unit
    if not (whole and slab.is_contiguous() and slab.storage_offset() % 8 == 0):
        wide = torch.zeros(n, s * tile, C * unit, dtype=torch.bool, device=slab.device)
        wide[:, :rows, :Tk] = slab
        slab = torch.nn.functional.pad(wide.view(n, s * tile, C, unit), (0, lanes - unit))
    return slab.reshape(-1).view(torch.uint8).view(torch.int64).view(n * s, tile, C, lanes // 8)


def _count(words: Tensor) -> Tensor:
    """Count the visible pairs of each tile and unit, [tiles, C]."""
    sums = [rows.sum(1).view(torch.uint8).sum(-1, dtype=torch.int64) for rows in torch.split(words, CARRY, 1)]
    return torch.stack(sums).sum(0)


# ---------------------------------------------------------------- lists


def runs(cell: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Join adjacent ranges `[lo, hi)` of a cell, given sorted; return their cells and ranges int64 [n, 2]."""
    begins = torch.ones_like(cell, dtype=torch.bool)
    begins[1:] = (cell[1:] != cell[:-1]) | (lo[1:] != hi[:-1])
    ends = torch.ones_like(begins)
    ends[:-1] = begins[1:]
    return cell[begins], torch.stack([lo[begins], hi[ends]], -1)


def _counted(cell: Tensor, n: int) -> Tensor:
    """`bincount` of numbers below n that also accepts meta tensors."""
    if not cell.is_meta:
        return torch.bincount(cell, minlength=n)
    return torch.empty(n, dtype=torch.int64, device=cell.device)


def span_lists(cell: Tensor, spans: Tensor, lead: tuple[int, int, int]) -> Fields:
    """Build lists of full ranges [n, 2], which are sorted by cell (index in [B,H,R])."""
    count = _counted(cell, math.prod(lead))
    return {
        "span_start": begins(count).view(lead),
        "span_full": count.int().view(lead),
        "span_count": count.int().view(lead),
        "spans": spans.int(),
    }


def bit_lists(cell: Tensor, column: Tensor, bits: list[Tensor], lead: tuple[int, int, int]) -> Fields:
    """Build lists of partial units with bits, which are sorted by cell; no fields if there are none."""
    if not len(cell):
        return {}
    count = _counted(cell, math.prod(lead))
    start = begins(count).view(lead)
    return {
        "start": start,
        "full": torch.zeros(lead, dtype=torch.int32, device=cell.device),
        "count": count.int().view(lead),
        "index": column.int(),
        "bits": bits[0] if len(bits) == 1 else torch.cat(bits),
        "bits_start": start,
    }

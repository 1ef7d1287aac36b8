"""Mask formats of other libraries: FlashMask's columns, MagiAttention's slices, block sparse rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import INTEGERS, TILE, UNIT, Fields, fit, is_length, shape_of
from ..ragged import expand
from .intervals import from_intervals
from .lifetimes import from_lifetimes
from .listed import Frame, from_keys
from .masks import from_rows


def from_flashmask(
    indices: Tensor, *, causal: bool, Tq: int | None = None, tile: int = TILE, unit: int = UNIT
) -> Fields:
    """Fields of `Plan.from_flashmask`."""
    wanted = "integers [B|1, H|1, Tk, n], n = 1 or 2 where causal, else 2 or 4"
    if not (isinstance(indices, Tensor) and indices.dim() == 4 and indices.shape[1] > 0):
        raise PlanError(f"startend_row_indices: {shape_of(indices)}; expected {wanted}")
    *lead, Tk, n = indices.shape
    Tq = Tk if Tq is None else Tq
    require(
        (
            n in ((1, 2) if causal else (2, 4)),
            lambda: f"startend_row_indices holds n = {n} a key; expected {wanted}",
        ),
        (
            indices.dtype in INTEGERS,
            lambda: f"startend_row_indices has dtype {indices.dtype}: expected {wanted}",
        ),
        (is_length(Tq), lambda: f"Tq={Tq!r}: expected an int >= 0 of 32 bits"),
        error=PlanError,
    )
    ends = indices.long().unbind(-1)
    if n == 1:  # key hidden from row ends[0] on
        return from_lifetimes(None, ends[0], Tq=Tq, tile=tile)
    if n == 2 and not causal:  # hidden from row ends[0] on and before row ends[1]
        return from_lifetimes(ends[1], ends[0], Tq=Tq, tile=tile)
    hidden = [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    key = torch.arange(Tk, device=indices.device)

    def rows_of(lists: slice, rows: slice) -> Tensor:
        row = torch.arange(Tq, device=key.device)[rows, None]
        seen = row >= key if causal else torch.ones(1, 1, dtype=torch.bool, device=key.device)
        for begin, end in hidden:
            seen = seen & ~((row >= begin[lists, None]) & (row < end[lists, None]))
        return seen

    return from_rows(rows_of, (*lead, Tq, Tk), key.device, tile=tile, unit=unit)


def from_slices(
    q_ranges: Any, k_ranges: Any, types: Any, *, Tq: int, Tk: int, tile: int = TILE, unit: int = UNIT
) -> Fields:
    """Fields of `Plan.from_slices`."""
    require(
        (is_length(Tq) and is_length(Tk), lambda: f"Tq={Tq!r}, Tk={Tk!r}: lengths are ints >= 0, of 32 bits"),
        error=PlanError,
    )
    q, k = (_pairs(x, name, T) for x, name, T in ((q_ranges, "q_ranges", Tq), (k_ranges, "k_ranges", Tk)))
    kind = torch.as_tensor(types if types is not None else [0] * len(q), device=q.device)
    require(
        (len(q) == len(k), lambda: f"{len(q)} q_ranges and {len(k)} k_ranges: a slice has one of each"),
        (
            kind.dim() <= 1 and kind.dtype in INTEGERS or not kind.numel(),
            lambda: f"types: {shape_of(kind)} {kind.dtype}; expected an int, or integers [{len(q)}]",
        ),
        error=PlanError,
    )
    kind = fit(kind.long().expand(len(q)), "types hold", 0, 3, "0 full, 1 causal, 2 inverse causal, 3 both")
    slice_, place = expand(q[:, 1] - q[:, 0])
    row, (first, last) = q[slice_, 0] + place, k[slice_].unbind(-1)
    lo = torch.where(kind[slice_] >= 2, first + place, first)
    hi = torch.where(kind[slice_] % 2 == 1, last - (q[slice_, 1] - 1 - row), last)
    # number the slices of each query row: [Tq, most slices of a row], unused ones empty
    row, order = row.sort(stable=True)
    at = torch.arange(len(row), device=row.device)
    begin = torch.searchsorted(row, row)
    width = int((at - begin).max()) + 1 if len(row) else 0
    ends = torch.zeros(2, Tq, width, dtype=torch.int64, device=row.device)
    ends[0, row, at - begin] = lo[order].clamp(max=Tk)  # behind the last key there is none
    ends[1, row, at - begin] = hi[order].clamp(min=0)
    return from_intervals(ends[0, None, None], ends[1, None, None], Tk=Tk, tile=tile, unit=unit)


def _pairs(x: Any, name: str, T: int) -> Tensor:
    """Validate ranges and convert them to int64 [n, 2]."""
    given = torch.as_tensor(x)
    given = given.reshape(0, 2).long() if not given.numel() else given
    require(
        (
            given.dim() == 2 and given.shape[1] == 2 and given.dtype in INTEGERS,
            lambda: (
                f"{name}: {shape_of(given)} {given.dtype}; expected integers [n, 2]: [begin, end) "
                "of each slice"
            ),
        ),
        error=PlanError,
    )
    given = fit(given.long(), f"{name} hold", 0, T, "tokens are {least}..{most}")
    if bool((given[:, 1] < given[:, 0]).any()):
        raise PlanError(f"{name}: a range ends before it begins; expected [begin, end)")
    return given


def from_bsr(
    indptr: Any,
    indices: Tensor | None = None,
    *,
    Tq: int | None = None,
    Tk: int | None = None,
    tile: int | None = None,
    unit: int | None = None,
    causal: bool = False,
    q_offset: int | Tensor = 0,
) -> Fields:
    """Fields of `Plan.from_bsr`."""
    if indices is None:
        indptr, indices, own = _matrix(indptr)
        said = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit}
        for name, n in said.items():
            if n not in (None, own[name]):
                raise PlanError(f"{name}={n!r}: the matrix says {own[name]}; leave it out")
        Tq, Tk, tile, unit = own.values()
    named = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit}
    for name, n in named.items():
        if not is_length(n, 0 if name[0] == "T" else 1):
            raise PlanError(f"{name}={n!r}: with indptr and indices, say Tq, Tk, and the block: tile, unit")
    assert Tq is not None and Tk is not None and tile is not None and unit is not None
    R = -(-Tq // tile)
    for x, name in ((indptr, "indptr"), (indices, "indices")):
        if not (isinstance(x, Tensor) and x.dim() == 1 and x.dtype in INTEGERS):
            raise PlanError(f"{name}: {shape_of(x)}; expected integers of one dimension")
    begin = indptr.long()
    count = begin[1:] - begin[:-1]
    sound = len(begin) == R + 1 and int(begin[0]) == 0 and bool((count >= 0).all())
    if not (sound and int(begin[-1]) == len(indices)):
        raise PlanError(
            f"indptr {list(indptr.shape)}: expected {R + 1} running totals for {R} rows of blocks, from 0 to "
            f"the {len(indices)} indices"
        )
    owner, place = expand(count)
    width = int(count.max()) if R else 0
    index = torch.full((R, width), -1, dtype=torch.int64, device=indices.device)
    index[owner, place] = indices.long()
    return from_keys(index[None, None], Frame(Tq, Tk, tile, unit, causal, q_offset))


def _matrix(x: Any) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Row offsets, column indices and sizes of a BSR matrix of PyTorch or SciPy."""
    if isinstance(x, Tensor) and x.layout == torch.sparse_bsr and x.dim() == 2:
        begin, column, block = x.crow_indices(), x.col_indices(), x.values().shape[1:]
    elif getattr(x, "format", None) == "bsr":
        begin, column, block = torch.from_numpy(x.indptr), torch.from_numpy(x.indices), x.blocksize
    else:
        raise PlanError(
            f"expected indptr and indices, or a BSR matrix of SciPy or PyTorch, got {shape_of(x)}; "
            "other sparse matrices: Plan.from_sparse"
        )
    sizes = dict(zip(("Tq", "Tk", "tile", "unit"), (*x.shape, *block), strict=True))
    return begin, column, {name: int(n) for name, n in sizes.items()}

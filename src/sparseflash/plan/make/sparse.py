"""Plans from single pairs: sparse matrices of SciPy and PyTorch, without a dense mask in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import TILE, UNIT, Fields, check_options, host, is_length
from .masks import bit_lists, runs, span_lists

_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def from_sparse(mask: Any, *, tile: int = TILE, unit: int = UNIT) -> Fields:
    """Fields of `Plan.from_sparse`."""
    check_options(tile=tile, unit=unit)
    shape, at = _entries(mask)
    (*lead, Tq, Tk), (*place, q, k) = shape, at
    B, H = lead or (1, 1)
    head = place[0] * H + place[1] if place else torch.zeros_like(q)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        **of_pairs(head, q, k, (B, H), Tq=Tq, Tk=Tk, tile=tile, unit=unit),
    }


def _entries(mask: Any) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """Shape of a sparse matrix and the indices of its nonzero entries, int64 per axis."""
    if isinstance(mask, Tensor) and mask.layout in _LAYOUTS:
        coo = mask.detach().to_sparse() if mask.layout != torch.sparse_coo else mask.detach()
        at, value = coo._indices(), coo._values()
    elif hasattr(mask, "tocoo") and len(mask.shape) == 2:  # SciPy, matrix or array
        coo = mask.tocoo()
        at = torch.stack([torch.as_tensor(x, dtype=torch.int64) for x in (coo.row, coo.col)])
        value = torch.as_tensor(coo.data)
    else:
        given = f"a dense tensor {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise PlanError(
            f"mask is {given}: expected a sparse matrix of SciPy, or a sparse tensor (COO, CSR, CSC); "
            "for dense masks there is Plan.from_mask"
        )
    require(
        (
            len(mask.shape) in (2, 4) and value.dim() == 1 and (len(mask.shape) == 2 or mask.shape[1] > 0),
            lambda: (
                f"mask {list(mask.shape)}: expected [Tq, Tk], or sparse in all axes of [B|1, H|1, Tq, Tk]"
            ),
        ),
        (all(map(is_length, mask.shape[-2:])), lambda: f"mask {list(mask.shape)}: lengths are of 32 bits"),
        error=PlanError,
    )
    shape = tuple(int(n) for n in mask.shape)
    if at.numel() and host(at):
        inside = (at >= 0).all() and (at < torch.tensor(shape, device=at.device)[:, None]).all()
        require((bool(inside), lambda: f"mask {list(shape)} has entries outside"), error=PlanError)
    return shape, tuple(at[:, value != 0].long().unbind(0))


def of_pairs(
    head: Tensor, q: Tensor, k: Tensor, lists: tuple[int, int], *, Tq: int, Tk: int, tile: int, unit: int
) -> Fields:
    """Build lists [B,H,R] of exactly the pairs (list `b * H + h`, query row, key row), int64 [n] each.

    Each pair becomes one sortable number (block, row in the tile, lane in the unit), where block is
    (list * R + tile) * C + unit. E.g. tile = unit = 32, R = C = 2: pair (0, 33, 5) is block 2, row 1, lane 5.
    """
    R, C, words = -(-Tq // tile), -(-Tk // unit), -(-unit // 32)
    lanes = words * 32
    block = (head * R + q // tile) * C + k // unit
    pair = torch.unique(block * (tile * lanes) + q % tile * lanes + k % unit)  # sorted, without duplicates
    slot, owner, count = torch.unique_consecutive(
        pair // (tile * lanes), return_inverse=True, return_counts=True
    )
    cell, column = slot // C, slot % C
    rows = (Tq - cell % R * tile).clamp(max=tile)
    whole = count == rows * (Tk - column * unit).clamp(max=unit)
    lead = (*lists, R)
    span_cell, spans = runs(cell[whole], column[whole] * unit, (column[whole] + 1) * unit)
    row = (~whole).cumsum(0) - 1  # index of a partial slot's bits
    mine = ~whole[owner]
    inside = pair[mine] % (tile * lanes)
    bits = torch.zeros(len(slot) - int(whole.sum()), tile * words, dtype=torch.int64, device=pair.device)
    at = row[owner[mine]] * (tile * words) + inside // 32
    bits.view(-1).index_add_(0, at, torch.ones_like(at) << inside % 32)
    return {
        **span_lists(span_cell, spans.clamp(max=Tk), lead),
        **bit_lists(cell[~whole], column[~whole], [bits.view(-1, tile, words).to(torch.int32)], lead),
    }

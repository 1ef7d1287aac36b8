"""Packed sequences: tokens of a document see their own document only.

Tiles end where a document ends, so no list serves two documents, and nothing, not even a NaN, leaks from one
into another. The construction takes a few operations on one number per tile; `q_order` (and `q_pos`, if
queries and keys differ in number) are the only tables as long as the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import (
    INTEGERS,
    SHORT,
    TILE,
    UNIT,
    Fields,
    Window,
    check_options,
    fit,
    host,
    is_length,
    normal_window,
    shape_of,
)
from .spans import band_spans


def edges_of(x: object, name: str, total: int | None = None) -> Tensor:
    """Validate running totals of document lengths; int64 [n+1]. Values are read only on the CPU."""
    if not isinstance(x, Tensor) or x.dim() != 1 or x.shape[0] < 1:
        raise PlanError(f"{name}: expected a 1-d tensor [documents + 1], got {shape_of(x)}")
    require(
        (x.dtype in INTEGERS, lambda: f"{name} has dtype {x.dtype}: expected int32; try {name}.int()"),
        error=PlanError,
    )
    edges = x.long()
    if host(edges):
        first, last = int(edges[0]), int(edges[-1])
        require(
            (
                first == 0,
                lambda: f"{name} starts at {first}: expected 0, then running totals of document lengths",
            ),
            (
                bool((edges[1:] >= edges[:-1]).all()),
                lambda: (
                    f"{name} decreases: expected running totals of document lengths; "
                    f"lengths become them by torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
                ),
            ),
            (
                total is None or last <= total,
                lambda: f"{name} ends at {last}, but there are {total} tokens: expected at most that",
            ),
            (last <= SHORT.max, lambda: f"{name} ends at {last}: lengths are of 32 bits"),
            error=PlanError,
        )
        return edges
    return fit(edges, f"{name} holds", 0, SHORT.max if total is None else total)


def from_documents(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    Tq: int | None = None,
    Tk: int | None = None,
    causal: bool = True,
    include_self: bool = True,
    window: Window | None = None,
    tile: int = TILE,
    unit: int = UNIT,
) -> Fields:
    """Fields of `Plan.from_documents`."""
    for name, total in (("Tq", Tq), ("Tk", Tk)):
        if not (total is None or is_length(total)):  # lazy: a message would specialise a symbolic length
            raise PlanError(f"{name}={total!r}: expected an int >= 0 of 32 bits, or None")
    q = edges_of(cu_seqlens, "cu_seqlens", Tq)
    Tq = int(q[-1]) if Tq is None else Tq
    if cu_seqlens_k is None or cu_seqlens_k is cu_seqlens:
        k, Tk = q, Tq if Tk is None else Tk
    else:
        k = edges_of(cu_seqlens_k, "cu_seqlens_k", Tk)
        Tk = int(k[-1]) if Tk is None else Tk
        require(
            (
                len(q) == len(k),
                lambda: (
                    f"cu_seqlens tells of {len(q) - 1} documents, cu_seqlens_k of {len(k) - 1}: "
                    "expected as many "
                    "(one without queries, or without keys, has length 0)"
                ),
            ),
            (
                q.device == k.device,
                lambda: f"cu_seqlens is on {q.device}, cu_seqlens_k on {k.device}: use .to(device)",
            ),
            error=PlanError,
        )
    ends = (q[:-1], q[1:]) if k is q else (q[:-1], q[1:], k[:-1], k[1:])
    return from_ranges(
        *ends, Tq=Tq, Tk=Tk, causal=causal, include_self=include_self, window=window, tile=tile, unit=unit
    )


def tiles_of(q_begin: Tensor, q_end: Tensor, tile: int, Tq: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut the tokens `[q_begin, q_end)` of each document, int64 [n], into tiles; the last document is empty.

    Return the document of each tile, its first token and the end of its document, [R], and the token of each
    row, int32 [R, tile], -1 after the end. Surplus tiles (static R) belong to the last, empty document.
    Example, tile 4: documents [0, 5), [5, 7): tiles 0..3, 4, 5..6, so begin = 0, 4, 5 and end = 5, 5, 7.
    """
    tiles = (q_end - q_begin + (tile - 1)).div(tile, rounding_mode="floor")
    done = tiles.cumsum(0)
    # not on the CPU: no synchronisation, R is the most tiles that Tq tokens in so many documents can need
    R = int(done[-1]) if host(done) else Tq // tile + len(tiles) - 1
    r = torch.arange(R, device=done.device)
    document = torch.searchsorted(done, r, right=True).clamp(max=len(tiles) - 1)
    begin, end = (r - (done - tiles)[document]) * tile + q_begin[document], q_end[document]
    token = begin.int()[:, None] + torch.arange(tile, dtype=torch.int32, device=done.device)
    return document, begin, end, token.masked_fill_(token >= end[:, None], -1)


def from_ranges(
    q_begin: Tensor,
    q_end: Tensor,
    k_begin: Tensor | None = None,
    k_end: Tensor | None = None,
    *,
    Tq: int,
    Tk: int,
    causal: bool = False,
    include_self: bool = True,
    window: Window | None = None,
    tile: int = TILE,
    unit: int = UNIT,
) -> Fields:
    """Fields for documents of queries `[q_begin[i], q_end[i])` and keys `[k_begin[i], k_end[i])`, int64 [n].

    Without key ranges, keys are those of the queries. The last query of a document sits at the position of
    its last key. Ranges are disjoint; tokens outside all documents see nothing.
    """
    check_options(causal=causal, include_self=include_self, tile=tile, unit=unit)
    require(
        (
            causal or include_self,
            "include_self=False needs causal=True here: documents that see all but themselves are no ranges",
        ),
        error=PlanError,
    )
    window = normal_window(window)
    # append a document of length 0, which owns the surplus tiles
    q_begin, q_end = (torch.nn.functional.pad(x, (0, 1)) for x in (q_begin, q_end))
    same = k_begin is None or k_end is None
    if k_begin is not None and k_end is not None:
        k_begin, k_end = (torch.nn.functional.pad(x, (0, 1)) for x in (k_begin, k_end))
    else:
        k_begin, k_end = q_begin, q_end
    document, begin, end, token = tiles_of(q_begin, q_end, tile, Tq)
    live, last = begin < end, torch.minimum(begin + tile, end) - 1
    q_pos = None
    if not same:
        shift = k_end - q_end
        if (causal or window) and not (host(shift) and bool((shift == 0).all())):
            own = shift[document]
            begin, last = begin + own, last + own
            place = torch.zeros(Tq + 1, dtype=torch.int32, device=token.device)  # slot Tq takes empty lanes
            place[torch.where(token < 0, Tq, token).long()] = token + own.int()[:, None]
            q_pos = place[:Tq].view(1, 1, -1)
    low, high = k_begin[document], k_end[document]
    spans = band_spans(
        *(x.view(1, 1, -1) for x in (begin, last, low, high)),
        causal=causal,
        include_self=include_self,
        window=window,
        sink=0,
        live=live.view(1, 1, -1),
    )
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        "include_self": include_self,
        "window": window,
        "q_order": token.view(1, 1, -1),
        "q_pos": q_pos,
        **spans,
    }

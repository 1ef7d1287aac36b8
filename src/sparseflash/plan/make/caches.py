"""Key caches: sequences of different lengths in rows of their own, or in the pages of one pool.

In both, the queries are the last tokens of their sequence: query i of sequence b sits at position
`lengths[b] - Tq + i`, and sees what lies at its own position and before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import PlanError, require
from ..options import INTEGERS, TILE, Fields, fit, host, is_length, narrow, shape_of


def _numbers(x: object, name: str, shape: str, dims: int) -> None:
    if not isinstance(x, Tensor) or x.dim() != dims or x.dtype not in INTEGERS:
        given = f"{shape_of(x)} {x.dtype}" if isinstance(x, Tensor) else shape_of(x)
        raise PlanError(f"{name}: {given}; expected integers {shape}")


def _sizes(**sizes: object) -> None:
    for name, x in sizes.items():
        least = int(name == "page_size")
        require(
            (is_length(x, least), f"{name}={x!r}: expected an int >= {least}, of 32 bits"), error=PlanError
        )


def _lengths(lengths: Tensor, most: int, what: str) -> Tensor:
    _numbers(lengths, "lengths", "[B]: the keys in use of each sequence", 1)
    return fit(lengths, "lengths hold", 0, most, "expected 0..{most}, " + what).long()


def _reach(lengths: Tensor, Tq: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Tile, the offset [B] of the queries, and how many keys each tile's first and last query see [B,1,R]."""
    tile = min(max(Tq, 1), TILE)
    offset = lengths - Tq
    row = torch.arange(0, Tq, tile, device=lengths.device)
    first = offset[:, None, None] + row + 1
    last = (first + (tile - 1)).clamp(max=lengths[:, None, None]).clamp_(min=0)
    return tile, offset.int(), first.clamp(min=0), last


def from_lengths(lengths: Tensor, *, Tk: int, Tq: int = 1) -> Fields:
    """Fields of `Plan.from_lengths`."""
    _sizes(Tq=Tq, Tk=Tk)
    tile, offset, sure, seen = _reach(_lengths(lengths, Tk, "the keys there are"), Tq)
    lists, some = sure.shape, torch.ones_like(sure, dtype=torch.int32)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "causal": True,
        "q_offset": offset,
        "span_start": torch.arange(0, 2 * sure.numel(), 2, device=sure.device).view(lists),
        "span_full": some,
        "span_count": some + some,
        "spans": torch.stack([torch.zeros_like(sure), sure, sure, seen], -1).view(-1, 2).int(),
        "span_room": 2,
    }


def from_pages(block_table: Tensor, lengths: Tensor, *, page_size: int, Tk: int, Tq: int = 1) -> Fields:
    """Fields of `Plan.from_pages`."""
    _sizes(page_size=page_size, Tq=Tq, Tk=Tk)
    _numbers(block_table, "block_table", "[B, n]: the pages of each sequence, in order", 2)
    B, n = block_table.shape
    lengths = _lengths(lengths, n * page_size, f"the keys that {n} pages of {page_size} hold")
    require(
        (
            len(lengths) == B,
            f"block_table is for {B} sequences, lengths for {len(lengths)}: expected as many",
        ),
        (
            block_table.device == lengths.device,
            f"block_table is on {block_table.device}, lengths on {lengths.device}: use .to(device)",
        ),
        (
            Tk % page_size == 0,
            f"Tk={Tk} is no multiple of page_size={page_size}: expected the tokens of all pages of the pool",
        ),
        error=PlanError,
    )
    pages = block_table.long()
    tile, offset, sure, seen = _reach(lengths, Tq)
    order = torch.arange(n, device=pages.device)
    used = order * page_size < lengths[:, None]
    place = torch.full((Tk // page_size + 1,), -1, device=pages.device)
    if host(pages) and bool(used.any()):
        low, high = (int(x) for x in torch.aminmax(pages[used]))
        most = Tk // page_size
        require(
            (low >= 0 and high < most, f"block_table names pages {low}..{high}: there are 0..{most - 1}"),
            error=PlanError,
        )
    # where a page stands in its sequence: the same for all that share it
    place.scatter_(0, torch.where(used, pages, Tk // page_size).flatten(), order.expand(B, n).flatten())
    if host(pages):
        alike = place[torch.where(used, pages, 0)] == order
        require(
            (
                bool((alike | ~used).all()),
                "block_table: a page stands at different places of two sequences (or twice in one); pages "
                "are shared by sequences that begin alike",
            ),
            error=PlanError,
        )
    start = torch.arange(0, B * n, n, device=pages.device) if n else lengths.new_zeros(B)
    slot = torch.arange(page_size, device=pages.device)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": page_size,
        "causal": True,
        "q_offset": offset,
        "k_pos": (place[:-1, None] * page_size + slot).int().view(1, 1, Tk),
        "start": start[:, None, None].expand(sure.shape).contiguous(),
        "full": (sure.clamp(max=seen) // page_size).int(),
        "count": (-(-seen // page_size)).int(),
        "index": narrow(pages.flatten()),
    }

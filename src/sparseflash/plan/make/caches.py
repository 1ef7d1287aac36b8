"""KV caches: sequences of different lengths, contiguous (a row for each) or paged (pages of one pool).

In both, the queries are the last tokens of their sequence: query i of sequence b sits at position
`lengths[b] - Tq + i`, and sees the keys up to its own position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..bits import WORD
from ..options import (
    INTEGERS,
    TILE,
    Fields,
    Window,
    fit,
    host,
    is_count,
    is_length,
    narrow,
    normal_window,
    shape_of,
)
from .documents import edges_of, tiles_of


def _numbers(x: object, name: str, shape: str, dims: int) -> None:
    if not isinstance(x, Tensor) or x.dim() != dims or x.dtype not in INTEGERS:
        given = f"{shape_of(x)} {x.dtype}" if isinstance(x, Tensor) else shape_of(x)
        raise PlanError(f"{name}: {given}; expected integers {shape}")


def _sizes(**sizes: object) -> None:
    for name, x in sizes.items():
        least = int(name == "page_size")
        require(
            (is_length(x, least), lambda: f"{name}={x!r}: expected an int >= {least}, of 32 bits"),
            error=PlanError,
        )


def _lengths(lengths: Tensor, most: int, what: str) -> Tensor:
    _numbers(lengths, "lengths", "[B]: the keys in use of each sequence", 1)
    return fit(lengths, "lengths hold", 0, most, "expected 0..{most}, " + what).long()


def _reach(lengths: Tensor, Tq: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Tile size, query offset [B], and how many keys the first and last query of each tile see, [B,1,R]."""
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


class _Tiles(NamedTuple):
    """Query tiles, each of one sequence; tensors are [B,1,R].

    `of` is the sequence of a tile, `first` and `last` how many keys its first and its last query see; `first`
    is negative if the sequence is shorter than its queries.
    """

    Tq: int
    tile: int
    of: Tensor
    first: Tensor
    last: Tensor
    order: Tensor | None = None


def _rows(lengths: Tensor, Tq: int) -> _Tiles:
    """Tiles of the last Tq queries of each sequence, in a batch row per sequence."""
    tile = min(max(Tq, 1), TILE)
    row = torch.arange(0, Tq, tile, device=lengths.device)
    length = lengths[:, None, None]
    first = length - Tq + row + 1
    of = torch.arange(len(lengths), device=lengths.device)[:, None, None].expand(first.shape)
    return _Tiles(Tq, tile, of, first, torch.minimum(first + (tile - 1), length).clamp_(min=0))


def _packed(lengths: Tensor, Tq: int | None, cu_seqlens_q: Tensor) -> _Tiles:
    """Tiles of packed queries; the tile size is the mean number of queries of a sequence, at most TILE."""
    edges = edges_of(cu_seqlens_q, "cu_seqlens_q", Tq)
    require(
        (
            len(edges) == len(lengths) + 1,
            lambda: (
                f"cu_seqlens_q is for {len(edges) - 1} sequences, lengths for {len(lengths)}: "
                "expected as many"
            ),
        ),
        error=PlanError,
    )
    Tq = int(edges[-1]) if Tq is None else Tq
    tile = min(max(Tq // max(len(lengths), 1), 1), TILE)
    begin, end = (torch.nn.functional.pad(x, (0, 1)) for x in (edges[:-1], edges[1:]))
    of, start, stop, token = tiles_of(begin, end, tile, Tq)
    of = of.clamp(max=max(len(lengths) - 1, 0))
    first = lengths[of] - stop + start + 1
    last = torch.minimum(first + (tile - 1), lengths[of]).clamp(min=0)
    last = torch.where(start < stop, last, 0)
    of, first, last = (x.view(1, 1, -1) for x in (of, first, last))
    return _Tiles(Tq, tile, of, first, last, token.view(1, 1, -1))


def _first_pages(first_page: int | Tensor | None, like: Tensor, n: int) -> Tensor:
    """Validate the first visible page of each sequence, [B]."""
    if not isinstance(first_page, Tensor):
        fits = first_page is None or is_length(first_page)
        require(
            (fits, lambda: f"first_page={first_page!r}: expected an int >= 0, or integers [B]"),
            error=PlanError,
        )
        return torch.full_like(like, first_page or 0)
    _numbers(first_page, "first_page", "[B]: the page that each sequence begins with", 1)
    require(
        (
            len(first_page) in (1, len(like)) and first_page.device == like.device,
            lambda: (
                f"first_page: {shape_of(first_page)} on {first_page.device}; expected [{len(like)}] on "
                f"{like.device}"
            ),
        ),
        error=PlanError,
    )
    return fit(first_page, "first_page holds", 0, n).long().expand(len(like))


def _chosen(choice: Tensor, tiles: _Tiles, B: int, n: int) -> Tensor:
    """Expand the chosen pages to each tile, int64 [B,H,R,m]; -1 = none."""
    _numbers(choice, "choice", "[B, H, m]: pages of a sequence by their place in it, -1 = none", 3)
    require(
        (
            len(choice) == B and choice.shape[1] > 0 and choice.device == tiles.of.device,
            lambda: (
                f"choice: {shape_of(choice)} on {choice.device}; expected [{B}, H, m] on {tiles.of.device}"
            ),
        ),
        error=PlanError,
    )
    choice = fit(choice, "choice holds", -1, n - 1).long()
    if tiles.order is not None:
        return choice[tiles.of[0, 0]].transpose(0, 1)[None]
    return choice[:, :, None].expand(-1, -1, tiles.of.shape[2], -1)


def _check_pool(block_table: Tensor, lengths: Tensor, page_size: int, Tk: int) -> None:
    """Check that the table, the lengths and the size of the pool belong together."""
    B = len(block_table)
    require(
        (
            len(lengths) == B,
            lambda: f"block_table is for {B} sequences, lengths for {len(lengths)}: expected as many",
        ),
        (
            block_table.device == lengths.device,
            lambda: f"block_table is on {block_table.device}, lengths on {lengths.device}: use .to(device)",
        ),
        (
            Tk % page_size == 0,
            lambda: (
                f"Tk={Tk} is no multiple of page_size={page_size}: expected the tokens of all pages "
                "of the pool"
            ),
        ),
        error=PlanError,
    )


def _check_used(pages: Tensor, used: Tensor, most: int) -> None:
    """Check the used pages of lists `[..., n]`: they exist, and none occurs twice in a list."""
    there = pages[used]
    if not there.numel():
        return
    low, high = (int(x) for x in torch.aminmax(there))
    known = torch.where(used, pages, -1 - torch.arange(pages.shape[-1])).sort(-1).values
    require(
        (low >= 0 and high < most, lambda: f"block_table names pages {low}..{high}: there are 0..{most - 1}"),
        (
            not bool(((known[..., 1:] == known[..., :-1]) & (known[..., 1:] >= 0)).any()),
            "a page stands twice in what a sequence sees, and its keys would count twice: expected each page "
            "of block_table, and of choice, once (null pages lie beyond the length or before first_page)",
        ),
        error=PlanError,
    )


def _left(window: Window | None, sink_tokens: int) -> int | None:
    """The left side of a causal window, checked; None means unbounded."""
    require(
        (is_count(sink_tokens), lambda: f"sink_tokens={sink_tokens!r}: expected an int >= 0"),
        error=PlanError,
    )
    left, right = normal_window(window) or (None, None)
    require(
        (
            right in (None, 0),
            lambda: f"window={window!r}: the queries of a cache are its last tokens; expected (left, 0)",
        ),
        error=PlanError,
    )
    return left


def _near(tiles: _Tiles, begin: Tensor, page_size: int, left: int, sink_tokens: int, n: int) -> Tensor:
    """Pages, by their place, that hold the window of each tile or the first tokens; -1 = none.

    Example, page_size 4, tile 1, left 5, sink_tokens 2: the query at position 14 sees keys 9..14 and 0, 1,
    so pages 2, 3 and 0.
    """
    some = min((left + tiles.tile + page_size - 2) // page_size + 1, n)
    low = torch.maximum((tiles.first - 1 - left).clamp(min=0) // page_size, begin)[..., None]
    near = low + torch.arange(some, device=low.device)
    far = torch.arange(min(-(-sink_tokens // page_size), n), device=low.device).expand(*low.shape[:-1], -1)
    return torch.cat([far.masked_fill(far >= low, -1), near.masked_fill(near >= n, -1)], -1)


def _sorted(
    own: Tensor, tiles: _Tiles, begin: Tensor, page_size: int, left: int | None, sink_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pages [..., n], by place: full ones, partial ones, those that no query of the tile sees.

    The other two results count the full pages of each tile, and the full and partial ones together.
    """
    at = own * page_size
    listed = (own >= begin[..., None]) & (at < tiles.last[..., None])
    whole = at + page_size <= tiles.first[..., None]
    if left is not None:
        back = (tiles.first - 1 - left)[..., None]
        listed &= (at + page_size > back) | (at < sink_tokens)
        whole &= (at >= back + tiles.tile - 1) | (at + page_size <= sink_tokens)
    kind = torch.where(listed, (~whole).byte(), 2)
    order = kind.argsort(dim=-1, stable=True)
    return own.gather(-1, order), (kind == 0).sum(-1), (kind < 2).sum(-1)


def _before(end: Tensor, page: Tensor, page_size: int) -> Tensor:
    """Bits [..., n, rows, words] of pages [..., n]: each row has the keys before its `end [..., rows]`.

    Example, page_size 4: ends 6 and 7 of page 1 (keys 4..7) are bits 0b0011 and 0b0111.
    """
    word = torch.arange(0, page_size, WORD, device=page.device)
    keys = (end[..., None, :] - page[..., None] * page_size)[..., None] - word
    keys = torch.minimum(keys, page_size - word).clamp(0, WORD)
    return torch.where(keys == WORD, -1, (1 << keys.clamp(max=WORD - 1)) - 1).int()


def _bits(tiles: _Tiles, page: Tensor, page_size: int, left: int | None, sink_tokens: int) -> Tensor:
    """Bits [..., n, rows, words] of pages [..., n]: what each row of a tile sees of them."""
    end = tiles.first[..., None] + torch.arange(tiles.tile, device=page.device)
    bits = _before(end, page, page_size)
    if left is None:
        return bits
    far = ~_before(end - 1 - left, page, page_size)
    if sink_tokens:
        far |= _before(torch.full_like(end[..., :1], sink_tokens), page, page_size)
    return bits & far


def from_pages(
    block_table: Tensor,
    lengths: Tensor,
    *,
    page_size: int,
    Tk: int,
    Tq: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    choice: Tensor | None = None,
    first_page: int | Tensor | None = None,
    window: Window | None = None,
    sink_tokens: int = 0,
) -> Fields:
    """Fields of `Plan.from_pages`.

    Pages that all queries of a tile see are full units. Pages that hold the tile's own tokens, or an edge of
    its window, are partial, and bits encode what each query sees. The plan has no key positions, so its cost
    does not depend on the size of the pool, and a page may be at different places in two sequences. Example,
    page_size 4, length 10, 2 queries: first = 9, last = 10; pages 0 and 1 are full, page 2 (keys 8, 9) is
    partial, with bits 0b01 and 0b11.
    """
    _sizes(page_size=page_size, Tk=Tk, Tq=1 if Tq is None else Tq)
    _numbers(block_table, "block_table", "[B, n]: the pages of each sequence, in order", 2)
    B, n = block_table.shape
    lengths = _lengths(lengths, n * page_size, "the keys that its pages hold")
    _check_pool(block_table, lengths, page_size, Tk)
    first, left = _first_pages(first_page, lengths, n), _left(window, sink_tokens)
    if cu_seqlens_q is None:
        tiles = _rows(lengths, 1 if Tq is None else Tq)
    else:
        tiles = _packed(lengths, Tq, cu_seqlens_q)
    sure, seen = tiles.first.clamp(min=0) // page_size, -(-tiles.last // page_size)
    begin, most = first[tiles.of], (tiles.tile + page_size - 2) // page_size + 1
    if choice is None and left is None:
        begin = torch.minimum(begin, seen)
        full, count = torch.maximum(sure, begin).clamp_(max=seen) - begin, seen - begin
        start, index = tiles.of * n + begin, block_table.flatten()
        own = (begin + full)[..., None] + torch.arange(most, device=full.device)
    else:
        if choice is not None:
            own = _chosen(choice, tiles, B, n)
        else:
            assert left is not None
            own = _near(tiles, begin, page_size, left, sink_tokens, n)
        own, full, count = _sorted(own, tiles, begin, page_size, left, sink_tokens)
        if left is not None:
            most = 2 * most + int(sink_tokens % page_size > 0)
        m = own.shape[-1]
        start, most = _every(full, m), min(most, m)
        index = block_table[tiles.of[..., None], own.clamp(min=0)].flatten() if n else lengths.new_zeros(0)
        at = full[..., None] + torch.arange(most, device=full.device)
        own = own.gather(-1, at.clamp_(max=max(m - 1, 0)))
    if host(index):
        if choice is None and left is None:
            page = torch.arange(n)
            used = (page >= first[:, None]) & (page * page_size < lengths[:, None])
            _check_used(block_table, used, Tk // page_size)
        else:
            _check_used(index.view(*count.shape, m), torch.arange(m) < count[..., None], Tk // page_size)
    return {
        "Tq": tiles.Tq,
        "Tk": Tk,
        "tile": tiles.tile,
        "unit": page_size,
        "q_order": tiles.order,
        "start": start.contiguous(),
        "full": full.int(),
        "count": count.int(),
        "index": narrow(index),
        "bits": _bits(tiles, own, page_size, left, sink_tokens).flatten(0, -3),
        "bits_start": _every(full, most),
    }


def _every(like: Tensor, n: int) -> Tensor:
    """0, n, 2 n, ... in the shape of `like`: offsets of lists of capacity n."""
    return (torch.arange(like.numel(), device=like.device) * n).view(like.shape)

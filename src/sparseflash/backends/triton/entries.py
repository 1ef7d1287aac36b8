"""Statistics of list entries, diagonals and blocks: kernels that process one list entry at a time.

A program owns its results: one entry; or a band of diagonals, for which it searches every tile; or a block,
for which it searches the tiles that hold the block's queries. So no result is added to from two programs, and
memory is that of the results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    Rows,
    gathered,
    given_share,
    given_top,
    keys_at,
    keys_of,
    pairs,
    place,
    row_at,
    rows_of,
    rule_of,
)

FAR = tl.constexpr(1 << 30)
BLOCK = tl.constexpr(-1)
"""Value of BAND that asks for blocks instead of bands of diagonals."""


@triton.jit
def weights(Q, top, share, K, R, base, lane, live, word, origin, WORDS, F: tl.constexpr):
    """The weights of rows with a given norm on key rows base + lane; 0 where a row does not see the key."""
    k = keys_at(K.k, base, lane, K.k_row, K.k_lane, live, F.D, F.BD)
    x, keep, _ = pairs(Q, K, R, k, base, lane, live, word, origin, WORDS, F)
    return tl.where(keep, tl.exp2((x - top[:, None]) * R.factor) * share[:, None], 0.0)


@triton.jit
def span_range(SPANS, s, rows):
    """Key rows of span s."""
    return tl.maximum(tl.load(SPANS + 2 * s), 0), tl.minimum(tl.load(SPANS + 2 * s + 1), rows)


@triton.jit
def unit_range(INDEX, p, full, rows, F: tl.constexpr):
    """Key rows of the unit at place p of the index, and its index among the list's partial units (or -1)."""
    lo = tl.load(INDEX + p) * F.UNIT
    return tl.maximum(lo, 0), tl.minimum(lo + F.UNIT, rows), tl.where(p < full, -1, p - full)


@triton.jit
def mine(slot, count, BAND: tl.constexpr):
    """Range of a list's entries that a program processes: that in its slot, if any; with a BAND all."""
    if BAND != 0:
        return 0, count
    return tl.minimum(tl.maximum(slot, 0), count), tl.minimum(tl.maximum(slot + 1, 0), count)


@triton.jit
def over_range(total, Q, token, top, share, K, R, lo, hi, word, origin, WORDS, first, order, limit,
               BAND: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Add the weights of key rows lo..hi to `total`: by lane, or with a BAND by diagonal.

    Diagonal i of a band is where query token - key token is `first` + i, for key tokens below `limit`; for
    a BLOCK the keys are the tokens `first` to `limit` - 1.
    """
    CUT: tl.constexpr = F.CUT
    lane = tl.arange(0, CUT)
    for t in tl.range(lo, hi, CUT, num_stages=1):
        live = t + lane < hi
        if BAND == BLOCK and F.KEY_ORDER:
            key = tl.load(K.order + t + lane, mask=live, other=-1)
            live = live & (key >= first) & (key < limit)
        if BAND <= 0:
            p = weights(Q, top, share, K, R, t, lane, live, word, origin, WORDS, F)
            total = gathered(total, p, 0, F)
        else:
            key = t + lane
            if F.KEY_ORDER:
                key = tl.load(K.order + key, mask=live, other=-1)
            live = live & (key >= 0)
            newest = tl.max(tl.where(Q.real, token, -FAR), 0) - tl.min(tl.where(live, key, FAR), 0)
            oldest = tl.min(tl.where(Q.real, token, FAR), 0) - tl.max(tl.where(live, key, -FAR), 0)
            if (newest >= first) & (oldest < first + BAND):
                p = weights(Q, top, share, K, R, t, lane, live, word, origin, WORDS, F)
                wanted = token[:, None] - first - tl.arange(0, BAND)[None, :]
                some = Q.real[:, None] & (wanted >= 0) & (wanted < limit)
                row = wanted
                if F.KEY_ORDER:
                    row = tl.load(order + wanted, mask=some, other=-1)
                some = some & (row >= t) & (row < t + CUT)
                shares = tl.gather(p, tl.where(some, row - t, 0), 1)
                total = gathered(total, tl.where(some, shares, 0.0), 0, F)
    return total


@triton.jit
def entries_kernel(
    Q, K, TOP, REST, OUT, SPANS, UNITS, TOKENS, KEYS, BIAS, RULE, ROW_OF, N, width, block_tile, block_unit,
    BAND: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """OUT [B,H,width]: a value per list entry, `width // tiles` per tile; or per diagonal, BAND per program.

    With BAND = BLOCK: a value per block of `block_tile` by `block_unit` tokens. ROW_OF is a table of the key
    row of each token, if keys have an order. Example, BAND 64, Tq = Tk = 100: width 199, 4 programs a head;
    program 1 has `first` = 64 - 99 = -35, diagonals -35 to 28, which are OUT[64:128].
    """
    BM: tl.constexpr = F.BM
    CUT: tl.constexpr = F.CUT
    PARTS: tl.constexpr = (F.TILE + F.BM - 1) // F.BM
    H, Tk, k_rows, tiles = N.H, N.Tk, N.k_rows, N.tiles
    owned = width if BAND <= 0 else (width + BAND - 1) // BAND
    bh, own = tl.program_id(0) // owned, tl.program_id(0) % owned
    b, h = bh // H, bh % H
    R = rule_of(RULE, h, H, F)
    facts = place(b, h, H, KEYS.heads, KEYS.batch, k_rows)
    kv = (h * N.KV // H).to(tl.int64)
    head = keys_of(K, K, KEYS, row_at(BIAS, b, h, H, Tk), b.to(tl.int64), kv, facts, k_rows)
    order = row_at(ROW_OF, b, h, H, Tk)
    state = bh.to(tl.int64) * N.Tq
    of_spans = place(b, h, H, SPANS.heads, SPANS.batch, tiles)
    of_units = place(b, h, H, UNITS.heads, UNITS.batch, tiles)
    total = tl.zeros([CUT if BAND <= 0 else BAND], tl.float32)
    first, slot, down, limit = 0, 0, 0, Tk
    if BAND == 0:
        per = width // tiles
        tile_from, slot = own // per, own % per
        tile_to = tile_from + 1
    elif BAND == BLOCK:
        units = (Tk + block_unit - 1) // block_unit
        down, first = own // units, own % units * block_unit
        limit = first + block_unit
        tile_from, tile_to = 0, tiles
        if not F.QUERY_ORDER:
            tile_from = down * block_tile // F.TILE
            tile_to = tl.minimum((down * block_tile + block_tile + F.TILE - 1) // F.TILE, tiles)
    else:
        tile_from, tile_to = 0, tiles
        first = own * BAND - (Tk - 1)
    for part in range(tile_from * PARTS, tile_to * PARTS):
        tile = part // PARTS
        rows, token = rows_of(TOKENS, Q, b, h, tile, part % PARTS, N, BM, F)
        if BAND == BLOCK:
            mine_too = rows.real & (token // block_tile == down)
            rows = Rows(
                rows.q, rows.do, rows.delta, rows.share, mine_too, rows.pos, rows.seg, rows.within, rows.q
            )  # fmt: skip
        top, _ = given_top(TOP + state, token, rows.real)
        share = given_share(REST + state, token, rows.real)
        # where key rows are tokens, only rows low .. high can lie on the band
        low, high = 0, k_rows
        if BAND > 0 and not F.KEY_ORDER:
            low = tl.maximum(tl.min(tl.where(rows.real, token, FAR), 0) - first - BAND + 1, 0)
            high = tl.minimum(tl.max(tl.where(rows.real, token, -FAR), 0) - first + 1, k_rows)
        if BAND == BLOCK and not F.KEY_ORDER:
            low, high = first, tl.minimum(limit, k_rows)
        spans = 0
        if F.SPANS:
            start, spans = tl.load(SPANS.start + of_spans + tile), tl.load(SPANS.count + of_spans + tile)
            begun, ended = mine(slot, spans, BAND)
            for s in range(start + begun, start + ended):
                lo, hi = span_range(SPANS.at, s, k_rows)
                begin, end = tl.maximum(lo, low), tl.minimum(hi, high)
                total = over_range(total, rows, token, top, share, head, R, begin, end, -1, lo, UNITS.words,
                                   first, order, limit, BAND, F)  # fmt: skip
        if F.UNITS:
            start, count = tl.load(UNITS.start + of_units + tile), tl.load(UNITS.count + of_units + tile)
            words = UNITS.words
            if F.BITS:
                words += tl.load(UNITS.words_start + of_units + tile) * (F.TILE * ((F.UNIT + 31) // 32))
            full = start + tl.load(UNITS.full + of_units + tile)
            begun, ended = mine(slot - spans, count, BAND)
            for p in range(start + begun, start + ended):
                lo, hi, word = unit_range(UNITS.index, p, full, k_rows, F)
                begin, end = tl.maximum(lo, low), tl.minimum(hi, high)
                total = over_range(total, rows, token, top, share, head, R, begin, end, word, lo, words,
                                   first, order, limit, BAND, F)  # fmt: skip
    to = OUT + bh.to(tl.int64) * width
    if BAND <= 0:
        tl.store(to + own, tl.max(total, 0) if F.PEAK else tl.sum(total, 0))
    else:
        at = own * BAND + tl.arange(0, BAND)
        tl.store(to + at, total, mask=at < width)

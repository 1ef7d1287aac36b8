"""The kernel over query rows: the forward, dQ, and statistics of rows. A program has BM rows of one tile.

It walks the tile's keys, spans before units, one chunk of BN keys at a time. Chunks of full entries are not
tested; partial entries, and remainders of full ones, are tested by every rule that the plan has. Rules that
a plan does not have are compile-time switches that are off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LN2,
    NEVER,
    Rows,
    apart,
    dot,
    gathered,
    given_share,
    given_top,
    head_at,
    key_facts,
    keys_of,
    load_rows,
    logits,
    place,
    query_facts,
    row_at,
    rule_of,
    store_rows,
    visible,
)
from .dropout import Draw, stays, words_at


@triton.jit
def values_at(K, base, lane, live, RULES: tl.constexpr, NEAR: tl.constexpr, F: tl.constexpr):
    """Load rows base + lane of V; NEAR: the rows are consecutive."""
    if NEAR:
        at = base * tl.full([], 1, tl.int64)
        v = load_rows(K.v + at * K.v_row, lane, K.v_row, K.v_lane, live, F.DV, F.BDV, RULES)
    else:
        v = load_rows(K.v, (base + lane).to(tl.int64), K.v_row, K.v_lane, live, F.DV, F.BDV, RULES)
    return v


@triton.jit
def chunk(acc, m, mass, gone, Q, K, R, X, base, lane, live, bits, RULES: tl.constexpr, NEAR: tl.constexpr,
          BACKWARD: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Process key rows base + lane: the online softmax, or BACKWARD (m: top of the norm) their part of dQ.

    With STATS (m: the top too) their weights join `mass`. With SKIP the chunk is dropped if every row's
    largest x lies more than R.below under its largest so far; `gone` counts chunks, plus 2^32 if skipped.
    """
    n = base + lane
    if NEAR:
        at = base * tl.full([], 1, tl.int64)
        k = load_rows(K.k + at * K.k_row, lane, K.k_row, K.k_lane, live, F.D, F.BD, RULES)
    else:
        at = n.to(tl.int64)
        k = load_rows(K.k, at, K.k_row, K.k_lane, live, F.D, F.BD, RULES)
    if not F.STATS and not F.SKIP:
        v = values_at(K, base, lane, live, RULES, NEAR, F)
    if RULES or F.BIAS or F.DROP or F.ALIBI:
        token, pos, end, seg = key_facts(K, n, live, F)
    bias = R.factor
    if F.BIAS:
        bias = tl.load(K.bias + token, mask=token >= 0, other=0.0)[None, :]
    s = dot(Q.q, tl.trans(k))
    if F.TAIL:
        rest = load_rows(
            K.k + F.BD * K.k_lane, n.to(tl.int64), K.k_row, K.k_lane, live, F.D - F.BD, F.TAIL, True
        )
        s = dot(Q.tail, tl.trans(rest), s)
    x, bent = logits(s, bias, R, F)
    if F.ALIBI:
        x -= X.slope * apart(Q.pos[:, None], pos[None, :], F)
    if RULES:
        real = Q.real[:, None] & (token >= 0)[None, :] & (bits != 0)
        keep = visible(real, Q.pos[:, None], Q.seg[:, None], pos[None, :], end[None, :], seg[None, :], R, F)
        x = tl.where(keep, x, NEVER)
        # K or V of a key that no row sees may be NaN or infinite: zero it, so that 0 * x is 0
        seen = (tl.max(x, 0) != NEVER)[:, None]
        if BACKWARD:
            k = tl.where(seen, k, 0.0)
        elif not F.STATS and not F.SKIP:
            v = tl.where(seen, v, 0.0)
    if F.STATS:
        mass = gathered(mass, tl.exp2((x - m[:, None]) * R.factor) * Q.share[:, None], 1, F)
    elif BACKWARD:
        p = tl.exp2((x - m[:, None]) * R.factor) * Q.share[:, None]
        of_weights = dot(Q.do, tl.trans(v))
        if F.DROP:
            of_weights = tl.where(stays(X, token, token >= 0), of_weights * X.scale, 0.0)
        ds = p * (of_weights - Q.delta[:, None])
        if F.SOFTCAP:
            ds *= 1.0 - bent * bent
        if RULES:
            ds = tl.where(p == 0.0, 0.0, ds)
        acc = dot(ds.to(k.dtype), k, acc)
    elif F.SKIP:
        top = tl.max(x, 1)
        now = tl.maximum(m, top)
        # reduced as matrices: Triton 3.7 on Blackwell cannot reduce to a scalar a vector from a matrix
        some = tl.max(tl.where(Q.real & (top != NEVER), 1, 0)[:, None])
        counts = tl.max(tl.where(Q.real & (top != NEVER) & (top >= now - R.below), 1, 0)[:, None])
        gone += some.to(tl.int64) + ((some - counts).to(tl.int64) << 32)
        if counts > 0:
            v = values_at(K, base, lane, live, RULES, NEAR, F)
            if RULES:
                v = tl.where((tl.max(x, 0) != NEVER)[:, None], v, 0.0)
            level = tl.where(now == NEVER, 0.0, now)
            p = tl.exp2((x - level[:, None]) * R.factor)
            shrink = tl.exp2((m - level) * R.factor)
            acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
            mass = mass * shrink + tl.sum(p, 1)
            m = now
    else:
        now = tl.maximum(m, tl.max(x, 1))
        level = now
        if RULES or F.BIAS:
            level = tl.where(now == NEVER, 0.0, now)
        p = tl.exp2((x - level[:, None]) * R.factor)
        shrink = tl.exp2((m - level) * R.factor)
        left = p
        if F.DROP:
            left = tl.where(stays(X, token, token >= 0), p, 0.0)
        acc = dot(left.to(v.dtype), v, acc * shrink[:, None])
        mass = mass * shrink + tl.sum(p, 1)  # after the product: before it, one register too many is live
        m = now
    return acc, m, mass, gone


@triton.jit
def span_at(SPANS, s, rows, piece, pieces, SPLIT: tl.constexpr, BN: tl.constexpr):
    """Bounds of span s; SPLIT: of this program's piece of it, a multiple of BN but for the last piece."""
    # bounds are clamped: whatever a plan says, nothing outside the keys is read
    lo, hi = tl.maximum(tl.load(SPANS + 2 * s), 0), tl.minimum(tl.load(SPANS + 2 * s + 1), rows)
    if SPLIT:
        share = (tl.maximum(hi - lo, 0) + pieces * BN - 1) // (pieces * BN) * BN
        lo += piece * share
        hi = tl.minimum(hi, lo + share)
    return lo, hi


@triton.jit
def over_spans(acc, m, mass, gone, Q, K, R, X, SPANS, first, full, last, piece, pieces,
               SPLIT: tl.constexpr, BACKWARD: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Process spans first..last: whole chunks of spans before `full` untested, the rest CUT at a time."""
    BN: tl.constexpr = F.BN
    CUT: tl.constexpr = F.CUT
    wide, lane = tl.arange(0, BN), tl.arange(0, CUT)
    if SPLIT:  # spans are dealt out whole if there are as many as pieces, else each is cut
        many = last - first >= pieces
        share = (last - first + pieces - 1) // pieces
        begin = first + tl.where(many, piece * share, 0)
        last = tl.where(many, tl.minimum(last, begin + share), last)
        first, full = begin, tl.maximum(tl.minimum(full, last), begin)
        piece, pieces = tl.where(many, 0, piece), tl.where(many, 1, pieces)
    for s in range(first, full):
        lo, hi = span_at(SPANS, s, K.rows, piece, pieces, SPLIT, BN)
        for t in tl.range(lo, lo + (hi - lo) // BN * BN, BN, num_stages=F.STAGES):
            acc, m, mass, gone = chunk(
                acc, m, mass, gone, Q, K, R, X, t, wide, wide >= 0, 1, False, True, BACKWARD, F
            )
    for s in range(first, last):
        lo, hi = span_at(SPANS, s, K.rows, piece, pieces, SPLIT, BN)
        lo = tl.where(s < full, lo + tl.maximum(hi - lo, 0) // BN * BN, lo)
        for t in tl.range(lo, hi, CUT, num_stages=1):
            acc, m, mass, gone = chunk(
                acc, m, mass, gone, Q, K, R, X, t, lane, t + lane < hi, 1, True, True, BACKWARD, F
            )
    return acc, m, mass, gone


@triton.jit
def unit_rows(INDEX, p, last, rows, F: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr):
    """Chunk p of a list of units: list entries, lanes in the unit, key rows (base + lane), which are live.

    A unit takes WIDE lanes: UNIT if it fills a chunk, else UNIT_LANES. Example, BN 64: with UNIT 16, chunk
    p = 8 is entries 8 to 11, 16 lanes each; with UNIT 128, chunk p = 17 is the second half of entry 8.
    """
    PARTS: tl.constexpr = (WIDE + BN - 1) // BN
    lane = tl.arange(0, BN)
    slot = p // PARTS + lane // WIDE
    inside = p % PARTS * BN + lane % WIDE
    if WIDE >= BN:
        base = tl.load(INDEX + p // PARTS) * F.UNIT + p % PARTS * BN
    else:
        base = tl.load(INDEX + slot, mask=slot < last, other=0) * F.UNIT + lane % WIDE - lane
    n = base + lane
    live = (slot < last) & (n >= 0) & (n < rows)
    if F.UNIT % BN != 0 and BN % F.UNIT != 0:
        live = live & (inside < F.UNIT)
    return slot, inside, base, lane, live


@triton.jit
def over_units(acc, m, mass, gone, Q, K, R, X, INDEX, WORDS, first, full, last, piece, pieces,
               SPLIT: tl.constexpr, BACKWARD: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Process units first..last of the index: those before `full` in whole untested chunks, then the rest."""
    BN: tl.constexpr = F.BN
    CUT: tl.constexpr = F.CUT
    WIDE: tl.constexpr = F.UNIT if F.UNIT >= BN else F.UNIT_LANES
    PARTS: tl.constexpr = (WIDE + BN - 1) // BN
    PER: tl.constexpr = (BN + WIDE - 1) // WIDE
    NEAR: tl.constexpr = WIDE >= BN
    sure = full
    if SPLIT:
        share = (last - first + pieces - 1) // pieces
        first += piece * share
        last = tl.minimum(last, first + share)
        sure = tl.maximum(tl.minimum(full, last), first)
    whole = first + (sure - first) // PER * PER
    if F.UNIT % BN != 0 and BN % F.UNIT != 0:  # every chunk has lanes without a key
        whole = first
    for p in tl.range(first * PARTS, whole * PARTS, PER, num_stages=F.STAGES):
        _, _, base, lane, live = unit_rows(INDEX, p, whole, K.rows, F, BN, WIDE)
        base = tl.maximum(tl.minimum(base, K.rows - (BN if NEAR else 1 + lane)), 0 if NEAR else -lane)
        acc, m, mass, gone = chunk(
            acc, m, mass, gone, Q, K, R, X, base, lane, live, 1, False, NEAR, BACKWARD, F
        )
    WIDE_CUT: tl.constexpr = F.UNIT if F.UNIT >= CUT else F.UNIT_LANES
    CUTS: tl.constexpr = (WIDE_CUT + CUT - 1) // CUT
    PER_CUT: tl.constexpr = (CUT + WIDE_CUT - 1) // WIDE_CUT
    ONE: tl.constexpr = WIDE_CUT >= CUT
    W: tl.constexpr = (F.UNIT + 31) // 32
    for p in tl.range(whole * CUTS, last * CUTS, PER_CUT, num_stages=1):
        slot, inside, base, lane, live = unit_rows(INDEX, p, last, K.rows, F, CUT, WIDE_CUT)
        bits = 1
        if F.BITS:
            if ONE and CUT <= 32:  # one word holds a row's bits for the whole chunk
                entry = p // CUTS
                at = ((entry - full) * F.TILE + Q.within) * W + p % CUTS * CUT // 32
                word = tl.load(WORDS + at, mask=(entry >= full) & Q.real, other=-1)[:, None]
            else:
                tested = live & (slot >= full)
                at = ((slot - full)[None, :] * F.TILE + Q.within[:, None]) * W + (inside // 32)[None, :]
                word = tl.load(WORDS + at, mask=tested[None, :] & Q.real[:, None], other=-1)
            bits = (word >> (inside % 32)[None, :]) & 1
        acc, m, mass, gone = chunk(
            acc, m, mass, gone, Q, K, R, X, base, lane, live, bits, True, ONE, BACKWARD, F
        )
    return acc, m, mass, gone


@triton.jit
def rows_kernel(
    Q, K, V, OUT, DOUT, LSE, TOP, REST, DELTA, SPANS, UNITS, TOKENS, KEYS, BIAS, RULE, DRAW, N, scale, blocks,
    GONE, WORK, SPLIT: tl.constexpr, BACKWARD: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """OUT, LSE and norm of BM rows; with BACKWARD their dQ (in OUT), from DOUT, the given norm and DELTA.

    With STATS the sum or maximum of their weights (in OUT, [B,H,Tq]) under the given norm.
    With SKIP also GONE [programs]: the number of chunks seen, plus 2^32 per skipped one.
    With SPLIT several programs share the keys of the rows. WORK [programs, 3] has a program's list, piece,
    and the list's number of pieces; each program has its own OUT [rows, DV], TOP and REST [rows].
    """
    pid, piece, pieces = tl.program_id(0), 0, 1
    H, tiles = N.H, N.tiles
    if SPLIT:
        work = WORK + pid // blocks * 3
        cell, piece, pieces = tl.load(work), tl.load(work + 1), tl.load(work + 2)
        bh, at = cell // tiles, cell % tiles * blocks + pid % blocks
    else:
        bh, at = (
            pid // (tiles * blocks),
            tiles * blocks - 1 - pid % (tiles * blocks),
        )  # the longest rows first
    tile = at // blocks
    b, h = bh // H, bh % H
    within = at % blocks * F.BM + tl.arange(0, F.BM)
    real, token, pos, seg = query_facts(TOKENS, b, h, tile, within, N, F)
    R = rule_of(RULE, h, H, F)

    b64, h64, kv = b.to(tl.int64), h.to(tl.int64), (h * N.KV // H).to(tl.int64)
    state = bh.to(tl.int64) * N.Tq + token
    of_head = head_at(Q, b64, h64)
    q = load_rows(of_head, token.to(tl.int64), Q.row, Q.lane, real, F.D, F.BD, True)
    tail = q
    if F.TAIL:
        lanes = of_head + F.BD * Q.lane
        tail = load_rows(lanes, token.to(tl.int64), Q.row, Q.lane, real, F.D - F.BD, F.TAIL, True)
    BM: tl.constexpr = F.BM
    WIDTH: tl.constexpr = 16 if F.STATS else F.BD if BACKWARD else F.BDV
    acc = tl.zeros([BM, WIDTH], tl.float32)
    m = tl.full([BM], NEVER, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    gone = tl.full([], 0, tl.int64)
    do, delta, share = q, mass, mass
    if BACKWARD or F.STATS:
        m, seen = given_top(TOP, state, real)
        share = given_share(REST, state, real)
    if BACKWARD:
        do = load_rows(
            head_at(DOUT, b64, h64), token.to(tl.int64), DOUT.row, DOUT.lane, seen, F.DV, F.BDV, True
        )
        delta = tl.load(DELTA + state, mask=seen, other=0.0)
    rows = Rows(q, do, delta, share, real, pos, seg, within, tail)
    facts = place(b, h, H, KEYS.heads, KEYS.batch, N.k_rows)
    head = keys_of(K, V, KEYS, row_at(BIAS, b, h, H, N.Tk), b64, kv, facts, N.k_rows)

    first_word, second_word = token, token
    if F.DROP:
        first_word, second_word = words_at(DRAW.queries + bh.to(tl.int64) * N.Tq * 2, token, real)
    slope = RULE.factor
    if F.ALIBI:
        slope = tl.load(DRAW.slopes + b * DRAW.slopes_batch + h)
    of_keys = DRAW.keys + bh.to(tl.int64) * N.Tk * 2
    draw = Draw(first_word, second_word, of_keys, DRAW.bar, DRAW.kept, slope)

    if F.SPANS:
        cell = place(b, h, H, SPANS.heads, SPANS.batch, tiles) + tile
        first = tl.load(SPANS.start + cell)
        full, last = first + tl.load(SPANS.full + cell), first + tl.load(SPANS.count + cell)
        acc, m, mass, gone = over_spans(acc, m, mass, gone, rows, head, R, draw, SPANS.at, first, full, last,
                                        piece, pieces, SPLIT, BACKWARD, F)  # fmt: skip
    if F.UNITS:
        cell = place(b, h, H, UNITS.heads, UNITS.batch, tiles) + tile
        first = tl.load(UNITS.start + cell)
        full, last = first + tl.load(UNITS.full + cell), first + tl.load(UNITS.count + cell)
        words = UNITS.words
        if F.BITS:
            words += tl.load(UNITS.words_start + cell) * (F.TILE * ((F.UNIT + 31) // 32))
        acc, m, mass, gone = over_units(acc, m, mass, gone, rows, head, R, draw, UNITS.index, words, first,
                                        full, last, piece, pieces, SPLIT, BACKWARD, F)  # fmt: skip

    base, row = head_at(OUT, b64, h64), token
    if SPLIT:
        own = (pid // blocks).to(tl.int64) * OUT.batch
        base, row, state = OUT.at + own, within, own // F.DV + within
    if F.STATS:
        tl.store(OUT.at + state, mass, mask=real)
    elif BACKWARD:
        store_rows(base, row, OUT.row, OUT.lane, real, acc * scale, F.D, F.BD)
    else:
        some = mass > 0
        total = tl.where(some, mass, 1.0)
        if F.DROP:
            acc *= DRAW.kept
        store_rows(base, row, OUT.row, OUT.lane, real, acc / total[:, None], F.DV, F.BDV)
        rest = tl.log2(total) * LN2
        tl.store(TOP + state, tl.where(some, m, NEVER), mask=real)
        tl.store(REST + state, rest, mask=real)
        if F.SKIP:
            tl.store(GONE + pid, gone)
        if not SPLIT:
            unit = 1.0 if F.BENT else scale
            tl.store(LSE + state, tl.where(some, m * unit + rest, NEVER), mask=real)

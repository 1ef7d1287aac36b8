"""The kernel over keys: dK, dV, the gradient of key_bias, statistics. A program has BN key rows of one head.

It walks the query tiles that visit its keys, head by head of the group that shares them, in the order of the
transposed lists. Only one program adds to a result: no atomics, no locks, and results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
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


class Queries(NamedTuple):
    """Addresses of a head's queries, and of what the backward has for them."""

    q: Any
    q_row: Any
    q_lane: Any
    do: Any
    do_row: Any
    do_lane: Any
    top: Any
    rest: Any
    delta: Any


class Columns(NamedTuple):
    """A program's keys: matrices [BN, BD] and [BN, BDV], and the values that the rules test."""

    k: Any
    v: Any
    n: Any
    token: Any
    pos: Any
    end: Any
    seg: Any
    bias: Any


@triton.jit
def take(dk, dv, db, C, Q, T, R, X, b, h, tile, part, live, WORDS, word, inside, N,
         RULES: tl.constexpr, BITS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Add what BM rows of a tile (CUT with RULES) give to the keys; with S^T, dK and dV are plain products.

    With STATS only their weights are added, to db.
    """
    BM: tl.constexpr = F.CUT if RULES else F.BM
    within = part * BM + tl.arange(0, BM)
    real, token, pos, seg = query_facts(T, b, h, tile, within, N, F)
    top, real = given_top(Q.top, token, real)
    at = token.to(tl.int64)
    q = load_rows(Q.q, at, Q.q_row, Q.q_lane, real, F.D, F.BD, True)
    if not F.STATS and F.ONLY != "dk":
        do = load_rows(Q.do, at, Q.do_row, Q.do_lane, real, F.DV, F.BDV, True)
    x, bent = logits(dot(C.k, tl.trans(q)), C.bias, R, F)
    if F.ALIBI:
        x -= X.slope * apart(pos[None, :], C.pos[:, None], F)
    share = given_share(Q.rest, token, real)
    p = tl.exp2((x - top[None, :]) * R.factor) * share[None, :]  # 0 in lanes without a query
    if RULES:
        keep = real[None, :] & (live & (C.token >= 0))[:, None]
        if BITS:
            W: tl.constexpr = (F.UNIT + 31) // 32
            tested = live & (word >= 0)
            place_of = (word[:, None] * F.TILE + within[None, :]) * W + (inside // 32)[:, None]
            bits = tl.load(WORDS + place_of, mask=tested[:, None] & real[None, :], other=-1)
            keep = keep & (((bits >> (inside % 32)[:, None]) & 1) != 0)
        keep = visible(
            keep, pos[None, :], seg[None, :], C.pos[:, None], C.end[:, None], C.seg[:, None], R, F
        )  # fmt: skip
        p = tl.where(keep, p, 0.0)
    if F.STATS:
        db = gathered(db, p, 1, F)
    else:
        if F.ONLY != "dk":
            left = p
            if F.DROP:
                left = tl.where(stays(X, token, real), p * X.scale, 0.0)
            dv = dot(left.to(do.dtype), do, dv)
        if F.ONLY != "dv":
            if F.ONLY == "dk":
                do = load_rows(Q.do, at, Q.do_row, Q.do_lane, real, F.DV, F.BDV, True)
            delta = tl.load(Q.delta + token, mask=real, other=0.0)  # loaded late: before, registers are short
            of_weights = dot(C.v, tl.trans(do))
            if F.DROP:
                of_weights = tl.where(stays(X, token, real), of_weights * X.scale, 0.0)
            ds = p * (of_weights - delta[None, :])
            if RULES:
                ds = tl.where(p == 0.0, 0.0, ds)  # a key that no row sees may be NaN or infinite
            if F.BIAS:
                db += tl.sum(ds, 1)
            if F.SOFTCAP:
                ds *= 1.0 - bent * bent
                if RULES:
                    ds = tl.where(p == 0.0, 0.0, ds)
            dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv, db


@triton.jit
def columns_kernel(
    Q, K, V, DOUT, TOP, REST, DELTA, DK, DV, DBIAS, SPANS, SPANNED, UNITS, UNITED, TOKENS, KEYS, BIAS, RULE,
    DRAW, N, scale, columns, GROUP: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """DK and DV of BN key rows of packed head kv, and DBIAS of each query head that reads them.

    With STATS only DBIAS: the sum or maximum of the weights on each key. Example, BN 64: with UNIT 16 a
    reader has MEMBERS = 4 units, lanes 16 to 31 are member 1; with UNIT 128 columns 2 and 3 share group 1.
    """
    pid = tl.program_id(0)
    H = N.H
    column, bk = pid % columns, pid // columns
    b, kv = bk // N.KV, bk % N.KV
    BN: tl.constexpr = F.BN
    BD: tl.constexpr = F.BD
    BDV: tl.constexpr = F.BDV
    MEMBERS: tl.constexpr = (F.BN + F.PART - 1) // F.PART
    PARTS: tl.constexpr = (F.TILE + F.BM - 1) // F.BM
    CUTS: tl.constexpr = (F.TILE + F.CUT - 1) // F.CUT
    lane = tl.arange(0, BN)
    n = column * BN + lane
    live = n < N.k_rows
    b64, kv64 = b.to(tl.int64), kv.to(tl.int64)
    first_head, heads = kv * (H // N.KV), H // N.KV
    facts = place(b, first_head, H, KEYS.heads, KEYS.batch, N.k_rows)
    head = keys_of(K, V, KEYS, BIAS.at, b64, kv64, facts, N.k_rows)
    at = n.to(tl.int64)
    k = load_rows(head.k, at, K.row, K.lane, live, F.D, F.BD, True)
    v = k if F.STATS or F.ONLY == "dv" else load_rows(head.v, at, V.row, V.lane, live, F.DV, F.BDV, True)
    dk = tl.zeros([BN, 16 if F.ONLY == "dv" else BD], tl.float32)
    dv = tl.zeros([BN, 16 if F.ONLY == "dk" else BDV], tl.float32)
    own, _, _, _ = key_facts(head, n, live, F)
    for i in range(0, heads):
        h = first_head + i
        h64 = h.to(tl.int64)
        facts = place(b, h, H, KEYS.heads, KEYS.batch, N.k_rows)
        of_head = keys_of(K, V, KEYS, BIAS.at, b64, kv64, facts, N.k_rows)
        token, pos, end, seg = key_facts(of_head, n, live, F)
        R = rule_of(RULE, h, H, F)
        bias = R.factor
        if F.BIAS:
            bias = tl.load(row_at(BIAS, b, h, H, N.Tk) + token, mask=token >= 0, other=0.0)[:, None]
        C = Columns(k, v, n, token, pos, end, seg, bias)
        state = (b64 * H + h64) * N.Tq
        first_word, second_word = token, token
        if F.DROP:
            first_word, second_word = words_at(DRAW.keys + (b64 * H + h64) * N.Tk * 2, token, token >= 0)
        slope = RULE.factor
        if F.ALIBI:
            slope = tl.load(DRAW.slopes + b * DRAW.slopes_batch + h)
        draw = Draw(first_word, second_word, DRAW.queries + state * 2, DRAW.bar, DRAW.kept, slope)
        queries = Queries(
            head_at(Q, b64, h64), Q.row, Q.lane, head_at(DOUT, b64, h64), DOUT.row, DOUT.lane,
            TOP + state, REST + state, DELTA + state,
        )  # fmt: skip
        db = tl.zeros([BN], tl.float32)
        if F.SPANS:
            cell = place(b, h, H, SPANNED.heads, SPANNED.batch, SPANNED.columns) + column * BN // GROUP
            first = tl.load(SPANNED.begin + cell)
            whole, last = first + tl.load(SPANNED.whole + cell), first + tl.load(SPANNED.count + cell)
            for e in range(first, whole):
                tile, until = tl.load(SPANNED.tile + e), tl.load(SPANNED.until + e)
                for p in tl.range(tile * PARTS, until * PARTS, num_stages=F.STAGES):
                    dk, dv, db = take(dk, dv, db, C, queries, TOKENS, R, draw, b, h, p // PARTS, p % PARTS,
                                      live, UNITS.words, n, n, N, False, False, F)  # fmt: skip
            lists = SPANS.start + place(b, h, H, SPANS.heads, SPANS.batch, N.tiles)
            for e in range(whole, last):
                tile, until = tl.load(SPANNED.tile + e), tl.load(SPANNED.until + e)
                source = tl.load(SPANNED.source + e)
                for p in tl.range(tile * CUTS, until * CUTS, num_stages=1):
                    span = SPANS.at + 2 * (tl.load(lists + p // CUTS) + source)
                    inside = live & (n >= tl.load(span)) & (n < tl.load(span + 1))
                    dk, dv, db = take(dk, dv, db, C, queries, TOKENS, R, draw, b, h, p // CUTS, p % CUTS,
                                      inside, UNITS.words, n, n, N, True, False, F)  # fmt: skip
        if F.UNITS:
            group = column * BN // (MEMBERS * F.PART)
            cell = place(b, h, H, UNITED.heads, UNITED.batch, UNITED.columns) + group
            first = tl.load(UNITED.begin + cell)
            last = first + tl.load(UNITED.count + cell)
            units = place(b, h, H, UNITS.heads, UNITS.batch, N.tiles)
            for p in tl.range(first * CUTS, last * CUTS, num_stages=1):
                reader = p // CUTS
                tile = tl.load(UNITED.tile + reader)
                member = tl.load(
                    UNITED.members + reader.to(tl.int64) * MEMBERS + lane * MEMBERS // BN
                )  # the unit's place in the tile's list, or -1
                word = member
                if F.BITS:
                    full = tl.load(UNITS.full + units + tile)
                    word = tl.where(
                        member >= full,
                        member - full + tl.load(UNITS.words_start + units + tile).to(tl.int32),
                        -1,
                    )
                dk, dv, db = take(dk, dv, db, C, queries, TOKENS, R, draw, b, h, tile, p % CUTS,
                                  live & (member >= 0), UNITS.words, word, n % F.UNIT,
                                  N, True, F.BITS, F)  # fmt: skip
        if (F.BIAS and F.ONLY != "dv") or F.STATS:
            tl.store(DBIAS + (b64 * H + h64) * N.Tk + token, db, mask=token >= 0)
    if not F.STATS:
        stored = live & (own >= 0)
        to = tl.where(stored, own, 0).to(tl.int64)
        if F.ONLY != "dv":
            to_k = head_at(DK, b64, kv64)
            store_rows(to_k, to, DK.row, DK.lane, stored, dk * scale, F.D, F.BD)
        if F.ONLY != "dk":
            store_rows(head_at(DV, b64, kv64), to, DV.row, DV.lane, stored, dv, F.DV, F.BDV)

"""The kernel over keys: dK, dV, the gradient of key_bias, statistics. A program has BN key rows of one head.

It walks the query tiles that visit its keys, head by head of the group that shares them, in the order of the
transposed lists: nothing is added from two places, so no atomics, no locks, and results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    Keys,
    Rule,
    Tokens,
    apart,
    dot,
    gathered,
    given_share,
    given_top,
    key_facts,
    load_rows,
    logits,
    place,
    query_facts,
    rule_of,
    store_rows,
    visible,
)
from .dropout import Draw, stays, words_at


class Queries(NamedTuple):
    """Where the queries of a head lie, and what the backward knows of them."""

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
    """A program's keys: matrices [BN, BD] and [BN, BDV], and what the rules ask of them."""

    k: Any
    v: Any
    n: Any
    token: Any
    pos: Any
    end: Any
    seg: Any
    bias: Any


@triton.jit
def take(dk, dv, db, C, Q, T, R, X, b, h, H, tile, part, live, WORDS, word, inside, Tq, rows,
         RULES: tl.constexpr, BITS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """What BM rows of a tile (CUT with RULES) give to the keys: S^T, so that dK and dV are plain products.

    With STATS their weights join db.
    """
    BM: tl.constexpr = F.CUT if RULES else F.BM
    within = part * BM + tl.arange(0, BM)
    real, token, pos, seg = query_facts(T, b, h, H, tile, within, Tq, rows, F)
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
            delta = tl.load(Q.delta + token, mask=real, other=0.0)  # late: registers are short before
            of_weights = dot(C.v, tl.trans(do))
            if F.DROP:
                of_weights = tl.where(stays(X, token, real), of_weights * X.scale, 0.0)
            ds = p * (of_weights - delta[None, :])
            if RULES:
                ds = tl.where(p == 0.0, 0.0, ds)  # a key that nobody sees may hold anything
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
    Q, K, V, DOUT, TOP, REST, DELTA, DK, DV, DBIAS,
    q_batch, q_head, q_row, q_lane, k_batch, k_head, k_row, k_lane, v_batch, v_head, v_row, v_lane,
    d_batch, d_head, d_row, d_lane, dk_batch, dk_head, dk_row, dk_lane, dv_batch, dv_head, dv_row, dv_lane,
    SPANS, SPAN_START, span_batch, span_heads, SPAN_BEGIN, SPAN_WHOLE, SPAN_READERS, SPAN_TILE, SPAN_UNTIL,
    SPAN_SOURCE, spanned_batch, spanned_heads, spanned_columns,
    FULL, WORDS_START, WORDS, unit_batch, unit_heads,
    UNIT_BEGIN, UNIT_READERS, UNIT_TILE, UNIT_MEMBERS, united_batch, united_heads, united_columns,
    Q_ORDER, q_order_batch, q_order_heads, Q_POS, q_pos_batch, q_pos_heads, Q_SEG, q_seg_batch, q_seg_heads,
    K_ORDER, K_POS, K_END, K_SEG, key_batch, key_heads, BIAS, bias_batch, bias_heads, RULE, rule_heads,
    SHIFT, shift_batch,
    scale, inner, cap, factor, offset, left, right, sink, H, KV, Tq, Tk, q_rows, k_rows, tiles,
    Q_DRAW, K_DRAW, bar, kept, SLOPE, slope_batch, columns,
    GROUP: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """DK and DV of BN key rows of packed head kv, and DBIAS of each query head that reads them.

    With STATS only DBIAS, and that is the sum or maximum of the weights on each key.
    """
    pid = tl.program_id(0)
    column, bk = pid % columns, pid // columns
    b, kv = bk // KV, bk % KV
    BN: tl.constexpr = F.BN
    BD: tl.constexpr = F.BD
    BDV: tl.constexpr = F.BDV
    MEMBERS: tl.constexpr = (F.BN + F.PART - 1) // F.PART
    PARTS: tl.constexpr = (F.TILE + F.BM - 1) // F.BM
    CUTS: tl.constexpr = (F.TILE + F.CUT - 1) // F.CUT
    lane = tl.arange(0, BN)
    n = column * BN + lane
    live = n < k_rows
    b64, kv64 = b.to(tl.int64), kv.to(tl.int64)
    first_head, heads = kv * (H // KV), H // KV
    keys = place(b, first_head, H, key_heads, key_batch, k_rows)
    head = Keys(
        K + b64 * k_batch + kv64 * k_head, V + b64 * v_batch + kv64 * v_head, k_row, k_lane, v_row, v_lane,
        K_ORDER + keys, K_POS + keys, K_END + keys, K_SEG + keys, BIAS, k_rows,
    )  # fmt: skip
    at = n.to(tl.int64)
    k = load_rows(head.k, at, k_row, k_lane, live, F.D, F.BD, True)
    v = k if F.STATS or F.ONLY == "dv" else load_rows(head.v, at, v_row, v_lane, live, F.DV, F.BDV, True)
    dk = tl.zeros([BN, 16 if F.ONLY == "dv" else BD], tl.float32)
    dv = tl.zeros([BN, 16 if F.ONLY == "dk" else BDV], tl.float32)
    tokens = Tokens(
        Q_ORDER, q_order_batch, q_order_heads, Q_POS, q_pos_batch, q_pos_heads, Q_SEG, q_seg_batch,
        q_seg_heads,
        SHIFT, shift_batch, offset,
    )  # fmt: skip
    own, _, _, _ = key_facts(head, n, live, F)
    for i in range(0, heads):
        h = first_head + i
        h64 = h.to(tl.int64)
        facts = place(b, h, H, key_heads, key_batch, k_rows)
        of_head = Keys(head.k, head.v, k_row, k_lane, v_row, v_lane,
                       K_ORDER + facts, K_POS + facts, K_END + facts, K_SEG + facts, BIAS,
                       k_rows)  # fmt: skip
        token, pos, end, seg = key_facts(of_head, n, live, F)
        R = rule_of(Rule(inner, cap, factor, left, right, sink, 0.0), RULE, rule_heads, h, H, F)
        bias = R.factor
        if F.BIAS:
            base = BIAS + place(b, h, H, bias_heads, bias_batch, Tk)
            bias = tl.load(base + token, mask=token >= 0, other=0.0)[:, None]
        C = Columns(k, v, n, token, pos, end, seg, bias)
        state = (b64 * H + h64) * Tq
        first_word, second_word = token, token
        if F.DROP:
            first_word, second_word = words_at(K_DRAW + (b64 * H + h64) * Tk * 2, token, token >= 0)
        slope = factor
        if F.ALIBI:
            slope = tl.load(SLOPE + b * slope_batch + h)
        draw = Draw(first_word, second_word, Q_DRAW + state * 2, bar, kept, slope)
        queries = Queries(
            Q + b64 * q_batch + h64 * q_head, q_row, q_lane, DOUT + b64 * d_batch + h64 * d_head, d_row,
            d_lane,
            TOP + state, REST + state, DELTA + state,
        )  # fmt: skip
        db = tl.zeros([BN], tl.float32)
        if F.SPANS:
            cell = place(b, h, H, spanned_heads, spanned_batch, spanned_columns) + column * BN // GROUP
            first = tl.load(SPAN_BEGIN + cell)
            whole, last = first + tl.load(SPAN_WHOLE + cell), first + tl.load(SPAN_READERS + cell)
            for e in range(first, whole):
                tile, until = tl.load(SPAN_TILE + e), tl.load(SPAN_UNTIL + e)
                for p in tl.range(tile * PARTS, until * PARTS, num_stages=F.STAGES):
                    dk, dv, db = take(dk, dv, db, C, queries, tokens, R, draw, b, h, H, p // PARTS, p % PARTS,
                                      live, WORDS, n, n, Tq, q_rows, False, False, F)  # fmt: skip
            lists = SPAN_START + place(b, h, H, span_heads, span_batch, tiles)
            for e in range(whole, last):
                tile, until = tl.load(SPAN_TILE + e), tl.load(SPAN_UNTIL + e)
                source = tl.load(SPAN_SOURCE + e)
                for p in tl.range(tile * CUTS, until * CUTS, num_stages=1):
                    span = SPANS + 2 * (tl.load(lists + p // CUTS) + source)
                    inside = live & (n >= tl.load(span)) & (n < tl.load(span + 1))
                    dk, dv, db = take(dk, dv, db, C, queries, tokens, R, draw, b, h, H, p // CUTS, p % CUTS,
                                      inside, WORDS, n, n, Tq, q_rows, True, False, F)  # fmt: skip
        if F.UNITS:
            group = column * BN // (MEMBERS * F.PART)
            cell = place(b, h, H, united_heads, united_batch, united_columns) + group
            first = tl.load(UNIT_BEGIN + cell)
            last = first + tl.load(UNIT_READERS + cell)
            units = place(b, h, H, unit_heads, unit_batch, tiles)
            for p in tl.range(first * CUTS, last * CUTS, num_stages=1):
                reader = p // CUTS
                tile = tl.load(UNIT_TILE + reader)
                member = tl.load(
                    UNIT_MEMBERS + reader.to(tl.int64) * MEMBERS + lane * MEMBERS // BN
                )  # place in the list, or -1
                word = member
                if F.BITS:
                    full = tl.load(FULL + units + tile)
                    word = tl.where(
                        member >= full, member - full + tl.load(WORDS_START + units + tile).to(tl.int32), -1
                    )
                dk, dv, db = take(dk, dv, db, C, queries, tokens, R, draw, b, h, H, tile, p % CUTS,
                                  live & (member >= 0), WORDS, word, n % F.UNIT,
                                  Tq, q_rows, True, F.BITS, F)  # fmt: skip
        if (F.BIAS and F.ONLY != "dv") or F.STATS:
            tl.store(DBIAS + (b64 * H + h64) * Tk + token, db, mask=token >= 0)
    if not F.STATS:
        stored = live & (own >= 0)
        to = tl.where(stored, own, 0).to(tl.int64)
        if F.ONLY != "dv":
            to_k = DK + b64 * dk_batch + kv64 * dk_head
            store_rows(to_k, to, dk_row, dk_lane, stored, dk * scale, F.D, F.BD)
        if F.ONLY != "dk":
            store_rows(DV + b64 * dv_batch + kv64 * dv_head, to, dv_row, dv_lane, stored, dv, F.DV, F.BDV)

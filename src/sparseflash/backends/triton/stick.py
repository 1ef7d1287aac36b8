"""Stick-breaking attention: tiles visit their keys newest first, and each takes its share of what is left.

The backward knows, for every visit and row, what newer keys had left (`LEFT`, from the forward's walk) and
what older keys had gathered (`OLDER`, from the walk of dQ, oldest first): a number each. With both, a program
of dK and dV can begin anywhere: it owns a block of keys, and nothing is added from two places.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from ...plan.flat import empty_like_layout
from .blocks import Blocks, fitting
from .common import (
    Keys,
    Rows,
    Rule,
    Tokens,
    dot,
    key_facts,
    keys_at,
    load_rows,
    pairs,
    place,
    rows_of,
    rule_of,
    store_rows,
)
from .launch import Arguments, found, power_of_two
from .softmax import summed
from .visits import Visits, visits

LEAST = tl.constexpr(2.0**-60)
"""What a key leaves at least, so that it divides; less has no digit in any sum with what the key took."""


@triton.jit
def broken(x, keep, left):
    """Shares b, weights P and what is left after a block of base-2 logits: products, so nothing cancels."""
    y = tl.exp2(-tl.abs(x))
    large = 1.0 / (1.0 + y)
    share = tl.where(keep, tl.where(x >= 0.0, large, y * large), 0.0)
    leaves = tl.where(keep, tl.maximum(tl.where(x >= 0.0, y * large, large), LEAST), 1.0)
    after = tl.cumprod(leaves, 1, reverse=True)
    oldest = (tl.arange(0, x.shape[1]) == 0)[None, :]
    return share, share * (after / leaves) * left[:, None], left * tl.sum(tl.where(oldest, after, 0.0), 1)


@triton.jit
def slopes(Q, v, x, keep, left, older):
    """Weights P, their slopes T = P (dP - drem), and dZ = T - b times the sum of T so far."""
    share, weight, _ = broken(x, keep, left)
    taken = tl.where(weight == 0.0, 0.0, weight * (dot(Q.do, tl.trans(v)) - Q.delta[:, None]))
    return weight, taken, taken - share * (older[:, None] + tl.cumsum(taken, 1))


@triton.jit
def visit_at(LOW, HIGH, WORD, i, F: tl.constexpr):
    """Visit i: first row of its block, low, high, place of its bits, first row of its unit."""
    low = tl.load(LOW + i)
    return low // F.BN * F.BN, low, tl.load(HIGH + i), tl.load(WORD + i), low // F.UNIT * F.UNIT


@triton.jit
def edge(N, i, b, h, H, heads, batch, F: tl.constexpr):
    """Where the numbers of a visit's rows lie: a set for each query head and sequence of a list."""
    group = H // heads
    owner = h % group if batch > 0 else b * group + h % group
    return (owner * tl.full([], 1, tl.int64) * N + i) * F.TILE


@triton.jit
def seen(x, keep):
    """x [BN,D] with the keys that no row sees set to 0: they may hold anything."""
    return tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], x, 0.0)


@triton.jit
def any_left(left, real):
    """Whether any stick has something left: where none has, older keys would add exact zeros."""
    return tl.max(((left > 0.0) & real).to(tl.int32), 0) > 0


@triton.jit
def stick_kernel(
    Q, K, V, OUT, REM, DOUT, DREM, LEFT, OLDER,
    q_batch, q_head, q_row, q_lane, k_batch, k_head, k_row, k_lane, v_batch, v_head, v_row, v_lane,
    o_batch, o_head, o_row, o_lane, d_batch, d_head, d_row, d_lane,
    START, COUNT, LOW, HIGH, WORD, WORDS, N, visit_batch, visit_heads,
    Q_ORDER, q_order_batch, q_order_heads, Q_POS, q_pos_batch, q_pos_heads, Q_SEG, q_seg_batch, q_seg_heads,
    K_ORDER, K_POS, K_END, K_SEG, key_batch, key_heads, RULE, rule_heads, SHIFT, shift_batch,
    scale, factor, offset, left, right, sink, H, KV, Tq, q_rows, k_rows, tiles, parts,
    KEEP: tl.constexpr, BACKWARD: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """OUT and REM of BM rows; with KEEP only the LEFT of every visit; with BACKWARD dQ (in OUT) and OLDER."""
    bh, at = tl.program_id(0) // (tiles * parts), tiles * parts - 1 - tl.program_id(0) % (tiles * parts)
    tile, b, h = at // parts, bh // H, bh % H
    b64, h64, kv = b.to(tl.int64), h.to(tl.int64), (h * KV // H).to(tl.int64)
    tokens = Tokens(
        Q_ORDER, q_order_batch, q_order_heads, Q_POS, q_pos_batch, q_pos_heads, Q_SEG, q_seg_batch,
        q_seg_heads,
        SHIFT, shift_batch, offset,
    )  # fmt: skip
    BM: tl.constexpr = F.BM
    BN: tl.constexpr = F.BN
    WIDTH: tl.constexpr = 16 if KEEP else F.BD if BACKWARD else F.BDV
    rows, token = rows_of(
        tokens, Q, b, h, H, tile, at % parts, q_batch, q_head, q_row, q_lane, Tq, q_rows, BM, F
    )
    state = bh.to(tl.int64) * Tq + token
    drem = tl.load(DREM + state, mask=rows.real & BACKWARD, other=0.0)
    R = rule_of(Rule(factor, factor, left, right, sink), RULE, rule_heads, h, H, F)
    keys = place(b, h, H, key_heads, key_batch, k_rows)
    head = Keys(
        K + b64 * k_batch + kv * k_head, V + b64 * v_batch + kv * v_head, k_row, k_lane, v_row, v_lane,
        K_ORDER + keys, K_POS + keys, K_END + keys, K_SEG + keys, K, k_rows,
    )  # fmt: skip
    cell = place(b, h, H, visit_heads, visit_batch, tiles) + tile
    first, count = tl.load(START + cell), tl.load(COUNT + cell)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    run = tl.full([BM], 0.0 if BACKWARD else 1.0, tl.float32)  # what is left, or what older keys gathered
    lane = tl.arange(0, BN)
    inside = rows.within < F.TILE
    for n in range(0, count):
        i = first + (count - 1 - n if BACKWARD else n)
        lasts = run
        if BACKWARD or KEEP:
            spots = edge(N, i, b, h, H, visit_heads, visit_batch, F) + rows.within
            if KEEP:
                tl.store(LEFT + spots, run, mask=inside)
            else:
                lasts = tl.load(LEFT + spots, mask=inside, other=0.0)
                tl.store(OLDER + spots, run, mask=inside)
        if any_left(lasts, rows.real):
            base, low, high, word, origin = visit_at(LOW, HIGH, WORD, i, F)
            live = (base + lane >= low) & (base + lane < high)
            k = keys_at(head.k, base, lane, k_row, k_lane, live, F.D, F.BD)
            # read again for each visit: what a whole walk keeps in fp32 does not fit the registers
            q = load_rows(Q + b64 * q_batch + h64 * q_head, token.to(tl.int64), q_row, q_lane, rows.real, F.D,
                          F.BD, True)  # fmt: skip
            do = q
            if BACKWARD:
                do = load_rows(DOUT + b64 * d_batch + h64 * d_head, token.to(tl.int64), d_row, d_lane,
                               rows.real, F.DV, F.BDV, True)  # fmt: skip
            asking = Rows(q, do, drem, rows.real, rows.pos, rows.seg, rows.within)
            x, keep, key = pairs(asking, head, R, k, base, lane, live, word, origin, WORDS, F)
            if KEEP:
                share, weight, run = broken(x, keep, run)
            else:
                v = seen(keys_at(head.v, base, lane, v_row, v_lane, live, F.DV, F.BDV), keep)
                if BACKWARD:
                    weight, taken, dz = slopes(asking, v, x, keep, lasts, run)
                    acc = dot(dz.to(k.dtype), seen(k, keep), acc)
                    run += tl.sum(taken, 1)
                else:
                    share, weight, run = broken(x, keep, run)
                    acc = dot(weight.to(v.dtype), v, acc)
    to = OUT + b64 * o_batch + h64 * o_head
    if BACKWARD:
        store_rows(to, token, o_row, o_lane, rows.real, acc * scale, F.D, F.BD)
    elif not KEEP:
        store_rows(to, token, o_row, o_lane, rows.real, acc, F.DV, F.BDV)
        tl.store(REM + state, run, mask=rows.real)


@triton.jit
def stick_columns_kernel(
    Q, K, V, DOUT, DREM, LEFT, OLDER, DK, DV,
    q_batch, q_head, q_row, q_lane, k_batch, k_head, k_row, k_lane, v_batch, v_head, v_row, v_lane,
    d_batch, d_head, d_row, d_lane, dk_batch, dk_head, dk_row, dk_lane, dv_batch, dv_head, dv_row, dv_lane,
    BLOCK_START, BLOCK_COUNT, BY_BLOCK, TILE_OF, LOW, HIGH, WORD, WORDS, N, visit_batch, visit_heads,
    Q_ORDER, q_order_batch, q_order_heads, Q_POS, q_pos_batch, q_pos_heads, Q_SEG, q_seg_batch, q_seg_heads,
    K_ORDER, K_POS, K_END, K_SEG, key_batch, key_heads, RULE, rule_heads, SHIFT, shift_batch,
    scale, factor, offset, left, right, sink, H, KV, Tq, q_rows, k_rows, tiles, blocks, F: tl.constexpr,
):  # fmt: skip
    """DK and DV of a block of key rows of packed head kv, from every visit to it."""
    BM: tl.constexpr = F.BM
    BN: tl.constexpr = F.BN
    BD: tl.constexpr = F.BD
    BDV: tl.constexpr = F.BDV
    PARTS: tl.constexpr = (F.TILE + F.BM - 1) // F.BM
    block, bk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, kv = bk // KV, bk % KV
    b64, kv64 = b.to(tl.int64), kv.to(tl.int64)
    base, lane = block * BN, tl.arange(0, BN)
    real = base + lane < k_rows
    tokens = Tokens(
        Q_ORDER, q_order_batch, q_order_heads, Q_POS, q_pos_batch, q_pos_heads, Q_SEG, q_seg_batch,
        q_seg_heads,
        SHIFT, shift_batch, offset,
    )  # fmt: skip
    from_k, from_v = K + b64 * k_batch + kv64 * k_head, V + b64 * v_batch + kv64 * v_head
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    for one in range(0, H // KV):
        h = kv * (H // KV) + one
        h64 = h.to(tl.int64)
        facts = place(b, h, H, key_heads, key_batch, k_rows)
        head = Keys(from_k, from_v, k_row, k_lane, v_row, v_lane, K_ORDER + facts, K_POS + facts,
                    K_END + facts, K_SEG + facts, K, k_rows)  # fmt: skip
        R = rule_of(Rule(factor, factor, left, right, sink), RULE, rule_heads, h, H, F)
        cell = place(b, h, H, visit_heads, visit_batch, blocks) + block
        first, count = tl.load(BLOCK_START + cell), tl.load(BLOCK_COUNT + cell)
        for n in range(0, count):
            i = tl.load(BY_BLOCK + first + n)
            tile = tl.load(TILE_OF + i)
            at, low, high, word, origin = visit_at(LOW, HIGH, WORD, i, F)
            live = (base + lane >= low) & (base + lane < high)
            for part in range(0, PARTS):
                asked, token = rows_of(tokens, Q, b, h, H, tile, part, q_batch, q_head, q_row, q_lane, Tq,
                                       q_rows, BM, F)  # fmt: skip
                spots = edge(N, i, b, h, H, visit_heads, visit_batch, F) + asked.within
                lasts = tl.load(LEFT + spots, mask=asked.within < F.TILE, other=0.0)
                if any_left(lasts, asked.real):
                    older = tl.load(OLDER + spots, mask=asked.within < F.TILE, other=0.0)
                    do = load_rows(DOUT + b64 * d_batch + h64 * d_head, token.to(tl.int64), d_row, d_lane,
                                   asked.real, F.DV, F.BDV, True)  # fmt: skip
                    drem = tl.load(DREM + (b64 * H + h64) * Tq + token, mask=asked.real, other=0.0)
                    rows = Rows(asked.q, do, drem, asked.real, asked.pos, asked.seg, asked.within)
                    k = keys_at(from_k, base, lane, k_row, k_lane, live, F.D, F.BD)
                    v = keys_at(from_v, base, lane, v_row, v_lane, live, F.DV, F.BDV)
                    x, keep, key = pairs(rows, head, R, k, base, lane, live, word, origin, WORDS, F)
                    weight, taken, dz = slopes(rows, seen(v, keep), x, keep, lasts, older)
                    dv = dot(tl.trans(weight.to(do.dtype)), do, dv)
                    dk = dot(tl.trans(dz.to(do.dtype)), rows.q, dk)
    facts = place(b, kv * (H // KV), H, key_heads, key_batch, k_rows)
    own, _, _, _ = key_facts(
        Keys(K, V, k_row, k_lane, v_row, v_lane, K_ORDER + facts, K_POS + facts, K_END + facts, K_SEG + facts,
             K, k_rows),
        base + lane, real, F,
    )  # fmt: skip
    real = real & (own >= 0)
    to = tl.where(real, own, 0)
    store_rows(DK + b64 * dk_batch + kv64 * dk_head, to, dk_row, dk_lane, real, dk * scale, F.D, F.BD)
    store_rows(DV + b64 * dv_batch + kv64 * dv_head, to, dv_row, dv_lane, real, dv, F.DV, F.BDV)


def _named(a: Arguments, kernel: Any, known: Visits) -> dict[str, Any]:
    """What a kernel is given of the call and of its visits."""
    visit_batch, visit_heads = found(known.count)
    given = a.named | {
        "START": known.start, "COUNT": known.count, "LOW": known.low, "HIGH": known.high, "WORD": known.word,
        "BLOCK_START": known.block_start, "BLOCK_COUNT": known.block_count, "BY_BLOCK": known.by_block,
        "TILE_OF": known.tile, "N": known.low.shape[0], "visit_batch": visit_batch,
        "visit_heads": visit_heads,
    }  # fmt: skip
    if "BLOCK_START" in kernel.arg_names:
        given["visit_batch"] = found(known.block_count)[0]
        given["blocks"] = known.block_count.shape[-1]
    return {n: x for n, x in given.items() if n in kernel.arg_names}


def _walk(a: Arguments, plan: Plan, known: Visits, blocks: Blocks, *, keep: bool, backward: bool) -> None:
    """Run the kernel over query rows."""
    rows = min(blocks.rows, power_of_two(plan.tile))
    parts = triton.cdiv(plan.tile, rows)
    q, flags = a.named["Q"], a.flags(blocks, rows, blocks.keys)
    stick_kernel[(q.shape[0] * q.shape[1] * plan.tiles * parts,)](
        **_named(a, stick_kernel, known),
        parts=parts,
        KEEP=keep,
        BACKWARD=backward,
        F=flags,
        **blocks.options(),
    )


def stick_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> tuple[Tensor, Tensor]:
    """out [B,Hq,Tq,Dv] and rem, fp32 [B,Hq,Tq]."""
    out = empty_like_layout(q, v.shape[-1]).zero_()
    rem = torch.ones(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel() or not plan.tiles or not plan.k_rows:
        return out, rem
    a = Arguments(q, k, v, plan, scale, 0.0, None)
    a.named |= dict.fromkeys(("DREM", "LEFT", "OLDER"), rem) | {"OUT": out, "REM": rem, "DOUT": out}
    for name in "o", "d":
        a.strides(a.named, name, out)
    fitting(
        "stick", a.blocks("stick"),
        lambda blocks: _walk(a, plan, visits(plan, blocks.keys), blocks, keep=False, backward=False),
    )  # fmt: skip
    return out, rem


def stick_backward(
    dout: Tensor, drem: Tensor | None, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of the inputs."""
    B, H, Tq, _ = q.shape
    dq = torch.zeros_like(q)
    a = Arguments(q, k, v, plan, scale, 0.0, None)
    heads = a.keys.k.shape[1]
    kind = q.dtype if heads == k.shape[1] and k.shape[0] == B else torch.float32
    dk, dv = (torch.zeros((B, heads, *x.shape[2:]), dtype=kind, device=q.device) for x in (k, v))
    drem = torch.zeros((B, H, Tq), device=q.device) if drem is None else drem.float().contiguous()
    dout = dout.to(q.dtype)
    a.named |= {"OUT": dq, "REM": drem, "DOUT": dout, "DREM": drem, "DK": dk, "DV": dv}
    for name, x in (("o", dq), ("d", dout), ("dk", dk), ("dv", dv)):
        a.strides(a.named, name, x)

    def start(blocks: Blocks) -> None:
        known = visits(plan, blocks.keys)
        lists, own = known.count[..., 0].numel(), known.low.shape[0]
        edges = torch.empty((2, B * H // lists, own, plan.tile), dtype=torch.float32, device=q.device)
        a.named["LEFT"], a.named["OLDER"] = edges
        _walk(a, plan, known, blocks, keep=True, backward=False)
        _walk(a, plan, known, blocks, keep=False, backward=True)
        rows = min(blocks.rows, power_of_two(plan.tile))
        stick_columns_kernel[(B * heads * known.block_count.shape[-1],)](
            **_named(a, stick_columns_kernel, known), F=a.flags(blocks, rows, blocks.keys), **blocks.options()
        )

    if dq.numel() and plan.tiles and plan.k_rows:
        fitting("stick, backward", a.blocks("stick"), start)
    dk, dv = (summed(x, k.shape[:2]).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv

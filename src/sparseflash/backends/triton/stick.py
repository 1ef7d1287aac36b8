"""Stick-breaking attention: tiles visit keys newest first, and each key takes its share of what is left.

For every row and every block that it visits, the backward needs two numbers: what newer keys left (`LEFT`,
from a walk newest first) and the sum over older keys (`OLDER`, from the walk of dQ, oldest first). With both,
a program of dK and dV can start at any block of keys, which it owns: no result is added to from two programs.
The backward takes as many tiles at a time as keep these numbers no more than those of q.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from ..numerics import Stick, empty_like_layout
from .blocks import Blocks, fitting
from .common import (
    Rows,
    dot,
    head_at,
    key_facts,
    keys_at,
    keys_of,
    load_rows,
    pairs,
    place,
    rows_of,
    rule_of,
    store_rows,
)
from .launch import Arguments, found, power_of_two, view
from .softmax import span_readers, summed, unit_readers
from .visits import Visits, visits

LEAST = tl.constexpr(2.0**-60)
"""Least that a key leaves, so that one can divide by it; less changes no digit of a sum with what it took."""


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
    """Weights P, dZ = T - b * (running sum of T), where T = P (dP - drem), and that sum after the block."""
    share, weight, _ = broken(x, keep, left)
    taken = tl.where(weight == 0.0, 0.0, weight * (dot(Q.do, tl.trans(v)) - Q.delta[:, None]))
    so_far = older[:, None] + tl.cumsum(taken, 1)
    newest = (tl.arange(0, x.shape[1]) == x.shape[1] - 1)[None, :]
    return weight, taken - share * so_far, tl.sum(tl.where(newest, so_far, 0.0), 1)


@triton.jit
def edge(bh, tile, slot, tiles, slots, F: tl.constexpr):
    """Offset in LEFT and OLDER of a tile's rows, at one of the blocks that the tile visits."""
    return ((bh.to(tl.int64) * tiles + tile) * slots + slot) * F.TILE


@triton.jit
def seen(x, keep):
    """x [BN,D] with keys that no row sees set to 0: they may be NaN or infinite."""
    return tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], x, 0.0)


@triton.jit
def any_left(left, real):
    """True if any stick has something left; otherwise older keys would add exact zeros."""
    return tl.max(((left > 0.0) & real).to(tl.int32), 0) > 0


class Visited(NamedTuple):
    """The visits of every tile, newest keys first: the fields of `Visits`, all tables of one shape."""

    start: Any
    count: Any
    low: Any
    high: Any
    word: Any
    slot: Any
    span_at: Any
    span_slot: Any
    unit_at: Any
    unit_slot: Any
    batch: Any
    heads: Any
    slots: Any


@triton.jit(do_not_specialize=("first_tile", "wave"))
def stick_kernel(
    Q, K, V, OUT, DOUT, REM, DREM, LEFT, OLDER, VISITS, UNITS, TOKENS, KEYS, RULE, N, scale, parts,
    first_tile, wave, KEEP: tl.constexpr, BACKWARD: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """OUT and REM of BM rows, for `wave` tiles from `first_tile` on.

    With KEEP only LEFT, for every block that they visit; with BACKWARD dQ (in OUT) and OLDER.
    """
    bh, at = tl.program_id(0) // (wave * parts), wave * parts - 1 - tl.program_id(0) % (wave * parts)
    H = N.H
    tile, b, h = first_tile + at // parts, bh // H, bh % H
    b64, h64, kv = b.to(tl.int64), h.to(tl.int64), (h * N.KV // H).to(tl.int64)
    BM: tl.constexpr = F.BM
    BN: tl.constexpr = F.BN
    WIDTH: tl.constexpr = 16 if KEEP else F.BD if BACKWARD else F.BDV
    rows, token = rows_of(TOKENS, Q, b, h, tile, at % parts, N, BM, F)
    state = bh.to(tl.int64) * N.Tq + token
    drem = tl.load(DREM + state, mask=rows.real & BACKWARD, other=0.0)
    R = rule_of(RULE, h, H, F)
    facts = place(b, h, H, KEYS.heads, KEYS.batch, N.k_rows)
    head = keys_of(K, V, KEYS, K.at, b64, kv, facts, N.k_rows)
    cell = place(b, h, H, VISITS.heads, VISITS.batch, N.tiles) + tile
    first, count = tl.load(VISITS.start + cell), tl.load(VISITS.count + cell)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    run = tl.full([BM], 0.0 if BACKWARD else 1.0, tl.float32)  # what is left; BACKWARD: the sum of T so far
    lane = tl.arange(0, BN)
    inside = rows.within < F.TILE
    for n in range(0, count):
        i = first + (count - 1 - n if BACKWARD else n)
        low, high, word = tl.load(VISITS.low + i), tl.load(VISITS.high + i), tl.load(VISITS.word + i)
        times = (high - 1) // BN - low // BN + 1
        for c in range(0, times):
            nth = c if BACKWARD else times - 1 - c
            base = (low // BN + nth) * BN
            lasts = run
            if BACKWARD or KEEP:
                slot = tl.load(VISITS.slot + i) + nth
                spots = edge(bh, tile - first_tile, slot, wave, VISITS.slots, F) + rows.within
                if KEEP:
                    tl.store(LEFT + spots, run, mask=inside)
                else:
                    lasts = tl.load(LEFT + spots, mask=inside, other=0.0)
                    tl.store(OLDER + spots, run, mask=inside)
            if any_left(lasts, rows.real):
                live = (base + lane >= low) & (base + lane < high)
                # all loads into shared memory come before the first product: a wait between two of them would
                # hold the first in registers
                k = keys_at(head.k, base, lane, K.row, K.lane, live, F.D, F.BD)
                v = keys_at(head.v, base, lane, V.row, V.lane, live, F.DV, F.BDV)
                # reload q and dout for each block: registers cannot hold them in fp32 over the whole walk
                q = load_rows(head_at(Q, b64, h64), token.to(tl.int64), Q.row, Q.lane, rows.real,
                              F.D, F.BD, True)  # fmt: skip
                do = q
                if BACKWARD:
                    do = load_rows(head_at(DOUT, b64, h64), token.to(tl.int64), DOUT.row, DOUT.lane,
                                   rows.real, F.DV, F.BDV, True)  # fmt: skip
                asking = Rows(q, do, drem, drem, rows.real, rows.pos, rows.seg, rows.within, q)
                x, keep, key = pairs(asking, head, R, k, base, lane, live, word, low, UNITS.words, F)
                x *= R.factor
                if BACKWARD:
                    weight, dz, run = slopes(asking, v, x, keep, lasts, run)
                    acc = dot(dz.to(k.dtype), seen(k, keep), acc)
                else:
                    share, weight, run = broken(x, keep, run)
                    if not KEEP:
                        acc = dot(weight.to(v.dtype), seen(v, keep), acc)
    to = head_at(OUT, b64, h64)
    if BACKWARD:
        store_rows(to, token, OUT.row, OUT.lane, rows.real, acc * scale, F.D, F.BD)
    elif not KEEP:
        store_rows(to, token, OUT.row, OUT.lane, rows.real, acc, F.DV, F.BDV)
        tl.store(REM + state, run, mask=rows.real)


class Answers(NamedTuple):
    """Addresses of what the backward has for a head's queries."""

    do: Any
    row: Any
    lane: Any
    drem: Any
    left: Any
    older: Any


@triton.jit
def take(dk, dv, A, TOKENS, head, R, Q, b, h, bh, tile, first_tile, low, high, word, slot, base, WORDS,
         N, wave, slots, F: tl.constexpr):  # fmt: skip
    """Add what a tile's rows give to keys low..high of a block, which is the tile's visit number `slot`."""
    BM: tl.constexpr = F.BM
    PARTS: tl.constexpr = (F.TILE + F.BM - 1) // F.BM
    lane = tl.arange(0, F.BN)
    live = (base + lane >= low) & (base + lane < high)
    for part in range(0, PARTS):
        asked, token = rows_of(TOKENS, Q, b, h, tile, part, N, BM, F)
        spots = edge(bh, tile - first_tile, slot, wave, slots, F) + asked.within
        lasts = tl.load(A.left + spots, mask=asked.within < F.TILE, other=0.0)
        if any_left(lasts, asked.real):
            older = tl.load(A.older + spots, mask=asked.within < F.TILE, other=0.0)
            do = load_rows(A.do, token.to(tl.int64), A.row, A.lane, asked.real, F.DV, F.BDV, True)
            drem = tl.load(A.drem + token, mask=asked.real, other=0.0)
            rows = Rows(asked.q, do, drem, drem, asked.real, asked.pos, asked.seg, asked.within, asked.q)
            k = keys_at(head.k, base, lane, head.k_row, head.k_lane, live, F.D, F.BD)
            v = keys_at(head.v, base, lane, head.v_row, head.v_lane, live, F.DV, F.BDV)
            x, keep, key = pairs(rows, head, R, k, base, lane, live, word, low, WORDS, F)
            x *= R.factor
            weight, dz, _ = slopes(rows, v, x, keep, lasts, older)
            dv = dot(tl.trans(weight.to(do.dtype)), do, dv)
            dk = dot(tl.trans(dz.to(do.dtype)), rows.q, dk)
    return dk, dv


@triton.jit(do_not_specialize=("first_tile", "wave"))
def stick_columns_kernel(
    Q, K, V, DOUT, DREM, LEFT, OLDER, DK, DV, SPANS, SPANNED, UNITS, UNITED, VISITS, TOKENS, KEYS, RULE, N,
    scale, columns, first_tile, wave, GROUP: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Add to the fp32 DK and DV of a block of key rows what `wave` tiles from `first_tile` on give to it.

    Example, BN 64: if the span [100, 300) has slot 1, column 3 is its tile's visit 1 + 3 - 100 // 64 = 3.
    """
    BN: tl.constexpr = F.BN
    BD: tl.constexpr = F.BD
    BDV: tl.constexpr = F.BDV
    MEMBERS: tl.constexpr = (BN + F.PART - 1) // F.PART
    H, KV, k_rows, tiles, slots = N.H, N.KV, N.k_rows, N.tiles, VISITS.slots
    column, bk = tl.program_id(0) % columns, tl.program_id(0) // columns
    b, kv = bk // KV, bk % KV
    b64, kv64 = b.to(tl.int64), kv.to(tl.int64)
    base, lane = column * BN, tl.arange(0, BN)
    real = base + lane < k_rows
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    last_tile = first_tile + wave
    for one in range(0, H // KV):
        h = kv * (H // KV) + one
        bh = b * H + h
        h64 = h.to(tl.int64)
        facts = place(b, h, H, KEYS.heads, KEYS.batch, k_rows)
        head = keys_of(K, V, KEYS, K.at, b64, kv64, facts, k_rows)
        drem = DREM + bh.to(tl.int64) * N.Tq
        answers = Answers(head_at(DOUT, b64, h64), DOUT.row, DOUT.lane, drem, LEFT, OLDER)
        R = rule_of(RULE, h, H, F)
        cells = place(b, h, H, VISITS.heads, VISITS.batch, tiles)
        if F.SPANS:
            group = place(b, h, H, SPANNED.heads, SPANNED.batch, SPANNED.columns) + base // GROUP
            first = tl.load(SPANNED.begin + group)
            lists = place(b, h, H, SPANS.heads, SPANS.batch, tiles)
            for e in range(first, first + tl.load(SPANNED.count + group)):
                source = tl.load(SPANNED.source + e)
                begin = tl.maximum(tl.load(SPANNED.tile + e), first_tile)
                for tile in range(begin, tl.minimum(tl.load(SPANNED.until + e), last_tile)):
                    span = SPANS.at + 2 * (tl.load(SPANS.start + lists + tile) + source)
                    low, high = tl.maximum(tl.load(span), 0), tl.minimum(tl.load(span + 1), k_rows)
                    if (low < high) & (low < base + BN) & (high > base):
                        slot = tl.load(VISITS.span_slot + tl.load(VISITS.span_at + cells + tile) + source)
                        dk, dv = take(dk, dv, answers, TOKENS, head, R, Q, b, h, bh, tile, first_tile, low,
                                      high, -1, slot + column - low // BN, base, UNITS.words, N, wave, slots,
                                      F)  # fmt: skip
        if F.UNITS:
            group = place(b, h, H, UNITED.heads, UNITED.batch, UNITED.columns) + base // (MEMBERS * F.PART)
            first = tl.load(UNITED.begin + group)
            lists = place(b, h, H, UNITS.heads, UNITS.batch, tiles)
            for e in range(first, first + tl.load(UNITED.count + group)):
                tile = tl.load(UNITED.tile + e)
                if (tile >= first_tile) & (tile < last_tile):
                    for m in range(0, MEMBERS):
                        member = tl.load(UNITED.members + e * MEMBERS + m)
                        at = base + m * F.PART
                        if (member >= 0) & ((m == 0) | (at % F.UNIT == 0)):  # once per unit
                            low = at // F.UNIT * F.UNIT
                            word = tl.full([], -1, tl.int64)
                            if F.BITS:
                                full = tl.load(UNITS.full + lists + tile)
                                start = tl.load(UNITS.words_start + lists + tile)
                                word = tl.where(member >= full, start + member - full, word)
                            high = tl.minimum(low + F.UNIT, k_rows)
                            slot = tl.load(VISITS.unit_slot + tl.load(VISITS.unit_at + cells + tile) + member)
                            dk, dv = take(dk, dv, answers, TOKENS, head, R, Q, b, h, bh, tile, first_tile,
                                          low, high, word, slot + column - low // BN, base, UNITS.words, N,
                                          wave, slots, F)  # fmt: skip
    facts = place(b, kv * (H // KV), H, KEYS.heads, KEYS.batch, k_rows)
    own, _, _, _ = key_facts(keys_of(K, V, KEYS, K.at, b64, kv64, facts, k_rows), base + lane, real, F)
    real = real & (own >= 0)
    to = tl.where(real, own, 0).to(tl.int64)
    to_k, to_v = head_at(DK, b64, kv64), head_at(DV, b64, kv64)
    dk = dk * scale + load_rows(to_k, to, DK.row, DK.lane, real, F.D, F.BD, True)
    dv += load_rows(to_v, to, DV.row, DV.lane, real, F.DV, F.BDV, True)
    store_rows(to_k, to, DK.row, DK.lane, real, dk, F.D, F.BD)
    store_rows(to_v, to, DV.row, DV.lane, real, dv, F.DV, F.BDV)


def _named(a: Arguments, kernel: Any, known: Visits) -> dict[str, Any]:
    """Select a kernel's arguments from the call and its visits."""
    visited = Visited(
        known.start, known.count, known.low, known.high, known.word, known.slot, known.span_at,
        known.span_slot, known.unit_at, known.unit_slot, *found(known.count), known.slots,
    )  # fmt: skip
    return a.given(kernel) | {"VISITS": visited}


def _walk(
    a: Arguments, plan: Plan, known: Visits, blocks: Blocks, first: int, wave: int, *, keep: bool = False,
    backward: bool = False,
) -> None:  # fmt: skip
    """Run the kernel over query rows for `wave` tiles from `first` on."""
    rows = min(blocks.rows, power_of_two(plan.tile))
    parts = triton.cdiv(plan.tile, rows)
    programs = a.q.shape[0] * a.q.shape[1] * wave * parts
    stick_kernel[(programs,)](
        **_named(a, stick_kernel, known), parts=parts, first_tile=first, wave=wave, KEEP=keep,
        BACKWARD=backward, F=a.flags(blocks, rows, blocks.keys), **blocks.options(),
    )  # fmt: skip


def stick_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick) -> tuple[Tensor, Tensor]:
    """out [B,Hq,Tq,Dv] and rem, fp32 [B,Hq,Tq]."""
    out = empty_like_layout(q, v.shape[-1]).zero_()
    rem = torch.ones(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel() or not plan.tiles or not plan.k_rows:
        return out, rem
    a = Arguments(q, k, v, plan, options.scale, 0.0, None)
    a.named |= dict.fromkeys(("DREM", "LEFT", "OLDER"), rem)
    a.named |= {"OUT": view(out), "DOUT": view(out), "REM": rem}
    fitting(
        "stick", a.blocks("stick"),
        lambda blocks: _walk(a, plan, visits(plan, blocks.keys), blocks, 0, plan.tiles),
    )  # fmt: skip
    return out, rem


def at_once(q: Tensor, plan: Plan, slots: int) -> int:
    """Number of tiles that the backward takes at a time: LEFT and OLDER have no more numbers than q."""
    each = 2 * q.shape[0] * q.shape[1] * plan.tile * slots
    return max(1, min(plan.tiles, q.numel() // each))


def stick_backward(
    dout: Tensor, drem: Tensor | None, q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of the inputs."""
    B, H, Tq, _ = q.shape
    dq = torch.zeros_like(q)
    a = Arguments(q, k, v, plan, options.scale, 0.0, None)
    heads = a.keys.k.shape[1]
    dk, dv = (torch.zeros((B, heads, *x.shape[2:]), device=q.device) for x in (k, v))
    drem = torch.zeros((B, H, Tq), device=q.device) if drem is None else drem.float().contiguous()
    dout = dout.to(q.dtype)
    a.named |= {
        "OUT": view(dq),
        "DOUT": view(dout),
        "DK": view(dk),
        "DV": view(dv),
        "REM": drem,
        "DREM": drem,
    }

    def start(blocks: Blocks) -> None:
        known, (spanned, group) = visits(plan, blocks.keys), span_readers(a, plan)
        wave = at_once(q, plan, known.slots)
        edges = torch.empty((2, B * H, wave, known.slots, plan.tile), dtype=torch.float32, device=q.device)
        a.named["LEFT"], a.named["OLDER"] = edges
        rows, columns = min(blocks.rows, power_of_two(plan.tile)), triton.cdiv(plan.k_rows, blocks.keys)
        a.named |= {"SPANNED": spanned, "UNITED": unit_readers(a, plan, blocks.keys), "columns": columns}
        for first in range(0, plan.tiles, wave):
            some = min(wave, plan.tiles - first)
            _walk(a, plan, known, blocks, first, some, keep=True)
            _walk(a, plan, known, blocks, first, some, backward=True)
            stick_columns_kernel[(B * heads * columns,)](
                **_named(a, stick_columns_kernel, known), first_tile=first, wave=some,
                GROUP=group or blocks.keys, F=a.flags(blocks, rows, blocks.keys), **blocks.options(),
            )  # fmt: skip

    if dq.numel() and plan.tiles and plan.k_rows:
        fitting("stick, backward", a.blocks("stick"), start)
    dk, dv = (summed(x, k.shape[:2]).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv

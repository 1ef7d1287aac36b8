"""What all kernels share: the product, the logits, the visibility formula, addresses of tensors and tables.

A plan's table is `[batch, heads, length]` with batch B or 1 and any divisor of Hq as heads: a kernel gets its
pointer, its heads and its batch stride (0 if the batch is shared); `place` is the offset of row (b, h).
Arguments that belong together enter a kernel, and the functions that it calls, as one named tuple.
A logit is `unit * x` (see `numerics`); exponentials have base 2, factor = unit * log2(e).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""True in Triton's interpreter, which multiplies the bit patterns of bf16 as integers."""

ANY = tl.constexpr(-1)
NONE = tl.constexpr(-2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))
ALWAYS = tl.constexpr(float("inf"))


class Flags(NamedTuple):
    """Compile-time description of a plan and a call: what they have, and the sizes of a program's blocks."""

    D: int
    DV: int
    BD: int
    """D rounded up to a power of two; BDV likewise."""
    BDV: int
    BM: int
    BN: int
    CUT: int
    """Keys of a chunk with element tests: fewer than BN, because the tests take registers."""
    STAGES: int
    TILE: int
    FOLD: int
    """Queries per head, where one tile holds the queries of a whole head group, head by head; else 0."""
    UNIT: int
    UNIT_LANES: int
    """UNIT rounded up to a power of two."""
    PART: int
    """Piece size of a unit for blocks of BN keys: UNIT, or gcd(UNIT, BN) where neither divides the other."""
    SPANS: bool
    UNITS: bool
    BITS: bool
    CAUSAL: bool
    SELF: bool
    WINDOW: bool
    HEAD_RULES: bool
    END: bool
    QUERY_ORDER: bool
    KEY_ORDER: bool
    QUERY_POS: bool
    KEY_POS: bool
    QUERY_SEG: bool
    KEY_SEG: bool
    SHIFT: bool
    WIDE: bool
    BENT: bool
    """True if x is the logit itself, not the score: with a softcap, a bias, or a scale <= 0."""
    BIAS: bool
    SOFTCAP: bool
    STATS: bool = False
    """True to return sums (with PEAK maxima) of the weights under a given lse instead of outputs."""
    PEAK: bool = False
    DROP: bool = False
    ONLY: str = ""
    """Which of "dk" and "dv" a kernel over keys computes, if registers do not suffice for both; else ""."""
    SKIP: bool = False
    ALIBI: bool = False
    TAIL: int = 0
    """Lanes for the dimensions of q and k beyond BD; 0 if there are none. Only the forward supports them."""


class Rows(NamedTuple):
    """The query rows of a program: vectors of BM, matrices [BM, BD] and [BM, BDV]."""

    q: Any
    do: Any
    delta: Any
    share: Any
    """Factor from a given norm: exp(unit * (x - top)) * share is the weight."""
    real: Any
    pos: Any
    seg: Any
    within: Any
    """Lane of the row in its tile."""
    tail: Any
    """The dimensions of q from BD on, [BM, TAIL]; q where there are none."""


class View(NamedTuple):
    """A tensor [B,H,T,D] and its strides."""

    at: Any
    batch: Any
    head: Any
    row: Any
    lane: Any


class Table(NamedTuple):
    """A table [B or 1, any divisor of Hq, n]: its address, batch stride (0: shared) and number of heads."""

    at: Any
    batch: Any
    heads: Any


class Sizes(NamedTuple):
    """Numbers of query heads, key heads in memory, query and key tokens, query and key rows, tiles."""

    H: Any
    KV: Any
    Tq: Any
    Tk: Any
    q_rows: Any
    k_rows: Any
    tiles: Any


class Tokens(NamedTuple):
    """Tables of query tokens (order, position, segment), and each sequence's position offset.

    (No tuple is nested: Triton 3.6 loses what is known at compile time in an inner one.)
    """

    order: Any
    order_batch: Any
    order_heads: Any
    pos: Any
    pos_batch: Any
    pos_heads: Any
    seg: Any
    seg_batch: Any
    seg_heads: Any
    shift: Any
    shift_batch: Any
    offset: Any


class Spans(NamedTuple):
    """The spans of every tile: tables of first span, number of full ones, number of all; and their edges."""

    start: Any
    full: Any
    count: Any
    at: Any
    batch: Any
    heads: Any


class Units(NamedTuple):
    """The units of every tile: tables as of `Spans`, unit numbers, and where bits of partial units begin."""

    start: Any
    full: Any
    count: Any
    index: Any
    words_start: Any
    words: Any
    batch: Any
    heads: Any


class SpanReaders(NamedTuple):
    """Tiles whose spans visit a group of keys: the fields of `KeyLists`, all tables of one shape."""

    begin: Any
    whole: Any
    count: Any
    tile: Any
    until: Any
    source: Any
    batch: Any
    heads: Any
    columns: Any


class UnitReaders(NamedTuple):
    """Tiles that list the units of a block of keys: the fields of `Readers`, all tables of one shape."""

    begin: Any
    count: Any
    tile: Any
    members: Any
    batch: Any
    heads: Any
    columns: Any


class KeyTables(NamedTuple):
    """Tables of key rows (order, position, expiry, segment), all of one shape."""

    order: Any
    pos: Any
    end: Any
    seg: Any
    batch: Any
    heads: Any


class Keys(NamedTuple):
    """Addresses of the keys of a program's head and of their tables, which are in row space."""

    k: Any
    v: Any
    k_row: Any
    k_lane: Any
    v_row: Any
    v_lane: Any
    order: Any
    pos: Any
    end: Any
    seg: Any
    bias: Any
    rows: Any
    """Number of key rows."""


class Rule(NamedTuple):
    """Numbers of the logits (inner: the scale if `BENT`, scale / cap under a softcap) and of the window.

    below: a chunk is skipped if it lies this far under every row's largest x so far. of_heads: a table
    [heads, 3] of left, right and sink, where heads differ.
    """

    inner: Any
    cap: Any
    factor: Any
    left: Any
    right: Any
    sink: Any
    below: Any
    of_heads: Any
    heads: Any


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in fp32, in the operands' own precision: never TF32.

    A score is the same number in every kernel, with queries or keys as rows: each sums over the dimension
    in order. A BLAS under the interpreter does not, so there products are fp64 and rounded once.
    """
    if INTERPRETED:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        if acc is None:
            return product
        return acc + product
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def place(b, h, H, heads, batch, length):
    """Offset of the row of (b, query head h) in a table."""
    return b.to(tl.int64) * batch + (h * heads // H).to(tl.int64) * length


@triton.jit
def row_at(T, b, h, H, length):
    """Address of the row of (b, query head h) of a table."""
    return T.at + place(b, h, H, T.heads, T.batch, length)


@triton.jit
def head_at(X, b, h):
    """Address of head h of sequence b of a tensor; b and h have 64 bits."""
    return X.at + b * X.batch + h * X.head


@triton.jit
def keys_of(K, V, T, bias, b, kv, facts, rows):
    """The keys of head kv, with their tables from offset `facts` on."""
    return Keys(
        head_at(K, b, kv), head_at(V, b, kv), K.row, K.lane, V.row, V.lane,
        T.order + facts, T.pos + facts, T.end + facts, T.seg + facts, bias, rows,
    )  # fmt: skip


@triton.jit
def load_rows(base, row, stride, lane, some, N: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of a [T, N] matrix as [rows, BLOCK]; rows not in `some`, and columns from N on, read as 0.

    Scattered rows need 64-bit row numbers; a block of consecutive rows offsets the base instead.
    """
    d = tl.arange(0, BLOCK)
    at = base + row[:, None] * stride + d[None, :] * lane
    if MASKED:
        if N < BLOCK:
            return tl.load(at, mask=some[:, None] & (d < N)[None, :], other=0.0)
        return tl.load(at, mask=some[:, None], other=0.0)
    if N < BLOCK:
        return tl.load(at, mask=(d < N)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(base, row, stride, lane, some, x, N: tl.constexpr, BLOCK: tl.constexpr):
    """Write [rows, BLOCK] to the rows of a [T, N] matrix that are in `some`, in its dtype."""
    d = tl.arange(0, BLOCK)
    at = base + row.to(tl.int64)[:, None] * stride + d[None, :] * lane
    tl.store(at, x.to(base.dtype.element_ty), mask=some[:, None] & (d < N)[None, :])


@triton.jit
def tanh(x):
    """tanh: the odd series near 0, 1 - 2 / (e^2x + 1) elsewhere; absolute error below 2e-7."""
    y = x * x
    series = x * (1.0 + y * (-0.333333333 + y * (0.133333333 + y * (-0.053968254 + y * 0.021869489))))
    far = 1.0 - 2.0 / (tl.exp2(tl.minimum(tl.maximum(x, -15.0), 15.0) * (2.0 * LOG2E)) + 1.0)
    return tl.where(y < 0.06, series, far)


@triton.jit
def inside(q_pos, k_pos, R, F: tl.constexpr):
    """True where a key lies in the window of a query; a side of -1 is unbounded."""
    distance = q_pos - k_pos
    if F.WIDE:
        near = ((R.left < 0) | (distance <= R.left)) & ((R.right < 0) | (-distance <= R.right))
    else:  # distances up to 2^32 - 1 fit 32 bits without a sign; a side of -1 becomes just that, unbounded
        zero = tl.full([], 0, tl.int64)
        left, right = (zero + R.left).to(tl.uint32), (zero + R.right).to(tl.uint32)
        behind, ahead = distance.to(tl.uint32, bitcast=True), (-distance).to(tl.uint32, bitcast=True)
        near = tl.where(q_pos >= k_pos, behind <= left, ahead <= right)
    return near


@triton.jit
def visible(real, q_pos, q_seg, k_pos, k_end, k_seg, R, F: tl.constexpr):
    """The visibility formula; values of queries and of keys broadcast against each other, in either order."""
    keep = real
    if F.CAUSAL:
        keep = keep & ((q_pos >= k_pos) if F.SELF else (q_pos > k_pos))
    elif not F.SELF:
        keep = keep & (q_pos != k_pos)
    if F.WINDOW:
        keep = keep & (inside(q_pos, k_pos, R, F) | (k_pos < R.sink))
    if F.END:
        keep = keep & (q_pos < k_end)
    if F.QUERY_SEG or F.KEY_SEG:
        keep = keep & ((q_seg == k_seg) | (q_seg == ANY) | (k_seg == ANY)) & (q_seg != NONE) & (k_seg != NONE)
    return keep


@triton.jit
def query_facts(T, b, h, tile, within, N, F: tl.constexpr):
    """For each lane: whether it holds a query, and the query's token (0 if none), position and segment."""
    row = tile * F.TILE + within
    real = (within < F.TILE) & (row < N.q_rows)
    token = row
    if F.QUERY_ORDER:
        at = place(b, h, N.H, T.order_heads, T.order_batch, N.q_rows)
        token = tl.load(T.order + at + row, mask=real, other=-1)
        real = real & (token >= 0)
    token = tl.where(real, token, 0)
    own, length = token, N.Tq
    if F.FOLD:
        own, length = token % F.FOLD, F.FOLD
    pos = own.to(tl.int64) if F.WIDE else own
    if F.QUERY_POS:
        at = place(b, h, N.H, T.pos_heads, T.pos_batch, length)
        pos = tl.load(T.pos + at + own, mask=real, other=0)
        pos = pos.to(tl.int64) if F.WIDE else pos
    elif F.SHIFT:
        pos += tl.load(T.shift + b * T.shift_batch)
    else:
        pos += T.offset
    seg = token * 0 - 1
    if F.QUERY_SEG:
        at = place(b, h, N.H, T.seg_heads, T.seg_batch, length)
        seg = tl.load(T.seg + at + own, mask=real, other=-2)
    return real, token, pos, seg


@triton.jit
def rule_of(R, h, H, F: tl.constexpr):
    """The rule with the window and sink of head h, where heads differ."""
    left, right, sink = R.left, R.right, R.sink
    if F.HEAD_RULES:
        at = R.of_heads + 3 * (h * R.heads // H)
        left, right, sink = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return Rule(R.inner, R.cap, R.factor, left, right, sink, R.below, R.of_heads, R.heads)


@triton.jit
def logits(s, k_bias, R, F: tl.constexpr):
    """Turn scores into the x of logits; also return the softcap's tanh (without one, the scaled scores)."""
    x = s
    if F.BENT:
        x = s * R.inner
    bent = x
    if F.SOFTCAP:
        bent = tanh(x)
        x = bent * R.cap
    if F.BIAS:
        x += k_bias
    return x, bent


@triton.jit
def apart(q_pos, k_pos, F: tl.constexpr):
    """Distance of two positions in fp32; they broadcast."""
    if F.WIDE:
        far = tl.abs(q_pos - k_pos)
    else:  # fits without a sign, as in `inside`
        behind = (q_pos - k_pos).to(tl.uint32, bitcast=True)
        ahead = (k_pos - q_pos).to(tl.uint32, bitcast=True)
        far = tl.where(q_pos >= k_pos, behind, ahead)
    return far.to(tl.float32)


@triton.jit
def given_top(TOP, state, real):
    """The top of a norm, and which rows saw a key; others get an infinite top, so all their weights are 0."""
    top = tl.load(TOP + state, mask=real, other=NEVER)
    seen = real & (top != NEVER)
    return tl.where(seen, top, ALWAYS), seen


@triton.jit
def given_share(REST, state, real):
    """Factor exp(-rest) from a norm: it turns exp(unit * (x - top)) into weights."""
    return tl.exp2(tl.load(REST + state, mask=real, other=0.0) * -LOG2E)


@triton.jit
def gathered(total, p, axis: tl.constexpr, F: tl.constexpr):
    """Update a statistic with the weights p, summed (PEAK: maximised) along an axis."""
    if F.PEAK:
        return tl.maximum(total, tl.max(p, axis))
    return total + tl.sum(p, axis)


@triton.jit
def key_facts(K, n, live, F: tl.constexpr):
    """Token, position, expiry and segment of key rows n; a lane that is not live is no token (-1)."""
    token = tl.where(live, n, -1)
    if F.KEY_ORDER:
        token = tl.load(K.order + n, mask=live, other=-1)
    pos, end, seg = token, token, token * 0 - 1
    if F.KEY_POS:
        pos = tl.load(K.pos + n, mask=live, other=0)
    if F.END:
        end = tl.load(K.end + n, mask=live, other=0)
    if F.KEY_SEG:
        seg = tl.load(K.seg + n, mask=live, other=-2)
    return token, pos, end, seg


@triton.jit
def rows_of(T, Q, b, h, tile, part, N, BM: tl.constexpr, F: tl.constexpr):
    """Load part `part` of a tile: BM rows with their queries, and their tokens."""
    within = part * BM + tl.arange(0, BM)
    real, token, pos, seg = query_facts(T, b, h, tile, within, N, F)
    base = head_at(Q, b.to(tl.int64), h.to(tl.int64))
    q = load_rows(base, token.to(tl.int64), Q.row, Q.lane, real, F.D, F.BD, True)
    return Rows(q, q, q, q, real, pos, seg, within, q), token


@triton.jit
def keys_at(X, base, lane, row, step, live, N: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows base + lane of a head's K or V, 0 where they are not live."""
    at = base * tl.full([], 1, tl.int64)
    return load_rows(X + at * row, lane, row, step, live, N, BLOCK, True)


@triton.jit
def pairs(Q, K, R, k, base, lane, live, word, origin, WORDS, F: tl.constexpr):
    """The x of the logits of rows and key rows base + lane (k), the visibility mask, and the keys' tokens.

    `word` is the entry's index among the bits (-1: it has none), `origin` its first key row.
    """
    token, pos, end, seg = key_facts(K, base + lane, live, F)
    bias = R.factor
    if F.BIAS:
        bias = tl.load(K.bias + token, mask=token >= 0, other=0.0)[None, :]
    x, _ = logits(dot(Q.q, tl.trans(k)), bias, R, F)
    keep = Q.real[:, None] & (token >= 0)[None, :]
    if F.BITS:
        W: tl.constexpr = (F.UNIT + 31) // 32
        inside = base - origin + lane
        from_row = (tl.maximum(word, 0) * F.TILE + Q.within)[:, None] * W + (inside // 32)[None, :]
        bits = tl.load(WORDS + from_row, mask=keep & (word >= 0), other=-1)
        keep = keep & (((bits >> (inside % 32)[None, :]) & 1) != 0)
    keep = visible(keep, Q.pos[:, None], Q.seg[:, None], pos[None, :], end[None, :], seg[None, :], R, F)
    return x, keep, token

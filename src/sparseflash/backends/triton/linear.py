"""Linear attention: a state at every 256th token, and from there masked products.

Three kernels: what each segment of 256 tokens adds to the state, in parallel; a scan that carries the states
on in order; and the outputs, each chunk from the state of its segment. They compute the forward and, with
other operands, each gradient: dQ attends from dO to V with K as values; dK and dV run backwards in time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Linear, empty_like_layout
from .blocks import Blocks, Case, choose, fitting
from .common import INTERPRETED, dot, head_at
from .launch import power_of_two, view
from .softmax import summed

SEGMENT = 256


@triton.jit
def with_state(a, b, DTYPE: tl.constexpr):
    """A product with an fp32 factor: in bf16 for bf16, in TF32 for fp16 (its digits, the range of fp32)."""
    if DTYPE == tl.float16 and not INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    return dot(a.to(DTYPE), b.to(DTYPE))


@triton.jit
def spots(X, head, T, r, lanes, REVERSE: tl.constexpr, C: tl.constexpr):
    """Addresses of C rows of a head of X from r on, forward or (REVERSE) backward in time, at these lanes."""
    first = (T - 1 - r if REVERSE else r) * tl.full([], 1, tl.int64)
    down = tl.arange(0, C) * (-X.row if REVERSE else X.row)
    return head + first * X.row + down[:, None] + (lanes * X.lane)[None, :]


@triton.jit
def states_kernel(
    K, V, STATES, POWERS, pair, H, KH, VH, T, segments, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Compute a BD x BV block of what a segment adds to the state: STATES [B,H,segments,D,DV]."""
    DOWN: tl.constexpr = (D + BD - 1) // BD
    ACROSS: tl.constexpr = (DV + BV - 1) // BV
    cell, block = tl.program_id(0) // (DOWN * ACROSS), tl.program_id(0) % (DOWN * ACROSS)
    bh, first = cell // segments, cell % segments * SEGMENT
    b, h = (bh // H).to(tl.int64), bh % H
    lane, d, e = (
        tl.arange(0, C),
        block // ACROSS * BD + tl.arange(0, BD),
        block % ACROSS * BV + tl.arange(0, BV),
    )
    of_k, of_v = head_at(K, b, (h * KH // H).to(tl.int64)), head_at(V, b, (h * VH // H).to(tl.int64))
    powers = POWERS + h * (SEGMENT + 2)
    # backward in time, a state decays once more before it meets a token
    LATE: tl.constexpr = 1 if REVERSE else 0
    end = tl.minimum(first + SEGMENT, T)
    state = tl.zeros([BD, BV], tl.float32)
    for r in range(first, end, C):
        live = r + lane < end
        k = tl.load(spots(K, of_k, T, r, d, REVERSE, C), mask=live[:, None] & (d < D), other=0.0)
        v = tl.load(spots(V, of_v, T, r, e, REVERSE, C), mask=live[:, None] & (e < DV), other=0.0)
        after = tl.load(powers + tl.maximum(end - 1 - r - lane + LATE, 0)) * pair
        state += with_state(tl.trans(k * after[:, None]), v, k.dtype)
    at = STATES + cell.to(tl.int64) * D * DV + d[:, None] * DV + e[None, :]
    tl.store(at, state, mask=(d < D)[:, None] & (e < DV)[None, :])


@triton.jit
def carry_kernel(STATES, FIRST, LAST, POWERS, H, segments, size, first_row, first_lane, DV, powers,
                 GIVEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Exclusive scan: replace what each segment adds by the state before it; LAST is the state after all."""
    blocks = (size + BLOCK - 1) // BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    some = i < size
    state = tl.zeros([BLOCK], tl.float32)
    if GIVEN:
        state = tl.load(FIRST + bh * size + i // DV * first_row + i % DV * first_lane, mask=some, other=0.0)
    fades = POWERS + bh % H * powers + powers - 2
    for s in range(0, segments):
        at = STATES + (bh * segments + s) * size + i
        own = tl.load(at, mask=some, other=0.0)
        tl.store(at, state, mask=some)
        state = state * tl.load(fades + (s + 1) // segments) + own
    tl.store(LAST + bh * size + i, state, mask=some)


@triton.jit
def linear_kernel(
    Q, K, V, OUT, STATES, POWERS, pair, scale, H, QH, KH, VH, T, segments, chunks,
    D: tl.constexpr, DV: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, SEGMENT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Compute BV columns of a chunk of OUT; `pair` is a factor of each q.k, `scale` a factor of OUT.

    POWERS [H, SEGMENT + 2] is the decay after 0 to SEGMENT tokens, and after the length of the last segment.
    """
    ACROSS: tl.constexpr = (DV + BV - 1) // BV
    pid, e = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS * BV + tl.arange(0, BV)
    bh, r = pid // chunks, pid % chunks * C
    b, h = (bh // H).to(tl.int64), bh % H
    of_q = head_at(Q, b, (h * QH // H).to(tl.int64))
    of_k, of_v = head_at(K, b, (h * KH // H).to(tl.int64)), head_at(V, b, (h * VH // H).to(tl.int64))
    powers = POWERS + h * (SEGMENT + 2)
    lane, whole = tl.arange(0, C), tl.arange(0, WHOLE)
    live, first = r + lane < T, r // SEGMENT * SEGMENT
    STATES += (bh.to(tl.int64) * segments + r // SEGMENT) * D * DV
    out = tl.zeros([C, BV], tl.float32)
    for part in range(0, D, BD):
        d = part + tl.arange(0, BD)
        q = tl.load(spots(Q, of_q, T, r, d, REVERSE, C), mask=live[:, None] & (d < D), other=0.0)
        state = tl.load(STATES + d[:, None] * DV + e[None, :], mask=(d < D)[:, None] & (e < DV), other=0.0)
        out += with_state(q, state, q.dtype)
    LATE: tl.constexpr = 1 if REVERSE else 0
    out *= tl.load(powers + r - first + lane + 1 - LATE)[:, None]
    q = tl.load(spots(Q, of_q, T, r, whole, REVERSE, C), mask=live[:, None] & (whole < D), other=0.0)
    for j in range(first, r + C, C):
        real = j + lane < T
        k = tl.load(spots(K, of_k, T, j, whole, REVERSE, C), mask=real[:, None] & (whole < D), other=0.0)
        v = tl.load(spots(V, of_v, T, j, e, REVERSE, C), mask=real[:, None] & (e < DV), other=0.0)
        apart = r - j + lane[:, None] - lane[None, :]
        fade = tl.load(powers + tl.maximum(apart, 0), mask=apart >= 0, other=0.0) * pair
        out = dot((dot(q, tl.trans(k)) * fade).to(v.dtype), v, out)
    put = spots(OUT, head_at(OUT, b, h.to(tl.int64)), T, r, e, REVERSE, C)
    tl.store(put, (out * scale).to(OUT.at.dtype.element_ty), mask=live[:, None] & (e < DV))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rate: Tensor | None,
    first: Tensor | None,
    *,
    pair: float = 1.0,
    scale: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Write out [B,H,T,Dv] and return the state after the last token; `reverse` runs backward in time."""
    (B, H, T, Dv), D = out.shape, q.shape[3]
    last = torch.empty((B, H, D, Dv), dtype=torch.float32, device=q.device)
    if not last.numel() or not T:
        return last.zero_() if first is None else last.copy_(first)
    segments = -(-T // SEGMENT)
    states = torch.empty((B, H, segments, D, Dv), dtype=torch.float32, device=q.device)
    powers = _powers(rate, H, T - (segments - 1) * SEGMENT, q.device)
    named = {
        "K": view(k),
        "V": view(v),
        "STATES": states,
        "POWERS": powers,
        "KH": k.shape[1],
        "VH": v.shape[1],
    }
    named |= {"H": H, "T": T, "D": D, "DV": Dv, "SEGMENT": SEGMENT, "REVERSE": reverse, "pair": pair}
    named["segments"] = segments
    own = {"Q": view(q), "OUT": view(out), "QH": q.shape[1], "scale": scale, "WHOLE": power_of_two(D)}
    case = Case("linear", max(power_of_two(D), power_of_two(Dv)), 0, str(q.dtype).removeprefix("torch."))

    def add_up(blocks: Blocks) -> None:
        sizes = _sizes(blocks, D, Dv)
        programs = B * H * segments * triton.cdiv(D, sizes["BD"]) * triton.cdiv(Dv, sizes["BV"])
        states_kernel[(programs,)](**named, **sizes, **blocks.options())

    def attend(blocks: Blocks) -> None:
        sizes = _sizes(blocks, D, Dv)
        chunks = triton.cdiv(T, sizes["C"])
        programs = B * H * chunks * triton.cdiv(Dv, sizes["BV"])
        linear_kernel[(programs,)](**named, **own, **sizes, chunks=chunks, **blocks.options())

    blocks, steps = choose(case, False), (Dv, 1) if first is None else first.stride()[2:]
    fitting("linear, states", blocks, add_up)
    carry_kernel[(B * H * triton.cdiv(D * Dv, 1024),)](
        states, last if first is None else first, last, powers, H, segments, D * Dv, *steps, Dv, SEGMENT + 2,
        GIVEN=first is not None, BLOCK=1024,
    )  # fmt: skip
    fitting("linear", blocks, attend)
    return last


def _sizes(blocks: Blocks, D: int, Dv: int) -> dict[str, int]:
    """Block sizes: tokens of a chunk, and rows and columns of the state that a program has at a time."""
    return {
        "C": blocks.rows,
        "BD": min(blocks.keys, power_of_two(D)),
        "BV": min(blocks.keys, power_of_two(Dv)),
    }


def _powers(rate: Tensor | None, heads: int, last: int, device: torch.device) -> Tensor:
    """Decay of each head after 0 to SEGMENT tokens, and after `last`."""
    if rate is None:
        return torch.ones(heads, SEGMENT + 2, device=device)
    tokens = torch.arange(SEGMENT + 2, device=device)
    tokens[SEGMENT + 1 :].fill_(last)
    return torch.exp(-rate.double()[:, None] * tokens).float()


def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, initial: Tensor | None, options: Linear
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,T,Dv] and the state after the last token, fp32 [B,Hq,D,Dv]."""
    out = empty_like_layout(q, v.shape[3])
    initial = None if initial is None else initial.float().contiguous()
    return out, _attend(q, k, v, out, rate, initial, scale=options.scale)


def linear_backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor | None,
    initial: Tensor | None,
    options: Linear,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of the inputs, and the gradient of the initial state in fp32."""
    dout, heads = dout.to(q.dtype), q.shape[:3]
    first, end = (None if x is None else x.float().contiguous() for x in (initial, dstate))
    direct = q.dtype if k.shape[1] == q.shape[1] else torch.float32
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((*heads, x.shape[3]), dtype=direct, device=q.device) for x in (k, v))
    turned, back = (None if x is None else x.transpose(2, 3) for x in (first, end))
    _attend(dout, v, k, dq, rate, turned, scale=options.scale)
    _attend(v, dout, q, dk, rate, back, pair=options.scale, reverse=True)
    dinitial = _attend(k, q, dout, dv, rate, end, pair=options.scale, reverse=True)
    dk, dv = (summed(x, k.shape[:2]).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv, dinitial

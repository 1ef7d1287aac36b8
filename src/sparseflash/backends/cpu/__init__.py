"""Native CPU backend: exact flash attention over any plan, forward and backward, fp32, bf16 and fp16."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...plan import Plan
from ..numerics import Numbers, Softmax, Statistics, dropout_bar, empty_like_layout
from ..records import Records
from . import build, lists
from .call import CODES, Call, Decode, Record, View, aligned, call_of, empty, names_all, table, view, zeros
from .indexer import indexer_loss, indexer_topk
from .library import native, run
from .linear import linear_backward, linear_forward
from .nm import nm_product
from .pointwise import pointwise_backward, pointwise_forward
from .selection import heaviest, page_scores, probe, running_kth, tile_mass, top_indices, top_pages
from .stick import stick_backward, stick_forward

__all__ = [
    "NAME",
    "PEAKS",
    "backward",
    "decode",
    "decode_records",
    "forward",
    "heaviest",
    "indexer_loss",
    "indexer_topk",
    "influence",
    "linear_backward",
    "linear_forward",
    "lists",
    "native",
    "nm_product",
    "page_scores",
    "pointwise_backward",
    "pointwise_forward",
    "probe",
    "refuse",
    "running_kth",
    "stats",
    "status",
    "stick_backward",
    "stick_forward",
    "tile_mass",
    "top_indices",
    "top_pages",
]

NAME = "cpu"
PEAKS = True


def status() -> tuple[bool, str]:
    """Return whether the native library is available, and its levels or the reason why not."""
    try:
        found = native()
    except build.LevelError as error:
        return False, str(error)
    if isinstance(found, str):
        return False, found
    return True, f"fp32 and fp16: {found.names[found.fp32]}, bf16: {found.names[found.bf16]}, {found.path}"


def refuse(*tensors: Tensor) -> list[str]:
    """List the reasons why an op on these tensors cannot run here."""
    reasons, q = [], tensors[0]
    if q.device.type != "cpu":
        reasons.append(f"tensors are on {q.device}")
    if q.dtype not in CODES:
        reasons.append(f"dtype {q.dtype} (fp32, bf16, fp16 run here)")
    if reasons:
        return reasons
    found = native()
    return [found] if isinstance(found, str) else []


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    options: Softmax,
    *,
    key_bias: Tensor | None,
    out_dtype: torch.dtype,
    normed: bool,
    seed: Tensor | None = None,
    numbers: Numbers | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    skipped: Tensor | None = None,
    peaks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B,Hq,Tq,Dv] of `out_dtype`, lse fp32 [B,Hq,Tq], norm [2,B,Hq,Tq] if `normed`; fills `peaks`."""
    alive: list[Tensor] = []
    call = call_of(q, k, v, plan, options.scale, options.softcap, key_bias, alive)
    out = empty_like_layout(q, v.shape[-1], out_dtype)
    lse = empty(q.shape[:3], dtype=torch.float32)
    norm = empty((2, *q.shape[:3]), dtype=torch.float32) if normed else None
    if not names_all(plan):  # tokens without a row see nothing
        out.zero_()
        lse.fill_(float("-inf"))
        if norm is not None:
            norm[0], norm[1] = float("-inf"), 0
    drop(call, options, seed, numbers, alive)
    if alibi_slopes is not None or pair_bias is not None:
        add(call, alibi_slopes, pair_bias, alive)
    call.out_dtype = CODES[out_dtype]
    call.out, call.lse = view(out), lse.data_ptr()
    if norm is not None:
        call.norm = norm.data_ptr()
    if skipped is not None:
        call.skipped, call.skip_below = skipped.data_ptr(), options.skip
    if peaks is not None:
        call.over, call.stat, call.stat_width = OVER["block"], peaks.data_ptr(), peaks[0, 0].numel()
        call.stat_tile, call.stat_unit = options.tile, options.unit
    run("sf_forward", call, q.dtype)
    return out, lse, norm


def drop(
    call: Call, options: Softmax, seed: Tensor | None, numbers: Numbers | None, alive: list[Tensor]
) -> None:
    """Set the dropout fields of a call, if there is a seed."""
    if seed is None:
        return
    call.dropout_seed, call.dropout_bar = int(seed), dropout_bar(options.dropout)
    call.dropout_scale = 1 / (1 - options.dropout)
    call.first_head = options.head
    for name, own in zip(("q_number", "k_number"), numbers or ()):
        alive.append(own.to(torch.int32).contiguous().view(1, 1, -1))
        setattr(call, name, table(name, alive[-1], torch.int32, alive))


def add(call: Call, alibi_slopes: Tensor | None, pair_bias: Tensor | None, alive: list[Tensor]) -> None:
    """Set the bias fields of a call: ALiBi, and the pair bias."""
    if alibi_slopes is not None:
        alive.append(alibi_slopes.to(torch.float32).reshape(-1, call.Hq, 1))
        call.alibi = table("alibi_slopes", alive[-1], torch.float32, alive)
    if pair_bias is not None:
        if pair_bias.dim() == 3:  # by distance, flipped: ascending in the query, for each key
            if not call.Tq * call.Tk:
                return
            alive.append(pair_bias.float().flip(-1).contiguous())
            call.distance = table("pair_bias", alive[-1], torch.float32, alive)
            return
        pair_bias = aligned(pair_bias if pair_bias.dtype in CODES else pair_bias.float(), alive)
        alive.append(pair_bias.expand(call.B, call.Hq, call.Tq, call.Tk))
        call.pair, call.pair_dtype = view(alive[-1]), CODES[pair_bias.dtype]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    options: Softmax,
    *,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One softmax over all plans and the sinks, for few queries over many keys: `native/decode.h`."""
    return decode_records(q, k, v, plans, options, key_bias=key_bias, sink_logits=sink_logits)


def decode_records(
    q: Tensor,
    k: Tensor | Records,
    v: Tensor | Records,
    plans: Sequence[Plan],
    options: Softmax,
    *,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decode over rows of K and V, or over records, expanded in the first cache level: `records.h`."""
    alive: list[Tensor] = []
    scale, softcap = options.scale, options.softcap
    packed = {name: x for name, x in (("k", k), ("v", v)) if isinstance(x, Records)}
    k, v = (x.like() if isinstance(x, Records) else x for x in (k, v))
    calls = (Call * len(plans))(*(call_of(q, k, v, plan, scale, softcap, key_bias, alive) for plan in plans))
    for name, x in packed.items():
        item = 3 if x.form.int8 else CODES[x.dtype]
        for call in calls:
            setattr(call, name, view(x.data))
            setattr(call, f"{name}_record", Record(x.data.shape[3], x.form.kept, item))
    out, lse = empty_like_layout(q, v.shape[-1], options.dtype), empty(q.shape[:3], dtype=torch.float32)
    for call in calls:
        call.out_dtype, call.out, call.lse = CODES[out.dtype], view(out), lse.data_ptr()
    calls[0].threads = max(call.threads for call in calls)
    whole = Decode(ctypes.sizeof(Decode), calls, len(plans), CODES[q.dtype])
    if sink_logits is not None:
        alive.append(aligned(sink_logits.to(torch.float32).contiguous(), alive))
        whole.sink = alive[-1].data_ptr()
    run("sf_decode", whole, q.dtype)
    return out, lse


def _given(norm: Tensor, q: Tensor, alive: list[Tensor]) -> Tensor:
    """Check a norm's shape, and make it contiguous fp32."""
    if norm.shape != (2, *q.shape[:3]):
        raise ValueError(f"norm {list(norm.shape)}: expected {[2, *q.shape[:3]]}")
    alive.append(norm.to(torch.float32).contiguous())
    return aligned(alive[-1], alive)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    norm: Tensor,
    dlse: Tensor | None,
    plan: Plan,
    options: Softmax,
    *,
    delta: Tensor | None = None,
    key_bias: Tensor | None,
    grad_dtype: torch.dtype | None,
    seed: Tensor | None = None,
    numbers: Numbers | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    dpair: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv (of the input's dtype, or `grad_dtype`) and dbias [B,Hq,Tk] in fp32."""
    alive: list[Tensor] = []
    call = call_of(q, k, v, plan, options.scale, options.softcap, key_bias, alive)
    drop(call, options, seed, numbers, alive)
    add(call, alibi_slopes, pair_bias, alive)
    if dpair is not None:
        found = dpair if dpair.dim() == 4 else torch.zeros_like(dpair)
        setattr(call, "dpair" if dpair.dim() == 4 else "ddistance", found.data_ptr())
    wanted = grad_dtype or q.dtype
    dout = aligned(dout.to(q.dtype), alive)
    norm = _given(norm, q, alive)
    make = empty if names_all(plan) else zeros
    dq = make(q.shape, dtype=wanted)
    dk, dv = empty(k.shape, dtype=wanted), empty(v.shape, dtype=wanted)
    call.grad_dtype, call.dout = CODES[wanted], view(dout)
    if delta is None:
        assert out is not None, "without out there is delta"
        out = aligned(out if out.dtype in CODES else out.to(q.dtype), alive)
        call.out_dtype, call.out = CODES[out.dtype], view(out)
    else:
        delta = aligned(delta.to(torch.float32).contiguous(), alive)
        call.delta = delta.data_ptr()
    call.dq, call.dk, call.dv = view(dq), view(dk), view(dv)
    call.norm = norm.data_ptr()
    if dlse is not None:
        dlse = aligned(dlse.to(torch.float32).contiguous(), alive)
        call.dlse = dlse.data_ptr()
    dbias = None
    if key_bias is not None:
        dbias = empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)
        call.dbias = dbias.data_ptr()
    run("sf_backward", call, q.dtype)
    if call.ddistance and dpair is not None:
        dpair += found.flip(-1)
    return dq, dk, dv, dbias


OVER = {"key": 0, "row": 1, "entry": 2, "diagonal": 3, "block": 4}


def stats(
    q: Tensor,
    k: Tensor,
    norm: Tensor,
    plan: Plan,
    options: Statistics,
    *,
    key_bias: Tensor | None,
) -> Tensor:
    """Sums (or maxima) of the weights under a norm, by key, row, entry, diagonal or block: [B,Hq,width]."""
    alive: list[Tensor] = []
    call = call_of(q, k, k, plan, options.scale, options.softcap, key_bias, alive)
    call.v = View()
    return _stats(call, q, norm, plan, options, alive)


def influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    norm: Tensor,
    delta: Tensor,
    plan: Plan,
    options: Statistics,
    *,
    key_bias: Tensor | None,
) -> Tensor:
    """Statistics of influences: the first-order change of out . dout if a pair is removed."""
    alive: list[Tensor] = []
    call = call_of(q, k, v, plan, options.scale, options.softcap, key_bias, alive)
    dout = aligned(dout.to(q.dtype), alive)
    delta = aligned(delta.to(torch.float32).contiguous(), alive)
    call.dout, call.delta = view(dout), delta.data_ptr()
    return _stats(call, q, norm, plan, options, [*alive, dout, delta])


def _stats(
    call: Call, q: Tensor, norm: Tensor, plan: Plan, options: Statistics, alive: list[Tensor]
) -> Tensor:
    norm, width = _given(norm, q, alive), options.width
    found = empty((q.shape[0], q.shape[1], width), dtype=torch.float32)
    if not width:  # no queries and no keys: there is no distance
        return found
    call.norm, call.stat = norm.data_ptr(), found.data_ptr()
    call.over, call.peak, call.stat_width = OVER[options.over], options.peak, width
    call.entry_width = width // max(plan.tiles, 1) if options.over == "entry" else 0
    call.stat_tile, call.stat_unit = options.tile, options.unit
    run("sf_stats", call, q.dtype)
    return found

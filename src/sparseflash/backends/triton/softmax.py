"""Softmax attention over a plan, its gradients, and decoding: how the two kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.errors import BackendError
from ...plan import Plan
from ...plan.options import TILE
from ...plan.record import FLAT
from ...plan.transpose import transpose_spans
from ..numerics import NEVER, Numbers, Softmax, empty_like_layout, over_plans, unit_of
from .blocks import WHOLE, Blocks, fitting
from .columns import columns_kernel
from .common import SpanReaders, UnitReaders
from .launch import Arguments, found, multiprocessors, power_of_two, readers_of, view
from .rows import rows_kernel
from .split import merge, work_of


def launch_rows(
    a: Arguments,
    plan: Plan,
    *,
    backward: bool,
    work: Tensor | None = None,
    below: float = 0.0,
    skipped: Tensor | None = None,
) -> None:
    """Run the kernel over query rows: one program per row block, or with `work` several that share its keys.

    With `skipped` [B,H,2], skip chunks whose x all lie `below` the rows' largest, and count chunks and skips.
    """
    programs = a.q.shape[0] * a.q.shape[1] * plan.tiles if work is None else len(work)
    shared = {"WORK": a.none if work is None else work, "SPLIT": work is not None}
    shared["RULE"] = a.named["RULE"]._replace(below=below)

    def start(blocks: Blocks) -> None:
        rows = min(blocks.rows, power_of_two(plan.tile))
        parts = -(-plan.tile // rows)
        gone = a.none
        if skipped is not None:
            gone = torch.empty(programs * parts, dtype=torch.int64, device=skipped.device)
        rows_kernel[(programs * parts,)](
            **(a.named | shared), blocks=parts, GONE=gone, BACKWARD=backward,
            F=a.flags(blocks, rows, min(32, blocks.keys)), **blocks.options(),
        )  # fmt: skip
        if skipped is not None:
            met = gone.view(*skipped.shape[:2], -1)
            skipped.add_(torch.stack([met & 0xFFFFFFFF, met >> 32], -1).sum(-2))

    if programs:
        name = "rows, backward" if backward else "rows" if work is None else "decode"
        fitting(name, a.blocks(name), start)


def empty_results(q: Tensor, plan: Plan, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate out, lse and norm; prefill them for tokens that no row names, which see nothing."""
    out = empty_like_layout(q, dim, dtype)
    lse, norm = (
        torch.empty(x, dtype=torch.float32, device=q.device) for x in (q.shape[:3], (2, *q.shape[:3]))
    )
    if plan.q_order is not None or not plan.tiles:
        out.zero_()
        lse.fill_(NEVER)
        norm[0].fill_(NEVER)
        norm[1].zero_()
    return out, lse, norm


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B,Hq,Tq,Dv] of `out_dtype`, lse fp32 [B,Hq,Tq], and its norm [2,B,Hq,Tq]."""
    if pair_bias is not None:
        raise BackendError(
            "pair_bias runs on 'reference' and 'cpu'; here a bias of low rank may be dimensions of q and k"
        )
    out, lse, norm = empty_results(q, plan, v.shape[-1], out_dtype)
    a = Arguments(q, k, v, plan, options.scale, options.softcap, key_bias)
    a.check_registers("results", WHOLE)
    a.drop(options, seed, numbers)
    a.lean(alibi_slopes)
    results = {"OUT": view(out), "LSE": lse, "TOP": norm[0], "REST": norm[1]}
    a.named |= results | {"DOUT": view(out), "DELTA": lse}
    a.switches["SKIP"] = skipped is not None
    below = options.skip / unit_of(options.scale, options.softcap, key_bias)
    launch_rows(a, plan, backward=False, below=below, skipped=skipped)
    return out, lse, norm


def decode_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    options: Softmax,
    *,
    key_bias: Tensor | None,
    out_dtype: torch.dtype,
    normed: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Decode one plan: results of `forward`, few queries over many keys; programs share the keys of a row.

    One work list holds the keys of all lists, and every program takes an equal share of it however the lists
    differ in length; the pieces of a row are merged in order. If the heads of a group see the same keys, one
    tile holds the queries of all of them, so that keys are read once.
    """
    heads, programs, fold = q.shape[1], 2 * multiprocessors(q.device), 0
    lists = plan
    if group := packed(q, k, plan, key_bias):
        fold, rows = q.shape[2], group * q.shape[2]
        q = q.unflatten(1, (-1, group)).flatten(2, 3)
        plan = plan._changed(Tq=rows, tile=rows, span_room=plan.span_room, room=plan.room)
    (B, H, *_), Dv = q.shape, v.shape[3]
    out, lse, norm = empty_results(q, plan, Dv, out_dtype)
    if B * H * plan.tiles:
        work, rows = work_of(lists, B, H, programs), min(plan.tile, plan.q_rows)
        part = torch.empty((len(work.pieces), 1, rows, Dv), dtype=torch.float32, device=q.device)
        part_norm = torch.empty((2, len(work.pieces), rows), dtype=torch.float32, device=q.device)
        a = Arguments(q, k, v, plan, options.scale, options.softcap, key_bias, fold)
        if any(a.switches[name] for name in ("BITS", "HEAD_RULES", "BIAS", "SOFTCAP")):
            a.check_registers("decode calls with bits, rules by head, a bias or a softcap", 256)
        results = {"OUT": view(part), "LSE": lse, "TOP": part_norm[0], "REST": part_norm[1]}
        a.named |= results | {"DOUT": view(part), "DELTA": lse}
        launch_rows(a, plan, backward=False, work=work.pieces)
        merge(part, part_norm, work, plan, unit_of(options.scale, options.softcap, key_bias), out, lse, norm)
    return out.view(B, heads, -1, Dv), lse.view(B, heads, -1), norm.view(2, B, heads, -1)


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
    """Decode over several plans and the sinks: one softmax, merged from `decode_plan` of each."""
    softmax = over_plans(
        decode_plan, q, k, v, plans, options, key_bias=key_bias, sink_logits=sink_logits, normed=False
    )
    return softmax[:2]


def packed(q: Tensor, k: Tensor, plan: Plan, key_bias: Tensor | None) -> int:
    """Number of heads that share one tile; 0 if heads see different keys, or there are several tiles."""
    group, rest = divmod(q.shape[1], max(k.shape[1], 1))
    tables = [x for name, x in plan.tensors().items() if name not in FLAT]
    alike = all(k.shape[1] % x.shape[1] == 0 for x in (*tables, *(() if key_bias is None else (key_bias,))))
    plain = plan.tiles == 1 and plan.q_order is None and plan.bits is None
    return group if group > 1 and not rest and alike and plain and group * q.shape[2] <= TILE else 0


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
    wanted, dout = grad_dtype or q.dtype, dout.to(q.dtype)
    if delta is None:
        assert out is not None, "without out there is delta"
        delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta = delta - torch.where(norm[0] == NEVER, 0, dlse.float())
    dq = torch.zeros_like(q, dtype=wanted)
    a = Arguments(q, k, v, plan, options.scale, options.softcap, key_bias)
    a.check_whole("gradients")
    a.check_registers("gradients", 256)
    a.drop(options, seed, numbers)
    a.lean(alibi_slopes)
    norm = norm.float().contiguous()
    delta = delta.float().contiguous()
    given = {"LSE": delta, "TOP": norm[0], "REST": norm[1], "DELTA": delta}
    a.named |= given | {"OUT": view(dq), "DOUT": view(dout)}
    launch_rows(a, plan, backward=True)
    dk, dv, dbias = _key_gradients(a, plan, k, v, wanted)
    return dq, dk, dv, dbias


def _key_gradients(
    a: Arguments, plan: Plan, k: Tensor, v: Tensor, wanted: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv and dbias; where heads or sequences share a key, their parts are added in order."""
    q, heads = a.q, a.keys.k.shape[1]
    (B, H), (Bk, Hkv, Tk, _) = q.shape[:2], k.shape
    direct = heads == Hkv and Bk == B
    dk, dv = (
        torch.zeros((B, heads, Tk, x.shape[3]), dtype=wanted if direct else torch.float32, device=q.device)
        for x in (k, v)
    )
    dbias = torch.zeros((B, H, Tk), dtype=torch.float32, device=q.device) if a.switches["BIAS"] else None
    launch_columns(a, plan, dk, dv, dk if dbias is None else dbias)
    dk, dv = (summed(x, k.shape[:2]).to(wanted) for x in (dk, dv))
    return dk, dv, dbias


def launch_columns(a: Arguments, plan: Plan, dk: Tensor, dv: Tensor, dbias: Tensor) -> None:
    """Run the kernel over keys: dk and dv of each packed head, dbias of each query head."""
    programs = a.q.shape[0] * a.keys.k.shape[1]
    named = a.given(columns_kernel) | {"DK": view(dk), "DV": view(dv), "DBIAS": dbias}
    named["SPANNED"], group = span_readers(a, plan)

    def start(blocks: Blocks) -> None:
        rows = min(blocks.rows, power_of_two(plan.tile))
        columns = -(-plan.k_rows // blocks.keys)
        flags, united = a.flags(blocks, rows, min(32, rows)), unit_readers(a, plan, blocks.keys)
        for only in ("dk", "dv") if a.crowded else ("",):
            columns_kernel[(programs * columns,)](
                **named, UNITED=united, columns=columns,
                GROUP=group or blocks.keys, F=flags._replace(ONLY=only), **blocks.options(),
            )  # fmt: skip

    if programs * plan.k_rows:
        fitting("columns", a.blocks("columns"), start)


def summed(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum x [B,H,...] to the batch and heads of k; heads and sequences that share a key add up in order."""
    if x.shape[1] != shape[1]:
        x = x.unflatten(1, (shape[1], -1)).sum(2)
    return x.sum(0, keepdim=True) if x.shape[0] != shape[0] else x


def span_readers(a: Arguments, plan: Plan) -> tuple[SpanReaders, int]:
    """Transposed span lists: tiles that visit each group of keys, and the number of keys in a group."""
    spans = plan.span_lists
    if spans is None:
        return SpanReaders(*[a.none] * 6, 0, 1, 1), 0
    keys = plan.span_keys or transpose_spans(spans, plan.k_rows)
    lists = (keys.start, keys.full, keys.count, keys.index, keys.until, keys.source)
    return SpanReaders(*lists, *found(keys.count), keys.count.shape[-1]), keys.group


def unit_readers(a: Arguments, plan: Plan, keys: int) -> UnitReaders:
    """Transposed unit lists: tiles that list the units of each block of `keys` keys."""
    units = plan.unit_lists
    if units is None:
        return UnitReaders(*[a.none] * 4, 0, 1, 1)
    readers = readers_of(units, keys)
    lists = (readers.begin, readers.count, readers.tile, readers.members)
    return UnitReaders(*lists, *found(readers.count), readers.count.shape[-1])

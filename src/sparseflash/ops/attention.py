"""`attention` and `attention_backward`: validation and autograd; the kernels are in the backends."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import (
    Softmax,
    Statistics,
    bias_gradient,
    blocks,
    empty_like_layout,
    norm_of,
    over_plans,
    state_dtype,
    unit_of,
)
from ..common.errors import SparseFlashError
from ..plan import Plan
from ._arguments import (
    WIDEST,
    AnyPlan,
    as_backend,
    as_block,
    as_dropout,
    as_dtype,
    as_plans,
    as_scale,
    as_softcap,
    autocast,
    check_bias,
    check_inputs,
    check_pairs,
    check_plan,
    check_sink,
    check_unknown,
    describe,
    is_finite,
    is_real,
    number_of,
)
from ._register import Gradient, learning, once, register, untraced


def _sum(parts: Sequence[Tensor | None]) -> Tensor:
    total = parts[0]
    assert total is not None
    for part in parts[1:]:
        assert part is not None
        total = total + part
    return total


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    seed: Tensor | None,
    alibi_slopes: Tensor | None,
    pair_bias: Tensor | None,
    plans: Sequence[Plan],
    options: Softmax,
    *,
    normed: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out, lse and, for the backward, the norm over all plans (None if not `normed`)."""
    attend = choose("forward", options.backend, q, k, v).forward
    how: dict[str, Any] = {"key_bias": key_bias, "sink_logits": sink_logits}
    if seed is not None or alibi_slopes is not None or pair_bias is not None:
        how |= {"seed": seed, "alibi_slopes": alibi_slopes, "pair_bias": pair_bias}
    found: tuple[Tensor, Tensor, Any] = over_plans(attend, q, k, v, plans, options, normed=normed, **how)
    return found


def _empty(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    state, options = state_dtype(q), rest[-1]
    lse, norm = q.new_empty(q.shape[:3], dtype=state), q.new_empty((2, *q.shape[:3]), dtype=state)
    return empty_like_layout(q, v.shape[-1], options.dtype), lse, norm


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    norm: Tensor,
    delta: Tensor | None,
    key_bias: Tensor | None,
    seed: Tensor | None,
    alibi_slopes: Tensor | None,
    pair_bias: Tensor | None,
    plans: Sequence[Plan],
    options: Softmax,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, key_bias and pair_bias; a bias gradient not wanted is empty."""
    alone, state, wanted = len(plans) == 1, state_dtype(q), options.dtype or q.dtype
    run = choose("backward", options.backend, q, k, v).backward
    how: dict[str, Any] = {"delta": delta, "key_bias": key_bias, "seed": seed}
    how |= {"alibi_slopes": alibi_slopes, "pair_bias": pair_bias}
    how["grad_dtype"] = wanted if alone else state
    dpair = q.new_empty(0, dtype=state)
    if options.pairs and pair_bias is not None:  # plans are disjoint, so they write different pairs
        last = (q.shape[2], k.shape[2]) if pair_bias.dim() == 4 else pair_bias.shape[2:]
        how["dpair"] = dpair = q.new_zeros((*q.shape[:2], *last), dtype=state)
    parts = [run(dout, q, k, v, out, norm, dlse, plan, options, **how) for plan in plans]
    dq, dk, dv = (_sum([part[n] for part in parts]) for n in range(3))
    if key_bias is None:
        dbias = q.new_empty(0, dtype=state)
    else:
        dbias = bias_gradient(_sum([part[3] for part in parts]), key_bias)
    if options.pairs and pair_bias is not None:
        dpair = dpair.sum_to_size(pair_bias.shape)
    dq, dk, dv = (x.to(wanted).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dbias, dpair


def _empty_gradients(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, norm: Any, delta: Any, key_bias: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, pair_bias, _, options = rest
    biases = key_bias, pair_bias if options.pairs else None
    shapes = [(0,) if x is None else x.shape for x in biases]
    dq, dk, dv = (x.new_empty(x.shape, dtype=options.dtype or x.dtype) for x in (q, k, v))
    dbias, dpair = (q.new_empty(shape, dtype=state_dtype(q)) for shape in shapes)
    return dq, dk, dv, dbias, dpair


_gradients = register("attention_backward", _backward, _empty_gradients)


def sink_gradient(
    dout: Tensor, dlse: Tensor | None, out: Tensor, norm: Tensor, sink_logits: Tensor, unit: float
) -> Tensor:
    """Gradient of sink logits (keys with value 0): d = sum over rows of p_sink * (dlse - delta)."""
    slope = -(dout.to(norm.dtype) * out.to(norm.dtype)).sum(-1)
    if dlse is not None:
        slope = slope + dlse
    top, rest = norm.double()
    share = torch.exp((sink_logits.double()[:, None] - top * unit) - rest)
    share = torch.where(top == -math.inf, 0, share)  # rows that see nothing, under a sink of -inf
    return (share.to(norm.dtype) * slope).sum((0, 2))


def _find(run: Any, kept: Any, slopes: Any, plans: Any, options: Softmax) -> Any:
    """Gradients of all tensor arguments; the seed and alibi_slopes get None."""
    q, k, v, key_bias, sink_logits, seed, alibi_slopes, pair_bias, out, norm = kept
    dout, dlse = slopes
    dout = torch.zeros_like(out) if dout is None else dout
    own = options._replace(dtype=None, tile=0, unit=0)
    given = key_bias, seed, alibi_slopes, pair_bias
    dq, dk, dv, dbias, dpair = run(dout, dlse, q, k, v, out, norm, None, *given, plans, own)
    dsink = None
    if sink_logits is not None:
        unit = unit_of(options.scale, options.softcap, key_bias, alibi_slopes, pair_bias)
        dsink = once(sink_gradient(dout, dlse, out, norm, sink_logits, unit))
    found = None if key_bias is None else dbias, dsink, None, None, dpair if options.pairs else None
    return dq, dk, dv, *found


softmax = register(
    "attention",
    _forward,
    _empty,
    gradient=Gradient(_find, lambda given, found: (*given, found[0], found[2]), _gradients, constants=1),
    inference=functools.partial(_forward, normed=False),
)


def _peaks_like(q: Tensor, k: Tensor, options: Softmax) -> Tensor:
    shape = blocks(q.shape[2], k.shape[2], options.tile, options.unit)
    return q.new_zeros((*q.shape[:2], *shape), dtype=state_dtype(q))


def _forward_with_peaks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    seed: Tensor | None,
    alibi_slopes: Tensor | None,
    pair_bias: Tensor | None,
    plans: Sequence[Plan],
    options: Softmax,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute out, lse, the largest weight of each block, and the norm.

    With several plans or sinks the norm is known only after the forward, so a second pass computes the
    weights again (`stats`). Dropout does not change the maxima.
    """
    run: Any = choose("forward", options.backend, q, k, v)
    peaks = _peaks_like(q, k, options)
    alone = len(plans) == 1 and sink_logits is None and getattr(run, "PEAKS", False)
    attend = functools.partial(run.forward, peaks=peaks) if alone else run.forward
    how: dict[str, Any] = {"key_bias": key_bias, "sink_logits": sink_logits, "seed": seed}
    how |= {"alibi_slopes": alibi_slopes, "pair_bias": pair_bias}
    if not alone and not (alibi_slopes is None and pair_bias is None):
        raise SparseFlashError(
            "return_block_max together with alibi_slopes or pair_bias: on backend 'cpu' alone, over one plan "
            "and without sink_logits"
        )
    found: tuple[Tensor, Tensor, Any] = over_plans(attend, q, k, v, plans, options, normed=True, **how)
    out, lse, norm = found
    if not alone:
        numbers = (options.scale, options.softcap, peaks[0, 0].numel(), "", options.tile, options.unit)
        for plan in plans:
            own = run.stats(q, k, norm, plan, Statistics("block", True, *numbers), key_bias=key_bias)
            torch.maximum(peaks, own.view(peaks.shape), out=peaks)
    return out, lse, peaks, norm


def _empty_with_peaks(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, norm = _empty(q, k, v, *rest)
    return out, lse, _peaks_like(q, k, rest[-1]), norm


_with_peaks = register(
    "attention_with_peaks",
    _forward_with_peaks,
    _empty_with_peaks,
    gradient=Gradient(
        _find, lambda given, found: (*given, found[0], found[3]), _gradients, constants=2, told=1
    ),
)


def _forward_skipping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    pair_bias: Tensor | None,
    plans: Sequence[Plan],
    options: Softmax,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out and lse without the skipped blocks, and count visited and skipped blocks, [B,Hq,2]."""
    attend = choose("forward", options.backend, q, k, v).forward
    skipped = q.new_zeros((*q.shape[:2], 2), dtype=torch.int64)
    how: dict[str, Any] = {"key_bias": key_bias, "sink_logits": sink_logits, "skipped": skipped}
    how |= {"alibi_slopes": alibi_slopes, "pair_bias": pair_bias}
    out, lse, _ = over_plans(attend, q, k, v, plans, options, normed=False, **how)
    return out, lse, skipped


def _empty_skipping(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, _ = _empty(q, k, v, *rest)
    return out, lse, q.new_empty((*q.shape[:2], 2), dtype=torch.int64)


_skipping = register("attention_skipping", _forward_skipping, _empty_skipping)


def _as_skip(skip_below: object, seed: Tensor | None, *given: Tensor | None) -> float:
    """Validate skip_below; refuse gradients and dropout beside it."""
    threshold = number_of(skip_below)
    if not (is_finite(threshold) and threshold >= 0):
        raise SparseFlashError(f"skip_below={skip_below!r}: expected a number from 0 on, or None")
    if learning(*given):
        raise SparseFlashError(
            "skip_below has no gradients, but an input requires some: leave it out, or call attention under "
            "torch.no_grad()"
        )
    if seed is not None:
        raise SparseFlashError("skip_below together with dropout_p: the one is for inference, leave one out")
    return float(threshold)


@functools.lru_cache(32)
def _dense_again(Tq: int, Tk: int, causal: bool, q_offset: int, inference: bool) -> Plan:
    """Cache dense plans for the layers of a step: making one takes longer than attention over 128 tokens."""
    return Plan.dense(Tq, Tk, causal=causal, q_offset=q_offset, device=torch.device("cpu"))


def _dense(q: Tensor, k: Tensor, causal: bool, q_offset: int | Tensor) -> Plan:
    Tq, Tk = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and type(q_offset) is int and untraced(q, k):
        return _dense_again(Tq, Tk, causal, q_offset, torch.is_inference_mode_enabled())
    return Plan.dense(Tq, Tk, causal=causal, q_offset=q_offset, device=q.device)


_ELSEWHERE = {
    "dropout": "the argument is called dropout_p",
    "attn_mask": "give a bool mask as plan=Plan.from_mask(mask)",
    "bias": "key_bias [B,H,Tk] adds a number for each key, pair_bias [B,H,Tq,Tk] one for each pair",
    "is_causal": "the argument is called causal",
    "softmax_scale": "the argument is called scale",
    "window_size": "give a window as plan=Plan.dense(Tq, Tk, causal=True, window=(left, right))",
    "enable_gqa": "GQA needs no switch: give k and v with fewer heads",
}


class _Options(TypedDict, total=False):
    causal: bool
    q_offset: int | Tensor
    scale: float | None
    key_bias: Tensor | None
    sink_logits: Tensor | None
    alibi_slopes: Tensor | None
    pair_bias: Tensor | None
    softcap: float | None
    skip_below: float | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    out_dtype: torch.dtype | None
    deterministic: bool
    backend: str | None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan | None = None,
    *,
    return_lse: bool = False,
    return_block_max: tuple[int, int] | None = None,
    return_skipped: bool = False,
    **options: Unpack[_Options],
) -> tuple[Tensor, ...]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan | None = None,
    *,
    causal: bool = False,
    q_offset: int | Tensor = 0,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    softcap: float | None = None,
    skip_below: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    return_block_max: tuple[int, int] | None = None,
    return_skipped: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Exact softmax attention over the keys that a plan makes visible to each query, with exact gradients.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`, any strides; `Hq` a multiple of `Hkv`; fp32, fp16,
        bf16 (fp64 on the reference backend). D and Dv up to 576 (on Triton 512, and
        D 576 without gradients).
    plan : Plan or tuple of Plan, optional
        Visible pairs; a tuple of plans with disjoint visible sets is one softmax over all. None: dense.
    causal : bool
        Only without a plan: query i (at position `i + q_offset`) sees keys 0..i + q_offset.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    key_bias : Tensor, optional
        `[B|1, H, Tk]`, added to the logits of each key, with gradient.
    sink_logits : Tensor, optional
        `[Hq]`: the logit of an extra key with value 0, with gradient.
    alibi_slopes : Tensor, optional
        `[Hq]` or `[B,Hq]`: adds `-slope * |distance|` to the logit of a pair; distances are between positions
        of the plan, so `q_offset` counts. Without gradient.
    pair_bias : Tensor, optional
        Expands to `[B,Hq,Tq,Tk]`, any floating dtype and strides: added to the logit of each pair; -inf hides
        a pair, but it is still computed (use a plan to hide many). Its gradient has the same size. Or
        `[B|1,Hq|1,Tq + Tk - 1]`: one number per token distance, at index `key - query + Tq - 1`, with a
        gradient of that size: a bucket table `[Hq, n]` is `table[None, :, bucket]` (`t5_buckets`,
        docs/moving.md). Not in Triton's kernels.
    softcap : float, optional
        c in `c * tanh(score / c)`.
    skip_below : float, optional
        Inference only: a block of keys is skipped if, for every query of the block, the running maximum
        exceeds the block's logits by more than this. So every skipped weight is at most `exp(-skip_below)` of
        its row's largest, and a skipped block computes no exponentials and no product with v (BLASST, arXiv
        2512.12087: its threshold lambda is `exp(-skip_below)`, and scales with one over the length). Blocks
        are up to 64 queries by up to 64 keys, in the order of the plan's lists; Triton's are those of its
        kernel, so it may skip others.
    dropout_p : float
        Probability in [0, 1) of dropping a weight after the softmax; the others are multiplied by
        `1 / (1 - dropout_p)`, as PyTorch does. It applies whenever it is passed: there is no `training` flag.
    dropout_seed : int or Tensor, optional
        Seed of the draw, which is a function of the seed, batch slot, query head, query token and key token:
        it is the same on every backend and in every plan. An int, or a 0-d int64 tensor. None draws a seed
        from the default generator of the device, whose state checkpoints restore.
    out_dtype : torch.dtype, optional
        Dtype of out: fp32 (fp64 for fp64 inputs) for partial results, so that `merge` rounds nothing twice.
        None: the dtype of q.
    return_lse : bool
        Also return the natural-log sum of exponentials, fp32 `[B,Hq,Tq]`, differentiable. Dropout does not
        change it.
    return_block_max : (tile, unit), optional
        Also return, last, the largest weight P of each block of `tile` query by `unit` key tokens, fp32
        `[B,Hq,ceil(Tq/tile),ceil(Tk/unit)]`, without gradient. A by-product of the forward on the CPU with
        one plan and no sinks; otherwise a second pass that takes as long as `attention_stats`.
    return_skipped : bool
        With skip_below: also return, last, int64 `[B,Hq,2]`: the number of blocks that a head visited, and
        how many of them were skipped.
    deterministic : bool
        Bitwise repeatable results. All present backends always are.
    backend : str, optional
        "reference", "cpu" or "triton"; None chooses the fastest usable one.

    Returns
    -------
    Tensor, or a tuple with the requested extras
        out `[B,Hq,Tq,Dv]`: 0 (lse -inf, gradients 0) for a query that sees nothing; lse; block maxima.

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given, what is expected and how to fix it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q = k = v = torch.randn(1, 2, 256, 64)
    >>> plan = sf.Plan.dense(256, 256, causal=True, window=(63, 0))
    >>> sf.attention(q, k, v, plan).shape
    torch.Size([1, 2, 256, 64])
    """
    if unsupported:
        check_unknown(
            "attention",
            unsupported,
            _ELSEWHERE,
            ("plan", "return_lse", "return_block_max", "return_skipped", *_Options.__annotations__),
        )
    if not isinstance(causal, bool):
        raise SparseFlashError(f"causal={causal!r}: expected True or False")
    if plan is not None and causal:
        raise SparseFlashError(
            "plan together with causal=True: causality belongs to the plan: Plan.dense(Tq, Tk, causal=True)"
        )
    if plan is not None and not (isinstance(q_offset, int) and q_offset == 0):
        raise SparseFlashError(
            "plan together with q_offset: positions belong to the plan, e.g. Plan.dense(..., q_offset=...)"
        )
    if not isinstance(deterministic, bool):
        raise SparseFlashError(f"deterministic={deterministic!r}: expected True or False")
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v, WIDEST)
    if plan is None:
        plan = _dense(q, k, causal, q_offset)
    plans = as_plans(plan)
    for one in plans:
        check_plan(one, q, k)
    if key_bias is not None:
        check_bias(key_bias, q, k)
    if sink_logits is not None:
        check_sink(sink_logits, q)
    if not (alibi_slopes is None and pair_bias is None):
        check_pairs(alibi_slopes, pair_bias, q, k)
    share, seed = as_dropout(dropout_p, dropout_seed, q)
    wanted = as_dtype("out_dtype", out_dtype, q)
    options = Softmax(as_scale(scale, q.shape[-1]), as_softcap(softcap), as_backend(backend), wanted, share)
    if pair_bias is not None and pair_bias.requires_grad and torch.is_grad_enabled():
        if options.softcap:
            raise SparseFlashError(
                "pair_bias requires a gradient, and has none under a softcap: give pair_bias.detach()"
            )
        options = options._replace(pairs=True)
    beside = sink_logits, seed, alibi_slopes, pair_bias
    if skip_below is None:
        if return_skipped:
            raise SparseFlashError("return_skipped without skip_below: nothing is skipped")
    elif return_block_max is not None:
        raise SparseFlashError(
            "return_block_max together with skip_below: of what is skipped no weight is known"
        )
    else:
        asked = options._replace(
            skip=_as_skip(skip_below, seed, q, k, v, key_bias, sink_logits, alibi_slopes, pair_bias)
        )
        out, lse, skipped = _skipping(q, k, v, key_bias, sink_logits, alibi_slopes, pair_bias, plans, asked)
        found = (out, *((lse,) if return_lse else ()), *((skipped,) if return_skipped else ()))
        return found if len(found) > 1 else out
    if return_block_max is not None:
        tile, unit = as_block("return_block_max", return_block_max)
        asked = options._replace(tile=tile, unit=unit)
        out, lse, peaks, _ = _with_peaks(q, k, v, key_bias, *beside, plans, asked)
        return (out, lse, peaks) if return_lse else (out, peaks)
    out, lse, _ = softmax(q, k, v, key_bias, *beside, plans, options)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    plan: AnyPlan,
    *,
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
    delta: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and key_bias from the GLOBAL out and lse: for rings, cascades and chunks.

    `out [B,Hq,Tq,Dv]` and `lse [B,Hq,Tq]` may come from a softmax over more keys than k and v hold here (ring
    attention, merged pieces, sinks): the result is this piece's share of the gradients. `dbias` is None
    without `key_bias`.

    The backward uses out only for `delta [B,Hq,Tq]`, the sum over Dv of dout * out: with many pieces compute
    delta once, in fp32, and pass it with None for out. `grad_dtype=torch.float32` (fp64 for fp64 inputs)
    returns shares that are to be summed unrounded; None rounds them to the dtype of q.

    An fp32 lse has a rounding error of eps |lse|, which every weight of its row inherits: the error is at
    most three times an eager run's, plus eps |lse| of the result. (`attention` itself loses nothing: it keeps
    maximum and sum apart.) Where logits are in the thousands, give lse in fp64, or as two fp32 numbers:
    `lse_low [B,Hq,Tq]` is the remainder of the rounding.

    With dropout, pass the `dropout_seed` of this piece's forward; pieces of one softmax take different seeds,
    because each counts its own tokens from 0.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v, dout = torch.randn(4, 1, 2, 100, 32)
    >>> plan = sf.Plan.dense(100, 100, causal=True)
    >>> out, lse = sf.attention(q, k, v, plan, return_lse=True)
    >>> dq, dk, dv, _ = sf.attention_backward(dout, q, k, v, out, lse, plan)
    """
    check_inputs(q, k, v, WIDEST)
    plans = as_plans(plan)
    for one in plans:
        check_plan(one, q, k)
    if key_bias is not None:
        check_bias(key_bias, q, k)
    share, seed = as_dropout(dropout_p, dropout_seed, q)
    if share and dropout_seed is None:
        raise SparseFlashError("dropout_p without dropout_seed: give the seed that the forward was given")
    check_pairs(alibi_slopes, pair_bias, q, k)
    wanted = as_dtype("grad_dtype", grad_dtype, q)
    options = Softmax(as_scale(scale, q.shape[-1]), as_softcap(softcap), as_backend(backend), wanted, share)
    want = (*q.shape[:3], v.shape[-1])
    for label, x, shape in (
        ("dout", dout, want),
        ("out", out, want),
        ("lse", lse, want[:3]),
        ("dlse", dlse, want[:3]),
        ("lse_low", lse_low, want[:3]),
        ("delta", delta, want[:3]),
    ):
        if x is None and (label in ("dlse", "lse_low", "delta") or (label == "out" and delta is not None)):
            continue
        good = is_real(x, shape, q.device)
        if not good:
            raise SparseFlashError(
                f"{label}: {describe(x)}; expected floating point {list(shape)} on {q.device}"
                + (", or None where delta is given" if label == "out" else "")
            )
    state = state_dtype(q)
    unit = unit_of(options.scale, options.softcap, key_bias, alibi_slopes, pair_bias)
    dq, dk, dv, dbias, _ = _gradients(
        dout.to(q.dtype),
        None if dlse is None else dlse.to(state),
        q,
        k,
        v,
        None if out is None else out.to(q.dtype if out.dtype not in (q.dtype, state) else out.dtype),
        norm_of(lse, lse_low, unit, state),
        None if delta is None else delta.to(state),
        key_bias,
        seed,
        alibi_slopes,
        pair_bias,
        plans,
        options,
    )
    return dq, dk, dv, None if key_bias is None else dbias

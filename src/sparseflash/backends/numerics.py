"""What ops and backends share: option tuples, dtypes, memory layouts, and merging partial softmaxes.

Partial softmaxes are over disjoint sets of keys (and sinks).

exp(logit - lse) must not be computed from one rounded lse, whose last place is worth more than 1 where
logits are large. So a row's normaliser has two parts: with logit = `unit * x`, `top` is the largest x of the
row, and `rest` the log of the sum of exp(unit * (x - top)); lse = unit * top + rest. The difference x - top
is exact where it matters, and rest is small. Backends write both as `norm [2,B,H,T]`, in the dtype of lse; a
row without keys has top -inf and rest 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import Plan

SMALLEST_UNIT = 1e-30
NEVER = float("-inf")


class Softmax(NamedTuple):
    """Options of softmax attention: `attention`, its backward, `decode`."""

    scale: float
    softcap: float  # 0: no softcap
    backend: str = ""  # "": the first able backend
    dtype: torch.dtype | None = None  # of out, or of the gradients; None: the dtype of the inputs
    dropout: float = 0.0  # share of weights that are dropped; the seed is a separate argument
    skip: float = 0.0  # where blocks may be skipped: the distance below a row's largest logit for that
    tile: int = 0  # queries per block, if the largest weight of each block is wanted; 0: it is not
    unit: int = 0
    pairs: bool = False  # whether the gradient of pair_bias is wanted
    head: int = 0  # what number the first query head has, by which dropout draws


class Numbers(NamedTuple):
    """Which tokens of many a call has, int [Tq] and [Tk]: dropout draws for them what it draws for all."""

    queries: Tensor
    keys: Tensor


class Recorded(NamedTuple):
    """Options of `decode` over records: the `records.Form` of K and that of V."""

    scale: float
    softcap: float
    backend: str
    dtype: torch.dtype | None
    k_dim: int
    k_kept: int
    k_int8: bool
    v_dim: int
    v_kept: int
    v_int8: bool


class Statistics(NamedTuple):
    """Options of `attention_stats`: the axis of its sums (or maxima), and `width`, their number per head."""

    over: str
    peak: bool
    scale: float
    softcap: float
    width: int
    backend: str = ""
    tile: int = 1  # queries and keys of a block
    unit: int = 1


class Pointwise(NamedTuple):
    """Options of `pointwise_attention`."""

    activation: str
    scale: float
    out_scale: float
    backend: str = ""


class Linear(NamedTuple):
    """Options of `linear_attention`."""

    scale: float
    backend: str = ""


class Stick(NamedTuple):
    """Options of `stick_breaking`."""

    scale: float
    backend: str = ""


class Choice(NamedTuple):
    """Options of `indexer_topk`: how many keys, and whether their scores are wanted."""

    topk: int
    scored: bool
    backend: str = ""


class Likeness(NamedTuple):
    """Options of `indexer_kl_loss`: the indexer's scale, and those of the attention."""

    index_scale: float
    scale: float
    softcap: float
    backend: str = ""


class Probing(NamedTuple):
    """Options of `selection.probe`: slot i of the distances stands for `position - key = i - before`."""

    scale: float
    softcap: float
    width: int  # distances
    before: int
    consecutive: bool  # whether row i + 1 of a sequence is the token after row i
    backend: str = ""


class Masses(NamedTuple):
    """Options of `selection.tile_mass`: rows of a tile, columns of a unit, how weights are reduced."""

    scale: float
    softcap: float
    tile: int
    unit: int
    joint: bool  # weights are relative to the tile, not to a softmax of each row
    peak: bool
    backend: str = ""


class Best(NamedTuple):
    """Options of `selection.top_indices`."""

    k: int
    backend: str = ""


class Heaviest(NamedTuple):
    """Options of `selection.top_p`."""

    backend: str = ""


class NM(NamedTuple):
    """Options of `nm_product`: of each m neighbouring weights, n are used."""

    n: int
    m: int
    backend: str = ""


class Pages(NamedTuple):
    """Options of `selection.page_scores` and `top_pages`: rows of a page, and pages that are always kept."""

    parts: int
    sinks: int
    near: int
    share: str
    k: int
    backend: str = ""


class Running(NamedTuple):
    """Options of `selection.running_kth`: `most` bounds every k."""

    most: int
    backend: str = ""


def dropout_bar(share: float) -> int:
    """Threshold of dropout: random 32-bit integers below it drop their weight."""
    return round(share * 2**32)


def in_order(score: Tensor, among: Tensor | None) -> Tensor:
    """Map scores to integers of the same order: NaN below all numbers, entries outside `among` below NaN."""
    wide = score.dtype == torch.float64
    kind = torch.int64 if wide else torch.int32
    low = torch.iinfo(kind).min
    bits = (score if wide else score.float()).contiguous().view(kind)
    bits = torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)
    bits = torch.where(score == 0, 0, bits)  # of either sign
    bits = torch.where(score.isnan(), low + 1, bits)
    return bits if among is None else torch.where(among, bits, low)


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Mask of the n largest magnitudes of each m neighbours along the last axis; of equal ones the first."""
    parts = [
        x.contiguous() for x in weight.abs().reshape(*weight.shape[:-1], weight.shape[-1] // m, m).unbind(-1)
    ]
    rank = [torch.zeros_like(x, dtype=torch.uint8) for x in parts]  # rank in its group, 0 the largest
    for i in range(m):
        for j in range(i):
            first = parts[j] >= parts[i]
            rank[i] += first
            rank[j] += ~first
    return torch.stack([x < n for x in rank], -1).flatten(-2)


def state_dtype(q: Tensor) -> torch.dtype:
    """Dtype of accumulators, lse and row statistics: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def blocks(Tq: int, Tk: int, tile: int, unit: int) -> tuple[int, int]:
    """Number of `tile` x `unit` blocks along queries and along keys."""
    return -(-Tq // tile), -(-Tk // unit)


def empty_like_layout(like: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate uninitialised [B,H,T,dim] in the memory order of `like` (BSHD memory stays BSHD)."""
    B, H, T, _ = like.shape
    dtype = like.dtype if dtype is None else dtype
    if like.stride(1) < like.stride(2):
        return torch.empty((B, T, H, dim), dtype=dtype, device=like.device).transpose(1, 2)
    return torch.empty((B, H, T, dim), dtype=dtype, device=like.device)


BIASES = ("key_bias", "alibi_slopes", "pair_bias")
"""Arguments that are added to the logits."""


def bends(scale: float, softcap: float, *biases: Tensor | None) -> bool:
    """Whether x is the finished logit; otherwise x is the raw q.k and the exponent applies the scale."""
    return bool(softcap) or any(x is not None for x in biases) or not scale > SMALLEST_UNIT


def unit_of(scale: float, softcap: float, *biases: Tensor | None) -> float:
    """Factor that turns x into a logit."""
    return 1.0 if bends(scale, softcap, *biases) else scale


def norm_of(lse: Tensor, low: Tensor | None, unit: float, dtype: torch.dtype) -> Tensor:
    """Norm (top, rest) of a given lse; `low` is the rounding error of lse, to be added to it."""
    whole = lse.double() if low is None else lse.double() + low.double()
    return _pair(whole / unit, whole, unit, dtype)


def _pair(x: Tensor, logit: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """Stack (top, rest): x rounded to `dtype`, and the remainder of the logit; both inputs are fp64."""
    top = x.to(dtype)
    rest = torch.where(top == NEVER, 0, logit - top.double() * unit)
    return torch.stack([top, rest.to(dtype)])


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge parts (out, lse) over disjoint keys into out and lse in full precision; differentiable."""
    stack = torch.stack([lse for _, lse in parts])
    top = stack.detach().amax(0)
    top = torch.where(top == NEVER, 0, top)
    weight = torch.exp(stack - top)  # lse -inf gives weight 0 and a zero gradient
    total = weight.sum(0)
    some = total > 0
    lse = torch.where(some, torch.log(torch.where(some, total, 1)) + top, NEVER)
    return _weighed([out for out, _ in parts], weight / torch.where(some, total, 1)), lse


def _weighed(outs: Sequence[Tensor], share: Tensor) -> Tensor:
    state = state_dtype(outs[0])
    total: Tensor = share[0, ..., None].to(state) * outs[0].to(state)
    for part, out in zip(share[1:], outs[1:]):
        total = total + part[..., None].to(state) * out.to(state)
    return total


def over_plans(
    attend: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    options: Softmax,
    *,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    normed: bool,
    **also: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `attend` over each plan and merge as one softmax: out, lse and, if `normed`, the norm.

    Further keyword arguments are passed on to every call of `attend`.
    """
    wanted = options.dtype or q.dtype
    also["key_bias"] = key_bias
    if len(plans) == 1 and sink_logits is None:
        return attend(q, k, v, plans[0], options, out_dtype=wanted, normed=normed, **also)
    state = state_dtype(q)
    parts = [attend(q, k, v, plan, options, out_dtype=state, normed=True, **also) for plan in plans]
    unit = unit_of(options.scale, options.softcap, *(also.get(name) for name in BIASES))
    norms = [norm for *_, norm in parts if norm is not None]
    if sink_logits is not None:
        norms.append(of_sinks(sink_logits, q.shape[:3], unit, state))
    mixed, norm = combined([out for out, *_ in parts], norms, unit, state)
    out = empty_like_layout(q, v.shape[-1], wanted).copy_(mixed)
    top, rest = norm
    return out, (top * unit + rest).to(state), norm.to(state)


def of_sinks(sink_logits: Tensor, rows: torch.Size, unit: float, state: torch.dtype) -> Tensor:
    """Norm of an attention sink: a virtual key with that logit and value 0."""
    logit = sink_logits.double()[:, None].expand(rows)
    return _pair(logit / unit, logit, unit, state)


def combined(
    outs: Sequence[Tensor], norms: Sequence[Tensor], unit: float, state: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Merge parts of one softmax: out in full precision, norm in fp64; a norm without an out is a sink."""
    share, norm = _shares(norms, unit)
    return _weighed(outs, share.to(state)), norm


def absorb(out: Tensor, norm: Tensor, part: Tensor, its: Tensor, unit: float) -> None:
    """Merge a part, over other keys, into `out` (full precision) and `norm` (fp64), in place."""
    share, both = _shares([norm, its], unit)
    mine, other = share[..., None].to(out.dtype)
    out.mul_(mine).addcmul_(other, part)
    norm.copy_(both)


def _shares(norms: Sequence[Tensor], unit: float) -> tuple[Tensor, Tensor]:
    """The share of each part in the softmax of all, [parts,B,H,T], and the norm of all; both fp64."""
    tops, rests = torch.stack([norm.double() for norm in norms], 1)
    top = tops.amax(0)
    weight = torch.exp((tops - torch.where(top == NEVER, 0, top)) * unit + rests)
    total = weight.sum(0)
    some = total > 0
    total = torch.where(some, total, 1)
    return weight / total, torch.stack([top, torch.log(total)])


def bias_gradient(dbias: Tensor, key_bias: Tensor) -> Tensor:
    """Reduce per-query-head gradients [B,H,T] to those of a bias [B|1,H',T], summed in a fixed order."""
    B, H, T = dbias.shape
    own_batch, own = key_bias.shape[:2]
    dbias = dbias.view(B, own, H // own, T).sum(2)
    return dbias.sum(0, keepdim=True) if own_batch == 1 and B != 1 else dbias

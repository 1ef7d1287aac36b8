"""`attention_stats`: what the softmax looked at, streamed, for methods that select by attention mass."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..dispatch import choose
from ..errors import SparseFlashError
from ..numerics import Statistics, norm_of, state_dtype, unit_of
from ..plan import Plan
from ._arguments import (
    as_backend,
    as_scale,
    as_softcap,
    check_bias,
    check_inputs,
    check_plan,
    describe,
    is_real,
)
from ._register import register

Over = Literal["key", "entry", "row", "diagonal"]


def _forward(
    q: Tensor, k: Tensor, norm: Tensor, key_bias: Tensor | None, plan: Plan, options: Statistics
) -> Tensor:
    run = choose("stats", options.backend, q, k, k).stats
    return run(q, k, norm, plan, options, key_bias=key_bias)


def _empty(q: Any, k: Any, norm: Any, key_bias: Any, plan: Any, options: Statistics) -> Tensor:
    found: Tensor = q.new_empty((q.shape[0], q.shape[1], options.width), dtype=state_dtype(q))
    return found


_stats = register("attention_stats", _forward, _empty)


def attention_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: Plan,
    *,
    over: Over = "key",
    reduce: Literal["sum", "max"] = "sum",
    lse_low: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums or maxima of the attention weights `P = exp(S - lse)`, from a given lse, without forming P.

    Memory is that of the result; no gradient.

    Parameters
    ----------
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`.
    lse : Tensor
        `[B,Hq,Tq]`, natural log, of any softmax (that of a denser plan gives shares of its mass). Rows with
        -inf count nothing. A weight is known to eps |lse|, beside three times the error of an eager run:
        where logits are in the thousands give lse in fp64, or `lse_low`.
    plan : Plan
        The pairs that are looked at.
    over : "key", "row", "entry" or "diagonal"
        What is left: each key `[B,Hq,Tk]`; each query `[B,Hq,Tq]`; each listed span or unit
        `[B,Hq,tiles,n]`, spans before units in list order, n the longest list; each distance between query
        and key token `[B,Hq,Tq+Tk-1]`, place i being `query - key = i - (Tk - 1)`.
    reduce : "sum" or "max"
    lse_low : Tensor, optional
        `[B,Hq,Tq]`: what lse, in fp32, does not hold of it.
    scale, softcap, key_bias, backend
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor
        fp32 (fp64 for fp64 input).

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 100, 32)
    >>> plan = sf.Plan.dense(100, 100, causal=True)
    >>> out, lse = sf.attention(q, k, v, plan, return_lse=True)
    >>> mass = sf.attention_stats(q, k, lse, plan, over="key")
    >>> bool((mass.sum(-1) - 100).abs().max() < 1e-3)
    True
    """
    if over not in ("key", "row", "entry", "diagonal"):
        raise SparseFlashError(f"over={over!r}: expected key, row, entry or diagonal")
    if reduce not in ("sum", "max"):
        raise SparseFlashError(f"reduce={reduce!r}: expected sum or max")
    if not isinstance(plan, Plan):
        raise SparseFlashError(f"plan is a {type(plan).__name__}: expected one Plan (not a tuple)")
    check_inputs(q, k, k)
    check_plan(plan, q, k)
    if key_bias is not None:
        check_bias(key_bias, q, k)
    for name, x in ("lse", lse), ("lse_low", lse_low):
        good = (x is None and name == "lse_low") or is_real(x, q.shape[:3], q.device)
        if not good:
            want = f"floating point {list(q.shape[:3])} on {q.device}"
            raise SparseFlashError(f"{name}: {describe(x)}; expected {want}")
    factor, cap = as_scale(scale, q.shape[-1]), as_softcap(softcap)
    low = None if lse_low is None else lse_low.detach()
    norm = norm_of(lse.detach(), low, unit_of(factor, cap, key_bias), state_dtype(q))
    per = (
        sum(int(n.max()) if n is not None and n.numel() else 0 for n in (plan.span_count, plan.count))
        if (over == "entry")
        else 0
    )
    width = {
        "key": k.shape[2],
        "row": q.shape[2],
        "entry": plan.tiles * per,
        "diagonal": max(q.shape[2] + k.shape[2] - 1, 0),
    }[over]
    options = Statistics(over, reduce == "max", factor, cap, width, as_backend(backend))
    bias = None if key_bias is None else key_bias.detach()
    found = _stats(q.detach(), k.detach(), norm, bias, plan, options)
    return found.view(*found.shape[:2], plan.tiles, per) if over == "entry" else found

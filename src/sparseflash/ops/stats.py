"""`attention_stats`: streamed statistics of attention weights, for methods that select by attention mass."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import Statistics, blocks, norm_of, state_dtype, unit_of
from ..common.errors import SparseFlashError
from ..plan import Plan
from ._arguments import (
    WIDEST,
    as_backend,
    as_block,
    as_scale,
    as_softcap,
    check_bias,
    check_inputs,
    check_plan,
    describe,
    is_real,
)
from ._register import register

Over = Literal["key", "entry", "row", "diagonal", "block"]


def _forward(
    q: Tensor,
    k: Tensor,
    norm: Tensor,
    key_bias: Tensor | None,
    v: Tensor | None,
    dout: Tensor | None,
    delta: Tensor | None,
    plan: Plan,
    options: Statistics,
) -> Tensor:
    if v is None or dout is None or delta is None:
        run = choose("stats", options.backend, q, k).stats
        return run(q, k, norm, plan, options, key_bias=key_bias)
    moved = choose("influence", options.backend, q, k, v).influence
    return moved(q, k, v, dout, norm, delta, plan, options, key_bias=key_bias)


def _empty(q: Any, *rest: Any) -> Tensor:
    found: Tensor = q.new_empty((q.shape[0], q.shape[1], rest[-1].width), dtype=state_dtype(q))
    return found


_stats = register("attention_stats", _forward, _empty)


def _slopes(
    q: Tensor, v: Tensor | None, dout: Tensor | None, delta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """Validate v, dout and delta, which influences need; three None if none is given."""
    given = {"v": v, "dout": dout, "delta": delta}
    missing = [name for name, x in given.items() if x is None]
    if v is None or dout is None or delta is None:
        if len(missing) < len(given):
            raise SparseFlashError(
                f"influences need v, dout and delta: there is no {' and no '.join(missing)}"
            )
        return None, None, None
    shape = (*q.shape[:3], v.shape[3])
    wanted: tuple[tuple[str, Tensor, tuple[int, ...]], ...] = (
        ("dout", dout, shape),
        ("delta", delta, shape[:3]),
    )
    for name, x, want in wanted:
        if not is_real(x, want, q.device):
            raise SparseFlashError(
                f"{name}: {describe(x)}; expected floating point {list(want)} on {q.device}"
            )
    return v.detach(), dout.detach().to(q.dtype), delta.detach().to(state_dtype(q))


def attention_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: Plan,
    *,
    over: Over = "key",
    reduce: Literal["sum", "max"] = "sum",
    block: tuple[int, int] | None = None,
    v: Tensor | None = None,
    dout: Tensor | None = None,
    delta: Tensor | None = None,
    lse_low: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums or maxima of the attention weights `P = exp(S - lse)`, from a given lse, without forming P.

    Memory is that of the result; no gradient. With `v`, `dout` and `delta` the statistics are of influences
    instead of weights: the first-order change of the loss if a pair is removed and its row renormalised.

    Parameters
    ----------
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`.
    lse : Tensor
        `[B,Hq,Tq]`, natural log, of any softmax (lse of a denser plan gives shares of its mass). Rows with
        -inf contribute nothing. The error of a weight is eps |lse|, beside three times that of an eager run:
        where logits are in the thousands give lse in fp64, or `lse_low`.
    plan : Plan
        The pairs to evaluate.
    over : "key", "row", "entry", "diagonal" or "block"
        Axis of the result: each key `[B,Hq,Tk]`; each query `[B,Hq,Tq]`; each listed span or unit
        `[B,Hq,tiles,n]`, spans before units in list order, n the longest list; each distance between query
        and key token `[B,Hq,Tq+Tk-1]`, index i being `query - key = i - (Tk - 1)`; each block of tokens
        `[B,Hq,ceil(Tq/tile),ceil(Tk/unit)]`.
    reduce : "sum" or "max"
    block : (tile, unit)
        With over="block": query tokens x key tokens of a block.
    v, dout, delta : Tensor, optional
        `[B,Hkv,Tk,Dv]`, the gradient of out `[B,Hq,Tq,Dv]`, and `(dout * out).sum(-1)`, `[B,Hq,Tq]`, from an
        unrounded out (`out_dtype=torch.float32`): the statistics are of `|P (delta - dP) / (1 - P)|`,
        dP = dout v^T. Where 1 - P is less than 2^-16 or the eps of q's dtype, the rest of the row is rounding
        noise, and `|P dP|` is used instead: the change of the loss if the pair's weight is set to zero.
    lse_low : Tensor, optional
        `[B,Hq,Tq]`: the rounding remainder of an fp32 lse.
    scale, softcap, key_bias, backend
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor
        fp32 (fp64 for fp64 input).

    References
    ----------
    Influences: MoA (arXiv 2406.14909), section 4.1. Maxima over blocks: the training target of
    SeerAttention's gate (arXiv 2410.13276), section 4.2; `attention(..., return_block_max=)` returns them.

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
    if over not in get_args(Over):
        raise SparseFlashError(f"over={over!r}: expected key, row, entry, diagonal or block")
    if reduce not in ("sum", "max"):
        raise SparseFlashError(f"reduce={reduce!r}: expected sum or max")
    if not isinstance(plan, Plan):
        raise SparseFlashError(f"plan is a {type(plan).__name__}: expected one Plan (not a tuple)")
    check_inputs(q, k, k if v is None else v, WIDEST)
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
    tile, unit = as_block("block", block) if over == "block" else (1, 1)
    if over != "block" and block is not None:
        raise SparseFlashError(f'block={block!r} with over={over!r}: it is for over="block"')
    v, dout, delta = _slopes(q, v, dout, delta)
    counts = [lists.count for lists in plan.lists()] if over == "entry" else []
    per = sum(int(n.max()) for n in counts if n.numel())
    width = {
        "key": k.shape[2],
        "row": q.shape[2],
        "entry": plan.tiles * per,
        "diagonal": max(q.shape[2] + k.shape[2] - 1, 0),
        "block": math.prod(blocks(q.shape[2], k.shape[2], tile, unit)),
    }[over]
    options = Statistics(over, reduce == "max", factor, cap, width, as_backend(backend), tile, unit)
    bias = None if key_bias is None else key_bias.detach()
    found = _stats(q.detach(), k.detach(), norm, bias, v, dout, delta, plan, options)
    if over == "block":
        return found.view(*found.shape[:2], *blocks(q.shape[2], k.shape[2], tile, unit))
    return found.view(*found.shape[:2], plan.tiles, per) if over == "entry" else found

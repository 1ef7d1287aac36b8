"""FlexAttention's function on these kernels: any machine, forward and backward.

Compiled kernels cannot call a `score_mod`, a Python function. So it is traced and decomposed into what
kernels support: a factor, a softcap, and then a bias per pair. Any other form is an error that names the
operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..ops.attention import attention
from ..plan import Plan
from ..plan.record import Record

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.clone.default, _ATEN.alias.default, _ATEN.lift_fresh_copy.default)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention`, exactly, forward and backward.

    Parameters
    ----------
    query, key, value : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`.
    score_mod : callable, optional
        `(score, b, h, q_idx, kv_idx) -> score`, of the form `softcap(factor * score) + bias(b, h, q_idx,
        kv_idx)`, each part optional; `torch.where(keep(...), score, -inf)` is such a bias. A bias is
        materialised for all pairs, Tq x Tk per batch and head it depends on: put large hidden areas into the
        mask.
    block_mask : BlockMask or Plan, optional
        Converted to a plan at every call; to use one for many calls, convert it once by
        `Plan.from_block_mask(block_mask)` and pass the plan.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    enable_gqa : bool
        Whether key and value may have fewer heads.
    return_lse : bool
        Also return the log-sum-exp, fp32 `[B,Hq,Tq]`.
    kernel_options
        Accepted and ignored.
    return_aux : AuxRequest, optional
        `AuxRequest(lse=True)` makes the result (out, AuxOutput).

    Returns
    -------
    Tensor, (Tensor, Tensor) or (Tensor, AuxOutput)

    Raises
    ------
    SparseFlashError
        For a `score_mod` of another form; the message names the operation.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> from sparseflash.compat import flex_attention
    >>> q, k, v = torch.randn(3, 1, 2, 256, 32).requires_grad_()
    >>> mask = create_block_mask(lambda b, h, q, kv: q - kv < 64, 1, 1, 256, 256, device="cpu")
    >>> out = flex_attention(q, k, v, lambda s, b, h, q, kv: 20 * torch.tanh(s / 20), block_mask=mask)
    >>> out.sum().backward()
    """
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise SparseFlashError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}: expected as many, or enable_gqa=True"
        )
    Tq, Tk = query.shape[2], key.shape[2]
    if block_mask is None:
        plan: Any = Plan.dense(Tq, Tk, device=query.device)
    else:
        plan = block_mask if isinstance(block_mask, (Record, tuple)) else Plan.from_block_mask(block_mask)
    given: dict[str, Any] = {}
    if score_mod is not None:
        parts = taken_apart(score_mod, query.device)
        usual = query.shape[-1] ** -0.5 if scale is None else scale
        given = {"scale": usual * parts.factor, "softcap": parts.softcap}
        if parts.bias is not None:
            shape = query.shape[0] if "b" in parts.bias else 1, query.shape[1] if "h" in parts.bias else 1
            given["pair_bias"] = _bias(score_mod, *shape, Tq, Tk, query.device)
    else:
        given = {"scale": scale}
    out, lse = attention(query, key, value, plan, return_lse=True, **given)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        if getattr(return_aux, "max_scores", False):
            raise SparseFlashError("return_aux: the largest scores are not returned; ask for lse alone")
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


class Parts(NamedTuple):
    """Decomposed score_mod: softcap(factor * score), then a bias that depends on some of b, h, q and kv."""

    factor: float
    softcap: float | None
    bias: frozenset[str] | None


def taken_apart(score_mod: ScoreMod, device: torch.device) -> Parts:
    """Trace a score_mod and decompose it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names = ("score", "b", "h", "q", "kv")
    index = torch.zeros(1, dtype=torch.int64, device=device)
    sample = [torch.zeros(1, device=device), index, index.clone(), index.clone(), index.clone()]
    named = getattr(score_mod, "__name__", type(score_mod).__name__)
    try:
        graph = make_fx(lambda *given: score_mod(*given), tracing_mode="real")(*sample).graph
    except Exception as error:
        raise SparseFlashError(f"score_mod {named!r} cannot be traced: {error}") from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    looks: dict[Any, set[str]] = {node: {name} for node, name in zip(inputs, names, strict=True)}
    for node in graph.nodes:
        looks.setdefault(node, set()).update(*(looks[x] for x in node.all_input_nodes))
    [output] = [node for node in graph.nodes if node.op == "output"]
    chain, bias = [], set()
    node = output.args[0]
    while node is not inputs[0]:
        inner = [x for x in node.all_input_nodes if "score" in looks[x]] if hasattr(node, "op") else []
        if len(inner) != 1 or node.op != "call_function":
            raise _other(named, node)
        for x in node.all_input_nodes:
            bias |= looks[x] - {"score"} if x is not inner[0] else set()
        chain.append((node, inner[0]))
        node = inner[0]
    return _read(named, chain[::-1], looks, bias)


def _read(named: str, chain: list[Any], looks: dict[Any, set[str]], bias: set[str]) -> Parts:
    """Match the operations on the score, first to last, to factor, softcap and bias."""
    factor, outer, cap, added = 1.0, 1.0, False, False
    for node, inner in chain:
        op, args = node.target, node.args
        others = [x for x in args if x is not inner]
        if op in _COPIES:
            continue
        number = others[0] if len(others) == 1 and isinstance(others[0], (int, float)) else None
        if op in (_ATEN.add.Tensor, _ATEN.sub.Tensor) and args[0] is inner and len(others) == 1:
            added = True
        elif op is _ATEN.add.Tensor and len(others) == 1:
            added = True
        elif (
            op in (_ATEN.where.self, _ATEN.where.ScalarOther)
            and args[1] is inner
            and "score" not in looks.get(args[0], ())
        ):
            added = True
        elif op is _ATEN.masked_fill.Scalar and args[0] is inner:
            added = True
        elif op is _ATEN.tanh.default and not cap and not added:
            cap, outer = True, 1.0
        elif (
            number is not None
            and not added
            and (op is _ATEN.mul.Tensor or (op is _ATEN.div.Tensor and args[0] is inner))
        ):
            by = float(number) if op is _ATEN.mul.Tensor else 1 / float(number)
            factor, outer = (factor, outer * by) if cap else (factor * by, outer)
        else:
            raise _other(named, node)
    if not cap:
        return Parts(factor, None, frozenset(bias) if added else None)
    # outer * tanh(factor * score) = c * tanh((c * factor) * score / c) with c = outer
    if not outer > 0:
        raise SparseFlashError(f"score_mod {named!r}: a softcap of {outer}; expected a positive one")
    return Parts(factor * outer, outer, frozenset(bias) if added else None)


def _other(named: str, node: Any) -> SparseFlashError:
    return SparseFlashError(
        f"score_mod {named!r} has a form that no kernel has, at {node}: expected softcap(factor * score) + "
        "bias(b, h, q_idx, kv_idx), each part optional"
    )


def _bias(score_mod: ScoreMod, B: int, H: int, Tq: int, Tk: int, device: torch.device) -> Tensor:
    """Evaluate the bias, score_mod of score 0, on broadcast indices: `[B,H,Tq,Tk]`."""
    shapes = (B, 1, 1, 1), (1, H, 1, 1), (1, 1, Tq, 1), (1, 1, 1, Tk)
    places = (torch.arange(max(shape), device=device).view(shape) for shape in shapes if 0 not in shape)
    found = score_mod(torch.zeros((), device=device), *places)
    if found.requires_grad:
        raise SparseFlashError("score_mod adds a tensor that requires a gradient, which would be lost here")
    return found.expand(B, H, Tq, Tk)

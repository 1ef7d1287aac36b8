"""`jagged_attention` and `jagged_pool`: attention over `torch.nested` batches, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan
from ..plan.make.documents import from_ranges
from ..plan.options import SHORT, Window, host, is_count
from ._arguments import describe, is_finite, said
from .attention import attention
from .pointwise import Activation, pointwise_attention

SHARED = 32
"""Most queries of a sample that share a tile although each has its own bias (`jagged_pool`)."""


@dataclass(frozen=True)
class _Side:
    """An argument as packed rows [1,H,total,D]; sample b owns rows `begin[b]` to `end[b] - 1`."""

    given: Any
    axis: int  # token axis: 1 in [B,T,H,D], 2 in [B,H,T,D]
    rows: Tensor
    begin: Tensor
    end: Tensor

    def like(self, out: Tensor) -> Tensor:
        """Convert results [1,H,total,Dv] to the layout of this argument."""
        x = self.given
        flat = out.squeeze(0)  # not out[0]: the gradient of indexing is a copy
        flat = flat if self.axis == 2 else flat.transpose(0, 1)
        flat = flat.squeeze(1) if x.dim() == 3 else flat
        if x.is_nested:
            made: Tensor = torch.nested.nested_tensor_from_jagged(
                flat, offsets=x.offsets(), lengths=x.lengths(), jagged_dim=self.axis
            )
            return made
        sizes = (x.shape[0], x.shape[self.axis])
        flat = torch.unflatten(flat, self.axis - 1, sizes)
        return flat.transpose(0, 1) if self.axis == 2 else flat


def _side(x: Any, axis: int) -> _Side:
    if x.is_nested:
        edges, lengths = x.offsets().long(), x.lengths()
        flat, begin = x.values(), edges[:-1]
        end = edges[1:] if lengths is None else begin + lengths
    else:
        B, T = x.shape[0], x.shape[axis]
        flat = x.flatten(0, 1) if axis == 1 else x.transpose(0, 1).flatten(1, 2)
        begin = torch.arange(B, device=x.device) * T
        end = begin + T
    flat = flat.unsqueeze(1) if x.dim() == 3 else flat  # one head
    return _Side(x, axis, flat[None] if axis == 2 else flat.transpose(0, 1)[None], begin, end)


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    activation: Literal["softmax"] | Activation = "softmax",
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    out_scale: float = 1.0,
    post_mask: Literal["upper"] | None = None,
    max_length: int | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Exact attention inside each sample of a jagged batch, forward and backward, without padding.

    Time and memory follow the sum of the lengths. An argument may also be dense: dense queries pool a jagged
    history (jagged-dense attention), jagged queries attend to a dense memory.

    Parameters
    ----------
    q, k, v : Tensor
        `torch.nested` tensors of `layout=torch.jagged`: `[B, j, H, D]`, its transpose `[B, H, j, D]` as
        `scaled_dot_product_attention` takes it, or `[B, j, D]` for one head; or dense tensors of that shape.
        k and v share their lengths; k and v may have fewer heads than q.
    activation : "softmax", "silu" or "relu2"
        Function of the scores; "silu" (HSTU) and "relu2" are `pointwise_attention`.
    causal : bool
        The last query of a sample sees all its keys, the one before all but the last, and so on.
    window : (left, right), optional
        Inclusive distances inside the sample; None (or -1) on a side is unbounded.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    out_scale : float
        Factor of the result. FBGEMM's convention is 1 / longest length, with `scale=1.0`.
    post_mask : "upper", optional
        Mask applied after the softmax over all keys, without renormalising: keeps weights of keys that are
        not before the query.
    max_length : int, optional
        Only the first so many tokens of a sample take part; later queries get 0, later keys are not seen.
    alibi_slopes : Tensor, optional
        `[Hq]`: as in `sparseflash.attention`; the last query of a sample has the position of its last key.
    dropout_p : float
        Probability of dropping a softmax weight, as in `sparseflash.attention`; pass 0 for evaluation.
    dropout_seed : int or Tensor, optional
        As in `sparseflash.attention`; token numbers run through all samples.
    backend : str, optional
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor
        In the layout of q, with its lengths: 0 for a query that sees nothing (a sample without keys).

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given, what is expected and how to fix it.

    References
    ----------
    Xu et al., Enhancing performance and scalability of large-scale recommendation systems with Jagged Flash
    Attention (https://arxiv.org/abs/2409.15373).

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> history = torch.nested.nested_tensor([torch.randn(n, 2, 16) for n in (5, 0, 9)], layout=torch.jagged)
    >>> sf.jagged_attention(history, history, history, causal=True).offsets().tolist()
    [0, 5, 5, 14]
    >>> seeds = torch.randn(3, 4, 2, 16)  # four queries a sample
    >>> pooled = sf.jagged_attention(seeds, history, history)
    >>> pooled.shape, bool(pooled[1].any())
    (torch.Size([3, 4, 2, 16]), False)
    """
    axis = _check(q, k, v)
    if activation not in ("softmax", "silu", "relu2"):
        raise SparseFlashError(f"activation={activation!r}: expected 'softmax', 'silu' or 'relu2'")
    if post_mask not in (None, "upper"):
        raise SparseFlashError(f"post_mask={post_mask!r}: expected 'upper', or None")
    if post_mask is not None and (causal is not False or window is not None):
        raise SparseFlashError(
            "post_mask together with causal or window: the softmax before it is over all keys of a sample"
        )
    if not is_finite(out_scale):
        raise SparseFlashError(f"out_scale={out_scale!r}: expected a finite number")
    if max_length is not None and not is_count(max_length):
        raise SparseFlashError(f"max_length={max_length!r}: expected a number of tokens >= 0, or None")
    sides = [_side(x, axis) for x in (q, k, v)]
    ranges = _ranges(*sides, max_length=max_length)
    q, k, v = (side.rows for side in sides)
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    if activation != "softmax" and (dropout_p or alibi_slopes is not None):
        given = "dropout_p" if dropout_p else "alibi_slopes"
        raise SparseFlashError(
            f"activation={activation!r} together with {given}: leave it out, or use activation='softmax', "
            "whose weights it belongs to"
        )

    def plan(**rules: Any) -> Plan:
        return Plan._made(**from_ranges(*ranges, Tq=q.shape[2], Tk=k.shape[2], **rules))

    seen: dict[str, Any] = {"causal": causal, "window": window}
    if alibi_slopes is not None and not causal and window is None:
        seen["window"] = (
            SHORT.max,
            SHORT.max,
        )  # hides nothing, but makes the plan store query positions
    if post_mask is not None:
        seen = {"window": (0, None)}  # keys not before the query
    if activation != "softmax":
        out = pointwise_attention(
            q, k, v, plan(**seen), activation=activation, out_scale=out_scale, **options
        )
        return sides[0].like(out)
    options["alibi_slopes"] = alibi_slopes
    out, lse = attention(
        q, k, v, plan(**seen), dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=True, **options
    )
    if post_mask is not None:
        rest = plan(causal=True, include_self=False)
        # only the lse is needed, so one channel of v is enough
        _, lse_rest = attention(q, k, v[..., :1], rest, return_lse=True, **options)
        alive = lse > float("-inf")
        share = torch.sigmoid(torch.where(alive, lse, 0) - torch.where(alive, lse_rest, 0))
        out = (out * share[..., None]).to(out.dtype)
    return sides[0].like(out if out_scale == 1 else out * out_scale)


def jagged_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    max_length: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool each history of a jagged batch by a few dense queries, with an optional bias per place.

    `out_bt = sum_j softmax_j(scale q_bt . k_bj + bias_bjt) v_bj` over the tokens j of sample b.
    Time and memory follow the sum of the lengths.

    Parameters
    ----------
    q : Tensor
        Dense, `[B, T, D]`: T queries of each sample; expand learned queries to all samples.
    k, v : Tensor
        `torch.nested` tensors `[B, j, D]` and `[B, j, Dv]` of `layout=torch.jagged`, of the same lengths.
    bias : Tensor, optional
        `[B|1, N, T]`, finite: added to the scores of token j < N for query t. It has a gradient.
    max_length : int, optional
        Only the first so many tokens of a sample take part; at most N if there is a bias.
    scale : float, optional
        1/sqrt(D) by default; FBGEMM's kernel of this kind uses 1.
    backend : str, optional
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor
        `[B, T, Dv]`; 0 for a sample without tokens.

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given and what is expected.

    References
    ----------
    Xu et al., Enhancing performance and scalability of large-scale recommendation systems with Jagged Flash
    Attention (https://arxiv.org/abs/2409.15373): the jagged-dense form.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> history = torch.nested.nested_tensor([torch.randn(n, 16) for n in (5, 0, 9)], layout=torch.jagged)
    >>> asked, places = torch.randn(4, 16, requires_grad=True), torch.zeros(1, 8, 4, requires_grad=True)
    >>> pooled = sf.jagged_pool(asked.expand(3, -1, -1), history, history, places)  # the first 8 of each
    >>> pooled.shape, bool(pooled[1].any())
    (torch.Size([3, 4, 16]), False)
    >>> pooled.sum().backward()
    >>> places.grad.shape
    torch.Size([1, 8, 4])
    """
    if not isinstance(q, Tensor) or q.is_nested or q.dim() != 3:
        given = describe(q) if isinstance(q, Tensor) else type(q).__name__
        raise SparseFlashError(f"q: {given}; expected a dense tensor [B, T, D], T queries of each sample")
    nested = all(isinstance(x, Tensor) and x.is_nested and x.dim() == 3 for x in (k, v))
    if not nested:
        raise SparseFlashError(f"{said(k=k, v=v)}; expected nested tensors [B, j, D] of layout=torch.jagged")
    _check(q, k, v)
    B, T = q.shape[:2]
    if max_length is not None and not is_count(max_length):
        raise SparseFlashError(f"max_length={max_length!r}: expected a number of tokens >= 0, or None")
    if bias is not None:
        fits = isinstance(bias, Tensor) and bias.dim() == 3 and bias.shape[0] in (1, B) and bias.shape[2] == T
        if not fits:
            given = describe(bias) if isinstance(bias, Tensor) else type(bias).__name__
            raise SparseFlashError(f"bias: {given}; expected [{B}|1, N, T={T}]")
        max_length = bias.shape[1] if max_length is None else min(max_length, bias.shape[1])
    asked, keys, values = _side(q, 1), _side(k, 1), _side(v, 1)
    ranges = [asked.begin, asked.end, *_ranges(asked, keys, values, max_length=max_length)[2:]]
    rows, key, scale = asked.rows, keys.rows, q.shape[2] ** -0.5 if scale is None else scale
    total, key_bias = key.shape[2], None
    if bias is not None and bias.shape[1]:
        at = torch.arange(total, device=q.device)
        sample = torch.searchsorted(keys.begin, at, right=True) - 1
        place = (at - keys.begin[sample]).clamp(max=bias.shape[1] - 1)  # later tokens are hidden
        own = bias[sample if bias.shape[0] == B else 0, place]  # [total, T]
        if scale and T <= SHARED and key.dtype in (torch.float32, torch.float64):
            # append T dimensions: one-hot queries, keys that hold bias / scale, so that q.k adds the bias
            key = torch.cat([key, (own / scale).to(key.dtype)[None, None]], -1)
            one = torch.eye(T, dtype=q.dtype, device=q.device).expand(B, T, T)
            rows = torch.cat([q, one], -1).view(1, 1, B * T, -1)
        else:  # make queries heads, one row per sample: the bias becomes a key_bias
            rows, key_bias = q.transpose(0, 1)[None], own.T[None]
            begin = torch.arange(B, device=q.device)
            ranges = [begin, begin + 1, *ranges[2:]]
    plan = Plan._made(**from_ranges(*ranges, Tq=rows.shape[2], Tk=total))
    out = attention(rows, key, values.rows, plan, key_bias=key_bias, scale=scale, backend=backend)
    return out[0].transpose(0, 1) if key_bias is not None else out.view(B, T, -1)


def _ragged_axis(x: Tensor) -> int:
    """The jagged axis, whose length is symbolic."""
    return next(n for n, size in enumerate(x.shape) if not isinstance(size, int))


def _check(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Check that q, k and v fit together, and return their token axis."""
    given = {"q": q, "k": k, "v": v}
    form = (
        "expected nested tensors [B,j,H,D] or [B,H,j,D], or [B,j,D] for one head (or dense ones beside them)"
    )
    for name, x in given.items():
        if isinstance(x, Tensor) and x.is_nested and x.layout != torch.jagged:
            raise SparseFlashError(f"{name} is nested with layout={x.layout}: expected layout=torch.jagged")
    tensors = all(isinstance(x, Tensor) for x in given.values())
    if not tensors:
        raise SparseFlashError(f"{said(**given)}; {form}")
    nested = [x for x in given.values() if x.is_nested]
    if not nested:
        raise SparseFlashError(f"{said(**given)}; none is nested: dense tensors go to attention()")
    if len({x.dim() for x in given.values()}) != 1 or q.dim() not in (3, 4):
        raise SparseFlashError(f"{said(**given)}; {form}")
    if len({x.shape[0] for x in given.values()}) != 1:
        raise SparseFlashError(
            f"{said(**given)}; expected one number of samples (a sample without tokens has length 0)"
        )
    axes = {_ragged_axis(x) for x in nested}
    good = len(axes) == 1 and axes <= ({1} if q.dim() == 3 else {1, 2})
    if not good:
        raise SparseFlashError(
            f"{said(**given)}; tokens lie along different axes: {form}; transpose(1, 2) helps"
        )
    return axes.pop()


def _ranges(q: _Side, k: _Side, v: _Side, *, max_length: int | None) -> list[Tensor]:
    """Begin and end [B] of each sample's queries, and of its keys if they differ from the queries'."""

    def alike(a: Any, b: Any) -> bool:
        nested = a.is_nested and b.is_nested
        return nested and a.offsets() is b.offsets() and a.lengths() is b.lengths()

    if not alike(k.given, v.given) and host(k.begin):
        same = torch.equal(k.begin, v.begin) and torch.equal(k.end, v.end)
        said = f"k: {describe(k.given)}, v: {describe(v.given)}"
        if not same:
            raise SparseFlashError(f"{said}; expected samples of the same lengths")
    found = []
    for side in (q,) if alike(q.given, k.given) else (q, k):
        longest = side.end if max_length is None else side.begin + min(max_length, SHORT.max)
        found += [side.begin, torch.minimum(side.end, longest)]
    return found

"""A learned number for each key: added to its logits, and what says which keys stay alive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import in_order
from ..plan import Plan
from ..selection.budgets import running_kth
from .base import Context, Method, Selection, check_counts, check_tokens

TILE = 64
NEVER = 2**31 - 1


@dataclass(frozen=True)
class DynamicMask(Method):
    """Each query sees the keys up to its own that have the largest numbers, `window` of them.

    The numbers come from the values (`scores`), are learned through the logits that they are added to, and do
    not depend on the query: a key lives until `window` keys behind it outdo it. So a cache keeps that many,
    and what a query sees depends on nothing after it. Of equal numbers the later key stays: where nothing is
    learned yet, and where no numbers are given, this is a sliding window.

    Papers: Shi et al., "Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124.

    Parameters
    ----------
    window : int
        Keys that a query sees, at most.

    Notes
    -----
    Of `ctx`: `delta`, the numbers, `[B|1, H|1, Tk]`, H any divisor of the query heads (one for each KV head
    in the paper), and `q_offset`, the position of the first query. Gradient flows through the logits; the
    choice of the keys has none.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 256, 32)
    >>> weight, slope = torch.randn(2, 64, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> delta = sf.methods.DynamicMask.scores(v, weight, slope)
    >>> sf.methods.DynamicMask(window=32)(q, k, v, ctx={"delta": delta}).sum().backward()
    >>> weight.grad.shape, bool(slope.grad.abs().min() > 0)
    (torch.Size([2, 64]), True)
    """

    window: int = 2048

    reads = ("q_offset", "delta")
    paper = "arXiv 2508.02124"
    phases = ("training", "prefill", "decode")
    decodes = True
    trainable = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "window")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """The life of each key, and its bias."""
        ctx, Tk = ctx or {}, k.shape[2]
        delta = ctx.get("delta")
        if delta is not None:
            check_tokens("ctx['delta']", delta, Tk, q)
        own = torch.arange(Tk, device=k.device)
        rank = own.expand(1, 1, -1)
        if delta is not None:  # places in one order, in which none are equal
            order = in_order(delta.detach(), None).argsort(dim=-1, stable=True)
            rank = torch.zeros_like(order).scatter_(-1, order, own.expand_as(order))
        exact = torch.float32 if Tk <= 1 << 24 else torch.float64
        until = running_kth(rank.to(exact), self.window, return_until=True)[1]
        plan = Plan.from_lifetimes(
            own.expand(1, 1, -1),
            torch.where(until < Tk, until, NEVER),
            Tq=q.shape[2],
            q_offset=ctx.get("q_offset", 0),
            tile=TILE,
            capacity=None if k.device.type == "cpu" else self.window + TILE,  # no tile has more that live
        )
        return Selection(plan, key_bias=delta)

    @staticmethod
    def scores(v: Tensor, weight: Tensor, slope: Tensor, *, exponential: bool = True) -> Tensor:
        """The numbers of the keys: `exp(slope * softplus(weight @ v))`, `[B, Hkv, Tk]`, with gradient.

        Parameters
        ----------
        v : Tensor
            `[B, Hkv, Tk, D]`.
        weight, slope : Tensor
            `[Hkv, Hkv * D]` and `[Hkv]`: what is learned; slopes begin at 0.
        exponential : bool
            False leaves the exponential out, as later versions of the authors' code do.
        """
        heads = torch.nn.functional.linear(v.transpose(1, 2).flatten(2), weight).mT.contiguous()
        found: Tensor = slope[:, None] * torch.nn.functional.softplus(heads)
        return found.exp() if exponential else found

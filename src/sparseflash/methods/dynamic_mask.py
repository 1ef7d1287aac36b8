"""Dynamic mask attention: a learned score per key is added to its logits and decides which keys stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.numerics import in_order
from ..plan import Plan
from ..selection.budgets import running_kth
from .base import Context, Method, Selection, check_counts, check_tokens

TILE = 64
NEVER = 2**31 - 1


@dataclass(frozen=True)
class DynamicMask(Method):
    """Each query sees the `window` keys with the largest learned scores among the keys up to its own.

    The scores are computed from the values (`scores`), learned through the logits that they are added to, and
    independent of the query: a key is visible until `window` later keys have larger scores. So a cache keeps
    `window` keys, and the selection is causal. Of equal scores the later key stays: without training, or
    without scores, this is a sliding window.

    Papers: Shi et al., "Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124.

    Parameters
    ----------
    window : int
        Most keys that a query sees.

    Notes
    -----
    `ctx` keys: `delta`, the scores, `[B|1, H|1, Tk]`, H any divisor of the query heads (the KV heads in the
    paper), and `q_offset`, the position of the first query. Gradients flow through the logits; the selection
    has none.

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
        """Select by the lifetime of each key, and add the scores as key_bias."""
        ctx, Tk = ctx or {}, k.shape[2]
        delta = ctx.get("delta")
        if delta is not None:
            check_tokens("ctx['delta']", delta, Tk, q)
        own = torch.arange(Tk, device=k.device)
        rank = own.expand(1, 1, -1)
        if delta is not None:  # ranks: a total order, without ties
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
            capacity=None if k.device.type == "cpu" else self.window + TILE,  # bounds the live keys of a tile
        )
        return Selection(plan, key_bias=delta)

    @staticmethod
    def scores(v: Tensor, weight: Tensor, slope: Tensor, *, exponential: bool = True) -> Tensor:
        """Compute key scores: `exp(slope * softplus(weight @ v))`, `[B, Hkv, Tk]`, with gradient.

        Parameters
        ----------
        v : Tensor
            `[B, Hkv, Tk, D]`.
        weight, slope : Tensor
            `[Hkv, Hkv * D]` and `[Hkv]`: learned parameters; slopes are initialised to 0.
        exponential : bool
            False omits the exponential, as later versions of the authors' code do.
        """
        heads = torch.nn.functional.linear(v.transpose(1, 2).flatten(2), weight).mT.contiguous()
        found: Tensor = slope[:, None] * torch.nn.functional.softplus(heads)
        return found.exp() if exponential else found

"""Look-ups: a gated convolution for all tokens, and attention for those whose gate asks for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..plan import Plan
from .base import Positions, State, check_sizes
from .convolution import Convolving


class Lookups(Convolving):
    """A short gated convolution, plus attention for the tokens that need a look-up.

    `y = conv(x) * (W x + b) + g(x) attn(x)`, with the gate `g(x) = sigmoid(w . x)`. In training every token
    attends and g learns; `aux_loss` is `penalty * max(0, mean g - n / T)` for a quota of n look-ups. In
    evaluation only the tokens with g >= `threshold` attend: O(n T) work. (The authors take the n largest g of
    a sequence, which depends on later tokens; a threshold can decode.)

    Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv
    2312.04927.

    Parameters
    ----------
    width, heads, kv_heads, head_dim, positions, base, dropout
        As in `Layer`; positions are rotary by default.
    size : int
        Taps of the convolution; one filter per channel.
    lookups : int, optional
        Quota n of look-ups per sequence; sqrt(T) by default.
    penalty, threshold : float
        Factor of `aux_loss`, and smallest gate that attends in evaluation.

    Notes
    -----
    The state holds all keys and values, and the last inputs of the convolution. `kept` is the share of tokens
    that attended in the last evaluation forward, a 0-d tensor.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.Lookups(64, 4)
    >>> x = torch.randn(2, 100, 64)
    >>> layer(x).shape, bool(layer.aux_loss > 0)
    (torch.Size([2, 100, 64]), True)
    >>> layer.eval()(x).shape, 0.2 < float(layer.kept) < 0.8
    (torch.Size([2, 100, 64]), True)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        size: int = 3,
        lookups: int | None = None,
        penalty: float = 1e-3,
        threshold: float = 0.5,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Positions = "rotary",
        base: float = 10_000.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, positions=positions, base=base)
        self.leave_out(dropout)
        check_sizes(1, lookups=1 if lookups is None else lookups)
        require(
            (
                math.isfinite(penalty) and penalty >= 0,
                lambda: f"penalty={penalty!r}: expected a number >= 0",
            ),
            (0 <= threshold <= 1, lambda: f"threshold={threshold!r}: expected a share in [0, 1]"),
        )
        self.lookups = lookups
        self.penalty, self.threshold = float(penalty), float(threshold)
        self.project_heads(device=device, dtype=dtype)
        self.gate = self.linear(width, width, True, device, dtype)
        self.ask = self.linear(width, 1, True, device, dtype)
        self.convolve_with(size, device, dtype)
        self.kept: Tensor | None = None
        self.reset()

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Convolve and look up; x [B, T, width]."""
        T, past = x.shape[1], 0 if state is None else state.length
        y = self.convolved(x, state)
        g = self.ask(x).sigmoid()[..., 0]
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        q, k = self.turn(q, state), self.turn(k, state)
        if state is not None:
            k, v = state.append(k=k, v=v)
        if self.training:
            out = attention(q, k, v, causal=True, q_offset=past, dropout_p=self.dropout_p)
            quota = (T**0.5 if self.lookups is None else self.lookups) / max(1, T)
            if g.numel():
                self._aux = self.penalty * (g.mean() - quota).clamp(min=0)
        else:
            asks = g.detach() >= self.threshold
            none = torch.zeros(1, 1, k.shape[2], dtype=torch.int64, device=x.device)
            rows = Plan.from_buckets((~asks).long()[:, None], none, q_offset=past, buckets=2)
            out = attention(q, k, v, rows)
            self.kept = asks.float().mean() if asks.numel() else asks.new_zeros((), dtype=torch.float)
        found: Tensor = y + g[..., None] * self.end(out)
        return found

    def __getstate__(self) -> dict[str, object]:
        """State without the statistic of the last forward."""
        return {**super().__getstate__(), "kept": None}

    def extra_repr(self) -> str:
        """One-line description of the shape and quota."""
        own = f", size={self.size}, lookups={self.lookups}, penalty={self.penalty}"
        return f"{super().extra_repr()}{own}, threshold={self.threshold}"

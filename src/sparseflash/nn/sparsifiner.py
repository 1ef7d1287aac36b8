"""Sparsifiner: a low-rank predictor chooses the keys of each query."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..plan import Plan
from ..selection.budgets import top_indices, top_k
from .base import Layer, Positions, State, check_choice, check_sizes, draw

SHORT = 512
"""Up to this many tokens, a plan from a mask is built faster than one from key lists."""


class SparsifinerAttention(Layer):
    """Each query attends to the keys for which a low-rank prediction of its attention is largest.

    Queries and keys are projected to few channels, and keys mixed along the tokens; a softmax of their
    products gives each query's weights of the mixtures, and a learned non-negative basis maps mixtures back
    to keys. The choice of keys has no gradient: the predictor learns from `aux_loss`, its squared distance to
    dense attention. In phase "reconstruct" attention is dense and the predictor trains; in phase "sparse" the
    layer attends over the predicted keys.

    Papers: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
    Transformers", arXiv 2303.13755, sections 3.2 and 3.3.

    Parameters
    ----------
    width, heads, head_dim, positions, base, dropout
        As in `Layer`.
    tokens : int
        Maximum number of tokens; the first one is CLS, which attends to all.
    keep : float
        Share of the keys that a query attends to, in (0, 1].
    mixtures : int, optional
        Number of token mixtures; `tokens / 6` by default.
    channels : int, optional
        Channels of the projected queries and keys; half of head_dim by default.
    top : int
        Mixtures that count per query.
    floor : float
        In phase "sparse", smaller entries of the basis are set to 0.
    weight : float
        Weight of the auxiliary loss; with 0, the prediction is the only T x T tensor in phase "sparse".
    phase : "reconstruct" or "sparse"
        Training phase; may be changed at any time.
    scaling : "channels" or "heads"
        Whether products are scaled by 1 / sqrt(channels), or by 1 / sqrt(heads) as in the released code.

    Attributes
    ----------
    places : Tensor, optional
        int64 `[B, T]`, ascending, CLS (0) first: the tokens of the next forwards among the `tokens` that the
        layer was made for, where some were left out. None: the first T.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.SparsifinerAttention(64, 2, tokens=50, keep=0.25)
    >>> layer(torch.randn(2, 50, 64)).shape, layer.links(torch.randn(2, 50, 64)).sum(-1)[0, 0, :3].tolist()
    (torch.Size([2, 50, 64]), [50, 13, 13])
    """

    decodes = False

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        tokens: int = 197,
        keep: float = 0.25,
        mixtures: int | None = None,
        channels: int | None = None,
        top: int = 8,
        floor: float = 2e-2,
        weight: float = 1.0,
        phase: Literal["reconstruct", "sparse"] = "sparse",
        scaling: Literal["channels", "heads"] = "channels",
        head_dim: int | None = None,
        positions: Positions = "none",
        base: float = 10_000.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, head_dim=head_dim, positions=positions, base=base)
        self.leave_out(dropout)
        mixtures = max(1, tokens // 6) if mixtures is None else mixtures
        channels = max(1, self.head_dim // 2) if channels is None else channels
        check_sizes(1, tokens=tokens, mixtures=mixtures, channels=channels, top=top)
        check_choice(phase=(phase, ("reconstruct", "sparse")), scaling=(scaling, ("channels", "heads")))
        require(
            (0 < keep <= 1, lambda: f"keep={keep!r}: expected a share in (0, 1]"),
            (floor >= 0, lambda: f"floor={floor!r}: expected a number >= 0"),
            (math.isfinite(weight) and weight >= 0, lambda: f"weight={weight!r}: expected a number >= 0"),
        )
        self.tokens, self.keep, self.top, self.floor = tokens, keep, top, floor
        self.weight, self.phase = weight, phase
        self.places: Tensor | None = None
        self.scale = (channels if scaling == "channels" else heads) ** -0.5
        self.project_heads(bias=True, device=device, dtype=dtype)
        self.low_query = self.linear(self.head_dim, channels, False, device, dtype)
        self.low_key = self.linear(self.head_dim, channels, False, device, dtype)
        shape = (tokens, mixtures)
        self.mixer = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.basis = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights; the basis is nearly uniform, with no entry below the floor."""
        super().reset(generator)
        draw(self.basis, 0.05, generator)
        self.basis.add_(2 * self.floor + 1 / self.tokens)

    def predicted(self, q: Tensor, k: Tensor) -> Tensor:
        """Predicted attention of all queries except CLS, [B, H, T - 1, T]."""
        T = q.shape[2]
        require((T <= self.tokens, lambda: f"x has {T} tokens, the layer was made for tokens={self.tokens}"))
        rows = slice(T) if self.places is None else self.places[:, None]
        mixer, basis = self.mixer[rows], self.basis[rows]
        low = self.low_key(k).mT @ mixer.to(k.dtype)
        wanted = (self.low_query(q[:, :, 1:]) @ low * self.scale).softmax(-1)
        most = top_k(wanted, self.top)
        basis = basis.to(k.dtype).mT
        if self.phase == "sparse":
            basis = torch.where(basis.abs() > self.floor, basis.abs(), 0)
        return torch.where(most, wanted, 0) @ basis

    def links(self, x: Tensor) -> Tensor:
        """Mask of the chosen keys, bool [B, H, T, T]."""
        q, k = (self.turn(self.split(project(x)), None) for project in (self.query, self.key))
        return self._mask(self.predicted(q, k), x.shape[1])

    def budget(self, T: int) -> int:
        """Number of keys per query."""
        return math.ceil(self.keep * T)

    def _mask(self, guess: Tensor, T: int) -> Tensor:
        chosen = top_k(guess, self.budget(T))
        first = torch.ones(*guess.shape[:2], min(T, 1), T, dtype=torch.bool, device=guess.device)
        return torch.cat([first, chosen], 2)

    def _plan(self, guess: Tensor, T: int) -> Plan:
        if T <= SHORT:
            return Plan.from_mask(self._mask(guess, T))
        index = top_indices(guess, self.budget(T))
        whole = torch.arange(T, device=guess.device, dtype=index.dtype).expand(*guess.shape[:2], 1, T)
        rest = torch.nn.functional.pad(index, (0, T - index.shape[-1]), value=-1)
        return Plan.from_choice(torch.cat([whole, rest], 2), Tk=T, causal=False, unique=True)

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Predict, choose and attend; x [B, T, width]."""
        T = x.shape[1]
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        q, k = self.turn(q, None), self.turn(k, None)
        sparse = self.phase == "sparse"
        guess = self.predicted(q.detach(), k.detach()) if sparse or self.weight else None
        if guess is not None and self.weight and T > 1:
            dense = (q.detach() @ k.detach().mT * self.head_dim**-0.5).softmax(-1)[:, :, 1:]
            self._aux = self.weight * (guess - dense).square().sum((-1, -2)).mean() if len(x) else None
        seen = Plan.dense(T, T, device=x.device) if guess is None or not sparse else self._plan(guess, T)
        return self.end(attention(q, k, v, seen, dropout_p=self.dropout_p))

    def extra_repr(self) -> str:
        """One-line description of the shape, budget and phase."""
        return f"{super().extra_repr()}, tokens={self.tokens}, keep={self.keep}, phase={self.phase!r}"

"""Orion-MSP: attention among features of a table, with special tokens, a window, and random links."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import require
from ..plan import Plan
from ..plan.options import TILE
from ..selection.orders import random_picks
from .base import Context, Method, Selection, check_counts, check_square

SHORT = TILE
"""Up to this many tokens (one tile), a mask with bits is faster than lists."""


@dataclass(frozen=True)
class OrionMSP(Method):
    """Rows of a table: special tokens see and are seen by all; features see neighbours and random others.

    Papers: "Orion-MSP: Multi-Scale Sparse Attention for Tabular In-Context Learning", arXiv 2511.02818. The
    released code has no window, whatever its size (a product with 0 hides it); `windowless=True` is what its
    checkpoints were trained with.

    Parameters
    ----------
    special : int
        Tokens at the start (CLS and GLOBAL) that see, and are seen by, everything.
    window : int
        Visible features on either side.
    random : int
        Random links of each feature, to uniformly drawn features (which may lie in the window).
    windowless : bool
        Omit the window.
    seed : int
        Seed of the links, which also depend on the token number, and nothing else.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 8, 2, 12, 32)
    >>> method = sf.methods.OrionMSP(special=2, window=1, random=0)
    >>> method.select(q, k).plan.to_dense()[0, 0].sum(-1).tolist()
    [12, 12, 4, 5, 5, 5, 5, 5, 5, 5, 5, 4]
    """

    special: int = 8
    window: int = 8
    random: int = 2
    windowless: bool = False
    seed: int = 0

    paper = "arXiv 2511.02818"
    phases = ("training", "prefill")
    causal_selection = False
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 0, "special", "window", "random")
        require(
            (
                isinstance(self.windowless, bool),
                lambda: f"windowless={self.windowless!r}: expected True or False",
            )
        )

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for short rows; for wide ones a window, the special tokens' other pairs, and the links."""
        T = check_square(self, q, k)
        at = torch.arange(T, device=q.device)
        links = self.links(T, q.device)
        if T <= SHORT:
            keep = (at[:, None] - at).abs() <= self._window
            keep = keep | (at < self.special) | (at[:, None] < self.special)
            linked = torch.zeros(T, T + 1, dtype=torch.bool, device=q.device)
            keep = keep | linked.scatter_(1, torch.where(links < 0, T, links), True)[:, :T]
            return Selection(Plan.from_mask(keep[None, None]))
        near = Plan.dense(T, T, window=(self._window,) * 2, sink_tokens=self.special, device=q.device)
        # keys beyond the window of special tokens: key j is visible to special tokens up to j - window - 1
        end = torch.where(at < self.special, 0, (at - self._window).clamp(0, self.special)).view(1, 1, -1)
        rest = Plan.from_lifetimes(torch.zeros_like(end), end, Tq=T, tile=max(1, self.special))
        far = (links - at[:, None]).abs() > self._window
        beside = Plan.from_choice(torch.where(far, links, -1)[None], Tk=T, causal=False, unique=True, tile=1)
        return Selection((near, *[rest] * (self.special > 0), *[beside] * (self.random > 0)))

    @property
    def _window(self) -> int:
        return 0 if self.windowless else self.window

    def links(self, T: int, device: torch.device | None = None) -> Tensor:
        """Draw the linked features of each token, int64 [T, random]; -1 is none."""
        left = torch.full((1, 1, T), max(T - self.special, 0), device=device)
        left[..., : self.special] = 0
        picks = random_picks(left, self.random, seed=self.seed)[0, 0]
        return torch.where(picks < T, picks + self.special, -1)

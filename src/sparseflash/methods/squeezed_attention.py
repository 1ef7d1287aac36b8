"""Squeezed Attention: select keys of a fixed text by the centroids of their clusters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cache import Growing
from ..common.errors import require
from ..plan import Plan
from ..plan.options import is_count, precise
from ..selection.budgets import top_indices
from ..selection.clusters import kmeans
from ..selection.pages import page_scores
from .base import Context, Selection, begin, check_shares
from .reading import ReadingMethod, kept_of


@dataclass(frozen=True)
class SqueezedAttention(ReadingMethod):
    """Each query reads the keys of a fixed text with the best-scoring centroids, and all keys after the text.

    For many questions about one text. Queries within the text attend densely, and its keys are clustered
    once, by direction; a later query is multiplied with the mean key of each cluster and reads the best
    clusters, within its budget. The paper instead uses a threshold that is calibrated on the text's last
    queries; here the budget is the same for all heads, so that methods compare at equal numbers of keys.

    Paper: Hooper et al., "Squeezed Attention", arXiv 2411.09688, sections 3 and 4.1, one level: one cluster
    per 20 keys; the last 100 keys of the text are always read.

    Parameters
    ----------
    context : int
        Length of the fixed text, the first keys. Queries within it see all of its keys up to themselves.
    clusters : float
        Number of clusters as a share of the text's keys.
    window : int
        Last keys of the text that belong to no cluster and are always read.
    budget : int
        Keys of the text that a query reads, the window included.
    sinks, near, share
        As in every method that reads pages (`ReadingMethod`); a page is one key.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, and `cache`, the layer's `cache.Growing`, which
    stores the clusters.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 2, 2048, 64)
    >>> method = sf.methods.SqueezedAttention(context=2000, budget=200)
    >>> method(q, k, v, q_offset=2047).shape
    torch.Size([1, 4, 1, 64])
    """

    context: int = 8192
    clusters: float = 0.05
    window: int = 100
    page: int = field(default=1, kw_only=True)

    paper = "arXiv 2411.09688"
    causal_selection = False
    behind_padding = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "clusters")
        require(
            (is_count(self.context, 1), lambda: f"context={self.context!r}: expected a positive int, keys"),
            (is_count(self.window), lambda: f"window={self.window!r}: expected an int >= 0, keys"),
            (self.page == 1, lambda: f"page={self.page}: clusters are of single keys, expected 1"),
        )

    def clustered(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Cluster the keys of the text: labels `[B,Hkv,n]`, and mean keys `[B,Hkv,clusters,D]`."""
        count = max(1, int(self.clusters * k.shape[2]))
        directions = torch.nn.functional.normalize(k.float(), dim=-1)
        with precise(k):
            label, centroid = kmeans(directions, count, of=k)
        return label.long(), centroid

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Dense for queries within the text; the best clusters, and all later keys, for later queries."""
        (Tq, Tk), ctx, text = (q.shape[2], k.shape[2]), ctx or {}, self.context
        offset = ctx.get("q_offset", 0)
        if Tk <= text:
            return Selection(Plan.dense(Tq, Tk, causal=True, q_offset=offset, device=q.device))
        at = (begin(ctx, q) + torch.arange(Tq, device=q.device))[..., None]
        behind = at >= text
        score = self.scores(q.detach(), k[:, :, :text], kept_of(ctx, k))
        chosen = top_indices(score, self.budget, behind.expand(score.shape))
        span = torch.cat([torch.where(behind, text, 0), at + 1], -1).clamp(max=Tk)[..., None, :]
        frame = {"Tq": Tq, "Tk": Tk, "tile": 1, "causal": True, "q_offset": offset}
        keys = Plan.from_keys(chosen, **frame, unit=1, unique=True)
        return Selection(Plan.from_lists(spans=span, index=keys, disjoint=True))

    def scores(self, q: Tensor, k: Tensor, cache: Growing | None) -> Tensor:
        """Score each key of the text by its centroid; the window gets infinity."""
        n = max(self.context - self.window, 1)
        label, centroid = self.clustered(k[:, :, :n]) if cache is None else self.kept(cache, n)
        behind = torch.full((1, q.shape[2]), centroid.shape[2], device=q.device)  # no query lies in a cluster
        score = page_scores(q.to(centroid.dtype), centroid, behind, near=0, share=self.share)
        label = label.repeat_interleave(score.shape[1] // k.shape[1], 1)[:, :, None]
        each = score.gather(3, label.expand(*score.shape[:3], -1))
        return torch.nn.functional.pad(each, (0, k.shape[2] - n), value=torch.inf)

    def kept(self, cache: Growing, n: int) -> tuple[Tensor, ...]:
        """Return the clusters that a cache stores, computing them on first use."""
        return cache.remembered(("clusters", self.clusters), n, self.clustered)

"""What methods share that keep all keys and read few: pages, scored by summaries that the cache keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import Growing, Summary
from ..plan import Plan
from ..plan.options import TILE
from ..selection.budgets import top_indices
from .base import Context, Method, Selection, Share, begin, check_counts, check_share, shared


@dataclass(frozen=True, kw_only=True)
class ReadingMethod(Method):
    """Each query reads the pages of keys that a summary of them scores best.

    A method says what is kept of a page: a `cache.Summary`, which a query is multiplied with. Over a
    `cache.Growing` summaries are kept while keys are appended; without one they are made of k.

    Parameters
    ----------
    budget : int
        Keys that a query reads, at most; rounded down to pages.
    page : int
        Keys of a page, counted from the first key that is no padding.
    sinks, near : int
        First pages, and pages back from the query's own, that are read in any case; they count.
    share : "", "sum" or "max"
        "": each query head reads pages of its own; else those of a KV head read the same, by the sum or the
        largest of their scores.
    """

    budget: int = 1024
    page: int = 16
    sinks: int = 0
    near: int = 1
    share: Share = "sum"

    reads = ("q_offset", "cache")
    phases = ("decode",)
    decodes = True
    behind_padding = True

    def __post_init__(self) -> None:
        check_share(self)
        check_counts(self, 1, "budget", "page", "near")
        check_counts(self, 0, "sinks")

    def summary(self, k: Tensor) -> Summary:
        """What is kept of the pages of k."""
        raise NotImplementedError(f"{type(self).__name__}.summary")

    def scores(self, q: Tensor, k: Tensor, cache: Growing | None) -> Tensor:
        """The score of each page, `[B, Hq | Hkv, Tq, pages]`."""
        summary = self.summary(k)
        rows = summary.rows(k) if cache is None else cache.summary(summary)
        return _whole(self.products(summary.query(q), k, rows), self.page // summary.page)

    def products(self, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        """Each query times rows `[B,Hkv,n,width]`, shared by the heads of a group where they are to be."""
        (B, Hq, Tq, D), Hkv = q.shape, k.shape[1]
        own = q.to(rows.dtype).view(B, Hkv, Hq // Hkv, Tq, D)
        with torch.autocast(q.device.type, enabled=False):  # scores are of the numbers that are kept
            if self.share == "sum":  # of products is the product of the sum
                return own.sum(2) @ rows.mT
            score = own.flatten(2, 3) @ rows.mT
        return shared(score.view(B, Hq, Tq, rows.shape[2]), k, self.share)

    def candidates(self, place: Tensor, own: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Which pages may be read by the heads of k, and which are in any case: `[B|1, H|1, Tq, pages]`."""
        reach = place <= own
        return reach, reach & ((place > own - self.near) | (place < self.sinks))

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """The best pages of each query, its own among them."""
        ctx, (Tq, Tk) = ctx or {}, (q.shape[2], k.shape[2])
        cache = kept_of(ctx, k)
        first = None if cache is None or cache.first is None else cache.first.to(q.device).view(-1, 1, 1, 1)
        at = (begin(ctx, q) + torch.arange(Tq, device=q.device))[..., None]
        score = self.scores(q.detach(), k, cache)
        place = torch.arange(score.shape[-1], device=q.device)
        among, forced = self.candidates(place, (at if first is None else at - first) // self.page, k.shape[1])
        score = score.masked_fill(forced, torch.inf)
        chosen = top_indices(score, max(self.budget // self.page, 1), among.expand(score.shape))
        return Selection(plan_of_pages(chosen, self.page, Tk, ctx.get("q_offset", 0), first))


def kept_of(ctx: Context, k: Tensor) -> Growing | None:
    """The cache of the layer, if it is one that keeps summaries, of these very keys."""
    cache: Any = ctx.get("cache")
    if not isinstance(cache, Growing) or cache.keys is None or torch.compiler.is_compiling():
        return None
    same = cache.keys.shape == k.shape and cache.keys.data_ptr() == k.data_ptr()
    return cache if same else None


def _whole(score: Tensor, parts: int) -> Tensor:
    """Scores of parts of pages as those of pages: that of the best part."""
    if parts == 1:
        return score
    score = torch.nn.functional.pad(score, (0, -score.shape[-1] % parts), value=-torch.inf)
    return score.view(*score.shape[:-1], score.shape[-1] // parts, parts).amax(-1)


def plan_of_pages(chosen: Tensor, page: int, Tk: int, q_offset: Any, first: Tensor | None) -> Plan:
    """The plan of chosen pages `[B,H,Tq,n]`, -1 = none; of spans where sequences begin amid the keys."""
    if first is None and chosen.shape[2] < TILE:
        frame = {"Tq": chosen.shape[2], "Tk": Tk, "tile": 1, "unit": page}
        return Plan.from_keys(chosen, **frame, causal=True, q_offset=q_offset, unique=True)
    if first is None:
        return Plan.from_choice(chosen, Tk=Tk, unit=page, q_offset=q_offset, unique=True)
    lo = first + chosen.long() * page
    none = chosen < 0
    spans = torch.stack([lo.masked_fill(none, 0), (lo + page).clamp(max=Tk).masked_fill(none, 0)], -1)
    Tq = chosen.shape[2]
    return Plan.from_spans(spans, Tq=Tq, Tk=Tk, tile=1, causal=True, q_offset=q_offset)

"""`ReadingMethod`, the base of methods that keep all keys but read few pages, scored by summaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import Growing, Summary
from ..plan import Plan
from ..plan.options import TILE
from ..selection.pages import top_pages
from .base import Context, Method, Selection, Share, begin, check_counts, check_share


@dataclass(frozen=True, kw_only=True)
class ReadingMethod(Method):
    """Each query reads the pages of keys whose summaries score best.

    A subclass defines the summary of a page, a `cache.Summary`, which is multiplied with a query. A
    `cache.Growing` updates summaries as keys are appended; without one they are computed from k.

    Parameters
    ----------
    budget : int
        Most keys that a query reads, rounded down to pages.
    page : int
        Keys of a page; the first page begins at the first key that is not padding.
    sinks, near : int
        First pages, and pages back from the query's own (included), that are always read, within the budget.
    share : "", "sum" or "max"
        "": each query head reads its own pages; otherwise the query heads of a KV head read the same pages,
        by the sum or maximum of their scores.
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
        """Return the kind of page summary for the keys k."""
        raise NotImplementedError(f"{type(self).__name__}.summary")

    def closed(self, heads: int) -> tuple[tuple[int, int], ...]:
        """Pairs (KV head, n): heads that read only the sink pages and n near pages."""
        return ()

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select the best pages of each query, its own included."""
        ctx, Tq = ctx or {}, q.shape[2]
        cache = kept_of(ctx, k)
        first = None if cache is None or cache.first is None else cache.first.to(q.device).view(-1, 1)
        offset = ctx.get("q_offset", 0)
        if isinstance(offset, int):
            at = torch.arange(offset, offset + Tq, device=q.device)[None]
        else:
            at = begin(ctx, q)[..., 0] + torch.arange(Tq, device=q.device)
        summary = self.summary(k)
        rows = summary.rows(k) if cache is None else cache.summary(summary)
        chosen = self.best(q, summary, rows, at if first is None else at - first)
        return Selection(plan_of_pages(chosen, self.page, k.shape[2], offset, first))

    def best(self, q: Tensor, summary: Summary, rows: Tensor, at: Tensor) -> Tensor:
        """The pages that queries read, int32 `[B,H,Tq,n]`, ascending, -1 behind the last.

        Parameters
        ----------
        q : Tensor
            `[B,Hq,Tq,D]`.
        summary, rows : Summary, Tensor
            What is kept of the keys, and of each page so: `[B,Hkv,pages,width]`.
        at : Tensor
            Integers `[B|1,Tq]`: where the queries stand among the keys.
        """
        return top_pages(
            summary.query(q.detach()).to(rows.dtype),
            rows,
            at // self.page,
            max(self.budget // self.page, 1),
            near=self.near,
            sinks=self.sinks,
            parts=self.page // summary.page,
            share=self.share,
            closed=self.closed(rows.shape[1]),
        )


def kept_of(ctx: Context, k: Tensor) -> Growing | None:
    """Return the layer's cache if it is a `Growing` (which keeps summaries) of exactly the keys k."""
    cache: Any = ctx.get("cache")
    if not isinstance(cache, Growing) or cache.keys is None or torch.compiler.is_compiling():
        return None
    same = cache.keys.shape == k.shape and cache.keys.data_ptr() == k.data_ptr()
    return cache if same else None


def plan_of_pages(chosen: Tensor, page: int, Tk: int, q_offset: Any, first: Tensor | None) -> Plan:
    """Make the plan of selected pages `[B,H,Tq,n]`, -1 = none; as spans if padding shifts the pages."""
    if first is None and chosen.shape[2] < TILE:
        frame = {"Tq": chosen.shape[2], "Tk": Tk, "tile": 1, "unit": page}
        return Plan.from_keys(chosen, **frame, causal=True, q_offset=q_offset, ascending=True)
    if first is None:
        return Plan.from_choice(chosen, Tk=Tk, unit=page, q_offset=q_offset, unique=True)
    lo = first[..., None, None] + chosen.long() * page
    none = chosen < 0
    spans = torch.stack([lo.masked_fill(none, 0), (lo + page).clamp(max=Tk).masked_fill(none, 0)], -1)
    Tq = chosen.shape[2]
    return Plan.from_spans(spans, Tq=Tq, Tk=Tk, tile=1, causal=True, q_offset=q_offset)

"""Summaries of pages of keys, kept while keys are appended: what a decode method scores instead of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SparseFlashError, require
from ..plan.options import is_count, is_length


@dataclass(frozen=True)
class Summary:
    """What is kept of each page: `of` its keys, whatever other pages hold.

    Parameters
    ----------
    page : int
        Keys of a page, counted from the first key that is no padding.
    """

    page: int = 16

    def __post_init__(self) -> None:
        require(
            (is_length(self.page, 1), lambda: f"page={self.page!r}: expected a positive int, keys of a page")
        )

    def of(self, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """`[B,H,n,page,D]` as `[B,H,n,width]`; `real [B|1,n,page]`: False for lanes that hold no key."""
        raise NotImplementedError

    def query(self, q: Tensor) -> Tensor:
        """What the rows are multiplied with to score pages, `[B,Hq,Tq,width]`."""
        return q

    def rows(self, keys: Tensor) -> Tensor:
        """The summary of keys `[B,H,T,D]`, page by page: `[B,H,ceil(T / page),width]`."""
        B, H, T, D = keys.shape
        n = -(-T // self.page)
        # a trace has one way for all lengths
        if not torch.compiler.is_compiling() and (n == 1 or T == n * self.page):
            return self.of(keys.detach().view(B, H, n, T if n == 1 else self.page, D))
        real = (torch.arange(n * self.page, device=keys.device) < T).view(1, n, self.page)
        keys = torch.nn.functional.pad(keys.detach(), (0, 0, 0, n * self.page - T))
        return self.of(keys.view(B, H, n, self.page, D), real)


@dataclass(frozen=True)
class PageBounds(Summary):
    """The smallest and the largest number of each channel, side by side: `[..., 2 D]` (Quest)."""

    def of(self, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """As of a summary."""
        if real is None:
            return torch.cat(torch.aminmax(keys, dim=3), -1)
        hidden = ~real[:, None, ..., None]
        low, high = keys.masked_fill(hidden, torch.inf).amin(3), keys.masked_fill(hidden, -torch.inf).amax(3)
        return torch.cat([low, high], -1)

    def query(self, q: Tensor) -> Tensor:
        """The negative part of a query for the smallest numbers, its positive part for the largest.

        So the product is no less than that with any key of the page.
        """
        return torch.cat([q.clamp(max=0), q.clamp(min=0)], -1)


@dataclass(frozen=True)
class PageMean(Summary):
    """The mean key."""

    def of(self, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """As of a summary."""
        if real is None:
            return keys.mean(3, dtype=torch.float32).to(keys.dtype)
        there = real[:, None, ..., None]
        total = torch.where(there, keys, 0).sum(3, dtype=torch.float32)
        return (total / there.sum(3).clamp(min=1)).to(keys.dtype)


@dataclass(frozen=True)
class Labels(Summary):
    """A few channels of each key, its label: `[..., channels]` (Double Sparsity).

    Parameters
    ----------
    channels : tuple of tuple of int
        For each KV head, which; one for all of them where there is one.
    """

    page: int = 1
    channels: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        each = self.channels
        fits = (
            self.page == 1
            and bool(each)
            and all(is_count(c) for own in each for c in own)
            and len({len(own) for own in each}) == 1
        )
        require(
            (
                fits,
                lambda: f"channels={each!r}: expected as many channel numbers for each KV head, and page=1",
            )
        )

    def of(self, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """As of a summary."""
        at = torch.tensor(self.channels, device=keys.device)
        if len(at) not in (1, keys.shape[1]) or max(map(max, self.channels)) >= keys.shape[4]:
            raise SparseFlashError(
                f"labels of {len(at)} KV heads, channels up to {max(map(max, self.channels))}, for keys "
                f"{list(keys.shape)}: they were calibrated on another model"
            )
        return keys[:, :, :, 0].gather(3, at[None, :, None].expand(*keys.shape[:3], -1))

    def query(self, q: Tensor) -> Tensor:
        """The same channels of the query."""
        at = torch.tensor(self.channels, device=q.device)
        at = at.repeat_interleave(q.shape[1] // len(at), 0)
        return q.gather(3, at[None, :, None].expand(q.shape[0], -1, q.shape[2], -1))


class Kept:
    """The rows of a summary, one a page, of as many keys as it has been shown.

    The last page is summed up anew whenever keys are added to it, so nothing stays of keys that were cropped.
    """

    def __init__(self, of: Summary) -> None:
        self.summary = of
        self.rows: Tensor | None = None
        self._keys = 0

    def crop(self, n: int) -> None:
        """Forget what was said of keys from the n-th on."""
        self._keys = min(self._keys, n)

    def select_rows(self, rows: Tensor) -> None:
        """Those of other sequences of the batch."""
        self.rows = None if self.rows is None else self.rows.index_select(0, rows)

    def upto(self, keys: Tensor, first: Tensor | None) -> Tensor:
        """The rows of all keys `[B,H,T,D]`, the new ones summed up; `first [B]`: where sequences begin."""
        T, page = keys.shape[2], self.summary.page
        pages = -(-T // page)
        if self._keys < T:
            new, at = self._of(keys, first)
            end = at + new.shape[2] if isinstance(at, int) else pages
            if self.rows is None or self.rows.shape[2] < end:
                room = new.new_zeros(*new.shape[:2], end + max(16, end // 8), new.shape[3])
                if self.rows is not None:
                    room[:, :, : self.rows.shape[2]] = self.rows
                self.rows = room
            if isinstance(at, int):
                self.rows[:, :, at : at + new.shape[2]] = new
            else:
                place = (at[:, None] + torch.arange(new.shape[2], device=at.device)).clamp(max=end)
                index = place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                self.rows.scatter_(2, index, new)
            self._keys = T
        assert self.rows is not None
        return self.rows[:, :, :pages]

    def _of(self, keys: Tensor, first: Tensor | None) -> tuple[Tensor, int | Tensor]:
        """Rows of the pages that new keys lie in, and the number of the first of them (of each sequence)."""
        (B, H, T, D), page = keys.shape, self.summary.page
        if first is None:
            at = self._keys // page
            return self.summary.rows(keys[:, :, at * page :]), at
        first = first.to(keys.device).long()
        begin = (self._keys - first).clamp(min=0) // page
        n = (T - self._keys + page - 2) // page + 1  # the most that so many keys lie in
        slot = (first + begin * page)[:, None] + torch.arange(n * page, device=keys.device)
        index = slot.clamp(max=T - 1)[:, None, :, None].expand(B, H, -1, D)
        own = keys.gather(2, index).view(B, H, n, page, D)
        return self.summary.of(own, (slot < T).view(B, n, page)), begin

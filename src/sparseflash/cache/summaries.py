"""Page summaries of keys, updated as keys are appended: decode methods score them instead of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops.rows import take_rows
from ..plan.options import is_count, is_length


@dataclass(frozen=True)
class Summary:
    """What to keep of each page of keys; `of` depends on the page's own keys only.

    Parameters
    ----------
    page : int
        Keys per page, counted from the first real key.
    """

    page: int = 16

    def __post_init__(self) -> None:
        require(
            (is_length(self.page, 1), lambda: f"page={self.page!r}: expected a positive int, keys of a page")
        )

    def of(self, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """Map `[B,H,n,page,D]` to `[B,H,n,width]`; `real [B|1,n,page]` is False for lanes without a key."""
        raise NotImplementedError

    def query(self, q: Tensor) -> Tensor:
        """The vectors whose dot product with the rows scores the pages, `[B,Hq,Tq,width]`."""
        return q

    def rows(self, keys: Tensor) -> Tensor:
        """Summarise keys `[B,H,T,D]` page by page: `[B,H,ceil(T / page),width]`."""
        B, H, T, D = keys.shape
        n = -(-T // self.page)
        # a compiled graph takes one branch for all lengths
        if not torch.compiler.is_compiling() and (n == 1 or T == n * self.page):
            return self.of(keys.detach().view(B, H, n, T if n == 1 else self.page, D))
        real = (torch.arange(n * self.page, device=keys.device) < T).view(1, n, self.page)
        keys = torch.nn.functional.pad(keys.detach(), (0, 0, 0, n * self.page - T))
        return self.of(keys.view(B, H, n, self.page, D), real)


@dataclass(frozen=True)
class PageBounds(Summary):
    """Minimum and maximum of each channel, concatenated: `[..., 2 D]` (Quest)."""

    def of(self, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """Per-channel bounds of each page; see `Summary.of`."""
        if real is None:
            return torch.cat(torch.aminmax(keys, dim=3), -1)
        hidden = ~real[:, None, ..., None]
        low, high = keys.masked_fill(hidden, torch.inf).amin(3), keys.masked_fill(hidden, -torch.inf).amax(3)
        return torch.cat([low, high], -1)

    def query(self, q: Tensor) -> Tensor:
        """Concatenate the negative part of a query (for the minima) and its positive part (for the maxima).

        The product is then an upper bound of the query's product with every key of the page.
        """
        return torch.cat([q.clamp(max=0), q.clamp(min=0)], -1)


@dataclass(frozen=True)
class PageMean(Summary):
    """The mean key of each page."""

    def of(self, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """Mean of each page; see `Summary.of`."""
        if real is None:
            return keys.mean(3, dtype=torch.float32).to(keys.dtype)
        there = real[:, None, ..., None]
        total = torch.where(there, keys, 0).sum(3, dtype=torch.float32)
        return (total / there.sum(3).clamp(min=1)).to(keys.dtype)


@dataclass(frozen=True)
class Labels(Summary):
    """A few channels of each key as its label: `[..., channels]` (Double Sparsity).

    Parameters
    ----------
    channels : tuple of tuple of int
        Channel numbers of each KV head; a single entry is used for all heads.
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
        """Selected channels of each key; see `Summary.of`."""
        at = torch.tensor(self.channels, device=keys.device)
        if len(at) not in (1, keys.shape[1]) or max(map(max, self.channels)) >= keys.shape[4]:
            raise SparseFlashError(
                f"labels of {len(at)} KV heads, channels up to {max(map(max, self.channels))}, for keys "
                f"{list(keys.shape)}: they were calibrated on another model"
            )
        return keys[:, :, :, 0].gather(3, at[None, :, None].expand(*keys.shape[:3], -1))

    def query(self, q: Tensor) -> Tensor:
        """The query's values of the same channels."""
        at = torch.tensor(self.channels, device=q.device)
        at = at.repeat_interleave(q.shape[1] // len(at), 0)
        return q.gather(3, at[None, :, None].expand(q.shape[0], -1, q.shape[2], -1))


class Kept:
    """The rows of a summary, one per page, for the keys passed so far.

    The last page is summarised again whenever keys are added to it, so nothing remains of cropped keys.
    """

    def __init__(self, of: Summary) -> None:
        self.summary = of
        self.rows: Tensor | None = None
        self._keys = 0

    def crop(self, n: int) -> None:
        """Drop the keys from the n-th on."""
        self._keys = min(self._keys, n)

    def select_rows(self, rows: Tensor) -> None:
        """Select sequences of the batch."""
        self.rows = None if self.rows is None else self.rows.index_select(0, rows)

    def upto(self, keys: Tensor, first: Tensor | None) -> Tensor:
        """Rows of all keys `[B,H,T,D]`, after summarising new ones; `first [B]`: index of first real keys."""
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
        """Rows of the pages that hold new keys, and the index of the first such page (of each sequence)."""
        (B, H, T, D), page = keys.shape, self.summary.page
        if first is None:
            at = self._keys // page
            return self.summary.rows(keys[:, :, at * page :]), at
        first = first.to(keys.device).long()
        begin = (self._keys - first).clamp(min=0) // page
        n = (T - self._keys + page - 2) // page + 1  # most pages that T - _keys keys can touch
        slot = (first + begin * page)[:, None] + torch.arange(n * page, device=keys.device)
        own = take_rows(keys, slot.clamp(max=T - 1)[:, None]).view(B, H, n, page, D)
        return self.summary.of(own, (slot < T).view(B, n, page)), begin

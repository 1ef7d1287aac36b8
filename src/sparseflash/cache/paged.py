"""`Paged`: keys and values in pages of one pool, of which a sequence holds as many as it fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops.attention import attention
from ..ops.decode import decode
from ..plan import Plan
from ..plan.options import is_count
from .base import Attended, Call, check_new
from .files import kind


@dataclass(frozen=True)
class Pages:
    """That keys lie in pages: what `Paged` is made with.

    Parameters
    ----------
    size : int
        Tokens of a page.
    room : int
        Spare pages whenever the pool grows; it grows by at least half.
    """

    size: int = 16
    room: int = 16

    def __post_init__(self) -> None:
        require(
            (is_count(self.size, 1), lambda: f"size={self.size!r}: expected an int >= 1, tokens"),
            (is_count(self.room, 1), lambda: f"room={self.room!r}: expected an int >= 1, pages"),
        )


@kind
class Paged(Attended):
    """Keys and values of a batch of sequences in pages of one pool, as engines keep them.

    A sequence holds the pages that its own tokens fill: padding takes none, and sequences of unlike lengths
    waste less than a page each. Copies of a sequence (samples, beams) share its pages; the last one, if it
    has room, is copied when one of them goes on. `Plan.from_pages` reads the pool where it lies (vLLM's paged
    attention: Kwon et al., arXiv 2309.06180). Inference only.

    Parameters
    ----------
    how : Pages, optional
        Size of a page, and spare pages.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Paged(sf.cache.Pages(size=16))
    >>> q, k, v = torch.randn(2, 4, 100, 64), *torch.randn(2, 2, 2, 100, 64)
    >>> real = torch.arange(100) >= torch.tensor([[0], [60]])  # the second prompt has 40 tokens
    >>> cache.attend(q, k, v, real=real).shape, cache.pages
    (torch.Size([2, 4, 100, 64]), 10)
    >>> cache.batch_repeat_interleave(8)  # eight samples of each
    >>> cache.attend(torch.randn(16, 4, 1, 64), *torch.randn(2, 16, 2, 1, 64)).shape, cache.pages
    (torch.Size([16, 4, 1, 64]), 24)
    """

    def __init__(self, how: Pages = Pages()) -> None:
        require((isinstance(how, Pages), lambda: f"how={how!r}: expected cache.Pages()"))
        self.how = how
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._keys: Tensor | None = None  # [1,Hkv,pages * size,D]
        self._values: Tensor | None = None
        self._table = torch.zeros(0, 0, dtype=torch.long)  # [B,n]: pages of each row in order, -1 behind them
        self._lengths = torch.zeros(0, dtype=torch.long)  # [B]: tokens that each row holds
        self._tokens = self._padded = 0  # positions so far; of these, up to where some are padding

    @property
    def tokens(self) -> int:
        """Positions of each row so far, padding included."""
        return self._tokens

    @property
    def pages(self) -> int:
        """Pages in use, each counted once."""
        return int((self._uses() > 0).sum())

    @property
    def keys(self) -> Tensor | None:
        """The pool of keys, `[1,Hkv,pages * size,D]`, as `plan` reads it; None if the cache is empty."""
        return self._keys

    @property
    def values(self) -> Tensor | None:
        """The pool of values."""
        return self._values

    @property
    def table(self) -> Tensor:
        """Integers `[B,n]`: the pages of each row, in order; -1 behind them."""
        return self._table

    @property
    def lengths(self) -> Tensor:
        """Integers `[B]`: tokens that each row holds."""
        return self._lengths

    def tensors(self) -> dict[str, Tensor]:
        """The pool, and where each row lies in it."""
        if self._keys is None or self._values is None:
            return {}
        own = {"keys": self._keys, "values": self._values}
        return own | {"table": self._table, "lengths": self._lengths}

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Append `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]`; `real`, bool `[B,n]`, is False for padding."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise SparseFlashError("keys in pages have no gradients: append under torch.no_grad()")
        if self._keys is None or self._values is None:
            check_new(k, v, None, None)
            self._keys, self._values = (x.new_empty(1, x.shape[1], 0, x.shape[3]) for x in (k, v))
            self._table = torch.zeros(len(k), 0, dtype=torch.long, device=k.device)
            self._lengths = torch.zeros(len(k), dtype=torch.long, device=k.device)
        else:
            rows = (x[:, :, :0].expand(len(self._lengths), -1, -1, -1) for x in (self._keys, self._values))
            check_new(k, v, *rows)
        n, size = k.shape[2], self.how.size
        if real is None:
            real = torch.ones(len(k), n, dtype=torch.bool, device=k.device)
        else:
            self._padded = self._tokens + n
        count = real.sum(1)
        self._reserve(count)
        row, at = real.nonzero().unbind(-1)
        place = self._lengths[row] + (real.cumsum(1) - 1)[row, at]
        slot = self._table[row, place // size] * size + place % size
        for pool, new in ((self._keys, k), (self._values, v)):
            pool[0].index_copy_(1, slot, new.transpose(1, 2)[row, at].transpose(0, 1))
        self._lengths = self._lengths + count
        self._tokens += n

    def _uses(self) -> Tensor:
        """How many rows have each page of the pool in use."""
        total = 0 if self._keys is None else self._keys.shape[2] // self.how.size
        return torch.bincount(self._table[self._table >= 0], minlength=total)

    def _reserve(self, count: Tensor) -> None:
        """Give each row pages for so many more tokens, and a last page of its own if it goes on there."""
        size = self.how.size
        have, want = self._pages_of(self._lengths), self._pages_of(self._lengths + count)
        most = int(want.max()) if len(want) else 0
        if most > self._table.shape[1]:
            wider = self._table.new_full((len(self._table), most), -1)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        column = torch.arange(self._table.shape[1], device=self._table.device)
        uses = self._uses()
        last = (have - 1).clamp(min=0)
        goes_on = (count > 0) & (self._lengths % size > 0)
        page = self._table.gather(1, last[:, None])[:, 0] if self._table.shape[1] else last
        split = goes_on & (uses[page.clamp(min=0)] > 1 if len(uses) else goes_on)
        fresh = (column >= have[:, None]) & (column < want[:, None])
        fresh |= split[:, None] & (column == last[:, None])
        need = int(fresh.sum())
        free = (uses == 0).nonzero()[:, 0]
        if need > len(free):
            self._grow(need - len(free))
            free = (self._uses() == 0).nonzero()[:, 0]
        old = page[split]
        self._table[fresh] = free[:need]
        if len(old):
            new = self._table.gather(1, last[:, None])[:, 0][split]
            inside = torch.arange(size, device=new.device)
            to, source = ((x[:, None] * size + inside).flatten() for x in (new, old))
            for pool in (self._keys, self._values):
                assert pool is not None
                pool[0].index_copy_(1, to, pool[0].index_select(1, source))

    def _pages_of(self, tokens: Tensor) -> Tensor:
        return (tokens + self.how.size - 1) // self.how.size

    def _grow(self, missing: int) -> None:
        """Add pages to the pool: the missing ones, and spare ones."""
        assert self._keys is not None and self._values is not None
        held = self._keys.shape[2] // self.how.size
        more = max(missing + self.how.room, held // 2) * self.how.size

        def grown(x: Tensor) -> Tensor:
            made = x.new_empty(1, x.shape[1], x.shape[2] + more, x.shape[3])
            made[:, :, : x.shape[2]] = x
            return made

        self._keys, self._values = grown(self._keys), grown(self._values)

    def plan(self, Tq: int = 1, choice: Tensor | None = None) -> Plan:
        """Causal plan of the last Tq queries of each row over the pool.

        Parameters
        ----------
        Tq : int
            Queries of each row.
        choice : Tensor, optional
            As in `Plan.from_pages`: the pages that queries see, by their place in the row.
        """
        assert self._keys is not None
        return Plan.from_pages(
            self._table,
            self._lengths,
            page_size=self.how.size,
            Tk=self._keys.shape[2],
            Tq=Tq,
            choice=choice,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        begin = self._keys is None
        self.append(k, v, call.real)
        if begin:
            first: Tensor = (call.new or attention)(q, k, v, call.among_new(q), **call.options)
            return first
        assert self._keys is not None and self._values is not None
        if call.real is None:
            out: Tensor = decode(q, self._keys, self._values, self.plan(q.shape[2]), **call.options)
            return out
        counts = call.real.sum(1)
        packed = q.transpose(1, 2)[call.real].transpose(0, 1)[None]
        plan = Plan.from_pages(
            self._table,
            self._lengths,
            page_size=self.how.size,
            Tk=self._keys.shape[2],
            Tq=packed.shape[2],
            cu_seqlens_q=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        )
        found = decode(packed, self._keys, self._values, plan, **call.options)
        whole: Tensor = found.new_zeros(*call.real.shape, q.shape[1], found.shape[-1])
        whole[call.real] = found[0].transpose(0, 1)
        return whole.transpose(1, 2)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows, in this order; copies of a row share its pages."""
        at = rows.to(self._table.device)
        self._table, self._lengths = self._table[at], self._lengths[at]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`select_rows`, for samples of each row."""
        rows = torch.arange(len(self._lengths), device=self._lengths.device)
        self.select_rows(rows.repeat_interleave(repeats))

    def crop(self, n: int) -> None:
        """Drop tokens at the end: keep the first n positions, or, if n < 0, drop the last -n."""
        n = self._left(n)
        if 0 < n < self._padded:
            raise SparseFlashError(
                f"crop({n}) of rows with padding among their first {self._padded} positions: expected at "
                "least as many, since where it was is not kept"
            )
        self._lengths = (self._lengths - (self._tokens - n)).clamp(min=0)
        column = torch.arange(self._table.shape[1], device=self._table.device)
        self._table = self._table.masked_fill(column >= self._pages_of(self._lengths)[:, None], -1)
        self._tokens, self._padded = n, min(self._padded, n)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file is to hold: the pages in use, renumbered, and options."""
        used = (self._uses() > 0).nonzero()[:, 0]
        number = used.new_full((int(used.max()) + 2 if len(used) else 1,), -1)
        number[used] = torch.arange(len(used), device=used.device)
        inside = torch.arange(self.how.size, device=used.device)
        at = (used[:, None] * self.how.size + inside).flatten()
        held = {name: x.index_select(2, at) for name, x in self.tensors().items() if x.dim() == 4}
        if held:
            held |= {"table": number[self._table], "lengths": self._lengths}
        own = {"size": self.how.size, "room": self.how.room}
        return held, own | {"tokens": self._tokens, "padded": self._padded}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """A layer of what a file held."""
        made = cls(Pages(options.pop("size"), options.pop("room")))
        for name, x in (tensors | options).items():
            setattr(made, f"_{name}", x)
        return made

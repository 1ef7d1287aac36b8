"""`Growing`: a cache of all keys and values, with spare capacity at the end."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Self

import torch
from torch import Tensor

from ..common.errors import require
from ..plan import Plan
from ..plan.options import TILE, is_count
from .base import Layer, check_new
from .files import kind
from .summaries import Kept, Summary

SHARE = 8
"""Spare capacity is 1 / SHARE of the length, so that copies on growth are rare."""


@kind
class Growing(Layer):
    """All keys and values of a layer, appended in place: what `torch.cat` gives, without its copies.

    `torch.cat` copies the whole cache for each token, which takes longer than attending to it. This cache has
    spare capacity, an eighth of its length and at least `room`, and copies only when that is full. If
    gradients are needed it concatenates after all, since autograd needs the old tensors unchanged.

    Parameters
    ----------
    room : int
        Minimum spare capacity, in tokens.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Growing()
    >>> for n in (100, 1, 1):
    ...     k, v = torch.randn(2, 2, 4, n, 64)
    ...     cache.append(k, v)
    >>> out = sf.decode(torch.randn(2, 8, 1, 64), cache.keys, cache.values, cache.plan())
    >>> out.shape, cache.tokens, cache.bytes
    (torch.Size([2, 8, 1, 64]), 102, 1458176)
    """

    def __init__(self, room: int = 256) -> None:
        require((is_count(room), lambda: f"room={room!r}: expected an int >= 0, tokens"))
        self.room = room
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._tokens = self._valued = 0  # keys, values; differ only between the two setters
        self._first: Tensor | None = None
        self._summaries: dict[Summary, Kept] = {}
        self._remembered: dict[Hashable, tuple[int, tuple[Tensor, ...]]] = {}

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self._tokens

    @property
    def first(self) -> Tensor | None:
        """Integers [B]: index of the first real key of each sequence; None: no padding on the left."""
        return self._first

    @first.setter
    def first(self, first: Tensor | None) -> None:
        old = self._first
        if not (first is old or (first is not None and old is not None and torch.equal(first, old))):
            self._summaries.clear()
        self._first = first

    @property
    def keys(self) -> Tensor | None:
        """`[B,Hkv,tokens,D]`, without spare capacity; None if the cache is empty."""
        return None if self._keys is None else self._keys[:, :, : self._tokens]

    @keys.setter
    def keys(self, x: Tensor | None) -> None:
        self._keys, self._tokens = x, 0 if x is None else x.shape[2]
        self._summaries.clear()
        self._remembered.clear()

    @property
    def values(self) -> Tensor | None:
        """`[B,Hkv,tokens,Dv]`, without spare capacity; None if the cache is empty."""
        return None if self._values is None else self._values[:, :, : self._valued]

    @values.setter
    def values(self, x: Tensor | None) -> None:
        self._values, self._valued = x, 0 if x is None else x.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values with their spare capacity, and the summaries."""
        own = {"keys": self._keys, "values": self._values, "first": self.first}
        own |= {f"summary.{n}": kept.rows for n, kept in enumerate(self._summaries.values())}
        made = [x for _, tensors in self._remembered.values() for x in tensors]
        own |= {f"remembered.{n}": x for n, x in enumerate(made)}
        return {name: x for name, x in own.items() if x is not None}

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]`, in place while capacity lasts."""
        check_new(k, v, self._keys, self._values)
        n, end = self._tokens, self._tokens + k.shape[2]
        require(
            (self._valued == n, lambda: f"{n} keys and {self._valued} values were put in: expected as many")
        )
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (k, v, self._keys, self._values)
        ):
            old = (self.keys, self.values)
            self._keys, self._values = (
                new if x is None else torch.cat([x, new], 2) for x, new in zip(old, (k, v), strict=True)
            )
        else:
            self._keys = self._with_room(self._keys, k, end)
            self._values = self._with_room(self._values, v, end)
            self._keys[:, :, n:end] = k
            self._values[:, :, n:end] = v
        self._tokens = self._valued = end

    def _with_room(self, x: Tensor | None, new: Tensor, end: int) -> Tensor:
        if x is not None and x.shape[2] >= end and not x.requires_grad:
            return x
        B, H, _, D = new.shape
        made = new.new_empty(B, H, end + max(self.room, end // SHARE), D)
        if x is not None:
            made[:, :, : self._tokens] = x[:, :, : self._tokens].detach()
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values."""
        self.append(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        return keys, values

    def plan(self, Tq: int = 1) -> Plan:
        """Causal plan of the last Tq queries, from each sequence's first real key on."""
        T, device = self._tokens, None if self._keys is None else self._keys.device
        offset = T - Tq
        if self.first is None:
            return Plan.dense(Tq, T, causal=True, q_offset=offset, device=device)
        tile = max(1, min(Tq, TILE))
        span = torch.stack([self.first.clamp(max=T), torch.full_like(self.first, T)], -1)
        spans = span.view(-1, 1, 1, 1, 2).expand(-1, 1, -(-Tq // tile), 1, 2)
        return Plan.from_spans(spans, Tq=Tq, Tk=T, tile=tile, causal=True, q_offset=offset)

    def summary(self, of: Summary) -> Tensor:
        """Page summaries of the keys, `[B,Hkv,pages,width]`, kept up to date from the first call on."""
        assert self._keys is not None
        if of not in self._summaries:
            self._summaries[of] = Kept(of)
        return self._summaries[of].upto(self._keys[:, :, : self._tokens], self.first)

    def expect(self, *plans: Plan) -> None:
        """Do nothing: a hint of what is read next, for caches outside memory."""

    def remembered(
        self, key: Hashable, tokens: int, make: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Cache `make(keys [B,Hkv,tokens,D])`: tensors [B,...] that `select_rows` reorders too."""
        keys = self.keys
        assert keys is not None
        known = self._remembered.get(key)
        if known is None or known[0] != tokens:
            known = self._remembered[key] = tokens, make(keys[:, :, :tokens])
        return known[1]

    def crop(self, n: int) -> None:
        """Drop tokens at the end: keep the first n, or, if n < 0, drop the last -n."""
        self._tokens = self._valued = self._left(n)
        for kept in self._summaries.values():
            kept.crop(self._tokens)
        self._remembered = {key: x for key, x in self._remembered.items() if x[0] <= self._tokens}

    def select_rows(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        if self._keys is None or self._values is None:
            return
        at = rows.to(self._keys.device)
        self._keys, self._values = self._keys.index_select(0, at), self._values.index_select(0, at)
        self._first = None if self._first is None else self._first.index_select(0, at)
        for kept in self._summaries.values():
            kept.select_rows(at)
        for key, (tokens, made) in self._remembered.items():
            self._remembered[key] = tokens, tuple(x.index_select(0, at) for x in made)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The contents for a file: tensors and options."""
        own = {"keys": self.keys, "values": self.values, "first": self.first}
        return {name: x for name, x in own.items() if x is not None}, {"room": self.room}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """Rebuild a layer from the contents of a file."""
        made = cls(**options)
        made.keys, made.values, made.first = (tensors.get(name) for name in ("keys", "values", "first"))
        return made

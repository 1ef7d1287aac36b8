"""`Sharded`: queries or keys whose tokens are spread over ranks, as methods get them when they select."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..backends.numerics import Probing, state_dtype

HELD = 1 << 22
"""Maximum number of scores that a rank holds at a time."""
_aten = torch.ops.aten
_NEW = (_aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full)


class Group(Protocol):
    """The ranks that share a sequence, and their two collectives."""

    rank: int

    def gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Tensors of all ranks, whose first axes have `sizes`."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""


class Sharded(Tensor):
    """A tensor [B,H,T,D] of which each rank holds some tokens; its shape is that of all.

    Methods use it as they use any q and k. `pooled`, `probe` and what is built on them exchange a few numbers
    per token; slices along batch, heads and tokens move nothing. Any other operation gathers all tokens
    first, once: the result is exact for every method. No gradient. All ranks must compute the same.

    Parameters
    ----------
    own : Tensor
        `[B,H,n,D]`: this rank's tokens.
    places : sequence of Tensor
        Numbers of the tokens of each rank, int64.
    group : Group
        The ranks.
    """

    own: Tensor
    places: tuple[Tensor, ...]
    group: Group

    @staticmethod
    def __new__(cls, own: Tensor, places: Sequence[Tensor], group: Group) -> Sharded:
        """Make a tensor without memory; `__init__` says what stands for it."""
        B, H, _, D = own.shape
        shape = (B, H, sum(map(len, places)), D)
        made: Sharded = cls._make_wrapper_subclass(cls, shape, dtype=own.dtype, device=own.device)
        return made

    def __init__(self, own: Tensor, places: Sequence[Tensor], group: Group) -> None:
        self.own, self.places, self.group = own.detach(), tuple(places), group
        self._found: list[Tensor] = []  # all tokens, once they are gathered; shared with views

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch gives tensor_contents= by name
        return f"Sharded({list(self.shape)}, {self.own.shape[2]} tokens on rank {self.group.rank})"

    @classmethod  # torch declares a static function, and calls a class method
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Slice and detach the own tokens; gather all for any other operation."""
        x, rest, named = args[0] if args else None, args[1:], kwargs or {}
        if isinstance(x, Sharded):
            kind = func.overloadpacket
            if kind in _NEW:
                return func(x.own, *rest, **named)
            if kind in (_aten.detach, _aten.alias):
                return x._view()
            if kind is _aten.expand and all(n in (-1, own) for n, own in zip(rest[0], x.shape, strict=True)):
                return x._view()
            if func is _aten.slice.Tensor:
                return x._slice(*rest)
            if kind is _aten.index_select and rest[0] < 2:
                return Sharded(func(x.own, *rest), x.places, x.group)
            if func is _aten.index.Tensor and len(rest[0]) <= 2:
                return Sharded(func(x.own, *rest), x.places, x.group)
        args, named = tree_map(lambda y: y.whole() if isinstance(y, Sharded) else y, (args, named))
        return func(*args, **named)

    def _view(self) -> Sharded:
        made = Sharded(self.own, self.places, self.group)
        made._found = self._found
        return made

    def _slice(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
        if dim != 2:
            return Sharded(_aten.slice(self.own, dim, start, end, step), self.places, self.group)
        stay = torch.arange(self.shape[2])[start:end:step]
        if len(stay) == self.shape[2]:
            return self._view()
        number = torch.full((self.shape[2],), -1, dtype=torch.int64)
        number[stay] = torch.arange(len(stay))
        own = number[self.places[self.group.rank].cpu()] >= 0
        numbers = [number[place.cpu()] for place in self.places]
        return Sharded(self.own[:, :, own.to(self.own.device)], [x[x >= 0] for x in numbers], self.group)

    @property
    def tokens(self) -> Tensor:
        """Numbers of this rank's tokens, int64 [n], on the device of the tensor."""
        return self.places[self.group.rank].to(self.own.device)

    def joined(self, x: Tensor) -> Tensor:
        """All tokens of `x [B,H,n,...]`, which has some numbers for each of this rank's tokens."""
        parts = self.group.gather(x.movedim(2, 0).contiguous(), [len(place) for place in self.places])
        order = torch.cat(self.places).argsort().to(x.device)
        return torch.cat(parts).index_select(0, order).movedim(0, 2).contiguous()

    def whole(self) -> Tensor:
        """All tokens, gathered at the first call."""
        if not self._found:
            self._found.append(self.joined(self.own))
        return self._found[0]

    def pooled(self, size: int, how: str, order: Tensor | None = None) -> Tensor:
        """`selection.pooled`: each rank reduces its own tokens; one vector a block is exchanged."""
        (B, H, T, D), work = self.shape, state_dtype(self.own)
        n = -(-T // size)
        place = self.tokens.view(1, 1, -1)
        if order is not None:
            row = torch.empty_like(order, dtype=torch.int64)
            row.scatter_(2, order.long(), torch.arange(T, device=order.device).expand_as(order))
            place = row[:, :, self.tokens]
        at = (place // size).expand(B, H, -1)[..., None].expand(-1, -1, -1, D)
        x = (self.own.abs() if how == "absmax" else self.own).to(work)
        if how == "mean":
            found = self.group.sum(x.new_zeros(B, H, n, D).scatter_add_(2, at, x))
            return found / (torch.arange(T, device=x.device) // size).bincount(minlength=n)[:, None]
        low = how == "min"
        nothing = x.new_full((B, H, n, D), torch.inf if low else -torch.inf)
        each = torch.stack(self.group.gather(nothing.scatter_reduce_(2, at, x, "amin" if low else "amax")))
        return each.amin(0) if low else each.amax(0)

    def probed(
        self, q: Tensor, sees: Tensor, at: Tensor, keep: Tensor | None, options: Probing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`selection.probe`: each rank weighs its own keys; a number a key and a distance is exchanged."""
        (B, Hq, n, _), work, key = q.shape, state_dtype(q), self.tokens
        rows = q.to(work).reshape(B, self.shape[1], -1, q.shape[3])
        level = q.new_full((B, Hq, n), -torch.inf, dtype=work)
        keys = level.new_zeros(B, Hq, len(key))
        distances = level.new_zeros(B, Hq, options.width + 1)  # the last: out of range

        def scores(some: slice) -> tuple[Tensor, Tensor]:
            seen = key[some] < sees[:, None, :, None]
            if keep is not None:
                seen = seen & keep[:, None, None, key[some]]
            part = torch.where(seen.any(2)[..., None], self.own[:, :, some], 0)  # unseen keys may be NaN
            x = (rows @ part.to(work).mT).view(B, Hq, n, -1) * options.scale
            x = torch.tanh(x / options.softcap) * options.softcap if options.softcap else x
            return x.masked_fill(~seen, -torch.inf), seen

        step = max(1, HELD // max(1, B * Hq * n))
        some = [slice(first, first + step) for first in range(0, len(key), step)] if n else []
        for part in some:
            level = torch.logaddexp(level, scores(part)[0].logsumexp(-1))
        lse = torch.logsumexp(torch.stack(self.group.gather(level)), 0)
        level = torch.where(lse == -torch.inf, 0, lse)[..., None]
        for part in some:
            x, seen = scores(part)
            p = torch.where(seen, torch.exp(x - level), 0)
            keys[..., part] = p.sum(2)
            slot = at[:, :, None].long() - key[part] + options.before
            slot = torch.where((slot >= 0) & (slot < options.width), slot, options.width)
            distances.scatter_add_(-1, slot.flatten(1)[:, None].expand(B, Hq, -1), p.flatten(2))
        return lse, self.joined(keys), self.group.sum(distances[..., :-1].contiguous())


def local(x: Tensor) -> Tensor:
    """Return this rank's tokens of a `Sharded` tensor; any other tensor as it is."""
    return x.own if isinstance(x, Sharded) else x

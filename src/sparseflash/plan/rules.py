"""The rules of a plan as one object: which listed key a query may see.

`Rules.see` is the only implementation of the formula in PyTorch; its callers pass the functions that gather a
token table at the pairs to evaluate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import ANY, FAR, NONE, Fields, Window, laid_out, narrow

Read = Callable[[Tensor], Tensor]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tables hold the same numbers, or both are absent."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


@dataclass(frozen=True, eq=False)
class Rules:
    """Conditions on a (query, key) pair, as `Plan` describes them; `Rules()` allows every pair."""

    causal: bool = False
    include_self: bool = True
    window: Window | None = None
    sink: int = 0
    q_offset: int | Tensor = 0
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    k_end: Tensor | None = None
    q_seg: Tensor | None = None
    k_seg: Tensor | None = None
    head_window: Tensor | None = None
    head_sink: Tensor | None = None

    def fields(self) -> Fields:
        """Return the rules as fields of a plan."""
        return dict(vars(self))

    def changed(self, fields: Fields) -> Rules:
        """Copy the rules with other field values."""
        return dataclasses.replace(self, **fields)

    @property
    def windowed(self) -> bool:
        """Whether there is a window, one for all heads or one per head."""
        return self.window is not None or self.head_window is not None

    @property
    def positional(self) -> bool:
        """Whether some rule compares positions."""
        return self.causal or not self.include_self or self.windowed or self.k_end is not None

    def see(
        self, q_token: Tensor, k_token: Tensor, shift: Tensor | int, keys: int, of_q: Read, of_k: Read
    ) -> Tensor:
        """Evaluate the formula: bool, for query and key tokens (-1: none) that broadcast.

        `of_q(table)` and `of_k(table)` gather a table of query or key tokens at these tokens; there are
        `keys` key tokens. `shift` is the query offset.
        """
        keep = (q_token >= 0) & (k_token >= 0)
        q = q_token + shift if self.q_pos is None else of_q(self.q_pos)
        k = k_token if self.k_pos is None else of_k(self.k_pos)
        if self.causal:
            keep = keep & ((q >= k) if self.include_self else (q > k))
        elif not self.include_self:
            keep = keep & (q != k)
        if self.window is not None:
            left, right = self.window
            outside = k >= self.sink
            if left is not None and right is not None:
                outside = outside & ((q - k > left) | (k - q > right))
            elif left is not None:
                outside = outside & (q - k > left)
            elif right is not None:
                outside = outside & (k - q > right)
            keep = keep & ~outside
        if self.head_window is not None:
            pair, sink = self.head_window, self.head_sink
            last = torch.zeros_like(pair[..., :1]) if sink is None else sink
            before, after, first = (
                of_k(x.expand(-1, -1, keys)) for x in (pair[..., :1], pair[..., 1:], last)
            )
            outside = (before >= 0) & (q - k > before) | (after >= 0) & (k - q > after)
            keep = keep & ~(outside & (k >= first))
        if self.k_end is not None:
            keep = keep & (q < of_k(self.k_end))
        if self.q_seg is not None or self.k_seg is not None:
            blank = torch.full((), ANY, dtype=torch.int64, device=q_token.device)
            a = blank if self.q_seg is None else of_q(self.q_seg)
            b = blank if self.k_seg is None else of_k(self.k_seg)
            keep = keep & (a != NONE) & (b != NONE) & ((a == b) | (a == ANY) | (b == ANY))
        return keep

    def band(self, head: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right reach (FAR if unbounded) and sink of the window at heads `head` of `heads`."""
        if self.head_window is None:
            left, right = (FAR if x is None else x for x in self.window or (None, None))
            sink = self.sink if self.window is not None else 0
            return torch.full_like(head, left), torch.full_like(head, right), torch.full_like(head, sink)
        pair = laid_out(self.head_window, 1, heads)[0, head].long()
        pair = torch.where(pair < 0, FAR, pair)
        sinks = torch.zeros_like(pair[:, 0])
        if self.head_sink is not None:
            sinks = laid_out(self.head_sink, 1, heads)[0, head, 0].long()
        return pair[:, 0], pair[:, 1], sinks

    def of(self, q: Tensor | None, k: Tensor | None) -> Rules:
        """Restrict the token tables to some queries and keys (None: all); offsets are not adjusted."""
        cut = {"q_pos": q, "q_seg": q, "k_pos": k, "k_end": k, "k_seg": k}
        tables = {name: (getattr(self, name), tokens) for name, tokens in cut.items()}
        return self.changed(
            {n: x[..., some] for n, (x, some) in tables.items() if x is not None and some is not None}
        )

    def shift(self, n: int) -> Rules:
        """Subtract n from all positions, after the first n keys were removed (if there is no `k_pos`)."""
        made: Fields = {"sink": max(self.sink - n, 0)}
        if self.q_pos is not None:
            made["q_pos"] = narrow(self.q_pos.long() - n)
        elif isinstance(self.q_offset, Tensor):
            made["q_offset"] = narrow(self.q_offset.long() - n)
        else:
            made["q_offset"] = self.q_offset - n
        if n:
            if self.k_pos is not None:
                made["k_pos"] = narrow(self.k_pos.long() - n)
            if self.k_end is not None:
                made["k_end"] = narrow(self.k_end.long() - n)
            if self.head_sink is not None:
                made["head_sink"] = (self.head_sink.long() - n).clamp(min=0).int()
        return self.changed(made)

    def alike(self, other: Rules) -> bool:
        """Whether all fields are equal, values of tensors included."""
        offsets = (self.q_offset, other.q_offset)
        if any(isinstance(x, Tensor) for x in offsets):
            if not same(*(x if isinstance(x, Tensor) else torch.tensor(x) for x in offsets)):
                return False
        elif offsets[0] != offsets[1]:
            return False
        numbers = ("causal", "include_self", "window", "sink")
        tensors = ("head_window", "head_sink", "q_pos", "k_pos", "k_end", "q_seg", "k_seg")
        equal = all(getattr(self, n) == getattr(other, n) for n in numbers)
        return equal and all(same(getattr(self, n), getattr(other, n)) for n in tensors)

    def join(self, other: Rules) -> Rules | None:
        """The conjunction of two rules; None if one formula cannot express it."""
        made: Fields = {
            "causal": self.causal or other.causal,
            "include_self": self.include_self and other.include_self,
        }
        for joined in (self._placed(other), self._windows(other), self._ends(other), self._labels(other)):
            if joined is None:
                return None
            made |= joined
        return self.changed(made)

    def _placed(self, other: Rules) -> Fields | None:
        """The common positions of both rules, None if they differ."""
        placed = [x for x in (self, other) if x.positional]
        if len(placed) == 2:
            if not (same(self.q_pos, other.q_pos) and same(self.k_pos, other.k_pos)):
                return None
            tensors = [x.q_offset for x in placed if isinstance(x.q_offset, Tensor)]
            if tensors and not (len(tensors) == 2 and same(*tensors)):
                return None
            if not tensors and self.q_offset != other.q_offset:
                return None
        return {n: getattr(placed[0], n) for n in ("q_pos", "k_pos", "q_offset")} if placed else {}

    def _windows(self, other: Rules) -> Fields | None:
        windowed = [x for x in (self, other) if x.windowed]
        if len(windowed) < 2:
            names = ("window", "sink", "head_window", "head_sink")
            return {n: getattr(windowed[0], n) for n in names} if windowed else {}
        if self.head_window is not None or other.head_window is not None:
            alike = same(self.head_window, other.head_window) and same(self.head_sink, other.head_sink)
            return {} if alike else None
        if self.sink != other.sink:
            return None
        sides = zip(self.window or (), other.window or (), strict=True)
        least = (min((x for x in pair if x is not None), default=None) for pair in sides)
        return {"window": tuple(least)}

    def _ends(self, other: Rules) -> Fields | None:
        if self.k_end is None or other.k_end is None:
            return {"k_end": other.k_end if self.k_end is None else self.k_end}
        if self.k_end.shape != other.k_end.shape:
            return None
        return {"k_end": torch.minimum(self.k_end, other.k_end)}

    def _labels(self, other: Rules) -> Fields | None:
        labelled = [x for x in (self, other) if x.q_seg is not None or x.k_seg is not None]
        if len(labelled) == 2 and not (same(self.q_seg, other.q_seg) and same(self.k_seg, other.k_seg)):
            return None
        return {"q_seg": labelled[0].q_seg, "k_seg": labelled[0].k_seg} if labelled else {}

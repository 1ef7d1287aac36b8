"""One forward of a model that is served: whose tokens these are, and the plans that its layers share."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...plan import Plan
from .pool import Touched


class Group:
    """Requests of a step that attend in one call: those with one token each, or those with more.

    Parameters
    ----------
    requests : Tensor
        Integers `[n]`: which requests of the step.
    starts, lengths : Tensor
        Integers `[R + 1]` and `[R]` of all requests: where their tokens begin, and their keys, those of this
        step included.
    table : Tensor
        Integers `[R, blocks]`: the blocks of each, anything beyond its length.
    block : int
        Tokens of a block.

    Attributes
    ----------
    tokens : slice or Tensor
        Which tokens of the step are theirs.
    edges : Tensor
        Integers `[n + 1]`: running totals of their tokens.
    longest : int
        The most keys that one of them has.
    """

    def __init__(self, requests: Tensor, starts: Tensor, lengths: Tensor, table: Tensor, block: int) -> None:
        first, counts = starts[requests], starts[requests + 1] - starts[requests]
        self.edges = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        n, begin = int(self.edges[-1]), int(first[0])
        self.lengths, self.block = lengths[requests].long(), block
        self.longest = int(self.lengths.max())
        self.blocks = table[requests][:, : -(-self.longest // block)]
        self.tokens: Any = slice(begin, begin + n)
        if not torch.equal(first - begin, self.edges[:-1]):
            within = torch.arange(n, device=starts.device) - self.edges[:-1].repeat_interleave(counts)
            self.tokens = first.repeat_interleave(counts) + within
        self.single = n == len(requests)
        self._made: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        """How many requests."""
        return len(self.lengths)

    def pages(self, size: int) -> Tensor:
        """Pages `[n, pages]` of such a size, which divides a block, that the blocks are made of."""
        if size == self.block:
            return self.blocks
        key = "pages", size
        if key not in self._made:
            parts = torch.arange(self.block // size, device=self.blocks.device)
            self._made[key] = (self.blocks[..., None] * (self.block // size) + parts).flatten(1)
        return self._made[key]

    def plan(self, Tk: int, window: tuple[int, int] | None = None, sink_tokens: int = 0) -> Plan:
        """What they see of a pool of so many keys: all that is before them, or a window and first tokens."""
        key = "plan", Tk, window, sink_tokens
        if key not in self._made:
            own = {} if self.single else {"Tq": int(self.edges[-1]), "cu_seqlens_q": self.edges}
            self._made[key] = Plan.from_pages(
                self.blocks,
                self.lengths,
                page_size=self.block,
                Tk=Tk,
                window=window,
                sink_tokens=sink_tokens,
                **own,
            )
        return self._made[key]


class Step:
    """What the layers of one KV group need to know of a forward.

    Parameters
    ----------
    starts : Tensor
        Integers `[R + 1]`: where the tokens of each request begin.
    lengths : Tensor
        Integers `[R]`: keys of each, the tokens of this step included.
    table : Tensor
        Integers `[R, blocks]`: where these keys lie.
    slots : Tensor
        Integers `[tokens]`: where the keys of this step are put; negative: of no request.
    block : int
        Tokens of a block.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.integrations.vllm import Step
    >>> starts, lengths = torch.tensor([0, 3, 4]), torch.tensor([3, 6])  # a prompt, and a step of another
    >>> table, slots = torch.tensor([[2, 0], [1, 3]]), torch.tensor([8, 9, 10, 13])
    >>> step = Step(starts, lengths, table, slots, block=4)
    >>> step.chunks.tokens, step.singles.tokens
    (slice(0, 3, None), slice(3, 4, None))
    """

    def __init__(self, starts: Tensor, lengths: Tensor, table: Tensor, slots: Tensor, block: int) -> None:
        counts, given = starts.diff(), (starts.long(), lengths, table, block)
        self.block = block
        self.slots, self.tokens = slots[: int(starts[-1])].long(), int(starts[-1])
        self.written: Any = slice(None)
        if self.tokens and int(self.slots.min()) < 0:
            self.written = (self.slots >= 0).nonzero().flatten()
            self.slots = self.slots[self.written]
        groups = ((counts == 1).nonzero().flatten(), (counts > 1).nonzero().flatten())
        self.singles, self.chunks = (Group(x, *given) if len(x) else None for x in groups)
        self._touched: dict[int, Touched] = {}

    def touched(self, page: int) -> Touched:
        """The pages of such a size that are written to."""
        if page not in self._touched:
            self._touched[page] = Touched.of(self.slots, page)
        return self._touched[page]

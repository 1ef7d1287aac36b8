"""Dual Chunk Attention: rotary distances stay within the trained length, for prompts many times as long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..ops.attention import attention
from ..ops.merge import merge
from ..ops.rotary import rotation, turned
from ..plan import Plan
from ..plan.options import TILE
from .base import Context, Method, Selection, begin, check_counts


@dataclass(frozen=True)
class DualChunkAttention(Method):
    """Dense causal attention whose distances stay below the trained length: no training, no token dropped.

    Keys are rotated to their place in a chunk. A query is rotated three times: for keys of its own chunk to
    its own place, for the chunk before to its place after that chunk, at most `chunk`, and for all older
    chunks to one far place. So distances are exact up to `local` and bounded beyond; one softmax covers all
    three parts. Within one chunk this is plain attention.

    Papers: An et al., "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463.

    Parameters
    ----------
    context : int
        Length that the model was trained on.
    chunk : int, optional
        Largest distance; by default 3/4 of the context.
    local : int, optional
        Distances up to here are exact, across chunks too; by default 1/8 of the context. Chunks have
        chunk - local tokens.
    interleaved : bool
        Whether channels 2n and 2n + 1 rotate together (GPT-J), or channels n and n + D / 2 (Llama).

    Notes
    -----
    `ctx` keys: `rope`, the rotation that q and k already have: (cos, sin), `[B|1, n, D]` each, for positions
    0 to the last key's, or the inverse frequencies `[D / 2]`, which chunks of a prompt and decoding need;
    with fewer channels than D only the first ones are rotated. It is required beyond one chunk. `q_offset`,
    the position of the first query, and `v`. Caches need no change: keys are rotated back from their place.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> frequencies = 10000 ** -(torch.arange(16) / 16)
    >>> method = sf.methods.DualChunkAttention(context=256)
    >>> method(q, k, v, ctx={"rope": frequencies}).shape
    torch.Size([1, 2, 1024, 32])
    """

    context: int = 4096
    chunk: int | None = None
    local: int | None = None
    interleaved: bool = False

    reads = ("q_offset", "rope", "v")
    paper = "arXiv 2402.17463"
    phases = ("prefill", "decode")
    decodes = True

    def __post_init__(self) -> None:
        check_counts(self, 8, "context")
        check_counts(self, 1, *(name for name in ("chunk", "local") if getattr(self, name) is not None))
        furthest, local = self._sizes()
        if local >= furthest:
            raise SparseFlashError(f"local={local}: expected less than chunk={furthest}")

    def _sizes(self) -> tuple[int, int]:
        """The largest distance, and the largest exact distance."""
        chunk = 3 * self.context // 4 if self.chunk is None else self.chunk
        return chunk, self.context // 8 if self.local is None else self.local

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Make three rotated rows per query, and the plan of the keys that each sees."""
        given = {name: (ctx or {}).get(name) for name in self.reads}
        (Tq, Tk), (furthest, local) = (q.shape[2], k.shape[2]), self._sizes()
        offset = 0 if given["q_offset"] is None else given["q_offset"]
        size, v = furthest - local, given["v"]
        if Tk <= size:
            return Selection(Plan.dense(Tq, Tk, causal=True, q_offset=offset, device=q.device))
        if v is None:
            raise SparseFlashError("ctx['v']: a query has three rows, expected v to attend them with")
        rope = rotation(given["rope"], Tk)
        at = begin(ctx, q)[:, 0]
        position, key = at + torch.arange(Tq, device=q.device), torch.arange(Tk, device=q.device)[None]
        own = torch.div(position, size, rounding_mode="floor")
        behind = (position - own * size + size).clamp(max=furthest)
        places = (position - own * size, behind, torch.full_like(position, min(2 * size - 1, furthest)))
        rows = torch.cat([turned(q, position - place, rope, self.interleaved) for place in places], 2)
        keys = turned(k, key // size * size, rope, self.interleaved)
        return Selection(self._plan(position, own, Tk, size, offset), inputs=(rows, keys, v))

    def _plan(self, position: Tensor, own: Tensor, Tk: int, size: int, offset: int | Tensor) -> Plan:
        """Plan of 3 Tq rows (own chunk, chunk before, older chunks), in tiles that end where chunks do.

        Example, size 4, Tq = 8, q_offset 0: tokens 0..3 are rows 0..3 of tile 0, tokens 4..7 rows 0..3 of
        tile 1; the same tiles follow for the two other kinds, with token numbers + 8 and + 16.
        """
        Tq, place = position.shape[-1], position - own * size
        token, number = torch.arange(Tq, device=own.device).expand_as(own), own - own[:, :1]
        head = (size - place[:, :1] + TILE - 1) // TILE  # tiles of the first chunk, which may be cut
        row = torch.where(number == 0, token, (head + (number - 1) * -(-size // TILE)) * TILE + place)
        tiles = Tq // TILE + (Tq - 1) // size + 2
        order = torch.full((len(own), tiles * TILE), -1, device=own.device)
        order = order.scatter_(-1, row.clamp(max=tiles * TILE - 1), token)
        last = order.view(len(own), tiles, TILE).amax(-1)
        there, last = last >= 0, last.clamp(min=0)
        own, end = own.gather(-1, last) * size, position.gather(-1, last) + 1
        older = own - size
        ends = [(own, end), (older, own), (torch.zeros_like(own), older)]
        ends = [(lo.clamp(0, Tk), torch.where(there, hi, 0).clamp(0, Tk)) for lo, hi in ends]
        spans = torch.cat([torch.stack([lo, torch.maximum(lo, hi)], -1) for lo, hi in ends], 1)
        # rows of the two other kinds have positions after all keys, so causality hides nothing from them
        rows = torch.cat([torch.where(order >= 0, order + n * Tq, -1) for n in range(3)], -1)
        frame: dict[str, Any] = {"causal": True, "q_offset": offset, "q_order": rows[:, None]}
        return Plan.from_spans(spans[:, None, :, None], Tq=3 * Tq, Tk=Tk, tile=TILE, **frame)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: Selection,
        op: Callable[..., Any] = attention,
        *,
        sink_logits: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend as in `Method.attend`; the sink is merged once, not in each of the three parts."""
        if selection.inputs is None:
            return super().attend(q, k, v, selection, op, sink_logits=sink_logits, **options)
        out, lse = super().attend(q, k, v, selection, op, **options)
        if sink_logits is None:
            return out, lse
        sink = sink_logits.to(lse.dtype).view(1, -1, 1).expand_as(lse)
        return merge([(out, lse), (torch.zeros_like(out), sink)])

    def finish(self, out: Tensor, lse: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Merge the three parts into one softmax."""
        if selection.inputs is None:
            return out, lse
        return merge(list(zip(out.chunk(3, 2), lse.chunk(3, 2), strict=True)))

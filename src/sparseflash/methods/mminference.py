"""MMInference: grid patterns of video tokens, and patterns per modality (text, image)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.errors import PlanError, SparseFlashError
from ..plan import Plan
from ..plan.options import INTEGERS, fit, is_count
from ..selection.budgets import top_k
from ..selection.probes import probe
from .base import Context, Method, Selection, begin, check_counts

PATTERNS = ("grid", "q-boundary", "2d-boundary")
TILE = 64


@dataclass(frozen=True)
class MMInference(Method):
    """Each head has one of three patterns for prompts that mix text and frames.

    A grid head sees the first keys, the nearest, and keys at distances with a given remainder modulo a
    stride: the same place in earlier frames, or in earlier rows. Stride and remainder maximise mass over the
    root of density, as the last queries of the prompt estimate it. Queries are sorted by remainder, so that
    each sees one range of keys. In a boundary head, queries of each modality have their own columns and
    slashes, selected by the last queries of that modality: among all keys ("q-boundary"), or separately among
    the keys of each modality ("2d-boundary").

    Papers: Li et al., "MMInference", arXiv 2504.16083, section 3. Their code is not public: how strides are
    searched for, and all defaults, are ours.

    Parameters
    ----------
    pattern : str
        "grid", "q-boundary" or "2d-boundary"; a tuple where heads differ.
    vertical, slash : int
        Columns and distances of a boundary head, for queries of each modality (and each modality of keys).
    last : int
        Number of last queries (of a modality) that are probed.
    sinks, near : int
        First keys and nearest distances that are always kept.
    strides : tuple of int
        Candidate strides; empty: those of `ctx["grid"]`, or else all from 2 to `max_stride`.
    max_stride : int
        Largest candidate stride if none is given.
    modalities : int
        Number of modalities.

    Notes
    -----
    `ctx` keys: `grid`, the shape of the video in tokens, such as (frames, rows, columns), whose row and frame
    sizes are strides (with a separator after each frame, give `strides`); `modality` of each key, integers
    `[B|1, Tk]` below `modalities` (all 0 by default); `q_offset`, the position of the first query, `scale`
    and `softcap`. With a chunked prompt, the last queries of each chunk select for that chunk.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.MMInference(near=16, sinks=4)
    >>> method(q, k, v, ctx={"grid": (16, 8, 8)}).shape
    torch.Size([1, 2, 1024, 32])
    """

    pattern: str = "grid"
    vertical: int = 1000
    slash: int = 1000
    last: int = 64
    sinks: int = 30
    near: int = 100
    strides: tuple[int, ...] = ()
    max_stride: int = 256
    modalities: int = 2

    reads = ("q_offset", "scale", "softcap", "grid", "modality")
    paper = "arXiv 2504.16083"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_counts(self, 1, "vertical", "slash", "last", "near", "modalities")
        check_counts(self, 0, "sinks")
        check_counts(self, 2, "max_stride")
        if self.pattern not in PATTERNS:
            raise SparseFlashError(f"pattern={self.pattern!r}: expected one of {', '.join(PATTERNS)}")
        if not (isinstance(self.strides, tuple) and all(is_count(s, 2) for s in self.strides)):
            raise SparseFlashError(f"strides={self.strides!r}: expected a tuple of ints >= 2")
        object.__setattr__(self, "strides", tuple(sorted(self.strides)))  # a compiler's ints cannot be sorted

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select by the pattern, for queries from `q_offset` on."""
        given = {name: (ctx or {}).get(name) for name in self.reads}
        given["q_offset"] = 0 if given["q_offset"] is None else given["q_offset"]
        strides, modality = self._strides(given["grid"]), self._modality(given["modality"], k)
        if self.pattern == "grid":
            return Selection(self._grid(q, k, given, strides))
        return Selection(self._boundary(q, k, given, modality))

    def _modality(self, given: Any, k: Tensor) -> Tensor:
        """Modality of each key: int64 [B|1, Tk]."""
        B, Tk = k.shape[0], k.shape[2]
        if given is None:
            return torch.zeros(1, Tk, dtype=torch.int64, device=k.device)
        fits = isinstance(given, Tensor) and given.dtype in INTEGERS and given.dim() == 2
        if not (fits and given.shape[0] in (1, B) and given.shape[1] == Tk):
            shown = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise PlanError(f"ctx['modality']: {shown}; expected integers [{B}|1, {Tk}]")
        return fit(given, "ctx['modality'] holds", 0, self.modalities - 1).to(k.device).long()

    def _strides(self, grid: Any) -> list[int]:
        """Candidate strides, ascending."""
        if grid is None:
            return list(self.strides) or list(range(2, self.max_stride + 1))
        if not (isinstance(grid, (tuple, list)) and len(grid) > 1 and all(is_count(n, 1) for n in grid)):
            raise SparseFlashError(f"ctx['grid']: {grid!r}; expected sizes, such as (frames, rows, columns)")
        own = accumulate(reversed(grid[1:]), lambda a, b: a * b)
        return sorted(self.strides) or sorted({s for s in own if s > 1}) or [2]

    def _grid(self, q: Tensor, k: Tensor, ctx: dict[str, Any], strides: list[int]) -> tuple[Plan, Plan]:
        """Plans of the first and nearest keys, and of the keys at distances `phase` modulo `stride`."""
        (Tq, Tk), at = (q.shape[2], k.shape[2]), ctx["q_offset"]
        sinks, told = min(self.sinks, Tk), {name: ctx[name] for name in ("scale", "softcap")}
        seen = probe(q, k[:, :, sinks:], self.last, q_offset=at - sinks, **told).distances()
        seen = torch.where(torch.arange(seen.shape[-1], device=q.device) < self.near, 0, seen)
        worth = torch.full((*seen.shape[:2], 1), -1.0, device=q.device)
        stride = phase = worth.long()
        for s in strides:
            folded = pad(seen, (0, -seen.shape[-1] % s))
            mass, rest = folded.view(*seen.shape[:2], folded.shape[-1] // s, s).sum(-2).max(-1, keepdim=True)
            mass = mass * s**0.5  # divisors of the best stride cost more, multiples hold less mass
            better = mass > worth
            worth, stride, phase = (
                torch.where(better, new, old) for new, old in ((mass, worth), (s, stride), (rest, phase))
            )
        group = (begin(ctx, q) + torch.arange(Tq, device=q.device)) % stride
        token = torch.arange(Tk, device=q.device)
        key_group = torch.where(token < sinks, -1, (token + phase) % stride)
        window: dict[str, Any] = {"window": (self.near - 1, 0), "sink_tokens": sinks}
        near = Plan.dense(Tq, Tk, causal=True, q_offset=at, device=q.device, **window)
        # shift queries back by `near` to exclude the nearest keys; in the plan, shift keys forward instead
        far = Plan.from_buckets(
            group, key_group, tile=TILE, q_offset=at - self.near, buckets=max(strides) + 1
        )
        later = (token + self.near).int().view(1, 1, -1)
        return far._changed(q_offset=near.q_offset, k_pos=later), near

    def _boundary(self, q: Tensor, k: Tensor, ctx: dict[str, Any], modality: Tensor) -> Plan:
        """Columns and slashes of each modality; a tile holds queries of one modality."""
        (Tq, Tk), at = (q.shape[2], k.shape[2]), begin(ctx, q)[:, 0]
        told = {name: ctx[name] for name in ("scale", "softcap", "q_offset")}
        position = (at + torch.arange(Tq, device=q.device)).clamp(0, max(Tk - 1, 0))
        batch = max(len(modality), len(position))
        modality = modality.expand(batch, -1)
        own = modality.gather(-1, position.expand(batch, -1)) if Tk else position * 0
        kinds = range(1 if ctx["modality"] is None else self.modalities)
        order = _apart(own, len(kinds))
        tile = order.view(len(order), -1, TILE)
        last = tile.amax(-1)
        low, high = at + torch.where(tile < 0, Tq, tile).amin(-1), at + last
        of_tile = own.gather(-1, last.clamp(min=0)) if Tq else last
        seen = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        others = [modality == b for b in kinds]
        for a in kinds:
            mine = (of_tile == a)[:, None, :, None]
            for there in others if self.pattern == "2d-boundary" else [torch.ones_like(others[0])]:
                found = probe(q, k, self.last, q_keep=own == a, k_keep=there, **told)
                there = there[:, None]
                column = top_k(_first(found.keys(), self.sinks), max(self.vertical, self.sinks), among=there)
                slash = top_k(_first(found.distances(), self.near), max(self.slash, self.near))
                cross = _crossed(slash, low[:, None], high[:, None], Tk) & there[:, :, None]
                seen = seen | (mine & (cross | column[:, :, None]))
        frame: dict[str, Any] = {"causal": True, "q_offset": ctx["q_offset"], "q_order": order[:, None]}
        return Plan.from_blocks(seen, Tq=Tq, Tk=Tk, tile=TILE, unit=1, **frame)


def _first(score: Tensor, n: int) -> Tensor:
    """Set the first n scores to infinity, so that they are always selected."""
    return torch.where(torch.arange(score.shape[-1], device=score.device) < n, torch.inf, score)


def _apart(group: Tensor, groups: int) -> Tensor:
    """Order tokens by group [B,T], padding each group to whole tiles: [B,rows], -1 in empty lanes."""
    B, T = group.shape
    count = torch.stack([(group == a).sum(-1) for a in range(groups)], -1)
    room = (count + TILE - 1) // TILE * TILE
    token = group.argsort(dim=-1, stable=True)
    start = (room.cumsum(-1) - room) - (count.cumsum(-1) - count)
    row = start.gather(-1, group.gather(-1, token)) + torch.arange(T, device=group.device)
    rows = (-(-T // TILE) + groups) * TILE if T else 0
    return torch.full((B, rows), -1, device=group.device).scatter_(-1, row, token)


def _crossed(slash: Tensor, low: Tensor, high: Tensor, Tk: int) -> Tensor:
    """Whether keys are at selected distances [B,H,N] of some position low..high [B,1,R]: [B,H,R,Tk]."""
    before = pad(slash.cumsum(-1, dtype=torch.int32), (1, 0))
    (_, H, N), B = slash.shape, len(slash) if len(slash) != 1 else len(low)
    key = torch.arange(Tk, device=slash.device)
    ends = [(x[..., None] - key).clamp(0, N).expand(B, H, -1, -1) for x in (low, high + 1)]
    few, more = (before[:, :, None].expand(B, H, end.shape[2], -1).gather(-1, end) for end in ends)
    return more > few

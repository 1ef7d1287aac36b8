"""Needles in prompts that mix text and videos: what a pattern of each modality finds, beside lines of all.

A prompt is text, a video, text, a second video, text, and a question, with what hosts tell of it: the
modality of each token and the grid of the videos. Video tokens look at their own place in earlier frames,
text tokens at random. Needles are planted by who asks for what: the question for a place in a video
("question, visual"); the last frames for a word between the videos ("visual, text") or for a place in the
first video ("visual, visual"); the words between the videos for a place in the first ("text, visual"). Each
pattern of MMInference stands beside MInference's lines, whose columns are raised until they keep at least as
many pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparseflash.bench.needles import Needles, plant_at
from sparseflash.bench.results import Row
from sparseflash.methods import MInference, MMInference
from sparseflash.methods.base import Method
from sparseflash.ops._arguments import AnyPlan

KINDS = ("question, visual", "visual, text", "visual, visual", "text, visual")
PATTERNS = ("grid", "q-boundary", "2d-boundary")
TEXT, QUESTION, COUNT, RUN = 96, 64, 4, 4
"""Words of each text and of the question; needles of a kind, and tokens that ask for each."""
SLASHES = 1
"""Of all: needles are columns, and a distance costs a tile of keys."""


def layout(frames: int, rows: int, columns: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Modality of each token `[T]` (1: video), and the grid of both videos."""
    video = torch.ones(frames * rows * columns, dtype=torch.int64)
    words = torch.zeros(TEXT, dtype=torch.int64)
    question = torch.zeros(QUESTION, dtype=torch.int64)
    return torch.cat([words, video, words, video, words, question]), (frames, rows, columns)


def tensors(
    modality: Tensor, grid: tuple[int, int, int], heads: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Queries and keys `[1,heads,T,64]`: places of a video look at themselves in other frames."""
    T, cells = len(modality), grid[1] * grid[2]
    q, k = torch.randn(2, 1, heads, T, 64, generator=generator)
    place = torch.nn.functional.normalize(torch.randn(heads, cells, 64, generator=generator), dim=-1)
    seen = modality.bool()
    own = torch.arange(int(seen.sum())) % cells
    k[0, :, seen] = place[:, own] * 4 + k[0, :, seen] / 4
    q[0, :, seen] = place[:, own] * 24 + q[0, :, seen] / 4
    return q, k


def planted(q: Tensor, k: Tensor, modality: Tensor, kind: str, generator: torch.Generator) -> Needles:
    """Plant the needles of a kind."""
    T = len(modality)
    edges = [0, *(modality.diff().nonzero()[:, 0] + 1).tolist(), T]
    _, first, between, second, last = (torch.arange(a, b) for a, b in zip(edges, edges[1:]))
    asks, asked = {
        "question, visual": (last, first),
        "visual, text": (second, between),
        "visual, visual": (second, first),
        "text, visual": (between, first),
    }[kind]
    B, H = q.shape[0], k.shape[1]
    keys = torch.stack([asked[torch.randperm(len(asked), generator=generator)[:COUNT]] for _ in range(B * H)])
    rows = asks[-COUNT * RUN :].expand(B, H, -1)
    return plant_at(q, k, rows, keys.view(B, H, COUNT), generator)


def lines(q: Tensor, k: Tensor, ctx: dict[str, object], pairs: float) -> tuple[Method, AnyPlan]:
    """MInference with the least budget that keeps at least so many pairs, found by halving."""
    T = q.shape[2]
    low, high = 1, T
    while low < high:
        budget = (low + high) // 2
        plan = _lines(budget).select(q, k, {"scale": ctx["scale"]}).plan
        low, high = (low, budget) if kept(plan) >= pairs else (budget + 1, high)
    method = _lines(low)
    return method, method.select(q, k, {"scale": ctx["scale"]}).plan


def _lines(budget: int) -> MInference:
    return MInference(vertical=budget, slash=SLASHES, near=1, sinks=4, last=QUESTION)


def kept(plan: AnyPlan) -> float:
    """Pairs that a plan, or several disjoint ones, keeps, over those of causal attention."""
    return sum(one.kept for one in (plan if isinstance(plan, (tuple, list)) else (plan,)))


@torch.no_grad()
def measure(
    *,
    frames: int = 16,
    side: int = 8,
    heads: int = 2,
    budgets: Sequence[int] = (32, 64),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a kind of needle, a pattern and a budget."""
    modality, grid = layout(frames, side, side)
    T = len(modality)
    for kind in KINDS:
        generator = torch.Generator().manual_seed(0)
        q, k = tensors(modality, grid, heads, generator)
        found = planted(q, k, modality, kind, generator)
        ctx = {"scale": found.scale, "modality": modality[None], "grid": grid}
        for pattern in PATTERNS:
            for budget in budgets[:1] if pattern == "grid" else budgets:
                on_run(f"{kind}: {pattern}, {budget}")
                method = MMInference(pattern, budget, SLASHES, last=QUESTION, sinks=4, near=1)
                plan = method.select(found.q, found.k, ctx).plan
                others, plain = lines(found.q, found.k, ctx, kept(plan))
                for case, how, own in (("mminference", method, plan), ("minference", others, plain)):
                    mass = found.kept(own)
                    yield {
                        "bench": "modalities", "case": case, "pattern": pattern, "kind": kind, "T": T,
                        "budget": budget, "kept": kept(own), "needles": float(mass.mean()),
                        "needles_worst": float(mass.mean(-1).min()), "method": repr(how),
                    }  # fmt: skip

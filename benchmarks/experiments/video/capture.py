"""What methods find in the queries and keys of the trained model, beside choices that know nothing."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import methods
from sparseflash.bench.results import Row
from sparseflash.methods.base import Method
from sparseflash.methods.sparse_vdit import MODES, Call, judge
from sparseflash.selection.calibrate import search

from ..claim.rows import Job, mean
from ..diffusion import controls
from .model import trajectory
from .stages import Study, plan_of

BLOCK = 8
VIDEOS = 3
"""Captured; the modes of heads are searched on the first of them, and all methods judged on the others."""

METHODS: dict[str, Method | None] = {
    "sparsed": methods.SparseD(0.25, block=BLOCK),
    "adaspa": methods.AdaSpa(0.75, block=BLOCK),
    "adaspa, levels alike": methods.AdaSpa(0.75, adaptive=False, block=BLOCK),
    "paro-attention": methods.PAROAttention(0.25, block=BLOCK),
    "sparse-vdit": None,
    "sliding-tile": methods.SlidingTile(tile=(2, 2, 2), window=(2, 1, 1)),
    "efficient-vdit, k = 1": methods.EfficientVDiT(1),
    "efficient-vdit, k = 2": methods.EfficientVDiT(2),
}
"""What is asked; None has a mode for each head, which is searched."""


class Capture:
    """Calls of all layers at a quarter and at three quarters of the teacher's steps."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def calls(self) -> list[list[Call]]:
        """Of each of the two steps, those of each layer."""
        steps, teacher = self.study.settings.fine, self.study.teacher
        way = trajectory(teacher, self.study.noise(8)[:VIDEOS], steps)
        return [
            [(*call, {"grid": teacher.grid, "layer": n}) for n, call in enumerate(teacher.calls(*way[at]))]
            for at in (steps // 4, steps * 3 // 4)
        ]

    @cached_property
    def profile(self) -> sf.calibrate.Profile:
        """A mode for each head, from the first video."""
        samples = {n: [(q[:1], k[:1], v[:1], ctx)] for n, (q, k, v, ctx) in enumerate(self.calls[0])}
        candidates = [
            {"method": "sparse-vdit", "mode": mode, "reach": 2, "stripes": 5, "block": BLOCK}
            for mode in MODES
        ]
        score = judge(samples, weight=0.5, bound=0.8)
        return search("video", samples, candidates, score, progress=False)

    def method(self, case: str) -> Method:
        """A method by the name of its row."""
        found = METHODS[case]
        return methods.Profiled(self.profile) if found is None else found

    @torch.no_grad()
    def row(self, case: str) -> Row:
        """Share of the attention mass that a method keeps, mean over layers, heads and queries."""
        method = self.method(case)
        figures: dict[str, list[float]] = {}
        for (q, k, _, ctx), (later_q, later_k, *_) in zip(*self.calls):
            q, k, later_q, later_k = (x[1:] for x in (q, k, later_q, later_k))
            plan = plan_of(method.select(q, k, {x: ctx[x] for x in method.reads if x in ctx}).plan)
            kept = {"recall": plan, **{f"recall_{x}": y for x, y in controls(plan, q, BLOCK).items()}}
            kept["recall_uniform"] = evenly(plan, q)
            figures.setdefault("kept", []).append(plan.kept)
            for name, one in kept.items():
                figures.setdefault(name, []).append(share(q, k, one))
            figures.setdefault("recall_later", []).append(share(later_q, later_k, plan))
        found = {name: mean(values) for name, values in figures.items()}
        return found | {"method": type(method).__name__ if case == "sparse-vdit" else repr(method)}


def share(q: Tensor, k: Tensor, plan: sf.Plan) -> float:
    """Mean recall."""
    return float(sf.recall(q, k, plan, dense=sf.Plan.dense(q.shape[2], k.shape[2])).mean())


def evenly(plan: sf.Plan, q: Tensor) -> sf.Plan:
    """Evenly spaced blocks of keys, the same for all queries, as many as a plan keeps."""
    T = q.shape[2]
    grid = sf.selection.Grid(T, T, BLOCK, BLOCK, causal=False)
    count = max(1, round(plan.kept * grid.units))
    keep = torch.zeros(1, 1, grid.tiles, grid.units, dtype=torch.bool)
    keep[..., torch.arange(count) * grid.units // count] = True
    return grid.plan(keep)


def jobs(study: Study) -> list[Job]:
    """A job for each method."""
    capture = Capture(study)
    return [
        Job({"part": "capture", "case": case, "study": repr(study.settings)}, partial(capture.row, case))
        for case in METHODS
    ]

"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .lists import tile_view

if TYPE_CHECKING:
    from .core import Plan

SHADES = " ░▒▓█"


def draw(plan: Plan, width: int = 48) -> str:
    """Characters from empty to full by the share of visible pairs; the first batch and head; queries downwards."""
    batch, heads = plan.extent()
    rows, cols = max(1, min(width // 2, plan.Tq)), max(1, min(width, plan.Tk))
    seen = torch.zeros(rows, cols, dtype=torch.int64)
    for r in range(plan.tiles):
        view = tile_view(plan, r, batch, heads)
        q, k, keep = view.q_token[0, 0], view.k_token[0, 0], view.keep[0, 0]
        pair = keep.nonzero()
        cell = (q[pair[:, 0]] * rows // max(plan.Tq, 1)) * cols + k[pair[:, 1]] * cols // max(plan.Tk, 1)
        seen += torch.bincount(cell.cpu(), minlength=rows * cols).view(rows, cols)
    area = max(plan.Tq / rows * plan.Tk / cols, 1.0)
    level = (seen / area * (len(SHADES) - 1)).ceil().long().clamp(max=len(SHADES) - 1)
    lines = ["".join(SHADES[x] for x in line) for line in level.tolist()]
    title = f"{plan.Tq} queries x {plan.Tk} keys, density {plan.density:.3f}, work {plan.work:.3f}"
    return "\n".join([repr(plan), title, *lines])

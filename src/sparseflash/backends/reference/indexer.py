"""A learned indexer's choice of keys, some queries at a time: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

HELD = 1 << 22
"""Products of a head and a key that are held at a time."""


def indexer_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    keep: Tensor | None,
    *,
    topk: int,
    scored: bool,
) -> tuple[Tensor, Tensor]:
    """index int32 [B,Tq,topk] and, where `scored`, the scores in fp32 (fp64)."""
    (B, H, Tq, _), Tk = q.shape, k.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    at = torch.arange(Tk, device=q.device)
    columns = k.to(work)[:, None].transpose(-1, -2)
    if keep is not None:
        columns = columns.masked_fill(~keep[:, None, None], 0)
    index = torch.empty((B, Tq, topk), dtype=torch.int32, device=q.device)
    scores = torch.empty((B, Tq, topk) if scored else (0,), dtype=work, device=q.device)
    step = max(1, HELD // max(1, B * H * Tk))
    for first in range(0, Tq, step):
        rows = slice(first, first + step)
        products = (q[:, :, rows].to(work) @ columns).relu()
        score = (products * weights[:, :, rows, None].to(work)).sum(1)
        score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        seen = (at >= low[:, rows, None]) & (at < high[:, rows, None])
        if keep is not None:
            seen = seen & keep[:, None]
        # what is seen before what is not, the larger score first, then the lower index
        order = score.argsort(stable=True, dim=-1, descending=True)
        order = order.gather(-1, seen.gather(-1, order).byte().argsort(stable=True, dim=-1, descending=True))
        chosen = order[..., :topk].masked_fill(~seen.gather(-1, order[..., :topk]), Tk).sort(-1).values
        missing = chosen == Tk
        index[:, rows] = chosen.masked_fill(missing, -1).int()
        if scored:
            found = score.gather(-1, chosen.clamp(max=max(Tk - 1, 0)))
            scores[:, rows] = found.masked_fill(missing, -torch.inf)
    return index, scores

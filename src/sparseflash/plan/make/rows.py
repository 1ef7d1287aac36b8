"""Row orders: compacted kept tokens, runs padded to whole tiles, and the first and last token of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import host


def compact_order(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the kept tokens in time order, padded with -1; and the exclusive prefix count [..., T + 1]."""
    *lead, T = keep.shape
    seen = torch.nn.functional.pad(keep.cumsum(-1), (1, 0))
    token = torch.arange(T, device=keep.device, dtype=torch.int32).expand(keep.shape)
    rows = T
    if host(keep):  # without synchronising: drop the lanes that no head uses
        rows = int(seen[..., -1].max()) if seen.numel() else 0
    order = torch.full((*lead, rows + 1), -1, dtype=torch.int32, device=keep.device)
    order.scatter_(-1, torch.where(keep, seen[..., :-1], rows), token)
    order[..., rows:] = -1  # dropped tokens were scattered here
    return order[..., :rows], seen


def tile_ends(order: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest token of each tile of `order` [B,H,rows], and whether it has any: [B,H,R]."""
    *lead, rows = order.shape
    padded = torch.nn.functional.pad(order, (0, -rows % tile), value=-1).view(*lead, -(-rows // tile), tile)
    real = padded >= 0
    last = padded.amax(-1).long()
    first = torch.where(real, padded, torch.iinfo(torch.int32).max).amin(-1).long()
    live = last >= 0
    return torch.where(live, first, 0), torch.where(live, last, 0), live


def edge_rows(new_run: Tensor, tile: int) -> Tensor:
    """Row of each element if every run is padded to whole tiles; `new_run` [..., T] marks run starts.

    Example, tile 4, runs of 3 and 2: rows 0 1 2, 4 5 (gap 1 before the second run).
    """
    at = torch.arange(new_run.shape[-1], device=new_run.device).expand(new_run.shape)
    begin = torch.where(new_run, at, 0).cummax(-1).values
    before = torch.nn.functional.pad(begin[..., :-1], (1, 0))  # start of the run that ends here
    gap = torch.where(new_run & (at > 0), -(at - before) % tile, 0)
    return at + gap.cumsum(-1)


def begins_of(label: Tensor) -> Tensor:
    """Mark where a run of equal labels begins, along the last axis."""
    edge = label[..., 1:] != label[..., :-1]
    return torch.nn.functional.pad(edge, (1, 0), value=True)[..., : label.shape[-1]]

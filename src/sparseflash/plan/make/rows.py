"""Orders of rows: kept tokens closed up, runs padded to whole tiles, and the tokens at the ends of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import host


def compact_order(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Order that lists the kept tokens first, in time order (-1 behind), and the exclusive prefix count."""
    *lead, T = keep.shape
    seen = torch.nn.functional.pad(keep.cumsum(-1), (1, 0))
    token = torch.arange(T, device=keep.device, dtype=torch.int32).expand(keep.shape)
    rows = T
    if host(keep):  # no device to wait for: leave out the lanes that no head uses
        rows = int(seen[..., -1].max()) if seen.numel() else 0
    order = torch.full((*lead, rows + 1), -1, dtype=torch.int32, device=keep.device)
    order.scatter_(-1, torch.where(keep, seen[..., :-1], rows), token)
    order[..., rows:] = -1  # whatever was dropped landed here
    return order[..., :rows], seen


def tile_ends(order: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token of the first and last real row of each tile of `order` [B,H,rows]; tokens ascend in a tile."""
    *lead, rows = order.shape
    padded = torch.nn.functional.pad(order, (0, -rows % tile), value=-1).view(*lead, -(-rows // tile), tile)
    real = padded >= 0
    last = padded.amax(-1).long()
    first = torch.where(real, padded, torch.iinfo(torch.int32).max).amin(-1).long()
    live = last >= 0
    return torch.where(live, first, 0), torch.where(live, last, 0), live


def edge_rows(new_run: Tensor, tile: int) -> Tensor:
    """Row of each element when every run is padded to whole tiles; `new_run` [..., T] marks run starts."""
    at = torch.arange(new_run.shape[-1], device=new_run.device).expand(new_run.shape)
    begin = torch.where(new_run, at, 0).cummax(-1).values
    before = torch.nn.functional.pad(begin[..., :-1], (1, 0))  # start of the run that ends here
    gap = torch.where(new_run & (at > 0), -(at - before) % tile, 0)
    return at + gap.cumsum(-1)


def begins_of(label: Tensor) -> Tensor:
    """Where a run of equal labels begins, along the last axis."""
    edge = label[..., 1:] != label[..., :-1]
    return torch.nn.functional.pad(edge, (1, 0), value=True)[..., : label.shape[-1]]

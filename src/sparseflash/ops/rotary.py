"""Undo or redo rotary position embeddings of q and k, from the tables or frequencies of a host model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.numerics import state_dtype
from ..common.errors import SparseFlashError


def rotation(rope: Any, Tk: int) -> list[Tensor]:
    """Validate `ctx["rope"]`: returns unscaled (cos, sin) tables, or the inverse frequencies.

    Parameters
    ----------
    rope : (Tensor, Tensor) or Tensor
        (cos, sin), `[B|1, n, D]` each, of positions 0 up to the last of Tk keys; or frequencies `[D / 2]`.
    Tk : int
        Number of keys.
    """
    if isinstance(rope, Tensor) and rope.dim() == 1:
        return [rope]
    tables = isinstance(rope, (tuple, list)) and len(rope) == 2 and all(isinstance(x, Tensor) for x in rope)
    if not (tables and all(x.dim() == 3 and x.shape[1] >= Tk for x in rope)):
        shown = [list(x.shape) for x in rope] if tables else type(rope).__name__
        raise SparseFlashError(
            f"ctx['rope']: {shown}; expected (cos, sin), [B|1, n, D] each, of positions 0 up to the last of "
            f"{Tk} keys, or the inverse frequencies [D / 2]"
        )
    return [x.to(state_dtype(x)) / rope[0][:, :1] for x in rope]  # divides by cos 0 = attention scaling


def turned(x: Tensor, back: Tensor, rope: list[Tensor], interleaved: bool = False) -> Tensor:
    """Rotate tokens `[B,H,T,D]` back by `back` positions `[B|1,T]`, forward where `back` is negative."""
    if len(rope) == 1:
        angle = back[..., None].double() * rope[0].to(x.device).double()
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
        cos, sin = angle.cos(), angle.sin()
    else:
        batch, n, width = rope[0].shape
        batch = max(batch, len(back))
        at = back.abs().clamp(max=n - 1)[..., None].expand(batch, -1, width)
        cos, sin = (y.to(x.device).expand(batch, -1, -1).gather(1, at) for y in rope)
        sin = torch.where(back[..., None] < 0, -sin, sin)
    d, work = cos.shape[-1], state_dtype(x)
    cos, sin, own = cos[:, None].to(work), sin[:, None].to(work), x[..., :d].to(work)
    if interleaved:
        across = torch.stack([-own[..., 1::2], own[..., ::2]], -1).flatten(-2)
    else:
        across = torch.cat([-own[..., d // 2 :], own[..., : d // 2]], -1)
    return torch.cat([(own * cos - across * sin).to(x.dtype), x[..., d:]], -1)

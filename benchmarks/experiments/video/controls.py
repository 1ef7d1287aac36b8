"""Frames that are seen by chance, as many as a method sees: what it has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseflash.methods import EfficientVDiT


@dataclass(frozen=True)
class DrawnFrames(EfficientVDiT):
    """Frames see themselves and frames drawn at random, as many pairs as with evenly spaced references.

    With `apart` false the same frames are drawn for all, else other ones for each frame.
    """

    apart: bool = False
    seed: int = 0

    def tiles(self, frames: int, device: torch.device) -> Tensor:
        """Frames that each frame sees, bool [frames, frames]."""
        k, own = min(self.references, frames), torch.eye(frames, dtype=torch.bool)
        draw = torch.rand(frames, frames, generator=torch.Generator().manual_seed(self.seed))
        if self.apart:
            others = draw.masked_fill(own, -1).flatten().topk(k * (frames - 1)).indices
            return own.flatten().index_fill(0, others, True).view(frames, frames).to(device)
        return own.index_fill(1, draw[0].topk(k).indices, True).to(device)


@dataclass(frozen=True)
class OwnFrame(EfficientVDiT):
    """Frames see themselves alone, which tells whether a model uses other frames at all."""

    def tiles(self, frames: int, device: torch.device) -> Tensor:
        """Frames that each frame sees, bool [frames, frames]."""
        return torch.eye(frames, dtype=torch.bool, device=device)

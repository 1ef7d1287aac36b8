"""Moving MNIST: digits that fly over a square and bounce off its edges."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SPEED = (1.0, 3.0)
"""Pixels a frame, least and most."""
MIDDLE, SCALE = 0.1, 4.0
"""Of brightness 0 to 1, so that videos vary about as much as the noise does."""


def moving(
    images: Tensor,
    count: int,
    *,
    frames: int = 8,
    side: int = 24,
    digits: int = 1,
    generator: torch.Generator,
) -> Tensor:
    """Draw videos: float [count, frames, side, side], bright where a digit is.

    Parameters
    ----------
    images : Tensor
        uint8 [n, pixels], square; they are halved where that leaves them room to move.
    count, frames, side, digits : int
        Number of videos, and what each of them has.
    generator : Generator
        Draws digits, places and directions.
    """
    size = math.isqrt(images.shape[1])
    shrink = 2 if 2 * size > side else 1
    size //= shrink
    room = side - size
    if room < 1:
        raise ValueError(f"side={side}: expected more than the {size} pixels of a digit")
    videos = torch.zeros(count, frames, side, side)
    n, t = torch.arange(count)[:, None, None, None], torch.arange(frames)
    for _ in range(digits):
        picked = images[torch.randint(len(images), (count,), generator=generator)].float() / 255
        digit = F.avg_pool2d(picked.unflatten(1, (shrink * size, shrink * size)), shrink)
        speed, angle, *start = torch.rand(4, count, generator=generator)
        speed = SPEED[0] + (SPEED[1] - SPEED[0]) * speed
        angle = 2 * math.pi * angle
        rows, columns = (
            bounced(room * at[:, None] + (speed * way)[:, None] * t, room)[..., None] + torch.arange(size)
            for at, way in zip(start, (angle.sin(), angle.cos()))
        )
        at = (n, t[:, None, None], rows[..., None], columns[:, :, None])
        videos[at] = torch.maximum(videos[at], digit[:, None])
    return SCALE * (videos - MIDDLE)


def bounced(place: Tensor, room: int) -> Tensor:
    """Fold places on a line into [0, room], as if reflected at both ends; int64."""
    return (room - (place.remainder(2 * room) - room).abs()).round().long()


def brightness(videos: Tensor) -> Tensor:
    """Brightness of pixels, from 0 to 1 where a video is one of digits."""
    return videos / SCALE + MIDDLE

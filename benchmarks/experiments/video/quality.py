"""Numbers that judge generated videos."""

from __future__ import annotations

import torch
from torch import Tensor

from .digits import brightness

AXES = 12
"""Principal axes of real videos in which distributions are compared."""


def distance(videos: Tensor, wanted: Tensor) -> float:
    """Squared difference of videos from the same noise, over the variance of the wanted ones.

    2 is that of videos that have nothing to do with each other.
    """
    return float((videos - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


def drift(videos: Tensor) -> float:
    """How much the brightness of a video's frames varies, over its mean; 0 where digits only move."""
    total = brightness(videos).sum((2, 3))
    return float((total.std(1, correction=0) / total.mean(1).abs().clamp(min=1e-30)).median())


class Frechet:
    """Fréchet distance of videos from real ones, as normal distributions in the principal axes of the real.

    Relative to the variance of real videos along these axes: two samples of real ones show what is noise.
    """

    def __init__(self, real: Tensor) -> None:
        flat = real.flatten(1).double()
        self.centre = flat.mean(0)
        self.axes = torch.linalg.svd(flat - self.centre, full_matrices=False).Vh[:AXES].mT
        self.mean, self.covariance = self.moments(real)

    def moments(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance along the axes."""
        found = (videos.flatten(1).double() - self.centre) @ self.axes
        return found.mean(0), torch.cov(found.mT)

    def __call__(self, videos: Tensor) -> float:
        """The distance."""
        mean, covariance = self.moments(videos)
        both = root(self.covariance) @ covariance @ root(self.covariance)
        off = (mean - self.mean).square().sum() + (self.covariance + covariance).trace()
        return float((off - 2 * root(both).trace()) / self.covariance.trace())


def root(x: Tensor) -> Tensor:
    """Square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT

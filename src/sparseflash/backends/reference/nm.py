"""Products with N:M sparse weights, as dense products with a mask."""

from __future__ import annotations

from torch import Tensor

from ..numerics import NM, nm_mask


def nm_product(x: Tensor, weight: Tensor, options: NM) -> Tensor:
    """Product [T,O] of x [T,K] with the n largest of each m neighbouring inputs of weight [O,K]."""
    return x @ (weight * nm_mask(weight, options.n, options.m)).mT

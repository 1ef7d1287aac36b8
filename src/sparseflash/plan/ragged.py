"""Lists of different lengths behind one another: where each begins, whose each entry is, and its place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Expanded(NamedTuple):
    """The entries of some lists, flat: the list that each belongs to, and its place there; int64."""

    owner: Tensor
    place: Tensor


def begins(count: Tensor) -> Tensor:
    """Where lists of these lengths begin, in the shape of `count`; int64.

    >>> import torch
    >>> begins(torch.tensor([2, 0, 3])).tolist()
    [0, 2, 2]
    """
    flat = count.flatten()
    return (flat.cumsum(0) - flat).view(count.shape)


def expand(count: Tensor) -> Expanded:
    """Every entry of lists of these lengths; looks at values, and so waits for a device.

    >>> import torch
    >>> [x.tolist() for x in expand(torch.tensor([2, 0, 3]))]
    [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    flat = count.flatten()
    owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
    place = torch.arange(len(owner), device=flat.device) - begins(flat)[owner]
    return Expanded(owner, place)

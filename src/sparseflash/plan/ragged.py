"""Ragged lists in one flat pool: list offsets, and the owner and place of each entry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Expanded(NamedTuple):
    """Entries of ragged lists, flat: the list that owns each entry, and its place in that list; int64."""

    owner: Tensor
    place: Tensor


def begins(count: Tensor) -> Tensor:
    """Offsets of lists of these lengths (exclusive prefix sum), in the shape of `count`; int64.

    >>> import torch
    >>> begins(torch.tensor([2, 0, 3])).tolist()
    [0, 2, 2]
    """
    flat = count.flatten()
    return (flat.cumsum(0) - flat).view(count.shape)


def expand(count: Tensor) -> Expanded:
    """Enumerate every entry of lists of these lengths; reads values, so it synchronises.

    >>> import torch
    >>> [x.tolist() for x in expand(torch.tensor([2, 0, 3]))]
    [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    flat = count.flatten()
    owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
    place = torch.arange(len(owner), device=flat.device) - begins(flat)[owner]
    return Expanded(owner, place)

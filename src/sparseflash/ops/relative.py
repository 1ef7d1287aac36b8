"""`t5_buckets`: the index into a table of relative biases for each distance between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..plan.options import is_count, is_length


def t5_buckets(
    Tq: int,
    Tk: int,
    *,
    q_offset: int = 0,
    buckets: int = 32,
    max_distance: int = 128,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """T5's bucket of every distance: one each for small distances, logarithmic ones for larger distances.

    With a table `[Hq, buckets]` of parameters, `pair_bias=table[None, :, t5_buckets(Tq, Tk)]` is T5's
    relative bias: O(Tq + Tk) numbers; attention returns their gradients, and the backward of the indexing
    sums these into the table.

    Parameters
    ----------
    Tq, Tk : int
        Numbers of queries and of keys.
    q_offset : int
        Position of the first query; key j has position j.
    buckets : int
        Number of buckets, the second size of the table. Unless causal, each direction has half of them.
    max_distance : int
        Distances from here on are in the last bucket.
    causal : bool
        Keys after the query have no buckets of their own (as in a decoder); they share that of distance 0.

    Returns
    -------
    Tensor, int64 [Tq + Tk - 1]
        Distance `key - query` is at index `key - query + Tq - 1`, as in a `pair_bias` of three dimensions.

    References
    ----------
    Raffel et al., "Exploring the Limits of Transfer Learning", arXiv 1910.10683, section 2.1.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> sf.t5_buckets(3, 3, buckets=8, max_distance=4).tolist()  # key 2, 1 before; the same; 1, 2 behind
    [2, 1, 0, 5, 6]
    >>> q, k, v = torch.randn(3, 1, 4, 100, 32)
    >>> table = torch.randn(4, 32, requires_grad=True)
    >>> out = sf.attention(q, k, v, pair_bias=table[None, :, sf.t5_buckets(100, 100)])
    >>> out.sum().backward()
    >>> table.grad.shape
    torch.Size([4, 32])
    """
    each = buckets if causal else buckets // 2 if is_count(buckets, 1) else 0
    near = each // 2 if is_count(buckets, 1) else 0
    require(
        (is_length(Tq) and is_length(Tk), lambda: f"Tq={Tq!r}, Tk={Tk!r}: expected ints >= 0"),
        (isinstance(q_offset, int), lambda: f"q_offset={q_offset!r}: expected an int"),
        (near >= 1, lambda: f"buckets={buckets!r}: expected an int of at least {2 if causal else 4}"),
        (
            is_count(max_distance, near + 1),
            lambda: f"max_distance={max_distance!r}: expected more than the {near} distances of their own",
        ),
        error=SparseFlashError,
    )
    gap = torch.arange(max(Tq + Tk - 1, 0), device=device) - (Tq - 1) - q_offset  # key - query
    far = (-gap).clamp(min=0) if causal else gap.abs()
    logs = torch.log(far.clamp(min=1).float() / near) / math.log(max_distance / near) * (each - near)
    found = torch.where(far < near, far, (near + logs.long()).clamp(max=each - 1))
    return found if causal else found + torch.where(gap > 0, each, 0)

"""`pooled`: reduce each block of tokens to one vector."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..backends.numerics import state_dtype
from ..common.errors import SparseFlashError, require
from ..ops.rows import take_rows
from ..plan.options import is_length, known
from .grid import check_keep
from .sharded import Sharded

Pooling = Literal["mean", "max", "min", "absmax"]


def pooled(
    x: Tensor,
    size: int,
    how: Pooling = "mean",
    *,
    keep: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Reduce each block of `size` tokens to one vector: their mean, maximum, minimum or absolute maximum.

    A shorter last block reduces its own tokens, and padding is ignored (it may hold anything). Means of keys
    and queries give the block scores of MInference (arXiv 2407.02490) and FlexPrefill (2502.20766); maximum,
    minimum and mean concatenated are the keys of SeerAttention's gate (2410.13276).

    Parameters
    ----------
    x : Tensor
        `[B,H,T,D]`, floating point, any strides.
    size : int
        Tokens of a block.
    how : "mean", "max", "min" or "absmax"
        Reduction over tokens, separately for each channel.
    keep : Tensor, optional
        bool `[B|1, T]`, True = a real token.
    order : Tensor, optional
        `[B|1, H|1, T]`, a permutation of the tokens: blocks are of x in this order (PBS-Attn, 2510.21270).

    Returns
    -------
    Tensor, [B, H, ceil(T / size), D]
        fp32 (fp64 for fp64); 0 for a block without a real token. No gradient.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import pooled
    >>> pooled(torch.arange(5.0).view(1, 1, 5, 1), 2)[0, 0, :, 0].tolist()
    [0.5, 2.5, 4.0]
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise SparseFlashError(f"x: {given}; expected floating point [B,H,T,D]")
    require((is_length(size, 1), lambda: f"size={size!r}: expected a positive int, the tokens of a block"))
    if how not in ("mean", "max", "min", "absmax"):
        raise SparseFlashError(f"how={how!r}: expected mean, max, min or absmax")
    B, T, work = x.shape[0], x.shape[2], state_dtype(x)
    check_keep("keep", keep, T, B)
    require((order is None or keep is None, lambda: "keep and order: expected one of them"))
    x = x.detach()
    if isinstance(x, Sharded) and keep is None and T:
        return x.pooled(min(size, T), how, order)
    if order is not None:
        x = take_rows(x, order)
    if keep is None and not known(T):
        keep = torch.ones(1, T, dtype=torch.bool, device=x.device)  # the path valid for every T
    elif known(T):
        size = min(size, max(T, 1))
    n = -(-T // size)
    whole = T // size
    if keep is None and T == whole * size:
        return _reduce(_split(x, size), how, work)
    if keep is None:
        parts = [_reduce(_split(x[:, :, : whole * size], size), how, work)] if whole else []
        return torch.cat([*parts, _reduce(x[:, :, None, whole * size :], how, work)], 2)
    x = _split(torch.nn.functional.pad(x, (0, 0, 0, n * size - T)), size)
    real = torch.nn.functional.pad(keep, (0, n * size - T)).view(len(keep), 1, n, size, 1).to(x.device)
    if how == "mean":
        total = torch.where(real, x, 0).sum(3, dtype=work)
        return total / real.sum(3).clamp(min=1)
    nothing = {"max": -torch.inf, "min": torch.inf, "absmax": 0}[how]
    found = _reduce(torch.where(real, x, nothing), how, work)
    return torch.where(real.any(3), found, 0)


def _split(x: Tensor, size: int) -> Tensor:
    """View [B,H,n * size,D] as [B,H,n,size,D]."""
    B, H, T, D = x.shape
    return x.view(B, H, T // size, size, D)


def _reduce(x: Tensor, how: str, work: torch.dtype) -> Tensor:
    if how == "mean":
        return x.mean(3, dtype=work)
    if x.shape[2] == 0:
        return x.new_zeros((*x.shape[:3], x.shape[4]), dtype=work)
    return {"max": x.amax, "min": x.amin, "absmax": x.abs().amax}[how](3).to(work)

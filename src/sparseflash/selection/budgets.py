"""Budgets: which of the scored units are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparseFlashError


def _candidates(score: Tensor, among: Tensor | None) -> Tensor:
    """`among` in the shape of the scores, checked; all of them for None."""
    if not isinstance(score, Tensor) or score.dim() < 1 or not score.is_floating_point():
        given = f"{list(score.shape)} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
        raise SparseFlashError(f"score: {given}; expected a floating point tensor [..., n]")
    if among is None:
        return torch.ones((), dtype=torch.bool, device=score.device).expand(score.shape)
    good = isinstance(among, Tensor) and among.dtype == torch.bool
    try:
        if good:
            return among.to(score.device).expand(score.shape)
    except RuntimeError:
        pass
    given = f"{list(among.shape)} {among.dtype}" if isinstance(among, Tensor) else type(among).__name__
    raise SparseFlashError(
        f"among: {given}; expected bool that broadcasts to {list(score.shape)}, True = may be kept"
    )


def _of_heads(name: str, x: object, score: Tensor, axes: int = 1) -> Tensor | float:
    """A number, or a tensor per head ([H], [B|1,H]) or of the scores' own axes, to compare with them."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return x
    if isinstance(x, Tensor) and x.dtype != torch.bool and not x.is_complex():
        x = x.to(score.device)
        if x.dim() == 0:
            return x
        shape = tuple(x.shape)
        if x.dim() != score.dim():
            shape = (1,) * (2 - x.dim()) + shape + (1,) * (score.dim() - 2)
        if x.dim() in (1, 2, score.dim()) and (score.dim() > 2 or x.dim() == score.dim()):
            fits = all(a in (1, b) for a, b in zip(shape, score.shape, strict=True))
            if fits and all(n == 1 for n in shape[len(shape) - axes :]):
                return x.reshape(shape)
    given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
    raise SparseFlashError(
        f"{name}: {given}; expected a number, or [H] or [B|1,H] of scores {list(score.shape)}"
    )


def _ordered(score: Tensor, among: Tensor) -> Tensor:
    """Scores as integers of their order: NaN below all numbers, what is no candidate below that."""
    wide = score.dtype == torch.float64
    kind = torch.int64 if wide else torch.int32
    bits = (score if wide else score.float()).detach().contiguous().view(kind)
    bits = torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)
    bits = torch.where(score == 0, 0, bits)  # -0.0 is 0.0
    low = torch.iinfo(kind).min
    return torch.where(among, torch.where(score.isnan(), low + 1, bits), low)


def _ranked(score: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Scores from the best to the worst, along the last axis, as places; and the rank of each place."""
    order = _ordered(score, among).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return order, rank


def top_k(score: Tensor, k: int | Tensor, among: Tensor | None = None) -> Tensor:
    """The k best units of each row.

    Parameters
    ----------
    score : Tensor
        Floating point `[..., n]`; heads, where k differs by them, are axis 1.
    k : int or Tensor
        Units of a row, at most: a number, or integers `[H]` or `[B|1, H]`. Less than 1 counts as 1.
    among : Tensor, optional
        bool that broadcasts to the scores: nothing else is ever kept.

    Returns
    -------
    Tensor, bool, like the scores
        Of equal scores those of lower units; NaN after every number. More k keeps what less k does.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import top_k
    >>> top_k(torch.tensor([[3.0, 1.0, 3.0, 3.0]]), 2).int().tolist()
    [[1, 0, 1, 0]]
    """
    among = _candidates(score, among)
    most = _of_heads("k", k, score)
    _, rank = _ranked(score, among)
    most = most.clamp(min=1) if isinstance(most, Tensor) else max(most, 1)
    return among & (rank < most)

"""`kmeans`: cluster tokens by their nearest centroid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.numerics import state_dtype
from ..common.errors import SparseFlashError, require
from ..ops.rows import take_rows
from ..plan.options import is_count, pieces
from .grid import check_keep

HELD = 1 << 22
"""Distances that are in memory at a time."""


def kmeans(
    x: Tensor,
    clusters: int,
    *,
    iterations: int = 10,
    init: Tensor | None = None,
    keep: Tensor | None = None,
    of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster tokens by Lloyd's algorithm, for all heads at once and deterministically on every device.

    Squeezed Attention (arXiv 2411.09688) and Sparse VideoGen 2 (2505.18875) cluster keys, Routing Transformer
    (2003.05997) queries and keys; normalise x first to cluster directions. O(iterations T clusters D) time,
    and a few megabytes of distances.

    Parameters
    ----------
    x : Tensor
        `[B,H,T,D]`, floating point.
    clusters : int
        Number K of clusters, at least 1.
    iterations : int
        Number of centroid updates; fixed, so that no convergence test synchronises.
    init : Tensor, optional
        Initial centroids `[B|1, H|1, K, D]`; by default K evenly spaced real tokens.
    keep : Tensor, optional
        bool `[B|1, T]`, True = a real token.
    of : Tensor, optional
        `[B,H,T,D']`: the returned centroids are means of this tensor instead of x (such as keys, if x holds
        their directions); 0 for an empty cluster.

    Returns
    -------
    label : Tensor, int32 [B, H, T]
        Index of the nearest centroid (the first of equally near ones); -1 for padding.
    centroid : Tensor, [B, H, K, D]
        fp32 (fp64 for fp64). The centroid of an empty cluster does not move. No gradient.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import kmeans
    >>> label, centroid = kmeans(torch.tensor([0.0, 9.0, 1.0, 8.0]).view(1, 1, 4, 1), 2)
    >>> label[0, 0].tolist(), centroid[0, 0, :, 0].tolist()
    ([1, 0, 1, 0], [8.5, 0.5])
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise SparseFlashError(f"x: {given}; expected floating point [B,H,T,D]")
    require(
        (is_count(clusters, 1), lambda: f"clusters={clusters!r}: expected a positive int"),
        (is_count(iterations), lambda: f"iterations={iterations!r}: expected an int >= 0"),
    )
    B, H, T, D = x.shape
    check_keep("keep", keep, T, B)
    x = x.detach().to(state_dtype(x))
    real = None if keep is None else keep.to(x.device)[:, None].expand(B, 1, T)
    if real is not None:
        x = torch.where(real[..., None], x, 0)
    shape = (B, H, clusters, D)
    if init is None:
        centroid = _apart(x, clusters, real)
    else:
        fits = isinstance(init, Tensor) and init.dim() == 4 and init.shape[2:] == shape[2:]
        if not fits or any(a not in (1, b) for a, b in zip(init.shape[:2], (B, H), strict=True)):
            given = str(list(init.shape)) if isinstance(init, Tensor) else type(init).__name__
            raise SparseFlashError(f"init: {given}; expected [{B}|1, {H}|1, {clusters}, {D}]")
        centroid = init.detach().to(x).expand(shape)
    for _ in range(iterations):
        centroid = _means(x, _nearest(x, centroid), centroid, real)
    label = _nearest(x, centroid)
    if of is not None:
        if not isinstance(of, Tensor) or of.shape[:3] != x.shape[:3]:
            given = str(list(of.shape)) if isinstance(of, Tensor) else type(of).__name__
            raise SparseFlashError(f"of: {given}; expected {[B, H, T]} as x and any width")
        of = of.detach().to(state_dtype(of))
        centroid = _means(of, label, of.new_zeros(B, H, clusters, of.shape[3]), real)
    return label if real is None else torch.where(real, label, -1), centroid


def _apart(x: Tensor, clusters: int, real: Tensor | None) -> Tensor:
    """Pick `clusters` evenly spaced real tokens as initial centroids."""
    B, H, T, D = x.shape
    if not T:
        return x.new_zeros(B, H, clusters, D)
    token = torch.arange(T, device=x.device).expand(B, 1, T)
    count = torch.full((B, 1, 1), T, device=x.device)
    if real is not None:
        token = torch.where(real, token, T).sort(-1).values.clamp(max=T - 1)
        count = real.sum(-1, keepdim=True)
    place = (2 * torch.arange(clusters, device=x.device) + 1) * count // (2 * clusters)
    chosen = token.gather(-1, place.clamp(max=T - 1)).expand(B, H, clusters)
    return take_rows(x, chosen)


def _step(x: Tensor, clusters: int) -> int:
    return max(1, HELD // max(1, x.shape[0] * x.shape[1] * clusters))


def _nearest(x: Tensor, centroid: Tensor) -> Tensor:
    B, H, T, _ = x.shape
    step, size = _step(x, centroid.shape[2]), (centroid**2).sum(-1)[:, :, None]
    parts = [(size - 2 * x[:, :, at:to] @ centroid.mT).argmin(-1).int() for at, to in pieces(T, step)]
    return torch.cat(parts, -1) if parts else torch.zeros(B, H, 0, dtype=torch.int32, device=x.device)


def _means(x: Tensor, label: Tensor, centroid: Tensor, real: Tensor | None) -> Tensor:
    """Means of clusters, by a product with the membership matrix: its summation order is deterministic."""
    total, count = torch.zeros_like(centroid), torch.zeros_like(centroid[..., :1])
    names, step = torch.arange(centroid.shape[2], device=x.device)[:, None], _step(x, centroid.shape[2])
    for at, to in pieces(x.shape[2], step):
        member = label[:, :, None, at:to] == names
        if real is not None:
            member = member & real[:, :, None, at:to]
        total = total + member.to(x.dtype) @ x[:, :, at:to]
        count = count + member.sum(-1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), centroid)

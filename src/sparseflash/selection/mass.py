"""`tile_mass`: attention mass of each unit of keys for each tile of queries, estimated or exact."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..backends.dispatch import choose_able
from ..backends.numerics import Masses, state_dtype
from ..common.errors import SparseFlashError, require
from ..ops._arguments import as_backend, as_scale, as_softcap, check_inputs, describe, is_real
from ..ops._register import register
from ..ops.rows import take_rows
from ..plan.options import FAR, is_count
from .grid import Grid
from .scores import pooled

How = Literal["mean", "antidiagonal", "energy", "exact"]
HOW = ("mean", "antidiagonal", "energy", "exact")
STRIDES = {"antidiagonal": 8, "energy": 16}


def _forward(
    rows: Tensor, columns: Tensor, sees: Tensor, keep: Tensor | None, level: Tensor | None, options: Masses
) -> Tensor:
    run = choose_able("tile_mass", options.backend, rows, columns).tile_mass
    return run(rows, columns, sees, keep, level, options)


def _empty(rows: Any, columns: Any, sees: Any, keep: Any, level: Any, options: Masses) -> Tensor:
    (B, H, n, _), m = rows.shape, columns.shape[2]
    shape = (B, H, -(-n // options.tile), -(-m // options.unit))
    found: Tensor = rows.new_empty(shape, dtype=state_dtype(rows))
    return found


_mass = register("selection_tile_mass", _forward, _empty)


def tile_mass(
    q: Tensor,
    k: Tensor,
    grid: Grid,
    how: How = "mean",
    *,
    reduce: Literal["sum", "max"] = "sum",
    lse: Tensor | None = None,
    stride: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    products: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Share of each unit of keys in the attention of each tile of queries.

    Every row of the result is at least 0 and sums to 1 over the units in the grid's reach; elsewhere, and
    for a tile that reaches nothing, it is 0. No gradient, fp32, nothing of size Tq x Tk; padding is ignored.

    Parameters
    ----------
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`; heads of K are shared, not repeated.
    grid : Grid
        The grid of these queries and keys.
    how : "mean", "antidiagonal", "energy" or "exact"
        - "mean": the softmax of mean queries of tiles over mean keys of units (MInference, arXiv 2407.02490;
          FlexPrefill, 2502.20766, equation 5). O(R C D).
        - "antidiagonal": queries and keys in groups of `stride`; a pair of groups scores the mean of the
        products
          along its antidiagonal, and P is the softmax of a group of queries over groups of keys (XAttention,
          2503.16428, algorithm 1). O(Tq Tk D / stride).
        - "energy": every query against the mean of each `stride` keys; weights exp(score) are relative to one
          maximum of the tile, so queries with large scores dominate (FlashPrefill, 2603.06199). O(Tq Tk D /
          stride).
        - "exact": P itself (AdaSpa, 2502.21079, algorithm 1), from `lse` or a computed lse. O(Tq Tk D).
    reduce : "sum" or "max"
        Reduction over the weights of a tile and a unit: their sum, or the largest (SeerAttention's target,
        2410.13276), before rows are scaled to 1.
    lse : Tensor, optional
        For "exact" only: `[B,Hq,Tq]`, natural log, possibly of an earlier step; None computes it.
    stride : int, optional
        8 by default for "antidiagonal", must divide tile and unit; 16 for "energy", must divide the unit.
    scale, softcap
        As in `sparseflash.attention`.
    products : torch.dtype, optional
        `torch.bfloat16` rounds the operands of "antidiagonal" and "energy"; takes less than half the time if
        the processor multiplies bf16.
    backend : str, optional
        "reference" or "cpu"; None chooses the fastest usable one.

    Returns
    -------
    Tensor, [B, Hq, R, C] fp32 (fp64 for fp64)

    Notes
    -----
    A query (for "antidiagonal": a group, by its last query) sees a group of keys if the group's first real
    key is not in its future, so an estimate may include a few future keys, at most to the end of a group. If
    padding or the end of the sequence cuts a group short, its nearest real token is repeated
    ("antidiagonal"), or the mean is of the real tokens ("energy").

    On the CPU each thread holds the scores of 64 rows (queries, or groups of them) against all columns.

    For permuted keys (PBS-Attn, arXiv 2510.21270) pass k in that order and a grid that is not causal; then
    select within `grid.reach(k_order=...)`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k = torch.randn(2, 1, 2, 256, 32)
    >>> grid = sf.selection.Grid(256, 256, tile=64, unit=64)
    >>> mass = sf.selection.tile_mass(q, k, grid, "antidiagonal")
    >>> bool((mass.sum(-1) - 1).abs().max() < 1e-5)
    True
    """
    check_inputs(q, k, k)
    require((isinstance(grid, Grid), lambda: f"grid is {describe(grid)}: expected a selection.Grid"))
    given = (q.shape[2], k.shape[2])
    require(
        (
            given == (grid.Tq, grid.Tk),
            lambda: f"{grid} is not for {given[0]} queries and {given[1]} keys: make one",
        ),
        (how in HOW, lambda: f"how={how!r}: expected mean, antidiagonal, energy or exact"),
        (reduce in ("sum", "max"), lambda: f"reduce={reduce!r}: expected sum or max"),
        (lse is None or how == "exact", lambda: f"lse is for how='exact', not for {how!r}"),
        (
            products in (None, torch.bfloat16),
            lambda: f"products={products!r}: expected torch.bfloat16, or None",
        ),
    )
    if lse is not None and not is_real(lse, q.shape[:3], q.device):
        raise SparseFlashError(
            f"lse: {describe(lse)}; expected floating point {list(q.shape[:3])} on {q.device}"
        )
    B, D = q.shape[0], q.shape[3]
    q, k = q.detach(), k.detach().expand(B, -1, -1, -1)
    factor, cap, joint = as_scale(scale, D), as_softcap(softcap), how == "energy"
    options = Masses(factor, cap, grid.tile, grid.unit, joint, reduce == "max", as_backend(backend))
    rows, columns, group, block = q, k, 1, 1  # operands; tokens per row and column
    if how == "mean":
        group, block = grid.tile, grid.unit
        rows, columns = pooled(q, group, keep=grid.q_keep), pooled(k, block, keep=grid.k_keep)
    elif how == "energy":
        block = _stride(how, stride, unit=grid.unit)
        columns = pooled(k, block, keep=grid.k_keep).to(q.dtype)
    elif how == "antidiagonal":
        group = block = _stride(how, stride, tile=grid.tile, unit=grid.unit)
        rows, columns = _groups(q, group, grid.q_keep), _groups(k, block, grid.k_keep, backwards=True)
        options = options._replace(scale=factor / group)
    options = options._replace(tile=grid.tile // group, unit=grid.unit // block)
    if products is not None and how in STRIDES:
        rows, columns = rows.to(products), columns.to(products)
    sees, keep = _sight(*grid.ends(group, block, q.device), grid.causal, B)
    level = None if lse is None else lse.detach().to(state_dtype(q)).contiguous()
    return _mass(rows, columns, sees, keep, level, options)


def _stride(how: str, stride: int | None, **sizes: int) -> int:
    """Validate the stride (tokens of a group): it divides these sizes."""
    size = STRIDES[how] if stride is None else stride
    require((is_count(size, 1), lambda: f"stride={stride!r}: expected a positive int, or None"))
    for name, n in sizes.items():
        if n % size:
            raise SparseFlashError(
                f"stride={size} does not divide {name}={n}, which how={how!r} needs: give stride= a divisor"
            )
    return size


def _groups(x: Tensor, size: int, keep: Tensor | None, *, backwards: bool = False) -> Tensor:
    """Concatenate `size` tokens to a row: [B,H,ceil(T/size),size * D]; `backwards` reverses each group."""
    B, H, T, D = x.shape
    n = -(-T // size)
    if keep is None and T == n * size:
        x = x.view(B, H, n, size, D)
        return (x.flip(3) if backwards else x).reshape(B, H, n, size * D)
    at = torch.arange(n * size, device=x.device).view(1, n, size)
    real = at < T
    if keep is not None:
        short = torch.nn.functional.pad(keep.to(x.device), (0, n * size - T))
        real = real & short.view(len(keep), n, size)
    before = torch.where(real, at, -1).cummax(-1).values
    behind = torch.where(real, at, n * size).flip(-1).cummin(-1).values.flip(-1)
    nearest = torch.where(before >= 0, before, torch.where(behind < n * size, behind, -1))
    nearest = (nearest.flip(-1) if backwards else nearest).reshape(len(nearest), 1, n * size, 1)
    found = take_rows(x, nearest[..., 0]) if T else x.new_zeros(B, H, n * size, D)
    return torch.where(nearest >= 0, found, 0).view(B, H, n, size * D)


def _sight(last: Tensor, first: Tensor, causal: bool, B: int) -> tuple[Tensor, Tensor | None]:
    """Number of columns that a row sees, [B,n], and which columns hold a token, [B,m].

    Rows end at positions `last`, columns begin at `first`; -FAR and FAR mark those without a token.
    """
    real, m = first < FAR, first.shape[-1]
    sees = torch.full_like(last, m)
    if causal and m:
        # give a column without a token the position of the one before it, so that the search finds an
        # ascending list; `real` hides the column anyway
        floor = torch.where(real, first, -FAR).cummax(-1).values
        batch = max(len(floor), len(last))
        sees = torch.searchsorted(*(x.expand(batch, -1).contiguous() for x in (floor, last)), right=True)
    sees = torch.where(last > -FAR, sees, 0).expand(B, -1).int().contiguous()
    return sees, real.expand(B, -1).contiguous()

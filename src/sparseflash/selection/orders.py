"""Token orders: image and video grids, locality-sensitive hashing, sorting by bucket, and their coverage.

No function uses the global random state: every draw is a function of a seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import require
from ..plan import Plan
from ..plan.entries import tile_view, visible
from ..plan.options import is_count, pieces, precise, spread_heads
from .sharded import Sharded

CHUNK = 1 << 22
"""Projections in memory at a time in `lsh_buckets`: bounds its temporaries to a few times 16 MiB."""


_MASK32 = (1 << 32) - 1


def _scramble(x: Tensor) -> Tensor:
    """Hash 32-bit integers (held in int64) bijectively; every output bit depends on every input bit."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def random_bits(
    *sizes: int, seed: int, streams: Sequence[int] = (), device: torch.device | str | None = None
) -> Tensor:
    """Uniform 32-bit integers, int64 `[*sizes]`: each a function of seed, streams and its index.

    The same call gives the same numbers on every device, a longer axis extends a shorter one, and no
    generator is used.

    Examples
    --------
    >>> from sparseflash.selection.orders import random_bits
    >>> bool((random_bits(2, 5, seed=0) == random_bits(2, 9, seed=0)[:, :5]).all())
    True
    """
    key = torch.zeros((1,) * len(sizes), dtype=torch.int64, device=device)
    for number in (seed & _MASK32, (seed >> 32) & _MASK32, *(x & _MASK32 for x in streams)):
        key = _scramble(key ^ number) + 0x9E3779B9 & _MASK32
    for axis, size in enumerate(sizes):
        counter = torch.arange(size, device=device).view([-1 if x == axis else 1 for x in range(len(sizes))])
        key = _scramble((key + counter * 0x9E3779B1) & _MASK32)
    return key


def random_picks(left: Tensor, n: int, *, seed: int) -> Tensor:
    """Draw n different numbers below `left [1,H,R]` for each row, ascending: int64 [1,H,R,n].

    A row with fewer than n such numbers is padded with 2^31 - 1. A row's draw depends only on its index and
    the seed.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection.orders import random_picks
    >>> random_picks(torch.tensor([[[2, 1]]]), 2, seed=0).tolist()
    [[[[0, 1], [0, 2147483647]]]]
    """
    bits = random_bits(*left.shape[1:], n, seed=seed, device=left.device)
    none = torch.iinfo(torch.int32).max
    picks = torch.zeros(*left.shape, 0, dtype=torch.int64, device=left.device)
    for place in range(n):  # x becomes the x-th number not yet taken
        x = bits[None, ..., place] % (left - place).clamp(min=1)
        for taken in picks.unbind(-1):
            x = x + (x >= taken)
        x = torch.where(left > place, x, none)
        picks = torch.cat([picks, x[..., None]], -1).sort(-1).values
    return picks


@functools.lru_cache(maxsize=256)
def _draw_planes(dim: int, buckets: int, heads: int, rounds: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(
        rounds, heads, dim, buckets // 2, generator=generator, dtype=torch.float64, device="cpu"
    )
    unit: Tensor = normal / normal.norm(dim=-2, keepdim=True)
    return unit.float().to(device)


@torch.library.custom_op("sparseflash::lsh_planes", mutates_args=())
def _planes(dim: int, buckets: int, heads: int, rounds: int, seed: int, device: torch.device) -> Tensor:
    """Draw the planes; a custom op, because compilers cannot trace a generator."""
    planes: Tensor = _draw_planes(dim, buckets, heads, rounds, seed, device)
    return planes.clone()


@_planes.register_fake
def _(dim: int, buckets: int, heads: int, rounds: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(rounds, heads, dim, buckets // 2, device=device)


def lsh_planes(
    dim: int,
    buckets: int,
    *,
    heads: int = 1,
    rounds: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random directions for angular hashing: normal columns scaled to unit length (SCFA, arXiv 2306.01160).

    Parameters
    ----------
    dim : int
        Head dimension D.
    buckets : int
        Number of buckets, even.
    heads, rounds : int
        Independent draws along these axes.
    seed : int
        Determines the planes, on every device, independent of other random draws.

    Returns
    -------
    Tensor, [rounds, heads, D, buckets / 2] fp32

    Examples
    --------
    >>> from sparseflash.selection.orders import lsh_planes
    >>> lsh_planes(64, 16, heads=4, seed=1).shape
    torch.Size([1, 4, 64, 8])
    """
    require(
        (
            is_count(buckets, 2) and buckets % 2 == 0,
            lambda: (
                f"{buckets!r} buckets: angular hashing needs an even number >= 2 (a direction and "
                "its opposite)"
            ),
        )
    )
    planes: Tensor = _planes(dim, buckets, heads, rounds, seed, torch.device(device or "cpu"))
    return planes


def lsh_buckets(x: Tensor, planes: Tensor) -> Tensor:
    """Bucket of each vector: `argmax [xR, -xR]`, in 0 .. 2 * columns - 1 (Reformer, arXiv 2001.04451).

    Does not depend on the norm of a vector, so q and its normalised copy agree (up to rounding in the copy).
    Projections are fp32 whatever the input dtype or autocast; the first of equal values wins; no gradient.

    Parameters
    ----------
    x : Tensor, [B, H, T, D]
    planes : Tensor, [h, D, columns]
        h any divisor of H: head n uses `planes[n * h // H]`.

    Returns
    -------
    Tensor, [B, H, T] int32

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection.orders import lsh_buckets, lsh_planes
    >>> x, planes = torch.randn(1, 2, 10, 32), lsh_planes(32, 8)[0]
    >>> bool((lsh_buckets(x, planes) == lsh_buckets(3 * x, planes)).all())
    True
    >>> bool((lsh_buckets(x, planes) == lsh_buckets(-x, planes)).any())
    False
    """
    if isinstance(x, Sharded):
        return x.joined(lsh_buckets(x.own, planes))
    B, H, T, _ = x.shape
    columns = planes.shape[-1]
    across = spread_heads(planes[None], H)[0].to(x.device, torch.float32).mT
    narrow = torch.uint8 if columns < 256 else torch.int32  # the reduction is fastest on bytes
    rank = torch.arange(columns, 0, -1, dtype=narrow, device=x.device)[:, None]
    step = max(1, CHUNK // max(B * H * columns, 1))
    parts = []
    with torch.no_grad(), precise(x):
        for at, to in pieces(T, step):
            # [columns, tokens]: reductions then run along contiguous memory, several times faster than argmax
            y = across @ x[:, :, at:to].float().mT
            top, bottom = y.amax(-2, keepdim=True), y.amin(-2, keepdim=True)
            upper = top >= -bottom
            found = ((y == torch.where(upper, top, bottom)) * rank).amax(-2).int()
            first = columns - found.clamp(min=1)  # NaN equals nothing, so found may be 0
            parts.append(torch.where(upper[:, :, 0], first, first + columns))
    return torch.cat(parts, -1) if parts else torch.zeros(B, H, 0, dtype=torch.int32, device=x.device)


def sorted_order(bucket: Tensor) -> Tensor:
    """Sort tokens by bucket, in time order inside a bucket: an int32 order for `Plan`.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection.orders import sorted_order
    >>> sorted_order(torch.tensor([[[1, 0, 1, 0]]])).tolist()
    [[[1, 3, 0, 2]]]
    """
    if bucket.dtype == torch.int64:  # bucket << 31 could overflow int64
        return bucket.argsort(dim=-1, stable=True).int()
    token = torch.arange(bucket.shape[-1], device=bucket.device)
    key = (bucket.long() << 31) | token  # sort one key (bucket, token): any token fits 31 bits
    return (key.sort(-1).values & ((1 << 31) - 1)).int()


def grid_order(
    grid: Sequence[int],
    *,
    axes: Sequence[int] | None = None,
    tile: Sequence[int] | None = None,
    text: int | tuple[int, int] = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Order the tokens of an image or a video so that neighbours in the grid are neighbours in the list.

    Parameters
    ----------
    grid : sequence of int
        Sizes, outermost axis first, such as (frames, rows, columns); tokens are in raster order.
    axes : sequence of int, optional
        The traversal order of the axes, outermost first: (1, 2, 0) makes the frames of one pixel adjacent
        (PAROAttention, arXiv 2506.16054; Sparse VideoGen, 2502.01776).
    tile : sequence of int, optional
        Sizes of a block, one per grid axis: the tokens of a block become consecutive (sliding tile attention,
        2502.04507). Blocks cut by the border are padded with empty lanes, so every block has the same number
        of rows: use that number as the unit.
    text : int or (int, int)
        Number of text tokens after the grid, or (before, after) it: they stay there, padded to whole blocks
        if `tile` is given.

    Returns
    -------
    Tensor, int32 [1, 1, rows]
        `order[row] = token`, -1 for an empty lane: a `q_order` or `k_order` of `Plan` and of `Grid.plan`.

    Examples
    --------
    >>> from sparseflash.selection import grid_order
    >>> grid_order((2, 3), tile=(2, 2))[0, 0].tolist()
    [0, 1, 3, 4, 2, -1, 5, -1]
    >>> grid_order((2, 3), axes=(1, 0), text=1)[0, 0].tolist()
    [0, 3, 1, 4, 2, 5, 6]
    """
    sizes, n = tuple(grid), len(tuple(grid))
    across = tuple(range(n)) if axes is None else tuple(axes)
    block = (1,) * n if tile is None else tuple(tile)
    before, behind = text if isinstance(text, tuple) else (0, text)
    require(
        (n > 0 and all(is_count(x) for x in sizes), lambda: f"grid={grid!r}: expected sizes >= 0"),
        (
            sorted(across) == list(range(n)),
            lambda: f"axes={axes!r}: expected the axes of {grid!r}, each once",
        ),
        (
            len(block) == n and all(is_count(x, 1) for x in block),
            lambda: f"tile={tile!r}: expected {n} sizes >= 1",
        ),
        (
            is_count(before) and is_count(behind),
            lambda: f"text={text!r}: expected a count, or (before, behind)",
        ),
    )
    token = torch.arange(math.prod(sizes), dtype=torch.int32, device=device).view(sizes) + before
    short = [-size % own for size, own in zip(sizes, block, strict=True)]
    token = torch.nn.functional.pad(token, [x for end in reversed(short) for x in (0, end)], value=-1)
    cut = [x for size, own in zip(token.shape, block, strict=True) for x in (size // own, own)]
    places = [2 * axis for axis in across] + [2 * axis + 1 for axis in across]
    parts = [token.view(cut).permute(places).reshape(-1)]
    whole = math.prod(block)
    for at, first, count in ((0, 0, before), (2, before + math.prod(sizes), behind)):
        words = torch.arange(first, first + count, dtype=torch.int32, device=device)
        parts.insert(at, torch.nn.functional.pad(words, (0, -count % whole), value=-1))
    return torch.cat(parts)[None, None]


def coverage(
    plan: Plan | Sequence[Plan], q_bucket: Tensor, k_bucket: Tensor, *, include_self: bool = False
) -> float:
    """Fraction of the causal pairs with equal buckets that a plan attends (SCFA, arXiv 2306.01160).

    Walks the tiles of the exact bucket plan, so memory is that of a tile and work that of the pairs with
    equal buckets, never Tq x Tk. Synchronises; do not call it in a forward.

    Parameters
    ----------
    plan : Plan or tuple of Plan
        A tuple covers what any of its plans covers (the rounds of Reformer).
    q_bucket, k_bucket : Tensor
        `[B|1, H|1, Tq]` and `[B|1, H|1, Tk]`, any integer ids.
    include_self : bool
        Whether a token's pair with itself counts.

    Returns
    -------
    float
        1.0 if every such pair is attended (and if there is none).

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q = torch.nn.functional.normalize(torch.randn(1, 1, 512, 16) + 1, dim=-1)
    >>> exact, chunked = sf.methods.HashSparse(nb=8), sf.methods.Reformer(bucket=64)
    >>> buckets = exact.ids(q, q)
    >>> sf.methods.coverage(exact.select(q, q).plan, *buckets)
    1.0
    >>> sf.methods.coverage(chunked.select(q, q).plan, *buckets) < 1
    True
    """
    plans = (plan,) if isinstance(plan, Plan) else tuple(plan)
    target = Plan.from_buckets(q_bucket, k_bucket, include_self=include_self)
    batch = max(target.extent()[0], *(p.extent()[0] for p in plans))
    heads = math.lcm(*(p.extent()[1] for p in (target, *plans)))
    rows = [_rows_of(p, batch, heads) for p in plans]
    wanted = hit = 0
    for r in range(target.tiles):
        view = tile_view(target, r, batch, heads)
        if not bool(view.keep.any()):
            continue
        met = torch.zeros_like(view.keep)
        for p, (q_row, k_row) in zip(plans, rows, strict=True):
            met |= _listed(p, view.q_token, view.k_token, q_row, k_row) & visible(
                p, view.q_token, view.k_token
            )
        wanted += int(view.keep.sum())
        hit += int((view.keep & met).sum())
    return hit / wanted if wanted else 1.0


def _rows_of(plan: Plan, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Row of every query and key token in the plan's orders, [B,H,T]; -1 for a dropped token."""
    found = []
    for order, T in ((plan.q_order, plan.Tq), (plan.k_order, plan.Tk)):
        if order is None:
            found.append(torch.arange(T, device=plan.device).expand(batch, heads, T))
            continue
        row = torch.full((*order.shape[:2], T + 1), -1, dtype=torch.int64, device=plan.device)
        at = torch.arange(order.shape[-1], device=plan.device).expand(order.shape)
        row.scatter_(-1, torch.where(order < 0, T, order).long(), at)
        found.append(spread_heads(row[..., :T], heads).expand(batch, -1, -1))
    return found[0], found[1]


def _listed(plan: Plan, q_token: Tensor, k_token: Tensor, q_row: Tensor, k_row: Tensor) -> Tensor:
    """Whether the lists (and bits) of a plan name the pairs of q [B,H,m] and k [B,H,n]: bool [B,H,m,n]."""
    batch, heads = q_token.shape[:2]

    def row_of(row: Tensor, token: Tensor) -> Tensor:
        return torch.where(token >= 0, row.gather(-1, token.clamp(min=0)), -1)

    q, k = row_of(q_row, q_token), row_of(k_row, k_token)[:, :, None, :]
    tile = q.clamp(min=0) // plan.tile
    named = torch.zeros((*q.shape, k.shape[-1]), dtype=torch.bool, device=q.device)

    def of_tile(name: str) -> Tensor:
        return spread_heads(getattr(plan, name), heads).expand(batch, -1, -1).gather(-1, tile).long()

    if plan.spans is not None:
        start, count = of_tile("span_start"), of_tile("span_count")
        for n in range(int(count.max()) if len(plan.spans) else 0):
            lo, hi = plan.spans[torch.where(n < count, start + n, 0)].long().unbind(-1)
            hi = torch.where(n < count, hi, lo)
            named |= (lo[..., None] <= k) & (k < hi[..., None])
    if plan.index is not None:
        start, count, full = of_tile("start"), of_tile("count"), of_tile("full")
        for n in range(int(count.max()) if len(plan.index) else 0):
            unit = torch.where(n < count, plan.index[torch.where(n < count, start + n, 0)].long(), -1)
            there = unit[..., None] == k // plan.unit
            if plan.bits is not None and len(plan.bits):
                partial = (n >= full) & (n < count)
                word = plan.bits[
                    torch.where(partial, of_tile("bits_start") + n - full, 0), q.clamp(min=0) % plan.tile
                ]
                lane = (k % plan.unit).expand(named.shape)
                bit = word.gather(-1, lane // 32) >> (lane % 32) & 1
                there = there & ((bit != 0) | ~partial[..., None])
            named |= there
    return named & (q >= 0)[..., None] & (k >= 0)

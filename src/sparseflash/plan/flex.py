"""Convert plans to and from FlexAttention's `BlockMask`, which is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.errors import PlanError, require
from . import algebra
from .bits import pack_bits
from .ragged import begins
from .record import Record

_FULL = -2
CHUNK = 64  # blocks of a mask function evaluated at a time


def to_block_mask(plan: Record, block: int = 128) -> Any:
    """Convert to a BlockMask: FlexAttention's block lists, and a `mask_mod` that looks up bits."""
    from torch.nn.attention.flex_attention import BlockMask

    require(
        (
            plan.q_order is None and plan.k_order is None,
            "a BlockMask has no row orders: this plan permutes or drops tokens; "
            "gather q, k and v by its orders first",
        ),
        error=PlanError,
    )
    p = algebra.retile(plan, block, block)
    if p.bits is None or p.spans is not None:  # rewrite as units with bits
        p = algebra.refine(p, None, tile=block, unit=block, extent=p.extent())
    batch, heads = p.extent()
    C = max(-(-p.Tk // block), 1)
    lists = p.unit_lists
    own = None if lists is None else lists.laid_out(batch, heads)
    if own is None or own.bits is None:
        raise PlanError("no units with bits")
    start, full, count, index, own_bits = own.start, own.full, own.count, own.pool, own.bits.words
    slot = torch.arange(C, device=p.device)

    def listed(first: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        live = slot < n[..., None]
        place = torch.where(live, first[..., None] + slot, 0)
        units = index[place] if len(index) else torch.zeros_like(place)
        return n.int(), torch.where(live, units, 0).int().contiguous()

    n_part, part = listed(start + full, count - full)
    n_full, whole = listed(start, full)
    ordinal = torch.full((batch, heads, p.tiles, C), -1, dtype=torch.int64, device=p.device)
    live = slot < n_part[..., None]
    value = torch.where(live, own.bits.start[..., None] + slot, -1)
    _put(ordinal, part.long(), value, live)
    sure = slot < n_full[..., None]
    _put(ordinal, whole.long(), torch.full_like(value, _FULL), sure)
    none = torch.zeros(1, block, -(-block // 32), dtype=torch.int32, device=p.device)
    bits = own_bits if len(own_bits) else none

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = ordinal[b if batch > 1 else b * 0, h if heads > 1 else h * 0, q // block, k // block]
        lane = k % block
        word = bits[at.clamp(min=0), q % block, lane // 32]
        # uncompiled FlexAttention evaluates every pair, also those of full blocks
        return (at == _FULL) | (at >= 0) & (((word >> (lane % 32)) & 1) != 0)

    return BlockMask.from_kv_blocks(
        n_part, part, n_full, whole, BLOCK_SIZE=(block, block), mask_mod=mask_mod, seq_lengths=(p.Tq, p.Tk)
    )


def _put(into: Tensor, at: Tensor, value: Tensor, live: Tensor) -> None:
    where = live.nonzero(as_tuple=True)
    into[where[0], where[1], where[2], at[where]] = value[where]


def from_block_mask(block_mask: Any) -> dict[str, Any]:
    """Fields of the plan of a BlockMask; its mask function is evaluated on partial blocks only."""
    known = hasattr(block_mask, "kv_num_blocks") and hasattr(block_mask, "mask_mod")
    what = "expected a BlockMask of torch.nn.attention.flex_attention"
    require((known, lambda: f"block_mask is a {type(block_mask).__name__}: {what}"), error=PlanError)
    Tq, Tk = block_mask.seq_lengths
    tile, unit = block_mask.BLOCK_SIZE
    n_part, part = block_mask.kv_num_blocks, block_mask.kv_indices
    R, C = -(-Tq // tile), -(-Tk // unit)
    n_part, part = n_part[..., :R], part[..., :R, :]
    n_full, whole = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    if n_full is None:
        n_full, whole = torch.zeros_like(n_part), part[..., :0]
    else:
        n_full, whole = n_full[..., :R], whole[..., :R, :]

    def live(n: Tensor, units: Tensor) -> Tensor:
        return torch.arange(units.shape[-1], device=units.device) < n[..., None]

    on_full, on_part = live(n_full, whole), live(n_part, part)
    # a kernel treats a full block that the end of the keys cuts off as partial
    cut = (whole.long() + 1) * unit > Tk
    b, h, r, slot = (on_part).nonzero(as_tuple=True)
    b2, h2, r2, slot2 = (on_full & cut).nonzero(as_tuple=True)
    cell_b, cell_h, cell_r = (torch.cat(x) for x in ((b, b2), (h, h2), (r, r2)))
    column = torch.cat([part[b, h, r, slot], whole[b2, h2, r2, slot2]]).long()
    given = torch.cat([torch.zeros_like(b, dtype=torch.bool), torch.ones_like(b2, dtype=torch.bool)])
    seen = _evaluate(block_mask.mask_mod, cell_b, cell_h, cell_r, column, given, (Tq, Tk), (tile, unit))
    shape = n_part.shape
    order = torch.argsort(((cell_b * shape[1] + cell_h) * R + cell_r) * C + column)
    partial = torch.bincount((cell_b * shape[1] + cell_h) * R + cell_r, minlength=n_part.numel()).view(shape)
    fb, fh, fr, fslot = (on_full & ~cut).nonzero(as_tuple=True)
    full = (on_full & ~cut).sum(-1)
    # layout of a tile's list: full units, then partial ones by column; full 3, 5 and partial 1, 4: 3 5 1 4
    count = full + partial
    start = begins(count)
    index = torch.zeros(int(count.sum()), dtype=torch.int32, device=part.device)
    rank = (on_full & ~cut).cumsum(-1)[fb, fh, fr, fslot] - 1
    index[start[fb, fh, fr] + rank] = whole[fb, fh, fr, fslot].int()
    flat = partial.flatten()
    bits_start = begins(flat).view(shape)
    cb, ch, cr = cell_b[order], cell_h[order], cell_r[order]
    within = torch.arange(len(order), device=part.device) - bits_start[cb, ch, cr]
    index[start[cb, ch, cr] + full[cb, ch, cr] + within] = column[order].int()
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "start": start,
        "full": full.int(),
        "count": count.int(),
        "index": index,
        "bits": pack_bits(seen[order]),
        "bits_start": bits_start,
    }


def _evaluate(
    mask_mod: Callable[..., Tensor],
    b: Tensor,
    h: Tensor,
    r: Tensor,
    c: Tensor,
    given: Tensor,
    lengths: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """Evaluate the mask function on blocks (b, h, r, c): bool [n, tile, unit]; `given` blocks are full."""
    (Tq, Tk), (tile, unit) = lengths, size
    over = mask_mod
    for dims in ((None, None, None, 0), (None, None, 0, None), (0, 0, 0, 0)):
        over = torch.vmap(over, in_dims=dims)
    out = torch.zeros(len(b), tile, unit, dtype=torch.bool, device=b.device)
    for i in range(0, len(b), CHUNK):
        s = slice(i, i + CHUNK)
        q = r[s, None] * tile + torch.arange(tile, device=b.device)
        k = c[s, None] * unit + torch.arange(unit, device=b.device)
        inside = (q < Tq)[:, :, None] & (k < Tk)[:, None]
        seen = over(b[s], h[s], q.clamp(max=max(Tq - 1, 0)), k.clamp(max=max(Tk - 1, 0)))
        out[s] = inside & (seen | given[s, None, None])
    return out

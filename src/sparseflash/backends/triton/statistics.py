"""`attention_stats`: rows use the kernel over rows, keys that over keys, all others the one over entries."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Plan
from ..numerics import Statistics
from .blocks import Blocks, fitting
from .common import Table, View
from .entries import BLOCK, entries_kernel
from .launch import Arguments, found, power_of_two
from .softmax import launch_columns, launch_rows

BAND = 64
"""Diagonals per program."""


def stats(
    q: Tensor,
    k: Tensor,
    norm: Tensor,
    plan: Plan,
    options: Statistics,
    *,
    key_bias: Tensor | None,
) -> Tensor:
    """Sums (or maxima) of the weights under a norm, by key, row, entry, diagonal or block: [B,Hq,width]."""
    out = torch.zeros((*q.shape[:2], options.width), dtype=torch.float32, device=q.device)
    if not out.numel() or not plan.tiles:
        return out
    a = Arguments(q, k, k, plan, options.scale, options.softcap, key_bias)
    a.check_whole("statistics")
    a.switches |= {"STATS": True, "PEAK": options.peak}
    top, rest = norm.float().contiguous()
    a.named |= {"TOP": top, "REST": rest, "LSE": top, "DELTA": out}
    a.named |= {
        "OUT": View(out, *q.stride()),
        "DOUT": View(out, *q.stride()),
    }  # only the address of out is used
    if options.over == "row":
        launch_rows(a, plan, backward=False)
    elif options.over == "key":
        launch_columns(a, plan, q, q, out)  # no gradient is written
    else:
        band = {"diagonal": BAND, "block": BLOCK.value}.get(options.over, 0)
        _launch_entries(a, plan, band, (min(options.tile, plan.Tq), min(options.unit, plan.Tk)))
    return out


def _launch_entries(a: Arguments, plan: Plan, band: int, block: tuple[int, int]) -> None:
    """Run the kernel over entries (band 0), over bands of `band` diagonals, or over blocks (band BLOCK)."""
    out, order, Tk, row_of = a.named["OUT"].at, a.keys.order, a.named["N"].Tk, None
    if order is not None:
        row_of = torch.full((*order.shape[:2], Tk + 1), -1, dtype=torch.int32, device=order.device)
        row = torch.arange(order.shape[2], dtype=torch.int32, device=order.device).expand_as(order)
        row_of = row_of.scatter_(-1, torch.where(order < 0, Tk, order).long(), row)
        row_of = row_of[..., :-1].contiguous()
    width = out.shape[2]
    owned = -(-width // band) if band > 0 else width
    named = a.given(entries_kernel) | {"OUT": out, "block_tile": block[0], "block_unit": block[1]}
    named["ROW_OF"] = Table(a.none if row_of is None else row_of, *found(row_of))

    def start(blocks: Blocks) -> None:
        rows = min(blocks.rows, power_of_two(plan.tile))
        entries_kernel[(out.shape[0] * out.shape[1] * owned,)](
            **named, width=width, BAND=band, F=a.flags(blocks, rows, blocks.keys), **blocks.options()
        )

    fitting("entries", a.blocks("entries"), start)

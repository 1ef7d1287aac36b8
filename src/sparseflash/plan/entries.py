"""Expand a plan's lists: the keys of one tile, all entries at once, the visibility of pairs, the mask."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import bit
from .lists import Units
from .options import NONE, laid_out, shift_at, shift_of
from .ragged import begins, expand
from .record import Record


@dataclass(frozen=True)
class TileView:
    """The keys that one tile visits, for every (batch, head), and which of its rows sees which key.

    q_token [B,H,tile] and k_token [B,H,n] are token numbers (-1: no token), k_row [B,H,n] the rows of the
    keys; keep [B,H,tile,n] is visibility; entry [B,H,n] is the index of a key's entry in the tile's lists,
    spans before units (-1: no key).
    """

    q_token: Tensor
    k_token: Tensor
    k_row: Tensor
    keep: Tensor
    entry: Tensor


def _entries(plan: Record, r: int, batch: int, heads: int) -> tuple[Tensor, ...]:
    """Entries of tile r: lo, hi, bits row (-1: none), place in the lists, each [B,H,m]; padding is empty."""
    parts = []
    before: Tensor | int = 0
    for lists in plan.lists():
        own = lists.tile(r).laid_out(batch, heads)
        lo, hi, full, slot = own.padded()
        row = torch.full_like(lo, -1)
        if isinstance(own, Units) and own.bits is not None:
            at = own.bits.start[..., None] + slot - own.full[..., None]
            row = torch.where((slot < own.count[..., None]) & ~full, at, row)
        parts.append((lo, hi, row, before + slot))
        before = before + own.count[..., None].long()
    return tuple(torch.cat(x, -1) for x in zip(*parts, strict=True))


def tile_view(plan: Record, r: int, batch: int, heads: int) -> TileView:
    """Evaluate the rules on all keys that tile r visits; work and memory follow the visited area."""
    return next(tile_parts(plan, r, batch, heads, None))


def tile_parts(plan: Record, r: int, batch: int, heads: int, most: int | None) -> Iterator[TileView]:
    """Yield the view of tile r in parts of at most `most` keys (None: one part)."""
    device = plan.device
    lo, hi, bits_row, place = _entries(plan, r, batch, heads)
    size = hi - lo
    flat = size.flatten()
    entry, inside = expand(flat)
    total = size.sum(-1).flatten()
    n = int(total.max()) if total.numel() else 0
    owner = entry // size.shape[-1]
    column = torch.arange(entry.numel(), device=device) - begins(total)[owner]
    k_row = torch.full((batch * heads, n), -1, dtype=torch.int64, device=device)
    k_row[owner, column] = lo.flatten()[entry] + inside
    listed = torch.full_like(k_row, -1)
    listed[owner, column] = place.flatten()[entry]
    k_row, listed = k_row.view(batch, heads, n), listed.view(batch, heads, n)

    row = torch.arange(r * plan.tile, min((r + 1) * plan.tile, plan.q_rows), device=device)
    if plan.q_order is None:
        q_token = row.expand(batch, heads, -1)
    else:
        q_token = laid_out(plan.q_order[..., row], batch, heads).long()
    bit_row = lane = None
    if plan.bits is not None and len(plan.bits):
        bit_row, lane = torch.full((2, batch * heads, n), -1, dtype=torch.int64, device=device)
        bit_row[owner, column] = bits_row.flatten()[entry]
        lane[owner, column] = torch.where(bits_row.flatten()[entry] >= 0, inside, 0)  # spans outgrow bits
    for first in range(0, n, most) if most and n > most else (0,):
        part = slice(first, first + most if most else n)
        word = None if bit_row is None or lane is None else (bit_row[:, part], lane[:, part])
        yield _view(plan, q_token, k_row[..., part], listed[..., part], word)


def _view(
    plan: Record, q_token: Tensor, k_row: Tensor, listed: Tensor, word: tuple[Tensor, Tensor] | None
) -> TileView:
    batch, heads = q_token.shape[:2]
    covered = k_row >= 0
    if plan.k_order is None:
        k_token = k_row
    else:
        rows = laid_out(plan.k_order, batch, heads)
        k_token = torch.where(covered, rows.gather(-1, k_row.clamp(min=0)).long(), -1)
    keep = visible(plan, q_token, k_token)
    if word is not None and plan.bits is not None:
        bit_row, lane = (x.reshape(k_row.shape) for x in word)
        words = plan.bits[bit_row.clamp(min=0), :, lane.clamp(min=0) // 32]
        words = words[..., : q_token.shape[-1]].transpose(-1, -2)
        seen = bit(words, lane.clamp(min=0)[..., None, :])
        keep = keep & (seen | (bit_row < 0)[..., None, :])
    return TileView(q_token, k_token, k_row, keep & covered[..., None, :], listed)


def visible(plan: Record, q_token: Tensor, k_token: Tensor) -> Tensor:
    """Evaluate the plan's rules for tokens q [B,H,m] and k [B,H,n] (-1: no token): bool [B,H,m,n]."""
    batch, heads = q_token.shape[:2]

    def q(x: Tensor) -> Tensor:
        return read(laid_out(x, batch, heads), q_token)[..., :, None]

    def k(x: Tensor) -> Tensor:
        return read(laid_out(x, batch, heads), k_token)[..., None, :]

    shift = shift_of(plan.q_offset, 3)
    return plan.rules.see(q_token[..., :, None], k_token[..., None, :], shift, plan.Tk, q, k)


def standing(plan: Record, q_token: Tensor, k_token: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of query tokens [B,H,m] and key tokens [B,H,n]; undefined for tokens below 0."""
    batch, heads = q_token.shape[:2]
    q, k = plan.q_pos, plan.k_pos
    at = q_token + shift_of(plan.q_offset, 2) if q is None else read(laid_out(q, batch, heads), q_token)
    return at, k_token if k is None else read(laid_out(k, batch, heads), k_token)


def read(x: Tensor, token: Tensor) -> Tensor:
    """Gather x [B,H,T] at tokens [B,H,...], int64; the result is undefined for tokens below 0."""
    if not x.shape[-1]:  # no tokens: all lanes are empty
        return torch.zeros_like(token)
    return x.gather(-1, token.clamp(min=0)).long()


def positions(plan: Record, token: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Positions of query tokens [n, tile] of (batch, head) [n]; undefined in lanes without a token."""
    if plan.q_pos is not None:
        return fetch(plan.q_pos, b[:, None], h[:, None], token, plan.extent()[1])
    shift = shift_at(plan.q_offset, b)
    return token + (shift[:, None] if isinstance(shift, Tensor) else shift)


# ---------------------------------------------------------------- all entries at once

CELLS = 1 << 22
"""(query, key) pairs that are evaluated in one chunk."""


@dataclass(frozen=True)
class Ranges:
    """Every listed range of every (batch, head, tile), flattened: `[lo, hi)` in key rows.

    `cell` is the flat index (b * H + h) * R + r of the tile; `bits` is a row of the plan's bits, -1 for none;
    `ragged` marks units that the end of the keys cuts off.
    """

    cell: Tensor
    lo: Tensor
    hi: Tensor
    full: Tensor
    bits: Tensor
    ragged: Tensor

    def of(self, which: Tensor | slice) -> Ranges:
        """Select entries by mask, index or slice."""
        return Ranges(*(getattr(self, f.name)[which] for f in dataclasses.fields(self)))


def ranges(plan: Record) -> Ranges:
    """Flatten all entries of a plan, spans before units."""
    parts = []
    for lists in plan.lists():
        own = lists.laid_out(*plan.extent())
        listed = own.listed()
        lo, hi = own.rows(listed.entry)
        bits, ragged = torch.full_like(listed.cell, -1), torch.zeros_like(listed.full)
        if isinstance(own, Units):
            bits, ragged = own.bit_rows(listed), (listed.entry + 1) * plan.unit > plan.k_rows
        parts.append((listed.cell, lo, hi, listed.full, bits, ragged))
    return Ranges(*(torch.cat(x) for x in zip(*parts, strict=True)))


def query_tokens(plan: Record) -> Tensor:
    """Token of each row of each tile, -1 in empty lanes: [B,H,R,tile]."""
    batch, heads = plan.extent()
    if plan.q_order is None:
        rows = torch.arange(plan.Tq, dtype=torch.int32, device=plan.device).view(1, 1, -1)
    else:
        rows = plan.q_order
    rows = torch.nn.functional.pad(rows, (0, plan.tiles * plan.tile - plan.q_rows), value=-1)
    return laid_out(rows, batch, heads).reshape(batch, heads, plan.tiles, plan.tile)


@dataclass(frozen=True)
class Cells:
    """Key lanes of entries against the rows of their tiles: all [n], but q_token and keep [n, tile]."""

    entry: Tensor
    batch: Tensor
    head: Tensor
    k_row: Tensor
    q_token: Tensor
    k_token: Tensor
    keep: Tensor


def lanes(plan: Record, entries: Ranges, step: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield entry, offset inside it, batch, head and token of each covered key row, `step` rows at a time."""
    heads = plan.extent()[1]
    size = entries.hi - entries.lo
    ends = size.cumsum(0)
    lanes = int(ends[-1]) if len(ends) else 0
    for begin in range(0, lanes, step):
        lane = torch.arange(begin, min(begin + step, lanes), device=ends.device)
        entry = torch.searchsorted(ends, lane, right=True)
        inside = lane - (ends - size)[entry]
        cell = entries.cell[entry]
        b, h = cell // plan.tiles // heads, cell // plan.tiles % heads
        token = entries.lo[entry] + inside
        if plan.k_order is not None:
            token = fetch(plan.k_order, b, h, token, heads)
        yield entry, inside, b, h, token


def fetch(x: Tensor, b: Tensor, h: Tensor, at: Tensor, heads: int) -> Tensor:
    """Gather x [B|1,H',T] at (batch, query head of `heads`, index), int64; undefined for indices below 0."""
    if not x.shape[-1]:
        return torch.zeros_like(at)
    return x[b if x.shape[0] > 1 else torch.zeros_like(b), h * x.shape[1] // heads, at.clamp(min=0)].long()


def cells(plan: Record, entries: Ranges) -> Iterator[Cells]:
    """Evaluate the rules and bits on every pair that the entries cover, CELLS pairs at a time."""
    heads = plan.extent()[1]
    q_tokens = query_tokens(plan).reshape(-1, plan.tile)
    for entry, inside, b, h, k_token in lanes(plan, entries, max(1, CELLS // plan.tile)):
        q_token = q_tokens[entries.cell[entry]].long()
        shift = shift_at(plan.q_offset, b)
        shift = shift[:, None] if isinstance(shift, Tensor) else shift
        keep = plan.rules.see(
            q_token,
            k_token[:, None],
            shift,
            plan.Tk,
            functools.partial(fetch, b=b[:, None], h=h[:, None], at=q_token, heads=heads),
            functools.partial(fetch, b=b[:, None], h=h[:, None], at=k_token[:, None], heads=heads),
        )
        if plan.bits is not None and len(plan.bits):
            row, within = entries.bits[entry], inside % plan.unit  # a range may be longer than a unit's words
            words = plan.bits[row.clamp(min=0), :, within // 32]
            keep = keep & (bit(words, within[:, None]) | (row < 0)[:, None])
        yield Cells(entry, b, h, entries.lo[entry] + inside, q_token, k_token, keep)


def real_rows(plan: Record) -> Tensor:
    """Which rows hold a real token, one whose segment is not NONE: bool [B,H,R,tile]."""
    token = query_tokens(plan)
    real = token >= 0
    if plan.q_seg is not None and plan.Tq:
        batch, heads = plan.extent()
        label = read(laid_out(plan.q_seg, batch, heads), token.flatten(2).long())
        real = real & (label != NONE).view(real.shape)
    return real


def to_dense(plan: Record) -> Tensor:
    """Materialise the mask, bool [B,H,Tq,Tk]."""
    mask = torch.zeros(*plan.extent(), plan.Tq, plan.Tk, dtype=torch.bool, device=plan.device)
    for part in cells(plan, ranges(plan)):
        lane, row = part.keep.nonzero(as_tuple=True)
        mask[part.batch[lane], part.head[lane], part.q_token[lane, row], part.k_token[lane]] = True
    return mask

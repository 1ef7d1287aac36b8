"""Turn tensors and a plan into kernel arguments, whatever the block sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ...common.errors import BackendError
from ...plan import Plan, lists
from ...plan.options import SHORT, narrow, spread_heads
from ...plan.transpose import Entries, counted, unit_entries
from ..numerics import Numbers, Softmax, bends, dropout_bar, unit_of
from .blocks import MAX_DIM, WHOLE, Blocks, Case, choose, target
from .common import INTERPRETED, LOG2E, Flags, KeyTables, Rule, Sizes, Spans, Table, Tokens, Units, View
from .dropout import KEYS, QUERIES, Draws, words

_TOLD = ("QUERY_ORDER", "KEY_ORDER", "QUERY_POS", "KEY_POS", "QUERY_SEG", "KEY_SEG", "END")
_HEAVY = ("BITS", "HEAD_RULES", "SHIFT", "BIAS", "SOFTCAP")


@dataclass(frozen=True)
class Readers:
    """Tiles that list the units of each block of keys: `members` has each unit's place in the list, or -1."""

    begin: Tensor
    count: Tensor
    tile: Tensor
    members: Tensor


def part_of(unit: int, keys: int) -> int:
    """Piece size of units such that a block of `keys` keys holds whole pieces, or lies in one."""
    return unit if unit % keys == 0 or keys % unit == 0 else math.gcd(unit, keys)


def readers_of(units: lists.Units, keys: int) -> Readers:
    """Transpose the unit lists for blocks of `keys` key rows (or of one unit, if that is larger)."""
    R, part = units.count.shape[-1], part_of(units.unit, keys)
    per, ratio = max(1, keys // part), units.unit // part
    lists, groups = units.count[..., 0].numel() if R else 0, -(-units.k_rows // (per * part))
    entries, none = unit_entries(units), lists * groups * R
    if ratio > 1:
        cell, place, unit, real = (x.repeat_interleave(ratio) for x in entries)
        unit = unit * ratio + torch.arange(len(unit), device=unit.device) % ratio
        entries = Entries(cell, place, unit, real & (unit < groups * per))
    key = (entries.cell // max(R, 1) * groups + entries.unit // per) * R + entries.cell % max(R, 1)
    key, order = torch.where(entries.real, key, none).sort(stable=True)
    fresh = torch.ones_like(key, dtype=torch.bool)
    fresh[1:] = key[1:] != key[:-1]
    fresh &= key < none
    # a reader is a (tile, block of keys) pair; entries that are not real are written behind all readers
    reader = torch.where(key < none, fresh.cumsum(0) - 1, len(key))
    unit, place = entries.unit[order], entries.place[order].int()
    members = torch.full((len(key) + 1, per), -1, dtype=torch.int32, device=key.device)
    members[reader, unit % per] = place
    tile = torch.zeros(len(key) + 1, dtype=torch.int32, device=key.device)
    tile[reader] = (key % max(R, 1)).int()
    read = counted(torch.where(fresh, key // max(R, 1), lists * groups), lists * groups)
    shape = (*units.count.shape[:2], groups)
    return Readers((read.cumsum(0) - read).view(shape), read.int().view(shape), tile, members)


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors: programs that a card runs at a time, at least."""
    return 16 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 16, the minimum that `tl.dot` takes."""
    return max(16, triton.next_power_of_2(n))


def found(x: Tensor | None) -> tuple[int, int]:
    """Batch stride (0 if shared) and heads of a table [B|1, H, n], which kernels get contiguous."""
    return (0, 1) if x is None else (x.shape[1] * x.shape[2] if x.shape[0] > 1 else 0, x.shape[1])


def view(x: Tensor) -> View:
    """Address and strides of a tensor [B,H,T,D]."""
    return View(x, *x.stride())


def _common(tables: Iterable[Tensor | None]) -> tuple[int, int]:
    given = [x for x in tables if x is not None]
    return max((x.shape[0] for x in given), default=1), math.lcm(*(x.shape[1] for x in given))


def alike(*tables: Tensor | None) -> tuple[Tensor | None, ...]:
    """Spread tables to a common batch and common heads, contiguous, so that one offset serves all of them."""
    batch, heads = _common(tables)
    return tuple(
        None if x is None else spread_heads(x, heads).expand(batch, -1, *x.shape[2:]).contiguous()
        for x in tables
    )


@dataclass(frozen=True)
class KeyRows:
    """K and V in row space, and the row-space tables of their tokens."""

    k: Tensor
    v: Tensor
    order: Tensor | None
    pos: Tensor | None
    end: Tensor | None
    seg: Tensor | None


def key_rows(k: Tensor, v: Tensor, plan: Plan) -> KeyRows:
    """Keys as the kernels read them: gathered once if the plan has a key order, else in place."""
    order = plan.k_order
    if order is None:
        return KeyRows(k, v, None, *alike(plan.k_pos, plan.k_end, plan.k_seg))
    batch, heads = max(k.shape[0], order.shape[0]), math.lcm(k.shape[1], order.shape[1])
    at = spread_heads(order, heads).expand(batch, -1, -1).clamp(min=0).long()
    b = torch.arange(batch, device=k.device)[:, None, None] if k.shape[0] > 1 else 0
    h = (torch.arange(heads, device=k.device) * k.shape[1] // heads)[:, None]
    tables = alike(order, plan.k_pos, plan.k_end, plan.k_seg)
    row = tables[0].clamp(min=0).long()  # type: ignore[union-attr]
    by_row = [None if x is None else x.gather(-1, row) for x in tables[1:]]
    return KeyRows(k[b, h, at], v[b, h, at], tables[0], *by_row)


def head_rules(plan: Plan) -> Tensor | None:
    """[H, 3] int32: left, right (-1: unbounded) and sink of each head, where they differ."""
    if plan.head_window is None:
        return None
    window, sink = plan.head_window, plan.head_sink
    if sink is None:
        sink = window.new_full((1, 1, 1), plan.sink)
    window, sink = alike(window, sink)  # type: ignore[assignment]
    return torch.cat([window[0], sink[0]], -1).int().contiguous()  # type: ignore[index]


def wide(plan: Plan) -> bool:
    """True if positions may need more than 32 bits."""
    if isinstance(plan.q_offset, Tensor):  # its values are not read here: it may hold any 32-bit number
        return True
    return plan.q_pos is None and plan.q_offset + max(plan.Tq - 1, 0) > SHORT.max


class Arguments:
    """Arguments of every kernel over a plan, by name: `common` defines the named tuples."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        scale: float,
        softcap: float,
        key_bias: Tensor | None,
        fold: int = 0,
    ):
        B, H, Tq, D = q.shape
        Tk, Dv = k.shape[2], v.shape[3]
        self.q, self.keys = q, key_rows(k, v, plan)
        keys = self.keys
        some = plan.spans if plan.spans is not None else plan.index
        span = alike(plan.span_start, plan.span_full, plan.span_count)
        unit = alike(plan.start, plan.full, plan.count, plan.bits_start)
        rules = head_rules(plan)
        shift = narrow(plan.q_offset) if isinstance(plan.q_offset, Tensor) else None
        left, right = (-1 if side is None else side for side in plan.window or (None, None))
        bias = None if key_bias is None else key_bias.float().contiguous()
        first = next((x for x in (keys.order, keys.pos, keys.end, keys.seg) if x is not None), None)
        self.none = none = q if some is None else some
        """Triton needs a pointer for absent tables; it is never dereferenced."""

        def p(x: Tensor | None) -> Tensor:
            return none if x is None else x.contiguous()

        def table(x: Tensor | None) -> Table:
            return Table(p(x), *found(x))

        inner = scale / softcap if softcap else scale
        factor = unit_of(scale, softcap, key_bias) * LOG2E.value
        by_head = 1 if rules is None else rules.shape[0]
        apart = 1 if shift is not None and shift.numel() > 1 else 0
        offset = 0 if shift is not None else plan.q_offset
        of_k, of_v = view(keys.k), view(keys.v)
        if keys.k.shape[0] == 1 and B > 1:
            of_k, of_v = of_k._replace(batch=0), of_v._replace(batch=0)
        self.named: dict[str, Any] = {
            "Q": view(q), "K": of_k, "V": of_v,
            "SPANS": Spans(*map(p, span), p(plan.spans), *found(span[0])),
            "UNITS": Units(*map(p, unit[:3]), p(plan.index), p(unit[3]), p(plan.bits), *found(unit[0])),
            "TOKENS": Tokens(
                *table(plan.q_order), *table(plan.q_pos), *table(plan.q_seg), p(shift), apart, offset
            ),
            "KEYS": KeyTables(p(keys.order), p(keys.pos), p(keys.end), p(keys.seg), *found(first)),
            "BIAS": table(bias),
            "RULE": Rule(inner, softcap, factor, left, right, plan.sink, 0.0, p(rules), by_head),
            "DRAW": Draws(none, none, 0, 1.0, none, 0),
            "N": Sizes(H, keys.k.shape[1], Tq, Tk, plan.q_rows, plan.k_rows, plan.tiles),
            "scale": scale,
        }  # fmt: skip
        self.switches = {
            "D": D, "DV": Dv, "BD": min(power_of_two(D), WHOLE), "BDV": power_of_two(Dv),
            "TAIL": power_of_two(D - WHOLE) if D > WHOLE else 0, "TILE": plan.tile, "FOLD": fold,
            "UNIT": plan.unit,
            "SPANS": plan.spans is not None and plan.spans.shape[0] > 0,
            "UNITS": plan.index is not None and plan.index.shape[0] > 0,
            "BITS": plan.bits is not None and plan.bits.shape[0] > 0,
            "CAUSAL": plan.causal, "SELF": plan.include_self,
            "WINDOW": plan.window is not None or rules is not None, "HEAD_RULES": rules is not None,
            "END": plan.k_end is not None,
            "QUERY_ORDER": plan.q_order is not None, "KEY_ORDER": plan.k_order is not None,
            "QUERY_POS": plan.q_pos is not None, "KEY_POS": plan.k_pos is not None,
            "QUERY_SEG": plan.q_seg is not None, "KEY_SEG": plan.k_seg is not None,
            "SHIFT": shift is not None, "WIDE": wide(plan), "BENT": bends(scale, softcap, key_bias),
            "BIAS": key_bias is not None, "SOFTCAP": softcap != 0,
        }  # fmt: skip

    def drop(self, options: Softmax, seed: Tensor | None, numbers: Numbers | None = None) -> None:
        """Add dropout of this share of the weights, if there is a seed."""
        if seed is None:
            return
        (B, H, Tq, _), Tk = self.q.shape, self.named["N"].Tk
        share, own = options.dropout, numbers or (None, None)
        made = {
            "queries": words(seed, B, H, Tq, QUERIES, own[0], options.head),
            "keys": words(seed, B, H, Tk, KEYS, own[1], options.head),
        }
        self.named["DRAW"] = self.named["DRAW"]._replace(
            **made, bar=dropout_bar(share) - 2**31, kept=1 / (1 - share)
        )
        self.switches["DROP"] = True

    def lean(self, slopes: Tensor | None) -> None:
        """Add ALiBi's bias, if there are slopes [H] or [B,H]: then x is a logit."""
        if slopes is None:
            return
        batch = self.q.shape[1] if slopes.dim() == 2 else 0
        given = {"slopes": slopes.float().contiguous(), "slopes_batch": batch}
        self.named["DRAW"] = self.named["DRAW"]._replace(**given)
        self.named["RULE"] = self.named["RULE"]._replace(factor=LOG2E.value)
        self.switches |= {"ALIBI": True, "BENT": True}

    def check_whole(self, what: str) -> None:
        """Raise BackendError if D exceeds one block (WHOLE), for kernels that do not support a tail."""
        if self.switches["TAIL"]:
            raise BackendError(
                f"{what} of head dimension {self.switches['D']} do not run on 'triton' (up to {WHOLE} do, "
                f"without gradients {MAX_DIM}): use backend='reference'"
            )

    def check_registers(self, what: str, most: int) -> None:
        """Raise BackendError for float32 of dimension above `most` on AMD cards: too few registers."""
        dim = max(self.switches["D"], self.switches["DV"])
        if dim > most and self.q.dtype == torch.float32 and target()[0] == "hip":
            raise BackendError(
                f"{what} of head dimension {dim} in float32 do not run on 'triton' on an AMD card (up to "
                f"{most} do): use bfloat16 or float16, or backend='reference'"
            )

    @property
    def dim(self) -> int:
        """The larger of D and Dv, padded."""
        return max(self.switches["BD"], self.switches["BDV"])

    def blocks(self, kernel: str) -> Blocks:
        """Choose the block sizes of a kernel for this call."""
        unit = self.switches["UNIT"] if self.switches["UNITS"] else 0
        dtype = str(self.q.dtype).removeprefix("torch.")
        skips = self.switches.get("SKIP", False)
        more = self.switches.get("DROP", False) or self.switches.get("ALIBI", False)
        blocks = choose(Case(kernel, self.dim, unit, dtype), self.heavy or more or skips, self.plain)
        if not (self.heavy and more):
            return blocks
        if kernel == "rows, backward":  # dropout or ALiBi in a heavy call leaves too few registers
            return replace(blocks, keys=min(blocks.keys, 16))
        if kernel != "columns":
            return blocks
        blocks = replace(blocks, rows=min(blocks.rows, 16))
        wide = self.dim > 128 and dtype == "float32" and target()[1] // 10 == 9
        return replace(blocks, warps=16, registers=128) if wide else blocks

    @property
    def heavy(self) -> bool:
        """True if the call uses what takes many registers; dropout and ALiBi take some, but do not count."""
        has = self.switches
        return any(has[name] for name in _HEAVY) or (has["SPANS"] and has["UNITS"])

    @property
    def crowded(self) -> bool:
        """True if accumulators of both dK and dV leave too few registers: each then gets its own launch."""
        wide = self.heavy and self.dim > 256 and self.q.element_size() == 2
        return wide and target()[0] == "cuda" and target()[1] < 90

    @property
    def plain(self) -> bool:
        """True if rows are tokens in order, without order, position, segment or expiry tables."""
        return not any(self.switches[name] for name in _TOLD)

    def given(self, kernel: Any) -> dict[str, Any]:
        """Select the named arguments that a kernel takes."""
        return {name: x for name, x in self.named.items() if name in kernel.arg_names}

    def flags(self, blocks: Blocks, rows: int, cut: int) -> Flags:
        """Flags of a kernel with these blocks, `rows` rows per program and `cut` tested keys at a time."""
        unit = self.switches["UNIT"]
        own = {"UNIT_LANES": triton.next_power_of_2(unit), "PART": part_of(unit, blocks.keys)}
        return Flags(**self.switches, **own, BM=rows, BN=blocks.keys, CUT=cut, STAGES=blocks.stages)

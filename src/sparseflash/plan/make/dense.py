"""Implements `Plan.dense`: every key that the rules allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import FAR, TILE, UNIT, Fields, check_options, head_rules, is_count, is_length, normal_offset
from .spans import band_spans


def dense(
    Tq: int,
    Tk: int,
    *,
    causal: bool = False,
    window: Any = None,
    sink_tokens: int | Tensor = 0,
    q_offset: int | Tensor = 0,
    tile: int = TILE,
    unit: int = UNIT,
    device: torch.device | str | None = None,
) -> Fields:
    """Fields of `Plan.dense`."""
    check_options(causal=causal, tile=tile, unit=unit)
    if not (is_length(Tq) and is_length(Tk)):  # lazy: formatting a message would specialise a symbolic length
        raise PlanError(f"Tq={Tq!r}, Tk={Tk!r}: lengths are ints >= 0, of 32 bits")
    require(
        (
            isinstance(sink_tokens, Tensor) or is_count(sink_tokens),
            lambda: f"sink_tokens={sink_tokens!r}: expected an int >= 0, or a tensor [H]",
        ),
        error=PlanError,
    )
    window, sink, head_window, head_sink = head_rules(window, sink_tokens)
    q_offset = normal_offset(q_offset)
    if head_window is not None and device is None:
        device = head_window.device
    if isinstance(q_offset, Tensor):
        device = q_offset.device if device is None else device
        q_offset = q_offset.to(device)
        shift = q_offset.to(torch.int64).reshape(-1, 1, 1)
    else:
        shift = torch.full((1, 1, 1), q_offset, dtype=torch.int64, device=device)
    row = torch.arange(0, Tq, tile, device=device)
    first = row + shift
    last = torch.clamp(row + tile, max=Tq) - 1 + shift
    band: Any = window
    exempt: int | Tensor = sink
    if head_window is not None and head_sink is not None:
        head_window, head_sink = head_window.to(device), head_sink.to(device)
        wide = torch.where(head_window < 0, FAR, head_window.long())
        band, exempt = (wide[..., :1], wide[..., 1:]), head_sink.long()
        first, last = (x.expand(-1, head_window.shape[1], -1) for x in (first, last))
    fields = band_spans(first, last, 0, Tk, causal=causal, window=band, sink=exempt)
    return {
        "head_window": head_window,
        "head_sink": head_sink,
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        "window": window,
        "sink": sink if window else 0,
        "q_offset": q_offset,
        **fields,
    }

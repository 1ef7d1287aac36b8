"""What the plan costs: lists against the dense path, spans against units, making a plan against using it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import Plan
from sparseflash.bench.cases import forward_backward, inputs
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave


def plans(length: int, heads: int) -> dict[str, tuple[str, Callable[[], Plan]]]:
    """Label, what it is measured against ("" for the first of its kind), and how it is made."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-length // 128)
    ones = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    some = torch.rand(1, heads, blocks, blocks, generator=generator) < 0.25
    begins = torch.arange(blocks) * 128
    wide = torch.stack([torch.zeros_like(some, dtype=torch.int64), some * 128], -1)
    bucket = torch.randint(0, 16, (1, heads, length), generator=generator)
    keep = torch.rand(1, heads, length, generator=generator) < 0.5
    edges = torch.arange(0, length + 1, 512)

    def listed(tile: int, unit: int, share: int) -> Tensor:
        """Distinct units for every tile, one of `share`, in random order."""
        shape = (1, heads, -(-length // tile), -(-length // unit))
        return (
            torch.rand(shape, generator=generator).argsort(-1)[..., : shape[-1] // share].int().contiguous()
        )

    units, tokens = listed(128, 64, 4), listed(64, 1, 16)
    return {
        "dense causal": ("", lambda: Plan.dense(length, length, causal=True)),
        "all blocks, causal": (
            "dense causal",
            lambda: Plan.from_blocks(ones, Tq=length, Tk=length, causal=True),
        ),
        "the quarter as spans": (
            "a quarter of the blocks",
            lambda: Plan.from_spans(torch.where(some, begins, 0)[..., None] + wide, Tq=length, Tk=length),
        ),
        "a quarter of the blocks": ("dense causal", lambda: Plan.from_blocks(some, Tq=length, Tk=length)),
        "16 buckets": ("dense causal", lambda: Plan.from_buckets(bucket, bucket)),
        "half the tokens kept": ("dense causal", lambda: Plan.from_keep(keep, keep)),
        "window and sinks": (
            "dense causal",
            lambda: Plan.dense(length, length, causal=True, window=(1023, 0), sink_tokens=4),
        ),
        "documents of 512": ("dense causal", lambda: Plan.from_documents(edges)),
        "a quarter of the units of 64": (
            "dense causal",
            lambda: Plan.from_keys(units, Tq=length, Tk=length, tile=128, unit=64, causal=True),
        ),
        "a sixteenth of the keys, listed for 64 queries": (
            "dense causal",
            lambda: Plan.from_keys(tokens, Tq=length, Tk=length, tile=64, unit=1, causal=True, unique=True),
        ),
    }


def measure(
    *,
    length: int = 16384,
    heads: int = 4,
    dim: int = 64,
    rounds: int = 3,
    minutes: float = 3.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure making, preparing and using each plan; `share` is what making takes of forward + backward."""
    q, k, v, dout = inputs(length, heads=heads, dim=dim)
    cases = plans(length, heads)
    runs: dict[str, Callable[[], Any]] = {}
    for name, (_, make) in cases.items():
        plan = make().prepare()
        runs[f"{name}: make"] = make
        runs[f"{name}: prepare"] = lambda make=make: make().prepare()
        runs[f"{name}: use"] = forward_backward(
            lambda q, k, v, plan=plan: sf.attention(q, k, v, plan), q, k, v, dout
        )
    timings = interleave(runs, rounds=rounds, box=Box(minutes * 60), on_run=on_run)

    def ms(name: str) -> float:
        return timings[name].median * 1e3

    for name, (base, _) in cases.items():
        use, make, ready = (ms(f"{name}: {what}") for what in ("use", "make", "prepare"))
        row: Row = {"bench": "plan-costs", "case": name, "T": length, "heads": heads, "dim": dim}
        row |= {
            "dtype": "fp32",
            "ms": use,
            "ms_make": make,
            "ms_make_and_prepare": ready,
            "share": ready / use,
        }
        row |= {"against": base, "ratio": use / ms(f"{base}: use") if base else 1.0}
        yield row | {"rounds": len(timings[f"{name}: use"].times)}

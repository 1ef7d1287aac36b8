"""Make the pictures of docs/concepts.md: python docs/make_pictures.py."""

from __future__ import annotations

from pathlib import Path

import torch

from sparseflash import Plan

IMAGES = Path(__file__).parent / "images"
T = 1024


def pictures() -> dict[str, Plan]:
    """One plan for each picture."""
    generator = torch.Generator().manual_seed(0)
    bucket = torch.randint(0, 8, (1, 1, T), generator=generator).sort(-1).values
    bucket = torch.where(torch.rand(1, 1, T, generator=generator) < 0.9, bucket, 0)
    window = Plan.dense(T, T, causal=True, window=(127, 0), sink_tokens=32, tile=32)
    blocks = torch.rand(1, 1, T // 64, T // 64, generator=generator) < 0.3
    gathered = Plan.from_blocks(blocks, Tq=T, Tk=T, tile=64, unit=64, causal=True)
    return {
        "spans": window,
        "units": gathered,
        "orders": Plan.from_buckets(bucket, bucket, tile=32),
        "segments": Plan.from_documents(torch.tensor([0, 200, 230, 700, T]), window=(255, 0), tile=32),
        "algebra": gathered & Plan.dense(T, T, causal=True, window=(511, 0), tile=64, unit=64),
    }


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, plan in pictures().items():
        plan.plot(IMAGES / f"plan-{name}.png")

"""Whole training steps: the same model with dense and with sparse attention, step by step in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.train import Corpus, TrainConfig, Trainer

ATTENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense (torch SDPA)": ("dense", {}),
    "hash-sparse, 16 buckets": ("hash-sparse", {"nb": 16}),
    "qk-sparse, 30% dropped": ("qk-sparse", {"q_drop": 0.3, "k_drop": 0.3}),
}
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense (torch SDPA)": ("dense", {}),
    "window 128 + hash, 16 buckets": ("hash-sparse", {"nb": 16, "window": 128}),
    "window 128 + k-means, 16 centroids": ("hash-sparse", {"nb": 16, "window": 128, "buckets": "kmeans"}),
    "hash, 16 buckets": ("hash-sparse", {"nb": 16}),
}
"""With the window in every head, and without."""


def measure(
    corpus: Corpus,
    *,
    attentions: Mapping[str, tuple[str, dict[str, Any]]] = ATTENTIONS,
    lengths: Sequence[int] = (8192, 16384),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 5,
    minutes: float = 8.0,
    on_run: Callable[[str], None] = lambda text: None,
    **shape: int,
) -> Iterator[Row]:
    """Measure milliseconds per optimiser step and the speed-up over the first attention.

    `shape` may change layers (4), width (256), heads (4) and batch (1).
    """
    box = Box(minutes * 60)
    groups = [(length, dtype) for length in lengths for dtype in dtypes]
    for number, (length, dtype) in enumerate(groups):
        runs = {}
        for label, (attention, options) in attentions.items():
            config = TrainConfig("", attention, options, length=length, dtype=dtype, steps=10**6, **shape)
            runs[label] = Trainer(config, corpus).step
        share = Box(box.left / (len(groups) - number))
        timings = interleave(
            runs,
            rounds=rounds,
            box=share,
            on_run=lambda name, t=length, d=dtype: on_run(f"T = {t}, {d}, {name}"),
        )
        dense = next(iter(timings.values())).median
        for label, timing in timings.items():
            row: Row = {"bench": "step", "case": label, "dtype": dtype, "T": length, **shape}
            row |= {"ms": timing.median * 1e3, "speedup": dense / timing.median, "rounds": len(timing.times)}
            yield row | {"tokens_per_s": config.batch * length / timing.median}

"""The attention table: our kernels over torch SDPA, same tensors, one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import sparseflash as sf
from sparseflash.bench.cases import backward, forward, forward_backward, inputs
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.train.attention import build, dense

NAMES = {
    "dense forward": ("sdpa forward", "ours forward"),
    "dense backward": ("sdpa backward", "ours backward"),
    "hash-sparse, 16 buckets, forward + backward": ("sdpa both", "hash"),
    "qk-sparse, half dropped on both sides, forward + backward": ("sdpa both", "qk"),
}


def measure(
    *,
    length: int = 8192,
    batch: int = 1,
    heads: int = 4,
    dim: int = 64,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    rounds: int = 7,
    minutes: float = 5.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure ``ms_sdpa / ms_ours`` of dense, hash-sparse and QK-sparse attention.

    Everything a method does (hashing, sorting, gathering, and their backward) is inside its timing. All cases
    of a data type run in turn in one loop; the ratio is that of the medians.
    """
    for dtype in dtypes:
        q, k, v, dout = inputs(length, batch=batch, heads=heads, dim=dim, dtype=dtype)

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sf.attention(q, k, v, causal=True)

        runs = {
            "sdpa forward": forward(dense, q, k, v),
            "ours forward": forward(ours, q, k, v),
            "sdpa backward": backward(dense, q, k, v, dout),
            "ours backward": backward(ours, q, k, v, dout),
            "sdpa both": forward_backward(dense, q, k, v, dout),
            "hash": forward_backward(build("hash-sparse", {"nb": 16}), q, k, v, dout),
            "qk": forward_backward(build("qk-sparse", {"q_drop": 0.5, "k_drop": 0.5}), q, k, v, dout),
        }
        box = Box(minutes * 60 / len(dtypes))
        timings = interleave(
            runs, rounds=rounds, box=box, on_run=lambda name, d=dtype: on_run(f"{d}, {name}")
        )
        for name, (base, own) in NAMES.items():
            base_ms, own_ms = timings[base].median * 1e3, timings[own].median * 1e3
            row: Row = {"bench": "attention-table", "case": name, "dtype": dtype, "T": length}
            row |= {"batch": batch, "heads": heads, "dim": dim, "ms_sdpa": base_ms, "ms": own_ms}
            yield row | {"ratio": base_ms / own_ms, "rounds": len(timings[own].times)}

"""What selecting costs beside attention: estimators, budgets and statistics of 8192 tokens on one thread.

Times are CPU time of the process, the smallest of some rounds: other programs may be running. `plain` is the
same function in PyTorch, and `share` what it takes of dense causal attention. Where products may be rounded
to bf16, `kept` is the share of the blocks in reach that a budget of 0.9 keeps, and `differ` how many of them
another precision exchanges; captured queries and keys beside normal ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import selection
from sparseflash.bench import capture
from sparseflash.bench.results import Row

CAPTURE = Path("benchmarks/captures/books.safetensors")
Case = tuple[str, str, Callable[[str | None], Any], bool]


def cpu_ms(run: Callable[[], Any], rounds: int) -> float:
    """The smallest CPU time of some calls, after one that warms up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def cases(q: Tensor, k: Tensor) -> Iterator[Case]:
    """Name, dtype of the products, a function of the backend, and whether PyTorch's is timed too."""
    T = q.shape[2]
    g = torch.Generator().manual_seed(1)
    grid = selection.Grid(T, T)
    pages, keys = torch.randn(36, T, generator=g), torch.randn(8, T, generator=g)
    rising = keys.sort(-1).values
    bf16, fp32 = torch.bfloat16, None

    def mass(how: Any, **options: Any) -> Callable[[str | None], Any]:
        return lambda backend: selection.tile_mass(q, k, grid, how, backend=backend, **options)

    yield "mean of blocks of 128", "fp32", mass("mean"), True
    for stride, kind in ((8, fp32), (8, bf16), (16, fp32), (16, bf16)):
        name = "fp32" if kind is None else "bf16"
        yield f"antidiagonal, stride {stride}", name, mass("antidiagonal", stride=stride, products=kind), True
    yield "energy, stride 16", "fp32", mass("energy"), True
    yield "energy, stride 16", "bf16", mass("energy", products=bf16), True
    yield "exact", "fp32", mass("exact"), True
    for rows in (64, 128):
        yield (
            f"probe of {rows} rows",
            "fp32",
            lambda backend, n=rows: selection.probe(q, k, n, backend=backend),
            True,
        )
    yield (
        "512 of 8192, 36 rows",
        "fp32",
        lambda backend: selection.top_indices(pages, 512, backend=backend),
        True,
    )
    yield "512 of 8192, 36 rows: torch.topk", "fp32", lambda backend: torch.topk(pages, 512), False
    for name, x in (("", keys), (", rising", rising)):
        yield (
            f"256th of every prefix, 8 rows{name}",
            "fp32",
            lambda backend, x=x: selection.running_kth(x, 256, return_until=True, backend=backend),
            not name,
        )
    blocks = selection.tile_mass(q, k, grid)
    yield "top_p of 64 x 64 blocks", "fp32", lambda backend: selection.top_p(blocks, 0.9), False
    yield "the plan of kept blocks", "fp32", lambda backend: grid.plan(blocks > 0.01), False
    plan = sf.Plan.dense(T, T, causal=True)
    lse = sf.attention(q, k, k, plan, return_lse=True)[1]
    for over in ("diagonal", "key", "row"):
        yield (
            f"statistics over {over}s",
            "fp32",
            lambda backend, x=over: sf.attention_stats(q, k, lse, plan, over=x),
            False,
        )


def kept(q: Tensor, k: Tensor, how: Any, **options: Any) -> tuple[float, float]:
    """The share of the blocks in reach that 0.9 of the mass keeps, and the share that bf16 exchanges."""
    grid = selection.Grid(q.shape[2], k.shape[2], 64, 64)
    reach = grid.reach()
    fine, coarse = (
        selection.top_p(selection.tile_mass(q, k, grid, how, products=x, **options), 0.9, reach)
        for x in (None, torch.bfloat16)
    )
    possible = float(reach.sum()) * q.shape[1]
    return float(fine.sum()) / possible, float((fine != coarse).sum()) / float(fine.sum())


def measure(
    *,
    length: int = 8192,
    heads: int = 9,
    kv_heads: int = 3,
    dim: int = 64,
    rounds: int = 5,
    plain: bool = True,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Time every case, on one thread; compare what is kept of captured tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        g = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, h, length, dim, generator=g) for h in (heads, kv_heads))
        dense = cpu_ms(lambda: sf.attention(q, k, k, causal=True), rounds)
        row: Row = {"bench": "selection", "T": length, "heads": heads, "kv_heads": kv_heads, "dim": dim}
        row |= {"rounds": rounds, "inputs": "normal"}
        yield row | {"case": "dense causal attention", "dtype": "fp32", "ms": dense, "share": 1.0}
        for name, dtype, run, twin in cases(q, k):
            ms = cpu_ms(lambda run=run: run(None), rounds)
            on_run(name)
            found: Row = {"case": name, "dtype": dtype, "ms": ms, "share": ms / dense}
            if plain and twin:
                slow = cpu_ms(lambda run=run: run("reference"), 1)
                found |= {"ms_plain": slow, "ratio": slow / ms}
            yield row | found
        captured = capture.inputs(CAPTURE, dtype=torch.float32)(4096) if CAPTURE.is_file() else None
        for inputs, pair in (("normal", (q, k)), ("captured", captured)):
            for how, stride in (("antidiagonal", 8), ("antidiagonal", 16), ("energy", 16)):
                if pair is None:
                    continue
                own = [x.detach() for x in pair[:2]]
                share, differ = kept(own[0], own[1], how, stride=stride)
                shape: Row = {"T": own[0].shape[2], "heads": own[0].shape[1], "kv_heads": own[1].shape[1]}
                shape |= {"dim": own[0].shape[3], "inputs": inputs, "case": f"{how}, stride {stride}: kept"}
                yield row | shape | {"dtype": "bf16", "kept": share, "differ": differ}
    finally:
        torch.set_num_threads(threads)

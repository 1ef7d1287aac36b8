"""`decode` over records against the rows that they stand for: bytes and time, in turn.

The roof is what reading fewer bytes could bring if nothing had to be expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

import sparseflash as sf
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave

FORMS = {"0.7": (0.7, False), "0.5": (0.5, False), "int8": (0.0, True), "0.7, int8": (0.7, True)}
"""Sparsity and integers, by name."""


def measure(
    *,
    mib: int = 64,
    heads: int = 3,
    groups: Sequence[int] = (3,),
    dims: Sequence[int] = (64, 128),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 9,
    minutes: float = 4.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure milliseconds of decode over so many MiB of K and V and over records of them."""
    shapes = [(g, d, t) for t in dtypes for d in dims for g in groups]
    box = Box(minutes * 60)
    for number, (group, dim, dtype) in enumerate(shapes):
        kind = DTYPES[dtype]
        T = mib * 2**20 // (2 * heads * dim * kind.itemsize)
        q = torch.randn(1, heads * group, 1, dim).to(kind)
        k, v = torch.randn(2, 1, heads, T, dim).to(kind)
        packed = {
            name: [sf.records.pack(x, sparsity=sparsity, int8=int8) for x in (k, v)]
            for name, (sparsity, int8) in FORMS.items()
        }
        runs: dict[str, Callable[[], object]] = {"dense": lambda q=q, k=k, v=v: sf.decode(q, k, v)}
        runs |= {name: lambda q=q, x=x: sf.decode(q, *x) for name, x in packed.items()}
        share = Box(box.left / (len(shapes) - number))

        def watch(name: str, case: str = f"{dtype}, D {dim}, group {group}") -> None:
            on_run(f"{case}, {name}")

        timings = interleave(runs, rounds=rounds, box=share, on_run=watch)
        for name, x in packed.items():
            bytes_ = x[0].nbytes / k.nbytes
            row: Row = {"bench": "records", "case": name, "dtype": dtype, "T": T, "group": group, "dim": dim}
            row |= {"mib": mib, "bytes": bytes_, "roof": 1 / bytes_}
            row |= {"ms_dense": timings["dense"].median * 1e3, "ms": timings[name].median * 1e3}
            yield row | {"ratio": timings["dense"].over(timings[name]), "rounds": len(timings[name].times)}

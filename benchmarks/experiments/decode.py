"""`decode` over what the machine allows: the bandwidth of its memory, and the speed of its products.

The bandwidth is that of a plain read of the same K and V, eight places a thread in turn. Other bytes will not
do: where the system puts them decides between 30 and 50 GB/s. Before each run something else is read, so that
nobody finds the cache filled by the one before. Where a key meets many queries (a large group, a shared
prefix) products are the limit, and a square matmul of the same dtype says how fast they could be; `roof` is
the share of the slower of the two limits. What a user would write instead runs in turn too: SDPA with
`enable_gqa`, under a mask where lengths differ, after gathering where K and V lie in pages or a prefix is
shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash.backends.cpu import library
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.plan import Plan


class Runs(NamedTuple):
    """A layout: what is timed, and what that moves and multiplies."""

    tokens: int
    """How many are read of each KV head."""
    seen: int
    """How many meet each query head, over all sequences."""
    memory: tuple[Tensor, Tensor]
    ours: Callable[[], Tensor]
    other: Callable[[], Tensor]


BATCH, HKV, SQUARE = 4, 8, 1024


def contiguous(tokens: int, group: int, dim: int, dtype: torch.dtype) -> Runs:
    """Sequences of equal lengths, each in a row of its own."""
    q, k, v = _cache(BATCH, tokens // BATCH, group, dim, dtype)
    return Runs(tokens, tokens, (k, v), lambda: sf.decode(q, k, v), lambda: _sdpa(q, k, v))


def ragged(tokens: int, group: int, dim: int, dtype: torch.dtype) -> Runs:
    """Lengths as 1 : 3 : 5 : 7, padded to the longest."""
    lengths = torch.arange(1, 2 * BATCH, 2) * (tokens // BATCH**2)
    q, k, v = _cache(BATCH, int(lengths.max()), group, dim, dtype)
    plan = Plan.from_lengths(lengths, Tk=k.shape[2])
    seen = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    total = int(lengths.sum())
    return Runs(total, total, (k, v), lambda: sf.decode(q, k, v, plan), lambda: _sdpa(q, k, v, seen))


def paged(tokens: int, group: int, dim: int, dtype: torch.dtype, *, page: int) -> Runs:
    """Shuffled pages of a pool `[pages, page, Hkv, D]`; the alternative gathers each sequence first."""
    n = tokens // BATCH // page
    table = torch.randperm(BATCH * n).view(BATCH, n)
    q, *pools = _cache(BATCH, n * page, group, dim, dtype)
    pools = [x.reshape(BATCH * n, page, HKV, dim) for x in pools]
    k, v = (x.view(1, -1, HKV, dim).transpose(1, 2) for x in pools)
    plan = Plan.from_pages(table, torch.full((BATCH,), n * page), page_size=page, Tk=k.shape[2])

    def gather() -> Tensor:
        return _sdpa(q, *(x[table].flatten(1, 2).transpose(1, 2) for x in pools))

    total = BATCH * n * page
    return Runs(total, total, (pools[0], pools[1]), lambda: sf.decode(q, k, v, plan), gather)


def shared_prefix(tokens: int, group: int, dim: int, dtype: torch.dtype) -> Runs:
    """Half of the bytes are a prefix of all sequences; the alternative copies it to each."""
    prefix, own = tokens // 2, tokens // 2 // BATCH
    q, k, v = _cache(1, prefix + BATCH * own, group, dim, dtype, queries=BATCH)
    start = prefix + own * torch.arange(BATCH)
    ends = torch.stack([start, start + own], -1).view(BATCH, 1, 1, 1, 2)
    common = torch.tensor([0, prefix]).view(1, 1, 1, 1, 2)
    plans = tuple(Plan.from_spans(x, Tq=1, Tk=k.shape[2]) for x in (common, ends))

    def copy(x: Tensor) -> Tensor:
        first, rest = x[:, :, :prefix], x[:, :, prefix:]
        return torch.cat(
            [first.expand(BATCH, -1, -1, -1), rest.reshape(HKV, BATCH, own, dim).transpose(0, 1)], 2
        )

    seen = BATCH * (prefix + own)
    return Runs(
        k.shape[2], seen, (k, v), lambda: sf.decode(q, k, v, plans), lambda: _sdpa(q, copy(k), copy(v))
    )


LAYOUTS: dict[str, Callable[[int, int, int, torch.dtype], Runs]] = {
    "contiguous": contiguous,
    "ragged": ragged,
    "pages of 16": lambda *x: paged(*x, page=16),
    "pages of 64": lambda *x: paged(*x, page=64),
    "pages of 256": lambda *x: paged(*x, page=256),
    "shared prefix": shared_prefix,
}


def measure(
    *,
    mib: int = 64,
    layouts: Sequence[str] = tuple(LAYOUTS),
    groups: Sequence[int] = (1, 4, 8),
    dims: Sequence[int] = (64, 128),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 5,
    minutes: float = 6.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure GB/s and GF/s of decode, its shares of the machine's, and its ratio over the alternative."""
    shapes = [(a, g, d, t) for a in layouts for t in dtypes for d in dims for g in groups]
    box = Box(minutes * 60)
    elsewhere = torch.ones(mib * 2**18)
    for number, (layout, group, dim, dtype) in enumerate(shapes):
        each = 2 * HKV * dim * DTYPES[dtype].itemsize  # bytes of a token
        case = LAYOUTS[layout](mib * 2**20 // each, group, dim, DTYPES[dtype])
        share = Box(box.left / (len(shapes) - number))

        def watch(name: str, case: str = f"{layout}, {dtype}, D {dim}, group {group}") -> None:
            on_run(f"{case}, {name}")

        runs = _runs(case, elsewhere, torch.randn(SQUARE, SQUARE).to(DTYPES[dtype]))
        timings = interleave(runs, rounds=rounds, box=share, on_run=watch)
        read, mine, sdpa, matmul = (timings[name] for name in ("read", "decode", "sdpa", "matmul"))
        moved, work = case.tokens * each, 4 * case.seen * HKV * group * dim
        whole = sum(x.nbytes for x in case.memory)
        reading, multiplying = read.median * moved / whole, matmul.median * work / (2 * SQUARE**3)
        row: Row = {"bench": "decode", "case": layout, "dtype": dtype}
        row |= {"T": case.tokens, "group": group, "dim": dim, "mib": moved / 2**20}
        row |= {"gbs_read": whole / read.median / 1e9, "gfs_matmul": 2 * SQUARE**3 / matmul.median / 1e9}
        row |= {"gbs": moved / mine.median / 1e9, "gfs": work / mine.median / 1e9}
        row |= {"share": moved / whole / mine.over(read), "roof": max(reading, multiplying) / mine.median}
        row |= {"ms_sdpa": sdpa.median * 1e3, "ms": mine.median * 1e3, "ratio": sdpa.over(mine)}
        yield row | {"rounds": len(mine.times)}


def _runs(case: Runs, elsewhere: Tensor, square: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed in turn, with another read before each run that memory matters to."""

    def read() -> None:
        for x in case.memory:
            library.read(x)

    runs: dict[str, Callable[[], object]] = {}
    for name, run in (("read", read), ("decode", case.ours), ("sdpa", case.other)):
        runs[f"{name}, after"] = elsewhere.sum
        runs[name] = run
    return runs | {"matmul": lambda: square @ square}


def _cache(
    batch: int, length: int, group: int, dim: int, dtype: torch.dtype, queries: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(queries or batch, HKV * group, 1, dim).to(dtype)
    return q, torch.randn(batch, HKV, length, dim).to(dtype), torch.randn(batch, HKV, length, dim).to(dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)

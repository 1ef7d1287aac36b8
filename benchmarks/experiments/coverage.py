"""Which share of the pairs that share a bucket is attended: all of them, or what fits a chunk.

The comparison of SCFA (arXiv 2306.01160): the same buckets for both, tied queries and keys, and Reformer's
chunk with the one before it. Equal buckets fit chunks well; tokens in clusters make unequal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.bench.results import Row
from sparseflash.methods import HashSparse, Reformer, coverage

CHUNK = 64
"""Reformer's own size of a chunk; the other choice is T / nb, as long as a bucket on average."""


def normal(length: int, generator: torch.Generator) -> Tensor:
    """Independent tokens."""
    return torch.randn(1, 2, length, 64, generator=generator)


def clustered(length: int, generator: torch.Generator) -> Tensor:
    """Thirty clusters whose sizes fall as 1, 1/2, 1/3, ..., around centres that lie apart."""
    centre = torch.randn(1, 2, 30, 64, generator=generator)
    weight = (1 / torch.arange(1, 31)).expand(2, 30)
    which = torch.multinomial(weight, length, replacement=True, generator=generator)[None, :, :, None]
    noise = torch.randn(1, 2, length, 64, generator=generator)
    return centre.gather(2, which.expand(-1, -1, -1, 64)) + 0.3 * noise


INPUTS = {"normal": normal, "clustered": clustered}


@torch.no_grad()
def measure(
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    buckets: Sequence[int] = (4, 16, 64),
    captured: Callable[[int], list[Tensor]] | None = None,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure the coverage of hash-sparse attention and of Reformer with both sizes of chunks."""
    makers = dict(INPUTS)
    if captured is not None:
        makers["captured"] = lambda length, generator: captured(length)[0].detach().float()
    for name, make in makers.items():
        for length in lengths:
            q = make(length, torch.Generator().manual_seed(0))
            k = F.normalize(q, dim=-1)
            for nb in buckets:
                on_run(f"{name}, T = {length}, {nb} buckets")
                exact = HashSparse(nb=nb)
                ids = exact.ids(q, k)
                context = {"q_bucket": ids[0][None], "k_bucket": ids[1][None]}
                cases = {"hash-sparse": exact.select(q, k).plan}
                for label, size in (
                    ("reformer, chunks of T / nb", -(-length // nb)),
                    (f"reformer, {CHUNK}", CHUNK),
                ):
                    cases[label] = Reformer(bucket=size).select(q, k, context).plan
                for case, plan in cases.items():
                    row: Row = {"bench": "coverage", "case": case, "inputs": name, "T": length, "nb": nb}
                    yield row | {"coverage": coverage(plan, *ids)}

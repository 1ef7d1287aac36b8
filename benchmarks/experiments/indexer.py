"""Learned sparse attention: an indexer's choice, attention over it, its loss; each against the plain formula.

The plain formulas are those that model code runs everywhere: scores of all heads and pairs in fp32, and a
mask of all pairs for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash.bench import memory
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave

KINDS = ("choice", "attention", "loss")
"""Of cases: the first word of their names."""
HEADS, DIM = 64, 128
"""Heads of DeepSeek-V3.2's indexer, and their dimension."""
ATTENTION = (14, 2, 64)
"""Query heads, KV heads and head dimension of the attention: a model of half a billion parameters."""
LIMIT = 9 << 30
"""Bytes of scores above which the plain formula is not run."""


def choice(q: Tensor, k: Tensor, weights: Tensor, topk: int) -> Tensor:
    """The plain formula of `indexer_topk`."""
    T = q.shape[2]
    products = F.relu(torch.matmul(q.transpose(1, 2).float(), k.float().transpose(1, 2)[:, None]))
    scores = torch.matmul(weights.transpose(1, 2)[:, :, None].float(), products)[:, :, 0]
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu_(1), -torch.inf)
    return scores.topk(min(topk, T)).indices


def masked(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Attention over a choice by a mask of all pairs."""
    T = q.shape[2]
    mask = torch.zeros(index.shape[0], T, T + 1, dtype=torch.bool).scatter_(-1, index.long() % (T + 1), True)
    return F.scaled_dot_product_attention(q, k, v, mask[:, None, :, :T], enable_gqa=True)


def loss(q: Tensor, k: Tensor, weights: Tensor, main_q: Tensor, main_k: Tensor, lse: Tensor) -> Tensor:
    """The plain formula of `indexer_kl_loss`, in the warm-up."""
    T, group = q.shape[2], main_q.shape[1] // main_k.shape[1]
    past = torch.ones(T, T, dtype=torch.bool).tril_()
    pairs = main_q @ main_k.repeat_interleave(group, 1).transpose(-1, -2) * main_q.shape[-1] ** -0.5
    p = torch.exp(pairs - lse[..., None]).masked_fill(~past, 0).sum(1)
    p = p / p.sum(-1, keepdim=True)
    score = (F.relu(q @ k[:, None].transpose(-1, -2)) * weights[..., None]).sum(1)
    log = score.masked_fill(~past, -torch.inf).log_softmax(-1).masked_fill(~past, 0)
    return (torch.xlogy(p, p) - p * log).sum() / T


def tensors(T: int, dtype: torch.dtype, heads: int, dim: int) -> tuple[Tensor, ...]:
    """q_index, k_index, weights of an indexer, in the layout of models: heads after tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, T, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(1, T, dim, generator=generator).to(dtype)
    return q, k, torch.rand(1, T, heads, generator=generator).transpose(1, 2)


def _attention(T: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> list[Tensor]:
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(1)
    sizes = ((1, T, heads, dim), (1, T, kv_heads, dim), (1, T, kv_heads, dim))
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for s in sizes]


def _pairs(
    T: int, dtype: torch.dtype, topk: int, heads: int, dim: int, shape: tuple[int, int, int]
) -> Iterator[tuple[str, int, Callable[[], object], Callable[[], object]]]:
    """Case, bytes that the plain formula holds at least, the plain formula, ours."""
    q, k, weights = tensors(T, dtype, heads, dim)
    yield (
        "choice",
        8 * heads * T * T,
        lambda: choice(q, k, weights, topk),
        lambda: sf.indexer_topk(q, k, weights, topk),
    )
    index = sf.indexer_topk(q, k, weights, topk)
    leaves = _attention(T, dtype, shape)
    main_q, main_k, main_v = leaves

    def over(plain: bool, learn: bool) -> object:
        with torch.set_grad_enabled(learn):
            if plain:
                out = masked(main_q, main_k, main_v, index)
            else:
                plan = sf.Plan.from_choice(index, Tk=T, unique=True)
                out = sf.attention(main_q, main_k, main_v, plan)
            return torch.autograd.grad(out.sum(), leaves) if learn else out

    for learn in (False, True):
        yield (
            "attention, forward and backward" if learn else "attention, forward",
            0,
            lambda learn=learn: over(True, learn),
            lambda learn=learn: over(False, learn),
        )
    if dtype != torch.float32:
        return
    few = [x[:, :4].float().detach().requires_grad_() for x in (q, k, weights)]
    few[1] = k.float().detach().requires_grad_()
    given = [x.detach().float() for x in (main_q, main_k)]
    with torch.no_grad():
        _, lse = sf.attention(*given, given[1], causal=True, return_lse=True)
    yield (
        "loss with its gradient, 4 heads",
        8 * (4 + shape[0]) * T * T,
        lambda: torch.autograd.grad(loss(*few, *given, lse), few),
        lambda: torch.autograd.grad(sf.indexer_kl_loss(*few, *given, lse), few),
    )


def measure(
    *,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    kinds: Sequence[str] = KINDS,
    topk: int = 512,
    rounds: int = 3,
    minutes: float = 6.0,
    heads: int = HEADS,
    dim: int = DIM,
    shape: tuple[int, int, int] = ATTENTION,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure time and peak extra memory of each case, against the plain formula where memory allows it."""
    box = Box(minutes * 60)
    groups = [(T, name) for T in lengths for name in dtypes]
    for number, (T, name) in enumerate(groups):
        share = Box(box.left / (len(groups) - number))
        for case, held, plain, ours in _pairs(T, DTYPES[name], topk, heads, dim, shape):
            if not case.startswith(tuple(kinds)):
                continue
            runs = {"plain": plain, "ours": ours} if held < LIMIT else {"ours": ours}
            timings = interleave(
                runs, rounds=rounds, box=share, on_run=lambda x, c=case, t=T: on_run(f"T = {t}, {c}, {x}")
            )
            row: Row = {"bench": "indexer", "case": case, "dtype": name, "T": T, "topk": topk, "heads": heads}
            peaks = {x: memory.peak(run) / 2**20 for x, run in runs.items()}
            if "plain" in runs:
                row |= {"ms_plain": timings["plain"].median * 1e3, "ms": timings["ours"].median * 1e3}
                row |= {"ratio": timings["plain"].over(timings["ours"]), "mb_plain": peaks["plain"]}
                row |= {"mb": peaks["ours"], "mb_ratio": peaks["plain"] / max(peaks["ours"], 1.0)}
            else:
                row |= {"ms": timings["ours"].median * 1e3, "mb": peaks["ours"]}
                row |= {"note": f"the plain formula holds {held / 2**30:.0f} GiB or more: not run"}
            yield row | {"rounds": len(timings["ours"].times)}

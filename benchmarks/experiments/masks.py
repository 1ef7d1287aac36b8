"""Boolean masks: attention with them, and making what they need, against torch SDPA and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash import Plan
from sparseflash.bench.cases import forward, forward_backward, inputs
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave, seconds
from sparseflash.methods.tree import depth_first

BLOCK = 128


def full(T: int) -> Tensor:
    """All pairs: what looking at a mask costs where it hides nothing."""
    return torch.ones(T, T, dtype=torch.bool)


def tree(T: int) -> Tensor:
    """A random tree in depth-first order; a node sees its ancestors and itself."""
    generator = torch.Generator().manual_seed(0)
    parent = (torch.rand(T, generator=generator) * torch.arange(T)).long()
    parent[0] = -1
    place, end = (x[0] for x in depth_first(parent[None]))
    expires = torch.empty_like(end).scatter_(0, place, end)
    at = torch.arange(T)
    return (at[:, None] >= at) & (at[:, None] < expires)


def packed(T: int) -> Tensor:
    """Causal documents of 16 to 1200 tokens, most of them short."""
    generator = torch.Generator().manual_seed(0)
    length = 16 * (75 ** torch.rand(T // 16 + 1, generator=generator)).long()
    document = torch.repeat_interleave(torch.arange(len(length)), length)[:T]
    return (document[:, None] == document).tril_()


def longformer(T: int) -> Tensor:
    """A window of 256 on each side and 64 global tokens (arXiv 2004.05150)."""
    at = torch.arange(T)
    special = at < 64
    return ((at[:, None] - at).abs_() <= 256) | special | special[:, None]


def tiles(T: int, share: float, pairs: float = 1.0) -> Tensor:
    """Tiles of 128 x 128, so many of each row of tiles, the diagonal one included, with a share of pairs."""
    generator = torch.Generator().manual_seed(0)
    n = -(-T // BLOCK)
    score = torch.rand(n, n, generator=generator).fill_diagonal_(2.0)
    kept = torch.zeros(n, n, dtype=torch.bool).scatter_(1, score.topk(max(1, round(share * n))).indices, True)
    mask = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:T, :T]
    if pairs < 1:
        mask &= torch.rand(T, T, generator=generator) < pairs
    return mask | torch.eye(T, dtype=torch.bool)


def scattered(T: int, share: float) -> Tensor:
    """Single pairs, anywhere: nearly every tile holds some."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(T, T, generator=generator) < share) | torch.eye(T, dtype=torch.bool)


def relabelled(T: int) -> Tensor:
    """A band of 64 on each side whose tokens have been shuffled."""
    token = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    return (token[:, None] - token).abs_() <= 64


CASES: dict[str, Callable[[int], Tensor]] = {
    "full": full,
    "tree": tree,
    "packed": packed,
    "longformer": longformer,
    "10 % of the tiles": lambda T: tiles(T, 0.1),
    "10 % of the tiles with half of their pairs": lambda T: tiles(T, 0.1, 0.5),
    "50 % of the tiles": lambda T: tiles(T, 0.5),
    "1 % of the pairs": lambda T: scattered(T, 0.01),
    "50 % of the pairs": lambda T: scattered(T, 0.5),
    "shuffled band": relabelled,
    "shuffled band reordered": relabelled,
}


def filled(mask: Tensor) -> float:
    """Share of the 128 x 128 tiles that are not empty."""
    short = -len(mask) % BLOCK
    grid = F.pad(mask, (0, short, 0, short)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    return float(grid.any(3).any(1).float().mean())


def measure(
    *,
    lengths: Sequence[int] = (2048, 4096, 8192, 16384),
    cases: Sequence[str] = tuple(CASES),
    dtype: str = "fp32",
    heads: int = 4,
    dim: int = 64,
    rounds: int = 3,
    minutes: float = 10.0,
    flex: bool = True,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure every mask at every length.

    `ms` and `ms_sdpa` are forward + backward, with the plan at hand and with the mask; `ms_dense` is SDPA
    without one. FlexAttention has no backward on the CPU: `ms_flex` stands against `ms_forward`. `ms_build`
    and `ms_flex_build` are what a mask costs (a second one: compiling, which `ms_flex_first` holds, is not
    counted); `ratio_flex` counts them. `ms_flex_eager` is `create_block_mask` as it is without compiling it.
    """
    box = Box(minutes * 60)
    groups = [(T, name) for T in lengths for name in cases]
    for number, (T, name) in enumerate(groups):
        mask = CASES[name](T)
        row: Row = {"bench": "masks", "case": name, "T": T, "heads": heads, "dim": dim, "dtype": dtype}
        row["tiles"] = filled(mask)
        if box.left < 0:
            yield row | {"note": "skipped: the box is closed"}
            continue
        make = _builder(name, mask)
        if make is None:
            yield row | {"note": "skipped: needs SciPy"}
            continue
        q, k, v, dout = inputs(T, heads=heads, dim=dim, dtype=dtype)
        plan = make()
        other, row["ms_flex_first"], row["note"] = _flex(mask, q, k, v) if flex else ({}, None, None)
        runs = {
            "ms": forward_backward(lambda q, k, v, plan=plan: sf.attention(q, k, v, plan), q, k, v, dout),
            "ms_sdpa": forward_backward(_sdpa(mask), q, k, v, dout),
            "ms_dense": forward_backward(_sdpa(None), q, k, v, dout),
            "ms_forward": forward(lambda q, k, v, plan=plan: sf.attention(q, k, v, plan), q, k, v),
            "ms_build": make,
            **other,
        }
        timings = interleave(
            runs,
            rounds=rounds,
            box=Box(box.left / (len(groups) - number)),
            on_run=lambda run, T=T, name=name: on_run(f"T = {T}, {name}, {run}"),
        )
        row |= {run: timing.median * 1e3 for run, timing in timings.items()}
        row |= {"ratio": row["ms_sdpa"] / row["ms"], "over_dense": row["ms"] / row["ms_dense"]}
        if other:
            row["ratio_flex"] = (row["ms_flex"] + row["ms_flex_build"]) / (
                row["ms_forward"] + row["ms_build"]
            )
            row["build_share"] = row["ms_build"] / row["ms_flex_build"]
            row["build_share_eager"] = row["ms_build"] / row["ms_flex_eager"]
        yield row | {"rounds": len(timings["ms"].times)}


def _builder(name: str, mask: Tensor) -> Callable[[], Plan] | None:
    if not name.endswith("reordered"):
        return lambda: Plan.from_mask(mask)
    return (lambda: Plan.from_mask(mask).reordered()) if find_spec("scipy") else None


def _sdpa(mask: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flex(
    mask: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Callable[[], Any]], float | None, str | None]:
    """FlexAttention, compiled, and its mask, and the milliseconds of its first mask.

    Where it does not compile: nothing, and why.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = len(mask)
    torch._dynamo.reset()
    compiled, attend = torch.compile(create_block_mask), torch.compile(flex_attention)

    def build(create: Callable[..., Any] = compiled) -> Any:
        return create(lambda b, h, q, k: mask[q, k], None, None, T, T, device="cpu")

    try:
        first = seconds(build) * 1e3
        block_mask = build()
        run = forward(lambda q, k, v: attend(q, k, v, block_mask=block_mask), q, k, v)
        seconds(run)
    except Exception as error:  # whatever its compiler raises
        return {}, None, f"FlexAttention: {str(error).strip().splitlines()[0]}"
    eager = functools.partial(build, create_block_mask)
    return {"ms_flex": run, "ms_flex_build": build, "ms_flex_eager": eager}, first, None

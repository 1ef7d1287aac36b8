"""MuSe on queries, keys and values of a trained model: error by clusters, and time beside exact attention.

`error` is `|near - exact|^2 / |exact|^2` over all heads, `error_mean` that of giving every query the mean
value of what it may see, which takes no clusters at all. Longer sequences are the capture, again and again
with a little noise: they are for times alone, and have no error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench import capture
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave

from ..claim.rows import Job

FORMS = ("monopole", "dipole", "causal tree")


def jobs(
    *,
    models: Sequence[str] = ("smollm2", "books"),
    clusters: Sequence[int] = (8, 16, 32, 64, 128),
    lengths: Sequence[int] = (4096, 8192, 16384),
    forms: Sequence[str] = FORMS,
    rounds: int = 3,
) -> list[Job]:
    """A row for each model, layer, length, form and number of clusters."""
    found = []
    for model in models:
        for layer in capture.load(model).layers:
            for T in lengths:
                for form in forms:
                    for C in clusters:
                        key = {"bench": "layers-clusters", "model": model, "layer": layer, "T": T}
                        key |= {"case": form, "clusters": C}
                        if T == 4096 or (C == 64 and form != "dipole"):
                            found.append(Job(key, partial(_run, key, rounds)))
    return found


def _run(key: Row, rounds: int) -> Row:
    x = capture.load(key["model"]).layer(key["layer"])
    q, k, v = (_long(y.float(), key["T"]) for y in (x.q, x.k, x.v))
    causal = key["case"] == "causal tree"
    memory: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    near = partial(
        sf.muse_attention, q, k, v, clusters=key["clusters"], causal=causal, dipole=key["case"] == "dipole",
        memory=memory, scale=x.scale,
    )  # fmt: skip
    exact = partial(sf.attention, q, k, v, causal=causal, scale=x.scale)
    with torch.no_grad():
        row = dict(_errors(near(), exact(), v, causal)) if key["T"] == x.q.shape[2] else {}
        found = interleave({"near": near, "exact": exact}, rounds=rounds, box=Box(60.0))
    row |= {"ms": found["near"].median * 1e3, "ms_exact": found["exact"].median * 1e3}
    return row | {"ratio": found["exact"].over(found["near"]), "rounds": rounds}


def _errors(near: Tensor, exact: Tensor, v: Tensor, causal: bool) -> Iterator[tuple[str, float]]:
    count = torch.arange(1, v.shape[2] + 1)[:, None]
    mean = v.cumsum(2) / count if causal else v.mean(2, keepdim=True)
    mean = mean.repeat_interleave(exact.shape[1] // v.shape[1], 1)
    size = exact.square().sum()
    yield "error", float((near - exact).square().sum() / size)
    yield "error_mean", float((mean - exact).square().sum() / size)


def _long(x: Tensor, T: int) -> Tensor:
    times = -(-T // x.shape[2])
    found = x.repeat(1, 1, times, 1)[:, :, :T]
    if times > 1:
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        found = found + 0.05 * noise * found.std()
    return found.contiguous()

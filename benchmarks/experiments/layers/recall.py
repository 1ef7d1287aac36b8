"""Associative recall by layers that learn what to attend to, beside a window and chance of as many pairs.

One convolution and one layer (three of the hybrid's) of eight heads of 8, without positions, on rows of
`mqar.Task`. `pairs` is the mean number of keys that a query of the trained model is multiplied with, over
heads; summaries count as keys.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.methods.base import Context, Method, Selection
from sparseflash.nn import Layer
from sparseflash.ops.attention import attention

from .. import mqar
from ..claim.rows import Job

WIDTH, HEADS = 64, 8


@dataclass(frozen=True)
class RandomKeys(Method):
    """Each query sees its own key and so many earlier ones, drawn once for every place."""

    count: int = 16
    seed: int = 0

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Draw; the same keys in every batch."""
        T = q.shape[2]
        drawn = torch.rand(1, k.shape[1], T, T, generator=torch.Generator().manual_seed(self.seed))
        at = torch.arange(T)
        drawn[..., at, at] = 2.0
        drawn = drawn.masked_fill(at > at[:, None], -1.0)
        keep = drawn >= drawn.topk(min(self.count, T), -1).values[..., -1:].clamp(min=0)
        return Selection(sf.Plan.from_mask(keep))


def one(name: str, **options: Any) -> Callable[[int], list[Layer]]:
    """A single layer by name."""
    return lambda seed: [sf.nn.get(name, WIDTH, HEADS, **options)]


def over(method: Callable[[int], Method | None]) -> Callable[[int], list[Layer]]:
    """A layer over a method."""
    return lambda seed: [sf.nn.SelfAttention(WIDTH, HEADS, method=method(seed), positions="none")]


def hybrid(share: float) -> Callable[[int], list[Layer]]:
    """Three layers of the hybrid, of which a share is dense; the others see the first and the last 3 keys."""
    near = sf.methods.SinkWindow(window=3, sink_tokens=1)
    own = {"layers": 3, "share": share, "sparse": near, "positions": "none"}
    return lambda seed: [sf.nn.LongGenAttention(WIDTH, HEADS, layer=n, **own) for n in range(3)]


@torch.no_grad()
def lean(layer: sf.nn.SeqBoat, bias: float) -> None:
    """Let the router begin on one side: above 0 tokens tend to be active."""
    layer.route.bias.copy_(torch.tensor([-bias, bias]))


def boat(bias: float) -> Callable[[int], list[Layer]]:
    """SeqBoat whose router leans to one side at the start; it learns as all else does."""

    def make(seed: int) -> list[Layer]:
        layer = sf.nn.SeqBoat(WIDTH, 1, window=mqar.Task().length, positions="none")
        lean(layer, bias)
        return [layer]

    return make


@dataclass(frozen=True)
class Case:
    """Layers, and what they have to reach: at least, or at most, so much."""

    make: Callable[[int], list[Layer]]
    least: float = 0.0
    most: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "dense": Case(over(lambda seed: None), least=0.99),
    "sparsek, k = 16": Case(one("sparsek-attention", k=16, window=1, positions="none"), least=0.99),
    "dynamic mask of 16": Case(one("dynamic-mask-attention", window=16, positions="none"), least=0.99),
    "window of 20": Case(over(lambda seed: sf.methods.Window(20)), most=0.7),
    "window of 16": Case(over(lambda seed: sf.methods.Window(16)), most=0.7),
    "random 20": Case(over(lambda seed: RandomKeys(20, seed))),
    "random 16": Case(over(lambda seed: RandomKeys(16, seed))),
    "combiner, segments of 8": Case(one("combiner", segment=8, positions="none")),
    "window of 8": Case(over(lambda seed: sf.methods.Window(8)), most=0.7),
    "routing, 4 clusters": Case(one("routing-attention", clusters=4, window=64, positions="none", decay=0.9)),
    "hash, 4 buckets": Case(over(lambda seed: sf.methods.HashSparse(nb=4, seed=seed))),
    "native sparse": Case(
        one(
            "native-sparse-attention",
            block=8,
            stride=4,
            select=4,
            top=2,
            first=0,
            near=1,
            window=4,
            positions="none",
        )
    ),
    "lookups": Case(one("lookups", lookups=8, penalty=0.1, positions="none"), least=0.99),
    "hybrid, 1 of 3 dense": Case(hybrid(1 / 3), least=0.99),
    "hybrid, none dense": Case(hybrid(0.0), most=0.7),
    "seqboat, all active": Case(boat(4.0)),
    "seqboat": Case(boat(0.0)),
    "seqboat, few active": Case(boat(-0.5)),
}


@contextlib.contextmanager
def counted() -> Iterator[list[float]]:
    """Collect the pairs of every attention inside, summed over queries and averaged over heads."""
    found: list[float] = []

    def count(q: Tensor, k: Tensor, v: Tensor, plan: Any = None, **options: Any) -> Any:
        own = plan
        if own is None:
            causal, past = options.get("causal", False), options.get("q_offset", 0)
            own = sf.Plan.dense(q.shape[2], k.shape[2], causal=causal, q_offset=past)
        keep = own.to_dense()
        found.append(float(keep.sum()) * len(q) / (keep.shape[0] * keep.shape[1]))
        return attention(q, k, v, plan, **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Method.attend, "__defaults__", (count,)))
        for name, module in list(sys.modules.items()):
            if name.startswith("sparseflash.") and vars(module).get("attention") is attention:
                stack.enter_context(mock.patch.object(module, "attention", count))
        yield found


@torch.no_grad()
def look(model: mqar.Model, task: mqar.Task) -> Row:
    """What a trained model spends: pairs a query and layer, and the share of tokens that ask."""
    tokens, labels = task.rows(32, torch.Generator().manual_seed(2), test=True)
    layers = [mixer.layer for mixer in model.layers if isinstance(mixer, mqar.Mix)]
    with counted() as found:
        model.eval()(tokens)
    row: Row = {"pairs": sum(found) / tokens.numel() / len(layers)}
    for layer in layers:
        share = getattr(layer, "awake", getattr(layer, "kept", None))
        if isinstance(share, Tensor):
            row["active"] = float(share)
    return row


def jobs(
    *,
    cases: Sequence[str],
    rates: Sequence[float] = (1e-2,),
    seeds: Sequence[int] = (0, 1),
    steps: int = 400,
) -> list[Job]:
    """A row for each case, rate and seed."""
    keys = [
        {"bench": "layers-recall", "case": case, "lr": rate, "seed": seed, "steps_at_most": steps}
        for case in cases
        for rate in rates
        for seed in seeds
    ]
    return [Job(key, partial(_run, key)) for key in keys]


def _run(key: Row) -> Row:
    task = mqar.Task()
    model, found, taken = mqar.train(
        lambda context: CASES[key["case"]].make(key["seed"]),
        task=task,
        rate=key["lr"],
        steps=key["steps_at_most"],
        seed=key["seed"],
        width=WIDTH,
        heads=HEADS,
    )
    row: Row = {"accuracy": found, "steps": taken, **look(model, task)}
    return row | {"T": task.length, "parameters": sum(p.numel() for p in model.parameters())}


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against the promises: the best rate of each seed counts."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        own = (row["case"], str(row["seed"]))
        best[own] = max(best.get(own, 0.0), float(row["accuracy"]))
    wrong = []
    for (case, seed), found in best.items():
        least, most = (CASES[case].least, CASES[case].most) if case in CASES else (0.0, 1.0)
        if found < least:
            wrong.append(f"{case}, seed {seed}: {found:.1%}, promised at least {least:.0%}")
        if found > most:
            wrong.append(f"{case}, seed {seed}: {found:.1%}, and should stay below {most:.0%}")
    return wrong

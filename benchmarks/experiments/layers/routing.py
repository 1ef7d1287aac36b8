"""Routing: how much of dense attention's mass lies inside clusters learned online, and inside chance.

Chance is the learned labels in another order, so clusters are as large and as many pairs are seen.
`planted` has tokens around as many centres as there are clusters; `bytes` is a small language model, a
layer of local heads and one that routes, after 200 steps. Recall is of the layer's own queries and keys;
`_anew` are clusters that k-means finds in the end, whatever was learned online.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.nn import RoutingAttention
from sparseflash.train import Corpus, TrainConfig, Trainer

from ..claim.rows import Job

CLUSTERS, STEPS = 8, 200


def jobs(corpus: Corpus, *, seeds: Sequence[int], cases: Sequence[str] = ("planted", "bytes")) -> list[Job]:
    """A row for each case and seed."""
    run = {"planted": _planted, "bytes": partial(_bytes, corpus)}
    keys = [
        {"bench": "layers-routing", "case": case, "seed": seed, "clusters": CLUSTERS, "updates": STEPS}
        for case in cases
        for seed in seeds
    ]
    return [Job(key, partial(run[key["case"]], key["seed"])) for key in keys]


def _planted(seed: int, width: int = 64, T: int = 2048) -> Row:
    torch.manual_seed(seed)
    layer = RoutingAttention(width, 4, clusters=CLUSTERS, window=T, positions="none", decay=0.95)
    centre = 2 * torch.randn(CLUSTERS, width)

    def draw() -> Tensor:
        return centre[torch.randint(CLUSTERS, (1, T))] + torch.randn(1, T, width)

    for _ in range(STEPS):
        layer(draw()[:, :256])
        layer.update()
    return dict(_recall(layer, draw(), seed))


def _bytes(corpus: Corpus, seed: int) -> Row:
    config = TrainConfig(
        data="", length=512, batch=4, layers=2, width=128, heads=4, steps=STEPS, seed=seed,
        attention="window,routing-attention",
        options={"window.window": 64, "clusters": CLUSTERS, "routing-attention.window": 512, "decay": 0.95},
    )  # fmt: skip
    trainer = Trainer(config, corpus)
    found: list[Tensor] = []
    layer = trainer.model.layers()[1]
    assert isinstance(layer, RoutingAttention)
    handle = layer.register_forward_pre_hook(lambda module, given: found.append(given[0].detach()))
    trainer.validate(512)
    layer.start(torch.cat(found))  # from random centroids all tokens end in one cluster
    handle.remove()
    for _ in range(STEPS):
        trainer.step()
    found.clear()
    handle = layer.register_forward_pre_hook(lambda module, given: found.append(given[0].detach()))
    bits = trainer.validate(512)
    handle.remove()
    x = torch.cat(found)
    row: Row = {"bpb": bits, "data": corpus.name.split("/")[-1]} | dict(_recall(layer, x, seed))
    layer.start(x)
    return row | {f"{name}_anew": value for name, value in _recall(layer, x, seed)}


@torch.no_grad()
def _recall(layer: RoutingAttention, x: Tensor, seed: int) -> Iterator[tuple[str, float]]:
    q, k = layer.routed(x)
    labels = layer.labels(x)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
    q, k = layer.turn(q, None), layer.turn(k, None)
    T, found = x.shape[1], []
    for own in (labels, tuple(label[..., order] for label in labels)):
        plan = sf.Plan.from_buckets(*own, window=(layer.window - 1, 0), buckets=layer.clusters)
        found.append(float(sf.recall(q, k, plan, dense=sf.Plan.dense(T, T, causal=True)).mean()))
    yield from (("recall", found[0]), ("recall_chance", found[1]), ("ratio", found[0] / found[1]))
    yield "kept", plan.kept

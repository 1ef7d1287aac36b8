"""Small language models of every kind of layer at about equal pairs: bits per byte, near and far.

Two layers of width 128, a gated convolution and the layer under test, learn the same bytes in the same order
(in a few hundred steps attention alone stays behind the convolution). `far` is the bits of those bytes alone
whose last six stood before with the same byte next, more than 512 bytes back and not nearer: what only a far
look can know. `pairs` is the mean number of keys that a query is multiplied with, `active` the share of
tokens that attend at all. What share of the gap between convolution and dense attention look-ups close is
Zoology's figure. The text is that of Transformers' modelling files, which repeat themselves far apart; on
Python's own library attention has learnt nothing that a convolution does not know at this budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.methods.base import Method
from sparseflash.train import Corpus, TrainConfig, Trainer
from sparseflash.train.attention import Sparse
from sparseflash.train.model import SelfAttention

from ..claim.rows import Job, mean, numbers
from ..claim.texts import far, modelling
from .recall import RandomKeys, counted, lean

LENGTH, BATCH, CONTEXT = 2048, 2, 6


@dataclass(frozen=True)
class Case:
    """A mixer by name with its options, or the method that takes the place of dense attention.

    `lean`: how far a router that chooses active tokens leans to them at the start.
    """

    attention: str = "dense"
    options: Mapping[str, Any] = field(default_factory=dict)
    method: Callable[[int], Method] | None = None
    objective: str = "next"
    lean: float = 0.0


CASES = {
    "dense": Case(),
    "convolution": Case("gated-convolution"),
    "look-ups": Case("lookups", {"lookups": LENGTH // 4, "penalty": 0.01}),
    "window of 128": Case("window", {"window": 128}),
    "random 128": Case(method=lambda seed: RandomKeys(128, seed)),
    "hash, 8 buckets": Case("hash-sparse", {"nb": 8}),
    "hash, 32 buckets beside a window of 96": Case("hash-sparse", {"nb": 32, "window": 96}),
    "routing, 16 clusters": Case("routing-attention", {"clusters": 16, "window": 128}),
    "sparsek, k = 64": Case("sparsek-attention", {"k": 64, "window": 32}),
    "native sparse": Case(
        "native-sparse-attention",
        {"block": 32, "stride": 16, "select": 32, "top": 2, "first": 0, "near": 1, "window": 32},
    ),
    "moba": Case("moba", {"page": 64, "budget": 128}),
    "combiner, segments of 64": Case("combiner", {"segment": 64}),
    "dynamic mask of 128": Case("dynamic-mask-attention", {"window": 128}),
    "seqboat": Case("seqboat", {"window": 256}),
    "seqboat, all active": Case("seqboat", {"window": 256}, lean=4.0),
    "dense, both ways": Case(objective="masked"),
    "combiner, both ways": Case("combiner", {"segment": 64}, objective="masked"),
    "window, both ways": Case("window", {"window": 128}, objective="masked"),
}


def repetitive() -> Corpus:
    """The modelling files of the installed Transformers, the last twentieth of each held out."""
    return Corpus([path.read_bytes() for path in modelling().values()], "modelling files of Transformers")


def jobs(corpus: Corpus, *, cases: Sequence[str], seeds: Sequence[int], steps: int = 600) -> list[Job]:
    """A row for each case and seed."""
    data = corpus.name.split("/")[-1]
    keys = [
        {"bench": "layers-language", "data": data, "case": case, "seed": seed, "steps": steps, "T": LENGTH}
        for seed in seeds
        for case in cases
    ]
    return [Job(key, partial(_run, key, corpus)) for key in keys]


def trainer_of(case: Case, corpus: Corpus, base: TrainConfig) -> Trainer:
    """A trainer of the case."""
    names = case.attention if case.objective == "masked" else f"gated-convolution,{case.attention}"
    config = replace(base, attention=names, options=dict(case.options), objective=case.objective)
    trainer = Trainer(config, corpus)
    if case.method is not None:
        layer = trainer.model.blocks[-1].attention
        assert isinstance(layer, SelfAttention)
        layer.attention = Sparse(case.method(config.seed), {})
    if isinstance(boat := trainer.model.layers()[-1], sf.nn.SeqBoat):
        lean(boat, case.lean)
    return trainer


def config(key: Row) -> TrainConfig:
    """The setting that all cases of a row's task share."""
    return TrainConfig(
        data="", length=key["T"], batch=BATCH, layers=2, width=128, heads=4, lr=4e-3, steps=key["steps"],
        seed=key["seed"], eval_sequences=16,
    )  # fmt: skip


def _run(key: Row, corpus: Corpus) -> Row:
    case = CASES[key["case"]]
    trainer = trainer_of(case, corpus, config(key))
    begin = time.perf_counter()
    for _ in range(key["steps"]):
        trainer.step()
    row: Row = {"ms_step": (time.perf_counter() - begin) * 1e3 / key["steps"], "bpb": trainer.validate()}
    if case.objective == "next":
        row |= judged(trainer)
    return row | {"parameters": sum(p.numel() for p in trainer.model.parameters())}


def judged(trainer: Trainer) -> Row:
    """Bits of the far slice of held-out text, beside what it cost (`looked`)."""
    found: list[Tensor] = []

    def note(tokens: Tensor, targets: Tensor, logits: Tensor) -> None:
        bits = F.cross_entropy(logits, targets, reduction="none") / math.log(2)
        found.append(bits[far(torch.cat([tokens, targets[-1:]]), context=CONTEXT)])

    spent = looked(trainer, note)
    bits = torch.cat(found)
    return {"far": float(bits.mean()), "far_bytes": len(bits)} | spent


@torch.no_grad()
def looked(trainer: Trainer, note: Callable[[Tensor, Tensor, Tensor], None]) -> Row:
    """Call note(tokens [T], targets [T], logits [T, 256]) for each held-out window; what that cost.

    `pairs`: keys that a query is multiplied with; `active`: share of tokens that the last layer let attend,
    if it chooses.
    """
    model, windows = trainer.model.eval(), trainer.config.eval_sequences
    with counted() as pairs:
        for tokens, targets in trainer.corpus.validation(trainer.config.length, windows):
            note(tokens[0], targets[0], model(tokens)[0])
    model.train()
    row: Row = {"pairs": sum(pairs) / windows / tokens.numel()} if pairs else {}
    layer = model.layers()[-1]
    share = getattr(layer, "awake", getattr(layer, "kept", None))
    return row | ({"active": float(share)} if isinstance(share, Tensor) else {})


def closed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of the gap between convolution and dense attention look-ups close, overall and far."""
    said = []
    for column, name in (("bpb", "overall"), ("far", "far")):
        conv, near, whole = (
            mean(numbers([row for row in rows if row["case"] == case], column))
            for case in ("convolution", "look-ups", "dense")
        )
        if conv > whole:
            share = (conv - near) / (conv - whole)
            said.append(f"look-ups close {share:.0%} of the gap between convolution and dense, {name}")
    return said

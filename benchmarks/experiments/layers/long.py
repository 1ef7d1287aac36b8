"""Language models of 16k tokens, trained from the first step with MuSe's summaries or exact attention.

The loss is the mean over the last tenth of the steps; every case sees the same bytes in the same order.
`ms_attention` is the attention of one layer alone, forward and backward, on what the trained model computes.
Bits per byte are judged with the attention that was trained, and `bpb_exact` with exact attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.train import Corpus, TrainConfig, Trainer
from sparseflash.train.attention import dense
from sparseflash.train.model import SelfAttention

from ..claim.rows import Job, mean

LENGTH = 16384
Attend = Callable[..., Tensor]


def muse(clusters: int) -> Callable[[], Attend]:
    """Attention by summaries, with the centroids of the last step; one for each layer."""

    def make() -> Attend:
        memory: dict[Any, Any] = {}

        def attend(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
            return sf.muse_attention(q, k, v, clusters=clusters, causal=True, memory=memory)

        return attend

    return make


def over(plan: Callable[[int], sf.Plan]) -> Callable[[], Attend]:
    """Exact attention over one plan."""

    def make() -> Attend:
        known: dict[int, sf.Plan] = {}

        def attend(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
            T = q.shape[2]
            known[T] = known.get(T) or plan(T)
            return sf.attention(q, k, v, known[T])

        return attend

    return make


CASES: dict[str, Callable[[], Attend]] = {
    "dense, SDPA": lambda: dense,
    "dense": over(lambda T: sf.Plan.dense(T, T, causal=True)),
    "window of 1024": over(lambda T: sf.Plan.dense(T, T, causal=True, window=(1023, 0))),
    "muse, 64 clusters": muse(64),
}


def jobs(corpus: Corpus, *, cases: Sequence[str], steps: int = 200, length: int = LENGTH) -> list[Job]:
    """A row for each case."""
    keys = [{"bench": "layers-long", "case": case, "T": length, "steps": steps} for case in cases]
    return [Job(key, partial(_run, key, corpus)) for key in keys]


def exchange(trainer: Trainer, make: Callable[[], Attend]) -> list[Attend]:
    """Give every layer an attention of its own; those that it had."""
    before = []
    for block in trainer.model.blocks:
        assert isinstance(block.attention, SelfAttention)
        before.append(block.attention.attention)
        block.attention.attention = make()
    return before


def _run(key: Row, corpus: Corpus) -> Row:
    config = TrainConfig(
        data="", length=key["T"], batch=1, layers=2, width=128, heads=2, lr=4e-3, steps=key["steps"],
        eval_sequences=2,
    )  # fmt: skip
    trainer = Trainer(config, corpus)
    exchange(trainer, CASES[key["case"]])
    losses, begin = [], time.perf_counter()
    for _ in range(config.steps):
        losses.append(trainer.step().loss)
    row: Row = {"ms_step": (time.perf_counter() - begin) * 1e3 / config.steps}
    row |= {"loss": mean(losses[-max(1, config.steps // 10) :]), "bpb": trainer.validate()}
    row["ms_attention"] = _alone(trainer)
    exchange(trainer, CASES["dense"])
    return row | {"bpb_exact": trainer.validate(), "data": corpus.name.split("/")[-1]}


def _alone(trainer: Trainer, rounds: int = 3) -> float:
    """Median milliseconds of the first layer's attention, forward and backward."""
    taken: list[Tensor] = []
    layer = trainer.model.blocks[0].attention
    assert isinstance(layer, SelfAttention)
    attend = layer.attention

    def note(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        taken[:] = [x.detach().requires_grad_() for x in (q, k, v)]
        return attend(q, k, v, **more)

    layer.attention = note
    tokens, _ = next(trainer.corpus.validation(trainer.config.length, 1))
    with torch.no_grad():
        trainer.model(tokens)
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        torch.autograd.grad(attend(*taken).sum(), taken)
        seconds.append(time.perf_counter() - begin)
    layer.attention = attend
    return sorted(seconds[1:])[rounds // 2] * 1e3

"""Whether speed costs quality: the 122M model under three attentions, on the same batches of a text.

Dense, the last 128 keys with the hash's bucket behind them, and the same with buckets drawn at random. The
text is a file that is carried along (--text), as bytes: what is compared is what a held-out byte costs, over
all, and over those that can be read off far away and nowhere near.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.experiments.claim.controls import Chance
from benchmarks.experiments.claim.texts import FAR, far
from sparseflash.bench.results import Row
from sparseflash.methods import HashSparse
from sparseflash.train.attention import Attention, Sparse

from . import rivals, training
from .device import DRY
from .task import Task

T, BATCH, STEPS, EVERY = (64, 1, 4, 2) if DRY else (8192, 4, 500, 100)
SEQUENCES = 2 if DRY else 8
CONTEXT = 6
"""Bytes before a position that have to have stood before, for it to be read off there."""
WINDOW, BUCKETS = (8, 2) if DRY else (128, 16)
CASES = {
    "dense": None,
    f"window {WINDOW} + hash": HashSparse(nb=BUCKETS, window=WINDOW, resample=True),
    f"window {WINDOW} + random": Chance(nb=BUCKETS, window=WINDOW, resample=True),
}


def quality() -> list[Task]:
    """A task for each attention; its rows are those of one training run."""
    about: Row = {"T": T, "batch": BATCH, "text": Path(os.environ.get("SPARSEFLASH_TEXT", "library")).name}
    return [Task({"case": name} | about, functools.partial(_run, name)) for name in CASES]


def _attention(name: str, context: dict[str, int]) -> list[Attention]:
    method = CASES[name]
    if method is None:
        return [next(iter(rivals.dense().values()))] * training.LAYERS
    return [Sparse(dataclasses.replace(method, seed=n), context) for n in range(training.LAYERS)]


def _run(name: str) -> Iterator[Row]:
    context = {"step": 0}
    run = training.Training(T, BATCH, _attention(name, context), context, warm=STEPS // 10)
    times: list[float] = []
    for step in range(STEPS):
        ms, loss = run.step(step)
        times.append(ms)
        if (step + 1) % EVERY == 0:
            every, away, count = _judged(run)
            yield {
                "step": step + 1, "ms": statistics.median(times), "loss": loss,
                "bits_per_byte": every, "far_bits_per_byte": away, "far_bytes": count,
                "letters": run.corpus.letters(),
            }  # fmt: skip


def _judged(run: training.Training) -> tuple[float, float | None, int]:
    """Bits that a held-out byte costs, over all and over those that are far; how many these are."""
    every, away = [], []
    for tokens, targets in run.corpus.validation(T, SEQUENCES):
        lost = run.losses(tokens, targets)[0] / math.log(2)
        whole = torch.cat([tokens[0], targets[0, -1:]])
        every.append(lost)
        away.append(lost[far(whole, behind=min(FAR, T // 16), context=CONTEXT)])
    lost, slice_ = torch.cat(every), torch.cat(away)
    return float(lost.mean()), float(slice_.mean()) if len(slice_) else None, len(slice_)

"""Language models trained on short sequences and judged on longer ones: bits per byte at each length.

A small GPT of one kind of layer, trained on 512 bytes. Beside rotary dense attention, which knows no
positions beyond those of training, stick-breaking has none, and lightning attention has a state of one size.
The text that is judged is the same at every length, cut into sequences. `streamed` is how the longer ones
were read: in parts of 512 with a state, or at once. `apart` is how far the logits of both ways are apart on
the longest, over the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError
from sparseflash.train import Corpus, TrainConfig, Trainer

from ..claim.rows import Job

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, rotary": ("dense", {}),
    "stick-breaking": ("stick-breaking-attention", {}),
    "lightning": ("lightning-attention", {}),
    "dense, no positions": ("self-attention", {"positions": "none", "normed": True}),
    "window of 128, rotary": ("window", {"window": 128}),
}


def jobs(
    corpus: Corpus,
    *,
    cases: Sequence[str],
    seeds: Sequence[int],
    steps: int = 400,
    length: int = 512,
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192),
) -> list[Job]:
    """A row for each case and seed, with the bits at every length."""
    base = TrainConfig(
        data="", length=length, batch=8, layers=2, width=128, heads=4, lr=4e-3, steps=steps, eval_sequences=8
    )
    keys = [
        {"bench": "layers-extrapolation", "case": case, "seed": seed, "steps": steps, "T": length}
        for case in cases
        for seed in seeds
    ]
    return [Job(key, partial(_run, key, base, corpus, lengths)) for key in keys]


def _run(key: Row, base: TrainConfig, corpus: Corpus, lengths: Sequence[int]) -> Row:
    name, options = CASES[key["case"]]
    trainer = Trainer(replace(base, attention=name, options=options, seed=key["seed"]), corpus)
    for _ in range(base.steps):
        row = trainer.step()
    found: Row = {"loss": row.loss, "data": corpus.name.split("/")[-1], "streamed": trainer.model.decodes}
    windows = list(trainer.corpus.validation(max(lengths), base.eval_sequences))
    if (held := windows[0][0].shape[1]) < max(lengths):
        raise SparseFlashError(
            f"{corpus.name}: {held} held-out bytes; expected {max(lengths)}, give more text"
        )
    found |= {f"bpb_{length}": _bits(trainer, windows, length) for length in lengths}
    found["apart"] = _apart(trainer, max(lengths))
    return found | {"parameters": sum(p.numel() for p in trainer.model.parameters())}


@torch.no_grad()
def _bits(trainer: Trainer, windows: Sequence[tuple[Tensor, Tensor]], length: int) -> float:
    """Bits per byte of the windows, cut into sequences of `length` that know nothing of each other."""
    model, nats, count = trainer.model.eval(), 0.0, 0
    part = trainer.config.length if model.decodes else length
    for tokens, targets in windows:
        rows, wanted = tokens.view(-1, length), targets.view(-1, length)
        state = model.new_state(len(rows)) if part < length else None
        for some, next_ones in zip(rows.split(part, 1), wanted.split(part, 1), strict=True):
            nats += float(model(some, next_ones, state=state)) * some.numel()
            count += some.numel()
    return nats / count / math.log(2)


@torch.no_grad()
def _apart(trainer: Trainer, length: int) -> float:
    model, part = trainer.model.eval(), trainer.config.length
    tokens, _ = next(iter(trainer.corpus.validation(length, 1)))
    whole, state = model(tokens), model.new_state(1)
    parts = torch.cat([model(some, state=state) for some in tokens.split(part, 1)], 1)
    return float((whole - parts).abs().max() / whole.abs().max())


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against it: at four times its length within 3 %, and rotary positions lose more."""
    wrong = []
    rise = {
        (row["case"], str(row["seed"])): float(row["bpb_2048"]) / float(row["bpb_512"]) - 1 for row in rows
    }
    for (case, seed), own in rise.items():
        if case != "stick-breaking":
            continue
        if own > 0.03:
            wrong.append(f"stick-breaking, seed {seed}: {own:+.1%} bits at four times its length")
        rotary = rise.get(("dense, rotary", seed))
        if rotary is not None and rotary <= own:
            wrong.append(f"seed {seed}: rotary positions lose {rotary:+.1%}, stick-breaking {own:+.1%}")
    return wrong

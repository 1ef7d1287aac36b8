"""LongGen: a model of short sequences goes on with longer ones, in full or as a hybrid, at equal tokens.

Three layers of width 128 learn 512 bytes at a time; then the same weights go on at 4,096, with the rotary
base raised (`train --init`): all layers dense, the middle third alone, or none. A sparse layer sees the
first keys and a window. `short` is the model before it went on, judged at both lengths. `cache` is the bytes
of keys and values at the end of a sequence over those of dense layers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

from sparseflash.bench.results import Row
from sparseflash.train import Corpus, TrainConfig, Trainer
from sparseflash.train.trainer import init_config

from ..claim.rows import Job
from .language import judged

SHORT, LONG, WINDOW, SINKS = 512, 4096, 256, 16
CASES = {
    "short": "",
    "full": "dense",
    "hybrid": "sink-window,dense,sink-window",
    "none dense": "sink-window",
}
"""Attention of the three layers of each case, as `--attention` has it."""


def jobs(corpus: Corpus, *, cases: Sequence[str], seeds: Sequence[int], steps: int = 300) -> list[Job]:
    """A row for each case and seed; twice as many steps before as behind."""
    data = corpus.name.split("/")[-1]
    keys = [
        {"bench": "layers-longer", "data": data, "case": case, "seed": seed, "steps": steps, "T": LONG}
        for seed in seeds
        for case in cases
    ]
    short = lru_cache(maxsize=1)(partial(_short, corpus, 2 * steps))
    return [Job(key, partial(_run, key, corpus, short)) for key in keys]


class _Run:
    """A run in a directory that goes when the run does."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.place = trainer, tempfile.TemporaryDirectory()
        trainer.save(Path(self.place.name))


def _short(corpus: Corpus, steps: int, seed: int) -> _Run:
    config = TrainConfig(
        data="", length=SHORT, batch=LONG // SHORT, layers=3, width=128, heads=4, lr=4e-3, steps=steps,
        seed=seed, eval_sequences=16,
    )  # fmt: skip
    trainer = Trainer(config, corpus)
    for _ in range(steps):
        trainer.step()
    return _Run(trainer)


def _run(key: Row, corpus: Corpus, short: Callable[[int], _Run]) -> Row:
    before = short(key["seed"])
    attention = CASES[key["case"]]
    if not attention:
        return {"bpb": before.trainer.validate(LONG), "bpb_short": before.trainer.validate(SHORT), "cache": 1}
    options = {} if attention == "dense" else {"window": WINDOW, "sink_tokens": SINKS}
    given = {"length": LONG, "batch": 1, "attention": attention, "options": options, "lr": 2e-3}
    more = {"steps": key["steps"], "seed": key["seed"], "eval_sequences": 16}
    trainer = Trainer(init_config(before.place.name, given | more), corpus)
    trainer.begin(before.place.name)
    begin = time.perf_counter()
    for _ in range(key["steps"]):
        trainer.step()
    row: Row = {"ms_step": (time.perf_counter() - begin) * 1e3 / key["steps"], "bpb": trainer.validate()}
    names = trainer.config.attention.split(",")
    kept = [1.0 if name == "dense" else (WINDOW + SINKS) / LONG for name in names]
    row |= {"bpb_short": trainer.validate(SHORT), "cache": sum(kept) / len(kept)}
    return row | {"far": judged(trainer)["far"], "base": trainer.config.rope_base}

"""The paper's own pairing: pure hash-sparse attention, tied and strict, planes drawn anew, beside tied dense.

With few heads and with many, buckets of 512 tokens: whether the number of heads explains that the paper finds
both equal. The text is Wikipedia's XML, as in enwik8, of the shortened dump that gensim ships with its tests.
Dense attention and the window see the token itself too, which a strict bucket does not.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods import HashSparse
from sparseflash.train import Corpus, TrainConfig, Trainer, log

from .. import long_run
from .controls import Chance
from .rows import Job

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
BUCKET = 512
HASH = {"resample": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("window", {"window": 2**30}),  # by our kernels
    "hash": ("hash-sparse", HASH),
    "hash, window 128": ("hash-sparse", HASH | {"window": 128}),
    "random buckets": ("hash-sparse", HASH),
    "random buckets, window 128": ("hash-sparse", HASH | {"window": 128}),
    "window 512": ("window", {"window": 512}),
    "reformer": ("reformer", {"bucket": 256}),
}
"""Reformer sees its chunk and the one before: as many keys as a bucket has, at most."""
SHAPES = {8: {"layers": 2, "heads": 4, "width": 128}, 64: {"layers": 4, "heads": 16, "width": 256}}
"""By the number of heads in all."""


def wikipedia() -> Corpus:
    """Six megabytes of articles in XML."""
    spec = importlib.util.find_spec("gensim")
    file = Path(spec.origin).parent / DUMP if spec and spec.origin else None
    if file is None or not file.is_file():
        raise SparseFlashError("the XML is that of gensim's tests: pip install --no-deps gensim==4.4.0")
    return Corpus([bz2.decompress(file.read_bytes())], "wikipedia")


@dataclasses.dataclass(frozen=True)
class Pair(long_run.Run):
    """One model to train."""

    def trainer(self, corpus: Corpus) -> Trainer:
        """Make the model and its optimiser; chance takes the place of the hash where it is asked for."""
        trainer = Trainer(self.config, corpus)
        if self.case.startswith("random"):
            for block in trainer.model.blocks:
                sparse = block.attention.attention
                own = {x.name: getattr(sparse.method, x.name) for x in dataclasses.fields(HashSparse)}
                block.attention.attention = dataclasses.replace(sparse, method=Chance(**own))
        return trainer


def jobs(
    corpus: Corpus,
    *,
    runs: Path,
    heads: Sequence[int] = tuple(SHAPES),
    cases: Sequence[str] = tuple(CASES),
    seeds: Sequence[int] = (0,),
    steps: int = 1500,
    length: int = 4096,
    tokens: int = long_run.TOKENS,
    rate: float = 4e-3,
    judged: int = 32,
    on_step: Callable[[str], None] = lambda text: None,
) -> list[Job]:
    """A row for every number of heads, contender and seed: bits per byte held out after all steps."""

    def run(total: int, case: str, seed: int) -> Row:
        slug, options = CASES[case]
        own = options | ({"nb": max(2, length // BUCKET)} if slug == "hash-sparse" else {})
        config = TrainConfig(
            "", slug, own, length=length, batch=max(1, tokens // length), steps=steps, lr=rate, seed=seed,
            qk="tied", dtype="bf16", eval_every=max(1, steps // 5), eval_sequences=judged, save_every=200,
            **SHAPES[total],
        )  # fmt: skip
        name = f"{corpus.name} {total} heads {case}"

        def said(row: log.Row) -> None:
            on_step(f"{name}: step {row.step} of {steps}, loss {row.loss:.3f}")

        logged = long_run.train(Pair(case, config), corpus, runs / f"{corpus.name}-{total}-{length}", said)
        last = [row.val_bpb for row in logged if row.val_bpb is not None]
        return {
            "bpb": last[-1], "layers": config.layers, "width": config.width, "lr": rate,
            "ms_per_step": sorted(row.ms_per_step for row in logged)[len(logged) // 2],
        }  # fmt: skip

    same: Row = {"bench": "claim-pairing", "text": corpus.name, "T": length, "steps": steps}
    return [
        Job(
            same | {"heads": total, "case": case, "seed": seed},
            functools.partial(run, total, case, seed),
        )
        for seed in seeds
        for total in heads
        for case in cases
    ]


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far hashing is behind dense attention at each number of heads, and chance beside it."""
    said = []
    for heads in dict.fromkeys(str(row["heads"]) for row in rows):
        of = {x["case"]: float(x["bpb"]) for x in reversed(rows) if str(x["heads"]) == heads}
        if {"dense", "hash", "random buckets"} <= of.keys():
            hashed, chance = (of[x] / of["dense"] - 1 for x in ("hash", "random buckets"))
            said.append(f"{heads} heads: hash {hashed:+.1%} over dense, random buckets {chance:+.1%}")
    return said

"""Give a trained model an indexer, train it, and see how much of the attention it finds.

    python examples/learned_indexer.py RUN [--data TEXT] [--out rows.csv]

RUN is the `--out` of any `sparseflash train`, such as benchmarks/models/dense-0. As in DeepSeek-V3.2, its
indexers first learn from dense attention while nothing else moves (warm-up); then all learn together while
attention reads only what the indexers chose (sparse stage). Recall is the share of dense attention on the
chosen keys, of queries that have to choose. Beside the indexer stand random keys and the last keys before
the query, as many. All of it on text that was held out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.bench.results import Row, write
from sparseflash.train import Corpus
from sparseflash.train.data import load, stdlib
from sparseflash.train.model import GPT, norm, rotate
from sparseflash.train.sampling import load_model

HEADS = 4
"""Of an indexer; their dimension is that of the model's heads."""
RATE = 4e-3
"""Learning rate of the indexers."""
SLOWER = 20
"""Times as slow as they moves the model, which is trained already."""
CHOICES = ("indexer", "random", "last")


class Indexer(nn.Module):
    """An attention `(q, k, v) -> out` that reads `keys`: all of them ("dense"), or `topk` of each query."""

    def __init__(self, width: int, dim: int, topk: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, HEADS * dim, bias=False), nn.Linear(width, dim, bias=False)
        self.weights = nn.Linear(width, HEADS, bias=False)
        self.topk, self.keys = topk, "dense"

    def look(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """See what the layer sees, before it runs; no gradient goes back, so language does not train this."""
        x, table = inputs[0].detach(), inputs[1]
        q = norm(rotate(self.q(x).unflatten(-1, (HEADS, -1)), table)).transpose(1, 2)
        k = norm(rotate(self.k(x)[:, :, None], table)).squeeze(2)
        self.scorer = q, k, self.weights(x).transpose(1, 2)

    def choose(self, keys: str) -> Tensor:
        """The keys of each query, [B, T, topk]."""
        if keys == "last":
            B, T, _ = self.scorer[1].shape
            last = torch.arange(T)[:, None] - torch.arange(self.topk)
            return last.clamp(min=-1).expand(B, -1, -1)
        noise = (norm(torch.randn_like(x)) for x in self.scorer)
        return sf.indexer_topk(*(self.scorer if keys == "indexer" else noise), self.topk)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; keep the indexer's `loss` in training, else the `recall` of each choice."""
        T, chosen = k.shape[2], None
        if self.keys == "dense":
            plan = sf.Plan.dense(T, T, causal=True)
        else:
            chosen = self.choose(self.keys)
            plan = sf.Plan.from_choice(chosen, Tk=T, unique=True)
        out, lse = sf.attention(q, k, v, plan, return_lse=True)
        if self.training:
            self.loss = sf.indexer_kl_loss(*self.scorer, q, k, lse, chosen)
        elif chosen is None:
            self.recall = {keys: self._share(q, k, lse, keys) for keys in CHOICES}
        return out

    def _share(self, q: Tensor, k: Tensor, lse: Tensor, keys: str) -> float:
        plan = sf.Plan.from_choice(self.choose(keys), Tk=k.shape[2], unique=True)
        found = sf.attention_stats(q, k, lse, plan, over="row")
        return float(found[:, :, self.topk :].mean())


def add_indexers(model: GPT, topk: int) -> list[Indexer]:
    """One for every layer of the model, in place of its attention."""
    indexers = []
    for block in model.blocks:
        layer = block.attention
        width = layer.project.in_features
        layer.attention = Indexer(width, width // layer.heads, topk)
        layer.register_forward_pre_hook(layer.attention.look)
        indexers.append(layer.attention)
    return indexers


def train(
    model: GPT, indexers: list[Indexer], keys: str, corpus: Corpus, batch: int, length: int, steps: int
) -> None:
    """Train the indexers over dense attention, or everything over what they choose."""
    model.train().requires_grad_(keys != "dense")
    for indexer in indexers:
        indexer.requires_grad_(True).keys = keys
    own = [p for indexer in indexers for p in indexer.parameters()]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not x for x in own)]
    groups = [{"params": own, "lr": RATE}, {"params": others, "lr": RATE / SLOWER}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps + 1, pct_start=0.1)
    for step in range(steps):
        language = model(*corpus.batch(1, step, slice(None), batch, length))
        loss = torch.stack([indexer.loss for indexer in indexers]).sum()
        optimizer.zero_grad()
        (loss + language if keys != "dense" else loss).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: GPT, indexers: list[Indexer], corpus: Corpus, length: int, windows: int) -> Iterator[Row]:
    """Held-out bits per byte with all keys and with each choice, and the recall of each."""
    model.eval()
    held_out = list(corpus.validation(length, windows))
    tokens, targets = (torch.cat(x) for x in zip(*held_out, strict=True))
    for keys in ("dense", *CHOICES):
        torch.manual_seed(0)
        for indexer in indexers:
            indexer.keys = keys
        bpb = float(model(tokens, targets)) / math.log(2)
        found = [indexer.recall[keys] if keys != "dense" else 1.0 for indexer in indexers]
        yield {"keys": keys, "recall": sum(found) / len(found), "bpb": f"{bpb:.4f}"}


def main(
    run: Path, corpus: Corpus, *, length: int | None, topk: int, batch: int, steps: int, windows: int
) -> list[Row]:
    """Recall and bits per byte: before training, after the warm-up, after the sparse stage."""
    model, config = load_model(run)
    length = length or config.length
    torch.manual_seed(0)
    indexers, rows = add_indexers(model, topk), []
    for stage, keys in (("untrained", None), ("warm-up", "dense"), ("sparse", "indexer")):
        if keys:
            train(model, indexers, keys, corpus, batch, length, steps)
        for row in evaluate(model, indexers, corpus, length, windows):
            print(f"{stage:>9}, {row['keys']:>7}: recall {row['recall']:.3f}, bits per byte {row['bpb']}")
            given = {"T": length, "topk": topk, "batch": batch, "steps": steps}
            rows.append({"bench": "learned-indexer", "model": run.name, **given, "stage": stage, **row})
    return rows


def count(text: str) -> int:
    """What an option takes that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number >= 1")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a model that sparseflash train made")
    parser.add_argument("--data", default="", help="text file or directory; by default Python's own library")
    parser.add_argument("--length", type=count, help="bytes in a sequence; by default the model's own")
    parser.add_argument("--topk", type=count, default=128, help="keys that a query chooses")
    parser.add_argument("--batch", type=count, default=1, help="sequences in a step")
    parser.add_argument("--steps", type=count, default=80, help="optimiser steps of each stage")
    parser.add_argument("--windows", type=count, default=8, help="held-out sequences")
    parser.add_argument("--out", type=Path, help="CSV file of the rows")
    given = vars(parser.parse_args())
    data, out = given.pop("data"), given.pop("out")
    rows = main(corpus=load(data) if data else stdlib(), **given)
    if out:
        write(out, rows)

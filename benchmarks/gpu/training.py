"""Steps of the language model of the SCFA paper (arXiv 2306.01160): 122 million weights at 8192 tokens.

GPT-2's shape with its vocabulary: 12 layers of 12 heads of 64, learned positions, embeddings tied with the
head, no biases, no dropout, and each key is its query, normalised. Batches of 4 x 8192 and 2 x 16384 tokens
in bf16 under AdamW, as on each of the paper's cards. The text is a file or the source of the installed Python
library, as bytes: losses compare with one another, and with nothing else.
"""

from __future__ import annotations

import functools
import os
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.bench.results import Row
from sparseflash.train import Corpus
from sparseflash.train.attention import Attention, build
from sparseflash.train.data import load

from . import rivals
from .device import AHEAD, DEVICE, DRY, DTYPE, wait
from .task import Task

VOCABULARY, LAYERS, WIDTH, HEADS = 50304, *((1, 16, 1) if DRY else (12, 768, 12))
STEPS, WARM = (2, 1) if DRY else (40, 8)
SHAPES = ((16, 1),) if DRY else ((8192, 4), (16384, 2))
METHODS = {f"hash, {nb} buckets": ("hash-sparse", {"nb": nb}) for nb in (8, 16, 32)[: 1 if DRY else 3]} | {
    f"drop {drop:.0%}": ("qk-sparse", {"q_drop": drop, "k_drop": drop}) for drop in (0.3, 0.5, 0.7)[DRY * 2 :]
}


def steps() -> list[Task]:
    """A task for each length and attention."""
    return [task(T, batch, name) for T, batch in SHAPES for name in (*rivals.dense(), *METHODS)]


def few(count: int) -> list[Task]:
    """A few steps at the shorter length: torch's dense kernel, and the middle setting of each method."""
    names = [*list(rivals.dense())[:1], *(METHODS if DRY else ("hash, 16 buckets", "drop 50%"))]
    return [task(*SHAPES[0], name, STEPS if DRY else count) for name in names]


def task(T: int, batch: int, name: str, steps: int = STEPS) -> Task:
    """Steps under one attention."""
    key: Row = {"T": T, "batch": batch, "case": name}
    return Task(key, functools.partial(_steps, T, batch, name, steps))


@functools.cache
def corpus() -> Corpus:
    """The text: a file or folder where one was named, or the source of the installed Python library."""
    if named := os.environ.get("SPARSEFLASH_TEXT"):
        return load(named)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return Corpus([path.read_bytes() for path in files], "the Python library")


class Layer(nn.Module):
    """Attention, then an MLP four times as wide, each added to its normalised input."""

    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.project = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [B, T, width]."""
        q, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for z in self.project(self.norms[0](x)).chunk(2, dim=-1)
        )
        out = self.attention(q, F.normalize(q, dim=-1), v)
        x = x + self.output(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Paper(nn.Module):
    """The model, with an attention for each layer."""

    def __init__(self, length: int, width: int, heads: int, attention: list[Attention]) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n, width) for n in (VOCABULARY, length))
        self.layers = nn.ModuleList(Layer(width, heads, one) for one in attention)
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                deep = (2 * len(attention)) ** -0.5 if name.endswith(("output.weight", "down.weight")) else 1
                nn.init.normal_(weight, std=0.02 * deep)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The loss in nats of targets [B, T], as cross-entropy reduces it."""
        words, places = self.embed
        x = words(tokens) + places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        guess = F.linear(self.norm(x), words.weight).flatten(0, 1).float()
        return F.cross_entropy(guess, targets.flatten(), reduction=reduction)


def _attention(name: str, context: dict[str, int]) -> list[Attention]:
    """The attention of each layer, whose random choices are its own."""
    if name not in METHODS:
        return [rivals.dense()[name]] * LAYERS
    method, options = METHODS[name]
    return [build(method, options, seed=n, tied=True, context=context) for n in range(LAYERS)]


class Training:
    """A model on the device, its optimiser, and the batches of a text."""

    def __init__(
        self, T: int, batch: int, attention: list[Attention], context: dict[str, int], warm: int = WARM
    ) -> None:
        torch.manual_seed(0)
        self.T, self.batch, self.context, self.warm = T, batch, context, warm
        self.corpus, self.model = corpus(), Paper(T, WIDTH, HEADS, attention).to(DEVICE)
        named = dict(self.model.named_parameters())
        light = {name for name in named if "norm" in name or "embed" in name}
        groups = [
            {"params": [p for name, p in named.items() if (name in light) == of_light], "weight_decay": decay}
            for of_light, decay in ((True, 0.0), (False, 0.1))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def _losses(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        tokens, targets = tokens.to(DEVICE), targets.to(DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not DRY):  # the interpreter has no bf16
            return self.model(tokens, targets, reduction)

    def step(self, number: int) -> tuple[float, float]:
        """One step: its milliseconds, and its loss."""
        tokens, targets = self.corpus.batch(0, number, slice(0, self.batch), self.batch, self.T)
        self.context["step"] = number
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (number + 1) / (self.warm + 1))
        wait()
        began = time.perf_counter()
        loss = self._losses(tokens, targets, "mean")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait()
        return (time.perf_counter() - began) * 1e3, loss.item()

    @torch.no_grad()
    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """What each target [B, T] costs, in nats; on the CPU."""
        return self._losses(tokens, targets, "none").view(targets.shape).cpu()


def _steps(T: int, batch: int, name: str, steps: int) -> Iterator[Row]:
    context = {"step": 0}
    attention = _attention(name, context)
    if AHEAD:  # autocast knows no such device
        tokens = torch.zeros(batch, T, dtype=torch.long, device=DEVICE)
        Paper(T, WIDTH, HEADS, attention).to(DEVICE, DTYPE)(tokens, tokens).backward()
        return
    run = Training(T, batch, attention, context)
    times, losses = zip(*(run.step(step) for step in range(steps)), strict=True)
    ms = statistics.median(times[min(WARM, steps // 2) :])
    weights = sum(p.numel() for p in run.model.parameters())
    yield {
        "model": f"GPT-2, {LAYERS} x {WIDTH}, {HEADS} heads, learned positions, keys are normalised queries",
        "weights": weights, "steps": steps, "ms": ms, "tokens_per_s": batch * T / ms * 1e3,
        "first_loss": losses[0], "last_loss": losses[-1],
        "gib": 0.0 if DRY else torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip

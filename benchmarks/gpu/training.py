"""Steps of the paper's language model (arXiv 2306.01160): 12 layers of 12 heads of 64, tied q and k.

The model is `sparseflash.train`'s with that configuration, GPT-2's vocabulary and tied embeddings; its
positions are rotary, the paper's are learned. The text is the source of the installed Python library: losses
compare with one another, and with nothing else.
"""

from __future__ import annotations

import functools
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from sparseflash.bench.results import Row
from sparseflash.train import GPT, Corpus, TrainConfig

from . import rivals
from .device import DEVICE, DRY, wait
from .runner import Task

VOCABULARY = 50304
STEPS, WARM = (2, 1) if DRY else (40, 8)
SHAPES = ((16, 1),) if DRY else ((8192, 4), (16384, 2))
METHODS = {f"hash, {nb} buckets": ("hash-sparse", {"nb": nb}) for nb in (8, 16, 32)[: 1 if DRY else 3]} | {
    f"drop {drop:.0%}": ("qk-sparse", {"q_drop": drop, "k_drop": drop}) for drop in (0.3, 0.5, 0.7)[DRY * 2 :]
}


def steps() -> list[Task]:
    """A task for each length and attention."""
    names = [*rivals.dense(), *METHODS]
    return [
        Task({"T": T, "batch": batch, "case": name}, functools.partial(_steps, T, batch, name))
        for T, batch in SHAPES
        for name in names
    ]


@functools.cache
def _corpus() -> Corpus:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return Corpus([path.read_bytes() for path in files])


def _model(T: int, name: str) -> GPT:
    """The model with one attention."""
    layers, width, heads = (1, 16, 1) if DRY else (12, 768, 12)
    method, options = METHODS.get(name, ("dense", {}))
    config = TrainConfig(
        data="",
        attention=method,
        options=options,
        length=T,
        layers=layers,
        width=width,
        heads=heads,
        qk="tied",
    )
    model = GPT(config)
    model.embed = nn.Embedding(VOCABULARY, width)
    nn.init.normal_(model.embed.weight, std=0.02)
    model.head.weight = model.embed.weight
    if method == "dense":
        for block in model.blocks:
            block.attention.attention = rivals.dense()[name]
    return model.to(DEVICE)


def _steps(T: int, batch: int, name: str) -> Iterator[Row]:
    torch.manual_seed(0)
    model, corpus = _model(T, name), _corpus()
    groups = [
        {"params": [model.embed.weight], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if n != "embed.weight"], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    times, losses = [], []
    for step in range(STEPS):
        tokens, targets = (x.to(DEVICE) for x in corpus.batch(0, step, slice(0, batch), batch, T))
        model.context["step"] = step
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / (WARM + 1))
        wait()
        began = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not DRY):  # the interpreter has no bf16
            loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append((time.perf_counter() - began) * 1e3)
        losses.append(loss.item())
    ms = statistics.median(times[WARM:])
    weights = sum(p.numel() for p in model.parameters())
    yield {
        "weights": weights, "steps": STEPS, "ms": ms, "tokens_per_s": batch * T / ms * 1e3,
        "first_loss": losses[0], "last_loss": losses[-1],
        "gib": 0.0 if DRY else torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip

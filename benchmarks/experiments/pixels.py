"""Sequential MNIST: an image as 784 bytes, pixel after pixel; dense, hash-sparse and Reformer at equal steps.

The experiment of SCFA (arXiv 2306.01160) at the scale of a CPU, on any images in IDX format. Queries and keys
are tied as in the paper, the model is that of `sparseflash train`.
"""

from __future__ import annotations

import gzip
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError
from sparseflash.common.files import no_file
from sparseflash.train import GPT, TrainConfig

ATTENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "hash-sparse, 14 buckets": ("hash-sparse", {"nb": 14}),
    "reformer, chunks of 56": ("reformer", {"bucket": 56}),
}
HELD_OUT = 0.1
"""Share of the images, the last ones, that are not trained on."""


def read_idx(path: str | Path) -> Tensor:
    """Images of an IDX file, plain or gzipped: uint8 [count, pixels].

    Raises
    ------
    SparseFlashError
        If it cannot be read, or is no IDX file of bytes.
    """
    try:
        if kind := no_file(path):
            raise SparseFlashError(f"--images {path} is {kind}; give an IDX file")
        opened = gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")
        with opened as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:  # the last two of a gzip file that is cut short
        raise SparseFlashError(
            f"--images {path}: {getattr(error, 'strerror', '') or error}; give an IDX file"
        ) from None
    if len(raw) < 8 or raw[:3] != b"\0\0\x08":
        raise SparseFlashError(f"--images {path}: no IDX file of bytes (as MNIST's *-idx3-ubyte.gz are)")
    axes = raw[3]
    sizes = [int.from_bytes(raw[4 + 4 * n : 8 + 4 * n], "big") for n in range(axes)]
    body = raw[4 + 4 * axes :]
    if not body or not sizes or math.prod(sizes) != len(body):
        raise SparseFlashError(f"--images {path}: {len(body)} bytes, its head says {sizes}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(sizes[0], -1)


def measure(
    images: Tensor,
    *,
    attentions: Mapping[str, tuple[str, dict[str, Any]]] = ATTENTIONS,
    steps: int = 150,
    batch: int = 8,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    rate: float = 8e-3,
    test: int = 64,
    seed: int = 0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Train each attention for so many steps on the same batches; perplexity per held-out pixel."""
    split = round(len(images) * (1 - HELD_OUT))
    train, held = images[:split].long(), images[split:][:test].long()
    for name, (slug, options) in attentions.items():
        torch.manual_seed(seed)
        config = TrainConfig(
            "", slug, options, length=images.shape[1], layers=layers, width=width, heads=heads, qk="tied"
        )
        model = GPT(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        order = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        for step in range(steps):
            on_run(f"{name}, step {step + 1} of {steps}")
            model.context["step"] = step
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / 10, 1.05 - step / steps, 1.0)
            _loss(model, train[torch.randint(len(train), (batch,), generator=order)]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            nats = sum(float(_loss(model, part)) * len(part) for part in held.split(batch)) / len(held)
        row: Row = {"bench": "pixels", "case": name, "T": images.shape[1], "steps": steps, "batch": batch}
        row |= {"perplexity": math.exp(nats), "bits": nats / math.log(2), "s_per_step": seconds / steps}
        yield row | {"layers": layers, "width": width, "heads": heads, "lr": rate, "seed": seed}


def _loss(model: GPT, images: Tensor) -> Tensor:
    """Nats per pixel; the first one is predicted from a blank."""
    before = torch.nn.functional.pad(images[:, :-1], (1, 0))
    return model(before, images)

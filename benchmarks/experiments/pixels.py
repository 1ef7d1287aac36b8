"""Sequential MNIST: an image as 784 bytes, pixel after pixel, by several attentions at equal steps.

The experiment of SCFA (arXiv 2306.01160) at the scale of a CPU, on any images in IDX format, of dense
attention, hash-sparse and Reformer; beside them routing, the combiner of fixed segments (a row of MNIST) and
SeqBoat, whose `active` is the share of pixels that attend, mean of the layers. Queries and keys of the first
three are tied as in the paper; the model is that of `sparseflash train`.
"""

from __future__ import annotations

import gzip
import math
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseflash import methods
from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError
from sparseflash.common.files import no_file
from sparseflash.nn import update
from sparseflash.train import GPT, TrainConfig

from .claim.rows import Job

ATTENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "hash-sparse, 14 buckets": ("hash-sparse", {"nb": 14}),
    "reformer, chunks of 56": ("reformer", {"bucket": 56}),
    "routing, 14 clusters": ("routing-attention", {"clusters": 14, "window": 56}),
    "combiner, segments of 28": ("combiner", {"segment": 28}),
    "seqboat": ("seqboat", {"window": 56}),
}
"""Names and options of what mixes pixels: methods over tied heads, and layers of sf.nn, which project."""
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


def jobs(
    images: Tensor,
    *,
    cases: Sequence[str] = tuple(ATTENTIONS),
    steps: int = 150,
    seed: int = 0,
    batch: int = 8,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    test: int = 64,
) -> list[Job]:
    """A row for each attention: so many steps on the same batches, perplexity per held-out pixel."""
    sizes = {"batch": batch, "layers": layers, "width": width, "heads": heads, "seed": seed}
    keys = [{"bench": "pixels", "case": x, "T": images.shape[1], "steps": steps, **sizes} for x in cases]
    return [Job(key, partial(_run, key, images, test)) for key in keys]


def _run(key: Row, images: Tensor, test: int, rate: float = 8e-3) -> Row:
    split, steps, batch = round(len(images) * (1 - HELD_OUT)), key["steps"], key["batch"]
    train, held = images[:split].long(), images[split:][:test].long()
    slug, options = ATTENTIONS[key["case"]]
    torch.manual_seed(key["seed"])
    config = TrainConfig(
        "",
        slug,
        options,
        length=key["T"],
        layers=key["layers"],
        width=key["width"],
        heads=key["heads"],
        qk="tied" if slug == "dense" or slug in methods.names() else "untied",
    )
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.Generator().manual_seed(key["seed"])
    start = time.perf_counter()
    for step in range(steps):
        model.context["step"] = step
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 10, 1.05 - step / steps, 1.0)
        loss = _loss(model, train[torch.randint(len(train), (batch,), generator=order)])
        (loss + model.aux_loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(model)
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        nats = sum(float(_loss(model, part)) * len(part) for part in held.split(batch)) / len(held)
    row: Row = {"perplexity": math.exp(nats), "bits": nats / math.log(2), "s_per_step": seconds / steps}
    awake = [float(layer.awake) for layer in model.layers() if getattr(layer, "awake", None) is not None]
    if awake:
        row["active"] = sum(awake) / len(awake)
    return row | {"lr": rate}


def _loss(model: GPT, images: Tensor) -> Tensor:
    """Nats per pixel; the first one is predicted from a blank."""
    before = torch.nn.functional.pad(images[:, :-1], (1, 0))
    return model(before, images)

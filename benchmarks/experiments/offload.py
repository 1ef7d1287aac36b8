"""Tokens per second over keys and values in files, none of which is in memory when a token begins.

Queries and keys of a captured model, its keys once behind the other with a little noise until they are as
many as are asked for; some layers one after the other, as a model has them. Before each token the system is
told to forget the files. `mib` is what the layers were told to read for a token, `disk` what the process read
of the disk by the count of the system, `there` the share that was in memory when a layer asked for it, since
the one before had begun to read it. `gain` is over reading all keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import methods
from sparseflash.bench import capture
from sparseflash.bench.results import Row
from sparseflash.cache import Offload, Offloaded


def cases(budget: int, q: Tensor, k: Tensor) -> dict[str, Any]:
    """Methods by name; None reads everything."""
    return {
        "everything": None,
        "quest, pages of 64": methods.Quest(budget=budget, page=64),
        "quest, pages of 16": methods.Quest(budget=budget, page=16),
        "lserve": methods.LServe(budget=budget),
        "double-sparsity": methods.DoubleSparsity(
            budget=budget, channels=methods.heavy_channels(q[:, :, :1024], k[:, :, :1024], 16)
        ),
    }


def filled(layer: capture.Layer, how: Offload, length: int) -> tuple[Offloaded, Tensor]:
    """A cache of so many tokens, and the queries of the capture's last ones."""
    q, k, v = layer.usual()
    made, draw = Offloaded(how), torch.Generator().manual_seed(0)
    while made.tokens < length:
        n = min(k.shape[2], length - made.tokens)
        noise = 0.05 * torch.randn(k[:, :, :n].shape, generator=draw) * k.std()
        made.append(k[:, :, :n] + noise, v[:, :, :n])
    return made, q


def of_disk() -> int:
    """Bytes that this process read of disks."""
    told = Path("/proc/self/io").read_text(encoding="ascii")
    return int(next(line for line in told.splitlines() if line.startswith("read_bytes")).split()[1])


@torch.no_grad()
def measure(
    folder: Path,
    *,
    name: str = "smollm2",
    length: int = 32768,
    share: int = 16,
    tokens: int = 3,
    rounds: int = 3,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a case, with and without reading ahead: the best round of some tokens."""
    captured, how = capture.load(name), Offload(folder, capacity=length)
    on_run(f"{length} tokens are written")
    layers = [filled(captured.layer(n, tokens=4096), how, length) for n in captured.layers]
    q, k, _ = captured.layer(captured.layers[0], tokens=4096).usual()
    wanted = [(case, ahead) for case in cases(length // share, q, k) for ahead in (False, True)][1:]
    spent: dict[tuple[str, bool], list[tuple[float, ...]]] = {}
    for n in range(rounds + 1):  # the first one makes the summaries
        for case, ahead in wanted:
            on_run(f"{case}: round {n}")
            for (layer, _), (after, _) in zip(layers, layers[1:]):
                layer.following = after if ahead else None
            spent.setdefault((case, ahead), []).append(
                _run(layers, cases(length // share, q, k)[case], tokens)
            )
    whole = min(row[0] for row in spent["everything", True][1:])
    for (case, ahead), each in spent.items():
        seconds, told, there, disk = min(each[1:])
        yield {
            "bench": "offload", "capture": name, "T": length, "layers": len(layers), "case": case,
            "ahead": ahead, "budget": length if case == "everything" else length // share,
            "rate": tokens / seconds, "gain": whole / seconds, "mib": told / tokens / 2**20,
            "disk": disk / tokens / 2**20, "there": there / told, "rounds": rounds,
        }  # fmt: skip


def _run(layers: list[tuple[Offloaded, Tensor]], method: Any, tokens: int) -> tuple[float, ...]:
    """Seconds of some tokens, without forgetting; bytes that were asked for, were there, and of the disk."""
    seconds, before = 0.0, [layer.reads for layer, _ in layers]
    disk = of_disk()
    for t in range(tokens):
        for layer, _ in layers:
            layer.drop()
        start = time.perf_counter()
        for layer, q in layers:
            now, T = q[:, :, q.shape[2] - tokens + t :][:, :, :1], layer.tokens
            if method is None:
                plan = sf.Plan.dense(1, T, causal=True, q_offset=T - 1)
            else:
                plan = method.select(now, layer.keys, {"cache": layer, "q_offset": T - 1}).plan
            layer.expect(plan)
            sf.decode(now, layer.keys, layer.values, plan)
        seconds += time.perf_counter() - start
    told = sum(layer.reads.bytes - old.bytes for (layer, _), old in zip(layers, before))
    there = sum(layer.reads.there - old.there for (layer, _), old in zip(layers, before))
    return seconds, told, there, of_disk() - disk

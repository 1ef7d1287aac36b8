"""SeerAttention's gates on text they did not see, beside pooled means, chance, and what they learn from.

All choose as many blocks for each tile, beside the first and the tile's own: recall is then theirs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench import capture, distill
from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError
from sparseflash.integrations.transformers import load
from sparseflash.selection import Grid, tile_mass, top_k

BLOCK = 64


def measure(
    text: Path,
    *,
    model: str = "smollm2",
    length: int = 2048,
    pieces: int = 8,
    layers: Sequence[int] = (4, 15, 21),
    steps: int = 500,
    skip: int = 0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a choice and a budget: mean recall over the layers, of the piece behind those that taught."""
    loaded, tokenizer = load(model)
    words = text.read_text(encoding="utf-8", errors="replace")[skip:]
    ids = tokenizer(words, return_tensors="pt", truncation=True, max_length=(pieces + 1) * length).input_ids
    parts = ids.split(length, 1)
    if parts[-1].shape[1] < length or len(parts) <= pieces:
        raise SparseFlashError(f"the text has {ids.shape[1]} tokens; {(pieces + 1) * length} are wanted")
    seen: dict[Literal["max", "sum"], list[distill.Seen]] = {"max": [], "sum": []}
    for n, part in enumerate(parts):
        for target, found in seen.items():
            on_run(f"piece {n + 1} of {len(parts)}, {target}")
            found.append(distill.listen(loaded, part, layers, target=target))
    on_run("training")
    gates = {
        f"gate, of the {target}": distill.train(found[:-1], steps=steps) for target, found in seen.items()
    }
    tensors = capture.of_model(model, tokenizer.decode(parts[-1][0]), length, layers)[0]
    found: dict[tuple[str, int], list[float]] = {}
    for number in layers:
        q, k = (tensors[f"layer.{number}.{x}"].float().contiguous() for x in "qk")
        grid = Grid(length, length, BLOCK, BLOCK)
        blocks = seen["max"][-1][number][0]
        masses = {name: blocks.logits(own.layers[number]) for name, own in gates.items()}
        masses |= {
            "means": tile_mass(q, k, grid, "mean"),
            "chance": torch.rand(
                1, q.shape[1], grid.tiles, grid.units, generator=torch.Generator().manual_seed(0)
            ),
            "the max itself": tile_mass(q, k, grid, "exact", reduce="max"),
            "the sum itself": tile_mass(q, k, grid, "exact"),
        }
        for case, mass in masses.items():
            for budget in (2, 4, 8, 16):
                found.setdefault((case, budget), []).append(_recall(q, k, grid, mass, budget))
    for (case, budget), each in found.items():
        same: Row = {"bench": "gates", "model": model, "text": text.stem, "T": length, "pieces": pieces}
        near, reach = grid.near(1, 1), grid.reach()
        kept = top_k(torch.zeros(1, 1, grid.tiles, grid.units), budget, among=reach & ~near) | near
        yield same | {
            "case": case,
            "blocks": budget,
            "kept": grid.plan(kept).kept,
            "recall": sum(each) / len(each),
        }


def _recall(q: Tensor, k: Tensor, grid: Grid, mass: Tensor, budget: int) -> float:
    near = grid.near(1, 1)
    keep = top_k(mass, budget, among=grid.reach() & ~near) | near
    return float(sf.recall(q, k, grid.plan(keep)).mean())

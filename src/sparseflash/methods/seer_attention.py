"""SeerAttention: blocks selected by a gate that is distilled from the model's own attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..selection.budgets import above, top_k
from ..selection.grid import Grid
from .base import check_counts
from .blocks import BlockMethod
from .gates import Blocks, Gates, loaded


@dataclass(frozen=True)
class SeerAttention(BlockMethod):
    """Each tile of queries sees the blocks of keys that a small trained gate gives the largest weights.

    The gate compares a tile's mean query with the maximum, minimum and mean key of a block, through weights
    per query head. It learns the largest weight of dense attention in every block, while the model is frozen
    (`nn.SeerGate`, **sparseflash calibrate seer-attention**).

    Papers: Gao et al., "SeerAttention", arXiv 2410.13276, section 3.

    Parameters
    ----------
    gates : Gates or str, optional
        Trained gates of the model, or their file. None: an untrained gate, which compares mean q and mean k.
    threshold : float
        Least weight of a kept block in the gate's softmax over a tile's blocks; 0 keeps all.
    blocks : int, optional
        Number of best blocks of each tile, instead of a threshold.
    block, sinks, near, dense_tiles, share
        As in every method that chooses blocks (`BlockMethod`); gates are for one block size.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query; `layer`, the layer number; and `rope`, the
    rotation that q and k already have (as for `dual-chunk-attention`), which is undone for the gate. The
    best block of a tile is kept whatever the threshold. A mean query does not show which key a single query
    looks for (a lone needle).

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 2048, 32)
    >>> gate = sf.nn.SeerGate(2, 32, generator=torch.Generator().manual_seed(0))
    >>> method = sf.methods.SeerAttention(sf.methods.Gates({0: gate.weight}, rotary=False), blocks=4)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.7
    (torch.Size([1, 2, 2048, 32]), True)
    """

    gates: Gates | str | None = None
    threshold: float = 5e-4
    blocks: int | None = None
    block: int = field(default=64, kw_only=True)
    dense_tiles: int = field(default=2, kw_only=True)

    reads = ("q_offset", "layer", "rope")
    paper = "arXiv 2410.13276"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None:
            check_counts(self, 1, "blocks")
        if not (isinstance(self.threshold, (int, float)) and 0 <= self.threshold < 1):
            raise SparseFlashError(f"threshold={self.threshold!r}: expected a weight in [0, 1)")
        if not (self.gates is None or isinstance(self.gates, (str, Gates))):
            raise SparseFlashError(
                f"gates={self.gates!r:.60}: expected Gates, or the file of some (Gates.save); sparseflash "
                "calibrate seer-attention trains them"
            )
        known = self.trained()
        if known is not None and known.block != self.block:
            raise SparseFlashError(
                f"block={self.block}, and gates of blocks of {known.block}: give block={known.block}"
            )

    def trained(self) -> Gates | None:
        """Return the gates, loaded from their file if `gates` is a path."""
        if not isinstance(self.gates, str):
            return self.gates
        path = Path(self.gates)
        return loaded(str(path), path.stat().st_mtime_ns if path.exists() else 0)

    def estimate(self, q: Tensor, k: Tensor, grid: Grid, told: dict[str, Any]) -> Tensor:
        """Estimate mass by the gate: a softmax over the blocks in reach."""
        gates, rope = self.trained(), told["rope"]
        if gates is not None and gates.rotary and rope is None:
            raise SparseFlashError(
                "ctx['rope'] is missing: these gates see queries and keys before their rotation; expected "
                "(cos, sin) or inverse frequencies"
            )
        blocks = Blocks.of(q, k, grid, rope if gates is None or gates.rotary else None)
        weight = None if gates is None else gates.of(told["layer"]).to(q.device)
        logits = blocks.logits(weight).masked_fill(~grid.reach().to(q.device), -torch.inf)
        return logits.softmax(-1).nan_to_num(nan=0)

    def choose(self, mass: Tensor, reach: Tensor, near: Tensor) -> Tensor:
        """Keep the best blocks of a tile, or those that reach the threshold."""
        if self.blocks is not None:
            return top_k(mass, self.blocks, among=reach & ~near)
        return above(mass, self.threshold, among=reach, of="value")

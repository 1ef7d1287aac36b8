"""What methods select with: one geometry, estimators of where attention goes, budgets, orders.

Tensors in, indices and plans out; nothing here has a gradient. Block-sparse attention in three lines:

>>> import torch, sparseflash as sf
>>> q, k, v = torch.randn(3, 1, 2, 512, 32)
>>> grid = sf.selection.Grid(512, 512, tile=64, unit=64)
>>> score = sf.selection.pooled(q, 64) @ sf.selection.pooled(k, 64).mT
>>> plan = grid.plan(sf.selection.top_k(score, 4, grid.reach()) | grid.near(sink=1))
>>> sf.attention(q, k, v, plan).shape
torch.Size([1, 2, 512, 32])
"""

from .budgets import top_k
from .grid import Grid
from .scores import pooled

__all__ = ["Grid", "pooled", "top_k"]

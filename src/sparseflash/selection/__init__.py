"""Building blocks of methods: the tile grid, estimators of attention mass, budgets, token orders.

Functions take tensors and return indices or plans, without gradients. Block-sparse attention in three lines:

>>> import torch, sparseflash as sf
>>> q, k, v = torch.randn(3, 1, 2, 512, 32)
>>> grid = sf.selection.Grid(512, 512, tile=64, unit=64)
>>> mass = sf.selection.tile_mass(q, k, grid, "mean")
>>> plan = grid.plan(sf.selection.top_p(mass, 0.9, grid.reach()) | grid.near(sink=1))
>>> sf.attention(q, k, v, plan).shape
torch.Size([1, 2, 512, 32])
"""

from .budgets import above, running_kth, share, top_indices, top_k, top_p
from .clusters import kmeans
from .grid import Grid
from .mass import tile_mass
from .orders import coverage, grid_order, lsh_buckets, lsh_planes, random_bits, sorted_order
from .pages import page_scores, top_pages
from .probes import Probe, probe
from .scores import pooled
from .sharded import Sharded

__all__ = [
    "Grid",
    "Probe",
    "Sharded",
    "above",
    "coverage",
    "grid_order",
    "kmeans",
    "lsh_buckets",
    "lsh_planes",
    "page_scores",
    "pooled",
    "probe",
    "random_bits",
    "running_kth",
    "share",
    "sorted_order",
    "tile_mass",
    "top_indices",
    "top_k",
    "top_p",
    "top_pages",
]

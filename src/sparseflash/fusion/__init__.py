"""Blockbuster: block programs, rewritten until no value passes through global memory twice.

A program consists of loops over blocks and operators on tiles, between a large slow (global) and a small fast
(local) memory. It starts with separate loops for every operator; nine rules (Dekel 2025, arXiv 2505.07829),
none specific to attention or norms, turn softmax(q k^T) v into flash attention. Start with `fuse`, or with
``sparseflash fuse attention``.
"""

from .build import GOLDEN, SIZES, Array, Builder, layer_norm, rms_norm, softmax
from .costs import BYTES, CACHE, Cost, Tiers, choose, cost
from .derive import Derivation, Step, fuse, simplify
from .emit import Kernel
from .program import Loop, Op, Program
from .reading import read
from .rules import RULES
from .running import Meter, run
from .safety import centre

__all__ = [
    "BYTES",
    "CACHE",
    "GOLDEN",
    "RULES",
    "SIZES",
    "Array",
    "Builder",
    "Cost",
    "Derivation",
    "Kernel",
    "Loop",
    "Meter",
    "Op",
    "Program",
    "Step",
    "Tiers",
    "centre",
    "choose",
    "cost",
    "fuse",
    "layer_norm",
    "read",
    "rms_norm",
    "run",
    "simplify",
    "softmax",
]

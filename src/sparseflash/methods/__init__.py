"""Sparse attention methods, one file a system. `names()` lists them, `get(slug, ...)` makes one."""

from ..method import Method, Selection, find, get, names
from ..order import coverage
from .masks.bigbird import BigBird
from .masks.block_causal import BlockCausal
from .masks.cycle_scan import CycleScan
from .masks.dilated import Dilated
from .masks.documents import Documents
from .masks.grid_window import GridWindow
from .masks.prefix_lm import PrefixLM
from .masks.sink_window import SinkWindow
from .masks.strided import Strided
from .masks.tree import Tree
from .masks.window import Window
from .training.hash_sparse import HashSparse
from .training.qk_sparse import QKSparse
from .training.reformer import Reformer

__all__ = [
    "BigBird",
    "BlockCausal",
    "CycleScan",
    "Dilated",
    "Documents",
    "GridWindow",
    "HashSparse",
    "Method",
    "PrefixLM",
    "QKSparse",
    "Reformer",
    "Selection",
    "SinkWindow",
    "Strided",
    "Tree",
    "Window",
    "coverage",
    "find",
    "get",
    "names",
]

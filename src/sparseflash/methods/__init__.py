"""Sparse attention methods, one file a system. `names()` lists them, `get(slug, ...)` makes one."""

from ..selection.orders import coverage
from .base import Method, Selection, find, get, names
from .bigbird import BigBird
from .block_causal import BlockCausal
from .cycle_scan import CycleScan
from .dilated import Dilated
from .documents import Documents
from .grid_window import GridWindow
from .hash_sparse import HashSparse
from .prefix_lm import PrefixLM
from .qk_sparse import QKSparse
from .reformer import Reformer
from .session import Session
from .sink_window import SinkWindow
from .strided import Strided
from .tree import Tree
from .window import Window

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
    "Session",
    "SinkWindow",
    "Strided",
    "Tree",
    "Window",
    "coverage",
    "find",
    "get",
    "names",
]

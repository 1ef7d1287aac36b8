"""Sparse attention methods, one file a system. `names()` lists them, `get(slug, ...)` makes one."""

from ..method import Method, Selection, find, get, names
from ..order import coverage
from .masks.sink_window import SinkWindow
from .masks.window import Window
from .training.hash_sparse import HashSparse
from .training.qk_sparse import QKSparse
from .training.reformer import Reformer

__all__ = [
    "HashSparse",
    "Method",
    "QKSparse",
    "Reformer",
    "Selection",
    "SinkWindow",
    "Window",
    "coverage",
    "find",
    "get",
    "names",
]

"""Context-parallel attention: tokens sharded over ranks, any plan, exact forward and backward, balanced."""

from .attend import attention
from .context import ContextParallel, context_parallel
from .decoding import decode
from .forecast import Forecast, Links, simulate
from .layouts import Layout, areas, balance, readers

__all__ = [
    "ContextParallel",
    "Forecast",
    "Layout",
    "Links",
    "areas",
    "attention",
    "balance",
    "context_parallel",
    "decode",
    "readers",
    "simulate",
]

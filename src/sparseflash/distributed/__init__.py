"""Context-parallel attention: tokens sharded over ranks, any plan, exact forward and backward, balanced."""

from .attention import attention
from .context import ContextParallel, context_parallel
from .decode import decode
from .layouts import Layout, areas, balance, readers
from .simulate import Forecast, Links, simulate

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

"""The definition of every op: plain PyTorch, fp32 (fp64 for fp64), in pieces so that memory stays O(T).

Visits what the plan visits and nothing else. Runs on any device; this is what the fast backends are held to.
"""

from torch import Tensor

from .indexer import indexer_loss, indexer_topk
from .linear import linear_backward, linear_forward
from .pointwise import pointwise_backward, pointwise_forward
from .selection import page_scores, probe, running_kth, tile_mass, top_indices
from .softmax import backward, decode, forward, influence, stats
from .stick import stick_backward, stick_forward

__all__ = [
    "NAME",
    "backward",
    "decode",
    "forward",
    "indexer_loss",
    "indexer_topk",
    "influence",
    "linear_backward",
    "linear_forward",
    "page_scores",
    "pointwise_backward",
    "pointwise_forward",
    "probe",
    "refuse",
    "running_kth",
    "stats",
    "status",
    "stick_backward",
    "stick_forward",
    "tile_mass",
    "top_indices",
]

NAME = "reference"


def status() -> tuple[bool, str]:
    """Usable everywhere."""
    return True, "plain PyTorch, any device and dtype; the definition, not fast"


def refuse(*tensors: Tensor) -> list[str]:
    """Reasons why a call cannot run here: none."""
    return []

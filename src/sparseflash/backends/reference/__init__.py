"""The definition of every op: plain PyTorch in fp32 (fp64 for fp64), tile by tile, so that memory stays O(T).

Only pairs that the plan visits are computed. Runs on any device; the fast backends are tested against it.
"""

from torch import Tensor

from .indexer import indexer_loss, indexer_topk
from .linear import linear_backward, linear_forward
from .nm import nm_product
from .pointwise import pointwise_backward, pointwise_forward
from .selection import heaviest, page_scores, probe, running_kth, tile_mass, top_indices
from .softmax import backward, decode, forward, influence, stats
from .stick import stick_backward, stick_forward

__all__ = [
    "NAME",
    "backward",
    "decode",
    "forward",
    "heaviest",
    "indexer_loss",
    "indexer_topk",
    "influence",
    "linear_backward",
    "linear_forward",
    "nm_product",
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
    """Return True: the reference runs everywhere."""
    return True, "plain PyTorch, any device and dtype; the definition, not fast"


def refuse(*tensors: Tensor) -> list[str]:
    """Return no reasons: every call runs here."""
    return []

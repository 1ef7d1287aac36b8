"""Causal layers by name, for models that are configured by layer name."""

from __future__ import annotations

import inspect
from typing import Any

from ..common.errors import SparseFlashError
from .base import Layer
from .combiner import Combiner
from .convolution import GatedConvolution
from .dynamic_mask import DynamicMaskAttention
from .lightning import LightningAttention
from .longgen import LongGenAttention
from .lookups import Lookups
from .native_sparse import NativeSparseAttention
from .routing import RoutingAttention
from .self_attention import SelfAttention
from .seqboat import SeqBoat
from .sparsek import SparseKAttention
from .stick_breaking import StickBreakingAttention

_KNOWN: dict[str, type[Layer]] = {
    "combiner": Combiner,
    "dynamic-mask-attention": DynamicMaskAttention,
    "gated-convolution": GatedConvolution,
    "lightning-attention": LightningAttention,
    "longgen-attention": LongGenAttention,
    "lookups": Lookups,
    "native-sparse-attention": NativeSparseAttention,
    "routing-attention": RoutingAttention,
    "self-attention": SelfAttention,
    "seqboat": SeqBoat,
    "sparsek-attention": SparseKAttention,
    "stick-breaking-attention": StickBreakingAttention,
}


def names() -> list[str]:
    """Names of all layers that `get` makes."""
    return sorted(_KNOWN)


def find(name: str) -> type[Layer]:
    """Look up the class of a layer name."""
    if name not in _KNOWN:
        raise SparseFlashError(f"there is no layer {name!r}: layers: {', '.join(names())}")
    return _KNOWN[name]


def options(cls: type[Layer]) -> set[str]:
    """Keyword options of a class; if it takes `**options`, those of its base class too."""
    found: set[str] = set()
    for one in cls.__mro__:
        own = inspect.signature(one).parameters.values()
        found |= {x.name for x in own if x.kind is x.KEYWORD_ONLY}
        if not any(x.kind is x.VAR_KEYWORD for x in own):
            break
    return found


def get(name: str, width: int, heads: int, **given: Any) -> Layer:
    """Make a layer by its name.

    Parameters
    ----------
    name : str
        One of `names()`.
    width, heads
        As in `Layer`.
    **given
        Options of the class.

    Raises
    ------
    SparseFlashError
        If the name or an option does not exist.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sf.nn.get("stick-breaking-attention", 64, 4, rest="drop").rest
    'drop'
    """
    cls = find(name)
    known = options(cls)
    for option in given:
        if option not in known:
            raise SparseFlashError(
                f"{name} has no option {option!r}: expected some of {', '.join(sorted(known))}"
            )
    return cls(width, heads, **given)

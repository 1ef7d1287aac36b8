"""From a name and options to a callable ``attention(q, k, v) -> out`` over [B, H, T, D]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparseflash.train.errors import TrainError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_FIELDS = {"local_heads": "causal_heads"}


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch: the baseline every method is compared with."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def names() -> list[str]:
    """Everything ``--attention`` accepts."""
    import sparseflash as sf

    return ["dense", *sorted(sf.methods.names())]


def cli_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate command-line options into the method's hyper-parameters."""
    return {_FIELDS.get(name, name): value for name, value in given.items()}


def build(name: str, options: Mapping[str, Any] | None = None, *, seed: int = 0) -> Attention:
    """Make the attention of one layer.

    Parameters
    ----------
    name : str
        ``"dense"`` or a registry slug.
    options : mapping, optional
        Hyper-parameters of the method.
    seed : int
        Layers get different seeds, hence different random planes.
    """
    options = dict(options or {})
    if name == "dense":
        if options:
            raise TrainError(f"dense attention takes no options; remove {', '.join(sorted(options))}")
        return dense
    import sparseflash as sf

    try:
        method = sf.methods.get(name, **options)
    except KeyError:
        raise TrainError(f"--attention {name!r} is unknown; choose one of: {', '.join(names())}") from None
    return method

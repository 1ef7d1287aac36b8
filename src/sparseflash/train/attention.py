"""From a name and options to a callable ``attention(q, k, v) -> out`` over [B, H, T, D]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparseflash import methods
from sparseflash.methods.base import Method, Selection
from sparseflash.ops._arguments import AnyPlan
from sparseflash.train.errors import TrainError

Attention = Callable[..., Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """Causal attention by torch: the baseline every method is compared with."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, dropout_p=dropout_p)


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A method together with the context its calls share, such as the step whose random masks it draws."""

    method: Method
    context: Mapping[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
        """Select and attend."""
        return self.method(q, k, v, ctx=self.context, dropout_p=dropout_p)

    def select(self, q: Tensor, k: Tensor) -> Selection:
        """Select only."""
        return self.method.select(q, k, self.context)

    def shown(self, q: Tensor, k: Tensor, selection: Selection) -> AnyPlan:
        """What takes part of a selection."""
        return self.method.shown(q, k, selection, self.context)


def names() -> list[str]:
    """Everything ``--attention`` accepts."""
    return ["dense", *methods.names()]


def cli_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate command-line options into the method's hyper-parameters."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        for field in FLAGS[name][1] if name in FLAGS else (name,):
            options[field] = value
    return options


FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nb": ("hash-sparse", ("nb",)),
    "window_heads": ("hash-sparse", ("window_heads",)),
    "planes": ("hash-sparse", ("planes",)),
    "drop": ("qk-sparse", ("q_drop", "k_drop")),
    "window": ("window", ("window",)),
}
"""Short names of fields on the command line, for any method that has them; `--help` asks the one named."""


def build(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    tied: bool = False,
    context: Mapping[str, Any] | None = None,
) -> Attention:
    """Make the attention of one layer.

    Parameters
    ----------
    name : str
        ``"dense"`` or a registry slug.
    options : mapping, optional
        Hyper-parameters of the method.
    seed : int
        For methods that have one and are not given one; other layers, other seeds, other random planes.
    tied : bool
        Whether k is q normalised. A token that saw itself would then see little else, so it does not.
    context : mapping, optional
        What the method may read at every call, such as the step.
    """
    options = dict(options or {})
    if name == "dense":
        if options:
            raise TrainError(f"dense attention takes no options; remove {', '.join(sorted(options))}")
        return dense
    if name not in names():
        raise TrainError(f"--attention {name!r} is unknown; choose one of: {', '.join(names())}")
    has = {field.name for field in dataclasses.fields(methods.find(name))}
    if "seed" in has:
        options.setdefault("seed", seed)
    if tied and "include_self" in has:
        options.setdefault("include_self", False)
    return Sparse(methods.get(name, **options), {} if context is None else context)

"""MoA: a window per head, whose size grows with the prompt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import SparseFlashError, require
from ...ops._arguments import is_finite
from .base import Policy
from .streaming_llm import StreamingLLM

Rules = tuple[tuple[float, float], ...]
"""alpha and beta of each KV head of a layer."""


@dataclass(frozen=True)
class MoA(StreamingLLM):
    """Each KV head keeps the first tokens and its own window: `alpha + beta * prompt` keys in total.

    Some heads look far, most do not. Rules are found once for a model, from the gradient of its loss with
    respect to attention. The prompt fixes how many keys a head keeps; this stays constant while tokens are
    generated.

    Paper: Fu et al., "MoA: Mixture of Sparse Attention", arXiv 2406.14909, section 3.2: 64 first tokens, at
    least 128 keys per head, in multiples of 64.
    head below 128 keys, whole blocks of 64.

    Parameters
    ----------
    rules : tuple of tuple of (float, float)
        (alpha, beta) of each KV head, for each layer; a single entry is used for all layers.
    sinks : int
        First tokens, always kept; they count towards the total.
    least, block : int
        Minimum number of keys per head, and the multiple to round up to.
    budget, recent
        Ignored: the rules give the number of keys.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.MoA(rules=(((0, 0.125), (64, 0.5)),)))
    >>> out = cache.attend(torch.randn(1, 4, 1000, 32), *torch.randn(2, 1, 2, 1000, 32))
    >>> cache.held.tolist()
    [[128, 576]]
    """

    sinks: int = 64
    rules: tuple[Rules, ...] = ()
    least: int = 128
    block: int = 64

    paper = "arXiv 2406.14909"

    def __post_init__(self) -> None:
        super().__post_init__()
        good = bool(self.rules) and all(_are_rules(own) for own in self.rules)
        require(
            (
                good,
                lambda: f"rules={self.rules!r}: expected ((alpha, beta) of each KV head) of each layer",
            )
        )

    def of_layer(self, layer: int, layers: int) -> Policy:
        """The policy with the rules of that layer only."""
        if len(self.rules) == 1:
            return self
        require((layer < len(self.rules), f"rules of {len(self.rules)} layers: there is no layer {layer}"))
        return dataclasses.replace(self, rules=self.rules[layer : layer + 1])

    def most(self, tokens: Tensor, prompt: Tensor, heads: int) -> Tensor:
        """Apply the rules to each prompt length, for each head."""
        rules = torch.tensor(self.rules[0], dtype=torch.float64, device=prompt.device)
        if len(rules) != heads:
            raise SparseFlashError(f"MoA has rules of {len(rules)} KV heads: the layer has {heads}")
        each = (rules[:, 0] + rules[:, 1] * prompt[:, None]).clamp(min=self.least)
        return (each / self.block).ceil().long() * self.block


def _are_rules(own: object) -> bool:
    """Whether `own` is a pair of numbers for each head."""
    return isinstance(own, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(is_finite(x) for x in pair) for pair in own
    )

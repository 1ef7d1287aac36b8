"""MoA: a window of its own for each head, which grows with the prompt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import SparseFlashError, require
from .base import Policy
from .streaming_llm import StreamingLLM

Rules = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class MoA(StreamingLLM):
    """Each KV head keeps the first tokens and a window of its own: `alpha + beta * prompt` keys together.

    Some heads look far, most do not. Rules are found for a model once, from the gradient of its loss by its
    attention. How much a head keeps is settled by the prompt, and stays while tokens are generated.

    Paper: Fu et al., "MoA: Mixture of Sparse Attention", arXiv 2406.14909, section 3.2: 64 first tokens, no
    head below 128 keys, whole blocks of 64.

    Parameters
    ----------
    rules : tuple of (float, float), or a tuple of these
        alpha and beta of each KV head, for all layers; or that for each layer.
    sinks : int
        First tokens that stay; they count.
    least, block : int
        The least number of keys of a head, and what numbers are rounded up to.
    budget, recent
        Of no effect: the rules say how many keys stay.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.MoA(rules=((0, 0.125), (64, 0.5))))
    >>> out = cache.attend(torch.randn(1, 4, 1000, 32), *torch.randn(2, 1, 2, 1000, 32))
    >>> cache.held.tolist()
    [[128, 576]]
    """

    sinks: int = 64
    rules: Rules | tuple[Rules, ...] = ()
    least: int = 128
    block: int = 64

    paper = "arXiv 2406.14909"

    def __post_init__(self) -> None:
        super().__post_init__()
        require((bool(self.rules), "MoA has no rules: expected (alpha, beta) for each KV head"))

    def of_layer(self, layer: int, layers: int) -> Policy:
        """With the rules of that layer."""
        if not isinstance(self.rules[0][0], tuple):
            return self
        require((layer < len(self.rules), f"rules of {len(self.rules)} layers: there is no layer {layer}"))
        return dataclasses.replace(self, rules=self.rules[layer])

    def most(self, tokens: int, prompt: int, heads: int) -> Tensor:
        """What the rules say of the prompt, for each head."""
        if len(self.rules) != heads:
            raise SparseFlashError(f"MoA has rules of {len(self.rules)} KV heads: the layer has {heads}")
        each: list[float] = [max(self.least, alpha + beta * prompt) for alpha, beta in self.rules]  # type: ignore[operator, misc]  # of one layer
        return torch.tensor([-(-int(x) // self.block) * self.block for x in each])

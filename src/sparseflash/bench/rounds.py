"""Find the layer of a model that may choose chat rounds for all layers above it (RoundAttention)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods.round_attention import round_mass


@torch.no_grad()
def masses(model: Any, ids: Tensor, starts: Sequence[int]) -> dict[int, Tensor]:
    """Attention of later rounds on the rounds before them, for every layer: `[questions, n]`.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor
        Integers `[1,T]`.
    starts : sequence of int
        Begin of each round. Rounds of the second half are the questions; each row sums to 1.
    """
    from sparseflash.integrations.transformers import attention_layers
    from sparseflash.integrations.transformers.control import attached, on_sparse

    chosen = [layer for layer in attention_layers(model) if not layer.windowed]
    edges, found = torch.tensor([*starts, ids.shape[1]]), {}

    def listener(number: int) -> Callable[..., Tensor]:
        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
            told = {name: options[name] for name in ("scale", "softcap")}
            rows = []
            for n in range(len(starts) // 2, len(starts)):
                a, b = int(edges[n]), int(edges[n + 1])
                given = round_mass(q[:, :, a:b], k[:, :, :b], edges[: n + 1].to(q.device), a, **told)
                rows.append(torch.nn.functional.pad(given[0] / given[0].sum(), (0, len(starts) - n)))
            found[number] = torch.stack(rows).cpu()
            return sf.attention(q, k, v, mask.plan, **options)

        return attend

    with on_sparse(model), attached(chosen, [listener(layer.index) for layer in chosen]):
        model.base_model(ids, use_cache=False)
    return found


def likeness(mass: Mapping[int, Tensor]) -> dict[int, float]:
    """Mean similarity of a layer's round weights to those of each layer above: 1 is equal, 0 disjoint.

    It is 1 minus half the sum of absolute differences; the last layer has none above and no entry.
    """
    layers = sorted(mass)
    return {
        number: sum(1 - float((mass[number] - mass[other]).abs().sum(-1).mean()) / 2 for other in layers[n:])
        / len(layers[n:])
        for n, number in enumerate(layers[:-1], 1)
    }


def watershed(alike: Mapping[int, float], least: float = 0.75) -> int:
    """First layer from which on all layers are at least that similar to those above them."""
    found = None
    for number in sorted(alike, reverse=True):
        if alike[number] < least:
            break
        found = number
    if found is None:
        raise SparseFlashError(
            f"no layer is like those above it by {least}: the last but one by {alike[max(alike)]:.2f}; "
            "ask for less, --alike"
        )
    return found

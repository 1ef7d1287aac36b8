"""Plans from the keys that the indexers of learned sparse models chose.

DeepSeek-V3.2, GLM-DSA and their relatives pass `indices` [B,S,topk] to the registered attention function,
MiniMax-M3 passes `block_indices` [B,Hkv,S,topk], both padded with -1. Layers that share a choice share its
plan.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...common.errors import SparseFlashError
from ...plan import Plan
from ...plan.stamps import Last
from .mask import SparseMask

_last: Last[Plan] = Last()
"""The last choice and mask that were read, and their plan."""


def learned_plan(
    module: nn.Module, mask: SparseMask, indices: Tensor | None, block_indices: Tensor | None
) -> Plan:
    """Build the plan of an indexer's choice, restricted to what the mask shows each query.

    Parameters
    ----------
    module : nn.Module
        The attention layer; `module.indexer.block_size` is the number of keys per block.
    mask : SparseMask
        Keys that each query may attend to.
    indices : Tensor, optional
        Integers `[B,S,topk]`: key indices, shared by all heads.
    block_indices : Tensor, optional
        Integers `[B,Hkv,S,topk]`: block indices for each KV head.
    """
    if indices is not None and block_indices is not None:
        raise SparseFlashError(
            f"{type(module).__name__} gives both indices and block_indices: expected one of them"
        )
    chosen = indices if indices is not None else block_indices
    assert chosen is not None
    if known := _last.get(mask, chosen):
        return known[0]
    unit = 1
    if block_indices is not None:
        size = getattr(getattr(module, "indexer", None), "block_size", None)
        if not isinstance(size, int):
            raise SparseFlashError(
                f"{type(module).__name__} gives block_indices, but has no indexer.block_size: how many keys "
                "a block has is not known"
            )
        unit = size
    Tk = mask.shape[3]
    if mask.by_rule:
        plan = Plan.from_choice(
            chosen, Tk=Tk, unit=unit, causal=mask.causal, q_offset=mask.offset, k_keep=mask.tokens
        )
    else:
        plan = Plan.from_choice(_visible(chosen, mask, unit), Tk=Tk, causal=False)
    return _last.keep(plan, mask, chosen)


def _visible(chosen: Tensor, mask: SparseMask, unit: int) -> Tensor:
    """Expand a choice to key indices that the mask shows, -1 for others (documents, windows, user masks)."""
    chosen = chosen if chosen.dim() == 4 else chosen[:, None]
    if unit > 1:
        lanes = torch.arange(unit, device=chosen.device)
        chosen = torch.where(chosen[..., None] < 0, -1, chosen[..., None] * unit + lanes).flatten(-2)
    Tk = mask.shape[3]
    chosen = torch.where(chosen < Tk, chosen, -1)
    keep = mask.to_dense().expand(-1, chosen.shape[1], -1, -1)
    return torch.where(keep.gather(-1, chosen.clamp(min=0).long()), chosen, -1)

"""Indexers of learned sparse models with streamed scores: same weights, same choice, linear memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...common.errors import SparseFlashError
from ...ops.indexer import indexer_topk
from .mask import MaskRows, SparseMask, on_host

PAIRS = {"DeepseekV32Indexer": False, "AXK2Indexer": False, "GlmMoeDsaIndexer": True}
"""Supported indexers: True if rotary dimensions are adjacent pairs, False if they are half a head apart."""


BLOCKS = "MiniMaxM3VLIndexer"
"""The indexer that chooses key blocks: a block's score is the best product in it, per head."""
HELD = 32 << 20
"""Limit in bytes of the scores that a block choice holds at once (at least those of one query)."""


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """Apply rotary embedding to [B,S,h,D]; cos and sin [B,S,D] contain their first half twice."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class StreamedIndexer(nn.Module):
    """A drop-in replacement of a model's indexer with the same weights, whose scores are never stored.

    The stock module holds `heads * S * T` fp32 scores (8 GiB for one layer of DeepSeek-V3.2 at 4096 tokens).
    Calls with masks other than causality and padding go to the stock module.

    Parameters
    ----------
    stock : nn.Module
        Indexer module of DeepSeek-V3.2, GLM-DSA or A.X-K2.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        name = type(stock).__name__
        if name not in PAIRS:
            raise SparseFlashError(
                f"{name} is not known as an indexer: expected one of {', '.join(PAIRS)}. Its choice also "
                "runs as it is, with attn_implementation='sparse'"
            )
        self.stock, self.pairs = stock, PAIRS[name]

    def project(
        self, hidden_states: Tensor, q_resid: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q_index `[B,H,S,D]`, k_index `[B,S,D]` and weights `[B,H,S]`, with gradients.

        These are inputs of `indexer_topk` and `indexer_kl_loss`, whose `scale` (`index_scale`) is
        `stock.softmax_scale`.
        """
        own: Any = self.stock
        q = own.wq_b(q_resid).unflatten(-1, (own.n_heads, own.head_dim))
        k = own.k_norm(own.wk(hidden_states))[:, :, None]
        width = own.qk_rope_head_dim
        q, k = (
            torch.cat([_rotate(x[..., :width], *position_embeddings, self.pairs), x[..., width:]], -1)
            for x in (q, k)
        )
        weights = own.weights_proj(hidden_states.to(own.weights_proj.weight.dtype)).float()
        return q.transpose(1, 2), k[:, :, 0], (weights * own.n_heads**-0.5).transpose(1, 2)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Choose keys, int32 `[B,S,topk]`, padded with -1."""
        own: Any = self.stock
        mask = attention_mask.mask if isinstance(attention_mask, MaskRows) else None
        if not isinstance(mask, SparseMask) or not mask.by_rule:
            return own(
                hidden_states,
                q_resid,
                position_embeddings,
                attention_mask,
                position_ids,
                past_key_values=past_key_values,
            )
        q, k, weights = self.project(hidden_states, q_resid, position_embeddings)
        if past_key_values is not None:
            k = past_key_values.update_indexer(k, own.layer_idx)
        return indexer_topk(
            q,
            k.to(q.dtype),
            weights,
            own.index_topk,
            causal=mask.causal,
            q_offset=mask.offset,
            k_keep=mask.tokens,
            scale=own.softmax_scale,
        )


class StreamedBlockIndexer(nn.Module):
    """A drop-in replacement of MiniMax-M3's indexer with the same weights, run on tiles of queries.

    The stock module holds `heads * S * T` fp32 scores. This one holds scores of as many queries as fit into
    `HELD` bytes, over keys up to the last of these queries, and chooses the same blocks.

    Parameters
    ----------
    stock : nn.Module
        Indexer module of a MiniMax-M3 layer.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock, self.block_size = stock, stock.block_size

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        position_ids: Tensor,
    ) -> Tensor:
        """Choose blocks, `[B,heads,S,topk]`, padded with -1."""
        own: Any = self.stock
        q, k = (
            norm(project(hidden_states).unflatten(-1, (-1, own.head_dim)))
            for project, norm in ((own.q_proj, own.q_norm), (own.k_proj, own.k_norm))
        )
        cos, sin = (x[..., : own.head_dim] for x in position_embeddings)
        width = cos.shape[-1]
        q, k = (
            torch.cat([_rotate(x[..., :width], cos, sin, False), x[..., width:]], -1).transpose(1, 2)
            for x in (q, k)
        )
        if past_key_values is not None:
            k = past_key_values.layers[own.layer_idx].update_index(k)
        (B, H, S, _), T = q.shape, k.shape[2]
        k, topk = k.float().transpose(-1, -2), min(own.topk_blocks, -(-T // self.block_size))
        position_ids = position_ids.expand(B, S)
        rows = max(1, HELD // (4 * B * H * max(T, 1)))
        return torch.cat(
            [
                self._choose(q[:, :, a : a + rows], k, position_ids[:, a : a + rows], topk)
                for a in range(0, S, rows)
            ],
            2,
        )

    def _choose(self, q: Tensor, k: Tensor, at: Tensor, topk: int) -> Tensor:
        own: Any = self.stock
        last = int(at.amax()) + 1 if on_host(at) else k.shape[-1]
        scores = torch.matmul(q.float(), k[..., :last])
        later = torch.arange(scores.shape[-1], device=at.device) > at[:, None, :, None]
        scores = pad(
            scores.masked_fill_(later, -torch.inf), (0, -scores.shape[-1] % self.block_size), value=-torch.inf
        )
        best = scores.unflatten(-1, (-1, self.block_size)).amax(-1)
        local = at[..., None] // self.block_size - torch.arange(own.local_blocks, device=at.device)
        best.scatter_(-1, local.clamp(min=0)[:, None].expand(-1, best.shape[1], -1, -1), torch.inf)
        score, index = best.topk(min(topk, best.shape[-1]))
        return pad(index.masked_fill(score == -torch.inf, -1), (0, topk - index.shape[-1]), value=-1)


@contextmanager
def streamed(model: nn.Module) -> Iterator[nn.Module]:
    """Replace a model's indexers by streamed ones inside the block; the stock ones return afterwards.

    Examples
    --------
    ::

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sparse")
        with sf.transformers.streamed(model):
            model.generate(**inputs)

    Raises
    ------
    SparseFlashError
        If the model has no known indexer.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ in (*PAIRS, BLOCKS)
    ]
    if not found:
        raise SparseFlashError(
            f"{type(model).__name__} has no indexer among {', '.join((*PAIRS, BLOCKS))}: its own choice "
            "runs as it is, with attn_implementation='sparse'"
        )
    try:
        for parent, name, child in found:
            made = StreamedBlockIndexer if type(child).__name__ == BLOCKS else StreamedIndexer
            setattr(parent, name, made(child))
        yield model
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)

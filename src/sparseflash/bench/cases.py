"""The attentions that are measured: a label, a callable, and how far its length is worth going."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.train.attention import Attention, build, dense

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One line of a plot.

    Attributes
    ----------
    label : str
        Name in tables and plots.
    attention : callable
        ``(q, k, v) -> out``; selection, sorting and gathering happen inside it.
    family : str
        Cases of a family share a colour.
    longest : int or None
        Not measured beyond this length.
    """

    label: str
    attention: Attention
    family: str
    longest: int | None = None


def curves() -> list[Case]:
    """Dense, naive, Reformer, hash-sparse and QK-sparse, as in the paper's runtime figures."""
    cases = [
        Case("dense (torch SDPA)", dense, "dense"),
        Case("naive masked, 16 buckets", naive(16), "naive", longest=4096),
        Case("reformer", build("reformer"), "reformer"),
    ]
    cases += [
        Case(f"hash-sparse, {nb} buckets", build("hash-sparse", {"nb": nb}), "hash-sparse")
        for nb in (4, 16, 64)
    ]
    cases += [
        Case(
            f"qk-sparse, {drop:.0%} dropped",
            build("qk-sparse", {"q_drop": drop, "k_drop": drop}),
            "qk-sparse",
        )
        for drop in (0.3, 0.5, 0.7)
    ]
    return cases


def naive(nb: int, seed: int = 0) -> Attention:
    """Hash-sparse attention the plain way: the same visible pairs as a boolean T x T mask for torch SDPA."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            planes = F.normalize(torch.randn(q.shape[1], q.shape[-1], nb // 2, generator=generator), dim=1)
            bucket = [torch.cat([y, -y], -1).argmax(-1) for y in (x.float() @ planes for x in (q, k))]
            keep = (bucket[0][..., :, None] == bucket[1][..., None, :]).tril_()
            empty = ~keep.any(-1, keepdim=True)  # a row without any visible key would be NaN
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep | empty)
        return out.masked_fill(empty, 0.0)

    return attention


def inputs(
    length: int, *, batch: int = 1, heads: int = 4, dim: int = 64, dtype: str = "fp32", seed: int = 0
) -> list[Tensor]:
    """Independent normal q, k, v and dout [batch, heads, length, dim]; q, k, v require gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(batch, heads, length, dim, generator=generator).to(DTYPES[dtype]) for _ in range(4)
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def forward_backward(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> Callable[[], Any]:
    """A call that runs `attention` forward and backward."""
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), dout)

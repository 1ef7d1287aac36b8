"""Packed documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Plan
from .base import Context, Method, Selection, check_counts, check_square


@dataclass(frozen=True)
class Documents(Method):
    """Tokens attend inside their own document; many documents are packed into one row.

    For training without padding: the result equals that of separate documents, and tiles end where documents
    do, so nothing leaks between them. Without `cu_seqlens` the row is cut into documents of `length` tokens
    (chunked attention). `sparseflash.attention_varlen` does the same with FlashAttention's names.

    Paper: Kundu et al., "Enhancing Training Efficiency Using Packing with Flash Attention", arXiv 2407.09105.

    Parameters
    ----------
    length : int
        Tokens per document if `ctx` has no `cu_seqlens`.
    causal : bool
        Hide keys later than the query.
    window : int, optional
        Visible keys, the query's own included; by default the whole document.

    Notes
    -----
    `ctx` keys: `cu_seqlens [n+1]`, running totals of document lengths, from 0.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 4, 32)
    >>> edges = torch.tensor([0, 1, 4])
    >>> plan = sf.methods.Documents().select(q, k, {"cu_seqlens": edges}).plan
    >>> plan.to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    """

    length: int = 512
    causal: bool = True
    window: int | None = None

    reads = ("cu_seqlens",)
    paper = "arXiv 2407.09105"
    phases = ("training", "prefill")

    def __post_init__(self) -> None:
        check_counts(self, 1, "length", *(["window"] if self.window is not None else []))

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads and batch slots."""
        T = check_square(self, q, k)
        edges = (ctx or {}).get("cu_seqlens")
        if edges is None:
            edges = (torch.arange(-(-T // self.length) + 1, device=q.device) * self.length).clamp(max=T)
        reach = None if self.window is None else self.window - 1
        window = (reach, None if self.causal else reach)
        return Selection(Plan.from_documents(edges, Tq=T, Tk=T, causal=self.causal, window=window))

"""Sliding window with attention sinks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..plan import Plan
from .base import Context, Method, Selection, check_counts


@dataclass(frozen=True)
class SinkWindow(Method):
    """Each query sees the last `window` keys, its own included, and the first `sink_tokens` of the sequence.

    Models trained with dense attention put surplus attention on the first tokens (sinks); a window without
    them breaks the model, one that keeps them does not. The plan is one `Plan.dense`: two spans a tile.

    Paper: Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention Sinks", arXiv
    2309.17453, section 3.2. Positions are the original ones (the paper also renumbers them in its cache).

    Parameters
    ----------
    window : int
        Visible keys, the query's own position included, >= 1: distances 0 .. window - 1.
    sink_tokens : int
        First tokens that every later query sees, >= 0.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query (int or int32 tensor, 0-d or [B]); 0 by default.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 4, 32)
    >>> method = sf.methods.SinkWindow(window=1, sink_tokens=1)
    >>> method.select(q, k).plan.to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    """

    window: int = 512
    sink_tokens: int = 4

    reads = ("q_offset",)
    paper = "arXiv 2309.17453"
    phases = ("training", "prefill", "decode")
    by_shape = True
    decodes = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "window")
        check_counts(self, 0, "sink_tokens")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads."""
        return Selection(
            Plan.dense(
                q.shape[2],
                k.shape[2],
                causal=True,
                window=(self.window - 1, 0),
                sink_tokens=self.sink_tokens,
                q_offset=(ctx or {}).get("q_offset", 0),
                device=q.device,
            )
        )

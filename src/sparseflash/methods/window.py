"""Sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..common.errors import require
from ..plan import Plan
from ..plan.options import is_count
from .base import Context, Method, Selection, check_counts


@dataclass(frozen=True)
class Window(Method):
    """Each query sees the last `window` keys, its own included; without `causal`, later keys too.

    The cheapest sparse attention, and a strong one for local dependencies. The plan is one `Plan.dense`: a
    span a tile.

    Paper: Beltagy, Peters, Cohan, "Longformer", arXiv 2004.05150, section 3.1 (causal: Mistral, arXiv
    2310.06825).

    Parameters
    ----------
    window : int
        Visible keys, the query's own position included, >= 1: distances 0 .. window - 1.
    causal : bool
        Hide keys later than the query.
    ahead : int, optional
        Without `causal`: visible keys after the query's own, >= 0; window - 1 by default.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query (int or int32 tensor, 0-d or [B]); 0 by default.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 300, 32)
    >>> sf.methods.Window(window=64)(q, k, v).shape
    torch.Size([1, 2, 300, 32])
    >>> sf.methods.Window(window=2).select(q[:, :, :4], k[:, :, :4]).plan.to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    window: int = 512
    causal: bool = True
    ahead: int | None = None

    reads = ("q_offset",)
    paper = "arXiv 2004.05150"
    phases = ("training", "prefill", "decode")
    by_shape = True
    decodes = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "window")
        fits = self.ahead is None or (is_count(self.ahead) and not self.causal)
        said = f"ahead={self.ahead!r}: expected an int >= 0, and causal=False (got causal={self.causal})"
        require((fits, said))

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads."""
        reach = self.window - 1
        ahead = reach if self.ahead is None else self.ahead
        return Selection(
            Plan.dense(
                q.shape[2],
                k.shape[2],
                causal=self.causal,
                window=(reach, 0 if self.causal else ahead),
                q_offset=(ctx or {}).get("q_offset", 0),
                device=q.device,
            )
        )

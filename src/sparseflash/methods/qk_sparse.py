"""QK-sparse attention: any subset of queries and any subset of keys, per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import require
from ..ops.attention import attention
from ..plan import Plan
from ..selection.orders import random_bits
from .base import Context, Method, Selection, check_qk, check_tokens


def random_keep(
    B: int,
    H: int,
    T: int,
    drop: float,
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw independent keep masks, bool `[B, H, T]`: each token is dropped with probability `drop`.

    Counter-based: every bit is a function of (seed, step, stream, batch slot, head, token) alone, so the
    same call gives the same masks on every device, a longer T extends a shorter one, and no generator is
    used. The rate is exact to 2^-32.

    Examples
    --------
    >>> from sparseflash.methods.qk_sparse import random_keep
    >>> round(random_keep(1, 4, 10_000, 0.3, seed=0).float().mean().item(), 2)
    0.7
    """
    bits = random_bits(B, H, T, seed=seed, streams=(step, stream), device=device)
    return bits >= round(drop * 2**32)


@dataclass(frozen=True)
class QKSparse(Method):
    """Drop queries and keys per head; kept queries attend exactly to kept keys, causal in original order.

    Cost is about (1 - q_drop)(1 - k_drop) of dense. A dropped query has output 0 (a residual stream
    carries it), a dropped key is seen by no query. The caller chooses which tokens to drop; at random, as in
    the paper's language models, it is a strong regulariser at 30 % and still learns at 70 %.

    Paper: Pagliardini, Paliotta, Jaggi, Fleuret, "Faster Causal Attention Over Large Sequences Through
    Sparse Flash Attention", arXiv 2306.01160 (QK-sparse; its random dropping).

    Parameters
    ----------
    q_drop, k_drop : float
        Fraction of queries and of keys dropped at random, per query head and per KV head, in [0, 1].
    seed : int
        Seed of the masks, which also depend on `ctx["step"]`, batch slot, head and token, and nothing else.
    include_self : bool
        Whether a token sees its own key (False for tied, normalised q and k).

    Notes
    -----
    `ctx` keys: `q_keep [B|1, H|1, Tq]` and `k_keep [B|1, H|1, Tk]`, bool or uint8, True = kept,
    replace the random masks (either or both); `step`, an int, selects different masks for every training
    step. Without `step` the same positions are dropped at every call. Dropping stays on in evaluation, as
    in the paper.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 4, 300, 32)
    >>> method = sf.methods.QKSparse(q_drop=0.3, k_drop=0.3, seed=1)
    >>> out = method(q, k, v, ctx={"step": 7})
    >>> dropped = ~method.keep(q, k, step=7)[0]
    >>> bool((out[dropped] == 0).all())
    True
    """

    q_drop: float = 0.5
    k_drop: float = 0.5
    seed: int = 0
    include_self: bool = True

    reads = ("q_keep", "k_keep", "step")
    paper = "arXiv 2306.01160"
    phases = ("training", "prefill")

    def __post_init__(self) -> None:
        for name in ("q_drop", "k_drop"):
            rate = getattr(self, name)
            require(
                (
                    isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate <= 1,
                    lambda: f"{name}={rate!r}: expected a fraction between 0 and 1",
                )
            )

    def keep(self, q: Tensor, k: Tensor, *, step: int = 0) -> tuple[Tensor, Tensor]:
        """Draw the random masks of a call: `q_keep [B,Hq,Tq]`, `k_keep [B,Hkv,Tk]`."""
        masks = (
            random_keep(*x.shape[:3], drop, seed=self.seed, step=step, stream=stream, device=x.device)
            for stream, (x, drop) in enumerate(((q, self.q_drop), (k, self.k_drop)))
        )
        q_keep, k_keep = masks
        return q_keep, k_keep

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Make the plan of the given or the random masks."""
        ctx = ctx or {}
        q_keep, k_keep = ctx.get("q_keep"), ctx.get("k_keep")
        if q_keep is None or k_keep is None:
            drawn = self.keep(q, k, step=ctx.get("step") or 0)
            q_keep = drawn[0] if q_keep is None else q_keep
            k_keep = drawn[1] if k_keep is None else k_keep
        check_tokens("q_keep", q_keep, q.shape[2], q)
        check_tokens("k_keep", k_keep, k.shape[2], q)
        return Selection(Plan.from_keep(q_keep, k_keep, include_self=self.include_self))


def qk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_keep: Tensor,
    k_keep: Tensor,
    *,
    scale: float | None = None,
    include_self: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of the kept queries over the kept keys, forward and backward (SCFA).

    `o_i = sum over j <= i, k_keep_j of softmax(scale q_i . k_j) v_j` where query i is kept, else 0; i and j
    are positions in the original sequences, which both start at 0.

    Paper: Pagliardini et al., arXiv 2306.01160 (QK-sparse).

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`; Tq may differ from Tk.
    q_keep, k_keep : Tensor
        `[B|1, H|1, Tq]` and `[B|1, H|1, Tk]`, bool or uint8, True = kept; H any divisor of Hq (1 = all heads
        alike, Hkv = per KV head, Hq = per query head). Counts may differ from head to head.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    include_self : bool
        Whether a token may see the key at its own position.
    return_lse : bool
        Also return the log of the sum of exponentials, `[B,Hq,Tq]`; -inf where nothing is seen.
    backend : str, optional
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`; 0, with zero gradients, for a dropped query and for one without a visible kept
        key.

    Raises
    ------
    PlanError
        If masks have another dtype, shape or device.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 2, 4, 300, 32)
    >>> q_keep, k_keep = torch.rand(2, 2, 4, 300) > 0.5
    >>> out = sf.qk_sparse_attention(q, k, v, q_keep, k_keep)
    >>> bool((out[~q_keep] == 0).all())
    True
    """
    check_qk(q, k)
    check_tokens("q_keep", q_keep, q.shape[2], q)
    check_tokens("k_keep", k_keep, k.shape[2], q)
    plan = Plan.from_keep(q_keep, k_keep, include_self=include_self)
    return attention(q, k, v, plan, scale=scale, return_lse=return_lse, backend=backend)

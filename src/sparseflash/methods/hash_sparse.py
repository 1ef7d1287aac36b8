"""Hash-sparse attention: all keys of a query's own bucket, exactly; some heads may be causal windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require
from ..ops.attention import attention
from ..plan import Plan
from ..plan.options import earlier, is_count, spread_heads
from ..selection.orders import lsh_buckets, lsh_planes
from .base import Context, Method, Selection, check_counts, check_qk, check_tokens

_PLANES = ("per-head", "shared")


@dataclass(frozen=True)
class HashSparse(Method):
    """Each query sees every earlier key of its own hash bucket, per head, with 100 % coverage.

    Buckets come from angular hashing: queries and keys that point the same way share one with high
    probability, so the heaviest attention weights are kept. Cost is about 1/nb of dense for balanced
    buckets. The hash sees one token at a time: nothing about a token depends on later ones.

    Paper: Pagliardini, Paliotta, Jaggi, Fleuret, "Faster Causal Attention Over Large Sequences Through
    Sparse Flash Attention", arXiv 2306.01160 (hash-sparse); hashing after Reformer, arXiv 2001.04451.

    Parameters
    ----------
    nb : int
        Number of buckets, even; 1 is dense causal attention.
    planes : "per-head" or "shared"
        Random directions of each KV head's own (a group of query heads shares them), or the same for all
        heads.
    seed : int
        Fixes the planes: forward, recomputation, evaluation and every device hash alike. Give layers
        different seeds for different planes.
    include_self : bool
        Whether a token sees its own key, in all heads. The paper's tied q and k = q/|q| need False, lest
        a token sees little else; the first token of a bucket then sees nothing and has output 0.
    causal_heads : int
        This many of the last query heads are causal sliding windows instead, so that every token reaches
        its neighbours. Free to choose under GQA; a multiple of the group size shares the sorted keys of a
        group.
    window : int
        Keys that a window head sees, the query's own position included, >= 1.

    Notes
    -----
    `ctx`: `q_bucket [B|1, H|1, Tq]` and `k_bucket [B|1, H|1, Tk]`, any integer ids (of all
    heads, if some are windows, whose ids are ignored), replace the hash; `q_offset`, the position of the
    first query (int, or a tensor, 0-d or [B]), 0 by default.

    A window head is not another plan: the rule `window` may differ from head to head, so hashed and window
    heads run in one kernel call: no slower than two calls whose outputs are concatenated, and faster than a
    tuple of plans, whose parts are merged in fp32 over all heads.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 4, 300, 32)
    >>> method = sf.methods.HashSparse(nb=4, causal_heads=1, window=64)
    >>> method(q, k, v).shape
    torch.Size([1, 4, 300, 32])
    >>> plan = sf.methods.HashSparse(nb=4).select(q, k).plan
    >>> sf.methods.coverage(plan, *sf.methods.HashSparse(nb=4).buckets(q, k))
    1.0
    """

    nb: int = 16
    planes: str = "per-head"
    seed: int = 0
    include_self: bool = True
    causal_heads: int = 0
    window: int = 512

    reads = ("q_bucket", "k_bucket", "q_offset")
    paper = "arXiv 2306.01160"
    phases = ("training", "prefill")

    def __post_init__(self) -> None:
        require(
            (
                is_count(self.nb, 1) and (self.nb == 1 or self.nb % 2 == 0),
                f"nb={self.nb!r}: expected an even number of buckets, or 1 for dense",
            ),
            (self.planes in _PLANES, f"planes={self.planes!r}: expected one of {', '.join(_PLANES)}"),
        )
        check_counts(self, 0, "causal_heads")
        check_counts(self, 1 if self.include_self else 2, "window")

    def buckets(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The bucket of every query `[B,Hq,Tq]` and key `[B,Hkv,Tk]`, int32 in 0 .. nb - 1."""
        if self.nb == 1:
            q_bucket, k_bucket = (
                torch.zeros(x.shape[:3], dtype=torch.int32, device=x.device) for x in (q, k)
            )
            return q_bucket, k_bucket
        heads = k.shape[1] if self.planes == "per-head" else 1
        planes = lsh_planes(q.shape[-1], self.nb, heads=heads, seed=self.seed, device=q.device)[0]
        return lsh_buckets(q, planes), lsh_buckets(k, planes)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """The plan of the given or the hashed buckets, with the window heads behind."""
        ctx = ctx or {}
        given = [name for name in ("q_bucket", "k_bucket") if ctx.get(name) is not None]
        require((len(given) != 1, f"ctx holds {given} alone: buckets of queries and keys belong together"))
        require(
            (self.causal_heads <= q.shape[1], f"causal_heads={self.causal_heads}: q has {q.shape[1]} heads")
        )
        hashed = q.shape[1] - self.causal_heads
        q_offset = ctx.get("q_offset", 0)
        if not hashed:
            return Selection(self._windows(q, k, q_offset))
        if given:
            q_bucket, k_bucket, bound = ctx["q_bucket"], ctx["k_bucket"], None
            check_tokens("q_bucket", q_bucket, q.shape[2], q)
            check_tokens("k_bucket", k_bucket, k.shape[2], q)
        else:
            (q_bucket, k_bucket), bound = self.buckets(q, k), self.nb
        if not self.causal_heads:
            return Selection(self._bucket_plan(q_bucket, k_bucket, bound, q_offset))
        # the sorted keys of a KV head serve its whole group, unless windows begin inside the group
        Hq, Hkv = q.shape[1], k.shape[1]
        whole = self.causal_heads % (Hq // Hkv) == 0 and Hkv % k_bucket.shape[1] == 0
        k_heads = Hkv if whole else Hq
        plan = self._bucket_plan(
            spread_heads(q_bucket, Hq)[:, :hashed],
            spread_heads(k_bucket, k_heads)[:, : hashed * k_heads // Hq],
            bound,
            q_offset,
        )
        return Selection(Plan.by_head([plan, self._windows(q, k, q_offset)], [hashed, self.causal_heads]))

    def _bucket_plan(
        self, q_bucket: Tensor, k_bucket: Tensor, bound: int | None, q_offset: int | Tensor
    ) -> Plan:
        return Plan.from_buckets(
            q_bucket, k_bucket, include_self=self.include_self, buckets=bound, q_offset=q_offset
        )

    def _windows(self, q: Tensor, k: Tensor, q_offset: int | Tensor) -> Plan:
        """A causal window. Without the self pair: seen from one position earlier."""
        strict = int(not self.include_self)
        return Plan.dense(
            q.shape[2],
            k.shape[2],
            causal=True,
            window=(self.window - 1 - strict, 0),
            q_offset=earlier(q_offset, strict),
            device=q.device,
        )


def hash_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bucket: Tensor,
    k_bucket: Tensor,
    *,
    scale: float | None = None,
    include_self: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention inside equal buckets, forward and backward (SCFA).

    `o_i = sum over j <= i, k_bucket_j = q_bucket_i of softmax(scale q_i . k_j) v_j`; i and j are
    positions in the original sequences, which both start at 0. Every such pair is attended, whatever the
    sizes of the buckets.

    Paper: Pagliardini et al., arXiv 2306.01160 (hash-sparse).

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`; Tq may differ from Tk.
    q_bucket, k_bucket : Tensor
        `[B|1, H|1, Tq]` and `[B|1, H|1, Tk]`, any integer ids (hashes, cluster labels, documents,
        experts), negative ones too; H any divisor of Hq (1 = all heads alike, Hkv = per KV head, Hq = per
        query head).
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    include_self : bool
        Whether a token may see the key at its own position (False for tied q and k).
    return_lse : bool
        Also return the log of the sum of exponentials, `[B,Hq,Tq]`; -inf where nothing is seen.
    backend : str, optional
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`; 0, with zero gradients, for a query without an earlier key in its bucket.

    Raises
    ------
    PlanError
        Buckets that are not integers, or of another shape or device.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 2, 4, 300, 32)
    >>> q_bucket, k_bucket = torch.randint(8, (2, 2, 4, 300))
    >>> sf.hash_sparse_attention(q, k, v, q_bucket, k_bucket).shape
    torch.Size([2, 4, 300, 32])
    """
    check_qk(q, k)
    check_tokens("q_bucket", q_bucket, q.shape[2], q)
    check_tokens("k_bucket", k_bucket, k.shape[2], q)
    plan = Plan.from_buckets(q_bucket, k_bucket, include_self=include_self)
    return attention(q, k, v, plan, scale=scale, return_lse=return_lse, backend=backend)

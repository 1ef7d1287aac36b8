"""Hash-sparse attention: exact attention to all keys of a query's bucket, and optionally a window."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from ..common.errors import require
from ..ops.attention import attention
from ..plan import Plan, Plans
from ..plan.options import earlier, is_count, precise, spread_heads
from ..selection.clusters import kmeans
from ..selection.orders import lsh_buckets, lsh_planes
from .base import Context, Method, Selection, beside, check_counts, check_qk, check_tokens

_PLANES = ("per-head", "shared")
_BUCKETS = ("lsh", "kmeans")
_STRIDE = 0x9E3779B97F4A7C15
"""Difference of the seeds of two steps: so large that they do not collide with other seeds of a run."""


@dataclass(frozen=True)
class HashSparse(Method):
    """Each query sees every earlier key of its own bucket, per head, with 100 % coverage; and a window.

    Buckets come from angular hashing: queries and keys of similar direction share one with high probability,
    so the largest attention weights are kept. Cost is about 1/nb of dense for balanced buckets. A token is
    hashed by itself, so the selection is causal. If queries and keys are not tied, the nearest centroids of
    the keys find more of the mass than a hash does.

    Paper: Pagliardini, Paliotta, Jaggi, Fleuret, "Faster Causal Attention Over Large Sequences Through
    Sparse Flash Attention", arXiv 2306.01160 (hash-sparse); hashing after Reformer, arXiv 2001.04451;
    centroids after Routing Transformer, arXiv 2003.05997.

    Parameters
    ----------
    nb : int
        Number of buckets, even; 1 is dense causal attention.
    planes : "per-head" or "shared"
        Random directions per KV head (shared by its group of query heads), or the same for all heads.
    seed : int
        Seed of the planes: forward, recomputation, evaluation and every device hash alike. Give layers
        different seeds for different planes.
    include_self : bool
        Whether a token sees its own key, in all heads. The paper's tied q and k = q/|q| need False, because a
        token would otherwise see little else; the first token of a bucket then sees nothing: output 0.
    window : int
        Last keys that every head sees beside its bucket, the query's own position included; 0: the bucket
        alone. Language models need neighbours first, and buckets do not contain them.
    sink_tokens : int
        First tokens that every later query sees too; requires a window. A pretrained model uses them as
        attention sinks: dropping them costs more than dropping all other distant keys.
    window_heads : int
        This many of the last query heads see only a causal window. Any number is allowed under GQA; a
        multiple of the group size lets a group share its sorted keys.
    head_window : int
        Keys that such a head sees, the query's own position included, >= 1.
    buckets : "lsh" or "kmeans"
        A random hash, or the nearest of nb centroids of the keys (for a query: the largest product), which
        are computed at every call: the bucket of a key then depends on later keys.
    top : int
        With centroids: number of nearest clusters that a query sees.
    resample : bool
        Whether each `ctx["step"]` draws new planes, as the paper's released code does.

    Notes
    -----
    `ctx` keys: `q_bucket [B|1, H|1, Tq]` and `k_bucket [B|1, H|1, Tk]`, any integer ids (of all
    heads, also of window heads, where they are ignored), replace the hash; `q_offset`, the position of the
    first query (int, or a tensor, 0-d or [B]), 0 by default; `step`, with `resample`.

    Window heads need no second plan: `window` may differ from head to head, so hashed and window heads run in
    one kernel call. A window in every head is a second plan of the same softmax: its keys need no sorting,
    and the bucket plan then begins where the window ends.

    `causal_heads=` is the old name of `window_heads`; with it, `window` means `head_window`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 4, 300, 32)
    >>> method = sf.methods.HashSparse(nb=4, window=64)
    >>> method(q, k, v).shape
    torch.Size([1, 4, 300, 32])
    >>> method = sf.methods.HashSparse(nb=4)
    >>> sf.methods.coverage(method.select(q, k).plan, *method.ids(q, k))
    1.0
    """

    nb: int = 16
    planes: str = "per-head"
    seed: int = 0
    include_self: bool = True
    window: int = 0
    sink_tokens: int = 0
    window_heads: int = 0
    head_window: int = 512
    buckets: str = "lsh"
    top: int = 1
    resample: bool = False
    causal_heads: InitVar[int | None] = None

    reads = ("q_bucket", "k_bucket", "q_offset")
    paper = "arXiv 2306.01160"
    phases = ("training", "prefill")

    def __post_init__(self, causal_heads: int | None = None) -> None:
        if causal_heads is not None:
            warnings.warn(
                "HashSparse(causal_heads=, window=) is HashSparse(window_heads=, head_window=)",
                DeprecationWarning,
                stacklevel=4,
            )
            wide = self.window or self.head_window
            self._set(window_heads=causal_heads, head_window=wide, window=0)
        require(
            (
                is_count(self.nb, 1) and (self.nb == 1 or self.nb % 2 == 0),
                lambda: f"nb={self.nb!r}: expected an even number of buckets, or 1 for dense",
            ),
            (self.planes in _PLANES, lambda: f"planes={self.planes!r}: expected one of {', '.join(_PLANES)}"),
            (
                self.buckets in _BUCKETS,
                lambda: f"buckets={self.buckets!r}: expected one of {', '.join(_BUCKETS)}",
            ),
        )
        check_counts(self, 0, "window_heads", "window", "sink_tokens")
        require(
            (self.window != 1 or self.include_self, "window=1 without the self pair shows no key"),
            (
                self.window > 0 or not self.sink_tokens,
                lambda: f"sink_tokens={self.sink_tokens}: they are seen beside a window; give window=, too",
            ),
        )
        check_counts(self, 1 if self.include_self else 2, "head_window")
        check_counts(self, 1, "top")
        require(
            (
                self.top == 1 or self.buckets == "kmeans",
                lambda: f"top={self.top}: a hash has one bucket, centroids more",
            ),
            (self.top <= self.nb, lambda: f"top={self.top}: there are {self.nb} buckets"),
        )
        if self.resample:
            self._set(reads=(*type(self).reads, "step"))
        if self.buckets == "kmeans":
            self._set(causal_selection=False)

    def ids(self, q: Tensor, k: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Compute the bucket of every query `[B,Hq,Tq]` and key `[B,Hkv,Tk]`, int32 in 0 .. nb - 1.

        With `top` > 1, query buckets are `[top,B,Hq,Tq]`, the nearest first.
        """
        if self.nb == 1:
            q_bucket, k_bucket = (
                torch.zeros(x.shape[:3], dtype=torch.int32, device=x.device) for x in (q, k)
            )
            return q_bucket, k_bucket
        if self.buckets == "kmeans":
            return self._nearest(q.detach(), k.detach())
        heads = k.shape[1] if self.planes == "per-head" else 1
        seed = (self.seed + _STRIDE * int(step)) % 2**63 if self.resample else self.seed
        planes = lsh_planes(q.shape[-1], self.nb, heads=heads, seed=seed, device=q.device)[0]
        return lsh_buckets(q, planes), lsh_buckets(k, planes)

    def _nearest(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Cluster the keys, and find the centroids with the largest products for each query."""
        group = q.shape[1] // k.shape[1]
        with precise(q):  # the same selection under autocast
            label, centroid = kmeans(k, self.nb)
            product = q.unflatten(1, (-1, group)).to(centroid.dtype) @ centroid[:, :, None].mT
        best = product.flatten(1, 2).topk(self.top, -1).indices.int()
        return (best[..., 0] if self.top == 1 else best.movedim(-1, 0)), label

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Make the plans of the given or hashed buckets and of the windows."""
        ctx = ctx or {}
        given = [name for name in ("q_bucket", "k_bucket") if ctx.get(name) is not None]
        require(
            (len(given) != 1, lambda: f"ctx holds {given} alone: buckets of queries and keys belong together")
        )
        require(
            (
                self.window_heads <= q.shape[1],
                lambda: f"window_heads={self.window_heads}: q has {q.shape[1]} heads",
            )
        )
        hashed = q.shape[1] - self.window_heads
        q_offset = ctx.get("q_offset", 0)
        step = ctx.get("step") or 0 if self.resample else 0
        if not hashed:
            return Selection(self._windows(q, k, q_offset, self.head_window))
        if given:
            q_bucket, k_bucket, bound = ctx["q_bucket"], ctx["k_bucket"], None
            check_tokens("q_bucket", q_bucket, q.shape[2], q)
            check_tokens("k_bucket", k_bucket, k.shape[2], q)
        else:
            (q_bucket, k_bucket), bound = self.ids(q, k, step), self.nb
        if self.sink_tokens:  # the window shows them; an id of no query keeps buckets disjoint from it
            nobody = torch.minimum(q_bucket.amin(), k_bucket.amin()).long() - 1 if q_bucket.numel() else -1
            sink = torch.arange(k.shape[2], device=k.device) < self.sink_tokens
            k_bucket = torch.where(sink, nobody, k_bucket.long())
        ranks = list(q_bucket) if q_bucket.dim() == 4 else [q_bucket]
        if self.window_heads:
            # the sorted keys of a KV head serve its whole group, unless windows begin inside the group
            Hq, Hkv = q.shape[1], k.shape[1]
            whole = self.window_heads % (Hq // Hkv) == 0 and Hkv % k_bucket.shape[1] == 0
            k_heads = Hkv if whole else Hq
            ranks = [spread_heads(x, Hq)[:, :hashed] for x in ranks]
            k_bucket = spread_heads(k_bucket, k_heads)[:, : hashed * k_heads // Hq]
        plans = [self._bucket_plan(x, k_bucket, bound, q_offset) for x in ranks]
        if self.window:
            plans = [*plans, self._windows(q, k, q_offset, self.window)]
        if self.window_heads:
            windows = self._windows(q, k, q_offset, self.head_window)
            sides = [list(range(hashed)), list(range(hashed, q.shape[1]))]
            return Selection(beside([tuple(plans), (windows,)], sides))
        return Selection(plans[0] if len(plans) == 1 else Plans(plans))

    def _bucket_plan(
        self, q_bucket: Tensor, k_bucket: Tensor, bound: int | None, q_offset: int | Tensor
    ) -> Plan:
        """Plan of the buckets, without the keys that the window shows."""
        strict = self.include_self or self.window > 0
        at = earlier(q_offset, self.window)
        return Plan.from_buckets(q_bucket, k_bucket, include_self=strict, buckets=bound, q_offset=at)

    def _windows(self, q: Tensor, k: Tensor, q_offset: int | Tensor, width: int) -> Plan:
        """Plan of a causal window; without the self pair, query positions are one lower."""
        strict = int(not self.include_self)
        return Plan.dense(
            q.shape[2],
            k.shape[2],
            causal=True,
            window=(width - 1 - strict, 0),
            sink_tokens=self.sink_tokens,
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
        out `[B,Hq,Tq,Dv]`; 0, with zero gradients, for a query without a visible key in its bucket.

    Raises
    ------
    PlanError
        If buckets are not integers, or have another shape or device.

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

"""MuSe: attention between clusters of queries and clusters of keys, as two bucket-plan calls."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..backends.numerics import state_dtype
from ..common.errors import SparseFlashError, require
from ..ops.attention import attention
from ..ops.merge import merge
from ..ops.rows import take_rows
from ..plan import Plan
from ..plan.options import is_count
from ..selection.clusters import kmeans

WIDEST = 256
Memory = dict[tuple[int, int], tuple[Tensor, Tensor]]


@overload
def muse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    clusters: int = ...,
    causal: bool = ...,
    leaf: int = ...,
    dipole: bool = ...,
    iterations: int = ...,
    memory: Memory | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def muse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    clusters: int = ...,
    causal: bool = ...,
    leaf: int = ...,
    dipole: bool = ...,
    iterations: int = ...,
    memory: Memory | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def muse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    clusters: int = 64,
    causal: bool = False,
    leaf: int = 512,
    dipole: bool = False,
    iterations: int = 4,
    memory: Memory | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to summaries of key clusters, one per pair of query cluster and key cluster: O(T clusters D).

    k-means clusters queries and keys separately. For the mean query qa of cluster a and the keys n of cluster
    j, `w_aj = log sum_n exp(s qa.k_n)`, and kt_aj, vt_aj are the means of keys and values under that softmax.
    A query q of cluster a then attends to one key per key cluster: `logit_j = w_aj + s (q - qa).kt_aj`, value
    vt_aj (the monopole). This is exact at q = qa, with an error of first order in q - qa in the values; the
    dipole adds `s (sum_j pi_aj S_aj)^T (q - qa)`, S_aj the covariance of keys and values, and leaves second
    order.

    Causal: the sequence is halved recursively. Each later half attends to its earlier half by clusters,
    leaves attend exactly and causally, and all parts are merged. Query means are over a whole half, so an
    output depends slightly on later queries: use it for training and prefill, not for decoding.

    Paper: Mitchell and Kersting, "Multipole Semantic Attention", arXiv 2509.10406.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`, D + Dv up to 256; Tq = Tk if causal.
    clusters : int
        Query clusters, and key clusters, per head (and per half, if causal); at most the number of tokens.
    causal : bool
        Whether a query attends only to keys up to its own position.
    leaf : int
        If causal: size of the leaves, inside which attention is exact.
    dipole : bool
        Whether to add the dipole term: O(T clusters D Dv), seldom worth it on a CPU.
    iterations : int
        Iterations of k-means.
    memory : dict, optional
        Centroids kept from step to step: k-means starts from those in it and stores the new ones there. Use
        one dict per layer; a sequence of another length starts anew.
    scale : float, optional
        s, 1/sqrt(D) by default.
    return_lse : bool
        Also return the log-sum-exp, `[B,Hq,Tq]`, as approximate as out.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`, and lse. Gradients are exact, with cluster membership held constant.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 300, 32)
    >>> memory = {}
    >>> near = sf.muse_attention(0.2 * q, k, v, clusters=16, memory=memory)
    >>> bool((near - sf.attention(0.2 * q, k, v)).norm() < 0.3 * near.norm()), len(memory)
    (True, 1)
    >>> sf.muse_attention(q, k, v, clusters=8, causal=True, leaf=64).shape
    torch.Size([1, 2, 300, 32])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise SparseFlashError(f"{name}: {given}; expected floating point [B,H,T,D]")
    require(
        (is_count(clusters, 1), lambda: f"clusters={clusters!r}: expected a positive int"),
        (is_count(leaf, 1), lambda: f"leaf={leaf!r}: expected a positive int"),
        (is_count(iterations), lambda: f"iterations={iterations!r}: expected an int >= 0"),
        (
            k.shape[:3] == v.shape[:3] and q.shape[1] % max(1, k.shape[1]) == 0,
            lambda: (
                f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [B,Hq,Tq,D], "
                "[B,Hkv,Tk,D], "
                "[B,Hkv,Tk,Dv], Hq a multiple of Hkv"
            ),
        ),
        (
            k.shape[3] + v.shape[3] <= WIDEST,
            lambda: f"D + Dv = {k.shape[3] + v.shape[3]}: expected at most {WIDEST}",
        ),
        (
            not causal or q.shape[2] == k.shape[2],
            lambda: f"{q.shape[2]} queries and {k.shape[2]} keys: causal MuSe takes as many",
        ),
        (
            memory is None or isinstance(memory, dict),
            lambda: f"memory: {type(memory).__name__}; expected a dict",
        ),
    )
    memory = {} if memory is None else memory
    s = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not causal:
        out, lse = _far(q, k, v, s, clusters, dipole, iterations, memory, (0, k.shape[2]))
        return (out, lse) if return_lse else out
    T = q.shape[2]
    edges = torch.tensor([*range(0, T, leaf), T], device=q.device)
    parts = [attention(q, k, v, Plan.from_documents(edges, Tq=T, Tk=T), scale=s, return_lse=True)]
    for level in _levels(T, leaf):
        outs, sums, at = [], [], 0
        for lo, middle, hi in level:
            early, late = slice(lo, middle), slice(middle, hi)
            outs.append(torch.zeros_like(parts[0][0][:, :, at:middle]))
            sums.append(torch.full_like(parts[0][1][:, :, at:middle], -torch.inf))
            out, lse = _far(
                q[:, :, late],
                k[:, :, early],
                v[:, :, early],
                s,
                clusters,
                dipole,
                iterations,
                memory,
                (lo, hi),
            )
            outs.append(out)
            sums.append(lse)
            at = hi
        outs.append(torch.zeros_like(parts[0][0][:, :, at:]))
        sums.append(torch.full_like(parts[0][1][:, :, at:], -torch.inf))
        parts.append((torch.cat(outs, 2), torch.cat(sums, 2)))
    out, lse = merge(parts)
    return (out, lse) if return_lse else out


def _levels(T: int, leaf: int) -> list[list[tuple[int, int, int]]]:
    """(begin, middle, end) of the inner nodes of the halving tree, per level; middles are leaf edges."""
    found: list[list[tuple[int, int, int]]] = []
    now = [(0, T)]
    while now:
        split = []
        for lo, hi in now:
            leaves = -(-(hi - lo) // leaf)
            if leaves > 1:
                split.append((lo, lo + (leaves + 1) // 2 * leaf, hi))
        now = [half for lo, middle, hi in split for half in ((lo, middle), (middle, hi))]
        if split:
            found.append(split)
    return found


def _far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: float,
    clusters: int,
    dipole: bool,
    iterations: int,
    memory: Memory,
    place: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Non-causal MuSe: (out, lse)."""
    A, J = min(clusters, max(1, q.shape[2])), min(clusters, max(1, k.shape[2]))
    old = memory.get(place)
    fits = old is not None and old[0].shape[2] == A and old[1].shape[2] == J
    q_label, q_mean = kmeans(q, A, iterations=iterations, init=old[0] if old and fits else None)
    k_label, k_mean = kmeans(k, J, iterations=iterations, init=old[1] if old and fits else None)
    memory[place] = (q_mean, k_mean)
    wide, D = state_dtype(q), k.shape[-1]
    member = nn.functional.one_hot(q_label.long(), A).to(wide)  # [B, H, Tq, A]
    mean = (member / member.sum(2, keepdim=True).clamp(min=1)).mT @ q.to(wide)
    # Row j A + a: the mean query of cluster a, once per key cluster j; `attention` then makes kt_aj and
    # vt_aj.
    rows = mean.to(q.dtype).repeat(1, 1, J, 1)
    # for A = 2, J = 3: of_keys 0 0 1 1 2 2, of_queries 0 1 0 1 0 1
    of_keys = torch.arange(J, device=q.device).repeat_interleave(A)[None, None]
    of_queries = torch.arange(A, device=q.device).repeat(J)[None, None]
    tilt = Plan.from_buckets(of_keys, k_label, causal=False, buckets=J)
    both, w = attention(rows, k, torch.cat([k, v], -1), tilt, scale=s, return_lse=True)
    key, value = both[..., :D], both[..., D:]
    bias = w - s * (rows.to(wide) * key.to(wide)).sum(-1)
    meet = Plan.from_buckets(q_label, of_queries, causal=False, buckets=A)
    out, lse = attention(q, key, value, meet, scale=s, key_bias=bias, return_lse=True)
    if not dipole:
        return out, lse
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    weight = (s * mean @ keys.mT).softmax(-1)  # softmax of each query mean over all keys
    share = w.view(*w.shape[:2], J, A).softmax(2).to(wide)  # pi_aj, [B, H, J, A]
    own, seen = (x.to(wide).reshape(*x.shape[:2], J, A, x.shape[-1]) for x in (key, value))
    slopes = []
    for a in range(A):
        spread = (weight[:, :, a, :, None] * keys).mT @ values
        slopes.append(spread - (share[..., a, None] * own[..., a, :]).mT @ seen[..., a, :])
    far = q.to(wide) - take_rows(mean, q_label)
    slope = torch.stack(slopes, 2)  # [B, H, A, D, Dv]
    more = sum((member[..., a, None] * far) @ slope[:, :, a] for a in range(A))
    return (out.to(wide) + s * more).to(out.dtype), lse

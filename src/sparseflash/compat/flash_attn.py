"""The functions of flash-attn 2 over these kernels: change the import, and nothing else.

Arguments, their order, and layouts are those of flash-attn: `[batch, tokens, heads, dim]`, causality and
windows aligned to the bottom right, -1 = unbounded. They run on every machine, in fp32 too, forward and
backward. Three intended differences: a query without keys has lse -inf (flash-attn returns +inf),
`deterministic` is always true, and with `return_attn_probs` the third result, which flash-attn keeps for its
own tests, is None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops.attention import attention
from ..ops.decode import decode
from ..ops.varlen import attention_varlen
from ..plan import Plan
from ..plan.options import is_count

Result = Tensor | tuple[Tensor, Tensor, None]
FEW = 16
"""Up to this many queries, without gradients, `decode` is faster than `attention`."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
) -> Result:
    """Exact attention, with gradients, in flash-attn's layout.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Tq,Hq,D]`, `[B,Tk,Hkv,D]`, `[B,Tk,Hkv,Dv]`, any strides; `Hq` a multiple of `Hkv`.
    dropout_p : float
        Share of weights to drop; pass 0 in evaluation.
    softmax_scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    causal : bool
        Whether query i attends only to keys up to `i + Tk - Tq`: the last query to all keys.
    window_size : (left, right)
        Inclusive distances around `i + Tk - Tq`, -1 = unbounded.
    softcap : float
        c in `c * tanh(score / c)`; 0 is none.
    alibi_slopes : Tensor, optional
        fp32 `[Hq]` (or `[B,Hq]` with equal rows): `-slope * |i + Tk - Tq - j|` is added to the scores.
    deterministic : bool
        Accepted and ignored: results always are deterministic.
    return_attn_probs : bool
        Also return lse fp32 `[B,Hq,Tq]`, and None.

    Returns
    -------
    Tensor or (Tensor, Tensor, None)
        out `[B,Tq,Hq,Dv]`.

    References
    ----------
    Dao, FlashAttention-2 (https://arxiv.org/abs/2307.08691).

    Examples
    --------
    >>> import torch
    >>> from sparseflash.compat.flash_attn import flash_attn_func
    >>> q, k, v = torch.randn(3, 2, 128, 4, 64)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(31, 0)).shape
    torch.Size([2, 128, 4, 64])
    """
    _check("q [B,Tq,Hq,D], k [B,Tk,Hkv,D], v [B,Tk,Hkv,Dv]", 4, q=q, k=k, v=v)
    Tq, Tk = q.shape[1], k.shape[1]
    plan = Plan.dense(Tq, Tk, causal=causal, window=_sides(window_size), q_offset=Tk - Tq, device=q.device)
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        plan,
        scale=softmax_scale,
        softcap=softcap or None,
        dropout_p=dropout_p,
        return_lse=True,
        **_slopes(alibi_slopes, q.shape[2]),
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(qkv: Tensor, *options: Any, **named: Any) -> Result:
    """`flash_attn_func` of `qkv [B,T,3,H,D]`.

    Parameters
    ----------
    qkv : Tensor
    *options, **named
        As in `flash_attn_func`, from `dropout_p` on.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.compat.flash_attn import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.randn(2, 128, 3, 4, 64), causal=True).shape
    torch.Size([2, 128, 4, 64])
    """
    require((_packed(qkv, 5, 3), f"qkv: {_shape(qkv)}; expected [B,T,3,H,D]"))
    return flash_attn_func(*qkv.unbind(2), *options, **named)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *options: Any, **named: Any) -> Result:
    """`flash_attn_func` of `q [B,Tq,Hq,D]` and `kv [B,Tk,2,Hkv,D]`.

    Parameters
    ----------
    q, kv : Tensor
    *options, **named
        As in `flash_attn_func`, from `dropout_p` on.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.compat.flash_attn import flash_attn_kvpacked_func
    >>> flash_attn_kvpacked_func(torch.randn(2, 9, 4, 64), torch.randn(2, 128, 2, 2, 64)).shape
    torch.Size([2, 9, 4, 64])
    """
    require((_packed(kv, 5, 2), f"kv: {_shape(kv)}; expected [B,Tk,2,Hkv,D]"))
    return flash_attn_func(q, *kv.unbind(2), *options, **named)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention inside packed sequences, `q [total_q,Hq,D]`: `attention_varlen` in flash-attn's order.

    Parameters
    ----------
    q, k, v : Tensor
        `[total_q,Hq,D]`, `[total_k,Hkv,D]`, `[total_k,Hkv,Dv]`; with `block_table` k and v are pages
        `[pages, page_size, Hkv, D]`, and there are no gradients.
    cu_seqlens_q, cu_seqlens_k : Tensor
        Integers `[B + 1]`: prefix sums of the lengths, from 0.
    max_seqlen_q, max_seqlen_k : int, optional
        Accepted and ignored.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`, for each sequence. lse is `[Hq, total_q]`.
    block_table : Tensor, optional
        Integers `[B, n]`: page indices of each sequence; needs causal=True.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.compat.flash_attn import flash_attn_varlen_func
    >>> q, k, v = torch.randn(3, 300, 4, 64)
    >>> ends = torch.tensor([0, 100, 250, 300], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, ends, ends, 150, 150, causal=True).shape
    torch.Size([300, 4, 64])
    """
    scores: dict[str, Any] = {"softcap": softcap, "softmax_scale": softmax_scale}
    if block_table is not None:
        if dropout_p or alibi_slopes is not None or not causal:
            raise SparseFlashError(
                "flash_attn_varlen_func with block_table: expected causal=True, and no dropout or ALiBi; "
                "gather the pages, or make a plan: Plan.from_pages"
            )
        _check("q [total_q,Hq,D]", 3, q=q)
        _check("pages [pages,page_size,Hkv,D]", 4, k=k, v=v)
        pool_k, pool_v = (_pool(x) for x in (k, v))
        plan = Plan.from_pages(
            block_table,
            cu_seqlens_k.diff(),
            page_size=k.shape[1],
            Tk=pool_k.shape[2],
            Tq=q.shape[0],
            cu_seqlens_q=cu_seqlens_q,
            window=_back(window_size),
        )
        given = {"scale": softmax_scale, "softcap": softcap or None}
        out, lse = attention(q.transpose(0, 1)[None], pool_k, pool_v, plan, return_lse=True, **given)
        out, lse = out[0].transpose(0, 1), lse[0]
    elif alibi_slopes is not None:
        _check("q [total_q,Hq,D], k [total_k,Hkv,D], v [total_k,Hkv,Dv]", 3, q=q, k=k, v=v)
        plan = Plan.from_documents(
            cu_seqlens_q,
            cu_seqlens_k,
            Tq=q.shape[0],
            Tk=k.shape[0],
            causal=causal,
            window=_sides(window_size),
        )
        if plan.q_pos is None:  # ALiBi distances are inside a sequence
            q_pos, k_pos = _places(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
            plan = plan.with_rules(q_pos=q_pos, k_pos=k_pos)
        out, lse = attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            plan,
            scale=softmax_scale,
            softcap=softcap or None,
            dropout_p=dropout_p,
            return_lse=True,
            **_slopes(alibi_slopes, q.shape[1]),
        )
        out, lse = out[0].transpose(0, 1), lse[0]
    else:
        out, lse = attention_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            causal=causal,
            window_size=window_size,
            return_lse=True,
            **scores,
        )
    return (out, lse, None) if return_attn_probs else out


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from new tokens over a key cache, after writing their own keys into it. No gradients.

    Parameters
    ----------
    q : Tensor
        `[B,Tq,Hq,D]`.
    k_cache, v_cache : Tensor
        `[B_cache,Tk,Hkv,D]`, or pages `[pages,page_size,Hkv,D]` with a `block_table`. Modified in place if
        `k` and `v` are given.
    k, v : Tensor, optional
        `[B,Tnew,Hkv,D]`: written behind the `cache_seqlens` keys in use, and attended to as well.
    rotary_cos, rotary_sin : Tensor, optional
        `[positions, D_rotated / 2]`: the first `D_rotated` dims of q and k are rotated by their positions,
        which begin at `cache_seqlens` (without causality or window, all of q is at `cache_seqlens`).
    cache_seqlens : int or Tensor, optional
        Integers `[B]`: number of keys in use before `k` is written; by default all, or 0 if `k` is given.
    cache_batch_idx : Tensor, optional
        Integers `[B]`: cache row of each sequence.
    cache_leftpad : Tensor, optional
        Integers `[B]`: number of leading keys to hide.
    block_table : Tensor, optional
        Integers `[B, n]`: page indices of each sequence, in order.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`; the last query is aligned with the last key in use.
    rotary_interleaved : bool
        Whether dims (0, 1), (2, 3), ... are rotated in pairs (GPT-J), or the two halves (GPT-NeoX).
    num_splits : int
        Accepted and ignored: work is always split into equal pieces.
    return_softmax_lse : bool
        Also return lse fp32 `[B,Hq,Tq]`.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Tq,Hq,D]`.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.compat.flash_attn import flash_attn_with_kvcache
    >>> cache_k, cache_v = torch.zeros(2, 2, 512, 2, 64).unbind(0)
    >>> q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64), torch.randn(2, 1, 2, 64)
    >>> lengths = torch.tensor([5, 0], dtype=torch.int32)
    >>> flash_attn_with_kvcache(q, cache_k, cache_v, k, v, cache_seqlens=lengths, causal=True).shape
    torch.Size([2, 1, 8, 64])
    >>> bool((cache_k[0, 5] == k[0, 0]).all())
    True
    """
    _check("q [B,Tq,Hq,D], k_cache and v_cache [B,Tk,Hkv,D]", 4, q=q, k_cache=k_cache, v_cache=v_cache)
    (B, Tq), device = q.shape[:2], q.device
    paged = block_table is not None
    if paged and (cache_batch_idx is not None or cache_leftpad is not None):
        raise SparseFlashError("block_table with cache_batch_idx or cache_leftpad: the table says it already")
    room = k_cache.shape[1] * block_table.shape[1] if block_table is not None else k_cache.shape[1]
    if cache_seqlens is None:
        cache_seqlens = room if k is None else 0
    used = torch.as_tensor(cache_seqlens, device=device).long().expand(B)
    rows = torch.arange(B, device=device) if cache_batch_idx is None else cache_batch_idx.to(device).long()
    if (rotary_cos is None) != (rotary_sin is None):
        raise SparseFlashError("rotary_cos without rotary_sin: give both")
    if rotary_cos is not None and rotary_sin is not None:
        still = not causal and _sides(window_size) is None
        at = used[:, None] + torch.arange(Tq, device=device) * (0 if still else 1)
        q = _rotated(q, rotary_cos, rotary_sin, at, rotary_interleaved)
        if k is not None:
            at = used[:, None] + torch.arange(k.shape[1], device=device)
            k = _rotated(k, rotary_cos, rotary_sin, at, rotary_interleaved)
    if (k is None) != (v is None):
        raise SparseFlashError("k without v: the new keys and values belong together")
    if k is not None and v is not None:
        _check("k and v [B,Tnew,Hkv,D]", 4, k=k, v=v)
        place = used[:, None] + torch.arange(k.shape[1], device=device)
        if place.numel() and int(place.max()) >= room:
            raise SparseFlashError(
                f"{k.shape[1]} new keys behind {int(used.max())} in a cache of {room}: make it larger"
            )
        if block_table is not None:
            size = k_cache.shape[1]  # with pages of 16, key 37 is row 5 of page block_table[b, 2]
            first, second = block_table.to(device).long().gather(1, place // size), place % size
        else:
            first, second = rows[:, None].expand_as(place), place
        k_cache[first, second] = k.to(k_cache.dtype)
        v_cache[first, second] = v.to(v_cache.dtype)
        used = used + k.shape[1]
    scores: dict[str, Any] = {"scale": softmax_scale, "softcap": softcap or None}
    scores |= _slopes(alibi_slopes, q.shape[2])
    q = q.transpose(1, 2)
    if block_table is not None:
        if not (causal or Tq == 1):
            raise SparseFlashError(
                "block_table with several queries and without causality: make a plan (Plan.from_pages), or "
                "gather the pages"
            )
        pool = [_pool(x) for x in (k_cache, v_cache)]
        frame = {"page_size": k_cache.shape[1], "Tk": pool[0].shape[2], "Tq": Tq}
        plan = Plan.from_pages(block_table, used, **frame, window=_back(window_size))
        keys, values = pool
    else:
        keys, values = (x.transpose(1, 2) for x in (k_cache, v_cache))
        if cache_batch_idx is not None:
            keys, values = keys[rows], values[rows]
        plan = _over(used, cache_leftpad, Tq, room, causal, _sides(window_size))
    op = decode if Tq <= FEW and "alibi_slopes" not in scores else attention
    out, lse = op(q, keys, values, plan, return_lse=True, **scores)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _places(q_ends: Tensor, k_ends: Tensor, Tq: int, Tk: int) -> tuple[Tensor, Tensor]:
    """Positions of tokens in their sequences, `[1,1,T]` each; the last query is aligned with the last key."""
    found = []
    for ends, T in ((q_ends, Tq), (k_ends, Tk)):
        token = torch.arange(T, device=ends.device)
        own = torch.searchsorted(ends, token, right=True) - 1
        own = own.clamp(max=len(ends) - 2)
        last = (q_ends.diff() - k_ends.diff())[own] if ends is q_ends else 0
        found.append((token - ends[own] - last).int()[None, None])
    return found[0], found[1]


def _over(
    used: Tensor, pad: Tensor | None, Tq: int, Tk: int, causal: bool, window: tuple[int, int] | None
) -> Plan:
    """Plan of the last Tq tokens over the `used [B]` keys, except for the first `pad`."""
    own = used[:, None] - Tq + torch.arange(Tq, device=used.device)
    low = torch.zeros_like(own) if pad is None else pad.to(own)[:, None].expand_as(own)
    high = used[:, None].expand_as(own)
    if causal:
        high = torch.minimum(high, own + 1)
    if window is not None:
        left, right = window
        low = low if left < 0 else torch.maximum(low, own - left)
        high = high if right < 0 else torch.minimum(high, own + right + 1)
    high = high.clamp(min=0)
    return Plan.from_intervals(torch.minimum(low, high)[:, None], high[:, None], Tk=Tk)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> Tensor:
    """Apply rotary embedding to `x [B,T,H,D]` at positions `[B,T]`, in the dims that the tables cover."""
    n = 2 * cos.shape[-1]
    if n > x.shape[-1]:
        raise SparseFlashError(f"rotary_cos {list(cos.shape)} rotates {n} dims; the heads have {x.shape[-1]}")
    cos, sin = (table.to(x.device)[at][:, :, None].float() for table in (cos, sin))
    turn, rest = x[..., :n].float(), x[..., n:]
    a, b = (turn[..., 0::2], turn[..., 1::2]) if interleaved else turn.chunk(2, -1)
    parts = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _pool(pages: Tensor) -> Tensor:
    """View pages `[pages, page_size, H, D]` as one row of keys, without a copy if they are contiguous."""
    return pages.flatten(0, 1)[None].transpose(1, 2)


def _sides(window_size: Any) -> tuple[int, int] | None:
    fits = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not (fits and all(is_count(x + 1) for x in window_size)):
        raise SparseFlashError(f"window_size={window_size!r}: expected (left, right), -1 = unbounded")
    left, right = window_size
    return None if (left, right) == (-1, -1) else (left, right)


def _back(window_size: Any) -> tuple[int, int] | None:
    """A window of causal queries."""
    sides = _sides(window_size)
    return None if sides is None or sides[0] == -1 else (sides[0], 0)


def _slopes(slopes: Tensor | None, heads: int) -> dict[str, Tensor]:
    if slopes is None:
        return {}
    rows = slopes if slopes.dim() == 2 else slopes[None]
    if rows.shape[-1] != heads or not bool((rows == rows[:1]).all()):
        raise SparseFlashError(
            f"alibi_slopes {list(slopes.shape)}: expected [{heads}], one slope a head, alike in all sequences"
        )
    return {"alibi_slopes": rows[0]}


def _check(wanted: str, dims: int, **tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dim() != dims:
            raise SparseFlashError(f"{name}: {_shape(x)}; expected {wanted}")


def _packed(x: Any, dims: int, parts: int) -> bool:
    return isinstance(x, Tensor) and x.dim() == dims and x.shape[2] == parts


def _shape(x: Any) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__

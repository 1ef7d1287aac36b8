"""Masks in O(T): one key range per query, found by probing Transformers' mask functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...common.errors import SparseFlashError
from ...plan import Plan
from ...plan.options import narrow
from .caches import roomy
from .documents import apart, call_of, mixing
from .mask import Bits, Plain, Ranges, SparseMask, intervals, on_host, ranged, shared_rows

SPREAD = 16
"""Keys probed per query in one round of the search for the end of a range."""

NUMBERS: set[str] = {"deepseek_v4", "gemma4_audio"}
"""Model types that get an additive mask tensor of size S x T: they use the lowest number of its dtype, or
concatenate it with a mask over compressed keys (`add` your own types)."""
TRUTHS: set[str] = {"qwen4_exp_text"}
"""Model types that get a plain bool mask tensor of size S x T: they search it for visible keys."""

Sees = Callable[[Tensor], Tensor]


def sparse_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **options: Any,
) -> Any:
    """Build the mask: the function registered as "sparse", called once per forward and kind of layer.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, use_vmap, device
        As Transformers passes them: `mask_function(batch, head, query, key)` on index tensors, and the bool
        padding mask `[B, tokens]`, True = token.
    cache_position : Tensor, optional
        `[S]`, in place of `q_length` and `q_offset` in older versions.
    **options
        Hints for other implementations (`dtype`, `local_size`, `config`, ...), which affect no mask.

    Returns
    -------
    SparseMask
        Or `attention_mask` itself if it already is one: generation with static caches calls twice. Models
        that compute with their mask get the tensor they expect (`NUMBERS`, `TRUTHS`).
    """
    if isinstance(attention_mask, SparseMask):
        return attention_mask
    if cache_position is not None:
        q_length, q_offset = len(cache_position), cache_position[0]
    assert q_length is not None and mask_function is not None
    mask = _mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        _padding(attention_mask, kv_length, kv_offset),
        use_vmap,
        device,
    )
    config = options.get("config")
    mask.owner, mask.mixes = getattr(config, "model_type", ""), mixing(config)
    if not torch.compiler.is_compiling():
        call = call_of(sys._getframe(1))
        roomy(call.cache, config)
        mask = apart(mask, call, kv_offset)
    if mask.owner in NUMBERS:
        kind = options.get("dtype") or torch.float32
        return torch.where(mask.to_dense(), 0.0, torch.finfo(kind).min).to(kind)
    if mask.owner in TRUTHS:
        return mask.to_dense()
    return mask


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    padding: Tensor | None,
    use_vmap: bool,
    device: torch.device | str,
) -> SparseMask:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    causal = mask_function is causal_mask_function
    simple = causal or mask_function is bidirectional_mask_function
    offset = q_offset - kv_offset
    if isinstance(offset, Tensor):
        offset = int(offset) if on_host(offset) else narrow(offset)
    same: dict[str, Any] = {"offset": offset, "tokens": padding}
    if simple and padding is None:
        plan = Plan.dense(q_length, kv_length, causal=causal, q_offset=offset if causal else 0, device=device)
        return SparseMask(plan, batch_size, Plain(), causal=causal, **same)

    query = torch.arange(q_length, device=device) + offset  # counted from the first key
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    at = (query + kv_offset)[None, None, :, None]

    def sees(key: Tensor) -> Tensor:
        """Whether query i attends to keys `key[b, i, n]`."""
        found = mask_function(batch, head, at, key[:, None] + kv_offset)
        return found.expand(batch_size, 1, q_length, key.shape[-1])[:, 0]

    ranges = None  # use_vmap: a user's function
    if causal:
        ranges = Ranges(torch.zeros_like(query)[None], (query + 1).clamp(0, kv_length)[None])
    elif not use_vmap:
        ranges = Ranges(*shared_rows(*_ranges(sees, query.expand(batch_size, -1), kv_length)))
        if on_host(ranges.lo) and not _hold(sees, ranges.lo, ranges.hi, batch_size, kv_length):
            ranges = None
    if ranges is None:
        plan = _any_plan(mask_function, padding, batch_size, q_length, kv_length, q_offset, kv_offset, device)
        return SparseMask(plan, batch_size, Bits(), causal=_looks_back(plan, query), **same)
    plan, solid = intervals(ranges, padding, kv_length)
    traced = torch.compiler.is_compiling()
    if simple:
        return SparseMask(
            plan, batch_size, Plain(), causal=causal, if_plain=solid if traced else None, **same
        )
    if traced:  # compiled masks always allow for documents
        plain = solid & (ranges.lo == 0).all() & (ranges.hi == query + 1).all()
        return SparseMask(plan, batch_size, ranges, causal=True, if_plain=plain, **same)
    kind = ranged(ranges, query, padding)
    causal = on_host(ranges.hi) and bool((ranges.hi <= query + 1).all())
    return SparseMask(plan, batch_size, kind, causal=causal, **same)


def _padding(mask: Tensor | None, Tk: int, begin: int) -> Tensor | None:
    """Padding mask of the current keys, bool [B, Tk]; None if no key is padding."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise SparseFlashError(f"attention_mask {list(mask.shape)}: expected [B, tokens], 1 or True = token")
    missing = begin + Tk - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    mask = mask[:, begin : begin + Tk].bool()
    return None if on_host(mask) and bool(mask.all()) else mask


def _ranges(sees: Sees, anchor: Tensor, Tk: int) -> tuple[Tensor, Tensor]:
    """Visible key range [lo, hi) around each query's own key, [B, S] each; empty if that key is hidden."""
    anchor = anchor.clamp(0, max(Tk - 1, 0))
    own = sees(anchor[..., None])[..., 0] if Tk else torch.zeros_like(anchor, dtype=torch.bool)
    lo = anchor - _reach(sees, anchor, -1, anchor, Tk)
    hi = anchor + _reach(sees, anchor, 1, Tk - 1 - anchor, Tk) + 1
    return torch.where(own, lo, hi), hi


def _reach(sees: Sees, anchor: Tensor, direction: int, limit: Tensor, Tk: int) -> Tensor:
    """Number of consecutive visible keys from the anchor, by a search that narrows SPREAD-fold per round."""
    # Example with SPREAD = 4, limit 15 and 9 visible keys beyond the anchor: round 1 probes 4, 8, 12, 15; 8
    # is the last visible one, so [low, high] is [8, 11]. Round 2 probes 9, 10, 11; only 9 is visible: [9, 9].
    low, high = torch.zeros_like(limit), limit
    step = torch.arange(1, SPREAD + 1, device=limit.device)
    rounds, width = (1, Tk) if isinstance(Tk, int) else (8, 0)
    while width >= SPREAD:
        rounds, width = rounds + 1, width // SPREAD
    for _ in range(rounds):
        stride = (high - low + (SPREAD - 1)) // SPREAD
        at = torch.minimum(low[..., None] + stride[..., None] * step, high[..., None])
        n = sees(anchor[..., None] + direction * at).long().cumprod(-1).sum(-1)
        low, high = (
            torch.minimum(low + n * stride, high),
            torch.minimum(low + (n + 1) * stride - 1, high),
        )
        high = torch.maximum(low, high)
    return low


def _hold(sees: Sees, lo: Tensor, hi: Tensor, batch: int, Tk: int) -> bool:
    """Whether ranges with non-decreasing ends describe the mask: ends are checked, other keys sampled."""
    if not Tk or not lo.numel():
        return True
    if not all(bool((x[:, 1:] >= x[:, :-1]).all()) for x in (lo, hi)):
        return False
    lo, hi = lo.expand(batch, -1), hi.expand(batch, -1)
    row = torch.arange(lo.shape[1]) * 40503
    key = (row[:, None] + torch.arange(SPREAD) * 2654435761) % Tk
    key = torch.cat([key.expand(batch, -1, -1), torch.stack([lo - 1, lo, hi - 1, hi], -1)], -1).clamp(
        0, Tk - 1
    )
    inside = (key >= lo[..., None]) & (key < hi[..., None])
    return bool((sees(key) == inside).all())


def _any_plan(
    mask_function: Callable[..., Tensor],
    padding: Tensor | None,
    batch: int,
    Tq: int,
    Tk: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Plan:
    """Plan of a mask that is not ranges: evaluates all pairs once, as Transformers' `sdpa` mask does."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(
        batch_size=batch,
        q_length=Tq,
        kv_length=Tk,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        allow_is_causal_skip=False,
        use_vmap=True,
        device=device,
    )
    if padding is not None:
        mask = mask & padding[:, None, None]
    return Plan.from_mask(mask)


def _looks_back(plan: Plan, query: Tensor) -> bool:
    """Whether no query of a plan sees a later key. Reads all pairs."""
    key = torch.arange(plan.Tk, device=query.device)
    return not bool((plan.to_dense() & (key > query[:, None])).any())

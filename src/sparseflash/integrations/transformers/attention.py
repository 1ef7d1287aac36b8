"""The attention function registered as "sparse"."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.base import layer_behind
from ...common.errors import SparseFlashError
from ...plan import Plan
from ...plan.stamps import Last
from .._host import exact
from .caches import attend
from .documents import by_edges, by_positions, into, mixing, told, unheard
from .keep import plain_mask
from .learned import learned_plan
from .mask import Bits, Plain, SparseMask

WEIGHTS = 64 << 20
"""Limit, in bytes of fp32, of the attention weights that a layer forms for `output_attentions`."""
SETTING = "_sparseflash"
"""Attribute of an attention module that holds the `Setting` of `sparse(...)`."""
ACROSS = "_sparseflash_across"
"""Attribute of an attention module that holds what attends over ranks inside `context_parallel(...)`."""

WHOLE = ("DiffusionGemmaDecoderTextAttention",)
"""Layers whose window is one of their cache: they attend to all keys that they are given."""

HARMLESS: set[str] = {
    "position_ids", "use_cache", "cache_position", "max_length_q", "max_length_k", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "labels", "shift_labels",
    "deterministic", "target_dtype", "layer_idx", "token_type_ids", "mm_token_type_ids", "seq_idx",
    "position_embeddings", "input_ids", "inputs_embeds", "implementation", "vision_feature_layer",
    "vision_feature_select_strategy",
}  # fmt: skip
"""Keyword arguments of models and trainers that do not affect attention (`add` your own names). Any other
that is not None is refused."""

_REFUSED = {
    "cache": "continuous batching gives a paged cache, which 'sparse' does not read: use generate()",
    "sinks": "a sink for every query (Inkling 2) is not supported: keep 'eager' for this model",
    "head_mask": "masks of whole heads are not supported: multiply the output of the heads instead",
}


def sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SparseMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention of one layer: dense, or as `sparse(...)` has set for this module.

    Parameters
    ----------
    module : nn.Module
        The calling attention layer.
    query, key, value : Tensor
        `[B,Hq,S,D]`, `[B,Hkv,T,D]`, `[B,Hkv,T,Dv]`.
    attention_mask : SparseMask, Tensor or None
        The result of the registered mask function, or the user's own 4-d mask.
    dropout, scaling, is_causal, sliding_window, softcap, s_aux, cu_seq_lens_q, cu_seq_lens_k
        As models pass them; `s_aux [Hq]` are sink logits.
    indices, block_indices : Tensor, optional
        `[B,S,topk]` and `[B,Hkv,S,topk]`: keys, or key blocks, chosen by the model's own indexer.
    position_bias : Tensor, optional
        `[B|1,Hq|1,S,T]`, added to the logits, differentiable (T5).
    output_attentions : bool, optional
        Whether to return weights, computed separately if they take at most `WEIGHTS` bytes.

    Returns
    -------
    (Tensor, Tensor or None)
        out `[B,S,Hq,Dv]`; the weights `[B,Hq,S,T]` if requested, before dropout.

    Raises
    ------
    SparseFlashError
        For unsupported arguments that would change the result. Nothing is ignored silently.
    """
    _refuse(module, kwargs)
    if type(module).__name__ in WHOLE:
        sliding_window = None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if (across := getattr(module, ACROSS, None)) is not None:  # the mask is of all ranks' tokens
        options = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux, "dropout_p": dropout}
        beside = {"indices": indices, "block_indices": block_indices, "position_bias": position_bias}
        beside |= {"cu_seq_lens_q": cu_seq_lens_q, "seq_idx": kwargs.get("seq_idx")}
        return across(query, key, value, causal, sliding_window, options, beside).transpose(1, 2), None
    mask = _as_mask(
        module,
        query,
        key,
        attention_mask,
        causal,
        sliding_window,
        cu_seq_lens_q,
        cu_seq_lens_k,
        kwargs.get("position_ids"),
        kwargs.get("seq_idx"),
    )
    if mask.held is not None and not torch.compiler.is_compiling():  # the cache is newer than the mask
        into(sys._getframe(1).f_locals.get("past_key_values"), mask)
    labels = kwargs.get("seq_idx")
    if isinstance(labels, Tensor) and not mask.documents and not torch.compiler.is_compiling():
        if bool((labels != labels[..., :1]).any()):
            raise SparseFlashError(
                f"{type(module).__name__} gives 'seq_idx' of several documents, which its attention would "
                "not keep apart: give position_ids that begin anew with each, or cu_seq_lens_q and _k"
            )
    if query.shape[0] != mask.shape[0] == key.shape[0]:  # learned queries, shared by the batch
        query = query.expand(mask.shape[0], -1, -1, -1)
    options = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux}
    if mask.biased and isinstance(attention_mask, Tensor):
        own = attention_mask[..., : key.shape[2]]
        position_bias = own if position_bias is None else position_bias + own
    if position_bias is not None:
        options["pair_bias"] = position_bias
    if dropout:  # set while training; seeded by torch's generator
        options["dropout_p"] = dropout
    setting = getattr(module, SETTING, None)
    held = None if torch.compiler.is_compiling() else layer_behind(key)
    if output_attentions and (setting is not None or held is not None):
        raise SparseFlashError(
            f"{type(module).__name__}: output_attentions=True, and a method or a cache that evicts was set "
            "for this layer: leave it out (layers=), or do without the weights"
        )
    if held is not None:
        return attend(module, held, setting, query, key, value, mask, options).transpose(1, 2), None
    if indices is not None or block_indices is not None:
        if setting is not None:
            raise SparseFlashError(
                f"{type(module).__name__} chooses its keys by an indexer of its own, and a method was set "
                "for it: leave this layer out (layers=)"
            )
        plan = learned_plan(module, mask, indices, block_indices)
        out = exact(query, key, value, plan, options)
    elif setting is not None:
        if position_bias is not None:
            raise SparseFlashError(
                f"{type(module).__name__} adds a bias to every pair, and a method was set for it, which "
                "chooses by queries and keys alone: leave this layer out (layers=)"
            )
        out = setting(module, query, key, value, mask, options)
    else:
        plan = mask.plan
        out = exact(query, key, value, plan, options)
    weights = _weights(module, query, key, plan, options) if output_attentions else None
    return out.transpose(1, 2), weights


def _weights(module: nn.Module, q: Tensor, k: Tensor, plan: Any, options: dict[str, Any]) -> Tensor:
    """Compute the weights `[B,Hq,S,T]` of exact attention, for short sequences."""
    (B, H, S, D), T = q.shape, k.shape[2]
    need = 4 * B * H * S * T
    if need > WEIGHTS:
        raise SparseFlashError(
            f"{type(module).__name__}: output_attentions=True wants weights {[B, H, S, T]}, "
            f"{need / 2**20:.0f} MiB a layer, and attention forms {WEIGHTS >> 20} MiB at most: "
            "give shorter rows, or use set_attn_implementation('eager'), which forms them anyway"
        )
    scale, cap, sinks = (options.get(name) for name in ("scale", "softcap", "sink_logits"))
    score = (
        q.float() @ k.float().repeat_interleave(H // k.shape[1], 1).mT * (D**-0.5 if scale is None else scale)
    )
    score = cap * (score / cap).tanh() if cap else score
    score = score + options.get("pair_bias", 0.0)
    keep = plan.to_dense()
    score = score.masked_fill(~keep.repeat_interleave(H // keep.shape[1], 1), -torch.inf)
    if sinks is not None:
        score = torch.cat([score, sinks.float()[:, None, None].expand(B, H, S, 1)], -1)
    return score.softmax(-1)[..., :T].nan_to_num(nan=0).to(q.dtype)


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if name in HARMLESS or given is None or given is False:
            continue
        why = _REFUSED.get(
            name,
            "it is not known to attn_implementation='sparse'. If it changes nothing, add its name to "
            "sparseflash.integrations.transformers.HARMLESS.add(...)",
        )
        raise SparseFlashError(f"{type(module).__name__} gives {name!r}: {why}")


def _as_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    given: SparseMask | Tensor | None,
    causal: bool,
    window: int | None,
    edges: Tensor | None,
    edges_k: Tensor | None,
    positions: Any = None,
    labels: Any = None,
) -> SparseMask:
    """Combine all sources of a call's mask: its own, `cu_seq_lens`, positions and the layer's rules."""
    (B, _, S, _), T = query.shape, key.shape[2]
    B, name = max(B, key.shape[0]), type(module).__name__
    own = isinstance(given, SparseMask)
    if isinstance(given, SparseMask):
        given = given.for_keys(T) if given.shape[2] == S and given.shape[3] != T else given
        if given.shape[2:] != (S, T):
            raise SparseFlashError(
                f"{name}: the mask is for {list(given.shape[2:])} tokens, queries and keys "
                f"are {[S, T]}: the model built it for another cache or length. Where caches "
                "differ in length from layer to layer, rows have no padding"
            )
        causal = given.causal
        if given.mixes and told(given.owner, labels, edges):
            given.mixes = ""
    elif given is not None:
        given = _of_tensor(module, given, B, S, T)
    if edges is not None or edges_k is not None:
        return by_edges(given, edges, edges_k, (B, S, T), name, causal, _sides(window, causal))
    if given is None:
        given = dense_mask(module, query.device, B, S, T, causal, window)
    elif not own:
        return given
    if not given.causal or given.edges is not None:  # keys may be of another sequence
        return given
    if torch.compiler.is_compiling():
        unheard(name, given, positions)
    return by_positions(given, positions)


def dense_mask(
    module: nn.Module, device: torch.device, B: int, S: int, T: int, causal: bool, window: int | None
) -> SparseMask:
    """Mask of a call without one, from the layer's causality and window."""
    if causal and S == 1:  # the last token of the cache
        causal = False
        if window is not None and window < T:
            raise SparseFlashError(
                f"{type(module).__name__}: a window of {window} tokens, {T} keys and no mask: give the model "
                "an attention_mask"
            )
        window = None
    if (causal or window is not None) and S != T:
        raise SparseFlashError(
            f"{type(module).__name__}: causal or windowed, {S} queries, {T} keys and no mask: where the "
            "queries stand among the keys is not known. Give the model an attention_mask"
        )
    plan = Plan.dense(S, T, causal=causal, window=_sides(window, causal), device=device)
    return SparseMask(plan, B, Plain() if window is None else Bits(), causal=causal)


def _sides(window: int | None, causal: bool) -> tuple[int, int] | None:
    """Convert a layer's window, which counts the query's own key, to a plan's (left, right)."""
    return None if window is None else (window - 1, 0 if causal else window - 1)


_last: Last[SparseMask] = Last()
"""The last tensor mask that was read, and its `SparseMask`."""


def _of_tensor(module: nn.Module, mask: Tensor, B: int, S: int, T: int) -> SparseMask:
    """Read a user's 4-d mask: bool, or floats: -inf (or below -1e4) hides, other values are a bias."""
    name = type(module).__name__
    learns = mask.requires_grad and torch.is_grad_enabled()
    if known := _last.get(mask, key=(B, S, T, learns)):
        return known[0]
    if mask.dim() != 4 or mask.shape[-2] not in (1, S) or mask.shape[-1] < T:
        raise SparseFlashError(f"{name}: attention_mask {list(mask.shape)}; expected [B|1, H|1, {S}, {T}]")
    keep, biased = plain_mask(mask), learns
    if keep.is_floating_point():
        numbers, keep = keep, keep > -1e4
        biased = learns or bool((keep & (numbers != 0)).any())
    elif keep.dtype != torch.bool:
        raise SparseFlashError(
            f"{name}: attention_mask has dtype {keep.dtype}, which eager attention would add to the scores: "
            "expected bool (True = seen), or floats (-inf = hidden). Use mask.bool()"
        )
    keep = keep[..., :T]
    plan = Plan.from_mask(keep, Tq=S, Tk=T)
    own = torch.arange(S, device=mask.device)[:, None] + (T - S)
    later = torch.arange(T, device=mask.device) > own
    mixes = mixing(getattr(module, "config", None))
    made = SparseMask(plan, B, causal=not bool((keep & later).any()), offset=T - S, mixes=mixes)
    made.biased = biased
    return _last.keep(made, mask, key=(B, S, T, learns))

"""Packed documents: finds where each begins and keeps them apart; raises if the model would mix them."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad

from ...common.errors import SparseFlashError
from ...plan import Plan
from ...plan.stamps import Last
from .mask import Bits, Packed, SparseMask, untold

# ---------------------------------------------------------------- what a model was called with


class Call(NamedTuple):
    """Arguments of a model's call that Transformers does not pass to the mask function.

    Transformers detects packed documents only without cache and mask, and passes `cu_seq_lens` only to
    attention layers, which many models do not forward.
    `cu_seq_lens` to nothing but attention layers, which many models do not pass on to.
    """

    positions: Any
    edges: Tensor | None
    edges_k: Tensor | None
    labels: Any
    cache: Any
    causal: bool
    cross: bool


def call_of(frame: FrameType) -> Call:
    """Read a model's call from the frame of the Transformers function that requests its mask."""
    asked = frame.f_locals
    given: dict[str, Any] = {}
    for kwargs in _named(frame):
        given = {name: x for name, x in kwargs.items() if x is not None} | given
    positions = asked.get("position_ids")
    if positions is None and "position_ids" in asked:
        positions = given.get("position_ids")
    edges, edges_k = (given.get(f"cu_seq_lens_{x}") for x in "qk")
    return Call(
        positions,
        edges,
        edges_k,
        given.get("seq_idx"),
        asked.get("past_key_values"),
        "position_ids" in asked,
        asked.get("encoder_hidden_states") is not None,
    )


def _named(frame: FrameType | None) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the model whose forward requests a mask, then of the heads around it."""
    inner: nn.Module | None = None
    for _ in range(64):
        frame = frame and frame.f_back
        if frame is None:
            return
        code = frame.f_code
        # f_locals keeps a frame's locals alive until it ends: read it in model frames only
        if code.co_varnames[:1] != ("self",) or "kwargs" not in code.co_varnames:
            continue
        owner, kwargs = frame.f_locals.get("self"), frame.f_locals.get("kwargs")
        if not isinstance(owner, nn.Module):
            continue
        if inner is not None and owner is not inner and getattr(owner, "base_model", None) is not inner:
            return
        inner = owner
        if isinstance(kwargs, dict):
            yield kwargs


# ---------------------------------------------------------------- models whose recurrent layers mix documents


_BY_LABELS = frozenset("bamba falcon_h1 granitemoehybrid lfm2 lfm2_moe nemotron_h zamba2".split())
_BY_BOTH = frozenset("olmo_hybrid qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text".split())
"""Models whose recurrent layers accept document edges: `seq_idx`, or that together with `cu_seq_lens_q`."""

_REFUSES = (5, 23)
"""First Transformers release known to raise if these layers' kernels are missing."""


def mixing(config: Any) -> str:
    """Kinds of layers other than attention that carry state from token to token, as text; "" if none."""
    found = [getattr(config, name, None) or () for name in ("layer_types", "layers_block_type")]
    kinds = {str(x) for one in found if isinstance(one, (list, tuple)) for x in one}
    still = ("moe", "mlp", "dense", "sparse", "minimax_m3_sparse")
    attends = {x for x in kinds if "attention" in x and "linear" not in x and "compressed" not in x}
    return ", ".join(sorted(x for x in kinds - attends if x not in still))


def told(kind: str, labels: Any, edges: Any) -> bool:
    """Whether a model type's recurrent layers receive the document edges, and keep them apart or raise."""
    able = _BY_LABELS if edges is None else _BY_LABELS | _BY_BOTH
    release = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    return labels is not None and kind in able and release >= _REFUSES


def _refuse_mixing(mask: SparseMask) -> None:
    if mask.mixes:
        raise SparseFlashError(
            f"{mask.owner}: several documents in a row, and layers of kind {mask.mixes}, which carry one "
            "into the next: attention alone keeps them apart. Give it one document a row (padded on either "
            "side), or, where the kernels of these layers take them, seq_idx and cu_seq_lens_q too"
        )


# ---------------------------------------------------------------- keeping documents apart


def apart(mask: SparseMask, call: Call, begin: int) -> SparseMask:
    """Separate the documents of a call's mask; `begin` cached keys precede the mask's first key."""
    mask.cross = call.cross
    if told(mask.owner, call.labels, call.edges):
        mask.mixes = ""
    if mask.documents:
        _refuse_mixing(mask)
    if not call.cross and (call.edges is not None or call.edges_k is not None):
        mask = _by_edges_of(call, mask)
    if mask.edges is not None:
        return mask
    if call.cache is not None and call.causal and not call.cross:
        return _behind(mask, call, begin)
    return by_positions(mask, call.positions, hold=True)


def by_positions(mask: SparseMask, positions: Any, hold: bool = False) -> SparseMask:
    """Separate packed documents of self-attention by positions `[B|1, S]` that restart.

    A token begins a document if its position is 0 again, or below the previous token's. Documents that the
    model has separated itself stay; anything but positions is ignored. A compiled graph, which cannot branch
    on values, asserts that the mask separates them already.

    `hold`: documents that Transformers has separated itself are recorded for a cache, too.
    """
    if not _says(mask, positions) or mask.shape[2] < 2:
        return mask
    if torch.compiler.is_compiling():
        begins = _begins(mask, positions)
        if mask.by_rule or mask.ranges is None or mask.mixes:
            fine = ~begins.any()
        else:
            fine = (mask.ranges.lo >= _ends(mask, begins)[0]).all()
        torch._assert_async(
            fine,
            "position_ids begin anew within a row, and the compiled model keeps a cache, was given an "
            "attention_mask or has recurrent layers: pass use_cache=False and no attention_mask for packed "
            "documents, or one document a row",
        )
        return mask
    if known := _read.get(mask, positions):
        return known[0] or mask
    begins = _begins(mask, positions)
    made = None
    if bool(begins.any()):
        begin, end = _ends(mask, begins)
        made = _within(mask, begin, end)
        if made is not mask or hold:
            made.held = Held(begin, _carried(mask, positions))
    return _read.keep(made, mask, positions) or mask


_DROP_EDGES = frozenset("nemotron stablelm".split())
"""Models whose layers forward position_ids, but no `cu_seq_lens`."""


def unheard(name: str, mask: SparseMask, positions: Any) -> None:
    """Warn, while a model is compiled, about document edges that its attention does not receive."""
    what = "" if _says(mask, positions) else "position_ids, nor cu_seq_lens"
    if what == "" and mask.owner in _DROP_EDGES:
        what = "cu_seq_lens"
    if what and mask.shape[2] > 1 and mask.causal and not mask.documents:
        untold(name, what)


_read: Last[SparseMask | None] = Last()
"""The last mask and positions that were read, with the resulting mask; None if unchanged."""


def _says(mask: SparseMask, positions: Any) -> bool:
    """Whether `positions` fits the tokens of a mask."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.is_floating_point():
        return False
    return positions.shape[1] == mask.shape[2] and positions.shape[0] in (1, mask.shape[0])


def _begins(mask: SparseMask, positions: Tensor, last: Tensor | None = None) -> Tensor:
    """Tokens that begin a new document, bool `[B|1, S]`; padding is skipped.

    `last` `[B|1, 1]`: position of the last cached token; below 0 if unknown.
    """
    real, before = _tokens(mask, positions)
    positions = positions.expand(len(real), -1)
    known = positions.gather(1, before.clamp(min=0))
    if last is None:
        real, last = real & (before >= 0), known
    known = torch.where(before < 0, last, known)
    return real & ((positions < known) | (positions == 0))


def _tokens(mask: SparseMask, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries are real tokens, `[B|1, S]`, and the index of the previous token; -1: it is cached."""
    at = torch.arange(mask.shape[2], device=positions.device)
    real = torch.ones_like(positions, dtype=torch.bool)
    if mask.tokens is not None:
        keys = (at + mask.offset).clamp(max=mask.shape[3] - 1)
        real = mask.tokens.index_select(1, keys.to(mask.tokens.device)).to(positions.device)
    before = torch.where(real, at, -1).cummax(-1).values
    return real, pad(before[:, :-1], (1, 0), value=-1)


def _ends(mask: SparseMask, begins: Tensor, first: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Key range of each query's document, `[B|1, S]` each; the first document begins at `first`."""
    at = torch.arange(begins.shape[1], device=begins.device) + mask.offset
    begin = torch.where(begins, at, first).cummax(-1).values
    later = torch.where(begins, at, mask.shape[3]).flip(-1).cummin(-1).values.flip(-1)
    end = pad(later[:, 1:], (0, 1), value=mask.shape[3])
    return begin.to(mask.device), end.to(mask.device)


def _within(mask: SparseMask, begin: Tensor, end: Tensor) -> SparseMask:
    """Restrict each query of the mask to the keys of its document."""
    _refuse_mixing(mask)
    if not mask.documents:
        return mask.within(begin, end)
    if mask.ranges is None or not bool((mask.ranges.lo >= begin).all()):
        raise SparseFlashError(
            f"{mask.owner}: position_ids begin anew within a row, in a layer that sees chunks, and the call "
            "keeps a cache or was given an attention_mask: chunks would be counted from the first token of "
            "the row. Pass use_cache=False and no attention_mask"
        )
    return mask


# ---------------------------------------------------------------- by edges


def by_edges(
    mask: SparseMask | None,
    edges: Tensor | None,
    edges_k: Tensor | None,
    shape: tuple[int, int, int],
    name: str,
    causal: bool,
    window: tuple[int, int] | None = None,
) -> SparseMask:
    """Separate documents by `cu_seq_lens_q` and `cu_seq_lens_k`, within a mask; `shape` is (B, S, T)."""
    B, S, T = shape
    if edges is None:
        raise SparseFlashError(f"{name}: cu_seq_lens_k without cu_seq_lens_q: give both")
    if mask is not None and mask.edges is edges:
        return mask
    if B != 1:
        raise SparseFlashError(
            f"{name}: cu_seq_lens_q for a batch of {B} rows: expected one row, which holds all documents. "
            "Give position_ids that begin anew with each document instead"
        )
    known = not torch.compiler.is_compiling()
    same = edges_k is None or edges_k is edges or (known and torch.equal(edges, edges_k))
    if same and S != T:
        raise SparseFlashError(
            f"{name}: cu_seq_lens_q tells where documents lie among {S} queries, not where among {T} keys: "
            "give cu_seq_lens_k of the keys too"
        )
    if mask is not None and len(edges) > 2:
        _refuse_mixing(mask)
    if mask is None or (mask.by_rule and mask.tokens is None):
        own = window if mask is None else None
        plan = Plan.from_documents(edges, edges_k, Tq=S, Tk=T, causal=causal, window=own)
        starts = None
        if known and causal and same and plan.window is None and int(edges[-1]) == S:
            starts = edges[:-1].repeat_interleave(edges.diff(), output_size=S)[None]
        made = SparseMask(plan, 1, Packed(starts) if len(edges) > 2 else Bits(), causal=causal)
    elif not same or not known:
        raise SparseFlashError(
            f"{name}: cu_seq_lens_q beside a mask of padding, windows or documents, "
            + ("and keys that are not the queries' own" if known else "in a compiled model")
            + ": not supported. Leave the mask out, or cu_seq_lens_q"
        )
    else:
        begin, end = (x.to(mask.device) for x in _edged(edges, S))
        made = mask.within(begin, end)
    made.edges = edges
    return made


def _edged(edges: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """Begin and end of each token's document, `[1,S]` each; tokens behind the last edge see nothing."""
    at = torch.searchsorted(edges, torch.arange(S, device=edges.device), right=True)
    ends = torch.cat([edges, edges[-1:]]).long()
    return ends[at - 1][None], ends[at][None]


def _by_edges_of(call: Call, mask: SparseMask) -> SparseMask:
    """Apply the edges of a call if they are for this mask's tokens, even if the model drops them."""
    (B, _, S, T), edges = mask.shape, call.edges
    if not call.causal and (B != 1 or edges is None or int(edges[-1]) != S):
        return mask  # an image or audio tower; its attention receives its own edges
    made = by_edges(mask, edges, call.edges_k, (B, S, T), mask.owner, mask.causal)
    made.owner = mask.owner
    if call.causal and made.documents and edges is not None:
        at = call.positions if _says(mask, call.positions) else torch.arange(S, device=edges.device)[None]
        made.held = Held(_edged(edges, S)[0], at)
        into(call.cache, made)
    return made


# ---------------------------------------------------------------- documents in a cache


class Held(NamedTuple):
    """The documents in a cache: begin of each token's document, and each token's position, `[B|1, n]`.

    Padding has the position of the token before it; below 0 if unknown.
    """

    starts: Tensor
    positions: Tensor


HELD = "_sparseflash_documents"
"""Attribute of a cache that holds several documents: a `Held`."""


def into(cache: Any, mask: SparseMask) -> None:
    """Record in an empty cache the documents that a call puts there."""
    if cache is not None and mask.held is not None:
        setattr(cache, HELD, mask.held)
        mask.held = None


def _carried(mask: SparseMask, positions: Tensor, last: Tensor | int = -1) -> Tensor:
    """Positions `[B|1, S]`, with padding given the previous token's; `last` if that one is cached."""
    real, before = _tokens(mask, positions)
    token = torch.where(real, torch.arange(mask.shape[2], device=positions.device), before)
    return torch.where(token < 0, last, positions.expand(len(token), -1).gather(1, token.clamp(min=0)))


def _hold(cache: Any, n: int, starts: Tensor, positions: Tensor) -> None:
    """Record in a cache the documents that a call appends after its first n tokens."""
    held, B = getattr(cache, HELD, None), max(len(starts), len(positions))
    made = []
    for before, x, fill in zip(held or (None, None), (starts, positions), (0, -1)):
        old = x.new_full((B, n), fill) if before is None else before[:, :n].expand(B, -1).to(x)
        made.append(torch.cat([old, x.expand(B, -1)], 1))
    setattr(cache, HELD, Held(*made))


def _behind(mask: SparseMask, call: Call, begin: int) -> SparseMask:
    """Mask of tokens appended to a cache: each query attends to its own document's keys only."""
    cache, positions, held = call.cache, call.positions, getattr(call.cache, HELD, None)
    says = _says(mask, positions)
    if held is None and (not says or (mask.shape[2] == 1 and not _zero(positions))):
        return mask
    n = int(mask.offset) + begin
    if held is not None and n == 0:
        delattr(cache, HELD)
        held = None
    if held is None:
        first = last = torch.full((1, 1), -1, device=positions.device) if says else None
    else:
        first, last = _last_of(held, n, mask, positions if says else None)
    if not says or first is None:
        return mask
    _, before = _tokens(mask, positions)
    begins = _begins(mask, positions, last) & ((before >= 0) | _anything(mask, n, begin, positions.device))
    at = torch.arange(mask.shape[2], device=positions.device) + n
    starts = torch.where(begins, at, first.clamp(min=0)).cummax(-1).values
    made = mask
    if bool((starts > 0).any()):
        _, end = _ends(mask, begins)
        made = _within(mask, (starts - begin).clamp(min=0).to(mask.device), end)
    if made is not mask or held is not None:
        _hold(cache, n, starts, _carried(mask, positions, last))
    _read.keep(None, made, positions)
    return made


def _zero(positions: Tensor) -> bool:
    """Whether the one token of each row may begin a document; False on an accelerator, to avoid a sync."""
    return positions.device.type == "cpu" and 0 in positions.flatten().tolist()


def _last_of(held: Held, n: int, mask: SparseMask, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Begin of the last document of n cached tokens, and its last position, `[B|1, 1]` each."""
    B, rows = mask.shape[0], len(held.starts)
    if positions is None:
        why = "position_ids are not known to attention"
    elif n > held.starts.shape[1]:
        why = f"the cache has {n} tokens, {held.starts.shape[1]} of which this model has put there"
    elif rows not in (1, B):
        why = f"it has {rows} rows, and this call {B}"
    else:
        first, last = (x[:, n - 1 : n].to(positions.device) for x in held)
        real, before = _tokens(mask, positions)
        p = positions.expand(max(len(real), rows), -1)
        strange = real & (before < 0) & (last >= 0) & (p != 0) & (p != last + 1)
        if not bool(strange.any()):
            return first, last
        row = int(strange.any(1).nonzero()[0, 0])
        end = int(last[min(row, rows - 1), 0])
        why = (
            f"position_ids go on at {int(p[row][strange[row]][0])}, and the last document ends at {end}: "
            f"expected {end + 1}, which continues it, or 0, which begins another"
        )
    raise SparseFlashError(
        f"{mask.owner}: past_key_values holds several packed documents, and {why}. Pass position_ids that "
        "continue the last document, or give each document a cache of its own"
    )


def _anything(mask: SparseMask, n: int, begin: int, device: torch.device) -> Tensor:
    """Whether a row has real tokens before this call's, bool `[B|1, 1]`."""
    if mask.tokens is None or begin:
        return torch.full((1, 1), n > 0, device=device)
    return mask.tokens[:, :n].any(1, keepdim=True).to(device)

"""The mask of a forward in O(T): one range of keys for each query, read off Transformers' mask functions."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import SparseFlashError
from ...plan import Plan
from ...plan.options import ANY, NONE, narrow
from ...plan.stamps import Last
from .keep import KeepMask, keep_mask
from .packed import Documents, Group, Padded

SPREAD = 16
"""Keys that one round of the search for the end of a range looks at."""

Sees = Callable[[Tensor], Tensor]


class _Dense:
    """What a model computes with gets the tensor that this stands for, as a `KeepMask`."""

    owner = ""

    def to_dense(self) -> Tensor:
        """That tensor. Materialises S x T."""
        raise NotImplementedError

    def keep(self) -> Tensor:
        """That tensor, for a model to use as a mask, not as numbers."""
        return keep_mask(self.to_dense(), self.owner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(KeepMask, name):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.keep(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __eq__(self, other: Any) -> Any:
        return self.keep() == other if isinstance(other, (Tensor, int, float)) else self is other

    def __ne__(self, other: Any) -> Any:
        return self.keep() != other if isinstance(other, (Tensor, int, float)) else self is not other

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, given: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        return function(*_dense(given), **{name: _dense(x) for name, x in (options or {}).items()})


def _computes(name: str) -> Callable[..., Any]:
    def method(self: _Dense, *given: Any) -> Any:
        return getattr(self.keep(), name)(*_dense(given))

    return method


for _name in (
    "invert neg add radd sub rsub mul rmul truediv rtruediv floordiv mod pow matmul rmatmul "
    "and rand or ror xor rxor lt le gt ge float int"
).split():
    setattr(_Dense, f"__{_name}__", _computes(f"__{_name}__"))


def _dense(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)([_dense(one) for one in x])
    return x.keep() if isinstance(x, _Dense) else x


class SparseMask(_Dense):
    """What each query of a forward sees, for all layers of one kind: a plan, made once.

    Transformers hands it from the model to every attention layer. It behaves like the bool mask
    `[B, 1, S, T]` (True attends) that it stands for: it has that shape, moves with `.to`, and where a model
    indexes it, inverts it or gives it to a function of torch, there is that tensor. Only then is anything of
    size S x T made.

    Parameters
    ----------
    plan : Plan
        What is seen.
    batch : int
        B of the shape.
    causal : bool
        Whether no query sees a later key.
    offset : int or Tensor
        Position of the first query, counted from the first key.
    plain : bool
        Whether causality (or, without it, nothing) is all there is beside padding at the ends: no documents,
        windows or holes.
    first : Tensor, optional
        `[B]`: where the tokens of each sequence begin behind padding on the left.
    documents : bool
        Whether some query is the first of a document or chunk, and sees nothing before itself.
    starts : Tensor, optional
        `[B|1, S]`: where the document of each query begins, where causal documents are all there is.
    if_plain : Tensor, optional
        Where no value was looked at (in a trace, on an accelerator): bool, whether causality and padding at
        the ends are all there is.
    padding : Tensor, optional
        bool `[B, T]`, True = token, where causality (or nothing) and this are all there is.
    ranges : (Tensor, Tensor), optional
        Where each query's keys are one range, but for padding: its ends, `[B|1, S]` each.
    tokens : Tensor, optional
        bool `[B, T]`, True = token, where some keys are padding, whatever else is hidden.
    owner : str
        The type of the model that it was made for, for messages.
    cross : bool
        Whether keys are of another sequence than queries, as far as the model says so.
    """

    ndim = 4
    dtype = torch.bool
    is_floating_point = staticmethod(lambda: False)

    def __init__(
        self,
        plan: Plan,
        batch: int,
        *,
        causal: bool,
        offset: int | Tensor = 0,
        plain: bool = False,
        first: Tensor | None = None,
        documents: bool = False,
        starts: Tensor | None = None,
        if_plain: Tensor | None = None,
        padding: Tensor | None = None,
        ranges: tuple[Tensor, Tensor] | None = None,
        tokens: Tensor | None = None,
        owner: str = "",
        cross: bool = False,
    ) -> None:
        self.plan, self.causal, self.offset, self.plain, self.first = plan, causal, offset, plain, first
        self.documents, self.starts, self.if_plain, self.padding = documents, starts, if_plain, padding
        self.ranges, self.tokens, self.owner, self.cross = ranges, tokens, owner, cross
        self.shape = torch.Size((batch, 1, plan.Tq, plan.Tk))
        self._padded: Padded | None = None

    @property
    def by_rule(self) -> bool:
        """Whether `causal`, `offset` and `padding` say all of it."""
        return self.padding is not None or (self.plain and self.first is None)

    @functools.cached_property
    def apart(self) -> Documents | None:
        """The documents as batches, for methods; None where something else is hidden too."""
        return None if self.starts is None else Documents(self.starts.expand(self.shape[0], -1))

    def within(self, begin: Tensor, end: Tensor) -> SparseMask:
        """The mask with each query kept to the keys `[begin, end)`, `[B|1, S]` each: packed documents."""
        Tq, Tk = self.shape[2:]
        query = torch.arange(Tq, device=self.device) + self.offset
        ranges = self.ranges
        if ranges is None and self.plain and self.first is None:
            last = (query + 1).clamp(0, Tk) if self.causal else torch.full_like(query, Tk)
            ranges = torch.zeros_like(query)[None], last[None]
        same: dict[str, Any] = {name: getattr(self, name) for name in ("causal", "offset", "tokens", "owner")}
        if ranges is None:
            plan = self.plan & Plan.from_intervals(begin[:, None], end[:, None], Tk=Tk)
            return SparseMask(plan, self.shape[0], documents=True, **same)
        lo, hi = ranges
        lo = torch.maximum(lo, begin)
        hi = torch.maximum(torch.minimum(hi, end), lo)
        plan, _, _ = _padded(lo, hi, self.tokens, Tk)
        notes = {"documents": True} | (_documents(lo, hi, query, self.tokens) if self.causal else {})
        return SparseMask(plan, self.shape[0], ranges=(lo, hi), **same, **notes)

    @property
    def padded(self) -> Padded | None:
        """The sequences without their padding; None where there is none."""
        if (
            self.tokens is not None and self._padded is None
        ):  # no cached_property: a trace cannot enter its lock
            self._padded = Padded(self.tokens, self.shape[2], self.offset)
        return self._padded

    @functools.cached_property
    def groups(self) -> list[tuple[Group, SparseMask]]:
        """Sequences of one length each, and what the mask says of their own tokens. Looks at values."""
        assert self.padded is not None
        return [(group, self._of(group, self.padded.rank)) for group in self.padded.groups()]

    def _of(self, group: Group, rank: Tensor) -> SparseMask:
        """The mask of a group: between its own tokens, with nothing of padding."""
        (n, Tq), Tk = group.queries.shape, group.keys.shape[1]
        same: dict[str, Any] = {"causal": self.causal, "offset": group.offset, "owner": self.owner}
        if self.by_rule:
            offset = group.offset if self.causal else 0
            plan = Plan.dense(Tq, Tk, causal=self.causal, q_offset=offset, device=self.device)
            return SparseMask(plan, n, plain=True, **same)
        if self.ranges is not None:
            ends = (x.expand(self.shape[0], -1)[group.rows].gather(1, group.queries) for x in self.ranges)
            lo, hi = (rank[group.rows].gather(1, x) for x in ends)
            plan, _, _ = _padded(*_shared(lo, torch.maximum(lo, hi)), None, Tk)
            return SparseMask(plan, n, **same)
        keep = self.plan.to_dense().expand(self.shape[0], -1, -1, -1)[group.rows]
        at = group.queries[:, None, :, None].expand(-1, keep.shape[1], -1, keep.shape[3])
        keep = keep.gather(2, at)
        at = group.keys[:, None, None].expand(-1, keep.shape[1], Tq, -1)
        return SparseMask(Plan.from_mask(keep.gather(3, at)), n, **same)

    @property
    def device(self) -> torch.device:
        """Where the plan lies."""
        return self.plan.device

    def for_methods(self) -> SparseMask:
        """The mask with `plain` and `first` decided: a trace takes it to be plain, and its graph checks."""
        if self.if_plain is None:
            return self
        plain = True
        if torch.compiler.is_compiling():
            torch._assert_async(
                self.if_plain,
                "methods in a compiled model take one document a row, padded at its ends alone: run packed "
                "rows, windows and other masks without torch.compile, or leave these layers dense",
            )
        else:
            plain = bool(self.if_plain)
        names = ("causal", "offset", "padding", "tokens", "ranges", "owner", "cross")
        same = {name: getattr(self, name) for name in names}
        return SparseMask(self.plan, self.shape[0], plain=plain, first=self.first if plain else None, **same)

    def dim(self) -> int:
        """4, as of the tensor it stands for."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape `[B, 1, S, T]`, or one number of it."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> SparseMask:
        """The mask itself."""
        return self

    def to(self, *args: Any, **options: Any) -> Any:
        """The mask on another device; a dtype changes nothing, but bool is refused: the mask knows itself."""
        device, dtype = torch._C._nn._parse_to(*args, **options)[:2]
        if dtype == torch.bool:
            return self.keep().to(dtype)
        if device is None or device == self.device:
            return self
        names = ("offset", "first", "starts", "if_plain", "padding", "tokens")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
        return SparseMask(
            self.plan.to(device),
            self.shape[0],
            causal=self.causal,
            plain=self.plain,
            documents=self.documents,
            owner=self.owner,
            cross=self.cross,
            ranges=None if self.ranges is None else (self.ranges[0].to(device), self.ranges[1].to(device)),
            **given,
        )

    def to_dense(self) -> Tensor:
        """The bool tensor `[B, 1, S, T]`: for models that compute with their mask. Materialises S x T."""
        return self.plan.to_dense().expand(self.shape)

    def __getitem__(self, index: Any) -> Any:
        index = _dense(index)
        rows = (slice(None), 0, slice(None), slice(None))  # what models with an indexer hand to it
        return MaskRows(self) if index == rows else self.keep()[index]

    def __repr__(self) -> str:
        return f"SparseMask({list(self.shape)}, {self.plan!r})"


class MaskRows(_Dense):
    """`mask[:, 0, :, :]`, bool [B, S, T]: made when something computes with it, and not before."""

    ndim = 3
    dtype = torch.bool

    def __init__(self, mask: SparseMask) -> None:
        self.mask, self.owner = mask, mask.owner
        self.shape = torch.Size((mask.shape[0], *mask.shape[2:]))

    def to_dense(self) -> Tensor:
        """The tensor. Materialises S x T."""
        return self.mask.to_dense()[:, 0]

    def __getitem__(self, index: Any) -> Tensor:
        return self.keep()[_dense(index)]


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
    """The mask function registered as "sparse": what Transformers calls once a forward and kind of layer.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, use_vmap, device
        As Transformers gives them: `mask_function(batch, head, query, key)` on index tensors, and the bool
        padding mask `[B, tokens]`, True = token.
    cache_position : Tensor, optional
        `[S]`: what older versions give instead of `q_length` and `q_offset`.
    **options
        Hints for other implementations (`dtype`, `local_size`, `config`, ...), which change no mask.

    Returns
    -------
    SparseMask
        Or `attention_mask` itself where it is one already: generation with static caches calls twice.
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
    mask.owner = getattr(options.get("config"), "model_type", "")
    if not torch.compiler.is_compiling():
        # what Transformers does not say here is an argument of the function of its that calls this one: it
        # looks for packed documents only where a call keeps no cache and was given no mask
        caller = sys._getframe(1).f_locals
        mask = by_positions(mask, caller.get("position_ids"))
        mask.cross = caller.get("encoder_hidden_states") is not None
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
    offset = q_offset - kv_offset
    if isinstance(offset, Tensor):
        offset = int(offset) if _host(offset) else narrow(offset)
    if padding is None and (causal or mask_function is bidirectional_mask_function):
        plan = Plan.dense(q_length, kv_length, causal=causal, q_offset=offset if causal else 0, device=device)
        return SparseMask(plan, batch_size, causal=causal, offset=offset, plain=True)

    query = torch.arange(q_length, device=device) + offset  # counted from the first key
    if use_vmap:  # a function of the user's own
        plan = _any_plan(mask_function, padding, batch_size, q_length, kv_length, q_offset, kv_offset, device)
        return SparseMask(plan, batch_size, causal=_looks_back(plan, query), offset=offset, tokens=padding)
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    at = (query + kv_offset)[None, None, :, None]

    def sees(key: Tensor) -> Tensor:
        """Whether query i sees keys `key[b, i, n]`."""
        found = mask_function(batch, head, at, key[:, None] + kv_offset)
        return found.expand(batch_size, 1, q_length, key.shape[-1])[:, 0]

    simple = causal or mask_function is bidirectional_mask_function
    if causal:
        lo, hi = torch.zeros_like(query)[None], (query + 1).clamp(0, kv_length)[None]
    else:
        lo, hi = _ranges(sees, query.expand(batch_size, -1), kv_length)
        lo, hi = _shared(lo, hi)
        if not _host(lo) or _hold(sees, lo, hi, batch_size, kv_length):
            causal = _host(hi) and bool((hi <= query + 1).all())
        else:
            plan = _any_plan(
                mask_function, padding, batch_size, q_length, kv_length, q_offset, kv_offset, device
            )
            return SparseMask(
                plan, batch_size, causal=_looks_back(plan, query), offset=offset, tokens=padding
            )
    plan, first, solid = _padded(lo, hi, padding, kv_length)
    notes: dict[str, Any] = {}
    if simple:
        notes = {"if_plain": solid} if isinstance(solid, Tensor) else {}
    elif not torch.compiler.is_compiling():
        notes = _documents(lo, hi, query, padding)
    else:  # every mask of a trace is made for documents, whether there are some or not
        notes, causal = {"if_plain": solid & (lo == 0).all() & (hi == query + 1).all()}, True
    return SparseMask(
        plan,
        batch_size,
        causal=causal,
        offset=offset,
        plain=simple and solid is True,
        first=first,
        padding=padding if simple else None,
        ranges=(lo, hi),
        tokens=padding,
        **notes,
    )


def by_positions(mask: SparseMask, positions: Any) -> SparseMask:
    """A mask of self-attention whose documents lie apart, by positions `[B|1, S]` that begin anew.

    A token begins a document where its position is 0 again, or below that of the token before it. Where the
    model itself has made documents, they stay; other things than positions say nothing.
    """
    S = mask.shape[2]
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.is_floating_point():
        return mask
    if positions.shape[1] != S or positions.shape[0] not in (1, mask.shape[0]) or S < 2:
        return mask
    if torch.compiler.is_compiling():
        if mask.by_rule:
            torch._assert_async(
                ~_begins(mask, positions).any(),
                "position_ids begin anew within a row, and the compiled model keeps a cache or was given an "
                "attention_mask: pass use_cache=False and no attention_mask for packed documents",
            )
        return mask
    if known := _packed.get(mask, positions):
        return known[0] or mask
    begins, made = _begins(mask, positions), None
    if bool(begins.any()):
        at = torch.arange(S, device=begins.device) + mask.offset
        begin = torch.where(begins, at, 0).cummax(-1).values
        later = torch.where(begins, at, mask.shape[3]).flip(-1).cummin(-1).values.flip(-1)
        end = torch.nn.functional.pad(later[:, 1:], (0, 1), value=mask.shape[3])
        begin, end = begin.to(mask.device), end.to(mask.device)
        if not mask.documents:
            made = mask.within(begin, end)
        elif mask.ranges is None or not bool((mask.ranges[0] >= begin).all()):
            raise SparseFlashError(
                f"{mask.owner}: position_ids begin anew within a row, in a layer that sees chunks, and the "
                "call keeps a cache or was given an attention_mask: chunks would be counted from the first "
                "token of the row. Pass use_cache=False and no attention_mask"
            )
    return _packed.keep(made, mask, positions) or mask


_packed: Last[SparseMask | None] = Last()
"""The positions that were read last (a weak reference), their version, the mask, and what it became."""


def _begins(mask: SparseMask, positions: Tensor) -> Tensor:
    """Which tokens begin another document than the token before, bool `[B|1, S]`; padding is no token."""
    S = mask.shape[2]
    at = torch.arange(S, device=positions.device)
    real = torch.ones_like(positions, dtype=torch.bool)
    if mask.tokens is not None:
        keys = (at + mask.offset).clamp(max=mask.shape[3] - 1)
        real = mask.tokens.index_select(1, keys.to(mask.tokens.device)).to(positions.device)
    positions = positions.expand(len(real), -1)
    before = torch.where(real, at, -1).cummax(-1).values
    before = torch.nn.functional.pad(before[:, :-1], (1, 0), value=-1)
    last = positions.gather(1, before.clamp(min=0))
    return real & (before >= 0) & ((positions < last) | (positions == 0))


def _documents(lo: Tensor, hi: Tensor, query: Tensor, padding: Tensor | None) -> dict[str, Any]:
    """What `SparseMask` takes of documents or chunks, from ranges [B|1, S]."""
    begins = (lo == query) & (hi > lo) & (query > 0)
    if not bool(begins.any()):
        return {}
    starts = torch.where(begins, query, 0).cummax(-1).values
    alone = padding is None and bool((lo == starts).all() and (hi == query + 1).all())
    return {"documents": True, "starts": starts if alone and int(query[0]) == 0 else None}


def _host(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _padding(mask: Tensor | None, Tk: int, begin: int) -> Tensor | None:
    """The padding mask of the keys at hand, bool [B, Tk]; None where no key is padding."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise SparseFlashError(f"attention_mask {list(mask.shape)}: expected [B, tokens], 1 or True = token")
    missing = begin + Tk - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    mask = mask[:, begin : begin + Tk].bool()
    return None if _host(mask) and bool(mask.all()) else mask


def _ranges(sees: Sees, anchor: Tensor, Tk: int) -> tuple[Tensor, Tensor]:
    """The range [lo, hi) of keys around each query's own, [B, S] each; empty where its own is unseen."""
    anchor = anchor.clamp(0, max(Tk - 1, 0))
    own = sees(anchor[..., None])[..., 0] if Tk else torch.zeros_like(anchor, dtype=torch.bool)
    lo = anchor - _reach(sees, anchor, -1, anchor, Tk)
    hi = anchor + _reach(sees, anchor, 1, Tk - 1 - anchor, Tk) + 1
    return torch.where(own, lo, hi), hi


def _reach(sees: Sees, anchor: Tensor, direction: int, limit: Tensor, Tk: int) -> Tensor:
    """How many keys in a row are seen from the anchor on, by a search that narrows SPREAD times a round."""
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


def _shared(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """One row for all sequences where they are alike."""
    if _host(lo) and len(lo) > 1 and bool((lo == lo[:1]).all() and (hi == hi[:1]).all()):
        return lo[:1], hi[:1]
    return lo, hi


def _hold(sees: Sees, lo: Tensor, hi: Tensor, batch: int, Tk: int) -> bool:
    """Whether ranges whose ends never move back describe a mask: ends exactly, other keys by samples."""
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


def _padded(
    lo: Tensor, hi: Tensor, padding: Tensor | None, Tk: int
) -> tuple[Plan, Tensor | None, bool | Tensor]:
    """Ranges [B|1, S] without padding [B, Tk]; the first keys; and whether padding is at the ends alone."""
    if padding is None:
        plan = Plan.from_intervals(lo[:, None], hi[:, None], Tk=Tk, moving=True)
        return plan, None, True if _host(lo) else torch.ones((), dtype=torch.bool, device=lo.device)
    key = torch.arange(Tk, device=padding.device)
    first = torch.where(padding, key, Tk).amin(-1, keepdim=True)
    last = torch.where(padding, key + 1, 0).amax(-1, keepdim=True)
    lo = torch.minimum(torch.maximum(lo, first), last.clamp(min=first))
    hi = torch.minimum(torch.maximum(hi, first), last.clamp(min=first))
    plan = Plan.from_intervals(lo[:, None], hi[:, None], Tk=Tk, moving=True)
    solid = padding.sum(-1, keepdim=True) == (last - first).clamp(min=0)
    first = torch.minimum(first, last)[:, 0]
    if _host(solid) and bool(solid.all()):
        return plan, first, True
    # padding between tokens: a label for each key, and a test of each pair where there is some
    assert plan.span_full is not None
    holed = dataclasses.replace(
        plan,
        k_seg=torch.where(padding, ANY, NONE).int()[:, None],
        q_seg=torch.full((1, 1, plan.Tq), ANY, dtype=torch.int32, device=padding.device),
        span_full=torch.where(solid[..., None], plan.span_full, 0).int(),
    )
    return (holed, None, False) if _host(solid) else (holed, first, solid.all())  # not looked at


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
    """A mask that is no ranges: evaluated once, as Transformers' own `sdpa` does, and read."""
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
    """Whether no query of a mask of bits sees a later key. Looks at all pairs."""
    key = torch.arange(plan.Tk, device=query.device)
    return not bool((plan.to_dense() & (key > query[:, None])).any())

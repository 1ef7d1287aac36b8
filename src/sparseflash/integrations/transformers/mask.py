"""Attention mask of a forward, shared by all layers of one kind: a plan that behaves like a bool mask."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.options import ANY, NONE
from .keep import KeepMask, keep_mask
from .packed import Documents, Group, Padded

_untold: set[tuple[str, str]] = set()


@torch.compiler.assume_constant_result
def untold(name: str, what: str) -> None:
    """Warn once, while a model is compiled, that document edges are unknown; not part of the graph."""
    if (name, what) in _untold:
        return
    _untold.add((name, what))
    logging.getLogger("sparseflash").warning(
        "%s is compiled, and attention is told no %s: documents packed into one row may see one another. "
        "Give each document a row of its own",
        name,
        what,
    )


class _Dense:
    """Base of tensor stand-ins: torch functions and operators get the real tensor, as a `KeepMask`."""

    owner = ""

    def to_dense(self) -> Tensor:
        """The tensor that the object stands for. Materialises S x T."""
        raise NotImplementedError

    def keep(self) -> Tensor:
        """The tensor as a `KeepMask`, for a model to use as a mask, not as numbers."""
        if torch.compiler.is_compiling():
            untold(self.owner, "position_ids")
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


@dataclasses.dataclass(frozen=True)
class Plain:
    """Only causality (or nothing) and padding hide keys."""


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Each query attends to one key range `[lo, hi)`, `[B|1, S]` each, minus padding."""

    lo: Tensor
    hi: Tensor


@dataclasses.dataclass(frozen=True)
class Packed:
    """Some query is the first of a document or chunk, and sees no key before itself.

    `starts [B|1, S]`: begin of each query's document, if causal documents are the only structure.
    """

    starts: Tensor | None = None
    ranges: Ranges | None = None


@dataclasses.dataclass(frozen=True)
class Bits:
    """Arbitrary structure: only the plan describes it."""


@dataclasses.dataclass(eq=False, repr=False)
class SparseMask(_Dense):
    """Attention mask of a forward, for all layers of one kind: a plan, built once.

    Transformers passes it from the model to every attention layer. It behaves like the bool mask
    `[B, 1, S, T]` (True attends) that it stands for: it has that shape, moves with `.to`, and materialises
    only if a model indexes it, inverts it or passes it to a torch function.

    Parameters
    ----------
    plan : Plan
        Pairs that attend.
    batch : int
        B of the shape.
    kind : Plain, Ranges, Packed or Bits
        What hides keys besides padding.
    causal : bool
        Whether no query sees a later key.
    offset : int or Tensor
        Position of the first query, counted from the first key.
    tokens : Tensor, optional
        bool `[B, T]`, True = token, if some keys are padding.
    if_plain : Tensor, optional
        While compiling: bool, whether only causality and padding at the ends turn out to hide keys.
    owner : str
        Model type that the mask is for, for messages.
    cross : bool
        Whether keys are of another sequence than queries, as far as the model tells.
    mixes : str
        Kinds of the model's layers that would carry one packed document into the next.
    edges : Tensor, optional
        The `cu_seq_lens_q` that the mask already respects.
    held : Held, optional
        Documents that this call appends to a cache, until the cache exists.
    biased : bool
        Whether the source tensor also holds numbers to add to the logits.
    """

    ndim = 4
    dtype = torch.bool
    is_floating_point = staticmethod(lambda: False)

    plan: Plan
    batch: int
    kind: Plain | Ranges | Packed | Bits = Bits()
    _: dataclasses.KW_ONLY
    causal: bool
    offset: int | Tensor = 0
    tokens: Tensor | None = None
    if_plain: Tensor | None = None
    owner: str = ""
    cross: bool = False
    mixes: str = ""
    edges: Tensor | None = None
    held: Any = None
    biased: bool = False

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.batch, 1, self.plan.Tq, self.plan.Tk))
        self._padded: Padded | None = None

    @property
    def by_rule(self) -> bool:
        """Whether `causal`, `offset` and `tokens` describe the mask completely."""
        return isinstance(self.kind, Plain)

    @property
    def documents(self) -> bool:
        """Whether some query is the first of a document or chunk, and sees no key before itself."""
        return isinstance(self.kind, Packed)

    @property
    def ranges(self) -> Ranges | None:
        """Key range of each query, if windows or documents leave a single range, padding aside."""
        kind = self.kind.ranges if isinstance(self.kind, Packed) else self.kind
        return kind if isinstance(kind, Ranges) else None

    @functools.cached_property
    def apart(self) -> Documents | None:
        """The documents as batches, for methods; None if anything else is hidden too."""
        starts = self.kind.starts if isinstance(self.kind, Packed) else None
        return None if starts is None else Documents(starts.expand(self.shape[0], -1))

    def within(self, begin: Tensor, end: Tensor) -> SparseMask:
        """Restrict each query to the keys `[begin, end)`, `[B|1, S]` each, of its packed document."""
        Tq, Tk = self.shape[2:]
        query = torch.arange(Tq, device=self.device) + self.offset
        ranges = self.ranges
        if self.by_rule:
            last = (query + 1).clamp(0, Tk) if self.causal else torch.full_like(query, Tk)
            ranges = Ranges(torch.zeros_like(query)[None], last[None])
        if ranges is None:
            plan = self.plan & Plan.from_intervals(begin[:, None], end[:, None], Tk=Tk)
            return dataclasses.replace(self, plan=plan, kind=Packed())
        lo = torch.maximum(ranges.lo, begin)
        ranges = Ranges(lo, torch.maximum(torch.minimum(ranges.hi, end), lo))
        plan, _ = intervals(ranges, self.tokens, Tk)
        kind = ranged(ranges, query, self.tokens) if self.causal else ranges
        kind = kind if isinstance(kind, Packed) else Packed(ranges=ranges)
        return dataclasses.replace(self, plan=plan, kind=kind)

    def for_keys(self, n: int) -> SparseMask:
        """Adapt the mask to a layer that has n keys instead of Tk, if it is clear which keys those are.

        A cache may hold a different number of tokens in each layer, ending with the queries' own; and a mask
        may be made for more capacity than is filled.
        """
        (Tq, Tk), known = self.shape[2:], isinstance(self.offset, int)
        if known and self.by_rule and self.tokens is None and self.offset + Tq == Tk and n >= Tq:
            causal, at = self.causal and Tq > 1, n - Tq
            plan = Plan.dense(Tq, n, causal=causal, q_offset=at if causal else 0, device=self.device)
            return dataclasses.replace(self, plan=plan, offset=at, held=None)
        if not (known and self.offset + Tq <= n < Tk):
            return self
        kind = self.kind if self.by_rule and self.causal else Bits()
        tokens = None if self.tokens is None else self.tokens[:, :n]
        plan = self.plan.restrict(k_tokens=torch.arange(n, device=self.device))
        return dataclasses.replace(self, plan=plan, kind=kind, tokens=tokens)

    @property
    def padded(self) -> Padded | None:
        """The sequences without padding; None if there is no padding."""
        if self.tokens is not None and self._padded is None:  # Dynamo cannot trace a cached_property
            self._padded = Padded(self.tokens, self.shape[2], self.offset)
        return self._padded

    @functools.cached_property
    def first(self) -> Tensor | None:
        """The first token of each sequence, `[B]`, where all padding is before it. Looks at values."""
        if self.tokens is None:
            return None
        first = self.tokens.byte().argmax(1)
        return first if bool((self.tokens.sum(1) == self.tokens.shape[1] - first).all()) else None

    @functools.cached_property
    def groups(self) -> list[tuple[Group, SparseMask]]:
        """Groups of sequences of equal length, with their masks without padding. Reads values."""
        assert self.padded is not None
        return [(group, self._of(group, self.padded.rank)) for group in self.padded.groups()]

    def _of(self, group: Group, rank: Tensor) -> SparseMask:
        """Mask of a group among its real tokens."""
        (n, Tq), Tk = group.queries.shape, group.keys.shape[1]
        kind: Plain | Bits = Bits()
        if self.by_rule:
            kind, offset = Plain(), group.offset if self.causal else 0
            plan = Plan.dense(Tq, Tk, causal=self.causal, q_offset=offset, device=self.device)
        elif self.ranges is not None:
            ends = (self.ranges.lo, self.ranges.hi)
            ends = (x.expand(self.shape[0], -1)[group.rows].gather(1, group.queries) for x in ends)
            lo, hi = (rank[group.rows].gather(1, x) for x in ends)
            plan, _ = intervals(Ranges(*shared_rows(lo, torch.maximum(lo, hi))), None, Tk)
        else:
            keep = self.plan.to_dense().expand(self.shape[0], -1, -1, -1)[group.rows]
            at = group.queries[:, None, :, None].expand(-1, keep.shape[1], -1, keep.shape[3])
            keep = keep.gather(2, at)
            at = group.keys[:, None, None].expand(-1, keep.shape[1], Tq, -1)
            plan = Plan.from_mask(keep.gather(3, at))
        return SparseMask(plan, n, kind, causal=self.causal, offset=group.offset, owner=self.owner)

    @property
    def device(self) -> torch.device:
        """Device of the plan."""
        return self.plan.device

    def for_methods(self) -> SparseMask:
        """Mask for methods: in a compiled model it is assumed to be plain, which the graph asserts."""
        if self.if_plain is None:
            return self
        torch._assert_async(
            self.if_plain,
            "methods in a compiled model take one document a row, padded at its ends alone: run packed "
            "rows, windows and other masks without torch.compile, or leave these layers dense",
        )
        return dataclasses.replace(self, kind=Plain() if self.tokens is None else self.kind, if_plain=None)

    def dim(self) -> int:
        """4, as the tensor it stands for."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape `[B, 1, S, T]`, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> SparseMask:
        """Return the mask itself."""
        return self

    def to(self, *args: Any, **options: Any) -> Any:
        """Move to a device; a dtype is ignored, but bool goes to the `KeepMask`, which refuses it."""
        device, dtype = torch._C._nn._parse_to(*args, **options)[:2]
        if dtype == torch.bool:
            return self.keep().to(dtype)
        if device is None or device == self.device:
            return self
        return _moved(self, device)

    def to_dense(self) -> Tensor:
        """Materialise the bool tensor `[B, 1, S, T]`, for models that compute with their mask."""
        return self.plan.to_dense().expand(self.shape)

    def __getitem__(self, index: Any) -> Any:
        index = _dense(index)
        rows = (slice(None), 0, slice(None), slice(None))  # the index that models with an indexer use
        return MaskRows(self) if index == rows else self.keep()[index]

    def __repr__(self) -> str:
        return f"SparseMask({list(self.shape)}, {self.plan!r})"


class MaskRows(_Dense):
    """`mask[:, 0, :, :]`, bool [B, S, T], materialised only when something computes with it."""

    ndim = 3
    dtype = torch.bool

    def __init__(self, mask: SparseMask) -> None:
        self.mask, self.owner = mask, mask.owner
        self.shape = torch.Size((mask.shape[0], *mask.shape[2:]))

    def to_dense(self) -> Tensor:
        """Materialise the S x T tensor."""
        return self.mask.to_dense()[:, 0]

    def __getitem__(self, index: Any) -> Tensor:
        return self.keep()[_dense(index)]


def _moved(x: Any, device: torch.device) -> Any:
    """Move tensors, plans and dataclasses of them to a device."""
    if isinstance(x, (Tensor, Plan)):
        return x.to(device)
    if not dataclasses.is_dataclass(x):
        return x
    fields = {f.name: _moved(getattr(x, f.name), device) for f in dataclasses.fields(x)}
    return dataclasses.replace(x, **fields)


def ranged(ranges: Ranges, query: Tensor, tokens: Tensor | None) -> Ranges | Packed:
    """Classify ranges: `Packed` if some query sees no key before itself, else `Ranges`."""
    lo, hi = ranges.lo, ranges.hi
    begins = (lo == query) & (hi > lo) & (query > 0)
    if not bool(begins.any()):
        return ranges
    starts = torch.where(begins, query, 0).cummax(-1).values
    alone = tokens is None and bool((lo == starts).all() and (hi == query + 1).all())
    return Packed(starts if alone and int(query[0]) == 0 else None, ranges)


def on_host(x: Tensor) -> bool:
    """Whether a tensor's values can be read without synchronisation or graph break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def shared_rows(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce to one row if all sequences have equal ranges."""
    if on_host(lo) and len(lo) > 1 and bool((lo == lo[:1]).all() and (hi == hi[:1]).all()):
        return lo[:1], hi[:1]
    return lo, hi


def intervals(ranges: Ranges, tokens: Tensor | None, Tk: int) -> tuple[Plan, Tensor]:
    """Plan of ranges without padding, and a bool tensor: whether padding is only at the ends."""
    lo, hi = ranges.lo, ranges.hi
    if tokens is None:
        plan = Plan.from_intervals(lo[:, None], hi[:, None], Tk=Tk, moving=True)
        return plan, torch.ones((), dtype=torch.bool, device=lo.device)
    key = torch.arange(Tk, device=tokens.device)
    first = torch.where(tokens, key, Tk).amin(-1, keepdim=True)
    last = torch.where(tokens, key + 1, 0).amax(-1, keepdim=True)
    lo, hi = (torch.minimum(torch.maximum(x, first), last.clamp(min=first)) for x in (lo, hi))
    plan = Plan.from_intervals(lo[:, None], hi[:, None], Tk=Tk, moving=True)
    solid = tokens.sum(-1, keepdim=True) == (last - first).clamp(min=0)
    if on_host(solid) and bool(solid.all()):
        return plan, solid.all()
    # padding between tokens: key labels hide it, and spans that contain some are tested per pair
    assert plan.span_full is not None
    holed = dataclasses.replace(
        plan,
        k_seg=torch.where(tokens, ANY, NONE).int()[:, None],
        q_seg=torch.full((1, 1, plan.Tq), ANY, dtype=torch.int32, device=tokens.device),
        span_full=torch.where(solid[..., None], plan.span_full, 0).int(),
    )
    return holed, solid.all()

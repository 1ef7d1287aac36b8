"""What each query of a forward sees, for all layers of one kind: a plan that behaves like a bool mask."""

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
    """Say once, while a model is compiled, what is not known of packed documents; no part of the trace."""
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
    """What a model computes with gets the tensor that this stands for, as a `KeepMask`."""

    owner = ""

    def to_dense(self) -> Tensor:
        """That tensor. Materialises S x T."""
        raise NotImplementedError

    def keep(self) -> Tensor:
        """That tensor, for a model to use as a mask, not as numbers."""
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
    """Causality (or nothing) hides keys, and padding, wherever it is."""


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Each query sees one range of keys, but for padding: `[lo, hi)`, `[B|1, S]` each."""

    lo: Tensor
    hi: Tensor


@dataclasses.dataclass(frozen=True)
class Packed:
    """Some query is the first of a document or chunk, and sees nothing before itself.

    `starts [B|1, S]`: where the document of each query begins, where causal documents are all there is.
    """

    starts: Tensor | None = None
    ranges: Ranges | None = None


@dataclasses.dataclass(frozen=True)
class Bits:
    """The plan alone says what is seen."""


@dataclasses.dataclass(eq=False, repr=False)
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
    kind : Plain, Ranges, Packed or Bits
        What hides keys, beside padding.
    causal : bool
        Whether no query sees a later key.
    offset : int or Tensor
        Position of the first query, counted from the first key.
    tokens : Tensor, optional
        bool `[B, T]`, True = token, where some keys are padding.
    if_plain : Tensor, optional
        In a trace: bool, whether causality and padding at the ends turn out to be all there is.
    owner : str
        The type of the model that it was made for, for messages.
    cross : bool
        Whether keys are of another sequence than queries, as far as the model says so.
    mixes : str
        The kinds of the model's layers that would carry one packed document into the next.
    edges : Tensor, optional
        The `cu_seq_lens_q` that it keeps to already.
    held : Held, optional
        The documents that this call puts into a cache, until there is one.
    biased : bool
        Whether the tensor that it was read from also holds numbers to add to the logits.
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
        """Whether `causal`, `offset` and `tokens` say all of it."""
        return isinstance(self.kind, Plain)

    @property
    def documents(self) -> bool:
        """Whether some query is the first of a document or chunk, and sees nothing before itself."""
        return isinstance(self.kind, Packed)

    @property
    def ranges(self) -> Ranges | None:
        """The range of keys of each query, where windows or documents make one of them, padding aside."""
        kind = self.kind.ranges if isinstance(self.kind, Packed) else self.kind
        return kind if isinstance(kind, Ranges) else None

    @functools.cached_property
    def apart(self) -> Documents | None:
        """The documents as batches, for methods; None where something else is hidden too."""
        starts = self.kind.starts if isinstance(self.kind, Packed) else None
        return None if starts is None else Documents(starts.expand(self.shape[0], -1))

    def within(self, begin: Tensor, end: Tensor) -> SparseMask:
        """The mask with each query kept to the keys `[begin, end)`, `[B|1, S]` each: packed documents."""
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
        """The mask of a layer that has other keys than it was made for, where it says what these are.

        A cache may hold other numbers of tokens in each layer, of which the last are the queries' own; and a
        mask may be made for more room than there is yet.
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
        """The sequences without their padding; None where there is none."""
        if self.tokens is not None and self._padded is None:  # a trace cannot enter a cached_property
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
        """Sequences of one length each, and what the mask says of their own tokens. Looks at values."""
        assert self.padded is not None
        return [(group, self._of(group, self.padded.rank)) for group in self.padded.groups()]

    def _of(self, group: Group, rank: Tensor) -> SparseMask:
        """The mask of a group: between its own tokens, with nothing of padding."""
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
        """Where the plan lies."""
        return self.plan.device

    def for_methods(self) -> SparseMask:
        """The mask as a trace takes it to be: plain, which its graph checks."""
        if self.if_plain is None:
            return self
        torch._assert_async(
            self.if_plain,
            "methods in a compiled model take one document a row, padded at its ends alone: run packed "
            "rows, windows and other masks without torch.compile, or leave these layers dense",
        )
        return dataclasses.replace(self, kind=Plain() if self.tokens is None else self.kind, if_plain=None)

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
        return _moved(self, device)

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


def _moved(x: Any, device: torch.device) -> Any:
    """Tensors and plans on a device, and dataclasses of them."""
    if isinstance(x, (Tensor, Plan)):
        return x.to(device)
    if not dataclasses.is_dataclass(x):
        return x
    fields = {f.name: _moved(getattr(x, f.name), device) for f in dataclasses.fields(x)}
    return dataclasses.replace(x, **fields)


def ranged(ranges: Ranges, query: Tensor, tokens: Tensor | None) -> Ranges | Packed:
    """What ranges are: documents or chunks, where some query sees nothing before itself."""
    lo, hi = ranges.lo, ranges.hi
    begins = (lo == query) & (hi > lo) & (query > 0)
    if not bool(begins.any()):
        return ranges
    starts = torch.where(begins, query, 0).cummax(-1).values
    alone = tokens is None and bool((lo == starts).all() and (hi == query + 1).all())
    return Packed(starts if alone and int(query[0]) == 0 else None, ranges)


def on_host(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at, for nothing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def shared_rows(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """One row for all sequences where they are alike."""
    if on_host(lo) and len(lo) > 1 and bool((lo == lo[:1]).all() and (hi == hi[:1]).all()):
        return lo[:1], hi[:1]
    return lo, hi


def intervals(ranges: Ranges, tokens: Tensor | None, Tk: int) -> tuple[Plan, Tensor]:
    """The plan of ranges without padding; and whether padding is at the ends alone, a bool tensor."""
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
    # padding between tokens: a label for each key, and a test of each pair where there is some
    assert plan.span_full is not None
    holed = dataclasses.replace(
        plan,
        k_seg=torch.where(tokens, ANY, NONE).int()[:, None],
        q_seg=torch.full((1, 1, plan.Tq), ANY, dtype=torch.int32, device=tokens.device),
        span_full=torch.where(solid[..., None], plan.span_full, 0).int(),
    )
    return holed, solid.all()

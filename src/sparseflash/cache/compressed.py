"""`Compressed`: a cache of all keys and values, older ones compressed to records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..backends.records import Form, Records, pack
from ..common.errors import SparseFlashError, require
from ..ops.attention import attention
from ..ops.decode import decode
from ..ops.merge import merge
from ..plan import Plan
from ..plan.options import is_count
from .base import Attended, Call
from .files import kind
from .growing import Growing


@dataclass(frozen=True)
class Compression:
    """How `Compressed` stores keys and values outside the recent window.

    Parameters
    ----------
    sparsity : float
        Share of each key's and each value's items to drop, the smallest ones.
    int8 : bool
        Whether kept items become 8-bit integers, with one scale per key and value.
    window : int
        Minimum number of last tokens kept uncompressed.
    granule : int
        Tokens compressed at a time: up to this many more than `window` stay uncompressed.
    """

    sparsity: float = 0.0
    int8: bool = False
    window: int = 32
    granule: int = 64

    def __post_init__(self) -> None:
        pack(torch.zeros(1, 1, 1, 1), sparsity=self.sparsity, int8=self.int8)
        require(
            (is_count(self.window), lambda: f"window={self.window!r}: expected an int >= 0, tokens"),
            (is_count(self.granule, 1), lambda: f"granule={self.granule!r}: expected an int >= 1, tokens"),
        )

    def packed(self, x: Tensor) -> Records:
        """Compress rows `[B,H,n,D]`."""
        return pack(x, sparsity=self.sparsity, int8=self.int8)


@dataclass(frozen=True)
class Mustafar(Compression):
    """Keeps the largest items of every key and value, with a bit mask of their indices.

    No token is dropped; attention is computed on the compressed records.

    Paper: Joo et al., "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning", arXiv 2505.22913,
    section 3: by token and magnitude, half or 0.7 of the items, with the last 32 tokens uncompressed.

    Parameters
    ----------
    sparsity, int8, window, granule
        As in `Compression`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Compressed(sf.cache.Mustafar(0.7))
    >>> for n in (4000, 1, 1):
    ...     q, k, v = torch.randn(1, 8, n, 64), *torch.randn(2, 1, 2, n, 64)
    ...     out = cache.attend(q, k, v)
    >>> out.shape, cache.tokens, round(cache.bytes / (2 * 2 * 4002 * 64 * 4), 2)
    (torch.Size([1, 8, 1, 64]), 4002, 0.41)
    """

    sparsity: float = 0.7

    paper = "arXiv 2505.22913"


@dataclass(frozen=True)
class Int8(Compression):
    """Stores all items of keys and values as 8-bit integers, with one scale per key and value.

    Parameters
    ----------
    sparsity, int8, window, granule
        As in `Compression`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Compressed(sf.cache.Int8())
    >>> cache.append(*torch.randn(2, 1, 2, 4096, 64).bfloat16())
    >>> cache.tokens, cache
    (4096, Compressed(tokens=4096, bytes=1299328))
    """

    int8: bool = True


@kind
class Compressed(Attended):
    """All keys and values of a layer, older ones compressed; attention over the stored records is exact.

    The last tokens stay uncompressed; `granule` tokens at a time become records (`sparseflash.records`),
    which decoding reads without unpacking them. A prompt is attended to before it is compressed. Inference
    only.

    Parameters
    ----------
    how : Compression
        `cache.Mustafar(0.7)` or `cache.Int8()`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Compressed(sf.cache.Int8())
    >>> for n in (500, 1, 1):
    ...     q, k, v = torch.randn(1, 8, n, 32), *torch.randn(2, 1, 2, n, 32)
    ...     out = cache.attend(q, k, v)
    >>> out.shape, cache.tokens
    (torch.Size([1, 8, 1, 32]), 502)
    """

    def __init__(self, how: Compression) -> None:
        require(
            (
                isinstance(how, Compression),
                lambda: f"how={how!r}: expected a compression, such as cache.Mustafar(0.7)",
            )
        )
        self.how = how
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._stored, self._recent = Growing(), Growing(room=self.how.granule)
        self._forms: tuple[Form, Form] | None = None
        self._dtype = torch.float32
        self.first: Tensor | None = None
        """Integers [B]: index of the first real key of each sequence; None: no padding on the left."""
        self.taken()

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self._stored.tokens + self._recent.tokens

    @property
    def keys(self) -> tuple[Records, Tensor] | None:
        """The records of older keys, and the uncompressed last keys; None if the cache is empty."""
        return self._both(0)

    @property
    def values(self) -> tuple[Records, Tensor] | None:
        """As `keys`, of the values."""
        return self._both(1)

    def _both(self, which: int) -> tuple[Records, Tensor] | None:
        stored, recent = ((x.keys, x.values)[which] for x in (self._stored, self._recent))
        if stored is None or recent is None or self._forms is None:
            return None
        return Records(stored, self._forms[which], self._dtype), recent

    def tensors(self) -> dict[str, Tensor]:
        """Records and last tokens, with their spare capacity."""
        parts = {"stored": self._stored, "recent": self._recent}
        own = {f"{part}.{name}": x for part, of in parts.items() for name, x in of.tensors().items()}
        return own if self.first is None else own | {"first": self.first}

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]`, and compress what is no longer recent."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise SparseFlashError("a cache that compresses has no gradients: call it under torch.no_grad()")
        self._recent.append(k, v)
        keys, values = self._recent.keys, self._recent.values
        assert keys is not None and values is not None
        n = max(self._recent.tokens - self.how.window, 0) // self.how.granule * self.how.granule
        if not n and self._forms is not None:
            return
        own = tuple(self.how.packed(x[:, :, :n]) for x in (keys, values))
        self._forms, self._dtype = (own[0].form, own[1].form), k.dtype
        self._stored.append(own[0].data, own[1].data)
        rest = keys[:, :, n:].clone(), values[:, :, n:].clone()
        self._recent.reset()
        self._recent.append(*rest)

    def plan(self, Tq: int = 1) -> tuple[Plan, Plan]:
        """Plans of the last Tq queries: over the records, and over the uncompressed keys."""
        stored, recent = self._stored.tokens, self._recent.tokens
        device = next(iter(self.tensors().values())).device
        if self.first is None:
            return (
                Plan.dense(Tq, stored, causal=True, q_offset=self.tokens - Tq, device=device),
                Plan.dense(Tq, recent, causal=True, q_offset=recent - Tq, device=device),
            )
        made = []
        for begin, size in ((0, stored), (stored, recent)):
            low = (self.first - begin).clamp(0, size)
            spans = torch.stack([low, torch.full_like(low, size)], -1).view(-1, 1, 1, 1, 2)
            offset = self.tokens - Tq - begin
            made.append(Plan.from_spans(spans, Tq=Tq, Tk=size, tile=max(Tq, 1), causal=True, q_offset=offset))
        return made[0], made[1]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attend to records and recent keys; padding must be on the left, in the first call."""
        n, begun, real, options = q.shape[2], self.is_initialized, call.real, dict(call.options)
        if real is not None:
            first = real.int().argmax(-1)
            if begun or not bool((real.sum(-1) == n - first).all()):
                raise SparseFlashError(
                    "a cache that compresses takes padding on the left, in the first call alone: "
                    "tokenizer.padding_side = 'left'"
                )
            self.first = first
        if not begun:
            out: Tensor = (call.new or attention)(q, k, v, call.among_new(q), **options)
            self.append(k, v)
            return out
        self._recent.append(k, v)  # attended to uncompressed; compressed below
        over_stored, over_recent = self.plan(n)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        parts = [decode(q, keys[1], values[1], over_recent, return_lse=True, **options)]
        if self._stored.tokens:
            options["sink_logits"] = None  # a sink counts in one part only
            parts.append(decode(q, keys[0], values[0], over_stored, return_lse=True, **options))
        self.append(k[:, :, :0], v[:, :, :0])
        return parts[0][0] if len(parts) == 1 else merge(parts)[0]

    def crop(self, n: int) -> None:
        """Drop tokens at the end, as `Layer.crop`; records are not decompressed again."""
        left = self._left(n)
        self._recent.crop(max(left - self._stored.tokens, 0) - self._recent.tokens)
        self._stored.crop(min(left, self._stored.tokens) - self._stored.tokens)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._stored.select_rows(rows)
        self._recent.select_rows(rows)
        self.first = None if self.first is None else self.first.index_select(0, rows.to(self.first.device))

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The contents for a file: tensors and options."""
        own = {"first": self.first}
        for part, of in (("stored", self._stored), ("recent", self._recent)):
            own |= {f"{part}.keys": of.keys, f"{part}.values": of.values}
        form = {"forms": self._forms, "dtype": str(self._dtype).removeprefix("torch.")}
        return {name: x for name, x in own.items() if x is not None}, {"how": vars(self.how), **form}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """Rebuild a layer from the contents of a file."""
        made = cls(Compression(**options["how"]))
        for part, of in (("stored", made._stored), ("recent", made._recent)):
            of.keys, of.values = tensors.get(f"{part}.keys"), tensors.get(f"{part}.values")
        if options["forms"] is not None:
            key, value = (Form(*x) for x in options["forms"])
            made._forms = key, value
        made._dtype, made.first = getattr(torch, options["dtype"]), tensors.get("first")
        return made

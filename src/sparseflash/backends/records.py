"""Compress keys and values: only the largest items of each row, 8-bit integers, or both.

Each row is one record, so a tensor of records is appended to, cropped and reordered by rows like any cache.
The record of a row of D items concatenates: a bit mask of the kept items (padded to 64-bit words, lowest bit
first; absent if all are kept), the fp32 scale (int8 only), and the items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """Layout of the record of a row: `kept` of `dim` items, as int8 or in the rows' dtype."""

    dim: int
    kept: int
    int8: bool

    @property
    def bits(self) -> int:
        """Bytes of the bit mask."""
        return -(-self.dim // 64) * 8 if self.kept < self.dim else 0

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a record, a multiple of 4."""
        items = 4 + self.kept if self.int8 else self.kept * dtype.itemsize
        return -(-(self.bits + items) // 4) * 4


@dataclass(frozen=True, eq=False)
class Records:
    """Rows `[B,H,T,D]` as records: `pack` makes them, `decode` computes on them, `unpack` gives them back.

    Parameters
    ----------
    data : Tensor
        uint8 `[B,H,T,bytes]`.
    form : Form
        Layout of those bytes.
    dtype : torch.dtype
        Dtype of the rows: fp32, bf16 or fp16.
    """

    data: Tensor
    form: Form
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the rows, [B,H,T,D]."""
        return torch.Size((*self.data.shape[:3], self.form.dim))

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.data.nbytes

    def __getitem__(self, tokens: slice) -> Records:
        """Records of a slice of tokens, as a view."""
        return Records(self.data[:, :, tokens], self.form, self.dtype)

    def like(self) -> Tensor:
        """A placeholder with the shape, dtype and device of the rows, expanded from one element."""
        return torch.zeros((), dtype=self.dtype, device=self.data.device).expand(self.shape)

    def unpack(self) -> Tensor:
        """Decompress to rows; dropped items are 0."""
        form, data = self.form, self.data
        lead = data.shape[:3]
        items = data[..., form.bits :]
        if form.int8:
            scale = items[..., :4].contiguous().view(torch.float32)
            kept = items[..., 4 : 4 + form.kept].contiguous().view(torch.int8).float() * scale
            kept = kept.to(self.dtype)
        else:
            kept = items[..., : form.kept * self.dtype.itemsize].contiguous().view(self.dtype)
        if not form.bits:
            return kept.view(*lead, form.dim)
        place = torch.arange(8, dtype=torch.uint8, device=data.device)
        there = (data[..., : form.bits, None] >> place & 1).flatten(3)[..., : form.dim].bool()
        rank = (there.cumsum(-1) - 1).clamp(min=0)
        return torch.where(there, kept.gather(-1, rank), 0)


def _bytes(x: Tensor) -> Tensor:
    """Reinterpret each row as its bytes."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def pack(x: Tensor, *, sparsity: float = 0.0, int8: bool = False) -> Records:
    """Compress rows to records: keep the items largest by magnitude, optionally as 8-bit integers.

    Parameters
    ----------
    x : Tensor
        `[B,H,T,D]`; fp32, bf16 or fp16.
    sparsity : float
        Share of items to drop, in [0, 1): D - floor(sparsity * D) of D items are kept, the first of equal
        ones (Mustafar, arXiv 2505.22913, section 3: by token and magnitude).
    int8 : bool
        Whether items become integers in -127 .. 127 with one scale per row.

    Raises
    ------
    SparseFlashError
        If x is no such tensor, or sparsity is out of range.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.backends.records import pack
    >>> x = torch.tensor([0.5, -3.0, 0.0, 1.0]).view(1, 1, 1, 4)
    >>> pack(x, sparsity=0.5).unpack().flatten().tolist()
    [0.0, -3.0, 0.0, 1.0]
    >>> x = torch.randn(1, 2, 100, 64).bfloat16()
    >>> pack(x, sparsity=0.7).nbytes / x.nbytes, pack(x, int8=True).nbytes / x.nbytes
    (0.375, 0.53125)
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in DTYPES or not x.shape[3]:
        given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise SparseFlashError(f"x: {given}; expected fp32, bf16 or fp16 [B,H,T,D]")
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    require(
        (
            number and 0 <= sparsity < 1,
            lambda: f"sparsity={sparsity!r}: expected a number in [0, 1), the share that is dropped",
        ),
        (isinstance(int8, bool), lambda: f"int8={int8!r}: expected True or False"),
    )
    D, dtype, x = x.shape[3], x.dtype, x.detach()
    form = Form(D, D - math.floor(sparsity * D), int8)
    parts = []
    if form.bits:
        order = x.abs().argsort(dim=-1, descending=True, stable=True)[..., : form.kept].sort(-1).values
        there = torch.zeros((*x.shape[:3], form.bits * 8), dtype=torch.bool, device=x.device)
        there = there.scatter_(-1, order, True).view(*x.shape[:3], form.bits, 8)
        weight = 1 << torch.arange(8, dtype=torch.uint8, device=x.device)
        parts.append((there * weight).sum(-1, dtype=torch.uint8))
        x = x.gather(-1, order)
    if int8:
        scale = x.abs().amax(-1, keepdim=True).float() / 127
        parts.append(_bytes(scale))
        x = (x.float() / torch.where(scale > 0, scale, 1)).round().clamp(-127, 127).to(torch.int8)
    parts.append(_bytes(x))
    data = torch.cat(parts, -1)
    return Records(torch.nn.functional.pad(data, (0, form.bytes(dtype) - data.shape[-1])), form, dtype)

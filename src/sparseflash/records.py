"""Keys and values in fewer bytes: the largest items of each row, 8-bit integers, or both.

A row is one record, so that a cache of records is a tensor like any other: it is appended to, cropped and
reordered by rows. The record of a row of D items has, one behind the other, bits that say which items are
kept (of 64 items each, the first the lowest; none where all are), the scale of integers (fp32), and the
items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import SparseFlashError, require

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """What a record of a row of `dim` items is."""

    dim: int
    kept: int
    int8: bool

    @property
    def bits(self) -> int:
        """Bytes of the bits."""
        return -(-self.dim // 64) * 8 if self.kept < self.dim else 0

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a record, whole words of four."""
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
        What its bytes are.
    dtype : torch.dtype
        That of the rows: fp32, bf16 or fp16.
    """

    data: Tensor
    form: Form
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """That of the rows."""
        return torch.Size((*self.data.shape[:3], self.form.dim))

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.data.nbytes

    def __getitem__(self, tokens: slice) -> Records:
        """Those of some tokens; nothing is copied."""
        return Records(self.data[:, :, tokens], self.form, self.dtype)

    def like(self) -> Tensor:
        """A tensor of the shape, dtype and device of the rows, and of no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.data.device).expand(self.shape)

    def unpack(self) -> Tensor:
        """The rows: what was not kept is 0."""
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
    """The bytes of each row, side by side."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def pack(x: Tensor, *, sparsity: float = 0.0, int8: bool = False) -> Records:
    """Rows as records: of each the items that are largest by magnitude, as they are or as integers of 8 bits.

    Parameters
    ----------
    x : Tensor
        `[B,H,T,D]`; fp32, bf16 or fp16.
    sparsity : float
        The share of items that is dropped, in [0, 1): of D there stay D - floor(sparsity * D), of equal ones
        the first (Mustafar, arXiv 2505.22913, section 3: by token and magnitude).
    int8 : bool
        Items become integers of -127 .. 127 times a scale of the row.

    Raises
    ------
    SparseFlashError
        For other tensors, or a sparsity out of range.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.records import pack
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
        there = there.scatter_(-1, order, True).unflatten(-1, (-1, 8))
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

"""Bit masks of partial units: key j of a unit is bit j % 32 of word j // 32."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack_bits(cells: Tensor) -> Tensor:
    """Bool [N, tile, unit] to int32 words [N, tile, ceil(unit/32)], key j in bit j % 32 of word j // 32."""
    wide = torch.nn.functional.pad(cells, (0, -cells.shape[-1] % 32))
    return pack_words(wide.contiguous().view(torch.uint8).view(torch.int64).clone())


_GATHER = 0x0102040810204080  # a product with it moves bit 8 i of a word to bit 56 + i, without carries


def pack_words(words: Tensor) -> Tensor:
    """Pack words of eight bool bytes: int64 [N, tile, 4 n], overwritten, to int32 [N, tile, n]."""
    packed = words.mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)
    return packed.view(torch.int32)


def bit(word: Tensor, lane: Tensor) -> Tensor:
    """Whether the bit of each lane is set in its word."""
    return (word >> (lane % WORD)) & 1 != 0

"""Dropout: the words of tokens and the draw of pairs, which `backends/reference/dropout.py` defines."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
QUERIES, KEYS = 0, 1
BLOCK = 256


class Draws(NamedTuple):
    """Arguments of dropout (words of queries and keys, bar, factor of what stays) and of ALiBi (slopes)."""

    queries: Any
    keys: Any
    bar: Any
    kept: Any
    slopes: Any
    slopes_batch: Any


class Draw(NamedTuple):
    """Dropout and ALiBi in a program: words of its own side, address of the others', the head's slope."""

    first: Any
    second: Any
    others: Any
    bar: Any
    scale: Any
    """Factor of the weights that stay: one over their share."""
    slope: Any


@triton.jit
def words_at(WORDS, token, some):
    """Load the two words of tokens."""
    at = WORDS + 2 * token
    first = tl.load(at, mask=some, other=0).to(tl.uint32, bitcast=True)
    return first, tl.load(at + 1, mask=some, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def stays(D, token, some):
    """Mask of the pairs that stay: the program's own tokens along axis 0, `token` along axis 1."""
    first, second = words_at(D.others, token, some)
    x = tl.mul(D.first[:, None] ^ first[None, :], M0, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 16) ^ (D.second[:, None] ^ second[None, :]), M1, sanitize_overflow=False)
    return x.to(tl.int32, bitcast=True) >= D.bar


@triton.jit
def words_kernel(SEED, WORDS, NUMBERS, H, T, side, head, NUMBERED: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the words of BLOCK tokens of one head."""
    blocks = (T + BLOCK - 1) // BLOCK
    bh = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    zero = token * 0
    number = token
    if NUMBERED:
        number = tl.load(NUMBERS + token, mask=token < T, other=0)
    of_head = zero + bh % H + head
    first, second, _, _ = tl.philox(tl.load(SEED), number, of_head, zero + bh // H, zero + side)
    if side == 0:  # XORs every pair's draw with 2^31: it is then compared as a signed number
        second = second ^ 0x80000000
    at = WORDS + 2 * (bh.to(tl.int64) * T + token)
    tl.store(at, first.to(tl.int32, bitcast=True), mask=token < T)
    tl.store(at + 1, second.to(tl.int32, bitcast=True), mask=token < T)


def words(
    seed: Tensor, B: int, H: int, T: int, side: int, numbers: Tensor | None = None, head: int = 0
) -> Tensor:
    """The words of all tokens of a side, int32 [B,H,T,2], by their numbers, of heads from `head` on."""
    made = torch.empty((B, H, T, 2), dtype=torch.int32, device=seed.device)
    programs = B * H * -(-T // BLOCK)
    if programs:
        own = seed if numbers is None else numbers.to(seed.device, torch.int32).contiguous()
        words_kernel[(programs,)](
            seed, made, own, H, T, side, head, NUMBERED=numbers is not None, BLOCK=BLOCK
        )
    return made

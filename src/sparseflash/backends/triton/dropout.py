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
    """What few calls have: words of all queries and keys, the bar, what is left times; slopes of ALiBi."""

    queries: Any
    keys: Any
    bar: Any
    kept: Any
    slopes: Any
    slopes_batch: Any


class Draw(NamedTuple):
    """The same of a program: words of what it holds, where those of others lie; its head's slope."""

    first: Any
    second: Any
    others: Any
    bar: Any
    scale: Any
    """One over the share that stays."""
    slope: Any


@triton.jit
def words_at(WORDS, token, some):
    """The two words of tokens."""
    at = WORDS + 2 * token
    first = tl.load(at, mask=some, other=0).to(tl.uint32, bitcast=True)
    return first, tl.load(at + 1, mask=some, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def stays(D, token, some):
    """Whether pairs stay: what the program holds along the first axis, tokens along the second."""
    first, second = words_at(D.others, token, some)
    x = tl.mul(D.first[:, None] ^ first[None, :], M0, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 16) ^ (D.second[:, None] ^ second[None, :]), M1, sanitize_overflow=False)
    return x.to(tl.int32, bitcast=True) >= D.bar


@triton.jit
def words_kernel(SEED, WORDS, H, T, side, BLOCK: tl.constexpr):
    """The words of BLOCK tokens of one head."""
    blocks = (T + BLOCK - 1) // BLOCK
    bh = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    zero = token * 0
    first, second, _, _ = tl.philox(tl.load(SEED), token, zero + bh % H, zero + bh // H, zero + side)
    if side == 0:  # so every number of a pair is turned by 2^31, and compared as a signed one
        second = second ^ 0x80000000
    at = WORDS + 2 * (bh.to(tl.int64) * T + token)
    tl.store(at, first.to(tl.int32, bitcast=True), mask=token < T)
    tl.store(at + 1, second.to(tl.int32, bitcast=True), mask=token < T)


def words(seed: Tensor, B: int, H: int, T: int, side: int) -> Tensor:
    """The words of all tokens of a side, int32 [B,H,T,2]."""
    made = torch.empty((B, H, T, 2), dtype=torch.int32, device=seed.device)
    programs = B * H * -(-T // BLOCK)
    if programs:
        words_kernel[(programs,)](seed, made, H, T, side, BLOCK=BLOCK)
    return made

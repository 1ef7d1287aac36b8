"""Which weights dropout keeps: the draw that every backend reproduces, in plain integers.

Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), with the seed as its
key, gives each query token two words (r, s) and each key token two (c, d), anew for each batch slot and query
head: the costly part is linear in the tokens. A pair has the number

    x = (r ^ c) * M0;   x ^= x >> 16;   u = (x ^ s ^ d) * M1          (mod 2^32; M0, M1 are Philox's)

and is dropped where u < p * 2^32. Along a row u is one-to-one in a key's word c, along a column in a query's
word r, so the pairs of a row, and those of a column, are as independent as Philox's words are. Tokens are
numbered as in the tensors that the caller passes: the order of rows, tiles and lists makes no difference. A
caller that holds some tokens of many passes their `Numbers` (`numerics`), and drops what one that holds all
of them would drop.
"""

from __future__ import annotations

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
STEP0, STEP1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
QUERIES, KEYS = 0, 1


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four words of 32 bits for a counter of four and a key of two, all of them int64."""
    (a, b, c, d), (k0, k1) = counter, key
    for n in range(10):
        x, y = a * M0, c * M1  # 64-bit products: overflow into the sign leaves the 64 bits the same
        a, b, c, d = (
            (y >> 32 & WORD) ^ b ^ (k0 + n * STEP0 & WORD),
            y & WORD,
            (x >> 32 & WORD) ^ d ^ (k1 + n * STEP1 & WORD),
            x & WORD,
        )
    return [a, b, c, d]


def words(seed: Tensor, token: Tensor, side: int, head: int = 0) -> tuple[Tensor, Tensor]:
    """Compute two words for each token `[B,H,n]` of one side (QUERIES or KEYS), of heads from `head` on."""
    B, H, _ = token.shape
    batch = torch.arange(B, device=token.device)[:, None, None].expand_as(token)
    heads = (head + torch.arange(H, device=token.device))[:, None].expand_as(token)
    seed = seed.to(token.device)
    counter = [token.long() & WORD, heads, batch, torch.full_like(heads, side)]
    first, second, *_ = philox(counter, [seed & WORD, seed >> 32 & WORD])
    return first, second


def left(seed: Tensor, bar: int, query: Tensor, key: Tensor, head: int = 0) -> Tensor:
    """True where the pair of query token `[B,H,n]` and key token `[B,H,m]` is kept: bool `[B,H,n,m]`."""
    (r, s), (c, d) = words(seed, query, QUERIES, head), words(seed, key, KEYS, head)
    x = (r[..., None] ^ c[..., None, :]) * M0 & WORD
    x = (x ^ x >> 16 ^ s[..., None] ^ d[..., None, :]) * M1 & WORD
    return x >= bar

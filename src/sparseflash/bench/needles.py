"""Planted needles: single keys that hold all the mass of those who ask for them, and what a plan keeps of it.

Who asks decides which methods find them. A method that probes the last queries knows what these ask and
nothing else; one that pools queries and keys of a block sees no token that stands alone among others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.errors import SparseFlashError
from sparseflash.ops._arguments import AnyPlan

KINDS = ("question", "mid", "lone")
"""Who asks: the last tokens; neighbours in the middle; single tokens, each far from the others."""
RUN = 4
"""Tokens of a run, for each needle that they ask for."""


@dataclass(frozen=True)
class Needles:
    """Queries and keys with needles; see `plant`.

    Parameters
    ----------
    q, k : Tensor
        [B,Hq,T,D] and [B,Hkv,T,D].
    asking, asked : Tensor
        int64 [B,Hkv,N]: pairs of a query and a key token. All query heads of a KV head ask for the same.
    scale : float
        Of the logits.
    """

    q: Tensor
    k: Tensor
    asking: Tensor
    asked: Tensor
    scale: float

    def dense(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of causal attention, and the needle's share, for every asking row: [B,Hq,N] both."""
        group = self.q.shape[1] // self.k.shape[1]
        rows, keys = (x.repeat_interleave(group, 1) for x in (self.asking, self.asked))
        asking = self.q.gather(2, rows[..., None].expand(*rows.shape, self.q.shape[3])).double()
        logits = asking @ self.k.double().repeat_interleave(group, 1).mT * self.scale
        future = torch.arange(self.k.shape[2], device=self.k.device) > rows[..., None]
        lse = logits.masked_fill(future, float("-inf")).logsumexp(-1)
        return lse, (logits.gather(3, keys[..., None])[..., 0] - lse).exp()

    @torch.no_grad()
    def kept(self, plan: AnyPlan) -> Tensor:
        """Share of the mass of every asking row and query head that a plan shows: [B,Hq,N]."""
        lse = sf.attention(self.q, self.k, self.k, plan, scale=self.scale, return_lse=True)[1]
        rows = self.asking.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        return (lse.gather(2, rows) - self.dense()[0]).exp().clamp(max=1)


def plant(
    q: Tensor,
    k: Tensor,
    kind: str,
    generator: torch.Generator,
    *,
    count: int = 8,
    scale: float | None = None,
    gap: float = 16.0,
    loud: bool = False,
) -> Needles:
    """Needles of a kind in queries and keys, real ones at best.

    A needle is the mean key of its head and, across it, a direction of its own, as long as the key that is
    farthest from the mean: queries that do not ask for it have no more to do with it than with other keys. It
    lies at least an eighth of the sequence before those who ask. These are queries of its direction, so long
    that every other key's logit is lower by `gap` and the log of the length: they give the needle all but
    e^-gap of their mass.

    Parameters
    ----------
    q, k : Tensor
        [B,Hq,T,D] and [B,Hkv,T,D], which are left as they are.
    kind : str
        One of `KINDS`. "question" and "mid" are runs of four tokens for each needle.
    generator : torch.Generator
        Draws directions and places, for each KV head.
    count : int
        Needles of a KV head.
    scale : float, optional
        Of the logits; 1 / sqrt(D) where there is none.
    gap : float
        See above.
    loud : bool
        Leave the mean out of the needle. The mean query of trained models has a large negative product with
        the mean key, so that all queries look at a key without it, as they do at a sink: probes of the last
        queries then find what these do not ask for.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from sparseflash.bench.needles import plant
    >>> q, k = torch.randn(2, 1, 2, 1024, 32)
    >>> found = plant(q, k, "lone", torch.Generator().manual_seed(0))
    >>> plan = sf.methods.Window(window=100).select(found.q, found.k).plan
    >>> bool((found.dense()[1] > 0.999).all()), bool((found.kept(plan) > 0.001).any())
    (True, False)
    """
    (B, Hq, T, D), Hkv = q.shape, k.shape[1]
    if kind not in KINDS:
        raise SparseFlashError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if T < 16 * RUN * count:
        raise SparseFlashError(f"{count} needles in {T} tokens: they want {16 * RUN * count}; plant fewer")
    scale = D**-0.5 if scale is None else scale

    def draw(low: Tensor | int, high: Tensor | int, *shape: int) -> Tensor:
        return (low + torch.rand(B, Hkv, *shape, generator=generator) * (high - low)).long()

    number = torch.arange(count)
    if kind == "lone":
        asking = T // 4 + draw(number * (T * 3 // 4) // count, (number + 1) * (T * 3 // 4) // count, count)
        asked = draw(T // 32, asking - T // 8 - count, count)
    else:
        begin = draw(T // 2, T * 5 // 8, 1) if kind == "mid" else T - RUN * count
        asking = (begin + torch.arange(RUN * count)).expand(B, Hkv, -1)
        asked = draw(T // 32, T * 3 // 8 - count, count)
    asked = asked // count * count + number  # no two are the same
    turn = (torch.arange(asking.shape[2]) % count).to(q.device)
    asking, asked = asking.to(q.device), asked.to(q.device)
    mean = k.float().mean(2, keepdim=True)
    own = torch.randn(B, Hkv, count, D, generator=generator).to(q.device)
    own = _across(own, mean[:, :, 0], q.float().unflatten(1, (Hkv, -1)).mean((2, 3)))
    needle = own * (k.float() - mean).norm(dim=-1).amax(2)[..., None, None] + (0 if loud else mean)
    k = k.scatter(2, asked[..., None].expand_as(needle), needle.to(k.dtype))

    asked, to = asked[:, :, turn], torch.nn.functional.normalize(needle, dim=-1)[:, :, turn]
    logits = to @ k.float().mT * scale
    lead = logits.gather(3, asked[..., None]) - logits.scatter(3, asked[..., None], float("-inf")).amax(
        3, True
    )
    asks = (to * (gap + math.log(T)) / lead).repeat_interleave(Hq // Hkv, 1).to(q.dtype)
    rows = asking.repeat_interleave(Hq // Hkv, 1)[..., None].expand_as(asks)
    return Needles(q.scatter(2, rows, asks), k, asking, asked, scale)


def _across(x: Tensor, *means: Tensor) -> Tensor:
    """Unit vectors [B,H,N,D] without what they share with the means [B,H,D]."""
    basis = torch.linalg.qr(torch.stack(means, -1)).Q
    return torch.nn.functional.normalize(x - x @ basis @ basis.mT, dim=-1)

"""Planted needles: single keys that hold all the mass of certain queries, and how much of it a plan keeps.

Which queries ask decides which methods find the needles. A method that probes the last queries finds only
what these ask for; one that pools the queries and keys of a block misses a lone token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.common.errors import SparseFlashError
from sparseflash.ops._arguments import AnyPlan

KINDS = ("question", "mid", "lone")
"""Which queries ask: the last ones; neighbours in the middle; single ones, far from each other."""
RUN = 4
"""Number of consecutive asking tokens per needle."""


@dataclass(frozen=True)
class Needles:
    """Queries and keys with needles; see `plant`.

    Parameters
    ----------
    q, k : Tensor
        [B,Hq,T,D] and [B,Hkv,T,D].
    asking, asked : Tensor
        int64 [B,Hkv,N]: (query, key) token pairs. All query heads of a KV head ask for the same needle.
    scale : float
        Scale of the logits.
    """

    q: Tensor
    k: Tensor
    asking: Tensor
    asked: Tensor
    scale: float

    def dense(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of causal attention, and the needle's share, for every asking row: [B,Hq,N] each."""
        group = self.q.shape[1] // self.k.shape[1]
        rows, keys = (x.repeat_interleave(group, 1) for x in (self.asking, self.asked))
        asking = self.q.gather(2, rows[..., None].expand(*rows.shape, self.q.shape[3])).double()
        logits = asking @ self.k.double().repeat_interleave(group, 1).mT * self.scale
        future = torch.arange(self.k.shape[2], device=self.k.device) > rows[..., None]
        lse = logits.masked_fill(future, float("-inf")).logsumexp(-1)
        return lse, (logits.gather(3, keys[..., None])[..., 0] - lse).exp()

    @torch.no_grad()
    def kept(self, plan: AnyPlan) -> Tensor:
        """Share of each asking row's mass on the plan's pairs, by query head: [B,Hq,N]."""
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
    """Plant needles of a kind in queries and keys, preferably real ones.

    A needle is the mean key of its head plus an orthogonal direction of its own, as long as the key farthest
    from the mean: queries that do not ask for it weigh it like other keys. It lies at least an eighth of the
    sequence before the asking queries. These are queries along its direction, long enough that every other
    key's logit is lower by `gap` plus the log of the length: they give the needle all but e^-gap of their
    mass.

    Parameters
    ----------
    q, k : Tensor
        [B,Hq,T,D] and [B,Hkv,T,D]; not modified.
    kind : str
        One of `KINDS`. "question" and "mid" use runs of four tokens per needle.
    generator : torch.Generator
        Draws directions and positions, for each KV head.
    count : int
        Needles per KV head.
    scale : float, optional
        Scale of the logits; 1 / sqrt(D) by default.
    gap : float
        Logit margin, see above.
    loud : bool
        Leave the mean out of the needle. In trained models the mean query has a large negative product with
        the mean key, so all queries attend to a key without it, as to a sink: probes of the last queries then
        also find needles that these do not ask for.

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
    (B, _, T, _), Hkv = q.shape, k.shape[1]
    if kind not in KINDS:
        raise SparseFlashError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if T < 16 * RUN * count:
        raise SparseFlashError(f"{count} needles in {T} tokens: they want {16 * RUN * count}; plant fewer")

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
    asked = asked // count * count + number  # makes them distinct
    return plant_at(q, k, asking, asked, generator, scale=scale, gap=gap, loud=loud)


def plant_at(
    q: Tensor,
    k: Tensor,
    asking: Tensor,
    asked: Tensor,
    generator: torch.Generator,
    *,
    scale: float | None = None,
    gap: float = 16.0,
    loud: bool = False,
) -> Needles:
    """Plant needles at given places: `plant` with asking queries `[B,Hkv,n]` that ask for keys in turn.

    Parameters
    ----------
    asking, asked : Tensor
        Integers `[B,Hkv,n]` and `[B,Hkv,count]`: queries, and distinct earlier keys; query i asks for key
        `i % count`.
    q, k, generator, scale, gap, loud
        As in `plant`.
    """
    (B, Hq, _, D), Hkv, count = q.shape, k.shape[1], asked.shape[2]
    scale = D**-0.5 if scale is None else scale
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
    asks = (to * (gap + math.log(k.shape[2])) / lead).repeat_interleave(Hq // Hkv, 1).to(q.dtype)
    rows = asking.repeat_interleave(Hq // Hkv, 1)[..., None].expand_as(asks)
    return Needles(q.scatter(2, rows, asks), k, asking, asked, scale)


def _across(x: Tensor, *means: Tensor) -> Tensor:
    """Remove from x [B,H,N,D] its components along the means [B,H,D], and normalise."""
    basis = torch.linalg.qr(torch.stack(means, -1)).Q
    return torch.nn.functional.normalize(x - x @ basis @ basis.mT, dim=-1)

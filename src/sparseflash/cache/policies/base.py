"""Base of eviction policies: a score for each held key, and how many of the best to keep."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...common.errors import SparseFlashError, require
from ...plan.options import is_count
from ...selection.budgets import top_indices


@dataclass(frozen=True)
class Held:
    """What a layer holds when it must evict: `[B,Hkv,n]`, keys ordered by position.

    Parameters
    ----------
    k, v : Tensor
        `[B,Hkv,n,D]` and `[B,Hkv,n,Dv]`.
    position : Tensor
        Integers: position of each token; -1 is padding (heads hold different numbers, sequences are padded).
    q : Tensor
        `[B,Hq,w,D]`: the last queries, as many as `Policy.queries` or fewer.
    mass : Tensor, optional
        Attention weight that each key has received so far, summed over queries and the heads of a group.
    tokens : int
        Number of tokens so far, padding included: positions are below it.
    own, prompt : Tensor
        Integers `[B]`: real tokens of each sequence, now and at the first eviction.
    scale, softcap
        Options of the attention.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    q: Tensor
    mass: Tensor | None
    tokens: int
    own: Tensor
    prompt: Tensor
    scale: float
    softcap: float | None = None

    def window(self, rows: int) -> Tensor:
        """Attention weights of the last `rows` queries over the keys, `[B,Hq,rows,n]`."""
        q = self.q[:, :, -rows:]
        B, Hq, w, _ = q.shape
        group = q.reshape(B, self.k.shape[1], -1, q.shape[3])
        logits = (group.float() @ self.k.float().mT * self.scale).view(B, Hq, w, -1)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        at = torch.arange(self.tokens - w, self.tokens, device=q.device)[:, None]
        place = self.position.repeat_interleave(Hq // self.k.shape[1], 1)[:, :, None]
        return torch.where((place >= 0) & (place <= at), logits, -torch.inf).softmax(-1).nan_to_num(0)


@dataclass(frozen=True)
class Policy:
    """Base of all policies: a frozen dataclass that scores a layer's held keys; the best are kept.

    Parameters
    ----------
    budget : int or float
        Keys to keep per KV head, sinks and recent ones included: a number, or a share of the tokens.
    sinks : int
        First tokens of a sequence, always kept.
    recent : int
        Last tokens, always kept.
    renumber : bool
        Whether to count positions among the held keys, as if evicted tokens had never been: an eviction
        rotates the kept keys to new positions. So a model can read beyond its training length (StreamingLLM).
        Otherwise keys keep their original positions.
    """

    budget: int | float = 1024
    sinks: int = 0
    recent: int = 0
    renumber: bool = field(default=False, kw_only=True)

    paper: ClassVar[str] = ""
    massed: ClassVar[Literal["", "all", "last"]] = ""
    """Whose attention mass `score` needs: of all queries so far, or of the last prompt or question."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.startswith(__name__.removesuffix("base")) and cls.paper:
            _REGISTRY[cls.__module__.rpartition(".")[2].replace("_", "-")] = cls

    def __post_init__(self) -> None:
        share = isinstance(self.budget, float) and 0 < self.budget <= 1
        require(
            (
                share or is_count(self.budget, 1),
                f"budget={self.budget!r}: expected keys >= 1, or a share in (0, 1]",
            ),
            (is_count(self.sinks), f"sinks={self.sinks!r}: expected an int >= 0"),
            (is_count(self.recent), f"recent={self.recent!r}: expected an int >= 0"),
            (isinstance(self.renumber, bool), f"renumber={self.renumber!r}: expected True or False"),
        )
        require(
            (
                share or self.sinks + self.recent <= self.budget,
                f"budget={self.budget}: expected at least sinks={self.sinks} + recent={self.recent}",
            )
        )

    @property
    def queries(self) -> int:
        """Number of last queries that `score` needs."""
        return 0

    def of_layer(self, layer: int, layers: int) -> Policy:
        """The policy for layer `layer` of `layers`."""
        return self

    def score(self, held: Held) -> Tensor:
        """Value of each key, `[B,Hkv,n]`; the largest are kept."""
        raise NotImplementedError(f"{type(self).__name__}.score")

    def most(self, tokens: Tensor, prompt: Tensor, heads: int) -> int | Tensor:
        """Keys to keep per head: one number, or integers `[B,heads|1]` if heads differ.

        `tokens [B]` counts the real tokens of each sequence so far, `prompt [B]` those of its prompt, without
        padding.
        """
        if not isinstance(self.budget, float):
            return self.budget
        return (self.budget * tokens.double()).long().clamp(min=1)[:, None]

    def counts(self, score: Tensor, held: Held) -> int | Tensor:
        """Keys to keep, `[B,Hkv]` if heads differ, given the scores; a score of inf must be kept."""
        most = self.most(held.own, held.prompt, score.shape[1])
        return most if isinstance(most, int) else most.expand(score.shape[:2])

    def keep(self, held: Held) -> Tensor:
        """Indices of the keys to keep, ascending, `[B,Hkv,m]`, padded with -1."""
        there = held.position >= 0
        age = held.tokens - 1 - held.position
        score = self.score(held).float().masked_fill(there & (age < self.recent), torch.inf)
        if self.sinks:
            score = score.masked_fill(there & (there.cumsum(-1) <= self.sinks), torch.inf)
        score = score.masked_fill(~there, -torch.inf)
        count = self.counts(score, held)
        most = count if isinstance(count, int) else int(count.max())
        kept = top_indices(score, max(1, min(most, score.shape[-1])), there)
        if isinstance(count, int):
            return kept
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return top_indices(-rank.float(), max(1, most), there & (rank < count[..., None]))

    def seen(self, used: Tensor, most: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        """Index ranges that queries attend to in heads that hold `used` keys and are to keep `most`."""
        return [(torch.zeros_like(used), used)]


@dataclass(frozen=True)
class Everything(Policy):
    """Keeps every key."""

    def keep(self, held: Held) -> Tensor:
        """Indices of all held keys."""
        n = held.position.shape[-1]
        return top_indices(
            torch.zeros_like(held.position, dtype=torch.float32), max(n, 1), held.position >= 0
        )

    def most(self, tokens: Tensor, prompt: Tensor, heads: int) -> Tensor:
        """The number of real tokens."""
        return tokens[:, None]


def pooled(score: Tensor, width: int) -> Tensor:
    """Average each key's score with its neighbours in a window of `width`, so that runs of keys are kept."""
    if width <= 1:
        return score
    flat = score.flatten(0, -2)[:, None]
    mean = torch.nn.functional.avg_pool1d(flat, width, 1, width // 2)
    return mean[..., : score.shape[-1]].view(score.shape)


_REGISTRY: dict[str, type[Policy]] = {}


def names() -> list[str]:
    """Names of all policies, which `policy` makes.

    Examples
    --------
    >>> import sparseflash as sf
    >>> "snapkv" in sf.cache.names()
    True
    """
    return sorted(_REGISTRY)


def policy(name: str, /, **settings: Any) -> Policy:
    """Make a policy by its name.

    Raises
    ------
    SparseFlashError
        If the name or a setting is unknown; the message lists those that exist.
    """
    if name not in _REGISTRY:
        raise SparseFlashError(f"there is no policy {name!r}: policies: {', '.join(names())}")
    cls = _REGISTRY[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    if strange := set(settings) - set(fields):
        raise SparseFlashError(f"{name} has no {', '.join(sorted(strange))}: it has {', '.join(fields)}")
    return cls(**settings)

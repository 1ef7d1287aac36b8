"""The table of cases: one row a method, with its full-budget twin; `test_methods.py` runs all of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf


@dataclass(frozen=True)
class Case:
    """A method at the settings that its tests run.

    Parameters
    ----------
    slug, hyper
        The method, and hyper-parameters at which it is sparse over some hundred tokens.
    full
        Hyper-parameters of the same method that make it dense over up to 256 tokens.
    full_mask
        What dense means there: "causal", "strict" (causal without the self pair) or "all".
    budgets
        Settings in ascending density.
    budget
        Density of `hyper` over 512 tokens of `directions` lies within these two figures.
    recall
        Least attention mass that `hyper` finds on planted needles; None where the method is blind to content.
    golden
        CRC-32 of the mask that `hyper` selects on `directions(1, 4, 96)`.
    """

    slug: str
    hyper: dict[str, Any]
    full: dict[str, Any]
    budgets: list[dict[str, Any]]
    budget: tuple[float, float]
    golden: int
    full_mask: str = "causal"
    recall: float | None = None
    seeded: bool = False
    note: str = field(default="", compare=False)

    def method(self, **change: Any):
        """The sparse method."""
        return sf.methods.get(self.slug, **{**self.hyper, **change})

    def __str__(self) -> str:
        return f"{self.slug}{'-' + self.note if self.note else ''}"


CASES = [
    Case(
        "hash-sparse",
        {"nb": 4},
        {"nb": 1},
        [{"nb": 64}, {"nb": 8}, {"nb": 2}, {"nb": 1}],
        (0.15, 0.45),
        424013608,
        recall=0.99,
        seeded=True,
    ),
    Case(
        "hash-sparse",
        {"nb": 4, "planes": "shared", "include_self": False},
        {"nb": 1, "include_self": False},
        [{"nb": 8}, {"nb": 1}],
        (0.15, 0.45),
        3548177244,
        full_mask="strict",
        recall=0.99,
        seeded=True,
        note="strict",
    ),
    Case(
        "hash-sparse",
        {"nb": 4, "causal_heads": 2, "window": 40},
        {"nb": 1, "causal_heads": 2, "window": 256},
        [{"nb": 8, "window": 10}, {"nb": 8, "window": 100}, {"nb": 1, "window": 512}],
        (0.3, 0.45),
        3156198373,
        seeded=True,
        note="mixed",
    ),
    Case(
        "qk-sparse",
        {"q_drop": 0.3, "k_drop": 0.5},
        {"q_drop": 0.0, "k_drop": 0.0},
        [{"q_drop": 0.9, "k_drop": 0.9}, {"q_drop": 0.5, "k_drop": 0.5}, {"q_drop": 0.5, "k_drop": 0.1}],
        (0.3, 0.4),
        1996611995,
        seeded=True,
    ),
    Case(
        "window",
        {"window": 40},
        {"window": 256},
        [{"window": 1}, {"window": 100}, {"window": 511}],
        (1.0, 1.0),
        1764362868,
    ),
    Case(
        "window",
        {"window": 40, "causal": False},
        {"window": 256, "causal": False},
        [{"window": 1}, {"window": 100}, {"window": 511}],
        (1.0, 1.0),
        129459899,
        full_mask="all",
        note="two-sided",
    ),
    Case(
        "sink-window",
        {"window": 40, "sink_tokens": 3},
        {"window": 256, "sink_tokens": 3},
        [{"window": 1}, {"window": 100}, {"window": 511}],
        (1.0, 1.0),
        3413991746,
    ),
    Case(
        "reformer",
        {"bucket": 32},
        {"bucket": 256},
        [{"bucket": 16}, {"bucket": 64}, {"bucket": 512}],
        (0.1, 0.3),
        2941150316,
        full_mask="strict",
        recall=0.5,
        seeded=True,
    ),
]


def directions(B: int, H: int, T: int, D: int = 16, *, shift: int = 0) -> Tensor:
    """Vectors on no lattice whose values no generator, and no rounding, decides: fp32 [B,H,T,D]."""
    number = torch.arange(B * H * T * D, dtype=torch.float64).view(B, H, T, D) + shift
    return torch.sin(number * 12.9898 + 4.1414).mul(43758.5453).frac().float()


def mask_of(plan: sf.Plan | tuple[sf.Plan, ...]) -> Tensor:
    """The mask of a plan, or of the union of several: bool [B, H, Tq, Tk]."""
    plans = (plan,) if isinstance(plan, sf.Plan) else plan
    masks = [p.to_dense() for p in plans]
    heads = max(m.shape[1] for m in masks)
    union = masks[0].repeat_interleave(heads // masks[0].shape[1], 1)
    for m in masks[1:]:
        union = union | m.repeat_interleave(heads // m.shape[1], 1)
    return union


def needles(B: int, H: int, T: int, D: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit keys, and queries that each point at one earlier key, anywhere: nearly all mass is there."""
    k = torch.nn.functional.normalize(torch.randn(B, H, T, D, generator=generator), dim=-1)
    far = (torch.rand(B, H, T, generator=generator) * (torch.arange(T) + 1)).long()
    q = k.gather(2, far[..., None].expand_as(k)) * (16 * D**0.5)
    return q, k


def mass(q: Tensor, k: Tensor, mask: Tensor) -> float:
    """Mean share of the causal softmax that lies where the mask is true."""
    T = q.shape[2]
    scores = (q.double() @ k.double().mT) * q.shape[-1] ** -0.5
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    p = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    return float((p * mask).sum(-1).mean())

"""BLASST: the kernel skips blocks whose scores lie far below the running maximum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import SparseFlashError
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..plan import Plan
from .base import Context, Method, Selection

BLOCK = 64
"""Keys of the kernel's blocks."""
NEVER = 1e30
"""A threshold that no logits reach: nothing is skipped, and what cannot skip is refused at any length."""


@dataclass(frozen=True)
class BLASST(Method):
    """Dense plan; the kernel skips each block whose scores all lie far below the running maximum.

    The kernel visits keys in order and skips a block of 64 queries by 64 keys if, for each of its queries,
    its largest weight would be less than lambda times the largest so far: it computes neither exponentials
    nor the product with v. Lambda is `factor / keys` (at most 1), so that long prompts, whose weights are
    small, do not lose a larger share. A row loses less than lambda per skipped key, relative to its largest
    weight; among keys of a single block nothing is skipped. All products of q and k are computed, so the
    speed-up is at most 2x.

    Papers: Yuan et al., "BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding",
    arXiv 2512.12087, algorithm 1 (there N is the number of keys, and factor is calibrated for a model).

    Parameters
    ----------
    factor : float
        Lambda times the number of keys, above 0. Smaller is closer to dense attention.
    causal : bool
        Hide keys later than the query.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query. Inference only: `sparseflash.attention` refuses
    `skip_below` if a gradient is needed. `shown` returns the blocks that are not skipped, for which it
    computes the scores. Under torch.compile every length is a separate graph, because the threshold depends
    on it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> q[..., 0], k[..., 0], k[:, :, :4, 0] = 8, 0, 9  # the first keys are what all look at
    >>> method = sf.methods.BLASST(factor=10)
    >>> selection = method.select(q, k)
    >>> round(selection.skip_below, 2), method(q, k, v, selection=selection).shape
    (4.63, torch.Size([1, 2, 1024, 32]))
    >>> method.shown(q, k, selection).density < 0.3
    True
    """

    factor: float = 100.0
    causal: bool = True

    reads = ("q_offset",)
    paper = "arXiv 2512.12087"
    phases = ("prefill", "diffusion")
    causal_selection = False
    forward_only = True

    def __post_init__(self) -> None:
        real = isinstance(self.factor, (int, float)) and not isinstance(self.factor, bool)
        if not (real and 0 < self.factor < math.inf):
            raise SparseFlashError(f"factor={self.factor!r}: expected a finite number above 0")
        if not isinstance(self.causal, bool):
            raise SparseFlashError(f"causal={self.causal!r}: expected True or False")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """A dense plan, and the threshold for this number of keys."""
        at, (Tq, Tk) = (ctx or {}).get("q_offset", 0), (q.shape[2], k.shape[2])
        plan = Plan.dense(Tq, Tk, causal=self.causal, q_offset=at, device=q.device)
        below = max(0.0, math.log(max(Tk, 1)) - math.log(self.factor))
        return Selection(plan, skip_below=below if Tk > BLOCK else NEVER)

    def shown(self, q: Tensor, k: Tensor, selection: Selection, ctx: Context | None = None) -> AnyPlan:
        """Plan of the blocks that the kernel does not skip, for figures; as slow as attention itself.

        A block whose weights all underflow in fp32 counts as skipped.
        """
        told = {name: (ctx or {}).get(name) for name in ("scale", "softcap")}
        plans = selection.plan if isinstance(selection.plan, (tuple, list)) else (selection.plan,)
        found = tuple(_met(q, k, plan, selection.skip_below, told) for plan in plans)
        return found if len(found) > 1 else found[0]


@torch.no_grad()
def _met(q: Tensor, k: Tensor, plan: Plan, skip_below: float | None, told: dict[str, Any]) -> Plan:
    """Key ranges with nonzero weight: v is the one-hot range of each key, so out is the weight per range."""
    Tq, Tk, tile = q.shape[2], k.shape[2], 1 if q.shape[2] <= 8 else 64
    cuts = torch.arange(0, Tk + 1, math.gcd(plan.unit, 64), device=q.device)
    edges = cuts[:0] if plan.spans is None else plan.spans.flatten()
    cuts = torch.cat([cuts, edges, cuts.new_tensor([0, Tk])]).unique().clamp(max=Tk)
    of = torch.bucketize(torch.arange(Tk, device=q.device), cuts, right=True) - 1
    given = []
    for some in torch.arange(len(cuts) - 1, device=q.device).split(512):
        v = (of[:, None] == some).to(k.dtype).expand(*k.shape[:3], -1)
        given.append(attention(q, k, v, plan, skip_below=skip_below, **told) > 0)
    rows = F.pad(torch.cat(given, -1), (0, 0, 0, -Tq % tile)).unflatten(2, (-1, tile)).any(3)
    spans = torch.stack([cuts[:-1], cuts[1:]], -1) * rows[..., None]
    return Plan.from_spans(spans, Tq=Tq, Tk=Tk, tile=tile) & plan

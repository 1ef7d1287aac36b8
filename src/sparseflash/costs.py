"""What a plan should gain over dense attention on this machine, before it is run.

Time is modelled as a sum of costs that are never negative: a call, the rows that are read and written, the
pairs that are visited (once more those that need an element test), and the entries of the lists.
`sparseflash bench breakeven` measures plans of all kinds, fits the costs and keeps them for `predict`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from .errors import SparseFlashError, require
from .files import replacing
from .ops._arguments import AnyPlan
from .plan import Plan
from .plan.entries import ranges

TERMS = ("call", "rows", "sorted", "pairs", "dots", "tests", "gathered", "entries")
"""Costs: of a call, a row x dim (once more if sorted), a pair (x dim), a tested pair, a gathered
key x dim, an entry."""
DIRECTIONS = ("forward", "both")


def features(plan: AnyPlan, q: Tensor, k: Tensor) -> list[float]:
    """How many of each of `TERMS` a call has. Synchronises with an accelerator."""
    B, H, _, D = q.shape
    q_size, k_size = (x.numel() / 1e6 for x in (q, k))
    count = dict.fromkeys(TERMS, 0.0) | {"call": 1.0, "rows": q_size + k_size}
    for one in plan if isinstance(plan, tuple) else (plan,):
        batch, heads = one.extent()
        entries, times = ranges(one), B * H / (batch * heads)
        rows = (one.q_rows - entries.cell % max(one.tiles, 1) * one.tile).clamp(max=one.tile)
        area = (entries.hi - entries.lo) * rows
        pairs = float(area.sum()) * times / 1e6
        count["pairs"] += pairs
        count["dots"] += pairs * D
        count["tests"] += float(area[~entries.full].sum()) * times / 1e6
        if one.index is not None:
            own = one.span_lists
            spans = 0 if own is None else int(own.laid_out(batch, heads).count.sum())
            count["gathered"] += float((entries.hi - entries.lo)[spans:].sum()) * times * D / 1e6
        count["entries"] += len(entries.lo) * times / 1e3
        count["sorted"] += (one.q_order is not None) * q_size + (one.k_order is not None) * k_size
    return [count[term] for term in TERMS]


def fit(points: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Costs, none negative, that minimise the sum of squared relative errors.

    There are few terms, so every choice of those that are not 0 is solved for.
    """
    y = torch.tensor(seconds, dtype=torch.float64)
    x = torch.tensor(points, dtype=torch.float64) / y[:, None]
    size = x.abs().amax(0)
    x, one = x / size.clamp_min(1e-300), torch.ones(len(y), 1, dtype=torch.float64)
    used = [n for n in range(x.shape[1]) if size[n] > 0]
    best, least = [0.0] * x.shape[1], float(len(y))
    for count in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, count)):
            cost = torch.linalg.lstsq(x[:, chosen], one, driver="gelsd").solution
            error = float((x[:, chosen] @ cost - one).square().sum())
            if error < least and bool((cost >= 0).all()):
                best, least = [0.0] * x.shape[1], error
                for n, value in zip(chosen, (cost[:, 0] / size[chosen]).tolist()):
                    best[n] = value
    return best


@dataclass(frozen=True)
class Costs:
    """What things cost on one machine, seconds: per direction for our kernels, and for dense torch SDPA.

    Attributes
    ----------
    machine : str
        Where it was measured.
    ours, dense : mapping
        "forward fp32", "both bf16", ...: a cost for each of `TERMS`.
    """

    machine: str
    ours: Mapping[str, Sequence[float]]
    dense: Mapping[str, Sequence[float]]

    def save(self, path: str | Path | None = None) -> Path:
        """Write them where `predict` looks, or elsewhere."""
        path = Path(path or default_path())
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.__dict__ | {"terms": TERMS}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path | None = None) -> Costs:
        """Read them.

        Raises
        ------
        SparseFlashError
            If they were never measured, or on another machine or by another version.
        """
        path = Path(path or default_path())
        advice = "measure this machine once with: sparseflash bench breakeven"
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            raise SparseFlashError(f"{path}: no costs of this machine there; {advice}") from None
        if not isinstance(found, dict):
            raise SparseFlashError(f"{path}: no costs of this machine there; {advice}")
        same = found.pop("machine", None) == machine() and tuple(found.pop("terms", ())) == TERMS
        require((same, lambda: f"{path}: costs of another machine or version; {advice}"))
        return cls(machine(), **found)


def machine() -> str:
    """What costs depend on: processor or GPU, threads, torch."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    where = gpu or f"{platform.processor() or platform.machine()} x {os.cpu_count()}"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def default_path() -> Path:
    """Where costs are kept: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sparseflash" / "costs.json"


@dataclass(frozen=True)
class Prediction:
    """What to expect of a plan; printed, it reads as a sentence or two.

    Attributes
    ----------
    seconds, dense_seconds : float
        Expected time of our kernel over the plan, and of dense causal torch SDPA.
    shares : dict
        Share of `seconds` of each of `TERMS`.
    break_even : float
        The visited share of the causal area from which on dense attention is faster; 0 where it always is.
    visited : float
        The share that this plan visits.
    """

    seconds: float
    dense_seconds: float
    shares: Mapping[str, float]
    break_even: float
    visited: float

    @property
    def gain(self) -> float:
        """How many times faster than dense."""
        return self.dense_seconds / self.seconds

    @property
    def dominates(self) -> str:
        """The largest cost."""
        return max(self.shares, key=self.shares.__getitem__)

    def __str__(self) -> str:
        what = {
            "call": "the call itself",
            "rows": "reading and writing rows",
            "sorted": "sorting rows into their order",
            "pairs": "weights of visited pairs",
            "dots": "products over visited pairs",
            "tests": "tests of single pairs",
            "gathered": "gathering keys",
            "entries": "walking the lists",
        }
        wins = "sparse" if self.gain > 1 else "dense"
        when = (
            f"dense wins from {self.break_even:.0%} on"
            if self.break_even < 1
            else "it wins at every density of this kind"
        )
        return (
            f"{self.gain:.2g} x dense: {self.seconds * 1e3:.3g} ms expected, "
            f"{self.dense_seconds * 1e3:.3g} ms for torch SDPA; {wins} wins. Most of it is "
            f"{what[self.dominates]} ({self.shares[self.dominates]:.0%}). "
            f"{self.visited:.0%} of the causal area is visited; {when}."
        )


def predict(
    plan: AnyPlan, q: Tensor, k: Tensor, *, direction: str = "both", costs: Costs | None = None
) -> Prediction:
    """Say what a plan should gain over dense causal attention on this machine, and why.

    Parameters
    ----------
    plan : Plan or tuple of Plan
        What would be attended to. Making it is not counted.
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`: shapes and dtype are read, no value is.
    direction : "forward" or "both"
        Forward alone, or with the backward.
    costs : Costs, optional
        Of this machine; by default those that ``sparseflash bench breakeven`` has left.

    Returns
    -------
    Prediction

    Raises
    ------
    SparseFlashError
        Where this machine was never measured, or not for this dtype.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from sparseflash.costs import Costs, predict
    >>> q = torch.empty(1, 4, 4096, 64)
    >>> made_up = [1e-5, 1e-4, 1e-4, 1e-4, 1e-5, 1e-4, 1e-4, 1e-6]
    >>> costs = Costs("a machine", {"both fp32": made_up}, {"both fp32": made_up})
    >>> plan = sf.Plan.dense(4096, 4096, causal=True, window=(255, 0))
    >>> said = predict(plan, q, q, costs=costs)
    >>> said.gain > 5 and said.dominates == "dots"
    True
    """
    require(
        (direction in DIRECTIONS, lambda: f"direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
    )
    costs = costs or Costs.load()
    key = f"{direction} {'bf16' if q.element_size() == 2 else 'fp32'}"
    require(
        (
            key in costs.ours,
            lambda: f"the costs of this machine have no {key}: run sparseflash bench breakeven",
        )
    )
    Tq, Tk = q.shape[2], k.shape[2]
    own, dense = features(plan, q, k), features(Plan.dense(Tq, Tk, causal=True), q, k)
    parts = [n * cost for n, cost in zip(own, costs.ours[key])]
    seconds, other = sum(parts), sum(n * cost for n, cost in zip(dense, costs.dense[key]))
    fixed = sum(parts[:3])  # what does not shrink with the pairs
    pairs = TERMS.index("pairs")
    visited = own[pairs] / dense[pairs] if dense[pairs] else 1.0
    slope = (seconds - fixed) / visited if visited else 0.0
    edge = max(0.0, (other - fixed) / slope) if slope else 1.0
    shares = {name: part / seconds for name, part in zip(TERMS, parts)}
    return Prediction(seconds, other, shares, edge, visited)

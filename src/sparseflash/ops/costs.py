"""Predict, before a plan is run, its time on this machine against dense attention.

Time is modelled as a sum of non-negative costs: per call, per row read or written, per visited pair (plus
a surcharge for pairs that need an element test), and per list entry.
`sparseflash bench breakeven` measures plans of all kinds, fits the costs and saves them for `predict`.
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

from ..common.errors import SparseFlashError, require
from ..common.files import replacing
from ..plan import Plan
from ..plan.entries import ranges
from ._arguments import AnyPlan

TERMS = ("call", "rows", "sorted", "pairs", "dots", "tests", "gathered", "entries")
"""Cost terms: per call, row x dim, sorted row x dim (extra), pair, pair x dim, tested pair,
gathered key x dim, list entry."""
DIRECTIONS = ("forward", "both")


def features(plan: AnyPlan, q: Tensor, k: Tensor) -> list[float]:
    """Count each of `TERMS` in one call. Synchronises with an accelerator."""
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
    """Fit non-negative costs that minimise the sum of squared relative errors.

    There are few terms, so least squares is solved for every subset of non-zero costs, and the best is kept.
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
    """Measured costs of one machine in seconds, per direction and dtype: our kernels, and dense torch SDPA.

    Attributes
    ----------
    machine : str
        The machine they were measured on (see `machine`).
    ours, dense : mapping
        "forward fp32", "both bf16", ...: a cost for each of `TERMS`, in its order.
    """

    machine: str
    ours: Mapping[str, Sequence[float]]
    dense: Mapping[str, Sequence[float]]

    def save(self, path: str | Path | None = None) -> Path:
        """Write the costs to `path`, by default where `predict` looks."""
        path = Path(path or default_path())
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.__dict__ | {"terms": TERMS}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path | None = None) -> Costs:
        """Read the costs from `path`, by default where `save` writes.

        Raises
        ------
        SparseFlashError
            If this machine was never measured, or the file is of another machine or version.
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
    """What the costs depend on: processor or GPU, number of threads, torch version."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    where = gpu or f"{platform.processor() or platform.machine()} x {os.cpu_count()}"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def default_path() -> Path:
    """Default file of the costs, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sparseflash" / "costs.json"


@dataclass(frozen=True)
class Prediction:
    """Expected time of a plan; `str()` gives a summary in a few sentences.

    Attributes
    ----------
    seconds, dense_seconds : float
        Expected time of our kernel over the plan, and of dense causal torch SDPA.
    shares : dict
        Share of `seconds` of each of `TERMS`.
    break_even : float
        Visited share of the causal area above which dense attention is faster; 0 if dense is always faster.
    visited : float
        Share of the causal area that this plan visits.
    """

    seconds: float
    dense_seconds: float
    shares: Mapping[str, float]
    break_even: float
    visited: float

    @property
    def gain(self) -> float:
        """Speed-up over dense attention."""
        return self.dense_seconds / self.seconds

    @property
    def dominates(self) -> str:
        """The term with the largest share of the time."""
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
    """Predict the speed-up of a plan over dense causal attention on this machine, and its main cost.

    Parameters
    ----------
    plan : Plan or tuple of Plan
        The plan to attend over. The time to build it is not counted.
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`; only shapes and dtype are read, no values.
    direction : "forward" or "both"
        Forward alone, or forward plus backward.
    costs : Costs, optional
        Costs of this machine; by default those that ``sparseflash bench breakeven`` has saved.

    Returns
    -------
    Prediction

    Raises
    ------
    SparseFlashError
        If this machine was never measured, or not for this dtype.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from sparseflash.ops.costs import Costs, predict
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
    fixed = sum(parts[:3])  # call, rows, sorted: independent of the number of pairs
    pairs = TERMS.index("pairs")
    visited = own[pairs] / dense[pairs] if dense[pairs] else 1.0
    slope = (seconds - fixed) / visited if visited else 0.0
    edge = max(0.0, (other - fixed) / slope) if slope else 1.0
    shares = {name: part / seconds for name, part in zip(TERMS, parts)}
    return Prediction(seconds, other, shares, edge, visited)

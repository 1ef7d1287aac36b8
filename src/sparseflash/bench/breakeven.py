"""Break-even surface: density x length x head dimension on this machine, building the plan included.

The same points fit the costs that `sparseflash.predict` uses; every fifth point is held out of the fit and
shows the error of a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

import sparseflash as sf
from sparseflash.bench.cases import Blocks, forward, forward_backward, inputs
from sparseflash.bench.quality import density
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.ops.costs import DIRECTIONS, Costs, features, fit, machine, predict
from sparseflash.plan import Plan
from sparseflash.train.attention import dense

Make = Callable[[], Plan]
EVERY = 5
"""Every EVERY-th point is held out of the fit; with four densities, each density is held out in turn."""
SHARE = 0.2
"""A time is this percentile of its rounds: the machine with little interference."""


def window(length: int, heads: int, share: float) -> Make:
    """Causal windows: one span per tile."""
    size = max(1, round(length * (1 - math.sqrt(1 - share))))
    return lambda: Plan.dense(length, length, causal=True, window=(size - 1, 0))


def buckets(length: int, heads: int, share: float) -> Make:
    """Random buckets: rows are sorted and gathered."""
    generator = torch.Generator().manual_seed(0)
    bucket = torch.randint(0, max(1, round(1 / share)), (1, heads, length), generator=generator)
    return lambda: Plan.from_buckets(bucket, bucket)


def blocks(length: int, heads: int, share: float) -> Make:
    """Random 128 x 128 blocks, from a block mask."""
    return lambda: Blocks(128, 128, share)(length, heads)


def units(length: int, heads: int, share: float) -> Make:
    """Random units of 16 keys for tiles of 64 queries."""
    return lambda: Blocks(64, 16, share)(length, heads)


KINDS: dict[str, Callable[[int, int, float], Make]] = {
    "window": window,
    "buckets": buckets,
    "blocks": blocks,
    "units of 16": units,
}


def measure(
    *,
    kinds: Sequence[str] = tuple(KINDS),
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    dims: Sequence[int] = (32, 64, 128),
    densities: Sequence[float] = (0.5, 0.25, 0.125, 0.03125),
    heads: int = 2,
    dtypes: Sequence[str] = ("fp32",),
    rounds: int = 7,
    minutes: float = 6.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure the surface. ``gain`` includes building the plan, ``gain_kernel`` does not.

    Yields
    ------
    dict
        One row per point and direction; ``features`` is the input of `fitted`.
    """
    box = Box(minutes * 60)
    groups = [(T, D, dtype) for T in lengths for D in dims for dtype in dtypes]
    number = 0
    for done, (T, D, dtype) in enumerate(groups):
        q, k, v, dout = inputs(T, heads=heads, dim=D, dtype=dtype)
        runs: dict[str, Callable[[], object]] = {
            "dense forward": forward(dense, q, k, v),
            "dense both": forward_backward(dense, q, k, v, dout),
        }
        plans = {}
        for kind in kinds:
            for share in densities:
                name, make = f"{kind} {share}", KINDS[kind](T, heads, share)
                plan = plans[kind, share] = make()
                runs[f"{name} make"] = make

                def attend(
                    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan = plan
                ) -> torch.Tensor:
                    return sf.attention(q, k, v, plan)

                runs[f"{name} forward"] = forward(attend, q, k, v)
                runs[f"{name} both"] = forward_backward(attend, q, k, v, dout)
        share_of_box = Box(box.left / (len(groups) - done))
        timings = interleave(
            runs,
            rounds=rounds,
            box=share_of_box,
            on_run=lambda name, T=T, D=D: on_run(f"T = {T}, D = {D}, {name}"),
        )
        for (kind, share), plan in plans.items():
            number += 1
            seen = density(plan)
            counted = features(plan, q, k)
            for direction in DIRECTIONS:
                base, own = timings[f"dense {direction}"], timings[f"{kind} {share} {direction}"]
                make_ms = timings[f"{kind} {share} make"].percentile(SHARE) * 1e3
                row: Row = {"bench": "breakeven", "case": f"{kind}, T = {T}", "kind": kind, "T": T, "dim": D}
                row |= {"heads": heads, "dtype": dtype, "direction": direction}
                row |= {"share": share, "density": seen}
                row |= {"ms_dense": base.percentile(SHARE) * 1e3, "ms": own.percentile(SHARE) * 1e3}
                row["ms_make"] = make_ms
                row["gain"] = row["ms_dense"] / (row["ms"] + make_ms)
                row["gain_kernel"] = row["ms_dense"] / row["ms"]
                row |= {"rounds": len(own.times), "held_out": "yes" if number % EVERY == 0 else ""}
                yield row | {"features": " ".join(f"{x:.6g}" for x in counted)}


def fitted(rows: Sequence[Row]) -> Costs:
    """Fit the costs of this machine to the rows that are not held out."""
    ours, base = {}, {}
    used = [row for row in rows if not row["held_out"]]
    for key in dict.fromkeys(f"{row['direction']} {row['dtype']}" for row in used):
        own = [row for row in used if f"{row['direction']} {row['dtype']}" == key]
        ours[key] = fit([_floats(row) for row in own], [row["ms"] / 1e3 for row in own])
        points = {(row["T"], row["dim"]): row for row in own}.values()
        whole = [features(Plan.dense(r["T"], r["T"], causal=True), *_shapes(r)) for r in points]
        base[key] = fit(whole, [row["ms_dense"] / 1e3 for row in points])
    return Costs(machine(), ours, base)


def predicted(rows: Sequence[Row], costs: Costs) -> Iterator[Row]:
    """Add to each row the gain that `predict` expects, and its relative error."""
    for row in rows:
        plan = KINDS[row["kind"]](row["T"], row["heads"], row["share"])()
        expected = predict(plan, *_shapes(row), direction=row["direction"], costs=costs)
        yield row | {"predicted": expected.gain, "off": expected.gain / row["gain_kernel"] - 1}


def edges(rows: Sequence[Row]) -> list[Row]:
    """Density up to which each kind beats dense attention, building the plan included."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[x] for x in ("kind", "T", "dim", "dtype", "direction"))
        found.setdefault(key, []).append(row)
    result = []
    for (kind, T, dim, dtype, direction), points in found.items():
        points = sorted(points, key=lambda row: row["density"])
        won = [n for n, row in enumerate(points) if row["gain"] >= 1]
        edge = points[won[-1]]["density"] if won else 0.0
        if won and won[-1] + 1 < len(points):
            low, high = points[won[-1] : won[-1] + 2]
            a, b = math.log(low["gain"]), math.log(high["gain"])
            edge *= (high["density"] / low["density"]) ** (a / (a - b))
        row = {"bench": "breakeven-edges", "case": f"{kind}, D = {dim}", "kind": kind, "T": T, "dim": dim}
        row |= {"dtype": dtype, "direction": direction, "edge": edge}
        note = (
            "at every density measured"
            if edge == points[-1]["density"]
            else ""
            if edge
            else "at none measured"
        )
        result.append(row | {"note": note})
    return result


def _floats(row: Row) -> list[float]:
    return [float(x) for x in row["features"].split()]


def _shapes(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.bfloat16 if row["dtype"] == "bf16" else torch.float32
    x = torch.empty(1, row["heads"], row["T"], row["dim"], dtype=dtype)
    return x, x

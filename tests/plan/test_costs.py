"""The cost model: costs come back from times made of them, and what is said of a plan follows from them."""

import dataclasses

import pytest
import torch

pytest.importorskip("safetensors")

import sparseflash as sf
from sparseflash.bench import breakeven
from sparseflash.common.errors import SparseFlashError
from sparseflash.ops.costs import TERMS, Costs, features, fit, machine, predict


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it brings, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TRUE = [2e-5, 3e-4, 1e-4, 0.0, 4e-5, 5e-4, 7e-5, 6e-6]


def a_plan(T, w):
    return sf.Plan.dense(T, T, causal=True, window=(w - 1, 0))


def test_features_count_what_is_visited():
    q, k = torch.empty(2, 4, 300, 16), torch.empty(2, 2, 300, 16)
    found = dict(zip(TERMS, features(sf.Plan.dense(300, 300, causal=True, tile=64), q, k)))
    tiles = [(64, 64), (64, 128), (64, 192), (64, 256), (44, 300)]
    assert found["call"] == 1
    assert found["rows"] == pytest.approx((2 * 4 + 2 * 2) * 300 * 16 / 1e6)
    assert found["pairs"] == pytest.approx(8 * sum(r * c for r, c in tiles) / 1e6)
    assert found["dots"] == pytest.approx(found["pairs"] * 16)
    assert 0 < found["tests"] < found["pairs"] and found["sorted"] == 0
    ids = torch.randint(4, (1, 4, 300))
    found = dict(zip(TERMS, features(sf.Plan.from_buckets(ids, ids), q, k)))
    assert found["sorted"] == pytest.approx(found["rows"])


def test_costs_come_back_from_times_made_of_them_and_none_is_negative():
    torch.manual_seed(0)
    points = torch.rand(60, 8).pow(2).tolist()
    times = [sum(n * cost for n, cost in zip(x, TRUE)) for x in points]
    assert fit(points, times) == pytest.approx(TRUE, rel=1e-6, abs=1e-12)
    wild = [t * (0.5 + torch.rand(1).item()) for t in times]
    assert min(fit(points, wild)) >= 0


def test_points_left_out_of_the_fit_are_predicted():
    rows = []
    for number, (T, D, share) in enumerate(
        (t, d, s) for t in (256, 512) for d in (16, 32) for s in (0.5, 0.2, 0.1)
    ):
        q = torch.empty(1, 2, T, D)
        plan = breakeven.window(T, 2, share)()
        own, whole = features(plan, q, q), features(sf.Plan.dense(T, T, causal=True), q, q)
        row = {"kind": "window", "T": T, "dim": D, "heads": 2, "dtype": "fp32", "direction": "both"}
        row |= {"share": share, "held_out": "yes" if number % 4 == 3 else ""}
        row |= {"features": " ".join(map(repr, own)), "ms": 1e3 * sum(n * c for n, c in zip(own, TRUE))}
        row["ms_dense"] = 1e3 * sum(n * c for n, c in zip(whole, TRUE))
        rows.append(row | {"gain_kernel": row["ms_dense"] / row["ms"]})
    found = list(breakeven.predicted(rows, breakeven.fitted(rows)))
    assert sum(row["held_out"] == "yes" for row in found) == 3
    assert max(abs(row["off"]) for row in found) < 1e-3


def test_an_explanation_says_what_dominates_and_when_dense_wins():
    q = torch.empty(1, 1, 4096, 64)
    costs = Costs("here", {"both fp32": TRUE}, {"both fp32": TRUE})
    narrow, wide = (predict(a_plan(4096, w), q, q, costs=costs) for w in (128, 4096))
    assert narrow.gain > 5 and "sparse wins" in str(narrow)
    assert wide.visited == 1 and wide.gain == pytest.approx(1, rel=0.1)
    assert narrow.dominates == "dots" and sum(narrow.shares.values()) == pytest.approx(1)
    slow = dataclasses.replace(costs, ours={"both fp32": [x * 3 for x in TRUE]})
    said = predict(a_plan(4096, 128), q, q, costs=slow)
    assert 0.2 < said.break_even < 0.5 and "dense wins from" in str(said)
    with pytest.raises(SparseFlashError, match="expected one of forward, both"):
        predict(a_plan(64, 8), q, q, direction="back", costs=costs)
    with pytest.raises(SparseFlashError, match="no both bf16"):
        predict(a_plan(4096, 8), q.bfloat16(), q.bfloat16(), costs=costs)


def test_costs_are_those_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    q = torch.empty(1, 1, 64, 16)
    with pytest.raises(SparseFlashError, match="sparseflash bench breakeven"):
        sf.predict(a_plan(64, 8), q, q)
    Costs(machine(), {"both fp32": TRUE}, {"both fp32": TRUE}).save()
    assert sf.predict(a_plan(64, 8), q, q).gain > 0
    Costs("another", {"both fp32": TRUE}, {"both fp32": TRUE}).save()
    with pytest.raises(SparseFlashError, match="of another machine"):
        sf.predict(a_plan(64, 8), q, q)


def test_the_surface_has_every_point_and_its_edge_lies_between_two():
    rows = list(
        breakeven.measure(
            kinds=["window", "buckets"], lengths=[64], dims=[8], densities=[0.5, 0.1], heads=1, rounds=1
        )
    )
    assert len(rows) == 8 and all(row["gain"] < row["gain_kernel"] for row in rows)
    point = {"kind": "a", "T": 1, "dim": 1, "dtype": "fp32", "direction": "both"}
    edge = breakeven.edges([point | {"density": d, "gain": g} for d, g in ((0.1, 4.0), (0.4, 0.25))])
    assert edge[0]["edge"] == pytest.approx(0.2)
    assert breakeven.edges([point | {"density": 0.1, "gain": 0.9}])[0]["note"] == "at none measured"

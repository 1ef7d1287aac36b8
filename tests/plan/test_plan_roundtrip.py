"""Plans taken apart and put together: for compiled code, in files, of lists of both kinds, by joint rules."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

import plans
from sparseflash import Plan, PlanError
from sparseflash.plan import flat, saved
from sparseflash.plan.make import masks
from sparseflash.plan.record import KeyLists
from sparseflash.plan.rules import Rules, same

KINDS = sorted(plans.KINDS)
SOME = {"batch": 2, "heads": 4, "Tq": 20, "Tk": 33, "tile": 8, "unit": 16}


def equal(a, b):
    """Whether two values are the same: numbers, tensors of one dtype, records of them."""
    if isinstance(a, KeyLists):
        return isinstance(b, KeyLists) and all(equal(x, vars(b)[n]) for n, x in vars(a).items())
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def alike(a, b):
    """Whether two plans are the same in every field; the names of those that differ."""
    fields = [f.name for f in dataclasses.fields(Plan)]
    return [n for n in fields if not equal(getattr(a, n), getattr(b, n))] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_plan_is_itself_after_any_way_there_and_back(kind, prepared):
    several = [plans.example(seed, kind, **SOME).plan for seed in (3, 4)]
    several = [plan.prepare() if prepared else plan for plan in several]
    tensors, ints = flat.flatten_all(several)
    assert len(ints) == 2 * flat.INT_SLOTS and all(type(n) is int for n in ints)
    again = flat.unflatten_all(tensors, ints)
    assert len(again) == 2 and all(map(alike, several, again))
    assert alike(flat.unflatten(*flat.flatten(several[1])), several[1])
    for plan in several:
        read = pickle.loads(pickle.dumps(plan))
        assert alike(plan, read) and (read.span_keys is None) == (plan.span_keys is None)


def test_rooms_that_a_file_claims_are_believed_where_they_are_so():
    plan = Plan.dense(20, 33, causal=True, tile=8)
    room = plan.span_room
    assert room > 1
    lists = plan.span_lists
    assert saved._fits(lists, room, real=True) and saved._fits(lists, room, real=False)
    for wrong in (0, 1, room + 1, True, float(room), None, -room):
        assert not saved._fits(lists, wrong, real=True)
    for name, by in (("start", 1), ("count", room)):
        other = dataclasses.replace(lists, **{name: getattr(lists, name) + by})
        assert not saved._fits(other, room, real=True) and saved._fits(other, room, real=False)
    state = saved.state(plan)
    assert saved.restored(Plan, state)["span_room"] == room
    assert "span_room" not in saved.restored(Plan, state | {"span_room": room + 1})
    for broken in (None, {}, state | {"Tq": None}, {n: x for n, x in state.items() if n != "prepared"}):
        with pytest.raises(PlanError):
            saved.restored(Plan, broken)


@pytest.mark.parametrize("size", [(1, 1), (8, 16), (9, 17), (7, 33)])
@pytest.mark.parametrize("grid", [(8, 16), (1, 1), (4, 40)])
def test_a_mask_of_a_compiled_function_lists_every_unit(size, grid, generator):
    mask = torch.rand(2, 3, *size, generator=generator) < 0.5
    fields = masks._every_unit(mask.flatten(0, 1), tuple(mask.shape), *grid)
    plan = Plan(**fields).check()
    assert torch.equal(plan.to_dense(), mask)
    columns = -(-size[1] // grid[1])
    assert plan.count.unique().tolist() == [columns] and not plan.full.any()


# ---------------------------------------------------------------- rules

TABLES = {
    "q_pos": torch.arange(20).int().view(1, 1, -1),
    "k_pos": torch.arange(33).int().view(1, 1, -1),
    "k_end": torch.arange(33).int().view(1, 1, -1) + 9,
    "q_seg": torch.zeros(1, 1, 20).int(),
    "k_seg": torch.zeros(1, 1, 33).int(),
    "head_window": torch.tensor([[[3, 0]]]).int(),
    "head_sink": torch.tensor([[[2]]]).int(),
}
OTHER = {"causal": True, "include_self": False, "window": (3, 0), "sink": 2, "q_offset": 4} | TABLES


def test_tables_are_the_same_where_all_numbers_are():
    x = torch.tensor([1, 2])
    assert same(None, None) and same(x, x) and same(x, x.clone())
    assert not same(x, None) and not same(None, x) and not same(x, x[None]) and not same(x, x + 1)


@pytest.mark.parametrize("name", OTHER)
def test_rules_that_differ_in_one_thing_are_not_alike(name):
    plain, other = Rules(causal=True), Rules(causal=True)
    positional = {"causal": False} if name in ("causal",) else {name: OTHER[name]}
    other = other.changed(positional)
    assert plain.alike(plain) and other.alike(other)
    copied = {n: x.clone() for n, x in vars(other).items() if isinstance(x, torch.Tensor)}
    assert other.alike(other.changed(copied))
    assert not plain.alike(other) and not other.alike(plain)


RULES = [
    {},
    {"causal": True},
    {"causal": True, "q_offset": 3},
    {"causal": True, "q_offset": torch.tensor([3, 3]).int()},
    {"include_self": False},
    {"window": (3, 0)},
    {"window": (5, None), "causal": True},
    {"window": (None, 2)},
    {"window": (3, 0), "sink": 2},
    {"window": (4, 1), "sink": 2},
    {"k_end": TABLES["k_end"]},
    {"k_end": TABLES["k_end"] + 1},
    {"k_pos": TABLES["k_pos"] + 1, "causal": True},
    {"q_pos": TABLES["q_pos"] + 1, "causal": True},
    {"q_seg": TABLES["q_seg"], "k_seg": TABLES["k_seg"]},
    {"q_seg": TABLES["q_seg"], "k_seg": TABLES["k_seg"] + 1},
    {"head_window": TABLES["head_window"]},
    {"head_window": TABLES["head_window"], "head_sink": TABLES["head_sink"]},
    {"head_window": TABLES["head_window"] + 1},
]
JOINS = 203
"""How many of their pairs one formula can say."""


def test_rules_of_both_are_one_formula_or_none():
    """What two rules join to lets through what both do; and what can be said in one formula is."""
    given = {f.name for f in dataclasses.fields(Plan) if f.init}
    bare = {n: x for n, x in vars(Plan.dense(20, 33, tile=8)).items() if n in given}

    def seen(rules):
        return Plan(**(bare | {"span_full": bare["span_full"] * 0} | rules)).to_dense().expand(2, -1, -1, -1)

    joins = 0
    for a in RULES:
        for b in RULES:
            both = Rules(**a).join(Rules(**b))
            if both is None:
                continue
            joins += 1
            assert torch.equal(seen(both.fields()), seen(a) & seen(b)), (a, b)
        assert Rules(**a).join(Rules(**a)) is not None and Rules(**a).join(Rules()) is not None
    assert joins == JOINS, "fewer: work is done with bits that a formula could say"


# ---------------------------------------------------------------- ranges and keys in one plan


@pytest.mark.parametrize(
    ("spans", "units", "said"),
    [
        ({}, {}, None),
        ({"tile": 8}, {}, "tiles of one size"),
        ({"causal": True}, {}, "one rule"),
        ({}, {"Tk": 34}, "tokens do not combine"),
        ({"q_order": torch.arange(20).int().view(1, 1, -1)}, {}, "different orders"),
        ({}, {"k_order": torch.arange(33).int().view(1, 1, -1)}, "different orders"),
    ],
)
def test_ranges_and_units_are_one_plan_under_one_rule(spans, units, said):
    ranges = torch.tensor([0, 4]).view(1, 1, 1, 1, 2)
    index = torch.tensor([6, 7]).view(1, 1, 1, 2)
    one = {"Tq": 20, "Tk": 33, "tile": 4} | spans
    two = {"Tq": 20, "Tk": 33, "tile": 4} | units
    a = Plan.from_spans(ranges.expand(1, 1, -(-20 // one["tile"]), 1, 2), **one)
    b = Plan.from_keys(index.expand(1, 1, 5, 2), **two)
    if said is None:
        both = Plan.from_lists(spans=a, index=b, disjoint=True).check()
        assert torch.equal(both.to_dense(), a.to_dense() | b.to_dense())
        assert both.spans is not None and both.index is not None
        for x, y in ((b, b), (a, a), (both, b), (a, both)):
            with pytest.raises(PlanError, match=r"spans=|index="):
                Plan.from_lists(spans=x, index=y)
        return
    with pytest.raises(PlanError, match=said):
        Plan.from_lists(spans=a, index=b)

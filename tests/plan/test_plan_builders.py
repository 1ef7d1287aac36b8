"""Lists made by native code: the ones that PyTorch makes."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from sparseflash import Plan
from sparseflash.backends import cpu
from sparseflash.plan import transpose
from sparseflash.plan.make import native as builders

GRIDS = [(1, 1, 1, 1), (63, 129, 32, 32), (129, 63, 33, 20), (100, 130, 300, 64), (140, 256, 64, 1)]
GRIDS += [(300, 200, 16, 96), (0, 5, 4, 4), (5, 0, 4, 4)]


@pytest.fixture
def both(monkeypatch):
    """Make a plan natively and in PyTorch, and transpose it so; they are the same, to the last number."""

    def compare(make):
        made = []
        for least in (0, 1 << 62):
            monkeypatch.setattr(builders, "LARGE", least)
            plan = make()
            made.append((plan, None if plan.index is None else transpose.transpose_units(plan.unit_lists)))
        (plan, keys), (other, other_keys) = made
        assert plan == other
        if keys is not None:
            for name in ("start", "count", "full", "index", "source"):
                mine, theirs = getattr(keys, name), getattr(other_keys, name)
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
        return plan

    return compare


@pytest.mark.parametrize("Tq, Tk, tile, unit", GRIDS)
def test_a_mask_of_any_strides_is_read_alike(both, generator, Tq, Tk, tile, unit):
    share = torch.tensor([[0.0, 0.01, 0.3], [0.5, 0.999, 1.0]])[..., None, None]
    wide = torch.rand(2, 3, 2 * Tq + 1, Tk + 3, generator=generator) < share
    row, column = wide[:, :, :1, :Tk].expand(-1, -1, Tq, -1), wide[:, :, :Tq, :1].expand(-1, -1, -1, Tk)
    turned = wide[:, :, :Tq, :Tk].mT.contiguous().mT
    for mask in (wide[:, :, 1 : 2 * Tq : 2, 3:], turned, wide[:, :, :Tq, 1:-2].flip(1), row, column):
        both(lambda mask=mask: Plan.from_mask(mask, tile=tile, unit=unit))


def test_a_mask_larger_than_one_go_is_all_of_it(both, generator, monkeypatch):
    mask = torch.rand(2, 2, 200, 300, generator=generator) < 0.01
    for room in (1, 30_000):
        monkeypatch.setattr(cpu.lists, "ROOM", room)
        both(lambda: Plan.from_mask(mask, tile=16, unit=32))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Tq, Tk, tile, unit", [(Tq, Tk, *g) for Tq, Tk, *g in GRIDS if Tk])
def test_units_are_listed_alike(both, generator, Tq, Tk, tile, unit, causal):
    R, C = -(-Tq // tile), -(-Tk // unit)
    grid = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": causal}
    keep = torch.rand(2, 3, R, C, generator=generator) < 0.4
    both(lambda: Plan.from_blocks(keep, **grid))
    distinct = torch.rand(2, 3, R, C, generator=generator).argsort(-1)[..., : C // 2 + 1]
    distinct[..., ::3] = -1
    both(lambda: Plan.from_keys(distinct, unique=True, **grid))
    some = torch.randint(-1, C, (2, 3, R, 9), generator=generator)
    for dtype in (torch.int64, torch.int32, torch.int16):
        both(lambda dtype=dtype: Plan.from_keys(some.to(dtype), **grid))
    for offset in (-50, 37, Tk):
        both(lambda offset=offset: Plan.from_keys(some, q_offset=offset, **grid))


@pytest.mark.parametrize("native", [True, False])
def test_no_list_names_a_unit_that_is_none_even_behind_its_end(native, generator, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu.lists, "ROOM", 0)
        monkeypatch.setenv("SPARSEFLASH_BACKEND", "reference")
    some = torch.randint(-1, 4, (2, 3, 2, 5), generator=generator)
    plan = Plan.from_keys(some, Tq=200, Tk=512, tile=128, unit=128, capacity=4)
    assert plan.room == 4 and int(plan.index.min()) >= 0 and int(plan.index.max()) < 4
    assert int((some < 0).sum()) > 0 < int((plan.count < 4).sum())


def test_units_far_apart_are_sorted_across_the_words_of_the_set(both, generator):
    some = torch.randint(0, 1 << 20, (1, 1, 3, 200), generator=generator)
    plan = both(lambda: Plan.from_keys(some, Tq=3, Tk=1 << 20))
    assert torch.equal(plan.index, torch.cat([row.unique() for row in some[0, 0]]).int())


def test_lists_do_not_depend_on_the_number_of_threads(generator):
    mask = torch.rand(1, 4, 300, 300, generator=generator) < 0.02
    index = torch.randint(-1, 300, (1, 4, 300, 40), generator=generator)
    grid = {"Tq": 300, "Tk": 300, "tile": 1, "unit": 1, "causal": True, "unique": False}
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            kind, bits = cpu.lists.read_mask(mask, 16, 32)
            units = cpu.lists.list_units(index, **grid)
            lists = (units[n].view(4, -1) for n in ("start", "full", "count"))
            made.append([kind, *bits, *units.values(), *cpu.lists.transpose(*lists, units["index"], 300)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize(
    "name, value", [("start", -1), ("start", 1 << 40), ("full", 9), ("count", 1 << 20), ("index", 5)]
)
def test_lists_that_run_out_of_bounds_are_refused(name, value):
    lists = {n: torch.tensor([[0, 2]]) for n in ("start", "full", "count")}
    lists |= {"full": torch.tensor([[1, 0]]).int(), "count": torch.tensor([[2, 2]]).int()}
    lists["index"] = torch.tensor([0, 1, 2, 4]).int()
    cpu.lists.transpose(*lists.values(), 5)
    lists[name].view(-1)[1] = value
    with pytest.raises(ValueError, match="sf_transpose|entries"):
        cpu.lists.transpose(*lists.values(), 5)


def test_units_that_are_none_are_refused():
    for unit in (5, -2, 1 << 40):
        index = torch.tensor([[[[0, unit]]]])
        for unique in (True, False):
            with pytest.raises(ValueError, match="sf_list_units"):
                cpu.lists.list_units(index, Tq=1, Tk=5, tile=1, unit=1, causal=False, unique=unique)


def test_small_lists_load_nothing_and_a_wanted_reference_makes_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(builders, "_find", lambda: asked.append(1))
    Plan.from_mask(torch.ones(256, 256, dtype=torch.bool))
    assert not asked
    Plan.from_mask(torch.ones(512, 512, dtype=torch.bool))
    assert asked
    assert sf.backends.dispatch._builders() is cpu.lists
    monkeypatch.setenv("SPARSEFLASH_BACKEND", "reference")
    assert sf.backends.dispatch._builders() is None

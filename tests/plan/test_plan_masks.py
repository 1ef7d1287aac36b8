"""Masks as plans: dense ones read once, sparse ones, ranges of rows and of keys, other orders of tokens."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from harness import EACH, inputs, run
from sparseflash import Plan, PlanError
from tolerance import compare


def tiles_of(mask, tile, unit):
    """Visible pairs, and pairs, of each tile and unit: the slow way."""
    B, H, Tq, Tk = mask.shape
    R, C = -(-Tq // tile), -(-Tk // unit)
    seen, area = torch.zeros(B, H, R, C), torch.zeros(R, C)
    for r in range(R):
        for c in range(C):
            cell = mask[..., r * tile : (r + 1) * tile, c * unit : (c + 1) * unit]
            seen[..., r, c], area[r, c] = cell.sum((-1, -2)), cell[0, 0].numel()
    return seen, area


def listed_area(plan):
    """Keys times real rows that the plan's lists hold, and those of full entries."""
    entries = sf.plan.entries.ranges(plan)
    rows = (plan.Tq - entries.cell % plan.tiles * plan.tile).clamp(max=plan.tile)
    area = (entries.hi - entries.lo) * rows
    return int(area.sum()), int(area[entries.full].sum())


MASKS = {
    "empty": lambda b, h, q, k: (q < 0) & (k < 0),
    "all": lambda b, h, q, k: (q >= 0) & (k >= 0),
    "full tiles apart": lambda b, h, q, k: torch.isin(k // 32, torch.tensor([0, 2, 3])) | (q >= 90) & (k < 0),
    "one hole": lambda b, h, q, k: (q != 37) | (k != 70),
    "one pair": lambda b, h, q, k: (q == 99) & (k == 64),
    "by head": lambda b, h, q, k: (q - k).abs() < 9 * (h + 1),
    "scattered": lambda b, h, q, k: (q * 7 + k * 11 + h + b * 5) % 13 == 0,
}


def mask_of(name, B=2, H=2, Tq=100, Tk=130):
    at = torch.meshgrid(*(torch.arange(n) for n in (B, H, Tq, Tk)), indexing="ij")
    return MASKS[name](*at)


@pytest.mark.parametrize("tile, unit", [(32, 32), (33, 20), (300, 64)])
@pytest.mark.parametrize("name", MASKS)
def test_exactly_the_tiles_of_a_mask_that_are_not_empty_are_visited_and_full_ones_are_ranges(
    name, tile, unit
):
    mask = mask_of(name)
    plan = Plan.from_mask(mask, tile=tile, unit=unit).check()
    assert torch.equal(plan.to_dense(), mask)
    seen, area = tiles_of(mask, tile, unit)
    visited, full = (int((area * which).sum()) for which in (seen > 0, seen == area))
    assert listed_area(plan) == (visited, full)
    if name == "full tiles apart" and tile == 32:
        assert plan.spans[:2].tolist() == [[0, 32], [64, 128]] and plan.index is None


def test_a_mask_larger_than_a_slab_is_its_slabs(generator, monkeypatch):
    mask = torch.rand(2, 3, 200, 96, generator=generator) < 0.02
    whole = Plan.from_mask(mask, tile=32, unit=32)
    for size in (1, 10_000, 50_000):
        monkeypatch.setattr(sf.plan.make.masks, "SLAB", size)
        assert Plan.from_mask(mask, tile=32, unit=32) == whole


def test_masks_are_taken_as_pytorch_broadcasts_them(generator):
    q, k, v, *_ = inputs(generator, 70, 90, Hkv=4)
    for shape in ((70, 90), (4, 70, 90), (2, 1, 70, 90), (2, 4, 70, 90), (2, 1, 1, 90), (1, 90), (4, 70, 1)):
        mask = torch.rand(shape, generator=generator) < 0.5
        mask[..., :1] = True  # SDPA gives NaN to a query without keys
        got = sf.attention(q, k, v, Plan.from_mask(mask, Tq=70, Tk=90))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(got, want)
    wide = Plan.from_mask((torch.rand(70, 90, generator=generator) < 0.5).expand(2, 4, -1, -1))
    assert wide.extent() == (1, 1)


def test_a_strided_mask_and_one_at_an_odd_address_are_read_right(generator):
    base = torch.rand(1, 1, 140, 140, generator=generator) < 0.1
    for mask in (base.mT, base[..., ::2, 1:129], base.flatten()[3 : 3 + 64 * 64].view(1, 1, 64, 64)):
        assert torch.equal(Plan.from_mask(mask, tile=32, unit=32).to_dense(), mask)


SPARSE = {
    "coo": lambda mask: mask.to_sparse(),
    "csr": lambda mask: mask[0, 0].to_sparse_csr(),
    "csc": lambda mask: mask[0, 0].float().to_sparse_csc(),
    "scipy": lambda mask: pytest.importorskip("scipy.sparse").csr_matrix(mask[0, 0].numpy()),
}


@pytest.mark.parametrize("tile, unit", [(32, 32), (16, 20)])
@pytest.mark.parametrize("form", SPARSE)
def test_a_sparse_matrix_is_the_plan_of_its_dense_mask(form, tile, unit):
    for name in MASKS:
        one = 2 if form == "coo" else 1
        mask = mask_of(name, one, one)
        plan = Plan.from_sparse(SPARSE[form](mask), tile=tile, unit=unit).check()
        assert plan == Plan.from_mask(mask, tile=tile, unit=unit), name


def test_a_pair_stored_twice_is_one_and_a_stored_zero_is_none():
    at = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 2]])
    mask = torch.sparse_coo_tensor(at, torch.tensor([1.0, 2.0, 0.0, 3.0]), (2, 3), check_invariants=True)
    assert Plan.from_sparse(mask).to_dense()[0, 0].int().tolist() == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("at", [[-1, 0], [0, -1], [2, 0], [0, 3]])
def test_a_pair_outside_the_matrix_is_refused(at):
    pair = torch.tensor(at)[:, None]
    mask = torch.sparse_coo_tensor(pair, torch.ones(1), (2, 3), is_coalesced=True, check_invariants=False)
    with pytest.raises(PlanError, match=r"mask \[2, 3\] has entries outside"):
        Plan.from_sparse(mask)


def by_ranges(lo, hi, Tk):
    k = torch.arange(Tk)
    return ((k >= lo[..., None]) & (k < hi[..., None])).any(-2)


@pytest.mark.parametrize("tile, unit", [(32, 32), (7, 20), (64, 1)])
@pytest.mark.parametrize("Tq, Tk, m", [(1, 1, 1), (63, 129, 1), (129, 63, 3), (40, 70, 0), (0, 5, 1)])
def test_ranges_of_a_query_may_overlap_be_empty_and_end_anywhere(Tq, Tk, m, tile, unit, generator):
    lo, hi = (torch.randint(0, Tk + 1, (2, 1, Tq, m), generator=generator) for _ in range(2))
    lo[:, :, : Tq // 2], hi[:, :, : Tq // 2] = Tk // 5, Tk - Tk // 3  # a stretch that all of its queries see
    plan = Plan.from_intervals(lo, hi, Tk=Tk, tile=tile, unit=unit).check()
    assert torch.equal(plan.to_dense().expand(2, -1, -1, -1), by_ranges(lo, hi, Tk))
    prefix = Plan.from_intervals(None, hi, Tk=Tk, tile=tile, unit=unit).check()
    assert torch.equal(prefix.to_dense().expand(2, -1, -1, -1), by_ranges(torch.zeros_like(hi), hi, Tk))
    assert prefix.bits is None


@pytest.mark.parametrize("unit", [1, 2, 3, 8])
def test_a_range_may_end_anywhere_in_a_unit_that_bits_are_about(unit):
    """All rows see keys 0 to end - 1, and one row a few more of the same unit: no key is listed twice."""
    Tk = 3 * unit + 2
    for end in range(1, Tk):
        for more in range(end, Tk + 1):
            hi = torch.full((1, 1, 4, 1), end)
            hi[:, :, 2] = more
            lo = torch.zeros_like(hi)
            plan = Plan.from_intervals(lo, hi, Tk=Tk, tile=4, unit=unit).check()
            assert torch.equal(plan.to_dense(), by_ranges(lo, hi, Tk)), (end, more)
            assert plan.work <= 4 * Tk


@pytest.mark.parametrize("Tq, Tk, tile", [(1, 70, 128), (63, 129, 1), (129, 200, 16), (300, 300, 128)])
def test_ranges_that_move_forward_need_no_bits(Tq, Tk, tile, generator):
    lo, hi = torch.randint(Tk + 1, (2, 2, 3, Tq), generator=generator).sort(-1).values
    plan = Plan.from_intervals(lo, hi, Tk=Tk, moving=True, tile=tile).check()
    key = torch.arange(Tk)
    assert torch.equal(plan.to_dense(), (key >= lo[..., None]) & (key < hi[..., None]))
    assert plan.bits is None
    if Tq > 1:
        with pytest.raises(PlanError, match="decreases"):
            Plan.from_intervals(lo.flip(-1), hi, Tk=Tk, moving=True)


def test_what_all_queries_of_a_tile_see_needs_no_bits_wherever_it_begins():
    lo, hi = torch.full((1, 1, 128), 37), torch.full((1, 1, 128), 555)
    plan = Plan.from_intervals(lo, hi, Tk=700)
    assert plan.spans.tolist() == [[37, 555]] and plan.index is None
    hi[..., 64:] = 600
    plan = Plan.from_intervals(lo, hi, Tk=700)
    assert plan.spans.tolist() == [[37, 512]] and plan.index.tolist() == [4]


@pytest.mark.parametrize("Tq, Tk, offset", [(129, 129, 0), (63, 129, 66), (1, 40, 39), (5, 0, 0)])
def test_a_key_is_seen_until_it_expires(Tq, Tk, offset, generator):
    k_end = torch.randint(0, Tk + 60, (2, 2, Tk), generator=generator)
    k_end[:, :, :48] = Tk + 1
    plan = Plan.from_expiry(k_end, Tq=Tq, q_offset=offset, tile=16, unit=16).check()
    q, k = torch.arange(Tq)[:, None] + offset, torch.arange(Tk)
    mask = (q >= k) & (q < k_end[:, :, None])
    assert torch.equal(plan.to_dense(), mask)
    seen, _ = tiles_of(mask, 16, 16)
    assert Tk == 0 or listed_area(plan)[1] > 0 or Tq == 1
    assert int(plan.count.sum()) <= int((seen > 0).sum()) + plan.tiles * 4  # and of its diagonal nothing more


@EACH
@pytest.mark.parametrize("tile, unit", [(2, 2), (2, 1), (4, 2), (1, 4), (2, None), (4, None)])
@pytest.mark.parametrize("ends", [[3, 3, 4, 4], [1, 2, 3, 4], [9, 2, 9, 3], [2, 2, 2, 2]])
def test_what_expires_within_a_tile_is_left_out_of_the_result(ends, tile, unit, backend, generator):
    """Executed, not only drawn: an entry that is marked full too soon is tested by nobody."""
    k_end = torch.tensor([[ends]])
    plan = Plan.from_expiry(k_end, tile=tile, unit=unit).check()
    q, k, v, dout, dlse = inputs(generator, 4, D=16)
    at = torch.arange(4)
    mask = (at[:, None] >= at) & (at[:, None] < k_end[0, 0])
    assert torch.equal(plan.to_dense()[0, 0], mask)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    compare(got, q, k, v, mask.expand(1, 1, 4, 4), dout=dout, dlse=dlse)


@EACH
def test_all_ways_to_say_a_mask_give_its_results_and_gradients(backend, generator):
    Tq, Tk = 129, 150
    q, k, v, dout, dlse = inputs(generator, Tq, Tk, D=40, Dv=24)
    lo = torch.randint(0, Tk, (2, 1, Tq, 2), generator=generator)
    hi = (lo + torch.randint(0, 60, lo.shape, generator=generator)).clamp(max=Tk)
    hi[:, :, 5] = 0  # an empty row
    mask = by_ranges(lo, hi, Tk)
    k[:, :, ~mask.any(-2).any(0)[0]] = torch.nan
    for plan in (
        Plan.from_mask(mask, tile=64),
        Plan.from_intervals(lo, hi, Tk=Tk, unit=32),
        Plan.from_sparse(mask.to_sparse(), tile=16, unit=16),
    ):
        got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
        compare(got, q, k, v, mask, dout=dout, dlse=dlse)


# ---------------------------------------------------------------- another order


def relabelled_band(T, width, generator):
    token = torch.randperm(T, generator=generator)
    return ((token[:, None] - token).abs() <= width)[None, None]


def test_a_relabelled_band_comes_back_to_within_half_again_of_its_tiles(generator):
    pytest.importorskip("scipy")
    T, width = 1024, 20
    plan = Plan.from_mask(relabelled_band(T, width, generator), tile=32, unit=32)
    found = plan.reordered().check()
    assert torch.equal(found.to_dense(), plan.to_dense())
    band = Plan.from_mask((torch.arange(T)[:, None] - torch.arange(T)).abs() <= width, tile=32, unit=32)
    assert plan.work > 10 * band.work
    assert found.work <= 1.5 * band.work
    assert sorted(found.q_order[0, 0].tolist()) == list(range(T))


@EACH
@pytest.mark.parametrize("Tk", [120, 90])
def test_reordering_changes_no_result(backend, Tk, generator):
    pytest.importorskip("scipy")
    q, k, v, dout, dlse = inputs(generator, 120, Tk)
    at = torch.randperm(120, generator=generator)
    mask = ((at[:, None] - at[:Tk]).abs() < 4)[None, None].repeat(2, 4, 1, 1)
    mask[1, :, :7] = False
    plan = Plan.from_mask(mask, tile=16, unit=16)
    moved = plan.reordered().check()
    assert moved.work < 0.8 * plan.work and torch.equal(moved.to_dense(), mask)
    got = run(q, k, v, moved, backend=backend, dout=dout, dlse=dlse)
    compare(got, q, k, v, mask, dout=dout, dlse=dlse)


def test_a_plan_that_gains_nothing_is_left_as_it_is():
    pytest.importorskip("scipy")
    for plan in (Plan.dense(200, 200, causal=True), Plan.dense(0, 3), Plan.from_mask(mask_of("empty"))):
        assert plan.reordered() is plan


# ---------------------------------------------------------------- mistakes

NUMBERS = torch.zeros(1, 1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Plan.from_mask(torch.ones(4)), "expected bool .Tq, Tk."),
        (lambda: Plan.from_mask(torch.zeros(4, 4)), "float32: expected bool.*mask == 0"),
        (lambda: Plan.from_mask(torch.ones(4, 4).bool(), Tq=5), "Tq=5: expected 5, or 1"),
        (lambda: Plan.from_mask(torch.ones(1, 0, 4, 4).bool()), "no heads"),
        (lambda: Plan.from_sparse(torch.ones(4, 4)), "a dense tensor .4, 4.*from_mask"),
        (lambda: Plan.from_sparse([[1]]), "list: expected a sparse matrix"),
        (lambda: Plan.from_sparse(torch.ones(2, 4, 4).to_sparse()), r"\[2, 4, 4\]: expected \[Tq, Tk\]"),
        (lambda: Plan.from_intervals(None, NUMBERS[0], Tk=4), "hi: shape .1, 4.; expected integers"),
        (lambda: Plan.from_intervals(None, NUMBERS + 5, Tk=4), "hold 5..5: .*Tk = 4"),
        (lambda: Plan.from_intervals(NUMBERS - 1, NUMBERS, Tk=4), "hold -1..0"),
        (lambda: Plan.from_intervals(NUMBERS[..., :2], NUMBERS, Tk=4), "differ in shape"),
        (lambda: Plan.from_intervals(None, NUMBERS.float(), Tk=4), "try hi.int()"),
        (lambda: Plan.from_expiry(NUMBERS.float()), "try k_end.int()"),
        (lambda: Plan.from_expiry(NUMBERS, Tq=-1), "Tq=-1"),
    ],
)
def test_a_mask_that_is_none_is_refused_with_what_was_expected(make, said):
    with pytest.raises(PlanError, match=said):
        make()

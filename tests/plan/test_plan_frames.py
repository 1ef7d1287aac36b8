"""Listed blocks, keys and ranges wherever rows lie: chunks, each sequence its own, rows in any order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tolerance
from harness import EACH, inputs, run, unseen
from sparseflash import Plan, PlanError

B, H, TILE, UNIT = 2, 2, 8, 4


def order_of(generator: torch.Generator, T: int, *, holes: bool) -> Tensor:
    """A random order for each sequence and head, some tokens dropped, some lanes empty."""
    order = torch.stack([torch.randperm(T, generator=generator) for _ in range(B * H)]).view(B, H, T)
    if holes:
        order = torch.where(torch.rand(order.shape, generator=generator) < 0.2, -1, order)
        order = torch.nn.functional.pad(order, (0, 5), value=-1)
    return order


def in_tokens(rows: Tensor, q_order: Tensor | None, k_order: Tensor | None, Tq: int, Tk: int) -> Tensor:
    """A mask of rows [B,H,q_rows,k_rows] as one of tokens."""
    mask = torch.zeros(B, H, Tq, Tk, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            q = torch.arange(Tq) if q_order is None else q_order[b, h]
            k = torch.arange(Tk) if k_order is None else k_order[b, h]
            there = rows[b, h][q >= 0][:, k >= 0]
            mask[b, h][q[q >= 0][:, None], k[k >= 0]] = there
    return mask


def rows_of(T: int, order: Tensor | None) -> int:
    return T if order is None else order.shape[-1]


def blocks(generator, Tq, Tk, given) -> tuple[Plan, Tensor]:
    q_rows, k_rows = rows_of(Tq, given["q_order"]), rows_of(Tk, given["k_order"])
    keep = torch.rand(B, H, -(-q_rows // TILE), -(-k_rows // UNIT), generator=generator) < 0.5
    plan = Plan.from_blocks(keep, Tq=Tq, Tk=Tk, tile=TILE, unit=UNIT, **given)
    return plan, keep.repeat_interleave(TILE, 2).repeat_interleave(UNIT, 3)[..., :q_rows, :k_rows]


def keys(generator, Tq, Tk, given) -> tuple[Plan, Tensor]:
    q_rows, k_rows = rows_of(Tq, given["q_order"]), rows_of(Tk, given["k_order"])
    index = torch.randint(-1, k_rows, (B, H, -(-q_rows // TILE), 9), generator=generator)
    plan = Plan.from_keys(index, Tq=Tq, Tk=Tk, tile=TILE, **given)
    seen = (index[..., None] == torch.arange(k_rows)).any(-2)
    return plan, seen.repeat_interleave(TILE, 2)[..., :q_rows, :]


def spans(generator, Tq, Tk, given) -> tuple[Plan, Tensor]:
    q_rows, k_rows = rows_of(Tq, given["q_order"]), rows_of(Tk, given["k_order"])
    ends = torch.randint(0, k_rows + 1, (B, H, -(-q_rows // TILE), 6), generator=generator).sort(-1).values
    pairs = ends.unflatten(-1, (3, 2))
    plan = Plan.from_spans(pairs, Tq=Tq, Tk=Tk, tile=TILE, **given)
    key = torch.arange(k_rows)
    seen = ((pairs[..., :1] <= key) & (key < pairs[..., 1:])).any(-2)
    return plan, seen.repeat_interleave(TILE, 2)[..., :q_rows, :]


MAKERS: dict[str, Callable[..., tuple[Plan, Tensor]]] = {"blocks": blocks, "keys": keys, "spans": spans}
OFFSETS = {
    "none": 0,
    "a chunk": 29,
    "before": -7,
    "a tensor": torch.tensor(13),
    "each its own": torch.tensor([3, 40]),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("at", OFFSETS)
@pytest.mark.parametrize("orders", ["", "k", "qk, with holes"])
def test_a_listed_plan_shows_what_is_listed_wherever_rows_lie(maker, at, orders, generator):
    for Tq, Tk, causal in ((37, 61, True), (1, 9, True), (0, 5, True), (5, 0, True), (16, 16, False)):
        holes = "holes" in orders
        q_order = order_of(generator, Tq, holes=holes) if "q" in orders else None
        k_order = order_of(generator, Tk, holes=holes) if "k" in orders else None
        given = {"causal": causal, "q_offset": OFFSETS[at], "q_order": q_order, "k_order": k_order}
        plan, rows = MAKERS[maker](generator, Tq, Tk, given)
        want = in_tokens(rows, q_order, k_order, Tq, Tk)
        if causal:
            shift = torch.as_tensor(OFFSETS[at]).reshape(-1, 1, 1, 1)
            want &= (torch.arange(Tq)[:, None] + shift) >= torch.arange(Tk)
        assert torch.equal(plan.check().to_dense().expand_as(want), want)
        if Tk == 9:
            continue
        with unseen():  # what a device would make, of static shapes
            there, _ = MAKERS[maker](generator.manual_seed(0), Tq, Tk, given)
        here, _ = MAKERS[maker](generator.manual_seed(0), Tq, Tk, given)
        assert torch.equal(there.check().to_dense(), here.to_dense())


@pytest.mark.parametrize("at", OFFSETS)
def test_blocks_are_full_where_all_is_seen_and_left_out_where_nothing_is(at, generator):
    q_order, k_order = (order_of(generator, T, holes=False).sort(-1).values for T in (40, 64))
    keep = torch.ones(B, H, 5, 16, dtype=torch.bool)
    frame = {"Tq": 40, "Tk": 64, "tile": TILE, "unit": UNIT, "causal": True, "q_offset": OFFSETS[at]}
    plan = Plan.from_blocks(keep, **frame, q_order=q_order, k_order=k_order)
    area = plan.to_dense().unflatten(2, (5, TILE)).unflatten(4, (16, UNIT)).sum((3, 5))
    assert torch.equal(plan.full.expand(B, H, -1), (area == TILE * UNIT).sum(-1).int())
    assert torch.equal(plan.count.expand(B, H, -1), (area > 0).sum(-1).int())


@pytest.mark.parametrize("maker", ["blocks", "keys", "spans"])
def test_a_capacity_bounds_the_lists_and_says_what_it_dropped(maker, generator):
    given = {"causal": True, "q_offset": 30, "q_order": None, "k_order": None}
    for capacity, lost in ((1, True), (64, False)):
        plan, _ = MAKERS[maker](generator, 37, 61, given | {"capacity": capacity})
        assert bool(plan.overflow) == lost
        if lost:
            with pytest.raises(PlanError, match="overflow"):
                plan.check()


@pytest.mark.parametrize("unit", [None, 4])
def test_a_capacity_bounds_what_expires(unit, generator):
    given = {"k_end": torch.randint(0, 61, (B, H, 61), generator=generator), "tile": TILE, "unit": unit}
    exact = Plan.from_expiry(**given)
    for capacity, lost in ((1, True), (64, False)):
        plan = Plan.from_expiry(**given, capacity=capacity)
        assert bool(plan.overflow) == lost
        if not lost:
            assert torch.equal(plan.check().to_dense(), exact.to_dense())
    with pytest.raises(PlanError, match="capacity=0: expected a positive int"):
        Plan.from_expiry(**given, capacity=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"q_order": torch.zeros(1, 1, 8)}, "q_order has dtype"),
        ({"k_order": torch.zeros(8, dtype=torch.int64)}, r"k_order: shape \[8\]; expected integers"),
        ({"k_order": torch.zeros(1, 1, 8, dtype=torch.int64)}, "k_order names a token twice"),
        ({"k_order": torch.full((1, 1, 8), 9)}, "k_order holds 9"),
        ({"q_offset": torch.tensor([0, 1, 2]), "q_order": torch.arange(8).expand(2, 1, 8)}, "batch sizes"),
        ({"q_offset": 2**40}, "q_offset"),
    ],
)
def test_orders_and_offsets_that_do_not_fit_are_refused(given, said):
    with pytest.raises(PlanError, match=said):
        keep = torch.ones(1, 1, 1, 2, dtype=torch.bool)
        Plan.from_blocks(keep, Tq=8, Tk=8, tile=8, unit=4, causal=True, **given)


@EACH
def test_attention_over_permuted_blocks_of_chunks_equals_the_mask(backend, generator):
    q, k, v, dout, _ = inputs(generator, 37, 61, B=2)
    order = torch.stack([torch.randperm(61, generator=generator) for _ in range(2)])[:, None]
    keep = torch.rand(2, 1, 5, 16, generator=generator) < 0.5
    plan = Plan.from_blocks(
        keep, Tq=37, Tk=61, tile=8, unit=4, causal=True, k_order=order, q_offset=torch.tensor([20, 24])
    )
    got = run(q, k, v, plan, backend=backend, dout=dout)
    tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout)

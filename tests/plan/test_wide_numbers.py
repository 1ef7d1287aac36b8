"""Numbers near the end of 32 bits and beyond: unbounded ones stay so, others are refused, none wraps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparseflash as sf
from harness import EACH, inputs, unseen
from sparseflash import Plan, PlanError
from sparseflash.selection.orders import sorted_order

M = 2**31
FAR = (M - 1, M, 2**32, 2**32 + 2, 2**40, 2**63 - 1)
T = 40
SMALL = (torch.int32, torch.int16, torch.int8, torch.uint8)


def mask_of(plan: Plan) -> torch.Tensor:
    return plan.check().to_dense()


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("seen", [True, False], ids=["looked at", "on a device"])
def test_a_key_that_never_expires_is_seen_by_all_that_come_later(far, seen):
    ends = torch.full((1, 1, T), far)
    plan = Plan.from_expiry(ends) if seen else unlooked(lambda: Plan.from_expiry(ends))
    assert torch.equal(mask_of(plan)[0, 0], torch.ones(T, T, dtype=torch.bool).tril())
    assert plan.k_end.dtype == torch.int32


def unlooked(make):
    with unseen():
        return make()


@pytest.mark.parametrize("far", [*FAR, 2**70])
def test_a_window_that_ends_far_away_is_none(far):
    sides = [far] if far >= 2**63 else [far, torch.tensor([far]), torch.tensor([far, far])]
    for side in sides:
        for make in (lambda f: f(), unlooked):
            plan = make(lambda side=side: Plan.dense(T, T, window=(side, side)))
            assert mask_of(plan).all() and plan.density == 1
            plan = make(lambda side=side: Plan.dense(T, T, window=(0, 0), sink_tokens=side))
            assert mask_of(plan).all()
    if far < 2**63:
        two = Plan.dense(T, T, window=(torch.tensor([far, 2]), torch.tensor([0, 0])))
        assert int(mask_of(two)[0, 0].sum()) == T * (T + 1) // 2


def test_windows_per_head_that_count_backwards_are_refused():
    for wrong in (-2, -(2**40)):
        with pytest.raises(PlanError, match="counts of tokens >= 0, or -1"):
            Plan.dense(T, T, window=(torch.tensor([4, wrong]), 0))


OFFSETS = {
    "dense": lambda at: Plan.dense(T, T, causal=True, q_offset=at),
    "expiry": lambda at: Plan.from_expiry(torch.full((1, 1, T), T), q_offset=at),
    "buckets": lambda at: Plan.from_buckets(*torch.zeros(2, 1, 1, T, dtype=torch.int64), q_offset=at),
    "choice": lambda at: Plan.from_choice(torch.zeros(1, T, 1, dtype=torch.int64), Tk=T, q_offset=at),
    "a plan of one's own": lambda at: dataclasses.replace(Plan.dense(T, T, causal=True), q_offset=at),
    "sink-window": lambda at: sf.methods.SinkWindow(window=4).select(*QK, {"q_offset": at}).plan,
    "hash-sparse": lambda at: sf.methods.HashSparse(nb=2).select(*QK, {"q_offset": at}).plan,
    "windows of hash-sparse": lambda at: (
        sf.methods.HashSparse(window_heads=2, include_self=False).select(*QK, {"q_offset": at}).plan
    ),
    "stick-breaking": lambda at: sf.stick_breaking(*QK, QK[1], q_offset=at),
    "indexer": lambda at: sf.indexer_topk(QK[0], QK[1][:, 0], torch.ones(1, 2, T), 4, q_offset=at),
}
QK = tuple(torch.randn(2, 1, 2, T, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("at", [2**32 + 2, -(2**32), M, 2**40])
def test_an_offset_of_more_than_32_bits_is_refused_as_a_number_and_as_a_tensor(name, at):
    for given in (at, torch.tensor(at), torch.tensor([at])):
        with pytest.raises(sf.SparseFlashError, match="q_offset.*32 bits"):
            OFFSETS[name](given)


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", SMALL)
def test_an_offset_of_few_bits_is_the_number_it_says(name, dtype):
    """One token before the first of bytes is no byte."""
    for at in (0, 5):
        got, want = OFFSETS[name](torch.tensor([at], dtype=dtype)), OFFSETS[name](at)
        if isinstance(want, Plan):
            got, want = mask_of(got), mask_of(want)
        assert torch.equal(got, want)


@EACH
@pytest.mark.parametrize("window", [None, (5, 0), (M - 20, 3), (0, M - 10)])
def test_positions_at_the_end_of_32_bits_are_compared_exactly(backend, window, generator):
    for offset in (M - 1, M - 30, -M, -M + 5) if backend != "reference" else (M - 1,):
        _positions(backend, offset, window, generator)


def _positions(backend, offset, window, generator):
    q, k, v, dout, _ = inputs(generator, T, 60, B=1)
    at, key = (torch.arange(T) + offset)[:, None], torch.arange(60)
    for causal in (True, False):
        mask = at >= key if causal else torch.ones(T, 60, dtype=torch.bool)
        if window is not None:
            mask = mask & (((at - key <= window[0]) & (key - at <= window[1])) | (key < 2))
        seen = mask.any(-1, keepdim=True)
        bias = torch.where(mask, 0, -torch.inf).where(seen, 0)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True) * seen
        for given in (offset, torch.tensor([offset])) if backend != "reference" else (offset,):
            sink = 2 if window else 0
            plan = Plan.dense(T, 60, causal=causal, window=window, sink_tokens=sink, q_offset=given)
            got = sf.attention(q, k, v, plan, backend=backend)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            few = sf.decode(q, k, v, plan, backend=backend)
            torch.testing.assert_close(few, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bits_start", "start", "span_start"])
@pytest.mark.parametrize("start", [2**63 - 1, 2**63 - 3, 2**62, -1, -(2**63)])
def test_a_list_that_begins_so_late_that_its_end_wraps_is_refused(name, start, generator):
    mask = torch.rand(1, 1, T, T, generator=generator) < 0.3
    plan = Plan.dense(T, T, causal=True) if name == "span_start" else Plan.from_mask(mask)
    far = torch.full_like(getattr(plan, name), start)
    with pytest.raises(PlanError, match="runs past"):
        dataclasses.replace(plan, **{name: far})
    object.__setattr__(plan, name, far)  # as a file may have it
    with pytest.raises(PlanError, match="runs past"):
        plan.check()
    state = plan.__getstate__()
    with pytest.raises(PlanError, match="runs past"):
        object.__new__(Plan).__setstate__(state)


LO = torch.arange(300).div(4, rounding_mode="floor").view(1, 1, -1)
NUMBERS = {
    "intervals": lambda d: Plan.from_intervals(LO.to(d), (LO + 9).to(d), Tk=300),
    "prefixes": lambda d: Plan.from_intervals(None, LO.to(d), Tk=300),
    "moving": lambda d: Plan.from_intervals(LO.to(d), (LO + 9).to(d), Tk=300, moving=True),
    "moving, of two kinds": lambda d: Plan.from_intervals(LO.to(d), LO + 9, Tk=300, moving=True),
    "expiry": lambda d: Plan.from_expiry((LO + 9).to(d)),
    "buckets": lambda d: Plan.from_buckets(LO.to(d), LO.to(d)),
    "documents": lambda d: Plan.from_documents(torch.tensor([0, 20, 70, 100]).to(d), Tq=300, Tk=300),
    "keys": lambda d: Plan.from_keys(LO[..., None].to(d), Tq=300, Tk=300, unit=3),
    "choice": lambda d: Plan.from_choice(LO[..., None].to(d), Tk=300),
    "choice of units": lambda d: Plan.from_choice(LO[..., None].to(d), Tk=300, unit=3),
    "choice, shared": lambda d: Plan.from_choice(LO[..., None].to(d), Tk=300, tile=64),
    "lengths": lambda d: Plan.from_lengths(torch.tensor([3, 1, 100]).to(d), Tk=300, Tq=5),
    "pages": lambda d: Plan.from_pages(
        torch.tensor([[3, 1], [2, 0]]).to(d), torch.tensor([100, 64]).to(d), page_size=64, Tk=256, Tq=3
    ),
    "windows": lambda d: Plan.dense(300, 300, window=(torch.tensor([5, 100]).to(d), 0), sink_tokens=4),
}


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_few_bits_say_what_those_of_64_bits_say(name, dtype):
    assert torch.equal(mask_of(NUMBERS[name](dtype)), mask_of(NUMBERS[name](torch.int64)))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_have_no_sign_and_more_bits_are_refused(name):
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        with pytest.raises(PlanError, match="integers|int32|dtype"):
            NUMBERS[name](dtype)


def test_what_an_accelerator_cannot_look_at_is_moved_to_what_there_is_and_does_not_wrap():
    far = 2**32 + 2
    with unseen():
        lengths = Plan.from_lengths(torch.tensor([far, 3]), Tk=T)
        keys = Plan.from_keys(torch.tensor([far, 3, T, -1]).view(1, 1, 4, 1), Tq=4, Tk=T)
        prefixes = Plan.from_intervals(None, torch.tensor([far, 3, 0]).view(1, 1, 3), Tk=T)
        spans = Plan.from_spans(torch.tensor([0, far]).view(1, 1, 1, 1, 2), Tq=4, Tk=T)
        offset = Plan.dense(T, T, causal=True, q_offset=torch.tensor([far, -far]))
    assert mask_of(lengths).sum(-1).flatten().tolist() == [T, 3]
    assert mask_of(keys).sum(-1).flatten().tolist() == [0, 1, 0, 0]
    assert mask_of(prefixes).sum(-1).flatten().tolist() == [T, 3, 0]
    assert mask_of(spans).all()
    assert offset.q_offset.tolist() == [M - 1, -M]


def test_edges_of_more_tokens_than_there_can_be_are_refused():
    with pytest.raises(PlanError, match="32 bits"):
        Plan.from_documents(torch.tensor([0, 2**40]))


def test_positions_that_begin_anew_where_their_type_ends_are_two_documents():
    for dtype in (torch.uint8, torch.int8, torch.int64):
        ends = torch.iinfo(dtype)
        ids = torch.tensor([ends.max - 1, ends.max, ends.min, ends.min + 1], dtype=dtype)
        assert sf.cu_seqlens_of(ids).tolist() == [0, 2, 4]


def test_buckets_are_sorted_by_all_their_bits():
    assert sorted_order(torch.tensor([[[2**40, 0, 2**33, 1, -(2**60)]]])).tolist() == [[[4, 1, 3, 2, 0]]]


@pytest.mark.parametrize("dtype", [torch.int64, *SMALL])
def test_an_indexers_numbers_of_few_bits_are_read_right(dtype, generator):
    q, k = torch.randn(1, 2, T, 8, generator=generator), torch.randn(1, 300, 8, generator=generator)
    weights = torch.rand(1, 2, T, generator=generator)
    first = torch.full((1, T), 3)
    want = sf.indexer_topk(q, k, weights, 4, q_offset=260, first_key=first)
    assert torch.equal(want, sf.indexer_topk(q, k, weights, 4, q_offset=260, first_key=first.to(dtype)))
    heads = q, k[:, None].expand(-1, 2, -1, -1)
    lse, index = torch.zeros(1, 2, T), torch.arange(T).view(1, T, 1)
    losses = [
        sf.indexer_kl_loss(q, k, weights, *heads, lse, x, q_offset=260) for x in (index, index.to(dtype))
    ]
    assert torch.equal(*losses)


def test_an_indexers_last_position_sees_all():
    q, k, weights = torch.randn(1, 2, T, 8), torch.randn(1, 50, 8), torch.rand(1, 2, T)
    for at in (M - 1, torch.tensor(M - 1)):
        assert (sf.indexer_topk(q, k, weights, 50, q_offset=at) >= 0).all()


def test_a_method_with_a_number_beyond_all_tensors_says_so():
    with pytest.raises(sf.SparseFlashError, match="below 2\\^62"):
        sf.methods.Window(window=2**63)
    q = k = torch.randn(1, 2, T, 16)
    wide = sf.methods.HashSparse(nb=2, window_heads=1, head_window=2**40).select(q, k).plan
    assert mask_of(wide)[0, 1].sum() == T * (T + 1) // 2

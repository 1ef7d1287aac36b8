"""Plans from blocks, keys and spans: masks, static capacity, compiled, at scale, and every bad input."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import suppress

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

import plans
import sparseflash as sf
import tolerance
from harness import EACH, inputs, run
from sparseflash import Plan, PlanError

SEED = st.integers(0, 2**32 - 1)
SIZE = st.integers(0, 40)
TILE = st.sampled_from([1, 2, 5, 16, 128])
UNIT = st.sampled_from([1, 3, 16, 64, 128])


def _coins(seed, p, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def _spread_out(keep, Tq, Tk, tile, unit, causal):
    mask = keep.repeat_interleave(tile, 2).repeat_interleave(unit, 3)[:, :, :Tq, :Tk]
    return mask.tril() if causal else mask


@settings(max_examples=40)
@given(
    seed=SEED,
    Tq=SIZE,
    Tk=SIZE,
    tile=TILE,
    unit=UNIT,
    causal=st.booleans(),
    p=st.sampled_from([0, 0.3, 1]),
    axes=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    chunk=st.sampled_from([1, 7, 1 << 20]),
)
def test_blocks_and_the_same_blocks_by_number_are_their_mask(
    seed, Tq, Tk, tile, unit, causal, p, axes, chunk
):
    from sparseflash.plan.make import listed

    R, C = -(-Tq // tile), -(-Tk // unit)
    keep = _coins(seed, p, *axes, R, C)
    size = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": causal}
    numbers = torch.where(keep, torch.arange(C), -1)
    before, listed.CHUNK = listed.CHUNK, chunk  # lists are made in pieces
    try:
        made = [
            Plan.from_blocks(keep, **size),
            Plan.from_blocks(keep, capacity=C + 1, **size),
            Plan.from_keys(numbers, unique=True, **size),
            Plan.from_keys(torch.cat([numbers, numbers], -1).int(), **size),
            Plan.from_keys(torch.cat([numbers, numbers], -1), capacity=2 * C + 1, **size),
        ]
    finally:
        listed.CHUNK = before
    mask = _spread_out(keep, Tq, Tk, tile, unit, causal)
    for plan in made:
        assert torch.equal(plan.check().to_dense(), mask)
    assert len({plan.density for plan in made}) == 1


@settings(max_examples=40)
@given(seed=SEED, Tq=SIZE, Tk=SIZE, tile=TILE, causal=st.booleans(), most=st.integers(0, 5))
def test_spans_are_their_mask(seed, Tq, Tk, tile, causal, most):
    example = plans.example(seed, "spans", batch=2, heads=4, Tq=Tq, Tk=Tk, tile=tile)
    mask, dense = example.mask, example.plan.check().to_dense()
    assert torch.equal(*torch.broadcast_tensors(dense, mask))


def test_a_key_named_twice_is_one_key_unless_the_caller_said_there_is_none():
    index = torch.tensor([[[[3, 3, 0]]]])
    assert Plan.from_keys(index, Tq=1, Tk=4).count.item() == 2
    with pytest.raises(PlanError, match="lists key row 3 twice"):
        Plan.from_keys(index, Tq=1, Tk=4, unique=True).check()


@pytest.mark.parametrize("by", ["blocks", "keys"])
def test_what_a_capacity_does_not_hold_is_dropped_flagged_and_reported(by):
    keep = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    keep[:, :, 1, 2:] = False
    numbers = torch.where(keep, torch.arange(5), -1)
    size = {"Tq": 32, "Tk": 80, "tile": 16, "unit": 16}

    def make(capacity):
        if by == "blocks":
            return Plan.from_blocks(keep, capacity=capacity, **size)
        return Plan.from_keys(numbers, capacity=capacity, **size)

    fits, short = make(5), make(3)
    assert not fits.overflow and fits.check().count.tolist() == [[[5, 2]]]
    assert short.overflow and short.count.tolist() == [[[3, 2]]] and len(short.index) == 6
    assert not (short.to_dense() & ~fits.to_dense()).any()  # what is left was asked for
    with pytest.raises(PlanError, match="overflowed.*raise the capacity"):
        short.check()
    window = Plan.dense(32, 80, window=(8, 8))
    for both in (short & window, window & short, window - short, short - window):
        with pytest.raises(PlanError, match="overflowed"):
            both.check()


@EACH
@pytest.mark.parametrize("unit", [1, 16, 64, 128])
def test_units_of_every_size_are_exact_also_beside_spans(backend, unit, generator):
    """A sliding window as spans and gathered units before it, in one row and one softmax."""
    T, tile = 300, 32
    R, C = -(-T // tile), -(-T // unit)
    q, k, v, dout, dlse = inputs(generator, T, B=1)
    lo = (torch.arange(R) * tile // unit - 1).clamp(min=0) * unit  # spans begin at a unit
    spans = torch.stack([lo, torch.full_like(lo, T)], -1).int()
    far = (torch.rand(1, 2, R, C, generator=generator) < 0.4) & (torch.arange(C) * unit < lo[:, None])
    units = Plan.from_blocks(far, Tq=T, Tk=T, tile=tile, unit=unit)
    zero = torch.zeros(1, 2, R, dtype=torch.int32)
    plan = Plan(
        T,
        T,
        tile,
        unit,
        causal=True,
        spans=spans,
        span_start=torch.arange(R).expand(1, 2, R),
        span_full=zero,
        span_count=zero + 1,
        start=units.start,
        full=units.full,
        count=units.count,
        index=units.index,
    )
    mask = far.repeat_interleave(tile, 2).repeat_interleave(unit, 3)[:, :, :T, :T]
    mask = (mask | (torch.arange(T) >= lo.repeat_interleave(tile)[:T, None])).tril()
    assert torch.equal(plan.check().to_dense(), mask)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


# ---------------------------------------------------------------- compiled, and without values


def _by_capacity(q, k, v, index):
    plan = Plan.from_keys(index, Tq=64, Tk=64, tile=16, unit=16, causal=True, capacity=3)
    return sf.attention(q, k, v, plan)


def _by_blocks(q, k, v, index):
    keep = torch.zeros(1, 2, 4, 4, dtype=torch.bool).scatter_(-1, index.clamp(min=0), True)
    return sf.attention(q, k, v, Plan.from_blocks(keep, Tq=64, Tk=64, tile=16, unit=16, capacity=4))


@pytest.mark.parametrize("function", [_by_capacity, _by_blocks])
def test_lists_made_inside_a_compiled_function(function, generator):
    q, k, v, dout, _ = inputs(generator, 64, B=1, H=2)
    index = torch.randint(-1, 4, (1, 2, 4, 3), generator=generator)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got, want = compiled(*leaves, index), function(*leaves, index)
    assert torch.equal(got, want)
    for x, y in zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, leaves, dout)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_lists_of_static_shape_need_no_values(device):
    def make(where):
        keep = torch.ones(1, 2, 4, 4, dtype=torch.bool, device=where)
        index = torch.zeros(1, 2, 4, 3, dtype=torch.int64, device=where)
        spans = torch.zeros(1, 2, 4, 3, 2, dtype=torch.int64, device=where)
        size = {"Tq": 64, "Tk": 64, "tile": 16, "unit": 16}
        yield Plan.from_blocks(keep, capacity=3, **size), (24,)
        yield Plan.from_blocks(keep, **size), (32,)
        yield Plan.from_keys(index, capacity=2, **size), (16,)
        yield Plan.from_keys(index, unique=True, causal=True, **size), (24,)
        yield Plan.from_spans(spans, causal=True, **size), None

    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        for plan, shape in make("cpu" if device == "fake" else "meta"):
            assert plan.tiles == 4 and (shape is None or tuple(plan.index.shape) == shape)


# ---------------------------------------------------------------- scale

PEAK = """
import resource, torch
torch.set_num_threads(1)
from sparseflash import Plan
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
T = 1 << 20
Plan.dense(256, 256, causal=True, window=(9, 0), sink_tokens=2).check()
before = peak()
"""


def _megabytes(code):
    """What the lines leave in `peak()`, beyond where they began, in a process of their own."""
    code = PEAK + code + "\nprint(peak() - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in other units elsewhere")


def test_dense_plans_of_a_million_tokens_have_lists_of_the_size_of_their_tiles():
    T = 1 << 20
    causal = Plan.dense(T, T, causal=True).check()
    window = Plan.dense(T, T, causal=True, window=(4095, 0), sink_tokens=64).check()
    for plan, most in ((causal, 3), (window, 4)):
        assert plan.tiles == T // 128 and len(plan.spans) <= most * plan.tiles
        assert sum(x.numel() for x in plan.tensors().values()) <= (2 * most + 3) * plan.tiles
        assert plan.density == 1.0
    assert causal.work == pytest.approx(0.5, rel=1e-3)
    for plan, most in ((causal, 3), (window, 6)):  # ranges of tiles, not each tile of each group
        assert len(plan.prepare().span_keys.index) <= most * plan.tiles


@linux
def test_a_window_with_sinks_over_a_million_tokens_takes_a_few_megabytes():
    assert (
        _megabytes("plan = Plan.dense(T, T, causal=True, window=(4095, 0), sink_tokens=64).prepare()") < 100
    )


@pytest.mark.slow
@linux
@pytest.mark.parametrize("causal", [False, True])
def test_a_5_percent_block_plan_of_32_heads_and_a_million_tokens_fits_a_gigabyte_with_its_indices(causal):
    """107 million blocks: 409 MiB of indices given, as many in the plan, or half of them."""
    code = (
        f"causal = {causal}"
        + """
R = T // 128
index = torch.randint(0, 20, (1, 32, R, 409), dtype=torch.int32)
index += torch.arange(409, dtype=torch.int32) * 20
plan = Plan.from_keys(index, Tq=T, Tk=T, tile=128, unit=128, causal=causal, unique=True)
share = len(plan.index) / index.numel()
assert 0.49 < share < 0.51 if causal else share == 1
"""
    )
    assert _megabytes(code) < 1000


@linux
def test_making_lists_takes_no_more_than_the_lists():
    """Four million blocks, given with doubles: 32 MB of indices, and as much again for the plan."""
    code = """
R = T // 128
index = torch.randint(0, R, (1, 2, R, 256), dtype=torch.int32)
before = peak()
plan = Plan.from_keys(index, Tq=T, Tk=T, tile=128, unit=128)
"""
    assert _megabytes(code) < 150


# ---------------------------------------------------------------- bad input


def _bad(make, said):
    with pytest.raises(PlanError, match=said):
        make()


def test_blocks_keys_and_spans_that_make_no_sense_are_refused():
    ok = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    size = {"Tq": 32, "Tk": 48, "tile": 16, "unit": 16}
    _bad(
        lambda: Plan.from_blocks(ok[0], **size), r"expected bool \[B\|1, H\|1, 2 tiles of 16, 3 units of 16\]"
    )
    _bad(lambda: Plan.from_blocks([[True]], **size), "keep_blocks: list")
    _bad(lambda: Plan.from_blocks(ok[..., :2], **size), r"\[1, 1, 2, 2\]")
    _bad(lambda: Plan.from_blocks(ok[:, :0], **size), r"\[1, 0, 2, 3\]")
    _bad(lambda: Plan.from_blocks(ok.float(), **size), "expected bool, True = attends")
    for capacity in (0, -1, 1.5, True):
        _bad(lambda c=capacity: Plan.from_blocks(ok, capacity=c, **size), "expected a positive int")
        _bad(lambda c=capacity: Plan.from_keys(ok.int(), capacity=c, **size), "expected a positive int")
    for name, x in (("tile", 0), ("unit", 1.5), ("causal", 1), ("Tq", -1), ("Tk", "9")):
        _bad(
            lambda n=name, x=x: Plan.from_blocks(ok, **{**size, n: x}), f"{name}=.*expected|lengths are ints"
        )
    _bad(lambda: Plan.from_keys(ok, **size), "expected integers")
    _bad(lambda: Plan.from_keys(ok.float(), **size), "expected integers; try index.int")
    _bad(lambda: Plan.from_keys(ok.cfloat(), **size), "expected integers")
    _bad(lambda: Plan.from_keys(None, **size), "index: NoneType; expected integers")
    _bad(lambda: Plan.from_keys(ok.int() * 3, **size), r"index holds 3..3: units are 0..2, -1 = none")
    _bad(lambda: Plan.from_keys(ok.int() * -2, **size), "index holds -2..-2")
    _bad(lambda: Plan.from_keys(ok.int(), unique=3, **size), "unique=3")
    spans = torch.tensor([[0, 4], [4, 9]]).expand(1, 1, 2, 2, 2)
    assert Plan.from_spans(spans, **size).check()
    _bad(lambda: Plan.from_spans(spans[0], **size), r"expected integers \[B\|1, H\|1, 2 tiles of 16, m, 2\]")
    _bad(lambda: Plan.from_spans(spans.float(), **size), "expected integers; try spans.int")
    _bad(lambda: Plan.from_spans(spans * 9, **size), "0 <= lo <= hi <= 48 keys")
    _bad(lambda: Plan.from_spans(spans - 1, **size), "0 <= lo <= hi <= 48 keys")
    _bad(lambda: Plan.from_spans(spans.flip(-1), **size), "0 <= lo <= hi <= 48 keys")
    _bad(lambda: Plan.from_spans(spans // 4 * 4 // 2, **{**size, "Tk": 1}), "0 <= lo <= hi <= 1 keys")
    overlapping = torch.tensor([[0, 5], [4, 9]]).expand(1, 1, 2, 2, 2)
    _bad(lambda: Plan.from_spans(overlapping, **size), "must not overlap; join them")


def _damaged(draw, plan):
    """Fields of a plan with one tensor's value, shape or dtype, or one number, gone wrong."""
    fields = {
        n: getattr(plan, n) for n in ("Tq", "Tk", "tile", "unit", "causal", "window", "sink", "q_offset")
    }
    fields |= plan.tensors()
    name = draw(st.sampled_from(sorted(fields)))
    x = fields[name]
    if not isinstance(x, torch.Tensor):
        fields[name] = draw(st.sampled_from([-1, 0, 1, 3, 10**4, 2**40, 1.5, None, "x", True, (1,), (-5, 2)]))
        return fields, name
    how = draw(st.sampled_from(["value", "value", "value", "shape", "dtype", "none"]))
    if how == "value" and x.numel():
        x = x.clone()
        at = draw(st.integers(0, x.numel() - 1))
        wrong = draw(st.sampled_from([-(2**31), -3, -2, -1, 0, 1, 2, 7, 10**6, 2**31 - 1]))
        x.view(-1)[at] = wrong
        fields[name] = x
    elif how == "shape":
        some = x if x.dim() else x[None]  # `overflow` is a single value
        fields[name] = draw(st.sampled_from([x[None], some[:0], x.flatten(), torch.cat([some, some], -1)]))
    elif how == "dtype":
        fields[name] = x.to(draw(st.sampled_from([torch.float32, torch.int64, torch.int32, torch.bool])))
    else:
        fields[name] = None
    return fields, name


@settings(max_examples=150)
@given(seed=SEED, kind=st.sampled_from(sorted(plans.KINDS)), data=st.data())
def test_a_damaged_plan_is_refused_with_a_message_or_still_means_something(seed, kind, data):
    plan = plans.example(seed, kind, batch=2, heads=2, Tq=9, Tk=20, tile=4, unit=16).plan
    fields, _ = _damaged(data.draw, plan)
    with suppress(PlanError):  # any other error is one
        made = Plan(**fields).check()
        if made.Tq * made.Tk < 10**4 and made.tile * made.tiles < 10**4:
            dense = made.to_dense()
            assert tuple(dense.shape) == (*made.extent(), made.Tq, made.Tk)


@pytest.mark.parametrize("name", ["q_pos", "q_seg", "k_seg", "q_order"])
def test_a_plan_for_no_sequence_is_sound_or_refused(name):
    for kind in sorted(plans.KINDS):
        plan = plans.example(1, kind, batch=2, heads=2, Tq=9, Tk=20, tile=4, unit=16).plan
        size = {"q_order": plan.q_rows, "k_seg": 20}.get(name, 9)
        with suppress(PlanError):  # any other error is one
            made = dataclasses.replace(plan, **{name: torch.zeros(0, 1, size, dtype=torch.int32)}).check()
            assert made.extent()[0] == 0 and made.to_dense().shape == (*made.extent(), 9, 20)


@settings(max_examples=150)
@given(data=st.data())
def test_a_constructor_refuses_nonsense_with_a_message_or_makes_a_sound_plan(data):
    number = st.sampled_from([-1, 0, 1, 3, 16, 17, 1.5, None, True, "8", 2**40])
    some = st.sampled_from([16, 16, 16, 1])
    Tq, Tk, tile, unit = (data.draw(st.one_of(some, some, some, number)) for _ in range(4))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 1, 2, 16]), min_size=1, max_size=5))
    low = data.draw(st.sampled_from([-2, -1, 0]))
    x = torch.randint(low, data.draw(st.sampled_from([1, 2, 16, 17])), shape)
    x = x.to(data.draw(st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32, torch.uint8])))
    options = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": data.draw(st.booleans())}
    make = data.draw(st.sampled_from([Plan.from_blocks, Plan.from_keys, Plan.from_spans]))
    if make != Plan.from_spans:
        options["capacity"] = data.draw(st.one_of(st.none(), number.filter(lambda x: x != 2**40)))
    with suppress(PlanError):
        plan = make(x, **options)
        if plan.overflow is None or not plan.overflow:
            plan.check()

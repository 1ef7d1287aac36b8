"""What every backend promises beyond numbers: empty rows, unseen NaN, any layout, no leaks, packing."""

from __future__ import annotations

import math

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import EACH, MAIN, inputs, randn, run, same_bits
from sparseflash import Plan

MOST_KINDS = ("sink", "keep", "buckets", "documents", "mask", "lists")


def _spread(mask, B, H):
    return mask[:, torch.arange(H) * mask.shape[1] // H].expand(B, -1, -1, -1)


@MAIN
@pytest.mark.parametrize("kind", MOST_KINDS)
def test_a_query_that_sees_nothing_has_out_0_lse_minus_infinity_and_no_gradient(backend, dtype, kind, seed):
    for n in range(3):
        example = plans.example(seed + n, kind, batch=2, heads=4, Tq=65)
        d = plans._Draw(seed + n)
        q, k, v, dout, dlse = inputs(d.torch, 65, example.plan.Tk, dtype=dtype)
        got = run(q, k, v, example.plan, backend=backend, dout=dout, dlse=dlse)
        blind = ~_spread(example.mask, 2, 4).any(-1)
        assert not got["out"][blind].any() and not got["dq"][blind].any(), example.line
        assert got["lse"][blind].eq(-math.inf).all() and got["lse"][~blind].isfinite().all(), example.line
        assert all(bool(got[name].isfinite().all()) for name in ("out", "dq", "dk", "dv")), example.line


@MAIN
def test_a_plan_in_which_nobody_sees_anything_is_all_zeros(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 40, dtype=dtype)
    nothing = torch.zeros(1, 1, 40, dtype=torch.bool)
    empty = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    late = Plan.dense(40, 40, causal=True, q_offset=-40)
    for plan in (
        Plan.from_keep(nothing, nothing),
        Plan.from_keep(~nothing, nothing),
        Plan.from_mask(empty),
        late,
    ):
        got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
        assert got["lse"].eq(-math.inf).all()
        assert not any(bool(got[name].any()) for name in ("out", "dq", "dk", "dv"))


@MAIN
@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_that_no_query_of_a_head_sees_may_hold_anything(backend, dtype, kind, poison, seed):
    example = plans.example(seed, kind, batch=2, heads=4, Tq=65, Tk=97)
    Tk = example.plan.Tk
    q, k, v, dout, dlse = inputs(plans._Draw(seed).torch, 65, Tk, dtype=dtype)
    clean = run(q, k, v, example.plan, backend=backend, dout=dout, dlse=dlse)
    unseen = ~_spread(example.mask, 2, 4).any(-2).view(2, 2, 2, Tk).any(2)  # by both queries heads of a group
    dirty_k, dirty_v = (torch.where(unseen[..., None], poison, x) for x in (k, v))
    got = run(q, dirty_k, dirty_v, example.plan, backend=backend, dout=dout, dlse=dlse)
    same_bits(got, clean, note=example.line)


@MAIN
def test_a_nan_key_of_one_head_leaves_the_other_heads_of_its_group_alone(backend, dtype, generator):
    T = 65
    q, k, v, dout, dlse = inputs(generator, T, Hkv=1, dtype=dtype)
    mask = (torch.rand(1, 4, T, T, generator=generator) < 0.5).tril()
    mask[:, 1:, :, 20] = False  # key 20 is seen by head 0 alone
    mask[:, 0, 30:, 20] = True
    plan = Plan.from_mask(mask, tile=32, unit=16)
    clean = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    k, v = k.clone(), v.clone()
    k[:, :, 20] = v[:, :, 20] = math.nan
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    assert got["out"][:, 0, 30:].isnan().all()
    for x in (got, clean):
        x.update({n: x[n][:, 1:] for n in ("out", "lse", "dq")})
    same_bits(got, clean, "out lse dq")


@MAIN
@pytest.mark.parametrize("causal", [False, True])
def test_a_nan_in_one_document_leaves_the_others_bit_identical_in_the_backward_too(
    backend, dtype, causal, generator
):
    edges = [0, 1, 1, 40, 170, 200, 331]
    q, k, v, dout, dlse = inputs(generator, 331, D=40, dtype=dtype)
    plan = Plan.from_documents(torch.tensor(edges), causal=causal)
    clean = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    q, k, v, dout = (x.clone() for x in (q, k, v, dout))
    for x in (q, k, v, dout):
        x[:, :, 40:170] = math.nan
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    for x in (got, clean):
        for name in x:
            x[name] = torch.cat([x[name][:, :, :40], x[name][:, :, 170:]], 2)
    same_bits(got, clean)


@MAIN
def test_a_nan_in_one_bucket_leaves_the_others_bit_identical(backend, dtype, generator):
    T = 300
    q, k, v, dout, dlse = inputs(generator, T, H=2, Hkv=2, dtype=dtype)
    bucket = torch.randint(0, 5, (2, 2, T), generator=generator)
    plan = Plan.from_buckets(bucket, bucket)
    clean = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    sick = (bucket == 3)[..., None]
    got = run(
        *(torch.where(sick, math.nan, x) for x in (q, k, v)),
        plan,
        backend=backend,
        dout=torch.where(sick, math.nan, dout),
        dlse=dlse,
    )
    for x in (got, clean):
        for name in x:
            x[name] = torch.where(sick if x[name].dim() == 4 else sick[..., 0], 0, x[name])
    same_bits(got, clean)


@MAIN
def test_a_nan_in_a_dropped_query_goes_nowhere(backend, dtype, generator):
    T = 130
    q, k, v, dout, dlse = inputs(generator, T, dtype=dtype)
    keep = torch.rand(2, 4, T, generator=generator) < 0.5
    plan = Plan.from_keep(keep, torch.ones(1, 1, T, dtype=torch.bool))
    clean = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    q, dout = (torch.where(keep[..., None], x, math.nan) for x in (q, dout))
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=torch.where(keep, dlse, math.nan))
    same_bits(got, clean)


@MAIN
def test_permuted_heads_and_batch_slots_give_permuted_results(backend, dtype, generator):
    T = 129
    q, k, v, dout, dlse = inputs(generator, T, B=3, H=4, Hkv=4, dtype=dtype)
    bucket = torch.randint(0, 4, (3, 4, T), generator=generator)
    batch, head = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])

    def moved(x):
        return x[batch][:, head]

    plan = Plan.from_buckets(bucket, bucket)
    want = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    got = run(
        *(moved(x) for x in (q, k, v)),
        Plan.from_buckets(moved(bucket), moved(bucket)),
        backend=backend,
        dout=moved(dout),
        dlse=moved(dlse),
    )
    same_bits(got, {name: moved(x) for name, x in want.items()})


@MAIN
def test_a_batch_slot_does_not_depend_on_its_neighbours(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 100, B=3, dtype=dtype)
    plan = Plan.dense(100, 100, causal=True, window=(30, 0), sink_tokens=3)
    want = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    one = [x[1:2] for x in (q, k, v, dout, dlse)]
    got = run(*one[:3], plan, backend=backend, dout=one[3], dlse=one[4])
    same_bits(got, {name: x[1:2] for name, x in want.items()})


def _layouts():
    def bshd(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def sliced(x):
        wide = torch.full((*x.shape[:2], 2 * x.shape[2] + 1, x.shape[3] + 5), math.nan, dtype=x.dtype)
        wide[:, :, 1::2, 2:-3] = x
        return wide[:, :, 1::2, 2:-3]

    def packed(x):  # one of three side by side, as a fused projection leaves them
        three = torch.full((x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), math.nan, dtype=x.dtype)
        three[:, :, 1] = x.transpose(1, 2)
        return three[:, :, 1].transpose(1, 2)

    def column(x):  # the last axis is not the fastest one
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    def every_other(x):
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), math.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    return {f.__name__: f for f in (bshd, sliced, packed, column, every_other)}


@MAIN
@pytest.mark.parametrize("layout", _layouts())
def test_any_strides_give_the_same_bits_as_contiguous_memory(backend, dtype, layout, generator):
    view = _layouts()[layout]
    q, k, v, dout, dlse = inputs(generator, 97, D=40, Dv=24, dtype=dtype)
    keep = torch.rand(2, 4, 97, generator=generator) < 0.7
    for plan in (Plan.dense(97, 97, causal=True), Plan.from_keep(keep, keep)):
        want = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
        others = [view(x) for x in (q, k, v)]
        got = run(*others, plan, backend=backend, dout=view(dout), dlse=view(dlse[..., None])[..., 0])
        same_bits(got, want)


@MAIN
def test_expanded_inputs_are_read_as_their_copies_would_be(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 65, B=1, H=1, Hkv=1, dtype=dtype)
    plan = Plan.dense(65, 65, causal=True)

    def wide(x, heads, *, copy):
        x = x.expand(2, heads, *x.shape[2:])
        return x.contiguous() if copy else x

    want, got = (
        run(
            wide(q, 4, copy=copy),
            wide(k, 2, copy=copy),
            wide(v, 2, copy=copy),
            plan,
            backend=backend,
            dout=dout[:, :, :1, :1].expand(2, 4, 65, 32).clone()
            if copy
            else dout[:, :, :1, :1].expand(2, 4, 65, 32),
            dlse=wide(dlse, 4, copy=copy),
        )
        for copy in (True, False)
    )
    same_bits(got, want)


@MAIN
def test_out_keeps_the_memory_order_of_q(backend, dtype, generator):
    q, k, v, _, _ = inputs(generator, 65, dtype=dtype)
    assert sf.attention(q, k, v, causal=True, backend=backend).is_contiguous()
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert sf.attention(q, k, v, causal=True, backend=backend).transpose(1, 2).is_contiguous()


@MAIN
@pytest.mark.parametrize("kind", ["dense", "keep", "buckets"])
def test_given_its_plan_nothing_leaks_from_the_future(backend, dtype, kind, generator):
    T, t = 200, 77
    q, k, v, _, _ = inputs(generator, T, dtype=dtype)
    bucket = torch.randint(0, 3, (1, 4, T), generator=generator)
    plan = {
        "dense": Plan.dense(T, T, causal=True),
        "keep": Plan.from_keep(bucket > 0, bucket < 2),
        "buckets": Plan.from_buckets(bucket, bucket),
    }[kind]
    want = run(q, k, v, plan, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, :, t + 1 :], v[:, :, t + 1 :] = 7.0, -3.0
    got = run(q, k, v, plan, backend=backend)
    for x in (got, want):
        x.update({name: x[name][:, :, : t + 1] for name in x})
    same_bits(got, want)


@MAIN
@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_are_the_documents_one_by_one(backend, dtype, causal, generator):
    edges = [0, 1, 64, 64, 193, 260]
    q, k, v, dout, dlse = inputs(generator, 260, dtype=dtype)
    plan = Plan.from_documents(torch.tensor(edges, dtype=torch.int32), causal=causal)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    for lo, hi in zip(edges, edges[1:]):
        own = [x[:, :, lo:hi] for x in (q, k, v, dout, dlse)]
        mask = torch.ones(1, 1, hi - lo, hi - lo, dtype=torch.bool)
        tolerance.compare(
            {name: x[:, :, lo:hi] for name, x in got.items()},
            *own[:3],
            mask.tril() if causal else mask,
            dout=own[3],
            dlse=own[4],
        )


@MAIN
def test_grouped_heads_are_repeated_heads(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 129, H=6, Hkv=2, dtype=dtype)
    mask = torch.rand(1, 6, 129, 129, generator=generator) < 0.4
    plan = Plan.from_mask(mask, tile=64, unit=64)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    wide = run(q, *(x.repeat_interleave(3, 1) for x in (k, v)), plan, backend=backend, dout=dout, dlse=dlse)
    same_bits(got, wide, "out lse dq")
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


@MAIN
def test_padded_lists_and_compact_lists_mean_the_same(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 64, dtype=dtype)
    index = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
    padded = torch.tensor([3, 0, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, -1, -1, -1, -1], dtype=torch.int32)
    count = torch.tensor([[[2, 1, 1, 0]]], dtype=torch.int32)
    common = {"Tq": 64, "Tk": 64, "tile": 16, "unit": 16, "full": count, "count": count}
    start = torch.tensor([[[0, 2, 3, 4]]])
    compact = Plan(**common, start=start, index=index).check()
    wide = Plan(**common, start=torch.arange(4).view(1, 1, 4) * 4, index=padded).check()
    results = [
        run(q, k, v, p, backend=backend, dout=dout, dlse=dlse) for p in (compact, wide, compact.prepare())
    ]
    same_bits(results[1], results[0])
    same_bits(results[2], results[0])


@MAIN
def test_a_full_entry_skips_only_tests_that_would_pass(backend, dtype, generator):
    """Entries counted as partial give what the same entries give when they are counted as full."""
    q, k, v, dout, dlse = inputs(generator, 128, dtype=dtype)
    full = Plan.dense(128, 128, causal=True, tile=32)
    partial = Plan(
        Tq=128,
        Tk=128,
        tile=32,
        causal=True,
        spans=full.spans,
        span_start=full.span_start,
        span_count=full.span_count,
        span_full=torch.zeros_like(full.span_full),
    )
    got, want = (run(q, k, v, p, backend=backend, dout=dout, dlse=dlse) for p in (partial, full))
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)
    tolerance.compare(want, q, k, v, mask, dout=dout, dlse=dlse)


@EACH
def test_extreme_positions_and_windows_do_not_overflow(backend, generator):
    low, high = -(2**31), 2**31 - 1
    q, k, v, dout, dlse = inputs(generator, 6, 6)
    q_pos = torch.tensor([low, -1, 0, 1, high - 1, high], dtype=torch.int32).view(1, 1, 6)
    k_pos = q_pos.flip(-1).contiguous()
    base = Plan.dense(6, 6)
    lists = {n: getattr(base, n) for n in ("span_start", "span_count", "spans")}
    for rule in (
        {"causal": True},
        {"window": (3, 3)},
        {"window": (high, None)},
        {"causal": True, "window": (high, 0)},
    ):
        plan = Plan(
            Tq=6, Tk=6, **lists, span_full=torch.zeros_like(base.span_full), q_pos=q_pos, k_pos=k_pos, **rule
        )
        mask = plans.rules(q_pos[..., :, None].long(), k_pos[..., None, :].long(), **rule)
        assert torch.equal(plan.to_dense(), mask)
        got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
        tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse, note=str(rule))


@MAIN
def test_memory_that_was_never_written_is_never_read(backend, dtype, seed):
    old = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    for n, kind in enumerate(MOST_KINDS):
        example = plans.example(seed + n, kind, batch=2, heads=4, Tq=33)
        q, k, v, dout, dlse = inputs(plans._Draw(seed).torch, 33, example.plan.Tk, dtype=dtype)
        bias, sink = randn(plans._Draw(n).torch, 1, 2, example.plan.Tk), torch.ones(4)
        want, got = {}, {}
        for fill, found in ((False, want), (True, got)):
            try:  # torch.empty gives NaN
                torch.use_deterministic_algorithms(fill)
                torch.utils.deterministic.fill_uninitialized_memory = fill
                found |= run(
                    q,
                    k,
                    v,
                    example.plan,
                    backend=backend,
                    dout=dout,
                    dlse=dlse,
                    key_bias=bias,
                    sink_logits=sink,
                )
            finally:
                torch.use_deterministic_algorithms(old[0])
                torch.utils.deterministic.fill_uninitialized_memory = old[1]
        same_bits(got, want, note=example.line)
        assert all(bool(x.isfinite().all()) for x in got.values()), example.line


MASK, IDS = torch.rand(1, 1, 65, 65, generator=torch.Generator().manual_seed(0)) < 0.2, torch.arange(65) % 5
MADE = {
    "dense": lambda: None,
    "mask": lambda: Plan.from_mask(MASK, tile=32).prepare(),
    "buckets": lambda: Plan.from_buckets(IDS[None, None], IDS[None, None]),
    "keys": lambda: Plan.from_keys(IDS[None, None, :, None], Tq=65, Tk=65),
    "choice": lambda: Plan.from_choice(IDS[None, :, None].expand(1, 65, 9), Tk=65),
    "blocks": lambda: Plan.from_blocks(MASK[..., :2, :2], Tq=65, Tk=65, tile=64, unit=64),
    "sparse": lambda: Plan.from_sparse(MASK[0, 0].to_sparse()),
    "expiry": lambda: Plan.from_expiry(IDS[None, None] * 20),
    "algebra": lambda: Plan.from_mask(MASK) - Plan.from_mask(~MASK.mT),
    "reordered": lambda: Plan.from_mask(MASK).reordered(),
}


@pytest.mark.parametrize("name", MADE)
def test_the_default_device_of_torch_is_not_that_of_the_inputs(name, generator):
    q, k, v = (randn(generator, 1, 4, 65, 16).requires_grad_() for _ in range(3))

    def call():
        plan = MADE[name]()
        out, lse = sf.attention(q, k, v, plan, return_lse=True)
        given = Plan.dense(65, 65, device="cpu") if plan is None else plan
        mass = sf.attention_stats(q, k, lse.detach(), given)
        return (
            out,
            lse,
            mass,
            sf.decode(q.detach(), k.detach(), v.detach(), plan),
            *_grads(out, q, k, v),
            str(given),
        )

    here = call()
    with torch.device("meta"):
        elsewhere = call()
    assert all(torch.equal(a, b) for a, b in zip(here[:-1], elsewhere[:-1], strict=True))
    assert here[-1] == elsewhere[-1]


def _grads(out, *inputs):
    return torch.autograd.grad(out, inputs, out.detach())

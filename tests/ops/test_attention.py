"""Every backend against the exact result: out, lse and all gradients, on ugly plans, shapes and options."""

from __future__ import annotations

import math

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, EVERY, MAIN, inputs, randn, run
from sparseflash import Plan

SIZES = (0, 1, 7, 33, 63, 129)


def _options(d, B, H, Tk):
    """A random choice of scale, softcap, key_bias and sink_logits."""
    given = {}
    if d.chance(0.3):
        given["scale"] = d.pick((0.3, -0.2, 0.0, 1.0))
    if d.chance(0.3):
        given["softcap"] = d.pick((1.0, 5.0, 30.0))
    if d.chance(0.3):
        given["key_bias"] = randn(d.torch, d.pick((1, B)), d.pick((1, 2, H)), Tk)
    if d.chance(0.3):
        given["sink_logits"] = randn(d.torch, H)
    return given


def _conformance(backend, dtype, kind, seeds):
    for seed in seeds:
        d = plans._Draw(seed + 100_000)
        example = plans.example(seed, kind, batch=2, heads=4, Tq=d.pick(SIZES))
        Tq, Tk = example.plan.Tq, example.plan.Tk
        q, k, v, dout, dlse = inputs(
            d.torch,
            Tq,
            Tk,
            Hkv=d.pick((1, 2, 4)),
            D=d.pick((16, 40, 64)),
            Dv=d.pick((16, 40, 64)),
            dtype=dtype,
        )
        options = _options(d, 2, 4, Tk)
        plan = example.plan.prepare() if d.chance(0.3) else example.plan
        got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, **options)
        tolerance.compare(
            got, q, k, v, example.mask, dout=dout, dlse=dlse, note=f"{example.line}, {options}", **options
        )


@EVERY
@pytest.mark.parametrize("kind", plans.KINDS)
def test_random_plans_give_the_exact_result_and_gradients(backend, dtype, kind, seed):
    first = seed % 1_000_000
    _conformance(backend, dtype, kind, range(first, first + (2 if backend == "reference" else 4)))


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("kind", plans.KINDS)
def test_many_random_plans_give_the_exact_result_and_gradients(backend, dtype, kind, seed):
    first = seed % 1_000_000
    _conformance(backend, dtype, kind, range(first, first + 40))


@EVERY
@pytest.mark.parametrize(
    "D, Dv",
    [(16, 16), (40, 40), (64, 64), (80, 96), (96, 80), (128, 128), (192, 128), (256, 256), (1, 3), (60, 100)],
)
def test_every_head_dimension_is_exact(backend, dtype, D, Dv, generator):
    q, k, v, dout, dlse = inputs(generator, 63, 129, B=1, D=D, Dv=Dv, dtype=dtype)
    plan = Plan.dense(63, 129, causal=True, q_offset=66)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout, dlse=dlse)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, Dv", [(512, 512), (576, 512), (40, 576), (529, 33)])
def test_wide_heads_are_exact(backend, dtype, D, Dv, generator):
    q, k, v, dout, dlse = inputs(generator, 63, 129, B=1, D=D, Dv=Dv, dtype=dtype)
    few = Plan.from_keys(torch.randint(0, 129, (1, 1, 32, 9), generator=generator), Tq=63, Tk=129, tile=2)
    for plan in (Plan.dense(63, 129, causal=True, q_offset=66), few):
        got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
        tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout, dlse=dlse)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_latent_is_key_and_value_at_once(backend, dtype, generator):
    """Absorbed MLA: one head of 576 keys a token, whose first 512 are the value, in place."""
    q, k, *_ = inputs(generator, 2, 97, B=2, H=16, Hkv=1, D=576, dtype=dtype)
    v, given = k[..., :512], {"return_lse": True, "backend": backend}
    plan = Plan.dense(2, 97, causal=True, q_offset=95)
    for out, lse in (sf.attention(q, k, v, plan, **given), sf.decode(q, k, v, plan, **given)):
        tolerance.compare({"out": out, "lse": lse}, q, k, v, plan.to_dense())


@MAIN
@pytest.mark.parametrize(
    "Tq, Tk",
    [
        (0, 0),
        (0, 5),
        (5, 0),
        (1, 1),
        (1, 300),
        (300, 1),
        (63, 63),
        (129, 129),
        (129, 63),
        (63, 257),
        (256, 256),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_every_length_is_exact(backend, dtype, Tq, Tk, causal, generator):
    q, k, v, dout, dlse = inputs(generator, Tq, Tk, dtype=dtype)
    mask = torch.ones(1, 1, Tq, Tk, dtype=torch.bool)
    if causal:
        mask = mask.tril(Tk - Tq)
    plan = Plan.dense(Tq, Tk, causal=causal, q_offset=Tk - Tq)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


@MAIN
@pytest.mark.parametrize("H, Hkv", [(6, 6), (6, 2), (5, 1)])
def test_every_head_ratio_is_exact_with_one_list_for_all_for_each_group_and_for_each_head(
    backend, dtype, H, Hkv, generator
):
    q, k, v, dout, dlse = inputs(generator, 65, H=H, Hkv=Hkv, D=16, dtype=dtype)
    for own in {1, Hkv, H}:
        mask = torch.rand(1, own, 65, 65, generator=generator) < 0.5
        got = run(q, k, v, Plan.from_mask(mask, tile=32, unit=16), backend=backend, dout=dout, dlse=dlse)
        tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse, note=f"{own} lists")


@MAIN
def test_an_empty_batch_gives_empty_results(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 33, B=0, dtype=dtype)
    bias, sink = randn(generator, 1, 2, 33), randn(generator, 4)
    bucket = torch.zeros(0, 4, 33, dtype=torch.int64)
    keep = torch.ones(0, 1, 33, dtype=torch.bool)
    for plan in (Plan.dense(33, 33), Plan.from_buckets(bucket, bucket), Plan.from_keep(keep, keep)):
        got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, key_bias=bias, sink_logits=sink)
        assert got["out"].shape == (0, 4, 33, 32) and got["lse"].shape == (0, 4, 33)
        assert got["dk"].shape == (0, 2, 33, 32)
        assert torch.equal(got["dbias"], torch.zeros(1, 2, 33)) and torch.equal(got["dsink"], torch.zeros(4))


@MAIN
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_key_bias_is_exact_shared_per_group_and_per_head(backend, dtype, batch, heads, generator):
    q, k, v, dout, dlse = inputs(generator, 65, dtype=dtype)
    bias = randn(generator, batch, heads, 65)
    plan = Plan.dense(65, 65, causal=True, tile=32)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, key_bias=bias)
    assert got["dbias"].shape == bias.shape
    tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout, dlse=dlse, key_bias=bias)


@EACH
def test_a_bias_of_minus_infinity_hides_a_key(backend, generator):
    q, k, v, dout, dlse = inputs(generator, 65)
    bias = torch.zeros(1, 1, 65)
    bias[..., ::3] = -math.inf
    mask = torch.ones(1, 1, 65, 65, dtype=torch.bool).tril()
    got = run(q, k, v, Plan.dense(65, 65, causal=True), backend=backend, dout=dout, dlse=dlse, key_bias=bias)
    seen = mask & (bias > -math.inf)[..., None, :]
    del got["dbias"]
    assert got["lse"][:, :, 0].eq(-math.inf).all()  # the first query saw key 0 alone
    tolerance.compare(got, q, k, v, seen, dout=dout, dlse=dlse)


@EVERY
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.0},
        {"scale": -0.5},
        {"scale": 2},
        {"softcap": 0.5},
        {"softcap": 50},
        {"softcap": 2.0, "scale": 1.0},
    ],
    ids=str,
)
def test_scale_and_softcap_are_exact(backend, dtype, options, generator):
    q, k, v, dout, dlse = inputs(generator, 129, D=40, dtype=dtype)
    plan = Plan.dense(129, 129, causal=True)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, **options)
    tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout, dlse=dlse, **options)


@EVERY
def test_gradients_flow_from_out_alone_and_from_lse_alone(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 65, dtype=dtype)
    plan = Plan.dense(65, 65, causal=True, window=(20, 0), tile=32)
    for given in ({"dout": dout}, {"dlse": dlse}):
        got = run(q, k, v, plan, backend=backend, **given)
        tolerance.compare(got, q, k, v, plan.to_dense(), **given)
        if "dlse" in given:
            assert not got["dv"].any()


@EVERY
def test_sink_logits_are_exact_and_a_query_that_sees_nothing_has_the_sink_for_lse(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 65, dtype=dtype)
    sink = randn(generator, 4) * 3
    mask = torch.rand(1, 1, 65, 65, generator=generator) < 0.3
    mask[..., 5:9, :] = False
    got = run(q, k, v, Plan.from_mask(mask), backend=backend, dout=dout, dlse=dlse, sink_logits=sink)
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse, sink_logits=sink)
    assert not got["out"][:, :, 5:9].any() and not got["dq"][:, :, 5:9].any()
    assert torch.equal(got["lse"][:, :, 5:9].float(), sink[None, :, None].expand(2, 4, 4))


def _halves(generator, T, H):
    """One mask, and plans of disjoint parts of it that differ in order, tile and rule."""
    window = Plan.dense(T, T, causal=True, window=(9, 0), tile=32)
    far = torch.rand(1, H, T, T, generator=generator) < 0.3
    far &= ~window.to_dense() & torch.ones(T, T, dtype=torch.bool).tril()
    return [window, Plan.from_mask(far, tile=16, unit=16)], window.to_dense() | far


@EVERY
@pytest.mark.parametrize("sinks", [False, True])
def test_a_tuple_of_disjoint_plans_is_one_softmax_and_counts_the_sink_once(backend, dtype, sinks, generator):
    T = 97
    q, k, v, dout, dlse = inputs(generator, T, dtype=dtype)
    parts, mask = _halves(generator, T, 4)
    options = {"key_bias": randn(generator, 2, 2, T), "softcap": 20.0}
    if sinks:
        options["sink_logits"] = randn(generator, 4)
    for given in (tuple(parts), parts[::-1]):
        got = run(q, k, v, given, backend=backend, dout=dout, dlse=dlse, **options)
        tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse, **options)


@EACH
def test_a_pair_that_two_plans_of_a_tuple_see_counts_twice(backend, generator):
    q, k, v, _, _ = inputs(generator, 33)
    plan = Plan.dense(33, 33, causal=True)
    once, twice = (run(q, k, v, p, backend=backend) for p in (plan, (plan, plan)))
    torch.testing.assert_close(twice["lse"], once["lse"] + math.log(2), rtol=0, atol=4e-6)
    tolerance.compare({"out": twice["out"]}, q, k, v, plan.to_dense())


@EVERY
def test_the_backward_from_a_global_out_and_lse_adds_up_over_key_halves(backend, dtype, generator):
    T, cut = 129, 50
    q, k, v, dout, dlse = inputs(generator, T, dtype=dtype)
    bias = randn(generator, 1, 2, T)
    sink = randn(generator, 4)
    whole = Plan.dense(T, T, causal=True)
    got = run(q, k, v, whole, backend=backend, dout=dout, dlse=dlse, key_bias=bias, sink_logits=sink)
    left = Plan.dense(T, cut, causal=True)
    right = Plan.dense(T, T - cut, causal=True, q_offset=-cut)
    pieces = [
        sf.attention_backward(
            dout,
            q,
            k[:, :, part],
            v[:, :, part],
            got["out"],
            got["lse"],
            plan,
            dlse=dlse,
            key_bias=bias[..., part],
            backend=backend,
        )
        for part, plan in ((slice(0, cut), left), (slice(cut, T), right))
    ]
    total = {
        "dq": pieces[0][0].double() + pieces[1][0].double(),
        **{n: torch.cat([p[i] for p in pieces], -2) for i, n in ((1, "dk"), (2, "dv"))},
        "dbias": torch.cat([p[3] for p in pieces], -1),
    }
    tolerance.compare(total, q, k, v, whole.to_dense(), dout=dout, dlse=dlse, key_bias=bias, sink_logits=sink)


@EVERY
def test_merged_halves_are_the_whole_also_where_one_half_is_empty(backend, dtype, generator):
    T, cut = 97, 40
    q, k, v, dout, dlse = inputs(generator, T, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    parts = [
        sf.attention(q, k[:, :, s], v[:, :, s], p, return_lse=True, backend=backend)
        for s, p in (
            (slice(0, cut), Plan.dense(T, cut, causal=True)),
            (slice(cut, T), Plan.dense(T, T - cut, causal=True, q_offset=-cut)),
        )
    ]
    assert parts[1][1][:, :, :cut].eq(-math.inf).all()
    out, lse = sf.merge(parts)
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    got = {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    if dtype in (torch.bfloat16, torch.float16):  # halves are rounded before they are merged: results only
        got = {"lse": got["lse"]}
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    tolerance.compare(got, *(x.detach() for x in (q, k, v)), mask, dout=dout, dlse=dlse)


def test_merging_rows_that_saw_nothing_gives_zeros_and_finite_gradients():
    out = torch.zeros(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.tensor([[[0.5, -math.inf, -math.inf]]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[[-math.inf, 0.25, -math.inf]]], dtype=torch.float64, requires_grad=True)
    merged, total = sf.merge([(out, lse), (out + 1, other)])
    assert merged[0, 0, :, 0].tolist() == [0.0, 1.0, 0.0] and total[0, 0].tolist() == [0.5, 0.25, -math.inf]
    grads = torch.autograd.grad(merged.sum() + total[..., :2].sum(), [out, lse, other])
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("sinks", [False, True])
def test_fp64_gradients_of_the_reference_are_those_of_finite_differences(sinks, generator):
    H, T = 2, 5
    q, k, v, _, _ = inputs(generator, T, T + 2, B=1, H=H, Hkv=1, D=3, Dv=2, dtype=torch.float64)
    bias = randn(generator, 1, 1, T + 2, dtype=torch.float64)
    sink = randn(generator, H, dtype=torch.float64)
    mask = torch.rand(1, H, T, T + 2, generator=generator) < 0.4
    mask[:, :, 0, 0], mask[:, :, 3] = True, False
    plan = Plan.from_mask(mask, tile=4, unit=4)
    live = mask.any(-1)

    def call(q, k, v, bias, sink):
        out, lse = sf.attention(
            q,
            k,
            v,
            plan,
            key_bias=bias,
            sink_logits=sink if sinks else None,
            softcap=3.0,
            return_lse=True,
            backend="reference",
        )
        return out, lse if sinks else lse[live]  # -inf has no finite difference

    leaves = [x.requires_grad_() for x in (q, k, v, bias, sink)]
    assert torch.autograd.gradcheck(call, leaves)


def test_merge_passes_gradcheck(generator):
    a, b = (randn(generator, 1, 2, 5, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    x, y = (randn(generator, 1, 2, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, x, b, y: sf.merge([(a, x), (b, y)]), (a, x, b, y))

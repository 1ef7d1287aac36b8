"""Partial results: what pieces of a softmax give is as good as what one call gives, whatever the dtype."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, FAST, inputs, randn, same_bits
from sparseflash import Plan, SparseFlashError
from sparseflash.backends.numerics import state_dtype

CUTS = (0, 1, 40, 40, 97, 193)
"""Where the keys of 193 are cut: a lone one, none at all, and odd numbers of them."""


def _pieces(Tq, Tk, causal):
    """(keys from, to, the plan of them): dense, or causal with the last query at the last key."""
    return [
        (a, e, Plan.dense(Tq, e - a, causal=causal, q_offset=Tk - Tq - a if causal else 0))
        for a, e in zip(CUTS, CUTS[1:])
    ]


def _forward(q, k, v, pieces, backend, **options):
    parts = [
        sf.attention(q, k[:, :, a:e], v[:, :, a:e], plan, return_lse=True, backend=backend, **options)
        for a, e, plan in pieces
    ]
    return sf.merge(parts)


def _backward(dout, dlse, q, k, v, out, lse, pieces, backend, **options):
    """Gradients, in the dtype that pieces have: dq summed over them, dk and dv side by side."""
    parts = [
        sf.attention_backward(
            dout, q, k[:, :, a:e], v[:, :, a:e], out, lse, plan, dlse=dlse, backend=backend, **options
        )
        for a, e, plan in pieces
    ]
    dq = sum(dq for dq, *_ in parts)
    dk, dv = (torch.cat([part[n] for part in parts], 2) for n in (1, 2))
    return {"dq": dq, "dk": dk, "dv": dv}


def _wide(x):
    return state_dtype(x)


ABLE = [(name, dtype) for name in BACKENDS for dtype in FAST if (name, dtype) != ("triton", torch.bfloat16)]
"""Not fp64, of which the yardstick is no better than the result; and the interpreter truncates bf16."""


@pytest.mark.parametrize("backend, dtype", [x for x in ABLE if x[1] != torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_merged_pieces_and_summed_gradients_are_exact_as_one_call_is(backend, dtype, causal, generator):
    q, k, v, dout, dlse = inputs(generator, 129, 193, D=40, Dv=24, dtype=dtype)
    pieces, wide = _pieces(129, 193, causal), _wide(q)
    out, lse = _forward(q, k, v, pieces, backend, out_dtype=wide)
    assert out.dtype == wide
    delta = (dout.to(wide) * out).sum(-1)
    got = _backward(dout, dlse, q, k, v, None, lse, pieces, backend, grad_dtype=wide, delta=delta)
    assert all(x.dtype == wide for x in got.values())
    got = {n: x.to(dtype) for n, x in (got | {"out": out}).items()} | {"lse": lse}
    mask = Plan.dense(129, 193, causal=causal, q_offset=64 if causal else 0).to_dense()
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "triton"]
)  # whose interpreter truncates
def test_in_bf16_pieces_add_nothing_to_the_error_of_one_call_where_rounded_ones_do(backend, generator):
    T = 256
    q, k, v, dout, _ = inputs(generator, T, dtype=torch.bfloat16)
    plan = Plan.dense(T, T, causal=True)
    pieces = [(a, a + 32, Plan.dense(T, 32, causal=True, q_offset=-a)) for a in range(0, T, 32)]
    want = tolerance.exact(q, k, v, plan.to_dense(), dout=dout)

    def errors(found):
        wrong = {n: x.to(q.dtype).double() - want[n] for n, x in found.items()}
        return {n: float(x.norm() / want[n].norm()) for n, x in wrong.items()}

    one, lse = sf.attention(q, k, v, plan, return_lse=True, backend=backend)
    grads = dict(
        zip(("dq", "dk", "dv"), sf.attention_backward(dout, q, k, v, one, lse, plan, backend=backend))
    )
    whole = errors(grads | {"out": one})
    found = {}
    for wide in (torch.float32, None):
        out, lse = _forward(q, k, v, pieces, backend, out_dtype=wide)
        grads = _backward(dout, None, q, k, v, out, lse, pieces, backend, grad_dtype=wide)
        found[wide] = errors(grads | {"out": out})
    for name, error in whole.items():
        assert found[torch.float32][name] <= 1.01 * error, name
    for name in ("out", "dq"):  # dk and dv of a piece are whole
        assert found[None][name] > 1.05 * whole[name], name


@pytest.mark.parametrize("backend, dtype", ABLE)
def test_what_one_call_returns_is_its_wide_result_rounded(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 65, dtype=dtype)
    bias = randn(generator, 1, 2, 65)
    wide, near = _wide(q), Plan.dense(65, 65, causal=True, window=(9, 0))
    for plan in (
        Plan.dense(65, 65, causal=True),
        Plan.from_keys(torch.randint(0, 65, (1, 1, 33, 5), generator=generator), Tq=65, Tk=65, tile=2),
        (near, Plan.dense(65, 65, causal=True) - near),
    ):
        given = {"key_bias": bias, "backend": backend}
        out, lse = sf.attention(q, k, v, plan, return_lse=True, **given)
        full = sf.attention(q, k, v, plan, out_dtype=wide, **given)
        assert full.dtype == wide and out.dtype == dtype
        results = (dout, q, k, v, out, lse, plan)
        grads = sf.attention_backward(*results, dlse=dlse, **given)
        sums = sf.attention_backward(*results, dlse=dlse, grad_dtype=wide, **given)
        assert all(x.dtype == wide for x in sums)
        same_bits(
            {"out": out, **dict(enumerate(grads[:3]))},
            {"out": full.to(dtype), **{n: x.to(dtype) for n, x in enumerate(sums[:3])}},
        )
        assert torch.equal(grads[3], sums[3])


@pytest.mark.parametrize("backend, dtype", ABLE)
def test_a_wide_result_has_its_gradients(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 65, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sf.attention(*leaves, causal=True, out_dtype=_wide(q), backend=backend)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    got = {"out": out.detach().to(dtype), **dict(zip(("dq", "dk", "dv"), grads))}
    assert all(x.dtype == dtype for x in got.values())
    mask = torch.ones(1, 1, 65, 65, dtype=torch.bool).tril()
    tolerance.compare(got, *(x.detach() for x in leaves), mask, dout=dout)


@EACH
def test_delta_stands_for_out(backend, generator):
    q, k, v, dout, dlse = inputs(generator, 65)
    plan = Plan.dense(65, 65, causal=True)
    out, lse = sf.attention(q, k, v, plan, return_lse=True, backend=backend)
    delta = torch.randn(out.shape[:3], generator=generator)
    given = {"dlse": dlse, "backend": backend}
    with_out, without = (
        sf.attention_backward(dout, q, k, v, x, lse, plan, delta=delta, **given)[:3] for x in (out, None)
    )
    same_bits(dict(enumerate(with_out)), dict(enumerate(without)))
    # a delta is a slope of lse with the sign changed
    turned = sf.attention_backward(
        dout, q, k, v, None, lse, plan, delta=torch.zeros_like(delta), dlse=dlse - delta, backend=backend
    )
    for x, y in zip(without, turned):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_compiled_code_keeps_dtypes_and_strides(layout, generator):
    q, k, v, _, _ = inputs(generator, 65, dtype=torch.bfloat16)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))

    def call(q, k, v):
        return sf.attention(q, k, v, causal=True, out_dtype=torch.float32, return_lse=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    (out, lse), (out_again, lse_again) = call(q, k, v), compiled(q, k, v)
    assert out.dtype == torch.float32 and out.stride() == out_again.stride()
    assert torch.equal(out, out_again) and torch.equal(lse, lse_again)


@EACH
@pytest.mark.parametrize("dtype", FAST)
def test_decoding_returns_the_dtype_that_was_asked_for(backend, dtype, generator):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bf16")
    q, k, v, _, _ = inputs(generator, 2, 97, dtype=dtype)
    keep = torch.rand(1, 1, 2, 97, generator=generator) < 0.5
    for plans in (None, (Plan.from_mask(keep), Plan.from_mask(~keep))):
        out, full = (
            sf.decode(q, k, v, plans, out_dtype=wanted, backend=backend) for wanted in (None, torch.float32)
        )
        assert full.dtype == torch.float32 and torch.equal(full.to(dtype), out)


Q = torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)
LSE = torch.zeros(1, 2, 5)
PLAN = Plan.dense(5, 5)


@pytest.mark.parametrize(
    "call, parts",
    [
        (
            lambda: sf.attention(Q, Q, Q, out_dtype=torch.float16),
            ["out_dtype=torch.float16", "bfloat16", "float32"],
        ),
        (lambda: sf.attention(Q, Q, Q, out_dtype="fp32"), ["out_dtype='fp32'"]),
        (lambda: sf.decode(Q, Q, Q, out_dtype=torch.float64), ["torch.float64", "torch.float32"]),
        (
            lambda: sf.attention_backward(Q, Q, Q, Q, Q, LSE, PLAN, grad_dtype=torch.int32),
            ["grad_dtype=torch.int32"],
        ),
        (lambda: sf.attention_backward(Q, Q, Q, Q, None, LSE, PLAN), ["out: a NoneType", "delta"]),
        (lambda: sf.attention_backward(Q, Q, Q, Q, None, LSE, PLAN, delta=LSE[0]), ["delta: [2, 5]"]),
        (lambda: sf.attention_backward(Q, Q, Q, Q, None, LSE, PLAN, delta=LSE.long()), ["delta", "floating"]),
    ],
)
def test_what_does_not_fit_is_refused(call, parts):
    with pytest.raises(SparseFlashError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)

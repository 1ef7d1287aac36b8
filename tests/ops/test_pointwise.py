"""`pointwise_attention` against its definition in fp64, on every backend and kind of plan."""

from __future__ import annotations

import math

import pytest
import torch

import plans
import sparseflash as sf
from harness import EACH, MAIN, inputs, same_bits
from sparseflash import Plan
from sparseflash.plan.flat import flatten_all
from tolerance import _spread

F = {"silu": torch.nn.functional.silu, "relu2": lambda x: x.clamp(min=0).square()}


def _dense(dtype, q, k, v, mask, dout, activation, scale, out_scale):
    """Out and every gradient of the definition, computed in dtype; what nobody sees does not matter."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    keep = _spread(mask, q.shape[1]).expand(q.shape[0], -1, -1, -1)
    sees, seen = keep.any(-1)[..., None], keep.any(-2)[..., None]
    kh, vh = (torch.where(seen, _spread(x, q.shape[1]), 0) for x in (k, v))
    weight = torch.where(keep, F[activation](torch.where(sees, q, 0) @ kh.mT * scale) * out_scale, 0)
    out = weight @ vh
    grads = torch.autograd.grad(out, (q, k, v), torch.where(sees, dout, 0).to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def _bands(want, q, k, v, mask, dout, activation, scale, out_scale):
    """What roundings that any kernel must do may cost, to first order (see `tolerance`).

    |.| of a sum is the root of the sum of squares of its terms. A score is a sum of D terms in fp32; weights
    and slopes are rounded to the dtype; the slope moves by at most 1/2 (silu) or 2 (relu2) times the error of
    its score.
    """
    eps, fine = torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps
    if q.dtype == torch.float64:
        fine = eps
    H, D = q.shape[1], q.shape[-1]
    keep = _spread(mask, H).expand(q.shape[0], -1, -1, -1)
    sees, seen = keep.any(-1)[..., None], keep.any(-2)[..., None]
    q, dout = (torch.where(sees, x, 0).double() for x in (q, dout))
    kv_heads = k.shape[1]
    k, v = (torch.where(seen, _spread(x, H), 0).double() for x in (k, v))
    x = (q @ k.mT * scale).requires_grad_()
    f = F[activation](x)
    (slope,) = torch.autograd.grad(f.sum(), x)
    scale = abs(scale)
    off = fine * (1 + D**0.5) * ((q**2 @ (k**2).mT).sqrt() * scale)
    size = abs(out_scale)
    p = torch.where(keep, f.detach(), 0).abs() * size
    dp = torch.where(keep, (eps + 4 * fine) * f.detach().abs() + slope.abs() * off, 0) * size
    level = (dout**2 @ (v**2).mT).sqrt()
    g = torch.where(keep, slope * (dout @ v.mT), 0).abs() * size
    bend = 0.5 if activation == "silu" else 2.0
    dg = torch.where(keep, (eps + 4 * fine) * slope.abs() * level + bend * off * level, 0) * size + eps * g

    def root(a, b):
        return (a**2 @ b**2).sqrt()

    def per_kv(a):
        return (a**2).unflatten(1, (kv_heads, H // kv_heads)).sum(2).sqrt()

    n, m = (fine * keep.sum(d, keepdim=True).sqrt() for d in (-1, -2))
    found = {
        "out": root(dp, v) + n * root(p, v),
        "dq": (root(dg, k) + n * root(g, k)) * scale,
        "dk": per_kv((root(dg.mT, q) + m.mT * root(g.mT, q)) * scale),
        "dv": per_kv(root(dp.mT, dout) + m.mT * root(p.mT, dout)),
    }
    return {name: x + eps * want[name].abs() for name, x in found.items()}


def _run(q, k, v, plan, dout, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = sf.pointwise_attention(*leaves, plan, **options)
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def _compare(got, q, k, v, mask, dout, *, activation="silu", scale=None, out_scale=1.0, note=""):
    """As `tolerance.compare`: twice (gradients: thrice) the worst error of eager in the row, and the band."""
    given = (q, k, v, mask, dout, activation, q.shape[-1] ** -0.5 if scale is None else scale, out_scale)
    want, rough = _dense(torch.float64, *given), _dense(q.dtype, *given)
    band = _bands(want, *given)
    for name, x in got.items():
        error = (x.double() - want[name]).abs()
        slack = (rough[name].double() - want[name]).abs().amax(-1, keepdim=True) if x.numel() else 0
        allowed = (2 if name == "out" else 3) * slack + band[name]
        if x.dtype == torch.float16:  # below the smallest normal, steps no longer shrink
            allowed = allowed + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        assert bool((error <= allowed).all()), (
            f"{name}: {float((error - allowed).max()):.3g} more than allowed; {note}"
        )


@EACH
@pytest.mark.parametrize("kind", sorted(set(plans.KINDS) - {"pool"}))
def test_any_plan_gives_what_its_mask_gives(backend, kind, seed):
    for n in range(2):
        d = plans._Draw(seed + n)
        example = plans.example(
            seed + n, kind, batch=2, heads=4, Tq=d.pick((1, 33, 70)), Tk=d.pick((1, 63, 150))
        )
        plan = example.plan
        dtype = d.pick((torch.float32, torch.bfloat16))
        q, k, v, dout, _ = inputs(d.torch, plan.Tq, plan.Tk, Dv=24, dtype=dtype)
        options = d.pick(({}, {"activation": "relu2", "scale": -0.4}, {"scale": 2.0, "out_scale": 0.01}))
        dirty = ~_spread(example.mask, 2).any(-2) if example.mask.shape[1] < 2 else None
        if dirty is not None:  # keys that nobody sees
            k, v = (torch.where(dirty[..., None], math.nan, x) for x in (k, v))
        blind = ~example.mask.any(-1).any(1, keepdim=True)  # queries that see nothing, in no head
        q, dout = (torch.where(blind[..., None], math.nan, x) for x in (q, dout))
        got = _run(q, k, v, plan, dout, backend=backend, **options)
        _compare(got, q, k, v, example.mask, dout, note=example.line, **options)


@MAIN
@pytest.mark.parametrize("activation", F)
@pytest.mark.parametrize("T, D, Dv", [(1, 40, 16), (63, 80, 80), (129, 128, 40)])
def test_odd_shapes_and_strides(backend, dtype, activation, T, D, Dv, generator):
    q, k, v, dout, _ = inputs(generator, T, D=D, Dv=Dv, dtype=dtype)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    got = _run(q, k, v, Plan.dense(T, T, causal=True), dout, activation=activation, backend=backend)
    _compare(got, q, k, v, mask, dout, activation=activation)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    options = {"activation": activation, "backend": backend}
    same_bits(_run(*turned, Plan.dense(T, T, causal=True), dout, **options), got)
    assert torch.equal(sf.pointwise_attention(q, k, v, causal=True, **options), got["out"])


@EACH
@pytest.mark.parametrize("activation", F)
def test_large_scores_of_both_signs_stay_finite(backend, activation):
    q = torch.tensor([-300.0, -30.0, 0.0, 30.0, 300.0]).view(1, 1, 5, 1)
    k, v = torch.full((1, 1, 1, 1), 10.0), torch.ones(1, 1, 1, 1)
    got = _run(q, k, v, Plan.dense(5, 1), torch.ones(1, 1, 5, 1), backend=backend, activation=activation)
    _compare(
        got, q, k, v, torch.ones(1, 1, 5, 1, dtype=torch.bool), torch.ones(1, 1, 5, 1), activation=activation
    )


@EACH
def test_fp16_results_are_scaled_before_they_are_rounded(backend, generator):
    q, k, v, *_ = inputs(generator, 64, D=16, dtype=torch.float16)
    v = v + 100
    out = sf.pointwise_attention(100 * q, k, v, scale=1.0, out_scale=1 / 64, backend=backend)
    assert out.isfinite().all() and out.abs().max() > 1024


@EACH
def test_results_repeat_bit_for_bit(backend, generator):
    q, k, v, dout, _ = inputs(generator, 300, H=8)
    plan = Plan.dense(300, 300, causal=True, window=(100, 0))
    want = _run(q, k, v, plan, dout, backend=backend)
    for _ in range(5):
        same_bits(_run(q, k, v, plan, dout, backend=backend), want)


@EACH
def test_disjoint_plans_add_up(backend, generator):
    q, k, v, dout, _ = inputs(generator, 130)
    near, far = (
        Plan.dense(130, 130, causal=True, window=(40, 0)),
        Plan.dense(130, 130, causal=True, q_offset=-41),
    )
    got = _run(q, k, v, (near, far), dout, backend=backend)
    _compare(got, q, k, v, torch.ones(1, 1, 130, 130, dtype=torch.bool).tril(), dout)


@EACH
def test_nothing_is_nothing(backend):
    for B, Tq, Tk in ((0, 3, 3), (1, 0, 3), (1, 3, 0)):
        q, k = torch.ones(B, 2, Tq, 8), torch.ones(B, 2, Tk, 8)
        got = _run(q, k, k, Plan.dense(Tq, Tk), q, backend=backend)
        assert not any(x.any() for x in got.values())


def test_gradcheck_of_the_definition(generator):
    q, k, v, *_ = inputs(generator, 5, 7, H=2, Hkv=1, D=3, Dv=2, dtype=torch.float64)
    plan = Plan.from_mask(torch.rand(1, 2, 5, 7, generator=generator) < 0.6, tile=4, unit=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: sf.pointwise_attention(*x, plan, out_scale=0.3), leaves)


@EACH
def test_the_ops_keep_the_rules_of_torch_library(backend, generator):
    q, k, v, *_ = (x.requires_grad_() for x in inputs(generator, 33))
    tensors, ints = flatten_all([Plan.dense(33, 33, causal=True, tile=16)])
    op = torch.ops.sparseflash.pointwise_attention.default
    torch.library.opcheck(op, (q, k, v, tensors, ints, "silu", 0.2, 1.0, backend))


def test_a_compiled_step_is_one_graph(generator):
    q, k, v, *_ = inputs(generator, 40)
    plan = Plan.dense(40, 40, causal=True)
    step = torch.compile(
        lambda q: sf.pointwise_attention(q, k, v, plan).tanh(), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(step(q), sf.pointwise_attention(q, k, v, plan).tanh())


@EACH
def test_under_autocast_the_op_is_that_of_the_cast_inputs(backend, generator):
    q, k, v, *_ = inputs(generator, 40)
    want = sf.pointwise_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sf.pointwise_attention(q, k, v, backend=backend), want)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"activation": "gelu"}, "expected 'silu' or 'relu2'"),
        ({"out_scale": math.inf}, "out_scale=inf"),
        ({"plan": Plan.dense(8, 8), "causal": True}, "plan together with causal=True"),
        ({"plan": Plan.dense(9, 8)}, "9 x 8 tokens"),
        ({"causal": 1}, "expected True or False"),
        ({"q": torch.zeros(8, 4)}, "4-d tensors"),
        ({"scale": "x"}, "scale='x'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_have_their_message(change, said):
    x = torch.zeros(1, 2, 8, 4)
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.pointwise_attention(**({"q": x, "k": x, "v": x} | change))

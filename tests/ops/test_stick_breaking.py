"""`stick_breaking` against its product formula in fp64, on every backend and kind of plan; order and mass."""

from __future__ import annotations

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, EVERY, MAIN, inputs, peak_memory, randn, same_bits
from sparseflash import Plan
from sparseflash.plan.flat import flatten

NAMES = ("out", "rem", "dq", "dk", "dv")


def _spread(x, heads):
    return tolerance._spread(x, heads)


def _sticks(q, k, mask, order, scale):
    """Shares b, weights A and what is left, by the product over newer keys; order[token] is its rank."""
    H = q.shape[1]
    place = _spread(order, H).expand(q.shape[0], -1, -1).argsort(-1)[..., None, :].expand(mask.shape)
    z = (q @ _spread(k, H).transpose(-1, -2) * scale).gather(-1, place)
    keep = mask.gather(-1, place)
    share = torch.where(keep, torch.sigmoid(z), 0)
    left = torch.where(keep, torch.sigmoid(-z), 1).flip(-1).cumprod(-1).flip(-1)
    newer = torch.cat((left[..., 1:], torch.ones_like(left[..., :1])), -1)
    back = place.argsort(-1)
    return share.gather(-1, back), (share * newer).gather(-1, back), left[..., 0]


def _all(dtype, q, k, v, mask, order, scale, dout, drem):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    seen, sees = mask.any(-2)[..., None], mask.any(-1)[..., None]
    H, B = q.shape[1], q.shape[0]
    ql = torch.where(sees, leaves[0], 0)
    kl, vl = (torch.where(seen, _spread(x, H).expand(B, -1, -1, -1), 0) for x in leaves[1:])
    _, weight, rem = _sticks(ql, kl, mask, order, scale)
    out = weight @ vl
    grads = torch.autograd.grad((out, rem), leaves, (dout.to(dtype), drem.to(dtype)))
    return dict(zip(NAMES, (out.detach(), rem.detach(), *grads), strict=True))


def _bands(want, q, k, v, mask, order, scale, dout, drem):
    """What rounding must cost, in the terms of `tolerance`.

    A logit is off by e sqrt(D) |q.k|, a weight by that of its own and, times their shares, of all newer
    logits, and by a rounding for each factor: relative c, and a few of the smallest numbers where sticks end.
    Of a row these errors are common, so they add up (L1); roundings of P to the dtype are independent.
    dZ = T - b C with T = P (dP - drem) and C its sum up to here.
    """
    B, H, Tq, D = q.shape
    eps = torch.finfo(q.dtype).eps
    fine = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    seen, sees = mask.any(-2)[..., None], mask.any(-1)[..., None]
    qd, do = (torch.where(sees, x.double(), 0) for x in (q, dout))
    kd, vd = (torch.where(seen, _spread(x, H).double().expand(B, -1, -1, -1), 0) for x in (k, v))
    share, weight, rem = _sticks(qd, kd, mask, order, scale)
    place = _spread(order, H).expand(B, -1, -1).argsort(-1)[..., None, :].expand(mask.shape)
    back = place.argsort(-1)

    def older(x):  # sum up to here
        return x.gather(-1, place).cumsum(-1).gather(-1, back)

    def newer(x):
        return x.gather(-1, place).flip(-1).cumsum(-1).flip(-1).gather(-1, back)

    def root(x, y):
        return (x**2 @ y**2).sqrt()

    logit = D**0.5 * abs(scale) * root(qd, kd.transpose(-1, -2))
    c = fine * (1 + logit + newer(torch.where(mask, (share * logit) ** 2 + 4, 0)).sqrt())
    tiny = torch.where(mask, 4 * torch.finfo(torch.float32).smallest_normal * 2.0**-23, 0)
    slip = c * weight + tiny
    found = {"out": eps * (root(weight, vd) + want["out"].abs()) + slip @ vd.abs()}
    all_of_row = (torch.where(mask, (share * logit) ** 2 + 4, 0).sum(-1)).sqrt()
    found["rem"] = fine * rem * (1 + all_of_row) + tiny.sum(-1)
    level = root(do, vd.transpose(-1, -2)) + drem.double().abs()[..., None]
    T = weight * level
    sums = c + fine * mask.sum(-1, keepdim=True).sqrt()
    slope = share * (eps * older(T**2).sqrt() + older(slip * level) + sums * older(T))
    g = eps * T + slip * level + slope + tiny
    group = H // k.shape[1]

    def per_kv(x):
        total = x.unflatten(1, (-1, group)).sum(2)
        return total.sum(0, keepdim=True) if k.shape[0] == 1 and B > 1 else total

    found["dq"] = abs(scale) * g @ kd.abs() + eps * want["dq"].abs()
    found["dk"] = abs(scale) * per_kv(g.transpose(-1, -2) @ qd.abs()) + eps * want["dk"].abs()
    own = (eps * weight + slip).transpose(-1, -2)
    found["dv"] = per_kv(own @ do.abs()) + eps * want["dv"].abs()
    return found


def _run(q, k, v, plan, scale, dout, drem, backend, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, rem = sf.stick_breaking(*leaves, plan, scale=scale, return_rem=True, backend=backend, **options)
    grads = torch.autograd.grad((out, rem), leaves, (dout, drem))
    return dict(zip(NAMES, (out.detach(), rem.detach(), *grads), strict=True))


def _hold(q, k, v, plan, mask, order, scale, dout, drem, backend, note="", **options):
    mask = _spread(mask, q.shape[1]).expand(q.shape[0], -1, -1, -1)
    given = (q, k, v, mask, order, scale, dout, drem)
    got, want = _run(q, k, v, plan, scale, dout, drem, backend, **options), _all(torch.float64, *given)
    rough, band = _all(q.dtype, *given), _bands(want, *given)
    tolerance.hold(got, want, rough, band, q.dtype, title=f"{backend} q{list(q.shape)}", note=note)
    return got


def _natural(Tk):
    return torch.arange(Tk).view(1, 1, -1)


@EVERY
@pytest.mark.parametrize("T, D, Dv", [(1, 16, 40), (63, 40, 16), (129, 128, 24), (300, 80, 64)])
def test_results_and_gradients_are_those_of_the_product_formula(backend, dtype, T, D, Dv, generator):
    q, k, v, dout, drem = inputs(generator, T, D=D, Dv=Dv, Hkv=1 if T == 63 else 2, dtype=dtype)
    strict = torch.ones(1, 1, T, T, dtype=torch.bool).tril(-1)
    got = _hold(q, k, v, None, strict, _natural(T), D**-0.5, dout, drem, backend)
    assert not got["out"][:, :, 0].any() and bool((got["rem"][:, :, 0] == 1).all())


@EACH
@pytest.mark.parametrize("slope", [-8.0, 0.05, 30.0])
def test_far_keys_and_sticks_that_end_at_once_are_exact_too(backend, slope, generator):
    """Logits around -8 leave mass for thousands of keys, around 30 for none; both signs cancel nowhere."""
    T, D = 400, 32
    q, k, v, dout, drem = inputs(generator, T, B=1, H=2, Hkv=2, D=D)
    q[..., 0], k[..., 0] = 1, slope * D**0.5
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    got = _hold(q, k, v, None, mask, _natural(T), D**-0.5, dout, drem, backend, include_self=True)
    assert (bool((got["rem"][..., -1] > 0.5).all())) == (slope < 0)


def hold(backend, kind, seed, lengths, keys, dtype=torch.float32):
    """One random plan of a kind against the product formula."""
    d = plans._Draw(seed)
    example = plans.example(seed, kind, batch=2, heads=4, Tq=d.pick(lengths), Tk=d.pick(keys))
    plan, Tq, Tk = example.plan, example.plan.Tq, example.plan.Tk
    q, k, v, dout, drem = inputs(d.torch, Tq, Tk, D=d.pick((8, 24)), Dv=d.pick((8, 40)), dtype=dtype)
    k, v = (x[:1] if example.pool else x for x in (k, v))
    order = _natural(Tk)
    if plan.k_order is not None:  # rank of each token; those in no row are seen by nobody
        rows = torch.arange(plan.k_rows).expand(plan.k_order.shape)
        order = torch.full((*plan.k_order.shape[:2], Tk + 1), -1)
        order.scatter_(-1, torch.where(plan.k_order < 0, Tk, plan.k_order).long(), rows)
        order = order[..., :Tk]
    _hold(q, k, v, plan, example.mask, order, 0.4, dout, drem, backend, note=example.line)


@EACH
@pytest.mark.parametrize("kind", plans.KINDS)
def test_any_plan_breaks_its_sticks_in_the_order_of_its_keys(backend, kind, seed):
    for n in range(2):
        hold(backend, kind, seed + n, (1, 65, 130), (1, 33, 200))


def test_the_reference_passes_gradcheck(generator):
    q, k, v, _, _ = inputs(generator, 20, B=1, H=2, Hkv=1, D=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for plan in (None, Plan.dense(20, 20, causal=True, window=(6, 0), tile=8)):
        assert torch.autograd.gradcheck(
            lambda *x, plan=plan: sf.stick_breaking(*x, plan, return_rem=True), leaves, fast_mode=True
        )


@EACH
def test_equal_logits_break_a_geometric_sequence(backend):
    T, c = 200, 0.7
    q, k = torch.ones(1, 1, 1, 1), torch.ones(1, 1, T, 1)
    v = torch.eye(T).view(1, 1, T, T)
    out, rem = sf.stick_breaking(q, k, v, q_offset=T, scale=c, return_rem=True, backend=backend)
    share = torch.sigmoid(torch.tensor(c, dtype=torch.float64))
    want = share * (1 - share) ** torch.arange(T - 1, -1, -1)
    torch.testing.assert_close(out[0, 0, 0].double(), want, rtol=2e-5, atol=1e-40)
    torch.testing.assert_close(rem[0, 0, 0].double(), (1 - share) ** T, rtol=5e-5, atol=1e-44)


@EACH
@pytest.mark.parametrize("size", [1.0, 80.0])
def test_weights_and_rest_make_a_whole_stick(backend, size, generator):
    q, k, _, _, _ = inputs(generator, 150, D=16)
    out, rem = sf.stick_breaking(q * size, k, torch.ones(2, 2, 150, 1), return_rem=True, backend=backend)
    torch.testing.assert_close(out[..., 0] + rem, torch.ones_like(rem), atol=1e-5, rtol=0)


@EACH
def test_the_order_of_keys_matters_and_segments_compose(backend, generator):
    q, k, v, _, _ = inputs(generator, 1, 300, D=16)
    options = {"q_offset": 300, "return_rem": True, "backend": backend}
    out, rem = sf.stick_breaking(q, k, v, **options)
    turned, _ = sf.stick_breaking(q, k.flip(2), v.flip(2), **options)
    assert float((out - turned).abs().max()) > 0.1
    old, new = (sf.stick_breaking(q, a, b, **options) for a, b in zip(k.split(297, 2), v.split(297, 2)))
    torch.testing.assert_close(new[0] + new[1][..., None] * old[0], out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new[1] * old[1], rem, atol=0, rtol=1e-4)


@MAIN
def test_layouts_and_neighbours_leave_the_bits_alone(backend, dtype, generator):
    q, k, v, dout, drem = inputs(generator, 140, D=24, Dv=40, dtype=dtype)
    plan = Plan.dense(140, 140, causal=True, window=(100, 0))
    once = _run(q, k, v, plan, 0.3, dout, drem, backend)
    same_bits(once, _run(q, k, v, plan, 0.3, dout, drem, backend))
    bshd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    wide = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v, dout)]  # lanes two apart
    for a, b, c, d in (bshd, wide):
        same_bits(once, _run(a, b, c, plan, 0.3, d, drem, backend))
    flip = _run(*(x.flip(0) for x in (q, k, v)), plan, 0.3, dout.flip(0), drem.flip(0), backend)
    same_bits(once, {n: x.flip(0) for n, x in flip.items()})
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 101:] = randn(generator, *x[:, :, 101:].shape, dtype=dtype)
    other = _run(*later, plan, 0.3, dout, drem, backend)
    for name in ("out", "rem"):
        assert torch.equal(once[name][:, :, :101], other[name][:, :, :101])


@MAIN
def test_nan_in_one_head_or_in_keys_nobody_sees_stays_there(backend, dtype, generator):
    q, k, v, dout, drem = inputs(generator, 140, dtype=dtype)
    plan = Plan.dense(140, 140, causal=True, window=(40, 0))
    clean = _run(q, k, v, plan, 0.3, dout, drem, backend)
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[0, 1, 70] = float("nan")
    spoiled = _run(q, *bad, plan, 0.3, dout, drem, backend)
    for name, x in spoiled.items():
        own = x.shape[1] // 2
        assert torch.equal(x[:, :own], clean[name][:, :own]) and torch.equal(x[1], clean[name][1]), name
    hidden = torch.ones(1, 1, 140, 140, dtype=torch.bool).tril()
    hidden[..., 70] = False
    plan = Plan.from_mask(hidden)
    clean = _run(q, k, v, plan, 0.3, dout, drem, backend)
    same_bits(clean, _run(q, *bad, plan, 0.3, dout, drem, backend))


@EACH
@pytest.mark.parametrize("B, Tq, Tk", [(0, 5, 5), (2, 0, 4), (2, 4, 0)])
def test_nothing_to_see_leaves_the_stick_whole(backend, B, Tq, Tk, generator):
    q, k, v, dout, drem = inputs(generator, Tq, Tk, B=B)
    got = _run(q, k, v, None, 0.3, dout, drem, backend)
    assert not got["out"].any() and bool((got["rem"][:, :, :1] == 1).all()) and not got["dk"].any()


@EACH
def test_the_op_is_an_ordinary_pytorch_operator(backend, generator):
    q, k, v, dout, drem = inputs(generator, 70, D=8, Dv=24)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    plan = Plan.dense(70, 70, causal=True, tile=32)
    tensors, ints = flatten(plan)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ops = torch.ops.sparseflash
    torch.library.opcheck(ops.stick_breaking.default, (*leaves, tensors, ints, 0.3, backend))
    torch.library.opcheck(
        ops.stick_breaking_backward.default, (dout, drem, q, k, v, tensors, ints, 0.3, backend)
    )

    def step(q, k, v):
        return sf.stick_breaking(q * 2, k, v, return_rem=True, backend=backend)

    results = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        ends = call(*leaves)
        results.append([*ends, *torch.autograd.grad(ends, leaves, (dout, drem))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sf.stick_breaking(q, k, v, backend=backend)
    low = [x.to(torch.bfloat16) for x in (q, k, v)]
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, sf.stick_breaking(*low, backend=backend))


@EACH
def test_gradients_flow_from_the_rest_alone(backend, generator):
    q, k, v, dout, drem = inputs(generator, 40)
    want = _run(q, k, v, None, 0.3, torch.zeros_like(dout), drem, backend)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    _, rem = sf.stick_breaking(*leaves, scale=0.3, return_rem=True, backend=backend)
    for name, g in zip(("dq", "dk", "dv"), torch.autograd.grad(rem, leaves, drem), strict=True):
        assert torch.equal(g, want[name]), name


@pytest.mark.parametrize(
    "change, said",
    [
        ({"plan": (Plan.dense(8, 8),)}, "plan is a tuple: expected one Plan; keys need one order"),
        ({"plan": Plan.dense(8, 8), "include_self": True}, "belongs to the plan"),
        ({"plan": Plan.dense(8, 8), "q_offset": 3}, "positions belong to the plan"),
        ({"plan": Plan.dense(9, 8)}, "the plan is for 9 x 8 tokens"),
        ({"include_self": 1}, "expected True or False"),
        ({"return_rem": None}, "expected True or False"),
        ({"scale": "x"}, "expected a finite number"),
        ({"k": torch.zeros(2, 3, 8, 16), "v": torch.zeros(2, 3, 8, 16)}, "multiple of Hkv"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_have_their_message(change, said):
    k = torch.zeros(2, 2, 8, 16)
    given = {"q": torch.zeros(2, 4, 8, 16), "k": k, "v": k} | change
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.stick_breaking(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
@pytest.mark.parametrize("shift", [0, -8])
def test_memory_is_linear_in_the_length(shift, generator):
    """Tensors of 2 MB each; the pairs would take 4 GB."""
    q, k, v = torch.randn(3, 1, 1, 1 << 15, 16, generator=generator)
    q[..., 0], k[..., 0] = 1, 4 * shift
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step(n):
        first = [x[:, :, :n] for x in leaves]
        for out in (sf.stick_breaking(*first), sf.linear_attention(*first)):
            torch.autograd.grad(out.sum(), leaves)

    step(300)
    assert peak_memory(lambda: step(1 << 15)) < 100 << 20

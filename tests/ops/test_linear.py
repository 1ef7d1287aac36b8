"""`linear_attention` against its sum over all pairs in fp64, on every backend; state, decay, chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, EVERY, MAIN, inputs, randn, same_bits

ROUNDINGS = 16  # tokens at least between two roundings of a product of decays


def _pairs(q, k, v, rate, initial, scale):
    """The definition, over all pairs: (out, state) in the dtype of q."""
    H, T = q.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    between, before, after, last = _decay(rate, T)
    between, before, after, last = (x.to(q.dtype) for x in (between, before, after, last))
    out = (q @ k.transpose(-1, -2) * between) @ v + before * (q @ initial)
    return out * scale, last * initial + (k * after).transpose(-1, -2) @ v


def _decay(rate, T):
    s, at = rate.double()[:, None, None], torch.arange(T)
    between = torch.exp(-s * (at[:, None] - at).clamp(min=0)).tril()
    before = torch.exp(-s * (at[:, None] + 1))
    return between, before, torch.exp(-s * (T - 1 - at[:, None])), torch.exp(-s * T)


def _all(dtype, q, k, v, rate, initial, scale, dout, dstate):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, initial)]
    out, state = _pairs(*leaves[:3], rate, leaves[3], scale)
    grads = torch.autograd.grad((out, state), leaves, (dout.to(dtype), dstate.to(dtype)))
    found = (out.detach(), state.detach(), *grads)
    return dict(zip(("out", "state", "dq", "dk", "dv", "dinitial"), found, strict=True))


def _bands(want, q, k, v, rate, initial, scale, dout, dstate):
    """What rounding must cost, in the terms of `tolerance`: results are sums of products of three factors.

    In any order, and through any states, sums of T, D and Dv terms are off by e sqrt(T + D + Dv) |terms|, a
    term by its decay as well, which is a product of at most T / ROUNDINGS powers. Each result is rounded once
    to its dtype, and so may be one factor of a product.
    """
    H, T, D, Dv = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    eps = torch.finfo(q.dtype).eps
    fine = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    group = H // k.shape[1]
    q2, k2, v2, g2, s2, d2 = (
        x.double() ** 2
        for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), dout, initial, dstate)
    )
    between, before, after, last = (x**2 for x in _decay(rate, T))
    c = (eps + fine * ((T + D + Dv) ** 0.5 + T / ROUNDINGS)) ** 2
    f = scale**2
    down = between.transpose(-1, -2)
    kt, vt, qt = (x.transpose(-1, -2) for x in (k2, v2, q2))
    terms = {
        "out": f * ((q2 @ kt * between) @ v2 + before * (q2 @ s2)),
        "state": last * s2 + (k2 * after).transpose(-1, -2) @ v2,
        "dq": f * ((g2 @ vt * between) @ k2 + before * (g2 @ s2.transpose(-1, -2))),
        "dk": f * ((v2 @ g2.transpose(-1, -2) * down) @ q2) + after * (v2 @ d2.transpose(-1, -2)),
        "dv": f * ((k2 @ qt * down) @ g2) + after * (k2 @ d2),
        "dinitial": last * d2 + f * ((q2 * before).transpose(-1, -2) @ g2),
    }
    for name in ("dk", "dv"):
        terms[name] = terms[name].unflatten(1, (-1, group)).sum(2)
    fp32 = ("state", "dinitial")
    return {
        name: (c * x).sqrt() + (fine if name in fp32 else eps) * want[name].abs() for name, x in terms.items()
    }


def _run(q, k, v, rate, initial, scale, dout, dstate, backend):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, initial)]
    out, state = sf.linear_attention(
        *leaves[:3],
        decay_rate=rate,
        scale=scale,
        initial_state=leaves[3],
        return_state=True,
        backend=backend,
    )
    grads = torch.autograd.grad((out, state), leaves, (dout, dstate))
    found = (out.detach(), state.detach(), *grads)
    return dict(zip(("out", "state", "dq", "dk", "dv", "dinitial"), found, strict=True))


def _inputs(generator, T, *, H=4, D=16, Dv=None, **given):
    q, k, v, dout, _ = inputs(generator, T, H=H, D=D, Dv=Dv, **given)
    states = randn(generator, 2, len(q), H, D, v.shape[-1])
    first, dlast = states.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q, k, v, torch.tensor([0.0, 0.03, 0.8, 30.0])[:H], first, D**-0.5, dout, dlast


SHAPES = [(1, 16, 40), (63, 40, 16), (129, 128, 24), (300, 80, 64), (300, 64, 256), (140, 256, 200)]


def hold(backend, generator, T, **shape):
    """Results and gradients, of these shapes, against the sum over pairs."""
    given = _inputs(generator, T, **shape)
    got, want, dtype = _run(*given, backend), _all(torch.float64, *given), given[0].dtype
    tolerance.hold(got, want, _all(dtype, *given), _bands(want, *given), dtype, title=f"{backend} T={T}")


@EVERY
@pytest.mark.parametrize("T, D, Dv", SHAPES)
def test_results_and_gradients_are_those_of_the_sum_over_pairs(backend, dtype, T, D, Dv, generator):
    hold(backend, generator, T, D=D, Dv=Dv, Hkv=1 if T == 63 else 2, dtype=dtype)


def test_the_reference_passes_gradcheck(generator):
    q, k, v, rate, initial, scale, _, _ = _inputs(generator, 70, B=1, H=2, Hkv=1, D=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, initial)]

    def call(q, k, v, initial):
        return sf.linear_attention(
            q, k, v, decay_rate=rate, scale=scale, initial_state=initial, return_state=True
        )

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@EACH
def test_chunks_and_single_tokens_chain_to_the_whole(backend, generator):
    q, k, v, rate, initial, scale, _, _ = _inputs(generator, 150)
    options = {"decay_rate": rate, "scale": scale, "return_state": True, "backend": backend}
    whole, end = sf.linear_attention(q, k, v, initial_state=initial, **options)
    state, parts = initial, []
    for first, last in ((0, 1), (1, 2), (2, 71), (71, 71), (71, 150)):
        piece = (x[:, :, first:last] for x in (q, k, v))
        out, state = sf.linear_attention(*piece, initial_state=state, **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(state, end, atol=2e-5, rtol=1e-5)


@EACH
def test_an_impulse_fades_by_the_powers_of_the_decay(backend):
    T, rate = 200, torch.tensor([0.0, 0.25])
    q = torch.ones(1, 2, T, 1)
    k = torch.zeros(1, 2, T, 1).index_fill_(2, torch.tensor([3]), 1)
    out, state = sf.linear_attention(q, k, k, decay_rate=rate, return_state=True, backend=backend)
    at = torch.arange(T).double()
    want = torch.where(at >= 3, torch.exp(-rate.double()[:, None] * (at - 3)), 0)
    torch.testing.assert_close(out[0, :, :, 0].double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(state[0, :, 0, 0].double(), want[:, -1], rtol=1e-6, atol=0)


@EACH
def test_a_steep_decay_leaves_the_token_itself(backend, generator):
    q, k, v, _, _, scale, dout, _ = _inputs(generator, 129, Hkv=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sf.linear_attention(*leaves, decay_rate=torch.full((4,), 1e30), scale=scale, backend=backend)
    grads = torch.autograd.grad(out, leaves, dout)
    alone = (q * k).sum(-1, keepdim=True) * scale * v
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)
    for got, want in zip(grads, torch.autograd.grad(alone, leaves, dout), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@MAIN
def test_layouts_threads_and_neighbours_leave_the_bits_alone(backend, dtype, generator):
    given = _inputs(generator, 140, D=24, Dv=40, dtype=dtype)
    q, k, v, rate, initial, scale, dout, dstate = given
    once = _run(*given, backend)
    same_bits(once, _run(*given, backend))
    bshd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    wide = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v, dout)]  # lanes two apart
    for a, b, c, d in (bshd, wide):
        same_bits(once, _run(a, b, c, rate, initial, scale, d, dstate, backend))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same_bits(once, _run(*given, backend))
    finally:
        torch.set_num_threads(threads)
    flip = _run(
        *(x.flip(0) for x in (q, k, v)), rate, initial.flip(0), scale, dout.flip(0), dstate.flip(0), backend
    )
    same_bits(once, {n: x.flip(0) for n, x in flip.items()})
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 101:] = randn(generator, *x[:, :, 101:].shape, dtype=dtype)
    other = _run(*later, rate, initial, scale, dout, dstate, backend)
    assert torch.equal(once["out"][:, :, :101], other["out"][:, :, :101])


@MAIN
def test_nan_in_one_head_stays_in_it(backend, dtype, generator):
    given = list(_inputs(generator, 140, dtype=dtype))
    clean = _run(*given, backend)
    for n in (1, 2):
        given[n] = given[n].clone()
        given[n][0, 1, 70] = float("nan")
    spoiled = _run(*given, backend)
    for name, x in spoiled.items():
        own = x.shape[1] // 2
        assert torch.equal(x[:, :own], clean[name][:, :own]) and torch.equal(x[1], clean[name][1]), name
    early = spoiled["out"][0, 2:, :64]  # chunks before it
    assert torch.equal(early, clean["out"][0, 2:, :64]) and spoiled["out"][0, 2:, 70:].isnan().all()


@EACH
@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(backend, B, T, generator):
    given = _inputs(generator, T, B=B)
    got = _run(*given, backend)
    assert torch.equal(got["state"], given[4]) and torch.equal(got["dinitial"], given[7])
    assert all(got[n].shape == x.shape for n, x in zip(("dq", "dk", "dv"), given[:3], strict=True))


@EACH
def test_gradients_flow_from_either_result(backend, generator):
    q, k, v, rate, initial, scale, dout, dstate = _inputs(generator, 70)
    nothing = torch.zeros_like(dout), torch.zeros_like(dstate)
    for name, cotangents in (("out", (dout, nothing[1])), ("state", (nothing[0], dstate))):
        want = _run(q, k, v, rate, initial, scale, *cotangents, backend)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, state = sf.linear_attention(
            *leaves, decay_rate=rate, scale=scale, initial_state=initial, return_state=True, backend=backend
        )
        end = (out, dout) if name == "out" else (state, dstate)
        for n, g in zip(("dq", "dk", "dv"), torch.autograd.grad(end[0], leaves, end[1]), strict=True):
            torch.testing.assert_close(g, want[n], msg=f"{n} of {name}")


@EACH
def test_the_op_is_an_ordinary_pytorch_operator(backend, generator):
    q, k, v, rate, initial, scale, dout, dstate = _inputs(generator, 70, D=8, Dv=24)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    ops = torch.ops.sparseflash
    for state in (initial, None):
        leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, rate, state)]
        leaves[3] = rate
        torch.library.opcheck(ops.linear_attention.default, (*leaves, scale, backend))
        torch.library.opcheck(
            ops.linear_attention_backward.default, (dout, dstate, q, k, v, rate, state, scale, backend)
        )

    def step(q, k, v, initial):
        return sf.linear_attention(
            q * 2, k, v, decay_rate=rate, initial_state=initial, return_state=True, backend=backend
        )

    leaves = [x.requires_grad_() for x in (q, k, v, initial)]
    results = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        ends = call(*leaves)
        results.append([*ends, *torch.autograd.grad(ends, leaves, (dout, dstate))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sf.linear_attention(q, k, v, decay_rate=rate, backend=backend)
    low = [x.detach().to(torch.bfloat16) for x in (q, k, v)]
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, sf.linear_attention(*low, decay_rate=rate, backend=backend))


def _zeros(*shape) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"k": _zeros(2, 2, 9, 16), "v": _zeros(2, 2, 9, 16)}, "8 tokens.* 9: expected as many"),
        ({"k": _zeros(1, 2, 8, 16), "v": _zeros(1, 2, 8, 16)}, "batch size 2.* 1: expected the same"),
        ({"k": _zeros(2, 3, 8, 16), "v": _zeros(2, 3, 8, 16)}, "multiple of Hkv"),
        ({"scale": float("nan")}, "scale=nan: expected a finite number"),
        ({"decay_rate": 0.5}, r"decay_rate: a float; expected floating point \[Hq=4\]"),
        ({"decay_rate": _zeros(3)}, r"expected floating point \[Hq=4\]"),
        ({"decay_rate": torch.tensor([1.0, -0.5, 0, 0])}, "expected finite numbers >= 0"),
        ({"decay_rate": torch.zeros(4, requires_grad=True)}, r"decay_rate.detach\(\)"),
        ({"initial_state": _zeros(2, 2, 16, 16)}, r"initial_state.*\[B=2, Hq=4, D=16, Dv=16\]"),
        ({"return_state": 1}, "expected True or False"),
        ({"backend": "gpu"}, "expected one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_have_their_message(change, said):
    given = {"q": _zeros(2, 4, 8, 16), "k": _zeros(2, 2, 8, 16), "v": _zeros(2, 2, 8, 16)} | change
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.linear_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
def test_the_c_entry_refuses_what_does_not_fit(generator):
    import ctypes

    from sparseflash.backends.cpu.library import native
    from sparseflash.backends.cpu.linear import _call

    q, k, v, rate, *_ = _inputs(generator, 8)
    call = _call(q, k, v, rate, None, 1.0, [])
    library, level = native().library, native().fp32
    enter = library.sf_linear_forward
    assert enter(ctypes.byref(call), level) == 3  # no place for the results
    assert enter(ctypes.byref(call), 99) == 3
    call.size -= 8
    assert enter(ctypes.byref(call), level) == 3

"""The transforms of torch.func: reverse mode and vmap are exact, forward mode is refused."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jvp, vjp, vmap

import sparseflash as sf
from harness import randn
from sparseflash import Plan

B, H, T, D = 2, 4, 70, 16
MASK = torch.rand(2, 1, T, T, generator=torch.Generator().manual_seed(0)) < 0.3
PLANS = (Plan.from_mask(MASK, tile=16), Plan.from_mask(~MASK).prepare())
BIAS, SINK, RATE = torch.linspace(-1, 1, T).view(1, 1, T), torch.arange(4.0), torch.arange(4.0) / 9

OPS = {
    "attention": lambda q, k, v: sf.attention(q, k, v, PLANS, key_bias=BIAS, sink_logits=SINK),
    "lse": lambda q, k, v: sf.attention(q, k, v, causal=True, return_lse=True)[1],
    "pointwise": lambda q, k, v: sf.pointwise_attention(q, k, v, PLANS),
    "stick-breaking": lambda q, k, v: sf.stick_breaking(q, k, v, PLANS[0]),
    "linear": lambda q, k, v: sf.linear_attention(q, k, v, decay_rate=RATE),
    "method": sf.methods.SinkWindow(window=9),
}


@pytest.fixture
def qkv(generator):
    return randn(generator, B, H, T, D), randn(generator, B, 2, T, D), randn(generator, B, 2, T, D)


def _loss(name):
    return lambda *qkv: OPS[name](*qkv).square().sum()


@pytest.mark.parametrize("name", OPS)
def test_grad_and_vmap_in_any_order_give_what_backward_gives_one_by_one(name, qkv):
    q, k, v = qkv
    qs = torch.stack([q, q - 1, 2 * q], 1)  # the axis to map over is the second
    leaves = [[x.clone().requires_grad_() for x in (one, k, v)] for one in qs.unbind(1)]
    want = [torch.autograd.grad(_loss(name)(*x), x, allow_unused=True)[0] for x in leaves]

    outs = vmap(lambda q: OPS[name](q, k, v), in_dims=1)(qs)
    torch.testing.assert_close(outs, torch.stack([OPS[name](*x) for x in leaves]), rtol=0, atol=0)
    torch.testing.assert_close(vjp(_loss(name), q, k, v)[1](torch.tensor(1.0))[0], want[0], rtol=0, atol=0)
    each = vmap(grad(_loss(name)), in_dims=(1, None, None))(qs, k, v)
    torch.testing.assert_close(each, torch.stack(want), rtol=0, atol=0)
    summed = grad(lambda qs: vmap(lambda q: _loss(name)(q, k, v), in_dims=1)(qs).sum())(qs)
    torch.testing.assert_close(summed, torch.stack(want, 1), rtol=0, atol=0)


def test_what_is_mapped_over_may_be_a_sink_alone(qkv):
    sinks = torch.stack([SINK, -SINK])
    per_sink = grad(lambda sink: sf.attention(*qkv, sink_logits=sink).square().sum())
    torch.testing.assert_close(vmap(per_sink)(sinks), torch.stack([per_sink(x) for x in sinks]))


@pytest.mark.parametrize("name", [*OPS, "decode"])
def test_forward_mode_is_refused_where_it_would_lose_its_tangents(name, qkv):
    q, k, v = qkv
    op = OPS.get(name, sf.decode)
    with pytest.raises(sf.SparseFlashError, match="tangent.*reverse mode"):
        jvp(lambda q: op(q, k, v), (q,), (q,))
    with forward_ad.dual_level():
        torch.testing.assert_close(op(q, k, v), op(q, k, v))  # no tangent, no objection
        with pytest.raises(sf.SparseFlashError, match="tangent.*reverse mode"):
            op(forward_ad.make_dual(q, q), k, v)


def test_compiled_code_loses_no_tangents_either(qkv):
    q, k, v = qkv
    push = torch.compile(lambda q: jvp(lambda x: sf.attention(x, k, v), (q,), (q,))[1], backend="eager")
    with pytest.raises(sf.SparseFlashError, match="tangent.*reverse mode"):
        push(q)


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_refused(name, qkv):
    first = grad(lambda q: grad(_loss(name))(q, *qkv[1:]).sum())
    with pytest.raises(sf.SparseFlashError, match="reverse mode, once"):
        first(qkv[0])

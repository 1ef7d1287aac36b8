"""`skip_below`: what is skipped, against a walk over blocks in fp64; and what it can cost at most."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, inputs, randn
from sparseflash import Plan, SparseFlashError
from sparseflash.backends.numerics import Softmax
from sparseflash.plan.flat import flatten_all

SAME = [name for name in BACKENDS if name != "triton"]
"""Backends that cut keys into the same blocks."""


def planted(generator, T, dtype=torch.float32, **size):
    """Inputs whose first keys and neighbours have large logits: much between them is small."""
    q, k, v, _, _ = inputs(generator, T, dtype=dtype, **size)
    q[..., 0], k[..., 0] = 8, -4
    k[:, :, :3, 0] = 6
    return q, k, v


def walk(q, k, plan, below):
    """The mask of spans without what is skipped, and the counts, in fp64: 64 rows by cells of 64."""
    mask = plan.to_dense()
    s = q.double() @ tolerance._spread(k, q.shape[1]).double().transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s.masked_fill(~mask, -math.inf)
    left, counts = mask.expand_as(s).clone(), torch.zeros(*q.shape[:2], 2, dtype=torch.int64)
    for b, h, i in itertools.product(range(q.shape[0]), range(q.shape[1]), range(0, q.shape[2], 64)):
        level = torch.full((len(s[b, h, i : i + 64]),), -math.inf, dtype=torch.float64)
        start, count = (int(x[0, 0, i // plan.tile]) for x in (plan.span_start, plan.span_count))
        for low, high in plan.spans[start : start + count].tolist():
            while low < high:
                end = min(low // 64 * 64 + 64, high)
                top = s[b, h, i : i + 64, low:end].amax(-1)
                level = torch.maximum(level, top)
                if top.max() > -math.inf:
                    counts[b, h, 0] += 1
                    if not ((top > -math.inf) & (top >= level - below)).any():
                        counts[b, h, 1] += 1
                        left[b, h, i : i + 64, low:end] = False
                low = end
    return left, counts


@pytest.mark.parametrize("backend", SAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [64, 128])
def test_what_is_skipped_is_what_the_definition_says(backend, dtype, tile, generator):
    q, k, v = planted(generator, 257, dtype, B=1, D=24)
    plan = Plan.dense(257, 257, causal=True, window=(200, 0), sink_tokens=3, tile=tile)
    for below in (0.0, 3.0, 9.0):
        given = {"return_lse": True, "return_skipped": True, "backend": backend}
        out, lse, skipped = sf.attention(q, k, v, plan, skip_below=below, **given)
        left, counts = walk(q, k, plan, below)
        assert torch.equal(skipped, counts), below
        tolerance.compare({"out": out, "lse": lse}, q, k, v, left, note=f"below {below}")
        assert below > 5 or int(skipped[..., 1].sum()) > 0.2 * int(skipped[..., 0].sum())


@EACH
def test_no_more_is_lost_than_the_threshold_allows_and_a_large_one_loses_nothing(backend, generator):
    q, k, v = planted(generator, 150, B=1, D=16)
    index = torch.rand(1, 1, 75, 150, generator=generator).argsort(-1)[..., :40].sort().values
    few = Plan.from_keys(index, Tq=150, Tk=150, tile=2)
    keep = torch.rand(1, 4, 5, 10, generator=generator) < 0.5
    mask = torch.rand(1, 1, 150, 150, generator=generator) < 0.4
    mask[..., :3] = True
    for plan in (
        Plan.dense(150, 150, causal=True, tile=32),
        Plan.from_blocks(keep, Tq=150, Tk=150, tile=32, unit=16, causal=True),
        Plan.from_mask(mask, tile=32, unit=16),
        few,
    )[: 2 if backend == "triton" else 4]:  # whose interpreter takes its time
        whole, lse = sf.attention(q, k, v, plan, return_lse=True, backend=backend)
        for below in (2.0, 1e6):
            given = {"skip_below": below, "return_lse": True, "return_skipped": True, "backend": backend}
            out, part, skipped = sf.attention(q, k, v, plan, **given)
            lost = 150 * math.exp(-below)  # of at most so many keys, beside the row's largest weight
            assert bool(((lse - part).nan_to_num() <= math.log1p(lost) + 1e-4).all())
            assert bool(((lse - part).nan_to_num() >= -1e-4).all())
            assert bool((out - whole).abs().max() <= 2 * lost * v.abs().max() + 1e-5)
            if below > 1e3:
                assert torch.equal(out, whole) and torch.equal(part, lse) and not skipped[..., 1].any()
            else:
                assert int(skipped[..., 1].sum()) > 0 or plan is few  # whose lists are one block


@pytest.mark.parametrize("backend", SAME)
def test_counts_do_not_depend_on_threads_and_all_backends_agree(backend, generator):
    q, k, v = planted(generator, 500)
    bias, sinks = randn(generator, 1, 2, 500), randn(generator, 4)
    near = Plan.dense(500, 500, causal=True, window=(99, 0))
    far = Plan.dense(500, 500, causal=True) - near
    given = {
        "skip_below": 1.0,
        "key_bias": bias,
        "sink_logits": sinks,
        "softcap": 20.0,
        "return_skipped": True,
    }
    want = sf.attention(q, k, v, (near, far), **given, backend="reference")
    torch.set_num_threads(3)
    out, skipped = sf.attention(q, k, v, (near, far), **given, backend=backend)
    torch.set_num_threads(1)
    assert torch.equal(skipped, want[1]) and int(skipped[..., 1].sum()) > 0
    torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", SAME)
def test_the_op_keeps_the_rules_of_torch_library(backend, generator):
    q, k, v = planted(generator, 65)
    tensors, ints = flatten_all((Plan.dense(65, 65, causal=True),))
    arguments = (q, k, v, None, None, None, None, tensors, ints, *Softmax(0.2, 0.0, backend, skip=1.0))
    torch.library.opcheck(torch.ops.sparseflash.attention_skipping.default, arguments)
    given = {
        "skip_below": 1.0,
        "return_skipped": True,
        "return_lse": True,
        "causal": True,
        "backend": backend,
    }
    compiled = torch.compile(lambda *x: sf.attention(*x, **given), backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(q, k, v), sf.attention(q, k, v, **given)):
        assert torch.equal(x, y)


Q = torch.zeros(1, 1, 4, 8)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: sf.attention(Q, Q, Q, skip_below=-1), "from 0 on"),
        (lambda: sf.attention(Q, Q, Q, skip_below="x"), "'x'"),
        (lambda: sf.attention(Q.clone().requires_grad_(), Q, Q, skip_below=1), "no gradients"),
        (lambda: sf.attention(Q, Q, Q, skip_below=1, dropout_p=0.5), "dropout_p"),
        (lambda: sf.attention(Q, Q, Q, skip_below=1, return_block_max=(4, 4)), "return_block_max"),
        (lambda: sf.attention(Q, Q, Q, return_skipped=True), "without skip_below"),
    ],
)
def test_what_skipping_stands_against_is_refused(call, said):
    with pytest.raises(SparseFlashError, match=said):
        call()

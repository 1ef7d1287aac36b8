"""`attention_stats` against sums and maxima of a dense P, on every backend and kind of plan; streamed."""

from __future__ import annotations

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import EACH, inputs, peak_memory, randn
from sparseflash import Plan
from sparseflash.numerics import norm_of
from sparseflash.plan.flat import flatten

OVER = ("key", "row", "entry", "diagonal")


def _dense(q, k, lse, mask, *, key_bias=None, scale=None, softcap=None):
    """P = exp(S - lse) in fp64, [B,H,Tq,Tk]."""
    B, H, _, D = q.shape
    s = (
        q.double()
        @ tolerance._spread(k, H).double().transpose(-1, -2)
        * (D**-0.5 if scale is None else scale)
    )
    s = torch.tanh(s / softcap) * softcap if softcap else s
    if key_bias is not None:
        s = s + tolerance._spread(key_bias, H).double()[:, :, None]
    keep = tolerance._spread(mask, H).expand(B, -1, -1, -1) & (lse > -torch.inf)[..., None]
    return torch.where(keep, torch.exp(s - lse.double()[..., None]), 0)


def _entries(plan, p, b, h, peak):
    """Sum or maximum over each entry, by walking the lists: [tiles, n]."""
    own_batch, own_heads = plan.extent()
    heads = p.shape[1]
    listed = (b if own_batch > 1 else 0, h * own_heads // heads)
    q = plans.tokens(plan.q_order, plan.Tq, *listed, own_heads)
    k = plans.tokens(plan.k_order, plan.Tk, *listed, own_heads)
    most = sum(int(n.max()) if n is not None and n.numel() else 0 for n in (plan.span_count, plan.count))
    found = torch.zeros(plan.tiles, most, dtype=torch.float64)
    for r in range(plan.tiles):
        ranges = []
        for pre, pool in (("span_", plan.spans), ("", plan.index)):
            if pool is None:
                continue
            start, count = (
                int(plans._of(getattr(plan, pre + n), *listed, own_heads)[r]) for n in ("start", "count")
            )
            some = pool[start : start + count].tolist()
            ranges += some if pre else [(u * plan.unit, (u + 1) * plan.unit) for u in some]
        rows = [t for t in q[r * plan.tile : (r + 1) * plan.tile] if t >= 0]
        for n, (lo, hi) in enumerate(ranges):
            keys = [t for t in k[lo:hi] if t >= 0]
            part = p[b, h][rows][:, keys]
            if part.numel():
                found[r, n] = part.max() if peak else part.sum()
    return found


def hold(backend, kind, seed, lengths, keys, over=OVER, **size):
    """All statistics of one random plan of a kind against those of the dense weights."""
    d = plans._Draw(seed)
    example = plans.example(seed, kind, batch=2, heads=4, Tq=d.pick(lengths), Tk=d.pick(keys), **size)
    plan, Tq, Tk = example.plan, example.plan.Tq, example.plan.Tk
    q, k, v, _, _ = inputs(d.torch, Tq, Tk)
    k = k[:1] if example.pool else k
    options = d.pick(({}, {"scale": 0.3, "softcap": 2.0}, {"key_bias": randn(d.torch, 1, 2, Tk)}))
    _, lse = sf.attention(q, k, k, plan, return_lse=True, backend="reference", **options)
    lse = lse + d.pick((0.0, 1.0))  # that of a denser plan is larger
    p = _dense(q, k, lse, example.mask, **options)
    at = torch.arange(Tq)[:, None] - torch.arange(Tk) + Tk - 1
    for what in over:
        for reduce in ("sum", "max"):
            got = sf.attention_stats(q, k, lse, plan, over=what, reduce=reduce, backend=backend, **options)
            if what == "key":
                want = p.sum(-2) if reduce == "sum" else p.amax(-2)
            elif what == "row":
                want = p.sum(-1) if reduce == "sum" else p.amax(-1)
            elif what == "diagonal":
                want = torch.zeros(2, 4, Tq + Tk - 1, dtype=torch.float64)
                flat = at.flatten().expand(2, 4, -1)
                want.scatter_reduce_(-1, flat, p.flatten(-2), "sum" if reduce == "sum" else "amax")
            else:
                each = [_entries(plan, p, b, h, reduce == "max") for b in range(2) for h in range(4)]
                want = torch.stack(each).view(2, 4, *each[0].shape)
            assert got.dtype == torch.float32 and got.shape == want.shape, example.line
            note = f"{what} {reduce}: {example.line}"
            error = (got.double() - want).abs()
            assert bool((error <= 2e-5 * (1 + want)).all()), f"{note}: off by {float(error.max()):.3g}"


@EACH
@pytest.mark.parametrize("kind", plans.KINDS)
def test_statistics_are_those_of_the_dense_weights(backend, kind, seed):
    for n in range(2):
        hold(backend, kind, seed + n, (1, 33, 65), (1, 33, 100))


@EACH
@pytest.mark.parametrize("tile, unit", [(1, 1), (3, 8), (8, 1)])
def test_lists_of_few_queries_have_the_same_statistics(backend, tile, unit, seed):
    """Single keys, runs of neighbours and spans, in orders and with rules; several queries a list or one."""
    for n in range(2):
        hold(backend, "lists", seed + n, (1, 33), (17, 150), tile=tile, unit=unit)


@EACH
def test_half_precision_inputs_give_fp32_statistics(backend, generator):
    q, k, v, _, _ = inputs(generator, 65, dtype=torch.bfloat16)
    plan = Plan.dense(65, 65, causal=True)
    _, lse = sf.attention(q, k, v, plan, return_lse=True, backend=backend)
    mass = sf.attention_stats(q, k, lse, plan, over="row", backend=backend)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass, torch.ones(2, 4, 65), atol=2e-3, rtol=0)


@EACH
def test_a_row_without_mass_counts_nothing(backend, generator):
    q, k, _, _, _ = inputs(generator, 8)
    lse = torch.full((2, 4, 8), -torch.inf)
    for over in OVER:
        assert not sf.attention_stats(q, k, lse, Plan.dense(8, 8), over=over, backend=backend).any()


@EACH
@pytest.mark.parametrize("over", OVER)
def test_the_op_keeps_the_rules_of_torch_library(backend, over, generator):
    q, k, v, _, _ = inputs(generator, 33)
    plan = Plan.dense(33, 33, causal=True, tile=16)
    _, lse = sf.attention(q, k, v, plan, return_lse=True)
    width = {"key": 33, "row": 33, "entry": 3 * 2, "diagonal": 65}[over]
    tensors, ints = flatten(plan)
    torch.library.opcheck(
        torch.ops.sparseflash.attention_stats.default,
        (
            q,
            k,
            norm_of(lse, None, 0.2, lse.dtype),
            None,
            tensors,
            ints,
            over,
            False,
            0.2,
            0.0,
            width,
            backend,
        ),
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"over": "keys"}, "expected key, row, entry or diagonal"),
        ({"reduce": "mean"}, "expected sum or max"),
        ({"plan": (Plan.dense(8, 8),)}, "expected one Plan"),
        ({"lse": torch.zeros(1, 4, 8)}, "lse"),
        ({"lse": None}, "lse"),
        ({"plan": Plan.dense(9, 8)}, "9"),
    ],
    ids=str,
)
def test_bad_arguments_have_their_message(change, said, generator):
    q, k, _, _, _ = inputs(generator, 8)
    given = {"plan": Plan.dense(8, 8), "lse": torch.zeros(2, 4, 8)} | change
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.attention_stats(q, k, given.pop("lse"), given.pop("plan"), **given)


@EACH
def test_64_probe_rows_by_a_million_keys_never_materialise(backend):
    """64 x 2^20 weights take 256 MB in fp32; what streams them takes a few vectors over the keys."""
    T = 1 << 20
    q, k, lse = torch.randn(1, 1, 64, 16), torch.randn(1, 1, T, 16), torch.full((1, 1, 64), 14.0)
    first, last = (Plan.dense(64, n, causal=True, q_offset=n - 64) for n in (64, T))
    sf.attention_stats(q, k[:, :, :64], lse, first, over="diagonal", backend=backend)
    extra = peak_memory(lambda: sf.attention_stats(q, k, lse, last, over="diagonal", backend=backend))
    assert extra < 128 << 20


@EACH
@pytest.mark.parametrize("over", OVER)
def test_no_queries_or_no_keys_leave_nothing_or_zeros(backend, over, generator):
    for Tq, Tk in ((0, 0), (0, 5), (5, 0)):
        q, k = randn(generator, 1, 2, Tq, 8), randn(generator, 1, 2, Tk, 8)
        found = sf.attention_stats(
            q, k, torch.zeros(1, 2, Tq), Plan.dense(Tq, Tk), over=over, backend=backend
        )
        assert not found.any() and found.shape[:2] == (1, 2)


@EACH
def test_autocast_leaves_statistics_as_exact_as_without(backend, generator):
    q, k, v, _, _ = inputs(generator, 65)
    plan = Plan.dense(q.shape[2], k.shape[2], causal=True)
    _, lse = sf.attention(q, k, v, plan, return_lse=True, backend=backend)
    want = sf.attention_stats(q, k, lse, plan, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sf.attention_stats(q, k, lse, plan, backend=backend), want)

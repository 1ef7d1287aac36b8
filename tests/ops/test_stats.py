"""`attention_stats` against sums and maxima of a dense P, on every backend and kind of plan; streamed."""

from __future__ import annotations

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, inputs, peak_memory, randn, run, same_bits
from sparseflash import Plan
from sparseflash.backends.numerics import Statistics, norm_of
from sparseflash.plan.flat import flatten

OVER = ("key", "row", "entry", "diagonal", "block")


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


def _slopes(p, v, dout):
    """dP and delta, in fp64."""
    dp = dout.double() @ tolerance._spread(v, p.shape[1]).double().transpose(-1, -2)
    return dp, (p * dp).sum(-1)


def _block(over):
    return {"block": (2, 3)} if over == "block" else {}


def _influence(p, dp, delta):
    """The influence of each pair, in fp64, and what an error of 2e-5 in each of its factors does to it."""
    rest, level = 1 - p, delta[..., None]
    alone = rest < 2**-16
    rest = torch.where(alone, 1, rest)
    slack = torch.where(alone, (p * dp).abs(), p * (level.abs() + dp.abs()) / rest**2)
    return torch.where(alone, p * dp, p * (level - dp) / rest).abs(), 2e-5 * slack


def _over_blocks(p, tile, unit, peak):
    """Sums or maxima over blocks, cut off at the ends."""
    down, across = -(-p.shape[-2] // tile), -(-p.shape[-1] // unit)
    whole = p.new_zeros(*p.shape[:2], down * tile, across * unit)
    whole[..., : p.shape[-2], : p.shape[-1]] = p
    whole = whole.unflatten(-1, (across, unit)).unflatten(2, (down, tile))
    return whole.amax((-1, -3)) if peak else whole.sum((-1, -3))


def hold(backend, kind, seed, lengths, keys, over=OVER, moved=False, block=None, **size):
    """All statistics of one random plan of a kind against those of the dense weights; `moved`: influences."""
    d = plans._Draw(seed)
    example = plans.example(seed, kind, batch=2, heads=4, Tq=d.pick(lengths), Tk=d.pick(keys), **size)
    plan, Tq, Tk = example.plan, example.plan.Tq, example.plan.Tk
    q, k, v, dout, _ = inputs(d.torch, Tq, Tk, Dv=24)
    k, v = (k[:1], v[:1]) if example.pool else (k, v)
    block = block or d.pick(((16, 16), (64, 7), (5, 32), (100, 200), (1, 1)))
    options = d.pick(({}, {"scale": 0.3, "softcap": 2.0}, {"key_bias": randn(d.torch, 1, 2, Tk)}))
    _, lse = sf.attention(q, k, k, plan, return_lse=True, backend="reference", **options)
    lse = lse + d.pick((0.0, 1.0))  # that of a denser plan is larger
    p = _dense(q, k, lse, example.mask, **options)
    slopes, slack = {}, torch.zeros_like(p)
    if moved:
        dp, delta = _slopes(p, v, dout)
        slopes = {"v": v, "dout": dout, "delta": delta.float()}
        p, slack = _influence(p, dp, delta)
    at = torch.arange(Tq)[:, None] - torch.arange(Tk) + Tk - 1
    for what in over:
        for reduce in ("sum", "max"):
            given = {**options, **slopes, "backend": backend, **({"block": block} if what == "block" else {})}
            got = sf.attention_stats(q, k, lse, plan, over=what, reduce=reduce, **given)
            if what == "key":
                want = p.sum(-2) if reduce == "sum" else p.amax(-2)
            elif what == "row":
                want = p.sum(-1) if reduce == "sum" else p.amax(-1)
            elif what == "diagonal":
                want = torch.zeros(2, 4, Tq + Tk - 1, dtype=torch.float64)
                flat = at.flatten().expand(2, 4, -1)
                want.scatter_reduce_(-1, flat, p.flatten(-2), "sum" if reduce == "sum" else "amax")
            elif what == "block":
                want = _over_blocks(p, *block, reduce == "max")
            else:
                each = [_entries(plan, p, b, h, reduce == "max") for b in range(2) for h in range(4)]
                want = torch.stack(each).view(2, 4, *each[0].shape)
            assert got.dtype == torch.float32 and got.shape == want.shape, example.line
            note = f"{what} {reduce}: {example.line}"
            error = (got.double() - want).abs()
            allowed = 2e-5 * (1 + want) + slack.sum((-1, -2))[..., *(None,) * (want.dim() - 2)]
            assert bool((error <= allowed).all()), f"{note}: off by {float(error.max()):.3g}"


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


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("kind", plans.KINDS)
def test_influences_are_those_of_the_dense_weights(backend, kind, seed):
    hold(backend, kind, seed, (1, 33), (1, 65), ("key", "block"), moved=True)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_lists_of_few_queries_have_the_same_influences(backend, seed):
    hold(backend, "lists", seed, (1, 33), (17, 150), moved=True, tile=3, unit=8)


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
        assert not sf.attention_stats(
            q, k, lse, Plan.dense(8, 8), over=over, backend=backend, **_block(over)
        ).any()


@EACH
@pytest.mark.parametrize("over", OVER)
def test_the_op_keeps_the_rules_of_torch_library(backend, over, generator):
    q, k, v, _, _ = inputs(generator, 33)
    plan = Plan.dense(33, 33, causal=True, tile=16)
    _, lse = sf.attention(q, k, v, plan, return_lse=True)
    width = {"key": 33, "row": 33, "entry": 3 * 2, "diagonal": 65, "block": 7 * 5}[over]
    tensors, ints = flatten(plan)
    torch.library.opcheck(
        torch.ops.sparseflash.attention_stats.default,
        (
            q,
            k,
            norm_of(lse, None, 0.2, lse.dtype),
            None,
            *((None,) * 3 if over == "key" else (v, v.new_zeros(2, 4, 33, 32), lse)),
            tensors,
            ints,
            *Statistics(over, False, 0.2, 0.0, width, backend, 5, 7),
        ),
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"over": "keys"}, "expected key, row, entry, diagonal or block"),
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
            q, k, torch.zeros(1, 2, Tq), Plan.dense(Tq, Tk), over=over, backend=backend, **_block(over)
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


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_influence_is_what_taking_the_pair_away_moves(backend, dtype, generator):
    """Of each pair alone: attention without it is computed, in fp64."""
    q, k, v, dout, _ = inputs(generator, 9, 13, B=1, D=16, dtype=dtype)
    plan = Plan.dense(9, 13, causal=True, q_offset=1)  # the first query has two keys
    mask = plan.to_dense()
    out, lse = sf.attention(q, k, v, plan, return_lse=True, out_dtype=torch.float32, backend="reference")
    got = sf.attention_stats(
        q,
        k,
        lse,
        plan,
        over="block",
        block=(1, 1),
        v=v,
        dout=dout,
        delta=(dout * out).sum(-1),
        backend=backend,
    )
    whole, want = tolerance.exact(q, k, v, mask)["out"], torch.zeros(1, 4, 9, 13, dtype=torch.float64)
    for i, j in mask[0, 0].nonzero().tolist():
        without = mask.clone()
        without[..., i, j] = False
        moved = tolerance.exact(q, k, v, without)["out"][:, :, i] - whole[:, :, i]
        want[:, :, i, j] = (moved * dout[:, :, i].double()).sum(-1).abs()
    assert not got[~mask.expand_as(got)].any()
    p = _dense(q, k, lse, mask)
    dp, delta = _slopes(p, v, dout)
    share = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype == torch.bfloat16 else 1
    assert bool(((got.double() - want).abs() <= 1e-6 + min(share, 50) * _influence(p, dp, delta)[1]).all())


@EACH
@pytest.mark.parametrize("kind", plans.KINDS)
def test_block_maxima_of_a_forward_are_those_of_the_dense_weights(backend, kind, seed):
    for n, dtype in enumerate((torch.float32, torch.float16)):
        d = plans._Draw(seed + n)
        example = plans.example(
            seed + n, kind, batch=2, heads=4, Tq=d.pick((1, 33, 129)), Tk=d.pick((1, 33, 150))
        )
        plan, mask = example.plan, example.mask
        q, k, v, dout, dlse = inputs(d.torch, plan.Tq, plan.Tk, dtype=dtype)
        k, v = (k[:1], v[:1]) if example.pool else (k, v)
        options = d.pick(
            (
                {},
                {"scale": -0.3, "softcap": 2.0, "key_bias": randn(d.torch, 1, 2, plan.Tk)},
                {"sink_logits": randn(d.torch, 4)},
            )
        )
        block = d.pick(((64, 64), (16, 7), (5, 32), (300, 200), (1, 1)))
        given = {"return_block_max": block, "return_lse": True, "backend": backend}
        out, lse, peaks = sf.attention(q, k, v, plan, **given, **options)
        again = sf.attention(q, k, v, plan, return_lse=True, backend=backend, **options)
        same_bits({"out": out, "lse": lse}, {"out": again[0], "lse": again[1]})
        exact = tolerance.exact(q, k, v, mask, **options)["lse"]
        numbers = {name: x for name, x in options.items() if name != "sink_logits"}
        want = _over_blocks(_dense(q, k, exact, mask, **numbers), *block, True)
        assert peaks.dtype == torch.float32 and peaks.shape == want.shape, example.line
        torch.testing.assert_close(
            peaks.double(), want, rtol=5e-5, atol=1e-7, msg=lambda m, line=example.line: f"{m}\n{line}"
        )


@EACH
def test_block_maxima_of_several_plans_are_of_one_softmax_and_gradients_stay(backend, generator):
    q, k, v, dout, dlse = inputs(generator, 65)
    near = Plan.dense(65, 65, causal=True, window=(9, 0))
    parts = (near, Plan.dense(65, 65, causal=True) - near)
    whole = Plan.dense(65, 65, causal=True)
    want = sf.attention(q, k, v, whole, return_block_max=(16, 8), backend=backend)[1]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for plan in (whole, parts):
        out, lse, peaks = sf.attention(
            *leaves, plan, return_lse=True, return_block_max=(16, 8), backend=backend
        )
        torch.testing.assert_close(peaks, want, rtol=1e-5, atol=1e-7)
        assert not peaks.requires_grad
        got = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        again = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
        same_bits(dict(zip(("dq", "dk", "dv"), got)), again, "dq dk dv")


def test_block_maxima_are_the_same_bits_for_any_number_of_threads(generator):
    q, k, v, _, _ = inputs(generator, 700, D=16)
    plan = Plan.from_buckets(
        *(torch.randint(0, 5, (2, 4, 700), generator=generator) for _ in "qk"), causal=True
    )
    found = []
    for n in (1, 4):
        torch.set_num_threads(n)
        found.append(sf.attention(q, k, v, plan, return_block_max=(96, 32), backend="cpu")[1])
    torch.set_num_threads(1)
    assert torch.equal(*found) and found[0].any()


def test_compiled_code_has_block_maxima(generator):
    q, k, v, dout, _ = inputs(generator, 65)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        out, peaks = sf.attention(q, k, v, causal=True, return_block_max=(16, 16))
        return (out * dout).sum() * (1 + 0 * peaks.sum()), peaks

    (loss, peaks), (loss_again, peaks_again) = (
        f(*leaves) for f in (call, torch.compile(call, backend="aot_eager", fullgraph=True))
    )
    assert torch.equal(peaks, peaks_again)
    for x, y in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(loss_again, leaves)):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda q, lse, plan: sf.attention(q, q, q, return_block_max=64), "expected \\(tile, unit\\)"),
        (lambda q, lse, plan: sf.attention(q, q, q, return_block_max=(0, 64)), "from 1 on"),
        (lambda q, lse, plan: sf.attention_stats(q, q, lse, plan, over="block"), "block=None"),
        (lambda q, lse, plan: sf.attention_stats(q, q, lse, plan, block=(1, 1)), "over='key'"),
        (lambda q, lse, plan: sf.attention_stats(q, q, lse, plan, dout=q), "no v and no delta"),
        (lambda q, lse, plan: sf.attention_stats(q, q, lse, plan, dout=q, v=q, delta=q), "delta: \\[1"),
    ],
)
def test_what_does_not_fit_a_block_or_an_influence_is_refused(call, said, generator):
    q = randn(generator, 1, 2, 5, 8)
    with pytest.raises(sf.SparseFlashError, match=said):
        call(q, torch.zeros(1, 2, 5), Plan.dense(5, 5))

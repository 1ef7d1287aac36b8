"""Estimators and lists of the best against plain oracles that form every score, on every backend."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

import sparseflash as sf
from harness import unseen, watched
from sparseflash.backends import cpu, numerics, reference
from sparseflash.common.errors import SparseFlashError
from sparseflash.selection import Grid, above, probe, running_kth, share, tile_mass, top_indices, top_k, top_p
from test_selection import OFFSETS, blocks, keep_of, oracle_order, pairs, scores

BACKENDS = ["reference", *(["cpu"] if cpu.status()[0] else [])]
FAR = 1 << 40
HOWS = ("mean", "antidiagonal", "energy", "exact")
# Tq, Tk, q_offset, padded, heads of q and of k
SHAPES = (
    (1, 1, 0, False, 2, 1),
    (64, 64, 0, False, 4, 2),
    (150, 150, 0, False, 3, 1),
    (40, 552, 512, False, 4, 2),
    (50, 550, 500, False, 2, 2),
    (90, 97, OFFSETS[3], True, 4, 2),
    (1, 97, 96, True, 4, 2),
    (0, 33, 0, False, 2, 1),
    (33, 0, 0, False, 2, 1),
    (70, 200, -20, False, 2, 1),
)


def tensors(generator, shape, dtype=torch.float32, D=24):
    """q, k and the padding; what is padding holds NaN."""
    Tq, Tk, _, padded, Hq, Hkv = shape
    q, k = (2 * torch.randn(2, h, T, D, generator=generator) for h, T in ((Hq, Tq), (Hkv, Tk)))
    keep = {"q_keep": keep_of(generator, 2, Tq), "k_keep": keep_of(generator, 2, Tk)} if padded else {}
    if padded:
        q = q.masked_fill(~keep["q_keep"][:, None, :, None], torch.nan)
        k = k.masked_fill(~keep["k_keep"][:, None, :, None], torch.nan)
    return q.to(dtype), k.to(dtype), keep


def logits(q, k, scale, softcap):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if q.shape[1] else k
    x = q.double().nan_to_num() @ k.double().nan_to_num().mT * scale
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def softmax(x, seen):
    x = x.masked_fill(~seen, -torch.inf)
    some = seen.any(-1, keepdim=True)
    return torch.softmax(torch.where(some, x, 0), -1).masked_fill(~some, 0) if x.shape[-1] else x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_probe_is_the_softmax_of_the_last_rows(generator, shape, causal, backend):
    Tq, Tk, offset, _, Hq, _ = shape
    q, k, keep = tensors(generator, shape)
    grid = Grid(Tq, Tk, q_offset=offset, causal=causal, **keep)
    for rows, softcap in ((1, None), (20, 3.0), (64, None)):
        got = probe(q, k, rows, causal=causal, q_offset=offset, softcap=softcap, backend=backend, **keep)
        real = keep.get("q_keep", torch.ones(2, Tq, dtype=torch.bool))
        last = real & (real.flip(-1).cumsum(-1).flip(-1) <= rows)
        p = softmax(logits(q, k, q.shape[-1] ** -0.5, softcap), pairs(grid, 2)[:, None])
        p = p * last[:, None, :, None]
        torch.testing.assert_close(got.keys().double(), p.sum(2), atol=2e-5, rtol=1e-4)
        units = torch.nn.functional.pad(p.sum(2), (0, -Tk % 16)).view(2, Hq, -1, 16).sum(-1)
        torch.testing.assert_close(got.units(16).double(), units, atol=2e-5, rtol=1e-4)
        at = torch.arange(Tq) + torch.as_tensor(offset).view(-1, 1)
        place = (at[:, :, None] - torch.arange(Tk) + got.before).expand(2, -1, -1)
        want = torch.zeros(2, Hq, got.distances().shape[-1] + 1, dtype=torch.float64)
        inside = (place >= 0) & (place < want.shape[-1] - 1)
        assert isinstance(offset, torch.Tensor) or not (p * ~inside[:, None]).any()
        place = torch.where(inside, place, want.shape[-1] - 1)
        want.scatter_add_(-1, place[:, None].expand(p.shape).flatten(2), p.flatten(2))
        torch.testing.assert_close(got.distances().double(), want[..., :-1], atol=2e-5, rtol=1e-4)
        for b in range(2):
            named = got.rows.expand(2, -1)[b]
            assert named[named >= 0].tolist() == last[b].nonzero().flatten().tolist()


def grouped(x, keep, size, backwards):
    """Groups of tokens [B,H,n,size,D], short ones filled up with the nearest real token; is there any?"""
    B, H, T, D = x.shape
    n = -(-T // size)
    found, there = torch.zeros(B, H, n, size, D, dtype=torch.float64), torch.zeros(B, n, dtype=torch.bool)
    for b, g in itertools.product(range(B), range(n)):
        own = [t for t in range(g * size, min(T, (g + 1) * size)) if keep is None or keep[b, t]]
        for i in range(size if own else 0):
            before = [t for t in own if t <= g * size + i]
            found[b, :, g, i] = x[b, :, before[-1] if before else own[0]]
        there[b, g] = bool(own)
    return (found.flip(3) if backwards else found), there


def oracle(q, k, grid, how, stride, softcap, peak):
    """Every weight, then by tile and unit."""
    B, H, scale = 2, q.shape[1], q.shape[-1] ** -0.5
    seen = pairs(grid, B)
    at = (torch.arange(grid.Tq) + torch.as_tensor(grid.q_offset).view(-1, 1)).expand(B, -1)
    q_keep = torch.ones(B, grid.Tq, dtype=torch.bool) if grid.q_keep is None else grid.q_keep
    k_keep = torch.ones(B, grid.Tk, dtype=torch.bool) if grid.k_keep is None else grid.k_keep

    def sight(group, block):
        """A block is in sight of a group whose last query its first key is not ahead of."""
        ends = torch.where(q_keep, at, -FAR)
        starts = torch.where(k_keep, torch.arange(grid.Tk), FAR)
        ends = torch.nn.functional.pad(ends, (0, -grid.Tq % group), value=-FAR).view(B, -1, group).amax(-1)
        starts = torch.nn.functional.pad(starts, (0, -grid.Tk % block), value=FAR).view(B, -1, block).amin(-1)
        found = (ends[:, :, None] > -FAR) & (starts[:, None] < FAR)
        return (found & (starts[:, None] <= ends[:, :, None]) if grid.causal else found)[:, None]

    def mean(x, keep, size):
        return sf.selection.pooled(x.double(), size, keep=keep)

    group = block = 1
    if how == "mean":
        group, block = grid.tile, grid.unit
        x = logits(mean(q, q_keep, group), mean(k, k_keep, block), scale, softcap)
        p = softmax(x, sight(group, block))
    elif how == "antidiagonal":
        group = block = stride
        rows, cols = grouped(q, q_keep, stride, False)[0], grouped(k, k_keep, stride, True)[0]
        x = logits(rows.flatten(3), cols.flatten(3), scale / stride, softcap)
        p = softmax(x, sight(stride, stride))
    elif how == "energy":
        block = stride
        near = sight(1, stride)
        x = logits(q, mean(k, k_keep, stride), scale, softcap).masked_fill(~near, -torch.inf)
        tall = torch.nn.functional.pad(x, (0, 0, 0, -grid.Tq % grid.tile), value=-torch.inf)
        tall = tall.view(B, H, -1, grid.tile * x.shape[-1]) if x.numel() else tall
        top = tall.amax(-1).repeat_interleave(grid.tile, -1)[:, :, : grid.Tq, None] if x.numel() else 0
        p = torch.exp(x - torch.where(torch.as_tensor(top) == -torch.inf, 0, top))
    else:
        p = softmax(logits(q, k, scale, softcap), seen[:, None])
    tile, unit = grid.tile // group, grid.unit // block
    p = torch.nn.functional.pad(p, (0, grid.units * unit - p.shape[-1], 0, grid.tiles * tile - p.shape[-2]))
    p = p.view(B, H, grid.tiles, tile, grid.units, unit)
    p = p.amax((3, 5)) if peak else p.sum((3, 5))
    total = p.sum(-1, keepdim=True)
    return p / torch.where(total == 0, 1, total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_masses_are_those_of_every_weight_formed(generator, shape, how, backend):
    Tq, Tk, offset, *_ = shape
    q, k, keep = tensors(generator, shape)
    for causal, (tile, unit, stride), reduce, softcap in (
        (True, (32, 64, 8), "sum", None),
        (False, (16, 48, 16), "max", 2.0),
        (True, (128, 16, 4), "max", None),
    ):
        grid = Grid(Tq, Tk, tile, unit, offset, causal=causal, **keep)
        options = {"stride": stride} if how in ("antidiagonal", "energy") else {}
        got = tile_mass(q, k, grid, how, reduce=reduce, softcap=softcap, backend=backend, **options)
        want = oracle(q, k, grid, how, stride, softcap, reduce == "max")
        assert got.dtype == torch.float32 and got.shape == (2, q.shape[1], grid.tiles, grid.units)
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-4)
        reach = grid.reach()
        assert not (got * ~reach).any()
        total = got.sum(-1)
        torch.testing.assert_close(total, reach.any(-1).float().expand(total.shape), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_masses_from_a_given_lse_and_from_statistics(generator, backend):
    q, k, _ = tensors(generator, SHAPES[3])
    grid = Grid(40, 552, 16, 32, 512)
    plan = grid.plan(grid.reach())
    lse = sf.attention(q, k, k, plan, return_lse=True)[1]
    own = tile_mass(q, k, grid, "exact", backend=backend)
    given = tile_mass(q, k, grid, "exact", lse=lse, backend=backend)
    torch.testing.assert_close(given, own, atol=1e-5, rtol=1e-4)
    moved = tile_mass(q, k, grid, "exact", lse=lse - 1.5, backend=backend)  # of an earlier step
    torch.testing.assert_close(moved, own, atol=1e-5, rtol=1e-4)
    mass = sf.attention_stats(q, k, lse, plan, over="entry")
    listed = torch.full(mass.shape, grid.units)
    for r in range(grid.tiles):
        start, count = (int(getattr(plan, n)[0, 0, r]) for n in ("start", "count"))
        listed[:, :, r, :count] = plan.index[start : start + count]
    found = torch.zeros(*own.shape[:3], grid.units + 1).scatter(-1, listed, mass)[..., :-1]
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), own, atol=1e-5, rtol=1e-4)


def test_products_in_bf16_keep_nearly_the_same_blocks(generator):
    q, k, _ = tensors(generator, (1024, 1024, 0, False, 4, 2))
    grid = Grid(1024, 1024, 64, 64)
    for how, dtype in itertools.product(("antidiagonal", "energy"), (torch.float32, torch.float16)):
        kept = [
            top_p(tile_mass(q.to(dtype), k.to(dtype), grid, how, products=x), 0.9, grid.reach())
            for x in (None, torch.bfloat16)
        ]
        assert (kept[0] != kept[1]).sum() <= 0.02 * kept[0].sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_and_any_strides(generator, dtype, backend, hows=HOWS):
    q, k, _ = tensors(generator, SHAPES[2], dtype, D=40)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    grid = Grid(150, 150, 32, 32)
    for how in hows:
        want = tile_mass(q.float(), k.float(), grid, how, backend="reference")
        got = tile_mass(q, k, grid, how, backend=backend)
        torch.testing.assert_close(got, want, atol=2e-2, rtol=5e-2)
    want = probe(q.float(), k.float(), 64, backend="reference").keys()
    torch.testing.assert_close(probe(q, k, 64, backend=backend).keys(), want, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("over", [1, 2])
def test_top_p_keeps_the_fewest_that_hold_the_share(generator, over, backend):
    mass = torch.rand(2, 3, 4, 12, generator=generator).pow(4)
    mass[0, 0, 0], mass[0, 1, 2, ::3], mass[1, 1, 1] = 0, torch.nan, mass[1, 1, 1].mean()
    among = torch.rand(2, 1, 4, 12, generator=generator) < 0.7
    among[1, :, 2] = False
    every = among.expand_as(mass)
    before = torch.zeros_like(mass, dtype=torch.bool)
    for p in (0.0, 0.3, 0.5, 0.9, torch.tensor([0.9, 0.95, 0.99]), 1.0, 2.0):
        got = top_p(mass, p, among, over=over, backend=backend)
        assert not (got & ~every).any() and (got.any(-1) == every.any(-1)).all()
        assert not (before & ~got).any()  # monotone
        before = got
        flat, own = (x.flatten(-2) if over == 2 else x for x in (mass, every))
        want = torch.zeros_like(own)
        for at in itertools.product(*(range(n) for n in flat.shape[:-1])):
            x, there = flat[at].tolist(), own[at].tolist()
            share_ = float(p[at[1]]) if isinstance(p, torch.Tensor) else p
            order = [i for i in oracle_order(x, there) if there[i]]
            value = [0.0 if x[i] != x[i] else x[i] for i in order]
            total, held = sum(value), 0.0
            for i, v in zip(order, value, strict=True):
                if share_ >= 1 or held < share_ * total * (1 - 1e-12):
                    want[(*at, i)] = True
                held += v
        want = want.view(mass.shape) | top_k(mass, 1, among)
        assert torch.equal(got, want)


@pytest.mark.parametrize("n", [1, 63, 64, 1000, 3000])
@pytest.mark.parametrize("kind", ["peaked", "odd", "equal", "nothing", "steps", "tiny"])
def test_every_backend_keeps_the_same_share(generator, kind, n):
    mass = {
        "peaked": lambda: torch.randn(6, n, generator=generator).mul(4).softmax(-1),
        "odd": lambda: scores(generator, 6, n)[0],  # negative, NaN, infinite, of either zero
        "equal": lambda: torch.full((6, n), 0.3),
        "nothing": lambda: torch.zeros(6, n),
        "steps": lambda: torch.arange(n).remainder(7).float().expand(6, n),
        "tiny": lambda: torch.rand(6, n, generator=generator) * 1e-40,  # below the normal numbers
    }[kind]()
    p = torch.tensor([0.0, 1e-9, 0.3, 0.9, 0.999, 1.0])
    for among in (None, torch.rand(6, n, generator=generator) < 0.4, torch.zeros(6, n, dtype=torch.bool)):
        want = top_p(mass, p[:, None], among, backend="reference")
        for backend in BACKENDS:
            assert torch.equal(top_p(mass, p[:, None], among, backend=backend), want)


def test_above_a_share_of_the_largest_and_above_a_value(generator):
    x, among = scores(generator, 2, 3, 4, 12)
    x = x.abs()
    for bound in (0.1, 0.5, torch.tensor([0.2, 0.5, 1.0])):
        got = above(x, bound, among)
        known = among & ~x.isnan()
        top = torch.where(known, x, -torch.inf).amax(-1, keepdim=True)
        own = bound.view(1, 3, 1, 1) if isinstance(bound, torch.Tensor) else bound
        assert torch.equal(got, among & ((x >= own * top) | top_k(x, 1, among)))
    level = torch.rand(2, 3, 4, 1, generator=generator)
    assert torch.equal(above(x, level, of="value"), (x >= level) | top_k(x, 1))
    assert (above(x, 1e30, among, of="value") == (among & (x == torch.inf) | top_k(x, 1, among))).all()
    assert not (above(x, 0.5, among) & ~above(x, 0.4, among)).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_indices_are_the_places_of_top_k(generator, backend):
    for n, k in ((1, 1), (5, 9), (64, 7), (200, 64), (1000, 130), (3000, 512)):
        for kind in ("normal", "odd", "equal", "rising", "falling", "wave"):
            x = torch.randn(2, 3, n, generator=generator)
            x = {
                "normal": lambda x: x,
                "odd": lambda x: scores(generator, *x.shape)[0],
                "equal": torch.zeros_like,
                "rising": lambda x: x.sort(-1).values,
                "falling": lambda x: x.sort(-1, descending=True).values,
                "wave": lambda x: torch.arange(x.shape[-1]).remainder(16).float().expand(x.shape),
            }[kind](x)
            for among in (None, torch.rand(2, 3, n, generator=generator) < 0.4):
                got = top_indices(x, k, among, backend=backend)
                assert got.shape == (2, 3, min(k, n)) and got.dtype == torch.int32
                place = torch.where(got < 0, n, got).long()
                kept = torch.zeros(2, 3, n + 1, dtype=torch.bool).scatter(-1, place, True)[..., :-1]
                assert torch.equal(kept, top_k(x, k, among))
                count = kept.sum(-1, keepdim=True)
                at = torch.arange(got.shape[-1])
                assert ((got >= 0) == (at < count)).all()
                assert ((got[..., 1:] > got[..., :-1]) | (at[1:] >= count)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_running_kth_is_that_of_each_prefix(generator, backend):
    for T, k in ((1, 1), (7, 3), (130, 1), (200, 17), (150, 500), (90, torch.tensor([1, 5, 40]))):
        x = scores(generator, 2, 3, T)[0]
        kth, until = running_kth(x, k, return_until=True, backend=backend)
        for b, h in itertools.product(range(2), range(3)):
            most, row, alive = int(k[h]) if isinstance(k, torch.Tensor) else k, x[b, h].tolist(), [T] * T
            for t in range(T):
                best = oracle_order(row[: t + 1], [True] * (t + 1))[:most]
                want = row[best[-1]] if len(best) == most else -torch.inf
                torch.testing.assert_close(float(kth[b, h, t]), want, equal_nan=True)
                for j in set(range(t + 1)) - set(best):
                    alive[j] = min(alive[j], t)
            assert until[b, h].tolist() == alive
    assert running_kth(torch.zeros(2, 0), 3, backend=backend).shape == (2, 0)


def test_lifetimes_of_the_best_are_a_plan(generator):
    x = torch.randn(1, 2, 60, generator=generator)
    kth, until = running_kth(x, 9, return_until=True)
    seen = sf.Plan.from_expiry(until).to_dense()
    past = torch.ones(60, 60, dtype=torch.bool).tril()
    assert torch.equal(seen, past & (x[:, :, None, :] >= kth[..., None]))


def test_sharing_between_the_query_heads_of_a_group(generator):
    x = torch.rand(2, 6, 5, generator=generator)
    keep, group = x < 0.5, x.view(2, 2, 3, 5)
    assert torch.equal(share(keep, 2), (group < 0.5).any(2))
    assert torch.equal(share(keep, 2, "vote"), (group < 0.5).sum(2) >= 2)
    torch.testing.assert_close(share(x, 2, "sum"), group.sum(2))
    assert torch.equal(share(x, 2, "max"), group.amax(2))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda q, k, g: probe(q, k, 0), "rows=0"),
        (lambda q, k, g: probe(q, k, 4, k_keep=torch.ones(1, 3, dtype=torch.bool)), "k_keep"),
        (lambda q, k, g: tile_mass(q, k, Grid(3, 4)), "make one"),
        (lambda q, k, g: tile_mass(q, k, g, "median"), "median"),
        (lambda q, k, g: tile_mass(q, k, g, "antidiagonal", stride=7), "stride=7 does not divide"),
        (lambda q, k, g: tile_mass(q, k, g, "mean", lse=torch.zeros(1, 1, 32)), "lse is for"),
        (lambda q, k, g: tile_mass(q, k, g, "exact", lse=torch.zeros(1, 1, 3)), "lse"),
        (lambda q, k, g: top_indices(q, 0), "k=0"),
        (lambda q, k, g: running_kth(q, 1.5), "integers"),
        (lambda q, k, g: share(q, 2, "any"), "bool"),
        (lambda q, k, g: share(q, 3, "sum"), "does not divide"),
        (lambda q, k, g: top_p(q, 0.5, over=3), "over=3"),
        (lambda q, k, g: above(q, 0.5, of="mean"), "of='mean'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong, said):
    q = k = torch.zeros(1, 1, 32, 8)
    with pytest.raises(SparseFlashError, match=said):
        wrong(q, k, Grid(32, 32, 16, 16))


def test_what_is_selected_can_be_compiled(generator):
    q, k, _ = tensors(generator, SHAPES[1])

    def select(q, k):
        grid = Grid(64, 64, 16, 16)
        mass = tile_mass(q, k, grid, "antidiagonal")
        seen = probe(q, k, 8)
        kept = top_p(mass, 0.8, grid.reach()) | grid.near(1, 1)
        return kept, top_indices(seen.keys(), 5), seen.distances(), running_kth(seen.keys(), 3)

    compiled = torch.compile(select, backend="eager", fullgraph=True)
    for a, b in zip(compiled(q, k), select(q, k), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ops_keep_the_rules_of_torch_library(generator, backend):
    q, k = torch.randn(1, 4, 10, 8, generator=generator), torch.randn(1, 2, 20, 8, generator=generator)
    sees, at = torch.full((1, 10), 12, dtype=torch.int32), torch.arange(10, dtype=torch.int32)[None]
    ops = torch.ops.sparseflash
    for op, given in (
        (ops.selection_probe, (q, k, sees, at, None, 0.3, 0.0, 25, 5, True, backend)),
        (ops.selection_tile_mass, (q, k, sees, None, None, 0.3, 0.0, 4, 5, False, False, backend)),
        (ops.selection_top_indices, (q.flatten(0, 2), None, 3, backend)),
        (ops.selection_heaviest, (q.flatten(0, 2), None, torch.full((40,), 0.5).double(), backend)),
        (ops.selection_running_kth, (q.flatten(0, 2), torch.full((40,), 2, dtype=torch.int32), 2, backend)),
    ):
        torch.library.opcheck(op.default, given)


def test_a_backend_for_attention_that_does_not_select_leaves_it_to_pytorch(generator, monkeypatch):
    q, k, _ = tensors(generator, SHAPES[1])
    want = tile_mass(q, k, Grid(64, 64, 16, 16), "antidiagonal", backend="reference")
    monkeypatch.setenv("SPARSEFLASH_BACKEND", "triton")
    assert torch.equal(tile_mass(q, k, Grid(64, 64, 16, 16), "antidiagonal"), want)
    with pytest.raises(SparseFlashError, match="triton"):
        probe(q, k, 4, backend="triton")


def test_nothing_looks_at_a_value_on_an_accelerator(generator):
    q, k, keep = tensors(generator, (40, 52, 12, True, 4, 2))
    scores = torch.randn(2, 3, 4, 9, generator=generator)
    offset = torch.tensor([12, 0], dtype=torch.int32)
    with unseen(), watched():
        grid = Grid(40, 52, 16, 8, offset, **keep)
        reach = grid.reach()
        kept = top_p(scores, torch.ones(3), over=2) & top_k(scores, 3) & above(scores, 0.5, of="value")
        grid.plan(reach.expand(2, 4, -1, -1), capacity=3)
        assert grid.near(1, 2).shape == reach.shape and share(kept, 1).shape == (2, 1, 4, 9)
        sf.selection.kmeans(k, 3, iterations=2, keep=keep["k_keep"])
        sees, at = (
            torch.full((2, 40), 30, dtype=torch.int32),
            torch.arange(40, dtype=torch.int32).expand(2, -1),
        )
        for consecutive in (True, False):
            options = numerics.Probing(0.2, 0.0, 52, 0, consecutive)
            reference.probe(q, k, sees, at, keep["k_keep"], options)
        for joint in (True, False):
            options = numerics.Masses(0.2, 0.0, 16, 8, joint, False)
            reference.tile_mass(q, k, sees, keep["k_keep"], None, options)
        reference.top_indices(scores.flatten(0, 2), None, numerics.Best(3))
        reference.heaviest(scores.flatten(0, 2), None, torch.full((24,), 0.5), numerics.Heaviest())
        reference.running_kth(scores.flatten(0, 2), torch.full((24,), 2), numerics.Running(9))
        for how in HOWS:
            tile_mass(
                q, k, grid, how, backend="reference", stride=8 if how in ("antidiagonal", "energy") else None
            )
        seen = probe(q, k, 8, q_offset=offset, backend="reference", **keep)
        top_indices(seen.keys(), 4, backend="reference")
        running_kth(seen.keys(), torch.tensor([1, 2, 3, 4]), backend="reference")


def test_reach_is_where_there_is_any_mass(generator):
    q, k, keep = tensors(generator, SHAPES[5])
    grid = Grid(90, 97, 32, 16, OFFSETS[3], **keep)
    assert torch.equal(grid.reach().expand(2, -1, -1, -1)[:, 0], blocks(pairs(grid, 2), 32, 16))
    assert torch.equal((tile_mass(q, k, grid, "mean") > 0).any(1), grid.reach()[:, 0])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
@pytest.mark.parametrize("entry", ["sf_mass", "sf_probe", "sf_best", "sf_heaviest", "sf_running"])
def test_the_c_entry_refuses_what_does_not_fit(entry):
    from sparseflash.backends.cpu import selection as native

    kind = {
        "sf_mass": native.MassCall,
        "sf_probe": native.ProbeCall,
        "sf_best": native.BestCall,
        "sf_heaviest": native.HeaviestCall,
        "sf_running": native.RunningCall,
    }[entry]
    enter, room = getattr(cpu.native().library, entry), torch.ones(64, dtype=torch.int32)

    def call(**changes):
        own = kind(size=ctypes.sizeof(kind))
        for name, what in kind._fields_:
            if name == "among" or (name == "keep" and entry != "sf_heaviest"):
                continue
            if what is ctypes.c_void_p:
                setattr(own, name, room.data_ptr())
            elif what is native.View:
                setattr(own, name, native.View(room.data_ptr(), 1, 1, 1, 1))
            elif name not in ("size", "dtype", "joint", "peak", "before"):
                setattr(own, name, 1)
        for name, value in changes.items():
            at = own
            for step in name.split("__")[:-1]:
                at = getattr(at, step)
            setattr(at, name.split("__")[-1], value)
        return enter(ctypes.byref(own), cpu.native().fp32)

    assert call() == 0
    assert enter(None, 0) == 3
    fields = [name for name, _ in kind._fields_]
    amid = room.data_ptr() + 1
    for name in fields:
        for value in {
            "size": (0, 8, 2**40),
            "dtype": (-1, 3),
            "threads": (0, -1),
            "width": (-1, 2**62),
            "before": (-1, 2**62),
            "most": (0, -1),
        }.get(name, (-1, 2**62) if name in "B Hq Hkv n m E D Tk T tile unit".split() else ()):
            assert call(**{name: value}) == 3, (name, value)
    pointers = {
        "sf_best": ("scores", "index"),
        "sf_heaviest": ("mass", "share", "keep"),
        "sf_running": ("x", "k", "kth", "until"),
    }.get(entry, ())
    if pointers:
        assert call(rows=-1) == call(rows=2**62) == 3
        for name in pointers:
            assert call(**{name: None}) == 3
            assert name == "keep" or call(**{name: amid}) == 3
    else:
        views = ("rows", "columns") if entry == "sf_mass" else ("q", "k")
        for name in views:
            assert call(**{f"{name}__data": None}) == call(**{f"{name}__data": amid}) == 3
        assert call(**{f"{views[0]}__row": 2**62, "n": 4}) == 3
        assert call(sees=None) == call(Hq=3, Hkv=2) == 3


def test_lists_of_a_changed_k_are_refused_by_the_entry():
    """A k that is larger than the room that was announced would be written out of bounds."""
    from sparseflash.backends.cpu import selection as native
    from sparseflash.backends.numerics import Running

    x = torch.zeros(2, 9)
    with pytest.raises(ValueError, match="sf_running"):
        native.running_kth(x, torch.tensor([2, 5]), Running(2))

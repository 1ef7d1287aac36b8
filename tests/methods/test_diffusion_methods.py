"""Methods for diffusion, vision and tables, against what their papers say, written out pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import sparseflash as sf
from cases import mask_of
from sparseflash.methods.denoising import located
from sparseflash.methods.paro_attention import order_costs
from sparseflash.methods.sparse_vdit import judge, smallest
from sparseflash.selection import Grid, grid_order, tile_mass
from tolerance import compare


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def softmax(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def tiles(p: Tensor, size: int) -> Tensor:
    """Sums of squares of blocks, [B,H,R,C]."""
    short = [-n % size for n in p.shape[2:]]
    p = torch.nn.functional.pad(p, (0, short[1], 0, short[0]))
    return p.unflatten(3, (-1, size)).unflatten(2, (-1, size)).sum((3, 5))


def widened(keep: Tensor, size: int, T: int) -> Tensor:
    return keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :T, :T]


def planted(generator: torch.Generator, place: Tensor, T: int, loud: float = 12.0) -> tuple[Tensor, Tensor]:
    """One head in which query i attends to the keys with its number of `place [T]`: [1,1,T,32] each."""
    names = torch.nn.functional.normalize(normal(generator, int(place.max()) + 1, 32), dim=-1)
    return (names[place] * loud * 32**0.5)[None, None], names[place][None, None]


def best(row: Tensor, n: int) -> list[int]:
    return sorted(range(len(row)), key=lambda c: (-float(row[c]), c))[:n]


# ---------------------------------------------------------------- SparseD


def sparsed(q: Tensor, k: Tensor, share: float, size: int, generated: int, scale: float | None) -> Tensor:
    """Steps 2 to 4 of the algorithm, block by block in float64."""
    T = q.shape[2]
    n = -(-T // size)
    edge = next(i for i in range(n) if T - i * size <= generated or i == n - 1)
    whole = tiles(softmax(q, k, scale), size)
    late = tiles(softmax(q, k[:, :, edge * size :], scale), size)
    keep = torch.zeros_like(whole, dtype=torch.bool)
    for b, h, r in itertools.product(*map(range, whole.shape[:3])):
        for c in best(whole[b, h, r], min(n, int(n * share) + 1)):
            keep[b, h, r, c] = c < edge
        for c in best(late[b, h, r], min(n - edge, int((n - edge) * share) + 1)):
            keep[b, h, r, edge + c] = True
    return widened(keep, size, T)


@pytest.mark.parametrize("scaling", ["head_dim", "heads"])
@pytest.mark.parametrize("generated", [0, 30, 100, 128, 150])
def test_sparsed_selects_what_its_steps_select(generated, scaling, generator):
    q, k = 3 * normal(generator, 2, 4, 150, 32), normal(generator, 2, 2, 150, 32)
    method = sf.methods.SparseD(0.3, block=16, scaling=scaling)
    want = sparsed(q, k, 0.3, 16, generated, None if scaling == "head_dim" else 4**-0.5)
    selected = method.select(q, k, {"generated": generated})
    assert torch.equal(mask_of(selected.plan), want)


def denoise(session, calls, steps, **ctx):
    """The densities of all steps of one layer, and its outputs."""
    found = []
    for step, (q, k, v) in enumerate(calls):
        given = {"step": step, "steps": steps, **ctx}
        density = session.select(q, k, {"layer": 0, **given}).plan.density
        found.append((density, session(q, k, v, layer=0, ctx=given)))
    return found


def test_sparsed_is_dense_for_its_first_steps_then_keeps_the_pattern_of_the_last_of_them(generator):
    calls = [normal(generator, 3, 1, 2, 160, 32) for _ in range(10)]
    method = sf.methods.SparseD(0.2, block=16)
    session = sf.methods.Session(method)
    run = denoise(session, calls, 10)
    assert [density == 1 for density, _ in run] == [True] * 4 + [False] * 6
    found = method.select(*calls[3][:2])
    for n in range(4, 10):
        assert torch.equal(run[n][1], method(*calls[n], selection=found))


def test_two_generations_do_not_mix_and_a_fresh_one_finds_its_own_pattern(generator):
    one, two = ([normal(generator, 3, 1, 2, 96, 32) for _ in range(6)] for _ in range(2))
    method = sf.methods.SparseD(0.2, block=16)
    apart = [denoise(sf.methods.Session(method), calls, 6) for calls in (one, two)]
    sessions = [sf.methods.Session(method) for _ in range(2)]
    for step in range(6):
        for calls, session, alone in zip((one, two), sessions, apart):
            out = session(*calls[step], layer=0, ctx={"step": step, "steps": 6})
            assert torch.equal(out, alone[step][1])
    again = denoise(sessions[0], two, 6)  # the same session, used for another prompt
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again, apart[1]))
    assert not torch.equal(apart[0][5][1], sessions[0](*one[5], layer=0, ctx={"step": 5, "steps": 6}))


def test_branches_have_patterns_of_their_own(generator):
    session = sf.methods.Session(sf.methods.SparseD(0.2, block=16))
    calls = {branch: normal(generator, 3, 1, 2, 96, 32) for branch in ("cond", "uncond")}
    masks = {}
    for step in (0, 1, 2, 3):
        for branch, (q, k, v) in calls.items():
            ctx = {"step": step, "steps": 4}
            session(q, k, v, layer=0, branch=branch, ctx=ctx)
            plan = session.select(q, k, {"layer": 0, "branch": branch, **ctx}).plan
            masks[branch] = mask_of(plan)
    assert len(session) == 2 and not torch.equal(masks["cond"], masks["uncond"])


def test_what_steps_lack_is_said(generator):
    q, k, v = normal(generator, 3, 1, 2, 64, 32)
    method = sf.methods.SparseD(block=16)
    with pytest.raises(sf.SparseFlashError, match='"steps", the number of all steps'):
        method(q, k, v, ctx={"step": 0})
    with pytest.raises(sf.SparseFlashError, match="no pattern of step 3 is kept: run all steps.*one Session"):
        method(q, k, v, ctx={"step": 5, "steps": 10})
    with pytest.raises(sf.SparseFlashError, match=r"ctx\['step'\]=0.5: expected an int"):
        method(q, k, v, ctx={"step": 0.5, "steps": 10})
    session = sf.methods.Session(method)
    for step in range(2):
        session(q, k, v, ctx={"step": step, "steps": 2})
    with pytest.raises(sf.SparseFlashError, match="has 32 tokens, the pattern of step 1 64.*another Session"):
        session(*(x[:, :, :32] for x in (q, k, v)), ctx={"step": 2, "steps": 2})
    with pytest.raises(sf.SparseFlashError, match=r"generated=65: expected 0 \.\.\. 64 tokens"):
        method(q, k, v, ctx={"generated": 65})


def test_heads_of_different_settings_and_profiles_keep_states_of_their_own(generator):
    q, k, v = normal(generator, 3, 1, 4, 96, 32)
    mixed = sf.methods.SparseD((0.2, 0.2, 0.6, 0.6), block=16)
    settings = [{"method": "sparsed", "select_share": x, "block": 16} for x in (0.2, 0.2, 0.6, 0.6)]
    profiled = sf.methods.Profiled(sf.calibrate.Profile.of("any", {0: settings}))
    alone = [sf.methods.SparseD(x, block=16).select(q, k).plan for x in (0.2, 0.6)]
    want = torch.cat([mask_of(alone[0])[:, :2], mask_of(alone[1])[:, 2:]], 1)
    for method in (mixed, profiled):
        session = sf.methods.Session(method)
        for step in range(3):
            session(q, k, v, layer=0, ctx={"step": step, "steps": 4})
        plan = session.select(q, k, {"layer": 0, "step": 3, "steps": 4}).plan
        assert torch.equal(mask_of(plan), want)


# ---------------------------------------------------------------- AdaSpa


def test_adaspa_keeps_for_every_tile_the_set_of_blocks_of_the_largest_mass(generator):
    """Against all sets of as many blocks."""
    q, k = 3 * normal(generator, 2, 2, 120, 32), normal(generator, 2, 1, 120, 32)
    keep = tiles(mask_of(sf.methods.AdaSpa(0.6, block=16, adaptive=False).select(q, k).plan).double(), 16) > 0
    mass = tiles(softmax(q, k), 16)
    assert bool((keep.sum(-1) == round(0.4 * 8)).all())
    for row, kept in zip(mass.flatten(0, 2), keep.flatten(0, 2)):
        top = max(float(row[list(c)].sum()) for c in itertools.combinations(range(8), round(0.4 * 8)))
        assert float(row[kept].sum()) == pytest.approx(top, rel=1e-5)


def test_adaspa_searches_at_its_steps_with_the_first_lse(generator):
    calls = [normal(generator, 3, 1, 2, 128, 32) for _ in range(7)]
    method = sf.methods.AdaSpa(0.75, search=(2, 5), block=16, adaptive=False)
    session = sf.methods.Session(method)
    run = denoise(session, calls, 7)
    assert [density == 1 for density, _ in run] == [True] * 3 + [False] * 4
    q, k, v = calls[2]
    _, lse = sf.attention(q, k, v, sf.Plan.dense(128, 128), return_lse=True)
    first = method.select(q, k).plan
    grid = Grid(128, 128, 16, 16, causal=False)
    stale = tile_mass(*calls[5][:2], grid, "exact", lse=lse)
    second = grid.plan(sf.selection.top_k(stale, 2))
    for n, plan in ((3, first), (4, first), (5, second), (6, second)):
        want = sf.attention(*calls[n], plan)
        torch.testing.assert_close(run[n][1], want)
    assert not torch.equal(mask_of(first), mask_of(second))


def test_a_constant_in_the_lse_changes_no_choice(generator):
    q, k = 3 * normal(generator, 1, 2, 128, 32), normal(generator, 1, 2, 128, 32)
    _, lse = sf.attention(q, k, k, sf.Plan.dense(128, 128), return_lse=True)
    method = sf.methods.AdaSpa(0.7, block=16)
    one, two = (mask_of(method.pattern(q, k, x, {}).plan) for x in (lse, lse + 3))
    assert torch.equal(one, two)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.3, 0.5, 0.8, 0.95])
def test_levels_of_heads_keep_the_mean_density(sparsity):
    """Recalls are known: heads 0 to 3 hold all mass in one block of a row, heads 4 to 7 spread it evenly."""
    mass = torch.full((1, 8, 20, 20), 1 / 20)
    mass[:, :4] = torch.eye(20)
    some = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    method = sf.methods.AdaSpa(sparsity)
    count = method.levels(mass, some, torch.zeros(1, 1, 20, 20, dtype=torch.bool))[0].tolist()
    base = max(round(20 * (1 - sparsity)), 1)
    assert sum(count) == 8 * base and min(count) >= 1 and max(count) <= 20
    if sparsity >= 1 / 3:
        few = max(round(20 * (1 - sparsity) / 2), 1)
        assert count == [few] * 4 + [2 * base - few] * 4
    else:
        assert count[0] <= base <= count[7]


def test_a_needle_in_the_text_is_seen_at_any_sparsity_and_the_error_is_bounded(generator):
    T, text = 300, 40
    q, k, v = normal(generator, 3, 1, 4, T, 32)
    for ctx in ({"text": text}, {"text": (text, 0)}):
        mask = mask_of(sf.methods.AdaSpa(0.95, block=16).select(q, k, ctx).plan)
        words = slice(T - text, T) if ctx["text"] == text else slice(0, text)
        assert bool(mask[..., words].all()) and bool(mask[:, :, words].all()) and not bool(mask.all())
    p = softmax(q, k)
    recall = (p * mask).sum(-1, keepdim=True)
    off = sf.methods.AdaSpa(0.95, block=16)(q, k, v, ctx=ctx).double() - p @ v.double()
    assert bool((off.abs() <= 2 * (1 - recall) * v.abs().max() + 1e-5).all())


def test_exact_search_keeps_more_mass_than_a_window_and_a_random_choice(generator):
    """Four heads that look at what is alike, wherever it is."""
    T, size = 512, 32
    group = torch.randperm(T // size, generator=generator) % 4
    q, k = planted(generator, group.repeat_interleave(size), T)
    p = softmax(q, k)
    grid = Grid(T, T, size, size, causal=False)
    count = 4
    near = (torch.arange(16)[:, None] - torch.arange(16)).abs() <= count // 2
    chance = sf.selection.top_k(torch.rand(1, 1, 16, 16, generator=generator), count)
    kept = {
        name: float((p * mask_of(plan)).sum(-1).mean())
        for name, plan in {
            "adaspa": sf.methods.AdaSpa(1 - count / 16, block=size, adaptive=False).select(q, k).plan,
            "sparsed": sf.methods.SparseD((count - 1) / 16, block=size).select(q, k).plan,
            "window": grid.plan(near[None, None]),
            "random": grid.plan(chance),
        }.items()
    }
    assert min(kept["adaspa"], kept["sparsed"]) > 0.95 > 0.6 > max(kept["window"], kept["random"])


# ---------------------------------------------------------------- tiles and frames


@pytest.mark.parametrize("text", [0, 5, (3, 0), (7, 4)])
@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [((4, 6, 8), (2, 3, 4), (1, 3, 2)), ((5, 4, 6), (2, 3, 4), (1, 1, 1)), ((9, 11), (4, 4), (1, 3))],
)
def test_a_window_slides_by_whole_tiles(grid, tile, window, text, generator):
    before, behind = text if isinstance(text, tuple) else (0, text)
    method = sf.methods.SlidingTile(tile=tile, window=window)
    T = math.prod(grid) + before + behind
    want = torch.zeros(T, T, dtype=torch.bool)
    places = list(itertools.product(*map(range, grid)))
    counts = [-(-n // t) for n, t in zip(grid, tile)]
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            seen = True
            for x, y, t, w, n in zip(a, b, tile, window, counts):
                first = min(max(x // t - w // 2, 0), max(n - w, 0))
                seen = seen and first <= y // t < first + w
            want[before + i, before + j] = seen
    words = torch.ones(T, dtype=torch.bool)
    words[before : T - behind] = False
    want |= words | words[:, None]
    q, k, v = normal(generator, 3, 1, 2, T, 16)
    ctx = {"grid": grid, "text": text}
    assert torch.equal(mask_of(method.select(q, k, ctx).plan)[0, 0], want)
    out, lse = method(q, k, v, ctx=ctx, return_lse=True)
    compare({"out": out, "lse": lse}, q, k, v, want[None, None])


def test_a_grid_that_is_not_the_sequence_is_refused():
    x = torch.zeros(1, 1, 100, 16)
    for method in (sf.methods.SlidingTile(), sf.methods.SparseVDiT("diagonal"), sf.methods.PAROAttention()):
        with pytest.raises(sf.SparseFlashError, match=r"are not 100 tokens: give ctx\[\"grid\"\]"):
            method.select(x, x, {"grid": (3, 4, 8)})
    with pytest.raises(sf.SparseFlashError, match="expected 3 sizes"):
        sf.methods.SlidingTile(grid=(-1, 4)).select(x, x)
    with pytest.raises(sf.SparseFlashError, match="expected tokens behind the grid"):
        sf.methods.SlidingTile().select(x, x, {"grid": (3, 4, 8), "text": -4})
    assert located(100, (3, 4, 8), (4, 0)).before == 4


@pytest.mark.parametrize("both", [False, True])
def test_frames_see_themselves_and_reference_frames_alone(both, generator):
    frames, size = 6, 35
    q, k, v = (normal(generator, 1, 2, frames * size, 16) for _ in range(3))
    for references in range(1, frames + 1):
        method = sf.methods.EfficientVDiT(references, both, grid=(frames, 5, 7))
        plan = method.select(q, k).plan
        n = references
        count = 2 * n * frames + frames - n * n - n if both else n * (frames - 1) + frames
        assert plan.density == pytest.approx(count / frames**2)
    method = sf.methods.EfficientVDiT(2, both, grid=(frames, 5, 7))
    out = method(q, k, v)
    k[:, :, 2 * size : 3 * size] += 1
    v[:, :, 2 * size : 3 * size] += 1
    changed = (method(q, k, v) != out).any(-1)[0, 0].view(frames, size).any(-1).tolist()
    assert changed == [both, False, True, False, False, both]


def test_frames_by_blocks_are_two_softmaxes_merged(generator):
    """Own frame and reference frames, no frame counted twice."""
    frames, size = 5, 21
    q, k, v = normal(generator, 3, 1, 2, frames * size, 16)
    frame = torch.arange(frames * size) // size
    own = (frame[:, None] == frame)[None, None]
    references = ((frame == 0) | (frame == 4))[None, None, None].expand(1, 1, frames * size, -1)
    parts = [sf.attention(q, k, v, sf.Plan.from_mask(m), return_lse=True) for m in (own, references & ~own)]
    merged, _ = sf.merge(parts)
    got = sf.methods.EfficientVDiT(2, grid=(frames, 3, 7))(q, k, v)
    torch.testing.assert_close(got, merged)


def test_the_smallest_number_of_references_that_suffices_is_found(generator):
    """Every frame looks at three frames; layer 1 at one."""
    frames, size = 7, 16
    T = frames * size
    of_frame = torch.arange(T) // size

    def looks(seen):
        k = torch.nn.functional.normalize(normal(generator, 1, 2, T, 32), dim=-1)
        mark = torch.nn.functional.normalize(normal(generator, 32), dim=-1)
        k = k + 3 * mark * torch.isin(of_frame, torch.tensor(seen))[:, None]
        return (mark * 40).expand(1, 2, T, 32), k, normal(generator, 1, 2, T, 32), {"grid": (frames, 4, 4)}

    samples = {0: [looks([0, 3, 6])], 1: [looks([0])]}
    candidates = [{"method": "efficient-vdit", "references": n} for n in (4, 3, 2, 1)]
    found = {}
    for bound in (0.01, 1e9):
        score = smallest(samples, bound, lambda method: method.references)
        profile = sf.calibrate.search("planted", [0, 1], candidates, score, progress=False)
        found[bound] = [profile.heads(n)[0]["references"] for n in (0, 1)]
    assert found == {0.01: [3, 1], 1e9: [1, 1]}
    whole = {"method": "efficient-vdit", "references": frames}
    assert smallest(samples, 0.0, lambda method: method.references)(0, whole) == [-math.inf] * 2  # not below


# ---------------------------------------------------------------- Sparse-vDiT


def video_heads(generator, grid=(8, 8, 8)):
    """Heads that are a band, the same place of all frames, columns, everything alike, and without a value."""
    F, P = grid[0], grid[1] * grid[2]
    T = F * P
    token = torch.arange(T)
    band = planted(generator, token // 64, T)
    place = planted(generator, token % P // 2, T)
    mark = torch.nn.functional.normalize(normal(generator, 32), dim=-1)
    columns = (mark * 60).expand(1, 1, T, 32), (mark * (token // 64 % 4 == 1)[:, None])[None, None]
    even = normal(generator, 1, 1, T, 32) * 0.05, normal(generator, 1, 1, T, 32)
    pairs = [band, place, columns, even, even]
    q, k = (torch.cat([pair[n] for pair in pairs], 1) for n in (0, 1))
    v = normal(generator, 1, 5, T, 32)
    slope = torch.linspace(-9, 9, T) + torch.linspace(-9, 9, P).repeat(F)
    v[:, 3] += slope[:, None]  # no part has the mean of the whole
    v[:, 4] = 0
    return q, k, v, {"grid": grid}


def test_the_search_names_every_planted_mode(generator):
    q, k, v, ctx = video_heads(generator)
    modes = ("full", "skip", "diagonal", "multi-diagonal", "stripe")
    candidates = [{"method": "sparse-vdit", "mode": m, "reach": 1, "stripes": 2, "block": 64} for m in modes]
    wanted = ["diagonal", "multi-diagonal", "stripe", "full", "skip"]
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        samples = {0: [(q[:, order], k[:, order], v[:, order], ctx)]}
        score = judge(samples, weight=0.01, bound=0.1)
        profile = sf.calibrate.search("planted", [0], candidates, score, progress=False)
        assert [head["mode"] for head in profile.heads(0)] == [wanted[n] for n in order]
    method, dense = sf.methods.Profiled(profile), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    order = [3, 1, 4, 0, 2]
    plan = method.select(q[:, order], k[:, order], {"layer": 0, **ctx}).plan
    assert isinstance(plan, sf.Plan) and plan.density < 0.5  # heads of all modes in one plan
    out = method(q[:, order], k[:, order], v[:, order], ctx={"layer": 0, **ctx})
    off = (out - dense[:, order]).square().mean((0, 2, 3)) / dense[:, order].square().mean((0, 2, 3))
    assert float(off.nan_to_num(0.0).max()) < 0.1

    for bound, weight, want in ((0.0, 0.5, "full"), (math.inf, 1e9, "skip")):
        score = judge({0: [(q, k, v, ctx)]}, weight=weight, bound=bound)
        profile = sf.calibrate.search("planted", [0], candidates, score, progress=False)
        assert [head["mode"] for head in profile.heads(0)] == [want] * 5


def test_a_multi_diagonal_is_a_diagonal_of_the_tokens_sorted_by_place(generator):
    grid, text = (5, 4, 7), (6, 9)
    T = math.prod(grid) + sum(text)
    q, k, v = normal(generator, 3, 1, 2, T, 16)
    order = grid_order(grid, axes=(1, 2, 0), text=text)[0, 0].long()
    ctx = {"grid": grid, "text": text}
    got = sf.methods.SparseVDiT("multi-diagonal", reach=1, block=16)(q, k, v, ctx=ctx)
    same = sf.methods.SparseVDiT("diagonal", reach=1, block=16)
    assert torch.allclose(got[:, :, order], same(*(x[:, :, order] for x in (q, k, v)), ctx=ctx), atol=1e-6)
    n = -(-T // 16)
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 1
    words = torch.ones(n, dtype=torch.bool)
    words[1:-1] = False
    words[-1 - (9 > T % 16) :] = True
    want = widened((near | words | words[:, None])[None, None], 16, T)
    assert torch.equal(mask_of(same.select(q, k, ctx).plan)[:, :1], want)


def test_heads_in_one_plan_are_heads_apart(generator):
    q, k, v, ctx = video_heads(generator, (4, 8, 8))
    modes = ("diagonal", "multi-diagonal", "stripe", "full", "skip")
    together = sf.methods.SparseVDiT(modes, reach=1, block=32)(q, k, v, ctx=ctx)
    for h, mode in enumerate(modes):
        own = slice(h, h + 1)
        alone = sf.methods.SparseVDiT(mode, reach=1, block=32)(q[:, own], k[:, own], v[:, own], ctx=ctx)
        assert torch.equal(together[:, own], alone)


# ---------------------------------------------------------------- PAROAttention


def test_the_order_of_each_head_is_the_one_in_which_its_blocks_are_full(generator):
    """Heads that look along one axis: the tokens of a line are neighbours where that axis is innermost."""
    grid = (8, 8, 8)
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    pairs = []
    for axis in range(3):
        others = [n for n in range(3) if n != axis]
        pairs.append(planted(generator, place[:, others[0]] * 8 + place[:, others[1]], 512))
    q, k = (torch.cat([pair[n] for pair in pairs], 1) for n in (0, 1))
    method = sf.methods.PAROAttention(keep=0.125, block=16)
    costs = order_costs(method, q, k, located(512, grid, (0, 0)), None, None)[0]
    orders = list(itertools.permutations(range(3)))
    assert [orders[n][-1] for n in costs.argmin(-1).tolist()] == [0, 1, 2]
    p = softmax(q, k)

    def kept(method):
        return (p * mask_of(method.select(q, k, {"grid": grid}).plan)).sum(-1).mean(-1)[0]

    found, raster = kept(method), kept(sf.methods.PAROAttention(keep=0.125, block=16, axes_order=(0, 1, 2)))
    assert float(found.min()) > 0.95 and float(raster[0]) < 0.6

    def empty(axes, head):
        order = grid_order(grid, axes=axes)[0, 0].long()
        mass = tiles(p[:, head : head + 1][:, :, order][:, :, :, order], 64)
        return float((mass < 1e-3 * 64).double().mean())

    assert empty((0, 1, 2), 0) == 0 and empty((1, 2, 0), 0) > 0.8


def test_costs_of_orders_are_their_formula_where_the_last_block_is_short(generator):
    """Blocks that are not empty, and max over mean of a block's weights, each as a share of all orders."""
    grid, size = (3, 5, 7), 16
    n = math.prod(grid)
    method = sf.methods.PAROAttention(keep=0.3, block=size, small=1.0, empty=0.55)
    q, k = 0.1 * normal(generator, 1, 2, n, 16), normal(generator, 1, 2, n, 16)
    p, counted, peaked = softmax(q, k), [], []
    for axes in itertools.permutations(range(3)):
        at = grid_order(grid, axes=axes)[0, 0].long()
        blocks = [x.split(size, -1) for x in p[:, :, at][..., at].split(size, -2)]
        each = [x.flatten(2) for row in blocks for x in row]
        counted.append(sum(((x < 1 / n).double().mean(-1) < 0.55).double() for x in each))
        peaked.append(sum(x.amax(-1) / x.mean(-1) for x in each))
    both = [torch.stack(x, -1) for x in (counted, peaked)]
    full, peak = (x / x.sum(-1, keepdim=True) for x in both)
    assert full.std() > 0
    want = method.alpha * full + (1 - method.alpha) * peak
    got = order_costs(method, q, k, located(n, grid, (0, 0)), None, None)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep", [0.4, 0.5])
def test_as_many_blocks_are_kept_as_were_asked_for_and_text_always(keep, generator):
    grid, text = (4, 8, 8), (20, 12)
    T = math.prod(grid) + sum(text)
    q, k = normal(generator, 2, 4, T, 32), normal(generator, 2, 2, T, 32)
    ctx = {"grid": grid, "text": text}
    plan = sf.methods.PAROAttention(keep=keep, block=16).select(q, k, ctx).plan
    mask = mask_of(plan)
    words = torch.ones(T, dtype=torch.bool)
    words[20 : T - 12] = False
    assert bool((mask | ~(words | words[:, None])).all()) and bool(mask.any(-1).all())
    n = T // 16
    assert int(mask.sum()) == 2 * 4 * round(keep * n * n) * 16 * 16


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_in_every_order_all_blocks_are_dense_attention(axes, generator):
    q, k, v = normal(generator, 3, 1, 2, 4 * 5 * 6 + 3, 16)
    method = sf.methods.PAROAttention(keep=1.0, block=16, axes_order=axes)
    out, lse = method(q, k, v, ctx={"grid": (4, 5, 6), "text": 3}, return_lse=True)
    compare({"out": out, "lse": lse}, q, k, v, torch.ones(1, 1, 123, 123, dtype=torch.bool))


def test_orders_and_blocks_are_found_once(generator):
    calls = [normal(generator, 3, 1, 2, 4 * 8 * 8, 32) for _ in range(4)]
    method = sf.methods.PAROAttention(keep=0.3, search=1, block=16)
    run = denoise(sf.methods.Session(method), calls, 4, grid=(4, 8, 8))
    assert [density == 1 for density, _ in run] == [True, True, False, False]
    found = method.select(*calls[1][:2], {"grid": (4, 8, 8)})
    assert torch.equal(run[3][1], method(*calls[3], selection=found))


# ---------------------------------------------------------------- Orion-MSP


@pytest.mark.parametrize("windowless", [False, True])
@pytest.mark.parametrize("T", [1, 7, 60, 257])
@pytest.mark.parametrize(
    ("special", "window", "random"), [(2, 3, 2), (0, 1, 0), (0, 1, 4), (5, 0, 3), (9, 8, 0)]
)
def test_orion_sees_special_tokens_its_window_and_its_links(T, special, window, random, windowless):
    method = sf.methods.OrionMSP(special, window, random, windowless=windowless)
    links = [{j for j in row if j >= 0} for row in method.links(T).tolist()]
    want = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(T):
            near = abs(i - j) <= (0 if windowless else window)
            want[i, j] = i < special or j < special or near or j in links[i]
    assert all(not row for row in links[:special])
    for row in links[special:]:
        assert len(row) == min(random, T - special) and min(row, default=special) >= special
    x = torch.zeros(1, 2, T, 16)
    assert torch.equal(mask_of(method.select(x, x).plan)[0, 0], want)
    plans = method.select(x, x).plan
    if isinstance(plans, tuple):  # no pair is in two
        assert sum(p.to_dense().long() for p in plans).max() == 1


def test_the_window_matters_and_wide_rows_have_its_gradients(generator):
    q, k, v = (normal(generator, 1, 2, 300, 16).requires_grad_() for _ in range(3))
    method = sf.methods.OrionMSP(4, 4, 2)
    mask = mask_of(method.select(q, k).plan)
    dout = normal(generator, 1, 2, 300, 16)
    out, lse = method(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    got = {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
    compare(got, *(x.detach() for x in (q, k, v)), mask, dout=dout)
    assert not torch.equal(out, sf.methods.OrionMSP(4, 4, 2, windowless=True)(q, k, v))


# ---------------------------------------------------------------- experiments


@pytest.mark.slow
def test_what_the_experiments_measure_is_what_they_say(generator):
    pytest.importorskip("safetensors")
    from benchmarks.experiments import diffusion, vision

    q, k, v = diffusion.planted((4, 8, 16), generator)
    p = softmax(q, k)
    rows = list(diffusion.measure_planted((4, 8, 16)))
    assert {row["head"] for row in rows} == set(diffusion.HEADS) and all(
        0 < row["density"] <= 1 for row in rows
    )
    modes = [diffusion.found_profile(q, k, v, (4, 8, 16)).heads(0)[h]["mode"] for h in range(3)]
    assert modes == ["diagonal", "multi-diagonal", "stripe"]
    plan = sf.methods.SparseD(0.2, block=64).select(q, k).plan
    for name, control in diffusion.controls(plan, q).items():
        assert control.kept == pytest.approx(plan.kept, abs=0.06), name
    assert bool((p.sum(-1) - 1).abs().max() < 1e-9)

    x, label = vision.rows_of(500, generator)
    assert 0.3 < float(label.float().mean()) < 0.7
    assert label.tolist() == [int("11" in "".join(map(str, row))) for row in x.tolist()]
    rows = list(vision.measure(parts=("orion",), steps=1))
    assert [row["case"] for row in rows][:2] == ["window", "windowless"] and rows[-1]["density"] == 1


@pytest.mark.parametrize("generated", [16, 40])
def test_sparsed_of_a_canvas_is_the_last_rows_of_sparsed_of_all(generated, generator):
    q, k, v = (torch.randn(2, heads, 128, 16, generator=generator) for heads in (4, 2, 2))
    method, canvas = sf.methods.SparseD(0.3, block=16), q[:, :, -48:]
    ctx = {"step": 3, "steps": 10, "generated": generated}
    both = []
    for queries in (q, canvas):
        session = sf.methods.Session(method)
        session(queries, k, v, ctx=ctx)
        both.append(session.select(queries, k, {**ctx, "step": 4}).plan.to_dense())
    assert torch.equal(both[0][:, :, -48:], both[1])
    with pytest.raises(sf.SparseFlashError, match="no more queries than keys"):
        method.select(q, k[:, :, :100], ctx)
    session = sf.methods.Session(method)
    session(canvas, k, v, ctx=ctx)
    with pytest.raises(sf.SparseFlashError, match="step 4 has 112 tokens, the pattern of step 3 128"):
        session.select(canvas, k[:, :, 16:], {**ctx, "step": 4})

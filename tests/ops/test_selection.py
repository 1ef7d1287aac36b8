"""The grid, estimators and budgets against plain oracles: chunks, padding, shared heads, one token, none."""

from __future__ import annotations

import itertools

import pytest
import torch

import sparseflash as sf
from sparseflash.common.errors import SparseFlashError
from sparseflash.selection import Grid, pooled, top_k

OFFSETS = (0, 500, 512, torch.tensor([3, -40]), torch.tensor(7))


def pairs(grid: Grid, batch: int) -> torch.Tensor:
    """What each query may see, bool [batch, Tq, Tk]."""
    q = (torch.arange(grid.Tq) + torch.as_tensor(grid.q_offset).view(-1, 1)).expand(batch, -1)[..., None]
    seen = (
        torch.arange(grid.Tk) <= q if grid.causal else torch.ones(batch, grid.Tq, grid.Tk, dtype=torch.bool)
    )
    if grid.q_keep is not None:
        seen = seen & grid.q_keep[..., None]
    if grid.k_keep is not None:
        seen = seen & grid.k_keep[:, None]
    return seen


def blocks(seen: torch.Tensor, tile: int, unit: int) -> torch.Tensor:
    """Whether any pair of a block is there."""
    *lead, Tq, Tk = seen.shape
    R, C = -(-Tq // tile), -(-Tk // unit)
    seen = torch.nn.functional.pad(seen, (0, C * unit - Tk, 0, R * tile - Tq))
    return seen.view(*lead, R, tile, C, unit).any(-1).any(-2)


def keep_of(generator, batch: int, T: int) -> torch.Tensor:
    """Left padding, right padding, holes."""
    keep = torch.rand(batch, T, generator=generator) < 0.9
    keep[0, : T // 3] = False
    keep[-1, T - T // 4 :] = False
    return keep


def grids(generator):
    """Chunks, one token, none, ragged ends; each with and without causality and padding."""
    shapes = (
        (1, 1, 0),
        (70, 70, 0),
        (40, 552, 512),
        (50, 550, 500),
        (0, 5, 0),
        (5, 0, 0),
        (33, 64, OFFSETS[3]),
        (33, 64, OFFSETS[4]),
    )
    for (Tq, Tk, offset), causal, padded in itertools.product(shapes, (True, False), (False, True)):
        tile, unit = (16, 32) if Tq % 2 else (24, 40)
        keep = {"q_keep": keep_of(generator, 2, Tq), "k_keep": keep_of(generator, 2, Tk)} if padded else {}
        yield Grid(Tq, Tk, tile, unit, offset, causal=causal, **keep)


def test_reach_is_whether_some_query_sees_some_key(generator):
    for grid in grids(generator):
        assert torch.equal(
            grid.reach().expand(2, -1, -1, -1)[:, 0], blocks(pairs(grid, 2), grid.tile, grid.unit)
        )


def test_near_is_the_first_units_and_those_of_the_tile_itself(generator):
    for grid in grids(generator):
        if not grid.Tq or not grid.Tk:
            assert grid.near(1, 1).shape == grid.reach().shape
            continue
        sink, local, unit = 2, 3, torch.arange(grid.units)
        at = torch.arange(grid.Tq) + torch.as_tensor(grid.q_offset).view(-1, 1)
        want = torch.zeros(2, grid.tiles, grid.units, dtype=torch.bool)
        for b, r in itertools.product(range(2), range(grid.tiles)):
            rows = slice(r * grid.tile, (r + 1) * grid.tile)
            own = at.expand(2, -1)[b, rows]
            own = own if grid.q_keep is None else own[grid.q_keep[b, rows]]
            real = torch.ones(grid.Tk, dtype=torch.bool) if grid.k_keep is None else grid.k_keep[b]
            first = next((c for c in range(grid.units) if real[c * grid.unit : (c + 1) * grid.unit].any()), 0)
            want[b, r] |= unit < first + sink
            if len(own):
                low, high = int(own.min()) // grid.unit, int(own.max()) // grid.unit
                want[b, r] |= (unit > low - local) & (unit < high + (1 if grid.causal else local))
        assert torch.equal(grid.near(sink, local).expand(2, -1, -1, -1)[:, 0], want & grid.reach()[:, 0])


@pytest.mark.parametrize("ordered", [False, True])
def test_the_plan_shows_the_kept_blocks_and_full_ones_are_full(generator, ordered):
    for grid in grids(generator):
        orders, q_row, k_row = {}, torch.arange(grid.Tq), torch.arange(grid.Tk)
        if ordered:
            q_row, k_row = (torch.randperm(T, generator=generator) for T in (grid.Tq, grid.Tk))
            orders = {"q_order": q_row.view(1, 1, -1), "k_order": k_row.view(1, 1, -1)}
        keep = torch.rand(2, 3, grid.tiles, grid.units, generator=generator) < 0.5
        plan = grid.plan(keep, **orders)
        plan.check()
        seen = keep.repeat_interleave(grid.tile, 2).repeat_interleave(grid.unit, 3)[
            :, :, : grid.Tq, : grid.Tk
        ]
        want = torch.zeros_like(seen)
        want[:, :, q_row[:, None], k_row] = seen
        assert torch.equal(plan.to_dense().expand(2, 3, -1, -1), want & pairs(grid, 2)[:, None])
        if not ordered:
            wide = grid.plan(keep, capacity=max(1, grid.units))
            assert torch.equal(wide.to_dense(), plan.to_dense()) and not bool(wide.overflow)


def test_a_capacity_drops_what_is_beyond_it_and_says_so():
    plan = Grid(64, 64, 16, 16, causal=False).plan(torch.ones(1, 1, 4, 4, dtype=torch.bool), capacity=3)
    assert bool(plan.overflow) and plan.to_dense().sum() == 64 * 48


def test_pooling_counts_real_tokens_only(generator):
    for T, size, padded in itertools.product((0, 1, 7, 64, 100), (1, 8, 32), (False, True)):
        x = torch.randn(2, 3, T, 5, generator=generator)
        keep = keep_of(generator, 2, T) if padded else torch.ones(2, T, dtype=torch.bool)
        x = torch.where(keep[:, None, :, None], x, torch.nan)
        for how in ("mean", "max", "min", "absmax"):
            got = pooled(x, size, how, keep=keep if padded else None)
            assert got.shape == (2, 3, -(-T // size), 5)
            for b, c in itertools.product(range(2), range(got.shape[2])):
                part = x[b, :, c * size : (c + 1) * size][:, keep[b, c * size : (c + 1) * size]]
                want = torch.zeros(3, 5)
                if part.shape[1]:
                    want = {"mean": part.mean, "max": part.amax, "min": part.amin, "absmax": part.abs().amax}[
                        how
                    ](1)
                torch.testing.assert_close(got[b, :, c], want)


def test_pooling_keeps_precision_and_layout():
    x = torch.randn(1, 100, 2, 16).transpose(1, 2).bfloat16()
    torch.testing.assert_close(pooled(x, 32), pooled(x.float(), 32))
    assert pooled(x.double(), 32).dtype == torch.float64


def oracle_order(score, among):
    """Places from the best to the worst, candidates first, NaN after every number."""
    return sorted(
        range(len(score)),
        key=lambda i: (not among[i], score[i] != score[i], -score[i] if score[i] == score[i] else 0, i),
    )


def scores(generator, *shape):
    """Scores with ties, NaN and infinities, and candidates."""
    x = torch.randn(shape, generator=generator).mul(2).round().div(2)
    odd = torch.rand(shape, generator=generator)
    x = torch.where(
        odd < 0.05, torch.nan, torch.where(odd < 0.1, -torch.inf, torch.where(odd > 0.97, torch.inf, x))
    )
    return x, torch.rand(shape, generator=generator) < 0.7


@pytest.mark.parametrize("k", [1, 3, 100, torch.tensor([0, 2, 5])])
def test_top_k_keeps_the_best_and_lower_units_of_equal_ones(generator, k):
    x, among = scores(generator, 2, 3, 4, 12)
    got = top_k(x, k, among)
    for b, h, r in itertools.product(range(2), range(3), range(4)):
        most = max(1, int(k[h]) if isinstance(k, torch.Tensor) else k)
        own = among[b, h, r].tolist()
        best = [i for i in oracle_order(x[b, h, r].tolist(), own) if own[i]][:most]
        assert got[b, h, r].nonzero().flatten().tolist() == sorted(best)


def test_what_does_not_fit_is_refused_with_what_was_given():
    for wrong, said in (
        (lambda: Grid(-1, 3), "Tq=-1"),
        (lambda: Grid(3, 3, tile=0), "tile=0"),
        (lambda: Grid(3, 3, k_keep=torch.ones(3)), "k_keep"),
        (lambda: Grid(3, 3).near(sink=-1), "sink=-1"),
        (lambda: Grid(3, 3).plan(torch.ones(1, 1, 2, 1, dtype=torch.bool)), "keep"),
        (lambda: pooled(torch.ones(1, 1, 4, 4), 0), "size=0"),
        (lambda: pooled(torch.ones(1, 1, 4, 4), 2, "median"), "median"),
        (lambda: top_k(torch.ones(3).int(), 1), "score"),
        (lambda: top_k(torch.ones(2, 3, 4), 1, torch.ones(5, dtype=torch.bool)), "among"),
        (lambda: top_k(torch.ones(2, 3, 4), torch.ones(2)), "k:"),
    ):
        with pytest.raises(SparseFlashError, match=said):
            wrong()


def test_block_sparse_attention_over_all_blocks_is_dense(generator):
    q, k, v = (torch.randn(2, h, T, 16, generator=generator) for h, T in ((4, 70), (2, 570), (2, 570)))
    grid = Grid(70, 570, 32, 64, q_offset=500)
    plan = grid.plan(top_k(pooled(q, 32) @ pooled(k, 64).repeat_interleave(2, 1).mT, 9, grid.reach()))
    torch.testing.assert_close(sf.attention(q, k, v, plan), sf.attention(q, k, v, causal=True, q_offset=500))

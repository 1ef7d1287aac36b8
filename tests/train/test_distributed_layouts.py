"""Layouts, from lists alone: every plan of the table is balanced; shards visit their share; what is sent."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from benchmarks.experiments.ranks import plans
from sparseflash.distributed import Layout, areas, balance, readers
from sparseflash.distributed.layouts import NAMES
from sparseflash.distributed.pairs import Pairs
from sparseflash.plan.figures import visible_pairs, visited_area

T = 16384


def parts(plan, layout):
    """The plans of each rank over the keys of each, by rank and origin."""
    each = [Pairs([plan], rank, layout, layout) for rank in range(layout.world)]
    return [[own.of(origin) for origin in range(layout.world)] for own in each]


def visits(made):
    """What each rank visits of the keys of each."""
    area = [[sum(map(visited_area, plans)) for plans in row] for row in made]
    return torch.tensor(area, dtype=torch.float64)


@pytest.mark.parametrize("world", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
@pytest.mark.parametrize("name", plans(256))
def test_auto_balances_every_plan_of_the_table(name, world):
    """Max over mean of the visited area."""
    plan = plans(T)[name]()
    area = visits(parts(plan, balance(plan, world)))
    assert float(area.sum(1).max() / area.sum(1).mean()) <= 1.10


@pytest.mark.parametrize("offset", [0, 5, torch.tensor([3, 9])])
@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("name", ["hash 8", "dense causal", "window + sink", "documents", "star, 4 blocks"])
def test_a_rank_reads_what_it_sees_and_nothing_behind_its_last_query(name, layout, offset):
    """Positions of queries may begin later than those of keys, by sequence too."""
    T, world = 1000, 3
    plan, layout = plans(T)[name]()._changed(q_offset=offset), Layout.of(layout, T, world)
    found, seen = readers(plan, layout), plan.to_dense().any(1).any(0)
    for rank, tokens in enumerate(layout.ranks):
        assert not (seen[tokens].any(0) & ~found[rank]).any()
        last = int(tokens.max()) + int(torch.as_tensor(offset).max())
        assert not plan.causal or not found[rank, last + 1 :].any()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", [*NAMES, "auto"])
@pytest.mark.parametrize("name", ["hash 8", "qk-sparse, half"])
def test_shards_of_sorted_plans_visit_their_share(name, layout, world):
    """Of tiles of which each rank has few rows those with equal lists are joined."""
    plan = plans(T // 2)[name]()
    layout = balance(plan, world) if layout == "auto" else Layout.of(layout, T // 2, world)
    made = parts(plan, layout)
    area = visits(made)
    share = areas(plan, layout).sum(1)  # of the global plan's area, what its queries on each rank have
    assert sum(visible_pairs(x) for row in made for some in row for x in some) == visible_pairs(plan)
    assert bool((area.sum(1) <= 1.3 * share).all()), area.sum(1) / share


def test_a_window_needs_its_own_length_of_one_neighbour():
    window = sf.Plan.dense(T, T, causal=True, window=(1023, 0))
    layout = Layout.of("contiguous", T, 4)
    others = torch.arange(4)[:, None] != layout.owner
    read = (readers(window, layout) & others).sum(1).tolist()
    assert read[0] == 0 and all(1023 <= n <= 1.2 * 1024 for n in read[1:])

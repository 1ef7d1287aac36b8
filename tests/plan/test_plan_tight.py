"""Plans list no more than is seen and test no more than is in doubt; made in pieces they are the same."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch.nn.functional import pad

import plans
from harness import unseen
from sparseflash import Plan, PlanError
from sparseflash.plan import algebra
from sparseflash.plan.checks import surely_full
from sparseflash.plan.draw import draw
from sparseflash.plan.entries import ranges
from sparseflash.plan.figures import dense_pairs, partial_area, visible_pairs, visited_area
from sparseflash.plan.transpose import transpose_spans

KINDS = sorted(plans.KINDS)


def listed(plan):
    """Which key rows each tile visits, and which of them without a test: bool [B, H, R, key rows] each."""
    batch, heads = plan.extent()
    visited = torch.zeros(2, batch, heads, plan.tiles, plan.k_rows + 1, dtype=torch.long).numpy()
    for lists in plan.lists():
        own = lists.laid_out(batch, heads)
        tables = [x.tolist() for x in (own.start, own.full, own.count, own.pool)]
        for b, h, r in itertools.product(range(batch), range(heads), range(plan.tiles)):
            start, full, count = (x[b][h][r] for x in tables[:3])
            for n, entry in enumerate(tables[3][start : start + count]):
                lo, hi = entry if isinstance(entry, list) else (entry * plan.unit, (entry + 1) * plan.unit)
                hi = min(hi, plan.k_rows)
                visited[: 1 + (n < full), b, h, r, lo] += 1
                visited[: 1 + (n < full), b, h, r, hi] -= 1
    return torch.from_numpy(visited).cumsum(-1)[..., :-1].bool().unbind(0)


def seen(plan):
    """Which key rows some, and all, queries of each tile see, by the mask: bool [B, H, R, key rows] each."""
    batch, heads = plan.extent()
    mask = pad(plan.to_dense().expand(batch, heads, -1, -1), (0, 1, 0, 1))  # the token -1 is seen by nobody
    q, k = torch.arange(plan.Tq).view(1, 1, -1), torch.arange(plan.Tk).view(1, 1, -1)
    q, k = (plans._spread(own if x is None else x.long(), heads).expand(batch, -1, -1)
            for x, own in ((plan.q_order, q), (plan.k_order, k)))  # fmt: skip
    q = pad(q, (0, plan.tiles * plan.tile - q.shape[-1]), value=-1)
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    rows = mask[b, h, q[..., None], k[:, :, None]].view(batch, heads, plan.tiles, plan.tile, k.shape[-1])
    real = (q >= 0).view(batch, heads, plan.tiles, plan.tile, 1)
    return rows.any(3), (rows | ~real).all(3) & real.any(3)


def by_unit(x, plan, how):
    """Of key rows, whether any or all of each unit are so; of one that the end of the keys cuts, not all."""
    short = -plan.k_rows % plan.unit
    x = pad(x, (0, short), value=False).unflatten(-1, (-1, plan.unit))
    return getattr(x, how)(-1)


def by_key(x, plan):
    """Of each key row, whether any of its unit is so."""
    return by_unit(x, plan, "any").repeat_interleave(plan.unit, -1)[..., : plan.k_rows]


MADE = {
    "dense": lambda Tq, Tk, tile, unit, at: Plan.dense(Tq, Tk, causal=True, q_offset=at, tile=tile),
    "all": lambda Tq, Tk, tile, unit, at: Plan.dense(Tq, Tk, tile=tile),
    "window": lambda Tq, Tk, tile, unit, at: Plan.dense(
        Tq, Tk, causal=True, window=(5, 0), q_offset=at, tile=tile
    ),
    "narrow": lambda Tq, Tk, tile, unit, at: Plan.dense(Tq, Tk, window=(0, 0), q_offset=at, tile=tile),
    "ahead": lambda Tq, Tk, tile, unit, at: Plan.dense(Tq, Tk, window=(2, 3), q_offset=at, tile=tile),
    "sink": lambda Tq, Tk, tile, unit, at: Plan.dense(
        Tq, Tk, causal=True, window=(4, 0), sink_tokens=2, q_offset=at, tile=tile
    ),
    "blocks": lambda Tq, Tk, tile, unit, at: Plan.from_blocks(
        torch.ones(1, 1, -(-Tq // tile), -(-Tk // unit), dtype=torch.bool),
        Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=True, q_offset=at,
    ),
    "keys": lambda Tq, Tk, tile, unit, at: Plan.from_keys(
        torch.arange(-(-Tk // unit)).expand(1, 1, -(-Tq // tile), -1).clone(),
        Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=True, q_offset=at,
    ),
    "ascending keys": lambda Tq, Tk, tile, unit, at: Plan.from_keys(
        torch.arange(-(-Tk // unit)).expand(1, 1, -(-Tq // tile), -1).clone(),
        Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=True, q_offset=at, ascending=True,
    ),
    "spans": lambda Tq, Tk, tile, unit, at: Plan.from_spans(
        torch.tensor([0, Tk // 2, Tk // 2, Tk]).view(1, 1, 1, 2, 2).expand(-1, -1, -(-Tq // tile), -1, -1),
        Tq=Tq, Tk=Tk, tile=tile, causal=True, q_offset=at,
    ),
    "documents": lambda Tq, Tk, tile, unit, at: Plan.from_documents(
        torch.tensor([0, Tq // 3, Tq]), torch.tensor([0, Tk // 2, Tk]), causal=False, tile=tile
    ),
    "buckets": lambda Tq, Tk, tile, unit, at: Plan.from_buckets(
        torch.arange(Tq).view(1, 1, -1) % 3, torch.arange(Tk).view(1, 1, -1) % 3, tile=tile
    ),
    "kept": lambda Tq, Tk, tile, unit, at: Plan.from_keep(
        torch.arange(Tq).view(1, 1, -1) % 3 > 0, torch.arange(Tk).view(1, 1, -1) % 2 > 0, tile=tile
    ),
    "mask": lambda Tq, Tk, tile, unit, at: Plan.from_mask(
        (torch.arange(Tq)[:, None] * 7 + torch.arange(Tk) // 3)[None, None] % 5 > 1, tile=tile, unit=unit
    ),
}  # fmt: skip
EDGES = [
    (1, 1), (7, 7), (8, 8), (9, 9), (16, 16), (17, 17), (8, 15), (8, 16), (8, 17), (17, 8), (1, 17), (33, 31),
]  # fmt: skip


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("Tq", "Tk"), EDGES)
def test_lists_hold_what_is_seen_and_test_what_is_in_doubt(name, Tq, Tk):
    for (tile, unit), at in itertools.product(((8, 4), (1, 1), (16, 3)), {0, 1, Tk - Tq}):
        plan = MADE[name](Tq, Tk, tile, unit, at).check()
        assert tight(plan, sure=name != "sink"), (tile, unit, at)


def tight(plan, sure=True):
    """Whether a plan visits what some query sees, in whole units, and tests what is in doubt alone."""
    visited, full = listed(plan)
    some, every = seen(plan)
    if plan.index is not None:  # a unit is visited as a whole
        mixed = by_key(some, plan) & by_key(~every, plan)
        mixed = mixed | (torch.arange(plan.k_rows) >= plan.k_rows // plan.unit * plan.unit)  # cut by the end
        full, every = full & ~mixed, every & ~mixed
        visited, some = by_key(visited, plan), by_key(some, plan)
    return torch.equal(visited, some) and (not sure or torch.equal(full, every))


def pages(Tq, n, page=4):
    """A cache of three sequences, of n keys and one more or less, in pages that stand in any order."""
    lengths = torch.tensor([max(n - 1, 0), n, n + 1])
    each = -(-(n + 1) // page)
    table = torch.randperm(3 * each, generator=torch.Generator().manual_seed(n)).view(3, each)
    return table, lengths, {"page_size": page, "Tk": 3 * each * page}


def of_pages(table, lengths, Tq, page, Tk, seen=lambda b, n: n >= 0):
    """Which keys of the pool the last queries of each sequence see, of the pages that `seen` says."""
    mask = torch.zeros(len(lengths), 1, Tq, Tk, dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        at = torch.arange(length)
        sees = (at <= length - Tq + torch.arange(Tq)[:, None]) & seen(b, at // page)
        mask[b, 0][:, table[b][at // page] * page + at % page] = sees
    return mask


def told(Tq, Tk, tile, unit, at):
    """Plans of what queries, keys and tables say, each with its mask by the sentence in its docstring."""
    q, k = torch.arange(Tq)[:, None], torch.arange(Tk)
    low, high = (q[:, 0] * 3 + 1) % (Tk + 1), (q[:, 0] * 5) % (Tk + 1)
    yield (
        "intervals",
        Plan.from_intervals(low[None, None], high[None, None], Tk=Tk, tile=tile, unit=unit),
        ((low[:, None] <= k) & (k < high[:, None])),
    )
    yield "prefixes", Plan.from_intervals(None, high[None, None], Tk=Tk, tile=tile), k < high[:, None]
    a, b = (q[:, 0] - 3).clamp(0, Tk), (q[:, 0] + 2).clamp(0, Tk)
    moving = Plan.from_intervals(a[None, None], b[None, None], Tk=Tk, tile=tile, moving=True)
    yield "moving", moving, (a[:, None] <= k) & (k < b[:, None])
    two = (
        torch.stack([low, torch.full_like(low, Tk // 2)], -1),
        torch.stack([high, torch.full_like(low, Tk)], -1),
    )
    yield (
        "two intervals",
        Plan.from_intervals(*(x[None, None] for x in two), Tk=Tk, tile=tile, unit=unit),
        ((low[:, None] <= k) & (k < high[:, None]) | (k >= Tk // 2)),
    )
    end = k + k % 4 * 2
    for n in (None, unit):
        made = Plan.from_expiry(end.view(1, 1, -1), Tq=Tq, q_offset=at, tile=tile, unit=n)
        yield f"expiry by {n}", made, (q + at >= k) & (q + at < end)
    begin = (k * 3) % (Tq + 2) - 1
    yield (
        "lifetimes",
        Plan.from_lifetimes(
            begin.view(1, 1, -1), (begin + k % 4).view(1, 1, -1), Tq=Tq, q_offset=at, tile=tile
        ),
        (begin <= q + at) & (q + at < begin + k % 4),
    )
    index = torch.stack([q[:, 0] % (Tk + 2) - 2, (q[:, 0] * 2) % Tk, (q[:, 0] * 2) % Tk], -1).clamp(min=-1)
    for how in (1, tile):
        made = Plan.from_choice(index[None], Tk=Tk, q_offset=at, tile=how)
        yield f"choice by {how}", made, (index[..., None] == k).any(1) & (k <= q + at)
    block = (index // unit).clamp(min=-1)
    made = Plan.from_choice(block[None], Tk=Tk, q_offset=at, unit=unit, tile=tile)
    yield "choice of blocks", made, (block[..., None] == k // unit).any(1) & (k <= q + at)
    hide = torch.stack([(k * 2) % (Tq + 1), (k * 2) % (Tq + 1) + k % 3], -1)
    shown = ~((q >= hide[:, 0]) & (q < hide[:, 1]))
    yield (
        "flashmask, causal",
        Plan.from_flashmask(hide[None, None], causal=True, Tq=Tq, tile=tile, unit=unit),
        (shown & (q >= k)),
    )
    yield (
        "flashmask of one",
        Plan.from_flashmask(hide[None, None, :, :1], causal=True, Tq=Tq, tile=tile),
        ((q >= k) & (q < hide[:, 0])),
    )
    yield (
        "flashmask of two",
        Plan.from_flashmask(hide[None, None], causal=False, Tq=Tq, tile=tile),
        ((q < hide[:, 0]) & (q >= hide[:, 1])),
    )
    four = torch.cat([hide, hide + 2], -1)
    made = Plan.from_flashmask(four[None, None], causal=False, Tq=Tq, tile=tile, unit=unit)
    yield "flashmask of four", made, shown & ~((q >= hide[:, 0] + 2) & (q < hide[:, 1] + 2))
    for kind in range(4):
        (qa, qb), (ka, kb) = (Tq // 4, Tq), (Tk // 3, Tk)
        inside = (q >= qa) & (q < qb) & (k >= ka) & (k < kb)
        if kind in (1, 3):
            inside = inside & (kb - 1 - k >= qb - 1 - q)
        if kind in (2, 3):
            inside = inside & (k - ka >= q - qa)
        made = Plan.from_slices([[qa, qb]], [[ka, kb]], [kind], Tq=Tq, Tk=Tk, tile=tile, unit=unit)
        yield f"slice of kind {kind}", made, inside
    rows, wide = -(-Tq // tile), -(-Tk // unit)
    blocks = (torch.arange(rows)[:, None] + torch.arange(wide)) % 2 == 0
    grid = blocks.repeat_interleave(tile, 0).repeat_interleave(unit, 1)[:Tq, :Tk]
    starts = pad(blocks.sum(1).cumsum(0), (1, 0))
    yield (
        "block sparse rows",
        Plan.from_bsr(
            starts, blocks.nonzero()[:, 1], Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=True, q_offset=at
        ),
        grid & (q + at >= k),
    )
    pairs = (q * 3 + k) % 4 == 0
    yield "sparse", Plan.from_sparse(pairs.float().to_sparse(), tile=tile, unit=unit), pairs
    far = torch.tensor([0, 1, tile, Tk])
    named = torch.tensor([0, Tk - 1, 0, -1])
    first = q // tile * tile + at
    near = (first[..., None] - far <= k[:, None]) & (k[:, None] < first[..., None] - far + tile)
    yield (
        "slashes",
        Plan.from_slashes(named.view(1, 1, -1), far.view(1, 1, -1), Tq=Tq, Tk=Tk, tile=tile, q_offset=at),
        (near.any(-1) | (k[:, None] == named).any(-1)) & (q + at >= k),
    )
    yield (
        "lengths",
        Plan.from_lengths(torch.tensor([Tk - 1, Tk]), Tk=Tk, Tq=Tq),
        (k <= q + torch.tensor([Tk - 1, Tk]).view(2, 1, 1, 1) - Tq),
    )
    table, lengths, size = pages(Tq, Tk)
    mask = of_pages(table, lengths, Tq, 4, size["Tk"])
    yield "pages", Plan.from_pages(table, lengths, Tq=Tq, **size), mask
    for begin in (1, torch.tensor([0, 1, 2]).clamp(max=table.shape[1])):
        each = torch.as_tensor(begin).expand(3)
        made = Plan.from_pages(table, lengths, Tq=Tq, first_page=begin, **size)
        yield (
            f"pages from {begin}",
            made,
            of_pages(table, lengths, Tq, 4, size["Tk"], lambda b, n: n >= each[b]),
        )
    pick = torch.tensor([0, -1, 1]).expand(3, 1, 3).clone()
    pick[2, 0, 1] = table.shape[1] - 1 if table.shape[1] > 2 else -1
    pick = torch.where(pick < table.shape[1], pick, -1)
    made = Plan.from_pages(table, lengths, Tq=Tq, choice=pick, **size)
    yield (
        "chosen pages",
        made,
        of_pages(table, lengths, Tq, 4, size["Tk"], lambda b, n: torch.isin(n, pick[b])),
    )


LOOSE = {"moving", "lifetimes", "slashes", "lengths"}
LOOSE |= {"flashmask of one", "flashmask of two", *(f"expiry by {n}" for n in (None, 1, 3, 4, 8))}
"""Whose lists hold ranges of their neighbours too, for fewer entries."""


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (7, 7), (8, 8), (9, 9), (8, 17), (17, 8), (1, 17)])
def test_plans_of_what_tables_say_are_their_masks_at_every_edge(Tq, Tk):
    for (tile, unit), ats in (((8, 4), (0, Tk - Tq)), ((1, 1), (1,)), ((16, 3), (-1, 0))):
        for at in ats:
            for name, plan, mask in told(Tq, Tk, tile, unit, at):
                want = mask.expand(plan.extent()[0], 1, -1, -1)
                assert torch.equal(plan.check().to_dense(), want), (name, tile, unit, at)
                assert name in LOOSE or tight(plan), (name, tile, unit, at)


@pytest.mark.parametrize(("T", "tile", "unit"), [(24, 4, 3), (23, 4, 4), (17, 8, 2), (9, 1, 1), (12, 5, 16)])
@pytest.mark.parametrize("at", [0, 3])
def test_units_of_keys_that_expire_are_visited_as_long_as_one_lives(T, tile, unit, at):
    """From the query that its first key begins with, to the one before the last of its ends."""
    end = torch.arange(T) + torch.arange(T) * 5 % 7
    plan = Plan.from_expiry(end.view(1, 1, -1), Tq=T, q_offset=at, tile=tile, unit=unit)
    visited, full = listed(plan)
    for r in range(plan.tiles):
        first, last = r * tile + at, min((r + 1) * tile, T) - 1 + at
        for u in range(-(-T // unit)):
            keys = slice(u * unit, min((u + 1) * unit, T))
            lives = u * unit <= last and int(end[keys].max()) > first
            whole = (u + 1) * unit <= T and keys.stop - 1 <= first and int(end[keys].min()) > last
            assert visited[0, 0, r, keys].tolist() == [lives] * (keys.stop - keys.start), (r, u)
            assert full[0, 0, r, keys].tolist() == [lives and whole] * (keys.stop - keys.start), (r, u)


@pytest.mark.parametrize("seed", range(30))
def test_what_is_combined_bit_by_bit_lists_what_is_left(seed):
    """Units of which nothing is left are gone, and those of which all is left need no bits."""
    a, b = (plans.example(seed + n, kind, batch=2, heads=2, Tq=33, Tk=50, tile=8, unit=8).plan
            for n, kind in enumerate(("mask", "blocks")))  # fmt: skip
    whole = Plan.dense(33, 50, tile=8, unit=8)
    for made in (a & b, a - b, whole - a, whole.retile(4, 4) - b, a.retile(16, 24)):
        assert made.bits is None or made.spans is not None or tight(made)


RULES = [
    {"causal": True},
    {"causal": True, "include_self": False},
    {"include_self": False},
    {"window": (4, 0)},
    {"window": (3, 2)},
    {"window": (None, 2)},
    {"causal": True, "window": (4, None)},
    {"causal": True, "window": (2, 0), "include_self": False},
    {"causal": True, "window": (0, 0), "sink": 3},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("how", ["offset", "places", "ordered"])
def test_what_the_ends_of_ranges_say_is_what_all_their_pairs_say(rules, how):
    """Ranges that all queries of a tile see are known to be so without a look at any pair."""
    ends = [(lo, hi) for lo in range(12) for hi in range(lo + 1, min(lo + 5, 13))]
    given = torch.tensor(ends).view(1, len(ends), 1, 1, 2)
    at = {"q_offset": 5}
    if how == "places":
        at = {
            "q_pos": (torch.arange(3) + 5).int().view(1, 1, -1),
            "k_pos": torch.arange(12).int().view(1, 1, -1),
        }
    if how == "ordered":
        at["k_order"] = torch.arange(12).int().view(1, 1, -1)
    plan = Plan.from_spans(given, Tq=3, Tk=12, tile=4)._changed(**rules, **at, span_full=None)
    plan = plan._changed(span_full=torch.zeros_like(plan.span_count))
    sure = surely_full(plan, ranges(plan))
    mask = plan.to_dense()
    want = [bool(mask[0, h, :, lo:hi].all()) for h, (lo, hi) in enumerate(ends)]
    if "sink" in rules:  # some in the sink, others near: that takes a look
        want = [w and not (lo < 3 < hi) for w, (lo, hi) in zip(want, ends, strict=True)]
    assert sure.tolist() == want and (any(want) or "sink" in rules or rules.get("window") == (2, 0))


@pytest.mark.parametrize(("Tq", "Tk"), [(128, 128), (256, 384), (257, 256), (256, 257), (1, 256), (255, 129)])
@pytest.mark.parametrize("name", ["dense", "all", "window", "narrow", "ahead", "kept"])
def test_transposes_made_unseen_visit_what_others_do(name, Tq, Tk):
    """Of ranges whose ends only move on, a run of neighbours holds nobody who does not touch the group."""
    for tile in (64, 128):
        plan = MADE[name](Tq, Tk, tile, 64, Tk - Tq)
        with unseen():
            other = MADE[name](Tq, Tk, tile, 64, Tk - Tq)
            keys = transpose_spans(other.span_lists, other.k_rows)
        want = transpose_spans(plan.span_lists, plan.k_rows)
        visits = [int((x.until - x.index).clamp(min=0).sum()) for x in (keys, want)]
        assert visits[0] == visits[1], tile


@pytest.mark.parametrize("kind", ["buckets", "kept", "causal", "window"])
@pytest.mark.parametrize("told", ["q_pos", "k_pos", "both"])
def test_a_part_is_as_tight_where_positions_are_told(kind, told, generator):
    """Tiles of few queries are joined where positions tell their keys apart, whoever says the positions."""
    T = 512
    bucket = torch.randint(4, (1, 1, T), generator=generator)
    plan = {
        "buckets": lambda: Plan.from_buckets(bucket, bucket, tile=32),
        "kept": lambda: Plan.from_keep(bucket > 0, bucket > 0, tile=32),
        "causal": lambda: Plan.dense(T, T, causal=True, tile=32),
        "window": lambda: Plan.dense(T, T, causal=True, window=(40, 0), tile=32),
    }[kind]()
    at = torch.arange(T).int().view(1, 1, -1)
    named = {"q_pos": at, "k_pos": at} if told == "both" else {told: at}
    other = plan._changed(**named)
    some = torch.arange(0, T, 3)
    for q, k in ((some, None), (some, some), (None, some), (torch.arange(100, 300), torch.arange(250))):
        parts = [x.restrict(q, k) for x in (plan, other)]
        assert parts[0].tiles == parts[1].tiles
        assert visited_area(parts[0]) == visited_area(parts[1])
        assert partial_area(parts[0]) == partial_area(parts[1])


@pytest.mark.parametrize("width", [1, 2, 3, 8, 48])
def test_a_drawing_has_as_many_lines_as_half_its_width(width):
    lines = draw(Plan.dense(64, 64, causal=True), width).splitlines()[2:]
    assert len(lines) == max(1, width // 2) and {len(x) for x in lines} == {width}
    assert lines[-1][0] in " ░▒▓█"[1:]


def test_bits_are_built_up_to_the_limit_and_not_beyond(monkeypatch):
    mask = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    a, b = Plan.from_mask(mask, tile=16, unit=64), Plan.from_mask(~mask, tile=16, unit=64)
    size = 4 * 16 * 2 * 8  # units, queries, words of 32 keys, bytes
    monkeypatch.setattr(algebra, "LIMIT", size)
    assert not (a & b).to_dense().any()
    monkeypatch.setattr(algebra, "LIMIT", size - 1)
    with pytest.raises(PlanError, match="GiB of bits"):
        a & b


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_lists_and_the_mask(kind):
    for seed in range(0, 12, 2):
        plan = plans.example(seed, kind, batch=2, heads=4, Tq=seed * 3, Tk=5 + 2 * seed).plan
        batch, heads = plan.extent()
        visited, sure = listed(plan)
        some, _ = seen(plan)
        assert not bool((some & ~visited).any())
        rows = torch.tensor([min(plan.tile, plan.q_rows - r * plan.tile) for r in range(plan.tiles)])
        assert visited_area(plan) == int((visited.sum(-1) * rows).sum())
        assert partial_area(plan) == int((visited & ~sure).sum()) * plan.tile
        pairs = int(plan.to_dense().expand(batch, heads, -1, -1).sum())
        assert visible_pairs(plan) == pairs
        area = plan.Tq * plan.Tk * batch * heads
        assert plan.work == pytest.approx(visited_area(plan) / area if area else 0.0)
        allowed, open_ = (
            dense_pairs(plan),
            dense_pairs(plan._changed(window=None, sink=0, head_window=None, head_sink=None)),
        )
        assert plan.density == pytest.approx(pairs / allowed if allowed else 1.0)
        assert plan.kept == pytest.approx(pairs / open_ if open_ else 1.0)


@pytest.mark.parametrize("seed", range(60))
def test_pairs_that_the_rules_allow_are_counted(seed):
    plan = plans.example(seed, "lists", batch=2, heads=4, Tq=seed % 13, Tk=(seed * 5) % 17).plan
    bare = plan._changed(k_end=None, q_seg=None, k_seg=None)
    q, k = (torch.arange(T).numpy() for T in (plan.Tq, plan.Tk))
    places = [(b, h) for b in range(bare.extent()[0]) for h in range(bare.extent()[1])]
    want = sum(int(plans._formula(bare, q, k, b, h)[1].sum()) for b, h in places)
    assert dense_pairs(bare) == want


PIECES = {
    "plan.entries.CELLS": ("lists", "mask", "heads", "keep"),
    "plan.transpose.ENTRIES": ("lists", "blocks"),
    "plan.restrict.CHUNK": ("lists", "mask"),
    "plan.make.listed.CHUNK": ("blocks", "lives"),
    "plan.make.masks.SLAB": ("mask",),
}


def same(a, b):
    """Whether two plans have the same lists."""
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("where", "kind"), [(where, kind) for where, kinds in PIECES.items() for kind in kinds]
)
def test_in_pieces_of_any_size_a_plan_is_the_same(where, kind, monkeypatch):
    """What is made some at a time, to keep memory within bounds, is what is made at once."""
    room, name = where.rsplit(".", 1)

    def made():
        plan = plans.example(5, kind, batch=2, heads=4, Tq=20, Tk=35, tile=8, unit=16).plan
        part = plan.restrict(torch.arange(1, 20, 2), torch.arange(0, 35, 3))
        ready = plan.prepare()
        keys = [x for x in (ready.span_keys, ready.unit_keys) if x is not None]
        tables = [vars(x) for x in keys]
        return (
            plan,
            part,
            tables,
            (plan.work, plan.density, plan.kept, visible_pairs(plan)),
            plan.check().to_dense(),
        )

    want = made()
    for size in (7, 150):
        monkeypatch.setattr(importlib.import_module(f"sparseflash.{room}"), name, size)
        got = made()
        assert same(want[0], got[0]) and same(want[1], got[1])
        for a, b in zip(want[2], got[2], strict=True):
            assert all(
                torch.equal(x, b[n]) if isinstance(x, torch.Tensor) else x == b[n] for n, x in a.items()
            )
        assert want[3] == got[3] and torch.equal(want[4], got[4])

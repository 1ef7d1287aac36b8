"""Plans of caches, of offsets and of windows by head, at the edges of what tells them; and their pictures."""

from __future__ import annotations

import pytest
import torch

import plans
from sparseflash import Plan
from sparseflash.plan.draw import draw, picture
from test_plan_tight import of_pages, pages, tight


def test_a_window_over_pages_lists_the_pages_that_may_hold_it():
    """Whose bits are as few: one query at position 14 sees keys 9..14 and 0, 1 of pages of four."""
    table = torch.arange(8).flip(0).view(1, -1)
    one = Plan.from_pages(table, torch.tensor([15]), page_size=4, Tk=32, window=(5, 0), sink_tokens=2).check()
    seen = sorted((7 - at // 4) * 4 + at % 4 for at in (0, 1, *range(9, 15)))
    assert one.to_dense()[0, 0, 0].nonzero()[:, 0].tolist() == seen
    assert int(one.count.sum()) == 3 and len(one.index) == 1 + 3 and len(one.bits) <= 4
    two = Plan.from_pages(table, torch.tensor([15]), page_size=4, Tk=32, Tq=3, window=(5, 0)).check()
    assert len(two.index) == 3 and tight(two)


@pytest.mark.parametrize("n", [5, 8, 17])
def test_packed_queries_of_a_cache_visit_what_they_see(n):
    """Sequences of one, three and no queries, in tiles of their mean."""
    table, lengths, size = pages(1, n)
    counts = (1, min(3, n), 0)
    edges = torch.tensor([0, 1, 1 + counts[1], 1 + counts[1]])
    plan = Plan.from_pages(table, lengths, cu_seqlens_q=edges, **size).check()
    rows = [of_pages(table, lengths, count, 4, size["Tk"])[b, 0] for b, count in enumerate(counts)]
    assert torch.equal(plan.to_dense()[0, 0], torch.cat(rows)) and tight(plan)


def _placed(T):
    """Constructors that take the position of the first query, of T queries and keys."""
    ids = torch.arange(T).view(1, 1, -1)
    tiles = torch.arange(-(-T // 4)).view(1, 1, -1, 1)
    how = {"Tq": T, "Tk": T, "tile": 4}
    return {
        "dense": lambda at: Plan.dense(T, T, causal=True, q_offset=at, tile=4),
        "window": lambda at: Plan.dense(T, T, causal=True, window=(3, 0), sink_tokens=1, q_offset=at),
        "ahead": lambda at: Plan.dense(T, T, window=(3, 2), q_offset=at, tile=4),
        "blocks": lambda at: Plan.from_blocks(
            torch.ones(1, 1, -(-T // 4), -(-T // 4)) > 0, **how, unit=4, causal=True, q_offset=at
        ),
        "keys": lambda at: Plan.from_keys(tiles, **how, unit=4, causal=True, q_offset=at),
        "ascending": lambda at: Plan.from_keys(
            tiles, **how, unit=4, causal=True, q_offset=at, ascending=True
        ),
        "spans": lambda at: Plan.from_spans(
            torch.tensor([0, T]).expand(1, 1, -(-T // 4), 1, 2), **how, causal=True, q_offset=at
        ),
        "choice": lambda at: Plan.from_choice(ids.mT // 2, Tk=T, q_offset=at, tile=1),
        "choice by tiles": lambda at: Plan.from_choice(ids.mT // 2, Tk=T, q_offset=at, tile=4),
        "slashes": lambda at: Plan.from_slashes(ids[..., :2], ids[..., 1:3], **how, q_offset=at),
        "buckets": lambda at: Plan.from_buckets(ids % 2, ids % 2, q_offset=at, tile=4),
        "buckets and window": lambda at: Plan.from_buckets(ids % 2, ids % 2, window=(1, 0), q_offset=at),
        "expiry": lambda at: Plan.from_expiry(ids + ids % 4, Tq=T, q_offset=at, tile=4),
        "expiry by unit": lambda at: Plan.from_expiry(ids + ids % 4, Tq=T, q_offset=at, tile=4, unit=4),
        "lifetimes": lambda at: Plan.from_lifetimes(ids, ids + ids % 4, Tq=T, q_offset=at, tile=4),
    }


@pytest.mark.parametrize("name", _placed(9))
def test_an_offset_is_a_number_or_a_tensor_or_one_of_each_sequence(name):
    make = _placed(9)[name]
    one, two = (make(at).check().to_dense() for at in (2, -1))
    both = make(torch.tensor([2, -1], dtype=torch.int32)).check()
    assert both.extent()[0] == 2 and torch.equal(both.to_dense(), torch.cat([one, two]))
    assert not torch.equal(one, two)
    for same in (torch.tensor(2), torch.tensor(2, dtype=torch.int32), torch.tensor([2])):
        assert torch.equal(make(same).check().to_dense(), one)


def test_one_window_of_all_heads_stays_one_and_two_are_a_table():
    near, far, plain = (Plan.dense(40, 40, causal=True, window=w) for w in ((5, 0), (9, 0), None))
    assert Plan.by_head([near, near]).window == (5, 0) and Plan.by_head([near, near]).head_window is None
    for pair in ((near, far), (near, plain), (plain, near)):
        both = Plan.by_head(pair).check()
        assert both.window is None and both.head_window.shape == (1, 2, 2)
        assert torch.equal(both.to_dense(), torch.cat([p.to_dense() for p in pair], 1))


@pytest.mark.parametrize("kind", sorted(plans.KINDS))
def test_a_picture_of_small_cells_is_the_share_of_their_pairs(kind):
    """Of the batch slot and the head that are asked for; of several plans, of the pairs of any."""
    plan = plans.example(11, kind, batch=2, heads=4, Tq=23, Tk=40).plan
    (batch, heads), mask = plan.extent(), plan.to_dense().float()
    rows, columns = 5, 7
    ends = [torch.arange(n + 1) * T // n for n, T in ((rows, 23), (columns, 40))]
    for b, h in ((0, 0), (batch - 1, heads - 1)):
        seen = picture(plan, rows, columns, batch=b, head=h)
        for i in range(rows):
            for j in range(columns):
                cell = mask[b, h, ends[0][i] : ends[0][i + 1], ends[1][j] : ends[1][j + 1]]
                assert float(seen.share[i, j]) == pytest.approx(float(cell.mean())), (i, j)
                assert bool(seen.touched[i, j]) or not cell.any()
    whole = (plan, Plan.dense(23, 40) - plan)
    assert bool((picture(whole, rows, columns).share == 1).all())


def test_a_picture_of_one_head_of_a_plan_for_all_is_that_plans():
    one, two = Plan.dense(8, 8, causal=True), Plan.dense(8, 8, window=(torch.tensor([0, 3]), 0))
    for h in range(2):
        seen = picture((one & two, two - one), 8, 8, head=h)
        assert torch.equal(seen.share, two.to_dense()[0, h].float())


@pytest.mark.parametrize(("causal", "window"), [(True, (9, 0)), (False, (2, 30)), (True, None)])
def test_cells_that_a_band_crosses_are_marked_however_few_pairs_are_sampled(causal, window):
    """Cells of 64 tokens and tiles of 16: those that the ranges of a first or a last query's tile reach."""
    plan = Plan.dense(256, 256, causal=causal, window=window, tile=16)
    for columns in (4, 8):
        near = plan.to_dense()[0, 0].unflatten(0, (4, 64)).unflatten(2, (columns, 256 // columns))
        near = near.any(3).any(1)
        assert torch.equal(picture(plan, 4, columns).touched, near)
    assert [[x != " " for x in line] for line in draw(plan, 8).splitlines()[2:]] == near.tolist()


def test_the_axes_of_a_picture_count_keys_to_the_right_and_queries_downwards(tmp_path, monkeypatch):
    axes, drawn = pytest.importorskip("matplotlib.axes"), []
    show = axes.Axes.imshow
    monkeypatch.setattr(axes.Axes, "imshow", lambda *a, **b: drawn.append((a[1].shape, b)) or show(*a, **b))
    Plan.dense(3, 5).plot(tmp_path / "plan.png")
    ((shape, how),) = drawn
    assert shape == (3, 5, 3) and how["extent"] == (0, 5, 3, 0)


def test_a_shade_is_the_share_of_a_cells_pairs():
    """Of sixteen keys 0, 1, 4, 8, 12, 15 and 16: none at all, and all at the last alone."""
    counts = torch.tensor([0, 1, 4, 8, 12, 15, 16])
    hi = torch.arange(7) * 16 + counts
    plan = Plan.from_spans(
        torch.stack([torch.arange(7) * 16, hi], -1).view(1, 1, 1, 7, 2), Tq=1, Tk=112, tile=1
    )
    assert draw(plan, 7).splitlines()[2:] == [" ░░▒▓██"]


def test_an_explanation_counts_entries_keys_and_bytes():
    """Two tiles of two heads: 3 + 5 keys for sure and 2 in doubt, twice."""
    spans = torch.tensor([[[0, 3], [0, 0]], [[0, 5], [6, 8]]]).view(1, 1, 2, 2, 2).expand(1, 2, -1, -1, -1)
    plan = Plan.from_spans(spans, Tq=4, Tk=9, tile=2)
    plan = plan._changed(span_full=(plan.span_count > 0).int())
    said = plan.explain()
    assert "4 queries x 9 keys, 2 lists of 2 tiles (2 rows each)" in said
    assert "rows: 4 of queries, 9 of keys\n" in said
    assert "entries: 6 (1.5 a tile); of the keys visited 80% need no element test" in said
    assert f"kept {20 / 36:.4f} of all pairs, density {20 / 36:.4f} of" in said
    assert f"work {20 / 36:.4f} of Tq x Tk" in said
    size = sum(x.numel() * x.element_size() for x in plan.tensors().values())
    assert f"memory {size / 2**20:.2f} MiB" in said

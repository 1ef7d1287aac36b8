"""The small functions that all of `plan/` stands on, at their edges, against what they say."""

from __future__ import annotations

import math

import pytest
import torch

from sparseflash import Plan, PlanError
from sparseflash.plan import options, stamps
from sparseflash.plan.bits import bit, pack_bits
from sparseflash.plan.make.extremes import RangeExtremes, extremes
from sparseflash.plan.make.rows import begins_of, compact_order, edge_rows, tile_ends

INT = 2**31


@pytest.mark.parametrize(
    ("x", "least", "count", "length"),
    [
        (0, 0, True, True),
        (-1, 0, False, False),
        (-1, -1, True, True),
        (1, 1, True, True),
        (0, 1, False, False),
        (INT - 1, 0, True, True),
        (INT, 0, True, False),
        (True, 0, False, False),
        (False, 0, False, False),
        (1.0, 0, False, False),
        ("1", 0, False, False),
        (None, 0, False, False),
    ],
)
def test_what_is_a_count_and_what_a_length(x, least, count, length):
    assert options.is_count(x, least) == count and options.is_length(x, least) == length


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ([], 1),
        ([1], 1),
        ([3], 3),
        ([1, 3, 1, 3], 3),
        ([3, 1], 3),
        ([2, 3], None),
        ([0], 0),
        ([1, 0], 0),
        ([0, 2], None),
        ([2, 0], None),
    ],
)
def test_sizes_broadcast_to_one(sizes, want):
    assert options.joint(sizes) == want


def test_multiples_and_divisors_are_those_of_math():
    for a in range(1, 13):
        for b in range(1, 13):
            for c in (1, 2, 6, 35):
                assert options.multiple(a, b, c) == math.lcm(a, b, c)
                assert options.divisor(a, b, c) == options.common(a, b, c) == math.gcd(a, b, c)
    assert options.multiple() == 1 and options.multiple(0, 2) == 0 and options.multiple(2, 0) == 0
    assert (
        options.divisor() == options.common() == 0
        and options.divisor(0, 6) == 6
        and options.divisor(6, 0) == 6
    )
    for size in range(40):
        assert options.doublings(size) == len(bin(max(size, 1))) - 2 and 2 ** options.doublings(size) >= size
        for step in (1, 3, 8):
            parts = options.pieces(size, step)
            assert [x for a, b in parts for x in range(a, b)] == list(range(size))
            assert all(0 < b - a <= step for a, b in parts) and len(parts) == -(-size // step)


@pytest.mark.parametrize(
    ("window", "want"),
    [
        (None, None),
        ((None, None), None),
        ((-1, -1), None),
        ((0, 0), (0, 0)),
        ((3, -1), (3, None)),
        ([None, 4], (None, 4)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1)),
        ((2**32, 0), (None, 0)),
        ((0, 2**32), (0, None)),
        ((2**32, 2**32), None),
    ],
)
def test_a_window_says_on_which_side_it_has_no_end(window, want):
    assert options.normal_window(window) == want


@pytest.mark.parametrize("window", [(-2, 0), (0, -2), (True, 0), (0, 1.0), (1,), (1, 2, 3), 4, "ab"])
def test_what_is_no_window_is_refused(window):
    with pytest.raises(PlanError, match="window="):
        options.normal_window(window)


@pytest.mark.parametrize("offset", [-INT, INT - 1, 0, torch.tensor(3), torch.tensor([INT - 1, -INT])])
def test_an_offset_has_32_bits(offset):
    made = options.normal_offset(offset)
    assert options.same_offset(made, offset)
    assert not isinstance(made, torch.Tensor) or made.dtype == torch.int32


@pytest.mark.parametrize(
    "offset",
    [
        -INT - 1,
        INT,
        True,
        1.0,
        None,
        torch.tensor(1.0),
        torch.tensor([[1]]),
        torch.tensor([INT]),
        torch.tensor([-INT - 1]),
    ],
)
def test_what_is_no_offset_is_refused(offset):
    with pytest.raises(PlanError, match="q_offset"):
        options.normal_offset(offset)


def test_offsets_are_the_same_where_all_their_places_are():
    a, b = torch.tensor([1, 1]), torch.tensor([1, 2])
    assert options.same_offset(a, 1) and options.same_offset(1, a) and options.same_offset(a, a.int())
    assert not options.same_offset(b, 1) and not options.same_offset(a, b) and not options.same_offset(2, 1)
    assert options.same_offset(torch.tensor(1), 1) and not options.same_offset(torch.tensor(2), 1)
    assert options.earlier(5, 2) == 3 and options.earlier(b, 2).tolist() == [-1, 0]
    assert options.shift_of(5, 2) == 5 and options.shift_of(b, 2).shape == (2, 1, 1)
    at = torch.tensor([1, 0, 1])
    assert options.shift_at(5, at) == 5 and options.shift_at(b, at).tolist() == [2, 1, 2]
    assert options.shift_at(b[:1], at).tolist() == [1, 1, 1]


def test_numbers_become_narrow_without_wrapping():
    far = torch.tensor([-(2**40), -INT, 0, INT - 1, 2**40])
    assert options.narrow(far).tolist() == [-INT, -INT, 0, INT - 1, INT - 1]
    with pytest.raises(PlanError, match="x holds"):
        options.narrow(far, "x holds")
    assert options.narrow(far[1:4], "x holds").tolist() == [-INT, 0, INT - 1]
    for low, high, good in ((0, 3, True), (-1, 3, False), (0, 4, False), (3, 3, True)):
        x = torch.tensor([low, high])
        if good:
            assert options.fit(x, "x holds", 0, 3) is x
        else:
            with pytest.raises(PlanError, match=rf"x holds {low}..{high}: expected 0..3"):
                options.fit(x, "x holds", 0, 3)
    assert options.fit(torch.zeros(0).long(), "x holds", 0, 3).numel() == 0


def test_head_axes_are_spread_evenly():
    x = torch.arange(6).view(1, 3, 2)
    assert options.spread_heads(x, 3) is x
    assert options.spread_heads(x, 6)[0, :, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert options.spread_heads(x[:, :1], 4)[0, :, 1].tolist() == [1, 1, 1, 1]
    assert options.laid_out(x, 2, 6).shape == (2, 6, 2)
    a, b = torch.zeros(2, 1, 3), torch.zeros(1, 4, 3)
    assert options.same_batch(a, b, "a, b") == options.same_batch(b, a, "b, a") == 2
    assert options.same_batch(a[:0], b, "a, b") == options.same_batch(b, a[:0], "a, b") == 0
    for wrong in (torch.zeros(3, 1, 3), torch.zeros(2, 0, 3), torch.zeros(2, 1, 3, device="meta")):
        for pair in ((a, wrong), (wrong, a)):
            with pytest.raises(PlanError, match="a, b"):
                options.same_batch(*pair, "a, b")


def test_windows_and_sinks_of_heads_become_tables():
    n = torch.tensor([0, 5, -1])
    assert options.head_rules((3, 0), 2) == ((3, 0), 2, None, None)
    window, sink, pair, sinks = options.head_rules((n, None), 2)
    assert window is None and sink == 0
    assert pair.tolist() == [[[0, -1], [5, -1], [-1, -1]]] and sinks.tolist() == [[[2], [2], [2]]]
    _, _, pair, sinks = options.head_rules((4, n[:1]), torch.tensor([1, 2]))
    assert pair.tolist() == [[[4, 0], [4, 0]]] and sinks.tolist() == [[[1], [2]]]
    _, _, pair, sinks = options.head_rules((torch.tensor([2**40, 3]), INT - 1), INT)
    assert pair.tolist() == [[[-1, INT - 1], [3, INT - 1]]] and sinks.tolist() == [[[INT - 1], [INT - 1]]]
    _, _, pair, _ = options.head_rules((n, INT), 0)
    assert pair[0, :, 1].tolist() == [-1, -1, -1]
    for wrong in ((torch.tensor([-2]), 0), (n[None], 0), (n.float(), 0), (n[:0], 0), (n, -2), (n, 1.0)):
        with pytest.raises(PlanError):
            options.head_rules(wrong, 0)


# ---------------------------------------------------------------- what was made last


def test_what_was_made_last_is_found_while_nothing_changed():
    known, x, y, other = stamps.Last(), torch.zeros(3), Plan.dense(2, 2), object.__new__(Plan)
    assert known.get(x, y) == []
    made = object()
    assert known.keep(made, x, y, key=1) is made
    assert known.get(x, y, key=1) == [made]
    for miss in (known.get(x, y), known.get(x, y, key=2), known.get(x, key=1), known.get(y, x, key=1)):
        assert miss == []
    assert known.get(x, other, key=1) == [] and known.get(x.clone(), y, key=1) == []
    assert known.get(x, y, key=1) == [made]
    x.add_(1)
    assert known.get(x, y, key=1) == []
    known.keep(made, x, y)
    x.data = torch.ones(3)
    assert known.get(x, y) == []
    with torch.inference_mode():
        z = torch.zeros(2)
    for blind in (z, torch.zeros(2, device="meta"), torch.nn.Parameter(torch.zeros(2))):
        known.keep(made, blind)
        assert known.get(blind) == []  # changes would not show
    known.keep(made, x)
    del x
    assert known.get(torch.ones(3)) == []


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("seed", range(30))
def test_orders_and_ends_of_rows_are_those_of_a_loop(seed, generator):
    T, tile = seed % 11, 1 + seed % 4
    keep = torch.rand(2, 2, T, generator=generator) < 0.5
    order, before = compact_order(keep)
    label = torch.randint(0, 3, (2, 2, T), generator=generator).sort(-1).values
    fresh = begins_of(label)
    rows = edge_rows(fresh, tile)
    first, last, live = tile_ends(order, tile)
    low = extremes(T, tile, order=order, offset=torch.tensor([5, -5]), device=torch.device("cpu"))
    for b in range(2):
        for h in range(2):
            kept = keep[b, h].nonzero()[:, 0].tolist()
            line = order[b, h].tolist()
            assert line[: len(kept)] == kept and all(x == -1 for x in line[len(kept) :])
            assert before[b, h].tolist() == [sum(x < t for x in kept) for t in range(T + 1)]
            place, at = [], 0
            for t in range(T):
                new = t == 0 or label[b, h, t] != label[b, h, t - 1]
                assert bool(fresh[b, h, t]) == new
                at = -(-at // tile) * tile if new else at
                place.append(at)
                at += 1
            assert rows[b, h].tolist() == place
            for r in range(-(-len(line) // tile)):
                own = [x for x in line[r * tile : (r + 1) * tile] if x >= 0]
                full = len(own) == tile
                assert bool(live[b, h, r]) == bool(own)
                assert (int(first[b, h, r]), int(last[b, h, r])) == ((own[0], own[-1]) if own else (0, 0))
                shift = (5, -5)[b]
                want = (min(own) + shift, max(own) + shift) if own else (options.FAR, -options.FAR)
                assert (int(low.low[b, h, r]), int(low.high[b, h, r])) == want
                assert bool(vars(low)[[*vars(low)][2]][b, h, r]) == full
    assert order.shape[-1] == int(keep.sum(-1).max()) if keep.numel() else True


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9])
def test_extremes_of_any_range_are_those_of_its_rows(rows, generator):
    order = torch.randperm(12, generator=generator)[:rows].int().view(1, 1, -1).expand(1, 2, -1).clone()
    order[0, 1, rows // 2 : rows // 2 + 1] = -1
    ends = [(a, b) for a in range(rows + 1) for b in range(rows + 1)]
    lo, hi = (torch.tensor([x[n] for x in ends]).expand(1, 2, -1) for n in (0, 1))
    found = RangeExtremes(order)(lo, hi)
    low, high, whole = vars(found).values()
    for h in range(2):
        for n, (a, b) in enumerate(ends):
            own = order[0, h, a:b].tolist()
            real = [x for x in own if x >= 0]
            assert int(low[0, h, n]) == (min(real) if real else options.FAR)
            assert int(high[0, h, n]) == (max(real) if real else -options.FAR)
            if b >= a:
                assert bool(whole[0, h, n]) == (len(real) == len(own))


@pytest.mark.parametrize("unit", [1, 31, 32, 33, 64, 100])
def test_bits_are_where_they_are_said_to_be(unit, generator):
    cells = torch.rand(3, 2, unit, generator=generator) < 0.5
    words = pack_bits(cells)
    assert words.shape == (3, 2, -(-unit // 32)) and words.dtype == torch.int32
    lane = torch.arange(unit)
    assert torch.equal(bit(words[..., lane // 32], lane), cells)
    spare = torch.arange(unit, words.shape[-1] * 32)
    assert not bit(words[..., spare // 32], spare).any()

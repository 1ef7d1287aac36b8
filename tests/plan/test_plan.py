"""What a plan is: constructors on cases worked out by hand, figures, identity, checks, pictures."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import plans
import sparseflash as sf
from sparseflash import Plan
from sparseflash.plan import ANY, NONE


def _rows(plan):
    return ["".join(".x"[int(x)] for x in row) for row in plan.to_dense()[0, 0]]


def _lists(**more):
    """Four tokens, tiles of two, one span a tile, as a user would write them."""
    fields = {
        "Tq": 4,
        "Tk": 4,
        "tile": 2,
        "unit": 1,
        "span_start": torch.tensor([[[0, 1]]]),
        "span_full": torch.zeros(1, 1, 2, dtype=torch.int32),
        "span_count": torch.ones(1, 1, 2, dtype=torch.int32),
        "spans": torch.tensor([[0, 4], [0, 4]], dtype=torch.int32),
    }
    return Plan(**(fields | more))


def _i32(*values):
    return torch.tensor(values, dtype=torch.int32).view(1, 1, -1)


# ---------------------------------------------------------------- the formula, rule by rule


def test_causal_keeps_the_past_and_without_include_self_only_the_strict_past():
    assert _rows(_lists(causal=True)) == ["x...", "xx..", "xxx.", "xxxx"]
    assert _rows(_lists(causal=True, include_self=False)) == ["....", "x...", "xx..", "xxx."]
    assert _rows(_lists(include_self=False)) == [".xxx", "x.xx", "xx.x", "xxx."]


def test_a_window_has_inclusive_distances_and_the_sink_is_exempt_from_it_only():
    assert _rows(_lists(window=(1, 0))) == ["x...", "xx..", ".xx.", "..xx"]
    assert _rows(_lists(window=(0, 1))) == ["xx..", ".xx.", "..xx", "...x"]
    assert _rows(_lists(window=(None, 1))) == ["xx..", "xxx.", "xxxx", "xxxx"]
    assert _rows(_lists(window=(0, 0), sink=2)) == ["xx..", "xx..", "xxx.", "xx.x"]
    assert _rows(_lists(window=(0, 0), sink=2, causal=True)) == ["x...", "xx..", "xxx.", "xx.x"]


def test_positions_replace_token_numbers_on_either_side():
    assert _rows(_lists(causal=True, q_pos=_i32(3, 2, 1, 0))) == ["xxxx", "xxx.", "xx..", "x..."]
    assert _rows(_lists(causal=True, k_pos=_i32(0, 0, 9, 9))) == ["xx..", "xx..", "xx..", "xx.."]
    assert _rows(_lists(causal=True, q_offset=-2)) == ["....", "....", "x...", "xx.."]
    assert _rows(_lists(causal=True, q_offset=torch.tensor(1))) == ["xx..", "xxx.", "xxxx", "xxxx"]


def test_a_key_expires_at_k_end():
    assert _rows(_lists(causal=True, k_end=_i32(2, 9, 3, 9))) == ["x...", "xx..", ".xx.", ".x.x"]


def test_segments_match_themselves_and_any_and_none_matches_nothing():
    seg = {"q_seg": _i32(0, 1, ANY, NONE), "k_seg": _i32(0, 1, ANY, NONE)}
    assert _rows(_lists(**seg)) == ["x.x.", ".xx.", "xxx.", "...."]
    assert _rows(_lists(k_seg=_i32(0, 1, ANY, NONE))) == ["xxx."] * 4


def test_orders_drop_and_move_tokens_and_have_empty_lanes():
    q_order = torch.tensor([[[3, -1, 0, 1]]], dtype=torch.int32)
    k_order = torch.tensor([[[-1, 2, 0]]], dtype=torch.int32)
    spans = torch.tensor([[0, 3], [2, 3]], dtype=torch.int32)
    plan = _lists(q_order=q_order, k_order=k_order, spans=spans)
    assert _rows(plan) == ["x...", "x...", "....", "x.x."]


def test_spans_and_units_of_a_row_are_one_list_and_bits_cut_holes_into_units():
    bits = torch.tensor([[[0b01], [0b11]]], dtype=torch.int32)
    plan = Plan(
        Tq=2,
        Tk=6,
        tile=2,
        unit=2,
        spans=torch.tensor([[0, 1]], dtype=torch.int32),
        span_start=torch.tensor([[[0]]]),
        span_full=_i32(1),
        span_count=_i32(1),
        index=torch.tensor([2, 1], dtype=torch.int32),
        start=torch.tensor([[[0]]]),
        full=_i32(1),
        count=_i32(2),
        bits=bits,
        bits_start=torch.tensor([[[0]]]),
    ).check()
    assert _rows(plan) == ["x.x.xx", "x.xxxx"]


def test_a_head_axis_may_be_any_divisor():
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 1] = True
    k_seg = torch.tensor([0, 0, 0, NONE] * 2, dtype=torch.int32).view(1, 4, 2)
    plan = dataclasses.replace(Plan.from_mask(mask), k_seg=k_seg)
    assert plan.extent() == (1, 4)
    assert plan.to_dense()[0].flatten(1).int().tolist() == [[0] * 4, [0] * 4, [1] * 4, [1, 0, 1, 0]]


# ---------------------------------------------------------------- constructors


def test_dense_costs_a_few_ranges_a_tile_whatever_the_length():
    plan = Plan.dense(2**20, 2**20, causal=True)
    assert sum(x.numel() * x.element_size() for x in plan.tensors().values()) < 2**20
    assert plan.work == pytest.approx(0.5, abs=1e-3)


def test_minus_one_and_none_both_unbound_a_window():
    a, b = (Plan.dense(9, 9, window=w) for w in ((2, -1), (2, None)))
    assert a == b and a.window == (2, None)
    assert Plan.dense(9, 9, window=(-1, -1)).window is None


def test_from_keep_of_everything_is_dense_and_of_nothing_is_empty():
    keep = torch.ones(1, 1, 70, dtype=torch.bool)
    assert torch.equal(Plan.from_keep(keep, keep).to_dense(), Plan.dense(70, 70, causal=True).to_dense())
    assert not Plan.from_keep(~keep, keep).to_dense().any()


def test_one_bucket_is_dense_and_every_pair_of_equal_ids_is_attended():
    one = torch.full((1, 1, 70), -5)
    assert torch.equal(Plan.from_buckets(one, one).to_dense(), Plan.dense(70, 70, causal=True).to_dense())
    q, k = torch.tensor([[[5, 6, 5]]]), torch.tensor([[[6, 6, 5, 7]]])
    assert _rows(Plan.from_buckets(q, k, causal=False)) == ["..x.", "xx..", "..x."]


def test_bucket_ids_may_be_any_integers():
    small = torch.randint(0, 4, (1, 2, 50))
    want = Plan.from_buckets(small, small).to_dense()
    for ids in ([3, 1, 2, 0], [-(2**63), -1, 0, 2**63 - 1], [2**31, -(2**31), 2**40, 7]):
        wide = torch.tensor(ids)[small]
        assert torch.equal(Plan.from_buckets(wide, wide).to_dense(), want)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(Plan.from_buckets(small.to(dtype), small.to(dtype)).to_dense(), want)


def test_tiles_of_bucket_and_document_plans_end_at_the_edges():
    T = 500
    bucket = torch.randint(0, 5, (1, 2, T))
    plan = Plan.from_buckets(bucket, bucket, tile=64)
    for h in range(2):
        for tile in torch.nn.functional.pad(plan.q_order[0, h], (0, -plan.q_rows % 64), value=-1).view(
            -1, 64
        ):
            assert len({int(bucket[0, h, t]) for t in tile.tolist() if t >= 0}) <= 1
    plan = Plan.from_documents(torch.tensor([0, 100, 100, 101, 300]), tile=64)
    for tile in plan.q_order.view(-1, 64):
        tokens = [t for t in tile.tolist() if t >= 0]
        assert len({sum(edge <= t for edge in (0, 100, 101)) for t in tokens}) == 1


@pytest.mark.parametrize("nb, least", [(8, 0.82), (16, 0.65)])
def test_ranges_of_bucket_plans_are_tight(nb, least, generator):
    bucket = torch.randint(0, nb, (1, 4, 16384), generator=generator)
    plan = Plan.from_buckets(bucket, bucket, tile=128)
    pairs = plan.density * 0.5 * (16384 + 1) / 16384
    assert pairs / plan.work >= least


def test_no_list_is_padded_to_the_longest_head(generator):
    keep = torch.zeros(1, 4, 4096, dtype=torch.bool)
    keep[0, 0] = True
    keep[0, 1:, :10] = True
    plan = Plan.from_keep(keep, keep)
    assert plan.span_count[0, 1:].sum() <= 2 * 3  # the tiles of the short heads visit nothing more
    assert plan.work == pytest.approx(0.5 / 4, rel=0.05)


# ---------------------------------------------------------------- figures


def test_density_is_one_at_full_budget_and_counts_pairs_below_it(generator):
    window = {"window": (30, 5), "sink_tokens": 3}
    for rules in ({}, {"causal": True}, {"causal": True, **window}, window, {"causal": True, "q_offset": 50}):
        assert Plan.dense(150, 200, **rules).density == 1.0
    T = 200
    bucket = torch.randint(0, 4, (2, 2, T), generator=generator)
    plan = Plan.from_buckets(bucket, bucket)
    assert plan.density == pytest.approx(float(plan.to_dense().sum()) / (T * (T + 1) / 2 * 4))
    shift = torch.tensor([0, 60], dtype=torch.int32)
    assert Plan.dense(100, 200, causal=True, q_offset=shift).density == 1.0
    assert Plan.dense(0, 0).density == 1.0 and Plan.dense(0, 0).work == 0.0


@pytest.mark.parametrize("seed", range(40))
def test_density_and_work_are_those_of_the_mask_and_of_the_lists(seed):
    example = plans.example(seed, batch=2, heads=4, Tq=(0, 1, 33, 65)[seed % 4])
    plan = example.plan
    batch, heads = plan.extent()
    one = Plan(
        Tq=plan.Tq,
        Tk=plan.Tk,
        tile=plan.tile,
        unit=plan.unit,
        causal=plan.causal,
        include_self=plan.include_self,
        window=plan.window,
        sink=plan.sink,
        head_window=plan.head_window,
        head_sink=plan.head_sink,
        q_offset=plan.q_offset,
        q_pos=plan.q_pos,
        k_pos=plan.k_pos,
        **_everything(plan),
    )
    alone = plans.by_definition(one._changed(window=None, sink=0, head_window=None, head_sink=None))
    alone, allowed = (
        x.sum() * (batch * heads / (x.shape[0] * x.shape[1])) for x in (alone, plans.by_definition(one))
    )
    seen = float(example.mask.sum()) * (batch * heads / (example.mask.shape[0] * example.mask.shape[1]))
    assert plan.density == pytest.approx(seen / allowed if allowed else 1.0), example.line
    assert plan.kept == pytest.approx(seen / alone if alone else 1.0), example.line
    area = 0
    for pre, size in (("span_", None), ("", plan.unit)):
        start, count = getattr(plan, pre + "start"), getattr(plan, pre + "count")
        if start is None:
            continue
        each = batch * heads // (start.shape[0] * start.shape[1])
        for at, first in enumerate(start.flatten().tolist()):
            rows = min(plan.tile, plan.q_rows - at % plan.tiles * plan.tile)
            for n in range(first, first + int(count.flatten()[at])):
                if size is None:
                    lo, hi = plan.spans[n].tolist()
                else:
                    lo, hi = int(plan.index[n]) * size, min((int(plan.index[n]) + 1) * size, plan.k_rows)
                area += (hi - lo) * rows * each
    whole = plan.Tq * plan.Tk * batch * heads
    assert plan.work == pytest.approx(area / whole if whole else 0.0), example.line


def _everything(plan):
    """Lists that visit every pair of tokens."""
    tiles = -(-plan.Tq // plan.tile)
    return {
        "span_start": torch.zeros(1, 1, tiles, dtype=torch.int64),
        "span_full": torch.zeros(1, 1, tiles, dtype=torch.int32),
        "span_count": torch.ones(1, 1, tiles, dtype=torch.int32),
        "spans": torch.tensor([[0, plan.Tk]], dtype=torch.int32),
    }


# ---------------------------------------------------------------- identity


def test_plans_are_equal_when_their_values_are_and_hash_alike():
    a, b = (Plan.dense(100, 100, causal=True, window=(7, 0)) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != Plan.dense(100, 100, causal=True, window=(8, 0))
    other = dataclasses.replace(a, spans=a.spans.clone().clamp(max=99))
    assert hash(a) == hash(other) and a != other
    assert a != "plan" and a != Plan.dense(100, 100, causal=True).prepare()
    assert len({a, b, other}) == 2


@pytest.mark.parametrize("kind", plans.KINDS)
def test_a_plan_is_a_pytree_that_survives_the_round_trip_and_moves(kind):
    plan = plans.example(3, kind, heads=4).plan.prepare()
    leaves, spec = pytree.tree_flatten(plan)
    assert all(isinstance(x, torch.Tensor) for x in leaves if x is not None)
    assert pytree.tree_unflatten(leaves, spec) == plan
    copied = pytree.tree_map_only(torch.Tensor, torch.clone, plan)
    assert copied == plan and (plan.spans is None or copied.spans is not plan.spans)
    meta = plan.to("meta")
    assert meta.device.type == "meta" and meta.Tq == plan.Tq and meta != plan
    for keys in (meta.span_keys, meta.unit_keys):
        assert keys is None or keys.index.device.type == "meta"


def _loaded(plan):
    file = io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MORE_KINDS = {
    "lengths": lambda: Plan.from_lengths(torch.tensor([3, 0, 70]), Tk=100),
    "pages": lambda: Plan.from_pages(
        torch.tensor([[2, 0], [1, -1]]), torch.tensor([3, 2]), page_size=2, Tk=6
    ),
    "choice": lambda: Plan.from_choice(torch.tensor([[[0, 1], [1, -1], [0, 2]]]), Tk=3),
    "expiry": lambda: Plan.from_expiry(torch.tensor([[[3, 2, 3]]])),
    "capacity": lambda: Plan.from_blocks(
        torch.ones(1, 2, 3, 3) > 0, Tq=96, Tk=96, tile=32, unit=32, capacity=2
    ),
}


@pytest.mark.parametrize("kind", [*plans.KINDS, *MORE_KINDS])
def test_a_plan_is_saved_and_loads_safely_as_it_was(kind):
    made = MORE_KINDS.get(kind, lambda: plans.example(3, kind, batch=2, heads=4).plan)()
    for plan in (made, made.prepare()):
        back = _loaded(plan)
        assert back == plan and (back.span_room, back.room) == (plan.span_room, plan.room)
        assert torch.equal(back.to_dense(), plan.to_dense())
        for mine, own in ((back.span_keys, plan.span_keys), (back.unit_keys, plan.unit_keys)):
            assert own is None or all(
                torch.equal(getattr(mine, n), getattr(own, n)) for n in ("index", "count")
            )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"spans": torch.tensor([[0, 4], [0, 400]], dtype=torch.int32)}, "expected a range"),
        ({"span_start": torch.tensor([[[0, 1 << 40]]])}, "runs past spans"),
        ({"Tq": "4"}, "Tq='4': expected an int"),
        ({"spans": None}, "belong together"),
    ],
)
def test_a_file_cannot_send_a_kernel_out_of_bounds(wrong, said):
    plan = _lists()
    for name, x in wrong.items():
        object.__setattr__(plan, name, x)
    with pytest.raises(sf.PlanError, match=said):
        _loaded(plan)
    bare = _loaded(Plan.dense(300, 300, causal=True).prepare().to("meta"))  # no values: nothing to check
    assert bare.device.type == "meta" and bare.span_room == 3 and bare.span_keys is None
    wide = _lists()
    object.__setattr__(wide, "span_room", 1 << 20)  # a promise that its lists do not keep
    assert _loaded(wide) == _lists() and _loaded(wide).span_room == 0


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan.dense(4, 4).causal = True


def test_repr_names_sizes_and_rules_in_one_line():
    said = repr(Plan.dense(300, 200, causal=True, window=(63, 0), sink_tokens=4))
    for part in ("Tq=300", "Tk=200", "causal", "window=(63, 0)", "sink=4", "spans"):
        assert part in said
    assert "\n" not in said


# ---------------------------------------------------------------- derived data


@pytest.mark.parametrize("seed", range(30))
def test_transposed_lists_name_exactly_the_tiles_that_visit_each_group_of_keys(seed):
    example = plans.example(seed, batch=2, heads=4, Tq=(1, 33, 129, 200)[seed % 4])
    plan, ready = example.plan, example.plan.prepare()
    for keys, visits in (
        (ready.span_keys, _span_visits(plan) if plan.spans is not None else None),
        (ready.unit_keys, _unit_visits(plan) if plan.index is not None else None),
    ):
        if keys is None:
            assert visits is None
            continue
        groups = -(-plan.k_rows // keys.group)
        assert keys.start.shape[-1] == groups
        found = set()
        for b, h, c in torch.cartesian_prod(*map(torch.arange, keys.start.shape)).tolist():
            at, full, count = (int(x[b, h, c]) for x in (keys.start, keys.full, keys.count))
            listed = [_readers(plan, keys, b, h, n, n - at < full) for n in range(at, at + count)]
            assert listed == sorted(listed, key=lambda x: (not x[0][2], x[0][0])), example.line
            named = [(b, h, c, *entry) for entries in listed for entry in entries]
            assert len(named) == len(set(named)), example.line
            found |= set(named)
        assert found == visits(keys.group), example.line
    assert ready.prepare() is ready


def _readers(plan, keys, b, h, n, full):
    """(tile, entry of its list, full) of every tile that entry n of the transposed lists names."""
    first, source = int(keys.index[n]), int(keys.source[n])
    if keys.until is None:
        return [(first, source, full)]
    return [(r, int(plan.span_start[b, h, r]) + source, full) for r in range(first, int(keys.until[n]))]


def _span_visits(plan):
    def visits(group):
        found = set()
        shape = plan.span_start.shape
        for b, h, r in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
            at, full, count = (int(x[b, h, r]) for x in (plan.span_start, plan.span_full, plan.span_count))
            for n in range(at, at + count):
                lo, hi = plan.spans[n].tolist()
                for c in range(lo // group, -(-hi // group) if hi > lo else 0):
                    edge = min((c + 1) * group, plan.k_rows)
                    found.add((b, h, c, r, n, n - at < full and lo <= c * group and hi >= edge))
        return found

    return visits


def _unit_visits(plan):
    def visits(group):
        found = set()
        for b, h, r in torch.cartesian_prod(*map(torch.arange, plan.start.shape)).tolist():
            at, full, count = (int(x[b, h, r]) for x in (plan.start, plan.full, plan.count))
            found |= {(b, h, int(plan.index[n]), r, n, n - at < full) for n in range(at, at + count)}
        return found

    return visits


# ---------------------------------------------------------------- check


@pytest.mark.parametrize("kind", plans.KINDS)
def test_check_accepts_every_plan_that_is_right(kind):
    for seed in range(12):
        example = plans.example(seed, kind, batch=2, heads=4)
        assert example.plan.check() is example.plan


def test_check_names_a_key_that_is_listed_twice():
    spans = torch.tensor([[0, 3], [2, 4]], dtype=torch.int32)
    plan = _lists(spans=spans, span_start=torch.zeros(1, 1, 2, dtype=torch.int64), span_count=_i32(2, 0))
    with pytest.raises(sf.PlanError, match=r"tile 0 .* key row 2 twice"):
        plan.check()


@pytest.mark.parametrize("seed", range(6))
def test_check_finds_an_entry_that_is_wrongly_marked_full(seed):
    rules = [
        {"causal": True},
        {"include_self": False},
        {"window": (1, 1)},
        {"k_end": _i32(9, 9, 2, 9)},
        {"k_seg": _i32(0, 0, 0, NONE)},
        {"k_order": torch.tensor([[[0, 1, -1, 2]]], dtype=torch.int32)},
    ][seed]
    _lists(**rules).check()
    with pytest.raises(sf.PlanError, match="marked full"):
        _lists(**rules, span_full=_i32(1, 1)).check()


EDGES = {
    "the last key is the last query": ([[0, 2], [0, 4]], 8, {"causal": True}),
    "the last key is the first query, which does not see itself": (
        [[0, 0], [0, 3]],
        8,
        {"causal": True, "include_self": False},
    ),
    "the first behind the sinks": ([[0, 5]] * 4, 3, {"window": (1, 1), "sink": 4}),
    "one too far left": ([[0, 2], [0, 4]], 4, {"window": (2, None)}),
    "one too far right": ([[0, 4], [0, 4]], 4, {"window": (None, 2)}),
    "a key that ends with the last query": ([[0, 2], [0, 4]], 4, {"k_end": _i32(3, 9, 9, 9)}),
}


@pytest.mark.parametrize("spans, tile, rules", EDGES.values(), ids=EDGES)
def test_check_looks_at_the_very_edge_of_an_entry_marked_full(spans, tile, rules):
    """By one key: what is right, and the same with one query or key more."""
    tiles, T = len(spans), 2 * len(spans)
    fields = {
        "spans": torch.tensor(spans, dtype=torch.int32),
        "span_start": torch.arange(tiles).view(1, 1, -1),
        "span_count": torch.ones(1, 1, tiles, dtype=torch.int32),
        "Tq": T,
        "Tk": T,
    }
    plan = _lists(**fields, **rules, span_full=torch.zeros(1, 1, tiles, dtype=torch.int32)).check()
    keep = plan.to_dense()[0, 0].view(tiles, 2, T)
    for n, (lo, hi) in enumerate(spans):
        one = torch.zeros(1, 1, tiles, dtype=torch.int32)
        one[..., n] = 1
        marked = _lists(**fields, **rules, span_full=one)
        if bool(keep[n, :, lo:hi].all()):
            marked.check()
        else:
            with pytest.raises(sf.PlanError, match=f"tile {n} .*marked full"):
                marked.check()


def test_check_finds_a_ragged_unit_that_is_marked_full():
    fields = {
        "Tq": 3,
        "Tk": 3,
        "tile": 4,
        "unit": 2,
        "index": torch.tensor([0, 1], dtype=torch.int32),
        "start": torch.tensor([[[0]]]),
        "count": _i32(2),
    }
    Plan(**fields, full=_i32(1)).check()
    with pytest.raises(sf.PlanError, match="last unit"):
        Plan(**fields, full=_i32(2)).check()


# ---------------------------------------------------------------- pictures


def test_a_drawing_shows_the_mask():
    lines = str(Plan.dense(24, 48, causal=True, window=(3, 0))).splitlines()
    assert len(lines) == 26 and "kept 0.300" in lines[1]
    for i, line in enumerate(lines[2:]):
        assert [c != " " for c in line] == [i - 3 <= j <= i for j in range(48)]


@pytest.mark.parametrize("seed", range(30))
def test_every_plan_can_be_drawn_and_an_empty_cell_is_blank(seed):
    example = plans.example(seed, batch=2, heads=4, Tq=(0, 1, 20, 24)[seed % 4])
    lines = str(example.plan).splitlines()[2:]
    if example.plan.Tq and 0 < example.plan.Tk <= 48:
        seen = [[c != " " for c in line] for line in lines]
        assert seen == example.mask[0, 0].tolist(), example.line


def test_a_million_tokens_can_be_drawn_and_thin_bands_stay_visible():
    lines = str(Plan.dense(2**20, 2**20, causal=True, window=(255, 0))).splitlines()[2:]
    assert all(line[2 * i] != " " for i, line in enumerate(lines))
    assert all(not line[2 * i + 3 :].strip() for i, line in enumerate(lines))


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plot_writes_the_file_that_the_suffix_names(tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    bucket = torch.randint(0, 3, (1, 2, 300))
    for plan in (Plan.dense(500, 400, causal=True), Plan.from_buckets(bucket, bucket), Plan.dense(0, 0)):
        path = plan.plot(tmp_path / f"plan{suffix}", size=32)
        assert path.read_bytes().startswith(magic)
    with pytest.raises(sf.PlanError, match=r"\.png"):
        plan.plot(tmp_path / "plan.txt")
    with pytest.raises(sf.PlanError, match="head=7"):
        Plan.dense(5, 5).plot(tmp_path / "plan.png", head=7)


def test_a_picture_has_white_for_none_and_the_dark_for_all(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    Plan.dense(64, 64, causal=True).plot(tmp_path / "plan.png", size=64)
    pixels = torch.from_numpy(image.imread(tmp_path / "plan.png")[..., :3]).reshape(-1, 3)
    dark = (pixels - torch.tensor([0x0B, 0x3C, 0x68]) / 255).abs().amax(-1) < 0.02
    assert 0.1 < dark.float().mean() < 0.5


def test_plans_that_0_1_0_saved_load():
    """The class lay in another file then; what was saved names it."""
    path = Path(__file__).parents[1] / "data" / "plans-0.1.0.pt"
    for weights_only in (True, False):
        saved = torch.load(path, weights_only=weights_only)
        for name, plan in saved["plans"].items():
            assert type(plan) is Plan and torch.equal(plan.to_dense(), saved["masks"][name])
        assert saved["plans"]["buckets"].span_keys is not None
        assert saved["plans"]["window"] == Plan.dense(70, 70, causal=True, window=(9, 0), sink_tokens=2)

"""What a forward may see, at its edges: masks, padding and documents of every kind, against all pairs."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_overlay,
)

import sparseflash as sf
from sparseflash import Plan
from sparseflash.integrations.transformers import attention, documents, packed, ranges
from sparseflash.integrations.transformers.documents import Call, apart
from sparseflash.integrations.transformers.mask import Bits, Packed, Plain, Ranges
from sparseflash.integrations.transformers.packed import Padded


def by_pairs(function, B, Tq, Tk, q_offset, kv_offset, padding):
    """bool [B, 1, Tq, Tk], asked of the function of Transformers for every pair."""
    b, q, k = (
        torch.arange(B)[:, None, None],
        torch.arange(Tq)[:, None] + q_offset,
        torch.arange(Tk) + kv_offset,
    )
    seen = torch.as_tensor(function(b, torch.zeros_like(b), q, k)).expand(B, Tq, Tk)
    if padding is not None:
        there = torch.zeros(B, kv_offset + Tk, dtype=torch.bool)
        n = min(padding.shape[1], kv_offset + Tk)
        there[:, :n] = padding[:, :n].bool()
        seen = seen & there[:, None, kv_offset:]
    return seen[:, None]


def documents_of(edges):
    """The function that keeps packed documents apart."""
    number = torch.zeros(10_000, dtype=torch.long)
    number[torch.tensor(edges)] = 1
    number = number.cumsum(0)
    return lambda b, h, q, k: number[q.clamp(min=0)] == number[k.clamp(min=0)]


def window(n):
    return and_masks(sliding_window_overlay(n), causal_mask_function)


def chunks(n, B=2):
    return and_masks(chunked_overlay(n, torch.zeros(B, dtype=torch.long)), causal_mask_function)


FUNCTIONS = {
    "causal": (causal_mask_function, Plain),
    "all": (bidirectional_mask_function, Plain),
    "window of 1": (window(1), (Ranges, Packed)),
    "window of 3": (window(3), (Ranges, Packed)),
    "a wide window": (window(100), Ranges),
    "chunks of 1": (chunks(1), (Ranges, Packed)),
    "chunks of 4": (chunks(4), (Ranges, Packed)),
    "documents": (and_masks(documents_of([5, 6, 11]), causal_mask_function), (Ranges, Packed)),
    "documents to both sides": (documents_of([5, 6, 11]), (Ranges, Packed)),
    "every second key": (
        and_masks(lambda b, h, q, k: (q - k) % 2 == 0, causal_mask_function),
        (Ranges, Bits),
    ),
    "a prefix": (or_masks(causal_mask_function, lambda b, h, q, k: k < 4), (Ranges, Bits)),
}
SIZES = [
    (1, 1, 0, 0),
    (1, 17, 16, 0),
    (17, 17, 0, 0),
    (5, 12, 7, 0),
    (4, 9, 8, 3),
    (16, 33, 17, 0),
    (1, 6, 9, 4),
]
"""Queries, keys, place of the first query, and of the first key."""


def paddings(Tk, kv_offset):
    """None, and masks [2, tokens] that leave out a token at an edge, some at one side, one in the middle."""
    T = kv_offset + Tk
    found = {"none": None, "ones": torch.ones(2, T, dtype=torch.long)}
    for name, out in (("first", [0]), ("last", [T - 1]), ("left", range(T // 2)), ("amid", [T // 2])):
        one = torch.ones(2, T, dtype=torch.long)
        one[1, list(out)] = 0
        found[name] = one
    found["short"] = torch.ones(2, max(T - 1, 1), dtype=torch.long)
    found["long"] = torch.ones(2, T + 1, dtype=torch.long)
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_mask_is_its_function_at_every_edge(name, size):
    function, kinds = FUNCTIONS[name]
    Tq, Tk, q_offset, kv_offset = size
    for how, padding in paddings(Tk, kv_offset).items():
        if name == "every second key" and how not in ("none", "first", "amid"):
            continue  # what is evaluated pair by pair takes its time
        made = ranges.sparse_mask(
            2, Tq, Tk, q_offset, kv_offset, mask_function=function, attention_mask=padding, device="cpu"
        )
        want = by_pairs(function, 2, Tq, Tk, q_offset, kv_offset, padding)
        assert made.shape == (2, 1, Tq, Tk) and torch.equal(
            made.plan.check().to_dense().expand(2, -1, -1, -1), want
        ), how
        assert isinstance(made.kind, kinds), how
        there = (
            None
            if padding is None
            else by_pairs(bidirectional_mask_function, 2, 1, Tk, 0, kv_offset, padding)
        )
        if there is None or there.all():
            assert made.tokens is None
        else:
            assert torch.equal(made.tokens, there[:, 0, 0])
        bare = by_pairs(function, 2, Tq, Tk, q_offset, kv_offset, None)
        later = torch.arange(Tk) + kv_offset > torch.arange(Tq)[:, None] + q_offset
        if isinstance(made.kind, Plain):
            assert made.causal == (function is causal_mask_function) and made.by_rule
        elif how == "none":
            assert made.causal == (not (bare & later).any())
        if made.ranges is not None:  # without padding they say all of it
            k = torch.arange(Tk)
            inside = (made.ranges.lo[..., None] <= k) & (k < made.ranges.hi[..., None])
            assert torch.equal(inside.expand(2, -1, -1), bare[:, 0]) and made.plan.index is None
            own = (torch.arange(Tq) + q_offset - kv_offset)[None]
            begins = (made.ranges.lo == own) & (made.ranges.hi > own) & (own > 0)
            assert made.documents == bool(begins.any())
            starts = made.kind.starts if made.documents else None
            if starts is not None:
                assert how in ("none", "ones", "long") and torch.equal(starts, made.ranges.lo)


def test_a_function_of_ones_own_is_read_as_it_is():
    own = and_masks(lambda b, h, q, k: (q * k) % 3 != 1, causal_mask_function)
    for Tq, Tk, at, begin in SIZES:
        made = ranges.sparse_mask(2, Tq, Tk, at, begin, mask_function=own, use_vmap=True)
        assert isinstance(made.kind, Bits)
        assert torch.equal(made.to_dense(), by_pairs(own, 2, Tq, Tk, at, begin, None))


@pytest.mark.parametrize("function", [causal_mask_function, bidirectional_mask_function, window(3)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("Tq", "Tk", "at"), [(1, 9, 8), (4, 9, 5), (4, 9, 2), (9, 9, 0), (1, 1, 0)])
def test_a_mask_for_other_keys_is_told_what_these_are_or_stays(function, padded, Tq, Tk, at):
    tokens = torch.ones(2, Tk, dtype=torch.long)
    if padded:
        tokens[1, 0] = 0
    made = ranges.sparse_mask(2, Tq, Tk, at, 0, mask_function=function, attention_mask=tokens)
    for n in range(1, Tk + 4):
        other = made.for_keys(n)
        if made.by_rule and not padded and at + Tq == Tk and n >= Tq:  # the last keys are the queries' own
            causal = made.causal and Tq > 1
            want = torch.ones(Tq, n, dtype=torch.bool)
            want = want.tril(n - Tq) if causal else want
            assert torch.equal(other.to_dense(), want.expand(2, 1, -1, -1))
            assert other.causal == made.causal and other.offset == n - Tq and other.by_rule
        elif at + Tq <= n < Tk:  # made for more room than there is
            assert torch.equal(other.to_dense(), made.to_dense()[..., :n])
            assert other.by_rule == (made.by_rule and made.causal)
            assert (other.tokens is None) == (made.tokens is None)
            assert other.tokens is None or torch.equal(other.tokens, made.tokens[:, :n])
        else:
            assert other is made


def test_a_mask_moves_where_it_is_not_yet():
    made = ranges.sparse_mask(1, 3, 3, 0, 0, mask_function=window(2))
    here = torch.device("cpu")
    assert made.to(here) is made and made.to(torch.float16) is made and made.to("cpu", torch.float32) is made
    assert made.contiguous() is made and made.dim() == 4 and made.size() == made.shape and made.size(-1) == 3
    moved = made.to("meta")
    assert moved.device.type == "meta" and moved.plan.spans.is_meta and moved.kind.lo.is_meta
    assert moved.shape == made.shape and moved.causal


# ---------------------------------------------------------------- padding


def draw(random, B, T):
    """A padding mask: on the left, on the right, anywhere; some rows whole, some empty."""
    tokens = torch.ones(B, T, dtype=torch.bool)
    for row in tokens:
        how, n = random.choice(("left", "right", "holes", "whole", "both")), random.randint(0, T)
        if how in ("left", "both"):
            row[: n // (1 + (how == "both"))] = False
        if how in ("right", "both"):
            row[T - n // (1 + (how == "both")) :] = False
        if how == "holes":
            row[random.sample(range(T), n)] = False
    return tokens


@pytest.mark.parametrize("seed", range(40))
def test_sequences_without_their_padding_are_their_tokens(seed):
    r = random.Random(seed)
    B, T = r.randint(1, 4), r.randint(1, 9)
    S = r.randint(0, T)
    at, tokens = T - S if r.random() < 0.7 else 0, draw(r, B, T)
    padded = Padded(tokens, S, at)
    rows = [[t for t in range(T) if tokens[b, t]] for b in range(B)]
    queries = [[s for s in range(S) if tokens[b, s + at]] for b in range(B)]
    for b in range(B):
        assert padded.rank[b].tolist() == [sum(x < t for x in rows[b]) for t in range(T + 1)]
        assert int(padded.begin[b]) == (sum(x < at for x in rows[b]) if S else 0)
    q, k = padded.front()
    for b in range(B):
        assert q[b].tolist() == queries[b] + [s for s in range(S) if s not in queries[b]]
        assert k[b].tolist() == rows[b] + [t for t in range(T) if t not in rows[b]]
    for moved, front in zip(padded.moved(), (q, k), strict=True):
        still = torch.equal(front, torch.arange(front.shape[1]).expand_as(front))
        assert (moved is None) == still and (still or torch.equal(moved, front))
    seen = []
    for group in padded.groups():
        for n, b in enumerate(group.rows.tolist()):
            seen.append(b)
            assert group.queries[n].tolist() == queries[b] and group.keys[n].tolist() == rows[b]
            assert group.offset == int(padded.begin[b])
    assert sorted(seen) == [b for b in range(B) if queries[b]]
    sizes = [(len(g.queries[0]), len(g.keys[0]), g.offset) for g in padded.groups()]
    assert len(sizes) == len(set(sizes))  # one call for all that are alike


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["causal", "all", "window of 3", "documents", "every second key"])
def test_the_mask_of_a_group_is_that_of_its_tokens(name, seed):
    r = random.Random(seed)
    B, T = r.randint(1, 4), r.randint(1, 14)
    S = r.randint(1, T)
    tokens = draw(r, B, T)
    function = FUNCTIONS[name][0]
    made = ranges.sparse_mask(B, S, T, T - S, 0, mask_function=function, attention_mask=tokens.long())
    bare = by_pairs(function, B, S, T, T - S, 0, None)[:, 0]
    if made.padded is None:
        assert bool(tokens.all())
        return
    for group, own in made.groups:
        dense = own.to_dense()
        assert own.causal == made.causal and own.tokens is None
        for n, b in enumerate(group.rows.tolist()):
            want = bare[b][group.queries[n]][:, group.keys[n]]
            assert torch.equal(dense[n, 0], want)
    first = made.first
    left = [bool(x.any()) and torch.equal(x, x.cummax(0).values) for x in tokens.int()]
    assert (first is None) == (not all(left))
    if first is not None:
        assert first.tolist() == [int(x.int().argmax()) for x in tokens]


@pytest.mark.parametrize("seed", range(30))
def test_documents_of_packed_rows_come_apart_and_together_again(seed, generator):
    r = random.Random(seed)
    B, S = r.randint(1, 3), r.randint(1, 20)
    begin = torch.rand(B, S, generator=generator) < r.choice((0.0, 0.2, 0.5, 1.0))
    begin[:, 0] = True
    starts = torch.where(begin, torch.arange(S), 0).cummax(1).values
    x = torch.randn(B, 2, S, 3, generator=generator)
    apart_ = packed.Documents(starts)
    batches = apart_.split(x)
    assert torch.equal(apart_.join(batches), x)
    want = {}
    for b in range(B):
        edges = [*begin[b].nonzero()[:, 0].tolist(), S]
        for lo, hi in zip(edges, edges[1:]):
            want[b, lo] = x[b, :, lo:hi]
    found = 0
    for tokens, part in zip(apart_.tokens, batches, strict=True):
        lengths = tokens.sum(1)
        assert part.shape[2] == tokens.shape[1] == int(lengths.max()) and int(lengths.max()) <= 2 * int(
            lengths.min()
        )
        for one, there, n in zip(part, tokens, lengths.tolist()):
            assert there.tolist() == [t < n for t in range(len(there))] and not one[:, n:].any()
            assert any(y.shape == one[:, :n].shape and torch.equal(y, one[:, :n]) for y in want.values())
            found += 1
    assert found == len(want)


@pytest.mark.parametrize("kind", ["dense", "window", "sink", "nothing", "units", "ordered"])
def test_a_plan_moves_behind_padding(kind):
    T, begin, first = 12, torch.tensor([11, 6, 0]), torch.tensor([0, 5, 11])
    options = {"window": {"window": (3, 0)}, "sink": {"window": (2, 0), "sink_tokens": 2}}.get(kind, {})
    plan = Plan.dense(1, T, causal=True, q_offset=begin.int(), tile=1, **options)
    if kind == "nothing":
        plan = Plan.from_spans(
            torch.zeros(1, 1, 1, 0, 2, dtype=torch.int64),
            Tq=1,
            Tk=T,
            tile=1,
            causal=True,
            q_offset=begin.int(),
        )
    if kind == "units":
        plan = Plan.from_keys(torch.zeros(1, 1, 1, 1, dtype=torch.int64), Tq=1, Tk=T, tile=1, unit=4)
    if kind == "ordered":
        plan = plan._changed(k_order=torch.arange(T, dtype=torch.int32).view(1, 1, -1))
    moved = packed.behind(plan, begin, first)
    if kind in ("units", "ordered"):
        assert moved is None
        return
    old, new = plan.to_dense().expand(3, -1, -1, -1), moved.check().to_dense()
    for b in range(3):
        at = int(first[b])
        assert torch.equal(new[b, 0, 0, at:], old[b, 0, 0, : T - at]) and not new[b, 0, 0, :at].any()


# ---------------------------------------------------------------- documents in a cache


def call(positions, cache=None, **more):
    given = {"edges": None, "edges_k": None, "labels": None, "causal": True, "cross": False} | more
    return Call(positions=positions, cache=cache, **given)


@pytest.mark.parametrize("seed", range(50))
def test_tokens_see_their_own_documents_call_by_call(seed):
    """Positions begin anew amid calls and between them, behind padding or not, with a window or without."""
    r = random.Random(seed)
    B, function = r.randint(1, 3), r.choice((causal_mask_function, window(4)))
    rows = r.choice((1, B))
    padded = rows == B and r.random() < 0.5
    cache = SimpleNamespace()
    position = [[] for _ in range(rows)]  # of every token so far; None: padding
    number = [[] for _ in range(rows)]
    several, total = False, 0
    for turn in range(r.randint(1, 4)):
        S = r.choice((1, 1, 2, 5, 8))
        told = torch.zeros(rows, S, dtype=torch.long)
        for b in range(rows):
            pads = r.randint(0, S) if padded and not position[b] else 0
            for s in range(S):
                real = [p for p in position[b] if p is not None]
                if s < pads:
                    told[b, s] = 1
                    position[b].append(None)
                    number[b].append(-1)
                    continue
                if not real:
                    p, new = r.choice((0, 0, 3)), 0
                elif r.random() < 0.25:  # another document: from 0, or amid a call from anywhere before
                    p = 0 if s == 0 or position[b][-1] is None else r.randint(0, max(real[-1] - 1, 0))
                    new = max(number[b]) + 1
                else:
                    p, new = real[-1] + 1, max(number[b])
                told[b, s] = p
                position[b].append(p)
                number[b].append(new)
        total += S
        tokens = torch.tensor([[p is not None for p in row] for row in position]).expand(B, -1)
        made = ranges._mask(
            B, S, total, total - S, 0, function, None if bool(tokens.all()) else tokens, False, "cpu"
        )
        made = apart(made, call(told, cache), 0)
        which = torch.tensor(number).expand(B, -1)
        want = by_pairs(function, B, S, total, total - S, 0, tokens)[:, 0]
        want &= which[:, -S:, None] == which[:, None]
        real = tokens[:, -S:]
        assert torch.equal(made.to_dense()[:, 0][real], want[real]), turn
        several = several or any(max(row) > 0 for row in number)
        held = getattr(cache, documents.HELD, None)
        if several:
            assert held is not None and held.starts.shape[1] == total
            for b in range(len(held.starts)):
                row = number[min(b, rows - 1)]
                begin = [row.index(n) if n > 0 else 0 for n in row]
                there = [t for t, p in enumerate(position[min(b, rows - 1)]) if p is not None]
                assert [int(held.starts[b, t]) for t in there if row[t] > 0] == [
                    begin[t] for t in there if row[t] > 0
                ]
                known = held.positions[b]
                assert all(int(known[t]) in (-1, position[min(b, rows - 1)][t]) for t in there)
                assert (
                    int(known[-1]) == position[min(b, rows - 1)][-1] or position[min(b, rows - 1)][-1] is None
                )
    # the last document goes on at the next position, or another begins: anything else is refused
    if several and all(row[-1] is not None for row in position):
        held = getattr(cache, documents.HELD)
        step = ranges._mask(B, 1, total + 1, total, 0, causal_mask_function, None, False, "cpu")
        wrong = torch.tensor([[row[-1] + 2] for row in position])
        with pytest.raises(sf.SparseFlashError, match="position_ids go on at"):
            apart(step, call(wrong, cache), 0)
        with pytest.raises(sf.SparseFlashError, match="position_ids are not known"):
            apart(step, call(None, cache), 0)


@pytest.mark.parametrize("begin", [0, 3])
def test_a_row_of_its_own_begins_where_positions_do(begin):
    """Without a cache, `by_positions` alone; queries in front of the first key's document too."""
    told = torch.tensor([[0, 1, 2, 0, 1, 7, 3, 0]])
    made = ranges._mask(1, 8, 8, 0, 0, causal_mask_function, None, False, "cpu")
    got = apart(made, call(told), 0)
    starts = torch.tensor([0, 0, 0, 3, 3, 3, 6, 7])
    k = torch.arange(8)
    assert torch.equal(got.to_dense()[0, 0], (k >= starts[:, None]) & (k <= k[:, None]))
    assert got.documents and torch.equal(got.kind.starts[0], starts)
    for strange in (told.float(), told[0], told[:, :7], told.expand(3, -1), None, "positions"):
        assert apart(made, call(strange), 0) is made  # says nothing of these tokens
    assert apart(made, call(torch.arange(begin, begin + 8)[None]), 0) is made


@pytest.mark.parametrize("edges", [(0, 9), (0, 1, 9), (0, 4, 4, 9), (0, 8, 9), (0, 5, 7), (0, 1, 2, 3, 9)])
@pytest.mark.parametrize("beside", [None, "plain", "padded", "window", "all"])
def test_edges_keep_documents_apart_beside_any_mask(edges, beside):
    S, cuts = 9, torch.tensor(edges, dtype=torch.int32)
    function = {"window": window(3), "all": bidirectional_mask_function}.get(beside, causal_mask_function)
    tokens = None
    if beside == "padded":
        tokens = torch.ones(1, S, dtype=torch.bool)
        tokens[0, -1] = False
    given = None if beside is None else ranges._mask(1, S, S, 0, 0, function, tokens, False, "cpu")
    made = documents.by_edges(
        given, cuts, None, (1, S, S), "Tiny", function is not bidirectional_mask_function
    )
    number = torch.full((S,), -1)
    for n, (lo, hi) in enumerate(zip(edges, edges[1:])):
        number[lo:hi] = n
    want = by_pairs(function, 1, S, S, 0, 0, tokens)[0, 0] & (number[:, None] == number) & (number >= 0)
    assert torch.equal(made.to_dense()[0, 0], want) and made.edges is cuts
    assert made.documents == (
        len(edges) > 2 or (given is not None and not given.by_rule) or beside == "padded"
    )
    if beside in (None, "plain") and edges[-1] == S and len(edges) > 2:
        assert torch.equal(
            made.kind.starts[0], torch.tensor([max(x for x in edges if x <= t) for t in range(S)])
        )
    elif made.documents and beside in (None, "all"):
        assert made.kind.starts is None
    assert documents.by_edges(made, cuts, None, (1, S, S), "Tiny", True) is made


@pytest.mark.parametrize("edges", [(0, 9), (0, 4, 9), (0, 4, 8)])
@pytest.mark.parametrize("told", [True, False])
def test_edges_of_a_call_are_those_of_its_tokens(edges, told):
    """A tower of images is of the same call, and its tokens are others: edges count that end with them."""
    cuts = torch.tensor(edges)
    for function in (causal_mask_function, bidirectional_mask_function):
        made = ranges._mask(1, 9, 9, 0, 0, function, None, False, "cpu")
        got = apart(made, call(None, edges=cuts, edges_k=cuts, causal=told), 0)
        if not told and edges[-1] != 9:
            assert got is made
            continue
        number = torch.bucketize(torch.arange(9), cuts[1:-1], right=True)
        want = by_pairs(function, 1, 9, 9, 0, 0, None)[0, 0] & (number[:, None] == number)
        want[edges[-1] :] = False
        want[:, edges[-1] :] = False
        assert torch.equal(got.to_dense()[0, 0], want) and got.edges is cuts
        two = ranges._mask(2, 9, 9, 0, 0, function, None, False, "cpu")
        if not told:
            assert apart(two, call(None, edges=cuts, causal=False), 0) is two


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("Tk", [10, 12])
@pytest.mark.parametrize("heads", [0, 2])
def test_of_a_choice_those_keys_are_left_that_the_mask_shows(unit, Tk, heads, generator):
    from sparseflash.integrations.transformers.learned import _visible

    made = ranges._mask(1, Tk, Tk, 0, 0, window(3), None, False, "cpu")
    shape = (1, heads, Tk, 3) if heads else (1, Tk, 3)
    chosen = torch.randint(-1, -(-Tk // unit), shape, generator=generator)
    if unit > 1:
        chosen[..., 0] = (Tk - 1) // unit  # a block that the end of the keys may cut
    else:
        chosen[..., 0] = Tk  # stock indexers name keys that are not there yet
    left = _visible(chosen, made, unit)
    shown = made.to_dense()[0, 0]
    for h in range(max(heads, 1)):
        for q in range(Tk):
            row = (chosen[0, h, q] if heads else chosen[0, q]).tolist()
            keys = {k for c in row if c >= 0 for k in range(c * unit, (c + 1) * unit) if k < Tk}
            want = {k for k in keys if shown[q, k]}
            assert {k for k in left[0, h, q].tolist() if k >= 0} == want


# ---------------------------------------------------------------- tensors of the user's


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("number", "seen", "biased"),
    [
        (0.0, True, False),
        (-0.5, True, True),
        (-9999.0, True, True),
        (-1e4, False, False),
        (-torch.inf, False, False),
        (LOWEST, False, False),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 6, 8), (2, 1, 6, 8), (1, 4, 1, 8), (2, 4, 6, 11)])
def test_a_mask_of_floats_hides_what_is_very_low(number, seen, biased, shape):
    given = torch.zeros(shape)
    given[..., -1, 2] = number
    layer = torch.nn.Module()
    made = attention._of_tensor(layer, given, 2, 6, 8)
    want = torch.ones(shape[0], shape[1], 6, 8, dtype=torch.bool)
    want[..., (slice(None) if shape[2] == 1 else slice(-1, None)), 2] = seen
    assert torch.equal(made.plan.to_dense(), want) and made.biased == biased
    assert made.shape == (2, 1, 6, 8) and made.offset == 2 and not made.causal
    assert attention._of_tensor(layer, given, 2, 6, 8) is made


@pytest.mark.parametrize("later", [-1, 0, 1])
def test_whether_a_mask_of_the_users_looks_ahead_is_seen_in_it(later):
    own = torch.arange(6)[:, None] + 2
    keep = (torch.arange(8) <= own + min(later, 0))[None, None]
    if later > 0:
        keep = keep.clone()
        keep[0, 0, 0, 3] = True
    made = attention._of_tensor(torch.nn.Module(), keep, 1, 6, 8)
    assert made.causal == (later < 1) and torch.equal(made.to_dense(), keep)


@pytest.mark.parametrize("shape", [(6, 8), (1, 1, 5, 8), (1, 1, 6, 7), (1, 1, 2, 8)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(sf.SparseFlashError, match="attention_mask .*expected"):
        attention._of_tensor(torch.nn.Module(), torch.ones(shape, dtype=torch.bool), 1, 6, 8)


def test_a_mask_is_equal_to_itself_and_to_nothing_else():
    made, other = (
        attention.dense_mask(torch.nn.Module(), torch.device("cpu"), 1, 3, 3, True, None) for _ in range(2)
    )
    assert made == made and not made != made and made != other and not made == other
    assert made not in [None, "mask"] and made in [other, made]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("wide", [None, 1, 4, 5, 6])
@pytest.mark.parametrize(("S", "T"), [(1, 1), (1, 5), (5, 5), (3, 5)])
def test_a_layer_without_a_mask_goes_by_its_own_rules(causal, wide, S, T):
    here = torch.device("cpu")
    unknown = (causal or wide is not None) and S != T and not (causal and S == 1)
    if unknown or (causal and S == 1 and wide is not None and wide < T):
        with pytest.raises(sf.SparseFlashError, match="no mask"):
            attention.dense_mask(torch.nn.Module(), here, 1, S, T, causal, wide)
        return
    made = attention.dense_mask(torch.nn.Module(), here, 1, S, T, causal, wide)
    gap = torch.arange(S)[:, None] + (T - S if S == 1 and causal else 0) - torch.arange(T)
    want = (gap >= 0) if causal else torch.ones_like(gap, dtype=torch.bool)
    if wide is not None and not (causal and S == 1):
        want = want & (gap < wide) & (gap > -wide)
    assert torch.equal(made.to_dense()[0, 0], want)
    assert made.by_rule == (wide is None or (causal and S == 1))
    assert made.causal == (causal and S > 1)


# ---------------------------------------------------------------- what a trace takes for granted


@pytest.fixture
def traced(monkeypatch):
    """Functions take the ways of a trace, which may look at no value, and run at once."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("name", ["causal", "all", "window of 3", "a wide window", "documents"])
@pytest.mark.parametrize("how", ["none", "ones", "left", "last", "amid", "short"])
def test_a_trace_makes_the_same_masks_and_checks_what_methods_rely_on(name, how, traced):
    function, _ = FUNCTIONS[name]
    for Tq, Tk, at in ((1, 9, 8), (9, 9, 0), (5, 9, 4)):
        padding = paddings(Tk, 0)[how]
        made = ranges.sparse_mask(2, Tq, Tk, at, 0, mask_function=function, attention_mask=padding)
        want = by_pairs(function, 2, Tq, Tk, at, 0, padding)
        assert torch.equal(made.plan.to_dense().expand(2, -1, -1, -1), want)
        assert (made.tokens is None) == (padding is None)  # a trace does not know that all are tokens
        if made.if_plain is None:  # nothing to check
            assert name in ("causal", "all") and padding is None and made.for_methods() is made
            continue
        tokens = torch.ones(2, Tk, dtype=torch.bool) if padding is None else made.tokens
        solid = all("0" not in "".join(str(int(x)) for x in row).strip("0") for row in tokens)
        bare, past = (by_pairs(x, 1, Tq, Tk, at, 0, None) for x in (function, causal_mask_function))
        plain = solid and (name == "all" or torch.equal(bare, past))
        assert bool(made.if_plain) == plain
        if not plain:
            with pytest.raises(RuntimeError, match="one document a row"):
                made.for_methods()
            continue
        told = made.for_methods()
        assert told.if_plain is None and torch.equal(told.to_dense(), made.to_dense())
        assert told.by_rule == (padding is None or name in ("causal", "all"))


def test_a_trace_checks_that_documents_lie_apart(traced):
    whole, packed_ = torch.arange(9)[None], torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2]])
    for function, told, fine in (
        (causal_mask_function, whole, True),
        (causal_mask_function, packed_, False),
        (window(3), whole, True),
        (window(3), packed_, False),
        (FUNCTIONS["documents"][0], packed_, True),
        (FUNCTIONS["documents"][0], torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 0]]), False),
    ):
        made = ranges._mask(1, 9, 9, 0, 0, function, None, False, "cpu")
        if fine:
            assert documents.by_positions(made, told) is made
            continue
        with pytest.raises(RuntimeError, match="position_ids begin anew"):
            documents.by_positions(made, told)
    mixed = ranges._mask(1, 9, 9, 0, 0, FUNCTIONS["documents"][0], None, False, "cpu")
    mixed.mixes = "recurrent"
    with pytest.raises(RuntimeError, match="recurrent layers"):
        documents.by_positions(mixed, packed_)
    padded = Padded(torch.tensor([[True, False, True]]), 3, 0)
    assert all(x is not None for x in padded.moved())  # a trace cannot see that nothing moves


@pytest.mark.parametrize(
    ("owner", "positions", "function", "S", "said"),
    [
        ("tiny", None, causal_mask_function, 4, "position_ids, nor cu_seq_lens"),
        ("tiny", "its own", causal_mask_function, 4, ""),
        ("nemotron", "its own", causal_mask_function, 4, "cu_seq_lens"),
        ("nemotron", None, causal_mask_function, 4, "position_ids, nor cu_seq_lens"),
        ("tiny", None, causal_mask_function, 1, ""),
        ("tiny", None, causal_mask_function, 2, "position_ids, nor cu_seq_lens"),
        ("tiny", None, bidirectional_mask_function, 4, ""),
        ("tiny", None, chunks(2, 1), 4, ""),
    ],
)
def test_what_attention_is_not_told_of_documents_is_said_once(owner, positions, function, S, said, caplog):
    from sparseflash.integrations.transformers.mask import _untold

    made = ranges._mask(1, S, 4, 4 - S, 0, function, None, False, "cpu")
    made.owner = owner
    _untold.clear()
    for _ in range(2):
        documents.unheard("Tiny", made, None if positions is None else torch.arange(S)[None])
    found = [x.message for x in caplog.records]
    assert len(found) == bool(said) and all(f"is told no {said}:" in x for x in found)
    _untold.clear()


@pytest.mark.parametrize("version", ["4.99.9", "5.0.0", "5.22.7", "5.23.0", "5.23.0.dev0", "5.24.1", "6.0.0"])
def test_which_models_keep_documents_apart_in_layers_that_mix(version, monkeypatch):
    monkeypatch.setattr(documents.transformers, "__version__", version)
    able = tuple(map(int, version.split(".")[:2])) >= (5, 23)
    edges, labels = torch.tensor([0, 3]), torch.zeros(1, 3)
    for kind, by in (("bamba", "labels"), ("qwen3_next", "both"), ("llama", "nothing")):
        assert documents.told(kind, labels, None) == (able and by == "labels")
        assert documents.told(kind, labels, edges) == (able and by != "nothing")
        assert not documents.told(kind, None, edges) and not documents.told(kind, None, None)


def test_ranges_of_any_width_are_found():
    """By a search that narrows sixteen times a round: one, two and three rounds."""
    for Tk in (15, 16, 17, 255, 256, 257, 530):
        for n in (1, 15, 16, 17, 18, 255, 256, 257, 258, 500):
            for function in (window(n), sliding_window_overlay(n)):
                made = ranges.sparse_mask(1, 3, Tk, Tk - 3, 0, mask_function=function)
                assert isinstance(made.kind, (Ranges, Packed)) or n >= Tk
                assert torch.equal(made.to_dense(), by_pairs(function, 1, 3, Tk, Tk - 3, 0, None)), (Tk, n)


@pytest.mark.parametrize("hole", ["near", "far", "one row", "first"])
def test_a_hole_in_a_range_is_found(hole):
    """By samples of every row, and exactly at the ends."""

    def holed(b, h, q, k):
        there = {"near": q - k == 2, "far": k == 3, "one row": (q == 150) & (k % 2 == 0), "first": (k == 0)}[
            hole
        ]
        return (q >= k) & ~(there & (q > 3))

    made = ranges.sparse_mask(1, 200, 200, 0, 0, mask_function=holed)
    assert torch.equal(made.to_dense(), by_pairs(holed, 1, 200, 200, 0, 0, None))


# ---------------------------------------------------------------- small facts


@pytest.mark.parametrize(
    ("given", "video", "want"),
    [
        ({"image_grid_thw": [[1, 4, 6]]}, 0, (1, 2, 3)),
        ({"image_grid_thw": [[1, 4, 6], [2, 8, 8]]}, 0, (1, 2, 3)),
        ({"image_grid_thw": [[1, 4, 6]], "video_grid_thw": [[3, 8, 4]]}, 0, (3, 4, 2)),
        ({"pixel_values_videos": (1, 3)}, 12, (3, 2, 2)),
        ({"pixel_values_videos": (2, 3)}, 24, (3, 2, 2)),
        ({"pixel_values_videos": (1, 3)}, 15, (3, 5)),
        ({"pixel_values_videos": (1, 3)}, 13, None),
        ({"pixel_values_videos": (2, 3)}, 12, (3, 2)),
        ({"pixel_values_videos": (1, 3)}, 0, None),
        ({}, 12, None),
    ],
)
def test_the_grid_of_a_video_is_told_or_counted(given, video, want):
    from sparseflash.integrations.transformers.tokens import _grid

    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    given = {
        name: torch.tensor(x) if "thw" in name else torch.zeros(*x, 1, 1, 1) for name, x in given.items()
    }
    there = torch.arange(30)[None] < video
    assert _grid(config, given, there) == want
    if any("thw" in name for name in given):
        bare = SimpleNamespace(spatial_merge_size=1)
        assert _grid(bare, given, there)[1] == 2 * want[1]
    if "pixel_values_videos" in given:
        flat = given | {"pixel_values_videos": given["pixel_values_videos"][0]}
        assert _grid(config, flat, there) is None


@pytest.mark.parametrize(
    ("module", "want"),
    [
        ({"layer_idx": 0}, True),
        ({"layer_idx": 1}, False),
        ({"layer_idx": 2}, True),
        ({"layer_idx": 3}, True),
        ({"layer_idx": 4}, True),
        ({"layer_idx": None}, True),
        ({"layer_idx": 4, "sliding_window": None}, False),
        ({"layer_idx": 1, "sliding_window": 8}, False),
    ],
)
def test_a_layer_is_windowed_by_its_kind_or_else_by_its_window(module, want):
    from sparseflash.integrations.transformers.layers import Layer

    kinds = ["sliding_attention", "full_attention", "chunked_attention", "sliding_attention"]
    one = SimpleNamespace(config=SimpleNamespace(layer_types=kinds, sliding_window=7), **module)
    assert Layer("x", 0, one).windowed == want
    for bare in (SimpleNamespace(), SimpleNamespace(config=SimpleNamespace(sliding_window=None))):
        assert not Layer("x", 0, bare).windowed


def test_the_layer_of_a_cache_is_found_by_its_number():
    from sparseflash.cache import Growing
    from sparseflash.integrations.transformers.caches import layer_of

    own = [Growing(), object()]
    for at, want in ((0, own[0]), (1, None), (2, None), (None, None), ("0", None)):
        assert layer_of(SimpleNamespace(layers=own), SimpleNamespace(layer_idx=at)) is want
    assert layer_of(SimpleNamespace(layers=tuple(own)), SimpleNamespace(layer_idx=0)) is None
    assert layer_of(None, SimpleNamespace(layer_idx=0)) is None


def test_a_report_measures_seconds_of_the_call():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **small)).eval()
    start = time.perf_counter()
    with sf.transformers.sparse(model, prefill=sf.methods.Window(4)):
        rows = [*sf.transformers.report(model, input_ids=torch.arange(40)[None])]
    wall = time.perf_counter() - start
    assert len(rows) == 1 and 0 < rows[0].dense_seconds < wall and abs(rows[0].seconds) < wall
    assert all("Window(window=4" in x for x in rows[0].methods)

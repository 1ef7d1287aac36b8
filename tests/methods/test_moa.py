"""Spans of heads: the mask, how far the loss moves, and the best spans within a budget."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sparseflash as sf
from cases import mask_of

pytest.importorskip("transformers")
pytest.importorskip("scipy")

import transformers as hf

from sparseflash.bench import spans


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0.25), (-64, 0.5), (96, 0.0), (0, 1.0)])
@pytest.mark.parametrize("T", [1, 63, 129, 700])
def test_a_query_sees_first_keys_and_a_window_of_the_span(alpha, beta, T, generator):
    q = torch.randn(1, 2, T, 16, generator=generator)
    method = sf.methods.MoA(alpha=alpha, beta=beta, sinks=16, least=32, block=32)
    span = min(T, math.ceil(max(32, alpha + beta * T) / 32) * 32)
    assert method.span(T) == span
    at, first = torch.arange(T), min(16, span - 1)
    gap = at[:, None] - at
    want = (gap >= 0) & ((gap < span - first) | (at < first))
    assert torch.equal(mask_of(method.select(q, q).plan)[0, 0], want)
    assert int(want.sum(-1).max()) == span


def test_influence_is_how_far_the_loss_moves_when_a_pair_goes():
    """Of a tiny model: the sum over distances against differences of the loss itself."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    config = hf.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)
    model = hf.LlamaForCausalLM(config).double().eval()
    T, ids = 80, torch.randint(50, (1, 80))
    found = spans.influences(model, ids)[0]
    assert found.shape == (2, T)

    def loss(keep):
        with sf.transformers.sparse(model, prefill=Given(keep)), torch.no_grad():
            return model(ids, labels=ids).loss

    past = torch.ones(T, T, dtype=torch.bool).tril()
    whole, want = loss(past.expand(1, 2, T, T)), torch.zeros(2, T, dtype=torch.float64)
    rows = [70, 79]
    for h, i in itertools.product(range(2), rows):
        for j in range(64, i + 1):
            keep = past.expand(1, 2, T, T).clone()
            keep[0, h, i, j] = False
            want[h, i - j] += (loss(keep) - whole).abs()
    alone = influence_of_rows(model, ids, rows)
    # what is of second order in a pair's weight, some hundredths, is not in it
    torch.testing.assert_close(alone, want, rtol=0.1, atol=float(want.max()) * 0.05)


def influence_of_rows(model, ids, rows):
    """As `influences`, of some queries: the gradient of the others' output is nothing."""
    whole = sf.attention_stats

    def some(q, k, lse, plan, *, dout, delta, **more):
        keep = torch.zeros(q.shape[2], dtype=torch.bool)
        keep[rows] = True
        lse = lse.masked_fill(~keep, -torch.inf)
        return whole(q, k, lse, plan, dout=dout, delta=delta, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sf, "attention_stats", some)
        return spans.influences(model, ids)[0]


class Given(sf.methods.Method):
    """What a mask says."""

    phases = ("prefill",)

    def __init__(self, keep):
        self.keep = keep

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other

    def select(self, q, k, ctx=None):
        return sf.methods.Selection(sf.Plan.from_mask(self.keep))


def test_the_best_spans_are_those_of_a_search_through_all():
    generator = torch.Generator().manual_seed(0)
    tried = [(0, 0.125), (0, 0.25), (128, 0.25), (0, 1.0)]
    moved = {
        n: {0: torch.rand(2, n, generator=generator), 3: torch.rand(1, n, generator=generator) ** 4}
        for n in (1024, 2048)
    }
    for bound, most in ((0.4, 2), (0.6, 1), (0.9, 2)):
        found = spans.spans(moved, bound=bound, candidates=tried, in_a_layer=most)
        got = [tried.index((x["alpha"], x["beta"])) for number in (0, 3) for x in found[number]]
        best = min(
            (cost(moved, tried, choice), choice)
            for choice in itertools.product(range(4), repeat=3)
            if len(set(choice[:2])) <= most
            and all(mean_kept(tried, choice, n) <= bound + 1e-9 for n in moved)
        )
        assert cost(moved, tried, got) == pytest.approx(best[0], rel=1e-6)
        assert all(mean_kept(tried, got, n) <= bound + 1e-6 for n in moved)
    with pytest.raises(sf.SparseFlashError, match="no spans within bound=0.01"):
        spans.spans(moved, bound=0.01, candidates=tried)


def mean_kept(tried, choice, n):
    found = []
    for r in choice:
        span = sf.methods.MoA(alpha=tried[r][0], beta=tried[r][1]).span(n)
        found.append(sum(min(i + 1, span) for i in range(n)) / (n * (n + 1) / 2))
    return sum(found) / len(found)


def cost(moved, tried, choice):
    lost = 0.0
    for n, layers in moved.items():
        heads = torch.cat(list(layers.values())).double()
        for row, r in zip(heads, choice, strict=True):
            width = sf.methods.MoA(alpha=tried[r][0], beta=tried[r][1]).span(n) - 64
            lost += float(row[min(width, n - 1) :].sum() / heads.sum())
    return lost


def test_far_heads_get_long_spans_and_near_heads_short_ones():
    moved = {}
    for n in (1024, 2048):
        near = torch.zeros(n)
        near[:100] = 1
        moved[n] = {0: torch.stack([near, torch.ones(n)])}
    found = spans.spans(moved, bound=0.7)[0]
    short, long = (sf.methods.MoA(alpha=x["alpha"], beta=x["beta"]).span(2048) for x in found)
    assert short < 500 and long > 1400

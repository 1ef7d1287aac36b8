"""What parts of the integration do at their edges: searches, masks among numbers, caches of other kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

import sparseflash as sf
from sparseflash.integrations.transformers import attention, keep, ranges, tables
from sparseflash.integrations.transformers.caches import roomy
from sparseflash.integrations.transformers.verification import _dtype
from transformer_models import tiny

PROMPT = (torch.arange(70) * 37 % 94 + 3).view(2, 35)


@pytest.fixture(scope="module")
def model():
    return tiny("llama").eval()


@pytest.mark.parametrize(("begin", "Tk", "want"), [(0, 5, "11100"), (1, 4, "1100"), (0, 3, "111")])
def test_keys_that_a_padding_mask_does_not_name_are_padding(begin, Tk, want):
    tokens = ranges._padding(torch.ones(1, 3, dtype=torch.long), Tk, begin)
    named = [[x == "1" for x in want]]
    assert tokens is None if all(named[0]) else tokens.tolist() == named


@pytest.mark.parametrize("Tk", [1, 2, 15, 16, 17, 18, 255, 256, 257, 300])
@pytest.mark.parametrize("direction", [-1, 1])
def test_the_search_for_the_last_visible_key_finds_it_at_every_length(Tk, direction):
    """One row a number of visible keys, on one side of the anchor, none and all of them included."""
    anchor = torch.full((1, Tk), 0 if direction > 0 else Tk - 1)
    seen = torch.arange(Tk)[:, None]

    def sees(key):
        return (key - anchor[..., None]).abs() <= seen

    got = ranges._reach(sees, anchor, direction, torch.full((1, Tk), Tk - 1), Tk)
    assert got[0].tolist() == list(range(Tk))


def test_masks_that_are_moved_or_put_among_numbers_are_what_they_were():
    mask = torch.arange(6).view(2, 3) % 2 == 0
    own, numbers = keep.keep_mask(mask, "Model"), torch.arange(6.0).view(2, 3)
    for same in (own.to(torch.float32), own.to(numbers), own.float(), own.type(torch.float16)):
        assert isinstance(same, keep.KeepMask) and torch.equal(keep.plain_mask(same), mask)
    assert own.to("meta").device.type == own.to(numbers.to("meta")).device.type == "meta"
    want = numbers.clone().masked_scatter(mask, torch.full((6,), 9.0))
    assert torch.equal(numbers.clone().masked_scatter(own, torch.full((6,), 9.0)), want)
    assert torch.equal(torch.where(own, numbers, -torch.inf), torch.where(mask, numbers, -torch.inf))
    for unclear in (
        lambda: torch.where(own, -torch.inf, numbers),
        lambda: numbers.masked_fill(own, -1e9),
        lambda: torch.where(own, own, numbers),
    ):
        with pytest.raises(sf.SparseFlashError, match="Model computes with its attention mask"):
            unclear()


def test_only_modules_of_models_are_looked_for():
    finder, name, there = tables._Finder(), "transformers.models.llama", transformers.models.llama.__path__
    assert type(finder.find_spec(f"{name}.modeling_llama", there).loader) is tables._Loader
    assert finder.find_spec(f"{name}.configuration_llama", there) is None
    assert finder.find_spec(f"{name}.modeling_none", there) is None
    assert finder.find_spec("transformers.modeling_utils", transformers.__path__) is None


@pytest.mark.parametrize("kind", ["a class of its own", "offloaded", "static"])
def test_a_cache_of_another_kind_keeps_its_layers(model, kind):
    class Own(DynamicCache):
        """What a user's class keeps is the user's."""

    made = {
        "a class of its own": lambda: Own(config=model.config),
        "offloaded": lambda: DynamicCache(config=model.config, offloading=True),
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=50),
    }[kind]()
    before = list(made.layers)
    roomy(made, model.config)
    assert len(before) == 2 and all(a is b for a, b in zip(made.layers, before, strict=True))
    plain = DynamicCache(config=model.config)
    roomy(plain, model.config)
    assert not any(type(layer) is DynamicLayer for layer in plain.layers)


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 20])
def test_a_method_reads_what_an_evicting_cache_is_begun_with_and_nothing_later(model, first, monkeypatch):
    """Later queries see keys that no method has chosen among: those that the cache has kept."""
    read, select = [], sf.methods.Window.select
    monkeypatch.setattr(
        sf.methods.Window, "select", lambda self, q, *a: read.append(q.shape[2]) or select(self, q, *a)
    )
    cache = DynamicCache(config=model.config)
    with sf.transformers.sparse(model, prefill=sf.methods.Window(9), cache=sf.cache.SnapKV(budget=40)):
        for a, b in ((0, first), (first, first + 5), (first + 5, first + 6)):
            model(PROMPT[:, a:b], past_key_values=cache)
    assert read == ([first] * 2 if first > 1 else [])


def test_what_verify_allows_is_by_the_coarsest_dtype_of_the_model():
    fine, coarse = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    count = torch.nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    for parts in ([fine, coarse], [coarse, fine]):
        both = torch.nn.ModuleList(parts)
        both.register_parameter("count", count)
        assert _dtype(both) is torch.bfloat16
    assert _dtype(fine) is torch.float32


@torch.no_grad()
def test_a_report_of_a_token_behind_padding_counts_its_keys(model):
    """Rows of 30 and 21 tokens and one more: a window of 8 and two first keys, of 31 and 22."""
    ids = torch.arange(62).view(2, 31) % 90 + 3
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    at, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache()
    model.set_attn_implementation("sparse")
    model(ids[:, :30], attention_mask=mask[:, :30], position_ids=at[:, :30], past_key_values=cache)
    given = {"input_ids": ids[:, 30:], "attention_mask": mask, "position_ids": at[:, 30:]}
    with sf.transformers.sparse(model, decode=sf.methods.SinkWindow(window=8, sink_tokens=2), layers=[1]):
        dense, row = sf.transformers.report(model, **given, past_key_values=cache)
    assert row.density == pytest.approx((20 / 53,) * 4) and dense.density == (1.0,) * 4


@torch.no_grad()
def test_a_report_of_a_cache_that_attends_says_what_it_holds(model):
    ids = torch.arange(200)[None] % 90 + 3
    for given, held in (
        ({"cache": sf.cache.policy("streaming-llm", budget=16, sinks=2)}, 16),
        ({"cache": sf.cache.Int8()}, 199),
    ):
        with sf.transformers.sparse(model, **given):
            first = sf.transformers.report(
                model, input_ids=ids[:, :199], past_key_values=(cache := DynamicCache())
            )
            found = sf.transformers.report(model, input_ids=ids[:, 199:], past_key_values=cache)
        assert len(first) == len(found) == 2 and first.rows[0].density == (1.0,) * 4
        for row in found:
            assert row.density == pytest.approx(((held + 1) / 200,) * 4) and row.seconds > 0
            assert row.recall[0] == 1 if held == 199 else np.isnan(row.recall[0])
            assert row.methods[0] == ("dense" if held == 199 else repr(given["cache"]))


def test_weights_of_a_query_that_sees_nothing_are_zero():
    keep = torch.tensor([[True, False], [False, False]])
    q, k = torch.ones(1, 4, 2, 8), torch.ones(1, 2, 2, 8)
    weights = attention._weights(torch.nn.Identity(), q, k, sf.Plan.from_mask(keep[None, None]), {})
    assert weights[0, 0].tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("method", [None, sf.methods.MTraining(granularity=8), sf.methods.Window(8)], ids=str)
def test_tokens_are_laid_out_for_the_method_or_for_the_models_own_mask(model, method, monkeypatch):
    asked, make = [], sf.distributed.context_parallel
    monkeypatch.setattr(sf.distributed, "context_parallel", lambda *a, **b: asked.append(a) or make(*a, **b))
    with torch.no_grad(), sf.transformers.context_parallel(model, method=method):
        model(torch.arange(3, 43)[None])
    (_, given), causal = asked[0], sf.Plan.dense(40, 40, causal=True)
    assert given is method if method else torch.equal(given.to_dense(), causal.to_dense())

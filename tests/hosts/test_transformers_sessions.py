"""What methods are told and remember inside Transformers: one state for each layer of a generation."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

import sparseflash as sf
from sparseflash import Plan
from sparseflash.methods import Method, Selection

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

SEEN: list[dict] = []


@dataclasses.dataclass(frozen=True)
class Remembering(Method):
    """Causal attention over everything; knows how many queries of its layer it has seen."""

    softcap: float | None = None
    reads = ("scale", "softcap", "rope", "layer", "cache", "state", "q_offset")

    def select(self, q, k, ctx=None):
        before = (ctx or {}).get("state") or 0
        SEEN.append(dict(ctx or {}) | {"queries": q.shape[2], "before": before})
        offset = (ctx or {}).get("q_offset", 0)
        plan = Plan.dense(q.shape[2], k.shape[2], causal=True, q_offset=offset)
        return Selection(plan, state=before + q.shape[2])


@pytest.fixture
def model():
    SEEN.clear()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=64
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_method_is_told_what_the_layer_is_told(model):
    with sf.transformers.sparse(model, prefill=Remembering()):
        model(torch.arange(3, 12)[None])
    assert [told["layer"] for told in SEEN] == [0, 1]
    for told in SEEN:
        assert told["scale"] == model.config.head_dim**-0.5 and told["softcap"] is None
        cos, sin = told["rope"]
        assert cos.shape == sin.shape == (1, 9, model.config.head_dim)
        assert told["before"] == 0
    assert not any("_sparseflash_told" in vars(m) for m in model.modules())


@torch.no_grad()
def test_a_generation_is_a_session_of_its_own(model):
    ids = torch.arange(3, 12)[None]
    stock = model.generate(ids, max_new_tokens=5, do_sample=False)
    method = Remembering()
    with sf.transformers.sparse(model, prefill=method, decode=method):
        first = model.generate(ids, max_new_tokens=5, do_sample=False)
        calls = len(SEEN)
        again = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(first, stock) and torch.equal(again, stock)
    for run in (SEEN[:calls], SEEN[calls:]):
        for layer in (0, 1):
            own = [told for told in run if told["layer"] == layer]
            seen = 0
            for told in own:
                assert told["before"] == seen
                seen += told["queries"]
            assert seen == 9 + 4  # the last token is never fed


@torch.no_grad()
def test_a_cache_that_is_gone_takes_its_states_along(model):
    with sf.transformers.sparse(model, prefill=Remembering()):
        cache = transformers.DynamicCache(config=model.config)
        model(torch.arange(3, 12)[None], past_key_values=cache, use_cache=True)
        sessions = model.model.layers[0].self_attn._sparseflash.sessions
        assert len(sessions) == 1
        SEEN.clear()
        del cache
        gc.collect()
        assert len(sessions) == 0
        for _ in range(2):
            model(torch.arange(3, 12)[None], use_cache=False)
            assert SEEN[-1]["before"] == 0 and len(sessions) == 0


@torch.no_grad()
def test_rows_of_a_padded_batch_have_states_of_their_own(model):
    @dataclasses.dataclass(frozen=True)
    class Apart(Remembering):
        causal_selection = False  # so that each length is asked for by itself

    ids, mask = torch.arange(3, 21).view(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    method = Apart()
    with sf.transformers.sparse(model, prefill=method, decode=method):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    own = [told for told in SEEN if told["layer"] == 0]
    assert [(told["before"], told["queries"]) for told in own] in (
        [(0, 5), (0, 9), *[x for n in range(3) for x in ((5 + n, 1), (9 + n, 1))]],
        [(0, 9), (0, 5), *[x for n in range(3) for x in ((9 + n, 1), (5 + n, 1))]],
    )


def test_a_profile_serves_the_layers_of_a_model(model):
    near = {"method": "window", "window": 4}
    profile = sf.calibrate.Profile.of("tiny", {0: [near, {"method": "dense"}], 1: [near, near]})
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), sf.transformers.sparse(model, prefill=sf.methods.Profiled(profile)):
        got = model(ids).logits
    window = sf.methods.Window(window=4)
    by_hand = {0: [window, None], 1: window}
    with torch.no_grad(), sf.transformers.sparse(model, prefill=by_hand):
        want = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dual_chunks_of_a_padded_batch_are_each_sequence_alone(model):
    """Rotations belong to tokens, and move with them."""
    method = sf.methods.DualChunkAttention(context=16)
    ids, mask = torch.arange(3, 83).view(2, 40) % 64, torch.ones(2, 40, dtype=torch.int64)
    for side in (slice(0, 7), slice(33, 40)):
        padded = mask.clone()
        padded[0, side] = 0
        with sf.transformers.sparse(model, prefill=method):
            places = (padded.cumsum(-1) - 1).clamp(min=0)
            both = model(ids, attention_mask=padded, position_ids=places, use_cache=False).logits
            for row in range(2):
                real = padded[row] > 0
                alone = model(ids[row : row + 1, real], use_cache=False).logits
                torch.testing.assert_close(both[row : row + 1, real], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_method_is_told_how_all_keys_of_a_cache_were_rotated(model):
    ids = torch.arange(3, 23)[None]
    method = Remembering()
    cos, sin = model.model.rotary_emb(torch.zeros(1, 20, 32), torch.arange(20)[None])
    with sf.transformers.sparse(model, prefill=method, decode=method):
        cache = transformers.DynamicCache(config=model.config)
        for lo, hi in ((0, 9), (9, 15), (15, 16), (16, 20)):
            model(ids[:, lo:hi], past_key_values=cache, use_cache=True)
            for told in SEEN[-2:]:
                assert torch.equal(told["rope"][0], cos[:, :hi]) and torch.equal(told["rope"][1], sin[:, :hi])
        cache.crop(-8)  # of 20
        model(ids[:, 12:14], past_key_values=cache, use_cache=True)
        assert torch.equal(SEEN[-1]["rope"][0], cos[:, :14])


@torch.no_grad()
def test_dual_chunks_go_on_behind_a_cache(model):
    """One token at a time, and a prompt in parts: what one call over all of it gives."""
    method, ids = sf.methods.DualChunkAttention(context=16), torch.arange(3, 43)[None]
    with sf.transformers.sparse(model, prefill=method, decode=method):
        whole = model(ids, use_cache=False).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = [
            model(ids[:, lo:hi], past_key_values=cache, use_cache=True).logits
            for lo, hi in ((0, 21), (21, 33), *((n, n + 1) for n in range(33, 40)))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)

"""Caches inside of Transformers: the same tokens as with its own, without copying them for each token."""

from __future__ import annotations

import copy

import pytest
import torch

import sparseflash as sf
from sparseflash.cache import Growing

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer  # noqa: E402

import transformer_models as models  # noqa: E402  (it needs Transformers)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**models.TEXT | {"initializer_range": 0.5})
    return transformers.LlamaForCausalLM(config).eval()


PROMPT = (torch.arange(70) * 37 % 94 + 3).view(2, 35)
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3, "do_sample": False},
    "samples of one prompt": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
}


def generated(model, ids, way, **options):
    torch.manual_seed(0)
    if "lookup" in way:
        ids = ids[:1]
        options = {name: x[:1] for name, x in options.items() if name == "attention_mask"}
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **WAYS[way], **options)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_gives_the_tokens_of_the_stock_model(model, way, padded):
    mask = torch.ones_like(PROMPT)
    if padded:
        mask[-1, :9] = 0
    stock = generated(model, PROMPT, way, attention_mask=mask)
    with sf.transformers.sparse(model):
        ours = generated(model, PROMPT, way, attention_mask=mask)
    assert torch.equal(stock, ours)


@torch.no_grad()
def test_the_cache_that_a_model_makes_has_room_and_changes_no_bit(model):
    """Against layers that concatenate, under the same attention: logits are equal bit for bit."""
    ids, runs = PROMPT[:1], []
    with sf.transformers.sparse(model):
        for cache in (None, Cache(layers=[DynamicLayer() for _ in range(2)]), DynamicCache()):
            out, logits = model(ids, past_key_values=cache, use_cache=True), []
            for _ in range(12):
                logits.append(out.logits[:, -1])
                token = logits[-1].argmax(-1, keepdim=True)
                out = model(token, past_key_values=out.past_key_values)
            runs.append(torch.stack(logits))
            own = {type(layer) for layer in out.past_key_values.layers}
            assert own == {DynamicLayer if type(cache) is Cache else Growing}
            assert out.past_key_values.get_seq_length() == 47
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@torch.no_grad()
def test_a_cache_that_holds_something_and_layers_that_slide_stay_as_they_are(model):
    filled = DynamicCache()
    model(PROMPT, past_key_values=filled)
    with sf.transformers.sparse(model):
        model(PROMPT[:, :1], past_key_values=filled)
    assert {type(layer) for layer in filled.layers} == {DynamicLayer}
    config = transformers.Gemma3TextConfig(
        **models.TEXT, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    )
    gemma = transformers.Gemma3ForCausalLM(config).eval()
    with sf.transformers.sparse(gemma):
        cache = gemma(PROMPT).past_key_values
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "Growing"]


@torch.no_grad()
def test_rounds_of_a_chat_go_on_with_the_cache_and_a_copy_of_it(model):
    def chat(attention):
        model.set_attn_implementation(attention)
        cache = model(PROMPT[:, :20], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        one = model(PROMPT[:, 20:], past_key_values=cache).logits
        cache.crop(-15)  # back to the first 20 tokens
        again = model(PROMPT[:, 20:], past_key_values=cache).logits
        return one, again, model(PROMPT[:, 20:], past_key_values=other).logits

    try:
        stock, ours = chat("sdpa"), chat("sparse")
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(ours[0], ours[1]) and torch.equal(ours[0], ours[2])
    torch.testing.assert_close(stock[0], ours[0], atol=1e-4, rtol=1e-4)


def test_layers_stand_in_a_cache_of_ones_own_under_any_attention(model):
    cache = Cache(layers=[Growing() for _ in range(2)])
    with torch.no_grad():
        stock = model.generate(PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0)
        ours = model.generate(
            PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0, past_key_values=cache
        )
    assert torch.equal(stock, ours) and cache.get_seq_length() == 40

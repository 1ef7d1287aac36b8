"""A model that reads a part of a prompt: the same as the model over these tokens, at their places."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

models = pytest.importorskip("transformer_models", reason="Transformers is not installed")

SpecPrefill = sf.transformers.SpecPrefill
T = 90
IDS = (torch.arange(2 * T + 20) * 37 % 94 + 3).view(2, -1)
PROMPT, BEHIND = IDS[:, :T], IDS[:, T:]


def made(seed, **changes):
    torch.manual_seed(seed)
    shape = models.TEXT | {"initializer_range": 0.3, "num_hidden_layers": 3} | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()


@pytest.fixture(scope="module")
def model():
    return made(0)


@pytest.fixture(scope="module")
def draft():
    return made(1, num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)


def weights(model, ids, layer):
    """Attention weights of a layer by stock eager code, `[B,H,T,T]`."""
    model.set_attn_implementation("eager")
    try:
        return model(ids, output_attentions=True).attentions[layer]
    finally:
        model.set_attn_implementation("sdpa")


def smooth(x, n):
    """Mean over the neighbours that there are, `[..., T]`."""
    half, T = n // 2, x.shape[-1]
    return torch.stack([x[..., max(0, t - half) : t + half + 1].mean(-1) for t in range(T)], -1)


def best(score, how):
    """Places of the best chunks, one row at a time."""
    found = []
    for row in score:
        parts = list(torch.arange(len(row)).split(how.chunk))
        worth = [float(row[part].mean()) for part in parts]
        worth[0], worth[-1] = 1e30, 1e31
        order = sorted(range(len(parts)), key=lambda n: -worth[n])[: how.chunks(len(row))]
        found.append(torch.cat([parts[n] for n in sorted(order)]))
    return torch.stack(found)


@torch.no_grad()
def over(model, read, behind):
    """Stock logits of the tokens read at their places, and of what follows the whole prompt."""
    first = model(
        PROMPT.gather(1, read), position_ids=read, use_cache=True, attention_mask=torch.ones_like(read)
    )
    logits = [first.logits]
    for n in range(behind.shape[1]):
        at = torch.full((len(behind), 1), T + n)
        more = model(behind[:, n : n + 1], position_ids=at, past_key_values=first.past_key_values)
        logits.append(more.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("by", ["attention", "random", "ends"])
def test_what_is_read_and_what_follows_are_the_stock_models_at_those_places(model, by):
    how = SpecPrefill(keep=0.4, chunk=8, last=16, smooth=5, by=by)
    with sf.transformers.sparse(model, tokens=how):
        first = model(PROMPT)
        cache = first.past_key_values
        step = model(BEHIND[:, :1], past_key_values=cache)
    read = cache.layers[0].read
    assert read.shape == (2, 4 * 8 + 2) and cache.get_seq_length() == T + 1
    assert bool((read[:, :8] == torch.arange(8)).all()) and bool((read[:, -2:] == torch.arange(88, 90)).all())
    with sf.transformers.sparse(model):  # the cache is an ordinary one from here on, also for several tokens
        rest = model(BEHIND[:, 1:], past_key_values=cache)
    found = torch.cat([first.logits, step.logits, rest.logits], 1)
    torch.testing.assert_close(found, over(model, read, BEHIND), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_an_early_layer_judges_by_the_attention_of_the_last_tokens(model):
    how = SpecPrefill(keep=0.3, chunk=8, last=16, smooth=5, layers=[0, 1])
    seen = torch.stack([weights(model, PROMPT, n)[:, :, -16:].mean(2) for n in (0, 1)])
    want = best(smooth(seen, 5).amax((0, 2)), how)
    assert torch.equal(how.choose(model, PROMPT), want)
    assert not torch.equal(want[0], SpecPrefill(keep=0.3, chunk=8, by="ends").choose(model, PROMPT)[0])


@torch.no_grad()
def test_layers_above_the_last_judge_do_not_run(model):
    ran = []
    hooks = [
        layer.mlp.register_forward_hook(lambda m, a, o, n=n: ran.append((n, o.shape[1])))
        for n, layer in enumerate(model.model.layers)
    ]
    with sf.transformers.sparse(model, tokens=SpecPrefill(keep=0.3, chunk=8, last=16, layers=1)):
        model(PROMPT)
    for hook in hooks:
        hook.remove()
    assert ran == [(0, T), (0, 26), (1, 26), (2, 26)]


@torch.no_grad()
def test_a_draft_judges_with_tokens_of_its_own(model, draft):
    how = SpecPrefill(keep=0.3, chunk=8, last=4, smooth=3, ahead=3, draft=draft)
    ids, steps = PROMPT, []
    for step in range(4):
        rows = 4 if step == 0 else 1
        seen = torch.stack([weights(draft, ids, n)[:, :, -rows:].mean(2) for n in (0, 1)])
        steps.append(smooth(seen, 3).amax((0, 2))[:, :T])
        ids = torch.cat([ids, draft(ids).logits[:, -1:].argmax(-1)], 1)
    want = best(torch.stack(steps).mean(0), how)
    with sf.transformers.sparse(model, tokens=how):
        cache = model(PROMPT).past_key_values
    assert torch.equal(cache.layers[-1].read, want)
    assert draft.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_planted_token_is_read_and_random_chunks_miss_it(draft):
    """A head of the model looks at one token from everywhere; that chunk is read, whatever its place."""
    model = made(3, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    needle = 2
    wanted = torch.nn.functional.normalize(model.model.embed_tokens.weight[needle], dim=0)
    k = torch.zeros_like(attention.k_proj.weight)
    slow = attention.head_dim // 2 - 1  # the pair that hardly turns
    k[slow] = 50 * wanted
    attention.k_proj.weight.copy_(k)
    attention.q_proj.weight.copy_(torch.randn_like(attention.q_proj.weight) * 0.01)
    ids = PROMPT.clone()
    ids[ids == needle] = 5
    hits = 0
    for place in (20, 37, 61):
        one = ids.clone()
        one[:, place] = needle
        how = SpecPrefill(keep=0.26, chunk=8, last=8, smooth=1, layers=0)
        hits += bool((how.choose(model, one) == place).any(-1).all())
    assert hits == 3
    missed = [
        bool((SpecPrefill(keep=0.26, chunk=8, by="random", seed=n).choose(model, ids) == 37).any())
        for n in range(8)
    ]
    assert not all(missed)


@torch.no_grad()
def test_everything_is_the_model_itself_and_short_prompts_are_read_whole(model):
    stock = model(PROMPT).logits
    with sf.transformers.sparse(model):
        ours = model(PROMPT).logits
    for ids, how, want in (
        (PROMPT, SpecPrefill(keep=1), ours),
        (PROMPT[:, :30], SpecPrefill(keep=0.5, chunk=32), ours[:, :30]),
    ):
        with sf.transformers.sparse(model, tokens=how):
            out = model(ids)
        torch.testing.assert_close(out.logits, want, atol=0 if how.keep == 1 else 1e-4, rtol=0)
        assert type(out.past_key_values.layers[0]) is sf.cache.Growing
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generation_goes_on_from_what_was_read(model, way):
    how = SpecPrefill(keep=0.4, chunk=8, last=16)
    own = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False, **way}
    torch.manual_seed(0)
    with sf.transformers.sparse(model, tokens=how):
        found = model.generate(PROMPT, **own)
    if way:
        assert found.shape[1] == T + 6
        return
    read, ids = how.choose(model, PROMPT), PROMPT
    for _ in range(6):
        last = over(model, read, ids[:, T:])[:, -1:].argmax(-1)
        ids = torch.cat([ids, last], 1)
    assert torch.equal(found, ids)


@torch.no_grad()
def test_its_cache_is_kept_in_files_and_reordered_and_cropped_behind_the_prompt(model, tmp_path):
    with sf.transformers.sparse(model, tokens=SpecPrefill(keep=0.4, chunk=8)):
        cache = model(PROMPT).past_key_values
    layer = cache.layers[0]
    sf.cache.save([layer], tmp_path / "c.safetensors")
    [again] = sf.cache.load(tmp_path / "c.safetensors")
    assert again.get_seq_length() == T and torch.equal(again.read, layer.read)
    again.append(*torch.randn(2, 2, *layer.keys.shape[1:2], 3, layer.keys.shape[3]))
    again.crop(-1)
    assert (again.get_seq_length(), again.tokens) == (T + 2, layer.tokens + 2)
    again.crop(T)
    assert again.get_seq_length() == T
    with pytest.raises(sf.SparseFlashError, match="expected at least the prompt"):
        again.crop(T - 1)
    again.select_rows(torch.tensor([1]))
    assert torch.equal(again.read, layer.read[1:])


@torch.no_grad()
def test_only_an_empty_dynamic_cache_is_made_thinner(model):
    class Own(transformers.DynamicCache):
        pass

    sliding = transformers.DynamicCache(
        config=transformers.MistralConfig(sliding_window=4, num_hidden_layers=len(model.model.layers))
    )
    for cache in (Own(), sliding, transformers.StaticCache(config=model.config, max_cache_len=2 * T)):
        with sf.transformers.sparse(model, tokens=SpecPrefill(keep=0.4, chunk=8)):
            with pytest.raises(sf.SparseFlashError, match="expected an empty DynamicCache"):
                model(PROMPT, past_key_values=cache)
    with sf.transformers.sparse(model, tokens=SpecPrefill(keep=0.4, chunk=8)):
        assert model(PROMPT, past_key_values=transformers.DynamicCache()).past_key_values.layers[0].tokens < T


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": 0}, "keep=0: expected a share"),
        ({"keep": 1.5}, "keep=1.5: expected a share"),
        ({"chunk": 0}, "chunk=0: expected an int >= 1"),
        ({"smooth": 4}, "smooth=4: expected an odd"),
        ({"by": "luck"}, "by='luck': expected attention, random or ends"),
        ({"draft": "gpt"}, "draft='gpt': expected a model"),
    ],
)
def test_bad_settings_are_refused(given, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        SpecPrefill(**given)


@torch.no_grad()
def test_what_it_cannot_do_is_said(model, draft):
    how = SpecPrefill(keep=0.4, chunk=8)
    padded = torch.ones_like(PROMPT)
    padded[0, :5] = 0
    other = made(1, num_hidden_layers=1, vocab_size=50)
    cases = [
        ({"attention_mask": padded}, {}, "with padding"),
        ({"labels": PROMPT}, {}, "with labels"),
        (
            {"input_ids": None, "inputs_embeds": torch.randn(1, T, model.config.hidden_size)},
            {},
            "no input_ids",
        ),
        ({}, {"cache": sf.cache.StreamingLLM(budget=32)}, None),
    ]
    for inputs, own, said in cases:
        with sf.transformers.sparse(model, tokens=how, **own):
            if said:
                with pytest.raises(sf.SparseFlashError, match=said):
                    model(**{"input_ids": PROMPT, **inputs})
    for bad, said in (
        (SpecPrefill(keep=0.4, chunk=8, draft=other), "has 50 words"),
        (SpecPrefill(keep=0.4, chunk=8, layers=9), "expected some of the attention layers"),
        (SpecPrefill(keep=0.4, chunk=8, layers=[]), "expected some of the attention layers"),
    ):
        with sf.transformers.sparse(model, tokens=bad), pytest.raises(sf.SparseFlashError, match=said):
            model(PROMPT)
    with pytest.raises(sf.SparseFlashError, match="expected sf.transformers.SpecPrefill"):
        with sf.transformers.sparse(model, tokens=0.3):
            pass
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=99
    )
    with pytest.raises(sf.SparseFlashError, match="is bidirectional"):
        with sf.transformers.sparse(transformers.BertModel(config), tokens=how):
            pass

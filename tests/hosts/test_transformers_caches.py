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
@pytest.mark.parametrize("cache", [None, sf.cache.Share(room=3)], ids=["own", "shared"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_gives_the_tokens_of_the_stock_model(model, way, padded, cache):
    """Where samples share a prompt, the model reads it once, whoever repeats it."""
    mask, rows = torch.ones_like(PROMPT), []
    if padded:
        mask[-1, :9] = 0
    stock = generated(model, PROMPT, way, attention_mask=mask)
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with sf.transformers.sparse(model, cache=cache):
        ours = generated(model, PROMPT, way, attention_mask=mask)
    handle.remove()
    assert torch.equal(stock, ours)
    assert cache is None or rows[0] == (1 if "lookup" in way else 2)


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


READERS = [
    sf.methods.Quest(budget=10**6),
    sf.methods.LServe(budget=10**6),
    sf.methods.DoubleSparsity(channels=(tuple(range(8)),), budget=10**6),
]


@torch.no_grad()
@pytest.mark.parametrize("method", READERS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("way", ["greedy", "prompt lookup"])
def test_a_method_that_reads_everything_gives_the_tokens_of_the_stock_model(model, method, way):
    mask = torch.ones_like(PROMPT)
    mask[-1, :9] = 0
    stock = generated(model, PROMPT, way, attention_mask=mask)
    with sf.transformers.sparse(model, decode=method):
        assert torch.equal(stock, generated(model, PROMPT, way, attention_mask=mask))


@torch.no_grad()
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_behind_padding_a_sequence_reads_the_pages_that_it_reads_alone(model, way, monkeypatch):
    """And nothing is gathered for it: neither keys nor values move."""
    quest = sf.methods.Quest(budget=8, page=4)
    mask = torch.ones_like(PROMPT)
    mask[-1, :9] = 0
    with sf.transformers.sparse(model, decode=quest):
        alone = generated(model, PROMPT[1:, 9:], way)
        monkeypatch.setattr(sf.integrations.transformers.control, "gather", None)
        both = generated(model, PROMPT, way, attention_mask=mask)
    assert torch.equal(both[1, 35:], alone[0, 26:])
    assert not torch.equal(both, generated(model, PROMPT, way, attention_mask=mask))  # it read less


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        sf.methods.SinkWindow(window=6, sink_tokens=3),
        sf.methods.Window(window=(4, 9, 4, 50)),
        sf.methods.Strided(block=4, local=1, stride=2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_behind_padding_a_method_that_looks_at_lengths_moves_no_key(model, method, monkeypatch):
    mask = torch.ones_like(PROMPT)
    mask[-1, :9] = 0
    with sf.transformers.sparse(model, decode=method):
        alone = generated(model, PROMPT[1:, 9:], "greedy")
        if not isinstance(method, sf.methods.Strided):  # whose units are blocks of rows
            monkeypatch.setattr(sf.integrations.transformers.control, "gather", None)
        both = generated(model, PROMPT, "greedy", attention_mask=mask)
    assert torch.equal(both[1, 35:], alone[0, 26:])


@torch.no_grad()
def test_what_a_method_reads_does_not_depend_on_whose_the_cache_is(model):
    """Bounds that were kept while keys were appended, after a crop, and bounds made of all keys at once."""
    quest = sf.methods.Quest(budget=8, page=4)
    runs = []
    with sf.transformers.sparse(model, decode=quest):
        for cache in (DynamicCache(), Cache(layers=[DynamicLayer() for _ in range(2)])):
            model(PROMPT, past_key_values=cache)
            for _ in range(2):  # the second time behind a crop
                logits = [model(PROMPT[:, n : n + 1], past_key_values=cache).logits for n in range(6)]
                cache.crop(-5)
            runs.append(torch.stack(logits))
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)


POLICIES = [
    sf.cache.SnapKV(budget=10**6),
    sf.cache.H2O(budget=10**6),
    {1: sf.cache.StreamingLLM(budget=10**6)},
]


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("way", ["greedy", "beams", "prompt lookup"])
def test_a_policy_with_room_for_everything_gives_the_tokens_of_the_stock_model(model, policy, way):
    mask = torch.ones_like(PROMPT)
    mask[-1, :9] = 0
    stock = generated(model, PROMPT, way, attention_mask=mask)
    with sf.transformers.sparse(model, cache=policy):
        assert torch.equal(stock, generated(model, PROMPT, way, attention_mask=mask))


@torch.no_grad()
def test_a_policy_holds_what_it_says_and_positions_go_on(model):
    """Logits are those of a full cache whose other keys are hidden; padding is not held, a chat goes on."""
    mask = torch.ones_like(PROMPT)
    mask[-1, :9] = 0
    policy = sf.cache.StreamingLLM(budget=12, sinks=2)
    hidden, cache = DynamicCache(), DynamicCache()
    model(PROMPT, attention_mask=mask, past_key_values=hidden)
    with sf.transformers.sparse(model, cache=policy):
        model(PROMPT, attention_mask=mask, past_key_values=cache)
        assert {type(layer) for layer in cache.layers} == {sf.cache.Evicting}
        for t in range(35, 41):
            token = PROMPT[:, t - 35 : t - 34]
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            where = mask.cumsum(1)[:, -1:] - 1
            ours = model(token, attention_mask=mask, past_key_values=cache, position_ids=where).logits
            first = torch.tensor([0, 9])[:, None]
            at = torch.arange(t + 1)
            seen = ((at >= first) & (at < first + 2)) | (at > t - 10)
            want = model(
                token, attention_mask=seen[:, None, None], past_key_values=hidden, position_ids=where
            )
            torch.testing.assert_close(ours, want.logits, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == 41 and cache.layers[0].held.max() <= 12 + 64
        model(PROMPT[:, :9], past_key_values=cache)
        assert cache.get_seq_length() == 50


@torch.no_grad()
def test_a_text_is_read_in_chunks_and_questions_that_are_not_kept(model):
    """With room for everything it is one prompt; with little, chunk by chunk, as much as the policy says."""
    ids, question = PROMPT[:, :30], PROMPT[:, 30:]
    stock = model.generate(PROMPT, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0})
    for policy in (sf.cache.Citrus(10**6), sf.cache.H2O(10**6, renumber=True)):
        with sf.transformers.sparse(model, cache=policy):
            cache = sf.transformers.read(model, ids, chunk=8, question=question)
            assert cache.get_seq_length() == 30
            ours = model.generate(
                PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0, past_key_values=cache
            )
        assert torch.equal(stock, ours)
    sizes, book = [], PROMPT[:1].repeat(1, 18)
    with sf.transformers.sparse(model, cache=sf.cache.Citrus(40, recent=32, renumber=True)):
        for n in (100, 600):  # more than the model has positions for
            cache = sf.transformers.read(model, book[:, :n], chunk=32, question=question[:1])
            sizes.append(sum(layer.bytes for layer in cache.layers))
    assert sizes[0] == sizes[1] and cache.get_seq_length() == 600
    with sf.transformers.sparse(model), pytest.raises(sf.SparseFlashError, match="policy in every layer"):
        sf.transformers.read(model, ids, chunk=8, question=question)


@torch.no_grad()
@pytest.mark.parametrize("way", ["greedy", "beams", "prompt lookup"])
def test_keys_in_a_file_give_the_tokens_of_the_stock_model(model, way, tmp_path):
    mask = torch.ones_like(PROMPT)
    mask[-1, :9] = 0
    stock = generated(model, PROMPT, way, attention_mask=mask)
    for given in ({}, {"decode": sf.methods.Quest(budget=10**6)}):
        with sf.transformers.sparse(model, cache=sf.cache.Offload(tmp_path), **given):
            assert torch.equal(stock, generated(model, PROMPT, way, attention_mask=mask))


@torch.no_grad()
def test_of_keys_in_files_a_method_reads_what_it_chooses(model, tmp_path):
    """The upper layer alone lies in a file; and in a chain of files each layer knows the next."""
    quest = sf.methods.Quest(budget=8, page=4)
    runs = []
    for cache in (None, {1: sf.cache.Offload(tmp_path)}, sf.cache.Offload(tmp_path)):
        with sf.transformers.sparse(model, decode=quest, cache=cache):
            kept = DynamicCache()
            model(PROMPT, past_key_values=kept)
            logits = [model(PROMPT[:, n : n + 1], past_key_values=kept).logits for n in range(4)]
        runs.append(torch.stack(logits))
        kinds = [type(layer).__name__ for layer in kept.layers]
        if cache is not None:
            assert kinds == ["Growing" if isinstance(cache, dict) else "Offloaded", "Offloaded"]
            assert kept.layers[1].reads.bytes > 0
    assert kept.layers[0].following is kept.layers[1]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@torch.no_grad()
def test_turns_of_a_chat_choose_rounds_in_one_layer_for_those_above_it(model):
    """Two turns, then tokens: with all rounds the logits of the stock model; else upper layers read less."""
    method = sf.methods.RoundAttention(watershed=0, share=1.0)
    few = sf.methods.RoundAttention(watershed=0, share=0.05)

    def chat(**given):
        logits = []
        with sf.transformers.sparse(model, **given):
            cache = DynamicCache()
            for a, b in ((0, 12), (12, 20), (20, 30), (30, 31), (31, 32)):
                logits.append(model(PROMPT[:, a:b], past_key_values=cache).logits[:, -1])
        return torch.stack(logits)

    dense, all_rounds, less = chat(), chat(prefill=method, decode=method), chat(prefill=few, decode=few)
    torch.testing.assert_close(dense, all_rounds, atol=1e-4, rtol=1e-4)
    assert torch.equal(dense[0], less[0])
    assert all(not torch.allclose(dense[n], less[n], atol=1e-2) for n in (2, 3, 4))


@torch.no_grad()
def test_what_was_let_go_is_as_if_it_had_never_been_where_a_policy_renumbers(model):
    """One layer: what remains says what it says without the rest of the text before it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**models.TEXT | {"initializer_range": 0.5, "num_hidden_layers": 1})
    small = transformers.LlamaForCausalLM(config).eval()
    policy = sf.cache.StreamingLLM(budget=12, sinks=2, renumber=True)
    kept = torch.cat([PROMPT[:1, :2], PROMPT[:1, 25:]], 1)
    want = small.generate(kept, max_new_tokens=1, do_sample=False, pad_token_id=0, output_logits=True,
                          return_dict_in_generate=True)  # fmt: skip
    with sf.transformers.sparse(small, cache=policy):
        cache = sf.transformers.read(small, PROMPT[:1, :34], chunk=17)
        ours = small(PROMPT[:1, 34:], past_key_values=cache).logits[:, -1]
    size = float(want.logits[0].abs().max())
    torch.testing.assert_close(ours, want.logits[0], atol=2e-5 * size, rtol=0)


@torch.no_grad()
def test_what_a_policy_cannot_do_is_said(model):
    policy = sf.cache.StreamingLLM(budget=12)
    with pytest.raises(sf.SparseFlashError, match="mapping from the numbers of layers, 0..1"):
        with sf.transformers.sparse(model, cache={7: policy}):
            pass
    with sf.transformers.sparse(model, cache=policy, decode=sf.methods.Quest()):
        with pytest.raises(sf.SparseFlashError, match="decode= or cache="):
            generated(model, PROMPT, "greedy")
    filled = DynamicCache()
    model(PROMPT, past_key_values=filled)
    with sf.transformers.sparse(model, cache=policy), pytest.warns(UserWarning, match="keeps its layers"):
        model(PROMPT[:, :1], past_key_values=filled)
    own = Cache(layers=[sf.cache.Evicting(policy) for _ in range(2)])
    with pytest.raises(sf.SparseFlashError, match="attn_implementation='sparse'"):
        model.generate(PROMPT, past_key_values=own, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with sf.transformers.sparse(model, prefill=sf.methods.SinkWindow(window=8), cache=policy):
        window = generated(model, PROMPT, "greedy")
    assert not torch.equal(window, generated(model, PROMPT, "greedy"))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_model_says_what_it_says_by_itself(name, books):
    """In fp32, token by token: with room, methods that read and caches that keep everything."""
    try:
        model, tokenizer = sf.transformers.load(name)
    except sf.SparseFlashError as error:
        assert "not installed" in str(error)
        pytest.skip(f"{name} is not installed: make models")
    ids = tokenizer(books[0].read_text()[20000:24000], return_tensors="pt").input_ids[:, :600]
    how = {"max_new_tokens": 24, "do_sample": False}
    stock = model.generate(ids, **how)
    everything = 10**6
    for given in (
        {},
        {"decode": sf.methods.Quest(budget=everything)},
        {"decode": sf.methods.LServe(budget=everything)},
        {"cache": sf.cache.Everything()},
        {"cache": sf.cache.SnapKV(budget=everything)},
        {"cache": sf.cache.H2O(budget=everything)},
        {"cache": sf.cache.Compression()},
    ):
        with sf.transformers.sparse(model, **given):
            assert torch.equal(model.generate(ids, **how), stock), given
    with sf.transformers.sparse(model, cache=sf.cache.SnapKV(budget=300)):
        some = model.generate(ids, **how)
    assert float((some == stock)[:, 600:].float().mean()) > 0.5


@torch.no_grad()
def test_questions_about_one_text_share_it(model):
    """One text, three questions of unlike length: each answer is that of its own prompt alone."""
    text, questions = PROMPT[:1], [[5, 6, 7], [8, 9], [11, 12, 13, 14, 15]]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(torch.cat([text, torch.tensor([x])], 1), **how) for x in questions]
    rows = torch.tensor([[0] * (5 - len(x)) + x for x in questions])
    ids = torch.cat([text.expand(3, -1), rows], 1)
    mask = torch.cat([torch.ones(3, text.shape[1], dtype=torch.long), (rows > 0).long()], 1)
    with sf.transformers.sparse(model, cache=sf.cache.Share()):
        cache = model(text, use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **how)
    for x, y in zip(alone, out):
        assert x[0, -6:].tolist() == y[-6:].tolist()
    assert cache.layers[0].prompts == 1

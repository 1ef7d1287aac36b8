"""Packed documents in Transformers models: apart in every call and in caches, or refused by name."""

from __future__ import annotations

import copy
import functools
import itertools
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import sparseflash as sf
from sparseflash.integrations.transformers.documents import mixing
from sparseflash.integrations.transformers.mask import _untold as untold
from test_transformers import alone, close, everywhere, model, tokens
from transformer_models import TEXT, tiny

T, EDGES = 150, (0, 1, 64, 150)
OLDEST = hf.__version__.startswith("5.0.")
"""Many models make their masks without asking anybody there, and generate() repeats a position."""


def positions(edges=EDGES):
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(edges)])[None]


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gpt-oss"])
def test_a_compiled_windowed_model_with_a_cache_checks_its_positions(family):
    torch._dynamo.reset()
    one = tiny(family, num_hidden_layers=1, layer_types=["sliding_attention"])
    everywhere(one, "sparse")
    ids, whole, packed = tokens(1), torch.arange(T)[None], positions()
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(input_ids=ids, position_ids=whole).logits, one(input_ids=ids).logits)
        with pytest.raises(RuntimeError, match="position_ids begin anew.*use_cache=False"):
            compiled(input_ids=ids, position_ids=packed)
        if family == "mistral":  # gpt-oss tells its mask of no positions
            apart = compiled(input_ids=ids, position_ids=packed, use_cache=False).logits
            close(apart, alone(one, ids, EDGES))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NemotronForCausalLM", "XGLMForCausalLM", "MistralForCausalLM"])
def test_a_compiled_model_says_what_its_attention_cannot_hear_of_documents(name, caplog):
    torch._dynamo.reset()
    untold.clear()
    models = dropping() | {"MistralForCausalLM": hf.MistralConfig(**TEXT)}
    one = everywhere(getattr(hf, name)(models[name]).eval(), "sparse")
    compiled = torch.compile(one, fullgraph="XGLM" not in name, backend="eager")  # it attends by itself
    with torch.no_grad():
        compiled(input_ids=tokens(1, 60), position_ids=positions((0, 60)))
    said = {"NemotronForCausalLM": ["no cu_seq_lens:"], "XGLMForCausalLM": ["no position_ids"]}.get(name, [])
    heard = [r.message for r in caplog.records if r.name == "sparseflash"]
    assert len(heard) == len(said) and all(x in one for x, one in zip(said, heard))
    torch._dynamo.reset()


# ---------------------------------------------------------------- in a cache


def prefilled(one, ids, edges=EDGES, **more):
    """The cache of a call of several documents."""
    end = edges[-1]
    return one(input_ids=ids[:, :end], position_ids=positions(edges)[:, :end], **more).past_key_values


def gemma3():
    """Masks are made before there is a cache, by the model around the one that makes it."""
    torch.manual_seed(0)
    text = TEXT | {"head_dim": 16, "sliding_window": 24}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    for name, n in (("image_token_index", 90), ("boi_token_index", 91), ("eoi_token_index", 92)):
        setattr(config, name, n)
    config.image_token_id = 90
    return hf.Gemma3ForConditionalGeneration(config).eval()


FAMILIES = ("llama", "mistral", "gemma2", "gpt-oss", "deepseek-v3", "gemma3")


@functools.cache
def cached(family):
    return everywhere(gemma3() if family == "gemma3" else model(family), "sparse")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_behind_a_cache_of_documents_see_their_own(family):
    """The last document goes on, a chunk and then token by token; then another begins, in the same cache."""
    one, ids = everywhere(cached(family), "sparse"), tokens(1)
    ids = ids.clamp(max=89)
    with torch.no_grad():
        want = one(input_ids=ids[:, 64:]).logits
        other = one(input_ids=ids[:, :20]).logits
        cache, got = prefilled(one, ids, (0, 1, 64, 100)), []
        for a, b in ((100, 148), (148, 149), (149, 150)):
            at = torch.arange(a - 64, b - 64)[None]
            got.append(one(input_ids=ids[:, a:b], position_ids=at, past_key_values=cache).logits)
        close(torch.cat(got, 1), want[:, 36:])
        for a, b in ((0, 1), (1, 19), (19, 20)):
            at = torch.arange(a, b)[None]
            got.append(one(input_ids=ids[:, a:b], position_ids=at, past_key_values=cache).logits)
        close(torch.cat(got[3:], 1), other)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_belong_to_no_document_of_a_cache_are_refused(family):
    one, ids = everywhere(cached(family), "sparse"), tokens(1).clamp(max=89)
    with torch.no_grad():
        for n in (1, 7):
            cache = prefilled(one, ids, (0, 1, 64, 100))
            for at in (None, torch.arange(63, 63 + n)[None], torch.arange(30, 30 + n)[None]):
                with pytest.raises(
                    sf.SparseFlashError, match="several packed.*(expected 36.*or 0|not known)"
                ):
                    one(input_ids=ids[:, :n], position_ids=at, past_key_values=copy.deepcopy(cache))


def test_layers_that_are_given_positions_of_their_own_change_nothing_about_a_cache():
    """Some models hand a copy down: it says no more than what the mask was made of."""
    one, ids = everywhere(tiny("llama"), "sparse"), tokens(1)

    def copied(module, given, named):
        return given, named | {"position_ids": named["position_ids"].clone()}

    for layer in one.model.layers:
        layer.self_attn.register_forward_pre_hook(copied, with_kwargs=True)
    with torch.no_grad():
        cache, got = prefilled(one, ids, (0, 1, 64, 100)), []
        for a, b in ((100, 120), (120, 140), (140, 150)):  # the third document, it and a fourth, the fourth
            at = torch.cat([torch.arange(36, 56), torch.arange(56, 66), torch.arange(20)])
            at = at[a - 100 : b - 100][None]
            got.append(one(input_ids=ids[:, a:b], position_ids=at, past_key_values=cache).logits)
        close(torch.cat(got, 1), alone(one, ids, (64, 130, 150))[:, 36:])


def test_a_chunk_that_begins_another_document_is_apart_from_what_the_cache_holds():
    one, ids, cache = everywhere(cached("mistral"), "sparse"), tokens(1), hf.DynamicCache()
    with torch.no_grad():
        want, got = alone(one, ids, (0, 70, 110, 150)), []
        for a, b in ((0, 70), (70, 71), (71, 120), (120, 150)):
            at = positions((0, 70, 110, 150))[:, a:b]
            got.append(one(input_ids=ids[:, a:b], position_ids=at, past_key_values=cache).logits)
    close(torch.cat(got, 1), want)


def test_rows_of_a_cache_have_documents_of_their_own_and_padding_is_in_none():
    one, ids = everywhere(cached("mistral"), "sparse"), tokens()
    at = torch.cat([positions((0, 40, 100)), positions((0, 70, 90, 100))])
    at = torch.cat([at, torch.tensor([[60], [10]])], 1)
    mask = torch.ones(2, 101, dtype=torch.long)
    mask[1, 90:100] = 0  # its last document ends before padding
    at[1, 100] = 20
    with torch.no_grad():
        first = {"input_ids": ids[:, :100], "position_ids": at[:, :100], "attention_mask": mask[:, :100]}
        cache = one(**first).past_key_values
        more = {"position_ids": at[:, 100:], "attention_mask": mask, "past_key_values": cache}
        got = one(input_ids=ids[:, 100:101], **more).logits
        close(got[:1], one(input_ids=ids[:1, 40:101]).logits[:, -1:])
        width = torch.cat([torch.ones(1, 20), torch.zeros(1, 10), torch.ones(1, 1)], 1).long()
        row = torch.cat([ids[1:, 70:100], ids[1:, 100:101]], 1)  # a window counts padding
        where = torch.cat([torch.arange(20), torch.zeros(10, dtype=torch.long), torch.tensor([20])])[None]
        want = one(input_ids=row, attention_mask=width, position_ids=where).logits[:, -1:]
        close(got[1:], want)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generation_goes_on_with_the_last_document(how):
    one, ids = everywhere(cached("mistral"), "sparse"), tokens(1)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True} | how
    if OLDEST:
        with pytest.raises(sf.SparseFlashError, match="go on at 85, .* expected 86"):
            one.generate(ids, position_ids=positions(), **options)
        return
    got = one.generate(ids, position_ids=positions(), **options)
    want = one.generate(ids[:, 64:], **options)
    assert torch.equal(got[:, T:], want[:, T - 64 :])


def test_a_cache_forgets_documents_that_were_taken_out_of_it():
    one, ids = everywhere(cached("llama"), "sparse"), tokens(1)
    with torch.no_grad():
        cache = prefilled(one, ids)
        cache.crop(60 - T)  # in the second document, which has 59 of its tokens left
        got = one(input_ids=ids[:, 60:63], position_ids=torch.arange(59, 62)[None], past_key_values=cache)
        close(got.logits, one(input_ids=ids[:, 1:63]).logits[:, -3:])
        static = hf.StaticCache(config=one.config, max_cache_len=160)
        prefilled(one, ids, past_key_values=static)
        static.reset()
        one(input_ids=ids[:, :40], past_key_values=static)
        got = one(input_ids=ids[:, 40:50], past_key_values=static).logits
        close(got, one(input_ids=ids[:, :50]).logits[:, 40:])


# ---------------------------------------------------------------- models that mix


def hybrids():
    """Tiny models with layers of their own that carry something from token to token."""
    small = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    linear = {f"linear_num_{x}_heads": 2 for x in ("key", "value")}
    linear |= {f"linear_{x}_head_dim": 16 for x in ("key", "value")} | {"head_dim": 16}
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "num_experts_per_tok": 1}
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 2}
    return {
        "Jamba": {
            **small,
            **mamba,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "Lfm2": {**small, "layer_types": ["conv", "full_attention"]},
        "Qwen3Next": {**small, **linear, **kinds, **moe, "num_experts_per_tok": 1},
        "RecurrentGemma": {**small, "block_types": ["recurrent", "attention"], "lru_width": 64},
        "MiniMax": {
            **small,
            "layer_types": kinds["layer_types"][::-1],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "head_dim": 16,
        },
    }


@functools.cache
def hybrid(name):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**hybrids()[name])
    return everywhere(getattr(hf, f"{name}ForCausalLM")(config).eval(), "sparse")


@pytest.mark.parametrize("name", [x for x in hybrids() if not (OLDEST and x == "RecurrentGemma")])
def test_documents_in_a_model_that_mixes_them_are_refused(name):
    one, ids = hybrid(name), tokens(1, 40)
    at, cu = positions((0, 15, 40)), torch.tensor([0, 15, 40], dtype=torch.int32)
    edges = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 25, "max_length_k": 25}
    with torch.no_grad():
        for more in ({}, {"use_cache": False}, {"attention_mask": torch.ones(1, 40)}, edges):
            with pytest.raises(sf.SparseFlashError, match="several documents.*layers of kind.*one document"):
                one(input_ids=ids, position_ids=at, **more)
        with pytest.raises((sf.SparseFlashError, ValueError), match=r"several documents|can't keep packed"):
            labels = (torch.arange(40) >= 15).int()[None]  # kernels that are not here would keep them apart
            one(input_ids=ids, position_ids=at, use_cache=False, seq_idx=labels, **edges)


@pytest.mark.parametrize("name", hybrids())
def test_one_document_a_row_is_right_in_a_model_that_mixes(name):
    one, ids = hybrid(name), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    found = []
    with torch.no_grad():
        for implementation in ("eager", "sparse"):
            everywhere(one, implementation)
            found.append([one(input_ids=ids, position_ids=torch.arange(40)[None]).logits])
            found[-1].append(one(input_ids=ids, attention_mask=mask).logits[mask.bool()])
            cache = getattr(one(input_ids=ids[:, :30], use_cache=True), "past_key_values", None)
            if cache is None:  # an older RecurrentGemma keeps its own
                continue
            for a in range(30, 33):
                found[-1].append(one(input_ids=ids[:, a : a + 1], past_key_values=cache).logits)
    for got, want in zip(found[1], found[0], strict=True):
        close(got, want)


@pytest.mark.slow
def test_a_compiled_model_that_mixes_checks_its_positions():
    torch._dynamo.reset()
    one, ids = hybrid("Lfm2"), tokens(1, 40)
    compiled = torch.compile(one, backend="eager")
    with torch.no_grad():
        close(
            compiled(input_ids=ids, position_ids=torch.arange(40)[None], use_cache=False).logits,
            one(input_ids=ids).logits,
        )
        with pytest.raises(RuntimeError, match="recurrent layers"):
            compiled(input_ids=ids, position_ids=positions((0, 15, 40)), use_cache=False)
    torch._dynamo.reset()


def test_which_kinds_of_layers_mix():
    def kinds(*names):
        return mixing(type("Config", (), {"layer_types": list(names)}))

    assert not kinds("full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "moe")
    assert kinds("full_attention", "conv") == "conv" and kinds("linear_attention") and kinds("hybrid")
    assert not mixing(hf.LlamaConfig()) and mixing(hf.JambaConfig()) and not mixing(None)


# ---------------------------------------------------------------- edges and positions that models drop


def dropping():
    """Models whose layers, heads or masks are not told of what a call says of documents."""
    small = {name: x for name, x in TEXT.items() if name != "num_key_value_heads"}
    gpt_j = {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "vocab_size": 97}
    mrope = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    return {
        "NemotronForCausalLM": hf.NemotronConfig(**TEXT, head_dim=16),
        "StableLmForCausalLM": hf.StableLmConfig(**TEXT),
        "FalconForCausalLM": hf.FalconConfig(**small, alibi=False),
        "GPTJForCausalLM": hf.GPTJConfig(**gpt_j),
        "XGLMForCausalLM": hf.XGLMConfig(
            vocab_size=97, d_model=64, ffn_dim=64, attention_heads=4, num_layers=2
        ),
        "Qwen2VLTextModel": hf.Qwen2VLTextConfig(**TEXT, rope_parameters=mrope, rope_scaling=mrope),
    }


@pytest.mark.skipif(OLDEST, reason="most of these make their masks themselves")
@pytest.mark.parametrize("name", dropping())
@pytest.mark.parametrize("by", ["edges", "positions", "both"])
def test_documents_are_apart_in_models_that_drop_what_a_call_says_of_them(name, by):
    torch.manual_seed(0)
    module = hf if hasattr(hf, name) else hf.models.qwen2_vl.modeling_qwen2_vl
    one, ids = everywhere(getattr(module, name)(dropping()[name]).eval(), "sparse"), tokens(1, 60)
    edges = (0, 21, 60)
    cu = torch.tensor(edges, dtype=torch.int32)
    at = torch.arange(60)[None] if by == "edges" else positions(edges)
    more = {} if by == "positions" else {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}

    def out(**inputs):
        found = one(**inputs)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state

    with torch.no_grad():
        parts = [
            out(input_ids=ids[:, a:b], position_ids=at[:, a:b], use_cache=False)
            for a, b in itertools.pairwise(edges)
        ]
        for cache in ({"use_cache": False}, {}):
            close(out(input_ids=ids, position_ids=at, **more, **cache), torch.cat(parts, 1))


@pytest.mark.skipif(OLDEST, reason="it makes its mask itself")
def test_edges_of_several_rows_are_refused_where_a_model_drops_them():
    one = everywhere(hf.NemotronForCausalLM(dropping()["NemotronForCausalLM"]).eval(), "sparse")
    cu = torch.tensor([0, 21, 60], dtype=torch.int32)
    with pytest.raises(sf.SparseFlashError, match="batch of 2 rows"):
        one(input_ids=tokens(2, 60), cu_seq_lens_q=cu, cu_seq_lens_k=cu)


@pytest.mark.skipif(not hasattr(hf, "DeepseekV32Config"), reason="this release does not have it")
def test_an_indexer_chooses_among_the_keys_of_a_document_by_its_edges():
    """Else keys of others would take places of its choice."""
    from test_transformers_learned import DSA

    torch.manual_seed(0)
    one, ids = hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(**DSA)).eval(), tokens(1, 60)
    cu = torch.tensor([0, 21, 60], dtype=torch.int32)
    document = torch.arange(60) >= 21
    mask = (document[:, None] == document).tril()[None, None]
    with torch.no_grad():
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        want = everywhere(one, "eager")(input_ids=ids, attention_mask=mask, use_cache=False).logits
        got = everywhere(one, "sparse")(input_ids=ids, cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False)
    close(got.logits, want)


def test_what_a_model_got_by_name_is_read_off_its_own_frames_and_those_of_its_heads():
    """A call is several frames of one module; a head that it is the base of is heard, no one else."""
    from sparseflash.integrations.transformers.documents import _named

    def ask():
        return {tuple(sorted(x)) for x in _named(sys._getframe())}

    class Base(torch.nn.Module):
        def forward(self, given=None, **kwargs):
            return ask()

        def decorated(self, *args, **kwargs):
            return self.forward(*args, **kwargs)

    class Head(torch.nn.Module):
        def __init__(self, base, own):
            super().__init__()
            self.base, self.own = base, own

        @property
        def base_model(self):
            return self.base if self.own else self

        def forward(self, **kwargs):
            return self.base.decorated(given=1, inner=2)

    inside = {("inner",), ("given", "inner")}
    assert Head(Base(), True)(outer=3) == inside | {("outer",)}
    assert Head(Base(), False)(outer=3) == inside

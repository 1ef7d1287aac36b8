"""Models with a learned indexer under "sparse": the stock logits and gradients, and plans of O(S topk)."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import sparseflash as sf
from harness import peak_memory
from sparseflash.integrations.transformers import SparseMask, StreamedIndexer, indexer, streamed
from sparseflash.integrations.transformers.learned import learned_plan
from sparseflash.integrations.transformers.mask import Plain

DSA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "head_dim": 16,
    "index_n_heads": 3,
    "index_head_dim": 32,
    "index_topk": 12,
    "max_position_embeddings": 512,
}
MODELS = {
    "deepseek-v3.2": ("DeepseekV32Config", "DeepseekV32ForCausalLM", DSA),
    "glm-dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", DSA),
    "axk2": ("AXK2Config", "AXK2ForCausalLM", DSA),
    "minimax-m3": (
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 32,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "mlp_layer_types": ["dense", "dense"],
            "layer_types": ["minimax_m3_sparse", "minimax_m3_sparse"],
            "index_block_size": 8,
            "index_topk_blocks": 3,
            "index_local_blocks": 2,
            "max_position_embeddings": 512,
        },
    ),
}

MASKED = {
    "deepseek-v4": (
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "q_lora_rank": 32,
            "num_experts_per_tok": 2,
            "n_routed_experts": 4,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_topk": 4,
            "o_groups": 2,
            "o_lora_rank": 16,
            "sliding_window": 12,
            "max_position_embeddings": 512,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "mlp_layer_types": ["moe"] * 3,
        },
    ),
    "glm5-next": (
        "Glm5NextTextConfig",
        "Glm5NextTextModel",
        DSA
        | {
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "indexed_attention"],
            "mlp_layer_types": ["dense", "dense"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "pad_token_id": 0,
        },
    ),
    "dots3-note": (
        "Dots3NoteTextConfig",
        "Dots3NoteForCausalLM",
        DSA
        | {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 3,
            "head_dim": 32,
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            "sliding_window": 12,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 32,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 24,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen4-exp": (
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts_per_tok": 2,
            "num_experts": 4,
            "layer_types": ["linear_attention", "indexed_attention"],
            "hc_count": 2,
            "hc_lowrank": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
}
"""Families whose choice reaches attention as a mask, or goes into a mask that is longer than the one made."""

ALL_FAMILIES = (5, 23)
"""The release that is known to have them."""


def pair(name, dtype=torch.float32, attention="sdpa", **change):
    """Two models of one set of weights: stock and sparse."""
    config, model, sizes = (MODELS | MASKED)[name]
    if not hasattr(transformers, model):  # a family younger than an old version; every one is in the newest
        release = tuple(map(int, transformers.__version__.split(".")[:2]))
        assert release < ALL_FAMILIES, f"Transformers {transformers.__version__} has lost {model}"
        pytest.skip(f"Transformers {transformers.__version__} has no {model}")
    torch.manual_seed(0)
    made = getattr(transformers, config)(**(sizes | change))
    stock = (
        getattr(transformers, model)._from_config(copy.deepcopy(made), attn_implementation=attention).eval()
    )
    ours = getattr(transformers, model)._from_config(copy.deepcopy(made), attn_implementation="sparse").eval()
    for p in stock.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype), ours.to(dtype)


def tokens(generator, *shape):
    return torch.randint(3, 97, shape, generator=generator)


CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-3, "atol": 1e-4}}
# In fp32 layers differ by roundings; in fp64, on the reference backend, by next to nothing.


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_stock_ones(name, dtype, monkeypatch, generator):
    ids = tokens(generator, 2, 61)
    found, made, from_choice = [], [], sf.Plan.from_choice
    monkeypatch.setattr(sf.Plan, "from_choice", lambda *x, **o: made.append(1) or from_choice(*x, **o))
    for model in pair(name, dtype):
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        found.append(
            (logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    assert len(made) == 2, "each layer of ours chooses, and none of stock"
    (want, grads), (got, own) = found
    torch.testing.assert_close(got, want, **CLOSE[dtype])
    assert own.keys() == grads.keys() and any("kv_" in n or "k_proj" in n for n in own)
    for n, g in grads.items():
        size = float(g.abs().max())
        torch.testing.assert_close(own[n] / size, g / size, **CLOSE[dtype], msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ["deepseek-v3.2", "minimax-m3"])
def test_padding_and_caches(name, generator):
    stock, ours = pair(name, torch.float64)
    ids, keep = tokens(generator, 2, 45), torch.ones(2, 45, dtype=torch.long)
    keep[0, -9:] = 0
    left = torch.ones_like(keep)
    if name != "minimax-m3":  # whose indexer scores padding too: on the left it takes part in the choice
        keep[1, :6] = left[1, :9] = 0
    found = []
    with torch.no_grad():
        want, got = (m(ids, attention_mask=keep, use_cache=False).logits for m in (stock, ours))
        torch.testing.assert_close(got[keep.bool()], want[keep.bool()], rtol=1e-9, atol=1e-9)
        for model in (stock, ours):
            head = model(ids[:, :30], use_cache=True)
            tail = model(ids[:, 30:], past_key_values=head.past_key_values)
            found.append(torch.cat([head.logits, tail.logits], 1))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        made = [
            m.generate(ids, attention_mask=left, max_new_tokens=6, do_sample=False) for m in (stock, ours)
        ]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "deepseek-v4" else [pytest.mark.slow]) for n in MASKED],
)
def test_families_that_choose_by_a_mask_are_the_stock_ones(name, generator):
    stock, ours = pair(name, torch.float32, "eager")
    ids, keep = tokens(generator, 2, 30), torch.ones(2, 30, dtype=torch.long)
    keep[0, :9] = 0
    with torch.no_grad():
        for given in ({}, {"attention_mask": keep}):
            want, got = (m(ids, use_cache=False, **given)[0][:, 9:] for m in (stock, ours))
            torch.testing.assert_close(got, want, **CLOSE[torch.float32])
        if "ForCausalLM" in MASKED[name][1]:
            how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
            assert torch.equal(*(m.generate(ids, pad_token_id=0, **how) for m in (stock, ours)))


def test_layers_that_share_a_choice_share_its_plan(monkeypatch, generator):
    _, ours = pair("glm-dsa", num_hidden_layers=3, indexer_types=["full", "shared", "shared"])
    made, from_choice = [], sf.Plan.from_choice
    monkeypatch.setattr(sf.Plan, "from_choice", lambda *x, **o: made.append(1) or from_choice(*x, **o))
    with torch.no_grad():
        ours(tokens(generator, 1, 40))
    assert len(made) == 1


def test_what_is_not_known_of_a_choice_is_said():
    mask = SparseMask(sf.Plan.dense(4, 4, causal=True), 1, Plain(), causal=True)
    index = torch.zeros(1, 2, 4, 1, dtype=torch.int32)
    with pytest.raises(sf.SparseFlashError, match="block_size"):
        learned_plan(torch.nn.Linear(1, 1), mask, None, index)
    with pytest.raises(sf.SparseFlashError, match="expected one of them"):
        learned_plan(torch.nn.Linear(1, 1), mask, index, index)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-dsa", "axk2"])
def test_streamed_indexers_choose_what_the_stock_ones_do(name, generator, monkeypatch):
    stock, ours = pair(name, index_n_heads=16)  # so many that no score is exactly 0, and none a tie
    ids, keep = tokens(generator, 2, 50), torch.ones(2, 50, dtype=torch.long)
    keep[0, :7] = 0
    with torch.no_grad():
        want = stock(ids, use_cache=False).logits, stock(ids, attention_mask=keep).logits[keep.bool()]
        with streamed(ours):
            found = [m for m in ours.modules() if isinstance(m, StreamedIndexer)]
            assert len(found) == 2
            for m in found:  # which hold all scores, and are for other masks
                monkeypatch.setattr(m.stock, "forward", None)
            got = ours(ids, use_cache=False).logits, ours(ids, attention_mask=keep).logits[keep.bool()]
            head = ours(ids[:, :40])
            tail = ours(ids[:, 40:], past_key_values=head.past_key_values).logits
        assert ours.state_dict().keys() == stock.state_dict().keys()
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, **CLOSE[torch.float32])
        torch.testing.assert_close(tail, want[0][:, 40:], **CLOSE[torch.float32])


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-dsa"])
@pytest.mark.parametrize("how", ["documents", "a tensor", "no mask"])
def test_streamed_indexers_leave_other_masks_to_the_stock_ones(name, how, generator):
    stock, ours = pair(name, index_n_heads=16)
    ids, given = tokens(generator, 1, 50), {"use_cache": False}
    if how == "documents":
        given["position_ids"] = torch.cat([torch.arange(20), torch.arange(30)])[None]
    if how == "a tensor":
        near = torch.ones(50, 50, dtype=torch.bool).tril().triu(-9)
        given["attention_mask"] = near[None, None]
    with torch.no_grad():
        want = stock(ids, **given).logits
        with streamed(ours):
            got = ours(ids, **given).logits
    torch.testing.assert_close(got, want, **CLOSE[torch.float32])


@pytest.mark.parametrize("held", [1 << 20, 1, 3000])  # all queries at once, one, two or three
def test_streamed_choices_of_blocks_are_the_stock_ones(held, monkeypatch, generator):
    monkeypatch.setattr(indexer, "HELD", held)
    stock, ours = pair("minimax-m3")
    ids, keep = tokens(generator, 2, 61), torch.ones(2, 61, dtype=torch.long)
    keep[0, -9:] = 0
    with torch.no_grad(), streamed(ours):
        assert sum(isinstance(m, indexer.StreamedBlockIndexer) for m in ours.modules()) == 2
        for inputs in ({}, {"attention_mask": keep}):
            at = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            got, want = (m(ids, use_cache=False, **inputs).logits[at] for m in (ours, stock))
            torch.testing.assert_close(got, want, **CLOSE[torch.float32])
        head = ours(ids[:, :40])
        tail = ours(ids[:, 40:], past_key_values=head.past_key_values).logits
        torch.testing.assert_close(tail, stock(ids).logits[:, 40:], **CLOSE[torch.float32])
    assert ours.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.slow
def test_a_streamed_layer_takes_linear_memory(generator):
    _, ours = pair("deepseek-v3.2", num_hidden_layers=1, index_n_heads=16, max_position_embeddings=8192)

    def extra(S):
        ids = tokens(generator, 1, S)
        return peak_memory(lambda: ours.model(ids, use_cache=False).last_hidden_state.sum().backward())

    with streamed(ours):
        extra(1024)
        sizes = [extra(S) for S in (2048, 4096, 8192)]
    assert sizes[1] < 2.5 * sizes[0] + (4 << 20) and sizes[2] < 2.5 * sizes[1] + (4 << 20), sizes
    assert sizes[2] < 8192 * 8192 * 4, "less than one head's scores"


def test_a_model_without_a_known_indexer_is_named():
    with pytest.raises(sf.SparseFlashError, match="Linear has no indexer"), streamed(torch.nn.Linear(1, 1)):
        pass

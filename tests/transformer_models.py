"""Tiny random models of the families that differ in how they call attention, and runs of one in two ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import sparseflash.integrations.transformers  # noqa: F401  (registers "sparse")

TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: x for key, x in TEXT.items() if key != "num_key_value_heads"}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 60,
    "patch_size": 10,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
CHUNKED = {"intermediate_size_mlp": 64, "attention_chunk_size": 32, "head_dim": 16, "no_rope_layers": [1, 0]}
BART = {
    "vocab_size": 97,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
}

# family: (class of the model, of its config, the config, the implementation that is its own)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, "sdpa"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 24}, "sdpa"),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**TEXT, "head_dim": 40, "sliding_window": 24, "attn_logit_softcapping": 1.0},
        "eager",
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**TEXT, **MOE, "head_dim": 16, "sliding_window": 24},
        "eager",
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**TEXT, **MLA}, "sdpa"),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {**TEXT, **MOE, **CHUNKED}, "sdpa"),
    "bert": ("BertModel", "BertConfig", ENCODER, "sdpa"),
    "bart": ("BartModel", "BartConfig", BART, "sdpa"),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VISION, "sdpa"),
    "vit": ("ViTModel", "ViTConfig", VISION, "sdpa"),
}


def tiny(family: str, seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
    """A model of the family with random weights, in evaluation mode, on its own attention."""
    model_class, config_class, fields, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(hf, config_class)(**copy.deepcopy({**fields, **changes}))
    config._attn_implementation = own
    model = getattr(hf, model_class)(config).eval()
    with torch.no_grad():  # wide enough that attention is not uniform
        for name, x in model.named_parameters():
            if name.endswith("sinks"):
                x.normal_()
            elif x.dim() == 2 and "embed" not in name:
                x.mul_(4)
    return model


def run(model: hf.PreTrainedModel, implementation: str, **inputs: Any) -> Tensor:
    """The logits, or the last hidden state, computed with that attention."""
    model.set_attn_implementation(implementation)
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def both(model: hf.PreTrainedModel, family: str, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The model's own result, and ours."""
    return run(model, FAMILIES[family][3], **inputs), run(model, "sparse", **inputs)


def byte_tokenizer(where: Path) -> int:
    """Write a tokenizer of single bytes, as `from_pretrained` reads it; how many tokens it has."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({x: n for n, x in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(where)
    return len(letters)

"""`attn_implementation="sparse"`: every family of models computes what it computes by itself."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers as hf

import sparseflash as sf
from sparseflash.integrations.transformers import SparseMask
from transformer_models import FAMILIES, both, run, tiny

T = 150


@functools.cache
def model(family):
    """One model a family, for tests that leave it as it is."""
    return tiny(family)


def tokens(B=2, length=T, seed=1):
    return torch.randint(3, 97, (B, length), generator=torch.Generator().manual_seed(seed))


def given(family, B=2):
    """What a forward of the family takes."""
    if family in ("siglip", "vit"):
        return {"pixel_values": torch.randn(B, 3, 60, 60)}
    if family == "bart":
        return {"input_ids": tokens(B), "decoder_input_ids": tokens(B, 63, seed=2)}
    return {"input_ids": tokens(B)}


def padded(side, B=2):
    """Ones where there is a token; the sequences have 150, 87, ... of them."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, : T - 87] = 0
    return {"left": mask, "right": mask.flip(1), "holes": mask * (torch.arange(T) % 7 > 0)}[side]


def close(got, want, at=None, what=""):
    """Equal up to the roundings of fp32 through a few layers."""
    got, want = (x if at is None else x[at] for x in (got, want))
    assert torch.isfinite(want).all()
    error, size = float((got - want).abs().max()), float(want.abs().max())
    assert error <= 256 * torch.finfo(torch.float32).eps * max(size, 1), (
        f"{what} off by {error:.3g} of {size:.3g}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_computes_by_itself(family):
    with torch.no_grad():
        want, got = both(model(family), family, **given(family))
    close(got, want)


@pytest.mark.parametrize(
    "family, side",
    [
        *((family, side) for family in ("llama", "mistral", "bert") for side in ("left", "right", "holes")),
        *(("gpt-oss", "left"), ("llama4", "left"), ("llama4", "right")),
    ],
)
def test_padding_is_not_seen(family, side):
    mask = padded(side)
    with torch.no_grad():
        want, got = both(model(family), family, input_ids=tokens(), attention_mask=mask)
    close(got, want, mask.bool())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_documents_stay_apart(family):
    one, edges = model(family), [0, 1, 64, 150]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:])])[None]
    packed = {"input_ids": tokens(1), "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        want, got = both(one, family, **packed)
        close(got, want)
        cu = torch.tensor(edges, dtype=torch.int32)
        lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 86, "max_length_k": 86}
        close(run(one, "sparse", **packed, **lengths), want)
        for a, b in zip(edges, edges[1:]):
            close(got[:, a:b], run(one, "sparse", input_ids=packed["input_ids"][:, a:b]))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss", "llama4"])
def test_a_prompt_in_chunks_is_the_whole_prompt(family):
    one, ids, mask = model(family), tokens(), padded("left")
    with torch.no_grad():
        want = run(one, FAMILIES[family][3], input_ids=ids, attention_mask=mask)
        one.set_attn_implementation("sparse")
        cache, parts = hf.DynamicCache(config=one.config), []
        for a, b in ((0, 64), (64, 149), (149, 150)):
            out = one(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
            parts.append(out.logits)
    close(torch.cat(parts, 1), want, mask.bool())


@pytest.mark.parametrize("how", ["dynamic", "static", "beams"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_generation_gives_the_same_tokens(family, how):
    options = {"static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}.get(how, {})
    found = []
    for name in (FAMILIES[family][3], "sparse"):
        one = model(family)
        one.set_attn_implementation(name)
        found.append(
            one.generate(
                tokens(),
                attention_mask=padded("left"),
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                disable_compile=True,
                **options,
            )
        )
    assert torch.equal(*found)


def _loss(one, name, **inputs):
    one.set_attn_implementation(name)
    one.zero_grad()
    one(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {n: x.grad.clone() for n, x in one.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "deepseek-v3"])
def test_training_has_the_same_gradients(family):
    one = tiny(family).train()
    want, got = (_loss(one, name, input_ids=tokens()) for name in (FAMILIES[family][3], "sparse"))
    assert want.keys() == got.keys()
    for name, x in want.items():
        close(got[name], x, what=name)
    if family == "gpt-oss":
        assert any(n.endswith("sinks") and bool(x.any()) for n, x in got.items())


def test_checkpointed_training_has_the_same_gradients():
    one = tiny("mistral").train()
    want = _loss(one, "sparse", input_ids=tokens(), attention_mask=padded("right"))
    one.gradient_checkpointing_enable()
    got = _loss(one, "sparse", input_ids=tokens(), attention_mask=padded("right"))
    for name, x in want.items():
        close(got[name], x, what=name)


def test_no_sdpa_is_called(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("scaled_dot_product_attention was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    for family in FAMILIES:
        with torch.no_grad():
            assert torch.isfinite(run(model(family), "sparse", **given(family))).all()
    with pytest.raises(AssertionError, match="was called"):
        run(model("llama"), "sdpa", input_ids=tokens())


def test_masks_of_the_users_own_are_taken():
    one, mask = model("llama"), torch.rand(2, 1, T, T) < 0.3
    mask = mask | torch.eye(T, dtype=torch.bool)
    with torch.no_grad():
        want, got = both(one, "llama", input_ids=tokens(), attention_mask=mask)
        close(got, want)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        close(run(one, "sparse", input_ids=tokens(), attention_mask=bias), want)
        with pytest.raises(sf.SparseFlashError, match="neither 0"):
            run(one, "sparse", input_ids=tokens(), attention_mask=torch.rand(2, 1, T, T))


def test_a_mask_that_a_model_computes_with_is_a_tensor():
    mask = SparseMask(sf.Plan.dense(5, 7, causal=True, q_offset=2), 2, causal=True, offset=2)
    dense = torch.ones(5, 7, dtype=torch.bool).tril(2).expand(2, 1, 5, 7)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))  # as Doge does
    assert torch.equal(dense & mask, dense) and torch.equal(~mask, ~dense)
    assert torch.equal(torch.cat([mask, ~mask], dim=-1), torch.cat([dense, ~dense], -1))


def test_arguments_that_would_be_ignored_are_refused():
    one, ids = model("llama"), tokens()
    with pytest.raises(sf.SparseFlashError, match="never formed.*eager"):
        run(one, "sparse", input_ids=ids, output_attentions=True)
    with pytest.raises(sf.SparseFlashError, match="'novelty'.*HARMLESS"):
        run(one, "sparse", input_ids=ids, novelty=torch.ones(1))
    with pytest.raises(sf.SparseFlashError, match="dropout 0.1"):
        run(tiny("llama", attention_dropout=0.1).train(), "sparse", input_ids=ids)


def test_a_whole_graph_compiles():
    torch._dynamo.reset()
    one = tiny("mistral").train()
    ids, mask = tokens(), padded("left")
    want = _loss(one, "sparse", input_ids=ids)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    got = _loss(compiled, "sparse", input_ids=ids)
    for name, x in want.items():
        close(got["_orig_mod." + name], x, what=name)
    with torch.no_grad():
        want = one(input_ids=ids, attention_mask=mask).logits
        close(compiled(input_ids=ids, attention_mask=mask).logits, want, mask.bool())
    torch._dynamo.reset()


def test_the_mask_is_linear_in_the_tokens():
    """16k tokens of left padding and a window: a bool mask would be 512 MB."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    length, real = 16384, torch.ones(2, 16384, dtype=torch.bool)
    real[1, :5000] = False
    mask = sf.transformers.sparse_mask(
        2,
        length,
        length,
        mask_function=sliding_window_causal_mask_function(1000),
        attention_mask=real,
    )
    held = sum(x.numel() * x.element_size() for x in mask.plan.tensors().values())
    assert held < 64 * length
    assert mask.shape == (2, 1, length, length) and mask.ndim == 4 and mask.contiguous() is mask
    assert sf.transformers.sparse_mask(2, 1, 1, attention_mask=mask) is mask


def test_the_package_is_loaded_when_it_is_used():
    code = (
        "import sys, sparseflash as sf; assert 'transformers' not in sys.modules; sf.transformers; "
        "assert 'transformers' in sys.modules; from transformers import AttentionInterface; "
        "assert 'sparse' in AttentionInterface().valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

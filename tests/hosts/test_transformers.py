"""`attn_implementation="sparse"`: every family of models computes what it computes by itself."""

from __future__ import annotations

import contextlib
import copy
import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers as hf

import sparseflash as sf
from sparseflash.integrations import transformers
from sparseflash.integrations.transformers import SparseMask, attention, ranges, tables
from transformer_models import FAMILIES, VISION, both, run, tiny

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


@pytest.mark.parametrize("how", ["in place", "data", "set_", "inference"])
def test_a_mask_that_changed_behind_its_back_is_read_again(how):
    """It is read once for all layers, as long as it is the same; inference tensors count no writes."""
    one, ids = model("llama"), tokens()
    first, second = (torch.ones(2, 1, T, T, dtype=torch.bool).tril(n) for n in (0, -3))
    second |= torch.eye(T, dtype=torch.bool)
    with torch.inference_mode(how == "inference"):
        mask = first.clone()
        run(one, "sparse", input_ids=ids, attention_mask=mask)
        if how == "data":
            mask.data = second.clone()
        elif how == "set_":
            mask.set_(second.clone())
        else:
            mask.copy_(second)
        got = run(one, "sparse", input_ids=ids, attention_mask=mask)
    close(got, run(one, "sparse", input_ids=ids, attention_mask=second.clone()))


def test_a_mask_that_a_model_computes_with_is_a_tensor():
    mask = SparseMask(sf.Plan.dense(5, 7, causal=True, q_offset=2), 2, causal=True, offset=2)
    dense = torch.ones(5, 7, dtype=torch.bool).tril(2).expand(2, 1, 5, 7)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))  # as Doge does
    assert torch.equal(dense & mask, dense) and torch.equal(~mask, ~dense)
    assert torch.equal(torch.cat([mask, ~mask], dim=-1), torch.cat([dense, ~dense], -1))


SEEN = torch.ones(5, 7, dtype=torch.bool).tril(2).expand(2, 1, 5, 7)
ADDED = torch.zeros(2, 1, 5, 7).masked_fill(~SEEN, torch.finfo(torch.float32).min)


def test_the_rows_of_a_mask_have_its_batch():
    mask = SparseMask(sf.Plan.dense(5, 7, causal=True, q_offset=2), 3, causal=True, offset=2)
    rows = mask[:, 0, :, :]
    assert rows.shape == (3, 5, 7) and torch.equal(rows.to_dense(), mask.to_dense()[:, 0])


def own_mask():
    return SparseMask(
        sf.Plan.dense(5, 7, causal=True, q_offset=2), 2, causal=True, offset=2, owner="some-model"
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: x + m,
        lambda m, x: m + x,
        lambda m, x: torch.add(x, m),
        lambda m, x: x.clone().add_(m),
        lambda m, x: (
            x + m[:, :, -3:, :7][..., -3:, :].expand(2, 1, 3, 7) if x.shape[2] == 3 else x + m[:, :, :5]
        ),
        lambda m, x: x + m.to(x.dtype).unsqueeze(0).squeeze(0),
        lambda m, x: x + m.float(),
        lambda m, x: torch.cat([m, torch.zeros(2, 1, 5, 7)], -1)[..., :7] + x,
        lambda m, x: x + torch.cat([m, m], 1)[:, :1],
    ],
)
def test_a_mask_that_is_added_to_scores_hides_what_is_not_seen(use):
    """As models do that attend by themselves: theirs holds 0 and the lowest number."""
    x = torch.randn(2, 1, 5, 7)
    assert torch.equal(use(own_mask(), x).softmax(-1), (x + ADDED).softmax(-1))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: x * m,
        lambda m, x: 1.0 - m,
        lambda m, x: x - m,
        lambda m, x: m.bool(),
        lambda m, x: m.to(torch.bool),
        lambda m, x: m.to(dtype=torch.bool),
        lambda m, x: m.type(torch.bool),
        lambda m, x: m[:, :, -1, :].reshape(-1)[-7:].bool(),
        lambda m, x: m == 0,
        lambda m, x: m < 0,
        lambda m, x: m[:, 0] > -1,
        lambda m, x: m.sum(-1),
        lambda m, x: m.any(),
        lambda m, x: m.long(),
        lambda m, x: m.int(),
        lambda m, x: x.masked_fill(m, float("-inf")),
        lambda m, x: torch.where(m, torch.finfo(x.dtype).min, x),
        lambda m, x: torch.nn.functional.pad(m, (1, 0)),
        lambda m, x: m + 1.0,
        lambda m, x: torch.baddbmm(m[:, 0], x[:, 0], x[:, 0].mT @ x[:, 0]),
        lambda m, x: m[:, 0].__setitem__(0, 1.0),
    ],
)
def test_a_mask_that_is_read_as_numbers_is_refused_by_name(use):
    with pytest.raises(sf.SparseFlashError, match="some-model computes with its attention mask.*'eager'"):
        use(own_mask(), torch.randn(2, 1, 5, 7))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: torch.where(m, x, float("-inf")),
        lambda m, x: x.masked_fill(~m, float("-inf")),
        lambda m, x: x.masked_fill(m == False, float("-inf")),  # noqa: E712  (as models write it)
        lambda m, x: x.masked_fill(~m[:, 0][:, None], float("-inf")),
        lambda m, x: x + (~m).to(x.dtype) * torch.finfo(x.dtype).min,
        lambda m, x: torch.where(m & torch.ones(7, dtype=torch.bool), x, float("-inf")),
    ],
)
def test_a_mask_that_is_used_as_a_choice_is_one(use):
    x = torch.randn(2, 1, 5, 7)
    assert torch.equal(use(own_mask(), x).softmax(-1), (x + ADDED).softmax(-1))
    assert F.scaled_dot_product_attention(*torch.randn(2, 2, 1, 5, 8), torch.randn(2, 1, 5, 8)).shape[2] == 5


def everywhere(one, implementation):
    """As `from_pretrained(..., attn_implementation=...)` does, for models outside of the registry too."""
    for part in one.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = implementation
    return one


@pytest.mark.parametrize("given", ["nothing", "padding"])
def test_models_that_attend_by_themselves_are_right_or_refused(given):
    torch.manual_seed(0)
    small = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :9] = 0
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if given == "padding" else {})
    at = mask.bool() if given == "padding" else None

    bloom = hf.BloomModel(hf.BloomConfig(hidden_size=32, n_head=2, n_layer=2, **small)).eval()
    gpt_j = hf.GPTJModel(hf.GPTJConfig(n_embd=32, n_head=2, n_layer=2, rotary_dim=8, **small)).eval()
    with torch.no_grad():
        for one in (bloom, gpt_j):
            want, got = (everywhere(one, x)(**inputs).last_hidden_state for x in ("eager", "sparse"))
            close(got, want, at)

    experts = {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_experts": 4, "expert_capacity": 24}
    bart = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32}
    bart |= {f"{x}_attention_heads": 2 for x in ("encoder", "decoder")}
    bart |= {f"{x}_ffn_dim": 32 for x in ("encoder", "decoder")}
    nllb = hf.NllbMoeModel(hf.NllbMoeConfig(**bart, **experts, **small)).eval()
    mpt = hf.MptModel(hf.MptConfig(d_model=32, n_heads=2, n_layers=2, **small)).eval()
    for one, kind, more in ((nllb, "nllb-moe", {"decoder_input_ids": ids[:, :7]}), (mpt, "mpt", {})):
        with torch.no_grad():
            want = everywhere(one, "eager")(**inputs, **more).last_hidden_state
            try:  # older versions of Transformers make these models their masks without asking
                got = everywhere(one, "sparse")(**inputs, **more).last_hidden_state
            except sf.SparseFlashError as fault:
                assert f"{kind} computes with its attention mask" in str(fault)
            else:
                close(got, want, at if kind == "mpt" else None)


def _with_gradients(one, implementation, inputs):
    one = everywhere(one, implementation)
    one.zero_grad()
    out = one(**inputs).last_hidden_state
    out.square().mean().backward()
    return [out.detach(), *(x.grad for x in one.parameters() if x.grad is not None)]


@pytest.mark.parametrize("kind", ["swin", "t5"])
def test_a_bias_of_every_pair_learns(kind):
    torch.manual_seed(0)
    if kind == "swin":
        config = hf.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
        )
        one, inputs = hf.SwinModel(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    else:
        config = hf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        one, ids = hf.T5Model(config).eval(), tokens(2, 40)
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[1, 30:] = 0
        inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :21], "attention_mask": mask}
    with torch.no_grad():
        for name, x in one.named_parameters():
            if "relative" in name:
                x.normal_()
    want, got = (_with_gradients(one, x, inputs) for x in ("eager", "sparse"))
    names = [name for name, x in one.named_parameters() if x.grad is not None]
    assert any("relative" in name for name in names)
    for name, x, y in zip(["out", *names], got, want, strict=True):
        close(x, y, what=name)
    if kind == "t5":
        how = {"max_new_tokens": 5, "do_sample": False, "decoder_start_token_id": 0}
        assert torch.equal(*(x.generate(ids, **how) for x in _generators(one)))


def _generators(one):
    """A T5 that generates, on eager and on sparse."""
    made = hf.T5ForConditionalGeneration(one.config).eval()
    for implementation in ("eager", "sparse"):
        yield everywhere(copy.deepcopy(made), implementation)


def test_floats_of_a_mask_are_a_bias_and_learn():
    one, g = model("llama"), torch.Generator().manual_seed(3)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    bias = torch.randn(2, 1, T, T, generator=g).masked_fill(~causal, torch.finfo(torch.float32).min)
    found = []
    for implementation in ("eager", "sparse"):
        leaf = bias.clone().requires_grad_()
        out = run(one, implementation, input_ids=tokens(), attention_mask=leaf)
        found.append((out.detach(), *torch.autograd.grad(out.square().mean(), leaf)))
    for x, y in zip(found[1], found[0], strict=True):
        close(x, y)
    with torch.no_grad():
        close(run(one, "sparse", input_ids=tokens(), attention_mask=bias), found[0][0])
    with sf.transformers.sparse(one, sf.methods.Window(24)):
        with pytest.raises(sf.SparseFlashError, match="adds a bias to every pair, and a method was set"):
            run(one, "sparse", input_ids=tokens(), attention_mask=bias)
    with pytest.raises(sf.SparseFlashError, match="dtype torch.int64, which eager attention would add"):
        run(one, "sparse", input_ids=tokens(), attention_mask=causal.long().expand(2, 1, T, T))


def alone(one, ids, edges):
    """The documents of a row, each by itself."""
    return torch.cat([run(one, "sparse", input_ids=ids[:, a:b]) for a, b in zip(edges, edges[1:])], 1)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt-oss", "biogpt"])
def test_documents_by_positions_alone_stay_apart_whatever_else_a_call_does(family):
    """With the cache that calls keep by default, beside a mask of ones, beside padding, and static caches."""
    edges = [0, 1, 64, 150]
    one = (
        everywhere(
            hf.BioGptForCausalLM(
                hf.BioGptConfig(
                    hidden_size=64,
                    intermediate_size=64,
                    num_attention_heads=4,
                    num_hidden_layers=2,
                    vocab_size=97,
                )
            ).eval(),
            "sparse",
        )  # its attention is not told of positions
        if family == "biogpt"
        else model(family)
    )
    ids = tokens(1)
    at = torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:])])[None]
    packed = {"input_ids": ids, "position_ids": at}
    static = (
        {}
        if family == "biogpt"
        else {"past_key_values": hf.StaticCache(config=one.config, max_cache_len=160)}
    )
    ones = torch.ones(1, T, dtype=torch.long)
    with torch.no_grad():
        want = alone(one, ids, edges)
        for more in ({}, {"use_cache": False}, {"attention_mask": ones}, static):
            close(run(one, "sparse", **packed, **more), want)
        both_ids, both_at = torch.cat([ids, ids.roll(9, 1)]), torch.cat([at, at.roll(9, 1)])
        both_at[1, :9], mask = 0, torch.cat([ones, ones])
        mask[1, :9] = 0
        got = run(one, "sparse", input_ids=both_ids, position_ids=both_at, attention_mask=mask)
        close(got[:1], want)
        close(got[1:, 9:], want[:, : T - 9])


def test_what_looks_like_positions_of_documents_and_is_not_changes_nothing():
    one, ids = model("llama"), tokens()
    with torch.no_grad():
        for mask in (padded("left"), padded("right"), padded("holes")):
            for at in ((mask.cumsum(1) - 1).clamp(min=0), (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)):
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": at}
                want, got = both(one, "llama", **inputs)
                close(got, want, mask.bool())


def test_documents_in_chunks_are_refused_with_a_cache():
    one, at = model("llama4"), torch.arange(T)[None] % 50
    with torch.no_grad():
        want, got = both(one, "llama4", input_ids=tokens(1), position_ids=at, use_cache=False)
        close(got, want)
        with pytest.raises(sf.SparseFlashError, match="llama4.*layer that sees chunks.*use_cache=False"):
            run(one, "sparse", input_ids=tokens(1), position_ids=at)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss"])
@pytest.mark.parametrize("beside", ["nothing", "ones", "pads", "a tensor", "positions"])
def test_document_edges_hold_beside_any_mask(family, beside):
    """With padding behind the documents, in them or in a document of its own."""
    one, edges = model(family), [0, 70, 148] if beside == "pads" else [0, 70, 150]
    ids, mask = tokens(1), torch.ones(1, T, dtype=torch.long)
    mask[:, 148:] = 0
    at = torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:])])
    at = torch.cat([at, torch.arange(T - len(at))])[None]
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(1, 1, T, T)
    more = {"ones": {"attention_mask": mask | 1}, "pads": {"attention_mask": mask}}
    more |= {"a tensor": {"attention_mask": causal}, "positions": {"use_cache": False}, "nothing": {}}
    if beside == "a tensor" and family != "llama":
        return  # a mask of the user's own takes the place of the layers' windows
    with torch.no_grad():
        want = alone(one, ids, edges)
        for last in ([148], [150]) if beside == "pads" else ([150],):
            cu = torch.tensor([0, 70, *last], dtype=torch.int32)
            lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 80, "max_length_k": 80}
            got = run(one, "sparse", input_ids=ids, position_ids=at, **lengths, **more[beside])
            close(got[:, : edges[-1]], want)


def eager(q, k, v, keep, sinks=None):
    """Attention of a layer in float64, the mask written out; out `[B,S,Hq,Dv]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2).float()


def near(window, T, causal=True):
    """The window of a layer, bool [T, T]: of so many tokens a query's own is one."""
    apart = torch.arange(T)[:, None] - torch.arange(T)
    return (apart < window) & (apart >= 0 if causal else apart > -window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 24, 149, 150, 400])
def test_a_layer_with_a_window_and_no_mask_sees_its_window(window, causal):
    layer = sf.transformers.attention_layers(model("mistral"))[0].module
    q, k, v = torch.randn(2, 4, T, 16), *torch.randn(2, 2, 2, T, 16)
    given = {"sliding_window": window, "is_causal": causal}
    got, weights = sf.transformers.sparse_attention(layer, q, k, v, None, **given)
    assert weights is None
    close(got, eager(q, k, v, near(window, T, causal)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 24, 70])
def test_a_layer_given_edges_alone_sees_each_document_alone(window, causal):
    """No mask, no positions: `cu_seq_lens` and the layer's own window say all of it."""
    layer = sf.transformers.attention_layers(model("mistral"))[0].module
    edges = [0, 1, 64, 150]
    q, k, v = torch.randn(1, 4, T, 16), *torch.randn(2, 1, 2, T, 16)
    cu = torch.tensor(edges, dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "sliding_window": window, "is_causal": causal}
    got, _ = sf.transformers.sparse_attention(layer, q, k, v, None, **given)
    for a, b in zip(edges, edges[1:]):
        keep = near(window or 2 * T, b - a, causal)
        close(got[:, a:b], eager(*(x[:, :, a:b] for x in (q, k, v)), keep))


def test_document_edges_that_would_be_ignored_are_refused():
    one, cu = model("llama"), torch.tensor([0, 70, 150], dtype=torch.int32)
    both_cu = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    with pytest.raises(sf.SparseFlashError, match="batch of 2 rows"):
        run(one, "sparse", input_ids=tokens(), **both_cu)
    with pytest.raises(sf.SparseFlashError, match="cu_seq_lens_k without cu_seq_lens_q"):
        run(one, "sparse", input_ids=tokens(1), cu_seq_lens_k=cu)
    with pytest.raises(sf.SparseFlashError, match="beside a mask of padding.*not the queries' own"):
        fewer = torch.tensor([0, 60, 150], dtype=torch.int32)
        run(model("mistral"), "sparse", input_ids=tokens(1), cu_seq_lens_q=cu, cu_seq_lens_k=fewer)
    with pytest.raises(sf.SparseFlashError, match="'seq_idx' of several documents"):
        run(one, "sparse", input_ids=tokens(1), seq_idx=(torch.arange(T) > 70).int()[None])


def test_arguments_that_would_be_ignored_are_refused():
    one, ids = model("llama"), tokens()
    with pytest.raises(sf.SparseFlashError, match="'novelty'.*HARMLESS"):
        run(one, "sparse", input_ids=ids, novelty=torch.ones(1))
    sf.transformers.HARMLESS.add("novelty")  # the way out that the message names
    try:
        run(one, "sparse", input_ids=ids, novelty=torch.ones(1), shift_labels=ids)
    finally:
        sf.transformers.HARMLESS.remove("novelty")


@pytest.mark.parametrize("method", [None, sf.methods.Window(24)])
def test_a_model_trains_with_attention_dropout_and_checkpoints_draw_it_again(method):
    one, ids = tiny("llama", attention_dropout=0.2), tokens()
    plain = run(one, "sparse", input_ids=ids)
    with sf.transformers.sparse(one, method) if method else contextlib.nullcontext():
        still = run(one, "sparse", input_ids=ids)

        def step(seed):
            torch.manual_seed(seed)
            one.zero_grad()
            out = run(one.train(), "sparse", input_ids=ids)
            out.square().mean().backward()
            return out.detach(), torch.cat([x.grad.flatten() for x in one.parameters()])

        first, again, other = step(0), step(0), step(1)
        one.gradient_checkpointing_enable()
        repeated = step(0)
        with torch.no_grad():  # few queries, for which `decode` is faster where nothing is dropped
            assert not torch.equal(*(run(one, "sparse", input_ids=ids[:, :9]) for _ in range(2)))
        one.eval()
        assert torch.equal(run(one, "sparse", input_ids=ids), still)
    for x, y, z, w in zip(first, again, repeated, other, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z) and not torch.equal(x, w)
    assert not torch.equal(first[0], plain) and (method is not None or torch.equal(still, plain))


def test_dropout_of_a_layer_is_that_of_the_op():
    layer = sf.transformers.attention_layers(model("llama"))[0].module
    q, k, v = torch.randn(2, 4, T, 16), *torch.randn(2, 2, 2, T, 16)
    torch.manual_seed(5)
    got, _ = sf.transformers.sparse_attention(layer, q, k, v, None, dropout=0.3)
    torch.manual_seed(5)
    want = sf.attention(q, k, v, causal=True, dropout_p=0.3)
    assert torch.equal(got, want.transpose(1, 2))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_falls_to_a_mask_of_all_pairs(family, monkeypatch):
    """Padded, packed, in chunks, with a static cache: a mask of S x T would be right, and slow."""

    def refuse(*_, **__):
        raise AssertionError("a mask of all pairs was made")

    one = model(family)
    for owner, name in ((SparseMask, "to_dense"), (sf.Plan, "to_dense"), (sf.Plan, "from_mask")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(transformers.ranges, "_any_plan", refuse)
    calls = [given(family)]
    if "input_ids" in calls[0]:
        calls += [calls[0] | {"attention_mask": padded(side)} for side in ("left", "right", "holes")]
    if family not in ("siglip", "vit", "bert", "bart"):
        at = torch.cat([torch.arange(64), torch.arange(86)])[None]
        calls.append({"input_ids": tokens(1), "position_ids": at, "use_cache": False})
        static = hf.StaticCache(config=one.config, max_cache_len=T)
        calls += [
            {"input_ids": tokens(2, 64), "past_key_values": static},
            {"input_ids": tokens(2, 1), "past_key_values": static},
        ]
    with torch.no_grad():
        for call in calls:
            assert torch.isfinite(run(one, "sparse", **call)).all()
        if len(calls) > 1:
            with pytest.raises(AssertionError, match="of all pairs"):
                own = torch.ones(2, 1, T, T, dtype=torch.bool)
                run(one, "sparse", **calls[0] | {"attention_mask": own})


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


def test_pictures_of_unlike_sizes_are_pooled_under_the_repeated_mask():
    """SigLIP 2 repeats its mask for the one learned query that pools."""
    torch.manual_seed(0)
    config = hf.Siglip2VisionConfig(**{**VISION, "num_patches": 16, "patch_size": 4})
    one = hf.Siglip2VisionModel(config).eval()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 10:] = 0
    given = {"pixel_values": torch.randn(2, 16, 48), "pixel_attention_mask": mask}
    given["spatial_shapes"] = torch.tensor([[4, 4], [2, 5]])
    found = []
    for name in ("sdpa", "sparse"):
        one.set_attn_implementation(name)
        with torch.no_grad():
            found.append(one(**given))
    close(found[1].pooler_output, found[0].pooler_output)
    close(found[1].last_hidden_state, found[0].last_hidden_state, mask.bool())
    held = SparseMask(sf.Plan.dense(5, 5, causal=True), 2, causal=True)
    assert torch.equal(torch.logical_not(held), ~held.to_dense()) and held.repeat(1, 3, 1, 1).shape[1] == 3


@pytest.mark.parametrize("window", [None, 9])
def test_a_mask_made_for_more_keys_is_cut_to_those_that_are_there(window, generator):
    """As models cut theirs: `attention_mask[..., : key.shape[2]]`."""
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    sees = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    padding = torch.ones(2, 50, dtype=torch.bool)
    padding[0, :5] = False
    for tokens in (None, padding):
        mask = transformers.sparse_mask(2, 40, 50, 0, 0, sees, tokens)
        q, k, v = (torch.randn(2, 4, n, 16, generator=generator) for n in (40, 40, 40))
        module = torch.nn.Linear(1, 1)
        got, _ = transformers.sparse_attention(module, q, k, v, mask)
        want = sf.attention(q, k, v, sf.Plan.from_mask(mask.to_dense()[..., :40]))
        torch.testing.assert_close(got.transpose(1, 2), want)


def test_models_that_compute_with_their_mask_get_the_tensor_they_take_it_for(monkeypatch):
    from transformers.masking_utils import causal_mask_function

    config = type("Config", (), {"model_type": "own"})()
    made = {"config": config, "dtype": torch.bfloat16}
    monkeypatch.setattr(ranges, "NUMBERS", {"own"})
    mask = transformers.sparse_mask(1, 4, 4, 0, 0, causal_mask_function, **made)
    assert mask.dtype == torch.bfloat16 and mask.min() == torch.finfo(mask.dtype).min
    assert torch.equal(mask == 0, torch.ones(1, 1, 4, 4).tril().bool())
    monkeypatch.setattr(ranges, "NUMBERS", set())
    monkeypatch.setattr(ranges, "TRUTHS", {"own"})
    mask = transformers.sparse_mask(1, 4, 4, 0, 0, causal_mask_function, **made)
    assert type(mask) is torch.Tensor and len(mask.nonzero()) == 10


TABLES = {
    "FalconForCausalLM": lambda: hf.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "GPTJForCausalLM": lambda: hf.GPTJConfig(vocab_size=97, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
    "GPTNeoForCausalLM": lambda: hf.GPTNeoConfig(
        vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_models_with_a_table_of_attention_classes_keep_their_own_and_are_named(name, caplog):
    tables._named.clear()
    config, kind = TABLES[name](), getattr(hf, name)
    torch.manual_seed(0)
    stock = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with caplog.at_level("WARNING", logger="sparseflash"):
        ours = kind._from_config(copy.deepcopy(config), attn_implementation="sparse").eval()
    assert len([x for x in caplog.messages if "goes on with its own attention" in x]) == 1
    ours.load_state_dict(stock.state_dict())
    keep = torch.ones(2, 30, dtype=torch.long)
    keep[0, :4] = 0
    with torch.no_grad():
        ids = tokens(2, 30)
        want, got = (m(ids, attention_mask=keep).logits[:, 4:] for m in (stock, ours))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "mistral"])
def test_weights_are_formed_where_rows_are_short(family, monkeypatch):
    eager = tiny(family)
    eager.set_attn_implementation("eager")
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("sparse")
    keep = torch.ones(2, 40, dtype=torch.long)
    keep[0, :3] = 0
    with torch.no_grad():
        how = {"input_ids": tokens(2, 40), "attention_mask": keep, "output_attentions": True}
        want, got = (m(**how).attentions for m in (eager, ours))
    assert len(want) == len(got) > 1
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b[:, :, 3:], a[:, :, 3:])
    monkeypatch.setattr(attention, "WEIGHTS", 4 * 2 * 4 * 40 * 40 - 1)
    with pytest.raises(sf.SparseFlashError, match=r"weights \[2, 4, 40, 40\], 0 MiB a layer.*shorter rows"):
        ours(**how)
    monkeypatch.undo()
    if family == "llama":
        with sf.transformers.sparse(ours, sf.methods.Window(9)):
            with pytest.raises(sf.SparseFlashError, match="a method or a cache that evicts"):
                ours(**how)


def test_methods_reach_a_model_inside_of_a_wrapper():
    one, ids = copy.deepcopy(model("llama")), tokens(1, 40)
    method = sf.methods.Window(9)
    with torch.no_grad():
        with sf.transformers.sparse(one, method) as same:
            assert same is one
            want = one(ids).logits
        wrapped = torch.nn.DataParallel(one)
        with sf.transformers.sparse(wrapped, method) as same:
            assert same is wrapped
            assert torch.equal(wrapped(ids).logits, want)
        assert not torch.equal(wrapped(ids).logits, want)
    with pytest.raises(sf.SparseFlashError, match="Linear has no config"):
        with sf.transformers.sparse(torch.nn.Linear(1, 1), method):
            pass


@pytest.mark.parametrize("cut", [(0, 10), (20, 0), (7, 30)])
def test_caches_may_hold_other_numbers_of_tokens_in_each_layer(cut):
    """The last keys are the queries' own, and whatever a layer still has lies before them."""
    one, ids = copy.deepcopy(model("llama")), tokens(2, 45)

    def forward(kind, pieces):
        one.set_attn_implementation(kind)
        cache, at, found = hf.DynamicCache(config=one.config), 40, []
        one(ids[:, :at], past_key_values=cache)
        for layer, n in zip(cache.layers, cut, strict=False):
            layer.keys = layer.keys[:, :, n:].clone()
            layer.values = layer.values[:, :, n:].clone()
        for n in pieces:
            place = torch.arange(at, at + n)[None]
            found.append(one(ids[:, at : at + n], past_key_values=cache, position_ids=place).logits)
            at += n
        return torch.cat(found, 1)

    with torch.no_grad():
        stock = forward("sdpa", (1,) * 5)  # which takes such caches token by token alone
        torch.testing.assert_close(forward("sparse", (1,) * 5), stock)
        torch.testing.assert_close(forward("sparse", (5,)), stock)

"""Every method for prompts, walked through the inputs that are at the edge of what it is for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparseflash as sf
from cases import mask_of

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

TEXT = pytest.importorskip("transformer_models", reason="Transformers is not installed").TEXT

M = sf.methods
PROFILE = sf.calibrate.Profile.of("a model", {-1: [{"method": "minference"}] * 4})
# Each as it is, and what leaves out the most that its settings allow.
METHODS = {
    "anchor-attention": (M.AnchorAttention(), {"theta": -1e9, "block": 16, "step": 2}),
    "blasst": (M.BLASST(), {"factor": 1e-3}),
    "block-topk": (M.BlockTopK(), {"blocks": 1, "block": 16, "dense_tiles": 0}),
    "dual-chunk-attention": (M.DualChunkAttention(), {"context": 64}),
    "dynamic-mask": (M.DynamicMask(), {"window": 1}),
    "flashprefill": (M.FlashPrefill(), {"alpha": 1.0, "block": 16, "near": 1, "dense_tiles": 0}),
    "flexprefill": (M.FlexPrefill(), {"gamma": 1e-9, "block": 16, "min_budget": 1}),
    "last-dense": (
        M.LastDense(M.MInference()),
        {"method": M.MInference(vertical=1, slash=1, near=1, sinks=0), "rows": 1},
    ),
    "minference": (M.MInference(), {"vertical": 1, "slash": 1, "near": 1, "sinks": 0}),
    "mminference": (M.MMInference(), {"near": 1, "sinks": 0, "strides": (97,)}),
    "moa": (M.MoA(), {"alpha": 1, "beta": 0.0, "sinks": 0, "least": 1}),
    "moba": (M.MoBA(), {"budget": 16, "page": 16}),
    "pbs-attn": (M.PBSAttn(), {"threshold": 1e-9, "block": 16, "segment": 32}),
    "profiled": (M.Profiled(PROFILE), {}),
    "round-attention": (M.RoundAttention(), {}),
    "seer-attention": (M.SeerAttention(), {"threshold": 0.999, "block": 16, "near": 1, "dense_tiles": 0}),
    "star-attention": (M.StarAttention(), {"block": 16, "last": 1}),
    "tri-shape": (M.TriShape(), {"sinks": 0, "window": 1, "last": 1, "block": 16}),
    "xattention": (M.XAttention(), {"threshold": 1e-9, "block": 16, "dense_tiles": 0}),
}
GENERAL = {"sink-window", "window", "mtraining"}
"""Windows, and a pattern of training that begins at whole blocks: tested as the others of their kind."""
ROPE = 100 ** -(torch.arange(8) / 8)
H = 4


def drawn(Tq: int, Tk: int, scale: float = 1.0):
    g = torch.Generator().manual_seed(Tq)
    return [torch.randn(1, heads, T, 16, generator=g) * scale for heads, T in ((H, Tq), (2, Tk), (2, Tk))]


def told(method, **more):
    ctx = {"layer": 0, "rope": ROPE, **more}
    return {name: x for name, x in ctx.items() if name in (*method.reads, "layer", "rope")}


def pairs(method, q, k, **ctx):
    """Which pairs are seen, bool [1,H,Tq,Tk], whatever rows the method attends."""
    v = {"v": k} if method.reads and "rope" in method.reads else {}
    mask = mask_of(method.select(q, k, told(method, **ctx) | v).plan)
    return mask.repeat_interleave(H // mask.shape[1], 1)


def past(Tq: int, Tk: int):
    return torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)


def small(slug: str):
    method, settings = METHODS[slug]
    return dataclasses.replace(method, **settings)


def test_every_method_of_prompts_is_walked():
    own = {
        name
        for name in M.names()
        if "prefill" in M.find(name).phases and not {"training"} & set(M.find(name).phases)
    }
    assert own <= set(METHODS) and set(METHODS) - own <= {"dynamic-mask"}
    assert all("prefill" in M.find(name).phases for name in GENERAL)


@pytest.mark.parametrize("slug", METHODS)
@pytest.mark.parametrize("T", [1, 3, 5, 40])
def test_a_prompt_shorter_than_every_budget_is_dense_attention(slug, T):
    method, (q, k, v) = METHODS[slug][0], drawn(T, T)
    assert torch.equal(pairs(method, q, k)[0], past(T, T).expand(H, T, T))
    own = told(method)
    want = sf.attention(q, k, v, causal=True)
    torch.testing.assert_close(method(q, k, v, ctx=own), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("slug", METHODS)
def test_a_chunk_shorter_than_a_tile_is_attention_over_what_is_selected(slug):
    """Three queries behind 200 keys, at settings that leave out what they can."""
    method, (q, k, v) = small(slug), drawn(3, 203, 2.0)
    ctx = told(method, q_offset=200)
    if slug == "dual-chunk-attention":  # attends other rows; that these are right is tested with it
        whole = drawn(203, 203, 2.0)[0]
        whole[:, :, 200:] = q
        want = method(whole, k, v, ctx={"rope": ROPE})[:, :, 200:]
        torch.testing.assert_close(
            method(q, k, v, q_offset=200, ctx={"rope": ROPE}), want, atol=1e-5, rtol=1e-4
        )
        return
    selection = method.select(q, k, ctx)
    mask = mask_of(method.shown(q, k, selection, ctx))
    mask = mask.repeat_interleave(H // mask.shape[1], 1)
    assert not bool((mask & ~past(3, 203)).any()) and bool(mask.any(-1).all())
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT / 4
    if selection.key_bias is not None:
        logits = logits + selection.key_bias[:, :, None].double()
    want = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double().repeat_interleave(2, 1)
    got = method(q, k, v, q_offset=200, ctx={n: x for n, x in ctx.items() if n != "q_offset"})
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slug", METHODS)
def test_a_budget_that_would_keep_nothing_leaves_every_query_a_key(slug):
    method, (q, k, v) = small(slug), drawn(200, 200, 4.0)
    assert bool(method(q, k, v, ctx=told(method)).isfinite().all())
    if slug == "dual-chunk-attention":  # sees all pairs, each in one of three rows of a query
        return
    mask = pairs(method, q, k)
    assert bool(mask.any(-1).all()) and not bool((mask[0] & ~past(200, 200)).any())
    if slug not in ("profiled", "round-attention", "blasst"):
        assert float(mask.sum()) < 0.6 * H * float(past(200, 200).sum())


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("flexprefill", "gamma"), ("xattention", "threshold"), ("pbs-attn", "threshold"),
        ("flashprefill", "alpha"), ("moa", "beta"), ("blasst", "factor"), ("block-topk", "blocks"),
        ("minference", "vertical"), ("minference", "slash"), ("seer-attention", "blocks"),
        ("seer-attention", "threshold"), ("dynamic-mask", "window"), ("tri-shape", "window"),
        ("moba", "budget"), ("mminference", "near"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [-1, float("nan"), "half"])
def test_budgets_outside_of_their_range_are_refused_by_name(slug, name, value):
    with pytest.raises(sf.SparseFlashError, match=f"{name}=.*expected"):
        dataclasses.replace(METHODS[slug][0], **{name: value})


# ---------------------------------------------------------------- inside a model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()


@torch.no_grad()
@pytest.mark.parametrize("slug", METHODS)
def test_a_short_prompt_of_a_model_runs_dense_and_its_report_says_so_once(slug, model):
    method, ids = METHODS[slug][0], torch.arange(60)[None] * 7 % 90 + 3
    want = model(ids).logits
    with sf.transformers.sparse(model, prefill=method):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
        said = sf.transformers.report(model, input_ids=ids).remarks
    assert len(said) == 1 and "2 of 2 calls" in said[0] and type(method).__name__ in said[0]


@torch.no_grad()
@pytest.mark.parametrize("slug", METHODS)
def test_a_bidirectional_model_is_refused_by_its_layer(slug):
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=99
    )
    bert = transformers.BertModel(config).eval()
    if getattr(METHODS[slug][0], "causal", None) is True:  # the fix that the error names
        with sf.transformers.sparse(bert, prefill=dataclasses.replace(METHODS[slug][0], causal=False)):
            assert bert(torch.arange(3, 40)[None]).last_hidden_state.isfinite().all()
    with sf.transformers.sparse(bert, prefill=METHODS[slug][0]):
        with pytest.raises(sf.SparseFlashError, match=r"encoder\.layer\.0.*(bidirectional|rope)"):
            bert(torch.arange(3, 40)[None])


def gates(*layers: int, heads: int = H, width: int = 16):
    return M.Gates({n: torch.zeros(heads, 3 * width, width) for n in layers})


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "said"),
    [
        (M.Profiled(sf.calibrate.Profile.of("x", {-1: [{"method": "minference"}] * 8})), "8 heads, q has 4"),
        (M.Profiled(sf.calibrate.Profile.of("x", {7: [{"method": "minference"}] * 4})), "layers.*7"),
        (M.FlexPrefill(tau=(0.1, 0.2, 0.3)), "3 heads, q has 4"),
        (M.MoA(alpha=(1, 2, 3, 4, 5)), "5 heads, q has 4"),
        (M.LastDense(M.Profiled(sf.calibrate.Profile.of("x", {7: [{"method": "moa"}] * 4}))), "layers.*7"),
        (M.SeerAttention(gates(0, 1, heads=8)), "weights of this model"),
        (M.SeerAttention(gates(0, 1, width=32)), "weights of this model"),
        (M.SeerAttention(gates(5, 6)), "gates of the layers .5, 6., not of 0"),
        (M.Profiled(), "has no profile: make one with sparseflash.calibrate"),
        (M.LastDense(), "has no method: expected LastDense"),
    ],
    ids=lambda x: "" if isinstance(x, str) else repr(x)[:50],
)  # fmt: skip
def test_what_was_calibrated_for_another_model_or_not_at_all_is_named_with_the_layer(method, said, model):
    with pytest.raises(sf.SparseFlashError, match=f"model.layers.0.self_attn.*{said}"):
        with sf.transformers.sparse(model, prefill=method):
            model(torch.arange(60)[None])


def test_files_that_are_not_there_are_named():
    with pytest.raises(sf.SparseFlashError, match="nowhere/gates.safetensors holds no gates"):
        M.SeerAttention("/nowhere/gates.safetensors")
    with pytest.raises(sf.SparseFlashError, match="nowhere/p.json"):
        sf.calibrate.Profile.load("/nowhere/p.json")

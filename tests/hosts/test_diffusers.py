"""Transformers of Diffusers with tiny random weights: plumbing, steps, states, exactness; never quality."""

from __future__ import annotations

import copy

import pytest
import torch

import sparseflash as sf
from sparseflash.methods.base import Method, Selection

diffusers = pytest.importorskip("diffusers")


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([500]),
    }
    return model, given, (4, 4, 6), (0, 0), ["blocks.0.attn1", "blocks.1.attn1"]


def hunyuan(batch=1):
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[0, 6:] = 0
    given = {
        "hidden_states": torch.randn(batch, 4, 4, 8, 12),
        "encoder_hidden_states": torch.randn(batch, 9, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "timestep": torch.full((batch,), 500),
    }
    return model, given, (4, 4, 6), (0, 9), ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4 * 4 * 6, 8),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "timestep": torch.tensor([500, 500]),
        "num_frames": 4,
        "height": 4,
        "width": 6,
    }
    return model, given, (4, 4, 6), (0, 0), ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    ids = torch.cat([torch.zeros(96, 1), torch.cartesian_prod(torch.arange(8.0), torch.arange(12.0))], 1)
    given = {
        "hidden_states": torch.randn(1, 96, 4),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(7, 3),
    }
    return model, given, (8, 12), (7, 0), ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=8, num_layers=2, sample_width=12, sample_height=8, sample_frames=13, patch_size=2,
        max_text_seq_length=8,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 8, 8),
        "timestep": torch.tensor([500, 500]),
    }
    return model, given, (4, 4, 6), (8, 0), ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


HOSTS = [wan, hunyuan, ltx, flux, cogvideox]
every_host = pytest.mark.parametrize("host", HOSTS, ids=lambda f: f.__name__)


def made(host, **options):
    torch.manual_seed(0)
    model, *rest = host(**options)
    return model.eval(), *rest


def run(model, given, **change):
    with torch.no_grad():
        return model(**{**given, **change}, return_dict=False)[0]


def near(model, given, out):
    """The output is at most twice as far from float64 as that of Diffusers, and a rounding."""
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }
    truth = run(copy.deepcopy(model).double(), wide)
    theirs, ours = ((x - truth).abs().max() for x in (run(model, given), out))
    band = torch.finfo(torch.float32).eps * truth.abs().max()
    assert ours <= 2 * theirs + band, f"{float(ours)} against {float(theirs)}"


class Spy(Method):
    """Everything, and what it was told."""

    def __init__(self):
        self.told = []

    reads = ("grid", "text", "branch", "step", "steps", "layer")

    def select(self, q, k, ctx=None):
        self.told.append({name: ctx.get(name) for name in (*self.reads, "state")} | {"T": q.shape[2]})
        calls = (ctx.get("state") or 0) + 1
        return Selection(sf.Plan.dense(q.shape[2], k.shape[2]), state=calls)


FULL = {
    "none": None,
    "sparsed": sf.methods.SparseD(1.0, block=16),
    "adaspa": sf.methods.AdaSpa(0.0, search=(0,), block=16),
    "efficient-vdit": sf.methods.EfficientVDiT(99),
    "sparse-vdit": sf.methods.SparseVDiT(("multi-diagonal", "stripe"), reach=99, stripes=99, block=16),
    "paro-attention": sf.methods.PAROAttention(1.0, block=16),
}


@every_host
@pytest.mark.parametrize("name", FULL)
def test_at_full_budget_every_layer_goes_through_and_the_output_is_that_of_diffusers(host, name):
    model, given, _, _, layers = made(host)
    want, times = run(model, given), [given["timestep"] * t for t in (1.0, 1.0, 0.5, 0.25)]
    with sf.diffusers.sparse(model, FULL[name], steps=4) as report:
        outs = [run(model, given, timestep=t) for t in times]
    assert report.calls == dict.fromkeys(layers, 4)
    assert report.density == dict.fromkeys(layers, 1.0)
    for t, out in zip(times[1:], outs[1:]):
        near(model, {**given, "timestep": t}, out)
    assert torch.equal(run(model, given), want)


@every_host
def test_a_method_is_told_grid_text_layer_and_step(host):
    model, given, grid, text, layers = made(host)
    spy = Spy()
    with sf.diffusers.sparse(model, spy, steps=3) as report:
        for t in (1.0, 0.7, 0.5):
            run(model, given, timestep=given["timestep"] * t)
    assert [told["layer"] for told in spy.told] == [0, 1] * 3
    assert [told["step"] for told in spy.told] == [0, 0, 1, 1, 2, 2]
    assert [told["state"] for told in spy.told] == [None, None, 1, 1, 2, 2]
    assert all(told["grid"] == grid and told["steps"] == 3 for told in spy.told)
    padded = 3 if host is hunyuan else 0
    ends = (text[0], text[1] - padded)
    tokens = torch.Size(grid).numel() + sum(ends)
    assert all(told["text"] == ends and told["T"] == tokens for told in spy.told)
    assert report.steps == {None: 2}


@every_host
def test_a_sparse_method_changes_the_output_and_leaves_nothing_behind(host):
    model, given, *_ = made(host)
    want, before = run(model, given), copy.deepcopy(sorted(model.state_dict()))
    method = sf.methods.SparseVDiT("diagonal", reach=0, block=16)
    with sf.diffusers.sparse(model, method) as report:
        assert not torch.allclose(run(model, given), want, atol=1e-5)
    assert all(0 < x < 1 for x in report.density.values())
    with pytest.raises(RuntimeError, match="mine"), sf.diffusers.sparse(model, method):
        raise RuntimeError("mine")
    assert torch.equal(run(model, given), want) and sorted(model.state_dict()) == before


def test_branches_steps_and_generations_are_those_of_cache_context():
    model, given, *_ = made(wan)
    method = sf.methods.SparseD(0.2, skip=0.2, block=16)
    other = torch.randn(1, 5, 16)

    def generation(seed):
        torch.manual_seed(seed)
        x, seen = torch.randn_like(given["hidden_states"]), []
        for i in range(4):
            for branch, words in (("cond", given["encoder_hidden_states"]), ("uncond", other)):
                with model.cache_context(branch, step_index=i, num_inference_steps=4):
                    out = run(model, given, hidden_states=x, encoder_hidden_states=words)
                seen.append((report.steps[branch], report.density["blocks.1.attn1"]))
            x = x - 0.3 * out
        return x, seen

    with sf.diffusers.sparse(model, method) as report:
        first, seen = generation(1)
        assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [density == 1 for _, density in seen] == [True] * 4 + [False] * 4
        between, _ = generation(2)
        again, _ = generation(1)
    assert torch.equal(first, again) and not torch.equal(first, between)
    with sf.diffusers.sparse(model, method) as report:
        assert torch.equal(generation(1)[0], first)


def test_a_time_that_rises_begins_a_generation_where_steps_are_counted():
    model, given, *_ = made(wan)
    spy = Spy()
    with sf.diffusers.sparse(model, spy) as report:
        for t in (900, 900, 500, 100, 900, 500):
            run(model, given, timestep=torch.tensor([t]))
        assert [told["step"] for told in spy.told[::2]] == [0, 1, 2, 3, 0, 1]
        assert spy.told[8]["state"] is None
        model._reset_stateful_cache()  # what a pipeline calls at its end
        run(model, given, timestep=torch.tensor([100]))
    assert spy.told[-1]["step"] == 0 and spy.told[-1]["state"] is None and report.steps == {None: 0}


def test_padded_text_is_cut_for_each_row_of_a_batch():
    model, given, *_ = made(hunyuan, batch=2)
    spy = Spy()
    with sf.diffusers.sparse(model, spy):
        got = run(model, given)
    assert [told["text"] for told in spy.told[:2]] == [(0, 6), (0, 9)]
    near(model, given, got)


def test_what_is_not_reached_is_an_error():
    class Own:
        def __call__(self, attn, hidden_states, *rest, **more):
            return hidden_states

    model, given, *_ = made(wan)
    model.blocks[1].attn1.set_processor(Own())
    with (
        sf.diffusers.sparse(model, None),
        pytest.raises(sf.SparseFlashError, match=r"blocks.1.attn1: Own called no scaled_dot"),
    ):
        run(model, given)
    with (
        pytest.raises(sf.SparseFlashError, match="SD3Transformer2DModel: .*not known; known are Wan"),
        sf.diffusers.sparse(
            diffusers.SD3Transformer2DModel(
                sample_size=8,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=8,
                caption_projection_dim=16,
                pooled_projection_dim=8,
            ),  # fmt: skip
            None,
        ),
    ):
        pass
    model, given, *_ = made(wan)
    for wrong, said in ((7, "expected a module"), (None, "expected a Method")):
        target = wrong if said == "expected a module" else model
        with pytest.raises(sf.SparseFlashError, match=said), sf.diffusers.sparse(target, "sparsed"):
            pass
    with (
        sf.diffusers.sparse(model, None),
        pytest.raises(sf.SparseFlashError, match="inside another"),
        sf.diffusers.sparse(model, None),
    ):
        pass
    with (
        sf.diffusers.sparse(model, sf.methods.Window(window=9)),
        pytest.raises(sf.SparseFlashError, match="sees only what is earlier.*causal=False"),
    ):
        run(model, given)
    with (
        sf.diffusers.sparse(model, sf.methods.SparseD(block=16)),
        pytest.raises(sf.SparseFlashError, match="the number of all steps"),
    ):
        run(model, given)
    run(model, given)


def pipeline(host):
    """A whole pipeline without a text encoder, whose latents are what it returns."""
    torch.manual_seed(0)
    model = host()[0].eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    words = {"prompt_embeds": torch.randn(1, 5, 16), "negative_prompt_embeds": torch.randn(1, 5, 16)}
    size = {
        "height": 64,
        "width": 96,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    if host is wan:
        vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        pipe = diffusers.WanPipeline(None, None, vae, scheduler, model)
        return pipe, {**words, **size, "num_frames": 13}
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(scheduler, vae, None, None, model)
    for name in ("prompt", "negative_prompt"):
        words[f"{name}_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    return pipe, {**words, **size, "num_frames": 17}


@pytest.mark.parametrize("host", [wan, ltx], ids=lambda f: f.__name__)
def test_a_pipeline_generates_the_same_twice_and_the_same_as_without_at_full_budget(host):
    pipe, given = pipeline(host)
    pipe.set_progress_bar_config(disable=True)

    def generate():
        return pipe(**given, generator=torch.Generator().manual_seed(0)).frames

    want = generate()
    with sf.diffusers.sparse(pipe.transformer, sf.methods.SparseD(1.0, block=8), steps=5) as report:
        torch.testing.assert_close(generate(), want, atol=1e-4, rtol=1e-4)
    assert set(report.calls.values()) == {10 if host is wan else 5}  # LTX has both branches in one batch
    method = sf.methods.SparseD(0.1, block=4)
    with sf.diffusers.sparse(pipe.transformer, method, steps=5) as report:
        one, two = generate(), generate()
        assert report.steps == {} and max(report.density.values()) < 1
    assert torch.equal(one, two) and not torch.equal(one, want)
    assert torch.equal(generate(), want)

"""Models that see images and videos: their methods are told which tokens these are, and of what grid."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import sparseflash as sf
from sparseflash.integrations.transformers.tokens import read

TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 512}
IDS = {"image_token_id": 101, "video_token_id": 102, "vision_start_token_id": 103, "vision_end_token_id": 104}
GRID = (4, 4, 4)  # frames, rows and columns of tokens: each of them stands for 2 x 2 patches


@dataclasses.dataclass(frozen=True)
class Told(sf.methods.Method):
    """A method that sees everything and writes down what it was told."""

    heard: list = dataclasses.field(default_factory=list, compare=False, hash=False)
    reads = ("q_offset", "grid", "modality")
    phases = ("prefill",)
    causal_selection = False

    def select(self, q, k, ctx=None):
        self.heard.append(((ctx or {}).get("modality"), (ctx or {}).get("grid"), ctx["layer"]))
        plan = sf.Plan.dense(q.shape[2], k.shape[2], causal=True, q_offset=ctx["q_offset"])
        return sf.methods.Selection(plan)


def qwen(kind: str):
    """A tiny model of the Qwen family, and what it takes of a video of GRID."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    if kind == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [0]}
    else:
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    text = TEXT | {"rope_parameters": rope, "head_dim": 16}
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, **IDS)
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config).eval()
    return model, {
        "pixel_values_videos": torch.randn(4 * 8 * 8, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[4, 8, 8]]),
    }


def llava(kind: str):
    """A tiny model of the LLaVA family, and what it takes of a video of GRID: it is given no sizes."""
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    ids = {"image_token_index": 101, "video_token_index": 102, "vision_feature_layer": -1}
    more = {"spatial_pool_stride": 1} if kind == "LlavaNextVideo" else {}
    config = getattr(hf, f"{kind}Config")(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT), **ids, **more
    )
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config).eval()
    return model, {"pixel_values_videos": torch.randn(1, 4, 3, 16, 16)}


def prompt(before: int, behind: int, frame: int = 16, frames: int = 4, stamps: int = 0):
    """Text, a video (with text before each frame) and text: ids, and which of them are the video."""
    parts = [torch.randint(1, 100, (before,))]
    for _ in range(frames):
        parts += [torch.randint(1, 100, (stamps,)), torch.full((frame,), 102)]
    ids = torch.cat([*parts, torch.randint(1, 100, (behind,))])[None]
    return ids, (ids == 102).long()


def text_layers(model):
    return [x.name for x in sf.transformers.attention_layers(model) if "language_model" in x.name]


FAMILIES = {"Qwen2_5_VL": qwen, "Qwen3VL": qwen, "LlavaNextVideo": llava, "VideoLlava": llava}


def made(kind):
    torch.manual_seed(0)
    model, seen = FAMILIES[kind](kind)
    frame = 17 if kind == "VideoLlava" else 16  # with a token for the whole frame
    ids, video = prompt(9, 23, frame, stamps=2 if kind == "Qwen3VL" else 0)
    given = {"input_ids": ids, **seen}
    if FAMILIES[kind] is qwen:
        given["mm_token_type_ids"] = (2 * video).int()
    return model, given, video, (4, 17) if frame == 17 else GRID


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_method_hears_of_every_token_what_it_shows_and_of_which_grid(kind):
    model, given, video, grid = made(kind)
    told = Told()
    with torch.no_grad(), sf.transformers.sparse(model, prefill=told, layers=text_layers(model)):
        model(**given)
    assert len(told.heard) == 2
    for modality, shape, _ in told.heard:
        assert torch.equal(modality, video) and shape == grid


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("pattern", ["grid", "2d-boundary"])
def test_at_full_budget_the_model_is_itself(kind, pattern):
    model, given, _, _ = made(kind)
    budget = {"near": 512} if pattern == "grid" else {"vertical": 512, "slash": 512}
    method = sf.methods.MMInference(pattern=pattern, **budget)
    with torch.no_grad():
        want = model(**given).logits
        with sf.transformers.sparse(model, prefill=method, layers=text_layers(model)):
            torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-4)


def test_tokens_of_a_padded_batch_move_with_it_and_those_of_a_cache_stay_known():
    model, given, video, _ = made("Qwen2_5_VL")
    ids = given["input_ids"]
    text = torch.randint(1, 100, (1, 50))
    pad = ids.shape[1] - 50
    both = torch.cat([ids, torch.nn.functional.pad(text, (pad, 0))])
    given |= {
        "input_ids": both,
        "mm_token_type_ids": torch.nn.functional.pad(given["mm_token_type_ids"], (0, 0, 0, 1)),
        "attention_mask": torch.nn.functional.pad(torch.ones(2, 50, dtype=torch.long), (pad, 0), value=0),
    }
    given["attention_mask"][0] = 1
    told = Told()
    with torch.no_grad(), sf.transformers.sparse(model, prefill=told, layers=text_layers(model)):
        cache = model(**given, use_cache=True).past_key_values
    shown = {modality.shape[1]: modality for modality, *_ in told.heard}
    assert torch.equal(shown[ids.shape[1]], video) and not shown[50].any()

    told.heard.clear()
    more, at = torch.randint(1, 100, (2, 5)), torch.arange(200, 205).expand(3, 2, -1)
    mask = torch.cat([given["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    with torch.no_grad(), sf.transformers.sparse(model, prefill=told, layers=text_layers(model)):
        model(input_ids=more, attention_mask=mask, position_ids=at, past_key_values=cache)
    shown = {modality.shape[1]: modality for modality, *_ in told.heard if modality is not None}
    assert torch.equal(shown[ids.shape[1] + 5], torch.nn.functional.pad(video, (0, 5)))


def test_a_report_and_a_profile_hear_it_too():
    model, given, _, _ = made("Qwen2_5_VL")
    grid = {"method": "mminference", "near": 4, "sinks": 2}
    profile = sf.methods.Profiled(sf.calibrate.Profile.of("tiny", {-1: [grid] * 4}))
    inner = sf.methods.MMInference(near=4, sinks=2)
    with sf.transformers.sparse(
        model, prefill=sf.methods.LastDense(inner, rows=0), layers=text_layers(model)
    ):
        one = sf.transformers.report(model, **given)
    with sf.transformers.sparse(model, prefill=profile, layers=text_layers(model)):
        other = sf.transformers.report(model, **given)
    densities = [[row.density for row in rows if min(row.density) < 1] for rows in (one, other)]
    assert densities[0] == densities[1] and len(densities[0]) == 2


def test_what_a_model_was_told_is_read_with_care():
    config = hf.Qwen2_5_VLConfig(text_config=dict(TEXT), **IDS)
    ids = torch.tensor([[1, 102, 102, 101, 5]])
    assert read(config, {"input_ids": ids}).modality[..., 0].tolist() == [[0, 1, 1, 1, 0]]
    assert read(hf.LlamaConfig(), {"input_ids": ids}) is None and read(None, {}) is None
    found = read(config, {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 4, 6]])})
    assert found.grid == (
        1,
        4 // config.vision_config.spatial_merge_size,
        6 // config.vision_config.spatial_merge_size,
    )
    odd = {"input_ids": ids, "pixel_values_videos": torch.zeros(1, 3, 3, 4, 4)}
    assert read(config, odd).grid is None  # two tokens are not three frames


# ---------------------------------------------------------------- models of images alone

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
IMAGE_MODELS = {"ViT": 1, "Dinov2": 1, "Dinov2WithRegisters": 5, "DINOv3ViT": 4}
"""Class and register tokens before the patches."""
EVERYTHING = {
    "grid-window": sf.methods.GridWindow((99, 99), (-1, 99)),
    "cycle-scan": sf.methods.CycleScan(10**6),
    "sliding-tile": sf.methods.SlidingTile(tile=(4, 4), window=(99, 99)),
}
every_image_model = pytest.mark.parametrize("kind", IMAGE_MODELS)


def image_model(kind):
    torch.manual_seed(0)
    more = {"num_register_tokens": 3} if kind == "DINOv3ViT" else {}
    config = getattr(hf, f"{kind}Config")(**SMALL, image_size=32, intermediate_size=64, **more)
    model = getattr(hf, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # fresh layer scales and biases are next to nothing
            weight.add_(0.1 * torch.randn_like(weight))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


@torch.no_grad()
def seen(model, given):
    return model(**given).last_hidden_state


@every_image_model
@pytest.mark.parametrize("name", EVERYTHING)
def test_at_full_budget_an_image_model_is_itself(kind, name):
    """At most twice as far from float64 as the model's own attention, and a rounding; all calls counted."""
    model, given = image_model(kind)
    truth = seen(copy.deepcopy(model).double(), {"pixel_values": given["pixel_values"].double()})
    own = seen(model, given)
    calls = []
    before = model.config._attn_implementation
    with sf.transformers.sparse(model, prefill=Counts(EVERYTHING[name], calls)):
        out = seen(model, given)
    assert calls == [0, 1] and model.config._attn_implementation == before
    band = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (out - truth).abs().max() <= 2 * (own - truth).abs().max() + band
    assert torch.equal(seen(model, given), own)


@dataclasses.dataclass(frozen=True)
class Counts(sf.methods.Method):
    """Another method, and the layers that asked it."""

    inner: sf.methods.Method
    calls: list = dataclasses.field(default_factory=list, compare=False, hash=False)
    reads = ("grid", "text")
    phases = ("prefill", "diffusion")
    causal_selection = False

    def select(self, q, k, ctx=None):
        self.calls.append(ctx["layer"])
        return self.inner.select(q, k, ctx)


@every_image_model
def test_windows_are_those_of_the_image_and_class_tokens_see_all(kind):
    model, given = image_model(kind)
    given["pixel_values"] = torch.randn(2, 3, 32, 48)  # 8 by 12 patches, not the size it was made for
    plans = []

    class Looks(Counts):
        def select(self, q, k, ctx=None):
            selection = self.inner.select(q, k, ctx)
            plans.append(torch.stack([plan.to_dense()[0, 0] for plan in selection.plan]))
            assert ctx["grid"] == (8, 12) and ctx["text"] == (IMAGE_MODELS[kind], 0)
            return selection

    if kind == "ViT":
        given["interpolate_pos_encoding"] = True
    with sf.transformers.sparse(model, prefill=Looks(sf.methods.GridWindow((4, 4), (-1, 64)))):
        seen(model, given)
    n = IMAGE_MODELS[kind]
    row, column = torch.arange(96) // 12 // 4, torch.arange(96) % 12 // 4
    want = torch.ones(96 + n, 96 + n, dtype=torch.bool)
    want[n:, n:] = (row[:, None] == row) & (column[:, None] == column)
    for mask in plans:
        assert torch.equal(mask.any(0), want) and int(mask.sum(0).max()) == 1
    assert len(plans) == 2


def sam(**more):
    vision = hf.SamVisionConfig(**SMALL, image_size=32, window_size=4, global_attn_indexes=[1], mlp_dim=64)
    prompts = {"image_size": 32, "patch_size": 4, "mask_input_channels": 4}
    decoder = {"mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.SamConfig(
        vision_config=vision.to_dict(), prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    return hf.SamModel(config, **more).eval(), hf.SamVisionModel(vision).eval()


def test_the_encoder_of_sam_is_refused_by_name_and_its_decoder_is_reached():
    """It adds a bias for each pair, looks its class up in a table of its own, and would stay dense unseen."""
    model, encoder = sam()
    window = sf.methods.GridWindow((4, 4), (8, 8))
    with (
        pytest.raises(sf.SparseFlashError, match="SamVisionSdpaAttention compute attention themselves"),
        sf.transformers.sparse(encoder, prefill=window),
    ):
        pass
    with (
        pytest.raises(
            sf.SparseFlashError, match=r"vision_encoder.layers.0.attn' and 1 more are SamVisionSdpa"
        ),
        sf.transformers.sparse(model, prefill=window),
    ):
        pass
    given = {"pixel_values": torch.randn(1, 3, 32, 32), "input_points": torch.tensor([[[[3.0, 4.0]]]])}
    before = {part: getattr(model.config, part)._attn_implementation for part in model.config.sub_configs}
    calls = []
    everything = Counts(sf.methods.CycleScan(10**6), calls)
    with torch.no_grad():
        want = model(**given).pred_masks
        with sf.transformers.sparse(model, prefill=everything, layers="mask_decoder*self_attn"):
            torch.testing.assert_close(model(**given).pred_masks, want, atol=1e-5, rtol=1e-4)
        assert torch.equal(model(**given).pred_masks, want)
    after = {part: getattr(model.config, part)._attn_implementation for part in model.config.sub_configs}
    assert calls == [0] and before == after


# ---------------------------------------------------------------- block diffusion


def diffusion_gemma():
    """A tiny DiffusionGemma: its decoder denoises canvases of 16 tokens behind what its encoder read."""
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "num_experts": 2}
    text |= {"top_k_experts": 1, "moe_intermediate_size": 16, "pad_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
    config = hf.DiffusionGemmaConfig(text_config=text, canvas_length=16, vision_config=vision)
    model = hf.DiffusionGemmaForBlockDiffusion(config).eval()
    model.generation_config.max_denoising_steps = 6
    model.generation_config.confidence_threshold = 1e-9
    return model


def generate(model):
    torch.manual_seed(1)
    found = model.generate(torch.arange(3, 40)[None], max_new_tokens=32)
    return found.sequences


needs_block_diffusion = pytest.mark.skipif(
    not hasattr(hf, "DiffusionGemmaForBlockDiffusion"), reason="this Transformers has no DiffusionGemma"
)
DECODER = "model.decoder.layers.1.self_attn"  # the other one has a window


@needs_block_diffusion
def test_block_diffusion_tells_step_and_canvas_and_at_full_budget_is_itself():
    model, heard = diffusion_gemma(), []

    class Hears(sf.methods.SparseD):
        def select(self, q, k, ctx=None):
            heard.append((ctx["step"], ctx["steps"], ctx["generated"], q.shape[2], k.shape[2]))
            return super().select(q, k, ctx)

    want = generate(model)
    with sf.transformers.sparse(model, prefill=Hears(1.0, skip=0.2, block=8), layers=DECODER):
        assert torch.equal(generate(model), want)
    steps = [told[0] for told in heard]
    assert steps[:6] == [0, 1, 2, 3, 4, 5] and steps.count(0) == 2
    assert {told[1:4] for told in heard} == {(6, 16, 16)}
    assert [told[4] for told in heard if told[0] == 0] == [37 + 16, 37 + 32]
    assert torch.equal(generate(model), want)


@needs_block_diffusion
def test_a_canvas_reuses_the_pattern_of_its_own_first_steps():
    model, found = diffusion_gemma(), []

    class Finds(sf.methods.SparseD):
        def pattern(self, q, k, lse, ctx):
            found.append((ctx["step"], k.shape[2]))
            return super().pattern(q, k, lse, ctx)

    with sf.transformers.sparse(model, prefill=Finds(0.2, skip=0.2, block=4), layers=DECODER):
        once, twice = generate(model), generate(model)
    assert torch.equal(once, twice)
    assert found == [(2, 53), (2, 69)] * 2

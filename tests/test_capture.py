"""Real q, k, v: what a model's attention saw comes back, and figures are taken from it."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("safetensors")

from sparseflash.bench import capture, harness
from sparseflash.errors import SparseFlashError
from sparseflash.train import GPT, TrainConfig, checkpoint


@pytest.fixture
def model():
    return GPT(TrainConfig("", layers=2, width=32, heads=2, length=64))


def test_every_layer_is_heard_and_the_model_is_not_touched(model):
    tokens = torch.arange(64)[None]
    before = model(tokens)
    found = capture.capture(lambda: model(tokens))
    assert sorted(found) == sorted(f"layer.{n}.{x}" for n in (0, 1) for x in "qkv")
    assert torch.equal(model(tokens), before)
    q, k, v = (found[f"layer.0.{x}"] for x in "qkv")
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    seen = {}
    model.blocks[0].attention.output.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    model(tokens)
    torch.testing.assert_close(heads, seen["x"])


def test_a_run_is_heard_under_any_attention(tmp_path):
    config = TrainConfig("", "hash-sparse", {"nb": 4}, layers=2, width=32, heads=2, length=64)
    model, tokens = GPT(config), torch.arange(48)[None]
    checkpoint.save(
        tmp_path, {f"model.{name}": x for name, x in model.state_dict().items()}, {"config": config.to_json()}
    )
    found = capture.of_run(tmp_path, tokens, layers=[0])
    assert list(found) == ["layer.0.q", "layer.0.k", "layer.0.v"]
    seen = {}
    model.blocks[0].attention.output.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    model(tokens)
    heads = model.blocks[0].attention.attention(*(found[f"layer.0.{x}"] for x in "qkv"))
    torch.testing.assert_close(heads.transpose(1, 2).flatten(2), seen["x"])
    with pytest.raises(SparseFlashError, match="layers 0 to 1"):
        capture.of_run(tmp_path, tokens, layers=[2])


def test_a_model_of_transformers_is_heard_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = "sdpa"
    theirs = transformers.LlamaForCausalLM(config).eval()
    found = capture.capture(lambda: theirs(torch.arange(20)[None]), layers=[1])
    assert list(found) == ["layer.1.q", "layer.1.k", "layer.1.v"]
    assert found["layer.1.q"].shape == (1, 4, 20, 8)


def test_a_capture_comes_back_as_input_and_its_figures_are_in_the_rows(model, tmp_path):
    path = tmp_path / "c.safetensors"
    found = capture.capture(lambda: model(torch.arange(64)[None]))
    assert capture.save(found, path, {"model": "a test"}) < 0.1
    of = capture.inputs(path, layer=1, dtype=torch.float32)
    q, k, v, dout = of(40)
    assert torch.equal(q, found["layer.1.q"][:, :, :40].half().float()) and q.requires_grad
    assert dout.shape == v.shape
    what = harness.Settings(["window"], ["sdpa"], [40], heads=2, dim=16, rounds=1, memory=False, capture=of)
    base, own = harness.measure(what)
    assert own["inputs"] == "captured" and own["recall"] == pytest.approx(1.0)  # the window is wider
    for call, said in (
        (lambda: of(65), "has 64 tokens"),
        (lambda: capture.inputs(path, layer=7, dtype=torch.float32), "no layer 7"),
        (lambda: capture.inputs(tmp_path / "no", dtype=torch.float32), "is no capture"),
        (lambda: capture.save(found, path, {}, most=0.001), "take fewer layers"),
        (lambda: capture.capture(lambda: None), "never called"),
    ):
        with pytest.raises(SparseFlashError, match=said):
            call()

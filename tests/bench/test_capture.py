"""Real q, k, v: what a model's attention saw comes back, and figures are taken from it."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("safetensors")

import sparseflash as sf
from sparseflash.bench import capture, harness, needles, quality
from sparseflash.common.errors import SparseFlashError
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


def test_a_capture_with_fewer_heads_of_keys_is_measured_against_every_baseline():
    of = capture.inputs("smollm2", layer=15, dtype=torch.float32)
    names = {"methods": ["window"], "baselines": ["sdpa", "naive"]}
    what = harness.Settings(**names, lengths=[300], heads=9, dim=64, rounds=1, memory=False, capture=of)
    assert [(row["conformance"], row["note"]) for row in harness.measure(what)] == [("passed", "")] * 3
    (first, *_), (second, *_) = ((x.detach() for x in given[:2]) for given in what.inputs(300)[:2])
    assert torch.equal(second[:, 3:], first[:, :-3])  # three query heads for each head of keys


def test_a_method_is_judged_layer_by_layer():
    captured = capture.load("smollm2")
    window = sf.methods.get("window", window=60)
    rows = list(quality.judge(window, captured, tokens=600))
    assert [row["layer"] for row in rows] == [4, 15, 21]
    for row in rows:
        pairs = sum(min(n + 1, 60) for n in range(600))
        assert row["density"] == pytest.approx(pairs / (600 * 601 / 2))
        assert row["recall_late"] < row["recall"] < 1 and row["recall_worst"] < row["recall"]
        assert row["error"] > 0.01 and max(row[kind] for kind in needles.KINDS) < 0.01
    full = sf.methods.get("window", window=600)
    (row,) = quality.judge(full, captured, tokens=600, layers=[4])
    for figure in ("density", "recall", "recall_worst", *needles.KINDS):
        assert row[figure] == pytest.approx(1, abs=1e-4)
    assert row["error"] < 1e-5
    with pytest.raises(SparseFlashError, match="has 4096 tokens; 5000 are asked for"):
        next(quality.judge(full, captured, tokens=5000))
    with pytest.raises(SparseFlashError, match="has no layer 3; it has 4, 15, 21"):
        next(quality.judge(full, captured, layers=[3]))

"""`sparseflash generate`: rates, bytes, and whether a method says what dense attention says."""

import pytest
import torch

import sparseflash as sf

pytest.importorskip("transformers")
pytest.importorskip("typer")

import transformers
from typer.testing import CliRunner

from sparseflash.__main__ import app
from sparseflash.bench import generate
from transformer_models import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of bytes, whose attention is sharp."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("model")
    size = byte_tokenizer(where)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=size,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).eval().save_pretrained(where)
    (where / "text.txt").write_text("So it goes on, and on, and then it ends. " * 10)
    return where


WHOLE = {
    "quest": {"budget": 4096},
    "snapkv": {"budget": 4096},
    "mustafar": {"sparsity": 0.0},
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_forgets_nothing_says_the_same(name, folder):
    model, tokenizer = sf.transformers.load(folder)
    ids = tokenizer((folder / "text.txt").read_text(), return_tensors="pt").input_ids
    dense, ours = generate.measure(model, ids, generate.how(name, WHOLE[name]), 8)
    assert torch.equal(dense[1], ours[1]) and ours[0]["agree"] == 1 and ours[0]["kl"] < 1e-6
    assert ours[0]["recall"] == pytest.approx([1.0, 1.0]) and "recall" not in dense[0]
    assert dense[0]["rate"] > 0 and ours[0]["rate"] > 0 and ours[0]["kept"] == ids.shape[1] + 8


def test_a_small_cache_is_small_and_says_something_else(folder):
    model, tokenizer = sf.transformers.load(folder)
    ids = tokenizer((folder / "text.txt").read_text(), return_tensors="pt").input_ids
    given = generate.how("streaming-llm", {"budget": 8, "sinks": 1})
    dense, ours = (row for row, *_ in generate.measure(model, ids, given, 8))
    assert ours["bytes"] < 0.4 * dense["bytes"] and 8 <= ours["kept"] <= 8 + 64 and ours["kl"] > 1e-3
    packed = [row for row, *_ in generate.measure(model, ids, generate.how("mustafar", {}), 8)][1]
    assert packed["kept"] == ids.shape[1] + 8 and packed["bytes"] < dense["bytes"] and packed["kl"] > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["streaming-llm", "h2o", "quest"])
def test_recall_is_the_dense_mass_on_what_a_layer_still_sees(name, folder):
    """In the first layer, whose keys are the same in both; by hand from the weights that eager returns."""
    model, tokenizer = sf.transformers.load(folder)
    ids = tokenizer((folder / "text.txt").read_text(), return_tensors="pt").input_ids[:, :150]
    settings = {"streaming-llm": {"budget": 24, "sinks": 2}, "quest": {"budget": 32, "page": 8}}
    given = generate.how(name, settings.get(name, {"budget": 24, "sinks": 2, "recent": 8}))
    (_, words, _), (row, _, _) = generate.measure(model, ids, given, 8)
    model.set_attn_implementation("eager")
    weights = model(torch.cat([ids, words[:, :-1]], 1), output_attentions=True).attentions[0][0, :, -1]
    most = weights.topk(32 if name == "quest" else 88).values.sum(-1).mean()  # a cache evicts in steps of 64
    assert 0.01 < row["recall"][0] < min(1 - 1e-4, float(most) + 1e-5)
    if name == "streaming-llm":
        cache = generate.begun(model, ids, lambda: sf.transformers.sparse(model, **given))[0]
        with sf.transformers.sparse(model, **given):
            generate.gone_on(model, cache, words[:, :1], 8, words)
        kept = cache.layers[0].kept()
        assert kept.shape == (1, 2, 158) and torch.equal(kept.sum(-1), cache.layers[0].held)
        share = (weights * kept[0].repeat_interleave(2, 0)).sum(-1).mean()
        assert row["recall"][0] == pytest.approx(float(share), abs=1e-5)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("name", ["quest", "streaming-llm", "int8"])
def test_layers_with_a_window_keep_their_own_cache(name, new):
    """Whose last token cannot be taken back once the window is full."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=100, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model, ids = transformers.Gemma3ForCausalLM(config).eval(), torch.randint(3, 100, (1, 200))
    settings = {"streaming-llm": {"budget": 24, "sinks": 2}, "quest": {"budget": 64}}
    _, (row, *_) = generate.measure(model, ids, generate.how(name, settings.get(name, {})), new)
    assert row["recall"][0] == 1 and (row["recall"][1] == 1) == (name == "int8")


def said(folder, *words):
    file = ["--prompt-file", str(folder / "text.txt")]
    found = CliRunner().invoke(app, ["generate", "--model", str(folder), "--new", "4", *file, *words])
    return found.output + str(found.exception or "")


def test_the_command_says_rates_bytes_and_layers(folder):
    text = said(folder, "--decode", "quest", "--set", "budget=64", "--tokens", "100", "--by-layer")
    assert text.count("tokens/s") == 2 and "kept 104 of 104" in text and "agree" in text
    assert text.count("layer 1: kept 104") == 2 and text.count(", recall ") == 3
    assert "expected one of" in said(folder, "--decode", "nobody") and "mustafar" in said(
        folder, "--decode", "x"
    )
    assert "has no windo" in said(folder, "--decode", "int8", "--set", "windo=3")
    empty = folder / "empty.txt"
    empty.write_text("")
    assert "is empty" in said(folder, "--prompt-file", str(empty))
    assert "prompt-file" in said(folder, "--prompt-file", str(folder / "none.txt"))

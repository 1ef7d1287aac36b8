"""Pretrained weights by name: GGUF files of packages become models of Transformers, and nothing is taken on
trust."""

import dataclasses
import hashlib
import re
import stat

import pytest
import torch

import sparseflash as sf
from conftest import REPO

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import gguf
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sparseflash.bench import capture, needles
from sparseflash.integrations.transformers import pretrained

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama():
    config = transformers.LlamaConfig(vocab_size=262, num_hidden_layers=2, tie_word_embeddings=True, **SHAPE)
    return transformers.LlamaForCausalLM(config).eval()


def gemma3():
    config = transformers.Gemma3TextConfig(
        vocab_size=261,
        num_hidden_layers=7,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=256,  # what files do not say
        tie_word_embeddings=True,
        **SHAPE,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def write(model, path):
    """A model as llama.cpp's converter writes it: every byte is a token of it."""
    config, kind = model.config, model.config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    if kind == "llama":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        letters = bytes_to_unicode()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*special, *(letters[n] for n in range(256)), "Ca", "Cal"])
        writer.add_token_merges(["C a", "Ca l"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*special, *(f"<0x{n:02X}>" for n in range(256)), "▁"])
        writer.add_token_scores([-1000.0] * 261)
        writer.add_add_space_prefix(False)
    writer.add_token_types([3] * 4 + [1 if kind == "llama" else 6] * 256 + [1] * (config.vocab_size - 260))
    writer.add_pad_token_id(0), writer.add_eos_token_id(1), writer.add_bos_token_id(2)
    names = {v: k for k, v in (pretrained.NAMES | pretrained.LAYER).items()}
    names[pretrained.FFN_NORM[config.model_type]] = "ffn_norm"
    for name, x in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        stem = names[layer[2] if layer else name.removesuffix(".weight")]
        if kind == "llama" and stem in ("attn_q", "attn_k"):
            heads = x.shape[0] // config.head_dim
            x = x.view(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        if kind == "gemma3" and x.dim() == 1:
            x = x + 1
        x = x.numpy() if x.dim() == 1 else x.half().numpy()
        writer.add_tensor(f"blk.{layer[1]}.{stem}.weight" if layer else f"{stem}.weight", x)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=[llama, gemma3], ids=lambda x: x.__name__)
def model(request):
    made = request.param()
    with torch.no_grad():
        for x in made.parameters():
            x.copy_((torch.randn(x.shape) / 8).half())
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    sf.backend_status()  # the kernels of this process come from where they always are
    monkeypatch.setenv("SPARSEFLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packaged(model, tmp_path, monkeypatch, cache):
    """`tiny`: a model in two packages, which cannot be imported."""
    write(model, tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    for n, part in ((1, data[:5000]), (2, data[5000:])):
        folder = tmp_path / f"tiny_part{n}"
        folder.mkdir()
        (folder / "__init__.py").write_text("import what_is_not_installed")
        (folder / "part.gguf").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path)
    parts = ("tiny_part1/part.gguf", "tiny_part2/part.gguf")
    digest = hashlib.sha256(data).hexdigest()
    tokens = tuple(n + 4 for n in pretrained.SENTENCE.encode())
    if model.config.model_type != "llama":
        tokens = (2, *(260 if n == 36 else n for n in tokens))
    packages = ("tiny==1.0", "tiny-more==1.0")
    weights = pretrained.Weights("a tiny model", "none", packages, parts, digest, tokens)
    monkeypatch.setitem(pretrained.MODELS, "tiny", weights)
    return model


def test_a_gguf_file_is_the_model_that_was_written(packaged):
    loaded, tokenizer = sf.transformers.load("tiny")
    assert type(loaded) is type(packaged) and not loaded.training
    text = "Call me Ishmael.\n  Naïve?"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, packaged(ids).logits, rtol=1e-5, atol=1e-5)
    mine, theirs = loaded.config.to_dict(), packaged.config.to_dict()
    for key in ("sliding_window", "layer_types", "rope_parameters", "head_dim", "tie_word_embeddings"):
        assert mine.get(key) == theirs.get(key), key


def test_a_file_is_read_once_and_what_is_kept_is_private_and_whole(packaged, cache, monkeypatch):
    where = pretrained.folder("tiny")
    assert [stat.S_IMODE(x.stat().st_mode) for x in (where.parent, where)] == [0o700, 0o700]
    assert {stat.S_IMODE(x.stat().st_mode) for x in where.iterdir()} == {0o600}
    assert [x.name for x in where.parent.iterdir()] == [where.name]
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "convert", None)
        assert pretrained.folder("tiny") == where
    weights = where / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert not pretrained.whole(where)
    assert pretrained.folder("tiny") == where and weights.read_bytes() == before
    (where / pretrained.SUMS).unlink()
    assert pretrained.folder("tiny") == where and pretrained.whole(where)
    assert [x.name for x in where.parent.iterdir()] == [where.name]


def test_a_file_in_one_package_is_read_where_it_lies(tmp_path, monkeypatch, cache):
    (tmp_path / "one_part").mkdir()
    (tmp_path / "one_part" / "__init__.py").write_text("")
    file = tmp_path / "one_part" / "part.gguf"
    file.write_bytes(b"all of it")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(b"all of it").hexdigest()
    weights = pretrained.Weights("one", "none", ("one==1",), ("one_part/part.gguf",), digest, ())
    with pretrained._gguf("one", weights) as found:
        assert found == file


def test_a_tokenizer_that_is_not_the_models_is_refused(packaged, cache, monkeypatch):
    other = dataclasses.replace(pretrained.MODELS["tiny"], tokens=(1, 2))
    monkeypatch.setitem(pretrained.MODELS, "tiny", other)
    with pytest.raises(sf.SparseFlashError, match=r"another tokenizer than tiny has .*expected \[1, 2\]"):
        pretrained.folder("tiny")
    assert list((cache / "models").iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(packaged, cache, monkeypatch):
    def stopped(gguf, out):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrained, "convert", stopped)
        pretrained.folder("tiny")
    assert list((cache / "models").iterdir()) == []


def test_what_is_missing_or_not_what_was_published_says_what_to_do(packaged, tmp_path, cache):
    part = tmp_path / "tiny_part2" / "part.gguf"
    data = part.read_bytes()
    part.write_bytes(data + b"!")
    with pytest.raises(
        sf.SparseFlashError, match="sha256 .*, expected .*--force-reinstall tiny==1.0 tiny-more"
    ):
        sf.transformers.load("tiny")
    part.unlink()
    with pytest.raises(
        sf.SparseFlashError, match="not installed .a tiny model; licence: none.*make models.*--no-"
    ):
        sf.transformers.load("tiny")
    part.write_bytes(data)
    cache.chmod(0o777)
    with pytest.raises(sf.SparseFlashError, match="where nobody else can write.*SPARSEFLASH_CACHE"):
        sf.transformers.load("tiny")


@pytest.mark.parametrize("model", [llama], ids=["llama"], indirect=True)
def test_a_file_that_is_another_model_is_refused(model, tmp_path):
    model.config.num_hidden_layers = 1
    write(model, tmp_path / "a.gguf")
    with pytest.raises(
        sf.SparseFlashError, match=r"model.layers.1.* is \[.*\], expected None .9 of 11 differ"
    ):
        pretrained.convert(tmp_path / "a.gguf", tmp_path)


def test_a_name_that_nobody_knows_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        sf.SparseFlashError, match="'smolm2': expected one of smollm2, gemma3, .*mean 'smollm2'"
    ):
        sf.transformers.load("smolm2")
    with pytest.raises(sf.SparseFlashError, match="the folder of a causal language model"):
        sf.transformers.load(tmp_path)


def test_what_make_models_installs_is_what_the_library_names():
    lines = (REPO / "models.txt").read_text().splitlines()
    pins = [line.split()[0] for line in lines if not line.startswith("#")]
    assert pins == [p for weights in pretrained.MODELS.values() for p in weights.packages]
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}$", x) for x in lines if not x.startswith("#"))
    for name, weights in pretrained.MODELS.items():
        assert re.search(
            rf"^#   {name} .*{re.escape(weights.licence.split(',')[0].split(' (')[0])}",
            "\n".join(lines),
            re.M,
        )


# ---------------------------------------------------------------- what takes a model by its name


def test_verify_takes_a_name_and_a_text(packaged):
    found = sf.transformers.verify("tiny", text="Call me Ishmael. " * 4)
    assert len(found) == packaged.config.num_hidden_layers
    assert sf.transformers.verify("tiny", input_ids=torch.arange(4, 40)[None])
    with pytest.raises(sf.SparseFlashError, match="give text= or input_ids="):
        sf.transformers.verify("tiny")
    with pytest.raises(sf.SparseFlashError, match="give input_ids="):
        sf.transformers.verify(packaged, text="a")


def test_a_capture_has_what_the_attention_gets(packaged, tmp_path):
    text = "Call me Ishmael. " * 10
    tensors, about = capture.of_model("tiny", text, 40, [1, 0])
    assert list(tensors["layer.1.k"].shape)[:3] == [1, 2, 40]
    path = tmp_path / "c.safetensors"
    capture.save(tensors, path, about)
    seen = {}
    inner = packaged.model.layers[1].self_attn
    hook = inner.o_proj.register_forward_pre_hook(lambda _, x: seen.update(out=x[0]))
    ids = sf.transformers.load("tiny")[1](text, return_tensors="pt").input_ids[:, :40]
    with torch.no_grad():
        packaged(ids)
    hook.remove()
    windowed = packaged.config.model_type != "llama"
    x = capture.load(path).layer(1)
    assert x.window == (8 if windowed else None) and x.scale == (1 / 16 if windowed else 8**-0.5)
    window = {"window": (x.window - 1, 0)} if windowed else {}
    plan = sf.Plan.dense(40, 40, causal=True, **window)
    out = sf.attention(x.q, x.k, x.v, plan, scale=x.scale)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), seen["out"], atol=2e-3, rtol=2e-3)
    assert capture.load(path).about["licence"] == "none" and capture.load(path).layers == (0, 1)


def test_what_cannot_be_captured_says_why(packaged, tmp_path):
    last = packaged.config.num_hidden_layers - 1
    with pytest.raises(sf.SparseFlashError, match=rf"layer 9: the model has attention layers 0 to {last}"):
        capture.of_model("tiny", "a" * 50, 40, [9])
    with pytest.raises(
        sf.SparseFlashError, match=r"the text has \d+ tokens of tiny; 400 are wanted: give a longer"
    ):
        capture.of_model("tiny", "a" * 50, 400)
    huge = {"layer.0.q": torch.full((1, 1, 2, 2), 1e6)}
    with pytest.raises(sf.SparseFlashError, match=r"layer.0.q has values beyond 65504"):
        capture.save(huge, tmp_path / "x", {})
    with pytest.raises(
        sf.SparseFlashError, match="'smol': expected a file .*benchmarks/captures .here: books, smollm2"
    ):
        capture.load("smol")


def test_a_model_of_another_scale_is_measured_at_its_own(tmp_path, generator):
    q, k, v = torch.randn(3, 1, 2, 30, 16, generator=generator).half().float()
    path = tmp_path / "c.safetensors"
    about = {"layers": '{"0": {"scale": 0.5, "window": null}}'}
    capture.save({f"layer.0.{n}": x for n, x in zip("qkv", (q, k, v))}, path, about)
    q2, k2, v2, _ = (x.detach() for x in capture.inputs(path, dtype=torch.float32)(30))
    torch.testing.assert_close(
        sf.attention(q2, k2, v2, causal=True), sf.attention(q, k, v, causal=True, scale=0.5)
    )


def test_the_commands_say_what_there_is_and_what_is_wrong(packaged, tmp_path, capsys):
    from sparseflash.bench.commands import files

    files.bench_models(["tiny"])
    said = capsys.readouterr().out
    assert "tiny: a tiny model" in said and "licence: none" in said and "ready: " in said
    with pytest.raises(sf.SparseFlashError, match="'huge': expected one of smollm2, gemma3, tiny"):
        files.bench_models(["huge"])
    book, out = tmp_path / "book.txt", tmp_path / "c.safetensors"
    book.write_text("Contents. Call me Ishmael. " * 9)
    given = {"model": "tiny", "data": str(book), "length": 40, "layers": "1"}
    files.bench_capture(out, **given, skip=10)
    found = capture.load(out)
    about = {"text": "book.txt", "text_from": "10", "tokens": "40", "model": "tiny: a tiny model"}
    assert found.layers == (1,) and about.items() <= found.about.items()
    assert found.about["text_sha256"] == hashlib.sha256(book.read_bytes()).hexdigest()
    for wrong in ({"model": ""}, {"run": tmp_path}):
        with pytest.raises(sf.SparseFlashError, match="name one model: smollm2, gemma3, a folder or a name"):
            files.bench_capture(out, **given | wrong)


# ---------------------------------------------------------------- the real ones


def real(name):
    try:
        return sf.transformers.load(name)
    except sf.SparseFlashError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(f"{name} is not installed: make models")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(pretrained.MODELS))
def test_a_real_model_knows_english(name, books):
    model, tokenizer = real(name)
    (book,) = [x for x in books if x.stem == "moby-dick"] or books[:1]
    text = book.read_text()[:50000]
    ids = tokenizer(
        text[max(text.find("Call me Ishmael"), 0) :], return_tensors="pt", truncation=True, max_length=4096
    )
    with torch.no_grad():
        assert float(model(ids.input_ids, labels=ids.input_ids).loss) < 4
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert re.search(r"The capital of France is (Paris|the capital)", said) and said.isascii(), said


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(pretrained.MODELS))
def test_a_real_model_computes_on_these_kernels_what_it_computes_by_itself(name):
    real(name)
    text = "It was the best of times, it was the worst of times. " * 60  # beyond Gemma's window of 512
    for row in sf.transformers.verify(name, text=text):
        assert row.error < 1e-4


@pytest.mark.slow
def test_the_capture_in_the_repository_is_what_the_model_gives(books):
    real("smollm2")
    saved = capture.load("smollm2")
    (book,) = [x for x in books if x.stem == "moby-dick"] or pytest.skip("no moby-dick.txt among the books")
    begin = int(saved.about["text_from"])
    tensors, about = capture.of_model(
        "smollm2", book.read_text()[begin:], int(saved.about["tokens"]), saved.layers
    )
    assert {key: about[key] for key in ("layers", "model", "licence")} == {
        key: saved.about[key] for key in ("layers", "model", "licence")
    }
    for n in saved.layers:
        layer = dataclasses.asdict(saved.layer(n))
        for name in capture.NAMES:
            torch.testing.assert_close(layer[name], tensors[f"layer.{n}.{name}"], atol=2e-2, rtol=2e-3)


@pytest.mark.slow
def test_windows_of_gemma_hide_needles_that_its_global_layers_see(books):
    model, tokenizer = real("gemma3")
    text = books[0].read_text()[:20000]
    tensors, about = capture.of_model("gemma3", text, 2048, [4, 5])
    assert '"4": {"scale": 0.0625, "window": 512}' in about["layers"]
    assert '"5": {"scale": 0.0625, "window": null}' in about["layers"]
    q, k = tensors["layer.4.q"], tensors["layer.4.k"]
    assert q.shape == (1, 4, 2048, 256) and k.shape == (1, 1, 2048, 256)
    found = needles.plant(q, k, "question", torch.Generator().manual_seed(0), scale=0.0625)
    assert found.kept(sf.Plan.dense(2048, 2048, causal=True)).min() > 0.99
    assert found.kept(sf.Plan.dense(2048, 2048, causal=True, window=(511, 0))).max() < 0.01


def test_the_folder_of_models_is_made_once_and_found_again(tmp_path, monkeypatch):
    from sparseflash.integrations.transformers import pretrained

    monkeypatch.setenv("SPARSEFLASH_CACHE", str(tmp_path / "far" / "away"))
    first = pretrained._cache()
    (first / "kept").write_text("")
    assert pretrained._cache() == first and first.parent == tmp_path / "far" / "away"
    assert (first / "kept").exists() and first.stat().st_mode & 0o077 == 0

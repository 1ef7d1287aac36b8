"""Caches of fewer bytes: attention is exact over what they store: what `pack` makes of old tokens."""

from __future__ import annotations

import copy

import pytest
import torch

import sparseflash as sf
from sparseflash import SparseFlashError
from sparseflash.cache import Compressed, Compression, Int8, Mustafar

HOWS = [Mustafar(0.7, window=5, granule=8), Int8(window=0, granule=3), Compression(window=5, granule=8)]
every_how = pytest.mark.parametrize("how", HOWS, ids=lambda how: type(how).__name__)


def drawn(generator, n, B=2):
    return tuple(torch.randn(B, H, n, 32, generator=generator) for H in (4, 2, 2))


def stored(how, x):
    """All keys or values as they are once so many were appended, token by token or at once."""
    T = x.shape[2]
    n = max(T - how.window, 0) // how.granule * how.granule
    return torch.cat([how.packed(x[:, :, :n]).unpack(), x[:, :, n:]], 2)


@every_how
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.7}], ids=["", "softcap"])
def test_attention_is_exact_over_what_is_stored(how, options, generator):
    cache, sinks = Compressed(how), torch.randn(4, generator=generator)
    q, k, v = drawn(generator, 30)
    torch.testing.assert_close(
        cache.attend(q, k, v, **options), sf.attention(q, k, v, causal=True, **options)
    )
    for n in (1, 1, 7, 1, 1, 20, 1):
        before = stored(how, k), stored(how, v)
        q, *new = drawn(generator, n)
        k, v = torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2)
        out = cache.attend(q, *new, sink_logits=sinks, **options)
        seen = (torch.cat(x, 2) for x in zip(before, new))
        want = sf.attention(q, *seen, causal=True, q_offset=k.shape[2] - n, sink_logits=sinks, **options)
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
        for got, x in ((cache.keys, k), (cache.values, v)):
            assert torch.equal(torch.cat([got[0].unpack(), got[1]], 2), stored(how, x))
    assert cache.tokens == k.shape[2] == 62 and cache.keys[1].shape[2] < how.window + how.granule


def test_it_takes_the_bytes_of_its_records(generator):
    cache, dense = Compressed(Mustafar(0.7)), sf.cache.Growing()
    for _ in range(4):
        k, v = torch.randn(2, 1, 2, 1000, 64, generator=generator)
        cache.append(k, v)
        dense.append(k, v)
    assert cache.bytes <= 0.45 * dense.bytes


@every_how
def test_it_is_cropped_copied_reordered_saved_and_emptied(how, generator, tmp_path):
    cache = Compressed(how)
    q, k, v = drawn(generator, 40)
    cache.append(k, v)
    other = copy.deepcopy(cache)
    new = [drawn(generator, 1) for _ in range(2)]
    cache.attend(*new[1])
    cache.crop(-1)
    sf.cache.save([cache], tmp_path / "chat.safetensors")
    (loaded,) = sf.cache.load(tmp_path / "chat.safetensors")
    want = other.attend(*new[0])
    for own in (cache, loaded):
        torch.testing.assert_close(own.attend(*new[0]), want)
    cache.select_rows(torch.tensor([1, 1, 0]))
    rows = [x[[1, 1, 0]] for x in new[1]]
    torch.testing.assert_close(cache.attend(*rows), other.attend(*new[1])[[1, 1, 0]])
    cache.crop(7)  # below what is stored: the first tokens stay as they were stored
    assert cache.tokens == 7
    first = [torch.cat([x[0].unpack(), x[1]], 2) for x in (cache.keys, cache.values)]
    got = cache.attend(*rows)
    seen = (torch.cat(x, 2) for x in zip(first, rows[1:]))
    torch.testing.assert_close(got, sf.attention(rows[0], *seen))
    cache.reset()
    assert cache.tokens == 0 and cache.bytes == 0 and not cache.is_initialized


@every_how
def test_a_padded_sequence_is_what_it_is_alone(how, generator):
    both, alone = Compressed(how), Compressed(how)
    q, k, v = drawn(generator, 30)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :16] = False
    among = sf.Plan.from_mask(real[:, None, None] & torch.ones(30, 30, dtype=torch.bool).tril())
    k[1, :, :16] = v[1, :, :16] = 1e4
    both.attend(q, k, v, among=among, real=real)
    alone.append(k[1:, :, 16:], v[1:, :, 16:])
    if how.sparsity or how.int8:  # what is stored by then depends on the number of tokens
        both.how = alone.how = Compression(how.sparsity, how.int8, 0, 1)
        both.append(k[:, :, :0], v[:, :, :0])
        alone.append(k[1:, :, :0], v[1:, :, :0])
    for n in (1, 4, 1):
        new = drawn(generator, n)
        out = both.attend(*new)
        torch.testing.assert_close(out[1:], alone.attend(*(x[1:] for x in new)))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: Mustafar(1.0), "sparsity=1.0"),
        (lambda: Int8(window=-1), "window=-1"),
        (lambda: Int8(granule=0), "granule=0"),
        (lambda: Compressed(0.7), "how=0.7"),
        (
            lambda: Compressed(Int8()).append(*torch.zeros(2, 1, 1, 9, 8, requires_grad=True)),
            "no gradients",
        ),
        (
            lambda: Compressed(Int8()).attend(
                *torch.zeros(3, 1, 1, 4, 8), real=torch.tensor([[True, True, False, True]])
            ),
            "padding on the left",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(SparseFlashError, match=said):
        wrong()


def test_of_another_model_or_batch_is_refused(generator):
    cache = Compressed(Int8(granule=4, window=0))
    cache.append(*torch.zeros(2, 2, 1, 9, 8))
    for wrong in (torch.zeros(2, 3, 1, 1, 8), torch.zeros(2, 2, 1, 1, 16), torch.zeros(2, 2, 1, 1, 8).half()):
        with pytest.raises(SparseFlashError, match="cache"):
            cache.append(*wrong)


def test_generate_runs_unchanged_and_lossless_is_stock(generator):
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 99, (2, 60), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    whole = Compression(window=3, granule=2)
    for own in ({}, {"num_beams": 3}):
        want = model.generate(ids, **how, **own)
        with sf.transformers.sparse(model, cache=whole):
            assert torch.equal(model.generate(ids, **how, **own), want)
    with sf.transformers.sparse(model, cache={0: Mustafar(0.7), 1: Int8()}):
        assert model.generate(ids, **how).shape == want.shape

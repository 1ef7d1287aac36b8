"""Key caches: growing, with summaries; by themselves and inside Transformers."""

from __future__ import annotations

import copy

import pytest
import torch

import sparseflash as sf
from sparseflash import SparseFlashError
from sparseflash.cache import Growing, Labels, PageBounds, PageMean


def filled(cache, generator, *lengths, B=2, H=2, D=32, dtype=torch.float32):
    """A cache with so many tokens appended, call by call; and all of them."""
    parts = []
    for n in lengths:
        k, v = (torch.randn(B, H, n, D, generator=generator).to(dtype) for _ in "kv")
        cache.append(k, v)
        parts.append((k, v))
    return [torch.cat(x, 2) for x in zip(*parts)]


@pytest.mark.parametrize("room", [0, 3, 256])
def test_what_was_appended_is_there_in_order(room, generator):
    cache = Growing(room)
    k, v = filled(cache, generator, 0, 5, 1, 1, 40, 1, 0, 1)
    assert torch.equal(cache.keys, k) and torch.equal(cache.values, v) and cache.tokens == 49
    assert cache.bytes >= 2 * k.nbytes


def test_tokens_move_only_where_the_room_is_full(generator):
    cache = Growing(16)
    filled(cache, generator, 100)
    places = set()
    for _ in range(100):
        filled(cache, generator, 1)
        places.add(cache.keys.data_ptr())
    assert len(places) <= 7


def test_a_view_that_was_handed_out_keeps_its_numbers(generator):
    cache = Growing()
    filled(cache, generator, 20)
    before, numbers = cache.keys, cache.keys.clone()
    filled(cache, generator, 5, 400)
    assert torch.equal(before, numbers)


def test_gradients_reach_keys_that_were_appended_in_parts(generator):
    cache = Growing()
    parts = [torch.randn(1, 2, n, 8, generator=generator).requires_grad_() for n in (6, 1)]
    for x in parts:
        cache.append(x, x)
    (cache.keys * torch.arange(7.0)[:, None]).sum().backward()
    assert [float(x.grad[0, 0, -1, 0]) for x in parts] == [5.0, 6.0]


def test_crop_rows_and_reset(generator):
    cache = Growing()
    k, _ = filled(cache, generator, 30)
    cache.crop(-4)
    assert cache.tokens == 26 and torch.equal(cache.keys, k[:, :, :26])
    cache.crop(20)
    new, _ = filled(cache, generator, 3)
    k = torch.cat([k[:, :, :20], new], 2)
    cache.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.keys, k[[1, 1, 0]])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.keys, k[[1, 1, 0, 0]])
    cache.reset()
    assert cache.tokens == 0 and cache.bytes == 0 and cache.keys is None


def test_the_plan_begins_with_the_first_key_that_is_no_padding(generator):
    cache = Growing()
    k, v = filled(cache, generator, 40)
    q = torch.randn(2, 4, 3, 32, generator=generator)
    torch.testing.assert_close(
        sf.decode(q, k, v, cache.plan(3)), sf.attention(q, k, v, causal=True, q_offset=37)
    )
    cache.first = torch.tensor([0, 33])
    nan = [x.clone() for x in (k, v)]
    for x in nan:
        x[1, :, :33] = torch.nan
    out = sf.decode(q, *nan, cache.plan(3))
    alone = sf.attention(q[1:], k[1:, :, 33:], v[1:, :, 33:], causal=True, q_offset=4)
    torch.testing.assert_close(out[1:], alone)


SUMMARIES = [PageBounds(16), PageMean(8), PageBounds(1), Labels(channels=((0, 5, 9), (31, 2, 0)))]


@pytest.mark.parametrize("first", [None, (0, 21)], ids=str)
@pytest.mark.parametrize("summary", SUMMARIES, ids=repr)
def test_a_summary_is_that_of_the_keys_whatever_has_happened_to_them(summary, first, generator):
    """Appended in parts, cropped and overwritten, rows taken twice: brute force over each page."""
    cache = Growing(4)

    def check():
        got = cache.summary(summary)
        for b, keys in enumerate(cache.keys):
            at = 0 if cache.first is None else int(cache.first[b])
            for n, own in enumerate(keys[:, at:].split(summary.page, 1)):
                want = summary.of(own[None, :, None], torch.ones(1, 1, own.shape[1], dtype=torch.bool))
                torch.testing.assert_close(got[b, :, n], want[0, :, 0])

    filled(cache, generator, 50)
    cache.first = None if first is None else torch.tensor(first)
    check()
    for n in (1, 1, 30, 5):
        filled(cache, generator, n)
        check()
    cache.crop(-9)
    filled(cache, generator, 2)
    check()
    cache.select_rows(torch.tensor([1, 0, 1]))
    filled(cache, generator, 3, B=3)
    check()
    other = copy.deepcopy(cache)
    filled(other, generator, 20, B=3)
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_holds_a_cache(tmp_path, dtype, generator):
    pytest.importorskip("safetensors")
    layers = [Growing(5), Growing()]
    for n, layer in enumerate(layers):
        filled(layer, generator, 20 + n, dtype=dtype)
    layers[1].first = torch.tensor([0, 3])
    sf.cache.save(layers, tmp_path / "chat.safetensors")
    back = sf.cache.load(tmp_path / "chat.safetensors")
    for one, other in zip(layers, back, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert one.room == other.room
    assert torch.equal(back[1].first, layers[1].first)
    filled(back[0], generator, 3, dtype=dtype)
    with pytest.raises(SparseFlashError, match="a str: files hold"):
        sf.cache.save(["x"], tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda c: c.append(torch.ones(1, 2, 3, 32), torch.ones(1, 2, 3, 32)), "batch, heads and width"),
        (lambda c: c.append(torch.ones(2, 2, 3, 32), torch.ones(2, 2, 4, 32)), "k: .* v: "),
        (lambda c: c.append(*[torch.ones(2, 2, 3, 32).half()] * 2), "a cache stays what it is"),
        (lambda c: c.crop(-99), "crop.-99."),
        (lambda c: c.summary(Labels(channels=((1,), (40,)))), "calibrated on another model"),
        (lambda c: PageBounds(0), "page=0"),
        (lambda c: Labels(channels=((1,), (1, 2))), "as many channel numbers"),
        (lambda c: Growing(-1), "room=-1"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said, generator):
    cache = Growing()
    filled(cache, generator, 4)
    with pytest.raises(SparseFlashError, match=said):
        wrong(cache)


@pytest.mark.parametrize(
    "make", [sf.cache.Growing, lambda: sf.cache.Evicting(sf.cache.StreamingLLM(budget=64)), sf.cache.Paged]
)
def test_a_host_may_say_how_many_queries_come_or_where(make):
    """A number, or their positions, as Transformers 5.0 does."""
    layer = make()
    assert layer.get_mask_sizes(torch.arange(5)) == layer.get_mask_sizes(5) == (5, 0)

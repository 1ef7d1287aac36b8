"""Keys in pages of one pool: attended as if each sequence had them for itself, and held once where shared."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from sparseflash import SparseFlashError
from sparseflash.cache import Growing, Paged, Pages
from test_cache_shared import HKV, D, H, drawn, step


def begun(generator, B, m, size):
    """A paged cache and one that holds everything for each row, after the same prompts."""
    ours, each = Paged(Pages(size, room=1)), Growing()
    q, k, v = drawn(generator, B, m)
    ours.attend(q, k, v)
    each.append(k, v)
    return ours, each


def stained(cache):
    """Put NaN wherever no row has a token."""
    size = cache.how.size
    free = torch.ones(cache.keys.shape[2], dtype=torch.bool)
    for pages, n in zip(cache.table, cache.lengths.tolist()):
        at = torch.arange(n)
        free[pages[at // size] * size + at % size] = False
    for pool in (cache.keys, cache.values):
        pool[:, :, free] = float("nan")


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.7, "sink_logits": torch.ones(H)}])
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize(("B", "m"), [(1, 1), (2, 63), (3, 129)])
def test_rows_attend_their_own_pages_through_samples_and_beams(B, m, size, options, generator):
    ours, each = begun(generator, B, m, size)
    moves = {1: [0] * 4, 2: [1, 1, 0, 3, 2, 2], 4: [5, 4, 4, 0], 5: [3, 3, 1], 6: [0]}
    for at, n in enumerate((1, 2, 1, 1, 40, 1, 3, 1)):
        step(generator, ours, each, n, options)
        stained(ours)
        if at in moves:
            for cache in (ours, each):
                cache.select_rows(torch.tensor([x % len(each.keys) for x in moves[at]]))
    assert ours.tokens == each.tokens == m + 50 and ours.lengths.tolist() == [m + 50]
    assert ours.pages == -(-(m + 50) // size)


def test_copies_share_full_pages_and_given_up_ones_are_used_again(generator):
    ours, each = begun(generator, 1, 100, 16)
    assert ours.pages == 7
    for cache in (ours, each):
        cache.select_rows(torch.zeros(8, dtype=torch.long))
    assert ours.pages == 7
    step(generator, ours, each, 1, {})
    assert ours.pages == 6 + 8
    pool = ours.keys.shape[2]
    for _ in range(60):  # beams that all follow one row: the others' pages are free again
        for cache in (ours, each):
            cache.select_rows(torch.tensor([3] * 8))
        step(generator, ours, each, 1, {})
    assert ours.pages == (161 - 1) // 16 + 8 and ours.keys.shape[2] <= pool + 16 * 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_takes_no_place_and_rows_have_lengths_of_their_own(dtype, generator):
    kind = {"backend": "reference"} if dtype == torch.float64 else {}
    lengths, asked = torch.tensor([5, 9, 1]), torch.tensor([2, 4, 1])
    prompt, question, later = (drawn(generator, 3, n, dtype) for n in (9, 4, 1))
    real = torch.arange(9) >= 9 - lengths[:, None]
    mine = torch.arange(4) >= 4 - asked[:, None]
    for x, there in ((prompt, real), (question, mine)):
        for part in x[1:]:
            part.masked_fill_(~there[:, None, :, None], float("nan"))
    cache = Paged(Pages(4))
    spans = torch.stack([9 - lengths, torch.full_like(lengths, 9)], -1).view(3, 1, 1, 1, 2)
    cache.attend(*prompt, real=real, among=sf.Plan.from_spans(spans, Tq=9, Tk=9, causal=True))
    assert cache.lengths.tolist() == [5, 9, 1] and cache.pages == 2 + 3 + 1
    out, last = cache.attend(*question, real=mine), cache.attend(*later)
    for b in range(3):
        keys, values = (
            torch.cat([a[b : b + 1, :, real[b]], c[b : b + 1, :, mine[b]], d[b : b + 1]], 2)
            for a, c, d in zip(prompt[1:], question[1:], later[1:])
        )
        q = torch.cat([question[0][b : b + 1, :, mine[b]], later[0][b : b + 1]], 2)
        want = sf.attention(q, keys, values, causal=True, q_offset=int(lengths[b]), **kind)
        got = torch.cat([out[b : b + 1, :, 4 - int(asked[b]) :], last[b : b + 1]], 2)
        torch.testing.assert_close(got, want)
    assert cache.lengths.tolist() == [8, 14, 3] and cache.tokens == 14
    cache.crop(13)
    assert cache.lengths.tolist() == [7, 13, 2]
    with pytest.raises(SparseFlashError, match="padding among their first 13 positions"):
        cache.crop(12)
    cache.crop(-13)
    assert cache.tokens == cache.pages == 0 and cache.lengths.tolist() == [0, 0, 0]


def test_a_choice_of_pages_is_what_the_rows_see(generator):
    ours, each = begun(generator, 2, 40, 8)
    choice = torch.tensor([[[0, 4]], [[2, 4]]])
    q = drawn(generator, 2, 1)[0]
    got = sf.decode(q, ours.keys, ours.values, ours.plan(choice=choice))
    at = (choice[..., None] * 8 + torch.arange(8)).flatten(1)
    for b in range(2):
        want = sf.attention(q[b : b + 1], each.keys[b : b + 1, :, at[b]], each.values[b : b + 1, :, at[b]])
        torch.testing.assert_close(got[b : b + 1], want, atol=2e-6, rtol=1e-5)


def test_it_is_cropped_saved_and_emptied(generator, tmp_path):
    ours, each = begun(generator, 2, 33, 8)
    for cache in (ours, each):
        cache.select_rows(torch.tensor([1, 1, 0]))
    for n in (-3, 24, 16, 5):
        for cache in (ours, each):
            cache.crop(n)
        sf.cache.save([ours], tmp_path / "c.safetensors")
        (again,) = sf.cache.load(tmp_path / "c.safetensors")
        assert (again.tokens, again.pages) == (ours.tokens, ours.pages) and again.bytes <= ours.bytes
        step(generator, ours, each, 2, {})
        q = drawn(generator, 3, 1)[0]
        part = Growing()
        part.append(each.keys[:, :, :-2], each.values[:, :, :-2])
        want = sf.decode(q, part.keys, part.values, part.plan())
        torch.testing.assert_close(
            sf.decode(q, again.keys, again.values, again.plan()), want, atol=2e-6, rtol=1e-5
        )
    ours.reset()
    assert ours.tokens == 0 and not ours.is_initialized and ours.pages == 0


def test_what_it_refuses(generator):
    for bad, said in (({"size": 0}, "size=0: expected an int >= 1"), ({"room": 1.5}, "room=1.5: expected")):
        with pytest.raises(SparseFlashError, match=said):
            Pages(**bad)
    with pytest.raises(SparseFlashError, match="expected cache.Pages"):
        Paged(16)
    ours, _ = begun(generator, 2, 5, 4)
    with pytest.raises(SparseFlashError, match="batch, heads and width of a cache stay"):
        ours.append(*torch.randn(2, 3, HKV, 1, D))
    with pytest.raises(SparseFlashError, match="no gradients"):
        ours.append(*(torch.randn(2, HKV, 1, D, requires_grad=True) for _ in range(2)))
    with pytest.raises(SparseFlashError, match="of the 5 there are"):
        ours.crop(-6)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=lambda how: next(iter(how), "greedy"),
)
def test_a_model_writes_the_same_words(how):
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    models = pytest.importorskip("transformer_models", reason="Transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**models.TEXT | {"initializer_range": 0.3})
    model = transformers.LlamaForCausalLM(config).eval()
    ids = (torch.arange(46) * 37 % 94 + 3).view(2, -1)
    keep = torch.ones_like(ids)
    keep[0, :7] = 0
    rows = slice(1, 2) if "prompt_lookup_num_tokens" in how else slice(None)
    given = {"attention_mask": keep[rows], "max_new_tokens": 20, "pad_token_id": 0} | how
    found = []
    for cache in (None, Pages(4)):
        torch.manual_seed(1)
        with sf.transformers.sparse(model, cache=cache):
            found.append(model.generate(ids[rows], return_dict_in_generate=True, **given))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert type(found[1].past_key_values.layers[0]) is Paged

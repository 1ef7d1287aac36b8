"""Prefill methods on queries and keys of a pretrained model: more mass than a window or random blocks."""

from __future__ import annotations

import functools
import time

import pytest
import torch

import sparseflash as sf
from benchmarks.experiments.prefill import random_plan, window_of
from sparseflash.bench import capture
from sparseflash.bench.quality import Dense, density

T = 2048


@pytest.fixture
def one_thread():
    """For times of the process: threads that wait for one another take time too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def real(number: int, tokens: int):
    """q, k, v of SmolLM2 over a book, and what dense attention makes of them."""
    layer = capture.load("smollm2").layer(number, tokens=tokens)
    q = layer.q * (layer.scale * layer.q.shape[-1] ** 0.5)  # so that the default scale is the model's
    return q, layer.k, layer.v, Dense.of(q, layer.k, layer.v)


def measured(method, number: int, tokens: int) -> tuple[float, float]:
    """Density, and recall."""
    q, k, v, dense = real(number, tokens)
    plan = method.select(q, k).plan
    return density(plan), dense.recall(q, k, v, plan)


def test_minference_keeps_most_of_the_mass_of_a_pretrained_model():
    """200 columns and 300 slashes, judged for a KV head: .96 of the mass at .36 of the pairs, in the mean."""
    for given, least in (
        ({"share": "sum", "near": 30}, 0.96),
        ({"share": "max"}, 0.96),
        ({"share": "sum"}, 0.955),
    ):
        method = sf.methods.MInference(vertical=200, slash=300, **given)
        found = torch.tensor([measured(method, number, 4096) for number in (4, 15, 21)]).mean(0)
        assert found[0] <= 0.36 and found[1] >= least, (given, found)


METHODS = {
    "tri-shape": {"window": 256},
    "minference": {"vertical": 100, "slash": 150},
    "xattention": {"block": 64},
    "flashprefill": {"block": 64, "near": 2, "dense_tiles": 0},
    "block-topk": {"blocks": 6},
}


@pytest.mark.parametrize("slug", METHODS)
def test_a_method_finds_more_than_chance_and_than_a_window(slug):
    method = sf.methods.get(slug, **METHODS[slug])
    kept, recall = measured(method, 15, T)
    q, k, v, dense = real(15, T)
    assert 0.1 < kept < 0.6
    assert recall > dense.recall(q, k, v, random_plan((1, q.shape[1]), T, kept)) + 0.1
    assert recall > dense.recall(q, k, v, window_of(T, kept).select(q, k).plan) + 0.05


@pytest.mark.slow
def test_minference_over_8192_tokens_of_a_pretrained_model(books, one_thread):
    """500 columns and 700 slashes: .96 of the mass at .31 of the pairs, in little time.

    96 rows judge: they leave out slashes that 64 take for good ones, and lose little of the mass. How many
    pairs that is depends on the text.
    """
    text = next(book for book in books if "moby" in book.name).read_text(encoding="utf-8")
    try:
        tensors, _ = capture.of_model("smollm2", text[text.index("Call me Ishmael") :], 8192, [4, 15, 21])
    except sf.SparseFlashError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip("smollm2 is not installed: make models")
    method = sf.methods.MInference(vertical=500, slash=700, last=96, share="sum")
    kept, recall, share = [], [], []
    for number in (4, 15, 21):
        q, k, v = (tensors[f"layer.{number}.{x}"].float() for x in "qkv")
        dense = Dense.of(q, k, v)  # the scale of SmolLM2 is the default one
        times = [time.process_time()]
        selection = method.select(q, k)
        times.append(time.process_time())
        method(q, k, v, selection=selection)
        times.append(time.process_time())
        kept.append(density(selection.plan))
        recall.append(dense.recall(q, k, v, selection.plan))
        share.append((times[1] - times[0]) / (times[2] - times[0]))
    assert sum(recall) / 3 >= 0.96 and sum(kept) / 3 <= 0.31 and min(share) <= 0.15

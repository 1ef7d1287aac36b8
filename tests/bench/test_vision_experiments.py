"""The vision transformer of the experiment `vision --parts links`: what it computes and counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparseflash as sf
from benchmarks.experiments import diffusion, links, vision
from nn_cases import one_thread

_one_thread = pytest.fixture(autouse=True)(one_thread)


def vit(keep=0.25, layers=3):
    torch.manual_seed(0)
    return links.ViT(256, 4, classes=3, width=16, heads=2, layers=layers, keep=keep).eval()


def images(count=3):
    return torch.rand(count, 256, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_all_links_and_all_tokens_are_the_dense_model():
    model, x = vit(keep=1.0), images()
    want = model.set("dense")(x)
    for choice in links.CHOICES:
        for drops in ({}, {1: 1.0}):
            torch.testing.assert_close(model.set(choice, drops=drops)(x), want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_layers_above_have_fewer_tokens_and_know_their_places():
    model, x, seen = vit(), images(), []
    model.set("learned", drops={1: 0.5, 2: 0.25})
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append((args[0], layer.places)))
        for layer in model.links()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    assert [y.shape[1] for y, _ in seen] == [17, 9, 5] and seen[0][1] is None
    assert bool((seen[1][1].diff(dim=1) > 0).all() and (seen[2][1][:, 0] == 0).all())
    for b in range(len(x)):
        assert set(seen[2][1][b].tolist()) <= set(seen[1][1][b].tolist())
    layer, (y, places) = model.links()[1], seen[1]
    q, k = layer.split(layer.query(y)), layer.split(layer.key(y))
    layer.places = None
    for b, place in enumerate(places):
        alone = copy.deepcopy(layer)
        alone.places = None
        alone.mixer.data[: len(place)], alone.basis.data[: len(place)] = (
            layer.mixer[place],
            layer.basis[place],
        )
        layer.places = places
        found = layer.predicted(q, k)[b]
        torch.testing.assert_close(found, alone.predicted(q[b : b + 1], k[b : b + 1])[0])


@pytest.mark.parametrize("choice", ["dense", "learned"])
@pytest.mark.parametrize("drops", [{}, {1: 0.5}])
@torch.no_grad()
def test_what_is_counted_is_what_is_computed(choice, drops):
    """Beside torch's own counter, which sees every product but those of our attention."""
    model = vit().set(choice, drops=drops)
    model.train()  # in eval mode dense attention is computed too, for the recall
    with FlopCounterMode(display=False) as counter:
        model(images(1))
    n, attended = 17, 0
    for i, layer in enumerate(model.links()):
        n = 1 + round(drops[i] * 16) if i in drops else n
        attended += 4 * 16 * (n * n if choice == "dense" else n + (n - 1) * layer.budget(n))
    assert model.flops() == pytest.approx(counter.get_total_flops() + attended)


def test_only_the_predictor_learns_in_the_first_phase():
    x, labels = (torch.rand(300, 784) * 255).byte(), torch.arange(300) % 10
    given = {"steps": 2, "width": 8, "layers": 2, "held": 50}
    rows = list(links.measure_links(x, labels, seeds=(0, 1), **given))
    assert [row["seed"] for row in rows] == [0] * 6 + [1] * 6
    rows = rows[:6] + list(links.measure_tokens(x, labels, drops={1: 0.3}, **given))
    cases = [(row["what"], row["case"]) for row in rows]
    assert len(set(cases)) == len(cases) == 13
    by = dict(zip(cases, rows))
    dense, oracle, random = (by["links", case] for case in ("dense", "oracle", "random"))
    assert oracle["recall"] > random["recall"] and "recall" not in dense
    assert by["tokens", "dense"]["fewer"] == 0 < by["tokens", "tokens"]["fewer"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    model = vit()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for layer in model.links():
        layer.weight = 1.0
    links.fit(
        model.set("dense"), images(80), torch.zeros(80, dtype=torch.long), steps=2, rate=1e-2,
        weights=model.predictor(), loss=lambda *_: sum(layer.aux_loss for layer in model.links()),
    )  # fmt: skip
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all(name.split(".")[2] in ("low_query", "low_key", "mixer", "basis") for name in moved)


def test_without_images_the_command_says_what_to_give():
    with pytest.raises(sf.SparseFlashError, match="--images and --labels"):
        list(vision.measure(parts=("links",)))


def test_an_order_empties_blocks_of_the_head_that_looks_at_its_place():
    rows = {row["head"]: row for row in diffusion.measure_orders((8, 8, 8))}
    assert [*rows] == [*diffusion.HEADS]
    assert rows["place"]["empty_found"] > rows["place"]["empty_raster"] + 0.05
    for row in rows.values():
        assert 0 < row["int8_found"] < 0.1 < row["int4_found"] < 1.5 and 0 <= row["empty_raster"] < 1


def test_empty_blocks_are_those_without_mass():
    q = torch.zeros(1, 1, 256, 8)
    k = torch.zeros(1, 1, 256, 8)
    q[..., 0], k[:, :, :64, 0] = 90, 9.0  # all look at the first 64 keys
    order = torch.arange(256)[None]
    assert diffusion.empty(q, k, order).tolist() == [0.75]
    spread = torch.arange(256).view(4, 64).T.reshape(1, 256)  # a quarter of them in each block
    assert diffusion.empty(q, k, spread).tolist() == [0.0]

"""Orders of grids, and clusters, against loops over tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

import sparseflash as sf
from sparseflash.common.errors import SparseFlashError
from sparseflash.selection import Grid, grid_order, kmeans
from test_selection import keep_of


def test_a_grid_is_gone_over_axis_by_axis():
    sizes = (3, 4, 5)
    for axes in itertools.permutations(range(3)):
        order = grid_order(sizes, axes=axes, text=(2, 3))[0, 0].tolist()
        want = []
        for at in itertools.product(*(range(sizes[axis]) for axis in axes)):
            place = dict(zip(axes, at, strict=True))
            want.append(2 + (place[0] * 4 + place[1]) * 5 + place[2])
        assert order == [0, 1, *want, 62, 63, 64]


def test_blocks_of_a_grid_are_whole_units():
    sizes, tile = (3, 5, 6), (2, 3, 4)
    order = grid_order(sizes, tile=tile, text=(1, 2))[0, 0]
    blocks = order.view(-1, 24)
    assert blocks[0].tolist() == [0] + [-1] * 23 and blocks[-1].tolist() == [91, 92] + [-1] * 22
    assert sorted(order[order >= 0].tolist()) == list(range(93))
    for block, at in zip(blocks[1:-1], itertools.product(range(2), range(2), range(2)), strict=True):
        for lane, inner in zip(block.tolist(), itertools.product(*map(range, tile)), strict=True):
            place = [a * t + i for a, t, i in zip(at, tile, inner, strict=True)]
            inside = all(x < n for x, n in zip(place, sizes, strict=True))
            assert lane == (1 + (place[0] * 5 + place[1]) * 6 + place[2] if inside else -1)


def test_attention_of_blocks_of_a_video_is_that_of_their_tokens(generator):
    order = grid_order((4, 6, 6), tile=(2, 3, 3), text=10)
    grid = Grid(154, 154, 18, 18, causal=False)
    keep = torch.eye(9, dtype=torch.bool)[None, None]
    keep[..., -1] = keep[..., -1, :] = True  # the text sees all, and is seen by all
    plan = grid.plan(keep, q_order=order, k_order=order)
    plan.check()
    at = torch.stack(torch.meshgrid(*map(torch.arange, (4, 6, 6)), indexing="ij"), -1).view(-1, 3)
    own = torch.cat([(at // torch.tensor([2, 3, 3])) @ torch.tensor([4, 2, 1]), torch.full((10,), 8)])
    want = (own[:, None] == own) | (own == 8) | (own[:, None] == 8)
    assert torch.equal(plan.to_dense()[0, 0], want)
    q, k, v = torch.randn(3, 1, 2, 154, 16, generator=generator)
    dense = ((q @ k.mT) / 4).masked_fill(~want, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(sf.attention(q, k, v, plan), dense)


def lloyd(x, centroid, iterations, keep):
    """One head, one token at a time."""
    for i in range(iterations + 1):
        label = [int(((x[t] - centroid) ** 2).sum(-1).argmin()) if keep[t] else -1 for t in range(len(x))]
        if i == iterations:
            return label, centroid
        centroid = torch.stack(
            [
                x[[t for t in range(len(x)) if label[t] == c]].mean(0) if c in label else centroid[c]
                for c in range(len(centroid))
            ]
        )


@pytest.mark.parametrize("padded", [False, True])
def test_clusters_are_those_of_every_head_by_itself(generator, padded, monkeypatch):
    monkeypatch.setattr("sparseflash.selection.clusters.HELD", 100)  # a few tokens at a time
    x = torch.randn(2, 3, 40, 4, generator=generator, dtype=torch.float64)
    keep = keep_of(generator, 2, 40) if padded else torch.ones(2, 40, dtype=torch.bool)
    x = x.masked_fill(~keep[:, None, :, None], torch.nan)
    init = torch.cat(
        [torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64), torch.full((1, 3, 1, 4), 99.0)], 2
    )
    for start in (None, init):
        first = kmeans(x, 5, iterations=0, init=start, keep=keep if padded else None)[1]
        label, centroid = kmeans(x, 5, iterations=3, init=start, keep=keep if padded else None)
        for b, h in itertools.product(range(2), range(3)):
            want, ends = lloyd(x[b, h], first[b, h], 3, keep[b])
            assert label[b, h].tolist() == want
            torch.testing.assert_close(centroid[b, h], ends)
        if start is not None:
            assert (centroid[:, :, 4] == 99).all()  # nobody is near, and it stays
    assert kmeans(torch.zeros(1, 2, 0, 4), 3)[0].shape == (1, 2, 0)
    assert kmeans(torch.zeros(1, 1, 2, 4), 3)[0].tolist() == [[[0, 0]]]


def test_clusters_far_apart_are_found(generator):
    means = 10 * torch.randn(1, 2, 6, 16, generator=generator)
    which = torch.arange(300) // 50
    x = means[:, :, which] + 0.1 * torch.randn(1, 2, 300, 16, generator=generator)
    label, centroid = kmeans(x.bfloat16(), 6)
    assert centroid.dtype == torch.float32
    for h in range(2):
        pairs = {(int(a), int(b)) for a, b in zip(label[0, h], which, strict=True)}
        assert len(pairs) == 6


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: grid_order((2, 3), axes=(0, 0)), "axes"),
        (lambda: grid_order((2, 3), tile=(2,)), "tile"),
        (lambda: grid_order((2, -1)), "grid"),
        (lambda: grid_order((2, 3), text=-1), "text"),
        (lambda: kmeans(torch.zeros(1, 1, 4, 4), 0), "clusters=0"),
        (lambda: kmeans(torch.zeros(4, 4), 2), "x:"),
        (lambda: kmeans(torch.zeros(1, 1, 4, 4), 2, init=torch.zeros(1, 1, 3, 4)), "init"),
        (lambda: kmeans(torch.zeros(1, 1, 4, 4), 2, iterations=-1), "iterations"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(SparseFlashError, match=said):
        wrong()

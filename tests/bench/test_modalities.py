"""Needles of text and videos: who finds what, at equal pairs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.experiments import modalities


@pytest.fixture(scope="module")
def rows():
    found = list(modalities.measure(frames=8, side=6, heads=2, budgets=(8,)))
    return {(row["case"], row["pattern"], row["kind"]): row for row in found}


def test_the_layout_is_what_hosts_tell_of_several_videos_with_text_between():
    modality, grid = modalities.layout(3, 4, 5)
    runs = torch.unique_consecutive(modality, return_counts=True)
    assert grid == (3, 4, 5) and runs[0].tolist() == [0, 1, 0, 1, 0]
    assert runs[1].tolist() == [96, 60, 96, 60, 96 + 64]


@pytest.mark.parametrize("kind", modalities.KINDS)
def test_needles_hold_their_askers_mass_and_lie_where_their_kind_says(kind):
    generator = torch.Generator().manual_seed(1)
    modality, grid = modalities.layout(6, 5, 5)
    q, k = modalities.tensors(modality, grid, 2, generator)
    found = modalities.planted(q, k, modality, kind, generator)
    assert bool((found.dense()[1] > 0.999).all()) and bool((found.asking > found.asked.amax()).all())
    asks, asked = (int(name.strip() == "visual") for name in kind.split(","))
    assert bool((modality[found.asking] == asks).all()) and bool((modality[found.asked] == asked).all())


def test_patterns_of_modalities_find_what_each_asks_for_where_lines_of_the_question_do_not(rows):
    assert len(rows) == 2 * 3 * len(modalities.KINDS)
    for pattern in ("q-boundary", "2d-boundary"):
        both = {
            case: [rows[case, pattern, kind] for kind in modalities.KINDS]
            for case in ("mminference", "minference")
        }
        for own, lines in zip(*both.values(), strict=True):
            assert own["kept"] <= lines["kept"] < own["kept"] * 1.05 < 0.2
            # in one dimension, all queries of text have what the question looks at
            if pattern == "2d-boundary" or own["kind"] != "text, visual":
                assert own["needles"] > 0.99
        assert sum(row["needles"] for row in both["minference"]) < 3.7
    assert rows["mminference", "grid", "visual, visual"]["needles"] < 0.5

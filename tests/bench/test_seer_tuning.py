"""Fine-tuning through a gate's blocks: what is left out, and that a stopped run goes on."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks.experiments import seer_tuning


def test_budgets_leave_out_about_what_they_say():
    for length in (1024, 4096):
        counts = [seer_tuning.blocks_for(length, share) for share in (0.25, 0.5, 0.75, 0.9)]
        assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
        tiles = length // 64
        for share, count in zip((0.25, 0.5, 0.75, 0.9), counts, strict=True):
            seen = sum(min(row + 1, count + 2) for row in range(tiles)) / (tiles * (tiles + 1) / 2)
            assert 0 <= seen - (1 - share) < 0.1 or count == 1


def test_copies_learn_at_the_longer_length_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    for name, value in {"WIDTH": 32, "HEADS": 2, "KV_HEADS": 1, "LAYERS": 1, "HELD": 2}.items():
        monkeypatch.setattr(seer_tuning, name, value)
    text = tmp_path / "text.txt"
    text.write_text("So it goes on, and on, and then it ends. " * 200)
    given = {"lengths": (64, 384), "steps": (3, 2), "shares": (0.5,)}
    rows = {row["case"]: row for row in seer_tuning.measure(text, tmp_path, **given)}
    assert list(rows) == ["as it was", "dense", "seer-attention, 50% left out", "window, 50% left out"]
    assert rows["dense"]["kept"] == 1 > rows["seer-attention, 50% left out"]["kept"] > 0.4
    assert all(
        row["loss_dense"] < rows["as it was"]["loss"] for name, row in rows.items() if name != "as it was"
    )
    left = list(
        seer_tuning.measure(text, tmp_path, **given, known=[{"case": case} for case in list(rows)[:-1]])
    )
    assert [row["case"] for row in left] == ["window, 50% left out"]
    assert left[0]["loss"] == pytest.approx(rows["window, 50% left out"]["loss"], rel=1e-4)

"""The learned-indexer example: indexers put into a model of `sparseflash train`, trained, measured."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from sparseflash.train import Corpus, TrainConfig, Trainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "learned_indexer.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("learned_indexer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_numbers_count(example):
    assert example.count("12") == 12
    for text in ("0", "-1", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}': expected a whole number >= 1"):
            example.count(text)


def test_indexers_learn_what_a_trained_model_attends_to(example, tmp_path):
    text = b"".join(b"%d squared is %d, and %d more is a lot. " % (i, i * i, i % 7) for i in range(900))
    corpus = Corpus([text])
    shape = {"length": 96, "layers": 1, "width": 32, "heads": 2}
    trainer = Trainer(TrainConfig("", **shape, steps=10, eval_every=10, eval_sequences=3), corpus)
    trainer.run(tmp_path / "run")
    rows = example.main(tmp_path / "run", corpus, length=96, topk=8, batch=2, steps=15, windows=3)

    recall = {(row["stage"], row["keys"]): row["recall"] for row in rows}
    bpb = {(row["stage"], row["keys"]): float(row["bpb"]) for row in rows}
    assert bpb["untrained", "dense"] == pytest.approx(trainer.validate(), abs=2e-4)  # the model as it was
    assert bpb["warm-up", "dense"] == bpb["untrained", "dense"]  # the warm-up moves the indexers alone
    assert bpb["sparse", "dense"] < bpb["warm-up", "dense"]
    assert recall["warm-up", "indexer"] > 1.5 * recall["untrained", "indexer"]
    assert recall["sparse", "indexer"] > 1.5 * recall["sparse", "random"]

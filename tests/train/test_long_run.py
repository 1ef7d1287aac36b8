"""The long run: what was finished is never trained again, and the controls look at nothing."""

import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("typer")

from benchmarks.experiments import long_run
from benchmarks.experiments.commands.training import bench_long_run, train_and_time
from sparseflash.bench import results
from sparseflash.common.errors import SparseFlashError
from sparseflash.train import Corpus, checkpoint
from sparseflash.train.errors import TrainError
from sparseflash.train.sampling import load_model

TINY = {"tokens": 128, "layers": 1, "width": 16, "heads": 2, "length": 64}
TEXT = bytes(range(32, 122)) * 40


def runs(*cases, steps=2, **change):
    return long_run.plan_runs(cases, rates=[1e-2], seeds=[0], steps=steps, **TINY | change)


def test_what_is_in_the_file_is_not_trained_again_and_what_stopped_goes_on(tmp_path):
    def long(*cases, rounds=0, models=None):
        options = {"rounds": rounds, "minutes": 1.0, "models": models}
        train_and_time(tmp_path / "a.csv", Corpus([TEXT]), runs(*cases), tmp_path / "runs", **options)
        return results.read(tmp_path / "a.csv")

    first = long("dense")
    assert [(row["case"], row["step"]) for row in first] == [("dense", "1"), ("dense", "2")]
    (tmp_path / "runs").rename(tmp_path / "moved")
    both = long("dense", "hash", rounds=1, models=tmp_path / "models")
    assert [x.name[:4] for x in (tmp_path / "runs").iterdir()] == ["hash"]
    for row, again in zip(first, both):
        assert {name: again[name] for name in row} == row  # kept, with a time axis
        assert float(again["minutes"]) > 0 and float(again["minutes_sdpa"]) > 0
    assert [row["case"] for row in both] == ["dense"] * 2 + ["hash"] * 2

    model, _ = load_model(tmp_path / "models" / "hash-0")  # weights alone, in half the bytes
    with pytest.raises(TrainError, match="weights alone"):
        tensors, _ = checkpoint.load(tmp_path / "models" / "hash-0")
        checkpoint.restore(tensors, model, torch.optim.AdamW(model.parameters()))

    with pytest.raises(SparseFlashError, match="choose from: dense; hash"):
        bench_long_run(cases="dense; hsah")


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    corpus = Corpus([TEXT])
    (whole,) = runs("hash", steps=4)
    expected = [row.loss for row in long_run.train(whole, corpus, tmp_path / "whole")]

    class Stop(Exception):
        """A kill after the checkpoint of step 0."""

    def stop(row):
        raise Stop

    with pytest.raises(Stop):
        long_run.train(whole, corpus, tmp_path / "parts", stop)
    assert [row.loss for row in long_run.train(whole, corpus, tmp_path / "parts")] == expected


def test_the_controls_choose_without_looking():
    corpus = Corpus([TEXT])
    tokens = torch.randint(32, 122, (1, 64))
    other = tokens.clone()
    other[:, :63] = torch.randint(32, 122, (1, 63))

    def heads_of(case, tokens):
        (run,) = runs(case, layers=2)
        model = run.trainer(corpus).model
        torch.manual_seed(0)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        chosen = []
        for block in model.blocks:
            attend = block.attention.attention
            block.attention.attention = lambda q, k, v, a=attend: (
                chosen.append(a.select(q, k).plan.to_dense()) or a(q, k, v)
            )
        logits = model(tokens)[0, -1]
        return torch.stack([x.expand(1, 2, -1, -1) for x in chosen]), logits

    random, _ = heads_of("random buckets", tokens)
    assert torch.equal(random, heads_of("random buckets", other)[0])
    assert not torch.equal(random[0], random[1])  # layers draw their own
    assert not torch.equal(heads_of("hash", tokens)[0], heads_of("hash", other)[0])
    blind = heads_of("no attention", tokens)[1], heads_of("no attention", other)[1]
    assert torch.equal(*blind)
    assert not torch.equal(heads_of("dense", tokens)[1], heads_of("dense", other)[1])


def test_the_command_without_options_is_the_run_of_the_docs():
    default = {name: x.default for name, x in inspect.signature(bench_long_run).parameters.items()}
    rows = results.read(Path(__file__).parents[2] / default["out"])
    measured = {(float(row["lr"]), int(row["steps"]), int(row["T"])) for row in rows}
    assert measured == {(float(default["rates"]), default["steps"], default["length"])}

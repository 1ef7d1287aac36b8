"""The experiments on layers, at sizes that say nothing: rows have what the pages read, controls are fair."""

import pytest
import torch

pytest.importorskip("safetensors")

from benchmarks.experiments import mqar
from benchmarks.experiments.claim.rows import unfinished
from benchmarks.experiments.layers import (
    accelerator,
    extrapolation,
    language,
    lists,
    long,
    longer,
    pooling,
    recall,
    routing,
    times,
    weights,
)
from sparseflash.bench.results import cell
from sparseflash.common.errors import SparseFlashError
from sparseflash.train import Corpus

TEXT = Corpus([b"".join(b"line %d of a text, with %d changes.\n" % (i, i * i % 97) for i in range(2000))])


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it brings, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case, pairs",
    [("dense", 32.5), ("window of 16", 14.125), ("random 16", 14.125), ("dynamic mask of 16", 14.125),
     ("combiner, segments of 8", 8.0), ("hybrid, none dense", 3.90625), ("lookups", None)],
)  # fmt: skip
def test_pairs_are_counted_as_the_layers_spend_them(case, pairs):
    """By the formulas: sums of min(i + 1, w) over 64 queries; of i % c + 1 + i // c; and so on."""
    model = mqar.Model(mqar.Task(), recall.CASES[case].make(0), width=recall.WIDTH, heads=recall.HEADS)
    found = recall.look(model, mqar.Task())
    assert found["pairs"] == pairs or pairs is None
    if case == "lookups":
        assert 0 < found["pairs"] < 2 * found["active"] * 32.5


def test_random_keys_are_earlier_ones_and_the_own():
    q = torch.randn(2, 4, 40, 8)
    keep = recall.RandomKeys(6).select(q, q).plan.to_dense()
    assert (keep.sum(-1) == torch.arange(1, 41).clamp(max=6)).all()
    assert keep.diagonal(dim1=-2, dim2=-1).all() and not keep.triu(1).any()


def test_a_layer_learns_to_recall_and_the_verdict_reads_the_best_rate():
    task = mqar.Task(vocabulary=32, length=16, pairs=2)
    make = recall.CASES["lookups"].make
    _, found, _ = mqar.train(lambda _: make(0), task=task, rate=1e-2, steps=100, batch=64, width=64)
    assert found > 0.3
    rows = [{"case": "dense", "seed": 0, "accuracy": x} for x in (0.2, 1.0)]
    assert recall.verdict(rows) == []
    assert len(recall.verdict([{**rows[0], "case": "window of 16", "accuracy": 0.9}, rows[0]])) == 2


def test_jobs_are_told_from_one_another():
    jobs = recall.jobs(cases=["dense", "lookups"], rates=(1e-2, 3e-3), seeds=(0, 1))
    rows = [{name: cell(x) for name, x in job.key.items()} for job in jobs[:3]]
    assert unfinished(jobs, rows) == jobs[3:]


def test_weights_learn_and_their_multiplications_are_counted():
    x = torch.randint(0, 256, (200, 64), dtype=torch.uint8)
    y = (x[:, :32].float().mean(1) > x[:, 32:].float().mean(1)).to(torch.uint8)
    weights_ = weights.jobs(x, y, cases=list(weights.CASES), seeds=[0], epochs=40)
    rows = {job.key["case"]: job.run() for job in weights_}
    shares = {case: row["share_sparse"] for case, row in rows.items()}
    assert shares == {
        "dense": 1.0, "bdwp 2:8": 0.5, "bdwp 2:4": pytest.approx(2 / 3), "sr-ste 2:8": 0.5,
        "one-sided 2:8": 0.75, "drawn 2:8": 0.5, "bdwp 2:8, all": 0.5,
    }  # fmt: skip
    assert all(row["loss"] < 0.6 and row["share"] >= shares[case] for case, row in rows.items())
    with pytest.raises(SparseFlashError, match="--images has 200 images, --labels 199"):
        weights.jobs(x, y[1:], cases=["dense"], seeds=[0])


def test_short_training_is_judged_at_every_length_and_streams_as_one_pass():
    jobs = extrapolation.jobs(
        TEXT, cases=["stick-breaking", "lightning"], seeds=[0], steps=2, length=64, lengths=(64, 256)
    )
    for job in jobs:
        row = job.run()
        assert row["streamed"] and row["apart"] < 1e-4 and row["bpb_64"] > 0 < row["bpb_256"]
    good = {"case": "stick-breaking", "seed": 0, "bpb_512": 2.0, "bpb_2048": 2.02}
    rotary = {**good, "case": "dense, rotary", "bpb_2048": 2.5}
    assert extrapolation.verdict([good, rotary]) == []
    assert len(extrapolation.verdict([{**good, "bpb_2048": 2.6}, rotary])) == 2


def test_layers_of_a_language_model_are_judged_near_and_far(monkeypatch):
    monkeypatch.setattr(language, "LENGTH", 700)
    names = ["random 128", "look-ups", "convolution", "combiner, both ways"]
    rows = {job.key["case"]: job.run() for job in language.jobs(TEXT, cases=names, seeds=[0], steps=1)}
    assert rows["random 128"]["pairs"] == pytest.approx(sum(min(i + 1, 128) for i in range(700)) / 700)
    assert 0 <= rows["look-ups"]["active"] <= 1 and "pairs" not in rows["convolution"]
    assert all(
        row["far_bytes"] > 0 and 0 < row["far"] < 12 for name, row in rows.items() if "both" not in name
    )
    assert "far" not in rows["combiner, both ways"] and rows["combiner, both ways"]["bpb"] > 0
    three = [{"case": case, "bpb": bits, "far": bits} for case, bits in
             (("convolution", 3.0), ("look-ups", 2.25), ("dense", 2.0))]  # fmt: skip
    assert language.closed(three)[1] == "look-ups close 75% of the gap between convolution and dense, far"


def test_lists_are_right_and_answers_are_judged(monkeypatch):
    text = bytes(lists.lists(40).train.tolist()).decode()
    names = {"MAX": max, "MIN": min, "MED": lambda x: sorted(x)[len(x) // 2], "SM": lambda x: sum(x) % 10}

    def value(words):
        word = words.pop(0)
        if not word.startswith("["):
            return int(word)
        found = []
        while words[0] != "]":
            found.append(value(words))
        words.pop(0)
        return names[word[1:]](found)

    lines = text.strip().split("\n")
    assert len(lines) > 30 and len({line[:4] for line in lines}) > 3
    for line in lines[:-1]:
        said, answer = line.split("=")
        assert value(said.replace("]", " ]").split()) == int(answer), line
    monkeypatch.setattr(lists, "LENGTH", 256)
    corpus = lists.lists(2000)
    tokens, targets = corpus.batch(0, 0, slice(None), 4, 256)
    asked = targets != -100
    assert 0 < asked.sum() < asked.numel() / 8 and (tokens[asked] == ord("=")).all()
    (job,) = lists.jobs(corpus, cases=["seqboat"], seeds=[0], steps=1)
    row = job.run()
    assert 0 <= row["accuracy"] <= 1 and 0 <= row["active"] <= 1 and 0 <= row["nested"] <= 1


def test_long_training_by_summaries_is_judged_with_exact_attention_too():
    jobs = long.jobs(TEXT, cases=["dense", "muse, 64 clusters"], steps=1, length=600)
    exact, near = (job.run() for job in jobs)
    assert exact["bpb"] == exact["bpb_exact"] and near["ms_attention"] > 0
    assert near["loss"] == pytest.approx(exact["loss"], rel=0.05)


def test_a_model_of_short_sequences_goes_on_with_longer_ones(monkeypatch):
    monkeypatch.setattr(longer, "SHORT", 64)
    monkeypatch.setattr(longer, "LONG", 640)
    jobs = longer.jobs(TEXT, cases=list(longer.CASES), seeds=[0], steps=2)
    rows = {job.key["case"]: job.run() for job in jobs}
    assert rows["hybrid"]["base"] > 10_000 and "base" not in rows["short"]
    assert rows["none dense"]["cache"] < rows["hybrid"]["cache"] < rows["full"]["cache"] == 1
    assert all(row["bpb"] < 9 for row in rows.values()) and rows["full"]["bpb"] != rows["hybrid"]["bpb"]


def test_routing_finds_planted_clusters_and_chance_does_not(monkeypatch):
    monkeypatch.setattr(routing, "STEPS", 20)
    (job,) = routing.jobs(TEXT, seeds=[0], cases=["planted"])
    row = job.run()
    assert row["recall"] > 1.5 * row["recall_chance"] and 0.1 < row["kept"] < 0.5


def test_pooling_of_jagged_histories_learns_and_is_timed():
    (row,) = pooling.times(batch=8, longest=32, width=8, fills=(0.3,), rounds=1)
    assert 0.1 < row["fill"] < 0.5 and row["speedup"] > 0
    rows = {job.key["case"]: job.run() for job in pooling.clicks(seeds=[0], steps=5, batch=16)}
    assert list(rows) == ["clicks, attention", "clicks, mean"]
    assert all(0.4 < row["auc"] < 0.8 for row in rows.values())


def test_cycles_of_the_accelerator_follow_their_formulas():
    array = accelerator.Array(4, 8)
    assert array.cycles(8, 100, 16) == 2 * 2 * 100 + 10  # a tile of outputs stays
    assert array.cycles(1000, 8, 16) == 2 * 2 * 1000 + 10  # a tile of weights stays
    assert accelerator.Array(4, 8, interleaved=False).cycles(8, 100, 16) == 2 * 2 * (100 + 10)
    assert array.cycles(8, 100, 16, 0.25) == 2 * 2 * 25 + 10
    layer = accelerator.Product(64, 32, 16)
    want = array.cycles(64, 32, 16) + array.cycles(64, 16, 32) + array.cycles(32, 64, 16) + 512 // 32
    assert array.step(layer, 1, 1) == array.step(layer._replace(sparse=False), 2, 8) == want
    rows = [row for row in accelerator.rows() if row["pattern"] == "2:8"]
    assert all(1.7 < row["speedup"] < row["multiplications"] < 2 for row in rows)  # the paper's mean is 1.75


def test_times_have_a_slope():
    rows = list(times.measure(cases=["dense", "lightning"], lengths=(32, 64), width=32, rounds=1))
    assert [row["T"] for row in rows] == [32, 32, 64, 64]
    assert rows[0]["slope"] is None and rows[2]["slope"] is not None and rows[3]["over_dense"] > 0

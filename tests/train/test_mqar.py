"""Associative recall and pixels: the rows are those of the paper, the gate tells who can look up."""

import gzip

import pytest
import torch

pytest.importorskip("safetensors")

from benchmarks.experiments import mqar, pixels
from benchmarks.experiments.claim.rows import measure
from sparseflash.common.errors import SparseFlashError

TASK = mqar.Task()


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it brings, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(count, seed=0, task=TASK, **more):
    return task.rows(count, torch.Generator().manual_seed(seed), **more)


def test_every_key_is_asked_for_once_and_its_label_is_the_value_behind_it():
    tokens, labels = rows(300)
    K = TASK.pairs
    keys, values = tokens[:, : 2 * K : 2], tokens[:, 1 : 2 * K : 2]
    assert keys.min() >= 1 and keys.max() < 64 <= values.min() and values.max() < 128
    assert all(len(row.unique()) == K for row in (*keys, *values))
    asked = labels != mqar.IGNORED
    assert (asked.sum(-1) == K).all() and not asked[:, : 2 * K].any()
    for row in range(20):
        answer = dict(zip(keys[row].tolist(), values[row].tolist()))
        at = asked[row].nonzero()[:, 0]
        assert [answer[x] for x in tokens[row, at].tolist()] == labels[row, at].tolist()
        assert (at % 2 == 0).all() and len(set(tokens[row, at].tolist())) == K
    assert (tokens[:, 2 * K :][~asked[:, 2 * K :]] == 0).all()


def test_gaps_follow_the_power_law():
    task = mqar.Task(pairs=1, length=66, power=0.5)
    tokens, labels = rows(20_000, task=task)
    slots = (task.length - 2) // 2
    gap = ((labels != mqar.IGNORED).int().argmax(-1) - 2) // 2 + 1
    law = 0.5 * torch.arange(1, slots + 1).double() ** -0.5
    expected = len(gap) * law / law.sum()
    chi2 = ((gap.bincount(minlength=slots + 1)[1:] - expected) ** 2 / expected).sum()
    assert chi2 < slots + 4 * (2 * slots) ** 0.5  # four standard deviations above its mean


def test_no_row_can_be_in_both_sets():
    train, test = rows(400)[0], rows(400, test=True)[0]
    for tokens, held_out in ((train, False), (test, True)):
        pairs = tokens[:, :16].unflatten(1, (8, 2)).prod(-1).sum(-1)
        assert ((pairs % mqar.HELD_OUT == 0) == held_out).all()
    assert len(torch.cat([train, test]).unique(dim=0)) == 800


def test_a_task_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected at least 4 \\* pairs = 80"):
        mqar.Task(pairs=20)


def test_the_verdict_reads_the_best_rate_of_each():
    def row(case, accuracy, best="yes"):
        return {"case": case, "accuracy": accuracy, "best": best}

    good = [row("dense", 1.0), row("dense", 0.1, ""), row("window of 4", 0.1)]
    assert mqar.verdict(good) == []
    assert len(mqar.verdict([row("dense", 0.9), row("window of 4", 0.95)])) == 2


def test_training_learns_and_says_how_far():
    tiny = mqar.Task(vocabulary=32, length=16, pairs=2)
    rows = list(
        mqar.measure(task=tiny, attentions=["dense"], rates=[1e-2, 1e-9], steps=60, batch=64, width=32)
    )
    assert [row["best"] for row in rows] == ["yes", ""]
    assert rows[0]["accuracy"] > 0.2 > rows[1]["accuracy"]
    assert rows[0]["density"] == 1.0


@pytest.mark.slow
def test_dense_and_hash_attention_recall_and_a_window_does_not():
    names = ["dense", "hash-sparse, 4 buckets", "window of 4"]
    assert mqar.verdict(list(mqar.measure(attentions=names, rates=[1e-2, 2e-2], steps=400))) == []


def test_images_are_read_and_every_attention_learns_from_them(tmp_path):
    head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (20, 4, 4))
    stripes = bytes(255 * (n % 2) for n in range(16)) * 20
    (tmp_path / "images").write_bytes(head + stripes)
    (tmp_path / "images.gz").write_bytes(gzip.compress(head + stripes))
    images = pixels.read_idx(tmp_path / "images.gz")
    assert images.shape == (20, 16) and torch.equal(images, pixels.read_idx(tmp_path / "images"))
    jobs = pixels.jobs(images, steps=30, batch=4, layers=1, width=16, heads=2, test=2)
    rows = list(measure(jobs))
    assert [row["case"] for row in rows] == list(pixels.ATTENTIONS)
    assert max(row["perplexity"] for row in rows) < 20  # of 256, before the first step
    (tmp_path / "short").write_bytes(head + stripes[:-1])
    for name, said in (("none", "give an IDX file"), ("short", "its head says")):
        with pytest.raises(SparseFlashError, match=said):
            pixels.read_idx(tmp_path / name)

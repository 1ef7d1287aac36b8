"""The general harness: right first; rows, energy, figures and comparisons are what they say."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("safetensors")

import sparseflash as sf
from benchmarks.experiments import coverage
from sparseflash.bench import (
    compare,
    conformance,
    energy,
    figures,
    harness,
    memory,
    results,
    subjects,
)
from sparseflash.common.errors import SparseFlashError
from sparseflash.train.attention import dense


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def subject(attend, **more):
    return subjects.Subject("it", "baseline", lambda q, k, v, _: attend(q, k, v), **more)


class Kept:
    """The cheat: attends once, and returns that for ever."""

    out = None

    def __call__(self, q, k, v):
        if self.out is None:
            self.out = dense(q, k, v)
        return self.out + 0 * (q + k + v)


def test_what_is_wrong_sees_the_future_or_keeps_its_result_gets_no_figure(monkeypatch):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert conformance.check(subject(dense), dim=16) == ""
    assert "out is off" in conformance.check(subject(lambda q, k, v: dense(q, k, v) * 1.001), dim=16)
    assert "is off" in conformance.check(subject(sdpa), dim=16)
    assert "on input 2" in conformance.check(subject(Kept()), dim=16)
    assert "the gradient of q" in conformance.check(
        subject(lambda q, k, v: dense(q.detach() + 0 * q, k, v)), dim=16
    )

    def mean(q, k, v):  # a method whose plan is honest, and not causal
        return sf.attention(q, k, v)

    both = dataclasses.replace(subject(mean), method=sf.methods.get("window", window=200, causal=False))
    assert "sees the future" in conformance.check(both, dim=16)

    monkeypatch.setitem(subjects.BASELINES, "sdpa", lambda: sdpa)
    rows = list(
        harness.measure(harness.Settings(baselines=["sdpa"], lengths=[32], heads=1, dim=16, rounds=1))
    )
    assert rows[0]["conformance"].startswith("FAILED") and "ms" not in rows[0]


def test_every_method_that_needs_nothing_conforms_and_a_bf16_one_too():
    for name in ("hash-sparse", "qk-sparse", "window", "reformer"):
        for one in subjects.subjects([name], ["naive"], length=129, density=0.25):
            assert conformance.check(one, dim=16) == "", one.name
    (one,) = subjects.subjects(["hash-sparse"], [], length=129)
    assert conformance.check(one, dim=32, dtype="bf16") == ""


def test_a_row_holds_what_was_measured():
    what = harness.Settings(
        ["window"],
        ["sdpa", "naive", "sdpa-cudnn"],
        [32, 64],
        heads=2,
        dim=16,
        rounds=3,
        density=0.25,
        memory=False,
    )
    rows = list(harness.measure(what))
    names = ["sdpa", "naive window", "sdpa-cudnn", "window"]
    assert [(r["case"], r["T"]) for r in rows] == [(n, t) for t in (32, 64) for n in names]
    base, naive, absent, own = rows[4:]
    assert absent["conformance"].startswith("not run") and "ms" not in absent
    assert own["conformance"] == "passed" and own["rounds"] == 3
    assert own["ms_p20"] <= own["ms"] <= own["ms_p80"] and own["ms_select"] > 0 and own["ms_kernel"] > 0
    assert base["over sdpa"] == 1.0 and base["error"] < 1e-6 and base["density"] == 1.0
    w = round(64 * (1 - math.sqrt(0.75)))
    assert own["density"] == pytest.approx(sum(min(w, i + 1) for i in range(64)) / (64 * 65 / 2))
    assert own["gflop"] == pytest.approx(3.5 * 4 * 16 * 2 * own["density"] * 64 * 65 / 2 * 1e-9)
    assert naive["density"] == own["density"] and naive["error"] == pytest.approx(own["error"], rel=1e-3)
    assert 0 < own["recall"] < 1 and own["error"] > 0.1
    assert own["joules"] is None and own["peak_mb"] is None


def test_memory_is_that_of_the_call():
    """64 MiB: up to 32, glibc may hand out what earlier tests have left, and nothing is added."""
    try:
        extra = memory.peak(lambda: torch.ones(16 << 20))
    except OSError as error:
        pytest.skip(str(error))
    assert 60 << 20 < extra < 72 << 20


def test_names_that_are_none_are_told_with_the_nearest():
    for methods, baselines, said in (
        (["hash_sparse"], [], "did you mean 'hash-sparse'"),
        ([], ["sdpa-cudn"], "did you mean 'sdpa-cudnn'"),
        ([], ["fla"], "needs the package fla"),
    ):
        with pytest.raises(SparseFlashError, match=said):
            subjects.subjects(methods, baselines, length=64)
    with pytest.raises(SparseFlashError, match="tree has no single budget"):
        subjects.subjects(["tree"], [], length=64, density=0.5)


class Meter:
    """A counter of a machine that takes 5 W, and 20 W more while something runs."""

    name, now, energy = "fake", 0.0, 0.0

    def pass_(self, seconds, watts):
        self.now += seconds
        self.energy += seconds * watts

    def joules(self):
        return self.energy

    def load(self):
        self.pass_(0.01, 25)

    def sleep(self, seconds):
        self.pass_(seconds, 5)


def test_energy_of_a_known_load_is_linear_and_idle_is_idle():
    meter = Meter()
    clock = {"clock": lambda: meter.now}
    assert energy.self_test(meter.load, meter, sleep=meter.sleep, **clock) == []
    found = energy.measure(meter.load, meter, idle=5.0, **clock)
    assert (found.joules, found.net) == (pytest.approx(0.25), pytest.approx(0.2))
    assert found.seconds >= energy.WINDOW and found.watts == pytest.approx(25)
    asleep = energy.measure(lambda: meter.sleep(0.01), meter, idle=5.0, **clock)
    assert asleep.net == pytest.approx(0, abs=1e-9)
    meter.joules = lambda: 1.0  # a counter that stands still
    wrong = energy.self_test(meter.load, meter, sleep=meter.sleep, **clock)
    assert any("not linear" in x for x in wrong) and any("does not show" in x for x in wrong)


def test_rapl_wraps_and_what_cannot_be_read_is_none_with_a_reason(tmp_path, monkeypatch):
    package, core = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for folder in (package, core):
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text("999999")
        (folder / "energy_uj").write_text("900000")
    rapl = energy.Rapl(tmp_path)
    (package / "energy_uj").write_text("100000")
    assert rapl.joules() == pytest.approx(0.2)
    with pytest.raises(OSError, match="has no packages"):
        energy.Rapl(tmp_path / "absent")
    monkeypatch.setattr(energy, "Rapl", _refuse)
    assert energy.counter("cpu") == (None, "RAPL: not here")
    rows = list(
        harness.measure(
            harness.Settings([], ["sdpa"], [16], heads=1, dim=8, rounds=1, memory=False, energy=True)
        )
    )
    assert rows[0]["joules"] is None and rows[0]["note"] == "RAPL: not here"


def _refuse():
    raise OSError("RAPL: not here")


def test_rows_are_in_the_file_when_they_are_finished(tmp_path):
    sheet = results.Sheet(tmp_path / "rows.csv")
    sheet.append({"case": "a", "ms": 1.0})
    sheet.append({"case": "b", "note": "later columns are columns too"})
    assert [(r["case"], r["ms"], r["note"]) for r in results.read(sheet.path)] == [
        ("a", "1", ""),
        ("b", "", "later columns are columns too"),
    ]


def test_pictures_follow_from_the_file_alone(tmp_path):
    rows = [
        {"bench": "attention", "case": c, "T": t, "ms": t * n, "direction": "both", "dtype": "fp32"}
        for n, c in enumerate(("dense", "ours"), 1)
        for t in (64, 128)
    ]
    results.write(tmp_path / "a.csv", rows)
    (path,) = figures.redraw(tmp_path)
    assert path.name == "a-both-fp32.svg"
    text = path.read_text()
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "ours: 128, 256" in text
    assert figures.draw(results.read(tmp_path / "a.csv"), "a") == {path.name: text}
    with pytest.raises(SparseFlashError, match="no result file"):
        figures.redraw(tmp_path / "nothing")


def test_compare_names_what_became_slower():
    old = [{"bench": "x", "case": c, "ms": "10", "ratio": r} for c, r in (("a", "2"), ("b", "2"), ("c", ""))]
    new = [
        {"bench": "x", "case": c, "ms": m, "ratio": r}
        for c, m, r in (("a", "99", "1.95"), ("b", "1", "1.8"), ("c", "11", ""))
    ]
    changes = compare.compare(old, new)
    assert {x.row: (x.column, x.regression) for x in changes} == {
        "x, b": ("ratio", True),
        "x, c": ("ms", True),
        "x, a": ("ratio", False),
    }
    assert changes[0].slower == pytest.approx(2 / 1.8)
    with pytest.raises(SparseFlashError, match="no row in common"):
        compare.compare(old, [{"bench": "y", "ms": "1"}])


def test_coverage_is_whole_for_hashing_and_not_for_chunks_of_unequal_buckets():
    rows = list(coverage.measure(lengths=[256], buckets=[8]))
    found = {(row["inputs"], row["case"]): row["coverage"] for row in rows}
    assert [x for (_, case), x in found.items() if case == "hash-sparse"] == [1.0, 1.0]
    assert (
        found["clustered", "reformer, chunks of T / nb"] < found["normal", "reformer, chunks of T / nb"] <= 1
    )


def test_rows_of_other_sessions_stay_and_have_pictures_of_their_own():
    def rows(**change):
        what = harness.Settings(["window"], ["sdpa"], [32], heads=1, dim=16, rounds=1, memory=False, **change)
        return [{name: results.cell(x) for name, x in row.items()} for row in harness.measure(what)], what

    thin, _ = rows(density=0.25)
    thick, what = rows(density=0.5)
    assert harness.others(what, thin + thick) == thin
    pictures = figures.draw(thin + thick, "attention")
    assert sorted(pictures) == [f"attention-both-fp32-target-{x}.svg" for x in ("0.25", "0.5")]

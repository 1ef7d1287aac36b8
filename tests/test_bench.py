"""Benchmarks: what they write is what they measured, inside their box; no test looks at a duration."""

import pytest
import torch

pytest.importorskip("safetensors")

from sparseflash.bench import curves, machine, results
from sparseflash.bench.cases import Case, forward_backward, inputs, naive
from sparseflash.bench.timing import Box, interleave, predict
from sparseflash.errors import SparseFlashError
from sparseflash.train.attention import dense


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it brings, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_cases_run_in_turn():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleave(runs, rounds=2, box=Box(60))
    assert "".join(order) == "abcabcabc"
    assert [len(t.times) for t in timings.values()] == [2, 2, 2]


def test_a_closed_box_leaves_the_warm_up_only():
    timings = interleave({"a": lambda: None}, rounds=5, box=Box(-1))
    assert timings["a"].times == []
    assert timings["a"].median == timings["a"].warm_up


def test_prediction_follows_the_last_growth_within_reason():
    assert predict([], 1024) == 0
    assert predict([(1024, 1.0)], 2048) == pytest.approx(4.0)
    assert predict([(1024, 1.0), (2048, 2.0)], 8192) == pytest.approx(8.0)
    assert predict([(1024, 1.0), (2048, 1.0)], 4096) == pytest.approx(2.0)  # never less than linear
    assert predict([(1024, 1.0), (2048, 64.0)], 4096) == pytest.approx(64 * 2**2.2)


def test_rows_come_back_with_the_machine_beside_them(tmp_path):
    rows = [{"case": "a, b", "ms": 1.23456}, {"case": "c", "note": 'a "note"'}]
    results.write(tmp_path / "deep" / "rows.csv", rows)
    a, c = results.read(tmp_path / "deep" / "rows.csv")
    assert (a["case"], a["ms"], a["note"]) == ("a, b", "1.235", "")
    assert (c["ms"], c["note"]) == ("", 'a "note"')
    assert a["torch"] == torch.__version__
    assert int(a["threads"]) == torch.get_num_threads()
    assert a["cpu"] == machine.cpu_name() != ""
    (tmp_path / "file").write_text("")
    with pytest.raises(SparseFlashError, match="cannot write --out"):
        results.write(tmp_path / "file" / "rows.csv", rows)


def test_naive_masked_attention_is_the_masked_softmax():
    q, k, v, dout = inputs(48, heads=2, dim=16)
    out = naive(4)(q, k, v)
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(2, 16, 2, generator=generator)
    planes = planes / planes.norm(dim=1, keepdim=True)
    q_bucket, k_bucket = (torch.cat([x @ planes, -(x @ planes)], -1).argmax(-1) for x in (q, k))
    for head in range(2):
        for i in range(48):
            seen = [j for j in range(i + 1) if k_bucket[0, head, j] == q_bucket[0, head, i]]
            if not seen:
                assert out[0, head, i].abs().max() == 0
                continue
            p = (k[0, head, seen] @ q[0, head, i] / 4).softmax(0)
            torch.testing.assert_close(out[0, head, i], p @ v[0, head, seen])
    grads = forward_backward(naive(4), q, k, v, dout)()
    assert all(g.isfinite().all() for g in grads)


def test_curves_have_a_row_for_every_case_and_length():
    cases = [Case("base", dense, "dense"), Case("short", naive(4), "naive", longest=64)]
    rows = curves.measure(cases, lengths=[32, 64, 128], rounds=1, heads=2, dim=16)
    assert [(r["case"], r["T"]) for r in rows] == [(c, t) for t in (32, 64, 128) for c in ("base", "short")]
    assert all(r["speedup"] == 1.0 for r in rows if r["case"] == "base")
    assert "ms" not in rows[-1] and "not run beyond T = 64" in rows[-1]["note"]
    assert all(r["ms_min"] <= r["ms"] <= r["ms_max"] for r in rows if "ms" in r)


def test_a_case_that_does_not_fit_the_box_is_left_out_and_said():
    rows = curves.measure(
        [Case("base", dense, "dense")], lengths=[32, 64], minutes=-1, rounds=1, heads=1, dim=8
    )
    assert len(rows) == 2
    assert all("ms" not in row and row["note"].startswith("skipped") for row in rows)

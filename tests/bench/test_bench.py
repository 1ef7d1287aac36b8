"""Benchmarks: what they write is what they measured, inside their box; no test looks at a duration."""

import pytest
import torch

pytest.importorskip("safetensors")

import sparseflash as sf
from benchmarks.experiments import arguments, decode, documents, indexer, kernels, levels, masks, ops
from sparseflash.backends.cpu import build
from sparseflash.bench import curves, machine, results
from sparseflash.bench.cases import Case, Compacted, Naive, forward_backward, inputs
from sparseflash.bench.quality import Dense
from sparseflash.bench.timing import Box, interleave, predict
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods import HashSparse, QKSparse
from sparseflash.train import Corpus
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


@pytest.mark.parametrize("plain", [Naive(HashSparse(nb=4)), Compacted(QKSparse(0.7, 0.7))])
def test_the_plain_way_equals_the_method(plain):
    method, tensors = plain.method, inputs(96, heads=2, dim=16)
    torch.testing.assert_close(plain(*tensors[:3]), method(*tensors[:3]))
    for ours, other in zip(forward_backward(method, *tensors)(), forward_backward(plain, *tensors)()):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_density_and_recall_are_those_of_the_mask():
    q, k, v, _ = inputs(200, heads=2, dim=16)
    case = Case("hash", HashSparse(nb=4), "hash-sparse")
    measured = curves.quality(case, q, k, v, Dense.of(q, k, v))
    keep = case.attention.select(q, k).plan.to_dense()
    p = (q @ k.mT / 4).masked_fill(~torch.ones(200, 200).tril().bool(), -torch.inf).softmax(-1)
    assert measured["density"] == pytest.approx(keep.sum().item() / (2 * 200 * 201 / 2))
    assert measured["recall"] == pytest.approx((p * keep).sum(-1).mean().item(), abs=1e-5)
    assert curves.quality(Case("dense", dense, "dense"), q, k, v, None) == {"density": 1.0, "recall": 1.0}


def test_curves_have_a_row_for_every_case_and_length():
    cases = [Case("base", dense, "dense"), Case("short", Naive(HashSparse(nb=4)), "naive", longest=64)]
    rows = list(curves.measure(cases, lengths=[32, 64, 128], rounds=1, heads=2, dim=16))
    assert [(r["case"], r["T"]) for r in rows] == [(c, t) for t in (32, 64, 128) for c in ("base", "short")]
    assert all(r["speedup"] == 1.0 for r in rows if r["case"] == "base")
    assert "ms" not in rows[-1] and "not run beyond T = 64" in rows[-1]["note"]
    assert all(r["ms_min"] <= r["ms"] <= r["ms_max"] for r in rows if "ms" in r)


def test_a_case_that_does_not_fit_the_box_is_left_out_and_said():
    rows = list(
        curves.measure([Case("base", dense, "dense")], lengths=[32, 64], minutes=-1, rounds=1, heads=1, dim=8)
    )
    assert len(rows) == 2
    assert all("ms" not in row and row["note"].startswith("skipped") for row in rows)


def test_blocks_and_tokens_keep_the_share_they_name():
    blocks = kernels.Blocks(16, 16, 0.25)(256, 2).to_dense()
    kept = blocks.unflatten(2, (16, 16)).unflatten(4, (16, 16)).any(5).any(3)
    share = (torch.arange(1, 17) * 0.25).round().clamp_min(1)
    assert (kept.sum(-1) == share).all() and kept.diagonal(dim1=2, dim2=3).all()
    assert (blocks[:, 0] != blocks[:, 1]).any()
    small = kernels.Blocks(32, 16, 0.5)(256, 1).to_dense()
    assert (small[0, 0, 31::32].sum(-1) == torch.arange(1, 9) * 16).all()
    tokens = kernels.Tokens(16, 0.25)(256, 2).to_dense()
    assert (tokens[0, :, 15::16].sum(-1) == torch.arange(4, 65, 4)).all()  # the last query of a tile sees all
    few = kernels.Tokens(1, most=10)(64, 1).to_dense()
    assert (few.sum(-1) == torch.arange(1, 65).clamp_max(10)).all()


def test_the_kernel_table_has_both_directions_of_every_case_over_one_baseline():
    shape = kernels.Shape(64, 2, 16, {"dense": kernels.causal, "keys": kernels.Tokens(16, 0.5)})
    rows = list(kernels.measure(shapes=[shape], dtypes=("fp32",), rounds=1))
    names = [f"{case}, {kind}" for kind in ("forward", "backward") for case in ("dense", "keys")]
    assert [row["case"] for row in rows] == names
    assert len({row["ms_sdpa"] for row in rows}) == 2
    assert all(row["ratio"] == row["ms_sdpa"] / row["ms"] for row in rows)
    assert rows[0]["density"] == 1.0 > rows[1]["density"] > 0.4


@pytest.mark.slow
def test_each_level_is_measured_at_its_own_instructions():
    names = levels.runnable()[:2]
    rows = list(levels.measure_levels(names, shapes=[(64, 16)], rounds=1))
    kinds = ("dense, forward", "dense, backward")
    assert [(row["level"], row["case"]) for row in rows] == [(name, kind) for name in names for kind in kinds]
    assert all(row["ratio"] == pytest.approx(row["ms_sdpa"] / row["ms"]) for row in rows)
    lacking = next(name for name, x in build.LEVELS.items() if not x.needs <= build.cpu_flags())
    with pytest.raises(SparseFlashError, match=f"level {lacking}: .*this processor lacks"):
        list(levels.measure_levels([lacking], shapes=[(64, 16)]))


@pytest.mark.parametrize("layout", decode.LAYOUTS)
def test_the_alternatives_to_decode_compute_the_same(layout):
    case = decode.LAYOUTS[layout](2048, 2, 16, torch.float32)
    assert case.tokens == 2048
    torch.testing.assert_close(case.ours(), case.other(), atol=1e-5, rtol=1e-5)


def test_decode_is_measured_in_bytes_a_second():
    options = {"mib": 1, "layouts": ["ragged"], "groups": [2], "dims": [16], "dtypes": ["bf16"], "rounds": 1}
    (row,) = decode.measure(**options)
    assert row["mib"] == 1 and row["gbs"] == pytest.approx(2**20 / row["ms"] / 1e6)
    assert row["gfs"] == pytest.approx(row["gbs"] * 2)  # four per number and query, two bytes a number
    assert row["roof"] >= row["gfs"] / row["gfs_matmul"] * 0.999


def test_the_plain_twins_compute_what_the_ops_do():
    q, k, v, _ = inputs(192, heads=2, dim=16)
    for ours, plain in ((ops.linear, ops.chunked), (ops.stick, ops.sticks)):
        torch.testing.assert_close(ours(q, k, v), plain(q, k, v), atol=1e-4, rtol=1e-4)
    tiny = ops.Op("linear", ops.linear, ops.chunked, length=128, heads=1, shift=-2.0)
    rows = list(ops.measure(ops=(tiny,), dtypes=("fp32",), dim=16, rounds=1))
    assert [row["case"] for row in rows] == ["linear, forward", "linear, backward"]
    assert all(row["ratio"] > 0 and row["ratio_torch"] > 0 and row["rounds"] == 1 for row in rows)


def test_arguments_are_measured_beside_calls_without_them_and_wide_heads_beside_narrow():
    rows = list(arguments.measure(dtypes=("fp32",), length=128, dims=(16,), heads=1, rounds=1, threads=1))
    assert all(row["ratio"] > 0 and row["rounds"] == 1 for row in rows)
    forward, both = ({r["case"] for r in rows if r["direction"] == d} for d in ("forward", "both"))
    assert {"dropout 0.1", "bias by distance, learning", "D = 576, Dv = 512"} <= forward & both
    assert forward - both == {"block maxima, 64 x 64", "block maxima, 128 x 32"} | {
        f"skipping, {x}" for x in ("nothing is skipped", "nearly all")
    }
    q, k, v, _ = arguments._sunk(arguments._inputs(1, 512, 16, 16, "fp32"))
    _, met = sf.attention(q, k, v, causal=True, skip_below=1.0, return_skipped=True)
    assert met[..., 1].sum() > 0.7 * met[..., 0].sum()


def test_documents_are_those_of_the_text_and_every_way_to_run_them_is_measured():
    text = b"".join(b"%d words of a section\n\n%s\n\n\n" % (n, b"x" * (20 + n % 40)) for n in range(100))
    corpus = Corpus([text])
    mixes = documents.mixes(corpus, tokens=256, longest=50)
    assert list(mixes) == ["50 each", "paragraphs", "sections"]
    assert all(sum(map(len, batch)) <= 256 for batch in mixes.values())
    pieces = bytes(mixes["sections"][0]), bytes(mixes["paragraphs"][0])
    assert all(piece in text for piece in pieces)
    assert b"\n\n" in pieces[0] and b"\n\n" not in pieces[1]
    rows = list(documents.measure(corpus, tokens=64, longest=32, dtypes=("fp32",), rounds=1))
    cases = ("padded, SDPA", "padded", "packed")
    assert [(r["what"], r["mix"], r["case"]) for r in rows] == [
        (what, mix, case)
        for what in ("attention", "model")
        for mix in ("32 each", "paragraphs", "sections")
        for case in cases
    ]
    for row, base in zip(rows, [rows[n] for n in range(0, len(rows), 3) for _ in cases]):
        assert row["over_sdpa"] == pytest.approx(row["tokens_per_s"] / base["tokens_per_s"])
        assert row["padding"] == pytest.approx(1 - row["tokens"] / row["longest"] / row["documents"])
    with pytest.raises(SparseFlashError, match="fewer than two paragraphs"):
        documents.mixes(Corpus([b"no sections here at all " * 20]), tokens=64, longest=64)


def test_the_mask_table_has_the_masks_it_names():
    full, tiles, pairs = (masks.CASES[n](1280) for n in ("full", "10 % of the tiles", "1 % of the pairs"))
    assert (masks.filled(full), masks.filled(tiles), masks.filled(pairs)) == (1.0, pytest.approx(0.1), 1.0)
    assert torch.equal(masks.packed(300), masks.packed(300).tril())
    tree = masks.tree(200)
    assert tree.diagonal().all() and tree[:, 0].all() and (tree.int() @ tree.int() > 0).eq(tree).all()
    rows = list(masks.measure(lengths=(256,), cases=("full", "tree"), heads=1, dim=16, rounds=1, flex=False))
    assert [(row["case"], row["T"]) for row in rows] == [("full", 256), ("tree", 256)]
    assert all(row["ratio"] == row["ms_sdpa"] / row["ms"] and row["ms_build"] > 0 for row in rows)


def test_the_plain_formulas_of_learned_attention_are_ours():
    q, k, weights = indexer.tensors(192, torch.float32, 24, 16)
    index = sf.indexer_topk(q, k, weights, 40)
    plain = indexer.choice(q, k, weights, 40)  # names keys of the future where there are no others
    past = torch.where(plain <= torch.arange(192)[:, None], plain, 192).sort(-1).values
    assert torch.equal(past, torch.where(index < 0, 192, index).long())
    rows = list(
        indexer.measure(
            lengths=(192,), dtypes=("fp32",), topk=16, rounds=1, heads=4, dim=16, shape=(4, 2, 16)
        )
    )
    assert [row["case"].split(",")[0] for row in rows] == [
        "choice",
        "attention",
        "attention",
        "loss with its gradient",
    ]
    assert all(row["ratio"] > 0 and row["mb"] >= 0 for row in rows)


def test_layers_of_models_are_measured_against_the_stock_ones():
    pytest.importorskip("transformers")
    from benchmarks.experiments import models

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    chosen = {"4 buckets": sf.methods.HashSparse(nb=4)}
    subjects = {
        "small": models.Subject("Qwen2", sizes, chosen),
        "too large": models.Subject("Qwen2", sizes, chosen, held=2.0**20),
    }
    wanted = [("small", "fp32", what, 300) for what in models.WHAT] + [("too large", "fp32", "prefill", 256)]
    *rows, last = models.measure(wanted, rounds=2, subjects=subjects)
    assert [row["what"] for row in rows] == list(models.WHAT)
    for row in rows:
        assert row["density"] == pytest.approx(0.25, abs=0.1) and row["rounds"] == 2
        assert min(row["ms"], row["ms_stock"], row["ratio"], row["mb"]) > 0
    assert "not run" in last["note"] and "ms_stock" not in last and last["ms"] > 0

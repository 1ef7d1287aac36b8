"""The sizes of the Triton kernels' blocks: from the table where it has a row, smaller where they must be."""

import pytest
import torch

import sparseflash as sf

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")

from triton.runtime.errors import OutOfResources

from sparseflash.backends.triton import blocks
from sparseflash.backends.triton.blocks import Blocks, Case
from sparseflash.backends.triton.launch import Arguments

CASE = Case("rows", 64, 0, "bfloat16")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(blocks, "target", lambda: ("cuda", 90))
    monkeypatch.setattr(blocks, "_fits", {})


def test_a_row_of_the_table_is_what_is_launched_on_its_card_alone(hopper, monkeypatch, tmp_path):
    fastest = Blocks(64, 128, 4, 3, 168)
    other = Case("columns", 64, 128, "bfloat16")
    blocks.write_tuned({("sm_90", CASE): fastest, ("sm_80", other): fastest}, tmp_path / "tuned.csv")
    table = blocks.tuned(tmp_path / "tuned.csv")
    assert table == {("sm_90", CASE): fastest, ("sm_80", other): fastest}
    monkeypatch.setattr(blocks, "tuned", lambda: table)
    q = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    call = Arguments(q, q, q, sf.Plan.dense(256, 256, causal=True), 0.1, 0.0, None)
    assert call.blocks("rows") == fastest
    assert call.blocks("rows, backward") != fastest
    assert call.blocks("columns") != fastest
    assert blocks.choose(CASE, heavy=True) != fastest  # was not tuned for
    with blocks.trying("columns", fastest):
        assert call.blocks("columns") == fastest


def test_the_committed_table_is_in_order_and_holds_what_a_kernel_can_be(tmp_path):
    rows = blocks.tuned()
    for (_, case), one in rows.items():
        assert case.kernel in ("rows", "rows, backward", "columns", "decode")
        assert case.dim & (case.dim - 1) == 0 and one.rows >= 16 and one.keys >= 16
    blocks.write_tuned(rows, tmp_path / "tuned.csv")
    assert (tmp_path / "tuned.csv").read_text() == blocks.TABLE.read_text()


def test_where_shared_memory_is_short_smaller_blocks_run_and_are_remembered(hopper):
    tried = []

    def start(one):
        tried.append(one)
        if one.rows * one.keys * one.stages > 64 * 64:
            raise OutOfResources(300_000, 100_000, "shared memory")

    wanted = Blocks(128, 128, 8, 2)
    blocks.fitting("rows", wanted, start)
    assert tried[0] == wanted and (tried[-1].rows, tried[-1].keys, tried[-1].stages) == (64, 64, 1)
    blocks.fitting("rows", wanted, start)
    assert tried[-1] == tried[-2]  # the second call began where the first one ended


def test_a_card_on_which_nothing_fits_says_what_it_lacks(hopper):
    def start(one):
        raise OutOfResources(300_000, 100_000, "shared memory")

    with pytest.raises(sf.BackendError, match="300000 of shared memory.*has 100000"):
        blocks.fitting("columns", Blocks(32, 32, 8, 1), start)

"""The work list of decoding: every key of every row once, in shares that differ by no more than they must."""

import pytest
import torch

import sparseflash as sf

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")

from sparseflash.backends.triton.split import keys_listed, work_of

PROGRAMS, HEADS = 264, 8
GENERATOR = torch.Generator().manual_seed(0)


def ragged():
    return sf.Plan.from_lengths(torch.tensor([1, 0, 60_000, 700, 4096]), Tk=65_536, Tq=1)


def paged():
    table = torch.randperm(5 * 80, generator=GENERATOR).view(5, 80)
    return sf.Plan.from_pages(table, torch.tensor([5_000, 3, 1_000, 0, 64]), page_size=64, Tk=5 * 80 * 64)


def chosen():
    index = torch.rand(5, HEADS, 1, 512, generator=GENERATOR).topk(100).indices
    return sf.Plan.from_keys(index, Tq=1, Tk=32_768, tile=1, unit=64)


@pytest.mark.parametrize("make", [ragged, paged, chosen])
def test_every_piece_of_every_list_has_one_program_and_no_share_is_too_large(make):
    plan = make()
    keys = keys_listed(plan).expand(5, -1, -1).repeat_interleave(HEADS // keys_listed(plan).shape[1], 1)
    keys = keys.flatten()
    pieces, lists = work_of(plan, 5, HEADS, PROGRAMS)
    assert len(pieces) == len(keys) + PROGRAMS and len(lists) == len(keys)
    done = []
    for cell, (first, count) in enumerate(lists.tolist()):
        assert pieces[first : first + count].tolist() == [[cell, i, count] for i in range(count)]
        done += range(first, first + count)
    assert done == list(range(len(done)))  # one after another
    idle = pieces[len(done) :]
    assert (idle[:, 1] >= idle[:, 2]).all()
    share = max(256, -(-int(keys.sum()) // PROGRAMS))
    assert (-(-keys // lists[:, 1]) <= share).all()  # the longest row is no program's alone
    assert (lists[:, 1] == (keys / share).ceil().clamp(min=1)).all()  # and none is cut up for nothing


def test_the_list_of_a_plan_is_made_once_for_all_layers():
    plan = ragged()
    assert work_of(plan, 5, HEADS, PROGRAMS) is work_of(plan, 5, HEADS, PROGRAMS)
    assert work_of(plan, 5, HEADS, 2 * PROGRAMS) is not work_of(plan, 5, HEADS, PROGRAMS)

"""Planted needles: who asks for them decides which estimates find them."""

import pytest
import torch

import sparseflash as sf
from sparseflash.bench import needles
from sparseflash.selection import probe

pytest.importorskip("safetensors")

from sparseflash.bench import capture


@pytest.fixture(scope="module")
def real():
    return capture.load("smollm2").layer(15, tokens=2048)


@pytest.mark.parametrize("kind", needles.KINDS)
@pytest.mark.parametrize("loud", [False, True])
def test_who_asks_gives_a_needle_all_of_its_mass_and_nobody_else_is_changed(real, kind, loud, generator):
    found = needles.plant(real.q, real.k, kind, generator, loud=loud)
    assert found.dense()[1].min() > 0.999
    assert found.asking.shape == (1, 3, 8 if kind == "lone" else 32)
    assert (found.asking - found.asked >= 2048 // 8).all() and (found.asked >= 0).all()
    assert all(len(set(pairs)) == 8 for pairs in found.asked[0].tolist())
    changed = (found.q != real.q).any(-1)[0].nonzero().tolist()
    group = [rows for rows in found.asking[0].tolist() for _ in range(3)]
    assert changed == [[h, t] for h, rows in enumerate(group) for t in rows]


@pytest.mark.parametrize("kind", needles.KINDS)
def test_what_a_plan_keeps_is_what_its_mask_holds(real, kind, generator):
    found = needles.plant(real.q, real.k, kind, generator)
    mask = torch.rand(1, 9, 2048, 2048, generator=generator) < 0.5
    pairs = found.asking.repeat_interleave(3, 1), found.asked.repeat_interleave(3, 1)
    want = mask[0][torch.arange(9)[:, None], pairs[0][0], pairs[1][0]].float()
    torch.testing.assert_close(found.kept(sf.Plan.from_mask(mask.tril()))[0].float(), want, atol=1e-3, rtol=0)


def test_the_last_queries_know_their_own_needles_alone_unless_all_look_at_them(real, generator):
    share = {}
    for kind in needles.KINDS:
        for loud in (False, True):
            found = needles.plant(real.q, real.k, kind, generator, loud=loud)
            keys = probe(found.q, found.k, 32).keys().topk(64).indices
            asked = found.asked.repeat_interleave(3, 1)
            share[kind, loud] = float((asked[..., None] == keys[:, :, None]).any(-1).float().mean())
    assert share["question", False] == share["question", True] == 1
    assert share["mid", False] < 0.2 and share["lone", False] < 0.2
    assert share["lone", True] > 0.6


def test_pooled_keys_do_not_show_a_lone_token(real, generator):
    found = needles.plant(real.q, real.k, "lone", generator)
    pooled = sf.methods.BlockTopK(blocks=4, block=64)
    assert found.kept(pooled.select(found.q, found.k).plan).mean() < 0.3
    hashed = sf.methods.HashSparse(nb=8)
    assert found.kept(hashed.select(found.q, found.k).plan).mean() > 0.99


def test_what_cannot_be_planted_is_refused(real, generator):
    with pytest.raises(sf.SparseFlashError, match="kind='middle': expected one of question, mid, lone"):
        needles.plant(real.q, real.k, "middle", generator)
    with pytest.raises(sf.SparseFlashError, match="8 needles in 100 tokens: they want 512; plant fewer"):
        needles.plant(real.q[:, :, :100], real.k[:, :, :100], "lone", generator)

"""Packed batches: what the collator makes of examples, and training on them is training on padded ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparseflash as sf
from sparseflash import Plan

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [1, 2, 3]},
    {"input_ids": [8], "labels": [4]},
    {"input_ids": [9, 10], "labels": [5, -100]},
]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("tensors", [True, False])
def test_a_batch_is_that_of_the_flattening_collator_of_transformers(labels, start, tensors):
    transformers = pytest.importorskip("transformers", reason="needs Transformers to compare with")
    examples = [{n: x for n, x in e.items() if labels or n != "labels"} for e in EXAMPLES]
    if tensors:
        examples = [{n: torch.tensor(x) for n, x in e.items()} for e in examples]
    collate = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, position_ids_start=start, return_tensors="pt"
    )
    want, got = collate(examples), sf.PackingCollator(position_start=start)(examples)
    assert got.keys() == want.keys()
    for name, x in want.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(got[name], x) and got[name].dtype == x.dtype, name
        else:
            assert got[name] == x, name


def test_empty_examples_and_bare_rows_of_tokens_are_taken():
    batch = sf.PackingCollator()([torch.arange(3), [], [7, 8], torch.zeros(0, dtype=torch.int32)])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 7, 8]]
    assert batch["labels"].tolist() == [[-100, 1, 2, -100, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 3, 5, 5]
    assert sf.PackingCollator()([[]])["cu_seq_lens_q"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "positions, edges",
    [
        ([0, 1, 0, 0, 1, 2], [0, 2, 3, 6]),  # neighbours of length 1
        ([2, 3, 4, 2, 3], [0, 3, 5]),
        ([0, 1, 2, 3], [0, 4]),
        ([0], [0, 1]),
        ([], [0]),
    ],
    ids=str,
)
def test_edges_are_read_off_the_positions(positions, edges):
    row = torch.tensor(positions, dtype=torch.int64)
    for given in (row, row[None]):
        found = sf.cu_seqlens_of(given)
        assert found.tolist() == edges and found.dtype == torch.int32


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("safetensors")
    from sparseflash.train import GPT, TrainConfig

    model = GPT(TrainConfig(data="", layers=2, width=32, heads=2, length=64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # fresh ones predict all bytes alike, whatever they see
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return model


def _step(model, *args, **kwargs):
    loss = model(*args, **kwargs)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_the_loss_and_every_gradient_of_a_packed_step_are_those_of_a_padded_one(model, generator):
    lengths = (1, 17, 64, 2, 40)
    texts = [torch.randint(256, (n,), generator=generator) for n in lengths]
    padded = torch.full((len(texts), 65), -100)
    for row, text in zip(padded, texts):
        row[: len(text)] = text
    want = _step(model, padded[:, :-1].clamp(min=0), padded[:, 1:])

    batch = sf.PackingCollator()(texts)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    plan = Plan.from_documents(batch["cu_seq_lens_q"], causal=True)
    given = {"positions": batch["position_ids"], "plan": plan}
    got = _step(model, batch["input_ids"], targets, **given)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)

    seams = F.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)  # predicting over the seams
    whole = Plan.dense(sum(lengths), sum(lengths), causal=True)  # seeing over them
    straight = torch.arange(sum(lengths))[None].clamp(max=63)  # positions that go on
    for wrong in (
        (seams, given),
        (targets, given | {"plan": whole}),
        (targets, given | {"positions": straight}),
    ):
        assert abs(model(batch["input_ids"], wrong[0], **wrong[1]) - want[0]) > 1e-4


@pytest.mark.parametrize(
    "examples, said",
    [
        ([], "an empty batch"),
        ([{"labels": [1]}], "example 0 has labels: expected input_ids"),
        ([[1], [1.5]], "example 1: input_ids is .*torch.float32.*integers"),
        ([[[1, 2]]], r"example 0: input_ids is \[1, 2\]"),
        ([{"input_ids": [1, 2], "labels": [1]}], "example 0: 2 input_ids and 1 labels"),
    ],
    ids=str,
)
def test_bad_examples_have_their_message(examples, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.PackingCollator()(examples)


@pytest.mark.parametrize(
    "positions", [[0, 1], torch.zeros(2, 3).long(), torch.zeros(3)], ids=["list", "two", "float"]
)
def test_positions_of_more_than_a_row_have_their_message(positions):
    with pytest.raises(sf.SparseFlashError, match="expected one packed row"):
        sf.cu_seqlens_of(positions)

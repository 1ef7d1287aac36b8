"""Fine-tuning to longer texts through the blocks that SeerAttention's gate selects, beside dense fine-tuning.

A small model over bytes learns texts of one length, densely. Its rotary base is raised for a longer one,
where gates are distilled from its attention. Then copies of it go on learning at that length: densely;
through the gate's best blocks, at several shares of the pairs that are left out; and in a window of as many
pairs. The loss is of texts that no copy saw, and of their last quarter, which the shorter length does not
reach: in the form that a copy was tuned in, and densely.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench import distill
from sparseflash.bench.results import Row
from sparseflash.common import files
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods.base import Method

WIDTH, LAYERS, HEADS, KV_HEADS, BATCH = 256, 4, 8, 4, 4
BLOCK, HELD = 64, 8
"""Tokens of a block, and held-out texts."""


def new_model(length: int, theta: float) -> Any:
    """A small Llama over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    return LlamaForCausalLM(config)


def pieces(data: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Texts at random places, `[count, length + 1]`."""
    at = torch.randint(len(data) - length - 1, (count,), generator=generator)
    return torch.stack([data[i : i + length + 1] for i in at.tolist()]).long()


def learn(
    model: Any,
    data: Tensor,
    length: int,
    steps: int,
    lr: float,
    method: Method | None,
    said: Callable[[str], None],
) -> None:
    """Train in place, with a warm-up of a tenth and a linear end, attending by a method (None: densely)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    generator, batch = torch.Generator().manual_seed(1), max(1, BATCH * 1024 // length)
    model.train()
    with sf.transformers.sparse(model, prefill=method):
        for step in range(steps):
            rate = min(1.0, 10 * (step + 1) / steps, 2 * (1 - step / steps))
            optimizer.param_groups[0]["lr"] = lr * rate
            text = pieces(data, length, batch, generator)
            logits = model(text[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 0:
                said(f"step {step} of {steps}, {float(loss.detach()):.3f} nats")
    model.eval()


@torch.no_grad()
def judge(model: Any, texts: Tensor, method: Method | None) -> tuple[float, float]:
    """Loss over all of the texts, and over their last quarters, nats a byte."""
    each = []
    with sf.transformers.sparse(model, prefill=method):
        for text in texts:
            logits = model(text[None, :-1], use_cache=False).logits[0]
            each.append(torch.nn.functional.cross_entropy(logits, text[1:], reduction="none"))
    loss = torch.stack(each)
    return float(loss.mean()), float(loss[:, -(loss.shape[1] // 4) :].mean())


def blocks_for(length: int, left_out: float) -> int:
    """Best blocks of a tile, beside its first and own, so that about this share of the pairs is left out."""
    tiles = length // BLOCK
    for count in range(1, tiles + 1):
        seen = sum(min(row + 1, count + 2) for row in range(tiles)) / (tiles * (tiles + 1) / 2)
        if seen >= 1 - left_out:
            return count
    return tiles


def cases(gates: sf.methods.Gates, length: int, shares: Sequence[float]) -> dict[str, Method | None]:
    """How copies learn at the longer length, by name."""
    found: dict[str, Method | None] = {"dense": None}
    for share in shares:
        count = blocks_for(length, share)
        window = round(length * (1 - share**0.5))  # of the triangle of pairs
        seer = sf.methods.SeerAttention(gates, blocks=count, sinks=1, near=1, dense_tiles=0)
        found[f"seer-attention, {share:.0%} left out"] = seer
        found[f"window, {share:.0%} left out"] = sf.methods.SinkWindow(window=max(1, window), sink_tokens=4)
    return found


def measure(
    text: Path,
    folder: Path,
    *,
    lengths: tuple[int, int] = (1024, 4096),
    steps: tuple[int, int] = (600, 100),
    shares: Sequence[float] = (0.5, 0.75, 0.9),
    known: Sequence[Mapping[str, str]] = (),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a case; the first model and the gates stay in `folder`, and `known` cases are left out."""
    data = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8)
    short, long = lengths
    held = HELD * (long + 1)
    if len(data) < 4 * held:
        raise SparseFlashError(f"{text} has {len(data)} bytes: expected at least {4 * held}")
    data, kept = data[:-held], data[-held:].view(HELD, long + 1).long()
    model, before = new_model(long, 1e4), folder / f"dense-{short}.pt"
    if before.exists():
        model.load_state_dict(torch.load(before, weights_only=True))
    else:
        learn(model, data, short, steps[0], 1e-3, None, partial(_prefixed, on_run, f"dense, {short}"))
        with files.replacing(before) as at:
            torch.save(model.state_dict(), at)
    longer = new_model(long, 1e4 * (long / short) ** 2)
    longer.load_state_dict(model.state_dict())
    longer.eval()
    path = folder / f"gates-{long}.safetensors"
    if not path.exists():
        on_run("distilling gates")
        taught = pieces(data, long - 1, 6, torch.Generator().manual_seed(2))
        distill.train([distill.listen(longer, one[None]) for one in taught], steps=300).save(path)
    gates = sf.methods.Gates.load(path)
    there = {row["case"] for row in known}
    if "as it was" not in there:
        whole, last = judge(longer, kept, None)
        yield _row("as it was", long, steps, text, 1.0, whole, last, whole, last)
    for case, method in cases(gates, long, shares).items():
        if case in there:
            continue
        own = copy.deepcopy(longer)
        told = partial(_prefixed, on_run, case)
        learn(own, data, long, steps[1], 3e-4, method, told)
        seen = 1.0 if method is None else _kept(own, kept[0], method)
        yield _row(case, long, steps, text, seen, *judge(own, kept, method), *judge(own, kept, None))


def _prefixed(on_run: Callable[[str], None], case: str, said: str) -> None:
    on_run(f"{case}: {said}")


def _kept(model: Any, text: Tensor, method: Method) -> float:
    """Share of the pairs that a method sees, mean over layers and heads."""
    with sf.transformers.sparse(model, prefill=method):
        found = sf.transformers.report(model, input_ids=text[None, :-1])
    each = [x for row in found for x in row.density]
    return sum(each) / len(each)


def _row(
    case: str, T: int, steps: tuple[int, int], text: Path, seen: float, own: float, own_last: float,
    dense: float, dense_last: float,
) -> Row:  # fmt: skip
    return {
        "bench": "seer-tuning", "case": case, "T": T, "steps": steps[1], "text": text.stem, "kept": seen,
        "loss": own, "loss_last": own_last, "loss_dense": dense, "loss_dense_last": dense_last,
    }  # fmt: skip

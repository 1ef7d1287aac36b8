"""Packed documents: tokens a second of one packed row, over the same documents padded to the longest.

Attention alone, and a whole forward and backward of the small GPT around it. Documents of one length show
what packing costs where it saves nothing; paragraphs and sections of real text what it saves. The plan is
made anew in every packed run; padding does not count as tokens.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.cases import DTYPES, forward_backward
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.common.errors import SparseFlashError
from sparseflash.train import GPT, Corpus, TrainConfig
from sparseflash.train.attention import Attention, dense

BETWEEN = {"paragraphs": rb"\n\s*\n|\0", "sections": rb"\n[ \t]*\n[ \t]*\n\s*|\0"}
"""What parts documents: an empty line; two of them, as before chapters (and before functions, in Python)."""
SHORTEST = 16
HEADS, DIM = 4, 64
Runs = dict[str, Callable[[], object]]


def require_room(tokens: int, longest: int) -> None:
    """Refuse a batch that has no room for two documents, or documents that are hardly any."""
    if tokens < 2 * longest or longest < SHORTEST:
        raise SparseFlashError(
            f"--tokens {tokens} --longest {longest}: expected --longest of at least {SHORTEST}, "
            "and --tokens of at least twice that"
        )


def mixes(corpus: Corpus, *, tokens: int, longest: int) -> dict[str, list[Tensor]]:
    """Batches of documents, uint8 [n]: at most so many tokens together, and each at most `longest`."""
    text = bytes(corpus.train.numpy())
    same = min(512, longest, tokens // 2, len(text))
    found = {
        f"{same} each": [
            corpus.train[at : at + same] for at in range(0, min(tokens, len(text)) - same + 1, same)
        ]
    }
    for name, between in BETWEEN.items():
        pieces = [piece[:longest] for piece in re.split(between, text) if len(piece) >= SHORTEST]
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
        batch, total = [], 0
        for n in order:
            total += len(pieces[n])
            if total > tokens:
                break
            batch.append(torch.frombuffer(bytearray(pieces[n]), dtype=torch.uint8))
        if len(batch) < 2:
            raise SparseFlashError(
                f"the text has fewer than two {name} of {tokens} bytes together: give more text"
            )
        found[name] = batch
    return found


def attention_runs(lengths: list[int], dtype: str) -> Runs:
    """Forward and backward of attention over random tensors of these lengths."""
    total, generator = sum(lengths), torch.Generator().manual_seed(0)

    def four(*shape: int) -> list[Tensor]:
        q, k, v, dout = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(4))
        return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]

    def causal(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    # both as a projection leaves them: the heads of a token beside one another
    padded, packed = four(len(lengths), max(lengths), HEADS, DIM), four(total, HEADS, DIM)
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "padded, SDPA": forward_backward(partial(causal, dense), *padded),
        "padded": forward_backward(partial(causal, partial(sf.attention, causal=True)), *padded),
        "packed": forward_backward(lambda q, k, v: sf.attention_varlen(q, k, v, edges, causal=True), *packed),
    }


def model_runs(documents: list[Tensor], dtype: str) -> Runs:
    """Forward and backward of the small GPT on these documents: all bytes but the first are predicted."""
    longest = max(len(x) for x in documents)
    model = GPT(TrainConfig("", length=longest, layers=4, width=HEADS * DIM, heads=HEADS))
    batch = sf.PackingCollator()(documents)
    edges, positions = batch["cu_seq_lens_q"], batch["position_ids"]
    packed = batch["input_ids"], F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    rows = torch.stack([F.pad(x.long(), (0, longest + 1 - len(x)), value=-100) for x in documents])
    padded = rows[:, :-1].clamp(min=0), rows[:, 1:]

    def run(*args: Tensor, **options: object) -> None:
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext():
            loss = model(*args, **options)
        loss.backward()
        model.zero_grad(set_to_none=True)

    def run_packed() -> None:
        run(*packed, positions=positions, plan=sf.Plan.from_documents(edges))

    return {
        "padded, SDPA": lambda: run(*padded),
        "padded": lambda: run(*padded, plan=sf.Plan.dense(longest, longest, causal=True)),
        "packed": run_packed,
    }


def measure(
    corpus: Corpus,
    *,
    tokens: int = 8192,
    longest: int = 2048,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 5,
    minutes: float = 6.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure real tokens a second of every mix, padded with torch's and our attention, and packed."""
    box = Box(minutes * 60)
    groups = [
        (what, mix, documents, dtype)
        for what in ("attention", "model")
        for mix, documents in mixes(corpus, tokens=tokens, longest=longest).items()
        for dtype in dtypes
    ]
    for number, (what, mix, documents, dtype) in enumerate(groups):
        lengths = [len(x) for x in documents]
        runs = attention_runs(lengths, dtype) if what == "attention" else model_runs(documents, dtype)
        timings = interleave(
            runs,
            rounds=rounds,
            box=Box(box.left / (len(groups) - number)),
            on_run=lambda name, group=f"{what}, {mix}, {dtype}": on_run(f"{group}, {name}"),
        )
        total, widest = sum(lengths), max(lengths)
        for name, timing in timings.items():
            row: Row = {"bench": "documents", "what": what, "mix": mix, "dtype": dtype, "case": name}
            row |= {"documents": len(lengths), "tokens": total, "longest": widest}
            row |= {"padding": 1 - total / (widest * len(lengths)), "ms": timing.median * 1e3}
            row |= {"tokens_per_s": total / timing.median}
            row |= {"over_sdpa": timings["padded, SDPA"].median / timing.median}
            row |= {"over_padded": timings["padded"].median / timing.median}
            yield row | {"rounds": len(timing.times)}

"""A model beyond the length it was trained on, loss by position: plain positions, YaRN, dual chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

import sparseflash as sf
from sparseflash.bench.prompts import CHUNK
from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError
from sparseflash.integrations.transformers import load

CASES = ("plain", "yarn", "dual-chunk-attention")
PARTS = 8
"""Rows of each case and length: the loss over so many parts of the text."""


@torch.no_grad()
def measure(
    text: Path,
    *,
    model: str = "smollm2",
    lengths: Sequence[int] = (8192, 16384, 32768),
    cases: Sequence[str] = CASES,
    skip: int = 0,
    known: Sequence[Mapping[str, str]] = (),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a part of the text; `known` cases and lengths are left out."""
    there = {(row["case"], row["T"]) for row in known}
    words = text.read_text(encoding="utf-8", errors="replace")[skip:]
    for length in lengths:
        for case in cases:
            if (case, str(length)) in there:
                continue
            on_run(f"{case}, {length} tokens")
            loaded, tokenizer = load(model)
            trained = loaded.config.max_position_embeddings
            if case == "yarn" and length > trained:
                theta = loaded.config.rope_parameters["rope_theta"]
                own = {"rope_type": "yarn", "factor": length / trained, "rope_theta": theta}
                own["original_max_position_embeddings"] = trained
                loaded, tokenizer = load(model, rope_parameters=own)
            ids = tokenizer(words, return_tensors="pt", truncation=True, max_length=length).input_ids
            if ids.shape[1] < length:
                raise SparseFlashError(f"the text has {ids.shape[1]} tokens; {length} are wanted")
            method = sf.methods.DualChunkAttention(context=trained)
            began = time.perf_counter()
            with sf.transformers.sparse(loaded, prefill=method if case == CASES[2] else None):
                hidden = loaded.base_model(ids, use_cache=False).last_hidden_state[0]
            spent, losses = time.perf_counter() - began, []
            for rows, wanted in zip(hidden[:-1].split(CHUNK), ids[0, 1:].split(CHUNK), strict=True):
                logits = loaded.get_output_embeddings()(rows).float()
                losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            for part, loss in enumerate(torch.cat(losses).tensor_split(PARTS)):
                yield {
                    "bench": "long-positions",
                    "model": model,
                    "text": text.stem,
                    "case": case,
                    "T": length,
                    "part": part + 1,
                    "loss": float(loss.mean()),
                    "seconds": spent,
                }

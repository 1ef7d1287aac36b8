"""What methods lose on long prompts of a pretrained model, over several texts: quality alone, no times.

Of each method, on each text: the loss on the prompt, how far the next tokens are from those behind a dense
prompt (`kl`), the pairs it keeps and their recall; and of planted needles the share of their mass that it
keeps, by who asks for them. Rows that a file has already are not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparseflash import methods
from sparseflash.bench import capture
from sparseflash.bench.needles import KINDS, plant
from sparseflash.bench.prompts import Prompt, losses
from sparseflash.bench.results import Row
from sparseflash.integrations.transformers import load
from sparseflash.methods.base import Method

BEHIND = 48
"""Tokens behind the prompt whose probabilities are compared."""
LISTENED = {"smollm2": (4, 15, 21), "gemma3": (5, 11, 17)}
"""Layers whose queries and keys get needles."""


def cases(tokens: int) -> Mapping[str, Method]:
    """The methods, at budgets that grow with the prompt where they count tokens."""
    near = tokens // 8
    slashes = {"vertical": tokens // 16, "slash": tokens // 12, "near": 30, "last": 96}
    found: dict[str, Method] = {
        "sink-window": methods.SinkWindow(window=near, sink_tokens=16),
        "tri-shape": methods.TriShape(sinks=128, window=near),
        "block-topk": methods.BlockTopK(blocks=tokens // 512),
        "xattention": methods.XAttention(),
        "flashprefill": methods.FlashPrefill(),
        "minference": methods.MInference(**slashes),
        "minference, summed": methods.MInference(**slashes, share="sum"),
        "flexprefill": methods.FlexPrefill(),
        "flexprefill, halo": methods.FlexPrefill(halo=True),
        "anchor-attention, theta 5": methods.AnchorAttention(theta=5.0, step=4),
        "anchor-attention, theta 8": methods.AnchorAttention(theta=8.0, step=4),
        "pbs-attn": methods.PBSAttn(),
        "moa, one span": methods.MoA(alpha=0, beta=0.2),
    }
    ended = ("xattention", "pbs-attn", "flashprefill", "minference, summed", "anchor-attention, theta 5")
    return found | {f"{name}, last 64 dense": methods.LastDense(found[name], rows=64) for name in ended}


def measure(
    texts: Sequence[Path],
    *,
    model: str = "smollm2",
    lengths: Sequence[int] = (4096, 8144),
    skip: int = 0,
    wanted: Sequence[str] = (),
    planted: bool = True,
    known: Sequence[Mapping[str, str]] = (),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a method, text and length; `known` rows are left out, and methods that are not wanted.

    Needles are planted if `planted` says so: they cost another prefill of each text.
    """
    there = {tuple(row[name] for name in ("model", "text", "tokens", "case")) for row in known}
    loaded, tokenizer = load(model)
    for tokens in lengths:
        tried = {case: method for case, method in cases(tokens).items() if not wanted or case in wanted}
        for path in texts:
            left = {
                case: method
                for case, method in tried.items()
                if (model, path.stem, str(tokens), case) not in there
            }
            if not left:
                continue
            words = path.read_text(encoding="utf-8", errors="replace")[skip:]
            prompt = Prompt.of(loaded, tokenizer, words, tokens, BEHIND)
            layers = LISTENED.get(model, ())
            tensors = capture.of_model(model, words, tokens, layers)[0] if planted else {}
            here = {"bench": "prompt-losses", "model": model, "text": path.stem, "skip": skip}

            def said(text: str, at: str = f"{path.stem}, {tokens} tokens: ") -> None:
                on_run(at + text)

            for row in losses(prompt, left, on_run=said):
                if row["case"] in left:
                    row.pop("attention_gain")  # of one call, whatever else the machine does
                    yield row | here | (needles(left[row["case"]], tensors) if planted else {})


def needles(method: Method, tensors: Mapping[str, Any]) -> dict[str, float]:
    """Share of planted needles' mass that a method keeps, by who asks: mean over the layers of a capture."""
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layer.")})
    found = dict.fromkeys(KINDS, 0.0)
    for number in numbers:
        q, k = (tensors[f"layer.{number}.{x}"].float().contiguous() for x in "qk")
        for kind in KINDS:
            planted = plant(q, k, kind, torch.Generator().manual_seed(0))
            plan = method.select(planted.q, planted.k, {"scale": planted.scale}).plan
            found[kind] += float(planted.kept(plan).mean()) / len(numbers)
    return found

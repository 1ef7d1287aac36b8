"""`sparseflash generate`: continue a prompt with a real model, densely and with few keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseflash.bench.commands import options
from sparseflash.common.errors import SparseFlashError

from .prompts import Dtype, Model


def generate(
    prompt_file: Annotated[Path, typer.Option(help="A text file: the prompt.")],
    decode: Annotated[
        str, typer.Option(help="A method that decodes, a cache policy, or a compression.")
    ] = "quest",
    changes: Annotated[list[str] | None, options.changes()] = None,
    model: Model = "smollm2",
    tokens: Annotated[int, typer.Option(min=0, help="Of the prompt, at most; 0: all.")] = 0,
    new: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    dtype: Dtype = "fp32",
    by_layer: Annotated[bool, typer.Option(help="Say what every layer holds.")] = False,
) -> None:
    """Generate with a method or a small cache, and densely: tokens per second, bytes, and agreement.

    **sparseflash generate --prompt-file book.txt --decode quest --set budget=256**

    kept: keys that a KV head holds. agree: share of tokens equal to dense attention's after the same words;
    kl: divergence from its probabilities, nats per token; recall: share of dense attention's mass on the keys
    that the last token still sees, mean over layers (--by-layer: of each).
    """
    import sparseflash as sf
    from sparseflash.bench import generate as run
    from sparseflash.bench.cases import DTYPES

    given = run.how(decode, options.settings(changes))
    if dtype not in DTYPES:
        raise SparseFlashError(f"--dtype {dtype!r}: expected {' or '.join(DTYPES)}")
    try:
        text = prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SparseFlashError(f"--prompt-file {prompt_file}: {error}; give a text file (UTF-8)") from None
    loaded, tokenizer = sf.transformers.load(model, dtype=DTYPES[dtype])
    ids = tokenizer(text, return_tensors="pt").input_ids
    ids = ids[:, : tokens or None]
    if not ids.shape[1]:
        raise SparseFlashError(f"--prompt-file {prompt_file} is empty: give it some words")
    for row, said, cache in run.measure(loaded, ids, given, new):
        name = "dense" if row["case"] == "dense" else decode
        recall, more = row.get("recall"), ""
        if recall:
            mean = sum(recall) / len(recall)
            more = f", agree {row['agree']:.3f}, kl {row['kl']:.4f}, recall {mean:.3f}"
        typer.echo(
            f"{name}: {row['rate']:.2f} tokens/s, kept {row['kept']:.0f} of {ids.shape[1] + new}, "
            f"{row['bytes'] / 2**20:.1f} MiB{more}"
        )
        typer.echo(f"  {tokenizer.decode(said[0])!r}")
        for n, (kept, size) in enumerate(run.layers(cache) if by_layer else []):
            seen = f", recall {recall[n]:.3f}" if recall else ""
            typer.echo(f"  layer {n}: kept {kept:.0f}, {size / 2**20:.2f} MiB{seen}")

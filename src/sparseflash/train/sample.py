"""Sample text from a trained run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from sparseflash.train import checkpoint
from sparseflash.train.config import TrainConfig
from sparseflash.train.errors import TrainError
from sparseflash.train.model import GPT


def load_model(directory: str | Path) -> tuple[GPT, TrainConfig]:
    """Load the model of the run in `directory`, ready for use on the CPU."""
    tensors, _ = checkpoint.load(Path(directory), ("config",))
    config = checkpoint.read_config(Path(directory))
    model = GPT(config)
    checkpoint.restore(tensors, model, path=Path(directory) / checkpoint.FILE)
    return model.eval(), config


@torch.no_grad()
def sample(
    model: GPT, prompt: bytes, tokens: int, *, length: int, temperature: float = 0.8, seed: int = 0
) -> Iterator[int]:
    """Draw `tokens` bytes after `prompt`, one at a time, each from the last `length` bytes.

    A model whose layers have a state reads each byte once, for up to `length` bytes, or without limit if no
    layer is rotary. ``temperature=0`` always takes the most likely byte.
    """
    if not prompt:
        raise TrainError("--prompt is empty; give at least one character")
    if not temperature >= 0:
        raise TrainError(f"--temperature is {temperature}; expected 0 or more")
    if tokens < 0:
        raise TrainError(f"--tokens is {tokens}; expected 0 or more")
    generator = torch.Generator().manual_seed(seed)
    context, read = list(prompt), 0
    state = model.new_state(1) if model.decodes else None
    for _ in range(tokens):
        if state is not None and (len(context) <= length or not model.rotary):
            new, read = context[read:], len(context)
            logits = model(torch.tensor([new]), state=state)[0, -1]
        else:
            logits = model(torch.tensor([context[-length:]]))[0, -1]
        if temperature == 0:
            byte = int(logits.argmax())
        else:
            byte = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        context.append(byte)
        yield byte

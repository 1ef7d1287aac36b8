"""Sample text from a trained run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparseflash.methods.base import Method
from sparseflash.methods.session import Session
from sparseflash.train import checkpoint
from sparseflash.train.config import TrainConfig
from sparseflash.train.errors import TrainError
from sparseflash.train.masked import denoise
from sparseflash.train.model import GPT, MASK


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
    _check(prompt, tokens, temperature)
    if model.masked:
        raise TrainError("this model fills in masked bytes and draws none after the others; use fill()")
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


def fill(
    model: GPT,
    prompt: bytes,
    tokens: int,
    *,
    length: int,
    steps: int = 0,
    temperature: float = 0.8,
    seed: int = 0,
    method: Method | None = None,
) -> bytes:
    """Write `tokens` bytes behind `prompt` with a model of the objective "masked", the surest bytes first.

    Parameters
    ----------
    model, length
        As `load_model` returns them: the model, and `config.length`.
    prompt : bytes
        Its last `length - tokens` bytes are read.
    tokens : int
        Bytes to write, fewer than `length`.
    steps : int
        Forwards; 0: one for every two bytes.
    temperature, seed
        As in `sample`.
    method : Method, optional
        Selects keys in every layer, in place of the model's own attention. It is told `step`, `steps` and, if
        it reads that, `generated`, and keeps its patterns in one `Session`.
    """
    _check(prompt, tokens, temperature)
    if not model.masked:
        raise TrainError(
            "this model draws one byte after the other; --steps and --attention are for --objective masked"
        )
    if tokens >= length:
        raise TrainError(f"--tokens is {tokens}; a model of --length {length} writes at most {length - 1}")
    if steps < 0:
        raise TrainError(f"--steps is {steps}; expected 0 or more")
    read = list(prompt[len(prompt) - min(len(prompt), length - tokens) :])
    given = torch.tensor([read + [MASK] * tokens])
    steps = min(steps or -(-tokens // 2), tokens)
    session = None if method is None else Session(method)
    told = {"steps": steps} | ({"generated": tokens} if method and "generated" in method.reads else {})

    def attend(step: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert session is not None
        out: Tensor = session(q, k, v, layer=layer, ctx={**told, "step": step})
        return out

    generator = torch.Generator().manual_seed(seed)
    own = None if session is None else attend
    for step in denoise(model, given, steps=steps, temperature=temperature, generator=generator, attend=own):
        given = step.tokens
    return bytes(given[0, len(read) :].tolist())


def _check(prompt: bytes, tokens: int, temperature: float) -> None:
    if not prompt:
        raise TrainError("--prompt is empty; give at least one character")
    if not temperature >= 0:
        raise TrainError(f"--temperature is {temperature}; expected 0 or more")
    if tokens < 0:
        raise TrainError(f"--tokens is {tokens}; expected 0 or more")

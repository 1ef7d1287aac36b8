"""Checkpoints: one safetensors file, replaced atomically, read without pickle.

Tensors are named ``model.<parameter>``, ``optimizer.<parameter>.<state>`` and ``rng.<device>``; everything
else is JSON in the file's metadata. A save writes a temporary file beside the old one and renames it once it
is on disk, so a kill, a crash or a full disk leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseflash.files import replacing
from sparseflash.train.errors import TrainError

FILE = "checkpoint.safetensors"
FORMAT = "sparseflash-train-1"


def save(directory: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` to ``directory/checkpoint.safetensors``, or change nothing and raise."""
    serialize = _safetensors().save
    path = directory / FILE
    data = serialize(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        metadata={"format": FORMAT, "meta": json.dumps(meta)},
    )
    try:
        with replacing(path) as temporary, open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        kept = (
            f"the checkpoint of step {read_meta(directory)['step']} is intact"
            if path.exists()
            else "nothing was saved"
        )
        raise TrainError(
            f"cannot save {path} ({len(data) / 2**20:.0f} MiB): {error.strerror}; {kept}; make room, "
            f"then continue with: sparseflash train --resume --out {directory}"
        ) from None


def load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of the checkpoint in `directory`."""
    meta = read_meta(directory)
    return _safetensors().load_file(directory / FILE), meta


def read_meta(directory: Path) -> dict[str, Any]:
    """Only the metadata: step, config, fingerprint of the data."""
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    if not path.is_file():
        raise TrainError(
            f"{directory} has no checkpoint ({FILE}) to resume; start a run with: "
            f"sparseflash train --data FILE --out {directory}"
        )
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TrainError(
            f"{path} is not a readable checkpoint ({error}); remove it and start again"
        ) from None
    if metadata.get("format") != FORMAT:
        raise TrainError(
            f"{path} was not written by `sparseflash train` (format {metadata.get('format')}); "
            "use another --out"
        )
    return json.loads(metadata["meta"])


def export(directory: Path, out: Path) -> None:
    """Write the weights alone, in bf16, as a checkpoint of another directory: to sample, not to resume."""
    tensors, meta = load(directory)
    weights = {name: t.bfloat16() for name, t in tensors.items() if name.startswith("model.")}
    out.mkdir(parents=True, exist_ok=True)
    save(out, weights, meta)


def collect(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that must survive, as flat named tensors."""
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state[weight].items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(
    tensors: dict[str, Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put the tensors of `collect` back; names the first one that does not fit."""
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        have, want = (tuple(s[name].shape) if name in s else "nothing" for s in (weights, own))
        if have != want:
            raise TrainError(
                f"the checkpoint is of another shape: {name} is {have} there and {want} in this model; "
                "resume with the options of the run, or use another --out"
            )
    model.load_state_dict(weights)
    if optimizer is None:
        return
    if "rng.cpu" not in tensors:
        raise TrainError(
            "the checkpoint holds weights alone: it can be sampled from, not resumed; "
            "resume the run that it came from"
        )
    for name, weight in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if state:
            optimizer.state[weight] = {key: t.to(weight.device) for key, t in state.items()}
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def _safetensors():
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise TrainError(
            "checkpoints need safetensors; install it with: pip install 'sparseflash[train]'"
        ) from None
    return safetensors.torch

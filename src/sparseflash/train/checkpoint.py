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

from sparseflash.common.files import replacing
from sparseflash.train.config import TrainConfig
from sparseflash.train.errors import TrainError

FILE = "checkpoint.safetensors"
FORMAT = "sparseflash-train-1"
RESUMES = ("step", "data", "config")
"""Metadata fields that resuming needs."""


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


def load(directory: Path, needs: tuple[str, ...] = RESUMES) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of the checkpoint in `directory`.

    Raises
    ------
    TrainError
        If there is no checkpoint, or it is damaged.
    """
    meta, path = read_meta(directory, needs), directory / FILE
    from safetensors import SafetensorError

    try:
        return _safetensors().load_file(path), meta
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, why: object) -> TrainError:
    """The error for a file that is not a complete checkpoint."""
    return TrainError(f"{path} is not a readable checkpoint ({why}); remove it and start again")


def read_meta(directory: Path, needs: tuple[str, ...] = RESUMES) -> dict[str, Any]:
    """Read only the metadata: step, config, data fingerprint; fields not in `needs` may be missing.

    Raises
    ------
    TrainError
        If there is no checkpoint, or a metadata field is missing or has an impossible value.
    """
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
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if metadata.get("format") != FORMAT:
        raise TrainError(
            f"{path} was not written by `sparseflash train` (format {metadata.get('format')}); "
            "use another --out"
        )
    try:
        meta = json.loads(metadata.get("meta", ""))
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"meta is no JSON: {error}") from None
    if not isinstance(meta, dict):
        raise unreadable(path, f"meta is {meta!r}: expected a JSON object")
    for name, kind, said in (
        ("step", int, "a number of steps >= 0"),
        ("data", str, "the fingerprint of the text"),
        ("config", str, "the options of the run, as JSON"),
    ):
        value = meta.get(name)
        if name not in meta and name not in needs:
            continue
        if type(value) is not kind or (name == "step" and value < 0):
            given = f"{name} is {value!r}" if name in meta else f"there is no {name}"
            raise unreadable(path, f"{given}: expected {said}")
    step = meta.get("step")
    if meta.get("position", step) != step:
        raise unreadable(path, f"position is {meta['position']!r}: expected the step, {step!r}")
    return meta


def read_config(directory: Path) -> TrainConfig:
    """Read the options of the run in `directory`.

    Raises
    ------
    TrainError
        If its checkpoint is damaged.
    """
    text = read_meta(directory, ("config",))["config"]
    try:
        return TrainConfig.from_json(text)
    except (TrainError, json.JSONDecodeError, RecursionError) as error:
        raise unreadable(directory / FILE, f"config: {error}") from None


def export(directory: Path, out: Path) -> None:
    """Write only the weights, in bf16, as a checkpoint elsewhere: for sampling, not for resuming."""
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
    tensors: dict[str, Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int | None = None,
    path: Path | None = None,
) -> None:
    """Put the tensors of `collect` back; if one does not fit, raise with its name and change nothing.

    Parameters
    ----------
    tensors : dict
        As `load` returns them.
    model, optimizer
        What to restore. Without an optimizer, only weights, which may be rounded (`export`).
    step : int, optional
        Steps that the optimizer must have taken.
    path : path, optional
        File name for messages.

    Raises
    ------
    TrainError
        For tensors that are missing, not of this model, of another shape or type, or not finite.
    """
    file = FILE if path is None else path
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if optimizer is not None and "rng.cpu" not in tensors:
        raise TrainError(
            f"{file}: the checkpoint holds weights alone: it can be sampled from, not resumed; "
            "resume the run that it came from"
        )
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        have, want = (tuple(s[name].shape) if name in s else "nothing" for s in (weights, own))
        if have != want:
            raise TrainError(
                f"{file}: the checkpoint is of another shape: {name} is {have} there and {want} in this "
                "model; resume with the options of the run, or use another --out"
            )
        kind = weights[name].dtype
        fits = weights[name].is_floating_point() if optimizer is None else kind == own[name].dtype
        _sound(file, f"model.{name}", weights[name], fits, f"{own[name].dtype}")
    if optimizer is None:
        model.load_state_dict(weights)
        return
    states = _optimizer_states(tensors, model, step, file)
    was = torch.get_rng_state()
    try:
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    except (RuntimeError, TypeError) as error:
        torch.set_rng_state(was)
        raise _damaged(file, f"rng is no state of a generator ({str(error).splitlines()[0]})") from None
    model.load_state_dict(weights)
    for name, weight in model.named_parameters():
        if states:
            optimizer.state[weight] = {key: t.to(weight.device) for key, t in states[name].items()}


def _optimizer_states(
    tensors: dict[str, Tensor], model: torch.nn.Module, step: int | None, file: object
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state tensors of every parameter; empty before the first step."""
    given = {name for name in tensors if name.startswith("optimizer.")}
    if not given and not step:
        return {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, weight in model.named_parameters():
        states[name] = own = {}
        for key, shape in (("step", ()), ("exp_avg", weight.shape), ("exp_avg_sq", weight.shape)):
            full = f"optimizer.{name}.{key}"
            if full not in tensors:
                raise _damaged(file, f"{full} is missing")
            x = own[key] = tensors[full]
            if tuple(x.shape) != tuple(shape):
                raise _damaged(file, f"{full} is of shape {tuple(x.shape)}, expected {tuple(shape)}")
            wanted = torch.float32 if key == "step" else weight.dtype
            _sound(file, full, x, x.dtype == wanted, f"{wanted}")
            if key != "exp_avg" and bool((x < 0).any()):
                raise _damaged(file, f"{full} holds {float(x.min()):g}, expected numbers >= 0")
        if step is not None and int(own["step"]) != step:
            raise _damaged(
                file, f"optimizer.{name}.step is {int(own['step'])}, expected that of the run, {step}"
            )
    unknown = sorted(given - {f"optimizer.{name}.{key}" for name, own in states.items() for key in own})
    if unknown:
        raise _damaged(file, f"{unknown[0]} belongs to no parameter of this model")
    return states


def _sound(file: object, name: str, x: Tensor, fits: bool, kind: str) -> None:
    """Raise unless a tensor has the right dtype and is finite."""
    if not fits:
        raise _damaged(file, f"{name} is of {x.dtype}, expected {kind}")
    if not bool(x.isfinite().all()):
        raise _damaged(file, f"{name} is not finite: it holds NaN or infinity")


def _damaged(file: object, what: str) -> TrainError:
    return TrainError(f"{file}: {what}; this checkpoint cannot be continued: start again in another --out")


def _safetensors():
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise TrainError(
            "checkpoints need safetensors; install it with: pip install 'sparseflash[train]'"
        ) from None
    return safetensors.torch

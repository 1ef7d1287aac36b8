"""Save and load caches as files, to read a prompt once and continue from it later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.errors import SparseFlashError
from ..common.files import replacing
from .base import Layer

FORMAT = "sparseflash cache 1"
_KINDS: dict[str, type[Layer]] = {}


def kind(cls: type[Layer]) -> type[Layer]:
    """Register a layer class that files can hold; it implements `saved` and `restored`."""
    _KINDS[cls.__name__] = cls
    return cls


def save(layers: Iterable[Layer] | Any, path: str | Path) -> None:
    """Write the layers of a cache into one safetensors file.

    Parameters
    ----------
    layers : iterable of Layer, or Cache
        The layers, or a `Cache` of Transformers that consists of them.
    path : str or Path
        Output file, replaced atomically.

    Raises
    ------
    SparseFlashError
        If a layer is of a class that files cannot hold.

    Examples
    --------
    >>> import tempfile, torch, sparseflash as sf
    >>> layer = sf.cache.Growing()
    >>> layer.append(*torch.randn(2, 1, 2, 40, 64))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sf.cache.save([layer], f"{folder}/chat.safetensors")
    ...     sf.cache.load(f"{folder}/chat.safetensors")[0].tokens
    40
    """
    from safetensors.torch import save_file

    layers = list(getattr(layers, "layers", layers))
    tensors: dict[str, Tensor] = {}
    said = []
    for n, layer in enumerate(layers):
        if type(layer).__name__ not in _KINDS or type(layer) is not _KINDS[type(layer).__name__]:
            raise SparseFlashError(
                f"layer {n} is a {type(layer).__name__}: files hold layers of kind {', '.join(_KINDS)}"
            )
        held, options = layer.saved()
        tensors |= {f"{n}.{name}": x.contiguous() for name, x in held.items()}
        said.append({"kind": type(layer).__name__, **options})
    with replacing(Path(path)) as at:
        save_file(tensors, at, {"format": FORMAT, "layers": json.dumps(said)})


def load(path: str | Path) -> Sequence[Layer]:
    """Read the layers that `save` wrote.

    Raises
    ------
    SparseFlashError
        If the file is not a saved cache.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
        if told.get("format") != FORMAT:
            raise SparseFlashError(f"{path} holds no cache ({told.get('format')!r}): expected {FORMAT!r}")
        layers = []
        for n, options in enumerate(json.loads(told["layers"])):
            made = _KINDS[options.pop("kind")]
            own = {name: file.get_tensor(name) for name in file.keys() if name.startswith(f"{n}.")}
            layers.append(made.restored({name.partition(".")[2]: x for name, x in own.items()}, options))
    return layers

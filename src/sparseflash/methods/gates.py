"""Inputs and weights of SeerAttention's block gates; trained once per model, saved as safetensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..common.files import replacing
from ..ops.rotary import rotation, turned
from ..selection.grid import Grid
from ..selection.scores import pooled

FORMAT = "sparseflash gates 1"


class Blocks(NamedTuple):
    """Pooled vectors of query tiles and key blocks, the input of a gate. No gradient."""

    q: Tensor
    """`[B,Hq,R,D]`: mean unrotated queries, each then rotated to the first position of its tile."""
    k: Tensor
    """`[B,Hkv,C,3 D]`: maximum, minimum and mean of the unrotated keys, concatenated."""
    at: Tensor
    """Integers `[C]`: the first position of each block."""
    rope: list[Tensor] | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, grid: Grid, rope: Any = None) -> Blocks:
        """Pool queries and keys, which are rotated as `rope` says (None: not rotated)."""
        tables = None if rope is None else rotation(rope, k.shape[2])
        own = torch.as_tensor(grid.q_offset, device=q.device).view(-1, 1)
        token = torch.arange(k.shape[2], device=k.device)[None]
        if tables is not None:
            q, k = (
                turned(q, own + torch.arange(q.shape[2], device=q.device), tables),
                turned(k, token, tables),
            )
        mean = pooled(q, grid.tile, keep=grid.q_keep)
        keys = [pooled(k, grid.unit, how, keep=grid.k_keep) for how in ("max", "min", "mean")]
        first = own + torch.arange(grid.tiles, device=q.device) * grid.tile
        if tables is not None:
            mean = turned(mean, -first, tables)
        return cls(mean, torch.cat(keys, -1), token[0, :: grid.unit], tables)

    def logits(self, weight: Tensor | None = None) -> Tensor:
        """Compute scores `[B,Hq,R,C]` from gate weights `[Hq, 3 D, D]`, with gradient; None: untrained.

        Equation 3 of SeerAttention (arXiv 2410.13276): keys times the weights, rotated to the first position
        of their block, times the queries, over sqrt(D).
        """
        (_, Hq, _, D), Hkv = self.q.shape, self.k.shape[1]
        if weight is None:
            keys = self.k[..., 2 * D :].repeat_interleave(Hq // Hkv, 1)
        else:
            if weight.shape != (Hq, 3 * D, D):
                raise SparseFlashError(
                    f"a gate of {list(weight.shape)}, and {Hq} query heads of {D}: expected "
                    f"{[Hq, 3 * D, D]}, weights of this model"
                )
            own = weight.to(self.k).view(Hkv, Hq // Hkv, 3 * D, D)
            keys = torch.einsum("bhce,hged->bhgcd", self.k, own).flatten(1, 2)
        if self.rope is not None:
            keys = turned(keys, -self.at[None], self.rope)
        return self.q @ keys.mT * D**-0.5


class Gates:
    """Gate weights `[Hq, 3 D, D]` of a model, by layer number.

    Parameters
    ----------
    layers : mapping from int to Tensor
        Weights as `nn.SeerGate` learns them.
    block : int
        Tokens of a tile, and of a block, in training.
    rotary : bool
        Whether the gates were trained on unrotated queries and keys; `ctx["rope"]` is then required.
    name : str
        Name in errors and records.

    Examples
    --------
    >>> import tempfile, torch, sparseflash as sf
    >>> gates = sf.methods.Gates({3: torch.zeros(4, 96, 32)}, block=32, rotary=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = gates.save(f"{folder}/gates.safetensors")
    ...     sf.methods.Gates.load(path).layers[3].shape
    torch.Size([4, 96, 32])
    """

    form = FORMAT
    shape = "[heads, 3 D, D]"

    def __init__(
        self, layers: Mapping[int, Tensor], *, block: int = 64, rotary: bool = True, name: str = ""
    ) -> None:
        for number, weight in layers.items():
            if not (isinstance(weight, Tensor) and weight.dim() == 3 and self.fits(*weight.shape[1:])):
                given = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                raise SparseFlashError(f"layer {number}: weights {given}; expected {self.shape}")
        self.layers = {int(number): weight.detach() for number, weight in layers.items()}
        self.block, self.rotary, self.name = block, rotary, name

    @staticmethod
    def fits(rows: int, width: int) -> bool:
        """Whether weights of a head have this shape."""
        return rows == 3 * width

    def __repr__(self) -> str:
        return (
            repr(self.name)
            if self.name
            else f"{type(self).__name__}({sorted(self.layers)}, block={self.block})"
        )

    def of(self, layer: int | None) -> Tensor:
        """Return the weights of a layer; None means the only one."""
        if layer is None and len(self.layers) == 1:
            return next(iter(self.layers.values()))
        if layer not in self.layers:
            raise SparseFlashError(
                f"gates of the layers {sorted(self.layers)}, not of {layer}: give ctx['layer'], or train one "
                "for this layer, too"
            )
        return self.layers[layer]

    def save(self, path: str | Path) -> Path:
        """Write the gates as safetensors, atomically."""
        from safetensors.torch import save_file

        told = {"format": self.form, "about": json.dumps({"block": self.block, "rotary": self.rotary})}
        with replacing(Path(path)) as at:
            save_file({f"layer.{n}": x.contiguous().cpu() for n, x in self.layers.items()}, at, told)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        SparseFlashError
            If the file does not exist or holds no gates.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                if told.get("format") != cls.form:
                    raise SparseFlashError(f"{path} holds no gates: expected what {cls.__name__}.save wrote")
                layers = {int(name.partition(".")[2]): file.get_tensor(name) for name in file.keys()}
            return cls(layers, **json.loads(told["about"]), name=str(path))
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, SparseFlashError):
                raise
            raise SparseFlashError(f"{path} holds no gates: {error}") from None


class DecodeGates(Gates):
    """Weights `[Hkv, (group + 3) D + 2, D]` of a model's decode gates, as `nn.SeerDecodeGate` learns them.

    Parameters and files are those of `Gates`; `block` is the number of keys of a page.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> sf.methods.DecodeGates({3: torch.zeros(2, 162, 32)}, rotary=False)
    DecodeGates([3], block=64)
    """

    form = "sparseflash decode gates 1"
    shape = "[KV heads, (group + 3) D + 2, D]"

    @staticmethod
    def fits(rows: int, width: int) -> bool:
        """Whether weights of a KV head have this shape, for a group of some size."""
        return rows > 3 * width + 2 and (rows - 2) % width == 0


@functools.lru_cache(8)
def loaded(path: str, stamp: int) -> Gates:
    """Load the gates of a file, cached by path and modification time."""
    return Gates.load(path)


@functools.lru_cache(8)
def loaded_decode(path: str, stamp: int) -> DecodeGates:
    """Load the decode gates of a file, cached by path and modification time."""
    return DecodeGates.load(path)

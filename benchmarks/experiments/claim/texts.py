"""Texts, and the slice of them that wants far recall."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparseflash.common.errors import SparseFlashError

FAR = 512
"""Tokens back from which on recall is far."""
CODE = ("big_bird", "led", "longformer", "reformer", "perceiver", "speecht5", "mask2former", "xlnet")
"""Models whose file in Transformers is long enough, the ones to learn from last."""


def novels(directory: Path) -> dict[str, str]:
    """Books by name, each from the last twentieth on: nothing before it is ever judged."""
    found = sorted(directory.glob("*.txt"))
    if not found:
        raise SparseFlashError(f"--books {directory}: no *.txt there; give a directory of plain-text novels")
    return {path.stem: path.read_text(encoding="utf-8", errors="replace") for path in found}


def modelling() -> dict[str, Path]:
    """Modelling files of the installed Transformers, by name."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise SparseFlashError("the modelling files are those of Transformers: pip install transformers")
    models = Path(spec.origin).parent / "models"
    return {path.stem.removeprefix("modeling_"): path for path in sorted(models.glob("*/modeling_*.py"))}


def code() -> dict[str, str]:
    """Those of `CODE`."""
    files = modelling()
    return {name: files[name].read_text(encoding="utf-8") for name in CODE if name in files}


def far(tokens: Tensor, *, behind: int = FAR, context: int = 2) -> Tensor:
    """Where the next token can be read off far away, and nowhere near.

    True at positions whose last `context` tokens stood before with the same token next, more than `behind`
    positions back, and not nearer with that token. tokens: [T]; bool [T - 1], one for each token that has a
    next one.
    """
    seen: dict[tuple[int, ...], int] = {}
    found = torch.zeros(max(0, len(tokens) - 1), dtype=torch.bool)
    plain: Sequence[int] = tokens.tolist()
    for at in range(context - 1, len(plain) - 1):
        gram = tuple(plain[at - context + 1 : at + 2])
        last = seen.get(gram)
        found[at] = last is not None and at - last > behind
        seen[gram] = at
    return found

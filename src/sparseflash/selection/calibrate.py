"""Profiles: the method and settings for each head of each layer of a model; searched once, kept in a file.

A profile is plain data and does not import methods. `methods.Profiled` turns it into a method.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import SparseFlashError
from ..common.files import replacing

Setting = Mapping[str, Any]
"""Settings of a head, `{"method": slug, field: value, ...}`; fields not named keep their defaults."""
_PATTERNS = {"vertical_and_slash": "vertical-slash", "stream_llm": "a-shape", "block_sparse": "block-sparse"}
EVERY = -1
"""Layer number that stands for every layer without an entry of its own."""
_NUMBERS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Profile:
    """The settings of every head, by layer.

    Profiles compare and hash by value, so a method that holds one identifies an experiment.

    Parameters
    ----------
    model : str
        Name of the model the profile was found for.
    layers : tuple of (int, heads)
        Layer number (-1: every layer without an entry of its own), and for each query head its setting as
        (name, value) pairs, "method" among them. `Profile.of` builds this from dictionaries.

    Examples
    --------
    >>> from sparseflash.selection.calibrate import Profile
    >>> near, far = {"method": "window", "window": 512}, {"method": "tri-shape"}
    >>> profile = Profile.of("a model", {0: [near, near, far, near]})
    >>> profile.heads(0)[2], profile.numbers
    ({'method': 'tri-shape'}, (0,))
    """

    model: str
    layers: tuple[tuple[int, tuple[tuple[tuple[str, Any], ...], ...]], ...]

    @classmethod
    def of(cls, model: str, layers: Mapping[int, Sequence[Setting]]) -> Profile:
        """Build a profile from a list of settings per layer, one for each query head."""
        made = []
        for number in sorted(layers):
            heads = layers[number]
            for head, setting in enumerate(heads):
                _check(number, head, setting)
            made.append((number, tuple(tuple(sorted(setting.items())) for setting in heads)))
        return cls(model, tuple(made))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers that have an entry."""
        return tuple(number for number, _ in self.layers)

    def heads(self, layer: int | None) -> list[dict[str, Any]]:
        """The setting of each query head of a layer.

        Raises
        ------
        SparseFlashError
            If the profile has no entry for that layer.
        """
        known = dict(self.layers)
        heads = known.get(layer, known.get(EVERY)) if layer is not None else known.get(EVERY)
        if heads is not None:
            return [dict(setting) for setting in heads]
        raise SparseFlashError(
            f"the profile of {self.model!r} knows the layers {list(self.numbers)}, not {layer!r}: give "
            'ctx["layer"], or search again with this layer'
        )

    def save(self, path: str | Path) -> Path:
        """Write the profile as JSON, {model, layers: {layer: {head: {method, field: value}}}}, atomically."""
        path = Path(path)
        layers = {
            str(number): {str(head): dict(setting) for head, setting in enumerate(heads)}
            for number, heads in self.layers
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"model": self.model, "layers": layers}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` wrote.

        Raises
        ------
        SparseFlashError
            If the file is no profile; the message names the file and what is wrong in it.
        """
        given = _read(path)
        try:
            model, layers = given["model"], given["layers"]
            found = {int(number): _in_order(heads, number) for number, heads in layers.items()}
            return cls.of(str(model), found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SparseFlashError(
                f"{path}: no profile ({error!r}): expected {{model, layers: {{layer: {{head: setting}}}}}}"
            ) from None

    @classmethod
    def from_minference(cls, source: str | Path | Sequence[Any], model: str = "") -> Profile:
        """Convert a file published by MInference: for each layer `{head: [type, vertical, slash, score]}`.

        Its `stream_llm` is the a-shape of `minference`: `vertical` sink keys and a window of `slash` keys.
        """
        given = _read(source) if isinstance(source, (str, Path)) else source
        if not isinstance(given, (list, tuple)):
            raise SparseFlashError(
                f"{source!s:.80}: expected a list with {{head: [type, v, s, score]}} a layer"
            )
        layers = {}
        for number, heads in enumerate(given):
            try:
                rows = _in_order(heads, number)
                layers[number] = [
                    {
                        "method": "minference",
                        "pattern": _PATTERNS[kind],
                        **({} if kind == "block_sparse" else {"vertical": int(v), "slash": int(s)}),
                    }
                    for kind, v, s, *_ in rows
                ]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise SparseFlashError(
                    f"{source!s:.80}, layer {number}: {error!r}; expected {{head: [type, v, s, score]}} with "
                    f"the types {', '.join(_PATTERNS)}"
                ) from None
        return cls.of(model or (Path(source).stem if isinstance(source, (str, Path)) else ""), layers)


def search(
    model: str,
    layers: Iterable[int],
    candidates: Sequence[Setting],
    score: Callable[[int, Setting], Sequence[float]],
    *,
    path: str | Path | None = None,
    progress: bool = True,
) -> Profile:
    """Choose the best-scoring candidate for every head; saves after each layer and resumes from `path`.

    Parameters
    ----------
    model : str
        Name of the model; a file at `path` that names another model is an error.
    layers : iterable of int
        Layer numbers to search.
    candidates : sequence of settings
        `{"method": slug, field: value, ...}`; equal scores take the earlier candidate. Candidates should cost
        alike, or their cost be part of the score.
    score : callable
        (layer, candidate) -> one number per query head; larger is better, NaN is worst.
    path : path, optional
        Profile file to write after each layer and to resume from.
    progress : bool
        Whether to show a progress bar on a terminal.

    Examples
    --------
    >>> from sparseflash.selection.calibrate import search
    >>> sizes = [{"method": "window", "window": n} for n in (64, 256)]
    >>> found = search("a model", [0], sizes, lambda layer, s: [s["window"], -s["window"]], progress=False)
    >>> [s["window"] for s in found.heads(0)]
    [256, 64]
    """
    wanted = list(layers)
    if not candidates:
        raise SparseFlashError("search(): no candidates; expected at least one {'method': slug, ...}")
    known: dict[int, list[dict[str, Any]]] = {}
    if path is not None and Path(path).exists():
        before = Profile.load(path)
        if before.model != model:
            raise SparseFlashError(f"{path} is of {before.model!r}, not of {model!r}: give another path")
        known = {number: before.heads(number) for number in before.numbers}
    left = [number for number in wanted if number not in known]
    with _bar(len(left) * len(candidates), progress) as step:
        for number in left:
            scores = []
            for candidate in candidates:
                scores.append([float(x) for x in score(number, candidate)])
                step(f"layer {number}")
            if len({len(row) for row in scores}) > 1:
                raise SparseFlashError(f"layer {number}: scores for {[len(r) for r in scores]} heads")
            known[number] = [dict(candidates[_best(column)]) for column in zip(*scores, strict=True)]
            if path is not None:
                Profile.of(model, known).save(path)
    return Profile.of(model, {number: known[number] for number in wanted})


def _best(column: Sequence[float]) -> int:
    return max(range(len(column)), key=lambda n: (column[n] == column[n], column[n], -n))


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that advances a progress bar; a no-op unless a bar is wanted and rich is installed."""
    try:
        from rich.progress import Progress
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda said: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("searching", total=total)
        yield lambda said: bar.update(task, advance=1, description=said)


def _check(layer: int, head: int, setting: Setting) -> None:
    if not isinstance(setting, Mapping) or not isinstance(setting.get("method"), str):
        raise SparseFlashError(
            f"layer {layer}, head {head}: {setting!r}; expected {{'method': slug, field: value, ...}}"
        )
    for name, value in setting.items():
        if not isinstance(name, str) or not isinstance(value, _NUMBERS):
            raise SparseFlashError(
                f"layer {layer}, head {head}: {name}={value!r}; expected a number, text, True, False or None"
            )


def _in_order(heads: Mapping[str, Any], layer: object) -> list[Any]:
    """Values ordered by head number; the numbers must be 0, 1, ..., n - 1."""
    found = {int(head): x for head, x in heads.items()}
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"layer {layer} has the heads {sorted(found)}")
    return [found[head] for head in range(len(found))]


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else f"no JSON ({error})"
        raise SparseFlashError(f"{path}: {said}; expected a profile") from None

"""Efficient-vDiT on moving digits: fewer steps, fewer frames, and which of the two gains what.

A small video transformer learns the flow from noise to videos (`train`). `stages` then does what the paper
does (Ding et al., arXiv 2502.06155): consistency distillation in segments, so that few steps of the sampler
are enough; a search of the reference frames of each layer; distillation of the sparse model. Each row is
judged by the videos that come from the same noise.

`time` times whole generations and attention alone: the gain of fewer steps and that of attention stand in
columns of their own. `capture` asks what other methods find in the queries and keys of the trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseflash.bench.results import Row

from ..claim import rows
from . import capture, stages
from .stages import Settings, Study

__all__ = ["Settings", "Study", "kept", "measure"]


def kept(known: Sequence[Row], settings: Settings, parts: Sequence[str]) -> list[Row]:
    """The known rows that stay: times are measured together, or not at all."""
    again = "time" in parts
    return [x for x in known if not (again and x["part"] == "time" and x["study"] == repr(settings))]


def measure(
    images: Tensor,
    settings: Settings,
    *,
    parts: Sequence[str],
    folder: Path | None = None,
    known: Sequence[Mapping[str, Any]] = (),
    rounds: int = 5,
    minutes: float = 4.0,
    large: tuple[int, int, int] = stages.LARGE,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Rows of the parts, those left out that are known; models stay in `folder`."""
    study = Study(images, settings, folder, on_run)
    jobs = stages.jobs(study, parts) + (capture.jobs(study) if "capture" in parts else [])
    yield from rows.measure(rows.unfinished(jobs, known), on_run=on_run)
    if "time" in parts:
        yield from stages.times(study, large=large, rounds=rounds, minutes=minutes, on_run=on_run)

"""LServe: streaming heads, and heads that read pages selected by bounds of the pages' parts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..cache import PageBounds, Summary
from ..common.errors import SparseFlashError, require
from .base import check_counts
from .reading import ReadingMethod


@dataclass(frozen=True)
class LServe(ReadingMethod):
    """Some KV heads see only first and near pages; the others read the pages whose parts score best.

    Large pages are read faster than small ones, but their bounds are loose. So a page is scored by the bounds
    of its parts: its score is that of the best part. Training a gate for each head (DuoAttention) finds the
    heads that stream: **sparseflash calibrate lserve** writes a file that `streaming_heads` reads.

    Paper: Yang et al., "LServe", arXiv 2502.14866, sections 3.3 and 3.4: physical pages of 64, logical of 16.

    Parameters
    ----------
    streaming : tuple of int
        KV heads that stream.
    part : int
        Keys of a part; divides the page.
    local : int
        Near pages of heads that stream; their first pages are `sinks`.
    budget, page, sinks, near, share
        As in every method that reads pages (`ReadingMethod`).

    Notes
    -----
    `ctx` keys: `q_offset` and `cache`, as for `Quest`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 2, 2048, 64)
    >>> method = sf.methods.LServe(streaming=(1,), budget=512)
    >>> method(q, k, v, q_offset=2047).shape
    torch.Size([1, 4, 1, 64])
    """

    streaming: tuple[int, ...] = ()
    part: int = 16
    local: int = 4
    page: int = field(default=64, kw_only=True)
    sinks: int = field(default=1, kw_only=True)
    budget: int = field(default=4096, kw_only=True)

    paper = "arXiv 2502.14866"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, 1, "part", "local")
        require(
            (self.page % self.part == 0, lambda: f"part={self.part}: expected a divisor of page={self.page}"),
            (
                bool(self.share) or not self.streaming,
                "streaming names KV heads: share='sum' or 'max'",
            ),
        )

    def summary(self, k: Tensor) -> Summary:
        """Summarise pages by the bounds of each channel in each part."""
        return PageBounds(self.part)

    def closed(self, heads: int) -> tuple[tuple[int, int], ...]:
        """Heads that stream, with their near pages."""
        require(
            (
                all(head < heads for head in self.streaming),
                lambda: f"streaming={self.streaming}: k has {heads} heads, 0..{heads - 1}",
            )
        )
        return tuple((head, self.local) for head in self.streaming)


def streaming_heads(path: str | Path, share: float = 0.5) -> dict[int, tuple[int, ...]]:
    """Read the KV heads that stream, by layer, from a gates file of **sparseflash calibrate lserve**.

    Parameters
    ----------
    path : str or Path
    share : float
        Share of all KV heads of all layers that stream: those with the smallest gates.

    Examples
    --------
    >>> import json, tempfile, sparseflash as sf
    >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    ...     _ = file.write(json.dumps({"gates": {"0": [0.1, 0.9], "1": [0.2, 0.3]}}))
    ...     file.flush()
    ...     heads = sf.methods.streaming_heads(file.name)
    >>> heads, {n: sf.methods.LServe(streaming=own).streaming for n, own in heads.items()}
    ({0: (0,), 1: (0,)}, {0: (0,), 1: (0,)})
    """
    try:
        gates = json.loads(Path(path).read_text(encoding="utf-8"))["gates"]
        each = sorted((float(x), int(n), head) for n, own in gates.items() for head, x in enumerate(own))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SparseFlashError(
            f"{path}: no gates ({error!r}); expected a file of sparseflash calibrate lserve"
        ) from None
    require((0 <= share <= 1, lambda: f"share={share!r}: expected a number in [0, 1]"))
    least = {(n, head) for _, n, head in each[: int(share * len(each))]}
    return {
        int(n): tuple(head for head in range(len(own)) if (int(n), head) in least)
        for n, own in sorted(gates.items(), key=lambda pair: int(pair[0]))
    }

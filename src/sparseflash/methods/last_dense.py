"""LastDense: any method, but the last queries (a prompt's question) see everything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan, Plans
from ..plan.options import multiple
from .base import Context, Method, Selection, check_counts


@dataclass(frozen=True)
class LastDense(Method):
    """The last queries of a prompt see everything before them, the others what a method selects.

    Methods that score blocks by their means miss the single keys that a question asks for; a few dense rows
    cost next to nothing and find them.

    Papers: the dense last rows of SCBench's tri-shape, arXiv 2412.10319, and of XAttention's released code,
    arXiv 2503.16428.

    Parameters
    ----------
    method : Method
        Method that selects for the other queries.
    rows : int
        Last queries of a call that see everything, rounded up to whole tiles of the method.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, and the `reads` of the method (`scale`,
    `softcap`). A key_bias of the method applies to the dense rows too.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.LastDense(sf.methods.BlockTopK(blocks=2, block=64), rows=64)
    >>> seen = method.select(q, k).plan.to_dense()[0, 0].sum(-1)
    >>> int(seen[500]) < 300, seen[-64:].tolist() == list(range(961, 1025))
    (True, True)
    """

    method: Method | None = None
    rows: int = 64

    reads = ("q_offset",)
    paper = "arXiv 2412.10319"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_counts(self, 0, "rows")
        if not (self.method is None or isinstance(self.method, Method)):
            raise SparseFlashError(f"method={self.method!r}: expected a method, such as BlockTopK()")
        inner = () if self.method is None else self.method.reads
        self._set(reads=tuple(dict.fromkeys((*type(self).reads, *inner))))

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select with the method for all but the last rows, and add a dense plan for these."""
        if self.method is None:
            raise SparseFlashError("LastDense() has no method: expected LastDense(BlockTopK()), for example")
        selection = self.method.select(q, k, ctx)
        if self.rows == 0:
            return selection
        if selection.inputs is not None:
            raise SparseFlashError(f"{self.method!r} attends other rows than it is given: none are dense")
        if selection.skip_below is not None:
            raise SparseFlashError(f"{self.method!r} lets the kernel skip blocks of any row: none are dense")
        own = selection.plan if isinstance(selection.plan, (tuple, list)) else (selection.plan,)
        Tq, Tk, tile = q.shape[2], k.shape[2], multiple(*(plan.tile for plan in own))
        first = max(0, Tq - self.rows) // tile * tile
        ends = torch.zeros(-(-Tq // tile), 1, 2, dtype=torch.int64, device=q.device)
        ends[first // tile :, :, 1] = Tk
        at = (ctx or {}).get("q_offset", 0)
        dense = Plan.from_spans(ends[None, None], Tq=Tq, Tk=Tk, tile=tile, causal=True, q_offset=at)
        return dataclasses.replace(selection, plan=Plans((*(_before(first, one) for one in own), dense)))

    def notes(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> dict[str, Tensor]:
        """Delegate to the method."""
        return {} if self.method is None else self.method.notes(q, k, ctx)

    def observe(
        self, q: Tensor, k: Tensor, out: Tensor, lse: Tensor, selection: Selection, ctx: Context
    ) -> Any:
        """Delegate to the method."""
        assert self.method is not None
        return self.method.observe(q, k, out, lse, selection, ctx)


def _before(first: int, plan: Plan) -> Plan:
    """Restrict the plan to tokens before `first`, the first dense one, where a tile begins."""
    if plan.q_order is not None:
        return plan._changed(q_order=torch.where(plan.q_order < first, plan.q_order, -1))
    there = torch.arange(-(-plan.Tq // plan.tile), device=plan.device) * plan.tile < first
    some = {lists.NAMES[own]: getattr(lists, own) for lists in plan.lists() for own in ("count", "full")}
    return plan._changed(**{name: torch.where(there, x, 0) for name, x in some.items()})

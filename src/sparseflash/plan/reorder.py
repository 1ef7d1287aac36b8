"""Row orders that gather scattered pairs into fewer tiles (`Plan.reordered`). SciPy is imported on use."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..common.errors import PlanError
from .entries import cells, ranges
from .figures import visited_area
from .make.sparse import of_pairs
from .record import Record

P = TypeVar("P", bound=Record)


def reordered(plan: P) -> P:
    """`Plan.reordered`."""
    head, q, k = _pairs(plan)
    batch, heads = plan.extent()
    square = plan.Tq == plan.Tk
    q_order, k_order = _cuthill_mckee(head, q, k, (batch, heads, plan.Tq, plan.Tk), square=square)
    q_row, k_row = (torch.argsort(x, dim=-1) for x in (q_order, k_order))
    lists = of_pairs(
        head,
        q_row[head, q],
        k_row[head, k],
        (batch, heads),
        Tq=plan.Tq,
        Tk=plan.Tk,
        tile=plan.tile,
        unit=plan.unit,
    )
    moved = type(plan)(
        plan.Tq,
        plan.Tk,
        plan.tile,
        plan.unit,
        q_order=q_order.view(batch, heads, -1).int(),
        k_order=k_order.view(batch, heads, -1).int(),
        **lists,
    )
    if visited_area(moved) >= visited_area(plan):
        return plan
    return moved._changed(**{name: x.to(plan.device) for name, x in moved.tensors().items()})


def _pairs(plan: Record) -> tuple[Tensor, Tensor, Tensor]:
    """List (b * H + h), query token and key token of every visible pair, on the CPU."""
    heads = plan.extent()[1]
    found: list[tuple[Tensor, ...]] = []
    entries = ranges(plan)
    for part in cells(plan, entries.of(entries.hi > entries.lo)):
        lane, row = part.keep.nonzero(as_tuple=True)
        list_ = (part.batch * heads + part.head)[lane]
        found.append((list_.cpu(), part.q_token[lane, row].cpu(), part.k_token[lane].cpu()))
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    head, q, k = (torch.cat([none, *x]) for x in (zip(*found, strict=True) if found else ((), (), ())))
    return head, q, k


def _cuthill_mckee(
    head: Tensor, q: Tensor, k: Tensor, shape: tuple[int, int, int, int], *, square: bool
) -> tuple[Tensor, Tensor]:
    """Sort the tokens of each list in reverse Cuthill-McKee order: queries [B*H,Tq] and keys [B*H,Tk].

    All lists form one graph without edges between lists; a stable sort by list separates them again. If Tq =
    Tk a token is one vertex and the edges are symmetrised (M or its transpose); otherwise queries and keys
    are the two sides of a bipartite graph.
    """
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import reverse_cuthill_mckee
    except ImportError:
        raise PlanError("plan.reordered() needs SciPy; install: pip install 'sparseflash[masks]'") from None
    batch, heads, Tq, Tk = shape
    lists, wide = batch * heads, Tq if square else Tq + Tk
    n = lists * wide
    a, b = head * wide + q, head * wide + k + (0 if square else Tq)
    ones = torch.ones(2 * len(a), dtype=torch.int8, device="cpu")
    pair = torch.cat([a, b]).int().numpy(), torch.cat([b, a]).int().numpy()
    graph = coo_array((ones.numpy(), pair), shape=(n, n)).tocsr()
    vertex = torch.from_numpy(reverse_cuthill_mckee(graph, symmetric_mode=True).copy()).long()
    vertex = vertex[torch.argsort(vertex // wide, stable=True)].view(lists, wide) % wide
    if square:
        return vertex, vertex
    first = torch.argsort((vertex >= Tq).int(), dim=-1, stable=True)
    vertex = vertex.gather(1, first)
    return vertex[:, :Tq], vertex[:, Tq:] - Tq

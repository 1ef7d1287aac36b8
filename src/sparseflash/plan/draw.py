"""Draw a plan as text or as a picture. Large plans are sampled: the cost does not grow with Tq x Tk."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import PlanError, require
from ..common.files import write
from .entries import ranges
from .figures import density, extent_of, kept, partial_area, parts_of, work
from .lookup import Lookup
from .record import Record

Parts = Record | tuple[Record, ...]
"""A plan, or the plans of one softmax."""

SHADES = " ░▒▓█"
SAMPLES = 16
"""Queries, and keys, sampled in each cell of a picture; a cell of at most that many is exact."""
EXACT = 1 << 24
"""A picture's title states the kept share only if partial entries hold at most this many pairs."""


@dataclass(frozen=True)
class Picture:
    """Cells of one (batch, head): the share of visible pairs, and whether a listed range touches the cell."""

    share: Tensor
    touched: Tensor


def picture(plans: Parts, rows: int, columns: int, *, batch: int = 0, head: int = 0) -> Picture:
    """Sample a head into at most `rows` x `columns` cells: queries downwards, keys to the right."""
    parts = parts_of(plans)
    plan, heads = parts[0], extent_of(parts)[1]

    def own(one: Record) -> tuple[int, int]:
        """Batch slot and list head of a plan that serve the requested batch slot and head."""
        batches, few = one.extent()
        return min(batch, max(batches - 1, 0)), head * few // heads

    with torch.device("cpu"):  # on the CPU, whatever `torch.set_default_device` says
        rows, columns = min(rows, plan.Tq), min(columns, plan.Tk)
        if not rows or not columns:
            return Picture(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool))
        generator = torch.Generator().manual_seed(0)
        q, q_cell = _some(plan.Tq, rows, generator)
        k, k_cell = _some(plan.Tk, columns, generator)
        at = q.to(plan.device), k.to(plan.device)
        seen, near = [], []
        for one in parts:
            b, h = own(one)
            place = [torch.tensor(x, device=one.device) for x in (b, h)]
            seen.append(Lookup(one, one.extent()[1])(place[0], place[1], at[0][:, None], at[1]))
            near.append(_touched(one, rows, columns, b, h))
        keep, touched = torch.stack(seen).any(0).float().cpu(), torch.stack(near).any(0)
        share = torch.zeros(rows, len(k)).index_add_(0, q_cell, keep)
        share = torch.zeros(rows, columns).index_add_(1, k_cell, share)
        looked = torch.bincount(q_cell, minlength=rows)[:, None] * torch.bincount(k_cell, minlength=columns)
        return Picture(share / looked, (share > 0) | touched)


def _some(T: int, cells: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Divide T tokens into `cells` cells; return up to SAMPLES tokens of each cell, and their cells."""
    edge = torch.arange(cells + 1) * T // cells
    size = edge[1:] - edge[:-1]
    if int(size.max()) <= SAMPLES:
        token = torch.arange(T)
        return token, torch.searchsorted(edge, token, right=True) - 1
    slot = (torch.arange(SAMPLES) + torch.rand(cells, SAMPLES, generator=generator)) / SAMPLES
    token = (edge[:-1, None] + (slot * size[:, None]).long().clamp(max=size[:, None] - 1)).flatten()
    return token, torch.arange(cells).repeat_interleave(SAMPLES)


def _touched(plan: Record, rows: int, columns: int, batch: int, head: int) -> Tensor:
    """Mark cells that a listed range reaches, if cells are much larger than a tile: samples may miss bands.

    No cell is marked if the plan has row orders, because ranges of rows are then no ranges of tokens.
    """
    marks = torch.zeros(rows, columns + 1, dtype=torch.int64)
    coarse = max(plan.Tq / rows, plan.Tk / columns) > 2 * plan.tile
    if plan.q_order is not None or plan.k_order is not None or not coarse:
        return marks[:, :columns] > 0
    heads = plan.extent()[1]
    entries = ranges(plan)
    own = (entries.cell // plan.tiles == batch * heads + head) & (entries.hi > entries.lo)
    tile, lo, hi = (x[own].cpu() for x in (entries.cell % plan.tiles, entries.lo, entries.hi))
    last_query = torch.minimum((tile + 1) * plan.tile, torch.tensor(plan.Tq)) - 1
    one = torch.ones_like(tile)
    for query in (tile * plan.tile, last_query):  # mark the rows of cells that hold a tile's ends
        place = query * rows // plan.Tq
        marks.index_put_((place, lo * columns // plan.Tk), one, accumulate=True)
        marks.index_put_((place, (hi - 1) * columns // plan.Tk + 1), -one, accumulate=True)
    return marks.cumsum(-1)[:, :columns] > 0


def _title(plans: Parts) -> str:
    parts = parts_of(plans)
    head = f"{parts[0].Tq:,} queries x {parts[0].Tk:,} keys"
    if sum(map(partial_area, parts)) <= EXACT:
        return f"{head}, kept {kept(plans):.3f}, work {work(plans):.3f}"
    return f"{head}, work {work(plans):.3g}"


def draw(plan: Parts, width: int = 48) -> str:
    """Draw the first batch and head, queries downwards; a character's shade is the share of visible pairs."""
    seen = picture(plan, max(1, width // 2), width)
    level = (seen.share * (len(SHADES) - 1)).ceil().long().clamp(max=len(SHADES) - 1)
    level = torch.where(seen.touched, level.clamp(min=1), level)
    lines = ["".join(SHADES[x] for x in line) for line in level.tolist()]
    return "\n".join([repr(plan), _title(plan), *lines])


def plot(plan: Parts, path: str | Path, *, batch: int = 0, head: int = 0, size: int = 128) -> Path:
    """Write the picture of a plan; see `Plan.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise PlanError("plan.plot() needs matplotlib; install: pip install 'sparseflash[train]'") from None
    path = Path(path)
    batches, heads = extent_of(plan)
    one = parts_of(plan)[0]
    require(
        (
            path.suffix.lower() in (".png", ".svg", ".pdf"),
            lambda: f"path={str(path)!r}: expected a .png, .svg or .pdf file",
        ),
        (0 <= batch < max(batches, 1), lambda: f"batch={batch}: the plan has {batches}"),
        (0 <= head < heads, lambda: f"head={head}: the plan has {heads}"),
        error=PlanError,
    )
    seen = picture(plan, size, size, batch=batch, head=head)
    empty, some, full = "#ffffff", ("#cfe3f1", "#5b9bd0"), "#0b3c68"
    ramp = LinearSegmentedColormap.from_list("share", some)
    shade = torch.from_numpy(ramp(seen.share.numpy())[..., :3])
    colour = {c: torch.tensor([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for c in (empty, full)}
    shade[seen.share >= 1] = colour[full].to(shade.dtype)
    shade[~seen.touched & (seen.share == 0)] = colour[empty].to(shade.dtype)
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if shade.numel():
        axes.imshow(shade.numpy(), extent=(0, one.Tk, one.Tq, 0), aspect="auto", interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(_title(plan), fontsize=10)
    names = ((full, "all pairs"), (some[1], "some"), (empty, "none"))
    axes.legend(
        handles=[Patch(facecolor=c, edgecolor="#888888", label=n) for c, n in names],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=144, format=path.suffix[1:])
    write(path, drawn.getvalue())
    return path


def explain(plan: Record) -> str:
    """`Plan.explain`."""
    batch, heads = plan.extent()
    entries = ranges(plan)
    size = entries.hi - entries.lo
    area = int(size.sum())
    sure = int(size[entries.full].sum())
    count = batch * heads
    memory = sum(x.numel() * x.element_size() for x in plan.tensors().values())
    per = len(entries.lo) / max(plan.tiles * count, 1)
    lines = [
        f"{plan.Tq} queries x {plan.Tk} keys, {count} list{'s' if count > 1 else ''} of {plan.tiles} tiles "
        f"({plan.tile} rows each)",
        f"rows: {plan.q_rows} of queries, {plan.k_rows} of keys"
        + (", ordered" if plan.q_order is not None or plan.k_order is not None else ""),
        f"entries: {len(entries.lo)} ({per:.1f} a tile); "
        f"of the keys visited {sure / max(area, 1):.0%} need no element test",
        f"kept {kept(plan):.4f} of all pairs{' that are causal' if plan.causal else ''}, density "
        f"{density(plan):.4f} of what its window rules allow too; work {work(plan):.4f} of Tq x Tk",
        f"memory {memory / 2**20:.2f} MiB",
    ]
    return "\n".join(lines)

"""`Plan`: which keys each tile of queries sees, the one object between method and kernel; and `Plans`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..common.errors import PlanError
from . import algebra, beside, checks, draw, entries, figures, flex, reorder, restrict, saved, transpose
from .constructors import Constructors
from .options import head_rules, host, normal_offset
from .record import KeyLists
from .requirements import faults


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Constructors):
    """A sparse attention pattern of one softmax: spans and gathered units for each query tile, then rules.

    Build a plan with a constructor (`dense`, `from_keep`, `from_buckets`, `from_mask`, ...) or from
    the lists themselves. A query sees a key when an entry of its tile's lists covers the key and every rule
    that is set holds (`docs/design.md` has the formula). Tensors are int32, the three `start`s int64; a batch
    axis is B or 1, a head axis any divisor of the number of query heads (list head = `hq * H // Hq`).
    Creation checks the range of values in CPU tensors; `check` checks more, on any device. `torch.save`
    writes plans; `torch.load` reads them with its safe default, `weights_only=True`, and checks them.

    Parameters
    ----------
    Tq, Tk : int
        Numbers of query and key tokens.
    tile, unit : int
        Consecutive rows that share one list; consecutive keys that one `index` entry names.
    span_start, span_full, span_count : Tensor, [B, H, R]
        Where a tile's list begins in `spans`, how many of its first ranges are full (need no element test),
        and its length.
    spans : Tensor, [Ns, 2] int32
        Key ranges `[lo, hi)` in row space.
    start, full, count : Tensor, [B, H, R]
        The same for a tile's list in `index`.
    index : Tensor, [Nu] int32
        Unit numbers: unit u holds key rows `u * unit ... u * unit + unit - 1`.
    bits, bits_start : Tensor
        `[Nb, tile, ceil(unit / 32)]` int32 words of the partial units of a tile, in list order from
        `bits_start [B, H, R]`.
    q_order, k_order : Tensor, [B, H, rows] int32
        Token of each row; -1 is an empty lane. Injective. None: rows are tokens.
    q_offset : int or Tensor
        Position of the first query (0-d or [B] int32 tensor); used where `q_pos` is None.
    causal, include_self : bool
        Keep `q_pos >= k_pos` (`>` without `include_self`; without `causal`, `!=`).
    window : (left, right) or None
        Inclusive distances, None = unbounded: keep `q_pos - left <= k_pos <= q_pos + right`.
    sink : int
        Keys at positions below it are exempt from the window (only).
    head_window, head_sink : Tensor, [1, H, 2] and [1, H, 1] int32
        Window (left, right; -1 = unbounded) and sink of each head; made of a `window` or `sink` that holds
        tensors [H].
    overflow : Tensor, 0-d int32
        Not 0 if entries were dropped because lists have a static capacity (`check` then raises).
    q_pos, k_pos, k_end, q_seg, k_seg : Tensor, [B, H, T] int32, token space
        Positions, key expiry (a key is seen by `q_pos < k_end`), segments (`ANY` matches all, `NONE` is
        padding).

    Examples
    --------
    >>> import sparseflash as sf
    >>> plan = sf.Plan.dense(512, 512, causal=True, window=(127, 0), sink_tokens=4)
    >>> round(plan.density, 3)
    1.0
    """

    def __post_init__(self) -> None:
        window, sink, head_window, head_sink = head_rules(self.window, self.sink)
        own: dict[str, Any] = {"window": window, "sink": sink, "q_offset": normal_offset(self.q_offset)}
        if head_window is not None:
            own |= {"head_window": head_window, "head_sink": head_sink}
        vars(self).update(own)
        for fault in faults(self):
            raise PlanError(fault)
        if all(host(x) for x in self.tensors().values()):
            checks.check_values(self)
        self._told()

    def __getstate__(self) -> dict[str, Any]:
        return saved.state(self)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(saved.restored(type(self), state))
        self._told()

    def to_block_mask(self, block: int = 128) -> Any:
        """The plan as a FlexAttention `BlockMask` (plans without row orders)."""
        return flex.to_block_mask(self, block)

    # ---------------------------------------------------------------- algebra

    @classmethod
    def by_head(cls, plans: Sequence[Plan], heads: Sequence[int | Sequence[int]] | None = None) -> Plan:
        """Concatenate plans along heads, so that different heads follow different plans in one call.

        Parameters
        ----------
        plans : list of Plan
            Plans for the same tokens; each may have lists, rules and orders of its own.
        heads : list, optional
            For each plan how many query heads follow it (consecutive ones), or the list of these heads; the
            number is a multiple of the plan's own number of heads. None: as many as the plan has.

        Returns
        -------
        Plan
            A plan for the sum of these heads; gradients are exact.

        Examples
        --------
        Three heads of a causal window, and one that sees all keys before it.

        >>> import sparseflash as sf
        >>> near = sf.Plan.dense(256, 256, causal=True, window=(31, 0))
        >>> plan = sf.Plan.by_head([near, sf.Plan.dense(256, 256, causal=True)], heads=[3, 1])
        >>> plan.to_dense()[0].sum((1, 2)).tolist()
        [7696, 7696, 7696, 32896]
        """
        return beside.by_head(plans, heads)

    @classmethod
    def from_lists(
        cls,
        *,
        spans: Tensor | Plan,
        index: Tensor | Plan,
        disjoint: bool = False,
        **frame: Any,
    ) -> Plan:
        """Combine ranges and gathered keys of each tile in one plan, from ready lists.

        Attention over this plan costs less than over a tuple of two plans.

        Parameters
        ----------
        spans : Tensor or Plan
            Ranges as `from_spans` takes them, or a plan that has spans only.
        index : Tensor or Plan
            Keys as `from_keys` takes them, or a plan that has units only; rules and tiles equal those of
            `spans`.
        disjoint : bool
            A promise that no key of a tile is in both. Without it CPU tensors are checked, and an overlap
            raises.
        frame
            Tq, Tk, tile (1 by default), causal, q_offset, q_order, k_order, capacity and the unit of `index`
            (1 by default), as in `from_spans` and `from_keys`; defaults come from a given plan.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> spans, index = torch.tensor([[[[[0, 2]]]]]), torch.tensor([[[[3, 5]]]])
        >>> sf.Plan.from_lists(spans=spans, index=index, Tq=1, Tk=6).to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 1, 0, 1]]
        """
        for plan in (spans, index):
            if isinstance(plan, Plan):
                own = ("Tq", "Tk", "tile", "causal", "q_offset", "q_order", "k_order")
                frame = {n: getattr(plan, n) for n in own} | frame
        frame = {"tile": 1} | frame
        if not isinstance(spans, Plan):
            spans = cls.from_spans(spans, **{n: x for n, x in frame.items() if n != "unit"})
        if not isinstance(index, Plan):
            index = cls.from_keys(index, **frame)
        return algebra.joined(spans, index, disjoint=disjoint)

    def retile(self, tile: int, unit: int | None = None) -> Plan:
        """Return a plan of exactly the same visible pairs with other tile and unit sizes.

        Examples
        --------
        >>> import sparseflash as sf
        >>> plan = sf.Plan.dense(300, 300, causal=True)
        >>> bool((plan.retile(64, 16).to_dense() == plan.to_dense()).all())
        True
        """
        return algebra.retile(self, tile, self.unit if unit is None else unit)

    @classmethod
    def _together(cls, plans: Sequence[Plan]) -> Plans:
        return Plans(plans)

    def with_rules(self, **rules: Any) -> Plan:
        """Replace rules under the same lists; entries that cease to be full become partial (tested).

        Parameters
        ----------
        rules
            Fields of a plan that are rules: causal, include_self, window, sink, q_offset, q_pos, k_pos,
            k_end, q_seg, k_seg. Rules not given stay; None removes a rule.

        Notes
        -----
        `dataclasses.replace` would leave full entries full, and so skip the new rules there. On an
        accelerator every entry becomes partial, because deciding would synchronise (with bits, the call
        synchronises anyway).

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> plan = sf.Plan.from_blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), Tq=3, Tk=3, tile=3, unit=3)
        >>> plan.with_rules(causal=True, window=(1, 0)).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        """
        return algebra.with_rules(self, rules)

    def restrict(self, q_tokens: Tensor | None = None, k_tokens: Tensor | None = None) -> Plan:
        """Restrict the plan to some queries and keys, exactly: one rank's share of distributed attention.

        Works on the lists; nothing of size Tq x Tk is made. Reads values, so it synchronises.

        Parameters
        ----------
        q_tokens, k_tokens : Tensor, optional
            Integers `[n]`, each token once: query i of the new plan is `q_tokens[i]` of this one. None: all.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> plan = sf.Plan.dense(6, 6, causal=True)
        >>> plan.restrict(torch.tensor([4, 5]), torch.tensor([0, 3, 5])).to_dense()[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 1]]
        """
        return restrict.restrict(self, q_tokens, k_tokens)

    def reordered(self) -> Plan:
        """Permute the rows of the plan so that its tiles visit fewer pairs, if that helps. Needs SciPy.

        Reverse Cuthill-McKee brings the pairs of a scattered mask close to a diagonal. Attention results do
        not change; a plan that would gain nothing is returned as it is. Work and memory follow the visible
        pairs, so call this once, on the host, and use the result in all layers and steps.

        Source: Sharma and Geiping, arXiv 2409.15097, section on extremely sparse masks.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> token = torch.randperm(1024)
        >>> band = (token[:, None] - token).abs() < 8
        >>> plan = sf.Plan.from_mask(band)
        >>> plan.work, plan.reordered().work < 0.4  # doctest: +SKIP
        (1.0, True)
        """
        return reorder.reordered(self)

    def __and__(self, other: Plan) -> Plan:
        """Return exactly the pairs visible in both plans."""
        both: Plan = self._with(other, "intersect")
        return both

    def __sub__(self, other: Plan) -> Plan:
        """Return exactly the pairs visible in this plan and not in the other."""
        rest: Plan = self._with(other, "subtract")
        return rest

    def __or__(self, other: Plan) -> Plan | Plans:
        """Return the pairs of either plan: one plan if one contains the other, else two disjoint `Plans`."""
        union = self._with(other, "unite")
        return Plans(union) if len(union) > 1 else union[0]

    def _with(self, other: Any, operation: str) -> Any:
        if not isinstance(other, Plan):
            given = "a tuple of plans" if isinstance(other, tuple) else f"a {type(other).__name__}"
            raise PlanError(
                f"a plan combines with a plan, not with {given}: combine the plans of a tuple one by one"
            )
        return getattr(algebra, operation)(self, other)

    def explain(self) -> str:
        """Describe rows, tiles, entries, density, work and memory as text. Synchronises.

        Examples
        --------
        >>> import sparseflash as sf
        >>> print(sf.Plan.dense(256, 256, causal=True).explain().splitlines()[0])
        256 queries x 256 keys, 1 list of 2 tiles (128 rows each)
        """
        return draw.explain(self)

    # ---------------------------------------------------------------- identity

    def _static(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in dataclasses.fields(self) if f.compare)
        return tuple(type(v).__name__ if isinstance(v, (Tensor, KeyLists)) else v for v in values)

    def __hash__(self) -> int:
        return hash(self._static())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan) or self._static() != other._static():
            return False
        mine, theirs = self.tensors(), other.tensors()
        return self.device == other.device and all(torch.equal(x, theirs[n]) for n, x in mine.items())

    def __repr__(self) -> str:
        said = [f"Tq={self.Tq}", f"Tk={self.Tk}", f"tile={self.tile}", f"unit={self.unit}"]
        said += [n for n in ("causal",) if getattr(self, n)]
        said += [f"include_self={self.include_self}"] if not self.include_self else []
        said += [f"window={self.window}"] if self.window else []
        said += [f"sink={self.sink}"] if self.sink else []
        said += [f"{n}{list(x.shape)}" for n, x in self.tensors().items() if n not in ("span_full", "full")]
        return f"Plan({', '.join(said)})"

    def __str__(self) -> str:
        return draw.draw(self)

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0, size: int = 128) -> Path:
        """Write a picture of one head: cells of which all, some or no pairs are visible. Needs matplotlib.

        Parameters
        ----------
        path : str or Path
            A .png, .svg or .pdf file.
        size : int
            Cells along each side, at most; a cell of more than 16 x 16 pairs is sampled.

        Examples
        --------
        >>> import sparseflash as sf, tempfile, pathlib
        >>> plan = sf.Plan.dense(256, 256, causal=True, window=(63, 0))
        >>> plan.plot(pathlib.Path(tempfile.mkdtemp()) / "window.png").name
        'window.png'
        """
        return draw.plot(self, path, batch=batch, head=head, size=size)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        if self.device.type == "meta" and torch.device(device).type != "meta":
            raise PlanError(
                f"a plan on the meta device has no values to move to {device}: make it again "
                "there, from tensors there or with device="
            )
        moved: Plan = pytree.tree_map_only(Tensor, lambda x: x.to(device), self)
        return moved

    # ---------------------------------------------------------------- figures

    @property
    def kept(self) -> float:
        """Visible pairs over those of dense attention with the same causality. Synchronises.

        Examples
        --------
        >>> import sparseflash as sf
        >>> plan = sf.Plan.dense(1024, 1024, causal=True, window=(63, 0))
        >>> round(plan.kept, 3), plan.density
        (0.121, 1.0)
        """
        return figures.kept(self)

    @property
    def density(self) -> float:
        """Visible pairs over those of the dense plan with the same causal and window rules. Synchronises.

        A plain window has density 1, whatever its size: density measures sparsity beyond the rules, `kept`
        measures it relative to dense attention.
        """
        return figures.density(self)

    @property
    def work(self) -> float:
        """Visited area (tile rows x listed keys) over Tq x Tk. Synchronises."""
        return figures.work(self)

    def to_dense(self) -> Tensor:
        """The mask, bool `[B, H, Tq, Tk]` in token space. For tests and pictures: materialises Tq x Tk."""
        return entries.to_dense(self)

    def check(self) -> Plan:
        """Validate the values (ranges, uniqueness, disjointness, orders, full entries); returns the plan.

        Raises
        ------
        PlanError
            Names the first violated rule, where it was found and how to fix it.
        """
        checks.check(self)
        return self

    def prepare(self, *, backward: bool = True, device: torch.device | str | None = None) -> Plan:
        """Attach the transposed lists that the backward needs; do it once, for all layers and steps."""
        plan = self if device is None else self.to(device)
        return transpose.prepared(plan) if backward else plan

    def current(self) -> Plan:
        """Drop the transposed lists of `prepare` if the plan's tensors were changed in place since."""
        return transpose.current(self)


class Plans(tuple[Plan, ...]):
    """Disjoint plans for the same tokens, in one softmax: a tuple with the methods of a plan.

    Every call that takes a plan takes `Plans`. `a | b` returns them unless one plan contains the other. A
    plain tuple of plans means the same; a pair that is visible in two of the plans counts twice.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> near = sf.Plan.dense(256, 256, causal=True, window=(15, 0))
    >>> bucket = torch.randint(0, 8, (1, 1, 256), generator=torch.Generator().manual_seed(0))
    >>> both = sf.Plan.from_buckets(bucket, bucket) | near
    >>> type(both).__name__, len(both), int(both.to_dense().sum()) > int(near.to_dense().sum())
    ('Plans', 2, True)
    """

    __slots__ = ()

    def __new__(cls, plans: Iterable[Plan]) -> Self:
        """Combine plans with equal Tq and Tk."""
        made = super().__new__(cls, plans)
        if not made:
            raise PlanError("Plans(): expected one plan at least")
        for one in made:
            if (one.Tq, one.Tk) != (made.Tq, made.Tk):
                raise PlanError(
                    f"plans of {made.Tq} x {made.Tk} and {one.Tq} x {one.Tk} tokens are not one softmax"
                )
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self),)

    @property
    def Tq(self) -> int:
        """Number of queries."""
        return self[0].Tq

    @property
    def Tk(self) -> int:
        """Number of keys."""
        return self[0].Tk

    @property
    def device(self) -> torch.device:
        """Device of the plans' tensors."""
        return self[0].device

    @property
    def kept(self) -> float:
        """Visible pairs over those of dense attention with the same causality. Synchronises."""
        return figures.kept(self)

    @property
    def density(self) -> float:
        """Visible pairs over those of the dense plan with the rules that allow most. Synchronises."""
        return figures.density(self)

    @property
    def work(self) -> float:
        """Visited area of all plans over Tq x Tk. Synchronises."""
        return figures.work(self)

    def to_dense(self) -> Tensor:
        """The union of the plans' masks, bool `[B, H, Tq, Tk]`; see `Plan.to_dense`."""
        masks = [one.to_dense() for one in self]
        batch, heads = figures.extent_of(self)
        wide = [m.repeat_interleave(heads // m.shape[1], 1).expand(batch, -1, -1, -1) for m in masks]
        return torch.stack(wide).any(0)

    def check(self) -> Self:
        """Check each plan (`Plan.check`), and that no pair is in two of them; return the plans.

        Raises
        ------
        PlanError
            Names the two plans that overlap.
        """
        for i, one in enumerate(self):
            one.check()
            for j, other in enumerate(self[:i]):
                twice = figures.visible_pairs(one & other)
                if twice:
                    raise PlanError(f"plans {j} and {i} share {twice} pairs, which would count twice: use |")
        return self

    def prepare(self, *, backward: bool = True, device: torch.device | str | None = None) -> Self:
        """`Plan.prepare` of each."""
        return self._each(lambda one: one.prepare(backward=backward, device=device))

    def to(self, device: torch.device | str) -> Self:
        """The same plans on another device."""
        return self._each(lambda one: one.to(device))

    def retile(self, tile: int, unit: int | None = None) -> Self:
        """`Plan.retile` of each."""
        return self._each(lambda one: one.retile(tile, unit))

    def restrict(self, q_tokens: Tensor | None = None, k_tokens: Tensor | None = None) -> Self:
        """`Plan.restrict` of each."""
        return self._each(lambda one: one.restrict(q_tokens, k_tokens))

    def __and__(self, other: Plan) -> Self:
        """Return the pairs visible in one of these plans and in the other plan."""
        return self._each(lambda one: one & other)

    def __sub__(self, other: Plan) -> Self:
        """Return the pairs visible in one of these plans and not in the other plan."""
        return self._each(lambda one: one - other)

    def __or__(self, other: Plan) -> Self:
        """Return the pairs visible in one of these plans or in the other plan."""
        for one in self:
            other = other - one
        return type(self)((*self, other)) if figures.visible_pairs(other) else self

    def _each(self, change: Callable[[Plan], Plan]) -> Self:
        return type(self)(change(one) for one in self)

    def explain(self) -> str:
        """`Plan.explain` of each plan, separated by blank lines."""
        parts = (f"plan {i + 1} of {len(self)}\n{one.explain()}" for i, one in enumerate(self))
        return "\n\n".join(parts)

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0, size: int = 128) -> Path:
        """Write one picture of all plans; see `Plan.plot`."""
        return draw.plot(self, path, batch=batch, head=head, size=size)

    def __repr__(self) -> str:
        return f"Plans({', '.join(map(repr, self))})"

    def __str__(self) -> str:
        return draw.draw(self)


def _flatten(plan: Plan) -> tuple[list[Any], Any]:
    moving, fixed = [], []
    for f in dataclasses.fields(plan):
        value = getattr(plan, f.name)
        tensor = isinstance(value, (Tensor, KeyLists))
        moving.append(value if tensor else None)
        fixed.append(None if tensor else value)
    return moving, tuple(fixed)


def _unflatten(moving: Iterable[Any], fixed: Any) -> Plan:
    names = [f.name for f in dataclasses.fields(Plan)]
    plan = object.__new__(Plan)
    for name, m, s in zip(names, moving, fixed, strict=True):
        object.__setattr__(plan, name, s if m is None else m)
    return plan._told()


# files saved by 0.1.0 name the class by its old module path
torch.serialization.add_safe_globals([Plan, Plans, (Plan, "sparseflash.plan.core.Plan")])

_KEYS = ("start", "count", "full", "index", "source", "until")
pytree.register_pytree_node(Plan, _flatten, _unflatten, serialized_type_name="sparseflash.Plan")
pytree.register_pytree_node(
    KeyLists,
    lambda k: ([getattr(k, n) for n in _KEYS], k.group),
    lambda xs, group: KeyLists(**dict(zip(_KEYS, xs, strict=True)), group=group),
    serialized_type_name="sparseflash.KeyLists",
)
pytree.register_pytree_node(
    Plans,
    lambda plans: (list(plans), None),
    lambda plans, _: Plans(plans),
    serialized_type_name="sparseflash.Plans",
)

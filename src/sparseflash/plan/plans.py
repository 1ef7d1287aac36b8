"""Several plans that are one softmax: what `a | b` is where one plan cannot say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import PlanError
from . import draw, figures

if TYPE_CHECKING:
    from .plan import Plan


class Plans(tuple["Plan", ...]):
    """Disjoint plans for the same tokens, in one softmax: a tuple with the methods of a plan.

    Every call that takes a plan takes these. `a | b` makes them where the rules or the orders of a and b do
    not fit one plan; a plain tuple of plans means the same, and a pair that two of them hold counts twice.

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
        """From plans of as many queries and keys, on one device."""
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
        """Where the plans' tensors live."""
        return self[0].device

    @property
    def density(self) -> float:
        """Visible pairs over those of the dense plan with the loosest of the rules. Synchronises."""
        return figures.density(self)

    @property
    def work(self) -> float:
        """Visited area over Tq x Tk, of all plans together. Synchronises."""
        return figures.work(self)

    def to_dense(self) -> Tensor:
        """The mask of all, bool `[B, H, Tq, Tk]`; see `Plan.to_dense`."""
        masks = [one.to_dense() for one in self]
        batch, heads = figures.extent_of(self)
        wide = [m.repeat_interleave(heads // m.shape[1], 1).expand(batch, -1, -1, -1) for m in masks]
        return torch.stack(wide).any(0)

    def check(self) -> Self:
        """`Plan.check` of each, and that no pair is in two of them; returns the plans.

        Raises
        ------
        PlanError
            Naming the two plans that meet.
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

    def __and__(self, other: Plan) -> Self:
        """Pairs that some plan of these and the other let see."""
        return self._each(lambda one: one & other)

    def __sub__(self, other: Plan) -> Self:
        """Pairs of these plans that the other does not have."""
        return self._each(lambda one: one - other)

    def __or__(self, other: Plan) -> Self:
        """Pairs of these plans or of the other."""
        for one in self:
            other = other - one
        return type(self)((*self, other)) if figures.visible_pairs(other) else self

    def _each(self, change: Callable[[Plan], Plan]) -> Self:
        return type(self)(change(one) for one in self)

    def explain(self) -> str:
        """`Plan.explain` of each, one below the other."""
        parts = (f"plan {i + 1} of {len(self)}\n{one.explain()}" for i, one in enumerate(self))
        return "\n\n".join(parts)

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0, size: int = 128) -> Path:
        """Write one picture of all; see `Plan.plot`."""
        return draw.plot(self, path, batch=batch, head=head, size=size)

    def __repr__(self) -> str:
        return f"Plans({', '.join(map(repr, self))})"

    def __str__(self) -> str:
        return draw.draw(self)


pytree.register_pytree_node(
    Plans,
    lambda plans: (list(plans), None),
    lambda plans, _: Plans(plans),
    serialized_type_name="sparseflash.Plans",
)
torch.serialization.add_safe_globals([Plans])

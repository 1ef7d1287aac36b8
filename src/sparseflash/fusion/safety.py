"""Avoid cancellation in sums of squares: subtract from an input an offset the result does not depend on.

The variance as mean(x * x) - mean(x)^2, and a product from which R5 subtracts c * sum(b) afterwards, lose all
digits where x is far from 0. A layer norm is invariant to adding a number to a row, so a number near the
row's mean may be subtracted first. The mean of the first block is near enough: compared with the exact mean,
rounding errors grow by at most a factor of (blocks per row), since a row whose first block is far from its
mean has a variance as large.

(Exponentials have the same freedom, by a factor instead of a summand; see `items`.)
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from ..common.errors import SparseFlashError
from .program import ACC, ADD, EW, FIRST, MEAN, Body, Loop, Op, Program, every
from .running import run


def centre(program: Program) -> Program:
    """Subtract the mean of each row's first block from the inputs that `program.centred` names.

    As many readers of the input as possible get the difference; which ones may is decided by test: the result
    on random inputs must not change.

    Raises
    ------
    SparseFlashError
        If the result depends on the mean for every choice of readers.
    """
    for name in program.centred:
        readers = [op.out for op in program.uses.get(name, [])]
        choices = (x for n in range(len(readers), 0, -1) for x in itertools.combinations(readers, n))
        for chosen in choices:
            shifted = _shifted(program, name, chosen)
            if _same(program, shifted):
                program = shifted
                break
        else:
            raise SparseFlashError(
                f"the result depends on the mean of {name}, and its sums would cancel; where you sum x * x, "
                "sum (x - mean) * (x - mean), and fuse without R5"
            )
    return replace(program, centred=())


def _shifted(program: Program, name: str, readers: tuple[str, ...]) -> Program:
    """Make `readers` read the input minus the mean of its row's first block."""
    rows, columns = dict(program.inputs)[name]
    taken: list[str] = []

    def fresh(stem: str) -> str:
        taken.append(program.fresh(stem, tuple(taken)))
        return taken[-1]

    def inside(body: Body, minus: str) -> Body:
        """Rewrite a body to read x + minus in place of x."""
        new: list[Loop | Op] = []
        if any(isinstance(x, Op) and x.out in readers for x in body):
            centred = fresh("x1")
            new.append(Op(centred, ADD, (name, minus)))
        for x in body:
            if isinstance(x, Loop):
                new.append(replace(x, body=inside(x.body, minus)))
            else:
                args = tuple(centred if arg == name and x.out in readers else arg for arg in x.args)
                new.append(replace(x, args=args))
        return tuple(new)

    def around(body: Body) -> Body:
        """Prepend the mean to each loop over rows that contains a reader."""
        new: list[Loop | Op] = []
        for x in body:
            if isinstance(x, Loop) and x.dim != rows:
                x = replace(x, body=around(x.body))
            elif isinstance(x, Loop) and any(op.out in readers for op in every(x.body)):
                part, mean, minus = fresh("t1"), fresh("s1"), fresh("e1")
                first = Loop(
                    columns, (Op(part, MEAN, (name,), columns), Op(mean, ACC, (part,), columns)), FIRST
                )
                x = replace(x, body=(first, Op(minus, EW, (mean,), expr=("neg", 0)), *inside(x.body, minus)))
            new.append(x)
        return tuple(new)

    return replace(program, body=around(program.body)).canonical


def _same(one: Program, two: Program) -> bool:
    """Whether two programs agree on random inputs, and so almost surely everywhere."""
    generator = torch.Generator().manual_seed(0)
    sizes = {dim: 5 + i for i, dim in enumerate(one.dims)}
    for _ in range(3):
        given = {
            name: torch.randn([sizes[dim] for dim in axes], dtype=torch.float64, generator=generator)
            for name, axes in one.inputs
        }
        blocks = dict.fromkeys(sizes, 2)
        for a, b in zip(run(one, given, blocks), run(two, given, blocks), strict=True):
            if not (a - b).abs().max() <= 1e-9 * a.abs().max():
                return False
    return True

"""The nine rules of Blockbuster (Dekel 2025, arXiv 2505.07829): each yields its possible rewrites.

R1, R2 and R3 merge two loops, so that results of the first are in local memory when the second reads them. R4
and R5 are laws of linear maps: a scale or a shift of rows may move behind a product and its sum. R8 copies a
scale for each reader, so that R4 may move it. R9 merges two operators. R6 repeats work inside a loop to save
reads; R7 removes some of that repetition. No rule matches a softmax, a norm or attention.

Each condition is a separate function, so that a test can disable it and show what breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from typing import NamedTuple

from .items import substituted
from .program import (
    ACC,
    ADD,
    DOT,
    EW,
    FIRST,
    MUL,
    REST,
    SUM,
    Body,
    Loop,
    Op,
    Program,
    Stmt,
    defines,
    every,
    live,
    reads,
)


class Rewrite(NamedTuple):
    """Description of the place where a rule applies, and the rewritten program."""

    place: str
    program: Program


Rule = Callable[[Program], Iterator[Rewrite]]


# Conditions


def same_turn(program: Program, first: Loop, second: Loop) -> bool:
    """The second loop reads only values of the same iteration, no sum that the first completes at its end."""
    return all(first.dim in program.values[name].dims for name in defines(first) & reads(second))


def nothing_between(body: Body, i: int, j: int) -> bool:
    """No statement between has to run after the first loop and before the second."""
    return not reads(body[j]) & defines(*_after(body, i, j))


def constant(program: Program, name: str, over: str) -> bool:
    """A value does not vary along the summed dimension."""
    return over not in program.values[name].dims


def made_outside(name: str, loop: Stmt) -> bool:
    """A value already exists before the loop."""
    return name not in defines(loop)


def sole(program: Program, name: str) -> bool:
    """Exactly one operator reads a value, once, and it is no output."""
    users = program.uses.get(name, [])
    return len(users) == 1 and users[0].args.count(name) == 1 and name not in program.outputs


def only_there(program: Program, group: Body, loop: Loop) -> bool:
    """Only the loop reads what a group computes."""
    inside = {op.out for op in every((*group, loop))}
    names = defines(*group)
    return not names & {*program.outputs} and all(
        user.out in inside for name in names for user in program.uses.get(name, [])
    )


def can_be_centred(program: Program, name: str) -> bool:
    """A value is an input, so that `centre` can prevent the cancellation that R5 introduces."""
    return name in dict(program.inputs)


def loops_differ(group: Body, loop: Loop) -> bool:
    """A group has no loop over the dimension of the loop that it moves into."""
    return all(loop.dim != dim for dim in _dims(group))


def handed_on_only(carried: Set[str], wanted: Set[str]) -> bool:
    """No value carried from the first iteration is needed outside the loop."""
    return not carried & wanted


# Loops


def _dims(body: Body) -> Iterator[str]:
    for stmt in body:
        if isinstance(stmt, Loop):
            yield stmt.dim
            yield from _dims(stmt.body)


def _after(body: Body, i: int, j: int) -> Body:
    """Statements between i and j that depend on statement i."""
    made, found = defines(body[i]), []
    for stmt in body[i + 1 : j]:
        if reads(stmt) & made:
            made |= defines(stmt)
            found.append(stmt)
    return tuple(found)


def _joined(program: Program, wanted: Callable[[set[str], Loop, Loop], bool]) -> Iterator[Rewrite]:
    """Merge each pair of loops for which this is valid and `wanted` (given the values passed) is true."""
    for place, body in program.bodies:
        for j, second in enumerate(body):
            for i, first in enumerate(body[:j]):
                if not (isinstance(first, Loop) and isinstance(second, Loop)):
                    continue
                if (first.dim, first.part) != (second.dim, "") or not wanted(
                    defines(first) & reads(second), first, second
                ):
                    continue
                if same_turn(program, first, second) and nothing_between(body, i, j):
                    later = _after(body, i, j)
                    sooner = tuple(x for x in body[i + 1 : j] if x not in later)
                    one = Loop(first.dim, first.body + second.body)
                    new = (*body[:i], *sooner, one, *later, *body[j + 1 :])
                    yield Rewrite(f"for {one.dim}", program.put(place, new))


def _sums(loop: Loop) -> bool:
    return all(op.fn == ACC for op in every(loop.body))


def consecutive_maps(program: Program) -> Iterator[Rewrite]:
    """R1: merge a loop into an earlier one whose results it reads iteration by iteration."""
    return _joined(program, lambda passed, first, second: bool(passed) and not _sums(second))


def sibling_maps(program: Program) -> Iterator[Rewrite]:
    """R2: merge two independent loops that read a common value, so that it is read once."""
    return _joined(program, lambda passed, first, second: not passed and bool(reads(first) & reads(second)))


def map_and_reduce(program: Program) -> Iterator[Rewrite]:
    """R3: merge a loop that only accumulates results of an earlier loop into that loop."""
    return _joined(program, lambda passed, first, second: bool(passed) and _sums(second))


def extend_map(program: Program) -> Iterator[Rewrite]:
    """R6: move a loop, with dependent statements, into the only loop that reads it, where it is repeated."""
    for place, body in program.bodies:
        for j, target in enumerate(body):
            for i, moved in enumerate(body[:j]):
                if not isinstance(moved, Loop) or not isinstance(target, Loop) or target.part:
                    continue
                later = _after(body, i, j)
                group = (moved, *later)
                if not defines(*group) & reads(target):
                    continue
                if only_there(program, group, target) and loops_differ(group, target):
                    sooner = tuple(x for x in body[i + 1 : j] if x not in later)
                    new = (*body[:i], *sooner, replace(target, body=group + target.body), *body[j + 1 :])
                    yield Rewrite(f"for {moved.dim} into for {target.dim}", program.put(place, new))


def peel_first(program: Program) -> Iterator[Rewrite]:
    """R7: peel off a loop's first iteration; the others reuse its loop-invariant values."""
    for place, body in program.bodies:
        for i, loop in enumerate(body):
            if not isinstance(loop, Loop) or loop.part:
                continue
            items = {x.out for x in loop.body if isinstance(x, Op)}
            items |= {
                x.out
                for y in loop.body
                if isinstance(y, Loop)
                for x in y.body
                if isinstance(x, Op) and x.fn == ACC
            }
            carried = frozenset(name for name in items if constant(program, name, loop.dim))
            outside = {op.out for op in every(program.body)} - defines(loop)
            wanted = {
                name
                for name in defines(loop)
                if name in program.outputs or any(x.out in outside for x in program.uses.get(name, []))
            }
            if carried and handed_on_only(carried, wanted):
                rest = live(loop.body, wanted, carried)
                new = (replace(loop, part=FIRST), Loop(loop.dim, rest, REST))
                yield Rewrite(f"for {loop.dim}", program.put(place, (*body[:i], *new, *body[i + 1 :])))


# Operators


def _factors(program: Program, name: str, fn: str, over: str) -> Iterator[tuple[str, str]]:
    """Operands (x, c) of a product (or sum) by name: x varies along `over`, c does not."""
    made = program.ops.get(name)
    if made and made.fn == fn and sole(program, name):
        for x, c in (made.args, made.args[::-1]):
            if constant(program, c, over):
                yield x, c


def _scaled_twice(program: Program, name: str, over: str) -> Iterator[tuple[str, str, str]]:
    """Operands (x, c, weight) of x * c * weight: only c is constant along `over`."""
    made = program.ops.get(name)
    if made and made.fn == MUL and sole(program, name):
        for arg, weight in (made.args, made.args[::-1]):
            if not constant(program, weight, over):
                yield from ((x, c, weight) for x, c in _factors(program, arg, MUL, over))


def _summing(program: Program) -> Iterator[tuple[tuple[int, ...], int, Body, Op]]:
    """Each loop's accumulations: enclosing body's place, index of the loop in it, body, and the operator."""
    for place, body in program.bodies:
        for i, loop in enumerate(body):
            if isinstance(loop, Loop) and not loop.part:
                yield from ((place, i, body, x) for x in loop.body if isinstance(x, Op) and x.fn == ACC)


def _after_loop(
    program: Program, place: tuple[int, ...], i: int, acc: Op, sums: tuple[Op, ...], last: Op
) -> Program:
    """Replace an accumulation by others, followed by an operator on their results behind the loop."""
    body = dict(program.bodies)[place]
    loop = body[i]
    assert isinstance(loop, Loop)
    at = loop.body.index(acc)
    new = replace(loop, body=(*loop.body[:at], *sums, *loop.body[at + 1 :]))
    return program.put(place, (*body[:i], new, last, *body[i + 1 :]))


def swap_scale(program: Program) -> Iterator[Rewrite]:
    """R4: dot(a * c, b) = dot(a, b) * c, and sum(x * c) = sum(x) * c, for c constant along the sum.

    A weight along the summed dimension is moved out of the way: (x * c) * weight = (x * weight) * c.
    """
    for op in every(program.body):
        if op.fn in (DOT, SUM):
            for i, arg in enumerate(op.args):
                for x, c in _factors(program, arg, MUL, op.over):
                    inner = replace(op, out=program.fresh(op.out), args=(*op.args[:i], x, *op.args[i + 1 :]))
                    new = program.put_op(op.out, (inner, Op(op.out, MUL, (inner.out, c))))
                    yield Rewrite(f"{op.out}, {c}", new)
                for x, c, weight in _scaled_twice(program, arg, op.over):
                    inner = Op(program.fresh(arg), MUL, (x, weight))
                    new = program.put_op(arg, (inner, Op(arg, MUL, (inner.out, c))))
                    yield Rewrite(f"{weight}, {c}", new)
    for place, i, body, acc in _summing(program):
        for x, c in _factors(program, acc.args[0], MUL, acc.over):
            if made_outside(c, body[i]):
                inner = Op(program.fresh(acc.out), ACC, (x,), acc.over)
                args = (c, inner.out) if program.ops[acc.args[0]].args[0] == c else (inner.out, c)
                last = Op(acc.out, MUL, args)
                yield Rewrite(f"{acc.out}, {c}", _after_loop(program, place, i, acc, (inner,), last))


def swap_shift(program: Program) -> Iterator[Rewrite]:
    """R5: dot(a + c, b) = dot(a, b) + c * sum(b), and sum(x + c * y) = sum(x) + sum(c * y)."""
    for op in every(program.body):
        if op.fn == DOT:
            for i, arg in enumerate(op.args):
                for x, c in _factors(program, arg, ADD, op.over):
                    if not can_be_centred(program, x):
                        continue
                    inner = replace(op, out=program.fresh(op.out), args=(*op.args[:i], x, *op.args[i + 1 :]))
                    total = Op(program.fresh(op.out, (inner.out,)), SUM, (op.args[1 - i],), op.over)
                    outer = Op(program.fresh("x1"), MUL, (c, total.out))
                    last = Op(op.out, EW, (inner.out, outer.out), expr=("add", 0, 1))
                    new = program.put_op(op.out, (inner, total, outer, last))
                    yield Rewrite(
                        f"{op.out}, {c}", replace(new, centred=tuple(dict.fromkeys((*new.centred, x))))
                    )
    for place, i, _, acc in _summing(program):
        made = program.ops.get(acc.args[0])
        if made and made.expr == ("add", 0, 1) and sole(program, made.out):
            if any(True for arg in made.args for _ in _factors(program, arg, MUL, acc.over)):
                one = Op(program.fresh(acc.out), ACC, made.args[:1], acc.over)
                two = Op(program.fresh(acc.out, (one.out,)), ACC, made.args[1:], acc.over)
                last = Op(acc.out, EW, (one.out, two.out), expr=("add", 0, 1))
                yield Rewrite(f"{acc.out}", _after_loop(program, place, i, acc, (one, two), last))


def duplicate_scale(program: Program) -> Iterator[Rewrite]:
    """R8: duplicate a scale or shift with several readers, for each product that could take it over."""
    for scale in every(program.body):
        users = program.uses.get(scale.out, [])
        if scale.fn not in (MUL, ADD) or len(users) < 2:
            continue
        for user in users:
            if user.fn == DOT and any(constant(program, arg, user.over) for arg in scale.args):
                copy = replace(scale, out=program.fresh(scale.out))
                args = tuple(copy.out if arg == scale.out else arg for arg in user.args)
                new = program.put_op(user.out, (replace(user, args=args),)).put_op(scale.out, (scale, copy))
                yield Rewrite(f"{scale.out} for {user.out}", new)


def consecutive_elementwise(program: Program) -> Iterator[Rewrite]:
    """R9: merge an elementwise operator into the next one, if that is its only reader."""
    for _, body in program.bodies:
        here = {op.out: op for op in body if isinstance(op, Op) and op.fn == EW}
        for op in here.values():
            for i, arg in enumerate(op.args):
                if arg in here and sole(program, arg):
                    before = here[arg]
                    args = (*before.args, *(x for j, x in enumerate(op.args) if j != i))
                    places = [before.expr if x == arg else args.index(x) for x in op.args]
                    expr = substituted(op.expr, places)
                    yield Rewrite(
                        f"{arg} into {op.out}", program.put_op(op.out, (replace(op, args=args, expr=expr),))
                    )


RULES: dict[str, tuple[str, Rule]] = {
    "R1": ("fuse consecutive maps", consecutive_maps),
    "R2": ("fuse sibling maps", sibling_maps),
    "R3": ("fuse a map with a reduction", map_and_reduce),
    "R4": ("swap scale and product", swap_scale),
    "R5": ("swap shift and product", swap_shift),
    "R6": ("extend a map", extend_map),
    "R7": ("peel off the first turn", peel_first),
    "R8": ("duplicate a scale", duplicate_scale),
    "R9": ("fuse consecutive elementwise operators", consecutive_elementwise),
}

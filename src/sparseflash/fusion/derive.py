"""Fusion: the order of rules, the search over recomputation, and a record of the derivation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..common.errors import require
from .costs import CACHE, Cost, Tiers, choose, cost
from .draw import svg
from .program import Program
from .rules import RULES
from .running import run
from .safety import centre

ORDER = ("R3", "R1", "R2", "R9", "R8", "R4", "R5")
"""Rules that never cost anything, in the order tried: first fuse within operators, then across them."""


TITLES = {**{rule: title for rule, (title, _) in RULES.items()}, "S": "centre what would cancel"}


@dataclass(frozen=True)
class Step:
    """One rule, all places where it was applied in a row, and the resulting program."""

    rule: str
    places: tuple[str, ...]
    program: Program


def simplify(program: Program, rules: Collection[str] = ORDER) -> Iterator[Step]:
    """Apply cost-free rules, each as often as possible, until none applies."""
    while True:
        for rule in (name for name in ORDER if name in rules):
            places: list[str] = []
            while (found := next(RULES[rule][1](program), None)) is not None:
                places.append(found.place)
                program = found.program.canonical
            if places:
                yield Step(rule, tuple(places), program)
                break
        else:
            return


@dataclass(frozen=True)
class Derivation:
    """Derivation of a fused program, step by step, with the chosen blocks.

    Attributes
    ----------
    start : Program
        The program as given.
    steps : tuple of Step
        The rewrites, in order.
    sizes, blocks : dict
        Elements of each dimension, and of its blocks.
    itemsize : int
        Bytes per element.
    """

    start: Program
    steps: tuple[Step, ...]
    sizes: dict[str, int]
    blocks: dict[str, int]
    itemsize: int

    @property
    def program(self) -> Program:
        """The fused program."""
        return self.steps[-1].program if self.steps else self.start

    @property
    def operators(self) -> Program:
        """The unfused baseline, one kernel per operator: each sum fused only with its products."""
        program = self.start
        for step in simplify(program, ("R3",)):
            program = step.program
        return centre(program)

    def cost(self, program: Program) -> Cost:
        """Cost of a program at the chosen blocks."""
        return cost(program, self.sizes, self.blocks, self.itemsize)

    def check(self, seed: int = 0, most: int = 96) -> float:
        """Run fused and unfused program on random fp64 inputs; returns the largest relative difference.

        Dimensions are reduced to at most `most` elements, blocks to a third of that.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = {dim: min(n, most - i) for i, (dim, n) in enumerate(self.sizes.items())}
        given = {
            name: torch.randn([sizes[dim] for dim in axes], dtype=torch.float64, generator=generator)
            for name, axes in self.start.inputs
        }
        blocks = {dim: min(self.blocks[dim], -(-n // 3)) for dim, n in sizes.items()}
        results = zip(run(self.program, given, blocks), run(self.operators, given), strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in results)

    def pictures(self) -> dict[str, str]:
        """SVGs of the start and of the program after each step, by file stem."""
        found = {
            "0": svg(self.start, f"{self.start.passes} passes through global memory: every operator alone")
        }
        before = self.start.passes
        for n, step in enumerate(self.steps, 1):
            passes = step.program.passes
            title = f"{step.rule}: {TITLES[step.rule]} ({len(step.places)}x). {before} passes, now {passes}"
            found[str(n)] = svg(step.program, title)
            before = passes
        return found

    def explain(self) -> str:
        """Describe the derivation as text: rule, bytes saved, places; the program; costs before and after."""
        lines, before = [], self.cost(self.start).bytes
        for n, step in enumerate(self.steps, 1):
            after = self.cost(step.program).bytes
            what = f"{step.rule} {TITLES[step.rule]}"
            passes = f"{step.program.passes:3} passes"
            lines.append(f"{n:3}  {what:42} {_saved(before - after):>13}  {passes}   {_listed(step.places)}")
            before = after
        sizes = ", ".join(f"{dim} {self.sizes[dim]} by {self.blocks[dim]}" for dim in self.sizes)
        lines += ["", str(self.program), "", f"blocks: {sizes}"]
        for name, program in (("one by one", self.operators), ("fused", self.program)):
            found = self.cost(program)
            lines.append(
                f"{name:10}  {program.passes:3} passes   {found.bytes / 2**20:10.2f} MiB moved   "
                f"{found.flops / 1e9:8.2f} Gflop   {found.local / 2**10:8.0f} KiB local"
            )
        return "\n".join(lines)


def _listed(places: tuple[str, ...]) -> str:
    return ", ".join(place if n == 1 else f"{n} x {place}" for place, n in Counter(places).items())


def _saved(n: int) -> str:
    return f"{'-' if n > 0 else '+'}{abs(n) / 2**20:.2f} MiB" if n else ""


def fuse(
    program: Program,
    sizes: Mapping[str, int],
    *,
    tiers: Tiers = CACHE,
    itemsize: int = 4,
    least: int = 16,
    repeats: int = 3,
    rules: Collection[str] = tuple(RULES),
) -> Derivation:
    """Fuse a program: apply cost-free rules, then search over recomputation.

    R1 to R5, R8 and R9 are applied until none applies. R6 trades reads for recomputation: every sequence of
    up to `repeats` applications is a candidate, with and without R7, and each is judged at its own best
    blocks. The fastest on the machine wins; so the search also decides which loops stay separate, and thus
    separate kernels.

    Parameters
    ----------
    program : Program
        A program from `read` or `Builder`.
    sizes : mapping
        Elements of each dimension.
    tiers : Tiers
        The machine: local memory, bandwidth, flops.
    itemsize : int
        Bytes per element.
    least : int
        Smallest block to try.
    repeats : int
        Maximum number of applications of R6.
    rules : collection of str
        Names of the rules that may be used; by default all.

    Returns
    -------
    Derivation
        `program` is the fused program; `explain()` describes the steps.

    Examples
    --------
    >>> from sparseflash.fusion import GOLDEN
    >>> found = fuse(GOLDEN["attention"](), {"m": 4096, "n": 4096, "d": 64, "l": 64})
    >>> print(found.program)
    q[m, d], k[n, d], v[n, l] -> out
    for m
      for l
        for n
          for d
            t1 = dot_d(q, k)
            s1 += t1
          e1 = exp((s1 / sqrt(|d|)))
          t2 = sum_n(e1)
          s2 += t2
          t3 = dot_n(e1, v)
          out1 += t3
        e2 = inverse(s2)
        out = out1 * e2    -> out[m, l]
    """
    require(
        (set(sizes) == set(program.dims), f"sizes of {', '.join(sizes)}; expected {', '.join(program.dims)}")
    )
    for dim, n in sizes.items():
        whole = isinstance(n, int) and n > 0
        require((whole, f"a size of {dim} is {n}; expected a whole number from 1 on"))
    unknown = [rule for rule in rules if rule not in RULES]
    require((not unknown, f"no rule {', '.join(unknown)}; expected some of {', '.join(RULES)}"))

    def settled(program: Program, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return steps + tuple(simplify(program, rules))

    def judged(steps: tuple[Step, ...]) -> tuple[tuple[float, int, int], dict[str, int], tuple[Step, ...]]:
        last = steps[-1].program if steps else program
        blocks, found = choose(last, sizes, tiers, itemsize, least)
        return (found.seconds(tiers), found.bytes, len(steps)), blocks, steps

    frontier, seen, candidates = [settled(program, ())], set(), []
    for _ in range(repeats + 1):
        wave: list[tuple[Step, ...]] = []
        for steps in frontier:
            last = steps[-1].program if steps else program
            if last in seen:
                continue
            seen.add(last)
            candidates.append(judged(steps))
            for name in ("R6", "R7"):
                for place, new in RULES[name][1](last) if name in rules else ():
                    longer = (*steps, Step(name, (place,), new.canonical))
                    if name == "R6":
                        wave.append(settled(new.canonical, longer))
                    else:
                        candidates.append(judged(longer))
        frontier = wave
    _, blocks, steps = min(candidates, key=lambda candidate: candidate[0])
    last = steps[-1].program if steps else program
    if last.centred:
        steps = (*steps, Step("S", last.centred, centre(last)))
        blocks, _ = choose(steps[-1].program, sizes, tiers, itemsize, least)
    return Derivation(program, steps, dict(sizes), blocks, itemsize)

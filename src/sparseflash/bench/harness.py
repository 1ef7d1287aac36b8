"""Compare methods with baselines: conformance, then time, density, quality, memory and energy per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseflash.backends.dispatch import choose
from sparseflash.bench import conformance, energy, memory
from sparseflash.bench.cases import DIRECTIONS, inputs
from sparseflash.bench.quality import Dense, density, work
from sparseflash.bench.results import Row, cell
from sparseflash.bench.subjects import Subject, subjects
from sparseflash.bench.timing import Box, Timing, interleave, predict

INPUTS = 3
"""Number of input sets that the rounds of a case rotate through."""
MEMORY_SECONDS = 8.0
"""Start-up time allowed for a subprocess that measures memory; skipped if less is left."""
BACKWARD_FLOPS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""Flops in units of the forward pass: the backward has five matrix products, the forward two."""


@dataclass(frozen=True)
class Settings:
    """Options of a comparison; the defaults are those of the command."""

    methods: Sequence[str] = ()
    baselines: Sequence[str] = ("sdpa",)
    lengths: Sequence[int] = (1024, 4096)
    batch: int = 1
    heads: int = 4
    dim: int = 64
    dtype: str = "fp32"
    direction: str = "both"
    density: float | None = None
    device: str = "cpu"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rounds: int = 9
    minutes: float = 5.0
    energy: bool = False
    memory: bool = True
    seed: int = 0
    capture: Callable[[int], list[Tensor]] | None = None
    """Returns real q, k, v and dout for a length, in place of normal ones."""

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments of `inputs` besides length and seed."""
        return {x: getattr(self, x) for x in ("batch", "heads", "dim", "dtype", "device")}

    def subjects(self, length: int) -> list[Subject]:
        """Subjects at a length, baselines first."""
        made = {x: getattr(self, x) for x in ("density", "options", "device")}
        return subjects(self.methods, self.baselines, length=length, **made)

    def inputs(self, length: int) -> list[list[Tensor]]:
        """Several sets of q, k, v and dout; a capture gives one set, repeated with rolled heads."""
        if self.capture is None:
            return [inputs(length, seed=self.seed + n, **self.shape) for n in range(INPUTS)]
        real = self.capture(length)
        groups = real[1].shape[1]  # query heads roll with their KV head
        return [
            [x.detach().roll(n * x.shape[1] // groups, 1).requires_grad_(x.requires_grad) for x in real]
            for n in range(min(INPUTS, groups))
        ]


def measure(settings: Settings, *, on_run: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """Measure all subjects at all lengths, shortest first.

    Yields
    ------
    dict
        One row per subject and length. ``target`` is the requested density. ``conformance`` is ``passed``,
        or what failed; then there are no figures.
        ``ms`` is the median of all rounds, selection included, with ``ms_p20`` and ``ms_p80``; ``ms_select``
        and ``ms_kernel`` are its parts (the backward direction includes no selection); ``over <name>`` is the
        speed-up over that subject, the median over the rounds of one interleaved run. ``density`` and
        ``work`` are those of the plan, ``recall`` the share of dense attention's mass on it, ``error`` the
        relative error of the output against dense attention. ``peak_mb`` is peak memory beyond the inputs,
        ``gflop`` the arithmetic of the visible pairs. ``joules`` (gross) and ``joules_net`` (above idle) are
        per call. Unavailable figures are empty.
    """
    box = Box(settings.minutes * 60)
    history: dict[str, list[tuple[int, float]]] = {}
    verdicts: dict[str, str] = {}
    for number, length in enumerate(sorted(settings.lengths)):
        able, rows = [], {}
        for subject in settings.subjects(length):
            on_run(f"T = {length}, {subject.name}: conformance")
            rows[subject.name] = _head(settings, subject, length)
            said = verdicts.setdefault(subject.name, _verdict(subject, settings))
            expected = predict(history.get(subject.name, []), length)
            if said != "passed":
                rows[subject.name] |= {"conformance": said}
            elif 3 * expected > box.left:
                note = f"skipped: {expected:.1f} s predicted, {max(box.left, 0):.0f} s left"
                rows[subject.name] |= {"conformance": said, "note": note}
            elif settings.direction != "forward" and not subject.backward:
                rows[subject.name] |= {"conformance": said, "note": "has no backward on this device"}
            else:
                rows[subject.name] |= {"conformance": said}
                able.append(subject)
        share = Box(box.left / (len(settings.lengths) - number))
        yield from _at(settings, length, able, rows, share, history, on_run)


def _at(
    settings: Settings,
    length: int,
    able: list[Subject],
    rows: dict[str, Row],
    box: Box,
    history: dict[str, list[tuple[int, float]]],
    on_run: Callable[[str], None],
) -> Iterator[Row]:
    sets = settings.inputs(length)
    runs: dict[str, Callable[[], Any]] = {}
    for subject in list(able):
        on_run(f"T = {length}, {subject.name}: first run")
        try:
            own = _runs(subject, settings.direction, sets)
            own[subject.name]()
        except Exception as error:  # any library error, out of memory included
            rows[subject.name]["note"] = f"not run: {_first_line(error)}"
            able.remove(subject)
        else:
            runs |= own
    timings = interleave(
        runs, rounds=settings.rounds, box=box, on_run=lambda name: on_run(f"T = {length}, {name}")
    )
    q, k, v = (x.detach() for x in sets[0][:3])
    yardstick = Dense.of(q, k, v)
    compared = [x.name for x in able if x.kind == "baseline"] or [x.name for x in able[:1]]
    for name, row in rows.items():
        subject = next((x for x in able if x.name == name), None)
        if subject is not None:
            history.setdefault(name, []).append((length, timings[name].median))
            row |= _times(name, timings)
            row |= {f"over {base}": timings[base].over(timings[name]) for base in compared}
            on_run(f"T = {length}, {name}: quality")
            row |= _quality(subject, q, k, v, yardstick)
            row["gflop"] = _gflop(settings, q, row["density"])
            on_run(f"T = {length}, {name}: memory")
            row |= _memory(settings, subject, length, box)
            row |= _energy(settings, runs[name], lambda text, name=name: on_run(f"{name}: {text}"))
            row["note"] = "; ".join(filter(None, (row.pop("memory_note", ""), row.pop("energy_note", ""))))
        yield row


def others(settings: Settings, rows: Iterable[Row]) -> list[Row]:
    """Rows of earlier sessions that `measure` will not yield again."""
    asked = [
        tuple(map(cell, (subject.name, length, *_same(settings).values())))
        for length in settings.lengths
        for subject in settings.subjects(length)
    ]
    columns = ("case", "T", *_same(settings))
    return [row for row in rows if tuple(cell(row.get(x)) for x in columns) not in asked]


def _same(settings: Settings) -> Row:
    """Columns that are equal in all rows of a session."""
    same: Row = {"direction": settings.direction, **settings.shape, "seed": settings.seed}
    same["inputs"] = "normal" if settings.capture is None else "captured"
    return same | {"target": settings.density}


def _head(settings: Settings, subject: Subject, length: int) -> Row:
    row: Row = {"bench": "attention", "case": subject.name, "kind": subject.kind}
    row["options"] = repr(subject.method) if subject.method is not None else ""
    return row | {"T": length} | _same(settings)


def _verdict(subject: Subject, settings: Settings) -> str:
    try:
        said = conformance.check(subject, dim=settings.dim, dtype=settings.dtype, device=settings.device)
    except Exception as error:  # any library error where it cannot run
        return (
            f"not run: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        )
    return f"FAILED: {said}" if said else "passed"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _runs(subject: Subject, direction: str, sets: list[list[Tensor]]) -> dict[str, Callable[[], Any]]:
    """The calls to time: the whole, and for methods also selection and kernel."""
    calls = {subject.name: [DIRECTIONS[direction](subject, *tensors) for tensors in sets]}
    if subject.method is not None and direction != "backward":
        prepared = [subject.prepare(*tensors[:3]) for tensors in sets]
        calls[f"{subject.name}: select"] = [
            lambda t=tensors[:3]: torch.no_grad()(subject.prepare)(*t) for tensors in sets
        ]
        calls[f"{subject.name}: kernel"] = [
            DIRECTIONS[direction](lambda q, k, v, p=p: subject.use(q, k, v, p), *tensors)
            for tensors, p in zip(sets, prepared)
        ]
    return {name: _rotating(them) for name, them in calls.items()}


def _rotating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    turn = 0

    def run() -> Any:
        nonlocal turn
        turn += 1
        return calls[turn % len(calls)]()

    return run


def _times(name: str, timings: Mapping[str, Timing]) -> Row:
    own = timings[name]
    row: Row = {
        "ms": own.median * 1e3,
        "ms_p20": own.percentile(0.2) * 1e3,
        "ms_p80": own.percentile(0.8) * 1e3,
    }
    for part in ("select", "kernel"):
        other = timings.get(f"{name}: {part}")
        row[f"ms_{part}"] = other.median * 1e3 if other else None
    return row | {"rounds": len(own.times)}


@torch.no_grad()
def _quality(subject: Subject, q: Tensor, k: Tensor, v: Tensor, yardstick: Dense) -> Row:
    backend = choose("forward", "", q, k, v).NAME if subject.kind == "method" else "torch"
    row: Row = {"backend": backend, "density": 1.0, "work": None, "recall": 1.0}
    if (selection := subject.select(q, k, v)) is not None:
        plan = selection.plan if subject.method is None else subject.method.shown(q, k, selection)
        row |= {"density": density(plan), "work": work(plan)}
        row["recall"] = yardstick.recall(q, k, v, plan)
    return row | {"error": yardstick.error(subject(q, k, v))}


def _gflop(settings: Settings, q: Tensor, share: float) -> float:
    B, H, T, D = q.shape
    pairs = share * B * H * T * (T + 1) / 2
    return BACKWARD_FLOPS[settings.direction] * 4 * D * pairs * 1e-9


def _memory(settings: Settings, subject: Subject, length: int, box: Box) -> Row:
    if not settings.memory:
        return {"peak_mb": None}
    if box.left < MEMORY_SECONDS:
        return {"peak_mb": None, "memory_note": "peak memory: no time left in the box"}
    bytes_, note = memory.of_subject(
        name=subject.name,
        methods=list(settings.methods),
        baselines=list(settings.baselines),
        density=settings.density,
        options={name: dict(x) for name, x in settings.options.items()},
        direction=settings.direction,
        length=length,
        seed=settings.seed,
        **settings.shape,
    )
    return {"peak_mb": None if bytes_ is None else bytes_ / 2**20, "memory_note": note}


def _energy(settings: Settings, run: Callable[[], Any], on_run: Callable[[str], None]) -> Row:
    row: Row = {"joules": None, "joules_net": None, "watts": None, "idle_watts": None}
    if not settings.energy:
        return row
    meter, why = energy.counter(settings.device)
    if meter is None:
        return row | {"energy_note": why}
    on_run("energy")
    found = energy.measure(run, meter, idle=energy.idle_watts(meter))
    row |= {"joules": found.joules, "joules_net": found.net, "watts": found.watts}
    return row | {"idle_watts": found.idle_watts}

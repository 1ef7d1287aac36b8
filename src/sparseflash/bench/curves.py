"""Runtime curves of forward and backward over the sequence length: the paper's figures on this machine.

Timings include selection, sorting, gathering and their backward. Density (visible pairs over causal pairs)
and recall (share of dense attention's mass on visible pairs) are reported with them: time alone says nothing
about a sparse method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sparseflash.bench.cases import Case, forward_backward, inputs
from sparseflash.bench.quality import Dense, density
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave, predict, seconds

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PROBE_LENGTH = 256


def measure(
    cases: Sequence[Case],
    *,
    lengths: Sequence[int] = LENGTHS,
    minutes: float = 5.0,
    rounds: int = 5,
    batch: int = 1,
    heads: int = 4,
    dim: int = 64,
    dtype: str = "fp32",
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Time every case at every length, shortest first; skip what does not fit into the time box.

    Parameters
    ----------
    cases : sequence of Case
        What to compare; the first one is the baseline of the ``speedup`` column.
    lengths : sequence of int
        Ascending sequence lengths.
    minutes : float
        Time box. A case whose next length is predicted not to fit is skipped, with a note in its row.
    rounds : int
        Measured rounds per length, after one warm-up round.

    Yields
    ------
    dict
        One row per case and length: ``ms`` (median), ``ms_min``, ``ms_max``, ``rounds``, ``speedup``,
        ``density``, ``recall``, ``note``.
    """
    box = Box(minutes * 60)
    history: dict[str, list[tuple[int, float]]] = {case.label: [] for case in cases}
    shape = {"batch": batch, "heads": heads, "dim": dim, "dtype": dtype}
    probe = inputs(PROBE_LENGTH, **shape)
    for case in cases:  # the first run compiles, the second predicts
        on_run(case.label)
        run = forward_backward(case.attention, *probe)
        run()
        history[case.label].append((PROBE_LENGTH, seconds(run)))
    for length in lengths:
        q, k, v, dout = inputs(length, **shape)
        runs, notes = {}, {}
        expected = {case.label: predict(history[case.label], length) for case in cases}
        # The baseline first, as speed-ups need it; then as many cases as fit, cheapest first.
        for case in sorted(cases, key=lambda case: (case is not cases[0], expected[case.label])):
            if case.longest is not None and length > case.longest:
                notes[case.label] = f"not run beyond T = {case.longest}: needs a T x T mask"
            elif box.left < 1.2 * sum(expected[label] for label in (*runs, case.label)):
                notes[case.label] = (
                    f"skipped: {expected[case.label]:.1f} s predicted, {max(box.left, 0):.0f} s left"
                )
            else:
                runs[case.label] = forward_backward(case.attention, q, k, v, dout)
        order = {case.label: runs[case.label] for case in cases if case.label in runs}
        share = Box(box.left / 2) if length != lengths[-1] else box
        timings = interleave(
            order, rounds=rounds, box=share, on_run=lambda name, t=length: on_run(f"T = {t}, {name}")
        )
        baseline = timings.get(cases[0].label)
        yardstick = None
        for case in cases:
            row: Row = {"bench": "curves", "case": case.label, "family": case.family, "T": length, **shape}
            row["what"] = "forward+backward"
            if timing := timings.get(case.label):
                times = timing.times or [timing.warm_up]
                history[case.label].append((length, timing.median))
                row |= {"ms": timing.median * 1e3, "ms_min": min(times) * 1e3, "ms_max": max(times) * 1e3}
                row |= {
                    "rounds": len(timing.times),
                    "speedup": baseline.median / timing.median if baseline else None,
                }
                if box.left > timing.median:
                    yardstick = yardstick or Dense.of(q, k, v)
                    row |= quality(case, q, k, v, yardstick)
            row["note"] = notes.get(case.label, "")
            yield row


def quality(case: Case, q: Tensor, k: Tensor, v: Tensor, yardstick: Dense | None) -> Row:
    """Density and recall of the pairs of `case`; empty if it has no plan."""
    if case.family == "dense":
        return {"density": 1.0, "recall": 1.0}
    if yardstick is None or not hasattr(case.attention, "select"):
        return {}
    plan = case.attention.select(q, k).plan
    return {"density": density(plan), "recall": yardstick.recall(q, k, v, plan)}

"""Interleaved timing inside a time box.

All cases of a group run round-robin, so that a busy moment of the machine affects all of them; a case's
figure is the median of its rounds. The first round only warms up and predicts the duration.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


class Box:
    """A deadline, to check before starting work."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.end - time.monotonic()


@dataclass
class Timing:
    """Wall times of one case, in seconds."""

    warm_up: float
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the measured rounds, or the warm-up time if the box had no room for rounds."""
        return statistics.median(self.times) if self.times else self.warm_up

    def percentile(self, share: float) -> float:
        """Percentile of the rounds' times, linearly interpolated."""
        times = sorted(self.times or [self.warm_up])
        at = share * (len(times) - 1)
        low = math.floor(at)
        high = min(low + 1, len(times) - 1)
        return times[low] + (at - low) * (times[high] - times[low])

    def over(self, other: Timing) -> float:
        """Ratio of this time to the other: the median of the ratios of each interleaved round."""
        pairs = list(zip(self.times, other.times)) or [(self.warm_up, other.warm_up)]
        return statistics.median(own / twin for own, twin in pairs)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, pending GPU work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _nothing() -> None:
    """Do nothing."""


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    box: Box,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time every case `rounds` times, interleaved; fewer if the box runs out."""
    timings = {}
    for name, run in cases.items():
        timings[name] = Timing(seconds(run))
        on_run(name)
    one_round = sum(t.warm_up for t in timings.values())
    for _ in range(rounds):
        if box.left < one_round:
            break
        for name, run in cases.items():
            timings[name].times.append(seconds(run))
            on_run(name)
    return timings


def predict(history: list[tuple[int, float]], length: int) -> float:
    """Predict seconds at `length` from the (length, seconds) of shorter ones.

    Extrapolates the last growth rate, bounded between linear and slightly above quadratic; a single point is
    extrapolated quadratically, to be safe.
    """
    if not history:
        return 0.0
    (last_length, last) = history[-1]
    power = 2.0
    if len(history) > 1:
        (before_length, before) = history[-2]
        power = math.log(last / before) / math.log(last_length / before_length)
    return last * (length / last_length) ** min(max(power, 1.0), 2.2)

"""Energy of repeated calls, from hardware counters: RAPL of the processor, NVML of an NVIDIA GPU.

An unreadable counter gives None with a reason, never 0. Every figure comes with the idle power measured right
before, so that lower power for longer does not look like less energy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

WINDOW = 2.0
"""Seconds of steady repetition: counters update only every tenth of a second or so."""
RAPL = Path("/sys/class/powercap")


class Counter(Protocol):
    """A monotonic energy counter in joules, which never wraps."""

    name: str

    def joules(self) -> float:
        """Read the counter."""
        ...


class Rapl:
    """All processor packages of a Linux machine; a hardware counter must be read once per wrap-around."""

    name = "rapl"

    def __init__(self, root: Path = RAPL) -> None:
        packages = sorted(root.glob("intel-rapl:[0-9]*")) if root.is_dir() else []
        packages = [p for p in packages if p.name.count(":") == 1]  # subdomains are part of their package
        if not packages:
            raise OSError(f"RAPL: {root} has no packages (a virtual machine, or a kernel without powercap)")
        self._files = [p / "energy_uj" for p in packages]
        self._ranges = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        self._last = [self._read(f) for f in self._files]
        self._sum = 0

    @staticmethod
    def _read(file: Path) -> int:
        try:
            return int(file.read_text())
        except PermissionError:
            raise OSError(f"RAPL: {file} may only be read by root; chmod a+r it, or run as root") from None

    def joules(self) -> float:
        """Read all packages; a counter below its last value has wrapped once."""
        for n, file in enumerate(self._files):
            now = self._read(file)
            self._sum += (now - self._last[n]) % (self._ranges[n] + 1)
            self._last[n] = now
        return self._sum * 1e-6


class Nvml:
    """The total-energy counter of an NVIDIA GPU (Volta and later)."""

    name = "nvml"

    def __init__(self, index: int = 0) -> None:
        try:
            import pynvml
        except ImportError:
            raise OSError("NVML: needs the package nvidia-ml-py; install: pip install nvidia-ml-py") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            self.joules()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None

    def joules(self) -> float:
        """Read the counter, which is in millijoules."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) * 1e-3


def counter(device: str = "cpu") -> tuple[Counter | None, str]:
    """Open the counter of a device; or None, and the reason."""
    try:
        return (Nvml(torch.device(device).index or 0) if device.startswith("cuda") else Rapl()), ""
    except OSError as error:
        return None, str(error)


@dataclass(frozen=True)
class Energy:
    """Energy of a measurement window.

    Attributes
    ----------
    joules : float
        Total energy per call.
    net : float
        Energy per call above idle power.
    watts, idle_watts : float
        Mean power in the window, and idle power right before it.
    seconds : float
        Length of the window.
    calls : int
        Number of calls in the window.
    """

    joules: float
    net: float
    watts: float
    idle_watts: float
    seconds: float
    calls: int


Clock = Callable[[], float]


def idle_watts(
    meter: Counter,
    window: float = WINDOW,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Clock = time.perf_counter,
) -> float:
    """Mean power of the idle machine."""
    begin, start = meter.joules(), clock()
    sleep(window)
    return (meter.joules() - begin) / (clock() - start)


def measure(
    run: Callable[[], Any],
    meter: Counter,
    *,
    window: float = WINDOW,
    idle: float,
    clock: Clock = time.perf_counter,
) -> Energy:
    """Repeat a call for at least `window` seconds and measure its energy."""
    run()
    _wait()
    calls, begin, start = 0, meter.joules(), clock()
    while True:
        run()
        calls += 1
        _wait()
        if clock() - start >= window:
            break
    joules, seconds = meter.joules() - begin, clock() - start
    net = joules - idle * seconds
    return Energy(joules / calls, net / calls, joules / seconds, idle, seconds, calls)


def self_test(
    run: Callable[[], Any],
    meter: Counter,
    *,
    window: float = WINDOW,
    sleep: Callable[[float], None] = time.sleep,
    clock: Clock = time.perf_counter,
) -> list[str]:
    """Test the counter: a steady load's energy must be linear in time, and idle power stable.

    Returns
    -------
    list of str
        The problems; empty if there are none.
    """
    wrong = []
    idle = idle_watts(meter, window, sleep=sleep, clock=clock)
    found = [
        measure(run, meter, window=n * window, idle=idle, clock=clock) for n in (0.5, 1.0, 1.5, 2.0, 2.5)
    ]
    fit = r_squared([x.seconds for x in found], [x.joules * x.calls for x in found])
    if not fit > 0.99:
        wrong.append(
            f"energy of a steady load is not linear in its time: R² is {fit:.3f}, expected above 0.99"
        )
    again = idle_watts(meter, window, sleep=sleep, clock=clock)
    if not abs(again - idle) <= 0.1 * idle:
        wrong.append(f"idle is not idle: {idle:.3g} W before the load, {again:.3g} W after")
    if not found[-1].watts > 1.05 * idle:
        wrong.append(f"the load does not show: {found[-1].watts:.3g} W, and {idle:.3g} W without it")
    return wrong


def r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    """Share of the variance of y that a linear fit on x explains."""
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y))
    xx, yy = (sum((a - m) ** 2 for a in z) for z, m in ((x, mx), (y, my)))
    return xy * xy / (xx * yy) if xx and yy else 0.0


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()

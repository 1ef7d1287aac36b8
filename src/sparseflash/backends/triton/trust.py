"""Check once whether the kernels are right on this card, and remember the result.

A result holds for one card, driver, versions of PyTorch and Triton, and these sources; if any changes, the
check runs again. Until it has passed, calls that name no backend run elsewhere, and one line says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...common import files
from ...common.errors import warn
from ...plan import Plan
from ..numerics import Softmax
from .common import INTERPRETED
from .softmax import backward, forward


class Card(NamedTuple):
    """What a check's result holds for."""

    card: str
    capability: str
    driver: str
    torch: str
    triton: str
    kernels: str


_known: dict[str, str] = {}
"""Why the kernels are not trusted, by card; "" if they are."""
ASK = "ask for it with backend='triton'"


def caution(x: Tensor) -> str:
    """Why a call on this tensor that names no backend does not run here; "" if it does. Checks a new card."""
    if INTERPRETED.value:
        return f"runs in its interpreter, for tests: {ASK}"
    if x.device.type != "cuda":
        return f"has been checked on no such device: {ASK}"
    card = card_of(x.device)
    name = _name(card)
    if name not in _known:
        if torch.cuda.is_current_stream_capturing():
            return f"has not been checked on this card before a graph was captured: call once, or {ASK}"
        found = remembered(card)
        if found is None:
            _known[name] = "is being checked on this card"
            warn(f"sparseflash: checking the Triton kernels on {card.card}, once; this compiles some")
            found = checked(card, x.device)
        _known[name] = found
    return _known[name]


def standing() -> str:
    """Describe what is known of the current card, without running a check."""
    if INTERPRETED.value or not torch.cuda.is_available():
        return ""
    card = card_of(torch.device("cuda", torch.cuda.current_device()))
    found = _known.get(_name(card), remembered(card))
    if found is None:
        return "not checked on this card yet: the first call does, or `sparseflash doctor --build`"
    return found or "checked on this card"


@functools.cache  # asked on every call
def card_of(device: torch.device) -> Card:
    """The card, versions and sources that a check on this device holds for."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return Card(
        torch.cuda.get_device_name(device),
        ".".join(map(str, torch.cuda.get_device_capability(device))),
        f"{driver} {torch.version.cuda or torch.version.hip}",
        str(torch.__version__),
        triton.__version__,
        sources.hexdigest()[:16],
    )


def _name(card: Card) -> str:
    return hashlib.sha256(repr(card).encode()).hexdigest()[:16]


def _path(card: Card) -> Path:
    return files.cache() / "triton" / f"{_name(card)}.json"


def remembered(card: Card) -> str | None:
    """The stored result of an earlier check of this card; None if there is no trustworthy one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        path = _path(card)
        if files.distrust(path) or files.distrust(path.parent):
            return None
        told = json.loads(path.read_text(encoding="utf-8"))
        if Card(**told["card"]) == card and isinstance(told["found"], str):
            return str(told["found"])
    return None


def checked(card: Card, device: torch.device, check: Callable[..., str] | None = None) -> str:
    """Check the card, and store the result."""
    started = time.monotonic()
    try:
        found = (check or faults)(device)
    except Exception as error:  # whatever a compiler or a driver raises, the call has another backend
        found = f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if found:
        found = f"failed its check on this card ({found}); `sparseflash doctor --build` repeats it, or {ASK}"
    told = {"card": card._asdict(), "found": found, "seconds": round(time.monotonic() - started, 1)}
    with suppress(OSError):  # a home that cannot be written to: the next process checks again
        path = _path(card)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with files.replacing(path) as temporary:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(told, file)
    _known[_name(card)] = found
    return found


def cases(device: torch.device) -> Iterator[tuple[str, Plan, torch.dtype, int]]:
    """Yield what is checked: the plan and its name, the dtype and the head dimension."""
    T = 200
    plans = {
        "dense": Plan.dense(T, T, causal=True, device=device),
        "window": Plan.dense(T, T, causal=True, window=(40, 0), sink_tokens=3, device=device),
        "units": Plan.from_keys(
            torch.tensor([[0, 2], [1, 3], [0, 3], [2, 3]], dtype=torch.int32, device=device)[None, None],
            Tq=T,
            Tk=T,
            tile=64,
            unit=64,
            unique=True,
            causal=True,
        ),
    }
    dtypes = (torch.float32, torch.float16) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    for name, plan in plans.items():
        for dtype in dtypes:
            yield name, plan, dtype, 128 if name == "dense" else 64


def faults(device: torch.device, run: Any = None) -> str:
    """Describe the first case whose out, lse or gradient is too far from fp64; "" if there is none.

    The bound is that of the tests: twice the error of an eager run in the same dtype, three times for
    gradients, plus a rounding band. The call that triggers the check may run in inference mode or autocast;
    the result is remembered for all modes, so the check runs in none.
    """
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), torch.device("cpu"):
        return _first_fault(device, *(run or (forward, backward)))


def _first_fault(device: torch.device, attend: Callable[..., Any], differentiate: Callable[..., Any]) -> str:
    for name, plan, dtype, D in cases(device):
        generator = torch.Generator().manual_seed(0)
        q, k, v, dout = (
            torch.randn(1, h, 200, D, generator=generator).to(device, dtype) for h in (4, 2, 2, 4)
        )
        keep = plan.to_dense()
        want, plain = (_eager(q, k, v, dout, keep, kind) for kind in (torch.float64, dtype))
        options = Softmax(D**-0.5, 0.0)
        out, lse, norm = attend(q, k, v, plan, options, key_bias=None, out_dtype=dtype, normed=True)
        grads = differentiate(
            dout, q, k, v, out, norm, torch.zeros_like(lse), plan, options, key_bias=None, grad_dtype=None
        )
        found = {"out": out, "lse": lse, "dq": grads[0], "dk": grads[1], "dv": grads[2]}
        for n, (label, got) in enumerate(found.items()):
            error, usual = ((x.double() - want[n]).abs().max() for x in (got, plain[n]))
            band = 4 * torch.finfo(dtype).eps * want[n].abs().max()
            if not error <= (2 if n < 2 else 3) * usual + band:  # NaN fails, too
                return f"{label} of {name}, D={D}, {dtype}: off by {float(error):.3g}"
    return ""


def _eager(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, keep: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Out, lse and gradients in plain PyTorch."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in leaves[1:])
        score = (leaves[0] @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
        out = score.softmax(-1) @ v
        grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    return [out.detach(), score.detach().logsumexp(-1), *grads]

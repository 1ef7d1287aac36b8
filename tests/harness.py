"""What the attention tests share: backends and dtypes that run here, inputs, one call with all gradients."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparseflash as sf

BACKENDS = [name for name, status in sf.backend_status().items() if status.usable]
FAST = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {"q": "dq", "k": "dk", "v": "dv", "key_bias": "dbias", "sink_logits": "dsink", "pair_bias": "dpair"}


def _pairs(dtypes: dict[str, tuple[torch.dtype, ...]]) -> list[Any]:
    return [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name in BACKENDS
        for dtype in dtypes.get(name, FAST)
    ]


EVERY = pytest.mark.parametrize(
    "backend, dtype", _pairs({"reference": (torch.float32, torch.bfloat16, torch.float64)})
)
"""Every backend in every dtype that it takes."""
MAIN = pytest.mark.parametrize(
    "backend, dtype", _pairs({"reference": (torch.float32,), "cpu": (torch.float32, torch.bfloat16)})
)
"""Every backend in the dtypes that take a path of their own: for what does not depend on rounding."""
EACH = pytest.mark.parametrize("backend", BACKENDS)
"""Every backend, in fp32."""


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, rounded to dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(
    generator: torch.Generator,
    Tq: int,
    Tk: int | None = None,
    *,
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    D: int = 32,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout and dlse."""
    Tk, Dv = Tq if Tk is None else Tk, D if Dv is None else Dv
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        randn(generator, B, H, Tq, D, dtype=dtype),
        randn(generator, B, Hkv, Tk, D, dtype=dtype),
        randn(generator, B, Hkv, Tk, Dv, dtype=dtype),
        randn(generator, B, H, Tq, Dv, dtype=dtype),
        randn(generator, B, H, Tq, dtype=state),
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Any,
    *,
    backend: str | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Out and lse, and with dout or dlse every gradient, under the names that `tolerance.compare` knows."""
    leaves = {
        "q": q,
        "k": k,
        "v": v,
        **{n: options[n] for n in ("key_bias", "sink_logits", "pair_bias") if options.get(n) is not None},
    }
    if dout is None and dlse is None:
        out, lse = sf.attention(q, k, v, plan, return_lse=True, backend=backend, **options)
        return {"out": out, "lse": lse}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    given = {**options, **{n: x for n, x in leaves.items() if n in options}}
    out, lse = sf.attention(
        leaves["q"], leaves["k"], leaves["v"], plan, return_lse=True, backend=backend, **given
    )
    ends = [(x, g) for x, g in ((out, dout), (lse, dlse)) if g is not None]
    grads = torch.autograd.grad([x for x, _ in ends], list(leaves.values()), [g for _, g in ends])
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {NAMES[n]: g for n, g in zip(leaves, grads, strict=True)}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor], names: str = "", note: str = "") -> None:
    """Assert bitwise equality of all results, or of those named; NaN equals NaN."""
    for name in names.split() or a:
        x, y = a[name], b[name]
        assert x.shape == y.shape and x.dtype == y.dtype, f"{name}: {x.shape} {x.dtype}, {y.shape} {y.dtype}"
        equal = (x == y) | (x.isnan() & y.isnan())
        assert bool(equal.all()), (
            f"{name}: {int((~equal).sum())} of {equal.numel()} elements differ, by up to "
            f"{float((x - y).abs().nan_to_num().max()):.3g}; {note}"
        )


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Constructors of plans take tensors of main memory for an accelerator's, and look at no value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


aten = torch.ops.aten
LOOKS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount,
    aten.unique_consecutive, aten.equal, aten.is_nonzero, aten.histc, aten.repeat_interleave,
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Fails where an accelerator would be waited for: a look at values, or a copy from or to main memory."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        sized = op.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is not None
        assert op.overloadpacket not in LOOKS or sized, f"{op} looks at values"
        if op.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{op} with a mask looks at values"
        out = op(*args, **kwargs)
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in made} | {x.device.type for x in given if x.dim()}
        assert len(places) < 2, f"{op} copies between {places}"
        return out


@contextlib.contextmanager
def watched():
    """`Watch`, and an eye on tensors made of Python numbers, which are made in main memory and copied."""

    def make(x, *, make=torch.tensor, **options):
        assert str(options.get("device") or "cpu") == "cpu", "numbers of Python are copied"
        return make(x, **options)

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(torch, "tensor", make)
        patch.setattr(torch, "as_tensor", make)
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
        yield


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that `call` takes at its peak beyond what is in use before; skips where Linux does not say.

    Free memory goes back to the system first, so that nothing is hidden in what earlier tests left behind.
    """

    def now(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    gc.collect()
    try:
        with contextlib.suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be measured: {error}")
    before = now("VmRSS")
    call()
    return now("VmHWM") - before

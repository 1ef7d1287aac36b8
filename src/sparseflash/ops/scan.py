"""`scan`: the linear recurrence y_t = decay_t * y_{t-1} + x_t, in log T passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.numerics import state_dtype
from ..common.errors import SparseFlashError, require
from ._arguments import describe


def scan(decay: Tensor, x: Tensor, *, initial: Tensor | None = None) -> Tensor:
    """The linear recurrence `y_t = decay_t * y_{t-1} + x_t` along axis 1, in float32 or better.

    Neighbouring steps are combined recursively: log2 T passes with twice the work of a sequential pass, using
    only products of decays and sums, so nothing is divided by a small number. State-space layers are such
    scans (Mamba, arXiv 2312.00752, section 3.3; the cycle scan of HRSAM, 2407.02109).

    Parameters
    ----------
    decay : Tensor
        Floating point, broadcasts to x.
    x : Tensor
        Floating point `[B, T, ...]`.
    initial : Tensor, optional
        y before the first step, `[B, ...]`; 0 by default.

    Returns
    -------
    Tensor, like x
        Differentiable in decay, x and initial, also twice.

    Raises
    ------
    SparseFlashError
        If shapes do not fit, or a tensor is not floating point.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> sf.scan(torch.full((1, 3), 0.5), torch.ones(1, 3)).tolist()
    [[1.0, 1.5, 1.75]]
    """
    for name, given in (("decay", decay), ("x", x)):
        real = isinstance(given, Tensor) and given.is_floating_point()
        require((real, lambda: f"{name}: {describe(given)}; expected floating point"))
    require((x.dim() >= 2, lambda: f"x: {describe(x)}; expected [B, T, ...]"))
    try:
        decay = decay.expand(x.shape)
    except RuntimeError:
        raise SparseFlashError(f"decay: {describe(decay)} does not broadcast to x, {list(x.shape)}") from None
    wide = state_dtype(x)
    steps, inputs = decay.to(wide), x.to(wide)
    if initial is not None:
        fits = isinstance(initial, Tensor) and initial.shape == x.shape[:1] + x.shape[2:]
        require((fits, lambda: f"initial: {describe(initial)}; expected {[len(x), *x.shape[2:]]}"))
        first = inputs[:, :1] + steps[:, :1] * initial.to(wide)[:, None]
        inputs = torch.cat([first, inputs[:, 1:]], 1) if x.shape[1] else inputs
    found: Tensor = _Scan.apply(steps, inputs)  # type: ignore[no-untyped-call]  # torch declares none
    return found.to(x.dtype)


class _Scan(torch.autograd.Function):
    """The scan as an autograd Function; its gradient is a scan over reversed time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(decay: Tensor, x: Tensor) -> Tensor:
        return _joined(decay, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        decay, y = ctx.saved_tensors
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        g: Tensor = _Scan.apply(later.flip(1), dy.flip(1)).flip(1)  # type: ignore[no-untyped-call]  # as above
        before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        return g * before, g


def _joined(decay: Tensor, x: Tensor) -> Tensor:
    T = x.shape[1]
    if T < 2:
        return x.clone()
    n = T // 2
    odd_decay, odd = decay[:, 1::2], x[:, 1::2]
    pairs = _joined(odd_decay * decay[:, ::2][:, :n], odd + odd_decay * x[:, ::2][:, :n])
    y = torch.empty_like(x)
    y[:, 1::2] = pairs
    y[:, :1] = x[:, :1]
    y[:, 2::2] = x[:, 2::2] + decay[:, 2::2] * pairs[:, : T - n - 1]
    return y

"""`linear_attention`: causal attention without softmax, with a decay per head and a recurrent state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import Linear, empty_like_layout, state_dtype
from ..common.errors import SparseFlashError
from ._arguments import (
    as_backend,
    autocast,
    check_inputs,
    describe,
    is_finite,
    is_real,
)
from ._register import Gradient, register


def _check_rates(rate: Tensor | None) -> None:
    """Check the values of the decay rates on the CPU, where reading them does not synchronise."""
    if rate is not None and rate.device.type == "cpu" and not bool((rate.isfinite() & (rate >= 0)).all()):
        raise SparseFlashError(
            f"decay_rate={rate.tolist()}: expected finite numbers >= 0: s in exp(-s * distance), not the "
            "factor and not its logarithm"
        )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, initial: Tensor | None, options: Linear
) -> tuple[Tensor, Tensor]:
    _check_rates(rate)
    run = choose("linear_forward", options.backend, q, k, v).linear_forward
    return run(q, k, v, rate, initial, options)


def _empty_state(q: Any, v: Any) -> Tensor:
    state: Tensor = q.new_empty((q.shape[0], q.shape[1], q.shape[3], v.shape[3]), dtype=state_dtype(q))
    return state


def _empty(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_like_layout(q, v.shape[-1]), _empty_state(q, v)


def _backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor | None,
    initial: Tensor | None,
    options: Linear,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = choose("linear_backward", options.backend, q, k, v).linear_backward
    dq, dk, dv, dinitial = run(dout, dstate, q, k, v, rate, initial, options)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dinitial


def _empty_gradients(
    dout: Any, dstate: Any, q: Any, k: Any, v: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _empty_state(q, v)


_gradients = register("linear_attention_backward", _backward, _empty_gradients)


def _find(run: Any, kept: Any, slopes: Any, options: Linear) -> Any:
    q, k, v, rate, initial = kept
    dout, dstate = slopes
    dout = q.new_zeros(*q.shape[:3], v.shape[3]) if dout is None else dout
    dq, dk, dv, dinitial = run(dout, dstate, q, k, v, rate, initial, options)
    return dq, dk, dv, None, None if initial is None else dinitial


_linear = register(
    "linear_attention",
    _forward,
    _empty,
    gradient=Gradient(_find, lambda given, found: given, _gradients),
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay_rate: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with a decay per head: no softmax, constant time and memory per token.

    `out[t] = scale * sum over j <= t of exp(-s (t - j)) (q[t].k[j]) v[j]`: the attention of TransNormerLLM
    and RetNet, computed as in Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658, algorithms 1 and 2).
    There is no denominator: models normalise the output, and usually apply SiLU to q and k. Computed exactly
    in chunks: a masked product inside a chunk, a state [D,Dv] between chunks; time is linear in T.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,T,D]`, `[B,Hkv,T,D]`, `[B,Hkv,T,Dv]`, any strides; `Hq` a multiple of `Hkv`; fp32, fp16, bf16
        (fp64 on the reference backend). D and Dv up to 256.
    decay_rate : Tensor, optional
        `[Hq]`, s >= 0 per head: a pair n tokens apart is weighted by exp(-s n). None means 0, no decay. A
        constant, without gradient.
    scale : float
        Factor of the scores: 1, as in the paper (softmax attention divides by sqrt(D) instead).
    initial_state : Tensor, optional
        `[B,Hq,D,Dv]`: the state after earlier tokens, with gradient.
    return_state : bool
        Also return the state after the last token: `sum over j of exp(-s (T - 1 - j)) k[j] v[j]^T`, fp32
        `[B,Hq,D,Dv]`, differentiable. Pass it to the next call to continue with a chunk or a single token.
    backend : str, optional
        "reference", "cpu" or "triton"; None chooses the fastest usable one.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,T,Dv]`, and the state.

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given, what is expected and how to fix it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 4, 300, 32)
    >>> slow = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    >>> out = sf.linear_attention(q, k, v, decay_rate=slow)
    >>> past = [x[:, :, :299] for x in (q, k, v)]
    >>> _, state = sf.linear_attention(*past, decay_rate=slow, return_state=True)
    >>> last = [x[:, :, 299:] for x in (q, k, v)]
    >>> step = sf.linear_attention(*last, decay_rate=slow, initial_state=state)
    >>> torch.testing.assert_close(step, out[:, :, 299:], atol=1e-4, rtol=1e-4)
    """
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    (B, H, T, D), Dv = q.shape, v.shape[3]
    if k.shape[2] != T:
        raise SparseFlashError(
            f"q has {T} tokens, k and v {k.shape[2]}: expected as many; earlier keys are a state"
        )
    if k.shape[0] != B:
        raise SparseFlashError(
            f"q has batch size {B}, k and v {k.shape[0]}: expected the same (there are no pools)"
        )
    if not is_finite(scale):
        raise SparseFlashError(f"scale={scale!r}: expected a finite number")
    if not isinstance(return_state, bool):
        raise SparseFlashError(f"return_state={return_state!r}: expected True or False")
    if decay_rate is not None:
        if not is_real(decay_rate, (H,), q.device):
            raise SparseFlashError(
                f"decay_rate: {describe(decay_rate)}; expected floating point [Hq={H}] on {q.device}"
            )
        if decay_rate.requires_grad and torch.is_grad_enabled():
            raise SparseFlashError(
                "decay_rate requires a gradient and there is none for it: give decay_rate.detach()"
            )
    if initial_state is not None:
        if not is_real(initial_state, (B, H, D, Dv), q.device):
            raise SparseFlashError(
                f"initial_state: {describe(initial_state)}; expected floating point [B={B}, Hq={H}, D={D}, "
                f"Dv={Dv}] on {q.device}, as return_state=True gives it"
            )
        initial_state = initial_state.to(state_dtype(q))
    options = Linear(float(scale), as_backend(backend))
    out, state = _linear(q, k, v, decay_rate, initial_state, options)
    return (out, state) if return_state else out

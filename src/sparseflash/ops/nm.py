"""`nm_product`: a product with the N:M sparse part of a weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends.dispatch import choose_able
from ..backends.numerics import NM
from ..common.errors import require
from ..plan.options import is_count
from ._arguments import as_backend, describe
from ._register import register

FEWEST = 32
"""Tokens from which the native product is faster than a dense one with a mask."""
WIDEST = 64
"""Weights of the largest group that it takes."""


def _forward(x: Tensor, weight: Tensor, options: NM) -> Tensor:
    pays = x.dtype == torch.float32 and len(x) >= FEWEST and 2 * options.n <= options.m <= WIDEST
    wanted = options.backend or ("" if pays else "reference")
    return choose_able("nm_product", wanted, x).nm_product(x, weight, options)


def _empty(x: Any, weight: Any, options: NM) -> Tensor:
    found: Tensor = x.new_empty(x.shape[0], weight.shape[0])
    return found


_product = register("nm_product", _forward, _empty)


def nm_product(x: Tensor, weight: Tensor, n: int, m: int, *, backend: str | None = None) -> Tensor:
    """`x W^T`, where of each `m` neighbouring weights of an output the `n` of largest magnitude are used.

    In fp32 on the CPU only these are multiplied. No gradient: `sf.nn.NMLinear` trains with it.

    Paper: Fang et al., "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow
    Co-Design", arXiv 2309.13015, section III.

    Parameters
    ----------
    x : Tensor
        Floating point `[..., K]`, K a multiple of m.
    weight : Tensor
        `[O, K]` of x's dtype, any strides: a transposed weight has its groups along its outputs. Of equal
        magnitudes the first is used.
    n, m : int
        `1 <= n <= m`.
    backend : str, optional
        "reference" or "cpu"; None chooses: from 32 tokens and up to half of the weights, fp32 on the CPU runs
        natively, all else as a dense product with a mask.

    Returns
    -------
    Tensor
        `[..., O]`, of x's dtype.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.ops.nm import nm_product
    >>> nm_product(torch.ones(1, 4), torch.tensor([[3.0, -4.0, 0.0, 1.0]]), 2, 4)
    tensor([[-1.]])
    """
    both = isinstance(x, Tensor) and isinstance(weight, Tensor)
    require((both, lambda: f"x: {describe(x)}, weight: {describe(weight)}; expected tensors"))
    fits = is_count(m, 1) and is_count(n, 1) and n <= m
    require(
        (fits, lambda: f"n={n!r}, m={m!r}: expected ints with 1 <= n <= m"),
        (_fit(x, weight), lambda: f"x: {describe(x)}, weight: {describe(weight)}; expected [..., K], [O, K]"),
    )
    wide = backend == "cpu" and m > WIDEST
    require((not wide, lambda: f"m={m}, backend='cpu': it has groups of at most {WIDEST}; leave backend out"))
    K = weight.shape[1]
    require((K % m == 0, lambda: f"{K} inputs: expected a multiple of m={m}"))
    rows = x.detach().reshape(math.prod(x.shape[:-1]), K)
    return _product(rows, weight.detach(), NM(n, m, as_backend(backend))).view(*x.shape[:-1], len(weight))


def _fit(x: Tensor, weight: Tensor) -> bool:
    same = x.dtype == weight.dtype and x.device == weight.device and x.is_floating_point()
    return same and x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]

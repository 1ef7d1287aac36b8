"""N:M sparse linear layers and convolutions for training: of each M neighbouring weights, N are used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import grad

from ..backends import numerics
from ..common.errors import SparseFlashError, require
from ..ops.nm import nm_product
from ..plan.options import is_count
from .base import check_choice

Rule = Literal["bdwp", "sr-ste", "one-sided"]
conv2d_input: Callable[..., Tensor] = grad.conv2d_input  # torch declares no types of these
conv2d_weight: Callable[..., Tensor] = grad.conv2d_weight


def nm_mask(weight: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """Mask of the `n` largest magnitudes of each `m` neighbours along `dim`; of equal ones the first.

    Parameters
    ----------
    weight : Tensor
        Weight of any shape; its size along `dim` is a multiple of `m`.
    n, m : int
        `1 <= n <= m`.
    dim : int
        Dimension along which groups are formed.

    Returns
    -------
    Tensor
        bool, of the shape of `weight`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> sf.nn.nm_mask(torch.tensor([3.0, -4.0, 0.0, 1.0]), 2, 4).tolist()
    [True, True, False, False]
    """
    fits = is_count(m, 1) and is_count(n, 1) and n <= m
    require((fits, lambda: f"n={n!r}, m={m!r}: expected ints with 1 <= n <= m"))
    size = weight.shape[dim]
    require((size % m == 0, lambda: f"{size} weights along dim {dim}: expected a multiple of m={m}"))
    return numerics.nm_mask(weight.detach().movedim(dim, -1), n, m).movedim(-1, dim)


@dataclass(frozen=True)
class Linear:
    """The three products of a linear layer: forward, gradient of the input, gradient of the weight."""

    n: int
    m: int
    rule: Rule

    def masks(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(forward, backward) masks of a weight."""
        front = nm_mask(weight, self.n, self.m, 1)
        if self.rule == "bdwp":
            return front, nm_mask(weight, self.n, self.m, 0)
        return front, front if self.rule == "sr-ste" else torch.ones_like(front)

    def needed(self, weight: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Masks that the products of this weight take; None if they choose for themselves."""
        return None, None

    def forward(self, x: Tensor, weight: Tensor, front: Tensor | None) -> Tensor:
        """`x (W * F)^T`."""
        if front is None:
            return nm_product(x, weight, self.n, self.m)
        return nn.functional.linear(x, weight * front)

    def of_input(self, shape: torch.Size, weight: Tensor, back: Tensor | None, g: Tensor) -> Tensor:
        """`g (W * B)`."""
        if back is None and self.rule == "bdwp":
            return nm_product(g, weight.mT, self.n, self.m)
        return g @ (weight * (self.masks(weight)[1] if back is None else back))

    def of_weight(self, x: Tensor, shape: torch.Size, g: Tensor) -> Tensor:
        """`g^T x`."""
        return g.mT @ x


@dataclass(frozen=True)
class Conv(Linear):
    """The three products of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def needed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The masks."""
        return self.masks(weight)

    def forward(self, x: Tensor, weight: Tensor, front: Tensor | None) -> Tensor:
        """The convolution of x with the masked weight."""
        assert front is not None  # `needed` gives them
        return nn.functional.conv2d(x, weight * front, None, self.stride, self.padding, self.dilation)

    def of_input(self, shape: torch.Size, weight: Tensor, back: Tensor | None, g: Tensor) -> Tensor:
        """Gradient of the input: the transposed convolution of g."""
        assert back is not None
        how = (self.stride, self.padding, self.dilation)
        return conv2d_input(shape, weight * back, g, *how)

    def of_weight(self, x: Tensor, shape: torch.Size, g: Tensor) -> Tensor:
        """Gradient of the weight: the correlation of x and g."""
        how = (self.stride, self.padding, self.dilation)
        return conv2d_weight(x, shape, g, *how)


class _Product(torch.autograd.Function):
    """`y = x W_f`, `dx = g W_b`, `dW = g x` plus a decay of masked weights; dx is not the gradient of y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        front: Tensor | None,
        back: Tensor | None,
        pull: float,
        products: Linear,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, front, back)
        ctx.pull, ctx.products = pull, products
        return products.forward(x, weight, front)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, weight, front, back = ctx.saved_tensors
        products: Linear = ctx.products
        dx = products.of_input(x.shape, weight, back, g) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = products.of_weight(x, weight.shape, g)
            if ctx.pull:
                dw = dw + ctx.pull * (weight * ~(products.masks(weight)[0] if front is None else front))
        return dx, dw, None, None, None, None


product: Callable[..., Tensor] = _Product.apply


class _NM(nn.Module):
    """Base of both layers: weights, masks, and the share of multiplications."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, shape: tuple[int, ...], n: int, m: int, rule: Rule, decay: float | None, bias: bool, **made: Any
    ) -> None:
        super().__init__()
        check_choice(rule=(rule, ("bdwp", "sr-ste", "one-sided")))
        require(
            (is_count(m, 1) and is_count(n, 1) and n <= m, lambda: f"n={n!r}, m={m!r}: expected 1 <= n <= m"),
            (
                decay is None or (math.isfinite(decay) and decay >= 0),
                lambda: f"decay={decay!r}: expected a number >= 0",
            ),
        )
        outputs, inputs = shape[:2]
        require(
            (inputs % m == 0, lambda: f"{inputs} inputs: expected a multiple of m={m}, or a dense layer"),
            (
                outputs % m == 0 or rule != "bdwp",
                lambda: (
                    f"{outputs} outputs: expected a multiple of m={m}, or rule='sr-ste'; with bdwp "
                    "the backward is sparse along them"
                ),
            ),
        )
        self.n, self.m, self.rule = n, m, rule
        self.decay = (2e-4 if rule == "sr-ste" else 0.0) if decay is None else float(decay)
        self.weight = nn.Parameter(torch.empty(shape, **made))
        self.bias = nn.Parameter(torch.empty(outputs, **made)) if bias else None
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights, uniform as in torch's own layers."""
        bound = self.weight[0].numel() ** -0.5
        self.weight.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound, generator=generator)

    def reset_parameters(self) -> None:
        """Call `reset` with the global generator, under the name that torch.nn modules use."""
        self.reset()

    def masks(self) -> tuple[Tensor, Tensor]:
        """(forward, backward) masks of the current weight."""
        return Linear(self.n, self.m, self.rule).masks(self.weight)

    def _run(self, x: Tensor, products: Linear) -> Tensor:
        weight: Tensor = self.weight
        front, back = products.needed(weight)
        if torch.is_autocast_enabled(x.device.type):
            front, back = products.masks(weight)  # chosen before weights are rounded, which makes some equal
            kind = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(kind), weight.to(kind)
        return product(x, weight, front, back, self.decay, products)

    def share(self) -> float:
        """Multiplications of a training step relative to a dense layer: `(2 N/M + 1) / 3` with BDWP."""
        part = self.n / self.m
        return (part + (1.0 if self.rule == "one-sided" else part) + 1.0) / 3


class NMLinear(_NM):
    """A linear layer whose weight is N:M sparse in the forward and in the backward pass.

    With `bdwp` (bidirectional pruning), `y = x (W * F)^T + b` and `dx = g (W * B)`: F keeps the N largest of
    each M inputs of an output, B the N largest of each M outputs of an input, so both products save `1 - N/M`
    of their multiplications. `dW = g^T x` is dense and updates the dense W (straight-through): dx is the
    gradient of y only if N = M. With `sr-ste`, both passes use F and dW gains `decay (1 - F) W`, which pulls
    masked weights towards 0; `one-sided` uses F in the forward only.

    Papers: Fang et al., "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow
    Co-Design", arXiv 2309.13015; Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks
    From Scratch" (SR-STE), arXiv 2102.04010.

    Parameters
    ----------
    in_features, out_features : int
        Multiples of `m` (`out_features` only with bdwp).
    n, m : int
        Weights to keep (n) of each group of m.
    rule : "bdwp", "sr-ste" or "one-sided"
        The sparsity rule, as above.
    decay : float, optional
        Decay of masked weights: 2e-4 with sr-ste, 0 otherwise.
    bias : bool
        Whether the layer has a bias.

    Notes
    -----
    Every product chooses its weights anew (fused optimisers change weights without bumping their version, so
    nothing is cached). In fp32 on the CPU only these are multiplied, elsewhere the others are masked.
    Checkpoints hold the dense weight. On processors with bf16 matrix units, a dense bf16 product is faster
    than this layer in fp32.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.NMLinear(64, 32, n=2, m=8)
    >>> layer(torch.randn(5, 64)).shape, layer.share()
    (torch.Size([5, 32]), 0.5)
    >>> front, back = layer.masks()
    >>> bool((front.view(32, 8, 8).sum(2) == 2).all() and (back.view(4, 8, 64).sum(1) == 2).all())
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: int = 2,
        m: int = 8,
        rule: Rule = "bdwp",
        decay: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, x in (("in_features", in_features), ("out_features", out_features)):
            require((is_count(x, 1), lambda: f"{name}={x!r}: expected a positive int"))
        self.in_features, self.out_features = in_features, out_features
        super().__init__((out_features, in_features), n, m, rule, decay, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        if x.shape[-1:] != (self.in_features,):
            raise SparseFlashError(f"x: {list(x.shape)}; expected [..., in_features={self.in_features}]")
        rows = self._run(x.reshape(-1, self.in_features), Linear(self.n, self.m, self.rule))
        out = rows.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def multiplications(self, tokens: int) -> tuple[int, int, int]:
        """Multiplications of the forward, of the gradient of x, and of that of W, for `tokens` tokens."""
        dense = tokens * self.weight.numel()
        sparse = dense // self.m * self.n
        return sparse, dense if self.rule == "one-sided" else sparse, dense

    def extra_repr(self) -> str:
        """One-line description of the shape and rule."""
        own = f"n={self.n}, m={self.m}, rule={self.rule!r}, bias={self.bias is not None}"
        return f"{self.in_features}, {self.out_features}, {own}"


class NMConv2d(_NM):
    """A convolution whose weight `[O, C, kh, kw]` is N:M sparse, as in `NMLinear`.

    At each tap of the filter, F keeps the N largest of each M input channels, B of each M output channels.

    Parameters
    ----------
    in_channels, out_channels : int
        Multiples of `m` (`out_channels` only with bdwp). Keep a first layer of 3 channels dense.
    kernel_size : int or (int, int)
        Size of the filter.
    stride, padding, dilation : int or (int, int)
        As in `torch.nn.Conv2d`, with zero padding.
    n, m, rule, decay, bias
        As in `NMLinear`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.NMConv2d(16, 32, 3, padding=1, n=2, m=8)
    >>> layer(torch.randn(2, 16, 14, 14)).shape
    torch.Size([2, 32, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        n: int = 2,
        m: int = 8,
        rule: Rule = "bdwp",
        decay: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, x in (("in_channels", in_channels), ("out_channels", out_channels)):
            require((is_count(x, 1), lambda: f"{name}={x!r}: expected a positive int"))
        size = _pair("kernel_size", kernel_size, 1)
        self.kernel_size, self.stride = size, _pair("stride", stride, 1)
        self.padding, self.dilation = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
        shape = (out_channels, in_channels, *size)
        super().__init__(shape, n, m, rule, decay, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, O, H', W']`."""
        if x.dim() != 4 or x.shape[1] != self.weight.shape[1]:
            raise SparseFlashError(f"x: {list(x.shape)}; expected [B, {self.weight.shape[1]}, H, W]")
        out = self._run(x, Conv(self.n, self.m, self.rule, self.stride, self.padding, self.dilation))
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def extra_repr(self) -> str:
        """One-line description of the shape and rule."""
        own = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        own += f", n={self.n}, m={self.m}, rule={self.rule!r}, bias={self.bias is not None}"
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.kernel_size}, {own}"


def _pair(name: str, x: int | tuple[int, int], least: int) -> tuple[int, int]:
    both = (x, x) if isinstance(x, int) else tuple(x)
    fits = len(both) == 2 and all(is_count(y, least) for y in both)
    require((fits, lambda: f"{name}={x!r}: expected an int >= {least}, or two"))
    return both[0], both[1]

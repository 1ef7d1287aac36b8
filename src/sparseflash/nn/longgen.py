"""LongGen: dense attention in the middle layers, a fixed pattern in the others."""

from __future__ import annotations

from typing import Any

from ..common.errors import require
from ..methods.base import Method, get
from ..methods.sink_window import SinkWindow
from .base import check_sizes
from .self_attention import SelfAttention


class LongGenAttention(SelfAttention):
    """One layer of a hybrid: the middle third of the layers is dense, the rest have sinks and a window.

    Training and decoding use the same pattern. A dense layer caches all keys, a sparse one only those it
    still attends to, so with a third of the layers dense the cache is about a third. Positions are the true
    ones in both.

    Paper: Ge et al., "A Little Goes a Long Way", arXiv 2410.01485.

    Parameters
    ----------
    width, heads
        As in `Layer`.
    layer, layers : int
        Index of this layer, and number of layers.
    share : float
        Share of the layers that are dense, in the middle (`LongGenAttention.is_dense`).
    sparse : Method or str, optional
        What a sparse layer attends to: `SinkWindow(window=1984, sink_tokens=64)` by default, or `Strided`,
        whose cache keeps all keys.
    **options
        Options of `SelfAttention` except `method` and `causal`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> [sf.nn.LongGenAttention.is_dense(n, 6) for n in range(6)]
    [False, False, True, True, False, False]
    >>> near = sf.methods.SinkWindow(window=12, sink_tokens=4)
    >>> model = [sf.nn.LongGenAttention(64, 4, layer=n, layers=6, sparse=near) for n in range(6)]
    >>> states = [layer.new_state(1) for layer in model]
    >>> with torch.no_grad():
    ...     for token in torch.randn(1, 300, 64).split(1, 1):
    ...         for layer, state in zip(model, states):
    ...             token = token + layer(token, state=state)
    >>> [state.tensors["k"].shape[2] <= 32 for state in states]
    [True, True, False, False, True, True]
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        share: float = 1 / 3,
        sparse: Method | str | None = None,
        **options: Any,
    ) -> None:
        check_sizes(1, layers=layers)
        check_sizes(0, layer=layer)
        fits = isinstance(share, (int, float)) and 0 <= share <= 1
        require(
            (layer < layers, lambda: f"layer={layer}: expected less than layers={layers}"),
            (fits, lambda: f"share={share!r}: expected a share in [0, 1]"),
            (
                not options.keys() & {"method", "causal"},
                "method= and causal= follow from the layer: give sparse=",
            ),
        )
        dense = self.is_dense(layer, layers, share)
        sparse = SinkWindow(window=1984, sink_tokens=64) if sparse is None else sparse
        sparse = get(sparse) if isinstance(sparse, str) else sparse  # a wrong name raises in dense layers too
        super().__init__(width, heads, method=None if dense else sparse, **options)
        self.layer, self.layers = layer, layers

    @staticmethod
    def is_dense(layer: int, layers: int, share: float = 1 / 3) -> bool:
        """Whether this layer is among the middle `share` of all layers."""
        count = round(layers * share)
        first = (layers - count) // 2
        return first <= layer < first + count

    def extra_repr(self) -> str:
        """One-line description of the shape and layer index."""
        return f"{super().extra_repr()}, layer={self.layer}, layers={self.layers}"

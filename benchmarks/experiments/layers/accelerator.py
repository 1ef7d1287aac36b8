"""A model of SAT, the accelerator of BDWP's paper: cycles of dense and N:M products on a systolic array.

The array has `rows x columns` processing elements of one multiplication a cycle. A product of T rows is
cut into tiles. *Output-stationary*: a tile of rows x outputs stays, inputs go by. *Weight-stationary*: a
tile of inputs x outputs stays, rows go by. In the N:M mode the activations of a group of M are broadcast
and each element picks those of its N weights, so inputs count N/M. Filling and draining a tile takes
`rows + columns - 2` cycles; interleaved tiles overlap them, and only the first pays. Both masks of a
layer are made once, behind the step of the optimiser, `lanes` weights a cycle. For each pass the dataflow
of fewer cycles is taken, offline.

After arXiv 2309.13015, as far as its abstract tells; the sizes are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from sparseflash.bench.results import Row


class Product(NamedTuple):
    """The shape of a layer as a product: T rows of inputs become T rows of outputs."""

    T: int
    inputs: int
    outputs: int
    sparse: bool = True


@dataclass(frozen=True)
class Array:
    """The accelerator.

    Parameters
    ----------
    rows, columns : int
        Processing elements.
    lanes : int
        Weights a cycle that the unit which sorts groups and the one that updates weights take.
    interleaved : bool
        Whether filling and draining of consecutive tiles overlap.

    Examples
    --------
    >>> Array(4, 4).cycles(8, 16, 8)  # four tiles, 16 cycles each, and one fill
    70
    >>> Array(4, 4).cycles(8, 16, 8, 0.25)
    22
    """

    rows: int = 32
    columns: int = 32
    lanes: int = 32
    interleaved: bool = True

    def cycles(self, T: int, inputs: int, outputs: int, share: float = 1.0) -> int:
        """Of one product, whose inner axis counts `share` of its length, by the better dataflow."""
        inner, across = ceil(inputs * share), ceil(outputs / self.columns)
        fill = self.rows + self.columns - 2
        stays = (ceil(T / self.rows) * across, inner), (ceil(inner / self.rows) * across, T)
        return min(tiles * long + (fill if self.interleaved else tiles * fill) for tiles, long in stays)

    def step(self, layer: Product, n: int, m: int) -> int:
        """Of a training step of a layer: forward, gradient of inputs, gradient of weights, masks, update."""
        T, inputs, outputs, sparse = layer
        share, weights = n / m if sparse else 1.0, ceil(inputs * outputs / self.lanes)
        passes = self.cycles(T, inputs, outputs, share) + self.cycles(T, outputs, inputs, share)
        masks = 2 * weights if sparse and n < m else 0
        return passes + self.cycles(inputs, T, outputs) + masks + weights


def resnet(stages: Sequence[int], *, image: int, batch: int, deep: bool) -> Iterator[Product]:
    """The products of a ResNet: the first convolution is dense, and so is the classifier."""
    size = image // 2 if image > 64 else image
    first = 7 if image > 64 else 3
    yield Product(batch * size * size, 3 * first * first, 64, sparse=False)
    size, inputs = size // 2 if image > 64 else size, 64
    for stage, blocks in enumerate(stages):
        width = 64 << stage
        outputs = 4 * width if deep else width
        for block in range(blocks):
            if stage and not block:
                size //= 2
            T = batch * size * size
            if deep:
                yield Product(T, inputs, width)
                yield Product(T, 9 * width, width)
                yield Product(T, width, outputs)
            else:
                yield Product(T, 9 * inputs, width)
                yield Product(T, 9 * width, width)
            if inputs != outputs:
                yield Product(T, inputs, outputs)
            inputs = outputs
    yield Product(batch, inputs, 1000 if image > 64 else 100, sparse=False)


NETS = {
    "ResNet-9-like, 32 px": lambda batch: resnet((1, 1, 1, 1), image=32, batch=batch, deep=False),
    "ResNet-18, 224 px": lambda batch: resnet((2, 2, 2, 2), image=224, batch=batch, deep=False),
    "ResNet-50, 224 px": lambda batch: resnet((3, 4, 6, 3), image=224, batch=batch, deep=True),
}


def rows(
    *,
    batch: int = 32,
    patterns: Iterable[tuple[int, int]] = ((2, 4), (2, 8), (1, 8)),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """A row for each net, pattern and dataflow: how many times fewer cycles, and fewer multiplications."""
    for name, make in NETS.items():
        layers = list(make(batch))
        work = [3 * x.T * x.inputs * x.outputs for x in layers]
        for n, m in patterns:
            left = sum(w * ((2 * n / m + 1) / 3 if x.sparse else 1) for w, x in zip(work, layers))
            for interleaved in (True, False):
                array = Array(interleaved=interleaved)
                dense = sum(array.step(layer, 1, 1) for layer in layers)
                own = sum(array.step(layer, n, m) for layer in layers)
                row: Row = {"bench": "layers-accelerator", "case": name, "pattern": f"{n}:{m}", "B": batch}
                row |= {"interleaved": interleaved, "cycles_dense": dense, "cycles": own}
                yield row | {"speedup": dense / own, "multiplications": sum(work) / left}

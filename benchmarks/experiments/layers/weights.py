"""N:M weights on images: a perceptron of 512, 512, 512 that trains dense, by BDWP, SR-STE, and more.

The first layer and the classifier stay dense, as in the paper ("all" has the first one sparse too). `share`
is the multiplications of a training step over those of the dense net, `share_sparse` that of the sparse
layers. A mask drawn once and kept stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError

from ..claim.rows import Job
from ..pixels import HELD_OUT

HIDDEN = (512, 512, 512)
Make = Callable[[int, int], nn.Module]


class Drawn(sf.nn.NMLinear):
    """N:M weights whose masks are drawn once, the forward's for the backward too."""

    drawn: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, rule="sr-ste", decay=0.0)
        chance = torch.rand(self.weight.shape)
        self.register_buffer("drawn", sf.nn.nm_mask(chance, self.n, self.m, 1))

    def masks(self) -> tuple[Tensor, Tensor]:
        """The same ones every time."""
        return self.drawn, self.drawn


CASES: dict[str, Make] = {
    "dense": nn.Linear,
    "bdwp 2:8": partial(sf.nn.NMLinear, n=2, m=8),
    "bdwp 2:4": partial(sf.nn.NMLinear, n=2, m=4),
    "sr-ste 2:8": partial(sf.nn.NMLinear, n=2, m=8, rule="sr-ste"),
    "one-sided 2:8": partial(sf.nn.NMLinear, n=2, m=8, rule="one-sided"),
    "drawn 2:8": Drawn,
    "bdwp 2:8, all": partial(sf.nn.NMLinear, n=2, m=8),
}


def jobs(
    images: Tensor, labels: Tensor, *, cases: Sequence[str], seeds: Sequence[int], epochs: int = 10
) -> list[Job]:
    """A row for each case and seed; the last tenth of the images is held out."""
    if len(images) != labels.numel():
        raise SparseFlashError(f"--images has {len(images)} images, --labels {labels.numel()}; give a pair")
    x, y = images.float() / 255, labels.flatten().long()
    keys = [
        {"bench": "layers-weights", "case": case, "seed": seed, "epochs": epochs, "images": len(x)}
        for case in cases
        for seed in seeds
    ]
    return [Job(key, partial(_run, key, x, y)) for key in keys]


def _run(key: Row, x: Tensor, y: Tensor, batch: int = 100, rate: float = 1e-3) -> Row:
    torch.manual_seed(key["seed"])
    sizes = (x.shape[1], *HIDDEN)
    hidden: list[nn.Module] = []
    for n, pair in enumerate(zip(sizes, sizes[1:])):
        make = CASES[key["case"]] if n or key["case"].endswith("all") else nn.Linear
        hidden += [make(*pair), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(sizes[-1], int(y.max()) + 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    train = round(len(x) * (1 - HELD_OUT))
    steps, total = 0, key["epochs"] * -(-train // batch)
    loss = torch.zeros(())
    for _ in range(key["epochs"]):
        for rows in torch.randperm(train).split(batch):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - steps / total)
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    with torch.no_grad():
        right = (net(x[train:]).argmax(-1) == y[train:]).float().mean()
    return {"accuracy": float(right), "loss": loss.item(), "steps": steps, **_shares(net)}


def _shares(net: nn.Sequential) -> Row:
    """Multiplications of a step over the dense ones: of the sparse layers, and of all."""
    own = dense = sparse_own = sparse_dense = 0
    for layer in net:
        if isinstance(layer, sf.nn.NMLinear):
            counts = sum(layer.multiplications(1))
            sparse_own, sparse_dense = sparse_own + counts, sparse_dense + 3 * layer.weight.numel()
        elif isinstance(layer, nn.Linear):
            own, dense = own + 3 * layer.weight.numel(), dense + 3 * layer.weight.numel()
    own, dense = own + sparse_own, dense + sparse_dense
    return {"share_sparse": sparse_own / sparse_dense if sparse_dense else 1.0, "share": own / dense}

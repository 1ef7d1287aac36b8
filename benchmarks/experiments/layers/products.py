"""Products with N:M weights beside dense ones: one product, and a training step of a linear layer.

Choosing the weights is inside the time. A step has three products, of which BDWP makes two sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.nn import NMLinear
from sparseflash.ops.nm import nm_product

SHAPES = ((2048, 256, 1024), (2048, 1024, 256), (4096, 1024, 1024))
"""Tokens, inputs, outputs."""
PATTERNS = ((2, 8), (1, 4), (2, 4))


def measure(
    *, threads: int = 1, rounds: int = 7, on_run: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """A row for each shape and pattern: milliseconds, and times faster than dense in fp32."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens, inputs, outputs in SHAPES:
            g = torch.Generator().manual_seed(0)
            x, weight = (torch.randn(n, inputs, generator=g) for n in (tokens, outputs))
            layers: dict[str, nn.Module] = {"dense": nn.Linear(inputs, outputs)}
            calls: dict[str, Callable[[], object]] = {"dense": partial(nn.functional.linear, x, weight)}
            for n, m in PATTERNS:
                calls[f"{n}:{m}"] = partial(nm_product, x, weight, n, m)
                layers[f"{n}:{m}"] = NMLinear(inputs, outputs, n=n, m=m)
            calls |= {f"{name}, step": partial(_step, layer, x) for name, layer in layers.items()}
            said = partial(_said, on_run, (tokens, inputs, outputs))
            found = interleave(calls, rounds=rounds, box=Box(120.0), on_run=said)
            for name in layers:
                one, step = found[name], found[f"{name}, step"]
                row: Row = {"bench": "layers-products", "case": name, "tokens": tokens, "threads": threads}
                row |= {"inputs": inputs, "outputs": outputs, "rounds": len(one.times)}
                row |= {"ms": one.median * 1e3, "speedup": found["dense"].over(one)}
                yield row | {"ms_step": step.median * 1e3, "speedup_step": found["dense, step"].over(step)}
    finally:
        torch.set_num_threads(before)


def _said(on_run: Callable[[str], None], shape: Sequence[int], name: str) -> None:
    on_run(f"{' x '.join(map(str, shape))}, {name}")


def _step(layer: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    layer(x).sum().backward()
    layer.zero_grad()

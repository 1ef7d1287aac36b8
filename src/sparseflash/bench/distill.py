"""Train SeerAttention gates on a frozen model's own attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods.gates import Blocks
from sparseflash.selection.grid import Grid

Seen = dict[int, tuple[Blocks, Tensor]]
"""By layer: the gate's pooled inputs, and its target."""


@torch.no_grad()
def listen(
    model: Any,
    ids: Tensor,
    layers: Sequence[int] | None = None,
    *,
    block: int = 64,
    target: Literal["max", "sum"] = "max",
) -> Seen:
    """Record the gates' inputs and targets for one text, `ids [1, T]`, in one forward.

    Parameters
    ----------
    model, ids, layers
        layers None: all layers without a window of their own.
    block : int
        Tokens per tile, and per block.
    target : "max" or "sum"
        The largest weight in a block, as in the paper, an output of the forward; or a block's total mass.
    """

    def record(q: Tensor, k: Tensor, v: Tensor, plan: Any, options: dict[str, Any], rope: Any) -> Any:
        out, peaks = sf.attention(q, k, v, plan, return_block_max=(block, block), **options)
        grid = Grid(q.shape[2], k.shape[2], block, block, device=q.device)
        if target == "sum":
            told = {name: options.get(name) for name in ("scale", "softcap")}
            peaks = sf.selection.tile_mass(q, k, grid, "exact", **told)
        return out, (Blocks.of(q, k, grid, rope), peaks)

    return overheard(model, ids, layers, record)


def overheard(
    model: Any, ids: Tensor, layers: Sequence[int] | None, record: Callable[..., tuple[Tensor, Any]]
) -> dict[int, Any]:
    """What `record(q, k, v, plan, options, rope)` keeps beside its output, by layer, in one forward."""
    from sparseflash.integrations.transformers import attention_layers
    from sparseflash.integrations.transformers.control import OVERHEARD, attached, on_sparse

    chosen = [x for x in attention_layers(model) if not x.windowed and (layers is None or x.index in layers)]
    found: dict[int, Any] = {}

    def listener(number: int) -> Callable[..., Tensor]:
        def attend(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
        ) -> Tensor:
            rope = vars(module).pop(OVERHEARD, {}).get("rope")
            out, found[number] = record(q, k, v, mask.plan, options, rope)
            return out

        return attend

    with on_sparse(model), attached(chosen, [listener(x.index) for x in chosen]):
        model.base_model(ids, use_cache=False)
    return found


def train(
    seen: Sequence[Seen],
    *,
    block: int = 64,
    steps: int = 500,
    batch: int = 4,
    lr: float = 1e-2,
    warm: int = 20,
    seed: int = 0,
    name: str = "",
    on_layer: Callable[[int], None] = lambda number: None,
) -> sf.methods.Gates:
    """Train a gate for every recorded layer, each separately, with AdamW and a cosine schedule of `steps`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from sparseflash.bench import distill
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> seen = distill.listen(LlamaForCausalLM(config).eval(), torch.arange(300)[None])
    >>> sorted(distill.train([seen], steps=5).layers)
    [0, 1]
    """
    if not seen:
        raise SparseFlashError("train(): nothing was listened to; expected at least one piece of text")
    generator, weights = torch.Generator().manual_seed(seed), {}
    rotary = all(blocks.rope is not None for piece in seen for blocks, _ in piece.values())
    for number in sorted(seen[0]):
        blocks, targets = _together([piece[number] for piece in seen])
        _, heads, _, head_dim = blocks.q.shape
        gate = sf.nn.SeerGate(heads, head_dim, block=block, generator=generator)
        for _ in fitting(gate.weight, steps, lr, warm):
            drawn = torch.randint(len(targets), (min(batch, len(targets)),), generator=generator)
            gate.loss(blocks._replace(q=blocks.q[drawn], k=blocks.k[drawn]), targets[drawn]).backward()
        weights[number] = gate.weight.detach()
        on_layer(number)
    return sf.methods.Gates(weights, block=block, rotary=rotary, name=name)


def fitting(weight: Tensor, steps: int, lr: float, warm: int) -> Iterator[int]:
    """Steps of AdamW with a warm-up and a cosine: the loop body leaves a gradient, and a step takes it."""
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        yield step
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.step()


def _together(pieces: Sequence[tuple[Blocks, Tensor]]) -> tuple[Blocks, Tensor]:
    """Concatenate pieces of equal length (and so equal positions) to one batch."""
    lengths = {blocks.q.shape[2] for blocks, _ in pieces}
    if len(lengths) > 1:
        raise SparseFlashError(f"pieces of {sorted(lengths)} tiles: expected pieces of one length")
    first = pieces[0][0]
    q, k = (torch.cat([getattr(blocks, name) for blocks, _ in pieces]) for name in "qk")
    return first._replace(q=q, k=k), torch.cat([target for _, target in pieces])


@torch.no_grad()
def divergences(gates: sf.methods.Gates, seen: Seen) -> tuple[float, float]:
    """Divergence of gates from the targets of a text, mean over layers; and that of equal weights.

    Kullback-Leibler divergence as in `nn.SeerGate.loss`, nats.
    """
    trained, equal = [], []
    for number, (blocks, target) in seen.items():
        weight = gates.of(number)
        gate = sf.nn.SeerGate(weight.shape[0], weight.shape[2], block=gates.block)
        for value, found in ((weight, trained), (torch.zeros_like(weight), equal)):
            gate.weight.copy_(value)
            found.append(float(gate.loss(blocks, target)))
    return sum(trained) / len(trained), sum(equal) / len(equal)

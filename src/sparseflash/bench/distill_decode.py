"""Train SeerAttention's decode gates on a frozen model's own attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.distill import fitting, overheard
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods.seer_decode import page_pools
from sparseflash.ops.rotary import rotation

EARLY = 4
"""Queries are drawn behind the first 1 / EARLY of a text: earlier ones reach few pages."""


class Heard(NamedTuple):
    """What a decode gate learns from in one layer of one text."""

    q: Tensor
    """Some queries `[1,Hq,n,D]`, as attention sees them."""
    at: Tensor
    """Integers `[1,n]`: their positions."""
    pools: Tensor
    """Pools of the pages of keys, `[1,Hkv,pages,3 D]`."""
    target: Tensor
    """Largest weight of each page, also over the heads of a group, `[1,Hkv,n,pages]`."""
    tables: list[Tensor] | None


@torch.no_grad()
def peaks(q: Tensor, k: Tensor, at: Tensor, page: int, scale: float, softcap: float | None = None) -> Tensor:
    """Largest weight of each page over the heads of a group, of queries at `at [1,n]`: `[1,Hkv,n,pages]`."""
    Hkv, T = k.shape[1], k.shape[2]
    logits = q.float().unflatten(1, (Hkv, -1)) @ k.float()[:, :, None].mT * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    late = torch.arange(T, device=k.device) > at[:, None, None, :, None]
    weights = logits.masked_fill(late, -torch.inf).softmax(-1).amax(2)
    return torch.nn.functional.pad(weights, (0, -T % page)).unflatten(-1, (-1, page)).amax(-1)


@torch.no_grad()
def listen(
    model: Any,
    ids: Tensor,
    layers: Sequence[int] | None = None,
    *,
    block: int = 64,
    rows: int = 256,
    seed: int = 0,
) -> dict[int, Heard]:
    """Record, by layer, what decode gates learn from in a text `ids [1,T]`: some queries, at random."""
    T = ids.shape[1]
    least = T // EARLY
    drawn = torch.randperm(T - least, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    at = (least + drawn).to(ids.device)

    def record(q: Tensor, k: Tensor, v: Tensor, plan: Any, options: dict[str, Any], rope: Any) -> Any:
        tables = None if rope is None else rotation(rope, k.shape[2])
        some = q[:, :, at].contiguous()
        scale = q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
        target = peaks(some, k, at[None], block, scale, options["softcap"])
        own = Heard(some, at[None], page_pools(k, block, tables), target, tables)
        return sf.attention(q, k, v, plan, **options), own

    return overheard(model, ids, layers, record)


def train(
    heard: Sequence[dict[int, Heard]],
    *,
    block: int = 64,
    steps: int = 500,
    lr: float = 1e-2,
    warm: int = 20,
    seed: int = 0,
    name: str = "",
    on_layer: Callable[[int], None] = lambda number: None,
) -> sf.methods.DecodeGates:
    """Train a decode gate for every recorded layer, by AdamW and a cosine of `steps`, a text a step."""
    if not heard:
        raise SparseFlashError("train(): nothing was listened to; expected at least one piece of text")
    generator, weights, rotary = torch.Generator().manual_seed(seed), dict[int, Tensor](), True
    for number in sorted(heard[0]):
        pieces = [piece[number] for piece in heard]
        q, pools = pieces[0].q, pieces[0].pools
        gate = sf.nn.SeerDecodeGate(q.shape[1], pools.shape[1], q.shape[3], block=block, generator=generator)
        rotary = rotary and pieces[0].tables is not None
        for _ in fitting(gate.weight, steps, lr, warm):
            one = pieces[int(torch.randint(len(pieces), (), generator=generator))]
            gate.loss(gate.of_pools(one.q, one.pools, one.at, one.tables), one.target).backward()
        weights[number] = gate.weight.detach()
        on_layer(number)
    return sf.methods.DecodeGates(weights, block=block, rotary=rotary, name=name)


@torch.no_grad()
def divergences(gates: sf.methods.DecodeGates, heard: dict[int, Heard]) -> tuple[float, float]:
    """Divergence of gates from the targets of a text, mean over layers, nats; and that of equal weights."""
    trained, equal = [], []
    for number, one in heard.items():
        Hkv, D = one.pools.shape[1], one.q.shape[3]
        gate = sf.nn.SeerDecodeGate(one.q.shape[1], Hkv, D, block=gates.block)
        gate.weight.copy_(gates.of(number))
        found = gate.of_pools(one.q, one.pools, one.at, one.tables)
        trained.append(float(gate.loss(found, one.target)))
        equal.append(float(gate.loss(torch.where(found.isfinite(), 0.0, found).log_softmax(-1), one.target)))
    return sum(trained) / len(trained), sum(equal) / len(equal)

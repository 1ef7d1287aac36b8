"""A small GPT over bytes, written to be read in one go.

Pre-norm blocks, RMSNorm without parameters, rotary positions, a GELU MLP four times as wide, no biases.
Output projections start at zero, so every block starts as the identity and the first steps are well behaved.
The attention is a plain callable ``(q, k, v) -> out``, or a layer of `sparseflash.nn` that includes the
projections: the model does not know which method it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.nn import Layer, State
from sparseflash.nn.base import draw
from sparseflash.nn.self_attention import forget
from sparseflash.ops._arguments import AnyPlan
from sparseflash.ops.attention import attention
from sparseflash.plan import Plan
from sparseflash.train.attention import Attention, Sparse, dense, mixers
from sparseflash.train.config import TrainConfig
from sparseflash.train.errors import TrainError

VOCABULARY = 256
MASK = VOCABULARY
"""The token of what is masked, which models of the objective "masked" read and never predict."""
HIGHEST = 15.0
"""Initial score of a query and a key of equal direction: e^15 outweighs any number of other keys."""


def norm(x: Tensor) -> Tensor:
    """Divide each vector by its root mean square."""
    return F.rms_norm(x, (x.shape[-1],))


def rotary_table(length: int, dim: int, base: float = 10_000.0) -> Tensor:
    """Tabulate cos and sin of every (position, frequency): fp32 [2, length, dim / 2]."""
    frequency = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the two halves of each head of x [B, T, H, D] by its position; table [2, (B,) T, D / 2]."""
    cos, sin = table[..., None, :]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Projections around one attention callable.

    Normalised queries and keys bound the scores by sqrt(D): at D = 32 and 4096 keys, one key could take 6 %
    of the weight at most. The learned `sharpness` scales the queries of each head, so that one key can
    outweigh all others.
    """

    def __init__(self, config: TrainConfig, attention: Attention) -> None:
        super().__init__()
        self.heads, self.tied, self.attention = config.heads, config.qk == "tied", attention
        self.dropout = config.dropout
        self.project = nn.Linear(config.width, config.width * (2 if self.tied else 3), bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        if not self.tied:
            self.sharpness = nn.Parameter(torch.empty(config.heads, 1))

    @property
    def decodes(self) -> bool:
        """Whether decoding token by token selects the same keys as a whole forward."""
        if isinstance(self.attention, Sparse):
            return self.attention.method.decodes
        return self.attention is dense

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        plan: Plan | None = None,
        state: State | None = None,
        attend: Attention | None = None,
    ) -> Tensor:
        """Mix along the sequence, by `plan` or `attend` if given; x [B, T, width]."""
        heads = self.project(x).unflatten(-1, (-1, self.heads, x.shape[-1] // self.heads))
        if self.tied:
            q, v = heads.unbind(2)
            q = rotate(q, table)
            k = F.normalize(q, dim=-1)
        else:
            q, k, v = heads.unbind(2)
            q, k = norm(rotate(q, table)) * self.sharpness.to(q.dtype), norm(rotate(k, table))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        more: dict[str, float] = {"dropout_p": self.dropout} if self.training and self.dropout else {}
        if state is not None:
            k, v = state.append(k=k, v=v)
            more["q_offset"] = k.shape[2] - x.shape[1]  # index of the first query in the cache
        if attend is None:
            attend = self.attention if plan is None else partial(attention, plan=plan)
        out = attend(q, k, v, **more)
        if state is not None:
            forget(self.attention.method if isinstance(self.attention, Sparse) else None, state)
            state.length += x.shape[1]
        return self.output(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention or another sequence mixer, then MLP, each applied to normalised input and added."""

    def __init__(self, config: TrainConfig, mixer: Attention | Layer) -> None:
        super().__init__()
        self.attention = mixer if isinstance(mixer, Layer) else SelfAttention(config, mixer)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        plan: Plan | None = None,
        state: State | None = None,
        attend: Attention | None = None,
    ) -> Tensor:
        """Transform x [B, T, width]."""
        if isinstance(self.attention, Layer):
            x = x + self.attention(norm(x), plan=plan, state=state)
        else:
            x = x + self.attention(norm(x), table, plan, state, attend)
        return x + self.down(F.gelu(self.up(norm(x))))


class GPT(nn.Module):
    """The language model of ``sparseflash train``.

    Parameters
    ----------
    config : TrainConfig
        Shape, attention and seed.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.train import GPT, TrainConfig
    >>> model = GPT(TrainConfig(data="", layers=1, width=32, heads=2, length=16))
    >>> model(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 256])
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.masked = config.objective == "masked"
        self.embed = nn.Embedding(VOCABULARY + self.masked, config.width)
        self.context = {"step": 0}  # what methods can read besides q, k and v
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in mixers(config, self.context))
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.base = config.rope_base
        table = rotary_table(config.length, config.width // config.heads, self.base)
        self.register_buffer("table", table, persistent=False)
        self.reset(config.seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw fresh weights from `seed`, independent of the global random state."""
        generator = torch.Generator().manual_seed(seed)
        layers = {f"blocks.{n}.attention.": layer for n, layer in enumerate(self.layers()) if layer}
        for name, weight in self.named_parameters():
            if name.startswith(tuple(layers)):
                continue
            if name.endswith(("output.weight", "down.weight", "head.weight")):
                weight.zero_()
            elif name.endswith("sharpness"):
                weight.fill_(HIGHEST / (self.table.shape[-1] * 2) ** 0.5)
            else:
                # The embedding is normalised at once: small ones change direction quickly.
                std = 0.02 if name == "embed.weight" else weight.shape[1] ** -0.5
                weight.normal_(0.0, std, generator=generator)
        for layer in layers.values():
            layer.reset(generator)
            draw(layer.output.weight, 0.0, None)

    def layers(self) -> list[Layer | None]:
        """The blocks' mixers that are `sparseflash.nn` layers; None for other blocks."""
        found = [block.attention for block in self.blocks]
        return [mixer if isinstance(mixer, Layer) else None for mixer in found]

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[int, AnyPlan]]:
        """Collect the plans of the forwards inside, by layer, of those layers that have a method."""
        plans: dict[int, AnyPlan] = {}
        found = [getattr(block.attention, "attention", None) for block in self.blocks]
        known = [(n, own) for n, own in enumerate(found) if isinstance(own, Sparse)]
        for n, own in known:
            own.note = partial(plans.__setitem__, n)
        try:
            yield plans
        finally:
            for _, own in known:
                own.note = None

    def aux_loss(self) -> Tensor:
        """Auxiliary loss of the last forward, summed over the layers."""
        found = [layer.aux_loss for layer in self.layers() if layer]
        return torch.stack(found).sum() if found else self.head.weight.new_zeros(())

    @property
    def decodes(self) -> bool:
        """Whether every layer can decode with a state."""
        return not self.masked and all(block.attention.decodes for block in self.blocks)

    @property
    def rotary(self) -> bool:
        """Whether any layer uses rotary positions, which limits it to the training length."""
        return any(layer is None or layer.positions == "rotary" for layer in self.layers())

    def new_state(self, batch: int) -> list[State]:
        """Make an empty state for each layer, to read `batch` sequences in parts."""
        return [
            block.attention.new_state(batch) if isinstance(block.attention, Layer) else State(batch)
            for block in self.blocks
        ]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        plan: Plan | None = None,
        state: list[State] | None = None,
        weights: Tensor | None = None,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute logits [B, T, 256] of the next byte, or with `targets` [B, T] the mean loss in nats.

        A masked model gives logits of each byte itself. Targets of -100 are ignored. With `weights` [B, T]
        the loss is the mean over all B * T tokens of what each costs times its weight. For packed documents:
        `positions` [B, T] restart with each document, and `plan` (replacing the model's attention) keeps them
        apart. With `state` from `new_state`, tokens continue the ones read before. `attend(layer, q, k, v)`
        replaces the attention of every layer; q, k, v and its result are [B, heads, T, width / heads].
        """
        if attend is not None and any(self.layers()):
            raise TrainError("attend= beside layers that project for themselves; expected methods, or dense")
        if positions is not None and any(self.layers()):
            raise TrainError(
                "positions= beside layers that count their own; expected sequences of one document"
            )
        x = norm(self.embed(tokens))
        if positions is None:
            past = state[0].length if state else 0
            table = self._table(past + tokens.shape[1])[:, past:]
        else:
            table = self.table[:, positions]
        for n, block in enumerate(self.blocks):
            own = None if attend is None else partial(attend, n)
            x = block(x, table, plan, state[n] if state else None, own)
        logits = self.head(norm(x)).float()
        if targets is None:
            return logits
        if weights is None:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        costs = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (costs * weights.flatten()).mean()

    def _table(self, length: int) -> Tensor:
        """Cos and sin of `length` positions; the table is extended when needed."""
        if length > self.table.shape[1]:
            dim = 2 * self.table.shape[2]
            self.table = rotary_table(length, dim, self.base).to(self.table.device)
        return self.table[:, :length]

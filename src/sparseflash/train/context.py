"""Context parallelism for the trainer: the tokens of a sequence are sharded over several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sparseflash import distributed
from sparseflash.distributed import ContextParallel
from sparseflash.methods.base import Method
from sparseflash.plan import Plan
from sparseflash.train.attention import Sparse
from sparseflash.train.errors import TrainError
from sparseflash.train.parallel import World


class Context:
    """Groups of `size` processes that share a sequence; rank = group * size + rank inside the group.

    Parameters
    ----------
    world : World
        All processes.
    size : int
        Processes per group; 1 disables sharing.
    timeout : float
        Seconds after which a silent process is an error.
    """

    def __init__(self, world: World, size: int, timeout: float = 300.0) -> None:
        if world.size % size:
            raise TrainError(
                f"--context-parallel {size} does not divide the {world.size} processes there are; start them "
                f"with: torchrun --nproc-per-node {size} -m sparseflash train --context-parallel {size} ..."
            )
        self.size, self.groups, self.group_rank = size, world.size // size, world.rank // size
        self.timeout = timeout
        self.group = None
        if size > 1:
            made = [dist.new_group(range(g * size, (g + 1) * size)) for g in range(self.groups)]
            self.group = made[self.group_rank]
        self._of: dict[int, ContextParallel] = {}
        self._method: Method | None = None

    def share(self, model: nn.Module) -> None:
        """Replace the attention of all layers of a model by one over the group."""
        kinds = set()
        for module in model.modules():
            inner = getattr(module, "attention", None)
            if callable(inner) and not isinstance(inner, nn.Module):
                module.attention = Across(inner)
                self._method = inner.method if isinstance(inner, Sparse) else None
                kinds.add(type(self._method))
        if len(kinds) > 1:
            raise TrainError(
                "--context-parallel shares tokens for one --attention, not for a pattern of several"
            )

    def of(self, length: int) -> ContextParallel:
        """The `ContextParallel` for sequences of `length` tokens, cached."""
        if length not in self._of:
            if length < 2 * self.size:
                raise TrainError(
                    f"{length} tokens over --context-parallel {self.size}: expected at least "
                    f"{2 * self.size}; use a larger --length, a longer text, or fewer processes"
                )
            plan = self._method or Plan.dense(length, length, causal=True)
            self._of[length] = distributed.context_parallel(
                self.group, plan, length=length, timeout=self.timeout
            )
        return self._of[length]


class Across:
    """A trainer's attention callable over the processes that share the sequence."""

    def __init__(self, attention: Any) -> None:
        self.method = attention.method if isinstance(attention, Sparse) else None
        self.context: Mapping[str, Any] = attention.context if isinstance(attention, Sparse) else {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
        """Attend from this process's tokens to those of all processes."""
        found: Tensor = distributed.attention(q, k, v, self.method, ctx=self.context, dropout_p=dropout_p)
        return found

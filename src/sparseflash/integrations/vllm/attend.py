"""One layer of a model that is served: exact attention over what its requests see of a pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import cache
from ...common.errors import require
from ...methods.reading import ReadingMethod
from ...ops.attention import attention
from ...ops.decode import decode
from ...plan import Plan
from .pool import Kept, Pool
from .settings import Settings
from .step import Group, Step


@dataclass
class Layer:
    """How a layer attends, and what its method keeps of the pool.

    Parameters
    ----------
    settings : Settings
        What chooses, in layers without a window of their own.
    scale, softcap : float
        Of the logits; no softcap is None.
    window : int, optional
        How many tokens a query sees, its own among them.
    sinks : Tensor, optional
        `[Hq]`: sink logits.
    """

    settings: Settings
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    _kept: Kept | None = field(default=None, repr=False)

    def write(self, pool: Pool, key: Tensor, value: Tensor, step: Step) -> None:
        """Put the keys and values `[tokens, Hkv, D]` of a step into the pool."""
        pool.write(key[: step.tokens][step.written], value[: step.tokens][step.written], step.slots)
        if isinstance(self._reads, ReadingMethod):
            kept = self._summary(pool, self._reads)
            kept.renew(step.touched(kept.summary.page))

    def __call__(self, pool: Pool, q: Tensor, step: Step, out: Tensor) -> None:
        """Attention of q `[tokens, Hq, D]` into out `[tokens, Hq, D]`."""
        for group, over in ((step.singles, self._singles), (step.chunks, self._chunks)):
            if group is not None:
                out[group.tokens] = over(pool, q[group.tokens], group)

    @property
    def _reads(self) -> ReadingMethod | cache.StreamingLLM | None:
        """What chooses keys for single tokens."""
        return self.settings.decode if self.window is None else None

    @property
    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "sink_logits": self.sinks}

    def _summary(self, pool: Pool, method: ReadingMethod) -> Kept:
        if self._kept is None or self._kept.at != pool.tokens.data_ptr():  # vLLM has made its cache anew
            summary = method.summary(pool.keys)
            require(
                (
                    pool.block % method.page == 0 and method.page % summary.page == 0,
                    lambda: (
                        f"page={method.page} of {type(method).__name__}, blocks of {pool.block} tokens: "
                        "expected pages that divide a block (block_size=)"
                    ),
                )
            )
            self._kept = Kept(summary, pool)
        return self._kept

    def _dense(self, pool: Pool, group: Group) -> Plan:
        sides = None if self.window is None else (self.window - 1, 0)
        return group.plan(len(pool.tokens), sides)

    def _singles(self, pool: Pool, q: Tensor, group: Group) -> Tensor:
        """One token of each request, `[n, Hq, D]`."""
        by = self._reads
        if isinstance(by, cache.StreamingLLM):
            plan = group.plan(len(pool.tokens), (int(by.budget) - by.sinks - 1, 0), by.sinks)
        elif by is not None:
            plan = self._chosen(pool, q, group, by)
        else:
            plan = self._dense(pool, group)
        return decode(q[:, :, None], pool.keys, pool.values, plan, **self._options)[:, :, 0]

    def _chosen(self, pool: Pool, q: Tensor, group: Group, method: ReadingMethod) -> Plan:
        """The pages that a method chooses by what is kept of them: all, if they are within its budget."""
        fit = (group.longest - 1) // method.page < method.budget // method.page
        if fit and not method.closed(pool.tokens.shape[1]):
            return self._dense(pool, group)
        kept = self._summary(pool, method)
        rows = kept.of(group.pages(kept.summary.page))
        best = method.best(q[:, :, None], kept.summary, rows, (group.lengths - 1)[:, None])
        return Plan.from_pages(
            group.pages(method.page),
            group.lengths,
            page_size=method.page,
            Tk=len(pool.tokens),
            choice=best[:, :, 0],
        )

    def _chunks(self, pool: Pool, q: Tensor, group: Group) -> Tensor:
        """Chunks of prompts behind one another, `[tokens, Hq, D]`."""
        method = self.settings.prefill if self.window is None else None
        if method is None:
            given = q.transpose(0, 1)[None], pool.keys, pool.values, self._dense(pool, group)
            return attention(*given, **self._options)[0].transpose(0, 1)
        out = []
        ends = group.edges.tolist()
        for n, length in enumerate(group.lengths.tolist()):  # a method knows one sequence at a time
            own = q[ends[n] : ends[n + 1]].transpose(0, 1)[None]
            keys, values = pool.gathered(group.blocks[n, : -(-length // group.block)], length)
            found = method(own, keys, values, q_offset=length - own.shape[2], **self._options)
            out.append(found[0].transpose(0, 1))
        return torch.cat(out)

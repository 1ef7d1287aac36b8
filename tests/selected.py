"""Attention whose pairs follow from one value per query and one per key, held to dense softmax in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness import inputs
from tolerance import compare


def tensors(
    generator: torch.Generator, Tq: int, Tk: int | None = None, *, Hq: int = 4, Hkv: int = 4, **given: Any
) -> tuple[Tensor, ...]:
    """q, k, v and dout, with keys of their own for each head."""
    return inputs(generator, Tq, Tk, H=Hq, Hkv=Hkv, **({"D": 16, "Dv": 8} | given))[:4]


@dataclass(frozen=True)
class Selected:
    """A function ``attend(q, k, v, of_q, of_k)``, and which pairs of those values it lets see each other."""

    attend: Callable[..., Any]
    sees: Callable[[Tensor, Tensor], Tensor]

    def mask(self, of_q: Tensor, of_k: Tensor, Hq: int, include_self: bool = True) -> Tensor:
        """The definition: related, and not later. [B, Hq, Tq, Tk]."""
        of_q, of_k = (x.repeat_interleave(Hq // x.shape[1], 1).long() for x in (of_q, of_k))
        i, j = torch.arange(of_q.shape[-1])[:, None], torch.arange(of_k.shape[-1])
        earlier = (i >= j) if include_self else (i > j)
        return self.sees(of_q[..., :, None], of_k[..., None, :]).bool() & earlier

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, of_q: Tensor, of_k: Tensor, **options: Any
    ) -> dict[str, Tensor]:
        """Out, lse and the gradients."""
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse = self.attend(*leaves, of_q, of_k, return_lse=True, **options)
        grads = torch.autograd.grad(out, leaves, dout)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))

    def check(
        self, given: list[Tensor], of_q: Tensor, of_k: Tensor, include_self: bool = True, **options: Any
    ) -> dict[str, Tensor]:
        """Run, and hold every result to the definition."""
        q, k, v, dout = given
        got = self.run(q, k, v, dout, of_q, of_k, include_self=include_self, **options)
        options.pop("backend", None)
        mask = self.mask(of_q, of_k, q.shape[1], include_self).expand(q.shape[0], -1, -1, -1)
        compare(got, q, k, v, mask, dout=dout, **options)
        return got

"""Which backend runs a call: the protocol, the order of preference, and why a backend refuses."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from .errors import BackendError
from .plan import Plan
from .plan.make import native as builders

PREFERENCE = ("triton", "cpu", "reference")


class Backend(Protocol):
    """What a module under `backends/` offers."""

    NAME: str

    def status(self) -> tuple[bool, str]:
        """Whether it can run on this machine, and what it is or why not."""
        ...

    def refuse(self, *tensors: Tensor) -> list[str]:
        """Every reason why an op on these tensors cannot run here; empty when it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        *,
        scale: float,
        softcap: float,
        key_bias: Tensor | None,
        out_dtype: torch.dtype,
        normed: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Out, natural-log lse and, where `normed`, the norm [2,B,Hq,Tq] (see `numerics`)."""
        ...

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plans: Sequence[Plan],
        *,
        scale: float,
        softcap: float,
        key_bias: Tensor | None,
        sink_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One softmax over all plans and the sinks, for few queries over many keys: out like q, and lse."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        norm: Tensor,
        dlse: Tensor | None,
        plan: Plan,
        *,
        scale: float,
        softcap: float,
        key_bias: Tensor | None,
        grad_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and (per query head, full precision) key_bias."""
        ...

    def stats(
        self,
        q: Tensor,
        k: Tensor,
        norm: Tensor,
        plan: Plan,
        *,
        over: str,
        peak: bool,
        scale: float,
        softcap: float,
        key_bias: Tensor | None,
        width: int,
    ) -> Tensor:
        """Statistics of the weights under a given norm, [B,Hq,width]."""
        ...

    def indexer_topk(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        low: Tensor,
        high: Tensor,
        keep: Tensor | None,
        *,
        topk: int,
        scored: bool,
    ) -> tuple[Tensor, Tensor]:
        """The keys that each query chooses, and their scores."""
        ...

    def indexer_loss(
        self,
        q_index: Tensor,
        k_index: Tensor,
        weights: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        index: Tensor | None,
        low: Tensor,
        high: Tensor,
        keep: Tensor | None,
        *,
        index_scale: float,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How far an indexer is from the attention, summed over queries, and its three gradients."""
        ...

    def linear_forward(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, initial: Tensor | None, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Out and the state after the last token."""
        ...

    def linear_backward(
        self,
        dout: Tensor,
        dstate: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor | None,
        initial: Tensor | None,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and the initial state."""
        ...

    def pointwise_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        *,
        activation: str,
        scale: float,
        out_scale: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Out."""
        ...

    def pointwise_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        *,
        activation: str,
        scale: float,
        out_scale: float,
        grad_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...

    def stick_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Out and what is left of the sticks."""
        ...

    def stick_backward(
        self,
        dout: Tensor,
        drem: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here, and what it is or why it cannot."""

    name: str
    usable: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'usable' if self.usable else 'not usable'} ({self.detail})"


@functools.cache
def _load(name: str) -> ModuleType | str:
    """The backend's module, or why there is none; asked on every call, so found once."""
    try:
        return importlib.import_module(f"sparseflash.backends.{name}")
    except ImportError as error:
        return f"not available: {error}"


def backends() -> dict[str, BackendStatus]:
    """Every backend with whether it is usable on this machine, and why not where it is not.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sf.backends()["reference"].usable
    True
    """
    found = {}
    for name in PREFERENCE:
        module = _load(name)
        usable, detail = (False, module) if isinstance(module, str) else module.status()
        found[name] = BackendStatus(name, usable, detail)
    return found


def _order(x: Tensor) -> tuple[str, ...]:
    """What to ask first: for tensors in main memory not what would only load a GPU's packages to refuse."""
    return ("cpu", "reference", "triton") if x.device.type == "cpu" else PREFERENCE


def choose(op: str, wanted: str, *tensors: Tensor) -> Backend:
    """The first backend by preference that has the op and can run it on these tensors, or the wanted one."""
    wanted = wanted or os.environ.get("SPARSEFLASH_BACKEND", "")
    if wanted and wanted not in PREFERENCE:
        raise BackendError(f"backend={wanted!r}: expected one of {', '.join(PREFERENCE)}, or None to choose")
    said = []
    for name in (wanted,) if wanted else _order(tensors[0]):
        module = _load(name)
        if isinstance(module, str):
            said.append(f"{name}: {module}")
            continue
        reasons = module.refuse(*tensors) if hasattr(module, op) else [f"has no {op}"]
        if not wanted and not reasons and (caution := getattr(module, "CAUTION", "")):
            reasons = [caution]
        if not reasons:
            return module
        said += [f"{name}: {reason}" for reason in reasons]
    raise BackendError("no backend can run this call:\n  " + "\n  ".join(said))


def _builders() -> builders.Builders | None:
    """Who makes lists in main memory: the CPU backend, if it runs here and no other one is wanted."""
    if os.environ.get("SPARSEFLASH_BACKEND", "") not in ("", "cpu"):
        return None
    module = _load("cpu")
    return module.lists if not isinstance(module, str) and module.status()[0] else None


builders.offer(_builders)

"""What a method remembers from call to call: a state for each layer, kept by whoever runs the model."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from .base import Context, Method, Selection


class Session:
    """A method with its states, one for each layer, branch and batch slot: a generation, a denoising run.

    A method is frozen and remembers nothing. Where a selection is used again (patterns found once, caches of
    summaries), the session hands its last state back in `ctx["state"]`. Two generations are two sessions.

    Parameters
    ----------
    method : Method
        Any method; one that has no state behaves as it does by itself.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> session = sf.methods.Session(sf.methods.Window(window=16))
    >>> q, k, v = torch.randn(3, 1, 2, 64, 32)
    >>> session(q, k, v, layer=0).shape, len(session)
    (torch.Size([1, 2, 64, 32]), 0)
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._states: dict[tuple[Hashable, ...], Any] = {}

    def __len__(self) -> int:
        """How many states are kept."""
        return len(self._states)

    def __repr__(self) -> str:
        return f"Session({self.method!r}, {len(self)} states)"

    def context(self, ctx: Context | None = None) -> dict[str, Any]:
        """`ctx` with the state of its layer, branch and slot, where there is one."""
        given = dict(ctx or {})
        key = self._key(given)
        return given | {"state": self._states[key]} if key in self._states else given

    def keep(self, ctx: Context | None, state: Any) -> None:
        """Remember a state for the layer, branch and slot of `ctx`; None is nothing to remember."""
        if state is not None:
            self._states[self._key(ctx or {})] = state

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """`Method.select` with the kept state; what it returns as state is kept."""
        selection = self.method.select(q, k, _without_slot(self.context(ctx)))
        self.keep(ctx, selection.state)
        return selection

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: Hashable = None,
        branch: Hashable = None,
        slot: Hashable = None,
        ctx: Context | None = None,
        **options: Any,
    ) -> Any:
        """Select with the state of (layer, branch, slot), attend, and keep what the method observes.

        Parameters
        ----------
        q, k, v, ctx
            As in a call of the method.
        layer, branch, slot : hashable, optional
            Which layer this is; which of several runs through it (guided and unguided); which rows of a
            batch that is served in turns.
        **options
            `scale`, `softcap`, ..., `return_lse`, as in a call of the method.
        """
        own = {"layer": layer, "branch": branch, "slot": slot}
        given = {**(ctx or {}), **{name: x for name, x in own.items() if x is not None}}
        called = self.method.call(q, k, v, ctx=_without_slot(self.context(given)), **options)
        self.keep(given, called.state)
        return called.result

    def reset(self) -> None:
        """Forget all states."""
        self._states.clear()

    def _key(self, ctx: Context) -> tuple[Hashable, ...]:
        layer = None if self.method.across_layers else ctx.get("layer")
        return layer, ctx.get("branch"), ctx.get("slot")

    def forget(self, branch: Hashable) -> None:
        """Forget the states of one branch: it begins anew."""
        self._states = {key: state for key, state in self._states.items() if key[1] != branch}


def _without_slot(ctx: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in ctx.items() if name != "slot"}

"""`Session`: keeps the state of a method between calls, for each layer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from .base import Context, Method, Selection


class Session:
    """A method with a state per layer, branch and batch slot: one generation, one denoising run.

    A method is frozen and stores nothing. If a selection is reused (patterns found once, caches of
    summaries), the session passes the last state back in `ctx["state"]`. Use one session per generation.

    Parameters
    ----------
    method : Method
        Any method; a method without state behaves as without a session.

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
        """Number of stored states."""
        return len(self._states)

    def __repr__(self) -> str:
        return f"Session({self.method!r}, {len(self)} states)"

    def context(self, ctx: Context | None = None) -> dict[str, Any]:
        """Add to `ctx` the state of its layer, branch and slot, if there is one."""
        given = dict(ctx or {})
        key = self._key(given)
        return given | {"state": self._states[key]} if key in self._states else given

    def keep(self, ctx: Context | None, state: Any) -> None:
        """Store a state for the layer, branch and slot of `ctx`; None stores nothing."""
        if state is not None:
            self._states[self._key(ctx or {})] = state

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Call `Method.select` with the stored state, and store the state that it returns."""
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
        """Select with the state of (layer, branch, slot), attend, and store the state from `observe`.

        Parameters
        ----------
        q, k, v, ctx
            As in a call of the method.
        layer, branch, slot : hashable, optional
            The layer; the run through it (guided or unguided); the slot of a batch whose requests take turns.
        **options
            `scale`, `softcap`, ..., `return_lse`, as in a call of the method.
        """
        own = {"layer": layer, "branch": branch, "slot": slot}
        given = {**(ctx or {}), **{name: x for name, x in own.items() if x is not None}}
        called = self.method.call(q, k, v, ctx=_without_slot(self.context(given)), **options)
        self.keep(given, called.state)
        return called.result

    def reset(self) -> None:
        """Delete all states."""
        self._states.clear()

    def _key(self, ctx: Context) -> tuple[Hashable, ...]:
        layer = None if self.method.across_layers else ctx.get("layer")
        return layer, ctx.get("branch"), ctx.get("slot")

    def forget(self, branch: Hashable) -> None:
        """Delete the states of one branch, so that it starts again."""
        self._states = {key: state for key, state in self._states.items() if key[1] != branch}


def _without_slot(ctx: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in ctx.items() if name != "slot"}

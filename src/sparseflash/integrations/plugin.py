"""One callable, `attend(q, k, v, params, is_causal, softmax_scale)`, for hosts that take a function.

The contract is that of vLLM-Omni's `SPARSE_ATTN` backend, which finds the function as the entry point
"sparseflash" of the group "vllm_omni.sparse_attn"; any other host may call it. No host is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import methods
from ..common.errors import SparseFlashError, require
from ..methods.base import Method, Selection
from ..methods.session import Session
from ..plan import Plan
from ._host import exact, named_method, over

REFUSED = ("attn_mask", "full_attn_spans")
"""Inputs of the contract that change the result; a function without the capability is not given them."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float | None,
) -> Tensor:
    """Attend by the method that `params` names: exactly over what it selects, or over everything.

    Parameters
    ----------
    query, key, value : Tensor
        `[B, Tq, Hq, D]`, `[B, Tk, Hkv, D]`, `[B, Tk, Hkv, Dv]`: tokens before heads, with any strides.
    params : mapping
        Settings of the host and facts of the call, in one mapping. Read are

        - `method`: a name ("sliding-tile"), an object of a name and hyper-parameters
          (`{"name": "sliding-tile", "window": [3, 3, 3]}`), or a Method. None or "dense": every key.
        - `latent_shape` and `patch_size`, `[B|1, 3]` or three ints: latents before patches, and a patch; or
          `grid`, sizes in tokens.
        - `text`: tokens behind the grid, or (before, behind).
        - `denoise_step_idx` and `total_denoise_steps`, `[B|1]` or an int.
        - `session`, a `methods.Session` in place of `method`, with `layer` and `branch`: for methods that
          keep a pattern over the steps. The host keeps one for each generation.
        - every other key that the method's `reads` names.

        Whatever else is there belongs to somebody else and is ignored.
    is_causal : bool
        Hide later keys.
    softmax_scale : float, optional
        Factor of q·k; None: D ** -0.5.

    Returns
    -------
    Tensor
        `[B, Tq, Hq, Dv]`.

    Raises
    ------
    SparseFlashError
        For an unknown method or hyper-parameter; a grid that is not the sequence; samples at different steps;
        a method that keeps a pattern over the steps, without a session or a layer; a causal method in a call
        that is not causal; `attn_mask` and `full_attn_spans`, for which `capabilities` has no entry.

    Notes
    -----
    `attend.capabilities` is the table that vLLM-Omni reads: it is empty.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.integrations.plugin import attend
    >>> q, k, v = torch.randn(3, 1, 4 * 8 * 8, 2, 32)
    >>> params = {"method": {"name": "efficient-vdit", "references": 1}}
    >>> params |= {"latent_shape": torch.tensor([[4, 16, 16]]), "patch_size": torch.tensor([[1, 2, 2]])}
    >>> attend(q, k, v, params, is_causal=False, softmax_scale=None).shape
    torch.Size([1, 256, 2, 32])
    """
    for name in REFUSED:
        require(
            (params.get(name) is None, lambda name=name: f"params[{name!r}]: not supported; leave it out"),
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    session = _session(params)
    if session is None:
        plan = Plan.dense(q.shape[2], k.shape[2], causal=is_causal, device=q.device)
        return exact(q, k, v, plan, {"scale": softmax_scale}).transpose(1, 2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    ctx = session.context({**_told(session.method, params), "v": v, "scale": scale})
    try:
        selection = session.method.select(q, k, {name: x for name, x in ctx.items() if name != "slot"})
    except SparseFlashError as fault:
        raise SparseFlashError(f"{fault} (in a host's params: {', '.join(sorted(params))})") from fault
    selection = _as_causal(session.method, selection, is_causal)
    return over(session, q, k, v, selection, {"scale": softmax_scale}, ctx).transpose(1, 2)


vars(attend)["capabilities"] = {}  # the contract reads it off the function: no mask, no spans


def _session(params: Mapping[str, Any]) -> Session | None:
    """The session that a host keeps, or a new one of its method; None: every key."""
    session, given = params.get("session"), params.get("method")
    if session is not None:
        if not isinstance(session, Session) or given is not None:
            raise SparseFlashError(
                f'params["session"]={session!r}: expected a methods.Session, and no params["method"]'
            )
        if "state" in session.method.reads and params.get("layer") is None:
            raise SparseFlashError(f'{session.method!r} keeps something for each layer: give params["layer"]')
        return session
    if not isinstance(given, Method):
        named = named_method(given, "sliding-tile")
        if named is None:
            return None
        given = methods.get(named[0], **named[1])
    require(
        (
            "state" not in given.reads,
            lambda: (
                f"{given!r} keeps a pattern from step to step, and a function keeps nothing: give "
                'params["session"], one methods.Session a generation, with params["layer"] and '
                'params["branch"]; or take a method of shapes, such as sliding-tile'
            ),
        )
    )
    return Session(given)


def _told(method: Method, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the method is told of the call: `ctx`."""
    told = {name: params[name] for name in (*method.reads, "layer", "branch", "slot") if name in params}
    for name, key in (("step", "denoise_step_idx"), ("steps", "total_denoise_steps")):
        if key in params and name not in told:
            told[name] = _alike(key, params[key], 0)
    if "grid" not in told and {"latent_shape", "patch_size"} <= params.keys():
        latents, patch = (_alike(key, params[key], 1) for key in ("latent_shape", "patch_size"))
        told["grid"] = tuple(n // p for n, p in zip(latents, patch, strict=True))
    if "text" in params:
        told["text"] = params["text"]
    return told


def _alike(name: str, given: Any, dim: int) -> Any:
    """The number or sizes that all samples share, of a tensor `[B|1, ...]` or plain values."""
    if not isinstance(given, Tensor):
        return tuple(given) if dim else given
    rows = given.reshape(-1, given.shape[-1]) if dim else given.reshape(-1)
    require(
        (
            len(rows) > 0 and bool((rows == rows[:1]).all()),
            lambda: (
                f"params[{name!r}]={given.tolist()}: samples of one call differ; one plan is for samples at "
                "one step and of one size: call the function for each of them"
            ),
        )
    )
    return tuple(rows[0].tolist()) if dim else int(rows[0])


def _as_causal(method: Method, selection: Selection, causal: bool) -> Selection:
    """Make the plans of a selection as causal as the call."""
    several = isinstance(selection.plan, (tuple, list))
    plans = tuple(selection.plan) if several else (selection.plan,)
    if not causal and any(plan.causal for plan in plans):
        raise SparseFlashError(
            f"{method!r} sees only what is earlier, and is_causal=False: give causal=False, or a method of "
            "the phase 'diffusion'"
        )
    if causal:
        plans = tuple(plan if plan.causal else plan.with_rules(causal=True) for plan in plans)
    return dataclasses.replace(selection, plan=plans)


__all__ = ["attend"]

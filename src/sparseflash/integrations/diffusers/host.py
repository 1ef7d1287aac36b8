"""`sparse`: runs the self-attention of a Diffusers transformer through a method inside a `with` block."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...common.errors import SparseFlashError, require
from ...methods.base import Method
from ...methods.session import Session
from ...ops.attention import attention
from ...plan import Plan
from ...plan.options import is_count
from .layouts import Layout, layout_of, self_attention

SDPA = torch.nn.functional.scaled_dot_product_attention
NAME = "sparseflash"


@dataclass
class Report:
    """Statistics of the calls since `sparse` was entered.

    Attributes
    ----------
    calls : dict
        Number of calls of each self-attention layer, by layer name.
    steps : dict
        Last step of each branch ("cond", "uncond", ...; None if the pipeline names no branch).
    plans : dict
        Plans of the last call of each layer.
    """

    calls: dict[str, int] = field(default_factory=dict)
    steps: dict[str | None, int] = field(default_factory=dict)
    plans: dict[str, tuple[Plan, ...]] = field(default_factory=dict)

    @property
    def density(self) -> dict[str, float]:
        """Share of all pairs that is visible in the last call of each layer."""
        return {layer: sum(plan.kept for plan in plans) for layer, plans in self.plans.items()}


class _Nothing(BaseState):
    """Empty state for Diffusers' state manager; the real state is in a session."""

    def reset(self) -> None:
        """Do nothing."""


class _Root(ModelHook):
    """Hook on the transformer: finds a call's branch, denoising step and token layout."""

    _is_stateful = True  # so that `cache_context` reaches `manager`

    def __init__(self, transformer: nn.Module, method: Method | None, steps: int | None) -> None:
        super().__init__()
        self.manager = StateManager(_Nothing)
        self.session = None if method is None else Session(method)
        self.report, self.total = Report(), steps
        self.layers = self_attention(transformer)
        self.signature = inspect.signature(transformer.forward)
        self.row: Callable[[Any, Any], Layout] = layout_of(transformer)
        self.ctx: dict[str, Any] = {}
        self.layout = Layout(None, (0, 0))
        self.last: dict[str | None, float] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run one forward of the transformer."""
        given = self.signature.bind(*args, **kwargs).arguments
        self.layout = self.row(module.config, given)
        self.ctx = self._where(given)
        before = dict(self.report.calls)
        out = self.fn_ref.original_forward(*args, **kwargs)
        if self.report.calls == before:
            raise SparseFlashError(
                f"{type(module).__name__}: no self-attention layer was called; of {len(self.layers)} layers "
                "none went through the method"
            )
        return out

    def _where(self, given: Any) -> dict[str, Any]:
        """Branch and step: the pipeline's, or else counted; a timestep that rises starts a new generation."""
        try:
            told = self.manager.context
        except ValueError:  # the pipeline or user sets no context
            told = None
        branch = None if told is None else told.name
        time = given.get("timestep")
        now = float(time.max()) if isinstance(time, Tensor) and time.numel() else 0.0
        step = None if told is None else told.step_index
        if step is None:
            again = branch in self.last and now > self.last[branch]
            step = 0 if again else self.report.steps.get(branch, -1) + 1
        if step == 0 and self.session is not None:
            self.session.forget(branch=branch)
        self.last[branch], self.report.steps[branch] = now, step
        steps = self.total if told is None or told.num_inference_steps is None else told.num_inference_steps
        known = {"branch": branch, "step": step, "steps": steps, "grid": self.layout.grid}
        return {name: x for name, x in known.items() if x is not None} | {"text": self.layout.text}

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Start a new generation; called when the pipeline has ended."""
        self.manager.reset()
        self.forget()
        return module

    def forget(self) -> None:
        """Forget steps and session."""
        self.last.clear()
        self.report.steps.clear()
        if self.session is not None:
            self.session.reset()

    def attend(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Attend for one call of a layer, without its padding tokens."""
        self.report.calls[layer] = self.report.calls.get(layer, 0) + 1
        T, (before, behind) = query.shape[2], self.layout.text
        ctx = {**self.ctx, "layer": list(self.layers).index(layer)}
        if mask is None:
            return self._run(layer, query, key, value, scale, ctx)
        keep = _padding(layer, mask, len(query), T)
        if bool(keep.all()):
            return self._run(layer, query, key, value, scale, ctx)
        video = keep[:, before : T - behind]
        require(
            (
                bool(video.all()),
                lambda: f"{layer}: its mask hides tokens of the video; only text may be padded",
            )
        )
        out = torch.zeros_like(query[..., :1]).expand(*query.shape[:3], value.shape[-1]).clone()
        for b, real in enumerate(keep):
            at = real.nonzero()[:, 0]
            ends = int(real[:before].sum()), int(real[T - behind :].sum())
            own = [x[b : b + 1, :, at] for x in (query, key, value)]
            out[b : b + 1, :, at] = self._run(layer, *own, scale, {**ctx, "text": ends, "slot": b})
        return out

    def _run(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, ctx: dict[str, Any]
    ) -> Tensor:
        if self.session is None:
            dense = Plan.dense(q.shape[2], k.shape[2], device=q.device)
            self.report.plans[layer] = (dense,)
            return attention(q, k, v, dense, scale=scale)
        told = {**ctx, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
        selection = self.session.select(q, k, told)
        plans = selection.plan if isinstance(selection.plan, tuple) else (selection.plan,)
        if any(plan.causal for plan in plans):
            raise SparseFlashError(
                f"{self.session.method!r} sees only what is earlier, and a video has no order of time among "
                "its tokens: give causal=False, or a method of the phase 'diffusion'"
            )
        self.report.plans[layer] = plans
        out: Tensor = self.session(q, k, v, scale=scale, ctx=ctx, selection=selection)
        return out


class _Layer(ModelHook):
    """Hook on a self-attention layer: routes its scaled dot products to the method."""

    def __init__(self, root: _Root, name: str) -> None:
        super().__init__()
        self.root, self.name = root, name

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run one forward of the layer."""
        before = self.root.report.calls.get(self.name, 0)
        with _Through(self.root, self.name):
            out = self.fn_ref.original_forward(*args, **kwargs)
        if self.root.report.calls.get(self.name, 0) == before:
            how = type(getattr(module, "processor", module)).__name__
            raise SparseFlashError(
                f"{self.name}: {how} called no scaled_dot_product_attention, so it stayed dense: use the "
                "attention backend 'native', and no processor that attends by itself"
            )
        return out


class _Through(TorchFunctionMode):
    """Function mode that sends scaled_dot_product_attention to the method; other functions are unchanged."""

    def __init__(self, root: _Root, layer: str) -> None:
        super().__init__()
        self.root, self.layer = root, layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one torch function."""
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        require(
            (not is_causal, lambda: f"{self.layer}: causal attention, which no known transformer has"),
            (dropout_p == 0.0, lambda: f"{self.layer}: dropout_p={dropout_p} is not supported"),
            (
                query.shape[2] == key.shape[2],
                lambda: (
                    f"{self.layer}: {query.shape[2]} queries and {key.shape[2]} keys, and it was to be "
                    "self-attention"
                ),
            ),
        )
        return self.root.attend(self.layer, query, key, value, attn_mask, scale)


def _padding(layer: str, mask: Tensor, B: int, T: int) -> Tensor:
    """Read a padding mask [B|1,H|1,1,T] as bool [B,T]; raise for other masks."""
    plain = mask.dim() in (2, 4) and mask.shape[-1] == T
    plain = plain and (mask.dim() == 2 or mask.shape[1] == mask.shape[2] == 1)
    if not plain:
        raise SparseFlashError(
            f"{layer}: a mask of shape {list(mask.shape)} for each pair; expected one of keys, [B,1,1,{T}]"
        )
    keep = mask.reshape(len(mask), T)
    if keep.dtype != torch.bool:
        hidden = keep <= -1e4
        if not bool((hidden | (keep == 0)).all()):
            raise SparseFlashError(f"{layer}: a mask that is a bias: neither 0 nor below -1e4")
        keep = ~hidden
    return keep.expand(B, -1)


@contextlib.contextmanager
def sparse(transformer: nn.Module, method: Method | None, *, steps: int | None = None) -> Iterator[Report]:
    """Run the self-attention of a transformer through a method, inside a `with` block.

    Layers are reached by Diffusers' own hooks, and their calls of torch's scaled_dot_product_attention by a
    torch function mode; nothing is registered or replaced elsewhere. Cross-attention is unchanged. A layer
    that cannot be reached is an error, never silently dense.

    Every call passes the method a `ctx` with `layer` (its index), `grid` and `text` (by the table in
    `layouts.py`), and `branch` and `step` from the pipeline's `cache_context`: if that names no step, calls
    of a branch are counted, and a rising timestep starts a new generation. State is kept per layer and
    branch, reset for each generation, and dropped after the block.

    Parameters
    ----------
    transformer : torch.nn.Module
        `pipe.transformer` of Wan, HunyuanVideo, LTX, Flux or CogVideoX.
    method : Method, optional
        None runs exact dense attention by the same route.
    steps : int, optional
        Number of denoising steps, for methods that need it and pipelines that do not report it.

    Yields
    ------
    Report
        Calls and density of each layer, and the step of each branch.

    Raises
    ------
    SparseFlashError
        For an unknown transformer, a layer whose attention cannot be reached, a mask other than text padding,
        or a causal method.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from diffusers import WanTransformer3DModel
    >>> model = WanTransformer3DModel(
    ...     num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    ...     freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ... )
    >>> x, text = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 5, 16)
    >>> with sf.diffusers.sparse(model, sf.methods.EfficientVDiT(references=1)) as report:
    ...     out = model(x, torch.tensor([500]), text).sample
    >>> report.calls, report.density
    ({'blocks.0.attn1': 1}, {'blocks.0.attn1': 0.4375})
    """
    good = isinstance(transformer, nn.Module)
    require(
        (
            good,
            lambda: f"transformer: {type(transformer).__name__}; expected a module, such as pipe.transformer",
        ),
        (
            method is None or isinstance(method, Method),
            lambda: (
                f"method={method!r}: expected a Method (sparseflash.methods.get(name) makes one), or None"
            ),
        ),
        (steps is None or is_count(steps, 1), lambda: f"steps={steps!r}: expected a positive int, or None"),
    )
    root = _Root(transformer, method, steps)
    hooked: list[nn.Module] = []
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(NAME) is not None:
        raise SparseFlashError(f"{type(transformer).__name__} is inside another sparse(...): leave it first")
    try:
        for name, module in {**root.layers, "": transformer}.items():
            own = HookRegistry.check_if_exists_or_initialize(module)
            own.register_hook(_Layer(root, name) if name else root, NAME)
            hooked.append(module)
        yield root.report
    finally:
        for module in hooked:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(NAME, recurse=False)

"""Build the attention of a layer from its name and options: ``attention(q, k, v) -> out``, or a layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparseflash import methods, nn
from sparseflash.methods.base import Method, Selection
from sparseflash.ops._arguments import AnyPlan
from sparseflash.ops.attention import attention
from sparseflash.train.config import TrainConfig
from sparseflash.train.errors import TrainError

Attention = Callable[..., Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, q_offset: int | None = None) -> Tensor:
    """Causal attention by torch: the baseline every method is compared with."""
    if q_offset:  # SDPA's causal mask assumes offset 0
        return attention(q, k, v, causal=True, q_offset=q_offset)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, dropout_p=dropout_p)


def both_ways(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """Attention by torch over the whole sequence, earlier and later tokens: the baseline of masked models."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, dropout_p=dropout_p)


@dataclasses.dataclass
class Sparse:
    """A method together with the context its calls share, such as the step whose random masks it draws.

    While there is a `note`, it is told the plan of each call.
    """

    method: Method
    context: Mapping[str, Any]
    note: Callable[[AnyPlan], None] | None = dataclasses.field(default=None, compare=False)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, q_offset: int | None = None
    ) -> Tensor:
        """Select and attend."""
        called = self.method.call(q, k, v, ctx=self.context, dropout_p=dropout_p, q_offset=q_offset)
        if self.note is not None:
            self.note(self.shown(q, k, called.selection))
        out: Tensor = called.result
        return out

    def select(self, q: Tensor, k: Tensor) -> Selection:
        """Select only."""
        return self.method.select(q, k, self.context)

    def shown(self, q: Tensor, k: Tensor, selection: Selection) -> AnyPlan:
        """The part of a selection to display, as a plan."""
        return self.method.shown(q, k, selection, self.context)


def names() -> list[str]:
    """Everything ``--attention`` accepts."""
    return ["dense", *methods.names(), *nn.names()]


def cli_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate command-line options into the method's hyper-parameters."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        for field in FLAGS[name][1] if name in FLAGS else (name,):
            options[field] = value
    return options


def sees_both_ways(name: str) -> bool:
    """Whether a method has a form in which queries see later keys."""
    cls = methods.find(name)
    optional = any(field.name == "causal" for field in dataclasses.fields(cls))
    return optional or "diffusion" in cls.phases


def _both_ways(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method without causality."""
    cls = methods.find(name)
    if not sees_both_ways(name):
        known = [other for other in methods.names() if sees_both_ways(other)]
        raise TrainError(
            f"{name} sees only what is earlier, and --objective masked fills in what both sides say; "
            f"choose one of: dense, {', '.join(known)}"
        )
    if all(field.name != "causal" for field in dataclasses.fields(cls)):
        return options
    if options.get("causal"):
        raise TrainError(f"{name}.causal=True does not go with --objective masked; leave it out")
    return {**options, "causal": False}


FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nb": ("hash-sparse", ("nb",)),
    "window_heads": ("hash-sparse", ("window_heads",)),
    "planes": ("hash-sparse", ("planes",)),
    "drop": ("qk-sparse", ("q_drop", "k_drop")),
    "window": ("window", ("window",)),
}
"""Short option names for fields of methods; `--help` shows the field of the method named here."""


def build(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    tied: bool = False,
    context: Mapping[str, Any] | None = None,
    objective: str = "next",
) -> Attention:
    """Make the attention of one layer.

    Parameters
    ----------
    name : str
        ``"dense"`` or a registry slug.
    options : mapping, optional
        Hyper-parameters of the method.
    seed : int
        Seed for methods that have that field, unless `options` sets it; give each layer another one.
    tied : bool
        Whether k is q normalised. A token's own key would then dominate, so `include_self` is False.
    context : mapping, optional
        Values that the method can read at every call, such as the step.
    objective : str
        With "masked", queries see later keys too: a method that can be so is made with causal=False.
    """
    options = dict(options or {})
    if name == "dense":
        if options:
            raise TrainError(f"dense attention takes no options; remove {', '.join(sorted(options))}")
        return both_ways if objective == "masked" else dense
    has = {field.name for field in dataclasses.fields(methods.find(name))}
    if objective == "masked":
        options = _both_ways(name, options)
    if "seed" in has:
        options.setdefault("seed", seed)
    if tied and "include_self" in has:
        options.setdefault("include_self", False)
    return Sparse(methods.get(name, **options), {} if context is None else context)


def pattern(text: str) -> list[str]:
    """Expand ``--attention`` to a list of names, which the layers of the model repeat in turn.

    Examples
    --------
    >>> pattern("sink-window*2,dense")
    ['sink-window', 'sink-window', 'dense']
    """
    found: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^*\s]+)\s*(?:\*\s*([1-9]\d*)\s*)?", part)
        if match is None:
            raise TrainError(
                f"--attention {text!r}: {part!r} is no name, or name*count; write it as sink-window*2,dense"
            )
        name = match[1]
        if name not in names():
            raise TrainError(f"--attention {name!r} is unknown; choose one of: {', '.join(names())}")
        found += [name] * int(match[2] or 1)
    return found


def mixers(config: TrainConfig, context: Mapping[str, Any]) -> list[Attention | nn.Layer]:
    """Make the sequence mixer of each layer: a callable over q, k and v, or a layer with weights.

    An option applies to every name of the pattern that has it, and ``name.option`` to that name only.

    Parameters
    ----------
    config : TrainConfig
        Pattern, options, shape and seed.
    context : mapping
        Values that methods can read at every call.

    Raises
    ------
    TrainError
        If the pattern is longer than the model, no name has an option, or a layer does not support the
        config.
    """
    turn = pattern(config.attention)
    if len(turn) > config.layers:
        raise TrainError(
            f"--attention {config.attention!r} names {len(turn)} layers, --layers is {config.layers}; "
            f"use --layers {len(turn)}"
        )
    options = _assign(turn, config.options)
    found: list[Attention | nn.Layer] = []
    for n in range(config.layers):
        name = turn[n % len(turn)]
        if name in nn.names():
            found.append(_layer(name, options[name], config, n))
            continue
        if config.objective == "masked" and name != "dense" and "state" in methods.find(name).reads:
            raise TrainError(
                f"{name} keeps a pattern over the steps of a generation: train with --attention dense, then "
                f"sparseflash sample RUN --attention {name}"
            )
        seed, tied = config.seed * 1009 + n, config.qk == "tied"
        more = {"seed": seed, "tied": tied, "context": context, "objective": config.objective}
        found.append(build(name, options[name], **more))
    return found


def _layer(name: str, options: Mapping[str, Any], config: TrainConfig, n: int) -> nn.Layer:
    for broken, said in (
        (config.qk == "tied", "--qk tied"),
        (config.dropout > 0, "--dropout"),
        (config.context_parallel > 1, "--context-parallel"),
        (config.objective == "masked" and "causal" not in nn.options(nn.find(name)), "--objective masked"),
    ):
        if broken:
            raise TrainError(
                f"{said} does not go with {name}, a layer with projections of its own: leave it out"
            )
    own = {"layer": n, "layers": config.layers, "base": config.rope_base}
    own |= {"causal": False} if config.objective == "masked" else {}
    takes = nn.options(nn.find(name))
    return nn.get(name, config.width, config.heads, **{k: v for k, v in own.items() if k in takes} | options)


def _assign(turn: list[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Distribute the options over the names of the pattern."""
    found: dict[str, dict[str, Any]] = {name: {} for name in turn}
    for option, value in sorted(given.items(), key=lambda item: "." in item[0]):
        name, dot, own = option.partition(".")
        if dot:
            if name not in found:
                raise TrainError(f"--set {option}={value}: {name} is not in --attention {','.join(turn)}")
            found[name][own] = value
            continue
        takes = [name for name in found if option in _options(name)] if len(found) > 1 else list(found)
        if not takes:
            raise TrainError(f"--set {option}={value}: none of {', '.join(found)} has an option {option!r}")
        for name in takes:
            found[name][option] = value
    return found


def _options(name: str) -> set[str]:
    if name == "dense":
        return set()
    if name in nn.names():
        return nn.options(nn.find(name))
    return {field.name for field in dataclasses.fields(methods.find(name))}

"""Subjects of benchmarks: every registered method, and baselines as far as installed."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash import methods
from sparseflash.bench.quality import parts
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods.base import Method, Selection
from sparseflash.train.attention import Attention, dense


@dataclasses.dataclass(frozen=True)
class Subject:
    """One attention under measurement.

    Attributes
    ----------
    name : str
        Name in tables and plots.
    kind : str
        ``method`` or ``baseline``.
    use : callable
        ``(q, k, v, prepared) -> out``, causal.
    prepare : callable
        ``(q, k, v) -> prepared``: selection, or building a mask; also timed separately.
    method : Method or None
        Method that selects; None: dense causal attention.
    backward : bool
        Whether it supports the backward.
    """

    name: str
    kind: str
    use: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    prepare: Callable[[Tensor, Tensor, Tensor], Any] = lambda q, k, v: None
    method: Method | None = None
    backward: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Prepare and attend."""
        return self.use(q, k, v, self.prepare(q, k, v))

    def select(self, q: Tensor, k: Tensor, v: Tensor) -> Selection | None:
        """The method's selection; None for a dense baseline."""
        return None if self.method is None else self.method.select(q, k, {"v": v})


def ours(name: str, method: Method) -> Subject:
    """Make a subject of a method."""
    return Subject(
        name,
        "method",
        lambda q, k, v, selection: method(q, k, v, selection=selection),
        lambda q, k, v: method.select(q, k, {"v": v}),
        method,
        not method.forward_only,
    )


def naive(name: str, method: Method) -> Subject:
    """Make a subject of a method's boolean T x T mask in torch SDPA."""

    @torch.no_grad()
    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks = [one.to_dense() for one in parts(method.select(q, k, {"v": v}).plan)]
        heads = q.shape[1]
        return torch.stack([mask.repeat_interleave(heads // mask.shape[1], 1) for mask in masks]).any(0)

    def use(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        empty = ~keep.any(-1, keepdim=True)  # a row without visible keys would be NaN
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep | empty, enable_gqa=grouped)
        return out.masked_fill(empty, 0.0)

    return Subject(f"naive {name}", "baseline", use, prepare, method)


def _sdpa(kernel: str) -> Callable[[], Attention]:
    def make() -> Attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([getattr(SDPBackend, kernel)]):
                return dense(q, k, v)

        return attend

    return make


def _flex() -> Attention:
    return _flex_of(lambda b, h, q, k: q >= k)


def _attn_gym() -> Attention:
    from attn_gym.masks import causal_mask

    return _flex_of(causal_mask)


def _flex_of(rule: Callable[..., Any]) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend, masks = torch.compile(flex_attention), dict[tuple[int, str], Any]()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = (q.shape[2], q.device.type)
        if key not in masks:
            masks[key] = create_block_mask(rule, None, None, key[0], key[0], device=key[1])
        return attend(q, k, v, block_mask=masks[key], enable_gqa=q.shape[1] != k.shape[1])

    return run


def _fla() -> Attention:
    from fla.ops.attn import parallel_attn

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = parallel_attn(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


BASELINES: dict[str, Callable[[], Attention]] = {
    "sdpa": lambda: dense,
    "sdpa-math": _sdpa("MATH"),
    "sdpa-flash": _sdpa("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "flex": _flex,
    "attn-gym": _attn_gym,
    "fla": _fla,
}
"""Dense causal attention of other libraries; `sdpa` is torch's own choice. `naive` is derived per method."""

_NEEDS = {"attn-gym": "attn_gym", "fla": "fla"}
_FORWARD_ONLY_ON_CPU = ("flex", "attn-gym")


def names() -> tuple[list[str], list[str]]:
    """Names that ``--methods`` and ``--baselines`` accept."""
    return methods.names(), [*BASELINES, "naive", "reformer"]


def subjects(
    method_names: Iterable[str],
    baseline_names: Iterable[str],
    *,
    length: int,
    density: float | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    device: str = "cpu",
) -> list[Subject]:
    """Make the subjects of one length, baselines first.

    Parameters
    ----------
    method_names, baseline_names
        Names from `names`; ``naive`` adds a naive twin of every method, ``reformer`` that method.
    length : int
        Tokens; the settings for a density may depend on it.
    density : float, optional
        Share of the causal pairs to configure the methods for.
    options : mapping, optional
        Fields of each method, by its name.

    Raises
    ------
    SparseFlashError
        For an unknown name, with the nearest known one; for a density that a method cannot be set to.
    """
    able_methods, able_baselines = names()
    wanted, base = list(dict.fromkeys(method_names)), list(dict.fromkeys(baseline_names))
    if "reformer" in base:
        base.remove("reformer")
        wanted = list(dict.fromkeys([*wanted, "reformer"]))
    options = options or {}
    for flag, given, able in (
        ("--methods", wanted, able_methods),
        ("--baselines", base, able_baselines),
        ("--set", list(options), wanted),
    ):
        for name in given:
            if name not in able:
                raise unknown(flag, name, able)
    found = []
    for name in wanted:
        fields = {x.name for x in dataclasses.fields(methods.find(name))}  # type: ignore[arg-type]
        chosen = {"causal": True} if "causal" in fields else {}
        if density is not None:
            chosen |= budget(name, density, length)
        method = methods.get(name, **{**chosen, **options.get(name, {})})
        found.append(ours(name, method))
    first = []
    for name in base:
        if name == "naive":
            first += [naive(x.name, x.method) for x in found if x.method is not None]
        elif (package := _NEEDS.get(name)) and not find_spec(package):
            raise SparseFlashError(f"--baselines {name} needs the package {package}, which is not installed")
        else:
            first.append(_baseline(name, device))
    return first + found


def _baseline(name: str, device: str) -> Subject:
    attend = BASELINES[name]()
    backward = device != "cpu" or name not in _FORWARD_ONLY_ON_CPU
    return Subject(name, "baseline", lambda q, k, v, _: attend(q, k, v), backward=backward)


def budget(name: str, density: float, length: int) -> dict[str, Any]:
    """Settings with which a method sees about this share of the causal pairs."""
    if not 0 < density <= 1:
        raise SparseFlashError(f"--density is {density:g}; expected a share above 0 and at most 1")
    drop = 1 - math.sqrt(density)  # of queries and of keys
    window = max(1, round(length * (1 - math.sqrt(1 - density))))  # wT - w²/2 of T²/2 pairs
    settings: dict[str, dict[str, Any]] = {
        "hash-sparse": {"nb": max(1, round(1 / density))},
        "qk-sparse": {"q_drop": drop, "k_drop": drop},
        "window": {"window": window},
        "sink-window": {"window": window},
        "reformer": {"bucket": max(1, round(density * length / 4))},
    }
    if name not in settings:
        raise SparseFlashError(
            f"--density: {name} has no single budget; leave --density out and use --set {name}.field=value "
            f"(a density sets {', '.join(settings)})"
        )
    return settings[name]


def unknown(flag: str, name: str, able: Iterable[str]) -> SparseFlashError:
    """The error for an unknown name."""
    able = list(able)
    close = difflib.get_close_matches(name.strip().lower().replace("_", "-"), able, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SparseFlashError(
        f"{flag} {name!r} is unknown: {hint}choose from: {', '.join(able) or 'none given'}"
    )

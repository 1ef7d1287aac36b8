"""SeerAttention's gate for decoding: a query of its own token against pooled keys of pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..cache import Growing
from ..common.errors import SparseFlashError
from ..ops.rotary import rotation, turned
from ..selection.pages import top_pages
from ..selection.scores import pooled
from .base import Context, Selection, begin
from .gates import DecodeGates, loaded_decode
from .reading import ReadingMethod, kept_of, plan_of_pages


def gate_queries(q: Tensor, at: Tensor, weight: Tensor, rope: list[Tensor] | None) -> Tensor:
    """The gate's vector of each query, one for all heads of a group.

    Parameters
    ----------
    q : Tensor
        `[B,Hq,n,D]`, rotated as `rope` says.
    at : Tensor
        Integers `[B|1,n]`: positions of the queries.
    weight : Tensor
        `[Hkv, (group + 3) D + 2, D]`: projections of the query heads of a group, of the three pools of a
        page's keys, and two gains.
    rope : list of Tensor, optional
        Tables or frequencies (`ops.rotary.rotation`).

    Returns
    -------
    Tensor
        `[B,Hkv,n,D]`, rotated to the positions.
    """
    Hq, D, Hkv = q.shape[1], q.shape[3], len(weight)
    bare = q if rope is None else turned(q, at, rope)
    own = weight[:, : -3 * D - 2].view(Hkv, Hq // Hkv, D, D).to(bare)
    mixed = torch.einsum("bhgnc,hgcd->bhnd", bare.unflatten(1, (Hkv, -1)), own)
    mixed = _normal(mixed, weight[:, -2])
    return mixed if rope is None else turned(mixed, -at, rope)


def page_pools(k: Tensor, page: int, rope: list[Tensor] | None) -> Tensor:
    """Largest, smallest and mean key `k [B,Hkv,T,D]` of each page before rotation, `[B,Hkv,pages,3 D]`."""
    token = torch.arange(k.shape[2], device=k.device)[None]
    bare = k if rope is None else turned(k, token, rope)
    return torch.cat([pooled(bare, page, how) for how in ("max", "min", "mean")], -1)


def gate_pages(pools: Tensor, page: int, weight: Tensor, rope: list[Tensor] | None) -> Tensor:
    """The gate's vector of each page, `[B,Hkv,pages,D]`, rotated to the page's first position."""
    D = weight.shape[2]
    own = torch.einsum("bhnc,hcd->bhnd", pools, weight[:, -3 * D - 2 : -2].to(pools))
    own = _normal(own, weight[:, -1])
    first = torch.arange(own.shape[2], device=own.device)[None] * page
    return own if rope is None else turned(own, -first, rope)


def _normal(x: Tensor, gain: Tensor) -> Tensor:
    """Divide `[B,H,n,D]` by its root mean square, times `gain [H,D]`."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * gain[:, None].to(x)


@dataclass(frozen=True, kw_only=True)
class SeerDecode(ReadingMethod):
    """Each decoded token reads the pages of keys that a small trained gate scores best.

    The gate of a prompt compares mean queries, which a decoded token does not have. This one projects the
    query heads of a group to one vector, pools the keys of a page to their maximum, minimum and mean before
    rotation, normalises both, and rotates them to their positions; all heads of a group read the same pages.
    It learns the largest weight of dense attention in a page (`nn.SeerDecodeGate`, **sparseflash calibrate
    seer-attention --decode**).

    Paper: Gao et al., "SeerAttention-R", arXiv 2506.08889, section 2.

    Parameters
    ----------
    gates : DecodeGates or str
        Trained gates of the model, or their file; they say how many keys a page has.
    budget : int
        Most keys that a query reads, rounded down to pages; the newest page is one of them.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query; `layer`; `rope`, the rotation of q and k; and
    `cache`, the layer's `cache.Growing`, which remembers the vectors of whole pages.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> gate = sf.nn.SeerDecodeGate(4, 2, 32, generator=torch.Generator().manual_seed(0))
    >>> gates = sf.methods.DecodeGates({0: gate.weight}, rotary=False)
    >>> q, k, v = torch.randn(1, 4, 1, 32), *torch.randn(2, 1, 2, 1000, 32)
    >>> method = sf.methods.SeerDecode(gates=gates, budget=256)
    >>> method(q, k, v, q_offset=999).shape, round(method.select(q, k, {"q_offset": 999}).plan.work, 2)
    (torch.Size([1, 4, 1, 32]), 0.23)
    """

    gates: DecodeGates | str | None = None

    reads = ("q_offset", "cache", "layer", "rope")
    behind_padding = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gates, (str, DecodeGates)):
            raise SparseFlashError(
                f"gates={self.gates!r:.60}: expected DecodeGates, or the file of some (DecodeGates.save); "
                "sparseflash calibrate seer-attention --decode trains them"
            )
        self._set(page=self.trained().block)

    def trained(self) -> DecodeGates:
        """Return the gates, loaded from their file if `gates` is a path."""
        if isinstance(self.gates, DecodeGates):
            return self.gates
        path = Path(str(self.gates))
        return loaded_decode(str(path), path.stat().st_mtime_ns if path.exists() else 0)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select the pages with the best scores for each query, its own included."""
        ctx, (Tq, Tk) = ctx or {}, (q.shape[2], k.shape[2])
        at = begin(ctx, q)[..., 0] + torch.arange(Tq, device=q.device)
        rows, tables, weight = self._pages(k, ctx)
        Hkv, group = k.shape[1], q.shape[1] // k.shape[1]
        wanted = [Hkv, (group + 3) * q.shape[3] + 2, q.shape[3]]
        if list(weight.shape) != wanted:
            raise SparseFlashError(
                f"a gate of {list(weight.shape)}, and {q.shape[1]} query heads, {Hkv} KV heads of "
                f"{q.shape[3]}: expected {wanted}, weights of this model"
            )
        mixed = gate_queries(q.detach(), at, weight, tables)
        count = max(self.budget // self.page, 1)
        chosen = top_pages(mixed.to(rows.dtype), rows, at // self.page, count, near=1)
        return Selection(plan_of_pages(chosen, self.page, Tk, ctx.get("q_offset", 0), None))

    def _pages(self, k: Tensor, ctx: Context) -> tuple[Tensor, list[Tensor] | None, Tensor]:
        """The gate's vector of each page, the rotation, and the layer's weights."""
        gates = self.trained()
        if gates.rotary and ctx.get("rope") is None:
            raise SparseFlashError(
                "ctx['rope'] is missing: these gates see queries and keys before their rotation; expected "
                "(cos, sin) or inverse frequencies"
            )
        weight = gates.of(ctx.get("layer")).to(k.device)
        tables = rotation(ctx["rope"], k.shape[2]) if gates.rotary else None

        def make(keys: Tensor) -> tuple[Tensor, ...]:
            return (gate_pages(page_pools(keys, self.page, tables), self.page, weight, tables),)

        cache: Growing | None = kept_of(ctx, k)
        whole = k.shape[2] // self.page * self.page
        if weight.shape[2] != k.shape[3] or cache is None or not whole:
            fits = weight.shape[2] == k.shape[3]
            return make(k)[0] if fits else k, tables, weight
        (rows,) = cache.remembered((type(self).__name__, id(gates)), whole, make)
        if whole < k.shape[2]:  # a page that is not full is the newest, and read whatever its score
            rows = torch.cat([rows, torch.zeros_like(rows[:, :, :1])], 2)
        return rows, tables, weight

"""`probe`: exact attention of the last queries, as an estimate of that of all queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.dispatch import choose_able
from ..backends.numerics import Probing, state_dtype
from ..common.errors import require
from ..ops._arguments import as_backend, as_scale, as_softcap, check_inputs
from ..ops._register import register
from ..ops.rows import take_rows
from ..plan.options import SHORT, is_count, is_length, normal_offset, shift_of
from .grid import check_keep
from .sharded import Sharded


@dataclass(frozen=True, eq=False)
class Probe:
    """Sums of the attention weights P of the probed rows, as `probe` returns them.

    Parameters
    ----------
    lse : Tensor
        `[B,Hq,n]`: log-sum-exp of each row, -inf for a row that sees nothing.
    rows : Tensor
        Integers `[B|1, n]`: the probed queries, ascending; -1 where a sequence has fewer.
    before : int
        The index of distance 0 in `distances()`.
    """

    lse: Tensor
    rows: Tensor
    before: int
    _keys: Tensor
    _distances: Tensor

    def keys(self) -> Tensor:
        """Weights of each key, summed over the rows, fp32 `[B,Hq,Tk]`."""
        return self._keys

    def distances(self) -> Tensor:
        """Weights at each distance between query and key, summed over the rows, fp32 `[B,Hq,N]`.

        Index i is `position of the query - position of the key = i - before`. If causal, `before` is 0, and N
        is Tk, or one more than the last query's position if that is known and larger. Otherwise keys can be
        ahead by up to `before`, which is Tk - 1 (and more for a negative `q_offset`), and N is larger by
        `before`. Distances outside (a tensor `q_offset` far from the keys) are left out.
        """
        return self._distances

    def units(self, unit: int) -> Tensor:
        """`keys()` summed over units of that many keys, fp32 `[B,Hq,ceil(Tk / unit)]`."""
        require((is_length(unit, 1), lambda: f"unit={unit!r}: expected a positive int"))
        *lead, Tk = self._keys.shape
        n = -(-Tk // unit)
        return torch.nn.functional.pad(self._keys, (0, n * unit - Tk)).view(*lead, n, unit).sum(-1)


def _forward(
    q: Tensor, k: Tensor, sees: Tensor, at: Tensor, keep: Tensor | None, options: Probing
) -> tuple[Tensor, Tensor, Tensor]:
    return choose_able("probe", options.backend, q, k).probe(q, k, sees, at, keep, options)


def _empty(q: Any, k: Any, sees: Any, at: Any, keep: Any, options: Probing) -> tuple[Tensor, Tensor, Tensor]:
    B, H, n, _ = q.shape
    widths = (n, k.shape[2], options.width)
    lse, keys, distances = (q.new_empty((B, H, w), dtype=state_dtype(q)) for w in widths)
    return lse, keys, distances


_probe = register("selection_probe", _forward, _empty)


def probe(
    q: Tensor,
    k: Tensor,
    rows: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    q_offset: int | Tensor = 0,
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    backend: str | None = None,
) -> Probe:
    """Compute the softmax of the last `rows` queries, summed by key and by distance.

    Keys with large sums are the vertical lines, distances with large sums the slashes of MInference (arXiv
    2407.02490, algorithm 2) and FlexPrefill (2502.20766). Memory is that of the results, whatever the number
    of rows; on the CPU also that of a copy of K and, for each thread, of 64 rows of scores of at most 16,384
    keys. No gradient.

    Parameters
    ----------
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`; heads of K are shared, not repeated.
    rows : int
        Queries at the end of a sequence, at least 1; all queries if there are fewer.
    scale, softcap
        As in `sparseflash.attention`.
    causal : bool
        Whether keys after a query's position, `q_offset + i`, are hidden from it.
    q_offset : int or Tensor
        Position of the first query; integers, 0-d or `[B]`.
    q_keep, k_keep : Tensor, optional
        bool `[B|1, Tq]` and `[B|1, Tk]`, True = a real token. The rows are the last real ones of each
        sequence; padding may hold anything.
    backend : str, optional
        "reference" or "cpu"; None chooses the fastest usable one.

    Returns
    -------
    Probe
        Each row that sees a key adds 1 to the sum of `keys()`, and to that of `distances()`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k = torch.randn(2, 1, 2, 512, 32)
    >>> seen = sf.selection.probe(q, k, 64)
    >>> columns = sf.selection.top_indices(seen.keys(), 50)
    >>> slashes = sf.selection.top_indices(seen.distances(), 70)
    >>> round(float(seen.distances().sum())), columns.shape
    (128, torch.Size([1, 2, 50]))
    """
    check_inputs(q, k, k)
    require(
        (is_count(rows, 1), lambda: f"rows={rows!r}: expected a positive int, the queries to look at"),
        (isinstance(causal, bool), lambda: f"causal={causal!r}: expected True or False"),
    )
    (B, _, Tq, D), Tk = q.shape, k.shape[2]
    check_keep("q_keep", q_keep, Tq, B)
    check_keep("k_keep", k_keep, Tk, B)
    if k.shape[0] != B:
        k = k.expand(B, -1, -1, -1)
    offset, n, device = normal_offset(q_offset), min(rows, Tq), q.device
    if q_keep is None:
        which = torch.arange(Tq - n, Tq, device=device)[None]
        own = q[:, :, Tq - n :]
    else:
        token = torch.where(q_keep.to(device), torch.arange(Tq, device=device), -1)
        which = token.sort(-1).values[:, Tq - n :]
        each = which.expand(B, -1).clamp(min=0)
        own = take_rows(q, each[:, None])
    shift = shift_of(offset, 1)
    at = which + (shift.to(device) if isinstance(shift, Tensor) else shift)
    sees = (at + 1).clamp(0, Tk) if causal else torch.full_like(at, Tk)
    sees = torch.where(which >= 0, sees, 0).expand(B, n).int().contiguous()
    at = at.clamp(SHORT.min, SHORT.max).expand(B, n).int().contiguous()
    early = 0 if isinstance(offset, Tensor) else max(0, -offset)
    before = 0 if causal else max(Tk - 1, 0) + early
    last = Tk if isinstance(offset, Tensor) else max(Tk, offset + Tq)
    keep = None if k_keep is None else k_keep.to(device).expand(B, -1).contiguous()
    options = Probing(
        as_scale(scale, D), as_softcap(softcap), before + last, before, q_keep is None, as_backend(backend)
    )
    own = own.whole() if isinstance(own, Sharded) else own.detach()
    if isinstance(k, Sharded):
        lse, keys, distances = k.probed(own, sees, at, keep, options)
    else:
        lse, keys, distances = _probe(own, k.detach(), sees, at, keep, options)
    return Probe(lse, which.int(), before, keys, distances)

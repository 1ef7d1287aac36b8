"""Budgets: select units from scores (top-k, top-p, thresholds)."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..backends.dispatch import choose_able
from ..backends.numerics import Best, Heaviest, Running, in_order, state_dtype
from ..common.errors import SparseFlashError, require
from ..ops._arguments import as_backend
from ..ops._register import register
from ..plan.options import host, is_count


def _candidates(score: Tensor, among: Tensor | None) -> Tensor:
    """Validate `among` and expand it to the shape of the scores; None means all candidates."""
    if not isinstance(score, Tensor) or score.dim() < 1 or not score.is_floating_point():
        given = f"{list(score.shape)} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
        raise SparseFlashError(f"score: {given}; expected a floating point tensor [..., n]")
    if among is None:
        return torch.ones((), dtype=torch.bool, device=score.device).expand(score.shape)
    good = isinstance(among, Tensor) and among.dtype == torch.bool
    try:
        if good:
            return among.to(score.device).expand(score.shape)
    except RuntimeError:
        pass
    given = f"{list(among.shape)} {among.dtype}" if isinstance(among, Tensor) else type(among).__name__
    raise SparseFlashError(
        f"among: {given}; expected bool that broadcasts to {list(score.shape)}, True = may be kept"
    )


def _of_heads(name: str, x: object, score: Tensor, axes: int = 1) -> Tensor | float:
    """Validate a number, or reshape a tensor ([H], [B|1,H] or score axes) to broadcast to the scores."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return x
    if isinstance(x, Tensor) and x.dtype != torch.bool and not x.is_complex():
        x = x.to(score.device)
        if x.dim() == 0:
            return x
        shape = tuple(x.shape)
        if x.dim() != score.dim():
            shape = (1,) * (2 - x.dim()) + shape + (1,) * (score.dim() - 2)
        if x.dim() in (1, 2, score.dim()) and (score.dim() > 2 or x.dim() == score.dim()):
            fits = all(a in (1, b) for a, b in zip(shape, score.shape, strict=True))
            if fits and all(n == 1 for n in shape[len(shape) - axes :]):
                return x.reshape(shape)
    given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
    raise SparseFlashError(
        f"{name}: {given}; expected a number, or [H] or [B|1,H] of scores {list(score.shape)}"
    )


def _order(score: Tensor, among: Tensor) -> Tensor:
    """Indices of the last axis, sorted from the best to the worst candidate."""
    return in_order(score.detach(), among).argsort(dim=-1, descending=True, stable=True)


def _unsort(sorted_keep: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(sorted_keep).scatter_(-1, order, sorted_keep)


def _first_of(score: Tensor, among: Tensor) -> Tensor:
    """Mask of the best candidate of each row, if the row has any."""
    n = score.shape[-1]
    if not n:
        return among
    order = in_order(score.detach(), among)
    tie = among & (order == order.amax(-1, keepdim=True))
    return tie & (tie.cumsum(-1) == 1)


def top_k(score: Tensor, k: int | Tensor, among: Tensor | None = None) -> Tensor:
    """Select the k best units of each row.

    Parameters
    ----------
    score : Tensor
        Floating point `[..., n]`; heads are axis 1 if k differs by head.
    k : int or Tensor
        Most units of a row: a number, or integers `[H]` or `[B|1, H]`. Less than 1 counts as 1.
    among : Tensor, optional
        bool that broadcasts to the scores, True = candidate: only candidates are selected.

    Returns
    -------
    Tensor, bool, like the scores
        Of equal scores the lower unit wins; NaN ranks last. The selection for k contains those of smaller k.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import top_k
    >>> top_k(torch.tensor([[3.0, 1.0, 3.0, 3.0]]), 2).int().tolist()
    [[1, 0, 1, 0]]
    """
    among = _candidates(score, among)
    most = _of_heads("k", k, score)
    if is_count(most):
        n = score.shape[-1]
        best = top_indices(score, max(most, 1), among).long()
        kept = torch.zeros((*score.shape[:-1], n + 1), dtype=torch.bool, device=score.device)
        return kept.scatter_(-1, torch.where(best < 0, n, best), True)[..., :n]
    place = torch.arange(score.shape[-1], device=score.device)
    most = most.clamp(min=1) if isinstance(most, Tensor) else max(most, 1)
    return among & _unsort((place < most).expand(score.shape), _order(score, among))


def top_p(
    mass: Tensor,
    p: float | Tensor,
    among: Tensor | None = None,
    *,
    over: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Select the fewest units of each row that hold the share p of its mass.

    On the CPU nothing is sorted: four passes over the masses, in a twentieth of the time.

    Parameters
    ----------
    mass : Tensor
        Floating point `[..., n]`, `[..., R, n]` for `over=2`: not negative; NaN counts as 0 and ranks last.
    p : float or Tensor
        A number, or `[H]` or `[B|1, H]`. The unit that crosses p is kept; 1 or more keeps all of `among`.
    among : Tensor, optional
        bool that broadcasts to the mass, True = candidate: only candidates are selected, and counted.
    over : 1 or 2
        1: each row has its own budget (XAttention, arXiv 2503.16428). 2: all rows of a head share one
        (FlexPrefill, 2502.20766, algorithm 4), and the best unit of each row is kept in any case.
    backend : str, optional
        "reference" or "cpu"; None chooses the fastest usable one.

    Returns
    -------
    Tensor, bool, like the mass
        Of equal masses the lower unit wins (rows before units for `over=2`). A row with a candidate keeps at
        least one. The selection grows with p. p is a share of estimated mass, not a recall.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import top_p
    >>> top_p(torch.tensor([[0.5, 0.1, 0.3, 0.1]]), 0.7).int().tolist()
    [[1, 0, 1, 0]]
    """
    among = _candidates(mass, among)
    require(
        (
            over in (1, 2) and mass.dim() >= over,
            lambda: f"over={over!r}: expected 1, or 2 for masses of two axes and more",
        )
    )
    share = _of_heads("p", p, mass, axes=over)
    flat, own = mass.detach(), among
    if over == 2:
        flat, own = flat.flatten(-2), among.flatten(-2)
        share = share.flatten(-2) if isinstance(share, Tensor) and share.dim() else share
    *lead, n = flat.shape
    if isinstance(share, Tensor):
        shares = share.double().expand(*lead, 1).reshape(-1)
    else:
        shares = torch.full((math.prod(lead),), share, dtype=torch.float64, device=mass.device)
    rows = (len(shares), n)
    options = Heaviest(as_backend(backend))
    keep = _heaviest(flat.reshape(rows), own.reshape(rows), shares, options).view(mass.shape)
    return keep | _first_of(mass, among) if over == 2 else keep


def _heavy(mass: Tensor, among: Tensor | None, share: Tensor, options: Heaviest) -> Tensor:
    return choose_able("heaviest", options.backend, mass).heaviest(mass, among, share, options)


def _no_heavy(mass: Any, among: Any, share: Any, options: Heaviest) -> Tensor:
    return torch.empty_like(mass, dtype=torch.bool)


_heaviest = register("selection_heaviest", _heavy, _no_heavy)


def above(
    score: Tensor,
    bound: float | Tensor,
    among: Tensor | None = None,
    *,
    of: Literal["row-max", "value"] = "row-max",
) -> Tensor:
    """Select the units whose score reaches a bound.

    Parameters
    ----------
    score : Tensor
        Floating point `[..., n]`.
    bound : float or Tensor
        A number, `[H]` or `[B|1, H]`, or a tensor of as many axes as the scores that broadcasts to them.
    among : Tensor, optional
        bool that broadcasts to the scores, True = candidate: only candidates are selected.
    of : "row-max" or "value"
        "row-max": the bound is a share of the row's largest candidate (FlashPrefill, arXiv 2603.06199: alpha
        0.1). "value": it is a score (SeerAttention, 2410.13276; AnchorAttention, 2505.23520, with the
        anchors minus theta).

    Returns
    -------
    Tensor, bool, like the scores
        A row in which no candidate reaches the bound keeps its best one. NaN never reaches the bound.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import above
    >>> above(torch.tensor([[0.6, 0.1, 0.3]]), 0.5).int().tolist()
    [[1, 0, 1]]
    """
    among = _candidates(score, among)
    require((of in ("row-max", "value"), lambda: f"of={of!r}: expected row-max or value"))
    least = _of_heads("bound", bound, score, axes=0)
    score = score.detach()
    if of == "row-max" and score.shape[-1]:
        known = among & ~score.isnan()
        least = least * torch.where(known, score, -torch.inf).amax(-1, keepdim=True)
    return (among & (score >= least)) | _first_of(score, among)


def _best(scores: Tensor, among: Tensor | None, options: Best) -> Tensor:
    return choose_able("top_indices", options.backend, scores).top_indices(scores, among, options)


def _no_best(scores: Any, among: Any, options: Best) -> Tensor:
    found: Tensor = scores.new_empty((scores.shape[0], options.k), dtype=torch.int32)
    return found


_top_indices = register("selection_top_indices", _best, _no_best)


def top_indices(scores: Tensor, k: int, among: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Return the indices of the k best scores of each row: `top_k` as a list.

    On the CPU one pass over the scores, in a tenth of the time of `torch.topk`.

    Parameters
    ----------
    scores : Tensor
        Floating point `[..., n]`.
    k : int
        Indices per row, at least 1.
    among : Tensor, optional
        bool that broadcasts to the scores, True = candidate: only candidates are returned.
    backend : str, optional
        "reference" or "cpu"; None chooses the fastest usable one.

    Returns
    -------
    Tensor, int32 [..., min(k, n)]
        Ascending, padded with -1 if a row has fewer candidates. Of equal scores the lower index wins; NaN
        ranks last.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import top_indices
    >>> top_indices(torch.tensor([[3.0, 1.0, 3.0, 3.0]]), 2).tolist()
    [[0, 2]]
    """
    own = None if among is None else _candidates(scores, among)
    _candidates(scores, None)
    require((is_count(k, 1), lambda: f"k={k!r}: expected a positive int"))
    *lead, n = scores.shape
    options = Best(min(k, n), as_backend(backend))
    flat = scores.detach().reshape(-1, n) if n else scores.new_empty((math.prod(lead), 0))
    if own is not None:
        own = own.reshape(-1, n) if n else own.new_empty((math.prod(lead), 0))
    return _top_indices(flat, own, options).view(*lead, options.k)


def _running(x: Tensor, k: Tensor, options: Running) -> tuple[Tensor, Tensor]:
    return choose_able("running_kth", options.backend, x).running_kth(x, k, options)


def _no_running(x: Any, k: Any, options: Running) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape, dtype=torch.int32)


_running_kth = register("selection_running_kth", _running, _no_running)


@overload
def running_kth(
    x: Tensor, k: int | Tensor, *, return_until: Literal[False] = ..., backend: str | None = ...
) -> Tensor: ...
@overload
def running_kth(
    x: Tensor, k: int | Tensor, *, return_until: Literal[True], backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...
def running_kth(
    x: Tensor, k: int | Tensor, *, return_until: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Running k-th largest score: the bound that a key must reach to be among the k best so far.

    Used by dynamic-mask attention (arXiv 2508.02124) and caches that evict by score; on the CPU a heap
    computes it in O(T log k).

    Parameters
    ----------
    x : Tensor
        Floating point `[..., T]`: scores in time order; heads are axis 1 if k differs by head.
    k : int or Tensor
        Rank, at least 1: a number, or integers `[H]` or `[B|1, H]`.
    return_until : bool
        Also return when each score leaves the k largest.
    backend : str, optional
        "reference" or "cpu"; None chooses the fastest usable one.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        kth, fp32 (fp64 for fp64) like x: index t holds the k-th largest of `x[..., :t + 1]`, -inf while there
        are fewer than k. until, int32 like x: the first index from j on at which score j is not among the k
        largest (j if it never is), T if there is none: its lifetime is `j .. until - 1`, as
        `Plan.from_expiry` takes it. Of equal scores the earlier stays; NaN ranks below every number.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import running_kth
    >>> kth, until = running_kth(torch.tensor([2.0, 1.0, 3.0, 1.0]), 2, return_until=True)
    >>> kth.tolist(), until.tolist()
    ([-inf, 1.0, 2.0, 2.0], [4, 2, 4, 3])
    """
    _candidates(x, None)
    require(
        (isinstance(return_until, bool), lambda: f"return_until={return_until!r}: expected True or False")
    )
    each = _of_heads("k", k, x)
    T = x.shape[-1]
    longest = T + 1  # any larger k has the same effect
    whole = not (each.is_floating_point() if isinstance(each, Tensor) else isinstance(each, float))
    require((whole, lambda: f"k={k!r}: expected integers"))
    if isinstance(each, Tensor):
        most = int(each.max()) if host(each) and each.numel() else longest
        each = each.clamp(1, longest).int().expand(*x.shape[:-1], 1)[..., 0].reshape(-1).contiguous()
    else:
        most = int(each)
        require((most >= 1, lambda: f"k={k!r}: expected at least 1"))
        rows = math.prod(x.shape[:-1])
        each = torch.full((rows,), min(most, longest), dtype=torch.int32, device=x.device)
    flat = x.detach().to(state_dtype(x)).reshape(each.shape[0], T)
    options = Running(max(1, min(most, T)), as_backend(backend))
    kth, until = (found.view(x.shape) for found in _running_kth(flat, each, options))
    return (kth, until) if return_until else kth


def share(x: Tensor, Hkv: int, how: Literal["any", "sum", "max", "vote"] = "any") -> Tensor:
    """Reduce selections or scores over the query heads that share a KV head.

    Parameters
    ----------
    x : Tensor
        `[B, Hq, ...]`: bool for "any" and "vote", numbers for "sum" and "max".
    Hkv : int
        KV heads; Hkv divides Hq.
    how : "any", "sum", "max" or "vote"
        "any": selected by one head; "sum", "max": of the scores; "vote": selected by at least half the heads.

    Returns
    -------
    Tensor, [B, Hkv, ...]

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import share
    >>> share(torch.tensor([[[True, False], [False, False], [True, True]]]), 1, "vote").int().tolist()
    [[[1, 0]]]
    """
    require((how in ("any", "sum", "max", "vote"), lambda: f"how={how!r}: expected any, sum, max or vote"))
    kind = torch.bool if how in ("any", "vote") else None
    good = isinstance(x, Tensor) and x.dim() >= 2 and (x.dtype == torch.bool) == (kind is torch.bool)
    given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    want = "bool" if kind is torch.bool else "numbers"
    require(
        (good, lambda: f"x: {given}; expected {want} [B,Hq,...] for how={how!r}"),
        (is_count(Hkv, 1), lambda: f"Hkv={Hkv!r}: expected a positive int"),
    )
    require((x.shape[1] % Hkv == 0, lambda: f"Hkv={Hkv} does not divide the {x.shape[1]} heads of x"))
    grouped = x.detach().view(x.shape[0], Hkv, x.shape[1] // Hkv, *x.shape[2:])
    if how == "any":
        return grouped.any(2)
    if how == "vote":
        return 2 * grouped.sum(2) >= grouped.shape[2]
    return grouped.sum(2) if how == "sum" else grouped.amax(2)

"""Score pages of keys by summary rows, and select the best pages in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from ..backends.dispatch import choose_able
from ..backends.numerics import Best, Pages, state_dtype
from ..common.errors import SparseFlashError, require
from ..ops._arguments import as_backend, describe
from ..ops._register import register
from ..plan.options import INTEGERS, is_count

Share = Literal["", "sum", "max"]


class How(TypedDict, total=False):
    """Options of page scoring, as `page_scores` documents them."""

    near: int
    sinks: int
    parts: int
    share: Share
    closed: Sequence[tuple[int, int]]
    backend: str | None


def _score(q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages) -> Tensor:
    return choose_able("page_scores", options.backend, rows).page_scores(q, rows, last, rules, options)


def _best(q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages) -> Tensor:
    backend = choose_able("page_scores", options.backend, rows)
    if hasattr(backend, "top_pages"):
        best: Tensor = backend.top_pages(q, rows, last, rules, options)
        return best
    scores = backend.page_scores(q, rows, last, rules, options)
    flat = scores.flatten(0, 2)
    found = choose_able("top_indices", "", flat).top_indices(flat, flat != -torch.inf, Best(options.k))
    return found.view(*scores.shape[:3], -1)


def _shape(q: Any, rows: Any, options: Pages) -> tuple[Any, ...]:
    return q.shape[0], rows.shape[1] if options.share else q.shape[1], q.shape[2]


def _no_score(q: Any, rows: Any, last: Any, rules: Any, options: Pages) -> Tensor:
    pages = -(-rows.shape[2] // options.parts)
    found: Tensor = q.new_empty((*_shape(q, rows, options), pages), dtype=state_dtype(rows))
    return found


def _no_best(q: Any, rows: Any, last: Any, rules: Any, options: Pages) -> Tensor:
    found: Tensor = q.new_empty((*_shape(q, rows, options), options.k), dtype=torch.int32)
    return found


_page_scores = register("selection_page_scores", _score, _no_score)
_top_pages = register("selection_top_pages", _best, _no_best)


@functools.lru_cache(maxsize=256)
def _rules(near: int, closed: tuple[tuple[int, int], ...], heads: int, device: torch.device) -> Tensor:
    """Table [heads,2] of near pages, and whether a head may read other pages."""
    made = torch.tensor([[near, 1]] * heads, dtype=torch.int32)
    for head, own in closed:
        made[head] = torch.tensor([own, 0])
    return made.to(device)


def _checked(
    q: Tensor,
    rows: Tensor,
    last: Tensor,
    k: int,
    *,
    near: int = 1,
    sinks: int = 0,
    parts: int = 1,
    share: Share = "",
    closed: Sequence[tuple[int, int]] = (),
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Pages]:
    """Validate the arguments and convert them to those of the ops."""
    good = all(isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point() for x in (q, rows))
    good = good and q.shape[0] == rows.shape[0] and q.shape[3] == rows.shape[3]
    if not good or not rows.shape[1] or q.shape[1] % rows.shape[1] or q.device != rows.device:
        raise SparseFlashError(
            f"q: {describe(q)}, rows: {describe(rows)}; expected floating point [B,Hq,Tq,w] and "
            "[B,Hkv,n,w] on one device, Hq a multiple of Hkv"
        )
    B, Tq, heads = q.shape[0], q.shape[2], rows.shape[1] if share else q.shape[1]
    good = isinstance(last, Tensor) and last.dtype in INTEGERS and last.dim() == 2
    if not good or last.shape[0] not in (1, B) or last.shape[1] != Tq or last.device != q.device:
        raise SparseFlashError(
            f"last: {describe(last)}; expected integers [B|1={B}, Tq={Tq}] on {q.device}: the page of each "
            "query"
        )
    require(
        (share in ("", "sum", "max"), lambda: f"share={share!r}: expected 'sum', 'max', or '' for none"),
        (is_count(near), lambda: f"near={near!r}: expected an int >= 0, pages"),
        (is_count(sinks), lambda: f"sinks={sinks!r}: expected an int >= 0, pages"),
        (is_count(parts, 1), lambda: f"parts={parts!r}: expected an int >= 1, rows of a page"),
    )
    own = tuple((h, n) for h, n in closed)
    require(
        (
            all(is_count(h) and h < heads and is_count(n) for h, n in own),
            lambda: f"closed={own}: expected (head, near pages) of heads 0..{heads - 1}",
        )
    )
    options = Pages(parts, sinks, near, share, k, as_backend(backend))
    # Dynamo traces through lru_cache and warns, so call the function itself
    made = _rules.__wrapped__ if torch.compiler.is_compiling() else _rules
    rules = made(near, own, heads, q.device) if own else None
    return q.detach(), rows.detach(), last.expand(B, Tq), rules, options


def page_scores(
    q: Tensor,
    rows: Tensor,
    last: Tensor,
    **how: Unpack[How],
) -> Tensor:
    """Score pages of keys for each query by products with the pages' summary rows.

    Parameters
    ----------
    q : Tensor
        `[B,Hq,Tq,w]`: vectors that the rows are multiplied with (`cache.Summary.query`).
    rows : Tensor
        `[B,Hkv,n,w]`: summary, `parts` rows a page (`cache.Growing.summary`); fp32, bf16, fp16, any strides.
    last : Tensor
        Integers `[B|1,Tq]`: the page that each query lies in, the last that it may read.
    near, sinks : int
        Pages that are always read: `near` pages back from the query's own (included), `sinks` first pages.
    parts : int
        Rows of a page; a page's score is that of its best row.
    share : "", "sum" or "max"
        "": each query head has its own scores; otherwise the sum or maximum over the heads of a GQA group.
    closed : sequence of (int, int)
        Pairs (head, n): the head reads only the sink pages and n near pages.
    backend : str, optional
        "reference", "cpu" or "triton"; None chooses the fastest usable one.

    Returns
    -------
    Tensor
        fp32 (fp64) `[B,Hq|Hkv,Tq,ceil(n / parts)]`: infinity for pages that are always read, -infinity for
        pages that are never read.

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given, what is expected and how to fix it.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import page_scores
    >>> rows = torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0]).view(1, 1, 5, 1)
    >>> page_scores(torch.ones(1, 1, 1, 1), rows, torch.tensor([[3]])).tolist()
    [[[[1.0, 4.0, 2.0, inf, -inf]]]]
    """
    return _page_scores(*_checked(q, rows, last, 0, **how))


def top_pages(
    q: Tensor,
    rows: Tensor,
    last: Tensor,
    k: int,
    **how: Unpack[How],
) -> Tensor:
    """Select the k best pages of each query: `top_indices` of `page_scores`, without storing the scores.

    Parameters
    ----------
    k : int
        Most pages of a query; pages that are always read come first and count towards k.
    q, rows, last, near, sinks, parts, share, closed, backend
        As in `page_scores`.

    Returns
    -------
    Tensor, int32 [B,Hq|Hkv,Tq,min(k,pages)]
        Ascending, padded with -1. Of equal scores the lower page wins; NaN ranks last.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.selection import top_pages
    >>> rows = torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0]).view(1, 1, 5, 1)
    >>> top_pages(torch.ones(1, 1, 1, 1), rows, torch.tensor([[3]]), 2).tolist()
    [[[[1, 3]]]]
    """
    require((is_count(k, 1), lambda: f"k={k!r}: expected a positive int, pages"))
    q, rows, last, rules, options = _checked(q, rows, last, k, **how)
    options = options._replace(k=min(k, -(-rows.shape[2] // options.parts)))
    if not options.k:
        return torch.empty((*_shape(q, rows, options), 0), dtype=torch.int32, device=q.device)
    return _top_pages(q, rows, last, rules, options)

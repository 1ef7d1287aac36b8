"""`recall`: the share of dense attention's mass on the pairs that a plan shows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan
from ._arguments import WIDEST, AnyPlan, as_plans, check_inputs
from .attention import attention


@torch.no_grad()
def recall(
    q: Tensor,
    k: Tensor,
    plan: AnyPlan,
    *,
    dense: Plan | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Share of dense attention's mass that lies on the visible pairs of a plan, per query. No gradient.

    Measures what a selection loses, whatever the values v: recall 1 loses nothing. The budget of a method (a
    threshold, a share of estimated mass) is only an estimate of this recall.

    Parameters
    ----------
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`.
    plan : Plan or tuple of Plan
        Visible pairs.
    dense : Plan, optional
        Plan to compare with. None: all keys, up to the query's own position if the plan is causal.
    scale, softcap, key_bias, backend
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor, fp32 `[B,Hq,Tq]` (fp64 for fp64)
        1 for a query that sees nothing in dense attention either. It costs two forwards with Dv = 1, and its
        error is eps * |lse|.

    Raises
    ------
    SparseFlashError
        If the plan has `q_pos` or `k_pos` and `dense` is not given: the causal order of the tokens is then
        not known.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k = torch.randn(2, 1, 2, 256, 32)
    >>> plan = sf.Plan.dense(256, 256, causal=True, window=(63, 0))
    >>> found = sf.recall(q, k, plan)
    >>> found.shape, bool((found[..., :64] > 0.999).all()), bool(found[..., 200:].mean() < 0.5)
    (torch.Size([1, 2, 256]), True, True)
    """
    check_inputs(q, k, k, WIDEST)
    plans = as_plans(plan)
    if dense is None:
        if any(x is not None for one in plans for x in (one.q_pos, one.k_pos)):
            raise SparseFlashError(
                "the plan has positions of its own: say what to compare with, such as "
                "dense=Plan.dense(Tq, Tk, causal=True, q_offset=...)"
            )
        causal = all(one.causal for one in plans)
        at = plans[0].q_offset if causal else 0
        dense = Plan.dense(q.shape[2], k.shape[2], causal=causal, q_offset=at, device=q.device)
    value = k[..., :1]  # any values: only the lse is used

    def level(of: AnyPlan) -> Tensor:
        return attention(
            q,
            k,
            value,
            of,
            scale=scale,
            softcap=softcap,
            key_bias=key_bias,
            backend=backend,
            return_lse=True,
        )[1]

    some, every = level(plans), level(dense)
    return torch.where(every == -torch.inf, 1.0, (some - every).exp()).clamp(max=1.0)

"""`recall`: how much of dense attention's mass lies on what a plan lets see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparseFlashError
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
    """The share of dense attention's mass that lies on the pairs of a plan, for each query. No gradient.

    What a method loses before any value is looked at: 1 is nothing. A budget that a method is given (a
    threshold, a share of an estimate) is no recall; this is.

    Parameters
    ----------
    q, k : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`.
    plan : Plan or tuple of Plan
        What is seen.
    dense : Plan, optional
        What it is compared with. None: all keys, up to the query's own position where the plan is causal.
    scale, softcap, key_bias, backend
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor, fp32 `[B,Hq,Tq]` (fp64 for fp64)
        1 for a query that sees nothing in dense attention either. It costs two forwards with values of one
        number, and is right to eps * |lse|.

    Raises
    ------
    SparseFlashError
        For a plan with positions of its own where `dense` is not given: what comes before what is then not
        that of the tokens.

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
    value = k[..., :1]  # nobody looks at the result

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

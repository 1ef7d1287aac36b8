"""Stick-breaking attention: from the newest key to the oldest, each takes a share of what is left."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..ops._arguments import AnyPlan
from ..ops.stick_breaking import stick_breaking
from ..plan import Plan
from .base import Layer, State, check_choice


class StickBreakingAttention(Layer):
    """Attention without softmax and without position embeddings: the newest keys take their share first.

    `A_ij = b_ij prod_{j < t < i} (1 - b_it)`, `b_ij = sigmoid(q_i . k_j / sqrt(D))` over earlier keys;
    `o_i = sum_j A_ij v_j + r_i v_i`, where `r_i = 1 - sum_j A_ij` is what is left of the stick.

    Paper: Tan et al., "Stick-breaking Attention", arXiv 2410.17980.

    Parameters
    ----------
    width, heads, kv_heads, head_dim
        As in `Layer`.
    rest : "self" or "drop"
        What happens to the rest r_i: it weighs the token's own value, or is dropped.
    include_self : bool
        Whether a token's own key is the first to take a share (not in the paper).

    Notes
    -----
    The state caches all keys and values. A plan passed to forward limits the keys; hidden keys take no share.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.StickBreakingAttention(64, 4)
    >>> x = torch.randn(2, 100, 64)
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-5)
    True
    """

    takes_plan = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rest: Literal["self", "drop"] = "self",
        include_self: bool = False,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        check_choice(rest=(rest, ("self", "drop")), include_self=(include_self, (True, False)))
        self.rest, self.include_self = rest, include_self
        self.project_heads(device=device, dtype=dtype)
        self.reset()

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Apply stick-breaking attention; x [B, T, width]."""
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        own, offset = v, 0
        if state is not None:
            offset = state.length
            k, v = state.append(k=k, v=v)
        if plan is not None:
            if not isinstance(plan, Plan):
                raise SparseFlashError("plan: a tuple of plans has no one order of keys; expected one Plan")
            out, rem = stick_breaking(q, k, v, plan, return_rem=True)
        else:
            out, rem = stick_breaking(
                q, k, v, include_self=self.include_self, q_offset=offset, return_rem=True
            )
        if self.rest == "self":
            own = own.repeat_interleave(self.heads // self.kv_heads, 1)
            out = out + rem[..., None].to(out.dtype) * own
        return self.end(out)

    def extra_repr(self) -> str:
        """One-line description of the shape and rest."""
        return f"{super().extra_repr()}, rest={self.rest!r}, include_self={self.include_self}"

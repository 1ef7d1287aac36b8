"""`merge`: combine attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends.numerics import merged
from ..common.errors import SparseFlashError
from ._arguments import describe


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key sets into attention over their union, exactly and differentiably.

    Parameters
    ----------
    parts : sequence of (out [B,H,T,Dv], lse [B,H,T])
        Results of `attention(..., return_lse=True)`. An fp32 lse gives the weight of a part to eps |lse|:
        where logits are in the thousands, pass the plans of all parts to one `attention` call instead.

    Returns
    -------
    (Tensor, Tensor)
        out (in the dtype of the parts) and lse.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 64, 32)
    >>> a = sf.attention(q, k[:, :, :40], v[:, :, :40], return_lse=True)
    >>> b = sf.attention(q, k[:, :, 40:], v[:, :, 40:], return_lse=True)
    >>> torch.allclose(sf.merge([a, b])[0], sf.attention(q, k, v), atol=1e-5)
    True
    """
    if not isinstance(parts, (tuple, list)) or not parts:
        raise SparseFlashError(f"merge() of {describe(parts)}: expected a list of (out, lse), at least one")
    for part in parts:
        good = isinstance(part, (tuple, list)) and len(part) == 2 and all(isinstance(x, Tensor) for x in part)
        if not good:
            raise SparseFlashError(
                "merge(): expected pairs (out, lse), as attention(..., return_lse=True) returns them"
            )
        (out, lse), first = part, parts[0][0]
        good = out.dim() == 4 and out.shape[:-1] == lse.shape and out.shape == first.shape
        good = (
            good
            and out.is_floating_point()
            and lse.is_floating_point()
            and out.device == lse.device == first.device
        )
        if not good:
            raise SparseFlashError(
                f"out: {describe(out)}, lse: {describe(lse)}; expected [B,H,T,Dv], [B,H,T], all alike"
            )
    out, lse = merged(parts)
    return out.to(parts[0][0].dtype), lse

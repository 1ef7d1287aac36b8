"""The objective "masked": masked-diffusion language models of bytes, their training and their generation.

A share t of a sequence is replaced by `MASK`, the absorbing state of MDLM (Sahoo et al., arXiv 2406.07524)
and LLaDA (Nie et al., arXiv 2502.09992), t uniform in (0, 1). The model reads what is left, in both
directions, and pays `-log p(byte) / t` for each hidden byte: the mean over t is an upper bound of the
negative log-likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparseflash.selection.budgets import top_k
from sparseflash.train.model import GPT, MASK

LEAST = 1e-3
"""Smallest share of a sequence that is hidden; without it a weight of 1 / t is not bounded."""
SHARES = 8
"""Masks of each held-out window in validation."""


def hide(tokens: Tensor, seed: int, rows: slice, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mask a share of each sequence: inputs, targets and weights for `GPT.forward`, all `[n, T]`.

    The shares of the `total` sequences of a step are spread evenly over (0, 1), which varies less than
    drawing each for itself (the low-discrepancy sampler of MDLM). All is a function of seed and row, so that
    processes that share a step, and runs that resume, hide the same bytes.

    Parameters
    ----------
    tokens : Tensor
        int64 `[n, T]`: the sequences `rows` of the step.
    seed : int
        Of the step.
    rows : slice
        Which of the step's sequences these are.
    total : int
        Sequences of the step.

    Examples
    --------
    >>> import torch
    >>> from sparseflash.train.masked import hide
    >>> inputs, targets, weights = hide(torch.arange(8)[None].expand(4, -1), 0, slice(None), 4)
    >>> (inputs == 256).sum(1).tolist(), [round(float(w), 2) for w in weights[:, 0]]
    ([5, 8, 8, 3], [2.01, 1.34, 1.0, 4.05])
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand((), generator=generator)
    share = (LEAST + (1 - LEAST) * ((first + torch.arange(total) / total) % 1))[rows, None]
    hidden = torch.rand(total, tokens.shape[1], generator=generator)[rows] < share
    return (
        tokens.masked_fill(hidden, MASK),
        tokens.masked_fill(~hidden, -100),
        (1 / share).expand(tokens.shape),
    )


class Step(NamedTuple):
    """One step of a generation."""

    given: Tensor
    """`[B, T]`: what the model read, with `MASK` where nothing is known yet."""
    logits: Tensor
    """`[B, T, 256]` of that."""
    tokens: Tensor
    """`[B, T]`: as given, with the bytes of this step."""


Attend = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]
"""`attend(step, layer, q, k, v) -> out`, all `[B, heads, T, head_dim]`."""


@torch.no_grad()
def denoise(
    model: GPT,
    tokens: Tensor,
    *,
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    attend: Attend | None = None,
) -> Iterator[Step]:
    """Fill in what is masked, the surest bytes first, about as many at each step (LLaDA).

    Parameters
    ----------
    model : GPT
        Trained with the objective "masked".
    tokens : Tensor
        int64 `[B, T]`, each row with equally many `MASK`.
    steps : int
        Forwards; at most one for each mask.
    temperature : float
        0 takes the likeliest byte; 1 draws from the model as it is.
    generator : torch.Generator, optional
        Of the draws.
    attend : callable, optional
        The attention, in place of the model's own: `attend(step, layer, q, k, v)`.

    Yields
    ------
    Step
        What was read, what the model said of it, and what is written now.
    """
    left = int((tokens == MASK).sum(-1).max()) if tokens.numel() else 0
    steps = min(steps, left)
    for step in range(steps):
        count = -(-left // (steps - step))
        own = None if attend is None else (lambda layer, q, k, v, step=step: attend(step, layer, q, k, v))
        logits = model(tokens, attend=own)
        hidden = tokens == MASK
        if temperature == 0:
            drawn = logits.argmax(-1)
        else:
            chances = (logits / temperature).softmax(-1)
            drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(tokens)
        sure = logits.gather(-1, drawn[..., None])[..., 0] - logits.logsumexp(-1)
        given, tokens = tokens, torch.where(top_k(sure, count, hidden), drawn, tokens)
        left -= count
        yield Step(given, logits, tokens)

"""MoA: find the attention span of each head, from the loss's sensitivity to its far pairs and a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.common.errors import SparseFlashError
from sparseflash.selection.calibrate import Profile

SINKS = 64


def influences(model: Any, ids: Tensor, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """First-order change of a text's loss when pairs at each distance are removed: `[Hq, T]` per layer.

    Pairs with the first keys are excluded, since every span has them. Takes one forward and one backward,
    without T x T tensors.

    Papers: MoA, arXiv 2406.14909, section 4.1 (which uses the model's own answers, not the text itself).
    """
    from sparseflash.integrations.transformers import attention_layers
    from sparseflash.integrations.transformers.control import attached, on_sparse

    chosen = [x for x in attention_layers(model) if not x.windowed and (layers is None or x.index in layers)]
    calls: dict[int, tuple[Tensor, ...]] = {}

    def listener(number: int) -> Callable[..., Tensor]:
        def attend(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
        ) -> Tensor:
            out, lse = sf.attention(q, k, v, mask.plan, return_lse=True, **options)
            out.retain_grad()
            calls[number] = (q, k, v, out, lse, options["scale"])
            return out

        return attend

    with on_sparse(model), attached(chosen, [listener(x.index) for x in chosen]):
        model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    found = {}
    for number, (q, k, v, out, lse, scale) in calls.items():
        T = q.shape[2]
        at = torch.arange(T, device=q.device)
        far = sf.Plan.from_intervals((at * 0 + SINKS)[None, None], (at + 1)[None, None], Tk=T, moving=True)
        dout = out.grad
        delta = (dout * out).sum(-1)
        moved = sf.attention_stats(
            q, k, lse.detach(), far, over="diagonal", v=v, dout=dout, delta=delta, scale=scale
        )
        found[number] = moved[..., T - 1 :].sum(0)  # distances 0, 1, ...
    return found


def rules(lengths: Sequence[int], betas: int = 9, step: int = 1024) -> list[tuple[int, float]]:
    """Candidates (alpha, beta) whose span is above 0 at the shortest length and within the longest one."""
    least, most = min(lengths), max(lengths)
    shares = [n / (betas - 1) for n in range(betas)]
    offsets = range(-(least // step) * step, most + 1, step)
    return [(a, b) for b in shares for a in offsets if 0 < a + b * least and a + b * most <= most]


def spans(
    influence: Mapping[int, Mapping[int, Tensor]],
    *,
    bound: float = 0.5,
    candidates: Sequence[tuple[int, float]] | None = None,
    in_a_layer: int = 2,
    seconds: float = 60.0,
) -> dict[int, list[dict[str, Any]]]:
    """Choose each head's span to lose least influence, with all heads within one budget at every length.

    Parameters
    ----------
    influence : mapping
        For each length N and layer: `[Hq, N]` by distance, from `influences`.
    bound : float
        Largest mean share of the causal pairs, over all heads.
    candidates : sequence of (alpha, beta), optional
        Span rules; by default `rules` of the lengths.
    in_a_layer : int
        Maximum number of different rules per layer.
    seconds : float
        Time limit of the solver (HiGHS through SciPy), which then returns its best solution.

    Returns
    -------
    dict
        Settings of `moa` for each head of each layer, as `Profile.of` takes them.

    Papers: MoA, arXiv 2406.14909, section 4.2, which takes a Pareto set over the lengths; here the objective
    is the sum over lengths of the lost share.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    lengths = sorted(influence)
    tried = list(rules(lengths) if candidates is None else candidates)
    layers = sorted(influence[lengths[0]])
    heads = [len(influence[lengths[0]][number]) for number in layers]
    made = [sf.methods.MoA(alpha=a, beta=b, sinks=SINKS) for a, b in tried]
    R, H = len(tried), sum(heads)
    kept = [[_kept(method.span(n), n) for method in made] for n in lengths]
    lost = torch.zeros(H, R, dtype=torch.float64)
    for n in lengths:
        moved = torch.cat([influence[n][number] for number in layers]).double()
        beyond = moved.flip(-1).cumsum(-1).flip(-1)  # influence of this distance and all larger ones
        widths = torch.tensor([min(max(method.span(n) - SINKS, 1), n - 1) for method in made])
        lost += beyond[:, widths] / moved.sum().clamp(min=1e-300)
    # binary variables: x[h, r]: head h follows rule r; y[l, r]: some head of layer l follows rule r
    # two layers of one head, three rules: x is numbered [[0, 1, 2], [3, 4, 5]], y [[6, 7, 8], [9, 10, 11]]
    layer_of = np.repeat(np.arange(len(layers)), heads)
    X = np.arange(H * R).reshape(H, R)
    Y = H * R + np.arange(len(layers) * R).reshape(len(layers), R)
    rows: list[tuple[Any, Any, float, float]] = []
    rows += [(X[h], np.ones(R), 1, 1) for h in range(H)]
    rows += [(X.ravel(), np.tile(k, H) / H, 0, bound) for k in kept]
    rows += [
        (np.array([X[h, r], Y[layer_of[h], r]]), np.array([1, -1]), -1, 0) for h in range(H) for r in range(R)
    ]
    rows += [(Y[n], np.ones(R), 0, in_a_layer) for n in range(len(layers))]
    place = np.concatenate([np.full(len(x), n) for n, (x, *_) in enumerate(rows)])
    columns, values = (np.concatenate([row[n] for row in rows]) for n in (0, 1))
    matrix = coo_matrix((values, (place, columns)), shape=(len(rows), H * R + Y.size)).tocsr()
    found = milp(
        np.concatenate([lost.numpy().ravel(), np.zeros(Y.size)]),
        integrality=np.ones(matrix.shape[1]),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, [row[2] for row in rows], [row[3] for row in rows]),
        options={"time_limit": seconds},
    )
    if found.x is None:
        least = max(min(k) for k in kept)
        raise SparseFlashError(
            f"no spans within bound={bound}: {found.message}; the shortest candidates keep {least:.3f} of "
            "the pairs"
        )
    best = iter(found.x[: H * R].reshape(H, R).argmax(1).tolist())
    return {
        number: [
            {"method": "moa", "alpha": tried[r][0], "beta": tried[r][1]}
            for r in (next(best) for _ in range(n))
        ]
        for number, n in zip(layers, heads, strict=True)
    }


def profile(
    name: str,
    model: Any,
    ids: Tensor,
    lengths: Sequence[int],
    *,
    bound: float = 0.5,
    layers: Sequence[int] | None = None,
    path: Path | None = None,
) -> Profile:
    """Spans of a model's heads, from prefixes of a text with these lengths; saved to `path` if given."""
    moved = {n: influences(model, ids[:, :n], layers) for n in lengths}
    found = Profile.of(name, spans(moved, bound=bound))
    if path is not None:
        found.save(path)
    return found


def mean(profile: Profile, n: int) -> float:
    """Mean span of a profile's heads at length n."""
    heads = [head for number in profile.numbers for head in profile.heads(number)]
    return sum(sf.methods.MoA(alpha=x["alpha"], beta=x["beta"]).span(n) for x in heads) / len(heads)


def _kept(span: int, n: int) -> float:
    """Share of the causal pairs that first keys and a window of `span` keys in total keep."""
    full = n * (n + 1) / 2
    return 1 - (n - span) * (n - span + 1) / 2 / full

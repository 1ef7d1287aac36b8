"""Every native op at its documented limits: sizes of heads, odd lengths, many heads, fast decay.

python tests/cpu_limits.py

What this looks for is scratch memory made for one shape and used for another, so it says most under the
address sanitizer (`cpu_fuzz.py --sanitize address,undefined`); elsewhere it sees wrong results.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.backends import cpu
from sparseflash.ops.nm import nm_product

DIMS = ((256, 256), (256, 1), (1, 256), (255, 129), (129, 255), (64, 256), (256, 64))
"""D and Dv: the largest, and beside the sizes of tiles; each with the other large and small."""
WIDE = ((576, 576), (576, 1), (1, 576), (575, 513), (576, 512))
"""The same for softmax attention."""

SIZES = ((1, (1, 1)), (65, (8, 1)), (300, (2, 2)))
"""Tokens and heads."""

Call = Callable[[str], list[Tensor]]


def results(op: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    """What an op returns, and the gradients of its sum."""
    given = [x.detach().requires_grad_() for x in leaves]
    found = op(*given)
    found = found if isinstance(found, tuple) else (found,)
    grads = torch.autograd.grad([x.sum() for x in found], given)
    return [*(x.detach() for x in found), *grads]


def inputs(
    D: int, Dv: int, T: int, heads: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, dict[str, sf.Plan], Callable[..., Tensor]]:
    """q, k, v, plans of tiles and of few queries, and normal numbers to follow."""
    g = torch.Generator().manual_seed(D + Dv + T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    (Hq, Hkv), B = heads, 2
    q, k, v = ((normal(B, h, T, d) / d**0.25).to(dtype) for h, d in ((Hq, D), (Hkv, D), (Hkv, Dv)))
    few = sf.Plan.from_keys(torch.arange(8).expand(1, 1, -(-T // 2), 8) % T, Tq=T, Tk=T, tile=2)
    return q, k, v, {"tiles": sf.Plan.dense(T, T, causal=True), "few": few}, normal


def softmax(
    q: Tensor, k: Tensor, v: Tensor, plans: dict[str, sf.Plan], normal: Callable[..., Tensor]
) -> Iterator[tuple[str, Call]]:
    """Attention, what it finds by the way, its statistics, and decoding."""
    Hq, T = q.shape[1:3]
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap": {"softcap": 5.0},
        "bias": {"key_bias": normal(1, Hq, T)},
        "negative": {"scale": -0.1, "sink_logits": normal(Hq)},
        "pairs": {"alibi_slopes": normal(Hq).abs(), "pair_bias": normal(1, Hq, T, T), "softcap": 5.0},
        "distances": {"pair_bias": normal(1, Hq, 2 * T - 1).requires_grad_()},
        "dropout": {"dropout_p": 0.1, "dropout_seed": q.shape[3] - 2**62, "key_bias": normal(1, Hq, T)},
    }
    for (named, plan), (how, given) in itertools.product(plans.items(), options.items()):
        yield (
            f"attention, {named}, {how}",
            lambda b, p=plan, o=given: results(
                lambda *x: sf.attention(*x, p, return_lse=True, backend=b, **o), q, k, v
            ),
        )
    for named, plan in plans.items():
        out, lse = sf.attention(q, k, v, plan, return_lse=True, out_dtype=torch.float32, backend="reference")
        slopes = {"v": v, "dout": out.to(q.dtype), "delta": (out.to(q.dtype) * out).sum(-1)}
        for over in ("key", "row", "entry", "diagonal", "block"):
            block = {"block": (7, 65)} if over == "block" else {}
            yield (
                f"attention_stats, {named}, {over}",
                lambda b, p=plan, o=over, x=lse, n=block: [
                    sf.attention_stats(q, k, x, p, over=o, backend=b, **n)
                ],
            )
        yield (
            f"influences, {named}",
            lambda b, p=plan, x=lse, s=slopes: [
                sf.attention_stats(q, k, x, p, over="block", block=(64, 3), backend=b, **s)
            ],
        )
        for block in ((1, 1), (65, 64)):
            yield (
                f"block maxima, {named}, {block}",
                lambda b, p=plan, n=block: list(sf.attention(q, k, v, p, return_block_max=n, backend=b)),
            )
        yield f"skipping, {named}", lambda b, p=plan: [sf.attention(q, k, v, p, skip_below=1.0, backend=b)]
    for sparsity, int8 in ((0.7, False), (0.0, True), (0.5, True)):
        packed = [sf.records.pack(x, sparsity=sparsity, int8=int8) for x in (k, v)]
        yield (
            f"decode, records, {sparsity}, {int8}",
            lambda b, p=packed: [
                sf.decode(q[:, :, -1:], *(p if b == "cpu" else (x.unpack() for x in p)), backend=b)
            ],
        )
    for new in (1, min(T, 17)):
        yield f"decode, {new}", lambda b, n=new: [sf.decode(q[:, :, -n:], k, v, backend=b)]


def calls(D: int, Dv: int, T: int, heads: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Every op on tensors of these shapes, as a function of the backend."""
    q, k, v, plans, normal = inputs(D, Dv, T, heads, dtype)
    yield from softmax(q, k, v, plans, normal)
    if max(D, Dv) <= 256:
        yield from others(q, k, v, plans, normal)


def others(
    q: Tensor, k: Tensor, v: Tensor, plans: dict[str, sf.Plan], normal: Callable[..., Tensor]
) -> Iterator[tuple[str, Call]]:
    """What is no softmax attention, and what selects."""
    (B, Hq, T, D), Dv = q.shape, v.shape[3]
    g = torch.Generator().manual_seed(D + Dv + T)
    for named, plan in plans.items():
        yield (
            f"stick_breaking, {named}",
            lambda b, p=plan: results(
                lambda *x: sf.stick_breaking(*x, p, return_rem=True, backend=b), q, k, v
            ),
        )
        yield (
            f"pointwise_attention, {named}",
            lambda b, p=plan: results(lambda *x: sf.pointwise_attention(*x, p, backend=b), q, k, v),
        )
    yield from selections(q, k, normal)
    x, weight = normal(T, 8 * D), normal(Dv, 8 * D)
    for n, m in ((2, 8), (1, 4), (3, 8 * D)):
        if m <= 64:
            yield f"nm_product, {n}:{m}", lambda b, n=n, m=m: [nm_product(x, weight, n, m, backend=b)]
    rate, state = torch.tensor([0.0, 1e-3, 1.0, 1e30]).repeat(2)[:Hq], normal(B, Hq, D, Dv)
    yield (
        "linear_attention",
        lambda b: results(
            lambda q, k, v, s: sf.linear_attention(
                q, k, v, decay_rate=rate, scale=D**-0.5, initial_state=s, return_state=True, backend=b
            ),
            *(q, k, v, state),
        ),
    )
    weights, topk = normal(B, Hq, T).abs(), min(T, 64)
    yield (
        "indexer_topk",
        lambda b: [sf.indexer_topk(q, k[:, 0], weights, topk, return_scores=True, backend=b)[1]],
    )
    lse = sf.attention(q, k, v, causal=True, return_lse=True, backend="reference")[1]
    index = torch.stack([torch.randperm(T, generator=g)[:topk] for _ in range(B * T)]).view(B, T, topk)
    for named, chosen in (("all", None), ("chosen", index)):
        yield (
            f"indexer_kl_loss, {named}",
            lambda b, i=chosen, x=lse: results(
                lambda qi, ki, w: sf.indexer_kl_loss(qi, ki, w, q, k, x, i, scale=D**-0.5, backend=b),
                *(q, k[:, 0], weights),
            ),
        )


def selections(q: Tensor, k: Tensor, normal: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    """What selects: chunks, padding, odd tiles, lists longer and shorter than what there is."""
    B, Hq, T, _ = q.shape
    keep, offset = torch.arange(T)[None] >= torch.tensor([[0], [T // 3]]), torch.tensor([0, -(T // 3)])
    for named, own in {
        "plain": {},
        "chunk": {"q_offset": 3, "causal": False},
        "padded": {"q_offset": offset, "k_keep": keep},
    }.items():

        def seen(b: str, own: dict[str, Any] = own) -> list[Tensor]:
            found = sf.selection.probe(q, k, 70, backend=b, **own)
            return [found.lse, found.keys(), found.distances()]

        yield f"probe, {named}", seen
        for how, (tile, unit) in itertools.product(
            sf.selection.mass.HOW, ((8, 64), (160, 16), (1 << 30, 16))
        ):
            if how == "antidiagonal" or (tile, unit) != (8, 64):
                grid = sf.selection.Grid(T, T, tile, unit, **own)
                yield (
                    f"tile_mass, {how}, {named}, {tile}",
                    lambda b, g=grid, h=how: [sf.selection.tile_mass(q, k, g, h, softcap=3.0, backend=b)],
                )
    level = normal(B, Hq, T)
    yield (
        "tile_mass, exact, given",
        lambda b: [
            sf.selection.tile_mass(
                q, k, sf.selection.Grid(T, T, 65, 1), "exact", reduce="max", lse=level, backend=b
            )
        ],
    )
    scores, among = normal(B, Hq, 2 * T), normal(B, Hq, 2 * T) > 0
    for share, parts in itertools.product(("", "sum", "max"), (1, 3)):
        last = torch.randint(-1, T, (B, T), generator=torch.Generator().manual_seed(T))
        yield (
            f"page_scores, {share}, {parts}",
            lambda b, s=share, p=parts: [
                sf.selection.page_scores(q, k, last, near=0, share=s, parts=p, backend=b)
            ],
        )
    share = torch.tensor([0.0, 0.5, 1.0]).repeat(Hq)[:Hq]
    yield (
        "top_p",
        lambda b: [
            sf.selection.top_p(scores.softmax(-1), share, x, backend=b).float() for x in (None, among)
        ],
    )
    for n in (1, 64, 3 * T):
        yield (
            f"top_indices, {n}",
            lambda b, n=n: [sf.selection.top_indices(scores, n, x, backend=b).float() for x in (None, among)],
        )
        yield (
            f"running_kth, {n}",
            lambda b, n=n: list(sf.selection.running_kth(scores, n, return_until=True, backend=b)),
        )


def hold() -> int:
    """Compare every call with the reference; how many there were."""
    n = 0
    dtypes = tuple(cpu.CODES)
    for (i, (D, Dv)), (j, (T, heads)), own in itertools.product(
        enumerate(DIMS + WIDE), enumerate(SIZES), range(3)
    ):
        dtype = dtypes[(i + j + own) % 3]  # each shape in one, and what has wide scratch in all
        for name, call in calls(D, Dv, T, heads, dtype):
            if own and name != "linear_attention":
                continue
            for got, want in zip(call("cpu"), call("reference"), strict=True):
                size = want.double().nan_to_num(neginf=0).abs().amax() if want.numel() else 0
                gap = (got.double() - want.double()).masked_fill(got == want, 0)  # both -inf: no gap
                off = gap.abs().amax() if want.numel() else 0
                right = off <= 60 * torch.finfo(dtype).eps * (1 + size)  # false of NaN
                assert right, f"{name} of {D}, {Dv}, {T} tokens, {heads}, {dtype}: off by {off} of {size}"
            n += 1
    return n


if __name__ == "__main__":
    print(f"{hold()} calls at the limits of the ops right, {cpu.status()[1]}")

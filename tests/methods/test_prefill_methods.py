"""Methods for long prompts, against what their papers say, written out pair by pair."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import sparseflash as sf
from cases import mask_of
from sparseflash.methods.flexprefill import distance
from tolerance import compare

Mask = Tensor


def causal_softmax(q: Tensor, k: Tensor) -> Tensor:
    """P in fp64, for queries that are the last ones of the keys: [B,H,Tq,Tk]."""
    Tq, Tk = q.shape[2], k.shape[2]
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    past = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
    return scores.masked_fill(~past, -math.inf).softmax(-1)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def recall(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """The share of the attention mass that is seen, by head."""
    return (causal_softmax(q, k) * mask).sum(-1).mean((0, 2))


def kept(method: sf.methods.Method, q: Tensor, k: Tensor, **ctx) -> Mask:
    mask = mask_of(method.select(q, k, ctx).plan)
    return mask.repeat_interleave(q.shape[1] // mask.shape[1], 1).expand(len(q), -1, -1, -1)


def blocky(generator: torch.Generator, T: int, block: int) -> tuple[Tensor, Tensor]:
    """One head that attends by content of whole blocks: neighbours are alike. [1,1,T,32] each."""
    topic = torch.nn.functional.normalize(normal(generator, -(-T // block), 32), dim=-1)
    alike = topic.repeat_interleave(block, 0)[:T]
    asked = topic[torch.randint(len(topic), (len(topic),), generator=generator)]
    asked = asked * (30 + 30 * torch.rand(len(topic), 1, generator=generator))
    return asked.repeat_interleave(block, 0)[:T][None, None], alike[None, None]


def slashed(generator: torch.Generator, T: int, far: int) -> tuple[Tensor, Tensor]:
    """One head whose queries look at the key so far before them. [1,1,T,32] each."""
    k = torch.nn.functional.normalize(normal(generator, 1, 1, T, 32), dim=-1)
    return k.roll(far, 2) * 80, k


# ---------------------------------------------------------------- FlexPrefill


def flexprefill(
    q: Tensor, k: Tensor, gamma: float, tau: float, B: int, least: int, halo: bool, shared: bool
) -> Mask:
    """Algorithms 1 to 4 of arXiv 2502.20766, a head at a time; T is a multiple of the block B."""
    (batch, H, T, D), n = q.shape, q.shape[2] // B
    P = causal_softmax(q, k)
    k = k.repeat_interleave(H // k.shape[1], 1)
    seen = torch.zeros(batch, H, n, n, dtype=torch.bool)
    i, j = torch.arange(T - B, T)[:, None], torch.arange(T)

    def needed(share: Tensor) -> int:
        ranked = share.sort(descending=True).values.cumsum(0)
        return int((ranked < gamma * ranked[-1]).sum()) + 1 if gamma < 1 else len(share)

    for b, h in ((b, h) for b in range(batch) for h in range(H)):
        last = P[b, h, -B:]
        vertical = last.mean(0)
        slash = torch.stack([last[(i - j) == d].sum() for d in range(T)]) / B
        budgets = [min(max(needed(x) // B + 1, -(-least // B)), n) for x in (vertical, slash)]
        of_columns, of_diagonals = (x.view(n, B).sum(1) for x in (vertical, slash))
        mean_q, mean_k = (x[b, h].double().view(n, B, D).mean(1) for x in (q, k))
        estimate = (mean_k @ mean_q[-1] * D**-0.5).softmax(0)
        middle = (estimate + of_columns) / 2
        parts = [torch.special.xlogy(x, x / middle).sum() / 2 for x in (estimate, of_columns)]
        aware = float(sum(parts)) ** 0.5 < tau
        if aware:
            budgets = [-(-least // B)] * 2
        of_columns[0] = of_diagonals[0] = math.inf
        columns, diagonals = (
            set(x.argsort(descending=True)[:m].tolist())
            for x, m in zip((of_columns, of_diagonals), budgets, strict=True)
        )
        if halo:
            diagonals |= {d + 1 for d in diagonals}
        for r in range(n):
            for c in range(r + 1):
                seen[b, h, r, c] = c in columns or r - c in diagonals
        if aware:
            pooled = (mean_q @ mean_k.mT * D**-0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            pooled = pooled.softmax(-1)
            for rows in [range(n)] if shared else [[r] for r in range(n)]:
                flat = pooled[list(rows)].flatten()
                order = flat.argsort(descending=True)
                m = int((flat[order].cumsum(0) < gamma * len(rows)).sum()) + 1
                for place in order[:m].tolist():
                    seen[b, h, rows[place // n], place % n] = True
            seen[b, h, torch.arange(n), pooled.argmax(-1)] = True  # where rows share, none is left empty
    whole = seen.repeat_interleave(B, 2).repeat_interleave(B, 3)
    return whole & torch.ones(T, T, dtype=torch.bool).tril()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tau", "halo"), [(0.0, False), (0.0, True), (0.35, False), (1.0, True)])
def test_flexprefill_selects_what_its_algorithms_select(tau, halo, shared, generator):
    q, k = normal(generator, 2, 4, 256, 32) * 3, normal(generator, 2, 2, 256, 32)
    q[:, 1:2], k[:, :1] = blocky(generator, 256, 32)
    q[:, 2:3], k[:, 1:] = slashed(generator, 256, 70)
    method = sf.methods.FlexPrefill(0.7, tau, 32, 32, halo=halo, shared=shared)
    want = flexprefill(q, k, 0.7, tau, 32, 32, halo, shared)
    assert torch.equal(kept(method, q, k), want)


def test_flexprefill_takes_the_pattern_of_each_head(generator):
    """A positional head and one of blocky content in one call; a query-aware head needs what it chose."""
    pairs = [slashed(generator, 512, 130), blocky(generator, 512, 32)]
    q, k = (torch.cat([pair[n] for pair in pairs], 1) for n in (0, 1))
    frugal = {"block": 32, "min_budget": 32, "gamma": 0.95}
    found, without = (kept(sf.methods.FlexPrefill(tau=tau, **frugal), q, k) for tau in (0.1, 0.0))
    assert torch.equal(found[:, 0], without[:, 0])  # vertical-slash, whatever tau
    assert recall(q, k, found)[1] > 0.9 > recall(q, k, without)[1]


def test_a_diagonal_of_tokens_meets_two_of_blocks(generator):
    q, k = slashed(generator, 512, 150)
    frugal = {"block": 32, "min_budget": 64, "gamma": 0.9, "tau": 0.0}
    short, halo = (kept(sf.methods.FlexPrefill(halo=x, **frugal), q, k) for x in (False, True))
    assert bool((short <= halo).all())
    late = slice(192, None)
    missed, found = (float((causal_softmax(q, k) * m)[:, :, late].sum(-1).mean()) for m in (short, halo))
    assert missed < 0.6 and found > 0.99


def test_flexprefill_says_how_far_each_head_is_from_its_switch(generator):
    q, k = torch.randn(2, 1, 4, 300, 16, generator=generator)
    far = sf.methods.FlexPrefill(0.9, 0.0, 64, 64).distances(q, k)
    assert far.shape == (1, 4) and bool((far >= 0).all()) and bool((far <= math.log(2) ** 0.5).all())
    for head in range(4):
        alone, at = (q[:, head : head + 1], k[:, head : head + 1]), float(far[0, head])
        below, above, never = (
            kept(sf.methods.FlexPrefill(0.9, max(tau, 0.0), 64, 64), *alone)
            for tau in (at - 1e-4, at + 1e-4, 0.0)
        )
        aware = kept(sf.methods.FlexPrefill(0.9, 1.0, 64, 64), *alone)
        assert torch.equal(below, never) and torch.equal(above, aware)


def test_flexprefill_by_numbers(generator):
    """Bounds: nothing but the first column and the diagonal, everything, and between them more for more."""
    q, k = normal(generator, 1, 2, 256, 16), normal(generator, 1, 2, 256, 16)
    least = kept(sf.methods.FlexPrefill(1e-6, 0.0, 32, 1), q, k)[..., ::32]
    row, column = torch.arange(256)[:, None] // 32, torch.arange(8)
    assert torch.equal(
        least[0, 0], ((column == 0) | (column == row)) & (column * 32 <= torch.arange(256)[:, None])
    )
    assert kept(sf.methods.FlexPrefill(1.0, 1.0, 32, 1), q, k).sum() == 2 * 256 * 257 // 2
    masks = [kept(sf.methods.FlexPrefill(g, 0.0, 32, 1), q, k) for g in (0.1, 0.5, 0.9)]
    assert all(bool((a <= b).all()) for a, b in zip(masks, masks[1:], strict=False))
    capped = kept(sf.methods.FlexPrefill(0.9, 0.0, 32, 32, 64), q, k)
    assert capped.sum() < masks[-1].sum()


def test_the_distance_of_shares_is_finite_where_shares_are_zero():
    a, b = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]), torch.tensor([[0, 1.0, 0], [0.5, 0.5, 0]])
    torch.testing.assert_close(distance(a, b), torch.tensor([math.log(2) ** 0.5, 0.0]))


# ---------------------------------------------------------------- PBS-Attn


def pbs(q: Tensor, k: Tensor, theta: float, B: int, S: int, *, is_sorted: bool = True) -> Mask:
    """Arxiv 2510.21270, a tile at a time; keys are sorted for a KV head, or left in their order."""
    (batch, Hq, T, D), group = q.shape, q.shape[1] // k.shape[1]
    q, k, G, scale = q.double(), k.double(), T // S, D**-0.5
    mask = torch.zeros(batch, Hq, T, T, dtype=torch.bool)
    for b, h in ((b, h) for b in range(batch) for h in range(Hq)):
        g = h // group
        last = q[b, g * group : (g + 1) * group, -B:]
        given = (last @ k[b, g, : G * S].T * scale).softmax(-1).sum((0, 1))
        order = list(range(T))
        if is_sorted:
            for s in range(G):
                order[s * S : (s + 1) * S] = sorted(range(s * S, (s + 1) * S), key=lambda j: -float(given[j]))
        units = [order[c : c + B] for c in range(0, T, B)]
        for r in range(0, T, B):
            rows = range(r, min(r + B, T))
            earlier = [u for u, tokens in enumerate(units) if tokens[0] // S < r // S]
            keep = [u for u, tokens in enumerate(units) if tokens[0] // S == r // S or 0 in tokens]
            if earlier:
                mean = q[b, h, list(rows)].mean(0)
                share = torch.stack([k[b, g, units[u]].mean(0) @ mean * scale for u in earlier]).softmax(0)
                ranked = share.argsort(descending=True).tolist()
                n = int((share[ranked].cumsum(0) < theta).sum()) + 1
                keep += [earlier[place] for place in ranked[:n]]
            for i in rows:
                mask[b, h, i, [j for u in keep for j in units[u] if j <= i]] = True
    return mask


def scattered(generator: torch.Generator, T: int, block: int) -> tuple[Tensor, Tensor]:
    """One key of each block, anywhere in it, has all attention. [1,1,T,32] each."""
    asked = torch.nn.functional.normalize(normal(generator, 32), dim=-1)
    k = normal(generator, T, 32)
    k -= (k @ asked)[:, None] * asked
    hot = torch.arange(0, T, block) + torch.randint(block, (T // block,), generator=generator)
    k[hot] = asked * 15
    return (asked * 15).expand(1, 1, T, 32), k[None, None]


@pytest.mark.parametrize("T", [256, 300, 330, 50])
def test_pbs_attn_selects_what_its_paper_selects(T, generator):
    q, k = normal(generator, 2, 4, T, 16) * 2, normal(generator, 2, 2, T, 16)
    method = sf.methods.PBSAttn(0.5, 16, 64)
    assert torch.equal(kept(method, q, k), pbs(q, k, 0.5, 16, 64))


def test_sorted_keys_are_found_with_fewer_blocks(generator):
    q, k = scattered(generator, 1024, 32)
    found, plain = kept(sf.methods.PBSAttn(0.9, 32, 128), q, k), pbs(q, k, 0.9, 32, 128, is_sorted=False)
    earlier = torch.arange(1024)[:, None] // 128 > torch.arange(1024) // 128
    shares = [float((m & earlier).sum() / earlier.sum()) for m in (found, plain)]
    assert shares[0] < 0.3 and shares[1] > 0.85  # all hot keys of a segment lie in one block of four
    assert recall(q, k, found)[0] > 0.999 > recall(q, k, plain)[0]
    assert bool(found[..., 0].all())


def test_pbs_attn_needs_whole_blocks_of_whole_segments(generator):
    """Chunks that begin anywhere see their own segments whole and nothing of the future."""
    q, k = normal(generator, 1, 2, 300, 16), normal(generator, 1, 2, 300, 16)
    mask = kept(sf.methods.PBSAttn(1e-6, 16, 32), q[:, :, 101:], k, q_offset=101)
    own = torch.arange(101, 300)[:, None] // 32 == torch.arange(300) // 32
    past = torch.arange(101, 300)[:, None] >= torch.arange(300)
    assert bool((mask >= (own & past)).all() and (mask <= past).all())


# ---------------------------------------------------------------- AnchorAttention


def anchored(
    q: Tensor, k: Tensor, theta: float, b: int, step: int, sinks: int, how: str, at: int = 0
) -> Mask:
    """Arxiv 2505.23520 with its two bounds put right: the scan runs from the first keys to the group."""
    (batch, H, Tq, D), Tk = q.shape, k.shape[2]
    scores = q.double() @ k.double().repeat_interleave(H // k.shape[1], 1).mT * D**-0.5
    mask = torch.zeros(batch, H, Tq, Tk, dtype=torch.bool)
    key = torch.arange(Tk)
    for begin in range(0, Tq, b * step):
        rows, own = range(begin, min(begin + b * step, Tq)), begin + at
        stripes = torch.zeros(batch, H, Tk, dtype=torch.bool)
        regions = {i: ((key < sinks * b) | (key >= own)) & (key <= i + at) for i in rows}
        for t in range(begin, rows[-1] + 1, b):
            block = range(t, min(t + b, Tq))
            mean = scores[:, :, list(block)].mean(2)
            if how == "max":
                best = torch.stack([scores[:, :, i, regions[i]].amax(-1) for i in block], -1).mean(-1)
            else:
                best = mean[:, :, regions[block[-1]]].amax(-1)
            stripes |= (mean + theta >= best[..., None]) & (key >= sinks * b) & (key < own)
        for i in rows:
            mask[:, :, i] = regions[i] | stripes
    return mask


@pytest.mark.parametrize("how", ["max", "pooled"])
@pytest.mark.parametrize(("theta", "sinks"), [(1.5, 1), (-1.0, 2), (0.5, 0)])
def test_anchor_attention_selects_what_its_paper_selects(theta, sinks, how, generator):
    q, k = normal(generator, 2, 4, 300, 16) * 2, normal(generator, 2, 2, 300, 16)
    method = sf.methods.AnchorAttention(theta, 16, 4, sinks, how)
    assert torch.equal(kept(method, q, k), anchored(q, k, theta, 16, 4, sinks, how))
    chunk = kept(method, q[:, :, 101:], k, q_offset=101)
    assert torch.equal(chunk, anchored(q[:, :, 101:], k, theta, 16, 4, sinks, how, 101))


@pytest.mark.parametrize("how", ["max", "pooled"])
def test_stripes_are_found_by_how_far_below_the_anchor_they_lie(how, generator):
    """Columns whose logit lies 8 below the best one: all of them at 12, none at 4."""
    T, columns = 512, torch.tensor([37, 70, 101, 200])
    q, k = torch.zeros(1, 1, T, 16), normal(generator, 1, 1, T, 16) * 0.01
    q[..., 0], k[:, :, 0, 0], k[:, :, 1:, 0] = 4.0, 20.0, -20.0
    k[:, :, columns, 0] = 12.0
    near, far = (kept(sf.methods.AnchorAttention(t, 32, 4, 1, how), q, k)[0, 0, 256:] for t in (4.0, 12.0))
    assert bool(far[:, columns].all()) and not bool(near[:, columns].any())
    assert int(far.sum() - near.sum()) == 256 * 4


def test_a_softcap_bends_the_anchor_as_it_bends_the_logits(generator):
    q, k = normal(generator, 1, 2, 256, 16) * 6, normal(generator, 1, 2, 256, 16)
    method = sf.methods.AnchorAttention(1.0, 16, 4)
    bent = kept(method, q, k, scale=0.25, softcap=1e4)
    assert torch.equal(bent, kept(method, q, k)) and kept(method, q, k, softcap=0.1).sum() > bent.sum()


# ---------------------------------------------------------------- MMInference


def cells(generator: torch.Generator, T: int, stride: int, phase: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of a video that look at their own place in every earlier frame of so many. [1,1,T,64] each."""
    place = torch.nn.functional.normalize(normal(generator, stride, 64), dim=-1)
    own = torch.arange(T) % stride
    q = place[own] * 100 + normal(generator, T, 64)
    k = place.roll(-phase, 0)[own] + normal(generator, T, 64) / 80
    return q[None, None], k[None, None]


def of_grid(T: int, stride: int, phase: int, sinks: int, near: int) -> Mask:
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return ((j < sinks) | (i - j < near) | ((i - j) % stride == phase)) & (j <= i)


@pytest.mark.parametrize(
    ("T", "stride", "density"), [(2048, 32, 0.06), pytest.param(8192, 32, 0.04, marks=pytest.mark.slow)]
)
def test_a_grid_is_found_at_the_density_of_its_stride(T, stride, density, generator):
    q, k = cells(generator, T, stride)
    method = sf.methods.MMInference(near=8, sinks=4)
    plans = method.select(q, k, {"grid": (T // 32, 4, 8)}).plan
    mask = kept(method, q, k)
    assert float(mask.sum()) / (T * (T + 1) / 2) <= density and recall(q, k, mask)[0] >= 0.999
    assert torch.equal(mask_of(plans), mask) and torch.equal(mask[0, 0], of_grid(T, stride, 0, 4, 8))
    lines = kept(sf.methods.MInference(vertical=40, slash=4, near=1, sinks=4), q, k)
    assert lines.sum() > mask.sum() and recall(q, k, lines)[0] < 0.5


@pytest.mark.parametrize(("stride", "phase"), [(24, 0), (24, 7), (31, 30), (6, 1)])
def test_each_head_has_its_own_stride_and_remainder(stride, phase, generator):
    """A multiple of the stride has half of its mass, and half of the stride no more."""
    pairs = [cells(generator, 700, stride, phase), cells(generator, 700, 10, 3)]
    q, k = (torch.cat([pair[n] for pair in pairs], 1) for n in (0, 1))
    mask = kept(sf.methods.MMInference(near=9, sinks=5, max_stride=64), q, k)
    assert torch.equal(mask[0, 0], of_grid(700, stride, phase, 5, 9))
    assert torch.equal(mask[0, 1], of_grid(700, 10, 3, 5, 9))
    chunk = kept(sf.methods.MMInference(near=9, sinks=5, max_stride=64), q[:, :, 301:], k, q_offset=301)
    assert torch.equal(chunk, mask[:, :, 301:])


def bounded(
    q: Tensor, k: Tensor, modality: Tensor, two: bool, n: int, last: int, sinks: int, near: int
) -> Mask:
    """Columns and slashes for queries of each modality, in tiles of 64 of their own; batch and head alone."""
    T, P, key = q.shape[2], causal_softmax(q, k)[0, 0], torch.arange(q.shape[2])
    mask = torch.zeros(T, T, dtype=torch.bool)
    scores = (q[0, 0].double() @ k[0, 0].double().T * q.shape[-1] ** -0.5).masked_fill(P == 0, -math.inf)
    for a in range(2):
        rows = (modality == a).nonzero()[:, 0]
        for b in (0, 1) if two else (None,):
            there = torch.ones(T, dtype=torch.bool) if b is None else modality == b
            weights = scores[rows[-last:]].masked_fill(~there, -math.inf).softmax(-1).nan_to_num(nan=0)
            column, slash = weights.sum(0), torch.zeros(T, dtype=torch.float64)
            for i, row in zip(rows[-last:].tolist(), weights, strict=True):
                slash[: i + 1] += row[: i + 1].flip(0)
            column[:sinks] = slash[:near] = math.inf
            column[~there] = -1
            columns = column.argsort(descending=True, stable=True)[: max(n, sinks)]
            distances = slash.argsort(descending=True, stable=True)[: max(n, near)]
            for tile in rows.split(64):
                seen = torch.zeros(T, dtype=torch.bool)
                seen[columns] = True
                for d in distances.tolist():
                    seen |= (key >= tile[0] - d) & (key <= tile[-1] - d)
                mask[tile] |= seen & there & (key <= tile[:, None])
    return mask


@pytest.mark.parametrize("two", [False, True])
def test_boundary_heads_have_a_pattern_for_each_modality(two, generator):
    q, k = normal(generator, 1, 1, 300, 16) * 3, normal(generator, 1, 1, 300, 16)
    modality = (torch.arange(300) // 40 % 2 == 0) | (torch.arange(300) > 290)
    method = sf.methods.MMInference("2d-boundary" if two else "q-boundary", 9, 9, 16, sinks=3, near=2)
    want = bounded(q, k, modality.long(), two, 9, 16, 3, 2)
    assert torch.equal(kept(method, q, k, modality=modality[None].int())[0, 0], want)
    at = torch.tensor([130, 0])
    rows = torch.cat([q[:, :, 130:], q[:, :, :170]])
    twice = kept(method, rows, k.expand(2, -1, -1, -1), modality=modality[None].int(), q_offset=at)
    one = kept(method, q[:, :, :170], k, modality=modality[None].int())
    assert torch.equal(twice[1:], one)


def test_tiles_of_a_modality_are_hardly_more_than_its_tokens_need(generator):
    q, k = normal(generator, 1, 1, 700, 16), normal(generator, 1, 1, 700, 16)
    method = sf.methods.MMInference("q-boundary", 9, 9, 16)
    plan = method.select(q, k, {"modality": (torch.arange(700) % 40 < 20)[None].int()}).plan
    rows = max(one.q_rows for one in (plan if isinstance(plan, tuple) else (plan,)))
    assert rows <= 700 + 3 * 128  # a tile that is not full for each modality, and the last one


@pytest.mark.parametrize("pattern", ["q-boundary", "2d-boundary"])
def test_any_labels_are_dense_at_full_budget_and_a_question_finds_its_frame(pattern, generator):
    q, k = normal(generator, 2, 4, 200, 16), normal(generator, 2, 2, 200, 16)
    labels = torch.randint(3, (2, 200), generator=generator)
    method = sf.methods.MMInference(pattern, 256, 256, modalities=3)
    assert torch.equal(
        kept(method, q, k, modality=labels), torch.ones(200, 200).tril().bool().expand(2, 4, -1, -1)
    )

    # text (1) looks at text keys, images (0), which come last, at others: their rows decide for themselves
    q, k = torch.zeros(1, 1, 512, 16), normal(generator, 1, 1, 512, 16) * 0.1
    modality = torch.zeros(512, dtype=torch.long)
    modality[200:280] = 1
    k[..., 17, 0], k[..., 90, 1] = 9.0, 9.0
    q[:, :, modality == 1, 0], q[:, :, modality == 0, 1] = 9.0, 9.0
    few = sf.methods.MMInference(pattern, 2, 1, 32, sinks=0, near=1)
    apart, alike = (kept(few, q, k, **ctx)[0, 0, 200:280] for ctx in ({"modality": modality[None]}, {}))
    assert bool(apart[:, 17].all()) and not bool(alike[:, 17].all())


# ---------------------------------------------------------------- dual chunk attention


def turned(x: Tensor, position: Tensor, frequency: Tensor, interleaved: bool = False) -> Tensor:
    """Rotated to positions, in fp64, lane by lane: [B,H,T,D] by [T]; lanes beyond the frequencies stay."""
    x, n = x.double(), len(frequency)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))
    angle = position[:, None].double() * frequency.double()
    done = x.clone()
    done[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
    done[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
    return done


def places(T: int, furthest: int, local: int) -> Tensor:
    """The distance that each pair is said to have: [T,T]."""
    s = furthest - local
    i, j = torch.arange(T)[:, None], torch.arange(T)
    own, before = i // s == j // s, i // s == j // s + 1
    far = torch.full_like(i, min(2 * s - 1, furthest))
    place = torch.where(own, i % s, torch.where(before, (i % s + s).clamp(max=furthest), far))
    return place - j % s


def dual_chunk(
    q: Tensor, k: Tensor, v: Tensor, frequency: Tensor, furthest: int, local: int, **options
) -> Tensor:
    """Pair by pair: the logit of bare q and k at the distance of the table."""
    T, distance, k = (
        q.shape[2],
        places(q.shape[2], furthest, local),
        k.repeat_interleave(q.shape[1] // k.shape[1], 1),
    )
    scores = torch.zeros(*q.shape[:2], T, T, dtype=torch.float64)
    for d in range(int(distance.min()), int(distance.max()) + 1):
        there = distance == d
        every = turned(q, torch.full((T,), d), frequency, **options) @ k.double().mT * q.shape[-1] ** -0.5
        scores = torch.where(there, every, scores)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)


FREQUENCY = 100 ** -(torch.arange(8) / 8)


def rotated(q: Tensor, k: Tensor, **options) -> tuple[Tensor, Tensor]:
    return tuple(turned(x, torch.arange(x.shape[2]), FREQUENCY, **options).to(x.dtype) for x in (q, k))


def test_distances_are_exact_nearby_and_never_exceed_the_chunk():
    for furthest, local in ((24, 4), (96, 16), (48, 1)):
        distance, i, j = places(200, furthest, local), torch.arange(200)[:, None], torch.arange(200)
        past = i >= j
        assert bool((distance[past] >= 0).all()) and int(distance[past].max()) <= furthest
        assert torch.equal(distance[past & (i - j <= local)], (i - j)[past & (i - j <= local)])


@pytest.mark.parametrize("backend", [n for n, s in sf.backend_status().items() if s.usable])
@pytest.mark.parametrize(("interleaved", "D"), [(False, 16), (True, 20)])
def test_dual_chunk_attention_is_attention_at_the_distances_of_its_table(backend, interleaved, D, generator):
    q, k, v = (normal(generator, 2, H, 300, D) for H in (4, 2, 2))
    q[..., 0] *= 3
    given = rotated(q, k, interleaved=interleaved)
    method = sf.methods.DualChunkAttention(128, 96, 16, interleaved)
    want = dual_chunk(q, k, v, FREQUENCY, 96, 16, interleaved=interleaved)
    got = method(*given, v, ctx={"rope": FREQUENCY}, backend=backend)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
    for at in (130, torch.tensor([130])):  # a chunk of the prompt, and one token, over the cache
        tail = method(
            given[0][:, :, 130:], given[1], v, ctx={"rope": FREQUENCY, "q_offset": at}, backend=backend
        )
        torch.testing.assert_close(tail, got[:, :, 130:], atol=2e-5, rtol=1e-4)
    for t in (0, 79, 80, 160, 299):
        now = given[1][:, :, : t + 1], v[:, :, : t + 1]
        one = method(given[0][:, :, t : t + 1], *now, ctx={"rope": FREQUENCY, "q_offset": t}, backend=backend)
        torch.testing.assert_close(one, got[:, :, t : t + 1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scaled", [1.0, 1.3])
def test_tables_of_cos_and_sin_say_the_same_as_frequencies(scaled, generator):
    q, k, v = (normal(generator, 1, 2, 150, 16) for _ in range(3))
    angle = torch.arange(150)[:, None].double() * FREQUENCY.double().repeat(2)
    tables = tuple((scaled * x)[None].float() for x in (angle.cos(), angle.sin()))
    method, given = sf.methods.DualChunkAttention(64), rotated(q, k)
    got = method(*given, v, ctx={"rope": tables})
    torch.testing.assert_close(got, method(*given, v, ctx={"rope": FREQUENCY}))


def test_within_one_chunk_it_is_attention_and_beyond_it_needs_the_rotation(generator):
    q, k, v = (normal(generator, 1, 2, 80, 16) for _ in range(3))
    method = sf.methods.DualChunkAttention(128)
    assert torch.equal(method(q, k, v), sf.attention(q, k, v, causal=True))
    q, k, v = (normal(generator, 1, 2, 81, 16) for _ in range(3))
    for rope in (None, FREQUENCY[None], (torch.ones(1, 80, 16),) * 2):
        with pytest.raises(
            sf.SparseFlashError, match=r"ctx\['rope'\]: .*up to the last of 81 keys, or the inv"
        ):
            method(q, k, v, ctx={"rope": rope})
    with pytest.raises(sf.SparseFlashError, match="ctx\\['v'\\]: a query has three rows"):
        method.select(q, k, {"rope": FREQUENCY})


def test_gradients_of_three_parts_are_those_of_one_softmax(generator):
    q, k, v = (normal(generator, 1, H, 60, 16).double().requires_grad_() for H in (2, 1, 1))
    method, dout = sf.methods.DualChunkAttention(32), normal(generator, 1, 2, 60, 16).double()
    got = method(*rotated(q, k), v, ctx={"rope": FREQUENCY})
    want = dual_chunk(q, k, v, FREQUENCY, 24, 4)
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(x, (q, k, v), dout) for x in (got, want))
    torch.testing.assert_close(got, want)


def test_a_sink_takes_part_once(generator):
    q, k, v = (normal(generator, 1, 2, 100, 16) for _ in range(3))
    sink, method = torch.tensor([0.5, 2.0]), sf.methods.DualChunkAttention(32)
    options = {"ctx": {"rope": FREQUENCY}, "return_lse": True}
    (out, lse), (plain, without) = (method(q, k, v, sink_logits=x, **options) for x in (sink, None))
    both = torch.logaddexp(without, sink[:, None])
    torch.testing.assert_close(lse, both)
    torch.testing.assert_close(out, plain * (without - both).exp()[..., None])


# ---------------------------------------------------------------- dynamic mask


def largest(delta: Tensor, window: int) -> Mask:
    """Row by row: the keys up to the query's own with the largest numbers, of equal ones the later."""
    B, H, T = delta.shape
    mask = torch.zeros(B, H, T, T, dtype=torch.bool)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(T)):
        past = sorted(range(i + 1), key=lambda j: (float(delta[b, h, j]), j))
        mask[b, h, i, past[-window:]] = True
    return mask


@pytest.mark.parametrize("window", [1, 7, 64, 500])
@pytest.mark.parametrize("ties", [False, True])
def test_dynamic_mask_shows_the_largest_numbers_of_the_past(window, ties, generator):
    q, k, delta = (
        normal(generator, 2, 4, 150, 16),
        normal(generator, 2, 2, 150, 16),
        normal(generator, 2, 2, 150),
    )
    delta = (delta * 2).round() if ties else delta
    method, want = sf.methods.DynamicMask(window), largest(delta, window).repeat_interleave(2, 1)
    assert torch.equal(kept(method, q, k, delta=delta), want)
    assert torch.equal(kept(method, q[:, :, 90:], k, delta=delta, q_offset=90), want[:, :, 90:])
    assert bool(want.any(-1).all()) and int(want.sum(-1).max()) == min(window, 150)


def test_dynamic_mask_of_nothing_learned_is_a_window(generator):
    q, k = normal(generator, 1, 2, 100, 16), normal(generator, 1, 2, 100, 16)
    want = kept(sf.methods.Window(window=9), q, k)
    for ctx in ({}, {"delta": torch.ones(1, 2, 100)}):
        assert torch.equal(kept(sf.methods.DynamicMask(9), q, k, **ctx), want)


def test_dynamic_mask_learns_through_its_bias_and_through_the_values(generator):
    """Gradients of q, k, v and what is learned, against autograd over the mask in fp64."""
    q, k, v = (normal(generator, 2, H, 90, 16).double().requires_grad_() for H in (4, 2, 2))
    weight = (normal(generator, 2, 32) / 5).double().requires_grad_()
    slope = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    leaves, dout = (q, k, v, weight, slope), normal(generator, 2, 4, 90, 16).double()
    delta = sf.methods.DynamicMask.scores(v, weight, slope)
    got = sf.methods.DynamicMask(20)(q, k, v, ctx={"delta": delta})

    z = torch.einsum("bhtd,ghd->bgt", v, weight.view(2, 2, 16))
    bias = (slope[:, None] * torch.nn.functional.softplus(z)).exp()
    wide = [x.repeat_interleave(2, 1) for x in (k, v, bias)]
    scores = q @ wide[0].mT / 4 + wide[2][:, :, None]
    scores = scores.masked_fill(~largest(bias.detach(), 20).repeat_interleave(2, 1), -math.inf)
    want = scores.softmax(-1) @ wide[1]
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(x, leaves, dout) for x in (got, want))
    torch.testing.assert_close(got, want)


def test_no_later_number_decides_what_dynamic_mask_shows(generator):
    q, k, delta = (
        normal(generator, 1, 1, 80, 16),
        normal(generator, 1, 1, 80, 16),
        normal(generator, 1, 1, 80),
    )
    method = sf.methods.DynamicMask(8)
    before = kept(method, q, k, delta=delta)
    delta[..., 50:] += 9
    assert torch.equal(before[:, :, :50], kept(method, q, k, delta=delta)[:, :, :50])
    with pytest.raises(sf.SparseFlashError, match=r"ctx\['delta'\]: \[1, 1, 79\]; expected \[1.1, H.1, 80\]"):
        method.select(q, k, {"delta": delta[..., 1:]})


@pytest.mark.parametrize(
    ("slug", "wrong", "said"),
    [
        ("flexprefill", {"tau": 2.0}, "tau=2.0: expected a number in .0, 1."),
        ("flexprefill", {"gamma": 0.0}, "gamma=0.0: expected a share"),
        ("flexprefill", {"max_budget": 8}, "max_budget=8: expected an int >= 512"),
        ("anchor-attention", {"theta": math.inf}, "theta=inf: expected a finite number"),
        ("anchor-attention", {"anchor": "lse"}, "anchor='lse': expected max or pooled"),
        ("dual-chunk-attention", {"local": 3072}, "local=3072: expected less than chunk=3072"),
        ("mminference", {"pattern": "a-shape"}, "expected one of grid, q-boundary, 2d-boundary"),
        ("mminference", {"strides": (1,)}, "strides=.1,.: expected a tuple of ints >= 2"),
        ("mminference", {"strides": 8}, "strides=8: expected a tuple"),
        ("pbs-attn", {"segment": 200}, "segment=200: expected a multiple of block=128"),
        ("pbs-attn", {"pooling": "min"}, "pooling='min': expected mean or max"),
    ],
)
def test_what_is_out_of_range_is_refused(slug, wrong, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.methods.get(slug, **wrong)


def test_what_ctx_says_of_a_video_is_checked():
    x, method = torch.zeros(1, 2, 8, 16), sf.methods.MMInference()
    for grid in (8, (8,), (2, -4)):
        with pytest.raises(sf.SparseFlashError, match=r"ctx\['grid'\]: .*expected sizes, such as"):
            method.select(x, x, {"grid": grid})
    with pytest.raises(
        sf.SparseFlashError, match=r"ctx\['modality'\]: \[1, 7\]; expected integers \[1.1, 8\]"
    ):
        method.select(x, x, {"modality": torch.zeros(1, 7, dtype=torch.int32)})
    with pytest.raises(sf.SparseFlashError, match=r"ctx\['modality'\] holds .*0..2.*0..1"):
        method.select(x, x, {"modality": torch.tensor([[0, 1, 2, 0, 0, 0, 0, 0]])})


@pytest.mark.parametrize(
    ("method", "ctx"),
    [
        (sf.methods.DynamicMask(30), {"delta": torch.linspace(1, 9, 200).sin().expand(1, 2, -1)}),
        (sf.methods.MMInference("2d-boundary", 5, 5), {"modality": torch.arange(200)[None] // 100}),
        (sf.methods.MMInference(near=9), {"grid": (5, 5)}),
        (sf.methods.DualChunkAttention(64), {"rope": FREQUENCY}),
        (sf.methods.FlexPrefill(0.5, 0.1, 32, 32), {"q_offset": torch.tensor([0])}),
        (sf.methods.PBSAttn(0.5, 32, 64), {"q_offset": torch.tensor([0])}),
        (sf.methods.AnchorAttention(0.5, 32, 2), {"q_offset": torch.tensor([0])}),
    ],
    ids=lambda x: repr(x)[:22] if isinstance(x, sf.methods.Method) else "",
)
def test_what_ctx_says_compiles_without_a_break(method, ctx, generator):
    q, k, v = (normal(generator, 1, H, 200, 16) for H in (4, 2, 2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: method(*x, ctx=ctx), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), method(q, k, v, ctx=ctx))


@pytest.mark.parametrize("slug", ["flexprefill", "pbs-attn", "anchor-attention", "mminference"])
def test_a_batch_whose_chunks_begin_apart_is_each_of_its_own(slug, generator):
    """Positions in a tensor, one a sequence; the second begins with padding that sees nothing."""
    small = {"block": 16} if slug != "mminference" else {"near": 5, "max_stride": 9}
    small |= {"segment": 32} if slug == "pbs-attn" else {"step": 2} if slug == "anchor-attention" else {}
    q, k = normal(generator, 2, 4, 96, 16), normal(generator, 2, 2, 160, 16)
    method, at = sf.methods.get(slug, **small), torch.tensor([64, -32])
    both = kept(method, q, k, q_offset=at)
    assert torch.equal(both[:1], kept(method, q[:1], k[:1], q_offset=64))
    assert not both[1, :, :32].any()
    if slug != "pbs-attn":  # whose segments are judged by all rows
        assert torch.equal(both[1:, :, 32:, :64], kept(method, q[1:, :, 32:], k[1:, :, :64]))


@pytest.mark.parametrize(
    "method",
    [
        sf.methods.FlexPrefill((0.3, 0.9, 0.5, 0.3), 0.0, 16, 16),
        sf.methods.PBSAttn((0.3, 0.9, 0.5, 0.3), 16, 32),
        sf.methods.AnchorAttention((0.3, 0.9, 0.5, 0.3), 16, (2, 2, 2, 4)),
        sf.methods.DynamicMask((9, 30, 9, 50)),
        sf.methods.MMInference(("grid", "q-boundary", "2d-boundary", "grid"), 9, 9, near=(9, 9, 9, 20)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_settings_by_head_are_each_heads_own(method, generator):
    q, k = normal(generator, 1, 4, 200, 16), normal(generator, 1, 2, 200, 16)
    told = {"MMInference": {"modality": torch.arange(200)[None] // 50 % 2}}
    ctx = told.get(type(method).__name__, {})
    whole = kept(method, q, k, **ctx)
    for h in range(4):
        values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
        own = type(method)(**{n: x[h] if isinstance(x, tuple) and x else x for n, x in values.items()})
        assert torch.equal(kept(own, q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], **ctx), whole[:, h : h + 1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "full"),
    [
        (sf.methods.FlexPrefill(0.3, 0.0, 16, 16), {"gamma": 1.0}),
        (sf.methods.PBSAttn(0.3, 16, 32), {"threshold": 1.0}),
        (sf.methods.AnchorAttention(-1.0, 16, 2), {"theta": 1e9}),
        (sf.methods.MMInference(near=9, sinks=2), {"near": 200}),
        (sf.methods.MMInference("q-boundary", 9, 9, near=9, sinks=2), {"vertical": 200}),
        (sf.methods.DynamicMask(32), {"window": 200}),
        (sf.methods.DualChunkAttention(64), {"context": 512}),
    ],
    ids=lambda x: repr(x)[:22] if isinstance(x, sf.methods.Method) else "",
)
def test_in_a_model_of_transformers(method, full):
    """Told where a layer's queries stand and how they were rotated: dense at full budget, else not."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(160)[None] * 31 % 97
    dense, changes = model(ids).logits, []
    for now in (method, dataclasses.replace(method, **full)):
        with sf.transformers.sparse(model, prefill=now):
            changes.append((model(ids).logits - dense).abs())
    assert changes[0][:, :9].max() < 1e-5 < 1e-4 < changes[0].max() and changes[1].max() < 1e-5


# ---------------------------------------------------------------- last queries


@pytest.mark.parametrize(
    ("inner", "tile"),
    [
        (sf.methods.PBSAttn(threshold=0.3, block=16, segment=32), 16),  # its rows are permuted
        (sf.methods.MInference(vertical=9, slash=4, near=2, sinks=1, last=9), 64),
        (sf.methods.MMInference(strides=(4, 9), sinks=2, near=5, last=16), 64),  # several plans
        (sf.methods.AnchorAttention(theta=0.5, block=16, step=2), 16),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize(("rows", "at"), [(0, 0), (40, 0), (1, 129), (999, 0)])
def test_the_last_rows_see_everything_and_the_others_what_they_would(inner, tile, rows, at, generator):
    q, k = (torch.randn(2, H, T, 16, generator=generator) for H, T in ((4, 300), (2, 300 + at)))
    ctx = {"q_offset": at}
    outer = sf.methods.LastDense(inner, rows=rows)
    mask, want = (mask_of(x.select(q, k, ctx).plan).expand(2, 4, -1, -1) for x in (outer, inner))
    first = max(0, 300 - rows)
    past = torch.arange(300 + at) <= torch.arange(300)[:, None] + at
    assert torch.equal(mask[:, :, first:], past[first:].expand(2, 4, -1, -1))
    kept = [torch.equal(mask[:, :, r], want[:, :, r]) for r in range(first)]
    assert all(kept[: first // tile * tile])
    out = outer(q, k, k, ctx=ctx)
    torch.testing.assert_close(out, sf.attention(q, k, k, sf.Plan.from_mask(mask)), atol=2e-6, rtol=0)


def test_dense_rows_want_a_method_of_the_rows_themselves(generator):
    q = torch.randn(1, 2, 60, 16, generator=generator)
    with pytest.raises(sf.SparseFlashError, match="no method: expected LastDense"):
        sf.methods.LastDense()(q, q, q)
    with pytest.raises(sf.SparseFlashError, match="method='window': expected a method"):
        sf.methods.LastDense("window")


# ---------------------------------------------------------------- BLASST


def sunk(generator: torch.Generator, T: int, Hkv: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that look at the first keys and at their neighbours: much between them is small."""
    q, k, v = (normal(generator, 2, H, T, 32) for H in (2, Hkv, Hkv))
    q[..., 0], k[..., 0], k[:, :, :4, 0] = 8, -2, 8
    k[..., 1], q[..., 1] = torch.arange(T) / 16, torch.arange(T) / 64
    return q, k, v


@pytest.mark.parametrize(
    ("T", "causal", "backend"),
    [
        (5, True, "cpu"),
        (64, False, "cpu"),
        (129, False, "reference"),
        (500, True, "cpu"),
    ],
)
def test_blasst_attends_to_what_it_shows_and_factor_sets_how_little(T, causal, backend, generator):
    q, k, v = sunk(generator, T)
    densities = []
    for factor in (1e-9, 10.0, 1e9):
        method = sf.methods.BLASST(factor, causal)
        selection = method.select(q, k, {"scale": 0.3, "softcap": 60.0})
        assert selection.skip_below == pytest.approx(max(0, math.log(T / factor)) if T > 64 else 1e30)
        plan = method.shown(q, k, selection, {"scale": 0.3, "softcap": 60.0})
        out, lse = method(q, k, v, scale=0.3, softcap=60.0, return_lse=True, backend=backend)
        compare({"out": out, "lse": lse}, q, k, v, mask_of(plan), scale=0.3, softcap=60.0)
        densities.append(mask_of(plan).float().mean())
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == (mask_of(selection.plan).float().mean())
    assert T < 65 or densities[-1] < 0.9 * densities[0]


def test_blasst_in_chunks_counts_all_keys_and_what_cannot_skip_refuses_it(generator):
    q, k, v = sunk(generator, 400)
    method = sf.methods.BLASST(40.0)
    late = {"q_offset": torch.tensor([256, 256])}
    selection = method.select(q[:, :, 256:], k, late)
    assert selection.skip_below == pytest.approx(math.log(400 / 40))
    plan = method.shown(q[:, :, 256:], k, selection, late)
    assert torch.equal(mask_of(plan), mask_of(method.shown(q, k, method.select(q, k)))[:, :, 256:])
    with pytest.raises(sf.SparseFlashError, match="is for inference"):
        method(q.requires_grad_(), k, v)
    with pytest.raises(sf.SparseFlashError, match="skip blocks of any row: none are dense"):
        sf.methods.LastDense(method).select(q, k)
    with pytest.raises(sf.SparseFlashError, match="one threshold for all heads"):
        sf.methods.BLASST(factor=(1.0, 2.0)).select(q, k)
    for wrong in (0, -1.0, math.inf, math.nan, "x"):
        with pytest.raises(sf.SparseFlashError, match="factor=.*above 0"):
            sf.methods.BLASST(factor=wrong)


def test_blasst_in_a_model_is_what_its_report_says(generator):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    words = model.model.embed_tokens.weight.data
    words[:, 0], words[:, 1], words[1, 1] = 1, 0, 1  # all words are words, and one is where sequences begin
    for layer in model.model.layers:
        for proj, channel in ((layer.self_attn.q_proj, 0), (layer.self_attn.k_proj, 1)):
            proj.weight.data[15::32, channel] = 0.7  # which all look for, in the slowest rotation
    ids = torch.randint(2, 64, (2, 300), generator=generator)
    ids[0, :3] = ids[1, 70:73] = 1
    keep = torch.ones_like(ids)
    keep[1, :70] = 0
    with torch.no_grad(), sf.transformers.sparse(model, prefill=sf.methods.BLASST(20.0)):
        padded = model(ids, attention_mask=keep).logits
        alone = model(ids[1:, 70:]).logits
        rows = list(sf.transformers.report(model, input_ids=ids))
    with torch.no_grad():
        dense = model(ids, attention_mask=keep).logits
    torch.testing.assert_close(padded[1:, 70:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(padded[0], dense[0], atol=1e-3)
    assert all(0.1 < x < 0.95 for row in rows for x in row.density)
    assert all(0.5 < x < 1 for row in rows for x in row.recall)


@pytest.mark.slow
def test_a_head_of_a_million_keys_is_selected_planned_and_attended_within_four_gib(generator):
    """q, k and v are 768 MiB of them, the output 256; rows that are looked at are those of float64."""
    from sparseflash.bench.memory import peak

    T = 1 << 20
    q, k, v = (torch.randn(1, 1, T, 64, generator=generator) for _ in range(3))
    found = {}
    method = sf.methods.MInference(vertical=500, slash=32, near=16)

    def run():
        found["selection"] = method.select(q, k)
        found["out"], found["lse"] = method(q, k, v, selection=found["selection"], return_lse=True)

    used = peak(run) + 3 * q.numel() * 4
    print(f"{used / 2**30:.2f} GiB")
    assert used <= 4 << 30
    plan = found["selection"].plan
    assert plan.work < 0.02
    rows = torch.tensor([0, 63, 64, 70_000, 524_287, T - 65, T - 1])
    for row, mask in zip(rows.tolist(), plan.restrict(rows).to_dense()[0, 0]):
        keys = mask.nonzero()[:, 0]
        logits = k[0, 0, keys].double() @ q[0, 0, row].double() / 8
        want = logits.softmax(0) @ v[0, 0, keys].double()
        torch.testing.assert_close(found["out"][0, 0, row].double(), want, atol=1e-5, rtol=1e-4)
        assert float(found["lse"][0, 0, row]) == pytest.approx(float(logits.logsumexp(0)), abs=1e-4)
        assert int(keys.max()) <= row and len(keys) < 6000 and (row < T - 1 or len(keys) >= 500)


def test_rotations_of_dual_chunks_reach_to_the_last_key_at_least(generator):
    q, k, v = (normal(generator, 1, 2, 70, 16) for _ in range(3))
    angle = torch.arange(100)[None, :, None] * torch.rand(1, 1, 8, generator=generator).repeat(1, 1, 2)
    method, tables = sf.methods.DualChunkAttention(32), (angle.cos(), angle.sin())
    want = method(q, k, v, ctx={"rope": tables})
    assert torch.equal(method(q, k, v, ctx={"rope": tuple(x[:, :70] for x in tables)}), want)
    short, flat = tuple(x[:, :69] for x in tables), tuple(x[0] for x in tables)
    for wrong in (short, (tables[0], short[1]), flat, (tables[0], flat[1]), tables[:1], (tables[0], 1)):
        with pytest.raises(sf.SparseFlashError, match="the last of 70 keys"):
            method(q, k, v, ctx={"rope": wrong})

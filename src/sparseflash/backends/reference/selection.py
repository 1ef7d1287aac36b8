"""What `selection` estimates and picks (probe, masses, best, pages), some rows at a time: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Best, Heaviest, Masses, Pages, Probing, Running, in_order, state_dtype

HELD = 1 << 22
"""Maximum number of scores held at a time."""
STEPS = 64
"""Places that `running_kth` processes in one step."""


def _logits(rows: Tensor, columns: Tensor, scale: float, softcap: float) -> Tensor:
    """Logits [B,Hq,n,m] of rows [B,Hq,n,E] and columns [B,Hkv,m,E], which are not copied per query head."""
    (B, Hq, n, E), (_, Hkv, m, _), work = rows.shape, columns.shape, state_dtype(rows)
    grouped = rows.to(work).reshape(B, Hkv, Hq // Hkv * n, E)
    x = (grouped @ columns.to(work).mT).view(B, Hq, n, m) * scale
    return torch.tanh(x / softcap) * softcap if softcap else x


def _seen(sees: Tensor, keep: Tensor | None, first: int, m: int) -> Tensor:
    """True where a row [B,n] sees columns first .. first + m - 1: [B,1,n,m]."""
    seen = torch.arange(first, first + m, device=sees.device) < sees[..., None]
    if keep is not None:
        seen = seen & keep[:, None, first : first + m]
    return seen[:, None]


def probe(
    q: Tensor, k: Tensor, sees: Tensor, at: Tensor, keep: Tensor | None, options: Probing
) -> tuple[Tensor, Tensor, Tensor]:
    """lse [B,Hq,n], and the sums of P by key [B,Hq,Tk] and by distance [B,Hq,width]."""
    (B, Hq, n, _), Tk, work = q.shape, k.shape[2], state_dtype(q)
    lse = torch.full((B, Hq, n), -torch.inf, dtype=work, device=q.device)
    keys = torch.zeros((B, Hq, Tk), dtype=work, device=q.device)
    distances = torch.zeros((B, Hq, options.width + 1), dtype=work, device=q.device)  # last: out of range
    step = max(1, min(Tk, HELD // max(1, B * Hq * n)))
    if not B * n:
        return lse, keys, distances[..., :-1].contiguous()

    def scores(first: int) -> tuple[Tensor, Tensor]:
        part = k[:, :, first : first + step]
        seen = _seen(sees, keep, first, part.shape[2])
        wanted = seen.any(2)[:, 0]  # keys that no row sees may be NaN
        part = torch.where(wanted[:, None, :, None], part, 0)
        return _logits(q, part, options.scale, options.softcap).masked_fill(~seen, -torch.inf), seen

    for first in range(0, Tk, step):
        lse = torch.logaddexp(lse, scores(first)[0].logsumexp(-1))
    some = lse > -torch.inf
    level = torch.where(some | lse.isnan(), lse, 0)[..., None]
    for first in range(0, Tk, step):
        x, seen = scores(first)
        p = torch.where(seen, torch.exp(x - level), 0)
        keys[..., first : first + step] = p.sum(2)
        _by_distance(p, at, first, options, distances)
    return lse, keys, distances[..., :-1].contiguous()


def _by_distance(p: Tensor, at: Tensor, first: int, options: Probing, into: Tensor) -> None:
    """Add P [B,H,n,m] by distance, of rows at positions [B,n] and keys from `first` on; no index repeats."""
    B, H, n, m = p.shape
    none = options.width

    def add(x: Tensor, place: Tensor) -> None:
        inside = (place >= 0) & (place < none)
        place = torch.where(inside, place, none)[:, None].expand(B, H, -1)
        into.scatter_add_(-1, place, torch.where(inside[:, None], x, 0))

    if options.consecutive:  # shift each row one further right: diagonals become columns
        skew = torch.nn.functional.pad(p.flip(-1), (0, n)).flatten(2)[..., : n * (m + n - 1)]
        shift = torch.arange(m + n - 1, device=p.device) - (m - 1) - first + options.before
        add(skew.reshape(B, H, n, m + n - 1).sum(2), at[:, :1].long() + shift)
        return
    key = torch.arange(first, first + m, device=p.device)
    for i in range(n):
        add(p[:, :, i], at[:, i : i + 1].long() - key + options.before)


def tile_mass(
    rows: Tensor,
    columns: Tensor,
    sees: Tensor,
    keep: Tensor | None,
    level: Tensor | None,
    options: Masses,
) -> Tensor:
    """Weights of rows [B,Hq,n,E] on columns [B,Hkv,m,E], by tile and unit: [B,Hq,R,C], each row of sum 1.

    A row's weights are its own softmax; or exp(score - level) where levels [B,Hq,n] are given; or (`joint`)
    exp(score - largest score of the tile).
    """
    (B, Hq, n, _), m, work = rows.shape, columns.shape[2], state_dtype(rows)
    tile, unit = min(options.tile, max(n, 1)), min(options.unit, max(m, 1))
    R, C = -(-n // tile), -(-m // unit)
    found = torch.zeros((B, Hq, R, C), dtype=work, device=rows.device)
    step = max(1, HELD // max(1, B * Hq * tile * m))
    if not B * n * m:
        return found
    if keep is not None:
        columns = torch.where(keep[:, None, :, None], columns, 0)
    for r in range(0, R, step):
        part = slice(r * tile, (r + step) * tile)
        x = _logits(rows[:, :, part], columns, options.scale, options.softcap)
        seen = _seen(sees[:, part], keep, 0, m)
        short = -x.shape[2] % tile
        x = torch.nn.functional.pad(torch.where(seen, x, -torch.inf), (0, 0, 0, short), value=-torch.inf)
        x = x.view(B, Hq, -1, tile, m)
        if level is None:
            top = x.amax((-1, -2) if options.joint else -1, keepdim=True)
        else:
            own = torch.nn.functional.pad(level[:, :, part], (0, short), value=-torch.inf)
            top = own.view(*x.shape[:-1], 1)
            x = x.masked_fill(top == -torch.inf, -torch.inf)
        p = torch.exp(x - torch.where(top == -torch.inf, 0, top))
        if level is None and not options.joint:
            total = p.sum(-1, keepdim=True)
            p = p / torch.where(total == 0, 1, total)
        p = torch.nn.functional.pad(p.amax(3) if options.peak else p.sum(3), (0, C * unit - m))
        p = p.view(B, Hq, -1, C, unit)
        found[:, :, r : r + step] = p.amax(-1) if options.peak else p.sum(-1)
    total = found.sum(-1, keepdim=True)
    return found / torch.where(total == 0, 1, total)


def top_indices(scores: Tensor, among: Tensor | None, options: Best) -> Tensor:
    """Indices of the k largest scores [N,n], int32 [N,k], ascending; -1 behind the last."""
    n = scores.shape[-1]
    order = in_order(scores, among).argsort(dim=-1, descending=True, stable=True)[..., : options.k]
    if among is not None:
        order = torch.where(among.gather(-1, order), order, n)
    order = order.sort(-1).values
    return torch.where(order < n, order, -1).int()


def heaviest(mass: Tensor, among: Tensor | None, share: Tensor, options: Heaviest) -> Tensor:
    """Which entries of mass [N,n], largest first, hold the shares [N] of their rows' sums: bool [N,n].

    At least the best one that may be chosen; all that may be for a share of 1 or more.
    """
    there = torch.ones_like(mass, dtype=torch.bool) if among is None else among
    order = in_order(mass, among).argsort(dim=-1, descending=True, stable=True)
    held = torch.where(there, mass, 0).nan_to_num(nan=0).clamp(min=0).double().gather(-1, order)
    reached = held.cumsum(-1)
    keep = (reached - held < share[:, None] * reached[:, -1:]) & (held > 0)
    keep = keep | (torch.arange(mass.shape[-1], device=mass.device) == 0)
    keep = torch.zeros_like(there).scatter_(-1, order, keep)
    return there & (keep | (share >= 1)[:, None])


def page_scores(q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages) -> Tensor:
    """Scores of pages for queries [B,Hq,Tq,w], by their summary rows [B,Hkv,n,w]: [B,heads,Tq,pages]."""
    (B, Hq, Tq, w), (_, Hkv, n, _), work = q.shape, rows.shape, state_dtype(q)
    own = q.to(work).view(B, Hkv, Hq // Hkv, Tq, w)
    if options.share == "sum":  # a sum of products is the product with the sum
        own = own.sum(2, keepdim=True)
    score = (own.flatten(2, 3) @ rows.to(work).mT).view(B, Hkv, own.shape[2], Tq, n)
    score = score.amax(2) if options.share else score.flatten(1, 2)
    if options.parts > 1:
        score = torch.nn.functional.pad(score, (0, -n % options.parts), value=-torch.inf)
        score = score.view(*score.shape[:-1], score.shape[-1] // options.parts, options.parts).amax(-1)
    page, at = torch.arange(score.shape[-1], device=q.device), last[:, None, :, None]
    near, free = (options.near, True) if rules is None else rules[:, :, None, None].unbind(1)
    forced = (page < options.sinks) | (page > at - near)
    read = (page <= at) & (forced | torch.as_tensor(free, device=q.device).bool())
    return score.masked_fill(forced, torch.inf).masked_fill(~read, -torch.inf)


def running_kth(x: Tensor, k: Tensor, options: Running) -> tuple[Tensor, Tensor]:
    """For x [N,T], k [N]: the k-th largest of each prefix, and where each place drops out of the k largest.

    STEPS places at a time are ranked together with the best of all earlier ones: memory and work grow with T
    times the largest k.
    """
    N, T = x.shape
    kth = torch.full_like(x, -torch.inf)
    until = torch.full((N, T + 1), T, dtype=torch.int32, device=x.device)  # last: no place
    most = min(T, options.most)
    value = torch.full((N, most), -torch.inf, dtype=x.dtype, device=x.device)
    place = torch.full((N, most), T, dtype=torch.int64, device=x.device)  # T: no place
    for first in range(0, T, STEPS):
        here = torch.arange(first, min(first + STEPS, T), device=x.device)
        values = torch.cat([value, x[:, first : first + STEPS]], -1)
        places = torch.cat([place, here.expand(N, -1)], -1)
        ranked = in_order(values, places < T).argsort(dim=-1, descending=True, stable=True)
        values, places = values.gather(-1, ranked), places.gather(-1, ranked)
        # there: which candidates exist at each place; rank: how many of those are as good or better
        there = (places[:, None] <= here[:, None]) & (places < T)[:, None]
        rank = there.cumsum(-1)
        among = there & (rank <= k[:, None, None])
        last = (there & (rank == k[:, None, None])).byte().argmax(-1)
        full = rank[..., -1] >= k[:, None]
        kth[:, first : first + STEPS] = torch.where(full, values.gather(-1, last), -torch.inf)
        stays = torch.where(places < T, torch.maximum(places, here[:1]) + among.sum(1), T)
        gone = (stays <= here[-1]) & (places < T)
        until.scatter_(-1, torch.where(gone, places, T), torch.where(gone, stays, T).int())
        value, place = values[:, :most], torch.where(gone, T, places)[:, :most]
        value = torch.where(place < T, value, -torch.inf)
    return kth, until[:, :T].contiguous()

"""How far a result may lie from the exact one: derived, in one place, never loosened to pass.

For an output x of a kernel that works in the precision of its inputs, element by element:

    |x - exact|  <=  factor * worst error of an eager run in the same row  +  band

``exact`` is dense masked softmax attention in fp64, ``eager`` the same lines run in the dtype of the
inputs, both written out below; factor is 2 for results and 3 for gradients. The row is the last axis (for
``lse``, ``dbias`` and ``dsink``, one number a token or head, all of that axis), so a large early row
excuses nothing in a small late one.

The band is what the roundings that a fused kernel must do cost even where the eager run happens to make no
error at all (a row with one key: its softmax is exactly 1, its gradient exactly 0). With u the unit
roundoff of the dtype, eps = 2 u its ``torch.finfo(dtype).eps``, e that of fp32 (fp64 for fp64 inputs), A.B
the products below, and |.| of a sum the root of the sum of squares of its terms (independent roundings, of
at most u of a term each, add up like that; eps = 2 u is then about five standard deviations of them):

- a sum of n terms in fp32, in any order, also one after another: each step rounds what is summed so far, at
  most |terms| where signs are mixed and the result where they are not. So e * sqrt(n) * |terms| for each |.|
  below, and e * sqrt(n) * abs(result).
- a logit is a sum of D terms, and is exponentiated relative to an lse that is a sum over n keys. So p is off
  by a relative c = e * (1 + sqrt(D) * |q.k| + |bias| + |lse| + sqrt(n)), worst over the keys of the row, and
  by eps^2, since a p that is rounded to the dtype (or multiplied with what was) needs no better exponential;
  lse by c.
- out = p.v: p or the product is rounded to the dtype, and so is the result; what is common to a row (its lse,
  its normaliser, the final rounding) does not average out:   (eps + c) * (|p.v| + abs(out)).
- g = p (do.v - delta + dlse), delta = do.out. The difference cancels, its terms do not, and out itself was
  rounded: |g| = p (|do.v| + |do.out| + |dlse|). Common to a row are its lse and its delta:
  dq: (eps + c) * (scale * |g.k| + scale * |do.out| * abs(p.k) + abs(dq)).
- dropout multiplies p with a factor, in out and dv, and do.v in g.
- dk: (eps + c) * scale * |g.q|, dv: (eps + c) * |p.do|, dbias: (eps + c) * |g|, dsink alike; each
  + eps * abs(result), the final rounding, and e * sqrt(n) * abs(result) for its n terms.

Where nothing is seen all terms are 0: there the result has to be exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def _spread(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    """Head h of the result is head h * H // heads of x."""
    own = x.shape[dim]
    return x.index_select(dim, torch.arange(heads, device=x.device) * own // heads)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    pair_bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in the dtype of q: (out, lse). `mask` bool [B|1, H', Tq, Tk], True attends.

    `factor` [B,H,Tq,Tk] multiplies the weights: dropout.
    """
    heads = q.shape[1]
    keep = _spread(mask, heads).expand(q.shape[0], -1, -1, -1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sees, seen = keep.any(-1)[..., None], keep.any(-2)[..., None]
    q = torch.where(sees, q, 0)
    k, v = (torch.where(seen, _spread(x, heads), 0) for x in (k, v))
    s = q @ k.transpose(-1, -2) * scale
    if softcap:
        s = torch.tanh(s / softcap) * softcap
    if key_bias is not None:
        s = s + _spread(key_bias, heads).to(s.dtype)[:, :, None, :]
    if pair_bias is not None:
        s = s + pair_bias.to(s.dtype)
    s = s.masked_fill(~keep, -math.inf)
    if sink_logits is not None:
        s = torch.cat([s, sink_logits.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)], -1)
    some = (s > -math.inf).any(-1, keepdim=True)
    p = torch.softmax(torch.where(some, s, 0), -1) * some
    lse = torch.where(some[..., 0], torch.logsumexp(torch.where(some, s, 0), -1), -math.inf)
    if s.shape[-1] == 0:
        lse = torch.full_like(q[..., 0], -math.inf)
    p = p[..., : v.shape[2]]
    return (p if factor is None else p * factor.to(p.dtype)) @ v, lse


def _all(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Out, lse and, with dout or dlse, the gradients, computed in dtype."""
    options = dict(options)
    names = {"bias": "key_bias", "sink": "sink_logits", "pair": "pair_bias"}
    leaves = {"q": q, "k": k, "v": v} | {short: options.pop(name, None) for short, name in names.items()}
    backward = dout is not None or dlse is not None
    leaves = {n: x.detach().to(dtype).requires_grad_(backward) for n, x in leaves.items() if x is not None}
    out, lse = softmax_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        mask,
        key_bias=leaves.get("bias"),
        sink_logits=leaves.get("sink"),
        pair_bias=leaves.get("pair"),
        **options,
    )
    found = {"out": out.detach(), "lse": lse.detach()}
    if backward:
        some = lse > -math.inf
        total = torch.zeros((), dtype=dtype, device=q.device)
        if dout is not None:
            total = total + (out * torch.where(some[..., None], dout, 0).to(dtype)).sum()
        if dlse is not None:
            total = total + (torch.where(some, lse, 0) * torch.where(some, dlse, 0).to(dtype)).sum()
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found |= {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return found


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The yardstick, in fp64: out, lse and, with dout or dlse, dq, dk, dv (dbias, dsink where given)."""
    return _all(torch.float64, q, k, v, mask, dout, dlse, options)


def bands(
    want: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    pair_bias: Tensor | None = None,
    factor: Tensor | None = None,
    large: bool = False,
) -> dict[str, Tensor]:
    """The rounding band of each result (see above), given the exact ones; `large`: without the logits'."""
    B, H, Tq, D = q.shape
    eps = torch.finfo(q.dtype).eps
    fine = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    signed = D**-0.5 if scale is None else scale
    scale = abs(signed)
    keep = _spread(mask, H).expand(B, -1, -1, -1)
    kv_heads = k.shape[1]
    sees, seen = keep.any(-1), keep.any(-2)
    q2 = torch.where(sees[..., None], q.double(), 0) ** 2
    kd, vd = (torch.where(seen[..., None], _spread(x, H).double(), 0) for x in (k, v))
    lse = want["lse"]
    alive = lse > -math.inf
    size = (q2 @ (kd**2).transpose(-1, -2)).sqrt() * scale
    s = torch.where(sees[..., None], q.double(), 0) @ kd.transpose(-1, -2) * signed
    bias = None if key_bias is None else _spread(key_bias.double(), H)[:, :, None, :]
    s = s if softcap is None or softcap == 0 else torch.tanh(s / softcap) * softcap
    if bias is not None:
        s, size = s + bias, size + torch.where(torch.isfinite(bias), bias.abs(), 0)
    if pair_bias is not None:
        pair = pair_bias.double()
        s, size = s + pair, size + torch.where(torch.isfinite(pair), pair.abs(), 0)
    safe = torch.where(alive, lse, 0)
    p = torch.where(keep, torch.exp(s - safe[..., None]), 0)
    worst = torch.where(keep, size, 0).amax(-1) if keep.shape[-1] else torch.zeros_like(safe)
    if sink_logits is not None:
        worst = torch.maximum(worst, sink_logits.double().abs()[None, :, None].expand_as(worst))
    many = keep.sum(-1).sqrt()  # keys of a row
    of_lse = torch.where(alive, fine * (1 + D**0.5 * worst + safe.abs() + many) + eps**2, 0)
    c = torch.where(alive, fine * (1 + many) + eps**2, 0) if large else of_lse
    both = eps + c
    pool = k.shape[0] == 1  # one set of keys, summed over all sequences
    readers = keep.sum((1, 2))  # queries that see a key, [B, Tk]: the terms of its gradients
    steps = fine * (readers.sum(0, keepdim=True) if pool else readers).sqrt()[:, None, :, None]
    both_of_key = both[..., None] + steps.transpose(-1, -2)

    def root(x: Tensor, y: Tensor) -> Tensor:
        return (x**2 @ y**2).sqrt()

    def per_kv(x: Tensor) -> Tensor:
        total = (x**2).view(B, kv_heads, H // kv_heads, *x.shape[2:]).sum(2)
        return (total.sum(0, keepdim=True) if pool else total).sqrt()

    kept = p if factor is None else p * factor
    found = {"out": both[..., None] * (root(kept, vd) + want["out"].abs()), "lse": of_lse}
    if dout is None and dlse is None:
        return found
    do = torch.zeros_like(want["out"]) if dout is None else torch.where(alive[..., None], dout.double(), 0)
    dl = torch.zeros_like(lse) if dlse is None else torch.where(alive, dlse.double(), 0).abs()
    delta = ((do * want["out"]) ** 2).sum(-1).sqrt()[..., None]
    of_weights = root(do, vd.transpose(-1, -2))
    level = (of_weights if factor is None else of_weights * factor) + delta + dl[..., None]
    g, g_of_key = both[..., None] * p * level, both_of_key * p * level
    common = scale * delta * (p @ kd).abs() + want["dq"].abs()
    found["dq"] = scale * root(g, kd) + both[..., None] * common
    found["dk"] = scale * per_kv((g_of_key.transpose(-1, -2) ** 2 @ q2).sqrt())
    found["dv"] = per_kv(root((both_of_key * kept).transpose(-1, -2), do))
    if key_bias is not None:
        total = (g_of_key**2).sum(-2)
        own_batch, own = key_bias.shape[:2]
        total = total.view(B, own, H // own, -1).sum(2)
        found["dbias"] = (total.sum(0, keepdim=True) if own_batch == 1 else total).sqrt()
    if pair_bias is not None:
        found["dpair"] = (g**2).sum_to_size(pair_bias.shape).sqrt()
    if sink_logits is not None:
        share = torch.where(alive, torch.exp(sink_logits.double()[None, :, None] - safe), 0)
        term = (eps + c + fine * c.numel() ** 0.5) * share * (delta[..., 0] + dl)
        found["dsink"] = (term**2).sum((0, 2)).sqrt()
    long = {"dk": steps, "dv": steps, "dbias": fine * readers.sum(0).sqrt(), "dsink": fine * c.numel() ** 0.5}
    for name in long.keys() & found.keys():
        found[name] = found[name] + (eps + long[name]) * want[name].abs()
    return found


def compare(
    got: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    note: str = "",
    large: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Hold results to this tolerance; returns the worst error of each as a share of what is allowed.

    Parameters
    ----------
    got : dict
        Any of out, lse, dq, dk, dv, dbias, dsink.
    q, k, v, dout, dlse, options
        The inputs as the kernel had them (their dtype is the precision that is judged); `scale`, `softcap`,
        `key_bias`, `sink_logits`, `pair_bias` as for `attention`; `factor`, what dropout multiplies the
        weights with.
    mask : Tensor
        bool [B|1, H', Tq, Tk], True attends; H' divides the number of query heads.
    note : str
        Stands in the message of a failure: the line that makes this input again.
    large : bool
        For logits so large that the band above, which grows with them, would excuse anything: the band
        without them, beside the worst error of an eager run in any row (whose softmax of a row with one large
        logit is right to the last bit).

    Raises
    ------
    AssertionError
        Naming every result that is too far off, and where.
    """
    given = {"dout": dout, "dlse": dlse, **options}
    want = exact(q, k, v, mask, **given)
    rough = _all(q.dtype, q, k, v, mask, dout, dlse, options)
    band = bands(want, q, k, v, mask, **given, large=large)
    title = f"{q.dtype} q{list(q.shape)} k{list(k.shape)}"
    if large:
        slack = {n: (rough[n].double() - y).abs().nan_to_num(0, posinf=0).amax() for n, y in want.items()}
        rough = {n: y + slack[n] for n, y in want.items()}
    return hold(got, want, rough, band, q.dtype, title=title, note=note)


def hold(
    got: dict[str, Tensor],
    want: dict[str, Tensor],
    rough: dict[str, Tensor],
    band: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    title: str = "",
    note: str = "",
) -> dict[str, float]:
    """The rule itself: results against the exact ones, the eager ones of the same precision and the band.

    Names of gradients begin with d. Returns and raises what `compare` does.
    """
    shares, faults = {}, []
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, f"{name}: shape {list(x.shape)}, expected {list(y.shape)}\n  {note}"
        if not x.numel():
            shares[name] = 0.0
            continue
        empty = torch.isinf(y) & (x == y)  # lse of a row that sees nothing
        error = torch.where(empty, 0, (x.double() - y).abs())
        slack = torch.where(torch.isinf(y), 0, (rough[name].double() - y).abs().nan_to_num(0.0, posinf=0.0))
        slack = slack.amax(-1, keepdim=True)
        allowed = (GRADIENT_FACTOR if name.startswith("d") else FACTOR) * slack + band[name]
        if torch.finfo(x.dtype).eps > torch.finfo(dtype).eps:  # dbias of an fp32 bias to fp64 inputs
            allowed = allowed + torch.finfo(x.dtype).eps * torch.where(torch.isinf(y), 0, y.abs())
        tiny = torch.finfo(x.dtype)  # below the smallest normal, steps no longer shrink
        allowed = allowed + tiny.smallest_normal * (tiny.eps if x.dtype.itemsize < 4 else 1)
        share = torch.where(error == 0, 0, error / allowed).nan_to_num(math.inf)
        shares[name] = float(share.max())
        if not shares[name] <= 1:
            at = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
            allowed = allowed.expand_as(y)
            faults.append(
                f"{name}{list(at)} = {float(x[at]):.9g}, exact {float(y[at]):.9g}: "
                f"off by {float(error[at]):.3g}, allowed {float(allowed[at]):.3g}; "
                f"{int((share > 1).sum())} of {share.numel()} elements are too far off"
            )
    assert not faults, "\n  ".join([title or str(dtype), *faults, note])
    return shares

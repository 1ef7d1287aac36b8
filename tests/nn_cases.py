"""The table of layers: one row each, with its formula written out densely; `test_nn_layers.py` runs all."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf

WIDTH, HEADS = 16, 4
DROP: float | Tensor = 1.0
"""What `softmax` multiplies weights with: a test of dropout sets it."""


def one_thread():
    """A fixture: tensors this small are slower on two, and much slower where others want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Row:
    """A layer at the settings that its tests run.

    Parameters
    ----------
    make
        The layer's class.
    options
        What it is made with, beside width 16 and 4 heads.
    dense
        (layer, x) -> y, in plain torch from the layer's parameters.
    bad
        Options that it refuses, with a piece of the message.
    causal
        Whether what comes later leaves earlier tokens as they are.
    prepare
        What becomes of a fresh layer whose first state would show little.
    """

    make: Callable[..., sf.nn.Layer]
    options: dict[str, Any]
    dense: Callable[[Any, Tensor], Tensor]
    bad: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    causal: bool = True
    decodes: bool = True
    prepare: Callable[[Any], None] | None = None
    note: str = ""

    def layer(self, seed: int = 0, dtype: torch.dtype = torch.float64, **change: Any) -> Any:
        """The layer, its weights drawn from a seed."""
        made = self.make(WIDTH, HEADS, dtype=dtype, **{**self.options, **change})
        made.reset(torch.Generator().manual_seed(seed))
        if self.prepare is not None:
            self.prepare(made)
        return made

    def __str__(self) -> str:
        return self.make.__name__ + (f"-{self.note}" if self.note else "")


# ---------------------------------------------------------------- formulas


def heads(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    """`x @ weight.T`, [B, H, T, D]."""
    return (x @ weight.T).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)


def qkv(layer: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys, values, each [B, heads, T, D], before positions."""
    group = layer.heads // layer.kv_heads
    q, k, v = (heads(layer, m.weight, x) for m in (layer.query, layer.key, layer.value))
    return [q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)]


def spun(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions as products of complex numbers."""
    D = x.shape[-1]
    angle = torch.arange(x.shape[2])[:, None] * base ** (torch.arange(D // 2).double() * -2 / D)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def causal(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Masked softmax attention; 0 where nothing is seen."""
    s = q @ k.mT / math.sqrt(q.shape[-1])
    s = s if bias is None else s + bias
    e = torch.where(mask, s, -torch.inf)
    e = torch.where(mask, (e - e.amax(-1, keepdim=True).clamp(min=-1e300).detach()).exp(), 0)
    return e * DROP / e.sum(-1, keepdim=True).clamp(min=1e-300) @ v


def out(layer: Any, o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2) @ layer.output.weight.T


def dense_self(layer: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(layer, x)
    if layer.normed:
        q, k = (y / (y**2).mean(-1, keepdim=True).add(torch.finfo(y.dtype).eps).sqrt() for y in (q, k))
    q, k = (spun(q), spun(k)) if layer.positions == "rotary" else (q, k)
    mask = causal(x.shape[1]) if layer.causal else torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    if layer.method is not None:
        sink = torch.arange(x.shape[1]) < getattr(layer.method, "sink_tokens", 0)
        mask = mask & (sink | (mask.cumsum(0) <= layer.method.window))
    return out(layer, softmax(q, k, v, mask))


def dense_lightning(layer: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.nn.functional.silu(y) for y in qkv(layer, x))
    far = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    decay = torch.exp(-layer.rate.double()[:, None, None] * far.clamp(min=0)) * (far >= 0)
    y = ((q @ k.mT) * decay @ v).transpose(1, 2).flatten(2)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    if layer.gate_in is not None:
        y = y * torch.sigmoid(x @ layer.gate_in.weight.T @ layer.gate_out.weight.T)
    return y @ layer.output.weight.T


def dense_stick(layer: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(layer, x)
    b = torch.sigmoid(q @ k.mT / math.sqrt(layer.head_dim)) * causal(x.shape[1]).tril(layer.include_self - 1)
    left = (1 - b).flip(-1).cumprod(-1).flip(-1)  # what key j and all newer ones leave
    newer = torch.cat([left[..., 1:], torch.ones_like(left[..., :1])], -1)
    o = b * newer @ v
    return out(layer, o + left[..., :1] * v if layer.rest == "self" else o)


def sparsek_weights(u: Tensor, k: int) -> Tensor:
    """clip(u_j - tau_i, 0, 1) over j <= i, [.., T, T], by bisection; tau is then what its piece says."""
    T = u.shape[-1]
    each = u[..., None, :].expand(*u.shape, T).masked_fill(~causal(T), -torch.inf)
    with torch.no_grad():
        lo, hi = u.amin(-1)[..., None] - 2 - T, u.amax(-1)[..., None] + 1
        lo, hi = lo.expand_as(u), hi.expand_as(u)
        for _ in range(200):
            mid = (lo + hi) / 2
            much = (each - mid[..., None]).clamp(0, 1).sum(-1) > k
            lo, hi = torch.where(much, mid, lo), torch.where(much, hi, mid)
        off = each - hi[..., None]
        inside, ones = (off > 1e-12) & (off < 1 - 1e-12), (off >= 1 - 1e-12).sum(-1)
    some = inside.any(-1)
    tau = (torch.where(inside, each, 0).sum(-1) + ones - k) / inside.sum(-1).clamp(min=1)
    tau = torch.where(some, tau, hi)
    weight = torch.where(inside, each - tau[..., None], (off >= 1 - 1e-12).to(u.dtype))
    return torch.where((torch.arange(T) < k)[:, None], causal(T).to(u.dtype), weight)


def dense_sparsek(layer: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(layer, x)
    q, k = (spun(q), spun(k)) if layer.positions == "rotary" else (q, k)
    T = x.shape[1]
    u = (x @ layer.score.weight.T).mT + layer.slope * torch.arange(T).double()
    m = sparsek_weights(u, layer.k).repeat_interleave(layer.heads // layer.kv_heads, 1)
    near = causal(T) & ~causal(T).tril(-layer.window)
    m = torch.where(near, 1, m)
    e = torch.exp(q @ k.mT / math.sqrt(layer.head_dim)) * (m > 0)
    below = (m * e if layer.form == "weight" else e).sum(-1, keepdim=True)
    return out(layer, (m * e) @ v / below)


def dense_dynamic(layer: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(layer, x)
    T, group = x.shape[1], layer.heads // layer.kv_heads
    q, k = (spun(y / (y**2).mean(-1, keepdim=True).add(2.3e-16).sqrt()) for y in (q, k))
    of_heads = v[:, ::group].transpose(1, 2).flatten(2) @ layer.number.weight.T
    delta = (layer.slope * torch.log1p(of_heads.exp())).mT
    delta = (delta.exp() if layer.exponential else delta).repeat_interleave(group, 1)
    mask = torch.zeros(*delta.shape, T, dtype=torch.bool)
    for i in range(T):
        best = delta[..., : i + 1].detach().flip(-1).argsort(dim=-1, descending=True, stable=True)
        mask[..., i, :].scatter_(-1, i - best[..., : layer.window], True)
    return out(layer, softmax(q, k, v, mask, delta[..., None, :]))


@torch.no_grad()
def steep(layer: Any) -> None:
    layer.slope.copy_(torch.linspace(0.5, -0.5, len(layer.slope)))


def dense_routing(layer: Any, x: Tensor) -> Tensor:
    T, group, C = x.shape[1], layer.heads // layer.kv_heads, layer.clusters
    q = heads(layer, layer.query.weight, x)
    k = q[:, ::group] if layer.shared else heads(layer, layer.key.weight, x)
    v = heads(layer, layer.value.weight, x).repeat_interleave(group, 1)
    q, k = (
        (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for y in (q, k.repeat_interleave(group, 1))
    )
    mu = layer.centroid.repeat_interleave(group, 0)
    near_q, near_k = ((y @ mu.mT).detach() for y in (q, k))  # [B, H, T, C]
    far = (q - torch.gather(mu.expand(len(x), -1, -1, -1), 2, near_q.argmax(-1)[..., None].expand_as(q))) ** 2
    far = [far.sum(-1).flatten()]
    if not layer.shared:
        own = torch.gather(mu.expand(len(x), -1, -1, -1), 2, near_k.argmax(-1)[..., None].expand_as(k))
        far.append(((k - own) ** 2).sum(-1)[:, ::group].flatten())
    layer._aux = layer.commitment * torch.cat(far).mean()
    q, k = spun(q), spun(k)
    if layer.strict:
        same = (near_q.argmax(-1)[..., None] == near_k.argmax(-1)[..., None, :]) & causal(T)
        later = same.flip(-1).cumsum(-1).flip(-1)
        return out(layer, softmax(q, k, v, same & (later <= layer.window)))
    total, times = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    for c in range(C):
        of_q, of_k = (
            torch.zeros(y.shape[:-1], dtype=torch.bool).scatter(
                -1, y[..., c].topk(min(T, layer.window), -1).indices, True
            )
            for y in (near_q, near_k)
        )
        mask = of_q[..., None] & of_k[..., None, :] & causal(T)
        total, times = total + softmax(q, k, v, mask), times + of_q[..., None]
    return out(layer, total / times.clamp(min=1))


def dense_native(layer: Any, x: Tensor) -> Tensor:
    T, group, size, d = x.shape[1], layer.heads // layer.kv_heads, layer.block, layer.stride
    q = heads(layer, layer.query.weight, x)
    k, ks, kw = heads(layer, layer.key.weight, x).chunk(3, 1)
    v, vs, vw = heads(layer, layer.value.weight, x).chunk(3, 1)

    def summary(n: int, y: Tensor) -> Tensor:
        blocks = [y[:, :, c : c + size] + layer.place[n] for c in range(0, T - size + 1, d)]
        rows = (
            torch.stack(blocks, 2).flatten(-2) if blocks else y.new_zeros(*y.shape[:2], 0, size * y.shape[-1])
        )
        hidden = (rows @ layer.summary_in[n].weight.T).clamp(min=0)
        return (hidden @ layer.summary_out[n].weight.T).repeat_interleave(group, 1)

    ck, cv = summary(0, k), summary(1, v)
    C, S = ck.shape[2], -(-T // layer.select)
    i, c = torch.arange(T)[:, None], torch.arange(C)
    sees = c * d + size - 1 <= i
    first = softmax(q, ck, cv, sees)
    weight = softmax(q, ck, torch.eye(C, dtype=x.dtype).expand(*q.shape[:2], C, C), sees).detach()
    weight = weight.unflatten(1, (layer.kv_heads, group)).sum(2)
    mass = x.new_zeros(*weight.shape[:-1], S)
    for b in range(C):
        for t in range(b * d, b * d + size):
            mass[..., t // layer.select] += weight[..., b] / size
    mass = mass.round(decimals=12)  # sums in another order; equal ones go to the first
    block = torch.arange(S)
    own = i // layer.select
    mass = torch.where((block < layer.first) | (block > own - layer.near), torch.inf, mass)
    mass = torch.where(block <= own, mass, -1)
    best = mass.argsort(dim=-1, descending=True, stable=True)[..., : layer.top]
    mask = (
        torch.zeros_like(mass, dtype=torch.bool).scatter(-1, best, True).repeat_interleave(layer.select, -1)
    )
    mask = mask[..., :T].repeat_interleave(group, 1) & causal(T)
    ks, vs, kw, vw = (y.repeat_interleave(group, 1) for y in (ks, vs, kw, vw))
    if layer.positions == "rotary":
        q, ks, kw = spun(q), spun(ks), spun(kw)
    near = causal(T) & (causal(T).cumsum(0) <= layer.window)
    gate = (
        torch.sigmoid(x @ layer.gate.weight.T).unflatten(-1, (3, layer.heads)).permute(2, 0, 3, 1)[..., None]
    )
    branches = first, softmax(q, ks, vs, mask), softmax(q, kw, vw, near)
    return out(layer, sum(g * o for g, o in zip(gate, branches)))


def dense_combiner(layer: Any, x: Tensor) -> Tensor:
    """The mixture over all pairs, one query at a time."""
    q, k, v = qkv(layer, x)
    q, k = (spun(q), spun(k)) if layer.positions == "rotary" else (q, k)
    T, c, s = x.shape[1], layer.segment, layer.head_dim**-0.5
    rows = []
    for i in range(T):
        keys, values, sizes = [], [], []
        if layer.pattern == "logsparse":
            direct, end, regions = [i], i, []
            for bit in range(T.bit_length()):  # the lowest set bit is the block that ends at i
                if i >> bit & 1:
                    regions.append((end - (1 << bit), end))
                    end -= 1 << bit
        else:
            direct = list(range(i // c * c, i + 1))
            regions = [(r, r + c) for r in range(0, i // c * c, c)]
        if not layer.causal:
            direct = list(range(i // c * c, min(i // c * c + c, T)))
            regions = [(r, min(r + c, T)) for r in range(0, T, c) if r != i // c * c]
        for j in direct:
            keys, values, sizes = [*keys, k[:, :, j]], [*values, v[:, :, j]], [*sizes, 1]
        for lo, hi in regions:
            own = q[:, :, lo + i % c] if layer.pattern == "axial" else q[:, :, lo:hi].amax(2)
            p = (s * k[:, :, lo:hi] @ own[..., None]).softmax(2)
            value = (p * v[:, :, lo:hi]).sum(2)
            key = value @ layer.summary.weight.T if layer.pattern == "axial" else k[:, :, lo:hi].amax(2)
            keys, values, sizes = [*keys, key], [*values, value], [*sizes, hi - lo]
        logit = s * (torch.stack(keys, 2) * q[:, :, i, None]).sum(-1)
        logit = logit + layer.log_size * torch.tensor(sizes).double().log()
        rows.append((logit.softmax(-1)[..., None] * torch.stack(values, 2)).sum(2))
    return out(layer, torch.stack(rows, 2))


def gated(layer: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for back in range(layer.size):
        shifted = torch.cat([torch.zeros_like(x[:, :back]), x[:, : x.shape[1] - back]], 1)
        y = y + shifted * layer.filter[:, layer.size - 1 - back]
    return y * (x @ layer.gate.weight.T + layer.gate.bias)


def dense_convolution(layer: Any, x: Tensor) -> Tensor:
    return gated(layer, x) @ layer.output.weight.T


def dense_lookups(layer: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(layer, x)
    T = x.shape[1]
    g = torch.sigmoid(x @ layer.ask.weight.T + layer.ask.bias)
    y = gated(layer, x)
    asks = torch.ones_like(g, dtype=torch.bool) if layer.training else g >= layer.threshold
    mask = causal(T) & asks[:, None]
    if layer.training:
        quota = (T**0.5 if layer.lookups is None else layer.lookups) / T
        layer._aux = layer.penalty * torch.relu(g.mean() - quota)
    return y + g * out(layer, softmax(spun(q), spun(k), v, mask))


def dense_seqboat(layer: Any, x: Tensor) -> Tensor:
    ema, T, H = layer.average, x.shape[1], layer.heads
    p = torch.sigmoid(ema.delta)
    phi = 1 - p * torch.sigmoid(ema.alpha)
    h, rows = x.new_zeros(len(x), *phi.shape), []
    for t in range(T):
        h = phi * h + p * ema.beta * x[:, t, :, None]
        rows.append((ema.gamma * h).sum(-1) / math.sqrt(phi.shape[1]) + ema.omega * x[:, t])
    m = torch.nn.functional.silu(torch.stack(rows, 1))
    share = ((m @ layer.route.weight.T + layer.route.bias) / layer.heat.exp()).softmax(-1)[..., 1]
    active = share > 0.5
    z, r, v = torch.nn.functional.silu(m @ layer.unit.weight.T + layer.unit.bias).split(
        [H * layer.head_dim, layer.inner, layer.inner], -1
    )
    q, k = ((z * layer.scales[n] + layer.shifts[n]).unflatten(-1, (H, -1)).transpose(1, 2) for n in (0, 1))
    q, k = (spun(q), spun(k)) if layer.positions == "rotary" else (q, k)
    v = v.unflatten(-1, (H, -1)).transpose(1, 2)
    mask = active[:, :, None] & active[:, None] & causal(T)
    mask = (mask & (mask.flip(-1).cumsum(-1).flip(-1) <= layer.window + 1))[:, None]
    if layer.law == "softmax":
        o = softmax(q, k, v, mask)
    else:
        o = torch.relu(q @ k.mT / layer.window) ** 2 * mask @ v
    o = (o.transpose(1, 2).flatten(2) * r) @ layer.output.weight.T + layer.output.bias
    return m @ layer.plain.weight.T + layer.plain.bias + (share * active)[..., None] * o


def together(width: int, heads: int, *, near: int = 3, **options: Any) -> sf.nn.Together:
    """Half of the heads in a window, half routed."""
    own = {"head_dim": WIDTH // HEADS, **options}
    around = sf.nn.SelfAttention(width, heads // 2, method=sf.methods.Window(window=near), **own)
    return sf.nn.Together(
        around, sf.nn.RoutingAttention(width, heads // 2, clusters=2, window=4, commitment=0.1, **own)
    )


def dense_together(layer: Any, x: Tensor) -> Tensor:
    return dense_self(layer.layers[0], x) + dense_routing(layer.layers[1], x)


def dense_hrsam(layer: Any, x: Tensor) -> Tensor:
    """Every window gathered from an image that is padded with the learned token, slot by slot."""
    B, T, C = x.shape
    columns, w = layer.grid[1], layer.window
    rows, before = -(-T // columns), (w - w // 2) % w if layer.shifted else 0
    high, wide = (-(-(before + n) // w) * w for n in (rows, columns))
    image = layer.pad.expand(B, high, wide, C).clone()
    for t in range(T):
        image[:, before + t // columns, before + t % columns] = x[:, t]
    q, k, v = (
        (image @ m.weight.T + m.bias).unflatten(-1, (HEADS, -1)).movedim(3, 1)
        for m in (layer.query, layer.key, layer.value)
    )
    if layer.positions == "rotary":
        half = layer.head_dim // 2
        rate = layer.base ** (-torch.arange(0, half, 2, dtype=x.dtype) / half)

        def turned(y):
            for n, axis in enumerate((2, 3)):
                angle = torch.arange(y.shape[axis], dtype=y.dtype)[:, None] * layer.spacing * rate
                angle = angle[:, None] if axis == 2 else angle
                a, b = y[..., n * half : (n + 1) * half].chunk(2, -1)
                own = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
                y = torch.cat([y[..., : n * half], *own, y[..., (n + 1) * half :]], -1)
            return y

        q, k = turned(q), turned(k)
    number = torch.arange(high)[:, None] // w * wide + torch.arange(wide) // w
    same = number.flatten()[:, None] == number.flatten()
    out = softmax(*(y.flatten(2, 3) for y in (q, k, v)), same)
    out = out.transpose(1, 2).flatten(2).view(B, high, wide, -1)
    out = out[:, before : before + rows, before : before + columns].flatten(1, 2)[:, :T]
    return out @ layer.output.weight.T + layer.output.bias


def dense_cyclic(layer: Any, x: Tensor) -> Tensor:
    """The recurrence, step by step."""
    u, gate = torch.nn.functional.silu(x @ layer.enter.weight.T + layer.enter.bias).chunk(2, -1)
    T, N = x.shape[1], layer.size
    chosen = u @ layer.choose.weight.T
    pace, into, out = chosen[..., : layer.rank], chosen[..., -2 * N : -N], chosen[..., -N:]
    delta = torch.nn.functional.softplus(pace @ layer.pace.weight.T + layer.pace.bias)
    h, y = x.new_zeros(len(x), layer.width, N), [0.0 * x[:, t] for t in range(T)]
    for r in range(layer.repeats):
        for t in range(T):
            d = delta[:, t, :, None]
            h = h * (-d * layer.log_decay.exp()).exp() + d * into[:, t, None] * u[:, t, :, None]
            y[t] = y[t] + layer.rounds[:, r] * ((h * out[:, t, None]).sum(-1) + layer.skip * u[:, t])
    y = torch.stack(y, 1) if T else x
    y = torch.nn.functional.layer_norm(y, (layer.width,))
    return (gate * y) @ layer.output.weight.T + layer.output.bias


def dense_sparsifiner(layer: Any, x: Tensor) -> Tensor:
    """The prediction, row by row; it also sets the layer's loss."""
    T = x.shape[1]
    q, k, v = (
        heads(layer, m.weight, x) + m.bias.view(HEADS, 1, -1) for m in (layer.query, layer.key, layer.value)
    )
    a, b = q.detach() @ layer.low_query.weight.T, k.detach() @ layer.low_key.weight.T
    wanted = ((a[:, :, 1:] @ (b.mT @ layer.mixer[:T])) * layer.scale).softmax(-1)
    nth = wanted.sort(-1, descending=True).values[..., min(layer.top, wanted.shape[-1]) - 1, None]
    basis = layer.basis[:T].abs() if layer.phase == "sparse" else layer.basis[:T]
    guess = (wanted * (wanted >= nth)) @ (
        basis * (basis > layer.floor) if layer.phase == "sparse" else basis
    ).mT
    truth = (q.detach() @ k.detach().mT * layer.head_dim**-0.5).softmax(-1)[:, :, 1:]
    layer._aux = layer.weight * (guess - truth).square().sum((-1, -2)).mean()
    mask = torch.ones(len(x), HEADS, T, T, dtype=torch.bool)
    if layer.phase == "sparse":
        least = guess.sort(-1, descending=True).values[..., math.ceil(layer.keep * T) - 1, None]
        mask[:, :, 1:] = guess >= least
    out = softmax(q, k, v, mask)
    return out.transpose(1, 2).flatten(2) @ layer.output.weight.T + layer.output.bias


# ---------------------------------------------------------------- the table

ROWS = [
    Row(
        sf.nn.SelfAttention,
        {"kv_heads": 2},
        dense_self,
        [
            ({"kv_heads": 3}, "divisor of heads"),
            ({"head_dim": 3}, "odd"),
            ({"positions": "alibi"}, "rotary or none"),
            ({"method": 7}, "expected a Method"),
            ({"method": "windov"}, "there is no method"),
            ({"method": "window", "causal": False}, "setting of the method"),
            ({"base": 0}, "positive number"),
        ],
    ),
    Row(
        sf.nn.SelfAttention,
        {"method": sf.methods.Window(window=5), "head_dim": 6, "normed": True},
        dense_self,
        note="window",
    ),
    Row(
        sf.nn.SelfAttention,
        {"causal": False, "positions": "none"},
        dense_self,
        causal=False,
        note="all",
    ),
    Row(
        sf.nn.LightningAttention,
        {"layer": 1, "layers": 3, "kv_heads": 2, "gate": 3},
        dense_lightning,
        [({"layer": 3}, "less than layers"), ({"gate": -1}, ">= 0"), ({"layers": 0}, ">= 1")],
    ),
    Row(sf.nn.LightningAttention, {"gate": 0, "head_dim": 5}, dense_lightning, note="plain"),
    Row(
        sf.nn.StickBreakingAttention,
        {"kv_heads": 2},
        dense_stick,
        [({"rest": "all"}, "'self' or 'drop'"), ({"include_self": 2}, "True or False")],
    ),
    Row(
        sf.nn.StickBreakingAttention,
        {"rest": "drop", "include_self": True},
        dense_stick,
        note="drop",
    ),
    Row(
        sf.nn.SparseKAttention,
        {"k": 3, "window": 2, "kv_heads": 2},
        dense_sparsek,
        [
            ({"k": 0}, ">= 1"),
            ({"window": -1}, ">= 0"),
            ({"form": "mask"}, "'weight' or 'gate'"),
            ({"slope": math.inf}, "finite"),
        ],
    ),
    Row(
        sf.nn.SparseKAttention,
        {"k": 2, "window": 0, "form": "gate", "slope": 0.05, "positions": "none"},
        dense_sparsek,
        note="gate",
    ),
    Row(
        sf.nn.DynamicMaskAttention,
        {"window": 5, "kv_heads": 2},
        dense_dynamic,
        [({"window": 0}, ">= 1"), ({"exponential": None}, "True or False")],
        prepare=steep,
    ),
    Row(
        sf.nn.DynamicMaskAttention,
        {"window": 3, "exponential": False},
        dense_dynamic,
        prepare=steep,
        note="linear",
    ),
    Row(
        sf.nn.RoutingAttention,
        {"clusters": 3, "window": 3, "commitment": 0.1},
        dense_routing,
        [
            ({"clusters": 0}, ">= 1"),
            ({"decay": 1.0}, "share"),
            ({"commitment": -1}, ">= 0"),
            ({"strict": 2}, "True or False"),
        ],
    ),
    Row(
        sf.nn.RoutingAttention,
        {"clusters": 3, "window": 4, "shared": False, "kv_heads": 2, "commitment": 0.1},
        dense_routing,
        note="apart",
    ),
    Row(
        sf.nn.RoutingAttention,
        {"clusters": 3, "window": 6, "strict": False, "commitment": 0.1},
        dense_routing,
        causal=False,
        note="nearest",
    ),
    Row(
        sf.nn.RoutingAttention,
        {"clusters": 2, "window": 8, "strict": False, "shared": False, "kv_heads": 1, "commitment": 0.1},
        dense_routing,
        causal=False,
        note="nearest-apart",
    ),
    Row(
        sf.nn.NativeSparseAttention,
        {"kv_heads": 2, "block": 4, "stride": 2, "select": 4, "top": 3, "near": 1, "window": 3},
        dense_native,
        [
            ({"stride": 5}, "at most block"),
            ({"top": 1}, "more than top"),
            ({"select": 0}, ">= 1"),
            ({"first": -1}, ">= 0"),
        ],
    ),
    Row(
        sf.nn.NativeSparseAttention,
        {
            "block": 3,
            "stride": 3,
            "select": 2,
            "top": 2,
            "first": 0,
            "near": 1,
            "window": 1,
            "positions": "none",
        },
        dense_native,
        note="odd",
    ),
    Row(
        sf.nn.Combiner,
        {"segment": 4, "kv_heads": 2},
        dense_combiner,
        [
            ({"pattern": "axiom"}, "'fixed' or"),
            ({"segment": 0}, ">= 1"),
            ({"log_size": 1.5}, "True or False"),
        ],
    ),
    Row(
        sf.nn.Combiner,
        {"pattern": "logsparse", "kv_heads": 2, "log_size": True},
        dense_combiner,
        decodes=False,
        note="logsparse",
    ),
    Row(
        sf.nn.Combiner,
        {"pattern": "axial", "segment": 3, "log_size": True, "positions": "none"},
        dense_combiner,
        note="axial",
    ),
    Row(
        sf.nn.Combiner,
        {"segment": 4, "log_size": True, "causal": False, "kv_heads": 2},
        dense_combiner,
        [({"pattern": "axial"}, "expected 'fixed'"), ({"causal": 2}, "True or False")],
        causal=False,
        decodes=False,
        note="both ways",
    ),
    Row(
        sf.nn.LongGenAttention,
        {"layer": 0, "layers": 5, "sparse": sf.methods.SinkWindow(window=3, sink_tokens=2), "kv_heads": 2},
        dense_self,
        [
            ({"layer": 5}, "less than layers"),
            ({"share": 2}, "share"),
            ({"sparse": "sink"}, "no method"),
            ({"method": "window"}, "give sparse="),
        ],
    ),
    Row(sf.nn.GatedConvolution, {"size": 4}, dense_convolution, [({"size": 0}, ">= 1")]),
    Row(
        sf.nn.Lookups,
        {"kv_heads": 2, "lookups": 2, "penalty": 0.5},
        dense_lookups,
        [
            ({"size": 0}, ">= 1"),
            ({"penalty": -1}, ">= 0"),
            ({"threshold": 2}, "share"),
            ({"lookups": 0}, ">= 1"),
        ],
    ),
    Row(sf.nn.Lookups, {"size": 1}, dense_lookups, prepare=lambda layer: layer.eval(), note="eval"),
    Row(
        sf.nn.SeqBoat,
        {"window": 2, "inner": 12, "size": 3},
        dense_seqboat,
        [
            ({"window": 0}, ">= 1"),
            ({"inner": 10}, "multiple of heads"),
            ({"law": "relu"}, "'softmax' or 'relu2'"),
            ({"temperature": 0}, "positive"),
        ],
    ),
    Row(
        sf.nn.SeqBoat,
        {"window": 3, "law": "relu2", "size": 2, "positions": "none"},
        dense_seqboat,
        note="relu2",
    ),
    Row(together, {}, dense_together, [({"near": 0}, ">= 1")]),
    Row(
        sf.nn.HRSAMAttention,
        {"window": 3, "columns": 5},
        dense_hrsam,
        [
            ({"window": 0}, ">= 1"),
            ({"shifted": 1}, "True or False"),
            ({"head_dim": 6}, "multiple of 4"),
            ({"spacing": 0}, "positive number"),
        ],
        causal=False,
    ),
    Row(
        sf.nn.HRSAMAttention,
        {"window": 4, "columns": 6, "shifted": True, "positions": "none"},
        dense_hrsam,
        causal=False,
        note="shifted",
    ),
    Row(
        sf.nn.CyclicScan,
        {"state": 3, "repeats": 2},
        dense_cyclic,
        [({"state": 0}, ">= 1"), ({"repeats": 0}, ">= 1")],
        causal=False,
    ),
    Row(
        sf.nn.SparsifinerAttention,
        {"tokens": 160, "mixtures": 6, "keep": 0.3, "top": 4},
        dense_sparsifiner,
        [
            ({"keep": 0}, "share"),
            ({"top": 0}, ">= 1"),
            ({"phase": "dense"}, "'reconstruct' or 'sparse'"),
            ({"weight": -1}, ">= 0"),
        ],
        causal=False,
    ),
    Row(
        sf.nn.SparsifinerAttention,
        {"tokens": 160, "mixtures": 6, "phase": "reconstruct", "scaling": "heads"},
        dense_sparsifiner,
        causal=False,
        note="reconstruct",
    ),
]

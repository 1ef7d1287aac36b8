"""Base of all layers: `[B, T, width]` in and out, an auxiliary loss, weight reset, and a decoding state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..backends.numerics import state_dtype
from ..common.errors import SparseFlashError, require
from ..ops._arguments import AnyPlan
from ..plan.options import is_count

Positions = Literal["rotary", "none"]


def rotate(x: Tensor, offset: int | Tensor = 0, base: float = 10_000.0) -> Tensor:
    """Apply rotary positions to `x [B,H,T,D]`: element i of a head is paired with element i + D/2.

    The angle of token t is its position, `offset + t` (or `offset[t]`), times the frequency
    `base ** (-2 i / D)`, computed in float32 or better.
    """
    wide = state_dtype(x)
    half = torch.arange(0, x.shape[-1], 2, dtype=torch.float64, device=x.device) / x.shape[-1]
    if isinstance(offset, Tensor):
        place = offset.double()
    else:
        place = torch.arange(offset, offset + x.shape[-2], dtype=torch.float64, device=x.device)
    angle = place[:, None] * base**-half
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


@dataclass
class State:
    """State that a layer carries from one part of a sequence to the next and updates in place.

    Parameters
    ----------
    batch : int
        Sequences that are decoded together.
    length : int
        Tokens that the layer has seen.
    tensors : dict
        What the layer keeps of those tokens: a cache, a memory. Empty before the first token.
    """

    batch: int
    length: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _room: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        """Append tokens `[B,H,n,...]` to the kept ones and return all; capacity doubles as needed."""
        for name, x in new.items():
            old = self.tensors.get(name)
            if old is None:
                self.tensors[name] = x
            elif torch.is_grad_enabled():
                self.tensors[name] = torch.cat([old, x], 2)
            else:
                at, end = old.shape[2], old.shape[2] + x.shape[2]
                room = self._room.get(name)
                if room is None or room.shape[2] < end or room.data_ptr() != old.data_ptr():
                    room = old.new_empty((*old.shape[:2], 2 * end, *old.shape[3:]))
                    room[:, :, :at] = old
                    self._room[name] = room
                room[:, :, at:end] = x
                self.tensors[name] = room[:, :, :end]
        return tuple(self.tensors[name] for name in new)

    def detach_(self) -> State:
        """Detach all tensors: no gradient flows back beyond this point."""
        self.tensors = {name: x.detach() for name, x in self.tensors.items()}
        return self


class Layer(nn.Module):
    """Base of all layers.

    A layer maps `x [B, T, width]` to the same shape, causally unless its docstring says otherwise. After a
    forward, `aux_loss` is a 0-d tensor to add to the loss (0 where a layer has none). `reset(generator)`
    draws fresh weights. `update()`, once a training step, learns what has no gradient (centroids).

    Parameters
    ----------
    width, heads : int
        Width of x, and number of query heads.
    kv_heads : int, optional
        Heads of keys and values, a divisor of `heads`; `heads` by default.
    head_dim : int, optional
        `width / heads` by default.
    positions : "rotary" or "none"
        Whether queries and keys get rotary position embeddings.
    base : float
        Base of the rotary frequencies.

    Notes
    -----
    A subclass implements `mix`, and calls `reset` at the end of its `__init__`. A layer that can drop single
    attention weights takes `dropout` and passes it to `leave_out`.
    """

    takes_plan: ClassVar[bool] = False
    """Whether a caller's plan can replace the layer's own choice of keys."""
    decodes: ClassVar[bool] = True
    """Whether the layer decodes with a state."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Positions = "none",
        base: float = 10_000.0,
    ) -> None:
        super().__init__()
        require(
            (is_count(width, 1), lambda: f"width={width!r}: expected a positive int"),
            (is_count(heads, 1), lambda: f"heads={heads!r}: expected a positive int"),
        )
        kv_heads = heads if kv_heads is None else kv_heads
        require(
            (
                is_count(kv_heads, 1) and heads % kv_heads == 0,
                lambda: f"kv_heads={kv_heads!r}: expected a divisor of heads={heads}",
            ),
            (
                head_dim is not None or width % heads == 0,
                lambda: f"width={width} is no multiple of heads={heads}: give head_dim=",
            ),
        )
        head_dim = width // heads if head_dim is None else head_dim
        require(
            (is_count(head_dim, 1), lambda: f"head_dim={head_dim!r}: expected a positive int"),
            (positions in ("rotary", "none"), lambda: f"positions={positions!r}: expected rotary or none"),
            (
                positions == "none" or head_dim % 2 == 0,
                lambda: f"head_dim={head_dim} is odd, and rotary positions turn pairs: or positions='none'",
            ),
            (
                isinstance(base, (int, float)) and not isinstance(base, bool) and base > 0,
                lambda: f"base={base!r}: expected a positive number",
            ),
        )
        self.width, self.heads, self.kv_heads, self.head_dim = width, heads, kv_heads, head_dim
        self.positions: Positions = positions
        self.base, self.dropout = float(base), 0.0
        self._aux: Tensor | None = None

    def leave_out(self, dropout: float) -> None:
        """Set the share of attention weights to drop in training, as in `torch.nn.MultiheadAttention`."""
        real = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
        require((real and 0 <= dropout < 1, lambda: f"dropout={dropout!r}: expected a share in [0, 1)"))
        self.dropout = float(dropout)

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Run the layer on a batch of whole sequences, or on the next tokens of the sequences in `state`."""
        raise NotImplementedError(f"{type(self).__name__}.mix")

    def forward(
        self,
        x: Tensor,
        *,
        plan: AnyPlan | None = None,
        state: State | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Mix along the sequence.

        Parameters
        ----------
        x : Tensor
            `[B, T, width]`.
        plan : Plan or tuple of Plan, optional
            Keys each query attends to, instead of the layer's own choice; only if `takes_plan`.
        state : State, optional
            From `new_state`: x continues the sequences in it, and the state then includes x.
        cu_seqlens : Tensor or list of int, optional
            `[n + 1]`, prefix sums from 0 to T: edges of documents packed in each row of x, which do not mix.
        """
        name = type(self).__name__
        good = isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == self.width and x.is_floating_point()
        if not good:
            given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise SparseFlashError(f"x: {given}; expected floating point [B, T, width={self.width}]")
        if plan is not None:
            require(
                (
                    self.takes_plan,
                    lambda: f"{name} chooses itself what is seen and takes no plan; documents: cu_seqlens=",
                ),
                (state is None, "plan together with state: a plan is for whole sequences"),
                (cu_seqlens is None, "plan together with cu_seqlens: Plan.from_documents(cu_seqlens) is one"),
            )
        if state is not None:
            require(
                (
                    isinstance(state, State),
                    lambda: f"state: {type(state).__name__}; expected {name}.new_state(batch)",
                ),
                (cu_seqlens is None, "state together with cu_seqlens: one state holds one document a row"),
            )
            require(
                (x.shape[0] == state.batch, lambda: f"x has batch size {x.shape[0]}, its state {state.batch}")
            )
        self._aux = None
        if cu_seqlens is None:
            out = self.mix(x, plan, state)
            if state is not None:
                state.length += x.shape[1]
            return out
        return self.packed(x, _edges(cu_seqlens, x.shape[1]))

    def packed(self, x: Tensor, edges: list[int]) -> Tensor:
        """Run the layer on documents packed in each row: one by one, unless a subclass overrides this."""
        parts, losses = [], []
        for lo, hi in zip(edges, edges[1:]):
            parts.append(self.mix(x[:, lo:hi], None, None))
            if self._aux is not None:
                losses.append(self._aux * ((hi - lo) / max(1, x.shape[1])))
        self._aux = torch.stack(losses).sum() if losses else None
        return torch.cat(parts, 1) if parts else x[:, :0]

    @property
    def dropout_p(self) -> float:
        """Dropout probability in effect: `dropout` in training, 0 in evaluation."""
        return self.dropout if self.training else 0.0

    @property
    def aux_loss(self) -> Tensor:
        """Auxiliary loss of the last forward, a 0-d tensor; 0 if there is none."""
        return next(self.parameters()).new_zeros(()) if self._aux is None else self._aux

    def new_state(self, batch: int) -> State:
        """Make an empty state for `batch` sequences, to pass to every forward over their tokens."""
        require(
            (self.decodes, lambda: f"{type(self).__name__} has no state: it reads whole sequences"),
            (is_count(batch), lambda: f"batch={batch!r}: expected an int >= 0"),
        )
        return State(batch)

    @torch.no_grad()
    def update(self) -> None:
        """Learn from the last forward what has no gradient, once a training step; a no-op in most layers."""

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights, reproducible by generator: normal with std 1 / sqrt(inputs); biases 0."""
        for weight in self.parameters():
            draw(weight, weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.0, generator)

    def reset_parameters(self) -> None:
        """Call `reset` with the global generator, under the name that torch.nn modules use."""
        self.reset()

    def extra_repr(self) -> str:
        """One-line description of the shape."""
        few = f", kv_heads={self.kv_heads}" if self.kv_heads != self.heads else ""
        own = f", head_dim={self.head_dim}" if self.head_dim * self.heads != self.width else ""
        less = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.width}, {self.heads}{few}{own}, positions={self.positions!r}{less}"

    def __getstate__(self) -> dict[str, Any]:
        """State without the auxiliary loss, whose graph can be neither copied nor pickled."""
        return {**self.__dict__, "_aux": None}

    def linear(self, inputs: int, outputs: int, bias: bool, device: Any, dtype: Any) -> nn.Linear:
        """Make an uninitialised linear layer; `reset` fills its weights."""
        made: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]  # torch declares none
            nn.Linear, inputs, outputs, bias=bias, device=device or "cpu", dtype=dtype
        )
        return made

    def project_heads(self, *, bias: bool = False, device: Any = None, dtype: Any = None) -> None:
        """Make the projections `query`, `key`, `value` and `output`."""
        own, few = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.query = self.linear(self.width, own, bias, device, dtype)
        self.key = self.linear(self.width, few, bias, device, dtype)
        self.value = self.linear(self.width, few, bias, device, dtype)
        self.output = self.linear(own, self.width, bias, device, dtype)

    def split(self, x: Tensor) -> Tensor:
        """Split `[B, T, H * head_dim]` into heads `[B, H, T, head_dim]`."""
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """Join heads `[B, H, T, head_dim]` to `[B, T, H * head_dim]`."""
        return x.transpose(1, 2).flatten(2)

    def end(self, x: Tensor) -> Tensor:
        """Join heads `[B, H, T, head_dim]` and apply the output projection."""
        found: Tensor = self.output(self.join(x))
        return found

    def turn(self, x: Tensor, state: State | None, at: int = 0) -> Tensor:
        """Rotate heads by their positions, if positions are rotary."""
        if self.positions == "none":
            return x
        return rotate(x, at if state is None else state.length, self.base)


@torch.no_grad()
def draw(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill a weight with normal numbers, equal in every dtype, drawn on the generator's device."""
    if std == 0.0:
        weight.zero_()
        return
    where = weight.device if generator is None else generator.device
    found = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device=where)
    weight.copy_(found * std)


def update(model: nn.Module) -> None:
    """Call `Layer.update` on every layer of a model.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sf.nn.update(sf.nn.SelfAttention(32, 2))
    """
    for module in model.modules():
        if isinstance(module, Layer):
            module.update()


def rms(x: Tensor) -> Tensor:
    """Divide each vector by its root mean square."""
    return nn.functional.rms_norm(x, (x.shape[-1],))


def survivors(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the true entries along the last axis, in order and padded in front, and which are real.

    A row with fewer true entries than the fullest row begins with indices of false entries.
    """
    most = int(keep.sum(-1).max()) if keep.numel() else 0
    place = keep.to(torch.int8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - most :]
    return place, keep.gather(-1, place)


def check_choice(**given: tuple[Any, Sequence[Any]]) -> None:
    """Raise unless each option is one of its allowed values."""
    for name, (x, known) in given.items():
        require((x in known, lambda: f"{name}={x!r}: expected {' or '.join(map(repr, known))}"))


def check_sizes(least: int = 1, **given: Any) -> None:
    """Raise unless each option is an int >= `least`."""
    for name, x in given.items():
        require((is_count(x, least), lambda: f"{name}={x!r}: expected an int >= {least}"))


def _edges(cu_seqlens: Tensor | Sequence[int], T: int) -> list[int]:
    """Document edges as a checked list of ints."""
    edges = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    good = (
        len(edges) > 0
        and edges[0] == 0
        and edges[-1] == T
        and all(isinstance(x, int) for x in edges)
        and all(a <= b for a, b in zip(edges, edges[1:]))
    )
    require((good, lambda: f"cu_seqlens={edges!r:.80}: expected ints that rise from 0 to T={T}"))
    return edges

"""`Shared`: the prompt of many samples, held and read once; each sample adds what is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops.attention import attention
from ..ops.decode import decode
from ..plan import Plan
from ..plan.options import TILE, is_count
from .base import Attended, Call, check_new
from .files import kind


@dataclass(frozen=True)
class Share:
    """That rows of a batch with one prompt hold it together: what `Shared` is made with.

    Parameters
    ----------
    room : int
        Tokens of its own that a sample has room for at first; the room doubles when it is full.
    """

    room: int = 256

    def __post_init__(self) -> None:
        require((is_count(self.room, 1), lambda: f"room={self.room!r}: expected an int >= 1, tokens"))


@kind
class Shared(Attended):
    """Keys and values of prompts, each held once, and behind them those of the samples drawn from each.

    One tensor holds a prompt and the tokens of its samples, a slot of `room` places a sample. The queries of
    all samples of a prompt attend as those of one sequence: a plan shows the prompt to all of them, a second
    one to each the tokens of its own slot. So the kernel reads a prompt once for all samples, not once for
    each (bifurcated attention: Athiwaratkun et al., arXiv 2403.08845), and the softmax over both is exact.
    Reordering beams permutes slots and leaves prompts where they are. Inference only.

    Parameters
    ----------
    how : Share, optional
        How much room a sample has.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Shared(sf.cache.Share(room=16))
    >>> q, k, v = torch.randn(1, 4, 1000, 64), *torch.randn(2, 1, 2, 1000, 64)
    >>> cache.attend(q, k, v).shape
    torch.Size([1, 4, 1000, 64])
    >>> cache.batch_repeat_interleave(8)  # eight samples
    >>> cache.attend(torch.randn(8, 4, 1, 64), *torch.randn(2, 8, 2, 1, 64)).shape
    torch.Size([8, 4, 1, 64])
    >>> cache.tokens, cache.bytes == 2 * 2 * 64 * 4 * (1000 + 8 * 16)
    (1001, True)
    """

    def __init__(self, how: Share = Share()) -> None:
        require((isinstance(how, Share), lambda: f"how={how!r}: expected cache.Share()"))
        self.how = how
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._keys: Tensor | None = None  # [P,Hkv,prompt + slots * room,D]
        self._values: Tensor | None = None
        self._first: Tensor | None = None  # [P]: the first key of each prompt that is no padding
        self._lead: Tensor | None = None  # [P,slots]: padding in front of a sample's own tokens
        self._of = self._slot = torch.zeros(0, dtype=torch.long)  # [B]: prompt and slot of each row
        self._prompt = self._own = self._slots = self._room = 0

    @property
    def tokens(self) -> int:
        """Tokens of each row: those of its prompt and its own."""
        return self._prompt + self._own

    @property
    def prompts(self) -> int:
        """Prompts that are held."""
        return 0 if self._keys is None else self._keys.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values, prompts first and the slots of their samples behind."""
        own = {"keys": self._keys, "values": self._values, "first": self._first, "lead": self._lead}
        return {name: x for name, x in own.items() if x is not None}

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]` behind the others; into an empty layer, prompts."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise SparseFlashError("keys of shared prompts have no gradients: append under torch.no_grad()")
        if self._keys is None or self._values is None:
            check_new(k, v, None, None)
            self._keys, self._values, self._prompt = k.contiguous(), v.contiguous(), k.shape[2]
            self._of = torch.arange(len(k), device=k.device)
            self._slot = torch.zeros_like(self._of)
            return
        check_new(k, v, self._rows_like(self._keys), self._rows_like(self._values))
        end = self._own + k.shape[2]
        if end > self._room or not self._slots:
            self._arrange(self._of, self._slot, max(self.how.room, 2 * self._room, end))
        for x, new in ((self._keys, k), (self._values, v)):
            self._own_part(x)[self._of, :, self._slot, self._own : end] = new
        self._own = end

    def _rows_like(self, x: Tensor) -> Tensor:
        """A tensor with the sizes that new rows have to have."""
        return x[:1, :, :0].expand(len(self._of), -1, -1, -1)

    def _own_part(self, x: Tensor) -> Tensor:
        """The slots `[P,Hkv,slots,room,D]` behind the prompts, in place."""
        return _in_slots(x, self._prompt, self._slots)

    def _arrange(self, of: Tensor, slot: Tensor, room: int) -> None:
        """Go on with rows that have these prompts and go on behind these slots, each in a slot of its own."""
        assert self._keys is not None and self._values is not None
        used, now = torch.unique(of, return_inverse=True)
        order = torch.argsort(now, stable=True)
        counts = torch.bincount(now, minlength=len(used))
        place = torch.empty_like(now)  # which row of its prompt each one is
        place[order] = torch.arange(len(now), device=now.device) - (counts.cumsum(0) - counts)[now[order]]
        slots, kept = int(counts.max()) if len(now) else 0, self._own

        def moved(x: Tensor) -> Tensor:
            P, H, _, D = x.shape
            whole = len(used) == P
            if whole and not room and x.shape[2] == self._prompt:
                return x
            new = x.new_zeros(len(used), H, self._prompt + slots * room, D)
            new[:, :, : self._prompt] = x[:, :, : self._prompt] if whole else x[used, :, : self._prompt]
            if kept:
                into = _in_slots(new, self._prompt, slots)
                into[now, :, place, :kept] = self._own_part(x)[of, :, slot, :kept]
            return new

        same = (slots, room, len(used)) == (self._slots, self._room, self.prompts)
        if same and kept:  # the prompts stay where they are
            for x in (self._keys, self._values):
                own = self._own_part(x)
                own[now, :, place, :kept] = own[of, :, slot, :kept]
        elif not same:
            self._keys, self._values = moved(self._keys), moved(self._values)
        if self._lead is not None:
            lead = self._lead.new_zeros(len(used), slots)
            lead[now, place] = self._lead[of, slot]
            self._lead = lead
        self._first = None if self._first is None else self._first[used]
        self._of, self._slot, self._slots, self._room = now, place, slots, room

    def plan(self, Tq: int = 1) -> tuple[Plan, Plan]:
        """What the last Tq tokens of all slots see: their prompt, and their own slot.

        Query `slot * Tq + i` of a prompt is the i-th of these tokens of that slot.
        """
        assert self._keys is not None
        m, device, P = self._prompt, self._keys.device, self.prompts
        rows, Tk = self._slots * Tq, self._keys.shape[2]
        tile = max(1, min(rows, TILE))
        begin = torch.zeros(1, dtype=torch.long, device=device) if self._first is None else self._first
        shared = torch.stack([begin, torch.full_like(begin, m)], -1).view(-1, 1, 1, 1, 2)
        shared = shared.expand(-1, 1, -(-rows // tile), 1, 2)
        start = m + torch.arange(self._slots, device=device)[:, None] * self._room
        end = start + torch.arange(self._own - Tq + 1, self._own + 1, device=device)
        low = start.expand_as(end)[None]
        if self._lead is not None:
            low = torch.minimum(low + self._lead[:, :, None], end)
        own = torch.stack([low, end.expand_as(low)], -1).view(-1, 1, rows, 1, 2)
        return (
            Plan.from_spans(shared if P > 1 else shared[:1], Tq=rows, Tk=Tk, tile=tile),
            Plan.from_spans(own, Tq=rows, Tk=Tk, tile=1),
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        first = None if call.real is None else _padding(call.real)
        if self._keys is None:
            self.append(k, v)
            self._first = first
            out: Tensor = (call.new or attention)(q, k, v, call.among_new(q), **call.options)
            return out
        if first is not None and self._own:
            raise SparseFlashError(
                "padding between tokens of samples of one prompt: expected rows of one length after the "
                "first tokens behind the prompt"
            )
        self.append(k, v)
        assert self._keys is not None and self._values is not None
        if first is not None:
            self._lead = first.new_zeros(self.prompts, self._slots)
            self._lead[self._of, self._slot] = first
        P, r, (B, H, n, D) = self.prompts, self._slots, q.shape
        at = self._of * r + self._slot
        in_order = B == P * r and bool((at[1:] > at[:-1]).all())
        together = q if in_order else q.new_zeros(P * r, H, n, D).index_copy_(0, at, q)
        together = together.reshape(P, r, H, n, D).transpose(1, 2).reshape(P, H, r * n, D)
        out = decode(together, self._keys, self._values, self.plan(n), **call.options)
        out = out.view(P, H, r, n, -1).transpose(1, 2).flatten(0, 1)
        return out if in_order else out[at]

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order: their own tokens are copied, prompts are not."""
        if self._keys is None:
            return
        at = rows.to(self._of.device)
        self._arrange(self._of[at], self._slot[at], self._room)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`select_rows`, for samples of one prompt."""
        self.select_rows(torch.arange(len(self._of)).repeat_interleave(repeats))

    def crop(self, n: int) -> None:
        """Forget tokens at the end: all but the first n, or, below 0, so many; of prompts for all samples."""
        n = self._left(n)
        if self._keys is None or self._values is None:
            return
        if n < self._prompt:
            self._own = 0
            self._keys, self._values = (x[:, :, :n].clone() for x in (self._keys, self._values))
            self._prompt, self._room, self._slots, self._lead = n, 0, 0, None
        self._own = max(0, n - self._prompt)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file is to hold: tensors and options."""
        held = self.tensors() | {"of": self._of, "slot": self._slot}
        sizes = {name: getattr(self, f"_{name}") for name in ("prompt", "own", "slots", "room")}
        return held, {"first_room": self.how.room, **sizes}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """A layer of what a file held."""
        made = cls(Share(options.pop("first_room")))
        for name, x in (tensors | options).items():
            setattr(made, f"_{name}", x)
        return made


def _in_slots(x: Tensor, prompt: int, slots: int) -> Tensor:
    """The places behind the prompts of `x [P,H,n,D]`, as slots `[P,H,slots,room,D]`: a view."""
    P, H, n, D = x.shape
    return x[:, :, prompt:].view(P, H, slots, (n - prompt) // slots, D)


def _padding(real: Tensor) -> Tensor:
    """How many tokens on the left of each row `real [B,n]` are padding; others may not be."""
    first = real.shape[1] - real.sum(1)
    if bool((real != (torch.arange(real.shape[1], device=real.device) >= first[:, None])).any()):
        raise SparseFlashError(
            "padding behind tokens of a prompt that rows share: expected it on the left (padding_side='left')"
        )
    return first

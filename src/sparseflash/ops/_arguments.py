"""Argument checks shared by all ops, and their error messages.

Each message says what was given, what is expected, and how to fix it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..backends.numerics import state_dtype
from ..common.errors import PlanError, SparseFlashError
from ..plan import Plan

AnyPlan = Plan | Sequence[Plan]
"""A plan, or the disjoint plans of one softmax."""
LARGEST = 2**31 - 1
"""Clamp for block sizes: more tokens than any tensor has."""
WIDEST = 576
"""Largest head dimension of softmax attention: an MLA latent (512) and its rotary part (64)."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(x: object) -> str:
    """Describe a tensor by shape, dtype and device, anything else by its type."""
    if isinstance(x, Tensor):
        return f"{list(x.shape)} {x.dtype} on {x.device}"
    name = type(x).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def said(**given: object) -> str:
    """Describe arguments by name, for an error message."""
    return ", ".join(f"{name}: {describe(x)}" for name, x in given.items())


def check_unknown(
    op: str, given: Mapping[str, object], elsewhere: Mapping[str, str], known: Iterable[str] = ()
) -> None:
    """Refuse unknown arguments, except those of other libraries (`elsewhere`) if None, False or no dropout.

    For any other name the message suggests the closest one of `known`.
    """
    for name, value in given.items():
        nothing = value is None or value is False or (name.startswith("dropout") and value == 0)
        if name not in elsewhere or not nothing:
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"see help(sparseflash.{op})"
            raise SparseFlashError(f"{op}() has no argument {name!r}: {elsewhere.get(name, hint)}")


FINITE = sys.float_info.max


def is_finite(x: object) -> TypeGuard[float]:
    """Whether x is a finite number (symbolic ones included, bools not)."""
    if isinstance(x, bool):
        return False
    if isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        return bool(-FINITE <= x <= FINITE)  # math.isfinite fails on symbols
    if not isinstance(x, Real):
        return False
    if hasattr(x, "item"):  # a NumPy scalar would cast FINITE to its own narrower dtype, and warn
        return is_finite(x.item())
    try:
        return is_finite(float(x))
    except OverflowError:  # a fraction beyond every float
        return False


def number_of(x: object) -> object:
    """Unwrap a 0-d CPU tensor without gradient to a number; return anything else unchanged."""
    if type(x) is Tensor and x.dim() == 0 and x.device.type == "cpu" and not x.requires_grad:
        return x.item()
    return x


def is_real(x: object, shape: Sequence[int], device: torch.device) -> bool:
    """Whether x is a floating point tensor of this shape on this device."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and tuple(x.shape) == tuple(shape)
        and x.device == device
    )


def as_plans(plan: object) -> tuple[Plan, ...]:
    """Convert a plan, or a tuple or list of plans, to a non-empty tuple of current plans."""
    if isinstance(plan, Plan):
        return (plan.current(),)
    plans = plan if isinstance(plan, (tuple, list)) else (plan,)
    for one in plans:
        if not isinstance(one, Plan):
            raise SparseFlashError(
                f"plan is {describe(one)}: expected a Plan, or a tuple of plans{_instead(one)}"
            )
    if not plans:
        raise SparseFlashError("plan is an empty tuple: give at least one plan")
    return tuple(one.current() for one in plans)


def _instead(x: object) -> str:
    """Hint how to get a plan from x, which was given instead of one."""
    if isinstance(x, Tensor):
        return "; a bool mask becomes one by Plan.from_mask(mask)"
    if callable(getattr(x, "select", None)):
        return f": call it, {type(x).__name__}(...)(q, k, v), or give .select(q, k).plan"
    return ": give its .plan" if hasattr(x, "plan") else ""


def as_scale(scale: object, D: int) -> float:
    """Validate the factor of the scores; None means 1/sqrt(D)."""
    if scale is None:
        return float(D**-0.5)
    scale = number_of(scale)
    if not is_finite(scale):
        raise SparseFlashError(
            f"scale={scale!r}: expected a finite number, or None for 1/sqrt(D); one that learns, or lies on "
            "a device, belongs into q: q * scale"
        )
    return float(scale)


def as_softcap(softcap: object) -> float:
    """Validate the softcap; None becomes 0, which means no softcap."""
    if softcap is None:
        return 0.0
    softcap = number_of(softcap)
    if not (is_finite(softcap) and softcap >= 0):
        raise SparseFlashError(f"softcap={softcap!r}: expected a positive number, or None for none")
    return float(softcap)


def as_dropout(p: object, seed: object, q: Tensor) -> tuple[float, Tensor | None]:
    """Validate the dropout probability and its seed, drawing a seed if None; (0, None) for no dropout."""
    if type(p) is float and p == 0 and seed is None:  # the common case, fast
        return 0.0, None
    p = 0.0 if p is None else number_of(p)
    if not (is_finite(p) and 0 <= p < 1):
        raise SparseFlashError(f"dropout_p={p!r}: expected a number in [0, 1), 0 for none")
    good = seed is None or (isinstance(seed, Tensor) and seed.dim() == 0 and seed.dtype == torch.int64)
    if isinstance(seed, (int, torch.SymInt)) and not isinstance(seed, bool):
        good = bool(-(2**63) <= seed < 2**63)
    if not good:
        given = describe(seed) if isinstance(seed, Tensor) else repr(seed)
        raise SparseFlashError(
            f"dropout_seed: {given}; expected an int of 64 bits, or an int64 tensor of no dimensions; None "
            "draws one from the default generator of the device"
        )
    if not p:
        return 0.0, None
    if isinstance(seed, Tensor):
        return float(p), seed.to(q.device)
    if isinstance(seed, (int, torch.SymInt)):
        return float(p), torch.full((), seed, dtype=torch.int64, device=q.device)  # type: ignore[arg-type]  # SymInt
    return float(p), torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)


def as_backend(backend: object) -> str:
    """Validate a backend name; None becomes "", which means any."""
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise SparseFlashError(f"backend={backend!r}: expected a name, or None")
    return backend


def as_block(name: str, block: object) -> tuple[int, int]:
    """Validate (tile, unit), the query tokens x key tokens of a block, and clamp both to LARGEST."""
    if isinstance(block, (tuple, list)) and len(block) == 2:
        tile, unit = block
        if all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 1 for n in block):
            return min(tile, LARGEST), min(unit, LARGEST)
    raise SparseFlashError(f"{name}={block!r}: expected (tile, unit), two counts of tokens from 1 on")


def as_dtype(name: str, dtype: object, q: Tensor) -> torch.dtype | None:
    """Validate a result dtype: that of q or that of accumulators; None stays None."""
    if dtype is None or dtype in (q.dtype, state_dtype(q)):
        return dtype
    wide = f", {state_dtype(q)} (what sums are kept in)" if state_dtype(q) != q.dtype else ""
    raise SparseFlashError(f"{name}={dtype!r}: expected {q.dtype} (that of q){wide}, or None for that of q")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, widest: int = 256) -> None:
    """Check shapes, dtypes and devices of q, k and v; head dimensions go up to `widest`."""
    for x in (q, k, v):
        if not isinstance(x, Tensor) or x.dim() != 4 or x.layout != torch.strided:
            raise SparseFlashError(
                f"{said(q=q, k=k, v=v)}; expected dense 4-d tensors q [B,Hq,Tq,D], k [B,Hkv,Tk,D], "
                "v [B,Hkv,Tk,Dv]; packed ones go to attention_varlen, nested ones to jagged_attention"
            )
    (B, H, _, D), (Bk, heads, Tk, Dk), (Bv, v_heads, Tv, Dv) = q.shape, k.shape, v.shape
    rules = (
        (q.dtype in DTYPES, "expected fp32, fp16, bf16 (or fp64, reference only)"),
        (q.dtype == k.dtype == v.dtype, "expected one dtype: cast k and v to q's, or use autocast"),
        (q.device == k.device == v.device, "expected one device: use .to(q.device)"),
        (Bk == Bv and Bk in (1, B), "k and v need the batch size of q, or 1 (a pool)"),
        (heads == v_heads, "k and v need the same number of heads"),
        (heads > 0 and H % heads == 0, "Hq must be a multiple of Hkv (GQA): repeat or drop heads"),
        (Dk == D, "q and k need the same head dimension"),
        (Tk == Tv, "k and v need the same number of tokens"),
        (
            1 <= D <= widest and 1 <= Dv <= widest,
            f"head dimensions 1..{widest} are supported: use more heads",
        ),
    )
    for holds, message in rules:
        if not holds:
            fits = (Tk, heads) == (Tv, v_heads) and Tk > 0 and q.shape[2] % Tk == 0  # as [B,T,H,D]
            other = ". As [B,T,H,D] they would fit: give x.transpose(1, 2)" if fits and Dk == D else ""
            raise SparseFlashError(f"{said(q=q, k=k, v=v)}; {message}{other}")


def check_plan(plan: Plan, q: Tensor, k: Tensor) -> None:
    """Check that a plan fits the shapes and the device of q and k."""
    B, H, Tq, _ = q.shape
    batch, heads = plan.extent()
    rules = (
        (
            plan.Tq == Tq and plan.Tk == k.shape[2],
            "the plan is for {plan.Tq} x {plan.Tk} tokens, q and k hold {Tq} x {Tk}: "
            "make one for these{padded}",
        ),
        (batch in (1, B), "the plan has batch size {batch}, q has {B}: expected 1 or {B}"),
        (H % heads == 0, "the plan has {heads} heads: expected a divisor of Hq={H}"),
        (plan.device == q.device, "the plan is on {plan.device}, q on {q.device}: use plan.to(q.device)"),
    )
    for holds, message in rules:
        if not holds:
            looks = plan.Tq == B != Tq and plan.Tk == k.shape[2]
            padded = ". A padding mask [B,Tk] is Plan.from_mask(mask[:, None, None], Tq=Tq)" if looks else ""
            given = {"plan": plan, "q": q, "B": B, "H": H, "Tq": Tq, "Tk": k.shape[2], "padded": padded}
            raise PlanError(message.format(**given, batch=batch, heads=heads))


def check_bias(key_bias: object, q: Tensor, k: Tensor) -> None:
    """Check that key_bias holds one number per key."""
    B, H, Tk = q.shape[0], q.shape[1], k.shape[2]
    good = isinstance(key_bias, Tensor) and key_bias.dim() == 3 and key_bias.is_floating_point()
    if good:
        assert isinstance(key_bias, Tensor)
        batch, heads, length = key_bias.shape
        good = (
            batch in (1, B) and heads > 0 and H % heads == 0 and length == Tk and key_bias.device == q.device
        )
    if not good:
        raise SparseFlashError(
            f"key_bias: {describe(key_bias)}; expected floating point [B|1, H, Tk={Tk}] on {q.device}, H "
            f"dividing {H}: one number a key; pair_bias takes one for each pair, and what is hidden is a plan"
        )


def check_pairs(alibi_slopes: object, pair_bias: object, q: Tensor, k: Tensor) -> None:
    """Check the shapes of alibi_slopes (per head, no gradient) and pair_bias (per pair or per distance)."""
    B, H, Tq, Tk = *q.shape[:3], k.shape[2]
    distances = max(Tq + Tk - 1, 0)
    given = {"alibi_slopes": alibi_slopes, "pair_bias": pair_bias}
    for name, x in given.items():
        if x is None:
            continue
        good = isinstance(x, Tensor) and x.is_floating_point() and x.device == q.device
        if good and isinstance(x, Tensor):
            shape = tuple(x.shape)
            sizes = (B, H, Tq, Tk) if len(shape) == 4 else (B, H)
            own = all(n in (1, size) for n, size in zip(shape, sizes))
            by_distance = len(shape) == 3 and own and shape[2] == distances
            fits = by_distance or (len(shape) == 4 and own)
            good = (shape in ((H,), (B, H))) if name == "alibi_slopes" else fits
        if not good:
            wanted = f"[{B}|1, {H}|1, {Tq}|1, {Tk}|1], or by distance [{B}|1, {H}|1, Tq+Tk-1={distances}]"
            wanted = f"[Hq={H}] or [{B},{H}]" if name == "alibi_slopes" else wanted
            raise SparseFlashError(f"{name}: {describe(x)}; expected floating point {wanted} on {q.device}")
        assert isinstance(x, Tensor)
        if name == "alibi_slopes" and x.requires_grad and torch.is_grad_enabled():
            raise SparseFlashError(
                "alibi_slopes requires a gradient, and has none: give alibi_slopes.detach(); what learns is "
                "key_bias or pair_bias"
            )


def check_sink(sink_logits: object, q: Tensor) -> None:
    """Check that sink_logits holds one number per query head."""
    if not is_real(sink_logits, q.shape[1:2], q.device):
        raise SparseFlashError(
            f"sink_logits: {describe(sink_logits)}; expected floating point [Hq={q.shape[1]}] on {q.device}"
        )


def casts(kind: str) -> bool:
    """Whether autocast is enabled for a device type."""
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def autocast(*tensors: Any) -> list[Any]:
    """Cast the tensors to the autocast dtype if autocast is enabled, as for a matrix product."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not casts(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    able = (torch.float32, torch.float16, torch.bfloat16)
    return [x.to(dtype) if isinstance(x, Tensor) and x.dtype in able else x for x in tensors]

"""What the model learns from: the flow of noise to videos, a teacher's segments, a dense teacher's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .model import Velocity, VideoDiT, jump, times_of

Loss = Callable[[Tensor, torch.Generator], Tensor]
"""Loss of a batch of videos; the generator draws times and noise."""
OnRun = Callable[[str], None]


def noisy(videos: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos at times t [B] between themselves (0) and noise (1), and their velocities."""
    noise = torch.randn(videos.shape, generator=generator)
    return jump(videos, noise - videos, torch.zeros_like(t), t), noise - videos


def flow(model: Velocity) -> Loss:
    """Squared error of velocities at times drawn from [0, 1] (flow matching)."""

    def loss(videos: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.rand(len(videos), generator=generator)
        x, velocity = noisy(videos, t, generator)
        return (model(x, t) - velocity).square().mean()

    return loss


def consistency(
    student: Velocity, slow: Velocity, teacher: Velocity, x: Tensor, at: Tensor, *, fine: int, few: int
) -> Tensor:
    """Distance of a student's jump to the end of a segment from the one a step of the teacher later.

    `fine` steps of the teacher are `few` segments. From x at time t the student jumps to the end s of t's
    segment; the target goes one of the teacher's steps, then jumps to s with slowly moving weights of the
    student. Both are compared as mean velocities, over t - s, so that all steps of a segment count alike.

    Papers: Ding et al., arXiv 2502.06155, section 3.1.

    Parameters
    ----------
    x, at : Tensor
        Videos [B, frames, side, side], and the numbers [B] of their steps among the fine ones.
    """
    times, length = times_of(fine).to(x), fine // few
    t, near, end = times[at], times[at + 1], times[(at // length + 1) * length]
    with torch.no_grad():
        target = jump(x, teacher(x, t), t, near)
        target = jump(target, slow(target, near), near, end)
        target = (x - target) / (t - end).view(-1, 1, 1, 1)
    return (student(x, t) - target).square().mean()


def segments(student: Velocity, slow: Velocity, teacher: Velocity, *, fine: int, few: int) -> Loss:
    """Consistency at steps drawn from all fine ones."""

    def loss(videos: Tensor, generator: torch.Generator) -> Tensor:
        at = torch.randint(fine, (len(videos),), generator=generator)
        x, _ = noisy(videos, times_of(fine)[at], generator)
        return consistency(student, slow, teacher, x, at, fine=fine, few=few)

    return loss


def off(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error relative to that of 0."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)


def likeness(student: VideoDiT, teacher: VideoDiT, *, few: int) -> Loss:
    """Error of attention, mean over layers, and of velocities, at the sampler's few steps."""

    def loss(videos: Tensor, generator: torch.Generator) -> Tensor:
        t = times_of(few)[torch.randint(few, (len(videos),), generator=generator)]
        x, _ = noisy(videos, t, generator)
        with torch.no_grad():
            wanted, layers = teacher.hear(x, t)
        found, own = student.hear(x, t)
        return torch.stack([off(a, b) for a, b in zip(own, layers)]).mean() + off(found, wanted)

    return loss


@torch.enable_grad()  # models are made where a row first needs them
def fit(
    model: VideoDiT,
    loss: Loss,
    draw: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    rate: float,
    slow: VideoDiT | None = None,
    decay: float = 0.95,
    seed: int = 0,
    on_run: OnRun = lambda text: None,
) -> VideoDiT:
    """Train a model on batches that `draw` makes; `slow` follows its weights as their moving average."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 1.0, 1.1 - step / steps)
        cost = loss(draw(generator), generator)
        optimizer.zero_grad(set_to_none=True)
        cost.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if slow is not None:
            with torch.no_grad():
                for kept, weight in zip(slow.parameters(), model.parameters()):
                    kept.lerp_(weight, 1 - decay)
        if step % 20 == 0:
            on_run(f"step {step} of {steps}, loss {cost.item():.4f}")
    return model.eval()


def distilled(
    teacher: VideoDiT, draw: Callable[[torch.Generator], Tensor], *, fine: int, few: int, **options: Any
) -> VideoDiT:
    """A copy of the teacher that needs few steps: consistency distillation in segments."""
    student, slow = copy.deepcopy(teacher), copy.deepcopy(teacher)
    loss = segments(student, slow, teacher, fine=fine, few=few)
    return fit(student, loss, draw, slow=slow, **options)


def tuned(
    teacher: VideoDiT,
    student: VideoDiT,
    draw: Callable[[torch.Generator], Tensor],
    *,
    few: int,
    **options: Any,
) -> VideoDiT:
    """Train a sparse student to do in each layer what its dense teacher does."""
    return fit(student, likeness(student, teacher, few=few), draw, **options)

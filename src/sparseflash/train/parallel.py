"""Where this process runs: device, rank under ``torchrun``, and the few collectives the trainer needs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Its functions have the current process group as a default argument. The optimiser imports it anyway;
# importing it here, before any group exists, avoids that default keeping a group: gloo's threads would live
# on, and a thread that frees a tensor during interpreter shutdown aborts the process.
import torch.distributed.nn
from torch import Tensor, nn

from sparseflash.train.errors import TrainError


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process. A single process is a world of size 1 and needs no set-up."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def from_environment(cls, device: str = "auto") -> World:
        """Join the group ``torchrun`` describes in the environment, if there is one."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda"):
            raise TrainError(f"--device {device!r} is unknown; choose one of: auto, cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise TrainError("--device cuda was given but torch sees no GPU; use --device cpu")
        size = int(os.environ.get("WORLD_SIZE", 1))
        place = (
            torch.device(device, int(os.environ.get("LOCAL_RANK", 0)))
            if device == "cuda"
            else torch.device("cpu")
        )
        if device == "cuda":
            torch.cuda.set_device(place)
        if size == 1:
            return cls(device=place)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), place)

    def average_gradients(self, model: nn.Module) -> None:
        """Make every rank's gradients their mean over the world, in one collective."""
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def mean(self, value: Tensor) -> float:
        """Average a scalar over all ranks (their shares are equal)."""
        return self.total(value) / self.size

    def total(self, value: Tensor) -> float:
        """Sum a scalar over all ranks."""
        value = (
            value.detach()
            .to(self.device, torch.float64 if self.device.type == "cpu" else torch.float32)
            .clone()
        )
        if self.size > 1:
            dist.all_reduce(value)
        return value.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total(torch.tensor(float(flag))) > 0

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

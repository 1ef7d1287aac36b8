"""Train a Transformers model whose sequences are shared by processes, with `Trainer`.

    torchrun --nproc-per-node 2 examples/context_parallel.py --context-parallel 2
    torchrun --nproc-per-node 4 examples/context_parallel.py --context-parallel 2   # beside data parallel
    python examples/context_parallel.py                                             # the same losses, alone

A small Llama learns the text of this file. Each group of `--context-parallel` processes reads the same rows
and keeps a part of their tokens; the groups are data parallel. Two things do it: training inside
`sf.transformers.context_parallel`, and a loader that gives all processes of a group the same rows. `Trainer`
averages gradients over all processes, which is what both kinds of parallelism need.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sparseflash as sf


class Rows(IterableDataset):
    """Batches of rows drawn from a text: of all of them, those of one data-parallel group."""

    def __init__(self, text: bytes, length: int, rows: int, steps: int, group: int, groups: int) -> None:
        self.text, self.length, self.steps = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8),
            length,
            steps,
        )
        self.rows, self.own = rows, slice(group * rows // groups, (group + 1) * rows // groups)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            first = torch.randint(len(self.text) - self.length, (self.rows, 1), generator=generator)
            ids = self.text[first[self.own] + torch.arange(self.length)].long()
            yield {"input_ids": ids, "labels": ids}


class SharedRows(Trainer):
    """`Trainer` would hand every process other rows; here the data set itself knows which."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches as they are."""
        assert isinstance(self.train_dataset, Rows)
        return DataLoader(self.train_dataset, batch_size=None)


def main() -> None:
    """Train, and print the loss of every step on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context-parallel", type=int, default=1, help="processes that share a sequence")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, over all groups")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="context-parallel-run", help="folder for what Trainer writes")
    given = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    backend = None if "RANK" not in os.environ else "nccl" if kind == "cuda" else "gloo"
    arguments = TrainingArguments(
        given.out, max_steps=given.steps, logging_steps=1, learning_rate=3e-3, lr_scheduler_type="constant",
        save_strategy="no", report_to="none", disable_tqdm=True, seed=0, use_cpu=kind == "cpu",
        ddp_find_unused_parameters=False, ddp_backend=backend,
    )  # fmt: skip
    group, groups, index = None, 1, 0
    if dist.is_initialized():  # by TrainingArguments, under torchrun
        groups = dist.get_world_size() // given.context_parallel
        mesh = init_device_mesh(kind, (groups, given.context_parallel), mesh_dim_names=("dp", "cp"))
        group, index = mesh["cp"], mesh.get_local_rank("dp")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    rows = Rows(Path(__file__).read_bytes(), given.length, given.rows, given.steps, index, groups)
    trainer = SharedRows(model, arguments, train_dataset=rows)
    with sf.transformers.context_parallel(model, group):
        trainer.train()
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print("losses", *(f"{loss:.6f}" for loss in losses))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still sends
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

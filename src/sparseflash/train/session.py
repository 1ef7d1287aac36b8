"""A training run in a terminal: progress bar, notices, and what to do next."""

from __future__ import annotations

import sys
from pathlib import Path

from sparseflash.train.config import TrainConfig
from sparseflash.train.log import Row
from sparseflash.train.parallel import World
from sparseflash.train.trainer import Trainer

INTERRUPTED = 130  # the exit status shells use for Ctrl-C


def train(
    config: TrainConfig, directory: Path, *, resume: bool, device: str = "auto", init: Path | None = None
) -> int:
    """Run `config` into `directory` with a progress bar, from the weights of `init`; the exit status."""
    world = World.from_environment(device)
    try:
        trainer = Trainer(config, world=world)
        if init is not None:
            trainer.begin(init)
        return _train(trainer, directory, resume)
    finally:
        world.close()


def _train(trainer: Trainer, directory: Path, resume: bool) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    config, main = trainer.config, trainer.world.rank == 0
    console = Console(quiet=not main, highlight=False, soft_wrap=True)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(
        f"{config.attention} attention, T = {config.length}, {parameters / 1e6:.1f} M parameters, "
        f"{config.dtype}, {trainer.world.device.type} x {trainer.world.size}; "
        f"{trainer.corpus.name}: {len(trainer.corpus.train) / 1e6:.1f} MB in {trainer.corpus.files} file(s)"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (main and sys.stdout.isatty())) as bar:
        task = bar.add_task("training", total=config.steps)
        best = ""

        def on_row(row: Row) -> None:
            nonlocal best
            if row.val_bpb is not None:
                kept = "" if row.kept is None or row.kept == 1 else f"kept {row.kept:.3f}  "
                best = f", validation {row.val_bpb:.4f} bits per byte"
                console.print(
                    f"step {row.step:5d}  loss {row.loss:.4f}  validation {row.val_bpb:.4f} bits per byte  "
                    f"{kept}{row.ms_per_step:.0f} ms  {row.tokens_per_s:,.0f} tokens/s"
                )
            bar.update(
                task, completed=row.step, description=f"loss {row.loss:.3f}, {row.ms_per_step:.0f} ms/step"
            )

        try:
            trainer.run(directory, resume=resume, on_row=on_row, on_notice=console.print)
        except KeyboardInterrupt as stop:
            again = f"sparseflash train --resume --out {directory}"
            if stop.args:
                console.print(f"stopped; step {stop.args[0]} is saved. Continue with: {again}")
            else:
                console.print(f"stopped at once. Continue from the last checkpoint with: {again}")
            return INTERRUPTED
    console.print(
        f"done: {config.steps} steps{best}. Log, curves and checkpoint are in {directory}; "
        f'try: sparseflash sample {directory} --prompt "def "'
    )
    return 0

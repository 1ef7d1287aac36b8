"""The training loop: `Trainer.step` does one optimiser step, `Trainer.run` all of them, safely."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseflash.nn import State, update
from sparseflash.ops._arguments import AnyPlan
from sparseflash.plan import Plan, figures
from sparseflash.train import checkpoint, masked
from sparseflash.train.config import SHAPE, TrainConfig
from sparseflash.train.context import Context
from sparseflash.train.data import Corpus, load
from sparseflash.train.errors import TrainError
from sparseflash.train.log import FILE as LOG_FILE
from sparseflash.train.log import Log, Row, plot
from sparseflash.train.model import GPT
from sparseflash.train.parallel import World

SAVE_SECONDS = 120.0  # upper bound of lost work, for slow steps


class Trainer:
    """A model, its optimiser and its data, one step at a time.

    Parameters
    ----------
    config : TrainConfig
        What to train.
    corpus : Corpus, optional
        Data already in memory; by default ``config.data`` is read.
    world : World, optional
        Device and data-parallel group; by default one CPU process.

    Examples
    --------
    >>> from sparseflash.train import Corpus, TrainConfig, Trainer
    >>> corpus = Corpus([b"to be or not to be, that is the question. " * 50])
    >>> config = TrainConfig(data="", length=32, layers=1, width=32, heads=2, steps=2)
    >>> [row.step for row in (Trainer(config, corpus).step(), )]
    [1]
    """

    def __init__(self, config: TrainConfig, corpus: Corpus | None = None, world: World | None = None) -> None:
        self.config = config
        self.world = world or World()
        self.corpus = corpus or load(config.data)
        self.corpus.check(config.length)
        torch.manual_seed(config.seed)
        self.model = GPT(config).to(self.world.device)
        self.context = Context(self.world, config.context_parallel)
        if self.context.size > 1:
            self.context.share(self.model)
        named = list(self.model.named_parameters())
        free = [n.endswith(("embed.weight", "sharpness")) or p.dim() < 2 for n, p in named]
        groups = [
            {"params": [p for (_, p), f in zip(named, free) if not f], "weight_decay": config.weight_decay},
            {"params": [p for (_, p), f in zip(named, free) if f], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
        self.done = 0
        self.kept: float | None = None  # of the last validation, as in the log
        self.work: float | None = None

    def learning_rate(self, step: int) -> float:
        """Warm up linearly, then follow a cosine down to a tenth."""
        c = self.config
        warm = max(1, round(c.warmup * c.steps))
        if step < warm:
            return c.lr * (step + 1) / warm
        progress = (step - warm) / max(1, c.steps - warm)
        return c.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context manager that runs the model in bf16 if the config says so."""
        enabled = self.config.dtype == "bf16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=enabled)

    def step(self) -> Row:
        """Take one optimiser step over ``accumulate * batch`` sequences per process, or per group of them."""
        c, world, device = self.config, self.world, self.world.device
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.done)
        self.model.context["step"] = self.done
        total = torch.zeros((), device=device)
        groups, group = self.context.groups, self.context.group_rank
        for part in range(c.accumulate):
            first = (part * groups + group) * c.batch
            rows = slice(first, first + c.batch)
            tokens, targets = self.corpus.batch(
                c.seed, self.done, rows, groups * c.accumulate * c.batch, c.length
            )
            if c.dropout:  # seed by step and rows: distinct per process, and resumable
                own = (((c.seed << 24) + self.done) << 20) + part * groups + group
                torch.manual_seed(own % 2**63)
            weights = None
            if self.model.masked:
                seed = (c.seed * 1_000_003 + self.done) % 2**63
                tokens, targets, weights = masked.hide(tokens, seed, rows, groups * c.accumulate * c.batch)
                weights = weights.to(device)
            loss = self.loss(tokens.to(device), targets.to(device), weights=weights) / c.accumulate
            (loss + self.model.aux_loss() / c.accumulate).backward()
            total += loss.detach()
        for weight in self.model.parameters():
            if weight.grad is None:  # unused by this rank's tokens, maybe not by another's
                weight.grad = torch.zeros_like(weight)
        world.average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        mean = world.mean(total)
        if not math.isfinite(mean):
            raise TrainError(
                f"the loss became {mean} at step {self.done + 1}; use a smaller --lr than {c.lr}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update(self.model)
        self.done += 1
        seconds = time.perf_counter() - start
        tokens_per_s = groups * c.accumulate * c.batch * c.length / seconds
        return Row(self.done, mean, None, seconds * 1e3, tokens_per_s)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: list[State] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Mean loss in nats; under context parallelism, this rank's share, whose mean is the loss."""
        size = self.context.size
        if size == 1:
            with self.autocast():
                return self.model(tokens, targets, state=state, weights=weights)
        with self.context.of(tokens.shape[1]) as cp, self.autocast():
            own = [cp.shard(x, 1) for x in (tokens, targets)]
            loss = self.model(*own, positions=cp.positions.to(tokens.device))
        return loss * (own[0].shape[1] * size / tokens.shape[1])

    @torch.no_grad()
    def validate(self, length: int = 0) -> float:
        """Measure bits per byte on the held-out windows, which are the same for every run on this text.

        Of a masked model it is a bound from above, estimated from `masked.SHARES` masks of each window, which
        are the same for every run too.

        Parameters
        ----------
        length : int
            Bytes of a window; by default ``config.eval_length``, or ``config.length`` if that is 0.
        """
        c, world = self.config, self.world
        self.model.eval()
        self.model.context["step"] = 0
        total = torch.zeros(2, dtype=torch.float64)
        groups, group = self.context.groups, self.context.group_rank
        windows = self.corpus.validation(length or c.eval_length or c.length, c.eval_sequences)
        with self.model.watched() as plans:
            for number, (tokens, targets) in enumerate(windows):
                if number % groups != group:
                    continue
                if self.model.masked:
                    window, size = tokens.expand(masked.SHARES, -1), tokens.numel()
                    given = masked.hide(window, number, slice(None), masked.SHARES)
                    inputs, wanted, weights = (x.to(world.device) for x in given)
                    loss = self.loss(inputs, wanted, weights=weights)
                    total += torch.tensor([loss.item() * size, size], dtype=torch.float64)
                    continue
                parts = tokens.shape[1] > c.length and self.model.decodes
                state = self.model.new_state(len(tokens)) if parts else None
                size = c.length if parts else tokens.shape[1]
                for some, wanted in zip(tokens.split(size, 1), targets.split(size, 1), strict=True):
                    loss = self.loss(some.to(world.device), wanted.to(world.device), state)
                    total += torch.tensor([loss.item() * wanted.numel(), wanted.numel()], dtype=torch.float64)
        self.kept, self.work = self._shares(plans, length or c.eval_length or c.length)
        self.model.train()
        nats, count = (world.total(part) for part in total)
        return nats / count / math.log(2)

    def _shares(self, plans: dict[int, AnyPlan], length: int) -> tuple[float | None, float | None]:
        """Means of `kept` and `work` over layers, if all attended to whole sequences by plans or densely."""
        c = self.config
        if self.context.size > 1 or any(self.model.layers()) or (self.model.decodes and length > c.length):
            return None, None
        whole = Plan.dense(length, length, causal=not self.model.masked)
        found = [plans.get(n, whole) for n in range(c.layers)]
        kept, work = (sum(map(share, found)) / c.layers for share in (figures.kept, figures.work))
        return kept, work

    def begin(self, directory: str | Path) -> None:
        """Start from the weights of the run in `directory`, which may have another sequence length."""
        tensors, _ = checkpoint.load(Path(directory), ("config",))
        checkpoint.restore(tensors, self.model, path=Path(directory) / checkpoint.FILE)

    def save(self, directory: Path) -> None:
        """Write the checkpoint (rank 0 only): weights, optimiser, random state, data position."""
        if self.world.rank == 0:
            meta = {
                "step": self.done,
                "position": self.done,
                "data": self.corpus.fingerprint,
                "config": self.config.to_json(),
                "torch": torch.__version__,
            }
            checkpoint.save(directory, checkpoint.collect(self.model, self.optimizer), meta)

    def load(self, directory: Path) -> None:
        """Continue from the checkpoint in `directory`."""
        tensors, meta = checkpoint.load(directory)
        if meta["data"] != self.corpus.fingerprint:
            raise TrainError(
                f"{self.corpus.name} is not the text this run was started with; give the same --data, "
                "or start a new run in another --out"
            )
        at = directory / checkpoint.FILE
        checkpoint.restore(tensors, self.model, self.optimizer, step=meta["step"], path=at)
        self.done = meta["step"]

    def run(
        self,
        directory: str | Path,
        *,
        resume: bool = False,
        on_row: Callable[[Row], None] = lambda row: None,
        on_notice: Callable[[str], None] = lambda text: None,
    ) -> list[Row]:
        """Train to the end, logging and saving into `directory`.

        Ctrl-C (or a TERM signal) finishes the current step, saves, and raises `KeyboardInterrupt`.

        Parameters
        ----------
        directory : path
            Gets ``log.csv``, ``checkpoint.safetensors`` and ``curves.png``.
        resume : bool
            Continue the run in `directory` instead of starting one.
        on_row, on_notice : callable
            Called after every step, and with messages for the user.

        Returns
        -------
        list of Row
            The whole log.
        """
        directory = Path(directory)
        c, main = self.config, self.world.rank == 0
        refusal = _open(directory, resume) if main else None
        if self.world.any(refusal is not None):  # all ranks stop; rank 0 has the reason
            raise refusal or TrainError(f"the first process refused --out {directory}")
        if resume:
            self.load(directory)
        log = Log(directory, keep=self.done) if main else None
        if not resume:
            self.save(directory)
        saved_at, saved_step = time.monotonic(), self.done
        with _stop_requests(on_notice if main else lambda text: None) as stopped:
            while self.done < c.steps:
                row = self.step()
                if self.done % c.eval_every == 0 or self.done == c.steps:
                    row.val_bpb = self.validate()
                    row.kept, row.work = self.kept, self.work
                if log:
                    log.append(row)
                on_row(row)
                stop = self.world.any(bool(stopped))
                due = self.done % c.save_every == 0 or time.monotonic() - saved_at > SAVE_SECONDS
                if due or stop or self.done == c.steps:
                    self.save(directory)
                    saved_at, saved_step = time.monotonic(), self.done
                if stop and self.done < c.steps:
                    raise KeyboardInterrupt(saved_step)
        if log:
            plot(log.rows, directory / "curves.png", f"{c.attention}, T = {c.length}")
            return log.rows
        return []


def resume_config(directory: str | Path, given: dict[str, object]) -> TrainConfig:
    """Read the config of the run in `directory` and apply the explicitly `given` options.

    Options that define the shape of the model cannot change.
    """
    saved = checkpoint.read_config(Path(directory))
    for name in SHAPE:
        if name in given and given[name] != getattr(saved, name):
            option = f"--{name.replace('_', '-')}"
            raise TrainError(
                f"the checkpoint in {directory} is of another shape: {option} {getattr(saved, name)} there, "
                f"{given[name]} given; leave {option} out to resume, or use another --out"
            )
    return TrainConfig(**{**vars(saved), **given})


def init_config(directory: str | Path, given: dict[str, object]) -> TrainConfig:
    """Make the config of a new run that starts from the weights of the run in `directory`.

    Data, shape and attention are those of that run unless `given`; other options as `given` or by default.
    For longer sequences the rotary base grows, so that the slowest pair of a head rotates as far over the
    whole sequence as before.
    """
    saved = checkpoint.read_config(Path(directory))
    same = ("data", "objective", "attention", "layers", "width", "heads", "qk", "rope_base", "seed")
    if "attention" not in given:
        same += ("options",)
    config = TrainConfig(**{**{name: getattr(saved, name) for name in same}, **given})
    dim, longer = config.width // config.heads, config.length / saved.length
    if "rope_base" in given or longer <= 1 or dim <= 2:
        return config
    return replace(config, rope_base=saved.rope_base * longer ** (dim / (dim - 2)))


def _open(directory: Path, resume: bool) -> TrainError | None:
    """Create `directory` for a run, or check that it can resume; returns an error, or None."""
    if resume:
        try:
            checkpoint.read_meta(directory)
        except TrainError as error:
            return error
        return None
    if (directory / checkpoint.FILE).exists() or (directory / LOG_FILE).exists():
        return TrainError(
            f"--out {directory} already holds a run; continue it with: "
            f"sparseflash train --resume --out {directory}, or give another --out"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return TrainError(f"cannot create --out {directory}: {error.strerror}; give a writable directory")
    return None


@contextlib.contextmanager
def _stop_requests(notice: Callable[[str], None]) -> Iterator[list[int]]:
    """Collect INT and TERM signals in a list, so that a step finishes; a second signal interrupts it."""
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        notice("finishing this step, then saving (again to stop at once)")

    try:
        previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller handles signals
        previous = {}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)

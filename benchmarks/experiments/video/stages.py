"""The three stages, a row for each model: what it makes of the noise that the teacher began with."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.common.errors import require
from sparseflash.common.files import replacing
from sparseflash.methods import EfficientVDiT
from sparseflash.methods.base import Method
from sparseflash.methods.sparse_vdit import Call, smallest
from sparseflash.selection.calibrate import search

from ..claim.rows import Job
from .controls import DrawnFrames, OwnFrame
from .digits import moving
from .model import VideoDiT, generate, trajectory
from .quality import Frechet, distance, drift
from .training import OnRun, distilled, fit, flow, likeness, tuned

HELD_OUT = 0.1
"""Share of the digits, the last ones, that are not trained on."""
UNIFORM = ("uniform, k = 1", "uniform, k = 2", "uniform, k = 4")
CASES = ("searched", "random frames", "random tiles", *UNIFORM, "own frame")
LARGE = (16, 48, 4)
"""Frames, side and patch of a video of 2,304 tokens, which is timed alone."""


@dataclass(frozen=True)
class Settings:
    """Videos, model, and how long everything is trained; the `repr` stands in every row.

    Parameters
    ----------
    frames, side, digits : int
        Of a video.
    patch, width, heads, layers : int
        Of the model.
    steps, distil, tune : int
        Optimiser steps of the teacher, of stage 1 and of each student of stage 3.
    fine, few : int
        Steps of the sampler, of the teacher and after stage 1.
    bound : float
        Error of a layer's attention, relative to that of 0, below which it gets the fewest references.
    videos : int
        Videos that are judged.
    """

    frames: int = 8
    side: int = 24
    digits: int = 1
    patch: int = 6
    width: int = 128
    heads: int = 4
    layers: int = 4
    batch: int = 16
    steps: int = 3000
    distil: int = 400
    tune: int = 200
    rate: float = 2e-3
    fine: int = 32
    few: int = 8
    bound: float = 0.25
    videos: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            (
                self.fine % self.few == 0,
                lambda: (
                    f"fine={self.fine} steps are no whole segments: expected a multiple of few={self.few}"
                ),
            )
        )


class Study:
    """Models and videos of the settings, each made when it is asked for and kept in `folder`."""

    def __init__(
        self,
        images: Tensor,
        settings: Settings,
        folder: Path | None = None,
        on_run: OnRun = lambda text: None,
    ) -> None:
        split = round(len(images) * (1 - HELD_OUT))
        self.digits, self.unseen = images[:split], images[split:]
        self.settings, self.on_run = settings, on_run
        self.folder = folder
        self.made: dict[str, VideoDiT] = {}

    def generator(self, salt: int) -> torch.Generator:
        """A generator of its own for each purpose."""
        return torch.Generator().manual_seed(1000 * self.settings.seed + salt)

    def batch(self, generator: torch.Generator) -> Tensor:
        """Videos to learn from."""
        return self.draw(self.digits, self.settings.batch, generator)

    def draw(self, digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Videos of some digits."""
        s = self.settings
        return moving(digits, count, frames=s.frames, side=s.side, digits=s.digits, generator=generator)

    def noise(self, salt: int = 1) -> Tensor:
        """What all videos are generated from."""
        s = self.settings
        return torch.randn(s.videos, s.frames, s.side, s.side, generator=self.generator(salt))

    @cached_property
    def real(self) -> Tensor:
        """Videos of digits that were not trained on."""
        return self.draw(self.unseen, 4 * self.settings.videos, self.generator(3))

    @cached_property
    def frechet(self) -> Frechet:
        """The distance from them."""
        return Frechet(self.real)

    @cached_property
    def wanted(self) -> Tensor:
        """Videos of the teacher, in many steps."""
        self.on_run("videos of the teacher")
        return generate(self.teacher, self.noise(), self.settings.fine)

    # ------------------------------------------------------------ models

    def new_model(self) -> VideoDiT:
        """A model with fresh weights."""
        s = self.settings
        torch.manual_seed(s.seed)
        return VideoDiT(s.frames, s.side, s.patch, width=s.width, heads=s.heads, layers=s.layers)

    def kept(self, name: str, make: Callable[[OnRun], VideoDiT], free: Sequence[str]) -> VideoDiT:
        """The model of a name: made before, read from the folder, or made now and written there.

        Settings that are `free` do not matter to it.
        """
        if name not in self.made:
            told = repr({x: y for x, y in asdict(self.settings).items() if x not in free})
            file = f"{name.replace(' ', '-')}-{zlib.crc32(told.encode()):08x}.safetensors"
            path = None if self.folder is None else self.folder / file
            if path is not None and path.exists():
                model = self.new_model()
                model.load_state_dict(load_file(path))
                self.made[name] = model.eval()
            else:
                self.made[name] = make(lambda text: self.on_run(f"{name}: {text}"))
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as at:
                        save_file(self.made[name].state_dict(), at)
        return self.made[name]

    @property
    def teacher(self) -> VideoDiT:
        """The dense model of many steps."""
        s = self.settings

        def make(on_run: OnRun) -> VideoDiT:
            model = self.new_model()
            how = {"steps": s.steps, "rate": s.rate, "seed": s.seed}
            return fit(model, flow(model), self.batch, **how, on_run=on_run)

        return self.kept("teacher", make, ("distil", "tune", "fine", "few", "bound", "videos"))

    @property
    def quick(self) -> VideoDiT:
        """Stage 1: the dense model of few steps."""
        s, teacher = self.settings, self.teacher
        how = {"fine": s.fine, "few": s.few, "steps": s.distil, "rate": s.rate / 4, "seed": s.seed + 1}

        def make(on_run: OnRun) -> VideoDiT:
            return distilled(teacher, self.batch, **how, on_run=on_run)

        return self.kept("stage 1", make, ("tune", "bound", "videos"))

    @cached_property
    def references(self) -> list[int]:
        """Stage 2: the fewest reference frames of each layer whose attention is near enough to dense."""
        s = self.settings
        samples = self.samples(self.quick, s.few)
        self.on_run("searching reference frames")
        candidates = [{"method": "efficient-vdit", "references": k} for k in range(s.frames, 0, -1)]
        score = smallest(samples, s.bound, by=lambda method: float(getattr(method, "references", s.frames)))
        found = search("video", range(s.layers), candidates, score, progress=False)
        return [int(found.heads(layer)[0]["references"]) for layer in range(s.layers)]

    def samples(self, model: VideoDiT, steps: int, count: int = 4) -> dict[int, list[Call]]:
        """Calls of each layer on the way of a few videos: at an early, a middle and a late step."""
        found: dict[int, list[Call]] = {n: [] for n in range(self.settings.layers)}
        way = trajectory(model, self.noise(5)[:count], steps)
        for at in (steps // 8, steps // 2, steps * 7 // 8):
            for n, call in enumerate(model.calls(*way[at])):
                found[n].append((*call, {"grid": model.grid}))
        return found

    def methods(self, case: str) -> list[Method | None]:
        """What each layer attends by."""
        layers, seed = self.settings.layers, self.settings.seed
        if case == "dense":
            return [None] * layers
        if case == "own frame":
            return [OwnFrame()] * layers
        if case.startswith("uniform"):
            return [EfficientVDiT(int(case.split()[-1]))] * layers
        if case == "searched":
            return [EfficientVDiT(k) for k in self.references]
        apart = {"random frames": False, "random tiles": True}[case]
        return [DrawnFrames(k, apart=apart, seed=layers * seed + n) for n, k in enumerate(self.references)]

    def sparse_teacher(self) -> VideoDiT:
        """The model of many steps with the attention of the search: sparse attention without the rest."""
        return copy.deepcopy(self.teacher).attend_by(self.methods("searched"))

    def student(self, case: str, *, tune: bool) -> VideoDiT:
        """The model of few steps with sparse attention; stage 3 trains it to be like the dense one."""
        s, methods = self.settings, self.methods(case)
        if not tune:
            return copy.deepcopy(self.quick).attend_by(methods)
        how = {"few": s.few, "steps": s.tune, "rate": s.rate / 4, "seed": s.seed + 2}

        def make(on_run: OnRun) -> VideoDiT:
            student = copy.deepcopy(self.quick).attend_by(methods)
            return tuned(self.quick, student, self.batch, **how, on_run=on_run)

        name = "stage 3 " + "".join(x for x in case if x not in ",=")
        return self.kept(name, make, ("videos",)).attend_by(methods)

    # ------------------------------------------------------------ rows

    def judged(self, videos: Tensor) -> Row:
        """Quality of videos from `noise()`."""
        found = {"distance": distance(videos, self.wanted), "frechet": self.frechet(videos)}
        return found | {"drift": drift(videos)}

    @torch.no_grad()
    def taught(self) -> Row:
        """Held-out loss of the teacher, and what is left of it if frames do not see each other."""
        loss = flow(self.teacher)
        alone = flow(copy.deepcopy(self.teacher).attend_by(self.methods("own frame")))
        return {
            name: float(each(self.real, self.generator(4)))
            for name, each in (("loss", loss), ("loss_own_frame", alone))
        }

    def generated(self, model: Callable[[], VideoDiT], steps: int, salt: int = 1) -> Row:
        """What a model generates, and what it costs."""
        made = model()
        self.on_run(f"generating {self.settings.videos} videos in {steps} steps")
        row = self.judged(generate(made, self.noise(salt), steps)) | cost(made, steps)
        if steps == self.settings.few:
            with torch.no_grad():
                loss = likeness(made, self.quick, few=steps)
                row["unlike"] = float(loss(self.real[: self.settings.videos], self.generator(4)))
        return row

    def real_ones(self) -> Row:
        """Real videos in place of generated ones: what Fréchet distance and drift can be at best."""
        videos = self.draw(self.unseen, self.settings.videos, self.generator(6))
        return {"frechet": self.frechet(videos), "drift": drift(videos)}


def cost(model: VideoDiT, steps: int) -> Row:
    """Pairs that a head sees in one video, over all layers and steps, and their share of all pairs."""
    T = math.prod(model.grid)
    q = torch.empty(1, 1, T, 0)
    shares, references = [], []
    for layer in model.layers():
        method = layer.method
        shares.append(1.0 if method is None else plan_of(method.select(q, q, layer.context).plan).kept)
        alone = isinstance(method, OwnFrame)
        references.append(
            "all" if method is None else "0" if alone else str(getattr(method, "references", ""))
        )
    return {
        "kept": sum(shares) / len(shares),
        "pairs": round(steps * T * T * sum(shares)),
        "references": " ".join(references),
    }


def plan_of(plan: sf.Plan | tuple[sf.Plan, ...]) -> sf.Plan:
    """The plan of a method that has one."""
    assert isinstance(plan, sf.Plan)
    return plan


def jobs(study: Study, parts: Sequence[str] = ("train", "stages")) -> list[Job]:
    """A job for each row."""
    s = study.settings
    told: Row = {"study": repr(s)}
    found = []
    if "train" in parts:
        found.append(Job({"part": "train", "case": "teacher", **told}, study.taught))
    if "stages" in parts:

        def add(case: str, stage: str, steps: int, run: Callable[[], Row]) -> None:
            found.append(Job({"part": "stages", "case": case, "stage": stage, "steps": steps, **told}, run))

        add("real videos", "", 0, study.real_ones)
        teacher = partial(getattr, study, "teacher")
        add("dense, other noise", "teacher", s.fine, partial(study.generated, teacher, s.fine, 2))
        for steps in (s.fine, s.few):
            add("dense", "teacher", steps, partial(study.generated, teacher, steps))
        add("searched", "teacher", s.fine, partial(study.generated, study.sparse_teacher, s.fine))
        add("dense", "1", s.few, partial(study.generated, partial(getattr, study, "quick"), s.few))
        for case in CASES:
            for stage in ("2", "3"):
                model = partial(study.student, case, tune=stage == "3")
                add(case, stage, s.few, partial(study.generated, model, s.few))
    return found


def times(
    study: Study,
    *,
    large: tuple[int, int, int] = LARGE,
    videos: int = 4,
    rounds: int = 5,
    minutes: float = 4.0,
    on_run: OnRun = lambda text: None,
) -> Iterator[Row]:
    """Time generations, of the study's videos and of one large video, whose model has fresh weights."""
    s, box = study.settings, Box(minutes * 60)
    told: Row = {"part": "time", "study": repr(s)}
    own = {case: study.student(case, tune=False) for case in ("dense", "searched", *UNIFORM)}
    frames, side, patch = large
    torch.manual_seed(s.seed)
    fresh = VideoDiT(frames, side, patch, width=s.width, heads=s.heads, layers=s.layers)
    larger = {case: copy.deepcopy(fresh).attend_by(study.methods(case)) for case in ("dense", *UNIFORM)}
    for models, count in ((own, videos), (larger, 1)):
        yield from (told | row for row in timed(models, count, s, rounds=rounds, box=box, on_run=on_run))


@torch.no_grad()
def timed(
    models: Mapping[str, VideoDiT], videos: int, s: Settings, *, rounds: int, box: Box, on_run: OnRun
) -> list[Row]:
    """Milliseconds of a generation, and of the attention of all layers in one step; all cases in turn.

    `gain_steps` is what fewer steps gain of a dense generation, `gain_attention` what sparse attention gains
    of attention alone, `gain_model` of a whole step, and `gain` what both gain of a generation.
    """
    dense = models["dense"]
    frames, rows, columns = dense.grid
    noise = torch.randn(videos, frames, rows * dense.patch, columns * dense.patch)
    calls = dense.calls(noise, torch.full((videos,), 0.5))

    def attend(model: VideoDiT) -> None:
        for layer, (q, k, v) in zip(model.layers(), calls):
            if layer.method is None:
                sf.attention(q, k, v)
            else:
                layer.method(q, k, v, ctx=layer.context)

    runs: dict[str, Callable[[], object]] = {"all steps": partial(generate, dense, noise, s.fine)}
    for case, model in models.items():
        runs[case] = partial(generate, model, noise, s.few)
        runs[f"{case}, attention"] = partial(attend, model)
    took = interleave(
        runs, rounds=rounds, box=box, on_run=lambda name: on_run(f"{calls[0][0].shape[2]} tokens, {name}")
    )
    found = []
    for name, case, steps in (("all steps", "dense", s.fine), *((case, case, s.few) for case in models)):
        own, attention = took[name], took[f"{case}, attention"]
        row: Row = {"case": case, "steps": steps, "T": calls[0][0].shape[2], "videos": videos}
        row |= cost(models[case], steps)
        row |= {"ms": own.median * 1e3, "ms_attention": attention.median * 1e3, "rounds": len(own.times)}
        few = steps == s.few
        row |= {"gain_steps": took["all steps"].over(took["dense"]) if few else 1.0}
        row |= {"gain_attention": took["dense, attention"].over(attention)}
        row |= {"gain_model": took["dense"].over(own) if few else 1.0}
        found.append(row | {"gain": took["all steps"].over(own)})
    return found

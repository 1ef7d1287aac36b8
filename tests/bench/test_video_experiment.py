"""The experiment `video`: moving digits, the sampler, what is learned, and its rows."""

from __future__ import annotations

import gzip
import math

import pytest
import torch

import sparseflash as sf
from benchmarks.experiments import video
from benchmarks.experiments.video import capture, controls, digits, model, quality, stages, training
from nn_cases import one_thread
from sparseflash.bench import results

_one_thread = pytest.fixture(autouse=True)(one_thread)

TINY = video.Settings(
    frames=3, side=16, patch=8, width=16, heads=2, layers=2, batch=2, steps=3, distil=2, tune=2, fine=4,
    few=2, videos=3,
)  # fmt: skip


def images(count=40, side=8):
    return (torch.rand(count, side * side, generator=torch.Generator().manual_seed(0)) * 255).byte()


def dit(dtype=torch.float32, frames=3, side=12, patch=4, **options):
    torch.manual_seed(0)
    made = model.VideoDiT(frames, side, patch, width=16, heads=2, layers=2, **options)
    for weight in made.parameters():  # what begins at 0 would hide the layers
        torch.nn.init.normal_(weight, std=0.2)
    return made.to(dtype).eval()


def noise(made, count=2, dtype=torch.float32, salt=1):
    frames, rows, columns = made.grid
    shape = (count, frames, rows * made.patch, columns * made.patch)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(salt))


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("side, frames, count", [(12, 7, 5), (20, 1, 2)])
def test_digits_keep_their_pixels_and_bounce_at_the_edges(side, frames, count):
    given = images()
    made, again = (
        digits.moving(given, count, frames=frames, side=side, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert made.shape == (count, frames, side, side) and torch.equal(made, again)
    bright = digits.brightness(made)
    assert bright.min() > -1e-6 and bright.max() <= 1 + 1e-6
    size = 8 if side >= 16 else 4
    seen = set()
    for clip in bright:
        for frame in clip:
            rows, columns = (frame > 1e-3).nonzero().unbind(-1)
            assert rows.max() - rows.min() < size and columns.max() - columns.min() < size
            seen.add((int(rows.min()), int(columns.min())))
    torch.testing.assert_close(bright.sum((2, 3)), bright.sum((2, 3))[:, :1].expand(-1, frames))
    assert len(seen) > count or frames == 1
    assert quality.drift(made) < 1e-5


def test_places_are_reflected():
    found = digits.bounced(torch.tensor([0.0, 2.0, 3.4, 5.0, 6.0, 7.0, -1.0]), 3)
    assert found.tolist() == [0, 2, 3, 1, 0, 1, 1]
    with pytest.raises(ValueError, match="side=8: expected more than the 8"):
        digits.moving(images(side=16), 1, side=8, generator=torch.Generator())


# ---------------------------------------------------------------- the model and its sampler


@torch.no_grad()
def test_tokens_are_patches_in_raster_order_of_the_grid():
    """With layers that put out nothing, a pixel moves its own patch alone, at its own place."""
    made, x = dit(), noise(dit())
    for block in made.blocks:
        for weight in block.condition.parameters():
            weight.zero_()
    t = torch.full((2,), 0.5)
    base = made(x, t)
    assert base.shape == x.shape
    changed = x.clone()
    changed[1, 2, 5, 9] += 1
    moved = (made(changed, t) - base).abs() > 1e-7
    assert moved[1, 2, 4:8, 8:12].all() and int(moved.sum()) == 16


@torch.no_grad()
def test_a_full_budget_of_any_method_is_dense_attention():
    made, x, t = dit(torch.float64), noise(dit(), dtype=torch.float64), torch.tensor([0.3, 0.9]).double()
    want = made(x, t)
    full = (
        sf.methods.EfficientVDiT(3),
        sf.methods.SlidingTile(tile=(1, 3, 3), window=(3, 1, 1)),
        controls.DrawnFrames(3),
        controls.DrawnFrames(3, apart=True),
        None,
    )
    for one in full:
        torch.testing.assert_close(made.attend_by([one] * 2)(x, t), want)
    few = made.attend_by([None, sf.methods.EfficientVDiT(1)])(x, t)
    assert not torch.allclose(few, want)
    assert torch.equal(made.attend_by([None, None])(x, t), want)


@torch.no_grad()
def test_frames_alone_do_not_see_each_other():
    made = dit().attend_by([controls.OwnFrame()] * 2)
    x, t = noise(made), torch.tensor([0.3, 0.9])
    changed = x.clone()
    changed[:, 1] += 1
    moved = (made(changed, t) - made(x, t)).abs().amax((0, 2, 3))
    assert moved[1] > 1e-3 and moved[0] == moved[2] == 0


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("k, frames", [(1, 4), (2, 7), (7, 7)])
def test_random_frames_are_as_many_pairs_as_references(k, frames, apart):
    q = torch.zeros(1, 1, frames * 6, 4)
    want = sf.methods.EfficientVDiT(k, grid=(frames, 2, 3)).select(q, q).plan.kept
    found = [
        controls.DrawnFrames(k, grid=(frames, 2, 3), apart=apart, seed=seed).select(q, q).plan
        for seed in range(3)
    ]
    assert [plan.kept for plan in found] == [want] * 3
    masks = {plan.to_dense().numpy().tobytes() for plan in found}
    assert len(masks) > 1 or k == frames
    assert all(plan.to_dense()[0, 0].diagonal().all() for plan in found)


@torch.no_grad()
def test_calls_are_what_the_layers_attend_with():
    made = dit()
    x, t = noise(made), torch.tensor([0.3, 0.9])
    _, heard = made.hear(x, t)
    for layer, (q, k, v), out in zip(made.layers(), made.calls(x, t), heard, strict=True):
        assert q.shape == (2, 2, 27, 8)
        weights = (q.double() @ k.double().mT / math.sqrt(8)).softmax(-1)
        own = layer.output((weights @ v.double()).float().transpose(1, 2).flatten(2))
        torch.testing.assert_close(own, out, atol=1e-5, rtol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in made.layers())


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 5])
def test_the_sampler_is_a_loop_over_equal_steps(steps):
    made = dit(torch.float64)
    x = start = noise(made, dtype=torch.float64)
    for n in range(steps):
        t = 1 - n / steps
        clean = x - t * made(x, torch.full((2,), t, dtype=torch.float64))  # DDIM: the video, and the noise
        eps = clean + (x - clean) / t
        to = 1 - (n + 1) / steps
        x = (1 - to) * clean + to * eps
    torch.testing.assert_close(model.generate(made, start, steps), x, atol=1e-6, rtol=1e-6)
    assert len(model.trajectory(made, start, steps)) == steps + 1


def test_of_a_straight_flow_one_step_is_as_good_as_many():
    target = torch.randn(1, 2, 4, 4)

    def velocity(x, t):
        return (x - target) / t.view(-1, 1, 1, 1)

    x = torch.randn(3, 2, 4, 4)
    for steps in (1, 9):
        torch.testing.assert_close(model.generate(velocity, x, steps), target.expand_as(x))


# ---------------------------------------------------------------- what is learned


def test_noisy_videos_are_on_the_line_to_the_noise():
    videos, t = torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    x, velocity = training.noisy(videos, t, torch.Generator().manual_seed(0))
    eps = velocity + videos
    torch.testing.assert_close(x, (1 - t.view(-1, 1, 1, 1)) * videos + t.view(-1, 1, 1, 1) * eps)


def test_consistency_is_its_formula():
    """The jump to the end of the segment against one step of the teacher and the slow model's jump."""
    student, slow, teacher = (dit(torch.float64) for _ in range(3))
    for n, made in enumerate((slow, teacher)):
        for weight in made.parameters():
            weight.data.mul_(1 + 0.1 * (n + 1))
    fine, few = 8, 2
    at = torch.tensor([0, 3, 6])
    x = noise(student, 3, torch.float64)
    found = training.consistency(student, slow, teacher, x, at, fine=fine, few=few)
    errors = []
    for b, i in enumerate(at.tolist()):
        own, t, near = x[b : b + 1], 1 - i / fine, 1 - (i + 1) / fine
        end = {0: 0.5, 3: 0.5, 6: 0.0}[i]
        at_t, at_near = (torch.tensor([value], dtype=torch.float64) for value in (t, near))
        jumped = own + (end - t) * student(own, at_t)
        target = own + (near - t) * teacher(own, at_t)
        target = target + (end - near) * slow(target, at_near)
        if near == end:
            assert torch.equal(target, own + (near - t) * teacher(own, at_t))
        errors.append(((jumped - target) / (t - end)).square().mean())
    torch.testing.assert_close(found, torch.stack(errors).mean(), atol=1e-7, rtol=1e-6)
    found.backward()
    assert all(weight.grad is None for made in (slow, teacher) for weight in made.parameters())
    assert any(weight.grad is not None and bool(weight.grad.any()) for weight in student.parameters())


def test_a_teacher_whose_steps_are_straight_has_nothing_to_distil():
    target = torch.randn(1, 2, 4, 4)

    def velocity(x, t):
        return (x - target) / t.view(-1, 1, 1, 1)

    x = torch.randn(4, 2, 4, 4)
    off = training.consistency(velocity, velocity, velocity, x, torch.arange(4), fine=8, few=2)
    assert off < 1e-10


def test_likeness_is_the_error_of_layers_and_of_the_velocities():
    teacher, student = dit(), dit()
    videos = noise(teacher)
    for made in (teacher, student):
        made.requires_grad_(False)
    alike = training.likeness(student, teacher, few=2)
    assert float(alike(videos, torch.Generator().manual_seed(0))) == 0
    student.attend_by([sf.methods.EfficientVDiT(1), None])
    found = float(alike(videos, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([1.0, 0.5])[torch.randint(2, (2,), generator=generator)]
    x, _ = training.noisy(videos, t, generator)
    (want, layers), (own, heard) = teacher.hear(x, t), student.hear(x, t)
    ratios = [float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip([*heard, own], [*layers, want])]
    assert found == pytest.approx(sum(ratios[:-1]) / 2 + ratios[-1], rel=1e-5) and ratios[0] > 0


def test_training_learns_and_slow_weights_follow():
    study = video.Study(images(), TINY)
    before, after = study.new_model(), study.new_model()
    slow = study.new_model()
    training.fit(after, training.flow(after), study.batch, steps=60, rate=5e-3, slow=slow, decay=0.5)
    losses = [
        training.flow(made)(study.real, torch.Generator().manual_seed(1)).item()
        for made in (before, slow, after)
    ]
    assert losses[2] < 0.9 * losses[0] and losses[1] < 0.9 * losses[0]


# ---------------------------------------------------------------- judging


def test_distances_of_equal_and_of_unrelated_videos():
    a, b = torch.randn(2, 400, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert quality.distance(a, a) == 0 and quality.distance(b, a) == pytest.approx(2, rel=0.05)
    frechet = quality.Frechet(a)
    assert abs(frechet(a)) < 1e-9 and 0 < frechet(b) < 0.5 < frechet(3 * a)
    mean = frechet.axes.sum(1).view(1, 2, 4, 4).float()  # a shift by 1 along each axis
    want = quality.AXES / float(frechet.covariance.trace())
    assert frechet(a + mean) == pytest.approx(want, rel=1e-4)


# ---------------------------------------------------------------- rows


def test_every_row_is_there_and_none_is_measured_twice(tmp_path):
    parts = ("train", "stages", "time", "capture")
    how = {"parts": parts, "folder": tmp_path, "rounds": 1, "minutes": 0.2}
    how["large"] = (4, 24, 8)
    settings = video.Settings(**{**TINY.__dict__, "bound": 0.0})  # nothing is near enough: dense layers
    given = video.measure(images(), settings, **how)
    rows = [next(given) for _ in range(6)]
    assert [row["case"] for row in rows[:3]] == ["teacher", "real videos", "dense, other noise"]
    results.write(tmp_path / "rows.csv", rows)
    there = results.read(tmp_path / "rows.csv")
    more = list(video.measure(images(), settings, **how, known=there))
    by = {part: [row for row in [*rows, *more] if row["part"] == part] for part in parts}
    assert {part: len(x) for part, x in by.items()} == {
        "train": 1,
        "stages": 6 + 2 * len(stages.CASES),
        "time": 3 + 2 + 2 * len(stages.UNIFORM),
        "capture": len(capture.METHODS),
    }
    stage = {(row["case"], row["stage"], row["steps"]): row for row in by["stages"]}
    assert (
        stage["dense", "teacher", 4]["distance"] == 0 < stage["dense, other noise", "teacher", 4]["distance"]
    )
    assert stage["searched", "2", 2]["references"] == "3 3" and stage["searched", "2", 2]["kept"] == 1
    same = ("distance", "frechet", "unlike")
    assert [stage["searched", "2", 2][x] for x in same] == pytest.approx(
        [stage["dense", "1", 2][x] for x in same], rel=1e-3, abs=1e-6
    )
    assert stage["searched", "teacher", 4]["distance"] < 1e-6  # which is dense here
    T = 3 * 4
    assert (
        stage["dense", "1", 2]["pairs"] == 2 * 2 * T * T
        and stage["own frame", "3", 2]["pairs"] == 4 * T * T / 3
    )
    assert all(0 < row["recall"] <= 1.001 for row in by["capture"])
    timed = {(row["T"], row["case"], row["steps"]): row for row in by["time"]}
    assert timed[12, "dense", 4]["gain"] == timed[36, "dense", 2]["gain_attention"] == 1
    few = timed[36, "uniform, k = 1", 2]
    assert few["kept"] == (4 + 3) / 16 and few["gain_steps"] > 0 and few["gain_model"] > 0
    results.write(tmp_path / "rows.csv", [*rows, *more])
    there = results.read(tmp_path / "rows.csv")
    assert (
        list(
            video.measure(images(), settings, **{**how, "parts": ("train", "stages", "capture")}, known=there)
        )
        == []
    )
    assert len(video.kept(there, settings, parts)) == len(there) - len(by["time"])
    assert len(video.kept(there, TINY, parts)) == len(there)


def test_models_are_trained_once(tmp_path, monkeypatch):
    first = video.Study(images(), TINY, tmp_path)
    want = first.quick.state_dict()
    monkeypatch.setattr(stages, "fit", None)
    monkeypatch.setattr(stages, "distilled", None)
    settings = video.Settings(**{**TINY.__dict__, "tune": 9, "videos": 2})  # which do not matter to it
    again = video.Study(images(), settings, tmp_path).quick.state_dict()
    assert all(torch.equal(again[name], x) for name, x in want.items())
    with pytest.raises(TypeError, match="not callable"):
        _ = video.Study(images(), video.Settings(**{**TINY.__dict__, "distil": 9}), tmp_path).quick


def test_the_search_takes_the_fewest_frames_that_are_near_enough():
    def searched(bound):
        return video.Study(images(), video.Settings(**{**TINY.__dict__, "bound": bound})).references

    assert searched(0.0) == [3, 3] and searched(1e9) == [1, 1]


def test_settings_that_make_no_segments_are_refused():
    with pytest.raises(sf.SparseFlashError, match="fine=30 steps.*multiple of few=8"):
        video.Settings(fine=30)
    with pytest.raises(ValueError, match="side=10: expected a multiple of patch=4"):
        model.VideoDiT(side=10, patch=4)


def test_the_command_writes_rows_and_goes_on(tmp_path, monkeypatch, capsys):
    from benchmarks.experiments.commands import experiments
    from sparseflash.bench.commands.app import call

    path, out = tmp_path / "digits-idx3-ubyte.gz", tmp_path / "video.csv"
    raw = images(30, 28).numpy().tobytes()
    path.write_bytes(
        gzip.compress(bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (30, 28, 28)) + raw)
    )
    line = ["x", "video", "--images", path, "--out", out, "--parts", "train", "--runs", tmp_path / "runs"]
    line += ["--steps", 2, "--frames", 2, "--videos", 2]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", [str(x) for x in line])
        with pytest.raises(SystemExit) as stop:
            call(experiments)
        assert not stop.value.code
        (row,) = results.read(out)
        assert row["part"] == "train" and float(row["loss"]) > 0
    assert len(list((tmp_path / "runs").glob("teacher-*.safetensors"))) == 1

"""Rewrites of block programs keep the meaning, and each condition of theirs is there for a reason."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflash import SparseFlashError
from sparseflash.fusion import (
    GOLDEN,
    RULES,
    Builder,
    Loop,
    Meter,
    Op,
    Program,
    cost,
    layer_norm,
    rms_norm,
    rules,
    run,
    simplify,
    softmax,
)

AXES = {"a": "m k", "b": "n k", "c": "m n", "r": "m", "s": "k"}
SIZES = {"m": 3, "k": 5, "n": 4, "d": 5, "l": 3, "h": 6}


def tensors(program: Program, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([SIZES[dim] for dim in axes], dtype=torch.float64, generator=generator)
        for name, axes in program.inputs
    }


def grown(draw: random.Random, length: int) -> Program:
    """A random program: operators on inputs and on one another, as long as their axes allow it."""
    builder = Builder(**AXES)
    arrays = [builder[name] for name in AXES]
    for _ in range(length):
        x = draw.choice(arrays[-4:] if draw.random() < 0.7 else arrays)
        y = draw.choice(arrays)
        shared = set(x.axes) & set(y.axes)
        made = {
            "exp": lambda x=x: (x * 0.5).apply("exp"),
            "sigmoid": lambda x=x: x.apply("sigmoid"),
            "inverse": lambda x=x: (x * x + 1.0).apply("inverse"),
            "sum": lambda x=x: x.sum(x.axes[-1]),
            "softmax": lambda x=x: softmax(x, x.axes[-1]),
            "rms": lambda x=x: rms_norm(x),
            "layer": lambda x=x: layer_norm(x, 0.1),
            "dot": lambda x=x, y=y: x.dot(y),
            "mul": lambda x=x, y=y: x * y,
            "add": lambda x=x, y=y: x + y,
        }
        kinds = ["exp", "sigmoid", "inverse"]
        if x.axes:
            kinds += ["sum"]
        if len(x.axes) == 2:
            kinds += ["softmax", "rms", "layer"]
        if x.axes and y.axes and x.name != y.name:
            kinds += ["dot"] * 3 if len(x.axes) == len(y.axes) == 2 and len(shared) == 1 else []
            kinds += ["mul", "add"] if set(y.axes) <= set(x.axes) else []
        arrays.append(made[draw.choice(kinds)]())
    return builder.done(arrays[-1])


def same(one: Program, two: Program, seed: int, blocks: dict[str, int], meter: Meter | None = None) -> bool:
    """Both give the same."""
    data = tensors(one, seed)
    a, b = run(one, data, blocks)[0], run(two, data, blocks, meter=meter or Meter())[0]
    return bool((a - b).abs().max() <= 1e-10 * a.abs().max())


def rewrites(program: Program):
    return [(rule, new.program) for rule, (_, find) in RULES.items() for new in find(program)]


def walk(start: Program, draw: random.Random, length: int):
    """Random rewrites, one after another; the rules that join loops are not preferred only for being many."""
    program = start
    for _ in range(length):
        found = rewrites(program)
        often = [x for x in found if x[0] not in ("R1", "R2", "R3")]
        if not found:
            return
        rule, program = draw.choice(often if often and draw.random() < 0.5 else found)
        program = program.canonical
        yield rule, program


@settings(max_examples=50)
@given(
    st.integers(0, 2**32),
    st.sampled_from([2, 3, 4, 5, 6, 7, *GOLDEN]),
    st.lists(st.integers(1, 5), min_size=len(SIZES), max_size=len(SIZES)),
)
def test_every_rewrite_keeps_the_meaning(seed, kind, blocks):
    """Random rewrites of random programs, and of the three, in random order, under random blocks.

    Wherever the walk is, a run moves the bytes and does the flops that the cost says.
    """
    draw, block = random.Random(seed), dict(zip(SIZES, blocks))
    start = GOLDEN[kind]() if kind in GOLDEN else grown(draw, kind)
    for rule, program in walk(start, draw, 12):
        meter = Meter()
        assert same(start, program, seed, block, meter), f"{rule}\n{start}\n{program}"
        said = cost(program, {dim: SIZES[dim] for dim in program.dims}, block, 8)
        assert said[:4] == (meter.read, meter.written, meter.flops, meter.calls), f"{rule}\n{program}"


def test_such_walks_meet_every_rule():
    met: set[str] = set()
    for seed, make in itertools.product(range(9), GOLDEN.values()):
        if met != set(RULES):
            met |= {rule for rule, _ in walk(make(), random.Random(seed), 40)}
    assert met == set(RULES)


def second_pass() -> Program:
    """Reads a finished sum in a loop over the dimension that was summed."""
    b = Builder(a="m k")
    return b.done(b["a"] * b["a"].sum("k"))


def normalised() -> Program:
    """A list, an operator on its sum, and a reader of both."""
    b = Builder(a="m k")
    e = b["a"].apply("sigmoid")
    return b.done(e * e.sum("k").apply("inverse"))


def weighted() -> Program:
    """A product of which one factor has a weight along the dimension that is summed."""
    b = Builder(a="m k", b="n k", s="k")
    return b.done((b["a"] * b["s"]).dot(b["b"]))


def last(steps, start: Program) -> Program:
    return ([start] + [step.program for step in steps])[-1]


@pytest.mark.parametrize(
    ("condition", "rule", "make"),
    [
        ("same_turn", "R1", second_pass),
        ("nothing_between", "R1", normalised),
        ("constant", "R4", weighted),
        ("handed_on_only", "R7", second_pass),
    ],
)
def test_without_its_condition_a_rule_changes_the_meaning(condition, rule, make, monkeypatch):
    start = make()
    program = last(simplify(start), start)
    blocks = dict.fromkeys(SIZES, 2)

    def wrong() -> int:
        count = 0
        for _, new in RULES[rule][1](program):
            try:
                count += not same(start, new, 0, blocks)
            except (KeyError, SparseFlashError):  # reads what is nowhere
                count += 1
        return count

    assert wrong() == 0
    monkeypatch.setattr(rules, condition, lambda *given: True)
    assert wrong() > 0


def test_a_loop_inside_one_over_the_same_dimension_would_cost_what_nobody_predicts(monkeypatch):
    start = second_pass()
    program = last(simplify(start), start)
    assert not list(RULES["R6"][1](program))
    monkeypatch.setattr(rules, "loops_differ", lambda *given: True)
    ((_, new),) = RULES["R6"][1](program)
    meter, blocks = Meter(), dict.fromkeys(SIZES, 2)
    assert same(program, new, 0, blocks, meter)
    assert cost(new, {dim: SIZES[dim] for dim in new.dims}, blocks, 8).read != meter.read


def kept_sum() -> Program:
    """A sum that a loop over another dimension needs, and that is wanted itself."""
    b = Builder(a="m k", c="m n")
    total = b["a"].sum("k")
    return b.done(total, b["c"] * total)


def inner_factor() -> Program:
    """A factor that is made in the loop of the sum."""
    loop = (
        Op("e1", "ew", ("r",), expr=("neg", 0)),
        Op("t1", "dot", ("a", "b"), "k"),
        Op("x1", "mul", ("t1", "e1")),
        Op("out", "acc", ("x1",), "k"),
    )
    nest = Loop("m", (Loop("n", (Loop("k", loop),)),))
    return Program((("a", ("m", "k")), ("b", ("n", "k")), ("r", ("m",))), ("out",), (nest,))


@pytest.mark.parametrize(
    ("condition", "rule", "make"), [("only_there", "R6", kept_sum), ("made_outside", "R4", inner_factor)]
)
def test_without_its_condition_a_rule_moves_more_bytes(condition, rule, make, monkeypatch):
    program = make()
    program, blocks = last(simplify(program, ("R1", "R2", "R3")), program), dict.fromkeys(SIZES, 1)
    sizes = {dim: SIZES[dim] for dim in program.dims}
    before = cost(program, sizes, blocks).written
    assert all(cost(new, sizes, blocks).written <= before for _, new in RULES[rule][1](program))
    monkeypatch.setattr(rules, condition, lambda *given: True)
    found = [new for _, new in RULES[rule][1](program)]
    assert any(cost(new, sizes, blocks).written > before for new in found)
    assert all(same(program, new, 0, blocks) for new in found)


def test_a_scale_that_several_read_waits_for_a_copy_of_its_own(monkeypatch):
    """R4 takes a scale over from the only reader it has; R8 makes it so."""
    program = GOLDEN["rmsnorm-swiglu"]()
    program = last(simplify(program, ("R1", "R2", "R3")), program)
    assert not list(RULES["R4"][1](program)) and list(RULES["R8"][1](program))
    monkeypatch.setattr(rules, "sole", lambda *given: True)
    assert list(RULES["R4"][1](program))


def test_what_r5_would_cancel_is_left_alone_unless_it_can_be_centred(monkeypatch):
    """x - mean(x) of a sum of inputs: nothing may be subtracted from it afterwards."""
    b = Builder(a="m k", c="m k", b="n k")
    x = b["a"] + b["c"]
    program = b.done((x - x.sum("k") / "k").dot(b["b"]))
    blocks, data = dict.fromkeys(SIZES, 2), tensors(program, 0)
    data["a"] += 1e6
    good = run(program, data, blocks)[0]

    def error() -> float:
        found = last(simplify(program), program)
        return float((run(found, data, blocks)[0] - good).abs().max())

    assert error() == 0
    monkeypatch.setattr(rules, "can_be_centred", lambda *given: True)
    assert error() > 1e-11

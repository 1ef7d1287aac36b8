"""Bad input: always a SparseFlashError that says what was given, what was expected and how to mend it."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import plans
import sparseflash as sf
from sparseflash import Plan, PlanError, SparseFlashError
from sparseflash.backends import dispatch

Q = torch.randn(2, 4, 33, 16)
K = torch.randn(2, 2, 33, 16)
V = torch.randn(2, 2, 33, 8)
PLAN = Plan.dense(33, 33, causal=True)
EMPTY = torch.zeros(0)


def _call(**changes):
    arguments = {"q": Q, "k": K, "v": V, "plan": PLAN} | changes
    return sf.attention(
        arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), arguments.pop("plan"), **arguments
    )


TENSORS = [
    (
        {"k": K.repeat(1, 2, 1, 1)[:, :3], "v": V.repeat(1, 2, 1, 1)[:, :3]},
        ["[2, 3, 33, 16]", "multiple of Hkv"],
    ),
    ({"v": V[:, :1]}, ["[2, 1, 33, 8]", "same number of heads"]),
    ({"k": K[:, :0], "v": V[:, :0]}, ["[2, 0, 33, 16]", "multiple of Hkv"]),
    ({"q": Q[:1]}, ["[1, 4, 33, 16]", "batch size of q"]),
    ({"k": K[..., :8]}, ["[2, 2, 33, 8]", "same head dimension"]),
    ({"v": V[:, :, :20]}, ["[2, 2, 20, 8]", "same number of tokens"]),
    ({"q": Q.double()}, ["torch.float64", "torch.float32", "one dtype", "cast"]),
    ({"k": K.bfloat16()}, ["torch.bfloat16", "one dtype"]),
    ({n: x.int() for n, x in (("q", Q), ("k", K), ("v", V))}, ["torch.int32", "expected fp32, fp16, bf16"]),
    (
        {n: x.to(torch.complex64) for n, x in (("q", Q), ("k", K), ("v", V))},
        ["torch.complex64", "expected fp32"],
    ),
    ({"k": K.to("meta")}, ["meta", "one device", ".to(q.device)"]),
    ({n: x.to("meta") for n, x in (("q", Q), ("k", K), ("v", V))}, ["plan is on cpu", "meta", "plan.to("]),
    ({"q": Q[0]}, ["[4, 33, 16]", "4-d"]),
    ({"q": Q.tolist()}, ["q: a list", "4-d"]),
    ({"k": None}, ["k: a NoneType", "4-d"]),
    ({"v": Q.to_sparse()}, ["dense 4-d"]),
    ({"q": Q[..., :0], "k": K[..., :0]}, ["head dimensions 1..576"]),
    ({"q": torch.zeros(2, 4, 33, 577), "k": torch.zeros(2, 2, 33, 577)}, ["577", "head dimensions 1..576"]),
    ({"q": Q[:, :, :30]}, ["plan is for 33 x 33", "hold 30 x 33"]),
    ({"plan": Plan.dense(33, 40)}, ["plan is for 33 x 40", "hold 33 x 33"]),
    ({"plan": PLAN.to("meta")}, ["plan is on meta", "q on cpu", "plan.to("]),
    (
        {"plan": Plan.from_mask(torch.ones(3, 1, 33, 33, dtype=torch.bool))},
        ["batch size 3", "expected 1 or 2"],
    ),
    ({"plan": Plan.from_mask(torch.ones(1, 3, 33, 33, dtype=torch.bool))}, ["3 heads", "divisor of Hq=4"]),
    ({"plan": ()}, ["empty tuple", "at least one"]),
    ({"plan": 3}, ["an int", "expected a Plan"]),
    ({"plan": [PLAN, "no"]}, ["a str", "expected a Plan"]),
    ({"plan": torch.ones(33, 33, dtype=torch.bool)}, ["[33, 33]", "Plan.from_mask"]),
    ({"key_bias": torch.zeros(33, 33)}, ["[33, 33]", "[B|1, H, Tk=33]", "pair_bias takes one for each pair"]),
    ({"key_bias": torch.zeros(2, 4, 33, 33)}, ["[2, 4, 33, 33]", "pair_bias takes one for each pair"]),
    ({"key_bias": torch.zeros(1, 3, 33)}, ["[1, 3, 33]", "H dividing 4"]),
    ({"key_bias": torch.zeros(1, 0, 33)}, ["[1, 0, 33]"]),
    ({"key_bias": torch.zeros(3, 1, 33)}, ["[3, 1, 33]", "[B|1"]),
    ({"key_bias": torch.zeros(1, 1, 32)}, ["Tk=33"]),
    ({"key_bias": torch.zeros(1, 1, 33, dtype=torch.int64)}, ["torch.int64", "floating point"]),
    ({"key_bias": torch.zeros(1, 1, 33, device="meta")}, ["meta", "on cpu"]),
    ({"key_bias": 0.5}, ["a float", "floating point [B|1, H, Tk=33]"]),
    ({"sink_logits": torch.zeros(2)}, ["[2]", "[Hq=4]"]),
    ({"sink_logits": torch.zeros(4, dtype=torch.int32)}, ["torch.int32", "floating point"]),
    ({"sink_logits": torch.zeros(4, device="meta")}, ["meta", "cpu"]),
    ({"sink_logits": [0.0] * 4}, ["a list", "[Hq=4]"]),
]

NUMBERS = [
    ({"scale": math.nan}, ["nan", "finite"]),
    ({"scale": math.inf}, ["inf", "finite"]),
    ({"scale": -math.inf}, ["inf", "finite"]),
    ({"scale": True}, ["True", "number"]),
    ({"scale": "0.1"}, ["'0.1'", "number"]),
    ({"scale": torch.tensor([0.1])}, ["tensor([0.1", "number"]),
    ({"softcap": math.nan}, ["nan", "positive"]),
    ({"softcap": -1.0}, ["-1.0", "positive"]),
    ({"softcap": "x"}, ["'x'", "positive"]),
    ({"softcap": False}, ["False", "positive"]),
    ({"backend": "cuda"}, ["'cuda'", "reference"]),
    ({"backend": 3}, ["3", "expected a name"]),
    ({"deterministic": "yes"}, ["'yes'", "True or False"]),
    ({"causal": True}, ["plan together with causal=True", "Plan.dense(Tq, Tk, causal=True)"]),
    ({"causal": 1}, ["causal=1", "True or False"]),
    ({"plan": None, "causal": "yes"}, ["'yes'", "True or False"]),
    ({"q_offset": 4}, ["plan together with q_offset", "Plan.dense("]),
    ({"q_offset": torch.tensor(4)}, ["plan together with q_offset"]),
    ({"plan": None, "q_offset": 1.5}, ["1.5", "int"]),
    ({"plan": None, "q_offset": 2**40}, [str(2**40), "32 bits"]),
    ({"plan": None, "q_offset": torch.zeros(3, dtype=torch.int32)}, ["batch size 3"]),
    ({"dropout": 0.1}, ["called dropout_p"]),
    ({"dropout_p": 1.0}, ["dropout_p=1.0", "[0, 1)"]),
    ({"alibi_slopes": torch.zeros(3)}, ["alibi_slopes", "[Hq="]),
    ({"attn_mask": torch.ones(33, 33)}, ["attn_mask", "Plan.from_mask"]),
    ({"bias": torch.zeros(33, 33)}, ["pair_bias", "key_bias"]),
    ({"is_causal": True}, ["called causal"]),
    ({"softmax_scale": 0.1}, ["called scale"]),
    ({"window_size": (3, 0)}, ["Plan.dense(", "window"]),
    ({"enable_gqa": True}, ["GQA needs no switch"]),
    ({"softmax_scale": 0.0}, ["called scale"]),
    ({"q": torch.nested.nested_tensor([Q[0]], layout=torch.jagged)}, ["jagged_attention"]),
    ({"wrong": 1}, ["'wrong'", "help(sparseflash.attention)"]),
    ({"wrong": None}, ["'wrong'", "help(sparseflash.attention)"]),
]


def _names(cases):
    return [f"{n}-{','.join(change)}" for n, (change, _) in enumerate(cases)]


def test_messages_are_formatted_when_they_are_raised():
    """A symbolic size that is written into a message becomes a constant, every length a graph."""
    early = []
    traced = ("plan", "ops", "selection", "methods", "nn")
    for path in sorted(x for part in traced for x in (Path(sf.__file__).parent / part).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "require":
                for rule in (x for x in call.args if isinstance(x, ast.Tuple)):
                    message = rule.elts[1]
                    formats = any(isinstance(x, ast.FormattedValue) for x in ast.walk(message))
                    if formats and not isinstance(message, ast.Lambda):
                        early.append(f"{path.name}:{message.lineno}")
    assert early == [], "write: require((holds, lambda: f'...'))"


class _Card:
    """A backend for a card that nobody has asked for: usable, and not to be chosen yet."""

    NAME = "triton"
    caution = staticmethod(lambda x: "failed a check on this card: ask for it with backend='triton'")
    standing = staticmethod(lambda: "ask for it with backend='triton'")
    forward = staticmethod(lambda *_: None)

    @staticmethod
    def status():
        return True, "Triton on a card"

    @staticmethod
    def refuse(*tensors):
        return []


def test_a_slow_backend_in_place_of_one_to_be_asked_for_says_so_once(monkeypatch):
    load = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda name: _Card if name == "triton" else load(name))
    monkeypatch.setattr(dispatch, "_order", lambda x: ("triton", "reference"))
    dispatch._say_once.cache_clear()
    with pytest.warns(RuntimeWarning) as said:
        for _ in range(3):
            assert dispatch.choose("forward", "", Q).NAME == "reference"
    (text,) = (str(x.message) for x in said)
    assert "the reference runs, which is slow" in text and "backend='triton'" in text
    assert said[0].filename == __file__
    assert dispatch.choose("forward", "triton", Q) is _Card
    assert "ask for it with" in sf.backend_status()["triton"].detail


def test_all_reasons_of_all_backends_are_in_one_message():
    """Whoever mends one of two at a time has to ask twice."""
    q = torch.empty(1, 1, 4, 8, dtype=torch.int8, device="meta")
    with pytest.raises(sf.BackendError) as said:
        dispatch.choose("forward", "cpu", q)
    assert str(said.value).splitlines()[1:] == [
        "  cpu: tensors are on meta",
        "  cpu: dtype torch.int8 (fp32, bf16, fp16 run here)",
    ]
    with pytest.raises(sf.BackendError) as said:
        dispatch.choose("no_such_op", "", torch.empty(1))
    assert [x.split(":")[0].strip() for x in str(said.value).splitlines()[1:]] == [
        "cpu",
        "reference",
        "triton",
    ]


@pytest.mark.parametrize("changes, parts", TENSORS + NUMBERS, ids=_names(TENSORS + NUMBERS))
def test_attention_says_what_was_given_what_was_expected_and_the_fix(changes, parts):
    with pytest.raises(SparseFlashError) as caught:
        _call(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_what_sdpa_is_told_by_default_is_no_error():
    given = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "enable_gqa": False,
        "alibi_slopes": None,
    }
    assert torch.equal(sf.attention(Q, K, V, **given), sf.attention(Q, K, V))


@pytest.mark.parametrize("lengths", [3, [3, 33], (3, 33)])
def test_decode_says_that_lengths_are_a_tensor(lengths):
    with pytest.raises(SparseFlashError, match=r"lengths are a tensor of integers \[B=2\]"):
        sf.decode(Q, K, V, lengths)


def test_a_plan_without_values_cannot_move_to_a_device_with_some():
    plan = PLAN.to("meta")
    assert plan.to("meta").device.type == "meta"
    with pytest.raises(PlanError, match="no values to move to cpu: make it again there"):
        plan.to("cpu")


def test_fp64_goes_to_the_reference_and_no_other_backend_takes_it():
    q, k, v = Q.double(), K.double(), V.double()
    torch.testing.assert_close(sf.attention(q, k, v, PLAN), sf.attention(q, k, v, PLAN, backend="reference"))
    for name, status in sf.backend_status().items():
        if name != "reference":
            with pytest.raises(sf.BackendError, match=name):
                sf.attention(q, k, v, PLAN, backend=name)
            assert name in str(status)


def test_errors_are_value_errors_and_backend_errors_are_not_implemented_errors():
    assert issubclass(SparseFlashError, ValueError) and issubclass(PlanError, SparseFlashError)
    assert issubclass(sf.BackendError, SparseFlashError) and issubclass(sf.BackendError, NotImplementedError)


OUT, LSE = sf.attention(Q, K, V, PLAN, return_lse=True)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"dout": OUT[..., :4]}, ["dout: [2, 4, 33, 4]", "[2, 4, 33, 8]"]),
        ({"dout": None}, ["dout: a NoneType"]),
        ({"out": OUT[:, :2]}, ["out: [2, 2, 33, 8]", "[2, 4, 33, 8]"]),
        ({"out": OUT.to("meta")}, ["meta", "on cpu"]),
        ({"lse": LSE[..., None]}, ["lse: [2, 4, 33, 1]", "[2, 4, 33]"]),
        ({"lse": LSE.long()}, ["torch.int64", "floating point"]),
        ({"dlse": LSE[:1]}, ["dlse: [1, 4, 33]"]),
        ({"dlse": 0.0}, ["dlse: a float"]),
        ({"plan": None}, ["a NoneType", "expected a Plan"]),
        ({"q": Q[0]}, ["[4, 33, 16]"]),
        ({"scale": math.nan}, ["nan"]),
        ({"softcap": "x"}, ["'x'"]),
        ({"key_bias": torch.zeros(33)}, ["[33]"]),
        ({"backend": "cuda"}, ["'cuda'"]),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_attention_backward_says_so_too(changes, parts):
    names = ("dout", "q", "k", "v", "out", "lse", "plan")
    given = dict(zip(names, (OUT, Q, K, V, OUT, LSE, PLAN), strict=True)) | changes
    positional = [given.pop(n) for n in names]
    with pytest.raises(SparseFlashError) as caught:
        sf.attention_backward(*positional, **given)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "parts, said",
    [
        ([], "at least one"),
        (None, "a NoneType"),
        (OUT, "expected a list"),
        ([OUT], "expected pairs"),
        ([(OUT, LSE, LSE)], "expected pairs"),
        ([(OUT, LSE), (OUT[:1], LSE[:1])], "all alike"),
        ([(LSE, OUT)], "[B,H,T,Dv]"),
        ([(OUT, LSE.int())], "[B,H,T]"),
        ([(OUT, 3)], "expected pairs"),
        ([(OUT, LSE), (OUT.to("meta"), LSE.to("meta"))], "all alike"),
    ],
    ids=range(10),
)
def test_merge_says_so_too(parts, said):
    with pytest.raises(SparseFlashError) as caught:
        sf.merge(parts)
    assert said in str(caught.value)


# ---------------------------------------------------------------- constructors

KEEP = torch.ones(1, 2, 8, dtype=torch.bool)
BUCKET = torch.zeros(1, 2, 8, dtype=torch.int64)
EDGES = torch.tensor([0, 3, 8])
MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool)

BUILD = [
    (lambda: Plan.dense(-1, 4), ["Tq=-1", ">= 0"]),
    (lambda: Plan.dense(4.0, 4), ["Tq=4.0", "ints"]),
    (lambda: Plan.dense("4", 4), ["Tq='4'", "ints"]),
    (lambda: Plan.dense(True, 4), ["Tq=True", "ints"]),
    (lambda: Plan.dense(4, None), ["Tk=None", "ints"]),
    (lambda: Plan.dense(4, 4, tile=0), ["tile=0", "positive int"]),
    (lambda: Plan.dense(4, 4, unit=1.5), ["unit=1.5", "positive int"]),
    (lambda: Plan.dense(4, 4, causal="yes"), ["causal='yes'", "True or False"]),
    (lambda: Plan.dense(4, 4, window=3), ["window=3", "(left, right)"]),
    (lambda: Plan.dense(4, 4, window=(1, 2, 3)), ["(1, 2, 3)", "(left, right)"]),
    (lambda: Plan.dense(4, 4, window=(-2, 0)), ["(-2, 0)", ">= 0"]),
    (lambda: Plan.dense(4, 4, window=(1.0, 0)), ["(1.0, 0)", "counts of tokens"]),
    (lambda: Plan.dense(4, 4, window=("a", 0)), ["('a', 0)", "counts of tokens"]),
    (lambda: Plan.dense(4, 4, window=(True, 0)), ["(True, 0)", "counts of tokens"]),
    (lambda: Plan.dense(4, 4, sink_tokens=-1), ["sink_tokens=-1", ">= 0"]),
    (lambda: Plan.dense(4, 4, sink_tokens=1.0), ["sink_tokens=1.0", "int"]),
    (lambda: Plan.dense(4, 4, q_offset="0"), ["q_offset='0'", "int"]),
    (lambda: Plan.dense(4, 4, q_offset=torch.zeros(1)), ["torch.float32", "int32"]),
    (lambda: Plan.dense(4, 4, q_offset=torch.zeros(1, 1).int()), ["[1, 1]", "0-d or [B]"]),
    (lambda: Plan.from_keep([True], KEEP), ["q_keep", "[B|1, H|1, T]", "list"]),
    (lambda: Plan.from_keep(KEEP[0], KEEP), ["q_keep", "[2, 8]"]),
    (lambda: Plan.from_keep(KEEP, KEEP.float()), ["k_keep", "torch.float32", "True = keep", "k_keep > 0"]),
    (lambda: Plan.from_keep(KEEP.long(), KEEP), ["torch.int64", "q_keep > 0"]),
    (lambda: Plan.from_keep(KEEP.expand(2, -1, -1), KEEP.expand(3, -1, -1)), ["batch sizes 2 and 3"]),
    (lambda: Plan.from_keep(KEEP[:, :0], KEEP), ["0 and 2 heads"]),
    (lambda: Plan.from_keep(KEEP, KEEP.to("meta")), ["meta", "one device"]),
    (lambda: Plan.from_keep(KEEP, KEEP, tile=-1), ["tile=-1"]),
    (lambda: Plan.from_keep(KEEP, KEEP, include_self=None), ["include_self=None", "True or False"]),
    (
        lambda: Plan.from_buckets(BUCKET.float(), BUCKET),
        ["q_bucket", "torch.float32", "q_bucket.long()", "NaN"],
    ),
    (lambda: Plan.from_buckets(BUCKET, torch.full((1, 1, 8), math.nan)), ["k_bucket", "integer bucket ids"]),
    (lambda: Plan.from_buckets(BUCKET, BUCKET.bool()), ["torch.bool", "integer"]),
    (lambda: Plan.from_buckets(BUCKET.view(-1), BUCKET), ["[16]", "[B|1, H|1, T]"]),
    (lambda: Plan.from_buckets(None, BUCKET), ["q_bucket", "NoneType"]),
    (lambda: Plan.from_buckets(BUCKET, BUCKET, buckets=0), ["buckets=0", "positive int"]),
    (lambda: Plan.from_buckets(BUCKET, BUCKET, causal=2), ["causal=2"]),
    (lambda: Plan.from_documents([0, 3]), ["cu_seqlens", "list"]),
    (lambda: Plan.from_documents(EDGES.view(1, -1)), ["[1, 3]", "1-d"]),
    (lambda: Plan.from_documents(EDGES[:0]), ["[0]", "documents + 1"]),
    (lambda: Plan.from_documents(EDGES.float()), ["torch.float32", "cu_seqlens.int()"]),
    (lambda: Plan.from_documents(EDGES.bool()), ["torch.bool"]),
    (lambda: Plan.from_documents(EDGES + 1), ["starts at 1", "expected 0"]),
    (lambda: Plan.from_documents(torch.tensor([0, 5, 3])), ["decreases", "running totals"]),
    (lambda: Plan.from_documents(EDGES, window="x"), ["window='x'"]),
    (lambda: Plan.from_mask(MASK[0, 0, 0]), ["[8]", "[B, H, Tq, Tk]"]),
    (lambda: Plan.from_mask(MASK.float()), ["torch.float32", "True = attends", "mask == 0"]),
    (lambda: Plan.from_mask("mask"), ["str"]),
    (lambda: Plan.from_mask(MASK, tile=0), ["tile=0"]),
]


@pytest.mark.parametrize("make, parts", BUILD, ids=range(len(BUILD)))
def test_constructors_say_what_was_given_what_was_expected_and_the_fix(make, parts):
    with pytest.raises(PlanError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def _i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def _i64(*values):
    return torch.tensor(values, dtype=torch.int64)


def _hand(**changes):
    """Two tiles of two rows over six keys, three units and one span."""
    fields = {
        "Tq": 4,
        "Tk": 6,
        "tile": 2,
        "unit": 2,
        "span_start": _i64(0, 1).view(1, 1, 2),
        "span_full": _i32(0, 0).view(1, 1, 2),
        "span_count": _i32(1, 0).view(1, 1, 2),
        "spans": _i32(0, 2).view(1, 2),
        "start": _i64(0, 1).view(1, 1, 2),
        "full": _i32(0, 1).view(1, 1, 2),
        "count": _i32(1, 2).view(1, 1, 2),
        "index": _i32(1, 0, 2),
    }
    return Plan(**(fields | changes))


HAND = [
    ({"Tq": 4.0}, ["Tq=4.0"]),
    ({"tile": 0}, ["tile=0"]),
    ({"unit": "2"}, ["unit='2'"]),
    ({"causal": 1}, ["causal=1", "True or False"]),
    ({"sink": -1}, ["sink=-1"]),
    ({"window": 5}, ["window=5"]),
    ({"q_offset": 1.5}, ["q_offset=1.5"]),
    ({"spans": [[0, 2]]}, ["spans is a list", "tensor"]),
    ({"spans": None}, ["belong together", "given: span_start"]),
    ({"index": None, "start": None}, ["belong together", "given: full, count"]),
    (
        dict.fromkeys(("spans", "span_start", "span_full", "span_count", "start", "full", "count", "index")),
        ["needs lists"],
    ),
    ({"span_start": _i32(0, 1).view(1, 1, 2)}, ["span_start", "torch.int32", "torch.int64"]),
    ({"index": _i64(1, 0, 2)}, ["index", "torch.int64", "torch.int32"]),
    ({"index": torch.zeros(3)}, ["index", "torch.float32"]),
    ({"index": _i32(1, 0, 2).view(1, 3)}, ["index [1, 3]", "[Nu]"]),
    ({"spans": _i32(0, 2)}, ["spans [2]", "[Ns, 2]"]),
    ({"count": _i32(1, 2)}, ["count [2]", "[B, H, 2 tiles]"]),
    ({"count": _i32(1, 2, 0).view(1, 1, 3)}, ["count [1, 1, 3]", "[B, H, 2 tiles]"]),
    ({"full": _i32(0, 0, 0, 1).view(1, 2, 2)}, ["differ in shape"]),
    ({"q_order": _i32(0, 1, 2, 3)}, ["q_order [4]", "[B, H, rows]"]),
    ({"q_order": torch.tensor(0, dtype=torch.int32)}, ["q_order []", "[B, H, rows]"]),
    ({"q_pos": torch.zeros(1, 1, 6, dtype=torch.int32)}, ["q_pos [1, 1, 6]", "4 tokens"]),
    ({"k_seg": torch.zeros(1, 1, 4, dtype=torch.int32)}, ["k_seg [1, 1, 4]", "6 tokens"]),
    ({"k_pos": torch.zeros(1, 1, 6, dtype=torch.int32, device="meta")}, ["k_pos is on meta", "one device"]),
    (
        {"q_pos": torch.zeros(2, 1, 4, dtype=torch.int32), "k_pos": torch.zeros(3, 1, 6, dtype=torch.int32)},
        ["batch axes"],
    ),
    ({"q_pos": torch.zeros(2, 1, 4, dtype=torch.int32), "q_offset": _i32(1, 2, 3)}, ["batch axes"]),
    ({"q_pos": torch.zeros(1, 0, 4, dtype=torch.int32)}, ["head axis of size 0"]),
    ({"bits": torch.zeros(1, 2, 1, dtype=torch.int32)}, ["bits and bits_start belong together"]),
    (
        {"bits": torch.zeros(2, 3, 1, dtype=torch.int32), "bits_start": _i64(0, 1).view(1, 1, 2)},
        ["bits [2, 3, 1]", "tile=2"],
    ),
    ({"q_order": _i32(0, 1, 4, -1).view(1, 1, 4)}, ["q_order holds -1..4", "0..3"]),
    ({"q_order": _i32(0, 1, -2, 2).view(1, 1, 4)}, ["q_order holds -2..2"]),
    ({"q_order": _i32(0, 1, 1, 2).view(1, 1, 4)}, ["q_order names a token twice", "injective"]),
    ({"k_order": _i32(0, 1, 2, 3, 4, 6).view(1, 1, 6)}, ["k_order holds 0..6", "0..5"]),
    ({"spans": _i32(0, 7).view(1, 2)}, ["spans[0] = [0, 7]", "6 key rows"]),
    ({"spans": _i32(-1, 2).view(1, 2)}, ["spans[0] = [-1, 2]"]),
    ({"spans": _i32(2, 1).view(1, 2)}, ["spans[0] = [2, 1]", "lo <= hi"]),
    ({"index": _i32(1, 0, 3)}, ["index[2] = 3", "below 3"]),
    ({"index": _i32(-1, 0, 2)}, ["index[0] = -1"]),
    ({"k_order": _i32(0, 1, 2, 3).view(1, 1, 4)}, ["index[2] = 2", "below 2"]),
    ({"span_start": _i64(-1, 1).view(1, 1, 2)}, ["span_start = -1"]),
    ({"span_count": _i32(2, 0).view(1, 1, 2)}, ["span_start = 0 with 2 entries", "has 1"]),
    ({"span_count": _i32(-1, 0).view(1, 1, 2)}, ["span_full = 0 of span_count = -1"]),
    ({"full": _i32(2, 1).view(1, 1, 2)}, ["full = 2 of count = 1", "0 <= full <= count"]),
    ({"full": _i32(-1, 1).view(1, 1, 2)}, ["full = -1"]),
    ({"start": _i64(2**40, 1).view(1, 1, 2)}, [f"start = {2**40}", "has 3"]),
    (
        {"bits": torch.zeros(1, 2, 1, dtype=torch.int32), "bits_start": _i64(0, 1).view(1, 1, 2)},
        ["bits_start = 1", "has 1"],
    ),
]


@pytest.mark.parametrize("changes, parts", HAND, ids=_names(HAND))
def test_a_plan_made_by_hand_is_checked_before_any_kernel_sees_it(changes, parts):
    _hand()
    with pytest.raises(PlanError) as caught:
        _hand(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_values_of_entries_that_no_list_reaches_do_not_matter():
    _hand(spans=torch.tensor([[0, 2], [-9, 999]], dtype=torch.int32), index=_i32(1, 0, 2, -1, 777)).check()


# ---------------------------------------------------------------- anything at all

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**40),
    st.floats(),
    st.text(max_size=3),
    st.just(object()),
    st.lists(st.integers(-2, 9), max_size=3),
    st.tuples(st.integers(-2, 9), st.integers(-2, 9)),
    st.sampled_from(
        [Q, K, V, EMPTY, KEEP, BUCKET, EDGES, MASK, PLAN, (PLAN, PLAN), torch.tensor(1), torch.tensor(0.5)]
    ),
)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "q",
                "k",
                "v",
                "plan",
                "causal",
                "q_offset",
                "scale",
                "key_bias",
                "sink_logits",
                "softcap",
                "backend",
            ]
        ),
        JUNK,
        min_size=1,
        max_size=3,
    )
)
def test_whatever_is_given_attention_works_or_raises_its_own_error(changes):
    try:
        out = _call(**changes)
    except SparseFlashError as error:
        assert len(str(error)) > 10
    else:
        assert isinstance(out, torch.Tensor)


CONSTRUCTORS = {
    "dense": (("Tq", "Tk"), ("causal", "window", "sink_tokens", "q_offset", "tile", "unit")),
    "from_keep": (("q_keep", "k_keep"), ("causal", "include_self", "tile", "unit")),
    "from_buckets": (("q_bucket", "k_bucket"), ("causal", "include_self", "tile", "unit", "buckets")),
    "from_documents": (
        ("cu_seqlens",),
        ("cu_seqlens_k", "Tq", "Tk", "causal", "include_self", "window", "tile", "unit"),
    ),
    "from_mask": (("mask",), ("Tq", "Tk", "tile", "unit")),
    "from_intervals": (("lo", "hi", "Tk"), ("tile", "unit")),
    "from_expiry": (("k_end",), ("Tq", "q_offset", "tile", "unit")),
}
GOOD = {
    "Tq": 8,
    "Tk": 8,
    "q_keep": KEEP,
    "k_keep": KEEP,
    "q_bucket": BUCKET,
    "k_bucket": BUCKET,
    "cu_seqlens": EDGES,
    "mask": MASK,
    "lo": BUCKET % 4,
    "hi": BUCKET % 4 + 2,
    "k_end": BUCKET,
}


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_given_a_constructor_works_or_raises_its_own_error(data):
    name = data.draw(st.sampled_from(sorted(CONSTRUCTORS)))
    first, options = CONSTRUCTORS[name]
    given = {n: GOOD[n] for n in first}
    small = JUNK.filter(lambda x: not (isinstance(x, int) and x > 4096))  # no plan of a trillion tokens
    given |= data.draw(st.dictionaries(st.sampled_from([*first, *options]), small, min_size=1, max_size=3))
    try:
        plan = getattr(Plan, name)(**given)
    except SparseFlashError as error:
        assert len(str(error)) > 10
    else:
        plan.check()


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_lists_with_any_values_are_refused_or_stay_inside_their_tensors(seed, data):
    example = plans.example(seed, "lists", heads=2, Tq=20, Tk=30, tile=7, unit=16)
    given = (f.name for f in dataclasses.fields(example.plan) if f.init)
    fields = {f: getattr(example.plan, f) for f in given}
    name = data.draw(st.sampled_from(sorted(n for n, x in example.plan.tensors().items() if n != "bits")))
    x = fields[name].clone()
    if x.numel():
        at = data.draw(st.integers(0, x.numel() - 1))
        x.view(-1)[at] = data.draw(st.sampled_from([-(2**31), -2, -1, 0, 1, 29, 30, 31, 2**31 - 1]))
    try:
        plan = Plan(**(fields | {name: x}))
    except PlanError:
        return
    q = torch.ones(1, 2, 20, 16, requires_grad=True)
    k = torch.ones(1, 2, 30, 16)
    out = sf.attention(q, k, k, plan)
    out.sum().backward()
    assert bool(out.isfinite().all())


X = torch.zeros(2, 4, 10, 16)


def test_a_scale_may_be_any_number_that_does_not_learn():
    numpy = pytest.importorskip("numpy", reason="NumPy is not installed")
    want = sf.attention(X + 1, X + 1, X + 1, scale=0.5)
    for scale in (numpy.float32(0.5), numpy.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).double()):
        assert torch.equal(sf.attention(X + 1, X + 1, X + 1, scale=scale, softcap=None), want)
    with pytest.raises(SparseFlashError, match="one that learns.*q \\* scale"):
        sf.attention(X, X, X, scale=torch.tensor(0.5, requires_grad=True))
    with pytest.raises(SparseFlashError, match="finite number"):
        sf.attention(X, X, X, scale=torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sf.attention(X, X, X, sf.methods.Window().select(X, X)), "Selection.*give its .plan"),
        (lambda: sf.attention(X, X, X, sf.methods.Window()), r"Window: expected a Plan.*call it, Window"),
        (lambda: sf.attention(X, X, X, casual=True), "did you mean 'causal'"),
        (lambda: sf.attention_varlen(X[0], X[0], X[0], window_sise=(1, 1)), "did you mean 'window_size'"),
        (
            lambda: sf.attention(*(torch.zeros(2, T, h, 16) for T, h in ((10, 4), (12, 2), (12, 2)))),
            r"As \[B,T,H,D\] they would fit: give x.transpose\(1, 2\)",
        ),
        (
            lambda: sf.attention(X, X, X, sf.Plan.from_mask(torch.ones(2, 10, dtype=torch.bool))),
            r"A padding mask \[B,Tk\] is Plan.from_mask\(mask\[:, None, None\], Tq=Tq\)",
        ),
    ],
)
def test_a_mistake_that_many_make_is_named_with_its_cure(call, said):
    with pytest.raises(SparseFlashError, match=said):
        call()


def test_the_cure_for_a_padding_mask_is_one():
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 7:] = False
    out = sf.attention(X, X, X, sf.Plan.from_mask(mask[:, None, None], Tq=10))
    assert out.shape == X.shape


def test_attention_varlen_takes_the_arguments_of_flash_attention_in_its_order():
    q, k, v = torch.randn(3, 10, 4, 16)
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    got = sf.attention_varlen(q, k, v, ends, ends, 6, 6, 0.0, 0.3, True, (2, 0), 5.0)
    named = {"softmax_scale": 0.3, "causal": True, "window_size": (2, 0), "softcap": 5.0}
    assert torch.equal(got, sf.attention_varlen(q, k, v, ends, ends, **named))
    dropped = sf.attention_varlen(q, k, v, ends, ends, 6, 6, 0.1, dropout_seed=3)
    named = {"dropout_p": 0.1, "dropout_seed": 3}
    assert torch.equal(dropped, sf.attention_varlen(q, k, v, ends, ends, **named))

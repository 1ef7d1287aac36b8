"""`attention_varlen`: packed documents are the documents one by one, with FlashAttention's alignment."""

from __future__ import annotations

import math

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import EACH, MAIN, randn, same_bits
from sparseflash import Plan
from sparseflash.plan.make import documents

LENGTHS = [(1, 1), (0, 5), (63, 63), (40, 129), (129, 40), (0, 0), (7, 0), (64, 70)]
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (16, 0)},
    "two-sided": {"window_size": (9, 30), "softcap": 5.0, "softmax_scale": 0.3},
}


def _edges(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _inputs(generator, total_q, total_k, *, H=4, Hkv=2, D=40, Dv=24, dtype=torch.float32):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        randn(generator, total_q, H, D, dtype=dtype),
        randn(generator, total_k, Hkv, D, dtype=dtype),
        randn(generator, total_k, Hkv, Dv, dtype=dtype),
        randn(generator, total_q, H, Dv, dtype=dtype),
        randn(generator, H, total_q, dtype=state),
    )


def _run(q, k, v, *args, dout, dlse, **options):
    """Every result, as [tokens, heads, ...] but for lse."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sf.attention_varlen(*leaves, *args, return_lse=True, **options)
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def _document(found, q, k):
    """One document's results as the fp64 yardstick knows them, [1, H, T, D]."""
    rows = {"out": q, "dq": q, "dk": k, "dv": k}
    return {
        name: x[:, q][None] if name == "lse" else x[rows[name]].transpose(0, 1)[None]
        for name, x in found.items()
    }


@MAIN
@pytest.mark.parametrize("kind", OPTIONS)
def test_packed_documents_are_the_documents_one_by_one(backend, dtype, kind, generator):
    options = OPTIONS[kind]
    cu_q, cu_k = (_edges(x) for x in zip(*LENGTHS))
    q, k, v, dout, dlse = _inputs(generator, int(cu_q[-1]), int(cu_k[-1]), dtype=dtype)
    found = _run(q, k, v, cu_q, cu_k, dout=dout, dlse=dlse, backend=backend, **options)
    window = options.get("window_size")
    rest = {"scale": options.get("softmax_scale"), "softcap": options.get("softcap")}
    for n, (Lq, Lk) in enumerate(LENGTHS):
        at, keys = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        i, j = torch.arange(Lq)[:, None] + Lk - Lq, torch.arange(Lk)[None]
        mask = plans.rules(i, j, causal=options.get("causal", False), window=window)
        given = [x.transpose(0, 1)[None] for x in (q[at], k[keys], v[keys])]
        own = {"dout": dout[at].transpose(0, 1)[None], "dlse": dlse[None, :, at]}
        note = f"document {n}, {Lq} x {Lk}"
        tolerance.compare(_document(found, at, keys), *given, mask[None, None], **own, note=note, **rest)


def test_causality_ends_at_the_bottom_right():
    plan = Plan.from_documents(_edges([2, 5]), _edges([5, 2]))
    first, second = plan.to_dense()[0, 0, :2, :5], plan.to_dense()[0, 0, 2:, 5:]
    assert first.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert second.int().tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


@MAIN
def test_a_nan_in_one_document_leaves_the_others_bit_identical_in_the_backward_too(backend, dtype, generator):
    cu_q, cu_k = _edges([1, 40, 130, 30]), _edges([3, 129, 130, 70])
    q, k, v, dout, dlse = _inputs(generator, 201, 332, dtype=dtype)
    clean = _run(q, k, v, cu_q, cu_k, causal=True, dout=dout, dlse=dlse, backend=backend)
    at, keys = slice(1, 41), slice(3, 132)
    q, k, v, dout = (x.clone() for x in (q, k, v, dout))
    q[at], k[keys], v[keys], dout[at] = (math.nan,) * 4
    got = _run(q, k, v, cu_q, cu_k, causal=True, dout=dout, dlse=dlse, backend=backend)
    assert got["out"][at].isnan().all()
    for x in (got, clean):
        for name in ("out", "dq"):
            x[name] = torch.cat([x[name][: at.start], x[name][at.stop :]])
        for name in ("dk", "dv"):
            x[name] = torch.cat([x[name][: keys.start], x[name][keys.stop :]])
        x["lse"] = torch.cat([x["lse"][:, : at.start], x["lse"][:, at.stop :]], 1)
    same_bits(got, clean)


@EACH
def test_tokens_behind_the_last_document_get_nothing(backend, generator):
    q, k, v, dout, dlse = _inputs(generator, 50, 60)
    k[44:], v[44:] = math.nan, math.nan
    found = _run(q, k, v, _edges([10, 20]), _edges([4, 40]), dout=dout, dlse=dlse, backend=backend)
    assert not found["out"][30:].any() and not found["dq"][30:].any()
    assert (found["lse"][:, 30:] == -math.inf).all()
    assert not found["dk"][44:].any() and not found["dv"][44:].any()
    assert all(found[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


@EACH
def test_a_plan_made_once_and_any_strides_give_the_same_bits(backend, generator):
    cu = _edges([100, 0, 29])
    packed = randn(generator, 129, 3, 2, 16)
    q, k, v = packed.unbind(1)  # one projection, split: rows of 96 numbers
    ends = {"dout": randn(generator, 129, 2, 16), "dlse": randn(generator, 2, 129), "backend": backend}
    plan = Plan.from_documents(cu, causal=True, window=(50, 0))
    want = _run(q, k, v, cu, cu, 100, 100, causal=True, window_size=(50, -1), **ends)
    same_bits(_run(q, k, v, plan=plan, **ends), want)
    same_bits(_run(*(x.contiguous() for x in (q, k, v)), plan=plan, **ends), want)
    assert want["out"].is_contiguous()


@pytest.mark.parametrize("lengths", [[], [0], [5], [128, 1, 0, 300, 129]], ids=str)
def test_lists_of_a_size_that_depends_on_no_value_mean_the_same(lengths, monkeypatch):
    """As on an accelerator, whose values are not waited for."""
    total = sum(lengths)
    cu_q, cu_k = _edges(lengths), _edges([n // 2 for n in lengths])
    given = {"Tq": total + 3, "Tk": total, "window": (70, 0)}
    wants = [Plan.from_documents(cu_q, **given), Plan.from_documents(cu_q, cu_k, **given)]
    monkeypatch.setattr(documents, "host", lambda x: False)
    gots = [Plan.from_documents(cu_q, **given), Plan.from_documents(cu_q, cu_k, **given)]
    for got, want in zip(gots, wants):
        assert got.check().tiles == (total + 3) // 128 + len(lengths)
        assert torch.equal(got.to_dense(), want.to_dense())


def test_a_compiled_step_with_lengths_is_one_graph(generator):
    cu = _edges([40, 23])
    q, k, v, dout, _ = _inputs(generator, 63, 63)
    q.requires_grad_()

    def step(q, k, v, cu):
        return sf.attention_varlen(q, k, v, cu, cu, causal=True).tanh()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in (cu, _edges([1, 62])):
        want, got = step(q, k, v, lengths), compiled(q, k, v, lengths)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(x, q, dout)[0] for x in (got, want)]
        assert torch.equal(*grads)


Q = torch.zeros(30, 2, 16)
CU = _edges([10, 20])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"cu_seqlens_q": CU.flip(0)}, "cu_seqlens starts at 30: expected 0"),
        ({"cu_seqlens_q": torch.tensor([0, 20, 10])}, "decreases"),
        ({"cu_seqlens_q": torch.tensor([0, 10, 31])}, "ends at 31, but there are 30 tokens"),
        ({"cu_seqlens_k": torch.tensor([0, 10, 31])}, "cu_seqlens_k ends at 31"),
        ({"cu_seqlens_q": CU.float()}, r"torch.float32: expected int32; try cu_seqlens.int\(\)"),
        ({"cu_seqlens_k": _edges([10, 10, 10])}, "2 documents, cu_seqlens_k of 3"),
        ({"cu_seqlens_q": [0, 10, 30]}, "1-d tensor"),
        ({"cu_seqlens_q": None}, "needs cu_seqlens_q"),
        ({"q": Q[None]}, r"expected packed tensors q \[total_q,Hq,D\]"),
        ({"max_seqlen_q": "long"}, "max_seqlen_q='long'"),
        ({"window_size": 5}, r"expected \(left, right\)"),
        ({"window_size": (-2, 0)}, "window"),
        ({"dropout_p": 1.5}, "dropout_p=1.5"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes: "),
        ({"return_attn_probs": True}, "return_lse=True"),
        ({"block_table": CU}, "pool"),
        ({"scale": 1.0}, "softmax_scale"),
        ({"colour": 0}, "no argument 'colour'"),
        ({"plan": Plan.dense(30, 30)}, "plan together with cu_seqlens"),
        ({"cu_seqlens_q": None, "cu_seqlens_k": None, "plan": Plan.dense(9, 30)}, "9 x 30 tokens"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_have_their_message(change, said):
    given = {"q": Q, "k": Q, "v": Q, "cu_seqlens_q": CU, "cu_seqlens_k": CU} | change
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.attention_varlen(**given)


def test_what_flash_attention_passes_by_default_is_taken():
    neutral = {"dropout_p": 0.0, "alibi_slopes": None, "return_attn_probs": False, "block_table": None}
    out = sf.attention_varlen(Q, Q, Q, CU, CU, 20, 20, softmax_scale=None, deterministic=False, **neutral)
    assert out.shape == Q.shape

"""The callable for hosts that take attention as a function, called as vLLM-Omni's contract says."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import sparseflash as sf
from sparseflash.integrations.plugin import attend
from tolerance import compare

REPO = Path(__file__).parents[2]
GROUP, NAME = "vllm_omni.sparse_attn", "sparseflash"
VIDEO = {"latent_shape": torch.tensor([[4, 8, 12]] * 2), "patch_size": torch.tensor([[1, 2, 2]] * 2)}


class Dispatcher:
    """What a host does: settings, then the state of the forward, then extras; None dropped; tokens first."""

    def __init__(self, params=None, scale=0.2, causal=False):
        written = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]
        module, name = written[GROUP][NAME].split(":")
        self.function = getattr(importlib.import_module(module), name)
        self.params, self.scale, self.causal = params or {}, scale, causal

    def __call__(self, q, k, v, state=None, extra=None, mask=None):
        params = {**self.params, **(state or {}), **(extra or {})}
        params = {name: x for name, x in params.items() if x is not None}
        if mask is not None:
            if not self.function.capabilities.get("supports_attention_mask"):
                raise ValueError("supports_attention_mask")
            params["attn_mask"] = mask
        return self.function(q, k, v, params, is_causal=self.causal, softmax_scale=self.scale)


def inputs(T=96, heads=4, kv=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, h, 24, generator=generator, dtype=dtype) for h in (heads, kv, kv)]


def sdpa(q, k, v, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


FULL = [
    None,
    "dense",
    {"name": "efficient-vdit", "references": 99},
    sf.methods.SlidingTile((4, 4, 6), (1, 1, 1)),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", FULL, ids=str)
def test_at_full_budget_it_is_dense_attention_forward_and_backward(method, causal):
    given = [x.requires_grad_() for x in inputs()]
    out = Dispatcher({"method": method}, causal=causal)(*given, VIDEO)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = (out.detach(), *torch.autograd.grad(out, given, dout))
    got = {name: x.transpose(1, 2) for name, x in zip(("out", "dq", "dk", "dv"), found)}
    T = out.shape[1]
    mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    heads = (x.detach().transpose(1, 2) for x in given)
    compare(got, *heads, mask.tril() if causal else mask, dout=dout.transpose(1, 2), scale=0.2)


def test_it_is_the_method_on_the_grid_of_the_latents():
    q, k, v = inputs()
    method = sf.methods.SlidingTile(tile=(2, 2, 2), window=(1, 3, 3))
    given = {"method": {"name": "sliding-tile", "tile": [2, 2, 2], "window": [1, 3, 3]}}
    want = method(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.2, ctx={"grid": (4, 4, 6)}).transpose(1, 2)
    got = Dispatcher(given)(q, k, v, VIDEO)
    assert torch.equal(got, want) and not torch.allclose(got, sdpa(q, k, v, 0.2), atol=1e-3)
    plain = {"latent_shape": (4, 8, 12), "patch_size": (1, 2, 2)}
    assert torch.equal(Dispatcher(given)(q, k, v, plain), want)
    assert torch.equal(Dispatcher(given)(q, k, v, VIDEO, {"grid": (4, 4, 6), "kv_cache_dtype": "fp8"}), want)


def test_text_beside_the_video_is_told_and_a_grid_that_is_not_the_sequence_is_refused():
    q, k, v = inputs(T=101)
    host = Dispatcher({"method": {"name": "efficient-vdit", "references": 99}})
    with pytest.raises(sf.SparseFlashError, match=r"grid=\(4, 4, 6\).*not 101 tokens.*latent_shape"):
        host(q, k, v, VIDEO)
    torch.testing.assert_close(host(q, k, v, VIDEO, {"text": 5}), sdpa(q, k, v, 0.2))


def test_patterns_of_two_generations_layers_and_branches_stay_apart():
    method = sf.methods.SparseD(0.2, skip=0.0, block=16)
    host, calls = Dispatcher(), []

    def run(seed, session):
        generator, found = torch.Generator().manual_seed(seed), []
        for step in range(4):
            state = {"denoise_step_idx": torch.tensor([step, step]), "total_denoise_steps": torch.tensor([4])}
            for layer in range(2):
                for branch in ("cond", "uncond"):
                    q, k, v = (torch.randn(2, 96, 4, 24, generator=generator) for _ in range(3))
                    found.append(host(q, k, v, state, {"session": session, "layer": layer, "branch": branch}))
                    yield None
        calls.append(found)

    for seed in (1, 2, 1):
        list(run(seed, sf.methods.Session(method)))
    turns = [run(seed, sf.methods.Session(method)) for seed in (1, 2)]
    for _ in zip(*turns):
        pass
    for turn in turns:
        list(turn)
    one, two, again, *_ = calls
    for other, same in ((again, one), (calls[3], one), (calls[4], two)):
        assert all(torch.equal(a, b) for a, b in zip(other, same))
    session = sf.methods.Session(method)
    list(run(1, session))
    assert len(session) == 4


@dataclasses.dataclass(frozen=True)
class Asks(sf.methods.Method):
    reads = ("generated",)

    def select(self, q, k, ctx=None):
        assert ctx["generated"] == 7 and "mine" not in ctx
        return sf.methods.Selection(sf.Plan.dense(q.shape[2], k.shape[2]))


def test_a_method_gets_what_it_reads_and_nothing_of_others():
    q, k, v = inputs()
    Dispatcher({"method": Asks()})(q, k, v, None, {"generated": 7, "mine": object()})


def test_what_it_cannot_do_is_refused_with_the_fix():
    q, k, v = inputs()
    mixed = {"denoise_step_idx": torch.tensor([1, 2])}
    sparsed = sf.methods.Session(sf.methods.SparseD())
    for params, state, extra, said in (
        ({"method": "slidng-tile"}, VIDEO, None, "did you mean 'sliding-tile'"),
        ({"method": {"name": "sliding-tile", "tyle": 3}}, VIDEO, None, "no hyper-parameter 'tyle'"),
        ({"method": {"tile": 3}}, VIDEO, None, "expected a name"),
        ({"method": "sparsed"}, None, None, 'keeps a pattern.*params."session".*sliding-tile'),
        ({"method": "window"}, None, None, "sees only what is earlier.*causal=False"),
        ({"session": sparsed}, None, None, 'give params."layer"'),
        ({"session": sparsed, "method": "window"}, None, {"layer": 0}, 'no params."method"'),
        ({"session": 3}, None, None, "expected a methods.Session"),
        ({"session": sparsed}, mixed, {"layer": 0}, r"\[1, 2\]: samples of one call differ"),
        ({"full_attn_spans": [[(0, 4)]]}, None, None, "full_attn_spans.*not supported"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            Dispatcher(params)(q, k, v, state, extra)
    with pytest.raises(ValueError, match="supports_attention_mask"):
        Dispatcher()(q, k, v, mask=torch.ones(2, 96, dtype=torch.bool))
    with pytest.raises(sf.SparseFlashError, match="attn_mask"):
        attend(q, k, v, {"attn_mask": torch.ones(2, 96)}, False, None)


def test_importing_it_loads_no_host():
    code = "import sys, sparseflash.integrations.plugin as p; "
    code += "sys.exit(not {'vllm', 'diffusers', 'transformers'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)

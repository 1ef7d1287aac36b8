"""Profiles: kept, read, imported, searched for, and turned into one call for all heads."""

from __future__ import annotations

import json

import pytest
import torch

import sparseflash as sf
from harness import inputs
from sparseflash import SparseFlashError
from sparseflash.selection.calibrate import Profile, search

NEAR, FAR = {"method": "window", "window": 9}, {"method": "sink-window", "window": 5, "sink_tokens": 3}
PROFILE = Profile.of("a model", {0: [NEAR, NEAR, FAR, {"method": "dense"}], 4: [FAR] * 4})


def test_a_profile_is_data_that_is_equal_by_value(tmp_path):
    again = Profile.load(PROFILE.save(tmp_path / "profile.json"))
    assert again == PROFILE and hash(again) == hash(PROFILE) and eval(repr(again)) == PROFILE
    assert json.loads((tmp_path / "profile.json").read_text())["layers"]["0"]["2"] == FAR
    assert again.numbers == (0, 4) and again.heads(4) == [FAR] * 4
    with pytest.raises(SparseFlashError, match=r"knows the layers \[0, 4\], not 1"):
        again.heads(1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[]", "no profile"),
        ('{"model": "x", "layers": {"0": {"1": {"method": "window"}}}}', "no profile.*heads"),
        ('{"model": "x", "layers": {"0": {"0": {"window": 3}}}}', "layer 0, head 0.*'method'"),
        ('{"model": "x", "layers": {"0": {"0": {"method": "window", "window": []}}}}', "expected a number"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(text, said, tmp_path):
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SparseFlashError, match=said):
        Profile.load(path)


def test_profiles_that_minference_publishes_are_read(tmp_path):
    heads = {
        "0": ["vertical_and_slash", 1000, 6096, 0.5],
        "1": ["stream_llm", 100, 800, 0.9],
        "2": ["block_sparse", 1000, 6096, 0.1],
    }
    path = tmp_path / "Llama.json"
    path.write_text(json.dumps([heads, heads]))
    profile = Profile.from_minference(path)
    assert (
        profile.model == "Llama"
        and profile.numbers == (0, 1)
        and profile == Profile.from_minference([heads] * 2, "Llama")
    )
    assert profile.heads(1) == [
        {"method": "minference", "pattern": "vertical-slash", "vertical": 1000, "slash": 6096},
        {"method": "minference", "pattern": "a-shape", "vertical": 100, "slash": 800},
        {"method": "minference", "pattern": "block-sparse"},
    ]
    made = sf.methods.Profiled(profile).methods(0)
    assert made[0] == sf.methods.MInference() and made[1].pattern == "a-shape"
    for wrong in ([{"0": ["strange", 1, 2, 0]}], [{"1": ["stream_llm", 1, 2, 0]}], {"0": 1}, [3]):
        with pytest.raises(SparseFlashError, match="expected"):
            Profile.from_minference(wrong)


def test_every_head_gets_its_best_and_a_search_goes_on_where_it_stopped(tmp_path):
    path, asked = tmp_path / "profile.json", []

    def score(layer, setting):
        asked.append(layer)
        if layer == 2 and len(asked) < 6:
            raise KeyboardInterrupt
        return [setting["window"], -setting["window"], float("nan"), 1.0]

    sizes = [{"method": "window", "window": n} for n in (64, 256)]
    with pytest.raises(KeyboardInterrupt):
        search("a model", [0, 2], sizes, score, path=path, progress=False)
    assert Profile.load(path).numbers == (0,)
    asked += [None] * 6
    found = search("a model", [0, 2], sizes, score, path=path)
    assert [s["window"] for s in found.heads(2)] == [256, 64, 64, 64]  # equal ones: the earlier
    assert asked.count(0) == 2 and Profile.load(path) == found
    with pytest.raises(SparseFlashError, match="is of 'a model', not of 'another'"):
        search("another", [0], sizes, score, path=path)
    with pytest.raises(SparseFlashError, match="no candidates"):
        search("a model", [0], [], score)


@pytest.mark.parametrize("layer", [0, 4])
def test_a_profiled_call_is_each_head_by_its_own_method(layer, generator):
    q, k, v, _, _ = inputs(generator, 60, 60, B=2, H=4, Hkv=2)
    method = sf.methods.Profiled(PROFILE)
    out, lse = method(q, k, v, ctx={"layer": layer}, return_lse=True)
    for h, one in enumerate(method.methods(layer)):
        own = q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v[:, h // 2 : h // 2 + 1]
        want = one(*own, return_lse=True) if one else sf.attention(*own, causal=True, return_lse=True)
        torch.testing.assert_close(out[:, h : h + 1], want[0])
        torch.testing.assert_close(lse[:, h : h + 1], want[1])


def test_a_profile_that_is_missing_or_does_not_fit_says_how_to_get_one(generator):
    q, k, v, _, _ = inputs(generator, 9, 9, H=4, Hkv=2)
    with pytest.raises(SparseFlashError, match="has no profile: make one with sparseflash.calibrate.search"):
        sf.methods.Profiled()(q, k, v)
    with pytest.raises(SparseFlashError, match="knows the layers"):
        sf.methods.Profiled(PROFILE)(q, k, v, ctx={"layer": 7})
    with pytest.raises(SparseFlashError, match="settings for 4 heads, q has 2"):
        sf.methods.Profiled(PROFILE)(q[:, :2], k, v, ctx={"layer": 0})
    with pytest.raises(SparseFlashError, match="expected a Profile"):
        sf.methods.Profiled("profile.json")
    with pytest.raises(SparseFlashError, match="layer 2 of the profile has no heads"):
        sf.methods.Profiled(Profile.of("m", {2: []}))
    with pytest.raises(SparseFlashError, match="no hyper-parameter 'widow'"):
        sf.methods.Profiled(Profile.of("m", {0: [{"method": "window", "widow": 3}]}))

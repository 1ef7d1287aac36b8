"""What methods say of their heads, for reports."""

from __future__ import annotations

import torch

import sparseflash as sf
from test_prefill_methods import blocky, slashed


def test_flexprefill_notes_which_heads_are_query_aware(generator):
    """Of planted heads: one looks by position, one by the content of whole blocks."""
    pairs = [slashed(generator, 512, 130), blocky(generator, 512, 32)]
    q, k = (torch.cat([pair[n] for pair in pairs], 1) for n in (0, 1))
    method = sf.methods.FlexPrefill(block=32, min_budget=32, gamma=0.95)
    assert method.notes(q, k)["aware"].tolist() == [0, 1]
    near = {"method": "window", "window": 16}
    setting = {"method": "flexprefill", "block": 32, "min_budget": 32, "gamma": 0.95}
    profile = sf.calibrate.Profile.of("a model", {3: [near, setting]})
    noted = sf.methods.Profiled(profile).notes(q, k, {"layer": 3})["aware"]
    assert bool(noted[0].isnan()) and noted[1] == 1

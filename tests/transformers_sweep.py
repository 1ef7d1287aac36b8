"""Every model class that Transformers maps, tiny and random, on its own eager attention and on "sparse".

`python tests/transformers_sweep.py` writes `tests/transformers_sweep.csv`: one row a class, with what ran and
what came of it. It takes up where it was stopped; `--fresh` begins anew, names of classes run those alone.
Classes run in a worker process that is replaced where one hangs or dies.

What comes of a class:

- `equal`: all that ran agrees with eager, within roundings of fp32 (outputs, gradients, greedy tokens).
- `refused`: "sparse" raised a SparseFlashError; `why` is what it said.
- `own attention`: equal, but no layer of it calls Transformers' attention registry: "sparse" is a mask to it.
- `not built`: no tiny configuration was found on which eager runs; `why` is the last error.
- `different`, `error`: defects.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import inspect
import json
import math
import os
import re
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE / "transformers_sweep.csv"
FIELDS = ("class", "result", "ran", "why")
LIMIT = 40
"""Seconds for a class."""
PARAMETERS = 30_000_000
"""A model of more is not tiny."""
T = 24
"""Tokens of a text; rows of a batch have this many and fewer."""


def classes() -> dict[str, str]:
    """Every class of a model that an auto class leads to, and the model type of its configuration."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for name, table in vars(modeling_auto).items():
        if name.startswith("MODEL") and name.endswith("MAPPING_NAMES"):
            for kind, given in table.items():
                for one in given if isinstance(given, (tuple, list)) else [given]:
                    found.setdefault(one, kind)
    return dict(sorted(found.items()))


# ---------------------------------------------------------------- tiny configurations

# the first pattern that a name matches says what its number becomes; None leaves it
RULES: list[tuple[str, Any]] = [
    (r"rotary_dim", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_n_groups", 1),
    (r"num_kv_shared_layers", 0),
    (r"^(num_|n_)?(\w+_)?(layers?|depths?)$|^(num_|n_)blocks$|num_encoder_blocks", "depth"),
    (r"num_key_value_heads|kv_heads|multi_query_group_num", "kv"),
    (r"index_n_heads", None),
    (r"(^|_)(num|n)_?\w*heads?$|attention_heads$|(^|_)heads$", "heads"),
    (r"vocab_size|vocab_length|num_embeddings$|vocabulary", "vocab"),
    (r"image_size|input_size|crop_size|pretrain_img_size", "image"),
    (
        r"max_(2d_)?position|max_sequence|n_positions|n_ctx|max_source_pos|max_target_pos|max_text",
        "positions",
    ),
    (r"(num|n)_?\w*experts$", "experts"),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim|kv_lora_rank|q_lora_rank|qk_head_dim|d_kv|kv_channels", 16),
    (r"head_dim|dim_head|attention_head_size|head_size", 16),
    (r"sliding_window$|attention_window$|local_attention$|attention_chunk_size", 8),
    (r"ffn|intermediate|feed_?forward|d_ff|mlp_dim|d_inner|inner_dim|ff_dim|ffw", "inner"),
    (
        r"hidden_sizes?$|hidden_dims?$|d_model|n_embd|embed_dims?$|embedding_(size|dim)|^dims?$|^emb_dim$",
        "width",
    ),
    (r"width$|projection_dim|out_hidden|encoder_dim|decoder_dim|hidden_channels|embed_size", "width"),
    (r"(bottleneck|fpn|neck)\w*_(size|dim)s?$", "width"),
]

WIDTH, HEADS = 64, 4
MISSING: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "attn_layer_indices": [1],
    "vocabulary_map": {"<image>": 100},
    "num_key_value_heads": 4,
    "prediction_length": 8,
    "rope_theta": 10000.0,
}
"""What a stock configuration leaves open."""


def small(values: dict[str, Any], attempt: int) -> dict[str, Any]:
    """A configuration with its numbers made small: by name, and some other way at each attempt."""
    made: dict[str, Any] = {}
    kv = values.get("num_key_value_heads")
    heads = values.get("num_attention_heads", values.get("num_heads"))
    groups = isinstance(kv, int) and isinstance(heads, int) and kv != heads
    depth: int | None = None
    lists = [len(x) for n, x in values.items() if re.search("depths", n) and isinstance(x, list)]
    kinds = values.get("layer_types")
    deep = min(max(2, len(set(kinds))), 4) if isinstance(kinds, (list, tuple)) and kinds else 2
    for name, x in values.items():
        if isinstance(x, dict) and all(isinstance(key, str) for key in x):
            made[name] = small(x, attempt)
            continue
        if isinstance(x, bool) or not isinstance(x, (int, list, tuple)) or name.endswith(("_id", "_index")):
            made[name] = x
            continue
        how: Any = next((new for pattern, new in RULES if re.search(pattern, name)), None)
        if isinstance(x, (list, tuple)):
            made[name] = _list(name, list(x), how, attempt, bool(lists))
            continue
        if how is None or x <= 0:
            made[name] = x
        elif how == "depth":
            several = values.get("per_layer_config")  # of layers by number
            depth = made[name] = x if several else min(x, {2: 4, 5: 8}.get(attempt, deep))
        elif how == "heads":
            made[name] = min(x, HEADS)
        elif how == "kv":
            made[name] = 1 if x == 1 else 2 if groups and attempt != 3 else HEADS
        elif how == "vocab":
            made[name] = min(x, 200)
        elif how == "image":
            made[name] = min(x, 64 if attempt in (1, 4) else 32)
        elif how == "positions":
            made[name] = x if attempt == 4 else min(x, 512)
        elif how == "experts":
            made[name] = min(x, 8 if attempt == 2 else 4)
        elif how == "inner":
            made[name] = min(x, WIDTH)
        elif how == "width":
            made[name] = min(x, 32 if lists and name in ("embed_dim", "embedding_size") else WIDTH)
        else:
            made[name] = min(x, how)
    if lists and isinstance(values.get("num_heads"), (list, tuple)) and "embed_dim" in made:
        made["embed_dim"] = 16
    # lists with an entry a layer
    for name, x in made.items():
        each = isinstance(x, list) and (len(x) in _numbers(values) or name.endswith("_types"))
        if depth and each and x and len(x) != depth:
            kinds = list(dict.fromkeys(map(str, x)))
            pick = [next(y for y in x if str(y) == kind) for kind in kinds]
            made[name] = (pick + [x[-1]] * depth)[:depth]
    for name, new in MISSING.items():
        if made.get(name, 0) is None and attempt in (1, 3, 4):
            made[name] = new
    for name in ("num_experts_per_tok", "moe_topk", "top_k", "num_experts_per_token", "moe_k", "topk_group"):
        if isinstance(made.get(name), int):
            made[name] = min(made[name], 1 if name == "topk_group" else 2)
    for name, new in (
        ("n_group", 2),
        ("n_routed_experts", 4),
        ("first_k_dense_replace", 1),
        ("index_topk", 8),
    ):
        if isinstance(made.get(name), int) and made[name] > 0:
            made[name] = min(made[name], new)
    for name in [
        n for n in made if re.search("drop(out|path)|_drop$|pdrop|layerdrop|drop_rate|drop_path", n)
    ]:
        if isinstance(made[name], float):
            made[name] = 0.0
    for name, x in made.items():
        if name.endswith(("token_id", "token_index", "_token")) and isinstance(x, int) and x >= 200:
            made[name] = 100 + x % 90
    for name, x in made.items():
        if name.endswith("sparse_step") and isinstance(x, int):
            made[name] = min(x, 2)
        if name in ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices"):
            made[name] = None
    if "qk_rope_head_dim" in made and "head_dim" in made:
        made["head_dim"] = made["qk_rope_head_dim"]
    made = {
        n: x
        for n, x in made.items()
        if x is not None
        or n not in ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices")
    }
    if isinstance(made.get("rope_parameters"), dict) and "mrope_section" in made["rope_parameters"]:
        made["rope_parameters"]["mrope_section"] = [2, 3, 3]
    return made


def _numbers(values: dict[str, Any]) -> set[int]:
    return {
        x for n, x in values.items() if isinstance(x, int) and re.search("layer|depth|block", n) and x > 2
    }


def _list(name: str, x: list[Any], how: Any, attempt: int, stages: bool) -> list[Any]:
    if not x or not all(type(y) is int for y in x):
        return x
    if how == "depth" or name == "depths":
        return [min(y, 2 if attempt == 2 else 1) for y in x]
    if how in ("heads", "kv"):
        unit = math.gcd(*x)
        return [y // unit for y in x]
    if how in ("width", "inner") and min(x) > 0:
        unit = math.gcd(*x)
        return [y // unit * 16 for y in x] if max(x) // unit < 40 else x
    if how == "image":
        return [min(y, 64 if attempt in (1, 4) else 32) for y in x]
    return x


def build(name: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model of a class on eager attention and an input on which it runs."""
    import torch
    import transformers as hf
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_class = getattr(hf, name)
    config_class = getattr(model_class, "config_class", None) or getattr(hf, CONFIG_MAPPING_NAMES[kind])
    last: Exception | None = None
    stock = config_class()
    for attempt in range(6):
        try:
            values = small(stock.to_dict(), attempt)
            values = {key: x for key, x in values.items() if x is not None or attempt == 5}
            for key in ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype"):
                values.pop(key, None)
            for key in ("is_decoder",) if name.endswith(("ForCausalLM", "LMHeadModel")) else ():
                if key in values:
                    values[key] = True
            config = config_class(**values)
            config._attn_implementation = "eager"
            for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
                if getattr(part, "pad_token_id", 0) is None:
                    part.pad_token_id = 0
                if attempt not in (1, 3, 4):
                    continue
                for key, x in MISSING.items():
                    if getattr(part, key, 0) is None:
                        setattr(part, key, x)
                if isinstance(getattr(part, "rope_parameters", None), dict) and attempt != 3:
                    part.rope_parameters["mrope_section"] = [2, 3, 3]
            with torch.device("meta"):
                size = sum(x.numel() for x in model_class(copy.deepcopy(config)).parameters())
            if size > PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters at attempt {attempt}")
            torch.manual_seed(0)
            model = model_class(config).eval().float()
            with torch.no_grad():
                for n, x in model.named_parameters():
                    if x.dim() == 2 and "embed" not in n:
                        x.mul_(2)  # wide enough that attention is not uniform
                    elif n.endswith("sinks") or "relative_position" in n or "rel_pos" in n:
                        x.normal_()
        except Exception as fault:
            last = last or fault
            continue
        for inputs in candidates(model):
            try:
                with torch.no_grad():
                    out = floats(call(model, inputs))
                if out and all(bool(torch.isfinite(x).all()) for x in out):
                    return model, inputs
                last = last or ValueError("eager gives no finite floats")
            except Exception as fault:
                last = last or fault
    raise RuntimeError(f"{type(last).__name__}: {last}")


def candidates(model: Any) -> list[dict[str, Any]]:
    """Inputs to try: by the names that the forward takes."""
    import torch

    g = torch.Generator().manual_seed(1)
    taken = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 90, (2, T), generator=g)
    config = model.config
    inner = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    ends = [x.eos_token_id for x in inner if isinstance(getattr(x, "eos_token_id", None), int)]
    ids[:, T // 2] = max(
        [x for x in ends if x < 200] + [95]
    )  # what CLIP and its kin pool; a token in every row
    vision = next((x for x in inner if hasattr(x, "image_size")), config)
    size = getattr(vision, "image_size", 32)
    size = (
        list(size) if isinstance(size, (list, tuple)) else [size, size] if isinstance(size, int) else [32, 32]
    )
    size = [max(x, 32) if type(x) is int else 32 for x in (size * 2)[:2]]
    channels = getattr(vision, "num_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    frames = next((x.num_frames for x in inner if isinstance(getattr(x, "num_frames", None), int)), 4)
    bins = next((x for n in ("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels")
                 for c in inner if isinstance(x := getattr(c, n, None), int)), 80)  # fmt: skip
    source = next(
        (x.max_source_positions for x in inner if isinstance(getattr(x, "max_source_positions", None), int)),
        32,
    )

    past = getattr(config, "context_length", 0) or 32

    def picture(*shape: int) -> Any:
        return torch.randn(*shape, generator=g)

    text: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in taken:
        text["decoder_input_ids"] = ids[:, :11].flip(1)
    images = {"pixel_values": picture(2, channels, *size)}
    video = {"pixel_values": picture(2, frames, channels, *size)}
    sound = {"input_values": picture(2, 4000)}
    features = {"input_features": picture(2, bins, 2 * source if source < 2000 else 64)}
    rows = {"input_features": picture(2, 64, bins)}
    tries: list[dict[str, Any]] = []
    if "pixel_values" in taken and "input_ids" in taken:
        tries.append({**text, **images})
    if "input_ids" in taken:
        tries.append(text)
        if type(model).__name__.endswith("MultipleChoice"):
            tries.insert(0, {"input_ids": ids[:, None].repeat(1, 2, 1)})
        if "bbox" in taken:
            tries.insert(0, {**text, "bbox": torch.zeros(2, T, 4, dtype=torch.long)})
    for key in ("grid_thw", "image_grid_thw"):
        if key in taken:
            patch, deep = getattr(vision, "patch_size", 8), getattr(vision, "temporal_patch_size", 1)
            first = "pixel_values" if "pixel_values" in taken else next(iter(taken))
            if type(patch) is int and type(deep) is int and "input_ids" not in taken:
                patches = picture(32, getattr(vision, "in_channels", channels) * deep * patch * patch)
                tries.append({first: patches, key: torch.tensor([[1, 4, 4], [1, 4, 4]])})
    for key, given in (
        ("pixel_values", images),
        ("pixel_values", video),
        ("pixel_values", {"pixel_values": picture(2, channels, 64, 64)}),
        ("pixel_values", {"pixel_values": picture(2, channels, 224, 224)}),
        ("pixel_values_videos", {"pixel_values_videos": picture(2, frames, channels, *size)}),
        ("input_values", sound),
        ("input_values", {"input_values": picture(2, 1, 4000)}),
        ("input_features", features),
        ("input_features", rows),
        ("past_values", {"past_values": picture(2, past, getattr(config, "num_input_channels", 1) or 1)}),
        ("past_values", {"past_values": picture(2, past)}),
        ("inputs_embeds", {"inputs_embeds": picture(2, T, WIDTH)}),
        ("hidden_states", {"hidden_states": picture(2, T, WIDTH)}),
    ):  # fmt: skip
        if key in taken:
            extra: dict[str, Any] = {"decoder_input_ids": ids[:, :7]} if "decoder_input_ids" in taken else {}
            tries.append({**given, **extra})
            if "input_ids" in taken and key != "inputs_embeds":
                tries.append({**given, **text})
    with contextlib.suppress(Exception):
        tries.append({k: x for k, x in model.dummy_inputs.items() if "mask" not in k})
    return tries


def call(model: Any, inputs: dict[str, Any]) -> Any:
    """The model's output, seeded alike whatever it draws."""
    import torch

    torch.manual_seed(3)
    return model(**{k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()})


def floats(out: Any) -> list[Any]:
    """Every floating point tensor of an output, caches left aside."""
    import torch

    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() and out.numel() else []
    if hasattr(out, "items"):
        return [y for key, x in out.items() if "past_key_values" not in key for y in floats(x)]
    if isinstance(out, (tuple, list)):
        return [y for x in out for y in floats(x)]
    return []


def apart(got: list[Any], want: list[Any], at: Any = None) -> float:
    """The largest difference, as a share of the size of its tensor."""
    import torch

    worst = 0.0
    if len(got) != len(want):
        return math.inf
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return math.inf
        if at is not None and b.shape[:2] == at.shape:
            a, b = a[at], b[at]
        elif at is not None and len(b) == len(at):
            a, b = a[:1], b[:1]  # a model may make its one vector of a row's padding
        real = torch.isfinite(b)
        if not torch.equal(real, torch.isfinite(a)):
            return math.inf
        a, b = a[real], b[real]
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


ALLOWED = 2e-3
"""Roundings of fp32 through a few random layers; what a wrong mask does is some hundredths at least."""


def compare(name: str, kind: str) -> dict[str, str]:
    """The row of a class."""
    import sparseflash as sf

    row = {"class": name, "ran": "", "why": ""}
    try:
        model, inputs = build(name, kind)
    except Exception as fault:
        return row | {"result": "not built", "why": _line(fault)}
    own = False
    try:
        sf.transformers.attention_layers(model)
    except sf.SparseFlashError:
        own = True  # masks are all that "sparse" gives it
    ran: list[str] = []
    why, worst = "", "equal"
    checks = {"forward": _gradients, "left": _left, "right": _right, "packed": _packed, "generate": _generate}
    for check, what in checks.items():
        found = []
        try:
            for implementation in ("eager", "sparse"):
                _set(model, implementation)
                found.append(what(model, inputs))
                if found[0] is None:
                    break
        except Exception as fault:
            if not found:
                continue  # eager cannot do this
            result = "refused" if _ours(fault) else "error"
            if worst in ("equal", "refused"):
                worst = result if worst == "equal" or result != "refused" else worst
                why = why or f"{check}: {_line(fault)}"
            continue
        if found[0] is None:
            continue
        ran.append(check)
        (want, at), (got, _) = found
        off = apart(got, want, at)
        if check == "packed" and off > ALLOWED:
            _set(model, "eager")
            off = min(off, apart(got, _alone(model, inputs)))
        if ALLOWED < off < 0.05 and _cancels(model, inputs, what, found[0], off):
            off = 0.0
        if not off <= ALLOWED and worst in ("equal", "refused"):
            worst, why = "different", f"{check}: {off:.2g} apart"
    if not ran and worst == "equal":
        return row | {"result": "not built", "why": "eager has no gradients here"}
    if own and worst == "equal":
        worst = "own attention"
    return row | {"result": worst, "ran": " ".join(ran), "why": why}


def _set(model: Any, implementation: str) -> None:
    """An implementation for a model and all of its parts, as `from_pretrained` gives it."""
    for part in model.modules():
        if getattr(part, "config", None) is not None and hasattr(part.config, "_attn_implementation"):
            part.config._attn_implementation = implementation


def _ours(fault: BaseException | None) -> bool:
    import sparseflash as sf

    while fault is not None:
        if isinstance(fault, sf.SparseFlashError):
            return True
        fault = fault.__cause__ or fault.__context__
    return False


def _line(fault: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(fault).__name__}: {fault}")[:220]


def _gradients(model: Any, inputs: dict[str, Any]) -> Any:
    """Outputs, and the gradient of a random combination of them for every parameter."""
    import torch

    model.zero_grad()
    out = floats(call(model, inputs))
    g = torch.Generator().manual_seed(5)
    total = sum(
        (x * torch.randn(x.shape, generator=g)).sum() / x.numel() ** 0.5 for x in out if x.requires_grad
    )
    found = [x.detach() for x in out]
    if isinstance(total, torch.Tensor) and math.isfinite(float(total.detach())):
        total.backward()
        grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in model.parameters()]
        top = max((float(x.abs().max()) for x in grads if x.numel()), default=0.0)
        found += [
            x / max(top * 0.05, 1e-6) if float(x.abs().max()) < top * 0.05 else x for x in grads if x.numel()
        ]
    return found, None


def _padded(model: Any, inputs: dict[str, Any], side: str) -> Any:
    import torch

    if "input_ids" not in inputs or "attention_mask" not in inspect.signature(model.forward).parameters:
        return None
    ids = inputs["input_ids"].clone()
    mask, some = torch.ones_like(ids), ids.shape[-1] * 3 // 8
    mask[1, ..., :some] = 0
    mask = mask if side == "left" else mask.flip(-1)
    pad = model.config.get_text_config().pad_token_id
    if isinstance(pad, int) and 0 <= pad < 90:
        ids[mask == 0] = pad
    with torch.no_grad():
        return floats(call(model, inputs | {"input_ids": ids, "attention_mask": mask})), mask.bool()


def _packed(model: Any, inputs: dict[str, Any]) -> Any:
    """Two documents in a row by `position_ids` alone; eager without a cache is what keeps them apart."""
    import torch

    taken = inspect.signature(model.forward).parameters
    if not {"input_ids", "position_ids", "use_cache"} <= set(taken) or set(inputs) != {"input_ids"}:
        return None
    if getattr(model.config, "is_encoder_decoder", False) or inputs["input_ids"].shape[-1] != T:
        return None
    positions = torch.cat([torch.arange(T // 2), torch.arange(T - T // 2)])[None].expand(2, -1)
    given = inputs | {"position_ids": positions}
    if model.config.get_text_config()._attn_implementation == "eager":
        given["use_cache"] = False
    with torch.no_grad():
        return floats(call(model, given)), None


def _left(model: Any, inputs: dict[str, Any]) -> Any:
    return _padded(model, inputs, "left")


def _right(model: Any, inputs: dict[str, Any]) -> Any:
    return _padded(model, inputs, "right")


def _alone(model: Any, inputs: dict[str, Any]) -> Any:
    """The two documents of `_packed` by themselves."""
    import torch

    with torch.no_grad():
        at = torch.arange(T // 2)[None].expand(2, -1)
        a, b = (
            floats(call(model, {"input_ids": x, "position_ids": at, "use_cache": False}))
            for x in inputs["input_ids"].chunk(2, -1)
        )
    whole = [x.dim() > 1 and x.shape[1] == T // 2 for x in a]
    return [torch.cat([x, y], 1) if both else y for both, x, y in zip(whole, a, b)]


def _cancels(model: Any, inputs: dict[str, Any], what: Any, eager: Any, off: float) -> bool:
    """Whether a difference is what roundings leave of sums that cancel, and no defect.

    It is where it shrinks in doubles, and where eager is as far from itself with other last digits.
    """
    import torch

    g = torch.Generator().manual_seed(7)

    def nudged(x: Any) -> Any:
        wide = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x * (1 + 1.2e-7 * torch.randn(x.shape, generator=g)) if wide else x

    near = copy.deepcopy(model)
    _set(near, "eager")
    with torch.no_grad():
        for x in near.parameters():
            x.copy_(nudged(x))
    if off < 5 * apart(what(near, {k: nudged(x) for k, x in inputs.items()})[0], *eager):
        return True
    wide, found = copy.deepcopy(model).double(), []
    inputs = {k: x.double() if getattr(x, "is_floating_point", bool)() else x for k, x in inputs.items()}
    with contextlib.suppress(Exception):
        for implementation in ("eager", "sparse"):
            _set(wide, implementation)
            found.append(what(wide, inputs)[0])
    return len(found) == 2 and apart(found[1], found[0], eager[1]) < off / 10


def _generate(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    if not model.can_generate():
        return None
    given = {k: x for k, x in inputs.items() if not k.startswith("decoder_")}
    torch.manual_seed(3)
    made = model.generate(
        **given,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    return [x.float() for x in made.logits], None


# ---------------------------------------------------------------- workers


def work() -> None:
    """Rows for the names on standard input, one JSON line each."""
    import torch
    import transformers

    import sparseflash.integrations.transformers  # noqa: F401  (registers "sparse")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, kind = line.split()
        print(json.dumps(compare(name, kind)), file=out, flush=True)


class Worker:
    """A process that compares classes, one at a time."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ
            | {"PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def row(self, name: str, kind: str, limit: float) -> dict[str, str] | None:
        """The row, or None where time ran out or the process died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name} {kind}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.stop()
        return None

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def read(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a table by class."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["class"]: row for row in csv.DictReader(file)}


def write(path: Path, rows: dict[str, dict[str, str]]) -> None:
    """A table, sorted by class; whole at every moment."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows[name] for name in sorted(rows))
    part.replace(path)


def sweep(
    path: Path, names: list[str] | None = None, limit: float = LIMIT, share: tuple[int, int] = (0, 1)
) -> None:
    """Compare all classes that the table has not, or those named."""
    known, rows, worker = classes(), read(path), None
    wanted = names or [name for i, name in enumerate(known) if name not in rows and i % share[1] == share[0]]
    for name in wanted:
        worker = worker or Worker()
        begin = time.perf_counter()
        row = worker.row(name, known[name], limit if worker.process.poll() is None else 0)
        if row is None:
            worker = None
            row = {"class": name, "result": "not built", "ran": "", "why": f"no result within {limit:.0f} s"}
        print(
            f"{time.perf_counter() - begin:6.2f} {row['result']:12} {name} {row['ran']} {row['why']}",
            flush=True,
        )
        rows[name] = row
        write(path, rows)
    if worker:
        worker.stop()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--share", default="0/1", help="i/n: every n-th class, from the i-th on")
    given = parser.parse_args()
    if given.worker:
        return work()
    if given.fresh:
        given.table.unlink(missing_ok=True)
    i, n = map(int, given.share.split("/"))
    sweep(given.table, given.names or None, share=(i, n))


if __name__ == "__main__":
    main()

"""Recommend a prefill method for a model: trials on its texts, and a profile of the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench import figures, results
from sparseflash.bench.prompts import Prompt, losses, times
from sparseflash.bench.results import Row
from sparseflash.bench.session import show
from sparseflash.common.errors import SparseFlashError
from sparseflash.selection.calibrate import EVERY, Profile, Setting, search

TIMED = 3
"""Number of candidates with acceptable loss that are timed: those fastest in attention."""
LEAST = 1.03
"""Smallest speed-up to the first token that justifies a method's loss; less is noise."""


def candidates(tokens: int) -> dict[str, dict[str, Any]]:
    """Candidate settings for prompts of `tokens` tokens: methods at one to three budgets, by name."""

    def of(part: int, least: int = 16) -> int:
        return max(least, tokens // part)

    vertical_slash = {"method": "minference", "share": "sum", "near": min(30, of(64)), "last": 96}
    tried: list[dict[str, Any]] = [
        *({"method": "sink-window", "window": of(n)} for n in (8, 4)),
        *({"method": "tri-shape", "window": of(n), "sinks": min(128, of(8))} for n in (8, 4)),
        *(vertical_slash | {"vertical": of(v), "slash": of(s)} for v, s in ((32, 24), (16, 12), (10, 6))),
        *({"method": "flexprefill", "gamma": gamma, "halo": True} for gamma in (0.9, 0.95)),
        *({"method": "xattention", "threshold": p} for p in (0.9, 0.95)),
        *({"method": "flashprefill", "alpha": a} for a in (0.1, 0.02)),
        *({"method": "anchor-attention", "theta": theta} for theta in (5.0, 8.0)),
        {"method": "pbs-attn"},
    ]
    return {_name(setting): setting for setting in tried}


def run(
    model: str,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    rounds: int = 2,
    max_kl: float = 0.005,
    tried: Mapping[str, Setting] | None = None,
) -> Profile | None:
    """Try every candidate on every text, print the frontier, and save the best one's profile.

    Parameters
    ----------
    model, names : str, sequence of str
        Names of the model and of the texts, for the rows.
    prompts : sequence of Prompt
        One prompt per text.
    out : Path
        Folder of `trials.csv` (written after each trial, and resumed), `frontier.svg` and `profile.json`.
    layers : sequence of int, optional
        Layers that use the method.
    rounds : int
        Timed rounds, interleaved, of the three fastest candidates with acceptable loss.
    max_kl : float
        Largest acceptable difference of the next tokens' probabilities from those after a dense prompt: the
        mean Kullback-Leibler divergence over tokens and texts. A candidate that exceeds it after some texts,
        whatever the others give, is not tried further.
    tried : mapping, optional
        Settings by name; `candidates(tokens)` by default.

    Returns
    -------
    Profile or None
        None if dense attention is best.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    tokens = prompts[0].tokens
    settings = dict(candidates(tokens) if tried is None else tried)
    methods = {name: _method(setting) for name, setting in settings.items()}
    sheet = results.Sheet(out / "trials.csv", _before(out / "trials.csv"))
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True
    ) as bar:
        task = bar.add_task("", total=None)

        def on_run(text: str) -> None:
            bar.update(task, description=text)

        for name, prompt in zip(names, prompts, strict=True):
            here = {"model": model, "text": name, "tokens": str(tokens)}
            known = {row["case"] for row in sheet.rows if here.items() <= row.items()}
            lost = {case: _of(sheet.rows, model, names, tokens, case, "kl") for case in methods}
            left = {
                case: method
                for case, method in methods.items()
                if case not in known  # unless other texts cannot bring its mean below max_kl
                and (not lost[case] or sum(lost[case]) <= max_kl * len(names))
            }
            for row in losses(prompt, left, layers=layers, on_run=on_run) if left else ():
                if row["case"] in left:
                    slug = settings[row["case"]]["method"]
                    sheet.append(row | here | {"bench": "recommend", "slug": slug})
        trials = {case: _mean(sheet.rows, model, names, tokens, case) for case in methods}
        near = {case: methods[case] for case, trial in trials.items() if trial["kl"] <= max_kl}
        near = dict(sorted(near.items(), key=lambda x: -trials[x[0]]["attention_gain"])[:TIMED])
        if near:
            given: dict[str, Any] = {"layers": layers, "rounds": rounds, "warm": False, "on_run": on_run}
            spent = times(prompts[0], near, **given)
            for case in near:
                trials[case] |= {"ms": spent[case].median * 1e3, "gain": spent["dense"].over(spent[case])}
    figures.redraw(out / "trials.csv")
    show(
        sorted(trials.values(), key=lambda trial: trial["kl"]),
        out / "trials.csv",
        ("case", "texts", "kl", "kept", "recall", "attention_gain", "gain", "ms"),
    )
    best = max(
        (trial for trial in trials.values() if trial.get("gain")), key=lambda t: t["gain"], default=None
    )
    if best is None or best["gain"] < LEAST:
        why = (
            f"no method differs by at most {max_kl:g}"
            if best is None
            else f"the fastest, {best['case']}, brings {best['gain']:.2f}x to the first token"
        )
        print(f"dense attention is best for {tokens} tokens of {model}: {why}")
        return None
    heads = prompts[0].model.config.get_text_config().num_attention_heads
    profile = Profile.of(model, {EVERY: [settings[best["case"]]] * heads})
    where = profile.save(out / "profile.json")
    print(
        f"{best['case']}: {best['gain']:.2f}x to the first token, {best['attention_gain']:.1f}x in "
        f"attention, at a KL of {best['kl']:.2g} (recall {best['recall']:.3f} at {best['kept']:.3f} of the "
        f"pairs); {where}"
    )
    return profile


def patterns(
    model: str,
    texts: Sequence[str],
    tokens: int,
    layers: Sequence[int],
    path: Path,
    *,
    method: str = "minference",
    progress: bool = True,
) -> Profile:
    """Find the MInference pattern of every head: the one that recalls most of dense attention beyond chance.

    Or the `tau` of FlexPrefill, which acts as a pattern: never query-aware, always, or by the paper's test.

    The score of a pattern is its recall minus its share of visible pairs, which is the recall of as many
    random pairs: so both dense attention and chance score 0. Scores are averaged over the texts.

    Papers: Jiang et al., "MInference 1.0", arXiv 2407.02490, section 3.2 (its search is at equal cost).
    """
    from sparseflash.bench import capture

    captured = [capture.of_model(model, text, tokens, layers)[0] for text in texts]
    numbers = sorted({int(name.split(".")[1]) for name in captured[0]})

    def score(number: int, setting: Setting) -> list[float]:
        found = [
            _beyond_chance(setting, *(tensors[f"layer.{number}.{x}"].float() for x in "qk"))
            for tensors in captured
        ]
        return torch.stack(found).mean(0).tolist()

    part = {n: max(16, tokens // n) for n in (64, 24, 16, 12, 6)}
    same: dict[str, Any] = {"method": method}
    if method == "flexprefill":
        flex = [same | {"halo": True, "min_budget": part[16], "tau": tau} for tau in (0.1, 0.0, 1.0)]
        return search(model, numbers, flex, score, path=path, progress=progress)
    tried = [
        *(
            same | {"pattern": "vertical-slash", "vertical": part[v], "slash": part[s], "near": 30}
            for v, s in ((16, 12), (64, 6), (6, 24))
        ),
        same | {"pattern": "a-shape", "vertical": part[64], "slash": part[6]},
        same | {"pattern": "block-sparse", "blocks": max(2, part[6] // 64)},
    ]
    return search(model, numbers, tried, score, path=path, progress=progress)


@torch.no_grad()
def _beyond_chance(setting: Setting, q: Tensor, k: Tensor) -> Tensor:
    """Recall minus the share of visible pairs, for each query head [Hq]."""
    plan = _method(setting).select(q, k).plan
    seen = sf.attention(torch.zeros_like(q), torch.zeros_like(k), k, plan, return_lse=True)[1].exp()
    T = q.shape[2]
    return sf.recall(q, k, plan).mean((0, 2)) - seen.sum((0, 2)) / (len(q) * T * (T + 1) / 2)


def _method(setting: Setting) -> Any:
    given = dict(setting)
    return sf.methods.get(given.pop("method"), **given)


def _name(setting: Setting) -> str:
    """Name of a setting: the slug and what varies, such as "sink-window window=512"."""
    skip = ("method", "share", "near", "last", "halo", "sinks")
    return " ".join([setting["method"], *(f"{n}={x}" for n, x in setting.items() if n not in skip)])


def _before(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    return [dict(row) for row in results.read(path, "case", "text", "tokens", "kl")] if path.exists() else []


def _of(
    rows: Sequence[Row], model: str, names: Sequence[str], tokens: int, case: str, figure: str
) -> list[float]:
    """Values of a figure on each text that the case was tried on."""
    here = (model, str(tokens), case)
    own = (row for row in rows if (row["model"], str(row["tokens"]), row["case"]) == here)
    return [float(row[figure]) for row in own if row["text"] in names]


def _mean(rows: Sequence[Row], model: str, names: Sequence[str], tokens: int, case: str) -> Row:
    """Figures of a case, averaged over the texts it was tried on."""
    found: Row = {"case": case}
    for figure in ("kl", "loss", "kept", "recall", "attention_gain"):
        each = _of(rows, model, names, tokens, case, figure)
        found[figure] = sum(each) / len(each)
    found["texts"] = len(each)
    if not found["kl"] == found["kl"]:
        raise SparseFlashError(f"{case}: the probabilities of the next tokens are NaN")
    return found

"""Tokens per second of vLLM on CPUs: its own attention, and ours, dense and with methods.

Requests of equal length come together. `prompts` are tokens of prompts a second, until the last request has
its first token; `rate` are tokens a second after that, of all requests together. Each case is a process of
its own, and its figures are the best of the rounds, in which the cases take turns; of one thread the seconds
are those that it had of a core, whatever else ran there. `agree` is the share of tokens that are those of
stock vLLM. Prompts are source text of Python's own library.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sparseflash as sf
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row
from sparseflash.integrations.vllm import KEY, VARIABLE

from .served import MARK

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON = CHECKOUT / ".venv-vllm" / "bin" / "python"
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def cases(length: int) -> dict[str, Any]:
    """What each case asks for; methods have budgets of an eighth of the keys or blocks."""
    few = length // 8
    blocks = {"name": "block-topk", "blocks": length // 64 // 8}
    lines = {"name": "minference", "vertical": length // 16, "slash": length // 16}
    return {
        "stock": False,
        "dense": True,
        "quest": {"decode": {"name": "quest", "budget": few}},
        "streaming-llm": {"decode": {"name": "streaming-llm", "budget": few}},
        "block-topk": {"prefill": blocks},
        "minference": {"prefill": lines},
        "block-topk, quest": {"prefill": blocks, "decode": {"name": "quest", "budget": few}},
    }


def ask(job: dict[str, Any], threads: int = 1, **more: str) -> tuple[dict[str, Any] | None, str]:
    """What vLLM answers to a job in its own environment (None if it ends otherwise), and all that it said."""
    if not PYTHON.exists():
        raise sf.SparseFlashError("vLLM has an environment of its own, which is not there: make vllm")
    env = {name: x for name, x in os.environ.items() if name != VARIABLE}
    env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(CHECKOUT / "src"), **more}
    done = subprocess.run(
        [PYTHON, "-P", CHECKOUT / "benchmarks" / "experiments" / "served.py"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=env,
    )
    for line in done.stdout.splitlines():
        if MARK in line:
            return json.loads(line.partition(MARK)[2]), done.stdout + done.stderr
    return None, done.stdout + done.stderr


def rates(answer: dict[str, Any], length: int, clock: int = 0) -> tuple[float, float]:
    """Tokens of prompts a second, and tokens made a second when all prompts are read.

    `clock`: 0 for seconds that pass, 1 for those that the process had of a core.
    """
    requests, steps = len(answer["tokens"]), answer["steps"]
    read = 1 + next(n for n, (*_, begun, _) in enumerate(steps) if begun == requests)
    before, after = (sum(one[clock] for one in own) for own in (steps[:read], steps[read:]))
    return requests * length / before, (steps[-1][-1] - steps[read - 1][-1]) / after


def prompts(tokenizer: Any, requests: int, length: int) -> list[list[int]]:
    """Different texts of so many tokens."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, typing, subprocess, json))
    ids = tokenizer(text).input_ids
    if len(ids) < requests * length:
        raise sf.SparseFlashError(f"{requests} prompts of {length} tokens: the text has {len(ids)}")
    return [ids[n * length : (n + 1) * length] for n in range(requests)]


def measure(
    *,
    model: str = "smollm2",
    length: int = 4096,
    requests: int = 4,
    tokens: int = 32,
    rounds: int = 2,
    dtypes: Sequence[str] = ("bf16",),
    threads: int = 1,
    wanted: Sequence[str] = (),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a case and dtype, after the last round of the dtype."""
    for dtype in dtypes:
        yield from _measure(model, length, requests, tokens, rounds, dtype, threads, wanted, on_run)


def _measure(
    model: str,
    length: int,
    requests: int,
    tokens: int,
    rounds: int,
    dtype: str,
    threads: int,
    wanted: Sequence[str],
    on_run: Callable[[str], None],
) -> Iterator[Row]:
    from sparseflash.integrations.transformers import pretrained

    _, tokenizer = sf.transformers.load(model, dtype=DTYPES[dtype])
    engine = {"dtype": NAMES[dtype], "max_model_len": length + tokens, "max_num_batched_tokens": 2048}
    job: dict[str, Any] = {"model": str(pretrained.folder(model)), "requests": []}
    job["requests"] = [{"prompt": own, "tokens": tokens} for own in prompts(tokenizer, requests, length)]
    every = cases(length)
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in wanted or every}
    for n in range(rounds):
        for case, answers in found.items():
            on_run(f"{dtype}, {case}: round {n + 1} of {rounds}")
            job["engine"] = engine | {"additional_config": {KEY: every[case]}}
            answer, said = ask(job, threads, VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="WARNING")
            if answer is None:
                raise sf.SparseFlashError(f"vLLM ended without an answer ({case}): {said[-2000:]}")
            answers.append(answer)
    clock = int(threads == 1)
    best = {
        case: [max(x) for x in zip(*(rates(one, length, clock) for one in own))]
        for case, own in found.items()
    }
    stock = found.get("stock")
    for case, own in found.items():
        (prompt, rate), said = best[case], own[0]["tokens"]
        row = {
            "bench": "vllm", "model": model, "dtype": dtype, "T": length, "requests": requests, "case": case,
            "tokens": tokens, "prompts": prompt, "rate": rate, "rounds": rounds, "threads": threads,
        }  # fmt: skip
        if stock:
            pairs = [(a, b) for x, y in zip(said, stock[0]["tokens"]) for a, b in zip(x, y)]
            row |= {"prompts_gain": prompt / best["stock"][0], "gain": rate / best["stock"][1]}
            row["agree"] = sum(a == b for a, b in pairs) / len(pairs)
        yield row

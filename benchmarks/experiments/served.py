"""A program for vLLM's own environment: it serves a job (JSON on standard input), and says what came of it.

    {"model": folder, "engine": {...}, "requests": [{"prompt": [ids], "tokens": n, "at": step}, ...]}

A request joins before step `at`, while others run. "processes": true is vLLM as it serves by default, in
processes of its own. The answer stands behind MARK:

    {"tokens": [[ids], ...], "steps": [[seconds, seconds on a core, requests begun, tokens so far], ...]}
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

MARK = "### answer "


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """The greedy tokens of all requests; no token ends a text."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if not job.get("processes"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    given = {"enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": True}
    engine = LLM(job["model"], **(given | job["engine"])).llm_engine
    todo, found = dict(enumerate(job["requests"])), {}
    steps: list[tuple[float, float, int, int]] = []
    while todo or engine.has_unfinished_requests():
        for n in [n for n, one in todo.items() if one.get("at", 0) <= len(steps)]:
            one = todo.pop(n)
            params = SamplingParams(
                temperature=0, max_tokens=one["tokens"], ignore_eos=True, detokenize=False
            )
            engine.add_request(str(n), TokensPrompt(prompt_token_ids=one["prompt"]), params)
        start, began = time.perf_counter(), time.process_time()
        for out in engine.step():
            found[int(out.request_id.partition("-")[0])] = list(out.outputs[0].token_ids)
        took = time.perf_counter() - start, time.process_time() - began
        steps.append((*took, len(found), sum(map(len, found.values()))))
    return {"tokens": [found[n] for n in range(len(job["requests"]))], "steps": steps}


if __name__ == "__main__":
    print(MARK + json.dumps(serve(json.load(sys.stdin))), flush=True)

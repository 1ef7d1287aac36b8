"""A program for vLLM's own environment: serves a job (JSON on standard input), and says what came of it.

    {"model": folder, "engine": {...}, "requests": [{"prompt": [ids], "tokens": n, "at": step}, ...]}

Answers, behind a line of its own: {"tokens": [[ids], ...], "steps": n, "attention": class of a layer}.
Requests join while others run, `at` being the step before which they do.
"""

from __future__ import annotations

import json
import os
import sys

MARK = "### answer "


def main() -> None:
    job = json.load(sys.stdin)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    if not job.get("processes"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = {"enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": True} | job["engine"]
    llm = LLM(job["model"], **engine)
    serving, todo, found = llm.llm_engine, list(enumerate(job["requests"])), {}
    step = 0
    while todo or serving.has_unfinished_requests():
        for n, request in [x for x in todo if x[1].get("at", 0) <= step]:
            params = SamplingParams(
                temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False
            )
            serving.add_request(str(n), TokensPrompt(prompt_token_ids=request["prompt"]), params)
            todo.remove((n, request))
        for out in serving.step():
            if out.finished:
                found[int(out.request_id.split("-")[0])] = list(out.outputs[0].token_ids)
        step += 1
    answer = {"tokens": [found[n] for n in range(len(job["requests"]))], "steps": step}
    print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""Scoring with vLLM: all statistics and the top 20 from inside the engine, against vLLM's own public API.

    python benchmarks/vllm_stats.py [--model smollm2] [--dtype float32] [--prompts 4] [--rounds 3]

The standard work (work.py), an eighth of it unless --prompts says otherwise. The public way asks for one number a
token: `prompt_logprobs=0`, with `flat_logprobs` and without detokenising, all in one call. "forward" asks for none. All
run in one engine in turn, on new texts every round, and must agree on every logprob. Full logits, of three responses,
are timed against `prompt_logprobs=-1` before its lists are made arrays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from table import row
from work import arguments, score_rows, standard_work

from rl_onoff.backends import VLLMBackendConfig
from rl_onoff.backends.devices import THREADS
from rl_onoff.backends.vllm.backend import PREFILL, VLLMBackend
from rl_onoff.types import Rollout, TokenScores, Want

WANT = Want(top_k=20)


def main() -> None:
    args = arguments(__doc__)
    os.environ |= THREADS  # as every worker has it
    config = VLLMBackendConfig(model_name=args.model, dtype=args.dtype, max_model_len=1024, worker=False)
    with VLLMBackend(config) as backend:
        tokenizer = backend.get_tokenizer()
        assert backend._engine is not None
        score_rows("vLLM", "prompt_logprobs=0", ">= 3", compare, backend, args)
        backend._engine.model.max_logprobs = -1  # so that the public API gives the whole vocabulary in this engine
        responses = standard_work(tokenizer, 1, 8, seed=99)[:3]
        seconds, _ = clock(lambda: list(backend.score(responses, Want(full_logits=True))))
        whole, _ = clock(lambda: public_logprobs(backend, responses, prompt_logprobs=-1, logprobs=-1))
        row("full logits, vLLM, 3 responses", "public prompt_logprobs=-1, time / ours", [whole / seconds], ">= 3")


def compare(backend: VLLMBackend, responses: Sequence[Rollout], dtype: str) -> tuple[float, float, float]:
    """Seconds of our scores, of the public API and of the bare forward pass."""
    ours, scores = clock(lambda: {each.key: each for each in backend.score(responses, WANT)})
    public, logprobs = clock(lambda: public_logprobs(backend, responses, prompt_logprobs=0))
    forward, _ = clock(lambda: public_logprobs(backend, responses))
    check(responses, scores, logprobs, dtype)
    print(f"  ours {ours:.2f} s, public {public:.2f} s, forward alone {forward:.2f} s", flush=True)
    return ours, public, forward


def public_logprobs(backend: VLLMBackend, responses: Sequence[Rollout], **asked: Any) -> list[Any]:
    from vllm import SamplingParams

    assert backend._engine is not None
    # without prompt_logprobs the engine would find its cache warm
    params = SamplingParams(flat_logprobs=True, skip_reading_prefix_cache=True, **PREFILL, **asked)
    ids = [[*response.prompt_ids.tolist(), *response.token_ids_T.tolist()] for response in responses]
    outputs = backend._engine._llm.generate([{"prompt_token_ids": each} for each in ids], params, use_tqdm=False)
    return [output.prompt_logprobs for output in outputs]


def check(responses: Sequence[Rollout], scores: dict[Any, TokenScores], public: Sequence[Any], dtype: str) -> None:
    """All rows are there, and the logprobs are the public API's."""
    for response, flat in zip(responses, public, strict=True):
        one, first = scores[response.key], len(response.prompt_ids)
        expected = [flat.logprobs[flat.start_indices[first + t]] for t in range(len(response.token_ids_T))]
        np.testing.assert_allclose(one.logprobs_T, expected, atol=1e-3 if dtype == "float32" else 0.5)
        assert one.top_logprobs_TK is not None and one.entropy_T is not None
        assert one.top_logprobs_TK.shape == (len(expected), WANT.top_k) and one.entropy_T.min() > 0


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()

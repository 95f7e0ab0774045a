"""Scoring with SGLang: all statistics and the top 20 from inside the engine, against SGLang's own public API.

    PYTHONPATH=. .venv-sglang/bin/python benchmarks/sglang_stats.py [--prompts 4] [--rounds 3]

(`bash tests/engines/build_sglang.sh` makes that environment.) The standard work (work.py), an eighth of it unless
--prompts says otherwise. The public way asks for one number a token: `return_logprob` from `logprob_start_len=P-1` on,
all in one call; "forward" asks for none. All run in one engine in turn, each with an empty cache, on new texts every
round, and must agree on every logprob. Full logits, of one response, are timed against `token_ids_logprob` of the whole
vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from table import row
from work import arguments, score_rows, standard_work

from rl_onoff.backends.devices import THREADS
from rl_onoff.backends.sglang.backend import SGLangBackend
from rl_onoff.backends.sglang.config import SGLangBackendConfig
from rl_onoff.types import Rollout, TokenScores, Want

WANT = Want(top_k=20)


def main() -> None:
    args = arguments(__doc__)
    os.environ |= THREADS  # as every worker has it
    config = SGLangBackendConfig(model_name=args.model, dtype=args.dtype, context_length=1024, worker=False)
    with SGLangBackend(config) as backend:
        tokenizer = backend.get_tokenizer()
        score_rows("SGLang", "logprob_start_len=P-1", ">= 1.5", compare, backend, args)
        responses, everything = standard_work(tokenizer, 1, 1, seed=99), list(range(backend.info.vocab_size))
        seconds, _ = clock(backend, lambda: list(backend.score(responses, Want(full_logits=True))))
        whole, _ = clock(backend, lambda: public_logprobs(backend, responses, token_ids_logprob=everything))
        row("full logits, SGLang, 1 response", "public token_ids_logprob, time / ours", [whole / seconds], ">= 1.5")


def compare(backend: SGLangBackend, responses: Sequence[Rollout], dtype: str) -> tuple[float, float, float]:
    """Seconds of our scores, of the public API and of the bare forward pass."""
    ours, scores = clock(backend, lambda: {each.key: each for each in backend.score(responses, WANT)})
    public, logprobs = clock(backend, lambda: public_logprobs(backend, responses))
    forward, _ = clock(backend, lambda: generate(backend, responses))
    check(responses, scores, logprobs, dtype)
    print(f"  ours {ours:.2f} s, public {public:.2f} s, forward alone {forward:.2f} s", flush=True)
    return ours, public, forward


def public_logprobs(backend: SGLangBackend, responses: Sequence[Rollout], **asked: Any) -> list[Any]:
    starts = [len(response.prompt_ids) - 1 for response in responses]
    outputs = generate(backend, responses, return_logprob=True, logprob_start_len=starts, **asked)
    return [output["meta_info"]["input_token_logprobs"] for output in outputs]


def generate(backend: SGLangBackend, responses: Sequence[Rollout], **asked: Any) -> list[Any]:
    ids = [[*response.prompt_ids.tolist(), *response.token_ids_T.tolist()] for response in responses]
    params = {"max_new_tokens": 0 if asked else 1, "temperature": 0.0}
    return backend._engine.generate(input_ids=ids, sampling_params=params, **asked)


def check(responses: Sequence[Rollout], scores: dict[Any, TokenScores], public: Sequence[Any], dtype: str) -> None:
    """All rows are there, and the logprobs are the public API's."""
    for response, entries in zip(responses, public, strict=True):
        one, expected = scores[response.key], [entry[0] for entry in entries[1:]]
        np.testing.assert_allclose(one.logprobs_T, expected, atol=1e-3 if dtype == "float32" else 0.5)
        assert one.top_logprobs_TK is not None and one.entropy_T is not None
        assert one.top_logprobs_TK.shape == (len(expected), WANT.top_k) and one.entropy_T.min() > 0


def clock(backend: SGLangBackend, call: Callable[[], Any]) -> tuple[float, Any]:
    backend._engine.flush_cache()
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()

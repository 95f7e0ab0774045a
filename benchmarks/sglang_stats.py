"""What token statistics cost inside SGLang, next to the engine's plain forward pass and to its public API:

    bash tests/engines/build_sglang.sh && PYTHONPATH=. .venv-sglang/bin/python benchmarks/sglang_stats.py

Prints ratios, measured side by side in one run, each the median of rounds in which every way has its turn. "Stats" are
chosen logprob, entropy, logsumexp, rank and top-5. Work: 2 prompts of 256 tokens (--prompts) with 8 responses of 64
tokens each; the cache is flushed before every turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rl_onoff.backends.sglang.backend import SGLangBackend
from rl_onoff.backends.sglang.config import SGLangBackendConfig
from rl_onoff.types import Rollout, Want


def work(vocab_size: int, num_prompts: int, num_prompt: int, num_responses: int, num_tokens: int) -> list[Rollout]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(100, vocab_size - 100, (num_prompts, num_prompt), dtype=np.int32)
    tokens = rng.integers(100, vocab_size - 100, (num_prompts, num_responses, num_tokens), dtype=np.int32)
    return [
        Rollout(request_id=str(i), sample=j, prompt_ids=prompts[i], token_ids_T=tokens[i, j])
        for i in range(num_prompts)
        for j in range(num_responses)
    ]


class Ways:
    """Ways to run the engine over the same responses."""

    def __init__(self, backend: SGLangBackend, responses: list[Rollout]):
        self._backend, self._engine, self._responses = backend, backend._engine, responses
        self._ids = [np.concatenate([r.prompt_ids, r.token_ids_T]).tolist() for r in responses]
        self._starts = [len(r.prompt_ids) - 1 for r in responses]
        self._prompts = list({r.request_id: r.prompt_ids.tolist() for r in responses}.values())

    def plain(self) -> None:
        self._generate(self._ids)

    def public(self) -> None:
        self._generate(self._ids, return_logprob=True, logprob_start_len=self._starts)

    def stats(self) -> None:
        """All at once, as the two above, so that no prompt is shared."""
        want = Want(top_k=5)

        async def together() -> None:
            await asyncio.gather(*(self._backend._probe(response, want) for response in self._responses))

        self._engine.loop.run_until_complete(together())

    def public_shared(self) -> None:
        self._generate(self._prompts)
        self.public()

    def stats_shared(self) -> None:
        """What `score` does."""
        list(self._backend._score(self._responses, Want(top_k=5)))

    def logits(self) -> None:
        list(self._backend._score(self._responses[:1], Want(full_logits=True)))

    def logits_plain(self) -> None:
        self._generate(self._ids[:1])

    def logits_public(self, **what: Any) -> None:
        self._generate(self._ids[:1], return_logprob=True, logprob_start_len=self._starts[:1], **what)

    def _generate(self, ids: list[list[int]], **options: Any) -> None:
        self._engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1, "temperature": 0.0}, **options)

    def time(self, way: Callable[[], None]) -> float:
        self._engine.flush_cache()
        began = time.perf_counter()
        way()
        return time.perf_counter() - began


def compare(ways: Ways, named: dict[str, Callable[[], None]], rounds: int) -> None:
    """Print the time of each way relative to the first."""
    times: dict[str, list[float]] = {name: [] for name in named}
    for warm in range(rounds + 1):
        for name, way in named.items():
            seconds = ways.time(way)
            if warm:
                times[name].append(seconds)
    base, *_ = times
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[base], strict=True)]
        print(f"{name:60}{statistics.median(ratios):8.2f}", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as every worker has it
    with SGLangBackend(
        SGLangBackendConfig(model_name=args.model, dtype=args.dtype, context_length=1024, worker=False)
    ) as backend:
        vocab_size = backend.info.vocab_size
        print(f"{args.model} {args.dtype}, SGLang {backend.info.version}: relative time\n")
        ways = Ways(backend, work(vocab_size, args.prompts, 256, 8, 64))
        statistics_ways = {
            "plain forward": ways.plain,
            "public logprob_start_len (one number a token)": ways.public,
            "in-engine stats": ways.stats,
            "prompt shared: public": ways.public_shared,
            "prompt shared: in-engine stats (what score does)": ways.stats_shared,
        }
        compare(ways, statistics_ways, args.rounds)

        ways = Ways(backend, work(vocab_size, 1, 64, 1, 256))
        logits_ways = {
            "one sequence of 320 tokens, plain forward": ways.logits_plain,
            "in-engine full logits of 256": ways.logits,
            "public token_ids_logprob, whole vocabulary": lambda: ways.logits_public(
                token_ids_logprob=list(range(vocab_size))
            ),
            "public top_logprobs_num, whole vocabulary": lambda: ways.logits_public(top_logprobs_num=vocab_size),
        }
        compare(ways, logits_ways, max(1, args.rounds // 2))


if __name__ == "__main__":
    main()

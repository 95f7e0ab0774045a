"""Token statistics of vLLM: what they cost beside the plain forward pass, and beside vLLM's own public API.

    python benchmarks/vllm_stats.py [--model smollm2] [--dtype float32] [--rounds 5]

2 prompts of 256 tokens with 8 responses of 64 each. All variants run in one engine, in turn, so that what else the
machine does falls on all alike; the numbers are ratios of medians. "forward" is the engine with max_tokens=1 on the
same sequences. Full logits are timed against `prompt_logprobs=-1, flat_logprobs=True, detokenize=False` before its
lists are made arrays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rl_onoff.backends import VLLMBackendConfig
from rl_onoff.backends.engine import whole
from rl_onoff.backends.vllm import backend as module
from rl_onoff.backends.vllm.backend import VLLMBackend, _jobs, _prefix
from rl_onoff.types import Rollout, Want


def work(
    vocab_size: int, prompts: int = 2, samples: int = 8, prompt_tokens: int = 256, tokens: int = 64, seed: int = 0
) -> list[Rollout]:
    rng = np.random.default_rng(seed)

    def random(count: int) -> np.ndarray:
        return rng.integers(100, vocab_size, count, dtype=np.int32)

    prompt_ids = [random(prompt_tokens) for _ in range(prompts)]
    return [
        Rollout(request_id=str(p), sample=sample, prompt_ids=ids, token_ids_T=random(tokens))
        for p, ids in enumerate(prompt_ids)
        for sample in range(samples)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from vllm import SamplingParams

    backend = VLLMBackend(VLLMBackendConfig(model_name=args.model, dtype=args.dtype, max_model_len=1024, worker=False))
    with backend:
        engine = backend._engine
        seeds = iter(range(1_000_000))

        def run(responses: list[Rollout], **params: Any) -> None:
            """The whole sequences, nothing cached; one at a time where every number comes back as an object."""
            plain = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "skip_reading_prefix_cache": True}
            most = 1 if params.get("prompt_logprobs") == -1 else None
            inputs = ((None, _prefix(r), SamplingParams(**plain | params)) for r in responses)
            for _ in engine.run(whole(inputs), most):
                pass

        def in_engine(responses: list[Rollout], want: Want, cached: bool) -> None:
            module._jobs = _jobs if cached else lambda r, n, _: _jobs(r, n, True)
            assert sum(1 for _ in backend._stats(responses, want)) == len(responses)
            module._jobs = _jobs

        def fresh() -> list[Rollout]:
            return work(engine.vocab_size, seed=next(seeds))

        warm = fresh()
        variants: dict[str, Callable[[], None]] = {
            "forward": lambda: run(fresh()),
            "public prompt_logprobs=0 (one number a token)": lambda: run(fresh(), prompt_logprobs=0),
            "in-engine, statistics": lambda: in_engine(fresh(), Want(), False),
            "in-engine, statistics and top 5": lambda: in_engine(fresh(), Want(top_k=5), False),
            "in-engine, prompts shared, cold": lambda: in_engine(fresh(), Want(top_k=5), True),
            "in-engine, prompts shared, warm": lambda: in_engine(warm, Want(top_k=5), True),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for round_ in range(args.rounds + 1):
            for name, variant in variants.items():
                taken_s = clock(variant)
                if round_:  # the first warms up
                    times[name].append(taken_s)
        forward = statistics.median(times["forward"])
        for name, taken in times.items():
            best = min(taken) / min(times["forward"])
            print(
                f"{name:<50} {statistics.median(taken) / forward:5.2f} x forward (best of each: {best:.2f})", flush=True
            )

        engine.model.max_logprobs = -1  # so that the public path can run in this same engine
        for name, samples in (
            ("one response of 64 tokens to a prompt of 256", 1),
            ("eight that share their prompt", 8),
        ):
            taken = []
            for _ in range(2):
                responses = work(engine.vocab_size, 1, samples, seed=next(seeds))
                taken.append(clock(lambda r=responses: in_engine(r, Want(full_logits=True), True)))
            responses = work(engine.vocab_size, 1, samples)
            public = clock(lambda r=responses: run(r, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True))
            print(
                f"full logits, {name}: in-engine {public / min(taken):.0f} times as fast as the flat public path",
                flush=True,
            )


def clock(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

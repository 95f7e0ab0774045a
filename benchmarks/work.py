"""The standard work of the scoring benchmarks: texts of MATH-500 (of the bundled problems where that file is not beside
the project, or nothing that reads it is installed), cut into prompts of 64–512 tokens, each with 8 responses of 16–256
tokens."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from table import ratios, row

from rl_onoff.types import Rollout

MATH_500 = Path(__file__).parents[2] / "shared/data/math500.parquet"


def texts() -> list[str]:
    if MATH_500.exists() and importlib.util.find_spec("pyarrow"):
        import pyarrow.parquet as pq

        return [str(row[-1]["content"]) for row in pq.read_table(MATH_500)["prompt"].to_pylist()]
    file = Path(__file__).parents[1] / "rl_onoff/data/problems.jsonl"
    return [json.loads(line)["question"] for line in file.read_text().splitlines()]


def standard_work(tokenizer: Any, prompts: int, responses: int = 8, seed: int = 0) -> list[Rollout]:
    """The responses to so many prompts; another seed shares no prompt with it."""
    chance = np.random.default_rng(seed)
    source = np.array(tokenizer.encode("\n".join(texts())), np.int32)

    def piece(shortest: int, longest: int) -> np.ndarray:
        size = int(chance.integers(shortest, longest + 1))
        start = int(chance.integers(len(source) - size))
        return source[start : start + size]

    return [
        Rollout(request_id=str(number), sample=sample, prompt_ids=prompt, token_ids_T=piece(16, 256))
        for number in range(prompts)
        for prompt in [piece(64, 512)]
        for sample in range(responses)
    ]


def arguments(description: str | None) -> argparse.Namespace:
    """The options of the engines' scoring benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def score_rows(
    engine: str, public: str, bar: str, compare: Callable[..., tuple[float, float, float]], backend: Any,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Rounds of `compare`, which gives the seconds of our scores, of the public API and of the bare forward pass."""
    tokenizer = backend.get_tokenizer()
    compare(backend, standard_work(tokenizer, 1, 2), args.dtype)  # the first calls are slow
    rounds = [
        compare(backend, standard_work(tokenizer, args.prompts, seed=1 + number), args.dtype)
        for number in range(args.rounds)
    ]
    ours, theirs, forward = (list(seconds) for seconds in zip(*rounds, strict=True))
    work = f"score, {engine}, {args.prompts} prompts × 8 responses, statistics and top 20"
    row(work, f"public {public}, time / ours", ratios(theirs, ours), bar)
    row(work, "forward pass alone, time / ours", ratios(forward, ours), ">= 1")

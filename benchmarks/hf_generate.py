"""Sampling with HuggingFace against `model.generate` at its best batch: responses of equal length, and of lengths up to
1:20 apart, which neither side knows before a response ends.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/hf_generate.py [MODEL] [--responses 128] [--tokens 80] [--rounds 2]

Decoding is greedy, so that both give the same tokens, which is checked before a time is printed; no token ends a
response, so that its length is the one given. What stops a response at its length is a stopping criterion there and a
limit here.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from machine import versions  # beside this file
from table import ratios, row
from transformers import StoppingCriteria, StoppingCriteriaList

from rl_onoff.backends import create_backend
from rl_onoff.backends.huggingface.backend import HuggingFaceBackend
from rl_onoff.types import Sampling, sample_requests

PROMPT_TOKENS = (24, 64)
BATCHES = (32, 64, 128)


class Lengths(StoppingCriteria):
    """Ends the row i of a batch after `limits[i]` tokens, as an end token would."""

    def __init__(self, start: int, limits: np.ndarray, device: Any):
        self.start, self.limits = start, torch.as_tensor(limits, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.start >= self.limits


def generated(model: Any, prompts: list[np.ndarray], limits: np.ndarray, size: int) -> list[list[int]]:
    """By `model.generate`, batch after batch, prompts of like length together."""
    found: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        width = max(len(prompts[i]) for i in batch)
        ids_BL = np.zeros((len(batch), width), np.int64)
        mask_BL = np.zeros_like(ids_BL)
        for at, i in enumerate(batch):
            ids_BL[at, width - len(prompts[i]) :], mask_BL[at, width - len(prompts[i]) :] = prompts[i], 1
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        with torch.no_grad():
            output = model.generate(
                **{name: torch.as_tensor(value, device=model.device) for name, value in inputs.items()},
                max_new_tokens=int(limits[batch].max()), do_sample=False, eos_token_id=None, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Lengths(width, limits[batch], model.device)]),
            )  # fmt: skip
        for at, i in enumerate(batch):
            found[i] = output[at, width : width + limits[i]].tolist()
    return found


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def check(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """The same tokens, but for two tokens that are equally likely up to rounding."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert [*map(len, ours)] == [*map(len, theirs)] and same >= 0.97 * len(ours), f"{same} of {len(ours)} are the same"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--responses", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=80, help="of the longest response")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    config = {"backend_type": "huggingface", "model_name": args.model, "backend_specific": {"dtype": args.dtype}}
    backend = create_backend(config)
    assert isinstance(backend, HuggingFaceBackend)
    backend.load()
    backend._info = dataclasses.replace(backend.info, eos_ids=())
    model, rng = backend._split.whole, np.random.default_rng(0)
    prompts = [rng.integers(5, 49000, rng.integers(*PROMPT_TOKENS)).astype(np.int32) for _ in range(args.responses)]
    skewed = np.exp(rng.uniform(np.log(args.tokens / 20), np.log(args.tokens), args.responses)).astype(int)
    print(versions(torch=torch.__version__, transformers=transformers.__version__), f"batch {backend.info.batch}")
    cases = {"equal lengths": np.full(args.responses, max(1, args.tokens // 3)), "lengths skewed 1:20": skewed}
    bars = {"equal lengths": ">= 1.0", "lengths skewed 1:20": ">= 2.0"}
    for name, limits in cases.items():

        def ours(limits: np.ndarray = limits) -> list[list[int]]:
            requests = [
                sample_requests(id=str(i), prompt_ids=ids, sampling=Sampling(max_new_tokens=int(n), temperature=0))
                for i, (ids, n) in enumerate(zip(prompts, limits, strict=True))
            ]
            done = {rollout.request_id: rollout.token_ids_T.tolist() for rollout in backend.complete(requests)}
            return [done[str(i)] for i in range(len(prompts))]

        first = {size: timed(lambda size=size: generated(model, prompts, limits, size)) for size in BATCHES}  # noqa: B023
        best = min(first, key=lambda size: first[size][0])
        check(ours(), first[best][1])
        pairs = [
            (timed(lambda: generated(model, prompts, limits, best))[0], timed(ours)[0])  # noqa: B023
            for _ in range(args.rounds)
        ]
        speeds = ", ".join(f"{size}: {limits.sum() / seconds:.0f}" for size, (seconds, _) in first.items())
        theirs, mine = zip(*pairs, strict=True)
        against = f"model.generate, batch {best} (tokens/s by batch: {speeds}), time / ours"
        row(f"generate, HuggingFace, {name}", against, ratios(theirs, mine), bars[name])


if __name__ == "__main__":
    main()

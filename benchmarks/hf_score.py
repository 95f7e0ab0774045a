"""Scoring with HuggingFace, all statistics and top-20: time against lm-evaluation-harness (sums of logprobs alone) and
against the model's body and LM head with nothing else, and peak memory against full logits.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/hf_score.py [MODEL] [--data math500.parquet] [--prompts 8]

The standard work is 32 prompts of 64–512 tokens × 8 responses of 16–256 tokens, pieces of MATH-500; without --data they
are pieces of the bundled problems. The default of 8 prompts takes a few minutes on two cores.
The numbers are compared before a time is printed. Without lm-eval (`pip install lm-eval`) its row is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from machine import versions  # beside this file
from table import ratios, row

from rl_onoff.backends import create_backend
from rl_onoff.data.prompts import PROBLEMS
from rl_onoff.types import Rollout, Want

WANT = Want(top_k=20)
BATCHES = (4, 8, 16)


def backend_of(model: str) -> Any:
    options = {"backend_type": "huggingface", "model_name": model, "backend_specific": {"dtype": "float32"}}
    backend = create_backend(options)
    backend.load()
    return backend


def work(backend: Any, args: argparse.Namespace) -> list[Rollout]:
    rng = np.random.default_rng(0)
    if args.data is None:
        text = PROBLEMS.read_text()
    else:
        import pyarrow.parquet as parquet

        rows = parquet.read_table(args.data).to_pylist()
        text = "\n\n".join(value for row in rows for value in row.values() if isinstance(value, str))
    tokens = np.asarray(backend.get_tokenizer().encode(text), np.int32)

    def piece(least: int, most: int) -> np.ndarray:
        size = int(rng.integers(least, most + 1))
        start = int(rng.integers(0, len(tokens) - size))
        return tokens[start : start + size]

    return [
        Rollout(request_id=str(i), sample=sample, prompt_ids=prompt_ids, token_ids_T=piece(16, 256))
        for i, prompt_ids in enumerate([piece(64, 512) for _ in range(args.prompts)])
        for sample in range(8)
    ]


def padded(rollouts: list[Rollout]) -> torch.Tensor:
    ids_BL = np.zeros((len(rollouts), max(r.num_tokens for r in rollouts)), np.int64)
    for row_L, r in zip(ids_BL, rollouts, strict=True):
        row_L[: r.num_tokens] = np.concatenate([r.prompt_ids, r.token_ids_T])
    return torch.as_tensor(ids_BL)


def by_harness(backend: Any, rollouts: list[Rollout]) -> Callable[[int], list[float]]:
    """Sums of logprobs by lm-evaluation-harness, with batches of a size."""
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=backend._split.whole, tokenizer=backend.get_tokenizer(), backend="causal")
    asked = [
        ((f"{r.request_id} {r.sample}", ""), r.prompt_ids.tolist(), r.token_ids_T.tolist()) for r in rollouts
    ]  # fmt: skip

    def run(size: int) -> list[float]:
        found = harness._loglikelihood_tokens(asked, disable_tqdm=True, override_bs=size)
        return [total for total, _ in found]

    return run


def body_and_head(backend: Any, rollouts: list[Rollout], size: int = 4) -> None:
    """The model's body, and its LM head for the rows of the responses, in batches of like length."""
    split = backend._split
    in_order = sorted(rollouts, key=lambda rollout: rollout.num_tokens)
    with torch.no_grad():
        for at in range(0, len(in_order), size):
            batch = in_order[at : at + size]
            hidden_BLD = split.body(padded(batch), use_cache=False).last_hidden_state
            for r, hidden_LD in zip(batch, hidden_BLD, strict=True):
                split.head(hidden_LD[len(r.prompt_ids) - 1 : r.num_tokens - 1])


def full_logits(backend: Any, rollouts: list[Rollout]) -> None:
    """All statistics from log_softmax over (B, T, V)."""
    ids_BL = padded(rollouts)
    with torch.no_grad():
        logprobs_BLV = backend._split.whole(ids_BL, use_cache=False).logits.float().log_softmax(-1)
        logprobs_BLV[:, :-1].gather(-1, ids_BL[:, 1:, None])
        logprobs_BLV.topk(WANT.top_k, -1)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_kib() -> int:  # not ru_maxrss, which a child takes over from whoever started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])


def child(way: str, args: argparse.Namespace) -> None:
    """Print the peak of one way above the weights, for 16 rollouts."""
    backend = backend_of(args.model)
    rollouts = work(backend, args)[:16]
    list(backend.score(rollouts[:1], WANT))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = peak_kib()
    full_logits(backend, rollouts) if way == "full" else list(backend.score(rollouts, WANT))
    print(peak_kib() - before)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--data", help="a parquet file whose columns of text are taken")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("full", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args)
    backend = backend_of(args.model)
    rollouts = work(backend, args)
    print(versions(torch=torch.__version__, transformers=transformers.__version__), f"{args.prompts} prompts x 8")

    def ours() -> list[float]:
        scores = {s.key: float(s.logprobs_T.sum(dtype=np.float64)) for s in backend.score(rollouts, WANT)}
        return [scores[r.key] for r in rollouts]

    try:
        theirs = by_harness(backend, rollouts)
    except ImportError as error:
        print(f"lm-evaluation-harness is not compared: {error}: pip install lm-eval")
    else:
        first = {size: seconds(lambda size=size: theirs(size)) for size in BATCHES}
        best = min(first, key=lambda size: first[size])
        np.testing.assert_allclose(ours(), theirs(best), rtol=1e-4, atol=5e-2)
        pairs = [(seconds(lambda: theirs(best)), seconds(ours)) for _ in range(args.rounds)]
        harness, mine = zip(*pairs, strict=True)
        against = f"lm-eval HFLM.loglikelihood, batch {best}, time / ours"
        row("score, HuggingFace, all statistics and top-20", against, ratios(harness, mine), ">= 4")
    unique = [rollouts[i] for i in range(0, len(rollouts), 8)] * 2
    unique = [  # prompts that differ in their first token share nothing
        Rollout(
            request_id=str(i), sample=0, prompt_ids=np.append(np.int32(i + 5), r.prompt_ids), token_ids_T=r.token_ids_T
        )
        for i, r in enumerate(unique)
    ]
    body_and_head(backend, unique)
    pairs = [
        (seconds(lambda: list(backend.score(unique, WANT))), seconds(lambda: body_and_head(backend, unique)))
        for _ in range(args.rounds)
    ]
    mine, bare = zip(*pairs, strict=True)
    row("score, HuggingFace, unique prompts, our time", "body + LM head of the rows", ratios(mine, bare), "<= 1.25")
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    full, own = (
        int(subprocess.run([*command, way], capture_output=True, text=True, check=True).stdout.split()[-1]) / 1024
        for way in ("full", "ours")
    )
    against = "log_softmax over (B, T, V), 16 rollouts"
    row("score, HuggingFace, peak above the weights", against, [own / full], "<= 0.05")


if __name__ == "__main__":
    main()

"""Statistics of one chunk of bfloat16 logits on a GPU, against one read of them from memory.

    python benchmarks/token_stats.py [rounds]

Vocabularies of SmolLM2 and Qwen3, as many rows as the engines compute at once: all statistics with and without the top
20, as an engine's step asks for them, before the copy to the host. They must agree with torch's in float64.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import versions
from table import ratios, row

from rl_onoff.backends.token_stats import StatsBuffer, _kernel, chunk_rows, token_stats
from rl_onoff.types import Want

CALLS = 20  # in a row: the host launches ahead, as in a step


def seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS


def check(logits_RV: torch.Tensor, token_ids_R: torch.Tensor, want: Want) -> None:
    some = slice(16)
    ours = token_stats(logits_RV[some], token_ids_R[some], want).arrays()
    expected = token_stats(logits_RV[some].double(), token_ids_R[some], want).arrays()
    for name in expected.keys() - {"top_ids_TK"}:  # equal logits are many in bfloat16
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-4, err_msg=name)


def measure(device: str, vocab_size: int, rounds: int) -> None:
    num_rows = chunk_rows(vocab_size, device)
    logits_RV = (4 * torch.randn(num_rows, vocab_size, device=device)).bfloat16()
    token_ids_R = torch.randint(vocab_size, (num_rows,), device=device)
    by = "Triton's kernel" if _kernel(logits_RV.device, logits_RV.dtype) else "torch"
    for top_k in (20, 0):
        want = Want(top_k=top_k)
        check(logits_RV, token_ids_R, want)
        ways = (lambda want=want: StatsBuffer(num_rows, want).add(logits_RV, token_ids_R)), (lambda: logits_RV.amax(-1))
        for way in ways:
            seconds(way)  # the first calls are slow
        ours, read = zip(*(tuple(map(seconds, ways)) for _ in range(rounds)), strict=True)
        print(f"  ours {min(ours) * 1e6:.0f} µs, a read {logits_RV.nbytes / min(read) / 1e9:.0f} GB/s at most")
        work = f"statistics{' and top 20' if top_k else ''} of {num_rows} × {vocab_size} logits by {by}"
        row(work, "one read of them, time", ratios(ours, read), "<= 2")


def main() -> None:
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU: nothing was measured")
        return
    print(versions(torch=torch.__version__))
    for vocab_size in (49_152, 151_936):
        measure("cuda", vocab_size, int(sys.argv[1]) if len(sys.argv) > 1 else 20)


if __name__ == "__main__":
    main()

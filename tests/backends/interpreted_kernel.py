"""Run: TRITON_INTERPRET=1 python -m tests.backends.interpreted_kernel CASES RESULTS

Statistics of saved logits by Triton's kernel, in Triton's interpreter. A process of its own: the variable must be set
before Triton is imported.
"""

from __future__ import annotations

import sys

import torch

from rl_onoff.backends import token_kernel, token_stats


def main() -> None:
    token_stats.KERNEL_DEVICE = "cpu"
    results = {}
    for name, (logits_RV, token_ids_R, want, low) in torch.load(sys.argv[1], weights_only=False).items():
        assert token_stats._kernel(logits_RV.device, logits_RV.dtype) is token_kernel.row_stats
        results[name] = token_stats.token_stats(logits_RV, token_ids_R, want, low=low).arrays()
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()

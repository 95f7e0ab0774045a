"""Statistics of rows of logits in one read of them, as a Triton kernel for GPUs; `token_stats` is what calls it.

Shapes: R rows (positions), V vocabulary, B blocks of BLOCK neighbouring logits, the last of which may be left out.
"""
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (Triton's own hints do not know what a kernel may do)

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

SLOTS = 16  # blocks read at a time
LEAST = tl.constexpr(-3.4028234663852886e38)  # of float32: unlike -inf, it can be subtracted from itself
FAR = tl.constexpr(-1e4)  # exp is 0 there, and times a sum is still finite


@triton.jit
def kernel(
    logits_RV, chosen_R, logsumexp_R, entropy_R, rank_R, maxima_RB, row_stride, vocab_size,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row. Each of the SLOTS keeps sums of its own, relative to the largest logit it has met: `total` of
    exp(z - largest), `moment` of (z - largest) exp(z - largest)."""
    row, num_blocks = tl.program_id(0).to(tl.int64), vocab_size // BLOCK
    slots, within = tl.arange(0, SLOTS), tl.arange(0, BLOCK)
    chosen = tl.load(chosen_R + row).to(tl.float32)
    largest = tl.full([SLOTS], LEAST, tl.float32)
    total = tl.zeros([SLOTS, BLOCK], tl.float32)
    moment = tl.zeros([SLOTS, BLOCK], tl.float32)
    above = tl.zeros([SLOTS, BLOCK], tl.int32)
    for first in tl.range(0, vocab_size, SLOTS * BLOCK, num_stages=3):
        at = first + slots[:, None] * BLOCK + within[None, :]
        z = tl.load(logits_RV + row * row_stride + at, mask=at < vocab_size, other=-float("inf"))
        highest = tl.max(z, 1)
        block = first // BLOCK + slots
        tl.store(maxima_RB + row * num_blocks + block, highest, mask=block < num_blocks)
        z = z.to(tl.float32)
        # within float32's range: where a logit is infinite the sums are too
        now = tl.minimum(tl.maximum(largest, highest.to(tl.float32)), -LEAST)
        shift, largest = tl.maximum(largest - now, FAR), now
        below = z - now[:, None]
        exp = tl.exp(below)
        moment = (moment + shift[:, None] * total) * tl.exp(shift)[:, None] + tl.where(exp != 0, below * exp, 0.0)
        total = total * tl.exp(shift)[:, None] + exp
        above += (z > chosen).to(tl.int32)
    most = tl.max(largest, 0)
    shift = tl.maximum(largest - most, FAR)
    total = tl.sum(total, 1)
    moment = tl.sum((tl.sum(moment, 1) + shift * total) * tl.exp(shift), 0)
    total = tl.sum(total * tl.exp(shift), 0)
    tl.store(logsumexp_R + row, most + tl.log(total))
    tl.store(entropy_R + row, tl.log(total) - moment / total)
    tl.store(rank_R + row, 1 + tl.sum(tl.sum(above, 1), 0))


def row_stats(logits_RV: Tensor, chosen_R: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logsumexp, entropy, rank of the `chosen` logits, largest logit of every whole block)."""
    import torch

    num_rows, vocab_size = logits_RV.shape
    if logits_RV.stride(-1) != 1:
        logits_RV = logits_RV.contiguous()
    logsumexp_R, entropy_R = torch.empty(2, num_rows, device=logits_RV.device)
    rank_R = torch.empty(num_rows, dtype=torch.int32, device=logits_RV.device)
    maxima_RB = logits_RV.new_empty(num_rows, vocab_size // block)
    with torch.cuda.device_of(logits_RV):
        kernel[(num_rows,)](
            logits_RV, chosen_R.contiguous(), logsumexp_R, entropy_R, rank_R, maxima_RB, logits_RV.stride(0),
            vocab_size, SLOTS=SLOTS, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return logsumexp_R, entropy_R, rank_R, maxima_RB

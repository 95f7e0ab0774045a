"""Logits of some positions -> what they say about the token that was sampled there, for every engine.

Shapes: R rows (positions), V vocabulary, K top tokens. All arithmetic is float32, or float64 where the logits are; the
logits are never changed: they may be the engine's own buffer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rl_onoff.types import Sampling, TokenScores, Want, copy_rows

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CACHE_BYTES = 6 * 2**20  # of logits at a time: statistics are fastest where these stay in a CPU's cache
CPU_CHUNK_BYTES = 4 * CACHE_BYTES  # the LM head wants more rows at a time: its weights are read once for all of them
GPU_CHUNK_BYTES = 256 * 2**20
KERNEL_DEVICE = "cuda"  # where Triton's kernel is tried
BLOCK = 128  # neighbouring logits of which the largest is known when the top tokens are sought
NUCLEUS_TOKENS = 512  # tokens looked at first when the nucleus of top-p is sought


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """How many rows of logits to hold at once."""
    size = CPU_CHUNK_BYTES if device_type == "cpu" else GPU_CHUNK_BYTES
    return max(1, size // (4 * vocab_size))


def token_stats(logits_RV: Tensor, token_ids_R: Tensor, want: Want, *, low: bool = False) -> TokenScores:
    """Statistics of `token_ids_R` under the raw distributions `softmax(logits_RV)`; `low`: with the chosen logprob from
    a log-softmax in the logits' own type."""
    buffer = StatsBuffer(len(logits_RV), want, low=low)
    buffer.add(logits_RV, token_ids_R)
    return buffer.scores()


def stats_of_hidden(
    hidden_RD: Any, head: Callable[[Any], Tensor], token_ids_R: Tensor, want: Want, *, rows: int, low: bool = False
) -> StatsBuffer:
    """Like token_stats, of what `head` makes of hidden states: (rows, V) logits at a time, never more."""
    buffer = StatsBuffer(len(hidden_RD), want, low=low)
    for start in range(0, len(hidden_RD), rows):
        buffer.add(head(hidden_RD[start : start + rows]), token_ids_R[start : start + rows])
    return buffer.send()


class StatsBuffer:
    """Statistics of rows whose logits come in chunks. They stay on the device of the logits, so that a GPU never waits
    for the host between two chunks; `send` starts the one copy to the host, and `scores` waits for its end."""

    def __init__(self, num_rows: int, want: Want, *, low: bool = False):
        self.want, self._low = want, low
        self._num_rows, self._filled = num_rows, 0
        self._whole: dict[str, Tensor] = {}
        self._copied: Any = None  # CUDA event: the copy is done

    @property
    def complete(self) -> bool:
        return bool(self._whole) and self._filled == self._num_rows

    def add(self, logits_RV: Tensor, token_ids_R: Tensor) -> Tensor:
        """Take in the rows that follow; returns their logprobs."""
        import torch

        start, num_rows = self._filled, len(logits_RV)
        size = max(1, CACHE_BYTES // (4 * logits_RV.shape[-1]) if logits_RV.device.type == "cpu" else num_rows)
        for at in range(0, max(1, num_rows), size):
            part = slice(at, at + size)
            for name, values in _stats(logits_RV[part], token_ids_R[part], self.want, self._low).items():
                if name not in self._whole:
                    dtype = torch.float32 if values.is_floating_point() else torch.int32
                    device = "cpu" if name == "logits_TV" else values.device  # which would not hold those of a batch
                    self._whole[name] = torch.empty(self._num_rows, *values.shape[1:], dtype=dtype, device=device)
                self._whole[name][start + at : start + at + len(values)] = values
        self._filled += num_rows
        return self._whole["logprobs_T"][start : self._filled]

    def send(self) -> StatsBuffer:
        """Start copying to the host, in which the host may already launch what comes next."""
        import torch

        for name, values in self._whole.items():
            if values.is_cuda:
                pinned = torch.empty_like(values, device="cpu", pin_memory=True)
                self._whole[name] = pinned.copy_(values, non_blocking=True)
                self._copied = torch.cuda.current_stream(values.device).record_event()
        return self

    def scores(self) -> TokenScores:
        assert self.complete
        if self.send()._copied is not None:
            self._copied.synchronize()
        whole: dict[str, Any] = {}
        for name, values in self._whole.items():  # pinned memory is scarce, and scores may live as long as the run
            whole[name] = (values.clone() if values.is_pinned() else values.cpu()).numpy()
        return TokenScores(**whole)


def _stats(logits_RV: Tensor, token_ids_R: Tensor, want: Want, low: bool) -> dict[str, Tensor]:
    """The arrays of TokenScores, on the device of the logits."""
    import torch

    with torch.no_grad():
        kernel = _kernel(logits_RV.device, logits_RV.dtype)
        z_RV = logits_RV if kernel or logits_RV.dtype == torch.float64 else logits_RV.float()
        chosen_R = z_RV.gather(-1, token_ids_R.long()[:, None])[:, 0]
        logsumexp_R, entropy_R, rank_R, maxima_RB = (kernel or _row_stats)(z_RV, chosen_R, BLOCK)
        found = {
            "token_ids_T": token_ids_R, "logprobs_T": chosen_R - logsumexp_R, "entropy_T": entropy_R,
            "logsumexp_T": logsumexp_R, "rank_T": rank_R,
        }  # fmt: skip
        if low:
            found["logprobs_T"] = logits_RV.log_softmax(-1).gather(-1, token_ids_R.long()[:, None])[:, 0]
        if want.top_k:
            top_RK, found["top_ids_TK"] = _top(z_RV, maxima_RB, min(want.top_k, z_RV.shape[-1]))
            found["top_logprobs_TK"] = top_RK - logsumexp_R[:, None]
        if want.sampler:
            wide_RV = z_RV.to(logsumexp_R.dtype)
            found["processed_logprobs_T"], found["nucleus_mass_T"] = _under_sampler(wide_RV, token_ids_R, want.sampler)
        if want.full_logits:
            found["logits_TV"] = z_RV
        return found


def _row_stats(z_RV: Tensor, chosen_R: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logsumexp, entropy, rank of the `chosen` logits, largest logit of every whole block)."""
    import torch

    logsumexp_R = torch.logsumexp(z_RV, -1)
    # entropy = logsumexp - E[z]; z - logsumexp <= 0, so exp is safe, and -inf logits (masked tokens) add nothing
    shifted_RV = z_RV - logsumexp_R[:, None]
    probs_RV = shifted_RV.exp()
    entropy_R = -torch.where(probs_RV != 0, probs_RV * shifted_RV, 0.0).sum(-1)
    rank_R = (z_RV > chosen_R[:, None]).sum(-1) + 1
    return logsumexp_R, entropy_R, rank_R, _blocks(z_RV, block).amax(-1)


@cache
def _kernel(device: Any, dtype: Any) -> Callable[..., tuple[Tensor, ...]] | None:
    """The Triton kernel that does the work of `_row_stats` in one read, on GPUs where its numbers are the same."""
    import torch

    if device.type != KERNEL_DEVICE or dtype == torch.float64:
        return None
    try:
        from rl_onoff.backends.token_kernel import row_stats

        # 3008: like most vocabularies a multiple of 16, for which Triton compiles the kernel apart
        z_RV = (8 * torch.arange(4 * 3008, device=device).sin()).to(dtype).view(4, 3008)
        ours, expected = (f(x_RV, x_RV[:, 7], BLOCK) for f, x_RV in ((row_stats, z_RV), (_row_stats, z_RV.float())))
        torch.testing.assert_close(ours, expected, check_dtype=False, rtol=1e-5, atol=1e-4)
    except Exception as error:  # a compiler is missing, a GPU is too old, …: torch still computes all of it
        log.warning("Triton's kernel does not work on %s, so statistics take longer: %s", device, error)
        return None
    return row_stats


def _blocks(z_RV: Tensor, block: int) -> Tensor:
    """The logits as (R, B, block), without those past the last whole block."""
    num = z_RV.shape[-1] // block
    return z_RV[:, : num * block].unflatten(-1, (num, block))


def _top(z_RV: Tensor, maxima_RB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids) of the K largest logits: they all lie in the K blocks with the largest maxima, or past the last
    block. Not worth it where these are most of the blocks."""
    import torch

    num = maxima_RB.shape[-1]
    if num < 2 * k:
        return z_RV.topk(k, -1)
    blocks_RK = maxima_RB.topk(k, -1, sorted=False).indices
    rows_R1 = torch.arange(len(z_RV), device=z_RV.device)[:, None]
    some_RN = _blocks(z_RV, BLOCK)[rows_R1, blocks_RK].flatten(1)
    values_RK, at_RK = torch.cat([some_RN, z_RV[:, num * BLOCK :]], -1).topk(k, -1)
    blocks_RK = torch.cat([blocks_RK, torch.full_like(rows_R1, num)], -1)
    return values_RK, blocks_RK.gather(-1, at_RK // BLOCK) * BLOCK + at_RK % BLOCK


class PartialScores:
    """The statistics of one response, filled in by position while an engine computes its prefill in chunks."""

    def __init__(self, num_tokens: int, want: Want, logits_file: Path | None = None):
        self.want, self.num_tokens = want, num_tokens
        self.arrays: dict[str, np.ndarray] = {}
        self._filled_T = np.zeros(num_tokens, bool)
        self._logits_file = logits_file  # where full logits go, hundreds of megabytes: `read_logits` maps it

    @property
    def complete(self) -> bool:
        return bool(self._filled_T.all())

    def fill(self, start: int, scores: TokenScores) -> None:
        """Take in the rows from response position `start` on."""
        copy_rows(scores, self.arrays, start, self.num_tokens)
        self._filled_T[start : start + len(scores.token_ids_T)] = True

    def write_logits(self, start: int, logits_RV: Tensor) -> None:
        """Write full logits, where they are wanted, before another chunk takes their place."""
        if self._logits_file is not None and len(logits_RV):
            mode = "r+" if self._logits_file.exists() else "w+"
            file = np.memmap(self._logits_file, np.float32, mode, shape=(self.num_tokens, logits_RV.shape[-1]))
            file[start : start + len(logits_RV)] = logits_RV.detach().float().cpu().numpy()


def read_logits(file: Path, num_tokens: int) -> np.ndarray:
    """Full logits that another process wrote (T, V); the file may be removed while the array lives."""
    return np.asarray(np.memmap(file, np.float32, "c")).reshape(num_tokens, -1)  # copy on write: private to its reader


class Span(NamedTuple):
    """Rows [begin, end) of an engine's step, which are those of one response from its position `first` on."""

    scores: PartialScores
    begin: int
    end: int
    first: int

    def put(self, scores: TokenScores) -> None:
        """The scores of all rows of the step, of which this response takes its own: none before it or after it."""
        start, rows = self._own(0, len(scores.token_ids_T))
        self.scores.fill(start, scores[rows])

    def write_logits(self, at: int, logits_RV: Tensor) -> None:
        """Rows from number `at` of the step on, of which this response writes its own."""
        start, rows = self._own(at, len(logits_RV))
        self.scores.write_logits(start, logits_RV[rows])

    def _own(self, at: int, num_rows: int) -> tuple[int, slice]:
        """(response position of the first, which) of these rows are the response's."""
        zero = self.begin - self.first  # the row of the response's first position
        start = max(at, self.begin, zero)
        end = min(at + num_rows, self.end, zero + self.scores.num_tokens)
        return start - zero, slice(start - at, max(start, end) - at)


def process_logits(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """The logits the sampler draws from: divided by temperature, then top-k, top-p on what top-k left, min-p on what is
    left.

    Tokens that are cut get -inf. Order and meaning are those of Transformers' warpers. Greedy decoding keeps only the
    likeliest token.
    """
    import torch

    z_RV = logits_RV.float()
    if sampling.greedy:
        kept_RV = torch.zeros_like(z_RV, dtype=torch.bool).scatter_(-1, z_RV.argmax(-1, keepdim=True), True)
        return z_RV.masked_fill(~kept_RV, -torch.inf)
    if sampling.temperature != 1:
        z_RV = z_RV / sampling.temperature
    if 0 < sampling.top_k < z_RV.shape[-1]:
        kth_R1 = torch.topk(z_RV, sampling.top_k, -1).values[:, -1:]
        z_RV = z_RV.masked_fill(z_RV < kth_R1, -torch.inf)
    if sampling.top_p < 1:
        z_RV = z_RV.masked_fill(_outside_nucleus(z_RV, sampling.top_p), -torch.inf)
    if sampling.min_p > 0:
        floor_R1 = z_RV.max(-1, keepdim=True).values + float(np.log(sampling.min_p))
        z_RV = z_RV.masked_fill(z_RV < floor_R1, -torch.inf)
    return z_RV


def _outside_nucleus(z_RV: Tensor, top_p: float) -> Tensor:
    """Which tokens come after those whose probability reaches top_p. Sorts a whole row only where the likeliest
    NUCLEUS_TOKENS do not reach it: sorting a vocabulary costs more than the rest of the statistics together."""
    import torch

    lse_R1 = z_RV.logsumexp(-1, keepdim=True)
    outside_RV = torch.ones_like(z_RV, dtype=torch.bool)
    rows = torch.arange(len(z_RV), device=z_RV.device)
    for num_tokens in (NUCLEUS_TOKENS, z_RV.shape[-1]):
        top = torch.topk(z_RV[rows], min(num_tokens, z_RV.shape[-1]), -1)
        probs_RK = (top.values - lse_R1[rows]).exp()
        cut_RK = probs_RK.cumsum(-1) - probs_RK >= top_p
        outside_RV[rows] = outside_RV[rows].scatter(-1, top.indices, cut_RK)
        rows = rows[~cut_RK[:, -1]]
        if len(rows) == 0:
            break
    return outside_RV


def _under_sampler(z_RV: Tensor, token_ids_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(processed logprob of the chosen token, probability after temperature that the sampler kept)."""
    import torch

    kept_RV = process_logits(z_RV, sampling)
    kept_lse_R = kept_RV.logsumexp(-1)
    processed_R = kept_RV.gather(-1, token_ids_R.long()[:, None])[:, 0] - kept_lse_R
    if not sampling.greedy and not sampling.truncates:
        return processed_R, torch.ones_like(processed_R)
    all_lse_R = (z_RV / (sampling.temperature or 1.0)).logsumexp(-1)
    return processed_R, (kept_lse_R - all_lse_R).exp()

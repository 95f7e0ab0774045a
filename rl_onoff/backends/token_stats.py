"""Logits of some positions -> what they say about the token that was sampled there. One function, used by every engine.

Shapes: R rows (positions), V vocabulary, K top tokens. All arithmetic is float32, or float64 where the logits
are; the logits are never changed: they may be the engine's own buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rl_onoff.types import Sampling, TokenScores, Want, copy_rows

if TYPE_CHECKING:
    from torch import Tensor

CACHE_BYTES = 6 * 2**20  # of logits at a time: statistics are fastest where these stay in a CPU's cache
CPU_CHUNK_BYTES = 4 * CACHE_BYTES  # the LM head wants more rows at a time: its weights are read once for all of them
GPU_CHUNK_BYTES = 256 * 2**20
NUCLEUS_TOKENS = 512  # tokens looked at first when the nucleus of top-p is sought


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """How many rows of logits to hold at once."""
    size = CPU_CHUNK_BYTES if device_type == "cpu" else GPU_CHUNK_BYTES
    return max(1, size // (4 * vocab_size))


def token_stats(logits_RV: Tensor, token_ids_R: Tensor, want: Want, *, low: bool = False) -> TokenScores:
    """Statistics of `token_ids_R` under the raw distributions `softmax(logits_RV)`, on the device of the logits; `low`:
    with the chosen logprob from a log-softmax in the logits' own type."""
    import torch

    size = max(1, CACHE_BYTES // (4 * logits_RV.shape[-1]))
    if logits_RV.device.type == "cpu" and len(logits_RV) > size:
        starts = range(0, len(logits_RV), size)
        parts = (token_stats(logits_RV[at : at + size], token_ids_R[at : at + size], want, low=low) for at in starts)
        return TokenScores.collect(parts, len(logits_RV))
    with torch.no_grad():
        z_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
        logsumexp_R = torch.logsumexp(z_RV, -1)
        chosen_R1 = z_RV.gather(-1, token_ids_R.long()[:, None])
        # entropy = logsumexp - E[z]; z - logsumexp <= 0, so exp is safe, and -inf logits (masked tokens) add nothing
        shifted_RV = z_RV - logsumexp_R[:, None]
        probs_RV = shifted_RV.exp()
        entropy_R = -torch.where(probs_RV > 0, probs_RV * shifted_RV, 0.0).sum(-1)
        found = {
            "token_ids_T": token_ids_R, "logprobs_T": chosen_R1[:, 0] - logsumexp_R, "entropy_T": entropy_R,
            "logsumexp_T": logsumexp_R, "rank_T": (z_RV > chosen_R1).sum(-1) + 1,
        }  # fmt: skip
        if low:
            found["logprobs_T"] = logits_RV.log_softmax(-1).gather(-1, token_ids_R.long()[:, None])[:, 0].float()
        if want.top_k:
            found["top_logprobs_TK"], found["top_ids_TK"] = shifted_RV.topk(min(want.top_k, z_RV.shape[-1]), -1)
        if want.sampler:
            processed_R, found["nucleus_mass_T"] = _under_sampler(z_RV, token_ids_R, want.sampler)
            found["processed_logprobs_T"] = processed_R
        if want.full_logits:
            found["logits_TV"] = z_RV
        return TokenScores(**{name: _numpy(tensor) for name, tensor in found.items()})


def stats_of_hidden(
    hidden_RD: Any, head: Callable[[Any], Tensor], token_ids_R: Tensor, want: Want, *, rows: int, low: bool = False
) -> TokenScores:
    """Like token_stats, from the last hidden states, or whatever `head` takes: runs it over `rows` positions at a time,
    so that no more than (rows, V) logits are ever held."""
    parts = (
        token_stats(head(hidden_RD[start : start + rows]), token_ids_R[start : start + rows], want, low=low)
        for start in range(0, len(hidden_RD), rows)
    )
    return TokenScores.collect(parts, len(hidden_RD))


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

    def fill(self, start: int, scores: TokenScores, logits_RV: Tensor) -> None:
        """Take in the rows from response position `start` on."""
        end = start + len(logits_RV)
        copy_rows(scores, self.arrays, start, self.num_tokens)
        if self._logits_file is not None:
            mode = "r+" if self._logits_file.exists() else "w+"
            file = np.memmap(self._logits_file, np.float32, mode, shape=(self.num_tokens, logits_RV.shape[-1]))
            file[start:end] = _numpy(logits_RV.float())
        self._filled_T[start:end] = True


def read_logits(file: Path, num_tokens: int) -> np.ndarray:
    """Full logits that another process wrote (T, V); the file may be removed while the array lives."""
    return np.asarray(np.memmap(file, np.float32, "c")).reshape(num_tokens, -1)  # copy on write: private to its reader


class Span(NamedTuple):
    """Rows [begin, end) of an engine's step, which are those of one response from its position `first` on."""

    scores: PartialScores
    begin: int
    end: int
    first: int

    def put(self, at: int, scores: TokenScores, logits_RV: Tensor) -> None:
        """Rows from number `at` of the step on, of which this response takes its own: none before it or after it."""
        zero = self.begin - self.first  # the row of the response's first position
        start = max(at, self.begin, zero)
        end = min(at + len(logits_RV), self.end, zero + self.scores.num_tokens)
        if start < end:
            here = slice(start - at, end - at)
            self.scores.fill(start - zero, scores[here], logits_RV[here])


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


def _numpy(tensor: Tensor) -> Any:
    dtype = np.float32 if tensor.is_floating_point() else np.int32
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=dtype)

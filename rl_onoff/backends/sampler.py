"""The sampler of the engines whose draw is ours (HuggingFace, fake, SGLang): Gumbel-max with noise that depends on the
response's seed and the token's position alone, so that a response depends neither on its batch nor on the device.

Rounding differs with the batch all the same. What a change of the logits by epsilon flips is a draw whose two best
scores are epsilon apart; the inverse of a cumulative sum would flip wherever a boundary between two of the V tokens
moves over its random number, which is a hundred times as often where the distribution is flat (benchmarks/flips.py).

Shapes: R rows (responses), V vocabulary, B tokens of a block, M blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rl_onoff.backends.token_stats import process_logits
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 256  # tokens: noise is made for the blocks and for the tokens of one block, not for the whole vocabulary
GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number: a counter times this visits all numbers


def draw(
    logits_RV: Tensor, samplings: Sequence[Sampling], keys_R: np.ndarray | Tensor, kind: LogprobKind
) -> tuple[Tensor, Tensor]:
    """One token per row, drawn from the processed distribution with the row's key: (ids (R,) int64, logprobs (R,)),
    where the logits are."""
    import torch

    z_RV, keys = logits_RV.detach().float(), torch.as_tensor(keys_R, device=logits_RV.device)
    alike: defaultdict[tuple[float, ...], list[int]] = defaultdict(list)
    for i, sampling in enumerate(samplings):
        alike[sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p].append(i)
    if len(alike) == 1:
        return _drawn(z_RV, samplings[0], keys, kind)
    tokens_R, logprobs_R = torch.empty_like(keys), z_RV.new_empty(len(keys))
    for rows in alike.values():
        tokens_R[rows], logprobs_R[rows] = _drawn(z_RV[rows], samplings[rows[0]], keys[rows], kind)
    return tokens_R, logprobs_R


def _drawn(z_RV: Tensor, sampling: Sampling, keys_R: Tensor, kind: LogprobKind) -> tuple[Tensor, Tensor]:
    import torch

    if sampling.greedy:
        tokens_R = z_RV.argmax(-1)
        if kind is LogprobKind.processed:  # of the one token that is left
            return tokens_R, z_RV.new_zeros(len(z_RV))
        source_RV = z_RV
    else:
        kept_RV = process_logits(z_RV, sampling)
        tokens_R = pick(kept_RV.softmax(-1, dtype=torch.float64), keys_R)
        source_RV = {LogprobKind.processed: kept_RV, LogprobKind.raw: z_RV}.get(kind)
        if source_RV is None:
            source_RV = z_RV / sampling.temperature
    return tokens_R, source_RV.gather(-1, tokens_R[:, None])[:, 0] - source_RV.logsumexp(-1)


def pick(weights_RV: Tensor, keys_R: Tensor) -> Tensor:
    """One token per key (R,) with a probability proportional to its weight; a token of weight 0 is never picked. Where
    all keys share their weights, one row of them (1, V) will do.

    Gumbel-max twice: the block with the largest weight over exponential noise, then the token of that block. That is
    the distribution of the whole, with noise for M + B tokens instead of V.
    """
    import torch

    vocab_size = weights_RV.shape[-1]
    full = vocab_size // BLOCK * BLOCK
    sums_RM = weights_RV[:, :full].unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    sums_RM = torch.cat([sums_RM, weights_RV[:, full:].sum(-1, keepdim=True, dtype=torch.float64)], -1)
    noise_RN = exponential(keys_R, BLOCK + sums_RM.shape[-1])
    first_R1 = BLOCK * (sums_RM / noise_RN[:, BLOCK:]).argmax(-1, keepdim=True)
    ids_RB = first_R1 + torch.arange(BLOCK, device=keys_R.device)
    weights_RB = weights_RV.expand(len(keys_R), -1).gather(-1, ids_RB.clamp(max=vocab_size - 1)) * (ids_RB < vocab_size)
    return first_R1[:, 0] + (weights_RB / noise_RN[:, :BLOCK]).argmax(-1)


def exponential(keys_R: Tensor, count: int) -> Tensor:
    """`count` standard exponential numbers for every key: (R, count) float64, the same on every device."""
    import torch

    counter_N = torch.arange(1, count + 1, device=keys_R.device)
    bits_RN = _mixed(keys_R[:, None] + _mixed(counter_N * GOLDEN))
    return (_shifted(bits_RN, 11).double() + 0.5).mul_(2.0**-53).log_().neg_()


def _mixed(x: Tensor) -> Tensor:
    """64 bits that look random, of 64 bits that do not: the finaliser of SplitMix64."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's own fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Row:
    """One response while it is being sampled."""

    def __init__(self, request: SampleRequest, max_len: int):
        self.request = request
        self.limit = min(request.sampling.max_new_tokens, max_len - len(request.prompt_ids))
        self.keys = np.random.Philox(request.seed)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def most_tokens(self) -> int:
        """Prompt and the longest response there may be."""
        return len(self.request.prompt_ids) + self.limit

    def key(self) -> int:
        """The next 64 bits, signed, of this response's own stream."""
        return int(np.int64(np.uint64(self.keys.random_raw())))

    def append(self, token: int, logprob: float, tokenizer, eos_ids: frozenset[int]) -> None:
        """Take in one sampled token and decide whether the response ends with it."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in eos_ids:
            self.finish = FinishReason.eos
        elif self.request.sampling.stop and self._stopped(tokenizer, self.request.sampling.stop):
            self.finish = FinishReason.stop
        elif len(self.token_ids) >= self.limit:
            self.finish = FinishReason.length

    def _stopped(self, tokenizer, stop: Sequence[str]) -> bool:
        # a character is at most 4 bytes and a token at least one, so a stop string that ends here lies in this many
        # tokens; what the last tokens alone decode to may differ from their part of the whole text
        window = 4 * max(map(len, stop)) + 8
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (self.token_ids[-window:], self.token_ids))
        return all(any(string in text for string in stop) for text in texts)

    def rollout(self, kind: LogprobKind) -> Rollout:
        ids_T, logprobs_T = np.asarray(self.token_ids, np.int32), np.asarray(self.logprobs, np.float32)
        return Rollout(
            request_id=self.request.request_id, sample=self.request.sample, token_ids_T=ids_T, logprobs_T=logprobs_T,
            kind=kind, finish_reason=self.finish,
        )  # fmt: skip

"""The sampler of the engines whose decoding loop is ours (HuggingFace, fake): one uniform number a token, from a stream
that depends on the response's seed alone, so that a response does not depend on its batch or on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rl_onoff.backends.token_stats import process_logits
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling

if TYPE_CHECKING:
    from torch import Tensor


def draw(
    logits_RV: Tensor, samplings: Sequence[Sampling], uniform_R: np.ndarray, kind: LogprobKind
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row by inverting the processed distribution's cumulative sum; returns (ids (R,), logprobs (R,))."""
    import torch

    tokens, logprobs = np.empty(len(samplings), np.int32), np.empty(len(samplings), np.float32)
    for sampling in _distinct(samplings):
        rows = [i for i, other in enumerate(samplings) if other == sampling]
        z_RV = logits_RV[rows].float()
        kept_RV = process_logits(z_RV, sampling)
        if sampling.greedy:
            chosen_R = z_RV.argmax(-1)
        else:
            cdf_RV = kept_RV.softmax(-1, dtype=torch.float64).cumsum(-1)
            at_R1 = torch.as_tensor(uniform_R[rows], device=cdf_RV.device)[:, None] * cdf_RV[:, -1:]
            # the first token whose cumulative probability exceeds the number: never one of probability 0
            chosen_R = torch.searchsorted(cdf_RV, at_R1, right=True)[:, 0].clamp_(max=cdf_RV.shape[-1] - 1)
        if kind is LogprobKind.raw:
            source_RV = z_RV
        elif kind is LogprobKind.scaled:
            source_RV = z_RV if sampling.greedy else z_RV / sampling.temperature
        else:
            source_RV = kept_RV
        tokens[rows] = chosen_R.cpu().numpy()
        logprobs[rows] = (source_RV.gather(-1, chosen_R[:, None])[:, 0] - source_RV.logsumexp(-1)).cpu().numpy()
    return tokens, logprobs


def _distinct(samplings: Sequence[Sampling]) -> list[Sampling]:
    seen: list[Sampling] = []
    for sampling in samplings:
        if sampling not in seen:
            seen.append(sampling)
    return seen


class Row:
    """One response while it is being sampled."""

    def __init__(self, request: SampleRequest, max_len: int):
        self.request = request
        room = max_len - len(request.prompt_ids)
        self.limit = min(request.sampling.max_new_tokens, room)
        self.uniforms = np.random.Generator(np.random.Philox(request.seed))
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None

    def uniform(self) -> float:
        """The next number in [0, 1) of this response's own stream."""
        return self.uniforms.random()

    def append(self, token: int, logprob: float, tokenizer, eos_ids: frozenset[int]) -> None:
        """Take in one sampled token and decide whether the response ends with it."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in eos_ids:
            self.finish = FinishReason.eos
        elif self._stopped(tokenizer):
            self.finish = FinishReason.stop
        elif len(self.token_ids) >= self.limit:
            self.finish = FinishReason.length

    def _stopped(self, tokenizer) -> bool:
        stop = self.request.sampling.stop
        if not stop:
            return False
        # a character is at most 4 bytes and a token at least one, so a stop string that ends here lies in this many tokens
        window = 4 * max(map(len, stop)) + 8
        tail = tokenizer.decode(self.token_ids[-window:], skip_special_tokens=True)
        if not any(string in tail for string in stop):
            return False
        text = tokenizer.decode(self.token_ids, skip_special_tokens=True)
        return any(string in text for string in stop)

    def rollout(self, kind: LogprobKind) -> Rollout:
        return Rollout(
            request_id=self.request.request_id,
            sample=self.request.sample,
            token_ids_T=np.asarray(self.token_ids, np.int32),
            logprobs_T=np.asarray(self.logprobs, np.float32),
            kind=kind,
            finish_reason=self.finish,
        )

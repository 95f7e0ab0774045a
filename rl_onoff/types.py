"""The data that flows through a run. Shapes: P prompt tokens, T response tokens, K top tokens, V vocabulary.

Row t of every array describes response token t: the distribution that produced it, not the one that follows it.
A response is named by (request id, sample); engines meet on disk, joined by that pair. Text is never tokenised again
between stages: token ids are the currency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from rl_onoff.sampling import LogprobKind, Sampling

__all__ = ["Completion", "FinishReason", "Key", "LogprobKind", "Request", "Response", "Sampling", "TokenScores", "Want"]

Key = tuple[str, int]  # (request id, sample)


class FinishReason(Enum):
    """Why a response ended."""

    stop = "stop"  # a stop string was completed
    eos = "eos"  # the model sampled an end-of-sequence token; it is the last of token_ids_T
    length = "length"  # max_new_tokens was reached, or the context was full


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to be answered `sampling.n` times."""

    id: str
    prompt_ids: np.ndarray  # (P,) int32
    sampling: Sampling
    samples: tuple[int, ...] | None = None  # which of the n sample indices to draw; None: all of them
    prompt: str = ""  # the prompt as text, after the chat template; for people, never tokenised again
    meta: Mapping[str, Any] = field(default_factory=dict)  # question, answer, group columns: whatever the row had

    @property
    def sample_indices(self) -> tuple[int, ...]:
        return tuple(range(self.sampling.n)) if self.samples is None else self.samples

    def seed_of(self, sample: int) -> int:
        """The engine's seed for one response: 31 bits that depend on (seed, prompt, sample), not on the batch."""
        text = f"{self.sampling.seed} {sample} ".encode() + np.asarray(self.prompt_ids, np.int32).tobytes()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled response, with the logprobs the engine reported while it sampled."""

    request_id: str
    sample: int
    token_ids_T: np.ndarray  # int32: what was sampled, EOS and the tokens that completed a stop string included
    text: str  # without special tokens, cut before the first stop string
    logprobs_T: np.ndarray  # float32, nats
    kind: LogprobKind
    finish_reason: FinishReason

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """A prompt and the token ids of one response to it: what `score` is given."""

    request_id: str
    sample: int
    prompt_ids: np.ndarray  # (P,) int32, P >= 1
    token_ids_T: np.ndarray  # (T,) int32

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.sample

    @property
    def num_tokens(self) -> int:
        """Prompt and response together."""
        return len(self.prompt_ids) + len(self.token_ids_T)


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """What `score` computes for every response token besides the raw logprob, entropy, logsumexp and rank."""

    top_k: int = 0  # how many of the most likely tokens to return; 0: none
    full_logits: bool = False  # return the (T, V) logits too
    sampler: Sampling | None = None  # also return the processed logprob and the kept mass under this sampler


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """What an engine says about every token of one response, by prefill over the given ids.

    `logprobs_T`, `entropy_T`, `rank_T` and the top tokens describe the raw distribution (nats); `logsumexp_T` is the
    normaliser of the raw logits. A token's rank is 1 + the number of tokens with a strictly larger logit.
    """

    request_id: str
    sample: int
    token_ids_T: np.ndarray  # int32
    logprobs_T: np.ndarray  # float32
    entropy_T: np.ndarray  # float32
    logsumexp_T: np.ndarray  # float32
    rank_T: np.ndarray  # int32
    top_ids_TK: np.ndarray  # int32, most likely first
    top_logprobs_TK: np.ndarray  # float32
    kind: LogprobKind = LogprobKind.raw
    processed_logprobs_T: np.ndarray | None = None  # float32, -inf where the sampler could not have drawn the token
    nucleus_mass_T: np.ndarray | None = None  # float32: probability (after temperature) that the sampler kept
    logits_TV: np.ndarray | None = None  # float32

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.sample

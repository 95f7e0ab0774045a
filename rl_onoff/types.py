"""The data that flows through a run. Shapes: P prompt tokens, T response tokens, K top tokens, V vocabulary.

Row t of every array describes response token t: the distribution that produced it, not the one that follows it.
A response is named by (request id, sample); engines meet on disk, joined by that pair. Text is never tokenised again
between stages: token ids are the currency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from rl_onoff.errors import UsageError


class LogprobKind(Enum):
    """Which distribution a logprob was taken from. Numbers of different kinds are never compared."""

    raw = "raw"  # log_softmax of the model's logits: temperature 1, nothing cut off
    scaled = "scaled"  # after temperature
    processed = "processed"  # after temperature, top-k, top-p and min-p, renormalised: what the sampler drew from


class FinishReason(Enum):
    """Why a response ended."""

    stop = "stop"  # a stop string was completed
    eos = "eos"  # the model sampled an end-of-sequence token; it is the last of token_ids_T
    length = "length"  # max_new_tokens was reached, or the context was full


@dataclass(kw_only=True, slots=True)
class Sampling:
    """How responses are drawn; the same values mean the same on every engine. Also the `sampling` config group."""

    max_new_tokens: int = 512
    """Most tokens a response may have."""
    temperature: float = 1.0
    """Divides the logits before sampling; 0 is greedy decoding."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability reaches top_p; 1 keeps all."""
    top_k: int = 0
    """Keep the top_k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest one; 0 keeps all."""
    n: int = 1
    """Responses per prompt."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response; the text is cut before the first of them, the token ids keep what was sampled."""
    seed: int = 0
    """Seed of all sampling; a response depends on (model, prompt, sampling, seed, sample index) alone."""

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (self.temperature >= 0, "temperature", "0 (greedy) or larger"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1 keeps every token)"),
            (self.top_k >= 0, "top_k", "0 (keeps every token) or larger"),
            (0 <= self.min_p <= 1, "min_p", "between 0 and 1"),
            (self.n >= 1, "n", "at least 1"),
            (all(self.stop), "stop", "a list of strings none of which is empty"),
            (0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1"),
        )
        for fine, name, want in checks:
            if not fine:
                raise UsageError(f"sampling.{name} is {getattr(self, name)!r} but must be {want}: set sampling.{name}=…")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """True when top-k, top-p or min-p can give a token probability 0."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def replace(self, **changes: Any) -> Sampling:
        return replace(self, **changes)


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

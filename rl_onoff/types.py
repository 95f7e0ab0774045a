"""The data that flows through a run. Shapes: P prompt tokens, T response tokens, K top tokens, V vocabulary.

Row t of every array describes response token t: the distribution that produced that token, not the one that follows it.
A response is named by (request id, sample); engines meet on disk, joined by that pair. Text is never tokenised again
between stages: token ids are the currency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Self

import numpy as np

from rl_onoff.sampling import LogprobKind, Sampling

__all__ = [
    "Completion", "FinishReason", "Key", "LayerWant", "LogprobKind", "Request", "Response", "Rollout", "SampleRequest",
    "Sampling", "TokenScores", "Want", "sample_requests",
]  # fmt: skip

Key = tuple[str, int]  # (request id, sample)


class FinishReason(Enum):
    """Why a response ended."""

    stop = "stop"  # a stop string was completed
    eos = "eos"  # the model sampled an end-of-sequence token; it is the last of token_ids_T
    length = "length"  # max_new_tokens was reached, or the context was full


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One response to be drawn."""

    request_id: str
    sample: int
    prompt_ids: np.ndarray  # (P,) int32, P >= 1
    sampling: Sampling
    seed: int  # of this response alone: 31 bits that depend on (sampling.seed, prompt, sample), not on the batch

    @property
    def key(self) -> Key:
        return self.request_id, self.sample

    @property
    def num_tokens(self) -> int:
        """Most tokens that prompt and response may have together."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens


def sample_requests(
    *, id: str, prompt_ids: np.ndarray, sampling: Sampling, samples: Iterable[int] | None = None
) -> list[SampleRequest]:
    """The requests of one prompt: `sampling.n` of them, or those of `samples`; each has the seed of its response."""
    prompt_ids, requests = np.asarray(prompt_ids, np.int32), []
    for sample in range(sampling.n) if samples is None else samples:
        text = f"{sampling.seed} {sample} ".encode() + prompt_ids.tobytes()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") >> 1
        named: Any = {"request_id": id, "sample": sample, "prompt_ids": prompt_ids}
        requests.append(SampleRequest(**named, sampling=sampling, seed=seed))
    return requests


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response: drawn by an engine of ours, read from a file that a trainer wrote, or to be scored."""

    request_id: str
    sample: int
    prompt_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # (P,) int32; empty where unknown
    token_ids_T: np.ndarray  # int32: what was sampled, EOS and the tokens that completed a stop string included
    mask_T: np.ndarray | None = None  # bool: the policy sampled this token; None: it sampled all of them
    logprobs_T: np.ndarray | None = None  # float32, nats: what the sampler reported; None where it reported nothing
    kind: LogprobKind | None = None  # of logprobs_T
    text: str = ""  # without special tokens, cut before the first stop string
    finish_reason: FinishReason | None = None  # None where unknown
    reward: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)  # question, answer, group columns: what the row had

    @property
    def key(self) -> Key:
        return self.request_id, self.sample

    @property
    def num_tokens(self) -> int:
        """Prompt and response together."""
        return len(self.prompt_ids) + len(self.token_ids_T)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWant:
    """What `score` does with the hidden states on the way to a response's logits, and with the experts that a mixture's
    routers choose (backends/layers.py)."""

    folder: str  # of the reference's hidden states: a file for each response
    writes: bool  # True: this engine is the reference and writes the files; False: it compares its own states
    inside: frozenset[str] = frozenset()  # names of the files that also hold what attention and MLP give
    states: bool = True  # False: the experts alone, and an engine that does not write them chooses those in the files


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """What `score` computes for every response token besides the raw logprob, entropy, logsumexp and rank."""

    top_k: int = 0  # how many of the most likely tokens to return; 0: none
    full_logits: bool = False  # return the (T, V) logits too
    sampler: Sampling | None = None  # also return the processed logprob and the kept mass under this sampler
    layers: LayerWant | None = None  # also write hidden states, or return their errors


INT32 = {"dtype": "int32"}  # of an array of TokenScores that is no float32


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """What a policy says about every token of one response; arrays that nobody asked for, or that a file lacks, are
    None.

    `entropy_T`, `rank_T` and the top tokens describe the raw distribution (nats); `logsumexp_T` is the normaliser of
    the raw logits. A token's rank is 1 + the number of tokens with a strictly larger logit. Every array is a column of
    the scores table, in this order (`rundir/table.py`).
    """

    request_id: str = ""
    sample: int = 0
    token_ids_T: np.ndarray = field(metadata=INT32)
    logprobs_T: np.ndarray  # float32, -inf where the token is impossible
    kind: LogprobKind = LogprobKind.raw  # of logprobs_T
    entropy_T: np.ndarray | None = None  # float32
    logsumexp_T: np.ndarray | None = None  # float32
    rank_T: np.ndarray | None = field(default=None, metadata=INT32)
    top_ids_TK: np.ndarray | None = field(default=None, metadata=INT32)  # most likely first
    top_logprobs_TK: np.ndarray | None = None  # float32
    processed_logprobs_T: np.ndarray | None = None  # float32, -inf where the sampler could not have drawn the token
    nucleus_mass_T: np.ndarray | None = None  # float32: probability (after temperature) that the sampler kept
    logits_TV: np.ndarray | None = None  # float32
    # float32 (2, points, positions): norm of the difference to the reference's hidden states, and of the reference's.
    # Of prompt and response, and so no column of the table
    layers: np.ndarray | None = None
    # float32 (layers, positions): share of the experts chosen that the reference chose too; NaN: a layer without router
    experts: np.ndarray | None = None

    @property
    def key(self) -> Key:
        return self.request_id, self.sample

    def of(self, rollout: Rollout) -> Self:
        """The same scores under the name of a response, whose tokens the rows are."""
        return replace(self, request_id=rollout.request_id, sample=rollout.sample, token_ids_T=rollout.token_ids_T)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by name."""
        return {name: array for name in ARRAYS if (array := getattr(self, name)) is not None}

    def __getitem__(self, rows: slice | np.ndarray) -> Self:
        return replace(self, **{name: array[rows] for name, array in self.arrays().items()})

    @classmethod
    def collect(cls, parts: Iterable[TokenScores], num_rows: int) -> TokenScores:
        """The rows of all parts, in order; each part may be made when asked for, and is dropped before the next."""
        # a small array kept from every chunk would lie between the chunks' large buffers and keep them from being used
        # again: that grew the heap by gigabytes
        whole: dict[str, Any] = {}
        at = 0
        for part in parts:
            copy_rows(part, whole, at, num_rows)
            at += len(part.token_ids_T)
        assert at == num_rows
        return cls(**whole)


ARRAYS: Sequence[str] = tuple(name for name in TokenScores.__slots__ if name.endswith(("_T", "_TK", "_TV")))


def copy_rows(scores: TokenScores, whole: dict[str, np.ndarray], at: int, num_rows: int) -> None:
    """Copy the rows of `scores` into arrays of `num_rows` rows, from row `at`."""
    for name, values in scores.arrays().items():
        if name not in whole:
            whole[name] = np.empty((num_rows, *values.shape[1:]), values.dtype)
        whole[name][at : at + len(values)] = values


# Names of earlier versions.
Request = sample_requests
Response = Completion = Rollout

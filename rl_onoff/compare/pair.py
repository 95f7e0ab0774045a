"""What is compared: one response as two policies see it, and what makes two views comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind, Rollout, TokenScores


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One policy's view of a response: T tokens, K top tokens (the two sides may differ), V vocabulary."""

    token_ids_T: np.ndarray
    logprobs_T: np.ndarray  # nats, −inf where the token is impossible
    kind: LogprobKind  # of logprobs_T

    entropy_T: np.ndarray | None = None
    rank_T: np.ndarray | None = None
    top_ids_TK: np.ndarray | None = None
    top_logprobs_TK: np.ndarray | None = None
    logits_TV: np.ndarray | None = None  # logits or logprobs of the whole vocabulary
    distribution_kind: LogprobKind | None = None  # of entropy, rank, top tokens and logits; None: the same as kind

    processed_logprobs_T: np.ndarray | None = None  # −inf where the sampler could not have drawn the token
    nucleus_mass_T: np.ndarray | None = None  # probability that the sampler keeps

    @classmethod
    def from_completion(cls, completion: Rollout) -> Side:
        """The logprobs an engine reported while it sampled."""
        return cls(token_ids_T=completion.token_ids_T, logprobs_T=completion.logprobs_T, kind=completion.kind)

    @classmethod
    def from_scores(cls, scores: TokenScores, kind: LogprobKind | None = None) -> Side:
        """What a scoring pass said; kind=processed takes the sampler's view of the sampled tokens in place of the raw one."""
        kind = kind or scores.kind
        logprobs_T = scores.logprobs_T if kind is scores.kind else scores.processed_logprobs_T
        if logprobs_T is None or kind not in (scores.kind, LogprobKind.processed):
            raise UsageError(
                f"response {_name(scores.key)} was not scored with {kind.value} logprobs: score it with score.processed=true"
            )
        has_top = scores.top_ids_TK is not None
        return cls(
            token_ids_T=scores.token_ids_T,
            logprobs_T=logprobs_T,
            kind=kind,
            entropy_T=scores.entropy_T,
            rank_T=scores.rank_T,
            top_ids_TK=scores.top_ids_TK if has_top else None,
            top_logprobs_TK=scores.top_logprobs_TK if has_top else None,
            logits_TV=scores.logits_TV,
            distribution_kind=scores.kind,
            processed_logprobs_T=scores.processed_logprobs_T,
            nucleus_mass_T=scores.nucleus_mass_T,
        )

    @property
    def kind_of_distribution(self) -> LogprobKind:
        return self.distribution_kind or self.kind

    @property
    def has_distribution(self) -> bool:
        return any(x is not None for x in (self.entropy_T, self.rank_T, self.top_ids_TK, self.logits_TV))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One response under the behaviour that drew it and the target it is compared with."""

    request_id: str
    sample: int
    behaviour: Side
    target: Side
    groups: Mapping[str, str] = field(default_factory=dict)  # e.g. {"level": "3", "reward": "right"}

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.sample

    @property
    def num_tokens(self) -> int:
        return len(self.target.token_ids_T)


def check_pair(pair: Pair) -> None:
    """Refuse, in one sentence, two views whose difference would not be a number about the policies."""
    q, p, name = pair.behaviour, pair.target, _name(pair.key)
    if q.kind is not p.kind:
        raise UsageError(
            f"the behaviour's logprobs of response {name} are {q.kind.value} and the target's are {p.kind.value}: "
            "compare logprobs of one kind (score the tokens under the behaviour too, or use the target's processed logprobs)"
        )
    if q.has_distribution and p.has_distribution and q.kind_of_distribution is not p.kind_of_distribution:
        raise UsageError(
            f"the distributions of response {name} are {q.kind_of_distribution.value} and {p.kind_of_distribution.value}: "
            "compare distributions of one kind"
        )
    if len(q.token_ids_T) != len(p.token_ids_T):
        raise UsageError(
            f"response {name} has {len(q.token_ids_T)} tokens under the behaviour and {len(p.token_ids_T)} under the target: "
            "score the very token ids that were sampled"
        )
    differ_T = np.asarray(q.token_ids_T) != np.asarray(p.token_ids_T)
    if differ_T.any():
        t = int(differ_T.argmax())
        raise UsageError(
            f"response {name} has token id {q.token_ids_T[t]} at position {t} under the behaviour and {p.token_ids_T[t]} under the "
            "target: score the very token ids that were sampled, with the same tokenizer"
        )
    for who, side in (("behaviour", q), ("target", p)):
        _check_side(side, who, name)


ARRAYS = (
    "logprobs_T",
    "entropy_T",
    "rank_T",
    "top_ids_TK",
    "top_logprobs_TK",
    "logits_TV",
    "processed_logprobs_T",
    "nucleus_mass_T",
)


def _check_side(side: Side, who: str, name: str) -> None:
    num_tokens = len(side.token_ids_T)
    for what in ARRAYS:
        array = getattr(side, what)
        if array is None:
            continue
        here = f"the {who}'s {what} of response {name}"
        if len(array) != num_tokens:
            raise UsageError(f"{here} has {len(array)} rows for {num_tokens} tokens: the files do not belong together")
        if not np.all(array < np.inf):  # false for NaN as for +inf
            raise UsageError(f"{here} has NaN or +inf in it: that engine's numbers are broken there")
        if what == "logits_TV" and num_tokens and np.isneginf(array.max(axis=1)).any():
            raise UsageError(
                f"{here} has a position where every token is impossible: that engine's numbers are broken there"
            )
    ids_TK, logs_TK = side.top_ids_TK, side.top_logprobs_TK
    if (ids_TK is None) != (logs_TK is None) or (
        ids_TK is not None and logs_TK is not None and ids_TK.shape != logs_TK.shape
    ):
        raise UsageError(
            f"the {who}'s top ids and top logprobs of response {name} have different shapes: the files do not belong together"
        )
    if num_tokens and np.max(side.logprobs_T) > 1:
        raise UsageError(
            f"the {who}'s logprobs of response {name} reach {np.max(side.logprobs_T):.3g}, and a logprob is never above 0: "
            "give natural logarithms of probabilities"
        )


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]}/{key[1]}"

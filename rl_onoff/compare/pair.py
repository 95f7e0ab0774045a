"""What is compared: one response as two policies see it, and what makes two sets of scores comparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from rl_onoff.compare.row_checks import Fault, other_tokens
from rl_onoff.errors import UsageError, plural
from rl_onoff.types import Key, LogprobKind, Sampling, TokenScores

TOP = ("top_ids_TK", "top_logprobs_TK")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One response under the behaviour that drew it and the target it is compared with.

    The behaviour's logprobs may be those that were reported while sampling, of any kind; all distributions are raw.
    """

    behaviour: TokenScores
    target: TokenScores
    mask_T: np.ndarray | None = None  # bool: the policy sampled this token; None: all of them
    groups: Mapping[str, str] = field(default_factory=dict)  # e.g. {"level": "3", "reward": "right"}
    facts: Mapping[str, float] = field(default_factory=dict)  # step, staleness (step − weight version), reward
    fault: Fault | None = None  # of its ids, for which the row is set aside

    @property
    def key(self) -> Key:
        return self.target.key

    @property
    def num_tokens(self) -> int:
        return len(self.target.token_ids_T)


def as_kind(scores: TokenScores, kind: LogprobKind, sampler: Sampling | None = None) -> TokenScores:
    """The scores with logprobs of `kind`; refused where they cannot be had from what was kept.

    Scores are raw and, under `sampler`, processed; what the sampler kept of the probability joins the two, so the
    scaled logprobs are the processed ones plus the logarithm of the kept mass.
    """
    where, raw = "{}/{}".format(*scores.key), scores.kind is LogprobKind.raw
    if scores.kind is kind:
        return scores
    if raw and kind is LogprobKind.scaled and sampler and sampler.temperature in (0, 1):
        return replace(scores, kind=kind)
    processed_T, mass_T = scores.processed_logprobs_T, scores.nucleus_mass_T
    if not raw or processed_T is None or mass_T is None or (kind is LogprobKind.scaled and sampler is None):
        raise UsageError(
            f"the behaviour's logprobs of response {where} are {kind.value} and the target's are {scores.kind.value}: "
            "score the tokens with score.processed=true, or say what a file's logprobs are in compare.behaviour_kind "
            "and compare.target_kind"
        )
    if kind is LogprobKind.processed:
        return replace(scores, kind=kind, logprobs_T=processed_T)
    if np.isneginf(processed_T).any():
        raise UsageError(
            f"the scaled logprobs of response {where} are not known, since the target's sampler could not have drawn "
            "some of its tokens: sample with backend.logprob_kind=raw or processed"
        )
    return replace(scores, kind=kind, logprobs_T=processed_T + np.log(mass_T))


def fault_of(pair: Pair) -> Fault | None:
    """What is wrong with the token ids of a pair."""
    other = other_tokens(pair.behaviour.token_ids_T, pair.target.token_ids_T)
    return pair.fault or (("other_tokens", other) if other else None)


def check_pair(pair: Pair) -> None:
    """Refuse, in one sentence, two sides whose difference would not be a number about the policies.

    The chosen tokens' logprobs are not looked at here but in all responses together (`checks.py`).
    """
    q, p, name = pair.behaviour, pair.target, "{}/{}".format(*pair.key)
    if q.kind is not p.kind:
        raise UsageError(
            f"the behaviour's logprobs of response {name} are {q.kind.value} and the target's are {p.kind.value}: "
            "compare logprobs of one kind (score under the behaviour too, or use the target's processed logprobs)"
        )
    for who, scores in (("behaviour", q), ("target", p)):
        for array, fault in _faults(scores):
            raise UsageError(f"the {who}'s {array} of response {name} {fault}")


def _faults(scores: TokenScores) -> Iterator[tuple[str, str]]:
    """The arrays of one side that cannot be what they are called, and why."""
    num_tokens, arrays = len(scores.token_ids_T), scores.arrays()
    for name, array in arrays.items():
        if len(array) != num_tokens:
            sizes = f"{plural(len(array), 'row')} for {plural(num_tokens, 'token')}"
            yield name, f"has {sizes}: the files do not belong together"
        elif name != "logprobs_T" and not np.all(array < np.inf):  # false for NaN as for +inf
            yield name, "has NaN or +inf in it: that engine's numbers are broken there"
        elif name == "logits_TV" and num_tokens and np.isneginf(array.max(axis=1)).any():
            yield name, "has a position where every token is impossible: that engine's numbers are broken"
        elif name.startswith("top_") and any(x is None or x.shape != array.shape for x in map(arrays.get, TOP)):
            yield name, "and the other array of the top tokens have different shapes: the files do not belong together"

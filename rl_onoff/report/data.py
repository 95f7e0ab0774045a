"""What the page is made from. Shapes: T response tokens, K top tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenView:
    """What one policy says about every token of one response; what is None is not shown."""

    logprobs_T: np.ndarray  # of the sampled token, nats
    entropy_T: np.ndarray | None = None  # nats
    rank_T: np.ndarray | None = None  # of the sampled token, 1 = most likely
    top_ids_TK: np.ndarray | None = None  # most likely first; a negative id ends a row early
    top_logprobs_TK: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportResponse:
    """One response as the token view shows it."""

    request_id: str
    sample: int
    prompt: str
    text: str
    tokens: Sequence[str]  # (T,) the text each token is shown with
    token_ids_T: np.ndarray
    behaviour: TokenView | None  # None: the tokens come from elsewhere, without logprobs
    targets: Sequence[TokenView] = ()  # one per comparison, in the same order
    reward: float | None = None
    finish_reason: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInput:
    """The whole page. `responses` is read once, in order, and never held as a whole.

    A policy is a dict of facts, shown in the order given; the first is the behaviour and the others are the targets, unless
    `role` ("behaviour" or "target") says otherwise. `name` is what the page calls it; without one, engine, model and dtype are.
    A comparison is `Comparison.to_dict()` of one target; any part of it may be missing. `name` in it is what the page calls it.
    `metric_info` is `metrics.METRICS`: for every metric an object with description, unit, better and bar, or a tuple of the four.
    """

    title: str
    verdict: str
    policies: Sequence[Mapping[str, Any]]
    responses: Iterable[ReportResponse]
    comparisons: Sequence[Mapping[str, Any]] = ()
    metric_info: Mapping[str, Any] = field(default_factory=dict)
    token_text: Callable[[int], str] | None = (
        None  # text of a token id; None: ids outside the responses are shown as numbers
    )
    attribution: Mapping[str, Any] | None = None  # Attribution.to_dict(): why the gap is there; None: nobody asked
    num_tokens: int | None = None  # response tokens to come; None: the first comparison's counts.tokens, else a guess
    num_responses: int | None = (
        None  # to come; where it is known, responses that the page has no room for are not read at all
    )

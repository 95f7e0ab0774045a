"""What the page is made from. Shapes: T response tokens, K top tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_onoff.compare import Metric
from rl_onoff.rundir.join import groups_of, joined
from rl_onoff.rundir.table import RunDir
from rl_onoff.types import Rollout, TokenScores

SAMPLER = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportResponse:
    """One response as the token view shows it; arrays of a policy that are None are not shown."""

    rollout: Rollout
    prompt: str
    tokens: Sequence[str]  # (T,) the text each token is shown with
    behaviour: TokenScores | None  # None: the tokens come from elsewhere, without logprobs
    targets: Sequence[TokenScores] = ()  # one per comparison, in the same order
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.rollout.token_ids_T)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInput:
    """The whole page. `responses` is read once, in order, and never held as a whole.

    A policy is a dict of facts, shown in the order given; the first is the behaviour and all after it are targets,
    unless `role` ("behaviour" or "target") says otherwise. `name` is what the page calls it; else engine, model, dtype.
    A comparison is `Comparison.to_dict()` of one target, any part of which may be missing, and its `name`.
    """

    title: str
    verdict: str
    policies: Sequence[Mapping[str, Any]]
    responses: Iterable[ReportResponse]
    comparisons: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    token_text: Callable[[int], str] | None = None  # of a token id; None: ids outside the responses are numbers
    attribution: Mapping[str, Any] | None = None  # Attribution.to_dict(): why the gap is there; None: nobody asked
    num_responses: int | None = None  # to come; where known, those that the page has no room for are not read at all


def report_responses(
    run: RunDir, targets: Sequence[str], own: str | None, token_text: Callable[[int], str], columns: Sequence[str]
) -> Iterator[ReportResponse]:
    """Every response that all targets scored, as the page shows it."""
    for found in joined(run, targets, own):
        if len(found.targets) == len(targets):
            yield ReportResponse(
                rollout=found.rollout,
                prompt=found.prompt,
                tokens=[token_text(i) for i in found.rollout.token_ids_T.tolist()],
                behaviour=found.behaviour,
                targets=[found.targets[name] for name in targets],
                groups=groups_of(found.rollout, columns),
            )


def facts(name: str, record: Mapping[str, Any], role: str) -> dict[str, Any]:
    """What the page says about a policy, from the record beside its rows."""
    engine, config = record.get("engine", {}), record.get("config", {})
    backend, sampling = config.get("backend", {}), config.get("sampling") or {}
    found = {
        "role": role,
        "name": name,
        "engine": engine.get("engine"),
        "model": backend.get("model_name"),
        "dtype": engine.get("dtype"),
        "version": engine.get("version"),
        "logprobs": backend.get("logprob_kind"),
        "sampling": ", ".join(f"{key} {sampling[key]:g}" for key in SAMPLER if key in sampling) or None,
    }
    return {key: value for key, value in found.items() if value is not None}

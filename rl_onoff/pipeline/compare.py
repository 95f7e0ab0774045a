"""The compare stage: what a run folder says about its policies, and the page. Needs no engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

from rl_onoff.compare import METRICS, Comparison, compare, verdict
from rl_onoff.pipeline.compare_inputs import own_scores
from rl_onoff.report import ReportInput, write_report
from rl_onoff.report.data import facts, report_responses
from rl_onoff.rundir.join import TRANSFORM, group_columns, pairs
from rl_onoff.rundir.provenance import check_tokenizers
from rl_onoff.rundir.table import RunDir
from rl_onoff.types import LogprobKind, Sampling


def compare_run(run: RunDir, own: str | None = None) -> dict[str, Comparison]:
    """Every table of scores against what was sampled, by the table's name; the behaviour's own scores come first."""
    own, columns = own or own_scores(run), group_columns(run)
    names = sorted(run.score_names(), key=lambda name: (name != own, name))
    comparisons = {}
    for name in names:
        check_tokenizers(run.completions.record(), run.scores(name).record(), name)
        joined = pairs(run, name, own, group_columns=columns)
        first = next(joined, None)
        if first is not None:
            comparisons[name] = compare(chain([first], joined))
    return comparisons


def noise_floor(own: str | None, comparisons: Mapping[str, Comparison]) -> float | None:
    """Mean k3 KL between what the engine said while it sampled and when it scored; None when not measured."""
    return comparisons[own]["kl_k3"].value if own is not None and own in comparisons and len(comparisons) > 1 else None


def furthest(own: str | None, comparisons: Mapping[str, Comparison]) -> str:
    """Name of the target with the largest mean k3 KL; the behaviour's own scores only where there is no other."""
    others = {name: c for name, c in comparisons.items() if name != own} or comparisons
    return max(others, key=lambda name: others[name]["kl_k3"].value)


def verdict_of(run: RunDir, comparisons: Mapping[str, Comparison], own: str | None = None) -> str:
    """One sentence about the target that is furthest away."""
    own = own or own_scores(run)
    name = furthest(own, comparisons)
    if name == own:
        k3 = comparisons[name]["kl_k3"].value
        return (
            "The sampler against itself: what it said while sampling and what it says of the same tokens now are "
            f"{k3:.2g} nats a token apart (mean k3 KL). That is the noise floor; set target=… to compare it with "
            "another policy."
        )
    said = verdict(comparisons[name], noise_floor(own, comparisons)) + _drawn_otherwise(run, comparisons[name].kind)
    return said if len(set(comparisons) - {own}) <= 1 else f"{name}: {said}"


def _drawn_otherwise(run: RunDir, kind: LogprobKind) -> str:
    """A second sentence where raw logprobs are compared of tokens that were not drawn from the raw distribution."""
    record = run.completions.record().get("config", {}).get("sampling")
    if record is None or kind is not LogprobKind.raw:
        return ""
    how = [f"{name}={record[name]:g}" for name in TRANSFORM if record[name] != getattr(Sampling(), name)]
    return (
        ""
        if not how
        else (
            f" The tokens were drawn with {', '.join(how)}, but these are raw logprobs (temperature 1, nothing cut "
            "off): a "
            "distance at these tokens, not the KL of what they were drawn from, which "
            "backend.logprob_kind=processed compares."
        )
    )


def gap_of(run: RunDir, comparisons: Mapping[str, Comparison]) -> dict[str, float]:
    """The verdict's numbers, by names that no target's name is part of: what sweeps are looked at and optimised by."""
    own = own_scores(run)
    floor = noise_floor(own, comparisons)
    found = {"kl_k3": comparisons[furthest(own, comparisons)]["kl_k3"].value, "kl_k3_floor": floor}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def write_page(
    run: RunDir, comparisons: Mapping[str, Comparison], token_text: Callable[[int], str], own: str | None = None
) -> Path:
    """`report.html`: targets in the order of how far they are, the behaviour's own scores last."""
    own = own or own_scores(run)
    names = sorted(comparisons, key=lambda name: (name == own, -comparisons[name]["kl_k3"].value))
    behaviour = facts("behaviour", run.completions.record(), "behaviour")
    counts = [comparison.overall.counts for comparison in comparisons.values()]
    report = ReportInput(
        title=f"{behaviour.get('model', run.path.name)}: how on-policy?",
        verdict=verdict_of(run, comparisons, own),
        policies=[behaviour, *(facts(name, run.scores(name).record(), "target") for name in names)],
        responses=report_responses(run, names, own, token_text, group_columns(run)),
        comparisons=[{"name": name, **comparisons[name].to_dict()} for name in names],
        metrics=METRICS,
        token_text=token_text,
        attribution=run.read_json("attribution.json"),
        num_responses=min(c["responses"] + c["responses_empty"] for c in counts),
    )
    return write_report(run.path / "report.html", report)

"""The compare stage: what a run folder says about its policies, and the page. Needs no engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_onoff.comparison import Comparison, compare, verdict
from rl_onoff.joining import facts, group_columns, pairs, report_responses, token_texts
from rl_onoff.metrics import METRICS
from rl_onoff.report import ReportInput, write_report
from rl_onoff.storage import RunDir


def own_scores(run: RunDir) -> str | None:
    """The scores made by the engine and weights that sampled, if the run has them."""
    sampled_by = run.completions.record().get("config", {}).get("backend")
    for name in run.score_names():
        if sampled_by is not None and run.scores(name).record().get("config", {}).get("backend") == sampled_by:
            return name
    return None


def compare_run(run: RunDir) -> dict[str, Comparison]:
    """Every table of scores against what was sampled, by the table's name; the behaviour's own scores come first."""
    own, columns = own_scores(run), group_columns(run)
    names = sorted(run.score_names(), key=lambda name: (name != own, name))
    comparisons = {}
    for name in names:
        joined = pairs(run, name, own, group_columns=columns)
        first = next(joined, None)
        if first is not None:
            comparisons[name] = compare(_chain(first, joined))
    return comparisons


def noise_floor(run: RunDir, comparisons: Mapping[str, Comparison]) -> float | None:
    """Mean k3 KL between what the engine said while it sampled and when it scored the same tokens; None when not measured."""
    own = own_scores(run)
    return comparisons[own]["kl_k3"].value if own in comparisons and len(comparisons) > 1 else None


def verdict_of(run: RunDir, comparisons: Mapping[str, Comparison]) -> str:
    """One sentence about the target that is furthest away."""
    own = own_scores(run)
    others = {name: c for name, c in comparisons.items() if name != own} or dict(comparisons)
    name, worst = max(others.items(), key=lambda item: item[1]["kl_k3"].value)
    said = verdict(worst, noise_floor(run, comparisons))
    return said if len(others) == 1 else f"{name}: {said}"


def write_page(run: RunDir, comparisons: Mapping[str, Comparison], own: str | None, tokenizer: Any) -> Path:
    """`report.html`: targets in the order of how far they are, the behaviour's own scores last."""
    names = sorted(comparisons, key=lambda name: (name == own, -comparisons[name]["kl_k3"].value))
    behaviour = facts("behaviour", run.completions.record(), "behaviour")
    text = token_texts(tokenizer)
    return write_report(
        run.path / "report.html",
        ReportInput(
            title=f"{behaviour.get('model', run.path.name)}: how on-policy?",
            verdict=verdict_of(run, comparisons),
            policies=[behaviour, *(facts(name, run.scores(name).record(), "target") for name in names)],
            responses=report_responses(run, names, own, text, group_columns(run)),
            comparisons=[{"name": name, **comparisons[name].to_dict()} for name in names],
            metric_info=METRICS,
            token_text=text,
        ),
    )


def _chain(first: Any, rest: Any) -> Any:
    yield first
    yield from rest

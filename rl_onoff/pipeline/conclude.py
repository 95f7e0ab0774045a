"""How a run ends: its numbers gathered, written, logged and printed, and what makes its exit code."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rl_onoff.compare import HEADLINES, METRICS
from rl_onoff.config import Stage
from rl_onoff.errors import GateError, NotComparableError
from rl_onoff.pipeline.compare import gap_of, verdict_of
from rl_onoff.pipeline.compare_inputs import own_scores
from rl_onoff.pipeline.stages import Run
from rl_onoff.report.tables import summary_text
from rl_onoff.rundir.summary import Summary, summarise
from rl_onoff.tracking import Tracker


def conclude(this: Run) -> dict[str, float]:
    """Gather the run's numbers, then write, log and print what it found."""
    folder, comparisons = this.folder, this.comparisons
    summary, said, own = summarise(folder), {}, own_scores(folder) if comparisons else None
    summary.values |= this.values
    for name, comparison in comparisons.items():
        estimates = {metric: comparison[metric].value for metric in HEADLINES if metric in comparison}
        estimates |= comparison.whose_error.values() if comparison.whose_error and name != own else {}
        summary.values |= {f"onoff/{name}/{metric}": x for metric, x in estimates.items() if math.isfinite(x)}
    if comparisons:
        summary.values |= {f"onoff/{name}": value for name, value in gap_of(folder, comparisons).items()}
        said = {"verdict": verdict_of(folder, comparisons)}
    summary.values = {name: value for name, value in summary.values.items() if math.isfinite(value)}  # −inf is no JSON
    found = {"values": summary.values, "comparisons": {name: each.to_dict() for name, each in comparisons.items()}}
    folder.write_json("metrics.json", {**said, **found, **this.sections})
    track(this, summary)
    in_words = re.compile("matrix/|attribute/|layers/|acceptance/|onoff/kl_k3")
    shown = {name: value for name, value in summary.values.items() if not in_words.match(name)}
    texts = [] if this.brief or not shown else [summary_text(shown)]
    texts += this.texts
    if all(comparison.comparable for comparison in comparisons.values()) or Stage.compare not in this.config.stages:
        texts += [f"  {name}: set aside, {x.sentence()}" for name, each in comparisons.items() for x in each.findings]
        texts += [f"  {sentence}" for sentence in said.values()]
    where = {"run folder": folder.path, "page": this.page, "W&B": this.tracker.where}
    print("\n\n".join([*texts, "\n".join(f"  {name:10}  {place}" for name, place in where.items() if place)]))
    return summary.values


def gate(this: Run) -> None:
    """NotComparableError (exit code 3) where numbers mean nothing, GateError (4) beyond compare.fail_above, and where
    acceptance failed."""
    if failed := this.sections.get("acceptance", {}).get("failed"):
        names = ",".join(failed)
        raise GateError(f"acceptance failed: {names}: fix what its lines say, or set acceptance.skip=[{names}]")
    if not this.sections.get("acceptance", {}).get("accepted", True):
        raise GateError("acceptance tried no line: set acceptance.skip=[]")
    if Stage.compare not in this.config.stages:  # experiment=attribute says the cause
        return
    asked, own = this.config.compare, own_scores(this.folder) if this.comparisons else None
    if not all(comparison.comparable for comparison in this.comparisons.values()):
        raise NotComparableError(verdict_of(this.folder, this.comparisons))
    metric, bar = METRICS[asked.fail_metric], asked.fail_above
    for name, comparison in this.comparisons.items():
        if bar is None or (name == own and len(this.comparisons) > 1):
            continue
        if asked.fail_metric not in comparison:
            measured = ", ".join(each for each in HEADLINES if each in comparison)
            why = f"compare.fail_metric={asked.fail_metric} was not measured of {name}"
            raise GateError(f"{why}: set it to one of {measured}")
        value = comparison[asked.fail_metric].value
        size = abs(value - 1) if metric.better == "one" else abs(value)
        if value < bar if metric.better == "higher" else size > bar:
            which = "below" if metric.better == "higher" else "beyond"
            raise GateError(f"{asked.fail_metric} of {name} is {value:.4g}, {which} compare.fail_above={bar:g}")


def track(this: Run, summary: Summary) -> None:
    """Log what the run ends with; of a comparison what its page shows: intervals, histograms, the worst tokens."""
    folder, tracker = this.folder, this.tracker
    tracker.summary(summary.values)
    for name, (counts, edges) in summary.histograms.items():
        tracker.histogram(name, counts, edges)
    columns = ("request_id", "sample", "prompt", "text", "reward", "finish_reason")
    if folder.completions.exists():
        rows = (tuple(row[column] for column in columns) for row in folder.completions.rows(columns))
        tracker.table("responses", columns, rows, total=int(summary.values["generate/responses"]))
    for name, comparison in this.comparisons.items():
        for metric in HEADLINES:
            if metric in comparison:
                estimate = comparison[metric]
                tracker.summary({f"onoff/{name}/{metric}_lo": estimate.lo, f"onoff/{name}/{metric}_hi": estimate.hi})
        for what in ("l", "abs_l", "entropy_behaviour", "entropy_target"):
            if histogram := comparison.histograms.get(what):
                counts, edges = np.asarray(histogram["counts"]), np.asarray(histogram["edges"])
                tracker.histogram(f"onoff/{name}/{what}", counts, edges)
        tables = {"worst_tokens": comparison.worst, "findings": [asdict(each) for each in comparison.findings]}
        tables["whose_error"] = comparison.whose_error.rows() if comparison.whose_error else []
        for what, rows in tables.items():
            if rows:
                track_rows(tracker, f"onoff/{name}/{what}", rows)
    if this.page is not None:
        tracker.html("report", this.page)
    tracker.artifact(folder.path)


def track_rows(tracker: Tracker, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log a table, one row or more."""
    tracker.table(name, tuple(rows[0]), (tuple(row.values()) for row in rows), total=len(rows))

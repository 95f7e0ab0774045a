"""N policies sample, N policies score what all of them sampled: the table of how far each is from each.

A policy's samples are a run folder of their own, `<run_dir>/<policy>/`, so that everything that reads a run folder
reads it too. One engine is alive at a time, and each is loaded at most twice: once to sample, once to score everybody's
samples.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.compare import METRICS, Comparison, Estimate, headlines, judge
from rl_onoff.config import RunConfig
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.compare import compare_run, verdict_of, write_page
from rl_onoff.pipeline.engines import Wish
from rl_onoff.report.matrix_page import matrix_page
from rl_onoff.report.text import aligned, number
from rl_onoff.rundir.files import write_whole
from rl_onoff.rundir.provenance import texts_of
from rl_onoff.rundir.summary import summarise
from rl_onoff.rundir.table import RunDir, Table

if TYPE_CHECKING:
    from rl_onoff.pipeline.context import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A comparison for every (who sampled, who scored); the diagonal, an engine against itself, is the noise floor."""

    names: list[str]
    cells: Mapping[tuple[str, str], Comparison]

    @property
    def floor(self) -> float:
        """Largest mean k3 KL of a policy with itself: what it said while it sampled against its own scores."""
        return max(self.cells[name, name]["kl_k3"].value for name in self.names)

    def furthest(self) -> tuple[str, str]:
        """The two policies with the largest mean k3 KL."""
        pairs = [(a, b) for a in self.names for b in self.names if a != b]
        return max(pairs, key=lambda pair: self.cells[pair]["kl_k3"].value)

    def words(self) -> dict[tuple[str, str], str]:
        """On-policy, Close or Off-policy, for every cell."""
        return {pair: judge(comparison["kl_k3"], self.floor)[0] for pair, comparison in self.cells.items()}

    def verdict(self) -> str:
        """One sentence about the pair that is furthest apart."""
        a, b = self.furthest()
        k3 = self.cells[a, b]["kl_k3"]
        word, reason = judge(k3, self.floor)
        said = f"of all pairs {a} (sampled) and {b} (scored) are furthest apart, with a mean k3 KL of {k3.value:.2g}"
        return f"{word}: {said} nats a token, {reason}."

    def numbers(self, a: str, b: str, metric: str) -> dict[str, float | None]:
        """value, lo and hi of a cell's metric; None where it is not defined or was not measured."""
        comparison = self.cells[a, b]
        return (comparison[metric] if metric in comparison else Estimate(math.nan)).to_dict()

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B and sweepers: `matrix/<sampled>/<scored>/<metric>`, and the two that sum them up."""
        found = {f"matrix/{a}/{b}/{m}": self.numbers(a, b, m)["value"] for a, b in self.cells for m in headlines(2)}
        found |= {"matrix/kl_k3_max": self.cells[self.furthest()]["kl_k3"].value, "matrix/kl_k3_floor": self.floor}
        return {name: value for name, value in found.items() if value is not None}

    def rows(self) -> list[dict[str, Any]]:
        """One row a cell, with every metric's interval."""
        found = []
        for (a, b), comparison in self.cells.items():
            row: dict[str, Any] = {"sampled": a, "scored": b}
            for metric in headlines(2):
                value, lo, hi = self.numbers(a, b, metric).values()
                row |= {metric: value, f"{metric}_lo": lo, f"{metric}_hi": hi}
            found.append(row | {name: comparison.overall.counts[name] for name in ("tokens", "responses")})
        return found

    def to_csv(self) -> str:
        rows, out = self.rows(), io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def as_text(self) -> str:
        """A table for each of the first metrics: who sampled down the side, who scored along the top."""
        lines = []
        for metric in headlines(3):
            rows = [["sampled by", *self.names]]
            for a in self.names:
                rows.append([a, *(number(self.numbers(a, b, metric)["value"], 3) or "-" for b in self.names)])
            lines += ["", f"  {METRICS[metric].label}", *aligned(rows, "<" + ">" * len(self.names))]
        return "\n".join(lines[1:])


def check_policies(config: RunConfig) -> None:
    """What is wrong with the policies, before anything is loaded."""
    if len(config.policies) < 2:
        raise UsageError(
            f"experiment=matrix needs two policies or more and has {len(config.policies)}: set policies=engines, "
            "policies=dtypes, or +backend@policies.NAME=huggingface once for each"
        )
    for name in config.policies:
        if not re.fullmatch(r"[\w.-]+", name) or name in ("completions", "scores", ".hydra", ".", ".."):
            raise UsageError(
                f"the policy {name!r} cannot be the name of a folder: use letters, digits, '-' and '.' in policies"
            )


def run_matrix(
    this: Run, sample: Callable[[Run], None], score: Callable[[Run, Table, EngineConfig, str], None]
) -> Generator[Wish, None, Matrix]:
    """Sample and score with every policy, the last to sample first to score since it is still loaded."""
    policies, path = this.config.policies, this.folder.path
    subs = {
        name: replace(this, config=replace(this.config, backend=engine), folder=RunDir(path / name), values={})
        for name, engine in policies.items()
    }
    for name, sub in subs.items():
        yield policies[name]
        log.info("matrix: %s samples", name)
        sample(sub)
    for name in reversed(policies):
        yield policies[name]
        for sampled, sub in subs.items():
            log.info("matrix: %s scores what %s sampled", name, sampled)
            score(sub, sub.folder.scores(name), policies[name], name)
    cells: dict[tuple[str, str], Comparison] = {}
    sentences = {}
    for a, sub in subs.items():
        comparisons = compare_run(sub.folder, own=a)
        missing = [b for b in policies if b not in comparisons]
        if missing:
            raise UsageError(
                f"{sub.folder.path} has no response with tokens to compare with {missing[0]}: change data.path"
            )
        text = texts_of([sub.folder.completions.record()], None, policies.values())
        write_page(sub.folder, comparisons, text, own=a)
        values = summarise(sub.folder).values | sub.values
        found = {b: comparison.to_dict() for b, comparison in comparisons.items()}
        sub.folder.write_json("metrics.json", {"values": values, "comparisons": found})
        cells |= {(a, b): comparisons[b] for b in policies}
        sentences[a] = verdict_of(sub.folder, {b: comparisons[b] for b in policies}, own=a)
    matrix = Matrix(list(policies), cells)
    write_whole(path / "matrix.csv", matrix.to_csv())
    page = matrix_page(matrix.names, matrix.rows(), matrix.words(), matrix.verdict(), sentences)
    write_whole(path / "matrix.html", page)
    return matrix

"""N policies sample, N policies score what all of them sampled: the table of how far each is from each.

A policy's samples are a run folder of their own, `<run_dir>/<policy>/`, so that everything that reads a run folder reads it too.
One engine is alive at a time, and each is loaded at most twice: once to sample, once to score everybody's samples.
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
from rl_onoff.compare import ON_POLICY_K3, Comparison, Estimate
from rl_onoff.compare.metrics import PRIME_RL_BAR
from rl_onoff.config import RunConfig
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.compare import compare_run, verdict_of, write_page
from rl_onoff.pipeline.engine_slot import Wish
from rl_onoff.report.matrix_page import matrix_page
from rl_onoff.rundir.files import write_whole
from rl_onoff.rundir.provenance import texts_of
from rl_onoff.rundir.summary import summarise
from rl_onoff.rundir.table import RunDir, Table

if TYPE_CHECKING:
    from rl_onoff.pipeline.context import Run

log = logging.getLogger(__name__)

CELL_METRICS = (
    "kl_k3",
    "logprob_diff_mean",
    "logprob_diff_max",
    "ess_token",
    "ess_seq",
    "kl_forward_topk",
    "argmax_agreement",
)


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

    def verdict(self) -> str:
        """One sentence about the pair that is furthest apart, by the bars of `comparison.verdict`."""
        a, b = self.furthest()
        k3, floor = self.cells[a, b]["kl_k3"].value, self.floor
        said = f"of all pairs {a} (sampled) and {b} (scored) are furthest apart, with a mean k3 KL of {k3:.2g} nats a token"
        if k3 <= floor:
            return f"On-policy: {said}, not above the noise floor of {floor:.2g}."
        if k3 < ON_POLICY_K3:
            return f"On-policy: {said}, under the {ON_POLICY_K3:.0e} that two engines in float32 stay below; the noise floor is {floor:.2g}."
        if k3 < PRIME_RL_BAR:
            return f"Close: {said}, above the noise floor of {floor:.2g}, but under prime-rl's bar of {PRIME_RL_BAR}."
        return f"Off-policy: {said}, over prime-rl's bar of {PRIME_RL_BAR}; the noise floor is {floor:.2g}."

    def estimate(self, a: str, b: str, metric: str) -> Estimate | None:
        comparison = self.cells[a, b]
        return comparison[metric] if metric in comparison and math.isfinite(comparison[metric].value) else None

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B and sweepers: `matrix/<sampled>/<scored>/<metric>`, and the two that sum them up."""
        found = {}
        for a, b in self.cells:
            for metric in CELL_METRICS:
                if (estimate := self.estimate(a, b, metric)) is not None:
                    found[f"matrix/{a}/{b}/{metric}"] = estimate.value
        return {
            **found,
            "matrix/kl_k3_max": self.cells[self.furthest()]["kl_k3"].value,
            "matrix/kl_k3_floor": self.floor,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row a cell, with every metric's interval."""
        found = []
        for (a, b), comparison in self.cells.items():
            row: dict[str, Any] = {"sampled": a, "scored": b}
            for metric in CELL_METRICS:
                estimate = self.estimate(a, b, metric) or Estimate(math.nan)
                row |= {metric: estimate.value, f"{metric}_lo": estimate.lo, f"{metric}_hi": estimate.hi}
            counts = comparison.overall.counts
            found.append({**row, "tokens": counts["tokens"], "responses": counts["responses"]})
        return [
            {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
            for row in found
        ]

    def to_csv(self) -> str:
        rows, out = self.rows(), io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def as_text(self) -> str:
        """Three tables for a terminal: who sampled down the side, who scored along the top."""
        width = max(12, *(len(name) + 2 for name in self.names))
        lines = []
        for metric, label in (("kl_k3", "k3 KL (nats a token)"), ("logprob_diff_max", "max |log p - log q|"),
                              ("ess_token", "effective sample, tokens"), ("ess_seq", "effective sample, sequences")):  # fmt: skip
            lines += [
                "",
                f"  {label}",
                f"    {'sampled by':<{width}}" + "".join(f"{name:>{width}}" for name in self.names),
            ]
            for a in self.names:
                cells = (self.estimate(a, b, metric) for b in self.names)
                lines.append(
                    f"    {a:<{width}}"
                    + "".join(f"{'-' if e is None else format(e.value, '.3g'):>{width}}" for e in cells)
                )
        return "\n".join(lines[1:])


def check_policies(config: RunConfig) -> None:
    """What is wrong with the policies, before anything is loaded."""
    if len(config.policies) < 2:
        raise UsageError(
            f"experiment=matrix needs two policies or more and has {len(config.policies)}: set policies=engines, policies=dtypes, or "
            "+backend@policies.NAME=huggingface once for each"
        )
    for name in config.policies:
        if not re.fullmatch(r"[\w.-]+", name) or name in ("completions", "scores", ".hydra", ".", ".."):
            raise UsageError(
                f"the policy {name!r} cannot be the name of a folder: call it by letters, digits, '-' and '.' in policies"
            )


def run_matrix(
    this: Run, sample: Callable[[Run], None], score: Callable[[Run, Table, EngineConfig, str], None]
) -> Generator[Wish, None, Matrix]:
    """Sample with every policy, score with every policy, last one first since it is still loaded; then compare, and write it all down."""
    policies = this.config.policies
    subs = {
        name: replace(
            this, config=replace(this.config, backend=engine), folder=RunDir(this.folder.path / name), values={}
        )
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
    for a, sub in subs.items():
        comparisons = compare_run(sub.folder, own=a)
        text = texts_of([sub.folder.completions.record()], None, policies.values())
        write_page(sub.folder, comparisons, text, own=a)
        values = summarise(sub.folder).values | sub.values
        sub.folder.write_json(
            "metrics.json", {"values": values, "comparisons": {b: c.to_dict() for b, c in comparisons.items()}}
        )
        missing = [b for b in policies if b not in comparisons]
        if missing:
            raise UsageError(
                f"{sub.folder.path} has no response with tokens to compare with {missing[0]}: take other prompts in data.path"
            )
        cells |= {(a, b): comparisons[b] for b in policies}
    matrix = Matrix(list(policies), cells)
    write_whole(this.folder.path / "matrix.csv", matrix.to_csv())
    sentences = {a: verdict_of(sub.folder, {b: cells[a, b] for b in policies}, own=a) for a, sub in subs.items()}
    write_whole(this.folder.path / "matrix.html", matrix_page(matrix.names, matrix.rows(), matrix.verdict(), sentences))
    return matrix

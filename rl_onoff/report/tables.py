"""Tables: numbers in columns for a terminal; every policy against every other, also as a page without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from string import Template
from typing import Any

from rl_onoff.compare import METRICS, Comparison, Estimate, Metric, headlines, judge
from rl_onoff.report.write import page_file

ERRORS = {
    "error_behaviour": "sampler's error (rms, nats)", "error_target": "target's error (rms, nats)",
    "error_correlation": "correlation of the errors", "error_share_behaviour": "sampler's share of the gap",
    "error_share_target": "target's share of the gap", "error_share_together": "share of both together",
}  # fmt: skip
SHARES = Metric(
    "the parts of the mean squared gap that are the error of who sampled / of who scored, against the float32 policy",
    "100 % in all where the errors are unrelated", "none", "whose error: who sampled / who scored",
)  # fmt: skip
LABELS = {
    "tokens": "response tokens", "tokens_per_s": "tokens/s", "length_mean": "mean length (tokens)",
    "finish_eos": "ended by EOS", "finish_stop": "ended by a stop string", "finish_length": "ended by length",
    "logprob_mean": "mean logprob (nats)", "entropy_mean": "mean entropy (nats)",
    "likeliest_fraction": "sampled the likeliest token", "nucleus_mass_mean": "mass the sampler kept",
    "num_prompts": "prompts judged", "num_responses": "responses judged", "failed": "reward failed",
    "reward_mean": "mean reward", "error_gap": "gap (rms, nats)", **ERRORS,
    **{name: metric.label for name, metric in METRICS.items() if metric.label},
}  # fmt: skip
SHADES = {"On-policy": 0.0, "Close": 0.15, "Off-policy": 0.6}  # how strong a cell's colour is, by its verdict


def number(value: float | None, digits: int = 4) -> str:
    """With so many significant digits; whole numbers with all of theirs, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def aligned(rows: Sequence[Sequence[str]], sides: str, indent: int = 4) -> list[str]:
    """Rows of cells as lines; `sides` has a < or > for each column."""
    if not rows:
        return []
    widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    layout = " " * indent + "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [layout.format(*row).rstrip() for row in rows]


def summary_text(values: Mapping[str, float]) -> str:
    """A run's numbers, named `section/…/name`: one block a section, one line a number, tokens/s first."""
    names = [name.rpartition("/") for name in values]
    order = list(dict.fromkeys(section for section, _, _ in names))
    names.sort(key=lambda name: (order.index(name[0]), name[2] != "tokens_per_s"))
    cells = [(LABELS.get(last, last), number(values[f"{section}{slash}{last}"])) for section, slash, last in names]
    lines, blocks = iter(aligned(cells, "<>")), []
    for section, of in groupby(names, key=lambda name: name[0]):
        blocks.append("\n".join([f"  {section}", *(next(lines) for _ in of)]))
    return "\n\n".join(blocks)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A comparison for every (who sampled, who scored); the diagonal, an engine against itself, is the noise floor."""

    names: list[str]
    cells: dict[tuple[str, str], Comparison]

    @property
    def metrics(self) -> list[str]:
        """Names of what a cell tells; of errors where one of the policies is a truth."""
        return [*headlines(2), *(ERRORS if any(cell.whose_error for cell in self.cells.values()) else {})]

    @property
    def tables(self) -> dict[str, Metric]:
        """What is shown as a table."""
        shown = {name: METRICS[name] for name in headlines(3)}
        return shown | ({"error_shares": SHARES} if "error_share_target" in self.metrics else {})

    @property
    def floor(self) -> float:
        """Largest mean k3 KL of a policy with itself: what it said while it sampled against its own scores."""
        return max(self.cells[name, name]["kl_k3"].value for name in self.names)

    def furthest(self) -> tuple[str, str]:
        """The two policies with the largest mean k3 KL."""
        pairs = [(a, b) for a in self.names for b in self.names if a != b]
        return max(pairs, key=lambda pair: self.cells[pair]["kl_k3"].value)

    def word(self, a: str, b: str) -> str:
        """On-policy, Close or Off-policy, for a cell."""
        return judge(self.cells[a, b]["kl_k3"], self.floor)[0].partition(",")[0]

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
        errors = comparison.whose_error.overall.metrics if comparison.whose_error else {}
        return (comparison.overall.metrics | errors).get(metric, Estimate(math.nan)).to_dict()

    def _cell(self, a: str, b: str, metric: str) -> tuple[str, str]:
        """What a table shows in a cell, and the interval."""
        if metric == "error_shares":
            found = self.cells[a, b].whose_error if a != b else None
            shares = [self.numbers(a, b, f"error_share_{side}")["value"] or 0 for side in ("behaviour", "target")]
            return (" / ".join(f"{share:.0%}" for share in shares) if found and found.told else ""), ""
        value, lo, hi = self.numbers(a, b, metric).values()
        return number(value, 3), "" if lo is None or hi is None else f"[{lo:.2g}, {hi:.2g}]"

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B and sweepers: `matrix/<sampled>/<scored>/<metric>`, and the two that sum them up."""
        found = {f"matrix/{a}/{b}/{m}": self.numbers(a, b, m)["value"] for a, b in self.cells for m in self.metrics}
        found |= {"matrix/kl_k3_max": self.cells[self.furthest()]["kl_k3"].value, "matrix/kl_k3_floor": self.floor}
        return {name: value for name, value in found.items() if value is not None}

    def rows(self) -> list[dict[str, Any]]:
        """One row a cell, with every metric's interval."""
        found = []
        for (a, b), comparison in self.cells.items():
            row: dict[str, Any] = {"sampled": a, "scored": b}
            for metric in self.metrics:
                value, lo, hi = self.numbers(a, b, metric).values()
                row |= {metric: value, f"{metric}_lo": lo, f"{metric}_hi": hi}
            found.append(row | {name: comparison.overall.counts[name] for name in ("tokens", "responses")})
        return found

    def as_text(self) -> str:
        """A table for each of the first metrics (who sampled down the side, who scored along the top); the verdict."""
        lines = []
        for metric, told in self.tables.items():
            rows = [["sampled by", *self.names]]
            for a in self.names:
                rows.append([a, *(self._cell(a, b, metric)[0] or "-" for b in self.names)])
            lines += ["", f"  {told.label}", *aligned(rows, "<" + ">" * len(self.names))]
        return "\n".join([*lines[1:], "", f"  {self.verdict()}"])

    def page(self, sentences: Mapping[str, str]) -> str:
        """The whole page, with a link to each policy's own report; `sentences`: a verdict for each as the sampler."""
        links = ((escape(a), escape(sentences[a])) for a in self.names)
        return Template(page_file("matrix.html")).substitute(
            title=f"{len(self.names)} policies, each against each",
            verdict=escape(self.verdict()),
            tables="\n".join(map(self._table, self.tables)),
            links="".join(f'<li><a href="{a}/report.html">{a}</a>: {sentence}</li>' for a, sentence in links),
            num_responses=f"{self.cells[self.names[0], self.names[0]].overall.counts['responses']:,}",
        )

    def _table(self, metric: str) -> str:
        told = self.tables[metric]
        bar = "" if told.bar is None else f"; the field's bar is {told.bar}"
        heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("sampled \\ scored", *self.names))
        body = ""
        for a in self.names:
            body += f'<tr><th scope="row">{escape(a)}</th>'
            for b in self.names:
                shown, interval = self._cell(a, b, metric)
                interval = interval and f"<small>{interval}</small>"
                shade, mark = SHADES[self.word(a, b)], ' class="own"' if a == b else ""
                colour = f' style="background: rgba(var(--heat), {shade})"' if shade else ""
                body += f"<td{mark}{colour}>{shown or '–'}{interval}</td>"
            body += "</tr>"
        return (
            f'<h2>{escape(told.label)}</h2><p class="note">{escape(told.description)}, {told.unit}{bar}</p>'
            f'<div class="scroll"><table><caption hidden>{escape(metric)}</caption><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

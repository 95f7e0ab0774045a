"""Every policy against every other: the numbers, a table for a terminal, and a page without script or network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from rl_onoff.compare import METRICS, Comparison, Estimate, headlines, judge
from rl_onoff.report.text import aligned, number

SHADES = {"On-policy": 0.0, "Close": 0.15, "Off-policy": 0.6}  # how strong a cell's colour is, by its verdict
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --line: #d4d8dd; --dim: #5f6670; --heat: 214, 110, 20 }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e8eaed; --paper: #16181b; --line: #3a3f46; --dim: #a2a9b3; --heat: 240, 140, 50
} }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 2rem 0 0 } p.note { color: var(--dim); margin: 0 0 .5rem }
.scroll { overflow-x: auto } table { border-collapse: collapse } a { color: inherit }
th, td { border: 1px solid var(--line); padding: .4rem .8rem } th { text-align: left; font-weight: 600 }
td { text-align: right; font-variant-numeric: tabular-nums } td small { display: block; color: var(--dim) }
td.own { outline: 2px dashed var(--dim); outline-offset: -4px }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HOW_TO_READ = (
    "Down the side who sampled, along the top who scored the same token ids. The dashed diagonal is a policy against "
    "itself, what it said while it sampled against its own scores: the noise floor. In brackets the 95 % interval over "
    "responses. On-policy pairs have no colour, close ones a little, off-policy ones much."
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

    def as_text(self) -> str:
        """A table for each of the first metrics: who sampled down the side, who scored along the top."""
        lines = []
        for metric in headlines(3):
            rows = [["sampled by", *self.names]]
            for a in self.names:
                rows.append([a, *(number(self.numbers(a, b, metric)["value"], 3) or "-" for b in self.names)])
            lines += ["", f"  {METRICS[metric].label}", *aligned(rows, "<" + ">" * len(self.names))]
        return "\n".join(lines[1:])

    def page(self, sentences: Mapping[str, str]) -> str:
        """The whole page, with a link to each policy's own report; `sentences`: a verdict for each as the sampler."""
        links = (
            f'<li><a href="{escape(a)}/report.html">{escape(a)}</a>: {escape(sentences[a])}</li>' for a in self.names
        )
        num_responses = self.cells[self.names[0], self.names[0]].overall.counts["responses"]
        parts = [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">',
            f"<title>{len(self.names)} policies, each against each</title><style>{STYLE}</style></head><body><main>",
            f'<h1>{escape(self.verdict())}</h1><p class="note">{HOW_TO_READ}</p>',
            *map(self._table, headlines(3)),
            f"<h2>Each policy's own samples</h2><ul>{''.join(links)}</ul>",
            f'<p class="note">{num_responses:,} responses of each policy; the same numbers are in matrix.csv.</p>',
            "</main></body></html>\n",
        ]
        return "\n".join(parts)

    def _table(self, metric: str) -> str:
        told = METRICS[metric]
        bar = "" if told.bar is None else f"; the field's bar is {told.bar}"
        heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("sampled \\ scored", *self.names))
        body = []
        for a in self.names:
            row = "".join(self._cell(a, b, metric) for b in self.names)
            body.append(f'<tr><th scope="row">{escape(a)}</th>{row}</tr>')
        return (
            f'<h2>{escape(told.label)}</h2><p class="note">{escape(told.description)}, {told.unit}{bar}</p>'
            f'<div class="scroll"><table><caption hidden>{escape(metric)}</caption><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

    def _cell(self, a: str, b: str, metric: str) -> str:
        value, lo, hi = self.numbers(a, b, metric).values()
        interval = "" if lo is None or hi is None else f"<small>[{lo:.2g}, {hi:.2g}]</small>"
        shade, mark = SHADES[self.word(a, b)], ' class="own"' if a == b else ""
        colour = f' style="background: rgba(var(--heat), {shade})"' if shade else ""
        return f"<td{mark}{colour}>{number(value, 3) or '–'}{interval}</td>"

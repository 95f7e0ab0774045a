"""The matrix as a page: no script, no network, each row a link to its policy's own report."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

TABLES = (
    (
        "kl_k3",
        "Mean k3 KL",
        "nats a token; under 1e-4 is what two engines in float32 stay below, 0.015 is prime-rl's bar",
    ),
    ("logprob_diff_max", "Largest |log p − log q|", "nats, of any sampled token"),
    ("ess_token", "Effective sample, tokens", "fraction; 1 is on-policy"),
    ("ess_seq", "Effective sample, sequences", "fraction; 1 is on-policy"),
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --line: #d4d8dd; --dim: #5f6670; --heat: 214, 110, 20 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #16181b; --line: #3a3f46; --dim: #a2a9b3; --heat: 240, 140, 50 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 2rem 0 0 } p.note { color: var(--dim); margin: 0 0 .5rem }
.scroll { overflow-x: auto } table { border-collapse: collapse } a { color: inherit }
th, td { border: 1px solid var(--line); padding: .4rem .8rem } th { text-align: left; font-weight: 600 }
td { text-align: right; font-variant-numeric: tabular-nums } td small { display: block; color: var(--dim) }
td.own { outline: 2px dashed var(--dim); outline-offset: -4px }
"""


def matrix_page(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], verdict: str, sentences: Mapping[str, str]
) -> str:
    """The whole page; `rows` are Matrix.rows(), `sentences` a verdict for every policy that sampled."""
    cells = {(row["sampled"], row["scored"]): row for row in rows}
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
        f'<link rel="icon" href="data:,"><title>{len(names)} policies, each against each</title><style>{STYLE}</style></head><body><main>',
        f"<h1>{html.escape(verdict)}</h1>",
        '<p class="note">Down the side who sampled, along the top who scored the same token ids. The dashed diagonal is a policy against '
        "itself, what it said while it sampled against its own scores: the noise floor. In brackets the 95 % interval over responses.</p>",
    ]
    for metric, title, note in TABLES:
        parts.append(
            f'<h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{_table(names, cells, metric)}'
        )
    first = rows[0]
    parts.append("<h2>Each policy's own samples</h2><ul>")
    parts += [
        f'<li><a href="{html.escape(name)}/report.html">{html.escape(name)}</a>: {html.escape(sentences[name])}</li>'
        for name in names
    ]
    parts.append(
        f'</ul><p class="note">{first["responses"]:,} responses of each policy; the same numbers are in matrix.csv.</p>'
    )
    return "\n".join(parts) + "</main></body></html>\n"


def _table(names: Sequence[str], cells: Mapping[tuple[str, str], Mapping[str, Any]], metric: str) -> str:
    values = [cells[a, b][metric] for a in names for b in names if cells[a, b][metric] is not None]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = []
    for a in names:
        row = "".join(_cell(cells[a, b], metric, _heat(cells[a, b][metric], values, metric), a == b) for b in names)
        body.append(f'<tr><th scope="row">{html.escape(a)}</th>{row}</tr>')
    label = f'<caption hidden>{html.escape(metric)}</caption><thead><tr><th scope="col">sampled \\ scored</th>{head}</tr></thead>'
    return f'<div class="scroll"><table>{label}<tbody>{"".join(body)}</tbody></table></div>'


def _cell(row: Mapping[str, Any], metric: str, heat: float, own: bool) -> str:
    value, lo, hi = (row[name] for name in (metric, f"{metric}_lo", f"{metric}_hi"))
    shown = "–" if value is None else f"{value:.3g}"
    interval = "" if lo is None or hi is None else f"<small>[{lo:.2g}, {hi:.2g}]</small>"
    mark = ' class="own"' if own else ""
    return f'<td{mark} style="background: rgba(var(--heat), {heat:.2f})">{shown}{interval}</td>'


def _heat(value: float | None, values: Sequence[float], metric: str) -> float:
    """0 for the best cell, 0.6 for the worst: by size for shares, by order of magnitude for what spans several."""
    if value is None or max(values) == min(values):
        return 0.0
    if metric.startswith("ess"):
        return 0.6 * (max(values) - value) / (max(values) - min(values))
    logs = [math.log10(max(v, 1e-12)) for v in (value, min(values), max(values))]
    return 0.6 * (logs[0] - logs[1]) / max(logs[2] - logs[1], 1e-9)

"""The matrix as a page: no script, no network, each row a link to its policy's own report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rl_onoff.compare import METRICS, headlines
from rl_onoff.report.text import number

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
Cells = Mapping[tuple[str, str], Mapping[str, Any]]


def matrix_page(
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    words: Mapping[tuple[str, str], str],
    verdict: str,
    sentences: Mapping[str, str],
) -> str:
    """The whole page; `rows` and `words` are a Matrix's, `sentences` a verdict for every policy that sampled."""
    cells = {(row["sampled"], row["scored"]): row for row in rows}
    links = (f'<li><a href="{escape(a)}/report.html">{escape(a)}</a>: {escape(sentences[a])}</li>' for a in names)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">',
        f"<title>{len(names)} policies, each against each</title><style>{STYLE}</style></head><body><main>",
        f'<h1>{escape(verdict)}</h1><p class="note">{HOW_TO_READ}</p>',
        *(_table(names, cells, words, metric) for metric in headlines(3)),
        f"<h2>Each policy's own samples</h2><ul>{''.join(links)}</ul>",
        f'<p class="note">{rows[0]["responses"]:,} responses of each policy; the same numbers are in matrix.csv.</p>',
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _table(names: Sequence[str], cells: Cells, words: Mapping[tuple[str, str], str], metric: str) -> str:
    told = METRICS[metric]
    bar = "" if told.bar is None else f"; the field's bar is {told.bar}"
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("sampled \\ scored", *names))
    body = []
    for a in names:
        row = "".join(_cell(cells[a, b], metric, words[a, b], a == b) for b in names)
        body.append(f'<tr><th scope="row">{escape(a)}</th>{row}</tr>')
    return (
        f'<h2>{escape(told.label)}</h2><p class="note">{escape(told.description)}, {told.unit}{bar}</p>'
        f'<div class="scroll"><table><caption hidden>{escape(metric)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(row: Mapping[str, Any], metric: str, word: str, own: bool) -> str:
    value, lo, hi = (row[name] for name in (metric, f"{metric}_lo", f"{metric}_hi"))
    interval = "" if lo is None or hi is None else f"<small>[{lo:.2g}, {hi:.2g}]</small>"
    shade, mark = SHADES[word.partition(",")[0]], ' class="own"' if own else ""
    colour = f' style="background: rgba(var(--heat), {shade})"' if shade else ""
    return f"<td{mark}{colour}>{number(value, 3) or '–'}{interval}</td>"

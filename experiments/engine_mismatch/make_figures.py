"""Run: python experiments/engine_mismatch/make_figures.py RUN_DIR [--out FOLDER]

Turns the run folder of an `experiment=matrix` into the study's table (table.md) and plot (matrix.svg). Needs nothing
but Python: the plot is written as SVG by hand, and reads in dark and in light.
"""

from __future__ import annotations

import argparse
import csv
import html
import math
from pathlib import Path

PANELS = (
    ("kl_k3", "k3 KL, nats a token", True),
    ("logprob_diff_max", "max |log p − log q|, nats", True),
    ("ess_seq", "ESS, sequences", False),
)
CELL, PAD, TOP = 92, 110, 70
Cells = dict[tuple[str, str], dict[str, str]]


def read(run_dir: Path) -> tuple[list[str], Cells]:
    """The policies in their order, and a row of matrix.csv for every (sampled, scored)."""
    with (run_dir / "matrix.csv").open(newline="") as file:
        cells = {(row["sampled"], row["scored"]): row for row in csv.DictReader(file)}
    return list(dict.fromkeys(a for a, _ in cells)), cells


def value(cells: Cells, a: str, b: str, name: str) -> float:
    return float(cells[a, b][name] or "nan")


def table(names: list[str], cells: Cells) -> str:
    """Markdown: one row a cell, the diagonal marked as what it is."""
    lines = [
        "| sampled | scored | k3 KL (95 % interval) | max \\|log p − log q\\| | ESS tokens | ESS sequences "
        "| same likeliest token |",
        "|---|---|---|---|---|---|---|",
    ]
    for a in names:
        for b in names:
            k3, lo, hi = (value(cells, a, b, f"kl_k3{end}") for end in ("", "_lo", "_hi"))
            numbers = [
                f"{value(cells, a, b, name):.4g}"
                for name in ("logprob_diff_max", "ess_token", "ess_seq", "argmax_agreement")
            ]
            scored = f"{b} (noise floor)" if a == b else b
            shown = " | ".join("–" if n == "nan" else n for n in numbers)
            lines.append(f"| {a} | {scored} | {k3:.2g} ({lo:.2g} to {hi:.2g}) | {shown} |")
    counts = cells[names[0], names[0]]
    return (
        "\n".join(
            [*lines, "", f"{counts['responses']} responses of each policy, {counts['tokens']} tokens of the first."]
        )
        + "\n"
    )


def heat(x: float, values: list[float], by_order: bool) -> float:
    """0 for the best cell of a panel, 1 for the worst."""
    low, high = min(values), max(values)
    if math.isnan(x) or low == high:
        return 0.0
    if by_order:
        x, low, high = (math.log10(max(v, 1e-14)) for v in (x, low, high))
        return (x - low) / max(high - low, 1e-9)
    return (high - x) / (high - low)


def svg(names: list[str], cells: Cells) -> str:
    """One panel a metric: who sampled down the side, who scored along the top."""
    side, panel = CELL * len(names), CELL * len(names) + PAD
    width, height = panel * len(PANELS) + 20, side + TOP + 20
    style = (
        "text{font:13px system-ui,sans-serif;fill:#1c2024}.t{font-weight:600}"
        ".own{stroke:#5f6670;stroke-dasharray:4 3;stroke-width:2}"
        ".bg{fill:#fff}@media(prefers-color-scheme:dark){text{fill:#e8eaed}.bg{fill:#16181b}.own{stroke:#a2a9b3}}"
    )
    label = "; ".join(f"{a} to {b}: {value(cells, a, b, 'kl_k3'):.2g}" for a in names for b in names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="k3 KL {html.escape(label)}">',
        f'<style>{style}</style><rect class="bg" width="{width}" height="{height}"/>',
    ]
    for i, (metric, title, by_order) in enumerate(PANELS):
        x0, values = i * panel + PAD, [value(cells, a, b, metric) for a in names for b in names]
        parts.append(f'<text class="t" x="{x0}" y="22">{html.escape(title)}</text>')
        parts += [
            f'<text x="{x0 + (j + 0.5) * CELL}" y="{TOP - 10}" text-anchor="middle">{html.escape(b)}</text>'
            for j, b in enumerate(names)
        ]
        for j, a in enumerate(names):
            y = TOP + j * CELL
            parts.append(f'<text x="{x0 - 8}" y="{y + CELL / 2 + 4}" text-anchor="end">{html.escape(a)}</text>')
            for k, b in enumerate(names):
                x, number = x0 + k * CELL, value(cells, a, b, metric)
                shade = 0.06 + 0.54 * heat(number, values, by_order)
                own = ' class="own"' if a == b else ""
                parts.append(
                    f'<rect{own} x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}" rx="4" fill="#e07a1f" '
                    f'fill-opacity="{shade:.2f}"/>'
                    f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" text-anchor="middle">{number:.2g}</text>'
                )
    return "".join(parts) + "</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Table and plot of a matrix run.")
    parser.add_argument("run_dir", type=Path, help="folder of an experiment=matrix run")
    parser.add_argument("--out", type=Path, help="where table.md and matrix.svg go; the run folder where not given")
    arguments = parser.parse_args()
    names, cells = read(arguments.run_dir)
    out = arguments.out or arguments.run_dir
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("table.md", table(names, cells)), ("matrix.svg", svg(names, cells))):
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)


if __name__ == "__main__":
    main()

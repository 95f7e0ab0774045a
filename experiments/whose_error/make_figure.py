"""Run: python experiments/whose_error/make_figure.py RUN_DIR [--out FOLDER]

Turns the run folder of an `experiment=matrix` that has a policy in float32 into the study's table (table.md) and plot
(errors.svg). Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

COLOURS = ("#d1495b", "#2e6f95", "#7d8a2e", "#8a5aa8", "#c77d1e")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 70, 50, 40, 20


def table(run_dir: Path) -> str:
    """Markdown: a row for each cell that a truth tells apart, the diagonal (an engine against itself) among them."""
    head = "| sampled | scored | k3 KL | error of who sampled | error of who scored | correlation (95 % interval) "
    lines = [head + "| share of who sampled | share of who scored |", "|---|---|---|---|---|---|---|---|"]
    with (run_dir / "matrix.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def number(value: str, form: str) -> str:
        return "over 999%" if float(value) >= 10 else f"{float(value):{form}}"  # of a gap far below both errors

    def between(row: dict[str, str], name: str, form: str) -> str:
        value, lo, hi = (row[f"error_{name}{end}"] for end in ("", "_lo", "_hi"))
        return f"{number(value, form)} ({number(lo, form)} to {number(hi, form)})" if value and lo else "–"

    for row in rows:
        if row["error_behaviour"]:
            errors = " | ".join(f"{float(row[f'error_{side}']):.2g}" for side in ("behaviour", "target"))
            shares = " | ".join(between(row, f"share_{side}", ".0%") for side in ("behaviour", "target"))
            who = f"{row['sampled']} | {row['scored']} | {float(row['kl_k3']):.2g}"
            lines.append(f"| {who} | {errors} | {between(row, 'correlation', '.2f')} | {shares} |")
    counts = f"{rows[0]['responses']} responses of each policy, {rows[0]['tokens']} tokens of the first"
    return "\n".join([*lines, "", f"{counts}. Errors are root mean squares in nats, against float32.", ""])


def lines_of(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Policy -> its error while it sampled, by probability of the token."""
    found = {}
    for file in sorted(run_dir.glob("*/metrics.json")):
        comparisons = json.loads(file.read_text())["comparisons"].values()
        errors = [each["whose_error"] for each in comparisons if each.get("whose_error")]
        if errors and errors[0]["truth"] != file.parent.name:
            found[file.parent.name] = errors[0]["by_probability"]
    return found


def svg(lines: dict[str, list[dict[str, Any]]]) -> str:
    starts = sorted({bucket["start"] for buckets in lines.values() for bucket in buckets})
    most = max(b["metrics"]["error_behaviour"]["hi"] or 0 for buckets in lines.values() for b in buckets)

    def x(start: float) -> float:
        return LEFT + 10 + starts.index(start) / max(len(starts) - 1, 1) * (WIDTH - LEFT - RIGHT - 20)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / most * (HEIGHT - BOTTOM - TOP)

    style = (
        "text{font:13px system-ui,sans-serif;fill:#1c2024}.bg{fill:#fff}.axis{stroke:#a2a9b3}"
        "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.bg{fill:#16181b}}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Error against float32 by probability of the token">',
        f'<style>{style}</style><rect class="bg" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<line class="axis" x1="{LEFT}" y1="{y(0)}" x2="{WIDTH - RIGHT}" y2="{y(0)}"/>',
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 12}" text-anchor="middle">probability of the token, from</text>',
        f'<text x="{LEFT}" y="24">error while sampling against float32, nats (root mean square)</text>',
    ]
    parts += [f'<text x="{x(s):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{s:g}</text>' for s in starts]
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if most / s <= 6)
    for i in range(1, int(most / step) + 1):
        parts.append(f'<text x="{LEFT - 8}" y="{y(i * step) + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for number, (name, buckets) in enumerate(lines.items()):
        colour, at = COLOURS[number % len(COLOURS)], [(x(b["start"]), b["metrics"]["error_behaviour"]) for b in buckets]
        path = " ".join(f"{px:.1f},{y(error['value']):.1f}" for px, error in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(e["lo"]):.1f}" y2="{y(e["hi"]):.1f}" stroke="{colour}"/>'
            for px, e in at if e["lo"] is not None
        ]  # fmt: skip
        parts.append(f'<text x="{WIDTH - 170}" y="{TOP + 18 + 18 * number}" style="fill:{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(table(arguments.run_dir), encoding="utf-8")
    (arguments.out / "errors.svg").write_text(svg(lines_of(arguments.run_dir)), encoding="utf-8")

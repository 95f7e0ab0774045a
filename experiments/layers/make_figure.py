"""Run: python experiments/layers/make_figure.py SWEEP_DIR... [--out FOLDER]

Turns runs of experiment=layers against one target into the study's table (table.md) and plot (growth.svg). Needs
nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 80, 50, 40, 170
COLOURS = ("#2e6f95", "#d1495b", "#66a182", "#edae49", "#7d4e9e", "#5a616c")

Found = dict[str, Any]


def read(folders: list[Path]) -> list[tuple[str, Found]]:
    """(name, layers.json) of every run, float32 first."""
    named = []
    for file in (file for folder in folders for file in folder.glob("**/layers.json")):
        found = json.loads(file.read_text())
        side, eager = found["sides"]["backend"], ", eager" * (file.parent.name == "eager")
        named.append((f"{side['engine']}, {side['dtype']}{eager}", found))
    return sorted(named, key=lambda pair: ("bfloat16" in pair[0], pair[0]))


def table(runs: list[tuple[str, Found]]) -> str:
    head = "| backend | after layer 0 | half way | last layer | before the LM head (median) "
    rows = [head + "| mean \\|Δ logprob\\| | they part |", "|---|---|---|---|---|---|---|"]
    for name, found in runs:
        points = found["points"]
        num = len(points) - 2
        errors = [f"{points[i]['p90']:.2g}" for i in (1, (num + 1) // 2, num)]
        errors.append(f"{points[-1]['p90']:.2g} ({points[-1]['median']:.2g})")
        where = found["parting"]
        said = "no" if where is None else f"{where['where']}, layer {where['layer']}"
        rows.append(f"| {name} | {' | '.join(errors)} | {found['nats']['mean']:.2g} | {said} |")
    return "\n".join(rows) + "\n"


def svg(runs: list[tuple[str, Found]]) -> str:
    curves = [(name, [row["p90"] for row in found["points"]]) for name, found in runs]
    curves = [(name, values) for name, values in curves if any(values)]
    logs = [math.log10(value) for _, values in curves for value in values if value]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    num = len(curves[0][1])

    def x(i: int) -> float:
        return LEFT + i / (num - 1) * (WIDTH - LEFT - RIGHT)

    def y(power: float) -> float:
        return HEIGHT - BOTTOM - (power - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    style = (
        "text{font:13px system-ui,sans-serif;fill:#1c2024}.bg{fill:#fff}.axis{stroke:#a2a9b3;stroke-width:.7}"
        "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.bg{fill:#16181b}}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Error of the hidden states after every layer">',
        f'<style>{style}</style><rect class="bg" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">layers passed</text>',
        f'<text x="{LEFT}" y="24">error of the hidden state (90th percentile), against HuggingFace in float32</text>',
    ]
    for power in range(low, high + 1):
        line = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(power):.1f}" y2="{y(power):.1f}"/>'
        parts.append(f'{line}<text x="{LEFT - 8}" y="{y(power) + 4:.1f}" text-anchor="end">1e{power}</text>')
    parts += [f'<text x="{x(i):.1f}" y="{y(low) + 18}" text-anchor="middle">{i}</text>' for i in range(0, num, 5)]
    for number, (name, values) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(i):.1f},{y(math.log10(value)):.1f}" for i, value in enumerate(values) if value)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = TOP + 18 + 18 * number
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{at}" style="fill:{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sweep_dirs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    runs = read(arguments.sweep_dirs)
    (arguments.out / "table.md").write_text(table(runs))
    (arguments.out / "growth.svg").write_text(svg(runs))

"""Run: python experiments/temperature/make_figure.py SWEEP_DIR [--out FOLDER]

Turns a sweep over sampling.temperature into the study's table (table.md) and plot (gap.svg). Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TARGET = "huggingface-smollm2-float32"
LINES = (
    ("kl_k3", "k3 estimate at the sampled tokens", "#d1495b"),
    ("kl_forward_topk", "exact, on the top 20 tokens", "#2e6f95"),
)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 70, 50, 40, 20

Point = dict[str, dict[str, float]]


def read(sweep_dir: Path) -> dict[float, Point]:
    """Temperature -> metric -> value, lo, hi; coldest first."""
    found = {}
    for file in sweep_dir.glob("*/metrics.json"):
        temperature = float(file.parent.name.rpartition("sampling.temperature=")[2])
        found[temperature] = json.loads(file.read_text())["comparisons"][TARGET]["overall"]
    return dict(sorted(found.items()))


def table(points: dict[float, Point]) -> str:
    head = "| temperature | k3 KL (95 % interval) | exact KL on top tokens (95 % interval) "
    head += "| mean \\|log p − log q\\| | ESS sequences |"
    rows = [head, "|---|---|---|---|---|"]
    for temperature, of in points.items():
        two = [f"{of[m]['value']:.2g} ({of[m]['lo']:.2g} to {of[m]['hi']:.2g})" for m, _, _ in LINES]
        diff, ess = of["logprob_diff_mean"]["value"], of["ess_seq"]["value"]
        rows.append(f"| {temperature} | {' | '.join(two)} | {diff:.3g} | {ess:.2f} |")
    return "\n".join(rows) + "\n"


def svg(points: dict[float, Point]) -> str:
    temperatures = list(points)
    most = 1.1 * max(of[m]["hi"] for of in points.values() for m, _, _ in LINES)

    def x(temperature: float) -> float:
        share = (temperature - temperatures[0]) / (temperatures[-1] - temperatures[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT - 20) + 10

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / most * (HEIGHT - BOTTOM - TOP)

    style = (
        "text{font:13px system-ui,sans-serif;fill:#1c2024}.bg{fill:#fff}.axis{stroke:#a2a9b3}"
        "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.bg{fill:#16181b}}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="KL against temperature">',
        f'<style>{style}</style><rect class="bg" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<line class="axis" x1="{LEFT}" y1="{y(0)}" x2="{WIDTH - RIGHT}" y2="{y(0)}"/>',
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 12}" text-anchor="middle">sampling temperature</text>',
        f'<text x="{LEFT}" y="24">KL between bfloat16 and float32, nats a token</text>',
    ]
    parts += [f'<text x="{x(t)}" y="{y(0) + 18}" text-anchor="middle">{t}</text>' for t in temperatures]
    parts += [
        f'<text x="{LEFT - 8}" y="{y(v) + 4}" text-anchor="end">{v:g}</text>'
        for v in (0.0005, 0.001, 0.0015, 0.002)
        if v < most
    ]
    for number, (metric, label, colour) in enumerate(LINES):
        at = [(x(t), of[metric]) for t, of in points.items()]
        path = " ".join(f"{px:.1f},{y(of['value']):.1f}" for px, of in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<line x1="{px}" x2="{px}" y1="{y(of["lo"])}" y2="{y(of["hi"])}" stroke="{colour}" stroke-width="2"/>'
            for px, of in at
        ]
        parts.append(f'<text x="{LEFT + 16}" y="{TOP + 18 + 18 * number}" style="fill:{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sweep_dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    found = read(arguments.sweep_dir)
    (arguments.out / "table.md").write_text(table(found))
    (arguments.out / "gap.svg").write_text(svg(found))

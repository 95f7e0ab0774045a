"""Text for a terminal: numbers as people read them, and columns that stand under each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rl_onoff.compare import METRICS

LABELS = {
    "responses": "responses",
    "tokens": "response tokens",
    "tokens_per_s": "tokens/s",
    "length_mean": "mean length (tokens)",
    "finish_eos": "ended by EOS",
    "finish_stop": "ended by a stop string",
    "finish_length": "ended by length",
    "logprob_mean": "mean logprob (nats)",
    "entropy_mean": "mean entropy (nats)",
    "perplexity": "perplexity",
    "likeliest_fraction": "sampled the likeliest token",
    "nucleus_mass_mean": "mass the sampler kept",
    "num_prompts": "prompts judged",
    "num_responses": "responses judged",
    "failed": "reward failed",
    "reward_mean": "mean reward",
} | {name: metric.label for name, metric in METRICS.items() if metric.label}


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    lines = ("  ".join(format(cell, how) for cell, how in zip(row, formats, strict=True)) for row in rows)
    return [" " * indent + line.rstrip() for line in lines]


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

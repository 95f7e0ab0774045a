"""What the jobs of a sweep found, side by side: read from the jobs' folders alone, whoever ran them, where and when."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_onoff.rundir.files import read_json, write_whole
from rl_onoff.sweeps.jobs import ERROR, read_failure

FILE = "sweep.csv"

SHOWN = {  # on a terminal, of what there is: a number's name, and its label
    "generate/responses": "responses",
    "generate/tokens": "tokens",
    "generate/length_mean": "mean length",
    "generate/logprob_mean": "mean logprob",
    "reward/accuracy": "accuracy",
    "onoff/kl_k3": "k3 KL",
    "onoff/kl_k3_floor": "noise floor",
    "matrix/kl_k3_max": "k3 KL",
    "matrix/kl_k3_floor": "noise floor",
}


@dataclass(slots=True)
class Job:
    """One folder of a sweep."""

    name: str
    options: dict[str, str]  # its overrides
    status: str  # done, failed or unfinished
    error: str = ""
    verdict: str = ""
    values: dict[str, float] = field(default_factory=dict)


def read_jobs(sweep_dir: Path) -> list[Job]:
    """Every job that was ever begun in the folder, in the natural order of the jobs' options."""
    jobs = [_read_job(file.parents[1]) for file in sweep_dir.glob("*/.hydra/overrides.yaml")]
    names = swept_options(jobs)
    return sorted(jobs, key=lambda job: [_natural(job.options.get(name, "")) for name in names])


def swept_options(jobs: Sequence[Job]) -> list[str]:
    """Names of the options that are not the same in all jobs, in the order of the command line."""
    names = dict.fromkeys(name for job in jobs for name in job.options)
    return [name for name in names if len({job.options.get(name) for job in jobs}) > 1]


def options_in(sweep_dir: Path) -> list[str]:
    """Names of the options that tell the jobs apart in the table that the folder has."""
    try:
        with (sweep_dir / FILE).open(encoding="utf-8", newline="") as file:
            names = next(csv.reader(file))
        return names[1 : names.index("status")]
    except (OSError, StopIteration, ValueError):  # no table, or not one of ours
        return []


def write_csv(sweep_dir: Path, jobs: Sequence[Job]) -> Path:
    """A row a job: its folder, what tells it from the others, how it ended, and every number it found."""
    numbers = dict.fromkeys(name for job in jobs for name in job.values)
    names = ["folder", *swept_options(jobs), "status", "error", "verdict", *numbers]
    out = io.StringIO()
    rows = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    for job in jobs:
        ended = {"folder": job.name, "status": job.status, "error": job.error, "verdict": job.verdict}
        rows.writerow({**job.options, **ended, **job.values})
    return write_whole(sweep_dir / FILE, out.getvalue())


def as_text(jobs: Sequence[Job]) -> str:
    """The table for a terminal: the numbers that are looked at first, and the one that a sweeper is given."""
    from rl_onoff.report.tables import aligned, number

    options = swept_options(jobs)
    asked = {name: name for job in jobs if (name := job.options.get("metric")) and name not in SHOWN}
    shown = {name: label for name, label in (SHOWN | asked).items() if any(name in job.values for job in jobs)}
    rows = [[*options, *shown.values(), "verdict"]]
    for job in jobs:
        known = [job.options.get(name, "") for name in options]
        numbers = [number(job.values[name]) if name in job.values else "" for name in shown]
        rows.append([*known, *numbers, job.verdict if job.status == "done" else job.status])
    return "\n".join(aligned(rows, "<" * len(options) + ">" * len(shown) + "<", indent=2))


def conclude(sweep_dir: Path) -> str:
    """Write the table of the sweep; returns what to print at its end."""
    jobs = read_jobs(sweep_dir)
    if not jobs:
        return ""
    counts = Counter(job.status for job in jobs)
    ended = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [as_text(jobs), "", f"  sweep       {sweep_dir} ({ended})", f"  table       {write_csv(sweep_dir, jobs)}"]
    if any(sweep_dir.glob("*/wandb/offline-run-*")):
        lines.append(f"  W&B         offline; upload it with: wandb sync {sweep_dir}/*/wandb/offline-run-*")
    return "\n".join(lines)


def _read_job(folder: Path) -> Job:
    import yaml

    from rl_onoff.compare import word_of

    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")) or []
    options = {name: value for name, _, value in (str(override).partition("=") for override in overrides)}
    failed = read_failure(folder / ERROR)
    found = {} if failed else read_json(folder / "metrics.json") or {}  # a failed job's are those of an earlier one
    sentence = found.get("verdict") or found.get("matrix", {}).get("verdict", "")
    status = "failed" if failed else "done" if found else "unfinished"
    return Job(folder.name, options, status, str(failed or ""), word_of(sentence), dict(found.get("values", {})))


def _natural(text: str) -> tuple[Any, ...]:
    """Numbers by their size, before texts."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)

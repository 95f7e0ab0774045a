"""The jobs of a sweep, read from their folders alone, whoever ran them, where and when: the folders' names, word of the
jobs that failed, and the table of what all of them found."""

from __future__ import annotations

import csv
import hashlib
import re
import traceback
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

from rl_onoff.errors import OnOffError
from rl_onoff.redaction import masked_text
from rl_onoff.rundir.files import read_json, write_csv, write_whole

MAX_FOLDER_NAME = 200  # bytes; a file system takes 255
ERROR = "error.txt"  # in a failed job's folder: one sentence, the exit code, and the traceback if there is more to say
TABLE = "sweep.csv"
SHOWN = {  # on a terminal, of what there is: a number's name, and its label
    "generate/responses": "responses", "generate/tokens": "tokens", "generate/length_mean": "mean length",
    "generate/logprob_mean": "mean logprob", "reward/accuracy": "accuracy", "onoff/kl_k3": "k3 KL",
    "onoff/kl_k3_floor": "sampler's noise floor",
    "matrix/kl_k3_max": "k3 KL", "matrix/kl_k3_floor": "sampler's noise floor",
}  # fmt: skip


def job_folder(overrides: Sequence[str], fixed: Sequence[str] = ()) -> str:
    """The name of a job's folder: its overrides but the `fixed` ones, without slashes, cut where it is too long."""
    if isinstance(overrides, ListConfig):  # read item by item it would resolve them, an `${oc.env:HF_TOKEN}` too
        overrides = [str(override) for override in OmegaConf.to_container(overrides) or ()]
    same = {*fixed, "run_dir", "sweep_dir"}
    swept = sorted(override for override in overrides if override.partition("=")[0] not in same)
    name = re.sub(r"[/\\]+", "_", ",".join(swept)) or "job"
    if len(name.encode()) <= MAX_FOLDER_NAME:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return f"{name.encode()[: MAX_FOLDER_NAME - 9].decode(errors='ignore')}-{digest}"


# When imported, for a launcher's own processes name their jobs' folders, too.
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class JobFailed(OnOffError):
    """A job of a sweep failed, here or in another process; its file `where` says more if there is `more`."""

    def __init__(self, sentence: str, exit_code: int, where: Path, more: str) -> None:
        super().__init__(sentence)
        self.exit_code, self.where, self.more = exit_code, where, more

    def write(self) -> None:
        """Leave word where the process that started the sweep finds it."""
        write_whole(self.where, f"{self}\nexit code {self.exit_code}\n{self.more}")


def failure(error: Exception, folder: Path, secrets: Collection[str]) -> JobFailed:
    """The error of the job in `folder`, in words that hold none of the `secrets`."""
    ours, text, more = isinstance(error, OnOffError), " ".join(str(error).split()), ""
    if not ours or getattr(error, "__notes__", None):
        more = masked_text("".join(traceback.format_exception(error)), secrets)
    sentence = masked_text(text if ours else f"{type(error).__name__}: {text}", secrets)
    code = error.exit_code if isinstance(error, OnOffError) else OnOffError.exit_code
    return JobFailed(sentence, code, folder / ERROR, more)


def read_failure(file: Path) -> JobFailed | None:
    """The failure that a job wrote; None when the job has not failed."""
    if not file.exists():
        return None
    sentence, code, more = (file.read_text(encoding="utf-8") + "\n\n").split("\n", 2)
    return JobFailed(sentence, int(code.rpartition(" ")[2] or 1), file, more.strip())


def failures(sweep_dir: Path) -> set[tuple[int, int, Path]]:
    """The failures of all jobs, each with its time and inode, which are others when the file is written again."""
    return {((stat := file.stat()).st_mtime_ns, stat.st_ino, file) for file in sweep_dir.glob(f"*/{ERROR}")}


def options_in(sweep_dir: Path) -> list[str]:
    """Names of the options that tell the jobs apart in the table that the folder has."""
    try:
        with (sweep_dir / TABLE).open(encoding="utf-8", newline="") as file:
            names = next(csv.reader(file))
        return names[1 : names.index("status")]
    except (OSError, StopIteration, ValueError):  # no table, or not one of ours
        return []


def conclude(sweep_dir: Path) -> str:
    """Write the table of a sweep, a row for every job that was ever begun in the folder, in the natural order of the
    options that are not the same in all jobs; returns the numbers that are looked at first, to be printed."""
    from rl_onoff.report.tables import aligned, number

    jobs = [_read_job(file.parents[1]) for file in sweep_dir.glob("*/.hydra/overrides.yaml")]
    if not jobs:
        return ""
    every = dict.fromkeys(name for options, _, _ in jobs for name in options)
    swept = [name for name in every if len({options.get(name) for options, _, _ in jobs}) > 1]
    jobs.sort(key=lambda job: [_natural(job[0].get(name, "")) for name in swept])
    asked = {name: name for options, _, _ in jobs if (name := options.get("metric")) and name not in SHOWN}
    shown = {name: label for name, label in (SHOWN | asked).items() if any(name in values for _, _, values in jobs)}
    rows, cells = [], [[*swept, *shown.values(), "verdict"]]
    for options, (folder, status, error, verdict), values in jobs:
        named = {name: options.get(name, "") for name in swept}
        rows.append({"folder": folder, **named, "status": status, "error": error, "verdict": verdict, **values})
        numbers = [number(values.get(name)) for name in shown]
        cells.append([*named.values(), *numbers, verdict if status == "done" else status])
    ended = ", ".join(f"{n} {status}" for status, n in Counter(status for _, (_, status, *_), _ in jobs).items())
    lines = [*aligned(cells, "<" * len(swept) + ">" * len(shown) + "<", indent=2), ""]
    lines += [f"  sweep       {sweep_dir} ({ended})", f"  table       {write_csv(sweep_dir / TABLE, rows)}"]
    if any(sweep_dir.glob("*/wandb/offline-run-*")):
        lines.append(f"  W&B         offline; upload it with: wandb sync {sweep_dir}/*/wandb/offline-run-*")
    return "\n".join(lines)


def _read_job(folder: Path) -> tuple[dict[str, str], tuple[str, str, str, str], dict[str, float]]:
    """Of a job's folder: the job's options, (folder, status, error, verdict), and the numbers."""
    import yaml

    from rl_onoff.compare import word_of

    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")) or []
    options = {name: value for name, _, value in (str(override).partition("=") for override in overrides)}
    failed = read_failure(folder / ERROR)
    found = {} if failed else read_json(folder / "metrics.json") or {}  # a failed job's are those of an earlier one
    sentence = found.get("verdict") or found.get("matrix", {}).get("verdict", "")
    status = "failed" if failed else "done" if found else "unfinished"
    return options, (folder.name, status, str(failed or ""), word_of(sentence)), found.get("values", {})


def _natural(text: str) -> tuple[int, float, str]:
    """Numbers by their size, before texts."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)

"""The jobs of a sweep: what their folders are called, and word of the jobs that failed.

That word is left in a job's folder, for a launcher that runs jobs elsewhere may carry nothing home.
"""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

from rl_onoff.errors import OnOffError
from rl_onoff.redaction import masked_text
from rl_onoff.rundir.files import write_whole

MAX_FOLDER_NAME = 200  # bytes; a file system takes 255
ERROR = "error.txt"  # in a failed job's folder: one sentence, the exit code, and the traceback if there is more to say

Trace = tuple[int, int]  # inode and time of an error.txt: another one when the file is written again


def job_folder(overrides: Sequence[str], fixed: Sequence[str] = ()) -> str:
    """The name of a job's folder: its overrides but the `fixed` ones, without slashes, cut where it is too long."""
    if isinstance(overrides, ListConfig):  # read item by item it would resolve them, an `${oc.env:HF_TOKEN}` too
        overrides = [str(override) for override in OmegaConf.to_container(overrides) or ()]
    name = re.sub(r"[/\\]+", "_", ",".join(swept(overrides, fixed))) or "job"
    if len(name.encode()) <= MAX_FOLDER_NAME:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return f"{name.encode()[: MAX_FOLDER_NAME - 9].decode(errors='ignore')}-{digest}"


def swept(overrides: Iterable[str], fixed: Iterable[str] = ()) -> list[str]:
    """A job's overrides but those that are the same for all jobs, sorted."""
    names = {*fixed, "run_dir", "sweep_dir"}
    return sorted(override for override in overrides if override.partition("=")[0] not in names)


# When imported, for a launcher's own processes name their jobs' folders, too.
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class JobFailed(OnOffError):
    """A job of a sweep failed, here or in another process; its file `where` says more if there is `more`."""

    def __init__(self, sentence: str, exit_code: int, where: Path, more: str) -> None:
        super().__init__(sentence)
        self.exit_code, self.where, self.more = exit_code, where, more


def failure(error: Exception, folder: Path, secrets: Collection[str]) -> JobFailed:
    """The error of the job in `folder`, in words that hold none of the `secrets`."""
    ours = isinstance(error, OnOffError)
    text = " ".join(str(error).split())
    more = "" if ours and not getattr(error, "__notes__", None) else "".join(traceback.format_exception(error))
    sentence = masked_text(text if ours else f"{type(error).__name__}: {text}", secrets)
    code = error.exit_code if isinstance(error, OnOffError) else OnOffError.exit_code
    return JobFailed(sentence, code, folder / ERROR, masked_text(more, secrets))


def write_failure(failed: JobFailed) -> None:
    """Leave word of a failure where the process that started the sweep finds it."""
    write_whole(failed.where, f"{failed}\nexit code {failed.exit_code}\n{failed.more}")


def read_failure(file: Path) -> JobFailed | None:
    """The failure that `write_failure` wrote; None when the job has not failed."""
    if not file.exists():
        return None
    sentence, code, more = (file.read_text(encoding="utf-8") + "\n\n").split("\n", 2)
    return JobFailed(sentence, int(code.rpartition(" ")[2] or 1), file, more.strip())


def failures(sweep_dir: Path) -> dict[Path, Trace]:
    """The failures of all jobs, each with the trace that tells it from the next one in the same folder."""
    return {file: ((stat := file.stat()).st_ino, stat.st_mtime_ns) for file in sweep_dir.glob(f"*/{ERROR}")}


def new_failures(sweep_dir: Path, before: Mapping[Path, Trace]) -> list[JobFailed]:
    """The failures that were not there `before`, the first one first."""
    new = [(trace[1], file) for file, trace in failures(sweep_dir).items() if before.get(file) != trace]
    return [failed for _, file in sorted(new) if (failed := read_failure(file)) is not None]

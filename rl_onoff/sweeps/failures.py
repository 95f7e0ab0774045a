"""Word of the jobs that failed, left in their folders: a launcher that runs them elsewhere may carry nothing home."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from pathlib import Path

from rl_onoff.errors import OnOffError
from rl_onoff.redaction import redact
from rl_onoff.rundir.files import write_whole

ERROR = "error.txt"  # in the folder of a job that failed: one sentence, the exit code, and the traceback if there is more to say

Trace = tuple[int, int]  # of a file: another one when it is written again


class JobFailed(OnOffError):
    """A job of a sweep failed, here or in another process; its file `where` says more if there is `more`."""

    def __init__(self, sentence: str, exit_code: int, where: Path, more: str) -> None:
        super().__init__(sentence)
        self.exit_code, self.where, self.more = exit_code, where, more


def write_failure(folder: Path, error: Exception, secrets: Collection[str]) -> None:
    """Leave word of a failure where the process that started the sweep finds it."""
    ours = isinstance(error, OnOffError)
    text = " ".join(str(error).split())
    sentence = text if ours else f"{type(error).__name__}: {text}"
    more = "" if ours and not getattr(error, "__notes__", None) else "".join(traceback.format_exception(error))
    code = error.exit_code if isinstance(error, OnOffError) else OnOffError.exit_code
    write_whole(folder / ERROR, redact(f"{sentence}\nexit code {code}\n{more}", secrets))


def read_failure(file: Path) -> JobFailed | None:
    """What `write_failure` wrote, if it did."""
    if not file.exists():
        return None
    sentence, code, more = (file.read_text(encoding="utf-8") + "\n\n").split("\n", 2)
    return JobFailed(sentence, int(code.rpartition(" ")[2] or 1), file, more.strip())


def failures(sweep_dir: Path) -> dict[Path, Trace]:
    """The failures of all jobs, as traces: what is written again is another one."""
    return {file: ((stat := file.stat()).st_ino, stat.st_mtime_ns) for file in sweep_dir.glob(f"*/{ERROR}")}


def new_failures(sweep_dir: Path, before: Mapping[Path, Trace]) -> list[JobFailed]:
    """Those that were not there `before`, the first one first."""
    new = [(trace[1], file) for file, trace in failures(sweep_dir).items() if before.get(file) != trace]
    return [failed for _, file in sorted(new) if (failed := read_failure(file)) is not None]

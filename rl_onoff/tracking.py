"""Where a run is logged: W&B, or an object that does nothing.

A configured tracker must start, or the run stops before it costs anything; once it runs, its failures are warnings and
the run goes on, since the rows on disk are worth more than their pictures. wandb is imported in `start`, never before.
Names are `group/name`, which W&B's dashboard turns into sections. `progress/…` has `progress/responses` as its x.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.config import TrackingConfig
from rl_onoff.errors import UsageError, one_line
from rl_onoff.redaction import masked

log = logging.getLogger(__name__)

STEP = "progress/responses"  # what progress is plotted against: responses finished in the running stage
MAX_HTML_BYTES = 25_000_000
FINISH_TIMEOUT_S = 60.0  # longest wait for the last uploads; what is left stays on disk for `wandb sync`
ARTIFACT_TIMEOUT_S = 1800.0  # and with the run folder among them
OLD_MODES = {"run": "online", "dryrun": "offline"}  # other names of WANDB_MODE's values


class Tracker:
    """What a run tells about itself while it works, and when it is done. Here every call does nothing."""

    def __init__(self, config: TrackingConfig) -> None:
        self.config = config

    @property
    def where(self) -> str:
        """Where to look: a URL, or the offline run's folder with the command that uploads it; empty: nowhere."""
        return ""

    def start(self, *, config: Mapping[str, Any], run_dir: Path, group: str | None, job_type: str) -> None:
        """Begin, or go on where this run folder's last run stopped; UsageError when that is not possible."""

    def log(self, values: Mapping[str, float]) -> None:
        """Progress so far: names `progress/…`, `progress/responses` among them."""

    def summary(self, values: Mapping[str, float | str | None]) -> None:
        """The numbers a run ends with; None is left out."""

    def histogram(self, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Counts of B bins, at most 512, and their B + 1 edges."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], total: int) -> None:
        """The first `tracking.table_rows` of `total` rows; `<name>_shown` and `<name>_total` say what was left out."""

    def html(self, name: str, path: Path) -> None:
        """A self-contained page, such as the report."""

    def artifact(self, run_dir: Path) -> None:
        """The run folder itself, when `tracking.artifact` asks for it."""

    def close(self, failed: bool) -> None:
        """Send what is left and end; also right when `start` never happened, or failed."""


class NoTracker(Tracker):
    """Tracking that is off: every call is accepted and does nothing, so no caller asks whether tracking is on."""


def _warns(method: Callable[..., None]) -> Any:
    """Turn a call's failure into one warning per kind of call; before `start`, the call does nothing."""

    @wraps(method)
    def call(self: WandbTracker, *args: Any, **named: Any) -> None:
        if self._run is None:
            return
        try:
            method(self, *args, **named)
        except Exception as error:  # wandb's own, its service's, protobuf's, a socket's: none may end the run
            if method.__name__ not in self._warned:
                self._warned |= {method.__name__}
                log.warning("W&B: %s failed, the run goes on without it (said once): %s", method.__name__, error)

    return call


class WandbTracker(Tracker):
    """A W&B run whose files lie in the run folder; going on in the same folder goes on with the same W&B run."""

    _wandb: Any = None
    _run: Any = None
    _run_dir = Path()
    _warned: frozenset[str] = frozenset()

    @property
    def where(self) -> str:
        if self._run is None or self._run.disabled:
            return ""
        folder = self._run.settings.sync_dir
        offline = f"{folder} (offline; upload it with: wandb sync {folder})"
        return offline if self._run.offline else self._run.url or ""

    def start(self, *, config: Mapping[str, Any], run_dir: Path, group: str | None, job_type: str) -> None:
        # wandb-core otherwise sends its own usage metrics to the server at exit: 10 s more where a firewall drops them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb, self._run_dir = wandb, run_dir.resolve()
        try:
            mode = self._mode()
            run: dict[str, Any] = {"id": _run_id(run_dir), "project": self.config.project, "entity": self.config.entity}
            if "WANDB_SWEEP_ID" in os.environ:  # an agent of `wandb sweep` says there which run of which project it is
                run = {}
            settings: dict[str, Any] = {"quiet": True, "disable_git": True, "disable_code": True, "save_code": False}
            settings["finish_timeout"] = ARTIFACT_TIMEOUT_S if self.config.artifact else FINISH_TIMEOUT_S
            self._run = wandb.init(
                **run,
                group=self.config.group or group,
                job_type=job_type,
                name=(self.config.name or self._run_dir.name)[:128],  # W&B's limit, and a sweep's job has a long name
                tags=list(self.config.tags),
                config=masked(config),
                dir=str(self._run_dir),
                resume="allow",
                mode=mode,
                reinit="create_new",  # the jobs of a sweep share a process
                settings=wandb.Settings(
                    **settings,
                    init_timeout=15.0,
                    console="off",  # wandb's capture breaks progress bars; run.log has the lines
                    allow_offline_artifacts=False,  # finds an offline table relative to the run: the folder may move
                ),
            )
            self._run.define_metric(STEP, hidden=True, summary="max")
            self._run.define_metric("progress/*", step_metric=STEP, summary="mean")
        except UsageError:
            raise
        except Exception as error:  # wandb's, pydantic's, its service's: whichever it is, no run begins untracked
            why = f"W&B did not start ({one_line(error)})"
            raise UsageError(f"{why}: fix it, or set tracking.mode=offline or tracking=none") from error

    @_warns
    def log(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values))

    @_warns
    def summary(self, values: Mapping[str, float | str | None]) -> None:
        # Logged, not only put into run.summary: a history row gives a number its panel, a bar per run of a sweep.
        self._run.log({name: value for name, value in values.items() if value is not None})

    @_warns
    def histogram(self, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        self._run.log({name: self._wandb.Histogram(np_histogram=(counts, edges))})

    @_warns
    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], total: int) -> None:
        shown = _even_columns(list(islice(rows, self.config.table_rows)))
        table = self._wandb.Table(columns=list(columns), data=shown)
        self._staged(self._run.log, {name: table, f"{name}_shown": len(shown), f"{name}_total": total})

    @_warns
    def html(self, name: str, path: Path) -> None:
        if path.stat().st_size > MAX_HTML_BYTES:
            log.warning("W&B: %s is larger than %.0f MB and stays on disk only", path, MAX_HTML_BYTES / 1e6)
        else:
            self._run.log({name: self._wandb.Html(str(path), inject=False)})

    @_warns
    def artifact(self, run_dir: Path) -> None:
        if not self.config.artifact or self._run.disabled:
            return
        artifact = self._wandb.Artifact(f"rl_onoff-{self._run.id}", type="run")
        for path in sorted(run_dir.rglob("*")):
            name = path.relative_to(run_dir)
            # run.log still grows, and a file that changes before it is uploaded spoils the artifact
            if path.is_file() and name.parts[0] != "wandb" and name.name != "run.log":
                artifact.add_file(str(path), name.as_posix(), policy="immutable", skip_cache=True)  # without a copy
        self._staged(self._run.log_artifact, artifact)

    @_warns
    def close(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=int(failed))
        except Exception:
            # A dead service: else wandb's exit hook prints a traceback, and a sweep's next job finds the same service.
            self._end_service()
            raise

    def _mode(self) -> Any:
        """The mode to start in; never asks, and waits at most 10 s (WANDB_HTTP_TIMEOUT) for the server."""
        wanted, given = self.config.mode.value, os.environ.get("WANDB_MODE")
        if wanted == "auto" and given:
            wanted = OLD_MODES.get(given, given)
        logged_in, problem = False, ""
        if wanted in ("auto", "online"):
            # Verified before `init`, because an `init` that times out leaves a half-made run behind and its id in use.
            self._setup(silent=True)  # or login asks the server who we are, to greet us
            try:
                logged_in = self._wandb.login(prompt=False, verify=True)
            except self._wandb.Error as error:  # a key of the wrong form, refused, or no server
                problem = one_line(error)
                self._end_service()
        self._setup(silent=False)
        if logged_in:
            return "online"
        if wanted == "online":
            why = f"W&B cannot go online ({problem or 'not logged in'}): run `wandb login`"
            raise UsageError(f"{why}, or set tracking.mode=offline")
        if problem:
            log.warning("W&B: offline, because there is a login but it does not work now: %s", problem)
        return "offline" if wanted == "auto" else wanted

    def _end_service(self) -> None:
        """End wandb-core by force: one that is told to end while it still answers a request loses that message (0.31),
        and whoever waits for it, wandb's exit hook too, waits ten minutes."""
        import psutil

        with suppress(psutil.Error):
            for process in psutil.Process().children():
                if process.name().startswith("wandb-core"):
                    process.kill()
        with suppress(Exception, SystemExit):  # wandb leaves with the exit code of a service that was killed
            self._wandb.teardown()

    def _staged(self, send: Callable[[Any], None], what: Any) -> None:
        """wandb stages tables under ~/.local/share, where an offline run's stay; only the environment moves them."""
        ours = str(self._run_dir / "wandb" / "data")
        given = os.environ.setdefault("WANDB_DATA_DIR", ours)
        try:
            send(what)
        finally:
            if given == ours:
                del os.environ["WANDB_DATA_DIR"]

    def _setup(self, *, silent: bool) -> None:
        """Only warnings and errors reach the terminal; wandb reads this from its global settings alone."""
        settings = self._wandb.Settings(quiet=True, show_info=False, silent=silent)
        self._wandb.termsetup(self._wandb.setup(settings).settings, None)


def _run_id(run_dir: Path) -> str:
    """The id this folder's run had before, else a new one (or WANDB_RUN_ID), kept for the next time."""
    path = run_dir / "wandb" / "run_id"
    if path.exists() and "WANDB_SWEEP_ID" not in os.environ:  # an agent's id is always WANDB_RUN_ID
        return path.read_text().strip()
    name = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name + "\n")
    return name


def _even_columns(rows: list[Sequence[Any]]) -> list[list[Any]]:
    """Columns of one type each: one that mixes numbers and text, which a W&B table refuses, becomes text."""
    columns = []
    for cells in zip(*rows, strict=True):
        given = [cell for cell in cells if cell is not None]
        kinds = {next((kind for kind in (bool, Real, str) if isinstance(cell, kind)), object) for cell in given}
        even = len(kinds) <= 1 and object not in kinds
        columns.append(cells if even else [None if cell is None else str(cell) for cell in cells])
    return [list(row) for row in zip(*columns, strict=True)]

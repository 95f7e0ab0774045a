"""A sweep in this process: its jobs take turns, so that each engine is loaded once, whatever the order of the jobs.

A round loads one engine, that of the first job that waits, and gives every waiting job its turn. A job goes as far as it gets with
that engine; when it wants another one it is put back, and goes on in the round that has it: what it finished is on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from rl_onoff.config import Stage, swept
from rl_onoff.errors import MetricError, UsageError, nearest
from rl_onoff.sweep_table import Trace, failures

log = logging.getLogger(__name__)

FIXED = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's option: what a job's folder is not named after


class NotItsTurn(BaseException):  # not an Exception: nobody but the launcher may take it for a failure
    """The engine of this round is none of the `wanted` ones, with which the job would go on."""

    def __init__(self, wanted: Collection[Any]) -> None:
        super().__init__()
        self.wanted = wanted


@dataclass(slots=True)
class Turn:
    """What the running job may do."""

    engine: Any = None  # the config of the engine that is loaded
    free: bool = True  # the engine of this round is not chosen yet
    alone: bool = False  # no other job waits, so nothing is gained by putting this one back

    def has(self, engines: Collection[Any]) -> bool:
        """Whether one of these engines can be had in this round."""
        return self.engine is None or self.free or self.alone or self.engine in engines


turn: Turn | None = None  # of the sweep whose jobs run in this process
started: Started | None = None  # the sweep that this process started, if it did


@dataclass(slots=True)
class Started:
    """What the process that started a sweep knows of it, whatever its sweeper and launcher."""

    folder: Path
    config: DictConfig  # with what is the same for all jobs
    before: Mapping[Path, Trace]  # failures that an earlier sweep left in the folder


class Refused(BaseException):  # not an Exception: Hydra makes a warning of what a callback raises
    """The sweep cannot be right, so no job of it is begun."""

    def __init__(self, error: UsageError) -> None:
        super().__init__(error)
        self.error = error


class Remember(Callback):
    """Hydra's callback at the start of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global started
        try:
            check_metric(config)
        except UsageError as error:
            raise Refused(error) from error
        if "hydra_ray_launcher" in str(config.hydra.launcher.get("_target_")):
            prepare_ray(config.hydra.launcher.ray.init)
        path = Path(str(config.hydra.sweep.dir))
        started = Started(path, config, failures(path))


def prepare_ray(init: DictConfig) -> None:
    """What the Ray launcher gives to `ray.init`, where the command does not say it."""
    with open_dict(init):
        init.setdefault("object_store_memory", None)  # else the plugin sets one, which a cluster that runs already refuses
        init.setdefault("include_dashboard", False)  # ten processes, for a page that few open
        init.setdefault("logging_level", logging.ERROR)


# -- the number that a sweeper optimises -------------------------------------------------------------------------------

MADE_BY = {"onoff": (Stage.compare, Stage.attribute), "matrix": (Stage.matrix,), "attribute": (Stage.attribute,)}
OF_EVERY_RUN = {"onoff": ("onoff/kl_k3", "onoff/kl_k3_floor"), "matrix": ("matrix/kl_k3_max", "matrix/kl_k3_floor")}  # whatever its engines
GROUPS = ("generate", "reward", "score", *MADE_BY)


def optimises(hydra_config: Any) -> bool:
    """Whether the sweeper chooses jobs by the number that earlier ones returned."""
    return "BasicSweeper" not in str(hydra_config.sweeper.get("_target_", ""))


def check_metric(config: DictConfig) -> None:
    """Raises UsageError when a sweeper optimises a number that no job can have, as far as that can be told before the first one."""
    if not optimises(config.hydra):
        return
    metric, stages = config.metric, list(config.stages)
    if metric is None:
        raise MetricError("this sweeper needs the name of the number it optimises: set metric=onoff/kl_k3, for example")
    group, _, rest = metric.partition("/")
    if group not in GROUPS or not rest:
        near = nearest(group, GROUPS) or "onoff"
        example = f"{near}/{rest}" if rest else "onoff/kl_k3"
        raise MetricError(f"metric={metric} is no number of a run, their names begin with {', '.join(GROUPS)}: set metric={example}")
    if "/" not in rest and metric not in (known := OF_EVERY_RUN.get(group, (metric,))):
        raise MetricError(f"metric={metric} is no number of a run: set metric={nearest(metric, known) or known[0]}")
    if group in MADE_BY and not set(MADE_BY[group]) & set(stages):
        example = {"matrix": "matrix", "attribute": "attribute"}.get(group, "onoff")
        raise MetricError(f"metric={metric} is a number that this experiment does not find: set experiment={example}, or another metric")


def missing_metric(metric: str, names: Collection[str]) -> UsageError:
    """The error of a job that has no such number; MetricError when no other job will have it."""
    if metric in {name for names in OF_EVERY_RUN.values() for name in names}:
        return UsageError(f"metric={metric} is not a finite number in this run, so the sweeper is told that it failed")
    near = nearest(metric, names) or "onoff/kl_k3"
    return MetricError(f"metric={metric} is not among the numbers of a run (values in its metrics.json): set metric={near}, for example")


# -- the launcher ------------------------------------------------------------------------------------------------------


def launch(
    context: HydraContext, task: TaskFunction, config: DictConfig, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Run all jobs, in rounds; their returns are in the order of the jobs. `first` is the number of the first one."""
    global turn
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    log.info("%d jobs in %s", len(job_overrides), config.hydra.sweep.dir)
    done: dict[int, JobReturn] = {}
    wanted: dict[int, Collection[Any]] = {}  # by the jobs that were put back
    waiting = list(range(len(job_overrides)))
    turn = turn or Turn()
    while waiting:
        turn.free, turn.alone = True, len(waiting) == 1
        for job in waiting:
            if job in wanted and not turn.has(wanted[job]):
                continue
            number, name = first + job, ", ".join(swept(job_overrides[job], config.hydra.job.config.override_dirname.exclude_keys))
            log.info("#%d %s%s", number, "goes on: " if job in wanted else "", name)
            job_config = context.config_loader.load_sweep_config(config, list(job_overrides[job]))
            with open_dict(job_config):
                job_config.hydra.job.id = job_config.hydra.job.num = number
            try:
                done[job] = run_job(task, job_config, "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context=context)
            except NotItsTurn as not_now:
                wanted[job] = not_now.wanted
            configure_log(config.hydra.hydra_logging, config.hydra.verbose)
            if job not in done:
                log.info("#%d waits for its engine", number)
        waiting = [job for job in waiting if job not in done]
    return [done[job] for job in sorted(done)]


def fixed_options(arguments: Iterable[str]) -> list[str]:
    """Names of the options on a command line that are the same for all jobs."""
    parser = OverridesParser.create()
    fixed: dict[str, bool] = {}  # the last word on an option counts
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:  # a flag, or a mistake: Hydra says so
            continue
        fixed[override.get_key_element()] = not override.is_sweep_override()
    return [name for name, is_fixed in fixed.items() if is_fixed]

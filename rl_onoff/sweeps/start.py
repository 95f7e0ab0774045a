"""What the process that starts a sweep knows of it and does for it, whatever its sweeper and launcher: joblib, submitit
and Ray start, stop and carry home jobs in processes of their own, and none of them is imported here. A sweeper such as
Optuna is given the number that `metric` names, which is checked before the first job as far as possible."""

from __future__ import annotations

import logging
import signal
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from rl_onoff.config import Stage
from rl_onoff.errors import MetricError, UsageError, nearest
from rl_onoff.redaction import refuse_literals
from rl_onoff.sweeps.jobs import failures

PACKAGES = ("joblib", "submitit", "ray", "concurrent")  # whose errors tell of a job that ended without a word
RAY = {  # what the Ray launcher gives to `ray.init`, where the command does not say it
    "object_store_memory": None,  # a running cluster refuses the plugin's own value
    "include_dashboard": False,  # ten processes, for a page that few open
    "logging_level": logging.ERROR,
}
MADE_BY = {"onoff": (Stage.compare, Stage.attribute), "matrix": (Stage.matrix,), "attribute": (Stage.attribute,)}
# numbers whose names have no engine in them
OF_EVERY_RUN = {"onoff": ("onoff/kl_k3", "onoff/kl_k3_floor"), "matrix": ("matrix/kl_k3_max", "matrix/kl_k3_floor")}
GROUPS = ("generate", "reward", "score", *MADE_BY)


@dataclass(slots=True)
class Started:
    """A sweep that this process started."""

    folder: Path
    on_ray: bool
    before: set[tuple[int, int, Path]]  # failures that an earlier sweep left in the folder


started: Started | None = None


class Refused(BaseException):  # not an Exception: Hydra makes a warning of what a callback raises
    """The sweep cannot be right, so no job of it is begun: its argument says why."""


class Remember(Callback):
    """Hydra's callback at the start of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global started
        try:
            refuse_literals(OmegaConf.to_container(config, enum_to_str=True))  # before Hydra writes multirun.yaml
            if optimises(config.hydra):
                check_metric(config.metric, config.stages)
        except UsageError as error:
            raise Refused(error) from error
        on_ray = "hydra_ray_launcher" in str((launcher := config.hydra.launcher).get("_target_"))
        if on_ray:
            with open_dict(launcher.ray.init):
                for name, value in RAY.items():
                    launcher.ray.init.setdefault(name, value)
        path = Path(str(config.hydra.sweep.dir))
        started = Started(path, on_ray, failures(path))


def optimises(hydra_config: Any) -> bool:
    """Whether the sweeper chooses jobs by the number that earlier ones returned."""
    return "BasicSweeper" not in str(hydra_config.sweeper.get("_target_", ""))


def check_metric(metric: str | None, stages: Collection[Stage]) -> None:
    """MetricError for a number that no job can have, as far as that is known beforehand."""
    if metric is None:
        raise MetricError("this sweeper needs the name of the number it optimises: set metric=onoff/kl_k3, for example")
    group, _, rest = metric.partition("/")
    known = OF_EVERY_RUN.get(group, (metric,))
    if group not in GROUPS or not rest:
        example = f"{nearest(group, GROUPS) or 'onoff'}/{rest}" if rest else "onoff/kl_k3"
        why = f"is no number of a run, their names begin with {', '.join(GROUPS)}: set metric={example}"
    elif "/" not in rest and metric not in known:
        why = f"is no number of a run: set metric={nearest(metric, known) or known[0]}"
    elif group in MADE_BY and not set(MADE_BY[group]) & set(stages):
        why = f"is a number that this experiment does not find: set experiment={group}, or another metric"
    else:
        return
    raise MetricError(f"metric={metric} {why}")


def missing_metric(metric: str, names: Collection[str]) -> UsageError:
    """The error of a job that has no such number; MetricError when no other job will have it."""
    if any(metric in known for known in OF_EVERY_RUN.values()):
        return UsageError(f"metric={metric} is not a finite number in this run, so the sweeper is told that it failed")
    fix = f"set metric={nearest(metric, names) or 'onoff/kl_k3'}, for example"
    return MetricError(f"metric={metric} is not among the numbers of a run (values in its metrics.json): {fix}")


def stop() -> None:
    """Stop the jobs that submitit runs on this machine: no signal to this process reaches them, and they outlive it."""
    import psutil

    for process in wait(2):  # a Ctrl-C in a terminal has reached the jobs
        with suppress(psutil.Error):
            if "submitit.core._submit" in process.cmdline():  # the process that computes; its parents wait for it
                process.send_signal(signal.SIGINT)
    for process in wait(10):
        with suppress(psutil.Error):
            process.kill()


def wait(timeout_s: float | None) -> list[Any]:
    """Wait for submitit's jobs on this machine; returns the processes that live on after so many seconds."""
    import psutil

    jobs = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(word.startswith("submitit.") for word in process.cmdline()):
                jobs.append(process)
    return psutil.wait_procs(jobs, timeout=timeout_s)[1]

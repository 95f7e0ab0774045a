"""What the process that starts a sweep knows of it and does for it, whatever its sweeper and launcher: joblib, submitit
and Ray start, stop and carry home jobs in processes of their own, and none of them is imported here. A sweeper such as
Optuna is given the number that `metric` names, which is checked before the first job as far as possible.

Of a sweep in this process the jobs share an engine slot and take turns, so that the order of jobs costs no loads. A run
is a row of steps, and before each it says, from its config, which engine the step uses. A round has one engine, that of
the first job that waits, and takes every waiting job as far as its steps go with that engine. A job that is not done
then waits between two steps."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Collection, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from rl_onoff.config import Stage
from rl_onoff.errors import MetricError, UsageError, nearest
from rl_onoff.pipeline.engines import Slot, Steps, Wish
from rl_onoff.redaction import refuse_literals
from rl_onoff.sweeps.jobs import failures

PACKAGES = ("joblib", "submitit", "ray", "concurrent")  # whose errors tell of a job that ended without a word
RAY = {  # what the Ray launcher gives to `ray.init`, where the command does not say it
    "object_store_memory": None,  # a running cluster refuses the plugin's own value
    "include_dashboard": False,  # ten processes, for a page that few open
    "logging_level": logging.ERROR,
}
MADE_BY = {
    "onoff": (Stage.compare, Stage.attribute), "matrix": (Stage.matrix,), "attribute": (Stage.attribute,),
    "layers": (Stage.layers,), "acceptance": (Stage.acceptance,),
}  # fmt: skip
# numbers whose names have no engine in them
OF_EVERY_RUN = {"onoff": ("onoff/kl_k3", "onoff/kl_k3_floor"), "matrix": ("matrix/kl_k3_max", "matrix/kl_k3_floor")}
GROUPS = ("generate", "reward", "score", *MADE_BY)


class Sweep(Callback):
    """A sweep that this process started: Hydra's callback at the start fills it in."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global started
        try:
            refuse_literals(OmegaConf.to_container(config, enum_to_str=True))  # before Hydra writes multirun.yaml
            if optimises(config.hydra):
                check_metric(config.metric, config.stages)
        except UsageError as error:
            print(f"rl-onoff: {error}", file=sys.stderr)
            sys.exit(error.exit_code)  # for Hydra makes a warning of an Exception that a callback raises
        self.on_ray = "hydra_ray_launcher" in str((launcher := config.hydra.launcher).get("_target_"))
        if self.on_ray:
            with open_dict(launcher.ray.init):
                for name, value in RAY.items():
                    launcher.ray.init.setdefault(name, value)
        self.folder = Path(str(config.hydra.sweep.dir))
        self.before = failures(self.folder)  # that an earlier sweep left in the folder
        started = self


started: Sweep | None = None


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


@dataclass(slots=True)
class Job:
    """One job of the sweep: what it waits for, and what is left of it."""

    number: int
    overrides: list[str]
    wants: Wish = None  # what its next step wants of the slot; None: it has not had a turn, or is done
    steps: Steps | None = None  # the steps that are left, once one is taken
    result: JobReturn | None = None


class Rounds:
    """The slot that jobs share, the engine of this round, and the job whose turn it is."""

    def __init__(self) -> None:
        self.slot = Slot()
        self.engine: Wish = None  # None: the round's first job has not chosen it yet
        self.job = Job(0, [])

    def turns(self, jobs: Sequence[Job]) -> Generator[Job, None, None]:
        """The jobs in their turns, until none waits; when given up, what is left of them is closed."""
        waiting = jobs
        try:
            while waiting:
                self.engine = None
                for job in waiting:
                    if self.has(job.wants):
                        self.job, self.engine = job, job.wants or self.engine
                        job.wants = None  # until it says so again: a job that fails waits for nothing
                        yield job
                waiting = [job for job in waiting if job.wants is not None]
        finally:
            for job in jobs:
                if job.steps is not None:  # the sweep was stopped, or the job's folder taken by another process
                    job.steps.close()

    def has(self, wish: Wish) -> bool:
        """Whether a step that wants this can be taken in this round."""
        return wish is None or self.engine in (None, wish)

    def go_on(self, steps: Steps) -> float | None:
        """Take the job as far as this round's engine goes; returns its number once it is done. A job that is not done
        has `wants` set. `steps` are those of the whole run, for a job that has taken none."""
        job, begun = self.job, self.job.steps is not None
        steps, job.steps = job.steps or steps, None
        try:
            wish = next(steps)
            while self.has(wish):
                self.engine, begun = wish or self.engine, True
                wish = next(steps)
        except StopIteration as end:
            return end.value
        job.wants = wish
        if begun:
            job.steps = steps
        else:
            steps.close()  # a job that has to wait for its very first step holds no data meanwhile
        return None


rounds: Rounds | None = None  # of the sweep whose jobs run in this process

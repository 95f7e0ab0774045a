"""A sweep in this process: its jobs share an engine slot and take turns, so that the order of jobs costs no loads.

A run is a row of steps, and before each it says, from its config, which engine the step uses. A round has one engine,
that of the first job that waits, and takes every waiting job as far as its steps go with that engine. A job that is not
done then waits between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from rl_onoff.pipeline.engines import Slot, Steps, Wish
from rl_onoff.sweeps.jobs import job_folder

log = logging.getLogger(__name__)


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


def launch(
    context: HydraContext, task: TaskFunction, config: DictConfig, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Run all jobs, in rounds; their returns are in the order of the jobs. `first` is the number of the first one."""
    global rounds
    hydra = config.hydra
    setup_globals()
    configure_log(hydra.hydra_logging, hydra.verbose)
    Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    log.info("%d jobs in %s", len(job_overrides), hydra.sweep.dir)
    rounds = rounds or Rounds()  # a sweeper that chooses its jobs by earlier ones launches them bit by bit
    jobs = [Job(number, list(overrides)) for number, overrides in enumerate(job_overrides, first)]
    waiting = jobs
    try:
        while waiting:
            rounds.engine = None
            for job in waiting:
                if not rounds.has(job.wants):
                    continue
                rounds.job, rounds.engine = job, job.wants or rounds.engine
                job.wants = None  # until it says so again: a job that fails waits for nothing
                name = job_folder(job.overrides, hydra.job.config.override_dirname.exclude_keys)
                log.info("#%d %s%s", job.number, "" if job.result is None else "goes on: ", name)
                own = context.config_loader.load_sweep_config(config, job.overrides)
                with open_dict(own):
                    own.hydra.job.id = own.hydra.job.num = job.number
                job.result = run_job(task, own, "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context=context)
                configure_log(hydra.hydra_logging, hydra.verbose)  # the job had a log of its own
                if job.wants is not None:
                    log.info("#%d waits for its engine", job.number)
            waiting = [job for job in waiting if job.wants is not None]
    finally:
        for job in jobs:
            if job.steps is not None:  # the sweep was stopped, or the job's folder taken by another process
                job.steps.close()
    return [job.result for job in jobs if job.result is not None]

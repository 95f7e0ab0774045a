"""A sweep in this process: its jobs take turns, so that each engine is loaded once, whatever the order of the jobs.

A round loads one engine, that of the first job that waits, and gives every waiting job its turn. A job goes as far as it gets with
that engine; when it wants another one it is put back, and goes on in the round that has it: what it finished is on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from rl_onoff.pipeline.engine_slot import NotItsTurn, Turn
from rl_onoff.sweeps.job_names import swept

log = logging.getLogger(__name__)


turn: Turn | None = None  # of the sweep whose jobs run in this process


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
    stuck: set[int] = set()  # jobs that do again what is not on disk, such as a rung that fails, whenever they go on
    waiting = list(range(len(job_overrides)))
    turn = turn or Turn()
    while waiting:
        turn.free = True
        for job in waiting:
            turn.alone = len(waiting) == 1 or job in stuck
            if job in wanted and not turn.has(wanted[job]):
                continue
            number, name = (
                first + job,
                ", ".join(swept(job_overrides[job], config.hydra.job.config.override_dirname.exclude_keys)),
            )
            log.info("#%d %s%s", number, "goes on: " if job in wanted else "", name)
            job_config = context.config_loader.load_sweep_config(config, list(job_overrides[job]))
            with open_dict(job_config):
                job_config.hydra.job.id = job_config.hydra.job.num = number
            try:
                done[job] = run_job(task, job_config, "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context=context)
            except NotItsTurn as not_now:
                if not_now.wanted == wanted.get(job):  # it was let go on, and asked for another engine before this one
                    stuck.add(job)
                wanted[job] = not_now.wanted
            configure_log(config.hydra.hydra_logging, config.hydra.verbose)
            if job not in done:
                log.info("#%d waits for its engine", number)
        waiting = [job for job in waiting if job not in done]
    return [done[job] for job in sorted(done)]

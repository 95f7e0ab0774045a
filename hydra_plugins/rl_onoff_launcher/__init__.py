"""The launcher of sweeps in this process: Hydra takes launchers from the namespace `hydra_plugins` alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)


class SharedEngineLauncher(Launcher):
    """Runs the jobs of a sweep in this process, in rounds of one engine each."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from rl_onoff.sweeps import start
        from rl_onoff.sweeps.jobs import job_folder

        hydra = self.config.hydra
        setup_globals()
        configure_log(hydra.hydra_logging, hydra.verbose)
        Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log.info("jobs: %d, in %s", len(job_overrides), hydra.sweep.dir)
        # a sweeper that chooses its jobs by earlier ones launches them bit by bit
        rounds = start.rounds = start.rounds or start.Rounds()
        jobs = [start.Job(number, list(typed)) for number, typed in enumerate(job_overrides, initial_job_idx)]
        with closing(rounds.turns(jobs)) as turns:
            for job in turns:
                name = job_folder(job.overrides, hydra.job.config.override_dirname.exclude_keys)
                log.info("#%d %s%s", job.number, "" if job.result is None else "goes on: ", name)
                own = self.context.config_loader.load_sweep_config(self.config, job.overrides)
                with open_dict(own):
                    own.hydra.job.id = own.hydra.job.num = job.number
                folders = ("hydra.sweep.dir", "hydra.sweep.subdir")
                job.result = run_job(self.task, own, *folders, hydra_context=self.context)
                configure_log(hydra.hydra_logging, hydra.verbose)  # the job had a log of its own
                if job.wants is not None:
                    log.info("#%d waits for its engine", job.number)
        return [job.result for job in jobs if job.result is not None]


NODE = {"_target_": f"{__name__}.{SharedEngineLauncher.__name__}"}
ConfigStore.instance().store(group="hydra/launcher", name="shared_engine", node=NODE, provider="rl_onoff")

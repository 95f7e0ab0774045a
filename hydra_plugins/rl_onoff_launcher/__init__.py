"""Hydra's door to rl_onoff.sweeps: Hydra takes launchers from the namespace `hydra_plugins` alone."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SharedEngineLauncher(Launcher):
    """Runs the jobs of a sweep one after the other in this process, those that want the loaded engine first."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from rl_onoff.sweeps.schedule import launch

        return launch(self._context, self._task, self._config, job_overrides, initial_job_idx)


NODE = {"_target_": f"{__name__}.{SharedEngineLauncher.__name__}"}
ConfigStore.instance().store(group="hydra/launcher", name="shared_engine", node=NODE, provider="rl_onoff")

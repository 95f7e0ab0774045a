"""What the process that starts a sweep knows of it and does for it, whatever its sweeper and launcher.

Jobs in processes of their own are started, stopped and carried home by joblib, submitit or Ray, none of which is
imported here.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from rl_onoff.errors import UsageError
from rl_onoff.redaction import refuse_literals
from rl_onoff.sweeps.jobs import Trace, failures
from rl_onoff.sweeps.metric import check_metric
from rl_onoff.sweeps.table import options_in

FIXED = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's option: overrides that no job's folder is named by
PACKAGES = ("joblib", "submitit", "ray", "concurrent")  # whose errors tell of a job that ended without a word
RAY = {  # what the Ray launcher gives to `ray.init`, where the command does not say it
    "object_store_memory": None,  # a running cluster refuses the plugin's own value
    "include_dashboard": False,  # ten processes, for a page that few open
    "logging_level": logging.ERROR,
}


@dataclass(slots=True)
class Started:
    """A sweep that this process started."""

    folder: Path
    config: DictConfig  # with what is the same for all jobs
    before: Mapping[Path, Trace]  # failures that an earlier sweep left in the folder


started: Started | None = None


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
            refuse_literals(OmegaConf.to_container(config, enum_to_str=True))  # before Hydra writes multirun.yaml
            check_metric(config)
        except UsageError as error:
            raise Refused(error) from error
        if _is_ray(launcher := config.hydra.launcher):
            with open_dict(launcher.ray.init):
                for name, value in RAY.items():
                    launcher.ray.init.setdefault(name, value)
        path = Path(str(config.hydra.sweep.dir))
        started = Started(path, config, failures(path))


def fixed_options(arguments: Iterable[str]) -> list[str]:
    """Names of the options on a command line that are the same for all jobs, and that no job in the sweep's folder is
    named by. None where all options are the same: then the one job is named by all of them.
    """
    parser = OverridesParser.create()
    is_fixed: dict[str, bool] = {}  # the last word on an option counts
    named: list[str] = []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:  # a flag, or a mistake: Hydra says so
            continue
        name = override.get_key_element()
        is_fixed[name] = not override.is_sweep_override()
        if name == "sweep_dir" and is_fixed[name]:
            named = options_in(Path(str(override.value())))
    fixed = [name for name, of_all in is_fixed.items() if of_all and name not in named]
    return fixed if len(fixed) < len(is_fixed) else []


@contextmanager
def waited_for() -> Iterator[None]:
    """Submitit stops waiting for its jobs once it loses one: wait here for the jobs that still run on this machine."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("submitit."):
            _wait(None)
        raise


def stop() -> None:
    """Stop the jobs that submitit runs on this machine: no signal to this process reaches them, and they outlive it."""
    import psutil

    for process in _wait(2):  # a Ctrl-C in a terminal has reached the jobs
        with suppress(psutil.Error):
            if "submitit.core._submit" in process.cmdline():  # the process that computes; its parents wait for it
                process.send_signal(signal.SIGINT)
    for process in _wait(10):
        with suppress(psutil.Error):
            process.kill()


def end(launcher: DictConfig) -> None:
    """End Ray before anything more is printed, for Ray may still have lines of the jobs to print."""
    if _is_ray(launcher) and "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _is_ray(launcher: DictConfig) -> bool:
    return "hydra_ray_launcher" in str(launcher.get("_target_"))


def _wait(timeout_s: float | None) -> list[Any]:
    """The processes of submitit's local jobs that live on after so many seconds."""
    import psutil

    jobs = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(word.startswith("submitit.") for word in process.cmdline()):
                jobs.append(process)
    return psutil.wait_procs(jobs, timeout=timeout_s)[1]

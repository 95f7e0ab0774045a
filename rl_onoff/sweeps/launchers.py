"""What the launchers that run jobs in processes of their own leave for us to do.

Their jobs are started, stopped and carried home by joblib, submitit or Ray; `rl_onoff` does not import them.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import DictConfig, open_dict

PACKAGES = ("joblib", "submitit", "ray", "concurrent")  # whose errors tell of a job that ended without a word


def prepare(launcher: DictConfig) -> None:
    """What the Ray launcher gives to `ray.init`, where the command does not say it."""
    if not _is(launcher, "hydra_ray_launcher"):
        return
    with open_dict(launcher.ray.init):
        launcher.ray.init.setdefault("object_store_memory", None)  # a running cluster refuses the plugin's own value
        launcher.ray.init.setdefault("include_dashboard", False)  # ten processes, for a page that few open
        launcher.ray.init.setdefault("logging_level", logging.ERROR)


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
    if _is(launcher, "hydra_ray_launcher") and "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _is(launcher: DictConfig, name: str) -> bool:
    return name in str(launcher.get("_target_"))


def _wait(timeout_s: float | None) -> list[Any]:
    """The processes of submitit's local jobs that live on after so many seconds."""
    import psutil

    jobs = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(word.startswith("submitit.") for word in process.cmdline()):
                jobs.append(process)
    return psutil.wait_procs(jobs, timeout=timeout_s)[1]

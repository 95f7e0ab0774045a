"""What the process that starts a sweep knows of it, whatever its sweeper and launcher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from rl_onoff.errors import UsageError
from rl_onoff.redaction import refuse_literals
from rl_onoff.sweeps.failures import Trace, failures
from rl_onoff.sweeps.launchers import prepare
from rl_onoff.sweeps.metric import check_metric
from rl_onoff.sweeps.table import options_in

FIXED = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's option: overrides that no job's folder is named by


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
        prepare(config.hydra.launcher)
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

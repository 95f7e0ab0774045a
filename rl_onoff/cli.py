"""The command line: compose the config with Hydra, run the job, and turn every error a user can make into one sentence.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_onoff.config import field_names, register
from rl_onoff.errors import OnOffError, UsageError

log = logging.getLogger(__name__)

TRACEBACK = "HYDRA_FULL_ERROR"  # Hydra's own switch; with it set, errors keep their traceback

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout

_failures: list[OnOffError] = []


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep; returns the number `metric` names, for a sweeper that optimises it."""
    hydra_config = HydraConfig.get()
    path = Path(hydra_config.runtime.output_dir)
    in_sweep = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    overrides = list(hydra_config.overrides.task)
    try:
        config = _checked(cfg)  # before the heavy imports, so that an error is instant
        from rl_onoff.run import run

        return run(config, path, group=path.parent.name if in_sweep else None, overrides=overrides)
    except OnOffError as error:
        if not _is_basic(hydra_config.launcher):
            raise  # the job runs in a process of its own: the launcher carries the error home
        _failures.append(error)
        if in_sweep:
            log.error("job %s failed and the sweep goes on: %s", path.name, error)
        return None


def _checked(cfg: DictConfig) -> Any:
    """The config as dataclasses, every value checked."""
    try:
        return OmegaConf.to_object(cfg)
    except AttributeError as error:  # a field added with `+`, which the schema does not have
        raise UsageError(f"{error}: an option of the engine's own is set as +backend.engine_kwargs.NAME=VALUE") from error


def main() -> None:
    """The `rl-onoff` command, and `python -m rl_onoff`."""
    keeps_traceback = os.environ.get(TRACEBACK) == "1"
    os.environ[TRACEBACK] = "1"  # let Hydra's errors through to here
    signal.signal(signal.SIGTERM, _interrupt)
    register()
    sys.argv[1:] = [_short_model(argument) for argument in sys.argv[1:]]
    if sys.argv[1:] == ["doctor"]:
        from rl_onoff.doctor import doctor

        sys.exit(doctor())
    try:
        job()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if keeps_traceback:
            raise
        _fail(error)
    if _failures:
        if keeps_traceback:
            raise _failures[0]
        if len(_failures) > 1:
            _exit(f"{len(_failures)} jobs of the sweep failed, the first because: {_failures[0]}", _failures[0].exit_code)
        _fail(_failures[0])


def _fail(error: Exception) -> NoReturn:
    """One sentence on stderr and an exit code; an error nobody foresaw keeps its traceback."""
    cause: Any = error
    while cause is not None and not isinstance(cause, OnOffError):
        cause = cause.__cause__
    if isinstance(cause, OnOffError):
        _exit(str(cause), cause.exit_code)
    if isinstance(error, HydraException | OmegaConfBaseException):
        _exit(_config_error(error), UsageError.exit_code)
    if isinstance(error, OSError) and error.filename is not None:
        _exit(f"cannot use {error.filename} ({error.strerror}): set run_dir (or sweep_dir) to a folder you can write to", 1)
    raise error


def _exit(sentence: str, code: int) -> NoReturn:
    print(f"rl-onoff: {sentence}", file=sys.stderr)
    sys.exit(code)


def _config_error(error: Exception) -> str:
    """Hydra's message and its cause in one line, with the nearest name where one was misspelt, and where to look."""
    words = " ".join(dict.fromkeys(filter(None, (_words(error), _words(error.__cause__)))))
    name = re.search(r"Could not override '([^']+)'", words)
    near = get_close_matches(name[1], field_names(), n=1, cutoff=0.7) if name else []
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{words.rstrip('.')}.{hint} (rl-onoff --help shows the groups, rl-onoff --cfg job every field)"


def _words(error: BaseException | None) -> str:
    """An exception's message in one line, without Hydra's trace of keys, types and search paths."""
    noise = ("full_key:", "object_type=", "reference_type=", "To append to your config use", "Config search path", "provider=", "See https")
    lines = [line.strip() for line in str(error or "").splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(noise))


def _short_model(argument: str) -> str:
    """`model=<hub id or path>` is short for `model.name=…`: the group's only choices are files of conf/model."""
    key, equals, value = argument.partition("=")
    if key != "model" or not equals:
        return argument
    choices = {file.stem for file in (CONF / "model").glob("*.yaml")}
    return argument if all(name in choices for name in value.split(",")) else f"model.name={value}"


def _is_basic(launcher: DictConfig) -> bool:
    return "basic_launcher" in launcher._target_


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt

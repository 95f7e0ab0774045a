"""The command line: compose the config with Hydra, run the job, and turn every error a user can make into one sentence.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_onoff.config import register
from rl_onoff.config_errors import config_sentence
from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.redaction import all_secrets, protect_log, redact_config, redact_override
from rl_onoff.storage import FULL_DISK, RunDir, disk_error, write_whole

log = logging.getLogger(__name__)

TRACEBACK = "HYDRA_FULL_ERROR"  # Hydra's own switch; with it set, errors keep their traceback

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout

_failures: list[Exception] = []
_kept: list[Any] = []  # the slot with the engine that the jobs of a sweep share, once there is one


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep; returns the number `metric` names, for a sweeper that optimises it."""
    hydra_config = HydraConfig.get()
    path = Path(hydra_config.runtime.output_dir)
    in_sweep = hydra_config.mode is RunMode.MULTIRUN
    here = "basic_launcher" in hydra_config.launcher._target_  # else the launcher carries errors home from another process
    try:
        return _run(cfg, hydra_config, path, in_sweep, keeps=in_sweep and here)
    except KeyboardInterrupt:
        if here:
            secrets = all_secrets(_plain(cfg))
            folder = f"sweep_dir={hydra_config.sweep.dir}" if in_sweep else f"run_dir={path}"
            log.warning("stopped; everything finished so far is in %s. To go on: %s", path, _continue_command(folder, secrets))
        raise
    except Exception as error:  # whatever it is, the other jobs of a sweep go on, and main() tells it
        if not here:
            raise
        _failures.append(error)
        if in_sweep:
            log.error("job %s failed and the sweep goes on: %s", path.name, error, exc_info=not isinstance(error, OnOffError))
        return None


def _run(cfg: DictConfig, hydra_config: Any, path: Path, in_sweep: bool, keeps: bool) -> float | None:
    """Everything of a job that can fail."""
    secrets = all_secrets(_plain(cfg))
    protect_log(secrets)
    folder = RunDir(path)
    with folder.lock():
        for name, node in {"config": cfg, "hydra": hydra_config, "overrides": hydra_config.overrides.task}.items():
            value = _plain(node)
            _write_yaml(path / ".hydra" / f"{name}.yaml", {"hydra": value} if name == "hydra" else value, secrets)
        whole_sweep = Path(hydra_config.sweep.dir) / "multirun.yaml"
        if in_sweep and whole_sweep.exists():
            _write_yaml(whole_sweep, _plain(OmegaConf.load(whole_sweep)), secrets)
        config = _checked(cfg)  # before the heavy imports, so that an error is instant
        protect_log(all_secrets(OmegaConf.to_container(cfg, resolve=True)))
        from rl_onoff.run import run
        from rl_onoff.slot import Slot

        if keeps and not _kept:
            _kept.append(Slot())
        return run(config, path, group=path.parent.name if in_sweep else None, slot=_kept[0] if keeps else None)


def _checked(cfg: DictConfig) -> Any:
    """The config as dataclasses, every value checked."""
    try:
        return OmegaConf.to_object(cfg)
    except AttributeError as error:  # a field added with `+`, which the schema does not have
        raise UsageError(
            f"an option added with + is not in the schema ({error}): remove it; one of the engine's own is set as"
            " +backend.engine_kwargs.NAME=VALUE"
        ) from error


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, enum_to_str=True)


def _write_yaml(file: Path, config: Any, secrets: frozenset[str]) -> None:
    """Write a config as Hydra would, its interpolations kept, but without the secrets."""
    write_whole(file, OmegaConf.to_yaml(OmegaConf.create(redact_config(config, secrets))))


def main() -> None:
    """The `rl-onoff` command, and `python -m rl_onoff`."""
    keeps_traceback = os.environ.get(TRACEBACK) == "1"
    os.environ[TRACEBACK] = "1"  # let Hydra's errors through to here
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make torch crawl where processes share cores
    logging.raiseExceptions = keeps_traceback  # or a full disk, on which run.log lies too, is a traceback a line
    signal.signal(signal.SIGTERM, _interrupt)
    register()
    _failures.clear()
    sys.argv[0] = "rl-onoff"  # with `python -m rl_onoff` too: shell completion is installed for this name
    sys.argv[1:] = [_short_model(argument) for argument in sys.argv[1:]]
    if sys.argv[1:] == ["doctor"]:
        from rl_onoff.doctor import doctor

        sys.exit(doctor())
    try:
        job()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `rl-onoff --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if keeps_traceback:
            raise
        _fail(error)
    finally:
        for slot in _kept:
            slot.close()
    if _failures:
        if keeps_traceback:
            raise _failures[0]
        _fail(_failures[0], f"{len(_failures)} jobs of the sweep failed, the first because: " if len(_failures) > 1 else "")


def _fail(error: Exception, before: str = "") -> NoReturn:
    """One sentence on stderr and an exit code; an error nobody foresaw keeps its traceback."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    ours = next((link for link in chain if isinstance(link, OnOffError)), None)
    disk = next((link for link in chain if isinstance(link, OSError)), None)
    if ours is not None:
        more = f" ({TRACEBACK}=1 shows the end of the engine's log)" if getattr(ours, "__notes__", None) else ""
        sentence, code = f"{ours}{more}", ours.exit_code
    elif isinstance(error, HydraException | OmegaConfBaseException):
        sentence, code = config_sentence(error), UsageError.exit_code
    elif disk is not None and (disk.errno in FULL_DISK or error not in _failures):  # not of a job: Hydra could not make its folder
        sentence, code = str(disk_error(disk, Path(disk.filename or "the run folder"))), OnOffError.exit_code
    else:
        raise error
    print(f"rl-onoff: {before}{sentence}", file=sys.stderr)
    sys.exit(code)


def _continue_command(folder: str, secrets: frozenset[str]) -> str:
    """The command line as it was given, secrets masked, with the folder it goes on in."""
    kept = [argument for argument in sys.argv[1:] if not argument.startswith(("run_dir=", "sweep_dir="))]
    return shlex.join(["rl-onoff", *(redact_override(argument, secrets) for argument in kept), folder])


def _short_model(argument: str) -> str:
    """`model=<hub id or path>` is short for `model.name=…`: the group's only choices are files of conf/model."""
    key, equals, value = argument.partition("=")
    if key != "model" or not equals:
        return argument
    choices = {file.stem for file in (CONF / "model").glob("*.yaml")}
    return argument if all(name in choices for name in value.split(",")) else f"model.name={value}"


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt

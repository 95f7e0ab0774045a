"""The command line: compose the config with Hydra, run the job, and turn every error a user can make into one sentence.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_onoff import __version__
from rl_onoff.cli.messages import config_sentence, flag_sentence, flags_first, target_sentence
from rl_onoff.config import CONF, register
from rl_onoff.errors import MetricError, OnOffError, UsageError
from rl_onoff.redaction import all_secrets, protect_log, redact_config, redact_override
from rl_onoff.rundir.files import FULL_DISK, disk_error, write_whole
from rl_onoff.rundir.table import LOCK, RunDir
from rl_onoff.sweeps import launchers, schedule, start
from rl_onoff.sweeps.failures import ERROR, JobFailed, new_failures, write_failure
from rl_onoff.sweeps.metric import missing_metric, optimises
from rl_onoff.sweeps.table import conclude

log = logging.getLogger(__name__)

TRACEBACK = "HYDRA_FULL_ERROR"  # Hydra's own switch; with it set, errors keep their traceback

_failures: list[Exception] = []


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep; returns the number `metric` names, for a sweeper that optimises it."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # threads that spin make torch crawl where processes share cores
    hydra_config = HydraConfig.get()
    path = Path(hydra_config.runtime.output_dir)
    in_sweep = hydra_config.mode is RunMode.MULTIRUN
    here = not in_sweep or start.started is not None  # else a launcher runs it in a process of its own
    secrets = _secrets(cfg)
    try:
        return _run(cfg, hydra_config, path, in_sweep, secrets)
    except KeyboardInterrupt:
        if not in_sweep:
            _say_how_to_go_on(path, f"run_dir={path}", secrets)
        raise
    except Exception as error:  # whatever it is, the other jobs of a sweep go on, and main() tells it
        if not in_sweep:
            _failures.append(error)
            return None
        then = "ends" if isinstance(error, MetricError) else "goes on"
        log.error(
            "job %s failed and the sweep %s: %s", path.name, then, error, exc_info=not isinstance(error, OnOffError)
        )
        try:
            write_failure(path, error, secrets)
        except OnOffError:  # the disk, which the error may be about: the launcher has to carry it home
            if not here:
                raise error from None
            _failures.append(error)
        if isinstance(error, MetricError):
            raise
        return None


def _run(cfg: DictConfig, hydra_config: Any, path: Path, in_sweep: bool, secrets: frozenset[str]) -> float | None:
    """Everything of a job that can fail."""
    protect_log(secrets)
    named = any(override.startswith("run_dir=") for override in hydra_config.overrides.task)
    whole_sweep = Path(hydra_config.sweep.dir) / "multirun.yaml"
    if in_sweep and whole_sweep.exists():  # before the lock, which may be refused
        _write_yaml(whole_sweep, _plain(OmegaConf.load(whole_sweep)), secrets)
    with RunDir(path).lock():
        (path / ERROR).unlink(missing_ok=True)
        before = {file: file.read_text(encoding="utf-8") for file in (path / ".hydra").glob("*.yaml")}
        for name, node in {"config": cfg, "hydra": hydra_config, "overrides": hydra_config.overrides.task}.items():
            value = _plain(node)
            _write_yaml(path / ".hydra" / f"{name}.yaml", {"hydra": value} if name == "hydra" else value, secrets)
        try:
            config = _checked(cfg)  # before the heavy imports, so that an error is instant
            from rl_onoff.run import run, run_steps

            group = path.parent.name if in_sweep else None
            if (rounds := schedule.rounds) is None:
                value = run(config, path, group=group)
            else:
                value = rounds.go_on(run_steps(config, path, rounds.slot, group=group))
                if rounds.job.wants is not None:  # it waits for its engine
                    return None
            (path / ERROR).unlink(missing_ok=True)  # of another process, which was refused because this one was writing
            if value is None and in_sweep and optimises(hydra_config):
                raise missing_metric(cfg.metric, RunDir(path).read_json("metrics.json")["values"])
            return value
        except UsageError:  # refused: what is in the folder is not of this command
            for file, text in before.items():
                write_whole(file, text)
            if not in_sweep and not named:
                _forget(path)
            raise


def _forget(path: Path) -> None:
    """Remove the folder of a command that was refused, if nothing but its config and log is there."""
    with suppress(OSError):
        if {entry.name for entry in path.iterdir()} <= {".hydra", "run.log", LOCK}:
            shutil.rmtree(path)
            path.parent.rmdir()  # the day's, if it was the first


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


def _secrets(config: DictConfig) -> frozenset[str]:
    """The secrets of a config, those too that it only points at: `hub_token: ${oc.env:MINE}`."""
    secrets = all_secrets(_plain(config))
    with suppress(OmegaConfBaseException):  # it points at nothing: what reads it says so
        secrets |= all_secrets(OmegaConf.to_container(config, resolve=True))
    return secrets


def _write_yaml(file: Path, config: Any, secrets: frozenset[str]) -> None:
    """Write a config as Hydra would, its interpolations kept, but without the secrets."""
    write_whole(file, OmegaConf.to_yaml(OmegaConf.create(redact_config(config, secrets))))


def main() -> None:
    """The `rl-onoff` command, and `python -m rl_onoff`."""
    keeps_traceback = os.environ.get(TRACEBACK) == "1"
    os.environ[TRACEBACK] = "1"  # let Hydra's errors through to here
    os.environ.setdefault(
        "RAY_DEDUP_LOGS", "0"
    )  # or the Ray launcher prints a line that several jobs have in common once
    logging.raiseExceptions = keeps_traceback  # or a full disk, on which run.log lies too, is a traceback a line
    signal.signal(signal.SIGTERM, _interrupt)
    register()
    _failures.clear()  # of an earlier command in this process
    start.started = schedule.rounds = None
    sys.argv[0] = "rl-onoff"  # with `python -m rl_onoff` too: shell completion is installed for this name
    if sys.argv[1:2] == ["doctor"]:
        from rl_onoff.cli.doctor import command

        sys.exit(command(sys.argv[2:]))
    sys.argv[1:] = _understood([_short_model(argument) for argument in sys.argv[1:]])
    try:
        with launchers.waited_for():
            job()
    except KeyboardInterrupt:
        if (started := start.started) is not None:
            launchers.stop()
            _conclude_sweep(all_done=False)
            _say_how_to_go_on(started.folder, f"sweep_dir={started.folder}", _secrets(started.config))
        sys.exit(130)
    except BrokenPipeError:  # `rl-onoff --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except start.Refused as refused:
        _fail(refused.error)
    except Exception as error:
        _conclude_sweep(all_done=False)
        if not (_failures and type(error) is ValueError):  # Optuna's, when all trials failed
            if keeps_traceback:
                raise
            _fail(error)
    else:
        _conclude_sweep(all_done=True)
    finally:
        if schedule.rounds is not None:
            schedule.rounds.slot.close()
    if _failures:
        first = _failures[0]
        if keeps_traceback and not isinstance(first, JobFailed):
            raise first
        if keeps_traceback and isinstance(first, JobFailed) and first.more:
            print(first.more, file=sys.stderr)
        _fail(first, f"{len(_failures)} jobs of the sweep failed, the first because: " if len(_failures) > 1 else "")


def _understood(arguments: list[str]) -> list[str]:
    """The command line as Hydra takes it; ends here for `--version`, and for what Hydra would answer with its own usage."""
    if "--version" in arguments:
        print(f"rl_onoff {__version__}")
        sys.exit(0)
    if sentence := flag_sentence(arguments):
        _fail(UsageError(sentence))
    if {"-m", "--multirun"} & set(arguments):
        names = ",".join(f"'{name}'" for name in start.fixed_options(arguments))
        arguments = [*arguments, f"{start.FIXED}=[{names}]"]
    return flags_first(arguments)


def _conclude_sweep(all_done: bool) -> None:
    """Print and write the table of a sweep, whoever ran its jobs, and take note of those that failed."""
    if (started := start.started) is None:
        return
    launchers.end(started.config.hydra.launcher)
    launchers.forget_secrets(started.config.hydra.launcher, started.folder, all_done=all_done)
    _failures.extend(new_failures(started.folder, started.before))
    with suppress(OnOffError):  # a full disk: the jobs have said so
        if table := conclude(started.folder):
            print(f"\n{table}")


def _say_how_to_go_on(path: Path, folder: str, secrets: frozenset[str]) -> None:
    log.warning("stopped; everything finished so far is in %s. To go on: %s", path, _continue_command(folder, secrets))


def _fail(error: Exception, before: str = "") -> NoReturn:
    """One sentence on stderr and an exit code; an error nobody foresaw keeps its traceback."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    ours = next((link for link in chain if isinstance(link, OnOffError)), None)
    disk = next((link for link in chain if isinstance(link, OSError)), None)
    if isinstance(error, JobFailed):
        sentence, code = f"{error} (more in {error.where})" if error.more else str(error), error.exit_code
    elif ours is not None:
        more = f" ({TRACEBACK}=1 shows the end of the engine's log)" if getattr(ours, "__notes__", None) else ""
        sentence, code = f"{ours}{more}", ours.exit_code
    elif isinstance(error, HydraException | OmegaConfBaseException):
        sentence, code = config_sentence(error), UsageError.exit_code
        if re.search(r"hydra/(launcher|sweeper)=|hydra_plugins\.", sentence):
            sentence += ", and pip install 'rl-onoff[launchers]' brings joblib, Ray, submitit and Optuna"
    elif (said := target_sentence(error, sys.argv[1:])) is not None:
        sentence, code = said, UsageError.exit_code
    elif disk is not None and (
        disk.errno in FULL_DISK or error not in _failures
    ):  # not of a job: Hydra could not make its folder
        sentence, code = str(disk_error(disk, Path(disk.filename or "the run folder"))), OnOffError.exit_code
    elif start.started is not None and type(error).__module__.partition(".")[0] in launchers.PACKAGES:
        said = next(iter(str(error).strip().splitlines()), "")
        sentence, code = (
            f"the launcher lost a job ({type(error).__name__}: {said}): run.log in its folder may tell why, and the same command with"
            f" sweep_dir={start.started.folder} does what is missing",
            OnOffError.exit_code,
        )
    else:
        raise error
    print(f"rl-onoff: {before}{sentence}", file=sys.stderr)
    sys.exit(code)


def _continue_command(folder: str, secrets: frozenset[str]) -> str:
    """The command line as it was given, secrets masked, with the folder it goes on in."""
    kept = [
        argument for argument in sys.argv[1:] if not argument.startswith(("run_dir=", "sweep_dir=", f"{start.FIXED}="))
    ]
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

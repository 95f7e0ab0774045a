"""The command line: compose the config with Hydra, run the job, and turn every error a user can make into one sentence.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not comparable, 4 beyond compare.fail_above or not
accepted, 130 stopped with Ctrl-C."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_onoff import __version__
from rl_onoff.backends.devices import THREADS
from rl_onoff.cli.overrides import config_sentence, continue_command, target_sentence, understood
from rl_onoff.config import CONF, register
from rl_onoff.errors import MetricError, OnOffError, UsageError
from rl_onoff.redaction import refuse_literals, secrets_in, secrets_of_environment
from rl_onoff.rundir.files import FULL_DISK, disk_error, write_whole
from rl_onoff.rundir.table import LOCK, RunDir
from rl_onoff.sweeps import start
from rl_onoff.sweeps.jobs import ERROR, JobFailed, conclude, failure, failures, read_failure

log = logging.getLogger(__name__)

TRACEBACK = "HYDRA_FULL_ERROR"  # Hydra's own switch; with it set, errors keep their traceback
STOPPED = "stopped; everything finished so far is in %s. To go on: %s"
_failures: list[Exception] = []
_taken: list[str] = []  # from the command before


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep; returns the number `metric` names, for a sweeper that optimises it."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
    hydra_config = HydraConfig.get()
    path, in_sweep = Path(hydra_config.runtime.output_dir), hydra_config.mode is RunMode.MULTIRUN
    try:
        return _run(cfg, hydra_config, path, in_sweep)
    except KeyboardInterrupt:
        if not in_sweep:
            log.warning(STOPPED, path, continue_command(sys.argv[1:], f"run_dir={path}"))
        raise
    except Exception as error:  # whatever it is, the other jobs of a sweep go on, and main() tells it
        if not in_sweep:
            _failures.append(error)
            return None
        secrets = secrets_of_environment()
        with suppress(OmegaConfBaseException):  # one of the config points at nothing: what reads it says so
            secrets |= {text for _, text in secrets_in(OmegaConf.to_container(cfg, resolve=True))}
        failed = failure(error, path, secrets)
        then = "ends" if isinstance(error, MetricError) else "goes on"
        more = f" (more in {failed.where})" if failed.more else ""
        log.error("job %s failed and the sweep %s: %s%s", path.name, then, failed, more)
        try:
            failed.write()
        except OnOffError:  # the disk, which the error may be about
            if start.started is None:  # this is a launcher's process, and the launcher has to carry the error home
                raise error from None
            _failures.append(error)
        if isinstance(error, MetricError):
            raise


def _run(cfg: DictConfig, hydra_config: Any, path: Path, in_sweep: bool) -> float | None:
    """Everything of a job that can fail."""
    if _taken:
        log.info("taken from the command before: %s", shlex.join(_taken))
    with RunDir(path).lock():
        (path / ERROR).unlink(missing_ok=True)
        before = {file: file.read_text(encoding="utf-8") for file in (path / ".hydra").glob("*.yaml")}
        written = {"config": cfg, "hydra": {"hydra": hydra_config}, "overrides": hydra_config.overrides.task}
        try:
            for of, name in ((cfg, ""), (hydra_config, "hydra")):
                refuse_literals(OmegaConf.to_container(of, enum_to_str=True), name)
            for name, node in written.items():  # as Hydra would, but under the lock
                write_whole(path / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(node))
            config = _config(cfg, hydra_config.runtime.choices)  # before the heavy imports: an error is instant
            from rl_onoff.run import run, run_steps

            group = path.parent.name if in_sweep else None
            if (rounds := start.rounds) is None:
                value = run(config, path, group=group)
            else:
                value = rounds.go_on(run_steps(config, path, rounds.slot, group=group))
                if rounds.job.wants is not None:  # it waits for its engine
                    return None
            (path / ERROR).unlink(missing_ok=True)  # of another process, refused because this one was writing
            if value is None and in_sweep and start.optimises(hydra_config):
                raise start.missing_metric(cfg.metric, RunDir(path).read_json("metrics.json")["values"])
            return value
        except UsageError:  # refused: what is in the folder is not of this command
            for file, text in before.items():
                write_whole(file, text)
            made_here = not in_sweep and not any(typed.startswith("run_dir=") for typed in written["overrides"])
            with suppress(OSError):
                if made_here and {entry.name for entry in path.iterdir()} <= {".hydra", "run.log", LOCK}:
                    shutil.rmtree(path)
                    path.parent.rmdir()  # the day's, if it was the first
            raise


def _config(cfg: DictConfig, choices: Mapping[str, str]) -> Any:
    """The config as dataclasses, whose checks refuse what is wrong; `choices`: what was chosen of each group."""
    engines = {name: cfg[name] for name in ("backend", "target") if cfg[name] is not None}
    engines |= {f"{group}.{name}": cfg[group][name] for group in ("targets", "policies") for name in cfg[group] or ()}
    try:
        config = OmegaConf.to_object(cfg)
    except AttributeError as error:  # a field added with `+`, which the schema does not have
        fix = "remove it; one of the engine's own is set as +backend.engine_kwargs.NAME=VALUE"
        raise UsageError(f"an option added with + is not in the schema ({error}): {fix}") from error
    except UsageError as error:
        for name, node in engines.items():
            try:
                OmegaConf.to_object(node)
            except UsageError:  # whichever engine it is, its config knows its options as those of backend
                raise UsageError(str(error).replace("backend.", f"{name}.")) from error
        raise
    truths = [group.partition("@")[2] or group for group, choice in choices.items() if choice == "truth"]
    for name in engines.keys() & truths:
        engine: Any = OmegaConf.to_object(engines[name])
        exact = type(engine)().with_option("dtype", "float32")
        for option in ("dtype", *engine.inexact):
            if (value := engine.option(option)) != exact.option(option):
                why = f"{name} is the truth, HuggingFace in float32, and {name}.{option} is {value}"
                raise UsageError(f"{why}: leave {name}.{option} out, or choose target=huggingface in place of truth")
    return config


def _earlier(arguments: Sequence[str]) -> list[str]:
    """What the command typed that measured an acceptance in run_dir, for the same to be judged again: but for options
    that are typed now, and for those of a group that is chosen now."""
    folders = [re.sub(r"""^(['"])(.*)\1$""", r"\2", typed[8:]) for typed in arguments if typed.startswith("run_dir=")]
    if "experiment=acceptance" not in arguments or not folders or {"-m", "--multirun"} & {*arguments}:
        return []
    folder = Path(os.path.expanduser(folders[-1]))
    file = folder / ".hydra/overrides.yaml"
    if not (file.is_file() and (folder / "acceptance").is_dir()):  # or that command measured nothing
        return []
    before = yaml.safe_load(file.read_text(encoding="utf-8")) or []  # not by OmegaConf, which would resolve ${…}
    options = {x: x.partition("=")[0].lstrip("+~") for x in (*before, *arguments)}
    typed = {options[x] for x in arguments}
    kept = [x for x in before if not {options[x], options[x].partition(".")[0]} & typed]
    return kept if "experiment=acceptance" in before else []


def main() -> None:
    """The `rl-onoff` command, and `python -m rl_onoff`."""
    keeps_traceback = os.environ.get(TRACEBACK) == "1"
    os.environ[TRACEBACK] = "1"  # let Hydra's errors through to here
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # or Ray's launcher prints a line that jobs have in common once
    logging.raiseExceptions = keeps_traceback  # or a full disk, on which run.log lies too, is a traceback a line
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    register()
    _failures.clear()  # of an earlier command in this process
    start.started = start.rounds = None
    sys.argv[0] = "rl-onoff"  # with `python -m rl_onoff` too: shell completion is installed for this name
    if sys.argv[1:2] == ["doctor"]:
        from rl_onoff.cli.doctor import command

        sys.exit(command(sys.argv[2:]))
    if "--version" in sys.argv:
        print(f"rl_onoff {__version__}")
        sys.exit(0)
    try:
        _taken[:] = _earlier(sys.argv[1:])
        sys.argv[1:] = understood([*_taken, *sys.argv[1:]])
        try:
            job()
        except Exception as error:
            if type(error).__module__.startswith("submitit."):
                start.wait(None)  # for the jobs that still run here: submitit stops waiting once it loses one
            raise
    except KeyboardInterrupt:
        if (started := start.started) is not None:
            start.stop()
            _conclude_sweep()
            log.warning(STOPPED, started.folder, continue_command(sys.argv[1:], f"sweep_dir={started.folder}"))
        sys.exit(130)
    except BrokenPipeError:  # `rl-onoff --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _conclude_sweep()
        if not (_failures and type(error) is ValueError):  # Optuna's, when all trials failed
            _fail(error, keeps_traceback)
    else:
        _conclude_sweep()
    finally:
        if start.rounds is not None:
            start.rounds.slot.close()
    if _failures:
        several = f"{len(_failures)} jobs of the sweep failed, the first because: " if len(_failures) > 1 else ""
        _fail(_failures[0], keeps_traceback, several)


def _conclude_sweep() -> None:
    """Print and write the table of a sweep, whoever ran its jobs, and take note of those that failed."""
    if (started := start.started) is None:
        return
    if started.on_ray and "ray" in sys.modules:
        sys.modules["ray"].shutdown()  # before anything more is printed, for Ray may still have lines of the jobs
    new = sorted(failures(started.folder) - started.before)
    _failures.extend(failed for _, _, file in new if (failed := read_failure(file)) is not None)
    with suppress(OnOffError):  # a full disk: the jobs have said so
        if table := conclude(started.folder):
            print(f"\n{table}")


def _fail(error: Exception, keeps_traceback: bool, before: str = "") -> NoReturn:
    """One sentence on stderr and an exit code; an error nobody foresaw keeps its traceback."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    ours = next((link for link in chain if isinstance(link, OnOffError)), None)
    disk = next((link for link in chain if isinstance(link, OSError)), None)
    code = OnOffError.exit_code
    if isinstance(error, JobFailed):
        if keeps_traceback:
            print(error.more, file=sys.stderr)
        code, said = error.exit_code, f"{error} (more in {error.where})" if error.more else str(error)
    elif keeps_traceback:
        raise error
    elif ours is not None:
        more = f" ({TRACEBACK}=1 shows the end of the engine's log)" if getattr(ours, "__notes__", None) else ""
        code, said = ours.exit_code, f"{ours}{more}"
    elif isinstance(error, HydraException | OmegaConfBaseException):
        code, said = UsageError.exit_code, config_sentence(error)
    elif said := target_sentence(error, sys.argv[1:]):
        code = UsageError.exit_code
    elif disk is not None and (disk.errno in FULL_DISK or error not in _failures):  # or Hydra could not make its folder
        said = str(disk_error(disk, Path(disk.filename or "the run folder")))
    elif start.started is not None and type(error).__module__.partition(".")[0] in start.PACKAGES:
        why = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        fix = f"the same command with sweep_dir={start.started.folder} does what is missing"
        said = f"the launcher lost a job ({why}): run.log in its folder may tell why, and {fix}"
    else:
        raise error
    print(f"rl-onoff: {before}{said}", file=sys.stderr)
    sys.exit(code)

"""The command line: compose the config with Hydra, run the job, and turn every error a user can make into one sentence.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_onoff.config import field_names, register
from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.redaction import all_secrets, protect_log, redact_override, write_yaml
from rl_onoff.storage import DISK_ERRORS, RunDir, disk_error

log = logging.getLogger(__name__)

TRACEBACK = "HYDRA_FULL_ERROR"  # Hydra's own switch; with it set, errors keep their traceback

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout

_failures: list[Exception] = []


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep; returns the number `metric` names, for a sweeper that optimises it."""
    hydra_config = HydraConfig.get()
    path = Path(hydra_config.runtime.output_dir)
    in_sweep = hydra_config.mode is RunMode.MULTIRUN
    here = "basic_launcher" in hydra_config.launcher._target_  # else the launcher carries errors home from another process
    try:
        return _run(cfg, hydra_config, path, in_sweep)
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


def _run(cfg: DictConfig, hydra_config: DictConfig, path: Path, in_sweep: bool) -> float | None:
    """Everything of a job that can fail."""
    secrets = all_secrets(_plain(cfg))
    protect_log(secrets)
    folder = RunDir(path)
    with folder.lock():
        for name, node in {"config": cfg, "hydra": hydra_config, "overrides": hydra_config.overrides.task}.items():
            value = _plain(node)
            write_yaml(path / ".hydra" / f"{name}.yaml", {"hydra": value} if name == "hydra" else value, secrets)
        whole_sweep = Path(hydra_config.sweep.dir) / "multirun.yaml"
        if in_sweep and whole_sweep.exists():
            write_yaml(whole_sweep, _plain(OmegaConf.load(whole_sweep)), secrets)
        config = _checked(cfg)  # before the heavy imports, so that an error is instant
        protect_log(all_secrets(OmegaConf.to_container(cfg, resolve=True)))
        from rl_onoff.run import run

        return run(config, path, group=path.parent.name if in_sweep else None)


def _checked(cfg: DictConfig) -> Any:
    """The config as dataclasses, every value checked."""
    try:
        return OmegaConf.to_object(cfg)
    except AttributeError as error:  # a field added with `+`, which the schema does not have
        schema = getattr(error.obj, "__class__", type(None)).__name__.removesuffix("Config")
        raise UsageError(
            f"the option {error.name!r}, added with +, is none of {schema}'s (docs/configuration.md): remove it, or set an option of the"
            " engine's own as +backend.engine_kwargs.NAME=VALUE"
        ) from error


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, enum_to_str=True)


def main() -> None:
    """The `rl-onoff` command, and `python -m rl_onoff`."""
    keeps_traceback = os.environ.get(TRACEBACK) == "1"
    os.environ[TRACEBACK] = "1"  # let Hydra's errors through to here
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make torch crawl where processes share cores
    logging.raiseExceptions = keeps_traceback  # or a full disk, on which run.log lies too, is a traceback a line
    signal.signal(signal.SIGTERM, _interrupt)
    register()
    if sys.argv[1:] == ["doctor"]:
        from rl_onoff.doctor import doctor

        sys.exit(doctor())
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
    if _failures:
        if keeps_traceback:
            raise _failures[0]
        _fail(_failures[0], f"{len(_failures)} jobs of the sweep failed, the first because: " if len(_failures) > 1 else "")


def _fail(error: Exception, before: str = "") -> NoReturn:
    """One sentence on stderr and an exit code; an error nobody foresaw keeps its traceback."""
    cause: Any = error
    while cause is not None and not isinstance(cause, OnOffError):
        cause = cause.__cause__
    if isinstance(cause, OnOffError):
        sentence, code = str(cause), cause.exit_code
    elif isinstance(error, HydraException | OmegaConfBaseException):
        sentence, code = _config_error(error), UsageError.exit_code
    elif isinstance(error, OSError) and (error.errno in DISK_ERRORS or error not in _failures):  # else Hydra could not make its folder
        sentence, code = str(disk_error(error, Path(error.filename or "the run folder"))), OnOffError.exit_code
    else:
        raise error
    print(f"rl-onoff: {before}{sentence}", file=sys.stderr)
    sys.exit(code)


def _continue_command(folder: str, secrets: frozenset[str]) -> str:
    """The command line as it was given, secrets masked, with the folder it goes on in."""
    kept = [argument for argument in sys.argv[1:] if not argument.startswith(("run_dir=", "sweep_dir="))]
    return shlex.join(["rl-onoff", *(redact_override(argument, secrets) for argument in kept), folder])


SENTENCES = (  # what Hydra says -> the cause, then the override that mends it
    (r"Could not find '(\S+)/(\S+)' Available options in '\S+': (.+)", r"\1=\2 is not one of the choices: set \1 to one of \3"),
    (r"Could not (?:override|delete from config)\.? ?'?([^' ]+?)'?\. (?:Key .*|.*does not exist.*)", r"there is no option \1"),
    (r"Error merging override (\S+?)=(.*?) (field '\S+' is not Optional)", r"\1=\2 is refused: this option cannot be null, set it to a value"),
    (r"Error merging override ([^\s=]+)=(.*?) ((?:Value|Invalid|Cannot|Object) .*)", r"\1=\2 is refused (\3): set \1 to a value of its type"),
    (r"Error parsing override '([^']*)' missing EQUAL .*", r"'\1' is not an override: write NAME=VALUE"),
    (r"(?:Error parsing override '([^']*)' )?(.*(?:no viable alternative|extraneous|mismatched|token recognition).*)",
     r"an override cannot be read (\2): put quotes around a value with blanks, commas or brackets, as in 'data.system=\"Be brief, please.\"'"),
    (r"Ambiguous value for argument '([^']+)' .*", r"\1 has several values: add -m to run each of them, or write NAME=[a,b] for a list"),
)  # fmt: skip


def _config_error(error: Exception) -> str:
    """Hydra's message and its cause as one sentence, with the nearest name where one was misspelt, and where to look."""
    words = " ".join(dict.fromkeys(filter(None, (_words(error), _words(error.__cause__))))).removeprefix("In 'config': ").rstrip(".")
    for pattern, sentence in SENTENCES:
        if found := re.fullmatch(pattern, words, re.DOTALL):
            words = found.expand(sentence)
            break
    name = re.fullmatch(r"there is no option (\S+)", words)
    near = get_close_matches(name[1], field_names(), n=1, cutoff=0.7) if name else []
    hint = f": did you mean {near[0]}?" if near else "; an engine's own is set as +backend.engine_kwargs.NAME=VALUE" if name else ""
    return f"{words}{hint} (rl-onoff --help shows the groups, rl-onoff --cfg job every field)"


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


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt

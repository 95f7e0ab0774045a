"""Nothing heavy is imported before it is needed, so that `--help` and a config error are instant."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import grimp

import rl_onoff

HEAVY = ("torch", "transformers", "vllm", "sglang", "ray", "wandb", "pandas", "pyarrow", "datasets")

IMPORT = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
print(sorted(set(sys.argv[2].split(",")) & set(sys.modules)))
"""


def modules() -> list[str]:
    """Every module of the package but the ones that run when they are imported."""
    names = [module.name for module in pkgutil.walk_packages(rl_onoff.__path__, "rl_onoff.")]
    return [name for name in names if not name.endswith("__main__")]


def imported_with(names: list[str], watched: tuple[str, ...]) -> str:
    command = [sys.executable, "-c", IMPORT, ",".join(names), ",".join(watched)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_module_imports_an_engine_or_anything_as_large():
    assert len(modules()) > 30
    assert imported_with(modules(), HEAVY) == "[]"


def test_the_command_line_needs_no_numpy():
    assert imported_with(["rl_onoff.cli.main", "rl_onoff.config"], ("numpy", *HEAVY)) == "[]"


def test_no_circle():
    graph = grimp.build_graph("rl_onoff")
    arrows = [(a, b) for a in sorted(graph.modules) for b in sorted(graph.find_modules_directly_imported_by(a))]
    assert len(arrows) > 300
    assert [(a, b) for a, b in arrows if graph.chain_exists(importer=b, imported=a)] == []

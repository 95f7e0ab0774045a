"""Runs in this process, as the command line would start them, only without Hydra's output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rl_onoff.cli.main import CONF
from rl_onoff.config import register
from rl_onoff.run import run
from rl_onoff.rundir.table import RunDir, Table


def config_of(*overrides: str, path: Path = Path("x")) -> Any:
    """The config of `overrides` for a run in the folder `path`."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["tracking=none", "reward=none", *overrides, f"run_dir={path}", "sweep_dir=x"])
    return OmegaConf.to_object(cfg)


def run_in(path: Path, *overrides: str) -> RunDir:
    """Run the config of `overrides` in the folder `path`."""
    config = config_of(*overrides, path=path)
    path.mkdir(parents=True, exist_ok=True)  # Hydra does
    run(config, path)
    return RunDir(path)


def rewrite(table: Table, change: Any) -> None:
    """Replace a table's rows by `change(row)`: how a mismatch is planted."""
    rows = [change(row) for row in table.rows()]
    for shard in table.shards():
        shard.unlink()
    with table.writer() as writer:
        for row in rows:
            writer.append({name: list(v) if getattr(v, "ndim", 1) == 2 else v for name, v in row.items()})

"""What tests of several areas share: runs in this process, and the comparison of responses that were drawn twice."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rl_onoff.cli.main import CONF
from rl_onoff.config import register
from rl_onoff.run import run
from rl_onoff.rundir.table import RunDir, Table
from rl_onoff.types import Completion


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
            writer.append(row)


# draws that another batch changes in float32: the most that benchmarks/flips.py measured on any model and CPU
FLIPS_PER_MILLION = 8


def flipped(got: Mapping[Hashable, Sequence[int]], expected: Mapping[Hashable, Sequence[int]]) -> set[Hashable]:
    """The keys of the responses that rounding changed. Fails where there are more than the measured rate of flips
    explains.

    A response is equal up to its first flip; the tokens after it follow from another beginning and are not looked at.
    """
    assert got.keys() == expected.keys()
    changed, draws = set(), 0
    for key, ids in expected.items():
        a_T, b_T = np.asarray(ids), np.asarray(got[key])
        shared = min(len(a_T), len(b_T))
        different = np.flatnonzero(a_T[:shared] != b_T[:shared])
        if len(different) or len(a_T) != len(b_T):
            assert len(different), f"{key} has the same tokens and another end"
            changed.add(key)
        draws += int(different[0]) + 1 if len(different) else shared
    assert len(changed) <= most_flips(draws), f"{len(changed)} flips in {draws} draws: {sorted(map(str, changed))}"
    return changed


def ids_of(completions: Iterable[Completion]) -> dict[Hashable, list[int]]:
    """The token ids by request and sample."""
    return {completion.key: completion.token_ids_T.tolist() for completion in completions}


def most_flips(draws: int) -> int:
    """The number of flips that so many draws exceed less than once in ten thousand times."""
    mean = draws * FLIPS_PER_MILLION * 1e-6
    term = left = math.exp(-mean)
    number = 0
    while 1 - left > 1e-4:
        number += 1
        term *= mean / number
        left += term
    return number

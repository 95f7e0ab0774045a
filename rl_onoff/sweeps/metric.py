"""The number that a sweeper such as Optuna optimises: `metric`, checked before the first job as far as possible."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig

from rl_onoff.config import Stage
from rl_onoff.errors import MetricError, UsageError, nearest

MADE_BY = {"onoff": (Stage.compare, Stage.attribute), "matrix": (Stage.matrix,), "attribute": (Stage.attribute,)}
OF_EVERY_RUN = {  # whatever its engines
    "onoff": ("onoff/kl_k3", "onoff/kl_k3_floor"),
    "matrix": ("matrix/kl_k3_max", "matrix/kl_k3_floor"),
}
GROUPS = ("generate", "reward", "score", *MADE_BY)


def optimises(hydra_config: Any) -> bool:
    """Whether the sweeper chooses jobs by the number that earlier ones returned."""
    return "BasicSweeper" not in str(hydra_config.sweeper.get("_target_", ""))


def check_metric(config: DictConfig) -> None:
    """MetricError when a sweeper optimises a number that no job can have, as far as that is known beforehand."""
    if not optimises(config.hydra):
        return
    metric = config.metric
    if metric is None:
        raise MetricError("this sweeper needs the name of the number it optimises: set metric=onoff/kl_k3, for example")
    group, _, rest = metric.partition("/")
    if group not in GROUPS or not rest:
        example = f"{nearest(group, GROUPS) or 'onoff'}/{rest}" if rest else "onoff/kl_k3"
        raise MetricError(
            f"metric={metric} is no number of a run, their names begin with {', '.join(GROUPS)}: set metric={example}"
        )
    if "/" not in rest and metric not in (known := OF_EVERY_RUN.get(group, (metric,))):
        raise MetricError(f"metric={metric} is no number of a run: set metric={nearest(metric, known) or known[0]}")
    if group in MADE_BY and not set(MADE_BY[group]) & set(config.stages):
        raise MetricError(
            f"metric={metric} is a number that this experiment does not find: set experiment={group}, or another metric"
        )


def missing_metric(metric: str, names: Collection[str]) -> UsageError:
    """The error of a job that has no such number; MetricError when no other job will have it."""
    if any(metric in known for known in OF_EVERY_RUN.values()):
        return UsageError(f"metric={metric} is not a finite number in this run, so the sweeper is told that it failed")
    fix = f"set metric={nearest(metric, names) or 'onoff/kl_k3'}, for example"
    return MetricError(f"metric={metric} is not among the numbers of a run (values in its metrics.json): {fix}")

"""What the stages of one run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_onoff.compare import Comparison
from rl_onoff.config import RunConfig
from rl_onoff.data.prompts import Row
from rl_onoff.pipeline.engines import Slot
from rl_onoff.pipeline.progress import Progress
from rl_onoff.rundir.table import RunDir
from rl_onoff.tracking import Tracker


@dataclass(slots=True)
class Run:
    """What the stages of one run share."""

    config: RunConfig
    rows: list[Row]  # of the data; none when nothing is sampled, or when all of it is
    folder: RunDir
    tracker: Tracker
    slot: Slot
    values: dict[str, float] = field(default_factory=dict)  # that no shard holds: tokens/s, the matrix, shares
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by the name of the target's scores
    sections: dict[str, Any] = field(default_factory=dict)  # of metrics.json, besides values and comparisons
    texts: list[str] = field(default_factory=list)  # for the terminal
    page: Path | None = None
    brief: bool = False  # say little on the terminal: of a sweep's job, whose numbers are in the table

    def progress(self, stage: str, total: int) -> Progress:
        return Progress(stage, total, self.tracker.log, self.config.tracking.log_every_s)

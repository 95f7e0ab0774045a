"""N policies sample, N policies score what all of them sampled: the table of how far each is from each.

A policy's samples are a run folder of their own, `<run_dir>/<policy>/`, so that everything that reads a run folder
reads it too. One engine is alive at a time, and each is loaded at most twice: once to sample, once to score everybody's
samples.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.compare import Comparison
from rl_onoff.config import RunConfig
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.compare import compare_run, verdict_of, write_page
from rl_onoff.pipeline.engines import Wish
from rl_onoff.report.matrix import Matrix
from rl_onoff.rundir.files import write_csv, write_whole
from rl_onoff.rundir.provenance import texts_of
from rl_onoff.rundir.summary import summarise
from rl_onoff.rundir.table import RunDir, Table

if TYPE_CHECKING:
    from rl_onoff.pipeline.context import Run

log = logging.getLogger(__name__)


def check_policies(config: RunConfig) -> None:
    """What is wrong with the policies, before anything is loaded."""
    if len(config.policies) < 2:
        raise UsageError(
            f"experiment=matrix needs two policies or more and has {len(config.policies)}: set policies=engines, "
            "policies=dtypes, or +backend@policies.NAME=huggingface once for each"
        )
    for name in config.policies:
        if not re.fullmatch(r"[\w.-]+", name) or name in ("completions", "scores", ".hydra", ".", ".."):
            raise UsageError(
                f"the policy {name!r} cannot be the name of a folder: use letters, digits, '-' and '.' in policies"
            )


def run_matrix(
    this: Run, sample: Callable[[Run], None], score: Callable[[Run, Table, EngineConfig, str], None]
) -> Generator[Wish, None, Matrix]:
    """Sample and score with every policy, the last to sample first to score since it is still loaded."""
    policies, path = this.config.policies, this.folder.path
    subs = {
        name: replace(this, config=replace(this.config, backend=engine), folder=RunDir(path / name), values={})
        for name, engine in policies.items()
    }
    for name, sub in subs.items():
        yield policies[name]
        log.info("matrix: %s samples", name)
        sample(sub)
    for name in reversed(policies):
        yield policies[name]
        for sampled, sub in subs.items():
            log.info("matrix: %s scores what %s sampled", name, sampled)
            score(sub, sub.folder.scores(name), policies[name], name)
    cells: dict[tuple[str, str], Comparison] = {}
    sentences = {}
    for a, sub in subs.items():
        comparisons = compare_run(sub.folder, own=a)
        missing = [b for b in policies if b not in comparisons]
        if missing:
            raise UsageError(
                f"{sub.folder.path} has no response with tokens to compare with {missing[0]}: change data.path"
            )
        text = texts_of([sub.folder.completions.record()], None, policies.values())
        write_page(sub.folder, comparisons, text, own=a)
        values = summarise(sub.folder).values | sub.values
        found = {b: comparison.to_dict() for b, comparison in comparisons.items()}
        sub.folder.write_json("metrics.json", {"values": values, "comparisons": found})
        cells |= {(a, b): comparisons[b] for b in policies}
        sentences[a] = verdict_of(sub.folder, {b: comparisons[b] for b in policies}, own=a)
    matrix = Matrix(list(policies), cells)
    write_csv(path / "matrix.csv", matrix.rows())
    write_whole(path / "matrix.html", matrix.page(sentences))
    return matrix

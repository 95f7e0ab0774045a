"""What is compared with what, seen as one run folder: this one, others, whose rows stay where they are, and files made
elsewhere, whose rows are taken into this run folder first, so that everything after reads the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.config import CompareConfig
from rl_onoff.data.rollouts import RolloutFile, open_rollouts
from rl_onoff.data.sources import ENDINGS, rollout_files
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.stages import take_in
from rl_onoff.rundir.provenance import changes, same_engine
from rl_onoff.rundir.table import RunDir, Table, row_of_scores
from rl_onoff.types import LogprobKind, Rollout, TokenScores

log = logging.getLogger(__name__)


class Sources(RunDir):
    """A run folder whose completions and scores may lie in other folders; what is written goes to its own."""

    def __init__(self, path: Path, completions: Table, scores: Mapping[str, Table], own: str | None):
        super().__init__(path)
        self._completions, self._scores, self.own = completions, scores, own

    @property
    def completions(self) -> Table:
        return self._completions

    def scores(self, name: str) -> Table:
        return self._scores.get(name) or super().scores(name)

    def score_names(self) -> list[str]:
        return list(self._scores)


def own_scores(run: RunDir) -> str | None:
    """The scores made by the engine and weights that sampled, if the run has them."""
    if isinstance(run, Sources):
        return run.own
    names = run.score_names()
    tables = (run.completions, *map(run.scores, names))
    sampled_by, *scored_by = (table.record().get("config", {}).get("backend") for table in tables)
    return next((name for name, engine in zip(names, scored_by, strict=True) if same_engine(sampled_by, engine)), None)


def open_sources(config: CompareConfig, here: RunDir) -> RunDir:
    """The run folder that `config` describes: `here` itself where it names nothing."""
    if isinstance(here, Sources) or (config.behaviour is None and config.target is None):
        return here
    behaviour = here if config.behaviour is None else _folder(config.behaviour, "compare.behaviour")
    scores, own = {}, None
    if behaviour is not None:
        if not behaviour.completions.exists():
            raise UsageError(
                f"{behaviour.path} has no responses: set compare.behaviour to a run folder that sampled, or to a file"
            )
        own = own_scores(behaviour)
        names = [name for name in behaviour.score_names() if config.target is None or name == own]
        scores = {name: behaviour.scores(name) for name in names}
    else:
        behaviour, file = here, _file(config, "behaviour")
        column = file.columns.get("target") if config.target is None else None
        if config.target is None and column is None:
            other = "+compare.columns.target to another column" if file.table.columns else "score it: experiment=score"
            raise UsageError(
                f"{file.name} has one column with logprobs, {file.columns['behaviour']}: set compare.target to what it"
                f" is compared with, or {other}"
            )
        _take_in_completions(here, file, config)
        if column is not None:
            scores[column] = _take_in_scores(here, file, column, config, here.completions)
    if config.target is not None:
        scores |= _target(config, here, behaviour.completions, taken=scores)
    sources = Sources(here.path, behaviour.completions, scores, own)
    for name in scores:
        _check_common(sources, name)
    return sources


def _target(config: CompareConfig, here: RunDir, completions: Table, taken: Mapping[str, Table]) -> dict[str, Table]:
    """The tables of scores that compare.target names, under names that are free."""
    whole = config.target or ""
    path, _, chosen = whole.rpartition(":")
    if Path(whole).exists() or not path or not Path(path).is_dir():
        path, chosen = whole, ""
    folder = _folder(path, "compare.target")
    if folder is None:
        name = Path(path).stem
        return {name: _take_in_scores(here, _file(config, "target"), name, config, completions)}
    there = folder.score_names()
    names = [name for name in there if chosen in ("", name)]
    if not names:
        which = f" {chosen!r} but {', '.join(there) or 'none'}" if chosen else ""
        raise UsageError(
            f"{folder.path} has no scores{which}: set compare.target={path}:NAME, or make some with experiment=score"
            f" run_dir={folder.path}"
        )
    label = folder.path.resolve().name
    return {name if name not in taken else f"{label}-{name}": folder.scores(name) for name in names}


def _folder(path: str, key: str) -> RunDir | None:
    """The run folder at a path; None for a file that a trainer wrote, and for a folder of such files."""
    folder = RunDir(Path(path).expanduser())
    if folder.path.is_dir():
        empty = not (folder.completions.exists() or folder.score_names())
        return None if empty and rollout_files(folder.path) else folder
    if folder.path.suffix in ENDINGS:
        return None
    what = f"is neither a run folder nor one of {', '.join(ENDINGS)}" if folder.path.exists() else "does not exist"
    raise UsageError(
        f"{key}={path} {what}: set {key} to a run folder, FOLDER:NAME for one of its scores, a {' or '.join(ENDINGS)}"
        " file, or a folder of them"
    )


def _file(config: CompareConfig, side: str) -> RolloutFile:
    both = config.behaviour is not None and config.target is not None
    format = config.format
    if side == "target" and both and _folder(config.behaviour or "", "compare.behaviour") is None:
        format = None  # it is the behaviour's
    path, key = getattr(config, side), f"compare.{side}"
    return open_rollouts(path, key=key, columns=config.columns, one_of_two=both, format=format)


def _take_in_completions(here: RunDir, file: RolloutFile, config: CompareConfig) -> None:
    _claim(here.completions, file, config.behaviour, config.behaviour_kind)
    kind, pieces = config.behaviour_kind, {}
    assumed = kind or file.assumed_kind("behaviour", LogprobKind.raw, "set compare.behaviour_kind")

    def rollouts() -> Iterator[tuple[Rollout, str]]:
        for row in file.rows():
            pieces.update(zip(map(str, row.rollout.token_ids_T.tolist()), row.pieces, strict=False))
            yield replace(row.rollout, kind=kind or row.rollout.kind or assumed), row.prompt

    take_in(here, rollouts())
    if pieces:
        here.completions.describe(pieces=pieces)


def _take_in_scores(here: RunDir, file: RolloutFile, name: str, config: CompareConfig, completions: Table) -> Table:
    """A file's logprobs as a table of scores; a file of one policy alone has them in the behaviour's column."""
    table, kind = here.scores(name), config.target_kind
    side = "target" if "target" in file.columns else "behaviour"
    _claim(table, file, config.target or config.behaviour, kind)
    behaviours = LogprobKind(next(completions.rows(["logprob_kind"]), {}).get("logprob_kind") or "raw")
    assumed = kind or file.assumed_kind("target", behaviours, "set compare.target_kind")
    done = table.keys()
    with table.writer() as writer:
        for row in file.rows():
            rollout = row.rollout
            logprobs_T = row.target_T if side == "target" else rollout.logprobs_T
            if logprobs_T is None:
                raise UsageError(
                    f"response {rollout.sample} to {rollout.request_id!r} in {file.name} has no logprobs: fill"
                    f" column {file.columns[side]}, or remove the row"
                )
            if rollout.key not in done:
                said = kind or rollout.kind or assumed
                if config.target is not None and rollout.mask_T is not None:
                    # the behaviour's mask counts: where it has the token as sampled, 0 would be taken for a logprob
                    logprobs_T = np.where(rollout.mask_T, logprobs_T, np.float32(np.nan))
                scores = TokenScores(token_ids_T=rollout.token_ids_T, logprobs_T=logprobs_T, kind=said)
                writer.append(row_of_scores(scores.of(rollout)))
    return table


def _claim(table: Table, file: RolloutFile, path: str | None, kind: LogprobKind | None) -> None:
    """Rows taken from a file depend on its content, and on how it was read."""
    where, columns, before = Path(path or "").absolute(), dict(file.columns), table.record().get("config", {})
    known = before.get("columns", columns)  # a version that knew no steps wrote the same rows
    columns = {role: name for role, name in columns.items() if role in known or role not in ("step", "weight_version")}
    facts: dict[str, Any] = {"content": file.source.content()}
    if "changed" in before:  # made by a version that kept the file's size and time, and knew fewer columns
        facts = {"bytes": where.stat().st_size, "changed": int(where.stat().st_mtime)}
        columns = {role: name for role, name in columns.items() if role in before["columns"]}
    if file.format.name != "columns":
        facts["format"] = file.format.name
    table.claim({"file": str(where), **facts, "columns": columns, "kind": kind and kind.value}, changes)


def _check_common(run: RunDir, name: str) -> None:
    """Refuse two sides that have no response in common, and say how many only one of them has."""
    ours, theirs = run.completions.keys(), run.scores(name).keys()
    common = ours & theirs
    if not common:
        here, there = (" ".join(f"{i}/{s}" for i, s in sorted(keys)[:3]) or "none" for keys in (ours, theirs))
        raise UsageError(
            f"the behaviour and {name} have no response in common (ids {here} here and {there} there): "
            "name the column with the ids with +compare.columns.id=NAME, or compare runs of the same data"
        )
    if ours != theirs:
        others = len(theirs - ours)
        log.warning("%s has %d of the behaviour's %d responses, and %d others", name, len(common), len(ours), others)

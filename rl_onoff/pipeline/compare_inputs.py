"""What is compared with what: this run folder, other run folders, and files made elsewhere, seen as one run folder.

A folder's rows stay where they are; a file's rows are taken into this run folder first, so that everything after reads
the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl_onoff.config import CompareConfig
from rl_onoff.data.rollouts import RolloutFile, open_rollouts
from rl_onoff.data.sources import ENDINGS, rollout_files
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.stages import take_in
from rl_onoff.rundir.provenance import changes, same_engine
from rl_onoff.rundir.table import RunDir, Table, row_of_scores
from rl_onoff.types import LogprobKind, Rollout, TokenScores

log = logging.getLogger(__name__)


class Joined(RunDir):
    """A run folder whose completions and scores may lie in other folders; what is written goes to its own."""

    def __init__(self, path: Path, completions: Table, scores: Mapping[str, Table], own: str | None):
        super().__init__(path)
        self._completions, self._scores, self.own = completions, dict(scores), own

    @property
    def completions(self) -> Table:
        return self._completions

    def scores(self, name: str) -> Table:
        return self._scores.get(name) or super().scores(name)

    def score_names(self) -> list[str]:
        return list(self._scores)


def own_scores(run: RunDir) -> str | None:
    """The scores made by the engine and weights that sampled, if the run has them."""
    if isinstance(run, Joined):
        return run.own
    engines = {name: _engine(run.scores(name)) for name in run.score_names()}
    sampled_by = _engine(run.completions)
    return next((name for name, engine in engines.items() if same_engine(sampled_by, engine)), None)


def _engine(table: Table) -> Mapping[str, Any] | None:
    return table.record().get("config", {}).get("backend")


def open_sources(config: CompareConfig, here: RunDir) -> RunDir:
    """The run folder that `config` describes: `here` itself where it names nothing."""
    if isinstance(here, Joined) or (config.behaviour is None and config.target is None):
        return here
    scores: dict[str, Table] = {}
    if config.behaviour is not None and _is_file(config.behaviour, "compare.behaviour"):
        alone = config.target is None
        file = open_rollouts(
            config.behaviour,
            key="compare.behaviour",
            columns=config.columns,
            one_of_two=not alone,
            format=config.format,
        )
        target = file.columns.get("target")
        if alone and target is None:
            other = (
                "+compare.columns.target to another column" if file.table.columns else "experiment=score to score it"
            )
            raise UsageError(
                f"{file.name} has one column with logprobs, {file.columns['behaviour']}: set compare.target to what it"
                f" is compared with, or {other}"
            )
        _take_in_completions(here, file, config)
        behaviour, own = here, None
        if alone and target is not None:
            scores[target] = _take_in_scores(here, file, target, config, here.completions)
    else:
        behaviour = here if config.behaviour is None else _folder(config.behaviour, "compare.behaviour")
        if not behaviour.completions.exists():
            raise UsageError(
                f"{behaviour.path} has no responses: set compare.behaviour to a run folder that sampled, or to a file"
            )
        own = own_scores(behaviour)
        names = [name for name in behaviour.score_names() if config.target is None or name == own]
        scores = {name: behaviour.scores(name) for name in names}
    if config.target is not None:
        scores |= _target(config, here, behaviour.completions, taken=scores)
    joined = Joined(here.path, behaviour.completions, scores, own)
    for name in scores:
        _check_common(joined, name)
    return joined


def _target(config: CompareConfig, here: RunDir, completions: Table, taken: Mapping[str, Table]) -> dict[str, Table]:
    """The tables of scores that compare.target names, under names that are free."""
    assert config.target is not None
    if _is_file(config.target, "compare.target"):
        one_of_two = config.behaviour is not None
        format = None if one_of_two and _is_file(config.behaviour or "", "compare.behaviour") else config.format
        options = {"key": "compare.target", "columns": config.columns, "one_of_two": one_of_two, "format": format}
        file = open_rollouts(config.target, **options)
        name = Path(config.target).stem
        return {name: _take_in_scores(here, file, name, config, completions)}
    path, _, chosen = (config.target, "", "") if Path(config.target).is_dir() else config.target.rpartition(":")
    folder = _folder(path, "compare.target")
    names = folder.score_names()
    if not names or (chosen and chosen not in names):
        which = f" {chosen!r} but {', '.join(names) or 'none'}" if chosen else ""
        raise UsageError(
            f"{folder.path} has no scores{which}: set compare.target={path}:NAME, or make some with experiment=score"
            f" run_dir={folder.path}"
        )
    label = folder.path.resolve().name
    names = [chosen] if chosen else names
    return {name if name not in taken else f"{label}-{name}": folder.scores(name) for name in names}


def _is_file(path: str, key: str) -> bool:
    folder, here = path.rpartition(":")[0], Path(path).expanduser()
    if here.is_dir():
        run = RunDir(here)
        return not (run.completions.exists() or run.score_names()) and bool(rollout_files(here))
    if not here.is_file() and folder and Path(folder).is_dir():
        return False
    if here.suffix in ENDINGS:
        return True
    what = f"is neither a run folder nor one of {', '.join(ENDINGS)}" if here.exists() else "does not exist"
    raise UsageError(
        f"{key}={path} {what}: set {key} to a run folder, FOLDER:NAME for one of its scores, a {' or '.join(ENDINGS)}"
        " file, or a folder of them"
    )


def _folder(path: str, key: str) -> RunDir:
    folder = RunDir(path)
    if not (folder.completions.exists() or folder.score_names()):
        raise UsageError(f"{key}={path} holds neither responses nor scores: set it to a run folder")
    return folder


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
    table, side, kind = here.scores(name), "target" if "target" in file.columns else "behaviour", config.target_kind
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

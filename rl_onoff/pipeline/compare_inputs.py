"""What is compared with what: this run folder, other run folders, and files made elsewhere, seen as one run folder.

A folder's rows stay where they are; a file's rows are taken into this run folder first, so that everything after reads the disk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_onoff.config import CompareConfig
from rl_onoff.data.rollouts import ExportFile, open_export
from rl_onoff.errors import UsageError
from rl_onoff.rundir.table import RunDir, Table
from rl_onoff.types import LogprobKind

log = logging.getLogger(__name__)

FILES = (".jsonl", ".parquet")


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
    sampled_by = run.completions.record().get("config", {}).get("backend")
    for name in run.score_names():
        if sampled_by is not None and run.scores(name).record().get("config", {}).get("backend") == sampled_by:
            return name
    return None


def open_sources(config: CompareConfig, here: RunDir) -> RunDir:
    """The run folder that `config` describes: `here` itself where it names nothing."""
    if isinstance(here, Joined) or (config.behaviour is None and config.target is None):
        return here
    scores: dict[str, Table] = {}
    if config.behaviour is not None and _is_file(config.behaviour, "compare.behaviour"):
        file = open_export(
            config.behaviour, key="compare.behaviour", columns=config.columns, one_of_two=config.target is not None
        )
        behaviour, own = here, None
        if config.target is None and "target" not in file.columns:
            raise UsageError(
                f"{file.table.name} has one column with logprobs, {file.columns['behaviour']}: set compare.target to what it is compared"
                " with, or +compare.columns.target to another column"
            )
        _take_in_completions(here, file, config)
        if config.target is None:
            name = file.columns["target"]
            scores[name] = _take_in_scores(here, file, name, config, here.completions)
    else:
        behaviour = here if config.behaviour is None else _folder(config.behaviour, "compare.behaviour")
        if not behaviour.completions.exists():
            raise UsageError(
                f"{behaviour.path} has no responses: set compare.behaviour to a run folder that sampled some, or to a file"
            )
        own = own_scores(behaviour)
        scores = {
            name: behaviour.scores(name) for name in behaviour.score_names() if config.target is None or name == own
        }
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
        file = open_export(
            config.target, key="compare.target", columns=config.columns, one_of_two=config.behaviour is not None
        )
        name = Path(config.target).stem
        return {name: _take_in_scores(here, file, name, config, completions)}
    path, _, chosen = (config.target, "", "") if Path(config.target).is_dir() else config.target.rpartition(":")
    folder = _folder(path, "compare.target")
    names = folder.score_names()
    if chosen and chosen not in names:
        raise UsageError(
            f"{folder.path} has no scores {chosen!r} but {', '.join(names) or 'none'}: set compare.target={path}:NAME"
        )
    if not names:
        raise UsageError(
            f"{folder.path} has no scores: make some with experiment=score run_dir={folder.path}, or set compare.target"
        )
    label = folder.path.resolve().name
    return {
        name if name not in taken else f"{label}-{name}": folder.scores(name)
        for name in ([chosen] if chosen else names)
    }


def _is_file(path: str, key: str) -> bool:
    folder = path.rpartition(":")[0]
    if Path(path).is_dir() or (not Path(path).is_file() and folder and Path(folder).is_dir()):
        return False
    if Path(path).suffix in FILES:
        return True
    what = f"is neither a run folder nor one of {', '.join(FILES)}" if Path(path).exists() else "does not exist"
    raise UsageError(
        f"{key}={path} {what}: set {key} to a run folder, FOLDER:NAME for one of its scores, or a {' or '.join(FILES)} file"
    )


def _folder(path: str, key: str) -> RunDir:
    folder = RunDir(path)
    if not (folder.completions.exists() or folder.score_names()):
        raise UsageError(f"{key}={path} holds neither responses nor scores: set it to a run folder")
    return folder


# -- files made elsewhere ----------------------------------------------------------------------------------------------


def _take_in_completions(here: RunDir, file: ExportFile, config: CompareConfig) -> None:
    if "behaviour" not in file.columns:
        raise UsageError(
            f"{file.table.name} has no column with the behaviour's logprobs but {', '.join(file.table.columns)}: "
            "set +compare.columns.behaviour=NAME"
        )
    table = here.completions
    table.claim(_claim(file, config.behaviour, config.behaviour_kind))
    kind = _default_kind(config.behaviour_kind, file, "behaviour", LogprobKind.raw)
    done, pieces = table.keys(), {}
    with table.writer() as writer:
        for row in file.rows():
            pieces.update(zip(map(str, row.token_ids_T.tolist()), row.pieces or (), strict=False))
            if (row.request_id, row.sample) in done:
                continue
            writer.append(
                {
                    "request_id": row.request_id,
                    "sample": row.sample,
                    "prompt": row.prompt,
                    "prompt_ids": row.prompt_ids,
                    "token_ids": row.token_ids_T,
                    "text": row.text,
                    "logprobs": row.behaviour_T,
                    "logprob_kind": (config.behaviour_kind or row.kind or kind).value,
                    "finish_reason": None,
                    "reward": row.reward,
                    "meta": json.dumps(dict(row.meta), ensure_ascii=False, default=str),
                }
            )
    if pieces:
        table.describe(pieces=pieces)


def _take_in_scores(here: RunDir, file: ExportFile, name: str, config: CompareConfig, completions: Table) -> Table:
    """A file's logprobs as a table of scores; they stand in the behaviour's column where the file is one policy's alone."""
    side = "target" if "target" in file.columns else "behaviour"
    table = here.scores(name)
    table.claim(_claim(file, config.target or config.behaviour, config.target_kind))
    behaviours = next(completions.rows(["logprob_kind"]), {}).get("logprob_kind")
    kind = _default_kind(config.target_kind, file, "target", LogprobKind(behaviours or "raw"))
    done = table.keys()
    with table.writer() as writer:
        for row in file.rows():
            if (row.request_id, row.sample) not in done:
                writer.append(
                    {
                        "request_id": row.request_id,
                        "sample": row.sample,
                        "token_ids": row.token_ids_T,
                        "logprobs": row.target_T if side == "target" else row.behaviour_T,
                        "logprob_kind": (config.target_kind or row.kind or kind).value,
                    }
                )
    return table


def _claim(file: ExportFile, path: str | None, kind: LogprobKind | None) -> dict[str, Any]:
    """What rows taken from a file depend on: the file as it was, and how it was read."""
    where = Path(path or "").absolute()
    return {
        "file": str(where),
        "bytes": where.stat().st_size,
        "changed": int(where.stat().st_mtime),
        "columns": dict(file.columns),
        "kind": None if kind is None else kind.value,
    }


def _default_kind(said: LogprobKind | None, file: ExportFile, side: str, otherwise: LogprobKind) -> LogprobKind:
    """The kind of logprobs whose rows do not say it: what the config says, else a guess that is told."""
    if said is None and "logprob_kind" not in file.table.columns:
        log.warning("%s does not say of which kind the %s's logprobs are: taken for %s ones; else set compare.%s_kind",
                    file.table.name, side, otherwise.value, side)  # fmt: skip
    return said or otherwise


def _check_common(run: RunDir, name: str) -> None:
    """Refuse two sides that have no response in common, and say how many only one of them has."""
    ours, theirs = run.completions.keys(), run.scores(name).keys()
    if not ours & theirs:
        shown = [" ".join(f"{i}/{s}" for i, s in sorted(keys)[:3]) or "none" for keys in (ours, theirs)]
        raise UsageError(
            f"the behaviour and {name} have no response in common (ids {shown[0]} here and {shown[1]} there): "
            "name the column with the ids with +compare.columns.id=NAME, or compare runs of the same data"
        )
    if ours != theirs:
        log.warning(
            "%s has %d of the behaviour's %d responses, and %d others",
            name,
            len(ours & theirs),
            len(ours),
            len(theirs - ours),
        )

"""Responses made elsewhere: the files that trainers and other tools wrote, opened to be compared or to be scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from typing import Any

from rl_onoff.compare.row_checks import other_text, row_findings
from rl_onoff.data.columns import COLUMNS, SHOWN, WHOLE, Columns, Format, find_columns
from rl_onoff.data.formats import FORMATS
from rl_onoff.data.readers import Table
from rl_onoff.data.requests import Texts
from rl_onoff.data.rollout_file import Recorded, RolloutFile
from rl_onoff.data.sources import Source, open_source
from rl_onoff.data.values import LOGPROBS
from rl_onoff.errors import NotComparableError, UsageError, nearest, plural
from rl_onoff.types import LogprobKind, Rollout

__all__ = ["Recorded", "RolloutFile", "load_responses", "open_rollouts"]

log = logging.getLogger(__name__)

KEPT_BYTES = 64 << 20  # of a file whose rollouts are held; those of a larger one are read again when they are wanted
LOOKED_AT = 100  # first rows that tell which roles a format's file really has


@dataclass(frozen=True, slots=True)
class Responses:
    """The rollouts of a file that are to be scored, as often as they are asked for."""

    file: RolloutFile
    kept: list[Rollout] | None  # None: too many to hold
    kind: LogprobKind | None  # of logprobs whose row does not say it

    def __iter__(self) -> Iterator[Rollout]:
        found = self.kept if self.kept is not None else (each.rollout for each in self.file.rows())
        for rollout in found:
            if len(rollout.token_ids_T):
                yield rollout if rollout.logprobs_T is None else replace(rollout, kind=rollout.kind or self.kind)


def open_rollouts(
    path: str, *, key: str, columns: Mapping[str, str], one_of_two: bool = False, format: str | None = None
) -> RolloutFile:
    """A file, or a folder of step files, with logprobs.

    `columns` (compare.columns) says what a table's columns are called where that is not known. It counts for both files
    of a comparison, so with `one_of_two` a column that this file lacks is left out. `format` names the format that is
    otherwise recognised.
    """
    file = _open(path, key, format, None)
    if isinstance(file.format, Columns):
        said = {role: name for role, name in columns.items() if name in file.table.columns or not one_of_two}
        for role, name in said.items():
            file.table.column(name, f"+compare.columns.{role}")
        file.format.columns = {**file.columns, **said}
        file = replace(file, columns=file.format.columns)
    elif columns and not one_of_two:
        raise UsageError(
            f"compare.columns names the columns of a table, and {file.name} is read as {file.format.name}: leave"
            " compare.columns out, or set compare.format=columns"
        )
    elif "token_ids" not in file.columns:
        raise UsageError(
            f"{file.name} is of {file.format.made_by}, which is text without token ids and logprobs, and nothing to"
            f" compare: set score.responses={path} to score it, or write token ids out as docs/rollouts.md says"
        )
    sides = {"compare.behaviour": ("behaviour",)}.get(key, LOGPROBS)
    for what, roles in (("lists of token ids", ("token_ids",)), (f"logprobs of the {' or '.join(sides)}", sides)):
        if not file.columns.keys() & set(roles):
            fix = " or ".join(f"+compare.columns.{role}=NAME" for role in roles)
            fix = f"set {fix}" if isinstance(file.format, Columns) else f"set {key} to a file that has them"
            there = ", ".join(file.table.columns or file.columns.values())
            raise UsageError(f"{file.name} has no column with {what} but {there}: {fix}")
    return file


def load_responses(
    path: str,
    tokenizer: Any = None,
    *,
    chat_template: bool = False,
    system: str | None = None,
    tools: bool = True,
    format: str | None = None,
) -> Responses:
    """The prompts and responses in a file or a folder of step files, to be scored, all of them checked.

    Best are token ids: nothing is tokenised. Text is tokenised once: a prompt that is a list of messages goes through
    the chat template, and so does a prompt that is text with `chat_template`, unless it holds special tokens already;
    with `tools` the template gets the row's tools. A response that is text is taken as it is. Rows with an empty
    response are left out, with a warning. Where many rows have ids that are not those of the text beside them, the file
    is refused.
    """
    file = _open(path, "score.responses", format, Texts(tokenizer, chat_template, system, tools))
    columns = file.columns
    if "token_ids" not in columns and not isinstance(file.format, Columns):
        text = "%s is text, which is tokenised once: its ids need not be those that were sampled%s"
        log.warning(text, file.name, file.format.lost)
    small = sum(each.stat().st_size for each in file.source.files) <= KEPT_BYTES
    kept, total, found, faults = [], 0, 0, {}
    for total, recorded in enumerate(file.rows(), 1):  # noqa: B007 - counted
        rollout = recorded.rollout
        found += bool(len(rollout.token_ids_T))
        if tokenizer is not None and "token_ids" in columns and (wrong := other_text(rollout, tokenizer.decode)):
            faults[rollout.key] = ("other_text", wrong)
        if small and len(rollout.token_ids_T):
            kept.append(rollout)
    if not found:
        column = columns.get("token_ids") or columns["text"]
        raise UsageError(
            f"{file.name} has empty responses only: fill column {column}, or set score.responses to another file"
        )
    if empty := total - found:
        log.warning("%s: %d of %s left out, whose response is empty", file.name, empty, plural(total, "row"))
    for finding in row_findings(faults, found):
        if finding.fatal:
            raise NotComparableError(f"Not comparable: {finding.sentence()}")
        log.warning("%s: %s", file.name, finding.sentence())
    kind = None
    if "behaviour" in columns:
        kind = file.assumed_kind("behaviour", LogprobKind.raw, "add a column logprob_kind")
    return Responses(file, kept if small else None, kind)


def _open(path: str, key: str, format: str | None, texts: Texts | None) -> RolloutFile:
    """A file whose format is recognised by its first record, or said; a table's columns are found in all its rows."""
    source = open_source(path, key)
    known = {each.name: each for each in (*FORMATS, Columns())}
    if format is not None and format not in known:
        near = nearest(format, known) or Columns.name
        raise UsageError(
            f"compare.format is {format!r}, which is none of {', '.join(known)}: set compare.format={near}"
        )
    chosen = _recognised(source) if format is None else known[format]
    if isinstance(chosen, Columns):
        return _open_table(source, texts, type(chosen))
    left = {file for file in source.files if any(fnmatch(file.name, pattern) for pattern in chosen.left_out)}
    if 0 < len(left) < len(source.files):
        source = replace(source, files=tuple(file for file in source.files if file not in left))
    file = RolloutFile(source=source, format=chosen, columns=chosen.roles, table=_no_table(source), texts=texts)
    first = list(islice((row for _, _, _, row in file.raw_rows()), LOOKED_AT))
    lacking = {role for role in LOGPROBS if role in chosen.roles and all(row.get(role) is None for row in first)}
    for role in set(chosen.skipped) - lacking:
        if all(_zero(row[role]) for row in first if row.get(role) is not None):
            lacking.add(role)
            text = "%s: %s are all 0 in its first %s: the trainer did not compute them, and they are left out"
            log.warning(text, file.name, chosen.roles[role], plural(len(first), "response"))
    return replace(file, columns={role: name for role, name in chosen.roles.items() if role not in lacking})


def _recognised(source: Source) -> Format:
    """The format of the first file that has a known one; files of metadata may stand before it."""
    for file in source.files[:LOOKED_AT]:
        _, record = next(source.records(file), ("", None))
        if record is not None and (found := next((f for f in FORMATS if f.recognises(record, str(file))), None)):
            return found
    return Columns()


def _open_table(source: Source, texts: Texts | None, format: type[Columns]) -> RolloutFile:
    first: dict[str, Any] = {}
    for file in source.files:
        for _, record in source.records(file):
            for name, value in record.items():
                if first.get(name) is None:
                    first[name] = value
    table, columns = replace(_no_table(source), columns=tuple(first)), find_columns(first)
    if not first:
        raise UsageError(f"{source.name} has no rows: set {source.key} to a file that has some")
    if texts is not None:
        columns = {role: name for role, name in columns.items() if role != "target" and name not in SHOWN}
        said = {"mask", "response_length"} & {*columns, *first}
        if columns.get("token_ids") in WHOLE and "text" in columns and not said:
            del columns["token_ids"]  # nothing says where in them the response is
        for in_ids, in_text in (("prompt_ids", "prompt"), ("token_ids", "text")):
            if not {in_ids, in_text} & columns.keys():
                names = dict.fromkeys(name for name in (*COLUMNS[in_ids], *COLUMNS[in_text]) if name not in SHOWN)
                raise UsageError(
                    f"{source.name} has none of the columns {', '.join(names)} but {', '.join(first)}: rename one, or"
                    " set score.responses to another file"
                )
    made = format(columns, scoring=texts is not None, has_kind="logprob_kind" in first)
    return RolloutFile(source=source, format=made, columns=columns, table=table, texts=texts)


def _zero(value: Any) -> bool:
    """Whether logprobs are all 0, which they never are of a whole sequence."""
    return isinstance(value, list) and not any(value)


def _no_table(source: Source) -> Table:
    return Table(name=source.name, key=source.key, unit="row", columns=(), records=(), numbers=())

"""The rows of a rollout file -> Rollouts, one at a time, checked.

Trainers name the same things differently, pad them to a rectangle, and some put prompt and response into one list. A
format undoes the layout; what its rows hold is checked here, and what cannot be told apart is refused, never guessed.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, NoReturn

import numpy as np

from rl_onoff.data.columns import COLUMNS, Columns, Format, Row
from rl_onoff.data.prompts import GROUP_COLUMNS, answer_column_of, jsonable, meta_of, parse_prompt, refuse_images
from rl_onoff.data.readers import Table
from rl_onoff.data.requests import Texts
from rl_onoff.data.sources import Source
from rl_onoff.data.values import LOGPROBS, PER_TOKEN, Wrong, ids, number, numbers, whole
from rl_onoff.errors import UsageError, plural
from rl_onoff.types import LogprobKind, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """One row of a file: a response with what its sampler said of it, and what the row has beside it."""

    rollout: Rollout  # its kind is None where the row does not say it
    target_T: np.ndarray | None  # float32: the target's logprobs
    prompt: str  # empty where it is not text
    pieces: list[str]  # text of every token, or empty


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFile:
    """A file or a folder of step files, whose responses are to be scored, with `texts`, or else to be compared. Tokens
    that a mask leaves out stay as context (`Rollout.mask_T`), all but padding at the end. To be scored, every row has a
    prompt.
    """

    source: Source
    format: Format
    columns: Mapping[str, str]  # role -> column, of the roles that the file has
    table: Table  # the names of a table's columns, without its rows
    texts: Texts | None = None
    _said: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.source.name

    def rows(self) -> Iterator[Recorded]:
        """Every response under its (request id, sample). Rows without an id have their number, behind their step in a
        folder; to be scored, that of the first row with the same prompt.
        """
        counted: dict[str, int] = {}
        seen: set[int] = set()
        id_of_prompt: dict[bytes, str] = {}
        prompt_of_id: dict[str, bytes] = {}
        steps, tokens, masked = set[int](), 0, 0
        folder, is_table = len(self.source.files) > 1, isinstance(self.format, Columns)
        for where, step, within, row in self.raw_rows():
            try:
                found = self._recorded(row, where, step)
                sample = None if row.get("sample") is None else whole(row["sample"], "sample")
                request_id = None if row.get("id") is None else _name(row["id"])
            except Wrong as wrong:
                self._refuse(where, str(wrong), wrong.role)
            rollout, shared = found.rollout, request_id is None and self.texts is not None
            prefix = within.rpartition("/")[0]  # in a folder, numbers and a table's ids may begin anew in every file
            if request_id is None or (is_table and folder):
                request_id = f"{prefix}/{request_id}" if request_id is not None else within
            if shared:
                request_id = id_of_prompt.setdefault(_digest(prefix, rollout.prompt_ids), request_id)
            if self.texts is not None and is_table:
                digest = _digest("", rollout.prompt_ids)
                if prompt_of_id.setdefault(request_id, digest) != digest:
                    self._refuse(where, f"the id {request_id!r} of a row with another prompt", "id")
            sample = counted.get(request_id, 0) if sample is None else sample
            counted[request_id] = sample + 1
            key = hash((request_id, sample))
            if key in seen:  # rows are joined by the two
                self._refuse(where, f"the id {request_id!r} and sample {sample} of an earlier row", "id")
            seen.add(key)
            steps |= {rollout.meta["step"]} if "step" in rollout.meta else set()
            tokens += len(rollout.token_ids_T)
            masked += 0 if rollout.mask_T is None else int((~rollout.mask_T).sum())
            yield replace(found, rollout=replace(rollout, request_id=request_id, sample=sample))
        self._say(len(seen), steps, tokens, masked)

    def _say(self, rows: int, steps: set[int], tokens: int, masked: int) -> None:
        """The one line that tells what was recognised and found; said once for a file."""
        if not rows:
            raise UsageError(f"{self.name} has no rows: set {self.source.key} to a file that has some")
        if not self._said:
            found = [plural(len(self.source.files), "file")] if len(self.source.files) > 1 else []
            found.append(plural(rows, "response"))
            found += [f"steps {min(steps)} to {max(steps)}"] if len(steps) > 1 else [f"step {x}" for x in steps]
            found += [plural(tokens, "token"), *([f"{masked:,} of them masked"] if masked else [])]
            log.info("%s: read as %s (%s): %s", self.name, self.format.name, self.format.made_by, ", ".join(found))
        self._said.append("read")

    def raw_rows(self) -> Iterator[tuple[str, int | None, str, Row]]:
        """(where it stands, the step that its file tells, its number in its file, the row) of every row."""
        folder, counts = len(self.source.files) > 1, Counter[int]()
        for at, file in enumerate(self.source.files):
            told = self.source.step(file) if folder or not isinstance(self.format, Columns) else None
            for place, (where, record) in enumerate(self.source.records(file)):
                if folder and not place and not self._said and not self.format.recognises(record, str(file)):
                    raise UsageError(
                        f"{self.source.label(file)} is not read as {self.format.name} like the files before it: set"
                        f" {self.source.key} to a folder or a file of one kind"
                    )
                rows = self.format.rows(record, told)
                while (row := self._next(rows, where)) is not None:
                    step = told if row.get("step") is None else _step(row["step"])
                    begins = (at if step is None else step) if folder else 0  # files of one step go on numbering
                    yield where, step, f"{begins}/{counts[begins]}" if folder else str(counts[begins]), row
                    counts[begins] += 1

    def _next(self, rows: Iterator[Row], where: str) -> Row | None:
        try:
            return next(rows, None)
        except Wrong as wrong:
            self._refuse(where, str(wrong), wrong.role)

    def _recorded(self, row: Row, where: str, step: int | None) -> Recorded:
        """What a row holds, under no name yet."""
        arrays, before = self._response_part(row, where)
        sampled_T = arrays.pop("mask") > 0
        kept_T = np.cumsum(sampled_T[::-1])[::-1] > 0  # up to the last token that was sampled
        ids_T = arrays["token_ids"][kept_T]
        if (ids_T < 0).any():
            raise Wrong("a negative token id in its response", "token_ids")
        logprobs = {role: arrays[role][kept_T] for role in LOGPROBS if role in arrays}
        for role, logprobs_T in logprobs.items():
            # files have 0, 1, -9999 or nothing for tokens that nobody sampled; here it is 0, and no logprob
            logprobs[role] = np.where(sampled_T[kept_T], logprobs_T, 0).astype(np.float32)
        prompt_ids, meta = self._prompt(row, before, where)
        version = row.get("weight_version")
        known = _step(version)
        told = {"step": step, "weight_version": version if known is None and isinstance(version, str) else known}
        meta |= {name: value for name, value in told.items() if value is not None}
        token_ids_T, text = ids_T.astype(np.int32), row.get("text")
        if not isinstance(text, str):
            tokenizer = self.texts and self.texts.tokenizer
            text = tokenizer.decode(token_ids_T.tolist(), skip_special_tokens=True) if tokenizer is not None else ""
        rollout = Rollout(
            request_id="",
            sample=0,
            prompt_ids=prompt_ids.astype(np.int32),
            token_ids_T=token_ids_T,
            mask_T=None if sampled_T[kept_T].all() else sampled_T[kept_T],
            logprobs_T=logprobs.get("behaviour"),
            kind=_kind(row["kind"]) if logprobs and "kind" in row else None,
            text=text,
            reward=number(row.get("reward")),
            meta=meta,
        )
        pieces = row["pieces"] if isinstance(row.get("pieces"), list) else []
        fits = len(pieces) in (len(kept_T), len(before) + len(kept_T))
        return Recorded(
            rollout=rollout,
            target_T=logprobs.get("target"),
            prompt=row["prompt"] if isinstance(row.get("prompt"), str) else "",
            pieces=list(compress(pieces[-len(kept_T) :], kept_T)) if fits else [],
        )

    def _response_part(self, row: Row, where: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Ids, mask and logprobs of the response alone, and the ids that stand before it in its list of ids."""
        given = row.get("token_ids", row.get("text"))
        if given is None:
            raise Wrong("no response", "token_ids")
        if self.texts is not None and isinstance(given, str):
            given = self.texts.of_response(given, where)
        arrays = {"token_ids": ids(given, "token_ids")}
        there = [role for role in ("mask", *LOGPROBS) if row.get(role) is not None and role in self.columns]
        arrays |= {role: numbers(row[role], role) for role in there}
        size = len(arrays["token_ids"])
        start = self.format.start(row, arrays)
        if "mask" not in arrays:
            attention = numbers(_filled(row.get("attention")), "mask")
            arrays["mask"] = attention[len(attention) - size :] if len(attention) >= size else np.ones(size)
        before = arrays["token_ids"][:start]
        for role, array in arrays.items():
            arrays[role] = array = array[start:] if len(array) == size else array
            if len(array) != size - start:
                raise Wrong(f"{len(array)} {PER_TOKEN[role]} for {size - start} token ids", role)
        return arrays, before

    def _prompt(self, row: Row, before: np.ndarray, where: str) -> tuple[np.ndarray, dict[str, Any]]:
        """The prompt's ids, and what people want to know of the row."""
        given = row.get("prompt_ids")
        groups = [name for name in GROUP_COLUMNS if row.get(name) is not None]
        if self.texts is None:
            prompt_ids = ids(_filled(given), "prompt_ids")
            meta = {name: jsonable(row[name]) for name in groups}
        else:
            role = "prompt_ids" if "prompt_ids" in self.columns or given is not None else "prompt"
            given = row.get(role) if role == "prompt_ids" or not len(before) else before
            if getattr(given, "ndim", 0):
                given = ids(given, "prompt_ids").astype(int).tolist()
            prompt = parse_prompt(given, where=where, column=self.columns.get(role, role), key=self.source.key)
            refuse_images(row, where=where, key=self.source.key, messages=row.get("prompt"))
            texts = self.texts if self.format.chat is None else replace(self.texts, chat_template=self.format.chat)
            prompt_ids = texts.of_prompt(prompt, where, row.get("tools"))
            record, answer = row.get("record"), answer_column_of(self.table)
            if record is None:  # of a format, whose rows have the answer under that name
                record = row | {"prompt": _question(row.get("prompt"))}
                answer = "answer" if isinstance(row.get("answer"), str | int | float) else None
            meta = meta_of(prompt, record, answer, groups, where=where)
        attention = numbers(_filled(row.get("attention")), "mask")
        if len(attention) >= len(prompt_ids):  # verl pads prompts on the left
            prompt_ids = prompt_ids[attention[: len(prompt_ids)] > 0]
        prompt_ids = prompt_ids if len(prompt_ids) else before
        if (prompt_ids < 0).any():
            raise Wrong("a negative token id in its prompt", "prompt_ids")
        if self.texts is not None and not len(prompt_ids):
            raise Wrong("an empty prompt", "prompt_ids")
        return prompt_ids, meta

    def assumed_kind(self, whose: str, other: LogprobKind, fix: str) -> LogprobKind:
        """The kind that logprobs are taken for where a row does not say it: what the format's sampler gives, else
        `other`; warns where no row does.
        """
        kind = self.format.kind or other
        if "logprob_kind" not in self.table.columns:
            made_by = f", the kind in {self.format.made_by}" if self.format.kind else ""
            text = "%s does not say of which kind the %s's logprobs are: taken for %s ones%s; else %s"
            log.warning(text, self.name, whose, kind.value, made_by, fix)
        return kind

    def _refuse(self, where: str, what: str, role: str) -> NoReturn:
        key, column = self.source.key, self.columns.get(role, role)
        named = key != "score.responses" and isinstance(self.format, Columns) and role in COLUMNS
        other = f"set +compare.columns.{role}" if named else f"set {key} to another file"
        raise UsageError(f"{where} has {what}: fix column {column} of {key}, or {other}")


def _filled(value: Any) -> Any:
    return value if getattr(value, "ndim", 0) else value or []


def _question(prompt: Any) -> Any:
    """What a prompt that may be messages asks last."""
    messages = prompt if isinstance(prompt, list) else []
    users = [each for each in messages if isinstance(each, Mapping) and each.get("role") == "user"]
    return users[-1].get("content") if users else prompt


def _digest(prefix: str, prompt_ids: np.ndarray) -> bytes:
    return hashlib.blake2b(prefix.encode() + b" " + prompt_ids.tobytes(), digest_size=16).digest()


def _kind(value: Any) -> LogprobKind:
    try:
        return LogprobKind(value)
    except ValueError:
        known = ", ".join(kind.value for kind in LogprobKind)
        raise Wrong(f"logprobs of the unknown kind {value!r}, not {known}", "logprob_kind") from None


def _name(value: Any) -> str:
    """The id of a row, which is text or a whole number."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    return str(whole(value, "id"))


def _step(value: Any) -> int | None:
    """A training step, or a version of the weights, where it is a number."""
    found = number(int(value) if isinstance(value, str) and value.isdecimal() else value)
    return int(found) if found is not None and found == int(found) else None

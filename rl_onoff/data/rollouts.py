"""Responses made elsewhere -> Rollouts: files that trainers and other tools wrote, a response a row.

Trainers name the same things differently, pad them to a rectangle, and some put prompt and response into one list. Here
that is undone once, by the names in `columns` and the file's own masks; what cannot be told apart is refused, never
guessed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from rl_onoff.data.columns import COLUMNS, PER_TOKEN, SHOWN, WHOLE, Columns, Row, find_columns
from rl_onoff.data.prompts import GROUP_COLUMNS, answer_column_of, jsonable, meta_of, parse_prompt
from rl_onoff.data.readers import look_up, read_table
from rl_onoff.data.requests import Texts
from rl_onoff.errors import UsageError
from rl_onoff.types import Key, LogprobKind, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """One row of a file: a response with what its sampler said of it, and what the row has beside it."""

    rollout: Rollout  # its kind is None where the row does not say it
    target_T: np.ndarray | None  # float32: the target's logprobs
    prompt: str  # empty where it is not text
    pieces: list[str]  # text of every token, or empty


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFile(Columns):
    """A file of responses. Without `texts` they are to be compared: tokens that a mask leaves out are dropped. With
    `texts` they are to be scored: every row has a prompt, and such tokens stay as context, all but padding at the end.
    """

    texts: Texts | None = None

    def rows(self) -> Iterator[Recorded]:
        """Every response under its (request id, sample). Rows without an id have their number; to be scored, the number
        of the first row with the same prompt.
        """
        counted: dict[str, int] = {}
        seen: set[Key] = set()
        id_of_prompt: dict[bytes, str] = {}
        prompt_of_id: dict[str, bytes] = {}
        for index, record in enumerate(self.table.records):
            where = self.table.where(index)
            row = {role: look_up(record, column) for role, column in self.columns.items()}
            found = self._recorded(row, record, where)
            prompt = found.rollout.prompt_ids.tobytes()
            request_id = str(index) if self.texts is None else id_of_prompt.setdefault(prompt, str(index))
            if row.get("id") is not None:
                request_id = self.name(row["id"], where)
            if self.texts is not None and prompt_of_id.setdefault(request_id, prompt) != prompt:
                self.refuse(where, f"the id {request_id!r} of a row with another prompt", "id")
            sample = counted.get(request_id, 0)
            if row.get("sample") is not None:
                sample = self.whole(row["sample"], "sample", where)
            counted[request_id] = sample + 1
            if (request_id, sample) in seen:  # rows are joined by the two
                self.refuse(where, f"the id {request_id!r} and sample {sample} of an earlier row", "id")
            seen.add((request_id, sample))
            yield replace(found, rollout=replace(found.rollout, request_id=request_id, sample=sample))

    def _recorded(self, row: Row, record: Row, where: str) -> Recorded:
        """What a row holds, under no name yet."""
        arrays, before = self._response_part(row, record, where)
        sampled_T = kept_T = arrays.pop("mask") > 0
        if self.texts is not None:
            kept_T = np.cumsum(sampled_T[::-1])[::-1] > 0  # up to the last token that was sampled
        ids_T = arrays["token_ids"][kept_T]
        if (ids_T < 0).any():
            self.refuse(where, "a negative token id in its response", "token_ids")
        logprobs = {role: arrays[role][kept_T] for role in ("behaviour", "target") if role in arrays}
        for role, logprobs_T in logprobs.items():
            if np.isnan(logprobs_T[sampled_T[kept_T]]).any():
                self.refuse(where, f"{PER_TOKEN[role]} that are not a list of numbers", role)
            logprobs[role] = logprobs_T.astype(np.float32)
        prompt_ids, meta = self._prompt(row, record, before, where)
        token_ids_T, reward, text = ids_T.astype(np.int32), row.get("reward"), row.get("text")
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
            kind=self.kind(record, where) if logprobs else None,
            text=text,
            reward=float(reward) if isinstance(reward, int | float) and abs(reward) <= sys.float_info.max else None,
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

    def _response_part(self, row: Row, record: Row, where: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Ids, mask and logprobs of the response alone, and the ids that stand before it in its list of ids."""
        ids = row.get("token_ids") if "token_ids" in self.columns else row.get("text")
        if ids is None:
            self.refuse(where, "no response", "token_ids")
        if self.texts is not None and isinstance(ids, str):
            ids = self.texts.of_response(ids, where)
        arrays = {"token_ids": self.ids(ids, "token_ids", where)}
        roles = (role for role in ("mask", "behaviour", "target") if row.get(role) is not None)
        arrays |= {role: self.numbers(row[role], role, where) for role in roles}
        size = len(arrays["token_ids"])
        start = self._start(arrays, record, where)
        if "mask" not in arrays:
            attention = self.numbers(record.get("attention_mask") or [], "mask", where)
            arrays["mask"] = attention[len(attention) - size :] if len(attention) >= size else np.ones(size)
        before = arrays["token_ids"][:start]
        for role, array in arrays.items():
            arrays[role] = array = array[start:] if len(array) == size else array
            if len(array) != size - start:
                self.refuse(where, f"{len(array)} {PER_TOKEN[role]} for {size - start} token ids", role)
        return arrays, before

    def _start(self, arrays: Mapping[str, np.ndarray], record: Row, where: str) -> int:
        """How many ids stand before the response: believed only where the row says how long the response is, by a
        response_length or by a mask.
        """
        size, mask = len(arrays["token_ids"]), arrays.get("mask")
        whole = self.columns.get("token_ids") in WHOLE
        said = record.get("response_length", None if mask is None else len(mask))
        if said is not None and (said := self.whole(said, "response_length", where)) < size:
            logprobs = [arrays[role] for role in ("behaviour", "target") if role in arrays]
            if all(len(logprobs_T) == said for logprobs_T in logprobs) if logprobs else whole:
                return size - said
        if whole and mask is not None and len(mask) == size:
            return int(np.argmax(mask > 0)) if (mask > 0).any() else size
        if whole and self.texts is not None:
            self.refuse(where, "neither response_length nor a mask to say where in its ids the response is", "mask")
        return 0

    def _prompt(self, row: Row, record: Row, before: np.ndarray, where: str) -> tuple[np.ndarray, dict[str, Any]]:
        """The prompt's ids, and what people want to know of the row."""
        groups = [name for name in GROUP_COLUMNS if record.get(name) is not None]
        if self.texts is None:
            ids = self.ids(row.get("prompt_ids") or [], "prompt_ids", where)
            meta = {name: jsonable(record[name]) for name in groups}
        else:
            role = "prompt_ids" if "prompt_ids" in self.columns else "prompt"
            given = row[role] if role == "prompt_ids" or not len(before) else before.astype(int).tolist()
            prompt = parse_prompt(given, where=where, column=self.columns[role], key=self.table.key)
            ids = self.texts.of_prompt(prompt, where)
            meta = meta_of(prompt, record, answer_column_of(self.table), groups, where=where)
        attention = self.numbers(record.get("attention_mask") or [], "mask", where)
        if len(attention) >= len(ids):  # verl pads prompts on the left
            ids = ids[attention[: len(ids)] > 0]
        ids = ids if len(ids) else before
        if (ids < 0).any():
            self.refuse(where, "a negative token id in its prompt", "prompt_ids")
        if self.texts is not None and not len(ids):
            self.refuse(where, "an empty prompt", "prompt_ids")
        return ids, meta


def open_rollouts(path: str, *, key: str, columns: Mapping[str, str], one_of_two: bool = False) -> RolloutFile:
    """A .jsonl or .parquet file with logprobs.

    `columns` (compare.columns) says what its columns are called where that is not known. It counts for both files of a
    comparison, so with `one_of_two` a column that this file lacks is left out.
    """
    table = read_table(path, key=key)
    columns = {role: name for role, name in columns.items() if name in table.columns or not one_of_two}
    said = {role: table.column(name, f"+compare.columns.{role}") for role, name in columns.items()}
    found = {**find_columns(table), **said}
    sides = {"compare.behaviour": ("behaviour",)}.get(key, ("behaviour", "target"))
    for what, roles in (("lists of token ids", ("token_ids",)), (f"logprobs of the {' or '.join(sides)}", sides)):
        if not found.keys() & set(roles):
            fix = " or ".join(f"+compare.columns.{role}=NAME" for role in roles)
            raise UsageError(f"{table.name} has no column with {what} but {', '.join(table.columns)}: set {fix}")
    return RolloutFile(table=table, columns=found)


def load_responses(
    path: str, tokenizer: Any = None, *, chat_template: bool = False, system: str | None = None
) -> list[Rollout]:
    """The prompts and responses in a .parquet or .jsonl file, to be scored.

    Best are token ids: nothing is tokenised. Text is tokenised once: a prompt that is a list of messages goes through
    the chat template, and so does a prompt that is text with `chat_template`, unless it holds special tokens already.
    A response that is text is taken as it is. Rows with an empty response are left out, with a warning.
    """
    table = read_table(path, key="score.responses")
    columns = {role: name for role, name in find_columns(table).items() if role != "target" and name not in SHOWN}
    said = {"mask", "response_length"} & {*columns, *table.columns}
    if columns.get("token_ids") in WHOLE and "text" in columns and not said:
        del columns["token_ids"]  # nothing says where in them the response is
    for ids, text in (("prompt_ids", "prompt"), ("token_ids", "text")):
        if not {ids, text} & columns.keys():
            names = dict.fromkeys(name for name in (*COLUMNS[ids], *COLUMNS[text]) if name not in SHOWN)
            raise UsageError(
                f"{table.name} has none of the columns {', '.join(names)} but {', '.join(table.columns)}: rename one,"
                " or set score.responses to another file"
            )
    file = RolloutFile(table=table, columns=columns, texts=Texts(tokenizer, chat_template, system))
    rollouts = [recorded.rollout for recorded in file.rows()]
    found = [rollout for rollout in rollouts if len(rollout.token_ids_T)]
    if not found:
        column = columns.get("token_ids") or columns["text"]
        raise UsageError(
            f"{table.name} has empty responses only: fill column {column}, or set score.responses to another file"
        )
    if empty := len(rollouts) - len(found):
        log.warning(
            "%s: %d of %d rows left out: their response is empty, nothing to score", table.name, empty, len(rollouts)
        )
    if masked := sum(rollout.mask_T is not None for rollout in found):
        log.warning(
            "%s: %d of %d responses hold tokens that their mask leaves out: they are scored and counted like any",
            table.name, masked, len(found),
        )  # fmt: skip
    if "behaviour" not in columns:
        return found
    kind = file.assumed_kind("behaviour", LogprobKind.raw, "add a column logprob_kind")
    return [r if r.logprobs_T is None else replace(r, kind=r.kind or kind) for r in found]

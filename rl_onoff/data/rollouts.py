"""Token ids and logprobs that other tools wrote down: one row a response, both policies' logprobs in it or one of them.

Trainers name the same things differently, pad them to a rectangle, and some put prompt and response into one list. Here that is
undone once, by the names in COLUMNS and the file's own masks; what cannot be told apart is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rl_onoff.config import COLUMN_ROLES
from rl_onoff.data.prompts import GROUP_COLUMNS, jsonable
from rl_onoff.data.readers import Table, look_up, read_table
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("request_id", "id", "uid"),
    "sample": ("sample",),
    # ours; verl; TRL, prime-rl; slime and prime-rl's packed batches (prompt and response in one list)
    "token_ids": ("token_ids", "responses", "response_ids", "completion_ids", "completion_token_ids", "tokens", "input_ids"),
    "mask": ("response_mask", "completion_mask", "loss_mask", "token_mask"),
    # verl and slime; TRL; prime-rl's trainer; verifiers; NeMo-RL; ours
    "behaviour": ("rollout_log_probs", "sampling_per_token_logps", "inference_logprobs", "completion_logprobs", "generation_logprobs",
                  "behaviour_logprobs", "logprobs"),
    "target": ("old_log_probs", "old_per_token_logps", "trainer_logprobs", "prev_logprobs", "target_logprobs"),
    "prompt_ids": ("prompt_ids", "prompts", "prompt_token_ids"),
    "prompt": ("prompt", "input", "question"),
    "text": ("text", "response", "completion", "output"),
    "pieces": ("pieces", "token_texts", "tokens_text"),
    "reward": ("reward", "score"),
}  # fmt: skip
assert tuple(COLUMNS) == COLUMN_ROLES


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """One response of a file. A logprob is there for every token; tokens that a mask leaves out are gone."""

    request_id: str
    sample: int
    token_ids_T: np.ndarray
    behaviour_T: np.ndarray | None
    target_T: np.ndarray | None
    kind: LogprobKind | None  # what the row says of its logprobs
    prompt_ids: np.ndarray
    prompt: str = ""
    text: str = ""
    pieces: list[str] | None = None
    reward: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFile:
    """A file whose columns are known."""

    table: Table
    columns: Mapping[str, str]  # role -> column

    def rows(self) -> Iterator[Export]:
        counted: dict[str, int] = {}
        seen: set[tuple[str, int]] = set()
        for index, record in enumerate(self.table.records):
            row = {role: look_up(record, column) for role, column in self.columns.items()}
            request_id = str(index) if row.get("id") is None else str(row["id"])
            sample = row.get("sample")
            sample = counted.get(request_id, 0) if sample is None else int(sample)
            counted[request_id] = sample + 1
            if (request_id, sample) in seen:  # rows are joined by the two
                raise UsageError(
                    f"{self.table.where(index)} has the id {request_id!r} and sample {sample} of an earlier row: give every row its own, "
                    "or set +compare.columns.id to another column"
                )
            seen.add((request_id, sample))
            yield _export(row, record, request_id, sample, self.table.where(index))


def open_export(path: str, *, key: str, columns: Mapping[str, str], one_of_two: bool = False) -> ExportFile:
    """Find the columns of a .jsonl or .parquet file; `columns` (compare.columns) says what they are called where that is not known.

    They are said once for both files where there are two, so `one_of_two` may lack some of them.
    """
    table = read_table(path, key=key)
    columns = {role: name for role, name in columns.items() if name in table.columns or not one_of_two}
    found = {role: table.column(name, f"+compare.columns.{role}") for role, name in columns.items()}
    for role, names in COLUMNS.items():
        if role not in found:
            fitting = [name for name in names if name in table.columns and _fits(role, table.records[0].get(name))]
            if fitting:
                found[role] = fitting[0]
    if "token_ids" not in found:
        raise UsageError(
            f"{table.name} has no column with lists of token ids but {', '.join(table.columns)}: set +compare.columns.token_ids=NAME"
        )
    if "behaviour" not in found and "target" not in found:
        raise UsageError(
            f"{table.name} has no column with logprobs but {', '.join(table.columns)}: set +compare.columns.behaviour=NAME or "
            "+compare.columns.target=NAME"
        )
    return ExportFile(table=table, columns=found)


def _fits(role: str, value: Any) -> bool:
    """Whether a column can play its role, by its first row: `responses` is a list of ids in verl and text elsewhere."""
    if role in ("token_ids", "prompt_ids"):
        return isinstance(value, list) and all(isinstance(item, int) for item in value)
    if role in ("prompt", "text"):
        return isinstance(value, str)
    if role == "reward":
        return isinstance(value, int | float)
    return value is not None


def _export(row: Mapping[str, Any], record: Mapping[str, Any], request_id: str, sample: int, where: str) -> Export:
    ids_T = _numbers(row.get("token_ids"), np.int64, where, "token ids")
    logprobs = {
        who: _numbers(row[who], np.float64, where, f"{who} logprobs")
        for who in ("behaviour", "target")
        if row.get(who) is not None
    }
    prompt_ids = _numbers(row.get("prompt_ids") or [], np.int64, where, "prompt ids")
    mask_T = _mask(row, record, len(ids_T), where)
    ids_T, mask_T, cut = _response_part(ids_T, mask_T, logprobs, record, where)
    if cut is not None and not len(prompt_ids):
        prompt_ids = cut
    kept_T = np.ones(len(ids_T), bool) if mask_T is None else mask_T
    for who, logprobs_T in logprobs.items():
        if len(logprobs_T) != len(ids_T):
            raise UsageError(
                f"{where} has {len(logprobs_T)} {who} logprobs for {len(ids_T)} token ids: mend the file, or set "
                f"+compare.columns.{who} or +compare.columns.token_ids to other columns"
            )
    pieces = row.get("pieces")
    attention = record.get("attention_mask")
    if attention is not None and len(attention) >= len(prompt_ids):  # verl pads prompts on the left
        prompt_ids = prompt_ids[np.asarray(attention[: len(prompt_ids)], bool)]
    kind = record.get("logprob_kind")
    if kind is not None and kind not in [k.value for k in LogprobKind]:
        raise UsageError(
            f"{where} has logprobs of the unknown kind {kind!r}: mend column logprob_kind, or set compare.behaviour_kind=raw"
        )
    return Export(
        request_id=request_id,
        sample=sample,
        token_ids_T=ids_T[kept_T].astype(np.int32),
        behaviour_T=logprobs["behaviour"][kept_T].astype(np.float32) if "behaviour" in logprobs else None,
        target_T=logprobs["target"][kept_T].astype(np.float32) if "target" in logprobs else None,
        kind=None if kind is None else LogprobKind(kind),
        prompt_ids=prompt_ids.astype(np.int32),
        prompt=_text(row.get("prompt")),
        text=_text(row.get("text")),
        pieces=[piece for piece, kept in zip(pieces, kept_T, strict=True) if kept]
        if pieces and len(pieces) == len(kept_T)
        else None,
        reward=float(row["reward"]) if isinstance(row.get("reward"), int | float) else None,
        meta={name: jsonable(record[name]) for name in GROUP_COLUMNS if record.get(name) is not None},
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _mask(row: Mapping[str, Any], record: Mapping[str, Any], num_ids: int, where: str) -> np.ndarray | None:
    """Which tokens count: the row's own mask, else the response's part of an attention mask."""
    if row.get("mask") is not None:
        return _numbers(row["mask"], np.float64, where, "mask") > 0
    attention = record.get("attention_mask")
    return np.asarray(attention[-num_ids:], bool) if attention is not None and len(attention) >= num_ids else None


def _response_part(
    ids_T: np.ndarray,
    mask_T: np.ndarray | None,
    logprobs: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
    where: str,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Ids and mask of the response where the list of ids holds the prompt too, and what was before it.

    That is only believed when the row says how long the response is: by a response_length, or a mask of the logprobs' length.
    """
    length = next((len(array) for array in logprobs.values()), len(ids_T))
    said = record.get("response_length", None if mask_T is None else len(mask_T))
    if length < len(ids_T) and said == length:
        before, ids_T = ids_T[:-length], ids_T[-length:]
        return ids_T, None if mask_T is None else mask_T[-length:], before
    if mask_T is not None and len(mask_T) != len(ids_T):
        raise UsageError(
            f"{where} has a mask of {len(mask_T)} for {len(ids_T)} token ids: mend the file, or set +compare.columns.mask to another column"
        )
    return ids_T, mask_T, None


def _numbers(value: Any, dtype: Any, where: str, what: str) -> np.ndarray:
    numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    if not numbers:
        raise UsageError(
            f"{where} has {what} that are not a list of numbers: mend it, or set +compare.columns.NAME to another column"
        )
    return np.asarray(value, dtype)

"""Which column of a file made elsewhere plays which role, and the checks of what stands in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from rl_onoff.config import COLUMN_ROLES
from rl_onoff.data.prompts import MAX_ID
from rl_onoff.data.readers import Table
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind

Row = Mapping[str, Any]
log = logging.getLogger(__name__)

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("request_id", "id", "uid"),
    "sample": ("sample",),
    # ours; verl; TRL, prime-rl; slime and prime-rl's packed batches; ids under a name that is text elsewhere
    "token_ids": ("token_ids", "responses", "response_ids", "completion_ids", "completion_token_ids", "tokens",
                  "input_ids", "response", "text", "completion"),
    "mask": ("response_mask", "completion_mask", "loss_mask", "token_mask"),
    # verl and slime; TRL; prime-rl's trainer; verifiers; NeMo-RL; ours
    "behaviour": ("rollout_log_probs", "sampling_per_token_logps", "inference_logprobs", "completion_logprobs",
                  "generation_logprobs", "behaviour_logprobs", "logprobs"),
    "target": ("old_log_probs", "old_per_token_logps", "trainer_logprobs", "prev_logprobs", "target_logprobs"),
    "prompt_ids": ("prompt_ids", "prompts", "prompt_token_ids", "prompt"),
    "prompt": ("prompt", "messages", "question", "problem", "input"),
    "text": ("response", "text", "completion", "output"),
    "pieces": ("pieces", "token_texts", "tokens_text"),
    "reward": ("reward", "score"),
}  # fmt: skip
assert tuple(COLUMNS) == COLUMN_ROLES
WHOLE = ("tokens", "input_ids")  # columns in which the prompt's ids may stand before the response's
PER_TOKEN = {  # role -> what its values are called
    "token_ids": "token ids", "prompt_ids": "prompt ids", "mask": "mask values", "behaviour": "behaviour logprobs",
    "target": "target logprobs",
}  # fmt: skip
SHOWN = ("input", "output")  # text without its special tokens: for people, and no text to make tokens of


def find_columns(table: Table) -> dict[str, str]:
    """Role -> the column that plays it, by its name and by the first value in it."""
    first = {
        column: next((value for record in table.records if (value := record.get(column)) is not None), None)
        for column in table.columns
    }
    found = {}
    for role, names in COLUMNS.items():
        there = sorted((name for name in names if name in first), key=lambda name: first[name] is None)
        if fitting := [name for name in there if _fits(role, first[name])]:  # a filled column before an empty one
            found[role] = fitting[0]
    return found


def _fits(role: str, value: Any) -> bool:
    """Whether a column can play its role: `responses` is a list of ids in verl and text elsewhere."""
    if role in ("token_ids", "prompt_ids"):
        return isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    if role in ("prompt", "text"):
        return value is None or isinstance(value, str | list if role == "prompt" else str)
    return isinstance(value, int | float) if role == "reward" else value is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """A file whose columns are known."""

    table: Table
    columns: Mapping[str, str]  # role -> column

    def assumed_kind(self, whose: str, kind: LogprobKind, fix: str) -> LogprobKind:
        """The kind that logprobs are taken for where a row does not say it; warns where no row does."""
        if "logprob_kind" not in self.table.columns:
            text = "%s does not say of which kind the %s's logprobs are: taken for %s ones; else %s"
            log.warning(text, self.table.name, whose, kind.value, fix)
        return kind

    def kind(self, record: Row, where: str) -> LogprobKind | None:
        if "logprob_kind" not in self.table.columns:
            return None
        try:
            return LogprobKind(record.get("logprob_kind"))
        except ValueError:
            known = ", ".join(kind.value for kind in LogprobKind)
            self.refuse(
                where, f"logprobs of the unknown kind {record.get('logprob_kind')!r}, not {known}", "logprob_kind"
            )

    def name(self, value: Any, where: str) -> str:
        """The id of a row, which is text or a whole number."""
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value)
        return str(self.whole(value, "id", where))

    def whole(self, value: Any, role: str, where: str) -> int:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and 0 <= value <= MAX_ID and value == int(value):
            return int(value)
        self.refuse(where, f"{value!r} as its {role} where a whole number from 0 is wanted", role)

    def ids(self, value: Any, role: str, where: str) -> np.ndarray:
        """Whole numbers as float64, which holds every int32, so that fractions are seen."""
        ids = self.numbers(value, role, where)
        if not ((ids == np.floor(ids)) & (np.abs(ids) <= MAX_ID)).all():
            self.refuse(where, f"{PER_TOKEN[role]} that are not all whole numbers below 2^31", role)
        return ids

    def numbers(self, value: Any, role: str, where: str) -> np.ndarray:
        kinds = {int, float, bool} if role == "mask" else {int, float}
        if isinstance(value, list) and set(map(type, value)) <= kinds:
            with suppress(OverflowError):  # a number of JSON may have any number of digits
                return np.asarray(value, np.float64)
        self.refuse(where, f"{PER_TOKEN[role]} that are not a list of numbers", role)

    def refuse(self, where: str, what: str, role: str) -> NoReturn:
        key, column = self.table.key, self.columns.get(role, role)
        named = key != "score.responses" and role in COLUMNS
        other = f"set +compare.columns.{role}" if named else f"set {key} to another file"
        raise UsageError(f"{where} has {what}: fix column {column} of {key}, or {other}")

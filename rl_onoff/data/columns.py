"""A table of responses whose columns have names of any maker: which column plays which role.

Here is what every format of `formats.py` is made of, and the one that reads what no other recognises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from rl_onoff.config import COLUMN_ROLES
from rl_onoff.data.prompts import GROUP_COLUMNS, IMAGE_COLUMNS
from rl_onoff.data.readers import look_up
from rl_onoff.data.values import LOGPROBS, Wrong, whole
from rl_onoff.types import LogprobKind

Record = Mapping[str, Any]
Row = dict[str, Any]  # role -> value; the roles are those of the columns, `start` and `attention`

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
    "step": ("step", "global_step"),
    "weight_version": ("weight_version", "policy_version"),
}  # fmt: skip
assert tuple(COLUMNS) == COLUMN_ROLES
WHOLE = ("tokens", "input_ids")  # columns in which the prompt's ids may stand before the response's
SHOWN = ("input", "output")  # text without its special tokens: for people, and no text to make tokens of


class Format:
    """One layout of rollouts, as it is: what tells it, what its columns mean."""

    name: ClassVar[str]
    made_by: ClassVar[str]  # for messages
    marks: ClassVar[frozenset[str]] = frozenset()  # names that its first record has
    roles: ClassVar[Mapping[str, str]]  # role -> the file's name for it
    kind: ClassVar[LogprobKind | None] = LogprobKind.processed  # of its logprobs; None: nothing is known
    chat: ClassVar[bool | None] = False  # a prompt that is text goes through the chat template; None: as data says
    skipped: ClassVar[Sequence[str]] = ()  # roles whose values are all 0 where the trainer left them out
    lost: ClassVar[str] = ""  # what its text has lost
    left_out: ClassVar[Sequence[str]] = ()  # files beside the rollouts, by their names

    def recognises(self, record: Record, path: str) -> bool:
        return self.marks <= record.keys()

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        """The responses in a record; `step` is what the file's path tells of it."""
        yield beside(record) | {role: record.get(column) for role, column in self.roles.items()}

    def start(self, row: Row, arrays: Mapping[str, np.ndarray]) -> int:
        """How many of the row's ids stand before its response."""
        return row.get("start", 0)


class Columns(Format):
    """A row a response, in columns of any name: how everything that no other class recognises is read. Its roles are
    found in each file.
    """

    name, made_by, kind, chat = "columns", "a table of responses", None, None

    def __init__(self, columns: Mapping[str, str] | None = None, scoring: bool = False, has_kind: bool = False):
        self.columns, self.scoring, self.has_kind = columns or {}, scoring, has_kind

    def recognises(self, record: Record, path: str) -> bool:
        return True

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        row = {role: look_up(record, column) for role, column in self.columns.items()}
        if "token_ids" not in self.columns:
            row["token_ids"] = row.get("text")
        said = {"attention": record.get("attention_mask"), "response_length": record.get("response_length")}
        kind = {"kind": record.get("logprob_kind")} if self.has_kind else {}
        groups = {name: record.get(name) for name in GROUP_COLUMNS}
        yield beside(record) | row | said | kind | groups | {"record": record}

    def start(self, row: Row, arrays: Mapping[str, np.ndarray]) -> int:
        """Believed only where the row says how long the response is, by a response_length or by a mask."""
        size, mask = len(arrays["token_ids"]), arrays.get("mask")
        inside = self.columns.get("token_ids") in WHOLE
        said = row["response_length"] if mask is None or row["response_length"] is not None else len(mask)
        if said is not None and (said := whole(said, "response_length")) < size:
            logprobs = [arrays[role] for role in LOGPROBS if role in arrays]
            if all(len(logprobs_T) == said for logprobs_T in logprobs) if logprobs else inside:
                return size - said
        if inside and mask is not None and len(mask) == size:
            return first_sampled(mask)
        if inside and self.scoring:
            raise Wrong("neither response_length nor a mask to say where in its ids the response is", "mask")
        return 0


def find_columns(first: Mapping[str, Any]) -> dict[str, str]:
    """Role -> the column that plays it, by its name and by the first value in it."""
    found = {}
    for role, names in COLUMNS.items():
        there = sorted((name for name in names if name in first), key=lambda name: first[name] is None)
        if fitting := [name for name in there if _fits(role, first[name])]:  # a filled column before an empty one
            found[role] = fitting[0]
    return found


def _fits(role: str, value: Any) -> bool:
    """Whether a column can play its role: `responses` is a list of ids in verl and text elsewhere."""
    if role in ("token_ids", "prompt_ids"):
        is_list = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
        return is_list or getattr(value, "ndim", 0) == 1
    if role in ("prompt", "text"):
        return value is None or isinstance(value, str | list if role == "prompt" else str)
    if role in ("reward", "step", "weight_version"):
        is_number = isinstance(value, int | float) or getattr(value, "ndim", None) == 0
        return is_number or (role == "weight_version" and isinstance(value, str))
    return value is not None


def first_sampled(mask: np.ndarray) -> int:
    """Where the first token is that the policy sampled; the end where it sampled none."""
    return int(np.argmax(mask > 0)) if (mask > 0).any() else len(mask)


def beside(record: Record) -> Row:
    """What stands beside a prompt and belongs to it."""
    return {name: record[name] for name in ("tools", *IMAGE_COLUMNS) if record.get(name) is not None}


def apart(columns: Record, leader: str) -> list[Row]:
    """Columns of one length as rows; of another length they are none of a row's."""
    size = len(columns[leader]) if isinstance(columns.get(leader), list) else 0
    fitting = {name: column for name, column in columns.items() if isinstance(column, list) and len(column) == size}
    return [{name: column[i] for name, column in fitting.items()} for i in range(size)]


def listed(value: Any, role: str) -> list[Any]:
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return value
    raise Wrong(f"{type(value).__name__} where a list of objects is wanted", role)

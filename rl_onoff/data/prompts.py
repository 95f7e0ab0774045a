"""Data files -> rows: prompt, id, reference answer and groups, checked, before any tokenizer or model is loaded.

What is wrong in a row is one sentence with the row and the override that fixes it: it costs a second, no model's load.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from rl_onoff.config import DataConfig
from rl_onoff.data.readers import Table, kind_of, look_up, read_table
from rl_onoff.errors import UsageError, plural

log = logging.getLogger(__name__)

PROBLEMS = Path(__file__).with_name("problems.jsonl")  # the bundled set
ROW_NUMBER = "row_number"  # `data.id=row_number` numbers the rows, for files whose ids are of no use
PROMPT_COLUMNS = ("prompt_ids", "prompt_token_ids", "prompt", "messages", "question", "problem")
GROUP_COLUMNS = ("data_source", "subject", "level")
MAX_ID = 2**31 - 1  # of a token: ids are int32 everywhere
IMAGES = {"image", "image_url", "input_image"}  # types of content parts
IMAGE_COLUMNS = ("images", "image")
WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content")  # a message with one of them may lack content

Messages = list[dict[str, Any]]
Prompt = str | Messages | list[int]


def is_chat(prompt: Prompt) -> TypeGuard[Messages]:
    return not isinstance(prompt, str) and isinstance(prompt[0], dict)


def is_ids(prompt: Prompt) -> TypeGuard[list[int]]:
    return not isinstance(prompt, str) and isinstance(prompt[0], int)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt as it stands in the data, not yet a chat and not yet tokens."""

    id: str
    prompt: Prompt
    where: str  # for error messages: "line 3 of problems.jsonl"
    meta: Mapping[str, Any] = field(default_factory=dict)  # question, answer (where there is one) and the group columns
    tools: list[dict[str, Any]] | None = None  # for the chat template


def load_rows(data: DataConfig) -> list[Row]:
    """The rows that `data` selects, in its order; the ids of rows do not depend on shuffling or the limit."""
    path = str(PROBLEMS) if data.path is None else data.path
    table = read_table(path, key="data.path", format=data.format, split=data.split)
    known = next((name for name in PROMPT_COLUMNS if name in table.columns), None)
    prompt_column = known if data.prompt is None else table.column(data.prompt, "data.prompt")
    if prompt_column is None:
        why = f"{table.name} has no column for the prompt but {', '.join(table.columns)}"
        raise UsageError(f"{why}: set data.prompt to one of them")
    answer_column = answer_column_of(table) if data.answer is None else table.column(data.answer, "data.answer")
    if data.id is not None:
        numbered = data.id == ROW_NUMBER and data.id not in table.columns
        id_column = None if numbered else table.column(data.id, "data.id")
    elif "id" in table.columns:
        id_column = "id"
    else:  # verl's, or else the rows are numbered from 0, as verl does
        id_column = "extra_info.index" if look_up(table.records[0], "extra_info.index") is not None else None
    groups = [table.column(name, "data.groups") for name in data.groups]
    groups = groups or [name for name in GROUP_COLUMNS if name in table.columns]

    order = list(range(len(table.records)))
    if data.shuffle:
        random.Random(data.seed).shuffle(order)
    rows: dict[str, Row] = {}
    answered = 0
    for index in order[: data.limit]:
        record, where = table.records[index], table.where(index)
        value, tools = look_up(record, prompt_column), record.get("tools")
        if table.unit == "row":
            value, tools = without_nulls(value), without_nulls(tools)
        prompt = parse_prompt(value, where=where, column=prompt_column, key="data.prompt")
        refuse_images(record, where=where, key="data.path")
        if is_chat(prompt) and prompt[-1]["role"] == "assistant":
            if prompt_column != "messages" or len(prompt) == 1:
                why = f"the conversation in {where} ends with the assistant's turn"
                raise UsageError(f"{why}: remove that turn, or set data.prompt to another column")
            prompt, answered = prompt[:-1], answered + 1
        row_id = str(index) if id_column is None else _id(look_up(record, id_column), where=where, column=id_column)
        if row_id in rows:
            why = f"{where} and {rows[row_id].where} share the id {row_id!r}"
            raise UsageError(f"{why}: set data.id to a column without repetitions, or data.id={ROW_NUMBER}")
        meta = meta_of(prompt, record, answer_column, groups, where=where)
        tools = None if "tools" in data.template_kwargs else parse_tools(tools, where)
        rows[row_id] = Row(id=row_id, prompt=prompt, where=where, meta=meta, tools=tools)
    if answered:  # in TRL's layout the last turn of `messages` is the answer to learn
        of = plural(answered, "row")
        log.warning("%s: the assistant's last turn is left out of the prompts of %s", table.name, of)
    return list(rows.values())


def parse_prompt(value: Any, *, where: str, column: str, key: str) -> Prompt:
    """A prompt as text, chat messages (untouched: a chat template may read any field) or token ids; anything else, an
    empty one, and one with images is refused."""
    ids = isinstance(value, list) and all(type(item) is int for item in value)
    chat = isinstance(value, list) and all(_is_message(item) for item in value)
    text = "".join(text_of(item) for item in value) if chat else value
    if images := _images(value):
        what = f"a prompt that holds images (content of type {min(images)}), and engines are sent text alone"
    elif text is None or (isinstance(text, str) and not text.strip()):
        what = "an empty prompt"
    elif ids and (strange := [item for item in value if not 0 <= item <= MAX_ID]):
        what = f"the token id {strange[0]} in its prompt, which no model has"
    elif ids or chat or isinstance(value, str):
        return value
    else:
        wanted = "text, a list of chat messages (role, and content as text or parts) or a list of token ids is wanted"
        what = f"{kind_of(value)} as its prompt where {wanted}"
    other = "file" if key == "score.responses" else "column"
    fix = "remove the row" if images else f"fill column {column}"
    raise UsageError(f"{where} has {what}: {fix} or set {key} to another {other}")


def refuse_images(record: Mapping[str, Any], *, where: str, key: str, messages: Any = None) -> None:
    """Refuse a row with images in a column of their own, or in the messages that its prompt's ids were made of."""
    values = {name: record.get(name) for name in IMAGE_COLUMNS}
    held = [f"holds images in its column {x}" for x, value in values.items() if getattr(value, "ndim", 0) or value]
    held += [f"has a prompt that holds images (content of type {x})" for x in sorted(_images(messages))]
    if held:
        why = f"{where} {held[0]}, and engines are sent text alone"
        raise UsageError(f"{why}: remove the row, or set {key} to another file")


def _images(value: Any) -> set[str]:
    """The types of a conversation's content parts that are images."""
    messages = value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else []
    lists = [item["content"] for item in messages if isinstance(item.get("content"), list)]
    types = [part.get("type") for parts in lists for part in parts if isinstance(part, dict)]
    return {each for each in types if isinstance(each, str)} & IMAGES


def _is_message(item: Any) -> bool:
    if not (isinstance(item, dict) and isinstance(item.get("role"), str)):
        return False
    content = item.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return (content is not None or any(item.get(name) for name in WITHOUT_CONTENT)) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) and isinstance(part.get("text") or "", str)
        for part in parts
    )


def text_of(message: Mapping[str, Any]) -> str:
    """What people read of a message: its content, or the text of the content's parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def without_nulls(value: Any) -> Any:
    """A value of Arrow's without the nulls that Arrow adds where an object lacks a field that others have."""
    if isinstance(value, dict):
        kept = (
            {"content"} if isinstance(value.get("role"), str) else set()
        )  # templates tell a message whose content is null
        return {name: without_nulls(item) for name, item in value.items() if item is not None or name in kept}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """A row's tools for the chat template, from a list or, as Parquet files often hold it, its JSON."""
    with suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    if not value:
        return None
    if isinstance(value, list) and all(isinstance(tool, dict) for tool in value):
        return value
    why = f"{where} has {kind_of(value)} as its tools where a list of objects (JSON schemas) is wanted"
    raise UsageError(f"{why}: fix column tools, or set +data.template_kwargs.tools=[] to give none")


def meta_of(
    prompt: Prompt, record: Mapping[str, Any], answer_column: str | None, groups: Iterable[str], *, where: str
) -> dict[str, Any]:
    """What people want to know of a row beside its prompt: question, reference answer (if any) and groups."""
    answer = None if answer_column is None else _answer(look_up(record, answer_column), where)
    if isinstance(prompt, str):
        question = prompt
    elif is_chat(prompt):
        asked = (item for item in reversed(prompt) if item["role"] == "user")
        question = text_of(next(asked, prompt[-1]))
    else:
        question = next((record[name] for name in PROMPT_COLUMNS if isinstance(record.get(name), str)), "")
    found = {name: jsonable(look_up(record, name)) for name in groups}
    return {"question": question, **({} if answer is None else {"answer": answer}), **found}


def answer_column_of(table: Table) -> str | None:
    if "answer" in table.columns:
        return "answer"
    return "reward_model.ground_truth" if "reward_model" in table.columns else None


def _answer(value: Any, where: str) -> str | None:
    """The reference answer as text, from a string, a number, or verl's object with `target`; None if there is none."""
    value = value.get("target", value) if isinstance(value, Mapping) else value
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != math.inf:
        return str(int(value)) if value == int(value) else str(value)
    why = f"{where} has {kind_of(value)} as its reference answer where text or a number is wanted"
    raise UsageError(f"{why}: set data.answer to another column")


def jsonable(value: Any) -> Any:
    """A group's value as JSON can hold it: null for numbers that are not finite, text for what JSON does not know."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def _id(value: Any, *, where: str, column: str) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    why = f"{where} has {kind_of(value)} as its id in column {column} where text or a whole number is wanted"
    raise UsageError(f"{why}: set data.id to another column, or data.id={ROW_NUMBER}")

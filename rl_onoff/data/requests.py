"""Rows -> Requests: the one place where text becomes prompt tokens. Also reads responses that were made elsewhere.

It prevents the two mistakes that silently change a model's answers: a chat template applied twice or not at all, and a
beginning-of-sequence token that is doubled (by a template and a tokenizer that both add it) or missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rl_onoff.config import DataConfig
from rl_onoff.data.prompts import (
    GROUP_COLUMNS,
    PROMPT_COLUMNS,
    Messages,
    Prompt,
    Row,
    answer_column_of,
    answer_of,
    is_chat,
    is_ids,
    jsonable,
    parse_prompt,
    question_of,
)
from rl_onoff.data.readers import Table, look_up, read_table
from rl_onoff.errors import UsageError
from rl_onoff.types import Key, LogprobKind, Rollout, SampleRequest

log = logging.getLogger(__name__)

RESPONSE_COLUMNS = ("token_ids", "response_ids", "completion_ids", "response", "text", "completion")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt as an engine gets it and as people read it, with what else its row has."""

    id: str = ""
    ids: np.ndarray  # (P,) int32
    text: str  # after the chat template; never tokenised again
    meta: Mapping[str, Any] = field(default_factory=dict)  # question, answer and the group columns


def encode_rows(rows: Sequence[Row], data: DataConfig, tokenizer: Any) -> list[EncodedPrompt]:
    """The prompts of rows that `load_rows` has checked already."""
    options = {"chat_template": data.chat_template, "system": data.system}
    return [
        replace(encode_prompt(row.prompt, tokenizer, where=row.where, **options), id=row.id, meta=row.meta)
        for row in rows
    ]


def check_lengths(requests: Iterable[SampleRequest], max_len: int) -> None:
    """Refuse a prompt that leaves no room for one token in a context of `max_len`.

    A response with room for fewer than max_new_tokens ends when the context is full.
    """
    for request in requests:
        if len(request.prompt_ids) >= max_len:
            raise UsageError(
                f"the prompt of row {request.request_id!r} has {len(request.prompt_ids)} tokens and the model's context only"
                f" {max_len}: remove the row from data.path, or set model.name to a model with a longer context"
            )


def encode_prompt(
    prompt: Prompt, tokenizer: Any, *, chat_template: bool, system: str | None = None, where: str = "the prompt"
) -> EncodedPrompt:
    """Text, chat messages or token ids -> token ids, with the template applied once and one BOS if the tokenizer wants one.

    Token ids are taken as they are.
    """
    if is_ids(prompt):
        return EncodedPrompt(ids=np.asarray(prompt, np.int32), text=tokenizer.decode(prompt))
    assert isinstance(prompt, str) or is_chat(prompt)
    if chat_template:
        text = _render(_messages(prompt, system), tokenizer, where)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        text = _plain_text(prompt, where)
        ids = tokenizer(text, verbose=False)["input_ids"]
    ids = _with_one_bos(ids, tokenizer)
    if not ids:
        raise UsageError(
            f"{where} has an empty prompt: it has no tokens, so remove it or fill its prompt (data.prompt)"
        )
    return EncodedPrompt(ids=np.asarray(ids, np.int32), text=text)


def _messages(prompt: str | Messages, system: str | None) -> Messages:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _render(messages: Messages, tokenizer: Any, where: str) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, like a base model's: set data.chat_template=false to send"
            " the prompts as they are, or model.name to a chat model"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        mend = (
            "set data.system=null"
            if messages[0]["role"] == "system"
            else "mend the conversation, or set data.chat_template=false"
        )
        raise UsageError(f"the model's chat template refuses the roles {roles} of {where} ({error}): {mend}") from error


def _plain_text(prompt: str | Messages, where: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) > 1:
        raise UsageError(
            f"{where} has {len(prompt)} chat messages, and without a chat template only a single one can be sent as it is:"
            " set data.chat_template=true"
        )
    return prompt[0]["content"]


def _with_one_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` with exactly one BOS in front when the tokenizer puts one before plain text; never with two."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    wants = tokenizer("")["input_ids"][:1] == [bos]
    return [bos, *ids] if wants and ids[:1] != [bos] else ids


# Responses made elsewhere


def load_responses(
    path: str, tokenizer: Any = None, *, chat_template: bool = False, system: str | None = None
) -> list[Rollout]:
    """The prompts and responses in a .parquet or .jsonl file.

    Best are token ids (columns prompt_ids and token_ids): nothing is tokenised. Text is tokenised once: a prompt that is a
    list of messages goes through the chat template, and so does a prompt that is text with `chat_template`, unless it holds
    special tokens already. A response that is text is taken as it is. Rows with an empty response are left out, with a warning.
    """
    table = read_table(path, key="score.responses")
    prompt_column, response_column = table.first(PROMPT_COLUMNS), table.first(RESPONSE_COLUMNS)
    for column, names in ((prompt_column, PROMPT_COLUMNS), (response_column, RESPONSE_COLUMNS)):
        if column is None:
            raise UsageError(
                f"{table.name} has none of the columns {', '.join(names)} but {', '.join(table.columns)}:"
                " rename one, or set score.responses to another file"
            )
    assert prompt_column is not None and response_column is not None
    if tokenizer is None and not (prompt_column.endswith("_ids") and response_column.endswith("_ids")):
        raise UsageError(
            f"{table.name} has text where token ids are wanted: give columns prompt_ids and token_ids, or a model.tokenizer"
        )
    id_column = table.first(("request_id", "id"))

    found: dict[Key, Rollout] = {}
    first_of_prompt: dict[bytes, str] = {}
    prompt_of_id: dict[str, bytes] = {}
    num_samples: dict[str, int] = {}
    num_empty = 0
    for index, record in enumerate(table.records):
        where = table.where(index)
        prompt = parse_prompt(record.get(prompt_column), where=where, column=prompt_column, key="score.responses")
        prompt_ids = _prompt_ids(prompt, tokenizer, where, chat_template, system)
        same_prompt = prompt_ids.tobytes()
        request_id = (
            str(record[id_column])
            if id_column and record.get(id_column) is not None
            else first_of_prompt.setdefault(same_prompt, str(index))
        )
        if prompt_of_id.setdefault(request_id, same_prompt) != same_prompt:
            raise UsageError(
                f"{where} has the id {request_id!r} of a row with another prompt: give every prompt of score.responses its own id"
            )
        sample = record.get("sample")
        sample = num_samples.get(request_id, 0) if sample is None else sample
        if not isinstance(sample, int) or sample < 0:
            raise UsageError(
                f"{where} has {sample!r} as its sample where a whole number from 0 is wanted: mend column sample of score.responses"
            )
        num_samples[request_id] = sample + 1
        if (request_id, sample) in found:
            raise UsageError(
                f"{where} repeats the id {request_id!r} and sample {sample} of an earlier row: number the samples of score.responses"
            )
        token_ids_T = _response_ids(record.get(response_column), tokenizer, where=where, column=response_column)
        if not len(token_ids_T):
            num_empty += 1  # it has had its sample number, so the others keep theirs
            continue
        logprobs_T = _logprobs(record.get("logprobs"), len(token_ids_T), where)
        meta = _meta(table, record, prompt, where)
        found[request_id, sample] = Rollout(
            request_id=request_id,
            sample=sample,
            prompt_ids=prompt_ids,
            token_ids_T=token_ids_T,
            text=_response_text(record, token_ids_T, tokenizer),
            logprobs_T=logprobs_T,
            kind=None if logprobs_T is None else _kind(record.get("logprob_kind", LogprobKind.raw.value), where),
            reward=meta.get("reward"),
            meta=meta,
        )
    if not found:
        raise UsageError(
            f"{table.name} has empty responses only: fill column {response_column}, or set score.responses to another file"
        )
    if num_empty:
        log.warning(
            "%s: %d of %d rows left out: their response is empty, nothing to score",
            table.name,
            num_empty,
            len(table.records),
        )
    if any(given.kind for given in found.values()) and "logprob_kind" not in table.columns:
        log.warning(
            "%s does not say in a column logprob_kind of which kind its logprobs are: they are taken for raw ones",
            table.name,
        )
    return list(found.values())


def _prompt_ids(prompt: Prompt, tokenizer: Any, where: str, chat_template: bool, system: str | None) -> np.ndarray:
    if is_ids(prompt):
        return np.asarray(prompt, np.int32)
    if tokenizer is None:
        raise UsageError(
            f"{where} has text as its prompt where token ids are wanted: give column prompt_ids of score.responses lists"
        )
    if isinstance(prompt, str) and chat_template and any(token in prompt for token in _special_tokens(tokenizer)):
        chat_template = False  # it has been through a template
    return encode_prompt(
        prompt, tokenizer, chat_template=chat_template or is_chat(prompt), system=system, where=where
    ).ids


def _special_tokens(tokenizer: Any) -> list[str]:
    return [tokenizer.decode([token_id]) for token_id in tokenizer.all_special_ids]


def _response_ids(value: Any, tokenizer: Any, *, where: str, column: str) -> np.ndarray:
    if value is None:
        raise UsageError(f"{where} has no response: fill column {column} of score.responses, or remove the row")
    if isinstance(value, str) and value:
        if tokenizer is None:
            raise UsageError(
                f"{where} has text as its response where token ids are wanted: give column token_ids of score.responses lists"
            )
        value = tokenizer(value, add_special_tokens=False, verbose=False)["input_ids"]
    elif value == "":
        value = []
    if not isinstance(value, list) or not all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    ):
        raise UsageError(
            f"{where} has a response that is neither text nor a list of token ids: mend column {column} of score.responses"
        )
    return np.asarray(value, np.int32)


def _response_text(record: Mapping[str, Any], token_ids_T: np.ndarray, tokenizer: Any) -> str:
    for name in RESPONSE_COLUMNS:
        if isinstance(record.get(name), str):
            return record[name]
    return "" if tokenizer is None else tokenizer.decode(token_ids_T.tolist(), skip_special_tokens=True)


def _logprobs(value: Any, num_tokens: int, where: str) -> np.ndarray | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(item, (int, float)) and not isinstance(item, bool) for item in value
    ):
        raise UsageError(
            f"{where} has logprobs that are not a list of numbers: mend or remove column logprobs of score.responses"
        )
    if len(value) != num_tokens:
        raise UsageError(
            f"{where} has {len(value)} logprobs for {num_tokens} response tokens: mend or remove column logprobs of score.responses"
        )
    return np.asarray(value, np.float32)


def _kind(value: Any, where: str) -> LogprobKind:
    names = [kind.value for kind in LogprobKind]
    if value not in names:
        raise UsageError(
            f"{where} has logprobs of an unknown kind: say in a column logprob_kind of score.responses which they are, {', '.join(names)}"
        )
    return LogprobKind(value)


def _meta(table: Table, record: Mapping[str, Any], prompt: Prompt, where: str) -> dict[str, Any]:
    meta: dict[str, Any] = {"question": question_of(prompt, record)}
    column = answer_column_of(table)
    if column is not None and (answer := answer_of(look_up(record, column), where=where)) is not None:
        meta["answer"] = answer
    meta.update({name: jsonable(record[name]) for name in ("reward", *GROUP_COLUMNS) if record.get(name) is not None})
    return meta

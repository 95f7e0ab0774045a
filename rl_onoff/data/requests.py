"""Rows -> prompts as an engine gets them: the one place where a prompt becomes tokens.

It prevents the two mistakes that silently change a model's answers: a chat template applied twice or not at all, and a
beginning-of-sequence token that is doubled (by a template and a tokenizer that both add it) or missing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from rl_onoff.config import DataConfig
from rl_onoff.data.prompts import Messages, Prompt, Row, is_chat, is_ids, parse_tools, text_of
from rl_onoff.errors import UsageError, one_line, plural
from rl_onoff.types import SampleRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt as an engine gets it and as people read it, with what else its row has."""

    id: str = ""
    ids: np.ndarray  # (P,) int32
    text: str  # after the chat template; never tokenised again
    meta: Mapping[str, Any] = field(default_factory=dict)  # question, answer and the group columns


def encode_rows(rows: Sequence[Row], data: DataConfig, tokenizer: Any) -> list[EncodedPrompt]:
    """The prompts of rows that `load_rows` has checked already."""
    tokenizer = with_template_kwargs(tokenizer, data.template_kwargs)
    encode = partial(encode_prompt, tokenizer=tokenizer, chat_template=data.chat_template, system=data.system)
    if data.chat_template and not _reads(tokenizer, "tools") and (lost := sum(bool(row.tools) for row in rows)):
        log.warning("the model's chat template reads no tools: those of %s are in no prompt", plural(lost, "row"))
    return [replace(encode(row.prompt, where=row.where, tools=row.tools), id=row.id, meta=row.meta) for row in rows]


def with_template_kwargs(tokenizer: Any, kwargs: Mapping[str, Any]) -> Any:
    """The tokenizer with `data.template_kwargs` in every chat template that it applies."""
    for name, value in kwargs.items():
        key = f"data.template_kwargs.{name}"
        if value is None:  # to a later run of the folder it would count as one that is not set
            raise UsageError(f"{key} is null: leave it out, or set it to false or []")
        if name in ("messages", "add_generation_prompt"):
            raise UsageError(f"{key} is set by rl_onoff itself: leave it out")
        if value != [] and tokenizer.chat_template and not _reads(tokenizer, name):
            raise UsageError(f"the model's chat template reads no {name}: leave {key} out, or set another model.name")
    given = {name: value for name, value in kwargs.items() if value != []}  # some templates take [] for tools
    bound = copy(tokenizer)
    bound.apply_chat_template = partial(tokenizer.apply_chat_template, **given)
    return bound


def _reads(tokenizer: Any, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)) is not None


def check_lengths(requests: Iterable[SampleRequest], max_len: int) -> None:
    """Refuse a prompt that leaves no room for one token in a context of `max_len`; a response that has room for fewer
    than max_new_tokens ends when the context is full."""
    for request in requests:
        if len(request.prompt_ids) >= max_len:
            why = f"the prompt of row {request.request_id!r} has {len(request.prompt_ids)} tokens"
            fix = "remove the row from data.path, or set model.name to a model with a longer context"
            raise UsageError(f"{why} and the model's context only {max_len}: {fix}")


def encode_prompt(
    prompt: Prompt,
    tokenizer: Any,
    *,
    chat_template: bool,
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    where: str = "the prompt",
) -> EncodedPrompt:
    """Text or chat messages -> token ids, with the template applied once and one BOS if the tokenizer wants one; token
    ids are taken as they are."""
    if is_ids(prompt):
        return EncodedPrompt(ids=np.asarray(prompt, np.int32), text=tokenizer.decode(prompt))
    messages = messages_of(prompt, system if chat_template else None)
    if chat_template:
        text = render(messages, tokenizer, {"tools": tools} if tools else {}, where)
    elif len(messages) > 1:
        why = f"{where} has {len(messages)} chat messages, and without a chat template only a single one can be sent"
        raise UsageError(f"{why} as it is: set data.chat_template=true")
    else:
        text = text_of(messages[0])
    ids, bos = tokenizer(text, add_special_tokens=not chat_template, verbose=False)["input_ids"], tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if bos is not None and ids[:1] != [bos] and tokenizer("")["input_ids"][:1] == [bos]:  # one goes before plain text
        ids = [bos, *ids]
    if not ids:
        raise UsageError(f"{where} has an empty prompt, of no tokens: remove it or fill its prompt (data.prompt)")
    return EncodedPrompt(ids=np.asarray(ids, np.int32), text=text)


@dataclass(frozen=True, slots=True)
class Texts:
    """How text becomes token ids in a file that has no ids."""

    tokenizer: Any = None  # None: text is refused
    chat_template: bool = False
    system: str | None = None
    tools: bool = True  # a row's own tools go to the chat template
    said: list[str] = field(default_factory=list)  # warnings, each of them said once

    def of_prompt(self, prompt: Any, where: str, tools: Any = None) -> np.ndarray:
        """The ids of a prompt; one that is text goes through the chat template, unless it has been through it."""
        if is_ids(prompt):
            return np.asarray(prompt, np.int32)
        tokenizer = self._tokenizer("prompt", "prompt_ids", where)
        special = (tokenizer.decode([i]) for i in tokenizer.all_special_ids)
        chat = is_chat(prompt) or (self.chat_template and not any(token in prompt for token in special))
        tools = parse_tools(tools, where) if self.tools and chat else None
        if tools and not _reads(tokenizer, "tools") and not self.said:
            self.said.append("tools")
            log.warning("the model's chat template reads no tools: those of the file's rows are in no prompt")
        return encode_prompt(prompt, tokenizer, chat_template=chat, system=self.system, tools=tools, where=where).ids

    def of_response(self, text: str, where: str) -> list[int]:
        """The ids of a response, whose text is taken as it is."""
        tokenizer = self._tokenizer("response", "token_ids", where)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def _tokenizer(self, what: str, column: str, where: str) -> Any:
        if self.tokenizer is None:
            why = f"{where} has text as its {what} where token ids are wanted"
            raise UsageError(f"{why}: give column {column} of score.responses lists, or set model.tokenizer")
        return self.tokenizer


def messages_of(prompt: Prompt, system: str | None) -> Messages:
    """The conversation that a chat template gets for text or chat messages."""
    messages = list(prompt) if is_chat(prompt) else [{"role": "user", "content": str(prompt)}]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def render(messages: Messages, tokenizer: Any, options: Mapping[str, Any], where: str) -> str:
    """The text that the chat template makes of a conversation, by default up to where the answer begins."""
    if not tokenizer.chat_template:
        why = f"the tokenizer {tokenizer.name_or_path} has no chat template, like a base model's"
        raise UsageError(f"{why}: set data.chat_template=false to send plain prompts, or model.name to a chat model")
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, "add_generation_prompt": True, **options})
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # templates are programs
        roles = ", ".join(message["role"] for message in messages)
        fix = "set data.system=null" if messages[0]["role"] == "system" else "fix it, or set data.chat_template=false"
        raise UsageError(
            f"the model's chat template refuses the roles {roles} of {where} ({one_line(error)}): {fix}"
        ) from error

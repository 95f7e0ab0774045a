"""Rollouts that trainers write as text alone: they can be scored, after tokenising once, and compared with nothing.

Tokenising again need not give the tokens that were sampled, and special tokens are lost where the trainer decoded
without them. To read one more such format, add a class here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar

from rl_onoff.data.columns import Format, Record, Row, apart
from rl_onoff.data.values import Wrong, total


class VerlText(Format):
    name, made_by = "verl-text", "verl's rollout_data_dir"
    marks = frozenset(("input", "output", "score", "step"))
    lost = ", and it was decoded without its special tokens"
    roles: ClassVar = {"prompt": "input", "text": "output", "reward": "score", "step": "step", "answer": "gts"}

    def recognises(self, record: Record, path: str) -> bool:
        return self.marks <= record.keys() and not record.keys() & {"token_ids", "prompt_ids", "prompts", "responses"}


class TrlText(Format):
    name, made_by = "trl-text", "TRL's log_completions"
    marks = frozenset(("step", "prompt", "completion", "advantage"))
    lost = ", and it was decoded without its special tokens"
    roles: ClassVar = {"prompt": "prompt", "text": "completion", "step": "step"}

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        rewards = [value for name, value in record.items() if name not in self.marks and isinstance(value, float)]
        for row in super().rows(record, step):
            yield row | {"text": reply(row["text"]), "reward": rewards[0] if len(rewards) == 1 else None}


class TrlDataset(Format):
    name, made_by, chat = "trl-dataset", "a prompt-completion data set of TRL", True
    roles: ClassVar = {"prompt": "prompt", "text": "completion"}

    def recognises(self, record: Record, path: str) -> bool:
        sides = [record.get("prompt"), record.get("completion")]
        return all(isinstance(side, list) and side and all(isinstance(each, dict) for each in side) for side in sides)

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        for row in super().rows(record, step):
            yield row | {"text": reply(row["text"])}


def reply(completion: Any) -> Any:
    """The text of a completion that is a list of one message."""
    if not isinstance(completion, list):
        return completion
    message = completion[0] if len(completion) == 1 and isinstance(completion[0], dict) else {}
    if message.get("role") != "assistant" or message.get("tool_calls") or not isinstance(message.get("content"), str):
        raise Wrong("a completion that is not one message of the assistant's text, whose tokens are not known", "text")
    return message["content"]


class SkyRlText(Format):
    name, made_by = "skyrl-text", "SkyRL's dump_eval_results"
    marks, left_out = frozenset(("input_prompt", "output_response")), ("aggregated_results.jsonl",)
    roles: ClassVar = {"prompt": "input_prompt", "text": "output_response", "data_source": "data_source"}

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        for row in super().rows(record, step):
            yield row | {"reward": total(record.get("score"))}


class Roll(Format):
    name, made_by, chat = "roll-text", "ROLL's rollout_dump_data", None
    lost = ", and it was decoded without its special tokens"
    roles: ClassVar = {"prompt": "prompt", "text": "responses", "reward": "scores", "answer": "ground_truth"}

    def recognises(self, record: Record, path: str) -> bool:
        responses = record.get("responses")
        return isinstance(responses, list) and all(isinstance(each, str) for each in responses) and "scores" in record

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        for sample in apart(record, "responses"):
            (row,) = super().rows(sample, step)
            with suppress(ValueError, TypeError):  # messages went through the chat template, as JSON or as they are
                messages = sample.get("messages")
                row["prompt"] = (json.loads(messages) if isinstance(messages, str) else messages) or row["prompt"]
            yield row | {"step": sample.get("global_step")}


class AReal(Format):
    name, made_by = "areal-text", "AReaL's dump_to_file"
    marks = frozenset(("head_version", "tail_version", "prompt", "completion"))
    roles: ClassVar = {
        "id": "task_id", "prompt": "prompt", "text": "completion", "reward": "reward", "step": "tail_version",
        "weight_version": "head_version",
    }  # fmt: skip


TEXT_FORMATS = (VerlText(), TrlText(), TrlDataset(), SkyRlText(), Roll(), AReal())

"""What trainers write -> rows of roles. To read one more format, add a class here; docs/rollouts.md lists them.

A row gives ids, mask and logprobs of a response (or of the whole sequence, and where in it the response starts), and
what else the file knows of it. A mask of 0 in a response is a token that a tool or the environment put there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from rl_onoff.data.columns import Columns, Format, Record, Row, apart, first_sampled, listed
from rl_onoff.data.text_formats import TEXT_FORMATS
from rl_onoff.data.values import LOGPROBS, Wrong, ids, number, numbers, total, whole
from rl_onoff.types import LogprobKind


class Verl(Columns):
    name, made_by, kind = "verl", "a DataProto of verl", LogprobKind.processed

    def recognises(self, record: Record, path: str) -> bool:
        lists = not isinstance(record.get("responses"), str | None) and "prompts" in record
        return lists and bool(record.keys() & {"response_mask", "attention_mask"})

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        scores = [record[name] for name in ("token_level_scores", "rm_scores") if record.get(name) is not None]
        for row in super().rows(record, step):
            yield row if row.get("reward") is not None or not scores else row | {"reward": total(scores[0])}


class Trl(Columns):
    name, made_by, kind = "trl", "a batch of TRL's GRPOTrainer", LogprobKind.processed
    marks = frozenset(("completion_ids", "completion_mask", "prompt_ids"))

    def recognises(self, record: Record, path: str) -> bool:
        return self.marks <= record.keys()

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        for row in super().rows(record, step):
            if record.get("prompt_mask") is not None and row.get("prompt_ids") is not None:  # padded on the left
                prompt, valid = ids(row["prompt_ids"], "prompt_ids"), numbers(record["prompt_mask"], "mask")
                row["prompt_ids"] = prompt[same_size(valid, prompt, "mask") > 0]
            if record.get("tool_mask") is not None and row.get("mask") is not None:
                valid, sampled = numbers(row["mask"], "mask"), numbers(record["tool_mask"], "mask")
                row["mask"] = valid * same_size(sampled, valid, "mask")
            yield row


def same_size(array: np.ndarray, other: np.ndarray, role: str) -> np.ndarray:
    if len(array) != len(other):
        raise Wrong(f"{len(array)} mask values for {len(other)} token ids", role)
    return array


class PrimeRl(Format):
    name, made_by = "prime-rl", "prime-rl's token export"
    marks = frozenset(("schema_version", "token_ids", "loss_mask", "inference_logprobs"))
    roles: ClassVar = {
        "token_ids": "token_ids", "mask": "loss_mask", "behaviour": "inference_logprobs", "target": "trainer_logprobs",
        "step": "step", "data_source": "env_name",
    }  # fmt: skip

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        for row in super().rows(record, step):
            mask, rewards = numbers(row["mask"], "mask"), record.get("rewards")
            row["start"] = first_sampled(mask)
            if isinstance(rewards, list) and len(set(map(repr, rewards))) == 1:  # one reward, told of every token
                row["reward"] = rewards[0]
            names = ("export_step", "rank", "export_sequence_idx")
            if all(isinstance(record.get(name), int) for name in names):
                row["id"] = "/".join(str(record[name]) for name in names)
            yield row


class Verifiers(Format):
    name, made_by = "verifiers", "the traces of verifiers and prime-rl"
    roles: ClassVar = {"token_ids": "token_ids", "mask": "mask", "behaviour": "logprobs", "target": "trainer_logprobs"}

    def recognises(self, record: Record, path: str) -> bool:
        traces = record.get("traces", [record])
        nodes = traces[0].get("nodes") if isinstance(traces, list) and traces and isinstance(traces[0], dict) else None
        return isinstance(nodes, list) and any(isinstance(node, dict) and "sampled" in node for node in nodes)

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        for trace in listed(record.get("traces", [record]), "traces"):
            agent = trace.get("agent")
            if isinstance(agent, Mapping) and agent.get("trainable") is False:
                continue  # another model, a judge for instance: not the policy
            rewards = trace.get("rewards")
            named = [each for each in rewards.values() if each] if isinstance(rewards, Mapping) else []
            parts = [(number(each.get("score")), number(each.get("weight", 1))) for each in listed(named, "reward")]
            scores = [score * weight for score, weight in parts if score is not None and weight is not None]
            for sample, path in enumerate(_paths(listed(trace.get("nodes"), "token_ids"))):
                row: Row = {role: [x for node in path for x in _spread(node, role)] for role in self.roles}
                row |= {"id": trace.get("id"), "sample": sample, "reward": sum(scores) if scores else None}
                missing = [role for role in LOGPROBS if all(node.get(self.roles[role]) is None for node in path)]
                yield row | dict.fromkeys(missing) | {"start": first_sampled(numbers(row["mask"], "mask"))}


def _paths(nodes: list[Record]) -> Iterator[list[Record]]:
    """Every way from a root to a leaf: the tokens that one call of the model saw and made."""
    parents = [node.get("parent") for node in nodes]
    for i, parent in enumerate(parents):
        if parent is not None and not (isinstance(parent, int) and 0 <= parent < i):
            raise Wrong(f"{parent!r} as the parent of node {i}, which is none before it", "token_ids")
    for leaf in sorted(set(range(len(nodes))) - set(parents)):
        at, path = leaf, []
        while at is not None:
            path.append(nodes[at])
            at = parents[at]
        yield path[::-1]


def _spread(node: Record, role: str) -> list[Any]:
    """A node's part of a row: logprobs stand at its sampled tokens alone, and others have none."""
    token_ids = ids(node.get("token_ids") or [], "token_ids").tolist()
    mask = (numbers(node.get("mask") or [], "mask") > 0).tolist() or [bool(node.get("sampled"))] * len(token_ids)
    if role in LOGPROBS:
        given = numbers(node.get(Verifiers.roles[role]) or [], role).tolist()
        if len(given) != sum(mask) and not (role == "target" and not given):
            raise Wrong(f"{len(given)} {role} logprobs for {sum(mask)} sampled tokens", role)
        values = iter(given)
        return [next(values, None) if sampled else None for sampled in mask]
    return token_ids if role == "token_ids" else mask


class NemoRl(Format):
    name, made_by = "nemo-rl", "NeMo-RL's train_data_step{N}.jsonl"
    marks = frozenset(("token_ids", "token_loss_mask", "generation_logprobs"))
    skipped = ("target",)  # prev_logprobs are all 0 where the trainer did not compute them
    roles: ClassVar = {
        "token_ids": "token_ids", "mask": "token_loss_mask", "behaviour": "generation_logprobs",
        "target": "prev_logprobs", "reward": "rewards",
    }  # fmt: skip

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        single = {name: _only(value) for name, value in record.items()}
        for row in super().rows(single, step):
            if single.get("input_lengths") is not None:  # padded on the right
                length = whole(single["input_lengths"], "input_lengths")
                for role in ("token_ids", "mask", *LOGPROBS):
                    row[role] = row[role][:length] if isinstance(row[role], list) else row[role]
            yield row | {"start": first_sampled(numbers(row["mask"], "mask"))}


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class Slime(Format):
    name, made_by, kind = "slime", "slime's or miles' save_debug_rollout_data", LogprobKind.scaled
    left_out = ("eval_*", "*_eval_*")
    roles: ClassVar = {
        "token_ids": "tokens", "mask": "loss_mask", "behaviour": "rollout_log_probs", "prompt": "prompt",
        "text": "response", "answer": "label", "length": "response_length",
    }  # fmt: skip

    def recognises(self, record: Record, path: str) -> bool:
        return _first_sample(record).keys() >= {"tokens", "response_length"}

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        for place, sample in enumerate(listed(record.get("samples"), "token_ids")):
            (row,) = super().rows(sample, step)
            at, tokens = record.get("rollout_id", step), ids(row["token_ids"], "token_ids")
            length = whole(row["length"], "response_length")
            if length > len(tokens):
                raise Wrong(f"a response_length of {length} and {len(tokens)} token ids", "response_length")
            reward, index = sample.get("reward"), sample.get("index")
            if isinstance(reward, Mapping):  # a reward function's parts: of one, it is the reward
                reward = next(iter(reward.values())) if len(reward) == 1 else reward.get("score")
            yield row | {
                "token_ids": tokens, "start": len(tokens) - length, "step": at, "reward": reward,
                "id": f"{at}/{place if index is None else index}", "weight_version": _oldest(sample),
            }  # fmt: skip


def _first_sample(record: Record) -> Record:
    samples = record.get("samples")
    return samples[0] if isinstance(samples, list) and samples and isinstance(samples[0], Mapping) else {}


def _oldest(sample: Record) -> Any:
    """The oldest weights that a token of a sample was drawn from."""
    versions = sample.get("weight_versions")
    return versions[0] if isinstance(versions, list) and versions else sample.get("weight_version")


class SlimeTrain(Format):
    name, made_by, kind = "slime-train", "slime's save_debug_train_data", LogprobKind.scaled
    roles: ClassVar = {
        "token_ids": "tokens", "mask": "loss_masks", "behaviour": "rollout_log_probs", "target": "log_probs",
        "length": "response_lengths", "reward": "rewards",
    }  # fmt: skip

    def recognises(self, record: Record, path: str) -> bool:
        first, columns = _first_sample(record), record.get("rollout_data")
        found = columns if isinstance(columns, Mapping) else first
        return found.keys() >= {"tokens", "response_lengths"}

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        at, columns = record.get("rollout_id", step), record.get("rollout_data")
        samples, rank = record.get("samples"), ""
        if isinstance(columns, Mapping):  # format_version 1: a file a rank, columns as lists
            samples, rank = apart(columns, "tokens"), f"{record.get('rank')}/"
        for place, sample in enumerate(listed(samples, "token_ids")):
            (row,) = super().rows(sample, step)
            tokens, length = ids(row["token_ids"], "token_ids"), whole(row["length"], "response_lengths")
            if length > len(tokens):
                raise Wrong(f"response_lengths of {length} and {len(tokens)} token ids", "response_lengths")
            index = sample.get("sample_index")
            yield row | {
                "token_ids": tokens, "start": len(tokens) - length, "step": at,
                "id": f"{at}/{rank}{place if index is None else index}",
            }  # fmt: skip


class SkyRl(Format):
    name, made_by, kind = "skyrl", "SkyRL's dump_data_batch", LogprobKind.raw
    marks = frozenset(("sequences", "attention_mask", "loss_mask"))
    roles: ClassVar = {
        "token_ids": "sequences", "mask": "loss_mask", "behaviour": "rollout_logprobs", "target": "action_log_probs",
        "attention": "attention_mask",
    }  # fmt: skip

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        """All is padded on the left (once: prompts on the left, responses on the right), and what belongs to a response
        is as wide as the longest and ends where the sequence does.
        """
        for row in super().rows(record, step):
            tokens = ids(row["token_ids"], "token_ids")
            valid = same_size(numbers(row.pop("attention"), "mask"), tokens, "mask") > 0
            mask = numbers(row["mask"], "mask")
            said = record.get("response_mask")
            response = mask if said is None else same_size(numbers(said, "mask"), mask, "mask")
            if len(mask) > len(tokens):
                raise Wrong(f"{len(mask)} mask values for {len(tokens)} token ids", "mask")
            skip = first_sampled(response)
            start = len(tokens) - len(mask) + skip
            kept = valid[start:]
            row["prompt_ids"], row["token_ids"] = tokens[:start][valid[:start]], tokens[start:][kept]
            for role in ("mask", *LOGPROBS):
                if row[role] is not None:
                    array = numbers(row[role], role)
                    if len(array) != len(mask):
                        raise Wrong(f"{len(array)} {role} values for {len(mask)} of the mask", role)
                    row[role] = array[skip:][kept]
            yield row | {"reward": total(record.get("rewards"))}


class OpenInstruct(Format):
    name, made_by = "open-instruct", "open-instruct's save_traces"
    marks, left_out = frozenset(("prompt_tokens", "response_tokens")), ("*_metadata.jsonl",)
    roles: ClassVar = {
        "prompt_ids": "prompt_tokens", "token_ids": "response_tokens", "behaviour": "logprobs", "mask": "response_mask",
        "reward": "reward", "step": "step", "data_source": "dataset",
    }  # fmt: skip

    def rows(self, record: Record, step: int | None) -> Iterator[Row]:
        info = record.get("request_info")
        if isinstance(info, Mapping) and info.get("tool_calleds") and record.get("response_mask") is None:
            raise Wrong("a tool's output in its response and no mask that tells it from the policy's tokens", "mask")
        for row in super().rows(record, step):
            names = [record.get(name) for name in ("step", "prompt_idx")]
            yield row | ({} if None in names else {"id": "/".join(map(str, names))})


FORMATS: tuple[Format, ...] = (
    PrimeRl(), Verifiers(), NemoRl(), OpenInstruct(), SkyRl(), Slime(), SlimeTrain(), *TEXT_FORMATS, Trl(), Verl(),
)  # fmt: skip

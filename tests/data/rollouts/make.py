"""Run: python tests/data/rollouts/make.py

Writes the reference files beside it. All hold the same three responses, as each framework lays them out; README.md says
from which source each layout was taken.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PAD, TOOL = 0, 0.0
PROMPTS = [[11, 12, 13], [11, 12, 13], [14]]
IDS = [[21, 22, 23, 2], [31, 32, 91, 92, 33, 2], [41]]  # 91 and 92 were put there by a tool
MASKS = [[1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1]]
Q = [[-0.5, -1.0, -1.5, -0.25], [-0.25, -2.0, TOOL, TOOL, -0.5, -0.125], [-3.0]]
P = [[-0.75, -1.25, -1.0, -0.5], [-0.5, -1.75, -9.0, -8.0, -0.25, -0.25], [-2.5]]
REWARDS = [1.0, 0.0, 0.5]
TEXTS = [("One two", " three four"), ("One two", " five"), ("A B C", " D")]
RESPONSES = ["".join(map(chr, ids)) for ids in IDS]  # the ids as a tokenizer of bytes reads them
CHATS = [[{"role": "user", "content": prompt}] for prompt, _ in TEXTS]
ALL = range(3)


def right(row: list[Any], width: int, value: Any = PAD) -> list[Any]:
    return row + [value] * (width - len(row))


def left(row: list[Any], width: int, value: Any = PAD) -> list[Any]:
    return [value] * (width - len(row)) + row


def whole(i: int, response: list[Any], value: Any) -> list[Any]:
    """What belongs to a response, with `value` for every token of its prompt."""
    return [value] * len(PROMPTS[i]) + response


def lines(name: str, rows: list[dict[str, Any]]) -> None:
    file = HERE / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def verl() -> dict[str, Any]:
    """A DataProto's tensors: prompts padded on the left, responses on the right."""
    return {
        "prompts": torch.tensor([left(PROMPTS[i], 4) for i in ALL]),
        "responses": torch.tensor([right(IDS[i], 8) for i in ALL]),
        "response_mask": torch.tensor([right(MASKS[i], 8) for i in ALL]),
        "attention_mask": torch.tensor([left([1] * len(PROMPTS[i]), 4) + right([1] * len(IDS[i]), 8) for i in ALL]),
        "rollout_log_probs": torch.tensor([right(Q[i], 8, -1.0) for i in ALL]),
        "old_log_probs": torch.tensor([right(P[i], 8, 0.0) for i in ALL]),
        "token_level_scores": torch.tensor([right([0.0] * (len(IDS[i]) - 1) + [REWARDS[i]], 8, 0.0) for i in ALL]),
    }


def trl() -> dict[str, Any]:
    return {
        "prompt_ids": torch.tensor([left(PROMPTS[i], 3) for i in ALL]),
        "prompt_mask": torch.tensor([left([1] * len(PROMPTS[i]), 3) for i in ALL]),
        "completion_ids": torch.tensor([right(IDS[i], 6) for i in ALL]),
        "completion_mask": torch.tensor([right([1] * len(IDS[i]), 6) for i in ALL]),
        "tool_mask": torch.tensor([right(MASKS[i], 6, 1) for i in ALL]),
        "sampling_per_token_logps": torch.tensor([right(Q[i], 6, 0.0) for i in ALL]),
        "old_per_token_logps": torch.tensor([right(P[i], 6, 0.0) for i in ALL]),
        "advantages": torch.tensor(REWARDS),
        "num_items_in_batch": torch.tensor(11),
    }


def prime_rl(i: int, step: int) -> dict[str, Any]:
    n = len(PROMPTS[i] + IDS[i])
    return {
        "schema_version": 1, "step": step, "export_step": step, "rank": 0, "micro_step": 0, "micro_sequence_idx": i,
        "export_sequence_idx": i, "run_id": None, "env_name": "gsm8k", "token_ids": PROMPTS[i] + IDS[i],
        "position_ids": list(range(n)), "loss_mask": [bool(m) for m in whole(i, MASKS[i], 0)],
        "advantages": [0.5] * n, "rewards": [REWARDS[i]] * n, "inference_logprobs": whole(i, Q[i], 0.0),
        "trainer_logprobs": [None, *whole(i, P[i], -4.0)[1:]], "entropy": [1.0] * n, "mismatch_kl": [0.1] * n,
    }  # fmt: skip


def node(parent: int | None, ids: list[int], mask: list[int], logprobs: list[float]) -> dict[str, Any]:
    return {
        "parent": parent, "message": {"role": "assistant" if any(mask) else "user", "content": "…"},
        "sampled": any(mask), "token_ids": ids, "mask": [bool(m) for m in mask], "logprobs": logprobs,
        "finish_reason": "stop" if any(mask) else None,
    }  # fmt: skip


def verifiers() -> list[dict[str, Any]]:
    """Two responses to one prompt are two leaves of a tree; a tool's message is a node nobody sampled."""
    tree = [
        node(None, PROMPTS[0], [0, 0, 0], []),
        node(0, IDS[0], MASKS[0], Q[0]),
        node(0, IDS[1][:2], [1, 1], Q[1][:2]),
        node(2, IDS[1][2:4], [0, 0], []),
        node(3, IDS[1][4:], [1, 1], Q[1][4:]),
    ]
    single = [node(None, PROMPTS[2], [0], []), node(0, IDS[2], [1], Q[2])]
    judge = {"id": "judge", "agent": {"name": "judge", "trainable": False}, "nodes": single}
    rewards = {"right": {"score": 0.5, "weight": 1.0}, "length": None}
    return [
        {"id": "e0", "traces": [{"id": "t0", "agent": {"trainable": True}, "nodes": tree, "rewards": {}}, judge]},
        {"id": "e1", "traces": [{"id": "t1", "agent": {"trainable": True}, "nodes": single, "rewards": rewards}]},
    ]


def slime(rollout_id: int) -> dict[str, Any]:
    samples = [
        {
            "group_index": i // 2, "index": i, "prompt": CHATS[i], "tokens": PROMPTS[i] + IDS[i],
            "multimodal_inputs": None, "response": RESPONSES[i], "response_length": len(IDS[i]), "label": "4",
            "reward": {"score": REWARDS[i], "length": 3.0} if i else REWARDS[i],
            "loss_mask": MASKS[i] if i == 1 else None, "weight_versions": ["3", "4"], "rollout_log_probs": Q[i],
            "remove_sample": False, "status": "completed", "metadata": {}, "spec_info": {}, "prefix_cache_info": {},
        }
        for i in ALL
    ]  # fmt: skip
    return {"rollout_id": rollout_id, "samples": samples}


def slime_train(version: int) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {
        "tokens": [torch.tensor(PROMPTS[i] + IDS[i]) for i in ALL],
        "response_lengths": [len(ids) for ids in IDS],
        "total_lengths": [len(PROMPTS[i] + IDS[i]) for i in ALL],
        "loss_masks": [torch.tensor(mask, dtype=torch.int32) for mask in MASKS],
        "rollout_log_probs": [torch.tensor(q) for q in Q],
        "log_probs": [torch.tensor(p) for p in P],
        "rewards": REWARDS,
    }
    if version == 1:
        return {"rollout_id": 5, "rank": 0, "rollout_data": columns | {"partition": list(ALL)[:2]}}
    samples = [{name: column[i] for name, column in columns.items()} | {"sample_index": i} for i in ALL]
    return {"format_version": 2, "rollout_id": 5, "samples": samples, "dp_shards": [], "raw_reward": REWARDS}


def nemo_rl(i: int, trained: bool) -> dict[str, Any]:
    def one(row: list[Any], value: Any) -> list[list[Any]]:
        return [right(row, 10, value)]

    return {
        "content": ["…"], "rewards": [REWARDS[i]], "input_lengths": [len(PROMPTS[i] + IDS[i])],
        "token_ids": one(PROMPTS[i] + IDS[i], 2), "token_loss_mask": one(whole(i, MASKS[i], 0), 0),
        "sample_loss_mask": [1.0], "advantages": one([0.1] * len(IDS[i]), 0.0),
        "generation_logprobs": one(whole(i, Q[i], 0.0), 0.0),
        "prev_logprobs": one(whole(i, P[i], 0.0) if trained else [], 0.0), "idx": i,
    }  # fmt: skip


def skyrl(older: bool) -> Any:
    """A pickled batch. Older versions pad prompts on the left and responses on the right, newer ones the whole."""

    def of_response(rows: list[list[Any]]) -> torch.Tensor:
        return torch.tensor([right(row, 6) if older else left(row, 6) for row in rows], dtype=torch.float32)

    def sequence(i: int, prompt: list[int], response: list[int]) -> list[int]:
        return left(prompt, 3) + right(response, 6) if older else left(prompt + response, 9)

    batch = TrainingInputBatch(
        sequences=torch.tensor([sequence(i, PROMPTS[i], IDS[i]) for i in ALL]),
        attention_mask=torch.tensor([sequence(i, [1] * len(PROMPTS[i]), [1] * len(IDS[i])) for i in ALL]),
        loss_mask=of_response(MASKS),
        response_mask=of_response([[1] * len(ids) for ids in IDS]),
        rollout_logprobs=of_response(Q),
        action_log_probs=of_response(P),
        values=None,
    )
    batch.older = older
    return batch


class TrainingInputBatch(dict):
    older = False

    def __getstate__(self) -> dict[str, Any]:
        saved = {}
        for name, value in self.items():
            torch.save(value, buffer := io.BytesIO())
            saved[name] = buffer.getvalue()
        return {"batch_dict": saved, "batch_size": 3, "device": torch.device("cpu"), "metadata": {"uids": ["a", "b"]}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.older:  # the items stand in the pickle a second time
            return super().__reduce_ex__(protocol)
        return self.__class__, (), self.__getstate__()


def open_instruct(i: int) -> dict[str, Any]:
    """Its file has no mask, so the tool's tokens are left out here."""
    kept = [t for t, m in enumerate(MASKS[i]) if m]
    return {
        "step": 7, "sample_idx": i, "prompt_idx": i // 2, "prompt_tokens": PROMPTS[i],
        "response_tokens": [IDS[i][t] for t in kept], "reward": REWARDS[i], "advantage": 0.1, "finish_reason": "stop",
        "dataset": "gsm8k", "ground_truth": [1, 2], "request_info": {"tool_calleds": False},
        "logprobs": [Q[i][t] for t in kept],
    }  # fmt: skip


def texts() -> None:
    """What is text alone."""
    for step in (1, 2, 10):
        rows = [
            {"input": prompt, "output": text, "gts": "4", "score": REWARDS[i], "step": step, "request_id": f"r{i}"}
            for i, (prompt, text) in enumerate(TEXTS)
        ]
        lines(f"verl-text/{step}.jsonl", rows)
    lines(
        "trl-dataset.jsonl",
        [{"prompt": CHATS[i], "completion": [{"role": "assistant", "content": TEXTS[i][1]}]} for i in ALL],
    )
    rows = [
        {"input_prompt": prompt, "output_response": text, "score": [0.0, REWARDS[i]] if i else REWARDS[i],
         "stop_reason": "stop", "env_class": "gsm8k", "env_extras": {}, "data_source": "gsm8k"}
        for i, (prompt, text) in enumerate(TEXTS)
    ]  # fmt: skip
    lines("skyrl-text/global_step_4_evals/gsm8k.jsonl", rows)
    lines("skyrl-text/global_step_4_evals/aggregated_results.jsonl", [{"eval/all/avg_score": 0.5}])
    columns = {
        "id": ["0", "1", "2"], "prompt": [prompt for prompt, _ in TEXTS], "messages": [json.dumps(c) for c in CHATS],
        "ground_truth": ["4"] * 3, "responses": [text for _, text in TEXTS], "scores": REWARDS, "global_step": [3] * 3,
    }  # fmt: skip
    lines("roll-text/rollout_dump_data.step_3.jsonl", [columns])
    for i, (prompt, text) in enumerate(TEXTS):
        row = {
            "task_id": i, "sample_idx": 0, "seqlen": 7, "prompt_len": 3, "head_version": 5, "tail_version": 6,
            "reward": REWARDS[i], "prompt": prompt, "completion": text,
        }  # fmt: skip
        lines(f"areal-text/6/{i}.jsonl", [row])


def main() -> None:
    torch.save(verl(), HERE / "verl.pt")
    lists = {name: column.tolist() for name, column in verl().items()}
    rows = [{"uid": f"row-{i}", **{name: column[i] for name, column in lists.items()}} for i in ALL]
    lines("verl.jsonl", rows)
    torch.save(trl(), HERE / "trl.pt")
    for step in (9, 10):
        lines(f"prime-rl/step_{step}/rank_0.jsonl", [prime_rl(i, step) for i in ALL])
        (HERE / f"prime-rl/step_{step}/STABLE").touch()
    lines("verifiers/step_3/train/gsm8k/traces.jsonl", verifiers())
    (HERE / "slime").mkdir(exist_ok=True)
    for name, rollout_id in (("2", 2), ("10", 10), ("eval_2", 2)):
        torch.save(slime(rollout_id), HERE / f"slime/{name}.pt")
    torch.save(slime_train(1), HERE / "slime-train_5_0.pt")
    torch.save(slime_train(2), HERE / "slime-train.pt")
    lines("nemo-rl/train_data_step8.jsonl", [nemo_rl(i, True) for i in ALL])
    lines("nemo-rl-skipped.jsonl", [nemo_rl(i, False) for i in ALL])
    lines("open-instruct/run_rollouts_000000.jsonl", [open_instruct(i) for i in ALL])
    lines("open-instruct/run_metadata.jsonl", [{"run_name": "run", "git_commit": "0", "model_name": "m"}])
    module: Any = types.ModuleType("skyrl_train.training_batch")
    sys.modules["skyrl_train"], sys.modules[module.__name__] = types.ModuleType("skyrl_train"), module
    module.TrainingInputBatch, TrainingInputBatch.__module__ = TrainingInputBatch, module.__name__
    for older, name in ((False, "global_step_6_training_input"), (True, "global_step_6_older")):
        (HERE / f"skyrl-{name}.pkl").write_bytes(pickle.dumps(skyrl(older)))
    texts()


if __name__ == "__main__":
    main()

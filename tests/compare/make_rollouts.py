"""Makes rollouts.npz for test_checks: run it from the repository's root; ten minutes on two cores.

500 responses of SmolLM2 in bfloat16, 125 at each temperature, to the built-in problems, and 125 with top_p=0.9.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from rl_onoff.backends import BaseBackend, create_backend
from rl_onoff.types import Rollout, SampleRequest, Sampling, Want, sample_requests

TEMPERATURES = (0.3, 0.6, 1.0, 1.3)


def backend(dtype: str) -> BaseBackend:
    return create_backend(
        {"backend_type": "huggingface", "model_name": "smollm2", "backend_specific": {"dtype": dtype}}
    )


def ask(model: BaseBackend, sampling: Sampling) -> list[SampleRequest]:
    lines = Path("rl_onoff/data/problems.jsonl").read_text().splitlines()
    tokenizer, requests = model.get_tokenizer(), []
    for i in range(125):
        message = {"role": "user", "content": json.loads(lines[i])["question"]}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
        own = replace(sampling, seed=sampling.seed + i, max_new_tokens=16 + 7 * i % 64)
        requests += sample_requests(id=str(i), prompt_ids=ids, sampling=own)
    return requests


def joined(model: BaseBackend, rollouts: list[Rollout], name: str, sampler: Sampling | None = None) -> np.ndarray:
    found = {scores.key: getattr(scores, name) for scores in model.score(rollouts, Want(sampler=sampler))}
    return np.concatenate([found[rollout.key] for rollout in rollouts])


def main() -> None:
    out, drawn = {}, {}
    with backend("bfloat16") as model:
        for temperature in TEMPERATURES:
            sampler = Sampling(temperature=temperature)
            rollouts = drawn[temperature] = list(model.complete(ask(model, replace(sampler, seed=1000))))
            out[f"ids_{temperature}"] = np.concatenate([r.token_ids_T for r in rollouts])
            out[f"lengths_{temperature}"] = np.array([len(r.token_ids_T) for r in rollouts])
            out[f"drawn_{temperature}"] = np.concatenate([r.logprobs_T for r in rollouts])
            out[f"bf16_{temperature}"] = joined(model, rollouts, "logprobs_T")
            out[f"scaled_{temperature}"] = joined(model, rollouts, "processed_logprobs_T", sampler)
        sampler = Sampling(top_p=0.9)
        cut = list(model.complete(ask(model, replace(sampler, seed=5))))
        out["cut_ids"] = np.concatenate([r.token_ids_T for r in cut])
        out["cut_lengths"] = np.array([len(r.token_ids_T) for r in cut])
        out["cut_processed"] = joined(model, cut, "processed_logprobs_T", sampler)
    with backend("float32") as model:
        out |= {f"f32_{temperature}": joined(model, rows, "logprobs_T") for temperature, rows in drawn.items()}
        out["cut_f32"] = joined(model, cut, "logprobs_T")
    np.savez_compressed(Path(__file__).parent / "rollouts.npz", **out)


if __name__ == "__main__":
    main()

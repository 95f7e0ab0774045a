"""TRL's GRPOTrainer on the tests' tiny model: what its callback leaves is what its own numbers say."""

import json
import warnings

import numpy as np
import pytest

from rl_onoff.rundir.table import RunDir, rollout_of, scores_of


def sample(prompts, trainer):
    """A sampler in place of vLLM: draws from the model and gives the logprobs of a slightly warmer one."""
    import torch

    tokenizer, ids = trainer.processing_class, []
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    logprobs = []
    for prompt in prompt_ids:
        drawn = []
        row = torch.tensor([prompt])
        told = []
        for _ in range(12):
            with torch.no_grad():
                logits = trainer.model(row).logits[0, -1]
            token = int(torch.multinomial(logits.softmax(-1), 1))
            told.append(float((logits * 0.99).log_softmax(-1)[token]))
            drawn.append(token)
            row = torch.cat([row, torch.tensor([[token]])], dim=1)
        ids.append(drawn)
        logprobs.append(told)
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": logprobs}


@pytest.mark.parametrize("iterations", [2, 1])
def test_a_real_grpo_run(tiny_llama, tmp_path, caplog, iterations):
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rl_onoff.integrations.trl import monitor_callback

    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        max_steps=2 * iterations, num_iterations=iterations, report_to=[], logging_steps=1, save_strategy="no",
        use_cpu=True, bf16=False, seed=3,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_llama), args=args, rollout_func=sample,
            processing_class=AutoTokenizer.from_pretrained(tiny_llama),
            reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
            train_dataset=Dataset.from_dict({"prompt": ["One two", "Red green", "Cat dog", "Up down"]}),
        )  # fmt: skip
        trainer.add_callback(monitor_callback(trainer, tmp_path / "run", keep=3))
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "onoff/kl_k3" in entry]
    if iterations == 1:  # TRL computes no logprobs of its own here
        assert not logged and "num_iterations" in caplog.text
        return
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert [entry["onoff/kl_k3"] for entry in logged] == [line["onoff/kl_k3"] for line in lines]
    assert all(line["onoff/responses"] == 4 and line["onoff/tokens"] == 48 for line in lines)
    run = RunDir(tmp_path / "run")
    rollouts = {r.key: r for r in map(rollout_of, run.completions.rows())}
    scores = {s.key: s for s in map(scores_of, run.scores("trainer").rows())}
    assert len(rollouts) == 6 and rollouts.keys() == scores.keys()
    gaps = [scores[key].logprobs_T - rollout.logprobs_T for key, rollout in rollouts.items()]
    assert all(len(gap) == 12 for gap in gaps) and 1e-4 < np.abs(np.concatenate(gaps)).mean() < 0.1
    assert {rollout.meta["step"] for rollout in rollouts.values()} == {1, 3}

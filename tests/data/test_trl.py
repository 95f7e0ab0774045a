"""A real GRPOTrainer writes its completions; they are read and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl_onoff.data.rollouts import load_responses, open_rollouts
from rl_onoff.errors import UsageError


@pytest.fixture(scope="module")
def trained(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    folder = tmp_path_factory.mktemp("grpo")
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        log_completions=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    prompts = Dataset.from_dict({"prompt": ["One two three", "The quick brown fox"]})
    GRPOTrainer(model=tiny_llama, reward_funcs=length, args=config, train_dataset=prompts).train()
    return folder / "completions"


def test_what_grpo_trainer_logs_is_read(trained: Path, tiny_llama: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert [file.name for file in sorted(trained.iterdir())] == [
        "completions_00001.parquet",
        "completions_00002.parquet",
    ]
    found = list(load_responses(str(trained), tokenizer, chat_template=True))
    assert found and {given.meta["step"] for given in found} == {1, 2}
    for given in found:
        assert tokenizer.decode(given.prompt_ids) in ("One two three", "The quick brown fox"), "no chat template"
        assert tokenizer.decode(given.token_ids_T) == given.text and given.reward == len(given.text)
    assert "completions is text, which is tokenised once" in caplog.text
    with pytest.raises(UsageError, match=r"completions is of TRL's log_completions, which is text"):
        open_rollouts(str(trained), key="compare.behaviour", columns={})

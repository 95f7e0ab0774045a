"""TRL's GRPOTrainer, watched while it trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rl_onoff.monitor import Monitor

log = logging.getLogger(__name__)


def monitor_callback(trainer: Any, folder: str | Path, **options: Any) -> Any:
    """A TrainerCallback that feeds a Monitor: `trainer.add_callback(monitor_callback(trainer, "outputs/grpo"))`.

    `options` are those of Monitor. The metrics of a step (`onoff/kl_k3` and the like) go where TRL logs its own. TRL
    has both sides' logprobs with `use_vllm=True`, and with a `rollout_func` that returns logprobs where generation and
    optimisation are not aligned (`num_iterations=2`, for example).
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def __init__(self) -> None:
            self.monitor = Monitor(folder, **options) if trainer.accelerator.is_main_process else None
            self.seen: Any = None
            self.warned = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            batches = trainer._buffered_inputs
            if self.monitor is None or batches is None or batches is self.seen:
                return
            self.seen, found = batches, {}  # drawn once, trained on in several steps
            for batch in batches:
                if batch.get("sampling_per_token_logps") is None or batch.get("old_per_token_logps") is None:
                    if not self.warned:
                        self.warned = True
                        log.warning(
                            "TRL keeps no logprobs of its sampler or of its trainer for this batch: set use_vllm=True,"
                            " or a rollout_func that returns logprobs, with num_iterations=2"
                        )
                    return
                mask = batch["completion_mask"]
                found = self.monitor.add(
                    step=state.global_step,
                    token_ids=batch["completion_ids"],
                    behaviour_logprobs=batch["sampling_per_token_logps"],
                    target_logprobs=batch["old_per_token_logps"],
                    mask=mask * batch["tool_mask"] if "tool_mask" in batch else mask,
                    prompt_ids=[
                        ids[own > 0] for ids, own in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
                    ],
                )
            for name, value in found.items():
                trainer._metrics["train"][name].append(value)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return Callback()

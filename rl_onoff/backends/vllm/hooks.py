"""The code of ours that vLLM imports: `StatsExtension` into its workers, `capped_scheduler` into its core.

Both of vLLM's model runners are known (0.32): V1, whose `_get_prompt_logprobs_dict` is called after every step, and V2,
whose `prompt_logprobs_worker` is. These are insides that may move: the backend compares a short sequence with the
public API when it loads, and takes the public API where they do not agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rl_onoff.backends.vllm.recorder import JOB, Batch, Head, Recorder
from rl_onoff.types import Want

if TYPE_CHECKING:
    from torch import Tensor

EXTENSION = f"{__name__}.StatsExtension"
SCHEDULER = f"{__name__}.capped_scheduler"


class StatsExtension:
    """What vLLM mixes into its worker class; only `collective_rpc` calls it."""

    model_runner: Any
    vllm_config: Any

    def rl_onoff_install(self) -> str:
        """Hook the model runner of this worker; returns which one it is."""
        from vllm.distributed import get_tensor_model_parallel_rank

        vocab_size = self.vllm_config.model_config.get_vocab_size()
        self._rl_onoff = Recorder(vocab_size, get_tensor_model_parallel_rank() == 0)
        return hook(self.model_runner, self._rl_onoff)

    def rl_onoff_begin(self, want: bytes, folder: str) -> None:
        self._rl_onoff.begin(msgspec.msgpack.decode(want, type=Want), Path(folder))

    def rl_onoff_fetch(self, numbers: list[int]) -> bytes:
        return self._rl_onoff.fetch(numbers)

    def rl_onoff_end(self) -> None:
        self._rl_onoff.end()


def hook(runner: Any, recorder: Recorder) -> str:
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        _hook_v1(runner, recorder)
        return "V1"
    if hasattr(runner, "prompt_logprobs_worker"):
        if runner.prompt_logprobs_worker is not None:  # None on all but the last pipeline stage
            _hook_v2(runner.prompt_logprobs_worker, recorder)
        return "V2"
    raise RuntimeError(f"vLLM's {type(runner).__name__} is neither of the model runners that rl_onoff can hook")


def _hook_v1(runner: Any, recorder: Recorder) -> None:
    original = runner._get_prompt_logprobs_dict

    def batch(num_scheduled: Mapping[str, int]) -> Batch:
        for request_id, num_tokens in num_scheduled.items():
            request = runner.requests[request_id]
            job = (request.sampling_params.extra_args or {}).get(JOB)
            if job is not None:
                offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
                yield job, request.num_computed_tokens, num_tokens, offset

    def hooked(hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        recorder.step(hidden_states, runner.model.compute_logits, batch(num_scheduled_tokens))
        return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = hooked


def _hook_v2(worker: Any, recorder: Recorder) -> None:
    add_request, remove_request, compute = worker.add_request, worker.remove_request, worker.compute_prompt_logprobs
    jobs: dict[str, Mapping[str, Any]] = {}

    def hooked_add(req_id: str, req_idx: int, sampling_params: Any) -> Any:
        job = (sampling_params.extra_args or {}).get(JOB)
        if job is not None:
            jobs[req_id] = job
        return add_request(req_id, req_idx, sampling_params)

    def hooked_remove(req_id: str) -> Any:
        jobs.pop(req_id, None)
        return remove_request(req_id)

    def batch(input_batch: Any) -> Batch:
        for i, req_id in enumerate(input_batch.req_ids):
            if req_id in jobs:
                first, num_tokens = input_batch.num_computed_prefill_tokens_np[i], input_batch.num_scheduled_tokens[i]
                yield jobs[req_id], int(first), int(num_tokens), int(input_batch.query_start_loc_np[i])

    def hooked_compute(logits_fn: Head, hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.step(hidden_states, logits_fn, batch(input_batch))
        return compute(logits_fn, hidden_states, input_batch, *args, **kwargs)

    worker.add_request, worker.remove_request, worker.compute_prompt_logprobs = (
        hooked_add,
        hooked_remove,
        hooked_compute,
    )


def capped_scheduler(**kwargs: Any) -> Any:
    """vLLM's own scheduler, in which a job may share the cached blocks of its prompt but not those of its response.

    Rows of cached tokens are never computed, so without the cap the second of two like responses would lack some. Where
    this inside of vLLM has moved, rows are missing, which is seen, and those responses are scored again with the cache
    off.
    """
    config = kwargs["vllm_config"].scheduler_config
    if config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Scheduler
    else:
        from vllm.v1.core.sched.scheduler import Scheduler
    scheduler = Scheduler(**kwargs)
    manager = getattr(scheduler, "kv_cache_manager", None)
    original = getattr(manager, "get_computed_blocks", None)
    if manager is not None and original is not None:

        def get_computed_blocks(request: Any) -> Any:
            job = (request.sampling_params.extra_args or {}).get(JOB) if request.sampling_params is not None else None
            return original(request if job is None else _Shorter(request, job["first"] + 1))

        manager.get_computed_blocks = get_computed_blocks
    return scheduler


class _Shorter:
    """A request that says it has fewer tokens; vLLM looks for cached blocks in all but the last of them."""

    def __init__(self, request: Any, num_tokens: int):
        self._request, self.num_tokens = request, num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

"""The code of ours that vLLM runs: `StatsExtension` in its workers, `capped_scheduler` in its core.

A request carries its job in `SamplingParams.extra_args`; in each step a Recorder computes the statistics of the jobs
from vLLM's own hidden states. They are fetched as bytes, full logits through a file that both sides map.

Both of vLLM's model runners are known: V1, whose `_get_prompt_logprobs_dict` is called after every step, and V2, whose
`prompt_logprobs_worker` is. Run with 0.32 (V1 on a CPU); 0.33's source has the same calls and was not run. These are
insides that may move: the backend compares a short sequence with the public API when it loads, and takes the public API
where they do not agree.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.layers import states_name
from rl_onoff.backends.token_stats import PartialScores, Span, StatsBuffer, chunk_rows, read_logits
from rl_onoff.backends.vllm.layers import Batch, StepLayers
from rl_onoff.types import Rollout, TokenScores, Want

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# the options by which statistics get into the engine
HOOKS = {"worker_extension_cls": f"{__name__}.StatsExtension", "scheduler_cls": f"{__name__}.capped_scheduler"}
JOB = "rl_onoff"  # the key in extra_args
Head = Callable[["Tensor"], "Tensor | None"]


def job_of(number: int, response: Rollout, want: Want | None = None) -> dict[str, Any]:
    """extra_args of a request that prefills `prompt + response[:-1]`: row t is the position before response token t."""
    ids = np.asarray(response.token_ids_T, np.int32).tobytes()
    job: dict[str, Any] = {"number": number, "first": len(response.prompt_ids) - 1, "ids": ids}
    if want is not None and want.layers is not None:
        job |= {"states": states_name(response), "length": response.num_tokens - 1}
    return {JOB: job}


def _job_in(params: Any) -> Mapping[str, Any] | None:
    """The job that SamplingParams carry."""
    return (params.extra_args or {}).get(JOB) if params is not None else None


def read(encoded: bytes, folder: Path) -> dict[int, TokenScores]:
    """What `fetch` sent: statistics by job number."""
    results: dict[int, TokenScores] = {}
    for number, arrays in pickle.loads(encoded).items():
        if (file := folder / str(number)).exists():
            arrays["logits_TV"] = read_logits(file, len(arrays["token_ids_T"]))
            file.unlink()  # the mapping keeps the pages until the array is dropped
        results[number] = TokenScores(**arrays)
    return results


class StatsExtension:
    """What vLLM mixes into its worker class; only `collective_rpc` calls it. Its first call hooks the model runner."""

    model_runner: Any
    vllm_config: Any

    def rl_onoff_begin(self, want: bytes, folder: str) -> None:
        if not hasattr(self, "_rl_onoff"):
            from vllm.distributed import get_tensor_model_parallel_rank

            model = self.vllm_config.model_config
            recorder = Recorder(model.get_vocab_size(), get_tensor_model_parallel_rank() == 0)
            coming = hook(self.model_runner, recorder)
            recorder.layers = StepLayers(self.model_runner.model, model.hf_config, coming)
            self._rl_onoff = recorder
        self._rl_onoff.begin(pickle.loads(want), Path(folder))

    def rl_onoff_fetch(self, numbers: list[int]) -> bytes:
        return self._rl_onoff.fetch(numbers)


class Recorder:
    """Computes the statistics of the jobs in each step's batch. The same on both runners."""

    layers: StepLayers | None = None

    def __init__(self, vocab_size: int, keeps: bool):
        # keeps: the first rank of a tensor parallel group; the others only take part in the LM head
        self._vocab_size, self._keeps = vocab_size, keeps
        self.begin(None, Path())

    def begin(self, want: Want | None, folder: Path) -> None:
        """Record from now on; with None nothing, and generation pays nothing."""
        self._want, self._folder, self._error = want, folder, ""
        self._scores: dict[int, PartialScores] = {}  # by job number; drops what an abandoned call left
        self._computed: tuple[StatsBuffer, list[Span]] | None = None  # in the last step
        if self.layers is not None:
            self.layers.begin(want and want.layers)

    def fetch(self, numbers: list[int]) -> bytes:
        """Statistics by job number, of those jobs of which every row was computed."""
        if self._error:
            raise RuntimeError(self._error)
        self._take_in(None)
        found = {number: self._scores.pop(number) for number in numbers if number in self._scores}
        arrays = {number: scores.arrays for number, scores in found.items() if scores.complete}
        return pickle.dumps({n: of | (self.layers.found(n) if self.layers else {}) for n, of in arrays.items()})

    def step(self, hidden_ND: Tensor, head: Head, batch: Batch) -> None:
        """Take in one step: hidden_ND are the last hidden states of the batch's tokens, `head` the LM head."""
        if self._want is None or self._error:
            return
        import torch

        try:
            if self.layers is not None:
                self.layers.last(hidden_ND)
            spans: list[Span] = []
            ids: list[np.ndarray] = []
            hidden: list[Tensor] = []
            row = 0
            for job, first, num_tokens, offset in batch:
                number, before, ids_T = job["number"], job["first"], np.frombuffer(job["ids"], np.int32)
                start, stop = max(before, first), min(before + len(ids_T), first + num_tokens)
                if start < stop:
                    if self._keeps:
                        file = self._folder / str(number) if self._want.full_logits else None
                        scores = self._scores.setdefault(number, PartialScores(len(ids_T), self._want, file))
                        spans.append(Span(scores, row, row + stop - start, start - before))
                    ids.append(ids_T[start - before : stop - before])
                    hidden.append(hidden_ND[offset + start - first : offset + stop - first])
                    row += stop - start
            if not ids:
                return
            # rows of all requests together: the LM head likes full chunks, and every rank must cut them alike
            ids_R, hidden_RD = torch.from_numpy(np.concatenate(ids)).to(hidden_ND.device), torch.cat(hidden)
            size, want = chunk_rows(self._vocab_size, hidden_ND.device.type), replace(self._want, full_logits=False)
            buffer = StatsBuffer(row, want)
            with torch.inference_mode():
                for at in range(0, row, size):
                    logits_RV = head(hidden_RD[at : at + size])
                    if self._keeps and logits_RV is not None:
                        buffer.add(logits_RV, ids_R[at : at + size])
                        for span in spans:
                            span.write_logits(at, logits_RV)
            if buffer.complete:
                self._take_in((buffer.send(), spans))
        except Exception as e:  # the engine must not die of it: the error is raised by `fetch`, on our side
            log.exception("token statistics failed inside vLLM")
            self._error = f"{type(e).__name__}: {e}"

    def _take_in(self, computed: tuple[StatsBuffer, list[Span]] | None) -> None:
        """Give the responses what the last step computed, while the GPU is busy with this one's."""
        last, self._computed = self._computed, computed
        if last is not None:
            buffer, spans = last
            scores = buffer.scores()
            for span in spans:
                span.put(scores)


def hook(runner: Any, recorder: Recorder) -> Callable[[], Batch]:
    """Record the runner's steps; returns what gives the batch of a step that has only begun."""
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        return _hook_v1(runner, recorder)
    if not hasattr(runner, "prompt_logprobs_worker"):
        raise RuntimeError(f"vLLM's {type(runner).__name__} is neither of the model runners that rl_onoff can hook")
    if runner.prompt_logprobs_worker is None:  # on all but the last pipeline stage
        return lambda: iter(())
    return _hook_v2(runner, runner.prompt_logprobs_worker, recorder)


def _hook_v1(runner: Any, recorder: Recorder) -> Callable[[], Batch]:
    original = runner._get_prompt_logprobs_dict

    def batch(num_scheduled: Mapping[str, int]) -> Batch:
        for request_id, num_tokens in num_scheduled.items():
            request = runner.requests[request_id]
            if (job := _job_in(request.sampling_params)) is not None:
                offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
                yield job, request.num_computed_tokens, num_tokens, offset

    def hooked(hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        recorder.step(hidden_states, runner.model.compute_logits, batch(num_scheduled_tokens))
        return original(hidden_states, num_scheduled_tokens)

    def coming() -> Batch:
        starts, ids = runner.query_start_loc.np, runner.input_batch.req_ids
        return batch({request_id: int(starts[i + 1] - starts[i]) for i, request_id in enumerate(ids)})

    runner._get_prompt_logprobs_dict = hooked
    return coming


def _hook_v2(runner: Any, worker: Any, recorder: Recorder) -> Callable[[], Batch]:
    prepare, prepared = runner.prepare_inputs, list[Any]()  # the latter: the batch of the step that has begun
    add_request, remove_request, compute = worker.add_request, worker.remove_request, worker.compute_prompt_logprobs
    jobs: dict[str, Mapping[str, Any]] = {}

    def hooked_add(req_id: str, req_idx: int, sampling_params: Any) -> Any:
        if (job := _job_in(sampling_params)) is not None:
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

    def hooked_prepare(*args: Any, **kwargs: Any) -> Any:  # written from vLLM 0.32's source and not run
        prepared[:] = [prepare(*args, **kwargs)]
        return prepared[0]

    runner.prepare_inputs = hooked_prepare
    worker.add_request, worker.remove_request = hooked_add, hooked_remove
    worker.compute_prompt_logprobs = hooked_compute
    return lambda: batch(prepared[0])


def capped_scheduler(**kwargs: Any) -> Any:
    """vLLM's own scheduler, in which a job may share the cached blocks of its prompt but not those of its response.

    Rows of cached tokens are never computed, so without the cap the second of two like responses would lack some. Where
    this inside of vLLM has moved, rows are missing, which is seen, and those responses are scored again with the cache
    off.
    """
    config = copy(kwargs["vllm_config"].scheduler_config)
    config.scheduler_cls = None
    scheduler = config.get_scheduler_cls()(**kwargs)
    manager: Any = getattr(scheduler, "kv_cache_manager", None)
    if original := getattr(manager, "get_computed_blocks", None):

        def get_computed_blocks(request: Any, *limit: int | None) -> Any:  # a limit: from 0.33 on
            if (job := _job_in(request.sampling_params)) is None:
                return original(request, *limit)
            first = job["first"]
            return original(_Shorter(request, first + 1), *(first if x is None else min(x, first) for x in limit))

        manager.get_computed_blocks = get_computed_blocks
    return scheduler


class _Shorter:
    """A request that says it has fewer tokens; vLLM looks for cached blocks in all but the last of them."""

    def __init__(self, request: Any, num_tokens: int):
        self._request, self.num_tokens = request, num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

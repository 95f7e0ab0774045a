"""Token statistics inside vLLM: hooks that hand token_stats an engine's own hidden states, in the engine's own process.

vLLM imports `StatsExtension` into its workers (`worker_extension_cls`) and `capped_scheduler` into its core (`scheduler_cls`);
our side talks to the workers by `collective_rpc`, in bytes. A request carries its job in `SamplingParams.extra_args`.

Both of vLLM's model runners are known (0.32): V1, whose `_get_prompt_logprobs_dict` is called after every step, and V2, whose
`prompt_logprobs_worker` is. These are insides that may move: the backend compares a short sequence with the public API when
it loads, and takes the public API where they do not agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rl_onoff.probes.token_stats import TokenStats, chunk_rows, token_stats
from rl_onoff.types import Response, Want

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

JOB = "rl_onoff"  # the key in extra_args
EXTENSION = f"{__name__}.StatsExtension"
SCHEDULER = f"{__name__}.capped_scheduler"

Head = Callable[["Tensor"], "Tensor | None"]


def job_of(number: int, response: Response) -> dict[str, Any]:
    """extra_args of a request that prefills `prompt + response[:-1]`: row t is the position before response token t."""
    first = len(response.prompt_ids) - 1
    return {JOB: {"number": number, "first": first, "ids": np.asarray(response.token_ids_T, np.int32).tobytes()}}


def read(encoded: bytes, folder: Path) -> dict[int, TokenStats | None]:
    """What `fetch` sent: statistics by job number, None for a job of which some row was never computed."""
    results: dict[int, TokenStats | None] = {}
    for number, arrays in msgspec.msgpack.decode(encoded, type=list[tuple[int, dict[str, tuple[str, list[int], bytes]] | None]]):
        if arrays is None:
            results[number] = None
            continue
        stats = TokenStats(**{name: np.frombuffer(bytearray(data), dtype).reshape(shape) for name, (dtype, shape, data) in arrays.items()})
        file = folder / f"{number}.npy"
        if file.exists():
            stats.logits = np.asarray(np.load(file, mmap_mode="c"))  # copy on write: private to its reader
            file.unlink()  # the mapping keeps the pages until the array is dropped
        results[number] = stats
    return results


@dataclass
class Job:
    """One response in the worker: where its rows are, and what is known of them so far."""

    number: int
    first: int  # position of row 0
    ids_T: np.ndarray
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    done_T: np.ndarray = field(init=False)
    logits_TV: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.done_T = np.zeros(len(self.ids_T), bool)

    def put(self, start: int, stats: TokenStats) -> None:
        for name, values in ((name, getattr(stats, name)) for name in TokenStats.__slots__):
            if values is not None:
                if name not in self.stats:
                    self.stats[name] = np.empty((len(self.ids_T), *values.shape[1:]), values.dtype)
                self.stats[name][start : start + len(values)] = values
        self.done_T[start : start + len(stats.logprobs)] = True


class Recorder:
    """Computes the statistics of the jobs in each step's batch. The same on both runners."""

    def __init__(self, vocab_size: int, keeps: bool):
        self._vocab_size = vocab_size
        self._keeps = keeps  # the first rank of a tensor parallel group; the others only take part in the LM head
        self.want: Want | None = None  # None: not recording, and generation pays nothing
        self.error = ""
        self._folder = Path()
        self._jobs: dict[int, Job] = {}

    def begin(self, want: Want, folder: Path) -> None:
        self.want, self._folder, self.error = want, folder, ""
        self._jobs.clear()  # of a call that was abandoned

    def end(self) -> None:
        self.want = None
        self._jobs.clear()

    def fetch(self, numbers: list[int]) -> bytes:
        if self.error:
            raise RuntimeError(self.error)
        results: list[tuple[int, Any]] = []
        for number in numbers:
            job = self._jobs.pop(number, None)
            if job is not None and self._keeps:
                arrays = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in job.stats.items()}
                results.append((number, arrays if job.done_T.all() else None))
        return msgspec.msgpack.encode(results)

    def step(self, hidden_ND: Tensor, head: Head, batch: Iterator[tuple[Mapping[str, Any], int, int, int]]) -> None:
        """Look at one step: `batch` holds (job, position of its first scheduled token, number of them, its offset in hidden_ND)."""
        if self.want is None or self.error:
            return
        try:
            self._step(hidden_ND, head, batch)
        except Exception as e:  # the engine must not die of it: the error is raised by `fetch`, on our side
            log.exception("token statistics failed inside vLLM")
            self.error = f"{type(e).__name__}: {e}"

    def _step(self, hidden_ND: Tensor, head: Head, batch: Iterator[tuple[Mapping[str, Any], int, int, int]]) -> None:
        import torch

        spans: list[tuple[Job, int, int]] = []
        places: list[slice] = []
        for raw, first, num_tokens, offset in batch:
            if raw["number"] not in self._jobs:
                self._jobs[raw["number"]] = Job(raw["number"], raw["first"], np.frombuffer(raw["ids"], np.int32))
            job = self._jobs[raw["number"]]
            start, stop = max(job.first, first), min(job.first + len(job.ids_T), first + num_tokens)
            if start < stop:
                spans.append((job, start - job.first, stop - job.first))
                places.append(slice(offset + start - first, offset + stop - first))
        if not spans:
            return
        assert self.want is not None
        # rows of all requests together: the LM head likes full chunks, and every rank must cut them alike
        ids_R = torch.from_numpy(np.concatenate([job.ids_T[a:b] for job, a, b in spans])).to(hidden_ND.device)
        hidden_RD = torch.cat([hidden_ND[place] for place in places]) if len(places) > 1 else hidden_ND[places[0]]
        small = replace(self.want, full_logits=False)
        rows = [(job, t) for job, a, b in spans for t in range(a, b)] if self.want.full_logits else []
        parts = []
        size = chunk_rows(self._vocab_size, hidden_ND.device.type)
        with torch.inference_mode():
            for at in range(0, len(ids_R), size):
                logits_RV = head(hidden_RD[at : at + size])
                if not self._keeps or logits_RV is None:
                    continue
                parts.append(token_stats(logits_RV, ids_R[at : at + size], small))
                if rows:
                    self._write(logits_RV, rows[at : at + size])
        if not parts:
            return
        stats, at = TokenStats.concatenate(parts), 0
        for job, a, b in spans:
            job.put(a, stats[at : at + b - a])
            at += b - a

    def _write(self, logits_RV: Tensor, rows: list[tuple[Job, int]]) -> None:
        """Logits go to a file that the reader maps: (T, V) may be hundreds of megabytes."""
        import torch

        at = 0
        while at < len(rows):
            job, t = rows[at]
            count = next((i for i in range(at, len(rows)) if rows[i][0] is not job), len(rows)) - at
            if job.logits_TV is None:
                shape = (len(job.ids_T), logits_RV.shape[-1])
                job.logits_TV = np.lib.format.open_memmap(self._folder / f"{job.number}.npy", mode="w+", dtype=np.float32, shape=shape)
            torch.from_numpy(job.logits_TV[t : t + count]).copy_(logits_RV[at : at + count])
            at += count


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

    def batch(num_scheduled: Mapping[str, int]) -> Iterator[tuple[Mapping[str, Any], int, int, int]]:
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

    def batch(input_batch: Any) -> Iterator[tuple[Mapping[str, Any], int, int, int]]:
        for i, req_id in enumerate(input_batch.req_ids):
            if req_id in jobs:
                first, num_tokens = input_batch.num_computed_prefill_tokens_np[i], input_batch.num_scheduled_tokens[i]
                yield jobs[req_id], int(first), int(num_tokens), int(input_batch.query_start_loc_np[i])

    def hooked_compute(logits_fn: Head, hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.step(hidden_states, logits_fn, batch(input_batch))
        return compute(logits_fn, hidden_states, input_batch, *args, **kwargs)

    worker.add_request, worker.remove_request, worker.compute_prompt_logprobs = hooked_add, hooked_remove, hooked_compute


def capped_scheduler(**kwargs: Any) -> Any:
    """vLLM's own scheduler, in which a job may share the cached blocks of its prompt but not those of its response.

    Rows of cached tokens are never computed, so without the cap the second of two like responses would lack some. Where this
    inside of vLLM has moved, rows are missing, which is seen, and those responses are scored again with the cache off.
    """
    config = kwargs["vllm_config"].scheduler_config
    if config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Scheduler
    else:
        from vllm.v1.core.sched.scheduler import Scheduler
    scheduler = Scheduler(**kwargs)
    manager = getattr(scheduler, "kv_cache_manager", None)
    original = getattr(manager, "get_computed_blocks", None)
    if original is not None:

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

"""vLLM: engine calls only. Lives in a worker process by default, with vLLM's core in that same process when it has one device."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import psutil

from rl_onoff.backends.base import BaseBackend, EngineInfo
from rl_onoff.backends.config import EngineConfig, VLLMBackendConfig
from rl_onoff.errors import EngineError, MissingDependencyError, UsageError
from rl_onoff.probes.token_stats import TokenStats
from rl_onoff.types import Completion, FinishReason, LogprobKind, Request, Response, Sampling, TokenScores, Want

log = logging.getLogger(__name__)

FULL_LOGITS_BYTES = 2**30  # of full logits in flight
TEMPERATURES = (0.01, 2.0)  # vLLM refuses what is above and raises what is below, 0 (greedy) apart


class VLLMBackend(BaseBackend):
    """A language model in vLLM."""

    name: ClassVar[str] = "vllm"
    package: ClassVar[str] = "vllm"
    config_class: ClassVar[type[EngineConfig]] = VLLMBackendConfig
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset((LogprobKind.raw, LogprobKind.processed))
    worker_by_default: ClassVar[bool] = True
    config: VLLMBackendConfig

    _llm: Any = None
    _mode = ""  # vLLM's logprobs_mode, which is fixed when it loads
    _in_engine = False
    _number = 0  # of the latest request

    # -- the engine's four calls ---------------------------------------------------------------------------------------

    def _load(self) -> EngineInfo:
        try:
            import vllm
            from vllm.engine.arg_utils import EngineArgs
        except ImportError as error:
            raise MissingDependencyError(f"the vllm backend needs the vllm package ({error}): pip install 'rl-onoff[vllm]'") from error
        from rl_onoff.backends.huggingface import end_ids

        options = {field.name for field in dataclasses.fields(EngineArgs)}
        for option in self.config.engine_kwargs:
            if option not in options:
                raise UsageError(f"backend.engine_kwargs.{option} is no option of vLLM {vllm.__version__}: drop it or correct its name")
        self._in_engine = self.config.in_engine_stats
        if self._in_engine and not {"worker_extension_cls", "scheduler_cls"} <= options:
            self._fall_back("it takes no worker extension")
        self._start(self._sampling_mode)
        if self._in_engine and (why := self._disagreement()):
            self._fall_back(why)
        model = self._llm.llm_engine.model_config
        return EngineInfo(
            engine=self.name,
            version=vllm.__version__,
            dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=model.get_vocab_size(),
            max_len=model.max_model_len,
            eos_ids=end_ids(model.try_get_generation_config().get("eos_token_id"), self.get_tokenizer()),
            in_engine_stats=self._in_engine,
        )

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        from vllm import SamplingParams

        self._start(self._sampling_mode)

        def inputs() -> Iterator[tuple[Any, Sequence[int], Any]]:
            for request in requests:
                room = self.info.max_len - len(request.prompt_ids)
                for sample in request.sample_indices:
                    args = self.sampling_args(request.sampling, self.info.eos_ids, request.seed_of(sample))
                    args["max_tokens"] = min(args["max_tokens"], room)
                    yield (request, sample), request.prompt_ids.tolist(), SamplingParams(**args)

        for finished in self._run(inputs()):
            for (request, sample), output in finished:
                yield self._completion(request, sample, output.outputs[0])

    def _score(self, responses: Sequence[Response], want: Want) -> Iterator[TokenScores]:
        for response, stats in (self._stats if self._in_engine else self._public_stats)(responses, want):
            arrays = {name: value for name, value in stats.arrays().items() if value is not None}
            yield TokenScores(request_id=response.request_id, sample=response.sample, token_ids_T=response.token_ids_T, **arrays)

    def _close(self) -> None:
        llm, self._llm, self._mode = self._llm, None, ""
        if llm is None:
            return
        import torch
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.compiler.set_stance("default")

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        """vLLM's SamplingParams of one response."""
        low, high = TEMPERATURES
        if not sampling.greedy and not low <= sampling.temperature <= high:
            raise UsageError(
                f"sampling.temperature is {sampling.temperature} but vLLM takes 0 (greedy) or {low} to {high}: set sampling.temperature to one of these"
            )
        if sampling.min_p > 0 and sampling.top_p < 1 and not sampling.greedy:
            raise UsageError(
                f"sampling.min_p={sampling.min_p} and sampling.top_p={sampling.top_p} together mean something else in vLLM, which cuts by "
                "min_p first: set sampling.min_p=0 or sampling.top_p=1"
            )
        return {
            "n": 1,  # with n above 1 and a seed vLLM would draw sample i from seed + i
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "seed": seed,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": 0,
            "stop": list(sampling.stop),
            "stop_token_ids": list(eos_ids),
            "ignore_eos": True,  # the tokenizer's and the model's EOS are in stop_token_ids, and nothing else ends a response
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,  # of the sampled token alone
            "flat_logprobs": True,
            "detokenize": bool(sampling.stop),
            "skip_special_tokens": True,
            "spaces_between_special_tokens": False,
        }

    # -- the engine ----------------------------------------------------------------------------------------------------

    @property
    def _sampling_mode(self) -> str:
        return f"{self.config.logprob_kind.value}_logprobs"

    def _start(self, mode: str) -> None:
        """Have vLLM running in this logprobs_mode: nothing to do, but for the public path of scores, which needs logits."""
        if self._llm is not None and mode == self._mode:
            return
        if self._llm is not None:
            log.warning("vLLM is loaded again to report %s: without in-engine statistics it cannot sample and score in one life", mode)
            self._close()
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        from rl_onoff.models import hub_errors, resolve

        config = self.config
        files = resolve(config.model_name, revision=config.revision)
        on_cpu = current_platform.is_cpu()
        kwargs: dict[str, Any] = {
            "model": files.path,
            "revision": files.revision,
            "tokenizer": resolve(config.tokenizer).path if config.tokenizer else files.path,
            "trust_remote_code": config.trust_remote_code,
            "dtype": config.weights_dtype,
            "tensor_parallel_size": config.tensor_parallel,
            "max_model_len": config.max_model_len,
            "enforce_eager": config.enforce_eager or on_cpu,  # compiling for a CPU takes longer than most runs
            "seed": config.seed,
            "generation_config": "vllm",  # nothing of the model's own sampling defaults
            "logprobs_mode": mode,
            "max_logprobs": -1 if mode == "raw_logits" else 0,
            "disable_log_stats": True,
        }
        if config.gpu_memory_utilization is not None:
            kwargs["gpu_memory_utilization"] = config.gpu_memory_utilization
        if on_cpu:
            kwargs["block_size"] = 32  # the default there, 128, shares few prompts
        if self._in_engine:
            from rl_onoff.probes.vllm import EXTENSION, SCHEDULER

            kwargs |= {"worker_extension_cls": EXTENSION, "scheduler_cls": SCHEDULER}
        _environment(config.tensor_parallel, on_cpu)
        if on_cpu:
            torch.compiler.set_stance("force_eager")  # as enforce_eager, but for the sampler's kernels: a minute on two cores
        with hub_errors(config.model_name):
            self._llm = LLM(**kwargs | config.engine_kwargs)
        self._mode = mode

    def _run(self, inputs: Iterable[tuple[Any, Sequence[int], Any]], most: int | None = None) -> Iterator[list[tuple[Any, Any]]]:
        """Feed (tag, token ids, params) to vLLM; yields after each step the (tag, output) that finished in it.

        `most` bounds the requests inside the engine: enough to fill its batches, few enough to start at once.
        """
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        most = most or 2 * engine.vllm_config.scheduler_config.max_num_seqs
        inside: dict[str, Any] = {}
        inputs = iter(inputs)
        try:
            while True:
                for tag, token_ids, params in itertools.islice(inputs, most - len(inside)):
                    params.output_kind = RequestOutputKind.FINAL_ONLY
                    self._number += 1
                    engine.add_request(str(self._number), {"prompt_token_ids": token_ids}, params)
                    inside[str(self._number)] = tag
                if not inside:
                    return
                # a request that is not inside is one of a call that was abandoned
                done = [output for output in engine.step() if output.finished and output.request_id in inside]
                if done:
                    yield [(inside.pop(output.request_id), output) for output in done]
        finally:
            if inside and self._llm is not None:
                engine.abort_request(list(inside))

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return self._llm.collective_rpc(method, args=args)

    def _completion(self, request: Request, sample: int, output: Any) -> Completion:
        flat = output.logprobs
        logprobs_T = np.array([flat.logprobs[at] for at in flat.start_indices], np.float32)
        if request.sampling.greedy and self.config.logprob_kind is LogprobKind.processed:
            logprobs_T[:] = 0.0  # vLLM reports raw ones here, but greedy decoding draws from a single token
        if output.finish_reason == "length":
            reason = FinishReason.length
        elif output.finish_reason == "stop":
            reason = FinishReason.stop if isinstance(output.stop_reason, str) else FinishReason.eos
        else:
            raise EngineError(f"vLLM ended response {sample} to request {request.id!r} with {output.finish_reason!r}")
        return Completion(
            request_id=request.id, sample=sample, token_ids_T=np.array(output.token_ids, np.int32), text="", logprobs_T=logprobs_T,
            kind=self.config.logprob_kind, finish_reason=reason,
        )  # fmt: skip

    # -- statistics ----------------------------------------------------------------------------------------------------

    def _stats(self, responses: Sequence[Response], want: Want) -> Iterator[tuple[Response, TokenStats]]:
        """Inside the engine. A response of which a row was never computed, for it was cached, is scored again without the cache."""
        from vllm import SamplingParams

        from rl_onoff.probes.vllm import job_of, read

        most = None
        if want.full_logits:
            longest = max(len(response.token_ids_T) for response in responses)
            most = max(1, FULL_LOGITS_BYTES // (4 * longest * self._llm.llm_engine.model_config.get_vocab_size()))

        def inputs(numbers: Iterable[int], skip_cache: bool) -> Iterator[tuple[int, list[int], Any]]:
            for i in numbers:
                job = job_of(i, responses[i])
                params = SamplingParams(
                    max_tokens=1, temperature=0.0, detokenize=False, extra_args=job, skip_reading_prefix_cache=skip_cache
                )
                yield i, _prefix(responses[i]), params

        with tempfile.TemporaryDirectory() as folder:
            self._rpc("rl_onoff_begin", msgspec.msgpack.encode(want), folder)
            try:
                waiting = range(len(responses))
                for skip_cache in (False, True):
                    incomplete = []
                    for finished in self._run(inputs(waiting, skip_cache), most):
                        numbers = [i for i, _ in finished]
                        found: dict[int, TokenStats | None] = {}
                        for encoded in self._rpc("rl_onoff_fetch", numbers):
                            found |= read(encoded, Path(folder))
                        for i in numbers:
                            if (stats := found.get(i)) is None:
                                incomplete.append(i)
                            else:
                                yield responses[i], stats
                    waiting = incomplete
            finally:
                if self._llm is not None:
                    self._rpc("rl_onoff_end")
        if waiting:
            raise EngineError(f"vLLM computed only a part of {len(waiting)} responses: set backend.in_engine_stats=false")

    def _public_stats(self, responses: Sequence[Response], want: Want) -> Iterator[tuple[Response, TokenStats]]:
        """Through vLLM's public API; one response at a time, for each is gigabytes of Python objects."""
        from vllm import SamplingParams

        from rl_onoff.probes import vllm_public

        self._start("raw_logits")
        vocab_size = self._llm.llm_engine.model_config.get_vocab_size()
        inputs = ((response, _prefix(response), SamplingParams(**vllm_public.PARAMS)) for response in responses)
        for finished in self._run(inputs, most=1):
            for response, output in finished:
                yield response, vllm_public.stats(output, response, want, vocab_size)

    def _disagreement(self) -> str:
        """Score a short sequence in the engine and by its public API; why in-engine statistics cannot be used, or nothing."""
        import torch
        from vllm import SamplingParams

        model = self._llm.llm_engine.model_config
        ids = np.arange(1, 13, dtype=np.int64) * 7919 % model.get_vocab_size()
        response = Response(request_id="", sample=0, prompt_ids=ids[:4].astype(np.int32), token_ids_T=ids[4:].astype(np.int32))
        try:
            self._rpc("rl_onoff_install")
            ((_, stats),) = self._stats([response], Want())
        except Exception as e:  # whatever moved inside vLLM, the public API is still there
            log.debug("in-engine statistics failed", exc_info=True)
            return f"{type(e).__name__}: {e}"
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0)
        (((_, output),),) = self._run([(None, ids.tolist(), params)])
        public_T = np.array([output.prompt_logprobs[i][int(ids[i])].logprob for i in range(4, len(ids))])
        worst = float(np.abs(stats.logprobs - public_T).max())
        allowed = 2e-3 if model.dtype == torch.float32 else 0.5  # logits of half precision are rounded to steps of 0.1
        return "" if worst <= allowed else f"its logprobs are off by up to {worst:.2g} nats"

    def _fall_back(self, why: str) -> None:
        log.warning(
            "token statistics are not computed inside this vLLM (%s): they come through its public API, which is much slower", why
        )
        self._in_engine = False


def _prefix(response: Response) -> list[int]:
    """What vLLM must have seen to tell of every response token: all but the last, so that the longest sequences fit too."""
    return [*response.prompt_ids.tolist(), *response.token_ids_T[:-1].tolist()]


def _environment(tensor_parallel: int, on_cpu: bool) -> None:
    """vLLM's settings that are environment variables; what the user has set stays."""
    values = {"VLLM_NO_USAGE_STATS": "1"}
    if tensor_parallel == 1:
        values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # we are in a process of our own already; loads in a fifth of the time
    if on_cpu:
        values["TORCH_COMPILE_DISABLE"] = "1"
        values["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(16, psutil.virtual_memory().available // 2**33)))  # GiB: an eighth
        cores = sorted(os.sched_getaffinity(0))
        each = max(1, min(len(cores) // tensor_parallel, int(os.environ.get("OMP_NUM_THREADS") or len(cores))))
        ranks = [cores[rank * each : (rank + 1) * each] for rank in range(tensor_parallel)]
        values["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, rank)) for rank in ranks)  # vLLM would leave one idle
    for name, value in values.items():
        os.environ.setdefault(name, value)

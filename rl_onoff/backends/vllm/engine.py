"""vLLM's engine as we use it: started with explicit settings, fed request by request, ended without a trace."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import psutil

from rl_onoff.backends.placement import cores_by_rank
from rl_onoff.backends.vllm.config import VLLMBackendConfig
from rl_onoff.backends.vllm.hooks import HOOKS
from rl_onoff.errors import UsageError, one_line
from rl_onoff.models.adapter import Adapter, open_adapter

Take = Callable[[int, bool], Iterable[tuple[Any, Sequence[int], Any]]]  # tag, token ids, params


def options() -> frozenset[str]:
    """Names of the options this version of vLLM has."""
    from vllm.engine.arg_utils import EngineArgs

    return frozenset(field.name for field in dataclasses.fields(EngineArgs))


def room_for(adapter: Adapter) -> int:
    """The least of the ranks that vLLM reserves memory for."""
    from vllm.config.lora import MaxLoRARanks

    ranks = get_args(MaxLoRARanks)
    if adapter.rank > max(ranks):
        why = f"vLLM takes adapters up to rank {max(ranks)}, and model.adapter={adapter.name} has {adapter.rank}"
        raise UsageError(f"{why}: set model.merge_adapter=true")
    return min(rank for rank in ranks if rank >= adapter.rank)


class Engine:
    """One vLLM in this process (with one device), or with this process as its client."""

    def __init__(self, config: VLLMBackendConfig, mode: str, *, in_engine: bool):
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        from rl_onoff.models.resolve import hub_errors, resolve

        for option in config.engine_kwargs:
            if option not in options():
                what = f"backend.engine_kwargs.{option} is no option of this vLLM"
                raise UsageError(f"{what}: drop it or correct its name")
        files = config.model_files()
        adapter = open_adapter(config.adapter_beside) if config.adapter_beside else None
        self._on_cpu = current_platform.is_cpu()
        self.mode = mode  # vLLM's logprobs_mode, which is fixed for life
        kwargs: dict[str, Any] = {
            "model": files.path, "revision": files.revision, "trust_remote_code": config.trust_remote_code,
            "tokenizer": resolve(config.tokenizer).path if config.tokenizer else files.path,
            "dtype": config.weights_dtype, "tensor_parallel_size": config.num_devices,
            "max_model_len": config.max_model_len,
            "enforce_eager": config.enforce_eager or self._on_cpu,  # compiling for a CPU takes longer than most runs
            "seed": config.seed, "disable_log_stats": True,
            "generation_config": "vllm",  # nothing of the model's own sampling defaults
            "logprobs_mode": mode, "max_logprobs": -1 if mode == "raw_logits" else 0,
        }  # fmt: skip
        if config.gpu_memory_utilization is not None:
            kwargs["gpu_memory_utilization"] = config.gpu_memory_utilization
        if self._on_cpu:
            kwargs["block_size"] = 32  # the default there, 128, shares few prompts
            # 0.32 fails on a CPU where a prompt with a seed is cut: "CPU Generator does not use offset"
            kwargs["enable_chunked_prefill"] = False
        if in_engine:
            kwargs |= HOOKS
        if adapter is not None:
            # of these modules alone: vLLM would also wrap the LM head, for the rows it samples and not those we score
            kwargs |= {"enable_lora": True, "lora_target_modules": adapter.modules, "max_lora_rank": room_for(adapter)}
        # vLLM's settings that are environment variables; what the user has set stays
        environment = {"VLLM_NO_USAGE_STATS": "1"}
        if config.num_devices == 1:
            # this process is the engine's own already; loads in a fifth of the time
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if config.weights_dtype == "float32":
            environment["TRITON_F32_DEFAULT"] = "ieee"  # a GPU's attention would multiply in TF32
        if self._on_cpu:
            environment |= {
                "TORCH_COMPILE_DISABLE": "1",
                # GiB: an eighth
                "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(16, psutil.virtual_memory().available // 2**33))),
                "VLLM_CPU_OMP_THREADS_BIND": cores_by_rank(config.num_devices),  # vLLM would leave one idle
            }
            torch.compiler.set_stance("force_eager")  # the sampler's kernels too: a minute of compiling on two cores
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        with hub_errors(config.model_name):
            self._llm: Any = LLM(**kwargs | config.engine_kwargs)
        self.model = self._llm.llm_engine.model_config
        self._adapter = None if adapter is None else self._loaded(adapter)
        self.vocab_size: int = self.model.get_vocab_size()
        # most requests that are computed at once
        self.batch: int = self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self.caches_prompts = bool(self._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)
        self._number = 0  # of the latest request

    def _loaded(self, adapter: Adapter) -> Any:
        """The adapter, loaded; what every request is given."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(adapter.name, 1, str(adapter.folder))
        try:
            self._llm.llm_engine.add_lora(request)
        except ValueError as error:
            why = f"vLLM cannot load model.adapter={adapter.name} ({one_line(error)})"
            raise UsageError(f"{why}: set model.merge_adapter=true") from error
        return request

    def run(self, take: Take, most: int | None = None) -> Iterator[list[tuple[Any, Any]]]:
        """Feed (tag, token ids, params) to vLLM; yields after each step the (tag, output) that finished in it.

        `take` gives up to so many inputs, and waits for one where asked to. `most` bounds the requests inside the
        engine: enough to fill its batches, few enough to start at once.
        """
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        room = most or 2 * self.batch
        inside: dict[str, Any] = {}
        try:
            while True:
                for tag, token_ids, params in take(room - len(inside), not inside):
                    params.output_kind = RequestOutputKind.FINAL_ONLY
                    self._number += 1
                    prompt = TokensPrompt(prompt_token_ids=list(token_ids))
                    engine.add_request(str(self._number), prompt, params, lora_request=self._adapter)
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

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of our extension in every worker."""
        return self._llm.collective_rpc(method, args=args)

    def close(self) -> None:
        import torch
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm, self._llm = self._llm, None
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        if self._on_cpu:
            torch.compiler.set_stance("default")

"""Options of the vLLM backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Self

from rl_onoff.backends.engine_config import EngineConfig, Switch
from rl_onoff.errors import UsageError, at_least

TF32 = "VLLM_FLOAT32_MATMUL_PRECISION"


@dataclass(kw_only=True, slots=True)
class VLLMBackendConfig(EngineConfig):
    """vLLM, in a process of its own."""

    name: ClassVar[str] = "vllm"
    _target_: str = "rl_onoff.backends.vllm.VLLMBackend"
    tensor_parallel_size: int | None = None
    """The engine's own name for tp_size."""
    gpu_memory_utilization: float | None = None
    """Fraction of GPU memory to use, 0 to 1; null is 0.9."""
    max_model_len: int | None = None
    """Longest sequence in tokens; null is the model's own."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: starts faster, runs slower."""
    in_engine_stats: bool = True
    """Compute token statistics inside the engine; false takes them through the engine's public API, slowly."""
    environment: dict[str, str] = field(default_factory=dict)
    """Settings of vLLM that are environment variables: '+backend.environment.VLLM_BATCH_INVARIANT="1"'."""
    switches: ClassVar[tuple[Switch, ...]] = (
        Switch("attention_triton", "Triton's attention", {"attention_backend": "TRITON_ATTN"}, "gpu", ""),
        Switch("attention_flex", "torch's flex attention", {"attention_backend": "FLEX_ATTENTION"}, "gpu", ""),
        Switch("tf32", "float32 without TF32", {"environment": {TF32: "highest"}}, "set", ""),
        Switch("compilation", "no compilation and no CUDA graphs", {"enforce_eager": True}, "gpu", ""),
        Switch("prefix_cache", "no prefix cache", {"enable_prefix_caching": False}),
        Switch("chunked_prefill", "prompts in one piece", {"enable_chunked_prefill": False}, "gpu"),
        Switch("scheduling", "steps one after the other", {"async_scheduling": False}, "gpu", ""),
        Switch("batch", "one response at a time", {"max_num_seqs": 1}),
        Switch("deterministic", "batch-invariant kernels", {"environment": {"VLLM_BATCH_INVARIANT": "1"}}, "gpu", ""),
        Switch("kv_cache", "a key-value cache in the weights' type", {"kv_cache_dtype": None}, "set"),
        Switch("quantisation", "weights that are not quantised", {"quantization": None}, "set", ""),
        Switch("speculative", "no speculative decoding", {"speculative_config": None}, "set", ""),
        Switch("lm_head", "an LM head in float32", {"hf_overrides": {"head_dtype": "float32"}}, "low"),
    )
    second_names: ClassVar[dict[str, str]] = {"tp_size": "tensor_parallel_size"}
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "model=model.name", "tokenizer=model.tokenizer", "dtype", "seed", "tensor_parallel_size", "max_model_len",
        "gpu_memory_utilization", "enforce_eager", "revision=model.revision",
        "trust_remote_code=model.trust_remote_code", "logprobs_mode=backend.logprob_kind",
        "max_logprobs=score.top_k", "worker_extension_cls=backend.in_engine_stats",
        "data_parallel_size=backend.dp_size", "enable_lora=model.adapter", "max_lora_rank=model.adapter",
        "lora_target_modules=model.adapter",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        at_least(1, "backend.max_model_len", self.max_model_len, "4096, or null for the model's own")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            what = f"backend.gpu_memory_utilization is {self.gpu_memory_utilization} but must be above 0 and at most 1"
            raise UsageError(f"{what}: set backend.gpu_memory_utilization=0.9")

    def across_nodes(self) -> Self:
        # its executor takes GPUs of the cluster that RAY_ADDRESS names, in a placement group of its own. Written from
        # vLLM 0.32's source and not run: its CPU platform refuses this executor, and there was no cluster with GPUs
        return dataclasses.replace(self, engine_kwargs={"distributed_executor_backend": "ray", **self.engine_kwargs})

    def with_all_layers_run(self) -> Self:
        return dataclasses.replace(self, enforce_eager=True)

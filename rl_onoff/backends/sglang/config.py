"""Options of the SGLang backend, and what they are to SGLang (0.5.23)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from rl_onoff.backends.engine_config import EngineConfig, Switch
from rl_onoff.errors import UsageError, at_least
from rl_onoff.sampling import LogprobKind

MARGIN = 7  # positions of its context that SGLang never fills: a prompt must be that much shorter
ADAPTER = "adapter"  # its name inside SGLang
CPU_POOL = 16384  # tokens in the key-value cache on a CPU, where a fraction of all memory would be too much


@dataclass(kw_only=True, slots=True)
class SGLangBackendConfig(EngineConfig):
    """SGLang, in a process of its own."""

    name: ClassVar[str] = "sglang"
    _target_: str = "rl_onoff.backends.sglang.SGLangBackend"
    mem_fraction_static: float | None = None
    """Fraction of memory for weights and cache, 0 to 1; null is 0.85."""
    context_length: int | None = None
    """Longest sequence in tokens; null is the model's own."""
    in_engine_stats: bool = True
    """Compute token statistics inside the engine; false takes them through the engine's public API, slowly."""
    switches: ClassVar[tuple[Switch, ...]] = (
        Switch("attention_triton", "Triton's attention", {"attention_backend": "triton"}, "gpu", ""),
        Switch(
            "attention_native",
            "torch's own attention, kernels that follow the batch",
            {"attention_backend": "torch_native", "enable_deterministic_inference": False},
            "gpu",
            "",
        ),
        Switch("tf32", "float32 without TF32", {"enable_tf32_matmul": None}, "set", ""),
        Switch("compilation", "no CUDA graphs", {"disable_cuda_graph": True, "enable_torch_compile": None}, "gpu", ""),
        Switch("prefix_cache", "no prefix cache", {"disable_radix_cache": True}),
        Switch("chunked_prefill", "prompts in one piece", {"chunked_prefill_size": -1}),
        Switch("scheduling", "steps one after the other", {"disable_overlap_schedule": True}, "gpu", ""),
        Switch("batch", "one response at a time", {"max_running_requests": 1}),
        Switch("deterministic", "kernels that follow the batch", {"enable_deterministic_inference": False}, "gpu", ""),
        Switch("kv_cache", "a key-value cache in the weights' type", {"kv_cache_dtype": None}, "set", ""),
        Switch("quantisation", "weights that are not quantised", {"quantization": None}, "set", ""),
        Switch("speculative", "no speculative decoding", {"speculative_algorithm": None}, "set", ""),
        Switch("lm_head", "an LM head in float32", {"enable_fp32_lm_head": True}, "low"),
    )
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "model_path=model.name", "tokenizer_path=model.tokenizer", "dtype", "tp_size", "dp_size", "mem_fraction_static",
        "context_length", "random_seed=backend.seed", "revision=model.revision",
        "trust_remote_code=model.trust_remote_code", "enable_lora=model.adapter", "lora_paths=model.adapter",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        at_least(1, "backend.context_length", self.context_length, "4096, or null for the model's own")
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static <= 1:
            what = f"backend.mem_fraction_static is {self.mem_fraction_static} but must be above 0 and at most 1"
            raise UsageError(f"{what}: set backend.mem_fraction_static=0.85")

    def with_all_layers_run(self) -> Self:
        options = {"disable_radix_cache": True, "disable_cuda_graph": True}
        return dataclasses.replace(self, engine_kwargs={**self.engine_kwargs, **options})

    def environment(self) -> dict[str, str]:
        """What SGLang reads from the environment only, most of it while it is imported."""
        import torch

        from rl_onoff.backends.placement import cores_by_rank

        values = {
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1" if self.logprob_kind is LogprobKind.raw else "0",
            # for MARGIN; no position beyond the model's own is ever used
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        }
        if not torch.cuda.is_available():
            values["SGLANG_USE_CPU_ENGINE"] = "1"
            if self.num_devices > 1 and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
                # else every rank wants a NUMA node of its own
                values["SGLANG_CPU_OMP_THREADS_BIND"] = cores_by_rank(self.num_devices)
        elif self.weights_dtype == "float32":
            values["TRITON_F32_DEFAULT"] = "ieee"  # its kernels would multiply in TF32
        return values

    def arguments(self) -> dict[str, Any]:
        """The arguments of sglang's Engine."""
        import torch
        from sglang.srt.utils.hf_transformers_utils import get_config, get_context_length

        from rl_onoff.models.adapter import open_adapter
        from rl_onoff.models.resolve import resolve

        files = self.model_files()
        model = get_config(files.path, trust_remote_code=self.trust_remote_code, revision=files.revision)
        longest = get_context_length(model.get_text_config())
        if (self.context_length or 0) > longest:
            what = f"backend.context_length is {self.context_length} but the model holds {longest}"
            raise UsageError(f"{what}: set backend.context_length={longest} or less")
        arguments: dict[str, Any] = {
            "model_path": files.path, "revision": files.revision, "trust_remote_code": self.trust_remote_code,
            "tokenizer_path": resolve(self.tokenizer).path if self.tokenizer else files.path,
            "dtype": self.weights_dtype, "tp_size": self.num_devices, "random_seed": self.seed, "log_level": "warning",
            "mem_fraction_static": self.mem_fraction_static or 0.85,
            "context_length": (self.context_length or longest) + MARGIN,
            "sampling_defaults": "openai",  # not the model's generation config
            "sampling_backend": "pytorch",  # the one that our sampler stands in for
        }  # fmt: skip
        if self.adapter_beside:
            adapter = {"lora_name": ADAPTER, "lora_path": str(open_adapter(self.adapter_beside).folder)}
            arguments |= {"lora_paths": [adapter], "max_loras_per_batch": 1, "lora_strict_loading": True}
            if not torch.cuda.is_available():
                arguments["lora_backend"] = "torch_native"
            try:
                torch.empty(0).pin_memory()
            except RuntimeError as error:
                why = f"SGLang pins the memory of model.adapter={self.adapter}, which cannot be done without a GPU"
                raise UsageError(f"{why}: set model.merge_adapter=true, or that of this engine") from error
        if torch.cuda.is_available():
            arguments["enable_deterministic_inference"] = True  # a response must not depend on its batch
            if self.weights_dtype == "float32":
                arguments["attention_backend"] = "triton"  # the deterministic mode's own choice takes 16 bits alone
        else:
            # a CPU has no deterministic mode: SGLang refuses its attention there, and in float32 the batch changes
            # nothing that counts. A scheduler without work that did not sleep would keep a core busy
            pool = max(CPU_POOL, (self.context_length or 0) + MARGIN + 1)
            arguments |= {"device": "cpu", "disable_cuda_graph": True, "max_total_tokens": pool, "sleep_on_idle": True}
        return arguments | self.engine_kwargs

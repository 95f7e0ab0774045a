"""From an SGLangBackendConfig to the arguments and environment of one SGLang engine (0.5.23)."""

from __future__ import annotations

import os
from typing import Any

from rl_onoff.backends.sglang.config import SGLangBackendConfig
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind

MARGIN = 7  # positions of its context that SGLang never fills: a prompt must be that much shorter
CPU_POOL = 16384  # tokens in the key-value cache on a CPU, where a fraction of all memory would be too much
MEM_FRACTION = 0.85


def engine_environment(config: SGLangBackendConfig) -> dict[str, str]:
    """What SGLang reads from the environment only, most of it while it is imported."""
    environment = {
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1" if config.logprob_kind is LogprobKind.raw else "0",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # for MARGIN; no position beyond the model's own is ever used
    }
    if not _has_gpu():
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        if (ranks := config.tp_size or 1) > 1 and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = _cores(ranks)  # else every rank wants a NUMA node of its own
    return environment


def engine_args(config: SGLangBackendConfig) -> dict[str, Any]:
    """The arguments of sglang's Engine."""
    from rl_onoff.models.resolve import resolve

    files = resolve(config.model_name, revision=config.revision)
    args: dict[str, Any] = {
        "model_path": files.path,
        "revision": files.revision,
        "tokenizer_path": resolve(config.tokenizer).path if config.tokenizer else files.path,
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.weights_dtype,
        "tp_size": config.tp_size or 1,
        "mem_fraction_static": config.mem_fraction_static or MEM_FRACTION,
        "context_length": _context_length(config, files.path, files.revision) + MARGIN,
        "random_seed": config.seed,
        "sampling_defaults": "openai",  # not the model's generation config
        "sampling_backend": "pytorch",  # the one that our sampler stands in for
        "log_level": "warning",
    }
    if _has_gpu():
        args["enable_deterministic_inference"] = True  # a response must not depend on its batch
    else:
        # a CPU has no deterministic mode: SGLang refuses its attention there, and in float32 the batch changes nothing
        # that counts
        args |= {
            "device": "cpu",
            "disable_cuda_graph": True,
            "max_total_tokens": max(CPU_POOL, (config.context_length or 0) + MARGIN + 1),
            "sleep_on_idle": True,  # else a scheduler without work keeps a core busy
        }
    return args | config.engine_kwargs


def _context_length(config: SGLangBackendConfig, path: str, revision: str | None) -> int:
    from sglang.srt.utils.hf_transformers_utils import get_config, get_context_length

    model = get_config(path, trust_remote_code=config.trust_remote_code, revision=revision)
    longest = get_context_length(model.get_text_config())
    if config.context_length is not None and config.context_length > longest:
        raise UsageError(
            f"backend.context_length is {config.context_length} but the model holds {longest}: set "
            f"backend.context_length={longest} or less"
        )
    return config.context_length or longest


def _cores(ranks: int) -> str:
    """This process's cores dealt out to ranks as SGLang writes it: `0,1|2,3`; with too few of them ranks share."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    return "|".join(",".join(str(cores[(rank * each + i) % len(cores)]) for i in range(each)) for rank in range(ranks))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

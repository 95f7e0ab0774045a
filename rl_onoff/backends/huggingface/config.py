"""Options of the HuggingFace backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rl_onoff.backends.engine_config import DTYPES, EngineConfig, Switch
from rl_onoff.errors import UsageError, at_least

AUTO = "auto"


@dataclass(kw_only=True, slots=True)
class HuggingFaceBackendConfig(EngineConfig):
    """HuggingFace Transformers, in this process."""

    name: ClassVar[str] = "huggingface"
    _target_: str = "rl_onoff.backends.huggingface.HuggingFaceBackend"
    device: str | None = None
    """cpu, cuda, cuda:0, mps, …; null is cuda where there is one, else cpu."""
    torch_dtype: str | None = None
    """The engine's own name for dtype."""
    device_map: Any = None
    """auto, balanced, … or a mapping: split the layers over the GPUs; overrides device. Null with several GPUs and no
    tp_size is auto."""
    head_dtype: str | None = None
    """Type the LM head computes in: float32, or null for the weights' own."""
    logprob_dtype: str | None = None
    """Type the log-softmax of scores is computed in: weights (the weights' own, as some trainers do), or null for
    float32."""
    tf32: bool = False
    """Multiply float32 matrices in TF32 on a GPU, with 10 bits for 23."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, …; null is the engine's choice."""
    batch_size: int | str = AUTO
    """Most responses sampled side by side; auto is what free memory holds, up to what makes the device faster."""
    max_batch_tokens: int | str = AUTO
    """Most tokens (prompts and responses, padding included) computed at once; auto is found as the batch_size is. A
    longer response runs alone."""
    second_names: ClassVar[dict[str, str]] = {"dtype": "torch_dtype"}
    inexact: ClassVar[tuple[str, ...]] = ("engine_kwargs", "tf32")
    switches: ClassVar[tuple[Switch, ...]] = (
        Switch("attention_eager", "attention written out, step by step", {"attn_implementation": "eager"}),
        Switch("attention_sdpa", "torch's fused attention", {"attn_implementation": "sdpa"}, "set"),
        Switch("attention_flash", "Flash attention", {"attn_implementation": "flash_attention_2"}, "gpu", ""),
        Switch("tf32", "float32 without TF32", {"tf32": False}, "set", ""),
        Switch("batch", "one response at a time", {"batch_size": 1}),
        Switch("log_softmax", "log-softmax in float32", {"logprob_dtype": None}, "set"),
        Switch("log_softmax_low", "log-softmax in the weights' type", {"logprob_dtype": "weights"}, "low"),
        Switch("quantisation", "weights that are not quantised", {"quantization_config": None}, "set", ""),
        Switch("lm_head", "an LM head in float32", {"head_dtype": "float32"}, "low"),
    )
    dtypes: ClassVar[tuple[str, ...]] = (*DTYPES, "float64")
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "dtype", "torch_dtype", "device_map", "attn_implementation", "revision=model.revision",
        "trust_remote_code=model.trust_remote_code",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if self.head_dtype not in (None, "float32"):
            what = f"backend.head_dtype is {self.head_dtype!r} but must be float32 or null"
            raise UsageError(f"{what}: set backend.head_dtype=float32")
        if self.logprob_dtype not in (None, "weights"):
            what = f"backend.logprob_dtype is {self.logprob_dtype!r} but must be weights or null"
            raise UsageError(f"{what}: set backend.logprob_dtype=weights")
        if ":" in (self.device or "") and (self.dp_size or self.tp_size or 1) > 1:
            what = f"backend.device={self.device} names one device, but replicas and their parts share out all"
            raise UsageError(f"{what}: set backend.device=cuda")
        for name in ("batch_size", "max_batch_tokens"):
            value, option = getattr(self, name), f"backend.{name}"
            if isinstance(value, str) and value != AUTO:
                raise UsageError(f"{option} is {value!r} but must be a number or auto: set {option}=auto")
            at_least(1, option, None if value == AUTO else value, AUTO)

"""Options of the HuggingFace backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from rl_onoff.backends.engine_config import EngineConfig
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
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, …; null is the engine's choice."""
    batch_size: int | str = AUTO
    """Most responses sampled side by side; auto is what free memory holds, up to what makes the device faster."""
    max_batch_tokens: int | str = AUTO
    """Most tokens (prompts and responses, padding included) computed at once; auto is found as the batch_size is. A
    longer response runs alone."""
    second_names: ClassVar[dict[str, str]] = {"dtype": "torch_dtype"}
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "dtype", "torch_dtype", "device_map", "attn_implementation", "revision=model.revision",
        "trust_remote_code=model.trust_remote_code",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if self.head_dtype not in (None, "float32"):
            what = f"backend.head_dtype is {self.head_dtype!r} but must be float32 or null"
            raise UsageError(f"{what}: set backend.head_dtype=float32")
        if ":" in (self.device or "") and (self.dp_size or self.tp_size or 1) > 1:
            what = f"backend.device={self.device} names one device, but replicas and their parts share out all"
            raise UsageError(f"{what}: set backend.device=cuda")
        for name in ("batch_size", "max_batch_tokens"):
            value, option = getattr(self, name), f"backend.{name}"
            if isinstance(value, str) and value != AUTO:
                raise UsageError(f"{option} is {value!r} but must be a number or auto: set {option}=auto")
            at_least(1, option, None if value == AUTO else value, AUTO)

    def with_float32_head(self) -> Self:
        return dataclasses.replace(self, head_dtype="float32")

"""One interface over HuggingFace Transformers, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.config import BackendConfig, backend_class, engine_configs, lazily
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.fake.config import FakeBackendConfig
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.backends.sglang.config import SGLangBackendConfig
from rl_onoff.backends.vllm.config import VLLMBackendConfig

if TYPE_CHECKING:
    from rl_onoff.backends.base import BaseBackend
    from rl_onoff.backends.engine import EngineInfo

__all__ = [
    "BackendConfig", "BaseBackend", "EngineConfig", "EngineInfo", "FakeBackendConfig", "HuggingFaceBackendConfig",
    "SGLangBackendConfig", "VLLMBackendConfig", "backend_class", "create_backend", "engine_configs",
]  # fmt: skip

__getattr__ = lazily(__name__, BaseBackend="base", EngineInfo="engine")


def create_backend(config: Mapping[str, Any] | BackendConfig | EngineConfig) -> BaseBackend:
    """Build the backend a config names, without loading it; ValueError for an unknown type or option, or a wrong value.

    The config is `{"backend_type": "huggingface" | "vllm" | "sglang", "model_name": …, "backend_specific": {…}}`, a
    BackendConfig, or one engine's config.
    """
    if not isinstance(config, EngineConfig):
        nested = config if isinstance(config, BackendConfig) else BackendConfig.from_dict(config)
        config = nested.backend_config
    return backend_class(config._target_)(config)

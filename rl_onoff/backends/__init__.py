"""One interface over HuggingFace Transformers, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.config import (
    ENGINE_CONFIGS,
    BackendConfig,
    EngineConfig,
    FakeBackendConfig,
    HuggingFaceBackendConfig,
    SGLangBackendConfig,
    VLLMBackendConfig,
)
from rl_onoff.errors import UsageError

if TYPE_CHECKING:
    from rl_onoff.backends.base import BaseBackend
    from rl_onoff.backends.core import EngineInfo

__all__ = [
    "ENGINE_CONFIGS", "BackendConfig", "BaseBackend", "EngineConfig", "EngineInfo", "FakeBackendConfig", "HuggingFaceBackendConfig",
    "SGLangBackendConfig", "VLLMBackendConfig", "backend_class", "create_backend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The interface itself, once somebody asks for it: the schemas alone, which `--help` needs, do without numpy."""
    places = {"BaseBackend": "base", "EngineInfo": "core"}
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rl_onoff.backends.{places[name]}"), name)


def backend_class(target: str) -> type[BaseBackend]:
    """The class an EngineConfig's `_target_` names; imports no engine."""
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def create_backend(config: Mapping[str, Any] | BackendConfig | EngineConfig) -> BaseBackend:
    """Build the backend a config names, without loading it.

    Args:
        config: `{"backend_type": "huggingface" | "vllm" | "sglang", "model_name": …, "backend_specific": {…}}`, a
            BackendConfig, or one engine's config.

    Raises:
        ValueError: unknown backend type or option, wrong value.
    """
    if isinstance(config, Mapping):
        config = BackendConfig.from_dict(config)
    elif not isinstance(config, BackendConfig | EngineConfig):
        raise UsageError(f"{config!r} is no backend's config: a config is a mapping with backend_type, model_name and backend_specific")
    engine = config.backend_config if isinstance(config, BackendConfig) else config
    assert engine is not None
    return backend_class(engine._target_)(engine)

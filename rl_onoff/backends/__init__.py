"""One interface over HuggingFace Transformers, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.config import BackendConfig
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.fake.config import FakeBackendConfig
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.backends.registry import backend_class, build, engine_configs
from rl_onoff.backends.sglang.config import SGLangBackendConfig
from rl_onoff.backends.vllm.config import VLLMBackendConfig
from rl_onoff.errors import UsageError

if TYPE_CHECKING:
    from rl_onoff.backends.base import BaseBackend
    from rl_onoff.backends.engine import EngineInfo

__all__ = [
    "BackendConfig", "BaseBackend", "EngineConfig", "EngineInfo", "FakeBackendConfig", "HuggingFaceBackendConfig",
    "SGLangBackendConfig", "VLLMBackendConfig", "backend_class", "create_backend", "engine_configs",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The interface itself, once somebody asks for it: the schemas alone, which `--help` needs, do without numpy."""
    places = {"BaseBackend": "base", "EngineInfo": "engine"}
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rl_onoff.backends.{places[name]}"), name)


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
        want = "a config is a mapping with backend_type, model_name and backend_specific"
        raise UsageError(f"{config!r} is no backend's config: {want}")
    engine = config.backend_config if isinstance(config, BackendConfig) else config
    assert engine is not None
    return build(engine)

"""vLLM."""

from rl_onoff.backends.registry import lazily

__getattr__ = lazily("rl_onoff.backends.vllm.backend", "VLLMBackend")

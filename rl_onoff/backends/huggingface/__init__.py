"""HuggingFace Transformers."""

from rl_onoff.backends.registry import lazily

__getattr__ = lazily("rl_onoff.backends.huggingface.backend", "HuggingFaceBackend")

"""HuggingFace Transformers."""

from rl_onoff.backends.config import lazily

__getattr__ = lazily(__name__, HuggingFaceBackend="backend")

"""vLLM."""

from rl_onoff.backends.config import lazily

__getattr__ = lazily(__name__, VLLMBackend="backend")

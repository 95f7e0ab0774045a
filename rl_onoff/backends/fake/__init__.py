"""A tiny language model over bytes, for tests and for trying the runner without an engine."""

from rl_onoff.backends.config import lazily

__getattr__ = lazily(__name__, FakeBackend="backend")

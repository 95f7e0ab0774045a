"""A tiny language model over bytes, for tests and for trying the runner without an engine."""

from rl_onoff.backends.registry import lazily

__getattr__ = lazily("rl_onoff.backends.fake.backend", "FakeBackend")

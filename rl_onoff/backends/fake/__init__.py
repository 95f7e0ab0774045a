"""A tiny language model over bytes, for tests and for trying the runner without an engine."""

from typing import Any


def __getattr__(name: str) -> Any:
    """The backend's class, imported once somebody asks for it: its options alone do without numpy."""
    if name != "FakeBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rl_onoff.backends.fake.backend import FakeBackend

    return FakeBackend

"""SGLang."""

from typing import Any


def __getattr__(name: str) -> Any:
    """The backend's class, once somebody asks for it: its options alone, which `--help` needs, do without numpy."""
    if name != "SGLangBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rl_onoff.backends.sglang.backend import SGLangBackend

    return SGLangBackend

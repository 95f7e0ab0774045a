"""HuggingFace Transformers."""

from typing import Any


def __getattr__(name: str) -> Any:
    """The backend's class, imported once somebody asks for it: its options alone do without numpy."""
    if name != "HuggingFaceBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rl_onoff.backends.huggingface.backend import HuggingFaceBackend

    return HuggingFaceBackend

"""SGLang's own LoRA on a CPU. SGLang 0.5.23 pins the memory of adapters, which torch refuses without a GPU; here
nothing is pinned, in the worker and in SGLang's scheduler."""

from __future__ import annotations

from typing import Any

from rl_onoff.backends.engine import EngineInfo
from rl_onoff.backends.sglang import hooks
from rl_onoff.backends.sglang.backend import SGLangBackend

original = hooks.run_scheduler


class UnpinnedSGLang(SGLangBackend):
    def _load(self) -> EngineInfo:
        pin_nothing()
        return super()._load()

    def _start(self, in_engine: bool) -> None:
        hooks.run_scheduler = run_scheduler
        super()._start(in_engine)


def run_scheduler(*args: Any, **kwargs: Any) -> Any:
    pin_nothing()
    return original(*args, **kwargs)


def pin_nothing() -> None:
    import torch

    def unpinned(make: Any) -> Any:
        return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)

    torch.Tensor.pin_memory = lambda self, *_: self
    for name in ("tensor", "zeros", "empty"):
        setattr(torch, name, unpinned(getattr(torch, name)))

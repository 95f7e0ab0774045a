"""SGLang's own LoRA on a CPU. SGLang 0.5.23 pins the memory of adapters, which torch refuses without a GPU; here
nothing is pinned, in the worker and in SGLang's scheduler, and all else is SGLang's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rl_onoff.backends.engine import EngineInfo
from rl_onoff.backends.sglang import hooks
from rl_onoff.backends.sglang.backend import SGLangBackend

original = hooks.run_scheduler


class UnpinnedSGLang(SGLangBackend):
    def _load(self) -> EngineInfo:
        unpin()
        return super()._load()

    def _start(self, in_engine: bool) -> None:
        hooks.run_scheduler = run_scheduler
        super()._start(in_engine)


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    unpin()
    for name in ("layers", "backend.torch_backend"):
        import_module(f"sglang.srt.lora.{name}").torch = Unpinned()  # type: ignore[attr-defined]
    original(*args, **kwargs)


def unpin() -> None:
    import torch

    torch.Tensor.pin_memory = lambda self, *_: self


class Unpinned:
    """torch, without the option `pin_memory`."""

    def __getattr__(self, name: str) -> Any:
        import torch

        found = getattr(torch, name)
        if name not in ("tensor", "zeros"):
            return found
        return lambda *args, pin_memory=False, **kwargs: found(*args, **kwargs)

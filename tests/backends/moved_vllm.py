"""vLLM as it would look to us if a new version had moved what our hooks hold on to, and with a scheduler that caps
nothing."""

from __future__ import annotations

from typing import Any

from rl_onoff.backends.engine import EngineInfo
from rl_onoff.backends.vllm.backend import VLLMBackend


class MovedVLLM(VLLMBackend):
    """The hidden states that our hook is given are those of the next position."""

    def _load(self) -> EngineInfo:
        from rl_onoff.backends.vllm.hooks import Recorder

        honest = Recorder.step
        Recorder.step = lambda self, hidden_ND, head, batch: honest(self, hidden_ND.roll(-1, 0), head, batch)
        return super()._load()


class GoneVLLM(VLLMBackend):
    """There is no runner that our hooks know."""

    def _load(self) -> EngineInfo:
        from rl_onoff.backends.vllm import hooks as vllm_hooks

        vllm_hooks.hook = _no_such_thing
        return super()._load()


class UncappedVLLM(VLLMBackend):
    """Cached blocks of a response are not computed again."""

    def _load(self) -> EngineInfo:
        from rl_onoff.backends.vllm import hooks as vllm_hooks

        vllm_hooks._Shorter = lambda request, num_tokens: request
        return super()._load()


def _no_such_thing(runner: Any, recorder: Any) -> None:
    raise AttributeError("'ModelRunner' object has no attribute 'requests'")
